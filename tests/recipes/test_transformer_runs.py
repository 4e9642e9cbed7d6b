"""Stage 2: whole runs with resume, early stopping, fine-tuning, and what is refused."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import helpers
import hub_cache
import jax
import numpy as np
import optax
import pytest
from toy_stage2 import make_config, prepare

from rq_jax import checkpoint, recipes
from rq_jax.data import make_dataset
from rq_jax.data.text import train_tokenizer
from rq_jax.files import RunLock
from rq_jax.recipes import codes as frozen_codes
from rq_jax.recipes import latent_cache
from rq_jax.recipes.codes import CodeCounter
from rq_jax.recipes.outlook import unlike_starts
from rq_jax.recipes.transformer import Transformer
from rq_jax.sampling import images
from rq_jax.training import run

(h, w, D), K = helpers.CODE_SHAPE, helpers.CODEBOOK_SIZE
DEPTHS = range(1, D + 1)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


# --- whole runs --------------------------------------------------------------------------------------------------------

RUN = {"loop__use_latent_cache": True, "data__flip_probability": 0.5, "loop__ema_decay": 0.9}


def test_a_second_trainer_writes_nothing(places, tmp_path):
    with RunLock(tmp_path / "run"), pytest.raises(ValueError, match="^workdir: '.*run' is in use by process"):
        recipes.train(make_config(places, **RUN), str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock.json"]


def test_a_tokenizer_of_the_hub_is_recorded_with_its_commit(places, tmp_path, monkeypatch):
    commit = "c" * 40
    hub_cache.make(tmp_path, {commit: lambda path: shutil.copytree(places.tokenizer, path)}, {"main": commit})
    hub_cache.use(monkeypatch, tmp_path)
    recipe = prepare(places, tokenizer="hf://owner/name").recipe
    assert recipe.config["tokenizer"] == f"hf://owner/name@{commit}"
    helpers.assert_equal(recipe.tokenizer.variables, prepare(places).recipe.tokenizer.variables)


def test_a_run_goes_on_with_the_commit_that_it_was_started_with(places, tmp_path, monkeypatch):
    old, new = "c" * 40, "d" * 40
    snapshots = dict.fromkeys((old, new), lambda path: shutil.copytree(places.tokenizer, path))
    hub_cache.make(tmp_path / "cache", snapshots, {"main": new})
    hub_cache.use(monkeypatch, tmp_path / "cache")
    started = {}

    def run(recipe, *_, **__):
        started.update(recipe.config)

    monkeypatch.setattr(recipes, "run", run)
    config = make_config(places, tokenizer="hf://owner/name").to_dict()
    checkpoint.write_config(tmp_path / "run", {**config, "tokenizer": f"hf://owner/name@{old}"})
    for given, commit in (("hf://owner/name", old), ("hf://owner/name@main", new), (f"hf://owner/name@{old}", old)):
        recipes.train({**config, "tokenizer": given}, str(tmp_path / "run"))
        assert started["tokenizer"] == f"hf://owner/name@{commit}"
    recipes.train(config, str(tmp_path / "another"))
    assert started["tokenizer"] == f"hf://owner/name@{new}"


def stop_at(monkeypatch, step: int):
    """Interrupt this process while it logs its `step`-th step."""
    summarize, steps = Transformer.summarize, iter(range(1, 100))

    def summarize_and_stop(recipe, means):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return summarize(recipe, means)

    monkeypatch.setattr(Transformer, "summarize", summarize_and_stop)


@pytest.fixture(scope="module")
def whole_run(places, tmp_path_factory):
    """A run of 4 steps over a copy of the tokenizer, which is gone afterwards."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = shutil.copytree(places.tokenizer, root / "stage1")
    config = make_config(places, tokenizer=str(tokenizer), **RUN)
    state = recipes.train(config, str(root / "stage2"))
    shutil.rmtree(tokenizer)
    return root / "stage2", state


def training_labels(places) -> np.ndarray:
    data = prepare(places).data.ordered
    return data.examples(np.arange(data.num_examples))["cond"][:, 0]


def test_classes_are_counted_where_all_pictures_are_seen(places, monkeypatch):
    recipe, data, _ = prepare(places)
    counter = CodeCounter(recipe.tokenizer.model, recipe.tokenizer_variables, recipe.mesh)
    counts = counter.count(data.ordered)
    assert counts.codes_DK.shape == (D, K) and set(counts.codes_DK.sum(-1)) == {data.ordered.num_examples * h * w}
    assert counts.classes_V.tolist() == np.bincount(training_labels(places), minlength=5).tolist()
    assert counts.images == counts.classes_V.sum() == data.ordered.num_examples and counts.regions_Guv is None
    in_parts = CodeCounter(recipe.tokenizer.model, recipe.tokenizer_variables, recipe.mesh, num_steps=2)
    helpers.assert_equal(in_parts.count(data.ordered), counts)
    held_out = counter.count(data.validation, is_held_out=True)
    assert held_out.images == data.validation.num_examples
    monkeypatch.setattr(frozen_codes, "NUM_COUNTED", 1)
    assert data.ordered.batch_size < data.ordered.num_examples and counter.count(data.ordered).classes_V is None
    helpers.assert_equal(counter.count(data.validation, is_held_out=True), held_out)
    monkeypatch.undo()
    assert counter.count(prepare(places, "unconditional").data.ordered).classes_V is None


def test_a_run_that_goes_on_counts_no_codes_again(places, whole_run, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    recipe, data, _ = recipes.prepare(make_config(places, **RUN))
    measured = []

    def measure(counter, data, temperature):
        measured.append(temperature)
        return frozen_codes.CodeFigures(np.ones((D, K), int), [2], np.ones(D), None)

    monkeypatch.setattr(CodeCounter, "measure", measure)
    found, _ = recipe.start(workdir, data, False)
    assert (
        not measured
        and found.config["class_counts"] == json.loads((workdir / "config.json").read_text())["class_counts"]
    )
    logged = helpers.read_metrics(workdir)[4]
    assert found.figures.unigram_nats_D.tolist() == [logged[f"unigram_nats/depth{d}"] for d in DEPTHS]
    assert "soft codes at temperature" in capsys.readouterr().out
    warmer = dataclasses.replace(recipe, losses=dataclasses.replace(recipe.losses, temperature=0.25))
    starts = [(warmer, None), (recipe, None), (recipe, "{}"), (recipe, '{"made_from": 1')]
    mark = json.loads((workdir / "codes.json").read_text())["made_from"]
    starts.append((recipe, json.dumps({"made_from": mark, "figures": None})))
    for number, (other, damage) in enumerate(starts, start=1):
        if damage is not None:
            (workdir / "codes.json").write_text(damage)
        assert other.start(workdir, data, False)[0].config["class_counts"] == [2] and len(measured) == number


def test_run_directory_holds_everything(places, whole_run):
    workdir, state = whole_run
    assert int(state.step) == 4 and int(state.skipped_steps) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["code_shape"] == [h, w, D] and config["model"]["codebook_size"] == K
    assert config["class_names"] == list(helpers.CLASSES)
    assert config["class_counts"] == np.bincount(training_labels(places), minlength=5).tolist()
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} == {"2", "4"}
    assert {path.name for path in (workdir / "pictures").iterdir()} == {
        "curves.png", "samples_00000002.png", "samples_00000004.png",
    }  # fmt: skip
    logged = helpers.read_metrics(workdir)
    training = {"loss", "gradient_norm", "learning_rate", "skipped_share", *(f"code_loss/depth{d}" for d in DEPTHS)}
    evaluation = {"validation_loss", "bits_per_image"}
    evaluation |= {f"{name}_nats/depth{d}" for name in ("validation", "unigram") for d in DEPTHS}
    assert {step: set(scalars) for step, scalars in logged.items()} == {
        1: training, 2: training | evaluation, 3: training, 4: training | evaluation,
    }  # fmt: skip


def test_evaluation_is_that_of_the_nearest_held_out_codes(whole_run, places):
    workdir, _ = whole_run
    loaded = checkpoint.load_model(workdir)
    codes, labels = {}, {}
    for split in ("train", "validation"):
        data = make_dataset(
            name="folder", data_dir=places.pictures, split=split, train=False, batch_size=5, image_size=16,
            label_key="folder",
        )  # fmt: skip
        images = data.examples(np.arange(data.num_examples))
        encode = jax.jit(functools.partial(loaded.tokenizer.model.apply, method="encode_to_codes"))
        codes[split] = np.asarray(encode(loaded.tokenizer.variables, images["image"]))
        labels[split] = images["cond"]
    logits = jax.jit(loaded.model.apply)(loaded.variables, codes["validation"], labels["validation"]).logits
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), codes["validation"][..., None], -1)
    nats_D = -chosen[..., 0].mean((0, 1, 2))
    logged = helpers.read_metrics(workdir)[4]
    np.testing.assert_allclose([logged[f"validation_nats/depth{d}"] for d in DEPTHS], nats_D, rtol=1e-4)
    np.testing.assert_allclose(logged["validation_loss"], nats_D.mean(), rtol=1e-4)
    np.testing.assert_allclose(logged["bits_per_image"], nats_D.sum() * h * w / math.log(2), rtol=1e-4)
    for d in range(D):
        counts_K = 1 + np.bincount(codes["train"][..., d].ravel(), minlength=K)
        unigram = -np.log(counts_K / counts_K.sum())[codes["validation"][..., d]].mean()
        np.testing.assert_allclose(logged[f"unigram_nats/depth{d + 1}"], unigram, rtol=1e-4)


def test_tokenizer_is_frozen_and_travels_with_the_run(whole_run, places):
    workdir, state = whole_run
    theirs, ours = checkpoint.load_model(places.tokenizer), checkpoint.load_model(workdir)
    helpers.assert_equal(ours.tokenizer.variables, theirs.variables)
    assert checkpoint.fingerprint(ours.tokenizer.variables) == checkpoint.fingerprint(theirs.variables)
    for book in (state.model_state, {"codebook": ours.variables["codebook"]}):
        np.testing.assert_array_equal(book["codebook"]["codebook_KE"], theirs.variables["codebook"]["codebook_KE"])
    helpers.assert_equal(ours.variables["params"], jax.device_get(state.ema_params))
    helpers.assert_equal(checkpoint.load_model(workdir, ema=False).variables["params"], jax.device_get(state.params))


def test_run_makes_pictures_without_its_stage_1(whole_run, tmp_path):
    workdir, _ = whole_run
    alone = shutil.copytree(workdir, tmp_path / "alone", ignore=shutil.ignore_patterns("latents", "pictures"))
    loaded = checkpoint.load_model(alone)
    cond = np.zeros((1, 1), np.int32) if loaded.model.is_conditional else None
    batches = images.draw(loaded.model, loaded.variables, loaded.tokenizer, num_images=3, batch_size=2, conds=cond)
    drawn = np.concatenate([batch for _, _, batch in batches])
    tokenizer = loaded.tokenizer.model
    assert drawn.shape == (3, *tokenizer.image_shape, tokenizer.in_channels) and drawn.dtype == np.uint8


def test_resumed_run_is_the_uninterrupted_one(whole_run, places, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_at(patch, 3)
        recipes.train(make_config(places, **RUN), str(tmp_path))
    assert stop.value.code == 128 + signal.SIGINT
    assert helpers.read_metrics(tmp_path).keys() == {1, 2, 3}
    state = recipes.train(make_config(places, **RUN), str(tmp_path))
    helpers.assert_equal(helpers.host(state), helpers.host(whole_run[1]))
    assert helpers.read_metrics(tmp_path) == helpers.read_metrics(whole_run[0])


def test_text_run_carries_its_text_tokenizer(places, tmp_path):
    text = {"loss__image_weight": 0.9, "loss__text_weight": 0.1, "data__text_dropout": 0.1, "loop__total_steps": 1}
    state = run(*prepare(places, "text", **text), tmp_path / "run")
    assert "text_loss" in helpers.read_metrics(tmp_path / "run")[1] and int(state.skipped_steps) == 0
    assert json.loads((tmp_path / "run" / "text_tokenizer.json").read_text())["model"]["type"] == "BPE"


@pytest.fixture(scope="module")
def scripted(places):
    """A run of six steps whose evaluations are scripted, and which measures nothing before it starts."""
    settings = {"loop__evaluate_every_steps": 1, "loop__checkpoint_every_steps": 100, "loop__total_steps": 6}
    return prepare(places, loop__keep_checkpoints=9, **settings)


def script_evaluations(monkeypatch, losses):
    """Replace all evaluations by a list of validation losses."""
    losses = iter(losses)

    def start(recipe, workdir, data, is_fresh):
        checkpoint.bind_tokenizer(workdir, recipe.tokenizer)
        return recipe, data  # itself, with the programs that it has compiled

    monkeypatch.setattr(Transformer, "start", start)
    monkeypatch.setattr(Transformer, "evaluate", lambda recipe, state, batch: ({}, None))
    monkeypatch.setattr(Transformer, "report", lambda *_: ({"validation_loss": next(losses)}, {}))


@pytest.mark.parametrize("patience", [0, 2])
def test_early_stopping_keeps_the_best_weights(scripted, tmp_path, monkeypatch, patience):
    recipe, data, settings = scripted
    settings = dataclasses.replace(settings, early_stopping_evaluations=patience)
    script_evaluations(monkeypatch, [3.0, 2.0, 2.5, 2.5, 1.0, 1.0])
    state = run(recipe, data, settings, tmp_path)
    if not patience:
        assert int(state.step) == 6 and not (tmp_path / "best").exists()
        return
    assert int(state.step) == 4
    assert [path.name for path in (tmp_path / "best").iterdir() if path.name.isdigit()] == ["2"]
    last = jax.device_get(state.params)
    assert helpers.differs(checkpoint.load_model(tmp_path).variables["params"], last)
    helpers.assert_equal(checkpoint.load_model(tmp_path, step=4).variables["params"], last)
    # A run that has stopped stays so.
    again = run(recipe, data, settings, tmp_path)
    assert int(again.step) == 4


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(*_):
        raise AssertionError("settings must be refused before anything compiles")

    monkeypatch.setattr(Transformer, "init", fail)
    for name in ("count", "soft_spread"):
        monkeypatch.setattr(CodeCounter, name, fail)
    monkeypatch.setattr(latent_cache, "open_cache", fail)


TEXT = {"kind": "text"}
REFUSED = {
    "heads": ({"model__num_heads": 3}, "model.num_heads: 3 does not divide model_dim 28"),
    "codebook size": ({"model__codebook_size": 14}, "model.codebook_size: 14 differs from the tokenizer's 13"),
    "code length": ({"model__code_dim": 8}, "model.code_dim: 8 differs from the tokenizer's 24"),
    "code shape": ({"model__code_shape": (4, 2, 1)}, r"model.code_shape: \(4, 2, 1\) differs from the tokenizer's \(4, 2, 3\)"),
    "classes": ({"model__cond_vocab_size": 9}, "model.cond_vocab_size 9 and cond_length 1 do not fit the 5 classes of 'folder'"),
    "class length": ({"model__cond_length": 2}, "model.cond_vocab_size 5 and cond_length 2 do not fit the 5 classes"),
    "no label": ({"data__label_key": None}, "data.label_key: unset, but the model takes one of 5 conditions"),
    "label of no model": ({"kind": "unconditional", "data__label_key": "folder"}, "data.label_key folder, .* an unconditional model"),
    "label and text": ({**TEXT, "data__label_key": "folder"}, "data.label_key 'folder' and data.text_key 'txt': set one of them"),
    "unknown label": ({"data__label_key": "colour"}, "data.label_key: 'colour' is unknown in dataset 'folder'"),
    "vocabulary": ({**TEXT, "model__cond_vocab_size": 7}, "model.cond_vocab_size 7 and cond_length 6 do not fit captions of 6 tokens"),
    "text length": ({**TEXT, "data__text_length": 5}, "cond_length 6 do not fit captions of 5 tokens out of"),
    "text tokenizer": ({**TEXT, "data__text_tokenizer": None}, "data.text_tokenizer: unset, but data.text_key 'txt' needs a tokenizer file"),
    "top_p": ({"sample__top_p": 1.5}, r"top_p: 1.5 is outside \[0, 1\]"),
    "top_k": ({"sample__top_k": 0}, "top_k: 0 must be at least 1"),
    "guidance": ({"sample__guidance": 2.0}, "guidance: 2.0 needs a model trained with use_null_cond"),
    "sampling temperature": ({"sample__temperature": -1.0}, "temperature: -1.0 must be at least 0"),
    "loss temperature": ({"loss__temperature": 0.0}, "loss.temperature: 0.0 must be above 0"),
    "text weight": ({"loss__text_weight": 0.1}, "loss.text_weight: 0.1 needs a text-conditional model; set it to 0"),
    "dropped condition": ({"loss__cond_dropout": 0.1}, "loss.cond_dropout: 0.1 and model.use_null_cond: False belong together"),
    "null condition": ({"model__use_null_cond": True}, "loss.cond_dropout: 0.0 and model.use_null_cond: True belong together"),
    "all dropped": ({"loss__cond_dropout": 1.0, "model__use_null_cond": True}, r"loss.cond_dropout: 1.0 is outside \[0, 1\)"),
    "cached crops": (
        {"loop__use_latent_cache": True, "data__train_transform": "resize_random_crop"},
        "loop.use_latent_cache: .*'resize_center_crop'.*'resize_random_crop'",
    ),
    "cached flips": ({"loop__use_latent_cache": True, "data__flip_probability": 0.25}, "loop.use_latent_cache: .* is 0.25; set it to 0 or 0.5"),
    "cached text dropout": ({**TEXT, "loop__use_latent_cache": True, "data__text_dropout": 0.1}, "loop.use_latent_cache: .*text_dropout 0.1"),
    "batch size": ({"data__batch_size": 12}, "data.batch_size: 12 is not a multiple of 8"),
    "micro-batches": ({"optim__accumulation_steps": 2}, r"data.batch_size: 8 is not a multiple of 16 .*accumulation_steps 2"),
    "validation batch": ({"data__validation_batch_size": 12}, r"data.validation_batch_size: 12 is not a multiple of 8 \(devices along data and fsdp\)"),
    "early stopping": ({"loop__early_stopping_evaluations": -1}, "loop.early_stopping_evaluations: -1 must be at least 0"),
    "no tokenizer": ({"tokenizer": None}, "config.tokenizer: unset; give --config.tokenizer=.*configs/rqvae.py:imagenet256,quicktest"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(places, tmp_path, nothing_compiles, case):
    settings, message = REFUSED[case]
    config = make_config(places, **settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        recipes.train(config, str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_unknown_keys_are_refused(places, tmp_path, nothing_compiles):
    for key in ("model", "data", "optim", "loss", "loop", "mesh", "sample"):
        config = make_config(places)
        with config.unlocked():
            config[key].colour = 1
        with pytest.raises(ValueError, match=rf"{key}.colour: unknown"):
            recipes.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_no_stage_1_run_is_refused(places, whole_run, tmp_path, nothing_compiles):
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()  # stopped before its first checkpoint
    shutil.copy(places.tokenizer / "config.json", tmp_path / "young")
    cases = {
        tmp_path / "nowhere": "'.*nowhere' is no run directory: it has no config.json",
        tmp_path / "empty": "'.*empty' is no run directory: it has no config.json",
        tmp_path / "young": "'.*young' holds no checkpoint",
        whole_run[0]: r"tokenizer: '.*' holds a 'rqtransformer', not a stage-1 run \('rqvae' or 'dqvae'\)",
    }
    for directory, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            recipes.train(make_config(places, tokenizer=str(directory)), str(tmp_path / "run"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_on_resume_is_refused_naming_both(whole_run, places, tmp_path, nothing_compiles):
    other = helpers.save_tokenizer(tmp_path / "other", places.pictures, seed=1)
    prints = [checkpoint.fingerprint(checkpoint.load_model(d).variables) for d in (other, places.tokenizer)]
    before = (whole_run[0] / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"tokenizer: fingerprint {prints[0]} differs from {prints[1]}"):
        recipes.train(make_config(places, tokenizer=str(other), **RUN), str(whole_run[0]))
    assert (whole_run[0] / "config.json").read_bytes() == before
    helpers.assert_equal(
        checkpoint.load_model(whole_run[0]).tokenizer.variables, checkpoint.load_model(places.tokenizer).variables
    )


def test_the_stage_1_directory_is_no_place_for_stage_2(places, tmp_path, nothing_compiles):
    both = shutil.copytree(places.tokenizer, tmp_path / "both")
    with pytest.raises(
        ValueError, match="workdir: '.*both' holds a run of 'rqvae', not of 'rqtransformer'; give another --workdir"
    ):
        recipes.train(make_config(places, tokenizer=str(both)), str(both))
    assert checkpoint.read_config(both)["model"]["name"] == "rqvae"


def test_command_line_ends_with_one_line(places, tmp_path):
    command = [sys.executable, "train_transformer.py", "--config=configs/rqtransformer.py:quicktest"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.tokenizer={tmp_path / 'nowhere'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nowhere" in lines[0], result.stderr
    assert not (tmp_path / "run").exists()


# --- fine-tuning -------------------------------------------------------------------------------------------------------


def begun(places, kind="class", **settings):
    recipe = prepare(places, kind, **{**RUN, **settings}).recipe
    return helpers.host(recipe.init(jax.random.key(recipe.seed)))


def test_a_transformer_starts_from_the_weights_of_a_run(places, whole_run):
    workdir, trained = whole_run
    trained = helpers.host(trained)
    averaged, kept = begun(places, init_from=str(workdir)), begun(places, init_from=str(workdir), keep_optimizer=True)
    helpers.assert_equal(averaged["params"], trained["ema_params"])
    helpers.assert_equal(averaged["model_state"], trained["model_state"])
    assert averaged["step"] == kept["step"] == 0
    assert not any(map(np.any, jax.tree.leaves(averaged["opt_state"])))
    for name in ("params", "ema_params"):
        helpers.assert_equal(kept[name], trained[name])
    for moment in ("mu", "nu"):
        helpers.assert_equal(optax.tree.get(kept["opt_state"], moment), optax.tree.get(trained["opt_state"], moment))


def test_a_transformer_that_fine_tunes_has_the_codebook_of_its_own_tokenizer(places, whole_run, tmp_path, caplog):
    other = helpers.save_tokenizer(tmp_path / "other", places.pictures, seed=1)
    state = begun(places, init_from=str(whole_run[0]), tokenizer=str(other))
    helpers.assert_equal(state["params"], helpers.host(whole_run[1])["ema_params"])
    codebook = checkpoint.load_tokenizer(other).variables["codebook"]["codebook_KE"]
    helpers.assert_equal(state["model_state"]["codebook"]["codebook_KE"], codebook)
    (line,) = unlike_starts(prepare(places, init_from=str(whole_run[0]), tokenizer=str(other)).recipe)
    assert "is trained on the codes of another tokenizer, " in line and "\n" not in line
    assert unlike_starts(prepare(places, init_from=str(whole_run[0])).recipe) == []


def test_words_of_another_text_tokenizer_are_told(places, tmp_path):
    model = prepare(places, "text").recipe
    checkpoint.save_model(tmp_path, model.config, helpers.drawn_variables(model.model))
    checkpoint.save_model(tmp_path / "tokenizer", model.tokenizer.config, model.tokenizer.variables)
    shutil.copy(places.text_tokenizer, tmp_path / checkpoint.TEXT_TOKENIZER)
    recipe = prepare(places, "text", init_from=str(tmp_path)).recipe
    assert unlike_starts(recipe) == []
    train_tokenizer(["other words", "of another world"], 40, tmp_path / checkpoint.TEXT_TOKENIZER)
    (line,) = unlike_starts(recipe)
    assert "reads words by another text tokenizer; " in line and line.endswith("text_tokenizer.json'")


def test_only_a_fresh_transformer_starts_from_others(places, whole_run, tmp_path):
    config = make_config(places, **RUN, init_from=str(whole_run[0]))
    recipe, data, _ = recipes.prepare(config, mesh=helpers.make_mesh())
    for is_fresh, expected in ((True, str(whole_run[0])), (False, None)):
        started, _ = recipe.start(str(tmp_path / "run"), data, is_fresh)
        assert started.init_from == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep_optimizer": True}, "keep_optimizer: True needs init_from, a run whose optimizer is kept; set both or"),
        ({"init_from": "/nowhere"}, "'/nowhere' is no run directory"),
        ({"init_from": "{tokenizer}"}, r"^init_from: .*; set config.model to the settings in its config.json$"),
        ({"init_from": "{tokenizer}", "keep_optimizer": True}, "^keep_optimizer: '.*' holds weights alone; leave it out"),
    ],
)  # fmt: skip
def test_starts_that_are_refused_before_anything_is_made(places, tmp_path, nothing_compiles, settings, message):
    if "init_from" in settings:
        settings = {**settings, "init_from": settings["init_from"].format(tokenizer=places.tokenizer)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recipes.train(make_config(places, **settings), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_no_start_of_a_transformer(places):
    with pytest.raises(ValueError, match=r"^init_from: .*; set config.model to the settings in its config.json$"):
        begun(places, init_from=str(places.tokenizer))

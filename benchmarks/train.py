"""The training steps of both stages as the scripts compile them, and the reading of their pictures alone."""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import train_transformer
import train_vae
from benchmarks import timing, weights
from configs import rqtransformer, rqvae
from rq_jax import checkpoint, models
from rq_jax.data import make_dataset
from rq_jax.devices import sharding
from rq_jax.models.flops import Work, autoencoder_flops, count_traced, encoder_work, transformer_flops
from rq_jax.pretrained import vgg_lpips
from rq_jax.settings.construct import construct
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.settings import LoopSettings, resolve_durations
from rq_jax.training.state import TrainState

# Of durations in epochs, which no speed depends on: a run need not know the size of its data set.
STEPS_PER_EPOCH = 1000

Config = dict[str, Any]


def load_config(config: Config) -> Any:
    """The preset of a configuration, with what the command line sets."""
    preset = f"{config['preset']},quicktest" if config["quicktest"] else config["preset"]
    full = (rqvae if config["stage"] == 1 else rqtransformer).get_config(preset)
    if config.get("batch"):
        full.data.batch_size = config["batch"]
    if config.get("dtype"):
        full.model.dtype = config["dtype"]
    if config.get("accumulation_steps"):
        full.optim.accumulation_steps = config["accumulation_steps"]
    if config["stage"] == 1:
        full.loss.perceptual_weight *= config.get("perceptual", True)
        full.loss.adversarial_weight *= config.get("adversary", True)
    return full


def groups(args: argparse.Namespace) -> list[list[Config]]:
    """Configurations of a sweep; what the command line leaves out is the preset's.

    Raises:
      ValueError: an unknown preset, or settings that do not fit together.
    """
    for name in ("no_perceptual", "no_adversary"):
        if args.stage == 2 and getattr(args, name):
            raise ValueError(f"--{name}: stage 2 has neither; leave it out, or give --stage=1")
    if args.stage == 1 and args.accumulation_steps:
        raise ValueError(f"--accumulation_steps: {args.accumulation_steps} is for stage 2; leave it out")
    found, mesh = [], sharding.make_mesh()
    for preset, dtype, batch in itertools.product(args.preset, args.dtype or [None], args.batch or [None]):
        config = {"stage": args.stage, "preset": preset, "quicktest": args.quicktest, "batch": batch, "dtype": dtype}
        if args.stage == 1:
            config |= {"perceptual": not args.no_perceptual, "adversary": not args.no_adversary}
        full = load_config(config | {"accumulation_steps": args.accumulation_steps})
        steps = full.optim.accumulation_steps
        sharding.check_batch_size(mesh, full.data.batch_size, steps)
        config |= {"batch": full.data.batch_size, "dtype": full.model.dtype, "accumulation_steps": steps}
        found.append([config | {"data": args.data, "steps": args.steps}])
    return found


class Stage(NamedTuple):
    """A stage of training, ready to compile.

    Attributes:
      state: before the first step, on its devices.
      step: (state, batch, frozen) -> (state, metrics), the script's own.
      frozen: variables that it reads and does not train.
      model, tokenizer: the same in stage 1.
      model_flops: of one picture, forward and backward, without the other networks that a step runs.
      frozen_work: one picture's share of the step that does not run in the model's dtype.
    """

    state: TrainState
    step: Callable[..., Any]
    frozen: Any
    model: Any
    tokenizer: Any
    model_flops: float
    frozen_work: dict[str, Work]


def prepare(full: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The pieces of a run that both stages have."""
    resolve = functools.partial(resolve_durations, steps_per_epoch=STEPS_PER_EPOCH)
    loop = resolve(full.loop, "loop", ("total",))
    settings = construct(LoopSettings, "loop", loop)
    optim = resolve(full.optim, "optim", ("warmup", "hold"))
    optimizer = construct(make_optimizer, "optim", optim, total_steps=settings.total_steps)
    return dict(mesh=mesh, model=models.create(**full.model), settings=settings, optim=optim, optimizer=optimizer)


def prepare_stage1(full: Any, mesh: jax.sharding.Mesh) -> Stage:
    """The step of train_vae.py, all its terms begun."""
    run = prepare(full, mesh)
    model, settings, optimizer = run["model"], run["settings"], run["optimizer"]
    durations = resolve_durations(full.loss, "loss", train_vae.LOSS_DURATIONS, STEPS_PER_EPOCH)
    loss = construct(train_vae.Losses, "loss", durations)
    adversary = perceptual = frozen = None
    if loss.adversarial_weight:
        adversary = train_vae.make_adversary(full, model, run["optim"], settings.total_steps)
    if loss.perceptual_weight:
        frozen = weights.draw(vgg_lpips.abstract_variables(), sharding.replicated(mesh))
        perceptual = vgg_lpips.Perceptual("random", frozen)
    phase = train_vae.Phase(perceptual is not None, adversary is not None)
    train_step = train_vae.make_train_step(model, optimizer, loss, settings.ema_decay, perceptual, adversary, mesh)

    def step(state, batch, frozen):
        return train_step(state, batch, phase, frozen)

    state = train_vae.init_state(full, {**run, "adversary": adversary})
    return Stage(state, step, frozen, model, model, autoencoder_flops(model), {})


def fill_from_preset(full: Any) -> Any:
    """Fill a stage-2 config from the tokenizer preset that it names; the tokenizer."""
    config = rqvae.get_config(full.tokenizer_preset)
    tokenizer = models.create(**config.model)
    train_transformer.fill_from_tokenizer(full, checkpoint.LoadedModel(tokenizer, {}, config.to_dict(), None))
    return tokenizer


def prepare_stage2(full: Any, mesh: jax.sharding.Mesh) -> Stage:
    """The step of train_transformer.py, over the preset's tokenizer with random weights."""
    tokenizer = fill_from_preset(full)
    run = prepare(full, mesh)
    model = run["model"]
    loss = construct(train_transformer.Losses, "loss", full.loss)
    loss.check(model)
    frozen = weights.draw(models.abstract_variables(tokenizer), sharding.replicated(mesh))
    step = train_transformer.make_train_step(model, tokenizer, run["optimizer"], loss, run["settings"].ema_decay)
    encoder = encoder_work(tokenizer)
    model_flops = sum(transformer_flops(model, train=True).values())
    state = train_transformer.init_state(full, run, frozen)
    return Stage(state, step, frozen, model, tokenizer, model_flops, {"tokenizer": encoder})


def open_batches(config: Config, full: Any, stage: Stage, mesh: jax.sharding.Mesh) -> tuple[Callable, Callable]:
    """(next batch on the devices, stop reading); random pictures are made once."""
    put = functools.partial(sharding.put_batch, mesh)
    if config["data"] == "preset":
        dataset = open_dataset(full, stage.tokenizer.in_channels)
        if config["stage"] == 2:
            train_transformer.check_condition(stage.model, dataset, full)
        iterator = dataset.iterator()
        return lambda: put({k: v for k, v in next(iterator).items() if k in ("image", "cond")}), iterator.close
    rng, B = np.random.default_rng(0), config["batch"]
    shape = (B, *stage.tokenizer.image_shape, stage.tokenizer.in_channels)
    batch = {"image": rng.uniform(-1, 1, shape).astype(np.float32)}
    if config["stage"] == 2 and stage.model.is_conditional:
        batch["cond"] = rng.integers(0, stage.model.cond_vocab_size, (B, stage.model.cond_length), np.int32)
    batch = put(batch)
    return lambda: batch, lambda: None


def build(config: Config, args: argparse.Namespace) -> timing.Program:
    """The step of a configuration; its state is donated from step to step, as in a run."""
    full, mesh = load_config(config), sharding.make_mesh()
    stage = (prepare_stage1 if config["stage"] == 1 else prepare_stage2)(full, mesh)
    next_batch, close = open_batches(config, full, stage, mesh)
    state, frozen, steps = stage.state, stage.frozen, config["steps"]
    count, batch = steps * config["batch"], next_batch()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    counts = count_traced(stage.step, state, batch, frozen)
    options = {"donate_argnums": 0, "out_shardings": (shardings, None)}
    compiled = timing.compile_program(stage.step, state, batch, frozen, **options)
    stages = {name: work * count for name, work in stage.frozen_work.items()}
    flops, traffic = (sum(getattr(work, name) for work in stages.values()) for name in ("flops", "bytes"))
    stages["training"] = Work(steps * counts.flops - flops, steps * counts.bytes - traffic, full.model.dtype)

    def call() -> Any:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled.call(state, next_batch(), frozen)
        return metrics

    return timing.Program(
        call,
        count,
        compiled.seconds,
        compiled.memory,
        stages,
        model_flops=count * stage.model_flops,
        num_devices=mesh.size,
        details=lambda seconds: {"steps_per_second": steps / seconds},
        close=close,
    )


# --- reading alone ---


def data_groups(args: argparse.Namespace) -> list[list[Config]]:
    """Configurations of a sweep over presets, batches and threads."""
    found = []
    for preset, batch, num_threads in itertools.product(args.preset, args.batch or [None], args.num_threads or [None]):
        config = {"stage": args.stage, "preset": preset, "quicktest": args.quicktest, "batch": batch}
        data = load_config(config).data
        config |= {"batch": data.batch_size, "num_threads": num_threads or data.num_threads, "steps": args.steps}
        found.append([config | {"data_name": args.data_name or data.name, "data_dir": args.data_dir or data.data_dir}])
    return found


def build_data(config: Config, args: argparse.Namespace) -> timing.Program:
    """Batches of training pictures as the scripts read them, on the host."""
    full = load_config(config)
    if config["stage"] == 2:
        image_size = rqvae.get_config(full.tokenizer_preset).model.image_size
        with full.unlocked():
            full.data.image_size = image_size
    if config["data_name"] != full.data.name:
        full.data.label_key = full.data.text_key = None  # another data set has others
    full.data.name, full.data.data_dir, full.data.num_threads = (
        config[name] for name in ("data_name", "data_dir", "num_threads")
    )
    iterator = open_dataset(full).iterator()

    def call() -> None:
        for _ in range(config["steps"]):
            next(iterator)

    return timing.Program(call, config["steps"] * config["batch"], close=iterator.close)


def open_dataset(full: Any, channels: int = 3) -> Any:
    """The training split that a config names."""
    data = {**full.data, "channels": channels}
    return construct(make_dataset, "data", data, split="train", train=True, seed=full.seed)

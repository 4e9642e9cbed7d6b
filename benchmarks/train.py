"""The training steps of both stages as their recipes compile them, and the reading of their images alone."""

import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import lengths, presets, timing, weights
from rq_jax import checkpoint, models, recipes
from rq_jax.data import Dataset, Splits, make_dataset
from rq_jax.data.conditions import check_condition
from rq_jax.data.sources import examples
from rq_jax.devices import sharding
from rq_jax.grains import PackedCodes
from rq_jax.models.flops import Work, count_traced, encoder_work, transformer_flops
from rq_jax.pretrained import vgg_lpips
from rq_jax.recipes.buckets import Buckets
from rq_jax.recipes.codes import fill_from_tokenizer
from rq_jax.settings import checks
from rq_jax.settings.construct import construct
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.settings import loop_settings, recipe_settings, resolve_durations

# Durations in epochs change no speed, so that the size of the data set need not be known.
STEPS_PER_EPOCH = 1000
LAST_STEP = 2**31 - 1  # every term of the objective has begun there

Config = dict[str, Any]  # what is measured, as a record has it
Settings = dict[str, Any]  # a preset as nested dicts
Recipe = recipes.Tokenizer | recipes.Transformer | recipes.DQTransformer


# --- recipes without files ---


def load_settings(config: Config) -> Settings:
    """The preset of a configuration, changed as the command line says; of stage 2 with its tokenizer's settings."""
    preset = f"{config['preset']},quicktest" if config.get("quicktest") else config["preset"]
    settings = presets.load(preset, config["stage"])
    settings["data"]["batch_size"] = config.get("batch") or settings["data"]["batch_size"]
    settings["model"]["dtype"] = config.get("dtype") or settings["model"]["dtype"]
    if config.get("accumulation_steps"):
        settings["optim"]["accumulation_steps"] = config["accumulation_steps"]
    if config.get("gradients"):
        settings["optim"]["use_sharded_gradients"] = config["gradients"] == "sharded"
    if config["stage"] == 2:
        kind = recipes.RECIPES[settings["model"]["name"]]
        if kind.has_grains:
            settings["loop"] |= {"buckets": config.get("buckets") or (), "bucket_window": config.get("window") or 1}
        return fill_from_tokenizer(settings, tokenizer_settings(settings), kind.has_grains)
    settings["loss"]["perceptual_weight"] *= config.get("perceptual", True)
    settings["loss"]["adversarial_weight"] *= config.get("adversary", True)
    return settings


def tokenizer_settings(settings: Settings) -> Settings:
    """The preset of the tokenizer that a preset of stage 2 expects."""
    file = "dqvae" if recipes.RECIPES[settings["model"]["name"]].has_grains else "rqvae"
    return presets.load(f"{file}:{settings['tokenizer_preset']}", 1)


def make_recipe(settings: Settings, mesh: jax.sharding.Mesh, place: Callable[[Any], Any]) -> Recipe:
    """The recipe of a preset on a mesh.

    Args:
      settings: from `load_settings`.
      mesh: devices.
      place: shapes of frozen variables -> what stands in for them, such as random weights.

    Raises:
      ValueError: settings that are not allowed.
    """
    is_tokenizer = recipes.RECIPES[settings["model"]["name"]] is recipes.Tokenizer
    return (_tokenizer_recipe if is_tokenizer else _transformer_recipe)(settings, mesh, place)


def _tokenizer_recipe(settings: Settings, mesh: jax.sharding.Mesh, place: Callable[[Any], Any]) -> recipes.Tokenizer:
    weight = settings["loss"]["perceptual_weight"]
    # Its weights would be read from a file.
    without = {"loss": {**settings["loss"], "perceptual_weight": 0.0}, "evaluation": {"use_perceptual": False}}
    config = recipes.Tokenizer.resolve({**settings, **without})
    sizes = types.SimpleNamespace(batch_size=config["data"]["batch_size"], steps_per_epoch=STEPS_PER_EPOCH)
    recipe = recipes.Tokenizer.from_config(config, mesh, Splits(sizes, None, None))
    if not weight:
        return recipe
    perceptual = vgg_lpips.Perceptual("random", place(vgg_lpips.abstract_variables()))
    losses = dataclasses.replace(recipe.losses, perceptual_weight=weight)
    return dataclasses.replace(recipe, losses=losses, perceptual=perceptual)


def _transformer_recipe(
    settings: Settings, mesh: jax.sharding.Mesh, place: Callable[[Any], Any]
) -> recipes.Transformer | recipes.DQTransformer:
    kind = recipes.RECIPES[settings["model"]["name"]]
    tokenizer = models.create(**tokenizer_settings(settings)["model"])
    total_steps, loop = loop_settings(settings["loop"], STEPS_PER_EPOCH).total_steps, recipe_settings(settings["loop"])
    optim = resolve_durations(settings["optim"], "optim", ("warmup", "hold"), STEPS_PER_EPOCH)
    return kind(
        models.create(**settings["model"]),
        checkpoint.LoadedModel(tokenizer, {}, tokenizer_settings(settings), None),
        construct(make_optimizer, "optim", optim, total_steps=total_steps),
        construct(kind.losses_class, "loss", settings["loss"]),
        mesh,
        ema_decay=loop.ema_decay,
        buckets=Buckets(loop.buckets, loop.bucket_window),
        seed=settings["seed"],
        tokenizer_variables=place(models.abstract_variables(tokenizer)),
    )


def tokenizer_of(recipe: Recipe) -> Any:
    """The tokenizer that a recipe trains or builds on."""
    return recipe.model if isinstance(recipe, recipes.Tokenizer) else recipe.tokenizer.model


def batch_shapes(recipe: Recipe, batch_size: int, tokens: int | None = None) -> dict[str, Any]:
    """Shapes of a training batch of images, or of codes packed to so many tokens, with their shardings."""

    def rows(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(recipe.mesh))

    tokenizer, ids = tokenizer_of(recipe), functools.partial(rows, dtype=jnp.int32)
    shapes: dict[str, Any] = {"image": rows(*tokenizer.image_shape, tokenizer.in_channels, dtype=jnp.float32)}
    if tokens is not None:
        content = ids(tokens, recipe.model.code_shape[-1])
        shapes = {"packed": PackedCodes(content, ids(tokens), ids(tokens), ids())}
    if getattr(recipe.model, "is_conditional", False):
        shapes["cond"] = ids(recipe.model.cond_length)
    return shapes


def compile_step(recipe: Recipe, state: Any, batch: Mapping[str, Any]) -> timing.Compiled:
    """(state, batch, frozen) -> (state, metrics), all terms begun; the state is donated. Shapes will do."""
    outputs = recipe.shardings, sharding.replicated(recipe.mesh)
    update = functools.partial(recipe.update, phase=recipe.phase(LAST_STEP))
    return timing.compile_program(update, state, batch, recipe.frozen, donate_argnums=0, out_shardings=outputs)


def compile_steps(recipe: Recipe, state: Any, batch: Mapping[str, Any]) -> timing.Compiled:
    """`compile_step` for a batch like this, or where batches are packed for every bucket; the memory is the largest."""
    if "packed" not in batch:
        return compile_step(recipe, state, batch)
    buckets, batch_size = (*recipe.buckets.tokens, recipe.model.layout.max_tokens), len(batch["packed"].length)
    shapes = [batch_shapes(recipe, batch_size, tokens) for tokens in sorted(set(buckets))]
    programs = {lengths.shape_of(each): compile_step(recipe, state, each) for each in shapes}

    def call(state: Any, batch: Mapping[str, Any], frozen: Any) -> Any:
        return programs[lengths.shape_of(batch)].call(state, batch, frozen)

    sizes = [program.memory for program in programs.values()]
    memory = {name: max(size[name] for size in sizes) for name in sizes[0]}
    return timing.Compiled(call, sum(program.seconds for program in programs.values()), memory)


# --- training ---


def groups(args: argparse.Namespace) -> list[list[Config]]:
    """Configurations of a sweep; what the command line leaves out is the preset's.

    Raises:
      ValueError: an unknown preset, or settings that do not fit together.
    """
    buckets = Buckets(tuple(args.buckets or ()), args.window)
    for name in ("no_perceptual", "no_adversary"):
        if args.stage == 2 and getattr(args, name):
            raise ValueError(f"--{name}: stage 2 has neither; leave it out, or give --stage=1")
    if args.stage == 1 and args.accumulation_steps:
        raise ValueError(f"--accumulation_steps: {args.accumulation_steps} is for stage 2; leave it out")
    sweep, mesh = [], sharding.make_mesh()
    for preset, dtype, batch in itertools.product(args.preset, args.dtype or [None], args.batch or [None]):
        config = {"stage": args.stage, "preset": preset, "quicktest": args.quicktest, "batch": batch, "dtype": dtype}
        if args.stage == 1:
            config |= {"perceptual": not args.no_perceptual, "adversary": not args.no_adversary}
        settings = load_settings(config | {"accumulation_steps": args.accumulation_steps})
        steps, batch = settings["optim"]["accumulation_steps"], settings["data"]["batch_size"]
        sharding.check_batch_size(mesh, batch, steps)
        config |= {"batch": batch, "dtype": settings["model"]["dtype"], "accumulation_steps": steps}
        config |= {"data": args.data, "steps": args.steps}
        check_lengths(config, settings, buckets)
        sweep.append([config])
        if buckets.tokens:  # beside the same without them
            sweep[-1].insert(0, config | {"buckets": buckets.tokens, "window": buckets.window})
    return sweep


def check_lengths(config: Config, settings: Settings, buckets: Buckets) -> None:
    """Codes are for models with grains; buckets for codes, and a run for whole windows of their batches.

    Raises:
      ValueError: naming the option.
    """
    has_grains = config["stage"] == 2 and recipes.RECIPES[settings["model"]["name"]].has_grains
    if config["data"] == "codes" and not has_grains:
        raise ValueError("--data: codes is for stage 2 over grains; give a preset dqtransformer:<preset>")
    if buckets.tokens:
        if config["data"] != "codes":
            raise ValueError(f"--buckets: {buckets.tokens} needs codes of unlike lengths; give --data=codes")
        buckets.check_layout(models.create(**settings["model"]).layout)
        checks.multiple_of("--steps", config["steps"], buckets.window, "the batches of --window")


def open_batches(config: Config, settings: Settings, recipe: Recipe) -> tuple[Callable[[], Any], Callable[[], None]]:
    """(next batch on the devices, stop reading); random images are drawn once."""
    if config["data"] != "synthetic":
        if config["data"] == "codes":
            dataset: Any = lengths.SpreadCodes(recipe.model, config["batch"], config["steps"])
            dataset = recipe.bucketed(dataset) if config.get("buckets") else dataset
        else:
            dataset = open_dataset(settings)
            if config["stage"] == 2:
                check_condition(recipe.model, dataset, settings["data"])
        iterator = dataset.iterator()
        return lambda: sharding.put_batch(recipe.mesh, next(iterator)), iterator.close
    rng, shapes = np.random.default_rng(0), batch_shapes(recipe, config["batch"])
    batch = {"image": rng.uniform(-1, 1, shapes["image"].shape).astype(np.float32)}
    if "cond" in shapes:
        batch["cond"] = rng.integers(0, recipe.model.cond_vocab_size, shapes["cond"].shape, np.int32)
    batch = sharding.put_batch(recipe.mesh, batch)
    return lambda: batch, lambda: None


class Prepared(NamedTuple):
    """A step that is compiled, and what it starts from."""

    recipe: Recipe
    state: Any
    batch: Any
    compiled: timing.Compiled
    next_batch: Callable[[], Any]
    close: Callable[[], None]


def prepare(config: Config) -> Prepared:
    """The step of a configuration on all devices, with random weights."""
    settings, mesh = load_settings(config), sharding.make_mesh()
    recipe = make_recipe(settings, mesh, functools.partial(weights.draw, placement=sharding.replicated(mesh)))
    config = {"data": "synthetic", **config, "batch": settings["data"]["batch_size"]}
    next_batch, close = open_batches(config, settings, recipe)
    state, batch = recipe.init(jax.random.key(recipe.seed)), next_batch()
    return Prepared(recipe, state, batch, compile_steps(recipe, state, batch), next_batch, close)


def build(config: Config, args: argparse.Namespace) -> timing.Program:
    """The step of a configuration; its state is donated from step to step, as in a run."""
    recipe, state, batch, compiled, next_batch, close = prepare(config)
    steps, model_flops, tokens, batches = config["steps"], recipe.flops_per_image, {}, [batch]
    if config["data"] == "codes":
        batches += [next_batch() for _ in range(steps - 1)]  # a run, as all others
        tokens = lengths.count_tokens(recipe.model, batches)
        of_mean = transformer_flops(recipe.model, train=True, tokens=round(tokens["tokens_per_image"]))
        model_flops = sum(of_mean.values())

    def call() -> Any:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled.call(state, next_batch(), recipe.frozen)
        return metrics

    count = steps * config["batch"]
    return timing.Program(
        call,
        count,
        compiled.seconds,
        compiled.memory,
        run_work(recipe, state, batches, steps),
        model_flops=count * model_flops,
        num_devices=recipe.mesh.size,
        details=lambda seconds: {"steps_per_second": steps / seconds, **tokens},
        close=close,
    )


def step_work(recipe: Recipe, state: Any, batch: Mapping[str, Any], steps: int) -> dict[str, Work]:
    """Work of `steps` training steps; a frozen tokenizer counts apart, as its dtype is its own."""
    update = functools.partial(recipe.update, phase=recipe.phase(LAST_STEP))
    counts, stages = count_traced(update, state, batch, recipe.frozen), {}
    flops, traffic = steps * counts.flops, steps * counts.bytes
    if not isinstance(recipe, recipes.Tokenizer) and "image" in batch:
        stages["tokenizer"] = encoder_work(recipe.tokenizer.model) * (steps * batch["image"].shape[0])
        flops, traffic = flops - stages["tokenizer"].flops, traffic - stages["tokenizer"].bytes
    return stages | {"training": Work(flops, traffic, recipe.model.dtype)}


def run_work(recipe: Recipe, state: Any, batches: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Work]:
    """Work of a run whose steps have these batches in equal shares."""
    by_shape = {lengths.shape_of(batch): batch for batch in batches}
    shares = collections.Counter(map(lengths.shape_of, batches))
    total: dict[str, Work] = {}
    for shape, batch in by_shape.items():
        for name, work in step_work(recipe, state, batch, 1).items():
            work *= steps * shares[shape] / len(batches)
            total[name] = total[name] + work if name in total else work
    return total


# --- reading alone ---


MIN_JPEG_SIDE = 128  # smaller ones all fit the cache of decoded images


def data_groups(args: argparse.Namespace) -> list[list[Config]]:
    """Configurations of a sweep over presets, batches and threads.

    Raises:
      ValueError: an unknown preset, or settings that do not fit together.
    """
    if args.jpeg_side and (args.data_name or args.data_dir):
        raise ValueError(f"--jpeg_side: {args.jpeg_side} stands for a data set; leave out --data_name and --data_dir")
    if args.jpeg_side and args.jpeg_side < MIN_JPEG_SIDE:
        raise ValueError(f"--jpeg_side: {args.jpeg_side} must be at least {MIN_JPEG_SIDE}: smaller ones are cached")
    sweep = []
    for preset, batch, num_threads in itertools.product(args.preset, args.batch or [None], args.num_threads or [None]):
        config = {"stage": args.stage, "preset": preset, "quicktest": args.quicktest, "batch": batch}
        data = load_settings(config)["data"]
        config |= {"batch": data["batch_size"], "num_threads": num_threads or data["num_threads"], "steps": args.steps}
        source = {"data_name": args.data_name or data["name"], "data_dir": args.data_dir or data["data_dir"]}
        if args.jpeg_side:
            source = {"data_name": "folder", "data_dir": None, "jpeg_side": args.jpeg_side}
        sweep.append([config | source])
    return sweep


def build_data(config: Config, args: argparse.Namespace) -> timing.Program:
    """Batches of training images as a run reads them, on the host."""
    settings = load_settings(config)
    data = settings["data"]
    if config["data_name"] != data["name"]:
        data |= {"label_key": None, "text_key": None}  # another data set has others
    with contextlib.ExitStack() as stack:
        folder = config["data_dir"]
        if config.get("jpeg_side"):
            folder = write_jpegs(stack.enter_context(tempfile.TemporaryDirectory()), config["jpeg_side"])
        data |= {"name": config["data_name"], "data_dir": folder, "num_threads": config["num_threads"]}
        iterator = open_dataset(settings).iterator()
        stack.callback(iterator.close)
        close, count, first = stack.pop_all().close, config["steps"] * config["batch"], time.process_time()
    read = 0

    def call() -> None:
        nonlocal read
        for _ in range(config["steps"]):
            next(iterator)
        read += count

    def per_core(seconds: float) -> dict[str, Any]:
        rate = read / (time.process_time() - first)
        return {"per_second_of_core": rate, "per_second_of_host": timing.HOST_CORES * rate}

    return timing.Program(call, count, details=per_core, close=close)


def write_jpegs(folder: str, side: int) -> str:
    """Photograph-like JPEGs, under so many names that decoded ones are not kept in memory."""
    from PIL import Image

    rng, photographs = np.random.default_rng(0), 8
    for number in range(photographs + 5 * examples._CACHE_BYTES // (12 * side**2)):  # some are held out
        path = Path(folder) / f"{number:06d}.jpg"
        if number >= photographs:
            path.hardlink_to(Path(folder) / f"{number % photographs:06d}.jpg")
            continue
        pixels = np.zeros((side, side, 3), np.float32)
        for cells in (4, 16, 64, side):  # as much of each scale as of any other but the finest
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            pixels += np.asarray(noise.resize((side, side)), np.float32) * (0.1 if cells == side else 0.3)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
    return folder


def open_dataset(settings: Settings) -> Dataset:
    """The training split of a preset, as a run reads it."""
    data = recipes.RECIPES[settings["model"]["name"]].data_settings(settings)
    return construct(make_dataset, "data", data, split="train", train=True, seed=settings["seed"]).as_bytes()

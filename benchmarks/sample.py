"""Sampling and decoding with random weights: the throughput models of the paper (section 4.3, figure 4)."""

import argparse
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import presets, released, roofline, timing, weights
from rq_jax import models, sampling
from rq_jax.grains import num_codes
from rq_jax.models.flops import decoder_work
from rq_jax.sampling import as_released
from rq_jax.settings import checks

# Presets of configs/rqtransformer.py; at code depth 1 the layers of their depth stack join the spatial one.
MODELS = {
    "tiny": "throughput_small",
    "small": "throughput_small",
    "medium": "throughput_medium",
    "large": "throughput_large",
    "huge": "throughput_huge",
    "3.8B": "imagenet256_3800m",
    "vqgan_large": "throughput_vqgan_large",
    "vqgan_huge": "throughput_vqgan_huge",
}
TINY = {"spatial_layers": 8, "depth_layers": 4}
# DQ-Transformers; grid and codebook are those of their tokenizer, and every image has the same number of codes.
GRAINED = {"dq_small": {**presets.load("dqtransformer:throughput_small", 2)["model"], "num_grains": 2}}
GRAINED_TOKENIZER, FINE_RATIO = "dqvae:imagenet256", 0.5
CODE_SHAPE, CODEBOOK_SIZE = (8, 8, 4), 16384
# The baselines of the paper exist in one shape and with one codebook.
VQGAN = {"vqgan_large": ((16, 16, 1), 1024), "vqgan_huge": ((16, 16, 1), 16384)}
# Presets by downsampling, for images of 256x256.
TOKENIZERS = {32: "imagenet256", 16: "imagenet256_f16", 8: "imagenet256_f8"}
IMAGE_SIZE, CODE_DIM, NUM_CLASSES = 256, 256, 1000
PAPER_IMAGES = 1000  # at least so many a run

Config = dict[str, Any]


def show_shape(code_shape: tuple[int, ...]) -> str:
    """Height x width x depth."""
    return "x".join(map(str, code_shape))


def code_shapes(args: argparse.Namespace) -> list[tuple[int, ...] | None]:
    """The code shapes of a sweep; None where nothing was said.

    Raises:
      ValueError: shapes given in two ways.
    """
    if args.code_shape and (args.downsampling or args.depth):
        shown = ",".join(map(show_shape, args.code_shape))
        raise ValueError(f"--code_shape: {shown} is given beside --downsampling or --depth; give one of the two")
    if args.downsampling or args.depth:
        sides = [IMAGE_SIZE // factor for factor in args.downsampling or [32]]
        return [(side, side, depth) for side in sides for depth in args.depth or [4]]
    return args.code_shape or [None]


def groups(args: argparse.Namespace) -> list[list[Config]]:
    """Configurations of the sweep, each in a group with its counterparts of --against.

    Raises:
      ValueError: settings that do not fit together.
    """
    sampling.check_filter(args.temperature, args.top_k, args.top_p)
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance: {args.guidance} must be a finite number")
    if args.protocol and args.batches:
        raise ValueError(f"--batches: {args.batches} is decided by --protocol={args.protocol}; leave it out")
    settings = {name: getattr(args, name) for name in ("guidance", "temperature", "top_k", "top_p", "protocol")}
    decode, dtypes, sweep = args.decode or args.protocol is not None, args.dtype or default_dtypes(), []
    axes = args.model, code_shapes(args), args.codebook_size or [None], dtypes, args.weights or [None], args.batch
    axes = *axes, args.fine_ratio or [None]
    for model, shape, codebook_size, dtype, stored, batch, ratio in itertools.product(*axes):
        batches = -(-PAPER_IMAGES // batch) if args.protocol else args.batches or (2 if decode else 1)
        group = []
        for flag, given_shape in (("--code_shape", shape), *(("--against", other) for other in args.against)):
            code_shape, K = shape_and_codebook(model, given_shape, codebook_size, flag, args.tokenizer)
            tokenizer = tokenizer_preset(args, code_shape, decode, flag, model)
            config = {
                "model": model, "code_shape": code_shape, "codebook_size": K, "dtype": dtype,
                "weights": stored or dtype, **settings, "decode": decode, "tokenizer": tokenizer,
                "batches": batches, "batch": batch, **of_grains(model, ratio),
            }  # fmt: skip
            transformer = make_transformer(config)  # raises where settings do not fit, before anything compiles
            group.append(config)
            if args.as_released:
                check_as_released(transformer, config)
                group.append(config | {"as_released": True})
        sweep.append(group)
    return sweep


def default_dtypes() -> list[str]:
    """Default dtypes of the device."""
    return ["float32"] if jax.default_backend() == "cpu" else ["bfloat16"]


def shape_and_codebook(
    model: str, code_shape: tuple[int, ...] | None, codebook_size: int | None, flag: str, tokenizer: str | None
) -> tuple[tuple[int, ...], int]:
    """Code shape and codebook size, with defaults; a baseline has one of each.

    Args:
      model: name in `MODELS` or `GRAINED`.
      code_shape, codebook_size: as given; None: the default, with grains those of the tokenizer.
      flag: option that the shape comes from.
      tokenizer: preset, as given.

    Raises:
      ValueError: not those of the baseline.
    """
    if model in GRAINED:
        return own_codes(tokenizer or GRAINED_TOKENIZER, code_shape, codebook_size)
    if model not in VQGAN:
        return own_codes(None, code_shape, codebook_size)
    own_shape, own_size = VQGAN[model]
    if code_shape not in (None, own_shape):
        raise ValueError(
            f"{flag}: {show_shape(code_shape)} is not that of '{model}'; allowed is {show_shape(own_shape)}"
        )
    if codebook_size not in (None, own_size):
        raise ValueError(f"--codebook_size: {codebook_size} is not that of '{model}'; allowed is {own_size}")
    return VQGAN[model]


def own_codes(
    tokenizer: str | None, code_shape: tuple[int, ...] | None, codebook_size: int | None
) -> tuple[tuple[int, ...], int]:
    """Code shape and codebook size as given; else those of a tokenizer whose grid is no setting, else the defaults."""
    settings = presets.load(tokenizer, 1)["model"] if tokenizer else {}
    if tokenizer is None or "code_shape" in settings:
        return code_shape or CODE_SHAPE, codebook_size or CODEBOOK_SIZE
    own = models.create(**settings)
    return code_shape or own.code_shape, codebook_size or max(own.codebook_sizes)


def of_grains(model: str, fine_ratio: float | None) -> Config:
    """The share of regions of the finest grain, of models that have grains.

    Raises:
      ValueError: a share outside [0, 1], or for a model without grains.
    """
    if model not in GRAINED:
        if fine_ratio is not None:
            raise ValueError(f"--fine_ratio: {fine_ratio} is for models with grains, '{model}' has none; leave it out")
        return {}
    ratio = FINE_RATIO if fine_ratio is None else fine_ratio
    checks.within("--fine_ratio", ratio, 0, 1)
    return {"fine_ratio": ratio}


def check_as_released(model: Any, config: Config) -> None:
    """Check that the original's sampler draws from this model, and codes alone.

    Raises:
      ValueError: naming the option.
    """
    if config["model"] not in GRAINED:
        raise ValueError(f"--as_released: is for models with grains, '{config['model']}' has none; leave it out")
    if config["decode"]:
        raise ValueError("--as_released: times the drawing of codes alone; leave out --decode and --protocol")
    as_released.check_as_released(model, "fixed", guidance=config["guidance"])


def tokenizer_preset(
    args: argparse.Namespace, code_shape: tuple[int, ...], needed: bool, flag: str, model: str | None = None
) -> str | None:
    """The preset that was named; else, where a tokenizer is needed, the one that makes codes of this shape."""
    if args.tokenizer or not needed:
        return args.tokenizer
    if model in GRAINED:
        return GRAINED_TOKENIZER
    preset = TOKENIZERS.get(IMAGE_SIZE // code_shape[0])
    if preset is None:
        raise ValueError(
            f"{flag}: {show_shape(code_shape)} is no grid that a tokenizer of {IMAGE_SIZE}x{IMAGE_SIZE} images "
            f"makes (downsampling {', '.join(map(str, TOKENIZERS))}); give --tokenizer"
        )
    return preset


def make_transformer(config: Config) -> Any:
    """The transformer of a configuration, with the tokenizer's code dimension.

    Raises:
      ValueError: settings that do not fit together.
    """
    name, tokenizer = config["model"], make_tokenizer(config) if config["tokenizer"] else None
    if name in GRAINED:
        settings = {**GRAINED[name], "cond_vocab_size": NUM_CLASSES}
    else:
        settings = presets.load(MODELS[name], 2)["model"] | (TINY if name == "tiny" else {})
        if config["code_shape"][-1] == 1:
            settings["spatial_layers"] += settings["depth_layers"]
            settings["depth_layers"] = 0
    settings |= {name: config[name] for name in ("code_shape", "codebook_size", "dtype")}
    settings["code_dim"] = tokenizer.code_dim if tokenizer else CODE_DIM
    num_grains = settings.get("num_grains", 1)
    if tokenizer and tokenizer.num_grains != num_grains:
        raise ValueError(
            f"--tokenizer: '{config['tokenizer']}' has {tokenizer.num_grains} grains, but '{name}' has {num_grains}; "
            "give one of as many"
        )
    return models.create(**settings | {"use_null_cond": config["guidance"] is not None})


def make_tokenizer(config: Config, dtype: str | None = None) -> Any:
    """The preset's tokenizer with the code shape and the codebook of a configuration.

    Raises:
      ValueError: a code shape that is not that of a tokenizer which decides it.
    """
    settings = presets.load(config["tokenizer"], 1)["model"] | {"codebook_size": config["codebook_size"]}
    if "code_shape" in settings:
        settings["code_shape"] = config["code_shape"]
    if "code_depth" in settings:
        settings["code_depth"] = config["code_shape"][-1]
    model = models.create(**settings | ({} if dtype is None else {"dtype": dtype}))
    if model.code_shape != tuple(config["code_shape"]):
        raise ValueError(
            f"--code_shape: {show_shape(config['code_shape'])} is not that of the tokenizer '{config['tokenizer']}'; "
            f"allowed is {show_shape(model.code_shape)}"
        )
    return model


@functools.lru_cache(maxsize=2)  # a sweep over batches draws them once, also where two shapes take turns
def draw_variables(model: Any, dtype: str) -> Any:
    """Random variables prepared for sampling, with weights stored in this dtype."""
    return jax.jit(model.for_inference, static_argnums=1)(weights.draw(models.abstract_variables(model)), dtype)


def compile_sampler(config: Config, model: Any) -> timing.Compiled:
    """Number of a batch -> its codes (B, h, w, D). The filter's values are arguments, as for `sampling.generate`."""
    variables, B = draw_variables(model, config["weights"]), config["batch"]
    filters = {name: config[name] for name in ("temperature", "top_k", "top_p", "guidance")}
    rng, cond, given = jax.random.key(0), jnp.arange(B)[:, None] % NUM_CLASSES, {}
    if "fine_ratio" in config:
        given["grains"] = grain_maps(config, model)

    def draw(variables, rng, image_ids, cond, filters, given):
        drawn = sampling.generate(model, variables, rng, B, cond, image_ids=image_ids, **filters, **given)
        return getattr(drawn, "codes", drawn)  # a decoder sees no grains

    compiled = timing.compile_program(draw, variables, rng, np.arange(B), cond, filters, given)
    return compiled._replace(call=lambda i: compiled.call(variables, rng, i * B + np.arange(B), cond, filters, given))


def grain_maps(config: Config, model: Any) -> np.ndarray:
    """Grain maps (B, u, v), the finest grain in as many regions of each image and grain 0 in the others."""
    regions = math.prod(model.region_grid)
    is_fine = np.arange(regions) < round(config["fine_ratio"] * regions)
    rng = np.random.default_rng(0)
    maps = np.stack([rng.permutation(is_fine) for _ in range(config["batch"])])
    return (model.num_grains - 1) * maps.reshape(-1, *model.region_grid).astype(np.int32)


def tokens_of_image(config: Config, model: Any) -> int | None:
    """Tokens of every image, a start and an end for each grain among them; None without grains."""
    if "fine_ratio" not in config:
        return None
    return 2 * model.num_grains + int(num_codes(grain_maps(config, model)[:1], model.num_grains)[0])


def compile_decoder(config: Config, model: Any) -> timing.Compiled:
    """Codes -> 8-bit images, as sample.py writes them, of random weights."""
    variables = weights.draw(models.abstract_variables(model))

    def decode(variables, codes):
        images = model.apply(variables, codes, method="decode_codes")
        return jnp.round(jnp.clip(0.5 * images + 0.5, 0, 1) * 255).astype(jnp.uint8)

    codes = jax.ShapeDtypeStruct((config["batch"], *config["code_shape"]), jnp.int32)
    compiled = timing.compile_program(decode, variables, codes)
    return compiled._replace(call=functools.partial(compiled.call, variables))


def build_released(config: Config, model: Any) -> timing.Program:
    """The original's sampler of a configuration."""
    temperature, top_k, top_p = (config[name] for name in ("temperature", "top_k", "top_p"))
    filters = (temperature, None, None), (temperature, top_k, top_p)
    arrays = filters[0], jax.tree.map(lambda value: jnp.asarray([value]), filters[1])
    variables, tokens = draw_variables(model, config["weights"]), tokens_of_image(config, model)
    return released.build(model, variables, config["batch"], tokens, arrays, NUM_CLASSES)


def build(config: Config, args: argparse.Namespace) -> timing.Program:
    """The sampler of a configuration, with the decoder behind it where that is asked for."""
    model, batches = make_transformer(config), config["batches"]
    if config.get("as_released"):
        return build_released(config, model)
    draw, decode = compile_sampler(config, model), None
    tokens, guided = tokens_of_image(config, model), config["guidance"] is not None
    stages = roofline.sampling_work(model, config["batch"], config["weights"], guided, tokens)
    compile_seconds, memory = {"sampling": draw.seconds}, draw.memory
    if config["decode"]:
        tokenizer = make_tokenizer(config)
        decode = compile_decoder(config, tokenizer)
        stages["decoding"] = decoder_work(tokenizer, config["batch"])
        compile_seconds["decoding"] = decode.seconds
        memory = {name: max(memory[name], decode.memory[name]) for name in memory}
    parts: list[dict[str, float]] = []
    count = config["batch"] * batches

    def details(seconds: float) -> dict[str, Any]:
        cache_bytes = config["batch"] * roofline.cache_size(model, model.dtype)
        more = {"compile_parts": compile_seconds, "cache_bytes": cache_bytes}
        if config["protocol"]:
            timed = parts[args.warmups :]
            medians = {name: float(np.median([part[name] for part in timed])) for name in timed[0]}
            more["ms_per_image"] = {name: 1e3 * value / count for name, value in {"total": seconds, **medians}.items()}
        return more

    call = functools.partial(draw_apart, draw.call, decode.call, batches, parts) if config["protocol"] else None
    return timing.Program(
        call or functools.partial(draw_overlapped, draw.call, decode and decode.call, batches),
        count,
        sum(compile_seconds.values()),
        memory,
        {name: work * batches for name, work in stages.items()},
        details=details,
    )


def draw_overlapped(draw: Callable[[int], Any], decode: Callable[[Any], Any] | None, batches: int) -> Any:
    """Sample as sample.py does: while a batch is fetched, the next is already drawn."""
    pending = None
    for i in range(batches):
        arrays = draw(i) if decode is None else decode(draw(i))
        if pending is not None:
            jax.device_get(pending)
        pending = arrays
    return jax.device_get(pending)


def draw_apart(
    draw: Callable[[int], Any], decode: Callable[[Any], Any], batches: int, parts: list[dict[str, float]]
) -> None:
    """Sample by the paper's protocol, waiting for each part of a batch; appends the seconds by part to `parts`."""
    seconds = {"sampling": 0.0, "decoding": 0.0}
    for i in range(batches):
        start = timing.clock()
        codes = jax.block_until_ready(draw(i))
        middle = timing.clock()
        jax.block_until_ready(decode(codes))
        seconds["sampling"] += middle - start
        seconds["decoding"] += timing.clock() - middle
    parts.append(seconds)


def decode_groups(args: argparse.Namespace) -> list[list[Config]]:
    """Configurations of the decoder alone."""
    axes = code_shapes(args), args.codebook_size or [None], args.dtype or default_dtypes(), args.batch
    sweep = []
    for shape, codebook_size, dtype, batch in itertools.product(*axes):
        shape, K = own_codes(args.tokenizer, shape, codebook_size)
        config = {
            "tokenizer": tokenizer_preset(args, shape, True, "--code_shape"), "code_shape": shape,
            "codebook_size": K, "dtype": dtype, "batch": batch,
        }  # fmt: skip
        make_tokenizer(config, dtype)
        sweep.append([config])
    return sweep


def build_decode(config: Config, args: argparse.Namespace) -> timing.Program:
    """The decoder of a configuration."""
    model, shape = make_tokenizer(config, config["dtype"]), (config["batch"], *config["code_shape"])
    compiled = compile_decoder(config, model)
    codes = jax.random.randint(jax.random.key(2), shape, 0, config["codebook_size"])
    stages = {"decoding": decoder_work(model, config["batch"])}
    return timing.Program(lambda: compiled.call(codes), config["batch"], compiled.seconds, compiled.memory, stages)

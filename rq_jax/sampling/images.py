"""Images drawn batch by batch: codes from a transformer, decoded to bytes by its tokenizer."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rq_jax.nn.placement import map_micro_batches
from rq_jax.sampling.draws import rng_of_seed
from rq_jax.sampling.filter import check_filter
from rq_jax.sampling.generate import check_guidance, generate
from rq_jax.settings import checks

DECODED_PER_DEVICE = 32  # images at a time: one of 256x256 takes some 96 MiB of activations in float32
LAST_ID = 2**62

_FILTER = ("temperature", "top_k", "top_p")
_OF_POSITION = "position_"  # the same of positions, where a model draws those


def draw_settings(model: Any, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a draw, checked: those that are given, else those that a checkpoint recorded.

    Args:
      model: an `RQTransformer` or a `DQTransformer`.
      recorded: the config section `sample` of the checkpoint.
      given: the values of flags by name; None: not given.

    Returns:
      temperature, top_k, top_p, guidance and position_* of `generate`, those that are set.

    Raises:
      ValueError: a value that is not allowed, or not one per depth; named as the flag, or as the key of the section.
    """
    allowed: tuple[str, ...] = (*_FILTER, "guidance")
    if hasattr(model, "layout"):
        allowed += tuple(f"{_OF_POSITION}{name}" for name in _FILTER)
    chosen = {}
    for name, value in given.items():
        if value is not None:
            if name not in allowed:
                raise ValueError(f"--{name}: {value} is of positions, and this model draws none; leave it out")
            chosen[name] = (f"--{name}", value)
    for name, value in recorded.items():
        checks.one_of("sample: the key", name, allowed)
        chosen.setdefault(name, (f"sample.{name}", value))
    for name, (setting, value) in chosen.items():
        prefix = _OF_POSITION if name.startswith(_OF_POSITION) else ""
        try:
            if name == "guidance":
                check_guidance(model, value)
            else:
                check_filter(**{**dict.fromkeys(_FILTER), name.removeprefix(prefix): value}, prefix=prefix)
        except ValueError as error:
            raise ValueError(f"{setting.removesuffix(name)}{error}") from None
        if prefix and np.ndim(value):
            raise ValueError(f"{setting}: {value} has shape {np.shape(value)}; give one value")
        checks.one_per_depth(setting, value, model.code_shape[-1])
    return {name: value for name, (_, value) in chosen.items()}


def draw(
    model: Any,
    variables: Any,
    tokenizer: Any,
    *,
    num_images: int,
    batch_size: int,
    decode_batch_size: int | None = None,
    sharding: NamedSharding | None = None,
    first_index: int = 0,
    seed: int = 0,
    weights: str = "float32",
    conds: np.ndarray | None = None,
    prefix: Any = None,
    kept: np.ndarray | None = None,
    grains: np.ndarray | None = None,
    as_bytes: bool = True,
    compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    **settings: Any,
) -> Iterator[tuple[np.ndarray, Any, np.ndarray]]:
    """Draws images; while one batch is fetched and used the next is already being drawn and decoded.

    Args:
      model: an `RQTransformer` or a `DQTransformer`.
      variables: its variables, as trained.
      tokenizer: its `model` and `variables`, as in `checkpoint.LoadedModel`.
      num_images: n.
      batch_size: images drawn at a time, rounded up to a multiple of the devices; a last batch is filled up, and what
        fills it dropped.
      decode_batch_size: images decoded at a time, at most, in equal parts of a batch; default 32 a device.
      sharding: of a batch over devices of this process, each with a copy of the weights; None: on one device.
      first_index: id of the first image, from 0 to 2^62.
      seed: at least 0; an image depends on the seed and its id alone.
      weights: dtype of the transformer's weights in memory, see `inference_weights.for_inference`.
      conds: (m, U), which the images take in turn by id; None for an unconditional model.
      prefix: what images begin with, of m images as `generate` takes it; likewise.
      kept: (m, h, w, D), codes that are kept anywhere, as `generate` takes them; likewise.
      grains: (m, u, v), grain maps of a `DQTransformer`, likewise.
      as_bytes: as `decode` takes it.
      compiling: makes a context that is entered while the programs of the first batch compile.
      **settings: further keywords of `generate`, such as temperature and guidance.

    Yields:
      Image ids (b,), codes as `generate` gives them, of b images, images (b, H, W, C) uint8, or as `decode` has them.

    Raises:
      ValueError: a first index or a seed out of range.
    """
    checks.within("first_index", first_index, 0, LAST_ID)
    of_images = {"prefix": prefix, "kept": kept, "grains": grains}
    rng, end, pending = rng_of_seed(seed), first_index + num_images, None
    batch_size, num_parts = _batches(batch_size, decode_batch_size, sharding)
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    resting = jax.device_put(_for_inference(model, variables, weights), everywhere)
    tokenizer_variables = jax.device_put(tokenizer.variables, everywhere)
    draw_codes = functools.partial(generate, model, resting, rng, batch_size, sharding=sharding, **settings)

    def fetch(*arrays):
        is_asked_for = arrays[0] < end
        return jax.tree.map(lambda array: np.asarray(array)[is_asked_for], arrays)

    for first in range(first_index, end, batch_size):
        # A last batch that is not full draws images nobody asked for, so that nothing is compiled twice.
        ids = np.arange(first, first + batch_size)
        in_turn = jax.tree.map(lambda array, ids=ids: array[ids % len(array)], of_images)
        cond = None if conds is None else conds[ids % len(conds)]
        with compiling() if pending is None else contextlib.nullcontext():
            codes = draw_codes(cond=cond, image_ids=ids, **in_turn)
            images = decode(tokenizer.model, tokenizer_variables, codes, num_parts, as_bytes)
        jax.tree.map(lambda array: array.copy_to_host_async(), (codes, images))
        if pending is not None:
            yield fetch(*pending)
        pending = ids, codes, images
    if pending is not None:
        yield fetch(*pending)


def decode_all(
    tokenizer: Any,
    codes: Any,
    *,
    batch_size: int,
    decode_batch_size: int | None = None,
    sharding: NamedSharding | None = None,
    as_bytes: bool = True,
) -> Iterator[np.ndarray]:
    """Decodes codes batch by batch, with the program of `draw` for batches of that size.

    Args:
      tokenizer: its `model` and `variables`, as in `checkpoint.LoadedModel`.
      codes: of n images, as `generate` gives them, on the host.
      batch_size, decode_batch_size, sharding, as_bytes: as in `draw`.

    Yields:
      Images (b, H, W, C), uint8, or as `decode` has them, until all n are there.
    """
    n = len(jax.tree.leaves(codes)[0])
    batch_size, num_parts = _batches(batch_size, decode_batch_size, sharding)
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    variables = jax.device_put(tokenizer.variables, everywhere)
    for start in range(0, n, batch_size):
        rows = np.resize(np.arange(start, min(start + batch_size, n)), batch_size)
        batch = jax.device_put(jax.tree.map(lambda array, rows=rows: array[rows], codes), sharding)
        yield np.asarray(decode(tokenizer.model, variables, batch, num_parts, as_bytes))[: n - start]


def _batches(batch_size: int, decode_batch_size: int | None, sharding: NamedSharding | None) -> tuple[int, int]:
    """The size of batches that devices share evenly, and in how many parts such a batch is decoded."""
    num_devices = 1 if sharding is None else sharding.num_devices
    share = -(-batch_size // num_devices)
    most = max(1, (decode_batch_size or DECODED_PER_DEVICE * num_devices) // num_devices)
    num_parts = next(parts for parts in range(-(-share // most), share + 1) if share % parts == 0)
    return share * num_devices, num_parts


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def decode(tokenizer: Any, variables: Any, codes: Any, num_parts: int = 1, as_bytes: bool = True) -> jax.Array:
    """Images of codes, compiled once for a tokenizer and shape.

    The decoder's own images are nominally in [-1, 1] and overshoot; here they are clipped to it, and NaN is black.

    Args:
      tokenizer: an `RQVAE` or a `DQVAE`.
      variables: its variables.
      codes: (B, h, w, D), int32; of a `DQVAE` also `GrainedCodes`.
      num_parts: parts of the batch, equally large, that are decoded one after the other: this needs less memory.
      as_bytes: rounded to 8 bits; else floats, for figures that are taken before.

    Returns:
      (B, H, W, C), uint8 in [0, 255], or float32 in [-1, 1].
    """

    def decode_with(decoder: Any, codes: Any) -> jax.Array:
        images = decoder.apply(variables, codes, method="decode_codes").astype(jnp.float32)
        if not as_bytes:
            return jnp.clip(jnp.nan_to_num(images, nan=-1.0), -1, 1)
        return jnp.nan_to_num(jnp.round(jnp.clip(0.5 * images + 0.5, 0, 1) * 255)).astype(jnp.uint8)

    # Images are rounded to 8 bits: on an accelerator the decoder computes in bfloat16, with a float32 quantizer.
    exact, narrow = (functools.partial(decode_with, one) for one in (tokenizer, tokenizer.clone(dtype="bfloat16")))
    decode_part = functools.partial(jax.lax.platform_dependent, cpu=exact, default=narrow) if as_bytes else exact
    return map_micro_batches(decode_part, codes, num_parts)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _for_inference(model: Any, variables: Any, weights: str) -> Any:
    return model.for_inference(variables, weights)

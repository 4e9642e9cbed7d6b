"""What every sampling loop is made of: keys of images, draws from uniform numbers, guidance, stretches of a cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.quantize.search import pick
from rq_jax.settings import checks

_PARTS = 128  # interleaved parts of the codes, see `draw`: neighbours are in different ones, for vector registers
# The cache grows in at most this many stretches, of at least this many positions.
_MAX_STRETCHES, _MIN_STRETCH = 4, 16


def rng_of_seed(seed: int) -> jax.Array:
    """The key of a seed of any size; `jax.random.key` gives seeds that differ by 2^32 one key.

    Args:
      seed: at least 0; below 2^31 the key is that of `jax.random.key`.

    Raises:
      ValueError: a seed below 0.
    """
    checks.at_least("seed", seed, 0)
    rng = jax.random.key(np.uint32(seed % 2**32))
    while seed := seed >> 32:
        rng = jax.random.fold_in(rng, np.uint32(seed % 2**32))
    return rng


def words(ids: Any) -> tuple[jax.Array, jax.Array]:
    """Lower and upper 32 bits of ids, uint32 both.

    Raises:
      ValueError: ids that are not whole numbers in [0, 2^64), as far as the host can see.
    """
    if not isinstance(ids, jax.Array):
        numbers = ids.tolist()
        if not all(isinstance(number, int) and 0 <= number < 2**64 for number in numbers):
            raise ValueError(f"image_ids: {numbers} must be whole numbers from 0 to 2^64 - 1")
        ids = np.array(numbers, np.uint64)
    elif ids.dtype.kind not in "iu":
        raise ValueError(f"image_ids: of {ids.dtype} must be whole numbers from 0 to 2^64 - 1")
    if ids.dtype.itemsize == 8:
        high = ids >> 32
    else:
        high = jnp.where(ids < 0, -1, 0)  # a negative id on a device: an image of its own, too
    return jnp.asarray(ids.astype(np.uint32)), jnp.asarray(high.astype(np.uint32))


def uniforms_of_images(rng: jax.Array, image_ids_2B: tuple[jax.Array, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """Uniform numbers (*shape, B): what an image draws does not depend on its batch, its place there, or its device.

    All at once: a generator inside the loop would cost more than the classifier.
    """
    keys_B = jax.vmap(functools.partial(_rng_of_image, rng))(*image_ids_2B)
    return jnp.moveaxis(jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys_B), 0, -1)


def _rng_of_image(rng: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The key of an image, from the two halves of its id. JAX folds in 32 bits at a time."""
    rng = jax.random.fold_in(rng, low)
    # A choice of the bits: one between keys looks like a key used twice to `jax_debug_key_reuse`.
    folded, plain = jax.random.key_data(jax.random.fold_in(rng, high)), jax.random.key_data(rng)
    return jax.random.wrap_key_data(jnp.where(high > 0, folded, plain), impl=jax.random.key_impl(rng))


def draw(uniforms_2B: jax.Array, probabilities_BK: jax.Array) -> jax.Array:
    """One code an image, from probabilities that sum to 1.

    In two steps, a part of the codes and a code in it, each by inverting a cumulative sum: sums of K / 128 and of 128
    numbers instead of K, and two uniform numbers a code where Gumbel noise takes K. Codes of probability 0 are never
    drawn.
    """
    # Code k is in part k % 128.
    padding = -probabilities_BK.shape[-1] % _PARTS
    parts_BRP = jnp.pad(probabilities_BK, ((0, 0), (0, padding))).reshape(len(probabilities_BK), -1, _PARTS)
    part_B = pick(uniforms_2B[0], jnp.sum(parts_BRP, axis=1), axis=1)
    inside_BR = jnp.take_along_axis(parts_BRP, part_B[:, None, None], axis=2)[..., 0]
    return pick(uniforms_2B[1], inside_BR, axis=1) * _PARTS + part_B


def guide(logits: jax.Array, guidance: jax.Array | None) -> jax.Array:
    """Logits (B, K) of rows 2i and 2i + 1, those of image i with its condition and without; None leaves them alone."""
    if guidance is None:
        return logits
    with_cond, without = jnp.moveaxis(logits.reshape(len(logits) // 2, 2, -1), 1, 0)
    return without + guidance * (with_cond - without)


def with_null(cond_BU: jax.Array, null: int) -> jax.Array:
    """Conditions (2B, U) of the rows that `guide` reads; both of an image lie on one device."""
    null_BU = jnp.full_like(cond_BU, null)
    return jnp.stack([cond_BU, null_BU], axis=1).reshape(2 * len(cond_BU), -1)


def stretches(start: int, end: int, cache_share: float) -> list[tuple[int, int]]:
    """Cut the positions [start, end) into stretches, each with a cache of one static length.

    Attention reads the whole cache of a stretch, filled or not: shorter stretches read less. Each stretch compiles a
    program of its own, so that their number grows with the share of the cache in what a step reads.

    Args:
      start, end: positions.
      cache_share: size of the cache at its full length, relative to the weights.

    Returns:
      (start, end) of each stretch.
    """
    stride = max(_MIN_STRETCH, -(-end // min(_MAX_STRETCHES, 1 + int(4 * cache_share))))
    bounds = [start, *(bound for bound in range(stride, end, stride) if bound > start), end]
    return list(zip(bounds, bounds[1:], strict=False))


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

"""Block-wise search: scores of one block of the codebook at a time, never a matrix of all vectors and all codes."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A block has as many codes as keep its scores near 8 MB of float32, about a cache, but at least _MIN_BLOCK.
_SCORES_PER_BLOCK, _MIN_BLOCK = 2**21, 128
# With more vectors than twice this even the smallest block outgrows a cache: a CPU takes the vectors in slices too.
_VECTORS_PER_SLICE = 2**13
_PARTS = 16  # interleaved parts of a block, drawn from in two steps, see `_drawn_block`


def best_codes(
    x_NE: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> jax.Array:
    """Codes (N,) of the best score, or with a key drawn from softmax(score / temperature), block by block."""
    x_NE = jax.lax.stop_gradient(x_NE.astype(jnp.float32))
    codebook_KE = jax.lax.stop_gradient(codebook_KE.astype(jnp.float32))
    N = x_NE.shape[0]  # symbolic in a program that `jax.export` makes for any batch
    if rng is not None or not isinstance(N, int) or N <= 2 * _VECTORS_PER_SLICE:
        return _search(x_NE, codebook_KE, temperature, rng)
    return _search_many(x_NE, codebook_KE)


@jax.jit  # a call outside of any program would otherwise compile the loops anew every time
def _search_many(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x_NE, codebook_KE, cpu=_search_in_slices, default=_search)


def _search_in_slices(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """`_search`, slice by slice of the vectors."""
    N, E = x_NE.shape
    count = 2 ** math.ceil(math.log2(N / _VECTORS_PER_SLICE))
    x_NE = jnp.pad(x_NE, ((0, -N % count), (0, 0)))
    # A slice takes every count-th vector: of a sharded batch each device then has its share of every slice.
    slices = x_NE.reshape(-1, count, E).swapaxes(0, 1)
    codes = jax.lax.map(lambda slice_nE: _search(slice_nE, codebook_KE), slices)
    return codes.swapaxes(0, 1).reshape(-1)[:N]


def _search(
    x_NE: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> jax.Array:
    """The codes of all vectors, block by block of the codebook."""
    N, (K, E) = x_NE.shape[0], codebook_KE.shape
    fitting = _SCORES_PER_BLOCK // max(N, 1) if isinstance(N, int) else 0
    block = min(K, max(_MIN_BLOCK, fitting // _PARTS * _PARTS))
    num_blocks = -(-K // block)
    norms_K = jnp.sum(codebook_KE**2, axis=-1)
    # Codes that only fill the last block have norm inf, hence score -inf: they never win and have probability 0.
    padding = num_blocks * block - K
    tables = jnp.pad(codebook_KE, ((0, padding), (0, 0))).reshape(num_blocks, block, E)
    norms = jnp.pad(norms_K, (0, padding), constant_values=jnp.inf).reshape(num_blocks, block)
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block

    def scores_of(table_kE: jax.Array, norms_k: jax.Array) -> jax.Array:
        # Minus the squared distance, plus |x|^2, which is the same for all codes. True float32 always: a product in
        # bfloat16 or TF32 would move codes. Codes stand before vectors, so that the maxima over a block run along whole
        # vector registers.
        products_kN = jax.lax.dot_general(table_kE, x_NE, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        return 2.0 * products_kN - norms_k[:, None]

    read: tuple[jax.Array, ...] = (tables, norms, starts)
    pick: Callable[..., Any] = _better_block
    if rng is not None:
        # Two uniform numbers for each vector and block, where Gumbel noise would take one for each score.
        read = (*read, jax.random.uniform(rng, (num_blocks, 2, N), jnp.float32))
        pick = functools.partial(_drawn_block, temperature=temperature)

    def step(best: Any, block: Any) -> tuple[Any, None]:
        table_kE, norms_k, *more = block
        return pick(best, scores_of(table_kE, norms_k), *more), None

    zero_N = jnp.where(
        x_NE[:, 0] > 0, jnp.float32(0), jnp.float32(0)
    )  # made of x, to vary over devices as x does inside shard_map
    first = (zero_N - jnp.inf, zero_N, zero_N.astype(jnp.int32))
    if num_blocks == 1:
        return step(first, jax.tree.map(lambda array: array[0], read))[0][2]
    return jax.lax.scan(step, first, read)[0][2]


def _better_block(best: Any, scores_kN: jax.Array, start: jax.Array) -> Any:
    """The best (score, unused, code) of all blocks up to this one; the first index on ties."""
    best_N, unused_N, codes_N = best
    k = scores_kN.shape[0]
    block_best_N = jnp.max(scores_kN, axis=0)
    # Argmax in two passes that vectorise, a maximum and the first index that attains it: XLA's argmax on CPU is a
    # scalar loop over (value, index) pairs. NaN never exceeds the best so far, and infinity does not count: a
    # vector with such a value keeps code 0.
    codes_k = jnp.arange(k, dtype=jnp.int32)
    where_best_kN = jnp.where(scores_kN == block_best_N[None], codes_k[:, None], k - 1)
    # Strictly: an equal score of an earlier block has the lower index.
    better_N = (block_best_N > best_N) & (block_best_N < jnp.inf)
    codes_N = jnp.where(better_N, start + jnp.min(where_best_kN, axis=0), codes_N)
    return jnp.where(better_N, block_best_N, best_N), unused_N, codes_N


def _drawn_block(best: Any, scores_kN: jax.Array, start: jax.Array, uniforms_2N: jax.Array, temperature: Any) -> Any:
    """(Largest logit, sum of exponentials relative to it, code drawn) of all blocks up to this one.

    A streaming softmax with reservoir sampling: the draw moves to this block with the block's share of the sum so far,
    so that in the end each code has its probability.
    """
    largest_N, sum_N, codes_N = best
    logits_kN = scores_kN / temperature
    new_largest_N = jnp.maximum(largest_N, jnp.max(logits_kN, axis=0))
    weights_kN = jnp.exp(logits_kN - new_largest_N[None])
    parts = math.gcd(_PARTS, weights_kN.shape[0])
    weights_RPN = weights_kN.reshape(weights_kN.shape[0] // parts, parts, weights_kN.shape[1])
    sums_PN = jnp.sum(weights_RPN, axis=0)
    block_sum_N = jnp.sum(sums_PN, axis=0)
    # The sum so far is relative to the old maximum; before the first block it is 0, and that maximum -inf.
    sum_N = sum_N * jnp.exp(jnp.where(sum_N > 0, largest_N - new_largest_N, 0.0)) + block_sum_N
    # Given that it moves, uniform / share is uniform again: it picks the part, and the second number picks the code.
    share_N = block_sum_N / sum_N
    moves_N = uniforms_2N[0] < share_N
    part_N = pick(jnp.where(moves_N, uniforms_2N[0] / share_N, 0.0), sums_PN, axis=0)
    inside_RN = jnp.take_along_axis(weights_RPN, part_N[None, None], axis=1)[:, 0]
    drawn_N = pick(uniforms_2N[1], inside_RN, axis=0) * parts + part_N
    return new_largest_N, sum_N, jnp.where(moves_N, start + drawn_N, codes_N)


def pick(uniform: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
    """Index along an axis, drawn in proportion to the weights by inverting their cumulative sum.

    Args:
      uniform: in [0, 1), of the shape of the weights without that axis.
      weights: at least 0. One of weight 0 is never drawn.
      axis: of the weights.

    Returns:
      int32, of the shape of `uniform`.
    """
    sums = jnp.cumsum(weights, axis=axis)
    total = jax.lax.slice_in_dim(sums, -1, None, axis=axis)
    beyond = (sums > jnp.expand_dims(uniform, axis) * total) & (weights > 0)
    # Rounding may leave no sum beyond a mark at the very end: then the first positive weight is taken.
    beyond = jnp.where(jnp.any(beyond, axis=axis, keepdims=True), beyond, weights > 0)
    return jnp.argmax(beyond, axis=axis).astype(jnp.int32)

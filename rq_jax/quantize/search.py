"""The search: the codebook is read in blocks, so that no matrix of all vectors against all codes is ever made."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Blocks of so many codes that their scores stay near 8 MB of float32, in reach of a cache.
_SCORES_PER_BLOCK, _MIN_BLOCK = 2**21, 128
# With more vectors than twice this, a CPU takes them in slices too, for the same reason.
_VECTORS_PER_SLICE = 2**13
_PARTS = 16  # of a block, see `_drawn_block`


def best_codes(
    x_NE: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> jax.Array:
    """Codes (N,) of the best score, or drawn from the tempered scores, reading the codebook block by block."""
    x_NE = jax.lax.stop_gradient(x_NE.astype(jnp.float32))
    codebook_KE = jax.lax.stop_gradient(codebook_KE.astype(jnp.float32))
    if rng is not None or len(x_NE) <= 2 * _VECTORS_PER_SLICE:
        return _search(x_NE, codebook_KE, temperature, rng)
    return _search_many(x_NE, codebook_KE)


@jax.jit  # or each call outside of a program would compile its loops anew
def _search_many(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x_NE, codebook_KE, cpu=_search_in_slices, default=_search)


def _search_in_slices(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """`_search`, slice by slice of the vectors. A slice takes every count-th: each device has its share."""
    N, E = x_NE.shape
    count = 2 ** math.ceil(math.log2(N / _VECTORS_PER_SLICE))
    x_NE = jnp.pad(x_NE, ((0, -N % count), (0, 0)))
    slices = x_NE.reshape(-1, count, E).swapaxes(0, 1)
    codes = jax.lax.map(lambda slice_nE: _search(slice_nE, codebook_KE), slices)
    return codes.swapaxes(0, 1).reshape(-1)[:N]


def _search(
    x_NE: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> jax.Array:
    """The codes of all vectors, block by block of the codebook."""
    N, (K, E) = x_NE.shape[0], codebook_KE.shape
    block = min(K, max(_MIN_BLOCK, _SCORES_PER_BLOCK // max(N, 1) // _PARTS * _PARTS))
    num_blocks = -(-K // block)
    norms_K = jnp.sum(codebook_KE**2, axis=-1)
    padding = num_blocks * block - K
    tables = jnp.pad(codebook_KE, ((0, padding), (0, 0))).reshape(num_blocks, block, E)
    norms = jnp.pad(norms_K, (0, padding), constant_values=jnp.inf).reshape(num_blocks, block)
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block

    def scores_of(table_kE: jax.Array, norms_k: jax.Array) -> jax.Array:
        # Codes stand before vectors: the maxima over a block then run along whole vector registers.
        products_kN = jax.lax.dot_general(table_kE, x_NE, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        return 2.0 * products_kN - norms_k[:, None]

    if rng is None:
        read, pick = (tables, norms, starts), _better_block
    else:
        # Two uniform numbers for each vector and block, where Gumbel noise would take one for each score.
        uniforms = jax.random.uniform(rng, (num_blocks, 2, N))
        read, pick = (tables, norms, starts, uniforms), functools.partial(_drawn_block, temperature=temperature)

    def step(best: Any, block: Any) -> tuple[Any, None]:
        table_kE, norms_k, *more = block
        return pick(best, scores_of(table_kE, norms_k), *more), None

    zero_N = jnp.where(x_NE[:, 0] > 0, 0.0, 0.0)  # made of x: inside shard_map it must vary over devices as x does
    first = (zero_N - jnp.inf, zero_N, zero_N.astype(jnp.int32))
    if num_blocks == 1:
        return step(first, jax.tree.map(lambda array: array[0], read))[0][2]
    return jax.lax.scan(step, first, read)[0][2]


def _better_block(best: Any, scores_kN: jax.Array, start: jax.Array) -> Any:
    """The best (score, -, code) so far or of this block; the first index on ties."""
    best_N, unused_N, codes_N = best
    k = scores_kN.shape[0]
    block_best_N = jnp.max(scores_kN, axis=0)
    # In two passes that vectorise, where argmax is a loop over pairs; NaN finds no index.
    where_best = jnp.where(scores_kN == block_best_N, jnp.arange(k, dtype=jnp.int32)[:, None], k - 1)
    better_N = block_best_N > best_N
    codes_N = jnp.where(better_N, start + jnp.min(where_best, axis=0), codes_N)
    return jnp.where(better_N, block_best_N, best_N), unused_N, codes_N


def _drawn_block(best: Any, scores_kN: jax.Array, start: jax.Array, uniforms_2N: jax.Array, temperature: Any) -> Any:
    """(Largest logit, sum of exponentials relative to it, code drawn) of all blocks up to this one.

    The draw moves to this block with the block's share of the sum so far: in the end each code has its probability.
    """
    largest_N, sum_N, codes_N = best
    logits_kN = scores_kN / temperature
    new_largest_N = jnp.maximum(largest_N, jnp.max(logits_kN, axis=0))
    weights_kN = jnp.exp(logits_kN - new_largest_N)
    parts = math.gcd(_PARTS, weights_kN.shape[0])
    weights_RPN = weights_kN.reshape(-1, parts, weights_kN.shape[1])
    sums_PN = jnp.sum(weights_RPN, axis=0)
    block_sum_N = jnp.sum(sums_PN, axis=0)
    sum_N = sum_N * jnp.exp(jnp.where(sum_N > 0, largest_N - new_largest_N, 0.0)) + block_sum_N
    # One number decides between the blocks; what is left of it, spread out again, picks the part in the block.
    share_N = block_sum_N / sum_N
    moves_N = uniforms_2N[0] < share_N
    part_N = _pick(jnp.where(moves_N, uniforms_2N[0] / share_N, 0.0), sums_PN)
    inside_RN = jnp.take_along_axis(weights_RPN, part_N[None, None], axis=1)[:, 0]
    drawn_N = _pick(uniforms_2N[1], inside_RN) * parts + part_N
    return new_largest_N, sum_N, jnp.where(moves_N, start + drawn_N, codes_N)


def _pick(uniform_N: jax.Array, weights_KN: jax.Array) -> jax.Array:
    """Index along the first axis, drawn in proportion to the weights."""
    sums_KN = jnp.cumsum(weights_KN, axis=0)
    beyond_KN = (sums_KN > uniform_N * sums_KN[-1]) & (weights_KN > 0)
    # Rounding may leave no weight beyond the mark, when it lies at the very end.
    beyond_KN = jnp.where(jnp.any(beyond_KN, axis=0), beyond_KN, weights_KN > 0)
    return jnp.argmax(beyond_KN, axis=0).astype(jnp.int32)

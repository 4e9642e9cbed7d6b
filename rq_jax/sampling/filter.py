"""Filter of the logits: temperature, top-k and top-p."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.settings import checks

_BLOCK = 128  # of `_index_of_nth`


def filter_logits(
    logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Probabilities to draw from: temperature, then top-k, softmax, top-p, renormalised (paper, appendix B).

    The order is that of kakaobrain/rq-vae-transformer:sample_from_logits. Values are traced: changing them never
    recompiles a program. One of None adds nothing to a program, so that giving it makes another one.

    Args:
      logits: (..., K); computed in float32, NaN counts as -inf.
      temperature: at least 0, a float32; 0 is the argmax (its first index), as is one so small that logits divided by
        it overflow.
      top_k: keep logits at or above the k-th largest, ties included; None or more than K keeps all.
      top_p: keep the most probable items until their sum reaches p, the one that reaches it included; None keeps all.
        Of equal items the first index counts as the more probable.

    Returns:
      Probabilities (..., K), float32.

    Raises:
      ValueError: a concrete value out of range.
    """
    check_filter(temperature, top_k, top_p)
    K = logits.shape[-1]
    # +inf becomes a large number: inf - inf in the softmax would be NaN.
    logits = jnp.nan_to_num(logits.astype(jnp.float32), nan=-jnp.inf, posinf=1e30, neginf=-jnp.inf)
    # Any higher, all finite logits have one probability; and 1 / temperature, by which XLA may multiply, would be 0.
    temperature = jnp.minimum(jnp.asarray(temperature, jnp.float32), 1e30)
    largest = jnp.max(logits, -1, keepdims=True)
    # A row whose largest logit is not finite has no softmax. It takes its argmax (index 0 where all are -inf), as rows
    # of temperature 0 do.
    greedy = (temperature == 0) | ~jnp.isfinite(largest / jnp.where(temperature == 0, 1.0, temperature))
    # The argmax in two passes that vectorise; XLA's own on CPU is a scalar loop. A row of one logit has probability 1
    # there, and passes all filters.
    indices = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    first = jnp.min(indices, -1, keepdims=True, initial=K, where=logits == largest)
    only_first = jnp.where(indices == first, jnp.float32(0), -jnp.inf)
    logits = jnp.where(greedy, only_first, logits / jnp.where(greedy, 1.0, temperature))
    cut: Any = False
    if top_k is not None:
        top_k = jnp.asarray(at_most(K, top_k))
        logits, cut = _keep_top_k(logits, top_k), top_k < K
    probabilities = jax.nn.softmax(logits, -1)
    if top_p is not None:
        top_p = jnp.asarray(top_p, jnp.float32)
        probabilities, cut = _keep_top_p(probabilities, top_p), cut | (top_p < 1)
    return probabilities / jnp.where(cut, jnp.sum(probabilities, -1, keepdims=True), 1.0)


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """-inf in place of the logits below the k-th largest."""
    top_k = jnp.broadcast_to(top_k, (*logits.shape[:-1], 1))
    # The k-th largest is where a sum of ones reaches k. An infinite target keeps everything.
    target = jnp.where(top_k < logits.shape[-1], top_k.astype(jnp.float32), jnp.inf)
    return jnp.where(logits >= _threshold(logits, jnp.ones_like, target), logits, -jnp.inf)


def _keep_top_p(probabilities: jax.Array, top_p: jax.Array) -> jax.Array:
    """0 in place of the probabilities after those whose sum reaches p."""
    top_p = jnp.broadcast_to(top_p, (*probabilities.shape[:-1], 1))
    # At 1 nothing is cut: the float32 sum of all may stay below 1 or reach it before the tail.
    target = jnp.where(top_p < 1, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny), jnp.inf)
    last = _threshold(probabilities, lambda values: values, target)
    kept = jnp.where(probabilities >= last, probabilities, 0.0)
    # Of equal items at the threshold only the first stay, as many as the sum needs.
    tied = kept == last
    needed = jnp.maximum(1, jnp.ceil((top_p - jnp.sum(kept, -1, where=~tied, keepdims=True)) / last))
    needed = jnp.where(top_p < 1, needed, jnp.inf)
    surplus = jax.lax.broadcasted_iota(jnp.int32, tied.shape, tied.ndim - 1) > _index_of_nth(tied, needed)
    return jnp.where(tied & surplus, 0.0, kept)


def _index_of_nth(marked: jax.Array, n: jax.Array) -> jax.Array:
    """Index (..., 1) of the n-th of the marked items, n (..., 1) from 1 on; beyond the last index where fewer are.

    In two steps, the block and the item in it: cumulative sums of K / 128 and of 128 numbers instead of K.
    """
    padding = [(0, 0)] * (marked.ndim - 1) + [(0, -marked.shape[-1] % _BLOCK)]
    blocks = jnp.pad(marked, padding).reshape(*marked.shape[:-1], -1, _BLOCK)
    sums = jnp.cumsum(jnp.sum(blocks, -1, dtype=jnp.float32), -1)
    before = sums < n
    block = jnp.sum(before, -1, keepdims=True, dtype=jnp.int32)
    n = n - jnp.max(sums, -1, keepdims=True, initial=0.0, where=before)
    inside = jnp.take_along_axis(blocks, block[..., None], -2, mode="clip")[..., 0, :].astype(jnp.float32)
    return block * _BLOCK + jnp.sum(jnp.cumsum(inside, -1) < n, -1, keepdims=True, dtype=jnp.int32)


def _threshold(values: jax.Array, weight: Callable[[jax.Array], jax.Array], target: jax.Array) -> jax.Array:
    """The largest of the values such that the weights of all values from it on sum to at least the target.

    Searches the 32-bit integers that order as the floats do, a few bits a round, in a number of rounds that no value
    changes: a GPU would wait for its host at each round of a loop that ends by a condition.

    Args:
      values: (..., K).
      weight: of values; at least 0.
      target: (..., 1), above 0; where it is more than the sum of all weights the answer is the smallest value.

    Returns:
      (..., 1).
    """
    search = functools.partial(_search, weight)
    # A CPU pays for each sum, an accelerator for each round: there XLA makes one kernel of all sums of a round.
    low = jax.lax.platform_dependent(
        _ordered(values), target, cpu=functools.partial(search, bits=1), default=functools.partial(search, bits=3)
    )
    return jnp.min(values, -1, keepdims=True, initial=jnp.inf, where=_ordered(values) >= low)


def _search(weight: Callable[[jax.Array], jax.Array], keys: jax.Array, target: jax.Array, bits: int) -> jax.Array:
    """The largest key such that the weights from it on reach the target, the highest bits first; 0 where none does.

    Each round tests all values of the next `bits` bits. The rounds are unrolled where they are few.
    """

    def narrow(i: Any, low: jax.Array) -> jax.Array:
        # The last round may test bits that an earlier one knows: they fall short again.
        step = jnp.uint32(1) << jnp.maximum(32 - bits * (i + 1), 0).astype(jnp.uint32)

        def is_reached(j: int) -> jax.Array:
            weights = jnp.where(keys >= low + j * step, weight(_from_ordered(keys)), 0.0)
            return jnp.sum(weights, -1, keepdims=True) >= target

        # The sums do not grow from one key to the next: those that reach the target come first.
        return low + step * sum(is_reached(j).astype(jnp.uint32) for j in range(1, 2**bits))

    return jax.lax.fori_loop(0, -(-32 // bits), narrow, jnp.zeros(target.shape, jnp.uint32), unroll=bits > 1)


def _ordered(x: jax.Array) -> jax.Array:
    """Float32 as uint32 in the same order.

    The bits of positive floats order as integers. Negative ones order backwards, so that all their bits are flipped;
    setting the sign bit of the positive ones puts them above.
    """
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 becomes 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered(keys: jax.Array) -> jax.Array:
    """The inverse of `_ordered`."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32((1 << 31) - 1), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def at_most(K: int, top_k: Any) -> Any:
    """top_k as int32, no more than K. A concrete one of any size is cut on the host."""
    if isinstance(top_k, jax.Array):
        return jnp.minimum(top_k.astype(jnp.int32), K)
    return np.minimum(np.asarray(top_k, np.float64), K).astype(np.int32)


def check_filter(temperature: Any, top_k: Any, top_p: Any, prefix: str = "") -> None:
    """Check the concrete values of a filter, whose names in messages start with `prefix`; traced ones pass.

    Raises:
      ValueError: a value out of range.
    """
    keep_all = "leave it out to keep all codes"
    if _is_concrete(temperature):
        checks.at_least(f"{prefix}temperature", temperature, 0, fix="0 takes the most probable code")
        checks.within(f"{prefix}temperature", temperature, 0, float(np.finfo(np.float32).max))
    if _is_concrete(top_k):
        checks.at_least(f"{prefix}top_k", top_k, 1, whole=True, fix=keep_all)
    if _is_concrete(top_p):
        checks.within(f"{prefix}top_p", top_p, 0, 1, fix=keep_all)


def _is_concrete(value: Any) -> bool:
    return value is not None and not isinstance(value, jax.core.Tracer)

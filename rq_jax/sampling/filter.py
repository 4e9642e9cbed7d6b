"""Filter of the logits: temperature, top-k and top-p."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.settings import checks


def filter_logits(
    logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Probabilities to draw from: temperature, then top-k, softmax, top-p, renormalised (paper, appendix B).

    The order is that of kakaobrain/rq-vae-transformer:sample_from_logits. All values are traced: changing them never
    recompiles a program.

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
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    top_k = jnp.asarray(at_most(K, top_k))
    top_p = jnp.asarray(1.0 if top_p is None else top_p, jnp.float32)
    # The values are traced: branches at run time leave out what a filter that is off would cost.
    filters = jnp.any(top_k < K) | jnp.any(top_p < 1)
    probabilities = jax.lax.cond(filters, _cut, lambda x, k, p: jax.nn.softmax(x, -1), scaled, top_k, top_p)

    def choose(probabilities: jax.Array) -> jax.Array:
        return jnp.where(greedy, jax.nn.one_hot(jnp.argmax(logits, -1), K, dtype=jnp.float32), probabilities)

    return jax.lax.cond(jnp.any(greedy), choose, lambda x: x, probabilities)


def _cut(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Top-k, softmax, top-p. Without a sort: each keeps what is at or above a threshold, found by bisection."""
    K, shape = logits.shape[-1], (*logits.shape[:-1], 1)
    top_k, top_p = jnp.broadcast_to(top_k, shape), jnp.broadcast_to(top_p, shape)
    # Top-k is the sum of weights 1 up to k. An infinite target keeps everything without a single round.
    kth = _threshold(logits, lambda _: jnp.float32(1), jnp.where(top_k < K, top_k.astype(jnp.float32), jnp.inf))
    probabilities = jax.nn.softmax(jnp.where(logits >= kth, logits, -jnp.inf), -1)
    # At 1 nothing is cut: the float32 sum of all may stay below 1 or reach it before the tail.
    last = _threshold(probabilities, lambda value: value, jnp.where(top_p < 1, top_p, jnp.inf))
    kept = jnp.where(probabilities >= last, probabilities, 0.0)
    # Of equal items at the threshold only the first stay, as many as the sum needs.
    tied = kept == last
    needed = jnp.maximum(1, jnp.ceil((top_p - jnp.sum(kept, -1, where=~tied, keepdims=True)) / last))
    too_many = (top_p < 1) & (jnp.sum(tied, -1, keepdims=True).astype(jnp.float32) > needed)

    def keep_first(kept: jax.Array) -> jax.Array:
        surplus = jnp.cumsum(tied, -1).astype(jnp.float32) > needed
        return jnp.where(too_many & tied & surplus, 0.0, kept)

    kept = jax.lax.cond(jnp.any(too_many), keep_first, lambda kept: kept, kept)
    return kept / jnp.sum(kept, -1, keepdims=True)


def _threshold(values: jax.Array, weight: Callable[[jax.Array], Any], target: jax.Array) -> jax.Array:
    """The largest of the values such that the weights of all values from it on sum to at least the target.

    Bisects the 32-bit integers that order as the floats do: the gap between two bounds halves at each round whatever
    the spread of the values, so that 32 rounds always suffice, and most rows end as soon as one value is left.

    Args:
      values: (..., K).
      weight: of a value; at least 0, and no smaller for a larger value.
      target: (..., 1); where it is more than the sum of all weights the answer is the smallest value, at once.

    Returns:
      (..., 1).
    """
    keys = _ordered(values)
    # Invariant: the weights from `low` on reach the target (or all of them fall short), those from `high` on do not.
    low, high = jnp.min(keys, -1, keepdims=True), jnp.max(keys, -1, keepdims=True) + 1

    def sum_from(key: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keys >= key, weight(values), 0.0), -1, keepdims=True)

    def is_open(state: Any) -> jax.Array:
        low, high, sum_low, sum_high = state
        # One value between the bounds weighs at least what `low` would, two weigh twice that; 1.5 leaves room to round.
        several = sum_low - sum_high > 1.5 * weight(_from_ordered(low))
        return (high - low > 1) & several & (target <= sum_low)

    def halve(state: Any) -> Any:
        low, high, sum_low, sum_high = state
        middle = low + (high - low) // 2  # low + high could overflow
        total = sum_from(middle)
        up = total >= target
        return (
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, total, sum_low),
            jnp.where(up, sum_high, total),
        )

    state = low, high, sum_from(low), jnp.zeros(low.shape, jnp.float32)
    low = jax.lax.while_loop(lambda state: jnp.any(is_open(state)), halve, state)[0]
    return jnp.min(values, -1, keepdims=True, initial=jnp.inf, where=keys >= low)


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
    """top_k as int32, no more than K; None is K. A concrete one of any size is cut on the host."""
    if isinstance(top_k, jax.Array):
        return jnp.minimum(top_k.astype(jnp.int32), K)
    return np.minimum(np.asarray(K if top_k is None else top_k, np.float64), K).astype(np.int32)


def check_filter(temperature: Any, top_k: Any, top_p: Any) -> None:
    """Check the concrete values of a filter; traced ones pass.

    Raises:
      ValueError: a value out of range.
    """
    keep_all = "leave it out to keep all codes"
    if _is_concrete(temperature):
        checks.at_least("temperature", temperature, 0, fix="0 takes the most probable code")
        checks.within("temperature", temperature, 0, float(np.finfo(np.float32).max))
    if _is_concrete(top_k):
        checks.at_least("top_k", top_k, 1, whole=True, fix=keep_all)
    if _is_concrete(top_p):
        checks.within("top_p", top_p, 0, 1, fix=keep_all)


def _is_concrete(value: Any) -> bool:
    return value is not None and not isinstance(value, jax.core.Tracer)

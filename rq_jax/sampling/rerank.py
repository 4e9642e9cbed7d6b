"""Rejection sampling: the best of several samples."""

from typing import Any

import jax
import jax.numpy as jnp

from rq_jax.settings import checks


def keep_best(items: Any, scores: jax.Array, keep: int) -> tuple[Any, jax.Array]:
    """Rejection sampling: the `keep` items of highest score, best first (paper, section 4.1).

    Args:
      items: a pytree of arrays (n, ...), such as codes and images.
      scores: (n,), such as a classifier's probability of the intended class.
      keep: 1..n.

    Returns:
      The kept items (keep, ...) and their indices (keep,).
    """
    checks.in_range("keep", keep, 1, scores.shape[0], "the number of scores")
    indices = jnp.argsort(-jnp.asarray(scores), stable=True)[:keep]
    return jax.tree.map(lambda array: array[indices], items), indices

"""Learning a codebook: moving average, restart of unused codes, k-means (paper, section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.quantize.codes import ResidualCodes, nearest_codes, quantize_once

# Laplace smoothing of the counts and noise on tiled restart candidates, as kakaobrain/rq-vae-transformer:VQEmbedding.
_COUNT_EPSILON = 1e-5
_TILE_NOISE = 0.01


class CodebookState(NamedTuple):
    """A codebook (K, E) with the moving averages behind it: code counts (K,) and sums of assigned vectors (K, E)."""

    codebook_KE: jax.Array
    counts_K: jax.Array
    sums_KE: jax.Array


def ema_update(
    state: CodebookState,
    x_NE: jax.Array,
    codes_N: jax.Array,
    decay: float,
    candidates_KE: jax.Array | None = None,
) -> CodebookState:
    """One exponential-moving-average update of a codebook from the vectors assigned to it.

    Args:
      state: the codebook and its averages.
      x_NE: the global batch of vectors (N, E).
      codes_N: their codes (N,).
      decay: weight of the old averages, in [0, 1].
      candidates_KE: given, every code whose average count is below 1 restarts from its row here with count 1.

    Returns:
      The new state. Its codebook is sums / counts with Laplace-smoothed counts.
    """
    K = state.counts_K.shape[0]
    x_NE = x_NE.astype(jnp.float32)
    batch_counts_K = jnp.zeros(K, jnp.float32).at[codes_N].add(1.0)
    batch_sums_KE = jnp.zeros_like(state.sums_KE).at[codes_N].add(x_NE)
    # In this order of operations the count of a code used exactly once per update stays exactly 1, which the test below
    # counts as used.
    counts_K = decay * state.counts_K + (1 - decay) * batch_counts_K
    sums_KE = decay * state.sums_KE + (1 - decay) * batch_sums_KE
    if candidates_KE is not None:
        used_K = counts_K >= 1
        counts_K = jnp.where(used_K, counts_K, 1.0)
        sums_KE = jnp.where(used_K[:, None], sums_KE, candidates_KE)
    total = counts_K.sum()
    smoothed_K = total * (counts_K + _COUNT_EPSILON) / (total + K * _COUNT_EPSILON)
    return CodebookState(sums_KE / smoothed_K[:, None], counts_K, sums_KE)


def restart_candidates(rng: jax.Array, x_NE: jax.Array, K: int) -> jax.Array:
    """K vectors (K, E) drawn without replacement from the global batch (N, E), for codes that nothing uses.

    With fewer vectors than codes each is repeated ceil(K / N) times under uniform noise in [0, 0.01 / sqrt(E)), as in
    kakaobrain/rq-vae-transformer:VQEmbedding._tile_with_noise.
    """
    N, E = x_NE.shape
    rng_choice, rng_noise = jax.random.split(rng)
    repeats = -(-K // N)
    # A permutation of `repeats` copies of the rows: every vector occurs at most `repeats` times.
    rows_K = jax.random.permutation(rng_choice, repeats * N)[:K] % N
    candidates_KE = x_NE.astype(jnp.float32)[rows_K]
    if repeats > 1:
        candidates_KE += jax.random.uniform(rng_noise, (K, E)) * (_TILE_NOISE / np.sqrt(E))
    return candidates_KE


def kmeans(rng: jax.Array, x_NE: jax.Array, K: int, num_iterations: int = 10) -> CodebookState:
    """Lloyd's algorithm from K vectors of the batch; empty clusters keep their centre. Returns a whole state."""
    x_NE = x_NE.astype(jnp.float32)

    def iterate(_, state: CodebookState) -> CodebookState:
        codes_N = nearest_codes(x_NE, state.codebook_KE)
        counts_K = jnp.zeros(K, jnp.float32).at[codes_N].add(1.0)
        sums_KE = jnp.zeros_like(state.sums_KE).at[codes_N].add(x_NE)
        means_KE = jnp.where(counts_K[:, None] > 0, sums_KE / jnp.maximum(counts_K, 1.0)[:, None], state.codebook_KE)
        return CodebookState(means_KE, counts_K, sums_KE)

    centres_KE = restart_candidates(rng, x_NE, K)
    return jax.lax.fori_loop(0, num_iterations, iterate, CodebookState(centres_KE, jnp.zeros(K), centres_KE))


Candidates = Callable[[int, jax.Array, int], jax.Array]


def quantize_and_update(
    x: jax.Array,
    states: Sequence[CodebookState],
    depth: int,
    decays: Sequence[float],
    codebook_update: str = "sequential",
    candidates: Candidates | None = None,
) -> tuple[ResidualCodes, list[CodebookState]]:
    """Quantise a training batch and update the codebooks with it.

    Args:
      x: vectors (..., E), the global batch.
      states: one state, shared by all depths, or D states.
      depth: D.
      decays: one per state.
      codebook_update: "sequential" updates after every depth, so that with a shared codebook the next depth searches
        the table just updated (as kakaobrain/rq-vae-transformer:RQBottleneck.quantize); "pooled" searches one
        unchanged table at all depths and updates it once a call with the vectors of all of them.
      candidates: `(depth index, vectors (N, E), K) -> (K, E)` replacements of unused codes; None: no restart.

    Returns:
      `ResidualCodes` looked up in the tables from before each depth's own update, and the new states.
    """
    states, shared = list(states), len(states) == 1

    def update(index: int, d: int, x_NE: jax.Array, codes_N: jax.Array) -> None:
        rows_KE = candidates(d, x_NE, states[index].counts_K.shape[0]) if candidates else None
        states[index] = ema_update(states[index], x_NE, codes_N, decays[index], rows_KE)

    residual: jax.Array = x.astype(jnp.float32)
    total: Any = 0.0
    inputs, codes, sums = [], [], []
    # Sequential: a shared table changes between the depths of one call, so that depth d + 1 searches and subtracts
    # vectors that depth d has just moved. Pooled: all depths see the table as it was.
    for d in range(depth):
        index = 0 if shared else d
        code, vector = quantize_once(residual, states[index].codebook_KE)
        inputs.append(residual.reshape(-1, residual.shape[-1]))
        codes.append(code)
        residual, total = residual - vector, total + vector
        sums.append(total)
        if codebook_update == "sequential":
            update(index, d, inputs[-1], code.reshape(-1))
    if codebook_update == "pooled":
        if shared:
            update(0, 0, jnp.concatenate(inputs), jnp.concatenate([code.reshape(-1) for code in codes]))
        else:
            for d in range(depth):
                update(d, d, inputs[d], codes[d].reshape(-1))
    return ResidualCodes(jnp.stack(codes, -1), jnp.stack(sums, -2), total), states

"""Learning a codebook: moving average, restart of unused codes, k-means (paper, section 3.1)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rq_jax.quantize.codes import ResidualCodes, finite_vectors, nearest_codes, quantize_once
from rq_jax.settings import checks

# Laplace smoothing of the counts and noise on tiled restart candidates, as kakaobrain/rq-vae-transformer:VQEmbedding.
_COUNT_EPSILON = 1e-5
_TILE_NOISE = 0.01


class CodebookState(NamedTuple):
    """A codebook (K, E) with the moving averages behind it: code counts (K,) and sums of assigned vectors (K, E)."""

    codebook_KE: jax.Array
    counts_K: jax.Array
    sums_KE: jax.Array

    @classmethod
    def from_codebook(cls, codebook_KE: jax.typing.ArrayLike, count: float = 1.0) -> "CodebookState":
        """The state of a codebook that was learned elsewhere, from which `ema_update` goes on.

        Args:
          codebook_KE: its vectors (K, E).
          count: vectors a batch that each code stands for, above 0. The more, the slower a code forgets where it was,
            and the longer an unused one lives: it restarts once its average count falls below 1.

        >>> state = CodebookState.from_codebook(jnp.array([[1.0, 2.0], [3.0, 4.0]]), count=2)
        >>> state.counts_K.tolist(), state.sums_KE.tolist()
        ([2.0, 2.0], [[2.0, 4.0], [6.0, 8.0]])
        """
        codebook_KE = jnp.asarray(codebook_KE, jnp.float32)
        return cls(codebook_KE, jnp.full(codebook_KE.shape[:-1], count, jnp.float32), count * codebook_KE)


def ema_update(
    state: CodebookState,
    x_NE: jax.Array,
    codes_N: jax.Array,
    decay: float,
    candidates_KE: jax.Array | None = None,
    weights_N: jax.Array | None = None,
) -> CodebookState:
    """One exponential-moving-average update of a codebook from the vectors assigned to it.

    Args:
      state: the codebook and its averages; `CodebookState.from_codebook` makes one.
      x_NE: the global batch of vectors (N, E). Those that are not finite count nothing, see `finite_vectors`.
      codes_N: their codes (N,). A vector whose code is outside [0, K), such as padding, counts nothing.
      decay: weight of the old averages, in [0, 1]; 1 freezes the codebook, restarts included.
      candidates_KE: given, every code whose average count is below 1 restarts from its row here with count 1.
      weights_N: weight of each vector (N,) in counts and sums, finite and at least 0; None is 1. Inside a program their
        values are not known: there a vector whose weight is not finite counts nothing, and one whose weight is below 0
        is subtracted.

    Returns:
      The new state. Its codebook is sums / counts with Laplace-smoothed counts; a code without any count keeps its
      vector. Where no vector counts, it is the old state.

    Raises:
      ValueError: weights of another shape than the codes or, outside a program, that are not finite or below 0.
    """
    check_weights(weights_N, jnp.shape(codes_N))
    restarts_K = True if candidates_KE is None else finite_vectors(candidates_KE)
    new, learns = _update(state, x_NE, codes_N, decay, candidates_KE, restarts_K, weights_N)
    return _where(learns, new, state)


def check_weights(weights: Any, shape: Sequence[int]) -> None:
    """Weights have the shape (...) of the vectors' codes and, where they are known, are finite and at least 0."""
    if weights is not None:
        checks.shape("weights", jnp.shape(weights), shape)
        if not isinstance(weights, jax.core.Tracer):
            checks.finite("weights", weights, least=0)


def check_mask(mask: Any, shape: Sequence[int]) -> None:
    """A mask of the shape (...) of the vectors' codes is bool."""
    if mask is not None:
        checks.shape("mask", mask.shape, shape)
        if mask.dtype != bool:
            raise ValueError(f"mask: dtype {mask.dtype} must be bool; numbers are for `weights`")


def _where(condition: jax.Array, new: CodebookState, old: CodebookState) -> CodebookState:
    return CodebookState(*(jnp.where(condition, a, b) for a, b in zip(new, old, strict=True)))


def _update(
    state: CodebookState,
    x_NE: jax.Array,
    codes_N: jax.Array,
    decay: float,
    candidates_KE: jax.Array | None,
    restarts_K: Any = True,
    weights_N: jax.Array | None = None,
) -> tuple[CodebookState, jax.Array]:
    """`ema_update` of a batch with vectors that count, and whether it was one: else only the codebook stays.

    Codes that `restarts_K` excludes do not restart. The caller chooses between old and new averages: a choice in here,
    and one more mask beside the threshold of the counts, would change how XLA rounds them.
    """
    K = state.counts_K.shape[0]
    x_NE = x_NE.astype(jnp.float32)
    batch_counts_K, batch_sums_KE = _assigned(x_NE, codes_N, finite_vectors(x_NE), K, weights_N)
    learns = jnp.any(batch_counts_K > 0) & (decay < 1)
    # In this order of operations the count of a code used exactly once per update stays exactly 1, which the test below
    # counts as used.
    counts_K = decay * state.counts_K + (1 - decay) * batch_counts_K
    sums_KE = decay * state.sums_KE + (1 - decay) * batch_sums_KE
    if candidates_KE is not None:
        stays_K = counts_K >= jnp.where(learns & restarts_K, 1.0, -jnp.inf)
        counts_K = jnp.where(stays_K, counts_K, 1.0)
        sums_KE = jnp.where(stays_K[:, None], sums_KE, candidates_KE)
    total = counts_K.sum()
    smoothed_K = total * (counts_K + _COUNT_EPSILON) / (total + K * _COUNT_EPSILON)
    is_empty_KE = (counts_K == 0)[:, None] & (sums_KE == 0)
    codebook_KE = jnp.where(is_empty_KE | ~learns, state.codebook_KE, sums_KE / smoothed_K[:, None])
    return CodebookState(codebook_KE, counts_K, sums_KE), learns


def _assigned(
    x_NE: jax.Array, codes_N: jax.Array, counts_N: jax.Array, K: int, weights_N: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Number (K,) and sum (K, E) of the vectors with each code, weighted, of those that `counts_N` lets count."""
    weight: Any = 1.0
    if weights_N is not None:
        weight = jnp.asarray(weights_N, jnp.float32)
        counts_N = counts_N & jnp.isfinite(weight)
        x_NE = x_NE * weight[:, None]
    codes_N = jnp.where(counts_N, codes_N, K)

    def scatter(zeros: jax.Array, values: Any) -> jax.Array:
        return zeros.at[codes_N].add(values, mode="drop", wrap_negative_indices=False)

    return scatter(jnp.zeros(K, jnp.float32), weight), scatter(jnp.zeros((K, x_NE.shape[1]), jnp.float32), x_NE)


def restart_candidates(rng: jax.Array, x_NE: jax.Array, K: int) -> jax.Array:
    """K vectors (K, E) drawn without replacement from the global batch (N, E), for codes that nothing uses.

    With fewer vectors than codes each is repeated ceil(K / N) times under uniform noise in [0, 0.01 / sqrt(E)), as in
    kakaobrain/rq-vae-transformer:VQEmbedding._tile_with_noise. Vectors that are not finite are never drawn, see
    `finite_vectors`; where no other is left, the candidates are zeros.
    """
    N, E = x_NE.shape
    if N == 0:
        return jnp.zeros((K, E), jnp.float32)
    x_NE = x_NE.astype(jnp.float32)
    rng_choice, rng_noise = jax.random.split(rng)
    repeats = -(-K // N)
    # A permutation of `repeats` copies of the rows: every vector occurs at most `repeats` times.
    rows = jax.random.permutation(rng_choice, jnp.arange(repeats * N, dtype=jnp.int32)) % N
    is_finite, first_K = finite_vectors(x_NE)[rows], jnp.arange(K, dtype=jnp.int32)

    def places_of_finite() -> jax.Array:
        """The first K of them; fewer go round."""
        (places_K,) = jnp.nonzero(is_finite, size=K, fill_value=0)
        found = jnp.clip(jnp.sum(is_finite, dtype=jnp.int32), 1, K)
        return places_K.astype(jnp.int32)[first_K % found]

    places_K = jax.lax.cond(jnp.all(is_finite), lambda: first_K, places_of_finite)
    candidates_KE = x_NE[rows[places_K]]
    if repeats > 1:
        candidates_KE += jax.random.uniform(rng_noise, (K, E), jnp.float32) * (_TILE_NOISE / math.sqrt(E))
    return jnp.where(jnp.any(is_finite), candidates_KE, 0.0)


def kmeans(rng: jax.Array, x_NE: jax.Array, K: int, num_iterations: int = 10) -> CodebookState:
    """Lloyd's algorithm from K vectors of the batch, which leaves out those that are not finite.

    Args:
      rng: key.
      x_NE: vectors (N, E); fewer than K start several centres each, see `restart_candidates`.
      K: number of centres.
      num_iterations: at least 0, which returns the vectors to start from.

    Returns:
      The state: centres, and the number and sum of the vectors of each in the last iteration. An empty cluster keeps
      its centre, with count and sum 0.
    """
    x_NE = x_NE.astype(jnp.float32)
    is_finite_N = finite_vectors(x_NE)

    def iterate(_, state: CodebookState) -> CodebookState:
        counts_K, sums_KE = _assigned(x_NE, nearest_codes(x_NE, state.codebook_KE), is_finite_N, K)
        means_KE = jnp.where(counts_K[:, None] > 0, sums_KE / jnp.maximum(counts_K, 1.0)[:, None], state.codebook_KE)
        return CodebookState(means_KE, counts_K, sums_KE)

    centres_KE = restart_candidates(rng, x_NE, K)
    start = CodebookState(centres_KE, jnp.zeros(K, jnp.float32), jnp.zeros_like(centres_KE))
    return jax.lax.fori_loop(0, num_iterations, iterate, start)


Candidates = Callable[[int, jax.Array, int], jax.Array]


def quantize_and_update(
    x: jax.Array,
    states: Sequence[CodebookState],
    depth: int,
    decays: Sequence[float],
    codebook_update: str = "sequential",
    candidates: Candidates | None = None,
    mask: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[ResidualCodes, list[CodebookState]]:
    """Quantise a training batch and update the codebooks with it.

    Vectors and residuals that are not finite change no codebook, see `finite_vectors`.

    Args:
      x: vectors (..., E), the global batch.
      states: one state, shared by all depths, or D states.
      depth: D.
      decays: one per state.
      codebook_update: "sequential" updates after every depth, so that with a shared codebook the next depth searches
        the table just updated (as kakaobrain/rq-vae-transformer:RQBottleneck.quantize); "pooled" searches one
        unchanged table at all depths and updates it once a call with the vectors of all of them.
      candidates: `(depth index, vectors (N, E), K) -> (K, E)` finite replacements of unused codes; None: no restart.
      mask: bool (...), False for vectors that get codes and change no codebook, such as padding; `candidates` sees
        infinity in their place.
      weights: (...), see `ema_update`; the weight of a vector is that of its residuals at all depths.

    Returns:
      `ResidualCodes` looked up in the tables from before each depth's own update, and the new states.

    Raises:
      ValueError: weights as in `ema_update`, or a mask of another shape than the codes or not bool.
    """
    check_weights(weights, x.shape[:-1])
    check_mask(mask, x.shape[:-1])
    weights_N = None if weights is None else jnp.ravel(weights)
    new, shared = list(states), len(states) == 1
    has_learned: list[Any] = [False] * len(new)

    def update(index: int, d: int, x_NE: jax.Array, codes_N: jax.Array, weights_N: jax.Array | None) -> None:
        rows_KE = candidates(d, x_NE, new[index].counts_K.shape[0]) if candidates else None
        new[index], learns = _update(new[index], x_NE, codes_N, decays[index], rows_KE, weights_N=weights_N)
        has_learned[index] |= learns

    residual: jax.Array = x.astype(jnp.float32)
    total: Any = 0.0
    inputs, codes, sums = [], [], []
    # Sequential: a shared table changes between the depths of one call, so that depth d + 1 searches and subtracts
    # vectors that depth d has just moved. Pooled: all depths see the table as it was.
    for d in range(depth):
        index = 0 if shared else d
        code, vector = quantize_once(residual, new[index].codebook_KE)
        inputs.append(left_out(residual, mask).reshape(-1, residual.shape[-1]))
        codes.append(code)
        residual, total = residual - vector, total + vector
        sums.append(total)
        if codebook_update == "sequential":
            update(index, d, inputs[-1], code.reshape(-1), weights_N)
    if codebook_update == "pooled":
        if shared:
            weights_N = None if weights_N is None else jnp.tile(weights_N, depth)
            update(0, 0, jnp.concatenate(inputs), jnp.concatenate([code.reshape(-1) for code in codes]), weights_N)
        else:
            for d in range(depth):
                update(d, d, inputs[d], codes[d].reshape(-1), weights_N)
    new = [_where(*choice) for choice in zip(has_learned, new, states, strict=True)]
    return ResidualCodes(jnp.stack(codes, -1), jnp.stack(sums, -2), total), new


def left_out(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Vectors (..., E) with infinity where the mask (...) is False: nothing learns from those."""
    return x if mask is None else jnp.where(mask[..., None], x, jnp.inf)

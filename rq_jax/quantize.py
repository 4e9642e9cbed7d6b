"""Residual quantisation (Lee et al., CVPR 2022, section 3.1): pure functions first, the Flax module on top.

A *codebook* is one array `(K, E)` shared by all depths, one array `(D, K, E)`, or a tuple of D arrays `(K_d, E)`.
Vectors have any leading axes: pictures `(B, h, w, E)`, audio frames `(B, T, E)`, item embeddings `(N, E)`.

>>> import jax, jax.numpy as jnp
>>> from rq_jax import quantize
>>> codebook = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
>>> result = quantize.residual_quantize(jnp.array([[5.0, 1.2], [0.1, 3.8]]), codebook, depth=2)
>>> result.codes.tolist()
[[1, 3], [2, 0]]
>>> result.quantized.tolist()
[[5.0, 1.0], [0.0, 4.0]]

Everything here is written for the *global* batch: under `jax.jit` with sharded inputs the sums of the codebook update
are global by construction, so one device and eight give the same numbers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

Codebook = jax.Array | tuple[jax.Array, ...]

# The codebook is read in slices of so many rows that one block of scores stays near 8 MB of float32, in reach of a
# cache. Slices of codes, not of vectors: the vectors are the axis that is sharded over devices.
_SCORES_PER_BLOCK, _MIN_BLOCK = 2**21, 128
_PARTS = 16  # of a block, see `_drawn_block`
# As kakaobrain/rq-vae-transformer:VQEmbedding: Laplace smoothing of the counts, and noise on tiled restart candidates.
_COUNT_EPSILON = 1e-5
_TILE_NOISE = 0.01


class ResidualCodes(NamedTuple):
    """Codes (..., D) int32, partial sums (..., D, E) after each depth, and the last of them (..., E)."""

    codes: jax.Array
    partial_sums: jax.Array
    quantized: jax.Array


class CodebookState(NamedTuple):
    """A codebook (K, E) with the moving averages behind it: code counts (K,) and sums of assigned vectors (K, E)."""

    codebook_KE: jax.Array
    counts_K: jax.Array
    sums_KE: jax.Array


# --- search and lookup ---


def nearest_codes(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Index of the nearest codebook row in squared L2 distance, in true float32; the first index on ties.

    Args:
      x_NE: vectors (N, E).
      codebook_KE: codebook (K, E).

    Returns:
      Codes (N,), int32 in [0, K).

    Raises:
      ValueError: the vectors and the codebook differ in length E.

    >>> nearest_codes(jnp.array([[0.9], [2.1]]), jnp.array([[0.0], [1.0], [2.0]])).tolist()
    [1, 2]
    """
    _check_vector_length(x_NE, codebook_KE)
    return _best_codes(x_NE, codebook_KE)


def residual_quantize(x: jax.Array, codebook: Codebook, depth: int) -> ResidualCodes:
    """Quantise greedily, depth by depth, what the sum of the code vectors so far leaves over (equations 2 to 4).

    Args:
      x: vectors (..., E).
      codebook: shared (K, E), stacked (D, K, E) or a tuple of D arrays (K_d, E).
      depth: D, a Python int; for a stacked codebook or a tuple, its length.

    Returns:
      `ResidualCodes`. No straight-through gradient: `quantized` is differentiable in the codebook only.

    Raises:
      ValueError: depth below 1 or unlike the codebook's, or vectors of another length than the codebook's.
    """
    residual, total = x.astype(jnp.float32), 0.0
    codes, sums = [], []
    for table_KE in _tables(codebook, depth, x):
        code, vector = _quantize_once(residual, table_KE)
        residual, total = residual - vector, total + vector
        codes.append(code)
        sums.append(total)
    return ResidualCodes(jnp.stack(codes, -1), jnp.stack(sums, -2), total)


def lookup(codes: jax.Array, codebook: Codebook) -> jax.Array:
    """Code vectors of `codes`, not summed over depth.

    Args:
      codes: int (..., D); a codebook per depth may be longer than D, its first D tables are then used.
      codebook: shared (K, E), stacked (D, K, E) or a tuple of arrays (K_d, E).

    Returns:
      Vectors (..., D, E). Under a JAX transformation codes outside [0, K_d) give NaN.

    Raises:
      ValueError: a concrete code outside [0, K_d), or more depths than codebooks.

    >>> lookup(jnp.array([2, 0]), jnp.array([[0.0], [1.0], [2.0]])).tolist()
    [[2.0], [0.0]]
    """
    depth = codes.shape[-1]
    tables = codebook if _is_shared(codebook) else codebook[:depth]
    sizes = codebook_sizes(tables, depth)
    check_codes(codes, sizes)
    tables = _tables(tables, depth)
    return jnp.stack([_take(table_KE, codes[..., d]) for d, table_KE in enumerate(tables)], -2)


def check_codes(codes: Any, sizes: Sequence[int], what: str = "codes") -> None:
    """Refuse concrete codes (..., D) outside [0, K_d): inside a compiled program a gather could only hide them.

    Raises:
      ValueError: naming the first offending value, its depth and the allowed range.
    """
    if isinstance(codes, jax.core.Tracer):
        return
    codes = np.asarray(codes)
    bad = (codes < 0) | (codes >= np.asarray(sizes))
    if bad.any():
        where = tuple(np.argwhere(bad)[0])
        d = int(where[-1])
        raise ValueError(f"{what}: {codes[where]} at depth {d} is outside [0, {sizes[d]}), the codebook of that depth")


def codebook_sizes(codebook: Codebook, depth: int) -> tuple[int, ...]:
    """Number of codes K_d at each of `depth` depths."""
    return tuple(table_KE.shape[0] for table_KE in _tables(codebook, depth))


# --- soft codes and stochastic draws ---


def soft_codes(
    x: jax.Array, codebook: Codebook, depth: int, temperature: float, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax over minus the squared distances at each depth, with the codes of the same pass (section 3.3, eq. 12).

    Args:
      x: vectors (..., E).
      codebook, depth: as in `residual_quantize`.
      temperature: positive; 0.5 in all released configurations. Distances are not divided by E.
      rng: key; given, codes are drawn from the soft codes, otherwise they are the nearest ones.

    Returns:
      Soft codes (..., D, K), float32, padded with 0 to the largest K; codes (..., D), int32.
    """
    codes, residuals = draw_codes(x, codebook, depth, temperature, rng)
    return soft_labels(residuals, codebook, temperature), codes


def draw_codes(
    x: jax.Array, codebook: Codebook, depth: int, temperature: float, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The draw of `soft_codes` without its (..., D, K) array.

    Returns:
      Codes (..., D), int32, and the residuals (..., D, E) that each depth saw, from which `soft_labels` rebuilds the
      soft codes, chunk by chunk if need be.

    Raises:
      ValueError: as `residual_quantize`, or a concrete temperature that is not positive.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0; for the nearest codes use residual_quantize")
    residual = x.astype(jnp.float32)
    codes, residuals = [], []
    for d, table_KE in enumerate(_tables(codebook, depth, x)):
        rng_depth = None if rng is None else jax.random.fold_in(rng, d)
        code, vector = _quantize_once(residual, table_KE, temperature, rng_depth)
        codes.append(code)
        residuals.append(residual)
        residual = residual - vector
    return jnp.stack(codes, -1), jnp.stack(residuals, -2)


def soft_labels(residuals: jax.Array, codebook: Codebook, temperature: float) -> jax.Array:
    """Soft codes (..., D, K) from the residuals (..., D, E) of `draw_codes`; padded with 0 to the largest K."""
    tables = _tables(codebook, residuals.shape[-2])
    largest = max(table_KE.shape[0] for table_KE in tables)
    soft = []
    for d, table_KE in enumerate(tables):
        probabilities = jax.nn.softmax(_scores(residuals[..., d, :], table_KE) / temperature, axis=-1)
        padding = [(0, 0)] * (probabilities.ndim - 1) + [(0, largest - table_KE.shape[0])]
        soft.append(jnp.pad(probabilities, padding))
    return jnp.stack(soft, -2)


# --- the codebook's moving average ---


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
      decay: share of the old averages that is kept, in [0, 1].
      candidates_KE: given, every code whose average count is below 1 restarts from its row here with count 1.

    Returns:
      The new state. Its codebook is sums / counts with Laplace-smoothed counts.
    """
    K = state.counts_K.shape[0]
    x_NE = x_NE.astype(jnp.float32)
    batch_counts_K = jnp.zeros(K, jnp.float32).at[codes_N].add(1.0)
    batch_sums_KE = jnp.zeros_like(state.sums_KE).at[codes_N].add(x_NE)
    # In this order of operations a code used exactly once per update stays exactly at 1 and survives the test below.
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

    residual, total = x.astype(jnp.float32), 0.0
    inputs, codes, sums = [], [], []
    for d in range(depth):
        index = 0 if shared else d
        code, vector = _quantize_once(residual, states[index].codebook_KE)
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


# --- a code grid coarser than the latent grid ---


def fold_patches(latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Fold (B, H, W, C) onto a coarser grid: (B, h, w, r*s*C), in the order row offset, column offset, channel."""
    return rearrange(latents, "b (h r) (w s) c -> b h w (r s c)", h=grid[0], w=grid[1])


def unfold_patches(vectors: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `fold_patches`: (B, h, w, r*s*C) back onto the finer grid (H, W)."""
    r, s = grid[0] // vectors.shape[1], grid[1] // vectors.shape[2]
    return rearrange(vectors, "b h w (r s c) -> b (h r) (w s) c", r=r, s=s)


# --- the Flax module ---


class ResidualQuantizer(nn.Module):
    """Residual quantiser with a straight-through gradient and a codebook learned by moving average.

    Its state lives in the variable collection "codebook": `codebook_KE`, `counts_K`, `sums_KE`; each is one array for
    a shared codebook, an array with a leading axis D for separate ones of equal size, a tuple of D arrays otherwise.
    Training calls need `mutable=["codebook"]`; restart and k-means draw from the rng stream "restart" and do not happen
    without it.

    Attributes:
      codebook_size: K, or D sizes K_d (separate codebooks only).
      code_dim: E, length of a code vector.
      depth: D, codes per vector; 1 is plain vector quantisation.
      use_shared_codebook: one table for all depths.
      decay: of the moving average, or one per depth (separate codebooks only).
      use_restart: unused codes restart from random vectors of the batch.
      codebook_update: "sequential" or "pooled", see `quantize_and_update`.
      use_kmeans_init: the first training call places the codes by k-means.
    """

    codebook_size: int | tuple[int, ...]
    code_dim: int
    depth: int
    use_shared_codebook: bool = True
    decay: float | tuple[float, ...] = 0.99
    use_restart: bool = True
    codebook_update: str = "sequential"
    use_kmeans_init: bool = False

    def setup(self):
        sizes, self.decays = check_settings(self)
        init = nn.initializers.normal(1.0)

        def draw(rng: jax.Array) -> list[jax.Array]:
            keys = jax.random.split(rng, len(sizes))
            return [init(key, (size, self.code_dim), jnp.float32) for key, size in zip(keys, sizes, strict=True)]

        def tables():
            return self._join(draw(self.make_rng("params")))

        self.codebook_KE = self.variable("codebook", "codebook_KE", tables)
        self.counts_K = self.variable("codebook", "counts_K", lambda: self._join([jnp.zeros(K) for K in sizes]))
        self.sums_KE = self.variable("codebook", "sums_KE", lambda: self.codebook_KE.value)

    def __call__(self, x: jax.Array, train: bool = False) -> ResidualCodes:
        """Quantise vectors (..., E); in training also update the codebook.

        Returns:
          `ResidualCodes`; the gradient of `quantized` passes straight through to `x`.
        """
        detached = jax.lax.stop_gradient(x.astype(jnp.float32))
        if train and not self.is_initializing():
            result, states = self._train(detached)
            for variable, values in zip(self._variables, zip(*states, strict=True), strict=True):
                variable.value = self._join(list(values))
        else:
            result = residual_quantize(detached, self.codebook, self.depth)
        return result._replace(quantized=x + jax.lax.stop_gradient(result.quantized - x))

    @property
    def codebook(self) -> Codebook:
        """The codebook as the pure functions take it."""
        value = self.codebook_KE.value
        return tuple(value) if isinstance(value, (tuple, list)) else value

    @property
    def _variables(self):
        return self.codebook_KE, self.counts_K, self.sums_KE

    def _train(self, x: jax.Array) -> tuple[ResidualCodes, list[CodebookState]]:
        split = [[v.value] if self.use_shared_codebook else list(v.value) for v in self._variables]
        states = [CodebookState(*arrays) for arrays in zip(*split, strict=True)]
        candidates = None
        if self.has_rng("restart"):
            rng_restart, rng_kmeans = jax.random.split(self.make_rng("restart"))
            if self.use_restart:

                def candidates(d: int, x_NE: jax.Array, K: int) -> jax.Array:
                    return restart_candidates(jax.random.fold_in(rng_restart, d), x_NE, K)

            if self.use_kmeans_init:
                states = self._place_codes(rng_kmeans, x, states)
        return quantize_and_update(x, states, self.depth, self.decays, self.codebook_update, candidates)

    def _place_codes(self, rng: jax.Array, x: jax.Array, states: list[CodebookState]) -> list[CodebookState]:
        """K-means on the residuals of each depth, only while nothing has ever been counted."""

        def place() -> list[CodebookState]:
            residual, placed = x.reshape(-1, x.shape[-1]), []
            for d, state in enumerate(states):
                placed.append(kmeans(jax.random.fold_in(rng, d), residual, state.counts_K.shape[0]))
                residual = residual - _quantize_once(residual, placed[-1].codebook_KE)[1]
            return placed

        untouched = jnp.stack([jnp.all(state.counts_K == 0) for state in states]).all()
        return jax.lax.cond(untouched, place, lambda: states)

    def _join(self, arrays: list[jax.Array]) -> Any:
        if self.use_shared_codebook:
            return arrays[0]
        equal = len({array.shape for array in arrays}) == 1
        return jnp.stack(arrays) if equal else tuple(arrays)


def check_settings(q: Any) -> tuple[list[int], list[float]]:
    """Sizes and decays of the distinct codebooks of a quantiser's settings; one-line errors where they do not fit."""
    for name in ("codebook_size", "decay"):
        value = getattr(q, name)
        if isinstance(value, Sequence):
            if q.use_shared_codebook:
                raise ValueError(
                    f"{name}: {tuple(value)} has one entry per depth, but the codebook is shared; give one number"
                )
            if len(value) != q.depth:
                raise ValueError(
                    f"{name}: {tuple(value)} has {len(value)} entries for code depth {q.depth}; give one per depth"
                )
    if q.codebook_update not in ("sequential", "pooled"):
        raise ValueError(f"codebook_update: '{q.codebook_update}' is unknown; allowed are 'sequential' and 'pooled'")
    num_tables = 1 if q.use_shared_codebook else q.depth
    sizes = list(q.codebook_size) if isinstance(q.codebook_size, Sequence) else [q.codebook_size] * num_tables
    decays = list(q.decay) if isinstance(q.decay, Sequence) else [q.decay] * num_tables
    if min(sizes) < 1 or q.depth < 1:
        raise ValueError(f"codebook_size {q.codebook_size} and code depth {q.depth} must be at least 1")
    if not all(0.0 <= decay <= 1.0 for decay in decays):
        raise ValueError(f"codebook_decay: {q.decay} is outside [0, 1]")
    return sizes, decays


# --- inner pieces ---


def _is_shared(codebook: Codebook) -> bool:
    return not isinstance(codebook, (tuple, list)) and codebook.ndim == 2


def _tables(codebook: Codebook, depth: int, x: jax.Array | None = None) -> list[jax.Array]:
    """One (K_d, E) table per depth."""
    if depth < 1:
        raise ValueError(f"depth: {depth} must be at least 1")
    tables = [codebook] * depth if _is_shared(codebook) else list(codebook)
    if len(tables) != depth:
        raise ValueError(f"depth: {depth} does not match the {len(tables)} codebooks given; they must be as many")
    if x is not None:
        _check_vector_length(x, tables[0])
    return tables


def _check_vector_length(x: jax.Array, codebook_KE: jax.Array) -> None:
    if x.shape[-1] != codebook_KE.shape[-1]:
        raise ValueError(f"vectors of length {x.shape[-1]} do not fit a codebook of length {codebook_KE.shape[-1]}")


def _quantize_once(
    x: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes (...) and code vectors (..., E) of vectors (..., E): nearest, or drawn where a key is given."""
    codes_N = _best_codes(x.reshape(-1, x.shape[-1]), codebook_KE, temperature, rng)
    codes = codes_N.reshape(x.shape[:-1])
    return codes, _take(codebook_KE, codes)


def _take(codebook_KE: jax.Array, codes: jax.Array) -> jax.Array:
    return jnp.asarray(codebook_KE).at[codes].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _scores(x: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Minus the squared distance plus |x|^2, (..., K): what is left out is the same for all codes of a vector."""
    products = jnp.einsum("...e,ke->...k", x, codebook_KE, precision=jax.lax.Precision.HIGHEST)
    return 2.0 * products - jnp.sum(codebook_KE**2, axis=-1)


def _best_codes(
    x_NE: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> jax.Array:
    """Codes (N,) of the best score, or drawn from the tempered scores, reading the codebook block by block."""
    x_NE = jax.lax.stop_gradient(x_NE.astype(jnp.float32))
    codebook_KE = jax.lax.stop_gradient(codebook_KE.astype(jnp.float32))
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

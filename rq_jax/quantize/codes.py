"""Codes of vectors and vectors of codes: residual quantisation, lookup, soft codes and stochastic draws."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from rq_jax.quantize.search import best_codes
from rq_jax.settings import checks

Codebook = jax.Array | tuple[jax.Array, ...]

_TEMPERATURES = 1e-30, 1e30  # at the ends soft codes are 0, 1 and ties, or all the same


class ResidualCodes(NamedTuple):
    """Codes (..., D) int32, partial sums (..., D, E) after each depth, and the last of them (..., E)."""

    codes: jax.Array
    partial_sums: jax.Array
    quantized: jax.Array


# --- search and lookup ---


def nearest_codes(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Index of the nearest codebook row in squared L2 distance, in true float32; the first index on ties.

    Args:
      x_NE: vectors (N, E).
      codebook_KE: codebook (K, E).

    Returns:
      Codes (N,), int32 in [0, K). A vector with a value that is NaN or infinite has code 0, and no other vector's code
      depends on it.

    Raises:
      ValueError: the vectors and the codebook differ in length E.

    >>> nearest_codes(jnp.array([[0.9], [2.1]]), jnp.array([[0.0], [1.0], [2.0]])).tolist()
    [1, 2]
    """
    check_vector_length(x_NE, codebook_KE)
    return _nearest(x_NE, codebook_KE)


def residual_quantize(x: jax.Array, codebook: Codebook, depth: int) -> ResidualCodes:
    """Quantise greedily: each depth codes the residual that the depths before it leave (paper, equations 2 to 4).

    Args:
      x: vectors (..., E).
      codebook: shared (K, E), stacked (D, K, E) or a tuple of D arrays (K_d, E).
      depth: D, a Python int; for a stacked codebook or a tuple, its length.

    Returns:
      `ResidualCodes`. No straight-through gradient: `quantized` is differentiable in the codebook only. The codes of a
      vector that is not finite are 0 at all depths.

    Raises:
      ValueError: depth below 1 or unlike the codebook's, or vectors of another length than the codebook's.
    """
    check_codebook(codebook, depth, x)
    return _residual_quantize(x, codebook, depth)


def lookup(codes: jax.Array, codebook: Codebook) -> jax.Array:
    """Code vectors of `codes`, not summed over depth.

    Args:
      codes: int (..., D); a codebook per depth may be longer than D, its first D tables are then used.
      codebook: shared (K, E), stacked (D, K, E) or a tuple of arrays (K_d, E).

    Returns:
      Vectors (..., D, E). Under a JAX transformation codes outside [0, K_d) give NaN.

    Raises:
      ValueError: a concrete code outside [0, K_d), codes of no type of integers, or more depths than codebooks.

    >>> lookup(jnp.array([2, 0]), jnp.array([[0.0], [1.0], [2.0]])).tolist()
    [[2.0], [0.0]]
    """
    depth = np.shape(codes)[-1]
    used = codebook if is_shared(codebook) else codebook[:depth]
    check_codes(codes, codebook_sizes(used, depth))
    return _lookup(jnp.asarray(codes), used)


def check_codes(codes: Any, sizes: Sequence[int], what: str = "codes") -> None:
    """Check that concrete codes (..., D) lie in [0, K_d). A compiled program could not raise, only clamp or fill.

    Raises:
      ValueError: codes of no type of integers, or naming the first offending value, its depth and the allowed range.
    """
    codes = codes if isinstance(codes, jax.Array) else np.asarray(codes)
    checks.integer_type(what, codes.dtype)
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
    check_codebook(codebook, depth)
    if isinstance(codebook, (tuple, list)):
        return tuple(len(table_KE) for table_KE in codebook)
    return (codebook.shape[-2],) * depth


def finite_vectors(x: jax.Array) -> jax.Array:
    """Which vectors (..., E) a codebook can learn from: those whose squared length is a finite float32.

    The others hold NaN, an infinity, or values so large that their squares overflow. A training call, `ema_update`,
    `kmeans` and `restart_candidates` leave them out; `(~finite_vectors(x)).sum()` says how many that are.

    Returns:
      bool (...).
    """
    return jnp.isfinite(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


# --- soft codes and stochastic draws ---


def soft_codes(
    x: jax.Array, codebook: Codebook, depth: int, temperature: float, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax over minus the squared distances at each depth, with the codes of the same pass (section 3.3, eq. 12).

    Args:
      x: vectors (..., E).
      codebook, depth: as in `residual_quantize`.
      temperature: above 0, where 0.5 is that of all released configurations; infinity gives all codes one probability.
        Distances are not divided by E.
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
      ValueError: as `residual_quantize`, or a concrete temperature that is not above 0.
    """
    check_codebook(codebook, depth, x)
    return _draw_codes(x, codebook, depth, _within_floats(temperature), rng)


def soft_labels(residuals: jax.Array, codebook: Codebook, temperature: float) -> jax.Array:
    """Soft codes (..., D, K) from the residuals (..., D, E) of `draw_codes`; padded with 0 to the largest K."""
    check_codebook(codebook, residuals.shape[-2], residuals)
    return _soft_labels(residuals, codebook, _within_floats(temperature))


# --- a code grid coarser than the latent grid ---


def fold_patches(latents: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Fold (B, H, W, C) onto a coarser grid: (B, h, w, r*s*C), in the order row offset, column offset, channel."""
    return rearrange(latents, "b (h r) (w s) c -> b h w (r s c)", h=grid[0], w=grid[1])


def unfold_patches(vectors: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `fold_patches`: (B, h, w, r*s*C) back onto the finer grid (H, W)."""
    r, s = grid[0] // vectors.shape[1], grid[1] // vectors.shape[2]
    return rearrange(vectors, "b h w (r s c) -> b (h r) (w s) c", r=r, s=s)


# --- their programs: outside of any other each call is one, and not one an operation ---

_program = functools.partial(jax.jit, inline=True)


@_program
def _nearest(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    return best_codes(x_NE, codebook_KE)


@functools.partial(_program, static_argnames="depth")
def _residual_quantize(x: jax.Array, codebook: Codebook, depth: int) -> ResidualCodes:
    residual: jax.Array = x.astype(jnp.float32)
    total: Any = 0.0
    codes, sums = [], []
    for table_KE in tables_of(codebook, depth):
        code, vector = quantize_once(residual, table_KE)
        residual, total = residual - vector, total + vector
        codes.append(code)
        sums.append(total)
    return ResidualCodes(jnp.stack(codes, -1), jnp.stack(sums, -2), total)


@_program
def _lookup(codes: jax.Array, codebook: Codebook) -> jax.Array:
    tables = tables_of(codebook, codes.shape[-1])
    return jnp.stack([_take(table_KE, codes[..., d]) for d, table_KE in enumerate(tables)], -2)


@functools.partial(_program, static_argnames="depth")
def _draw_codes(
    x: jax.Array, codebook: Codebook, depth: int, temperature: Any, rng: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    residual = x.astype(jnp.float32)
    codes, residuals = [], []
    for d, table_KE in enumerate(tables_of(codebook, depth)):
        # A key per depth: the draws of a depth do not depend on how many depths follow.
        rng_depth = None if rng is None else jax.random.fold_in(rng, d)
        code, vector = quantize_once(residual, table_KE, temperature, rng_depth)
        codes.append(code)
        residuals.append(residual)
        residual = residual - vector
    return jnp.stack(codes, -1), jnp.stack(residuals, -2)


@_program
def _soft_labels(residuals: jax.Array, codebook: Codebook, temperature: Any) -> jax.Array:
    tables = tables_of(codebook, residuals.shape[-2])
    largest = max(table_KE.shape[0] for table_KE in tables)
    soft = []
    for d, table_KE in enumerate(tables):
        probabilities = jax.nn.softmax(_scores(residuals[..., d, :], table_KE) / temperature, axis=-1)
        # Unequal codebooks share one array: codes that a smaller one does not have get probability 0.
        padding = [(0, 0)] * (probabilities.ndim - 1) + [(0, largest - table_KE.shape[0])]
        soft.append(jnp.pad(probabilities, padding))
    return jnp.stack(soft, -2)


# --- inner pieces ---


def is_shared(codebook: Codebook) -> bool:
    return not isinstance(codebook, (tuple, list)) and codebook.ndim == 2


def tables_of(codebook: Codebook, depth: int) -> list[Any]:
    """One (K_d, E) table per depth."""
    return [codebook] * depth if is_shared(codebook) else list(codebook)


def check_codebook(codebook: Codebook, depth: int, x: jax.Array | None = None) -> None:
    """There is a table for each depth, of vectors as long as those of x."""
    if depth < 1:
        raise ValueError(f"depth: {depth} must be at least 1")
    if not is_shared(codebook) and len(codebook) != depth:
        raise ValueError(f"depth: {depth} does not match the {len(codebook)} codebooks given; they must be as many")
    if x is not None:
        check_vector_length(x, codebook)


def check_vector_length(x: jax.Array, codebook: Codebook) -> None:
    length = (codebook[0] if isinstance(codebook, (tuple, list)) else codebook).shape[-1]
    if x.shape[-1] != length:
        raise ValueError(f"vectors of length {x.shape[-1]} do not fit a codebook of length {length}")


def quantize_once(
    x: jax.Array, codebook_KE: jax.Array, temperature: float | None = None, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes (...) and code vectors (..., E) of vectors (..., E): nearest, or drawn where a key is given."""
    codes_N = best_codes(x.reshape(-1, x.shape[-1]), codebook_KE, temperature, rng)
    codes = codes_N.reshape(x.shape[:-1])
    return codes, _take(codebook_KE, codes)


def _take(codebook_KE: jax.Array, codes: jax.Array) -> jax.Array:
    # NaN where a traced code is out of range: the default would clamp it to a neighbour and go unseen.
    return jnp.asarray(codebook_KE).at[codes].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _within_floats(temperature: Any) -> Any:
    """The temperature, or the nearest at which distances divide to finite numbers."""
    if isinstance(temperature, jax.core.Tracer):
        return jnp.clip(temperature, *_TEMPERATURES)
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0; for the nearest codes use residual_quantize")
    return min(max(temperature, _TEMPERATURES[0]), _TEMPERATURES[1])


def _scores(x: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """Minus the squared distance plus |x|^2, (..., K): the softmax over K does not see a term all codes share."""
    products = jnp.einsum("...e,ke->...k", x, codebook_KE, precision=jax.lax.Precision.HIGHEST)
    norms_K = jnp.sum(codebook_KE**2, axis=-1)
    return 2.0 * products - jnp.expand_dims(norms_K, tuple(range(products.ndim - 1)))

"""Which grain a region gets: by the entropy of its pixels (DQ-VAE, section 3.2)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from rq_jax.settings import checks

ENTROPY_BINS = {"full": (-1.0, 1.0), "legacy": (0.0, 1.0)}
_GRAY = 0.2989, 0.5870, 0.1140  # as the original: they add up to 0.9999


def patch_entropy(
    images: jax.Array, patch_size: int, bins: str = "full", num_bins: int = 32, sigma: float = 0.01
) -> jax.Array:
    """Entropy of the gray values of each patch: how much there is to code (section 3.2).

    The density of gray values at `num_bins` places, a Gaussian kernel around each pixel's, is normalised to a
    distribution over these places. A flat patch has 0 on a place and ln 2 half-way between two.

    Args:
      images: (B, H, W, C) floating-point in [-1, 1]; C = 3 by the gray weights of ITU-R 601, C = 1 as it is.
      patch_size: pixels on a side, dividing H and W.
      bins: "full" lays the places over [-1, 1]; "legacy" over [0, 1], as the original before July 2023, where a patch
        darker than mid-gray has no density and hence entropy 0.
      num_bins: number of places.
      sigma: width of the kernel.

    Returns:
      (B, H / patch_size, W / patch_size) float32, in nats: at least 0, at most ln(num_bins).

    Raises:
      ValueError: a patch that does not divide the image, other than 1 or 3 channels, pixels that are integers, unknown
        bins.
    """
    checks.one_of("bins", bins, ENTROPY_BINS)
    checks.integers("num_bins", num_bins, 2)
    checks.integers("patch_size", patch_size, 1)
    checks.above("sigma", sigma, 0)
    images = images if hasattr(images, "dtype") else jnp.asarray(images)  # nested lists
    checks.shape("images", images.shape, ("B", "H", "W", (1, 3)))
    checks.floating("images", images.dtype, fix="scale them to [-1, 1]")
    for axis, size in zip("HW", images.shape[1:3], strict=True):
        checks.multiple_of("images", size, patch_size, "the size of a patch", axis=axis)
    images = images.astype(jnp.float32)
    gray = images if images.shape[-1] == 1 else sum(weight * images[..., c, None] for c, weight in enumerate(_GRAY))
    patches = rearrange(gray, "b (u r) (v s) 1 -> b u v (r s)", r=patch_size, s=patch_size)

    def density(place: jax.Array) -> jax.Array:
        return jnp.mean(jnp.exp(-0.5 * ((patches - place) / sigma) ** 2), axis=-1)

    # One place at a time: the array of pixels times places is never there.
    densities = jax.lax.map(density, jnp.linspace(*ENTROPY_BINS[bins], num_bins, dtype=jnp.float32))
    total = jnp.sum(densities, axis=0, keepdims=True)
    # Differs from CrossmodalGroup/DynamicVectorQuantization:Entropy, which adds 1e-40: no normal float32, and where
    # such numbers count as 0 a patch without density would be 0 / 0.
    has_density = total >= jnp.finfo(jnp.float32).tiny
    shares = jnp.where(has_density, densities / jnp.where(has_density, total, 1.0), 0.0)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), axis=0)
    return jnp.minimum(entropy, math.log(num_bins))  # which rounding exceeds


def entropy_thresholds(entropies: jax.Array, ratios: float | Sequence[float]) -> jax.Array:
    """Thresholds with which regions like these get each grain as often as asked.

    Args:
      entropies: of a calibration set, of any shape, finite.
      ratios: shares of the grains 1 .. G-1, each in (0, 1), at most 1 together; a number stands for one grain.

    Returns:
      (G - 1,) float32, increasing: the regions above threshold g are those of the grains g .. G-1. Half-way between
      two entropies wherever there is room, so that rounding moves no region. Equal entropies get equal grains, and
      shares are then lower than asked: thresholds that would coincide are next to each other, with an empty grain
      between them.

    Raises:
      ValueError: ratios out of range, fewer than two entropies, or (where their values are known) one that is not
        finite.
    """
    ratios = check_ratios("ratios", ratios)
    if not isinstance(entropies, jax.core.Tracer):
        checks.finite("entropies", entropies)
    ordered = jnp.sort(jnp.asarray(entropies, jnp.float32).ravel())
    checks.at_least("entropies", ordered.size, 2)
    shares_above = np.cumsum(np.asarray(ratios)[::-1])[::-1]
    num_above = np.clip(np.rint(shares_above * ordered.size).astype(np.int64), 1, ordered.size - 1)
    below, above = ordered[ordered.size - num_above - 1], ordered[ordered.size - num_above]
    middle = below + (above - below) / 2
    first, *others = jnp.where(middle < above, middle, below)
    thresholds = [first]
    for threshold in others:
        # The smallest step is one of normal numbers: a device may take smaller ones for 0.
        least = jnp.maximum(jnp.nextafter(thresholds[-1], jnp.inf), thresholds[-1] + jnp.finfo(jnp.float32).tiny)
        thresholds.append(jnp.maximum(threshold, least))
    return jnp.stack(thresholds)


def route_by_entropy(entropies: jax.Array, thresholds: jax.Array) -> jax.Array:
    """Grains (B, u, v) int32 of regions: how many thresholds their entropy exceeds.

    Args:
      entropies: (B, u, v).
      thresholds: (G - 1,), increasing.

    Raises:
      ValueError: thresholds that do not increase.
    """
    check_thresholds("thresholds", thresholds)
    exceeded = entropies[..., None] > jnp.expand_dims(jnp.asarray(thresholds), tuple(range(entropies.ndim)))
    return jnp.sum(exceeded, axis=-1, dtype=jnp.int32)


def check_ratios(name: str, ratios: float | Sequence[float], num_grains: int | None = None) -> tuple[float, ...]:
    """Shares of the grains 1 .. G-1 as a tuple: G - 1 of them, each in (0, 1), at most 1 together."""
    given = tuple(float(ratio) for ratio in np.atleast_1d(ratios))
    if not given if num_grains is None else len(given) != num_grains - 1:
        count = "at least one" if num_grains is None else num_grains - 1
        raise ValueError(f"{name}: {given} has {len(given)} entries; give {count}, the shares of the grains above 0")
    for ratio in given:
        if not 0 < ratio < 1:
            raise ValueError(f"{name}: {ratio} is outside (0, 1); without it, use one grain less")
    if sum(given) > 1 + 1e-6:  # rounding of decimal fractions
        raise ValueError(f"{name}: {given} add up to {sum(given):g}; grain 0 has what they leave of 1")
    return given


def check_thresholds(name: str, thresholds: Any, num_grains: int | None = None) -> None:
    """G - 1 thresholds, increasing where their values are known."""
    checks.shape(name, np.shape(thresholds), ("G - 1" if num_grains is None else num_grains - 1,))
    if not isinstance(thresholds, jax.core.Tracer):
        values = np.asarray(thresholds)
        if not (np.all(np.isfinite(values)) and np.all(np.diff(values) > 0)):
            raise ValueError(f"{name}: {values.tolist()} must be finite and increasing, from grain 1 on")

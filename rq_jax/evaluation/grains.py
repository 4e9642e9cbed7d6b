"""Figures of grains: how often each occurs, how many codes an image has, and where they lie."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.grains import num_codes

Counts = dict[str, Any]


def count_grains(grains: jax.Array, num_grains: int, mask: jax.Array | None = None) -> Counts:
    """Sums over the images of a batch, which may be added up or averaged over batches.

    Args:
      grains: (B, u, v).
      num_grains: G.
      mask: (B,), the images that count; None: all of them.

    Returns:
      "regions" of each grain (G,), and "images" with 0, 1, ... codes (u v 4^(G-1) + 1,); float32.
    """
    B, u, v = grains.shape
    counts_B = jnp.ones(B, jnp.float32) if mask is None else mask.astype(jnp.float32)
    is_grain = grains[..., None] == jnp.arange(num_grains, dtype=grains.dtype)[None, None, None]
    regions_G = jnp.sum(jnp.where(is_grain, counts_B[:, None, None, None], 0.0), axis=(0, 1, 2))
    images = jnp.zeros(u * v * 4 ** (num_grains - 1) + 1, jnp.float32)
    return {"regions": regions_G, "images": images.at[num_codes(grains, num_grains)].add(counts_B)}


def describe_grains(counts: Counts) -> dict[str, float]:
    """Shares of the grains; mean, spread (standard deviation), least and most of the codes of an image."""
    regions_G, images = (np.asarray(counts[name], np.float64) for name in ("regions", "images"))
    numbers, shares = np.arange(len(images)), images / images.sum()
    mean, seen = numbers @ shares, np.flatnonzero(images)
    figures = {f"grain_share/grain{g}": share for g, share in enumerate(regions_G / regions_G.sum())}
    figures["codes_per_image/mean"] = mean
    figures["codes_per_image/spread"] = np.sqrt((numbers - mean) ** 2 @ shares)
    figures |= {"codes_per_image/least": seen[0], "codes_per_image/most": seen[-1]}
    return {name: float(value) for name, value in figures.items()}

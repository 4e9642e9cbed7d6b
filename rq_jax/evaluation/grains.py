"""Figures of grains: how often each occurs, how many codes an image has, and what they cost."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.grains import num_codes, patch_entropy, route_by_entropy

Counts = dict[str, Any]


def region_entropies(model: Any, images: jax.Array) -> jax.Array:
    """Entropies (B, u, v) in nats of the regions of a tokenizer with grains, whatever its router goes by."""
    return patch_entropy(images, model.region_size, model.entropy_bins)


def given_grains(model: Any, images: jax.Array, thresholds: jax.Array | None) -> dict[str, jax.Array]:
    """The argument `grains` of a tokenizer's methods: regions by entropy above thresholds; none without thresholds.

    Args:
      model: a tokenizer, with grains where there are thresholds.
      images: (B, H, W, C) in [-1, 1].
      thresholds: (G - 1,) in nats, increasing; they may be traced, so that one program serves all.
    """
    return {} if thresholds is None else {"grains": route_by_entropy(region_entropies(model, images), thresholds)}


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


def bits_per_image(model: Any, codes_per_image: float) -> float:
    """Bits of an image at a fixed length of every symbol, without an entropy coder.

    log2 K_d of each of the D codes that stand together, and, with grains, log2 G of each region for the grain map.

    Args:
      model: a tokenizer.
      codes_per_image: places of an image that are coded, D codes each: of one without grains all of its grid, else as
        `grains.num_codes` counts them; also a mean over images.
    """
    regions = math.prod(model.code_shape[:2]) // 4 ** (model.num_grains - 1)
    return codes_per_image * sum(map(math.log2, model.codebook_sizes)) + regions * math.log2(model.num_grains)

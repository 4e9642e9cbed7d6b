"""Grain maps drawn over their images."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import repeat

from rq_jax.grains import num_codes
from rq_jax.report.grids import to_uint8

_HUES = 0.62, 0.07  # from grain 0 (blue) over green to the finest (orange)
_TINT, _EDGE = 0.25, 0.8  # shares of the colour inside and at the edge of a cell


def draw_grains(images: Any, grains: Any, num_grains: int, scale: int = 1) -> np.ndarray:
    """The cells of each region, outlined and tinted from blue (grain 0) over green to orange (the finest).

    Args:
      images: (B, H, W, C), uint8 or floats in [-1, 1]; C is 1 or 3.
      grains: (B, u, v), of regions that are squares of the image.
      num_grains: G.
      scale: integer factor of enlargement, nearest neighbour; lines are one pixel wide whatever it is.

    Returns:
      uint8 (B, scale * H, scale * W, 3).
    """
    pixels = enlarge(images, scale).astype(np.float32)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    _, H, W, _ = pixels.shape
    grains = np.asarray(grains)
    side = H // grains.shape[1]
    grain_of_pixel = repeat(grains, "b u v -> b (u r) (v s)", r=side, s=side)
    cell = np.maximum(side >> grain_of_pixel, 1)
    down, across = np.arange(H)[None, :, None], np.arange(W)[None, None]
    is_edge = (down % cell == 0) | (across % cell == 0)
    # Cells of a few pixels keep more of the image than their lines would leave.
    strength = np.where(is_edge & (cell >= 4), _EDGE, _TINT)[..., None]
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.9, 0.95) for hue in np.linspace(*_HUES, num_grains)])
    colour = 255 * colours[grain_of_pixel]
    return np.rint((1 - strength) * pixels + strength * colour).astype(np.uint8)


def enlarge(images: Any, scale: int) -> np.ndarray:
    """Images (B, H, W, C) as uint8, each pixel as scale x scale of them."""
    return repeat(to_uint8(images), "b h w c -> b (h r) (w s) c", r=scale, s=scale)


def codes_told(positions: float, depth: int = 1) -> str:
    """How many codes an image has: "32 codes", or "32 x 2 codes" where each position has two."""
    return f"{positions:.0f} codes" if depth == 1 else f"{positions:.0f} x {depth} codes"


def pairs(
    images: Any, captions: Sequence[str], grains: Any, num_grains: int, scale: int = 1, depth: int = 1
) -> tuple[np.ndarray, list[str]]:
    """Each image, and beside it the same under its grain map, for `grids.captioned_grid`.

    Args:
      images, grains, num_grains, scale: as in `draw_grains`.
      captions: of the images; those of the maps are their numbers of codes.
      depth: D, codes at each position.

    Returns:
      uint8 (2 B, scale * H, scale * W, 3), and their captions.
    """
    counts = (codes_told(count, depth) for count in np.asarray(num_codes(grains, num_grains)))
    plain = enlarge(images, scale)
    plain = np.broadcast_to(plain, (*plain.shape[:-1], 3))
    both = np.stack([plain, draw_grains(images, grains, num_grains, scale)], axis=1)
    names = [text for pair in zip(captions, counts, strict=True) for text in pair]
    return both.reshape(-1, *both.shape[2:]), names

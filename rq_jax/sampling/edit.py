"""Editing of code grids: which codes of an image are kept while the rest are drawn, and the codes of two images mixed.

What is kept is one array for `generate(kept=)`: the codes, and `DRAWN` in the place of those that are drawn.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.settings import checks

DRAWN = -1  # in the place of a code that is drawn
BEFORE = ("keep", "draw")


def keep_rows(codes: jax.typing.ArrayLike, count: int) -> jax.Array:
    """Keep the first rows of the grid.

    Args:
      codes: (n, h, w, D).
      count: rows, 1..h.

    Returns:
      (n, h, w, D), `DRAWN` below.

    Raises:
      ValueError: another number of rows.
    """
    codes = jnp.asarray(codes)
    checks.in_range("count", count, 1, codes.shape[1], "the rows of the code grid")
    return jnp.where(np.arange(codes.shape[1])[:, None, None] < count, codes, DRAWN)


def keep_box(codes: jax.typing.ArrayLike, box: Sequence[int], before: str = "keep") -> jax.Array:
    """Keep a box of the grid, at all depths.

    Args:
      codes: (n, h, w, D).
      box: top, left, height, width, in positions of the grid.
      before: "keep" or "draw" the positions that come before the first of the box in raster order. Later ones outside
        of it are drawn in either case.

    Returns:
      (n, h, w, D), `DRAWN` elsewhere.

    Raises:
      ValueError: a box that does not lie inside the grid, or an unknown choice.
    """
    codes = jnp.asarray(codes)
    h, w = codes.shape[1:3]
    check_box("box", box, (h, w))
    checks.one_of("before", before, BEFORE)
    top, left, height, width = box
    rows_h1, columns_w = np.arange(h)[:, None], np.arange(w)
    is_kept = (top <= rows_h1) & (rows_h1 < top + height) & (left <= columns_w) & (columns_w < left + width)
    if before == "keep":
        is_kept |= rows_h1 * w + columns_w < top * w + left
    return jnp.where(is_kept[..., None], codes, DRAWN)


def keep_depths(codes: jax.typing.ArrayLike, depth: int) -> jax.Array:
    """Keep the first `depth` codes of every position.

    Args:
      codes: (n, h, w, D).
      depth: 1..D; with D nothing is left to draw.

    Returns:
      (n, h, w, D), `DRAWN` at the finer depths.

    Raises:
      ValueError: another depth.
    """
    codes = jnp.asarray(codes)
    checks.in_range("depth", depth, 1, codes.shape[-1], "the depths of the codes")
    return jnp.where(np.arange(codes.shape[-1]) < depth, codes, DRAWN)


def interpolate(coarse: jax.typing.ArrayLike, fine: jax.typing.ArrayLike, depth: int) -> jax.Array:
    """Interpolate two images by depth: the first `depth` codes of one at every position, the finer ones of the other.

    Finer codes correct what is left by the coarser ones of their own image, so that between the ends they add detail of
    that image without taking away what the other has.

    Args:
      coarse, fine: codes (n, h, w, D).
      depth: 0, which gives `fine`, to D, which gives `coarse`.

    Returns:
      Codes (n, h, w, D).

    Raises:
      ValueError: codes of unlike shapes, or another depth.
    """
    coarse, fine = jnp.asarray(coarse), jnp.asarray(fine)
    checks.shape("fine", fine.shape, coarse.shape)
    checks.in_range("depth", depth, 0, coarse.shape[-1], "the depths of the codes")
    return jnp.where(np.arange(coarse.shape[-1]) < depth, coarse, fine)


def check_box(setting: str, box: Sequence[int], grid: tuple[int, int]) -> None:
    """A box (top, left, height, width) of at least one position lies inside a grid (h, w).

    Raises:
      ValueError: it does not.
    """
    (top, left, height, width), (h, w) = box, grid
    if min(top, left) < 0 or min(height, width) < 1 or top + height > h or left + width > w:
        raise ValueError(
            f"{setting}: top {top}, left {left}, height {height}, width {width} is no box inside the grid of {h}x{w} "
            "positions; give one of at least one position"
        )


def check_kept(model: Any, kept: Any, num_images: int) -> jax.Array:
    """What `generate` keeps, checked where its values are known.

    Args:
      model: an `RQTransformer`.
      kept: int (n, h, w, D), with `DRAWN`.
      num_images: n.

    Raises:
      ValueError: another shape or type, or a value that is neither a code nor `DRAWN`.
    """
    checks.shape("kept", kept.shape, (num_images, *model.code_shape))
    codes = np.where(kept == DRAWN, 0, kept) if isinstance(kept, np.ndarray) else kept  # a tracer has no values
    quantize.check_codes(codes, model.codebook_sizes, "kept")
    return jnp.asarray(kept, jnp.int32)

"""Grids and vocabularies of grains, and what a grain map says of the cells."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from rq_jax.settings import checks

ORDERS = ("row", "region")


class GrainedCodes(NamedTuple):
    """Codes (B, h, w, D) int32, dense on the finest grid, and the grain of each region (B, u, v) int32."""

    codes: jax.Array
    grains: jax.Array


class PackedCodes(NamedTuple):
    """A sequence of tokens for each picture.

    content: ids of codes and special tokens (B, P, D) int32. position: ids of cells and special tokens in the
    vocabulary of the token's grain (B, P) int32. grain: (B, P) int32. length: tokens before the pads (B,) int32.
    """

    content: jax.Array
    position: jax.Array
    grain: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True)
class GrainLayout:
    """Vocabularies of the tokens, and the order in which the cells of a grain follow one another.

    Attributes:
      region_grid: (u, v).
      num_grains: G, at least 1.
      codebook_size: K.
      num_classes: start tokens of each vocabulary; 1 without classes.
      order: of the cells of one grain: "row" is raster order of the whole grid, "region" goes region by region, in
        raster order inside each.

    Raises:
      ValueError: sizes that are no integers of at least 1, or an unknown order.
    """

    region_grid: tuple[int, int]
    num_grains: int
    codebook_size: int
    num_classes: int = 1
    order: str = "row"

    def __post_init__(self):
        checks.shape("region_grid", np.shape(self.region_grid), (2,))
        object.__setattr__(self, "region_grid", tuple(self.region_grid))
        for name in ("region_grid", "num_grains", "codebook_size", "num_classes"):
            checks.integers(name, getattr(self, name), 1)
        checks.one_of("order", self.order, ORDERS)

    def grid(self, g: int) -> tuple[int, int]:
        """Rows and columns of the cells of grain g."""
        u, v = self.region_grid
        return u << g, v << g

    def cells(self, g: int) -> int:
        """How many cells grain g has: u v 4^g."""
        return math.prod(self.grid(g))

    def cell_order(self, g: int) -> np.ndarray:
        """The cells of grain g in the order of their tokens, (cells,) int32."""
        raster = np.arange(self.cells(g), dtype=np.int32).reshape(self.grid(g))
        if self.order == "row":
            return raster.ravel()
        return rearrange(raster, "(u r) (v s) -> (u v r s)", r=1 << g, s=1 << g)

    @property
    def code_grid(self) -> tuple[int, int]:
        """The grid of the finest grain (h, w)."""
        return self.grid(self.num_grains - 1)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest picture, all of the finest grain: its cells, and sos and eos of every grain."""
        return 2 * self.num_grains + self.cells(self.num_grains - 1)

    @property
    def min_tokens(self) -> int:
        """Tokens of the shortest picture, all of grain 0."""
        return 2 * self.num_grains + self.cells(0)

    @property
    def content_pad(self) -> int:
        return self.codebook_size

    @property
    def content_eos(self) -> int:
        return self.codebook_size + 1

    @property
    def content_sos(self) -> int:
        """Of class 0; that of class y is y more."""
        return self.codebook_size + 2

    @property
    def content_size(self) -> int:
        return self.codebook_size + 2 + self.num_classes

    def position_pad(self, g: int) -> int:
        return self.cells(g)

    def position_eos(self, g: int) -> int:
        return self.cells(g) + 1

    def position_sos(self, g: int) -> int:
        """Of class 0; that of class y is y more."""
        return self.cells(g) + 2

    def position_size(self, g: int) -> int:
        return self.cells(g) + 2 + self.num_classes


def repeat_cells(x: jax.Array, factor: int) -> jax.Array:
    """Each cell of (B, h, w, ...) as factor x factor cells of a finer grid."""
    return repeat(x, "b h w ... -> b (h r) (w s) ...", r=factor, s=factor)


def cell_weights(grains: jax.Array, num_grains: int) -> jax.Array:
    """Weights (B, h, w) float32 of the cells of the finest grid with which every code counts once: 4^(g - (G-1)).

    Args:
      grains: (B, u, v) in 0 .. G-1.
      num_grains: G.

    Raises:
      ValueError: a concrete grain out of range.
    """
    check_grains("grains", grains, num_grains)
    weights_G = 4.0 ** (np.arange(num_grains, dtype=np.float32) - (num_grains - 1))
    return repeat_cells(jnp.asarray(weights_G)[jnp.asarray(grains)], 1 << (num_grains - 1))


def num_codes(grains: jax.Array, num_grains: int) -> jax.Array:
    """How many codes each picture has, (B,) int32. Arguments and errors as `cell_weights`."""
    check_grains("grains", grains, num_grains)
    return jnp.sum(jnp.left_shift(1, 2 * jnp.asarray(grains, jnp.int32)), axis=(1, 2), dtype=jnp.int32)


def check_grains(
    name: str, grains: Any, num_grains: int, region_grid: Sequence[int | str] = ("u", "v"), batch: int | str = "B"
) -> None:
    """A grain map (B, u, v) of integers, in 0 .. G-1 where their values are known."""
    checks.shape(name, np.shape(grains), (batch, *region_grid))
    check_ids(name, grains, num_grains, "the grains")


def check_ids(name: str, ids: Any, bound: int, meaning: str) -> None:
    values = ids if isinstance(ids, jax.core.Tracer) else np.asarray(ids)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name}: {values.dtype} is no type of integers; allowed are 0..{bound - 1}, {meaning}")
    if isinstance(ids, jax.core.Tracer):
        return
    if len(bad := np.argwhere((values < 0) | (values >= bound))):
        place = tuple(map(int, bad[0]))
        raise ValueError(f"{name}: {values[place]} at {place} is outside 0..{bound - 1}, {meaning}")

"""Variable-length coding: grains of regions, and tokens of pictures (DQ-VAE, Huang et al., CVPR 2023, section 3).

A *region* has a *grain* g, from 0 (coarse: one code) to G - 1 (finest: 2^(G-1) x 2^(G-1) codes). Codes are kept dense
on the grid of the finest grain (h, w), where a coarser code is repeated over its cells; grains on the grid of regions
(u, v). A *cell* of grain g is one code of that grain, numbered in raster order of the grain's own grid.

Letters besides those of the package: N candidates for tokens, of which a picture keeps some.

>>> import jax.numpy as jnp
>>> layout = GrainLayout(region_grid=(1, 2), num_grains=2, codebook_size=10)
>>> codes = jnp.array([[7, 7, 1, 2], [7, 7, 3, 4]])[None, :, :, None]
>>> packed = pack(GrainedCodes(codes, jnp.array([[[0, 1]]])), layout)
>>> packed.content[0, :, 0].tolist(), packed.length.tolist()
([12, 7, 11, 12, 1, 2, 3, 4, 11, 10, 10, 10], [9])
>>> packed.position[0].tolist()
[4, 0, 3, 10, 2, 3, 6, 7, 9, 8, 8, 8]
>>> bool((unpack(packed, layout).codes.codes == codes).all())
True
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat

from rq_jax.settings import checks

ORDERS = ("row", "region")
ENTROPY_BINS = {"full": (-1.0, 1.0), "legacy": (0.0, 1.0)}
_GRAY = 0.2989, 0.5870, 0.1140  # as the original: they add up to 0.9999


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


class Unpacked(NamedTuple):
    """Codes, and which cells of the finest grid (B, h, w) no token wrote, bool."""

    codes: GrainedCodes
    holes: jax.Array


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
      ValueError: sizes below 1 or an unknown order.
    """

    region_grid: tuple[int, int]
    num_grains: int
    codebook_size: int
    num_classes: int = 1
    order: str = "row"

    def __post_init__(self):
        object.__setattr__(self, "region_grid", tuple(self.region_grid))
        checks.shape("region_grid", np.shape(self.region_grid), (2,))
        for name in ("region_grid", "num_grains", "codebook_size", "num_classes"):
            checks.at_least(name, getattr(self, name), 1)
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


# --- which grain a region gets ---


def patch_entropy(
    images: jax.Array, patch_size: int, bins: str = "full", num_bins: int = 32, sigma: float = 0.01
) -> jax.Array:
    """Entropy of the gray values of each patch: how much there is to code (section 3.2).

    The density of gray values at `num_bins` places, a Gaussian kernel around each pixel's, is normalised to a
    distribution over these places. A flat patch has 0 on a place and ln 2 half-way between two.

    Args:
      images: (B, H, W, C) in [-1, 1]; C = 3 by the gray weights of ITU-R 601, C = 1 as it is.
      patch_size: pixels on a side, dividing H and W.
      bins: "full" lays the places over [-1, 1]; "legacy" over [0, 1], as the original before July 2023, where a patch
        darker than mid-gray has no density and hence entropy 0.
      num_bins: number of places.
      sigma: width of the kernel.

    Returns:
      (B, H / patch_size, W / patch_size) float32, in nats: at least 0, at most ln(num_bins).

    Raises:
      ValueError: a patch that does not divide the image, other than 1 or 3 channels, unknown bins.
    """
    checks.one_of("bins", bins, ENTROPY_BINS)
    checks.at_least("num_bins", num_bins, 2)
    checks.above("sigma", sigma, 0)
    checks.shape("images", images.shape, ("B", "H", "W", 3 if images.shape[-1] != 1 else 1))
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
    return -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), axis=0)


def entropy_thresholds(entropies: jax.Array, ratios: float | Sequence[float]) -> jax.Array:
    """Thresholds with which regions like these get each grain as often as asked.

    Args:
      entropies: of a calibration set, of any shape.
      ratios: shares of the grains 1 .. G-1, each in (0, 1), at most 1 together; a number stands for one grain.

    Returns:
      (G - 1,) float32, increasing: the regions above threshold g are those of the grains g .. G-1. Half-way between
      two entropies wherever there is room, so that rounding moves no region. Equal entropies get equal grains, and
      shares are then lower than asked.

    Raises:
      ValueError: ratios out of range, or fewer than two entropies.
    """
    ratios = check_ratios("ratios", ratios)
    ordered = jnp.sort(jnp.asarray(entropies, jnp.float32).ravel())
    checks.at_least("entropies", ordered.size, 2)
    shares_above = np.cumsum(np.asarray(ratios)[::-1])[::-1]
    num_above = np.clip(np.rint(shares_above * ordered.size).astype(np.int64), 1, ordered.size - 1)
    below, above = ordered[ordered.size - num_above - 1], ordered[ordered.size - num_above]
    middle = below + (above - below) / 2
    return jnp.where(middle < above, middle, below)


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
    return repeat_cells(jnp.asarray(weights_G)[grains], 1 << (num_grains - 1))


def num_codes(grains: jax.Array, num_grains: int) -> jax.Array:
    """How many codes each picture has, (B,) int32. Arguments and errors as `cell_weights`."""
    check_grains("grains", grains, num_grains)
    return jnp.sum(jnp.left_shift(1, 2 * grains.astype(jnp.int32)), axis=(1, 2), dtype=jnp.int32)


# --- from codes to tokens and back ---


def pack(codes: GrainedCodes, layout: GrainLayout, tokens: int | None = None) -> PackedCodes:
    """The tokens of pictures: [sos, cells of grain 0, eos, sos, cells of grain 1, eos, ...] (section 3.3).

    Packed densely: nothing of a picture depends on its batch mates, where the original pads every grain to the longest
    of the batch. Special tokens stand at depth 0 of the content, with pads behind them; sos ids carry no class.

    Args:
      codes: dense codes in [0, K) and grains. A coarser code is read at the top left of its cell.
      layout: order and vocabularies.
      tokens: P, static; None is `layout.max_tokens`.

    Returns:
      Tokens, with pads of grain G-1 behind. `length` is the true one: inside a program, one above P tells that a
      picture did not fit and lost its last tokens.

    Raises:
      ValueError: codes or grains of another shape or out of range, or a picture of more than P tokens (inside a program
        only shapes are known).
    """
    P, G = layout.max_tokens if tokens is None else tokens, layout.num_grains
    checks.at_least("tokens", P, 1)
    checks.shape("codes", codes.codes.shape, ("B", *layout.code_grid, "D"))
    check_grains("grains", codes.grains, G, layout.region_grid)
    _check_ids("codes", codes.codes, layout.codebook_size, "the codebook")
    length_B = num_codes(codes.grains, G) + 2 * G
    if not isinstance(length_B, jax.core.Tracer) and np.any(too_long := np.asarray(length_B) > P):
        image = int(np.argmax(too_long))
        raise ValueError(f"tokens: {P} do not hold picture {image}, which has {length_B[image]}; give more, or None")
    blocks = [_candidates(codes, layout, g) for g in range(G)]
    content_BND, kept_BN = (jnp.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True))
    positions_N, grains_N = _candidate_ids(layout)
    source_BP = jax.vmap(_compact, (0, None))(kept_BN, P)
    # The candidate behind the last is the pad.
    content_BND = jnp.concatenate([content_BND, _special(layout.content_pad, layout, content_BND)], axis=1)
    content_BPD = jnp.take_along_axis(content_BND, source_BP[..., None], axis=1)
    return PackedCodes(content_BPD, jnp.asarray(positions_N)[source_BP], jnp.asarray(grains_N)[source_BP], length_B)


def _candidates(codes: GrainedCodes, layout: GrainLayout, g: int) -> tuple[jax.Array, jax.Array]:
    """Content (B, n + 2, D) of sos, all cells of grain g and eos, and which of them a picture keeps (B, n + 2)."""
    stride, order = 1 << (layout.num_grains - 1 - g), layout.cell_order(g)
    cells_BnD = rearrange(codes.codes[:, ::stride, ::stride], "b h w d -> b (h w) d").astype(jnp.int32)[:, order]
    kept_Bn = rearrange(repeat_cells(codes.grains == g, 1 << g), "b h w -> b (h w)")[:, order]
    sos, eos = (_special(token, layout, cells_BnD) for token in (layout.content_sos, layout.content_eos))
    return jnp.concatenate([sos, cells_BnD, eos], axis=1), jnp.pad(kept_Bn, ((0, 0), (1, 1)), constant_values=True)


def _special(token: int, layout: GrainLayout, content_BND: jax.Array) -> jax.Array:
    """The content (B, 1, D) of a special token."""
    B, _, D = content_BND.shape
    return jnp.full((B, 1, D), layout.content_pad, jnp.int32).at[..., 0].set(token)


def _candidate_ids(layout: GrainLayout) -> tuple[np.ndarray, np.ndarray]:
    """Positions and grains (N + 1,) of all candidates and of the pad behind them."""
    last, positions, grains = layout.num_grains - 1, [], []
    for g in range(layout.num_grains):
        positions += [layout.position_sos(g), *layout.cell_order(g), layout.position_eos(g)]
        grains += [g] * (layout.cells(g) + 2)
    return np.array([*positions, layout.position_pad(last)], np.int32), np.array([*grains, last], np.int32)


def _compact(kept_N: jax.Array, P: int) -> jax.Array:
    """Places (P,) of the first P candidates that are kept, in order; N where there are no more."""
    N = kept_N.shape[0]
    places_N = jnp.arange(N, dtype=jnp.int32)
    # Those left out go to places beyond the end, each to its own: a scatter without collisions is deterministic.
    target_N = jnp.where(kept_N, jnp.cumsum(kept_N, dtype=jnp.int32) - 1, P + places_N)
    return jnp.full(P, N, jnp.int32).at[target_N].set(places_N, mode="drop", unique_indices=True)


def unpack(packed: PackedCodes, layout: GrainLayout) -> Unpacked:
    """Dense codes and grains of tokens; the inverse of `pack`.

    Cells may come in any order; of each grain those count that stand before its first eos, or all where it has none. A
    finer code overwrites a coarser one, of two tokens of one cell the later counts. Everything else is passed over: sos
    with or without a class, pads, cells whose content is no code. `length` is not read.

    Returns:
      Codes, 0 where nothing wrote, and these holes. The grain of a region is the finest that wrote into it, G-1 where
      none did.

    Raises:
      ValueError: ids outside their vocabularies.
    """
    check_packed("packed", packed, layout)
    B, P, D = packed.content.shape
    G, (u, v) = layout.num_grains, layout.region_grid
    codes = jnp.zeros((B, *layout.code_grid, D), jnp.int32)
    finest = jnp.full((B, *layout.code_grid), -1, jnp.int32)
    for g in range(G):
        slots_Bn = _slots_of_cells(packed, layout, g)
        cells_BnD = jnp.take_along_axis(packed.content, jnp.maximum(slots_Bn, 0)[..., None], axis=1)
        rows, columns = layout.grid(g)
        cells = repeat_cells(cells_BnD.reshape(B, rows, columns, D), 1 << (G - 1 - g))
        is_written = repeat_cells((slots_Bn >= 0).reshape(B, rows, columns), 1 << (G - 1 - g))
        codes = jnp.where(is_written[..., None], cells, codes)
        finest = jnp.where(is_written, g, finest)
    grains = reduce(finest, "b (u r) (v s) -> b u v", "max", u=u, v=v)
    return Unpacked(GrainedCodes(codes, jnp.where(grains < 0, G - 1, grains)), finest < 0)


def _slots_of_cells(packed: PackedCodes, layout: GrainLayout, g: int) -> jax.Array:
    """The slot that writes each cell of grain g, (B, cells), -1 where none does."""
    P, cells = packed.position.shape[1], layout.cells(g)
    is_grain = packed.grain == g
    has_ended = jnp.cumsum(is_grain & (packed.position == layout.position_eos(g)), axis=1, dtype=jnp.int32) > 0
    is_code = jnp.all(packed.content < layout.codebook_size, axis=-1)
    cell_BP = jnp.where(is_grain & is_code & ~has_ended, packed.position, cells)

    def last_slot(cell_P: jax.Array) -> jax.Array:
        slots_P = jnp.arange(P, dtype=jnp.int32)
        return jnp.full(cells, -1, jnp.int32).at[cell_P].max(slots_P, mode="drop", wrap_negative_indices=False)

    return jax.vmap(last_slot)(cell_BP)


# --- bad input: a ValueError of one line ---


def check_ratios(name: str, ratios: float | Sequence[float], num_grains: int | None = None) -> tuple[float, ...]:
    """Shares of the grains 1 .. G-1 as a tuple: G - 1 of them, each in (0, 1), at most 1 together."""
    given = tuple(float(ratio) for ratio in np.atleast_1d(ratios))
    if not given or (num_grains is not None and len(given) != num_grains - 1):
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


def check_grains(name: str, grains: Any, num_grains: int, region_grid: Sequence[int | str] = ("u", "v")) -> None:
    """A grain map (B, u, v) of integers, in 0 .. G-1 where their values are known."""
    checks.shape(name, np.shape(grains), ("B", *region_grid))
    _check_ids(name, grains, num_grains, "the grains")


def check_packed(name: str, packed: PackedCodes, layout: GrainLayout) -> None:
    """Tokens of shapes that fit one another and, where they are known, ids inside their vocabularies."""
    B, P = packed.position.shape
    checks.shape(f"{name}.content", packed.content.shape, (B, P, "D"))
    checks.shape(f"{name}.grain", packed.grain.shape, (B, P))
    _check_ids(f"{name}.content", packed.content, layout.content_size, "the vocabulary of contents")
    _check_ids(f"{name}.grain", packed.grain, layout.num_grains, "the grains")
    _check_ids(f"{name}.position", packed.position, layout.position_size(layout.num_grains - 1), "the positions")
    if not any(isinstance(array, jax.core.Tracer) for array in packed):
        for g in range(layout.num_grains):
            position = np.where(np.asarray(packed.grain) == g, np.asarray(packed.position), 0)
            _check_ids(f"{name}.position", position, layout.position_size(g), f"the positions of grain {g}")


def _check_ids(name: str, ids: Any, bound: int, meaning: str) -> None:
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: {ids.dtype} is no type of integers; allowed are 0..{bound - 1}, {meaning}")
    if isinstance(ids, jax.core.Tracer):
        return
    values = np.asarray(ids)
    if len(bad := np.argwhere((values < 0) | (values >= bound))):
        place = tuple(map(int, bad[0]))
        raise ValueError(f"{name}: {values[place]} at {place} is outside 0..{bound - 1}, {meaning}")

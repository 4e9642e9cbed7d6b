"""From dense codes to the tokens of pictures and back (DQ-VAE, section 3.3).

Letters besides those of the package: N candidates for tokens, of which a picture keeps some.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from rq_jax.grains.layout import (
    GrainedCodes,
    GrainLayout,
    PackedCodes,
    check_grains,
    check_ids,
    num_codes,
    repeat_cells,
)
from rq_jax.settings import checks


class Unpacked(NamedTuple):
    """Codes, and which cells of the finest grid (B, h, w) no token wrote, bool."""

    codes: GrainedCodes
    holes: jax.Array


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
    checks.integers("tokens", P, 1)
    checks.shape("codes", np.shape(codes.codes), ("B", *layout.code_grid, "D"))
    check_grains("grains", codes.grains, G, layout.region_grid, batch=len(codes.codes))
    check_ids("codes", codes.codes, layout.codebook_size, "the codebook")
    codes = GrainedCodes(*(jnp.asarray(array, jnp.int32) for array in codes))
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
    cells_BnD = rearrange(codes.codes[:, ::stride, ::stride], "b h w d -> b (h w) d")[:, order]
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
    is_code = jnp.all((packed.content >= 0) & (packed.content < layout.codebook_size), axis=-1)
    cell_BP = jnp.where(is_grain & is_code & ~has_ended, packed.position, cells)

    def last_slot(cell_P: jax.Array) -> jax.Array:
        slots_P = jnp.arange(P, dtype=jnp.int32)
        return jnp.full(cells, -1, jnp.int32).at[cell_P].max(slots_P, mode="drop", wrap_negative_indices=False)

    return jax.vmap(last_slot)(cell_BP)


def check_packed(name: str, packed: PackedCodes, layout: GrainLayout) -> None:
    """Tokens of shapes that fit one another and, where they are known, ids inside their vocabularies."""
    checks.shape(f"{name}.position", packed.position.shape, ("B", "P"))
    B, P = packed.position.shape
    checks.shape(f"{name}.content", packed.content.shape, (B, P, "D"))
    checks.shape(f"{name}.grain", packed.grain.shape, (B, P))
    check_ids(f"{name}.content", packed.content, layout.content_size, "the vocabulary of contents")
    check_ids(f"{name}.grain", packed.grain, layout.num_grains, "the grains")
    check_ids(f"{name}.position", packed.position, layout.position_size(layout.num_grains - 1), "the positions")
    if not any(isinstance(array, jax.core.Tracer) for array in packed):
        for g in range(layout.num_grains):
            position = np.where(np.asarray(packed.grain) == g, np.asarray(packed.position), 0)
            check_ids(f"{name}.position", position, layout.position_size(g), f"the positions of grain {g}")

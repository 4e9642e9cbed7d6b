"""Sampling packed codes from a DQ-Transformer, as one compiled program for a batch (DQ-VAE, section 3.3).

Every image goes through the grains at its own pace: it draws cells of a grain in their order, or the end of the grain,
then the start of the next one. Which positions may follow is known, so that every cell is covered exactly once whatever
a model says; where only one may, it is the one that is drawn.

The model enters as an argument, and is used through its settings, its `layout` and its methods `for_inference`,
`init_cache`, `tokens`, `position`, `content`, `depth`, `classify_position` and `classify_content`.

Letters besides those of the package: R regions; N cells of the finest grain; Vp positions.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.grains import GrainLayout, PackedCodes, unpack
from rq_jax.sampling.draws import draw, guide, size, stretches, uniforms_of_images, with_null
from rq_jax.sampling.filter import filter_logits

# What an image draws next: a cell or the end of its grain, the start of a grain, nothing.
CELL, START, DONE = 0, 1, 2
_LEAST = -1e30  # of the logits that may be drawn: what may not has -inf


class Progress(NamedTuple):
    """How far the images of a batch are.

    owners: the grain that covers each region, -1 where none does yet (B, R). grain: that of the next token (B,). rank:
    place of the last cell in the order of its grain, -1 before the first (B,). phase: what is drawn next (B,).
    """

    owners: jax.Array
    grain: jax.Array
    rank: jax.Array
    phase: jax.Array


class Cells(NamedTuple):
    """Of the cells (G, N) of every grain: place in its order, region, and whether it is the first of its region.

    Beyond the cells of a grain the place is -1.
    """

    rank: np.ndarray
    region: np.ndarray
    is_first: np.ndarray


@functools.lru_cache(maxsize=16)
def cells_of(layout: GrainLayout) -> Cells:
    """The cells of a layout."""
    G, N = layout.num_grains, layout.cells(layout.num_grains - 1)
    rank, region, is_first = np.full((G, N), -1, np.int32), np.zeros((G, N), np.int32), np.zeros((G, N), bool)
    for g in range(G):
        order = layout.cell_order(g)
        row, column = np.divmod(order, layout.grid(g)[1])
        rank[g, order] = np.arange(len(order))
        region[g, order] = (row >> g) * layout.region_grid[1] + (column >> g)
        is_first[g, order] = (row % (1 << g) == 0) & (column % (1 << g) == 0)
    return Cells(rank, region, is_first)


def specials_of(layout: GrainLayout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions (G,) of sos, eos and pad of every grain."""
    of = layout.position_sos, layout.position_eos, layout.position_pad
    sos, eos, pad = (jnp.array([position(g) for g in range(layout.num_grains)], jnp.int32) for position in of)
    return sos, eos, pad


def allowed_positions(progress: Progress, layout: GrainLayout) -> jax.Array:
    """Which positions may follow (B, Vp), at least one of them.

    The first cell of a region that nothing covers begins it, and its other cells have to follow; regions that no grain
    has begun are left to the finest. So a cell may not be passed over that has to come, and an end comes after all.
    """
    rank_BN, region_BN, is_first_BN = (jnp.asarray(table)[progress.grain] for table in cells_of(layout))
    last = layout.num_grains - 1
    grain, (sos, eos, pad) = progress.grain, (ids[progress.grain] for ids in specials_of(layout))
    owner_BN = jnp.take_along_axis(progress.owners, region_BN, axis=1)
    is_ahead = (rank_BN > progress.rank[:, None]) & (progress.phase == CELL)[:, None]
    is_left = (owner_BN == -1) & (grain == last)[:, None]
    must_come = is_ahead & ((owner_BN == grain[:, None]) | is_left)
    may_begin = is_ahead & (owner_BN == -1) & is_first_BN
    next_rank = jnp.min(rank_BN, axis=1, initial=rank_BN.shape[1], where=must_come)
    allowed_BN = (must_come | may_begin) & (rank_BN <= next_rank[:, None])
    ends = jnp.where(next_rank == rank_BN.shape[1], eos, -1)
    special = jnp.where(progress.phase == CELL, ends, jnp.where(progress.phase == START, sos, pad))
    Vp = layout.position_size(last)
    is_special = jnp.arange(Vp, dtype=jnp.int32)[None] == special[:, None]
    return jnp.pad(allowed_BN, ((0, 0), (0, Vp - allowed_BN.shape[1]))) | is_special


def advance(progress: Progress, position: jax.Array, layout: GrainLayout) -> tuple[Progress, jax.Array]:
    """Progress after the next position (B,), and whether that is a cell (B,)."""
    grain, last, cells = progress.grain, layout.num_grains - 1, cells_of(layout)
    _, eos, _ = specials_of(layout)
    is_cell = (progress.phase == CELL) & (position != eos[grain])
    is_end = (progress.phase == CELL) & ~is_cell
    place = grain, jnp.minimum(position, cells.rank.shape[1] - 1)
    rank = jnp.where(is_cell, jnp.asarray(cells.rank)[place], jnp.where(is_end, -1, progress.rank))
    regions_R = jnp.arange(progress.owners.shape[1], dtype=jnp.int32)
    is_owned = is_cell[:, None] & (regions_R[None] == jnp.asarray(cells.region)[place][:, None])
    owners = jnp.where(is_owned, grain[:, None], progress.owners)
    after_end = jnp.where(grain == last, DONE, START)
    phase = jnp.where(is_end, after_end, jnp.where(progress.phase == START, CELL, progress.phase))
    return Progress(owners, jnp.where(is_end, jnp.minimum(grain + 1, last), grain), rank, phase), is_cell


def possible(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Logits of what is allowed, finite, and -inf elsewhere: a draw is one of the allowed, also where all are NaN."""
    finite = jnp.clip(jnp.nan_to_num(logits, nan=_LEAST), _LEAST, -_LEAST)
    return jnp.where(allowed, finite, -jnp.inf)


class Carry(NamedTuple):
    """What one step leaves to the next: tokens 0 .. t, and the hidden states (rows, M) that predict token t + 1."""

    t: jax.Array
    hidden: jax.Array
    cache: Any
    progress: Progress
    tokens: PackedCodes


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The loop's constants. Rows are images, or with guidance two an image.

    Attributes:
      cond: of the rows.
      filters: temperature, top_k and top_p of positions, then those of contents with a value for each depth.
      prefix: tokens to keep, `length` of each image, in arrays of all slots.
    """

    model: Any
    variables: Any
    cond: jax.Array
    filters: tuple[Any, Any]
    guidance: jax.Array | None
    prefix: PackedCodes

    def apply(self, method: str, *args: Any) -> Any:
        return self.model.apply(self.variables, *args, method=method)

    def read(self, tokens: PackedCodes) -> PackedCodes:
        """Tokens of the images as the stacks read those of the rows, with classes."""
        rows = tokens if self.guidance is None else jax.tree.map(lambda ids: jnp.repeat(ids, 2, axis=0), tokens)
        return self.apply("tokens", rows, self.cond)

    def start(self, owners: jax.Array, rows: int) -> Carry:
        """The first token of every image, in a cache of `rows` tokens."""
        layout, B, P = self.model.layout, len(owners), self.model.layout.max_tokens
        D, U = self.model.code_shape[-1], self.model.text_length
        content = jnp.full((B, P, D), layout.content_pad, jnp.int32).at[:, 0, 0].set(layout.content_sos)
        position = jnp.full((B, P), layout.position_pad(layout.num_grains - 1), jnp.int32)
        position = position.at[:, 0].set(layout.position_sos(0))
        grain = jnp.full((B, P), layout.num_grains - 1, jnp.int32).at[:, 0].set(0)
        zeros = jnp.zeros(B, jnp.int32)
        tokens = PackedCodes(content, position, grain, zeros + P)
        cache = self.apply("init_cache", len(self.cond), None, U + rows)
        first = self.read(PackedCodes(content[:, :1], position[:, :1], grain[:, :1], zeros))
        hidden, _, cache = self.apply("position", first, self.cond if self.model.is_text else None, cache)
        return Carry(jnp.int32(0), hidden[:, 0], cache, Progress(owners, zeros, zeros - 1, zeros + CELL), tokens)

    def step(self, carry: Carry, uniforms_S2B: jax.Array) -> Carry:
        """Token t + 1: its position, then its content, then the hidden states after it."""
        layout, t, progress = self.model.layout, carry.t, carry.progress
        logits = guide(self.apply("classify_position", carry.hidden), self.guidance)
        logits = possible(logits, allowed_positions(progress, layout))
        position = draw(uniforms_S2B[0], filter_logits(logits, *self.filters[0]))
        is_kept = t + 1 < self.prefix.length
        position = jnp.where(is_kept, self._slot(self.prefix.position, t + 1), position)
        new, is_cell = advance(progress, position, layout)
        special = jnp.where(progress.phase == DONE, layout.content_pad, layout.content_eos)
        special = jnp.where(progress.phase == START, layout.content_sos, special)
        D = self.model.code_shape[-1]
        contents = jnp.full((len(position), 1, D), layout.content_pad, jnp.int32).at[:, 0, 0].set(special)
        token = PackedCodes(contents, position[:, None], progress.grain[:, None], carry.tokens.length)
        context, cache = self.apply("content", carry.hidden[:, None], self.read(token), carry.cache)
        codes_BD, cache = self._draw_codes(context[:, 0], cache, uniforms_S2B[1:])
        codes_BD = jnp.where(is_kept[:, None], self._slot(self.prefix.content, t + 1), codes_BD)
        token = token._replace(content=jnp.where(is_cell[:, None, None], codes_BD[:, None], token.content))
        hidden, _, cache = self.apply("position", self.read(token), None, cache)

        def write(ids: jax.Array, of_token: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(ids, of_token, t + 1, axis=1)

        tokens = carry.tokens._replace(
            content=write(carry.tokens.content, token.content),
            position=write(carry.tokens.position, token.position),
            grain=write(carry.tokens.grain, token.grain),
        )
        return Carry(t + 1, hidden[:, 0], cache, new, tokens)

    def _draw_codes(self, context: jax.Array, cache: Any, uniforms_D2B: jax.Array) -> tuple[jax.Array, Any]:
        """Codes (B, D) of one position: the depth stack, one code after the other."""
        model, codes_Bd = self.model, jnp.zeros((uniforms_D2B.shape[-1], 0), jnp.int32)
        for d in range(model.code_shape[-1]):
            known = codes_Bd if self.guidance is None else jnp.repeat(codes_Bd, 2, axis=0)
            hidden, cache = self.apply("depth", context, known, cache)
            logits = guide(self.apply("classify_content", hidden, d), self.guidance)[:, : model.codebook_size]
            values: Any = [None if values_D is None else values_D[d] for values_D in self.filters[1]]
            code_B = draw(uniforms_D2B[d], filter_logits(logits, *values))
            codes_Bd = jnp.concatenate([codes_Bd, code_B[:, None]], axis=1)
        return codes_Bd, cache

    @staticmethod
    def _slot(ids: jax.Array, t: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(ids, t, axis=1, keepdims=False)


@functools.partial(jax.jit, static_argnums=0)
def generate_grains(model, variables, rng, image_ids_2B, cond_BU, filters, guidance, owners_BR, prefix):
    """Codes and grains of a batch; arguments as `Sampler`, those of the images, and the grain of each region or -1."""
    layout, D = model.layout, model.code_shape[-1]
    variables = model.for_inference(variables)
    if guidance is not None:
        cond_BU = with_null(cond_BU, model.cond_vocab_size)
    sampler = Sampler(model, variables, cond_BU, filters, guidance, prefix)
    T = layout.max_tokens - 1
    uniforms = uniforms_of_images(rng, image_ids_2B, (T, 1 + D, 2))
    carry = sampler.start(owners_BR, 1)
    share = T * size((carry.cache.position, carry.cache.content)) / size(variables["params"])
    for _, end in stretches(0, T, share):
        # Shapes in a loop are static: the cache gets room for all tokens of this stretch at once.
        cache = carry.cache._replace(
            position=carry.cache.position.resize(model.text_length + end + 1),
            content=carry.cache.content.resize(end + 1),
        )

        def goes_on(carry: Carry, end: int = end) -> jax.Array:
            return (carry.t < end) & jnp.any(carry.progress.phase != DONE)

        carry = jax.lax.while_loop(
            goes_on, lambda carry: sampler.step(carry, uniforms[carry.t]), carry._replace(cache=cache)
        )
    return unpack(carry.tokens, layout).codes

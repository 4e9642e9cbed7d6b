"""The original's sampler of two grains, slips included: for comparison, and as the baseline of speed.

CrossmodalGroup/DynamicVectorQuantization:Dualformer.sample_from_scratch runs the whole prefix again for every code. It
draws the cells of the coarse grain in any order, never the last, until all images of the batch have drawn their end;
then the fine grain. There positions are the cells that are left, in order ("fixed"), or drawn as well ("free"), where
an early end leaves holes of code 0. Images that have ended give pads, which later tokens see, so that codes depend on
the batch; where these are more tokens than the model has slots, those beyond share the last. Other slips are marked "As
the original" below.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rq_jax.grains import GrainLayout, PackedCodes, repeat_cells, unpack
from rq_jax.sampling.draws import draw, uniforms_of_images
from rq_jax.sampling.filter import filter_logits
from rq_jax.sampling.grains import cells_of, possible
from rq_jax.settings import checks

KINDS = ("fixed", "free")
_STRETCHES, _MIN_STRETCH = 8, 64  # of the prefix, which a step runs in an array of one static length


def _most_tokens(layout: GrainLayout, batch: int) -> int:
    """Tokens of the longest batch, each grain padded to its longest: images may be coarse and fine at the same time."""
    return layout.max_tokens if batch == 1 else layout.cells(0) + layout.cells(1) + 3


def check_as_released(model: Any, kind: str, **others: Any) -> None:
    """Check that the original could draw from this model, and what it is asked for.

    Raises:
      ValueError: an unknown kind, a model that the original does not have, or a keyword that it does not know.
    """
    checks.one_of("as_released", kind, KINDS)
    if model.num_grains != 2 or model.code_shape[-1] != 1:
        raise ValueError(
            f"as_released: '{kind}' is for 2 grains of code depth 1, and this model has {model.num_grains} of depth "
            f"{model.code_shape[-1]}; leave it out"
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: the original's sampler has none; leave it or as_released out")


class Carry(NamedTuple):
    """Tokens 0 .. t of a batch, the slot of the fine grain's start (P until it is known), which images have ended."""

    t: jax.Array
    tokens: PackedCodes
    fine_start: jax.Array
    has_ended: jax.Array


def next_context(apply: Any, hidden: jax.Array, tokens: PackedCodes, t: jax.Array, fine_start: jax.Array) -> jax.Array:
    """Hidden states (B, M) of the content stack at slot t, from those of the position stack at all slots.

    As the original's sample_fine_content: in the fine phase every slot of the coarse block is given its own position in
    place of the next one's.

    Args:
      apply: the model's methods by name.
      hidden: (B, P, M).
      tokens: of which position and grain are known up to token t + 1.
      t: the slot.
      fine_start: slot of the start of the fine grain.
    """
    has_slipped = (jnp.arange(hidden.shape[1], dtype=jnp.int32) < fine_start) & (t >= fine_start)
    position, grain = (
        jnp.where(has_slipped[None], ids[:, : hidden.shape[1]], jnp.roll(ids, -1, axis=1)[:, : hidden.shape[1]])
        for ids in (tokens.position, tokens.grain)
    )
    context, _ = apply("content", hidden, tokens._replace(position=position, grain=grain))
    return jax.lax.dynamic_index_in_dim(context, t, axis=1, keepdims=False)


def _allowed(layout: GrainLayout, kind: str, carry: Carry, used: tuple[jax.Array, jax.Array], labels: Any) -> jax.Array:
    """Positions (B, Vp) that the original leaves to be drawn; `used` are the cells of each grain that are taken."""
    Vp, (coarse_BN, fine_BN) = layout.position_size(1), used
    ids = jnp.arange(Vp, dtype=jnp.int32)[None]

    def pad(cells_BN: jax.Array) -> jax.Array:
        return jnp.pad(cells_BN, ((0, 0), (0, Vp - cells_BN.shape[1])))

    # As the original: the last coarse cell is taken for a fine position.
    coarse = pad(~coarse_BN.at[:, -1].set(True)) | (ids == layout.position_eos(0))
    if kind == "fixed":
        rank = jnp.asarray(cells_of(layout).rank[1])[None]
        first = jnp.min(rank, axis=1, initial=layout.cells(1), where=~fine_BN)
        ends = jnp.all(fine_BN, axis=1)[:, None] & (ids == layout.position_eos(1))
        fine = pad(~fine_BN & (rank == first[:, None])) | ends
    else:
        fine = pad(~fine_BN) | (ids == layout.position_eos(1))
        if labels is not None:  # as the original: the coarse start token is taken for a fine cell
            fine &= ids != layout.position_sos(0) + labels
    is_start, is_coarse = carry.t + 1 == carry.fine_start, carry.t + 1 < carry.fine_start
    going = jnp.where(is_coarse, coarse, fine)
    pads = ids == jnp.where(is_coarse, layout.position_pad(0), layout.position_pad(1))
    return jnp.where(is_start, ids == layout.position_sos(1), jnp.where(carry.has_ended[:, None], pads, going))


def _used(tokens: PackedCodes, layout: GrainLayout) -> tuple[jax.Array, jax.Array]:
    """Cells of each grain that an image has, those of the fine grain under a coarse one included."""

    def of_grain(g: int) -> jax.Array:
        cells = jnp.where(tokens.grain == g, tokens.position, layout.cells(g))
        return jax.vmap(lambda cell_P: jnp.zeros(layout.cells(g), bool).at[cell_P].set(True, mode="drop"))(cells)

    coarse_BN = of_grain(0)
    under = repeat_cells(coarse_BN.reshape(-1, *layout.grid(0)), 2).reshape(len(coarse_BN), -1)
    return coarse_BN, of_grain(1) | under


def position_probabilities(model: Any, apply: Any, kind: str, values: Any, cond: jax.Array, carry: Carry):
    """What position t + 1 is drawn from (B, Vp), and the hidden states (B, P-1, M) of the position stack."""
    tokens = apply("tokens", carry.tokens, cond)
    hidden, _, _ = apply("position", _first(tokens, -1), cond if model.is_text else None)
    logits = apply("classify_position", jax.lax.dynamic_index_in_dim(hidden, carry.t, axis=1, keepdims=False))
    labels = cond if model.is_conditional and not model.is_text else None
    allowed = _allowed(model.layout, kind, carry, _used(carry.tokens, model.layout), labels)
    return filter_logits(possible(logits, allowed), *values), hidden


def code_probabilities(model: Any, apply: Any, values: Any, cond: jax.Array, carry: Carry, hidden: jax.Array):
    """What the code of token t + 1 is drawn from (B, K), where its position is among the tokens."""
    tokens = apply("tokens", carry.tokens, cond)
    context = next_context(apply, hidden, tokens, carry.t, carry.fine_start)
    logits = apply("classify_content", context, 0)[:, : model.codebook_size]
    of_first_depth: Any = [None if of_depth is None else of_depth[0] for of_depth in values]
    return filter_logits(logits, *of_first_depth)


def next_token(model: Any, variables: Any, kind: str, filters: Any, cond: jax.Array, carry: Carry, uniforms: jax.Array):
    """Token t + 1, from all tokens before it."""
    layout, t = model.layout, carry.t

    def apply(method: str, *args: Any) -> Any:
        return model.apply(variables, *args, method=method)

    def write(ids: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(ids, values[:, None], t + 1, axis=1)

    probabilities, hidden = position_probabilities(model, apply, kind, filters[0], cond, carry)
    position = draw(uniforms[0], probabilities)
    grain = jnp.full_like(position, t + 1 >= carry.fine_start)
    tokens = carry.tokens
    tokens = tokens._replace(position=write(tokens.position, position), grain=write(tokens.grain, grain))
    located = carry._replace(tokens=tokens)
    code = draw(uniforms[1], code_probabilities(model, apply, filters[1], cond, located, hidden))
    is_cell = position < jnp.where(grain == 0, layout.cells(0), layout.cells(1))
    is_start, is_coarse = t + 1 == carry.fine_start, t + 1 < carry.fine_start
    # As the original: the content at an end is a pad.
    content = jnp.where(is_cell, code, jnp.where(is_start, layout.content_sos, layout.content_pad))
    tokens = tokens._replace(content=write(tokens.content, content[:, None]))
    has_ended = ~is_cell & ~is_start
    fine_start = jnp.where(is_coarse & jnp.all(has_ended), t + 2, carry.fine_start)
    return Carry(t + 1, tokens, fine_start, has_ended)


def _first(tokens: PackedCodes, count: int) -> PackedCodes:
    """The first tokens of every image; a negative count leaves some of the last out."""
    content, position, grain, length = tokens
    return PackedCodes(content[:, :count], position[:, :count], grain[:, :count], length)


def _put(tokens: PackedCodes, first: PackedCodes) -> PackedCodes:
    """Tokens with others in the place of the first."""
    count = first.position.shape[1]
    return tokens._replace(
        content=tokens.content.at[:, :count].set(first.content),
        position=tokens.position.at[:, :count].set(first.position),
        grain=tokens.grain.at[:, :count].set(first.grain),
    )


def _with_slots(model: Any, variables: Any, count: int) -> tuple[Any, Any]:
    """The model with at least so many slots, those that it lacks like its last."""
    missing = max(0, count - model.slots)
    params = variables["params"]
    slots = jnp.pad(params["slot_embedding_PM"], ((0, missing), (0, 0)), mode="edge")
    variables = {**variables, "params": {**params, "slot_embedding_PM": slots}}
    return model.clone(num_slots=model.slots + missing), variables


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(kind, model, variables, rng, image_ids_2B, cond_BU, filters, guidance):
    layout, B = model.layout, len(cond_BU)
    P = _most_tokens(layout, B)
    model, variables = _with_slots(model, variables, P)
    uniforms = uniforms_of_images(rng, image_ids_2B, (P - 1, 2, 2))
    ids = jnp.zeros((B, P), jnp.int32)
    start = (layout.content_sos, layout.position_sos(0), 0)
    pads = (layout.content_pad, layout.position_pad(1), 1)
    content, position, grain = (jnp.full_like(ids, pad).at[:, 0].set(sos) for pad, sos in zip(pads, start, strict=True))
    tokens = PackedCodes(content[..., None], position, grain, ids[:, 0] + P)
    carry = Carry(jnp.int32(0), tokens, jnp.int32(P), jnp.zeros(B, bool))
    bounds = [*range(0, P - 1, max(_MIN_STRETCH, -(-P // _STRETCHES))), P - 1]
    for end in bounds[1:]:

        def goes_on(carry: Carry, end: int = end) -> jax.Array:
            is_done = (carry.t >= carry.fine_start) & jnp.all(carry.has_ended)
            return (carry.t < end) & ~is_done

        def step(carry: Carry, end: int = end) -> Carry:
            known = carry._replace(tokens=_first(carry.tokens, end + 1))
            new = next_token(model, variables, kind, filters, cond_BU, known, uniforms[carry.t])
            return new._replace(tokens=_put(carry.tokens, new.tokens))

        carry = jax.lax.while_loop(goes_on, step, carry)
    return unpack(carry.tokens, layout).codes


generate_as_released = {kind: functools.partial(_generate, kind) for kind in KINDS}

"""What a DQ-Transformer is asked to draw, checked on the host: positions, grain maps, tokens to keep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.grains import GrainLayout, PackedCodes, check_grains, check_packed
from rq_jax.sampling.as_released import check_as_released, generate_as_released
from rq_jax.sampling.filter import at_most, check_filter
from rq_jax.sampling.grains import cells_of, generate_grains, specials_of
from rq_jax.settings import checks


def prepare(
    model: Any,
    num_images: int,
    of_position: tuple[Any, Any, Any],
    as_released: str | None,
    *,
    guidance: Any,
    prefix: Any,
    grains: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """The program that draws, the filter of positions, and the program's inputs by image.

    Args:
      model: a `DQTransformer`.
      num_images: n.
      of_position: temperature, top_k and top_p of positions.
      as_released, guidance, prefix, grains: of `generate`.

    Raises:
      ValueError: a value out of range or of the wrong shape.
    """
    filter_of_position = _position_filter(model, *of_position)
    if as_released is not None:
        check_as_released(model, as_released, guidance=guidance, prefix=prefix, grains=grains)
        return generate_as_released[as_released], filter_of_position, ()
    if model.slots < model.layout.max_tokens - 1:
        raise ValueError(
            f"model.num_slots: {model.slots} are fewer than the {model.layout.max_tokens - 1} tokens from which the "
            "last of the longest image is drawn; draw from a model with more slots"
        )
    owners = check_grain_map(model, grains, num_images)
    kept = check_prefix(model, prefix, num_images, owners)
    return generate_grains, filter_of_position, (jnp.asarray(owners, jnp.int32), kept)


def _position_filter(model: Any, temperature: Any, top_k: Any, top_p: Any) -> tuple[Any, Any, Any]:
    check_filter(temperature, top_k, top_p, "position_")
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for name, value in values.items():
        if np.ndim(value) > 0:
            raise ValueError(f"position_{name}: {value} has shape {np.shape(value)}; give one value")
    Vp = model.layout.position_size(model.num_grains - 1)
    return (
        None if temperature is None else jnp.asarray(temperature, jnp.float32),
        None if top_k is None else jnp.asarray(at_most(Vp, top_k), jnp.int32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
    )


def check_grain_map(model: Any, grains: Any, num_images: int) -> Any:
    """The grain of each region (n, R) that is asked for, -1 where none is; on the host, where it is known there.

    Read from a device it would wait for the batch that is being drawn.

    Raises:
      ValueError: grains of another shape or out of range.
    """
    layout = model.layout
    u, v = layout.region_grid
    if grains is None:
        return np.full((num_images, u * v), -1, np.int32)
    grains = _on_host(grains)
    check_grains("grains", grains, layout.num_grains, layout.region_grid, num_images)
    return grains.reshape(num_images, u * v)


def check_prefix(model: Any, prefix: Any, num_images: int, owners: Any) -> PackedCodes:
    """Tokens to keep, in arrays of all slots, start tokens without a class.

    Raises:
      ValueError: what is no beginning of packed codes, or not of the grains that are asked for.
    """
    layout, D, P = model.layout, model.code_shape[-1], model.layout.max_tokens
    if prefix is None:
        zeros = jnp.zeros((num_images, P), jnp.int32)
        return PackedCodes(jnp.zeros((num_images, P, D), jnp.int32), zeros, zeros, zeros[:, 0])
    if not isinstance(prefix, PackedCodes):
        raise ValueError(f"prefix: of {type(prefix).__name__} does not fit this model; give `grains.PackedCodes`")
    prefix = PackedCodes(*map(_on_host, prefix))
    checks.shape("prefix.content", prefix.content.shape, (num_images, "P", D))
    check_packed("prefix", prefix, layout)
    checks.shape("prefix.length", prefix.length.shape, (num_images,))
    if not any(isinstance(ids, jax.core.Tracer) for ids in (*prefix, owners)):
        checks.integers("prefix.length", prefix.length, 0)
        for image, length in enumerate(prefix.length):
            checks.in_range("prefix.length", length, 0, prefix.position.shape[1], f"tokens of image {image}")
            one = PackedCodes(*(ids[image] for ids in prefix))
            _check_beginning(f"prefix: token {{}} of image {image}", layout, one, np.asarray(owners[image]))

    def fit(ids: jax.Array) -> jax.Array:
        ids = jnp.asarray(ids, jnp.int32)[:, :P]
        return jnp.pad(ids, ((0, 0), (0, P - ids.shape[1]), *[(0, 0)] * (ids.ndim - 2)))

    sos = specials_of(layout)[0]
    grain = fit(prefix.grain)
    position = jnp.minimum(fit(prefix.position), sos[grain])
    return PackedCodes(fit(prefix.content), position, grain, jnp.asarray(prefix.length, jnp.int32))


def _check_beginning(what: str, layout: GrainLayout, tokens: PackedCodes, owners_R: np.ndarray) -> None:
    """The first `length` tokens of one image are those that the grains of its regions have."""
    content_PD, position_P, grain_P = (np.asarray(ids)[: tokens.length] for ids in tokens[:3])
    cells, last, K = cells_of(layout), layout.num_grains - 1, layout.codebook_size
    num_cells = np.array([layout.cells(g) for g in range(layout.num_grains)])
    is_cell_P = position_P < num_cells[grain_P]
    owners_R, covered = owners_R.copy(), np.zeros(layout.code_grid, bool)
    for t in np.flatnonzero(is_cell_P).tolist():
        g, cell = int(grain_P[t]), int(position_P[t])
        side, (row, column) = 1 << (last - g), divmod(cell, layout.grid(g)[1])
        under = covered[row * side : (row + 1) * side, column * side : (column + 1) * side]
        if under.any():
            raise ValueError(f"{what.format(t)} covers cell {cell} of grain {g} again; every cell is covered once")
        under[:] = True
        region = cells.region[g, cell]
        owners_R[region] = g if owners_R[region] == -1 else owners_R[region]
    expected = expected_tokens(layout, np.where(owners_R == -1, last, owners_R))
    for t, (position, grain) in enumerate(zip(position_P.tolist(), grain_P.tolist(), strict=True)):
        following = expected[t] if t < len(expected) else None
        if (min(position, layout.position_sos(grain)), grain) != following:
            follows = "nothing follows" if following is None else "position {} of grain {} follows".format(*following)
            raise ValueError(
                f"{what.format(t)} is position {position} of grain {grain}, where {follows}; "
                f"cells come in order '{layout.order}', grain by grain"
            )
        if not (content_PD[t] < K if is_cell_P[t] else content_PD[t] >= K).all():
            raise ValueError(
                f"{what.format(t)} has content {content_PD[t].tolist()} at position {position}; cells have codes, "
                f"0..{K - 1}, and special tokens none"
            )


def expected_tokens(layout: GrainLayout, owners_R: np.ndarray) -> list[tuple[int, int]]:
    """Positions and grains of all tokens of an image whose regions have these grains."""
    tokens = []
    for g in range(layout.num_grains):
        order = layout.cell_order(g)
        kept = order[owners_R[cells_of(layout).region[g, order]] == g].tolist()
        tokens += [(position, g) for position in (layout.position_sos(g), *kept, layout.position_eos(g))]
    return tokens


def _on_host(value: Any) -> Any:
    """Where its values can be checked; inside a compiled program it stays a tracer."""
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value)

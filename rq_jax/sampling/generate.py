"""Sampling codes from a transformer: what all kinds have in common, and the loop over code grids of an RQ-Transformer.

The model enters as an argument, and is used through its settings and its methods `for_inference`, `init_cache`,
`spatial`, `depth` and `classify`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.sampling.draws import draw, guide, size, stretches, uniforms_of_images, with_null, words
from rq_jax.sampling.edit import DRAWN, check_kept
from rq_jax.sampling.filter import at_most, check_filter, filter_logits
from rq_jax.sampling.grain_inputs import prepare
from rq_jax.settings import checks

_MAX_GUIDANCE = 1e30


def check_guidance(model: Any, guidance: float | jax.Array | None) -> None:
    """Check the scale of classifier-free guidance.

    Raises:
      ValueError: a scale that is not finite or beyond 1e30, or a model without a null condition.
    """
    if guidance is None:
        return
    # Any larger, logits that differ a little would all be infinite.
    if not isinstance(guidance, jax.core.Tracer) and not np.abs(guidance) <= _MAX_GUIDANCE:
        raise ValueError(
            f"guidance: {guidance} must be a finite number, at most {_MAX_GUIDANCE:g}, or None for no guidance"
        )
    if not model.use_null_cond:
        raise ValueError(f"guidance: {guidance} needs a model trained with use_null_cond; leave it out for this one")


def generate(
    model: Any,
    variables: Any,
    rng: jax.Array,
    num_images: int,
    cond: jax.typing.ArrayLike | None = None,
    *,
    image_ids: jax.typing.ArrayLike | None = None,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = None,
    guidance: float | None = None,
    prefix: Any = None,
    kept: jax.typing.ArrayLike | None = None,
    position_temperature: float | jax.Array | None = None,
    position_top_k: int | jax.Array | None = None,
    position_top_p: float | jax.Array | None = None,
    grains: jax.typing.ArrayLike | None = None,
    as_released: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    """Draw codes, as one compiled program a (model, batch shape, prefix length, settings that are not None).

    Every draw depends on (rng, image id) alone: in float32 the codes of an image are the same at any batch size,
    order and device count; in bfloat16 at equal batch shape.

    Args:
      model: an `RQTransformer`, which alone takes kept, or a `DQTransformer`, which alone takes position_*, grains and
        as_released.
      variables: its variables, with the tokenizer's codebook.
      rng: key; `rng_of_seed` makes one of any seed.
      num_images: n.
      cond: int (n, U), or (n, 1) / (n,) for classes; None when unconditional.
      image_ids: int (n,) in [0, 2^64), default arange(n).
      temperature, top_k, top_p: of codes, one value, or one per depth; see `filter_logits`.
      guidance: scale g of classifier-free guidance, for models with `use_null_cond`: the logits are u + g (c - u) of
        those with the condition (c) and with the null condition (u). None: off.
      prefix: kept as it is: codes (n, T0, D) of the first T0 positions in raster order; for a `DQTransformer`
        `PackedCodes`, of each image the first `length` tokens.
      kept: codes anywhere that are kept as they are, (n, h, w, D) with `edit.DRAWN` for those to be drawn: each is put
        in the place of the draw, so that what comes after sees it and what comes before does not. Other codes kept
        never recompile. Positions that all images keep from the first on take less time as a prefix.
      position_temperature, position_top_k, position_top_p: of positions, one value; temperature None: that of codes.
      grains: (n, u, v), the grain of every region: positions are known, and only codes are drawn.
      as_released: "fixed" or "free": as the original draws two grains, see `sampling.as_released`.
      sharding: of the images over devices, along the first axis, which n divides evenly; `variables` lie on the same
        devices. None: on the devices of `variables`, each of which draws every image.

    Returns:
      Codes (n, h, w, D), int32; of a `DQTransformer` `GrainedCodes`: every cell once, and the grains (n, u, v).

    Raises:
      ValueError: a value out of range or of the wrong shape, before anything compiles.
    """
    checks.at_least("num_images", num_images, 1)
    _check_codebook(variables)
    check_guidance(model, guidance)
    filters: Any = _code_filter(model, temperature, top_k, top_p)
    of_images: Any = _check_ids(image_ids, num_images), _check_cond(model, cond, num_images)
    of_position: Any = position_temperature, position_top_k, position_top_p
    program: Any = _generate
    if hasattr(model, "layout"):
        _refuse("kept", kept, "this model draws codes with grains, of which only the first can be kept")
        alone = {"guidance": guidance, "prefix": prefix, "grains": grains}
        program, of_position, inputs = prepare(model, num_images, of_position, as_released, **alone)
        filters = (filters[0][0] if of_position[0] is None else of_position[0], *of_position[1:]), filters
    else:
        _refuse_grains(*of_position, grains, as_released)
        inputs = _check_known(model, prefix, kept, num_images)
    of_images = *of_images, inputs
    image_ids_2n, cond, inputs = of_images if sharding is None else jax.device_put(of_images, sharding)
    guidance = None if guidance is None else jnp.float32(guidance)
    return program(model, variables, rng, image_ids_2n, cond, filters, guidance, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _generate(model, variables, rng, image_ids_2B, cond_BU, settings, guidance, prefix_BPD, kept_BhwD):
    (h, w, D), B = model.code_shape, prefix_BPD.shape[0]
    T, P = h * w, prefix_BPD.shape[1]
    if P == T:
        return prefix_BPD.reshape(B, h, w, D)
    variables = model.for_inference(variables)
    # Two for each code.
    uniforms_TD2B = uniforms_of_images(rng, image_ids_2B, (T, D, 2))
    kept_TDB = None if kept_BhwD is None else jnp.moveaxis(kept_BhwD.reshape(B, T, D), 0, -1)
    if guidance is not None:
        cond_BU = with_null(cond_BU, model.cond_vocab_size)

    def apply(method, *args):
        return model.apply(variables, *args, method=method)

    def for_all(codes):
        """The same codes for both rows of an image: they see what was drawn from the guided logits."""
        return codes if guidance is None else jnp.repeat(codes, 2, axis=0)

    def draw_position(context, cache, uniforms_D2B, kept_DB):
        """Codes (B, D) of one position: the depth stack, one code after the other."""
        codes_Bd = jnp.zeros((B, 0), jnp.int32)
        for d in range(D):
            hidden, cache = apply("depth", context, for_all(codes_Bd), cache)
            logits = guide(apply("classify", hidden, d), guidance)
            values: Any = [None if values_D is None else values_D[d] for values_D in settings]
            code_B = draw(uniforms_D2B[d], filter_logits(logits, *values))
            if kept_DB is not None:
                code_B = jnp.where(kept_DB[d] == DRAWN, code_B, kept_DB[d])
            codes_Bd = jnp.concatenate([codes_Bd, code_B[:, None]], axis=1)
        return codes_Bd, cache

    def step(carry, of_position):
        context, cache = carry
        codes_BD, cache = draw_position(context, cache, *of_position)
        context, _, cache = apply("spatial", for_all(codes_BD)[:, None], None, cache)
        return (context[:, 0], cache), codes_BD

    U, rows = model.cond_length, cond_BU.shape[0]
    cache = apply("init_cache", rows, None, U + P)
    context, _, cache = apply("spatial", for_all(prefix_BPD), cond_BU, cache)
    carry, drawn = (context[:, -1], cache), []
    # The last step also computes a context that nobody reads: leaving it out would take a second program, and compiling
    # that costs more.
    for start, end in stretches(P, T, size(cache.spatial) / (U + P) * (U + T) / size(variables["params"])):
        context, cache = carry
        # Shapes in a scan are static: the cache gets room for the condition and all positions of this stretch at once.
        carry = context, cache._replace(spatial=cache.spatial.resize(U + end))
        kept = None if kept_TDB is None else kept_TDB[start:end]
        carry, codes_TBD = jax.lax.scan(step, carry, (uniforms_TD2B[start:end], kept))
        drawn.append(codes_TBD)
    codes = jnp.concatenate([prefix_BPD, jnp.concatenate(drawn).swapaxes(0, 1)], axis=1)
    return codes.reshape(B, h, w, D)


def _check_ids(image_ids: Any, num_images: int) -> tuple[jax.Array, jax.Array]:
    ids: Any = np.arange(num_images) if image_ids is None else image_ids
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids, object)  # of Python's ints some fit no array but this
    checks.shape("image_ids", ids.shape, (num_images,))
    return words(ids)


def _refuse_grains(*values: Any) -> None:
    """What is of packed codes has no meaning for a grid of codes."""
    names = ("position_temperature", "position_top_k", "position_top_p", "grains", "as_released")
    for name, value in zip(names, values, strict=True):
        _refuse(name, value, "this model draws code grids, which have neither positions nor grains")


def _refuse(name: str, value: Any, why: str) -> None:
    if value is not None:
        raise ValueError(f"{name}: {why}; leave it out")


def _code_filter(model: Any, temperature: Any, top_k: Any, top_p: Any) -> tuple[jax.Array, Any, Any]:
    check_filter(temperature, top_k, top_p)
    D, K = model.code_shape[-1], max(model.codebook_sizes)
    return (
        _per_depth("temperature", temperature, D, jnp.float32),
        None if top_k is None else _per_depth("top_k", at_most(K, top_k), D, jnp.int32),
        None if top_p is None else _per_depth("top_p", top_p, D, jnp.float32),
    )


def _per_depth(name: str, value: Any, depth: int, dtype: Any) -> jax.Array:
    value = _array(value)
    if value.shape not in ((), (1,), (depth,)):
        shown = "" if isinstance(value, jax.Array) else f"{value.tolist()} "
        raise ValueError(f"{name}: {shown}has shape {value.shape}; give one value, or {depth}, one per depth")
    return jnp.broadcast_to(jnp.asarray(value, dtype), (depth,))


def _check_codebook(variables: Any) -> None:
    """Without its tokenizer a model has a codebook of NaN, whose logits count as -inf: it would draw code 0 only."""
    for table in jax.tree.leaves(variables.get("codebook", {})):
        # On the host, where the array is read once: a computation would wait for the batch that is being drawn.
        if not isinstance(table, jax.core.Tracer) and np.isnan(np.asarray(table)).all():
            raise ValueError(
                "variables: the codebook holds NaN; put the tokenizer's codebook into variables['codebook']"
            )


def _array(value: Any) -> Any:
    """On the host, where its values can be checked; inside a compiled program it stays a tracer."""
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _check_cond(model: Any, cond: Any, num_images: int) -> jax.Array:
    if cond is None:
        if model.is_conditional:
            raise ValueError(
                f"cond: this model needs a condition of shape ({num_images}, {model.cond_length}), none was given"
            )
        return jnp.zeros((num_images, 1), jnp.int32)
    if not model.is_conditional:
        raise ValueError("cond: this model is unconditional; leave the condition out")
    cond = _array(cond)
    checks.integer_type("cond", cond.dtype)
    cond = cond[:, None] if cond.ndim == 1 else cond
    checks.shape("cond", cond.shape, (num_images, model.cond_length))
    bad = [] if isinstance(cond, jax.Array) else cond[(cond < 0) | (cond >= model.cond_vocab_size)]
    if len(bad):
        what = "class" if model.cond_length == 1 else "condition token"
        raise ValueError(f"cond: {what} {bad[0]} is outside [0, {model.cond_vocab_size})")
    return jnp.asarray(cond, jnp.int32)


def _check_known(model: Any, prefix: Any, kept: Any, num_images: int) -> tuple[jax.Array, jax.Array | None]:
    """The first codes, and those that are kept anywhere."""
    if kept is None:
        return _check_prefix(model, prefix, num_images), None
    _refuse("prefix", prefix, "kept holds all codes that are known")
    kept = _array(kept)
    checked = check_kept(model, kept, num_images)
    if isinstance(kept, np.ndarray) and (kept != DRAWN).all():  # nothing is left to draw
        return checked.reshape(num_images, -1, model.code_shape[-1]), None
    return _check_prefix(model, None, num_images), checked


def _check_prefix(model: Any, prefix: Any, num_images: int) -> jax.Array:
    h, w, D = model.code_shape
    if prefix is None:
        return jnp.zeros((num_images, 0, D), jnp.int32)
    if isinstance(prefix, tuple):
        raise ValueError(f"prefix: {type(prefix).__name__} does not fit this model; give codes (n, T0, {D})")
    prefix = _array(prefix)
    checks.shape("prefix", prefix.shape, (num_images, range(h * w + 1), D))
    quantize.check_codes(prefix, model.codebook_sizes, "prefix")
    return jnp.asarray(prefix, jnp.int32)

"""Sampling code grids from an RQ-Transformer, as one compiled program for a batch.

The model enters as an argument, and is used through its settings and its methods `for_inference`, `init_cache`,
`spatial`, `depth` and `classify`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.quantize.search import pick
from rq_jax.sampling.filter import at_most, check_filter, filter_logits
from rq_jax.settings import checks

_PARTS = 128  # interleaved parts of the codes, see `_draw`: neighbours are in different ones, for vector registers
# The cache grows in at most this many stretches, of at least this many positions.
_MAX_STRETCHES, _MIN_STRETCH = 4, 16
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
    prefix: jax.typing.ArrayLike | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """Draw code grids, as one compiled program a (model, batch shape, prefix length, settings that are not None).

    Every draw depends on (rng, image id) alone: in float32 the codes of an image are the same at any batch size,
    order and device count; in bfloat16 at equal batch shape.

    Args:
      model: an `RQTransformer`.
      variables: its variables, with the tokenizer's codebook.
      rng: key; `rng_of_seed` makes one of any seed.
      num_images: n.
      cond: int (n, U), or (n, 1) / (n,) for classes; None when unconditional.
      image_ids: int (n,) in [0, 2^64), default arange(n).
      temperature, top_k, top_p: one value, or one per depth; see `filter_logits`.
      guidance: scale g of classifier-free guidance, for models with `use_null_cond`: the logits are u + g (c - u) of
        those with the condition (c) and with the null condition (u). None: off.
      prefix: codes (n, T0, D) of the first T0 positions in raster order, returned as they are.
      sharding: of the images over devices, along the first axis, which n divides evenly; `variables` lie on the same
        devices. None: on the devices of `variables`, each of which draws every image.

    Returns:
      Codes (n, h, w, D), int32.

    Raises:
      ValueError: a value out of range or of the wrong shape, before anything compiles.
    """
    D = model.code_shape[-1]
    checks.at_least("num_images", num_images, 1)
    _check_codebook(variables)
    check_filter(temperature, top_k, top_p)
    ids: Any = np.arange(num_images) if image_ids is None else image_ids
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids, object)  # of Python's ints some fit no array but this
    checks.shape("image_ids", ids.shape, (num_images,))
    cond = _check_cond(model, cond, num_images)
    prefix = _check_prefix(model, prefix, num_images)
    check_guidance(model, guidance)
    K = max(model.codebook_sizes)
    settings = (
        _per_depth("temperature", temperature, D, jnp.float32),
        None if top_k is None else _per_depth("top_k", at_most(K, top_k), D, jnp.int32),
        None if top_p is None else _per_depth("top_p", top_p, D, jnp.float32),
    )
    guidance = None if guidance is None else jnp.float32(guidance)
    words = _words(ids)
    if sharding is not None:
        words, cond, prefix = jax.device_put((words, cond, prefix), sharding)
    return _generate(model, variables, rng, words, cond, settings, guidance, prefix)


def rng_of_seed(seed: int) -> jax.Array:
    """The key of a seed of any size; `jax.random.key` gives seeds that differ by 2^32 one key.

    Args:
      seed: at least 0; below 2^31 the key is that of `jax.random.key`.

    Raises:
      ValueError: a seed below 0.
    """
    checks.at_least("seed", seed, 0)
    rng = jax.random.key(np.uint32(seed % 2**32))
    while seed := seed >> 32:
        rng = jax.random.fold_in(rng, np.uint32(seed % 2**32))
    return rng


@functools.partial(jax.jit, static_argnums=0)
def _generate(model, variables, rng, image_ids_2B, cond_BU, settings, guidance, prefix_BPD):
    (h, w, D), B = model.code_shape, prefix_BPD.shape[0]
    T, P = h * w, prefix_BPD.shape[1]
    if P == T:
        return prefix_BPD.reshape(B, h, w, D)
    variables = model.for_inference(variables)
    # A key per image id: what an image draws does not depend on its batch, its place there, or its device.
    keys_B = jax.vmap(functools.partial(_rng_of_image, rng))(*image_ids_2B)
    # All random numbers at once, two for each code: a generator inside the loop would cost more than the classifier.
    uniforms_TD2B = jnp.moveaxis(jax.vmap(lambda key: jax.random.uniform(key, (T, D, 2), jnp.float32))(keys_B), 0, -1)
    if guidance is not None:  # rows 2i and 2i + 1 belong to image i, and so to one device: with its condition, without
        null_BU = jnp.full_like(cond_BU, model.cond_vocab_size)
        cond_BU = jnp.stack([cond_BU, null_BU], axis=1).reshape(2 * B, -1)

    def apply(method, *args):
        return model.apply(variables, *args, method=method)

    def for_all(codes):
        """The same codes for both rows of an image: they see what was drawn from the guided logits."""
        return codes if guidance is None else jnp.repeat(codes, 2, axis=0)

    def draw_position(context, cache, uniforms_D2B):
        """Codes (B, D) of one position: the depth stack, one code after the other."""
        codes_Bd = jnp.zeros((B, 0), jnp.int32)
        for d in range(D):
            hidden, cache = apply("depth", context, for_all(codes_Bd), cache)
            logits = apply("classify", hidden, d)
            if guidance is not None:
                with_cond, without = jnp.moveaxis(logits.reshape(B, 2, -1), 1, 0)
                logits = without + guidance * (with_cond - without)
            values: Any = [None if values_D is None else values_D[d] for values_D in settings]
            code_B = _draw(uniforms_D2B[d], filter_logits(logits, *values))
            codes_Bd = jnp.concatenate([codes_Bd, code_B[:, None]], axis=1)
        return codes_Bd, cache

    def step(carry, uniforms_D2B):
        context, cache = carry
        codes_BD, cache = draw_position(context, cache, uniforms_D2B)
        context, _, cache = apply("spatial", for_all(codes_BD)[:, None], None, cache)
        return (context[:, 0], cache), codes_BD

    U, rows = model.cond_length, cond_BU.shape[0]
    cache = apply("init_cache", rows, None, U + P)
    context, _, cache = apply("spatial", for_all(prefix_BPD), cond_BU, cache)
    carry, drawn = (context[:, -1], cache), []
    # The last step also computes a context that nobody reads: leaving it out would take a second program, and compiling
    # that costs more.
    for start, end in _stretches(P, T, _size(cache.spatial) / (U + P) * (U + T) / _size(variables["params"])):
        context, cache = carry
        # Shapes in a scan are static: the cache gets room for the condition and all positions of this stretch at once.
        carry = context, cache._replace(spatial=cache.spatial.resize(U + end))
        carry, codes_TBD = jax.lax.scan(step, carry, uniforms_TD2B[start:end])
        drawn.append(codes_TBD)
    codes = jnp.concatenate([prefix_BPD, jnp.concatenate(drawn).swapaxes(0, 1)], axis=1)
    return codes.reshape(B, h, w, D)


def _stretches(start: int, end: int, cache_share: float) -> list[tuple[int, int]]:
    """Cut the positions [start, end) into stretches, each with a cache of one static length.

    Attention reads the whole cache of a stretch, filled or not: shorter stretches read less. Each stretch compiles a
    program of its own, so that their number grows with the share of the cache in what a step reads.

    Args:
      start, end: positions.
      cache_share: size of the cache at its full length, relative to the weights.

    Returns:
      (start, end) of each stretch.
    """
    stride = max(_MIN_STRETCH, -(-end // min(_MAX_STRETCHES, 1 + int(4 * cache_share))))
    bounds = [start, *(bound for bound in range(stride, end, stride) if bound > start), end]
    return list(zip(bounds, bounds[1:], strict=False))


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _draw(uniforms_2B: jax.Array, probabilities_BK: jax.Array) -> jax.Array:
    """One code an image, from probabilities that sum to 1.

    In two steps, a part of the codes and a code in it, each by inverting a cumulative sum: sums of K / 128 and of 128
    numbers instead of K, and two uniform numbers a code where Gumbel noise takes K. Codes of probability 0 are never
    drawn.
    """
    # Code k is in part k % 128.
    padding = -probabilities_BK.shape[-1] % _PARTS
    parts_BRP = jnp.pad(probabilities_BK, ((0, 0), (0, padding))).reshape(len(probabilities_BK), -1, _PARTS)
    part_B = pick(uniforms_2B[0], jnp.sum(parts_BRP, axis=1), axis=1)
    inside_BR = jnp.take_along_axis(parts_BRP, part_B[:, None, None], axis=2)[..., 0]
    return pick(uniforms_2B[1], inside_BR, axis=1) * _PARTS + part_B


def _rng_of_image(rng: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The key of an image, from the two halves of its id. JAX folds in 32 bits at a time."""
    rng = jax.random.fold_in(rng, low)
    # A choice of the bits: one between keys looks like a key used twice to `jax_debug_key_reuse`.
    folded, plain = jax.random.key_data(jax.random.fold_in(rng, high)), jax.random.key_data(rng)
    return jax.random.wrap_key_data(jnp.where(high > 0, folded, plain), impl=jax.random.key_impl(rng))


def _words(ids: Any) -> tuple[jax.Array, jax.Array]:
    """Lower and upper 32 bits of ids, uint32 both.

    Raises:
      ValueError: ids that are not whole numbers in [0, 2^64), as far as the host can see.
    """
    if not isinstance(ids, jax.Array):
        numbers = ids.tolist()
        if not all(isinstance(number, int) and 0 <= number < 2**64 for number in numbers):
            raise ValueError(f"image_ids: {numbers} must be whole numbers from 0 to 2^64 - 1")
        ids = np.array(numbers, np.uint64)
    elif ids.dtype.kind not in "iu":
        raise ValueError(f"image_ids: of {ids.dtype} must be whole numbers from 0 to 2^64 - 1")
    if ids.dtype.itemsize == 8:
        high = ids >> 32
    else:
        high = jnp.where(ids < 0, -1, 0)  # a negative id on a device: an image of its own, too
    return jnp.asarray(ids.astype(np.uint32)), jnp.asarray(high.astype(np.uint32))


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
    cond = cond[:, None] if cond.ndim == 1 else cond
    checks.shape("cond", cond.shape, (num_images, model.cond_length))
    bad = [] if isinstance(cond, jax.Array) else cond[(cond < 0) | (cond >= model.cond_vocab_size)]
    if len(bad):
        what = "class" if model.cond_length == 1 else "condition token"
        raise ValueError(f"cond: {what} {bad[0]} is outside [0, {model.cond_vocab_size})")
    return jnp.asarray(cond, jnp.int32)


def _check_prefix(model: Any, prefix: Any, num_images: int) -> jax.Array:
    h, w, D = model.code_shape
    if prefix is None:
        return jnp.zeros((num_images, 0, D), jnp.int32)
    prefix = _array(prefix)
    checks.shape("prefix", prefix.shape, (num_images, range(h * w + 1), D))
    quantize.check_codes(prefix, model.codebook_sizes, "prefix")
    return jnp.asarray(prefix, jnp.int32)

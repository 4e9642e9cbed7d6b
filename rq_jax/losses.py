"""Losses: arrays in, scalars out. All are float32 whatever the dtype of the networks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from rq_jax.settings import checks

RECONSTRUCTION_LOSSES = ("mse", "l1")
DISCRIMINATOR_LOSSES = ("hinge", "vanilla")
GENERATOR_LOSSES = ("vanilla",)
CHUNK_ELEMENTS = 2**24  # of logits at a time on each device: 64 MB, and twice that for soft labels and gradients


def reconstruction_loss(images: jax.Array, reconstruction: jax.Array, kind: str = "mse") -> jax.Array:
    """Mean over all elements of the squared ("mse") or absolute ("l1") difference.

    Raises:
      ValueError: another kind.
    """
    checks.one_of("loss.reconstruction", kind, RECONSTRUCTION_LOSSES)
    difference = images.astype(jnp.float32) - reconstruction.astype(jnp.float32)
    return jnp.mean(difference**2 if kind == "mse" else jnp.abs(difference))


def commitment_loss(latents: jax.Array, partial_sums: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean over depths of the mean squared distance of the latents to each partial sum (paper, equation 7).

    As kakaobrain/rq-vae-transformer:RQBottleneck.compute_commitment_loss the mean runs over channels and depths, where
    the paper writes sums.

    Args:
      latents: vectors (..., E), or (B, H, W, C) on a latent grid finer than the code grid.
      partial_sums: (..., D, E), or (B, h, w, D, E) on the code grid; no gradient passes to them.
      weights: of each cell (...), or (B, h, w); None is 1. The mean still runs over all elements alike, as
        CrossmodalGroup/DynamicVectorQuantization:VectorQuantize2: with `grains.cell_weights` every code counts once.

    Raises:
      ValueError: latents that neither are the vectors of the partial sums nor fold into them, or weights of another
        shape than the cells.
    """
    latents = latents.astype(jnp.float32)
    if latents.ndim == 4 and latents.shape[:-1] != partial_sums.shape[:-2]:
        latents = _fold(latents, partial_sums.shape)
    checks.shape("latents", latents.shape, (*partial_sums.shape[:-2], partial_sums.shape[-1]))
    squares = (latents[..., None, :] - jax.lax.stop_gradient(partial_sums)) ** 2
    if weights is not None:
        checks.shape("weights", weights.shape, partial_sums.shape[:-2])
        squares = weights.astype(jnp.float32)[..., None, None] * squares
    return jnp.mean(squares)


def _fold(latents: jax.Array, sums_shape: Sequence[int]) -> jax.Array:
    """Latents (B, H, W, C) as vectors (B, h, w, E) of the code grid, where it divides theirs."""
    grid = sums_shape[1:3]
    if len(sums_shape) != 5 or any(size % parts for size, parts in zip(latents.shape[1:3], grid, strict=True)):
        return latents
    return rearrange(latents, "b (h r) (w s) c -> b h w (r s c)", h=grid[0], w=grid[1])


def budget_loss(gates: jax.Array, targets: Sequence[float], weights: Sequence[float]) -> jax.Array:
    """Squared distance of the shares of the grains from those asked for (DQ-VAE, section 3.2).

    The original writes it by numbers of codes, normalised to [0, 1], which are these shares. Its settings are target .5
    and weight 20 for two grains, and targets (.3, .3) and weights (1, 1) for three.

    Args:
      gates: one-hot (B, u, v, G) with the gradient of the router; shares are means over all regions of the batch.
      targets: shares of the grains 1 .. G-1.
      weights: of the same grains.

    Returns:
      The sum over these grains of weight * (share - target)^2.

    Raises:
      ValueError: targets or weights that are not G - 1.
    """
    G = gates.shape[-1]
    for name, values in (("targets", targets), ("weights", weights)):
        checks.shape(name, (len(values),), (G - 1,))
    shares = jnp.mean(gates.astype(jnp.float32).reshape(-1, G), axis=0)[1:]
    return jnp.sum(jnp.asarray(weights, jnp.float32) * (shares - jnp.asarray(targets, jnp.float32)) ** 2)


def cross_entropy(logits: jax.Array, codes: jax.Array) -> jax.Array:
    """Cross-entropy (...) in nats of codes (...) under logits (..., K)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def soft_cross_entropy(logits: jax.Array, soft_codes: jax.Array) -> jax.Array:
    """Cross-entropy (...) in nats of soft codes (..., K) under logits (..., K) (paper, section 3.3).

    As kakaobrain/rq-vae-transformer:soft_target_cross_entropy, 1e-7 is added inside the logarithm. Codes beyond a
    depth's codebook have logit -inf and soft code 0, and count nothing.
    """
    logits = logits.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_normaliser = jnp.log(jnp.exp(shifted).sum(-1, keepdims=True) + 1e-7)
    inside = shifted != -jnp.inf  # NaN is inside: it must reach the loss
    log_probabilities = jnp.where(inside, jnp.where(inside, shifted, 0.0) - log_normaliser, 0.0)
    return -jnp.sum(soft_codes * log_probabilities, axis=-1)


class StreamNats(NamedTuple):
    """Sums in nats, and how many tokens they are sums over: of positions (B, G), of contents (B, D)."""

    position: jax.Array
    position_counts: jax.Array
    content: jax.Array
    content_counts: jax.Array


def stream_nats(position_logits: jax.Array, content_logits: jax.Array, tokens: Any, layout: Any) -> StreamNats:
    """Cross-entropies of packed codes, added up by stream: positions of each grain, contents of each depth.

    The objective of the DQ-Transformer is the mean over contents plus the plain average over grains of the means over
    positions (section 3.3 of its paper).

    Args:
      position_logits: (B, P-1, Vp); slot t predicts token t + 1.
      content_logits: (B, P-1, D, Vc).
      tokens: `grains.PackedCodes` of P tokens, as the model read them: start tokens with their class.
      layout: `grains.GrainLayout`, that of the model.

    Returns:
      `StreamNats`. Pads count nothing, told by their ids. Grain 0 counts cells and eos, every other grain its sos too,
      which is predicted like a cell; contents count codes, eos, and sos but the first.

    Raises:
      ValueError: logits that are not of these tokens.
    """
    targets = _targets(tokens)
    checks.shape(
        "position_logits", position_logits.shape, (*targets[1].shape, layout.position_size(layout.num_grains - 1))
    )
    checks.shape("content_logits", content_logits.shape, (*targets[0].shape, layout.content_size))
    return _stream_sums(position_logits, content_logits, targets, layout)


def stream_nats_of_hidden(
    classify_position: Callable[[jax.Array], jax.Array],
    classify_content: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    deep_hidden: jax.Array,
    tokens: Any,
    layout: Any,
    num_devices: int = 1,
) -> StreamNats:
    """`stream_nats` of hidden states, whose logits are rebuilt chunk by chunk, in the backward pass too.

    Args:
      classify_position: hidden states (B, t, M) to logits (B, t, Vp).
      classify_content: hidden states (B, t, D, M) to logits (B, t, D, Vc).
      hidden: of the position stack (B, P-1, M); deep_hidden: of the depth stack (B, P-1, D, M).
      tokens, layout: see `stream_nats`.
      num_devices: that share the batch, and so a chunk.
    """
    content, position, grain = _targets(tokens)
    last = layout.num_grains - 1
    B, slots, D = content.shape
    elements = B * slots * (layout.position_size(last) + D * layout.content_size)
    num_chunks = min(slots, -(-elements // (CHUNK_ELEMENTS * num_devices)))

    def fill(array: jax.Array, value: int) -> jax.Array:
        """As many slots as the chunks divide; pads count nothing."""
        padding = [(0, 0), (0, -slots % num_chunks), *[(0, 0)] * (array.ndim - 2)]
        return jnp.pad(array, padding, constant_values=value)

    targets = fill(content, layout.content_pad), fill(position, layout.position_pad(last)), fill(grain, last)

    def chunk_sums(chunk: Any) -> StreamNats:
        hidden, deep_hidden, targets = chunk
        return _stream_sums(classify_position(hidden), classify_content(deep_hidden), targets, layout)

    return sum_over_chunks(chunk_sums, (fill(hidden, 0), fill(deep_hidden, 0), targets), num_chunks)


Targets = tuple[jax.Array, jax.Array, jax.Array]


def _targets(tokens: Any) -> Targets:
    """Content, position and grain of every token but the first."""
    return tokens.content[:, 1:], tokens.position[:, 1:], tokens.grain[:, 1:]


def stream_counts(tokens: Any, layout: Any) -> tuple[jax.Array, jax.Array]:
    """What the sums of `stream_nats` are sums over, of the same tokens, with or without classes.

    Returns:
      Numbers of positions (B, G) and of contents (B, D), float32.
    """
    of_position, of_content = (jnp.sum(x, axis=1, dtype=jnp.float32) for x in _counted(_targets(tokens), layout))
    return of_position, of_content


def _counted(targets: Targets, layout: Any) -> tuple[jax.Array, jax.Array]:
    """Which targets count: as positions of each grain (B, t, G), as contents of each depth (B, t, D)."""
    (content, position, grain), G = targets, layout.num_grains
    pads_G = jnp.array([layout.position_pad(g) for g in range(G)], position.dtype)
    is_first = (grain == 0) & (position >= layout.position_sos(0))
    counted = (position != pads_G[grain]) & ~is_first
    counted_G = counted[..., None] & jax.nn.one_hot(grain, G, dtype=bool)
    return counted_G, (content != layout.content_pad) & ~is_first[..., None]


def _stream_sums(position_logits: jax.Array, content_logits: jax.Array, targets: Targets, layout: Any) -> StreamNats:
    content, position, _ = targets
    counted_G, counted_D = _counted(targets, layout)

    def total(nats: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.where(counted, nats, 0.0), axis=1), jnp.sum(counted, axis=1, dtype=jnp.float32)

    of_position = total(cross_entropy(position_logits, position)[..., None], counted_G)
    return StreamNats(*of_position, *total(cross_entropy(content_logits, content), counted_D))


def discriminator_loss_real(logits: jax.Array, kind: str = "hinge") -> jax.Array:
    """Half of the discriminator's loss that real images add: the mean of relu(1 - logit) or softplus(-logit) over 2.

    Args:
      logits: of any shape, high where an image looks real.
      kind: "hinge", or "vanilla", the cross-entropy.

    Raises:
      ValueError: another kind.
    """
    return discriminator_loss_fake(-logits, kind)


def discriminator_loss_fake(logits: jax.Array, kind: str = "hinge") -> jax.Array:
    """Half of the discriminator's loss that reconstructions add: the mean of relu(1 + logit) or softplus(logit) over 2.

    Arguments as `discriminator_loss_real`.
    """
    check_adversarial_losses(kind)
    logits = logits.astype(jnp.float32)
    return 0.5 * jnp.mean(jax.nn.relu(1 + logits) if kind == "hinge" else jax.nn.softplus(logits))


def generator_loss(logits: jax.Array, kind: str = "vanilla") -> jax.Array:
    """Loss of the autoencoder against the discriminator: "vanilla" is minus the mean logit of its reconstructions.

    As kakaobrain/rq-vae-transformer:vanilla_g_loss, the only kind there.

    Raises:
      ValueError: another kind.
    """
    check_adversarial_losses(generator_loss=kind)
    return -jnp.mean(logits.astype(jnp.float32))


def check_adversarial_losses(discriminator_loss: str = "hinge", generator_loss: str = "vanilla") -> None:
    """Check the kinds of both adversarial losses.

    Raises:
      ValueError: an unknown kind.
    """
    checks.one_of("loss.discriminator_loss", discriminator_loss, DISCRIMINATOR_LOSSES)
    checks.one_of("loss.generator_loss", generator_loss, GENERATOR_LOSSES)


def adaptive_weight(reconstruction_grad: jax.Array, generator_grad: jax.Array, limit: float = 1e4) -> jax.Array:
    """Weight that gives the generator's loss a gradient as long as that of the image losses (VQGAN, equation 7).

    Args:
      reconstruction_grad: of the losses that compare images, with respect to the decoder's last kernel.
      generator_grad: of the generator's loss, with respect to the same.
      limit: largest weight.

    Returns:
      clip(|reconstruction_grad| / (|generator_grad| + 1e-4), 0, limit), float32; no gradient passes through it.
    """
    a, b = (jnp.linalg.norm(grad.astype(jnp.float32).ravel()) for grad in (reconstruction_grad, generator_grad))
    return jax.lax.stop_gradient(jnp.clip(a / (b + 1e-4), 0.0, limit))


def cross_entropy_by_depth(
    classify: Callable[[jax.Array], jax.Array],
    num_codes: int,
    hidden: jax.Array,
    codes: jax.Array,
    residuals: jax.Array | None = None,
    soft_labels: Callable[[jax.Array], jax.Array] | None = None,
    num_devices: int = 1,
) -> jax.Array:
    """Cross-entropy in nats of each image at each depth (B, D), mean over positions.

    Logits and soft labels over all K codes are rebuilt chunk by chunk, in the backward pass too.

    Args:
      classify: features (B, t, D, M) to logits (B, t, D, K).
      num_codes: K, the largest where depths differ.
      hidden: features (B, h, w, D, M).
      codes: the targets (B, h, w, D).
      residuals: (B, h, w, D, E), where the targets are soft.
      soft_labels: residuals (B, t, D, E) to soft targets (B, t, D, K).
      num_devices: that share the batch, and so a chunk.
    """
    B, h, w, D = codes.shape
    arrays = (hidden, codes) if residuals is None else (hidden, residuals)
    arrays = jax.tree.map(lambda x: x.reshape(B, h * w, *x.shape[3:]), arrays)

    def chunk_sums(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = classify(chunk[0])
        if residuals is None:
            return cross_entropy(logits, chunk[1]).sum(1)
        return soft_cross_entropy(logits, soft_labels(chunk[1])).sum(1)

    limit = CHUNK_ELEMENTS * num_devices
    return sum_over_chunks(chunk_sums, arrays, num_loss_chunks(B, h * w, D, num_codes, limit)) / (h * w)


def sum_over_chunks(function: Callable[..., Any], arrays: Any, num_chunks: int) -> Any:
    """Sum of `function` over slices of axis 1, recomputing each slice in the backward pass.

    A loss whose intermediate arrays are much larger than its inputs (logits over K codes) so never holds more than one
    slice of them. Axis 1 (positions) is sliced and not axis 0 (the batch), which may be sharded over devices.

    Args:
      function: maps a pytree of slices (B, T / num_chunks, ...) to a pytree of sums.
      arrays: a pytree of arrays (B, T, ...).
      num_chunks: a divisor of T.

    Raises:
      ValueError: num_chunks does not divide T.
    """
    positions = jax.tree.leaves(arrays)[0].shape[1]
    if num_chunks < 1 or positions % num_chunks:
        raise ValueError(
            f"num_chunks: {num_chunks} does not divide the {positions} positions; choose a divisor of them"
        )
    if num_chunks == 1:
        return function(arrays)

    def split(array: jax.Array) -> jax.Array:
        B, T = array.shape[:2]
        return array.reshape(B, num_chunks, T // num_chunks, *array.shape[2:]).swapaxes(0, 1)

    def step(total: Any, chunk: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(function)(chunk)), None

    chunks = jax.tree.map(split, arrays)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, zeros, chunks)[0]


def num_loss_chunks(batch: int, positions: int, depth: int, codes: int, limit: int = 2**26) -> int:
    """Fewest equal slices of `positions` whose (batch, slice, depth, codes) array has at most `limit` elements.

    The default is 256 MB of float32 over the global batch; one position is the smallest slice.
    """
    fitting = [
        n for n in range(1, positions + 1) if positions % n == 0 and batch * (positions // n) * depth * codes <= limit
    ]
    return min(fitting, default=positions)

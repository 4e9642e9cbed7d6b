"""Patch discriminator of stage 1 (Isola et al., CVPR 2017, section 3.2.2; here after Esser et al., CVPR 2021)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax.settings import checks

# Weight of a batch's statistics in the running ones.
MOMENTUM = 0.1


def _channels(values_C: jax.Array) -> jax.Array:
    """One value a channel, as it meets arrays (B, H, W, C)."""
    return values_C[None, None, None]


class BatchNorm(nn.Module):
    """Normalisation of each channel over batch and space, with epsilon 1e-5; statistics are float32.

    Under `jit` the batch is the global one. The running variance averages the unbiased estimate, as torch does and
    `flax.linen.BatchNorm` does not.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape, dtype, axes = x.shape[-1:], x.dtype, (0, 1, 2)
        scale = self.param("scale", lambda rng: 1 + 0.02 * jax.random.normal(rng, shape, jnp.float32))
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        x, mean, var = x.astype(jnp.float32), running_mean.value, running_var.value
        if train:
            # Normalised by the biased variance, remembered as the unbiased one: both as torch.
            mean = x.mean(axes)
            var = jnp.mean((x - _channels(mean)) ** 2, axes)
            count = x.size // x.shape[-1]
            if not self.is_initializing():
                running_mean.value += MOMENTUM * (mean - running_mean.value)
                running_var.value += MOMENTUM * (var * count / (count - 1) - running_var.value)
        rsqrt = jax.lax.rsqrt(var + 1e-5)
        return ((x - _channels(mean)) * _channels(rsqrt) * _channels(scale) + _channels(bias)).astype(dtype)


class ActNorm(nn.Module):
    """scale * (x + shift) for each channel, set from the first batch (Kingma and Dhariwal, NeurIPS 2018, section 3.1).

    As kakaobrain/rq-vae-transformer:ActNorm, the standard deviation is the unbiased one, and 1e-6 is added to it.
    """

    @nn.compact
    def __call__(self, x: jax.Array, initialize: bool) -> jax.Array:
        shape, dtype, axes = x.shape[-1:], x.dtype, (0, 1, 2)
        shift = self.param("shift", nn.initializers.zeros, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        initialized = self.variable("batch_stats", "initialized", jnp.zeros, (), jnp.int32)
        x = x.astype(jnp.float32)
        if initialize:
            new, mean, std = initialized.value == 0, x.mean(axes), x.std(axes, ddof=1)
            shift, scale = jnp.where(new, -mean, shift), jnp.where(new, 1 / (std + 1e-6), scale)
            self.put_variable("params", "shift", shift)
            self.put_variable("params", "scale", scale)
            initialized.value = jnp.ones_like(initialized.value)
        return (_channels(scale) * (x + _channels(shift))).astype(dtype)


class Discriminator(nn.Module):
    """PatchGAN: a logit for each patch of an image, high where it looks real.

    4x4 convolutions with zero padding of 1, each but the last followed by LeakyReLU 0.2: num_layers of stride 2, then
    two of stride 1; all but the first and the last are normalised. Two layers see patches of 34x34 pixels.

    The config section is `discriminator`.

    Attributes:
      in_channels: C.
      width: channels of the first layer; they double with every layer up to eight times as many.
      num_layers: convolutions of stride 2.
      use_actnorm: ActNorm, with a bias before it, in place of BatchNorm; see `initialize_actnorm`.
      dtype: of the convolutions, "float32" or "bfloat16"; norms and logits are float32 always.
    """

    in_channels: int = 3
    width: int = 64
    num_layers: int = 2
    use_actnorm: bool = False
    dtype: str = "float32"

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (B, h, w, 1), float32, of images (B, H, W, C) in [-1, 1]; h = floor(H / 2^num_layers) - 2.

        Args:
          images: real or reconstructed.
          train: normalise by the statistics of this batch and update the running ones (`mutable=["batch_stats"]`).
            ActNorm is the same in both modes.

        Raises:
          ValueError: images with other channels, or too small.
        """
        return self._score(images, train, initialize=False)

    def initialize(self, images: jax.Array) -> jax.Array:
        """As `__call__`; on the way every ActNorm that is not yet initialised takes its values from these images."""
        return self._score(images, train=True, initialize=True)

    @nn.compact
    def _score(self, images: jax.Array, train: bool, initialize: bool) -> jax.Array:
        self._check_images(images)

        def conv(x, features, stride, name, use_bias=True):
            bound = x.shape[-1] ** -0.5 / 4  # as torch's default: 1 / sqrt(fan in)
            return nn.Conv(
                features,
                (4, 4),
                stride,
                padding=1,
                use_bias=use_bias,
                kernel_init=nn.initializers.normal(0.02),
                bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
                dtype=jnp.dtype(self.dtype),
                name=name,
            )(x)

        x = nn.leaky_relu(conv(images, self.width, 2, "conv0"), 0.2)
        for n in range(1, self.num_layers + 1):
            stride = 2 if n < self.num_layers else 1
            x = conv(x, self.width * min(2**n, 8), stride, f"conv{n}", self.use_actnorm)
            if self.use_actnorm:
                x = ActNorm(name=f"norm{n}")(x, initialize)
            else:
                x = BatchNorm(name=f"norm{n}")(x, train)
            x = nn.leaky_relu(x, 0.2)
        return conv(x, 1, 1, f"conv{self.num_layers + 1}").astype(jnp.float32)

    @property
    def _smallest_side(self) -> int:
        return 3 * 2**self.num_layers

    def _check_images(self, images: jax.Array) -> None:
        checks.shape("images", images.shape, ("B", "H", "W", self.in_channels))
        H, W = images.shape[1:3]
        if min(H, W) < self._smallest_side:
            raise ValueError(
                f"discriminator.num_layers: {self.num_layers} leaves no patch of images of {H}x{W}; "
                f"set fewer, or give images of at least {self._smallest_side}x{self._smallest_side}"
            )

    def example_inputs(self, batch: int = 1) -> tuple[jax.Array, ...]:
        """Arguments of `init`: zeros of a shape that every layer can take."""
        side = self._smallest_side
        return (jnp.zeros((batch, side, side, self.in_channels), jnp.float32),)

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: a setting out of range.
        """
        checks.one_of("discriminator.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("in_channels", "width", "num_layers"):
            checks.at_least(f"discriminator.{name}", getattr(self, name), 1)


def initialize_actnorm(model: Discriminator, variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
    """Initialise the ActNorm layers one after the other, so that each normalises its activations of `images`.

    Layers that are initialised stay as they are, and once all are no forward pass runs: the call may stand in every
    training step. Without ActNorm the variables come back unchanged. No gradient passes through the new values.

    Args:
      model: the discriminator.
      variables: its "params" and "batch_stats".
      images: (B, H, W, C), the batch of the first training pass.

    Returns:
      The variables, of the same structure.
    """
    if not model.use_actnorm:
        return variables
    images = jax.lax.stop_gradient(images)

    def initialize(variables: dict[str, Any]) -> dict[str, Any]:
        _, updated = model.apply(variables, images, method="initialize", mutable=["params", "batch_stats"])
        return jax.lax.stop_gradient(updated)

    flags = [norm["initialized"] for norm in variables["batch_stats"].values()]
    return jax.lax.cond(jnp.stack(flags).all(), lambda variables: variables, initialize, variables)


def update_statistics_again(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Running statistics after a second pass over the batch that took them from `before` to `after`.

    Batch statistics do not depend on the running ones, so that arithmetic stands in for the pass: with momentum m and
    batch statistic b, after = before + m (b - before), and a second step adds (1 - m) (after - before).

    Args:
      before, after: trees of running statistics, such as the collection "batch_stats" before and after a pass.

    Returns:
      A tree of the same structure; flags stay as they are in `after`.
    """

    def again(old: jax.Array, new: jax.Array) -> jax.Array:
        return new + (1 - MOMENTUM) * (new - old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(again, before, after)

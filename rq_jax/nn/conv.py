"""Convolutional blocks of the RQ-VAE (those of VQGAN, Esser et al., CVPR 2021). Layout NHWC."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# As torch's default for convolutions (Kaiming uniform with a = sqrt 5): U(-b, b) with b = 1 / sqrt(fan in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """Convolution with bias and torch's default initialisation; odd kernels keep the size at stride 1."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = 1 / math.sqrt(self.kernel_size**2 * x.shape[-1])
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        conv = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            self.stride,
            padding,
            kernel_init=_kernel_init,
            bias_init=lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound),
            dtype=self.dtype,
        )
        nn.share_scope(self, conv)
        return conv(x)


class Norm(nn.Module):
    """GroupNorm with epsilon 1e-6; the number of groups is the largest common divisor of `groups` and the width."""

    groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        groups = math.gcd(self.groups, x.shape[-1])
        norm = nn.GroupNorm(groups, epsilon=1e-6, dtype=self.dtype, use_fast_variance=False)
        nn.share_scope(self, norm)
        with jax.numpy_dtype_promotion("standard"):  # inside, Flax mixes bfloat16 with float32
            return norm(x)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; the skip is a 1x1 convolution where the width changes."""

    features: int
    dropout: float = 0.0
    norm_groups: int = 32
    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(Norm(self.norm_groups, self.dtype, name="norm1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y)
        y = nn.silu(Norm(self.norm_groups, self.dtype, name="norm2")(y))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = Conv(self.features, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of the grid, with a residual connection."""

    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        normed = Norm(self.norm_groups, self.dtype, name="norm")(x)
        query, key, value = (
            Conv(C, 1, dtype=self.dtype, name=name)(normed).reshape(B, H * W, C) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores * C**-0.5, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(B, H, W, C)
        return x + Conv(C, 1, dtype=self.dtype, name="out")(attended)


class Downsample(nn.Module):
    """Halve the grid: zero padding at the right and the bottom only, then a 3x3 stride-2 convolution; or 2x2 means."""

    use_conv: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.use_conv:
            return nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4
        return Conv(x.shape[-1], stride=2, padding=((0, 1), (0, 1)), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Double the grid by repetition, then a 3x3 convolution."""

    use_conv: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x) if self.use_conv else x

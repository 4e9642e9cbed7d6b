"""Convolutional encoder and decoder of the tokenizers (those of VQGAN, Esser et al., CVPR 2021)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax.nn.conv import AttentionBlock, Conv, Downsample, Norm, ResBlock, Upsample

POSITION_BIASES = ("fourier+learned", "fourier", "none")


class _Coder(nn.Module):
    """Settings, blocks and middle that the encoders and the decoder share."""

    width: int
    width_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    out_channels: int
    use_resample_conv: bool = True
    dropout: float = 0.0
    norm_groups: int = 32
    use_remat: bool = False
    dtype: jnp.dtype = jnp.float32

    def _res_block(self, features: int, train: bool, name: str) -> nn.Module:
        block = nn.remat(ResBlock) if self.use_remat and train else ResBlock
        return block(features, self.dropout, self.norm_groups, train, self.dtype, name=name)

    def _level(self, x, level: int, num_blocks: int, train: bool):
        features = self.width * self.width_multipliers[level]
        for i in range(num_blocks):
            x = self._res_block(features, train, f"level{level}_block{i}")(x)
            if level in self.attention_levels:
                x = AttentionBlock(self.norm_groups, self.dtype, name=f"level{level}_attention{i}")(x)
        return x

    def _down(self, x, train: bool) -> list[jax.Array]:
        """Features of every level, from the finest to the coarsest, each before its downsampling."""
        x = Conv(self.width, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        features = []
        for level in range(len(self.width_multipliers)):
            x = self._level(x, level, self.num_res_blocks, train)
            features.append(x)
            if level + 1 < len(self.width_multipliers):
                x = Downsample(self.use_resample_conv, self.dtype, name=f"level{level}_down")(x)
        return features

    def _middle(self, x, train: bool, prefix: str = ""):
        x = self._res_block(x.shape[-1], train, f"{prefix}middle_block1")(x)
        x = AttentionBlock(self.norm_groups, self.dtype, name=f"{prefix}middle_attention")(x)
        return self._res_block(x.shape[-1], train, f"{prefix}middle_block2")(x)

    def _out(self, x, prefix: str = ""):
        x = nn.silu(Norm(self.norm_groups, self.dtype, name=f"{prefix}norm_out")(x))
        # For `last_kernel_gradient`; nothing is stored unless the caller makes "intermediates" mutable.
        self.sow("intermediates", f"{prefix}last_features", x)
        return Conv(self.out_channels, dtype=self.dtype, name=f"{prefix}conv_out")(x)


class Encoder(_Coder):
    """Images (B, H, W, C) to features (B, H/f, W/f, out_channels), f = 2^(levels - 1)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self._out(self._middle(self._down(x, train)[-1], train))


class GrainedEncoder(_Coder):
    """Images (B, H, W, C) to features of each grain, g = 0 (coarse) first: (B, H/f, W/f, out_channels), f = 2^(L-1-g).

    The grains are the last of the L levels; each has a tail of its own (DQ-VAE, section 3.1).
    """

    num_grains: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        coarsest_first = self._down(x, train)[::-1]
        tails = ((f"grain{g}_", coarsest_first[g]) for g in range(self.num_grains))
        return tuple(self._out(self._middle(features, train, prefix), prefix) for prefix, features in tails)


class PositionBias(nn.Module):
    """Adds to a map (B, h, w, C) a bias of each place, in float32 (DQ-VAE, section 3.1).

    Sines of a linear map of the coordinates, both from -1 to 1, which is trained; with `use_learned` also a vector of
    each row and one of each column. Initialised as CrossmodalGroup/DynamicVectorQuantization:DecoderPositional.
    """

    use_learned: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, h, w, C = x.shape
        kernel_2C = self.param("kernel", _symmetric_uniform(math.sqrt(9 / 2)), (2, C))
        bias_C = self.param("bias", _symmetric_uniform(math.sqrt(1 / 2)), (C,))
        across_w1, down_h1 = (jnp.linspace(-1, 1, n, dtype=jnp.float32)[:, None] for n in (w, h))
        # Products of numbers and not of matrices, which some devices round to bfloat16.
        across_wC, down_hC = across_w1 * kernel_2C[:1], down_h1 * kernel_2C[1:]
        bias_hwC = jnp.sin(across_wC[None] + down_hC[:, None] + bias_C[None, None])
        if self.use_learned:
            init = nn.initializers.truncated_normal(1.0)
            rows_hC, columns_wC = (self.param(name, init, (n, C)) for name, n in (("rows", h), ("columns", w)))
            bias_hwC = bias_hwC + rows_hC[:, None] + columns_wC[None]
        return x.astype(jnp.float32) + bias_hwC[None]


def _symmetric_uniform(bound: float):
    return lambda rng, shape: jax.random.uniform(rng, shape, jnp.float32, -bound, bound)


class Decoder(_Coder):
    """Features to images, from the coarsest level to the finest; one more block a level than the encoder.

    Attributes:
      position_bias: one of `POSITION_BIASES`, added to the features, see `PositionBias`.
    """

    position_bias: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.position_bias != "none":
            x = PositionBias(self.position_bias == "fourier+learned", name="position_bias")(x)
        features = self.width * self.width_multipliers[-1]
        x = Conv(features, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        x = self._middle(x, train)
        for level in reversed(range(len(self.width_multipliers))):
            x = self._level(x, level, self.num_res_blocks + 1, train)
            if level > 0:
                x = Upsample(self.use_resample_conv, self.dtype, name=f"level{level}_up")(x)
        return self._out(x)


def last_kernel_gradient(params: Any, intermediates: Any, image_gradient: jax.Array) -> jax.Array:
    """Gradient with respect to the kernel of the decoder's last convolution, from one with respect to the image.

    The adaptive weight of stage 1 compares gradients at this layer (VQGAN, equation 7): one layer's backward pass
    gives them.

    Args:
      params: of a tokenizer.
      intermediates: the collection of that name from the forward pass.
      image_gradient: (B, H, W, C) of the loss with respect to the reconstruction.

    Returns:
      (3, 3, width, C).
    """
    (features,) = intermediates["decoder"]["last_features"]
    last = params["decoder"]["conv_out"]

    def images(kernel: jax.Array) -> jax.Array:
        conv = Conv(kernel.shape[-1], dtype=features.dtype)
        return conv.apply({"params": {**last, "kernel": kernel}}, features).astype(jnp.float32)

    return jax.vjp(images, last["kernel"])[1](image_gradient)[0]

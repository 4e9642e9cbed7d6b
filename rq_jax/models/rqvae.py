"""RQ-VAE: a convolutional autoencoder around a residual quantizer (Lee et al., CVPR 2022, section 3.1)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax import quantize
from rq_jax.nn.conv import AttentionBlock, Conv, Downsample, Norm, ResBlock, Upsample
from rq_jax.settings import checks


class RQVAEOutput(NamedTuple):
    """Reconstruction (B, H, W, C), codes (B, h, w, D), latents on the latent grid, partial sums (B, h, w, D, E)."""

    reconstruction: jax.Array
    codes: jax.Array
    latents: jax.Array
    partial_sums: jax.Array


class _Coder(nn.Module):
    """Settings, blocks and middle that the encoder and the decoder share."""

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

    def _middle(self, x, train: bool):
        x = self._res_block(x.shape[-1], train, "middle_block1")(x)
        x = AttentionBlock(self.norm_groups, self.dtype, name="middle_attention")(x)
        return self._res_block(x.shape[-1], train, "middle_block2")(x)

    def _out(self, x):
        x = nn.silu(Norm(self.norm_groups, self.dtype, name="norm_out")(x))
        # For `last_kernel_gradient`; nothing is stored unless the caller makes "intermediates" mutable.
        self.sow("intermediates", "last_features", x)
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x)


class Encoder(_Coder):
    """Images (B, H, W, C) to features (B, H/f, W/f, out_channels), f = 2^(levels - 1)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = Conv(self.width, dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        for level in range(len(self.width_multipliers)):
            x = self._level(x, level, self.num_res_blocks, train)
            if level + 1 < len(self.width_multipliers):
                x = Downsample(self.use_resample_conv, self.dtype, name=f"level{level}_down")(x)
        return self._out(self._middle(x, train))


class Decoder(_Coder):
    """Features to images, from the coarsest level to the finest; one more block a level than the encoder."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
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
      params: of an RQ-VAE.
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


class RQVAE(nn.Module):
    """Residual-quantised autoencoder. Images are NHWC in [-1, 1]; codes are (B, h, w, D) int32.

    Attributes:
      image_size: side of the images, or (H, W).
      code_shape: (h, w, D). The latent grid is image_size / 2^(levels - 1); where it is finer than (h, w), patches of
        latents are folded into the channels of one code vector.
      code_dim: E, length of a code vector.
      codebook_size: K, or one K_d per depth (separate codebooks).
      in_channels: C.
      width, width_multipliers, num_res_blocks: channels at the finest level, their factor per level, blocks per level.
      attention_resolutions: heights of the feature maps that get attention, beside the middle of the network.
      z_channels: channels between the coder and its 1x1 convolution; use_double_z doubles the encoder's.
      use_resample_conv: convolutions in down- and upsampling.
      norm_groups: groups of channels that are normalised together; fewer suit narrow networks, where 32 groups would
        normalise every channel by itself.
      use_shared_codebook, codebook_decay, use_restart, codebook_update, use_kmeans_init: see `ResidualQuantizer`.
      use_remat: recompute the residual blocks in the backward pass.
      dtype: of the networks, "float32" or "bfloat16"; the quantizer is float32 always.
    """

    image_size: int | tuple[int, int]
    code_shape: tuple[int, int, int]
    code_dim: int
    codebook_size: int | tuple[int, ...]
    in_channels: int = 3
    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    z_channels: int = 256
    use_double_z: bool = False
    use_resample_conv: bool = True
    dropout: float = 0.0
    norm_groups: int = 32
    use_shared_codebook: bool = True
    codebook_decay: float | tuple[float, ...] = 0.99
    use_restart: bool = True
    codebook_update: str = "sequential"
    use_kmeans_init: bool = False
    use_remat: bool = False
    dtype: str = "float32"

    def setup(self):
        self.check()
        (H, W), factor = self.image_shape, self._downsampling
        levels = range(len(self.width_multipliers))
        common = dict(
            width=self.width,
            width_multipliers=self.width_multipliers,
            num_res_blocks=self.num_res_blocks,
            attention_levels=tuple(level for level in levels if H // 2**level in self.attention_resolutions),
            use_resample_conv=self.use_resample_conv,
            dropout=self.dropout,
            norm_groups=self.norm_groups,
            use_remat=self.use_remat,
            dtype=jnp.dtype(self.dtype),
        )
        h, w, _ = self.code_shape
        latent_dim = self.code_dim // ((H // factor // h) * (W // factor // w))
        self.encoder = Encoder(out_channels=self.z_channels * (2 if self.use_double_z else 1), **common)
        self.decoder = Decoder(out_channels=self.in_channels, **common)
        self.quant_conv = Conv(latent_dim, 1, dtype=jnp.dtype(self.dtype))
        self.post_quant_conv = Conv(self.z_channels, 1, dtype=jnp.dtype(self.dtype))
        self.quantizer = quantize.ResidualQuantizer(**self._quantizer_settings)
        nn.share_scope(self, self.quantizer)  # no level of its own in the collection "codebook"

    def __call__(self, images: jax.Array, train: bool = False) -> RQVAEOutput:
        """Encode, quantise, decode.

        Args:
          images: (B, H, W, C) in [-1, 1].
          train: update the codebook (`mutable=["codebook"]`, rng stream "restart") and drop out (stream "dropout").

        Returns:
          `RQVAEOutput`; the reconstruction is linear, unclipped, with the straight-through gradient.
        """
        latents = self.encode(images, train)
        vectors = quantize.fold_patches(latents, self.code_shape[:2])
        result = self.quantizer(vectors, train)
        quantized = quantize.unfold_patches(result.quantized, self.latent_grid)
        return RQVAEOutput(self.decode(quantized, train), result.codes, latents, result.partial_sums)

    def encode(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Latents on the latent grid, float32, after the 1x1 convolution and before quantisation."""
        checks.shape("images", images.shape, ("B", *self.image_shape, self.in_channels))
        return self.quant_conv(self.encoder(images, train)).astype(jnp.float32)

    def encode_to_codes(self, images: jax.Array) -> jax.Array:
        """Codes (B, h, w, D) of images (B, H, W, C)."""
        return self._quantize(self.encode(images)).codes

    def decode(self, latents: jax.Array, train: bool = False) -> jax.Array:
        """Images, float32, from latents on the latent grid (before the decoder's 1x1 convolution)."""
        return self.decoder(self.post_quant_conv(latents), train).astype(jnp.float32)

    def decode_codes(self, codes: jax.Array, depth: int | None = None) -> jax.Array:
        """Images from codes (B, h, w, D), or from the first `depth` codes of every position.

        Raises:
          ValueError: codes of another shape, outside the codebook, or a depth outside 1..D.
        """
        checks.shape("codes", codes.shape, ("B", *self.code_shape))
        D = self.code_shape[-1]
        depth = D if depth is None else depth
        checks.in_range("depth", depth, 1, D, "the code depth of this model")
        vectors = self.code_vectors(codes[..., :depth]).sum(-2)
        return self.decode(quantize.unfold_patches(vectors, self.latent_grid))

    def code_vectors(self, codes: jax.Array) -> jax.Array:
        """Codebook vectors (..., D, E) of codes (..., D)."""
        return quantize.lookup(codes, self.quantizer.codebook)

    def soft_codes(
        self, images: jax.Array, temperature: float, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Soft codes (B, h, w, D, K) and codes (B, h, w, D) of images, see `quantize.soft_codes`."""
        vectors = quantize.fold_patches(self.encode(images), self.code_shape[:2])
        return quantize.soft_codes(vectors, self.quantizer.codebook, self.code_shape[-1], temperature, rng)

    def reconstruct_by_depth(self, images: jax.Array) -> jax.Array:
        """Reconstructions (D, B, H, W, C) from the first 1, 2, ..., D codes of every position (paper, figure 3)."""
        sums = self._quantize(self.encode(images)).partial_sums
        return jnp.stack(
            [self.decode(quantize.unfold_patches(sums[..., d, :], self.latent_grid)) for d in range(sums.shape[-2])]
        )

    def _quantize(self, latents: jax.Array) -> quantize.ResidualCodes:
        vectors = quantize.fold_patches(latents, self.code_shape[:2])
        return quantize.residual_quantize(vectors, self.quantizer.codebook, self.code_shape[-1])

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_d of each depth."""
        return quantize.per_depth(self.codebook_size, self.code_shape[-1])

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Height and width of the latents."""
        H, W = self.image_shape
        return H // self._downsampling, W // self._downsampling

    @property
    def _downsampling(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def _quantizer_settings(self) -> dict[str, Any]:
        return dict(
            codebook_size=self.codebook_size,
            code_dim=self.code_dim,
            depth=self.code_shape[-1],
            use_shared_codebook=self.use_shared_codebook,
            decay=self.codebook_decay,
            use_restart=self.use_restart,
            codebook_update=self.codebook_update,
            use_kmeans_init=self.use_kmeans_init,
        )

    def example_inputs(self, batch: int = 1) -> tuple[jax.Array, ...]:
        """Arguments of `init`: zeros of the right shape."""
        return (jnp.zeros((batch, *self.image_shape, self.in_channels), jnp.float32),)

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: settings out of range, or that do not fit together.
        """
        checks.one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("width", "num_res_blocks", "z_channels", "in_channels", "norm_groups"):
            checks.at_least(f"model.{name}", getattr(self, name), 1)
        checks.within("model.dropout", self.dropout, 0, 1, below=True)
        if not self.width_multipliers or min(self.width_multipliers) < 1:
            raise ValueError(
                f"model.width_multipliers: {self.width_multipliers} must be one positive integer a level, at least one"
            )
        self._check_grid()
        names = {"decay": "codebook_decay", "depth": "code_shape"}
        quantize.check_settings(
            quantize.ResidualQuantizer(**self._quantizer_settings, parent=None),
            lambda name: f"model.{names.get(name, name)}",
        )

    def _check_grid(self) -> None:
        """The image divides into latents, the latents into code vectors."""
        checks.positive_triple("model.code_shape", self.code_shape, "(h, w, depth)")
        levels = f"the downsampling of {len(self.width_multipliers)} levels"
        for axis, size in zip("HW", self.image_shape, strict=True):
            checks.multiple_of("model.image_size", size, self._downsampling, levels, axis=axis)
        (h, w, _), grid = self.code_shape, self.latent_grid
        if grid[0] % h or grid[1] % w:
            raise ValueError(
                f"model.code_shape: grid {(h, w)} does not divide the latent grid {grid}; choose divisors of it"
            )
        patch = grid[0] // h * (grid[1] // w)
        checks.multiple_of("model.code_dim", self.code_dim, patch, "the latents folded into one code vector")

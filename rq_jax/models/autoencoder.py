"""What the tokenizers share: settings, quantizer, and what is done with latents and codes."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.nn.conv import Conv
from rq_jax.settings import checks


class Autoencoder(nn.Module):
    """A convolutional autoencoder around a residual quantizer. Images are NHWC in [-1, 1].

    A tokenizer adds `code_shape`, `latent_grid`, `encode`, `check`, and a forward pass.

    Attributes:
      image_size: side of the images, or (H, W).
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

    depth_setting: ClassVar[str]  # where the code depth is set

    # --- for `setup` ---

    def _coder(
        self, width: int, multipliers: tuple[int, ...], num_res_blocks: int, attention_resolutions: tuple[int, ...]
    ) -> dict[str, Any]:
        """Settings of an encoder or decoder."""
        H, levels = self.image_shape[0], range(len(multipliers))
        return dict(
            width=width,
            width_multipliers=multipliers,
            num_res_blocks=num_res_blocks,
            attention_levels=tuple(level for level in levels if H // 2**level in attention_resolutions),
            use_resample_conv=self.use_resample_conv,
            dropout=self.dropout,
            norm_groups=self.norm_groups,
            use_remat=self.use_remat,
            dtype=jnp.dtype(self.dtype),
        )

    def _encoder(self) -> dict[str, Any]:
        """Settings of the encoder, which `width` and its siblings are those of."""
        own = self._coder(self.width, self.width_multipliers, self.num_res_blocks, self.attention_resolutions)
        return {**own, "out_channels": self.z_channels * (2 if self.use_double_z else 1)}

    def _add_bottleneck(self, latent_dim: int) -> None:
        """The modules between encoder and decoder."""
        self.quant_conv = Conv(latent_dim, 1, dtype=jnp.dtype(self.dtype))
        self.post_quant_conv = Conv(self.z_channels, 1, dtype=jnp.dtype(self.dtype))
        self.quantizer = quantize.ResidualQuantizer(**self._quantizer_settings)
        nn.share_scope(self, self.quantizer)  # no level of its own in the collection "codebook"

    # --- latents, codes, images ---

    def decode(self, latents: jax.Array, train: bool = False) -> jax.Array:
        """Images, float32, from latents on the latent grid (before the decoder's 1x1 convolution)."""
        return self.decoder(self.post_quant_conv(latents), train).astype(jnp.float32)

    def decode_codes(self, codes: jax.Array, depth: int | None = None) -> jax.Array:
        """Images from codes (B, h, w, D), or from the first `depth` codes of every position.

        Raises:
          ValueError: codes of another shape, of no type of integers or outside the codebook, or a depth outside 1..D.
        """
        checks.shape("codes", np.shape(codes), ("B", *self.code_shape))
        D = self.code_shape[-1]
        depth = D if depth is None else depth
        checks.in_range("depth", depth, 1, D, "the code depth of this model")
        codes = codes if isinstance(codes, jax.Array) else np.asarray(codes)
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

    def reconstruct_by_depth(self, images: jax.Array, **given: Any) -> jax.Array:
        """Reconstructions (D, B, H, W, C) from the first 1, 2, ..., D codes of every position (paper, figure 3).

        Args:
          images: (B, H, W, C).
          **given: further arguments of `encode`.
        """
        sums = self._quantize(self.encode(images, **given)).partial_sums
        return jnp.stack(
            [self.decode(quantize.unfold_patches(sums[..., d, :], self.latent_grid)) for d in range(sums.shape[-2])]
        )

    def _checked(self, images: Any) -> jax.Array:
        images = images if hasattr(images, "dtype") else jnp.asarray(images)  # nested lists
        checks.shape("images", images.shape, ("B", *self.image_shape, self.in_channels))
        checks.floating("images", images.dtype, fix="scale them to [-1, 1]")
        return images

    def _latents(self, features: jax.Array) -> jax.Array:
        return self.quant_conv(features).astype(jnp.float32)

    def _quantize(self, latents: jax.Array) -> quantize.ResidualCodes:
        vectors = quantize.fold_patches(latents, self.code_shape[:2])
        return quantize.residual_quantize(vectors, self.quantizer.codebook, self.code_shape[-1])

    # --- sizes ---

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_d of each depth."""
        return quantize.per_depth(self.codebook_size, self.code_shape[-1])

    @property
    def image_shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

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

    # --- what else a tokenizer may offer ---

    @property
    def budget_targets(self) -> tuple[float, ...] | None:
        """Shares of grains that a budget loss holds a trained router to; None without one."""
        return None

    @property
    def entropy_settings(self) -> dict[str, Any] | None:
        """What of `grains.patch_entropy` its thresholds belong to; None where it has none."""
        return None

    # --- checks ---

    def _check_networks(self) -> None:
        checks.one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        checks.side_or_sides("model.image_size", self.image_size)
        for name in ("width", "num_res_blocks", "z_channels", "in_channels", "norm_groups"):
            checks.at_least(f"model.{name}", getattr(self, name), 1)
        checks.within("model.dropout", self.dropout, 0, 1, below=True)
        self._check_levels("width_multipliers", self.width_multipliers)

    def _check_quantizer(self) -> None:
        names = {"decay": "codebook_decay", "depth": self.depth_setting}
        quantize.check_settings(
            quantize.ResidualQuantizer(**self._quantizer_settings, parent=None),
            lambda name: f"model.{names.get(name, name)}",
        )

    def _check_levels(self, setting: str, multipliers: tuple[int, ...]) -> None:
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"model.{setting}: {multipliers} must be one positive integer a level, at least one")

    def _check_image(self, factor: int, meaning: str) -> None:
        for axis, size in zip("HW", self.image_shape, strict=True):
            checks.multiple_of("model.image_size", size, factor, meaning, axis=axis)

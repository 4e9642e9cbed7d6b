"""RQ-VAE: a convolutional autoencoder around a residual quantizer (Lee et al., CVPR 2022, section 3.1)."""

from typing import ClassVar, NamedTuple

import jax

from rq_jax import quantize
from rq_jax.models.autoencoder import Autoencoder
from rq_jax.models.coder import Decoder, Encoder
from rq_jax.settings import checks


class RQVAEOutput(NamedTuple):
    """Reconstruction (B, H, W, C), codes (B, h, w, D), latents on the latent grid, partial sums (B, h, w, D, E)."""

    reconstruction: jax.Array
    codes: jax.Array
    latents: jax.Array
    partial_sums: jax.Array

    differentiable = ("reconstruction", "latents")
    # What a tokenizer with grains has besides: here every code counts once.
    cell_weights = None
    grains = None


class RQVAE(Autoencoder, kw_only=True):
    """Residual-quantised autoencoder. Images are NHWC in [-1, 1]; codes are (B, h, w, D) int32.

    Attributes:
      code_shape: (h, w, D). The latent grid is image_size / 2^(levels - 1); where it is finer than (h, w), patches of
        latents are folded into the channels of one code vector.
    """

    code_shape: tuple[int, int, int]

    depth_setting: ClassVar[str] = "code_shape"
    num_grains: ClassVar[int] = 1

    def setup(self):
        self.check()
        (H, W), factor = self.image_shape, self._downsampling
        h, w, _ = self.code_shape
        self.encoder = Encoder(**self._encoder())
        self.decoder = Decoder(**{**self._encoder(), "out_channels": self.in_channels})
        self._add_bottleneck(self.code_dim // ((H // factor // h) * (W // factor // w)))

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
        return self._latents(self.encoder(self._checked(images), train))

    def encode_to_codes(self, images: jax.Array) -> jax.Array:
        """Codes (B, h, w, D) of images (B, H, W, C)."""
        return self._quantize(self.encode(images)).codes

    @property
    def latent_grid(self) -> tuple[int, int]:
        """Height and width of the latents."""
        H, W = self.image_shape
        return H // self._downsampling, W // self._downsampling

    @property
    def _downsampling(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: settings out of range, or that do not fit together.
        """
        self._check_networks()
        self._check_grid()
        self._check_quantizer()

    def _check_grid(self) -> None:
        """The image divides into latents, the latents into code vectors."""
        checks.positive_triple("model.code_shape", self.code_shape, "(h, w, depth)")
        self._check_image(self._downsampling, f"the downsampling of {len(self.width_multipliers)} levels")
        (h, w, _), grid = self.code_shape, self.latent_grid
        if grid[0] % h or grid[1] % w:
            raise ValueError(
                f"model.code_shape: grid {(h, w)} does not divide the latent grid {grid}; choose divisors of it"
            )
        patch = grid[0] // h * (grid[1] // w)
        checks.multiple_of("model.code_dim", self.code_dim, patch, "the latents folded into one code vector")

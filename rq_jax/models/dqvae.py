"""DQ-VAE: a tokenizer that gives each region of an image as many codes as it needs (Huang et al., CVPR 2023)."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.grains import (
    ENTROPY_BINS,
    GrainedCodes,
    cell_weights,
    check_grains,
    check_ratios,
    check_thresholds,
    patch_entropy,
    repeat_cells,
    route_by_entropy,
)
from rq_jax.models.autoencoder import Autoencoder
from rq_jax.models.coder import POSITION_BIASES, Decoder, GrainedEncoder
from rq_jax.models.router import (
    ACTIVATIONS,
    ROUTERS,
    FeatureRouter,
    grains_by_share,
    hashed_uniforms,
    merge,
    one_hot,
    straight_through_gates,
)
from rq_jax.settings import checks


class Routing(NamedTuple):
    """Grains of regions (B, u, v) int32, and the scores that a router went by, see `DQVAEOutput`."""

    grains: jax.Array
    scores: jax.Array


class DQVAEOutput(NamedTuple):
    """What a DQ-VAE makes of images; arrays of codes are dense on the grid of the finest grain.

    reconstruction (B, H, W, C), codes (B, h, w, D), latents (B, h, w, E), partial_sums (B, h, w, D, E): as an RQ-VAE's.
    grains: of each region (B, u, v) int32.
    gates: the same one-hot (B, u, v, G), with the straight-through gradient where a feature router trains.
    scores: what the router went by: gate logits (B, u, v, G); entropies (B, u, v) in nats; uniform numbers (B, u, v).
    cell_weights: (B, h, w), with which every code counts once.
    """

    reconstruction: jax.Array
    codes: jax.Array
    latents: jax.Array
    partial_sums: jax.Array
    grains: jax.Array
    gates: jax.Array
    scores: jax.Array
    cell_weights: jax.Array

    differentiable = ("reconstruction", "latents", "gates")


class DQVAE(Autoencoder):
    """Autoencoder whose regions are coded by one code each (grain 0) up to 2^(G-1) x 2^(G-1) (grain G-1).

    Grains are the last `num_grains` levels of the encoder. The codes are dense on the grid of the finest (h, w), where
    a coarser code is repeated over its cells; the decoder sees no grain map.

    Attributes:
      num_grains: G, at least 2.
      code_depth: D, codes of each cell; the paper has 1.
      router: "feature", a trained network with a budget; "entropy", regions above thresholds of their pixels' entropy;
        "random", by shares alone (the paper's ablation): in training from the rng stream "gate", otherwise from a
        hash of the pixels.
      fine_ratio: shares of the grains 1 .. G-1 that are asked for; one number is that of each.
      thresholds: the entropy router's (G - 1,), in nats, increasing.
      entropy_bins: see `grains.patch_entropy`.
      gate_layers, gate_activation, use_gate_norm: of the feature router, see `FeatureRouter`.
      use_code_weights: each code counts once in the moving average; else once a cell, as in the original.
      decoder_width, decoder_width_multipliers, decoder_num_res_blocks, decoder_attention_resolutions: of the decoder;
        None: what the encoder has at the levels from the image to the code grid.
      position_bias: what the decoder adds to its input: "fourier+learned", "fourier" or "none".
      codebook_init: see `ResidualQuantizer`.
    """

    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    attention_resolutions: tuple[int, ...] = (32, 16)
    num_grains: int = 2
    code_depth: int = 1
    router: str = "entropy"
    fine_ratio: float | tuple[float, ...] = 0.5
    thresholds: tuple[float, ...] | None = None
    entropy_bins: str = "full"
    gate_layers: int = 2
    gate_activation: str = "silu"
    use_gate_norm: bool = True
    use_code_weights: bool = False
    decoder_width: int | None = None
    decoder_width_multipliers: tuple[int, ...] | None = None
    decoder_num_res_blocks: int | None = None
    decoder_attention_resolutions: tuple[int, ...] | None = None
    position_bias: str = "fourier+learned"
    codebook_init: str = "uniform"

    depth_setting: ClassVar[str] = "code_depth"

    def setup(self):
        self.check()
        self.encoder = GrainedEncoder(num_grains=self.num_grains, **self._encoder())
        self.decoder = Decoder(
            **self._coder(*self._decoder), out_channels=self.in_channels, position_bias=self.position_bias
        )
        if self.router == "feature":
            self.feature_router = FeatureRouter(
                self.gate_layers, self.gate_activation, self.use_gate_norm, self.norm_groups
            )
        self._add_bottleneck(self.code_dim)

    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        grains: jax.Array | None = None,
        gate_noise: jax.Array | None = None,
    ) -> DQVAEOutput:
        """Encode, route, quantise, decode.

        Args:
          images: (B, H, W, C) in [-1, 1].
          train: update the codebook (`mutable=["codebook"]`, rng stream "restart"), draw gates (stream "gate", by the
            feature and the random router) and drop out (stream "dropout").
          grains: (B, u, v), in place of the router's.
          gate_noise: (B, u, v, G), in place of the Gumbel noise that a training feature router draws.

        Returns:
          `DQVAEOutput`; the reconstruction is linear, unclipped, with the straight-through gradient.

        Raises:
          ValueError: images or a grain map of another shape, images of integers, grains outside 0..G-1, or noise that
            nothing reads.
        """
        merged, routing, gates = self._encode(images, train, grains, gate_noise)
        latents, weights = self._latents(merged), cell_weights(routing.grains, self.num_grains)
        result = self.quantizer(latents, train, weights if self.use_code_weights else None)
        return DQVAEOutput(
            self.decode(result.quantized, train), result.codes, latents, result.partial_sums,
            routing.grains, gates, routing.scores, weights,
        )  # fmt: skip

    def encode(self, images: jax.Array, grains: jax.Array | None = None) -> jax.Array:
        """Latents (B, h, w, E), float32, after the 1x1 convolution and before quantisation.

        Args:
          images: (B, H, W, C).
          grains: (B, u, v), in place of the router's.

        Raises:
          ValueError: images or a grain map of another shape, images of integers, or grains outside 0..G-1.
        """
        return self._latents(self._encode(images, grains=grains)[0])

    def encode_to_codes(self, images: jax.Array, grains: jax.Array | None = None) -> GrainedCodes:
        """Codes and grains of images; arguments and errors as `encode`."""
        merged, routing, _ = self._encode(images, grains=grains)
        return GrainedCodes(self._quantize(self._latents(merged)).codes, routing.grains)

    def route(self, images: jax.Array) -> Routing:
        """The grains that the router gives to regions of images (B, H, W, C)."""
        images = self._checked(images)
        features = self.encoder(images) if self.router == "feature" else ()
        scores = self._scores(images, features, draws=False)
        return Routing(self._grains(scores), scores)

    def decode_codes(self, codes: GrainedCodes | jax.Array, depth: int | None = None) -> jax.Array:
        """Images from codes, or from the first `depth` codes of every cell.

        Args:
          codes: with their grains, which the decoder does not see, or their dense array (B, h, w, D) alone.
          depth: 1..D; None is D.

        Raises:
          ValueError: codes of another shape, of no type of integers or outside the codebook, or a depth outside 1..D.
        """
        return super().decode_codes(codes.codes if isinstance(codes, GrainedCodes) else codes, depth)

    # --- routing ---

    def _encode(
        self,
        images: jax.Array,
        train: bool = False,
        grains: jax.Array | None = None,
        gate_noise: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing, jax.Array]:
        """Merged features (B, h, w, C) before the 1x1 convolution, routing, gates (B, u, v, G)."""
        images = self._checked(images)
        draws = train and grains is None and not self.is_initializing()
        trains_gates = draws and self.router == "feature"
        if gate_noise is not None and not trains_gates:
            raise ValueError("gate_noise: nothing reads it but a feature router that trains without given grains")
        features = self.encoder(images, train)
        scores = self._scores(images, features, draws)
        if trains_gates:
            chosen, gates = straight_through_gates(scores, self._gate_noise(scores.shape, gate_noise))
            # Exactly 1: the way of the gradient from the losses of the image to the router.
            winning = jnp.max(gates, axis=-1, keepdims=True)
            cells = repeat_cells(winning, 1 << (self.num_grains - 1))
            return merge(features, chosen).astype(jnp.float32) * cells, Routing(chosen, scores), gates
        if grains is None:
            chosen = self._grains(scores)
        else:
            check_grains("grains", grains, self.num_grains, self.region_grid, len(images))
            chosen = jnp.asarray(grains, jnp.int32)
        return merge(features, chosen), Routing(chosen, scores), one_hot(chosen, self.num_grains)

    def _scores(self, images: jax.Array, features: tuple[jax.Array, ...], draws: bool) -> jax.Array:
        if self.router == "feature":
            return self.feature_router(features)
        if self.router == "entropy":
            return jax.lax.stop_gradient(patch_entropy(images, self.region_size, self.entropy_bins))
        if draws:
            return jax.random.uniform(self._key("gate"), (len(images), *self.region_grid), jnp.float32)
        return hashed_uniforms(images, self.region_size)

    def _grains(self, scores: jax.Array) -> jax.Array:
        if self.router == "feature":
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        if self.router == "entropy":
            return route_by_entropy(scores, np.asarray(self.thresholds, np.float32))
        return grains_by_share(scores, self.shares)

    def _gate_noise(self, shape: tuple[int, ...], given: jax.Array | None) -> jax.Array:
        if given is None:
            return jax.random.gumbel(self._key("gate"), shape, jnp.float32)
        checks.shape("gate_noise", np.shape(given), shape)
        return jnp.asarray(given, jnp.float32)

    def _key(self, stream: str) -> jax.Array:
        if not self.has_rng(stream):
            raise ValueError(f"rngs: a router that draws needs the stream '{stream}'; pass rngs={{'{stream}': key}}")
        return self.make_rng(stream)

    # --- sizes ---

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(h, w, D)."""
        return (*self.latent_grid, self.code_depth)

    @property
    def latent_grid(self) -> tuple[int, int]:
        """The code grid (h, w): that of the finest grain."""
        H, W = self.image_shape
        factor = self.region_size >> (self.num_grains - 1)
        return H // factor, W // factor

    @property
    def region_grid(self) -> tuple[int, int]:
        """Rows and columns of regions (u, v)."""
        H, W = self.image_shape
        return H // self.region_size, W // self.region_size

    @property
    def region_size(self) -> int:
        """Pixels on a side of a region."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the grains 1 .. G-1 that are asked for."""
        given = np.atleast_1d(self.fine_ratio)
        given = np.broadcast_to(given, self.num_grains - 1) if given.size == 1 else given
        return check_ratios("model.fine_ratio", given.tolist(), self.num_grains)

    @property
    def budget_targets(self) -> tuple[float, ...] | None:
        """Shares that a budget loss holds a trained router to."""
        return self.shares if self.router == "feature" else None

    @property
    def entropy_settings(self) -> dict[str, Any] | None:
        """What of `grains.patch_entropy` the thresholds of an entropy router belong to."""
        return dict(patch_size=self.region_size, bins=self.entropy_bins) if self.router == "entropy" else None

    @property
    def _decoder(self) -> tuple[int, tuple[int, ...], int, tuple[int, ...]]:
        """Width, multipliers, blocks and attention of the decoder."""
        levels = len(self.width_multipliers) - self.num_grains + 1
        given = (
            (self.decoder_width, self.width),
            (self.decoder_width_multipliers, self.width_multipliers[:levels]),
            (self.decoder_num_res_blocks, self.num_res_blocks),
            (self.decoder_attention_resolutions, self.attention_resolutions),
        )
        return tuple(default if own is None else own for own, default in given)

    @property
    def _quantizer_settings(self) -> dict[str, Any]:
        return {**super()._quantizer_settings, "codebook_init": self.codebook_init}

    # --- checks ---

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: settings out of range, or that do not fit together.
        """
        self._check_networks()
        checks.in_range(
            "model.num_grains", self.num_grains, 2, len(self.width_multipliers), "the levels of the encoder"
        )
        self._check_image(self.region_size, "the pixels of a region")
        _ = self.shares  # raises
        self._check_router()
        self._check_decoder()
        self._check_quantizer()

    def _check_router(self) -> None:
        checks.one_of("model.router", self.router, ROUTERS)
        checks.one_of("model.entropy_bins", self.entropy_bins, ENTROPY_BINS)
        checks.in_range("model.gate_layers", self.gate_layers, 1, 2, "the layers of a feature router")
        checks.one_of("model.gate_activation", self.gate_activation, ACTIVATIONS)
        if self.thresholds is not None:
            check_thresholds("model.thresholds", self.thresholds, self.num_grains)
            checks.unread("model.thresholds", self.thresholds, "entropy", self.router, fix="leave them out")
        if self.router == "entropy":
            if self.thresholds is None:
                raise ValueError(
                    "model.thresholds: unset, but the router goes by entropy; measure them with "
                    "python -m rq_jax.data.entropy"
                )
            if self.in_channels not in (1, 3):
                raise ValueError(
                    f"model.in_channels: {self.in_channels} has no entropy, which is of gray or RGB; take 1 or 3, or "
                    "another model.router"
                )

    def _check_decoder(self) -> None:
        checks.one_of("model.position_bias", self.position_bias, POSITION_BIASES)
        width, multipliers, blocks, _ = self._decoder
        checks.at_least("model.decoder_width", width, 1)
        checks.at_least("model.decoder_num_res_blocks", blocks, 1)
        self._check_levels("decoder_width_multipliers", multipliers)
        levels = len(self.width_multipliers) - self.num_grains + 1
        if len(multipliers) != levels:
            raise ValueError(
                f"model.decoder_width_multipliers: {multipliers} has {len(multipliers)} levels, which do not lead from "
                f"the code grid {self.latent_grid} to the image; give {levels}"
            )

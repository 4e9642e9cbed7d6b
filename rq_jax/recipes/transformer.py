"""Stage 2: an RQ-Transformer over the codes of a frozen tokenizer, with soft labels (paper, sections 3.2 and 3.3)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import losses, models, quantize
from rq_jax.devices import sharding
from rq_jax.recipes import codes as frozen_codes
from rq_jax.recipes.stage2 import CondLosses, Stage2
from rq_jax.report import grids
from rq_jax.settings import checks
from rq_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses(CondLosses):
    """The losses of stage 2, taken over a chunk of positions at a time: the config section `loss`.

    Attributes:
      use_soft_labels: targets are the tokenizer's soft codes, else its codes (paper, section 3.3).
      use_stochastic_codes: codes are drawn from the soft codes, else the nearest ones.
      temperature: of the soft codes.
      image_weight: of the cross-entropy of the codes.
    """

    use_soft_labels: bool = True
    use_stochastic_codes: bool = True
    temperature: float = 0.5
    image_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        checks.above("loss.temperature", self.temperature, 0)

    def draw(self, latents: jax.Array, model: Any, codebook: quantize.Codebook, rng: jax.Array | None):
        """Codes (B, h, w, D) and the residuals behind them (B, h, w, D, E), from latents on the latent grid."""
        h, w, D = model.code_shape
        vectors = quantize.fold_patches(latents, (h, w))
        rng = rng if self.use_stochastic_codes else None
        return quantize.draw_codes(vectors, codebook, D, self.temperature, rng)

    def code_nats(self, model, variables, hidden, codes, residuals, codebook, num_devices: int = 1) -> jax.Array:
        """Cross-entropy in nats of each image at each depth (B, D), mean over positions; devices share the batch."""
        classify = functools.partial(model.apply, variables, method="classify")
        soft = (residuals, lambda chunk: quantize.soft_labels(chunk, codebook, self.temperature))
        targets = soft if self.use_soft_labels else ()
        return losses.cross_entropy_by_depth(
            classify, max(model.codebook_sizes), hidden, codes, *targets, num_devices=num_devices
        )

    def terms(
        self,
        nats_BD: jax.Array,
        cond: jax.Array | None,
        cond_logits: jax.Array | None,
        dropped: jax.Array | None,
        kept_share: jax.Array | None,
    ) -> dict[str, tuple[float, jax.Array]]:
        """Name -> (weight, value) of every term; a value by depth counts with its mean. A new term is added here.

        Args:
          nats_BD: from `code_nats`.
          cond: condition (B, U), before any of it was dropped.
          cond_logits: of the tokens 1..U-1 of a text (B, U-1, V).
          dropped: (B, 1), the examples whose condition was left out; None: none were.
          kept_share: share of the others in the whole batch, of which this may be a part.
        """
        terms = {"code_loss": (self.image_weight, nats_BD.mean(0))}
        if self.text_weight:
            text_loss_BU = self.text_nats(cond, cond_logits, dropped)
            if dropped is not None:
                text_loss_BU = text_loss_BU / jnp.maximum(kept_share, 1e-9)
            terms["text_loss"] = (self.text_weight, text_loss_BU.mean())
        return terms


@dataclasses.dataclass(frozen=True, eq=False)
class Transformer(Stage2):
    """Recipe of RQ-Transformers; attributes as `Stage2`."""

    losses: Losses = Losses()

    losses_class: ClassVar[type] = Losses
    has_grains: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, tuple[str, int]]] = {"code_loss": ("depth", 1)}

    @property
    def soft_temperature(self) -> float | None:
        uses_soft_codes = self.losses.use_soft_labels or self.losses.use_stochastic_codes
        return self.losses.temperature if uses_soft_codes else None

    def __post_init__(self):
        super().__post_init__()
        name = models.settings_of(self.model)["name"]
        checks.unread("loop.buckets", self.buckets.tokens, "dqtransformer", name, fix="set it to ()")

    # --- one update ---

    def _prepare(self, batch, rngs, model_state, frozen):
        return batch, functools.partial(self._loss_and_grads, model_state=model_state, frozen=frozen)

    def _loss_and_grads(self, params, batch, rngs, model_state, frozen):
        codebook = frozen_codes.codebook_of(frozen)
        draw_codes = functools.partial(self.losses.draw, model=self.model, rng=rngs["codes"])
        codes, residuals = frozen_codes.draw(draw_codes, self.tokenizer.model, frozen, batch, self.mesh)
        cond, dropped = self.losses.drop(rngs["cond"], batch.get("cond"), self.model)
        read = {
            "codes": codes,
            "residuals": residuals,
            "cond": cond,
            "target_cond": batch.get("cond"),
            "dropped": dropped,
        }
        kept_share = None if dropped is None else jnp.mean(~dropped)
        code_nats = functools.partial(self.losses.code_nats, self.model, codebook=codebook)
        nats = functools.partial(code_nats, num_devices=self._devices_of_an_image)
        # Chunk by chunk the classifier's gradient would be summed over devices; in parts it is not.
        share = functools.partial(sharding.with_copies, self.mesh, inside=self._part_axes)

        def objective(params: Any, read: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
            variables, codes = {"params": params, **model_state}, read["codes"]
            rng_spatial, rng_depth = jax.random.split(rngs["dropout"])
            apply = functools.partial(self.model.apply, variables, train=True)
            context, cond_logits, _ = apply(codes, read["cond"], rngs={"dropout": rng_spatial}, method="spatial")
            hidden, _ = apply(context, codes, rngs={"dropout": rng_depth}, method="depth")
            part = {"hidden": hidden, "codes": codes, "residuals": read["residuals"]}
            nats_BD = share(lambda params, part: nats({"params": params, **model_state}, **part), params, part)
            terms = self.losses.terms(nats_BD, read["target_cond"], cond_logits, read["dropped"], kept_share)
            total = sum(weight * value.mean() for weight, value in terms.values())
            return total, {name: value for name, (_, value) in terms.items()}

        return self._differentiate(objective, params, read)

    # --- evaluation ---

    def report(self, state: TrainState, sums: Any, shown: None) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Nats of the nearest codes by depth, bits per image, and a grid of samples."""
        h, w, D = self.model.code_shape
        nats_D = np.asarray(sums["nats"]) / float(sums["count"])
        scalars = {"validation_loss": float(nats_D.mean())}
        scalars["bits_per_image"] = float(nats_D.sum() * h * w / math.log(2))
        for d in range(D):
            scalars[f"validation_nats/depth{d + 1}"] = float(nats_D[d])
            if self.figures is not None:
                scalars[f"unigram_nats/depth{d + 1}"] = float(self.figures.unigram_nats_D[d])
        _, images = self._generate(state)
        return scalars, {"samples": grids.grid(images, columns=9, scale=max(1, 64 // images.shape[1]))}

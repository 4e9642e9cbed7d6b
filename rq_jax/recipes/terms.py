"""The terms of stage 1's objective, their weights, and when they begin."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import losses
from rq_jax.settings import checks


class Phase(NamedTuple):
    """The terms that have begun: static in the step's program, so that a term costs nothing before its start.

    A `lax.cond` in one program would cost more than both branches on a CPU, where XLA runs them on one core.
    """

    perceptual: bool = False
    adversary: bool = False


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of stage 1 and their weights: the config section `loss`.

    Attributes:
      reconstruction: "mse" or "l1".
      commitment_weight, perceptual_weight: of the two terms; 0 leaves the perceptual one out.
      budget_weight: of the shares of the grains that a trained router gives, see `losses.budget_loss`; one number is
        that of each of the grains 1..G-1, 0 leaves the term out.
      perceptual_start_steps: steps before the perceptual term begins.
      adversarial_weight: of the generator's term on top of its adaptive weight, and of the discriminator's loss; 0: no
        adversary.
      discriminator_loss: "hinge" or "vanilla". generator_loss: "vanilla".
      max_adaptive_weight: limit of the adaptive weight.
      adversarial_start_steps: steps before the adversary begins; the discriminator does not learn before either.
      adversarial_warmup_steps: over which the generator's term rises linearly to its whole weight; the discriminator
        learns at its own rate from the start.
    """

    reconstruction: str = "mse"
    commitment_weight: float = 0.25
    budget_weight: float | tuple[float, ...] = 0.0
    perceptual_weight: float = 0.0
    perceptual_start_steps: int = 0
    adversarial_weight: float = 0.0
    discriminator_loss: str = "hinge"
    generator_loss: str = "vanilla"
    max_adaptive_weight: float = 1e4
    adversarial_start_steps: int = 0
    adversarial_warmup_steps: int = 0

    def __post_init__(self):
        checks.one_of("loss.reconstruction", self.reconstruction, ("mse", "l1"))
        losses.check_adversarial_losses(self.discriminator_loss, self.generator_loss)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not str:
                checks.amount(f"loss.{field.name}", value, sequence=field.name == "budget_weight")

    def check_starts(self, total_steps: int) -> None:
        """Every term begins within the run.

        Raises:
          ValueError: naming the term that does not.
        """
        for name in ("perceptual", "adversarial"):
            start = getattr(self, f"{name}_start_steps")
            if getattr(self, f"{name}_weight") and start >= total_steps:
                raise ValueError(
                    f"loss.{name}_start_steps: {start} must be below the {total_steps} steps of the run; "
                    f"lower it, or set loss.{name}_weight=0"
                )

    def check_model(self, model: Any) -> None:
        """The model feeds every term that has a weight.

        Raises:
          ValueError: a budget for a model without a router that trains, or for another number of grains; none for a
            router that trains.
        """
        if not np.any(self.budget_weight):
            if model.budget_targets is not None:
                raise ValueError(
                    f"loss.budget_weight: {self.budget_weight} holds no share of a router that trains to "
                    "model.fine_ratio; set it above 0, as the released 20.0 for 2 grains or 1.0 for 3"
                )
            return
        if model.budget_targets is None:
            raise ValueError(
                f"loss.budget_weight: {self.budget_weight} is of a router that trains, which this model does not have; "
                "set it to 0"
            )
        count = len(model.budget_targets)
        if np.size(self.budget_weight) not in (1, count):
            raise ValueError(
                f"loss.budget_weight: {self.budget_weight} has {np.size(self.budget_weight)} entries; give one, or "
                f"{count} for the grains above 0"
            )

    def phase(self, step: int) -> Phase:
        """The terms that have begun at a step."""
        return Phase(
            perceptual=self.perceptual_weight > 0 and step >= self.perceptual_start_steps,
            adversary=self.adversarial_weight > 0 and step >= self.adversarial_start_steps,
        )

    def terms(
        self,
        images: jax.Array,
        output: Any,
        distance: Callable[..., jax.Array] | None,
        budget_targets: Sequence[float] | None = None,
    ) -> dict[str, tuple[float, jax.Array]]:
        """Name -> (weight, value) of every term of the objective but the adversarial one; a new term is added here.

        Args:
          images: (B, H, W, C) in [-1, 1].
          output: of the model, an `RQVAEOutput` or a `DQVAEOutput`; its gradient with respect to whatever the terms
            read, as it names it in `differentiable`, is passed on to the parameters.
          distance: perceptual distance, two batches of images to (B,); None before it begins.
          budget_targets: shares of grains that a trained router is held to.
        """
        reconstruction = losses.reconstruction_loss(images, output.reconstruction, self.reconstruction)
        terms = {"reconstruction_loss": (1.0, reconstruction)}
        if self.perceptual_weight:
            value = jnp.float32(0) if distance is None else distance(images, output.reconstruction).mean()
            terms["perceptual_loss"] = (self.perceptual_weight, value)
        commitment = losses.commitment_loss(output.latents, output.partial_sums, output.cell_weights)
        terms["commitment_loss"] = (self.commitment_weight, commitment)
        if np.any(self.budget_weight):
            weights = np.broadcast_to(self.budget_weight, len(budget_targets)).tolist()
            terms["budget_loss"] = (1.0, losses.budget_loss(output.gates, budget_targets, weights))
        return terms

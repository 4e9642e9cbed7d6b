"""The adversary of stage 1: a patch discriminator with an adaptive weight (Esser et al., CVPR 2021, section 3.1)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from rq_jax import losses, models
from rq_jax.models.discriminator import initialize_actnorm, update_statistics_again
from rq_jax.training.optimizer import Optimizer, make_optimizer
from rq_jax.training.state import TrainState

METRICS = (
    "generator_loss", "discriminator_loss", "discriminator_gradient_norm", "d_weight", "logits_fake", "logits_real",
)  # fmt: skip


class AdversarialUpdate(NamedTuple):
    """The adversary's part of a step.

    Attributes:
      image_gradient: of the weighted generator loss with respect to the reconstruction (B, H, W, C).
      loss: the weighted generator loss.
      fields: of the state after the step.
      metrics: scalars by the names of `METRICS`.
    """

    image_gradient: jax.Array
    loss: jax.Array
    fields: dict[str, Any]
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Adversary:
    """A discriminator, its optimizer, and the weights of its losses, which `recipes.tokenizer.Losses` explains."""

    model: nn.Module
    optimizer: Optimizer
    weight: float
    discriminator_loss: str = "hinge"
    generator_loss: str = "vanilla"
    max_adaptive_weight: float = 1e4
    start_steps: int = 0
    warmup_steps: int = 0

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: nn.Module, optim: Mapping[str, Any], total_steps: int, terms: Any
    ) -> "Adversary":
        """The adversary of a stage-1 config.

        Args:
          config: its section `discriminator` makes the network, `discriminator_optim` changes settings of `optim`.
          tokenizer: whose images it judges.
          optim: keywords of `make_optimizer`, durations in steps.
          total_steps: from the adversary's start to the end of the run: the length of its schedule.
          terms: `recipes.tokenizer.Losses`.

        Raises:
          ValueError: settings that are not allowed, or images that are too small for the network.
        """
        images = jax.ShapeDtypeStruct((1, *tokenizer.image_shape, tokenizer.in_channels), jnp.float32)
        own = {name: value for name, value in config["discriminator_optim"].items() if value is not None}
        model = models.create("discriminator", **{**config["discriminator"], "in_channels": tokenizer.in_channels})
        jax.eval_shape(model.init, jax.random.key(0), images)  # raises where the images are too small
        optimizer = make_optimizer("discriminator_optim", **{**optim, **own}, total_steps=total_steps)
        return cls(
            model, optimizer, terms.adversarial_weight, terms.discriminator_loss, terms.generator_loss,
            terms.max_adaptive_weight, terms.adversarial_start_steps, terms.adversarial_warmup_steps,
        )  # fmt: skip

    def ramp(self, step: jax.Array) -> jax.Array:
        """Share of the generator's term at a step (float32) from the start on: above 0, then 1.

        The last step of a run that takes fewer steps than it was set to may come before the start, and counts as it.
        """
        since_start = jnp.maximum(step - self.start_steps, 0.0)
        return jnp.minimum((since_start + 1.0) / max(self.warmup_steps, 1), 1.0)

    def idle(self) -> AdversarialUpdate:
        """Before the start: nothing changes, every metric is 0."""
        zero = jnp.float32(0)
        return AdversarialUpdate(zero, zero, {}, dict.fromkeys(METRICS, zero))

    def update(
        self,
        state: TrainState,
        images: jax.Array,
        reconstruction: jax.Array,
        image_gradient: jax.Array,
        kernel_gradient: Callable[[jax.Array], jax.Array],
        gather: Callable[[Any], Any],
    ) -> AdversarialUpdate:
        """One update of the discriminator, and its gradient for the autoencoder (as rq-vae-transformer:Trainer.train).

        The original runs the discriminator over the reconstruction twice, for the generator and for its own update,
        with the same weights and the statistics of the same batch. Here both gradients are pulled back through one
        pass, and only the running statistics are moved a second time. Real images are a pass of their own.

        Args:
          state: before the step.
          images, reconstruction: (B, H, W, C).
          image_gradient: of all other terms with respect to the reconstruction.
          kernel_gradient: takes such a gradient to one of the decoder's last kernel.
          gather: the discriminator's parameters as convolutions use them.
        """

        def score(params: Any, images: jax.Array, statistics: Any) -> tuple[jax.Array, Any]:
            variables = {"params": gather(params), **statistics}
            return self.model.apply(variables, images, train=True, mutable=["batch_stats"])

        variables = initialize_actnorm(self.model, state.discriminator, reconstruction)
        params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}
        score_fake = functools.partial(score, statistics=statistics)
        fake, pull_back, once = jax.vjp(score_fake, params, reconstruction, has_aux=True)
        # Two cotangents of the same logits: one goes on to the image, the other to the discriminator's weights.
        generator_loss, cotangent = jax.value_and_grad(losses.generator_loss)(fake, self.generator_loss)
        generator_gradient = pull_back(cotangent)[1]
        fake_loss, cotangent = jax.value_and_grad(losses.discriminator_loss_fake)(fake, self.discriminator_loss)
        fake_grads = pull_back(cotangent)[0]
        statistics = update_statistics_again(statistics, once)

        def real_objective(params: Any) -> tuple[jax.Array, Any]:
            real, after = score(params, images, statistics)
            return losses.discriminator_loss_real(real, self.discriminator_loss), (real, after)

        (real_loss, (real, statistics)), real_grads = jax.value_and_grad(real_objective, has_aux=True)(params)
        # As rq-vae-transformer:Trainer.train, the discriminator's own loss carries the weight too.
        grads = jax.tree.map(lambda a, b: self.weight * (a + b), fake_grads, real_grads)
        updates, opt_state = self.optimizer.update(grads, state.discriminator_opt_state, params, state.pace)
        d_weight = losses.adaptive_weight(
            kernel_gradient(image_gradient), kernel_gradient(generator_gradient), self.max_adaptive_weight
        )
        weight = self.ramp(state.progress) * self.weight * d_weight
        discriminator = {"params": optax.apply_updates(params, updates), **statistics}
        values = (
            generator_loss, fake_loss + real_loss, optax.tree.norm(grads), d_weight, fake.mean(), real.mean(),
        )  # fmt: skip
        return AdversarialUpdate(
            weight * generator_gradient,
            weight * generator_loss,
            {"discriminator": discriminator, "discriminator_opt_state": opt_state},
            dict(zip(METRICS, values, strict=True)),
        )

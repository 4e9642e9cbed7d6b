"""State of a training run, its guarded update, weight average and micro-batches."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from rq_jax.devices import sharding
from rq_jax.training.optimizer import Optimizer


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes.

    `rng` never changes: each step folds its number into it. Neither does `pace`: a step passes so many of the steps in
    which durations are given, more than 1 where a run takes fewer steps than it was set to (`training.budget`).

    Stage 1 with an adversary also carries the discriminator's variables and the state of its optimizer.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any
    rng: jax.Array
    skipped_steps: jax.Array
    pace: jax.Array
    discriminator: Any = None
    discriminator_opt_state: Any = None

    @property
    def progress(self) -> jax.Array:
        """Steps done, of those in which durations are given."""
        return self.step.astype(jnp.float32) * self.pace

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables as trained."""
        return {"params": self.params, **self.model_state}

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The model's variables with averaged weights, where an average is kept."""
        return {"params": self.params if self.ema_params is None else self.ema_params, **self.model_state}

    def rng_of_step(self, *uses: str) -> dict[str, jax.Array]:
        """Keys of this step by use, {"dropout": key, ...}; a key does not depend on which others are asked for."""
        rng = jax.random.fold_in(self.rng, self.step)
        # A polynomial hash of the name: Python's hash() differs from process to process.
        return {use: jax.random.fold_in(rng, sum(ord(c) * 31**i for i, c in enumerate(use)) % 2**31) for use in uses}


def create_state(
    variables: dict[str, Any],
    optimizer: Optimizer,
    rng: jax.Array,
    use_ema: bool,
    discriminator: tuple[dict[str, Any], Optimizer] | None = None,
) -> TrainState:
    """The state before the first step; `discriminator` is its variables and its optimizer."""
    variables = dict(variables)
    params = variables.pop("params")
    return TrainState(
        step=jnp.int32(0),
        params=params,
        model_state=variables,
        opt_state=optimizer.transform.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if use_ema else None,
        rng=rng,
        skipped_steps=jnp.int32(0),
        pace=jnp.float32(1),
        **_discriminator_fields(discriminator),
    )


def _discriminator_fields(discriminator: tuple[dict[str, Any], Optimizer] | None) -> dict[str, Any]:
    if discriminator is None:
        return {}
    variables, optimizer = discriminator
    return {"discriminator": variables, "discriminator_opt_state": optimizer.transform.init(variables["params"])}


def apply_gradients(
    state: TrainState,
    optimizer: Optimizer,
    grads: Any,
    losses: Any,
    model_state: Any,
    ema_decay: float,
    **updated: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of parameters, optimizer, weight average and model state.

    A step with a loss or gradient that is not finite changes nothing but the counters `step` and `skipped_steps`.

    Args:
      state: before the step.
      optimizer: of `state.params`.
      grads: their gradients.
      losses: scalars, all of which must be finite.
      model_state: the model's other variables after the step.
      ema_decay: of the weight average, where one is kept.
      **updated: further fields of the state after the step, dropped with the rest where the step is skipped.

    Returns:
      The new state and {"gradient_norm", "learning_rate", "skipped_share"}, the last 1 for a skipped step, else 0.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.all(jnp.isfinite(jnp.stack([norm, *jax.tree.leaves(losses)])))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, state.pace)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = average_weights(ema_params, params, ema_decay, state.step)
    new = dict(params=params, model_state=model_state, opt_state=opt_state, ema_params=ema_params, **updated)
    old = {name: getattr(state, name) for name in new}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    # The optimizer counts its own updates, of which a skipped step is none.
    learning_rate = optimizer.learning_rate((state.step - state.skipped_steps).astype(jnp.float32) * state.pace)
    skipped = state.skipped_steps + jnp.where(finite, 0, 1)
    state = state.replace(step=state.step + 1, skipped_steps=skipped, **new)
    return state, {
        "gradient_norm": norm,
        "learning_rate": learning_rate,
        "skipped_share": 1.0 - finite.astype(jnp.float32),
    }


def average_weights(average: Any, params: Any, decay: float | jax.Array, step: jax.Array | int | None = None) -> Any:
    """Exponential moving average of weights with decay min(decay, (1 + step) / (10 + step)), or `decay` without a step.

    As kakaobrain/rq-vae-transformer:ExponentialMovingAverage, whose trainer never calls it.
    """
    if step is not None:
        step = jnp.asarray(step, jnp.float32)
        decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a * decay + (1 - decay) * p, average, params)


def accumulate_gradients(loss_and_grads: Any, params: Any, batch: Any, num_steps: int, rngs: Any) -> Any:
    """Mean of `loss_and_grads` over micro-batches.

    Args:
      loss_and_grads: (params, micro-batch, rngs) -> a pytree of arrays, such as losses and gradients.
      params: passed on.
      batch: a pytree of arrays (B, ...).
      num_steps: number of micro-batches, a divisor of B.
      rngs: a pytree of keys; each micro-batch folds its index into them.

    Returns:
      A pytree as `loss_and_grads` returns.
    """
    if num_steps == 1:
        return loss_and_grads(params, batch, rngs)
    micro = sharding.micro_batches(batch, num_steps)

    def step(total: Any, inputs: Any) -> tuple[Any, None]:
        index, rows = inputs
        keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), rngs)
        return jax.tree.map(jnp.add, total, loss_and_grads(params, rows, keys)), None

    # Shapes alone: evaluating the first micro-batch outside the scan would compile the model twice.
    first = jax.eval_shape(loss_and_grads, params, jax.tree.map(lambda x: x[0], micro), rngs)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    total, _ = jax.lax.scan(step, zeros, (jnp.arange(num_steps, dtype=jnp.int32), micro))
    return jax.tree.map(lambda x: x / num_steps, total)

"""What a training run carries from step to step: state, optimizer with its schedule, moving average of weights."""

import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

# Weight decay is for matrices and convolution kernels alone. Which parameters the unreleased stage-2 trainer spared is
# unknown; sparing biases, norms, embeddings and positions is the custom of minGPT, on which the original is built.
_NO_DECAY = re.compile(r"(bias|scale|embedding|position)")


class Optimizer(NamedTuple):
    """Gradient transformation, learning rate by step, and micro-batches to average before one update."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    accumulation_steps: int


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; `rng` is folded with `step`, so that it never needs to be split.

    Stage 1 with an adversary also carries the discriminator's variables and the state of its optimizer.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema_params: Any
    rng: jax.Array
    skipped_steps: jax.Array
    discriminator: Any = None
    discriminator_opt_state: Any = None

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
      **updated: further fields of the state after the step, kept or dropped with the rest.

    Returns:
      The new state and {"gradient_norm", "learning_rate", "skipped_share"}, the last 1 for a skipped step, else 0.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.all(jnp.isfinite(jnp.stack([norm, *jax.tree.leaves(losses)])))
    updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = average_weights(ema_params, params, ema_decay, state.step)
    new = dict(params=params, model_state=model_state, opt_state=opt_state, ema_params=ema_params, **updated)
    old = {name: getattr(state, name) for name in new}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    # The optimizer counts its own updates.
    learning_rate = optimizer.learning_rate(state.step - state.skipped_steps)
    skipped = state.skipped_steps + jnp.where(finite, 0, 1)
    state = state.replace(step=state.step + 1, skipped_steps=skipped, **new)
    return state, {"gradient_norm": norm, "learning_rate": learning_rate, "skipped_share": 1.0 - finite}


def average_weights(average: Any, params: Any, decay: float, step: jax.Array | int | None = None) -> Any:
    """Exponential moving average of weights with decay min(decay, (1 + step) / (10 + step)), or `decay` without a step.

    As kakaobrain/rq-vae-transformer:ExponentialMovingAverage, whose trainer never calls it.
    """
    if step is not None:
        decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a * decay + (1 - decay) * p, average, params)


def make_optimizer(
    *,
    name: str = "adam",
    learning_rate: float,
    total_steps: int,
    b1: float = 0.9,
    b2: float = 0.999,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    hold_steps: int = 0,
    initial_learning_rate: float = 0.0,
    final_learning_rate: float = 0.0,
    clip_norm: float | None = None,
    accumulation_steps: int = 1,
) -> Optimizer:
    """Optimizer of one training stage.

    Args:
      name: "adam", "adamw" (decoupled decay of matrices and kernels only) or "sgd".
      learning_rate: the highest rate, reached after the warm-up.
      total_steps: length of the run, in updates.
      b1, b2: of Adam; momentum: of SGD.
      weight_decay: of AdamW.
      schedule: after warm-up and hold "cosine" down to `final_learning_rate` at `total_steps`, or "constant".
      warmup_steps: linear from `initial_learning_rate`, which is the rate of the first update, as in the original.
      hold_steps: at the highest rate between the warm-up and the cosine (the original's buffer).
      clip_norm: largest global gradient norm; None: no clipping.
      accumulation_steps: micro-batches averaged before an update.

    Raises:
      ValueError: a name or value that is not allowed.
    """
    _check_optimizer(SimpleNamespace(**locals()))
    peak, decay_steps = float(learning_rate), max(total_steps - warmup_steps - hold_steps, 1)
    if schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, decay_steps, final_learning_rate / peak)
    else:
        main = optax.constant_schedule(peak)
    rate, boundary = main, warmup_steps + hold_steps
    if boundary:
        warmup = optax.linear_schedule(initial_learning_rate if warmup_steps else peak, peak, max(warmup_steps, 1))
        rate = optax.join_schedules([warmup, main], [boundary])
    if name == "adam":
        base = optax.adam(rate, b1, b2)
    elif name == "adamw":
        base = optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=decay_mask)
    else:
        base = optax.sgd(rate, momentum or None)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm is not None else []
    return Optimizer(optax.chain(*clip, base), rate, accumulation_steps)


def _check_optimizer(optim: SimpleNamespace) -> None:
    """One line for the first setting that is not allowed."""
    if optim.name not in ("adam", "adamw", "sgd"):
        raise ValueError(f"optim.name: '{optim.name}' is unknown; allowed are 'adam', 'adamw' and 'sgd'")
    if optim.schedule not in ("cosine", "constant"):
        raise ValueError(f"optim.schedule: '{optim.schedule}' is unknown; allowed are 'cosine' and 'constant'")
    for setting, reader, chosen in (
        ("weight_decay", "adamw", optim.name),
        ("momentum", "sgd", optim.name),
        ("final_learning_rate", "cosine", optim.schedule),
    ):
        value = getattr(optim, setting)
        if value and chosen != reader:
            raise ValueError(f"optim.{setting}: {value} is read by '{reader}' only, not by '{chosen}'; set it to 0")
    if not optim.learning_rate > 0:
        raise ValueError(f"optim.learning_rate: {optim.learning_rate} must be above 0")
    if not 0 <= optim.final_learning_rate <= optim.learning_rate:
        raise ValueError(
            f"optim.final_learning_rate: {optim.final_learning_rate} is outside [0, {optim.learning_rate}], the peak"
        )
    if not 0 <= optim.warmup_steps <= optim.total_steps:
        raise ValueError(
            f"optim.warmup_steps: {optim.warmup_steps} is outside 0..{optim.total_steps}, the steps of the run"
        )
    left = optim.total_steps - optim.warmup_steps
    if not 0 <= optim.hold_steps <= left:
        raise ValueError(f"optim.hold_steps: {optim.hold_steps} is outside 0..{left}, the steps after the warm-up")
    if optim.hold_steps and optim.schedule != "cosine":
        raise ValueError(f"optim.hold_steps: {optim.hold_steps} is read by 'cosine' only; set it to 0")
    if not 0 <= optim.initial_learning_rate <= optim.learning_rate:
        raise ValueError(
            f"optim.initial_learning_rate: {optim.initial_learning_rate} is outside "
            f"[0, {optim.learning_rate}], the peak"
        )
    if optim.initial_learning_rate and not optim.warmup_steps:
        raise ValueError(
            f"optim.initial_learning_rate: {optim.initial_learning_rate} needs a warm-up; "
            "set it to 0 or set warmup_steps"
        )
    if optim.clip_norm is not None and not optim.clip_norm > 0:
        raise ValueError(f"optim.clip_norm: {optim.clip_norm} must be above 0, or None for no clipping")
    if optim.accumulation_steps < 1:
        raise ValueError(f"optim.accumulation_steps: {optim.accumulation_steps} must be at least 1")


def decay_mask(params: Any) -> Any:
    """True for matrices and convolution kernels; False for biases, norms, embeddings and positions."""

    def decays(path: Any, _: Any) -> bool:
        return not _NO_DECAY.search(str(path[-1].key))

    return jax.tree_util.tree_map_with_path(decays, params)


def accumulate_gradients(loss_and_grads: Any, params: Any, batch: Any, num_steps: int, rngs: Any) -> Any:
    """Mean over `num_steps` micro-batches of what `loss_and_grads(params, micro_batch, rngs)` returns.

    Micro-batch i holds every num_steps-th row from row i on: each device then slices its own rows of a sharded batch.
    """
    if num_steps == 1:
        return loss_and_grads(params, batch, rngs)
    micro = jax.tree.map(lambda x: x.reshape(-1, num_steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def step(total: Any, inputs: Any) -> tuple[Any, None]:
        index, rows = inputs
        keys = jax.tree.map(lambda key: jax.random.fold_in(key, index), rngs)
        return jax.tree.map(jnp.add, total, loss_and_grads(params, rows, keys)), None

    first = jax.eval_shape(loss_and_grads, params, jax.tree.map(lambda x: x[0], micro), rngs)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    total, _ = jax.lax.scan(step, zeros, (jnp.arange(num_steps), micro))
    return jax.tree.map(lambda x: x / num_steps, total)

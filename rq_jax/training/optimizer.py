"""Optimizers with their learning-rate schedules."""

import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import optax

# Weight decay is for matrices and convolution kernels alone. Which parameters the unreleased stage-2 trainer spared is
# unknown; sparing biases, norms, embeddings and positions is the custom of minGPT, on which the original is built.
_NO_DECAY = re.compile(r"(bias|scale|embedding|position)")


class Optimizer(NamedTuple):
    """Gradient transformation, learning rate by step, and micro-batches to average before one update."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    accumulation_steps: int


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

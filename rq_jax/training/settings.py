"""Config sections of a training run: the loop's own, durations in epochs, remedies for too little memory."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rq_jax.devices import sharding
from rq_jax.settings import checks
from rq_jax.settings.construct import construct

_LEAST = {
    "total_steps": 1,
    "log_every_steps": 1,
    "evaluate_every_steps": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
    "profile_first_step": 1,
    "keep_every_steps": 0,
    "early_stopping_evaluations": 0,
    "max_skipped_steps": 0,
    "hang_timeout_seconds": 0,
    "profile_steps": 0,
}


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """The config section `loop`, its durations resolved to steps.

    Attributes:
      total_steps: updates of the whole run.
      log_every_steps, evaluate_every_steps, checkpoint_every_steps: intervals; the last step has all three.
      keep_checkpoints: how many of the newest checkpoints stay.
      keep_every_steps: checkpoints of multiples of this stay too; 0: none do.
      keep_best: the weights of the best evaluation stay, as `best`: those of the lowest `criterion` of the recipe.
      early_stopping_evaluations: evaluations without a better one after which the run stops, and the best weights
        stay; 0: off.
      max_skipped_steps: steps in a row whose loss or gradient is not finite, and which change nothing, before the run
        stops; 0: never.
      hang_timeout_seconds: of one step, or one batch of an evaluation, after which the process dumps its stacks and
        ends with exit code 1; the first, which compiles, has 20 times as long. 0: off.
      profile_first_step, profile_steps: which steps are traced into `<workdir>/profile`; 0 steps: none.
      time_budget_seconds: of a new run, from `training.run` to its end; fewer steps are taken where all would last
        longer, see `training.budget`. None: all are taken.
    """

    total_steps: int
    log_every_steps: int = 100
    evaluate_every_steps: int = 1000
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    keep_best: bool = False
    early_stopping_evaluations: int = 0
    max_skipped_steps: int = 20
    hang_timeout_seconds: float = 0.0
    profile_first_step: int = 10
    profile_steps: int = 0
    time_budget_seconds: float | None = None

    def __post_init__(self):
        for name, least in _LEAST.items():
            checks.at_least(f"loop.{name}", getattr(self, name), least)
        if self.time_budget_seconds is not None:
            checks.above("loop.time_budget_seconds", self.time_budget_seconds, 0, fix="None sets no limit")
            checks.finite("loop.time_budget_seconds", self.time_budget_seconds)
        if self.keep_every_steps % self.checkpoint_every_steps:
            raise ValueError(
                f"loop.keep_every_steps: {self.keep_every_steps} is no multiple of loop.checkpoint_every_steps "
                f"{self.checkpoint_every_steps}, so that nothing would be kept; set it to a multiple, or to 0"
            )


class RecipeSettings(NamedTuple):
    """Settings of the config section `loop` that a recipe reads and not the loop.

    Attributes:
      ema_decay: of the weight average, 0 for none.
      use_latent_cache: read what a frozen tokenizer makes of the training set from disk.
      buckets: numbers of tokens that a batch is padded to, where images differ in it; (): to the most.
      bucket_window: batches among which images are grouped by their number of tokens.
    """

    ema_decay: float = 0.0
    use_latent_cache: bool = False
    buckets: tuple[int, ...] = ()
    bucket_window: int = 1


def resolve_durations(
    section: Mapping[str, Any], prefix: str, names: tuple[str, ...], steps_per_epoch: int
) -> dict[str, Any]:
    """Replace `<name>_epochs` by `<name>_steps` in a config section; of the two, one that is 0 gives way.

    Raises:
      ValueError: neither of the two is set, or both.
    """
    settings = dict(section)
    for name in names:
        steps, epochs = settings.get(f"{name}_steps"), settings.pop(f"{name}_epochs", None)
        both = f"{prefix}.{name}_steps and {prefix}.{name}_epochs are both"
        if steps is None and epochs is None:
            raise ValueError(f"{both} unset; set one of them")
        if steps and epochs:
            raise ValueError(f"{both} set, to {steps} and {epochs}; set one of them to 0")
        settings[f"{name}_steps"] = steps or round((epochs or 0) * steps_per_epoch)
    return settings


def check_sections(config: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Check that a config has exactly the allowed sections.

    Raises:
      ValueError: an unknown or a missing section.
    """
    for name in config:
        if name not in allowed:
            raise ValueError(f"config.{name}: unknown; allowed are {', '.join(allowed)}")
    for name in allowed:
        if name not in config:
            raise ValueError(f"config.{name}: missing; the config needs {', '.join(allowed)}")


def check_start(init_from: str | None, keep_optimizer: bool) -> None:
    """Check the settings of what a fresh run starts from.

    Raises:
      ValueError: an optimizer to keep, and no run whose it is.
    """
    if keep_optimizer and not init_from:
        raise ValueError("keep_optimizer: True needs init_from, a run whose optimizer is kept; set both or neither")


def memory_remedies(recipe: Any, batch_size: int) -> list[str]:
    """Settings that reduce the memory of a step, the cheapest first.

    Args:
      recipe: a `training.loop.Recipe`.
      batch_size: of all devices together.
    """
    remedies, mesh = [], recipe.mesh
    if not recipe.model.use_remat:
        remedies.append("--config.model.use_remat=True")
    steps = recipe.optimizer.accumulation_steps
    parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    is_divisible = batch_size % (2 * steps * parts) == 0
    # Along fsdp a step with micro-batches holds whole gradients, which one without them does not.
    if steps > 1 and mesh.shape["fsdp"] > 1 and not recipe.optimizer.use_sharded_gradients:
        remedies.append("--config.optim.use_sharded_gradients=True")
    if recipe.accumulates and is_divisible and (steps > 1 or mesh.shape["fsdp"] == 1):
        remedies.append(f"--config.optim.accumulation_steps={2 * steps}")
    if mesh.shape["fsdp"] < mesh.devices.size:
        remedies.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh.devices.size}")
    if is_divisible:
        remedies.append(f"--config.data.batch_size={batch_size // 2}")
    return remedies or ["more devices"]


def loop_settings(section: Mapping[str, Any], steps_per_epoch: int) -> LoopSettings:
    """The loop's settings in the config section `loop`, without those of the recipe, which stand there too."""
    settings = resolve_durations(section, "loop", ("total",), steps_per_epoch)
    recipe_settings(section)
    own = {name: value for name, value in settings.items() if name not in RecipeSettings._fields}
    return construct(LoopSettings, "loop", own)


def recipe_settings(section: Mapping[str, Any]) -> RecipeSettings:
    """The recipe's settings in the config section `loop`."""
    given = {name: section[name] for name in RecipeSettings._fields if name in section}
    return construct(RecipeSettings, "loop", given)


def plain(config: Any) -> Any:
    """A config, such as an `ml_collections.ConfigDict`, as nested dicts of plain values."""
    return {name: plain(value) for name, value in config.items()} if hasattr(config, "items") else config

"""From config sections to constructors."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rq_jax.devices import sharding

logger = logging.getLogger(__name__)


def resolve_durations(
    section: Mapping[str, Any], prefix: str, names: tuple[str, ...], steps_per_epoch: int
) -> dict[str, Any]:
    """Replace `<name>_epochs` by `<name>_steps` in a config section; 0 gives way to the other of the two.

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
            raise ValueError(f"{both} set, to {steps} and {epochs}; set the one that is not wanted to 0")
        settings[f"{name}_steps"] = steps or round((epochs or 0) * steps_per_epoch)
    return settings


def check_sections(config: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Refuse a config with sections that nothing reads, or without one that is needed.

    Raises:
      ValueError: naming the section.
    """
    for name in config:
        if name not in allowed:
            raise ValueError(f"config.{name}: unknown; allowed are {', '.join(allowed)}")
    for name in allowed:
        if name not in config:
            raise ValueError(f"config.{name}: missing; the config needs {', '.join(allowed)}")


def call(function: Callable[..., Any], section: str, settings: Mapping[str, Any], **others: Any) -> Any:
    """Call a constructor with its config section.

    Raises:
      ValueError: a key that it does not take, or one without a default that is unset.
    """
    allowed = {name: p for name, p in inspect.signature(function).parameters.items() if name not in others}
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ValueError(f"config.{section}.{unknown[0]}: unknown; allowed are {', '.join(sorted(allowed))}")
    for name, parameter in allowed.items():
        if parameter.default is parameter.empty and settings.get(name) is None:
            raise ValueError(f"config.{section}.{name}: unset and without a default; set it")
    return function(**settings, **others)


def memory_remedies(config: Mapping[str, Any], mesh: jax.sharding.Mesh, accumulates: bool = False) -> list[str]:
    """Settings that make a step smaller, the cheapest first; `accumulates`: the stage takes a batch in parts."""
    found = []
    if not config["model"]["use_remat"]:
        found.append("--config.model.use_remat=True")
    steps, batch, devices = config["optim"]["accumulation_steps"], config["data"]["batch_size"], mesh.devices.size
    split = int(np.prod([mesh.shape[axis] for axis in sharding.BATCH_AXES]))
    if accumulates and batch % (2 * steps * split) == 0:
        found.append(f"--config.optim.accumulation_steps={2 * steps}")
    if mesh.shape["fsdp"] < devices:
        found.append(f"--config.mesh.data=1 --config.mesh.fsdp={devices}")
    if batch % (2 * steps * split) == 0:
        found.append(f"--config.data.batch_size={batch // 2}")
    return found or ["more devices"]

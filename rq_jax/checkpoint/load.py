"""From a directory to a model.

A run directory is self-contained:

    config.json          the resolved config
    checkpoints/<step>/  the states of the run, see `saver`
    best/<step>/         weights of the best evaluation, with loop.keep_best or early stopping
    tokenizer/           stage 2 only: the tokenizer as a model directory
    discriminator/       converted checkpoints only: the discriminator of stage 1 as a model directory

A model directory holds weights alone, see `model_dir`.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from rq_jax import models
from rq_jax.checkpoint import manifest
from rq_jax.checkpoint.model_dir import (
    CONFIG,
    WEIGHTS,
    fingerprint,
    read_config,
    read_weights,
    save_model,
)
from rq_jax.checkpoint.saver import (
    BEST,
    CHECKPOINTS,
    DISCRIMINATOR,
    check_fits,
    newest_whole,
    shapes_of,
    split,
    steps_of,
)

_TOKENIZER = "tokenizer"
_LOG = "metrics.jsonl"


class LoadedModel(NamedTuple):
    """A model with its variables and resolved config, and the tokenizer of a stage-2 model (else None)."""

    model: nn.Module
    variables: dict[str, Any]
    config: dict[str, Any]
    tokenizer: "LoadedModel | None"


def ship(workdir: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Write the best weights of a run, and of its tokenizer, as model directories in half precision, with their logs.

    Args:
      workdir: of a run of either stage.
      directory: made where it is missing. What the config says of a path to the tokenizer is left out: it lies beside.

    Raises:
      FileNotFoundError: no run, or no checkpoint in it.
    """
    workdir, directory = Path(workdir), Path(directory)
    loaded = load_model(workdir)
    for found, name in ((loaded, "."), (loaded.tokenizer, _TOKENIZER)):
        if found is None:
            continue
        config = {**found.config, "tokenizer": None} if "tokenizer" in found.config else found.config
        save_model(directory / name, config, found.variables, "float16")
    logs = [(workdir, directory)]
    if loaded.config.get("tokenizer"):  # where stage 1 was trained
        logs.append((Path(loaded.config["tokenizer"]), directory / _TOKENIZER))
    for source, target in logs:
        if (source / _LOG).is_file():
            shutil.copyfile(source / _LOG, target / _LOG)


def load_model(directory: str | os.PathLike, step: int | None = None, ema: bool = True) -> LoadedModel:
    """Load a model for evaluation, sampling or stage 2.

    Args:
      directory: of a training run or a model directory.
      step: of a checkpoint; None: the best where one was kept, else the newest.
      ema: the averaged weights, where the run keeps an average.

    Returns:
      `LoadedModel`, its arrays on the host in float32 as saved.

    Raises:
      FileNotFoundError: no such directory, or no checkpoint (of that step) in it.
    """
    directory = Path(directory).absolute()
    config = read_config(directory)
    model = models.create(**config["model"])
    template = models.abstract_variables(model)
    if (directory / WEIGHTS).is_file():
        if step is not None:
            raise FileNotFoundError(
                f"'{directory}' is a model directory without steps, but step is {step}; leave it out"
            )
        variables = read_weights(directory / WEIGHTS, template)
    else:
        variables = _read_checkpoint(directory, step, ema, template)
    tokenizer = load_model(directory / _TOKENIZER) if (directory / _TOKENIZER).is_dir() else None
    return LoadedModel(model, variables, config, tokenizer)


def load_tokenizer(directory: str | os.PathLike, step: int | None = None, ema: bool = True) -> LoadedModel:
    """Load a tokenizer, such as the one that stage 2 is to build on; arguments as for `load_model`.

    Raises:
      FileNotFoundError: no run directory.
      ValueError: a run of another kind of model.
    """
    read_tokenizer_config(directory)
    return load_model(directory, step, ema)


def read_tokenizer_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The resolved config of a tokenizer.

    Raises:
      FileNotFoundError: no run directory.
      ValueError: a run of another kind of model.
    """
    config = read_config(directory)
    name = config["model"]["name"]
    if name != "rqvae":
        raise ValueError(
            f"tokenizer: '{directory}' holds a '{name}', not a stage-1 run ('rqvae'); give the stage-1 --workdir"
        )
    return config


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a run directory holds a whole checkpoint to go on from."""
    return bool(steps_of(Path(directory) / CHECKPOINTS))


def start_from(directory: str | os.PathLike, state: Any, keep_optimizer: bool = False) -> Any:
    """A state at step 0 with the weights, codebook and, where there is one, the discriminator of a checkpoint.

    With a fresh optimizer the weights are those that `load_model` gives (averaged, where the run keeps an average);
    with a kept one they are those as trained, for which its moments are. Schedules start anew in both cases.

    Args:
      directory: of a training run or a model directory.
      state: a `TrainState` at step 0, placed on its devices; gives structure and shardings.
      keep_optimizer: go on with the moments of the optimizers.

    Returns:
      The state. A discriminator that the checkpoint does not have stays as drawn.

    Raises:
      FileNotFoundError: no such directory, or no checkpoint in it.
      ValueError: other arrays than those of `state`, or an optimizer is to be kept where there is none.
    """
    directory, hint = Path(directory).absolute(), "set config.model to the settings in its config.json"
    is_run = not (directory / WEIGHTS).is_file()
    if keep_optimizer and not is_run:
        raise ValueError(f"keep_optimizer: '{directory}' holds weights alone; leave it out, or give a training run")
    if not keep_optimizer:
        variables = load_model(directory).variables
        expected, found = shapes_of(state.variables), shapes_of(variables)
        if expected != found:
            name = min(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(
                f"init_from: '{directory}': '{name}' has shape {found.get(name)}, the config needs "
                f"{expected.get(name)}; {hint}"
            )
        params = variables.pop("params")
        new = {"params": params, "model_state": variables}
        if state.discriminator is not None:
            found = _find_discriminator(directory, state.discriminator)
            new |= {} if found is None else {DISCRIMINATOR: found}
    else:
        new = _read_run(directory, state, hint)
    if state.ema_params is not None:
        new["ema_params"] = new.get("ema_params", new["params"])
    placed = {name: jax.tree.map(_place_like, tree, getattr(state, name)) for name, tree in new.items()}
    return state.replace(**placed)


def bind_tokenizer(workdir: str | os.PathLike, tokenizer: LoadedModel) -> str:
    """Put a copy of the tokenizer into a stage-2 run directory, or check that it is the one already there.

    Returns:
      Its fingerprint.

    Raises:
      ValueError: the run was started with another tokenizer.
    """
    directory, new = Path(workdir) / _TOKENIZER, fingerprint(tokenizer.variables)
    if not (directory / CONFIG).is_file():
        save_model(directory, tokenizer.config, tokenizer.variables)
        return new
    old = fingerprint(load_model(directory).variables)
    if old != new:
        raise ValueError(
            f"tokenizer: fingerprint {new} differs from {old}, with which the run in '{workdir}' was started; "
            "give that tokenizer or a new --workdir"
        )
    return new


def _read_checkpoint(directory: Path, step: int | None, ema: bool, template: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    path = _find_checkpoint(directory, step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), template)
    params = "ema_params" if ema and (path / "ema_params").is_dir() else "params"
    items = {params: template["params"]}
    model_state = {name: tree for name, tree in template.items() if name != "params"}
    if model_state:
        items["model_state"] = model_state
    with ocp.StandardCheckpointer() as checkpointer:
        restored = {name: checkpointer.restore(path / name, tree) for name, tree in items.items()}
    return jax.tree.map(np.asarray, {"params": restored[params], **restored.get("model_state", {})})


def _find_checkpoint(directory: Path, step: int | None) -> Path:
    """The checkpoint of a step; without one the best, or else the newest, that is whole.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or all are.
    """
    roots = [directory / BEST, directory / CHECKPOINTS]
    there = sorted(old for root in roots for old in steps_of(root))
    if step not in there and not (step is None and there):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"'{directory}' holds no {wanted}; there are steps {there or '(none)'}")
    if step is not None:
        paths = [root / str(step) for root in roots if step in steps_of(root)]
        found = {path: manifest.problems(path) for path in paths}
        for path in paths:
            if not found[path]:
                return path
        raise ValueError(f"'{paths[0]}' is damaged: {found[paths[0]][0]}; choose another of the steps {there}")
    for root in roots:
        if (newest := newest_whole(root)) is not None:
            return root / str(newest)
    raise ValueError(f"'{directory}': no checkpoint is whole, of steps {there}; restore one from a copy or train again")


def _read_run(directory: Path, state: Any, hint: str) -> dict[str, Any]:
    """What a run's newest checkpoint holds of the fields of `state`, with schedules set back to their start."""
    import optax
    import orbax.checkpoint as ocp

    read_config(directory)
    newest = newest_whole(directory / CHECKPOINTS)
    if newest is None:
        raise FileNotFoundError(f"'{directory}' holds no checkpoint that is whole; keep_optimizer needs one")
    path, items = directory / CHECKPOINTS / str(newest), split(state)
    check_fits(path, items, f"init_from with keep_optimizer needs the same model, optimizer and average; {hint}")
    with ocp.StandardCheckpointer() as checkpointer:
        new = {name: checkpointer.restore(path / name, tree) for name, tree in items.items()}
    training = new.pop("training")
    for name in ("opt_state", "discriminator_opt_state"):
        if name in training:
            new[name] = jax.tree.map(
                lambda node: optax.ScaleByScheduleState(jax.numpy.zeros_like(node.count))
                if isinstance(node, optax.ScaleByScheduleState) else node,
                training[name],
                is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState),
            )  # fmt: skip
    return new


def _find_discriminator(directory: Path, template: dict[str, Any]) -> dict[str, Any] | None:
    """The discriminator beside a model's weights, or None."""
    if (directory / DISCRIMINATOR).is_dir():
        return load_model(directory / DISCRIMINATOR).variables
    newest = newest_whole(directory / CHECKPOINTS)
    path = None if newest is None else directory / CHECKPOINTS / str(newest) / DISCRIMINATOR
    if path is None or not path.is_dir():
        return None
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, template)


def _place_like(leaf: Any, like: jax.Array) -> jax.Array:
    """A copy of a leaf where `like` lies; states are donated, so that no two leaves may share memory."""
    return jax.device_put(jax.numpy.array(leaf), like.sharding)

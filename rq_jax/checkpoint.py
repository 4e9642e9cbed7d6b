"""Checkpoints of a run (Orbax, asynchronous, atomic) and the way back from a directory to a model.

A run directory is self-contained:

    config.json          the resolved config
    checkpoints/<step>/  params, ema_params, model_state, discriminator, training (optimizers, step, key),
                         host (data position ...)
    best/<step>/         weights of the best evaluation, where early stopping is on
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
from rq_jax.model_dir import (
    CONFIG,
    WEIGHTS,
    fingerprint,
    named_leaves,
    read_config,
    read_weights,
    save_model,
    write_config,
)

__all__ = [
    "Checkpointer",
    "LoadedModel",
    "bind_tokenizer",
    "fingerprint",
    "has_checkpoint",
    "load_model",
    "load_tokenizer",
    "read_config",
    "save_model",
    "ship",
    "start_from",
    "write_config",
]

_TOKENIZER = "tokenizer"
_DISCRIMINATOR = "discriminator"
_CHECKPOINTS, _BEST = "checkpoints", "best"


class LoadedModel(NamedTuple):
    """A model with its variables and resolved config, and the tokenizer of a stage-2 model (else None)."""

    model: nn.Module
    variables: dict[str, Any]
    config: dict[str, Any]
    tokenizer: "LoadedModel | None"


class Checkpointer:
    """Saves and restores the states of one run directory; used as a context manager, it waits for pending saves."""

    def __init__(self, directory: str | os.PathLike, keep: int = 1):
        """Keep the newest `keep` checkpoints of `directory`/checkpoints and the one best of `directory`/best."""
        self._root = Path(directory).absolute()
        self._manager = _manager(self._root / _CHECKPOINTS, keep)
        self._best = None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: Any, host: dict[str, Any]) -> None:
        """Start to save a `TrainState` under its step, with what the host knows (JSON). No-op if it is there."""
        step = int(state.step)
        if step == self.latest_step:
            return
        import orbax.checkpoint as ocp

        items = {name: ocp.args.StandardSave(tree) for name, tree in _split(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**items, host=ocp.args.JsonSave(host)))

    def save_best(self, state: Any) -> None:
        """Save the weights alone as the best so far."""
        import orbax.checkpoint as ocp

        if self._best is None:
            self._best = _manager(self._root / _BEST, 1)
        step = int(state.step)
        # Orbax skips a step that is not above the newest: one that a killed run left behind would stay the best.
        for later in [old for old in self._best.all_steps() if old >= step]:
            self._best.delete(later)
        items = {
            name: ocp.args.StandardSave(tree) for name, tree in _split(state).items() if name != "training"
        }
        self._best.save(step, args=ocp.args.Composite(**items))

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint in the structure and shardings of `state`, and what the host knew.

        Raises:
          ValueError: the checkpoint has other arrays than `state`.
        """
        import orbax.checkpoint as ocp

        items, step = _split(state), self.latest_step
        hint = "go on with the config that the run was started with or give a new --workdir"
        _check_fits(self._manager.directory / str(step), items, hint)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args, host=ocp.args.JsonRestore()))
        trees = {name: restored[name] for name in items}
        training = trees.pop("training")
        return state.replace(**training, **trees), restored["host"]

    def wait(self) -> None:
        """Until everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        if self._best is not None:
            self._best.wait_until_finished()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()
        if self._best is not None:
            self._best.close()


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
    if (workdir / "metrics.jsonl").is_file():
        shutil.copyfile(workdir / "metrics.jsonl", directory / "metrics.jsonl")


def load_model(directory: str | os.PathLike, step: int | None = None, ema: bool = True) -> LoadedModel:
    """Load a model for evaluation, sampling or stage 2.

    Args:
      directory: of a training run or a model directory.
      step: of a checkpoint; None: the best where early stopping kept one, else the newest.
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
    name = read_config(directory)["model"]["name"]
    if name != "rqvae":
        raise ValueError(
            f"tokenizer: '{directory}' holds a '{name}', not a stage-1 run ('rqvae'); give the stage-1 --workdir"
        )
    return load_model(directory, step, ema)


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a run directory holds a whole checkpoint to go on from."""
    return bool(_steps(Path(directory) / _CHECKPOINTS))


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
        expected, found = _shapes(state.variables), _shapes(variables)
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
            new |= {} if found is None else {_DISCRIMINATOR: found}
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


def _manager(directory: Path, keep: int):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)


def _split(state: Any) -> dict[str, Any]:
    """The items of a checkpoint; what is empty is no item."""
    fields = {name: getattr(state, name) for name in ("params", "ema_params", "model_state", _DISCRIMINATOR)}
    training = {name: getattr(state, name) for name in ("step", "opt_state", "rng", "skipped_steps")}
    if state.discriminator_opt_state is not None:
        training["discriminator_opt_state"] = state.discriminator_opt_state
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)} | {"training": training}


def _check_fits(path: Any, items: dict[str, Any], hint: str) -> None:
    """Refuse a checkpoint with other arrays than the trees of `items`; the hint says what to do."""
    import orbax.checkpoint as ocp

    handler = ocp.StandardCheckpointHandler()
    for item, tree in items.items():
        expected = _shapes(tree)
        found = _shapes(handler.metadata(path / item).tree) if (path / item).is_dir() else {}
        if expected != found:
            name = min(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(
                f"'{path}': '{item}/{name}' has shape {found.get(name)}, the config needs {expected.get(name)}; {hint}"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def shape(leaf: Any) -> tuple[int, ...]:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # saved as its numbers
        return jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape

    return {name: shape(leaf) for name, leaf in named_leaves(tree)}


def _steps(root: Path) -> list[int]:
    """The whole checkpoints in a directory; one that was being written has a longer name."""
    return sorted(int(path.name) for path in root.glob("*") if path.name.isdigit())


def _read_checkpoint(
    directory: Path, step: int | None, ema: bool, template: dict[str, Any]
) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    best, steps = _steps(directory / _BEST), _steps(directory / _CHECKPOINTS)
    if step is None and (best or steps):
        step = (best or steps)[-1]
    if step not in best + steps:
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"'{directory}' holds no {wanted}; there are steps {sorted(best + steps) or '(none)'}")
    path = directory / (_BEST if step in best else _CHECKPOINTS) / str(step)
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


def _read_run(directory: Path, state: Any, hint: str) -> dict[str, Any]:
    """What a run's newest checkpoint holds of the fields of `state`, with schedules set back to their start."""
    import optax
    import orbax.checkpoint as ocp

    read_config(directory)
    steps = _steps(directory / _CHECKPOINTS)
    if not steps:
        raise FileNotFoundError(f"'{directory}' holds no checkpoint; keep_optimizer needs one")
    path, items = directory / _CHECKPOINTS / str(steps[-1]), _split(state)
    _check_fits(path, items, f"init_from with keep_optimizer needs the same model, optimizer and average; {hint}")
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
    if (directory / _DISCRIMINATOR).is_dir():
        return load_model(directory / _DISCRIMINATOR).variables
    steps = _steps(directory / _CHECKPOINTS)
    path = directory / _CHECKPOINTS / str(steps[-1]) / _DISCRIMINATOR if steps else None
    if path is None or not path.is_dir():
        return None
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, template)


def _place_like(leaf: Any, like: jax.Array) -> jax.Array:
    """A copy of a leaf where `like` lies; states are donated, so that no two leaves may share memory."""
    return jax.device_put(jax.numpy.array(leaf), like.sharding)

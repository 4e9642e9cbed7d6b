"""Loading models from run directories and model directories.

A run directory is self-contained:

    config.json          the resolved config
    checkpoints/<step>/  the states of the run, see `saver`
    best/<step>/         weights of the best evaluation, with loop.keep_best or early stopping
    tokenizer/           stage 2 only: the tokenizer as a model directory
    discriminator/       converted checkpoints only: the discriminator of stage 1 as a model directory

A model directory holds weights alone, see `model_dir`.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from rq_jax import models
from rq_jax.checkpoint import items, manifest, tensors
from rq_jax.checkpoint.config import CONFIG, build_model, read_config
from rq_jax.checkpoint.hub import is_address, local_directory
from rq_jax.checkpoint.model_dir import (
    PROMPTS,
    TEXT_TOKENIZER,
    WEIGHTS,
    fingerprint,
    first_difference,
    holds_weights,
    read_weights,
    save_model,
)
from rq_jax.checkpoint.remote import checkpoints_of
from rq_jax.checkpoint.saver import (
    BEST,
    CHECKPOINTS,
    DISCRIMINATOR,
    newest_whole,
    split,
    steps_of,
)
from rq_jax.files import local_path, run_path, write_atomic

_TOKENIZER = "tokenizer"
_LOG = "metrics.jsonl"
_LEFT_BEHIND = ("tokenizer", "init_from", "thresholds")  # of a config; thresholds stand in `model` too
_SAME_MODEL = "set config.model to the settings in its config.json"
_LEFT_BEHIND_OF = {"data": ("text_tokenizer",), "perceptual": ("vgg", "heads")}  # of its sections


class LoadedModel(NamedTuple):
    """A model with its variables and resolved config, and the tokenizer of a stage-2 model (else None)."""

    model: nn.Module
    variables: dict[str, Any]
    config: dict[str, Any]
    tokenizer: "LoadedModel | None"


def ship(workdir: str | os.PathLike, directory: str | os.PathLike, shard_bytes: int = tensors.SHARD_BYTES) -> None:
    """Write the best weights of a run and its tokenizer as model directories, parameters in half precision, with logs.

    The text tokenizer and prompts of a run by text come along. Configs leave out the paths of what comes along, and of
    what training started from.

    Args:
      workdir: of a run of either stage.
      directory: created if missing.
      shard_bytes: of the weights in a file, at most.

    Raises:
      FileNotFoundError: no run, or no checkpoint in it.
    """
    loaded, workdir, directory = load_model(workdir), local_directory(workdir), local_path(directory)
    for model, name in ((loaded, "."), (loaded.tokenizer, _TOKENIZER)):
        if model is None:
            continue
        save_model(directory / name, _without_paths(model.config), model.variables, "float16", shard_bytes)
    files = [(workdir / name, directory / name) for name in (_LOG, TEXT_TOKENIZER, PROMPTS)]
    stage1 = loaded.config.get("tokenizer")
    if stage1 and not is_address(stage1):
        with contextlib.suppress(OSError):  # it may be gone
            files.append((local_directory(stage1) / _LOG, directory / _TOKENIZER / _LOG))
    for source, target in files:
        if source.is_file():
            write_atomic(target, source.read_bytes())


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the paths of a machine that a shipped model does not need."""
    config = {name: None if name in _LEFT_BEHIND else value for name, value in config.items()}
    if "keep_optimizer" in config:
        config["keep_optimizer"] = False  # it belongs to init_from
    for section, names in _LEFT_BEHIND_OF.items():
        if isinstance(values := config.get(section), dict):
            config[section] = {name: None if name in names else value for name, value in values.items()}
    return config


def load_model(
    directory: str | os.PathLike,
    step: int | None = None,
    ema: bool = True,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> LoadedModel:
    """Load a model for evaluation, sampling or stage 2.

    Args:
      directory: of a training run or a model directory, an address of the Hub, "hf://owner/name", or one in an object
        store, "gs://bucket/run".
      step: of a checkpoint; None takes the best if the run has one, else the newest.
      ema: take the averaged weights, if the run keeps an average.
      device: a device or a sharding to put the variables on, the tokenizer's too; None leaves them on the host, from
        where each call uploads them.

    Returns:
      The model; its variables are float32, as saved: NumPy arrays where no device is given.

    Raises:
      FileNotFoundError: no such directory, or no checkpoint (of that step) in it.
      ValueError: what is there is damaged, or an address leads nowhere.
    """
    config, directory = read_config(directory), local_directory(directory).absolute()
    loaded = _load_one(directory, config, step, ema)
    if (directory / _TOKENIZER).is_dir():
        # A tokenizer has none: a link from the directory to itself leads nowhere.
        config = read_tokenizer_config(directory / _TOKENIZER)
        loaded = loaded._replace(tokenizer=_put(_load_one(directory / _TOKENIZER, config), device))
    return _put(loaded, device)


def _put(loaded: LoadedModel, device: jax.Device | jax.sharding.Sharding | None) -> LoadedModel:
    return loaded if device is None else loaded._replace(variables=jax.device_put(loaded.variables, device))


def _load_one(directory: Path, config: dict[str, Any], step: int | None = None, ema: bool = True) -> LoadedModel:
    """Load the model of a directory, without its tokenizer."""
    model, template = build_model(directory, config)
    if holds_weights(directory):
        if step is not None:
            raise FileNotFoundError(
                f"'{directory}' is a model directory without steps, but step is {step}; leave it out"
            )
    return LoadedModel(model, _read_variables(directory, template, step, ema), config, None)


def load_tokenizer(
    directory: str | os.PathLike,
    step: int | None = None,
    ema: bool = True,
    device: jax.Device | jax.sharding.Sharding | None = None,
) -> LoadedModel:
    """Load a stage-1 model; arguments as for `load_model`.

    Raises:
      FileNotFoundError: no run directory.
      ValueError: the directory holds another kind of model.
    """
    read_tokenizer_config(directory)
    return load_model(directory, step, ema, device)


def read_tokenizer_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The resolved config of a tokenizer.

    Raises:
      FileNotFoundError: no run directory.
      ValueError: a run of another kind of model.
    """
    config = read_config(directory)
    name = config["model"]["name"]
    if name not in models.TOKENIZERS:
        kinds = " or ".join(f"'{kind}'" for kind in models.TOKENIZERS)
        raise ValueError(
            f"tokenizer: '{directory}' holds a '{name}', not a stage-1 run ({kinds}); give the stage-1 --workdir"
        )
    return config


def step_of(directory: str | os.PathLike, step: int | None = None, ema: bool = True) -> int | None:
    """The step of the checkpoint that `load_model` takes; None of a model directory, which has no steps.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    directory = local_directory(directory).absolute()
    return None if holds_weights(directory) else int(_find_checkpoint(directory, step, ema).name)


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a run directory holds a checkpoint to resume from."""
    return bool(steps_of(run_path(directory) / CHECKPOINTS))


def start_from(directory: str | os.PathLike, state: Any, keep_optimizer: bool = False) -> Any:
    """Initialise a state from a checkpoint: weights, codebook and, if there is one, discriminator, at step 0.

    With a fresh optimizer the weights are those of `load_model` (averaged, if the run keeps an average). With
    `keep_optimizer` they are the weights as trained, to which the moments belong. Schedules restart in both cases.
    A run's arrays are read by each process onto its own devices, as `state` splits them.

    Args:
      directory: of a training run or a model directory, or an address of the Hub.
      state: a `TrainState` at step 0, placed on its devices; gives structure and shardings.
      keep_optimizer: continue with the moments of the optimizers.

    Returns:
      The state. Without a discriminator in the checkpoint, that of `state` stays as initialised.

    Raises:
      FileNotFoundError: no such directory, or no checkpoint in it.
      ValueError: names or shapes differ from those of `state`, or there is no optimizer to keep.
    """
    check_start_from(directory, state, keep_optimizer)
    directory = local_directory(directory).absolute()
    if not keep_optimizer:
        variables = _read_variables(directory, state.variables)
        params = variables.pop("params")
        new = {"params": params, "model_state": variables}
        if state.discriminator is not None:
            discriminator = _read_discriminator(directory, state.discriminator, _SAME_MODEL)
            new |= {} if discriminator is None else {DISCRIMINATOR: discriminator}
    else:
        new = _read_run(directory, state, _SAME_MODEL)
    placed = {name: jax.tree.map(_place_like, tree, getattr(state, name)) for name, tree in new.items()}
    if state.ema_params is not None and "ema_params" not in placed:
        # Copied: states are donated, and no two leaves may share memory.
        placed["ema_params"] = jax.tree.map(jax.numpy.copy, placed["params"])
    return state.replace(**placed)


def check_start_from(directory: str | os.PathLike, state: Any, keep_optimizer: bool = False) -> None:
    """Refuse what `start_from` would refuse of a model, by its config alone.

    Args:
      directory, state, keep_optimizer: as for `start_from`; shapes of the state will do.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: names or shapes of the variables differ from those of `state`, or there is no optimizer to keep.
    """
    config, directory = read_config(directory), local_directory(directory).absolute()
    if keep_optimizer and holds_weights(directory):
        raise ValueError(f"keep_optimizer: '{directory}' holds weights alone; leave it out, or give a training run")
    _check_same(directory, config, state.variables, _SAME_MODEL)


def tokenizer_of(directory: str | os.PathLike) -> str | None:
    """Fingerprint of the tokenizer whose codes a stage-2 model was trained on; None where it has none beside it."""
    directory = local_directory(directory) / _TOKENIZER
    return fingerprint(load_model(directory).variables) if (directory / CONFIG).is_file() else None


def bind_tokenizer(workdir: str | os.PathLike, tokenizer: LoadedModel) -> str:
    """Copy the tokenizer into a stage-2 run directory, or check that the copy there is of the same tokenizer.

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


def _read_variables(
    directory: Path, template: dict[str, Any], step: int | None = None, ema: bool = True
) -> dict[str, Any]:
    """Variables of a model or run directory in the structure of a template.

    Those of a run are read onto the devices of the template's arrays, or into the host's memory where it holds shapes.
    """
    if holds_weights(directory):
        return read_weights(directory / WEIGHTS, template)
    path = _find_checkpoint(directory, step, ema)
    params = _params_item(path, ema)
    trees = {params: template["params"]}
    model_state = {name: tree for name, tree in template.items() if name != "params"}
    if model_state:
        trees["model_state"] = model_state
    restored = items.restore(path, trees)
    return {"params": restored[params], **restored.get("model_state", {})}


def _params_item(path: Path, ema: bool) -> str:
    """The item of a checkpoint that holds the weights."""
    return "ema_params" if ema and (path / "ema_params").is_dir() else "params"


def _find_checkpoint(directory: Path, step: int | None, ema: bool) -> Path:
    """Path of the checkpoint of a step; without a step of the best, or else the newest, whose variables are whole.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is damaged; without a step, all are.
    """

    def reads(path: Path) -> tuple[str, str]:
        return _params_item(path, ema), "model_state"

    roots = [checkpoints_of(directory) / name for name in (BEST, CHECKPOINTS)]
    steps = sorted(old for root in roots for old in steps_of(root))
    if step not in steps and not (step is None and steps):
        missing = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"'{directory}' holds no {missing}; there are steps {steps or '(none)'}")
    if step is not None:
        # A step may be in both stores: either will do.
        paths = [root / str(step) for root in roots if step in steps_of(root)]
        problems = {path: manifest.problems(path, reads(path)) for path in paths}
        for path in paths:
            if not problems[path]:
                return path
        raise ValueError(f"'{paths[0]}' is damaged: {problems[paths[0]][0]}; choose another of the steps {steps}")
    for root in roots:
        if (newest := newest_whole(root, reads=reads)) is not None:
            return root / str(newest)
    raise ValueError(f"'{directory}': no checkpoint is whole, of steps {steps}; restore one from a copy or train again")


def _read_run(directory: Path, state: Any, hint: str) -> dict[str, Any]:
    """Read the fields of `state` from a run's newest checkpoint, with schedules set back to their start."""
    import optax

    read_config(directory)
    store = checkpoints_of(directory) / CHECKPOINTS
    newest = newest_whole(store)
    if newest is None:
        raise FileNotFoundError(f"'{directory}' holds no checkpoint that is whole; keep_optimizer needs one")
    path, trees = store / str(newest), split(state)
    needs = "init_from with keep_optimizer needs the same model, optimizer (optim.name) and average"
    items.check_fits(path, items.shapes_of_items(trees), f"{needs}; {hint}")
    new = items.restore(path, trees)
    training = new.pop("training")

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def restart(fresh: Any, saved: Any) -> Any:
        return fresh if is_schedule(fresh) else saved

    for name in ("opt_state", "discriminator_opt_state"):
        if name in training:
            new[name] = jax.tree.map(restart, getattr(state, name), training[name], is_leaf=is_schedule)
    return new


def _read_discriminator(directory: Path, template: dict[str, Any], hint: str) -> dict[str, Any] | None:
    """Read the discriminator beside a model's weights; None if there is none."""
    beside = directory / DISCRIMINATOR
    if beside.is_dir():
        _check_same(beside, read_config(beside), template, hint)
        return _read_variables(beside, template)
    store = checkpoints_of(directory) / CHECKPOINTS
    newest = newest_whole(store, reads=lambda path: [DISCRIMINATOR])
    path = None if newest is None else store / str(newest)
    if path is None or not (path / DISCRIMINATOR).is_dir():
        return None
    return items.restore(path, {DISCRIMINATOR: template})[DISCRIMINATOR]


def _check_same(directory: Path, config: dict[str, Any], variables: dict[str, Any], hint: str) -> None:
    """The model of a directory has the names and shapes of some variables.

    Raises:
      ValueError: naming the array and both shapes.
    """
    _, theirs = build_model(directory, config)
    if (difference := first_difference(items.shapes_of(theirs), items.shapes_of(variables))) is not None:
        raise ValueError(f"init_from: '{directory}': {difference}; {hint}")


def _place_like(leaf: Any, like: jax.Array) -> jax.Array:
    """A leaf on the devices of `like`: one on the host is copied there, each process copying what its devices hold."""
    if isinstance(leaf, jax.Array):
        return leaf
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.array(leaf[index]))

"""Recipes, one for each kind of model, and training from a config.

>>> recipes.train(config, workdir)                      # what train_vae.py and train_transformer.py do
>>> recipe, data, settings = recipes.prepare(config)    # the same, apart
>>> training.run(recipe, data, settings, workdir)
"""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from rq_jax import checkpoint
from rq_jax.data import Splits, make_dataset
from rq_jax.devices import hosts, sharding
from rq_jax.files import is_remote, local_path, run_path
from rq_jax.recipes.dq_transformer import DQTransformer
from rq_jax.recipes.outlook import describe_data, shortages, unlike_starts
from rq_jax.recipes.tokenizer import Tokenizer
from rq_jax.recipes.transformer import Transformer
from rq_jax.settings.construct import construct
from rq_jax.training.loop import Recipe, run
from rq_jax.training.settings import LoopSettings, loop_settings, plain
from rq_jax.training.state import TrainState

__all__ = ["RECIPES", "DQTransformer", "Prepared", "Tokenizer", "Transformer", "prepare", "train"]

RECIPES = {"rqvae": Tokenizer, "dqvae": Tokenizer, "rqtransformer": Transformer, "dqtransformer": DQTransformer}
# Settings that name models, and those that are paths; a split is one where it is a .txt file of names.
_MODELS = ("tokenizer", "init_from")
_PATHS = (
    *_MODELS, "thresholds", "data.data_dir", "data.text_tokenizer", "data.train_split",
    "data.validation_split", "perceptual.vgg", "perceptual.heads",
)  # fmt: skip

logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A run before its first step: the arguments of `training.run`."""

    recipe: Recipe
    data: Splits
    settings: LoopSettings


def prepare(config: Mapping[str, Any], *, stage: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Prepared:
    """A run from its config; every setting is checked here, before anything compiles.

    Args:
      config: a config of `configs/`, or nested dicts like it; `model.name` chooses the recipe.
      stage: 1 or 2, refuses models of the other stage; None: any.
      mesh: devices; None: all of them, as `config.mesh` splits them.

    Raises:
      ValueError, FileNotFoundError: bad settings, data or tokenizer.
    """
    config = with_whole_paths(config)
    name = config["model"]["name"]
    if name not in RECIPES:
        raise ValueError(f"model.name: '{name}' is unknown; allowed are {', '.join(RECIPES)}")
    kind = RECIPES[name]
    if stage is not None and kind.title != f"stage {stage}":
        raise ValueError(f"model.name: '{name}' is a model of {kind.title}, not of stage {stage}; use its own script")
    config = kind.resolve(config)
    if not isinstance(config["seed"], int):
        raise ValueError(f"seed: {config['seed']!r} is not of type int")
    mesh = construct(sharding.make_mesh, "mesh", config["mesh"]) if mesh is None else mesh
    shard_index, shard_count = sharding.batch_part(mesh)
    open_split = functools.partial(
        construct, make_dataset, "data", kind.data_settings(config), seed=config["seed"], shard_index=shard_index,
        shard_count=shard_count,
    )  # fmt: skip
    train_split = open_split(split="train", train=True)
    if (size := config["data"].get("validation_batch_size")) is not None:
        sharding.check_batch_size(mesh, size, setting="data.validation_batch_size")
    data = Splits(train_split, open_split(split="validation", train=False), train_split.in_order())
    if jax.process_index() == 0:
        logger.info(describe_data(config["data"], data))
    recipe = kind.from_config(config, mesh, data)
    data.train.examples([0])  # raises where no image can be read
    return Prepared(recipe, data, loop_settings(config["loop"], data.train.steps_per_epoch))


def with_whole_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as nested dicts, its paths absolute, so that the recorded one can be read from anywhere.

    Addresses of the Hub get their commit, so that a run goes on with what it was started with.

    Raises:
      ValueError: the home directory of an unknown user, or an address that leads nowhere.
    """
    config = plain(config)
    for setting in _PATHS:
        *sections, name = setting.split(".")
        section = functools.reduce(lambda settings, key: settings.get(key) or {}, sections, config)
        value = section.get(name)
        is_path = isinstance(value, str | os.PathLike) and bool(str(value))
        if is_path and setting in _MODELS and checkpoint.is_address(value):
            section[name] = checkpoint.pinned(value)
        elif is_path and setting in _MODELS and is_remote(value):
            section[name] = str(run_path(value))
        elif is_path and (not name.endswith("_split") or str(value).endswith(".txt")):
            section[name] = str(local_path(value).absolute())
    return config


def _with_commits_of(workdir: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose addresses of the Hub lead where they led when the run in `workdir` was started."""
    config = plain(config)
    given = {name: config[name] for name in _MODELS if checkpoint.is_address(config.get(name) or "")}

    def recorded() -> dict[str, Any]:
        directory = checkpoint.local_directory(workdir)
        before = checkpoint.read_config(directory) if (directory / "config.json").is_file() else {}
        return {name: checkpoint.pinned_as(value, before.get(name)) for name, value in given.items()}

    return config | hosts.done_by_first_process(recorded) if given else config


def train(
    config: Mapping[str, Any],
    workdir: str,
    *,
    stage: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    strict: bool = False,
) -> TrainState:
    """Train a model as `config` says, in `workdir`, going on from its newest checkpoint.

    Args:
      config, stage, mesh: see `prepare`.
      workdir: run directory.
      strict: stop at a damaged checkpoint, else go on from the one before.

    Returns:
      The last state.

    Raises:
      ValueError, FileNotFoundError: bad settings, data or tokenizer, before anything compiles; see also `training.run`.
    """
    prepared = prepare(_with_commits_of(workdir, config), stage=stage, mesh=mesh)
    for line in shortages(prepared.recipe, prepared.data.train.batch_size, prepared.settings.total_steps):
        logger.warning(line)
    recipe = prepared.recipe
    if recipe.init_from and not checkpoint.has_checkpoint(workdir):
        # Raises before `workdir` is made, and the training set encoded.
        checkpoint.check_start_from(recipe.init_from, recipe.abstract_state(), recipe.keep_optimizer)
        for line in unlike_starts(recipe):
            logger.warning(line)
    return run(*prepared, workdir, strict=strict)

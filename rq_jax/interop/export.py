"""A model of ours becomes an official state dict and its config."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_jax import checkpoint, models
from rq_jax.checkpoint import tensors
from rq_jax.files import local_path, write_json
from rq_jax.interop import official


class Exported(NamedTuple):
    """A model that was exported.

    Attributes:
      name: of the model.
      weights_path: of the weights; of shards their index.
      config_path: of the official config, beside the weights.
      num_tensors: number of official tensors.
      num_values: number of their elements.
      left_out: settings that an official config has no word for.
    """

    name: str
    weights_path: Path
    config_path: Path
    num_tensors: int
    num_values: int
    left_out: dict[str, Any]


def export_model(
    directory: str | os.PathLike[str], out: str | os.PathLike[str], shard_bytes: int = tensors.SHARD_BYTES
) -> Exported:
    """Write a model with official names and layout, its official config beside it.

    Args:
      directory: a run or a model directory of ours, or an address of the Hub.
      out: new .safetensors file; the config goes to <name>.config.json, and the threshold of a router by entropy, which
        that config names, to <name>.thresholds.json.
      shard_bytes: of the weights in a file, at most: larger ones go to <name>-00001-of-0000N.safetensors, with an
        index <name>.safetensors.index.json.

    Raises:
      ValueError, FileNotFoundError: no model, one that the original cannot express, or files that are there already.
    """
    directory, out = checkpoint.local_directory(directory), local_path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: '{out}' must end in .safetensors, which --export writes")
    config_path, thresholds_path = out.with_suffix(".config.json"), out.with_suffix(".thresholds.json")
    for path in (out, *sorted(tensors.parts_of(out)), config_path, thresholds_path):
        if path.exists():
            raise ValueError(f"--out: '{path}' is there already; give the name of a new file")
    own_config = checkpoint.read_config(directory)
    name, settings = own_config["model"]["name"], models.settings_of(models.create(**own_config["model"]))
    # The settings are checked before the weights are read.
    sample = own_config.get("sample") or {}
    if not isinstance(sample, dict):
        raise ValueError(f"'{directory}': its config has a {type(sample).__name__} for sample; a dict is needed")
    tokenizer = _tokenizer_settings(directory) if official.KINDS[name].tokenizer else None
    config = official.official_config(name, settings, sample, tokenizer)
    files = {config_path: config}
    for entropy in (settings, tokenizer or {}):
        if entropy.get("router") == "entropy":
            files[thresholds_path] = official.name_thresholds(config, thresholds_path.name, entropy)
    variables = checkpoint.load_model(directory).variables
    if official.KINDS[name].tokenizer:
        variables.pop("codebook", None)  # the tokenizer's, and exported with it
    state = official.official_state(name, variables, settings)
    weights_path = _write(state, files, out, shard_bytes)
    left_out = official.left_out_settings(name, settings)
    return Exported(
        name, weights_path, config_path, len(state), sum(np.size(array) for array in state.values()), left_out
    )


def _tokenizer_settings(directory: Path) -> dict[str, Any] | None:
    """Settings of the tokenizer in a stage-2 directory, where it has one."""
    if not (directory / "tokenizer").is_dir():
        return None
    return models.settings_of(models.create(**checkpoint.read_config(directory / "tokenizer")["model"]))


def _write(state: dict[str, np.ndarray], files: dict[Path, Any], out: Path, shard_bytes: int) -> Path:
    """All files or none; the path of the weights."""
    try:
        for path, content in files.items():
            write_json(path, content)
        return tensors.write(out, state, shard_bytes)
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise

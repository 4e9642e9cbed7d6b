"""A model of ours becomes an official state dict and its config."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_jax import checkpoint, models
from rq_jax.files import atomic_path, local_path, write_json
from rq_jax.interop import official


class Exported(NamedTuple):
    """A model that was exported.

    Attributes:
      name: of the model.
      config_path: of the official config, beside the weights.
      num_tensors: number of official tensors.
      num_values: number of their elements.
      left_out: settings that an official config has no word for.
    """

    name: str
    config_path: Path
    num_tensors: int
    num_values: int
    left_out: dict[str, Any]


def export_model(directory: str | os.PathLike[str], out: str | os.PathLike[str]) -> Exported:
    """Write a model with official names and layout, its official config beside it.

    Args:
      directory: a run or a model directory of ours.
      out: new .safetensors file; the config goes to <name>.config.json.

    Raises:
      ValueError, FileNotFoundError: no model, one that the original cannot express, or files that are there already.
    """
    directory, out = local_path(directory), local_path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: '{out}' must end in .safetensors, which --export writes")
    config_path = out.with_suffix(".config.json")
    for path in (out, config_path):
        if path.exists():
            raise ValueError(f"--out: '{path}' is there already; give the name of a new file")
    own_config = checkpoint.read_config(directory)
    name, settings = own_config["model"]["name"], models.settings_of(models.create(**own_config["model"]))
    # The settings are checked before the weights are read.
    sample = own_config.get("sample") or {}
    if not isinstance(sample, dict):
        raise ValueError(f"'{directory}': its config has a {type(sample).__name__} for sample; a dict is needed")
    config = official.official_config(name, settings, sample)
    variables = checkpoint.load_model(directory).variables
    if name == "rqtransformer":
        variables.pop("codebook", None)  # the tokenizer's, and exported with it
    state = official.official_state(name, variables, settings)
    _write(state, config, out, config_path)
    left_out = official.left_out_settings(name, settings)
    return Exported(name, config_path, len(state), sum(np.size(array) for array in state.values()), left_out)


def _write(state: dict[str, np.ndarray], config: dict[str, Any], out: Path, config_path: Path) -> None:
    """Both files or none."""
    from safetensors.numpy import save_file

    try:
        with atomic_path(out) as partial:
            save_file(state, partial)
            write_json(config_path, config)
    except BaseException:
        config_path.unlink(missing_ok=True)
        raise

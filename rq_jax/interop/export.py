"""A model of ours becomes an official state dict and its config."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_jax import checkpoint, models
from rq_jax.files import write_json
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
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: '{out}' must end in .safetensors, which --export writes")
    config_path = out.with_suffix(".config.json")
    for path in (out, config_path):
        if path.exists():
            raise ValueError(f"--out: '{path}' is there already; give the name of a new file")
    own_config = checkpoint.read_config(directory)
    name, settings = own_config["model"]["name"], models.settings_of(models.create(**own_config["model"]))
    # The settings are checked before the weights are read.
    config = official.official_config(name, settings, own_config.get("sample"))
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

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, partial)
        write_json(config_path, config)
        shutil.copymode(config_path, partial)  # safetensors gives its files to their owner alone
        os.replace(partial, out)
    except BaseException:
        config_path.unlink(missing_ok=True)
        raise
    finally:
        partial.unlink(missing_ok=True)

"""A model directory: `config.json` and `model.safetensors`, the weights alone, for shipping and for the tokenizer."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_config(directory: str | os.PathLike, config: dict[str, Any]) -> None:
    """Write the resolved config beside the checkpoints, atomically; of several hosts the first writes."""
    if jax.process_index() != 0:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(partial, directory / CONFIG)


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The resolved config of a run or model directory.

    Raises:
      FileNotFoundError: the directory is no run and no model directory.
      ValueError: its config.json is not one of ours.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"'{directory}' is no run directory: it has no {CONFIG}; give the --workdir of a training run"
        )
    try:
        config = json.loads(path.read_text())
        named = isinstance(config["model"]["name"], str)
    except (ValueError, KeyError, TypeError, IndexError):
        named = False
    if not named:
        raise ValueError(f"'{directory}' is no run directory: its {CONFIG} names no model of ours")
    return config


def save_model(
    directory: str | os.PathLike, config: dict[str, Any], variables: dict[str, Any], dtype: str | None = None
) -> None:
    """Write a model directory: the weights as safetensors, names joined by "/", then the config; first host only.

    Args:
      directory: made where it is missing.
      config: resolved, as JSON takes it.
      variables: of the model.
      dtype: "float16" to ship half of the bytes, which `load_model` widens again; None: as the variables are.

    Raises:
      ValueError: another dtype, or a value that float16 cannot hold.
    """
    from safetensors.numpy import save_file

    if dtype not in (None, "float16"):
        raise ValueError(f"dtype: '{dtype}' is unknown; give 'float16', or leave it out to keep that of the variables")
    if jax.process_index() != 0:
        return
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(variables)}
    if dtype == "float16":
        for name, array in arrays.items():
            largest = float(np.max(np.abs(array), initial=0.0))
            if not largest <= float(np.finfo(np.float16).max):
                raise ValueError(f"dtype: '{name}' has a value of {largest}, beyond float16; leave dtype out")
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{WEIGHTS}.partial"
    save_file(arrays, partial)
    os.replace(partial, directory / WEIGHTS)
    write_config(directory, config)
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # safetensors gives its files to their owner alone


def read_weights(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """The weights of a model directory in the structure, shapes and dtypes of a template.

    Raises:
      ValueError: the file holds other arrays.
    """
    from safetensors.numpy import load_file

    arrays = load_file(path)
    expected = {name: leaf.shape for name, leaf in named_leaves(template)}
    found = {name: array.shape for name, array in arrays.items()}
    if expected != found:
        name = min(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(f"'{path}': '{name}' has shape {found.get(name)}, the config needs {expected.get(name)}")

    def take(keys: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return arrays.pop(_name(keys)).astype(leaf.dtype, copy=False)  # nothing is held twice

    return jax.tree_util.tree_map_with_path(take, template)


def fingerprint(variables: dict[str, Any]) -> str:
    """16 hexadecimal digits that depend on every name, shape and value of the variables."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(variables)):
        digest.update(f"{name}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32))
    return digest.hexdigest()[:16]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of a tree with their names, joined by "/"."""
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)

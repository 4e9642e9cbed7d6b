"""Model directories: `config.json` and `model.safetensors`, weights alone, for shipping and for the tokenizer."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint.config import write_config
from rq_jax.files import atomic_path, local_path
from rq_jax.settings.text import quoted

WEIGHTS = "model.safetensors"


def save_model(
    directory: str | os.PathLike, config: dict[str, Any], variables: dict[str, Any], dtype: str | None = None
) -> None:
    """Write a model directory: the weights as safetensors, then the config; only the first process writes.

    Args:
      directory: created if missing.
      config: the resolved config, JSON-able.
      variables: of the model; an array's name is its path in the tree, joined by "/".
      dtype: "float16" halves the file, and `load_model` widens it again; None keeps the dtypes of the variables.

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
    with atomic_path(local_path(directory) / WEIGHTS) as partial:
        save_file(arrays, partial)
    write_config(directory, config)  # last: a directory without it is no model directory


def read_weights(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Read the weights of a model directory in the structure and dtypes of a template.

    Raises:
      ValueError: names or shapes differ from the template's, or the file is damaged.
    """
    from safetensors import safe_open

    expected = {name: leaf.shape for name, leaf in named_leaves(template)}
    try:
        with safe_open(path, framework="numpy") as file:
            # Shapes first, from the header: no array is read that the model does not take.
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            difference = first_difference(shapes, expected)
            arrays = {} if difference else {name: file.get_tensor(name) for name in expected}
    except Exception as error:  # the library has a type of its own, which is no ValueError
        raise ValueError(f"'{path}' cannot be read ({quoted(error, 300)}); restore it from a copy") from error
    if difference is not None:
        raise ValueError(f"'{path}': {difference}")

    def take(keys: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        # Popped, so that an array that is widened is not held in both dtypes.
        return arrays.pop(_name(keys)).astype(leaf.dtype, copy=False)

    return jax.tree_util.tree_map_with_path(take, template)


def fingerprint(variables: dict[str, Any]) -> str:
    """Hash of every name, shape and value of the variables: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(variables)):
        digest.update(f"{name}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).data)
    return digest.hexdigest()[:16]


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves of a tree with their names, joined by "/"."""
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def first_difference(shapes: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first array, by name, whose shape differs from the expected one, as a message; None where all agree."""
    for name in sorted(shapes | expected):
        if shapes.get(name) != expected.get(name):
            return f"{quoted(name, 200)} has shape {shapes.get(name)}, the config needs {expected.get(name)}"
    return None


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)

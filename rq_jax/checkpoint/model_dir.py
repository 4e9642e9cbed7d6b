"""Model directories: `config.json` and `model.safetensors`, weights alone, for shipping and for the tokenizer.

The name of an array is its path in the tree of variables, joined by "."; files of before, joined by "/", are read too.
Weights of more than a shard are in several files, see `tensors`.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.checkpoint import tensors
from rq_jax.checkpoint.config import write_config
from rq_jax.files import local_path
from rq_jax.settings.text import quoted

WEIGHTS = "model.safetensors"
# Beside the weights of a transformer by text: its text tokenizer, and what it draws where nothing else is asked for.
TEXT_TOKENIZER, PROMPTS = "text_tokenizer.json", "prompts.json"
_TREE, _FILE = "/", "."  # what joins the path of an array: in messages and fingerprints, and in files


def save_model(
    directory: str | os.PathLike,
    config: dict[str, Any],
    variables: dict[str, Any],
    dtype: str | None = None,
    shard_bytes: int = tensors.SHARD_BYTES,
) -> None:
    """Write a model directory: the weights as safetensors, then the config; only the first process writes.

    Args:
      directory: created if missing.
      config: the resolved config, JSON-able.
      variables: of the model.
      dtype: "float16" halves the arrays, and `load_model` widens them again; those beside the parameters that it cannot
        hold keep their dtype, as the moving averages of a codebook, whose counts may be large. None keeps all dtypes.
      shard_bytes: of the weights in a file, at most.

    Raises:
      ValueError: another dtype, or a parameter that float16 cannot hold.
    """
    if dtype not in (None, "float16"):
        raise ValueError(f"dtype: '{dtype}' is unknown; give 'float16', or leave it out to keep that of the variables")
    if jax.process_index() != 0:
        return
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(variables)}
    if dtype == "float16":
        for name, array in arrays.items():
            largest = float(np.max(np.abs(array), initial=0.0))
            if largest <= float(np.finfo(np.float16).max) and jnp.issubdtype(array.dtype, jnp.floating):
                arrays[name] = array.astype(np.float16)
            elif name.startswith(f"params{_TREE}"):
                raise ValueError(f"dtype: '{name}' has a value of {largest}, beyond float16; leave dtype out")
    named = {name.replace(_TREE, _FILE): array for name, array in arrays.items()}
    tensors.write(local_path(directory) / WEIGHTS, named, shard_bytes)
    write_config(directory, config)  # last: a directory without it is no model directory


def holds_weights(directory: Path) -> bool:
    """Whether a directory is a model directory, whole or not, and no run directory."""
    return bool(tensors.parts_of(directory / WEIGHTS))


def read_weights(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Read the weights of a model directory in the structure and dtypes of a template.

    Args:
      path: of the weights; shards may stand in their place.
      template: arrays or their shapes.

    Raises:
      ValueError: names or shapes differ from the template's, or a file is damaged or missing.
    """
    expected = {name: leaf.shape for name, leaf in named_leaves(template)}
    # Shapes first: no array is read that the model does not take.
    shapes = {name.replace(_FILE, _TREE): shape for name, shape in tensors.shapes(path).items()}
    if (difference := first_difference(shapes, expected)) is not None:
        raise ValueError(f"'{path}': {difference}")
    arrays = {name.replace(_FILE, _TREE): array for name, array in tensors.read(path).items()}

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


def named_leaves(tree: Any, separator: str = _TREE) -> list[tuple[str, Any]]:
    """Leaves of a tree with their names, their paths joined by a separator."""
    return [(_name(path, separator), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def first_difference(shapes: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first array, by name, whose shape differs from the expected one, as a message; None where all agree."""
    for name in sorted(shapes | expected):
        if shapes.get(name) != expected.get(name):
            return f"{quoted(name, 200)} has shape {shapes.get(name)}, the config needs {expected.get(name)}"
    return None


def _name(path: Any, separator: str = _TREE) -> str:
    return separator.join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)

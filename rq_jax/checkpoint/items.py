"""Items of a checkpoint, each a tree of arrays in a directory of Orbax: their shapes, and reading them."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint.model_dir import first_difference, named_leaves
from rq_jax.files import is_remote
from rq_jax.settings.text import quoted

_PLAIN = re.compile(r"[\w ./~+=@%,#-]*")  # what neither a glob nor a URL gives a meaning to
_DESCRIPTORS = Path("/proc/self/fd")


@contextlib.contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """A path of a directory that can be taken for no pattern and no URL.

    Orbax finds the parts of a checkpoint by a glob over its whole path, and TensorStore turns backslashes: in a
    directory called `run[1]` they write what nobody can read. The path of an open descriptor has no such characters.

    Args:
      directory: exists; or an address in an object store, which has no such characters, see `files.run_path`.

    Yields:
      `directory` itself, or a path that leads there until the block ends.

    Raises:
      ValueError: a character that needs a descriptor, on a system without paths of descriptors.
    """
    if is_remote(directory) or _PLAIN.fullmatch(str(directory)):
        yield directory
        return
    if not _DESCRIPTORS.is_dir():
        odd = next(character for character in str(directory) if not _PLAIN.fullmatch(character))
        raise ValueError(
            f"workdir: {quoted(directory, 400)} holds the character {quoted(odd)}, which Orbax takes for a pattern; "
            "give a path of letters, digits and ._-"
        )
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _DESCRIPTORS / str(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what Orbax raises for a damaged checkpoint, which is any type of several lines, into a ValueError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # of the machine, not of the checkpoint
    except Exception as error:
        raise ValueError(
            f"'{path}' cannot be read ({type(error).__name__}: {quoted(error, 300)}); restore it from a copy"
        ) from error


def restore(path: Path, trees: dict[str, Any]) -> dict[str, Any]:
    """Read items of a checkpoint.

    Args:
      path: of the checkpoint.
      trees: by item, arrays or their shapes: the structure, shapes and shardings to read. Each process reads what its
        devices hold; what has no sharding it reads as a whole, into an array of NumPy.

    Raises:
      ValueError: an item that cannot be read, or holds other arrays.
    """
    import orbax.checkpoint as ocp

    with plain_path(path) as plain, reading(path), ocp.StandardCheckpointer() as checkpointer:
        return {name: checkpointer.restore(plain / name, jax.tree.map(_target, tree)) for name, tree in trees.items()}


def _target(leaf: Any) -> Any:
    """What tells Orbax to read a leaf as `restore` says: a shape alone would go where it was saved from."""
    on_host = isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if on_host else leaf


def shapes_on_disk(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an item, by name with the item's in front; empty without the item. Reads no values.

    Raises:
      ValueError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    if not (path / name).is_dir():
        return {}
    with plain_path(path) as plain, reading(path):
        return shapes_of(ocp.StandardCheckpointHandler().metadata(plain / name).tree, f"{name}/")


def check_fits(path: Path, shapes: dict[str, dict[str, tuple[int, ...]]], hint: str) -> None:
    """Check that a checkpoint has the names and shapes of some items.

    Args:
      path: of the checkpoint.
      shapes: of the items, from `shapes_of_items`.
      hint: the fix, which ends the message.

    Raises:
      ValueError: naming the array and both shapes, or what cannot be read.
    """
    for item, expected in shapes.items():
        if (difference := first_difference(shapes_on_disk(path, item), expected)) is not None:
            raise ValueError(f"'{path}': {difference}; {hint}")


def shapes_of_items(trees: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the arrays of each item, by name."""
    return {name: shapes_of(tree, f"{name}/") for name, tree in trees.items()}


def shapes_of(tree: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves of a tree, by name; random keys count as the integers they are saved as."""

    def shape(leaf: Any) -> tuple[int, ...]:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape

    return {f"{prefix}{name}": shape(leaf) for name, leaf in named_leaves(tree)}

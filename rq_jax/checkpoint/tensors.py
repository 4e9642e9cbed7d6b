"""Arrays by name in safetensors: one file, or shards with an index beside them, as Hugging Face splits them.

model.safetensors
model-00001-of-00003.safetensors, ...   in its place where that would be larger than a shard
model.safetensors.index.json            {"metadata": {"total_size": bytes}, "weight_map": name -> shard}
"""

import collections
import contextlib
import glob
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.files import atomic_path, read_json
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

SHARD_BYTES = 5 * 10**9


def index_path(path: Path) -> Path:
    """The index of the shards in the place of a file."""
    return path.with_name(f"{path.name}.index.json")


def parts_of(path: Path) -> set[Path]:
    """A file, its shards and their index: those that are there."""
    shards = path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{path.suffix}")
    return {part for part in (path, index_path(path), *shards) if part.is_file()}


def write(path: Path, arrays: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> Path:
    """Write arrays into one file, or into shards where they are larger than one; replaces what is there.

    Args:
      path: of the file, ending in .safetensors; its directory is created if missing.
      arrays: by name.
      shard_bytes: of the arrays of a shard, at most; an array that is larger has a shard of its own.

    Returns:
      The file, or the index of the shards.

    Raises:
      ValueError: a size below 1.
      OSError: the disk is full, or the directory cannot be written; what was there stays.
    """
    from safetensors.numpy import save_file

    checks.at_least("shard_bytes", shard_bytes, 1, whole=True)
    groups, before = _split(arrays, shard_bytes), parts_of(path)
    names = [f"{path.stem}-{i + 1:05d}-of-{len(groups):05d}{path.suffix}" for i in range(len(groups))]
    files = [path] if len(groups) == 1 else [path.with_name(name) for name in names]
    # All bytes are written before the first file gets its name, and the index, where there is one, gets its last. What
    # was there goes after that: a file without shards is read before shards, so that a write cut short leaves either.
    with contextlib.ExitStack() as stack:
        index = None if len(groups) == 1 else stack.enter_context(atomic_path(index_path(path)))
        for file, group in zip(files, groups, strict=True):
            save_file({name: arrays[name] for name in group}, stack.enter_context(atomic_path(file)))
        if index is not None:
            weight_map = {name: file.name for file, group in zip(files, groups, strict=True) for name in group}
            total = sum(array.nbytes for array in arrays.values())
            index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n")
    written = path if index is None else index_path(path)
    for old in before - {*files, written}:
        old.unlink()
    return written


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a file or of its shards, by name, from the headers: no array is read.

    Raises:
      ValueError: a file that is damaged or missing, or shards that do not fit their index.
    """
    return _of_each(path, lambda file, name: tuple(file.get_slice(name).get_shape()))


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file or of its shards, by name.

    Raises:
      ValueError: as `shapes`.
    """
    return _of_each(path, lambda file, name: file.get_tensor(name))


def _split(arrays: Mapping[str, np.ndarray], shard_bytes: int) -> list[list[str]]:
    """Names of the arrays of each shard, in their order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if groups[-1] and size + array.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += array.nbytes
    return groups


def _of_each(path: Path, take: Callable[[Any, str], Any]) -> dict[str, Any]:
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file, expected in _files(path).items():
        try:
            if not file.is_file():  # a pipe would never end
                raise ValueError("it is missing, or no regular file")
            with safe_open(file, framework="numpy") as opened:
                names = set(opened.keys())
                if expected is not None and names != expected:
                    raise ValueError("it holds other arrays than its index says")
                found |= {name: take(opened, name) for name in names}
        except Exception as error:  # the library has a type of its own, which is no ValueError
            raise ValueError(f"'{file}' cannot be read ({quoted(error, 300)}); restore it from a copy") from error
    return found


def _files(path: Path) -> Mapping[Path, set[str] | None]:
    """The files to read, each with the names that an index gives it; None: whatever it holds."""
    if path.is_file():
        return {path: None}
    index, files = index_path(path), collections.defaultdict(set)
    weight_map = read_json(index).get("weight_map") if index.is_file() else None
    if not isinstance(weight_map, dict) or not weight_map:
        why = "has no weight_map from arrays to files" if index.is_file() else "is missing, and shards need it"
        raise ValueError(f"'{index}' {why}; restore it from a copy")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise ValueError(f"'{index}' names {quoted(shard)}, which is no file beside it; restore it from a copy")
        files[path.with_name(shard)].add(name)
    return files

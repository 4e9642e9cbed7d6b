"""Weights in several files, as Hugging Face splits them: an index says which file holds which tensor."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rq_jax.files import parse_json
from rq_jax.interop.state_file.files import DAMAGED, Invalid, StateFileError, find_file
from rq_jax.settings.text import quoted

INDEX = ".index.json"
_MAX_BYTES = 16 << 20
_MAX_SHARDS = 1000


def find_index(directory: Path) -> Path:
    """The one index in a directory.

    Raises:
      StateFileError: there is none, or there are several.
    """
    found = sorted(path for path in directory.iterdir() if path.name.endswith(INDEX))
    if len(found) != 1:
        have = "several" if found else "no"
        raise StateFileError(f"'{directory}': is a directory with {have} *{INDEX}; give a file of weights or an index")
    return found[0]


def read_shards(path: str | os.PathLike[str], read: Callable[[Path], Any]) -> dict[str, Any]:
    """All tensors of an index by name.

    Args:
      path: of the index; its files lie beside it.
      read: of one file of weights.

    Raises:
      FileNotFoundError: the index or one of its files is missing.
      StateFileError: the index is damaged, its files lie elsewhere, or hold other tensors than it says.
    """
    source = find_file(path, "an index of weights")
    state: dict[str, Any] = {}
    with source.open() as reader:
        if source.size > _MAX_BYTES:
            raise Invalid(f"has {source.size} bytes; an index has at most {_MAX_BYTES}")
        try:
            weight_map = parse_json(reader.read(0, source.size), "its text").get("weight_map")
        except ValueError as error:
            raise Invalid(f"{error}; {DAMAGED}") from None
        for shard, names in _names_by_shard(weight_map).items():
            tensors = read(Path(source.path).with_name(shard))
            if not isinstance(tensors, dict) or tensors.keys() != names:
                raise Invalid(f"says of {quoted(shard)} another list of tensors than stands there; {DAMAGED}")
            state |= tensors
    return state


def _names_by_shard(weight_map: Any) -> dict[str, set[str]]:
    if not isinstance(weight_map, dict) or not weight_map:
        raise Invalid(f"has no weight_map from tensors to files; {DAMAGED}")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        is_plain = isinstance(shard, str) and shard.isprintable() and 0 < len(shard) < 256
        if not is_plain or "/" in shard or "\\" in shard or shard in (".", "..") or shard.endswith(INDEX):
            raise Invalid(f"names the file {quoted(shard)}; allowed are plain names of files beside it")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise Invalid(f"names {len(shards)} files; at most {_MAX_SHARDS} are read")
    return shards

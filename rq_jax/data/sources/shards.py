"""Datasets in a few large files: which of them belong to a split, and where their records stand."""

import bisect
import collections
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rq_jax.data.listing import Listing, list_files
from rq_jax.data.sources.folder import SPLIT_OF
from rq_jax.files import local_path

_HELD_OUT = 10  # every tenth record is held out where files name no splits
_SPLIT_OF = {**SPLIT_OF, "dev": "validation", "eval": "test", "evaluation": "test"}


class Shards:
    """The records of one split.

    Attributes:
      paths: of the files that have some of them.
      rows: of each file, which of its records, ascending.
      split_counts: records of each split of the dataset.
    """

    def __init__(self, rows: Mapping[Path, np.ndarray], split_counts: Mapping[str, int]):
        self.paths, self.rows, self.split_counts = list(rows), list(rows.values()), dict(split_counts)
        self._ends = list(itertools.accumulate(map(len, self.rows)))

    def __len__(self) -> int:
        return self._ends[-1]

    def find(self, index: int) -> tuple[int, int]:
        """Number of the file of a record, and the record's place in it."""
        file = bisect.bisect_right(self._ends, index)
        return file, int(self.rows[file][index - self._ends[file]])  # counted from the end of the file


def list_shards(data_dir: str | os.PathLike | None, suffix: str, name: str) -> Listing:
    """The files of a dataset below a directory, or the one that is given.

    Raises:
      FileNotFoundError: there is none.
    """
    if data_dir is None:
        raise ValueError(f"data.data_dir: unset, but data.name '{name}' needs the directory of the files; set it")
    root = local_path(data_dir)
    if root.is_file() and root.suffix.lower() == suffix:
        return Listing(root.parent, f"{suffix} files", [Path(root.name)])
    if not root.is_dir():
        raise FileNotFoundError(f"data.data_dir: '{root}' is no directory; give the one of the {suffix} files")
    listing = list_files(root, (suffix,), f"{suffix} files")
    if not listing.paths:
        raise FileNotFoundError(f"data.data_dir: '{root}' holds no {suffix} files{listing.reasons()}")
    return listing


def choose_shards(split: str, root: Path, paths: Sequence[Path], counts: Sequence[int]) -> Shards:
    """The records of a split.

    A file belongs to the split that its name has in it (train-00000-of-00004.parquet), or else a folder around it. Of
    files without any, every tenth record is the split `validation`, the others are `train`. The split `all` is all.

    Args:
      split: its name.
      root: of the files.
      paths: of the files, relative to `root`.
      counts: records in each file.

    Raises:
      FileNotFoundError: the split is empty.
      ValueError: there is no such split.
    """
    name, named = _SPLIT_OF.get(split, split), [_split_of(path) for path in paths]
    split_counts = collections.Counter[str]()
    if any(named):
        for each, count in zip(named, counts, strict=True):
            split_counts[each or "outside of the splits"] += count
    else:
        held_out = sum(count // _HELD_OUT for count in counts)
        split_counts.update(train=sum(counts) - held_out, validation=held_out)
    if name != "all" and name not in split_counts:
        allowed = ", ".join(each for each in split_counts if each in _SPLIT_OF.values())
        raise ValueError(f"split: '{split}' is unknown in '{root}'; allowed are {allowed} and all")
    chosen = {}
    for path, each, count in zip(paths, named, counts, strict=True):
        rows = np.arange(count, dtype=np.int32)
        if name != "all" and not any(named):
            rows = rows[(rows % _HELD_OUT == _HELD_OUT - 1) == (name == "validation")]
        if len(rows) and (name == "all" or not any(named) or each == name):
            chosen[root / path] = rows
    if not any(counts):
        raise FileNotFoundError(f"data.data_dir: '{root}' holds no images in its {len(paths)} files")
    if not chosen:
        setting = "train_split" if name == "train" else "validation_split"
        raise FileNotFoundError(
            f"split: '{split}' of '{root}' is empty; it holds {sum(counts)} images in all; set data.{setting}=all to "
            "read all of them"
        )
    return Shards(chosen, split_counts)


def _split_of(path: Path) -> str | None:
    words = (word for part in reversed(path.parts) for word in re.findall("[a-z]+", part.lower()))
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)

"""Where the records of a file without an index lie, scanned once and cached."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rq_jax.data.images import is_regular
from rq_jax.data.paths import default_data_dir
from rq_jax.files import atomic_path


def cached_index(
    kind: str,
    path: str,
    columns: int,
    scan: Callable[[str, int], Iterable[Sequence[int]]],
    fits: Callable[[np.ndarray, int], bool],
) -> np.ndarray:
    """The index of a file, from the cache of the data directory if it was scanned before.

    A cached index is named by path, size and modification time, so that a rewritten file is scanned again.

    Args:
      kind: folder of the cache.
      path: the file.
      columns: numbers in a row.
      scan: (path, size of the file) -> rows of the index.
      fits: (index, size of the file) -> whether a cached index is whole.

    Returns:
      The rows, int64 (N, columns).

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no regular file, or `scan` refuses it.
    """
    if not is_regular(path):
        raise ValueError(f"'{path}' is no regular file")
    stat = os.stat(path)
    name = hashlib.sha256(f"{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    cached = default_data_dir() / kind / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged
        rows = np.load(cached, allow_pickle=False)
        if rows.ndim == 2 and rows.shape[1] == columns and rows.dtype == np.int64 and fits(rows, stat.st_size):
            return rows
    rows = np.array(list(scan(path, stat.st_size)), np.int64).reshape(-1, columns)
    with contextlib.suppress(OSError):  # a full or read-only disk: scanned again next time
        with atomic_path(cached) as partial, open(partial, "wb") as file:
            np.save(file, rows, allow_pickle=False)
    return rows

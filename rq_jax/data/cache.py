"""Cache of the features of a dataset: a directory of .npy files, and a dataset that reads them."""

import functools
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from rq_jax.data.pipeline import Batch, Dataset
from rq_jax.files import read_json, write_json
from rq_jax.report.progress import Progress

_META = "meta.json"
_FORMAT = 2  # 2: conditions as "cond" (B,U) in place of "label" and "text"


def write_cache(
    directory: str | os.PathLike,
    batches: Iterable[Mapping[str, np.ndarray]],
    meta: Mapping,
    num_examples: int | None = None,
) -> Path:
    """Write batches to a cache directory, which appears when it is whole and replaces an older cache.

    Args:
      directory: of the cache.
      batches: dicts of arrays with a common leading axis, stored in their dtypes. Those with views are (B,V,...), V
        augmented views of each example; everything else is (B,...). Rows whose "mask" (B,) is False are left out.
      meta: JSON-able origin of the cache, with the entry "fingerprint"; may hold "views", the names of the arrays with
        views (without it "latents" alone), and "class_names", "vocab_size" and "text_length" for the dataset.
      num_examples: expected rows, for the progress bar.

    Returns:
      The directory.

    Raises:
      FileExistsError: the directory exists and is not a cache.
      ValueError: no batch, or batches that do not match.
    """
    directory = Path(directory).expanduser()
    if "fingerprint" not in meta:
        raise ValueError(f"cache meta has no 'fingerprint': its entries are {', '.join(meta) or '(none)'}")
    if directory.exists() and not (directory / _META).is_file():
        raise FileExistsError(f"{str(directory)!r} exists and is not a cache: choose another place or remove it")
    # One name for all attempts, so that the next one reclaims the room that a killed one took. Nothing follows a link:
    # mkdir refuses one that stands there.
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    columns: dict[str, _Column] = {}
    with Progress(num_examples, unit="example", title="cache") as progress:
        for batch in batches:
            arrays = {key: np.asarray(array) for key, array in batch.items() if key != "mask"}
            if "mask" in batch:
                arrays = {key: array[np.asarray(batch["mask"])] for key, array in arrays.items()}
            if not columns:
                columns = {key: _Column(partial / f"{key}.npy", array) for key, array in arrays.items()}
            if arrays.keys() != columns.keys() or len({len(array) for array in arrays.values()}) != 1:
                shapes = {key: array.shape for key, array in arrays.items()}
                raise ValueError(f"cache batch {shapes}: expected rows of {', '.join(columns)}, equally many of each")
            for key, array in arrays.items():
                columns[key].append(array)
            progress.update(len(next(iter(arrays.values()))))
    if not columns:
        raise ValueError(f"no batches for the cache {str(directory)!r}")
    shapes = {key: column.close() for key, column in columns.items()}
    write_json(partial / _META, {**meta, "format": _FORMAT, "shapes": shapes})
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
    return directory


def read_meta(directory: str | os.PathLike) -> dict | None:
    """The meta of `write_cache` and the "shapes" of the arrays; None without a whole cache of this format.

    Raises:
      ValueError: the meta is not readable.
    """
    path = Path(directory).expanduser() / _META
    meta = read_json(path) if path.is_file() else {}
    if meta.get("format") != _FORMAT:
        return None
    if not isinstance(meta.get("shapes"), dict) or not meta["shapes"] or "fingerprint" not in meta:
        raise ValueError(f"'{path}' is no meta of a cache; delete '{path.parent}' to make it again")
    return meta


class CacheDataset(Dataset):
    """Batches of a cache: endless and shuffled with a random view of each example, or in order with view 0.

    Batches hold the arrays of the cache, without the axis of views.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        batch_size: int,
        train: bool,
        seed: int = 0,
        shard_index: int = 0,
        shard_count: int = 1,
        num_threads: int = 2,
    ):
        """Open a cache.

        Args:
          directory: written by `write_cache`.
          batch_size: of all shards together.
          train: endless and shuffled, or once through.
          seed: of order and views, in [0, 2**32).
          shard_index: this process among the `shard_count` that each read their part of every batch.
          shard_count: number of reading processes.
          num_threads: reading threads.

        Raises:
          FileNotFoundError: no whole cache of this format.
          ValueError: a value out of range.
        """
        meta = read_meta(directory)
        if meta is None:
            raise FileNotFoundError(f"no cache in {str(directory)!r}: write one with write_cache")
        choose_view = functools.partial(_choose_view, tuple(meta.get("views", ["latents"])))
        super().__init__(
            _CacheSource(Path(directory).expanduser(), tuple(meta["shapes"])),
            train=train,
            batch_size=batch_size,
            train_transform=choose_view,
            eval_transform=choose_view,
            seed=seed,
            shard_index=shard_index,
            shard_count=shard_count,
            num_threads=num_threads,
            class_names=meta.get("class_names"),
            vocab_size=meta.get("vocab_size"),
            text_length=meta.get("text_length"),
        )
        self.meta = meta


class _CacheSource:
    """Rows of a cache, memory-mapped."""

    damaged: frozenset[int] = frozenset()

    def __init__(self, directory: Path, names: tuple[str, ...]):
        self._arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: array[int(index) % len(self)] for name, array in self._arrays.items()}


def _choose_view(names: tuple[str, ...], example: Batch, rng: np.random.Generator | None = None) -> Batch:
    """An example with one view, the same of all arrays that have views."""
    viewed = {name: example[name] for name in names if name in example}
    if not viewed:
        return example
    view = 0 if rng is None else rng.integers(len(next(iter(viewed.values()))))
    return {**example, **{name: array[view] for name, array in viewed.items()}}


class _Column:
    """A .npy file that grows by rows.

    The number of rows stands in the header, which is written first and again on closing. NumPy pads headers to a
    multiple of 64 bytes with room for a growing first axis, so the second one has the same length.
    """

    def __init__(self, path: Path, first: np.ndarray):
        self._dtype, self._row_shape, self._rows = first.dtype, first.shape[1:], 0
        self._file = path.open("w+b")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, array: np.ndarray) -> None:
        if (array.dtype, array.shape[1:]) != (self._dtype, self._row_shape):
            raise ValueError(
                f"cache rows changed from {self._dtype} {self._row_shape} to {array.dtype} {array.shape[1:]}"
            )
        self._file.write(np.ascontiguousarray(array).tobytes())
        self._rows += len(array)

    def close(self) -> list[int]:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._data_start, "the .npy header grew into the data"
        self._file.close()
        return [self._rows, *self._row_shape]

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, *self._row_shape), self._dtype))
        np.lib.format.write_array_header_1_0(self._file, {**header, "shape": (self._rows, *self._row_shape)})

"""Features of image sets, reduced as they come; on disk a killed run goes on with them, and a later one finds them.

A directory of one set holds

    set.json      what decides its features
    features.npy  (D, N, A), of the images that `state.npz` counts; rows behind them are written again
    state.npz     sums over these images, their positions, the batch to go on with

D sets are measured at once, such as the reconstructions of images by code depth; N images, A features of each.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax.devices import hosts
from rq_jax.evaluation.statistics import ClassSums, Moments, split_of
from rq_jax.files import RunLock, atomic_path, read_json, write_json
from rq_jax.settings import checks

BLOCK = 1024  # images that are reduced at once; after each block of them the state is written
DTYPES = ("float32", "float16")
_FORMAT = 1  # of the files

Batch = Mapping[str, np.ndarray]

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What a program gives of a batch, all of it on every process.

    Attributes:
      vectors: D arrays (B, A).
      mask: (B,), the images that count.
      positions: (B,), of the images in their set.
      logits: D arrays (B, L); empty without a classifier.
    """

    vectors: Sequence[jax.Array]
    mask: jax.Array
    positions: jax.Array
    logits: Sequence[jax.Array] = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the features of a set are kept.

    Attributes:
      cache: directory of many sets, which all processes share.
      key: what decides the features, as JSON holds it: identity of the images, name and digest of the extractor, its
        protocol. What is kept, and in what type, is added.
    """

    cache: Path
    key: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """Of this set, named by a digest of the key."""
        text = json.dumps(self.key, sort_keys=True)
        return Path(self.cache) / hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of a set, reduced.

    Attributes:
      moments: D of them.
      scores: D sums behind inception scores; empty where none was asked for.
      vectors: (D, N, A), a memory map where they are on disk; None where they were not kept.
      positions: (N,), of the images in their set.
    """

    moments: tuple[Moments, ...]
    scores: tuple[ClassSums, ...]
    vectors: np.ndarray | None
    positions: np.ndarray


def digest_of_images(images: np.ndarray) -> str:
    """Identity of images in memory or in a memory map: their type, shape and bytes, in 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{images.dtype}{images.shape}".encode())
    for start in range(0, len(images), BLOCK):
        digest.update(np.ascontiguousarray(images[start : start + BLOCK]).data)
    return digest.hexdigest()


def extract(
    measure: Callable[[Batch], Measured],
    open_batches: Callable[[int], Iterable[Batch]],
    *,
    num_images: int = 0,
    batch_size: int = 0,
    place: Place | None = None,
    dtype: str | None = "float32",
    num_splits: int = 0,
    split_seed: int | None = 0,
) -> FeatureSet:
    """Measures a set of images batch by batch; all processes take part, and all get the result.

    Every `BLOCK` images are reduced, and written. The next call with the same place goes on behind them, and gives the
    same bits as one that was not interrupted, provided that batches and devices are the same.

    Args:
      measure: a batch, or this process's part of it, to its features; should not wait for them.
      open_batches: number of a batch -> the batches from that one on.
      num_images: of the set, with those that the masks leave out. A place and splits need it.
      batch_size: of all processes together; a place needs it.
      place: where it is kept on disk; None keeps it in memory.
      dtype: of the features that are kept, "float32" or "float16"; None keeps none of them.
      num_splits: of the inception score, which needs logits; 0 leaves it out. split_seed: of `statistics.split_of`.

    Returns:
      The features of the images that the masks count, in the order of the batches.

    Raises:
      ValueError: the place is in use, seen differently by several processes, or of another set; no image counts;
        features too large for half precision.
    """
    if dtype is not None:
        checks.one_of("dtype", dtype, DTYPES)
    if place is not None:
        kept = {"format": _FORMAT, "kept": dtype, "num_splits": num_splits, "split_seed": split_seed}
        place = dataclasses.replace(place, key={**place.key, **kept})
    with _open_store(place, dtype, num_images) as store:
        splits = split_of(num_images, num_splits, split_seed) if num_splits else None
        sums = _Sums(store, (num_images, batch_size, BLOCK), splits, num_splits)
        if sums.is_finished:
            logger.info("features: %d images from '%s'", sums.count, store.directory)
            return sums.result()
        if sums.count:
            logger.info("features: go on behind %d images of '%s'", sums.count, store.directory)
        for measured in _one_ahead(measure, open_batches(sums.next_batch)):
            sums.add(jax.device_get(measured))
        if not sums.count and not sums.num_pending:
            raise ValueError("images: none of the set can be read; mend them, or name others")
        sums.finish()
        return sums.result()


def _one_ahead(measure: Callable[[Batch], Measured], batches: Iterable[Batch]) -> Iterator[Measured]:
    """What is measured of each batch, handed out once the next one is under way: the devices are never idle."""
    pending = None
    for batch in batches:
        ahead = measure(batch)
        if pending is not None:
            yield pending
        pending = ahead
    if pending is not None:
        yield pending


class _Sums:
    """Sums over the images so far: those of whole blocks, which are also in the store, and the batches behind them."""

    def __init__(self, store: "_Store", layout: tuple[int, ...], splits: np.ndarray | None, num_splits: int):
        self._store, self._layout, self._splits, self._num_splits = store, layout, splits, num_splits
        self.next_batch, self.is_finished = 0, False
        self._positions = np.zeros(0, np.int32)
        self._moments: list[Moments] = []
        self._scores: list[ClassSums] = []
        self._pending: list[Measured] = []
        self.num_pending = 0  # images
        self._restore(store.load())
        store.agree(self.next_batch, self.is_finished)

    @property
    def count(self) -> int:
        """Images of whole blocks."""
        return len(self._positions)

    def add(self, measured: Measured) -> None:
        """Takes a batch, on the host; whole blocks are reduced and written."""
        self._pending.append(measured)
        self.num_pending += int(np.sum(measured.mask))
        if self.num_pending >= BLOCK:
            self._reduce()

    def finish(self) -> None:
        """Reduces and writes what is left."""
        self.is_finished = True
        self._reduce()
        self._store.agree(self.next_batch, True)

    def result(self) -> FeatureSet:
        vectors = self._store.read_rows(self.count)
        return FeatureSet(tuple(self._moments), tuple(self._scores), vectors, self._positions)

    def _reduce(self) -> None:
        """Takes the pending batches into the sums, and writes these."""
        if self._pending:
            self._reduce_pending()
        self.next_batch += len(self._pending)
        self._pending, self.num_pending = [], 0
        self._store.save(self._arrays())

    def _reduce_pending(self) -> None:
        vectors, masks, positions, logits = zip(*self._pending, strict=True)
        mask = np.concatenate(masks)

        def counted_rows(by_batch: Iterable[Sequence[Any]]) -> list[np.ndarray]:
            return [np.concatenate(parts)[mask] for parts in zip(*by_batch, strict=True)]

        rows_D, positions_N = counted_rows(vectors), np.concatenate(positions)[mask].astype(np.int32)
        self._moments = _merged(self._moments, [Moments.of(rows) for rows in rows_D])
        if self._splits is not None:
            splits = self._splits[positions_N]
            parts = [ClassSums.of(rows, splits, self._num_splits) for rows in counted_rows(logits)]
            self._scores = _merged(self._scores, parts)
        self._store.write_rows(self.count, rows_D)
        self._positions = np.concatenate([self._positions, positions_N])

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "layout": np.array(self._layout), "next_batch": np.array(self.next_batch),
            "is_finished": np.array(self.is_finished), "positions": self._positions,
        }  # fmt: skip
        for d, moments in enumerate(self._moments):
            arrays |= {f"mean_{d}": moments.mean, f"scatter_{d}": moments.scatter}
        for d, score in enumerate(self._scores):
            arrays |= {f"{name}_{d}": value for name, value in score._asdict().items()}
        return arrays

    def _restore(self, arrays: Mapping[str, np.ndarray] | None) -> None:
        """Takes over a state; one of other batches, which is not finished, is left."""
        if arrays is None or not arrays["is_finished"] and tuple(arrays["layout"]) != self._layout:
            return
        self.next_batch, self.is_finished = int(arrays["next_batch"]), bool(arrays["is_finished"])
        self._positions, D = arrays["positions"], sum(name.startswith("mean_") for name in arrays)
        self._moments = [Moments(self.count, arrays[f"mean_{d}"], arrays[f"scatter_{d}"]) for d in range(D)]
        if self._splits is not None:
            self._scores = [ClassSums(*(arrays[f"{name}_{d}"] for name in ClassSums._fields)) for d in range(D)]


def _merged(totals: list[Any], parts: list[Any]) -> list[Any]:
    return [total.merge(part) for total, part in zip(totals, parts, strict=True)] if totals else parts


@contextlib.contextmanager
def _open_store(place: Place | None, dtype: str | None, num_images: int) -> Iterator["_Store"]:
    """The store of a place, locked by the first process, or in memory."""
    if place is None:
        yield _Store(None, dtype, num_images)
        return
    directory = place.directory
    key = json.loads(json.dumps(place.key))
    with RunLock(directory, "cache", "another cache") if jax.process_index() == 0 else contextlib.nullcontext():
        record = directory / "set.json"
        if record.is_file() and read_json(record) != key:
            raise ValueError(f"cache: '{record}' is of another set of images; remove '{directory}'")
        if jax.process_index() == 0:
            write_json(record, key)
        yield _Store(directory, dtype, num_images)


class _Store:
    """State and features of a set, in a directory that the first process writes and all read, or in memory."""

    def __init__(self, directory: Path | None, dtype: str | None, num_images: int):
        self.directory, self._dtype, self._num_images = directory, dtype, num_images
        self._state, self._features = (Path(directory or "") / name for name in ("state.npz", "features.npy"))
        self._is_writer = directory is None or jax.process_index() == 0
        self._rows: np.ndarray | None = None  # the memory map
        self._parts: list[np.ndarray] = []  # (D, n, A), in memory

    def load(self) -> dict[str, np.ndarray] | None:
        """The arrays of the state, None if there is none."""
        if self.directory is None or not self._state.is_file() or (self._dtype and not self._features.is_file()):
            return None
        try:
            with np.load(self._state, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("cache: '%s' cannot be read (%s); the set is measured anew", self._state, error)
            return None

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the state, whole or not at all, after the features that it counts."""
        if self.directory is None or not self._is_writer:
            return
        if isinstance(self._rows, np.memmap):
            self._rows.flush()
        with atomic_path(self._state) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def agree(self, next_batch: int, is_finished: bool) -> None:
        """Waits for the other processes, and checks that they have read the same state."""
        every = hosts.rows_of_all(np.array([[next_batch, is_finished]], np.int32))
        if self.directory is not None and (every != every[0]).any():
            raise ValueError(f"cache: '{self.directory}' is not the same for all processes; name one that they share")

    def write_rows(self, start: int, vectors: Sequence[np.ndarray]) -> None:
        """Keeps the features of the images from the `start`-th on."""
        if self._dtype is None or not self._is_writer:
            return
        rows_DNA = np.stack(vectors)
        if np.abs(rows_DNA).max(initial=0) > np.finfo(self._dtype).max:
            raise ValueError(
                f"dtype: {self._dtype} is too narrow for features of {np.abs(rows_DNA).max():g}; keep float32"
            )
        rows_DNA = rows_DNA.astype(self._dtype)
        if self.directory is None:
            self._parts.append(rows_DNA)
            return
        if self._rows is None:
            self._rows = self._open_rows(start, rows_DNA)
        self._rows[:, start : start + rows_DNA.shape[1]] = rows_DNA

    def read_rows(self, count: int) -> np.ndarray | None:
        """The features (D, N, A) of the first images; a map of the file can only be read."""
        if self._dtype is None:
            return None
        if self.directory is None:
            return np.concatenate(self._parts, axis=1)
        return np.load(self._features, mmap_mode="r")[:, :count]

    def _open_rows(self, start: int, rows_DNA: np.ndarray) -> np.ndarray:
        D, _, A = rows_DNA.shape
        if start:
            return np.load(self._features, mmap_mode="r+")
        shape = (D, self._num_images, A)
        return np.lib.format.open_memmap(self._features, "w+", np.dtype(self._dtype), shape)

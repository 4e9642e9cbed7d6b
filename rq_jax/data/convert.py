"""Image folders, parquet files, tars and LSUN's lmdb as images to convert; `array_records.write` writes them."""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from rq_jax.data import lmdb_files
from rq_jax.data.notices import tell
from rq_jax.data.sources import FolderRecords, Records, open_records
from rq_jax.data.sources.folder import SPLITS
from rq_jax.files import local_path

LSUN_SPLITS = {"train": "train", "val": "validation"}


class RecordImages:
    """The usable images of an opened source, in its order."""

    def __init__(self, records: Records, has_text: bool):
        self.records, self.class_names, self.has_text = records, records.class_names, has_text
        self._indices = [i for i in range(len(records)) if i not in records.incomplete]
        self.names = _checksum(os.fsencode(self._name(i)) for i in self._indices)

    def _name(self, index: int) -> str:
        return self.records.locate(index)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int | None, str | None]]:
        for index in self._indices[start:stop]:
            try:
                record = self.records.read(index)
            except ValueError as error:
                raise ValueError(f"--source: {self.records.locate(index)}: {error}; repair or remove it") from error
            yield record


class FolderImages(RecordImages):
    """A split of an image folder, as `data.name='folder'` reads it."""

    def __init__(self, directory: Path, split: str, labels: bool, text: bool):
        super().__init__(FolderRecords(directory, split, "folder" if labels else None, "txt" if text else None), text)

    def _name(self, index: int) -> str:
        return self.records.paths[index].as_posix()


class LmdbImages:
    """A category of LSUN as published: a directory with data.mdb, key -> WebP."""

    class_names, has_text = None, False

    def __init__(self, directory: Path):
        try:
            import lmdb
        except ModuleNotFoundError:
            raise ModuleNotFoundError("reading lmdb needs the package lmdb: install the extra rq_jax[lsun]") from None

        if not (directory / "data.mdb").is_file():
            raise FileNotFoundError(f"--source: no data.mdb in '{directory}'; give what LSUN's archive unpacks to")
        try:
            lmdb_files.check_size(directory / "data.mdb")
            self._file = lmdb.open(str(directory), readonly=True, lock=False, readahead=False, max_readers=1)
            with self._file.begin() as transaction:
                self._keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
        except (lmdb.Error, ValueError) as error:
            raise ValueError(f"--source: '{directory}' cannot be read as lmdb: {error}") from error
        self.names = _checksum(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int | None, str | None]]:
        with self._file.begin() as transaction:
            for key in self._keys[start:stop]:
                yield transaction.get(key), None, None


def open_folder(
    source: str | os.PathLike, max_damaged: int = 100, without: Collection[str] = ()
) -> dict[str, FolderImages]:
    """Open the splits of a folder, with labels and captions if most of the images have them.

    An image that then lacks its label or caption is left out, as a damaged one is, and counted.

    Args:
      source: the folder.
      max_damaged: images to leave out before it is an error.
      without: "labels" or "captions" that are not to be read.

    Raises:
      FileNotFoundError: no such folder, or no images in it.
      ValueError: more than `max_damaged` images lack what most have.
    """
    directory = local_path(source)
    plain = FolderRecords(directory, "train", None, None)
    paths = plain.dataset_paths
    having = {
        "labels": sum(plain.class_of(path) is not None for path in paths),
        "captions": sum(path in plain.listing.captioned for path in paths),
    }
    wanted = {what: 2 * count > len(paths) and what not in without for what, count in having.items()}
    for what, count in having.items():
        if count and not wanted[what]:
            tell(f"--source: {what} are left out; {count} of {len(paths)} images have one")
    splits = {}
    for split in (split for split in SPLITS if plain.split_counts.get(split)):
        try:
            splits[split] = FolderImages(directory, split, wanted["labels"], wanted["captions"])
        except FileNotFoundError as error:  # none of its images has one
            if split == "train":
                raise
            tell(f"--source: split '{split}' is left out; {error}")
    _check_left_out(splits, max_damaged)
    return splits


def open_files(
    kind: str, source: str | os.PathLike, max_damaged: int = 100, without: Collection[str] = ()
) -> dict[str, RecordImages]:
    """Open the splits of parquet files or tars, with the first of the columns of labels and captions.

    Args:
      kind: "parquet" or "webdataset".
      source: directory of the files.
      max_damaged: images without label or caption to leave out before it is an error.
      without: "labels" or "captions" that are not to be read.

    Raises:
      FileNotFoundError: no such directory, or no files in it.
      ValueError: more than `max_damaged` images lack a label or caption.
    """
    plain = open_records(kind, "all", source)
    label_key = None if "labels" in without else next(iter(plain.label_keys), None)
    text_key = None if "captions" in without else next(iter(plain.text_keys), None)
    tell(f"--source: labels are read from {label_key}, captions from {text_key}")
    splits = {
        split: RecordImages(open_records(kind, split, source, label_key, text_key), text_key is not None)
        for split in SPLITS
        if plain.split_counts.get(split)
    }
    _check_left_out(splits, max_damaged)
    return splits


def _check_left_out(splits: Mapping[str, RecordImages], max_damaged: int) -> None:
    left_out = sum(len(images.records.incomplete) for images in splits.values())
    if left_out > max_damaged:
        count = sum(len(images.records) for images in splits.values())
        raise ValueError(
            f"--max_damaged: {left_out} of {count} images lack a label or a caption, more than {max_damaged}; add what "
            "is missing, raise the limit, or give --without=labels or --without=captions"
        )


def open_lsun(source: str | os.PathLike) -> dict[str, LmdbImages]:
    """Open the splits of an LSUN category: `<source>_train_lmdb` and `<source>_val_lmdb`, or one such directory.

    Raises:
      FileNotFoundError: neither exists.
      ModuleNotFoundError: the package lmdb is not installed.
    """
    path = local_path(source)
    splits = {}
    for lsun_split, split in LSUN_SPLITS.items():
        for directory in (path.parent / f"{path.name}_{lsun_split}_lmdb", path):
            if directory.is_dir() and directory.name.endswith(f"_{lsun_split}_lmdb"):
                splits[split] = LmdbImages(directory)
                break
    if not splits:
        raise FileNotFoundError(
            f"--source: neither '{path}_train_lmdb' nor '{path}_val_lmdb' is there; give their common beginning"
        )
    return splits


def _checksum(names: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name + b"\0")
    return digest.hexdigest()

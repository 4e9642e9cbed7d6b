"""Conversion of image folders, parquet files, tars and LSUN's lmdb to a prepared TFDS dataset in ArrayRecord.

    <data_dir>/<name>/1.0.0/dataset_info.json, features.json, <name>-<split>.array_record-00000-of-00012 ...

Each file appears when it is whole, so an interrupted conversion resumes at the first missing file.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rq_jax.data import lmdb_files
from rq_jax.data.notices import tell
from rq_jax.data.sources import FolderRecords, Records, open_records
from rq_jax.data.sources.folder import SPLITS
from rq_jax.data.tfrecord import make_example
from rq_jax.files import RunLock, atomic_path, local_path, read_json, write_json
from rq_jax.report.progress import Progress

VERSION = "1.0.0"
PLAN = ".plan.json"  # settings of the call that began a dataset
IMAGES_PER_FILE = 10_000
LSUN_SPLITS = {"train": "train", "val": "validation"}


class Images(Protocol):
    """Encoded images of one split, read in order.

    May have `names`, a checksum of the names of the images in their order, by which a resumed conversion notices that
    the source changed.
    """

    class_names: tuple[str, ...] | None
    has_text: bool

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int | None, str | None]]:
        """Image, label and caption of images start..stop."""


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


def write(
    splits: Mapping[str, Images],
    name: str,
    data_dir: str | os.PathLike,
    pictures_per_file: int = IMAGES_PER_FILE,
) -> Path:
    """Write a prepared dataset, or the files of it that are missing.

    Args:
      splits: split name -> images.
      name: of the dataset, "<name>" or "<name>/<config>".
      data_dir: directory of TFDS datasets.
      pictures_per_file: images in a file, at least 1; the same in every call for one dataset.

    Returns:
      Directory of the dataset: open it by `name` and `data_dir`.

    Raises:
      ValueError: a name or number out of range, or files of an earlier call with other settings.
    """
    if pictures_per_file < 1:
        raise ValueError(f"--pictures_per_file: {pictures_per_file} must be at least 1")
    if not all(part.isidentifier() and part == part.lower() for part in name.split("/")) or name.count("/") > 1:
        raise ValueError(f"--name: '{name}' is no dataset name; use small letters, digits and _, as in my_faces")
    target, base = local_path(data_dir) / name / VERSION, name.partition("/")[0]
    counts = {split: len(images) for split, images in splits.items()}
    ranges = {split: _ranges(count, pictures_per_file) for split, count in counts.items()}
    first = next(iter(splits.values()))
    plan = {
        "pictures": counts, "pictures_per_file": pictures_per_file, "classes": first.class_names,
        "captions": first.has_text,
    }  # fmt: skip
    if all(hasattr(images, "names") for images in splits.values()):
        plan["names"] = {split: images.names for split, images in splits.items()}
    with (
        RunLock(target, "--name", "another --name"),
        Progress(sum(counts.values()), unit="image", title=name) as progress,
    ):
        _check_plan(target, plan)
        for rest in target.glob(".*.partial"):  # of a call that was killed
            rest.unlink()
        for split, images in splits.items():
            for i, (start, stop) in enumerate(ranges[split]):
                path = target / f"{base}-{split}.array_record-{i:05d}-of-{len(ranges[split]):05d}"
                _write_file(path, images, start, stop, progress)
    _write_metadata(target, base, first, ranges)
    return target


def _write_file(path: Path, images: Images, start: int, stop: int, progress: Progress) -> None:
    """Write images start..stop as one ArrayRecord file, unless an earlier call did."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if path.exists():
        progress.update(stop - start)
        return
    with atomic_path(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for image in images.read(start, stop):
            writer.write(make_example(_features(*image)))
            progress.update(1)
        writer.close()


def _write_metadata(target: Path, base: str, first: Images, ranges: Mapping[str, list[tuple[int, int]]]) -> None:
    """Write dataset_info.json and features.json, which make the files a prepared dataset."""
    import tensorflow_datasets as tfds

    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[stop - start for start, stop in parts],
            num_bytes=sum(path.stat().st_size for path in target.glob(f"{base}-{split}.array_record-*")),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=target, dataset_name=base, split=split, filetype_suffix="array_record",
                template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            ),
        )
        for split, parts in ranges.items()
    ]  # fmt: skip
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=tfds.features.FeaturesDict(_tfds_features(first)),
        split_infos=split_infos,
        check_data=False,
    )


def _checksum(names: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name + b"\0")
    return digest.hexdigest()


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _check_plan(target: Path, plan: dict[str, Any]) -> None:
    """Record the plan of a dataset, or check that it is the one of the call that began it."""
    path, plan = target / PLAN, json.loads(json.dumps(plan))
    earlier = read_json(path) if path.exists() else {}
    if name := next((name for name in plan if name in earlier and earlier[name] != plan[name]), None):
        if name == "names":
            raise ValueError(
                f"--source: its images differ from those with which '{target}' was begun; delete that, or choose "
                "another --name"
            )
        raise ValueError(
            f"--data_dir: '{target}' was begun with {name} {earlier.get(name)}, not {plan[name]}; delete it, or choose "
            "another --name"
        )
    write_json(path, plan, indent=None)


def _features(image: bytes, label: int | None, text: str | None) -> dict[str, Any]:
    features: dict[str, Any] = {"image": image}
    if label is not None:
        features["label"] = label
    if text is not None:
        features["caption"] = text.encode()
    return features


def _tfds_features(images: Images) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
    if images.class_names is not None:
        features["label"] = tfds.features.ClassLabel(names=list(images.class_names))
    if images.has_text:
        features["caption"] = tfds.features.Text()
    return features

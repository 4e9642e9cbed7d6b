"""Folders of pictures and LSUN's lmdb, written once as ArrayRecord: a prepared data set like any other.

    <data_dir>/<name>/1.0.0/dataset_info.json, features.json, <name>-<split>.array_record-00000-of-00012 ...

A file is written beside its place and moved there when it is whole: an interrupted call goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rq_jax.data.sources import FolderRecords
from rq_jax.data.tfrecord import make_example
from rq_jax.files import RunLock, write_atomic
from rq_jax.report.progress import Progress

VERSION = "1.0.0"
PLAN = ".plan.json"  # of the call that began a set
PICTURES_PER_FILE = 10_000
LSUN_SPLITS = {"train": "train", "val": "validation"}
_SPLITS = ("train", "validation")


class Pictures(Protocol):
    """Encoded pictures of one split, read in order."""

    class_names: tuple[str, ...] | None
    has_text: bool
    # May have `names`, a checksum of what the pictures are called in their order: it says whether they are the same.

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int | None, str | None]]:
        """Picture, label and caption of these."""


class FolderPictures:
    """A split of a folder of pictures, as `data.name='folder'` sees it."""

    def __init__(self, directory: Path, split: str, labels: bool, text: bool):
        keys = "folder" if labels else None, "txt" if text else None
        self._records = FolderRecords(directory, split, *keys)
        self.class_names, self.has_text = self._records.class_names, text
        places = (Path(self._records.locate(i)).relative_to(self._records.root) for i in range(len(self)))
        self.names = _checksum(place.as_posix().encode() for place in places)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int | None, str | None]]:
        for index in range(start, stop):
            yield self._records.read(index)


class LmdbPictures:
    """A category of LSUN as its authors give it: a directory with data.mdb, key to WebP."""

    class_names, has_text = None, False

    def __init__(self, directory: Path):
        try:
            import lmdb
        except ModuleNotFoundError:
            raise ModuleNotFoundError("reading lmdb needs the package lmdb: install the extra rq_jax[lsun]") from None

        if not (directory / "data.mdb").is_file():
            raise FileNotFoundError(f"--source: no data.mdb in '{directory}'; give what LSUN's archive unpacks to")
        try:
            self._file = lmdb.open(str(directory), readonly=True, lock=False, readahead=False, max_readers=1)
            with self._file.begin() as transaction:
                self._keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
        except lmdb.Error as error:
            raise ValueError(f"--source: '{directory}' cannot be read as lmdb: {error}") from error
        self.names = _checksum(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int | None, str | None]]:
        with self._file.begin() as transaction:
            for key in self._keys[start:stop]:
                yield transaction.get(key), None, None


def open_folder(source: str | os.PathLike) -> dict[str, FolderPictures]:
    """The splits of a folder; labels and captions are taken where every picture has one.

    Raises:
      FileNotFoundError: no such folder, or no pictures in it.
    """
    directory = Path(source).expanduser()

    def open_split(split: str, labels: bool = False, text: bool = False) -> FolderPictures | None:
        try:
            return FolderPictures(directory, split, labels, text)
        except FileNotFoundError:
            if split == "train" and not text:
                raise
            return None  # nothing is held out, or a caption is missing

    there = [split for split in _SPLITS if open_split(split) is not None]

    def has(**keys: bool) -> bool:
        try:
            return all(open_split(split, **keys) is not None for split in there)
        except ValueError:  # a picture outside of the folders of classes
            return False

    labels, text = has(labels=True), has(text=True)
    return {split: FolderPictures(directory, split, labels, text) for split in there}


def open_lsun(source: str | os.PathLike) -> dict[str, LmdbPictures]:
    """The splits of an LSUN category: `<source>_train_lmdb` and `<source>_val_lmdb`, or one such directory.

    Raises:
      FileNotFoundError: none of them is there.
      ModuleNotFoundError: without the package lmdb.
    """
    path = Path(source).expanduser()
    found = {}
    for theirs, ours in LSUN_SPLITS.items():
        for directory in (path.parent / f"{path.name}_{theirs}_lmdb", path):
            if directory.is_dir() and directory.name.endswith(f"_{theirs}_lmdb"):
                found[ours] = LmdbPictures(directory)
                break
    if not found:
        raise FileNotFoundError(
            f"--source: neither '{path}_train_lmdb' nor '{path}_val_lmdb' is there; give their common beginning"
        )
    return found


def write(
    splits: Mapping[str, Pictures],
    name: str,
    data_dir: str | os.PathLike,
    pictures_per_file: int = PICTURES_PER_FILE,
) -> Path:
    """Write a prepared data set, or what is missing of it.

    Args:
      splits: name -> pictures.
      name: of the data set, "<name>" or "<name>/<config>".
      data_dir: directory of TFDS data sets.
      pictures_per_file: at least 1; the same in every call for one set.

    Returns:
      The directory of the set: open it by `name` and `data_dir`.

    Raises:
      ValueError: a name or number out of range, or files of an earlier call with other settings.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    if pictures_per_file < 1:
        raise ValueError(f"--pictures_per_file: {pictures_per_file} must be at least 1")
    if not all(part.isidentifier() and part == part.lower() for part in name.split("/")) or name.count("/") > 1:
        raise ValueError(f"--name: '{name}' is no name of a data set; use small letters, digits and _, as in my_faces")
    target, base = Path(data_dir).expanduser() / name / VERSION, name.partition("/")[0]
    counts = {split: len(pictures) for split, pictures in splits.items()}
    plan = {split: _ranges(count, pictures_per_file) for split, count in counts.items()}
    files = {
        split: [target / f"{base}-{split}.array_record-{i:05d}-of-{len(ranges):05d}" for i in range(len(ranges))]
        for split, ranges in plan.items()
    }
    first = next(iter(splits.values()))
    kinds = {"classes": first.class_names, "captions": first.has_text}
    names = {split: pictures.names for split, pictures in splits.items() if hasattr(pictures, "names")}
    kinds |= {"names": names} if len(names) == len(splits) else {}
    bytes_of = dict.fromkeys(splits, 0)
    lock = RunLock(target, "--name", "another --name")
    with lock, Progress(sum(counts.values()), unit="picture", title=name) as progress:
        _check_earlier(target, {"pictures": counts, "pictures_per_file": pictures_per_file, **kinds})
        for split, pictures in splits.items():
            for path, (start, stop) in zip(files[split], plan[split], strict=True):
                if not path.exists():
                    unfinished = path.with_name(f".writing-{path.name}")
                    writer = ArrayRecordWriter(str(unfinished), "group_size:1")
                    for picture in pictures.read(start, stop):
                        writer.write(make_example(_features(*picture)))
                        progress.update(1)
                    writer.close()
                    os.rename(unfinished, path)
                else:
                    progress.update(stop - start)
                bytes_of[split] += path.stat().st_size
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=tfds.features.FeaturesDict(_describe(first)),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[stop - start for start, stop in plan[split]],
                num_bytes=bytes_of[split],
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=target, dataset_name=base, split=split, filetype_suffix="array_record",
                    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                ),
            )
            for split in splits
        ],
        check_data=False,
    )  # fmt: skip
    return target


def _checksum(names: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name + b"\0")
    return digest.hexdigest()


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _check_earlier(target: Path, plan: dict[str, Any]) -> None:
    """Note what is about to be written, or refuse to mix it with something else."""
    path, plan = target / PLAN, json.loads(json.dumps(plan))
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if name := next((name for name in plan if name in earlier and earlier[name] != plan[name]), None):
        if name == "names":
            raise ValueError(
                f"--source: its pictures are others than when '{target}' was begun; delete that, or choose another "
                "--name"
            )
        raise ValueError(
            f"--data_dir: '{target}' was begun with {name} {earlier.get(name)}, not {plan[name]}; delete it, or choose "
            "another --name"
        )
    write_atomic(path, json.dumps(plan).encode())


def _features(image: bytes, label: int | None, text: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"image": image}
    if label is not None:
        found["label"] = label
    if text is not None:
        found["caption"] = text.encode()
    return found


def _describe(pictures: Pictures) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
    if pictures.class_names is not None:
        features["label"] = tfds.features.ClassLabel(names=list(pictures.class_names))
    if pictures.has_text:
        features["caption"] = tfds.features.Text()
    return features

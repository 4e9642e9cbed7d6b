"""Where pictures come from: prepared TFDS data sets and folders, by index, without TensorFlow."""

import errno
import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rq_jax.data.tfrecord import Part, TfRecords
from rq_jax.data.twemoji.prepare import prepare

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = ("train", "validation")
_CACHE_BYTES = 2**29


class Records(Protocol):
    """Random access to encoded pictures."""

    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        """The encoded picture, its label and its caption; None where the set was opened without them."""

    def locate(self, index: int) -> str:
        """What to call this record in a message."""


class TfdsRecords:
    """One split of a prepared TFDS data set, stored as ArrayRecord or as TFRecord."""

    def __init__(self, builder, split: str, label_key: str | None, text_key: str | None):
        import tensorflow_datasets as tfds

        self.name, self.split = builder.info.full_name, split
        features = builder.info.features
        images = [key for key in features if isinstance(features[key], tfds.features.Image)]
        labels = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
        texts = list(_texts(features))
        if not images:
            raise ValueError(f"data set {self.name} has no Image feature: its features are {', '.join(features)}")
        self.image_key = "image" if "image" in images else images[0]
        self.label_key = _check_key("label_key", label_key, labels, self.name)
        self.text_key = _check_key("text_key", text_key, texts, self.name)
        self.class_names = tuple(features[label_key].names) if label_key else None
        try:
            builder.info.splits[split]
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"unknown split {split!r} of data set {self.name}: choose one of {splits}") from error
        if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
            files = builder.info.splits[split].file_instructions
            self._data = TfRecords([Part(os.fspath(f.filename), f.skip, f.take) for f in files])
            return
        decoders = {self.image_key: tfds.decode.SkipDecoding()}  # decoded here, where damage can be handled
        try:
            self._data = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"data set {self.name} is not stored as array_record, so it has no random access, nor as tfrecord: "
                "prepare it with download_and_prepare(file_format='array_record')"
            ) from error

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        try:
            record = self._data[index]
        except (RuntimeError, IndexError) as error:  # how array_record tells of files that are missing or damaged
            raise ValueError(f"cannot read: {error}") from error
        try:
            label = int(record[self.label_key]) if self.label_key else None
            return record[self.image_key], label, _first_text(record, self.text_key) if self.text_key else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the record is not as the data set's features say: {error!r}") from error

    def locate(self, index: int) -> str:
        return f"example {index} of {self.name}, split {self.split}"


class FolderRecords:
    """Every picture below a directory, in sorted order.

    Splits are the subfolders `train` and `validation` where there is one of them; otherwise a tenth of the
    files, chosen by a hash of their relative path, is `validation`. The split `all` is every picture, and one
    that ends in `.txt` is a file with a picture in each line: its path below the directory, or its name alone
    where no other has it. A label is the first folder below the split (label_key="folder"), a caption the
    `.txt` beside the picture (text_key="txt").
    """

    def __init__(self, data_dir: str | os.PathLike | None, split: str, label_key: str | None, text_key: str | None):
        if data_dir is None:
            raise ValueError("data_dir is missing: name='folder' needs the directory of the pictures")
        self.root = Path(data_dir).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of pictures at data_dir={str(self.root)!r}")
        self.label_key = _check_key("label_key", label_key, ["folder"], "folder")
        self.text_key = _check_key("text_key", text_key, ["txt"], "folder")
        is_list = split.endswith(".txt")
        if split not in (*_SPLITS, "all") and not is_list:
            allowed = f"{', '.join(_SPLITS)}, all, or a .txt file of names"
            raise ValueError(f"unknown split {split!r} of a folder: choose one of {allowed}")
        paths = _list_pictures(self.root)
        if not paths:
            raise FileNotFoundError(f"no pictures below {str(self.root)!r}: looked for {' '.join(_SUFFIXES)}")
        has_folders = any((self.root / name).is_dir() for name in _SPLITS)
        if is_list:
            self._paths = _listed(Path(split).expanduser(), self.root, paths)
        else:
            self._paths = [path for path in paths if split in ("all", _folder_split(path, has_folders))]
        if not self._paths:
            raise FileNotFoundError(f"split {split!r} of {str(self.root)!r} is empty: {len(paths)} pictures in all")
        self.class_names = None
        if label_key:
            self._classes = {path: self._class_of(path, has_folders) for path in paths}
            self.class_names = tuple(sorted(set(self._classes.values())))
            self._labels = {name: label for label, name in enumerate(self.class_names)}
        if text_key:
            for path in self._paths:
                if not (self.root / path).with_suffix(".txt").is_file():
                    raise FileNotFoundError(f"no caption beside {str(self.root / path)!r}: text_key='txt' needs one")

    def _class_of(self, path: Path, has_folders: bool) -> str:
        folders = path.parts[1:-1] if has_folders and path.parts[0] in _SPLITS else path.parts[:-1]
        if not folders:
            raise ValueError(f"{str(self.root / path)!r} is in no class folder: label_key='folder' needs one")
        return folders[0]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        path = self._paths[index]
        file = self.root / path
        label = self._labels[self._classes[path]] if self.label_key else None
        text = file.with_suffix(".txt").read_text(encoding="utf-8").strip() if self.text_key else None
        return file.read_bytes(), label, text

    def locate(self, index: int) -> str:
        return str(self.root / self._paths[index])


class ImageSource:
    """Decoded examples of `records`, with a memory copy of small sets and a stand-in for damaged pictures.

    A picture that cannot be read, or whose label is no class, is replaced by the next whole one, whose index the
    example then carries, and counted; more than `max_damaged` different ones are an error. Each worker process counts
    its own.
    """

    def __init__(self, records: Records, channels: int = 3, max_damaged: int = 100):
        if channels not in (1, 3):
            raise ValueError(f"channels={channels}: pictures are read with 1 (grey) or 3 (RGB)")
        if len(records) == 0:
            raise ValueError("the data set is empty")
        self.records, self.channels, self.max_damaged = records, channels, max_damaged
        self.damaged: set[int] = set()
        self._last_damage = ""
        self._cache: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}  # a worker process fills its own

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 (H,W,C), "index": int, "label": int or None, "text": str or None}."""
        index = int(index) % len(self)  # grain counts on through the epochs
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if candidate in self._cache:
                return self._cache[candidate]
            if candidate not in self.damaged:
                try:
                    return self._load(candidate)
                except (OSError, ValueError) as error:
                    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                        raise  # too many open files say nothing of this one
                    self.damaged.add(candidate)
                    self._last_damage = f"{self.records.locate(candidate)}: {error}"
                    logging.getLogger(__name__).warning("damaged picture %s", self._last_damage)
            if len(self.damaged) > self.max_damaged:
                limit = f"max_damaged={self.max_damaged}"
                raise ValueError(f"more than {limit} damaged pictures; the last is {self._last_damage}")
        raise ValueError(f"all {len(self)} pictures are damaged; the last is {self._last_damage}")

    def _load(self, index: int) -> dict:
        encoded, label, text = self.records.read(index)
        if label is not None and not 0 <= label < len(self.records.class_names):
            raise ValueError(f"label {label} is outside 0..{len(self.records.class_names) - 1}")
        example = {
            "image": decode_image(encoded, self.channels),
            "index": index,
            "label": label,
            "text": text,
        }
        if example["image"].nbytes * len(self) <= _CACHE_BYTES:
            self._cache[index] = example
        return example


def open_records(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    label_key: str | None = None,
    text_key: str | None = None,
) -> Records:
    """Open one split of a data set.

    Args:
      name: "twemoji" or "twemoji/256" (made on first use), "folder", or the name of a prepared TFDS data set.
      split: a split of it; TFDS slices such as "train[:50%]" too. Of a folder also a .txt file of names.
      data_dir: the folder of pictures, or the directory of TFDS data sets; None is the default place of each.
      label_key: a ClassLabel feature, or "folder"; None for no labels.
      text_key: a Text feature, or "txt"; None for no captions. Of several texts, as "captions/text" of
        COCO, the first.

    Returns:
      The records.

    Raises:
      FileNotFoundError: no such folder or prepared data set, or nothing in it.
      ValueError: an unknown split or key.
    """
    if name == "folder":
        return FolderRecords(data_dir, split, label_key, text_key)
    if name.partition("/")[0] == "twemoji":
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(prepare(data_dir, name))
    else:
        builder = _tfds_builder(name, data_dir)
    return TfdsRecords(builder, split, label_key, text_key)


def decode_image(encoded: bytes, channels: int) -> np.ndarray:
    """Decode a picture: upright, transparent parts white, 16 bits cut to 8.

    Args:
      encoded: a file of any format that Pillow reads.
      channels: 1 for grey, 3 for RGB.

    Returns:
      uint8 (H,W,channels).

    Raises:
      ValueError: the bytes are not a whole picture.
    """
    from PIL import Image, ImageOps

    try:
        # Differs from kakaobrain/rq-vae-transformer, whose loader leaves turned photographs turned.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip them to 8
            image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("pixels are floating-point numbers")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # decoders raise nearly anything for bytes that they cannot read
        raise ValueError(f"cannot decode: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _tfds_builder(name: str, data_dir: str | os.PathLike | None):
    import tensorflow_datasets as tfds

    where = "the default TFDS directory" if data_dir is None else f"data_dir={str(data_dir)!r}"
    try:
        builder = tfds.builder(name, data_dir=None if data_dir is None else Path(data_dir).expanduser())
    except (
        tfds.core.DatasetNotFoundError,
        ValueError,
        AssertionError,
    ) as error:  # no such name, config or version
        raise FileNotFoundError(
            f"unknown data set {name!r}: it is not prepared in {where}, and neither 'twemoji' nor 'folder'"
        ) from error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"data set {name!r} is not prepared in {where}: call its builder's "
            "download_and_prepare(file_format='array_record') first"
        )
    return builder


def _check_key(what: str, key: str | None, allowed: list[str], name: str) -> str | None:
    if key is not None and key not in allowed:
        raise ValueError(f"unknown {what}={key!r} of data set {name!r}: choose one of {', '.join(allowed) or '(none)'}")
    return key


def _list_pictures(root: Path) -> list[Path]:
    """Relative paths of all pictures below `root`, sorted; links to folders are followed, unless they lead back."""
    found = []
    for folder, below, files in os.walk(root, followlinks=True):
        base = Path(folder).relative_to(root)
        outer = {os.path.realpath(each) for each in (folder, *(root / each for each in base.parents))}
        below[:] = [name for name in below if os.path.realpath(os.path.join(folder, name)) not in outer]
        found.extend(base / file for file in files if file.lower().endswith(_SUFFIXES))
    return sorted(found)


def _listed(file: Path, root: Path, paths: list[Path]) -> list[Path]:
    """The pictures that a file names, in its order."""
    if not file.is_file():
        raise FileNotFoundError(f"no file of names at split={str(file)!r}")
    known, by_name = set(paths), {}
    for path in paths:
        by_name.setdefault(path.name, []).append(path)
    found = []
    for name in file.read_text(encoding="utf-8").split("\n"):
        if name := name.strip():
            candidates = [Path(name)] if Path(name) in known else by_name.get(name, [])
            if len(candidates) != 1:
                raise FileNotFoundError(
                    f"{name!r} of {str(file)!r} is {len(candidates)} of the {len(paths)} pictures below {str(root)!r}, "
                    "not one: list paths as seen from there"
                )
            found += candidates
    return found


def _texts(features: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the texts of a TFDS data set, "captions/text" for one inside of another feature."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.Text):
        yield "/".join(path)
    elif isinstance(features, tfds.features.Sequence):
        yield from _texts(features.feature, path)
    elif isinstance(features, tfds.features.FeaturesDict):
        for name in features:
            yield from _texts(features[name], (*path, name))


def _first_text(record: Mapping[str, Any], key: str) -> str:
    """A text, or the first one of several."""
    name = key
    while name not in record:
        outer, _, name = name.partition("/")
        record = record[outer]
    texts = record[name]
    if not isinstance(texts, bytes):
        if len(texts) == 0:
            raise ValueError(f"no text in {key!r}")
        texts = texts[0]
    return texts.decode()


def _folder_split(path: Path, has_folders: bool) -> str:
    if has_folders:
        return path.parts[0]
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return "validation" if digest[0] % 10 == 0 else "train"

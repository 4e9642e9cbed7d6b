"""Sources of images: prepared TFDS datasets and folders, with random access, without TensorFlow."""

import errno
import hashlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rq_jax.data.tfrecord import Part, TfRecords
from rq_jax.data.twemoji.prepare import prepare

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = ("train", "validation")
_CACHE_BYTES = 2**29


class Records(Protocol):
    """Random access to encoded images.

    Attributes:
      class_names: by number; None without labels.
      root, files: a directory, and names below it of the files that hold the records, for the fingerprint.
    """

    class_names: tuple[str, ...] | None
    root: Path
    files: Sequence[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        """Encoded image, label and caption; label and caption are None if the dataset was opened without them."""

    def locate(self, index: int) -> str:
        """Name of a record for messages."""


class TfdsRecords:
    """One split of a prepared TFDS dataset, stored as ArrayRecord or as TFRecord."""

    def __init__(self, builder, split: str, label_key: str | None, text_key: str | None):
        import tensorflow_datasets as tfds

        self.name, self.split = builder.info.full_name, split
        features = builder.info.features
        images = [key for key in features if isinstance(features[key], tfds.features.Image)]
        labels = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
        texts = list(_texts(features))
        if not images:
            raise ValueError(
                f"data.name: dataset '{self.name}' has no Image feature; its features are {', '.join(features)}"
            )
        self.image_key = "image" if "image" in images else images[0]
        self.label_key = _check_key("label_key", label_key, labels, self.name)
        self.text_key = _check_key("text_key", text_key, texts, self.name)
        self.class_names = tuple(features[label_key].names) if label_key else None
        try:
            builder.info.splits[split]
        except (KeyError, ValueError) as error:
            splits = ", ".join(builder.info.splits)
            raise ValueError(f"split: '{split}' is unknown in dataset '{self.name}'; allowed are {splits}") from error
        instructions = builder.info.splits[split].file_instructions
        self.root, self.files = Path(builder.data_dir), [os.path.basename(f.filename) for f in instructions]
        if builder.info.file_format == tfds.core.file_adapters.FileFormat.TFRECORD:
            self._data = TfRecords([Part(os.fspath(f.filename), f.skip, f.take) for f in instructions])
            return
        # TFDS hands out encoded images: a decoding error inside it would end the run.
        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        try:
            self._data = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"data.name: dataset '{self.name}' is stored as neither array_record nor tfrecord, so it has no random "
                "access; prepare it with download_and_prepare(file_format='array_record')"
            ) from error

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        try:
            record = self._data[index]
        except (RuntimeError, IndexError) as error:  # array_record's, for missing or damaged files
            raise ValueError(f"cannot read: {error}") from error
        try:
            label = int(record[self.label_key]) if self.label_key else None
            return record[self.image_key], label, _first_text(record, self.text_key) if self.text_key else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the record does not match the features of the dataset: {error!r}") from error

    def locate(self, index: int) -> str:
        return f"example {index} of {self.name}, split {self.split}"


class FolderRecords:
    """The images below a directory, in sorted order.

    Splits are the subfolders `train` and `validation` if one of them exists; otherwise `validation` is a tenth of the
    files, chosen by a hash of the relative path, so that new images move no old one between the splits. The split `all`
    is every image. A split that ends in `.txt` is a file with one image a line: its path below the directory, or its
    file name if that is unique. The label is the first folder below the split (label_key="folder"), the caption the
    `.txt` beside the image (text_key="txt").
    """

    def __init__(self, data_dir: str | os.PathLike | None, split: str, label_key: str | None, text_key: str | None):
        if data_dir is None:
            raise ValueError("data.data_dir: unset, but data.name 'folder' needs the directory of the images; set it")
        self.root = Path(data_dir).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.data_dir: '{self.root}' is no directory; give the folder of the images")
        self.label_key = _check_key("label_key", label_key, ["folder"], "folder")
        self.text_key = _check_key("text_key", text_key, ["txt"], "folder")
        paths = _list_images(self.root)
        if not paths:
            suffixes = " ".join(_SUFFIXES)
            raise FileNotFoundError(f"data.data_dir: '{self.root}' holds no images; their names end in {suffixes}")
        has_folders = any((self.root / name).is_dir() for name in _SPLITS)
        self._paths = _split_paths(split, self.root, paths, has_folders)
        self.class_names = None
        if label_key:
            # Over all splits, so that a class has the same number in each of them.
            self._classes = {path: self._class_of(path, has_folders) for path in paths}
            self.class_names = tuple(sorted(set(self._classes.values())))
            self._labels = {name: label for label, name in enumerate(self.class_names)}
        if text_key:
            self._check_captions()

    def _check_captions(self) -> None:
        for path in self._paths:
            if not (self.root / path).with_suffix(".txt").is_file():
                file = str(self.root / path)
                raise FileNotFoundError(
                    f"data.text_key: 'txt' needs a caption beside '{file}'; add it, or leave it unset"
                )

    def _class_of(self, path: Path, has_folders: bool) -> str:
        folders = path.parts[1:-1] if has_folders and path.parts[0] in _SPLITS else path.parts[:-1]
        if not folders:
            file = str(self.root / path)
            raise ValueError(
                f"data.label_key: 'folder' needs a class folder around '{file}'; move it, or leave it unset"
            )
        return folders[0]

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def files(self) -> list[str]:
        """Names of the images in order, and of their captions."""
        captions = [path.with_suffix(".txt") for path in self._paths] if self.text_key else []
        return [path.as_posix() for path in (*self._paths, *captions)]

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        path = self._paths[index]
        file = self.root / path
        label = self._labels[self._classes[path]] if self.label_key else None
        text = file.with_suffix(".txt").read_text(encoding="utf-8").strip() if self.text_key else None
        return file.read_bytes(), label, text

    def locate(self, index: int) -> str:
        return str(self.root / self._paths[index])


class ImageSource:
    """Decoded examples of `records`; small datasets stay in memory, damaged images are replaced.

    The stand-in of an image that cannot be read, or whose label is out of range, is the next undamaged one. It carries
    its own index, by which evaluation masks it out: it has its own turn. Which image stands in depends on the files
    alone, so a resumed run and every shard see the same one.

    Attributes:
      damaged: indices of the damaged images met so far; more than `max_damaged` are an error. Each worker process
        counts its own.
    """

    def __init__(self, records: Records, channels: int = 3, max_damaged: int = 100):
        if channels not in (1, 3):
            raise ValueError(f"data.channels: {channels} is not allowed; give 1 (grey) or 3 (RGB)")
        if len(records) == 0:
            raise ValueError("data.name: the split holds no examples; give another")
        self.records, self.channels, self.max_damaged = records, channels, max_damaged
        self.damaged: set[int] = set()
        self._last_damage = ""
        self._cache: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}  # each worker process fills its own

    def __getitem__(self, index: int) -> dict:
        """Decode an example: {"image": uint8 (H,W,C), "index": int, "label": int or None, "text": str or None}."""
        index = int(index) % len(self)  # in an endless stream grain's indices grow beyond the dataset
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if candidate in self._cache:
                return self._cache[candidate]
            if candidate not in self.damaged:
                try:
                    return self._load(candidate)
                except (OSError, ValueError) as error:
                    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                        raise  # too many open files: the process is at fault, not this image
                    self.damaged.add(candidate)
                    self._last_damage = f"{self.records.locate(candidate)}: {error}"
                    logging.getLogger(__name__).warning("damaged image %s", self._last_damage)
            if len(self.damaged) > self.max_damaged:
                raise ValueError(
                    f"data.max_damaged: more than {self.max_damaged} images are damaged; repair them or raise the "
                    f"limit; the last is {self._last_damage}"
                )
        raise ValueError(f"data.name: all {len(self)} images are damaged; the last is {self._last_damage}")

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
    """Open one split of a dataset.

    Args:
      name: "twemoji" or "twemoji/256" (built on first use), "folder", or the name of a prepared TFDS dataset.
      split: a split of it, or a TFDS slice such as "train[:50%]"; of a folder also a .txt file of names.
      data_dir: the image folder, or the directory of TFDS datasets; None is the default of each.
      label_key: a ClassLabel feature, or "folder"; None for no labels.
      text_key: a Text feature, or "txt"; None for no captions. Of several texts, as "captions/text" of
        COCO, the first.

    Returns:
      The records.

    Raises:
      FileNotFoundError: no such folder or prepared dataset, or nothing in it.
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
    """Decode an image: upright, on white where transparent, 16 bits reduced to 8.

    Args:
      encoded: content of a file in any format that Pillow reads.
      channels: 1 for grey, 3 for RGB.

    Returns:
      uint8 (H,W,channels).

    Raises:
      ValueError: the bytes are not a whole image.
    """
    from PIL import Image, ImageOps

    try:
        # Differs from kakaobrain/rq-vae-transformer, whose loader ignores the EXIF orientation.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip them to 8
            image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("pixels are floating-point numbers")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # decoders raise nearly any type for damaged bytes
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
            f"data.name: '{name}' is unknown; allowed are twemoji, folder and the datasets prepared in {where}"
        ) from error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"data.name: '{name}' is not prepared in {where}; call its builder's "
            "download_and_prepare(file_format='array_record') first"
        )
    return builder


def _check_key(what: str, key: str | None, allowed: list[str], name: str) -> str | None:
    if key is not None and key not in allowed:
        names = ", ".join(allowed) or "(none)"
        raise ValueError(f"data.{what}: '{key}' is unknown in dataset '{name}'; allowed are {names}")
    return key


def _list_images(root: Path) -> list[Path]:
    """Relative paths of all images below `root`, sorted; follows links to folders except into a folder around them."""
    images = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        base = Path(folder).relative_to(root)
        outer = {os.path.realpath(each) for each in (folder, *(root / each for each in base.parents))}
        # In place: os.walk descends into what is left in the list.
        subfolders[:] = [name for name in subfolders if os.path.realpath(os.path.join(folder, name)) not in outer]
        images.extend(base / file for file in files if file.lower().endswith(_SUFFIXES))
    return sorted(images)


def _split_paths(split: str, root: Path, paths: list[Path], has_folders: bool) -> list[Path]:
    """Those of the paths that belong to a split."""
    if split.endswith(".txt"):
        chosen = _listed_paths(Path(split).expanduser(), root, paths)
    elif split in (*_SPLITS, "all"):
        chosen = [path for path in paths if split in ("all", _folder_split(path, has_folders))]
    else:
        allowed = f"{', '.join(_SPLITS)}, all, or a .txt file of names"
        raise ValueError(f"split: '{split}' is unknown in a folder; allowed are {allowed}")
    if not chosen:
        raise FileNotFoundError(f"split: '{split}' of '{root}' is empty; it holds {len(paths)} images in all")
    return chosen


def _listed_paths(file: Path, root: Path, paths: list[Path]) -> list[Path]:
    """The images that a file names, in its order."""
    if not file.is_file():
        raise FileNotFoundError(f"split: '{file}' is no file; give a .txt file with one image name a line")
    known, by_name = set(paths), {}
    for path in paths:
        by_name.setdefault(path.name, []).append(path)
    listed = []
    for name in file.read_text(encoding="utf-8").split("\n"):
        if name := name.strip():
            candidates = [Path(name)] if Path(name) in known else by_name.get(name, [])
            if len(candidates) != 1:
                raise FileNotFoundError(
                    f"split: '{name}' in '{file}' names {len(candidates)} of the {len(paths)} images below '{root}', "
                    "not one; list paths relative to that directory"
                )
            listed += candidates
    return listed


def _texts(features: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the Text features of a TFDS dataset, "captions/text" for one inside another feature."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.Text):
        yield "/".join(path)
    elif isinstance(features, tfds.features.Sequence):
        yield from _texts(features.feature, path)
    elif isinstance(features, tfds.features.FeaturesDict):
        for name in features:
            yield from _texts(features[name], (*path, name))


def _first_text(record: Mapping[str, Any], key: str) -> str:
    """The text of a record, or the first of several."""
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

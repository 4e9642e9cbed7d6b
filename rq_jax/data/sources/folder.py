"""A folder of images."""

import collections
import hashlib
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from rq_jax.data.images import read_file, suffixes
from rq_jax.data.listing import CAPTION, MAX_TEXT_BYTES, list_images
from rq_jax.data.sources.records import check_key, tell_incomplete
from rq_jax.files import local_path
from rq_jax.settings.text import quoted

SPLITS = ("train", "validation", "test")
# Folders that are splits, in small letters, and the names by which a split may be asked for.
SPLIT_OF = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class FolderRecords:
    """The images below a directory, in sorted order; `listing` says which files count.

    Splits are the subfolders `train`, `validation` and `test`, or other usual names of these, if there is one of the
    first two; what lies beside them is no part of the dataset. Otherwise `validation` is a tenth of the files, chosen
    by a hash of the relative path, so that new images move no old one between the splits. The split `all` is every
    image. A split that ends in `.txt` is a file with one image a line: its path below the directory, or its file name
    if that is unique. The label is the first folder below the split (label_key="folder"), the caption the `.txt` beside
    the image (text_key="txt").

    Attributes:
      root: the directory.
      paths: of the images of this split, relative to `root`, in order.
      class_names: the class folders of all splits, so that a class has the same number in each; None without labels.
      dataset_paths: of the images of all splits, relative to `root`, sorted.
      split_counts: images of each split of the directory.
      incomplete: index -> why, of the images without a label or a caption that was asked for.
      listing: of the directory.
    """

    def __init__(self, data_dir: str | os.PathLike | None, split: str, label_key: str | None, text_key: str | None):
        if data_dir is None:
            raise ValueError("data.data_dir: unset, but data.name 'folder' needs the directory of the images; set it")
        self.root = local_path(data_dir)
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.data_dir: '{self.root}' is no directory; give the folder of the images")
        self.label_key = check_key("label_key", label_key, ["folder"], "folder")
        self.text_key = check_key("text_key", text_key, ["txt"], "folder")
        self.listing = list_images(self.root)
        self._has_folders = any(SPLIT_OF.get(name.lower()) in SPLITS[:2] for name in self.listing.folders)
        splits = {path: self._split_of(path) for path in self.listing.paths}
        self.dataset_paths = paths = [path for path in self.listing.paths if splits[path] is not None]
        if outside := len(splits) - len(paths):
            self.listing.passed_over["outside of the folders of splits"] += outside
        if not paths:
            names = " ".join(suffixes()) + self.listing.reasons()
            where = " in the folders of its splits" if self._has_folders else ""
            raise FileNotFoundError(f"data.data_dir: '{self.root}' holds no images{where}; their names end in {names}")
        self.listing.tell()
        self.split_counts = dict(collections.Counter(splits[path] for path in paths))
        self.label_keys = ["folder"] if any(self.class_of(path) for path in paths) else []
        self.text_keys = ["txt"] if self.listing.captioned else []
        self.paths = self._choose(split, paths, splits)
        self.class_names = None
        if label_key:
            classes = {self.class_of(path) for path in paths} - {None}
            self.class_names = tuple(sorted(classes))
            self._labels = {name: label for label, name in enumerate(self.class_names)}
        self.incomplete: Mapping[int, str] = dict(self._find_incomplete())
        tell_incomplete(self, split, "label_key: 'folder'" if label_key else "text_key: 'txt'")

    def class_of(self, path: Path) -> str | None:
        """The class folder of a relative path, its name in the composed form of Unicode; None without one."""
        folders = path.parts[1:-1] if self._has_folders else path.parts[:-1]
        return unicodedata.normalize("NFC", folders[0]) if folders else None

    def _split_of(self, path: Path) -> str | None:
        if self._has_folders:
            return SPLIT_OF.get(path.parts[0].lower()) if len(path.parts) > 1 else None
        digest = hashlib.sha256(os.fsencode(path.as_posix())).digest()
        return "validation" if digest[0] % 10 == 0 else "train"

    def _choose(self, split: str, paths: list[Path], splits: Mapping[Path, str | None]) -> list[Path]:
        """Those of the paths that belong to a split."""
        name = SPLIT_OF.get(split, split)
        if split.endswith(".txt"):
            chosen = _listed_paths(local_path(split), self.root, paths)
        elif name == "all":
            chosen = paths
        elif name in (SPLITS if self._has_folders else SPLITS[:2]):
            chosen = [path for path in paths if splits[path] == name]
        else:
            allowed = ", ".join((*(SPLITS if self._has_folders else SPLITS[:2]), "all, or a .txt file of names"))
            raise ValueError(f"split: '{split}' is unknown in a folder; allowed are {allowed}")
        if not chosen:
            setting = "train_split" if name == "train" else "validation_split"
            raise FileNotFoundError(
                f"split: '{split}' of '{self.root}' is empty; it holds {len(paths)} images in all; add some, or set "
                f"data.{setting}=all to read all of them, or to a .txt file of names"
            )
        return chosen

    def _find_incomplete(self):
        for index, path in enumerate(self.paths):
            if self.label_key and self.class_of(path) is None:
                yield index, "no class folder is around it"
            elif self.text_key and path not in self.listing.captioned:
                yield index, f"no caption, a {CAPTION} of the same name, is beside it"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def files(self) -> list[str]:
        """Names of the images in order, and of their captions."""
        captions = [path.with_suffix(CAPTION) for path in self.paths] if self.text_key else []
        return [path.as_posix() for path in (*self.paths, *captions)]

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        if index in self.incomplete:
            raise ValueError(self.incomplete[index])
        path = self.paths[index]
        file = self.root / path
        label = self._labels[self.class_of(path)] if self.label_key else None
        text = read_file(file.with_suffix(CAPTION), MAX_TEXT_BYTES) if self.text_key else None
        return read_file(file), label, None if text is None else decode_text(text).strip()

    def locate(self, index: int) -> str:
        return quoted(str(self.root / self.paths[index]), 1000)[1:-1]


def decode_text(data: bytes) -> str:
    """Text of a file: UTF-8, or UTF-16 where a byte order mark says so.

    Raises:
      ValueError: it is neither.
    """
    encodings = (encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark))
    return data.decode(next(encodings, "utf-8"))


def _listed_paths(file: Path, root: Path, paths: list[Path]) -> list[Path]:
    """The images that a file names, in its order."""
    if not file.is_file():
        raise FileNotFoundError(f"split: '{file}' is no file; give a .txt file with one image name a line")
    known, by_name = collections.defaultdict(list), collections.defaultdict(list)
    for path in paths:
        known[_plain(path.as_posix())].append(path)
        by_name[_plain(path.name)].append(path)
    listed = []
    for name in decode_text(file.read_bytes()).split("\n"):
        if name := name.strip():
            plain = _plain(name)
            if Path(plain).is_relative_to(root):
                plain = Path(plain).relative_to(root).as_posix()
            candidates = known.get(plain.removeprefix("./")) or by_name.get(plain, [])
            if len(candidates) != 1:
                raise FileNotFoundError(
                    f"split: {quoted(name)} in '{file}' names {len(candidates)} of the {len(paths)} images below "
                    f"'{root}', not one; list paths relative to that directory"
                )
            listed += candidates
    return listed


def _plain(name: str) -> str:
    """A name as it is compared: of the two forms of Unicode and of the two slashes, one."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))

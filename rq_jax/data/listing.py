"""What counts as an image, or another file of data, in a folder; the rest is passed over and counted by its reason."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from rq_jax.data.images import suffixes
from rq_jax.data.notices import tell
from rq_jax.settings.text import quoted

CAPTION = ".txt"
MAX_TEXT_BYTES = 2**20  # of a caption
HIDDEN = "hidden or left by other programs"
NOT_REGULAR = "no regular file"
UNREADABLE = "unreadable folder"
LINKED = "folder linked too often"
NO_SUFFIX = "without a suffix"
# Left behind by other systems and programs, in small letters; so is what begins with a dot or ends in "~".
_LEFT_BEHIND = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@recycle", "#recycle", "#snapshot",
    "$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__", "picasa.ini",
}  # fmt: skip
_ARCHIVES = {".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst"}
_READERS = {".parquet": "parquet", ".tar": "webdataset"}
_UNREAD_IMAGES = {
    ".heic", ".heif", ".jxl", ".avif", ".jp2", ".j2k", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr", ".dng", ".cr2",
    ".cr3", ".nef", ".arw", ".raw", ".eps", ".ps", ".pdf",
}  # fmt: skip
_MAX_VISITS = 16  # of one folder, through links
_NUM_TOLD = 6  # reasons in a line


@dataclasses.dataclass
class Listing:
    """The images below a folder, or files of data of another kind.

    Attributes:
      root: the folder.
      kind: of the files, for messages.
      paths: of the files, relative to `root`, sorted.
      captioned: those of the paths that have a caption, a `.txt` of the same name, beside them.
      folders: names of the folders directly in `root`.
      passed_over: reason -> number of files, or of folders that were not entered.
    """

    root: Path
    kind: str = "images"
    paths: list[Path] = dataclasses.field(default_factory=list)
    captioned: set[Path] = dataclasses.field(default_factory=set)
    folders: list[str] = dataclasses.field(default_factory=list)
    passed_over: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def describe(self) -> str:
        """One line: how many files there are, and what was passed over and why, the most frequent first."""
        return f"{quoted(str(self.root), 300)}: {len(self.paths)} {self.kind}{self.reasons()}"

    def reasons(self) -> str:
        """The end of a line: what was passed over and why."""
        if not self.passed_over:
            return ""
        reasons = [f"{count} {reason}" for reason, count in self.passed_over.most_common(_NUM_TOLD)]
        rest = len(self.passed_over) - len(reasons)
        reasons += [f"{rest} other kinds"] if rest else []
        return f"; passed over: {', '.join(reasons)}{_advice(set(self.passed_over))}"

    def tell(self) -> None:
        """Tell what was passed over, if anything was."""
        if self.passed_over:
            tell(self.describe())


def is_left_behind(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left behind by another system or program."""
    return name.startswith(".") or name.endswith("~") or name.lower() in _LEFT_BEHIND


def list_images(root: Path) -> Listing:
    """List the images below a folder, see `list_files`."""
    return list_files(root, suffixes(), "images")


def list_files(root: Path, wanted: tuple[str, ...], kind: str) -> Listing:
    """List the files below a folder that have one of the suffixes, and which of them have a caption.

    Links to folders are followed, except into a folder around them. One folder is entered `_MAX_VISITS`
    times at most, so that the time is linear however the folders link each other.
    """
    listing, visits = Listing(root, kind), collections.Counter[str]()
    real = os.path.realpath(root)
    pending = [(Path(), real, frozenset([real]))]  # folder, where it really is, and where those around it are
    while pending:
        base, real, outer = pending.pop()
        images, texts = {}, set()
        for entry in _entries(root / base, listing):
            if _is_folder(entry):
                inner = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                visits[inner] += 1
                if visits[inner] > _MAX_VISITS:
                    listing.passed_over[LINKED] += 1
                elif inner not in outer:
                    pending.append((base / entry.name, inner, outer | {inner}))
                    if base == Path():
                        listing.folders.append(entry.name)
            elif reason := _reason_against(entry, wanted):
                listing.passed_over[reason] += 1
            elif entry.name.endswith(CAPTION):
                texts.add(entry.name)
            else:
                images[entry.name] = base / entry.name
        listing.paths += images.values()
        if texts:
            is_captioned = (os.path.splitext(name)[0] + CAPTION in texts for name in images)
            listing.captioned.update(itertools.compress(images.values(), is_captioned))
    listing.paths.sort(key=lambda path: path.parts)  # the order of paths, without comparing them one by one
    listing.folders.sort()
    return listing


def _entries(folder: Path, listing: Listing) -> Iterator[os.DirEntry]:
    """What lies in a folder and is not left behind by other programs."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        listing.passed_over[UNREADABLE] += 1
        return
    for entry in entries:
        if is_left_behind(entry.name):
            listing.passed_over[HIDDEN] += 1
        else:
            yield entry


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _reason_against(entry: os.DirEntry, wanted: tuple[str, ...]) -> str | None:
    """Why a file is neither of those wanted nor a text; None if it is one."""
    try:
        if not entry.is_file():  # costs no call to the system, except for links
            return NOT_REGULAR
    except OSError:
        return NOT_REGULAR
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in wanted or entry.name.endswith(CAPTION):
        return None
    return plain_suffix(suffix)


def plain_suffix(suffix: str) -> str:
    """A suffix as a reason to pass over a file: foreign text only where it is short and plain."""
    return suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 10 else NO_SUFFIX


def _advice(reasons: set[str]) -> str:
    advice = []
    if reasons & _UNREAD_IMAGES:
        advice.append("convert images to .png or .jpg, as `magick mogrify -format png` does")
    advice += [f"data.name={name} reads {suffix}" for suffix, name in _READERS.items() if suffix in reasons]
    if reasons & _ARCHIVES:
        advice.append("unpack archives")
    if NO_SUFFIX in reasons:
        advice.append("name images after their format, as in 1.jpg")
    return f" ({'; '.join(advice)})" if advice else ""

"""Access to a file from elsewhere: reads stay within it, every error names it, and a change is noticed."""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from rq_jax.files import local_path
from rq_jax.settings.text import quoted

# The end of many messages.
DAMAGED = "copy or download it again"


class StateFileError(ValueError):
    """A file that is damaged, hostile, or of a kind that is not read here; one line."""


class Invalid(Exception):
    """Why a file is refused; `File.open` puts the file's name in front."""


def one_line(error: Exception) -> str:
    """The message of a library's error, which may quote the file."""
    return quoted(" ".join(str(error).split()), 200)


@dataclass(frozen=True)
class File:
    """A file in the state of its first opening; `name` is as the user wrote it."""

    name: str
    path: str
    size: int
    mtime_ns: int

    @contextlib.contextmanager
    def open(self) -> Iterator["Reader"]:
        """The file for reading.

        Raises:
          StateFileError: it cannot be read, has changed, or `Invalid` was raised while it was open.
        """
        try:
            handle = open(self.path, "rb", buffering=0)
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); give a file that you may read"
            raise StateFileError(f"'{self.name}': {reason}") from None
        try:
            with handle:
                now = os.fstat(handle.fileno())
                if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
                    raise Invalid("has changed since it was opened; read it again")
                yield Reader(self, handle)
        except Invalid as error:
            raise StateFileError(f"'{self.name}': {error}") from None


class Reader(NamedTuple):
    """An open file."""

    file: File
    handle: BinaryIO

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        """A uint8 array of `nbytes` bytes from an offset; the caller bounds their number."""
        buffer, done = np.empty(nbytes, np.uint8), 0
        self.handle.seek(offset)
        while done < nbytes:  # one call reads 2 GB at most
            count = self.handle.readinto(memoryview(buffer)[done:])
            if not count:
                raise Invalid(f"ends at byte {offset + done} of {offset + nbytes}; {DAMAGED}")
            done += count
        return buffer

    def read(self, offset: int, nbytes: int) -> bytes:
        """The same as bytes."""
        return self.array(offset, nbytes).tobytes()


def find_file(path: str | os.PathLike[str], expected: str) -> File:
    """A regular file that is not empty.

    Args:
      path: of the file.
      expected: what it should be, for the messages.

    Raises:
      FileNotFoundError: nothing is there.
      StateFileError: something else is there.
    """
    name, path = os.fspath(path), local_path(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"'{name}' does not exist; give {expected}") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise StateFileError(f"'{name}': cannot be read ({error}); give {expected}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise StateFileError(f"'{name}': is {kind}; give {expected}")
    if not status.st_size:
        raise StateFileError(f"'{name}': is empty; give {expected}")
    return File(name, os.path.abspath(path), status.st_size, status.st_mtime_ns)

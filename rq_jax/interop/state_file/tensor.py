"""An array in a file: its place and shape are known and checked, its values are read when they are asked for."""

import contextlib
import math
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

# An expanded tensor (stride 0) may be larger than what is stored, but not so much that it fills the memory.
_MAX_EXPANSION = 8
_ALWAYS_ALLOWED_NBYTES = 1 << 20
_CHUNK = 1 << 20
_MAX_AXES = 32
# The end of many messages.
DAMAGED = "copy or download it again"


class StateFileError(ValueError):
    """A file that is damaged, hostile, or of a kind that is not read here; one line."""


@dataclass(frozen=True)
class File:
    """A file as it was when it was first opened; `name` is how the user called it."""

    name: str
    path: str
    size: int
    mtime_ns: int

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file for reading, unbuffered.

        Raises:
          StateFileError: it cannot be read, or has changed.
        """
        try:
            file = open(self.path, "rb", buffering=0)
        except OSError as error:
            raise self.error(f"cannot be read ({error.strerror}); give a file that you may read") from None
        with file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
                raise self.error("has changed since it was opened; read it again")
            yield file

    def read_into(self, file: BinaryIO, offset: int, buffer: np.ndarray) -> None:
        """Fills a buffer of bytes from an offset."""
        view, done = memoryview(buffer), 0
        file.seek(offset)
        while done < len(view):  # one call reads 2 GB at most
            count = file.readinto(view[done:])
            if not count:
                raise self.error(f"ends at byte {offset + done} of {offset + len(view)}; {DAMAGED}")
            done += count

    def read(self, file: BinaryIO, offset: int, nbytes: int) -> bytes:
        """Bytes from an offset; for callers that have bounded their number."""
        buffer = np.empty(nbytes, np.uint8)
        self.read_into(file, offset, buffer)
        return buffer.tobytes()

    def error(self, what: str) -> StateFileError:
        """The refusal of this file, for the caller to raise."""
        return StateFileError(f"'{self.name}': {what}")


def find_file(path: str | os.PathLike[str], wanted: str) -> File:
    """A regular file that is not empty.

    Args:
      path: of the file.
      wanted: what it should be, for the message if it is missing.

    Raises:
      FileNotFoundError: nothing is there.
      StateFileError: something else is there.
    """
    name = os.fspath(path)
    try:
        found = os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"'{name}' does not exist; give {wanted}") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise StateFileError(f"'{name}': cannot be read ({error}); give {wanted}") from None
    file = File(name, os.path.abspath(name), found.st_size, found.st_mtime_ns)
    if not stat.S_ISREG(found.st_mode):
        what = "a directory" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise file.error(f"is {what}; give {wanted}")
    if not found.st_size:
        raise file.error(f"is empty; give {wanted}")
    return file


@dataclass(eq=False)
class Storage:
    """Bytes in a file that one or more tensors view.

    Attributes:
      file: where they are.
      key: which they are in that file.
      nbytes: how many they are, uncompressed.
      offset: of the first byte in the file; None as long as it is not known.
      deflated: compressed size, for a raw deflate stream; `offset` is then where the stream begins.
      skipped: uncompressed bytes of that stream in front of ours.
      crc: checksum of what stands in front, and of all with it; None to check nothing.
    """

    file: File
    key: str
    nbytes: int
    offset: int | None = None
    deflated: int | None = None
    skipped: int = 0
    crc: tuple[int, int] | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8."""
        if self.offset is None:
            raise self.file.error(f"storage {self.key!r} is missing; {DAMAGED}")
        buffer = np.empty(stop - start, np.uint8)
        with self.file.open() as file:
            if self.deflated is None:
                self.file.read_into(file, self.offset + start, buffer)
            else:
                _inflate(self, file, self.skipped + start, buffer)
        if self.crc and len(buffer) == self.nbytes and zlib.crc32(buffer, self.crc[0]) != self.crc[1]:
            raise self.file.error(f"{self.key!r} does not match its checksum; {DAMAGED}")
        return buffer


def _inflate(storage: Storage, file: BinaryIO, skip: int, buffer: np.ndarray) -> None:
    """Fills the buffer with uncompressed bytes from `skip` on."""
    done = 0
    for chunk in inflate(storage.file, file, storage.offset, storage.deflated):
        chunk, skip = chunk[skip:], max(skip - len(chunk), 0)
        chunk = chunk[: len(buffer) - done]
        buffer[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
        if done == len(buffer):
            return
    raise storage.file.error(f"{storage.key!r} ends too early; {DAMAGED}")


def inflate(source: File, file: BinaryIO, offset: int, nbytes: int) -> Iterator[bytes]:
    """Uncompressed pieces of at most 1 MB of a raw deflate stream of `nbytes` bytes."""
    stream, end = zlib.decompressobj(-zlib.MAX_WBITS), offset + nbytes
    while not stream.eof:
        packed = stream.unconsumed_tail
        if not packed and offset < end:
            packed = source.read(file, offset, min(_CHUNK, end - offset))
            offset += len(packed)
        try:
            piece = stream.decompress(packed, _CHUNK)
        except zlib.error as error:
            raise source.error(f"is damaged ({error}); {DAMAGED}") from None
        if not piece and not packed:
            return  # cut off; a piece can still come when all is read
        yield piece


class Tensor:
    """A tensor in a file, read anew whenever it is turned into an array.

    Attributes:
      shape: tuple of int.
      dtype: np.dtype of the array, in the machine's byte order.
    """

    __slots__ = ("_offset", "_root", "_stored", "_strides", "dtype", "shape")

    def __init__(
        self,
        storage: Storage,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ):
        """Checks that all elements lie within the storage.

        Args:
          storage: what is viewed.
          dtype: of the elements as stored.
          shape: of the tensor.
          strides: in elements; None for C order.
          offset: of the first element, in elements.

        Raises:
          StateFileError: elements outside, or a tensor far larger than what is stored.
        """
        if strides is None and len(shape) <= _MAX_AXES:
            strides = c_strides(shape)
        fits = len(shape) <= _MAX_AXES and len(shape) == len(strides)
        fits = fits and all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *strides))
        # NumPy counts the other axes of an empty array too.
        if not fits or math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 62:
            # Nothing is shown of them: who knows what they are.
            raise storage.file.error(f"holds an impossible tensor in storage {storage.key!r}; {DAMAGED}")
        count = math.prod(shape)
        end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if count else 0
        if end * dtype.itemsize > storage.nbytes:
            raise storage.file.error(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} ends outside the {storage.nbytes} "
                f"bytes of storage {storage.key!r}; {DAMAGED}"
            )
        if count * dtype.itemsize > max(_MAX_EXPANSION * storage.nbytes, _ALWAYS_ALLOWED_NBYTES):
            raise storage.file.error(
                f"a tensor of shape {shape} repeats the {storage.nbytes} bytes of storage {storage.key!r}; at "
                f"most {_MAX_EXPANSION} times is allowed; save it before it is expanded"
            )
        self.shape, self.dtype = shape, dtype if dtype.isnative else dtype.newbyteorder("=")
        self._root, self._stored, self._strides, self._offset = storage, dtype, strides, offset

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def storage(self) -> tuple[str, str]:
        """(file, key) of the bytes: equal for tensors that share them."""
        return self._root.file.path, self._root.key

    def view(self, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> "Tensor":
        """Another tensor on the same storage, with an offset from the first element of this one; see `__init__`."""
        skipped, rest = divmod(self._offset * self._stored.itemsize, dtype.itemsize)
        if rest or type(offset) is not int:
            raise self._root.file.error(f"holds an impossible tensor in storage {self._root.key!r}; {DAMAGED}")
        return Tensor(self._root, dtype, shape, strides, skipped + offset)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor of shape () has no length")
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """A new C-contiguous array, read from the file.

        Raises:
          StateFileError: the file has changed, is damaged, or is gone.
          ValueError: `copy=False`, which a file cannot grant.
        """
        if copy is False:
            raise ValueError("a tensor in a file is always copied; leave out copy=False")
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype if dtype is None else dtype)
        size = self._stored.itemsize
        # NumPy checks the stride of an axis of length 1 as well.
        strides = [stride if n > 1 else 0 for n, stride in zip(self.shape, self._strides, strict=True)]
        last = self._offset + sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))
        data = self._root.read(self._offset * size, (last + 1) * size)
        if self._stored == np.bool_:
            np.not_equal(data, 0, out=data.view(np.bool_))  # NumPy takes for granted that it is 0 or 1
        array = np.ndarray(self.shape, self._stored, data, 0, [size * stride for stride in strides])
        array = np.ascontiguousarray(array).reshape(self.shape)  # a shape of () became (1,)
        array = array.astype(self.dtype, copy=False)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype})"


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array, each at least 1."""
    strides: list[int] = []
    for size in reversed(shape[1:] + (1,)):
        strides.append((strides[-1] if strides else 1) * max(size, 1))
    return tuple(reversed(strides)) if shape else ()

"""An array in a file: its place and shape are checked at once, its values are read when they are asked for."""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from rq_jax.interop.state_file.files import DAMAGED, File, Invalid, Reader
from rq_jax.settings.text import quoted

# An expanded tensor (stride 0) may be larger than what is stored, but not so much that it fills the memory.
_MAX_EXPANSION = 8
_ALWAYS_ALLOWED_NBYTES = 1 << 20
_CHUNK = 1 << 16
_MAX_AXES = 32
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
    "uint8", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu",
)  # fmt: skip


def find_dtype(name: str) -> np.dtype:
    """The type of an array by its name.

    Raises:
      Invalid: it is none of those that are read.
    """
    if name not in DTYPES:
        raise Invalid(f"holds a tensor of type {quoted(name)}; allowed are {', '.join(DTYPES)}")
    import ml_dtypes  # noqa: F401  registers its types with NumPy

    return np.dtype(name)


@dataclass(eq=False)
class Storage:
    """Bytes in a file that one or more tensors view.

    Attributes:
      file: the file.
      key: name of the storage in it.
      nbytes: number of bytes, uncompressed.
      offset: of the first byte in the file.
      deflated: bytes of the raw deflate stream at `offset`; None for bytes as they are.
      crc: checksum of all bytes; None to check nothing.
    """

    file: File
    key: str
    nbytes: int
    offset: int = 0
    deflated: int | None = None
    crc: int | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8."""
        with self.file.open() as reader:
            if self.crc is None and self.deflated is None:
                return reader.array(self.offset + start, stop - start)
            data = self.head(reader)
            if len(data) < self.nbytes or self.crc not in (None, zlib.crc32(data)):
                raise Invalid(f"{quoted(self.key)} does not match its checksum; {DAMAGED}")
            return data[start:stop]

    def head(self, reader: Reader, limit: int | None = None) -> np.ndarray:
        """All bytes, or the first `limit`, as uint8; fewer where a deflate stream ends early."""
        nbytes = self.nbytes if limit is None else min(limit, self.nbytes)
        if self.deflated is None:
            return reader.array(self.offset, nbytes)
        data, done, end = np.empty(nbytes, np.uint8), 0, self.offset + self.deflated
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        for offset in range(self.offset, end, _CHUNK):
            if done == nbytes:
                break
            try:
                piece = stream.decompress(reader.read(offset, min(_CHUNK, end - offset)), nbytes - done)
            except zlib.error as error:
                raise Invalid(f"is damaged ({error}); {DAMAGED}") from None
            data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        return data[:done]


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
        """Check that all elements lie within the storage.

        Args:
          storage: that is viewed.
          dtype: of the elements as stored.
          shape: of the tensor.
          strides: in elements; None for C order.
          offset: of the first element, in bytes.

        Raises:
          Invalid: elements outside, or a tensor far larger than its storage.
        """
        if strides is None and len(shape) <= _MAX_AXES:
            strides = c_strides(shape)
        fits = len(shape) <= _MAX_AXES and len(shape) == len(strides)
        fits = fits and all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *strides))
        # NumPy counts the other axes of an empty array too.
        if not fits or math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 62:
            # Its numbers are not shown: they can be of any type and length.
            raise Invalid(f"holds an impossible tensor in storage {quoted(storage.key)}; {DAMAGED}")
        count = math.prod(shape)
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if count and offset + (last + 1) * dtype.itemsize > storage.nbytes:
            raise Invalid(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} ends outside the {storage.nbytes} "
                f"bytes of storage {quoted(storage.key)}; {DAMAGED}"
            )
        if count * dtype.itemsize > max(_MAX_EXPANSION * storage.nbytes, _ALWAYS_ALLOWED_NBYTES):
            raise Invalid(
                f"a tensor of shape {quoted(shape)} repeats the {storage.nbytes} bytes of storage "
                f"{quoted(storage.key)}; at most {_MAX_EXPANSION} times is allowed; save it before it is expanded"
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
        """Another tensor on the same storage, `offset` elements after the first of this one; see `__init__`."""
        start = self._offset + offset * dtype.itemsize if type(offset) is int and offset >= 0 else -1
        return Tensor(self._root, dtype, shape, strides, start)

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
        strides = [size * stride if n > 1 else 0 for n, stride in zip(self.shape, self._strides, strict=True)]
        last = sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))
        data = self._root.read(self._offset, self._offset + last + size)
        if self._stored == np.bool_:
            np.not_equal(data, 0, out=data.view(np.bool_))  # NumPy takes for granted that it is 0 or 1
        array = np.require(np.ndarray(self.shape, self._stored, data, 0, strides), requirements=["C", "ALIGNED"])
        return array.astype(self.dtype if dtype is None else dtype, copy=False)

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype})"


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array, each at least 1."""
    return tuple(math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape)))

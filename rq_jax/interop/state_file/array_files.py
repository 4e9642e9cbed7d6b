""".npz: a zip of .npy arrays, by NumPy.   .safetensors: a JSON header, then the bytes of all tensors in a row."""

import io
import json
import math
import re
import struct
import zlib
from typing import Any, BinaryIO

import numpy as np

from rq_jax.interop.state_file.tensor import DAMAGED, File, Storage, Tensor, inflate
from rq_jax.interop.state_file.zip_members import Member, locate

_MAX_NPY_HEADER = 10_000
_NPY_HEADER = re.compile(r"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([\dL, ]*)\),? ?\}\s*")
_NPY_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c(8|16))")
# More than a thousand to one is possible. An array of zeros is that small, and rarely larger than this.
_MAX_RATIO = 100
_ALWAYS_ALLOWED_NBYTES = 64 << 20

_MAX_HEADER = 4 << 20
_SAFETENSORS_DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?", "C64": "c8",
}  # fmt: skip
_SAFETENSORS_ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def read_npz(source: File, file: BinaryIO, members: dict[str, Member]) -> dict[str, Tensor]:
    """The arrays of an .npz by name.

    Args:
      source: the file.
      file: the same, open.
      members: its members.

    Raises:
      StateFileError: something else is in it.
    """
    if not members:
        raise source.error("is a zip that holds nothing; give one by torch.save or np.savez")
    nbytes = sum(member.nbytes for member in members.values())
    if nbytes > max(_ALWAYS_ALLOWED_NBYTES, _MAX_RATIO * source.size):
        raise source.error(
            f"packs {nbytes} bytes into {source.size}; at most {_MAX_RATIO} to one is read; save it with np.savez"
        )
    arrays = {}
    for name, member in members.items():
        if not name.endswith(".npy"):
            raise source.error(f"is a zip that holds {name!r}; one by torch.save holds data.pkl, an .npz only .npy")
        key = name.removesuffix(".npy")
        arrays[key] = _npy(source, file, member, locate(source, file, member, key))
    return arrays


def _npy(source: File, file: BinaryIO, member: Member, storage: Storage) -> Tensor:
    limit = min(12 + _MAX_NPY_HEADER, member.nbytes)
    if member.is_deflated:
        packed = source.read(file, storage.offset, min(member.packed_nbytes, 2 * limit))
        start = b""
        for piece in inflate(source, io.BytesIO(packed), 0, len(packed)):
            start += piece
            if len(start) >= limit:
                break
    else:
        start = source.read(file, storage.offset, limit)
    # Version 1 has a length of two bytes, versions 2 and 3 of four.
    layout = {b"\x93NUMPY\x01\x00": "<H", b"\x93NUMPY\x02\x00": "<I", b"\x93NUMPY\x03\x00": "<I"}.get(start[:8])
    if layout is None or len(start) < 12:
        raise source.error(f"holds {member.name!r}, which is no array of NumPy; {DAMAGED}")
    begin = 8 + struct.calcsize(layout)
    size = begin + struct.unpack_from(layout, start, 8)[0]
    if size > limit:
        raise source.error(
            f"holds {member.name!r} with a header that is too long; at most {_MAX_NPY_HEADER} bytes are read"
        )
    found = _NPY_HEADER.fullmatch(start[begin:size].decode("latin-1"))
    if not found or not _NPY_DTYPE.fullmatch(found[1]):
        what = f"type {found[1][:40]!r}" if found else "a type that is a structure, or damaged"
        raise source.error(
            f"holds {member.name!r} of {what}; allowed are bool, int, uint, float and complex; save it as one "
            "of these (bfloat16 as float32)"
        )
    dtype = np.dtype(found[1])
    sizes = [n.strip().removesuffix("L") for n in found[3].split(",") if n.strip()]  # Python 2 wrote 3L
    if len(sizes) > 32 or not all(re.fullmatch(r"\d{1,18}", n) for n in sizes):
        raise source.error(f"holds {member.name!r} of an impossible shape; {DAMAGED}")
    shape = tuple(int(n) for n in sizes)
    if math.prod(shape) * dtype.itemsize != member.nbytes - size:
        raise source.error(f"holds {member.name!r} of shape {shape} in {member.nbytes - size} bytes; {DAMAGED}")
    storage.nbytes, storage.crc = member.nbytes - size, (zlib.crc32(start[:size]), member.crc)
    if member.is_deflated:
        storage.skipped = size
    else:
        storage.offset += size
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape))) if found[2] == "True" else None
    return Tensor(storage, dtype, shape, strides)


def safetensors_header_size(source: File, start: bytes) -> int | None:
    """Size of the JSON header of a .safetensors that begins like this, None if it is none.

    Raises:
      StateFileError: it is one, but its header is too large.
    """
    if len(start) < 10 or start[8:9] != b"{":
        return None
    size = int.from_bytes(start[:8], "little")
    if size > source.size - 8 or size > _MAX_HEADER:
        limit = min(source.size - 8, _MAX_HEADER)
        raise source.error(f"has a .safetensors header of {size} bytes; at most {limit} are read; {DAMAGED}")
    return size


def read_safetensors(source: File, file: BinaryIO, header_size: int) -> dict[str, Tensor]:
    """The tensors of a .safetensors by name.

    Args:
      source: the file.
      file: the same, open.
      header_size: from `safetensors_header_size`.

    Raises:
      StateFileError: the header is not as it should be.
    """
    begin = 8 + header_size
    try:
        header = json.loads(source.read(file, 8, header_size).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else f"{error}"[:200]
        raise source.error(f"has a .safetensors header that is damaged ({what}); {DAMAGED}") from None
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": list(shape), "data_offsets": [start, stop], **rest} if (
                not rest and len(name) <= 1000
            ):
                pass
            case _:
                raise source.error(f"has a .safetensors header with a damaged entry {name[:80]!r}; {DAMAGED}")
        dtype = _safetensors_dtype(source, name, code)
        numbers = (start, stop, *shape)
        if len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise source.error(f"holds a tensor {name[:80]!r} of impossible shape or place; {DAMAGED}")
        if math.prod(shape) * dtype.itemsize != stop - start or begin + stop > source.size:
            raise source.error(f"holds a tensor {name[:80]!r} of shape {tuple(shape)} in [{start}, {stop}); {DAMAGED}")
        ranges.append((start, stop))
        storage = Storage(source, name, stop - start, begin + start)
        tensors[name] = Tensor(storage, dtype, tuple(shape))
    # The format has no gaps: what is in one could be anything.
    ends = [0, *(stop for _, stop in sorted(ranges))]
    if [start for start, _ in sorted(ranges)] != ends[:-1] or begin + ends[-1] != source.size:
        raise source.error(f"holds tensors that overlap or leave gaps; {DAMAGED}")
    return tensors


def _safetensors_dtype(source: File, name: str, code: str) -> np.dtype:
    if code in _SAFETENSORS_ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _SAFETENSORS_ML_DTYPES[code]))
    if code not in _SAFETENSORS_DTYPES:
        allowed = ", ".join((*_SAFETENSORS_DTYPES, *_SAFETENSORS_ML_DTYPES))
        raise source.error(f"holds a tensor {name[:80]!r} of type {code[:40]!r}; allowed are {allowed}")
    return np.dtype(_SAFETENSORS_DTYPES[code])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands there twice")
    return result

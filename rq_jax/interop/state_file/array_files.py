""".npz: a zip of .npy arrays, by NumPy.   .safetensors: a JSON header, then the bytes of all tensors in a row."""

import io
import math
import re
import warnings
import zipfile

import numpy as np

from rq_jax.files import parse_json
from rq_jax.interop.state_file.files import DAMAGED, Invalid, Reader, one_line
from rq_jax.interop.state_file.tensor import Storage, Tensor, find_dtype
from rq_jax.interop.state_file.zip_members import locate
from rq_jax.settings.text import quoted

_MAX_NPY_HEADER = 1000  # NumPy writes 128 bytes; the parser takes long where text is not what it expects
# Version 3 differs in the names of fields alone, and arrays with fields are not read.
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_NPY_DTYPE = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c(8|16))")
# More than a thousand to one is possible. An array of zeros is that small, and rarely larger than this.
_MAX_RATIO = 100
_ALWAYS_ALLOWED_NBYTES = 64 << 20

_MAX_HEADER = 4 << 20
_SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_npz(reader: Reader, members: dict[str, zipfile.ZipInfo]) -> dict[str, Tensor]:
    """The arrays of an .npz by name.

    Raises:
      Invalid: something else is in it.
    """
    if not members:
        raise Invalid("is a zip that holds nothing; give one by torch.save or np.savez")
    nbytes, size = sum(info.file_size for info in members.values()), reader.file.size
    if nbytes > max(_ALWAYS_ALLOWED_NBYTES, _MAX_RATIO * size):
        raise Invalid(f"packs {nbytes} bytes into {size}; at most {_MAX_RATIO} to one is read; save it with np.savez")
    for name in members:
        if not name.endswith(".npy"):
            raise Invalid(f"is a zip that holds {quoted(name)}; one by torch.save holds data.pkl, an .npz only .npy")
    with warnings.catch_warnings(action="ignore"):  # of headers by Python 2
        return {name.removesuffix(".npy"): _read_npy(reader, info) for name, info in members.items()}


def _read_npy(reader: Reader, info: zipfile.ZipInfo) -> Tensor:
    storage, name = locate(reader, info, info.filename.removesuffix(".npy")), info.filename
    storage.crc = info.CRC
    header = io.BytesIO(storage.head(reader, 12 + _MAX_NPY_HEADER).tobytes())
    try:
        shape, is_fortran, dtype = _NPY_HEADERS[np.lib.format.read_magic(header)](header)
    except Exception as error:  # the parsers behind it raise many kinds
        raise Invalid(f"holds {quoted(name)}, which is no array of NumPy ({one_line(error)}); {DAMAGED}") from None
    if not _NPY_DTYPE.fullmatch(dtype.str):
        raise Invalid(
            f"holds {quoted(name)} of type {quoted(dtype.str)}; allowed are bool, int, uint, float and complex; save "
            "it as one of these (bfloat16 as float32)"
        )
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape))) if is_fortran else None
    nbytes = info.file_size - header.tell()
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise Invalid(f"holds {quoted(name)} of shape {quoted(shape)} in {nbytes} bytes; {DAMAGED}")
    return Tensor(storage, dtype, shape, strides, header.tell())


def safetensors_header_size(reader: Reader, start: bytes) -> int | None:
    """Size of the JSON header of a .safetensors that begins like this, None if it is none.

    Raises:
      Invalid: it is one, but its header is too large.
    """
    if len(start) < 10 or start[8:9] != b"{":
        return None
    size, limit = int.from_bytes(start[:8], "little"), min(reader.file.size - 8, _MAX_HEADER)
    if size > limit:
        raise Invalid(f"has a .safetensors header of {size} bytes; at most {limit} are read; {DAMAGED}")
    return size


def read_safetensors(reader: Reader, header_size: int) -> dict[str, Tensor]:
    """The tensors of a .safetensors by name.

    Raises:
      Invalid: the header is damaged, or its tensors do not fill the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(reader.file.path, framework="numpy"):
            pass  # checks the header; its tensors would keep the file open and mapped, and lack types in NumPy
        header = parse_json(reader.read(8, header_size), "its header")
    except (SafetensorError, ValueError) as error:
        raise Invalid(f"is no valid .safetensors ({one_line(error)}); {DAMAGED}") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            allowed = ", ".join(_SAFETENSORS_DTYPES)
            raise Invalid(f"holds a tensor {quoted(name)} of type {quoted(entry['dtype'])}; allowed are {allowed}")
        start, stop = entry["data_offsets"]
        storage = Storage(reader.file, name, stop - start, 8 + header_size + start)
        tensors[name] = Tensor(storage, find_dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"]))
    return tensors

"""The header of an lmdb file, checked before the library maps it: reading behind the end would end the process."""

import struct
from pathlib import Path

from rq_jax.data.images import is_regular

_MAGIC = 0xBEEFC0DE
_PAGE_HEADER = 16
# magic, version, address, size of the map, two trees (page size, flags, depth, 4 page counts, root), last page, number
_META = struct.Struct("<IIQQ" + "IHHQQQQQ" * 2 + "QQ")
_PAGE_SIZE, _LAST_PAGE = 4, 20  # positions among these fields
_PAGE_SIZES = tuple(2**i for i in range(8, 17))


def check_size(path: Path) -> None:
    """Check that a data.mdb is as long as its header says.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no lmdb file, or a truncated one.
    """
    if not is_regular(path):
        raise ValueError("not a regular file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = _read_meta(file.read(_PAGE_HEADER + _META.size))
        if first is None or first[_PAGE_SIZE] not in _PAGE_SIZES:
            raise ValueError("it does not begin as an lmdb file does")
        file.seek(first[_PAGE_SIZE])
        metas = [first, _read_meta(file.read(_PAGE_HEADER + _META.size))]  # of the last two transactions
    needed = max((meta[_LAST_PAGE] + 1) * first[_PAGE_SIZE] for meta in metas if meta)
    if size < needed:
        raise ValueError(f"it is truncated: {size} of {needed} bytes are there")


def _read_meta(page: bytes) -> tuple[int, ...] | None:
    if len(page) < _PAGE_HEADER + _META.size:
        return None
    meta = _META.unpack_from(page, _PAGE_HEADER)
    return meta if meta[0] == _MAGIC else None

"""Samples of a webdataset tar by the offsets of their members, without unpacking anything.

Python's tarfile is not used: it keeps every header in memory, and its readers of sizes and of extended headers have
been made to run without end. Here each header is 512 bytes further, or the scan ends.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rq_jax.data.file_index import cached_index
from rq_jax.data.images import MAX_BYTES, suffixes
from rq_jax.data.listing import CAPTION, HIDDEN, MAX_TEXT_BYTES, NOT_REGULAR, is_left_behind

CLASS = ".cls"
OTHER, NO_IMAGE, CUT = "of other suffixes or too large", "samples without an image", "files cut short or damaged"
REASONS = (HIDDEN, NOT_REGULAR, OTHER, NO_IMAGE, CUT)
MAX_CLASSES = 2**20

_BLOCK = 512
_MAX_HEADER_BYTES = 2**20  # of an extended header
_COLUMNS = 5  # offset and size of the image, offset and size of the caption, class number; -1 where there is none
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    name: str
    is_regular: bool
    offset: int
    size: int


def samples(path: str) -> tuple[np.ndarray, dict[str, int]]:
    """The samples of a tar, int64 (N, 5), and how many members were passed over by reason.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no tar, or a compressed one.
    """
    # The last row counts what was passed over.
    rows = cached_index("tar_places", path, _COLUMNS, _scan, lambda rows, size: len(rows) > 0)
    return rows[:-1], {reason: int(count) for reason, count in zip(REASONS, rows[-1], strict=True) if count}


def _scan(path: str, size: int) -> Iterator[list[int]]:
    """Yield a row a sample: members next to each other whose names are the same up to the first dot."""
    passed_over = dict.fromkeys(REASONS, 0)
    row, key = [-1] * _COLUMNS, None
    file = os.open(path, os.O_RDONLY)
    try:
        for member in members(file, path, size):
            folder, _, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if reason := _reason_against(member, suffix := dot + suffix.lower()):
                passed_over[reason] += 1
                continue
            if (folder, stem) != key and key is not None:
                yield from _finished(row, passed_over)
                row = [-1] * _COLUMNS
            key = folder, stem
            if suffix == CLASS:
                row[4] = _class(os.pread(file, member.size, member.offset))
            else:
                column = 2 if suffix == CAPTION else 0
                row[column : column + 2] = member.offset, member.size  # of several images the last
        if key is not None:
            yield from _finished(row, passed_over)
    finally:
        os.close(file)
    yield list(passed_over.values())


def _finished(row: list[int], passed_over: dict[str, int]) -> Iterator[list[int]]:
    if row[0] < 0:
        passed_over[NO_IMAGE] += 1
    else:
        yield row


def _reason_against(member: Member, suffix: str) -> str | None:
    if any(is_left_behind(part) for part in member.name.removeprefix("./").split("/")):
        return HIDDEN
    if member.size < 0:
        return CUT
    if not member.is_regular:
        return NOT_REGULAR
    if suffix not in (CAPTION, CLASS, *suffixes()):
        return OTHER
    return OTHER if member.size > (MAX_TEXT_BYTES if suffix in (CAPTION, CLASS) else MAX_BYTES) else None


def _class(text: bytes) -> int:
    try:
        return label if 0 <= (label := int(text[:20])) < MAX_CLASSES else -1
    except ValueError:
        return -1


def members(file: int, path: str, size: int) -> Iterator[Member]:
    """Yield the files of a tar up to its end, or to the first header that is damaged: one of negative size tells of it.

    Raises:
      ValueError: it is no tar, or a compressed one.
    """
    position, long_name = 0, None
    while position + _BLOCK <= size or position == 0:
        header = os.pread(file, _BLOCK, position)
        if position and not any(header):
            return  # the end mark
        length = _number(header[124:136] or b"?")
        if len(header) < _BLOCK or not _matches_checksum(header) or length is None or position + _BLOCK + length > size:
            if position == 0:
                kind = next((name for mark, name in _COMPRESSED.items() if header.startswith(mark)), None)
                reason = f"is compressed by {kind}, so that its members have no offsets; unpack it" if kind else None
                raise ValueError(f"data.data_dir: '{path}' {reason or 'is no tar file, or a truncated one'}")
            yield Member("?", False, position, -1)
            return
        offset, kind = position + _BLOCK, header[156:157]
        if kind in b"xL" and length <= _MAX_HEADER_BYTES:
            content = os.pread(file, length, offset)
            long_name = _pax_path(content) if kind == b"x" else content.rstrip(b"\0")
        elif kind not in b"gKxL5":  # nor folders
            name = header[:100].split(b"\0")[0]
            if header[257:262] == b"ustar" and header[345:346] != b"\0" and header[257:265] != b"ustar  \0":
                name = header[345:500].split(b"\0")[0] + b"/" + name
            name = long_name or name
            yield Member(name.decode("utf-8", "surrogateescape"), kind in b"0\0", offset, length)
            long_name = None
        position = offset + -(-length // _BLOCK) * _BLOCK


def _number(field: bytes) -> int | None:
    """A size, in octal digits or, where the first bit is set, in binary; None if it is none."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8) if field[0] < 0x80 and b"-" not in field else None
    except ValueError:
        return None


def _matches_checksum(header: bytes) -> bool:
    digits = header[148:156].strip(b" \0")
    try:
        return int(digits, 8) == sum(header) - sum(header[148:156]) + 8 * 0x20
    except ValueError:
        return False


def _pax_path(content: bytes) -> bytes | None:
    """The name in an extended header, whose records are "<length> <key>=<value>" with a line break."""
    position = 0
    while position < len(content):
        digits = content[position : position + 12].partition(b" ")[0]
        if not digits.isdigit() or not 0 < int(digits) <= len(content) - position:
            return None
        end = position + int(digits)
        if content.startswith(b"path=", position + len(digits) + 1):
            return content[position + len(digits) + 6 : end - 1]
        position = end
    return None

"""The members of a zip file: where they lie and how large they are. Nothing is extracted.

The format is in PKWARE's APPNOTE. zipfile of the standard library repairs and guesses where this reader refuses,
and it holds a directory of any size in memory.
"""

import struct
from typing import BinaryIO, NamedTuple

from rq_jax.interop.state_file.tensor import DAMAGED, File, Storage

_MAX_DIRECTORY = 8 << 20
_MAX_MEMBERS = 50_000

_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8


class Member(NamedTuple):
    """One line of the directory."""

    name: str
    raw_name: bytes
    header: int  # offset of the local header
    nbytes: int
    packed_nbytes: int
    is_deflated: bool
    crc: int


def read_members(source: File, file: BinaryIO) -> dict[str, Member]:
    """The members by name; directories are left out.

    Raises:
      StateFileError: damaged, in several parts, encrypted, packed by an unknown method, a name twice, a path as name.
    """
    directory, count = _directory(source, file)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        if len(directory) - position < _ENTRY.size:
            raise source.error(f"has a damaged zip directory; {DAMAGED}")
        entry = _ENTRY.unpack_from(directory, position)
        (
            magic,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            nbytes,
            name_size,
            extra_size,
            comment_size,
            disk,
            _,
            _,
            header,
        ) = entry
        extra_at = position + _ENTRY.size + name_size
        raw_name = directory[extra_at - name_size : extra_at]
        extra = directory[extra_at : extra_at + extra_size]
        position = extra_at + extra_size + comment_size
        if magic != b"PK\x01\x02" or position > len(directory):
            raise source.error(f"has a damaged zip directory; {DAMAGED}")
        nbytes, packed, header = _widen(extra, nbytes, packed, header)
        name = _name(source, raw_name)
        if name in members:
            raise source.error(f"holds {name!r} twice; write it again")
        if flags & 0x2041:
            raise source.error(f"holds {name!r} encrypted; decrypt it first")
        if method not in (_STORED, _DEFLATED) or disk:
            raise source.error(f"holds {name!r} packed by method {method}; allowed are stored and deflated")
        if (method == _STORED and packed != nbytes) or header + _LOCAL.size + name_size + packed > source.size:
            raise source.error(f"is too short for its member {name!r}; {DAMAGED}")
        if name.endswith("/") and not nbytes:
            continue
        members[name] = Member(name, raw_name, header, nbytes, packed, method == _DEFLATED, crc)
    if position != len(directory):
        raise source.error(f"has a damaged zip directory; {DAMAGED}")
    return members


def locate(source: File, file: BinaryIO, member: Member, key: str) -> Storage:
    """The bytes of a member.

    Raises:
      StateFileError: its local header does not say what the directory says.
    """
    size = _LOCAL.size + len(member.raw_name)
    header = source.read(file, member.header, size)
    magic, _, _, method, _, _, _, packed, nbytes, name_size, extra_size = _LOCAL.unpack_from(header)
    # Sizes are 0 where they follow the data, all ones where they stand in the extra field.
    sizes = {(member.packed_nbytes, packed), (member.nbytes, nbytes)}
    agrees = all(local in (said, 0, 0xFFFFFFFF) for said, local in sizes)
    agrees &= magic == b"PK\x03\x04" and method == (_DEFLATED if member.is_deflated else _STORED)
    agrees &= name_size == len(member.raw_name) and header[_LOCAL.size :] == member.raw_name
    offset = member.header + size + extra_size
    if not agrees or offset + member.packed_nbytes > source.size:
        raise source.error(f"says of its member {member.name!r} one thing here and another there; {DAMAGED}")
    return Storage(source, key, member.nbytes, offset, member.packed_nbytes if member.is_deflated else None)


def _directory(source: File, file: BinaryIO) -> tuple[bytes, int]:
    """The central directory and how many members it lists."""
    tail_at = max(source.size - _END.size - 0xFFFF - _LOCATOR64.size, 0)
    tail = source.read(file, tail_at, source.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise source.error(f"has no zip directory at its end; {DAMAGED}")
    _, disk, first_disk, count, total, size, offset, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if b"PK\x06\x07" == tail[max(at - _LOCATOR64.size, 0) : at][:4] and at >= _LOCATOR64.size:
        where = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)[2]
        if where + _END64.size > source.size:
            raise source.error(f"has a damaged zip directory; {DAMAGED}")
        magic, _, _, _, disk, first_disk, count, total, size, offset = _END64.unpack(
            source.read(file, where, _END64.size)
        )
        end = where if magic == b"PK\x06\x06" else -1
    if disk or first_disk or count != total:
        raise source.error("is one part of several; put them together first")
    if size > _MAX_DIRECTORY or count > _MAX_MEMBERS:
        raise source.error(f"lists {count} zip members in {size} bytes; at most {_MAX_MEMBERS} in {_MAX_DIRECTORY}")
    if offset + size != end:
        raise source.error(f"has a damaged zip directory; {DAMAGED}")
    return source.read(file, offset, size), count


def _widen(extra: bytes, *values: int) -> list[int]:
    """The values, those that are all ones replaced from the zip64 extra field in turn."""
    wide: list[int] = []
    position = 0
    while position + 4 <= len(extra) and not wide and 0xFFFFFFFF in values:
        tag, size = struct.unpack_from("<2H", extra, position)
        if tag == 1:
            data = extra[position + 4 : position + 4 + min(size, 24)]
            wide = [number for (number,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8])]
        position += 4 + size
    return [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in values]


def _name(source: File, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("cp437")
    if (
        not 0 < len(raw) <= 1000
        or name.startswith("/")
        or "\\" in name
        or ".." in name.split("/")
        or not name.isprintable()
    ):
        raise source.error(f"holds a member of the name {name[:80]!r}; a file that was saved as weights has none such")
    return name

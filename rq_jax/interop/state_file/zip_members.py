"""The members of a zip file: where they lie and how large they are. Nothing is extracted.

`zipfile` decodes the entries of the directory. It would guess where the directory is, read one of any size and ignore
wrong counts, so the directory is located and bounded here, and its entries are compared with the local headers.
The format is in PKWARE's APPNOTE.
"""

import io
import struct
import zipfile

from rq_jax.interop.state_file.files import DAMAGED, Invalid, Reader
from rq_jax.interop.state_file.tensor import Storage
from rq_jax.settings.text import quoted

_MAX_DIRECTORY = 8 << 20
_MAX_MEMBERS = 20_000  # more storages than a pickle can name
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")
_BROKEN = f"has a damaged zip directory; {DAMAGED}"
_ENCRYPTED = 0x2041  # bits of the flags


def read_members(reader: Reader) -> dict[str, zipfile.ZipInfo]:
    """The members by name; directories are left out.

    Raises:
      Invalid: damaged, in several parts, encrypted, packed by an unknown method, a name twice, a path as name.
    """
    directory, count = _directory(reader)
    end = _END.pack(b"PK\x05\x06", 0, 0, 0, 0, len(directory), 0, 0)
    try:
        end_of_entries = 0
        for _ in range(count):  # zipfile cuts off a last entry that is too long
            name_extra_comment = struct.unpack_from("<3H", directory, end_of_entries + 28)
            end_of_entries += 46 + sum(name_extra_comment)
        with zipfile.ZipFile(io.BytesIO(directory + end)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        raise Invalid(_BROKEN) from None
    if end_of_entries != len(directory) or len(infos) != count:
        raise Invalid(_BROKEN)
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        _check(reader, info)
        if info.filename in members:
            raise Invalid(f"holds {quoted(info.filename)} twice; write it again")
        if not info.filename.endswith("/") or info.file_size:
            members[info.filename] = info
    return members


def locate(reader: Reader, info: zipfile.ZipInfo, key: str) -> Storage:
    """The bytes of a member.

    Raises:
      Invalid: its local header differs from its entry in the directory.
    """
    raw_name = _raw_name(info)
    size = _LOCAL.size + len(raw_name)
    header = reader.read(info.header_offset, size)
    magic, _, _, method, _, _, _, packed, nbytes, name_size, extra_size = _LOCAL.unpack_from(header)
    # Sizes are 0 where they follow the data, all ones where they stand in the extra field.
    agrees = packed in (info.compress_size, 0, 0xFFFFFFFF) and nbytes in (info.file_size, 0, 0xFFFFFFFF)
    agrees &= magic == b"PK\x03\x04" and method == info.compress_type
    agrees &= name_size == len(raw_name) and header[_LOCAL.size :] == raw_name
    offset = info.header_offset + size + extra_size
    if not agrees or offset + info.compress_size > reader.file.size:
        raise Invalid(f"says of its member {quoted(info.filename)} one thing here and another there; {DAMAGED}")
    deflated = None if info.compress_type == zipfile.ZIP_STORED else info.compress_size
    return Storage(reader.file, key, info.file_size, offset, deflated)


def _directory(reader: Reader) -> tuple[bytes, int]:
    """The central directory and the number of its entries."""
    tail_at = max(reader.file.size - _END.size - 0xFFFF - _LOCATOR64.size, 0)
    tail = reader.read(tail_at, reader.file.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise Invalid(f"has no zip directory at its end; {DAMAGED}")
    _, disk, first_disk, count, total, size, offset, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if at >= _LOCATOR64.size and tail[at - _LOCATOR64.size :].startswith(b"PK\x06\x07"):
        end = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)[2]
        if end + _END64.size > reader.file.size:
            raise Invalid(_BROKEN)
        fields = _END64.unpack(reader.read(end, _END64.size))
        magic, _, _, _, disk, first_disk, count, total, size, offset = fields
        if magic != b"PK\x06\x06":
            raise Invalid(_BROKEN)
    if disk or first_disk or count != total:
        raise Invalid("is one part of several; put them together first")
    if size > _MAX_DIRECTORY or count > _MAX_MEMBERS:
        raise Invalid(f"lists {count} zip members in {size} bytes; at most {_MAX_MEMBERS} in {_MAX_DIRECTORY}")
    if offset + size != end:
        raise Invalid(_BROKEN)
    return reader.read(offset, size), count


def _check(reader: Reader, info: zipfile.ZipInfo) -> None:
    """The entry can be read, and its name is no path out of the archive."""
    name = info.orig_filename  # `filename` ends at a zero byte
    is_path = name.startswith("/") or "\\" in name or ".." in name.split("/")
    if is_path or not 0 < len(name) <= 1000 or not name.isprintable():
        raise Invalid(f"holds a member of the name {quoted(name)}; a file that was saved as weights has none such")
    if info.flag_bits & _ENCRYPTED:
        raise Invalid(f"holds {quoted(name)} encrypted; decrypt it first")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.volume:
        raise Invalid(f"holds {quoted(name)} packed by method {info.compress_type}; allowed are stored and deflated")
    is_stored_short = info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size
    end = info.header_offset + _LOCAL.size + len(_raw_name(info)) + info.compress_size
    if is_stored_short or end > reader.file.size:
        raise Invalid(f"is too short for its member {quoted(name)}; {DAMAGED}")


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")

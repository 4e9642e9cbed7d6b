"""TFRecord files by index, without TensorFlow: where each record lies, and what an Example holds.

A record is its length (8 bytes), a checksum of that (4), the bytes, and a checksum of those (4). With the places of all
records known, such files are read in any order like every other data set, and a run resumes exactly.
"""

import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rq_jax.data.paths import default_data_dir
from rq_jax.files import write_atomic

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_GZIP = b"\x1f\x8b"
_LANE = 256  # bytes of which a checksum is computed at once with those of the other lanes


class Part(NamedTuple):
    """Records skip..skip + take of a file."""

    path: str
    skip: int
    take: int


class TfRecords:
    """Random access to the Examples of some files, each as a dictionary of its features."""

    def __init__(self, parts: Sequence[Part]):
        """Args: parts: in order; their records are counted through."""
        self._parts = [part for part in parts if part.take]
        self._ends = list(itertools.accumulate(part.take for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Feature name -> bytes, int or float, or a list of several.

        Raises:
          ValueError: the record is damaged, or its file shorter than was said.
        """
        i = bisect.bisect_right(self._ends, index)
        path, skip, take = self._parts[i]
        places_N2 = record_places(path)
        row = skip + index - (self._ends[i] - take)
        if row >= len(places_N2):
            raise ValueError(f"'{path}' holds {len(places_N2)} whole records, but number {row} is asked for")
        start, length = (int(value) for value in places_N2[row])
        with open(path, "rb", buffering=0) as file:  # not kept open: a thousand files are more than a process may have
            stored = os.pread(file.fileno(), length + _FOOTER.size, start)
        record, footer = stored[:length], stored[length:]
        if len(footer) < _FOOTER.size or _FOOTER.unpack(footer)[0] != masked_crc32c(record):
            raise ValueError(f"record {row} of '{path}' has other contents than its checksum says")
        return parse_example(record)


@functools.cache
def record_places(path: str) -> np.ndarray:
    """Start and length of each whole record of a file, int64 (N, 2); found once and kept in the cache of data sets.

    Raises:
      ValueError: the file is compressed.
    """
    stat = os.stat(path)
    name = hashlib.sha256(f"{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    cached = default_data_dir() / "tfrecord_places" / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        places_N2 = np.load(cached, allow_pickle=False)
        if places_N2.ndim == 2 and (len(places_N2) == 0 or places_N2[-1].sum() + _FOOTER.size <= stat.st_size):
            return places_N2
    places_N2 = np.array(list(_scan(path, stat.st_size)), np.int64).reshape(-1, 2)
    try:
        write_atomic(cached, _npy(places_N2))
    except OSError:
        pass  # found again next time
    return places_N2


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _scan(path: str, size: int) -> Iterator[tuple[int, int]]:
    """The records up to the end of a file, or to the first one whose length is damaged."""
    file = os.open(path, os.O_RDONLY)
    try:
        start = 0
        while start + _HEADER.size <= size:
            header = os.pread(file, _HEADER.size, start)
            length, checksum = _HEADER.unpack(header)
            end = start + _HEADER.size + length + _FOOTER.size
            if end > size or masked_crc32c(header[:8]) != checksum:
                if start == 0 and header.startswith(_GZIP):
                    raise ValueError(f"'{path}' is compressed, so that its records have no places; unpack it")
                return
            yield start + _HEADER.size, length
            start = end
    finally:
        os.close(file)


@functools.cache
def _crc32c_tables() -> tuple[np.ndarray, np.ndarray]:
    """What a byte does to a CRC-32C, uint32 (256,), and what `_LANE` zeros do to each of its four bytes, (4, 256)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    shifted = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    for _ in range(_LANE):
        shifted = table[shifted & 255] ^ (shifted >> 8)
    return table, shifted


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated and shifted."""
    table, shifted = _crc32c_tables()
    count = len(data) // _LANE
    lanes = np.frombuffer(data, np.uint8, count * _LANE).reshape(count, _LANE)
    sums = np.zeros(count, np.uint32)
    for column in lanes.T:
        sums = table[(sums ^ column) & 255] ^ (sums >> 8)
    crc, first, second, third, fourth = 0xFFFFFFFF, *shifted.tolist()
    for lane in sums.tolist():  # a checksum is linear: that of all before, moved on by a lane, and that of the lane
        crc = first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24] ^ lane
    bytewise = table.tolist()
    for byte in data[count * _LANE :]:
        crc = bytewise[(crc ^ byte) & 255] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(record: bytes) -> dict[str, Any]:
    """Features of a serialized `tf.train.Example`.

    Raises:
      ValueError: the bytes are no Example.
    """
    from google.protobuf.message import DecodeError

    try:
        example = _example_type().FromString(record)
    except DecodeError as error:
        raise ValueError(f"no Example: {error}") from error
    found = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        found[name] = values[0] if len(values) == 1 else values
    return found


def make_example(features: Mapping[str, bytes | int | float]) -> bytes:
    """A serialized `tf.train.Example` of single values."""
    example = _example_type()()
    for name, value in features.items():
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list" if isinstance(value, int) else "float_list"
        getattr(example.features.feature[name], kind).value.append(value)
    return example.SerializeToString(deterministic=True)


@functools.cache
def _example_type() -> Any:
    """The message type, described here: TensorFlow has it, and nothing smaller does."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="rq_jax/example.proto", package="rq_jax", syntax="proto3")

    def message(name: str) -> Any:
        return file.message_type.add(name=name)

    def field(owner: Any, name: str, number: int, kind: int, repeated: bool = False, type_name: str = "") -> Any:
        label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
        return owner.field.add(name=name, number=number, type=kind, label=label, type_name=type_name or None)

    lists = {"bytes": kinds.TYPE_BYTES, "float": kinds.TYPE_FLOAT, "int64": kinds.TYPE_INT64}
    for name, kind in lists.items():
        field(message(f"{name.capitalize()}List"), "value", 1, kind, repeated=True)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(lists, start=1):
        list_type = f".rq_jax.{name.capitalize()}List"
        field(feature, f"{name}_list", number, kinds.TYPE_MESSAGE, type_name=list_type).oneof_index = 0
    features = message("Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, kinds.TYPE_STRING)
    field(entry, "value", 2, kinds.TYPE_MESSAGE, type_name=".rq_jax.Feature")
    field(features, "feature", 1, kinds.TYPE_MESSAGE, repeated=True, type_name=".rq_jax.Features.FeatureEntry")
    field(message("Example"), "features", 1, kinds.TYPE_MESSAGE, type_name=".rq_jax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("rq_jax.Example"))

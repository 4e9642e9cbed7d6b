"""TFRecord files by index, without TensorFlow: where each record lies, and what an Example holds.

A record is its length (8 bytes), a checksum of that (4), the bytes, and a checksum of those (4). With the places of all
records known, such files are read in any order like every other data set, and a run resumes exactly.
"""

import bisect
import functools
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rq_jax.data.prepare import default_data_dir
from rq_jax.pictures import write_atomic

_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4


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
        self._files: dict[str, int] = {}  # opened when first read, by each process for itself

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

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
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return parse_example(os.pread(self._files[path], length, start))


@functools.cache
def record_places(path: str) -> np.ndarray:
    """Start and length of each whole record of a file, int64 (N, 2); found once and kept in the cache of data sets."""
    stat = os.stat(path)
    name = hashlib.sha256(f"{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    cached = default_data_dir() / "tfrecord_places" / f"{name}.npy"
    if cached.is_file():
        return np.load(cached, allow_pickle=False)
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
            end = start + _HEADER.size + length + _FOOTER_BYTES
            if end > size or _masked_crc32c(header[:8]) != checksum:
                return
            yield start + _HEADER.size, length
            start = end
    finally:
        os.close(file)


@functools.cache
def _crc32c_table() -> list[int]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        return value

    return [entry(value) for value in range(256)]


def _masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated and shifted."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
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

"""Random access to TFRecord files without TensorFlow: record offsets, checksums, Example messages.

A record is its length (8 bytes), a checksum of the length (4), the content, and a checksum of the content (4). TFRecord
has no index, so a file is scanned once from header to header, and the offset and length of each record are cached.
Then a TFRecord dataset is shuffled and resumed like every other.
"""

import bisect
import functools
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rq_jax.data.file_index import cached_index

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_GZIP = b"\x1f\x8b"


class Part(NamedTuple):
    """Records skip to skip + take of a file."""

    path: str
    skip: int
    take: int


class TfRecords:
    """Random access to the Examples of several files, each as a dictionary of its features."""

    def __init__(self, parts: Sequence[Part]):
        """Args: parts: in the order in which their records are numbered."""
        self._parts = [part for part in parts if part.take]
        self._ends = list(itertools.accumulate(part.take for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a record: feature name -> bytes, int or float, or a list of several.

        Raises:
          ValueError: the record is damaged, or its file is too short.
        """
        i = bisect.bisect_right(self._ends, index)
        path, skip, take = self._parts[i]
        offsets_N2 = record_offsets(path)
        row = skip + index - (self._ends[i] - take)
        if row >= len(offsets_N2):
            raise ValueError(f"'{path}' holds {len(offsets_N2)} whole records, but number {row} is asked for")
        start, length = (int(value) for value in offsets_N2[row])
        # Opened each time: a dataset of a thousand files exceeds the open files that a process may have.
        with open(path, "rb", buffering=0) as file:
            stored = os.pread(file.fileno(), length + _FOOTER.size, start)
        record, footer = stored[:length], stored[length:]
        if len(footer) < _FOOTER.size or _FOOTER.unpack(footer)[0] != masked_crc32c(record):
            raise ValueError(f"record {row} of '{path}' does not match its checksum")
        return parse_example(record)


@functools.cache
def record_offsets(path: str) -> np.ndarray:
    """Offset and length of each whole record of a file, int64 (N, 2), from the cache of the data directory.

    Raises:
      ValueError: the file is compressed.
    """
    return cached_index("tfrecord_places", path, 2, _scan, _fits)


def _fits(offsets_N2: np.ndarray, size: int) -> bool:
    return len(offsets_N2) == 0 or offsets_N2[-1].sum() + _FOOTER.size <= size


def _scan(path: str, size: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the records up to the end of a file, or to the first damaged header."""
    file = os.open(path, os.O_RDONLY)
    try:
        start = 0
        while start + _HEADER.size <= size:
            header = os.pread(file, _HEADER.size, start)
            length, checksum = _HEADER.unpack(header)
            end = start + _HEADER.size + length + _FOOTER.size
            if end > size or masked_crc32c(header[:8]) != checksum:
                if start == 0 and header.startswith(_GZIP):
                    raise ValueError(f"'{path}' is compressed, so that its records have no offsets; unpack it")
                return
            yield start + _HEADER.size, length
            start = end
    finally:
        os.close(file)


def masked_crc32c(data: bytes) -> int:
    """Checksum of TFRecord: CRC-32C, rotated and shifted."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(record: bytes) -> dict[str, Any]:
    """Parse the features of a serialized `tf.train.Example`.

    Raises:
      ValueError: the bytes are no Example.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    try:
        example = Example.FromString(record)
    except DecodeError as error:
        raise ValueError(f"no Example: {error}") from error
    features = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        features[name] = values[0] if len(values) == 1 else values
    return features


def make_example(features: Mapping[str, bytes | int | float]) -> bytes:
    """Serialize a `tf.train.Example` of single values."""
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    example = Example()
    for name, value in features.items():
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list" if isinstance(value, int) else "float_list"
        getattr(example.features.feature[name], kind).value.append(value)
    return example.SerializeToString(deterministic=True)

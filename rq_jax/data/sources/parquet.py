"""Parquet files of images, as the data sets of Hugging Face have them."""

import collections
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.data.notices import tell
from rq_jax.data.sources.records import check_key
from rq_jax.data.sources.shards import choose_shards, list_shards
from rq_jax.data.tar_index import MAX_CLASSES
from rq_jax.files import parse_json
from rq_jax.settings.text import quoted

_NAME = "parquet"
_MAX_GROUP_BYTES = 2**31  # of the columns that are read, unpacked
_CACHE_BYTES = 2**29


class ParquetRecords:
    """One split of the parquet files below a directory, see `choose_shards`.

    A record is read with the row group that it is in, and the last groups are kept: in a shuffled epoch over more than
    fits into `_CACHE_BYTES` an image costs the reading of a whole group.

    Attributes:
      root: the directory.
      paths: of all files, relative to `root`, in order.
      listing: of the directory.
      image_key: the column of the images: encoded bytes, or {"bytes": ..., "path": ...}.
    """

    def __init__(self, data_dir: str | os.PathLike | None, split: str, label_key: str | None, text_key: str | None):
        self.listing = list_shards(data_dir, ".parquet", _NAME)
        self.listing.tell()
        self.root, self.paths = self.listing.root, self.listing.paths
        self.incomplete: Mapping[int, str] = {}
        files = [_File(self.root / path) for path in self.paths]
        first = files[0]
        images, self.label_keys, self.text_keys = first.columns()
        if not images:
            raise ValueError(f"data.name: '{first.path}' has no column of images; its columns are {first.names()}")
        self.image_key = "image" if "image" in images else images[0]
        self.label_key = check_key("label_key", label_key, self.label_keys, _NAME)
        self.text_key = check_key("text_key", text_key, self.text_keys, _NAME)
        self._columns = [key for key in (self.image_key, self.label_key, self.text_key) if key]
        for file in files:
            file.check(self._columns)
        self.class_names = _class_names(files, label_key) if label_key else None
        self._shards = choose_shards(split, self.root, self.paths, [file.num_rows for file in files])
        self.split_counts = self._shards.split_counts
        by_path = {file.path: file for file in files}
        self._files = [by_path[path] for path in self._shards.paths]
        self._groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        size = sum(file.num_bytes(self._columns) for file in self._files)
        if size > _CACHE_BYTES:
            tell(
                f"data.name: the parquet files hold {size / 1e9:.1f} GB of images, more than stays in memory; each "
                "image of a shuffled epoch costs the reading of a row group: `python -m rq_jax.data.prepare parquet` "
                "writes them for random access"
            )

    @property
    def files(self) -> list[str]:
        """Names of the files of all splits."""
        return [path.as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self._shards)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_groups": collections.OrderedDict(), "_lock": None}  # each process has its own

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        number, row = self._shards.find(index)
        file = self._files[number]
        group = int(np.searchsorted(file.ends, row, side="right"))
        table = self._group(number, group)
        place = row - (int(file.ends[group - 1]) if group else 0)
        if place >= table.num_rows:
            raise ValueError(f"row group {group} has fewer rows than the file says")
        record = {key: table[key][place].as_py() for key in self._columns}
        image = record[self.image_key]
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise ValueError(f"the column {quoted(self.image_key)} holds no bytes")
        label = record[self.label_key] if self.label_key else None
        if self.label_key and not isinstance(label, int):
            raise ValueError(f"the column {quoted(self.label_key)} holds no class")
        return image, label, self._text(record) if self.text_key else None

    def _text(self, record: Mapping[str, Any]) -> str:
        text = record[self.text_key]
        text = next(iter(text), None) if isinstance(text, list) else text
        if not isinstance(text, str):
            raise ValueError(f"the column {quoted(self.text_key)} holds no text")
        return text.strip()

    def _group(self, number: int, group: int) -> Any:
        """The wanted columns of a row group; one thread reads at a time, so that none is read twice."""
        with self._lock:
            if (number, group) not in self._groups:
                self._groups[number, group] = self._files[number].read_group(group, self._columns)
                while len(self._groups) > 1 and sum(each.nbytes for each in self._groups.values()) > _CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((number, group))
            return self._groups[number, group]

    def locate(self, index: int) -> str:
        file, row = self._shards.find(index)
        return f"row {row} of {quoted(str(self._shards.paths[file]), 1000)[1:-1]}"


class _File:
    """A parquet file's footer.

    Attributes:
      path: of the file.
      num_rows: in all its row groups.
      ends: for each row group, the number of rows up to its end.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            self._metadata, self._schema = file.metadata, file.schema_arrow
        counts = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        if any(not 0 <= count < 2**31 for count in counts):
            raise ValueError(f"data.name: '{path}' tells of {min(counts)} to {max(counts)} rows in a group")
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.num_rows = int(self.ends[-1]) if counts else 0

    def _open(self, **options: Any) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError:
            raise ValueError(
                "data.name: 'parquet' needs the package pyarrow; install the extra rq_jax[parquet]"
            ) from None
        try:
            return parquet.ParquetFile(self.path, pre_buffer=False, **options)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"data.name: '{self.path}' cannot be read as parquet: {quoted(error, 300)}") from None

    def names(self) -> str:
        return ", ".join(quoted(name) for name in self._schema.names[:20])

    def features(self) -> Mapping[str, Any]:
        """What Hugging Face's libraries write about the columns."""
        text = (self._schema.metadata or {}).get(b"huggingface")
        if text is None:
            return {}
        info = parse_json(text, f"data.name: '{self.path}', its entry 'huggingface'").get("info")
        features = info.get("features") if isinstance(info, dict) else None
        return features if isinstance(features, dict) else {}

    def class_names(self, key: str) -> tuple[str, ...] | None:
        feature = self.features().get(key)
        names = feature.get("names") if isinstance(feature, dict) else None
        return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def columns(self) -> tuple[list[str], list[str], list[str]]:
        """Names of the columns that may hold images, classes and captions."""
        from pyarrow import types

        def is_bytes(kind: Any) -> bool:
            return types.is_binary(kind) or types.is_large_binary(kind)

        def is_text(kind: Any) -> bool:
            return types.is_string(kind) or types.is_large_string(kind)

        images, labels, texts = [], [], []
        for field in self._schema:
            kind = field.type
            inner = {each.name: each.type for each in kind} if types.is_struct(kind) else {}
            if is_bytes(inner.get("bytes", kind)):
                images.append(field.name)
            elif types.is_integer(kind):
                labels.append(field.name)
            elif is_text(kind.value_type if types.is_list(kind) else kind):
                texts.append(field.name)
        return images, labels, texts

    def check(self, columns: list[str]) -> None:
        """Check that the columns are there and each row group of them can be held in memory.

        Raises:
          ValueError: naming the file.
        """
        missing = [column for column in columns if column not in self._schema.names]
        if missing:
            raise ValueError(f"data.name: '{self.path}' has no column {quoted(missing[0])}; it has {self.names()}")
        try:
            largest = max((self._group_bytes(i, columns) for i in range(len(self.ends))), default=0)
        except UnicodeDecodeError:
            raise ValueError(
                f"data.name: '{self.path}' cannot be read as parquet: the name of a column is no text"
            ) from None
        if largest > _MAX_GROUP_BYTES:
            raise ValueError(
                f"data.name: '{self.path}' has a row group of {largest} bytes, more than the {_MAX_GROUP_BYTES} that "
                "are read at a time; write it with smaller row groups"
            )

    def num_bytes(self, columns: list[str]) -> int:
        return sum(self._group_bytes(i, columns) for i in range(len(self.ends)))

    def _group_bytes(self, group: int, columns: list[str]) -> int:
        chunks = (self._metadata.row_group(group).column(i) for i in range(self._metadata.num_columns))
        prefixes = tuple(f"{column}." for column in columns)  # of the parts of a column
        return sum(one.total_uncompressed_size for one in chunks if f"{one.path_in_schema}.".startswith(prefixes))

    def read_group(self, group: int, columns: list[str]) -> Any:
        import pyarrow

        try:
            with self._open(metadata=self._metadata) as file:
                return file.read_row_group(group, columns, use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"cannot read row group {group}: {quoted(error, 300)}") from None

    def read_column(self, key: str) -> Any:
        return [self.read_group(group, [key])[key] for group in range(len(self.ends))]


def _class_names(files: list[_File], key: str) -> tuple[str, ...]:
    """Names of the classes: those that the files tell, or else the numbers 0 to the largest."""
    if names := files[0].class_names(key):
        return names
    import pyarrow.compute

    largest = [pyarrow.compute.max(column).as_py() for file in files for column in file.read_column(key)]
    count = 1 + max((each for each in largest if each is not None), default=-1)
    if not 0 < count <= MAX_CLASSES:
        raise ValueError(f"data.label_key: '{key}' reaches {count - 1}; give a column of classes from 0")
    return tuple(map(str, range(count)))

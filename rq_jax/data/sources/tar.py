"""Webdataset: tars of images, each with a caption (`.txt`) or a class (`.cls`) beside it."""

import os
from collections.abc import Iterator, Mapping

import numpy as np

from rq_jax.data.listing import CAPTION
from rq_jax.data.sources.folder import decode_text
from rq_jax.data.sources.records import check_key, tell_incomplete
from rq_jax.data.sources.shards import choose_shards, list_shards
from rq_jax.data.tar_index import CLASS, samples
from rq_jax.settings.text import quoted

_NAME = "webdataset"


class TarRecords:
    """One split of the tars below a directory, see `choose_shards`; a sample is what shares a name up to the first dot.

    Each tar is scanned once from header to header, and read at these offsets; nothing is unpacked.

    Attributes:
      root: the directory.
      paths: of all tars, relative to `root`, in order.
      listing: of the directory; its `passed_over` counts members of the tars too.
    """

    def __init__(self, data_dir: str | os.PathLike | None, split: str, label_key: str | None, text_key: str | None):
        self.listing = list_shards(data_dir, ".tar", _NAME)
        self.root, self.paths = self.listing.root, self.listing.paths
        scanned = [samples(str(self.root / path)) for path in self.paths]
        for _, passed_over in scanned:
            self.listing.passed_over.update(passed_over)
        self.listing.tell()
        tables = [rows_N5 for rows_N5, _ in scanned]
        largest = max((int(rows_N5[:, 4].max(initial=-1)) for rows_N5 in tables), default=-1)
        self.label_keys = ["cls"] if largest >= 0 else []
        self.text_keys = ["txt"] if any((rows_N5[:, 2] >= 0).any() for rows_N5 in tables) else []
        self.label_key = check_key("label_key", label_key, self.label_keys, _NAME)
        self.text_key = check_key("text_key", text_key, self.text_keys, _NAME)
        # Over all splits, so that a class has the same number in each of them.
        self.class_names = tuple(map(str, range(largest + 1))) if label_key else None
        self._shards = choose_shards(split, self.root, self.paths, [len(rows_N5) for rows_N5 in tables])
        self.split_counts = self._shards.split_counts
        by_path = dict(zip((self.root / path for path in self.paths), tables, strict=True))
        self._rows = np.concatenate(
            [by_path[path][rows] for path, rows in zip(self._shards.paths, self._shards.rows, strict=True)]
        )
        self.incomplete: Mapping[int, str] = dict(self._find_incomplete())
        tell_incomplete(self, split, "label_key: 'cls'" if label_key else "text_key: 'txt'")

    def _find_incomplete(self) -> Iterator[tuple[int, str]]:
        wanted = ((self.label_key, 4, f"class, a {CLASS}"), (self.text_key, 2, f"caption, a {CAPTION}"))
        for key, column, what in wanted:
            if key:
                for index in np.flatnonzero(self._rows[:, column] < 0).tolist():
                    yield index, f"no {what} of the same name, is beside it"

    @property
    def files(self) -> list[str]:
        """Names of the files of all splits."""
        return [path.as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        if index in self.incomplete:
            raise ValueError(self.incomplete[index])
        offset, size, text_offset, text_size, label = self._rows[index].tolist()
        file, _ = self._shards.find(index)
        # Opened each time: a dataset of a thousand files exceeds the open files that a process may have.
        with open(self._shards.paths[file], "rb", buffering=0) as tar:
            image = os.pread(tar.fileno(), size, offset)
            text = os.pread(tar.fileno(), text_size, text_offset) if self.text_key else None
        return image, label if self.label_key else None, None if text is None else decode_text(text).strip()

    def locate(self, index: int) -> str:
        file, row = self._shards.find(index)
        return f"sample {row} of {quoted(str(self._shards.paths[file]), 1000)[1:-1]}"

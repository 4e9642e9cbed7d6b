"""The fingerprint of a data set: what decides its examples, by name, without reading any of them.

A cache of features is made again, and a run is not resumed, where an entry differs; each entry can be named, so that a
difference is told as one.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.data.pipeline import Dataset
from rq_jax.data.splits import Splits
from rq_jax.files import local_path, read_json, write_json
from rq_jax.settings.text import quoted

RECORD = "data.json"  # in the run directory
# Of the config section `data`; not data_dir, since a data set may be moved.
_SETTINGS = (
    "name", "train_split", "validation_split", "image_size", "channels", "train_transform", "eval_transform",
    "flip_probability", "label_key", "text_key", "text_length", "text_dropout",
)  # fmt: skip
_TIMES = "file times"

logger = logging.getLogger(__name__)


def of_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config section `data`: splits, transforms, and the text tokenizer by its content."""
    entries = {f"data.{name}": settings[name] for name in _SETTINGS if name in settings}
    for name in ("data.train_split", "data.validation_split"):
        if str(entries.get(name)).endswith(".txt"):  # a list of names, which count themselves
            entries[name] = Path(entries[name]).name
    if settings.get("text_key") and settings.get("text_tokenizer"):
        path = local_path(settings["text_tokenizer"])
        files = [path, path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")]  # of `load_tokenizer`
        contents = b"".join(file.read_bytes() for file in files if file.is_file())
        entries["data.text_tokenizer"] = hashlib.sha256(contents).hexdigest()
    return json.loads(json.dumps(entries))  # with lists for tuples, as it will be read back


def of_dataset(dataset: Dataset) -> dict[str, Any]:
    """The entries of one split: how many examples, the classes in order, names, sizes and times of the files.

    A million files take a few seconds: they are asked for their size, and not opened.
    """
    entries: dict[str, Any] = {"number of examples": getattr(dataset, "split_size", dataset.num_examples)}
    if dataset.class_names is not None:
        entries["classes"] = list(dataset.class_names)
    records = getattr(dataset.source, "records", None)
    if names := getattr(records, "files", ()):
        entries |= _of_files(str(records.root), names)
    return entries


def _of_files(root: str, names: Sequence[str]) -> dict[str, str]:
    sizes, times = np.full(len(names), -1, "<i8"), np.zeros(len(names), "<i8")
    for i, name in enumerate(names):
        with contextlib.suppress(OSError):  # counts as a damaged image when its turn comes
            status = os.stat(f"{root}/{name}")
            sizes[i], times[i] = status.st_size, status.st_mtime_ns
    contents = {"file names": "\0".join(names).encode("utf-8", "surrogateescape"), "file sizes": sizes, _TIMES: times}
    return {what: hashlib.sha256(content).hexdigest() for what, content in contents.items()}


def difference(old: Any, new: Mapping[str, Any]) -> str | None:
    """The first entry that differs, as part of a message; None where those that both have agree."""
    old = old if isinstance(old, dict) else {}
    for name in (name for name in new if name in old and new[name] != old[name]):
        before, now = old[name], new[name]
        if name == "classes" and isinstance(before, list):
            if len(before) != len(now):
                return f"there are {len(now)} classes, and were {len(before)}"
            number = next(i for i, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
            return f"class {number} is {quoted(now[number])}, and was {quoted(before[number])}"
        if name.startswith("file ") or name == "data.text_tokenizer":
            return f"{name} differ" if name.startswith("file ") else f"{name} has other contents"
        return f"{name} is {_shown(now)}, and was {_shown(before)}"
    return None


def _shown(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else quoted(value)


def bind_data(workdir: str | os.PathLike, data: Splits, settings: Mapping[str, Any], is_fresh: bool) -> None:
    """Write the fingerprint of the data into a run directory, or check that a resumed run has the same data.

    Other times of files, as a copy has them, are told and no more.

    Args:
      workdir: of the run.
      data: of the run; the first process looks at it.
      settings: the config section `data`; empty without a config.
      is_fresh: the run has no checkpoint.

    Raises:
      ValueError: naming what differs, or the record is not readable.
    """
    if jax.process_index() != 0:
        return
    path = Path(workdir) / RECORD
    new = {"": of_settings(settings), "train: ": of_dataset(data.train), "validation: ": of_dataset(data.validation)}
    if not is_fresh and path.is_file():
        _check(path, read_json(path), new)
    elif not is_fresh:
        logger.warning("'%s' has no %s to compare its data with; going on with the data given", workdir, RECORD)
    write_json(path, new)


def _check(path: Path, old: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> None:
    for part, entries in new.items():
        before = old.get(part)
        if not isinstance(before, dict):
            raise ValueError(f"'{path}' is no record of data; delete it to go on without comparing")
        if (what := difference({**before, _TIMES: None}, {**entries, _TIMES: None})) is not None:
            raise ValueError(
                f"data: {part}{what} when the run in '{path.parent}' was started; give that data or a new --workdir, "
                f"or delete '{path}' to go on with other data"
            )
        if before.get(_TIMES) != entries.get(_TIMES):
            logger.warning("data: %sfile times differ since the last start; names and sizes are the same", part)

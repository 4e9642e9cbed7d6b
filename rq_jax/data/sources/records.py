"""Random access to encoded images: what every kind of source offers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rq_jax.data.notices import tell


class Records(Protocol):
    """One split of a dataset.

    Attributes:
      root: directory of the files.
      files: names of the files that hold the records, relative to `root`, in order, for the fingerprint.
      class_names: by class number; None if it was opened without labels.
      label_keys: what may be given as `label_key`.
      text_keys: what may be given as `text_key`.
      split_counts: examples of each split of the dataset.
      incomplete: index -> why the record cannot be used, of those of which this is known without reading them.
    """

    root: Path
    files: Sequence[str]
    class_names: tuple[str, ...] | None
    label_keys: Sequence[str]
    text_keys: Sequence[str]
    split_counts: Mapping[str, int]
    incomplete: Mapping[int, str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        """Encoded image, label and caption; label and caption are None if the dataset was opened without them.

        Raises:
          OSError, ValueError: the record cannot be read, or lacks its label or caption.
        """

    def locate(self, index: int) -> str:
        """Name of a record for messages."""


def tell_incomplete(records: Records, split: str, setting: str) -> None:
    """Tell how many records are known to be of no use, as they lack a label or a caption.

    Raises:
      FileNotFoundError: all of them are.
    """
    if not records.incomplete:
        return
    index, reason = next(iter(records.incomplete.items()))
    line = f"{len(records.incomplete)} of {len(records)} images of split '{split}' cannot be used, such as "
    line += f"{records.locate(index)}: {reason}"
    if len(records.incomplete) == len(records):
        raise FileNotFoundError(f"data.{setting}: {line}; add what is missing, or leave it unset")
    tell(f"data.data_dir: {line}; they count as damaged")


def check_key(what: str, key: str | None, allowed: list[str], name: str) -> str | None:
    """The feature that a setting names, or None.

    Raises:
      ValueError: the dataset has no such feature.
    """
    if key is not None and key not in allowed:
        names = ", ".join(allowed) or "(none)"
        raise ValueError(f"data.{what}: '{key}' is unknown in dataset '{name}'; allowed are {names}")
    return key

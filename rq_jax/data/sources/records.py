"""Random access to encoded images: what every kind of source offers."""

from collections.abc import Mapping
from typing import Protocol


class Records(Protocol):
    """One split of a dataset.

    Attributes:
      class_names: by class number; None if it was opened without labels.
      incomplete: index -> why the record cannot be used, of those of which this is known without reading them.
    """

    class_names: tuple[str, ...] | None
    incomplete: Mapping[int, str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int | None, str | None]:
        """Encoded image, label and caption; label and caption are None if the dataset was opened without them.

        Raises:
          OSError, ValueError: the record cannot be read, or lacks its label or caption.
        """

    def locate(self, index: int) -> str:
        """Name of a record for messages."""


def check_key(what: str, key: str | None, allowed: list[str], name: str) -> str | None:
    """The feature that a setting names, or None.

    Raises:
      ValueError: the dataset has no such feature.
    """
    if key is not None and key not in allowed:
        names = ", ".join(allowed) or "(none)"
        raise ValueError(f"data.{what}: '{key}' is unknown in dataset '{name}'; allowed are {names}")
    return key

"""Decoded examples of a source of encoded images."""

import errno
import logging

from rq_jax.data.images import decode_image
from rq_jax.data.sources.records import Records

_CACHE_BYTES = 2**29


class ImageSource:
    """Decoded examples of `records`; small datasets stay in memory, damaged images are replaced.

    The stand-in of an image that cannot be read, or whose label is out of range, is the next undamaged one. It carries
    its own index, by which evaluation masks it out: it has its own turn. Which image stands in depends on the files
    alone, so a resumed run and every shard see the same one.

    Attributes:
      damaged: indices of the damaged images met so far; more than `max_damaged` are an error. Each worker process
        counts its own.
    """

    def __init__(self, records: Records, channels: int = 3, max_damaged: int = 100):
        if channels not in (1, 3):
            raise ValueError(f"data.channels: {channels} is not allowed; give 1 (grey) or 3 (RGB)")
        if len(records) == 0:
            raise ValueError("data.name: the split holds no examples; give another")
        self.records, self.channels, self.max_damaged = records, channels, max_damaged
        self.damaged: set[int] = set(records.incomplete)
        self._last_damage = ""
        self._cache: dict[int, dict] = {}
        if self.damaged:
            index = max(self.damaged)
            self._last_damage = f"{records.locate(index)}: {records.incomplete[index]}"
            self._check_count()

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}  # each worker process fills its own

    def __getitem__(self, index: int) -> dict:
        """Decode an example: {"image": uint8 (H,W,C), "index": int, "label": int or None, "text": str or None}."""
        index = int(index) % len(self)  # in an endless stream grain's indices grow beyond the dataset
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if candidate in self._cache:
                return self._cache[candidate]
            if candidate not in self.damaged:
                try:
                    return self._load(candidate)
                except (OSError, ValueError) as error:
                    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                        raise  # too many open files: the process is at fault, not this image
                    self.mark_damaged(candidate, error)
            self._check_count()  # grain asks again after an error
        raise ValueError(f"data.name: all {len(self)} images are damaged; the last is {self._last_damage}")

    def mark_damaged(self, index: int, error: Exception) -> None:
        """Count an image as damaged and name it in the log; from now on another one stands in."""
        self.damaged.add(index)
        self._cache.pop(index, None)
        self._last_damage = f"{self.records.locate(index)}: {error}"
        logging.getLogger(__name__).warning("damaged image %s", self._last_damage)

    def _check_count(self) -> None:
        if len(self.damaged) > self.max_damaged:
            raise ValueError(
                f"data.max_damaged: more than {self.max_damaged} images are damaged; repair them or raise the "
                f"limit; the last is {self._last_damage}"
            )

    def _load(self, index: int) -> dict:
        encoded, label, text = self.records.read(index)
        if label is not None and not 0 <= label < len(self.records.class_names):
            raise ValueError(f"label {label} is outside 0..{len(self.records.class_names) - 1}")
        example = {
            "image": decode_image(encoded, self.channels),
            "index": index,
            "label": label,
            "text": text,
        }
        if example["image"].nbytes * len(self) <= _CACHE_BYTES:
            self._cache[index] = example
        return example

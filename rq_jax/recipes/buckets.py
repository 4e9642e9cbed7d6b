"""Length buckets: batches of images of similar length, each padded to the shortest of a few lengths that holds it."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax.grains import GrainLayout
from rq_jax.settings import checks

Batch = Mapping[str, Any]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Lengths that batches are padded to, and among how many batches images are grouped by their length.

    Attributes:
      tokens: lengths, increasing; that of the longest image possible is one more. (): all batches have that one.
      window: batches whose images are grouped; 1: the longest image of each batch decides.

    Raises:
      ValueError: lengths that do not increase, a window below 1, or one without lengths.
    """

    tokens: tuple[int, ...] = ()
    window: int = 1

    def __post_init__(self):
        checks.increasing("loop.buckets", self.tokens)
        checks.integers("loop.bucket_window", self.window, 1)
        if self.window > 1 and not self.tokens:
            raise ValueError(
                f"loop.bucket_window: {self.window} groups images for loop.buckets, which are (); give buckets, or set "
                "it to 1"
            )

    def check_layout(self, layout: GrainLayout) -> None:
        """Every bucket may be the one that an image needs.

        Raises:
          ValueError: one that is shorter than every image, or longer.
        """
        for tokens in self.tokens:
            checks.in_range("loop.buckets", tokens, layout.min_tokens, layout.max_tokens, "the tokens of an image")

    def holding(self, length: int, most: int) -> int:
        """The smallest bucket with room for so many tokens, of which no image has more than `most`."""
        return next(tokens for tokens in (*self.tokens, most) if tokens >= length)


class Programs(NamedTuple):
    """What groups the images of a model on the devices.

    Attributes:
      encode: this process's part of a batch -> rows, a tree of arrays (B, ...), and their lengths (B,); of the global
        batch, whole on every device.
      pack: (rows of the batches of a window, numbers of B of these rows, P) -> a batch of them padded to P tokens.
      most: tokens of the longest image possible.
    """

    encode: Callable[[Batch], tuple[Any, jax.Array]]
    pack: Callable[[tuple[Any, ...], np.ndarray, int], Batch]
    most: int


@dataclasses.dataclass(frozen=True)
class BucketedDataset:
    """Batches of another dataset, encoded, their images grouped by length, each batch padded to a bucket.

    Every window of batches holds the images of so many batches of `dataset`, once each. Which batch an image comes in
    depends on the lengths, the seed and the window's place in the stream alone, on any number of processes.

    Attributes:
      dataset: endless, with a `batch_size`; its iterator's state has "next_batch".
      buckets: the lengths.
      programs: of the model.
      seed: of the order of the batches of a window, which have no order of lengths.
    """

    dataset: Any
    buckets: Buckets
    programs: Programs
    seed: int

    @property
    def batch_size(self) -> int:
        return self.dataset.batch_size

    def iterator(self) -> "BucketIterator":
        """A new iterator from the start."""
        return BucketIterator(self)


class _Window(NamedTuple):
    """Rows of the batches of a window as they were read, and what each batch that is made of them holds."""

    rows: tuple[Any, ...]
    chosen: np.ndarray  # (window, B)
    tokens: list[int]


class BucketIterator:
    """Iterator over the batches of a `BucketedDataset`, whose position can be saved within a window."""

    def __init__(self, data: BucketedDataset):
        self._data, self._batches = data, data.dataset.iterator()
        self._start, self._given = 0, 0  # first batch of the window in the stream; batches handed out of the window
        self._window: _Window | None = None
        self._ahead: list[tuple[Any, jax.Array]] = []  # encoded batches of the next window

    def __iter__(self) -> "BucketIterator":
        return self

    def __next__(self) -> Batch:
        size = self._data.buckets.window
        if self._window is None:
            self._window = self._next_window()
        # With every batch one of the next window: its lengths are there long before they are asked for.
        self._encode_ahead(min(size, self._given + 1))
        rows, chosen, tokens = self._window
        batch = self._data.programs.pack(rows, chosen[self._given], tokens[self._given])
        self._given += 1
        if self._given == size:
            self._start, self._given, self._window = self._start + size, 0, None
        return batch

    def _encode_ahead(self, count: int) -> None:
        """Dispatch the encoding of batches until `count` of the next window are under way."""
        while len(self._ahead) < count:
            self._ahead.append(self._data.programs.encode(next(self._batches)))

    def _next_window(self) -> _Window:
        """The window that starts at `_start`; waits for the lengths of its images."""
        buckets = self._data.buckets
        self._encode_ahead(buckets.window)
        (rows, lengths), self._ahead = zip(*self._ahead, strict=True), []
        lengths_N = np.concatenate(jax.device_get(lengths))
        chosen = group(lengths_N, buckets.window, (self._data.seed, self._start))
        longest = lengths_N[chosen].max(axis=1).tolist()
        return _Window(rows, chosen, [buckets.holding(length, self._data.programs.most) for length in longest])

    def get_state(self) -> dict[str, Any]:
        """The position in the stream, JSON-able: "next_batch" counts the batches that were handed out."""
        return {"next_batch": self._start + self._given, "window": {**self._size, "given": self._given}}

    @property
    def _size(self) -> dict[str, int]:
        return {"batches": self._data.buckets.window, "batch_size": self._data.batch_size}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Move to a position that `get_state` returned, or that of a dataset without buckets.

        Inside a window of another size, of batches or of images, a new window starts: of the old one some images come
        twice and some do not come at all.
        """
        window = state.get("window", {"given": 0})
        given = window["given"]
        if given and window != {**self._size, "given": given}:
            logger.warning(
                "loop.buckets: %d of %d batches of %d images were read of a window whose size is changed; a new one "
                "starts, and some images of the old one come twice, others not at all",
                given, window["batches"], window["batch_size"],
            )  # fmt: skip
            given = 0
        self._start, self._given = state["next_batch"] - given, given
        self._window, self._ahead = None, []
        self._batches.set_state({"next_batch": self._start})

    def close(self) -> None:
        """Stop what reads ahead."""
        self._batches.close()


def group(lengths_N: np.ndarray, num_batches: int, seed: Sequence[int]) -> np.ndarray:
    """Deal images to batches by length.

    Args:
      lengths_N: of the images of all batches together.
      num_batches: a divisor of N.
      seed: of the order of the batches, each a whole number of at least 0.

    Returns:
      Numbers of images (num_batches, N / num_batches) in the order in which they came, of which each batch holds those
      between two quantiles of the lengths; equal lengths are told apart by their number.
    """
    batches = np.argsort(lengths_N, kind="stable").reshape(num_batches, -1)
    return np.random.default_rng(seed).permutation(np.sort(batches, axis=1)).astype(np.int32)

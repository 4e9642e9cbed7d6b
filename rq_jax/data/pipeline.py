"""Batches of NumPy arrays from a source of examples: endless and shuffled, or once through in order."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Protocol

import numpy as np

from rq_jax.data.transforms import scale

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to examples; `damaged` holds the positions that turned out unreadable and have stand-ins."""

    damaged: Set[int]

    def mark_damaged(self, index: int, error: Exception) -> None:
        """Give another example for this one from now on, or raise."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class Dataset:
    """Batches of one split.

    Training: endless, reshuffled every epoch. The order and every random draw depend on the seed and the position in
    the stream alone, never on threads, workers or shards: step k of a run sees the same examples on any number of
    hosts. Evaluation: once through in order; the last batch is padded, and "mask" is False for padding and stand-ins.
    Images are float32 in [-1, 1], or with `as_bytes` uint8.

    Attributes:
      num_examples: of the split, or with `at_most` of what is read of it; split_size: of the split.
      steps_per_epoch: batches in one pass, rounded down in training (at least 1), up in evaluation.
      class_names: by class number; None without classes.
      num_classes: None without classes.
      vocab_size: number of token ids of the captions; None without captions.
      text_length: U, tokens of a caption; None without captions.
    """

    def __init__(
        self,
        source: Source,
        *,
        train: bool,
        batch_size: int,
        train_transform: Callable[[dict, np.random.Generator], Batch],
        eval_transform: Callable[[dict], Batch],
        seed: int = 0,
        shard_index: int = 0,
        shard_count: int = 1,
        num_threads: int = 2,
        num_workers: int = 0,
        class_names: Sequence[str] | None = None,
        vocab_size: int | None = None,
        text_length: int | None = None,
    ):
        """Args as `make_dataset`; the transforms make the arrays of one example, without the batch axis."""
        if not 0 <= shard_index < shard_count:
            raise ValueError(f"shard_index: {shard_index} is outside 0..{shard_count - 1}, the shards of a batch")
        if batch_size < 1 or batch_size % shard_count:
            raise ValueError(f"data.batch_size: {batch_size} must be a positive multiple of {shard_count}, the shards")
        if num_threads < 1:
            raise ValueError(f"data.num_threads: {num_threads} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"data.num_workers: {num_workers} must be at least 0")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: {seed} is outside [0, 2**32)")
        self.source, self.train, self.batch_size = source, train, batch_size
        self.num_examples = self.split_size = len(source)
        self.class_names = tuple(class_names) if class_names is not None else None
        self.num_classes = len(self.class_names) if class_names is not None else None
        self.vocab_size, self.text_length = vocab_size, text_length
        self._train_transform, self._eval_transform = train_transform, eval_transform
        self._seed, self._shard_index, self._shard_count = seed, shard_index, shard_count
        self._num_threads, self._num_workers = num_threads, num_workers
        self._is_scaled = True

    @property
    def steps_per_epoch(self) -> int:
        if self.train:
            return max(1, self.num_examples // self.batch_size)
        return -(-self.num_examples // self.batch_size)

    def iterator(self) -> "BatchIterator":
        """A new iterator from the start; every array leads with batch_size // shard_count."""
        return BatchIterator(self._training_batches() if self.train else self._evaluation_batches(), self._prefetched)

    def in_order(self, sharded: bool = True) -> "Dataset":
        """The same examples once through in order, with the evaluation transform; shares the source.

        Args:
          sharded: this shard's part of every batch; False: whole batches, for one process that reads everything.
        """
        dataset = copy.copy(self)
        dataset.train = False
        if not sharded:
            dataset._shard_index, dataset._shard_count = 0, 1
        return dataset

    def as_bytes(self) -> "Dataset":
        """The same dataset, whose images stay uint8: a quarter of the memory, and of what goes to a device.

        `devices.sharding.put_batch` makes the same floats of them there. Images that are floats from the start stay so.
        """
        dataset = copy.copy(self)
        dataset._is_scaled = False
        return dataset

    def at_most(self, count: int | None) -> "Dataset":
        """Of an evaluation `count` examples, spread evenly over all: classes may lie together. None: all of them."""
        dataset = copy.copy(self)
        dataset.num_examples = min(count or self.num_examples, self.num_examples)
        return dataset

    def position_of(self, numbers: np.ndarray) -> np.ndarray:
        """Positions in the split of the examples 0..`num_examples` - 1, which `at_most` spreads evenly."""
        return numbers * self.split_size // self.num_examples

    def examples(self, indices: Sequence[int]) -> Batch:
        """Read the examples at these positions as one batch, with the evaluation transform."""
        transform = functools.partial(_transformed, self.source, self._eval_transform, self._is_scaled)
        return _stack([transform(self.source[index]) for index in indices])

    def _training_batches(self):
        import grain

        stream = grain.MapDataset.source(self.source).shuffle(seed=self._seed).repeat()
        transform = functools.partial(_transformed, self.source, self._train_transform, self._is_scaled)
        stream = stream.random_map(transform, seed=self._seed)
        # drop_remainder drops nothing of an endless stream; without it grain rounds the length up beyond sys.maxsize.
        stream = stream.batch(self.batch_size // self._shard_count, drop_remainder=True, batch_fn=_stack)
        # Sharded after the draws, which so do not depend on shards. Batches are of one shard's size, and shard i takes
        # every shard_count-th from i on: the parts of one step, in the order of the shards, are the global batch.
        return stream[self._shard_index :: self._shard_count]

    def _evaluation_batches(self):
        import grain

        return grain.MapDataset.range(self.steps_per_epoch).map(self._evaluation_batch)

    def _evaluation_batch(self, step: int) -> Batch:
        """This shard's part of global batch `step`; the parts in the order of the shards are the batch."""
        size = self.batch_size // self._shard_count
        positions = step * self.batch_size + self._shard_index * size + np.arange(size)
        indices = self.position_of(np.minimum(positions, self.num_examples - 1))
        batch = self.examples(indices)
        # Of a damaged image the stand-in does not count: it has its own turn.
        damaged = np.isin(indices, list(self.source.damaged))
        return {**batch, "mask": (positions < self.num_examples) & ~damaged}

    def _prefetched(self, batches) -> Iterator[Batch]:
        import grain

        # Each thread builds a whole batch, so this bounds the memory to a batch per thread and one to hand out.
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=self._num_threads + 1)
        stream = batches.to_iter_dataset(options)
        if self.train and self._num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # outside an absl app; grain's workers read absl flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        return iter(stream)


class BatchIterator:
    """Iterator over batches whose position can be saved; a new process resumes from it bit for bit."""

    def __init__(self, batches, prefetched: Callable[..., Iterator[Batch]]):
        self._batches, self._prefetched = batches, prefetched
        self._position = 0
        self._stream: Iterator[Batch] | None = None  # threads start with the first batch

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._prefetched(self._batches[self._position :])
        batch = next(self._stream)
        self._position += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position in the stream, JSON-able."""
        return {"next_batch": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Move to a position that `get_state` returned, under any number of threads, workers or shards."""
        if not isinstance(state.get("next_batch"), int):
            raise ValueError(f"data state: {state!r} is not allowed; give {{'next_batch': <int>}}")
        self.close()
        self._position = state["next_batch"]

    def close(self) -> None:
        """Stop the threads and worker processes; asking for a batch starts them again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _transformed(
    source: Source, transform: Callable[..., Batch], is_scaled: bool, example: dict, *rng: np.random.Generator
) -> Batch:
    """The arrays of an example, or of the one that stands in for it where the transform fails on its data."""
    while True:
        try:
            arrays = transform(example, *rng)
        except (ArithmeticError, MemoryError, OSError, ValueError) as error:
            source.mark_damaged(int(example["index"]), error)
            example = source[int(example["index"])]
        else:
            return {**arrays, "image": scale(arrays["image"])} if is_scaled and "image" in arrays else arrays


def _stack(examples: Sequence[Batch]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

"""Datasets of encoded images: one split, or the three views of a dataset that a training run reads."""

import dataclasses
import os
from typing import NamedTuple

import numpy as np

from rq_jax.data.pipeline import Batch, Dataset
from rq_jax.data.sources import ImageSource, open_records
from rq_jax.data.text import Tokenizer, load_tokenizer
from rq_jax.data.transforms import DETERMINISTIC, TRANSFORMS, ImageTransform
from rq_jax.settings import checks


class Splits(NamedTuple):
    """The three views of a dataset that a training run reads.

    Attributes:
      train: the training split, endless, shuffled and randomly transformed.
      validation: the validation split, once through in order.
      ordered: the training split once through in order, with the evaluation transform.
    """

    train: Dataset
    validation: Dataset
    ordered: Dataset

    def as_bytes(self) -> "Splits":
        """The same splits, whose images stay uint8 where they are a `Dataset`; see `Dataset.as_bytes`."""
        return Splits(*(split.as_bytes() if isinstance(split, Dataset) else split for split in self))


@dataclasses.dataclass(frozen=True)
class ExampleTransform:
    """Maps a decoded example to the arrays of a batch, its image as bytes; without a generator the evaluation form."""

    image: ImageTransform
    tokenizer: Tokenizer | None = None

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> Batch:
        """Args: example: of an `ImageSource`. Returns: the arrays that `make_dataset` lists, without the batch axis.

        The image is what its transform makes of it: bytes, which the dataset scales.
        """
        arrays = {"image": self.image(example["image"], rng), "index": np.int32(example["index"])}
        if self.tokenizer is not None:
            arrays["cond"] = self.tokenizer([example["text"]], rng)[0]
        elif example["label"] is not None:
            arrays["cond"] = np.array([example["label"]], np.int32)
        return arrays


def make_dataset(
    *,
    split: str,
    train: bool,
    name: str,
    batch_size: int,
    image_size: int | tuple[int, int],
    data_dir: str | os.PathLike | None = None,
    train_split: str = "train",
    validation_split: str = "validation",
    validation_batch_size: int | None = None,
    max_validation_images: int | None = None,
    train_transform: str = "resize_random_crop",
    eval_transform: str = "resize_center_crop",
    flip_probability: float = 0.5,
    label_key: str | None = None,
    text_key: str | None = None,
    text_tokenizer: str | os.PathLike | None = None,
    text_length: int | None = None,
    text_dropout: float = 0.0,
    channels: int = 3,
    max_damaged: int = 100,
    num_threads: int = 2,
    num_workers: int = 0,
    seed: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Dataset:
    """Open one split of an image dataset.

    Args:
      split: "train" or "validation", which stand for `train_split` and `validation_split`; or a split's own name.
      train: endless, shuffled and randomly transformed; False: once through in order.
      name: "twemoji", "twemoji/256", "avatars" or "avatars/128" (bundled, made on first use), "folder", "parquet",
        "webdataset", or a prepared TFDS dataset.
      batch_size: of all shards together.
      image_size: side in pixels, or (height, width); channels: 3 (RGB) or 1 (grey).
      data_dir: the folder of images, parquet files or tars, or the directory of TFDS datasets; None is the default of
        the latter.
      train_split, validation_split: the dataset's names of its splits.
      validation_batch_size: in place of `batch_size` where `split` is "validation".
      max_validation_images: where `split` is "validation": so many of it, spread evenly over all.
      train_transform: a name in `transforms.TRANSFORMS`; eval_transform: one in `transforms.DETERMINISTIC`.
      flip_probability: of mirroring a training image, in [0, 1].
      label_key: the ClassLabel feature or column to read, "folder" for class folders, "cls" of a webdataset; None for
        no labels.
      text_key: the Text feature or column to read, "txt" for a file beside the image; None for no captions.
      text_tokenizer: tokenizer file of the captions, see `text.load_tokenizer`; text_length: U, tokens of a caption.
      text_dropout: BPE-dropout of training captions, in [0, 1).
      max_damaged: damaged images to skip before the run stops.
      num_threads: reading threads of this process, or of each worker; each builds whole batches.
      num_workers: worker processes for training; 0 reads in this process.
      seed: of order and transforms, in [0, 2**32).
      shard_index, shard_count: this process among those that each read their part of every batch.

    Returns:
      The dataset. Its batches hold "image" float32 (B,H,W,C) in [-1, 1]; "index" int32 (B,), the position in the
      split; with `label_key` "cond" int32 (B,1), with `text_key` "cond" int32 (B,U); in evaluation "mask" bool (B,).

    Raises:
      FileNotFoundError: no such folder, dataset or tokenizer, or nothing in it.
      ValueError: an unknown name, a value out of range, or both `label_key` and `text_key`.
    """
    if label_key is not None and text_key is not None:
        raise ValueError(f"data.label_key '{label_key}' and data.text_key '{text_key}': set one of them")
    size = _check_transforms(image_size, train_transform, eval_transform, flip_probability)
    tokenizer = None if text_key is None else _open_tokenizer(text_key, text_tokenizer, text_length, text_dropout)
    _check_least(validation_batch_size=validation_batch_size, max_validation_images=max_validation_images)
    if split != "validation" or train:
        validation_batch_size = max_validation_images = None
    split = {"train": train_split, "validation": validation_split}.get(split, split)
    records = open_records(name, split, data_dir, label_key, text_key)
    return Dataset(
        ImageSource(records, channels, max_damaged), train=train, batch_size=validation_batch_size or batch_size,
        train_transform=ExampleTransform(ImageTransform(train_transform, size, flip_probability, True), tokenizer),
        eval_transform=ExampleTransform(ImageTransform(eval_transform, size, as_bytes=True), tokenizer),
        seed=seed, shard_index=shard_index, shard_count=shard_count, num_threads=num_threads, num_workers=num_workers,
        class_names=records.class_names, vocab_size=tokenizer.vocab_size if tokenizer else None,
        text_length=tokenizer.length if tokenizer else None,
    ).at_most(max_validation_images)  # fmt: skip


def open_splits(*, seed: int = 0, shard_index: int = 0, shard_count: int = 1, **data_config) -> Splits:
    """Open the training and the validation split of an image dataset.

    Args:
      seed: of order and transforms, in [0, 2**32).
      shard_index: this process among the `shard_count` that each read their part of every batch.
      shard_count: number of reading processes.
      **data_config: the other settings of `make_dataset`, without `split` and `train`.

    Returns:
      The splits; `train` and `ordered` share one source of images, which is opened once.

    Raises:
      FileNotFoundError, ValueError: as `make_dataset`.
    """
    settings = {**data_config, "seed": seed, "shard_index": shard_index, "shard_count": shard_count}
    train = make_dataset(split="train", train=True, **settings)
    return Splits(train, make_dataset(split="validation", train=False, **settings), train.in_order())


def _check_transforms(
    image_size: int | tuple[int, int], train_transform: str, eval_transform: str, flip_probability: float
) -> tuple[int, int]:
    """Check the settings of the image transforms; returns (height, width)."""
    transforms = {"train_transform": (train_transform, TRANSFORMS), "eval_transform": (eval_transform, DETERMINISTIC)}
    for setting, (name, allowed) in transforms.items():
        if name not in allowed:
            raise ValueError(f"data.{setting}: '{name}' is unknown; allowed are {', '.join(allowed)}")
    if not 0.0 <= flip_probability <= 1.0:
        raise ValueError(f"data.flip_probability: {flip_probability} is outside [0, 1]")
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"data.image_size: {image_size} is not allowed; give a positive side or (height, width)")
    return size


def _check_least(**settings: int | None) -> None:
    for setting, value in settings.items():
        if value is not None:
            checks.at_least(f"data.{setting}", value, 1)


def _open_tokenizer(text_key: str, path: str | os.PathLike | None, length: int | None, dropout: float) -> Tokenizer:
    if path is None:
        raise ValueError(f"data.text_tokenizer: unset, but data.text_key '{text_key}' needs a tokenizer file; set it")
    return load_tokenizer(path, length, dropout)

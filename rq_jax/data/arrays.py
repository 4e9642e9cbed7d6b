"""Datasets of arrays in memory, or memory-mapped."""

import dataclasses
from typing import Any

import numpy as np

from rq_jax.data.pipeline import Batch, Dataset
from rq_jax.data.splits import Splits


def from_arrays(
    images: np.ndarray,
    validation_images: np.ndarray,
    cond: np.ndarray | None = None,
    validation_cond: np.ndarray | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    flip_probability: float = 0.0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Splits:
    """Make the splits of a training run from arrays.

    Args:
      images: of the training split: uint8 (N,H,W,C), or floating-point in [-1, 1].
      validation_images: of the validation split, likewise.
      cond: condition of each training image: its class (N,) or (N,1), or the tokens of its caption (N,U); integers
        from 0. None without conditions.
      validation_cond: of the validation split, likewise.
      batch_size: of all shards together.
      seed: of order and flips, in [0, 2**32).
      flip_probability: of mirroring a training image, in [0, 1].
      shard_index: this process among the `shard_count` that each take their part of every batch.
      shard_count: number of processes.

    Returns:
      The splits. Batches hold "image" float32 (B,H,W,C) in [-1, 1], "index" int32 (B,), with conditions "cond" int32
      (B,1) or (B,U), in evaluation "mask" bool (B,). Classes are 0 to the largest of both splits, named by their
      number.

    Raises:
      ValueError: a wrong shape, type, range or length, or settings out of range.
    """
    if not 0.0 <= flip_probability <= 1.0:
        raise ValueError(f"flip_probability: {flip_probability} is outside [0, 1]")
    images, validation_images = _check_images("images", images), _check_images("validation_images", validation_images)
    if images.shape[1:] != validation_images.shape[1:]:
        shapes = f"{validation_images.shape[1:]} an image, but images has {images.shape[1:]}"
        raise ValueError(f"validation_images: {shapes}; give the same to both")
    about_cond = {}
    if cond is not None or validation_cond is not None:
        cond = _check_cond("cond", cond, len(images))
        validation_cond = _check_cond("validation_cond", validation_cond, len(validation_images))
        about_cond = _describe_cond(cond, validation_cond)
    settings = dict(
        batch_size=batch_size, train_transform=_ArrayTransform(flip_probability), eval_transform=_ArrayTransform(),
        seed=seed, shard_index=shard_index, shard_count=shard_count, **about_cond,
    )  # fmt: skip
    train = Dataset(_ArraySource(images, cond), train=True, **settings)
    validation = Dataset(_ArraySource(validation_images, validation_cond), train=False, **settings)
    return Splits(train, validation, train.in_order())


class _ArraySource:
    """The examples of an array; none of them can be damaged."""

    damaged: frozenset[int] = frozenset()

    def __init__(self, images_NHWC: np.ndarray, cond_NU: np.ndarray | None):
        self._images_NHWC, self._cond_NU = images_NHWC, cond_NU

    def __len__(self) -> int:
        return len(self._images_NHWC)

    def mark_damaged(self, index: int, error: Exception) -> None:
        """Raise the error: there is nothing to be wrong with an array."""
        raise error

    def __getitem__(self, index: int) -> Batch:
        index = int(index) % len(self)  # grain counts on through the epochs
        example = {"image": self._images_NHWC[index], "index": np.int32(index)}
        return example if self._cond_NU is None else {**example, "cond": self._cond_NU[index]}


@dataclasses.dataclass(frozen=True)
class _ArrayTransform:
    """Mirrors an example's image at random. Bytes stay, other floats become float32."""

    flip_probability: float = 0.0

    def __call__(self, example: Batch, rng: np.random.Generator | None = None) -> Batch:
        image = example["image"]
        if image.dtype != np.uint8:
            image = image.astype(np.float32)
        if rng is not None and rng.random() < self.flip_probability:
            image = image[:, ::-1]
        return {**example, "image": image}


def _check_images(name: str, images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name}: shape {images.shape} is not (N,H,W,C) with at least one image; reshape the array")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name}: dtype {images.dtype} is neither uint8 nor floating-point in [-1, 1]; convert it")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1 and high <= 1):  # NaN too
        raise ValueError(f"{name}: values {low:g} to {high:g} are not in [-1, 1]; rescale them, or give uint8")
    return images


def _check_cond(name: str, cond: np.ndarray | None, count: int) -> np.ndarray:
    """Conditions as int32 (N,U)."""
    if cond is None:
        raise ValueError(f"{name}: missing; give conditions for both splits or for none")
    cond = np.asarray(cond)
    if cond.ndim not in (1, 2) or len(cond) != count or 0 in cond.shape:
        raise ValueError(f"{name}: shape {cond.shape} does not fit {count} images; give ({count},) or ({count}, U)")
    if not np.issubdtype(cond.dtype, np.integer):
        raise ValueError(f"{name}: dtype {cond.dtype} is not an integer; give class numbers or token ids")
    low, high = int(cond.min()), int(cond.max())
    if low < 0 or high >= 2**31:
        raise ValueError(f"{name}: ids {low} to {high} are not in [0, 2**31); number them from 0")
    return cond.reshape(count, -1).astype(np.int32)


def _describe_cond(cond_NU: np.ndarray, validation_cond_NU: np.ndarray) -> dict[str, Any]:
    """The attributes of `Dataset` that tell of conditions."""
    length, validation_length = cond_NU.shape[1], validation_cond_NU.shape[1]
    if length != validation_length:
        raise ValueError(f"validation_cond: {validation_length} ids an image, but cond has {length}; give equally many")
    count = 1 + int(max(cond_NU.max(), validation_cond_NU.max()))
    if length == 1:
        return {"class_names": [str(i) for i in range(count)]}
    return {"vocab_size": count, "text_length": length}

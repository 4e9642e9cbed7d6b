"""Images of a split that samples are made from, in turn by image id."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on

_BATCH_SIZE = 64


def map_split(
    compute: Callable[[dict[str, np.ndarray]], Any],
    loaded: LoadedModel,
    split: str,
    image_ids: Sequence[int],
    flag: str,
    conditions: dict[str, Any] | None = None,
) -> Any:
    """What is computed of images of the data set that a model was trained on, the i-th of a split in turn for id i.

    Args:
      compute: a batch, with "image" (b, H, W, C) in bytes, to arrays (b, ...); all batches have one size.
      loaded: the model.
      split: "train", "validation" or a split's own name.
      image_ids: one after the other; each image of the split is read at most once.
      flag: that named the split, for messages.
      conditions: settings of `make_dataset` for "cond" of a batch.

    Returns:
      The arrays (m, ...), of image i in row i % m.

    Raises:
      ValueError: the model names no data set, or an image cannot be read.
    """
    settings = trained_on(loaded.config, IMAGE_SETTINGS)
    if "name" not in settings:
        raise ValueError(f"{flag}: {split} needs the data set of the model, which names none; give a codes .npz")
    dataset = EvaluationData(settings | (conditions or {}), batch_size=_BATCH_SIZE).open(split)
    needed = np.asarray(image_ids)[: dataset.num_examples] % dataset.num_examples
    size, parts = min(_BATCH_SIZE, len(needed)), []
    for start in range(0, len(needed), size):
        indices = np.resize(needed[start : start + size], size)  # one shape for all
        batch = dataset.examples(indices.tolist())
        if (damaged := np.isin(indices, list(dataset.source.damaged))).any():  # others stand in for them
            raise ValueError(
                f"{flag}: image {indices[damaged][0]} of the split '{split}' cannot be read; mend it, or give a codes "
                ".npz"
            )
        parts.append(jax.device_get(compute(batch)))
    first = int(image_ids[0]) % len(needed)
    return jax.tree.map(lambda *arrays: np.roll(np.concatenate(arrays)[: len(needed)], first, axis=0), *parts)

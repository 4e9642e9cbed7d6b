"""Grain maps that images are to be drawn with, of an earlier run or of images that are there."""

from pathlib import Path

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on
from rq_jax.evaluation.samples import read_draws
from rq_jax.grains import check_grains

_BATCH_SIZE = 64


def grains_of(loaded: LoadedModel, source: str, image_ids: np.ndarray) -> np.ndarray:
    """Grain maps (m, u, v); that of image i is in row i % m.

    Args:
      loaded: a `DQTransformer` with its tokenizer.
      source: a codes .npz of `sample.py`, or a split of the data set of the model ("train", "validation" or its own
        name): image i has the map that the tokenizer gives to the i-th image of the split, in turn.
      image_ids: of the images that are drawn, one after the other; no more of a split is read.

    Raises:
      ValueError: a model without grains, a file without them or of others, a model that names no data set, or an image
        of the split that cannot be read.
    """
    layout = getattr(loaded.model, "layout", None)
    if layout is None:
        raise ValueError(f"--grains_of: {source} is for models with grains, this one has none; leave it out")
    if Path(source).suffix == ".npz":
        grains = read_draws(source, "--grains_of").grains
        if grains is None:
            raise ValueError(f"--grains_of: '{source}' holds no grains; give the codes .npz of a model that has them")
        check_grains("--grains_of", grains, layout.num_grains, layout.region_grid, len(grains))
        return grains
    settings = trained_on(loaded.config, IMAGE_SETTINGS)
    if "name" not in settings:
        raise ValueError(f"--grains_of: {source} needs the data set of the model, which names none; give a codes .npz")
    dataset, tokenizer = EvaluationData(settings, batch_size=_BATCH_SIZE).open(source), loaded.tokenizer

    @jax.jit
    def route(variables, images):
        return tokenizer.model.apply(variables, sharding.scale(images), method="route").grains

    needed = np.asarray(image_ids)[: dataset.num_examples] % dataset.num_examples  # each of the split at most once
    grains = []
    for start in range(0, len(needed), _BATCH_SIZE):
        indices = np.resize(needed[start : start + _BATCH_SIZE], _BATCH_SIZE)  # one shape for all
        images = dataset.examples(indices.tolist())["image"]
        if (damaged := np.isin(indices, list(dataset.source.damaged))).any():  # others stand in for them
            raise ValueError(
                f"--grains_of: image {indices[damaged][0]} of the split '{source}' cannot be read; mend it, or give a "
                "codes .npz"
            )
        grains.append(np.asarray(route(tokenizer.variables, images)))
    maps = np.concatenate(grains)[: len(needed)]
    return np.roll(maps, int(image_ids[0]) % len(maps), axis=0)

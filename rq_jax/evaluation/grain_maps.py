"""Grain maps that images are to be drawn with, of an earlier run or of images that are there."""

from pathlib import Path

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation.samples import read_draws
from rq_jax.evaluation.split_images import map_split
from rq_jax.grains import check_grains


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
    tokenizer = loaded.tokenizer

    @jax.jit
    def route(variables, images):
        return tokenizer.model.apply(variables, sharding.scale(images), method="route").grains

    return map_split(lambda batch: route(tokenizer.variables, batch["image"]), loaded, source, image_ids, "--grains_of")

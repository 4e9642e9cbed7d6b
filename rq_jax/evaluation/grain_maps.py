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


def grains_of(loaded: LoadedModel, source: str) -> np.ndarray:
    """Grain maps (m, u, v), which images take in turn by id.

    Args:
      loaded: a `DQTransformer` with its tokenizer.
      source: a codes .npz of `sample.py`, or a split of the data set of the model ("train", "validation" or its own
        name), whose images the tokenizer routes.

    Raises:
      ValueError: a model without grains, a file without them or of others, or a model that names no data set.
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
    tokenizer = loaded.tokenizer

    @jax.jit
    def route(variables, images):
        return tokenizer.model.apply(variables, sharding.scale(images), method="route").grains

    batches = EvaluationData(settings, batch_size=_BATCH_SIZE).open(source).iterator()
    return np.concatenate([np.asarray(route(tokenizer.variables, batch["image"]))[batch["mask"]] for batch in batches])

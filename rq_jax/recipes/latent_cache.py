"""What a frozen tokenizer makes of the training set, computed once and read from disk by every later start."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.data import CacheDataset, Dataset, fingerprint, read_meta, write_cache
from rq_jax.devices import sharding
from rq_jax.recipes.codes import encode, routing_of

# Settings of the config section `data` that a cache does not depend on: random transforms, which `check` excludes.
_NOT_CACHED = ("validation_split", "train_transform", "flip_probability", "text_dropout")
_VIEWED = ("latents", "codes", "grains")

logger = logging.getLogger(__name__)


def check(data: Mapping[str, Any]) -> None:
    """The transforms of a config's `data` can be read back from a cache.

    Raises:
      ValueError: a random transform that the cache would leave out, or several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(f"loop.use_latent_cache: True is for one process, not {jax.process_count()}; set it to False")
    if data["train_transform"] != data["eval_transform"] or data["text_dropout"]:
        raise ValueError(
            f"loop.use_latent_cache: it would hold images as '{data['eval_transform']}' makes them, whole captions, "
            f"but training wants '{data['train_transform']}' and text_dropout {data['text_dropout']}; set them equal "
            "and 0"
        )
    if data["flip_probability"] not in (0, 0.5):
        raise ValueError(
            "loop.use_latent_cache: it would draw an image or its mirror image with equal chances, but "
            f"data.flip_probability is {data['flip_probability']}; set it to 0 or 0.5"
        )


def encoded(tokenizer: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """What a step of stage 2 reads in place of images: "codes" and "grains", or without grains "latents"."""
    if tokenizer.num_grains > 1:
        return tokenizer.apply(variables, images, method="encode_to_codes")._asdict()
    return {"latents": encode(tokenizer, variables, images)}  # from which a step draws codes


def open_cache(
    tokenizer: nn.Module,
    variables: Any,
    ordered: Dataset,
    data: Mapping[str, Any],
    workdir: Path,
    seed: int,
) -> CacheDataset:
    """The training set as `encoded`, computed once: of every image and, where flips are on, of its mirror image.

    Args:
      tokenizer, variables: a cache of other variables is made again.
      ordered: the training set, once through.
      data: the config section.
      workdir: of the run, where the cache has a directory.
      seed: of the order of the batches.
    """
    use_flips, directory = data["flip_probability"] > 0, workdir / ("codes" if tokenizer.num_grains > 1 else "latents")
    made_from = {
        "tokenizer": checkpoint.fingerprint(variables),
        **routing_of(tokenizer),
        "mirror images": use_flips,
        **fingerprint.of_settings({name: value for name, value in data.items() if name not in _NOT_CACHED}),
        **fingerprint.of_dataset(ordered),
    }
    encode_batch = jax.jit(lambda variables, images: encoded(tokenizer, variables, sharding.scale(images)))

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for batch in ordered.iterator():
            images = batch.pop("image")
            views = [images, images[:, :, ::-1]] if use_flips else [images]
            arrays = jax.device_get([encode_batch(variables, view) for view in views])
            yield {**batch, **{name: np.stack([of_view[name] for of_view in arrays], axis=1) for name in arrays[0]}}

    meta = read_meta(directory)
    if meta is None or meta["fingerprint"] != made_from:
        if meta is not None:
            what = fingerprint.difference(meta["fingerprint"], made_from) or "an older version made them"
            logger.warning("'%s': the %s are computed again: %s", directory, directory.name, what)
        meta = {"fingerprint": made_from, "views": list(_VIEWED)}
        write_cache(directory, batches(), meta, ordered.num_examples)
    return CacheDataset(directory, data["batch_size"], True, seed, num_threads=data["num_threads"])

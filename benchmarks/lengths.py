"""Codes of images of unlike lengths, spread as those of the bundled set, and the steps that train on them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rq_jax.grains import num_codes

# Share of the regions of grain 1 in the bundled images at 256x256, cut into 16x16 regions, half of all which have it
# (thresholds at the median entropy): the image after each twentieth of them, from the least to the most.
FINE_SHARES = (
    0.047, 0.266, 0.309, 0.340, 0.355, 0.383, 0.406, 0.434, 0.453, 0.473, 0.492,
    0.508, 0.531, 0.551, 0.570, 0.594, 0.617, 0.652, 0.695, 0.785, 1.000,
)  # fmt: skip
MEAN_SHARE = 0.5


def fine_shares(count: int) -> np.ndarray:
    """Shares of the finest grain in so many images, spread as in the bundled set, with its mean; from least to most."""
    places = (np.arange(count) + 0.5) / count
    shares = np.interp(places, np.linspace(0, 1, len(FINE_SHARES)), FINE_SHARES)
    return np.clip(shares + MEAN_SHARE - shares.mean(), 0, 1)


class SpreadCodes:
    """Batches of codes and grain maps as from a cache on disk, endless: the same `num_batches` again and again."""

    def __init__(self, model: Any, batch_size: int, num_batches: int):
        """Args: model: a `DQTransformer`; regions that are not of its finest grain are of grain 0."""
        rng, count, (u, v) = np.random.default_rng(0), num_batches * batch_size, model.region_grid
        numbers = rng.permutation(np.rint(fine_shares(count) * u * v).astype(int))
        is_fine = rng.permuted(np.arange(u * v) < numbers[:, None], axis=1)
        arrays = {
            "codes": rng.integers(0, model.codebook_size, (count, *model.code_shape), np.int32),
            "grains": (model.num_grains - 1) * is_fine.reshape(count, u, v).astype(np.int32),
        }
        if model.is_conditional:
            arrays["cond"] = rng.integers(0, model.cond_vocab_size, (count, model.cond_length), np.int32)
        parts = {name: np.split(array, num_batches) for name, array in arrays.items()}
        self._batches = [{name: parts[name][i] for name in parts} for i in range(num_batches)]
        self._next, self.batch_size = 0, batch_size

    def iterator(self) -> "SpreadCodes":
        """Itself, from where it is."""
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        return batch

    def close(self) -> None:
        """Nothing is open."""


def shape_of(batch: Mapping[str, Any]) -> str:
    """What decides the program of a step."""
    return str(jax.tree.map(np.shape, dict(batch)))


def count_tokens(model: Any, batches: list[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens of an image in batches of codes: of its own, and with its pads, means over all."""
    own, padded = [], []
    for batch in batches:
        if "packed" in batch:
            own.append(np.asarray(batch["packed"].length))
            padded.append(batch["packed"].position.shape[1])
        else:
            own.append(np.asarray(num_codes(batch["grains"], model.num_grains)) + 2 * model.num_grains)
            padded.append(model.layout.max_tokens)
    return {"tokens_per_image": float(np.mean(own)), "padded_tokens": math.fsum(padded) / len(padded)}

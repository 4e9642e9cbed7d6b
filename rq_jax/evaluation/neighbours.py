"""Nearest images of samples, by features or by pixels."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rq_jax.evaluation import manifold
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on
from rq_jax.evaluation.store import FeatureSet
from rq_jax.report import curves, grids

NUM_SHOWN, SHOWN_SIZE, NUM_NEAREST = 12, 64, 3
MEDIAN = "median_squared_distance_to_nearest_training_picture"
MEDIAN_OF_OTHERS = "median_squared_distance_to_nearest"
ESTIMATOR = "squared distance to the nearest, median"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Nearest(NamedTuple):
    """The nearest of a second set for each image of a first.

    Attributes:
      distances: (N, R), squared, in ascending order.
      positions: (N, R), in the second set.
    """

    distances: np.ndarray
    positions: np.ndarray

    @property
    def median(self) -> float:
        """Of the distances to the nearest."""
        return float(np.median(self.distances[:, 0]))

    @property
    def quantiles(self) -> dict[str, float]:
        """Of the distances to the nearest, by share."""
        values = np.quantile(self.distances[:, 0], QUANTILES)
        return {f"{share:g}": float(value) for share, value in zip(QUANTILES, values, strict=True)}


def find_nearest(features: FeatureSet, others: FeatureSet, count: int = NUM_NEAREST) -> Nearest:
    """The nearest of the others by their features, without a matrix of all distances.

    Args:
      features, others: of two sets of images.
      count: R, at most; fewer where there are fewer others.
    """
    distances, places = manifold.nearest(features.vectors[0], others.vectors[0], min(count, len(others.positions)))
    return Nearest(distances, others.positions[places])


def pixel_distances(images: np.ndarray, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared distances of bytes between images and a data set.

    Args:
      images: (N, H, W, C), uint8.
      dataset: M images of that size, once through.

    Returns:
      (N, M), and the positions (M,) of the images in the data set.
    """
    images, distances, positions = images.astype(np.float32), [], []
    for batch in dataset.iterator():
        batch_images = grids.to_uint8(batch["image"][batch["mask"]]).astype(np.float32)
        distances.append([np.mean((batch_images - image) ** 2, axis=(1, 2, 3)) for image in images])
        positions.append(batch["index"][batch["mask"]])
    return np.concatenate(distances, axis=1), np.concatenate(positions)


def sample_sheet(config: dict[str, Any], images: np.ndarray, names: Sequence[str], num_neighbours: int) -> np.ndarray:
    """Samples beside the training images nearest to them in mean squared pixel distance, with the classes of both.

    Args:
      config: of the transformer, naming its data set.
      images: (N, H, W, C), uint8.
      names: of the samples.
      num_neighbours: images beside each sample.

    Returns:
      The sheet, uint8 HWC.
    """
    data = EvaluationData(trained_on(config, (*IMAGE_SETTINGS, "label_key")), batch_size=256)
    distances_NM, positions_M = pixel_distances(images, data.training())
    order_NR = np.argsort(distances_NM, axis=-1, kind="stable")[:, :num_neighbours]
    return draw_sheet(images, positions_M[order_NR], data.training(), names)


def draw_sheet(
    images: np.ndarray, nearest_NR: np.ndarray, others: Any, names: Sequence[str] | None = None
) -> np.ndarray:
    """Samples beside the images of another set nearest to them.

    Args:
      images: samples (N, H, W, C), uint8 or floats in [-1, 1].
      nearest_NR: positions of their R nearest images in the other set, the first N rows of it.
      others: a `Dataset` or an `ImageSet`, where they are read; of a data set with classes their names are written
        below.
      names: of the samples, written below them where there is any.

    Returns:
      The sheet, uint8 HWC.
    """
    rows, captions = {"sample": grids.to_uint8(images)}, {}
    if names is not None and any(names):
        captions["sample"] = names
    for rank, nearest_N in enumerate(nearest_NR[: len(images)].T.tolist(), start=1):
        batch = others.examples(nearest_N)
        rows[f"nearest {rank}"] = grids.to_uint8(batch["image"])
        if (class_names := getattr(others, "class_names", None)) is not None:
            captions[f"nearest {rank}"] = [class_names[label] for label in batch["cond"][:, 0]]
    return grids.labelled_grid(rows, scale=max(1, SHOWN_SIZE // images.shape[1]), captions=captions)


def draw_distances(nearest: Mapping[str, Nearest], path: str | os.PathLike) -> None:
    """Draws the share of each set within a distance of its nearest image, as PNG."""
    lines = {}
    for name, one in nearest.items():
        distances = np.sort(one.distances[:, 0])
        lines[name] = distances.tolist(), ((np.arange(len(distances)) + 1) / len(distances)).tolist(), None
    curves.panels({"share of the images": lines}, "squared distance to the nearest image, at most", path)

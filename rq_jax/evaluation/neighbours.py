"""Nearest training images of samples, by pixels or by features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.evaluation import features
from rq_jax.evaluation.features import Features
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on
from rq_jax.report import grids

NUM_SHOWN, SHOWN_SIZE = 12, 64


def feature_distances(x_NA: np.ndarray, y_MA: np.ndarray) -> np.ndarray:
    """Squared distances (N, M) between two sets of feature vectors."""
    return np.sum(x_NA**2, axis=-1)[:, None] + np.sum(y_MA**2, axis=-1) - 2 * x_NA @ y_MA.T


def median_to_nearest(distances_NM: np.ndarray) -> float:
    """Median over N images of the distance to the nearest of M."""
    return float(np.median(distances_NM.min(axis=-1)))


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


def find_neighbours(
    out: str, samples: Mapping[str, np.ndarray], data: EvaluationData, held_out: Features, sets: Mapping[str, Features]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """How near samples and held-out images lie to training images.

    Writes a sheet of the nearest for each directory; of several processes the first writes.

    Args:
      out: directory of the sheets.
      samples: directory -> images (N, H, W, C) in [-1, 1].
      data: the images that are measured on.
      held_out, sets: from `features.extract_all`.

    Returns:
      Numbers of samples and median distances, as JSON holds them; the sheet of each directory.
    """
    training, dataset = sets[features.TRAINING], data.training()
    compared = {name: sets[name] for name in (f"samples {directory}" for directory in samples)}
    compared["held-out pictures"] = held_out
    distances = {name: feature_distances(one.vectors, training.vectors) for name, one in compared.items()}
    sheets = {directory: Path(out) / f"neighbours{i or ''}.png" for i, directory in enumerate(samples)}
    if jax.process_index() == 0:
        for directory, path in sheets.items():
            shown, nearest = samples[directory][:NUM_SHOWN], distances[f"samples {directory}"][:NUM_SHOWN]
            grids.save_png(path, draw_sheet(shown, nearest, training.positions, dataset, 3))
    median = {name: median_to_nearest(distances_NM) for name, distances_NM in distances.items()}
    record = {
        "images": {directory: len(images) for directory, images in samples.items()},
        "median_squared_distance_to_nearest_training_picture": median,
    }
    return record, sheets


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
    return draw_sheet(images, distances_NM, positions_M, data.training(), num_neighbours, names)


def draw_sheet(
    images: np.ndarray,
    distances_NM: np.ndarray,
    positions_M: np.ndarray,
    dataset: Any,
    num_neighbours: int,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Samples beside the images of a data set nearest to them.

    Args:
      images: samples (N, H, W, C), uint8 or floats in [-1, 1].
      distances_NM: of the samples to M images.
      positions_M: of these images in the data set.
      dataset: where they are read; where it has classes, their names are written below.
      num_neighbours: images beside each sample.
      names: of the samples, written below them where there is any.

    Returns:
      The sheet, uint8 HWC.
    """
    order_NR = np.argsort(distances_NM, axis=-1, kind="stable")[:, :num_neighbours]
    rows, captions = {"sample": grids.to_uint8(images)}, {}
    if names is not None and any(names):
        captions["sample"] = names
    for rank, nearest_N in enumerate(positions_M[order_NR].T.tolist(), start=1):
        batch = dataset.examples(nearest_N)
        rows[f"nearest {rank}"] = grids.to_uint8(batch["image"])
        if dataset.class_names is not None:
            captions[f"nearest {rank}"] = [dataset.class_names[label] for label in batch["cond"][:, 0]]
    return grids.labelled_grid(rows, scale=max(1, SHOWN_SIZE // images.shape[1]), captions=captions)

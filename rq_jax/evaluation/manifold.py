"""Nearest neighbours among features, and what follows from them: precision, recall, density and coverage.

Distances are taken block by block: a matrix of all of them is never made. In float64 on the host. N, M images of two
sets, A features of each.
"""

from collections.abc import Iterator

import numpy as np

from rq_jax.report.progress import Progress
from rq_jax.settings import checks

ROWS, COLUMNS = 1024, 4096  # images of a block, 34 MB of distances


def squared_distances(x_NA: np.ndarray, y_MA: np.ndarray) -> np.ndarray:
    """(N, M), float64, at least 0."""
    x_NA, y_MA = (np.asarray(features, np.float64) for features in (x_NA, y_MA))
    squares = np.sum(x_NA**2, -1)[:, None] + np.sum(y_MA**2, -1)
    return np.maximum(squares - 2 * x_NA @ y_MA.T, 0.0)


def _row_blocks(x_NA: np.ndarray, title: str) -> Iterator[tuple[slice, np.ndarray]]:
    with Progress(len(x_NA), unit="image", title=title, leave=False) as progress:
        for start in range(0, len(x_NA), ROWS):
            rows = slice(start, min(start + ROWS, len(x_NA)))
            yield rows, np.asarray(x_NA[rows], np.float64)
            progress.update(rows.stop - start)


def _blocks(x_nA: np.ndarray, y_MA: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(y_MA), COLUMNS):
        columns = slice(start, min(start + COLUMNS, len(y_MA)))
        yield columns, squared_distances(x_nA, y_MA[columns])


def nearest(x_NA: np.ndarray, y_MA: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of a second set for each image of a first.

    Args:
      x_NA, y_MA: features, or memory maps of them.
      k: at most M.

    Returns:
      Squared distances (N, k) in ascending order, and positions (N, k) in the second set, the first of equal ones.

    Raises:
      ValueError: k out of range, or features of different lengths.
    """
    checks.shape("features", y_MA.shape, ("M", x_NA.shape[-1]))
    checks.in_range("k", k, 1, len(y_MA), "the images to be near to")
    distances_Nk, positions_Nk = np.empty((len(x_NA), k)), np.empty((len(x_NA), k), np.int64)
    for rows, x_nA in _row_blocks(x_NA, "nearest neighbours"):
        best, where = np.empty((len(x_nA), 0)), np.empty((len(x_nA), 0), np.int64)
        for columns, distances in _blocks(x_nA, y_MA):
            positions = np.broadcast_to(np.arange(columns.start, columns.stop), distances.shape)
            best, where = np.concatenate([best, distances], 1), np.concatenate([where, positions], 1)
            order = _smallest(best, k)
            best, where = np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)
        distances_Nk[rows], positions_Nk[rows] = best, where
    return distances_Nk, positions_Nk


def _smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k smallest of each row in ascending order; of equal ones the first."""
    if values.shape[1] > k:
        bound = np.partition(values, k - 1, axis=1)[:, k - 1 : k]
        # Sorting the few that can be among them, the rest behind: a stable sort of all would take ten times as long.
        width = int((values <= bound).sum(1).max())
        few = np.sort(np.argsort(values > bound, axis=1, kind="stable")[:, :width], axis=1)
    else:
        few = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(np.take_along_axis(values, few, 1), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(few, order, 1)


def neighbour_radii(features_NA: np.ndarray, k: int) -> np.ndarray:
    """Squared distance (N,) of each image to the k-th nearest of the others.

    Raises:
      ValueError: k outside 1..N-1.
    """
    checks.in_range("k", k, 1, len(features_NA) - 1, "the other images of a set")
    return nearest(features_NA, features_NA, k + 1)[0][:, k]  # the nearest is the image itself


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, equation 2).

    An image lies on the manifold of a set if it is no farther from one of its images than that one's k-th neighbour.

    Args:
      reference: features (N, A) of real images.
      samples: features (M, A).
      k: neighbours.

    Returns:
      Share of the samples on the manifold of the reference, and of the reference on that of the samples.

    Raises:
      ValueError: k outside 1..N-1 or 1..M-1, or features of different lengths.
    """
    checks.shape("samples", samples.shape, ("M", reference.shape[-1]))
    radii_N, radii_M = neighbour_radii(reference, k), neighbour_radii(samples, k)
    is_real_M, is_covered_N = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, reference_nA in _row_blocks(reference, "precision and recall"):
        for columns, distances_nm in _blocks(reference_nA, samples):
            is_real_M[columns] |= (distances_nm <= radii_N[rows, None]).any(0)
            is_covered_N[rows] |= (distances_nm <= radii_M[None, columns]).any(1)
    return float(is_real_M.mean()), float(is_covered_N.mean())


def density_coverage(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al., ICML 2020, equations 3 and 4), which outliers of the samples do not mislead.

    Args:
      reference, samples, k: as in `precision_recall`.

    Returns:
      Density: mean over samples of the neighbourhoods of real images that hold it, divided by k, may exceed 1.
      Coverage: share of the neighbourhoods of real images that hold a sample.

    Raises:
      ValueError: k outside 1..N-1, or features of different lengths.
    """
    checks.shape("samples", samples.shape, ("M", reference.shape[-1]))
    checks.at_least("samples", len(samples), 1)
    radii_N = neighbour_radii(reference, k)
    num_inside, is_covered_N = 0, np.zeros(len(reference), bool)
    for rows, reference_nA in _row_blocks(reference, "density and coverage"):
        for _, distances_nm in _blocks(reference_nA, samples):
            is_inside_nm = distances_nm < radii_N[rows, None]
            num_inside += int(is_inside_nm.sum())
            is_covered_N[rows] |= is_inside_nm.any(1)
    return num_inside / (k * len(samples)), float(is_covered_N.mean())

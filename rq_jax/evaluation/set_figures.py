"""Figures of sets of images against a reference, from their features: distances, scores, precision and coverage."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rq_jax import metrics
from rq_jax.evaluation import manifold, statistics
from rq_jax.evaluation.stamps import Fields
from rq_jax.evaluation.statistics import Gaussian
from rq_jax.evaluation.store import FeatureSet
from rq_jax.pretrained.files import UNVERIFIED
from rq_jax.settings import checks

MAX_SUBSET = 1000  # images behind one kernel distance
SEED = 0  # of subsets and splits
SCORE_SPLITS = 10
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
CLASS_SUBSETS = 20  # behind the kernel distance of one class
INCEPTION = "inception_2015"


@dataclasses.dataclass(frozen=True)
class Estimators:
    """Settings of the estimators.

    Attributes:
      subset_size: images of either side behind one kernel distance; num_subsets: random subsets.
      score_split: images of a split of the inception score, see `Protocol`.
      use_manifold: precision and recall, density and coverage are measured too.
    """

    subset_size: int = 0
    num_subsets: int = 0
    score_split: int | None = None
    use_manifold: bool = False

    def num_splits(self, num_images: int) -> int:
        """Splits of the inception score of so many images."""
        if self.score_split is None:
            return min(SCORE_SPLITS, num_images)
        return max(1, num_images // self.score_split)

    @property
    def split_seed(self) -> int | None:
        """Of these splits; None: images in their order."""
        return SEED if self.score_split is None else None


@dataclasses.dataclass(frozen=True)
class Reference:
    """What sets are compared with.

    Attributes:
      statistics: of its features.
      vectors: the features (N, A); None of published statistics, with which only Fréchet distances can be taken.
      fields: of the images in the protocol of a figure.
    """

    statistics: Gaussian
    vectors: np.ndarray | None
    fields: Fields


def names_of(net: Any, rebuilt: bool = False) -> dict[str, str]:
    """Names of Fréchet distance and inception score: FID, rFID and IS of the published Inception alone."""
    is_published = net.name == INCEPTION and net.weights != UNVERIFIED
    names = ("rFID" if rebuilt else "FID", "IS") if is_published else ("frechet_distance", "classifier_score")
    return dict(zip(("frechet", "score"), names, strict=True))


def measure(
    features: FeatureSet,
    reference: Reference,
    net: Any,
    estimators: Estimators,
    *,
    rebuilt: bool = False,
    paired: bool = False,
) -> dict[str, tuple[Any, Fields]]:
    """Figures of one set.

    Args:
      features: of the set.
      reference: to compare with.
      net: that the features are of.
      estimators: their settings.
      rebuilt: the set are reconstructions of the reference, whose figures are lists by depth.
      paired: the n-th of either set show one image, which then never stands on both sides of a kernel distance.

    Returns:
      Name -> value, a number or {"mean", "std"}, and the fields of its estimator.
    """
    names = names_of(net, rebuilt)

    def by_depth(values: Iterable[Any]) -> Any:
        values = list(values)
        if not rebuilt:
            return values[0]
        is_spread = isinstance(values[0], dict)
        return {name: [value[name] for value in values] for name in values[0]} if is_spread else values

    frechet = by_depth(statistics.frechet_distance(one, reference.statistics) for one in features.moments)
    found = {names["frechet"]: (frechet, {"estimator": "Fréchet distance of Gaussians, covariance over N - 1"})}
    if reference.vectors is not None:
        settings = estimators.subset_size, estimators.num_subsets, SEED
        kernels = (metrics.kernel_distances(x, reference.vectors, *settings, paired=paired) for x in features.vectors)
        found["kernel_distance"] = by_depth(_spread(values.mean(), values.std()) for values in kernels), {
            "estimator": "unbiased, kernel (x.y / A + 1)^3", "subset_size": estimators.subset_size,
            "num_subsets": estimators.num_subsets, "seed": SEED, "paired": paired,
        }  # fmt: skip
    if features.scores:
        found[names["score"]] = by_depth(_spread(*sums.score()) for sums in features.scores), {
            "estimator": "inception score, mean of splits", "num_splits": len(features.scores[0].counts),
            "seed": estimators.split_seed,
        }  # fmt: skip
    if estimators.use_manifold and reference.vectors is not None:
        found |= _manifold(features.vectors[0], reference.vectors)
    return found


def _manifold(samples: np.ndarray, reference: np.ndarray) -> dict[str, tuple[Any, Fields]]:
    pairs = (
        (("precision", "recall"), manifold.precision_recall, NEIGHBOURS),
        (("density", "coverage"), manifold.density_coverage, DENSITY_NEIGHBOURS),
    )
    found = {}
    for names, function, k in pairs:
        for name, value in zip(names, function(reference, samples, k), strict=True):
            found[name] = value, {"estimator": function.__name__.replace("_", " and "), "neighbours": k}
    return found


def by_class(
    samples_NA: np.ndarray,
    classes_N: np.ndarray,
    reference_MA: np.ndarray,
    classes_M: np.ndarray,
    class_names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Kernel distance of each class of which there are two images or more on both sides.

    Args:
      samples_NA, reference_MA: features.
      classes_N, classes_M: numbers of their classes.
      class_names: by number.

    Returns:
      Name of a class -> numbers of its images, and its distance over subsets of the smaller side.
    """
    found = {}
    for number in np.intersect1d(classes_N, classes_M).tolist():
        ours, theirs = samples_NA[classes_N == number], reference_MA[classes_M == number]
        if (size := min(len(ours), len(theirs))) >= 2:
            num_subsets = 1 if len(ours) == len(theirs) else CLASS_SUBSETS  # of equal sides there is only one
            distance = metrics.kernel_distances(ours, theirs, size, num_subsets, SEED).mean()
            sizes = {"images": len(ours), "reference_images": len(theirs)}
            found[class_names[number]] = {**sizes, "kernel_distance": float(distance)}
    return found


def _spread(mean: float, std: float) -> dict[str, float]:
    return {"mean": float(mean), "std": float(std)}


def choose_subset_size(requested: int | None, sizes: Mapping[str, int], num_paired: int | None = None) -> int:
    """How many images of each set stand behind one kernel distance.

    Args:
      requested: None for half of the smallest set, at most `MAX_SUBSET`.
      sizes: numbers of images of all sets, by name.
      num_paired: images that are on both sides, if any are.

    Raises:
      ValueError: more than the smallest set has, or than half of the images that are on both sides.
    """
    smallest = min(sizes.values(), default=MAX_SUBSET)
    largest = smallest if num_paired is None else min(smallest, num_paired // 2)
    subset_size = max(2, min(smallest // 2, MAX_SUBSET)) if requested is None else requested
    if not 2 <= subset_size <= largest:
        limit = "the size of the smallest set" if largest == smallest else "half of the images that are on both sides"
        raise ValueError(f"--subset_size: {subset_size} is outside 2..{largest}, {limit}")
    return subset_size


def check_sizes(sizes: Mapping[str, int], net: Any, use_manifold: bool = False) -> list[str]:
    """What to tell of sets with few images.

    Args:
      sizes: numbers of images of all sets, by name.
      net: feature network.
      use_manifold: precision, recall, density and coverage are asked for.

    Returns:
      A line for each set with fewer images than a covariance of full rank needs.

    Raises:
      ValueError: a set too small for a covariance, or for the neighbours.
    """
    for name, size in sizes.items():
        checks.at_least(f"images of {name}", size, 2, fix="a covariance needs two")
        if use_manifold:
            least = DENSITY_NEIGHBOURS + 1
            fix = f"precision and coverage look at {least - 1} neighbours: leave them out with --no_manifold"
            checks.at_least(f"images of {name}", size, least, fix=fix)
    told = {name: statistics.shortage(size, net.num_features) for name, size in sizes.items()}
    return [f"{name}: {line}" for name, line in told.items() if line]

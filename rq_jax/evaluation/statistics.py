"""Statistics of image sets: moments of features, Fréchet distance, inception score, CLIP score.

In float64 on the host. What is summed here can be merged: the figures do not depend on how a set was split into
batches, devices or processes. N images, A features of each, L classes.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from rq_jax.files import atomic_path
from rq_jax.interop import state_file
from rq_jax.settings import checks

ROWS = 4096  # features that are turned into float64 at once
_ASYMMETRY = 1e-3  # of a covariance, relative to its largest entry; published ones were averaged in float32


class Gaussian(Protocol):
    """What a Fréchet distance needs of a set."""

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def covariance(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of features.

    Attributes:
      count: N.
      mean: (A,), float64.
      scatter: (A, A), float64, the sum over images of the outer products of their deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """The moments of features (N, A) of any real type, N at least 0; of a memory map a part at a time is read."""
        checks.shape("features", features.shape, ("N", "A"))
        A = features.shape[1]
        total = cls(0, np.zeros(A), np.zeros((A, A)))
        for start in range(0, len(features), ROWS):
            rows_NA = np.asarray(features[start : start + ROWS], np.float64)
            mean = rows_NA.mean(0)
            rows_NA = rows_NA - mean
            total = total.merge(cls(len(rows_NA), mean, rows_NA.T @ rows_NA))
        return total

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan, Golub and LeVeque 1979, equations 1.5).

        Raises:
          ValueError: features of different lengths.
        """
        checks.shape("features", other.mean.shape, self.mean.shape)
        if not self.count or not other.count:
            return self if self.count else other
        count, difference = self.count + other.count, other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """(A, A), the unbiased estimate.

        Raises:
          ValueError: fewer than two images.
        """
        checks.at_least("images", self.count, 2, fix="a covariance needs two")
        return self.scatter / (self.count - 1)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean (A,) and covariance (A, A) of a set, float64; `count` is N, None where a file does not say."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


class Reference(NamedTuple):
    """What a file of reference statistics holds; None for what it does not.

    Attributes:
      statistics: of the pooled features.
      spatial: of ADM's spatial features, for sFID.
      images: ADM's `arr_0`, (N, H, W, 3) uint8, which `numpy.asarray` reads.
    """

    statistics: Statistics | None
    spatial: Statistics | None
    images: Any


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982; Heusel et al., NIPS 2017: FID).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). The last trace is the sum of the singular values of F1' F2 for
    any factors F F' = S, which needs no square root of a product that is nearly singular, and no fewer images than
    features. With few images the distance is biased upwards: see `shortage`.

    Args:
      a, b: `Moments` or `Statistics` of features of one length.

    Returns:
      At least 0.

    Raises:
      ValueError: features of different lengths, or numbers that are not finite.
    """
    for name, each in (("a", a), ("b", b)):
        checks.shape(f"{name}: mean", each.mean.shape, a.mean.shape)
        checks.finite(f"{name}: mean", each.mean)
        checks.finite(f"{name}: covariance", each.covariance)
    covariances = a.covariance, b.covariance
    factors = [_factor(covariance) for covariance in covariances]
    shared = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    traces = sum(np.trace(covariance) for covariance in covariances)
    return max(0.0, float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * shared))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F (A, R) with F F' = S of rank R, by Cholesky with pivots: a tenth of the time of eigenvectors."""
    from scipy.linalg import lapack

    lower, pivots, rank, _ = lapack.dpstrf((covariance + covariance.T) / 2, lower=1)
    factor = np.empty((len(lower), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def shortage(count: int | None, num_features: int) -> str | None:
    """What to tell of a set with too few images for a covariance of full rank; None of one with enough."""
    if count is None or count > num_features:
        return None
    return (
        f"{count} images are fewer than the {num_features + 1} that {num_features} features need for a covariance of "
        "full rank: the Fréchet distance is too high, and to be compared at this number only"
    )


def read_statistics(path: str | os.PathLike[str], num_features: int) -> Reference:
    """Reads statistics of `write_statistics`, of pytorch-fid and its users, or of ADM's evaluator.

    Args:
      path: an .npz with `mu` (A,) and `sigma` (A, A), `mu_s` and `sigma_s` of spatial features, or images `arr_0`.
      num_features: A, of the extractor that they are compared with.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, of objects, neither statistics nor images, or of another network.
    """
    arrays = state_file.read_state(path)
    arrays = arrays if isinstance(arrays, Mapping) else {}
    statistics, spatial = (_statistics(path, arrays, *names) for names in (("mu", "sigma"), ("mu_s", "sigma_s")))
    if statistics is not None and len(statistics.mean) != num_features:
        raise ValueError(
            f"'{path}': statistics of {len(statistics.mean)} features, the extractor has {num_features}; give those of "
            "the same extractor"
        )
    images = arrays.get("arr_0")
    if images is not None:
        checks.shape(f"'{path}': arr_0", images.shape, ("N", "H", "W", 3))
        if images.dtype != np.uint8:
            raise ValueError(f"'{path}': arr_0 of {images.dtype} are no images; give uint8 in 0..255")
    if statistics is None and images is None:
        raise ValueError(f"'{path}': holds neither statistics mu and sigma nor images arr_0; give an .npz with them")
    return Reference(statistics, spatial, images)


def _statistics(path: Any, arrays: Mapping[str, Any], mean_name: str, covariance_name: str) -> Statistics | None:
    names = mean_name, covariance_name
    if not any(name in arrays for name in names):
        return None
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"'{path}': {missing[0]} is missing; mean and covariance belong together")
    mean, covariance = (np.asarray(arrays[name]) for name in names)
    checks.shape(f"'{path}': {mean_name}", mean.shape, ("A",))
    checks.shape(f"'{path}': {covariance_name}", covariance.shape, (len(mean), len(mean)))
    for name, array in zip(names, (mean, covariance), strict=True):
        checks.floating(f"'{path}': {name}", array.dtype)
        checks.finite(f"'{path}': {name}", array)
    if np.abs(covariance - covariance.T).max() > _ASYMMETRY * np.abs(covariance).max():
        raise ValueError(f"'{path}': {covariance_name} is not symmetric, and no covariance; copy it again")
    count = int(np.asarray(arrays["count"])) if "count" in arrays and not arrays["count"].shape else None
    return Statistics(mean.astype(np.float64), covariance.astype(np.float64), count)


def write_statistics(path: str | os.PathLike[str], moments: Moments) -> None:
    """Writes mean, covariance and count as `mu`, `sigma` and `count`, which pytorch-fid and its users read too.

    Raises:
      OSError: as `files.write_atomic`.
      ValueError: fewer than two images.
    """
    covariance = moments.covariance
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez(file, mu=moments.mean, sigma=covariance, count=np.int64(moments.count))


class ClassSums(NamedTuple):
    """Sums over the images of each of S splits, behind an inception score.

    Attributes:
      counts: (S,), images.
      probabilities: (S, L), sums of the probabilities of the classes.
      negentropies: (S,), sums of p log p over classes and images.
    """

    counts: np.ndarray
    probabilities: np.ndarray
    negentropies: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, splits: np.ndarray, num_splits: int) -> "ClassSums":
        """Sums over a batch.

        Args:
          logits: (N, L), of any real type; logarithms of probabilities are such.
          splits: (N,), the split of each image, as `split_of` draws it.
          num_splits: S.
        """
        checks.shape("logits", logits.shape, (len(splits), "L"))
        logits_NL = np.asarray(logits, np.float64)
        logits_NL = logits_NL - logits_NL.max(-1, keepdims=True)
        log_NL = logits_NL - np.log(np.exp(logits_NL).sum(-1, keepdims=True))
        shares_NL = np.exp(log_NL)
        negentropy_N = np.sum(shares_NL * np.where(shares_NL > 0, log_NL, 0.0), -1)
        counts_S = np.bincount(splits, minlength=num_splits)
        sums_SL = np.zeros((num_splits, logits.shape[1]))
        np.add.at(sums_SL, splits, shares_NL)
        return cls(counts_S, sums_SL, np.bincount(splits, negentropy_N, num_splits))

    def merge(self, other: "ClassSums") -> "ClassSums":
        """The sums over both sets."""
        return ClassSums(*(x + y for x, y in zip(self, other, strict=True)))

    def score(self) -> tuple[float, float]:
        """Inception score, the exponential of the mutual information of image and class (Salimans et al., NIPS 2016).

        Returns:
          Mean over the splits, at least 1, and its unbiased standard deviation; 0 of one split.

        Raises:
          ValueError: a split without an image.
        """
        checks.at_least("images of a split", self.counts, 1, fix="give more images, or fewer splits")
        shares_SL = self.probabilities / self.counts[:, None]
        marginal_S = np.sum(shares_SL * np.log(np.where(shares_SL > 0, shares_SL, 1.0)), -1)
        scores_S = np.exp(self.negentropies / self.counts - marginal_S)
        return float(scores_S.mean()), float(scores_S.std(ddof=1)) if len(scores_S) > 1 else 0.0


def split_of(num_images: int, num_splits: int, seed: int | None = 0) -> np.ndarray:
    """The split (N,) in 0..S-1 of each image by its position.

    Shuffled, as in `rqvae/metrics/IS.py` of the published code: images that are sorted by class would otherwise leave
    each split with few classes. With seed None the splits are consecutive images.

    Raises:
      ValueError: no split, or more splits than images.
    """
    checks.in_range("num_splits", num_splits, 1, num_images, "the images")
    ends = np.arange(1, num_splits + 1) * num_images // num_splits
    splits_N = np.searchsorted(ends, np.arange(num_images), side="right")
    return splits_N if seed is None else np.random.default_rng(seed).permutation(splits_N)


def inception_score(logits: np.ndarray, num_splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """Inception score of all logits (N, L) at once: mean and deviation as in `ClassSums.score`, over `split_of`."""
    return ClassSums.of(logits, split_of(len(logits), num_splits, seed), num_splits).score()


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> float:
    """Mean cosine of pairs of features (N, A), without a factor: in [-1, 1] (Hessel et al., EMNLP 2021, clip-s / 2.5).

    Raises:
      ValueError: other numbers or lengths of features, or none.
    """
    checks.shape("text_features", text_features.shape, image_features.shape)
    checks.at_least("pairs", len(image_features), 1)
    return float(np.mean(np.sum(unit(image_features) * unit(text_features), -1)))


def unit(features: np.ndarray) -> np.ndarray:
    """Features (N, A) of length 1, float64, whose products are cosines."""
    features_NA = np.asarray(features, np.float64)
    return features_NA / np.linalg.norm(features_NA, axis=-1, keepdims=True)

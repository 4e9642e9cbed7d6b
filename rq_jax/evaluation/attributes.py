"""Whether images show what their captions name: linear classifiers of attributes on features of images, and shares.

Each attribute of each class of images has a classifier of its own, fitted to training images of that class, and one
more tells the classes apart. An image is judged by the classifiers of the class that its caption asks for, so that an
image of another class is wrong in its attributes too. A claim is one thing that a caption asks of an image: the class,
or the value of an attribute that it names. In float64 on the host. N images, A features of each, J claims, V values of
all classifiers side by side.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from rq_jax.evaluation.descriptions import Combination, Description
from rq_jax.report.progress import Progress
from rq_jax.settings import checks

PENALTY = 1e-5  # of the powers of ten, near the best for held-out images of two styles of avatars
ESTIMATOR = (
    f"multinomial logistic regression, penalty {PENALTY:g} |w|^2 / 2, features of unit variance over their number"
)
CAPTIONS = 10  # of which one is an image's own
SEED = 0  # of the others
_LEAST_DEVIATION = 1e-6  # of a feature, in the mean of all
_MAX_STEPS = 500


@dataclasses.dataclass(frozen=True)
class Classifiers:
    """Linear classifiers on features.

    Attributes:
      center, scale: (A,), taken off features, and multiplied with the rest.
      kernel, bias: (A, V) and (V,), of all classifiers side by side.
      columns: (class, attribute, value) -> its column; ("", label, class) of the classifier of classes.
      starts: (H,), the first column of each of H classifiers.
      commonest: (H,), share of the commonest value among the images that a classifier was fitted to.
    """

    center: np.ndarray
    scale: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray
    columns: dict[tuple[str, str, str], int]
    starts: np.ndarray
    commonest: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """The classifier (V,) of each column."""
        return np.searchsorted(self.starts, np.arange(len(self.bias)), side="right") - 1

    def log_probabilities(self, features_NA: np.ndarray) -> np.ndarray:
        """(N, V + 1), of every value under its classifier; the last column is -inf, for values that none knows."""
        logits = (np.asarray(features_NA, np.float64) - self.center) * self.scale @ self.kernel + self.bias
        logits = logits - np.maximum.reduceat(logits, self.starts, axis=1)[:, self.owners]
        logits = logits - np.log(np.add.reduceat(np.exp(logits), self.starts, axis=1))[:, self.owners]
        return np.pad(logits, ((0, 0), (0, 1)), constant_values=-np.inf)


def fit(features_NA: np.ndarray, described: Sequence[Description], label: str) -> Classifiers:
    """Fits a classifier of classes, and one for each attribute of each class.

    Args:
      features_NA: of training images.
      described: these images.
      label: what the class is called among the attributes.
    """
    features_NA = np.asarray(features_NA, np.float64)
    center, deviation = features_NA.mean(0), features_NA.std(0)
    scale = 1 / np.maximum(deviation, _LEAST_DEVIATION * deviation.mean() + 1e-12) / np.sqrt(len(center))
    features_NA = (features_NA - center) * scale
    targets: dict[tuple[str, str], dict[int, str]] = {("", label): {i: one.label for i, one in enumerate(described)}}
    for i, one in enumerate(described):
        for name, value in one.attributes.items():
            targets.setdefault((one.label, name), {})[i] = value
    layers, columns, starts, commonest = [], {}, [], []
    with Progress(len(targets), unit="attribute", title="fitting classifiers") as progress:
        for classifier in sorted(targets):
            rows, texts = zip(*targets[classifier].items(), strict=True)
            values, numbers = np.unique(texts, return_inverse=True)
            starts.append(len(columns))
            columns |= {(*classifier, value): len(columns) + i for i, value in enumerate(values.tolist())}
            commonest.append(np.bincount(numbers).max() / len(rows))
            layers.append(_fit_one(features_NA[list(rows)], numbers, len(values)))
            progress.update(1)
    kernel, bias = np.split(np.concatenate(layers, axis=1), [-1])
    return Classifiers(center, scale, kernel, bias[0], columns, np.array(starts), np.array(commonest))


def _fit_one(features_NA: np.ndarray, numbers_N: np.ndarray, num_values: int) -> np.ndarray:
    """Kernel and, as its last row, bias (A + 1, values) of one classifier."""
    from scipy.optimize import minimize

    N, A = features_NA.shape
    is_value_NV = numbers_N[:, None] == np.arange(num_values)

    def loss(params: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = np.split(params.reshape(A + 1, num_values), [A])
        logits = features_NA @ kernel + bias
        logits = logits - logits.max(1, keepdims=True)
        logits = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = (np.exp(logits) - is_value_NV) / N
        grads = features_NA.T @ error + PENALTY * kernel, error.sum(0, keepdims=True)
        return -logits[is_value_NV].mean() + PENALTY / 2 * np.sum(kernel**2), np.concatenate(grads).ravel()

    start = np.zeros((A + 1) * num_values)
    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _MAX_STEPS}).x.reshape(A + 1, -1)


@dataclasses.dataclass(frozen=True)
class Claims:
    """What the captions of N images ask for, one claim after the other, those of an image together.

    Attributes:
      rows: (J,), the image.
      labels, names: (J,), the class that its caption asks for, and the attribute.
      columns: (J,), the value, as a column of the classifiers; V of one that no fitted image shows.
      owners: (J,), its classifier; 0 where there is none.
      pairs: (P, 2), claims of an image whose values no training image shows together.
    """

    rows: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    columns: np.ndarray
    owners: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(
        cls, asked: Sequence[Description], classifiers: Classifiers, label: str, seen: Collection[Combination]
    ) -> "Claims":
        """The claims of captions.

        Args:
          asked: of N images.
          classifiers: that judge the claims.
          label: what the class is called among the attributes.
          seen: see `descriptions.seen_combinations`.
        """
        claims, pairs = [], []
        for row, one in enumerate(asked):
            places = {name: len(claims) + 1 + i for i, name in enumerate(one.named)}
            claims.append((row, one.label, label, ("", label, one.label)))
            claims += [(row, one.label, name, (one.label, name, one.attributes[name])) for name in one.named]
            unseen = [pair for pair in one.combinations(one.named) if pair not in seen]
            pairs += [(places[first], places[second]) for _, first, _, second, _ in unseen]
        rows, labels, names, values = zip(*claims, strict=True)
        V = len(classifiers.bias)
        columns = np.array([classifiers.columns.get(value, V) for value in values])
        owners = np.append(classifiers.owners, 0)[columns]
        paired = np.array(pairs, np.int64).reshape(-1, 2)
        return cls(np.array(rows), np.array(labels), np.array(names), columns, owners, paired)

    def seen_in(self, log_probabilities_NV: np.ndarray, classifiers: Classifiers) -> np.ndarray:
        """(J,) bool: whether the classifier of a claim finds the value that is asked for the likeliest."""
        best = np.maximum.reduceat(log_probabilities_NV[:, :-1], classifiers.starts, axis=1)
        return log_probabilities_NV[self.rows, self.columns] == best[self.rows, self.owners]

    def chances(self, classifiers: Classifiers) -> np.ndarray:
        """(J,): how often the commonest value of the training images would be the one that is asked for."""
        return np.where(self.columns < len(classifiers.bias), classifiers.commonest[self.owners], 0.0)

    def scores(self, log_probabilities_NV: np.ndarray, candidates_NC: np.ndarray) -> np.ndarray:
        """(N, C): log-probability of the captions of other images, mean over their claims."""
        starts = np.searchsorted(self.rows, np.arange(len(candidates_NC)))
        counts = np.diff(np.append(starts, len(self.rows)))
        by_image = zip(log_probabilities_NV, candidates_NC, strict=True)
        return np.stack([np.add.reduceat(p_V[self.columns], starts)[c] / counts[c] for p_V, c in by_image])

    def missed(self, seen_J: np.ndarray, row: int) -> list[str]:
        """The attributes of an image that are asked for and not seen."""
        return self.names[(self.rows == row) & ~seen_J].tolist()

    def asked(self) -> dict[str, int]:
        """How many captions name each attribute."""
        return dict(sorted(Counter(self.names.tolist()).items()))

    def shares(self, seen_J: np.ndarray) -> dict[str, Any]:
        """Shares of what is asked for that is seen.

        Args:
          seen_J: whether each claim is, or how likely.

        Returns:
          "accuracy" over all claims; "combinations", of values that no training image shows together, those of which
          both are seen, where there are any; "by_attribute" and, within each class, "by_class".
        """
        found: dict[str, Any] = {"accuracy": float(np.mean(seen_J))}
        if len(self.pairs):
            found["combinations"] = float(np.mean(np.prod(seen_J[self.pairs], axis=1)))
        found["by_attribute"] = self._by_name(seen_J, np.ones(len(seen_J), bool))
        labels = np.unique(self.labels).tolist()
        found["by_class"] = {label: self._by_name(seen_J, self.labels == label) for label in labels}
        return found

    def _by_name(self, seen_J: np.ndarray, counts_J: np.ndarray) -> dict[str, float]:
        names = np.unique(self.names[counts_J]).tolist()
        return {name: float(np.mean(seen_J[counts_J & (self.names == name)])) for name in names}


def check_count(setting: str, num_images: int) -> None:
    """Raises ValueError for fewer images than captions to choose among."""
    checks.at_least(setting, num_images, CAPTIONS, fix="a caption is found among so many")


def draw_candidates(num_images: int) -> np.ndarray:
    """The captions (N, `CAPTIONS`), by image, that the right one is found among: first an image's own, then others."""
    check_count("images that can be read", num_images)
    rng, N = np.random.default_rng(SEED), num_images
    others = np.stack([rng.choice(N - 1, CAPTIONS - 1, replace=False) for _ in range(N)])
    own = np.arange(N)[:, None]
    return np.concatenate([own, others + (others >= own)], axis=1)


def retrieved(scores_NC: np.ndarray) -> float:
    """Share of images whose own caption, the first, has the highest score; equal ones say the same."""
    own, others = scores_NC[:, 0], scores_NC[:, 1:]
    return float(np.mean((own >= others.max(1)) & np.isfinite(own)))

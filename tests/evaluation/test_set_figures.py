"""Figures of sets of images: names, pairs, depths, sizes. The estimators themselves are in test_statistics.py and beside it."""

from typing import NamedTuple

import numpy as np
import pytest

from rq_jax import metrics
from rq_jax.evaluation import manifold, set_figures, statistics
from rq_jax.evaluation.set_figures import Estimators, Reference
from rq_jax.evaluation.statistics import ClassSums, Moments
from rq_jax.evaluation.store import FeatureSet

RNG = np.random.default_rng(0)
X_NA, Y_NA = RNG.normal(size=(40, 6)), RNG.normal(0.5, 1.5, size=(40, 6))


class Net(NamedTuple):
    name: str = "means"
    weights: str = "x.pth"
    num_features: int = 6


def set_of(*vectors, splits=None):
    """Features by depth, of which the first four are logits."""
    scores = []
    if splits is not None:
        scores = [ClassSums.of(one[:, :4], splits, splits.max() + 1) for one in vectors]
    moments = tuple(map(Moments.of, vectors))
    return FeatureSet(moments, tuple(scores), np.stack(vectors), np.arange(len(vectors[0])))


def reference_of(vectors, **fields):
    return Reference(Moments.of(vectors), vectors, fields)


def test_each_figure_is_that_of_its_estimator():
    estimators = Estimators(10, 3, 9, use_manifold=True)
    splits = statistics.split_of(40, estimators.num_splits(40), estimators.split_seed)
    found = set_figures.measure(set_of(X_NA, splits=splits), reference_of(Y_NA), Net(), estimators)
    values = {name: value for name, (value, _) in found.items()}
    kernel = metrics.kernel_distances(X_NA, Y_NA, 10, 3)
    score = statistics.inception_score(X_NA[:, :4], 4, None)
    precision, recall = manifold.precision_recall(Y_NA, X_NA, 3)
    density, coverage = manifold.density_coverage(Y_NA, X_NA, 5)
    assert values == {
        "frechet_distance": statistics.frechet_distance(Moments.of(X_NA), Moments.of(Y_NA)),
        "kernel_distance": {"mean": pytest.approx(kernel.mean()), "std": pytest.approx(kernel.std())},
        "classifier_score": {"mean": score[0], "std": score[1]},
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
    }  # fmt: skip
    fields = {name: fields for name, (_, fields) in found.items()}
    assert (fields["classifier_score"]["num_splits"], fields["classifier_score"]["seed"]) == (4, None)
    assert fields["kernel_distance"]["subset_size"] == 10
    assert (fields["precision"]["neighbours"], fields["coverage"]["neighbours"]) == (3, 5)


def test_reconstructions_have_figures_by_depth_and_are_paired():
    both, reference = set_of(X_NA, Y_NA, splits=statistics.split_of(40, 10)), reference_of(Y_NA)
    found = set_figures.measure(both, reference, Net(), Estimators(10, 50), rebuilt=True, paired=True)
    values = {name: value for name, (value, _) in found.items()}
    assert set(values) == {"frechet_distance", "kernel_distance", "classifier_score"}
    assert abs(values["frechet_distance"][1]) < 1e-9 < values["frechet_distance"][0]
    # The same image never stands on both sides: without an error they are as far apart as two halves of the set.
    alone = set_figures.measure(set_of(Y_NA), reference, Net(), Estimators(10, 50))["kernel_distance"][0]
    assert alone["mean"] < values["kernel_distance"]["mean"][1] and len(values["classifier_score"]["std"]) == 2
    assert found["kernel_distance"][1]["paired"]


def test_published_statistics_leave_the_frechet_distance():
    moments = Moments.of(Y_NA)
    published = Reference(statistics.Statistics(moments.mean, moments.covariance), None, {})
    found = set_figures.measure(set_of(X_NA), published, Net(), Estimators(10, 3, use_manifold=True))
    assert set(found) == {"frechet_distance"}
    assert found["frechet_distance"][0] == pytest.approx(statistics.frechet_distance(Moments.of(X_NA), moments))


def test_the_names_of_the_literature_are_for_the_published_network():
    inception = Net("inception_2015")
    assert list(set_figures.names_of(inception).values()) == ["FID", "IS"]
    assert list(set_figures.names_of(inception, rebuilt=True).values()) == ["rFID", "IS"]
    for net in (Net(), Net("inception_2015", "unverified")):
        assert list(set_figures.names_of(net).values()) == ["frechet_distance", "classifier_score"]


def test_small_sets_are_told_and_smaller_ones_refused():
    assert set_figures.check_sizes({"a": 7, "b": 6}, Net()) == [f"b: {statistics.shortage(6, 6)}"]
    with pytest.raises(ValueError, match="^images of b: 1 must be at least 2; a covariance needs two$"):
        set_figures.check_sizes({"a": 7, "b": 1}, Net())
    message = "^images of b: 5 must be at least 6; precision and coverage look at 5 neighbours: leave them out with "
    with pytest.raises(ValueError, match=message):
        set_figures.check_sizes({"a": 7, "b": 5}, Net(), use_manifold=True)


@pytest.mark.parametrize(
    ("requested", "num_paired", "expected"),
    [
        (None, None, 5),
        (10, None, 10),
        (None, 20, 5),
        (1, None, r"^--subset_size: 1 is outside 2..10, the size of the smallest set$"),
        (11, None, r"^--subset_size: 11 is outside 2..10, the size of the smallest set$"),
        (9, 16, r"^--subset_size: 9 is outside 2..8, half of the images that are on both sides$"),
    ],
)
def test_subset_sizes(requested, num_paired, expected):
    sizes = {"a": 10, "b": 5000}
    if isinstance(expected, int):
        assert set_figures.choose_subset_size(requested, sizes, num_paired) == expected
        assert set_figures.choose_subset_size(None, {"b": 5000}) == set_figures.MAX_SUBSET
    else:
        with pytest.raises(ValueError, match=expected):
            set_figures.choose_subset_size(requested, sizes, num_paired)

"""Neighbours block by block, and precision, recall, density and coverage, against the full matrix."""

import numpy as np
import pytest

from rq_jax.evaluation import manifold

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(61, 4)), 1.3 * RNG.normal(size=(53, 4)) + 0.2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(manifold, "ROWS", 7)
    monkeypatch.setattr(manifold, "COLUMNS", 10)


def distances(x, y):
    return ((x[:, None] - y) ** 2).sum(-1)


def radii(x, k):
    return np.sort(distances(x, x), 1)[:, k]


@pytest.mark.parametrize("k", [1, 9, 12, 61])
def test_neighbours_in_blocks_are_those_of_the_full_matrix(k):
    found, positions = manifold.nearest(FAKE, REAL, k)
    order = np.argsort(distances(FAKE, REAL), 1, kind="stable")[:, :k]
    np.testing.assert_array_equal(positions, order)
    np.testing.assert_allclose(found, np.take_along_axis(distances(FAKE, REAL), order, 1), atol=1e-12)


def test_of_equally_near_images_the_first_is_named():
    many = np.zeros((35, 2))
    many[[3, 20]] = 1
    _, positions = manifold.nearest(np.array([[0.0, 0.0], [1.0, 1.0]]), many, 4)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 4], [3, 20, 0, 1]])


def test_memory_maps_in_half_precision_are_read(tmp_path):
    np.save(tmp_path / "x.npy", REAL.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found, _ = manifold.nearest(FAKE, mapped, 3)
    np.testing.assert_allclose(found, np.sort(distances(FAKE, np.float64(mapped)), 1)[:, :3], atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_precision_and_recall_are_those_of_the_full_matrix(k):
    d = distances(REAL, FAKE)
    precision = np.mean([(d[:, j] <= radii(REAL, k)).any() for j in range(53)])
    recall = np.mean([(d[i] <= radii(FAKE, k)).any() for i in range(61)])
    assert manifold.precision_recall(REAL, FAKE, k) == (precision, recall)
    assert 0 < precision < 1 or k == 20


@pytest.mark.parametrize("k", [1, 5, 20])
def test_density_and_coverage_are_those_of_the_full_matrix(k):
    d = distances(REAL, FAKE)
    inside = d < radii(REAL, k)[:, None]
    expected = inside.sum() / (k * 53), (d.min(1) < radii(REAL, k)).mean()
    assert manifold.density_coverage(REAL, FAKE, k) == pytest.approx(expected, abs=1e-12)


def test_sets_that_are_equal_or_far_apart_have_their_bounds():
    assert manifold.precision_recall(REAL, REAL) == (1, 1)
    assert manifold.precision_recall(REAL, FAKE + 100) == (0, 0)
    assert manifold.density_coverage(REAL, REAL)[1] == 1
    assert manifold.density_coverage(REAL, FAKE + 100) == (0, 0)


def test_an_outlier_raises_recall_and_not_coverage():
    """What density and coverage were made for: one far sample has a neighbourhood that holds every real image."""
    outlier = np.concatenate([np.full((3, 4), 50.0) + RNG.normal(size=(3, 4)), REAL[:1] - 40])
    assert manifold.precision_recall(REAL, outlier, 3)[1] == 1
    assert manifold.density_coverage(REAL, outlier, 3)[1] == 0


@pytest.mark.parametrize("k", [0, 53])
def test_more_neighbours_than_images_are_refused(k):
    for measure in (manifold.precision_recall, manifold.density_coverage):
        with pytest.raises(ValueError, match=f"k: {k} is outside 1..52, the other images of a set"):
            measure(FAKE, REAL, k)
    with pytest.raises(ValueError, match="k: 53 is outside 1..52, the other images of a set"):
        manifold.precision_recall(REAL, FAKE, 53)


def test_features_that_do_not_fit_are_refused():
    for measure in (manifold.precision_recall, manifold.density_coverage):
        with pytest.raises(ValueError, match=r"samples: shape \(53, 3\) does not fit; allowed is \(M, 4\)"):
            measure(REAL, FAKE[:, :3])
    with pytest.raises(ValueError, match=r"features: shape \(61, 4\) does not fit; allowed is \(M, 3\)"):
        manifold.nearest(FAKE[:, :3], REAL, 1)
    with pytest.raises(ValueError, match="k: 62 is outside 1..61, the images to be near to"):
        manifold.nearest(FAKE, REAL, 62)
    with pytest.raises(ValueError, match="samples: 0 must be at least 1"):
        manifold.density_coverage(REAL, FAKE[:0])

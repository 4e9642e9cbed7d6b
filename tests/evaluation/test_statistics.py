"""Moments and their merge, distances, scores and files, against small reference implementations."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from rq_jax.evaluation import statistics
from rq_jax.evaluation.statistics import ClassSums, Moments, Statistics, frechet_distance

RNG = np.random.default_rng(0)
FEATURES = (RNG.normal(size=(50, 7)) @ RNG.normal(size=(7, 7)) + 30).astype(np.float32)


def reference_distance(x_NA, y_NA, offset=1e-6):
    """As pytorch-fid computes it: a matrix square root of the product, with its offset where that is not finite."""
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.astype(np.float64), rowvar=False)) for x in (x_NA, y_NA))
    root = scipy.linalg.sqrtm(s1 @ s2)
    if not np.isfinite(root).all():
        eye = offset * np.eye(len(s1))
        root = scipy.linalg.sqrtm((s1 + eye) @ (s2 + eye))
    return np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real)


@pytest.mark.parametrize("parts", [[50], [17, 16, 17], [7, 1, 0, 20, 2, 9, 5, 6]])
def test_moments_do_not_depend_on_the_split(parts, monkeypatch):
    monkeypatch.setattr(statistics, "ROWS", 3)
    ends = np.cumsum(parts)
    pieces = [Moments.of(FEATURES[end - size : end]) for end, size in zip(ends, parts, strict=True)]
    total = pieces[0]
    for piece in pieces[1:]:
        total = total.merge(piece)
    exact = FEATURES.astype(np.float64)
    assert total.count == 50
    np.testing.assert_allclose(total.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.covariance, np.cov(exact, rowvar=False), rtol=1e-9)


def test_moments_are_exact_far_from_the_origin():
    """Sums of squares would have lost all digits: the deviations are a hundred-millionth of the mean."""
    x = RNG.normal(size=(40, 3)) + 1e8
    merged = Moments.of(x[:11]).merge(Moments.of(x[11:]))
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-6)


def test_moments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"features: shape \(7,\) does not fit; allowed is \(6,\)"):
        Moments.of(FEATURES[:, :6]).merge(Moments.of(FEATURES))
    with pytest.raises(ValueError, match="images: 1 must be at least 2; a covariance needs two"):
        _ = Moments.of(FEATURES[:1]).covariance


def test_analytic_gaussians_have_their_closed_form():
    a, b = Statistics(np.zeros(3), np.diag([4.0, 9.0, 1.0])), Statistics(np.ones(3), np.diag([1.0, 16.0, 0.25]))
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 1 + 0.25, abs=1e-9)
    rotation = scipy.linalg.qr(RNG.normal(size=(3, 3)))[0]
    rotated = [Statistics(rotation @ each.mean, rotation @ each.covariance @ rotation.T) for each in (a, b)]
    assert frechet_distance(*rotated) == pytest.approx(5.25, abs=1e-9)
    singular = Statistics(np.zeros(3), np.diag([4.0, 0.0, 0.0]))
    assert frechet_distance(singular, b) == pytest.approx(3 + 1 + 16 + 0.25, abs=1e-9)
    assert frechet_distance(singular, Statistics(np.zeros(3), np.zeros((3, 3)))) == pytest.approx(4)


def draw(rng, num_images, num_features, condition):
    """Positive features, as after a ReLU, whose variances fall by a factor `condition`."""
    scales = np.geomspace(1, 1 / condition, num_features)
    return np.maximum(rng.normal(size=(num_images, num_features)) + 0.5, 0) * scales


@pytest.mark.parametrize(
    ("num_images", "condition"), [(300, 1), (300, 1e9), (20, 1)], ids=["full", "nearly singular", "few images"]
)
def test_the_distance_is_that_of_a_reference(num_images, condition):
    x, y = draw(np.random.default_rng(1), num_images, 64, condition), draw(np.random.default_rng(2), num_images, 64, condition) * 1.2 + 0.1  # fmt: skip
    found = frechet_distance(Moments.of(x), Moments.of(y))
    assert found == pytest.approx(reference_distance(x, y), abs=0.01) and found > 0.5
    assert frechet_distance(Moments.of(y), Moments.of(x)) == pytest.approx(found, abs=1e-9)
    assert frechet_distance(Moments.of(x), Moments.of(x)) < 1e-3


def test_two_halves_of_a_set_have_nearly_the_expected_distance():
    """Of unit Gaussians the means add 2 A / n, the covariances a quarter of their squared difference, A (A + 1) / (2 n)."""
    n, A = 4000, 24
    x = np.random.default_rng(3).normal(size=(2 * n, A))
    expected = 2 * A / n + A * (A + 1) / (2 * n)
    assert frechet_distance(Moments.of(x[:n]), Moments.of(x[n:])) == pytest.approx(expected, rel=0.15)


def test_statistics_that_are_not_finite_or_do_not_fit_are_refused():
    moments = Moments.of(FEATURES)
    with pytest.raises(ValueError, match=r"b: mean: shape \(6,\) does not fit; allowed is \(7,\)"):
        frechet_distance(moments, Moments.of(FEATURES[:, :6]))
    broken = Statistics(moments.mean, np.full((7, 7), np.nan))
    with pytest.raises(ValueError, match="b: covariance: nan must be finite"):
        frechet_distance(moments, broken)


def test_a_set_with_too_few_images_is_told():
    assert statistics.shortage(8, 7) is None and statistics.shortage(None, 7) is None
    assert statistics.shortage(7, 7).startswith("7 images are fewer than the 8 that 7 features need")


def test_statistics_survive_their_file(tmp_path):
    moments = Moments.of(FEATURES)
    statistics.write_statistics(tmp_path / "own.npz", moments)
    own = statistics.read_statistics(tmp_path / "own.npz", 7)
    np.testing.assert_array_equal(own.statistics.mean, moments.mean)
    np.testing.assert_array_equal(own.statistics.covariance, moments.covariance)
    assert own.statistics.count == 50 and own.spatial is None and own.images is None


def test_published_files_are_read(tmp_path):
    """pytorch-fid's and ADM's, whose mean is of another type than the covariance."""
    mean, covariance = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)
    images = RNG.integers(0, 256, (2, 4, 5, 3), np.uint8)
    arrays = {"mu": mean, "sigma": covariance, "mu_s": mean[:3], "sigma_s": covariance[:3, :3], "arr_0": images}
    np.savez_compressed(tmp_path / "adm.npz", **arrays)
    found = statistics.read_statistics(tmp_path / "adm.npz", 7)
    np.testing.assert_array_equal(np.asarray(found.images), images)
    np.testing.assert_array_equal(found.spatial.mean, mean[:3].astype(np.float64))
    assert found.statistics.mean.dtype == np.float64 and found.statistics.count is None
    np.savez(tmp_path / "images.npz", arr_0=images)
    assert statistics.read_statistics(tmp_path / "images.npz", 7).statistics is None


MEAN, COVARIANCE = np.zeros(7), np.eye(7)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.array([{}], object), "sigma": COVARIANCE}, "holds 'mu.npy' of type '|O'; allowed are bool"),
        ({"x": MEAN}, "holds neither statistics mu and sigma nor images arr_0; give an .npz"),
        ({"mu": MEAN}, "sigma is missing; mean and covariance belong together"),
        ({"mu": MEAN[:6], "sigma": COVARIANCE[:6, :6]}, "statistics of 6 features, the extractor has 7; give those"),
        ({"mu": MEAN, "sigma": COVARIANCE[:6]}, "sigma: shape (6, 7) does not fit; allowed is (7, 7)"),
        ({"mu": MEAN, "sigma": COVARIANCE * np.nan}, "sigma: nan must be finite"),
        ({"mu": MEAN.astype(int), "sigma": COVARIANCE}, "mu: dtype int64 is not floating-point"),
        ({"mu": MEAN, "sigma": np.triu(np.ones((7, 7)))}, "sigma is not symmetric, and no covariance"),
        ({"arr_0": MEAN}, "arr_0: shape (7,) does not fit; allowed is (N, H, W, 3)"),
        ({"arr_0": np.zeros((1, 2, 2, 3))}, "arr_0 of float64 are no images; give uint8 in 0..255"),
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError) as error:
        statistics.read_statistics(tmp_path / "bad.npz", 7)
    assert "bad.npz'" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_inflates_without_bounds_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", mu=np.zeros(7), sigma=np.zeros((4000, 4000)))
    with pytest.raises(ValueError, match=r"packs \d+ bytes into \d+; at most 100 to one is read"):
        statistics.read_statistics(tmp_path / "bomb.npz", 7)


def reference_score(p_NL, num_splits):
    """As Salimans et al. publish it, over consecutive parts."""
    scores = []
    for i in range(num_splits):
        part = p_NL[i * len(p_NL) // num_splits : (i + 1) * len(p_NL) // num_splits]
        divergences = scipy.special.rel_entr(part, part.mean(0)).sum(1)
        scores.append(np.exp(divergences.mean()))
    return np.mean(scores), np.std(scores, ddof=1)


@pytest.mark.parametrize("num_images", [40, 43])
def test_the_inception_score_is_that_of_a_reference(num_images):
    logits = 3 * np.random.default_rng(4).normal(size=(num_images, 11)).astype(np.float32)
    p = scipy.special.softmax(logits.astype(np.float64), -1)
    expected = reference_score(p, 4)
    np.testing.assert_allclose(statistics.inception_score(logits, 4, seed=None), expected, rtol=1e-9)
    np.testing.assert_allclose(statistics.inception_score(np.log(p), 4, seed=None), expected, rtol=1e-9)
    splits = statistics.split_of(num_images, 4)
    order = np.argsort(splits, kind="stable")
    np.testing.assert_allclose(statistics.inception_score(logits, 4), reference_score(p[order], 4), rtol=1e-9)
    assert not np.array_equal(order, np.arange(num_images))


def test_the_inception_score_of_parts_is_that_of_all():
    logits, splits = RNG.normal(size=(30, 5)), statistics.split_of(30, 3)
    parts = [ClassSums.of(logits[i::4], splits[i::4], 3) for i in range(4)]
    total = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    np.testing.assert_allclose(total.score(), statistics.inception_score(logits, 3), rtol=1e-12)


def test_the_inception_score_has_its_bounds():
    certain = np.where(np.eye(6) > 0, 0.0, -np.inf)
    assert statistics.inception_score(certain, 1) == (pytest.approx(6), 0.0)
    assert statistics.inception_score(np.zeros((6, 9)), 2) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    with pytest.raises(ValueError, match=r"num_splits: 7 is outside 1..6, the images"):
        statistics.inception_score(certain, 7)
    empty = ClassSums.of(certain[:1], np.array([1]), 2)
    with pytest.raises(ValueError, match=r"images of a split: \[0 1\] must be at least 1; give more images, or fewer"):
        empty.score()


def test_the_clip_score_is_the_mean_cosine():
    x, y = RNG.normal(size=(2, 9, 5))
    expected = np.mean([a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(x, y, strict=True)])
    assert statistics.clip_score(x, 3 * y) == pytest.approx(expected, abs=1e-12)
    assert statistics.clip_score(x.astype(np.float16), x) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"text_features: shape \(8, 5\) does not fit; allowed is \(9, 5\)"):
        statistics.clip_score(x, y[:8])
    with pytest.raises(ValueError, match="pairs: 0 must be at least 1"):
        statistics.clip_score(x[:0], y[:0])

"""Figures of merit against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from rq_jax import metrics


def test_psnr_of_a_constant_error():
    images = jnp.zeros((2, 3, 5, 1))
    errors = jnp.array([0.5, 0.1])[:, None, None, None]
    np.testing.assert_allclose(
        metrics.psnr(images, images + errors), 10 * np.log10(4 / np.array([0.25, 0.01])), rtol=1e-5
    )


def test_psnr_is_the_mean_over_all_pixels_and_channels():
    rng = np.random.default_rng(0)
    images, errors = rng.uniform(-0.5, 0.5, (2, 4, 3, 5, 3)), rng.uniform(-0.4, 0.4, (2, 4, 3, 5, 3))
    expected = 10 * np.log10(4 / (errors**2).reshape(2, 4, -1).mean(-1))
    np.testing.assert_allclose(metrics.psnr(jnp.asarray(images), jnp.asarray(images + errors)), expected, rtol=1e-5)


def test_psnr_clips_the_reconstruction_and_ends_at_100_decibel():
    images = jnp.ones((3, 5, 2))
    assert metrics.psnr(images, 1.7 * images).shape == ()
    np.testing.assert_allclose(metrics.psnr(images, 1.7 * images), 100.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.psnr(images, -3.0 * images), 0.0, atol=1e-6)


def test_code_counts():
    codes = jnp.array([[[0, 3], [0, 1]], [[2, 3], [0, 3]]])
    assert metrics.code_counts(codes, 4).tolist() == [[3, 0, 1, 0], [0, 1, 0, 3]]


def test_code_perplexity():
    counts = jnp.array([[5.0, 5, 5, 5], [8, 0, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(metrics.code_perplexity(counts), [4, 1, 2, 1], rtol=1e-6)
    uneven = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(
        metrics.code_perplexity(jnp.asarray(10 * uneven)), np.exp(-(uneven * np.log(uneven)).sum()), rtol=1e-5
    )


def test_overall_code_usage():
    counts_DK = np.array([[4, 0, 0, 0], [0, 2, 0, 0], [0, 9, 0, 0]])
    assert metrics.overall_code_usage(counts_DK, (4, 4, 4), shared=True) == 2 / 4
    assert metrics.overall_code_usage(counts_DK, (4, 4, 4), shared=False) == 3 / 12
    assert metrics.overall_code_usage(counts_DK, (1, 2, 3), shared=False) == 3 / 6  # the rest of a row is no code


def test_unigram_cross_entropy():
    counts = np.array([[3, 1, 0, 0], [0, 0, 0, 0]])
    held_out = np.array([[1, 1, 0, 1], [1, 0, 1, 1]])  # the symbols 0, 1, 3 and 2, 3, 0
    expected = [-np.mean(np.log(np.array([4, 2, 1]) / 8)), np.log(4)]
    np.testing.assert_allclose(metrics.unigram_cross_entropy(counts, held_out), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.unigram_cross_entropy(counts[0], 5 * held_out[0]), expected[0], rtol=1e-12)


def test_padded_codes_of_unequal_codebooks_do_not_count():
    counts, held_out, sizes = np.array([[3.0, 1, 0, 0], [1, 4, 0, 0]]), np.array([[1, 0, 1, 1], [1, 2, 0, 0]]), (4, 2)
    alone = [metrics.unigram_cross_entropy(counts[d, :K], held_out[d, :K]) for d, K in enumerate(sizes)]
    np.testing.assert_allclose(metrics.unigram_cross_entropy(counts, held_out, sizes), alone, rtol=1e-12)
    counts = jnp.asarray(counts)
    np.testing.assert_allclose(metrics.code_perplexity(counts)[1], metrics.code_perplexity(counts[1, :2]), rtol=1e-6)


def test_codes_outside_the_codebook_are_not_counted():
    assert metrics.code_counts(jnp.array([[0, -1], [4, 1], [-4, 3]]), 4).tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]]


def test_code_perplexity_of_shares_is_that_of_counts():
    np.testing.assert_allclose(metrics.code_perplexity(jnp.array([0.05, 0.05, 0.0])), 2, rtol=1e-6)


ssim = jax.jit(metrics.ssim)


def similarity(x_HW, y_HW):
    """Mean SSIM of one channel in [-1, 1], from scipy's filters and the part where the whole window fits."""
    x_HW, y_HW = (x_HW + 1) / 2, (y_HW + 1) / 2
    smooth = lambda z: gaussian_filter(z.astype(float), 1.5, radius=5)[5:-5, 5:-5]  # noqa: E731
    x, y = smooth(x_HW), smooth(y_HW)
    variances, covariance = smooth(x_HW**2) - x**2 + smooth(y_HW**2) - y**2, smooth(x_HW * y_HW) - x * y
    c1, c2 = 0.01**2, 0.03**2
    return np.mean((2 * x * y + c1) * (2 * covariance + c2) / (x**2 + y**2 + c1) / (variances + c2))


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def test_ssim_is_the_mean_over_channels_and_places():
    images, noise = pictures(2, 17, 14, 3), 0.3 * pictures(5, 2, 17, 14, 3, seed=1)
    expected = [
        [
            np.mean([similarity(x[..., c], np.clip(x + n, -1, 1)[..., c]) for c in range(3)])
            for x, n in zip(images, m, strict=True)
        ]
        for m in noise
    ]
    # The pictures are compared with each of five reconstructions.
    np.testing.assert_allclose(ssim(images, images + noise), expected, rtol=1e-5)


def test_ssim_of_equal_and_of_opposite_pictures():
    images = jnp.asarray(pictures(13, 11, 2))
    assert ssim(images, images).shape == ()
    np.testing.assert_allclose(ssim(images, images), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ssim(jnp.ones((11, 11, 1)), 3 * jnp.ones((11, 11, 1))), 1.0, rtol=1e-6)
    assert -1 <= ssim(images, -images) < -0.8
    # Equal structure, other brightness: black beside grey is farther than grey beside white.
    dark, grey, white = (jnp.full((11, 11, 1), value) for value in (-1.0, 0.0, 1.0))
    np.testing.assert_allclose(ssim(dark, grey), 0.0004 / 1.0004, rtol=1e-5)
    np.testing.assert_allclose(ssim(grey, white), 4.0004 / 5.0004, rtol=1e-5)


def test_ssim_falls_with_noise():
    images, noise = pictures(24, 24, 1), pictures(24, 24, 1, seed=1)
    values = [float(ssim(0.7 * images, 0.7 * images + scale * noise)) for scale in (0.0, 0.1, 0.2, 0.3)]
    assert values == sorted(values, reverse=True) and values[0] - values[-1] > 0.05


@pytest.mark.parametrize("shape", [(10, 30, 1), (2, 30, 7, 1)])
def test_ssim_needs_a_picture_as_large_as_its_window(shape):
    with pytest.raises(ValueError) as error:
        ssim(jnp.zeros(shape), jnp.zeros(shape))
    H, W = shape[-3:-1]
    assert str(error.value) == f"images: {H}x{W} is smaller than the window of SSIM; it takes at least 11x11"
    assert metrics.SSIM_WINDOW == 11


def test_laplacian_energy():
    x, y = np.meshgrid(np.linspace(-0.9, 0.9, 7), np.linspace(-0.8, 0.8, 5))
    slope = np.stack([x, y, 0.5 * (x + y)], axis=-1).astype(np.float32)  # straight: no detail at all
    dot = slope.copy()
    dot[2, 3, 0] += 0.5
    stacked = jnp.asarray(np.stack([slope, dot]))
    inner = 3 * 5 * 3  # the dot and its four neighbours are all inside
    np.testing.assert_allclose(
        metrics.laplacian_energy(stacked), [0, (2.0**2 + 4 * 0.5**2) / inner], rtol=1e-4, atol=1e-9
    )
    np.testing.assert_array_equal(  # what is beyond the range is not shown
        metrics.laplacian_energy(jnp.full((5, 7, 1), 3.0).at[2, 3].set(1.0)), 0.0
    )


# --- kernel distance ------------------------------------------------------------------------------


def kernel_distance_by_loops(x, y):
    """The unbiased estimate, pair by pair."""
    kernel = lambda a, b: (sum(u * v for u, v in zip(a, b, strict=True)) / len(a) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_agrees_with_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), 0.3 + rng.normal(size=(7, 5))
    found = metrics.kernel_distances(x, y, subset_size=7, num_subsets=2)
    np.testing.assert_allclose(found, kernel_distance_by_loops(x, y), rtol=1e-10)  # every subset is the whole set


def test_kernel_distance_is_unbiased_and_grows_with_the_difference():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 6))
    means = [metrics.kernel_distances(x, s + rng.normal(size=(300, 6)), 100, 50).mean() for s in (0.0, 0.5, 1.0)]
    assert abs(means[0]) < 0.05 < means[1] < means[2]
    alike = metrics.kernel_distances(x, rng.normal(size=(400, 6)), 50, 50)
    assert alike.min() < 0 < alike.max()  # a biased one is above 0 always


def test_kernel_distance_of_pairs_is_unbiased_too():
    """Of two equal sets: where a picture may stand on both sides, they look nearer than they are."""
    x = np.random.default_rng(3).normal(size=(40, 6))
    both, apart = (metrics.kernel_distances(x, x, 20, 400, paired=paired) for paired in (False, True))
    error = apart.std() / np.sqrt(len(apart))
    assert both.mean() < -8 * error and abs(apart.mean()) < 4 * error
    with pytest.raises(ValueError, match=r"^subset_size: 21 is outside 2..20, half of the pairs$"):
        metrics.kernel_distances(x, x, 21, paired=True)
    with pytest.raises(ValueError, match=r"^features: 40 and 39 are no pairs$"):
        metrics.kernel_distances(x, x[1:], 9, paired=True)


def test_kernel_distances_of_memory_maps_are_those_of_arrays(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(2, 30, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for paired in (False, True):
        found = metrics.kernel_distances(mapped, y, 10, 5, paired=paired)
        exact = metrics.kernel_distances(x.astype(np.float64), y.astype(np.float64), 10, 5, paired=paired)
        np.testing.assert_array_equal(found, exact)


def test_kernel_distance_subsets_follow_the_seed():
    x, y = np.random.default_rng(2).normal(size=(2, 20, 3))
    first, again, other = (metrics.kernel_distances(x, y, 10, 3, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all() and len(set(first)) == 3


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (((5, 3), (4, 3)), {"subset_size": 5}, r"^subset_size: 5 is outside 2..4, the size of the smaller set$"),
        (((5, 3), (5, 3)), {"subset_size": 1}, r"^subset_size: 1 is outside 2..5"),
        (((5, 3), (5, 2)), {"subset_size": 2}, r"^features: shapes \(5, 3\) and \(5, 2\) are not \(N, A\) of one A$"),
        (((5, 3), (5, 3)), {"subset_size": 2, "num_subsets": 0}, r"^num_subsets: 0 must be at least 1$"),
    ],
)
def test_kernel_distance_refuses(shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        metrics.kernel_distances(*(np.zeros(shape) for shape in shapes), **settings)

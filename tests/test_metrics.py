"""Figures of merit against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import metrics


def test_psnr_of_a_constant_error():
    images = jnp.zeros((2, 3, 5, 1))
    errors = jnp.array([0.5, 0.1])[:, None, None, None]
    np.testing.assert_allclose(
        metrics.psnr(images, images + errors), 10 * np.log10(4 / np.array([0.25, 0.01])), rtol=1e-5
    )


def test_psnr_clips_the_reconstruction_and_ends_at_100_decibel():
    images = jnp.ones((3, 5, 2))
    assert metrics.psnr(images, 1.7 * images).shape == ()
    np.testing.assert_allclose(metrics.psnr(images, 1.7 * images), 100.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.psnr(images, -3.0 * images), 0.0, atol=1e-6)


def test_code_counts():
    codes = jnp.array([[[0, 3], [0, 1]], [[2, 3], [0, 3]]])
    assert metrics.code_counts(codes, 4).tolist() == [[3, 0, 1, 0], [0, 1, 0, 3]]


def test_code_usage_and_perplexity():
    counts = jnp.array([[5.0, 5, 5, 5], [8, 0, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0]])
    assert metrics.code_usage(counts).tolist() == [1.0, 0.25, 0.5, 0.0]
    np.testing.assert_allclose(metrics.code_perplexity(counts), [4, 1, 2, 1], rtol=1e-6)
    uneven = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(
        metrics.code_perplexity(jnp.asarray(10 * uneven)), np.exp(-(uneven * np.log(uneven)).sum()), rtol=1e-5
    )


def test_unigram_cross_entropy():
    counts = jnp.array([[3.0, 1, 0, 0], [0, 0, 0, 0]])
    codes = jnp.array([[0, 2], [1, 3], [3, 0]])
    expected = [-np.mean(np.log(np.array([4, 2, 1]) / 8)), np.log(4)]
    np.testing.assert_allclose(metrics.unigram_cross_entropy(counts, codes), expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(metrics.unigram_cross_entropy)(counts, codes.reshape(3, 1, 2)), expected, rtol=1e-5
    )

"""The logits filter against loops, at its edges, and compiled once for all values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_goldens as oracle

from rq_jax.sampling import filter_logits

K = 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LOGITS = 2 * normal(4, 5, K)


def rows(probabilities):
    return np.asarray(probabilities).reshape(-1, K)


def test_agrees_with_loops_and_is_compiled_once_for_all_values():
    compiled = jax.jit(lambda *args: filter_logits(*args))  # its own function: jits of one function share a cache
    for temperature, top_k, top_p in itertools.product((0.3, 1.0, 2.5), (1, 2, 6, K, 40), (0.0, 0.35, 0.9, 1.0)):
        expected = [oracle.filter_row(row, temperature, top_k, top_p) for row in LOGITS.reshape(-1, K)]
        actual = compiled(LOGITS, temperature, top_k, top_p)
        np.testing.assert_allclose(rows(actual), expected, atol=1e-6, err_msg=f"{temperature} {top_k} {top_p}")
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("values", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.5}])
def test_none_keeps_all(values):
    expected = [oracle.filter_row(row, **values) for row in LOGITS.reshape(-1, K)]
    np.testing.assert_allclose(rows(filter_logits(LOGITS, **values)), expected, atol=1e-6)


def test_no_filter_is_the_softmax():
    np.testing.assert_allclose(filter_logits(LOGITS), jax.nn.softmax(LOGITS), atol=1e-7)


def test_the_kept_set_is_nested_and_renormalised():
    before = np.asarray(filter_logits(LOGITS))
    for top_p in (0.2, 0.5, 0.8, 0.95):
        kept = np.asarray(filter_logits(LOGITS, top_p=top_p))
        mass = np.where(kept > 0, before, 0).sum(-1)
        least = np.where(kept > 0, before, 1).min(-1)
        assert (mass >= top_p - 1e-6).all() and (mass - least < top_p + 1e-6).all()
        np.testing.assert_allclose(kept.sum(-1), 1.0, atol=1e-6)
        np.testing.assert_allclose(kept, np.where(kept > 0, before, 0) / mass[..., None], atol=1e-6)


@pytest.mark.parametrize("top_p, expected", [(0.5, (1, 0, 0)), (0.51, (0.625, 0.375, 0)), (0.0, (1, 0, 0))])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_item_that_crosses_p_is_kept(top_p, expected, order):
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))[jnp.array(order)]
    np.testing.assert_allclose(filter_logits(logits, top_p=top_p), np.array(expected)[list(order)], atol=1e-6)


def test_ties_at_the_boundary_of_top_k_are_all_kept():
    probabilities = filter_logits(jnp.array([1.0, 3, 1, 0, 1]), top_k=2)
    assert (np.asarray(probabilities) > 0).tolist() == [True, True, True, False, True]
    np.testing.assert_allclose(filter_logits(jnp.zeros(K), top_k=3), np.full(K, 1 / K), rtol=1e-6)


def test_of_equal_items_top_p_keeps_the_first():
    assert (np.asarray(filter_logits(jnp.zeros(8), top_p=0.3)) > 0).tolist() == [True] * 3 + [False] * 5


def test_temperature_zero_is_the_first_argmax():
    logits = jnp.array([[1.0, 5, 2, 5], [-jnp.inf, 0, -1, -jnp.inf]])
    for values in ({}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 2, "top_p": 0.1}):
        assert filter_logits(logits, 0.0, **values).tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]


def test_a_low_temperature_approaches_the_argmax():
    np.testing.assert_allclose(filter_logits(LOGITS, 1e-4), filter_logits(LOGITS, 0.0), atol=1e-5)


@pytest.mark.parametrize("top_k, top_p", [(None, None), (3, None), (None, 0.99), (K, 1.0)])
def test_nan_counts_as_minus_infinity(top_k, top_p):
    logits = LOGITS[0].copy()
    logits[:, [2, 7]] = np.nan
    masked = np.where(np.isnan(logits), -np.inf, logits)
    actual = filter_logits(logits, 0.8, top_k, top_p)
    np.testing.assert_array_equal(actual, filter_logits(masked, 0.8, top_k, top_p))
    assert bool(jnp.isfinite(actual).all()) and not actual[:, [2, 7]].any()


def test_codes_of_logit_minus_infinity_stay_out_of_a_wide_top_k():
    logits = jnp.full(K, -jnp.inf).at[jnp.array([1, 6])].set(jnp.array([0.0, 1.0]))
    kept = filter_logits(logits, top_k=5, top_p=0.999)
    assert np.flatnonzero(kept).tolist() == [1, 6] and float(kept.sum()) == pytest.approx(1)


def test_top_p_one_keeps_the_tail_of_a_large_codebook():
    logits = jnp.asarray(3 * normal(16384))
    for values in ({"top_p": 1.0}, {"top_k": 16384, "top_p": 1.0}, {"top_k": 10**6}):
        np.testing.assert_allclose(filter_logits(logits, **values), jax.nn.softmax(logits), rtol=1e-5)
    kept = filter_logits(logits, top_k=16000, top_p=1.0)
    assert int((kept > 0).sum()) == 16000


def test_bfloat16_logits_are_filtered_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    actual = filter_logits(logits, 0.7, 5, 0.9)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, filter_logits(logits.astype(jnp.float32), 0.7, 5, 0.9))


def test_one_value_per_row_under_vmap():
    logits, top_k, top_p = LOGITS[0], jnp.array([1, 3, 5, 11, 4]), jnp.array([0.3, 0.9, 0.5, 0.7, 1.0])
    mapped = jax.vmap(filter_logits)(logits, jnp.array([0.5, 1.0, 2.0, 0.0, 1.0]), top_k, top_p)
    for i, temperature in enumerate((0.5, 1.0, 2.0, 0.0, 1.0)):
        expected = oracle.filter_row(logits[i], temperature, int(top_k[i]), float(top_p[i]))
        np.testing.assert_allclose(mapped[i], expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_smallest_temperatures_are_the_argmax(temperature, sign):
    logits = 1e3 * LOGITS + sign * 1e5  # all below 0, or all above
    np.testing.assert_array_equal(filter_logits(logits, temperature), filter_logits(logits, 0.0))


def test_the_largest_temperature_is_uniform():
    logits = np.where(np.arange(K) == 3, -np.inf, LOGITS)
    expected = np.broadcast_to((np.arange(K) != 3) / (K - 1), LOGITS.shape)
    np.testing.assert_allclose(filter_logits(logits, 3e38), expected, rtol=1e-6)


@pytest.mark.parametrize("top_k", [2**31, 2**40, 10**30, np.inf])
def test_top_k_of_any_size(top_k):
    np.testing.assert_array_equal(filter_logits(LOGITS, top_k=top_k), filter_logits(LOGITS))


MISTAKES = {
    "temperature inf": ({"temperature": float("inf")}, r"^temperature: inf is outside \[0, 3.4"),
    "temperature beyond": ({"temperature": 1e39}, r"^temperature: 1e\+39 is outside \[0, 3.4"),
    "temperature": (
        {"temperature": -0.5},
        r"^temperature: -0.5 must be at least 0; 0 takes the most probable code$",
    ),
    "temperature nan": ({"temperature": float("nan")}, r"^temperature: nan must be at least 0"),
    "top_k": ({"top_k": 0}, r"^top_k: 0 must be at least 1 and whole; leave it out to keep all codes$"),
    "fractional top_k": ({"top_k": 2.5}, r"^top_k: 2.5 must be at least 1 and whole; leave it out to keep all codes$"),
    "top_k per depth": ({"top_k": [5, -1]}, r"^top_k: \[5, -1\] must be at least 1"),
    "top_p above": ({"top_p": 1.5}, r"^top_p: 1.5 is outside \[0, 1\]; leave it out to keep all codes$"),
    "top_p below": ({"top_p": -0.1}, r"^top_p: -0.1 is outside \[0, 1\]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake):
    values, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        filter_logits(LOGITS, **values)


@pytest.mark.parametrize("values", [{}, {"top_k": 4}, {"top_p": 0.9}])
def test_large_logits_have_a_distribution_at_every_temperature(values):
    for temperature in (0.7, 1.0, 3.0):
        probabilities = jax.jit(lambda logits, t=temperature: filter_logits(logits, t, **values))(1e29 * LOGITS)
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)


def test_infinite_logits_and_rows_without_any_have_a_distribution():
    rows = jnp.array([[1.0, jnp.inf, 3.0], [jnp.nan] * 3, [-jnp.inf] * 3])
    for values in ({}, {"top_k": 2}, {"temperature": 0.0}, {"temperature": 0.01}):
        np.testing.assert_array_equal(filter_logits(rows, **values), [[0, 1, 0], [1, 0, 0], [1, 0, 0]])

"""The quantizer where batches and settings end: vectors that are not finite, masks, no vectors, bounds of settings."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import quantize
from rq_jax.quantize import CodebookState, ResidualQuantizer

N, D, K, E = 12, 2, 5, 3
SIZES = (5, 4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def is_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# --- vectors that are not finite ------------------------------------------------------------------

X, IS_BAD = normal(N, E), np.isin(np.arange(N), (3, 7))
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "overflow": 1e25}  # the last when it is squared


def spoilt(value, is_bad=IS_BAD):
    x_NE = X.copy()
    x_NE[is_bad, 1] = value
    return x_NE


def test_finite_vectors():
    for value in BAD.values():
        assert quantize.finite_vectors(spoilt(value).reshape(3, 4, E)).tolist() == (~IS_BAD).reshape(3, 4).tolist()
    assert bool(quantize.finite_vectors(jnp.zeros((0, E))).all())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_vector_has_code_0_and_moves_no_other_code(value):
    for codebook_KE in (normal(K, E, seed=1), np.abs(normal(K, E, seed=1)), np.zeros((K, E), np.float32)):
        codes_N = quantize.nearest_codes(spoilt(value), codebook_KE)
        expected = np.where(IS_BAD, 0, quantize.nearest_codes(X, codebook_KE))
        np.testing.assert_array_equal(codes_N, expected)


@pytest.mark.fault("vectors that are not finite in a moving average", "left out and counted")
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("use_candidates", [False, True])
def test_the_moving_average_leaves_bad_vectors_out(value, use_candidates):
    state, codes_N = CodebookState.from_codebook(normal(K, E, seed=1), 1.005), np.arange(N) % 3
    candidates_KE = normal(K, E, seed=2) if use_candidates else None
    actual = quantize.ema_update(state, spoilt(value), codes_N, 0.9, candidates_KE)
    good = ~IS_BAD
    assert_same(actual, quantize.ema_update(state, X[good], codes_N[good], 0.9, candidates_KE))
    assert_same(quantize.ema_update(state, spoilt(value)[IS_BAD], codes_N[IS_BAD], 0.9, candidates_KE), state)


def test_no_code_restarts_from_a_bad_candidate():
    state = CodebookState.from_codebook(normal(K, E, seed=1), 0.5)
    candidates_KE = np.full((K, E), 9.0, np.float32)
    candidates_KE[2, 0] = np.nan
    codebook_KE = quantize.ema_update(state, X[:1], np.array([0]), 0.9, candidates_KE).codebook_KE
    assert is_finite(codebook_KE) and (np.asarray(codebook_KE) > 5).any(-1).tolist() == [True, True, False, True, True]


kmeans = jax.jit(quantize.kmeans, static_argnums=(2, 3))


@pytest.mark.fault("vectors that are not finite in k-means", "left out and counted")
@pytest.mark.parametrize("size", [4, 11])  # 10 vectors are good
def test_candidates_and_centres_come_from_good_vectors(size):
    rng, good = jax.random.key(0), X[~IS_BAD]
    found = [quantize.restart_candidates(rng, spoilt(value), size) for value in BAD.values()]
    assert_same(found[1:], found[:-1])
    near = (np.abs(np.asarray(found[0])[:, None] - good) < 0.02).all(-1)
    assert near.any(-1).all() and near.sum(0).max() <= -(-size // len(good))
    states = [kmeans(rng, spoilt(value), size, 3) for value in BAD.values()]
    assert_same(states[1:], states[:-1])
    assert is_finite(states[0]) and float(states[0].counts_K.sum()) == len(good)


def test_without_a_good_vector_candidates_and_centres_are_zeros():
    for x_NE in (np.full((2, E), np.nan), np.zeros((0, E), np.float32)):
        assert_same(quantize.restart_candidates(jax.random.key(0), x_NE, K), np.zeros((K, E)))
        assert not any(leaf.any() for leaf in quantize.kmeans(jax.random.key(0), x_NE, K))


MODULES = {
    "shared": {},
    "pooled": {"codebook_update": "pooled"},
    "stacked": {"use_shared_codebook": False},
    "unequal": {"use_shared_codebook": False, "codebook_size": SIZES},
}


@functools.cache
def module_of(**settings):
    return ResidualQuantizer(
        **{"codebook_size": K, "code_dim": E, "depth": D, "decay": 0.9, "use_kmeans_init": True, **settings}
    )


@functools.partial(jax.jit, static_argnums=0)
def train(module, codebook, x, mask):
    """The result of a training call, the codebook after it and how many vectors were not finite."""
    output, changed = module.apply(
        {"codebook": codebook},
        x,
        True,
        mask=mask,
        rngs={"restart": jax.random.key(1)},
        mutable=["codebook", "intermediates"],
    )
    (count,) = changed["intermediates"]["num_not_finite"]
    return output, changed["codebook"], count


EVERY = np.ones(N, bool)


@pytest.mark.fault("vectors that are not finite in a training call of the quantizer", "left out and counted")
@pytest.mark.parametrize("kind", MODULES)
def test_a_training_call_leaves_bad_vectors_out_and_counts_them(kind):
    module = module_of(**MODULES[kind])
    fresh = module.init(jax.random.key(0), X)["codebook"]
    placed = train(module, fresh, X, EVERY)[1]
    for state in (fresh, placed):
        expected, learned, count = train(module, state, X, ~IS_BAD)
        assert count.tolist() == [0, 0]
        for value in BAD.values():
            output, changed, count = train(module, state, spoilt(value), EVERY)
            assert_same(changed, learned)
            np.testing.assert_array_equal(output.codes[~IS_BAD], expected.codes[~IS_BAD])
            assert count.tolist() == [2, 2] and is_finite((changed, output.quantized[~IS_BAD]))
            assert_same(train(module, state, spoilt(value, EVERY), EVERY)[1:], (state, np.full(D, N)))


def test_a_depth_whose_residuals_overflow_learns_nothing():
    states = [CodebookState.from_codebook([[value]]) for value in (-1.2e19, 0.5)]
    _, (first, second) = quantize.quantize_and_update(jnp.full((2, 1), 1.2e19), states, 2, [0.9, 0.9])
    assert_same(second, states[1])
    assert is_finite(first) and float(first.codebook_KE[0, 0]) > -1.2e19


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook_update", ["sequential", "pooled"])
def test_masked_vectors_get_codes_and_change_nothing(codebook_update):
    x_BTE, mask = normal(2, 8, E), np.arange(8) < np.array([[1], [3]])
    states = [CodebookState.from_codebook(normal(K, E, seed=1))]
    arguments = states, D, [0.9], codebook_update
    result, learned = quantize.quantize_and_update(x_BTE, *arguments, mask=mask)
    expected, alone = quantize.quantize_and_update(x_BTE[mask], *arguments)
    assert_same((result.codes[mask], learned), (expected.codes, alone))
    np.testing.assert_array_equal(
        result.codes[..., 0], quantize.nearest_codes(x_BTE.reshape(-1, E), states[0].codebook_KE).reshape(2, 8)
    )
    assert_same(quantize.quantize_and_update(x_BTE, *arguments, mask=np.zeros((2, 8), bool))[1], states)


@pytest.mark.parametrize("code", [K, K + 100, -1, -100])
def test_codes_outside_the_codebook_count_nothing(code):
    state, codes_N = CodebookState.from_codebook(normal(K, E, seed=1)), np.arange(N) % K
    actual = quantize.ema_update(state, X, np.where(IS_BAD, code, codes_N), 0.9)
    assert_same(actual, quantize.ema_update(state, X[~IS_BAD], codes_N[~IS_BAD], 0.9))


def test_a_mask_of_another_shape_is_refused():
    module = module_of()
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"^mask: shape \(11,\) does not fit; allowed is \(12,\)"):
        module.apply(variables, X, True, mask=EVERY[1:], mutable=["codebook"])


def test_a_mask_of_numbers_is_refused():
    module, mask = module_of(), EVERY.astype(np.float32)
    states = [CodebookState.from_codebook(normal(K, E, seed=1))]
    calls = (
        lambda: module.init_with_output(jax.random.key(0), X, mask=mask),
        lambda: quantize.quantize_and_update(X, states, D, [0.9], mask=mask),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^mask: dtype float32 must be bool; numbers are for `weights`(\n|$)"):
            call()


# --- ends of settings -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_candidates", [False, True])
@pytest.mark.parametrize("state", ["fresh", "trained"])
def test_decay_one_freezes_and_decay_zero_forgets(state, use_candidates):
    codebook_KE, codes_N = normal(K, E, seed=1), np.arange(N) % 3
    states = {"fresh": CodebookState(codebook_KE, np.zeros(K, np.float32), codebook_KE)}
    state = {**states, "trained": CodebookState.from_codebook(codebook_KE, 2.0)}[state]
    candidates_KE = normal(K, E, seed=2) if use_candidates else None
    assert_same(quantize.ema_update(state, X, codes_N, 1.0, candidates_KE), state)
    forgot = quantize.ema_update(state, X, codes_N, 0.0, candidates_KE)
    rest_KE = candidates_KE if use_candidates else codebook_KE
    expected = [X[codes_N == k].mean(0) if k < 3 else rest_KE[k] for k in range(K)]
    np.testing.assert_allclose(forgot.codebook_KE, expected, rtol=2e-4, atol=1e-5)


def test_an_empty_cluster_keeps_its_centre_in_training_too():
    x_NE = normal(2, E)
    state = quantize.kmeans(jax.random.key(0), x_NE, K)
    assert (np.asarray(state.counts_K) == 0).sum() == K - 2
    after = quantize.ema_update(state, x_NE, quantize.nearest_codes(x_NE, state.codebook_KE), 0.9)
    np.testing.assert_allclose(after.codebook_KE, state.codebook_KE, rtol=1e-4)


def test_no_iterations_are_the_vectors_to_start_from():
    state = quantize.kmeans(jax.random.key(0), X, K, num_iterations=0)
    assert_same(state.codebook_KE, quantize.restart_candidates(jax.random.key(0), X, K))
    assert not state.counts_K.any() and not state.sums_KE.any()
    assert is_finite(quantize.ema_update(state, X, np.zeros(N, int), 0.9))


@pytest.mark.parametrize("num_vectors", [0, 1, 3])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 16), (2, 3, 1)], ids=str)
def test_the_smallest_and_the_deepest(num_vectors, sizes):
    size, length, depth = sizes
    x_NE, codebook_KE = normal(num_vectors, length), normal(size, length, seed=1)
    state = CodebookState.from_codebook(codebook_KE)
    candidates = lambda d, x, K: quantize.restart_candidates(jax.random.key(d), x, K)  # noqa: E731
    result, (after,) = quantize.quantize_and_update(x_NE, [state], depth, [0.5], candidates=candidates)
    assert result.codes.shape == (num_vectors, depth) and is_finite((result, after))
    if not num_vectors:
        assert_same(after, state)
    soft, codes = quantize.soft_codes(x_NE, codebook_KE, depth, 0.5, jax.random.key(0))
    assert soft.shape == (num_vectors, depth, size) and codes.shape == (num_vectors, depth)
    assert quantize.lookup(codes, codebook_KE).shape == (num_vectors, depth, length)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e38, np.inf])
def test_soft_codes_at_the_ends_of_the_temperature(temperature):
    codebook = tuple(10 * normal(size, E, seed=size) for size in SIZES)
    soft, codes = quantize.soft_codes(X, codebook, D, temperature)
    if temperature < 1:
        np.testing.assert_array_equal(soft, jax.nn.one_hot(codes, K))
        drawn, _ = quantize.draw_codes(X, codebook, D, temperature, jax.random.key(0))
        np.testing.assert_array_equal(drawn, codes)
    else:
        expected = np.array([[1 / 5] * 5, [1 / 4] * 4 + [0]])
        np.testing.assert_allclose(soft, np.broadcast_to(expected, soft.shape), rtol=1e-6)


def test_soft_labels_have_a_temperature_above_zero():
    with pytest.raises(ValueError, match="^temperature: 0.0 must be above 0"):
        quantize.soft_labels(normal(N, D, E), normal(K, E), 0.0)


# --- a codebook from elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1.0, 50.0])
def test_a_codebook_from_elsewhere_goes_on_where_it_was(count):
    codebook_KE = normal(K, E, seed=1)
    state = CodebookState.from_codebook(codebook_KE, count)
    np.testing.assert_allclose(state.sums_KE, count * codebook_KE, rtol=1e-6)
    assert state.counts_K.tolist() == [count] * K
    after = quantize.ema_update(state, X, quantize.nearest_codes(X, codebook_KE), 0.99)
    furthest = np.abs(np.asarray(after.codebook_KE) - codebook_KE).max()
    assert 0 < furthest < 0.3 / count + 0.01
    unused = quantize.ema_update(state, X[:1], np.array([0]), 0.99).codebook_KE[1:]
    np.testing.assert_allclose(unused, codebook_KE[1:], rtol=1e-4)


# --- the rng stream -------------------------------------------------------------------------------


def test_restart_and_kmeans_without_their_rng_stream_are_told():
    module = ResidualQuantizer(K, E, D, use_kmeans_init=True)
    variables = module.init(jax.random.key(0), X)
    call = functools.partial(module.apply, variables, X, mutable=["codebook"])
    with pytest.warns(UserWarning) as told:
        jax.eval_shape(functools.partial(call, True))
    expected = (
        "True does nothing in a training call without the rng stream 'restart'; pass rngs={'restart': key}, or set"
    )
    assert [str(warning.message) for warning in told] == [
        f"{name}: {expected} {name}=False" for name in ("use_restart", "use_kmeans_init")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(False)
        jax.eval_shape(functools.partial(call, True, rngs={"restart": jax.random.key(0)}))
        quiet = ResidualQuantizer(K, E, D, use_restart=False)
        jax.eval_shape(lambda: quiet.apply(variables, X, True, mutable=["codebook"]))

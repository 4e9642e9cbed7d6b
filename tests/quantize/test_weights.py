"""Weights of vectors and cells in rq_jax.quantize, losses and metrics, and how a codebook starts.

Test 6 of the fifteen that the design asks of DQ-VAE stands here; its parity is in goldens/test_golden_dq_quantizer.py.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_goldens as oracle
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rq_jax import grains, losses, metrics, quantize
from rq_jax.quantize import CodebookState, ResidualQuantizer

N, K, E = 13, 7, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fresh_state():
    counts_K = np.linspace(0.4, 3.0, K, dtype=np.float32)
    table_KE = normal(K, E, seed=1)
    return CodebookState(jnp.asarray(table_KE), jnp.asarray(counts_K), jnp.asarray(table_KE * counts_K[:, None]))


X, CODES = normal(N, E, seed=2), np.random.default_rng(3).integers(0, K - 2, N)
TIMES = np.random.default_rng(4).integers(0, 4, N)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


# --- the moving average ---


@pytest.mark.parametrize("use_restart", [False, True])
def test_6_a_weighted_vector_counts_as_often_as_its_weight_says(use_restart):
    rows_KE = normal(K, E, seed=5) if use_restart else None
    update = jax.jit(quantize.ema_update, static_argnums=3)
    actual = update(fresh_state(), X, CODES, 0.9, rows_KE, TIMES.astype(np.float32))
    repeated = np.repeat(X, TIMES, axis=0), np.repeat(CODES, TIMES)
    assert_close(actual, oracle.ema_update(fresh_state(), *repeated, 0.9, rows_KE))
    # A quarter of each: counts are averages of quarters, which are exact.
    quarters = quantize.ema_update(fresh_state(), X, CODES, 0.0, weights_N=TIMES / 4)
    np.testing.assert_array_equal(quarters.counts_K, np.bincount(CODES, TIMES / 4, K))


def test_weights_of_one_are_bit_for_bit_no_weights():
    without = quantize.ema_update(fresh_state(), X, CODES, 0.9)
    assert_same(quantize.ema_update(fresh_state(), X, CODES, 0.9, weights_N=np.ones(N, np.float32)), without)
    for update in ("sequential", "pooled"):
        x = normal(2, 3, 5, E)
        call = lambda **more: quantize.quantize_and_update(x, [fresh_state()], 3, [0.9], update, **more)  # noqa: E731, B023
        assert_same(call(weights=np.ones((2, 3, 5), np.float32)), call())


def test_vectors_of_weight_zero_or_of_none_that_is_finite_change_nothing():
    update = jax.jit(quantize.ema_update, static_argnums=3)
    assert_same(update(fresh_state(), X, CODES, 0.9, None, np.zeros(N)), fresh_state())
    some = np.where(np.arange(N) < 4, 1.0, np.where(np.arange(N) % 2, np.nan, np.inf)).astype(np.float32)
    assert_same(update(fresh_state(), X, CODES, 0.9, None, some), update(fresh_state(), X[:4], CODES[:4], 0.9))


def test_inside_a_program_a_weight_below_0_subtracts():
    weights = np.where(np.arange(N) < 2, -1.0, 2.0).astype(np.float32)
    actual = jax.jit(quantize.ema_update, static_argnums=3)(fresh_state(), X, CODES, 0.0, None, weights)
    np.testing.assert_array_equal(actual.counts_K, np.bincount(CODES, weights, K))


@pytest.mark.parametrize("codebook_update", ["sequential", "pooled"])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_reach_every_depth(codebook_update, shared):
    depth, states = 3, [fresh_state()] * (1 if shared else 3)
    arguments = states, depth, [0.9] * len(states), codebook_update
    result, after = quantize.quantize_and_update(X, *arguments, weights=TIMES.astype(np.float32))
    repeated, expected = quantize.quantize_and_update(np.repeat(X, TIMES, axis=0), *arguments)
    np.testing.assert_array_equal(np.repeat(result.codes[:, 0], TIMES), repeated.codes[:, 0])
    for a, b in zip(after, expected, strict=True):
        assert_close(a, b)


def apply_training(module, variables, x, weights=None):
    rngs = {"restart": jax.random.key(1)}
    return module.apply(variables, x, True, weights, rngs=rngs, mutable=["codebook"])


@pytest.mark.parametrize("use_weights", [False, True])
def test_6_coarse_regions_have_four_equal_codes_and_weigh_once_where_asked(use_weights):
    """As the original, four repeated vectors count four times; with weights, a code counts once."""
    map_Buv = jnp.array([[[0, 1, 0]], [[1, 1, 0]]])
    fine = normal(2, 2, 6, E)
    repeated = grains.repeat_cells(jnp.asarray(fine[:, ::2, ::2]), 2)
    weights = grains.cell_weights(map_Buv, 2)
    x = jnp.where((weights < 1)[..., None], repeated, fine)
    module = ResidualQuantizer(K, E, 1, decay=0.0, use_restart=False)
    result, changed = apply_training(module, module.init(jax.random.key(0), x), x, weights if use_weights else None)
    codes = result.codes[..., 0].reshape(2, 1, 2, 3, 2).transpose(0, 1, 3, 2, 4).reshape(2, 1, 3, 4)
    assert bool(((codes == codes[..., :1]).all(-1) | (map_Buv == 1)).all())
    counts_K = np.bincount(np.ravel(result.codes), np.ravel(weights) if use_weights else None, K)
    np.testing.assert_array_equal(changed["codebook"]["counts_K"], counts_K)
    total = int(grains.num_codes(map_Buv, 2).sum()) if use_weights else 24
    assert counts_K.sum() == total
    once = metrics.code_counts(result.codes, K, weights)
    assert float(once.sum()) == int(grains.num_codes(map_Buv, 2).sum()) == 15


def test_6_one_device_and_eight_give_the_same_weighted_average():
    module = ResidualQuantizer(K, E, 2, decay=0.9)
    x, weights = normal(8, 3, 5, E), np.random.default_rng(0).choice([0.25, 1.0], (8, 3, 5)).astype(np.float32)
    variables = module.init(jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put((x, weights), NamedSharding(mesh, P("data")))
    call = jax.jit(lambda variables, x, weights: apply_training(module, variables, x, weights))
    expected, state = call(variables, x, weights)
    actual, sharded_state = call(jax.device_put(variables, NamedSharding(mesh, P())), *sharded)
    assert len(actual.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(actual.codes, expected.codes)
    assert_close(jax.tree.leaves(sharded_state), jax.tree.leaves(state))


# --- the loss and the counts ---


def test_6_the_weighted_loss_and_its_gradient():
    latents, sums = normal(2, 4, 6, E), normal(2, 4, 6, 3, E, seed=1)
    weights = np.asarray(grains.cell_weights(jnp.array([[[0, 1, 2]], [[2, 0, 1]]]), 3)[:, :, ::2])
    loss, grad = jax.value_and_grad(losses.commitment_loss)(latents, sums, weights)
    difference = latents[..., None, :] - sums
    np.testing.assert_allclose(loss, np.mean(weights[..., None, None] * difference**2), rtol=1e-5)
    expected = 2 * (weights[..., None, None] * difference).sum(-2) / sums.size
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)
    assert float(losses.commitment_loss(latents, sums, np.ones_like(weights))) == float(
        losses.commitment_loss(latents, sums)
    )


def test_weighted_code_counts():
    codes = jnp.array([[[0, 3], [0, 1]], [[2, 3], [0, 4]]])
    weights = jnp.array([[0.25, 1.0], [0.5, 2.0]])
    assert metrics.code_counts(codes, 4, weights).tolist() == [[3.25, 0, 0.5, 0], [0, 1, 0, 0.75]]
    assert_same(metrics.code_counts(codes, 4, jnp.ones((2, 2))), metrics.code_counts(codes, 4))


# --- how a codebook starts ---


@pytest.mark.parametrize("sizes", [2000, (2000, 500)])
def test_6_a_uniform_codebook_starts_in_agreement_with_its_averages(sizes):
    shared = isinstance(sizes, int)
    module = ResidualQuantizer(sizes, E, 2, use_shared_codebook=shared, codebook_init="uniform")
    state = module.init(jax.random.key(0), X)["codebook"]
    assert_same(state["sums_KE"], state["codebook_KE"])
    assert all(np.all(counts_K == 1) for counts_K in jax.tree.leaves(state["counts_K"]))
    for table_KE in jax.tree.leaves(state["codebook_KE"]):
        bound = 1 / len(table_KE)
        assert 0.99 * bound < float(jnp.abs(table_KE).max()) <= bound
        assert abs(float(table_KE.std()) - bound / np.sqrt(3)) < 0.02 * bound


def test_6_a_uniform_start_weighs_as_much_as_one_vector():
    module = ResidualQuantizer(50, E, 1, codebook_init="uniform")
    state = CodebookState(**module.init(jax.random.key(0), X)["codebook"])
    after = quantize.ema_update(state, jnp.ones((200, E)), np.zeros(200, int), 0.99, jnp.full((50, E), 3.0))
    expected = (0.99 * state.codebook_KE[0] + 0.01 * 200) / (0.99 + 0.01 * 200)
    np.testing.assert_allclose(after.codebook_KE[0], expected, rtol=1e-4)
    np.testing.assert_allclose(after.codebook_KE[1:], 3.0, rtol=1e-4)


@pytest.mark.parametrize("use_restart", [True, False])
def test_6_a_uniform_codebook_stays_among_its_vectors_without_restarts(use_restart):
    """With the switch off, or without its rng stream: a code that nothing uses stays where it is."""
    module = ResidualQuantizer(50, E, 1, use_restart=use_restart, codebook_init="uniform")
    state = module.init(jax.random.key(0), X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output, after = module.apply(state, X, True, mutable=["codebook"])
    table_KE = np.asarray(after["codebook"]["codebook_KE"])
    assert np.abs(table_KE).max() <= np.abs(X).max()
    unused_K = np.setdiff1d(np.arange(50), output.codes)
    assert len(unused_K) > 30
    np.testing.assert_allclose(table_KE[unused_K], state["codebook"]["codebook_KE"][unused_K], rtol=1e-4)


def test_kmeans_places_a_uniform_codebook_once():
    """Also where all counts are 1 after it: as many vectors as codes, far apart."""
    module = ResidualQuantizer(len(X), E, 1, use_kmeans_init=True, codebook_init="uniform")
    variables, rngs = module.init(jax.random.key(0), X), {"restart": jax.random.key(1)}
    train = jax.jit(lambda variables, x: module.apply(variables, x, True, rngs=rngs, mutable=["codebook"])[1])
    first = train(variables, 10 * X)
    np.testing.assert_array_equal(first["codebook"]["counts_K"], 1)
    table_KE = np.asarray(first["codebook"]["codebook_KE"])
    np.testing.assert_allclose(np.sort(table_KE, axis=0), np.sort(10 * X, axis=0), rtol=1e-3)
    second = np.asarray(train(first, 9 * X)["codebook"]["codebook_KE"])
    np.testing.assert_allclose(second, 0.999 * table_KE, rtol=1e-3)  # else 0.9 of it


# --- bad input ---


SHAPE = r"^weights: shape \(2, 4\) does not fit; allowed is \("
MISTAKES = {
    "of an update": (lambda w: quantize.ema_update(fresh_state(), X, CODES, 0.9, weights_N=w), SHAPE + r"13,\)$"),
    "of a batch": (lambda w: quantize.quantize_and_update(X, [fresh_state()], 1, [0.9], weights=w), SHAPE + r"13,\)$"),
    "of a loss": (lambda w: losses.commitment_loss(X, X[:, None], w), SHAPE + r"13,\)$"),
    "of counts": (lambda w: metrics.code_counts(jnp.zeros((2, 3, 1), int), K, w), SHAPE + r"2, 3\)$"),
    "of the module": (
        lambda w: ResidualQuantizer(K, E, 1).init_with_output(jax.random.key(0), X, weights=w),
        SHAPE + r"13,\)$",
    ),
    "below 0": (
        lambda w: quantize.ema_update(fresh_state(), X[:8], CODES[:8], 0.9, weights_N=w.ravel() - 2),
        r"^weights: -1.0 must be finite and at least 0$",
    ),
    "not a number": (
        lambda w: quantize.ema_update(fresh_state(), X[:8], CODES[:8], 0.9, weights_N=w.ravel() * np.nan),
        r"^weights: nan must be finite and at least 0$",
    ),
    "infinite, of a batch": (
        lambda w: quantize.quantize_and_update(X[:8], [fresh_state()], 1, [0.9], weights=w.ravel() * np.inf),
        r"^weights: inf must be finite and at least 0$",
    ),
    "an unknown start": (
        lambda w: ResidualQuantizer(K, E, 1, codebook_init="zeros").init(jax.random.key(0), X),
        r"^codebook_init: 'zeros' is unknown; allowed are 'normal' and 'uniform'$",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError) as error:
        call(np.ones((2, 4), np.float32))
    (message_line, *_) = str(error.value).splitlines()  # Flax adds lines on the traceback
    assert re.search(message, message_line)

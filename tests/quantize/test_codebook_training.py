"""Moving average, restart, k-means and the Flax module of rq_jax.quantize."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_goldens as oracle
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rq_jax import quantize
from rq_jax.quantize import CodebookState, ResidualQuantizer

B, h, w, D, K, E = 2, 3, 5, 4, 7, 6
SIZES = (7, 5, 3, 2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CODEBOOKS = {
    "shared": jnp.asarray(normal(K, E, seed=1)),
    "stacked": jnp.asarray(normal(D, K, E, seed=2)),
}


# --- the moving average ---------------------------------------------------------------------------


def fresh_state():
    counts_K = jnp.linspace(0.4, 3.0, K)
    codebook_KE = CODEBOOKS["shared"]
    return CodebookState(codebook_KE, counts_K, codebook_KE * counts_K[:, None])


@pytest.mark.parametrize("use_restart", [False, True])
@pytest.mark.parametrize("decay", [0.99, 0.8])
def test_ema_update_agrees_with_loops_over_several_steps(use_restart, decay):
    state, expected = fresh_state(), tuple(map(np.asarray, fresh_state()))
    update = jax.jit(quantize.ema_update, static_argnums=3)
    for step in range(4):
        x_NE = normal(5, E, seed=10 + step)
        codes_N = np.random.default_rng(step).integers(0, K - 2, 5)
        rows = normal(K, E, seed=20 + step) if use_restart else None
        state = update(state, x_NE, codes_N, decay, rows)
        expected = oracle.ema_update(expected, x_NE, codes_N, decay, rows)
        for actual, array in zip(state, expected, strict=True):
            np.testing.assert_allclose(actual, array, rtol=1e-5, atol=1e-5 * np.abs(array).max())


@pytest.mark.parametrize("decay", [0.99, 0.9, 0.999, 0.5])
def test_a_code_used_once_an_update_stays_at_the_threshold_and_survives(decay):
    ones_KE, candidates_KE = jnp.ones((3, E)), jnp.full((3, E), 7.0)
    state = CodebookState(ones_KE, jnp.ones(3), ones_KE)
    for update in (quantize.ema_update, jax.jit(quantize.ema_update, static_argnums=3)):
        for _ in range(5):
            state = update(state._replace(sums_KE=ones_KE), ones_KE[:2], jnp.array([0, 2]), decay, candidates_KE)
            assert state.counts_K.tolist() == [1.0, 1.0, 1.0]
            np.testing.assert_allclose(state.sums_KE[:, 0], [1.0, 7.0, 1.0], rtol=1e-6)  # code 1 was never used


def test_without_candidates_nothing_restarts():
    state = quantize.ema_update(fresh_state(), normal(2, E), jnp.array([0, 0]), 0.5)
    np.testing.assert_allclose(state.counts_K[1:], 0.5 * fresh_state().counts_K[1:], rtol=1e-6)


def test_restart_candidates_are_distinct_vectors_of_the_batch():
    x_NE = normal(11, E)
    rows = quantize.restart_candidates(jax.random.key(0), x_NE, K)
    matches = (np.asarray(rows)[:, None] == x_NE).all(-1)
    assert rows.shape == (K, E) and (matches.sum(1) == 1).all() and matches.sum(0).max() == 1
    assert not np.array_equal(rows, quantize.restart_candidates(jax.random.key(1), x_NE, K))


@pytest.mark.parametrize("N", [1, 3, 5])
def test_too_few_vectors_are_repeated_under_small_positive_noise(N):
    size, x_NE = 13, 10 * normal(N, E)
    rows = np.asarray(quantize.restart_candidates(jax.random.key(0), x_NE, size))
    noise = rows[:, None] - x_NE
    near = (np.abs(noise) < 0.1).all(-1)
    assert (near.sum(1) == 1).all()
    assert noise[near].min() >= -1e-6 and noise[near].max() <= 0.01 / np.sqrt(E) + 1e-6
    assert noise[near].mean() > 0.3 * 0.01 / np.sqrt(E), "the noise is not centred"
    repeats = -(-size // N)
    left_out = repeats * N - size
    assert near.sum(0).max() <= repeats and near.sum(0).min() >= repeats - left_out


# --- training calls -------------------------------------------------------------------------------


def one_call(codebook_update, shared, candidates=None):
    counts_K = jnp.linspace(0.4, 3.0, K)
    tables = [CODEBOOKS["shared"]] if shared else list(CODEBOOKS["stacked"])
    states = [CodebookState(table, counts_K, table * counts_K[:, None]) for table in tables]
    return quantize.quantize_and_update(normal(B, h, w, E), states, D, [0.9] * len(states), codebook_update, candidates)


def test_sequential_updates_of_a_shared_codebook_agree_with_loops():
    rows_DKE = normal(D, K, E, seed=8)
    result, (state,) = one_call("sequential", True, lambda d, x_NE, size: rows_DKE[d])
    x_NE, start = normal(B, h, w, E).reshape(-1, E), tuple(map(np.asarray, fresh_state()))
    codes_ND, sums_NDE, expected, _ = oracle.train_sequential(x_NE, start, D, 0.9, rows_DKE)
    np.testing.assert_array_equal(result.codes.reshape(-1, D), codes_ND)
    np.testing.assert_allclose(result.partial_sums.reshape(-1, D, E), sums_NDE, atol=1e-5)
    for actual, array in zip(state, expected, strict=True):
        np.testing.assert_allclose(actual, array, rtol=1e-4, atol=1e-5)


def test_pooled_is_one_update_with_the_vectors_of_all_depths():
    result, (state,) = one_call("pooled", True)
    unchanged = quantize.residual_quantize(normal(B, h, w, E), CODEBOOKS["shared"], D)
    for a, b in zip(result, unchanged, strict=True):
        np.testing.assert_array_equal(a, b)
    vectors = quantize.lookup(result.codes, CODEBOOKS["shared"])
    inputs = normal(B, h, w, 1, E) - (result.partial_sums - vectors)
    expected = quantize.ema_update(fresh_state(), inputs.reshape(-1, E), result.codes.reshape(-1), 0.9)
    for a, b in zip(state, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_order_of_updates_matters_for_a_shared_codebook_only():
    rows = lambda d, x_NE, size: normal(size, E, seed=30 + d)  # noqa: E731
    separate = [one_call(order, False, rows) for order in ("sequential", "pooled")]
    for a, b in zip(*map(jax.tree.leaves, separate), strict=True):
        np.testing.assert_array_equal(a, b)
    shared = [one_call(order, True)[1][0].codebook_KE for order in ("sequential", "pooled")]
    assert float(jnp.abs(shared[0] - shared[1]).max()) > 1e-2


# --- k-means --------------------------------------------------------------------------------------


def test_kmeans_finds_well_separated_centres():
    centres = 20.0 * normal(3, E)
    x_NE = (centres[:, None] + 0.1 * normal(3, 8, E, seed=1)).reshape(-1, E)

    def starts_in_all(rng):
        starts = quantize.restart_candidates(rng, x_NE, 3)
        return len(set(quantize.nearest_codes(starts, centres).tolist())) == 3

    rng = next(rng for rng in jax.random.split(jax.random.key(0), 100) if starts_in_all(rng))
    state = quantize.kmeans(rng, x_NE, 3)
    order = quantize.nearest_codes(centres, state.codebook_KE)
    np.testing.assert_allclose(state.codebook_KE[order], x_NE.reshape(3, 8, E).mean(1), rtol=1e-4, atol=1e-4)
    assert state.counts_K.tolist() == [8.0, 8.0, 8.0]


def test_kmeans_centres_are_means_and_empty_clusters_keep_theirs():
    x_NE = normal(40, E)
    state = quantize.kmeans(jax.random.key(0), x_NE, K, num_iterations=50)
    codes_N = quantize.nearest_codes(x_NE, state.codebook_KE)
    means = [x_NE[codes_N == k].mean(0) for k in range(K)]
    np.testing.assert_allclose(state.codebook_KE, means, atol=1e-4)
    few = quantize.kmeans(jax.random.key(0), x_NE[:2], K)  # 7 codes, 2 vectors
    assert bool(jnp.isfinite(few.codebook_KE).all()) and float(few.counts_K.sum()) == 2


# --- the Flax module ------------------------------------------------------------------------------


X = normal(B, h, w, E, seed=6)


def build(**settings):
    """A module and its fresh variables."""
    module = ResidualQuantizer(**{"codebook_size": K, "code_dim": E, "depth": D, "decay": 0.9, **settings})
    return module, module.init(jax.random.key(0), X)


@functools.partial(jax.jit, static_argnums=0)
def apply_training(module, variables, x, rngs):
    return module.apply(variables, x, True, rngs=rngs, mutable=["codebook"])


def train(module, variables, x=X, seed=None):
    """One training call: the result and the variables after it."""
    return apply_training(module, variables, x, {} if seed is None else {"restart": jax.random.key(seed)})


KINDS = {
    "shared": ({}, (K, E)),
    "stacked": ({"use_shared_codebook": False}, (D, K, E)),
    "unequal": ({"use_shared_codebook": False, "codebook_size": SIZES}, tuple((size, E) for size in SIZES)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_variables_and_a_training_call_of_each_kind_of_codebook(kind):
    settings, shapes = KINDS[kind]
    module, variables = build(**settings)
    state = variables["codebook"]
    is_shape = lambda x: isinstance(x, tuple) and isinstance(x[0], int)  # noqa: E731
    assert variables.keys() == {"codebook"} and state.keys() == {"codebook_KE", "counts_K", "sums_KE"}
    assert jax.tree.map(jnp.shape, state["codebook_KE"]) == shapes
    assert jax.tree.map(jnp.shape, state["counts_K"]) == jax.tree.map(lambda s: s[:-1], shapes, is_leaf=is_shape)
    for a, b in zip(jax.tree.leaves(state["sums_KE"]), jax.tree.leaves(state["codebook_KE"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(counts.any() for counts in jax.tree.leaves(state["counts_K"]))
    output, changed = train(module, variables, seed=1)
    assert jax.tree.structure(changed) == jax.tree.structure(variables)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, variables)
    for before, after in zip(jax.tree.leaves(variables), jax.tree.leaves(changed), strict=True):
        assert not np.array_equal(before, after)
    assert output.codes.shape == (B, h, w, D) and output.partial_sums.shape == (B, h, w, D, E)
    counts = sum(float(counts.sum()) for counts in jax.tree.leaves(changed["codebook"]["counts_K"]))
    assert counts > 0


def test_fresh_codes_are_standard_normal():
    table_KE = ResidualQuantizer(2000, E, D).init(jax.random.key(0), X)["codebook"]["codebook_KE"]
    assert abs(float(table_KE.mean())) < 0.05 and abs(float(table_KE.std()) - 1) < 0.05


def test_evaluation_changes_no_state_and_equals_residual_quantize():
    module, variables = build()
    output, changed = module.apply(variables, X, rngs={"restart": jax.random.key(1)}, mutable=["codebook"])
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = quantize.residual_quantize(X, variables["codebook"]["codebook_KE"], D)
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_array_equal(output.partial_sums, expected.partial_sums)
    np.testing.assert_allclose(output.quantized, expected.quantized, atol=1e-6)


@pytest.mark.parametrize("is_training", [False, True])
def test_the_gradient_passes_straight_through(is_training):
    module, variables = build()

    def weighted(x):
        output, _ = module.apply(variables, x, is_training, mutable=["codebook"])
        return (output.quantized * X).sum() + 5 * output.partial_sums.sum()  # the partial sums pass no gradient

    np.testing.assert_array_equal(jax.grad(weighted)(jnp.asarray(X)), X)


def test_a_training_call_is_quantize_and_update():
    module, variables = build()
    output, changed = train(module, variables)
    state = CodebookState(*(variables["codebook"][name] for name in ("codebook_KE", "counts_K", "sums_KE")))
    expected, (state,) = quantize.quantize_and_update(X, [state], D, [0.9])
    np.testing.assert_array_equal(output.codes, expected.codes)
    for name, array in zip(("codebook_KE", "counts_K", "sums_KE"), state, strict=True):
        np.testing.assert_allclose(changed["codebook"][name], array, rtol=1e-5)


def test_separate_codebooks_take_one_decay_per_depth():
    decays = (0.5, 0.6, 0.7, 0.8)
    module, variables = build(use_shared_codebook=False, decay=decays)
    _, changed = train(module, variables)
    sums_D = changed["codebook"]["counts_K"].sum(-1)  # from 0: what the batch adds
    np.testing.assert_allclose(sums_D, [(1 - decay) * B * h * w for decay in decays], rtol=1e-5)


def test_restart_happens_with_the_switch_and_the_rng_stream_only():
    module, variables = build(codebook_size=40, depth=2)  # 40 codes and 30 vectors: some code stays unused
    without, _ = build(codebook_size=40, depth=2, use_restart=False)
    states = {
        "restart": train(module, variables, seed=1)[1]["codebook"],
        "other rng": train(module, variables, seed=2)[1]["codebook"],
        "no rng": train(module, variables)[1]["codebook"],
        "no switch": train(without, variables, seed=1)[1]["codebook"],
    }
    assert float(states["restart"]["counts_K"].min()) >= 0.9**2  # all began again at 1 at some depth
    assert float(states["no rng"]["counts_K"].min()) == 0
    np.testing.assert_array_equal(states["no rng"]["codebook_KE"], states["no switch"]["codebook_KE"])
    assert not np.array_equal(states["restart"]["codebook_KE"], states["other rng"]["codebook_KE"])


def test_restart_draws_other_vectors_at_every_depth():
    module, variables = build(use_shared_codebook=False, codebook_size=40, depth=2)
    same = jax.tree.map(lambda a: a.at[1].set(a[0]), variables)
    _, changed = train(module, same, x=jnp.zeros((1, E)).at[0].set(1e3), seed=1)
    # One vector and its residual are what all codes restart from, under different noise.
    noise = changed["codebook"]["sums_KE"] - changed["codebook"]["sums_KE"].mean(1, keepdims=True)
    assert not np.allclose(noise[0], noise[1], atol=1e-5)


def test_the_codebook_update_switch_reaches_the_update():
    states = []
    for order in ("sequential", "pooled"):
        module, variables = build(depth=2, codebook_update=order)
        states.append(train(module, variables)[1]["codebook"]["counts_K"])
    assert not np.allclose(*states)


def test_kmeans_places_the_codes_at_the_first_training_call_only():
    module, variables = build(depth=2, use_kmeans_init=True)
    plain, _ = build(depth=2)
    _, first = train(module, variables, seed=1)
    _, plain_first = train(plain, variables, seed=1)
    assert not np.allclose(first["codebook"]["codebook_KE"], plain_first["codebook"]["codebook_KE"], atol=1e-2)
    _, second = train(module, first, x=2 * X, seed=2)
    _, plain_second = train(plain, first, x=2 * X, seed=2)
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(plain_second), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # two programs, which XLA may round differently
    _, no_stream = train(module, variables)
    np.testing.assert_array_equal(
        no_stream["codebook"]["codebook_KE"], train(plain, variables)[1]["codebook"]["codebook_KE"]
    )


def test_kmeans_of_separate_codebooks_lowers_the_error_at_every_depth():
    module, variables = build(use_shared_codebook=False, use_kmeans_init=True, use_restart=False, decay=0.99)
    output, _ = train(module, variables, seed=1)
    errors_D = jnp.mean((X[..., None, :] - output.partial_sums) ** 2, axis=(0, 1, 2, 4))
    untrained_D = jnp.mean((X[..., None, :] - module.apply(variables, X).partial_sums) ** 2, axis=(0, 1, 2, 4))
    assert bool((jnp.diff(errors_D) < 0).all()) and float(errors_D[-1]) < 0.5 * float(untrained_D[-1])


@pytest.mark.parametrize("size", [K, 150])  # 120 vectors: fewer and more codes than vectors
def test_one_device_and_eight_give_the_same_numbers(size):
    module, variables = build(codebook_size=size)
    x = normal(8, h, w, E)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(variables, NamedSharding(mesh, P()))
    expected, state = train(module, variables, x, seed=1)
    actual, sharded_state = train(module, replicated, sharded, seed=1)
    assert len(actual.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(actual.codes, expected.codes)
    for a, b in zip(jax.tree.leaves(sharded_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_audio_frames_under_jit():
    module, variables = build()
    frames_BTE = normal(B, 11, E)
    output, changed = train(module, variables, frames_BTE, seed=1)
    assert output.codes.shape == (B, 11, D) and output.quantized.shape == (B, 11, E)
    state = changed["codebook"]["codebook_KE"]
    result = jax.jit(quantize.residual_quantize, static_argnums=2)(frames_BTE, state, D)
    summed = jax.jit(quantize.lookup)(result.codes, state).sum(-2)
    np.testing.assert_allclose(summed, result.quantized, atol=1e-5)


def test_bfloat16_vectors_are_quantised_in_float32():
    module, variables = build()
    x = jnp.asarray(X, jnp.bfloat16)
    output, expected = module.apply(variables, x), module.apply(variables, x.astype(jnp.float32))
    np.testing.assert_array_equal(output.codes, expected.codes)
    assert output.quantized.dtype == output.partial_sums.dtype == jnp.float32


MISTAKES = {
    "sizes of a shared codebook": (
        {"codebook_size": SIZES},
        r"^codebook_size: \(7, 5, 3, 2\) has one entry per depth, but the codebook is shared",
    ),
    "decays of a shared codebook": ({"decay": (0.9,) * D}, r"^decay: \(0.9, .*but the codebook is shared"),
    "too few sizes": (
        {"codebook_size": (7, 5), "use_shared_codebook": False},
        r"^codebook_size: \(7, 5\) has 2 entries for code depth 4; give one per depth$",
    ),
    "too few decays": (
        {"decay": (0.9,), "use_shared_codebook": False},
        r"^decay: .* has 1 entries for code depth 4",
    ),
    "update": (
        {"codebook_update": "later"},
        r"^codebook_update: 'later' is unknown; allowed are 'sequential' and 'pooled'$",
    ),
    "no codes": ({"codebook_size": 0}, r"^codebook_size: 0 must be at least 1$"),
    "no depth": ({"depth": 0}, r"^depth: 0 must be at least 1$"),
    "no length": ({"code_dim": 0}, r"^code_dim: 0 must be at least 1$"),
    "decay": ({"decay": 1.5}, r"^decay: 1.5 is outside \[0, 1\]$"),
    "one bad decay": ({"decay": (0.9, 0.9, -1, 0.9), "use_shared_codebook": False}, r"outside \[0, 1\]$"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake):
    settings, message = MISTAKES[mistake]
    module = ResidualQuantizer(**{"codebook_size": K, "code_dim": E, "depth": D, **settings})
    with pytest.raises(ValueError, match=message):
        quantize.check_settings(module)
    with pytest.raises(ValueError):
        module.init(jax.random.key(0), X)

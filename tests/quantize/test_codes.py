"""Search, lookup and soft codes of rq_jax.quantize; what training does is in test_quantize_training.py."""

import doctest

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import count_compilations
from goldens import make_goldens as oracle
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rq_jax import quantize
from rq_jax.quantize import codes as codes_module
from rq_jax.quantize import search

B, h, w, D, K, E = 2, 3, 5, 4, 7, 6
SIZES = (7, 5, 3, 2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CODEBOOKS = {
    "shared": jnp.asarray(normal(K, E, seed=1)),
    "stacked": jnp.asarray(normal(D, K, E, seed=2)),
    "unequal": tuple(jnp.asarray(normal(size, E, seed=3 + size)) for size in SIZES),
}


def tables_of(codebook):
    """One NumPy table per depth."""
    return [np.asarray(table) for table in ([codebook] * D if getattr(codebook, "ndim", 0) == 2 else codebook)]


@pytest.fixture(params=CODEBOOKS)
def codebook(request):
    return CODEBOOKS[request.param]


@pytest.fixture
def small_blocks(monkeypatch):
    """The codebook is read in blocks of 128 codes."""
    monkeypatch.setattr(search, "_SCORES_PER_BLOCK", 1)
    helpers.forget_searches()
    yield
    helpers.forget_searches()


# --- search ---------------------------------------------------------------------------------------


def test_nearest_codes_are_the_closest_rows():
    x_NE, codebook_KE = normal(11, E), normal(K, E, seed=1)
    codes_N = quantize.nearest_codes(x_NE, codebook_KE)
    assert codes_N.dtype == jnp.int32
    assert codes_N.tolist() == [oracle.nearest(x_E, codebook_KE) for x_E in x_NE]


def test_ties_go_to_the_first_index():
    codebook_KE = jnp.array([[9.0, 0], [1, 0], [-1, 0], [1, 0], [-1, 0]])
    assert quantize.nearest_codes(jnp.array([[1.0, 0], [-1, 0], [0, 3]]), codebook_KE).tolist() == [1, 2, 1]


def test_ties_across_blocks_go_to_the_first_index(small_blocks):
    codebook_KE = jnp.asarray(normal(300, E)).at[jnp.array([5, 205, 290])].set(7.0)
    assert quantize.nearest_codes(jnp.full((2, E), 7.0), codebook_KE).tolist() == [5, 5]


def test_block_search_equals_single_search(request):
    x_NE, codebook_KE = normal(23, E), normal(300, E, seed=1)  # 300 codes are 128 + 128 + 44
    single_N = quantize.nearest_codes(x_NE, codebook_KE)
    assert int(single_N.max()) >= 256, "no vector tests the last block"
    request.getfixturevalue("small_blocks")
    assert "scan" in str(jax.make_jaxpr(quantize.nearest_codes)(x_NE, codebook_KE))
    np.testing.assert_array_equal(quantize.nearest_codes(x_NE, codebook_KE), single_N)


def test_a_vector_far_from_all_codes_never_gets_a_padded_code(small_blocks):
    codebook_KE = jnp.asarray(normal(130, E)) + 50.0  # zero rows that pad the second block would be nearer
    assert int(quantize.nearest_codes(jnp.zeros((1, E)), codebook_KE)[0]) < 130


@helpers.full_optimization()
def test_search_memory_at_paper_size():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((65536, 256), (16384, 256))]
    compiled = jax.jit(quantize.nearest_codes).lower(*shapes).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes <= 512 * 2**20  # all scores at once are 4 GB


def products(jaxpr):
    """Every dot_general of a program, those of the programs inside it included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(part, "eqns"):
                yield from products(part)


@pytest.mark.parametrize("num_vectors", [15, 3 * 2**13], ids=["few", "in slices"])
def test_products_are_true_float32_whatever_the_default(num_vectors):
    x_NE, codebook_KE = jax.ShapeDtypeStruct((num_vectors, E), jnp.float32), jnp.asarray(normal(K, E))
    functions = {
        "search": lambda x: quantize.residual_quantize(x, codebook_KE, D),
        "draw": lambda x: quantize.draw_codes(x, codebook_KE, D, 0.5, jax.random.key(0)),
        "soft": lambda x: quantize.soft_codes(x, codebook_KE, D, 0.5)[0],
    }
    with jax.default_matmul_precision("default"):
        precisions = {
            name: {equation.params["precision"] for equation in products(jax.make_jaxpr(function)(x_NE).jaxpr)}
            for name, function in functions.items()
        }
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert precisions == dict.fromkeys(functions, {highest})


def test_search_is_float32_for_bfloat16_vectors():
    x_NE = jnp.asarray(normal(200, E), jnp.bfloat16)
    codebook_KE = normal(K, E, seed=1)
    expected = [oracle.nearest(x_E, codebook_KE) for x_E in np.asarray(x_NE, np.float32)]
    assert quantize.nearest_codes(x_NE, codebook_KE).tolist() == expected


# --- residual quantisation and lookup -------------------------------------------------------------


def test_residual_quantize_agrees_with_loops(codebook):
    x_NE = normal(9, E, seed=4)
    result = quantize.residual_quantize(x_NE, codebook, D)
    codes_ND, sums_NDE, _, _ = oracle.residual_quantize(x_NE, tables_of(codebook))
    np.testing.assert_array_equal(result.codes, codes_ND)
    np.testing.assert_allclose(result.partial_sums, sums_NDE, atol=1e-5)
    assert result.codes.dtype == jnp.int32


def test_partial_sums_are_running_sums_of_the_looked_up_vectors(codebook):
    x = normal(B, h, w, E)
    result = quantize.residual_quantize(x, codebook, D)
    vectors = quantize.lookup(result.codes, codebook)
    np.testing.assert_allclose(result.partial_sums, jnp.cumsum(vectors, -2), atol=1e-5)
    np.testing.assert_array_equal(result.quantized, result.partial_sums[..., -1, :])


def test_every_depth_leaves_the_least_error_that_one_code_can(codebook):
    x_NE = normal(9, E, seed=4)
    sums_NDE = np.asarray(quantize.residual_quantize(x_NE, codebook, D).partial_sums)
    residual_NE = x_NE
    for d, table_KE in enumerate(tables_of(codebook)):
        least_N = np.min(np.sum((residual_NE[:, None] - table_KE) ** 2, -1), -1)
        residual_NE = x_NE - sums_NDE[:, d]
        np.testing.assert_allclose(np.sum(residual_NE**2, -1), least_N, rtol=1e-4)


def test_with_a_zero_code_the_error_never_grows_with_depth():
    x_NE = normal(40, E)
    codebook_KE = jnp.asarray(normal(K, E, seed=1)).at[3].set(0.0)
    sums_NDE = quantize.residual_quantize(x_NE, codebook_KE, D).partial_sums
    errors_ND = jnp.linalg.norm(x_NE[:, None] - sums_NDE, axis=-1)
    assert bool((jnp.diff(errors_ND, axis=-1) <= 1e-6).all())
    assert bool((errors_ND[:, -1] < errors_ND[:, 0]).any())


@pytest.mark.parametrize("leading", [(B * h * w,), (B, h * w), (B, h, w)])
def test_leading_axes_do_not_matter(leading):
    x_NE = normal(B * h * w, E)
    flat = quantize.residual_quantize(x_NE, CODEBOOKS["shared"], D)
    shaped = quantize.residual_quantize(x_NE.reshape(*leading, E), CODEBOOKS["shared"], D)
    assert shaped.codes.shape == (*leading, D) and shaped.quantized.shape == (*leading, E)
    assert shaped.partial_sums.shape == (*leading, D, E)
    for a, b in zip(flat, shaped, strict=True):
        np.testing.assert_array_equal(a.reshape(-1), b.reshape(-1))


def test_depth_one_is_plain_vector_quantisation():
    x_NE, codebook_KE = normal(9, E), CODEBOOKS["shared"]
    result = quantize.residual_quantize(x_NE, codebook_KE, 1)
    codes_N = quantize.nearest_codes(x_NE, codebook_KE)
    np.testing.assert_array_equal(result.codes, codes_N[:, None])
    np.testing.assert_array_equal(result.quantized, codebook_KE[codes_N])
    np.testing.assert_array_equal(result.partial_sums, result.quantized[:, None])


@pytest.mark.parametrize("kind", ["stacked", "unequal"])
def test_lookup_of_fewer_codes_uses_the_first_tables(kind):
    codes = jnp.array([[1, 0, 1, 0], [6, 4, 2, 1]])
    vectors = quantize.lookup(codes, CODEBOOKS[kind])
    for d in range(D):
        np.testing.assert_array_equal(vectors[:, d], tables_of(CODEBOOKS[kind])[d][codes[:, d]])
    np.testing.assert_array_equal(quantize.lookup(codes[:, :2], CODEBOOKS[kind]), vectors[:, :2])


@pytest.mark.parametrize("bad", [-1, 5, 100])
def test_codes_outside_the_codebook_are_refused_or_nan(bad):
    codes = jnp.array([[1, 0, 1, 0], [6, bad, 2, 1]])
    with pytest.raises(ValueError, match=rf"^codes: {bad} at depth 1 is outside \[0, 5\), the codebook of that depth$"):
        quantize.lookup(codes, CODEBOOKS["unequal"])
    vectors = jax.jit(quantize.lookup)(codes, CODEBOOKS["unequal"])
    assert bool(jnp.isnan(vectors[1, 1]).all())
    assert int(jnp.isnan(vectors).sum()) == E


def test_check_codes_says_what_it_was_asked_to_check():
    quantize.check_codes(np.array([[6, 4, 2, 1]]), SIZES)
    with pytest.raises(ValueError, match=r"^prompt: 3 at depth 2 is outside \[0, 3\)"):
        quantize.check_codes(np.array([[6, 4, 3, 1]]), SIZES, "prompt")


def test_codebook_sizes():
    assert quantize.codebook_sizes(CODEBOOKS["shared"], 3) == (7, 7, 7)
    assert quantize.codebook_sizes(CODEBOOKS["stacked"], D) == (7, 7, 7, 7)
    assert quantize.codebook_sizes(CODEBOOKS["unequal"], D) == SIZES


SHORT = r"^vectors of length 5 do not fit a codebook of length 6$"
DEPTH = r"^depth: 3 does not match the 4 codebooks given; they must be as many$"
MISTAKES = {
    "nearest length": (lambda: quantize.nearest_codes(jnp.ones((2, 5)), CODEBOOKS["shared"]), SHORT),
    "residual length": (lambda: quantize.residual_quantize(jnp.ones((2, 5)), CODEBOOKS["unequal"], D), SHORT),
    "soft length": (lambda: quantize.soft_codes(jnp.ones((2, 5)), CODEBOOKS["stacked"], D, 0.5), SHORT),
    "stacked depth": (lambda: quantize.residual_quantize(jnp.ones((2, E)), CODEBOOKS["stacked"], 3), DEPTH),
    "tuple depth": (lambda: quantize.draw_codes(jnp.ones((2, E)), CODEBOOKS["unequal"], 3, 0.5), DEPTH),
    "no depth": (
        lambda: quantize.residual_quantize(jnp.ones((2, E)), CODEBOOKS["shared"], 0),
        r"^depth: 0 must be at least 1$",
    ),
    "too many codes": (
        lambda: quantize.lookup(jnp.zeros((2, 5), int), CODEBOOKS["stacked"]),
        r"^depth: 5 does not match the 4 codebooks given; they must be as many$",
    ),
    "temperature": (
        lambda: quantize.soft_codes(jnp.ones((2, E)), CODEBOOKS["shared"], D, 0.0),
        r"^temperature: 0.0 must be above 0; for the nearest codes use residual_quantize$",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_call_of_ones_own_is_one_program(codebook):
    x, rng = normal(3, E, seed=21), jax.random.key(0)  # of a shape that nothing else here has
    with count_compilations() as compiled:
        codes, _ = quantize.draw_codes(x, codebook, D, 0.5, rng)
        quantize.residual_quantize(x, codebook, D)
        quantize.lookup(codes, codebook)
        quantize.soft_labels(np.stack([x] * D, 1), codebook, 0.5)
    assert compiled.count == 4, compiled.names


# --- soft codes -----------------------------------------------------------------------------------


def test_soft_codes_agree_with_loops_and_sum_to_one(codebook):
    x_NE = normal(9, E, seed=4)
    soft_NDK, codes_ND = quantize.soft_codes(x_NE, codebook, D, 0.5)
    expected_codes, _, expected_soft, _ = oracle.residual_quantize(x_NE, tables_of(codebook))
    np.testing.assert_array_equal(codes_ND, expected_codes)
    np.testing.assert_allclose(soft_NDK, expected_soft, atol=1e-5)
    np.testing.assert_allclose(soft_NDK.sum(-1), 1.0, atol=1e-6)


def test_soft_codes_of_unequal_codebooks_are_padded_with_zero():
    draw = jax.jit(lambda x, rng: quantize.soft_codes(x, CODEBOOKS["unequal"], D, 5.0, rng))
    soft, codes = draw(normal(500, E), jax.random.key(0))
    assert soft.shape == (500, D, max(SIZES))
    for d, size in enumerate(SIZES):
        assert bool((soft[:, d, size:] == 0).all()) and bool((soft[:, d, :size] > 0).all())
        assert np.unique(codes[:, d]).tolist() == list(range(size))


def test_draw_codes_is_the_same_draw_and_soft_labels_rebuild_the_soft_codes(codebook):
    x, rng = normal(B, h, w, E), jax.random.key(3)
    soft, codes = jax.jit(lambda: quantize.soft_codes(x, codebook, D, 0.5, rng))()
    drawn, residuals = jax.jit(lambda: quantize.draw_codes(x, codebook, D, 0.5, rng))()
    np.testing.assert_array_equal(drawn, codes)
    np.testing.assert_allclose(quantize.soft_labels(residuals, codebook, 0.5), soft, atol=1e-6)
    np.testing.assert_allclose(quantize.soft_labels(residuals[:, 1:2], codebook, 0.5), soft[:, 1:2], atol=1e-6)
    before = x[..., None, :] - jnp.cumsum(quantize.lookup(codes, codebook), -2)
    np.testing.assert_allclose(residuals[..., 1:, :], before[..., :-1, :], atol=1e-5)
    np.testing.assert_array_equal(residuals[..., 0, :], x)
    assert not np.array_equal(codes, quantize.residual_quantize(x, codebook, D).codes), "nothing was drawn"


def test_draws_follow_the_soft_codes():
    N, x_E, table_KE = 20_000, normal(E, seed=5), np.asarray(CODEBOOKS["shared"])
    codes = np.asarray(quantize.draw_codes(jnp.tile(x_E, (N, 1)), table_KE, 2, 4.0, jax.random.key(1))[0])
    first_K = oracle.softmax(-oracle.distances(x_E, table_KE) / 4.0)
    for k in range(K):  # jointly: the second code given the first
        second_K = oracle.softmax(-oracle.distances(x_E - table_KE[k], table_KE) / 4.0)
        expected_K = N * first_K[k] * second_K
        counts_K = np.bincount(codes[codes[:, 0] == k, 1], minlength=K)
        assert np.sum((counts_K - expected_K) ** 2 / expected_K) < 35  # 7 degrees of freedom: p = 1e-5


def test_draws_across_blocks_follow_the_soft_codes(small_blocks):
    N, table_KE = 20_000, 0.1 * normal(300, E)
    codes = np.asarray(quantize.draw_codes(jnp.zeros((N, E)), jnp.asarray(table_KE), 1, 0.5, jax.random.key(1))[0])
    soft_K = oracle.softmax(-np.sum(table_KE.astype(float) ** 2, -1) / 0.5)
    counts_K = np.bincount(codes[:, 0], minlength=300)
    assert np.sum((counts_K - N * soft_K) ** 2 / (N * soft_K)) < 420  # 299 degrees of freedom: p = 4e-6


# --- transformations ------------------------------------------------------------------------------


def test_search_lookup_and_soft_codes_under_vmap(codebook):
    x_BTE = normal(B, 5, E)

    def both(x):
        result = quantize.residual_quantize(x, codebook, D)
        return result, quantize.lookup(result.codes, codebook), quantize.soft_codes(x, codebook, D, 0.5)

    mapped, plain = jax.jit(jax.vmap(both))(x_BTE), jax.jit(both)(x_BTE)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradient_of_lookup_counts_the_codes():
    codes = jnp.array([[0, 2, 2], [2, 1, 0]])
    gradient_KE = jax.grad(lambda table: quantize.lookup(codes, table).sum())(CODEBOOKS["shared"])
    np.testing.assert_array_equal(gradient_KE, np.tile([[2.0], [1], [3], [0], [0], [0], [0]], E))


def test_quantised_vectors_are_differentiable_in_the_codebook_only(codebook):
    x_NE = jnp.asarray(normal(3, E))

    def square(x, tables):
        return (quantize.residual_quantize(x, tables, D).quantized ** 2).sum()

    result = quantize.residual_quantize(x_NE, codebook, D)
    expected = [np.zeros_like(table) for table in tables_of(codebook)]
    for n in range(3):
        for d in range(D):
            expected[d][result.codes[n, d]] += 2 * np.asarray(result.quantized[n])
    gradient_x, gradient = jax.grad(square, argnums=(0, 1))(x_NE, codebook)
    assert not gradient_x.any()
    shared = getattr(codebook, "ndim", 0) == 2
    for actual, table in zip([gradient] if shared else gradient, [sum(expected)] if shared else expected, strict=True):
        np.testing.assert_allclose(actual, table, rtol=1e-4, atol=1e-5)


def test_gradients_of_soft_codes(codebook):
    x_NE, weight_DK = normal(2, E, seed=13), jnp.asarray(normal(D, K))
    assert oracle.residual_quantize(x_NE, tables_of(codebook))[3] > 0.2, "a small step would change a code"

    def soft(x, tables):
        return (quantize.soft_codes(x, tables, D, 4.0)[0] * weight_DK[None]).sum()

    check_grads(soft, (x_NE, codebook), order=1, modes="rev", eps=5e-3, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("codes_in_table", [K, 300])
def test_search_lookup_and_soft_codes_under_shard_map(codes_in_table, small_blocks):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x_BTE, table_KE = normal(8, 5, E), jnp.asarray(normal(codes_in_table, E, seed=1))

    def everything(x, table):
        result = quantize.residual_quantize(x, table, 3)
        return result, quantize.lookup(result.codes, table), quantize.soft_codes(x, table, 3, 0.5)

    draw = jax.shard_map(
        lambda x, table, rng: quantize.draw_codes(x, table, 3, 0.5, rng)[0],
        mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"),
    )  # fmt: skip
    drawn = jax.jit(draw)(x_BTE, table_KE, jax.random.key(0))
    assert drawn.shape == (8, 5, 3) and bool(((drawn >= 0) & (drawn < codes_in_table)).all())
    mapped = jax.shard_map(everything, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    sharded, plain = jax.jit(mapped)(x_BTE, table_KE), jax.jit(everything)(x_BTE, table_KE)
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- folding and doctests -------------------------------------------------------------------------


def test_fold_order_is_row_column_channel_and_unfold_inverts():
    latents = normal(B, 2 * h, 3 * w, 2)
    folded = np.asarray(quantize.fold_patches(latents, (h, w)))
    assert folded.shape == (B, h, w, 12)
    for r in range(2):
        for s in range(3):
            for c in range(2):
                np.testing.assert_array_equal(folded[..., (r * 3 + s) * 2 + c], latents[:, r::2, s::3, c])
    np.testing.assert_array_equal(quantize.unfold_patches(folded, (2 * h, 3 * w)), latents)


def test_doctests():
    results = [doctest.testmod(module) for module in (quantize, codes_module)]
    assert sum(result.attempted for result in results) >= 8 and not any(result.failed for result in results)

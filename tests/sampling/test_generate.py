"""generate() against the model's forward pass, its determinism and compile count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_transformer import CLASS, CONDS, KINDS, SIZES, TEXT, UNEQUAL, B, D, E, K, M, T, U, V, build, h, run, w

from benchmarks import hlo
from rq_jax.sampling import filter_logits, generate, rng_of_seed
from rq_jax.sampling.generate import _generate

RNG = jax.random.key(5)


def greedy_margin(logits):
    """Distance of the best to the second best logit, where there are two."""
    first, second = np.moveaxis(np.sort(logits)[..., -2:], -1, 0)[::-1]
    return np.min(first - second)


# --- agreement with the forward pass --------------------------------------------------------------

MODELS = {
    **{kind: (settings, CONDS[kind]) for kind, settings in KINDS.items()},
    "unequal": (UNEQUAL, None),
    "depth one": ({"code_shape": (h, w, 1)}, None),
}


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_sampling_is_greedy_in_the_forward_pass(kind):
    settings, cond = MODELS[kind]
    model, variables = build(**settings)
    codes = generate(model, variables, RNG, B, cond, temperature=0.0)
    assert codes.shape == (B, *model.code_shape) and codes.dtype == jnp.int32
    logits = run(model, variables, codes, cond).logits
    assert greedy_margin(logits) > 1e-5, "too close to compare codes"
    np.testing.assert_array_equal(codes, jnp.argmax(logits, -1))


def test_one_temperature_top_k_and_top_p_per_depth():
    model, variables = build()
    cases = {
        "temperature": [0.0, 9.0, 0.0, 0.0],
        "top_k": [1, K, 1, 1],
        "top_p": [0.0, 1.0, 0.0, 0.0],
    }
    for name, values in cases.items():
        codes = generate(model, variables, RNG, B, **{"temperature": 9.0, name: values})
        greedy = np.asarray(jnp.argmax(run(model, variables, codes).logits, -1) == codes).mean((0, 1, 2))
        assert greedy[[0, 2, 3]].tolist() == [1, 1, 1] and greedy[1] < 0.7, name


def test_sampled_codes_follow_the_filtered_distribution():
    n = 20_000
    model, variables = build(code_shape=(1, 1, 2), model_dim=4, num_heads=1, spatial_layers=1)
    for values in ({}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}):
        codes = np.asarray(generate(model, variables, RNG, n, **values))[:, 0, 0]
        every = jnp.stack(jnp.meshgrid(jnp.arange(K), jnp.arange(K), indexing="ij"), -1).reshape(-1, 1, 1, 2)
        logits = run(model, variables, every).logits.reshape(K, K, 2, K)
        first_K = np.asarray(filter_logits(logits[0, 0, 0], **values))
        second_KK = np.asarray(filter_logits(logits[:, 0, 1], **values))
        expected = n * first_K[:, None] * second_KK
        counts = np.zeros((K, K))
        np.add.at(counts, tuple(codes.T), 1)
        assert not counts[expected == 0].any()
        likely = expected > 5
        chi_square = np.sum((counts - expected)[likely] ** 2 / expected[likely])
        assert likely.sum() > 5 and chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_every_code_is_drawn_from_its_own_noise():
    model, variables = build()
    params = {**variables["params"], "classifier_MK": jnp.zeros((M, K)), "classifier_bias_K": jnp.zeros(K)}
    codes = np.asarray(generate(model, {**variables, "params": params}, RNG, 8)).reshape(8, T * D)
    same = (codes[:, :, None] == codes[:, None]).mean(0)[np.triu_indices(T * D, 1)]
    assert same.max() < 1 and abs(same.mean() - 1 / K) < 0.02  # uniform and independent


def test_codes_beyond_a_smaller_codebook_are_never_drawn():
    model, variables = build(**UNEQUAL)
    codes = np.asarray(generate(model, variables, RNG, 8, temperature=50.0))
    assert [np.unique(codes[..., d]).tolist() for d in range(D)] == [list(range(size)) for size in SIZES]


# --- determinism ----------------------------------------------------------------------------------


def test_the_codes_of_an_image_depend_on_its_id_alone():
    model, variables = build()
    eight = generate(model, variables, RNG, 8)
    assert len({codes.tobytes() for codes in np.asarray(eight)}) == 8
    np.testing.assert_array_equal(generate(model, variables, RNG, 8), eight)
    np.testing.assert_array_equal(generate(model, variables, RNG, 3), eight[:3])
    ids = np.array([6, 0, 3])
    np.testing.assert_array_equal(generate(model, variables, RNG, 3, image_ids=ids), eight[ids])
    np.testing.assert_array_equal(generate(model, variables, RNG, 1, image_ids=jnp.array([5])), eight[5:6])
    assert not np.array_equal(generate(model, variables, jax.random.key(6), 8), eight)


def test_ids_and_seeds_of_any_size_have_images_of_their_own():
    model, variables = build()
    ids = [1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    codes = np.asarray(generate(model, variables, RNG, 8, image_ids=ids))
    assert len({of_image.tobytes() for of_image in codes}) == 8
    on_device = generate(model, variables, RNG, 8, image_ids=jnp.array([-1, *range(7)], jnp.int32))
    assert not (np.asarray(on_device)[0] == codes[:-1]).all((1, 2, 3)).any()
    np.testing.assert_array_equal(on_device[2], codes[0])
    keys = [jax.random.key_data(rng_of_seed(seed)).tobytes() for seed in (*ids, 2**64, 2**64 + 1, 2**200)]
    assert len(set(keys)) == len(keys)
    for seed in (0, 5, 2**31 - 1):
        np.testing.assert_array_equal(jax.random.key_data(rng_of_seed(seed)), jax.random.key_data(jax.random.key(seed)))
    with pytest.raises(ValueError, match="^seed: -1 must be at least 0$"):
        rng_of_seed(-1)


def test_eight_devices_draw_the_same_codes():
    model, variables = build(**CLASS)
    cond = jnp.arange(8)
    expected = generate(model, variables, RNG, 8, cond, top_k=5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = jax.device_put(variables, NamedSharding(mesh, P()))
    ids = jax.device_put(jnp.arange(8), NamedSharding(mesh, P("data")))
    by_device = NamedSharding(mesh, P("data"))
    for settings in ({"image_ids": ids}, {"sharding": by_device}, {"image_ids": range(8), "sharding": by_device}):
        codes = generate(model, replicated, RNG, 8, cond, top_k=5, **settings)
        assert codes.sharding.is_equivalent_to(by_device, 4)
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5, "top_p": 0.9}, {"guidance": 2.0}], ids=lambda given: "+".join(given)
)
def test_devices_that_share_a_batch_exchange_nothing(filters):
    model, variables = build(**CLASS, use_null_cond="guidance" in filters)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def place(tree, *spec):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec))), tree
        )

    def draw(variables, rng, image_ids, cond, filters):
        return generate(model, variables, rng, 8, cond, image_ids=image_ids, **filters)

    images = place((jnp.arange(8), jnp.arange(8)), ("data", "fsdp"))
    arrays = jax.tree.map(jnp.asarray, filters)
    text = jax.jit(draw).lower(place(variables), place(RNG), *images, place(arrays)).compile().as_text()
    ops = hlo.count_compiled(text).ops
    assert f"s32[1,{h},{w},{D}]" in text and ops["while"]
    assert not set(ops) & {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"}


def test_changing_values_never_recompiles_and_giving_one_more_does():
    model, variables = build()
    batch = B + 3  # of this test alone: what another test compiled would not be counted
    filters = {"top_k": 7, "top_p": 0.5}
    generate(model, variables, RNG, batch)
    compiled = _generate._cache_size()
    generate(model, variables, RNG, batch, **filters)
    assert _generate._cache_size() == compiled + 1
    for values in (
        {"temperature": 0.5},
        {"temperature": 0},
        {"temperature": [0.1, 0.2, 0.3, 0.4], "top_k": None, "top_p": None},
        {"top_k": 10**6, "top_p": 1},
        {"top_k": [1, 2, 3, 4], "top_p": [0.1, 0.2, 0.3, 1.0]},
        {"image_ids": np.array([7, 9, 1, 0, 4])},
        {"prefix": jnp.zeros((batch, 0, D), int)},
    ):
        generate(model, variables, jax.random.key(len(values)), batch, **{**filters, **values})
        assert _generate._cache_size() == compiled + 1, values
    generate(model, variables, RNG, batch, prefix=jnp.zeros((batch, T, D), int))
    assert _generate._cache_size() == compiled + 2


def test_bfloat16_sampling():
    model, variables = build(dtype="bfloat16")
    codes = generate(model, variables, RNG, B)
    np.testing.assert_array_equal(generate(model, variables, RNG, B), codes)
    assert bool(((codes >= 0) & (codes < K)).all())


# --- prefix and guidance --------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 7, T])
def test_a_prefix_of_sampled_codes_is_continued_as_before(kept):
    model, variables = build(**CLASS)
    cond = CONDS["class"]
    codes = generate(model, variables, RNG, B, cond)
    prefix = codes.reshape(B, T, D)[:, :kept]
    np.testing.assert_array_equal(generate(model, variables, RNG, B, cond, prefix=prefix), codes)


def test_a_prefix_is_kept_and_matters():
    model, variables = build(**CLASS)
    cond = CONDS["class"]
    plain = generate(model, variables, RNG, B, cond, temperature=0.0).reshape(B, T, D)
    prefix = (plain[:, :7] + 1) % K
    codes = generate(model, variables, RNG, B, cond, temperature=0.0, prefix=prefix)
    np.testing.assert_array_equal(codes.reshape(B, T, D)[:, :7], prefix)
    greedy = jnp.argmax(run(model, variables, codes, cond).logits, -1).reshape(B, T, D)
    np.testing.assert_array_equal(codes.reshape(B, T, D)[:, 7:], greedy[:, 7:])
    assert not np.array_equal(codes.reshape(B, T, D)[:, 7:], plain[:, 7:])


@pytest.mark.parametrize("kind, kept", [("class", 0), ("text", 7)])
def test_guidance_mixes_the_logits_with_those_of_the_null_condition(kind, kept):
    model, variables = build(**KINDS[kind], use_null_cond=True)
    cond = CONDS[kind]
    prefix = jnp.asarray(np.random.default_rng(1).integers(0, K, (B, kept, D)))
    plain, one = (generate(model, variables, RNG, B, cond, guidance=g, prefix=prefix) for g in (None, 1.0))
    np.testing.assert_array_equal(one, plain)
    for guidance in (0.0, 2.5):
        codes = generate(model, variables, RNG, B, cond, guidance=guidance, temperature=0.0, prefix=prefix)
        with_cond = run(model, variables, codes, cond).logits
        without = run(model, variables, codes, jnp.full_like(cond, V)).logits
        mixed = (without + guidance * (with_cond - without)).reshape(B, T, D, K)[:, kept:]
        assert greedy_margin(mixed) > 1e-5
        np.testing.assert_array_equal(codes.reshape(B, T, D)[:, kept:], jnp.argmax(mixed, -1))
        np.testing.assert_array_equal(codes.reshape(B, T, D)[:, :kept], prefix)


def test_guidance_never_draws_beyond_a_smaller_codebook():
    model, variables = build(**UNEQUAL, **CLASS, use_null_cond=True)
    codes = np.asarray(generate(model, variables, RNG, 8, jnp.arange(8), guidance=2.0, temperature=50.0))
    assert (codes < np.array(SIZES)).all() and (codes.max((0, 1, 2)) == np.array(SIZES) - 1).all()


# --- mistakes -------------------------------------------------------------------------------------

NULL = {**CLASS, "use_null_cond": True}
MISTAKES = {
    "num_images": ({}, {"num_images": 0}, r"^num_images: 0 must be at least 1$"),
    "temperature": ({}, {"temperature": -1.0}, r"^temperature: -1.0 must be at least 0"),
    "top_k": ({}, {"top_k": 0}, r"^top_k: 0 must be at least 1"),
    "guidance nan": (
        NULL,
        {"cond": jnp.array([0, 1]), "guidance": float("nan")},
        r"^guidance: nan must be a finite number",
    ),
    "top_p": ({}, {"top_p": 2.0}, r"^top_p: 2.0 is outside \[0, 1\]"),
    "temperatures": (
        {},
        {"temperature": [1.0, 1.0]},
        r"^temperature: \[1.0, 1.0\] has shape \(2,\); give one value, or 4, one per depth$",
    ),
    "top_ks": ({}, {"top_k": [[1, 2, 3, 4]]}, r"^top_k: .* has shape \(1, 4\); give one value, or 4, one per depth$"),
    "image_ids": (
        {},
        {"image_ids": np.arange(3)},
        r"^image_ids: shape \(3,\) does not fit; allowed is \(2,\)$",
    ),
    "negative id": (
        {},
        {"image_ids": [0, -1]},
        r"^image_ids: \[0, -1\] must be whole numbers from 0 to 2\^64 - 1$",
    ),
    "larger id": ({}, {"image_ids": [0, 2**64]}, r"^image_ids: \[0, 18446744073709551616\] must be whole"),
    "fractional id": ({}, {"image_ids": np.array([0.0, 1.5])}, r"^image_ids: \[0.0, 1.5\] must be whole"),
    "guidance beyond": (
        NULL,
        {"cond": jnp.array([0, 1]), "guidance": 1e39},
        r"^guidance: 1e\+39 must be a finite number",
    ),
    "guidance": (
        CLASS,
        {"cond": jnp.array([0, 1]), "guidance": 2.0},
        r"^guidance: 2.0 needs a model trained with use_null_cond; leave it out for this one$",
    ),
    "no condition": (
        TEXT,
        {},
        r"^cond: this model needs a condition of shape \(2, 3\), none was given$",
    ),
    "condition": ({}, {"cond": jnp.array([0, 0])}, r"^cond: this model is unconditional; leave the condition out$"),
    "condition shape": (
        TEXT,
        {"cond": jnp.zeros((2, U + 1), int)},
        r"^cond: shape \(2, 4\) does not fit; allowed is \(2, 3\)$",
    ),
    "class": (CLASS, {"cond": jnp.array([0, V])}, r"^cond: class 9 is outside \[0, 9\)$"),
    "null class": (NULL, {"cond": jnp.array([V, 0])}, r"^cond: class 9 is outside \[0, 9\)$"),
    "token": (TEXT, {"cond": jnp.array([[0, 1, 2], [0, -1, 2]])}, r"^cond: condition token -1 is outside \[0, 9\)$"),
    "prefix shape": (
        {},
        {"prefix": jnp.zeros((B, T + 1, D), int)},
        r"^prefix: shape \(2, 16, 4\) does not fit; allowed is \(2, 0..15, 4\)$",
    ),
    "prefix grid": ({}, {"prefix": jnp.zeros((B, h, w, D), int)}, r"^prefix: shape \(2, 3, 5, 4\) does not fit"),
    "prefix code": (
        UNEQUAL,
        {"prefix": jnp.full((B, 1, D), 2)},
        r"^prefix: 2 at depth 3 is outside \[0, 2\), the codebook of that depth$",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_before_anything_compiles(mistake):
    settings, arguments, message = MISTAKES[mistake]
    model, variables = build(**settings)
    before = _generate._cache_size()
    with pytest.raises(ValueError, match=message):
        generate(model, variables, RNG, **{"num_images": B, **arguments})
    assert _generate._cache_size() == before


def test_a_forgotten_tokenizer_is_refused():
    for settings, table in (
        ({}, jnp.full((K, E), jnp.nan)),
        (UNEQUAL, tuple(jnp.full((n, E), jnp.nan) for n in SIZES)),
    ):
        model, variables = build(**settings)
        with pytest.raises(ValueError, match="^variables: the codebook holds NaN; put the tokenizer's codebook into"):
            generate(model, {**variables, "codebook": {"codebook_KE": table}}, RNG, B)


# --- tracing ---------------------------------------------------------------------------------------


def test_generate_traces_over_its_arguments():
    model, variables = build(**CLASS)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    arguments = {
        "cond": jax.ShapeDtypeStruct((B,), jnp.int32),
        "prefix": jax.ShapeDtypeStruct((B, 2, D), jnp.int32),
        "temperature": jax.ShapeDtypeStruct((D,), jnp.float32),
        "top_k": jax.ShapeDtypeStruct((), jnp.int32),
        "top_p": jax.ShapeDtypeStruct((), jnp.float32),
    }
    codes = jax.eval_shape(lambda v, rng, kw: generate(model, v, rng, B, **kw), abstract, RNG, arguments)
    assert codes.shape == (B, h, w, D) and codes.dtype == jnp.int32

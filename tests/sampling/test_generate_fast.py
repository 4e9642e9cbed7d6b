"""What makes sampling fast changes nothing: the draw, the threshold search, the growing cache, weights at rest."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_goldens as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_transformer import CLASS, CONDS, TEXT, UNEQUAL, B, D, T, build, h, run, w

from benchmarks import hlo, roofline
from rq_jax import losses
from rq_jax.nn.attention import InferenceWeight
from rq_jax.nn.inference_weights import for_inference
from rq_jax.sampling import draws, filter_logits, generate
from rq_jax.sampling.draws import draw as draw_codes
from rq_jax.sampling.draws import stretches
from rq_jax.sampling.filter import _index_of_nth, _ordered, _search
from rq_jax.sampling.generate import _generate

RNG = jax.random.key(11)
WIDE = {"codebook_size": 300, "model_dim": 16}  # more than two parts of 128 codes

# --- the whole against a plain sampler ------------------------------------------------------------


def pick(uniform, weights):
    """The first index whose cumulative sum is beyond the mark."""
    return int(np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right"))


def plain_generate(model, variables, cond, ids, **values):
    """Code after code from the whole forward pass, with loops for the filter and the draw, in float64."""
    (h, w, D), codebook_size = model.code_shape, max(model.codebook_sizes)
    codes = np.zeros((len(ids), h * w, D), np.int32)
    for i, image_id in enumerate(ids):
        uniforms = jax.random.uniform(jax.random.fold_in(RNG, image_id), (h * w, D, 2))
        for t in range(h * w):
            for d in range(D):
                one_cond = None if cond is None else cond[i : i + 1]
                logits = run(model, variables, jnp.asarray(codes[i].reshape(1, h, w, D)), one_cond).logits
                row = oracle.filter_row(np.asarray(logits).reshape(h * w, D, -1)[t, d], **values)
                table = np.pad(row, (0, -codebook_size % 128)).reshape(-1, 128)
                part = pick(float(uniforms[t, d, 0]), table.sum(0))
                codes[i, t, d] = 128 * pick(float(uniforms[t, d, 1]), table[:, part]) + part
    return codes.reshape(-1, h, w, D)


@pytest.mark.parametrize(
    ("switches", "cond", "values"),
    [
        (WIDE, None, {}),
        ({**WIDE, **CLASS}, CONDS["class"], {"temperature": 0.8, "top_k": 40, "top_p": 0.9}),
        (TEXT, CONDS["text"], {"top_p": 0.7}),
        (UNEQUAL, None, {"top_k": 3}),
    ],
)
def test_codes_are_those_of_a_plain_sampler(switches, cond, values):
    model, variables = build(**switches)
    ids = np.array([3, 0])
    expected = plain_generate(model, variables, cond, ids, **values)
    codes = generate(model, variables, RNG, 2, cond, image_ids=ids, **values)
    np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(codes)) > 3


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook_size", [5, 128, 301])
def test_draws_follow_the_probabilities(codebook_size):
    rng, n = np.random.default_rng(0), 200_000
    probabilities = rng.exponential(size=codebook_size) * (rng.random(codebook_size) < 0.6)
    probabilities[-1] = 0.5
    probabilities /= probabilities.sum()
    uniforms = jax.random.uniform(jax.random.key(1), (2, n))
    draw = jax.jit(jax.vmap(lambda u, p: draw_codes(u[:, None], p[None])[0], in_axes=(1, None)))
    codes = np.asarray(draw(uniforms, jnp.asarray(probabilities, jnp.float32)))
    counts, expected = np.bincount(codes, minlength=codebook_size), n * probabilities
    assert not counts[probabilities == 0].any()
    likely = expected > 5
    chi_square = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_code_of_probability_zero_is_never_drawn(seed):
    rng = np.random.default_rng(seed)
    weights = (rng.random((1, 300)) ** 8 * (rng.random((1, 300)) < 0.05)).astype(np.float32)
    weights[0, rng.integers(300)] = 1e-3
    for uniform in (0.0, rng.random(), np.nextafter(np.float32(1), np.float32(0))):
        code = int(draw_codes(jnp.full((2, 1), uniform, jnp.float32), weights)[0])
        assert weights[0, code] > 0


draw_codes = jax.jit(draw_codes)

# --- the threshold search -------------------------------------------------------------------------


@functools.cache
def compiled_filter():
    return jax.jit(filter_logits)


@given(st.integers(0, 10_000), st.sampled_from(["normal", "ties", "peaked", "masked", "wide", "equal"]))
@settings(max_examples=120, deadline=None)
def test_the_filter_is_that_of_sorting(seed, kind):
    """Against loops over sorted values, wherever rounding cannot decide."""
    rng, codebook_size = np.random.default_rng(seed), 200
    logits = rng.normal(size=codebook_size) * 10 ** rng.uniform(-2, 1)
    if kind == "ties":
        logits = np.round(2 * rng.normal(size=codebook_size)) / 2
    elif kind == "peaked":
        logits[rng.integers(codebook_size, size=3)] += 20
    elif kind == "masked":
        logits[rng.random(codebook_size) < 0.7] = -np.inf
        logits[7] = 0.3
    elif kind == "wide":
        logits = logits * 10 ** rng.uniform(0, 30, codebook_size)
    elif kind == "equal":
        logits[:] = -3.25
    logits = logits.astype(np.float32)
    top_k, top_p = int(rng.integers(1, codebook_size + 5)), float(np.float32(rng.random()))
    expected = oracle.filter_row(logits, 1.0, top_k, top_p)
    actual = np.asarray(compiled_filter()(logits, 1.0, top_k, top_p))
    np.testing.assert_array_equal(
        np.asarray(compiled_filter()(logits, 1.0, top_k, 1.0)) > 0, oracle.filter_row(logits, 1.0, top_k) > 0
    )
    before = oracle.filter_row(logits, 1.0, top_k)
    sums = np.cumsum(np.sort(before)[::-1])
    if np.abs(sums - top_p).min() < 1e-5:
        assert abs((actual > 0).sum() - (expected > 0).sum()) <= 1 + (np.abs(sums - top_p) < 1e-5).sum()
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-7)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_one_and_three_bits_a_round_find_the_threshold(seed):
    """A CPU searches one bit a round and accelerators three; weights of whole numbers leave nothing to rounding."""
    rng = np.random.default_rng(seed)
    values = (rng.integers(-5, 6, 150) * 10.0 ** rng.integers(-20, 20)).astype(np.float32)
    values[rng.random(150) < 0.2] = -np.inf
    weights = np.where(values > 0, 3, 1)
    sums = np.array([weights[values >= value].sum() for value in values])
    target = rng.integers(1, sums.max() + 1)
    expected = values[sums >= target].max()
    for bits in (1, 3):
        found = compiled_search(bits)(values[None], jnp.full((1, 1), target, jnp.float32))
        assert values[np.asarray(_ordered(values) >= found[0])].min() == expected, bits
        nothing = compiled_search(bits)(values[None], jnp.full((1, 1), jnp.inf))
        assert int(nothing[0, 0]) == 0


@pytest.mark.parametrize("length", [1, 5, 128, 300])
def test_the_index_of_the_nth_marked_item(length):
    marked = np.random.default_rng(0).random((6, length)) < 0.3
    for n in (1, 2, length // 4 + 1, np.inf):
        indices = np.asarray(_index_of_nth(jnp.asarray(marked), jnp.full((6, 1), n, jnp.float32)))[:, 0]
        for row, index in zip(marked, indices, strict=True):
            where = np.flatnonzero(row)
            assert index == where[n - 1] if n <= len(where) else index >= length


@functools.cache
def compiled_search(bits):
    search = functools.partial(_search, lambda values: jnp.where(values > 0, 3.0, 1.0), bits=bits)
    return jax.jit(lambda values, target: search(_ordered(values), target))


@pytest.mark.parametrize(
    ("dtype", "short"), [("float32", "f32"), pytest.param("bfloat16", "bf16", marks=pytest.mark.slow)]
)
@helpers.full_optimization()
def test_the_program_sorts_nothing_makes_no_noise_in_the_loop_and_copies_no_cache(dtype, short):
    model, variables = build(**WIDE, **CLASS, dtype=dtype)
    program = jax.jit(lambda v, k, p: generate(model, v, RNG, B, CONDS["class"], top_k=k, top_p=p))
    compiled = program.lower(variables, 5, 0.9).compile()
    counts = hlo.count_compiled(compiled.as_text())
    assert "sort" not in counts.ops and not counts.loop_ops.get("rng-bit-generator", 0)
    assert counts.loop_ops["while"] and counts.unknown_loops == 0 and "conditional" not in counts.ops
    copied = set(re.findall(r"= (\S+?)(?:\{[^}]*\})? copy\(", compiled.as_text()))
    assert (
        copied and not {f"{short}[{B},4,{rows},4]" for rows in range(1 + D, 2 + T)} & copied
    )  # no cache is, at any step
    plain = jax.jit(lambda v: generate(model, v, RNG, B, CONDS["class"])).lower(variables).compile()
    work = sum(stage.flops for stage in roofline.sampling_work(model, B, "float32").values())
    counts = hlo.count_compiled(plain.as_text())
    assert counts.flops == pytest.approx(work, rel=0.1)
    assert not counts.loop_ops.get("while", 0)  # without a filter nothing searches for its threshold
    whole = jax.make_jaxpr(program)(variables, 5, 0.9).jaxpr
    loops = [equation for equation in helpers.equations(whole) if equation.primitive.name == "scan"]
    assert loops and "random_bits" in names(whole)
    assert not any({"random_bits", "threefry2x32", "sort"} & names(loop.params["jaxpr"].jaxpr) for loop in loops)


def names(jaxpr):
    return {equation.primitive.name for equation in helpers.equations(jaxpr)}


# --- the growing cache ----------------------------------------------------------------------------


def test_stretches_cover_every_position_once():
    for start, end, share in ((0, 64, 0.0), (0, 64, 0.36), (0, 64, 5.0), (17, 64, 5.0), (63, 64, 5.0), (0, 1, 5.0)):
        parts = stretches(start, end, share)
        assert [p for a, b in parts for p in range(a, b)] == list(range(start, end))
    assert stretches(0, 64, 0.0) == [(0, 64)]
    assert stretches(0, 64, 0.36) == [(0, 32), (32, 64)]
    assert stretches(0, 64, 5.0) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert stretches(20, 64, 5.0) == [(20, 32), (32, 48), (48, 64)]


# --- weights at rest ------------------------------------------------------------------------------


@functools.cache
def resting(dtype, **switches):
    """A model whose logits spread as a trained model's do, with its variables as drawn and at rest."""
    model, variables = build(model_dim=64, code_shape=(h, w, 2), codebook_size=61, **switches)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.2 * x if "blocks" in str(path) or "classifier" in str(path) else x, variables["params"]
    )
    variables = {**variables, "params": params}
    return model, variables, model.for_inference(variables, dtype)


@pytest.mark.parametrize(
    "switches",
    [
        (),
        pytest.param((("use_shared_classifier", False),), marks=pytest.mark.slow),
        pytest.param((("use_attention_bias", False),), marks=pytest.mark.slow),
    ],
)
def test_float32_at_rest_is_the_model_itself(switches):
    model, variables, rest = resting("float32", **dict(switches))
    codes = jax.random.randint(jax.random.key(0), (B, h, w, 2), 0, 61)
    np.testing.assert_allclose(
        run(model, rest, codes).logits, run(model, variables, codes).logits, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(generate(model, rest, RNG, B), generate(model, variables, RNG, B))
    again = model.for_inference(rest)
    assert jax.tree.structure(again) == jax.tree.structure(rest)
    down = rest["params"]["spatial_stack"]["blocks"][1]["down_FM"]
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(down.values.T, variables["params"]["spatial_stack"]["blocks"]["down_FM"][1])
    elsewhere = model.for_inference(variables, platform="gpu"), model.clone(dtype="bfloat16").for_inference(variables)
    for other in elsewhere:
        assert not isinstance(other["params"]["spatial_stack"]["blocks"][1]["down_FM"], InferenceWeight)


@pytest.mark.parametrize(("dtype", "distance", "loss_change"), [("bfloat16", 0.01, 1e-3), ("int8", 0.02, 5e-3)])
@pytest.mark.parametrize("switches", [(), pytest.param((("use_shared_classifier", False),), marks=pytest.mark.slow)])
def test_narrow_weights_keep_the_distribution(dtype, distance, loss_change, switches):
    model, variables, rest = resting(dtype, **dict(switches))
    codes = generate(model, variables, RNG, 64)
    logits, narrow = run(model, variables, codes).logits, run(model, rest, codes).logits
    assert narrow.dtype == jnp.float32
    first, first_narrow = jax.nn.softmax(logits[0, 0, 0, 0]), jax.nn.softmax(narrow[0, 0, 0, 0])
    assert 0 < float(jnp.abs(first - first_narrow).sum() / 2) < distance
    loss, narrow_loss = losses.cross_entropy(logits, codes).mean(), losses.cross_entropy(narrow, codes).mean()
    assert abs(float(narrow_loss / loss) - 1) < loss_change
    # The sampler computes with the same rounded weights.
    drawn = generate(model, rest, RNG, 64)
    assert (np.asarray(drawn[:, 0, 0, 0]) == np.asarray(codes[:, 0, 0, 0])).mean() > 0.9
    greedy = generate(model, rest, RNG, 64, temperature=0.0)
    again = run(model, rest, greedy).logits
    margin = jnp.take_along_axis(again, greedy[..., None], -1)[..., 0] - again.max(-1)
    assert float(margin.min()) > (-1e-4 if dtype == "int8" else -0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_is_read_at_every_code_is_narrow_and_nothing_else(dtype):
    model, variables, rest = resting(dtype)
    blocks = rest["params"]["spatial_stack"]["blocks"]
    assert isinstance(blocks, tuple) and len(blocks) == model.spatial_layers
    flat = dict(jax.tree_util.tree_leaves_with_path(rest["params"]))
    assert {str(x.dtype) for x in flat.values()} == {"float32", "bfloat16" if dtype == "bfloat16" else "int8"}
    weight = blocks[1]["up_MF"]
    assert weight.values.shape == (256, 64)
    weight = (np.asarray(weight.values) * (1 if dtype == "bfloat16" else np.asarray(weight.scales)[:, None])).T
    original = variables["params"]["spatial_stack"]["blocks"]["up_MF"][1]
    np.testing.assert_allclose(weight, original, atol=float(jnp.abs(original).max()) / 100)
    assert blocks[0]["norm1"]["scale"].dtype == jnp.float32


def test_int8_rounds_each_output_channel_by_itself():
    weight = np.random.default_rng(0).normal(size=(2, 3, 5, 7)) * np.array([1, 10, 0, 1000, 1, 1, 1])
    stored = InferenceWeight.create(weight, "int8", num_axes=2, num_stacked=1)
    assert stored.values.shape == (2, 7, 15) and stored.scales.shape == (2, 7)
    np.testing.assert_allclose(stored.scales, np.abs(weight).max((1, 2)) / 127, rtol=1e-6)
    error = np.abs(
        np.asarray(stored.values) * np.asarray(stored.scales)[..., None] - np.moveaxis(weight.reshape(2, 15, 7), 1, -1)
    )
    assert (error <= 0.5001 * np.asarray(stored.scales)[..., None]).all()


def test_an_unknown_dtype_at_rest_is_refused():
    with pytest.raises(ValueError, match="^dtype: 'int4' is unknown; allowed are 'float32', 'bfloat16' and 'int8'$"):
        for_inference(build()[1], "int4")
    rest = for_inference(build()[1], "int8")
    assert jax.tree.structure(for_inference(rest)) == jax.tree.structure(rest)
    with pytest.raises(ValueError, match="^dtype: 'bfloat16' asked of weights that are narrow already; start from"):
        for_inference(rest, "bfloat16")


def test_single_rows_with_bfloat16_weights():
    """One image alone takes another product than several; both give its codes."""
    model, _, rest = resting("bfloat16")
    codes = generate(model, rest, RNG, 1, temperature=0.0)
    assert bool(jnp.isfinite(run(model, rest, codes).logits).all())
    np.testing.assert_array_equal(codes[0], generate(model, rest, RNG, 3, temperature=0.0)[0])


# --- last, since it forgets the compiled programs -------------------------------------------------


@pytest.mark.parametrize("kind", ["none", pytest.param("text", marks=pytest.mark.slow)])
def test_a_cache_that_grows_in_stretches_changes_no_code(kind, monkeypatch):
    model, variables = build(**({} if kind == "none" else TEXT))
    monkeypatch.setattr(draws, "_MIN_STRETCH", 100)
    draw = lambda **more: jax.jit(lambda: generate(model, variables, RNG, B, CONDS[kind], **more))()  # noqa: E731
    whole = draw()
    monkeypatch.setattr(draws, "_MIN_STRETCH", 2)
    monkeypatch.setattr(draws, "_MAX_STRETCHES", 5)
    _generate.clear_cache()
    np.testing.assert_array_equal(draw(), whole)
    np.testing.assert_array_equal(draw(prefix=whole.reshape(B, T, D)[:, :7]), whole)
    _generate.clear_cache()

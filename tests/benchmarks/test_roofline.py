"""benchmarks.roofline and rq_jax.models.flops: closed forms against traced and compiled programs of the real models, and the paper's sizes."""

import functools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo, roofline
from configs import rqtransformer, rqvae
from rq_jax import models, quantize, sampling
from rq_jax.devices.peaks import Peaks, device_peaks
from rq_jax.models.flops import BACKWARD, Work, count_traced, decoder_work, encoder_work, search_work, transformer_flops

H100 = device_peaks("NVIDIA H100 80GB HBM3")
Shape = jax.ShapeDtypeStruct
B = 3


def make_model(**settings):
    small = dict(
        codebook_size=96, code_shape=(2, 4, 3), code_dim=12, model_dim=56, num_heads=2, spatial_layers=3,
        depth_layers=2, cond_vocab_size=10,
    )  # fmt: skip
    return models.create("rqtransformer", **small | settings)


def make_tokenizer(**settings):
    small = dict(
        image_size=8, code_shape=(4, 4, 3), code_dim=24, codebook_size=13, width=16, width_multipliers=(1, 2),
        num_res_blocks=1, attention_resolutions=(), z_channels=8,
    )  # fmt: skip
    return models.create("rqvae", **small | settings)


def paper_model(preset, code_shape=(8, 8, 4), codebook_size=16384):
    settings = dict(rqtransformer.get_config(preset).model)
    settings |= {"code_shape": code_shape, "codebook_size": codebook_size, "code_dim": 256}
    return models.create(**settings)


@helpers.full_optimization()
def compiled_text(function, *args):
    # The text is that of XLA's own optimisations; machine code, which nobody runs, may be slow.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options).as_text()


# --- the paper's sizes ---


def test_huge_model_by_part():
    huge = paper_model("throughput_huge")
    flops = transformer_flops(huge)
    assert {name: round(value / 1e9) for name, value in flops.items()} == {
        "spatial": 153,
        "depth": 87,
        "classifier": 13,
    }
    assert sum(flops.values()) / 1e9 == pytest.approx(253, abs=0.5)
    read = sum(roofline.weights_read(huge, "bfloat16").values())
    assert read / 1e9 == pytest.approx(252, abs=0.5)
    assert 1e3 * read / H100.bandwidth == pytest.approx(75, abs=0.5)


@pytest.mark.parametrize(("preset", "gflops"), [("throughput_huge", 758), ("imagenet256_3800m", 2061)])
def test_training_is_three_forward_passes(preset, gflops):
    flops = transformer_flops(paper_model(preset), train=True)
    assert sum(flops.values()) / 1e9 == pytest.approx(gflops, abs=1)


@pytest.mark.parametrize(
    ("preset", "code_shape", "weights", "ms"),
    [
        ("throughput_huge", (8, 8, 4), "bfloat16", {1: 75.4, 100: 0.937, 200: 0.561, 500: 0.362}),
        ("throughput_huge", (8, 8, 4), "int8", {100: 0.561, 200: 0.387, 500: 0.313}),
        ("throughput_vqgan_huge", (16, 16, 1), "bfloat16", {100: 5.04, 200: 3.99, 500: 3.35}),
    ],
)
def test_roofline_of_sampling_on_an_h100(preset, code_shape, weights, ms):
    model = paper_model(preset, code_shape)
    for batch, expected in ms.items():
        least = roofline.roofline(roofline.sampling_work(model, batch, weights), H100)
        assert 1e3 * least.seconds / batch == pytest.approx(expected, rel=2e-3)
        assert least.bound == "bandwidth"


def test_decoder_of_the_paper():
    tokenizer = models.create(**rqvae.get_config("imagenet256").model)
    assert decoder_work(tokenizer).flops / 1e9 == pytest.approx(250, abs=0.5)


# --- closed forms against programs ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cond_vocab_size": 1},
        {"code_shape": (2, 4, 1), "depth_layers": 0},
        {"use_tokenizer_input": False, "use_tokenizer_depth_input": False},
        {"cond_length": 6},
    ],
)
def test_forward_pass(settings):
    model = make_model(**settings)
    variables, (codes, cond) = models.abstract_variables(model), model.example_inputs(B)
    counted = count_traced(model.apply, variables, codes, cond)
    (T, D), M, U = (math.prod(model.code_shape[:2]), model.code_shape[2]), model.model_dim, model.cond_length
    expected = sum(transformer_flops(model).values())
    if U > 1:
        expected += transformer_flops(model, train=True)["condition"] / 3
    # Without a cache attention also multiplies what its mask hides, and the last position is embedded and dropped.
    hidden = {model.spatial_layers: (U + T - 1, 1), model.depth_layers: (D, T)}
    expected += sum(layers * times * 4 * M * S * (S - 1) / 2 for layers, (S, times) in hidden.items())
    expected += 2 * model.code_dim * M * model.use_tokenizer_input
    assert counted.flops == B * expected
    assert counted.unknown_loops == 0


def test_backward_pass_is_twice_the_forward_pass():
    model = make_model(residual_dropout=0.0, num_heads=1)
    variables, (codes, cond) = models.abstract_variables(model), model.example_inputs(B)

    def loss(params, variables):
        return model.apply({**variables, "params": params}, codes, cond, train=True).logits.sum()

    forward = count_traced(loss, variables["params"], variables)
    both = count_traced(jax.grad(loss), variables["params"], variables)
    # The code vectors at the input are constants: no gradient goes there.
    assert both.flops == pytest.approx((1 + BACKWARD) * forward.flops, rel=0.01)


def sampler(model, **settings):
    """A function that draws, and shapes of its arguments: the filter's values are traced, as in use."""

    def draw(variables, rng, cond, temperature, top_k, top_p):
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return sampling.generate(model, variables, rng, B, cond, **filters, **settings)

    rng = jax.eval_shape(lambda: jax.random.key(0))
    numbers = Shape((), jnp.float32), Shape((), jnp.int32), Shape((), jnp.float32)
    return draw, (models.abstract_variables(model), rng, Shape((B, 1), jnp.int32), *numbers)


def test_compiled_sampler_does_what_arithmetic_says_and_sorts_nothing():
    model = make_model(code_shape=(2, 3, 2), spatial_layers=2, depth_layers=1)
    draw, args = sampler(model)
    expected = sum(part.flops for part in roofline.sampling_work(model, B, "float32").values())
    for counts in (count_traced(draw, *args), hlo.count_compiled(compiled_text(draw, *args))):
        assert counts.flops == pytest.approx(expected, rel=0.1)
        assert counts.loop_ops["sort"] == counts.loop_ops["top_k"] == counts.loop_ops["topk"] == 0
        assert sum(counts.loop_ops[name] for name in ("dot", "dot_general")) > math.prod(model.code_shape)


def test_sampler_under_guidance():
    model = make_model(use_null_cond=True)
    draw, args = sampler(model, guidance=2.0)
    expected = sum(part.flops for part in roofline.sampling_work(model, B, "float32", guidance=True).values())
    assert count_traced(draw, *args).flops == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("gradient", [False, True])
def test_autoencoder(gradient):
    model = make_tokenizer(code_shape=(4, 4, 2))
    variables, images = models.abstract_variables(model), Shape((B, 8, 8, 3), jnp.float32)

    def reconstruct(params, variables, images):
        return model.apply({**variables, "params": params}, images).reconstruction.sum()

    function = jax.grad(reconstruct) if gradient else reconstruct
    args = variables["params"], variables, images
    traced, compiled = count_traced(function, *args), hlo.count_compiled(compiled_text(function, *args))
    coder = encoder_work(model, B).flops + decoder_work(model, B).flops
    search = search_work(B * 16, 24, 13, 2).flops
    assert compiled.flops == pytest.approx(traced.flops, rel=0.01)
    assert traced.flops == pytest.approx(coder * (3 if gradient else 1) + search, rel=0.02 if gradient else 1e-9)


def test_search():
    x, codebook = Shape((40, 6), jnp.float32), Shape((11, 6), jnp.float32)
    counted = count_traced(lambda x, codebook: quantize.residual_quantize(x, codebook, 3), x, codebook)
    work = search_work(40, 6, 11, 3)
    assert counted.flops == work.flops
    assert work.bytes == 4 * 3 * (11 * 6 + 2 * 40 * 6)


# --- bytes ---


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_weights_are_those_of_the_model(dtype, size):
    model = make_model()
    params = models.abstract_variables(model)["params"]

    def num_weights(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = ("qkv_M3NA", "out_NAM", "up_MF", "down_FM")
        return sum(leaf.size for path, leaf in leaves if path[-1].key in names)

    T, D = 8, 3
    assert roofline.weights_read(model, dtype) == {
        "spatial": T * size * num_weights(params["spatial_stack"]),
        "depth": T * D * size * num_weights(params["depth_stack"]),
        "classifier": T * D * size * params["classifier_MK"].size,
    }


def test_cache():
    model, rows_read = make_model(cond_length=6), {"spatial": 0, "depth": 0}
    init_cache = functools.partial(model.apply, method=lambda model: model.init_cache(B))
    cache = jax.eval_shape(init_cache, models.abstract_variables(model))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache) if leaf.ndim)
    assert B * roofline.cache_size(model, "float32") == kept
    for position in range(8):
        rows_read["spatial"] += 6 + position
        rows_read["depth"] += sum(range(1, 3 + 1))
    row, traffic = 2 * 56 * 2, roofline.cache_traffic(model, "bfloat16")
    assert traffic["spatial"] == 3 * row * (rows_read["spatial"] + 6 + 8 - 1)
    assert traffic["depth"] == 2 * row * (rows_read["depth"] + 8 * 3)


def test_bytes_of_a_program_are_operands_and_results():
    x, weight = Shape((5, 7), jnp.float32), Shape((7, 11), jnp.bfloat16)
    counted = count_traced(lambda x, weight: jnp.dot(x, weight.astype(jnp.float32)), x, weight)
    assert (counted.flops, counted.bytes) == (2 * 5 * 7 * 11, 4 * (5 * 7 + 7 * 11 + 5 * 11))


def test_guidance_doubles_all_but_the_weights():
    model = make_model(use_null_cond=True)
    plain, guided = (roofline.sampling_work(model, B, "int8", guidance) for guidance in (False, True))
    read = roofline.weights_read(model, "int8")
    for name in plain:
        assert guided[name].flops == 2 * plain[name].flops
        assert guided[name].bytes - read[name] == 2 * (plain[name].bytes - read[name])


@pytest.mark.parametrize(
    ("dtype", "weights", "products"),
    [
        ("float32", "float32", "float32"), ("float32", "int8", "float32"), ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"), ("bfloat16", "int8", "bfloat16"),
    ],
)  # fmt: skip
def test_dtype_of_the_products(dtype, weights, products):
    work = roofline.sampling_work(make_model(dtype=dtype), B, weights)
    assert {part.dtype for part in work.values()} == {products}


# --- rooflines and devices ---


def test_stages_run_one_after_another():
    peaks = Peaks("toy", {"float32": 10.0, "bfloat16": 20.0}, 5.0)
    stages = {"a": Work(100.0, 5.0), "b": Work(20.0, 100.0, "bfloat16")}
    assert roofline.roofline(stages, peaks) == (10.0 + 20.0, "bandwidth", 10.0 + 1.0)
    assert roofline.roofline({"a": stages["a"] * 3, "b": stages["b"]}, peaks) == (50.0, "compute", 31.0)
    assert roofline.roofline(stages, peaks.times(2)).seconds == 15.0
    assert roofline.roofline({"a": stages["a"]}, peaks).seconds == 10.0
    assert roofline.roofline({"a": Work(100.0, 5.0, "bfloat16")}, peaks).seconds == 5.0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", None), ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("NVIDIA A100-SXM4-40GB", "A100 40 GB"), ("TPU v4", "TPU v4"),
        ("TPU v4 lite", None), ("TPU v5 lite", "TPU v5e"), ("TPU v5e", "TPU v5e"), ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"), ("TPU v6 lite", "TPU v6e"), ("cpu", None), ("NVIDIA A10", None),
    ],
)  # fmt: skip
def test_devices(kind, name):
    peaks = device_peaks(kind)
    assert (peaks and peaks.name) == name
    if peaks:
        assert peaks.source == "table" and 1e12 < peaks.flops["float32"] <= peaks.flops["bfloat16"]
        assert 5e11 < peaks.bandwidth < 1e13


# --- counting programs ---


def looped(x):
    """Five rounds of seven rounds of a product and a sort."""
    inner = lambda _, x: jnp.sort(x @ x)  # noqa: E731
    return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.fori_loop(0, 7, inner, x), x)


def test_trip_counts_are_multiplied():
    x = Shape((6, 6), jnp.float32)
    for counts in (count_traced(looped, x), hlo.count_compiled(compiled_text(looped, x))):
        assert counts.flops == 35 * 2 * 6**3
        assert counts.ops["sort"] == counts.loop_ops["sort"] == 35
        assert counts.unknown_loops == 0


def test_what_stands_outside_loops_is_no_loop_op():
    x = Shape((6, 6), jnp.float32)
    for counts in (
        count_traced(lambda x: looped(jnp.sort(x)), x),
        hlo.count_compiled(compiled_text(lambda x: looped(jnp.sort(x)), x)),
    ):
        assert (counts.ops["sort"], counts.loop_ops["sort"]) == (36, 35)


def test_branches_and_loops_of_unknown_length():
    def function(x, n):
        x = jax.lax.cond(n > 3, lambda x: x @ x @ x, lambda x: x @ x, x)
        return jax.lax.while_loop(lambda state: state[1] > 0, lambda state: (state[0] @ x, state[1] - 1), (x, n))[0]

    args = Shape((6, 6), jnp.float32), Shape((), jnp.int32)
    for counts in (count_traced(function, *args), hlo.count_compiled(compiled_text(function, *args))):
        assert counts.flops == 3 * 2 * 6**3
        assert counts.unknown_loops == 1


def test_recomputation_counts():
    x = Shape((6, 6), jnp.float32)
    plain, remat = (lambda x: jnp.sum(jnp.sin(x @ x) @ x)), jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x) @ x))
    plain, remat = (count_traced(jax.grad(function), x).flops for function in (plain, remat))
    assert remat > plain


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 9, 10, 4), (3, 3, 4, 6), {"window_strides": (2, 2), "padding": ((0, 1), (0, 1))}),
        ((2, 9, 10, 4), (3, 3, 2, 6), {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2}),
        ((2, 9, 10, 4), (3, 3, 4, 6), {"window_strides": (1, 1), "padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 2)}),
    ],
)
def test_convolutions(shape, kernel, options):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    args = Shape(shape, jnp.float32), Shape(kernel, jnp.float32)
    out = jax.eval_shape(conv, *args)
    zeros = math.prod(options.get("lhs_dilation", (1,)))
    expected = 2 * out.size * 9 * kernel[2] / zeros
    assert count_traced(conv, *args).flops == expected
    assert hlo.count_compiled(compiled_text(conv, *args)).flops == pytest.approx(expected)


LIBRARY_CALLS = """HloModule jit_step

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], /*index=1*/bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[8,8]{1,0} constant({...})
  %gemm = (bf16[4,8]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %y = bf16[4,8]{1,0} get-tuple-element(%gemm), index=0
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %y)
}

%condition (arg.1: (s32[], bf16[4,8])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x.1: bf16[4,8], image: f32[2,5,5,3], kernel: f32[3,3,3,6]) -> f32[2,5,5,6] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %image = f32[2,5,5,3]{3,2,1,0} parameter(1)
  %kernel = f32[3,3,3,6]{3,2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]{1,0}) tuple(%zero, %x.1)
  %while = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"11"}}
  %custom = f32[7]{0} custom-call(%image), custom_call_target="Sharding"
  %conv = (f32[2,5,5,6]{3,2,1,0}, u8[64]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  ROOT %result = f32[2,5,5,6]{3,2,1,0} get-tuple-element(%conv), index=0
}
"""


def test_library_calls_of_gpus():
    counts = hlo.count_compiled(LIBRARY_CALLS)
    assert counts.flops == 11 * 2 * 4 * 8 * 8 + 2 * (2 * 5 * 5 * 6) * 9 * 3
    assert (counts.ops["custom-call"], counts.loop_ops["custom-call"]) == (13, 11)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="the text has no ENTRY computation; give compiled.as_text()"):
        hlo.count_compiled("module @jit_step {\n}\n")


def test_nothing_is_computed():
    """Counts of the largest model take no memory: shapes do."""
    model = paper_model("imagenet256_3800m")
    codes, cond = Shape((1, 8, 8, 4), jnp.int32), Shape((1, 1), jnp.int32)
    counted = count_traced(model.apply, models.abstract_variables(model), codes, cond)
    assert counted.flops == pytest.approx(sum(transformer_flops(model).values()), rel=5e-3)
    assert np.isfinite(counted.bytes)

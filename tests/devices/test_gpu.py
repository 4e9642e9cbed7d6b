"""On a GPU: goldens, exact codes, caches, narrow weights, fused attention, training steps, resumption.

Each test runs on the GPU (`make gpu`), and with a CPU in its place (`make test-all`).
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType

from rq_jax import models, quantize, recipes, sampling
from rq_jax.checkpoint import LoadedModel
from rq_jax.data import from_arrays
from rq_jax.devices import sharding
from rq_jax.recipes import adversary, tokenizer, transformer
from rq_jax.training import loop
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.settings import LoopSettings

B, D, K, E = 2, 3, 24, 10
GOLDENS = Path(__file__).parents[1] / "goldens"
SGD = make_optimizer(name="sgd", learning_rate=0.05, total_steps=9, schedule="constant")
TOKENIZER = models.create(
    "rqvae", image_size=8, width=16, width_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,),
    z_channels=6, norm_groups=4, code_shape=(4, 4, D), code_dim=E, codebook_size=K,
)  # fmt: skip
TRANSFORMER = models.create(
    "rqtransformer", codebook_size=K, code_shape=(4, 4, D), code_dim=E, model_dim=64, num_heads=2, spatial_layers=2,
    depth_layers=1, cond_vocab_size=7,
)  # fmt: skip


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def device(request):
    try:
        found = jax.devices(request.param)[-1]
    except RuntimeError:
        pytest.skip("JAX sees no GPU")
    with jax.default_device(found):
        yield found


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mesh_of(device):
    return jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=[device])


@functools.cache
def variables_of(model):
    """Drawn on a CPU, large enough for a condition to change the codes; on the host."""
    with jax.default_device(jax.devices("cpu")[0]):
        variables = jax.device_get(jax.jit(functools.partial(models.init_variables, model))(jax.random.key(0)))
    variables["params"] = jax.tree.map(lambda x: 3 * x, variables["params"])
    if getattr(model, "uses_codebook", False):
        variables["codebook"] = {"codebook_KE": numbers(K, E)}
    return variables


# --- the quantizer -----------------------------------------------------------------------------------------------------


def as_tf32(array):
    """Rounded to the ten bits of mantissa that a tensor core reads."""
    return ((array.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def nearest(x_NE, codebook_KE):
    """In float64, the first index on ties."""
    differences = x_NE[:, None].astype(np.float64) - codebook_KE.astype(np.float64)
    return np.argmin((differences**2).sum(-1), axis=-1)


def test_codes_are_exact_where_products_default_to_tf32(device):
    x_NE, coarse_KE = numbers(300, 32), numbers(200, 32, seed=1)
    codebook_KE = np.concatenate([coarse_KE, coarse_KE + 1e-3 * numbers(200, 32, seed=2)])
    expected = nearest(x_NE, codebook_KE)
    assert (nearest(as_tf32(x_NE), as_tf32(codebook_KE)) != expected).any(), "too easy: TF32 finds these codes too"
    with jax.default_matmul_precision("default"):
        codes = jax.jit(quantize.nearest_codes)(x_NE, codebook_KE)
        residual = jax.jit(quantize.residual_quantize, static_argnums=2)(x_NE, codebook_KE, 1)
    assert codes.devices() == {device}
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(residual.codes[:, 0], expected)


# --- parity ------------------------------------------------------------------------------------------------------------


def test_the_quantizer_has_the_codes_of_its_golden(device):
    with np.load(GOLDENS / "quantize.npz") as golden:
        x, codebook, codes = golden["x"], golden["codebook"], golden["shared.codes"]
    found = jax.jit(quantize.residual_quantize, static_argnums=2)(x, codebook, codes.shape[-1])
    np.testing.assert_array_equal(found.codes, codes)


def test_the_transformer_has_the_logits_of_its_golden(device):
    with np.load(GOLDENS / "transformer.npz") as file:
        golden = dict(file)
    params = traverse_util.unflatten_dict({k: v for k, v in golden.items() if k.startswith("params.")}, sep=".")
    model = models.create(
        "rqtransformer", codebook_size=7, code_shape=(2, 3, 3), code_dim=5, model_dim=8, num_heads=2,
        spatial_layers=2, depth_layers=1, cond_vocab_size=9, cond_length=4,
    )  # fmt: skip
    variables = {**params, "codebook": {"codebook_KE": golden["codebook"]}}
    output = jax.jit(model.apply)(variables, golden["codes"].reshape(2, 2, 3, 3), golden["cond"])
    wanted = golden["logits"]
    assert output.logits.devices() == {device}
    np.testing.assert_allclose(output.logits.reshape(wanted.shape), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, variables, codes, cond):
    return model.apply(variables, codes, cond).logits


def test_what_is_drawn_with_a_cache_is_what_a_full_pass_finds_likeliest(device):
    with jax.default_matmul_precision("highest"):
        cond = np.array([[1], [4]])
        codes = sampling.generate(TRANSFORMER, variables_of(TRANSFORMER), jax.random.key(0), B, cond, temperature=0.0)
        logits = logits_of(TRANSFORMER, variables_of(TRANSFORMER), codes, cond)
    np.testing.assert_array_equal(logits.argmax(-1), codes)


@pytest.mark.parametrize("weights, bound", [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.05)])
def test_narrow_weights_keep_the_logits_within_bounds(device, weights, bound):
    """The largest error, in largest logits. Weights narrow at rest: the computation is in float32."""
    codes, cond = np.random.default_rng(0).integers(0, K, (B, 4, 4, D)), np.array([[1], [4]])
    with jax.default_matmul_precision("highest"):
        wanted = logits_of(TRANSFORMER, variables_of(TRANSFORMER), codes, cond)
        narrowed = TRANSFORMER.for_inference(variables_of(TRANSFORMER), weights)
        found = logits_of(TRANSFORMER, narrowed, codes, cond)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert (0 if weights == "float32" else 1e-5) <= error < bound


@jax.numpy_dtype_promotion("standard")  # for jax.nn.dot_product_attention, which mixes bfloat16 with float32
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_fused_attention_is_attention(device, dtype, bound):
    codes, cond = np.random.default_rng(0).integers(0, K, (B, 4, 4, D)), np.array([[1], [4]])
    plain, fused = (
        TRANSFORMER.clone(dtype=dtype, use_flash_attention=use, model_dim=128, num_heads=2) for use in (False, True)
    )
    variables = variables_of(plain)

    def logits_and_gradient(model):
        def total(params):
            logits = model.apply({**variables, "params": params}, codes, cond).logits
            return jnp.sum(logits**2), logits

        (_, logits), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(variables["params"])
        return [logits, *jax.tree.leaves(gradient)]

    with jax.default_matmul_precision("highest"):
        for found, wanted in zip(logits_and_gradient(fused), logits_and_gradient(plain), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=bound * np.abs(wanted).max() + 1e-6)


# --- sampling ----------------------------------------------------------------------------------------------------------


def draw(model, seed, cond=(1, 4)):
    rng, cond = jax.random.key(seed), np.array(cond)
    codes = sampling.generate(model, variables_of(TRANSFORMER), rng, B, cond, top_k=9, top_p=0.9)
    assert codes.shape == (B, 4, 4, D) and 0 <= codes.min() and codes.max() < K
    return np.asarray(codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_repeats_itself_bit_for_bit(device, dtype):
    model = TRANSFORMER.clone(dtype=dtype)
    first = draw(model, seed=3)
    np.testing.assert_array_equal(draw(model, seed=3), first)
    jax.clear_caches()  # nor does it depend on what was chosen when the program was compiled
    np.testing.assert_array_equal(draw(model, seed=3), first)
    assert (draw(model, seed=4) != first).any() and (draw(model, seed=3, cond=(2, 6)) != first).any()


# --- training steps ----------------------------------------------------------------------------------------------------


def stage_1(mesh):
    losses = tokenizer.Losses(adversarial_weight=0.75)
    judge = adversary.Adversary(models.create("discriminator", width=4, num_layers=1), SGD, 0.75)
    return recipes.Tokenizer(TOKENIZER, SGD, losses, judge, mesh=mesh, ema_decay=0.9)


def stage_2(mesh):
    frozen = LoadedModel(TOKENIZER, variables_of(TOKENIZER), {"model": models.settings_of(TOKENIZER)}, None)
    losses = transformer.Losses(use_stochastic_codes=False)  # a draw may fall on the other side of a bound
    shown = np.zeros((transformer.NUM_SHOWN, 1), np.int32)
    return recipes.Transformer(TRANSFORMER, frozen, SGD, losses, mesh, ema_decay=0.9, shown_cond=shown)


BATCH = {"image": np.tanh(numbers(B, 8, 8, 3, seed=5)), "cond": np.array([[1], [4]], np.int32)}


def one_step(make, device, start=None):
    """Metrics and parameters after a step from `start`, or from the recipe's own state; and that state."""
    with jax.default_device(device):
        recipe = make(mesh_of(device))
        if start is None:
            start = jax.device_get(recipe.init(jax.random.key(0)).replace(rng=None))
        state = jax.device_put(start.replace(rng=jax.random.key(1)), recipe.shardings)
        state, metrics = recipe.step(state, sharding.put_batch(recipe.mesh, BATCH))
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves((state.params, metrics)))
        return start, jax.device_get((metrics, state.params, state.ema_params, state.model_state))


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_a_training_step_is_that_of_a_cpu(device, make):
    with jax.default_matmul_precision("highest"):
        start, expected = one_step(make, jax.devices("cpu")[0])
        _, found = one_step(make, device, start)
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(actual).all(), name
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max(), err_msg=name)


@jax.numpy_dtype_promotion("standard")  # for jax.nn.dot_product_attention, which mixes bfloat16 with float32
def test_a_training_step_in_bfloat16_is_finite(device):
    frozen = LoadedModel(TOKENIZER, variables_of(TOKENIZER), {}, None)
    model = TRANSFORMER.clone(dtype="bfloat16", use_flash_attention=True)
    recipe = recipes.Transformer(model, frozen, SGD, mesh=mesh_of(device))
    before = recipe.init(jax.random.key(0))
    kept = jax.device_get(before.params)
    state, metrics = recipe.step(before, sharding.put_batch(recipe.mesh, BATCH))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get((state.params, metrics))))
    assert metrics["skipped_share"] == 0
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(kept), strict=True))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("make", [stage_1, stage_2])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=["data", "fsdp", "tensor"])
def test_devices_that_share_a_step_make_that_of_one(device, make, sizes):
    devices = jax.devices(device.platform)[:2]
    if len(devices) < 2:
        pytest.skip("one device has nobody to share with")
    mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    with jax.default_matmul_precision("highest"):
        start, expected = one_step(make, device)
        recipe = make(mesh)
        state = jax.device_put(start.replace(rng=jax.random.key(1)), recipe.shardings)
        state, metrics = recipe.step(state, sharding.put_batch(mesh, BATCH))
    found = jax.device_get((metrics, state.params, state.ema_params, state.model_state))
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max() + 1e-7)


@pytest.mark.parametrize("make", [stage_1, stage_2])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_interrupted(device, make, tmp_path):
    """On GPUs with XLA_FLAGS=--xla_gpu_deterministic_ops=true, which `make gpu` sets for this test."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    data = from_arrays(images, images[:2], np.arange(6) % 7, np.arange(2), batch_size=B)

    def train(workdir, *lengths):
        for total_steps in lengths:
            settings = LoopSettings(total_steps, evaluate_every_steps=100, checkpoint_every_steps=100)
            state = loop.run(make(mesh_of(device)), data, settings, str(workdir))
        return jax.device_get(state.replace(rng=None))

    whole, resumed = train(tmp_path / "whole", 4), train(tmp_path / "resumed", 2, 4)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)

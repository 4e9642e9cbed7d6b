"""On a GPU: sampling repeats itself, codes are exact under TF32, training steps are those of a CPU.

Each test runs on the GPU (`make gpu`), and with a CPU in its place (`make test-all`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from rq_jax import models, quantize, recipes, sampling
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.recipes import adversary, tokenizer, transformer
from rq_jax.training.optimizer import make_optimizer

B, D, K, E = 2, 3, 24, 10
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
    if model is TRANSFORMER:
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
    frozen = LoadedModel(TOKENIZER, variables_of(TOKENIZER), {}, None)
    losses = transformer.Losses(use_stochastic_codes=False)  # a draw may fall on the other side of a bound
    return recipes.Transformer(TRANSFORMER, frozen, SGD, losses, mesh, ema_decay=0.9)


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

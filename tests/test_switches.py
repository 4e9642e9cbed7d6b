"""Both stages under the switches of JAX that another package in the process may have set."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_transformer

from rq_jax import checkpoint, models, recipes, sampling
from rq_jax.sampling import images
from rq_jax.training import make_optimizer

ROOT = helpers.ROOT
SWITCHES = {
    "x64": lambda: jax.enable_x64(True),
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "leaks": jax.checking_leaks,
    "nans": lambda: jax.debug_nans(True),
    "key reuse": lambda: jax.debug_key_reuse(True),
    "no jit": lambda: jax.disable_jit(True),
}
TOKENIZER = dict(
    name="rqvae", image_size=8, width=4, width_multipliers=(1, 2), num_res_blocks=1, norm_groups=2,
    attention_resolutions=(), z_channels=4, code_shape=(2, 2, 2), code_dim=16, codebook_size=5, use_kmeans_init=True,
)  # fmt: skip
TRANSFORMER = dict(
    name="rqtransformer", code_shape=(2, 2, 2), code_dim=16, codebook_size=5, model_dim=6, num_heads=2,
    spatial_layers=1, depth_layers=1, residual_dropout=0.0,
)  # fmt: skip
BATCH = {"image": np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)}


@pytest.fixture(autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


def make_recipe(stage: int):
    model, optimizer = models.create(**TOKENIZER), make_optimizer(name="sgd", learning_rate=0.1, total_steps=3)
    if stage == 1:
        return recipes.Tokenizer(model, optimizer, mesh=helpers.make_mesh())
    shapes = models.abstract_variables(model)
    variables = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes)
    tokenizer = checkpoint.LoadedModel(model, variables, {"model": TOKENIZER}, None)
    return recipes.Transformer(models.create(**TRANSFORMER), tokenizer, optimizer, mesh=helpers.make_mesh())


def step(stage: int):
    """The state and the metrics of a first training step."""
    recipe = make_recipe(stage)
    state, metrics = recipe.step(recipe.init(jax.random.key(0)), BATCH)
    return helpers.host(state), jax.device_get(metrics)


def traced_step(stage: int):
    recipe = make_recipe(stage)
    phase = () if stage == 2 else (recipe.phase(0),)
    update = lambda state, batch, frozen: recipe.update(state, batch, frozen, *phase)  # noqa: E731
    return jax.make_jaxpr(update)(recipe.abstract_state(), BATCH, recipe.frozen)


def draw():
    model, variables = toy_transformer.build()
    return sampling.generate(model, variables, jax.random.key(5), 2, top_k=3, top_p=0.9, image_ids=[0, 2**33])


def code():
    model = models.create(**TOKENIZER)
    variables = models.init_variables(model, jax.random.key(0))
    codes = model.apply(variables, BATCH["image"], method="encode_to_codes")
    soft, drawn = model.apply(variables, BATCH["image"], 0.5, jax.random.key(1), method="soft_codes")
    return codes, soft, drawn, model.apply(variables, codes, method="decode_codes")


PROGRAMS = {
    "a step of stage 1": lambda: traced_step(1),
    "a step of stage 2": lambda: traced_step(2),
    "codes": lambda: jax.make_jaxpr(code)(),
    "a draw": lambda: jax.make_jaxpr(draw)(),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_has_64_bits_or_leaks(program):
    toy_transformer.build()  # out here: its cache would keep what is traced
    with jax.enable_x64(True), jax.checking_leaks():
        traced = PROGRAMS[program]()
    assert jnp.float64 not in {result.dtype for result in traced.out_avals}
    assert not re.findall(r"\w+:f64\[\d.*", str(traced))  # a number without axes is what a Python number becomes


EVERYTHING = {"stage 1": functools.partial(step, 1), "stage 2": functools.partial(step, 2), "codes": code, "draw": draw}


@functools.cache
def without_switches(name: str):
    return jax.device_get(EVERYTHING[name]())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("switch", SWITCHES)
def test_results_do_not_depend_on_the_switch(switch, name):
    expected = without_switches(name)
    with SWITCHES[switch]():
        helpers.assert_close(jax.device_get(EVERYTHING[name]()), expected, 1e-4 if switch == "no jit" else 1e-5)


def draw_shipped():
    """Images of the shipped pair, and their codes."""
    pair = checkpoint.load_model(ROOT / "checkpoints" / "emoji")
    settings = dict(num_images=2, batch_size=2, conds=np.array([[0], [3]]), seed=1)
    ((ids, codes, drawn),) = images.draw(pair.model, pair.variables, pair.tokenizer, **settings)
    tokenizer, floats = pair.tokenizer, jnp.asarray(drawn / 127.5 - 1, jnp.float32)
    return ids, codes, drawn, np.asarray(tokenizer.model.apply(tokenizer.variables, floats, method="encode_to_codes"))


draw_shipped_without_switches = functools.cache(draw_shipped)


@pytest.mark.slow
@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - {"no jit"}))  # a position at a time takes minutes
def test_the_shipped_pair_does_not_depend_on_the_switch(switch):
    expected = draw_shipped_without_switches()
    with SWITCHES[switch]():
        for actual, value in zip(draw_shipped(), expected, strict=True):
            np.testing.assert_array_equal(actual, value)

"""Every preset at full size, on shapes alone: its train step and its sampler lower; no weight is ever made.

`make test` lowers one preset for each kind of program, `make test-all` every one. Presets that differ in their data and
durations alone share a program, which is lowered once.
"""

import functools
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dqtransformer, dqvae, rqtransformer, rqvae
from rq_jax import models, recipes, sampling
from rq_jax.checkpoint import LoadedModel
from rq_jax.pretrained import vgg_lpips
from rq_jax.recipes import adversary, tokenizer
from rq_jax.recipes.codes import fill_from_tokenizer
from rq_jax.recipes.thresholds import with_stand_ins
from rq_jax.training.optimizer import make_optimizer

ROWS = 2  # of a micro-batch
OPTIM = ("name", "learning_rate", "b1", "b2", "weight_decay", "schedule", "clip_norm", "accumulation_steps")
# One of each kind of program: without attention and remat; with both and a codebook for each depth.
TOKENIZERS = ("demo", "imagenet256_4xk4096")
# Thresholds and two codes a cell; a router that trains.
GRAINED = ("demo_d2", "imagenet256_feature")
# Null condition and guidance; no condition; text in micro-batches; no stack along the depth.
TRANSFORMERS = ("emoji", "ffhq256_350m", "cc3m_650m", "throughput_vqgan_large")
# Classes and a depth stack; three grains; text.
PACKED = ("demo_d2", "class_imagenet_triple_p6c18", "cc3m_p6c18")


def presets(module, kinds):
    """All presets; those that are not the one of their kind are slow."""
    assert module.PRESETS.keys() >= set(kinds)
    return [name if name in kinds else pytest.param(name, marks=pytest.mark.slow) for name in module.PRESETS]


def program_of(config, **sections) -> str:
    """All that the program of a preset depends on, as a key."""
    optim = {name: config.optim[name] for name in OPTIM}
    loss = {key: value for key, value in config.loss.items() if not key.endswith("_epochs")}
    sections = {"loss": loss, "optim": optim, "ema_decay": config.loop.ema_decay, **sections}
    return json.dumps(sections, sort_keys=True)


def optimizer_of(program):
    return make_optimizer(**program["optim"], total_steps=1000, warmup_steps=10)


abstract_variables = functools.cache(models.abstract_variables)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def lower_step(recipe, batch, phase):
    """The states before and after a lowered step, as shapes, and the shapes of its metrics."""
    state = recipe.abstract_state()
    step = jax.jit(recipe.update, static_argnums=3, donate_argnums=0)
    after, metrics = step.lower(state, batch, recipe.frozen, phase).out_info
    return shapes(state), shapes(after), jax.tree.map(lambda value: value.shape, metrics)


SCALARS = (
    "loss", "reconstruction_loss", "perceptual_loss", "commitment_loss", "generator_loss", "discriminator_loss",
    "d_weight", "logits_fake", "logits_real", "gradient_norm", "discriminator_gradient_norm", "learning_rate",
    "skipped_share",
)  # fmt: skip


# --- stage 1 -----------------------------------------------------------------------------------------------------------


def tokenizer_program(preset, file=rqvae) -> str:
    config = file.get_config(preset)
    assert config.loss.perceptual_weight and config.loss.adversarial_weight
    return program_of(config, model=with_stand_ins(dict(config.model)), discriminator=dict(config.discriminator))


def tokenizer_recipe(program: str) -> recipes.Tokenizer:
    program = json.loads(program)
    losses = tokenizer.Losses(**program["loss"])
    judge = models.create("discriminator", **program["discriminator"])
    return recipes.Tokenizer(
        models.create(**program["model"]), optimizer_of(program), losses,
        adversary.Adversary(judge, optimizer_of(program), losses.adversarial_weight),
        perceptual=vgg_lpips.Perceptual("shapes", vgg_lpips.abstract_variables()),
        mesh=helpers.make_mesh(), ema_decay=program["ema_decay"],
    )  # fmt: skip


@functools.cache
def lower_tokenizer(program: str):
    recipe = tokenizer_recipe(program)
    shape = (ROWS, *recipe.model.image_shape, recipe.model.in_channels)
    return lower_step(recipe, {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}, tokenizer.Phase(True, True))


@pytest.mark.parametrize("preset", presets(rqvae, TOKENIZERS))
def test_train_step_of_a_tokenizer_lowers(preset):
    before, after, metrics = lower_tokenizer(tokenizer_program(preset))
    assert after == before
    model = rqvae.get_config(preset).model
    counts = (model.code_shape[-1], model.codebook_size)
    assert metrics == {**dict.fromkeys(SCALARS, ()), "code_counts": counts}


@pytest.mark.parametrize("preset", presets(dqvae, GRAINED))
def test_train_step_of_a_tokenizer_with_grains_lowers(preset):
    program = tokenizer_program(preset, dqvae)
    before, after, metrics = lower_tokenizer(program)
    assert after == before
    model = tokenizer_recipe(program).model
    G, counts = model.num_grains, (model.code_depth, model.codebook_size)
    scalars = [*SCALARS, *["budget_loss"] * (model.router == "feature")]
    grains = {"regions": (G,), "images": (np.prod(model.latent_grid) + 1,)}
    expected = {"code_counts": counts, "grain_code_counts": (counts,) * G, "grains": grains}
    assert metrics == {**dict.fromkeys(scalars, ()), **expected}


# --- stage 2 -----------------------------------------------------------------------------------------------------------


def settings_of(preset, file=rqtransformer):
    """The config, the model's settings with what the paired tokenizer decides, and the tokenizer's settings."""
    config, tokenizers = file.get_config(preset), {rqtransformer: rqvae, dqtransformer: dqvae}[file]
    frozen = json.loads(tokenizer_program(config.tokenizer_preset, tokenizers))["model"]
    settings = {"tokenizer": "", "model": dict(config.model), "data": {}}
    return config, fill_from_tokenizer(settings, {"model": frozen}, "num_grains" in frozen)["model"], frozen


def transformer_program(preset, file=rqtransformer) -> str:
    config, model, frozen = settings_of(preset, file)
    return program_of(config, model=model, tokenizer=frozen, sample=dict(config.sample))


def transformer_recipe(program: str) -> recipes.Transformer | recipes.DQTransformer:
    program = json.loads(program)
    kind = recipes.RECIPES[program["model"]["name"]]
    model, frozen = models.create(**program["model"]), models.create(**program["tokenizer"])
    variables = abstract_variables(frozen)
    return kind(
        model, LoadedModel(frozen, variables, {}, None), optimizer_of(program), kind.losses_class(**program["loss"]),
        helpers.make_mesh(), program["ema_decay"], program["sample"], tokenizer_variables=variables,
    )  # fmt: skip


@functools.cache
def lower_transformer(program: str):
    recipe = transformer_recipe(program)
    model, frozen = recipe.model, recipe.tokenizer.model
    rows = ROWS * recipe.optimizer.accumulation_steps
    batch = {"image": jax.ShapeDtypeStruct((rows, *frozen.image_shape, frozen.in_channels), jnp.float32)}
    if model.is_conditional:
        batch["cond"] = jax.ShapeDtypeStruct((rows, model.cond_length), jnp.int32)
    return lower_step(recipe, batch, None)


@pytest.mark.parametrize("preset", presets(rqtransformer, TRANSFORMERS))
def test_train_step_of_a_transformer_lowers(preset):
    config, model, _ = settings_of(preset)
    before, after, metrics = lower_transformer(transformer_program(preset))
    assert after == before
    names = ["loss", "gradient_norm", "learning_rate", "skipped_share"] + ["text_loss"] * bool(config.data.text_key)
    assert metrics == {"code_loss": (model["code_shape"][-1],), **dict.fromkeys(names, ())}


@pytest.mark.parametrize("preset", presets(dqtransformer, PACKED))
def test_train_step_of_a_transformer_over_packed_codes_lowers(preset):
    config, model, _ = settings_of(preset, dqtransformer)
    before, after, metrics = lower_transformer(transformer_program(preset, dqtransformer))
    assert after == before
    names = ["loss", "gradient_norm", "learning_rate", "skipped_share", "pad_share"]
    names += ["text_loss"] * bool(config.data.text_key)
    parts = {"content_loss": (model["code_shape"][-1],), "position_loss": (model["num_grains"],)}
    assert metrics == {**parts, **dict.fromkeys(names, ())}


@functools.cache
def lower_sampler(settings: str):
    settings = json.loads(settings)
    model = models.create(**settings["model"])
    cond = np.zeros((ROWS, model.cond_length), int) if model.is_conditional else None

    def generate(variables, rng):
        return sampling.generate(model, variables, rng, ROWS, cond, **settings["sample"])

    rng = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(generate).lower(models.abstract_variables(model), rng).out_info


@pytest.mark.parametrize("preset", presets(rqtransformer, TRANSFORMERS))
def test_sampler_of_a_transformer_lowers(preset):
    config, model, _ = settings_of(preset)
    codes = lower_sampler(json.dumps({"model": model, "sample": dict(config.sample)}, sort_keys=True))
    assert (codes.shape, codes.dtype) == ((ROWS, *model["code_shape"]), jnp.int32)


@pytest.mark.parametrize("preset", presets(dqtransformer, PACKED))
def test_sampler_of_a_transformer_over_packed_codes_lowers(preset):
    config, model, _ = settings_of(preset, dqtransformer)
    drawn = lower_sampler(json.dumps({"model": model, "sample": dict(config.sample)}, sort_keys=True))
    assert drawn.codes.shape == (ROWS, *model["code_shape"]) and drawn.grains.dtype == jnp.int32


# --- every preset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", rqvae.PRESETS)
def test_settings_of_a_tokenizer_make_its_recipe(preset):
    recipe = tokenizer_recipe(tokenizer_program(preset))
    assert recipe.phase(10**9) == tokenizer.Phase(True, True)


@pytest.mark.parametrize("preset", dqvae.PRESETS)
def test_settings_of_a_tokenizer_with_grains_make_its_recipe(preset):
    recipe = tokenizer_recipe(tokenizer_program(preset, dqvae))
    assert recipe.phase(10**9) == tokenizer.Phase(True, True)


@pytest.mark.parametrize(
    ("file", "preset"), [(file, preset) for file in (rqtransformer, dqtransformer) for preset in file.PRESETS]
)
def test_settings_of_a_transformer_make_its_recipe(file, preset):
    recipe = transformer_recipe(transformer_program(preset, file))
    assert recipe.optimizer.accumulation_steps == file.get_config(preset).optim.accumulation_steps

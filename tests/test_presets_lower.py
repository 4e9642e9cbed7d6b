"""Every preset at full size, on shapes alone: its train step and its sampler lower; no weight is ever made.

Presets that differ in their data and durations alone have one program, which is lowered once.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_transformer
import train_vae
from configs import rqtransformer, rqvae
from rq_jax import models, sampling
from rq_jax.pretrained import vgg_lpips
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.state import create_state

ROWS = 2  # of a micro-batch
OPTIM = ("name", "learning_rate", "b1", "b2", "weight_decay", "schedule", "clip_norm", "accumulation_steps")


def program_of(config, **sections) -> str:
    """All that the program of a preset depends on, as a key."""
    optim = {name: config.optim[name] for name in OPTIM}
    sections = {"loss": dict(config.loss), "optim": optim, "ema_decay": config.loop.ema_decay, **sections}
    return json.dumps(sections, sort_keys=True)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def optimizer_of(program):
    return make_optimizer(**program["optim"], total_steps=1000, warmup_steps=10)


def lower_step(make_step, variables, batch, program, *more, discriminator=None):
    """The states before and after a lowered step, as shapes, and the shapes of its metrics."""
    optimizer, rng = make_optimizer(program), jax.eval_shape(lambda: jax.random.key(0))

    def create(variables, rng, discriminator):
        adversary = None if discriminator is None else (discriminator, optimizer)
        return create_state(variables, optimizer, rng, program["ema_decay"] > 0, adversary)

    state = jax.eval_shape(create, variables, rng, discriminator)
    step = make_step(optimizer=optimizer, ema_decay=program["ema_decay"])
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch, *more)
    after, metrics = lowered.out_info
    return shapes(state), shapes(after), {name: value.shape for name, value in metrics.items()}


# --- stage 1 -----------------------------------------------------------------------------------------------------------


@functools.cache
def lower_tokenizer(program: str):
    program = json.loads(program)
    model, discriminator = models.create(**program["model"]), models.create("discriminator", **program["discriminator"])
    loss = train_vae.Losses(**{key: value for key, value in program["loss"].items() if not key.endswith("_epochs")})
    adversary = train_vae.Adversary(discriminator, make_optimizer(program))
    vgg = vgg_lpips.Perceptual("shapes", vgg_lpips.abstract_variables())

    def make_step(**settings):
        step = train_vae.make_train_step(model, loss=loss, perceptual=vgg, adversary=adversary, **settings)
        return lambda state, batch, frozen: step(state, batch, train_vae.Phase(True, True), frozen)

    batch = {"image": jax.ShapeDtypeStruct((ROWS, *model.image_shape, model.in_channels), jnp.float32)}
    variables, judge = models.abstract_variables(model), models.abstract_variables(discriminator)
    return lower_step(make_step, variables, batch, program, vgg.variables, discriminator=judge)


@pytest.mark.parametrize("preset", rqvae.PRESETS)
def test_train_step_of_a_tokenizer_lowers(preset):
    config = rqvae.get_config(preset)
    assert config.loss.perceptual_weight and config.loss.adversarial_weight
    program = program_of(config, model=dict(config.model), discriminator=dict(config.discriminator))
    before, after, metrics = lower_tokenizer(program)
    assert after == before
    scalars = (
        "loss", "reconstruction_loss", "perceptual_loss", "commitment_loss", "generator_loss", "discriminator_loss",
        "d_weight", "logits_fake", "logits_real", "gradient_norm", "discriminator_gradient_norm", "learning_rate",
        "skipped_share",
    )  # fmt: skip
    counts = (config.model.code_shape[-1], config.model.codebook_size)
    assert metrics == {**dict.fromkeys(scalars, ()), "code_counts": counts}


# --- stage 2 -----------------------------------------------------------------------------------------------------------


def settings_of(preset):
    """The config, the model's settings with what the paired tokenizer decides, and the tokenizer's settings."""
    config = rqtransformer.get_config(preset)
    tokenizer = dict(rqvae.get_config(config.tokenizer_preset).model)
    filled = {name: tokenizer[name] for name in ("codebook_size", "code_shape", "code_dim", "use_shared_codebook")}
    return config, {**config.model, **filled}, tokenizer


@functools.cache
def lower_transformer(program: str):
    program = json.loads(program)
    model, tokenizer = models.create(**program["model"]), models.create(**program["tokenizer"])
    loss = train_transformer.Losses(**program["loss"])
    loss.check(model)
    make_step = functools.partial(train_transformer.make_train_step, model, tokenizer, loss=loss)
    rows = ROWS * program["optim"]["accumulation_steps"]
    batch = {"image": jax.ShapeDtypeStruct((rows, *tokenizer.image_shape, tokenizer.in_channels), jnp.float32)}
    if model.is_conditional:
        batch["cond"] = jax.ShapeDtypeStruct((rows, model.cond_length), jnp.int32)
    variables, frozen = models.abstract_variables(model), models.abstract_variables(tokenizer)
    return lower_step(make_step, variables, batch, program, frozen)


@pytest.mark.parametrize("preset", rqtransformer.PRESETS)
def test_train_step_of_a_transformer_lowers(preset):
    config, model, tokenizer = settings_of(preset)
    before, after, metrics = lower_transformer(program_of(config, model=model, tokenizer=tokenizer))
    assert after == before
    names = ["loss", "gradient_norm", "learning_rate", "skipped_share"] + ["text_loss"] * bool(config.data.text_key)
    assert metrics == {"code_loss": (model["code_shape"][-1],), **dict.fromkeys(names, ())}


@functools.cache
def lower_sampler(program: str):
    program = json.loads(program)
    model = models.create(**program["model"])
    cond = np.zeros((ROWS, model.cond_length), int) if model.is_conditional else None

    def generate(variables, rng):
        return sampling.generate(model, variables, rng, ROWS, cond, **program["sample"])

    rng = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(generate).lower(models.abstract_variables(model), rng).out_info


@pytest.mark.parametrize("preset", rqtransformer.PRESETS)
def test_sampler_of_a_transformer_lowers(preset):
    config, model, _ = settings_of(preset)
    codes = lower_sampler(json.dumps({"model": model, "sample": dict(config.sample)}, sort_keys=True))
    assert (codes.shape, codes.dtype) == ((ROWS, *model["code_shape"]), jnp.int32)

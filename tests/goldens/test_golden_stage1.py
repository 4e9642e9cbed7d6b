"""One stage-1 training step with its adversary against the original PyTorch trainer, array by array.

Floating-point arrays agree within 1e-5 of their largest value, codes exactly.
"""

import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange

from rq_jax import losses, models, recipes
from rq_jax.interop import official
from rq_jax.models import coder
from rq_jax.recipes.adversary import Adversary
from rq_jax.recipes.tokenizer import Losses
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.state import create_state

TOLERANCE = 1e-5
OPTIM = dict(name="adam", learning_rate=4e-5, b1=0.5, b2=0.9, schedule="constant", total_steps=9)


def read(directory, name):
    with np.load(directory / f"{name}.npz") as file:
        return dict(file)


def assert_close(actual, expected, name="") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name)


def official_arrays(kind, variables, settings):
    """Arrays by the names of the original."""
    variables = jax.tree.map(np.asarray, variables)
    return {key: np.asarray(value) for key, value in official.official_state(kind, variables, settings).items()}


@pytest.fixture(scope="module")
def golden(goldens):
    """(arrays, config, zero gradients, models with settings and variables)."""
    config = json.loads((goldens / "stage1-train.config.json").read_text())
    entries = json.loads((goldens / "tolerances.json").read_text())["stage1-train"]
    zeros = {key for key, entry in entries.items() if isinstance(entry, dict) and entry.get("zero_up_to_rounding")}
    stage1 = json.loads((goldens / f"{config['stage1']}.config.json").read_text())
    settings = official.rqvae_settings(stage1)
    variables = official.rqvae_variables(read(goldens, f"{config['stage1']}.state"), settings)
    settings_d = official.discriminator_settings(config)
    state_d = read(goldens, f"{config['discriminator']}.state")
    state_d = {key: value for key, value in state_d.items() if not key.endswith("num_batches_tracked")}
    variables_d = official.discriminator_variables(state_d, settings_d)
    return read(goldens, "stage1-train.io"), config, zeros, (settings, variables), (settings_d, variables_d)


@pytest.fixture(scope="module")
def step(golden):
    """(state before, state after, metrics)."""
    io, config, _, (settings, variables), (settings_d, variables_d) = golden
    assert config["restart_unused_codes"] is False  # otherwise than the model's own config
    model = models.create("rqvae", **{**settings, "use_restart": False})
    optimizer, gan = make_optimizer(**OPTIM), config["gan"]["loss"]
    loss = Losses(
        adversarial_weight=gan["disc_weight"],
        discriminator_loss=gan["disc_loss"],
        generator_loss=gan["gen_loss"],
        perceptual_weight=gan["perceptual_weight"],
    )
    judge = models.create("discriminator", **settings_d)
    adversary = Adversary(judge, optimizer, loss.adversarial_weight, loss.discriminator_loss, loss.generator_loss)
    recipe = recipes.Tokenizer(model, optimizer, loss, adversary, mesh=helpers.make_mesh())
    before = create_state(variables, optimizer, jax.random.key(0), False, (variables_d, optimizer))
    update = jax.jit(recipe.update, static_argnums=3)
    return before, *update(before, {"image": nhwc(io["images"])}, recipe.frozen, recipe.phase(0))


def nhwc(images):
    return jnp.asarray(rearrange(images, "b c h w -> b h w c"))


def gradients(opt_state):
    """Those behind Adam's first moment after one step, which is half of them."""
    return jax.tree.map(lambda moment: 2 * moment, optax.tree.get(opt_state, "mu"))


def test_losses_adaptive_weight_and_codes(golden, step):
    io, metrics = golden[0], step[2]
    assert_close(metrics["reconstruction_loss"], io["loss_recon"])
    assert_close(metrics["commitment_loss"], io["loss_latent"])
    assert_close(metrics["generator_loss"], io["loss_gen"])
    assert_close(metrics["d_weight"], io["g_weight"])
    assert_close(metrics["loss"], io["loss_gen_total"])
    assert_close(metrics["loss"] - 0.75 * metrics["d_weight"] * metrics["generator_loss"], io["loss_total"])
    assert_close(metrics["discriminator_loss"], io["loss_disc"])
    assert_close(metrics["logits_fake"], io["disc.logits_fake"].mean())
    assert_close(metrics["logits_real"], io["disc.logits_real"].mean())
    counts_DK = np.stack([np.bincount(io["codes"][..., d].ravel(), minlength=64) for d in range(4)])
    np.testing.assert_array_equal(metrics["code_counts"], counts_DK)


def test_what_the_step_is_made_of(golden, step):
    io, _, _, (settings, _), (settings_d, _) = golden
    before, images = step[0], nhwc(io["images"])
    model, discriminator = models.create("rqvae", **settings), models.create("discriminator", **settings_d)

    @jax.jit
    def parts(variables, judge, images):
        """Output, logits of both batches, and the last kernel's gradients of the reconstruction and of the generator."""
        mutable = ["codebook", "intermediates"]
        output, mutated = model.apply(variables, images, train=True, mutable=mutable)

        def score(images):
            return discriminator.apply(judge, images, train=True, mutable=["batch_stats"])[0]

        def generator(reconstruction):
            logits = score(reconstruction)
            return losses.generator_loss(logits), logits

        nll = jax.grad(lambda x: losses.reconstruction_loss(images, x))(output.reconstruction)
        generated, fake = jax.grad(generator, has_aux=True)(output.reconstruction)
        grads = [coder.last_kernel_gradient(variables["params"], mutated["intermediates"], g) for g in (nll, generated)]
        return output, fake, score(images), grads

    output, fake, real, grads = parts(before.variables, before.discriminator, images)
    np.testing.assert_array_equal(output.codes, io["codes"])
    assert_close(output.reconstruction, nhwc(io["recon"]))
    for name in ("gen.logits_fake", "disc.logits_fake"):
        assert_close(fake, nhwc(io[name]), name)
    assert_close(real, nhwc(io["disc.logits_real"]))
    for name, kernel in zip(("nll_grad_last_layer", "g_grad_last_layer"), grads, strict=True):
        assert_close(rearrange(kernel, "h w i o -> o i h w"), io[name], name)


@pytest.mark.parametrize("prefix", ["", "disc."])
def test_gradients_and_parameters_after_the_step(golden, step, prefix):
    io, _, zeros, (settings, _), (settings_d, _) = golden
    _, after, _ = step
    if prefix:
        grads = {"params": gradients(after.discriminator_opt_state), "batch_stats": after.discriminator["batch_stats"]}
        grads, new = (official_arrays("discriminator", tree, settings_d) for tree in (grads, after.discriminator))
    else:
        tree = {"params": gradients(after.opt_state), **after.model_state}
        grads, new = (official_arrays("rqvae", tree, settings) for tree in (tree, after.variables))
    names = {key.removeprefix(f"{prefix}grad_norm.") for key in io if key.startswith(f"{prefix}grad_norm.")}
    parameters = {key for key in grads if "quantizer" not in key and "running" not in key and "tracked" not in key}
    assert names == parameters
    for name in names:
        if f"{prefix}grad_norm.{name}" in zeros:
            assert np.linalg.norm(grads[name]) < 1e-6, name
        else:
            assert_close(np.linalg.norm(grads[name]), io[f"{prefix}grad_norm.{name}"], name)
        if f"{prefix}grad.{name}" in io:
            assert_close(grads[name], io[f"{prefix}grad.{name}"], name)
    checked = 0
    for key in io:
        if key.startswith(f"{prefix}after_step.") and not key.endswith("num_batches_tracked"):
            assert_close(new[key.removeprefix(f"{prefix}after_step.")], io[key], key)
            checked += 1
    assert checked == (5 if prefix else 6)

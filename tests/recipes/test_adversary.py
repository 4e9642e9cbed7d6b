"""Stage 1 with its adversary: the step against a plain formulation, start and warm-in, devices, faults, resume."""

import dataclasses
import functools
import signal

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rq_jax import checkpoint, losses, recipes
from rq_jax.devices import sharding
from rq_jax.pretrained import vgg_lpips
from rq_jax.recipes.tokenizer import Tokenizer
from rq_jax.training import run

WEIGHT = 0.7
SETTINGS = {
    "loss__adversarial_weight": WEIGHT,
    "loss__discriminator_loss": "hinge",
    "loss__perceptual_start_steps": 0,
    "loss__adversarial_start_steps": 0,
    "loss__adversarial_warmup_steps": 0,
    "discriminator__width": 6,
    "optim__name": "sgd",
    "optim__learning_rate": 0.1,
    "discriminator_optim__learning_rate": 0.05,
    "model__codebook_decay": 0.5,
    "loop__ema_decay": 0.9,
}
LOGGED = {
    "generator_loss", "discriminator_loss", "discriminator_gradient_norm", "d_weight", "logits_fake", "logits_real",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


def prepared(pictures, mesh=None, **settings):
    """A run on one device, where nothing is partitioned and programs compile faster."""
    return _prepared(pictures, mesh or helpers.make_mesh(), tuple(sorted({**SETTINGS, **settings}.items())))


@functools.cache
def _prepared(pictures, mesh, settings):
    return recipes.prepare(helpers.vae_config(pictures, **dict(settings)), mesh=mesh)


def discriminator_variables(recipe, seed=1):
    """Not as drawn: with weights of 0.02 a discriminator says 0 to everything."""
    variables = helpers.drawn_variables(recipe.adversary.model, seed)
    grown = jax.tree.map(lambda x: jnp.asarray(8 * x if x.ndim == 4 else x), variables["params"])
    return {**variables, "params": grown}


def start_state(recipe):
    """The state at step 0."""
    discriminator = None if recipe.adversary is None else discriminator_variables(recipe)
    return helpers.start_state(recipe, helpers.drawn_variables(recipe.model), discriminator)


@functools.cache
def batch_of(pictures):
    return {"image": next(prepared(pictures).data.train.iterator())["image"]}


# Numbers of the adversary that its program takes as arguments here: a test of one of them compiles nothing.
NUMBERS = ("max_adaptive_weight", "start_steps")


@functools.cache
def compiled_step(recipe, phase, read):
    def step(numbers, state, batch, frozen):
        adversary = recipe.adversary and dataclasses.replace(recipe.adversary, **numbers)
        return helpers.jit_update(dataclasses.replace(recipe, adversary=adversary), phase, read)(state, batch, frozen)

    return jax.jit(step)


def make_step(pictures, mesh=None, perceptual=None, change=lambda state: state, read=helpers.whole, **settings):
    """One step: (state before, state after on the host, metrics), or what `read` finds in the latter two."""
    recipe, template = prepared(pictures, mesh, **settings).recipe, recipe_of_structure(pictures, mesh, **settings)
    state = helpers.place(change(start_state(recipe)), recipe.mesh)
    if perceptual:
        template = dataclasses.replace(template, perceptual=perceptual)
    phase = recipe.phase(int(state.step))
    numbers = {name: jnp.float32(getattr(recipe.adversary, name)) for name in NUMBERS} if recipe.adversary else {}
    batch = sharding.put_batch(recipe.mesh, batch_of(pictures))
    frozen = perceptual.variables if perceptual else recipe.frozen
    new, metrics = compiled_step(template, phase, read)(numbers, state, batch, frozen)
    return state, helpers.host(new) if read is helpers.whole else jax.device_get(new), jax.device_get(metrics)


def recipe_of_structure(pictures, mesh=None, **settings):
    """The recipe whose program these settings share: they may differ from its in `NUMBERS`."""
    shared = ("loss__max_adaptive_weight", "loss__adversarial_start_steps")
    return prepared(pictures, mesh, **{name: value for name, value in settings.items() if name not in shared}).recipe


@pytest.fixture(scope="module")
def base(pictures):
    return make_step(pictures)


# --- the step against a plain formulation ------------------------------------------------------------------------------


def plain_losses(recipe, state, images, discriminator_params, kind):
    """What the step's single passes stand for, written as the original does: a pass for every use."""
    model, discriminator, statistics = recipe.model, recipe.adversary.model, state.discriminator["batch_stats"]
    rngs = state.rng_of_step("restart", "dropout")

    def judge(params, images, statistics):
        variables = {"params": params, "batch_stats": statistics}
        logits, mutated = discriminator.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, mutated["batch_stats"]

    def autoencode(params):
        variables = {"params": params, **state.model_state}
        output, _ = model.apply(variables, images, train=True, mutable=["codebook"], rngs=rngs)
        return output

    def image_loss(reconstruction):
        return losses.reconstruction_loss(images, reconstruction)

    def generator_loss(reconstruction):
        return -judge(discriminator_params, reconstruction, statistics)[0].mean()

    decoder = state.params["decoder"]

    def reconstruct(kernel):
        last = {**decoder["conv_out"], "kernel": kernel}
        return autoencode({**state.params, "decoder": {**decoder, "conv_out": last}}).reconstruction

    reconstruction, pull_back = jax.vjp(reconstruct, decoder["conv_out"]["kernel"])
    norms = [jnp.linalg.norm(pull_back(jax.grad(f)(reconstruction))[0]) for f in (image_loss, generator_loss)]
    d_weight = norms[0] / (norms[1] + 1e-4)

    def total(params):
        output = autoencode(params)
        commitment = losses.commitment_loss(output.latents, output.partial_sums)
        adversarial = WEIGHT * d_weight * generator_loss(output.reconstruction)
        return image_loss(output.reconstruction) + 0.25 * commitment + adversarial

    _, statistics = judge(discriminator_params, reconstruction, statistics)

    def discriminator_loss(params):
        fake, after_fake = judge(params, reconstruction, statistics)
        real, after_real = judge(params, images, after_fake)
        if kind == "hinge":
            loss = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        else:
            loss = 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())
        return WEIGHT * loss, after_real

    return d_weight, total, discriminator_loss


@pytest.mark.parametrize("kind", ["hinge", pytest.param("vanilla", marks=pytest.mark.slow)])
def test_step_is_that_of_separate_passes(pictures, kind):
    before, after, metrics = make_step(pictures, loss__discriminator_loss=kind)
    recipe = prepared(pictures, loss__discriminator_loss=kind).recipe
    state, batch = start_state(recipe), batch_of(pictures)
    params = state.discriminator["params"]
    d_weight, total, discriminator_loss = jax.jit(
        lambda: (lambda w, t, d: (w, jax.value_and_grad(t)(state.params), jax.value_and_grad(d, has_aux=True)(params)))(
            *plain_losses(recipe, state, batch["image"], params, kind)
        )
    )()
    np.testing.assert_allclose(metrics["d_weight"], d_weight, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], total[0], rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, total[1])
    helpers.assert_close(after["params"], jax.device_get(expected))
    (loss, statistics), grads = discriminator_loss
    np.testing.assert_allclose(WEIGHT * metrics["discriminator_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["discriminator_gradient_norm"], optax.tree.norm(grads), rtol=1e-4)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    helpers.assert_close(after["discriminator"]["params"], jax.device_get(expected))
    helpers.assert_close(after["discriminator"]["batch_stats"], jax.device_get(statistics))
    assert helpers.differs(after["discriminator"]["batch_stats"], before.discriminator["batch_stats"])


def test_what_is_logged(base):
    _, _, metrics = base
    assert metrics.keys() > LOGGED
    weighted = WEIGHT * metrics["d_weight"] * metrics["generator_loss"]
    others = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"]
    np.testing.assert_allclose(metrics["loss"], others + weighted, rtol=1e-5)
    np.testing.assert_allclose(metrics["generator_loss"], -metrics["logits_fake"], rtol=1e-5)
    assert metrics["d_weight"] > 0 and metrics["logits_fake"] != metrics["logits_real"]


def test_one_forward_pass_of_the_discriminator_serves_both_networks(pictures):
    """Two passes, over made and over real pictures, and not three: counted in convolutions of the first layer."""
    recipe = prepared(pictures).recipe
    state, batch = start_state(recipe), batch_of(pictures)
    text = jax.jit(recipe.update, static_argnums=3).lower(state, batch, None, recipe.phase(0)).as_text()
    assert text.count("tensor<4x4x3x6xf32>) -> tensor<8x8x8x6xf32>") == 2


def test_adaptive_weight_is_limited(pictures, base):
    limit = 0.25 * float(base[2]["d_weight"])
    _, after, metrics = make_step(pictures, loss__max_adaptive_weight=limit)
    np.testing.assert_allclose(metrics["d_weight"], limit, rtol=1e-6)
    assert helpers.differs(after["params"], base[1]["params"])
    helpers.assert_equal(after["discriminator"], base[1]["discriminator"])


def test_perceptual_term_is_in_the_loss_and_in_the_adaptive_weight(pictures, base):
    perceptual = vgg_lpips.Perceptual("random", random_vgg())
    _, discriminator, metrics = make_step(
        pictures, perceptual=perceptual, read=discriminator_and_losses, loss__perceptual_weight=0.3
    )
    assert metrics["perceptual_loss"] > 0
    others = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"]
    weighted = WEIGHT * metrics["d_weight"] * metrics["generator_loss"]
    np.testing.assert_allclose(metrics["loss"], others + 0.3 * metrics["perceptual_loss"] + weighted, rtol=1e-5)
    np.testing.assert_array_equal(metrics["reconstruction_loss"], base[2]["reconstruction_loss"])
    assert abs(metrics["d_weight"] / base[2]["d_weight"] - 1) > 1e-3
    helpers.assert_equal(discriminator, base[1]["discriminator"])


def discriminator_and_losses(state, metrics):
    """Read by themselves they need no backward pass through the tokenizer."""
    return state.discriminator, {name: metrics[name] for name in metrics if name != "gradient_norm"}


@functools.cache
def random_vgg():
    shapes, rng = vgg_lpips.abstract_variables(), np.random.default_rng(0)
    draw = lambda s: (rng.standard_normal(s.shape) * (2 / np.prod(s.shape[:-1])) ** 0.5).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


# --- start and warm-in -------------------------------------------------------------------------------------------------


def at_step(step, pace=1):
    return lambda state: state.replace(step=jnp.int32(step), pace=jnp.float32(pace))


def test_before_its_start_the_adversary_does_nothing(pictures):
    before, after, metrics = make_step(pictures, loss__adversarial_start_steps=3, change=at_step(2))
    _, plain, plain_metrics = make_step(pictures, loss__adversarial_weight=0.0, change=at_step(2))
    for name in ("params", "model_state", "opt_state", "ema_params"):
        helpers.assert_close(after[name], plain[name], 1e-6)
    for name in ("discriminator", "discriminator_opt_state"):
        helpers.assert_equal(after[name], jax.device_get(getattr(before, name)))
    assert {name: metrics[name] for name in LOGGED} == dict.fromkeys(LOGGED, 0.0)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)


def test_from_its_start_on_the_step_is_the_whole_one(pictures):
    _, late, late_metrics = make_step(pictures, loss__adversarial_start_steps=3, change=at_step(3))
    _, always, metrics = make_step(pictures, change=at_step(3))
    helpers.assert_close(late_metrics, metrics)
    helpers.assert_close(late, always)


def test_warm_in_scales_the_generators_term_alone(pictures, base):
    for step, pace, share in ((0, 1, 0.25), (1, 1, 0.5), (1, 2, 0.75), (3, 1, 1.0), (9, 1, 1.0)):
        _, discriminator, metrics = make_step(
            pictures, change=at_step(step, pace), read=discriminator_and_losses, loss__adversarial_warmup_steps=4
        )
        others = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"]
        weighted = share * WEIGHT * metrics["d_weight"] * metrics["generator_loss"]
        np.testing.assert_allclose(metrics["loss"] - others, weighted, rtol=1e-4, atol=1e-6)
        if step == 0:
            helpers.assert_close(discriminator, base[1]["discriminator"])


# --- devices, faults, other discriminators -----------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_devices_make_the_step_of_one(pictures, base):
    _, eight, metrics = make_step(pictures, helpers.make_mesh(4, 2))
    np.testing.assert_array_equal(metrics.pop("code_counts"), base[2]["code_counts"])
    helpers.assert_close(metrics, {name: value for name, value in base[2].items() if name != "code_counts"}, 2e-5)
    helpers.assert_close(eight["discriminator"], base[1]["discriminator"])
    helpers.assert_close(eight["params"], base[1]["params"])


def test_a_fault_of_the_discriminator_leaves_everything_as_it_was(pictures):
    def spoil(state):
        kernel = state.discriminator["params"]["conv1"]["kernel"]
        state.discriminator["params"]["conv1"]["kernel"] = kernel.at[0, 0, 0, 0].set(jnp.nan)
        return state

    before, after, metrics = make_step(pictures, change=spoil)
    assert metrics["skipped_share"] == 1 and after["skipped_steps"] == 1 and after["step"] == 1
    for name in ("params", "opt_state", "ema_params", "model_state", "discriminator", "discriminator_opt_state"):
        for a, b in zip(jax.tree.leaves(after[name]), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_actnorm_starts_from_the_first_reconstructions(pictures):
    before, discriminator, metrics = make_step(pictures, read=discriminator_and_losses, discriminator__use_actnorm=True)
    norms = discriminator["batch_stats"]
    assert all(norm["initialized"] == 1 for norm in norms.values())
    assert np.isfinite(metrics["loss"]) and metrics["d_weight"] > 0
    moved = [discriminator["params"][name]["shift"] for name in norms]
    assert all(np.abs(shift).max() > 1e-3 for shift in moved)
    assert all(norm["initialized"] == 0 for norm in jax.device_get(before.discriminator["batch_stats"]).values())


def test_discriminator_of_its_own_rate_and_moments(pictures):
    recipe = prepared(pictures, optim__name="adam", discriminator_optim__b1=0.3).recipe
    optimizer = recipe.adversary.optimizer
    assert optimizer.learning_rate(5) == np.float32(0.05)
    assert recipe.optimizer.learning_rate(5) == np.float32(0.1)
    params = {"w": jnp.ones(3)}
    _, state = optimizer.transform.update(params, optimizer.transform.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.7, rtol=1e-6)


# --- whole runs --------------------------------------------------------------------------------------------------------

RUN = {**SETTINGS, "optim__name": "adam", "optim__learning_rate": 1e-3, "discriminator_optim__learning_rate": 2e-3}
RUN |= {"loss__adversarial_start_steps": 1, "loss__adversarial_warmup_steps": 2}


@pytest.fixture(scope="module")
def whole_run(pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(*prepared(pictures, **RUN), workdir)


def test_run_logs_the_adversary(whole_run):
    logged = helpers.read_metrics(whole_run[0])
    assert all(logged[step].keys() > LOGGED for step in (1, 2, 3, 4))
    assert logged[1]["d_weight"] == 0 and logged[2]["d_weight"] > 0


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_run_is_the_whole_one(whole_run, pictures, tmp_path, monkeypatch, step):
    summarize, steps = Tokenizer.summarize, iter(range(1, 100))

    def summarize_and_stop(recipe, means):
        if next(steps) == step:
            signal.raise_signal(signal.SIGTERM)
        return summarize(recipe, means)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Tokenizer, "summarize", summarize_and_stop)
        run(*prepared(pictures, **RUN), tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    state = run(*prepared(pictures, **RUN), tmp_path)
    helpers.assert_equal(helpers.host(state), helpers.host(whole_run[1]))


# --- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(pictures):
    """The state before the first step of a run that starts from nothing."""
    recipe = prepared(pictures, **RUN).recipe
    return recipe.init(jax.random.key(recipe.seed))


def begun(start, drawn, keep_optimizer=False):
    """The state before the first step of a run that starts from `start`."""
    return helpers.host(checkpoint.start_from(start, drawn, keep_optimizer))


def test_a_fresh_optimizer_starts_from_the_averaged_weights(whole_run, drawn):
    workdir, trained = whole_run
    state = begun(workdir, drawn)
    trained = helpers.host(trained)
    helpers.assert_equal(state["params"], trained["ema_params"])
    helpers.assert_equal(state["ema_params"], trained["ema_params"])
    helpers.assert_equal(state["model_state"], trained["model_state"])
    helpers.assert_equal(state["discriminator"], trained["discriminator"])
    assert state["step"] == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((state["opt_state"], state["discriminator_opt_state"])))


def test_a_kept_optimizer_goes_on_with_the_weights_as_trained(whole_run, pictures):
    workdir, trained = whole_run
    recipe = prepared(pictures, **RUN, init_from=str(workdir), keep_optimizer=True).recipe
    state, trained = helpers.host(recipe.init(jax.random.key(recipe.seed))), helpers.host(trained)
    for name in ("params", "ema_params", "model_state", "discriminator"):
        helpers.assert_equal(state[name], trained[name])
    for name in ("opt_state", "discriminator_opt_state"):
        for moment in ("mu", "nu"):
            helpers.assert_equal(optax.tree.get(state[name], moment), optax.tree.get(trained[name], moment))
    assert state["step"] == 0
    counts = helpers.select(state["opt_state"], lambda path: path.endswith(".count"))
    assert sorted(int(count) for count in counts.values()) == [0, 4]  # the schedule's, Adam's


def test_a_model_directory_gives_weights_and_discriminator(whole_run, drawn, tmp_path):
    workdir, trained = whole_run
    loaded, discriminator = checkpoint.load_model(workdir), helpers.host(trained)["discriminator"]
    checkpoint.save_model(tmp_path, loaded.config, loaded.variables)
    alone = begun(tmp_path, drawn)
    helpers.assert_equal(alone["params"], loaded.variables["params"])
    assert helpers.differs(alone["discriminator"], discriminator)
    settings = {"name": "discriminator", "width": 6, "in_channels": 3}
    checkpoint.save_model(tmp_path / "discriminator", {"model": settings}, discriminator)
    helpers.assert_equal(begun(tmp_path, drawn)["discriminator"], discriminator)
    with pytest.raises(
        ValueError, match="keep_optimizer: .* holds weights alone; leave it out, or give a training run"
    ):
        begun(tmp_path, drawn, keep_optimizer=True)


@pytest.mark.slow
def test_fine_tuning_runs_and_resumes_from_itself(whole_run, pictures, tmp_path):
    settings = {"init_from": str(whole_run[0]), "optim__learning_rate": 1e-9, "loop__total_steps": 2}
    settings |= {"loss__adversarial_start_steps": 0}  # one program
    prepared_run = prepared(pictures, **{**RUN, **settings})
    state = run(*prepared_run, tmp_path)
    helpers.assert_close(helpers.host(state)["params"], helpers.host(whole_run[1])["ema_params"], 1e-4)
    again = run(*prepared_run, tmp_path)  # complete: nothing is done, nothing starts anew
    helpers.assert_equal(helpers.host(again), helpers.host(state))


def test_a_start_that_does_not_fit_is_refused(whole_run, drawn, pictures, tmp_path):
    other = helpers.zero_state(prepared(pictures, **RUN, model__z_channels=16).recipe)
    for keep_optimizer in (False, True):
        with pytest.raises(ValueError, match="has shape .*, the config needs .*config.model") as error:
            begun(whole_run[0], other, keep_optimizer)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="is no run directory"):
        begun(tmp_path / "nowhere", drawn)
    checkpoint.write_config(tmp_path, checkpoint.read_config(whole_run[0]))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        begun(tmp_path, drawn, keep_optimizer=True)

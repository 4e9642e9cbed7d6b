"""Stage 1 with its adversary: the step against a plain formulation, start and warm-in, devices, faults, resume."""

import functools
import signal

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train_vae
from rq_jax import checkpoint, losses, models
from rq_jax.devices import sharding
from rq_jax.pretrained import vgg_lpips

WEIGHT = 0.7
SETTINGS = {
    "loss__adversarial_weight": WEIGHT,
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return helpers.write_pictures(tmp_path_factory.mktemp("pictures"))


@functools.cache
def prepared(pictures, settings):
    config = helpers.vae_config(pictures, **{**SETTINGS, **dict(settings)})
    return config, train_vae.prepare(config)


@functools.cache
def _initial_variables(model, seed):
    return jax.jit(functools.partial(models.init_variables, model))(jax.random.key(seed))


def initial_variables(model, seed):
    """Drawn once; the dictionaries are the caller's own."""
    return jax.tree.map(lambda x: x, _initial_variables(model, seed))


def discriminator_variables(run, seed=1):
    """Not as drawn: with weights of 0.02 a discriminator says 0 to everything."""
    variables = initial_variables(run["adversary"].model, seed)
    grown = jax.tree.map(lambda x: 8 * x if x.ndim == 4 else x, variables["params"])
    return {**variables, "params": grown}


def start_state(pictures, **settings):
    """(config, run, state at step 0, batch)."""
    config, run = prepared(pictures, tuple(settings.items()))
    variables = initial_variables(run["model"], 0)
    discriminator = None
    if run["adversary"] is not None:
        discriminator = discriminator_variables(run), run["adversary"].optimizer
    state = helpers.start_state(variables, config, run["optimizer"], discriminator)
    return config, run, state, {"image": next(run["dataset"].iterator())["image"]}


def jitted_step(config, run, mesh, shapes, perceptual=None):
    step = train_vae.make_train_step(
        run["model"], run["optimizer"], run["loss"], config.loop.ema_decay, perceptual, run["adversary"]
    )
    return jax.jit(step, static_argnums=2, out_shardings=(sharding.state_shardings(mesh, shapes), None))


@functools.cache
def compiled_step(pictures, mesh, settings):
    config, run, state, _ = start_state(pictures, **dict(settings))
    return jitted_step(config, run, mesh, state)


def make_step(pictures, mesh=None, perceptual=None, change=lambda state: state, **settings):
    """One step: (state before, state after on the host, metrics)."""
    mesh = mesh or helpers.make_mesh()
    config, run, state, batch = start_state(pictures, **settings)
    state, _ = helpers.place(change(state), mesh)
    if perceptual:
        step, frozen = jitted_step(config, run, mesh, state, perceptual), perceptual.variables
    else:
        step, frozen = compiled_step(pictures, mesh, tuple(settings.items())), None
    new, metrics = step(state, sharding.put_batch(mesh, batch), run["loss"].phase(int(state.step)), frozen)
    return state, helpers.host(new), jax.device_get(metrics)


@pytest.fixture(scope="module")
def base(pictures):
    return make_step(pictures)


# --- the step against a plain formulation ------------------------------------------------------------------------------


def plain_losses(run, state, images, discriminator_params, kind):
    """What the step's single passes stand for, written as the original does: a pass for every use."""
    model, discriminator, statistics = run["model"], run["adversary"].model, state.discriminator["batch_stats"]
    rngs = state.rng_of_step("restart", "dropout")

    def judge(params, images, statistics):
        variables = {"params": params, "batch_stats": statistics}
        logits, mutated = discriminator.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, mutated["batch_stats"]

    def autoencode(params):
        variables = {"params": params, **state.model_state}
        output, _ = model.apply(variables, images, train=True, mutable=["codebook"], rngs=rngs)
        return output

    def image_loss(params):
        return losses.reconstruction_loss(images, autoencode(params).reconstruction)

    def generator_loss(params):
        return -judge(discriminator_params, autoencode(params).reconstruction, statistics)[0].mean()

    last = ("decoder", "conv_out", "kernel")
    norms = []
    for function in (image_loss, generator_loss):
        gradient = functools.reduce(lambda tree, key: tree[key], last, jax.grad(function)(state.params))
        norms.append(jnp.linalg.norm(gradient))
    d_weight = norms[0] / (norms[1] + 1e-4)

    def total(params):
        output = autoencode(params)
        commitment = losses.commitment_loss(output.latents, output.partial_sums)
        return image_loss(params) + 0.25 * commitment + WEIGHT * d_weight * generator_loss(params)

    reconstruction = autoencode(state.params).reconstruction
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
    _, run, state, batch = start_state(pictures, loss__discriminator_loss=kind)
    params = state.discriminator["params"]
    d_weight, total, discriminator_loss = jax.jit(
        lambda: (lambda w, t, d: (w, jax.value_and_grad(t)(state.params), jax.value_and_grad(d, has_aux=True)(params)))(
            *plain_losses(run, state, batch["image"], params, kind)
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
    config, run, state, batch = start_state(pictures)
    step = train_vae.make_train_step(
        run["model"], run["optimizer"], run["loss"], config.loop.ema_decay, None, run["adversary"]
    )
    text = jax.jit(step, static_argnums=2).lower(state, batch, run["loss"].phase(0)).as_text()
    assert text.count("tensor<4x4x3x6xf32>) -> tensor<8x8x8x6xf32>") == 2


def test_adaptive_weight_is_limited(pictures, base):
    limit = 0.25 * float(base[2]["d_weight"])
    _, after, metrics = make_step(pictures, loss__max_adaptive_weight=limit)
    np.testing.assert_allclose(metrics["d_weight"], limit, rtol=1e-6)
    assert helpers.differs(after["params"], base[1]["params"])
    helpers.assert_equal(after["discriminator"], base[1]["discriminator"])


def test_perceptual_term_is_in_the_loss_and_in_the_adaptive_weight(pictures, base):
    perceptual = vgg_lpips.Perceptual("random", random_vgg())
    _, after, metrics = make_step(pictures, perceptual=perceptual, loss__perceptual_weight=0.3)
    assert metrics["perceptual_loss"] > 0
    others = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"]
    weighted = WEIGHT * metrics["d_weight"] * metrics["generator_loss"]
    np.testing.assert_allclose(metrics["loss"], others + 0.3 * metrics["perceptual_loss"] + weighted, rtol=1e-5)
    np.testing.assert_array_equal(metrics["reconstruction_loss"], base[2]["reconstruction_loss"])
    assert abs(metrics["d_weight"] / base[2]["d_weight"] - 1) > 1e-3
    helpers.assert_equal(after["discriminator"], base[1]["discriminator"])


@functools.cache
def random_vgg():
    shapes, rng = vgg_lpips.abstract_variables(), np.random.default_rng(0)
    draw = lambda s: (rng.standard_normal(s.shape) * (2 / np.prod(s.shape[:-1])) ** 0.5).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, shapes)


# --- start and warm-in -------------------------------------------------------------------------------------------------


def at_step(step):
    return lambda state: state.replace(step=jnp.int32(step))


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
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        _, after, metrics = make_step(pictures, loss__adversarial_warmup_steps=4, change=at_step(step))
        others = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"]
        weighted = share * WEIGHT * metrics["d_weight"] * metrics["generator_loss"]
        np.testing.assert_allclose(metrics["loss"] - others, weighted, rtol=1e-4, atol=1e-6)
        if step == 0:
            helpers.assert_close(after["discriminator"], base[1]["discriminator"])


# --- devices, faults, other discriminators -----------------------------------------------------------------------------


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
    before, after, metrics = make_step(pictures, discriminator__use_actnorm=True)
    norms = after["discriminator"]["batch_stats"]
    assert all(norm["initialized"] == 1 for norm in norms.values())
    assert np.isfinite(metrics["loss"]) and metrics["d_weight"] > 0
    moved = [after["discriminator"]["params"][name]["shift"] for name in norms]
    assert all(np.abs(shift).max() > 1e-3 for shift in moved)
    assert all(norm["initialized"] == 0 for norm in jax.device_get(before.discriminator["batch_stats"]).values())


def test_discriminator_of_its_own_rate_and_moments(pictures):
    _, run = prepared(pictures, (("optim__name", "adam"), ("discriminator_optim__b1", 0.3)))
    assert run["adversary"].optimizer.learning_rate(5) == np.float32(0.05)
    assert run["optimizer"].learning_rate(5) == np.float32(0.1)
    params = {"w": jnp.ones(3)}
    _, state = run["adversary"].optimizer.transform.update(
        params, run["adversary"].optimizer.transform.init(params), params
    )
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.7, rtol=1e-6)


# --- whole runs --------------------------------------------------------------------------------------------------------

RUN = {**SETTINGS, "optim__name": "adam", "optim__learning_rate": 1e-3, "discriminator_optim__learning_rate": 2e-3}
RUN |= {"loss__adversarial_start_steps": 1, "loss__adversarial_warmup_steps": 2}


@pytest.fixture(scope="module")
def whole_run(pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train_vae.train_and_evaluate(helpers.vae_config(pictures, **RUN), str(workdir))


def test_run_logs_the_adversary(whole_run):
    logged = helpers.read_metrics(whole_run[0])
    assert all(logged[step].keys() > LOGGED for step in (1, 2, 3, 4))
    assert logged[1]["d_weight"] == 0 and logged[2]["d_weight"] > 0


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_run_is_the_whole_one(whole_run, pictures, tmp_path, monkeypatch, step):
    config = helpers.vae_config(pictures, **RUN)
    make_summary, steps = train_vae.make_summary, iter(range(1, 100))

    def stopping(model):
        summarize = make_summary(model)

        def summarize_and_stop(means):
            if next(steps) == step:
                signal.raise_signal(signal.SIGTERM)
            return summarize(means)

        return summarize_and_stop

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train_vae, "make_summary", stopping)
        train_vae.train_and_evaluate(config, str(tmp_path))
    assert stop.value.code == 128 + signal.SIGTERM
    state = train_vae.train_and_evaluate(config, str(tmp_path))
    helpers.assert_equal(helpers.host(state), helpers.host(whole_run[1]))


# --- fine-tuning -------------------------------------------------------------------------------------------------------


def begun(pictures, start, **settings):
    """The state before the first step of a run that starts from `start`."""
    config = helpers.vae_config(pictures, **{**RUN, "init_from": str(start), **settings})
    state = train_vae.init_state(config, train_vae.prepare(config))
    return helpers.host(checkpoint.start_from(start, state, config.keep_optimizer))


def test_a_fresh_optimizer_starts_from_the_averaged_weights(whole_run, pictures):
    workdir, trained = whole_run
    state = begun(pictures, workdir)
    trained = helpers.host(trained)
    helpers.assert_equal(state["params"], trained["ema_params"])
    helpers.assert_equal(state["ema_params"], trained["ema_params"])
    helpers.assert_equal(state["model_state"], trained["model_state"])
    helpers.assert_equal(state["discriminator"], trained["discriminator"])
    assert state["step"] == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((state["opt_state"], state["discriminator_opt_state"])))


def test_a_kept_optimizer_goes_on_with_the_weights_as_trained(whole_run, pictures):
    workdir, trained = whole_run
    state, trained = begun(pictures, workdir, keep_optimizer=True), helpers.host(trained)
    for name in ("params", "ema_params", "model_state", "discriminator"):
        helpers.assert_equal(state[name], trained[name])
    for name in ("opt_state", "discriminator_opt_state"):
        for moment in ("mu", "nu"):
            helpers.assert_equal(optax.tree.get(state[name], moment), optax.tree.get(trained[name], moment))
    assert state["step"] == 0
    counts = helpers.select(state["opt_state"], lambda path: path.endswith(".count"))
    assert sorted(int(count) for count in counts.values()) == [0, 4]  # the schedule's, Adam's


def test_a_model_directory_gives_weights_and_discriminator(whole_run, pictures, tmp_path):
    workdir, trained = whole_run
    loaded, discriminator = checkpoint.load_model(workdir), helpers.host(trained)["discriminator"]
    checkpoint.save_model(tmp_path, loaded.config, loaded.variables)
    alone = begun(pictures, tmp_path)
    helpers.assert_equal(alone["params"], loaded.variables["params"])
    assert helpers.differs(alone["discriminator"], discriminator)
    settings = {"name": "discriminator", "width": 6, "in_channels": 3}
    checkpoint.save_model(tmp_path / "discriminator", {"model": settings}, discriminator)
    helpers.assert_equal(begun(pictures, tmp_path)["discriminator"], discriminator)
    with pytest.raises(
        ValueError, match="keep_optimizer: .* holds weights alone; leave it out, or give a training run"
    ):
        begun(pictures, tmp_path, keep_optimizer=True)


def test_fine_tuning_runs_and_resumes_from_itself(whole_run, pictures, tmp_path):
    settings = {"init_from": str(whole_run[0]), "optim__learning_rate": 1e-9, "loop__total_steps": 2}
    config = helpers.vae_config(pictures, **{**RUN, **settings})
    state = train_vae.train_and_evaluate(config, str(tmp_path))
    helpers.assert_close(helpers.host(state)["params"], helpers.host(whole_run[1])["ema_params"], 1e-4)
    again = train_vae.train_and_evaluate(config, str(tmp_path))  # complete: nothing is done, nothing starts anew
    helpers.assert_equal(helpers.host(again), helpers.host(state))


def test_a_start_that_does_not_fit_is_refused(whole_run, pictures, tmp_path):
    for settings in ({}, {"keep_optimizer": True}):
        with pytest.raises(ValueError, match="has shape .*, the config needs .*config.model") as error:
            begun(pictures, whole_run[0], model__z_channels=16, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="is no run directory"):
        begun(pictures, tmp_path / "nowhere")
    checkpoint.write_config(tmp_path, {"model": {"name": "rqvae"}})
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        begun(pictures, tmp_path, keep_optimizer=True)

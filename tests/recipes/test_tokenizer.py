"""Stage 1: its step on one device and on eight, its switches, whole runs with resume, and what it refuses."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest

from configs import rqvae
from rq_jax import checkpoint, models, recipes
from rq_jax.data import make_dataset
from rq_jax.devices import sharding
from rq_jax.models.rqvae import RQVAEOutput
from rq_jax.recipes.tokenizer import Losses, Phase, Tokenizer
from rq_jax.training import run
from rq_jax.training.optimizer import make_optimizer

DEPTHS = (1, 2, 3)
SGD = {"optim__name": "sgd", "optim__learning_rate": 0.1}
SETTINGS = {"model__codebook_decay": 0.5, **SGD}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


def prepare(pictures, mesh=None, **settings):
    """A run on one device, where nothing is partitioned and programs compile faster."""
    return recipes.prepare(helpers.vae_config(pictures, **settings), mesh=mesh or helpers.make_mesh())


@pytest.fixture(scope="module")
def start(pictures):
    """Variables of the small tokenizer and a batch: no switch under test touches either."""
    recipe, data, _ = prepare(pictures)
    return helpers.drawn_variables(recipe.model), {"image": next(data.train.iterator())["image"]}


@functools.cache
def prepared_step(settings, pictures, mesh, read):
    recipe = prepare(pictures, mesh, **dict(settings)).recipe
    update = helpers.jit_update if mesh.size > 1 else helpers.one_by_one
    return recipe, update(recipe, Phase(), read)


def run_step(start, pictures, mesh=None, state=None, read=helpers.whole, **settings):
    """What `read` finds in one step of the small tokenizer."""
    mesh = mesh or helpers.make_mesh()
    settings = {**SETTINGS, "loop__ema_decay": 0.9, **settings}
    recipe, step = prepared_step(tuple(sorted(settings.items())), pictures, mesh, read)
    variables, batch = start
    state = helpers.start_state(recipe, variables) if state is None else state
    return step(helpers.place(state, mesh), sharding.put_batch(mesh, batch), recipe.frozen)


def make_step(start, pictures, **settings):
    """One step of the small tokenizer: (state, metrics, the state to go on from)."""
    new, metrics = run_step(start, pictures, **settings)
    return helpers.host(new), jax.device_get(metrics), new


# What some switches are seen in: programs without a backward pass, or without most of it.


def losses_of(state, metrics):
    return {name: metrics[name] for name in ("loss", "reconstruction_loss", "commitment_loss")}


def decoder_bias_and_losses(state, metrics):
    return state.params["decoder"], state.params["encoder"]["conv_out"]["bias"], losses_of(state, metrics)


@pytest.fixture(scope="module")
def base(start, pictures):
    """The step that every switch is compared with."""
    return make_step(start, pictures)


# --- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_eight_devices_make_the_step_of_one(start, pictures, name):
    settings = {"optim__name": name, "optim__learning_rate": {"sgd": 0.1, "adam": 1e-3}[name]}
    one, metrics_one, _ = make_step(start, pictures, **settings)
    eight, metrics_eight, _ = make_step(start, pictures, mesh=helpers.make_mesh(8), **settings)
    np.testing.assert_array_equal(metrics_eight.pop("code_counts"), metrics_one.pop("code_counts"))
    helpers.assert_close(metrics_eight, metrics_one)
    helpers.assert_close(eight["model_state"], one["model_state"])
    # Restarted codes have a count of exactly 1; the others are those that the batch used often.
    counts_K = one["model_state"]["codebook"]["counts_K"]
    np.testing.assert_array_equal(eight["model_state"]["codebook"]["counts_K"], counts_K)
    assert 0 < np.sum(counts_K == 1) < helpers.CODEBOOK_SIZE
    for name_of_tree in ("opt_state", "params", "ema_params"):
        trees = [state[name_of_tree] for state in (eight, one)]
        if name == "adam":
            if name_of_tree != "opt_state":
                trees = [helpers.where_certain(tree, one["opt_state"]) for tree in trees]
            # A key's bias adds the same to all scores of a query: all of its gradient is rounding.
            trees = [helpers.select(tree, lambda path: "['key']['bias']" not in path) for tree in trees]
        helpers.assert_close(*trees)


# --- switches ----------------------------------------------------------------------------------------------------------


def test_remat_changes_nothing_but_memory(start, pictures, base):
    state, metrics, _ = make_step(start, pictures, model__use_remat=True)
    helpers.assert_close(metrics, base[1])
    helpers.assert_close(state["params"], base[0]["params"])
    helpers.assert_close(state["model_state"], base[0]["model_state"])


def test_kmeans_places_the_codes_of_the_first_step_only(start, pictures, base):
    first, _, _ = make_step(start, pictures, model__use_kmeans_init=True)
    assert helpers.differs(first["model_state"], base[0]["model_state"])
    after, _, _ = make_step(start, pictures, state=base[2])
    with_kmeans, _, _ = make_step(start, pictures, state=base[2], model__use_kmeans_init=True)
    helpers.assert_equal(with_kmeans, after)


def test_pooled_update_keeps_the_codes_of_the_first_depth(start, pictures, base):
    state, metrics, _ = make_step(start, pictures, model__codebook_update="pooled")
    np.testing.assert_array_equal(metrics["code_counts"][0], base[1]["code_counts"][0])
    # Later depths search the table as it was, where a sequential update has moved it already.
    assert helpers.differs(metrics["code_counts"][1:], base[1]["code_counts"][1:])
    assert helpers.differs(state["model_state"], base[0]["model_state"])


def test_restart_moves_unused_codes_and_no_parameter(start, pictures):
    # With the pooled update the codes of a step do not see what the step makes of the codebook.
    with_restart, metrics, _ = make_step(start, pictures, model__codebook_update="pooled")
    without, metrics_without, _ = make_step(start, pictures, model__codebook_update="pooled", model__use_restart=False)
    helpers.assert_equal(without["params"], with_restart["params"])
    helpers.assert_equal(metrics_without, metrics)
    books = [state["model_state"]["codebook"] for state in (with_restart, without)]
    used_K = 0.5 * metrics["code_counts"].sum(0) >= 1
    assert 0 < used_K.sum() < helpers.CODEBOOK_SIZE
    np.testing.assert_array_equal(books[0]["sums_KE"][used_K], books[1]["sums_KE"][used_K])
    np.testing.assert_array_equal(books[0]["counts_K"][~used_K], 1)
    assert np.all(books[1]["counts_K"][~used_K] < 1)
    assert np.all(np.any(books[0]["sums_KE"] != books[1]["sums_KE"], axis=1) == ~used_K)


def test_bfloat16_is_for_the_networks(start, pictures, base):
    recipe = prepare(pictures, **SETTINGS, model__dtype="bfloat16").recipe
    state = helpers.start_state(recipe, start[0])
    state, _ = jax.eval_shape(functools.partial(recipe.update, phase=Phase()), state, start[1], None)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.model_state))} == {np.dtype("float32")}
    metrics = jax.device_get(run_step(start, pictures, read=losses_of, model__dtype="bfloat16"))
    assert metrics["reconstruction_loss"] != base[1]["reconstruction_loss"]
    np.testing.assert_allclose(metrics["loss"], base[1]["loss"], rtol=0.05)


def test_ema_average_leaves_training_alone(start, pictures, base):
    texts = []
    for decay in (0.9, 0.0):
        recipe = prepare(pictures, **SETTINGS, loop__ema_decay=decay).recipe
        state = helpers.start_state(recipe, start[0])
        texts.append(helpers.program_text(recipe, state, start[1], Phase(), helpers.without_average))
    assert state.ema_params is None
    assert texts[0] == texts[1]
    # Step 0 averages with decay 1 / 10.
    average = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, start[0]["params"], base[0]["params"])
    helpers.assert_close(base[0]["ema_params"], average)
    assert helpers.differs(base[0]["ema_params"], base[0]["params"])


def test_loss_settings_choose_and_weigh_the_image_terms(start):
    images, rng = start[1]["image"], np.random.default_rng(0)
    reconstruction = images + rng.normal(size=images.shape)
    difference, distances_B = reconstruction - images, rng.uniform(size=len(images))
    output = RQVAEOutput(
        reconstruction, None, np.zeros((8, 4, 2, 3)), np.zeros((8, 4, 2, 3, 3))
    )  # nothing to commit to
    for kind, expected in (("mse", np.mean(difference**2)), ("l1", np.mean(np.abs(difference)))):
        total, parts = total_and_parts(Losses(kind).terms(images, output, None))
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert parts == {"reconstruction_loss": total, "commitment_loss": 0}
        loss = Losses(kind, perceptual_weight=0.6)
        total, parts = total_and_parts(loss.terms(images, output, lambda a, b: distances_B))
        np.testing.assert_allclose(parts["perceptual_loss"], distances_B.mean(), rtol=1e-5)
        np.testing.assert_allclose(total, expected + 0.6 * distances_B.mean(), rtol=1e-5)
        total, parts = total_and_parts(loss.terms(images, output, None))  # before its start
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert parts.keys() == {"reconstruction_loss", "perceptual_loss", "commitment_loss"}
        assert parts["perceptual_loss"] == 0


def total_and_parts(terms):
    return sum(weight * value for weight, value in terms.values()), {name: value for name, (_, value) in terms.items()}


def test_terms_begin_at_their_steps():
    loss = Losses(perceptual_weight=1.0, perceptual_start_steps=2, adversarial_weight=0.7, adversarial_start_steps=3)
    assert [loss.phase(step) for step in (0, 1, 2, 3, 4)] == [
        (False, False), (False, False), (True, False), (True, True), (True, True),
    ]  # fmt: skip
    assert Losses().phase(9) == Phase()


@pytest.mark.parametrize("weight", [(), "a", None, True, ((1.0,),), (1.0, None)])
def test_a_weight_that_is_no_number_is_named(weight):
    with pytest.raises(ValueError, match=r"^loss.budget_weight: .* must be a number or a sequence of numbers$"):
        Losses(budget_weight=weight)
    with pytest.raises(ValueError, match=r"^loss.perceptual_weight: .* must be a number$"):
        Losses(perceptual_weight=weight)


def test_commitment_weight_weighs_the_pull_on_the_encoder(start, pictures):
    steps = [
        jax.device_get(run_step(start, pictures, read=decoder_bias_and_losses, loss__commitment_weight=weight))
        for weight in (0.25, 0.25 + 0.45, 0.25 + 2 * 0.45)
    ]
    (decoder, bias, parts), (other_decoder, other_bias, metrics), (_, last_bias, _) = steps
    for name in ("reconstruction_loss", "commitment_loss"):
        np.testing.assert_array_equal(metrics[name], parts[name])
    expected = parts["reconstruction_loss"] + 0.7 * parts["commitment_loss"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    # The decoder does not feel it; the encoder's step is linear in it.
    helpers.assert_equal(other_decoder, decoder)
    np.testing.assert_allclose(last_bias - bias, 2 * (other_bias - bias), rtol=0, atol=1e-6)
    assert np.abs(other_bias - bias).max() > 1e-5


# --- what is logged ----------------------------------------------------------------------------------------------------


def recipe_of(**settings):
    """A recipe for its summaries: its optimizer is not used."""
    model = models.create(**{**rqvae.get_config("demo").model, **settings})
    return Tokenizer(model, make_optimizer(learning_rate=0.1, total_steps=1), mesh=helpers.make_mesh())


@pytest.mark.parametrize(
    ("num_used", "vectors", "log_every", "use_restart", "advice"),
    [
        (3, 1280, None, True, "lower model.codebook_size or optim.learning_rate"),
        (3, 1280, None, False, "turn on model.use_restart, or lower model.codebook_size or optim.learning_rate"),
        (3, 128, 10, True, "lower model.codebook_size or optim.learning_rate"),
        (3, 128, 9, True, None),  # too few to tell
        (3, 1279, None, True, None),
        (4, 1280, None, True, None),
    ],
)
def test_collapse_is_warned_of_below_a_twentieth_of_the_codes(
    caplog, num_used, vectors, log_every, use_restart, advice
):
    recipe = recipe_of(codebook_size=64, code_shape=(8, 8, 2), use_restart=use_restart)
    if log_every:
        recipe = dataclasses.replace(recipe, config={"loop": {"log_every_steps": log_every}})
    counts_DK = np.full((2, 64), vectors / 64)
    counts_DK[1] = [vectors / num_used] * num_used + [0] * (64 - num_used)
    scalars = recipe.summarize({"loss": np.float32(2.5), "code_counts": counts_DK})
    assert scalars == {
        "loss": 2.5,
        "code_usage/depth1": 1.0,
        "code_usage/depth2": num_used / 64,
        "code_perplexity/depth1": pytest.approx(64, rel=1e-3),
        "code_perplexity/depth2": pytest.approx(num_used, rel=1e-3),
    }
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    of_log = "since the last log line"
    found = f"CODEBOOK COLLAPSE: depth 2 used only 4.7% of its 64 codes {of_log}; {advice}"
    assert messages == ([found] if advice else [])


def test_usage_is_measured_against_each_depths_own_codebook():
    sizes = (7, 5)
    recipe = recipe_of(codebook_size=sizes, code_shape=(8, 8, 2), use_shared_codebook=False)
    counts_DK = np.ones((2, 7))
    counts_DK[1, 5:] = 0  # padding, no codes
    scalars = recipe.summarize({"code_counts": counts_DK})
    assert scalars["code_usage/depth1"] == scalars["code_usage/depth2"] == 1.0


# --- whole runs --------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, step: int):
    """Interrupt this process while it logs its `step`-th step."""
    summarize, steps = Tokenizer.summarize, iter(range(1, 100))

    def summarize_and_stop(recipe, means):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return summarize(recipe, means)

    monkeypatch.setattr(Tokenizer, "summarize", summarize_and_stop)


@pytest.fixture(scope="module")
def prepared(pictures):
    """A run whose programs are compiled once for all tests."""
    return prepare(pictures, loop__ema_decay=0.9)


@pytest.fixture(scope="module")
def whole_run(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(*prepared, workdir)


def test_run_directory_holds_everything(whole_run):
    workdir, state = whole_run
    assert int(state.step) == 4 and int(state.skipped_steps) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["code_shape"] == list(helpers.CODE_SHAPE) and config["loop"]["total_steps"] == 4
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} == {"2", "4"}
    assert {path.name for path in (workdir / "pictures").iterdir()} == {
        "curves.png", "reconstructions_00000002.png", "reconstructions_00000004.png",
    }  # fmt: skip
    logged = helpers.read_metrics(workdir)
    assert list(logged) == [1, 2, 3, 4]
    training = {"loss", "reconstruction_loss", "commitment_loss", "gradient_norm", "learning_rate", "skipped_share"}
    training |= {f"code_{name}/depth{d}" for name in ("usage", "perplexity") for d in DEPTHS}
    evaluation = {"validation_loss", "ssim", *(f"psnr/depth{d}" for d in DEPTHS)}
    assert set(logged[1]) == set(logged[3]) == training
    assert set(logged[2]) == set(logged[4]) == training | evaluation


def test_evaluation_is_that_of_the_averaged_weights_on_the_held_out_pictures(whole_run, pictures):
    workdir, _ = whole_run
    loaded = checkpoint.load_model(workdir)
    data = make_dataset(name="folder", data_dir=pictures, split="validation", train=False, batch_size=5, image_size=16)
    images = next(data.iterator())["image"]
    reconstruct = jax.jit(functools.partial(loaded.model.apply, method="reconstruct_by_depth"))
    by_depth = reconstruct(loaded.variables, images)
    mse_DB = np.mean((np.clip(by_depth, -1, 1) - images) ** 2, axis=(2, 3, 4))
    logged = helpers.read_metrics(workdir)[4]
    for d in DEPTHS:
        np.testing.assert_allclose(logged[f"psnr/depth{d}"], np.mean(10 * np.log10(4 / mse_DB[d - 1])), rtol=1e-4)
    np.testing.assert_allclose(logged["validation_loss"], np.mean((by_depth[-1] - images) ** 2), rtol=1e-4)


def test_loaded_models_have_the_weights_of_the_state(whole_run):
    workdir, state = whole_run
    helpers.assert_equal(checkpoint.load_model(workdir).variables, jax.device_get(state.ema_variables))
    helpers.assert_equal(checkpoint.load_model(workdir, ema=False).variables, jax.device_get(state.variables))
    assert helpers.differs(checkpoint.load_model(workdir, step=2).variables, jax.device_get(state.ema_variables))


def test_resumed_run_is_the_uninterrupted_one(prepared, whole_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_at(patch, 3)
        run(*prepared, tmp_path)
    assert stop.value.code == 128 + signal.SIGINT
    assert helpers.read_metrics(tmp_path).keys() == {1, 2, 3}
    state = run(*prepared, tmp_path)
    helpers.assert_equal(helpers.host(state), helpers.host(whole_run[1]))
    assert helpers.read_metrics(tmp_path) == helpers.read_metrics(whole_run[0])


# --- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "code grid": ({"model__code_shape": (3, 3, 2)}, r"model.code_shape: grid \(3, 3\) does not divide the latent grid \(8, 8\)"),
    "code length": ({"model__code_dim": 9}, "model.code_dim: 9 must be a positive multiple of 8"),
    "batch size": ({"data__batch_size": 12}, "data.batch_size: 12 is not a multiple of 8"),
    "accumulation": ({"optim__accumulation_steps": 2}, "optim.accumulation_steps: 2 is for stage 2"),
    "loss": ({"loss__reconstruction": "l2"}, "loss.reconstruction: 'l2' is unknown; allowed are 'mse' and 'l1'"),
    "optimizer": ({"optim__name": "lion"}, "optim.name: 'lion' is unknown; allowed are 'adam', 'adamw', 'adafactor', 'muon' and 'sgd'"),
    "duration": ({"loop__total_steps": None}, "loop.total_steps and loop.total_epochs are both unset; set one of them"),
    "decay": ({"loop__ema_decay": 1.0}, r"loop.ema_decay: 1.0 is outside \[0, 1\)"),
    "mesh": ({"mesh__data": 3}, "mesh: .* does not fit 8 devices"),
    "update": ({"model__codebook_update": "both"}, "codebook_update: 'both' is unknown; allowed are 'sequential' and 'pooled'"),
    "start": ({"loss__adversarial_start_epochs": 1.0}, "loss.adversarial_start_steps and loss.adversarial_start_epochs are both set"),
    "weight": ({"loss__perceptual_weight": -1.0}, "loss.perceptual_weight: -1.0 must be finite and at least 0"),
    "late start": (
        {"loss__adversarial_weight": 0.7, "loss__adversarial_start_steps": 4}, "loss.adversarial_start_steps: 4 must be below the 4 steps of the run",
    ),
    "late distance": (
        {"loss__perceptual_weight": 0.7, "loss__perceptual_start_steps": 5}, "loss.perceptual_start_steps: 5 must be below the 4 steps of the run",
    ),
    "limit": ({"loss__max_adaptive_weight": float("inf")}, "loss.max_adaptive_weight: inf must be finite and at least 0"),
    "adversary": ({"loss__adversarial_weight": 0.7, "discriminator__num_layers": 0}, "discriminator.num_layers: 0 must be at least 1"),
    "adversary's rate": (
        {"loss__adversarial_weight": 0.7, "discriminator_optim__learning_rate": -1.0}, "discriminator_optim.learning_rate: -1.0 must be above 0",
    ),
    "optimizer of nothing": ({"keep_optimizer": True}, "keep_optimizer: True needs init_from, a run whose optimizer is kept"),
    "no start": ({"init_from": "/nowhere"}, "'/nowhere' is no run directory"),
    "label": ({"data__label_key": "colour"}, "data.label_key: 'colour' is unknown in dataset 'folder'"),
}  # fmt: skip


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(*_):
        raise AssertionError("settings must be refused before anything compiles")

    monkeypatch.setattr(Tokenizer, "init", fail)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(pictures, tmp_path, nothing_compiles, case):
    settings, message = REFUSED[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        recipes.train(helpers.vae_config(pictures, **settings), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_unknown_keys_are_refused(pictures, tmp_path, nothing_compiles):
    for key in ("model", "data", "optim", "loss", "evaluation", "loop", "mesh"):
        config = helpers.vae_config(pictures)
        with config.unlocked():
            config[key].colour = 1
        with pytest.raises(ValueError, match=rf"{key}.colour: unknown"):
            recipes.train(config, str(tmp_path / "run"))
    config = helpers.vae_config(pictures)
    with config.unlocked():
        config.sample = {}
    with pytest.raises(
        ValueError, match="config.sample: unknown; allowed are seed, init_from, keep_optimizer, model, "
    ):
        recipes.train(config, str(tmp_path / "run"))


def test_pictures_that_are_not_there_are_refused(pictures, tmp_path, nothing_compiles):
    with pytest.raises(FileNotFoundError, match="data.data_dir: .* is no directory"):
        recipes.train(helpers.vae_config(tmp_path / "nowhere"), str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="data.data_dir: .*empty.* holds no images; their names end in .png"):
        recipes.train(helpers.vae_config(tmp_path / "empty"), str(tmp_path / "run"))


def test_unreadable_pictures_are_refused(tmp_path, nothing_compiles):
    for split in ("train", "validation"):
        (tmp_path / "damaged" / split).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "damaged" / split / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="all 3 images are damaged"):
        recipes.train(helpers.vae_config(tmp_path / "damaged"), str(tmp_path / "run"))


@pytest.mark.parametrize("settings", [{"model__z_channels": 16}, {"optim__name": "sgd"}])
def test_other_settings_never_spoil_a_run(whole_run, pictures, settings, monkeypatch):
    workdir, _ = whole_run
    before = (workdir / "config.json").read_text()
    monkeypatch.setattr(
        Tokenizer, "init", lambda recipe, rng: helpers.zero_state(recipe)
    )  # which is refused whatever stands in it
    try:
        with pytest.raises(ValueError, match="give a new --workdir"):
            run(*prepare(pictures, loop__ema_decay=0.9, **settings), workdir)
        assert (workdir / "config.json").read_text() == before
    finally:
        (workdir / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.model.width=wide", ("width", "wide")),
        ("--config.model.widht=32", ("widht",)),
        ("--config.data.batch_size=7", ("data.batch_size: 7",)),
    ],
)
def test_command_line_ends_with_one_line(pictures, tmp_path, flag, words):
    command = [sys.executable, "train_vae.py", "--config=configs/rqvae.py:quicktest", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.data.name=folder", f"--config.data.data_dir={pictures}", flag]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    *log, line = result.stderr.strip().splitlines()  # what is read, where it was found out
    assert line.startswith("error: ") and len(log) <= 1 and all(" data: " in told for told in log), result.stderr
    assert all(word in line for word in words)
    assert not (tmp_path / "run").exists()

"""Stage 1 of tokenizers with grains: budget, figures, devices, thresholds, whole runs with resume, and what is refused."""

import json

import helpers
import jax
import numpy as np
import pytest

from rq_jax import checkpoint, grains, losses, recipes
from rq_jax.data import make_dataset
from rq_jax.devices import sharding
from rq_jax.evaluation.grains import describe_grains
from rq_jax.recipes.terms import Phase
from rq_jax.recipes.tokenizer import Tokenizer
from rq_jax.training import run

SGD = {"optim__name": "sgd", "optim__learning_rate": 0.1}
FEATURE = {"preset": "imagenet256_triple", "model__fine_ratio": (0.3, 0.2), "loss__budget_weight": (5.0, 9.0), **SGD}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


def prepare(pictures, mesh=None, **settings):
    return recipes.prepare(helpers.dqvae_config(pictures, **settings), mesh=mesh or helpers.make_mesh())


# --- one step ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(pictures):
    """A step of a trained router on one device and on eight: (recipe, batch, [(state, metrics), ...])."""
    recipe, data, _ = prepare(pictures, **FEATURE)
    variables, batch = helpers.drawn_variables(recipe.model), {"image": next(data.train.iterator())["image"]}
    results = []
    for mesh in (helpers.make_mesh(), helpers.make_mesh(8)):
        recipe = prepare(pictures, mesh, **FEATURE).recipe
        update = helpers.jit_update if mesh.size > 1 else helpers.one_by_one
        state = helpers.place(helpers.start_state(recipe, variables), mesh)
        state, metrics = update(recipe, Phase())(state, sharding.put_batch(mesh, batch), recipe.frozen)
        results.append((helpers.host(state), jax.device_get(metrics)))
    return recipe, variables, batch, results


def test_6_eight_devices_make_the_step_of_one(steps):
    """The budget's mean is that of the global batch, and the noise of the gates is drawn for it."""
    (one, metrics_one), (eight, metrics_eight) = steps[3]
    for name in ("code_counts", "grain_code_counts", "grains"):
        helpers.assert_equal(metrics_eight[name], metrics_one[name])
    helpers.assert_close(metrics_eight, metrics_one, 2e-5)
    for name in ("params", "model_state"):
        helpers.assert_close(eight[name], one[name], 2e-5)


def test_objective_and_counts_of_a_step(steps):
    recipe, variables, batch, ((_, metrics), _) = steps
    state, model = helpers.start_state(recipe, variables), recipe.model
    rngs = state.rng_of_step("restart", "dropout", "gate")
    run = jax.jit(lambda v, x: model.apply(v, x, True, rngs=rngs, mutable=["codebook"])[0])
    output = jax.device_get(run(variables, batch["image"]))
    budget = losses.budget_loss(output.gates, (0.3, 0.2), (5.0, 9.0))
    np.testing.assert_allclose(metrics["budget_loss"], budget, rtol=1e-4)
    assert budget > 0.05
    commitment = losses.commitment_loss(output.latents, output.partial_sums, output.cell_weights)
    np.testing.assert_allclose(metrics["commitment_loss"], commitment, rtol=1e-4)
    parts = metrics["reconstruction_loss"] + 0.25 * metrics["commitment_loss"] + metrics["budget_loss"]
    np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-5)
    # Each code counts once, for its grain and over all.
    assert metrics["code_counts"].sum() == np.sum(4**output.grains)
    regions_G = np.bincount(np.ravel(output.grains), minlength=3)
    np.testing.assert_array_equal([counts.sum() for counts in metrics["grain_code_counts"]], regions_G * (1, 4, 16))
    np.testing.assert_allclose(sum(metrics["grain_code_counts"]), metrics["code_counts"])
    np.testing.assert_array_equal(metrics["grains"]["regions"], regions_G)


def test_a_router_is_moved_by_its_budget(steps, pictures):
    """Beyond what the image's losses do: the same step with next to no budget moves it otherwise, and the decoder not."""
    recipe, variables, batch, ((one, _), _) = steps
    recipe = prepare(pictures, **{**FEATURE, "loss__budget_weight": 1e-9}).recipe
    update = helpers.one_by_one(recipe, Phase())
    state, metrics = update(helpers.start_state(recipe, variables), batch, recipe.frozen)
    assert metrics["budget_loss"] < 1e-7
    after = jax.device_get(state.params)
    helpers.assert_close(after["decoder"], one["params"]["decoder"])
    assert helpers.differs(after["feature_router"], variables["params"]["feature_router"])
    gate = [params["feature_router"]["gate"]["bias"] for params in (after, one["params"])]
    assert np.abs(gate[0] - gate[1]).max() > 1e-3


def test_summary_of_codes_and_grains(steps):
    recipe, _, _, ((_, metrics), _) = steps
    scalars = recipe.summarize(metrics)
    counts = metrics["grain_code_counts"]
    for g in range(3):
        assert scalars[f"code_usage/grain{g}/depth1"] == np.mean(counts[g][0] > 0)
        shares = counts[g][0] / max(counts[g][0].sum(), 1)
        perplexity = np.exp(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
        np.testing.assert_allclose(scalars[f"code_perplexity/grain{g}/depth1"], perplexity, rtol=1e-4)
    assert scalars["code_usage/depth1"] == np.mean(metrics["code_counts"][0] > 0)
    assert describe_grains(metrics["grains"]).items() <= scalars.items()
    assert all(type(value) is float for value in scalars.values())


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(pictures):
    return prepare(pictures, model__code_depth=2, loop__ema_decay=0.9)


@pytest.fixture(scope="module")
def whole_run(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(*prepared, workdir)


def test_a_run_measures_its_thresholds_first(whole_run, pictures):
    workdir, _ = whole_run
    recorded = json.loads((workdir / "config.json").read_text())["model"]["thresholds"]
    file = json.loads((workdir / "thresholds.json").read_text())
    assert recorded == [file["quantiles"]["0.5"]]
    expected = dict(
        data="folder", split="train", transform="resize_center_crop", image_size=16, patch_size=4, images=20
    )
    assert expected.items() <= file.items()
    model = checkpoint.load_tokenizer(workdir).model
    assert model.thresholds == tuple(recorded)
    data = make_dataset(name="folder", data_dir=pictures, split="train", train=False, batch_size=20, image_size=16)
    entropies = grains.patch_entropy(next(data.iterator())["image"], 4)
    assert abs(np.mean(np.asarray(entropies) > recorded[0]) - 0.5) < 0.01


def test_a_run_logs_and_shows_grains(whole_run, pictures):
    workdir, _ = whole_run
    logged = helpers.read_metrics(workdir)
    usage = [
        f"{name}/{of}depth{d}"
        for name in ("code_usage", "code_perplexity")
        for of in ("", "grain0/", "grain1/")
        for d in (1, 2)
    ]
    figures = [
        "grain_share/grain0",
        "grain_share/grain1",
        *(f"codes_per_image/{x}" for x in ("mean", "spread", "least", "most")),
    ]
    assert {*usage, *figures} <= logged[1].keys() and "budget_loss" not in logged[1]
    assert {f"validation_{name}" for name in figures} <= logged[4].keys()
    loaded = checkpoint.load_model(workdir)
    data = make_dataset(name="folder", data_dir=pictures, split="validation", train=False, batch_size=5, image_size=16)
    images = next(data.iterator())["image"]
    routing = jax.jit(lambda v, x: loaded.model.apply(v, x, method="route"))(loaded.variables, images)
    numbers = np.asarray(grains.num_codes(routing.grains, 2))
    expected = {"mean": numbers.mean(), "spread": numbers.std(), "least": numbers.min(), "most": numbers.max()}
    for name, value in expected.items():
        np.testing.assert_allclose(logged[4][f"validation_codes_per_image/{name}"], value, rtol=1e-5)
    np.testing.assert_allclose(logged[4]["validation_grain_share/grain1"], routing.grains.mean(), rtol=1e-5)
    assert logged[4].keys() >= {"psnr/depth1", "psnr/depth2"}
    assert (workdir / "pictures" / "reconstructions_00000004.png").is_file()


def test_resumed_run_is_the_uninterrupted_one(prepared, whole_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        helpers.interrupt_at_log(patch, Tokenizer, 3)
        run(*prepared, tmp_path)
    measured = (tmp_path / "thresholds.json").stat().st_mtime_ns
    state = run(*prepared, tmp_path)
    helpers.assert_equal(helpers.host(state), helpers.host(whole_run[1]))
    assert helpers.read_metrics(tmp_path) == helpers.read_metrics(whole_run[0])
    assert (tmp_path / "thresholds.json").stat().st_mtime_ns == measured  # once


@pytest.mark.parametrize("form", ["{}/thresholds.json", "~/thresholds.json"])
def test_a_given_file_is_kept_with_the_run(whole_run, pictures, tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(whole_run[0]))
    file = whole_run[0] / "thresholds.json"
    recipe, data, _ = prepare(pictures, thresholds=form.format(whole_run[0]))
    started, _ = recipe.start(str(tmp_path), data, is_fresh=True)
    assert (tmp_path / "thresholds.json").read_bytes() == file.read_bytes()
    assert list(started.model.thresholds) == [json.loads(file.read_text())["quantiles"]["0.5"]]
    assert started.config["model"]["thresholds"] == started.model.thresholds


def test_other_processes_are_told_what_the_first_one_reads(prepared, monkeypatch, tmp_path):
    """They may have no such file."""
    thresholds, answers = recipes.tokenizer.thresholds, ['[[1.5], ""]', '[null, "thresholds: refused"]']
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(thresholds.hosts, "of_first_process", lambda text: answers.pop(0))
    arguments = "/nowhere.json", prepared.recipe.model, prepared.recipe.calibration
    assert thresholds.of_file(*arguments) == (1.5,)
    with pytest.raises(ValueError, match="^thresholds: refused$"):
        thresholds.bind(tmp_path, "/nowhere.json", (1.5,), is_fresh=True)


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_thresholds(whole_run, pictures):
    workdir, before = whole_run[0], (whole_run[0] / "thresholds.json").read_bytes()
    for settings in ({"model__thresholds": (1.0,)}, {"model__fine_ratio": 0.25}):
        recipe, data, _ = prepare(pictures, **settings)
        with pytest.raises(
            ValueError, match=r"^model.thresholds: \[\d.*\] differ from \[\d.*\], with which the run in"
        ):
            recipe.start(str(workdir), data, is_fresh=False)
    assert (workdir / "thresholds.json").read_bytes() == before


def test_a_file_of_other_data_in_the_run_directory_is_named(whole_run, pictures, tmp_path):
    record = json.loads((whole_run[0] / "thresholds.json").read_text())
    (tmp_path / "thresholds.json").write_text(json.dumps({**record, "images": 9}))
    recipe, data, _ = prepare(pictures)
    with pytest.raises(
        ValueError, match="^thresholds: '.*' was measured on other data: images 9 in place of 20; measure"
    ):
        recipe.start(str(tmp_path), data, is_fresh=True)


def test_thresholds_are_measured_before_a_state_is_drawn(prepared):
    with pytest.raises(ValueError, match="^model.thresholds: not measured yet; `start` does that, or set them"):
        prepared.recipe.init(jax.random.key(0))


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(*_):
        raise AssertionError("settings must be refused before anything compiles")

    monkeypatch.setattr(Tokenizer, "init", fail)
    monkeypatch.setattr(recipes.tokenizer.thresholds, "measure_thresholds", fail)


REFUSED = {
    "a budget that nothing feeds": (
        {"loss__budget_weight": 20.0},
        r"^loss.budget_weight: 20.0 is of a router that trains, which this model does not have; set it to 0$",
    ),
    "a router without a budget": (
        {"model__router": "feature"},
        r"^loss.budget_weight: 0.0 holds no share of a router that trains to model.fine_ratio; set it above 0, as the",
    ),
    "a budget of other grains": (
        {**FEATURE, "loss__budget_weight": (1.0, 1.0, 1.0)},
        r"^loss.budget_weight: \(1.0, 1.0, 1.0\) has 3 entries; give one, or 2 for the grains above 0$",
    ),
    "a negative budget": ({**FEATURE, "loss__budget_weight": (1.0, -1.0)}, r"^loss.budget_weight: .* must be finite and"),
    "ratio": ({"model__fine_ratio": 1.5}, r"^model.fine_ratio: 1.5 is outside \(0, 1\)"),
    "levels": ({"model__num_grains": 4}, r"^model.num_grains: 4 is outside 2..3, the levels of the encoder$"),
    "regions": ({"model__image_size": 18}, r"^model.image_size: H = 18 must be a positive multiple of 4"),
    "thresholds that fall": (
        {"preset": "imagenet256_triple_entropy", "model__thresholds": (2.0, 1.0)},
        r"^model.thresholds: \[2.0, 1.0\] must be finite and increasing",
    ),
    "a file for a router without": ({**FEATURE, "thresholds": "FILE"}, r"^thresholds: '.*' is for an entropy router, which"),
    "thresholds twice": (
        {"thresholds": "FILE", "model__thresholds": (1.0,)},
        r"^thresholds: '.*' and model.thresholds \(1.0,\) are both set; set one of them$",
    ),
    "a file of other data": (
        {"thresholds": "OTHER"},
        r"^thresholds: '.*' was measured on other data: data 'imagenet2012' in place of 'folder', images 9 in place of 20",
    ),
    "a file of other regions": (
        {"preset": "imagenet256_triple_entropy", "thresholds": "FILE"},
        r"^thresholds: '.*' was measured on other data: patch_size 4 in place of 8",
    ),
    "a file of the original": ({"thresholds": "ORIGINAL"}, r"^thresholds: '.*' is a file of the original"),
    "a file that is not there": (
        {"thresholds": "~/nowhere.json"},
        r"^thresholds: '/.*/nowhere.json' cannot be read \(No such file or directory\); give a file of python -m rq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(whole_run, pictures, tmp_path, nothing_compiles, case):
    settings, message = REFUSED[case]
    record = json.loads((whole_run[0] / "thresholds.json").read_text())
    files = {"FILE": record, "OTHER": {**record, "data": "imagenet2012", "images": 9}}
    files["ORIGINAL"] = {str(percent): 1.0 for percent in range(1, 100)}
    settings = dict(settings)
    if (name := settings.get("thresholds")) in files:
        (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
        settings["thresholds"] = str(tmp_path / f"{name}.json")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        recipes.train(helpers.dqvae_config(pictures, **settings), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_transformer_of_one_grain_refuses_the_tokenizer(whole_run, pictures):
    with pytest.raises(
        ValueError, match="^tokenizer: '.*' holds a 'dqvae', whose regions have unlike numbers of codes; a model 'rqt"
    ):
        recipes.prepare(helpers.transformer_config(pictures, tokenizer=str(whole_run[0])))

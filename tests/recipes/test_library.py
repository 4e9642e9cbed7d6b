"""Both stages as a library: models, recipes and data made by hand, without a config.

The README's snippet, which `make test` runs, trains both; stage 2 here is slow.
"""

import functools
import os
import signal

import helpers
import jax
import numpy as np
import pytest

from rq_jax import checkpoint, data, models, recipes, sampling
from rq_jax.checkpoint import saver
from rq_jax.recipes.codes import CodeCounter
from rq_jax.recipes.transformer import Losses
from rq_jax.training import LoopSettings, budget, make_optimizer, run

TOKENIZER = dict(
    name="rqvae", image_size=16, in_channels=3, width=8, width_multipliers=(1, 2), num_res_blocks=1, norm_groups=4,
    attention_resolutions=(), z_channels=8, code_shape=(4, 4, 2), code_dim=32, codebook_size=7, use_remat=False,
)  # fmt: skip
TRANSFORMER = dict(
    name="rqtransformer", code_shape=(4, 4, 2), code_dim=32, codebook_size=7, model_dim=12, num_heads=2,
    spatial_layers=1, depth_layers=1, cond_vocab_size=3, cond_length=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


@pytest.fixture(scope="module")
def splits():
    rng = np.random.default_rng(0)
    images, held_out = (rng.integers(0, 256, (count, 16, 16, 3), np.uint8) for count in (12, 6))
    return data.from_arrays(images, held_out, np.arange(12) % 3, np.arange(6) % 3, batch_size=4)


def settings(total_steps, **more):
    intervals = {"log_every_steps": 5, "evaluate_every_steps": 10, "checkpoint_every_steps": 5}
    return LoopSettings(total_steps, **{**intervals, **more})


@pytest.fixture(scope="module")
def trained_tokenizer(splits, tmp_path_factory):
    """(run directory, recipe, last state) of ten steps."""
    model, optimizer = models.create(**TOKENIZER), make_optimizer(learning_rate=1e-3, total_steps=10)
    recipe = recipes.Tokenizer(model, optimizer, mesh=helpers.make_mesh(), ema_decay=0.9)
    workdir = tmp_path_factory.mktemp("tokenizer")
    return workdir, recipe, run(recipe, splits, settings(10), workdir)


def make_transformer(trained_tokenizer, **more):
    optimizer = make_optimizer(learning_rate=1e-3, total_steps=3)
    tokenizer = checkpoint.load_tokenizer(trained_tokenizer[0])
    return recipes.Transformer(models.create(**TRANSFORMER), tokenizer, optimizer, mesh=helpers.make_mesh(), **more)


@pytest.fixture(scope="module")
def interrupted_start(trained_tokenizer, splits, tmp_path_factory):
    """A run directory after a SIGINT between the counts of the codes and the first step."""
    shown_cond = np.arange(36)[:, None] % 3
    recipe, workdir = make_transformer(trained_tokenizer, shown_cond=shown_cond), tmp_path_factory.mktemp("transformer")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CodeCounter, "soft_spread", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        run(recipe, splits, settings(3), workdir)
    return workdir, recipe, sorted(path.name for path in workdir.iterdir()), saver.steps_of(workdir / "checkpoints")


@pytest.fixture(scope="module")
def trained_transformer(interrupted_start, splits):
    """(run directory, recipe, last state) of three steps, where a start was interrupted before."""
    workdir, recipe, *_ = interrupted_start
    return workdir, recipe, run(recipe, splits, settings(3), workdir)


def test_a_tokenizer_is_trained_and_loaded(trained_tokenizer):
    workdir, recipe, state = trained_tokenizer
    assert int(state.step) == 10 and int(state.skipped_steps) == 0
    assert np.isfinite(helpers.read_metrics(workdir)[10]["validation_loss"])
    loaded = checkpoint.load_model(workdir)
    assert loaded.model == recipe.model
    helpers.assert_equal(loaded.variables, jax.device_get(state.ema_variables))


def test_a_time_that_suffices_changes_nothing(trained_tokenizer, splits, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(budget, "_TIMED_SECONDS", 0)
    workdir, recipe, state = trained_tokenizer
    caplog.set_level("INFO", "rq_jax")
    again = run(recipe, splits, settings(10, time_budget_seconds=1e6), tmp_path)
    assert "; all 10 steps are taken, which end after about " in caplog.text
    helpers.assert_equal(*(jax.device_get(each.replace(rng=None)) for each in (again, state)))
    assert helpers.read_metrics(tmp_path) == helpers.read_metrics(workdir)


@pytest.mark.slow
def test_a_transformer_is_trained_on_it_and_sampled(trained_tokenizer, trained_transformer, splits):
    workdir, recipe, state = trained_transformer
    assert int(state.step) == 3 and int(state.skipped_steps) == 0
    loaded = checkpoint.load_model(workdir)
    assert loaded.model == recipe.model
    helpers.assert_equal(loaded.variables["params"], jax.device_get(state.params))
    helpers.assert_equal(loaded.tokenizer.variables, checkpoint.load_model(trained_tokenizer[0]).variables)
    assert loaded.config["class_names"] == list(splits.train.class_names)
    codes = sampling.generate(loaded.model, loaded.variables, jax.random.key(1), 36, np.arange(36)[:, None] % 3)
    assert codes.shape == (36, 4, 4, 2) and 0 <= codes.min() and codes.max() < 7
    decode = jax.jit(functools.partial(loaded.tokenizer.model.apply, method="decode_codes"))
    images = decode(loaded.tokenizer.variables, codes[:2])
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()


@pytest.mark.slow
def test_a_signal_during_the_start_ends_it_at_once(interrupted_start, trained_transformer):
    """Nothing is lost that was there, and the next start is a fresh one."""
    _, _, names, steps = interrupted_start
    assert "metrics.jsonl" not in names and "config.json" not in names and steps == []
    assert list(helpers.read_metrics(trained_transformer[0])) == [3]


@pytest.mark.parametrize("stage", ["tokenizer", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_its_own_data_alone(request, stage):
    workdir, recipe, _ = request.getfixturevalue(f"trained_{stage}")
    images, classes = np.zeros((12, 16, 16, 3), np.uint8), np.arange(12) % 4
    other = data.from_arrays(images, images[:6], classes, classes[:6], batch_size=4)
    with pytest.raises(
        ValueError, match="^data: train: there are 4 classes, and were 3 when the run in '.*' was start"
    ):
        run(recipe, other, settings(20), workdir)


def test_settings_of_a_model_make_the_model():
    for keywords in (TOKENIZER, TRANSFORMER):
        model = models.create(**keywords)
        of_model = models.settings_of(model)
        assert keywords.items() <= of_model.items()
        assert models.create(**of_model) == model
    assert models.create(**{**of_model, "model_dim": 24}) != model


def test_a_recipe_without_a_config_writes_that_of_its_model(trained_tokenizer):
    assert trained_tokenizer[1].config == {"model": models.settings_of(trained_tokenizer[1].model)}
    assert checkpoint.read_config(trained_tokenizer[0])["model"]["codebook_size"] == 7
    recipe = make_transformer(trained_tokenizer)
    assert recipe.config == {"model": models.settings_of(recipe.model), "sample": {}}


def test_recipes_refuse_settings_that_do_not_fit(trained_tokenizer):
    model, optimizer = models.create(**TOKENIZER), make_optimizer(learning_rate=1e-3, total_steps=10)
    with pytest.raises(ValueError, match=r"^loop.ema_decay: 1 is outside \[0, 1\); 0 keeps no average$"):
        recipes.Tokenizer(model, optimizer, ema_decay=1)
    with pytest.raises(ValueError, match="^optim.accumulation_steps: 2 is for stage 2; "):
        recipes.Tokenizer(model, optimizer._replace(accumulation_steps=2))
    with pytest.raises(ValueError, match="^guidance: 2.0 needs a model trained with use_null_cond"):
        make_transformer(trained_tokenizer, sample={"guidance": 2.0})
    with pytest.raises(ValueError, match="^loss.cond_dropout: 0.1 and model.use_null_cond: False belong together"):
        make_transformer(trained_tokenizer, losses=Losses(cond_dropout=0.1))


# --- the run of a config -----------------------------------------------------------------------------------------------


def test_a_prepared_run_is_what_training_run_takes(pictures):
    mesh = helpers.make_mesh()
    prepared = recipes.prepare(helpers.vae_config(pictures, loop__keep_best=True), stage=1, mesh=mesh)
    assert isinstance(prepared, recipes.Prepared) and prepared._fields == ("recipe", "data", "settings")
    assert isinstance(prepared.recipe, recipes.Tokenizer) and prepared.recipe.mesh == mesh
    assert prepared.settings.total_steps == 4 and prepared.settings.keep_best
    assert prepared.data.train.num_examples == prepared.data.ordered.num_examples == 20
    assert prepared.data.validation.num_examples == 5
    assert recipes.prepare(helpers.vae_config(pictures)).recipe.mesh.devices.size == 8  # all, where none is given


def test_the_config_of_a_shorter_run_is_one(pictures):
    """All of its durations, whatever their unit, fit into the steps that are taken."""
    config = helpers.vae_config(
        pictures, loss__adversarial_weight=0.75, loss__adversarial_start_steps=0, loss__adversarial_start_epochs=8,
        loss__adversarial_warmup_steps=7, loop__total_steps=0, loop__total_epochs=20, optim__schedule="cosine",
        optim__warmup_steps=None, optim__warmup_epochs=3, optim__hold_steps=6,
    )  # fmt: skip
    longer = recipes.prepare(config, mesh=helpers.make_mesh())
    assert longer.settings.total_steps == 40
    shorter = recipes.prepare(budget.shortened(longer.recipe.config, 40, 20), mesh=helpers.make_mesh())
    assert shorter.settings.total_steps == 20
    assert (shorter.recipe.adversary.start_steps, shorter.recipe.adversary.warmup_steps) == (8, 3)
    for step in (0, 1, 3, 5, 12, 19):
        rates = shorter.recipe.optimizer.learning_rate(step), longer.recipe.optimizer.learning_rate(2 * step)
        np.testing.assert_allclose(*rates, rtol=1e-6)


def test_a_script_refuses_the_model_of_the_other(pictures, tmp_path):
    cases = {
        2: (helpers.vae_config(pictures), "'rqvae' is a model of stage 1, not of stage 2"),
        1: (helpers.transformer_config(pictures), "'rqtransformer' is a model of stage 2, not of stage 1"),
    }
    for stage, (config, words) in cases.items():
        with pytest.raises(ValueError, match=f"^model.name: {words}; use its own script$"):
            recipes.train(config, str(tmp_path / "run"), stage=stage)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused(pictures, tmp_path):
    allowed = ", ".join(recipes.RECIPES)
    for name in ("vqgan", "discriminator"):  # a model, but none that is trained by itself
        config = helpers.vae_config(pictures, model__name=name)
        with pytest.raises(ValueError, match=f"^model.name: '{name}' is unknown; allowed are {allowed}$"):
            recipes.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

"""What comes back from a run directory: states bit for bit, models, tokenizers, and one line for what is wrong."""

import functools
import json
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_state import (
    OPTIMIZER,
    RQTRANSFORMER,
    RQVAE,
    assert_equal,
    fill,
    halved,
    model_state_of,
    numbers,
    shapes_of,
    toy_state,
)  # fmt: skip

from rq_jax import checkpoint, models
from rq_jax.checkpoint import Checkpointer, load_model
from rq_jax.devices import sharding
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.state import apply_gradients

CODEBOOKS = {
    "none": None,
    "shared": numbers((7, 2), 1),
    "unequal": (numbers((7, 2), 2), numbers((5, 2), 3), numbers((3, 2), 4)),
}


# --- states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_state_comes_back_bit_for_bit(tmp_path, codebook, use_ema):
    state = toy_state(4, CODEBOOKS[codebook], use_ema)
    host = {"best_loss": math.inf, "bad_evaluations": 2, "stopped": False, "data": {"next_batch": 17}}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step is None
        checkpointer.save(state, host)
        assert checkpointer.latest_step == 4
    template = toy_state(0, jax.tree.map(np.zeros_like, CODEBOOKS[codebook]), use_ema)
    with Checkpointer(tmp_path) as checkpointer:
        restored, known = checkpointer.restore(template)
    assert_equal(restored, state)
    assert jax.random.uniform(restored.rng) == jax.random.uniform(state.rng)
    assert known == host


def test_a_state_comes_back_to_its_devices(tmp_path):
    mesh = sharding.make_mesh(fsdp=2)
    state = jax.device_put(toy_state(1, size=8), sharding.state_shardings(mesh, toy_state(1, size=8)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, {})
        checkpointer.wait()
        other = sharding.make_mesh(data=2, fsdp=-1)
        template = jax.device_put(toy_state(0, size=8), sharding.state_shardings(other, toy_state(0, size=8)))
        restored, _ = checkpointer.restore(template)
    assert_equal(restored, state)
    assert restored.params["w_MF"].sharding == template.params["w_MF"].sharding != state.params["w_MF"].sharding


def test_the_newest_checkpoints_stay(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (2, 3, 5):
            checkpointer.save(toy_state(step), {"note": step})
        checkpointer.save(toy_state(5, size=6), {"note": "again"})  # is there already
        checkpointer.wait()
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "5"}
        assert checkpointer.latest_step == 5
        restored, host = checkpointer.restore(toy_state())
    assert_equal(restored, toy_state(5))
    assert host == {"note": 5}


@pytest.mark.parametrize(
    "saved, wanted, what",
    [
        (dict(size=6), {}, "'params/w_MF' has shape (6, 3), the config needs (5, 3)"),
        (dict(use_ema=False), {}, "'ema_params/bias_F' has shape None, the config needs (3,)"),
        (
            dict(codebook=CODEBOOKS["unequal"]),
            dict(codebook=CODEBOOKS["shared"]),
            "'model_state/codebook/codebook_KE' has shape None, the config needs (7, 2)",
        ),
        (
            dict(optimizer=make_optimizer(name="sgd", learning_rate=0.1, total_steps=9)),
            {},
            "'training/opt_state/0/0/count' has shape None, the config needs ()",
        ),
    ],
    ids=["shape", "average", "codebook", "optimizer"],
)
def test_a_checkpoint_of_another_config_is_refused(tmp_path, saved, wanted, what):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(toy_state(3, **saved), {})
        checkpointer.wait()
        with pytest.raises(ValueError) as error:
            checkpointer.restore(toy_state(**wanted))
    hint = "go on with the config that the run was started with or give a new --workdir"
    assert str(error.value) == f"'{tmp_path / 'checkpoints' / '3'}': {what}; {hint}"


@pytest.mark.parametrize("size", [7, 200_000])
def test_updates_in_place_do_not_reach_a_pending_save(tmp_path, size):
    mesh = sharding.make_mesh()
    start = functools.partial(toy_state, 3, CODEBOOKS["unequal"], size=size)
    state = jax.device_put(start(), sharding.state_shardings(mesh, start()))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        grads = jax.tree.map(jnp.ones_like, state.params)
        model_state = jax.tree.map(lambda x: x + 1, state.model_state)
        return apply_gradients(state, OPTIMIZER, grads, jnp.float32(0), model_state, 0.5)[0]

    before, state = state, step(state)  # compiled: the next ones follow the save at once
    assert before.step.is_deleted() and before.params["w_MF"].is_deleted()
    expected = jax.tree.map(jnp.copy, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, {})
        checkpointer.save_best(state)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        checkpointer.wait()
        restored, _ = checkpointer.restore(start())
    assert_equal(restored, expected)


# --- models from run directories ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A stage-1 run directory with checkpoints of steps 2 and 5."""
    write_run(tmp_path, [2, 5])
    return tmp_path


def write_run(directory, steps, best=(), use_ema=True):
    checkpoint.write_config(directory, {"model": RQVAE, "seed": 3})
    with Checkpointer(directory, keep=9) as checkpointer:
        for step in steps:
            checkpointer.save(model_state_of("rqvae", step, use_ema), {})
        for step in best:
            checkpointer.save_best(model_state_of("rqvae", step, use_ema))


def assert_loaded(loaded, state, ema=True):
    assert_equal(loaded.variables, state.ema_variables if ema else state.variables)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded.variables))
    assert loaded.model == models.create(**RQVAE)
    assert loaded.config == json.loads(json.dumps({"model": RQVAE, "seed": 3}))
    assert loaded.tokenizer is None


def test_load_model_takes_the_newest_and_the_average(run):
    assert_loaded(load_model(run), model_state_of("rqvae", 5))
    assert_loaded(load_model(str(run), ema=False), model_state_of("rqvae", 5), ema=False)
    assert_loaded(load_model(run, step=2), model_state_of("rqvae", 2))


def test_load_model_puts_weights_where_they_are_used(tmp_path):
    variables = model_state_of("rqvae", 3).ema_variables
    for directory in (tmp_path, tmp_path / "tokenizer"):
        checkpoint.save_model(directory, {"model": RQVAE}, variables)
    spread = sharding.replicated(helpers.make_mesh(2))
    for device, where in ((jax.devices()[1], {jax.devices()[1]}), (spread, spread.device_set)):
        loaded = load_model(tmp_path, device=device)
        for part in (loaded, loaded.tokenizer):
            assert_equal(part.variables, jax.tree.map(np.asarray, variables))
            assert all(leaf.sharding.device_set == where for leaf in jax.tree.leaves(part.variables))
    assert type(jax.tree.leaves(load_model(tmp_path).tokenizer.variables)[0]) is np.ndarray


def test_load_model_prefers_the_best(run):
    write_run(run, [], best=[2, 4])
    assert {path.name for path in (run / "best").iterdir()} == {"4"}
    assert_loaded(load_model(run), model_state_of("rqvae", 4))
    assert_loaded(load_model(run, ema=False), model_state_of("rqvae", 4), ema=False)
    assert_loaded(load_model(run, step=5), model_state_of("rqvae", 5))
    assert_loaded(load_model(run, step=4), model_state_of("rqvae", 4))


def test_a_step_is_taken_where_it_is_whole(run):
    write_run(run, [], best=[5])
    (run / "best" / "5" / "manifest.json").unlink()
    assert_loaded(load_model(run, step=5), model_state_of("rqvae", 5))
    (run / "checkpoints" / "5" / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"best/5' is damaged: manifest.json cannot be read .*; choose another of the steps"
    ):
        load_model(run, step=5)


@pytest.mark.parametrize("item, averaged, trained", [("training", 5, 5), ("ema_params", 2, 5), ("params", 5, 2)])
def test_only_what_is_read_has_to_be_whole(run, item, averaged, trained):
    largest = max((run / "checkpoints" / "5" / item / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    assert_loaded(load_model(run), model_state_of("rqvae", averaged))
    assert_loaded(load_model(run, ema=False), model_state_of("rqvae", trained), ema=False)


@pytest.mark.parametrize("step", [4, 3])
def test_a_new_best_replaces_one_that_a_killed_run_left_at_a_later_step(tmp_path, step):
    write_run(tmp_path, [], best=[4])
    state = model_state_of("rqvae", 9).replace(step=jnp.int32(step))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_best(state)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {str(step)}
    assert_loaded(load_model(tmp_path), state)


def test_load_model_passes_over_a_best_that_was_being_written(run):
    (run / "best" / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    (run / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    assert_loaded(load_model(run), model_state_of("rqvae", 5))


def test_load_model_without_an_average_takes_the_weights(tmp_path):
    write_run(tmp_path, [3], use_ema=False)
    assert_loaded(load_model(tmp_path), model_state_of("rqvae", 3, use_ema=False), ema=False)


def test_load_model_names_what_is_missing(run):
    missing = run / "nowhere"
    with pytest.raises(FileNotFoundError) as error:
        load_model(missing)
    expected = f"'{missing}' is no run directory: it has no config.json; give the --workdir of a training run"
    assert str(error.value) == expected
    with pytest.raises(FileNotFoundError) as error:
        load_model(run, step=3)
    assert str(error.value) == f"'{run}' holds no checkpoint of step 3; there are steps [2, 5]"
    checkpoint.write_config(run / "fresh", {"model": RQVAE})
    with pytest.raises(FileNotFoundError) as error:
        load_model(run / "fresh")
    assert str(error.value) == f"'{run / 'fresh'}' holds no checkpoint; there are steps (none)"


# --- model directories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_model_directory_comes_back_bit_for_bit(tmp_path, dtype):
    state = model_state_of("rqvae", 3)
    variables = jax.tree.map(lambda x: np.asarray(x, dtype), state.ema_variables)
    checkpoint.save_model(tmp_path / "out", {"model": RQVAE, "seed": 3}, variables)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    expected = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    assert_equal(load_model(tmp_path / "out").variables, expected)
    if dtype == np.float32:
        assert_loaded(load_model(tmp_path / "out"), state)


def test_half_precision_is_half_the_bytes_and_comes_back_as_float32(tmp_path):
    variables = jax.tree.map(np.asarray, model_state_of("rqvae", 3).ema_variables)
    for dtype in (None, "float16"):
        checkpoint.save_model(tmp_path / str(dtype), {"model": RQVAE}, variables, dtype)
    whole, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("None", "float16"))
    values = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert abs(whole - half - 2 * values) < 300  # the header names another dtype
    assert_equal(load_model(tmp_path / "float16").variables, halved(variables))


def test_half_precision_of_everything_is_read_and_holds_no_large_counts(tmp_path):
    variables = jax.tree.map(np.asarray, model_state_of("rqvae", 3).ema_variables)
    halves = jax.tree.map(lambda x: x.astype(np.float16), variables)  # as directories of before have it
    checkpoint.save_model(tmp_path / "before", {"model": RQVAE}, halves)
    assert_equal(load_model(tmp_path / "before").variables, jax.tree.map(lambda x: x.astype(np.float32), halves))
    variables["codebook"] = jax.tree.map(lambda x: np.full_like(x, 1e6), variables["codebook"])
    checkpoint.save_model(tmp_path / "run", {"model": RQVAE}, variables)
    checkpoint.ship(tmp_path / "run", tmp_path / "shipped")
    assert_equal(load_model(tmp_path / "shipped").variables, halved(variables))


@pytest.mark.parametrize("value", [1e5, np.nan])
def test_what_half_precision_cannot_hold_is_refused(tmp_path, value):
    variables = {"params": {"w": np.array([1.0, value], np.float32)}}
    with pytest.raises(ValueError, match="^dtype: 'params/w' has a value of .*, beyond float16; leave dtype out$"):
        checkpoint.save_model(tmp_path, {"model": RQVAE}, variables, "float16")
    with pytest.raises(ValueError, match="^dtype: 'bfloat16' is unknown; give 'float16', or leave it out"):
        checkpoint.save_model(tmp_path, {"model": RQVAE}, variables, "bfloat16")
    assert not any(tmp_path.iterdir())


def test_shipped_is_the_pair_in_half_precision_without_its_old_path(tmp_path):
    tokenizer = model_state_of("rqvae", 3)
    config = {"model": RQVAE, "tokenizer": str(tmp_path / "stage1")}
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "metrics.jsonl").write_text('{"step": 1}\n')
    checkpoint.save_model(tmp_path / "run", config, tokenizer.ema_variables)
    checkpoint.save_model(tmp_path / "run" / "tokenizer", {"model": RQVAE}, tokenizer.ema_variables)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    checkpoint.ship(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer",
        "metrics.jsonl",
    }
    assert (tmp_path / "out" / "tokenizer" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    shipped = load_model(tmp_path / "out")
    expected = halved(jax.device_get(tokenizer.ema_variables))
    assert_equal(shipped.variables, expected)
    assert_equal(shipped.tokenizer.variables, expected)
    assert shipped.config["tokenizer"] is None and "tokenizer" not in shipped.tokenizer.config


def test_shipped_by_text_has_its_texts_and_no_path_of_the_machine(tmp_path):
    state = model_state_of("rqvae", 3)
    data = {"name": "avatars", "text_key": "caption", "text_tokenizer": "/somewhere/bpe.json"}
    judge = {"vgg": "/somewhere/vgg16.pth", "heads": "/somewhere/heads.npz"}
    paths = {"init_from": "/elsewhere", "keep_optimizer": True, "thresholds": "/else/where.json"}
    paths["perceptual"] = judge
    checkpoint.save_model(tmp_path / "run", {"model": RQVAE, "data": data, **paths}, state.ema_variables)
    texts = {"text_tokenizer.json": "{}", "prompts.json": '["a red cat"]'}
    for name, text in texts.items():
        (tmp_path / "run" / name).write_text(text)
    checkpoint.ship(tmp_path / "run", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in texts} == texts
    config = checkpoint.read_config(tmp_path / "out")
    assert "where" not in json.dumps(config) and config["data"] == {**data, "text_tokenizer": None}
    assert config["perceptual"] == dict.fromkeys(judge) and config["keep_optimizer"] is False
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_model_directory_has_no_steps(tmp_path):
    checkpoint.save_model(tmp_path, {"model": RQVAE}, fill(shapes_of("rqvae")))
    with pytest.raises(FileNotFoundError) as error:
        load_model(tmp_path, step=4)
    assert str(error.value) == f"'{tmp_path}' is a model directory without steps, but step is 4; leave it out"


def test_weights_of_other_shapes_are_refused(tmp_path):
    variables = fill(shapes_of("rqvae"))
    checkpoint.save_model(tmp_path, {"model": {**RQVAE, "codebook_size": (7, 5, 4)}}, variables)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    expected = "'codebook/codebook_KE/2' has shape (3, 4), the config needs (4, 4)"
    assert str(error.value) == f"'{tmp_path / 'model.safetensors'}': {expected}"
    del variables["params"]["quant_conv"]
    checkpoint.save_model(tmp_path, {"model": RQVAE}, variables)
    with pytest.raises(ValueError, match=r"'params/quant_conv/bias' has shape None, the config needs \(2,\)"):
        load_model(tmp_path)


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    checkpoint.save_model(tmp_path, {"model": RQVAE}, {"w": jnp.ones(2)})
    checkpoint.write_config(tmp_path, {"model": RQVAE})
    assert not list(tmp_path.iterdir())


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_every_value_name_and_shape():
    variables = jax.tree.map(np.asarray, fill(shapes_of("rqvae")))
    original = checkpoint.fingerprint(variables)
    assert len(original) == 16 and int(original, 16) >= 0
    assert checkpoint.fingerprint(jax.tree.map(jnp.asarray, variables)) == original
    leaves, structure = jax.tree.flatten(variables)
    seen = {original}
    for i, leaf in enumerate(leaves):
        changed = leaf.copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.inf, dtype=np.float32)
        seen.add(checkpoint.fingerprint(structure.unflatten([*leaves[:i], changed, *leaves[i + 1 :]])))
    assert len(seen) == len(leaves) + 1
    others = [{"a": np.ones((2, 3))}, {"b": np.ones((2, 3))}, {"a": np.ones((3, 2))}, {"a": {"b": np.ones((2, 3))}}]
    assert len({checkpoint.fingerprint(other) for other in others}) == 4


def test_a_run_is_bound_to_its_tokenizer(tmp_path):
    write_run(tmp_path / "first", [1])
    write_run(tmp_path / "second", [2])
    first, second = (checkpoint.load_tokenizer(tmp_path / name) for name in ("first", "second"))
    workdir = tmp_path / "stage2"
    mark = checkpoint.bind_tokenizer(workdir, first)
    assert mark == checkpoint.fingerprint(first.variables) == checkpoint.bind_tokenizer(workdir, first)
    other = checkpoint.fingerprint(second.variables)
    with pytest.raises(ValueError) as error:
        checkpoint.bind_tokenizer(workdir, second)
    assert str(error.value) == (
        f"tokenizer: fingerprint {other} differs from {mark}, with which the run in '{workdir}' was started; "
        "give that tokenizer or a new --workdir"
    )
    assert_loaded(load_model(workdir / "tokenizer"), model_state_of("rqvae", 1))  # as it was


def test_a_stage_2_directory_carries_its_tokenizer_and_is_none(tmp_path):
    write_run(tmp_path / "first", [1])
    workdir = tmp_path / "stage2"
    checkpoint.bind_tokenizer(workdir, checkpoint.load_tokenizer(tmp_path / "first"))
    checkpoint.write_config(workdir, {"model": RQTRANSFORMER})
    state = model_state_of("rqtransformer", 6)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(state, {})
    loaded = load_model(workdir)
    assert_equal(loaded.variables, state.ema_variables)
    assert_loaded(loaded.tokenizer, model_state_of("rqvae", 1))
    with pytest.raises(ValueError) as error:
        checkpoint.load_tokenizer(workdir)
    expected = (
        f"'{workdir}' holds a 'rqtransformer', not a stage-1 run ('rqvae' or 'dqvae'); give the stage-1 --workdir"
    )
    assert str(error.value) == f"tokenizer: {expected}"


@pytest.mark.parametrize("text", ['{"architectures": ["Net"]}', '{"model": {"name": 3}}'])
def test_a_config_of_somebody_else_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is no run directory: its config.json names no model of ours"):
        checkpoint.load_tokenizer(tmp_path)

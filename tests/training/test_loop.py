"""The loop on a toy problem: exact resume, signals, early stopping, what is logged; and how settings are read."""

import functools
import json
import os
import re
import signal
import threading

import helpers
import jax
import numpy as np
import pytest
from toy_run import (
    BATCH,
    SHARDINGS,
    TOTAL,
    ToyDataset,
    assert_same_run,
    draw_state,
    evaluate,
    jitted_step,
    metrics_of,
    saved_steps,
    toy_step,
    train,
)

from rq_jax.checkpoint import Checkpointer, write_config
from rq_jax.files import RunLock
from rq_jax.training import loop as training_loop
from rq_jax.training.log import Rate
from rq_jax.training.settings import LoopSettings, check_sections, resolve_durations
from rq_jax.training.signals import StopSignal

# --- a linear model and its data ----------------------------------------------------------------------------


def test_a_run_in_use_is_refused_before_anything_is_written(tmp_path):
    with RunLock(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        train(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lock.json"}


def test_a_damaged_checkpoint_costs_nothing_but_time(tmp_path, uninterrupted):
    train(tmp_path, total_steps=10, keep_checkpoints=9)
    (tmp_path / "checkpoints" / "10" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="leave out --strict"):
        train(tmp_path, strict=True)
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def kill_self(number):
    return lambda: os.kill(os.getpid(), number)


def crash():
    raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last state and the directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return train(workdir), workdir


# --- from the first step to the last ------------------------------------------------------------------------


def test_a_run_ends_at_its_last_step(uninterrupted):
    state, workdir = uninterrupted
    assert int(state.step) == TOTAL and int(state.skipped_steps) == 0
    assert saved_steps(workdir) == [10, 12]
    logged = metrics_of(workdir)
    assert [step for step, name in logged if name == "loss"] == list(range(1, TOTAL + 1))
    assert [step for step, name in logged if name == "validation_loss"] == [5, 10, 12]
    assert logged[12, "loss"] < logged[1, "loss"]
    pictures = sorted(path.name for path in (workdir / "pictures").iterdir())
    assert pictures == ["curves.png", "dot_00000005.png", "dot_00000010.png", "dot_00000012.png"]


def test_a_finished_run_is_not_run_again(uninterrupted):
    _, workdir = uninterrupted
    before = (workdir / "metrics.jsonl").read_text()

    state = train(workdir, ToyDataset({TOTAL: refuse}), evaluate=refuse)
    assert_same_run(state, workdir, uninterrupted)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_finished_run_goes_on_when_it_is_made_longer(tmp_path, uninterrupted):
    train(tmp_path, total_steps=7, evaluate_every_steps=5)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            line
            for line in (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
            if not (json.loads(line)["step"] == 7 and "validation_loss" in line)
        )
    )  # step 7 was the last then, and is no evaluation step now
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def test_the_step_is_compiled_once(tmp_path, caplog):
    def fresh_step(state, batch):  # of its own, as what was compiled for one function is kept
        return toy_step(state, batch)

    step = jax.jit(fresh_step, donate_argnums=0, out_shardings=(SHARDINGS, None))
    with jax.log_compiles():
        train(tmp_path, step=step, total_steps=4)
        train(tmp_path, step=step, total_steps=8)
    compiled = [record for record in caplog.records if record.message.startswith("Finished XLA compilation of jit")]
    assert sum("fresh_step" in record.message for record in compiled) == 1
    assert sum("_add" in record.message for record in compiled) <= 1


# --- resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stop_at", [1, 5, 8, TOTAL])
def test_a_signal_saves_the_step_and_the_run_goes_on_bit_for_bit(tmp_path, uninterrupted, stop_at, number, code):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    dataset = ToyDataset({stop_at - 1: kill_self(number)})
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, dataset)
    assert stopped.value.code == code
    assert max(saved_steps(tmp_path)) == stop_at == dataset.position
    assert dataset.closed
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def test_a_run_that_is_stopped_again_and_again_is_the_same_run(tmp_path, uninterrupted):
    for stop_at in (2, 3, 9):
        with pytest.raises(SystemExit):
            train(tmp_path, ToyDataset({stop_at - 1: kill_self(signal.SIGTERM)}))
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


@pytest.mark.parametrize("crash_at", [2, 7, 10])
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, uninterrupted, crash_at):
    dataset = ToyDataset({crash_at: crash})
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, dataset)
    assert dataset.closed
    assert max(saved_steps(tmp_path), default=0) == crash_at // 5 * 5
    # What was logged after that checkpoint is logged again, not twice: `metrics_of` refuses doubles.
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


@pytest.mark.parametrize("reads", range(6))
def test_a_signal_at_any_moment_saves_the_step(tmp_path, monkeypatch, reads):
    """The signal comes right after the loop has looked for one `reads` times."""

    class LateStop(StopSignal):
        looked = 0

        @property
        def signal(self):
            self.looked += 1
            return signal.SIGTERM if self.looked > reads else None

        @signal.setter
        def signal(self, value):
            assert value is None

    monkeypatch.setattr(training_loop, "StopSignal", LateStop)
    dataset = ToyDataset()
    with pytest.raises(SystemExit):
        train(tmp_path, dataset, checkpoint_every_steps=100, evaluate_every_steps=100)
    assert saved_steps(tmp_path) == [dataset.position]


def test_a_signal_after_the_last_evaluation_is_no_interruption(tmp_path, uninterrupted):
    def evaluate_and_hear(state):
        if int(state.step) == TOTAL:
            kill_self(signal.SIGTERM)()
        return evaluate(state)

    assert_same_run(train(tmp_path, evaluate=evaluate_and_hear), tmp_path, uninterrupted)


@pytest.mark.fault("SIGTERM in an evaluation", "saves the step; the next start evaluates it, exit code 143")
@pytest.mark.parametrize("batch", range(3 * helpers.HeldOut.steps_per_epoch))
def test_an_evaluation_that_a_signal_cuts_short_is_made_up_for(tmp_path, uninterrupted, batch):
    held_out, evaluated_at = helpers.HeldOut({batch: kill_self(signal.SIGTERM)}), [5, 10, 12]
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, held_out=held_out)
    assert stopped.value.code == 143 and held_out.given == batch + 1 and held_out.closed
    number = batch // helpers.HeldOut.steps_per_epoch
    assert max(saved_steps(tmp_path)) == evaluated_at[number]
    assert [step for step, name in metrics_of(tmp_path) if name == "validation_loss"] == evaluated_at[:number]
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def test_an_evaluation_may_be_cut_short_again_and_again(tmp_path, uninterrupted):
    for _ in range(3):
        with pytest.raises(SystemExit):
            train(tmp_path, held_out=helpers.HeldOut({1: kill_self(signal.SIGTERM)}))
        assert saved_steps(tmp_path) == [5]
    with pytest.raises(RuntimeError, match="power cut"):  # made up for, and nothing saved since
        train(tmp_path, ToyDataset({7: crash}))
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def refuse(*_):
    raise AssertionError("nothing is left to do")


def test_an_evaluation_at_the_end_is_made_up_for_once(tmp_path, uninterrupted):
    with pytest.raises(SystemExit):
        train(tmp_path, ToyDataset({TOTAL - 1: kill_self(signal.SIGTERM)}))
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert_same_run(train(tmp_path, evaluate=refuse), tmp_path, uninterrupted)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    (tmp_path / "amended.json").write_text("{")  # nobody knows any more that it was made up for
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def test_checkpoints_of_before_owe_no_evaluation(tmp_path, monkeypatch, uninterrupted):
    save = Checkpointer.save
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        without = lambda host: {name: value for name, value in host.items() if name != "owes_evaluation"}  # noqa: E731
        patch.setattr(Checkpointer, "save", lambda self, state, host: save(self, state, without(host)))
        train(tmp_path, ToyDataset({6: kill_self(signal.SIGTERM)}))
    assert_same_run(train(tmp_path), tmp_path, uninterrupted)


def test_the_best_is_kept_and_counted_after_an_evaluation_that_was_cut_short(tmp_path):
    for evaluation in range(4):
        faults = {helpers.HeldOut.steps_per_epoch * bool(evaluation) + 1: kill_self(signal.SIGTERM)}
        with pytest.raises(SystemExit):
            train(tmp_path, evaluate=evaluate_by_table, held_out=helpers.HeldOut(faults), **EARLY)
        assert saved_steps(tmp_path)[-1] == 2 * (evaluation + 1)
    assert int(train(tmp_path, evaluate=evaluate_by_table, **EARLY).step) == 8
    assert saved_steps(tmp_path, "best") == [4]


def test_a_second_interrupt_ends_at_once(tmp_path):
    def twice():
        kill_self(signal.SIGINT)()
        kill_self(signal.SIGINT)()

    dataset = ToyDataset({3: twice})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dataset)
    assert dataset.position == 3 and saved_steps(tmp_path) == []


def test_outside_the_main_thread_signals_are_left_alone():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def look():
        with StopSignal() as stop:
            seen.extend([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)])
            seen.append(stop.signal)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [*handlers, None]


# --- what is logged -----------------------------------------------------------------------------------------


def test_logged_values_are_means_over_the_interval(tmp_path, uninterrupted):
    train(tmp_path, log_every_steps=5)
    logged, single = metrics_of(tmp_path), metrics_of(uninterrupted[1])
    intervals = {5: range(1, 6), 10: range(6, 11), 12: range(11, 13)}
    assert [step for step, name in logged if name == "index"] == list(intervals)
    for step, steps in intervals.items():
        assert logged[step, "index"] == logged[step, "first"] == np.mean(steps)
        assert logged[step, "second"] == 10 * np.mean(steps)
        np.testing.assert_allclose(logged[step, "loss"], np.mean([single[s, "loss"] for s in steps]), rtol=1e-5)


def test_rates_leave_out_evaluations(tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(training_loop, "Rate", functools.partial(Rate, clock=lambda: seconds[0]))

    def timed_step(state, batch):
        seconds[0] += 0.5
        return jitted_step(state, batch)

    def slow(state):
        seconds[0] += 1000.0
        return evaluate(state)

    train(tmp_path, evaluate=slow, step=timed_step, evaluate_every_steps=3, log_every_steps=2, total_steps=6)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = [(line["step"], line["steps_per_second"], line["images_per_second"]) for line in lines if "index" in line]
    assert rates == [(step, 2.0, 2.0 * BATCH) for step in (2, 4, 6)]


def test_a_run_ends_with_curves_and_says_where_its_images_are(uninterrupted, capsys):
    _, workdir = uninterrupted
    (workdir / "pictures" / "curves.png").unlink()
    train(workdir)  # it is finished
    assert (workdir / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (workdir / "parameters.txt").read_text()
    assert "params/w_M" in table and "Total: 15 -- 60 bytes" in table
    assert capsys.readouterr().out == f"{table}images: {workdir / 'pictures'}, report: {workdir / 'index.html'}\n"


def test_a_run_directory_belongs_to_one_kind_of_model(tmp_path):
    write_config(tmp_path, {"model": {"name": "rqvae"}})
    message = f"workdir: '{tmp_path}' holds a run of 'rqvae', not of 'toy'; give another --workdir"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "batch_size, next_batch, missed", [(BATCH // 2, 10, 0), (BATCH * 5, 1, 0), (BATCH * 3, 2, BATCH)]
)
def test_the_data_goes_on_where_it_was_with_another_batch_size(tmp_path, caplog, batch_size, next_batch, missed):
    with pytest.raises(SystemExit):
        train(tmp_path, ToyDataset({4: kill_self(signal.SIGTERM)}))
    caplog.clear()
    dataset = ToyDataset()
    dataset.batch_size = batch_size
    train(tmp_path, dataset, total_steps=6)
    assert dataset.position == next_batch + 1  # one step
    words = f"data.batch_size: {batch_size} was {BATCH}; {missed} images are passed over, up to a multiple of it"
    assert (words in caplog.text) == bool(missed)


# --- early stopping -----------------------------------------------------------------------------------------

LOSSES = {2: 3.0, 4: 2.0, 6: 2.0, 8: float("nan"), 10: 1.0, 12: 0.5}
EARLY = dict(evaluate_every_steps=2, checkpoint_every_steps=5, early_stopping_evaluations=2)


def evaluate_by_table(state):
    return {"validation_loss": LOSSES[int(state.step)]}, {}


def best_weights(workdir):
    import orbax.checkpoint as ocp

    (step,) = saved_steps(workdir, "best")
    with ocp.StandardCheckpointer() as checkpointer:
        return step, checkpointer.restore(workdir / "best" / str(step) / "params")


def test_a_run_stops_after_evaluations_that_are_no_better(tmp_path, uninterrupted):
    state = train(tmp_path, evaluate=evaluate_by_table, **EARLY)
    assert int(state.step) == 8  # 6 is as good as 4 and no better, 8 is not a number
    assert max(saved_steps(tmp_path)) == 8
    step, params = best_weights(tmp_path)
    assert step == 4
    with pytest.raises(SystemExit):
        train(tmp_path / "as far", ToyDataset({3: kill_self(signal.SIGINT)}))
    with Checkpointer(tmp_path / "as far") as checkpointer:
        at_best, _ = checkpointer.restore(draw_state(jax.random.key(7)))
    np.testing.assert_array_equal(params["w_M"], at_best.params["w_M"])
    again = train(tmp_path, evaluate=evaluate_by_table, **EARLY)
    assert int(again.step) == 8  # stopped for good


@pytest.mark.parametrize("stop_at", [5, 6, 7])
def test_early_stopping_counts_on_after_a_resume(tmp_path, stop_at):
    with pytest.raises(SystemExit):
        train(tmp_path, ToyDataset({stop_at - 1: kill_self(signal.SIGTERM)}), evaluate=evaluate_by_table, **EARLY)
    assert int(train(tmp_path, evaluate=evaluate_by_table, **EARLY).step) == 8
    assert saved_steps(tmp_path, "best") == [4]


def test_a_better_evaluation_starts_the_count_anew(tmp_path):
    losses = {2: 3.0, 4: 4.0, 6: 2.0, 8: 4.0, 10: 1.0, 12: 4.0}
    state = train(tmp_path, evaluate=lambda state: ({"validation_loss": losses[int(state.step)]}, {}), **EARLY)
    assert int(state.step) == TOTAL
    assert saved_steps(tmp_path, "best") == [10]


def test_a_run_that_stops_early_is_made_up_for_too(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, ToyDataset({7: kill_self(signal.SIGTERM)}), evaluate=evaluate_by_table, **EARLY)
    for figures in (evaluate_by_table, refuse):
        assert int(train(tmp_path, evaluate=figures, **EARLY).step) == 8


def test_a_signal_after_the_run_has_stopped_early_is_no_interruption(tmp_path):
    def evaluate_and_hear(state):
        if int(state.step) == 8:
            kill_self(signal.SIGTERM)()
        return evaluate_by_table(state)

    assert int(train(tmp_path, evaluate=evaluate_and_hear, **EARLY).step) == 8


def test_no_best_is_kept_unless_it_poll_for(uninterrupted):
    assert not (uninterrupted[1] / "best").exists()


def test_the_best_is_kept_without_stopping(tmp_path):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 1.5, 12: 4.0}
    settings = dict(EARLY, early_stopping_evaluations=0, keep_best=True)
    state = train(tmp_path, evaluate=lambda state: ({"validation_loss": losses[int(state.step)]}, {}), **settings)
    assert int(state.step) == TOTAL
    assert saved_steps(tmp_path, "best") == [4]


def test_a_best_that_could_not_be_kept_is_no_mark(tmp_path, monkeypatch):
    """The next that beats the one on disk is kept, though it is worse than what was lost."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 2.5, 12: 4.0}
    save_best = Checkpointer.save_best
    monkeypatch.setattr(Checkpointer, "save_best", lambda self, state: int(state.step) != 4 and save_best(self, state))
    settings = dict(EARLY, early_stopping_evaluations=0, keep_best=True)
    train(tmp_path, evaluate=lambda state: ({"validation_loss": losses[int(state.step)]}, {}), **settings)
    assert saved_steps(tmp_path, "best") == [6]


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"total_steps": 0}, "loop.total_steps: 0 must be at least 1"),
        ({"log_every_steps": 0}, "loop.log_every_steps: 0 must be at least 1"),
        ({"evaluate_every_steps": -1}, "loop.evaluate_every_steps: -1 must be at least 1"),
        ({"checkpoint_every_steps": 0}, "loop.checkpoint_every_steps: 0 must be at least 1"),
        ({"keep_checkpoints": 0}, "loop.keep_checkpoints: 0 must be at least 1"),
        ({"keep_every_steps": -5}, "loop.keep_every_steps: -5 must be at least 0"),
        (
            {"keep_every_steps": 1500},
            "loop.keep_every_steps: 1500 is no multiple of loop.checkpoint_every_steps 1000, so that nothing would be "
            "kept; set it to a multiple, or to 0",
        ),
        ({"early_stopping_evaluations": -1}, "loop.early_stopping_evaluations: -1 must be at least 0"),
    ],
)
def test_loop_settings_refuses(settings, message):
    with pytest.raises(ValueError) as error:
        LoopSettings(**{"total_steps": 1, **settings})
    assert str(error.value) == message


@pytest.mark.parametrize(
    "section, expected",
    [
        ({"total_steps": 11, "total_epochs": None}, 11),
        ({"total_steps": None, "total_epochs": 3}, 30),
        ({"total_epochs": 0.26}, 3),
        ({"total_epochs": 1.04}, 10),
        ({"total_steps": 0, "total_epochs": 3}, 30),  # 0 gives way
        ({"total_steps": 11, "total_epochs": 0.0}, 11),
        ({"total_steps": 0, "total_epochs": None}, 0),
    ],
)
def test_durations_are_resolved_to_steps(section, expected):
    given = dict(section)
    resolved = resolve_durations({**section, "other": "kept"}, "loop", ("total",), 10)
    assert resolved == {"total_steps": expected, "other": "kept"}
    assert section == given


def test_a_duration_must_be_given():
    with pytest.raises(ValueError) as error:
        resolve_durations({"warmup_steps": 1, "total_steps": None}, "loop", ("warmup", "total"), 10)
    assert str(error.value) == "loop.total_steps and loop.total_epochs are both unset; set one of them"


def test_a_duration_is_given_once():
    with pytest.raises(ValueError) as error:
        resolve_durations({"total_steps": 9, "total_epochs": 2.5}, "loop", ("total",), 10)
    expected = "loop.total_steps and loop.total_epochs are both set, to 9 and 2.5; set one of them to 0"
    assert str(error.value) == expected


def test_sections_are_checked():
    check_sections({"model": 1, "seed": 0}, ("seed", "model"))
    with pytest.raises(ValueError) as error:
        check_sections({"seed": 0, "model": 1, "lop": 2}, ("seed", "model"))
    assert str(error.value) == "config.lop: unknown; allowed are seed, model"
    with pytest.raises(ValueError) as error:
        check_sections({"seed": 0}, ("seed", "model"))
    assert str(error.value) == "config.model: missing; the config needs seed, model"

"""Interrupted equals uninterrupted: processes killed at random moments, stopped at every step, on full disks."""

import functools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
from toy_run import TOTAL, ToyDataset, assert_same_run, draw_state, train

from rq_jax import recipes
from rq_jax.checkpoint import manifest, saver
from rq_jax.checkpoint.saver import Checkpointer
from rq_jax.training import loop as training_loop
from rq_jax.training.loop import StopSignal

PROGRAM = helpers.ROOT / "tests" / "faulty_run.py"
EVERY_STEP = {"checkpoint_every_steps": 1, "evaluate_every_steps": 4, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The last state and the directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return train(workdir, **EVERY_STEP), workdir


def start(workdir, **settings):
    options = [f"{name}={value}" for name, value in {**EVERY_STEP, **settings}.items()]
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(workdir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:  # the table of parameters comes first
        if line.startswith("begun "):
            return process, int(line.split()[1])
    raise AssertionError(process.stderr.read())


def go_on(workdir) -> int:
    """Finish a run in this process, which is cheaper; the step that it began at."""
    begun = []
    train(workdir, ToyDataset({i: functools.partial(begun.append, i) for i in range(TOTAL)}), **EVERY_STEP)
    return begun[0]


def finished(workdir):
    """The state of a finished run, read back."""
    with Checkpointer(workdir, keep=3) as reading:
        return reading.restore(draw_state(jax.random.key(7)))[0]


def newest_whole(workdir):
    """By its manifest alone, as the next process must find it; 0 where there is none."""
    steps = saver.steps_of(workdir / "checkpoints")
    return max((step for step in steps if not manifest.problems(workdir / "checkpoints" / str(step))), default=0)


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("kill -9 at a random moment in and around saves", "goes on from the newest whole step")
@pytest.mark.slow
def test_killed_at_random_moments(uninterrupted, tmp_path, record_property):
    """kill -9 in and around saves: the next process begins at the newest whole step, and the end is the same."""
    rng, kills, run = random.Random(0), 0, 0
    while kills < 30:
        workdir, expected = tmp_path / str(run), 0
        run += 1
        while expected < TOTAL:
            process, begun = start(workdir)
            assert begun == expected
            try:
                process.wait(rng.uniform(0.0, 0.7))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            process.communicate()
            expected = newest_whole(workdir)
            if kills >= 30 or process.returncode == 0:
                break
        if expected < TOTAL:
            process, begun = start(workdir)
            assert begun == expected
            assert process.communicate()[0].splitlines()[-1] == f"ended {TOTAL}"
        assert_same_run(finished(workdir), workdir, uninterrupted)
    record_property("times", kills)


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("SIGTERM or SIGINT", "saves the step, exit code 143 or 130")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_single_process_with_its_code(uninterrupted, tmp_path, number):
    process, _ = start(tmp_path, milliseconds=200)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number and "stopped by signal" in err
    step = newest_whole(tmp_path)
    assert 0 < step < TOTAL
    assert go_on(tmp_path) == step
    assert_same_run(finished(tmp_path), tmp_path, uninterrupted)


@pytest.mark.fault("SIGTERM twice, in a step and in its save", "saves the step, exit code 143")
def test_sigterm_twice_during_a_step_and_its_save(uninterrupted, tmp_path):
    process, _ = start(tmp_path, milliseconds=200)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    step = newest_whole(tmp_path)
    assert 0 < step < TOTAL and step == max(saver.steps_of(tmp_path / "checkpoints"))
    assert go_on(tmp_path) == step
    assert_same_run(finished(tmp_path), tmp_path, uninterrupted)


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("no room for saves, log and pictures", "each is told, the run goes on, exit code 2 at the end")
def test_a_disk_that_fills_up_in_the_middle(uninterrupted, tmp_path):
    """No file may grow beyond a few bytes: saves, log and pictures all fail; the run is told, and nothing is lost."""
    train(tmp_path, total_steps=4, **EVERY_STEP)
    process, begun = start(tmp_path, milliseconds=0, file_bytes=300)
    _, err = process.communicate()
    assert begun == 4 and process.returncode == 2
    told = f"error: checkpoint: the state of step {TOTAL} could not be written to"
    assert told in err  # maybe behind the half of a line from a thread of Orbax
    assert err.count("could not be written") >= TOTAL - 4 and "Cannot write metrics" in err
    assert newest_whole(tmp_path) == 4
    assert go_on(tmp_path) == 4
    assert_same_run(finished(tmp_path), tmp_path, uninterrupted)


@pytest.mark.fault("a run directory that cannot be written", "one line, exit code 2")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that nobody can write, even root")
def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "run").symlink_to("/proc/self/task")
    process = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path / "run" / "new")], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith("error: [Errno "), process.stderr


# --- whole stages -----------------------------------------------------------------------------------------------------

STEPS = 20
STAGES = {"loop__total_steps": STEPS, "loop__evaluate_every_steps": STEPS, "loop__checkpoint_every_steps": STEPS}
STAGES |= {"data__num_workers": 2, "data__flip_probability": 0.5, "loop__ema_decay": 0.9, "loop__log_every_steps": 1}
ADVERSARY = {
    "loss__adversarial_weight": 0.5, "loss__adversarial_start_steps": 3, "loss__adversarial_warmup_steps": 4,
    "discriminator__width": 8, "discriminator__num_layers": 1,
}  # fmt: skip


class Stopped(StopSignal):
    """A signal in every step."""

    def poll(self):
        self.signal = signal.SIGTERM
        return True


@pytest.mark.fault(
    "either stage stopped after each step before its 20th, adversary and workers on", "saves the step, exit code 143"
)
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_stopped_at_every_step(tmp_path, monkeypatch, record_property, stage):
    """Parameters, optimizers, average, codebook, key and order of the data, with an adversary and worker processes."""
    with helpers.quick_compilation():
        pictures = helpers.write_pictures(tmp_path / "pictures")
        if stage == 1:
            config = helpers.vae_config(pictures, **STAGES, **ADVERSARY)
        else:
            tokenizer = helpers.save_tokenizer(tmp_path / "tokenizer", pictures)
            config = helpers.transformer_config(pictures, "class", tokenizer=str(tokenizer), **STAGES)
        expected = recipes.train(config, str(tmp_path / "whole"))
        for step in range(1, STEPS):
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
                patch.setattr(training_loop, "StopSignal", Stopped)
                recipes.train(config, str(tmp_path / "stopped"))
            assert stopped.value.code == 128 + signal.SIGTERM
            assert saver.steps_of(tmp_path / "stopped" / "checkpoints")[-1] == step
        state = recipes.train(config, str(tmp_path / "stopped"))
    record_property("times", STEPS - 1)
    helpers.assert_equal(helpers.host(state), helpers.host(expected))
    assert helpers.read_metrics(tmp_path / "stopped") == helpers.read_metrics(tmp_path / "whole")
    assert np.isfinite(helpers.read_metrics(tmp_path / "whole")[STEPS]["loss"])

"""A run within a time, on the toy problem and by a clock that its steps and evaluations move."""

import copy
import dataclasses
import functools
import json
import math
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from toy_run import BATCH, SHARDINGS, ToyDataset, ToyRecipe, metrics_of, toy_step

from rq_jax.checkpoint import read_config
from rq_jax.recipes.adversary import Adversary
from rq_jax.recipes.terms import Losses
from rq_jax.training import LoopSettings, budget, make_optimizer, run
from rq_jax.training import loop as training_loop

TOTAL, WARMUP, START = 40, 8, 30  # steps of the run, of its warm-up, before its second phase
CONFIG = {
    "model": {"name": "toy"},
    "loop": {"total_steps": TOTAL},
    "optim": {"warmup_steps": None, "warmup_epochs": 2, "hold_steps": 0},
}
# By hand: 60 s of steps and three evaluations of 2.5 s each, after 43 s of which 20 compile.
BUDGET, TAKEN = 80.0, 20  # 0.95 * (80 - 43) = 35.15 s are left; 20 steps take 35 s with two evaluations


class Clock:
    def __init__(self):
        self.now, self.compiled = 0.0, set()

    def __call__(self):
        return self.now


@functools.cache
def step_of(total_steps, warmup_steps):
    optimizer = make_optimizer(learning_rate=0.1, total_steps=total_steps, warmup_steps=warmup_steps, clip_norm=1.0)
    step = functools.partial(toy_step, optimizer=optimizer)
    return jax.jit(step, donate_argnums=0, out_shardings=(SHARDINGS, None))


@dataclasses.dataclass(frozen=True)
class TimedRecipe(ToyRecipe):
    """A step takes 1 s and from the second phase on 3 s, its program 10 s to compile; a held-out batch 0.5 s."""

    one_step: Callable = step_of(TOTAL, WARMUP)
    phases: tuple = (START,)
    config: dict = dataclasses.field(default_factory=lambda: CONFIG)
    clock: Clock = dataclasses.field(default_factory=Clock)

    def step(self, state, batch, phase):
        program = phase, *(x.shape for x in batch.values())
        if program not in self.clock.compiled:
            self.clock.compiled.add(program)
            self.clock.now += 10.0
        self.clock.now += 1.0 + 2.0 * phase
        return super().step(state, batch, phase)

    def evaluate(self, state, batch):
        self.clock.now += 0.5
        return {}, None

    def report(self, state, sums, shown):
        self.clock.now += 1.0
        return super().report(state, sums, shown)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(budget, "clock", clock := Clock())
    return clock


def train(workdir, dataset=None, recipe=None, **settings):
    data = SimpleNamespace(train=dataset or ToyDataset(), validation=helpers.HeldOut())
    intervals = {"log_every_steps": 1, "evaluate_every_steps": 15, "checkpoint_every_steps": 50}
    recipe = recipe or TimedRecipe(clock=budget.clock)
    return run(recipe, data, LoopSettings(**{"total_steps": TOTAL, **intervals, **settings}), str(workdir))


def stop_at(step):
    return ToyDataset({step - 1: lambda: os.kill(os.getpid(), signal.SIGTERM)})


def interrupt(*_, **__):
    raise KeyboardInterrupt


def assert_same(state, workdir, expected, other):
    assert int(state.step) == int(expected.step)
    state = state.replace(pace=expected.pace)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    assert metrics_of(workdir) == metrics_of(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last state and the directory of a run without a budget."""
    workdir = tmp_path_factory.mktemp("whole")
    return train(workdir, recipe=TimedRecipe()), workdir


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same of a run that was asked for as many steps as the budget takes."""
    workdir, recipe = tmp_path_factory.mktemp("short"), TimedRecipe(one_step=step_of(TAKEN, WARMUP // 2))
    return train(workdir, recipe=recipe, total_steps=TAKEN), workdir


def test_a_budget_that_suffices_changes_nothing(tmp_path, whole, caplog, clock):
    caplog.set_level("INFO", "rq_jax")
    assert_same(train(tmp_path, time_budget_seconds=120), tmp_path, *whole)
    assert (
        "time budget: 120 s, of which 43 are spent; 1 s a step, 3 s from step 30 on, 2.5 s an evaluation; "
        "all 40 steps are taken, which end after about 110 s"
    ) in caplog.messages
    assert clock.now == 43 + 60 + 3 * 2.5, "compiled twice"
    assert read_config(tmp_path) == read_config(whole[1])


def test_steps_that_do_not_fit_are_not_taken(tmp_path, short, caplog, clock):
    caplog.set_level("INFO", "rq_jax")
    assert_same(train(tmp_path, time_budget_seconds=BUDGET), tmp_path, *short)
    assert [line for line in caplog.messages if line.startswith("time budget: ")][1:] == [
        "time budget: 80 s, of which 43 are spent; 1 s a step, 3 s from step 30 on, 2.5 s an evaluation; "
        "40 steps would end after 110 s, so that 20 are taken, which end after about 78 s"
    ]
    assert clock.now == 43 + 15 * 1 + 5 * 3 + 2 * 2.5 < BUDGET  # the second phase starts after 15 steps
    config = read_config(tmp_path)
    assert config["loop"] == {"total_steps": TAKEN, "total_epochs": None}
    assert config["optim"] == {"warmup_steps": None, "warmup_epochs": 1.0, "hold_steps": 0}
    record = json.loads((tmp_path / budget.FILE).read_text())
    assert record["taken_steps"] == TAKEN and record["step_seconds"] == [
        {"first": 0, "seconds": 1.0}, {"first": START, "seconds": 3.0},
    ]  # fmt: skip


def test_batches_of_new_shapes_are_compiled_and_not_timed(clock):
    class Buckets(ToyDataset):
        def __next__(self):
            return {**super().__next__(), "pads": np.zeros(BATCH * (1 + self.position % 3))}

    data = SimpleNamespace(train=Buckets(), validation=helpers.HeldOut())
    costs = budget._measure(TimedRecipe(clock=clock), data, LoopSettings(TOTAL))
    assert costs == ([(0, START, 1.0), (START, TOTAL - START, 3.0)], 2.5)
    assert len(clock.compiled) == 6


def test_steps_and_batches_are_watched_and_reports_are_not(monkeypatch, clock):
    events = []

    class Watched(TimedRecipe):
        def report(self, *args):
            events.append("report")
            return super().report(*args)

    monkeypatch.setattr(budget, "HangGuard", helpers.recording_guard(events))
    data = SimpleNamespace(train=ToyDataset(), validation=helpers.HeldOut())
    budget._measure(Watched(clock=clock), data, LoopSettings(TOTAL, hang_timeout_seconds=9))
    assert events[-8:] == ["arm", *["arm", "disarm", "report"] * 2, "disarm"]
    assert set(events[:-8]) == {"arm"}


def test_the_step_of_a_shorter_run_is_compiled_once(tmp_path, caplog, clock):
    def fresh_step(state, batch):  # of its own, as what was compiled for one function is kept
        return toy_step(state, batch)

    step = jax.jit(fresh_step, donate_argnums=0, out_shardings=(SHARDINGS, None))
    with jax.log_compiles():
        state = train(tmp_path, recipe=TimedRecipe(one_step=step, clock=clock), time_budget_seconds=1)
    assert state.pace == TOTAL / budget.LEAST_STEPS
    compiled = [line for line in caplog.messages if line.startswith("Finished XLA compilation of jit")]
    assert sum("fresh_step" in line for line in compiled) == 1


@pytest.mark.parametrize("later", [BUDGET, 7.0])
def test_a_resumed_run_keeps_its_decision(tmp_path, short, monkeypatch, later):
    with pytest.raises(SystemExit):
        train(tmp_path, stop_at(16), time_budget_seconds=BUDGET)  # eight batches have been read before, to be timed
    monkeypatch.setattr(budget, "_measure", lambda *_: pytest.fail("timed again"))
    assert_same(train(tmp_path, time_budget_seconds=later), tmp_path, *short)


def test_without_the_budget_a_resumed_run_takes_all_steps_and_with_it_no_more(tmp_path, caplog):
    train(tmp_path, time_budget_seconds=BUDGET)
    assert int(train(tmp_path).step) == TOTAL
    told = "toy: no step is taken; the run is at step 40, beyond the "
    assert told not in caplog.text
    assert int(train(tmp_path, time_budget_seconds=BUDGET).step) == TOTAL
    fix = "20 that it may take within its time budget; set loop.time_budget_seconds to None to go on"
    assert caplog.messages[-1] == f"{told}{fix}"
    (tmp_path / budget.FILE).unlink()
    train(tmp_path, total_steps=30)
    assert caplog.messages[-1] == f"{told}30 that it may take; raise loop.total_steps to go on"


def test_a_start_that_took_no_step_decides_for_its_own_budget_and_config_alone(tmp_path, monkeypatch):
    def start(seconds, config=CONFIG):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(budget, "clock", Clock())
            patch.setattr(training_loop, "MetricWriter", interrupt)
            train(tmp_path, recipe=TimedRecipe(clock=budget.clock, config=config), time_budget_seconds=seconds)
        path = tmp_path / budget.FILE
        return json.loads(path.read_text())["taken_steps"] if path.exists() else None

    assert [start(BUDGET), start(1000), start(None)] == [TAKEN, TOTAL, None]
    start(BUDGET)
    monkeypatch.setattr(budget, "_measure", lambda *_: pytest.fail("timed again"))
    assert start(BUDGET) == TAKEN
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        start(BUDGET, {**CONFIG, "data": {"batch_size": 2 * BATCH}})
    (tmp_path / budget.FILE).write_text("{")
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        train(tmp_path, time_budget_seconds=BUDGET)


def test_a_run_has_some_steps_however_short_its_time(tmp_path, caplog):
    assert int(train(tmp_path, time_budget_seconds=1).step) == budget.LEAST_STEPS
    (warning,) = [record for record in caplog.records if "time budget" in record.message]
    assert warning.levelname == "WARNING"
    assert warning.message.endswith(
        "40 steps would end after 110 s, so that 10 are taken, which end after about 60 s; a run has at least 10"
    )


def test_a_run_of_few_steps_takes_them_all(tmp_path, caplog):
    assert int(train(tmp_path, total_steps=4, time_budget_seconds=1).step) == 4
    assert caplog.messages[-1].endswith("; all 4 steps are taken, which end after about 24 s; a run has at least 4")


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, rule",
    [(0, "above 0; None sets no limit"), (-3, "above 0; None sets no limit"), (float("nan"), "above 0; None sets no limit"),
     (float("inf"), "finite")],
)  # fmt: skip
def test_a_budget_is_a_time(value, rule):
    with pytest.raises(ValueError) as error:
        LoopSettings(total_steps=1, time_budget_seconds=value)
    assert str(error.value) == f"loop.time_budget_seconds: {value} must be {rule}"


def test_a_run_that_was_begun_without_a_budget_takes_all_steps(tmp_path, whole, caplog):
    with pytest.raises(SystemExit):
        train(tmp_path, stop_at(7))
    assert_same(train(tmp_path, time_budget_seconds=1), tmp_path, *whole)
    assert f"time budget: the run in '{tmp_path}' was begun without one, and goes on to 40 steps" in caplog.messages


def test_a_decision_holds_for_its_steps_alone(tmp_path):
    train(tmp_path, time_budget_seconds=BUDGET)
    fix = "or set loop.time_budget_seconds to None to take all steps"
    with pytest.raises(ValueError) as error:
        train(tmp_path, time_budget_seconds=BUDGET, total_steps=50)
    assert str(error.value) == (
        f"loop.total_steps: 50 differs from 40, of which the time budget of this run takes 20; give that, {fix}"
    )
    path = tmp_path / budget.FILE
    record = json.loads(path.read_text())
    for damaged in ("{", "[]", "{}", *(json.dumps({**record, "taken_steps": taken}) for taken in (0, 41, 2.5, "9"))):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"^'{path}' holds no decision .*; restore it from a copy, {fix}$"):
            train(tmp_path, time_budget_seconds=BUDGET)


# --- durations ---------------------------------------------------------------------------------------------------------


def test_durations_keep_their_shares():
    section = {"warmup_steps": 100, "hold_steps": 1, "accumulation_steps": 4, "warmup_epochs": None, "hold_epochs": 0.5}
    loss = {"perceptual_start_steps": 1099, "adversarial_warmup_steps": 9, "adversarial_start_epochs": 3, "weight": 2.0}
    loop = {"total_steps": 0, "total_epochs": 11, "log_every_steps": 50, "profile_first_step": 10}
    config = {"seed": 3, "class_names": None, "optim": section, "loss": loss, "loop": loop}
    before = copy.deepcopy(config)
    assert budget.shortened(config, 1100, 110) == {
        "seed": 3,
        "class_names": None,
        "optim": {**section, "warmup_steps": 10, "hold_steps": 1, "hold_epochs": 0.05},
        "loss": {
            **loss, "perceptual_start_steps": 109, "adversarial_warmup_steps": 1, "adversarial_start_epochs": 0.3,
        },
        "loop": {**loop, "total_steps": 110, "total_epochs": None},
    }  # fmt: skip
    assert config == before
    assert budget.shortened({"model": {"name": "toy"}}, 1100, 110) == {"model": {"name": "toy"}}  # made by hand


@pytest.mark.parametrize(
    "total, taken, start", [(1100, 130, 800), (1100, 1000, 800), (40, 19, 30), (7, 6, 1), (9, 9, 4)]
)
def test_a_shorter_run_passes_the_whole_one(total, taken, start):
    plan = budget.Plan(LoopSettings(taken), total, {})
    passed = [plan.passed(step) for step in range(taken)]
    assert passed[0] == 0 and passed[-1] == total - 1
    assert sum(step < start for step in passed) == math.ceil(start * taken / total)


@pytest.mark.parametrize("total, taken", [(1100, 110), (1100, 130), (40, 19), (100, 99), (7, 6), (9, 9), (4, 1)])
def test_what_begins_begins_at_the_step_that_the_config_names(total, taken):
    plan = budget.Plan(LoopSettings(taken), total, {})
    for start in range(total):
        named = budget.shortened({"loss": {"adversarial_start_steps": start}}, total, taken)["loss"]
        begun = [step for step in range(taken) if plan.passed(step) >= start]
        assert begun[0] == named["adversarial_start_steps"], start  # some step at least
        assert start == 0 or begun[0] > 0 or taken == 1


def test_a_term_that_begins_in_the_last_step_has_a_share():
    start, whole = 1099, budget.Plan(LoopSettings(110), 1100, {})
    terms = Losses(adversarial_weight=1.0, adversarial_start_steps=start, adversarial_warmup_steps=10)
    assert [terms.phase(whole.passed(step)).adversary for step in (108, 109)] == [False, True]
    ramp = Adversary(None, None, 1.0, start_steps=start, warmup_steps=10).ramp
    assert [float(ramp(jax.numpy.float32(step))) for step in (109 * 10, 1099, 1108)] == pytest.approx([0.1, 0.1, 1])

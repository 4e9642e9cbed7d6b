"""A run within a time: its steps are timed before the first, and fewer are taken where all of them would last longer.

What is decided stands in the run directory, and holds for every later start once a checkpoint is there. A shorter run
has the programs of the whole one and passes through the same durations faster, so that nothing is compiled twice.
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.devices import hosts, sharding
from rq_jax.devices.memory import explained_memory
from rq_jax.files import read_json, write_json
from rq_jax.training.monitor import HangGuard
from rq_jax.training.settings import LoopSettings, memory_remedies, plain

FILE = "budget.json"  # in the run directory
LEAST_STEPS = 10  # of a run, however long they take
RESERVE = 0.05  # of the time left, for checkpoints, pictures and a machine that does not keep its pace
_TIMED_SECONDS, _MOST_TIMED = 2.0, 100  # of each phase, and at least three steps
_SHARE_OF_THE_RUN = re.compile("(.+_)?(warmup|hold|start)_(steps|epochs)")  # settings

clock = time.monotonic
logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """A run as it is taken.

    Attributes:
      settings: with the steps that are taken.
      total_steps: of the whole run, in which the durations of its recipe are given.
      config: whose durations are those of the steps that are taken.
    """

    settings: LoopSettings
    total_steps: int
    config: Mapping[str, Any]

    def passed(self, step: int) -> int:
        """Steps of the whole run that have passed after so many of these."""
        return _passed(step, self.total_steps, self.settings.total_steps)

    def paced(self, state: Any) -> Any:
        """A `TrainState` whose steps pass the whole run."""
        if self.total_steps == self.settings.total_steps:
            return state
        pace = jnp.float32(self.total_steps / self.settings.total_steps)
        return state.replace(pace=jax.device_put(pace, state.pace.sharding))


class Costs(NamedTuple):
    """Measured seconds of the parts of a run.

    Attributes:
      steps: (first step of a phase, its number of steps, seconds of one).
      evaluation: of all held-out images, with the report.
    """

    steps: list[tuple[int, int, float]]
    evaluation: float

    def seconds(self, steps: int, settings: LoopSettings) -> float:
        """Of so many steps, of which every phase keeps its share, with their evaluations."""
        of_all = sum(count * seconds for _, count, seconds in self.steps)
        evaluations = -(-steps // settings.evaluate_every_steps)  # the last step has one
        return of_all * steps / settings.total_steps + evaluations * self.evaluation


def plan(recipe: Any, data: Any, settings: LoopSettings, workdir: str, is_fresh: bool, start: float) -> Plan:
    """The run that ends within `settings.time_budget_seconds`: the whole one where that suffices, or is None.

    Args:
      recipe: a `training.loop.Recipe` that has been started.
      data: its batches.
      settings: of the whole run.
      workdir: run directory, where the decision is kept.
      is_fresh: no step has been taken; else nothing is decided anew, whatever the budget is now.
      start: of the run, by `clock`.

    Raises:
      ValueError: the run takes its steps out of another number, or its file cannot be read.
      OutOfMemory: a step does not fit a device.
    """
    budget, total, path = settings.time_budget_seconds, settings.total_steps, Path(workdir) / FILE
    whole = Plan(settings, total, recipe.config)
    if budget is None:
        if is_fresh and jax.process_index() == 0:
            path.unlink(missing_ok=True)  # of a start that took no step
        return whole
    asked = {"time_budget_seconds": budget, "total_steps": total}
    of_steps = {"config_digest": _digest(recipe.config)}  # another model or batch takes another time
    record = hosts.done_by_first_process(lambda: _kept(path, asked | of_steps, is_fresh))
    if record is not None:
        logger.info(f"as decided before the first step, and kept in '{path}': {record['decision']}")
    elif not is_fresh:
        logger.warning(f"time budget: the run in '{workdir}' was begun without one, and goes on to {total:,} steps")
        return whole
    else:
        logger.info(f"time budget: {budget:,g} s; the programs of all steps are compiled and timed first")
        costs = _measure(recipe, data, settings)
        record = hosts.done_by_first_process(
            lambda: _keep(path, _decision(costs, settings, budget, clock() - start) | of_steps)
        )
        log = logger.warning if record["expected_seconds"] > budget else logger.info
        log(record["decision"])
    taken = record["taken_steps"]
    if taken == total:
        return whole
    shorter = dataclasses.replace(settings, total_steps=taken)
    return Plan(shorter, total, shortened(recipe.config, total, taken))


def _passed(step: int, total: int, taken: int) -> int:
    """Steps of `total` that have passed before a step of `taken`; before the last all but the last, as in a whole run.

    So every term of a loss that begins in the whole run begins in the shorter one.
    """
    return step * total // taken if step < taken - 1 else total - 1


def shortened(config: Mapping[str, Any], total: int, taken: int) -> dict[str, Any]:
    """The config of a run that takes `taken` of `total` steps: warm-ups, holds and starts keep their shares of it.

    In steps, starts are those steps that the run has them at; the others are rounded down, and stay above 0 where they
    were.
    """

    def share(name: str, value: Any) -> Any:
        found = _SHARE_OF_THE_RUN.fullmatch(name)
        if not value or not found:
            return value
        if name.endswith("_epochs"):
            return value * taken / total
        if found[2] == "start":
            return bisect.bisect_left(range(taken), value, key=lambda step: _passed(step, total, taken))
        return max(value * taken // total, 1)

    sections = {
        section: {name: share(name, value) for name, value in values.items()} if isinstance(values, dict) else values
        for section, values in plain(config).items()
    }
    if "loop" in sections:
        sections["loop"] |= {"total_steps": taken, "total_epochs": None}
    return sections


def _kept(path: Path, asked: dict[str, Any], is_fresh: bool) -> dict[str, Any] | None:
    """The decision in a file; None where there is none, or before the first step where another one is asked for."""
    fix = "or set loop.time_budget_seconds to None to take all steps"
    if not path.exists():
        return None
    try:
        record = read_json(path)
        before, taken = record["total_steps"], record["taken_steps"]
        if type(taken) is not int or not 1 <= taken <= before or not isinstance(record["decision"], str):
            raise ValueError(f"'{path}': it takes {taken!r} of {before!r} steps")
    except (KeyError, TypeError, ValueError) as error:
        if is_fresh:
            return None
        raise ValueError(f"'{path}' holds no decision ({error}); restore it from a copy, {fix}") from error
    if is_fresh:
        return record if asked.items() <= record.items() else None
    if before != asked["total_steps"]:
        raise ValueError(
            f"loop.total_steps: {asked['total_steps']} differs from {before}, of which the time budget of this run "
            f"takes {taken}; give that, {fix}"
        )
    return record


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]


def _keep(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    write_json(path, record)
    return record


def _measure(recipe: Any, data: Any, settings: LoopSettings) -> Costs:
    """Time a few steps of each phase and an evaluation, of a state and batches that are then thrown away."""
    state = recipe.init(jax.random.key(recipe.seed))
    counts = collections.Counter(map(recipe.phase, range(settings.total_steps)))
    first, steps = 0, []
    with (
        contextlib.closing(data.train.iterator()) as batches,
        HangGuard(settings.hang_timeout_seconds) as hang,
        explained_memory(state, memory_remedies(recipe, data.train.batch_size)),
    ):
        timed = _Timed(recipe, state, batches, hang)
        for phase, count in counts.items():
            alone = timed.steps(phase, 1)
            # Steps are taken by all processes or none, and each has a clock of its own.
            number = round(min(max(3, _TIMED_SECONDS / max(alone, 1e-9)), _MOST_TIMED))
            seconds = timed.steps(phase, int(hosts.of_first_process(str(number))))
            steps.append((first, count, seconds))
            first += count
        evaluation = timed.evaluation(data.validation)
    return Costs(steps, evaluation)


@dataclasses.dataclass
class _Timed:
    """A state that steps and evaluations are timed with."""

    recipe: Any
    state: Any
    batches: Any
    hang: HangGuard
    programs: set[tuple[Any, str]] = dataclasses.field(default_factory=set)  # that have been compiled

    def steps(self, phase: Any, number: int) -> float:
        """Seconds of one of so many steps, one of which is dispatched while the one before runs, as in the loop.

        What is compiled is not counted, nor its first step.
        """
        start, before, metrics = clock(), None, None
        for _ in range(number):
            self.hang.arm()
            batch = sharding.put_batch(self.recipe.mesh, next(self.batches))
            program = phase, str(jax.tree.map(np.shape, batch))
            if program not in self.programs:
                self.programs.add(program)
                self.hang.expect_compilation()
                self.hang.arm()
                compiling = clock()
                jax.block_until_ready(self._step(batch, phase))
                start += clock() - compiling
            metrics = self._step(batch, phase)
            jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(metrics)
        return (clock() - start) / number

    def _step(self, batch: Any, phase: Any) -> Any:
        self.state, metrics = self.recipe.step(self.state, batch, phase)
        return metrics

    def evaluation(self, dataset: Any) -> float:
        """Seconds of an evaluation, by its first batch and its report; both have been compiled before."""
        self.hang.arm()
        with contextlib.closing(dataset.iterator()) as batches:
            batch = next(iter(batches))
        self.hang.expect_compilation()
        of_batch = of_report = 0.0
        for _ in range(2):
            self.hang.arm()
            start = clock()
            sums, shown = jax.block_until_ready(self.recipe.evaluate(self.state, batch))
            middle = clock()
            self.hang.disarm()  # a report is no step
            self.recipe.report(self.state, sums, shown)
            of_batch, of_report = middle - start, clock() - middle
        return of_batch * dataset.steps_per_epoch + of_report


def _decision(costs: Costs, settings: LoopSettings, budget: float, spent: float) -> dict[str, Any]:
    """How many steps are taken, in a line, and why.

    Args:
      costs: measured.
      settings: of the whole run.
      budget: seconds that it may last.
      spent: seconds since the run began.
    """
    total = settings.total_steps
    seconds = functools.partial(costs.seconds, settings=settings)
    left, taken = (1 - RESERVE) * (budget - spent), total
    if seconds(total) > left:
        fitting = bisect.bisect_right(range(total), left, key=seconds) - 1
        taken = max(fitting, min(LEAST_STEPS, total))
    expected = spent + seconds(taken)
    parts = [f"{_shown(costs.steps[0][-1])} s a step"]
    parts += [f"{_shown(of_step)} s from step {first:,} on" for first, _, of_step in costs.steps[1:]]
    parts += [f"{_shown(costs.evaluation)} s an evaluation"]
    words = f"time budget: {budget:,g} s, of which {_shown(spent)} are spent; {', '.join(parts)}; "
    if taken < total:
        words += f"{total:,} steps would end after {_shown(spent + seconds(total))} s, so that "
    words += f"{taken:,} are taken" if taken < total else f"all {total:,} steps are taken"
    words += f", which end after about {_shown(expected)} s"
    if expected > budget:
        words += f"; a run has at least {min(LEAST_STEPS, total)}"
    return {
        "decision": words, "time_budget_seconds": budget, "total_steps": total, "taken_steps": taken,
        "expected_seconds": expected, "spent_seconds": spent, "evaluation_seconds": costs.evaluation,
        "step_seconds": [{"first": first, "seconds": of_step} for first, _, of_step in costs.steps],
    }  # fmt: skip


def _shown(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"

"""The one training loop: resume, step, log, evaluate, save, stop. It knows no model."""

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np

from rq_jax.checkpoint import Checkpointer, RunDirectory, local_directory, read_config, write_config
from rq_jax.data import Splits
from rq_jax.devices import sharding
from rq_jax.devices.memory import explained_memory
from rq_jax.files import write_atomic
from rq_jax.report import curves, page
from rq_jax.report.parameters import parameter_table
from rq_jax.report.progress import Progress
from rq_jax.training import budget, monitor
from rq_jax.training.evaluation import Evaluable, Evaluator, RunStatus
from rq_jax.training.log import METRICS_FILE, MetricWriter, Rate, StepLog
from rq_jax.training.settings import LoopSettings, memory_remedies
from rq_jax.training.signals import StopSignal

logger = logging.getLogger(__name__)


class Recipe(Evaluable, Protocol):
    """The science of a run: state, step, evaluation, report. A new kind of model is a model, a recipe and a config.

    Attributes:
      title: in front of the progress bar.
      config: resolved, as JSON takes it; written beside the checkpoints.
      seed: of the state before the first step.
      mesh: the devices.
      model: its `dtype` decides whose peak the utilization is of.
      optimizer: its `accumulation_steps` are named where memory is short.
      accumulates: whether a step may take its batch in micro-batches.
      flops_per_image: forward and backward.
      curves: metrics to plot at the end.
    """

    title: str
    config: Mapping[str, Any]
    seed: int
    mesh: jax.sharding.Mesh
    model: Any
    optimizer: Any
    accumulates: bool
    flops_per_image: float | None
    curves: Sequence[str]

    def start(self, workdir: str, data: Any, is_fresh: bool) -> tuple[Self, Any]:
        """Prepare the run directory before the first step; returns the recipe and the data to go on with."""

    def init(self, rng: jax.Array) -> Any:
        """A `TrainState` at step 0, placed on the mesh."""

    def phase(self, step: int) -> Hashable:
        """Names the program of a step: another phase compiles another one, as do other shapes of a batch.

        `step` counts those in which durations are given, see `TrainState.pace`.
        """

    def step(self, state: Any, batch: Any, phase: Hashable) -> tuple[Any, dict[str, jax.Array]]:
        """One jitted update; the state is donated. Its metrics' means go to `summarize`."""

    def summarize(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Scalars to log."""


class Data(Protocol):
    """The batches of a run, see `data.Splits`: `train` endless, `validation` once through."""

    train: Any
    validation: Any


def run(recipe: Recipe, data: Data, settings: LoopSettings, workdir: str, *, strict: bool = False) -> Any:
    """Train until `settings.total_steps`, going on from the newest checkpoint of `workdir`.

    With `settings.time_budget_seconds` a new run may take fewer steps, see `budget.plan`.

    Args:
      recipe: what is trained.
      data: its batches.
      settings: intervals and durations.
      workdir: run directory, on this machine or in an object store ("gs://bucket/run"), see `checkpoint.RunDirectory`.
      strict: stop at a damaged checkpoint instead of going on from the one before.

    Returns:
      The last state.

    Raises:
      ValueError: another process trains in `workdir`, another kind of model did, its checkpoint does not fit, none is
        whole, or its time budget was of another number of steps.
      SaveFailed: the last state could not be written.
      OutOfMemory: a step does not fit a device.
      NotFinite: `settings.max_skipped_steps` steps in a row were not finite.
      SystemExit: with 128 + signal number after SIGINT (130) or SIGTERM (143); the current step is saved, and an
        evaluation that is cut short is made up for by the next start.
    """
    start = budget.clock()
    _check_kind(workdir, recipe)
    retention = settings.keep_checkpoints, settings.keep_every_steps
    # The lock first: opening a checkpointer removes what a killed save left, which may be another trainer's work.
    with RunDirectory(workdir) as directory, Checkpointer(directory.address, *retention, strict) as checkpointer:
        data, workdir = data.as_bytes() if isinstance(data, Splits) else data, directory.path
        is_fresh = checkpointer.latest_step is None
        recipe, data = recipe.start(workdir, data, is_fresh)
        plan = budget.plan(recipe, data, settings, workdir, is_fresh, start)
        state = plan.paced(recipe.init(jax.random.key(recipe.seed)))
        # Signals are noted from here on only: before, nothing is there to save, and the process may end at once.
        with (
            contextlib.closing(MetricWriter(workdir, enabled=jax.process_index() == 0)) as writer,
            contextlib.closing(data.train.iterator()) as iterator,
            StopSignal() as stop,
            monitor.HangGuard(settings.hang_timeout_seconds) as hang,
            monitor.Profiler(workdir, settings.profile_first_step, settings.profile_steps) as profiler,
        ):
            parts = _Parts(directory, writer, iterator, checkpointer, stop, hang, profiler)
            state = _Run(recipe, data, plan, parts).train(state)
        _finish(directory, recipe.curves)
    return state


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Resources of a run, opened and closed by `run`."""

    directory: RunDirectory
    writer: MetricWriter
    iterator: Any  # of batches, with get_state and set_state
    checkpointer: Checkpointer
    stop: StopSignal
    hang: monitor.HangGuard
    profiler: monitor.Profiler


class _Run:
    """The steps of one start of a run."""

    def __init__(self, recipe: Recipe, data: Data, plan: budget.Plan, parts: _Parts):
        self._recipe, self._data, self._plan, self._settings = recipe, data, plan, plan.settings
        self._parts, self._status = parts, RunStatus()
        self._meter = monitor.Meter(recipe.flops_per_image, recipe.model.dtype)
        self._finite = monitor.FiniteGuard(parts.directory.path, self._settings.max_skipped_steps)
        self._programs: set[tuple[Hashable, str]] = set()  # phases and shapes of the steps so far
        self._metrics: Any = None  # of the last step that was dispatched, with its batch
        self._batch: Any = None

    def train(self, state: Any) -> Any:
        """All steps that are left; the last state."""
        recipe, settings, parts = self._recipe, self._settings, self._parts
        state = self._resume(state)
        _describe(parts.directory.path, self._plan.config, state)
        parts.directory.push()  # a checkpoint without its config is of no use
        step = int(state.step)
        self._tell_if_beyond(step)
        # A start that made up for an evaluation may have been killed before it could note that.
        owed = self._status.owes_evaluation
        parts.writer.truncate_after(step, without="validation_loss" if owed else None)
        self._log = StepLog(parts.writer, recipe.summarize, Rate(self._data.train.batch_size, step), self._meter)
        if settings.keep_best or settings.early_stopping_evaluations:
            logger.info("%s: the best weights are those of the lowest %s", recipe.title, recipe.criterion)
        remedies = memory_remedies(recipe, self._data.train.batch_size)
        with (
            Progress(settings.total_steps, step, "step", recipe.title, jax.process_index() == 0) as self._progress,
            explained_memory(state, remedies),
        ):
            evaluator = Evaluator(
                recipe, self._data.validation, settings, self._status, parts.writer, parts.checkpointer,
                self._progress, parts.stop, parts.hang,
            )  # fmt: skip
            if owed:
                evaluator.make_up(state, step)
                self._log.restart(step)
            stopping = self._status.owes_evaluation
            # `stopping` is a signal, polled once a step on every process; `stopped` is early stopping, which the
            # checkpoint remembers.
            while step < settings.total_steps and not self._status.stopped and not stopping:
                state = self._step(state, step)
                step += 1
                last = step == settings.total_steps
                self._after_step(step, last)
                if step % settings.evaluate_every_steps == 0 or last:
                    evaluator.run(state, step)
                    parts.writer.write_page()
                    parts.directory.push()
                    self._log.restart(step)
                # An evaluation that a signal cut short has polled already, and a second poll would not repeat it.
                stopping = self._status.owes_evaluation or parts.stop.poll()
                if step % settings.checkpoint_every_steps == 0 or last or stopping or self._status.stopped:
                    self._save(state, step)
        parts.checkpointer.wait()
        self._exit_if_stopped(step, stopping)
        return state

    def _resume(self, state: Any) -> Any:
        """The newest checkpoint in place of the state at step 0, where there is one."""
        if self._parts.checkpointer.latest_step is None:
            return state
        state, saved = self._parts.checkpointer.restore(state)
        self._status = RunStatus.from_saved(saved)
        self._parts.iterator.set_state(_data_position(saved, self._data.train.batch_size))
        logger.info(
            "%s: resumed from step %d in %s", self._recipe.title, int(state.step), self._parts.directory.address
        )
        return state

    def _tell_if_beyond(self, step: int) -> None:
        """Say so where a run has taken more steps than it may take now, as a time budget that is set again allows."""
        total, is_whole = self._settings.total_steps, self._plan.total_steps == self._settings.total_steps
        if step > total:
            within = "" if is_whole else " within its time budget"
            fix = "raise loop.total_steps" if is_whole else "set loop.time_budget_seconds to None"
            words = "%s: no step is taken; the run is at step %d, beyond the %d that it may take%s; %s to go on"
            logger.warning(words, self._recipe.title, step, total, within, fix)

    def _step(self, state: Any, step: int) -> Any:
        """Dispatch one step, and wait for the one before: the device stays busy and the queue short."""
        parts, previous, previous_batch = self._parts, self._metrics, self._batch
        phase = self._recipe.phase(self._plan.passed(step))
        is_new_phase = phase not in {known for known, _ in self._programs}
        if is_new_phase:
            parts.hang.expect_compilation()
        # Armed before the batch is read: a reader that hangs is a hang of the run.
        parts.hang.arm()
        parts.profiler.before(step + 1)
        with self._meter.waiting():
            self._batch = next(parts.iterator)
        placed = sharding.put_batch(self._recipe.mesh, self._batch)
        program = phase, str(jax.tree.map(np.shape, placed))
        compiles = program not in self._programs
        self._programs.add(program)
        if compiles and not is_new_phase:
            parts.hang.expect_compilation()
            parts.hang.arm()
        with self._progress.waiting_for("compiling") if compiles else contextlib.nullcontext():
            state, self._metrics = self._recipe.step(state, placed, phase)
        self._log.add(self._metrics)
        jax.block_until_ready(previous)
        # Only now are the numbers of the step before on the host without a wait for the one just dispatched.
        if previous is not None:
            self._finite.check(step, previous, previous_batch)
        return state

    def _after_step(self, step: int, last: bool) -> None:
        """Log, and show in the bar."""
        shown = {}
        if step % self._settings.log_every_steps == 0 or last:
            shown = self._log.write(step)
        self._parts.hang.disarm()
        self._parts.profiler.after(self._metrics)
        names = ("loss", "images_per_second")
        self._progress.update(1, **{name: shown[name] for name in names if name in shown})

    def _save(self, state: Any, step: int) -> None:
        # The position counts batches that were handed out; those read ahead by threads are read again.
        saved = dataclasses.asdict(self._status)
        position = {"data": self._parts.iterator.get_state(), "batch_size": self._data.train.batch_size}
        self._parts.directory.push()  # before the checkpoint, so that no log ends before it
        self._parts.checkpointer.save(state, {**saved, **position})
        self._log.restart(step)

    def _exit_if_stopped(self, step: int, stopping: bool) -> None:
        """End the process where a signal has ended the run before its time."""
        is_done = step == self._settings.total_steps and not self._status.owes_evaluation
        if stopping and not is_done and not self._status.stopped:
            number = self._parts.stop.signal or signal.SIGTERM  # another process may have got it
            logger.warning(
                "%s: stopped by signal %d at step %d; run the same command to go on", self._recipe.title, number, step
            )
            raise SystemExit(128 + number)


def _check_kind(workdir: str, recipe: Recipe) -> None:
    """A run directory belongs to one kind of model.

    Raises:
      ValueError: naming both kinds.
    """
    directory = local_directory(workdir)
    if not (directory / "config.json").is_file():
        return
    there, ours = (config.get("model", {}).get("name") for config in (read_config(directory), recipe.config))
    if there != ours:
        raise ValueError(f"workdir: '{workdir}' holds a run of '{there}', not of '{ours}'; give another --workdir")


def _describe(workdir: str, config: Mapping[str, Any], state: Any) -> None:
    """Write the config, and write and print a table of the parameters with their shardings; on the first host."""
    write_config(workdir, config)
    if jax.process_index() == 0:
        table = parameter_table(state.variables)
        write_atomic(Path(workdir) / "parameters.txt", f"{table}\n".encode())
        print(table)


def _data_position(saved: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Where the data goes on: at the very next image, or with another batch size at the next batch after it.

    Raises:
      ValueError: the checkpoint holds no position.
    """
    before, data = saved.get("batch_size", batch_size), saved.get("data")
    is_known = isinstance(data, dict) and (before == batch_size or type(data.get("next_batch")) is int)
    if type(before) is not int or not is_known:
        raise ValueError("checkpoint: it holds no position in the data; restore an older one or give a new --workdir")
    if before == batch_size:
        return saved["data"]
    seen = saved["data"]["next_batch"] * before
    if skipped := -seen % batch_size:
        words = "data.batch_size: %d was %d; %d images are passed over, up to a multiple of it"
        logger.warning(words, batch_size, before, skipped)
    return {**saved["data"], "next_batch": -(-seen // batch_size)}


def _finish(directory: RunDirectory, names: Sequence[str]) -> None:
    """Draw the curves of a run and say where its images are; on the first host."""
    if jax.process_index() != 0:
        return
    path = Path(directory.path)
    curves.curves(path / METRICS_FILE, names, path / "pictures" / "curves.png")
    print(f"images: {directory.address}/pictures, report: {directory.address}/{page.PAGE}")

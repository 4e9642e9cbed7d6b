"""Evaluations of a run: figures, the best weights, early stopping, interruption by a signal."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from rq_jax.checkpoint import Checkpointer
from rq_jax.evaluation.accumulate import accumulate
from rq_jax.report.progress import Progress
from rq_jax.settings.text import quoted
from rq_jax.training.log import MetricWriter
from rq_jax.training.monitor import HangGuard
from rq_jax.training.settings import LoopSettings
from rq_jax.training.signals import StopSignal

Figures = tuple[dict[str, float], dict[str, np.ndarray]]  # scalars, images


class Evaluable(Protocol):
    """A source of figures on held-out batches; every recipe is one.

    Attributes:
      title: in front of the progress bar.
      criterion: the scalar of `report` whose lowest value marks the best weights.
    """

    title: str
    criterion: str

    def evaluate(self, state: Any, batch: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
        """Two trees of arrays on the devices: sums, which are added up over batches, and what is shown of a batch."""

    def report(self, state: Any, sums: Any, shown: Any) -> Figures:
        """Scalars and images of all batches."""


@dataclasses.dataclass
class RunStatus:
    """Progress of a run beside its state and data position, saved with every checkpoint.

    Attributes:
      best_by: the figure that decides which weights are the best.
      best_loss: its lowest value so far.
      bad_evaluations: evaluations in a row without a lower one.
      stopped: early stopping has ended the run.
      owes_evaluation: a signal cut an evaluation short, which the next start makes up for.
    """

    best_loss: float = math.inf
    bad_evaluations: int = 0
    stopped: bool = False
    owes_evaluation: bool = False
    best_by: str = "validation_loss"  # as in checkpoints of before, which do not name it

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> "RunStatus":
        """The status in a checkpoint, which has further entries.

        Raises:
          ValueError: an entry of another type.
        """
        default = cls()
        found = {name: saved[name] for name in dataclasses.asdict(default) if name in saved}
        for name, value in found.items():
            kind = type(getattr(default, name))
            if type(value) not in ((int, float) if kind is float else (kind,)):
                raise ValueError(f"checkpoint: its {name} is {quoted(value)}, not of type {kind.__name__}")
        return cls(**found)


@dataclasses.dataclass
class Evaluator:
    """Evaluates a state, writes the figures, keeps the best weights and stops a run that gets no better.

    Attributes:
      recipe: what is evaluated.
      dataset: held-out batches, once through.
      settings: of the loop.
      status: changed by every evaluation.
      writer, checkpointer, progress, stop, hang: of the run.
    """

    recipe: Evaluable
    dataset: Any
    settings: LoopSettings
    status: RunStatus
    writer: MetricWriter
    checkpointer: Checkpointer
    progress: Progress
    stop: StopSignal
    hang: HangGuard
    _is_compiled: bool = False

    def make_up(self, state: Any, step: int) -> None:
        """Make up for an evaluation that an earlier start was stopped in, and note the status beside its checkpoint."""
        self.run(state, step)
        if not self.status.owes_evaluation:
            self.checkpointer.amend(step, dataclasses.asdict(self.status))

    def run(self, state: Any, step: int) -> None:
        """Evaluate a state; a signal leaves the evaluation owed."""
        if not self._is_compiled:
            self.hang.expect_compilation()
        with contextlib.nullcontext() if self._is_compiled else self.progress.waiting_for("compiling the evaluation"):
            figures = self._figures(state)
        self._is_compiled, self.status.owes_evaluation = True, figures is None
        if figures is None:
            return
        scalars, images = figures
        self.writer.write_scalars(step, scalars)
        self.writer.write_images(step, images)
        self.writer.flush()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        self.progress.message(f"step {step}: {shown}")
        if self.settings.keep_best or self.settings.early_stopping_evaluations:
            self._compare(state, step, scalars[self.recipe.criterion])

    def _figures(self, state: Any) -> Figures | None:
        """The figures of a state; None where a signal came before they were there."""
        title, enabled = f"{self.recipe.title}, evaluation", jax.process_index() == 0
        with (
            contextlib.closing(self.dataset.iterator()) as batches,
            Progress(self.dataset.steps_per_epoch, 0, "batch", title, enabled, leave=False) as progress,
            self.hang,
        ):

            def should_stop() -> bool:
                progress.update()
                if self.stop.poll():
                    return True
                self.hang.arm()  # each batch has the time of a step
                return False

            self.hang.arm()
            totals = accumulate(lambda batch: self.recipe.evaluate(state, batch), batches, should_stop)
        return None if totals is None else self.recipe.report(state, *totals)

    def _compare(self, state: Any, step: int, loss: float) -> None:
        """The best weights are on disk before a checkpoint can say how good they are."""
        status, patience, name = self.status, self.settings.early_stopping_evaluations, self.recipe.criterion
        if status.best_by != name:
            if math.isfinite(status.best_loss):
                self.progress.message(f"step {step}: the best weights are now chosen by {name}, not {status.best_by}")
            status.best_by, status.best_loss, status.bad_evaluations = name, math.inf, 0
        if loss < status.best_loss:
            status.bad_evaluations = 0
            if self.checkpointer.save_best(state):  # else the next that beats the one on disk is kept
                status.best_loss = float(loss)
            return
        status.bad_evaluations += 1
        if 0 < patience <= status.bad_evaluations:
            status.stopped = True
            self.progress.message(f"step {step}: no better {name} for {status.bad_evaluations} evaluations, stopping")

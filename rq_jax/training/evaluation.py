"""What a run measures on held-out examples, when a signal ends that, and what becomes of it. It knows no model."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.report.progress import Progress
from rq_jax.training.monitor import HangGuard
from rq_jax.training.signals import StopSignal

# What a run knows of its evaluations when it begins.
NOTHING_EVALUATED = {"best_loss": math.inf, "bad_evaluations": 0, "stopped": False, "owes_evaluation": False}

Figures = tuple[dict[str, float], dict[str, np.ndarray]]  # scalars, pictures


class Validation(NamedTuple):
    """What a run measures on held-out examples, batch by batch.

    Attributes:
      dataset: `iterator()` goes once through `steps_per_epoch` batches, as many on every process.
      measure: (state, batch of the host) -> two trees of arrays on the devices: sums, which are added up over the
        batches, and what of the first batch is shown.
      report: (state, sums, shown) -> scalars and pictures; "validation_loss" decides early stopping.
    """

    dataset: Any
    measure: Callable[[Any, Any], tuple[Any, Any]]
    report: Callable[[Any, Any, Any], Figures]


def validate(
    validation: Validation, state: Any, *, stop: StopSignal, hang: HangGuard, title: str = "", enabled: bool = True
) -> Figures | None:
    """The figures of a state; None where a signal came before they were there.

    Args:
      validation: what is measured.
      state: a `TrainState`.
      stop: asked after every batch.
      hang: watches every batch as it watches a step.
      title: in front of the bar.
      enabled: False shows no bar.
    """
    total, shown = None, None
    with (
        contextlib.closing(validation.dataset.iterator()) as batches,
        Progress(validation.dataset.steps_per_epoch, 0, "batch", title, enabled, leave=False) as progress,
        hang,
    ):
        hang.arm()
        for batch in batches:
            sums, first = validation.measure(state, batch)
            # Waiting for the batch before this one keeps the device busy and the queue short.
            jax.block_until_ready(total)
            total, shown = (sums, first) if total is None else (jax.tree.map(jnp.add, total, sums), shown)
            progress.update()
            if stop.poll():
                return None
            hang.arm()
        jax.block_until_ready(total)
    return validation.report(state, total, shown)


class Evaluations:
    """Evaluates, writes, keeps the best weights, counts the evaluations without better ones, each where it is wanted.

    What comes of them stands in `host`: "best_loss", "bad_evaluations", "stopped", and "owes_evaluation" where a signal
    cut one short.
    """

    def __init__(self, validation, settings, host, writer, checkpointer, progress, stop, hang, title):
        self._settings, self._host, self._writer, self._progress = settings, host, writer, progress
        self._checkpointer, self._hang, self._is_compiled = checkpointer, hang, False
        self._validate = functools.partial(
            validate, validation, stop=stop, hang=hang, title=f"{title}, evaluation", enabled=jax.process_index() == 0
        )

    def make_up(self, state: Any, step: int) -> None:
        """Evaluate what an earlier start had to leave, and note beside its checkpoint what came of it."""
        self.run(state, step)
        if not self._host["owes_evaluation"]:
            self._checkpointer.amend(step, {name: self._host[name] for name in NOTHING_EVALUATED})

    def run(self, state: Any, step: int) -> None:
        """Evaluate a state."""
        if not self._is_compiled:
            self._hang.expect_compilation()
        found = self._validate(state=state)
        self._is_compiled, self._host["owes_evaluation"] = True, found is None
        if found is None:
            return
        scalars, images = found
        self._writer.write_scalars(step, scalars)
        self._writer.write_images(step, images)
        self._writer.flush()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        self._progress.message(f"step {step}: {shown}")
        if self._settings.keep_best or self._settings.early_stopping_evaluations:
            self._compare(state, step, scalars["validation_loss"])

    def _compare(self, state: Any, step: int, loss: float) -> None:
        """The best weights are on disk before a checkpoint can say how good they are."""
        host, patience = self._host, self._settings.early_stopping_evaluations
        if loss < host["best_loss"]:
            host["bad_evaluations"] = 0
            if self._checkpointer.save_best(state):  # else the next that beats the one on disk is kept
                host["best_loss"] = float(loss)
            return
        host["bad_evaluations"] += 1
        if 0 < patience <= host["bad_evaluations"]:
            host["stopped"] = True
            self._progress.message(
                f"step {step}: no better validation loss for {host['bad_evaluations']} evaluations, stopping"
            )

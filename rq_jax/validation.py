"""One pass over held-out examples: sums, a bar, and an ear for signals. It knows no model."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.hosts import Stop
from rq_jax.progress import Progress
from rq_jax.watch import HangGuard

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
    validation: Validation, state: Any, stop: Stop, hang: HangGuard, title: str = "", enabled: bool = True
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
    hang.expect_compilation()
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
            if stop.is_asked():
                return None
            hang.arm()
        jax.block_until_ready(total)
    return validation.report(state, total, shown)

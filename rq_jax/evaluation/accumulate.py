"""Sums over the batches of a data set."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from rq_jax.report.progress import Progress


def accumulate(
    measure: Callable[[Any], tuple[Any, Any]], batches: Iterable[Any], should_stop: Callable[[], bool] = lambda: False
) -> tuple[Any, Any] | None:
    """Adds up what is measured on every batch.

    Args:
      measure: batch -> (sums, shown), two trees of arrays on the devices.
      batches: at least one.
      should_stop: called after every batch; True ends the pass.

    Returns:
      (the total of the sums, the first batch's `shown`), or None if the pass was stopped.
    """
    total, shown = None, None
    for batch in batches:
        sums, first = measure(batch)
        # Waiting for the batch before this one keeps the device busy and the queue short.
        jax.block_until_ready(total)
        total, shown = (sums, first) if total is None else (jax.tree.map(jnp.add, total, sums), shown)
        if should_stop():
            return None
    jax.block_until_ready(total)
    return total, shown


def counted(
    batches: Iterable[Any], num_images: int, batch_size: int, title: str, first_batch: int = 0
) -> Iterator[Any]:
    """The batches, each added to a progress bar once the next is asked for; of several processes the first shows it.

    Args:
      batches: once through, or this process's parts of them.
      num_images: of the whole set.
      batch_size: of all processes together.
      title: of the bar.
      first_batch: number of the first of them, behind those that an earlier run has done.
    """
    starts = range(first_batch * batch_size, num_images, batch_size)
    done = min(starts.start, num_images)
    is_first = jax.process_index() == 0
    with Progress(num_images, start=done, unit="image", title=title, enabled=is_first) as progress:
        for first, batch in zip(starts, batches, strict=True):
            yield batch
            progress.update(min(batch_size, num_images - first))

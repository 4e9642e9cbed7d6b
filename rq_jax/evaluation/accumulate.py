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


def counted(batches: Iterable[Any], num_images: int, batch_size: int, title: str) -> Iterator[Any]:
    """The batches, each added to a progress bar once the next is asked for; of several processes the first shows it.

    Args:
      batches: once through, or this process's parts of them.
      num_images: of the whole set.
      batch_size: of all processes together.
      title: of the bar.
    """
    with Progress(num_images, unit="image", title=title, enabled=jax.process_index() == 0) as progress:
        for first, batch in zip(range(0, num_images, batch_size), batches, strict=True):
            yield batch
            progress.update(min(batch_size, num_images - first))

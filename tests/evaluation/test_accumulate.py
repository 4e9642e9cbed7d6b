"""One pass over batches: sums, what is shown, when it stops, how much it queues."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.evaluation.accumulate import accumulate, counted


def measure(batch):
    return {"sum": jnp.sum(batch), "count": jnp.int32(batch.size)}, batch


BATCHES = [jnp.arange(3.0), jnp.array([5.0, 7.0]), jnp.array([11.0])]


def test_sums_are_added_and_the_first_batch_is_shown():
    sums, shown = accumulate(measure, iter(BATCHES))
    assert {name: float(value) for name, value in sums.items()} == {"sum": 26.0, "count": 6.0}
    np.testing.assert_array_equal(shown, BATCHES[0])


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_it_stops_after_the_batch_at_which_it_is_asked_to(stop_after):
    left = iter(BATCHES)
    asked = iter([False] * (stop_after - 1) + [True])
    assert accumulate(measure, left, lambda: next(asked)) is None
    assert len(list(left)) == len(BATCHES) - stop_after


def test_no_more_than_one_batch_waits_behind_the_one_that_is_measured(monkeypatch):
    events, wait = [], jax.block_until_ready

    def note_wait(total):
        events.append("wait for nothing" if total is None else f"wait for {float(total['count']):.0f}")
        return wait(total)

    def note_batch(batch):
        events.append("measure")
        return measure(batch)

    monkeypatch.setattr(jax, "block_until_ready", note_wait)
    accumulate(note_batch, BATCHES)
    waits = ["wait for nothing", "wait for 3", "wait for 5"]
    assert events == [event for wait in waits for event in ("measure", wait)] + ["wait for 6"]


@pytest.mark.parametrize("process", [0, 1])
def test_images_are_counted_once_they_are_measured(monkeypatch, process):
    counts = []

    class Bar(contextlib.nullcontext):
        def __init__(self, total, *, start, unit, title, enabled):
            assert (total, unit, title, enabled) == (5, "image", "some", process == 0)
            counts.append(start)
            super().__init__(self)

        def update(self, count):
            counts.append(count)

    monkeypatch.setattr("rq_jax.evaluation.accumulate.Progress", Bar)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    batches = counted(["first", "second"], 5, 3, "some")
    assert next(batches) == "first" and counts == [0]
    assert next(batches) == "second" and counts == [0, 3]
    assert next(batches, None) is None and counts == [0, 3, 2]
    assert list(counted(["second"], 5, 3, "some", first_batch=1)) == ["second"] and counts[3:] == [3, 2]
    assert list(counted([], 5, 3, "some", first_batch=2)) == [] and counts[5:] == [5]

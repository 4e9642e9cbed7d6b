"""One pass over held-out examples: what is added up, what is shown, when it ends."""

import functools
import io
import signal

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.report.progress import Progress
from rq_jax.training import evaluation as training_evaluation
from rq_jax.training import monitor
from rq_jax.training.evaluation import Validation, validate
from rq_jax.training.signals import StopSignal

QUIET = monitor.HangGuard(0)


def measure(state, batch):
    return {"sum": state * jnp.sum(batch["x"]), "count": jnp.int32(1)}, jnp.asarray(batch["x"])


def report(state, sums, shown):
    return {name: float(value) for name, value in sums.items()}, {"first": np.asarray(shown)}


def test_sums_are_added_and_the_first_batch_is_shown():
    held_out = helpers.HeldOut()
    with StopSignal() as stop:
        for _ in range(2):  # the second time as the first
            scalars, pictures = validate(
                Validation(held_out, measure, report), 2.0, stop=stop, hang=QUIET, enabled=False
            )
            assert scalars == {"sum": 2.0 * (1 + 2 + 3), "count": 3.0} and held_out.closed
            np.testing.assert_array_equal(pictures["first"], [1.0])


@pytest.mark.parametrize("batch", range(3))
def test_a_signal_ends_it_after_the_batch(batch):
    held_out = helpers.HeldOut({batch: lambda: signal.raise_signal(signal.SIGTERM)})

    def refuse(*_):
        raise AssertionError("there is nothing to report")

    with StopSignal() as stop:
        assert validate(Validation(held_out, measure, refuse), 2.0, stop=stop, hang=QUIET, enabled=False) is None
    assert stop.signal == signal.SIGTERM and held_out.given == batch + 1 and held_out.closed


def test_every_batch_is_watched_and_what_follows_is_not():
    events = []

    class Guard(monitor.HangGuard):
        def arm(self):
            events.append("arm")

        def disarm(self):
            events.append("disarm")

    def look(*_):
        events.append("report")
        return {}, {}

    def note(state, batch):
        events.append("batch")
        return measure(state, batch)

    with StopSignal() as stop:
        validate(Validation(helpers.HeldOut(), note, look), 2.0, stop=stop, hang=Guard(0), enabled=False)
    assert events == [*["arm", "batch"] * 3, "arm", "disarm", "report"]


@pytest.mark.parametrize("enabled", [True, False])
def test_batches_are_counted_while_it_goes_on(monkeypatch, enabled):
    stream = io.StringIO()
    monkeypatch.setattr(training_evaluation, "Progress", functools.partial(Progress, line_seconds=0.0, stream=stream))
    with StopSignal() as stop:
        held_out = Validation(helpers.HeldOut(), measure, report)
        validate(held_out, 2.0, stop=stop, hang=QUIET, title="stage 9, evaluation", enabled=enabled)
    shown = [line.split(" [")[0] for line in stream.getvalue().splitlines()]
    assert shown == [f"stage 9, evaluation: {count}/3" for count in (1, 2, 3)] * enabled

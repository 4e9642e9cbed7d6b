"""One pass over held-out examples: what is added up, what is shown, when it ends."""

import contextlib
import functools
import io
import signal

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.evaluation.tokenizer import Evaluation
from rq_jax.pretrained.vgg_lpips import Perceptual
from rq_jax.report.progress import Progress
from rq_jax.training import evaluation, monitor
from rq_jax.training.evaluation import Evaluator, RunStatus
from rq_jax.training.settings import LoopSettings
from rq_jax.training.signals import StopSignal

QUIET = monitor.HangGuard(0)


class Recipe:
    """Measures what the batches hold."""

    title, criterion = "stage 9", "sum"

    def __init__(self, report=None, note=lambda: None):
        self.report, self.note = report or self.figures, note

    def evaluate(self, state, batch):
        self.note()
        return {"sum": state * jnp.sum(batch["x"]), "count": jnp.int32(1)}, jnp.asarray(batch["x"])

    @staticmethod
    def figures(state, sums, shown):
        return {name: float(value) for name, value in sums.items()}, {"first": np.asarray(shown)}


class Notes:
    """Stands for the writer and the bar of a run."""

    def __init__(self):
        self.scalars, self.images, self.messages, self.waited = {}, {}, [], []

    def write_scalars(self, step, scalars):
        self.scalars[step] = scalars

    def write_images(self, step, images):
        self.images[step] = images

    def flush(self):
        pass

    def save_best(self, state):
        self.best = state
        return True

    def message(self, text):
        self.messages.append(text)

    def waiting_for(self, what):
        self.waited.append(what)
        return contextlib.nullcontext()


def evaluator(held_out, stop, recipe=None, hang=QUIET, status=None, **settings):
    """An evaluator, and what it writes."""
    notes, settings = Notes(), LoopSettings(total_steps=1, **settings)
    recipe = Recipe() if recipe is None else recipe
    return Evaluator(recipe, held_out, settings, status or RunStatus(), notes, notes, notes, stop, hang), notes


def test_sums_are_added_and_the_first_batch_is_shown():
    held_out = helpers.HeldOut()
    with StopSignal() as stop:
        evaluating, notes = evaluator(held_out, stop)
        for step in range(2):  # the second time as the first
            evaluating.run(2.0, step)
            assert notes.scalars[step] == {"sum": 2.0 * (1 + 2 + 3), "count": 3.0} and held_out.closed
            np.testing.assert_array_equal(notes.images[step]["first"], [1.0])
    assert notes.messages == ["step 0: count 3, sum 12", "step 1: count 3, sum 12"]
    assert notes.waited == ["compiling the evaluation"]


@pytest.mark.parametrize("batch", range(3))
def test_a_signal_ends_it_after_the_batch(batch):
    held_out = helpers.HeldOut({batch: lambda: signal.raise_signal(signal.SIGTERM)})

    def refuse(*_):
        raise AssertionError("there is nothing to report")

    with StopSignal() as stop:
        evaluating, notes = evaluator(held_out, stop, Recipe(refuse))
        evaluating.run(2.0, 1)
    assert evaluating.status.owes_evaluation and not notes.scalars
    assert stop.signal == signal.SIGTERM and held_out.given == batch + 1 and held_out.closed


def test_every_batch_is_watched_and_what_follows_is_not():
    events = []

    def look(*_):
        events.append("report")
        return {}, {}

    with StopSignal() as stop:
        recipe = Recipe(look, lambda: events.append("batch"))
        evaluator(helpers.HeldOut(), stop, recipe, helpers.recording_guard(events)(0))[0].run(2.0, 1)
    assert events == [*["arm", "batch"] * 3, "arm", "disarm", "report"]


@pytest.mark.parametrize("process", [0, 1])
def test_batches_are_counted_while_it_goes_on(monkeypatch, process):
    stream = io.StringIO()
    monkeypatch.setattr(evaluation, "Progress", functools.partial(Progress, line_seconds=0.0, stream=stream))
    with StopSignal() as stop:
        evaluating, _ = evaluator(helpers.HeldOut(), stop)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        evaluating.run(2.0, 1)
    shown = [line.split(" [")[0] for line in stream.getvalue().splitlines()]
    assert shown == [f"stage 9, evaluation: {count}/3" for count in (1, 2, 3)] * (process == 0)


def test_the_status_of_a_checkpoint_is_read_with_what_else_it_holds():
    """Checkpoints of before know nothing of evaluations that are owed."""
    saved = {"best_loss": 0.5, "bad_evaluations": 3, "stopped": True, "data": {"next_batch": 9}, "batch_size": 8}
    assert RunStatus.from_saved(saved) == RunStatus(0.5, 3, True, False)


# --- the best weights -------------------------------------------------------------------------------------------------


def blurred_to_sharp(state, sums, shown):
    """Weights 1, 2, 3: ever more squared error, ever less perceptual distance."""
    return {"validation_loss": float(state), "distance/x": 1 / float(state)}, {}


@pytest.mark.parametrize("name, best", [("validation_loss", 1.0), ("distance/x", 3.0)])
def test_the_criterion_of_the_recipe_decides(name, best):
    recipe = Recipe(blurred_to_sharp)
    recipe.criterion = name
    with StopSignal() as stop:
        evaluating, notes = evaluator(helpers.HeldOut(), stop, recipe, keep_best=True, early_stopping_evaluations=2)
        for step, state in enumerate((1.0, 2.0, 3.0)):
            evaluating.run(state, step)
    assert notes.best == best and evaluating.status.best_by == name
    assert evaluating.status.stopped == (best == 1.0)
    assert (notes.messages[-1] == f"step 2: no better {name} for 2 evaluations, stopping") == (best == 1.0)


def test_a_run_whose_criterion_was_another_compares_anew():
    """Its best value so far is of another kind."""
    recipe, status = Recipe(blurred_to_sharp), RunStatus.from_saved({"best_loss": 1e-9, "bad_evaluations": 1})
    recipe.criterion = "distance/x"
    with StopSignal() as stop:
        evaluating, notes = evaluator(helpers.HeldOut(), stop, recipe, status=status, early_stopping_evaluations=2)
        evaluating.run(2.0, 7)
    assert notes.messages[-1] == "step 7: the best weights are now chosen by distance/x, not validation_loss"
    assert notes.best == 2.0 and status == RunStatus(0.5, 0, best_by="distance/x")


JUDGE = Perceptual("vgg", None, None)


@pytest.mark.parametrize(
    "best_by, is_sharpened, judge, criterion",
    [
        ("auto", False, JUDGE, "validation_loss"),
        ("auto", True, JUDGE, "distance/vgg"),
        ("auto", True, None, "validation_loss"),
        ("perceptual", False, JUDGE, "distance/vgg"),
        ("reconstruction", True, JUDGE, "validation_loss"),
    ],
)
def test_a_tokenizer_is_chosen_by_what_it_is_trained_for(best_by, is_sharpened, judge, criterion):
    assert Evaluation(best_by=best_by).criterion(is_sharpened, judge) == criterion


@pytest.mark.parametrize(
    "best_by, message",
    [
        ("perceptual", "^evaluation.best_by: 'perceptual' is not measured; set evaluation.use_perceptual=True$"),
        ("ssim", "^evaluation.best_by: 'ssim' is unknown; allowed are 'auto', 'reconstruction' and 'perceptual'$"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(best_by, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(best_by=best_by).criterion(True, None)

"""What is drawn and kept, so that of each class or prompt as many stay as would be drawn without a choice."""

from types import SimpleNamespace

import numpy as np
import pytest

from rq_jax.evaluation import choices
from rq_jax.evaluation.choices import ChoiceSettings
from rq_jax.sampling.rerank import Chosen


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    """What the judges were asked for, group by group."""
    asked = []
    monkeypatch.setattr(choices, "classifier_judge", lambda loaded, classes, file: asked.append(list(classes)))
    monkeypatch.setattr(choices, "clip_judge", lambda prompts, file: asked.append((prompts, file)))
    return asked


def prepare(ids, conds, length=1, by="classifier", **settings):
    model = SimpleNamespace(is_conditional=conds is not None, cond_length=length)
    conds = None if conds is None else np.array(conds)[:, None]
    names = [] if conds is None else [str(cond) for cond in conds]
    flags = ChoiceSettings(by=by, **settings)
    return choices.prepare(SimpleNamespace(model=model, config={}), flags, np.array(ids), conds, names)


@pytest.mark.parametrize(
    "ids, conds, settings, drawn",
    [
        (range(12), [4, 1, 4], {"keep": 0.25}, 48),  # class 4 twice in a turn
        (range(7, 12), [4, 1], {"keep": 0.25}, 20),  # a slice that ends within a turn
        (range(7, 12), [4, 1], {"candidates": 3}, 6),  # of three kept of class 1, and two of class 4
        (range(5, 8), [9, 8, 7, 6], {"keep": 0.5}, 6),  # fewer images than classes
        (range(3), [0], {"keep": 0.3}, 10),
        (range(4), [2, 2, 2, 5], {"keep": 1.0}, 4),
        (range(20), [1], {"keep": 0.05}, 400),  # and not 401, by rounding
    ],
)
def test_of_every_class_as_many_stay_as_would_be_drawn(judged, ids, conds, settings, drawn):
    choice = prepare(ids, conds, **settings)
    assert choice.num_drawn == drawn
    wanted = [conds[i % len(conds)] for i in ids]
    (classes,) = judged
    assert [classes[group] for group in choice.slots] == wanted and sorted(set(wanted)) == classes
    assert choice.keep.tolist() == [wanted.count(one) for one in classes]
    candidates = np.arange(ids[0], ids[0] + drawn)
    drawn_for = choice.conds[candidates % len(choice.conds), 0].tolist()
    assert [classes[group] for group in choice.group_of(candidates)] == drawn_for
    assert all(drawn_for.count(one) >= wanted.count(one) for one in classes)
    if len(ids) >= len(conds):
        assert drawn_for == [conds[i % len(conds)] for i in candidates]  # those that the ids have without a choice


def test_prompts_are_told_apart_by_their_texts(judged):
    """And not by their first token."""
    model, conds = SimpleNamespace(is_conditional=True, cond_length=2), np.array([[5, 1], [5, 2]])
    flags = ChoiceSettings(candidates=4, by="clip", judge="clip.pt")
    loaded = SimpleNamespace(model=model, config={})
    choice = choices.prepare(loaded, flags, np.arange(1, 7), conds, ["a red bee", "a green bee"])
    assert judged == [(["a green bee", "a red bee"], "clip.pt")]
    assert choice.num_drawn == 8 and choice.slots.tolist() == [0, 1] * 3
    np.testing.assert_array_equal(choice.conds[choice.groups == 0], [[5, 2]])


def test_what_was_chosen_comes_out_in_the_order_of_the_images():
    choice = prepare(range(6), [3, 1, 2], keep=0.5)
    groups = np.array([0, 0, 1, 1, 2, 2])  # of classes 1, 2 and 3
    chosen = choice.in_slots(Chosen(np.arange(6), groups, -np.arange(6.0), {"codes": np.arange(6)}))
    assert chosen.groups.tolist() == choice.slots.tolist() == [2, 0, 1, 2, 0, 1]
    assert chosen.ids.tolist() == chosen.items["codes"].tolist() == [4, 0, 2, 5, 1, 3]


@pytest.mark.parametrize(
    "ids, conds, length, settings, message",
    [
        (range(3), None, 1, {"keep": 0.5}, "^--by: classifier is for a class-conditional model, this one is unconditional; l"),
        (range(3), [0], 6, {"keep": 0.5}, "^--by: classifier is for a class-conditional model, this one is text; leave it out$"),
        (range(3), [0], 1, {"keep": 0.5, "by": "clip"}, "^--by: clip is for a text-conditional model, this one is class; leave it"),
        (range(3), [0, 1], 1, {"candidates": 0}, "^--candidates: 0 must be at least 2; so many are kept of a class or prompt$"),
        (range(5), [0, 1], 1, {"candidates": 2}, "^--candidates: 2 must be at least 3; so many are kept of a class or prompt$"),
        ([2**62], [0], 1, {"keep": 0.5}, "^--first_index: the last image id drawn: 4611686018427387905 is outside 0.."),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_from_is_refused(ids, conds, length, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(ids, conds, length, **settings)


REFUSED = {
    "nothing": ({"keep": 0.0, "by": "classifier"}, r"^--keep: 0.0 is outside \(0, 1\], the share of the images that are kept$"),
    "more": ({"keep": 1.5, "by": "classifier"}, r"^--keep: 1.5 is outside \(0, 1\]"),
    "nan": ({"keep": float("nan"), "by": "classifier"}, r"^--keep: nan is outside \(0, 1\]"),
    "twice": ({"keep": 0.5, "candidates": 4, "by": "classifier"}, "^--keep: 0.5 and --candidates: 4 exclude one another$"),
    "no judge": ({"candidates": 4}, "^--candidates: 4 needs --by; give both, or neither$"),
    "no amount": ({"by": "classifier"}, "^--by: classifier needs --keep or --candidates; give both, or neither$"),
    "no file": ({"keep": 0.5, "by": "clip"}, "^--by: clip needs --judge, the file ViT-B-32.pt of OpenAI; give it$"),
    "file alone": ({"judge": "a.pth"}, "^--judge: a.pth needs --keep or --candidates; give both, or neither$"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_do_not_belong_together_are_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ChoiceSettings(**settings).check()


def test_a_choice_is_among_whole_images():
    ChoiceSettings().check(prefix="a.npz")
    ChoiceSettings(keep=0.5, by="classifier").check(prefix=None, edit_of=None)
    with pytest.raises(ValueError, match="^--edit_of: train and --candidates: 4 exclude one another$"):
        ChoiceSettings(candidates=4, by="classifier").check(prefix=None, edit_of="train")

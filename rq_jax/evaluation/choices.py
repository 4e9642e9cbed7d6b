"""Rejection sampling and re-ranking as they are asked for: which samples are drawn, and how many of each group stay."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.evaluation.conditions import kind_of
from rq_jax.evaluation.judges import Judge, classifier_judge, clip_judge
from rq_jax.sampling.images import LAST_ID
from rq_jax.sampling.rerank import Chosen
from rq_jax.settings import checks

JUDGES = {"classifier": "class", "clip": "text"}  # the condition that each reads


class ChoiceSettings(NamedTuple):
    """How to choose; the flags of `sample.py`.

    Attributes:
      keep: share of the samples that stay, in (0, 1].
      candidates: samples that are drawn for each class or prompt.
      by: the judge.
      judge: file of its weights; None for the stand-in of a classifier.
    """

    keep: float | None = None
    candidates: int | None = None
    by: str | None = None
    judge: str | None = None

    def check(self, **others: Any) -> None:
        """Check the values, and which flags are given together.

        Args:
          **others: values of flags that exclude a choice, None where they are not given.

        Raises:
          ValueError: a value out of range, one flag without what it belongs to, or two that exclude one another.
        """
        given = {name: value for name, value in self._asdict().items() if value is not None}
        amounts = {name: given[name] for name in ("keep", "candidates") if name in given}
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"--keep: {self.keep} is outside (0, 1], the share of the images that are kept")
        if len(amounts) > 1:
            raise ValueError(f"--keep: {self.keep} and --candidates: {self.candidates} exclude one another")
        for name, value in given.items():
            if not (self.by if name in amounts else amounts):
                needed = "--by" if name in amounts else "--keep or --candidates"
                raise ValueError(f"--{name}: {value} needs {needed}; give both, or neither")
        if self.by == "clip" and self.judge is None:
            raise ValueError("--by: clip needs --judge, the file ViT-B-32.pt of OpenAI; give it")
        for name, value in others.items():
            for amount in amounts:
                if value is not None:
                    raise ValueError(f"--{name}: {value} and --{amount}: {given[amount]} exclude one another")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Samples to draw, and to choose among: id i has the condition and the group of row i % p.

    Attributes:
      num_drawn: ids from the first one on.
      conds: (p, U).
      groups: (p,), 0..G - 1.
      slots: (n,), groups of the images that come out, in their order.
      judge: gives the scores.
    """

    num_drawn: int
    conds: np.ndarray
    groups: np.ndarray
    slots: np.ndarray
    judge: Judge

    @property
    def keep(self) -> np.ndarray:
        """Images that are kept of each group (G,)."""
        return np.bincount(self.slots)

    def group_of(self, ids: np.ndarray) -> np.ndarray:
        """The groups of image ids."""
        return self.groups[ids % len(self.groups)]

    def in_slots(self, chosen: Chosen) -> Chosen:
        """What was chosen, in the order in which the images come out."""
        order = np.argsort(np.argsort(self.slots, kind="stable"))
        return jax.tree.map(lambda array: array[order], chosen)


def prepare(
    loaded: LoadedModel, settings: ChoiceSettings, ids: np.ndarray, conds: np.ndarray | None, names: list[str]
) -> Choice:
    """What to draw, such that of each class or prompt as many images stay as would be drawn without a choice.

    Args:
      loaded: the transformer.
      settings: checked.
      ids: of the images as they would be drawn without a choice, one after the other.
      conds: (m, U), which these take in turn by id.
      names: of the conditions.

    Raises:
      ValueError: a judge that does not read the condition of the model, fewer candidates than images that are kept, or
        what the judge refuses.
    """
    kind, needed = kind_of(loaded), JUDGES[settings.by]
    if kind != needed:
        raise ValueError(f"--by: {settings.by} is for a {needed}-conditional model, this one is {kind}; leave it out")
    n, first = len(ids), int(ids[0])
    period = min(n, len(conds))  # the conditions of the images, which repeat from there on
    rows = ids[:period] % len(conds)
    if (rounds := settings.candidates) is None:
        rounds = math.ceil(round(n / (period * settings.keep), 6))  # 1 / 0.05 is a little above 20
    checks.at_least("--candidates", rounds, -(-n // period), fix="so many are kept of a class or prompt")
    last = first + rounds * period - 1
    checks.in_range("--first_index: the last image id drawn", last, 0, LAST_ID, "the ids that an image can have")
    of_row = conds[rows, 0] if kind == "class" else np.array(names)[rows]
    wanted, group_of_row = np.unique(of_row, return_inverse=True)
    if settings.by == "clip":
        judge = clip_judge(wanted.tolist(), settings.judge)
    else:
        judge = classifier_judge(loaded, wanted, settings.judge)
    turn = np.roll(np.arange(period), first % period)  # of id i in place i % period
    return Choice(rounds * period, conds[rows[turn]], group_of_row[turn], group_of_row[(ids - first) % period], judge)

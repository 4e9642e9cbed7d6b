"""Figures of sets of images that are asked to show what the captions of a split name."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax.evaluation import attributes, stamps
from rq_jax.evaluation.attributes import CAPTIONS, Claims, Classifiers
from rq_jax.evaluation.descriptions import Combination, Description
from rq_jax.evaluation.features import Rebuild
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.stamps import Fields, Figure
from rq_jax.evaluation.statistics import unit
from rq_jax.evaluation.store import FeatureSet
from rq_jax.report import grids, tables

OF_ATTRIBUTE = "accuracy of "
CHANCE, HELD_OUT, RECONSTRUCTIONS = "chance", "held-out images", "their reconstructions"
RATIOS = {"accuracy": "accuracy_ratio", "combinations": "combinations_ratio"}  # figure -> its ratio to held-out images
NUM_SHOWN, SHOWN_SIZE, SHOWN_LINES = 6, 256, 12

Figures = dict[str, Any]  # of a set, as JSON holds them


class Rebuilt(NamedTuple):
    """Reconstructions by a tokenizer: what makes them, and its fingerprint."""

    rebuild: Rebuild
    by: str

    def features(self, features: SetFeatures, title: str, split: str, at_most: int) -> FeatureSet:
        """Features of the reconstructions of so many images of a split, rounded as samples are."""
        return features.of_split(title, split, self.rebuild, True, [self.by, False], at_most)


@dataclasses.dataclass(frozen=True)
class Judges:
    """What judges images.

    Attributes:
      label: what the class is called among the attributes.
      classifiers: of attributes, on the features.
      seen: see `descriptions.seen_combinations`.
      fields: of the images that the classifiers were fitted to, in the protocol of a figure.
      features: of images; gives the data set.
      rebuilt: reconstructions, the best that samples can be.
      by_clip, text_features: features of images and of tokens by CLIP, or None.
    """

    label: str
    classifiers: Classifiers
    seen: Collection[Combination]
    fields: Fields
    features: SetFeatures
    rebuilt: Rebuilt
    by_clip: SetFeatures | None = None
    text_features: Callable[[np.ndarray], np.ndarray] | None = None


class AskedSplit:
    """The captions of a split, and sets of images with one for each of them: its own, and samples.

    Attributes:
      asked: what is asked for, by image.
      figures: of chance and of each set, by name.
    """

    def __init__(
        self,
        judges: Judges,
        split: str,
        at_most: int,
        described: Mapping[int, Description],
        tokens: Mapping[int, np.ndarray] | None = None,
    ):
        """Measures the images of the split.

        Args:
          judges: of all images.
          split: as `EvaluationData.open` takes it.
          at_most: so many of its images, spread evenly.
          described: these, from `descriptions.of_captions`.
          tokens: of their captions for CLIP, which `Judges.by_clip` needs.
        """
        self._judges, self._split = judges, split
        data, title = judges.features.data, f"features of {split}"
        own = judges.features.of_split(title, split, at_most=at_most)
        by_clip = judges.by_clip and judges.by_clip.of_split(f"{title} by CLIP", split, at_most=at_most)
        positions = own.positions.tolist()
        self.asked = [described[i] for i in positions]
        self._claims = Claims.of(self.asked, judges.classifiers, judges.label, judges.seen)
        self._candidates = attributes.draw_candidates(len(positions))
        self._texts = None
        if judges.by_clip is not None:
            self._texts = unit(judges.text_features(np.stack([tokens[i] for i in positions])))
        self._fields = data.fields(split, own.positions)
        self._subjects: dict[str, Fields] = {}
        shown = data.open(split).examples(positions[:NUM_SHOWN])["image"]
        figures, missed = self._measure(own, by_clip)
        self._rows = {HELD_OUT: shown}
        self._notes = {HELD_OUT: [f"{one.caption}. {note}" for one, note in zip(self.asked, missed, strict=False)]}
        chance = self._claims.shares(self._claims.chances(judges.classifiers))
        chance |= {name: 1 / CAPTIONS for name in figures if name.endswith("retrieval")}
        soft = judges.rebuilt.features(judges.features, f"{title}, reconstructed", split, at_most)
        self.figures = {CHANCE: chance, HELD_OUT: figures, RECONSTRUCTIONS: self._measure(soft, None)[0]}

    def add_samples(self, name: str, sets: Iterable[ImageSet]) -> None:
        """Measures samples of the captions, drawn with several seeds: means, and deviations over the seeds."""
        judges, trees, seeds, subject = self._judges, [], [], {}
        for one in sets:
            found = judges.features.of_images("features of samples", one, one.is_rounded)
            by_clip = judges.by_clip and judges.by_clip.of_images("features of samples by CLIP", one, one.is_rounded)
            figures, missed = self._measure(found, by_clip)
            trees.append(figures | self._ratios(figures))
            if name not in self._rows:
                self._rows[name] = one.first(NUM_SHOWN, judges.features.data.batch_size)
                self._notes[name] = missed
            subject = dict(one.subject)
            seeds.append(subject.pop("seed"))
        self.figures[name] = jax.tree.map(_spread, *trees)
        self._subjects[name] = {**subject, "seeds": seeds}

    def add_to(self, report: Report) -> None:
        """Adds the figures to a report, and a table by attribute."""
        claims, asked = self._claims, self._claims.asked()
        report.record["splits"][self._split] = {
            "images": len(self.asked), "asked": asked, "unseen_combinations": len(claims.pairs),
            "figures": self.figures,
        }  # fmt: skip
        for of, figures in self.figures.items():
            at = {name: (name,) for name in overall(figures)}
            at |= {f"{OF_ATTRIBUTE}{name}": ("by_attribute", name) for name in asked}
            subject = f"{of}, {self._split}"
            for name, keys in at.items():
                place = ("splits", self._split, "figures", of, *keys)
                report.figures.append(Figure(name, subject, place, self._protocol(name)))
            if of in self._subjects:
                report.subjects[subject] = self._subjects[of]
        rows = [
            {
                self._split: name, "captions": count,
                **{of: stamps.shown(one["by_attribute"][name])[0] for of, one in self.figures.items()},
            }
            for name, count in asked.items()
        ]  # fmt: skip
        report.told.append(tables.table(rows))

    def sheet(self) -> np.ndarray:
        """The first held-out images with their captions above samples of these, each with what it misses."""
        scale = max(1, SHOWN_SIZE // self._rows[HELD_OUT].shape[1])
        return grids.labelled_grid(self._rows, scale, captions=self._notes, lines=SHOWN_LINES)

    def _measure(self, found: FeatureSet, by_clip: FeatureSet | None) -> tuple[Figures, list[str]]:
        """Figures of one image for each caption, and what the first of them miss."""
        claims, classifiers = self._claims, self._judges.classifiers
        log_probabilities = classifiers.log_probabilities(found.vectors[0])
        is_seen = claims.seen_in(log_probabilities, classifiers)
        figures = claims.shares(is_seen)
        figures["retrieval"] = attributes.retrieved(claims.scores(log_probabilities, self._candidates))
        if by_clip is not None:
            cosines = np.einsum("na,nca->nc", unit(by_clip.vectors[0]), self._texts[self._candidates])
            figures["clip_retrieval"] = attributes.retrieved(cosines)
        missed = [claims.missed(is_seen, row) for row in range(min(NUM_SHOWN, len(self.asked)))]
        return figures, [f"Missed: {', '.join(names)}" if names else "Nothing missed" for names in missed]

    def _ratios(self, figures: Figures) -> Figures:
        own = self.figures[HELD_OUT]
        return {ratio: figures[name] / own[name] for name, ratio in RATIOS.items() if own.get(name)}

    def _protocol(self, name: str) -> Fields:
        """Of a figure; those of samples and of held-out images are there to be compared."""
        judges, retrieval = self._judges, {}
        if name.endswith("retrieval"):
            retrieval = {"captions": CAPTIONS, "captions seed": attributes.SEED}
        if name == "clip_retrieval":
            return {**self._fields, **judges.by_clip.extractor.fields(True), **retrieval, "estimator": "highest cosine"}
        of_network = judges.features.extractor.fields(True)
        return {**self._fields, **of_network, **judges.fields, **retrieval, "estimator": attributes.ESTIMATOR}


def overall(figures: Figures) -> Figures:
    """Those of all captions together."""
    return {name: value for name, value in figures.items() if not name.startswith("by_")}


def _spread(*values: float) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}

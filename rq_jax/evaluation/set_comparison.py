"""Sets of images against a reference: their features, their figures, and the protocol of each."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.evaluation import references, set_figures
from rq_jax.evaluation.features import FeatureExtractor, Rebuild
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.references import FileReference
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Estimators, Reference
from rq_jax.evaluation.stamps import Figure
from rq_jax.evaluation.store import FeatureSet
from rq_jax.pretrained import efficientnet_lite, inception
from rq_jax.settings.text import quoted

TRAINING = "training pictures"
HELD_OUT = "the held-out images"

NUM_TOLD = 5  # classes
OF_CLASS = "kernel_distance of class "


def open_extractor(args: Any, mesh: jax.sharding.Mesh) -> FeatureExtractor:
    """The feature network and protocol that the flags of a command name.

    Raises:
      ValueError, FileNotFoundError: two networks, or a file that is none.
    """
    if args.inception and args.features:
        raise ValueError(f"--inception: {args.inception} and --features: {args.features} exclude one another")
    net = inception.load(args.inception) if args.inception else efficientnet_lite.load(args.features)
    return FeatureExtractor(net, mesh, PROTOCOLS[args.protocol])


def cache_of(args: Any) -> Path | None:
    """The directory of the features that a command takes."""
    return None if args.no_cache else Path(args.cache or Path(args.out) / "features")


class SetComparison:
    """Measures sets of images against a reference, and adds their figures to a report.

    Everything is checked when it is made, before any feature is taken.
    """

    def __init__(
        self,
        args: Any,
        extractor: FeatureExtractor,
        data: EvaluationData,
        report: Report,
        sizes: Mapping[str, int] | None = None,
        *,
        reference: FileReference | None = None,
        has_reconstructions: bool = False,
    ):
        """As follows.

        Args:
          args: the flags of a command.
          extractor: of the features.
          data: whose held-out images are the reference, unless a file is.
          report: to add to.
          sizes: of the sets of samples, by name.
          reference: a file in place of the held-out images.
          has_reconstructions: of the held-out images.

        Raises:
          ValueError: sets that are too small for what is asked.
        """
        self._data, self._report, self._file = data, report, reference
        self.net, self._protocol = extractor.net, extractor.protocol
        self._has_floor = reference is None and not args.no_floor
        use_manifold = bool(sizes) and not args.no_manifold and (reference is None or reference.has_features)
        compared = self._sizes_of_reference()
        paired_size = compared.get(HELD_OUT) if has_reconstructions or self._shows_training_twice else None
        compared |= {quoted(name): size for name, size in (sizes or {}).items()}
        report.told += set_figures.check_sizes(compared, self.net, use_manifold)
        subset_size = set_figures.choose_subset_size(args.subset_size, compared, paired_size)
        estimators = Estimators(subset_size, args.num_subsets, self._protocol.score_split, use_manifold)
        self._features = SetFeatures(extractor, data, estimators, cache_of(args))

    def _sizes_of_reference(self) -> dict[str, int]:
        if self._file is not None:
            return {} if self._file.count is None else {"the reference": self._file.count}
        floor = {"the training images": self._data.training().num_examples} if self._has_floor else {}
        return {HELD_OUT: self._data.held_out().num_examples, **floor}

    @property
    def _shows_training_twice(self) -> bool:
        return self._has_floor and self._data.split == "train"

    @functools.cached_property
    def reference(self) -> Reference:
        """What is compared with; features are taken once it is asked for."""
        if self._file is not None:
            return self._file.measured(self._features)
        held_out = self._features.of_split("features of held-out images", self._data.split)
        fields = references.fields_of_split(self._data.fields(self._data.split, held_out.positions))
        return Reference(held_out.moments[0], held_out.vectors[0], fields)

    def add_floor(self) -> None:
        """Measures the training images, unless they are left out."""
        if self._has_floor:
            training = self._features.of_split("features of training images", "train")
            self._add(TRAINING, training, True, "those of the data", paired=self._shows_training_twice)

    def add_reconstructions(self, name: str, rebuild: Rebuild, rebuilt_by: Any) -> None:
        """Measures reconstructions of the held-out images.

        Args:
          name: of the tokenizer.
          rebuild: as `features.make_reconstruct` makes it.
          rebuilt_by: identity of the tokenizer and of what else decides the reconstructions, as JSON holds it.
        """
        rounds, title = self._protocol.rounds_reconstructions, "features of reconstructions"
        found = self._features.of_split(title, self._data.split, rebuild, rounds, rebuilt_by)
        self._add(f"reconstructions by {name}", found, rounds, "reconstructions", rebuilt=True, paired=True)

    def add_samples(self, samples: ImageSet) -> FeatureSet:
        """Measures a set of samples; returns its features."""
        rounds = samples.is_rounded or self._protocol.rounds_samples
        found = self._features.of_images("features of samples", samples, rounds)
        self._report.subjects[f"samples {samples.name}"] = samples.subject
        self._add(f"samples {samples.name}", found, rounds, samples.conditions_digest())
        return found

    def add_classes(
        self, samples: ImageSet, features: FeatureSet, labels: np.ndarray, class_names: Sequence[str]
    ) -> None:
        """Adds the kernel distance of each class to the images of the reference that have it.

        Args:
          samples: with a class each.
          features: of them.
          labels: (M,), classes of the images of the reference, by position.
          class_names: by number.
        """
        of, positions = f"samples {samples.name}", np.asarray(samples.conditions)[features.positions, 0]
        found = set_figures.by_class(features.vectors[0], positions, self.reference.vectors, labels, class_names)
        self._report.record.setdefault("by_class", {})[of] = found
        rounds = samples.is_rounded or self._protocol.rounds_samples
        protocol = {
            **self.reference.fields, **self._features.extractor.fields(rounds),
            "conditions": samples.conditions_digest(), "estimator": "unbiased, kernel (x.y / A + 1)^3, of one class",
        }  # fmt: skip
        farthest = sorted(found, key=lambda name: -found[name]["kernel_distance"])[:NUM_TOLD]
        shown = ", ".join(f"{quoted(name)} {found[name]['kernel_distance']:.3g}" for name in farthest)
        self._report.told.append(f"{of}: {len(found)} classes, farthest from their own: {shown}")
        for name in found:
            at = ("by_class", of, name, "kernel_distance")
            self._report.figures.append(Figure(f"{OF_CLASS}{name}", of, at, protocol))

    def _add(self, of: str, features: FeatureSet, rounds: bool, conditions: str, **kind: bool) -> None:
        estimators = self._features.estimators
        shared = {
            **self.reference.fields, **self._features.extractor.fields(rounds), "images": len(features.positions),
            "conditions": conditions,
        }  # fmt: skip
        found = set_figures.measure(features, self.reference, self.net, estimators, **kind)
        for name, (value, estimator) in found.items():
            settings = {key: estimator[key] for key in ("subset_size", "num_subsets", "neighbours") if key in estimator}
            self._report.add(name, of, value, {"features": self.net.name, **settings}, {**shared, **estimator})

"""Sets of images against a reference: their features, their figures, and the protocol of each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rq_jax.evaluation import set_figures
from rq_jax.evaluation.features import FeatureExtractor, Rebuild
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Estimators, Reference
from rq_jax.evaluation.store import FeatureSet
from rq_jax.pretrained import efficientnet_lite, inception
from rq_jax.settings.text import quoted

TRAINING = "training pictures"
HELD_OUT = "the held-out images"

_OF_REFERENCE = {name: f"reference {name}" for name in ("data", "split", "images", "ids")}


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
        mesh: jax.sharding.Mesh,
        data: EvaluationData,
        report: Report,
        sizes: Mapping[str, int] | None = None,
        *,
        has_reconstructions: bool = False,
    ):
        """As follows.

        Args:
          args: the flags of a command.
          mesh: of the devices that share a batch.
          data: whose held-out images are the reference.
          report: to add to.
          sizes: of the sets of samples, by name.
          has_reconstructions: of the held-out images.

        Raises:
          ValueError: sets that are too small for what is asked.
        """
        self._data, self._report = data, report
        extractor, sizes = open_extractor(args, mesh), sizes or {}
        self.net, self._protocol = extractor.net, extractor.protocol
        self._has_floor, use_manifold = not args.no_floor, bool(sizes) and not args.no_manifold
        held_out = data.held_out().num_examples
        floor = {"the training images": data.training().num_examples} if self._has_floor else {}
        sizes = {HELD_OUT: held_out, **floor, **{quoted(name): size for name, size in sizes.items()}}
        is_paired = has_reconstructions or self._has_floor and data.split == "train"
        subset_size = set_figures.choose_subset_size(args.subset_size, sizes, held_out if is_paired else None)
        report.told += set_figures.check_sizes(sizes, self.net, use_manifold)
        estimators = Estimators(subset_size, args.num_subsets, self._protocol.score_split, use_manifold)
        self._features = SetFeatures(extractor, data, estimators, cache_of(args))
        self._reference: Reference | None = None

    @property
    def reference(self) -> Reference:
        """The held-out images; their features are taken once they are asked for, and those of training images then."""
        if self._reference is None:
            split = self._data.split
            held_out = self._features.of_split("features of held-out images", split)
            fields = self._data.fields(split, held_out.positions)
            fields = {_OF_REFERENCE.get(name, name): value for name, value in fields.items()}
            self._reference = Reference(held_out.moments[0], held_out.vectors[0], fields)
            if self._has_floor:
                training = self._features.of_split("features of training images", "train")
                self._add(TRAINING, training, True, "those of the data", paired=split == "train")
        return self._reference

    def add_reconstructions(self, name: str, rebuild: Rebuild, rebuilt_by: Any) -> None:
        """Measures reconstructions of the held-out images.

        Args:
          name: of the tokenizer.
          rebuild: as `features.make_reconstruct` makes it.
          rebuilt_by: identity of the tokenizer and of what else decides the reconstructions, as JSON holds it.
        """
        _ = self.reference
        rounds, title = self._protocol.rounds_reconstructions, "features of reconstructions"
        found = self._features.of_split(title, self._data.split, rebuild, rounds, rebuilt_by)
        self._add(f"reconstructions by {name}", found, rounds, "reconstructions", rebuilt=True, paired=True)

    def add_samples(self, samples: ImageSet) -> None:
        """Measures a set of samples."""
        _ = self.reference
        rounds = samples.is_rounded or self._protocol.rounds_samples
        found = self._features.of_images("features of samples", samples, rounds)
        self._report.subjects[f"samples {samples.name}"] = samples.subject
        self._add(f"samples {samples.name}", found, rounds, samples.conditions_digest())

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

"""Features of splits, reconstructions and sets of images, which a cache on disk keeps for the next command."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rq_jax.data import fingerprint
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.features import FeatureExtractor, Rebuild
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.set_figures import Estimators
from rq_jax.evaluation.store import FeatureSet, Place


@dataclasses.dataclass(frozen=True)
class SetFeatures:
    """Takes features of whole sets; what an earlier command has done, or a killed one begun, is not done again.

    Attributes:
      extractor: of the features.
      data: its splits are measured; gives the batch size and the part of this process.
      estimators: their splits of the inception score.
      cache: directory on disk; None keeps the features in memory.
      has_logits: the inception score is wanted, of a network that has classes.
    """

    extractor: FeatureExtractor
    data: EvaluationData
    estimators: Estimators
    cache: Path | None = None
    has_logits: bool = True

    def of_split(
        self,
        title: str,
        split: str,
        rebuild: Rebuild | None = None,
        rounds: bool = False,
        rebuilt_by: Any = None,
        at_most: int | None = None,
    ) -> FeatureSet:
        """Features of the images of a split, or of their reconstructions.

        Args:
          title: of the progress bar.
          split: as `EvaluationData.open` takes it.
          rebuild, rounds: see `FeatureExtractor.measure`.
          rebuilt_by: identity of what rebuilds them, as JSON holds it.
          at_most: so many images, spread evenly over the split; None: all of them.
        """
        dataset = self.data.open(split).at_most(at_most)

        def open_batches(first: int) -> Iterable[Any]:
            batches = dataset.iterator()
            batches.set_state({"next_batch": first})
            return counted(batches, dataset.num_examples, self.data.batch_size, title, first)

        # Without its directory: a data set may be moved.
        key = {**self.data.transform_fields(split), **fingerprint.of_dataset(dataset), "rebuilt_by": rebuilt_by}
        if dataset.num_examples < dataset.split_size:
            key["images read"] = dataset.num_examples
        return self._extract(open_batches, dataset.num_examples, key, rounds, rebuild)

    def of_images(self, title: str, images: ImageSet, rounds: bool = False) -> FeatureSet:
        """Features of a set of images; see `of_split`."""
        size = self.data.batch_size

        def open_batches(first: int) -> Iterable[Any]:
            return counted(images.batches(size, self.data.part, first), images.num_images, size, title, first)

        return self._extract(open_batches, images.num_images, images.identity, rounds)

    def _extract(
        self, open_batches: Any, num_images: int, key: dict[str, Any] | None, rounds: bool, rebuild: Any = None
    ) -> FeatureSet:
        net, place = self.extractor.net, None
        if self.cache is not None and key is not None:
            place = Place(self.cache, {"images": key, **self.extractor.fields(rounds)})
        num_splits = self.estimators.num_splits(num_images) if self.has_logits and hasattr(net, "logits") else 0
        return self.extractor.extract(
            open_batches, rebuild, rounds, num_images=num_images, batch_size=self.data.batch_size, place=place,
            num_splits=num_splits, split_seed=self.estimators.split_seed,
        )  # fmt: skip

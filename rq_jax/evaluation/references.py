"""What sets of images are compared with: a split, statistics of an earlier command, or published ones."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_jax.evaluation import statistics
from rq_jax.evaluation.features import FeatureExtractor
from rq_jax.evaluation.image_sets import ImageSet, open_images
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Reference
from rq_jax.evaluation.stamps import Fields, differences
from rq_jax.evaluation.statistics import Moments
from rq_jax.evaluation.store import FeatureSet
from rq_jax.files import atomic_path, parse_json
from rq_jax.interop import state_file
from rq_jax.pretrained.files import digest
from rq_jax.settings.text import quoted

OF_REFERENCE = {name: f"reference {name}" for name in ("data", "split", "images", "ids")}
_OF_NETWORK = ("extractor", "extractor weights", "extractor resize", "resize before the extractor")


class FileReference(NamedTuple):
    """A reference in a file, opened.

    Attributes:
      path: of the file.
      given: its statistics; None of one that holds images.
      images: ADM's images; None of statistics.
      count: of its images; None where it does not say.
    """

    path: Path
    given: Reference | None
    images: ImageSet | None
    count: int | None

    @property
    def has_features(self) -> bool:
        """Whether it has more than statistics."""
        return self.given is None or self.given.vectors is not None

    def measured(self, features: SetFeatures) -> Reference:
        """The reference, with the features of its images where it holds some."""
        if self.given is not None:
            return self.given
        found = features.of_images("features of the reference", self.images, self.images.is_rounded)
        fields = {"reference data": self.path.name, "reference images": len(found.positions)}
        fields["reference ids"] = digest(self.path, "sha256", "name it again")[:16]
        return Reference(found.moments[0], found.vectors[0], fields)


def fields_of_split(fields: Fields) -> Fields:
    """The fields of a split, as those of a reference."""
    return {OF_REFERENCE.get(name, name): value for name, value in fields.items()}


def write(path: Path, features: FeatureSet, of_images: Fields, of_network: Fields) -> None:
    """Writes the statistics of a set and its features beside one another, and what they are of.

    `mu`, `sigma` and `count` are named as pytorch-fid and its users name them. The features stand in a file of their
    own, which is read a part at a time.

    Args:
      path: of the statistics, .npz.
      features: of the set.
      of_images, of_network: the fields in the protocol of a figure.
    """
    with atomic_path(_features_of(path)) as partial, open(partial, "wb") as file:
        np.save(file, features.vectors[0])
    told = json.dumps({"images": of_images, "network": of_network}).encode()
    moments: Moments = features.moments[0]
    with atomic_path(path) as partial, open(partial, "wb") as file:
        np.savez(
            file, mu=moments.mean, sigma=moments.covariance, count=np.int64(moments.count),
            protocol=np.frombuffer(told, np.uint8),
        )  # fmt: skip


def _features_of(path: Path) -> Path:
    return path.with_suffix(".features.npy")


def read(path: str, extractor: FeatureExtractor) -> FileReference:
    """Reads a reference: one of `write`, published statistics, or ADM's images.

    Args:
      path: .npz.
      extractor: whose features are compared with it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: neither statistics nor images, or of another network.
    """
    net, file = extractor.net, Path(path)
    try:
        found = statistics.read_statistics(path, net.num_features)
        state = state_file.read_state(path)
    except ValueError as error:
        raise ValueError(f"--reference: {error}") from None
    if found.statistics is None:
        images = open_images(path)
        return FileReference(file, None, images, images.num_images)
    count = found.statistics.count
    if "protocol" not in state:
        told = {"reference data": file.name, "reference images": count}
        told["reference ids"] = digest(file, "sha256", "name it again")[:16]
        return FileReference(file, Reference(found.statistics, None, told), None, count)
    told = parse_json(np.asarray(state["protocol"]).tobytes(), f"--reference: '{path}': its protocol")
    fields, of_network = told.get("images"), told.get("network")
    if not isinstance(fields, dict) or not isinstance(of_network, dict):
        raise ValueError(f"--reference: '{path}' has no protocol; make it again with evaluate.py reference")
    _check_network(path, of_network, extractor.fields(True))
    vectors = None
    if _features_of(file).is_file():
        vectors = np.load(_features_of(file), mmap_mode="r", allow_pickle=False)
        if vectors.shape != (count, net.num_features):
            raise ValueError(
                f"--reference: '{_features_of(file)}' has shape {vectors.shape}, not that of '{path}', "
                f"{(count, net.num_features)}; make both again"
            )
    return FileReference(file, Reference(found.statistics, vectors, fields), None, count)


def _check_network(path: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    both = ({name: fields.get(name) for name in _OF_NETWORK} for fields in (theirs, ours))
    if different := differences(*both):
        raise ValueError(f"--reference: {quoted(path)} is of another network: {', '.join(different)}; make it again")

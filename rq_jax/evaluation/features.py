"""Features of image sets under a frozen network, and the kernel distance between sets."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import metrics
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.grains import given_grains
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.pretrained.classifier import Classifier

MAX_SUBSET = 1000  # images behind one kernel distance
TRAINING = "training pictures"

Rebuild = Callable[[jax.Array], Sequence[jax.Array]]


class Features(NamedTuple):
    """Features of a set of images.

    Attributes:
      vectors: (N, A); of reconstructions (D, N, A), by code depth, or (1, N, A) from all codes.
      positions: (N,), of the images in their set.
    """

    vectors: np.ndarray
    positions: np.ndarray


class FeatureExtractor:
    """A feature network whose batches are spread over a mesh; `name` is the network's."""

    def __init__(self, net: Classifier, mesh: jax.sharding.Mesh):
        self.name = net.name
        self._mesh, everywhere = mesh, sharding.replicated(mesh)
        self._variables = jax.device_put(net.variables, everywhere)
        self._features = jax.jit(net.features, out_shardings=everywhere)
        self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere)  # from the devices of other processes, too

    def __call__(self, batches: Iterable[dict[str, np.ndarray]], rebuild: Rebuild | None = None) -> Features:
        """Features of the images that the masks count.

        Args:
          batches: "image" (B, H, W, C) in [-1, 1], "mask" (B,) and "index" (B,) int32, or of these this process's part.
          rebuild: images to D reconstructions (B, H, W, C), whose features are taken in place of the images'.
        """
        vectors, positions = [], []
        for batch in batches:
            placed = sharding.put_batch(self._mesh, {name: batch[name] for name in ("image", "mask", "index")})
            images = placed.pop("image")
            measured = [images] if rebuild is None else rebuild(images)
            by_depth = [self._features(self._variables, one) for one in measured]
            by_depth, mask, index = jax.device_get((by_depth, *self._gather((placed["mask"], placed["index"]))))
            vectors.append(by_depth[0][mask] if rebuild is None else np.stack(by_depth)[:, mask])
            positions.append(index[mask])
        return Features(np.concatenate(vectors, axis=-2), np.concatenate(positions))


def batches_of(images: np.ndarray, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
    """Images (N, H, W, C) in batches of one size, as a data set gives them: of each the part (index, count)."""
    (shard, count), last = part, len(images) - 1
    size = batch_size // count
    for start in range(shard * size, len(images) + shard * size, batch_size):
        index = np.arange(start, start + size, dtype=np.int32)
        yield {"image": images[np.minimum(index, last)], "mask": index <= last, "index": index}


def extract_all(
    extractor: FeatureExtractor,
    data: EvaluationData,
    samples: Mapping[str, np.ndarray],
    reconstruct: Mapping[str, Rebuild],
) -> tuple[Features, dict[str, Features]]:
    """Features of the held-out images, and of every set that is compared with them.

    Args:
      extractor: of the features.
      data: training and held-out images.
      samples: directory -> images (N, H, W, C).
      reconstruct: directory of a tokenizer -> images to reconstructions, see `make_reconstruct`.
    """

    def extract(title: str, batches: Iterable, count: int, **rebuild: Any) -> Features:
        return extractor(counted(batches, count, data.batch_size, title), **rebuild)

    def extract_split(title: str, dataset: Any, **rebuild: Any) -> Features:
        return extract(title, dataset.iterator(), dataset.num_examples, **rebuild)

    sets = {}
    for directory, images in samples.items():
        batches = batches_of(images, data.batch_size, data.part)
        sets[f"samples {directory}"] = extract("features of samples", batches, len(images))
    sets[TRAINING] = extract_split("features of training images", data.training())
    for directory, rebuild in reconstruct.items():
        found = extract_split("features of reconstructions", data.held_out(), rebuild=rebuild)
        sets[f"reconstructions by {directory}"] = found
    return extract_split("features of held-out images", data.held_out()), sets


def make_reconstruct(
    loaded: LoadedModel, mesh: jax.sharding.Mesh, by_depth: bool, thresholds: np.ndarray | None = None
) -> Rebuild:
    """Images (B, H, W, C) to reconstructions of that shape: one for each code depth, or only that from all codes.

    Thresholds give the grains, see `given_grains`; one program serves all of them.
    """
    placed = jax.device_put(loaded.variables, sharding.replicated(mesh))
    return functools.partial(_reconstruct, loaded.model, 0 if by_depth else -1, placed, thresholds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reconstruct(model: Any, first: int, variables: Any, thresholds: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    given = given_grains(model, images, thresholds)
    return tuple(model.apply(variables, images, **given, method="reconstruct_by_depth")[first:])


def kernel_distances(
    held_out: Features, sets: Mapping[str, Features], subset_size: int, num_subsets: int, split: str
) -> dict[str, dict[str, Any]]:
    """Kernel distance of each set to the held-out images: its mean and spread over subsets, one per code depth if any.

    Args:
      held_out: features of the held-out images.
      sets: as `extract_all` gives them.
      subset_size: images of either side.
      num_subsets: random subsets.
      split: of the held-out images.
    """

    def distance(vectors: np.ndarray, paired: bool) -> dict[str, Any]:
        if vectors.ndim == 3:
            by_depth = [distance(vectors_NA, paired) for vectors_NA in vectors]
            return {name: [one[name] for one in by_depth] for name in ("mean", "std")}
        values = metrics.kernel_distances(vectors, held_out.vectors, subset_size, num_subsets, paired=paired)
        return {"mean": float(values.mean()), "std": float(values.std())}

    def shows_held_out(name: str) -> bool:
        # The same image then never stands on both sides at once.
        return name.startswith("reconstructions ") or (name == TRAINING and split == "train")

    return {name: distance(features.vectors, shows_held_out(name)) for name, features in sets.items()}


def choose_subset_size(
    requested: int | None, data: EvaluationData, samples: Mapping[str, np.ndarray], has_tokenizers: bool
) -> int:
    """How many images of each set stand behind one kernel distance.

    Args:
      requested: None for half of the smallest set, at most `MAX_SUBSET`.
      data: training and held-out images.
      samples: directory -> images.
      has_tokenizers: whether reconstructions are compared with their originals.

    Raises:
      ValueError: more than the smallest set has, or than half of the images that are on both sides.
    """
    num_held_out = data.held_out().num_examples
    smallest = min(data.training().num_examples, num_held_out, *map(len, samples.values()))
    is_paired = has_tokenizers or data.split == "train"
    largest = min(smallest, num_held_out // 2) if is_paired else smallest
    subset_size = max(2, min(smallest // 2, MAX_SUBSET)) if requested is None else requested
    if not 2 <= subset_size <= largest:
        limit = "the size of the smallest set" if largest == smallest else "half of the images that are on both sides"
        raise ValueError(f"--subset_size: {subset_size} is outside 2..{largest}, {limit}")
    return subset_size

"""Features of image sets under a frozen network."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation import store
from rq_jax.evaluation.grains import given_grains
from rq_jax.evaluation.preparation import PROTOCOLS, Protocol
from rq_jax.evaluation.store import FeatureSet, Measured
from rq_jax.pretrained.classifier import Classifier

Rebuild = Callable[[jax.Array], Sequence[jax.Array]]


class FeatureExtractor:
    """A feature network whose batches are spread over a mesh, and the protocol by which it sees them.

    Attributes:
      net: a `pretrained.classifier.Classifier`, or its like.
      protocol: how images are prepared.
    """

    def __init__(self, net: Classifier, mesh: jax.sharding.Mesh, protocol: Protocol = PROTOCOLS["house"]):
        self.net, self.protocol = net, protocol
        self._mesh, everywhere = mesh, sharding.replicated(mesh)
        self._variables = jax.device_put(net.variables, everywhere)

        def features(variables, images, rounds):
            return net.features(variables, protocol.prepare(images, net.name, rounds))

        self._features = jax.jit(features, static_argnums=2, out_shardings=everywhere)
        self._logits = jax.jit(lambda variables, vectors: net.logits(variables, vectors), out_shardings=everywhere)
        self._gather = jax.jit(lambda tree: tree, out_shardings=everywhere)  # from the devices of other processes, too

    def extract(
        self,
        open_batches: Callable[[int], Iterable[dict[str, np.ndarray]]],
        rebuild: Rebuild | None = None,
        rounds: bool = False,
        **settings: Any,
    ) -> FeatureSet:
        """Features of a set, reduced as they come, in memory or on disk.

        Args:
          open_batches: number of a batch -> the batches from that one on, see `measure`.
          rebuild, rounds: see `measure`.
          **settings: of `store.extract`.
        """
        has_logits = bool(settings.get("num_splits"))
        measure = functools.partial(self.measure, rebuild=rebuild, rounds=rounds, has_logits=has_logits)
        return store.extract(measure, open_batches, **settings)

    def measure(
        self,
        batch: dict[str, np.ndarray],
        rebuild: Rebuild | None = None,
        rounds: bool = False,
        has_logits: bool = False,
    ) -> Measured:
        """Features of a batch, whole on every process; images stay on the devices that they were put on.

        Args:
          batch: "image" (B, H, W, C) in [-1, 1], "mask" (B,) and "index" (B,) int32, or of these this process's part.
          rebuild: images to D reconstructions (B, H, W, C), whose features are taken in place of the images'.
          rounds: to 8 bits first.
          has_logits: logits too.
        """
        placed = sharding.put_batch(self._mesh, {name: batch[name] for name in ("image", "mask", "index")})
        images = placed.pop("image")
        measured = [images] if rebuild is None else rebuild(images)
        vectors = [self._features(self._variables, one, rounds) for one in measured]
        logits = [self._logits(self._variables, one) for one in vectors] if has_logits else ()
        mask, positions = self._gather((placed["mask"], placed["index"]))
        return Measured(vectors, mask, positions, logits)

    def fields(self, rounds: bool) -> dict[str, Any]:
        """The fields of preparation and network in the protocol of a figure, see `Protocol.fields`."""
        return self.protocol.fields(self.net, rounds)


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

"""Classifiers whose features judge images: preprocessing, a network, a linear layer."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax.pretrained.files import UNVERIFIED, WeightFile
from rq_jax.pretrained.preprocess import as_rgb

_EXACT = jax.lax.Precision.HIGHEST

logger = logging.getLogger(__name__)


class Classifier(NamedTuple):
    """A classifier and its weights; A features, L classes.

    Attributes:
      name: of network and preprocessing, which belongs to every figure of these features.
      variables: {"params": of the network, "classifier": {"kernel": (A, L), "bias": (L,)}}. Pass them to a jitted
        function as an argument: constants are copied into the program.
      network: preprocessed images to features (B, A).
      preprocess: images (B, H, W, 3) in [-1, 1] to what the network takes.
      sha256: of the weight file.
      weights: what is published with that digest, or "unverified".
    """

    name: str
    variables: dict[str, Any]
    network: nn.Module
    preprocess: Callable[[jax.Array], jax.Array]
    sha256: str = ""
    weights: str = UNVERIFIED

    @property
    def num_features(self) -> int:
        return self.variables["classifier"]["kernel"].shape[0]

    def features(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Features of images of any size.

        Args:
          variables: those of this object, or a copy on the devices.
          images: (B, H, W, C), clipped to [-1, 1], C 1 or 3; a grey image counts as three equal channels.

        Returns:
          (B, A), float32, by products in float32 on every device.

        Raises:
          ValueError: another shape.
        """
        with jax.default_matmul_precision("highest"):
            return self.network.apply({"params": variables["params"]}, self.preprocess(as_rgb(images)))

    def logits(self, variables: dict[str, Any], features: jax.Array) -> jax.Array:
        """Logits (..., L) of the classes, from features (..., A)."""
        kernel, bias = variables["classifier"]["kernel"], variables["classifier"]["bias"]
        bias = bias.reshape((1,) * (features.ndim - 1) + (-1,))
        return jnp.dot(features, kernel, precision=_EXACT) + bias


def abstract_variables(network: nn.Module, size: int, num_classes: int) -> dict[str, Any]:
    """Shapes and dtypes of `Classifier.variables`, read from no file.

    Args:
      network: takes images (B, size, size, 3).
      size: of its images.
      num_classes: L.
    """
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    features, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    kernel, bias = (jax.ShapeDtypeStruct((*axes, num_classes), jnp.float32) for axes in (features.shape[1:], ()))
    return {"params": variables["params"], "classifier": {"kernel": kernel, "bias": bias}}


def read(
    file: WeightFile,
    name: str,
    network: nn.Module,
    preprocess: Callable[[jax.Array], jax.Array],
    shapes: dict[str, Any],
    names: Callable[[str], tuple[str, str]],
    linear: str,
    epsilon: float,
) -> Classifier:
    """A classifier from its file, with every batch normalisation folded into the convolution before it.

    Args:
      file: open.
      name, network, preprocess: of the classifier.
      shapes: from `abstract_variables`.
      names: from the name of a layer to those of convolution and normalisation in the file.
      linear: name of the last layer in the file.
      epsilon: of the normalisations.

    Raises:
      ValueError: an array is missing or has another shape.
    """
    params = {
        layer: file.folded_conv(*names(layer), shape["kernel"].shape, epsilon)
        for layer, shape in shapes["params"].items()
    }
    classifier = file.linear(linear, *shapes["classifier"]["kernel"].shape)
    logger.info("features: %s ('%s', %s)", name, file.path, file.published)
    variables = {"params": params, "classifier": classifier}
    return Classifier(name, variables, network, preprocess, file.sha256, file.published)

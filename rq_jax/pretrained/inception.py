"""Inception v3 of the FID (Szegedy et al., CVPR 2016; Heusel et al., NIPS 2017), in pytorch-fid's port of its weights.

TensorFlow's network of 2015-12-05, on which the published FID, rFID and IS are taken. Unlike in torchvision's, averages
in mixed blocks leave padding out, the last block takes a maximum in place of one, and there are 1008 classes.
"""

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.pretrained import classifier
from rq_jax.pretrained.classifier import Classifier
from rq_jax.pretrained.files import open_weights
from rq_jax.pretrained.preprocess import resize

SIZE, NUM_CLASSES = 299, 1008
_EPSILON = 1e-3  # of the batch normalisations
_CONTENT = "the FID Inception, such as pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "pt_inception-2015-12-05-6726825d.pth",
}

# Kernels.
_ONE, _THREE, _FIVE, _ROW, _COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


class InceptionV3(nn.Module):
    """Images (B, 299, 299, 3) in [-1, 1] to features (B, 2048); batch normalisation is folded into the weights.

    Layers have the names of the file.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _conv(x, "Conv2d_1a_3x3", 32, _THREE, 2)
        x = _conv(x, "Conv2d_2a_3x3", 32, _THREE, padded=False)
        x = _conv(x, "Conv2d_2b_3x3", 64, _THREE)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = _conv(x, "Conv2d_3b_1x1", 80, _ONE)
        x = _conv(x, "Conv2d_4a_3x3", 192, _THREE, padded=False)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _mixed_35(x, name, width)
        x = _shrink_35(x, "Mixed_6a")
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = _mixed_17(x, name, width)
        x = _shrink_17(x, "Mixed_7a")
        x = _mixed_8(x, "Mixed_7b", _average)
        x = _mixed_8(x, "Mixed_7c", _maximum)
        return x.mean((1, 2))


def _conv(
    x: jax.Array, name: str, width: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True
) -> jax.Array:
    """Convolution and ReLU; of stride 1 with padding that keeps the size, unless `padded` is False."""
    padding = [(side // 2, side // 2) if padded and stride == 1 else (0, 0) for side in kernel]
    return nn.relu(nn.Conv(width, kernel, stride, padding, name=name)(x))


def _chain(x: jax.Array, block: str, *layers: tuple[str, int, tuple[int, int]], stride: int = 1) -> jax.Array:
    """Convolutions one after the other; the last has the stride."""
    for i, (name, width, kernel) in enumerate(layers, start=1):
        x = _conv(x, f"{block}.{name}", width, kernel, stride if i == len(layers) else 1)
    return x


def _average(x: jax.Array) -> jax.Array:
    """Mean over the 3x3 pixels around each that lie inside the map.

    Their number is counted here: XLA takes minutes to count them in the program, over all of a batch.
    """
    counts = [3 - (np.arange(size) == 0) - (np.arange(size) == size - 1) for size in x.shape[1:3]]
    scale = (1 / np.outer(*counts)).astype(np.float32)[None, :, :, None]
    return nn.pooling.pool(x, 0.0, jax.lax.add, (3, 3), (1, 1), "SAME") * scale


def _maximum(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _mixed_35(x: jax.Array, name: str, pool_width: int) -> jax.Array:
    branches = [
        _chain(x, name, ("branch1x1", 64, _ONE)),
        _chain(x, name, ("branch5x5_1", 48, _ONE), ("branch5x5_2", 64, _FIVE)),
        _chain(x, name, ("branch3x3dbl_1", 64, _ONE), ("branch3x3dbl_2", 96, _THREE), ("branch3x3dbl_3", 96, _THREE)),
        _chain(_average(x), name, ("branch_pool", pool_width, _ONE)),
    ]
    return jnp.concatenate(branches, -1)


def _shrink_35(x: jax.Array, name: str) -> jax.Array:
    layers = ("branch3x3dbl_1", 64, _ONE), ("branch3x3dbl_2", 96, _THREE), ("branch3x3dbl_3", 96, _THREE)
    branches = [_chain(x, name, ("branch3x3", 384, _THREE), stride=2), _chain(x, name, *layers, stride=2)]
    return jnp.concatenate([*branches, nn.max_pool(x, (3, 3), (2, 2))], -1)


def _mixed_17(x: jax.Array, name: str, width: int) -> jax.Array:
    seven = ("branch7x7_1", width, _ONE), ("branch7x7_2", width, _ROW), ("branch7x7_3", 192, _COLUMN)
    kernels = (_ONE, _COLUMN, _ROW, _COLUMN, _ROW)
    double = [(f"branch7x7dbl_{i}", 192 if i == 5 else width, kernel) for i, kernel in enumerate(kernels, start=1)]
    branches = [
        _chain(x, name, ("branch1x1", 192, _ONE)),
        _chain(x, name, *seven),
        _chain(x, name, *double),
        _chain(_average(x), name, ("branch_pool", 192, _ONE)),
    ]
    return jnp.concatenate(branches, -1)


def _shrink_17(x: jax.Array, name: str) -> jax.Array:
    kernels = (_ONE, _ROW, _COLUMN, _THREE)
    seven = [(f"branch7x7x3_{i}", 192, kernel) for i, kernel in enumerate(kernels, start=1)]
    three = ("branch3x3_1", 192, _ONE), ("branch3x3_2", 320, _THREE)
    branches = [_chain(x, name, *three, stride=2), _chain(x, name, *seven, stride=2)]
    return jnp.concatenate([*branches, nn.max_pool(x, (3, 3), (2, 2))], -1)


def _mixed_8(x: jax.Array, name: str, pool: Any) -> jax.Array:
    def split(y: jax.Array, branch: str) -> list[jax.Array]:
        kernels = (("a", (1, 3)), ("b", (3, 1)))
        return [_chain(y, name, (f"{branch}{letter}", 384, kernel)) for letter, kernel in kernels]

    three = _chain(x, name, ("branch3x3_1", 384, _ONE))
    double = _chain(x, name, ("branch3x3dbl_1", 448, _ONE), ("branch3x3dbl_2", 384, _THREE))
    branches = [
        _chain(x, name, ("branch1x1", 320, _ONE)),
        *split(three, "branch3x3_2"),
        *split(double, "branch3x3dbl_3"),
        _chain(pool(x), name, ("branch_pool", 192, _ONE)),
    ]
    return jnp.concatenate(branches, -1)


def preprocess(images: jax.Array) -> jax.Array:
    """Images (B, H, W, 3) in [-1, 1] as the network sees them: 299x299, bilinear and not antialiased.

    As pytorch-fid:InceptionV3.forward, which shifts the range after the resize: the same but for rounding.
    """
    return resize(images, SIZE, SIZE, "bilinear", antialias=False)


def abstract_variables() -> dict[str, Any]:
    """Shapes and dtypes of the weights, read from no file."""
    return classifier.abstract_variables(InceptionV3(), SIZE, NUM_CLASSES)


def load(path: str | os.PathLike[str]) -> Classifier:
    """Load the weights.

    Args:
      path: a state dict with the names of pytorch-fid's; torch-fidelity's is the same file. A file with another digest
        is taken and called unverified.

    Returns:
      The network "inception_2015", with its weights as NumPy arrays, 95 MB. Of the published weights its features give
      FID and rFID, its logits, with their biases, IS.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, or of another network.
    """
    file = open_weights(path, _CONTENT, PUBLISHED)
    args = InceptionV3(), preprocess, abstract_variables(), lambda name: (f"{name}.conv", f"{name}.bn")
    return classifier.read(file, "inception_2015", *args, "fc", _EPSILON)

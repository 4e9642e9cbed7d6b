"""Inception and ResNet against their PyTorch originals, by committed outputs and, where these are installed, themselves."""

import re
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_extractor_goldens as maker

from rq_jax.pretrained import inception, resnet


class Case(NamedTuple):
    module: ModuleType
    name: str
    features_and_classes: tuple[int, int]
    num_layers: int
    file: str  # named where another is given
    first: str  # what that one lacks
    golden: dict[str, Any]
    net: Any
    outputs: Any


CASES = {
    "inception": (inception, "inception_2015", (2048, 1008), 94, "the FID Inception, such as pt_inception-2015-12-05-6726825d.pth", "'Conv2d_1a_3x3.conv.weight' is missing, expected is shape (32, 3, 3, 3)"),
    "resnet": (resnet, "resnet101", (2048, 1000), 104, "torchvision's ResNet-101, such as resnet101-63fe2227.pth", "'conv1.weight' has shape (64, 3, 3, 3), expected is shape (64, 3, 7, 7)"),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.npz"
    shapes, golden = maker.read(request.param)
    np.savez(path, **maker.draw_state(shapes))
    net = CASES[request.param][0].load(path)

    @jax.jit
    def run(variables, images):
        features = net.features(variables, images)
        return {"features": features, "logits": net.logits(variables, features)}

    return Case(*CASES[request.param], golden, net, lambda images: run(net.variables, images))


def assert_close(found, expected):
    """Within 1e-4 of the largest value."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=name)


def test_the_outputs_are_those_of_the_original(case):
    assert_close(case.outputs(maker.draw_image(*maker.IMAGE_SIZE)), case.golden)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(299, 299), (32, 32), (256, 224), (331, 500)])
def test_every_size_gives_the_outputs_of_the_original(case, size):
    pytest.importorskip("torch")
    pytest.importorskip("pytorch_fid")
    make, outputs = maker.ORIGINALS[case.module.__name__.rpartition(".")[2]]
    images = maker.draw_image(*size)
    assert_close(case.outputs(images), outputs(maker.load_random(make()), images))


def test_shapes_are_those_of_the_file(case):
    shapes = jax.tree.map(lambda x: x.shape, case.module.abstract_variables())
    assert jax.tree.map(lambda x: x.shape, case.net.variables) == shapes
    assert len(shapes["params"]) == case.num_layers
    assert case.net.name == case.name
    assert (case.net.num_features, *shapes["classifier"]["bias"]) == case.features_and_classes


def test_the_weights_say_whether_they_are_the_published_ones(case):
    assert case.net.weights == "unverified" and re.fullmatch("[0-9a-f]{64}", case.net.sha256)
    for sha256, name in case.module.PUBLISHED.items():
        assert name.endswith(f"-{sha256[:8]}.pth")  # as PyTorch names its files


def test_strict_promotion_is_enough(case):
    variables = case.module.abstract_variables()
    image = jax.ShapeDtypeStruct((2, 20, 24, 1), jnp.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        features = jax.eval_shape(case.net.features, variables, image)
        logits = jax.eval_shape(case.net.logits, variables, features)
    assert (features.shape[1], logits.shape[1]) == case.features_and_classes


def test_files_that_are_not_it_are_refused(case, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"none.pth' is no file; give a file of {case.file}")):
        case.module.load(tmp_path / "none.pth")
    np.savez(tmp_path / "other.npz", **{"conv1.weight": np.zeros((64, 3, 3, 3))})
    with pytest.raises(ValueError) as error:
        case.module.load(tmp_path / "other.npz")
    assert str(error.value).endswith(f"other.npz': {case.first}; give a file of {case.file}")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="damaged.pth': has no zip directory at its end; copy or download it again"):
        case.module.load(tmp_path / "damaged.pth")


def test_averages_leave_padding_out():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    expected = [[x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((0, 1)) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(inception._average(jnp.asarray(x))[0], expected, atol=1e-6)

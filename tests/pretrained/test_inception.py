"""rq_jax.pretrained.inception: against pytorch-fid's network, by its committed outputs and, where it is installed, itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import make_extractor_goldens as maker

from rq_jax.pretrained import inception


@pytest.fixture(scope="module")
def golden():
    return maker.read("inception")


@pytest.fixture(scope="module")
def net(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.npz"
    np.savez(path, **maker.draw_state(golden[0]))
    return inception.load(path)


@pytest.fixture(scope="module")
def outputs(net):
    """images -> features and logits."""

    @jax.jit
    def run(variables, images):
        features = net.features(variables, images)
        return {"features": features, "logits": net.logits(variables, features)}

    return lambda images: run(net.variables, images)


def assert_close(found, expected):
    """Within 1e-4 of the largest value."""
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=name)


def test_the_outputs_are_those_of_the_original(golden, outputs):
    assert_close(outputs(maker.draw_image(*maker.IMAGE_SIZE)), golden[1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(299, 299), (32, 32), (256, 256), (500, 331)])
def test_every_size_gives_the_outputs_of_the_original(outputs, size):
    pytest.importorskip("torch")
    pytest.importorskip("pytorch_fid")
    images = maker.draw_image(*size)
    assert_close(outputs(images), maker.inception_outputs(maker.load_random(maker.inception()), images))


def test_averages_leave_padding_out():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    expected = [[x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((0, 1)) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(inception._average(jnp.asarray(x))[0], expected, atol=1e-6)


def test_shapes_are_those_of_the_file(golden, net):
    shapes = jax.tree.map(lambda x: x.shape, inception.abstract_variables())
    assert jax.tree.map(lambda x: x.shape, net.variables) == shapes
    assert len(shapes["params"]) == 94
    folded = sum(int(np.prod(shape)) for name, shape in golden[0].items() if "running_" not in name and "bn.weight" not in name)  # fmt: skip
    assert sum(x.size for x in jax.tree.leaves(net.variables)) == folded
    assert net.name == "inception_2015" and net.num_features == 2048


def test_the_weights_say_whether_they_are_the_published_ones(net):
    assert net.weights == "unverified" and re.fullmatch("[0-9a-f]{64}", net.sha256)
    for sha256, name in inception.PUBLISHED.items():
        assert name.endswith(f"-{sha256[:8]}.pth") and len(sha256) == 64  # as PyTorch names its files


def test_grey_images_count_as_three_channels_and_values_are_clipped(net):
    variables = inception.abstract_variables()
    image = jax.ShapeDtypeStruct((2, 20, 24, 1), jnp.float32)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        features = jax.eval_shape(net.features, variables, image)
        assert features.shape == (2, 2048)
        assert jax.eval_shape(net.logits, variables, features).shape == (2, 1008)
    with pytest.raises(ValueError, match=re.escape("images: shape (1, 8, 8, 2) is not (B, H, W, C) with 1 or 3")):
        net.features(net.variables, jnp.zeros((1, 8, 8, 2)))


def test_files_that_are_not_it_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pth' is no file; give a file of the FID Inception, such as pt_"):
        inception.load(tmp_path / "none.pth")
    np.savez(tmp_path / "other.npz", **{"conv1.weight": np.zeros((64, 3, 7, 7))})
    with pytest.raises(ValueError) as error:
        inception.load(tmp_path / "other.npz")
    assert str(error.value).endswith(
        "other.npz': 'Conv2d_1a_3x3.conv.weight' is missing, expected is shape (32, 3, 3, 3); give a file of the FID "
        "Inception, such as pt_inception-2015-12-05-6726825d.pth"
    )
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="damaged.pth': has no zip directory at its end; copy or download it again"):
        inception.load(tmp_path / "damaged.pth")

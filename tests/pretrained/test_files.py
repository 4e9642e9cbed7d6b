"""rq_jax.pretrained.files: weight files that a user names."""

import hashlib

import numpy as np
import pytest

from rq_jax.pretrained import files


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"conv.weight": rng.normal(size=(5, 2, 1, 3)), "fc.weight": rng.normal(size=(4, 5)), "fc.bias": rng.normal(size=4)}  # fmt: skip
    arrays |= {f"bn.{name}": rng.uniform(1, 2, 5) for name in ("weight", "bias", "running_mean", "running_var")}
    np.savez(tmp_path / "w.npz", **arrays)
    return tmp_path / "w.npz"


def test_a_file_is_known_by_its_digest_or_its_published_beginning(path):
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for start in (sha256, sha256[:8]):
        file = files.open_weights(path, "a network", {"0" * 64: "another.pth", start: "it.pth"})
        assert (file.sha256, file.published) == (sha256, "it.pth")
    assert files.open_weights(path, "a network", {"0" * 64: "another.pth"}).published == "unverified"


def test_layers_are_read_in_the_order_of_flax(path):
    file, arrays = files.open_weights(path, "a network", {}), np.load(path)
    x = np.random.default_rng(1).normal(size=5)
    layer = file.linear("fc", 5, 4)
    np.testing.assert_allclose(x @ layer["kernel"] + layer["bias"], arrays["fc.weight"] @ x + arrays["fc.bias"], rtol=1e-5)  # fmt: skip
    conv, x = file.folded_conv("conv", "bn", (1, 3, 2, 5), 1e-3), np.random.default_rng(2).normal(size=(1, 3, 2))
    y = np.einsum("ocij,ijc->o", arrays["conv.weight"], x)
    y = (y - arrays["bn.running_mean"]) / np.sqrt(arrays["bn.running_var"] + 1e-3) * arrays["bn.weight"] + arrays["bn.bias"]  # fmt: skip
    np.testing.assert_allclose(np.einsum("ijc,ijco->o", x, conv["kernel"]) + conv["bias"], y, rtol=1e-5)
    assert conv["kernel"].dtype == np.float32


def test_arrays_that_are_not_there_are_refused(path):
    file = files.open_weights(path, "a network", {})
    with pytest.raises(
        ValueError, match=r"w.npz': 'fc.weight' has shape \(4, 5\), expected is shape \(4, 6\); give a f"
    ):
        file.linear("fc", 6, 4)

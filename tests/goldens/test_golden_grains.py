"""Packing, unpacking, entropies and routes against the original PyTorch code of DQ-VAE.

Entropies agree within 1e-5, everything discrete exactly.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import grains
from rq_jax.grains import GrainedCodes, GrainLayout, PackedCodes

CASES = [(f"{size}.{order}-first", order) for size in ("h4", "h16") for order in grains.ORDERS]


def read(directory, name):
    with np.load(directory / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def io(dq_goldens):
    return read(dq_goldens, "permuter.io")


@pytest.fixture(scope="module")
def entropy(dq_goldens):
    return read(dq_goldens, "dqvae-entropy.io")


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(request, dq_goldens, io):
    """(prefix, layout, codes)."""
    prefix, order = request.param
    config = json.loads((dq_goldens / "permuter.config.json").read_text())[prefix]
    u, K = config["coarse_hw"], config["content_pad_code"]
    layout = GrainLayout((u, u), 2, K, order=order)
    assert config["content_eos_code"] == layout.content_eos
    for g, name in enumerate(("coarse", "fine")):
        assert config[f"{name}_position_pad_code"] == layout.position_pad(g)
        assert config[f"{name}_position_eos_code"] == layout.position_eos(g)
    size = prefix.split(".")[0]
    return prefix, layout, GrainedCodes(int32(io[f"{size}.codes"])[..., None], int32(io[f"{size}.grain_map"]))


def int32(array):
    return jnp.asarray(array, jnp.int32)


def stream(io, prefix, names=("coarse", "fine")):
    """The blocks of the original one behind the other; it writes no sos here."""
    content, position = (
        np.concatenate([io[f"{prefix}.{n}_{kind}"] for n in names], 1) for kind in ("content", "position")
    )
    grain = np.concatenate([np.full(io[f"{prefix}.{n}_position"].shape, n == "fine") for n in names], 1)
    length_B = int32(np.full(len(position), position.shape[1]))
    return PackedCodes(int32(content)[..., None], int32(position), int32(grain), length_B)


def test_packing_one_image(io, case):
    prefix, layout, codes = case
    packed = jax.tree.map(np.asarray, grains.pack(codes, layout))
    for j in range(len(codes.codes)):
        expected = jax.tree.map(np.asarray, stream(io, f"{prefix}.single.{j}"))
        length = packed.length[j]
        is_sos = packed.content[j, :length, 0] == layout.content_sos
        assert is_sos.sum() == 2 and length == expected.length[0] + 2
        for kind in ("content", "position", "grain"):
            np.testing.assert_array_equal(getattr(packed, kind)[j, :length][~is_sos], getattr(expected, kind)[0], kind)


@pytest.mark.parametrize("kind", ["", ".early_eos", ".shuffled"])
def test_unpacking_blocks_padded_in_the_middle(io, case, kind):
    prefix, layout, codes = case
    if kind == ".early_eos":  # the coarse blocks are those of the whole batch
        io = {
            **io,
            **{f"{prefix}{kind}.coarse_{what}": io[f"{prefix}.coarse_{what}"] for what in ("content", "position")},
        }
    unpacked = grains.unpack(stream(io, prefix + kind), layout)
    expected = io[f"{prefix}{kind}.unpacked"]
    np.testing.assert_array_equal(unpacked.codes.codes[..., 0], expected)
    assert bool(unpacked.holes.any()) == (kind == ".early_eos")
    assert not expected[np.asarray(unpacked.holes)].any()
    if kind != ".early_eos":
        rows = slice(2, 3) if kind else slice(None)
        np.testing.assert_array_equal(unpacked.codes.grains, codes.grains[rows])


@pytest.mark.parametrize(("bins", "suffix"), [("full", ""), ("legacy", "_legacy01")])
def test_patch_entropies(entropy, bins, suffix):
    measure = jax.jit(lambda images: grains.patch_entropy(images, 16, bins))
    for images, expected in [
        (entropy["images"], entropy[f"patch_entropy{suffix}"]),
        (entropy["entropy_cases.images"], entropy[f"entropy_cases.entropy{suffix}"]),
    ]:
        actual = measure(np.moveaxis(images, 1, -1))
        np.testing.assert_allclose(actual, expected.reshape(actual.shape), rtol=0, atol=1e-5)


def test_routes(dq_goldens, entropy):
    config = json.loads((dq_goldens / "dqvae-entropy.config.json").read_text())
    scores = grains.patch_entropy(np.moveaxis(entropy["images"], 1, -1), 16)
    actual = grains.route_by_entropy(scores, jnp.array([config["golden"]["threshold_in_force"]]))
    np.testing.assert_array_equal(actual, entropy["grain_map"])


@pytest.mark.parametrize(("name", "num_grains"), [("dqvae-entropy", 2), ("dqvae-feature", 2), ("dqvae-triple", 3)])
def test_cell_weights(dq_goldens, name, num_grains):
    io = read(dq_goldens, f"{name}.io")
    weights = grains.cell_weights(int32(io["grain_map"]), num_grains)
    np.testing.assert_array_equal(weights, io["codebook_mask"].reshape(weights.shape))

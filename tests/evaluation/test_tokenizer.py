"""The measure of a tokenizer that training and evaluate.py share: figures by hand, masks, meshes."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import losses, metrics, models, quantize
from rq_jax.evaluation.tokenizer import make_measure, picture, rows_by_depth
from rq_jax.pretrained.vgg_lpips import Perceptual
from rq_jax.report import grids

PSNR, SSIM = jax.jit(metrics.psnr), jax.jit(metrics.ssim)
B, D, K = 8, helpers.CODE_SHAPE[-1], helpers.CODEBOOK_SIZE
MASK = np.arange(B) < 5


class Norms(Perceptual):
    """A perceptual distance that a test can foresee."""

    def distance(self, variables, images, other):
        return variables * jnp.abs(images - other).max((1, 2, 3))


PERCEPTUAL = Norms("norms", jnp.float32(3.0))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(model, variables)."""
    model = models.create(**helpers.vae_config(tmp_path_factory.mktemp("none")).model)
    return model, helpers.drawn_variables(model)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(-1, 1, (B, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def by_depth(tokenizer):
    """The measure of all figures by depth, over eight devices."""
    return make_measure(tokenizer[0], helpers.make_mesh(8), perceptual=PERCEPTUAL, by_depth=True, num_shown=3)


@pytest.fixture(scope="module")
def rebuilt(tokenizer, images):
    """(reconstructions by depth, reconstruction, codes)."""
    model, variables = tokenizer
    apply = jax.jit(functools.partial(model.apply, variables), static_argnames="method")
    full, codes = apply(images).reconstruction, apply(images, method="encode_to_codes")
    return apply(images, method="reconstruct_by_depth"), full, np.asarray(codes)


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_the_figures_of_training(tokenizer, images, rebuilt, kind):
    reconstructions, full, _ = rebuilt
    measure = make_measure(tokenizer[0], helpers.make_mesh(2, 2), reconstruction=kind, perceptual=PERCEPTUAL)
    sums, (shown, shown_by_depth) = measure(tokenizer[1], {"image": images, "mask": MASK})
    expected = {
        "psnr": PSNR(images, reconstructions)[:, MASK].sum(-1),
        "ssim": SSIM(images, full)[MASK].sum(),
        "distance/norms": PERCEPTUAL.distance(3.0, images, jnp.clip(full, -1, 1))[MASK].sum(),
        "validation_loss": sum(losses.reconstruction_loss(*pair, kind) for pair in zip(images[:5], full, strict=False)),
        "count": jnp.int32(5),
    }
    helpers.assert_close(sums, expected)
    np.testing.assert_array_equal(shown, images)  # all eight: twelve are not there
    helpers.assert_close(shown_by_depth, reconstructions)


def test_the_figures_by_depth(tokenizer, images, rebuilt, by_depth):
    (model, variables), (reconstructions, _, codes) = tokenizer, rebuilt
    latents = np.asarray(jax.jit(functools.partial(model.apply, method="encode"))(variables, images))
    latents = quantize.fold_patches(latents, model.code_shape[:2])
    sums, (shown, shown_by_depth) = by_depth(variables, {"image": images, "mask": MASK})
    vectors = jax.jit(functools.partial(model.apply, method="code_vectors"))(variables, codes)
    norms = jnp.linalg.norm(vectors, axis=-1)
    expected = {
        "psnr": PSNR(images, reconstructions),
        "ssim": SSIM(images, reconstructions),
        "distance/norms": jnp.stack([PERCEPTUAL.distance(3.0, images, jnp.clip(x, -1, 1)) for x in reconstructions]),
        "detail": metrics.laplacian_energy(reconstructions),
        "detail_of_originals": metrics.laplacian_energy(images),
        "code_norm": norms.mean((1, 2)).T,
        "commitment_loss": np.mean((latents[..., None, :] - np.cumsum(vectors, -2)) ** 2, (1, 2, 4)).T,
    }
    expected = {name: value[..., MASK].sum(-1) for name, value in expected.items()}
    counts = np.stack([np.bincount(codes[MASK][..., d].flatten(), minlength=K) for d in range(D)])
    helpers.assert_close(sums, expected | {"count": jnp.int32(5), "counts": counts.astype(np.float32)})
    assert shown.shape == (3, 16, 16, 3) and shown_by_depth.shape == (D, 3, 16, 16, 3)


def test_what_fills_a_batch_counts_for_nothing(tokenizer, images, by_depth):
    others = np.where(MASK[:, None, None, None], images, -images)
    sums, _ = by_depth(tokenizer[1], {"image": images, "mask": MASK})
    same, _ = by_depth(tokenizer[1], {"image": others, "mask": MASK})
    helpers.assert_equal(same, sums)
    more, _ = by_depth(tokenizer[1], {"image": images, "mask": np.ones(B, bool)})
    assert helpers.differs(more, sums)


def test_one_device_and_eight_measure_the_same(tokenizer, images, by_depth):
    batch = {"image": images, "mask": MASK}
    alone = make_measure(tokenizer[0], helpers.make_mesh(1), perceptual=PERCEPTUAL, by_depth=True, num_shown=3)
    helpers.assert_close(by_depth(tokenizer[1], batch), alone(tokenizer[1], batch))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(by_depth(tokenizer[1], batch)))


def test_rows_say_their_depth(images):
    rows = rows_by_depth((images, np.stack([images, -images])), [12.34, 20.0])
    assert list(rows) == ["original", "depth 1: 12.3 dB", "depth 2: 20.0 dB"]
    np.testing.assert_array_equal(rows["original"], rows["depth 1: 12.3 dB"])
    np.testing.assert_array_equal(rows["depth 2: 20.0 dB"], grids.to_uint8(-images))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_of_an_evaluation_has_a_row_of_grain_maps(channels):
    images = np.random.default_rng(2).uniform(-1, 1, (3, 16, 24, channels)).astype(np.float32)
    shown = images, np.stack([images, -images])
    plain = picture(shown, [12.34, 20.0], 1)
    grained = picture((*shown, np.zeros((3, 2, 3), np.int32)), [12.34, 20.0], 2)
    row = 6 * 16 + 4  # enlarged to 96 rows, with lines between
    assert plain.dtype == grained.dtype == np.uint8 and plain.shape[2] == grained.shape[2] == 3
    assert len(plain) == 3 * row and len(grained) == 4 * row
    blue = grained[row : 2 * row, -100:].astype(int)
    assert blue[..., 2].mean() > blue[..., 0].mean() + 20

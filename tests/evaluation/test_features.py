"""Features of image sets over a mesh: padding, reconstructions, positions."""

from typing import NamedTuple

import helpers
import numpy as np
import pytest

from rq_jax.evaluation.features import FeatureExtractor, batches_of, kernel_distances


class Flat(NamedTuple):
    """Features that a test can foresee: the pixels, scaled."""

    name: str = "flat"
    variables: float = 2.0

    def features(self, variables, images):
        return variables * images.reshape(len(images), -1)


IMAGES = np.random.default_rng(0).normal(size=(11, 2, 3, 1)).astype(np.float32)
VECTORS = 2 * IMAGES.reshape(11, -1)


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor(Flat(), helpers.make_mesh(4))


def test_what_fills_the_last_batch_is_left_out(extractor):
    batches = list(batches_of(IMAGES, 4))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4]
    vectors, positions = extractor(batches)
    np.testing.assert_allclose(vectors, VECTORS, rtol=1e-6)
    np.testing.assert_array_equal(positions, np.arange(11))


def test_parts_of_a_batch_are_those_of_the_processes():
    whole = list(batches_of(IMAGES, 4))
    parts = [list(batches_of(IMAGES, 4, (index, 2))) for index in (0, 1)]
    for batch, *of_each in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in of_each]), array)


def test_reconstructions_have_features_by_depth(extractor):
    vectors, _ = extractor(batches_of(IMAGES, 8), rebuild=lambda images: (-images, 3 * images))
    np.testing.assert_allclose(vectors, [-VECTORS, 3 * VECTORS], rtol=1e-6)


def test_damaged_images_keep_their_position_free(extractor):
    (batch,) = batches_of(IMAGES[:8], 8)
    batch["mask"] = np.arange(8) != 3
    vectors, positions = extractor([batch])
    np.testing.assert_array_equal(positions, [0, 1, 2, 4, 5, 6, 7])
    np.testing.assert_allclose(vectors, VECTORS[positions], rtol=1e-6)


def test_the_same_image_is_never_on_both_sides(extractor):
    """Reconstructions without an error have no distance once they are compared with other images."""
    held_out = extractor(batches_of(IMAGES, 4))
    again = extractor(batches_of(IMAGES, 4), rebuild=lambda images: (images,))
    names = {"reconstructions by x": again, "training pictures": held_out, "samples x": held_out}
    found = kernel_distances(held_out, names, 5, 50, split="validation")
    assert found["training pictures"] == found["samples x"] and found["training pictures"]["mean"] < 0
    paired = found["reconstructions by x"]
    assert len(paired["mean"]) == len(paired["std"]) == 1 and paired["mean"][0] > found["samples x"]["mean"]
    on_training = kernel_distances(held_out, names, 5, 50, split="train")
    assert on_training["training pictures"] == {name: values[0] for name, values in paired.items()}

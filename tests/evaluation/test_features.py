"""Features of image sets over a mesh: padding, reconstructions, positions, rounding."""

from typing import NamedTuple

import helpers
import numpy as np
import pytest

from rq_jax.evaluation.features import FeatureExtractor
from rq_jax.evaluation.image_sets import of_rows


class Flat(NamedTuple):
    """Features that a test can foresee: the pixels, scaled."""

    name: str = "flat"
    variables: float = 2.0

    def features(self, variables, images):
        return variables * images.reshape(len(images), -1)


IMAGES = np.random.default_rng(0).uniform(-1, 1, size=(11, 2, 3, 1)).astype(np.float32)
VECTORS = 2 * IMAGES.reshape(11, -1)
BATCHES = of_rows(11, lambda start, stop: IMAGES[start:stop])


def features_of(extractor, batches, **settings):
    found = extractor.extract(lambda first: batches, **settings)
    return found.vectors if "rebuild" in settings else found.vectors[0], found.positions


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor(Flat(), helpers.make_mesh(4))


def test_what_fills_the_last_batch_is_left_out(extractor):
    batches = list(BATCHES(4))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4]
    vectors, positions = features_of(extractor, batches)
    np.testing.assert_allclose(vectors, VECTORS, rtol=1e-6)
    np.testing.assert_array_equal(positions, np.arange(11))


def test_batches_go_on_where_they_are_asked_to():
    for first in range(4):
        whole, rest = list(BATCHES(4))[first:], list(BATCHES(4, first_batch=first))
        assert len(whole) == len(rest)
        for a, b in zip(whole, rest, strict=True):
            helpers.assert_equal(a, b)


def test_parts_of_a_batch_are_those_of_the_processes():
    whole = list(BATCHES(4))
    parts = [list(BATCHES(4, (index, 2))) for index in (0, 1)]
    for batch, *of_each in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in of_each]), array)


def test_reconstructions_have_features_by_depth_and_are_clipped(extractor):
    vectors, _ = features_of(extractor, BATCHES(8), rebuild=lambda images: (-images, 3 * images))
    np.testing.assert_allclose(vectors, [-VECTORS, np.clip(3 * VECTORS, -2, 2)], rtol=1e-6)


def test_images_are_rounded_where_that_is_asked_for(extractor):
    vectors, _ = features_of(extractor, BATCHES(8), rounds=True)
    levels = np.rint((VECTORS / 2 + 1) * 127.5)
    np.testing.assert_array_equal(vectors, 2 * (levels.astype(np.float32) / np.float32(127.5) - 1))
    assert not np.array_equal(vectors, VECTORS)


def test_damaged_images_keep_their_position_free(extractor):
    (batch,) = [batch for batch in BATCHES(8)][:1]
    batch["mask"] = np.arange(8) != 3
    vectors, positions = features_of(extractor, [batch])
    np.testing.assert_array_equal(positions, [0, 1, 2, 4, 5, 6, 7])
    np.testing.assert_allclose(vectors, VECTORS[positions], rtol=1e-6)

"""Counts and figures of grains, against loops."""

import numpy as np
import pytest

from rq_jax.evaluation.grains import count_grains, describe_grains

MAPS = np.random.default_rng(0).integers(0, 3, (5, 2, 3)).astype(np.int32)


@pytest.mark.parametrize("mask", [None, np.array([True, True, False, True, False])])
def test_figures_of_grains(mask):
    counted = MAPS if mask is None else MAPS[mask]
    counts = count_grains(MAPS, 3, mask)
    numbers = np.array([sum(4**g for g in one.ravel()) for one in counted])
    figures = describe_grains(counts)
    for g in range(3):
        np.testing.assert_allclose(figures.pop(f"grain_share/grain{g}"), np.mean(counted == g), rtol=1e-6)
    assert figures == pytest.approx(
        {
            "codes_per_image/mean": numbers.mean(),
            "codes_per_image/spread": numbers.std(),
            "codes_per_image/least": numbers.min(),
            "codes_per_image/most": numbers.max(),
        }
    )


def test_counts_of_batches_add_up_and_may_be_averaged():
    whole, parts = count_grains(MAPS, 3), [count_grains(MAPS[:2], 3), count_grains(MAPS[2:], 3)]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    assert describe_grains(mean) == pytest.approx(describe_grains(whole))


def test_images_of_the_fewest_and_of_the_most_codes():
    figures = describe_grains(count_grains(np.array([0, 2], np.int32)[:, None, None] * np.ones((1, 2, 3), np.int32), 3))
    assert (figures["codes_per_image/least"], figures["codes_per_image/most"]) == (6, 96)

"""Grain maps drawn over images: colours by grain, lines around cells, images of any size."""

import numpy as np
import pytest

from rq_jax.report.grain_maps import draw_grains, enlarge, pairs

GRAINS = np.array([[[0, 1, 2], [2, 0, 1]]])


@pytest.mark.parametrize(("channels", "scale"), [(1, 1), (3, 2)])
def test_each_grain_has_its_colour_and_its_cells(channels, scale):
    images = np.full((1, 32, 48, channels), 128, np.uint8)
    drawn = draw_grains(images, GRAINS, 3, scale)
    assert drawn.shape == (1, 32 * scale, 48 * scale, 3) and drawn.dtype == np.uint8
    side, colours = 16 * scale, {}
    for (i, j), g in np.ndenumerate(GRAINS[0]):
        region, cell = drawn[0, i * side : (i + 1) * side, j * side : (j + 1) * side].astype(int), side >> g
        inside = np.ones((side, side), bool)
        inside[::cell] = inside[:, ::cell] = False
        (colour,) = np.unique(region[inside], axis=0)
        (line,) = np.unique(region[~inside], axis=0)
        assert np.abs(line - 128).sum() > np.abs(colour - 128).sum() > 20
        colours.setdefault(g, colour)
        np.testing.assert_array_equal(colour, colours[g])
    assert colours[0].argmax() == 2 and colours[1].argmax() == 1 and colours[2].argmax() == 0  # blue, green, orange


@pytest.mark.parametrize("num_grains", [2, 3, 5])
def test_images_stay_visible_whatever_the_grains(num_grains):
    rng = np.random.default_rng(0)
    images = rng.choice(np.float32([-1, 1]), (2, 32, 64, 3))
    drawn = draw_grains(images, rng.integers(0, num_grains, (2, 2, 4)), num_grains)
    bright, dark = drawn[(images == 1).all(-1)], drawn[(images == -1).all(-1)]
    assert bright.mean() - dark.mean() > 60


def test_enlarging_repeats_pixels():
    images = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(enlarge(images, 2)[0, ..., 0], np.kron(images[0, ..., 0], np.ones((2, 2))))


def test_codes_of_several_a_position_are_told_as_such():
    images = np.zeros((1, 8, 12, 3), np.uint8)
    assert pairs(images, ["a cat"], GRAINS, 3)[1] == ["a cat", "42 codes"]
    assert pairs(images, ["a cat"], GRAINS, 3, depth=2)[1] == ["a cat", "42 x 2 codes"]

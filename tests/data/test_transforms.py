"""Image transforms: geometry, ranges, and the published models' filter and rounding."""

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image  # noqa: E402

from rq_jax.data.transforms import DETERMINISTIC, TRANSFORMS, ImageTransform  # noqa: E402

RANDOM = sorted(set(TRANSFORMS) - set(DETERMINISTIC))


def coordinates(height, width):
    """A picture that shows where each pixel came from: row in channel 0, column in channel 1."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def triangle_weights(length, new_length):
    """Antialiased bilinear resampling of one axis as a matrix, from the definition."""
    scale = length / new_length
    support = max(scale, 1.0)
    centers = (np.arange(new_length) + 0.5) * scale
    distance = np.abs(np.arange(length)[None] + 0.5 - centers[:, None]) / support
    weights = np.maximum(1.0 - distance, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def as_levels(image):
    return np.rint((image + 1.0) * 127.5).astype(int)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("shape", [(20, 31, 3), (31, 20, 1), (9, 7, 3)])
@pytest.mark.parametrize("size", [(16, 16), (10, 15)])
def test_shape_dtype_and_range(name, shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for seed in range(5):
        image = ImageTransform(name, size, 0.5)(pixels, np.random.default_rng(seed))
        assert image.shape == (*size, shape[-1]) and image.dtype == np.float32
        assert image.min() >= -1.0 and image.max() <= 1.0


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_black_and_white_are_the_ends_of_the_range(name):
    for level, value in ((0, -1.0), (255, 1.0)):
        pixels = np.full((13, 17, 3), level, np.uint8)
        np.testing.assert_array_equal(ImageTransform(name, (8, 8))(pixels, np.random.default_rng(0)), value)


@pytest.mark.parametrize("shape, size", [((24, 36), (9, 14)), ((12, 10), (17, 23))])
def test_resize_is_antialiased_bilinear(shape, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.einsum(
        "yh,hwc,xw->yxc",
        triangle_weights(shape[0], size[0]),
        pixels.astype(float),
        triangle_weights(shape[1], size[1]),
    )
    found = as_levels(ImageTransform("squash", size)(pixels))
    assert np.abs(found - expected).max() <= 1.5  # two 8-bit roundings


def test_center_crop_takes_the_middle():
    image = as_levels(ImageTransform("resize_center_crop", (10, 10))(coordinates(10, 25)))
    # Half a pixel rounds to even, as torchvision does: (25 - 10) / 2 = 7.5 -> 8.
    np.testing.assert_array_equal(image[..., :2], coordinates(10, 25)[:, 8:18, :2])


def test_resize_keeps_the_aspect_and_rounds_the_long_side_down():
    sizes = []

    class Spy:
        width, height, size = 15, 10, (15, 10)

        def resize(self, size, _):
            sizes.append(size)
            return Image.new("RGB", size)

    TRANSFORMS["resize_center_crop"](Spy(), (7, 7))
    assert sizes == [(10, 7)]  # 7 * 15 / 10 = 10.5


@pytest.mark.parametrize("name", RANDOM)
def test_random_transforms_follow_their_generator(name):
    pixels = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    transform = ImageTransform(name, (16, 16), 0.5)
    first = [transform(pixels, np.random.default_rng(seed)) for seed in range(12)]
    again = [transform(pixels, np.random.default_rng(seed)) for seed in range(12)]
    np.testing.assert_array_equal(first, again)
    assert len({image.tobytes() for image in first}) > 4


def test_random_crop_reaches_every_offset_and_only_those():
    transform = ImageTransform("resize_random_crop", (10, 10))
    rng = np.random.default_rng(3)
    crops = [as_levels(transform(coordinates(10, 13), rng)) for _ in range(100)]
    assert {int(crop[0, 0, 1]) for crop in crops} == {0, 1, 2, 3}
    assert all((np.diff(crop[..., 1], axis=1) == 1).all() for crop in crops)


def test_random_shift_moves_by_a_sixteenth_and_repeats_the_border():
    transform = ImageTransform("random_shift", (32, 48))
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(300):
        levels = as_levels(transform(coordinates(32, 48), rng))
        top, left = int(levels[16, 24, 0]) - 16, int(levels[16, 24, 1]) - 24
        rows, columns = np.mgrid[:32, :48]
        np.testing.assert_array_equal(levels[..., 0], np.clip(rows + top, 0, 31))
        np.testing.assert_array_equal(levels[..., 1], np.clip(columns + left, 0, 47))
        seen.add((top, left))
    assert seen == {(top, left) for top in range(-2, 3) for left in range(-3, 4)}


def test_random_resized_crop_covers_three_quarters_to_all_of_the_area():
    transform = ImageTransform("random_resized_crop", (200, 200))
    rng = np.random.default_rng(4)
    spans = []
    for _ in range(60):
        image = as_levels(transform(coordinates(200, 200), rng))
        spans.append([np.ptp(image[..., axis]) + 1 for axis in (0, 1)])
    spans = np.array(spans)
    assert (np.abs(spans[:, 0] - spans[:, 1]) <= 1).all()  # ratio 1
    assert 0.75**0.5 * 200 - 2 <= spans.min() < 180 and 193 < spans.max() <= 200


def test_random_resized_crop_of_a_strip_falls_back_to_the_middle():
    image = as_levels(ImageTransform("random_resized_crop", (20, 20))(coordinates(20, 100), np.random.default_rng(0)))
    np.testing.assert_array_equal(image[..., :2], coordinates(20, 100)[:, 40:60, :2])


def test_jittered_crop_stays_near_the_middle():
    # No enlargement is possible, so only the first crop moves: offsets in [3/8, 5/8) of the slack of 80.
    transform = ImageTransform("jittered_crop", (16, 16))
    rng = np.random.default_rng(5)
    lefts = {int(as_levels(transform(coordinates(16, 96), rng))[0, 0, 1]) for _ in range(300)}
    assert lefts == set(range(30, 50))


def test_jittered_crop_zooms_by_up_to_an_eighth():
    transform = ImageTransform("jittered_crop", (64, 64))
    rng = np.random.default_rng(6)
    spans = [np.ptp(as_levels(transform(coordinates(144, 144), rng))[..., 0]) for _ in range(60)]
    assert 144 * 64 / 72 - 4 <= min(spans) < 132 and 139 < max(spans) <= 143


def test_squash_ignores_the_aspect():
    image = as_levels(ImageTransform("squash", (8, 8))(coordinates(80, 160)))
    assert image[-1, 0, 0] > 70 and image[0, -1, 1] > 140


@pytest.mark.parametrize("probability, expected", [(0.0, 0), (1.0, 40), (0.5, 20)])
def test_flip_probability(probability, expected):
    pixels = coordinates(8, 8)
    transform = ImageTransform("resize_center_crop", (8, 8), probability)
    rng = np.random.default_rng(7)
    flipped = sum(int(as_levels(transform(pixels, rng))[0, 0, 1] == 7) for _ in range(40))
    assert abs(flipped - expected) <= (0 if probability in (0.0, 1.0) else 9)


def test_evaluation_never_flips():
    image = ImageTransform("resize_center_crop", (8, 8), 1.0)(coordinates(8, 8))
    np.testing.assert_array_equal(as_levels(image)[..., :2], coordinates(8, 8)[..., :2])


STRIPS = [(1, 20_000), (20_000, 1), (3, 9_000), (9_000, 3)]


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("size", [(32, 32), (10, 15), (4, 90)])
@pytest.mark.fault("images of one by thousands of pixels", "cut before they are enlarged")
def test_a_strip_costs_no_more_than_the_result(name, size, monkeypatch):
    resized = []

    def resize(image, new_size, *args):
        resized.append(new_size[0] * new_size[1])
        return original(image, new_size, *args)

    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", resize)
    for shape in STRIPS:
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        assert ImageTransform(name, size)(pixels, np.random.default_rng(1)).shape == (*size, 3)
    assert max(resized) <= 2 * 16 * size[0] * size[1]


def test_of_a_strip_evaluation_reads_the_middle_and_training_any_place():
    columns = np.repeat(np.arange(4000, dtype=np.float32)[None] * 255 / 3999, 2, axis=0)
    strip = np.rint(columns).astype(np.uint8)[..., None]
    middle = as_levels(ImageTransform("resize_center_crop", (8, 8))(strip))
    assert np.abs(middle - 127.5).max() <= 1
    rng = np.random.default_rng(2)
    levels = [as_levels(ImageTransform("resize_random_crop", (8, 8))(strip, rng)).mean() for _ in range(60)]
    assert min(levels) < 40 and max(levels) > 215


def test_up_to_sixteen_times_as_long_nothing_is_cut():
    pixels = np.random.default_rng(3).integers(0, 256, (5, 80, 3), dtype=np.uint8)
    rng = np.random.default_rng(4)
    top, left = 0, int((rng.integers(1), rng.integers(160 - 10 + 1))[1])
    whole = np.asarray(Image.fromarray(pixels).resize((160, 10), Image.Resampling.BILINEAR))
    found = as_levels(ImageTransform("resize_random_crop", (10, 10))(pixels, np.random.default_rng(4)))
    np.testing.assert_array_equal(found, whole[top : top + 10, left : left + 10])

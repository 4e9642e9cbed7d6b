"""Splits from arrays: what a batch holds, order, flips, resume, shards, errors."""

import itertools

import numpy as np
import pytest

pytest.importorskip("grain")

from rq_jax.data import Splits, from_arrays  # noqa: E402
from rq_jax.data.transforms import scale  # noqa: E402

H, W = 5, 3


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, H, W, 3), dtype=np.uint8)


def make(count=11, **settings):
    settings = {"cond": np.arange(count), "validation_cond": np.arange(7), "batch_size": 4, **settings}
    return from_arrays(images(count), images(7, 1), **settings)


def take(dataset, count):
    return list(itertools.islice(dataset.iterator(), count))


def assert_equal_batches(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_batches():
    splits = make()
    batch = next(splits.train.iterator())
    assert {key: (array.shape, array.dtype.name) for key, array in batch.items()} == {
        "image": ((4, H, W, 3), "float32"),
        "index": ((4,), "int32"),
        "cond": ((4, 1), "int32"),
    }
    for batch in take(splits.train, 6):
        np.testing.assert_allclose(batch["image"], images(11)[batch["index"]] / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(batch["cond"][:, 0], batch["index"])
    assert [dataset.train for dataset in splits] == [True, False, False]
    assert [dataset.num_examples for dataset in splits] == [11, 7, 11]
    for dataset, seed in ((splits.validation, 1), (splits.ordered, 0)):
        batches = list(dataset.iterator())
        mask = np.concatenate([batch["mask"] for batch in batches])
        joined = np.concatenate([batch["image"] for batch in batches])[mask]
        np.testing.assert_allclose(joined, images(dataset.num_examples, seed) / 127.5 - 1, atol=1e-6)


def test_every_epoch_shows_each_image_once_in_another_order():
    batches = take(make(batch_size=1).train, 22)
    epochs = np.array([int(batch["index"][0]) for batch in batches]).reshape(2, 11)
    assert (np.sort(epochs) == np.arange(11)).all() and (epochs[0] != epochs[1]).any()
    other = [int(batch["index"][0]) for batch in take(make(batch_size=1, seed=1).train, 11)]
    assert (epochs[0] != other).any()


@pytest.mark.parametrize(
    "cond, attributes",
    [
        (None, (None, None, None)),
        (np.array([0, 3, 1, 1]), (4, None, None)),
        (np.array([[0], [3], [1], [1]], np.uint8), (4, None, None)),
        (np.arange(8).reshape(4, 2), (None, 8, 2)),
    ],
)
def test_conditions(cond, attributes):
    splits = from_arrays(images(4), images(4), cond, cond, batch_size=2)
    for dataset in splits:
        assert (dataset.num_classes, dataset.vocab_size, dataset.text_length) == attributes
    batch = splits.ordered.examples([1, 2])
    if cond is None:
        assert "cond" not in batch
    else:
        np.testing.assert_array_equal(batch["cond"], cond.reshape(4, -1)[1:3])
        assert batch["cond"].dtype == np.int32


def test_classes_are_those_of_both_splits():
    splits = from_arrays(images(4), images(2), np.array([0, 1, 1, 0]), np.array([0, 2]), batch_size=2)
    assert splits.train.class_names == splits.validation.class_names == ("0", "1", "2")


def test_floating_point_images_stay_as_they_are():
    given = (images(4) / 255 * 2 - 1).astype(np.float16)
    batch = from_arrays(given, given, batch_size=2).ordered.examples([0, 3])
    np.testing.assert_array_equal(batch["image"], given[[0, 3]].astype(np.float32))


def test_flips_are_drawn_in_training_alone():
    mirrored = []
    splits = make(flip_probability=0.5)
    for batch in take(splits.train, 12):
        plain = splits.ordered.examples(batch["index"])["image"]
        same, flipped = ((batch["image"] == x).all((1, 2, 3)) for x in (plain, plain[:, :, ::-1]))
        assert (same ^ flipped).all()
        mirrored += flipped.tolist()
    assert 0 < sum(mirrored) < len(mirrored)


def test_interrupted_equals_uninterrupted():
    expected = take(make(flip_probability=0.5).train, 9)
    first = make(flip_probability=0.5).train.iterator()
    next(first), next(first)
    resumed = make(flip_probability=0.5).train.iterator()
    resumed.set_state(first.get_state())
    assert_equal_batches(itertools.islice(resumed, 7), expected[2:])
    first.close()
    resumed.close()


def test_shards_together_are_the_whole_batch():
    whole = take(make().train, 3)
    parts = [take(make(shard_index=i, shard_count=2).train, 3) for i in range(2)]
    joined = [{key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]} for step in range(3)]
    assert_equal_batches(joined, whole)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": images(4)[0]}, r"images: shape \(5, 3, 3\) is not \(N,H,W,C\)"),
        ({"images": images(0)}, r"images: shape \(0, 5, 3, 3\) is not .* with at least one image"),
        ({"images": images(4).astype(np.int64)}, "images: dtype int64 is neither uint8 nor floating-point"),
        ({"validation_images": images(4) / 255 * 3}, r"validation_images: values 0.* to .* are not in \[-1, 1\]"),
        ({"images": np.full((4, H, W, 3), np.nan)}, "images: values nan to nan are not in"),
        (
            {"validation_images": images(4)[:, :4]},
            r"validation_images: \(4, 3, 3\) an image, but images has \(5, 3, 3\)",
        ),
        ({"cond": np.arange(3)}, r"cond: shape \(3,\) does not fit 4 images; give \(4,\) or \(4, U\)"),
        ({"cond": np.zeros((4, 1, 1), int)}, r"cond: shape \(4, 1, 1\) does not fit 4 images"),
        ({"cond": np.zeros(4)}, "cond: dtype float64 is not an integer"),
        ({"cond": np.arange(4) - 1}, r"cond: ids -1 to 2 are not in \[0, 2\*\*31\)"),
        ({"validation_cond": None}, "validation_cond: missing; give conditions for both splits or for none"),
        ({"validation_cond": np.zeros((4, 2), int)}, "validation_cond: 2 ids an image, but cond has 1"),
        ({"flip_probability": 1.5}, r"flip_probability.*1.5.*\[0, 1\]"),
        ({"batch_size": 0}, "batch_size.* positive multiple"),
    ],
)
def test_errors(arguments, message):
    given = dict(images=images(4), validation_images=images(4), cond=np.arange(4), validation_cond=np.arange(4))
    with pytest.raises(ValueError, match=message) as error:
        from_arrays(**{**given, "batch_size": 2, **arguments})
    assert "\n" not in str(error.value)


def test_bytes_stay_where_they_are_asked_for():
    pixels = images(6)
    splits = from_arrays(pixels, pixels, batch_size=6, flip_probability=0.5)
    for split, floats in zip(splits.as_bytes(), splits, strict=True):
        batch, wanted = next(split.iterator()), next(floats.iterator())
        assert batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(scale(batch["image"]), wanted["image"])
        np.testing.assert_array_equal(split.examples([1])["image"], pixels[1:2])
    given = from_arrays((pixels / 127.5 - 1), (pixels / 127.5 - 1), batch_size=6).as_bytes()
    assert next(given.train.iterator())["image"].dtype == np.float32
    assert Splits(None, None, None).as_bytes() == (None, None, None)  # data sets of other makes

"""Sets of images: folders, samples with their conditions, arrays in files; what is refused."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from rq_jax.evaluation.image_sets import ImageSet, check_shapes, in_memory, of_rows, open_images
from rq_jax.report import grids

SETTINGS = {"first_index": 0, "num_images": 3, "batch_size": 3, "out": "a", "top_p": 0.9, "transformer": "x"}
RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (5, 4, 6, 3), np.uint8)


def all_of(images):
    return images.first(images.num_images)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "^--samples: '.*' holds 2 images of an earlier run; draw into an empty --out$"),
        ([{"first_index": 3, "num_images": 1}], "^--samples: '.*' holds 1 images of an earlier run; draw"),
        (
            [{"first_index": 3, "top_p": 0.5, "transformer": "y"}],
            "^--samples: '.*' holds images of several 'top_p, transformer'; draw",
        ),
        ([{"first_index": 3, "num_images": 2, "batch_size": 8, "out": "b"}], None),  # two hosts, one set
        ([{"first_index": 3, "num_images": 1, "chosen": {"drawn": 2}}], None),  # of ids 3 and 4 the best
        (
            [{"first_index": 3, "num_images": 1, "chosen": [2]}],
            "^--samples: '.*' holds 1 images of an earlier run; draw",
        ),
    ],
)
def test_samples_of_several_settings_are_refused(tmp_path, others, message):
    for i in range(5):
        grids.save_png(tmp_path / "images" / f"{i:06d}.png", np.zeros((8, 8, 3), np.uint8))
    for one in [SETTINGS, *({**SETTINGS, **other} for other in others)]:
        (tmp_path / f"settings_{one['first_index']:06d}.json").write_text(json.dumps(one))
    if message is None:
        found = open_images(tmp_path)
        assert (found.num_images, found.shape) == (5, (8, 8, 3)) and found.is_rounded
        assert found.subject == {"top_p": 0.9, "transformer": "x"} and found.conditions_digest() == "unknown"
        return
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


def test_samples_are_read_as_data_sets_are(tmp_path):
    """One decoder and one rule of what is an image: transparency on white, grey beside colours, no leftovers."""
    images = tmp_path / "images"
    grids.save_png(images / "0.png", np.full((4, 5, 3), 51, np.uint8))
    grids.save_png(images / "1.png", np.full((4, 5, 1), 102, np.uint8))
    Image.fromarray(np.zeros((4, 5, 4), np.uint8)).save(images / "2.png")
    Image.fromarray(np.full((4, 5), 153 << 8, np.uint16)).save(images / "3.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.full((5, 4, 3), 204, np.uint8)).save(images / "4.png", exif=turned)
    (images / "5.png.part").write_bytes(b"no image")
    (images / "._0.png").write_bytes(b"no image")
    grids.save_png(images / ".ipynb_checkpoints" / "0.png", np.zeros((9, 9, 3), np.uint8))
    os.mkfifo(images / "6.png")
    found = all_of(open_images(tmp_path))
    expected = np.reshape(np.array([51, 102, 255, 153, 204], np.uint8), (5, 1, 1, 1))
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (5, 4, 5, 3)))
    (images / "7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="7.png' is no readable image"):
        open_images(tmp_path)


def test_the_identity_of_files_changes_with_them(tmp_path):
    grids.save_png(tmp_path / "a" / "0.png", BYTES[0])
    before = open_images(tmp_path / "a").identity
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_images(tmp_path / "b").identity == before
    grids.save_png(tmp_path / "b" / "0.png", BYTES[1])
    assert open_images(tmp_path / "b").identity != before


def test_what_is_drawn_is_kept():
    """It is read from the start once, in batches of one size, whatever is asked for, and no farther than is asked."""
    calls, drawn = [], []

    def batches(batch_size, part=(0, 1), first_batch=0):
        calls.append((batch_size, first_batch))
        for batch in of_rows(5, lambda start, stop: BYTES[start:stop])(batch_size, part, first_batch):
            drawn.append(len(batch["image"]))
            yield batch

    kept = in_memory(ImageSet("drawn", (4, 6, 3), 5, batches, prompts=list("abcde")), 3)
    assert calls == [] and kept.prompts == list("abcde")
    np.testing.assert_array_equal(kept.first(2, 3), BYTES[:2])
    assert drawn == [3]
    np.testing.assert_array_equal(all_of(kept), BYTES)
    assert drawn == [3, 3]
    np.testing.assert_array_equal(kept.examples([4, 1])["image"], BYTES[[4, 1]])
    np.testing.assert_array_equal(next(iter(kept.batches(2, (0, 1), 1)))["image"], BYTES[2:4])
    assert calls == [(3, 0)]


def test_grey_samples_stay_grey(tmp_path):
    grids.save_png(tmp_path / "0.png", np.full((4, 5, 1), 102, np.uint8))
    assert open_images(tmp_path).shape == all_of(open_images(tmp_path)).shape[1:] == (4, 5, 1)


def test_samples_of_several_sizes_are_refused(tmp_path):
    for side in (8, 16):
        grids.save_png(tmp_path / f"{side}" / "0.png", np.zeros((side, side, 3), np.uint8))
    message = r"^--samples: '.*' holds images of several shapes \[\(8, 8, 3\), \(16, 16, 3\)\]; give one size$"
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)
    both = [open_images(tmp_path / name) for name in ("8", "16")]
    with pytest.raises(ValueError, match=r"^--samples: images of several shapes: .*8' \(8, 8, 3\), .*; compare one "):
        check_shapes(both)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "settings_0.json' holds a list, not a dict"),
        ("[" * 100_000, "settings_0.json' is not readable JSON: it is nested too deeply"),
        ({"num_images": "3"}, "settings_0.json': num_images is '3', not a number of images"),
        ({"first_index": 2**70}, "settings_0.json': first_index is "),
        ({"first_index": None}, "settings_0.json': first_index is 'None', not a number of images"),
    ],
)
def test_settings_of_another_shape_are_named(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps({**SETTINGS, **content})
    (tmp_path / "settings_0.json").write_text(text)
    with pytest.raises(ValueError) as error:
        open_images(tmp_path)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("count", [10**9, 2**62])
def test_a_number_of_images_costs_nothing(tmp_path, count):
    (tmp_path / "settings_0.json").write_text(json.dumps({**SETTINGS, "num_images": count}))
    for name in ("000001", "\u00b2", "9" * 99):  # of which the last two number no image
        grids.save_png(tmp_path / "images" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    assert open_images(tmp_path).num_images == 3


def test_conditions_are_those_of_the_codes_files(tmp_path):
    """By image id, whatever the order; a digest does not depend on it."""
    digests = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        root = tmp_path / str(order[0])
        for i, image in enumerate(BYTES):
            grids.save_png(root / "images" / f"{i:06d}.png", image)
        for part in (order[:2], order[2:]):
            cond = 10 * np.array(part, np.int32)[:, None]
            np.savez(root / f"codes_{part[0]:06d}.npz", codes=np.zeros((len(part), 1, 1, 1)), image_ids=part, cond=cond)
        found = open_images(root)
        np.testing.assert_array_equal(found.conditions, 10 * np.arange(5)[:, None])
        digests.append(found.conditions_digest())
    assert digests[0] == digests[1] and len(digests[0]) == 16
    grids.save_png(root / "images" / "more.png", BYTES[0])
    assert open_images(root).conditions_digest() == "unknown"


def test_prompts_are_those_of_the_codes_file(tmp_path):
    for i, image in enumerate(BYTES[:2]):
        grids.save_png(tmp_path / "images" / f"{i:06d}.png", image)
    np.savez(tmp_path / "codes_000000.npz", image_ids=[1, 0], cond=[[3, 1], [2, 0]], prompts=["a", "b"])
    found = open_images(tmp_path)
    assert found.prompts == ["b", "a"]
    np.testing.assert_array_equal(found.conditions, [[2, 0], [3, 1]])


# --- arrays ---


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_bytes(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=BYTES, arr_1=np.arange(5))
    found = open_images(tmp_path / "a.npz")
    assert (found.num_images, found.shape, found.is_rounded) == (5, (4, 6, 3), True)
    np.testing.assert_array_equal(all_of(found), BYTES)
    last = list(found.batches(2))[-1]
    np.testing.assert_array_equal(last["image"][last["mask"]], BYTES[4:])
    np.testing.assert_array_equal(found.conditions[:, 0], np.arange(5))
    fortran = tmp_path / "b.npz"
    save(fortran, images=np.asfortranarray(BYTES))
    np.testing.assert_array_equal(all_of(open_images(fortran)), BYTES)


@pytest.mark.parametrize(("low", "scaled"), [(-0.5, lambda x: x), (0.0, lambda x: 2 * x - 1)])
def test_the_range_of_floats_is_seen(tmp_path, low, scaled):
    images = RNG.uniform(low, 1, (5, 4, 6, 1)).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=images)
    found = open_images(tmp_path / "a.npz")
    assert not found.is_rounded
    np.testing.assert_allclose(all_of(found), scaled(images), rtol=1e-6)


class Harmful:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": 255.0 * BYTES},
            r"^--samples: '.*': floats in \[0, 65025\] are neither in .*; save bytes as uint8$",
        ),
        (
            {"images": np.full((2, 4, 4, 3), -2.0)},
            r"floats in \[-2, -2\] are neither in \[-1, 1\] nor in \[0, 1\]; scale",
        ),
        ({"images": np.full((2, 4, 4, 3), np.nan)}, r"floats in \[nan, nan\] are neither"),
        ({"images": BYTES.astype(np.int64)}, "images of int64 are no images; give uint8 or floats$"),
        ({"images": BYTES[0]}, r"images of shape \(4, 6, 3\) are no images \(N, H, W, 1 or 3\)$"),
        ({"images": BYTES[:0]}, r"images of shape \(0, 4, 6, 3\) are no images"),
        ({"codes": BYTES}, "holds no images; give an .npz with arr_0 or images$"),
        ({"images": BYTES, "labels": np.arange(4)}, r"labels of shape \(4,\) for 5 images; give one each$"),
        ({"images": np.array([Harmful()])}, "of type '|O'"),
    ],
)
def test_other_arrays_are_refused(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "a.npz")
    assert capsys.readouterr().out == ""

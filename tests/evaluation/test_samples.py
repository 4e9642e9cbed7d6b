"""Samples read back from a directory; codes by way of the script, in test_sample.py."""

import io
import json
import os
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rq_jax.evaluation import conditions, samples
from rq_jax.report import grids

SETTINGS = {"first_index": 0, "num_images": 3, "batch_size": 3, "out": "a", "top_p": 0.9, "transformer": "x"}


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
        assert samples.read_images(tmp_path).shape == (5, 8, 8, 3)
        return
    with pytest.raises(ValueError, match=message):
        samples.read_images(tmp_path)


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
    found = samples.read_images(tmp_path)
    assert found.shape == (5, 4, 5, 3)
    levels = np.rint((found + 1) * 127.5)
    np.testing.assert_array_equal(
        levels, np.broadcast_to(np.reshape([51, 102, 255, 153, 204], (5, 1, 1, 1)), found.shape)
    )
    (images / "7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="7.png' is no readable image"):
        samples.read_images(tmp_path)


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
        samples.read_images(tmp_path)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("count", [10**9, 2**62])
def test_a_number_of_images_costs_nothing(tmp_path, count):
    (tmp_path / "settings_0.json").write_text(json.dumps({**SETTINGS, "num_images": count}))
    for name in ("000001", "\u00b2", "9" * 99):  # of which the last two number no image
        grids.save_png(tmp_path / "images" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    assert samples.read_images(tmp_path).shape == (3, 8, 8, 3)


def codes(**arrays):
    return {"codes": np.zeros((3, 2, 2, 1), np.int32), **arrays}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            codes(image_ids=np.zeros(0, np.int64)),
            r"image_ids \(0,\) int64 is not \(n\) integers for n = 3 images; give",
        ),
        (codes(image_ids=np.array("a")), r"image_ids \(\) <U1 is not \(n\) integers"),
        (codes(image_ids=np.arange(3.0)), r"image_ids \(3,\) float64 is not \(n\) integers"),
        (codes(cond=np.zeros((2, 1), int)), r"cond \(2, 1\) int64 is not \(n, \.\.\.\) integers for n = 3"),
        (codes(codes=np.zeros((3, 2, 2, 1))), r"codes \(3, 2, 2, 1\) float64 is not \(n, \.\.\.\) integers"),
        (codes(codes=np.zeros((0, 2, 2, 1), int)), r"codes of shape \(0, 2, 2, 1\) are not \(n, h, w, D\)"),
        (codes(grains=np.zeros((3, 2), int)), r"grains \(3, 2\) int64 is not \(n, \.\.\.\) integers"),
        (codes(codes=np.array([None])), "cannot be read"),
    ],
)
def test_codes_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "codes.npz", **arrays)
    with pytest.raises(ValueError, match=f"^--prefix: .*{message}"):
        samples.read_draws(tmp_path / "codes.npz")


def test_codes_start_with_the_first_image(tmp_path):
    first = np.arange(3, dtype=np.int32)[:, None, None, None]
    np.savez(tmp_path / "codes.npz", codes=first, image_ids=np.arange(3) + 4, cond=first[:, 0, 0])
    draws = samples.read_draws(tmp_path / "codes.npz")
    assert draws.codes[4 % 3].item() == draws.conds[4 % 3].item() == 0


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_codes_that_inflate_are_refused_before(tmp_path):
    with zipfile.ZipFile(tmp_path / "codes.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("codes.npy", npy(np.zeros((10**5, 2, 2, 1), np.int32)))
    with pytest.raises(ValueError, match="^--prefix: .* inflates to more than 100 times its size; give the codes"):
        samples.read_draws(tmp_path / "codes.npz")


def test_encrypted_and_damaged_codes_are_refused(tmp_path):
    path = tmp_path / "codes.npz"
    np.savez(path, **codes())
    whole = path.read_bytes()
    flagged = bytearray(whole)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        flagged[whole.index(signature) + offset] |= 1  # encrypted, says the header
    longer = whole.replace(b"(3, 2, 2, 1)", b"(3, 2, 2, 9)")
    for content in (bytes(flagged), longer):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^--prefix: .* cannot be read"):
            samples.read_draws(path)


@pytest.mark.parametrize("config", [{"class_names": ["a"]}, {"class_counts": [1, 2, 3, 4]}, {"class_names": ["a"] * 4}])
def test_classes_of_another_number_than_the_models_are_refused(config):
    (entry,) = config
    model = SimpleNamespace(is_conditional=True, cond_length=1, cond_vocab_size=3)
    with pytest.raises(
        ValueError, match=f"^'run/config.json': {len(config[entry])} {entry} for a model of 3 classes; "
    ):
        conditions.choose_conditions(SimpleNamespace(model=model, config=config), "run", 5)

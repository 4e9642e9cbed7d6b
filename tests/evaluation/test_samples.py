"""Samples read back from a directory; codes by way of the script, in test_sample.py."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from rq_jax.evaluation import samples
from rq_jax.report import grids

SETTINGS = {"first_index": 0, "num_images": 3, "batch_size": 3, "out": "a", "top_p": 0.9, "transformer": "x"}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "^--samples: '.*' holds 2 images of an earlier run; draw into an empty --out$"),
        ([{"first_index": 3, "num_images": 1}], "^--samples: '.*' holds 1 images of an earlier run; draw"),
        (
            [{"first_index": 3, "top_p": 0.5, "transformer": "y"}],
            "^--samples: '.*' holds images of several top_p, transformer; draw",
        ),
        ([{"first_index": 3, "num_images": 2, "batch_size": 8, "out": "b"}], None),  # two hosts, one set
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

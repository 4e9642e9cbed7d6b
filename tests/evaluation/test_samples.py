"""Samples read back from a directory; codes by way of the script, in test_sample.py."""

import json

import numpy as np
import pytest

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

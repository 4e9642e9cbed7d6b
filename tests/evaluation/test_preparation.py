"""Named protocols: what a network sees of images, and the fields that say so."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rq_jax.evaluation.preparation import OWN_RESIZE, PROTOCOLS

IMAGES = np.random.default_rng(0).uniform(-1.1, 1.1, (2, 400, 360, 3)).astype(np.float32)
NET = SimpleNamespace(name="inception_2015", sha256="0123456789abcdef0123")


def test_every_protocol_has_a_source_and_is_told_apart_by_its_fields():
    rounding = {True: [], False: []}
    for protocol in PROTOCOLS.values():
        assert protocol.source and protocol.reference in ("train", "validation")
        for rounds, found in rounding.items():
            found.append(protocol.fields(NET, rounds))
    for rounds, word in ((True, "to 8 bits"), (False, "none")):
        assert {fields["rounding"] for fields in rounding[rounds]} == {word}
    clean = PROTOCOLS["clean"].fields(NET, True)
    assert clean["resize before the extractor"] == "bicubic, antialiased, to 299x299"
    assert clean["extractor weights"] == NET.sha256[:16]
    assert clean["extractor resize"] == "bilinear, not antialiased, to 299x299"
    assert {name for name in clean if clean[name] != PROTOCOLS["adm"].fields(NET, True)[name]} == {
        "resize before the extractor"
    }


@pytest.mark.parametrize("name", PROTOCOLS)
def test_images_are_clipped_and_rounded(name):
    protocol = PROTOCOLS[name]
    small = IMAGES[:, :5, :7]
    clipped = np.clip(small, -1, 1)
    np.testing.assert_array_equal(protocol.prepare(jnp.asarray(small), "another network", False), clipped)
    levels = np.asarray(protocol.prepare(jnp.asarray(small), "another network", True) + 1) * 127.5
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    np.testing.assert_allclose(levels, (clipped + 1) * 127.5, atol=0.501)


def test_the_clean_resize_is_pillows():
    """In floats, channel by channel, as clean-fid resizes."""
    side, _ = OWN_RESIZE["inception_2015"]
    found = np.asarray(PROTOCOLS["clean"].prepare(jnp.asarray(IMAGES), "inception_2015", False))
    assert found.shape == (2, side, side, 3)
    channel = Image.fromarray(np.clip(IMAGES[0, :, :, 1], -1, 1), mode="F")
    expected = np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(found[0, :, :, 1], expected, atol=1e-4)
    plain = PROTOCOLS["rq"].prepare(jnp.asarray(IMAGES), "inception_2015", False)
    assert plain.shape == IMAGES.shape  # left to the network

"""Images of codes as bytes, and the settings of a draw."""

import re
from types import SimpleNamespace

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.sampling import images

MODEL = SimpleNamespace(code_shape=(2, 4, 3), use_null_cond=True)


class Decoder(nn.Module):
    """A tokenizer whose images are its codes, in tenths."""

    dtype: str = "float32"

    def decode_codes(self, codes):
        return jnp.where(codes == 99, jnp.nan, codes / 10)


def test_images_are_clipped_and_never_wrap_around():
    codes = jnp.array([-30, -11, -10, 0, 10, 11, 30, 99], jnp.int32)
    found = images.decode(Decoder(), {}, codes)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, [0, 0, 0, 128, 255, 255, 255, 0])


def test_flags_go_before_what_the_checkpoint_recorded():
    recorded = {"temperature": [0.5, 0.6, 0.7], "top_k": None, "top_p": 0.9, "guidance": 2.0}
    given = {"temperature": None, "top_k": 4, "top_p": None, "guidance": 1.5}
    found = images.draw_settings(MODEL, recorded, given)
    assert found == {"temperature": [0.5, 0.6, 0.7], "top_k": 4, "top_p": 0.9, "guidance": 1.5}


@pytest.mark.parametrize(
    "recorded, given, message",
    [
        ({}, {"temperature": [0.5, 0.6]}, "--temperature: [0.5, 0.6] has 2 entries for code depth 3; give one per depth"),
        ({"top_p": (0.5, 0.6)}, {}, "sample.top_p: (0.5, 0.6) has 2 entries for code depth 3"),
        ({"top_k": 3}, {"top_k": 0}, "--top_k: 0 must be at least 1"),
        ({"top_p": 1.5}, {"top_p": None}, "sample.top_p: 1.5 is outside [0, 1]"),
        ({}, {"guidance": float("nan")}, "--guidance: nan must be a finite number"),
        ({"nonsense": 1}, {}, "sample: the key: 'nonsense' is unknown; allowed are 'temperature', "),
    ],
)  # fmt: skip
def test_settings_are_refused_by_the_name_that_the_user_knows(recorded, given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        images.draw_settings(MODEL, recorded, given)

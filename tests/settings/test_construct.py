"""Constructors called with a config section."""

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from rq_jax.settings.construct import construct


def build(
    *, width: int, depth: int = 2, rate: float | None = None, sizes: int | tuple[int, ...] = 1, what: Any = None, total
):
    return width, depth, rate, sizes, what, total


def test_a_constructor_is_called_with_its_section():
    assert construct(build, "net", {"width": 3}, total=9) == (3, 2, None, 1, None, 9)
    assert construct(build, "net", {"width": 3, "total": "9"}) == (3, 2, None, 1, None, "9")
    config = ConfigDict({"width": 3, "rate": 1, "sizes": [4, 5], "what": [6]})
    assert construct(build, "net", config, total=9) == (3, 2, 1, (4, 5), [6], 9)
    assert construct(build, "net", {"width": np.int64(3), "rate": np.float32(0.5)}, total=9)[2] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 3, "wdith": 4}, "net.wdith: unknown; allowed are depth, rate, sizes, what, width"),
        ({"width": 3, "total": 4}, "net.total: unknown; allowed are depth, rate, sizes, what, width"),  # the caller's
        ({}, "net.width: unset and without a default; set it"),
        ({"width": None}, "net.width: unset and without a default; set it"),
        ({"width": "3"}, "net.width: '3' is not of type int"),
        ({"width": True}, "net.width: True is not of type int"),
        ({"width": 3.0}, "net.width: 3.0 is not of type int"),
        ({"width": 3, "depth": None}, "net.depth: None is not of type int"),
        ({"width": 3, "rate": "fast"}, "net.rate: 'fast' is not of type float | None"),
        ({"width": 3, "sizes": 4.5}, "net.sizes: 4.5 is not of type int | tuple[int, ...]"),
        ({"width": 3, "sizes": [4, "5"]}, "net.sizes: [4, '5'] is not of type int | tuple[int, ...]"),
        ({"width": 3, "sizes": {"a": 1}}, "net.sizes: {'a': 1} is not of type int | tuple[int, ...]"),
    ],
)
def test_a_section_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError) as error:
        construct(build, "net", settings, total=9)
    assert str(error.value) == message


def test_positional_parameters_are_not_settings():
    def named(section="optim", /, *, rate: float = 1.0):
        return section, rate

    assert construct(named, "other", {"rate": 2.0}) == ("optim", 2.0)
    with pytest.raises(ValueError, match="^other.section: unknown; allowed are rate$"):
        construct(named, "other", {"section": "x"})

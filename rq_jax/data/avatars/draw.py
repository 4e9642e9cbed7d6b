"""Which avatar an image of a split is, decided by hashes alone, and its drawing.

No generator of random numbers takes part, so that every image can be made by itself, in any order, on any machine.
"""

import functools
import hashlib
import importlib.resources
import itertools
import json
from typing import NamedTuple

from rq_jax.data.avatars.styles import STYLES

SEED = "avatars"
HELD_OUT = 10  # of the combinations of two crossed attributes, every so manieth is held out
VALIDATION = 20  # of all other avatars, every so manieth is a validation image


class Avatar(NamedTuple):
    """An image to draw: a style of `STYLES`, its attributes, and the seed of what they leave open."""

    style: str
    attributes: dict[str, str]
    seed: str


def number(*words: object) -> int:
    """A number below 2**64 that the words decide, evenly spread."""
    digest = hashlib.sha256("/".join(str(word) for word in (SEED, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def pick(options, *words: object):
    """The option that the words decide."""
    options = tuple(options)
    return options[number(*words) % len(options)]


@functools.cache
def held_out(style: str) -> frozenset[tuple[str, str, str, str]]:
    """The combinations that no training image of a style shows, as (attribute, value, other attribute, its value).

    Of each pair of crossed attributes they are the tenth of all combinations whose hash is smallest.
    """
    found = []
    for first, second in STYLES[style].crossed:
        values = itertools.product(STYLES[style].attributes[first], STYLES[style].attributes[second])
        ranked = sorted(((first, x, second, y) for x, y in values), key=lambda pair: number("held out", style, *pair))
        found += ranked[: max(1, len(ranked) // HELD_OUT)]
    return frozenset(found)


def split_of(style: str, attributes: dict[str, str]) -> str:
    """The split that an avatar belongs to: "unseen" with a combination that is held out, else by its hash."""
    pairs = ((a, attributes[a], b, attributes[b]) for a, b in STYLES[style].crossed)
    if any(pair in held_out(style) for pair in pairs):
        return "unseen"
    return "train" if number("split", style, *attributes.values()) % VALIDATION else "validation"


def choose(split: str, index: int) -> Avatar:
    """The avatar of an image: attributes drawn evenly until they belong to the split.

    Args:
      split: "train", "validation" or "unseen".
      index: of the image in it.

    Returns:
      The avatar. No other split has one of its style with the same attributes.
    """
    style = pick(STYLES, split, index, "style")
    tries = (
        {name: pick(options, split, index, attempt, name) for name, options in STYLES[style].attributes.items()}
        for attempt in itertools.count()
    )
    attributes = next(found for found in tries if split_of(style, found) == split)
    return Avatar(style, attributes, f"{split}/{index}")


def settings_of(avatar: Avatar) -> dict[str, object]:
    """The settings of the drawing package for an avatar."""
    style = STYLES[avatar.style]
    settings: dict[str, object] = {"seed": avatar.seed, **style.fixed}
    for name, value in avatar.attributes.items():
        settings |= style.attributes[name][value].drawn
    return settings


def definition(style: str) -> dict:
    """A style as the package has it: its components, colours, author and licence."""
    return json.loads((importlib.resources.files("dicebear_styles") / f"{style}.json").read_text(encoding="utf-8"))


@functools.cache
def _drawer(style: str):
    from dicebear import Style

    return Style(definition(style))  # checks the definition, for seconds


def render(avatar: Avatar, size: int) -> bytes:
    """Draw an avatar.

    Args:
      avatar: to be drawn.
      size: side in pixels.

    Returns:
      PNG, opaque RGBA, whose bytes depend on the versions of the drawing packages alone.
    """
    import dicebear
    import resvg_py

    svg = dicebear.Avatar(_drawer(avatar.style), settings_of(avatar)).to_string()
    return bytes(resvg_py.svg_to_bytes(svg, width=size, height=size, skip_system_fonts=True))

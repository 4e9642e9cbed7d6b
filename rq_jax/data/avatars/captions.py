"""Captions in plain English, made from the attributes of an avatar, with several wordings and orders."""

import re
import string
from collections.abc import Mapping

from rq_jax.data.avatars.draw import Avatar, number, pick
from rq_jax.data.avatars.styles import STYLES, Option

_LAYOUTS = (
    "{subject} with {details} {setting}",
    "{subject} {setting}, with {details}",
    "{setting}, {subject} with {details}",
    "{subject}, {listed}, {setting}",
)
_LEFT_OUT = 6  # every so manieth detail or setting is not named


def caption(avatar: Avatar) -> tuple[str, list[str]]:
    """Describe an avatar.

    Args:
      avatar: to be described; its seed decides the wording.

    Returns:
      The caption, which names only what is drawn, and the sorted names of the attributes that it names.
    """
    style, seed, named = STYLES[avatar.style], avatar.seed, set()

    def say(wordings, *words: object) -> str:
        text, names = _fill(pick(wordings, seed, *words), style.attributes, avatar.attributes)
        named.update(names if text else ())
        return text

    def is_named(*words: object) -> bool:
        return number(seed, "named", *words) % _LEFT_OUT > 0

    subject = say(style.subjects, "subject")
    order = sorted(range(len(style.details)), key=lambda i: number(seed, "order", i))
    details = [say(style.details[i], "detail", i) for i in order if is_named(i)]
    setting = say(style.settings, "setting") if is_named("setting") else ""
    text = _join(pick(_LAYOUTS, seed, "layout"), subject, [detail for detail in details if detail], setting)
    return text, sorted(named)


def _join(layout: str, subject: str, details: list[str], setting: str) -> str:
    if not details:
        layout = "{subject} {setting}"
    *most, last = details or [""]
    parts = {
        "subject": subject,
        "details": f"{', '.join(most)} and {last}" if most else last,
        "listed": ", ".join(details),
        "setting": setting,
    }
    text = layout.format(**parts)
    text = re.sub(r",? *,", ",", re.sub(r" +", " ", text)).strip(" ,")
    return re.sub(r"\ba (?=[aeiou](?!ne\b))", "an ", text)


def _fill(
    wording: str, table: Mapping[str, Mapping[str, Option]], attributes: Mapping[str, str]
) -> tuple[str, set[str]]:
    """A wording with the phrases of its attributes, and their names; "" where an attribute has no phrase."""
    names = {name for _, name, _, _ in string.Formatter().parse(wording) if name}
    phrases = {}
    for name in tuple(names):
        phrase = table[name][attributes[name]].phrase
        if not phrase:
            return "", set()
        phrases[name], inner = _fill(phrase, table, attributes)
        names |= inner
    return wording.format(**phrases), names

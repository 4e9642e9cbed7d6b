"""References from one place of a config to another, as OmegaConf writes them: ${a.b}, ${a.0}, ${a[0]}, ${.beside}."""

import re
from typing import Any

from rq_jax.interop.state_file.files import Invalid
from rq_jax.settings.text import quoted

_MAX_OPEN = 100
_MISSING: Any = object()
_REFERENCE = re.compile(r"\$\{(\.*)([\w\-]+(?:\.[\w\-]+|\[\d+\])*)\}")


def interpolate(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the value that it refers to in place of each reference; values are shared, and not copied.

    What is no reference, leads nowhere, or is a part of a longer text, stays text.

    Raises:
      Invalid: references in a circle.
    """
    return _Resolver(config).resolve((), config)


class _Resolver:
    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._done: dict[tuple[Any, ...], Any] = {}  # by place
        self._open: set[tuple[Any, ...]] = set()

    def resolve(self, place: tuple[Any, ...], value: Any) -> Any:
        """A value that stands at a place, without references in it."""
        if not isinstance(value, dict | list | str):
            return value
        if place in self._done:
            return self._done[place]
        if place in self._open or len(self._open) > _MAX_OPEN:
            where = quoted(".".join(map(str, place)))
            raise Invalid(f"holds references in a circle, or in a long chain, through {where}; write one of them out")
        self._open.add(place)
        if isinstance(value, dict):
            result: Any = {key: self.resolve((*place, key), child) for key, child in value.items()}
        elif isinstance(value, list):
            result = [self.resolve((*place, str(i)), child) for i, child in enumerate(value)]
        else:
            result = self._follow(place, value)
        self._open.remove(place)
        self._done[place] = result
        return result

    def _follow(self, place: tuple[Any, ...], text: str) -> Any:
        match = _REFERENCE.fullmatch(text)
        if match is None:
            return text
        dots, name = match.groups()
        up = place[: max(len(place) - len(dots), 0)] if dots else ()
        target = (*up, *name.replace("[", ".").replace("]", "").split("."))
        value: Any = self._root
        is_resolved = False
        for i, part in enumerate(target):
            value = _child(value, part)
            if isinstance(value, str) and not is_resolved:  # may be a reference on the way
                value, is_resolved = self.resolve(target[: i + 1], value), True
        if value is _MISSING:
            return text
        return value if is_resolved else self.resolve(target, value)


def _child(value: Any, part: str) -> Any:
    if isinstance(value, list) and part.isdecimal() and len(part) < 6 and int(part) < len(value):
        return value[int(part)]
    return value.get(part, _MISSING) if isinstance(value, dict) else _MISSING

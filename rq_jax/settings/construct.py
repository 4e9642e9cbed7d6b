"""Constructors called with a config section."""

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np


def construct(function: Callable[..., Any], section: str, settings: Mapping[str, Any], /, **more: Any) -> Any:
    """Call a constructor with its config section.

    Args:
      function: its keyword parameters are the keys of the section, their annotations the allowed types.
      section: name of the section.
      settings: values by key; lists become tuples where the annotation says tuple.
      **more: keyword arguments that the config does not hold.

    Returns:
      What the constructor returns.

    Raises:
      ValueError: an unknown key, one without a default that is unset, or a value of another type.
    """
    allowed = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.POSITIONAL_ONLY and name not in more
    }
    for name in sorted(set(settings) - set(allowed)):
        raise ValueError(f"{section}.{name}: unknown; allowed are {', '.join(sorted(allowed))}")
    for name, parameter in allowed.items():
        if parameter.default is parameter.empty and settings.get(name) is None:
            raise ValueError(f"{section}.{name}: unset and without a default; set it")
    typed = {name: _typed(f"{section}.{name}", settings[name], allowed[name].annotation) for name in settings}
    return function(**typed, **more)


def _typed(setting: str, value: Any, annotation: Any) -> Any:
    options = get_args(annotation) if _is_union(annotation) else (annotation,)
    for option in options:
        if _fits(value, option):
            return tuple(value) if get_origin(option) is tuple else value
    allowed = " | ".join(str(option) if get_origin(option) else option.__name__ for option in options)
    raise ValueError(f"{setting}: {value!r} is not of type {allowed.replace('NoneType', 'None')}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value has an annotated type. An int is a float too, a bool is no number."""
    if get_origin(annotation) is tuple:
        kind = get_args(annotation)[0]
        return isinstance(value, (list, tuple)) and all(_fits(item, kind) for item in value)
    if annotation in (int, float):
        numbers = (int, np.integer) if annotation is int else (int, float, np.integer, np.floating)
        return isinstance(value, numbers) and not isinstance(value, bool)
    kind = get_origin(annotation) or annotation
    if kind in (Any, inspect.Parameter.empty) or not isinstance(kind, type):
        return True  # nothing that isinstance could test
    return isinstance(value, kind)


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, UnionType) or get_origin(annotation) is Union

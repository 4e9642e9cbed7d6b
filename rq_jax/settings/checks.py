"""Rules for single settings. A broken one raises a one-line ValueError of one grammar:

    section.name: value rule[, meaning][; fix]
    loop.ema_decay: 1.0 is outside [0, 1); 0 keeps no average

`setting` is the full name to show. Numbers may be arrays or sequences, of which every entry must satisfy the rule. NaN
satisfies none.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

Axis = int | str | range | tuple[int, ...]


def at_least(setting: str, value: Any, least: float, *, whole: bool = False, fix: str = "") -> None:
    """Lower bound, included; `whole` allows whole numbers only."""
    numbers = np.asarray(value)
    if not np.all(numbers >= least) or whole and not np.all(numbers == np.floor(numbers)):
        _refuse(setting, value, f"must be at least {least}" + " and whole" * whole, fix=fix)


def integers(setting: str, value: Any, least: int) -> None:
    """Lower bound, included, of values of an integer type: 2.0 is none."""
    numbers = np.asarray(value)
    if not np.issubdtype(numbers.dtype, np.integer) or not np.all(numbers >= least):
        _refuse(setting, value, f"must be an integer and at least {least}")


def integer_type(name: str, dtype: Any) -> None:
    """The type of an array whose entries are integers, of any width."""
    if not jnp.issubdtype(dtype, jnp.integer):
        _refuse(name, f"dtype {jnp.dtype(dtype)}", "must be an integer type")


def numbers(setting: str, value: Any, *, sequence: bool = False) -> None:
    """A real number, which True is not; with `sequence` also a flat sequence of at least one."""
    entries = value if sequence and isinstance(value, tuple | list) else [value]
    if not entries or not all(isinstance(each, Real) and not isinstance(each, bool) for each in entries):
        _refuse(setting, repr(value), "must be a number" + " or a sequence of numbers" * sequence)


def finite(setting: str, values: Any, *, least: float = -math.inf) -> None:
    """Finite numbers, with a lower bound, included; the first that is not is shown."""
    numbers = np.asarray(values).ravel()
    if not np.all(good := np.isfinite(numbers) & (numbers >= least)):
        _refuse(setting, numbers[~good][0], "must be finite" + f" and at least {least}" * (least > -math.inf))


def amount(setting: str, value: Any, *, sequence: bool = False) -> None:
    """A finite number of at least 0, such as a weight; with `sequence` also a flat sequence of at least one."""
    numbers(setting, value, sequence=sequence)
    finite(setting, value, least=0)


def increasing(setting: str, value: Sequence[float]) -> None:
    """Numbers of which each is above the one before it."""
    if not np.all(np.diff(np.asarray(value)) > 0):
        _refuse(setting, value, "must increase")


def distinct(setting: str, values: Sequence[Any]) -> None:
    """No value stands twice."""
    if len(set(values)) < len(values):
        _refuse(setting, ",".join(map(str, values)), "names one twice", fix="give different ones")


def above(setting: str, value: Any, bound: float, *, fix: str = "") -> None:
    """Lower bound, excluded."""
    if not np.all(np.asarray(value) > bound):
        _refuse(setting, value, f"must be above {bound}", fix=fix)


def within(
    setting: str, value: Any, low: float, high: float, *, below: bool = False, meaning: str = "", fix: str = ""
) -> None:
    """The interval [low, high]; `below` excludes its upper end."""
    numbers = np.asarray(value)
    if not np.all((numbers >= low) & (numbers < high if below else numbers <= high)):
        _refuse(setting, value, f"is outside [{low}, {high}{')' if below else ']'}", meaning, fix)


def in_range(setting: str, value: Any, first: int, last: int, meaning: str) -> None:
    """The integers first..last; `meaning` says what they count."""
    if not first <= value <= last:
        _refuse(setting, value, f"is outside {first}..{last}", meaning)


def one_of(setting: str, value: Any, allowed: Iterable[Any]) -> None:
    """A choice from a list."""
    if value not in (names := list(allowed)):
        *most, last = map(repr, names)
        shown = f"allowed are {', '.join(most)} and {last}" if most else f"allowed is {last}"
        _refuse(setting, repr(value), "is unknown", fix=shown)


def divides(setting: str, value: int, name: str, total: int) -> None:
    """A positive divisor of another quantity, which is called `name`."""
    if value < 1 or total % value:
        _refuse(setting, value, f"does not divide {name} {total}", fix="choose a divisor of it")


def multiple_of(setting: str, value: int, factor: int, meaning: str, *, axis: str = "") -> None:
    """A positive multiple of `factor`; `meaning` says what the factor is, `axis` which axis of a size is meant."""
    if value < 1 or value % factor:
        _refuse(setting, f"{axis} = {value}" if axis else value, f"must be a positive multiple of {factor}", meaning)


def positive_triple(setting: str, value: Sequence[int], names: str) -> None:
    """Three positive integers; `names` such as "(h, w, depth)"."""
    if len(value) != 3 or min(value) < 1:
        _refuse(setting, value, f"must be three positive integers {names}")


def one_per_depth(setting: str, value: Any, depth: int) -> None:
    """A sequence has an entry for each depth; a single number stands for all depths."""
    if isinstance(value, Sequence) and len(value) != depth:
        _refuse(setting, value, f"has {len(value)} entries for code depth {depth}", fix="give one per depth")


def unread(setting: str, value: Any, reader: str, chosen: str, fix: str = "set it to 0") -> None:
    """A setting that only the choice `reader` reads is 0 or unset under every other choice."""
    if value and chosen != reader:
        _refuse(setting, value, f"is read by '{reader}' only, not by '{chosen}'", fix=fix)


def shape(name: str, actual: Sequence[int], allowed: Sequence[Axis]) -> None:
    """The shape of an array; of the allowed axes a letter stands for any size, a range or tuple for its numbers."""

    def fits(size: int, axis: Axis) -> bool:
        return size in axis if isinstance(axis, range | tuple) else isinstance(axis, str) or size == axis

    def shown_axis(axis: Axis) -> str:
        if isinstance(axis, range):
            return f"{axis.start}..{axis.stop - 1}"
        return " or ".join(map(str, axis)) if isinstance(axis, tuple) else str(axis)

    if len(actual) != len(allowed) or not all(map(fits, actual, allowed)):
        axes = [shown_axis(axis) for axis in allowed]
        shown = f"({axes[0]},)" if len(axes) == 1 else f"({', '.join(axes)})"
        _refuse(name, f"shape {tuple(actual)}", "does not fit", fix=f"allowed is {shown}")


def floating(name: str, dtype: Any, fix: str = "") -> None:
    """The type of an array whose entries are floating-point numbers, of any width."""
    if not jnp.issubdtype(dtype, jnp.floating):
        _refuse(name, f"dtype {jnp.dtype(dtype)}", "is not floating-point", fix=fix)


def side_or_sides(setting: str, value: Any) -> None:
    """The size of an image: one side, or its height and width."""
    if np.shape(value) not in ((), (2,)):
        _refuse(setting, value, "is no size of an image", fix="give one side, or (height, width)")


def _refuse(setting: str, value: Any, rule: str, meaning: str = "", fix: str = "") -> NoReturn:
    raise ValueError(f"{setting}: {value} {rule}" + f", {meaning}" * bool(meaning) + f"; {fix}" * bool(fix))

"""The protocol of every figure as data, and its stamp: figures are set side by side where their stamps agree.

A record, as JSON holds it, has beside its figures

    "figures": a list of {"figure", "of", "at", "protocol"}: its name, what was measured, the keys that lead to its
        value in the record, and its stamp,
    "protocols": stamp -> the fields that decide whether figures are comparable,
    "subjects": what was measured -> where it comes from, such as checkpoint, step and settings of the sampler.

What was measured, and the versions and the commit that measured it, are no part of a stamp.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rq_jax.report import tables
from rq_jax.settings.text import quoted

DIGITS = 8  # of a stamp, hexadecimal

Fields = dict[str, Any]  # name -> value, as JSON holds it


class Figure(NamedTuple):
    """A figure of a record.

    Attributes:
      name: such as "psnr".
      of: what was measured.
      at: keys of the record, and places in lists, that lead to its value: a number, a list by code depth, or a dict of
        "mean" and "std".
      protocol: the fields that decide what it may be compared with.
    """

    name: str
    of: str
    at: tuple[str | int, ...]
    protocol: Fields


class Value(NamedTuple):
    """A figure that is read from a record: name, subject, value, and stamp."""

    name: str
    of: str
    value: Any
    stamp: str


def stamp_of(protocol: Mapping[str, Any]) -> str:
    """The stamp of a protocol: equal fields have equal stamps, whatever their order."""
    return digest_of(protocol)[:DIGITS]


def digest_of(value: Any) -> str:
    """A digest, in 16 hexadecimal digits, of what JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def attach(record: dict[str, Any], figures: Iterable[Figure], subjects: Mapping[str, Fields]) -> None:
    """Adds the entries of the module's docstring to a record."""
    figures = list(figures)
    record["subjects"] = dict(subjects)
    record["protocols"] = {stamp_of(figure.protocol): figure.protocol for figure in figures}
    record["figures"] = [
        {"figure": one.name, "of": one.of, "at": list(one.at), "protocol": stamp_of(one.protocol)} for one in figures
    ]


def read(record: Mapping[str, Any], name: str) -> list[Value]:
    """The figures of a record.

    Args:
      record: from JSON.
      name: of its file, for messages.

    Raises:
      ValueError: it is none of evaluate.py, or was changed by hand.
    """
    try:
        found = []
        for entry in record["figures"]:
            value: Any = record
            for key in entry["at"]:
                value = value[key]
            if stamp_of(record["protocols"][entry["protocol"]]) != entry["protocol"]:
                raise KeyError("protocols")
            found.append(Value(entry["figure"], entry["of"], value, entry["protocol"]))
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{quoted(name)} is no record of evaluate.py with its protocols; measure again") from None
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, with both values."""
    names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return [f"{name} {_field(a.get(name))} against {_field(b.get(name))}" for name in names]


def _field(value: Any) -> str:
    return "unset" if value is None else quoted(value) if isinstance(value, str) else json.dumps(value)


class Comparison(NamedTuple):
    """Two records beside one another.

    Attributes:
      rows: (name, stamp, values of the first record by subject, of the second) of each figure under a stamp of both.
      unlike: name of a figure that both have -> the fields that differ, of its most similar protocols.
    """

    rows: list[tuple[str, str, dict[str, Any], dict[str, Any]]]
    unlike: dict[str, list[str]]

    def table(self, names: Sequence[str]) -> str:
        """The rows as text; the values are of the full code depth."""
        rows = []
        for name, stamp, *sides in self.rows:
            cells = {
                f"{file}: {of}": shown(value)[-1]
                for file, side in zip(names, sides, strict=True)
                for of, value in side.items()
            }
            rows.append({"": name, **cells, "protocol": stamp})
        return tables.table(rows)


def compare(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> Comparison:
    """Sets the figures of two records side by side.

    Args:
      a, b: from JSON.
      names: of their files, for messages.

    Raises:
      ValueError: no record of evaluate.py, or no figure that both have.
    """
    sides = [_by_name_and_stamp(read(record, name)) for record, name in zip((a, b), names, strict=True)]
    common = [name for name in sides[0] if name in sides[1]]
    if not common:
        raise ValueError(f"protocols: {quoted(names[0])} and {quoted(names[1])} have no figure in common")
    rows, unlike = [], {}
    for name in common:
        ours, theirs = (side[name] for side in sides)
        rows += [(name, stamp, ours[stamp], theirs[stamp]) for stamp in ours if stamp in theirs]
        alone = [(x, y) for x in ours for y in theirs if x not in theirs or y not in ours]
        if alone:
            pairs = (differences(a["protocols"][x], b["protocols"][y]) for x, y in alone)
            unlike[name] = min(pairs, key=len)
    return Comparison(rows, unlike)


def check_alike(values: Iterable[Value], protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The stamp of each figure, where all its values have the same, as those of a table must.

    Args:
      values: of one or several records.
      protocols: of these records.

    Raises:
      ValueError: one figure under two protocols, with the fields that differ.
    """
    unlike, stamps = {}, {}
    for name, by_stamp in _by_name_and_stamp(values).items():
        first, *others = by_stamp
        stamps[name] = first
        if others:
            unlike[name] = differences(protocols[first], protocols[others[0]])
    if unlike:
        raise ValueError(refusal(unlike))
    return stamps


def _by_name_and_stamp(values: Iterable[Value]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for one in values:
        found.setdefault(one.name, {}).setdefault(one.stamp, {})[one.of] = one.value
    return found


def refusal(unlike: Mapping[str, Sequence[str]]) -> str:
    """One line about figures of unlike protocols; those that differ in the same fields share a clause."""
    clauses: dict[str, list[str]] = {}
    for name, fields in unlike.items():
        clauses.setdefault(", ".join(fields), []).append(name)
    told = "; ".join(f"{', '.join(names)}: {fields}" for fields, names in clauses.items())
    return f"protocols: unlike of {told}; measure both alike"


# --- tables ---


def table(values: Sequence[Value]) -> str:
    """Figures as text: a block for each subject, a line for each figure with its values and its stamp."""
    blocks = []
    for of in dict.fromkeys(one.of for one in values):
        own = [(one, shown(one.value), _has_depths(one.value)) for one in values if one.of == of]
        D = max((len(cells) for _, cells, has_depths in own if has_depths), default=0)
        rows = [[of, *(str(d + 1) for d in range(D)), "all" if D else "", "protocol"]]
        for one, cells, has_depths in own:
            by_depth = [*cells, *[""] * (D - len(cells)), ""] if has_depths else [*[""] * D, *cells]
            rows.append([one.name, *by_depth, one.stamp])
        blocks.append(tables.aligned(rows))
    return "\n\n".join(blocks)


def shown(value: Any) -> list[str]:
    """A value as text, one by code depth; with its spread where it has one."""
    if not isinstance(value, Mapping):
        return [f"{number:.4g}" for number in np.atleast_1d(value).tolist()]
    means, stds = (np.atleast_1d(value[name]).tolist() for name in ("mean", "std"))
    return [f"{mean:.4g} ± {std:.2g}" for mean, std in zip(means, stds, strict=True) if not math.isnan(std)]


def _has_depths(value: Any) -> bool:
    return isinstance(value["mean"] if isinstance(value, Mapping) else value, list)

"""Values in official configs, each of the type of our setting and in its range before anything is made of it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rq_jax.settings.text import quoted

_MISSING = object()
_MOST, _LONGEST = 2**31 - 1, 256
_TEXT_NUMBER = re.compile(r"[-+]?(\d{1,20}|(\d{1,20}\.\d{0,20}|\.\d{1,20}|\d{1,20})([eE][-+]?\d{1,3})?)", re.ASCII)
_INTEGER, _NUMBER, _FLAG = "integer", "number", "true or false"


class Kind(NamedTuple):
    """What a setting may be: a value of a type and a range, a list of them, or one for each depth."""

    noun: str = _INTEGER
    least: float = 1
    most: float = _MOST
    lengths: range | None = None  # of a list; None for none
    may_be_list: bool = False


# Settings that are not plainly a positive integer. What makes a loop or a row of a table each is bounded tightly.
_SHAPE = Kind(most=4096, lengths=range(3, 4))
_KINDS = {
    "code_shape": _SHAPE,
    "latent_shape": _SHAPE,
    **dict.fromkeys(("width_multipliers", "decoder_width_multipliers"), Kind(most=4096, lengths=range(1, 17))),
    "resolutions": Kind(lengths=range(_LONGEST + 1)),
    "codebook_size": Kind(may_be_list=True),
    "codebook_decay": Kind(_NUMBER, 0, 1, may_be_list=True),
    "temperature": Kind(_NUMBER, 0, 1e6, may_be_list=True),
    "top_k": Kind(may_be_list=True),
    "top_p": Kind(_NUMBER, 0, 1, may_be_list=True),
    **dict.fromkeys(("dropout", "embedding_dropout", "attention_dropout", "residual_dropout"), Kind(_NUMBER, 0, 1)),
    **dict.fromkeys(("spatial_layers", "depth_layers"), Kind(least=0, most=1000)),
    **dict.fromkeys(("position_layers", "content_layers"), Kind(least=1, most=1000)),
    "segment_size": Kind(least=-1),
    **dict.fromkeys(("cond_vocab_size", "cond_length"), Kind(least=0)),
    "fine_ratio": Kind(_NUMBER, 0, 1),
    **dict.fromkeys(("num_res_blocks", "decoder_num_res_blocks"), Kind(most=100)),
    "num_layers": Kind(most=20),
}


class Section(NamedTuple):
    """A section of an official config; `get` and `read` give tuples for lists, and None is absent, as there."""

    values: Any
    prefix: str = ""

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value under a dotted name; without a default it must be there."""
        value = self.values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None and default is _MISSING:
            raise ValueError(f"{self.prefix}{name}: missing; take the config that came with the checkpoint")
        value = default if value is None else value
        return tuple(value) if isinstance(value, list) else value

    def read(self, rows: tuple[tuple, ...]) -> dict[str, Any]:
        """Settings of ours from the rows of a table: our name, the official one, and a default if there is one."""
        return {name: typed(f"{self.prefix}{official[0]}", name, self.get(*official)) for name, *official in rows}


def typed(official: str, name: str, value: Any) -> Any:
    """A value of a setting of ours; numbers and booleans in quotes are taken out of them.

    Raises:
      ValueError: it is of another type, or out of range.
    """
    kind, is_list = Kind(_FLAG) if name.startswith("use_") else _KINDS.get(name, Kind()), isinstance(value, tuple)
    parts = tuple(_plain(part, kind.noun) for part in (value if is_list else (value,)))
    if None in parts or len(parts) > _LONGEST or is_list and kind.lengths is None and not kind.may_be_list:
        raise ValueError(f"{official}: {quoted(value)} is no {'list of integers' if kind.lengths else kind.noun}")
    if kind.lengths is not None and (not is_list or len(parts) not in kind.lengths):
        rule = (
            "must be three positive integers"
            if kind is _SHAPE
            else f"is no list of at most {kind.lengths[-1]} integers"
        )
        raise ValueError(f"{official}: {quoted(value)} {rule}")
    if kind.noun != _FLAG and not all(kind.least <= part <= kind.most for part in parts):
        raise ValueError(f"{official}: {quoted(value)} is outside [{kind.least}, {kind.most}]")
    return parts if is_list else parts[0]


def _plain(value: Any, noun: str) -> Any:
    """The value out of quotes; None where it is none of this kind."""
    if noun == _FLAG:
        return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else _only(value, bool)
    if isinstance(value, str) and (match := _TEXT_NUMBER.fullmatch(value.strip())):
        value = int(value) if match[1].isdecimal() else float(value)
    if isinstance(value, bool):
        return None
    if noun == _INTEGER and isinstance(value, float) and value.is_integer():
        value = int(value)
    return _only(value, int if noun == _INTEGER else int | float)


def _only(value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) else None

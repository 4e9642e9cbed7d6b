"""Weights in the content of a checkpoint file, wherever they stand in it and whatever was put before their names.

A checkpoint is nested dicts and lists. The path of a tensor, its keys and its name joined by dots, ends in the official
name; what stands before that (`state_dict.`, `model.module.`) is its place. The place with the most of the expected
names holds the weights. Within a name, parts that no official name has (`_orig_mod`) are those of wrappers.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rq_jax.interop.official.dqtransformer import DQTRANSFORMER_CLASS
from rq_jax.interop.official.dqvae import DQVAE_CLASSES
from rq_jax.interop.official.rules import listed
from rq_jax.interop.official.settings import discriminator_section
from rq_jax.settings.text import quoted

_KINDS = {"rq-vae": "rqvae", "rq-transformer": "rqtransformer"}
_LEVELS = 2  # of keys above the names
_OPENED, _PLAIN = (Mapping, list, tuple), (str, bytes, int, float, type(None))
# Paths beyond these are nobody's, and cost no more than their length.
_MAX_LENGTH, _MAX_PARTS = 300, 24
_MOST_PLACES = 8  # each is a walk through all leaves
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
_GUMBEL = "quantize.proj.weight"


class Leaf(NamedTuple):
    """A value in a checkpoint that is not opened: the keys above it, its own, and the value."""

    keys: tuple[str, ...]
    name: str
    value: Any

    @property
    def path(self) -> str:
        """Keys and name, cut where nothing of ours is as long."""
        return ".".join(part[: _MAX_LENGTH + 1] for part in (*self.keys, self.name))

    @property
    def is_tensor(self) -> bool:
        """Whether it is an array, or what becomes one."""
        return hasattr(self.value, "shape") and hasattr(self.value, "dtype")


class Weights(NamedTuple):
    """The weights of one model in a checkpoint.

    Attributes:
      state: tensors by official name, and those beside them by the name that they have.
      place: what stands before their names in the file; "" for nothing.
      used: the tensors that were expected.
    """

    state: dict[str, Any]
    place: str
    used: list[Leaf]


def find_kind(config: Mapping[str, Any]) -> str:
    """The kind of model of an official config: a key of `KINDS`.

    Raises:
      ValueError: something else.
    """
    if isinstance(model := config.get("model"), Mapping):
        name = str(model.get("target")).rpartition(".")[2]
        return "dqtransformer" if name == DQTRANSFORMER_CLASS else "dqvae" if name in DQVAE_CLASSES else "vqgan"
    arch = config.get("arch", config)
    if isinstance(arch, Mapping) and "type" in arch:
        kind = str(arch["type"]).lower()
        if kind not in _KINDS:
            raise ValueError(f"arch.type: {quoted(arch['type'])} is unknown; allowed are {', '.join(_KINDS)}")
        return _KINDS[kind]
    if discriminator_section(config) is not None:
        return "discriminator"
    raise ValueError(
        "config: has neither arch.type, nor gan.disc.arch, nor model.params; give the yaml that came with the weights"
    )


def leaves_of(content: Any) -> list[Leaf]:
    """The values in the content of a file; dicts and lists are opened down to the third level.

    Raises:
      ValueError: there is no tensor among them.
    """
    leaves = list(_leaves((), content if isinstance(content, _OPENED) else [content]))
    if not any(leaf.is_tensor and leaf.value is not content for leaf in leaves):
        held = dict.fromkeys(quoted(leaf.value) for leaf in leaves if not isinstance(leaf.value, (*_OPENED, *_PLAIN)))
        but = f", but {listed(list(held))}" if held else ""
        raise ValueError(f"state: holds no tensors by name{but}; give a file with the model's state_dict()")
    return leaves


def pick_weights(
    leaves: list[Leaf], expected: Collection[str], *, use_ema: bool = False, key: str | None = None
) -> Weights:
    """The weights of the model that a checkpoint is about.

    Args:
      leaves: from `leaves_of`.
      expected: official names of the tensors.
      use_ema: take averaged weights, whose place has the word "ema" in it; without it others go first.
      key: place below which they are looked for; needed where several fit.

    Returns:
      The weights; where none fit at all, the tensors of the largest dict.

    Raises:
      ValueError: none are averaged, several fit, nothing stands below the key, or the quantizer is another.
    """
    if key is not None:
        start = f"{key}."
        found = [leaf for leaf in leaves if leaf.is_tensor and leaf.path.startswith(start)]
        if not found:
            raise ValueError(f"--key: no tensors stand below {quoted(key)}; the file has {_tops(leaves)}")
        leaves = found
    if any(leaf.name.endswith(_GUMBEL) for leaf in leaves):
        raise ValueError(f"{_GUMBEL}: this is a Gumbel quantizer, which we do not have; allowed is VQModel")
    weights = find_weights(leaves, expected, use_ema)
    if len(weights) > 1 and 2 * len(weights[0].used) > len(expected):
        places = ", ".join(quoted(one.place) for one in weights)
        raise ValueError(f"state: weights that fit stand under {places}; choose one by --key")
    if weights:
        return weights[0]
    if use_ema:
        raise ValueError(f"state: has no averaged weights, it has {_tops(leaves)}; leave out --ema")
    ((keys, _),) = Counter(leaf.keys for leaf in leaves if leaf.is_tensor).most_common(1)
    tensors = {leaf.name: leaf.value for leaf in leaves if leaf.keys == keys and leaf.is_tensor}
    return Weights(tensors, ".".join(keys), [])


def holds_discriminator(leaves: list[Leaf]) -> bool:
    """Whether there is the first tensor of a discriminator."""
    return any(leaf.name.endswith("main.0.weight") for leaf in leaves)


def find_weights(leaves: list[Leaf], expected: Collection[str], use_ema: bool = False) -> list[Weights]:
    """The weights of a model wherever they stand: those with the most of the expected names, up to 8 if they tie."""
    places = _places(leaves, expected)
    if use_ema:
        places = {place: found for place, found in places.items() if _AVERAGED.search(place)}
    most = max(map(len, places.values()), default=0)
    best = [place for place, found in places.items() if len(found) == most]
    best = [place for place in best if use_ema or not _AVERAGED.search(place)] or best
    distinct: dict[frozenset[int], str] = {}
    for place in best:  # one dict may stand under several keys
        distinct.setdefault(frozenset(id(leaf.value) for leaf in places[place].values()), place)
    return [_weights(leaves, place, places[place]) for place in list(distinct.values())[:_MOST_PLACES]]


def name_left_out(leaves: list[Leaf], used: Iterable[Leaf]) -> list[str]:
    """Names of the parts of a checkpoint that were not used: keys, tensors, and beginnings of names of tensors."""
    used = list(used)
    seen = {id(leaf) for leaf in used}
    opened = {""}
    for leaf in used:
        parts = leaf.path.split(".")
        opened |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if id(leaf) not in seen:
            parts, stop = leaf.path.split(".", _MAX_PARTS), 0
            while stop < len(parts) and ".".join(parts[:stop]) in opened:
                stop += 1
            groups.setdefault(".".join(parts[:stop]), []).append(leaf)
    return [_group_name(group, members) for group, members in groups.items()]


def _group_name(group: str, leaves: list[Leaf]) -> str:
    first, keys = leaves[0], ".".join(leaves[0].keys)
    if f"{keys}.".startswith(f"{group}."):
        return group
    return first.path if len(leaves) == 1 else f"{group}.* ({len(leaves)} tensors)"


def _leaves(keys: tuple[str, ...], content: Any) -> Iterator[Leaf]:
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if isinstance(value, _OPENED) and len(keys) < _LEVELS:
            yield from _leaves((*keys, str(key)), value)
        else:
            yield Leaf(keys, str(key), value)


def _places(leaves: list[Leaf], expected: Collection[str]) -> dict[str, dict[str, Leaf]]:
    """For each place the tensors below it by official name."""
    official_parts = {part for name in expected for part in name.split(".")}
    most_parts = max((name.count(".") + 1 for name in expected), default=0)
    places: dict[str, dict[str, Leaf]] = {}
    for leaf in leaves:
        if leaf.name.rpartition(".")[2] not in official_parts:
            continue
        path = leaf.path
        parts = path.split(".", _MAX_PARTS)
        if len(path) > _MAX_LENGTH or len(parts) > _MAX_PARTS:
            continue
        own = [i for i, part in enumerate(parts) if part in official_parts]
        for start in range(max(len(own) - most_parts, 0), len(own)):
            name = ".".join(parts[i] for i in own[start:])
            if name in expected:
                found = places.setdefault(".".join(parts[: own[start]]), {})
                if name not in found or own[start:] == list(range(own[start], len(parts))):  # without wrappers within
                    found[name] = leaf
                break
    return places


def _weights(leaves: list[Leaf], place: str, found: dict[str, Leaf]) -> Weights:
    used, dicts = list(found.values()), {leaf.keys for leaf in found.values()}
    seen, start = {id(leaf) for leaf in used}, f"{place}." if place else ""
    beside = [leaf for leaf in leaves if leaf.is_tensor and leaf.keys in dicts and id(leaf) not in seen]
    others = {leaf.path.removeprefix(start): leaf.value for leaf in beside if leaf.path.startswith(start)}
    return Weights(others | {name: leaf.value for name, leaf in found.items()}, place, used)


def _tops(leaves: list[Leaf]) -> str:
    return listed([quoted(top) for top in dict.fromkeys((*leaf.keys, leaf.name)[0] for leaf in leaves)])

"""Rules that take the tensors of an official state dict to our arrays, and back.

A `Rule` says which official tensors stand behind one array of ours and how their axes move: the pattern
"(L Q) (N A) M -> L M Q N A" reads the query, key and value matrices (N A, M) of L layers. Shapes on both sides and both
directions follow from the same line.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax.settings.text import quoted

Shape = tuple[int, ...]

_MOST_NAMED = 20  # of one kind of mistake

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """One array of ours and the official tensors behind it.

    Attributes:
      path: of our array, such as "params/encoder/conv_in/kernel".
      keys: official names of the tensors, in the order in which they are stacked on a new first axis.
      pattern: from the axes of the stacked tensors to those of our array; a group in parentheses is one axis.
      sizes: of at least the axes in the pattern.
      aliases: further official names of the same tensor, which must hold the same values.
      padding_rows: rows at the end of each official tensor, which ours does not have; written as zeros.
      has_zero_padding: whether the original keeps those rows at zero.
      dtype: of the official tensors; ours is float32, or int32 where it is an integer type.
    """

    path: str
    keys: tuple[str, ...]
    pattern: str
    sizes: Mapping[str, int]
    aliases: tuple[str, ...] = ()
    padding_rows: int = 0
    dtype: str = "float32"
    has_zero_padding: bool = True

    @property
    def shape(self) -> Shape:
        """Shape of our array."""
        return self._shape(self._sides[1])

    @property
    def official_shape(self) -> Shape:
        """Shape of each official tensor."""
        shape = self._shape(self._sides[0])[1:]
        return (shape[0] + self.padding_rows, *shape[1:]) if self.padding_rows else shape

    @property
    def is_float(self) -> bool:
        """Whether the tensors are weights rather than a counter or a flag."""
        return np.dtype(self.dtype).kind == "f"

    def read(self, tensors: Iterable[Any]) -> np.ndarray:
        """Our array from the tensors of `keys`; each is read when its turn comes, and only one at a time is held."""
        array = np.empty(self.shape, np.float32 if self.is_float else np.int32)
        for place, tensor in zip(self._places(array), tensors, strict=True):
            tensor = np.asarray(tensor)
            values = tensor[: -self.padding_rows] if self.padding_rows else tensor
            place[...] = values.reshape(place.shape)
        return array

    def write(self, array: np.ndarray) -> list[np.ndarray]:
        """The tensors of `keys` from our array; the inverse of `read`."""
        tensors = []
        for place in self._places(np.asarray(array, order="C")):
            tensor = np.zeros(self.official_shape, self.dtype)
            values = tensor[: -self.padding_rows] if self.padding_rows else tensor
            values[...] = place.reshape(values.shape)
            tensors.append(tensor)
        return tensors

    def _places(self, array: np.ndarray) -> list[np.ndarray]:
        """For each official tensor a view of our contiguous array, with the axes of the tensor, ungrouped."""
        official, own = (re.findall("[A-Z]", side) for side in self._sides)
        ungrouped = array.reshape([self.sizes[axis] for axis in own])
        ungrouped = ungrouped.transpose([own.index(axis) for axis in official])
        num_stacked = len(re.findall("[A-Z]", _groups(self.pattern)[0]))
        return [ungrouped[(*index, ...)] for index in np.ndindex(*ungrouped.shape[:num_stacked])]

    @property
    def _sides(self) -> list[str]:
        return self.pattern.split("->")

    def _shape(self, side: str) -> Shape:
        # The anonymous axis "1" has no letter: an empty product.
        return tuple(math.prod(self.sizes[axis] for axis in re.findall("[A-Z]", group)) for group in _groups(side))


class Table(NamedTuple):
    """The layout of the official state dict of one model.

    Attributes:
      rules: of all our arrays.
      constants: tensors that follow from the settings; their values are checked.
      unread: tensors that nothing reads: absent or dropped on the way in, written as here on the way out.
      buffers: names of tensors that follow from the settings, too large to write: dropped on the way in.
      strangers: beginnings of the names of tensors of other models that may stand beside these.
    """

    rules: list[Rule]
    constants: Mapping[str, np.ndarray]
    unread: Mapping[str, np.ndarray] = {}
    strangers: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()

    def shapes(self) -> dict[str, Shape]:
        """Shape of every array of ours by path."""
        return {rule.path: rule.shape for rule in self.rules}

    def names(self) -> set[str]:
        """Names of all official tensors."""
        names = {key for rule in self.rules for key in (*rule.keys, *rule.aliases)}
        return names | {*self.constants, *self.dropped()}

    def dropped(self) -> list[str]:
        """Names of the tensors that are dropped on the way in."""
        return [*self.unread, *sorted(self.buffers)]

    def official_shapes(self) -> dict[str, Shape]:
        """Shape of every official tensor that is read, by name."""
        shapes = {key: rule.official_shape for rule in self.rules for key in (*rule.keys, *rule.aliases)}
        return shapes | {key: value.shape for key, value in self.constants.items()}


def import_state(state: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """Our variables from an official state dict, each tensor of it used exactly once.

    NaN and infinite values are kept, with a warning.

    Args:
      state: tensors by official name: arrays, or what has a shape and a dtype and becomes an array when it is read.
      table: of the model.

    Returns:
      Nested dicts of contiguous float32 (flags: int32) arrays.

    Raises:
      ValueError: naming all tensors that are missing, unexpected, misshapen, of a wrong type, or copies that differ.
    """
    problems = _name_problems(state, table)
    wrong = [problem for problem in _value_problems(state, table).values() if problem]
    problems += [listed(wrong, "; ")] if wrong else []
    if problems:
        raise ValueError(f"state dict: does not fit its config: {'; '.join(problems)}; take both from one checkpoint")
    tree: dict[str, Any] = {}
    suspect: dict[str, list[str]] = {"NaN or infinite values; they are kept": [], "a padding row that is not zero": []}
    for rule in table.rules:
        *parents, name = rule.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = rule.read(_watched(state, rule, *suspect.values()))
    for problem, names in suspect.items():
        if names:
            logger.warning("state dict: %s in %s", problem, listed(names))
    return tree


def export_state(variables: dict[str, Any], table: Table) -> dict[str, np.ndarray]:
    """The official state dict of our variables, aliases, padding rows and constants included.

    Args:
      variables: nested dicts as `import_state` gives them; they are emptied, so that nothing is held twice.
      table: of the model.

    Raises:
      ValueError: there are arrays that the original does not have.
    """
    state: dict[str, np.ndarray] = {}
    for rule in table.rules:
        tensors = rule.write(_pop(variables, rule.path))
        state |= dict(zip(rule.keys, tensors, strict=True))
        state |= {alias: tensors[0] for alias in rule.aliases}
    left = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    if left:
        raise ValueError(f"variables: the original has no place for {listed(left)}")
    return state | dict(table.constants) | dict(table.unread)


def _name_problems(state: Mapping[str, Any], table: Table) -> list[str]:
    expected = table.official_shapes()
    missing = [name for name in expected if name not in state]
    known = {*expected, *table.dropped()}
    unexpected = [quoted(name) for name in state if name not in known and not name.startswith(table.strangers)]
    kinds = (("unexpected", unexpected), ("missing", missing))  # the first tells the reason
    return [f"{kind} {listed(names)}" for kind, names in kinds if names]


def _value_problems(state: Mapping[str, Any], table: Table) -> dict[str, str]:
    """The problem of each tensor of the state by name, "" for none; only copies and constants are read."""
    floats = {key: rule.is_float for rule in table.rules for key in (*rule.keys, *rule.aliases)}
    problems = {}
    for name, shape in table.official_shapes().items():
        if name in state:
            kind = np.floating if floats.get(name, False) else np.integer
            problems[name] = _form_problem(name, state[name], shape, kind)

    def compare(name: str, other: str, what: str, value: Any) -> None:
        if problems.get(name) == "" == problems.get(other) and not _same(state[name], value):
            problems[name] = f"{name} differs from {what}"

    for rule in table.rules:
        for alias in rule.aliases:
            compare(alias, rule.keys[0], rule.keys[0], state.get(rule.keys[0]))
    for name, value in table.constants.items():
        compare(name, name, str(value.tolist()), value)
    return problems


def _form_problem(name: str, tensor: Any, shape: Shape, kind: type) -> str:
    if not hasattr(tensor, "dtype"):
        return f"{name} is {quoted(tensor)}, which is not read as a tensor"
    if tensor.shape != shape:
        return f"{name} has shape {tensor.shape} instead of {shape}"
    dtype = tensor.dtype
    if not jax.dtypes.issubdtype(dtype, kind):  # knows bfloat16, as NumPy does not
        return f"{name} is of type {dtype} where {'floats' if kind is np.floating else 'integers'} are needed"
    return ""


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64), equal_nan=True)


def _watched(state: Mapping[str, Any], rule: Rule, not_finite: list[str], not_zero: list[str]) -> Iterator[np.ndarray]:
    """The tensors of a rule, one by one; notes names of those with suspect values."""
    for key in rule.keys:
        tensor = np.asarray(state[key])
        if rule.is_float and not np.isfinite(tensor).all():
            not_finite.append(key)
        if rule.padding_rows and rule.has_zero_padding and np.any(tensor[-rule.padding_rows :]):
            not_zero.append(key)
        yield tensor


def _pop(tree: dict[str, Any], path: str) -> np.ndarray:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree[parent]
    return tree.pop(name)


def _groups(side: str) -> list[str]:
    return re.findall(r"\([^)]*\)|\S+", side)


def listed(names: list[str], separator: str = ", ") -> str:
    """Names for one line of a message, cut after 20."""
    more = len(names) - _MOST_NAMED
    return separator.join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

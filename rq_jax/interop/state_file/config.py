"""Reader of configs in YAML and JSON."""

import functools
import os
import re
from typing import Any

from rq_jax.files import parse_json
from rq_jax.interop.state_file.files import Invalid, find_file, one_line
from rq_jax.interop.state_file.interpolation import interpolate
from rq_jax.interop.state_file.limits import check_tree
from rq_jax.settings.text import quoted

_MAX_BYTES = 256 << 10
_MAX_NODES = 10_000
_MAX_DEPTH = 50
_MAX_NUMBER = 1000
_MAX_TEXT = 1 << 20  # shared parts counted each time
_YAML = "tag:yaml.org,2002:"
_TAGS = {f"{_YAML}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge")}
# Plain values of Python, as yaml.dump writes them, and what they are in YAML.
_PYTHON_TAGS = {
    "tuple": "seq", "list": "seq", "dict": "map", "str": "str", "unicode": "str", "int": "int", "long": "int",
    "float": "float", "bool": "bool", "none": "null",
}  # fmt: skip
_EXPECTED = "a config in YAML or JSON"
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep; a config is not"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A config in YAML or JSON, as nested dicts, lists, strings, numbers, booleans, dates and None.

    A number such as 1e-4 is a number, as OmegaConf reads it, and not a string, as in YAML 1.1. References such as
    ${dataset.vocab_size} are followed; one that leads nowhere stays text. Of the {desc, value} that wandb writes, the
    value is taken.

    Args:
      path: of the file.

    Raises:
      FileNotFoundError: nothing is there.
      StateFileError: no YAML or JSON of a dict, a key that stands twice, tags other than those of plain values, too
        large, too deep, too many aliases, or references in a circle.
    """
    source = find_file(path, _EXPECTED)
    with source.open() as reader:
        if source.size > _MAX_BYTES:
            raise Invalid(f"has {source.size} bytes; a config has at most {_MAX_BYTES}")
        try:
            text = reader.read(0, source.size).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Invalid(f"is no text in UTF-8; give {_EXPECTED}") from None
        config = _parse(text, source.name.endswith(".json"))
        if not isinstance(config, dict):
            raise Invalid(f"holds no dict at its top but a {type(config).__name__}; give {_EXPECTED}")
        config = _without_descriptions(config)
        config = interpolate(config) if "${" in text else config
        if check_tree(config, _split_value, max(len(text), _MAX_NODES), _MAX_DEPTH) > _MAX_TEXT:
            raise Invalid(f"stands for more than {_MAX_TEXT} characters, shared parts counted each time")
        return config


def _without_descriptions(config: dict[str, Any]) -> dict[str, Any]:
    entries = {key: value for key, value in config.items() if key != "wandb_version"}
    is_wandb = all(isinstance(x, dict) and "value" in x and x.keys() <= {"desc", "value"} for x in entries.values())
    return {key: entry["value"] for key, entry in entries.items()} if is_wandb else config


def _parse(text: str, is_json: bool) -> Any:
    if is_json or text.lstrip().startswith("{"):  # YAML's flow style begins like this too
        try:
            return parse_json(text, "its text", object)
        except ValueError as error:
            if is_json:
                raise Invalid(f"{error}; give {_EXPECTED}") from None
    try:
        loader = _yaml_loader()(text)
        root = loader.get_single_node()
        # Before anything is built: building is recursive, and merge keys copy what their aliases stand for.
        check_tree(root, _split_node, _MAX_NODES, _MAX_DEPTH)
        return loader.construct_document(root) if root else None
    except Invalid:
        raise
    except Exception as error:  # PyYAML lets many kinds through, such as an AttributeError for a date that is none
        raise Invalid(f"is no valid YAML ({one_line(error)}); give {_EXPECTED}") from None


def _split_value(node: Any) -> tuple[int, int, list[Any]]:
    children = list(node.values()) if isinstance(node, dict) else node
    inner = [child for child in children if isinstance(child, dict | list)]
    return len(children) - len(inner), sum(len(child) for child in children if isinstance(child, str)), inner


def _split_node(node: Any) -> tuple[int, int, list[Any]]:
    """The same for a node of YAML, whose children must have tags of plain values and no number of great length."""
    children = getattr(node, "value", node)
    if getattr(node, "id", "") == "mapping":
        _check_keys([key for key, _ in children if key.id == "scalar"])
        children = [child for pair in children for child in pair]
    inner = []
    for child in filter(None, children):
        if child.tag not in _TAGS:
            raise Invalid(f"holds the YAML tag {quoted(child.tag)}; allowed are str, int, float, bool, null, seq, map")
        if child.id != "scalar":
            inner.append(child)
        elif len(child.value) > _MAX_NUMBER and child.tag != f"{_YAML}str":
            # As a number in base 60, which YAML 1.1 has, it would take long.
            raise Invalid(f"holds a value of {len(child.value)} characters; put it between quotes")
    return len(children) - len(inner), 0, inner


def _check_keys(keys: list[Any]) -> None:
    seen: set[tuple[str, str]] = set()
    for key in keys:
        if (key.tag, key.value) in seen:
            raise Invalid(f"is no valid YAML: the key {quoted(key.value)} stands twice; remove one of them")
        seen.add((key.tag, key.value))


@functools.cache
def _yaml_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """Bounds the text while it is parsed; an alias counts as one value here."""

        nodes = depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes, self.depth = self.nodes + 1, self.depth + 1
            if self.depth > _MAX_DEPTH + 1:  # the leaves too
                raise Invalid(_TOO_DEEP)
            if self.nodes > _MAX_NODES:
                raise Invalid(f"holds more than {_MAX_NODES} values")
            node = super().compose_node(parent, index)
            if kind := _PYTHON_TAGS.get(node.tag.removeprefix(f"{_YAML}python/")):
                node.tag = f"{_YAML}{kind}"
            self.depth -= 1
            return node

    # The numbers that YAML 1.1 misses: without a point, or without a sign in the exponent.
    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader

"""Reader of configs in YAML and JSON."""

import functools
import json
import os
import re
from typing import Any

from rq_jax.interop.state_file.files import Invalid, find_file, one_line
from rq_jax.interop.state_file.limits import check_tree

_MAX_BYTES = 256 << 10
_MAX_NODES = 10_000
_MAX_DEPTH = 50
_MAX_NUMBER = 1000
_TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge")
)
_EXPECTED = "a config in YAML or JSON"
_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep; a config is not"


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A config in YAML or JSON, as nested dicts, lists, strings, numbers, booleans, dates and None.

    A number such as 1e-4 is a number, as OmegaConf reads it, and not a string, as in YAML 1.1.

    Args:
      path: of the file.

    Raises:
      FileNotFoundError: nothing is there.
      StateFileError: no YAML or JSON of a dict, tags other than YAML's own, too large, too deep, or too many aliases.
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
        return config


def _parse(text: str, is_json: bool) -> Any:
    if is_json or text.lstrip().startswith("{"):  # YAML's flow style begins like this too
        try:
            config = json.loads(text)
            check_tree(config, _split_value, len(text), _MAX_DEPTH)
            return config
        except RecursionError:
            raise Invalid(_TOO_DEEP) from None
        except ValueError as error:
            if is_json:
                raise Invalid(f"is no valid JSON ({one_line(error)}); give {_EXPECTED}") from None
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


def _split_value(node: Any) -> tuple[int, list[Any]]:
    children = node.values() if isinstance(node, dict) else node
    inner = [child for child in children if isinstance(child, dict | list)]
    return len(node) - len(inner), inner


def _split_node(node: Any) -> tuple[int, list[Any]]:
    """The same for a node of YAML, whose children must have tags of YAML itself and no number of great length."""
    children = getattr(node, "value", node)
    if getattr(node, "id", "") == "mapping":
        children = [child for pair in children for child in pair]
    inner = []
    for child in filter(None, children):
        if child.tag not in _TAGS:
            raise Invalid(f"holds the YAML tag {child.tag[:80]!r}; allowed are str, int, float, bool, null, seq, map")
        if child.id != "scalar":
            inner.append(child)
        elif len(child.value) > _MAX_NUMBER and child.tag != _TAGS[0]:
            # As a number in base 60, which YAML 1.1 has, it would take long.
            raise Invalid(f"holds a value of {len(child.value)} characters; put it between quotes")
    return len(children) - len(inner), inner


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
            self.depth -= 1
            return node

    # The numbers that YAML 1.1 misses: without a point, or without a sign in the exponent.
    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader

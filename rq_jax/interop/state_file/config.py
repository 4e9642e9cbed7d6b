"""Configs in YAML and JSON that come from elsewhere."""

import functools
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from rq_jax.interop.state_file.tensor import File, StateFileError, find_file

_MAX_BYTES = 256 << 10
_MAX_NODES = 10_000
_MAX_DEPTH = 50
_MAX_PLAIN = 1000
_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))
_WANTED = "a config in YAML or JSON"
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
    source = find_file(path, _WANTED)
    if source.size > _MAX_BYTES:
        raise source.error(f"has {source.size} bytes; a config has at most {_MAX_BYTES}")
    with source.open() as file:
        data = source.read(file, 0, source.size)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise source.error(f"is no text in UTF-8; give {_WANTED}") from None
    config = _parse(source, text)
    if not isinstance(config, dict):
        raise source.error(f"holds no dict at its top but a {type(config).__name__}; give {_WANTED}")
    return config


def _parse(source: File, text: str) -> Any:
    is_json = source.name.endswith(".json")
    if is_json or text.lstrip().startswith("{"):  # YAML's flow style begins like this too
        try:
            config = json.loads(text)
        except RecursionError:
            raise source.error(_TOO_DEEP) from None
        except ValueError as error:
            if is_json:
                raise source.error(f"is no valid JSON ({_line(error)}); give {_WANTED}") from None
        else:
            _check_depth(source, config)
            return config
    import yaml

    try:
        # Before anything is built: building is recursive, and merge keys copy what their aliases stand for.
        _check_events(source, yaml.parse(text, Loader=yaml.SafeLoader))
        config = yaml.load(text, Loader=_yaml_loader())  # a SafeLoader
    except StateFileError:
        raise
    except Exception as error:  # PyYAML lets many kinds through, such as an AttributeError for a date that is none
        raise source.error(f"is no valid YAML ({_line(error)}); give {_WANTED}") from None
    _check_depth(source, config)
    return config


def _check_events(source: File, events: Iterable[Any]) -> None:
    import yaml

    nodes, sizes, parents = 0, {}, []  # nodes by anchor, 0 as long as it is open; anchors and nodes in front of them
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            nodes += sizes.get(event.anchor, 1)
            if not sizes.get(event.anchor, 1):
                raise source.error(f"holds the alias *{event.anchor:.40} within what it stands for; remove it")
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if event.tag not in (None, "!", *_TAGS):
                raise source.error(
                    f"holds the YAML tag {event.tag[:80]!r}; allowed are str, int, float, bool, null, seq, map"
                )
            if isinstance(event, yaml.CollectionStartEvent):
                parents.append((event.anchor, nodes - 1))
            elif (event.style is None or event.tag) and len(event.value) > _MAX_PLAIN:
                # As a number in base 60 it would take long; YAML 1.1 has these.
                raise source.error(f"holds a value of {len(event.value)} characters; put it between quotes")
            if event.anchor:
                sizes[event.anchor] = 0 if isinstance(event, yaml.CollectionStartEvent) else 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = parents.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > _MAX_NODES:
            raise source.error(f"holds more than {_MAX_NODES} values, aliases counted as what they stand for")
        if len(parents) > _MAX_DEPTH:
            raise source.error(_TOO_DEEP)


def _check_depth(source: File, config: Any) -> None:
    depth, level = 0, [config]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise source.error(_TOO_DEEP)
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]


@functools.cache
def _yaml_loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # The numbers that YAML 1.1 misses: without a point, or without a sign in the exponent.
    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

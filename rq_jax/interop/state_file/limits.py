"""A bound on trees whose parts may be shared."""

from collections.abc import Callable
from typing import Any

from rq_jax.interop.state_file.files import Invalid


def check_tree(root: Any, split: Callable[[Any], tuple[int, list[Any]]], max_nodes: int, max_depth: int) -> None:
    """Check that a tree has no circles, is not deep, and is small with shared parts counted as often as they occur.

    Args:
      root: inner node or leaf.
      split: from an inner node to the number of its leaves and the list of its inner nodes.
      max_nodes: inner nodes and leaves.
      max_depth: levels of inner nodes.

    Raises:
      Invalid: it is one of these.
    """
    sizes: dict[int, tuple[int, int]] = {}  # nodes and levels by id, of those whose children have them
    opened: dict[int, tuple[int, list[Any]]] = {}
    stack = split([root])[1]
    while stack:
        node = stack[-1]
        if id(node) in sizes:
            stack.pop()
            continue
        leaves, inner = opened.get(id(node)) or split(node)
        if inner and id(node) not in opened:
            opened[id(node)] = leaves, inner
            stack += inner
            continue
        nodes, levels = 1 + leaves, 1
        for child in inner:
            if id(child) not in sizes:
                raise Invalid("holds a list or dict that holds itself; remove it")
            child_nodes, child_levels = sizes[id(child)]
            nodes, levels = nodes + child_nodes, max(levels, 1 + child_levels)
        if levels > max_depth:
            raise Invalid(f"is nested more than {max_depth} levels deep; save less of it")
        if nodes > max_nodes:
            raise Invalid(f"holds more than {max_nodes} values, shared parts counted each time; save less of it")
        sizes[id(node)] = nodes, levels

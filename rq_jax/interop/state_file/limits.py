"""A bound on trees whose parts may be shared."""

from collections.abc import Callable
from typing import Any

from rq_jax.interop.state_file.files import Invalid

Split = Callable[[Any], tuple[int, int, list[Any]]]


def check_tree(root: Any, split: Split, max_nodes: int, max_depth: int) -> int:
    """Check that a tree has no circles, is not deep, and is small with shared parts counted as often as they occur.

    Args:
      root: inner node or leaf.
      split: from an inner node to the number of its leaves, the sum of their sizes, and the list of its inner nodes.
      max_nodes: inner nodes and leaves.
      max_depth: levels of inner nodes.

    Returns:
      The sum of the sizes of all leaves.

    Raises:
      Invalid: it is one of these.
    """
    sums: dict[int, tuple[int, int, int]] = {}  # nodes, size and levels by id, of those whose children have them
    opened: dict[int, tuple[int, int, list[Any]]] = {}
    _, size_of_leaf, stack = split([root])
    while stack:
        node = stack[-1]
        if id(node) in sums:
            stack.pop()
            continue
        leaves, size, inner = opened.get(id(node)) or split(node)
        if inner and id(node) not in opened:
            opened[id(node)] = leaves, size, inner
            stack += inner
            continue
        nodes, levels = 1 + leaves, 1
        for child in inner:
            if id(child) not in sums:
                raise Invalid("holds a list or dict that holds itself; remove it")
            child_nodes, child_size, child_levels = sums[id(child)]
            nodes, size, levels = nodes + child_nodes, size + child_size, max(levels, 1 + child_levels)
        if levels > max_depth:
            raise Invalid(f"is nested more than {max_depth} levels deep; save less of it")
        if nodes > max_nodes:
            raise Invalid(f"holds more than {max_nodes} values, shared parts counted each time; save less of it")
        sums[id(node)] = nodes, size, levels
    return sums[id(root)][1] if id(root) in sums else size_of_leaf

"""Where activations lie: networks say which axis is which, and whoever runs them says which devices share it.
Batches in micro-batches, of which each device has those of its rows.

Nothing is constrained unless the caller asks for it with `placing`; `devices.sharding.activations` does, for a mesh.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

Place = Callable[[jax.Array, str], jax.Array]

_place: contextvars.ContextVar[Place | None] = contextvars.ContextVar("place", default=None)


def place(x: jax.Array, letters: str) -> jax.Array:
    """x, laid over devices as the caller of the network wants.

    Args:
      x: an activation.
      letters: of its axes, one for each ("BSM"); see the package's docstring.
    """
    how = _place.get()
    return x if how is None else how(x, letters)


@contextlib.contextmanager
def placing(how: Place) -> Iterator[None]:
    """While it lasts, `place` in a network that is traced calls `how`; a program that was traced before stays."""
    token = _place.set(how)
    try:
        yield
    finally:
        _place.reset(token)


def micro_batches(batch: Any, num_steps: int) -> Any:
    """A tree of arrays (B, ...) as (num_steps, B / num_steps, ...): micro-batch i has every num_steps-th row from i on.

    Consecutive rows would lie on few devices of a sharded batch and move at every step; in this order each device
    slices the rows it has.
    """
    return jax.tree.map(lambda x: x.reshape(-1, num_steps, *x.shape[1:]).swapaxes(0, 1), batch)


def map_micro_batches(function: Callable[[Any], Any], batch: Any, num_steps: int) -> Any:
    """`function(batch)`, both trees of arrays (B, ...), in micro-batches one after the other: it needs less memory."""
    if num_steps == 1:
        return function(batch)
    results = jax.lax.map(function, micro_batches(batch, num_steps))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)

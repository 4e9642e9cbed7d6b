"""Where activations lie: networks say which axis is which, and whoever runs them says which devices share it.

Nothing is constrained unless the caller asks for it with `placing`; `devices.sharding.activations` does, for a mesh.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

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

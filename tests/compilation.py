"""Counts of compiled programs, for tests of what must not compile again."""

import contextlib
from collections.abc import Iterator

import jax

# Once for each program that goes to XLA or comes out of the cache on disk, never for one that the process still holds.
_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs that were compiled in a block, by the name of their function."""

    def __init__(self):
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)


@contextlib.contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Count every program that is compiled inside, small eager ones too.

    >>> with count_compilations() as compiled:
    ...     step(state, batch)
    >>> assert compiled.count == 0
    """
    compiled = Compilations()

    def listen(event: str, seconds: float, **details: str) -> None:
        if event == _EVENT:
            compiled.names.append(str(details.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

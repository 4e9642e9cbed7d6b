"""SIGINT and SIGTERM as a request to save and stop, agreed on by all processes of a run."""

import signal
from typing import Any

import jax


class StopSignal:
    """Context manager that turns SIGINT and SIGTERM into a request that the loop polls; a second SIGINT interrupts.

    A signal to one of several processes stops all of them at the same poll. Otherwise one would leave while the others
    wait in a collective for it.

    Attributes:
      signal: number of the signal that arrived, None before.
    """

    def __init__(self):
        self.signal: int | None = None
        self._polls = 0

    def __enter__(self) -> "StopSignal":
        self._previous = {}
        # With several processes SIGTERM belongs to JAX's preemption service, which tells the other processes.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        try:
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread, where Python allows no handlers
            self._previous = {}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if jax.process_count() > 1:  # pass SIGINT on to the preemption service
            signal.raise_signal(signal.SIGTERM)

    def poll(self) -> bool:
        """Whether to stop here. Every process must poll equally often: after each step and each evaluation batch.

        The preemption service picks a number of polls that no process has reached yet, and every process returns True
        at that one. So the count must be of polls, in all of them, and nothing else may ask with other numbers.
        """
        self._polls += 1
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(self._polls):
                self.signal = self.signal or signal.SIGTERM
                return True
            return False
        return self.signal is not None  # read once: a signal that arrives from here on is for the next poll

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

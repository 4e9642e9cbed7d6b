"""SIGINT and SIGTERM, noted so that a run saves before it ends."""

import signal
from typing import Any

import jax


class StopSignal:
    """Notes SIGINT and SIGTERM, so that a run can save before it ends; a second SIGINT ends at once.

    Of several processes the one that gets the signal tells the others, and all stop at the same step.
    """

    def __init__(self):
        self.signal: int | None = None
        self._times = 0

    def __enter__(self) -> "StopSignal":
        self._old = {}
        # JAX's preemption service listens for SIGTERM where there are others to tell.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        try:
            for number in numbers:
                self._old[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread: somebody else handles signals
            self._old = {}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)

    def poll(self) -> bool:
        """Whether the run is to end here; every process asks at the same places: after each step and batch held out."""
        self._times += 1
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(self._times):
                self.signal = self.signal or signal.SIGTERM
                return True
            return False
        return self.signal is not None  # read once: a signal from here on is for the next step

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

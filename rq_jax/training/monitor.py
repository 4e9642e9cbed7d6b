"""What watches a run: a step that hangs, steps that are not finite, where the time goes, a trace of chosen steps."""

import contextlib
import faulthandler
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.devices.memory import peak_memory
from rq_jax.devices.peaks import device_peaks
from rq_jax.files import write_atomic

COMPILE_FACTOR = 20  # for steps that compile

logger = logging.getLogger(__name__)


class NotFinite(ValueError):
    """Too many steps in a row were left out because their loss or gradient is not finite."""


class HangGuard:
    """Ends the process with exit code 1, after the stacks of all threads on stderr, where a step takes too long.

    It runs outside the interpreter, so that a collective which waits for a dead host cannot hold it up.
    """

    def __init__(self, seconds: float):
        """Args: seconds: of one step; 0 watches nothing."""
        self._seconds, self._factor = seconds, 1

    def expect_compilation(self) -> None:
        """The next step needs a new program."""
        self._factor = COMPILE_FACTOR

    def arm(self) -> None:
        """A step begins."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds * self._factor, exit=True, file=sys.__stderr__)
            self._factor = 1

    def disarm(self) -> None:
        """What follows is no step."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "HangGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disarm()


class FiniteGuard:
    """Counts skipped steps in a row, and notes which examples they had."""

    def __init__(self, workdir: str, limit: int):
        """Args: limit: skipped steps in a row at which the run stops; 0: never."""
        self._path = Path(workdir) / f"not_finite-{jax.process_index()}.json"
        self._limit = limit
        self._skipped: list[dict[str, Any]] = []

    def check(self, step: int, metrics: Any, batch: Any) -> None:
        """Look at a step that is done.

        Raises:
          NotFinite: `limit` steps in a row; the examples of each are then in a file.
        """
        if not self._limit or "skipped_share" not in metrics:
            return
        if not float(metrics["skipped_share"]):
            self._skipped.clear()
            return
        indices = np.asarray(batch["index"]).tolist() if "index" in batch else None
        self._skipped.append({"step": step, "indices": indices})
        if len(self._skipped) >= self._limit:
            write_atomic(self._path, (json.dumps(self._skipped) + "\n").encode())
            raise NotFinite(
                f"loss: not finite in {self._limit} steps in a row, {self._skipped[0]['step']} to {step}; none of them "
                f"changed the weights, their examples are listed in '{self._path}'; lower optim.learning_rate, set "
                "optim.clip_norm, or look at these examples (loop.max_skipped_steps)"
            )


class Meter:
    """Where the time of a run goes: waiting for data, arithmetic of the model, memory."""

    def __init__(self, flops_per_image: float | None = None, dtype: str = "float32"):
        """Args: flops_per_image: forward and backward; dtype: whose peak the utilization is of."""
        self._flops = flops_per_image
        peaks = device_peaks(jax.devices()[0].device_kind)
        self._peak = peaks.flops.get(dtype, 0.0) * jax.device_count() if peaks else 0.0
        self._waited, self._start = 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def restart(self) -> None:
        """What came before was no training."""
        self._waited, self._start = 0.0, time.monotonic()

    def measure(self, rates: dict[str, float]) -> dict[str, float]:
        """Figures since the last call, beside `rates`: "data_wait_share", memory in GiB, and arithmetic where counted.

        "mfu" is the share of the device's tabulated peak, for devices that the table knows.
        """
        elapsed = time.monotonic() - self._start
        found = {"data_wait_share": self._waited / elapsed if elapsed > 0 else 0.0}
        self.restart()
        found |= {name.replace("peak", "gib"): value / 2**30 for name, value in peak_memory().items()}
        if self._flops and "images_per_second" in rates:
            rate = self._flops * rates["images_per_second"]
            found["teraflops_per_second"] = rate / 1e12
            if self._peak:
                found["mfu"] = rate / self._peak
        return found


class Profiler:
    """A trace of some steps, for TensorBoard's profile tab or Perfetto, in `<workdir>/profile`."""

    def __init__(self, workdir: str, first_step: int, num_steps: int):
        """Args: num_steps: 0 traces nothing; first_step: counted from 1; a process that begins later begins there."""
        self._directory = Path(workdir) / "profile"
        self._first, self._count, self._left, self._has_begun = first_step, num_steps, 0, False

    def before(self, step: int) -> None:
        """A step, counted from 1, is about to begin."""
        if self._count and step >= self._first and not self._has_begun:
            jax.profiler.start_trace(self._directory)
            self._left, self._has_begun = self._count, True

    def after(self, metrics: Any) -> None:
        """A step was dispatched; the last one that is traced is waited for."""
        if self._left:
            self._left -= 1
            if not self._left:
                jax.block_until_ready(metrics)
                self._stop()

    def _stop(self) -> None:
        self._left = 0
        jax.profiler.stop_trace()
        logger.info("profile of %d steps: %s", self._count, self._directory)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._left:
            self._stop()
        elif self._count and not self._has_begun:
            logger.warning("no profile: the run ended before step %d (loop.profile_first_step)", self._first)

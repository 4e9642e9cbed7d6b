"""Run monitoring: hang watchdog, non-finite guard, throughput meter, profiler."""

import contextlib
import faulthandler
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
from rq_jax.files import write_json

COMPILE_FACTOR = 20  # allowance of a step that compiles

logger = logging.getLogger(__name__)


class NotFinite(ValueError):
    """Too many steps in a row were skipped because their loss or gradient is not finite."""


class HangGuard:
    """Watchdog: dumps the stacks of all threads to stderr and exits with code 1 when a step takes too long.

    `faulthandler` runs it in a thread outside the interpreter, which a collective that waits for a dead host cannot
    block.
    """

    def __init__(self, seconds: float):
        """Args: seconds: longest duration of a step; 0 turns the watchdog off."""
        self._seconds, self._factor = seconds, 1

    def expect_compilation(self) -> None:
        """Allow the next step the time of a compilation."""
        self._factor = COMPILE_FACTOR

    def arm(self) -> None:
        """Start the clock of a step."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds * self._factor, exit=True, file=sys.__stderr__ or 2)
            self._factor = 1

    def disarm(self) -> None:
        """Stop the clock, for work that is no step."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> "HangGuard":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disarm()


class FiniteGuard:
    """Counts skipped steps in a row and records their examples."""

    def __init__(self, workdir: str, limit: int):
        """Args: workdir: of the run; limit: skipped steps in a row at which the run stops, 0 for never."""
        self._path = Path(workdir) / f"not_finite-{jax.process_index()}.json"
        self._limit = limit
        self._skipped: list[dict[str, Any]] = []

    def check(self, step: int, metrics: Any, batch: Any) -> None:
        """Check the metrics of a finished step.

        Raises:
          NotFinite: `limit` steps in a row were skipped; a file then lists the examples of each.
        """
        if not self._limit or "skipped_share" not in metrics:
            return
        if not float(metrics["skipped_share"]):
            self._skipped.clear()
            return
        indices = np.asarray(batch["index"]).tolist() if "index" in batch else None
        self._skipped.append({"step": step, "indices": indices})
        if len(self._skipped) >= self._limit:
            write_json(self._path, self._skipped, indent=None)
            raise NotFinite(
                f"loss: not finite in {self._limit} steps in a row, {self._skipped[0]['step']} to {step}; none of them "
                f"changed the weights, their examples are listed in '{self._path}'; lower optim.learning_rate, set "
                "optim.clip_norm, or look at these examples (loop.max_skipped_steps)"
            )


class Meter:
    """Measures waiting for data, arithmetic throughput and memory."""

    def __init__(self, flops_per_image: float | None = None, dtype: str = "float32"):
        """Args: flops_per_image: of forward and backward pass; dtype: of the peak rate behind "mfu"."""
        self._flops = flops_per_image
        peaks = device_peaks(jax.devices()[0].device_kind)
        self._peak = peaks.flops.get(dtype, 0.0) * jax.device_count() if peaks else 0.0
        self._waited, self._start = 0.0, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager that counts its duration as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def restart(self) -> None:
        """Leave the time since the last measurement out: it was no training."""
        self._waited, self._start = 0.0, time.monotonic()

    def measure(self, rates: dict[str, float]) -> dict[str, float]:
        """Measure since the last call.

        Args:
          rates: of the same time, as `log.Rate` measures them.

        Returns:
          "data_wait_share" in [0, 1]; "process_gib" and, if the device reports it, "device_gib", peak memory; with
          `flops_per_image` also "teraflops_per_second", and for devices in the table "mfu", their share of the peak.
        """
        elapsed = time.monotonic() - self._start
        figures = {"data_wait_share": self._waited / elapsed if elapsed > 0 else 0.0}
        self.restart()
        figures |= {name.replace("peak", "gib"): value / 2**30 for name, value in peak_memory().items()}
        if self._flops and "images_per_second" in rates:
            rate = self._flops * rates["images_per_second"]
            figures["teraflops_per_second"] = rate / 1e12
            if self._peak:
                figures["mfu"] = rate / self._peak
        return figures


class Profiler:
    """Traces chosen steps into `<workdir>/profile`, for TensorBoard's profile tab or Perfetto."""

    def __init__(self, workdir: str, first_step: int, num_steps: int):
        """Set up without starting a trace.

        Args:
          workdir: of the run.
          first_step: first step to trace, counted from 1; a run that resumes after it traces from there.
          num_steps: number of steps to trace; 0 for none.
        """
        self._directory = Path(workdir) / "profile"
        self._first, self._count, self._left, self._has_begun = first_step, num_steps, 0, False

    def before(self, step: int) -> None:
        """Start the trace if it begins at this step, counted from 1; call it before each step."""
        if self._count and step >= self._first and not self._has_begun:
            jax.profiler.start_trace(self._directory)
            self._left, self._has_begun = self._count, True

    def after(self, metrics: Any) -> None:
        """End the trace after its last step, which is waited for; call it when a step has been dispatched."""
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

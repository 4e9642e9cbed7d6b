"""Metrics of a run: means over steps, rates, and writing them to disk."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.files import open_in_place, write_atomic
from rq_jax.report import page
from rq_jax.report.grids import encode_png
from rq_jax.training import monitor

logger = logging.getLogger(__name__)

METRICS_FILE = page.METRICS


class Rate:
    """Steps and images per second between two log points.

    Args:
      images_per_step: size of the global batch.
      step: steps done when measuring starts.
      clock: monotonic clock in seconds.
    """

    def __init__(self, images_per_step: int, step: int = 0, clock: Callable[[], float] = time.monotonic):
        self._images_per_step = images_per_step
        self._clock = clock
        self.restart(step)

    def restart(self, step: int) -> None:
        """Restart at `step`, after an evaluation or a checkpoint, whose time is no training."""
        self._step, self._time = step, self._clock()

    def measure(self, step: int) -> dict[str, float]:
        """Measure the rates since the last log point, and restart.

        Args:
          step: steps done so far; the device must have finished them, or the figures are too high.

        Returns:
          {"steps_per_second", "images_per_second"}; empty if there was no step in between.
        """
        steps, seconds = step - self._step, self._clock() - self._time
        self.restart(step)
        if steps <= 0 or seconds <= 0:
            return {}
        rate = steps / seconds
        return {"steps_per_second": rate, "images_per_second": rate * self._images_per_step}


class MetricWriter:
    """Writes scalars and images of a run to disk, with the interface of clu's metric writers.

    Writes `metrics.jsonl` (a line per call), `pictures/<name>_<step>.png`, the report `index.html`, and TensorBoard
    event files if tensorboardX is installed. A full or read-only disk costs metrics but never the run: one warning is
    logged, and each later call tries again.

    Args:
      directory: of the run.
      enabled: False writes nothing; of several processes only the first writes.
    """

    def __init__(self, directory: str | os.PathLike, enabled: bool = True):
        self._directory = Path(directory)
        self._enabled = enabled
        self._use_events = enabled and importlib.util.find_spec("tensorboardX") is not None
        self._events: _EventFile | None = None
        self._first_step: int | None = None
        self._warned = False

    def truncate_after(self, step: int, without: str | None = None) -> None:
        """Drop the metrics of later steps, before a run resumes at `step`.

        Args:
          step: last step whose lines stay. TensorBoard hides the events of later steps.
          without: also drop the lines of `step` itself that have this name; their events stay.
        """
        if not self._enabled:
            return
        self.close()
        self._first_step = step + 1
        path = self._directory / METRICS_FILE
        with self._tolerate_full_disk():
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                retained = [line for line in lines if _position_of(line, without) <= (step, False)]
                if retained == lines[: len(retained)]:
                    with open_in_place(path) as file:
                        file.truncate(sum(map(len, retained)))  # needs no room on a full disk
                else:  # unreadable lines in between
                    write_atomic(path, b"".join(retained))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write scalars.

        Args:
          step: that they belong to.
          scalars: name -> number or array of one number; non-finite ones become "nan", "inf" or "-inf".

        Raises:
          ValueError: a value that is not one number, or the name "step".
        """
        if not self._enabled:
            return
        values = {name: _number(name, value) for name, value in scalars.items()}
        record = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with self._tolerate_full_disk():
            _append_line(self._directory / METRICS_FILE, json.dumps({"step": int(step), **record}))
        self._add_events(step, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Write a PNG file per image.

        Args:
          step: that they belong to.
          images: name -> uint8 (H, W, C) with C 1 or 3; file names have "_" in place of "/" and the like.

        Raises:
          ValueError: another dtype or shape.
        """
        if not self._enabled:
            return
        for name, image in images.items():
            png = encode_png(image)
            file_name = f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}_{int(step):08d}.png"
            with self._tolerate_full_disk():
                write_atomic(self._directory / "pictures" / file_name, png)
            size = dict(zip(("height", "width", "colorspace"), np.shape(image), strict=True))
            self._add_events(step, [{"tag": name, "image": {**size, "encoded_image_string": png}}])

    def write_page(self) -> None:
        """Write the report of the run as it stands, `index.html` in its directory."""
        if self._enabled:
            with self._tolerate_full_disk():
                try:
                    page.write_page([self._directory], self._directory / page.PAGE)
                except ValueError as error:  # a log that somebody else wrote into
                    logger.warning("no report of %s: %s", self._directory, error)

    def flush(self) -> None:
        """Flush TensorBoard events; nothing else is buffered."""
        with self._tolerate_full_disk():
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Flush and close the event file; a later write opens a new one."""
        events, self._events = self._events, None
        with self._tolerate_full_disk():
            if events is not None:
                events.close()

    def _add_events(self, step: int, values: list[dict[str, Any]]) -> None:
        if not self._use_events:
            return
        # None until the write succeeds: a file with a torn record must not be written to again.
        events, self._events = self._events, None
        with self._tolerate_full_disk():
            events = events or _EventFile(self._directory, self._first_step)
            events.add(step, summary={"value": values})
            self._events, self._first_step = events, None

    @contextlib.contextmanager
    def _tolerate_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("Cannot write metrics to %s: %s. The run goes on.", self._directory, error)
            self._warned = True


class _EventFile:
    """TensorBoard events, written in the calling thread.

    tensorboardX's SummaryWriter has a writing thread, which dies on a full disk: its queue fills, and the run hangs.
    """

    def __init__(self, directory: Path, first_step: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        directory.mkdir(parents=True, exist_ok=True)
        self._event_type = Event
        # The library's file names have whole seconds: another file of the same second would replace this one.
        self._writer = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        if first_step is not None:
            self.add(first_step, session_log={"status": "START"})

    def add(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event_type(wall_time=time.time(), step=int(step), **content))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _append_line(path: Path, line: str) -> None:
    """Append a line, after cutting off one that a killed run or a full disk left unfinished."""
    with open_in_place(path) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())


def _position_of(line: bytes, name: str | None) -> tuple[float, bool]:
    """Step of a line of the log, infinite for an unreadable one, and whether the line has `name`."""
    try:
        record = json.loads(line)
        return (record["step"], name in record) if isinstance(record["step"], int) else (math.inf, False)
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf, False


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError("metric 'step': the name is reserved for the step of a line; choose another")
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        raise ValueError(f"metric '{name}': {value!r} is not one number; give a scalar") from None


class StepLog:
    """Means of the metrics since the last log point, with the rates of these steps."""

    def __init__(self, writer: MetricWriter, summarize: Callable[[Any], dict], rate: Rate, meter: monitor.Meter):
        self._writer, self._summarize, self._rate, self._meter = writer, summarize, rate, meter
        self._sum, self._count = None, 0

    def add(self, metrics: Any) -> None:
        """Add the metrics of one step, which stay on the devices."""
        self._sum = metrics if self._sum is None else _add(self._sum, metrics)
        self._count += 1

    def write(self, step: int) -> dict[str, float]:
        """Write and return means and rates since the last log point, and restart; waits for the last step."""
        means = jax.tree.map(lambda x: np.asarray(x) / self._count, self._sum)
        rates = self._rate.measure(step)
        shown = {**self._summarize(means), **rates, **self._meter.measure(rates)}
        self._writer.write_scalars(step, shown)
        self._sum, self._count = None, 0
        return shown

    def restart(self, step: int) -> None:
        """Leave the time since the last log point out of the rates: it was no training."""
        self._rate.restart(step)
        self._meter.restart()


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y, a, b)

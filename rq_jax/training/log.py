"""Metrics of a run on disk, and its rates."""

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

from rq_jax.files import write_atomic
from rq_jax.report.grids import encode_png
from rq_jax.training import monitor

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Rate:
    """Steps and images per second between two log points.

    Args:
      images_per_step: images that one step of the whole run works on (the global batch).
      step: steps done when measuring starts.
      clock: seconds that never run backwards.
    """

    def __init__(self, images_per_step: int, step: int = 0, clock: Callable[[], float] = time.monotonic):
        self._images_per_step = images_per_step
        self._clock = clock
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts anew at `step`: call it after an evaluation or a checkpoint, whose time is not training."""
        self._step, self._time = step, self._clock()

    def measure(self, step: int) -> dict[str, float]:
        """Gives the rates since the last log point, and starts anew.

        Args:
          step: steps done so far; the device must have finished them, or the figures are too high.

        Returns:
          {"steps_per_second", "images_per_second"}; empty where no step was made in between.
        """
        steps, seconds = step - self._step, self._clock() - self._time
        self.restart(step)
        if steps <= 0 or seconds <= 0:
            return {}
        rate = steps / seconds
        return {"steps_per_second": rate, "images_per_second": rate * self._images_per_step}


class MetricWriter:
    """Scalars, pictures and hyperparameters of a run on disk, with the interface of clu's metric writers.

    Writes `metrics.jsonl` (a line per call), `pictures/<name>_<step>.png`, `hparams.json`, and event files
    for TensorBoard where tensorboardX is installed. A disk that is full or read-only costs metrics but never
    the run: one warning is logged, and each later call tries again.

    Args:
      directory: the run's directory.
      enabled: False writes nothing; of several hosts only the first writes.
    """

    def __init__(self, directory: str | os.PathLike, enabled: bool = True):
        self._directory = Path(directory)
        self._enabled = enabled
        self._use_events = enabled and importlib.util.find_spec("tensorboardX") is not None
        self._events = None
        self._first_step = None
        self._warned = False

    def truncate_after(self, step: int, without: str | None = None) -> None:
        """Drops what was logged after `step`; a run that resumes there calls it before it writes.

        Args:
          step: last step whose lines stay. TensorBoard hides the events of later steps.
          without: lines of `step` itself that have this name go too; of events they stay.
        """
        if not self._enabled:
            return
        self.close()
        self._first_step = step + 1
        path = self._directory / METRICS_FILE
        with self._tolerate_full_disk():
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if _place_of(line, without) <= (step, False)]
                if kept == lines[: len(kept)]:
                    os.truncate(path, sum(map(len, kept)))  # needs no room on a full disk
                else:  # lines in between that nobody can read
                    write_atomic(path, b"".join(kept))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs scalars.

        Args:
          step: the step they belong to.
          scalars: name -> number or array of one number; not finite becomes "nan", "inf" or "-inf".

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
        """Writes a PNG file per picture.

        Args:
          step: the step they belong to.
          images: name -> uint8 (H, W, C) with C 1 or 3; a file's name has "_" for "/" and the like.

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

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the run's hyperparameters.

        Args:
          hparams: name -> whatever JSON holds; other values are written as their text.
        """
        if not self._enabled:
            return
        text = json.dumps(hparams, indent=2, default=str)
        with self._tolerate_full_disk():
            write_atomic(self._directory / "hparams.json", f"{text}\n".encode())
        tensor = {"dtype": "DT_STRING", "string_val": [f"```\n{text}\n```".encode()]}
        is_text = {"plugin_data": {"plugin_name": "text"}}
        self._add_events(0, [{"tag": "hparams", "tensor": tensor, "metadata": is_text}])

    def flush(self) -> None:
        """Puts buffered TensorBoard events on disk; everything else is there as soon as it is written."""
        with self._tolerate_full_disk():
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Flushes and closes the event file; a later write opens a new one."""
        events, self._events = self._events, None
        with self._tolerate_full_disk():
            if events is not None:
                events.close()

    def _add_events(self, step: int, values: list[dict[str, Any]]) -> None:
        if not self._use_events:
            return
        # Taken out until the write succeeds: an event file with a torn record is never written to again.
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

    tensorboardX's SummaryWriter gives them to a thread of its own, which dies on a full disk: its queue fills
    and the run waits for ever.
    """

    def __init__(self, directory: Path, first_step: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        directory.mkdir(parents=True, exist_ok=True)
        self._event_type = Event
        # The library's file names count whole seconds: a file made in the same second would replace this one.
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
    """Appends a line, first cutting off one that a killed run or a full disk left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())


def _place_of(line: bytes, name: str | None) -> tuple[float, bool]:
    """The step of a line of the log, infinite for a line that nobody can read, and whether the line has `name`."""
    try:
        record = json.loads(line)
        return record["step"], name in record
    except (ValueError, KeyError, TypeError):
        return math.inf, False


def _number(name: str, value: Any) -> float:
    if name == "step":
        raise ValueError('metric named "step": that name holds the step of the line, choose another')
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        raise ValueError(f"metric {name}={value!r} is not one number: give a scalar") from None


class StepLog:
    """Means of the metrics since the last log point, with the rates of these steps."""

    def __init__(self, writer: MetricWriter, summarize: Callable[[Any], dict], rate: Rate, meter: monitor.Meter):
        self._writer, self._summarize, self._rate, self._meter = writer, summarize, rate, meter
        self._sum, self._count = None, 0

    def add(self, metrics: Any) -> None:
        """Of one step; stays on the devices."""
        self._sum = metrics if self._sum is None else _add(self._sum, metrics)
        self._count += 1

    def write(self, step: int) -> dict[str, float]:
        """Write what `step` steps came to, return it and start anew; waits for the last of them."""
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

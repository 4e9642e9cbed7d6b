"""Progress bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TextIO

LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

logger = logging.getLogger(__name__)


class Progress:
    """Progress bar over training steps or images: count, rate, time left and a few scalars.

    On a terminal it is tqdm's bar; elsewhere (a log file, a batch queue) a plain line every `line_seconds`.

    Args:
      total: count at which the work is done; None if unknown.
      start: count done by an earlier run, which the rate leaves out.
      unit: of the count, such as "step" or "image".
      title: text in front of the bar.
      enabled: False shows nothing; of several processes only the first shows a bar.
      line_seconds: seconds between two lines without a terminal.
      stream: to show it on; None is stderr.
      leave: False removes the bar at the end, and shows none for work that takes less than two seconds; without a
        terminal it omits the last line.
    """

    def __init__(
        self,
        total: int | None,
        start: int = 0,
        unit: str = "step",
        title: str = "",
        enabled: bool = True,
        line_seconds: float = 30.0,
        stream: TextIO | None = None,
        leave: bool = True,
    ):
        from tqdm import tqdm

        stream = sys.stderr if stream is None else stream
        common = {"total": total, "initial": start, "unit": f" {unit}", "desc": title, "file": stream, "leave": leave}
        if not enabled:
            self._bar = None
        elif _has_width(stream):
            self._bar = tqdm(mininterval=0.5, dynamic_ncols=True, delay=0.0 if leave else 2.0, **common)
        else:
            self._bar = _Lines(tqdm.format_meter, line_seconds, **common)

    def update(self, count: int = 1, **scalars: float) -> None:
        """Count finished work.

        Args:
          count: to add.
          **scalars: to show beside the bar from now on; numbers of the host, since device arrays would be waited for.
        """
        if self._bar is None:
            return
        if scalars:
            self._bar.set_postfix({name: float(value) for name, value in scalars.items()}, refresh=False)
        self._bar.update(count)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Show what the work waits for, such as "compiling", and leave that time out of the rate and the time left."""
        if (bar := self._bar) is None:
            yield
            return
        before, start = bar.postfix, time.monotonic()
        bar.set_postfix_str(what)
        yield
        bar.last_print_t += time.monotonic() - start  # where the next rate is measured from
        bar.set_postfix_str(before or "", refresh=False)
        bar.refresh()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        """Show the last count and end the line; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Lines:
    """The part of tqdm's interface that `Progress` needs, for a stream that is no terminal."""

    def __init__(
        self,
        format_meter: Callable[..., str],
        seconds: float,
        initial: int,
        desc: str,
        file: TextIO,
        leave: bool,
        **meter: Any,
    ):
        self.fp = file
        self._format = partial(format_meter, bar_format=LINE_FORMAT, initial=initial, prefix=desc, **meter)
        self._seconds, self._leave = seconds, leave
        self._count, self.postfix = initial, ""
        self._start = self.last_print_t = time.monotonic()
        self._shown_count = initial

    def set_postfix(self, scalars: Mapping[str, float], refresh: bool) -> None:
        self.postfix = ", ".join(f"{name}={value:.4g}" for name, value in scalars.items())

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text
        if refresh:
            self._show()

    def refresh(self) -> None:
        """Nothing: a bar is drawn again in its place, a line would be one more."""

    def update(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self.last_print_t >= self._seconds:
            self._show()

    def write(self, text: str, file: TextIO) -> None:
        file.write(f"{text}\n")
        file.flush()

    def close(self) -> None:
        if self._leave:
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        # The rate since the last line: one since the start would carry compilation in the time left for ever.
        rate = (self._count - self._shown_count) / max(now - self.last_print_t, 1e-9)
        elapsed = now - self._start
        line = self._format(n=self._count, elapsed=elapsed, rate=rate or None, postfix=self.postfix)
        self.write(line, self.fp)
        self.last_print_t, self._shown_count = now, self._count


def _has_width(stream: TextIO) -> bool:
    """Whether a bar can be drawn: the stream is a terminal, and has columns, which a container's may lack."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0

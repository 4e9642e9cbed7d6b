"""Run the scripts of this checkout as a reader would."""

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def shown_command(line: Sequence[str]) -> str:
    """A script, or `-m` and a module, with its options, as a reader would type them."""
    return " ".join(["python", *(f'"{part}"' if re.search(r"[\s()]", part) else part for part in line)])


def run_script(script: str, *options: Any) -> str:
    """Run a script of this checkout; returns the command as a reader would type it.

    Raises:
      SystemExit: with the script's exit code, where it failed or was interrupted; it has printed why.
    """
    line = [script, *map(str, options)]
    shown = shown_command(line)
    print(f"$ {shown}", flush=True)
    # In a process group of its own, the script gets Ctrl-C from here alone and once, so that it can save its step.
    process = subprocess.Popen([sys.executable, *line], cwd=ROOT, process_group=0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, frame: process.send_signal(got)) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return shown

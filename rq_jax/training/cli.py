"""Command lines: flags of the training scripts, errors in one line, a cache of compiled programs."""

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from rq_jax.devices import hosts


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are raised, so that they end in one line as every other mistake does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def main(train_and_evaluate: Callable[..., Any]) -> None:
    """Runs a training script: --config=<file>:<preset> --workdir=<dir> [--config.x.y=...] [--strict].

    A mistake of the user ends in one line and exit code 2.

    Args:
      train_and_evaluate: (config, workdir, strict=False) -> anything.
    """
    from absl import app, flags
    from absl import logging as absl_logging
    from ml_collections import config_flags

    config = config_flags.DEFINE_config_file("config", None, "configs/<file>.py:<preset>", lock_config=True)
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run.")
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX cannot find it.")
    num_processes = flags.DEFINE_integer("num_processes", None, "Processes of the run; with --coordinator.")
    process_id = flags.DEFINE_integer("process_id", None, "Number of this process; with --coordinator.")
    heartbeat = flags.DEFINE_integer("heartbeat_seconds", 100, "Silence of a process after which the others end.")
    strict = flags.DEFINE_bool("strict", False, "Stop at a damaged checkpoint instead of resuming from the one before.")
    flags.mark_flags_as_required(["config", "workdir"])

    def run(argv: list[str]) -> None:
        del argv
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every file that it writes
        logging.getLogger("rq_jax.training.loop").setLevel(logging.INFO)
        keep_compiled_programs()
        with one_line_errors():
            hosts.join(coordinator.value, num_processes.value, process_id.value, heartbeat.value)
            train_and_evaluate(config.value, workdir.value, **({"strict": True} if strict.value else {}))

    app.run(run, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses absl's flags; a config override with an unknown key or of the wrong type ends in one line."""
    from absl import flags

    with one_line_errors(TypeError, flags.Error):
        try:
            return flags.FLAGS(argv)
        except (KeyError, AttributeError) as error:
            cause: BaseException = error
            while isinstance(cause.args[0], Exception):  # ml_collections wraps one in the other
                cause = cause.args[0]
            key = cause.args[0].splitlines()[0].split("lookup: ")[-1].strip("'")
            given = next((arg for arg in argv if re.match(rf"--config\.(.*\.)?{re.escape(key)}\b", arg)), key)
            raise flags.Error(f"{given}: the config has no key '{key}'; its keys stand in the config file") from None


def keep_compiled_programs() -> None:
    """Caches compiled programs between processes: in `JAX_COMPILATION_CACHE_DIR` if set, else ~/.cache/rq_jax/jax."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "rq_jax" / "jax"))


@contextlib.contextmanager
def one_line_errors(*more: type[Exception]):
    """Ends the process with one line and exit code 2 for a mistake of the user; RQ_JAX_TRACEBACK=1 shows the traceback.

    Args:
      *more: exceptions that count as one, beside ValueError, OSError and MemoryError.
    """
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError, MemoryError, *more)
    try:
        yield
    except mistakes as error:
        if os.environ.get("RQ_JAX_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None

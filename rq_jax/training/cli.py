"""Command lines: flags of the training scripts, paths, devices, errors in one line, a cache of compiled programs."""

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from rq_jax import checkpoint, files
from rq_jax.devices import hosts
from rq_jax.files import local_path
from rq_jax.settings.text import quoted


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are raised, so that they end in one line as every other mistake does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def path(text: str) -> str:
    """The value of a path flag, for `type=` of argparse: `files.local_path` as text.

    Raises:
      argparse.ArgumentTypeError: an empty path, or the home directory of an unknown user.
    """
    if not text:
        raise argparse.ArgumentTypeError("empty; give a path")
    try:
        return str(local_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_path(text: str) -> str:
    """The value of a flag that names a run directory: as `path`, or an address in an object store.

    Raises:
      argparse.ArgumentTypeError: as `path`, or a malformed address, or a package that it needs is missing.
    """
    try:
        return str(files.run_path(text)) if files.is_remote(text) else path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_path(text: str) -> str:
    """The value of a flag that names a model: as `run_path`, or an address of the Hub, which stays as it is."""
    return text if checkpoint.is_address(text) else run_path(text)


def per_depth(kind: type) -> Callable[[str], Any]:
    """The value of a flag with one number, or one per code depth separated by commas, for `type=` of argparse."""

    def number(text: str) -> Any:
        values = [kind(part) for part in text.split(",")]
        return values[0] if len(values) == 1 else values

    return number


def main(train_and_evaluate: Callable[..., Any], presets: Mapping[str, Iterable[str]] | None = None) -> None:
    """Runs a training script: --config=<file>:<preset> --workdir=<dir> [--config.x.y=...] [--strict].

    A mistake of the user ends in one line and exit code 2.

    Args:
      train_and_evaluate: (config, workdir, strict=False) -> anything.
      presets: config file -> its presets, for --help.
    """
    from absl import app, flags
    from absl import logging as absl_logging
    from ml_collections import config_flags

    with one_line_errors(flags.Error):  # a --flagfile is read here
        config = config_flags.DEFINE_config_file("config", None, _config_help(presets or {}), lock_config=True)
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory of the run, here or in an object store, as gs://bucket/run."
    )
    coordinator = flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX cannot find it.")
    num_processes = flags.DEFINE_integer("num_processes", None, "Processes of the run; with --coordinator.")
    process_id = flags.DEFINE_integer("process_id", None, "Number of this process; with --coordinator.")
    heartbeat = flags.DEFINE_integer("heartbeat_seconds", 100, "Silence of a process after which the others end.")
    strict = flags.DEFINE_bool("strict", False, "Stop at a damaged checkpoint instead of resuming from the one before.")
    flags.mark_flags_as_required(["config", "workdir"])
    for holder in (config, workdir, coordinator, num_processes, process_id, heartbeat, strict):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])  # listed by --help

    def run(argv: list[str]) -> None:
        del argv
        absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every file that it writes
        logging.getLogger("rq_jax").setLevel(logging.INFO)
        with one_line_errors():
            try:
                directory = run_path(workdir.value or "")
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"--workdir: {error}") from None
            hosts.join(coordinator.value, num_processes.value, process_id.value, heartbeat.value)
            start()
            train_and_evaluate(config.value, directory, **({"strict": True} if strict.value else {}))

    app.run(run, flags_parser=_parse_flags)


def _config_help(presets: Mapping[str, Iterable[str]]) -> str:
    listed = "".join(f" Presets of {file}: {', '.join(names)}." for file, names in presets.items())
    return (
        "<file>:<preset>, or <file>:<preset>,quicktest for four steps on the bundled images. --config.x.y=<value> sets "
        f"a key of the config, --config.x.y=None unsets it.{listed}"
    )


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses absl's flags; a mistake in a config file, its preset or an override ends in one line."""
    from absl import flags

    with one_line_errors(TypeError, flags.Error):
        _accept_none()
        argv, file = _with_config_file(argv)
        try:
            return flags.FLAGS(argv)
        except SyntaxError as error:
            raise flags.Error(f"--config: {quoted(file)} is no config file: {error}") from None
        except (KeyError, AttributeError) as error:
            raise flags.Error(_missing_name(error, argv, file)) from None
        except flags.IllegalFlagValueError as error:
            if "Error whilst parsing config file" not in str(error):
                raise
            cause: BaseException = error  # ml_collections puts the traceback of the config file into its message
            while cause.__context__ is not None:
                cause = cause.__context__
            raise flags.Error(f"--config: {cause}") from None


def _accept_none() -> None:
    """Lets --config.x.y=None unset a key of any type; in quotes of its own, 'None' stays a text."""
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags import tuple_parser

    class OrNone(flags.ArgumentParser):
        def __init__(self, parser: flags.ArgumentParser):
            self._parser = parser

        def parse(self, argument: Any) -> Any:
            if argument == "None":
                return None
            return self._parser.parse("None" if argument in ("'None'", '"None"') else argument)

        def flag_type(self) -> str:
            return self._parser.flag_type()

    parsers = {
        bool: flags.BooleanParser(), int: flags.IntegerParser(), float: flags.FloatParser(),
        str: flags.ArgumentParser(), tuple: tuple_parser.TupleParser(),
    }  # fmt: skip
    for kind, parser in parsers.items():
        config_flags.register_flag_parser_for_type(kind, OrNone(parser))


def _with_config_file(argv: list[str]) -> tuple[list[str], str]:
    """The arguments with the path of the config file as a user means it, and the file.

    Raises:
      ValueError: no such file.
    """
    for i, argument in enumerate(argv):
        if match := re.fullmatch("--?config(=.*)?", argument, re.DOTALL):
            used = 1 if match[1] else 2
            value = match[1][1:] if match[1] else "".join(argv[i + 1 : i + 2])
            name, colon, preset = value.partition(":")
            file = local_path(name)
            if not file.is_file():
                raise ValueError(f"--config: {quoted(name)} is no file, seen from '{Path.cwd()}'; give <file>:<preset>")
            return [*argv[:i], f"--config={file}{colon}{preset}", *argv[i + used :]], str(file)
    return argv, ""


def _missing_name(error: Exception, argv: list[str], file: str) -> str:
    """The error of an override whose key is not in the config, or of a file that makes none."""
    cause: BaseException = error
    while isinstance(cause.args[0], Exception):  # ml_collections wraps one in the other
        cause = cause.args[0]
    if "has no attribute 'get_config'" in str(cause):
        return f"--config: {quoted(file)} is no config file: it has no function get_config"
    key = cause.args[0].splitlines()[0].split("lookup: ")[-1].strip("'")
    given = next((argument for argument in argv if re.match(rf"--config\.(.*\.)?{re.escape(key)}\b", argument)), key)
    return f"{given}: the config has no key '{key}'; its keys stand in the config file"


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that several processes run as one; see `join`."""
    parser.add_argument(
        "--coordinator", type=_address, help="host:port of process 0, where JAX cannot find the other processes"
    )
    parser.add_argument("--num_processes", type=int, help="processes of the run; with --coordinator")
    parser.add_argument("--process_id", type=int, help="number of this process; with --coordinator")


def _address(text: str) -> str:
    try:
        hosts.check_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def join(args: argparse.Namespace) -> None:
    """Joins the other processes of a command, if any, with the flags of `add_process_flags`; to be called first."""
    hosts.join(args.coordinator, args.num_processes, args.process_id)


def start() -> None:
    """Prepares JAX for a command: its cache of compiled programs and its devices."""
    keep_compiled_programs()
    find_devices()


def find_devices() -> None:
    """Starts JAX's backend.

    Raises:
      ValueError: the platform that is asked for is unknown, not installed, or has no device.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a platform's plugin is not installed
        reason = quoted(" ".join(str(error).split()) or "it is not installed", 300)
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        setting = "devices: none" if asked is None else f"JAX_PLATFORMS: {quoted(asked)}"
        fix = "install jax[cuda13] or jax[tpu], or set JAX_PLATFORMS=cpu, or unset it to take what is there"
        raise ValueError(f"{setting} cannot be used ({reason}); {fix}") from None


def keep_compiled_programs() -> None:
    """Caches compiled programs between processes: in `JAX_COMPILATION_CACHE_DIR` if set, else ~/.cache/rq_jax/jax."""
    directory = jax.config.jax_compilation_cache_dir or "~/.cache/rq_jax/jax"  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(local_path(directory)))


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

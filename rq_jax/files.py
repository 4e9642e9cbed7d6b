"""Paths and addresses of object stores, atomic writes, JSON records, and the lock of a run directory."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from rq_jax.settings.text import quoted

LOCK = "lock.json"
STORES = ("gs://", "s3://")
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")
_STORE_ADDRESS = re.compile(r"(gs|s3)://[\w.-]+(/[\w.~+=@%,#-]+)*")  # neither a glob nor Orbax give these a meaning


def local_path(path: str | os.PathLike) -> Path:
    """A path as a user writes it: `~` and `~name` stand for home directories.

    Raises:
      ValueError: the home directory of an unknown user, or an address.
    """
    if _ADDRESS.match(os.fspath(path)):
        raise ValueError(f"{quoted(os.fspath(path))} is an address; give a path on this machine, of a mount or a copy")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"'{path}': no home directory is known for it; write ./{path} for a file of that name"
        ) from None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in an object store, as Cloud Storage is one."""
    return os.fspath(path).startswith(STORES)


def run_path(path: str | os.PathLike) -> Path:
    """A directory that Orbax can use: an absolute path, or of an address an `epath.Path`, which has a path's methods.

    Raises:
      ValueError: as `local_path`; an address that is malformed, or needs a package that is not installed.
    """
    if not is_remote(path):
        return local_path(path).absolute()
    if not _STORE_ADDRESS.fullmatch(address := os.fspath(path).rstrip("/")):
        fix = f"give {' or '.join(f'{scheme}bucket/directory' for scheme in STORES)}, of letters, digits and ._-"
        raise ValueError(f"{quoted(address)} is no address of a directory; {fix}")
    filesystem(address)
    from etils import epath

    return epath.Path(address)  # type: ignore[return-value]


def filesystem(path: str | os.PathLike) -> Any:
    """The filesystem of fsspec that an address belongs to.

    Raises:
      ValueError: it needs a package that is not installed.
    """
    import fsspec

    for name in ("gcs", "s3"):  # TensorStore writes there too, of which a cache of listings would not know
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    try:
        return fsspec.core.url_to_fs(os.fspath(path))[0]
    except ImportError:
        package, extra = ("gcsfs", "gcs") if os.fspath(path).startswith("gs://") else ("s3fs", "s3")
        fix = f"run pip install 'rq_jax[{extra}]'"
        raise ValueError(f"{quoted(os.fspath(path))} needs the package {package}; {fix}") from None


def remove_tree(path: Path) -> None:
    """Delete a directory with all that is in it; `path` is a `run_path`."""
    if is_remote(path):
        filesystem(path).rm(os.fspath(path), recursive=True)
    else:
        shutil.rmtree(path)


def move_tree(path: Path, target: Path) -> None:
    """Rename a directory; both are `run_path`s. In an object store, which has no directories, object by object."""
    if is_remote(path):
        filesystem(path).mv(os.fspath(path), os.fspath(target), recursive=True)
    else:
        os.rename(path, target)


def sizes_below(directory: Path) -> dict[str, int]:
    """Size in bytes of every file below a directory, by relative path; `directory` is a `run_path`."""
    if is_remote(directory):
        address = os.fspath(directory)
        found, root = filesystem(address).find(address, detail=True), f"{address.partition('://')[2]}/"
        return {name.removeprefix(root): info["size"] for name, info in found.items() if not name.endswith("/")}
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


class RunLock:
    """Exclusive lock on a directory; the operating system releases it when the process ends, however it ends.

    The lock file names its holder (host, pid, since when). It stays when the lock is released: deleting it would let
    two processes lock two files of the same name.

    Raises:
      ValueError: on entering, where another process holds the lock.
      OSError: on entering, where the directory cannot be written, or the lock file is a symbolic link.
    """

    def __init__(self, directory: str | os.PathLike, setting: str = "workdir", other: str = "another --workdir"):
        """Args: directory: to lock; setting, other: the setting that named it and the alternative, for errors."""
        self._path, self._setting, self._other = Path(directory) / LOCK, setting, other
        self._file: int | None = None

    def __enter__(self) -> "RunLock":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = describe_holder(os.read(file, 4096))
            os.close(file)
            raise ValueError(
                f"{self._setting}: '{self._path.parent}' is in use by {other}; wait for it, stop it, or give "
                f"{self._other}"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{json.dumps(holder())}\n".encode(), 0)
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)


def holder() -> dict[str, Any]:
    """What a lock says of this process."""
    since = datetime.now().astimezone().isoformat("T", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def describe_holder(content: bytes) -> str:
    """The process that the content of a lock names, in words."""
    try:
        named = parse_json(content, LOCK)
        return quoted(f"process {named['pid']} on {named['host']} since {named['since']}", 200)[1:-1]
    except (ValueError, KeyError):
        return "another process"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary file to write, which becomes `path` when the block ends, or is deleted when it fails.

    For libraries that write to a file name; bytes go to `write_atomic`.

    Args:
      path: the file to write; an older one stays until the new one is whole. Its directory is created if missing.

    Yields:
      The name of an empty file beside it.

    Raises:
      OSError: the disk is full, or the directory cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    # O_EXCL refuses a name that exists, a symbolic link included, so that nobody chooses where the bytes go.
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        mode = os.fstat(file).st_mode & 0o777  # what the umask leaves of 0o666
        os.close(file)
        yield partial
        if partial.stat().st_mode & 0o777 != mode:  # safetensors puts another file there, for its owner alone
            partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write a file whole or not at all, creating its directory if missing.

    Args:
      path: file to write, or an address in an object store; an older one stays until the new one is whole.
      data: its content.

    Raises:
      OSError: the disk is full, or the directory cannot be written; nothing half written is left.
    """
    if is_remote(path):
        run_path(path).write_bytes(data)  # becomes visible when it is whole
        return
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def open_in_place(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read, append to and cut, created if missing with its directory; never through a symbolic link.

    Raises:
      OSError: the file is a symbolic link, or cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def write_json(path: str | os.PathLike, record: Any, indent: int | None = 1) -> None:
    """Write a record as JSON, whole or not at all; `indent=None` writes it in one line.

    Raises:
      OSError: as `write_atomic`.
      TypeError: a value that JSON does not hold.
    """
    write_atomic(path, (json.dumps(record, indent=indent) + "\n").encode())


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """Read a JSON file that holds a value of one kind.

    Args:
      path: the file.
      kind: `dict` or `list`.

    Raises:
      OSError: the file cannot be read.
      ValueError: as `parse_json`, or a pipe or device, which might never end.
    """
    file = run_path(path) if is_remote(path) else Path(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"'{path}' is no regular file")
    return parse_json(file.read_bytes(), f"'{path}'", kind)


def parse_json(data: bytes | str, name: str, kind: type = dict) -> Any:
    """Parse JSON that holds a value of one kind.

    Args:
      data: UTF-8, with or without a byte order mark.
      name: of the source, for messages.
      kind: `dict` or `list`.

    Raises:
      ValueError: not JSON, nested too deeply, a key that stands twice, or a value of another kind.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{name} is not readable JSON: {reason}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{name} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!a} stands twice")
    return members

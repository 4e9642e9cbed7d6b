"""Files written whole or not at all, and one writer at a time in a directory."""

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

LOCK = "lock.json"


class RunLock:
    """Held while a run writes to its directory; the operating system lets go of it when the process ends, anyhow.

    The file names who holds it (host, pid, since when) and stays; only the lock on it counts.

    Raises:
      ValueError: on entering, where another process holds it.
      OSError: the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, setting: str = "workdir", other: str = "another --workdir"):
        """Args: setting: that named the directory; other: what to give in its place."""
        self._path, self._setting, self._other = Path(directory) / LOCK, setting, other
        self._file: int | None = None

    def __enter__(self) -> "RunLock":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _describe(os.read(file, 4096))
            os.close(file)
            raise ValueError(
                f"{self._setting}: '{self._path.parent}' is in use by {holder}; wait for it, stop it, or give "
                f"{self._other}"
            ) from None
        since = datetime.now().astimezone().isoformat("T", "seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.ftruncate(file, 0)
        os.pwrite(file, f"{json.dumps(owner)}\n".encode(), 0)
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)


def _describe(content: bytes) -> str:
    try:
        owner = json.loads(content)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file whole or not at all, making its directory where it is missing.

    Args:
      path: file to write; an older one stays until the new one is complete.
      data: what the file shall hold.

    Raises:
      OSError: the disk is full or may not be written; nothing half written is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

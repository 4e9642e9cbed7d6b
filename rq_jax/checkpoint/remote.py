"""Run directories in an object store: `gs://bucket/run`, `s3://bucket/run`.

Checkpoints lie there alone: Orbax writes and reads them, each process what its devices hold. All else of a run is small
and made of files (a log that is appended to, images, the copy of the tokenizer): it has a copy on this machine, which
is pulled before it is read, and pushed by the run that writes it.

An object store has no lock. A run that starts puts its name into lock.json there, and looks at each push whether it
still stands: of two runs in one directory the later one goes on, and the earlier one ends before its next checkpoint.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self

import jax

from rq_jax.files import (
    LOCK,
    RunLock,
    atomic_path,
    describe_holder,
    filesystem,
    holder,
    is_remote,
    local_path,
    parse_json,
    read_json,
    run_path,
    write_atomic,
    write_json,
)
from rq_jax.settings.text import quoted

# Of the copy alone: where it is from, and which of its files are as they are there.
_ADDRESS, _SYNCED = "address.txt", "synced.json"
_CHECKPOINTS = ("checkpoints", "best", "damaged", "amended.json")
_CACHES = ("latents", "codes")  # large, and made again where they are missing
_THREADS = 8

logger = logging.getLogger(__name__)


def local_copy(address: str | os.PathLike) -> Path:
    """The copy of a run or model directory in an object store as it stands there now, without its checkpoints.

    Raises:
      ValueError: a malformed address, or a package that it needs is missing.
      OSError: it cannot be read.
    """
    copy = _Copy(address)
    copy.pull()
    return copy.directory


def checkpoints_of(directory: Path) -> Path:
    """Where the checkpoints of a run directory are: of a copy in the object store, else in `directory` itself."""
    path = directory / _ADDRESS
    return run_path(path.read_text(encoding="utf-8")) if path.is_file() else directory


class RunDirectory:
    """A run directory for the run that writes it: locked, and pulled and pushed where it lies in an object store.

    As a context manager it holds the lock, and pushes what is left when it ends.

    Attributes:
      address: of the directory: where the checkpoints are.
      path: on this machine, for all else.
    """

    def __init__(self, workdir: str | os.PathLike):
        """Args: workdir: a path, or an address in an object store.

        Raises:
          ValueError: as `files.run_path`.
        """
        in_store = is_remote(workdir)
        self.address = str(run_path(workdir)) if in_store else str(local_path(workdir))
        self._copy = _Copy(workdir, f"-run{jax.process_index()}") if in_store else None
        self.path = self.address if self._copy is None else str(self._copy.directory)
        self._is_first = jax.process_index() == 0
        self._lock = RunLock(self.path) if self._is_first or in_store else contextlib.nullcontext()
        self._mark = {**holder(), "token": secrets.token_hex(8)}
        self._has_warned = False

    def __enter__(self) -> Self:
        """Raises: ValueError: another process of this machine holds the lock. OSError: it cannot be read or written."""
        self._lock.__enter__()
        if self._copy is not None:
            try:
                self._copy.pull()
                if self._is_first:
                    self._take()
            except BaseException:
                self._lock.__exit__(None, None, None)
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._copy is not None and self._holds():
                self.push()
                if self._is_first:
                    with contextlib.suppress(OSError):
                        (run_path(self.address) / LOCK).unlink(missing_ok=True)
        finally:
            self._lock.__exit__(None, None, None)

    def push(self) -> None:
        """Send what has changed to the object store; nothing where the directory is on this machine.

        A store that cannot be reached costs logs and images, never the run: it is told once, and tried again at the
        next call.

        Raises:
          ValueError: another run has taken the directory over.
        """
        if self._copy is None:
            return
        if not self._holds():
            other = self._other() or "a run that has ended"
            fix = "stop one of the two, or give another --workdir"
            raise ValueError(f"workdir: '{self.address}' was taken over by {other}; {fix}")
        try:
            self._copy.push()
        except OSError as error:
            if not self._has_warned:
                logger.warning("%s; the run goes on, and tries again", error)
            self._has_warned = True

    def _take(self) -> None:
        """Put this run's name into the lock, and tell of another that stands there."""
        if other := self._other():
            logger.warning(
                "workdir: '%s' was left or is in use by %s; if that run goes on, it ends at its next checkpoint",
                self.address, other,
            )  # fmt: skip
        with _explained(self.address):
            write_json(f"{self.address}/{LOCK}", self._mark, indent=None)

    def _other(self) -> str:
        """Who holds the lock, in words; empty where nobody does."""
        with _explained(self.address):
            path = run_path(self.address) / LOCK
            return describe_holder(path.read_bytes()) if path.exists() else ""

    def _holds(self) -> bool:
        """Whether the lock has this run's name; True where that cannot be found out."""
        if not self._is_first:
            return True
        try:
            with _explained(self.address):
                return parse_json((run_path(self.address) / LOCK).read_bytes(), LOCK) == self._mark
        except (FileNotFoundError, ValueError):
            return False
        except OSError:
            return True


class _Copy:
    """A directory of this machine that holds the files of one in an object store, without its checkpoints."""

    def __init__(self, address: str | os.PathLike, suffix: str = ""):
        """Args: address: of the directory; suffix: of the copy's name: each process that writes has one of its own."""
        self._root = run_path(address)
        self._address = os.fspath(self._root)
        digest = hashlib.sha256(self._address.encode()).hexdigest()[:12]
        self.directory = Path.home() / ".cache" / "rq_jax" / "runs" / f"{self._root.name}-{digest}{suffix}"

    def pull(self) -> None:
        """Make the copy what the object store holds; files of the copy alone stay, but those that were deleted there.

        Raises:
          OSError: the store cannot be read, or the copy written.
        """
        if not (self.directory / _ADDRESS).is_file():
            write_atomic(self.directory / _ADDRESS, self._address.encode())  # other processes read it meanwhile
        synced, there = self._synced(), self._objects()
        for name in synced.keys() - there.keys():
            (self.directory / name).unlink(missing_ok=True)
        old = [name for name, stamp in there.items() if synced.get(name) != [stamp, *self._state(name)]]

        def get(name: str) -> None:
            with atomic_path(self.directory / name) as partial:
                filesystem(self._address).get_file(f"{self._address}/{name}", str(partial))

        self._in_threads(get, old)
        self._note({name: [stamp, *self._state(name)] for name, stamp in there.items()})

    def push(self) -> None:
        """Send the files that have changed since the last `pull` or `push`.

        Raises:
          OSError: the store cannot be written.
        """
        synced = self._synced()
        names = (path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file())
        states = {name: self._state(name) for name in names if self._is_sent(name)}
        changed = [name for name, state in states.items() if synced.get(name, [None])[1:] != state]

        def put(name: str) -> None:
            filesystem(self._address).put_file(str(self.directory / name), f"{self._address}/{name}")

        self._in_threads(put, changed)
        if changed:
            self._note({**synced, **{name: [None, *states[name]] for name in changed}})

    @staticmethod
    def _is_sent(name: str) -> bool:
        top = name.partition("/")[0]
        return top not in (_ADDRESS, _SYNCED, LOCK, *_CACHES, *_CHECKPOINTS) and not name.endswith(".partial")

    def _objects(self) -> dict[str, str]:
        """What distinguishes the contents of each object, by relative path."""
        with _explained(self._address):
            found = filesystem(self._address).find(self._address, detail=True)
        root, objects = self._address.partition("://")[2], {}
        for path, info in found.items():
            name = path.removeprefix(f"{root}/")
            if not self._is_sent(name) or name.endswith("/"):
                continue
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"'{self._address}' holds {quoted(name)}, which leads out of it; delete that object")
            stamp = (info.get(key) for key in ("generation", "etag", "ETag", "LastModified", "mtime"))
            objects[name] = f"{info['size']} {next(filter(None, stamp), '')}"
        return objects

    def _state(self, name: str) -> list[int]:
        """Size and time of a file of the copy; empty where it is missing."""
        try:
            status = os.stat(self.directory / name)
        except OSError:
            return []
        return [status.st_size, status.st_mtime_ns]

    def _synced(self) -> dict[str, list[Any]]:
        """Object's stamp, None where this copy wrote it, with size and time of the file; by name."""
        try:
            return read_json(self.directory / _SYNCED)
        except (OSError, ValueError):
            return {}

    def _note(self, synced: dict[str, list[Any]]) -> None:
        write_json(self.directory / _SYNCED, synced, indent=None)

    def _in_threads(self, action: Callable[[str], None], names: Iterable[str]) -> None:
        with _explained(self._address), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(action, names))


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns what the libraries of object stores raise, which is any type, into an OSError of one line."""
    try:
        yield
    except (MemoryError, ValueError, FileNotFoundError):
        raise
    except Exception as error:
        reason = quoted(" ".join(str(error).split()) or type(error).__name__, 300)
        raise OSError(
            f"'{address}' cannot be reached ({reason}); check its name, the network and your login"
        ) from error

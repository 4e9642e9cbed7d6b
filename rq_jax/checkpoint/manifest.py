"""Checksums of a directory: written when it is whole, verified before it is read."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from rq_jax.files import is_remote, parse_json, run_path, sizes_below, write_atomic
from rq_jax.settings.text import quoted

MANIFEST = "manifest.json"
_CHUNK_BYTES = 2**20
_THREADS = 8  # hashing leaves the interpreter's lock


def write(directory: str | os.PathLike) -> None:
    """Write size and SHA-256 of every file below `directory` to its manifest, which starts with its own checksum.

    Files, manifest and directories are synced: when this returns, the directory survives a power cut, and the
    checkpoint that it replaces may be deleted. An object store keeps checksums itself and writes objects whole: of
    them the manifest has sizes, and null in place of SHA-256.
    """
    directory = run_path(directory)
    sizes = dict(sorted(_sizes(directory).items()))
    in_store = is_remote(directory)
    digests = [None] * len(sizes) if in_store else _in_threads(lambda name: _sha256(directory / name), sizes)
    files = {name: [size, digest] for (name, size), digest in zip(sizes.items(), digests, strict=True)}
    body = json.dumps(files, indent=1)
    write_atomic(directory / MANIFEST, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode())
    if in_store:
        return
    for path in (*(directory / name for name in files), directory / MANIFEST, directory, directory.parent):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def problems(directory: str | os.PathLike, folders: Collection[str] | None = None) -> list[str]:
    """Compare a directory with its manifest: a line for each file that differs; empty for a whole directory.

    Args:
      directory: holds the manifest.
      folders: in it whose contents are compared; None: of all. Sizes are compared everywhere.
    """
    directory = run_path(directory)
    if (path := directory / MANIFEST).exists() and not path.is_file():
        return [f"{MANIFEST} is no regular file"]
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror or error})"]
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return [f"{MANIFEST} is damaged"]
    try:
        entries = parse_json(body, MANIFEST)
        files = {name: (int(size), digest and str(digest)) for name, (size, digest) in entries.items()}
    except (ValueError, TypeError) as error:
        return [f"{MANIFEST} is no list of files ({error})"]
    sizes = _sizes(directory)

    def check(name: str) -> str | None:
        is_read = folders is None or name.partition("/")[0] in folders
        return _problem(directory, name, sizes, *files[name], is_read)

    return [problem for problem in _in_threads(check, files) if problem is not None]


def _problem(
    directory: Path, name: str, sizes: dict[str, int], size: int, digest: str | None, is_read: bool
) -> str | None:
    if name not in sizes:
        return f"{quoted(name, 200)} is missing"
    if sizes[name] != size:
        return f"{quoted(name, 200)} has {sizes[name]} bytes, not {size}"
    try:
        is_whole = not is_read or digest is None or _sha256(directory / name) == digest
        return None if is_whole else f"{quoted(name, 200)} has other contents"
    except OSError as error:
        return f"{quoted(name, 200)} cannot be read ({error.strerror or error})"


def _in_threads(function: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, names))


def _sizes(directory: Path) -> dict[str, int]:
    """Size in bytes of every file below a directory except the manifest, by relative path."""
    return {name: size for name, size in sizes_below(directory).items() if name != MANIFEST}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

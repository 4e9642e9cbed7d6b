"""Checksums of a directory: written once it is whole, compared before it is read."""

import hashlib
import json
import os
from pathlib import Path

from rq_jax.files import write_atomic

MANIFEST = "manifest.json"
_CHUNK_BYTES = 2**20


def write(directory: str | os.PathLike) -> None:
    """Note size and SHA-256 of every file below `directory`; the manifest carries a checksum of itself.

    When it returns, all of them would survive a power cut: what they replace may go.
    """
    directory = Path(directory)
    files = {name: [size, _sha256(directory / name)] for name, size in sorted(_sizes(directory).items())}
    body = json.dumps(files, indent=1)
    write_atomic(directory / MANIFEST, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode())
    for path in (*(directory / name for name in files), directory / MANIFEST, directory, directory.parent):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def problems(directory: str | os.PathLike) -> list[str]:
    """What differs from the manifest, a line for each file; empty for a whole directory."""
    directory = Path(directory)
    try:
        checksum, _, body = (directory / MANIFEST).read_bytes().partition(b"\n")
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror or error})"]
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return [f"{MANIFEST} is damaged"]
    expected, sizes, found = json.loads(body), _sizes(directory), []
    for name, (size, digest) in expected.items():
        if name not in sizes:
            found.append(f"{name} is missing")
        elif sizes[name] != size:
            found.append(f"{name} has {sizes[name]} bytes, not {size}")
        else:
            try:
                if _sha256(directory / name) != digest:
                    found.append(f"{name} has other contents")
            except OSError as error:
                found.append(f"{name} cannot be read ({error.strerror or error})")
    return found


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file below a directory but the manifest, by relative path."""
    files = (path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    names.pop(MANIFEST, None)
    return names


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

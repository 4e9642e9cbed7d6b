"""Model directories of the Hugging Face Hub: an address in place of a path, `hf://owner/name[@revision][/folder]`.

What is downloaded, and where it is kept, is left to `huggingface_hub`: its cache, its environment variables
(HF_HUB_OFFLINE, HF_HOME, HF_TOKEN). An address is looked up once in a process, so that all that is read of it is of one
commit.
"""

import functools
import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from rq_jax.checkpoint import remote
from rq_jax.files import is_remote, local_path
from rq_jax.settings.text import quoted

_SCHEME = "hf://"
_FORM = f"{_SCHEME}owner/name[@revision][/folder]"
# What a model directory has, and those in it. A pattern's * goes over slashes: *.safetensors would bring all files.
_FILES = (
    "config.json",
    "text_tokenizer.json",
    "prompts.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
_FOLDERS = ("", "tokenizer/", "discriminator/")


class _Snapshot(NamedTuple):
    """A model directory in the cache, the commit that it is of, and its address at this commit."""

    directory: Path
    commit: str
    pinned: str


def is_address(path: str | os.PathLike) -> TypeGuard[str]:
    """Whether a path is an address of the Hub."""
    return isinstance(path, str) and path.startswith(_SCHEME)


def local_directory(path: str | os.PathLike) -> Path:
    """The directory on this machine of a path, see `files.local_path`, or of an address, downloaded where it has to be.

    Of a run in an object store it holds all but the checkpoints, see `remote.checkpoints_of`.

    Raises:
      ValueError: a malformed address, one that leads nowhere, or no package or network to look it up with.
      OSError: an object store cannot be read.
    """
    if is_remote(path):
        return remote.local_copy(path)
    return _download(path).directory if is_address(path) else local_path(path)


def pinned(address: str) -> str:
    """An address with its commit as the revision, for records that a later run starts from.

    Raises:
      ValueError: as `local_directory`.
    """
    return _download(address).pinned


def pinned_as(address: str, before: Any) -> str:
    """An earlier `pinned` address, where it is of the same model as one without a revision; else this one."""
    is_same = is_address(before) and re.sub("@[^/]*", "", before, count=1) == address.rstrip("/")
    return before if is_same else address


def origin_of(path: str | os.PathLike, root: Path | None = None) -> dict[str, str]:
    """What a record says of where a model came from.

    Args:
      path: as the user gave it.
      root: of the repository. A whole path that leads into it is recorded from there: where it lies on this machine is
        nothing to others.

    Returns:
      "checkpoint", the path or address, and "commit" of an address.

    Raises:
      ValueError: as `local_directory`.
    """
    if is_address(path):
        return {"checkpoint": path, "commit": _download(path).commit}
    if root is not None and not is_remote(path) and Path(path).is_relative_to(root):
        return {"checkpoint": Path(path).relative_to(root).as_posix()}
    return {"checkpoint": str(path)}


@functools.cache
def _download(address: str) -> _Snapshot:
    try:
        from huggingface_hub import parse_hf_uri, snapshot_download  # the first is not in old versions
    except ImportError:
        fix = "run pip install 'rq_jax[hub]', or give a directory"
        raise ValueError(f"{quoted(address)} needs the package huggingface_hub, at least 2.4; {fix}") from None
    uri = _parse(address, parse_hf_uri)
    folder = f"{uri.path_in_repo}/" if uri.path_in_repo else ""
    wanted = [glob.escape(folder) + below + name for below in _FOLDERS for name in _FILES]
    try:
        root = Path(snapshot_download(uri.id, revision=uri.revision, allow_patterns=wanted))
    except MemoryError:
        raise
    except Exception as error:  # of the network's libraries too, which have types of their own
        raise ValueError(f"{quoted(address)}: {_reason(error, uri)}") from error
    return _Snapshot(root / folder, root.name, f"{_SCHEME}{uri.id}@{root.name}/{folder}".rstrip("/"))


def _parse(address: str, parse: Callable[[str], Any]) -> Any:
    """The parts of an address, as `huggingface_hub.parse_hf_uri` gives them.

    Raises:
      ValueError: it is malformed, is of no model, or leads out of its repository.
    """
    try:
        uri = parse(address)
        problem = "" if uri.type == "model" else f"it names a {uri.type}, not a model"
        if {".", ".."} & set(uri.path_in_repo.split("/")):
            problem = "its folder leads elsewhere"
    except ValueError as error:
        problem = getattr(error, "msg", str(error)).rstrip(". ")
    if problem:
        raise ValueError(f"{quoted(address)} is no address of a model ({problem}); give {_FORM}")
    return uri


def _reason(error: Exception, uri: Any) -> str:
    """Why a download failed, with the fix."""
    from huggingface_hub import errors, is_offline_mode

    if isinstance(error, errors.GatedRepoError):
        return f"{quoted(uri.id)} asks its readers to register; accept its terms on the Hub, then run hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no model {quoted(uri.id)} that you may read; check the name, or run hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{quoted(uri.id)} has no revision {quoted(uri.revision)}; give a branch, a tag or a whole commit"
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
        is_part = isinstance(error, errors.IncompleteSnapshotError)
        have = "only a part of it is in the cache" if is_part else "it is not in the cache"
        return f"{have}, and {why}; download it once with a network, or give a directory"
    return f"it could not be downloaded ({quoted(' '.join(str(error).split()), 300)}); run it again"

"""A cache of the Hugging Face Hub on disk, as its library leaves it after a download, and no network to look further."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from rq_jax.checkpoint import hub


def make(root: Path, snapshots: Mapping[str, Callable[[Path], object]], refs: Mapping[str, str]) -> Path:
    """The repository owner/name in a cache: by commit what writes its files; by branch or tag the commit."""
    repository = root / "models--owner--name"
    for commit, write in snapshots.items():
        write(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for name, commit in refs.items():
        (repository / "refs" / name).write_text(commit)
    return repository


def use(monkeypatch: pytest.MonkeyPatch, root: Path, offline: bool = True) -> None:
    """Lets this process read a cache, as HF_HUB_CACHE and HF_HUB_OFFLINE would have before it started."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub._download.cache_clear()

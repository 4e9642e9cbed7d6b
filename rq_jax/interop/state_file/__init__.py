"""Weights and configs that come from elsewhere, read without running anything that they hold.

`read_state` reads PyTorch's two formats, .npz and .safetensors; `read_config` reads YAML and JSON.
"""

import os
from typing import Any

from rq_jax.interop.state_file.array_files import read_npz, read_safetensors, safetensors_header_size
from rq_jax.interop.state_file.config import read_config
from rq_jax.interop.state_file.tensor import StateFileError, Tensor, find_file
from rq_jax.interop.state_file.torch_files import read_torch_stream, read_torch_zip
from rq_jax.interop.state_file.zip_members import read_members

__all__ = ["StateFileError", "Tensor", "read_config", "read_state"]

_STATE = "a file by torch.save, an .npz or a .safetensors"
# What else people give, by where its first bytes are.
_OTHERS = {
    "a single .npy array; save its arrays by name with np.savez": (0, b"\x93NUMPY"),
    "a tar: as torch before 0.1.10 wrote them, it is read no more; load it and save it again with a current torch": (
        257,
        b"ustar",
    ),
    "packed by gzip; unpack it first": (0, b"\x1f\x8b"),
    "a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`": (0, b"version https://git-lfs"),
    "a web page; the download went wrong": (0, b"<"),
    f"HDF5; give {_STATE}": (0, b"\x89HDF"),
}


def read_state(path: str | os.PathLike[str]) -> Any:
    """What a file of weights holds, with a `Tensor` for every array; the format is found by content, not by suffix.

    Objects of any other class are refused wherever they stand, such as the callbacks in checkpoints by Lightning:
    load such a file once where you trust it, and torch.save its state_dict alone. Ordered and default dicts become
    dicts, a torch.Size a tuple, types and devices their names; parameters and tensors look alike.

    Args:
      path: of a file by torch.save (zip or the older pickle stream), an .npz or a .safetensors.

    Returns:
      Nested dicts, lists, tuples, numbers, strings and None with `Tensor` leaves; a dict for .npz and .safetensors.

    Raises:
      FileNotFoundError: nothing is there.
      StateFileError: anything else is wrong, or the file holds anything else.
    """
    source = find_file(path, _STATE)
    with source.open() as file:
        start = source.read(file, 0, min(source.size, 512))
        if start.startswith(b"PK"):
            members = read_members(source, file)
            if any(name.endswith("/data.pkl") for name in members):
                return read_torch_zip(source, file, members)
            return read_npz(source, file, members)
        # The length in front of a .safetensors can begin like a pickle, so it is asked for first.
        header_size = safetensors_header_size(source, start)
        if header_size is not None:
            return read_safetensors(source, file, header_size)
        if start.startswith(b"\x80"):
            file.seek(0)
            return read_torch_stream(source, file)
    for found, (position, magic) in _OTHERS.items():
        if start[position:].startswith(magic):
            raise source.error(f"is {found}")
    raise source.error(f"is of an unknown kind; give {_STATE}")

"""Readers of foreign weights and configs that never run anything in them.

`read_state` reads PyTorch's two formats, .npz and .safetensors, whole or in shards; `read_config` YAML and JSON.
"""

import os
from pathlib import Path
from typing import Any

from rq_jax.files import local_path
from rq_jax.interop.state_file.array_files import read_npz, read_safetensors, safetensors_header_size
from rq_jax.interop.state_file.config import read_config
from rq_jax.interop.state_file.files import Invalid, StateFileError, find_file
from rq_jax.interop.state_file.pickle_names import Opaque
from rq_jax.interop.state_file.shards import INDEX, find_index, read_shards
from rq_jax.interop.state_file.tensor import Tensor
from rq_jax.interop.state_file.torch_files import read_torch_stream, read_torch_zip
from rq_jax.interop.state_file.zip_members import read_members

__all__ = ["Opaque", "StateFileError", "Tensor", "read_config", "read_state"]

_EXPECTED = "a file by torch.save, an .npz, a .safetensors or the index of several"
# Other files that people give, by the place and the bytes of their magic number.
_OTHER_KINDS = (
    (0, b"\x93NUMPY", "a single .npy array; save its arrays by name with np.savez"),
    (257, b"ustar", "a tar, as torch before 0.1.10 wrote; load it and save it again with a current torch"),
    (0, b"\x1f\x8b", "packed by gzip; unpack it first"),
    (0, b"version https://git-lfs", "a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"),
    (0, b"<", "a web page; the download went wrong"),
    (0, b"\x89HDF", f"HDF5; give {_EXPECTED}"),
)


def read_state(path: str | os.PathLike[str]) -> Any:
    """Reads a file of weights, with a `Tensor` for every array; the format is detected by content, not by suffix.

    An object of any other class, such as the callbacks in checkpoints by Lightning, is `Opaque` wherever it stands: its
    class is named, and never imported or run, and its parts are dropped, tensors too. Ordered and default dicts become
    dicts; parameters and tensors look alike.

    Args:
      path: of a file by torch.save (zip or the older pickle stream), by torch.jit.save (of which the state dict is
        read), an .npz or a .safetensors; of an index of several (*.index.json), which lie beside it, or the directory
        of one.

    Returns:
      Nested dicts, lists, tuples, numbers, strings and None with `Tensor` and `Opaque` leaves; a dict of tensors for
      .npz and .safetensors.

    Raises:
      FileNotFoundError: nothing is there.
      StateFileError: anything else is wrong, or the file is of another kind.
    """
    path = local_path(path)
    if path.is_dir():
        path = find_index(path)
    return read_shards(path, _read_file) if path.name.endswith(INDEX) else _read_file(path)


def _read_file(path: Path) -> Any:
    source = find_file(path, _EXPECTED)
    with source.open() as reader:
        start = reader.read(0, min(source.size, 512))
        if start.startswith(b"PK"):
            members = read_members(reader)
            is_torch = any(name.endswith("/data.pkl") for name in members)
            return read_torch_zip(reader, members) if is_torch else read_npz(reader, members)
        # The length in front of a .safetensors can begin like a pickle, so it is asked for first.
        header_size = safetensors_header_size(reader, start)
        if header_size is not None:
            return read_safetensors(reader, header_size)
        if start.startswith(b"\x80"):
            return read_torch_stream(reader)
        for position, magic, kind in _OTHER_KINDS:
            if start[position:].startswith(magic):
                raise Invalid(f"is {kind}")
        raise Invalid(f"is of an unknown kind; give {_EXPECTED}")

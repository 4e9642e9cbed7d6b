"""The two formats of torch.save: a zip (since torch 1.6) and a stream of pickles with the storages behind them.

Zip: <name>/data.pkl holds the objects, <name>/data/<key> the bytes of each storage. One by torch.jit.save also holds a
program, with constants.pkl: its data.pkl has an object of a class "__torch__..." for each module.
Stream: pickles of a magic number, a protocol, facts about the machine, the objects and the list of storage keys,
then for each key the number of elements as int64 and the elements.
"""

import io
import zipfile
from typing import Any

import numpy as np

from rq_jax.interop.state_file.files import DAMAGED, Invalid, Reader
from rq_jax.interop.state_file.pickle_names import Opaque, storage_dtype
from rq_jax.interop.state_file.pickles import MAX_BYTES, read_pickle
from rq_jax.interop.state_file.tensor import Storage, Tensor, find_dtype
from rq_jax.interop.state_file.zip_members import locate
from rq_jax.settings.text import quoted

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_torch_zip(reader: Reader, members: dict[str, zipfile.ZipInfo]) -> Any:
    """The objects of a zip by torch.save, or the state dict of one by torch.jit.save; <name>/data.pkl is a member.

    Raises:
      Invalid: it is no such zip, or holds something that is not read.
    """
    root = min((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), key=len)
    if strange := [name for name in members if not name.startswith(root)]:
        raise Invalid(
            f"holds the zip member {quoted(strange[0])} beside {quoted(f'{root}data.pkl')}; torch.save puts none there"
        )

    def find(name: str, limit: int = reader.file.size) -> Storage:
        info = members.get(f"{root}{name}")
        if info is None:
            raise Invalid(f"lacks its member {quoted(root + name)}; {DAMAGED}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Invalid(f"holds {quoted(root + name)} compressed; torch.save stores: unpack it, or zip it with -0")
        if info.file_size > limit:
            raise Invalid(
                f"has a {quoted(name)} of {info.file_size} bytes; at most {limit} are read; save the state_dict alone"
            )
        return locate(reader, info, name.removeprefix("data/"))

    storages: dict[str, Storage] = {}

    def load_storage(pid: Any) -> Tensor:
        key, dtype, count, _ = _parse_pid(pid)
        if key not in storages:
            storages[key] = find(f"data/{key}")
        return Tensor(storages[key], dtype, (count,))

    if f"{root}byteorder" in members:
        _check_order(find("byteorder", 100).head(reader).tobytes() == b"little")
    stream = io.BytesIO(find("data.pkl", MAX_BYTES).head(reader).tobytes())
    value = read_pickle(stream, reader.file.size, load_storage)
    return _state_dict(value) if f"{root}constants.pkl" in members else value


def _state_dict(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a TorchScript program by dotted name; its code is not looked at."""
    state: dict[str, Tensor] = {}
    for name, value in module.items() if type(module) is dict else ():
        if type(value) is Tensor:
            state[f"{prefix}{name}"] = value
        elif type(value) is dict:
            state |= _state_dict(value, f"{prefix}{name}.")
    return state


def read_torch_stream(reader: Reader) -> Any:
    """The objects of a stream by torch.save.

    Raises:
      Invalid: it is no such stream, or holds something that is not read.
    """
    size = reader.file.size
    stream = io.BytesIO(reader.read(0, min(size, MAX_BYTES)))
    if read_pickle(stream, size) != _MAGIC or read_pickle(stream, size) != _PROTOCOL:
        raise Invalid("is a pickle, but not by torch.save; load it where it was made and use torch.save or np.savez")
    machine = read_pickle(stream, size)
    _check_order(isinstance(machine, dict) and machine.get("little_endian", True) is True)
    storages: dict[str, Storage] = {}
    counts: dict[str, int] = {}  # elements of each

    def load_storage(pid: Any) -> Any:
        if type(pid) is tuple and pid[:1] == ("module",) and type(pid[1]) is Opaque:
            return pid[1]  # a class of the user's, with its source
        key, dtype, count, view = _parse_pid(pid)
        nbytes = count * dtype.itemsize
        if nbytes > size:
            raise Invalid(f"is smaller than the {nbytes} bytes of its storage {quoted(key)}; {DAMAGED}")
        storage = storages.setdefault(key, Storage(reader.file, key, nbytes))
        if (storage.nbytes, counts.setdefault(key, count)) != (nbytes, count):
            raise Invalid(f"says of its storage {quoted(key)} one thing here and another there; {DAMAGED}")
        whole = Tensor(storage, dtype, (count,))
        match view:
            case None:
                return whole
            case (_, offset, length) if type(offset) is int and type(length) is int:
                return whole.view(dtype, (length,), (1,), offset)
        raise Invalid(f"holds a damaged view of its storage {quoted(key)}; {DAMAGED}")

    value = read_pickle(stream, size, load_storage)
    keys = read_pickle(stream, size)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Invalid(f"has a damaged list of storages; {DAMAGED}")
    if set(keys) != set(storages):
        raise Invalid(f"lists {len(keys)} storages and uses {len(storages)} others; {DAMAGED}")
    _place(reader, stream.tell(), {key: storages[key] for key in keys}, counts)
    return value


def _place(reader: Reader, offset: int, storages: dict[str, Storage], counts: dict[str, int]) -> None:
    """Give each storage of a stream its place; they lie in a row from `offset` on."""
    for key, storage in storages.items():
        count = int.from_bytes(reader.read(offset, 8), "little")
        storage.offset = offset + 8
        offset += 8 + storage.nbytes
        if count != counts[key] or offset > reader.file.size:
            raise Invalid(f"ends within its storage {quoted(key)} or holds another number of elements; {DAMAGED}")


def _parse_pid(pid: Any) -> tuple[str, np.dtype, int, Any]:
    """Key, type, number of elements and view of a storage."""
    match pid:
        case ("storage", Opaque() as kind, str(key), str(), int(count), *views) if len(views) < 2:
            if not 0 <= count < 1 << 48 or len(key) > 200:
                raise Invalid(f"holds a storage of {count} elements; {DAMAGED}")
            if (name := storage_dtype(kind)) is None:
                raise Invalid(f"holds a storage of type {quoted(kind)}, which is not read; save it as floats")
            return key, find_dtype(name), count, views[0] if views else None
    raise Invalid(f"holds a reference that is no storage; {DAMAGED}")


def _check_order(is_little: bool) -> None:
    if not is_little:
        raise Invalid("was written on a big-endian machine; load and save it again with a current torch elsewhere")

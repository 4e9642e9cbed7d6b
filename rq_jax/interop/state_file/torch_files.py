"""The two formats of torch.save: a zip (since torch 1.6) and a stream of pickles with the storages behind them.

Zip: <name>/data.pkl holds the objects, <name>/data/<key> the bytes of each storage.
Stream: pickles of a magic number, a protocol, facts about the machine, the objects and the list of storage keys,
then for each key the number of elements as int64 and the elements.
"""

from typing import Any, BinaryIO

import numpy as np

from rq_jax.interop.state_file.pickle_names import StorageType, torch_dtype
from rq_jax.interop.state_file.pickles import MAX_BYTES, read_pickle
from rq_jax.interop.state_file.tensor import DAMAGED, File, Storage, Tensor
from rq_jax.interop.state_file.zip_members import Member, locate

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_torch_zip(source: File, file: BinaryIO, members: dict[str, Member]) -> Any:
    """The objects of a zip by torch.save.

    Args:
      source: the file.
      file: the same, open.
      members: its members; one of them is <name>/data.pkl.

    Raises:
      StateFileError: it is no such zip, or holds what is not read.
    """
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    root = min(roots, key=len)
    strange = [name for name in members if not name.startswith(root)]
    if strange:
        raise source.error(f"holds the zip member {strange[0]!r} beside '{root}data.pkl'; torch.save puts none there")
    if f"{root}constants.pkl" in members:
        raise source.error("holds a TorchScript program; load it with torch.jit and torch.save its state_dict()")

    def content(name: str, limit: int) -> bytes:
        storage = find(f"{root}{name}")
        if storage.nbytes > limit:
            raise source.error(
                f"has a {name} of {storage.nbytes} bytes; at most {limit} are read; save the state_dict alone"
            )
        return source.read(file, storage.offset, storage.nbytes)

    def find(name: str) -> Storage:
        member = members.get(name)
        if member is None:
            raise source.error(f"lacks its member {name!r}; {DAMAGED}")
        if member.is_deflated:
            raise source.error(f"holds {name!r} compressed; torch.save stores: unpack it, or zip it with -0")
        return locate(source, file, member, name.removeprefix(f"{root}data/"))

    storages: dict[str, Storage] = {}

    def load_storage(pid: Any) -> Tensor:
        key, dtype, count, _ = _parse_pid(source, pid)
        if key not in storages:
            storages[key] = find(f"{root}data/{key}")
        return Tensor(storages[key], dtype, (count,))

    if f"{root}byteorder" in members:
        _check_order(source, content("byteorder", 100) == b"little")
    return read_pickle(source, content("data.pkl", MAX_BYTES), 0, load_storage)[0]


def read_torch_stream(source: File, file: BinaryIO) -> Any:
    """The objects of a stream by torch.save.

    Args:
      source: the file.
      file: the same, open at its beginning.

    Raises:
      StateFileError: it is no such stream, or holds what is not read.
    """
    data = source.read(file, 0, min(source.size, MAX_BYTES))
    (magic, end), protocol = read_pickle(source, data), None
    if magic == _MAGIC:
        protocol, end = read_pickle(source, data, end)
    if protocol != _PROTOCOL:
        raise source.error(
            "is a pickle, but not by torch.save; load it where it was made and use torch.save or np.savez"
        )
    machine, end = read_pickle(source, data, end)
    _check_order(source, isinstance(machine, dict) and machine.get("little_endian", True) is True)
    storages: dict[str, Storage] = {}
    sizes: dict[str, int] = {}  # of an element

    def load_storage(pid: Any) -> Tensor:
        key, dtype, count, view = _parse_pid(source, pid)
        new = Storage(source, key, count * dtype.itemsize)
        if new.nbytes > source.size:
            raise source.error(f"is smaller than the {new.nbytes} bytes of its storage {key!r}; {DAMAGED}")
        old = storages.setdefault(key, new)
        if (old.nbytes, sizes.setdefault(key, dtype.itemsize)) != (new.nbytes, dtype.itemsize):
            raise source.error(f"says of its storage {key!r} one thing here and another there; {DAMAGED}")
        if view is None:
            return Tensor(old, dtype, (count,))
        match view:
            case (_, offset, length) if type(offset) is int and type(length) is int:
                return Tensor(old, dtype, (length,), (1,), offset)
        raise source.error(f"holds a damaged view of its storage {key!r}; {DAMAGED}")

    value, end = read_pickle(source, data, end, load_storage)
    keys, offset = read_pickle(source, data, end)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise source.error(f"has a damaged list of storages; {DAMAGED}")
    if set(keys) != set(storages):
        raise source.error(f"lists {len(keys)} storages and uses {len(storages)} others; {DAMAGED}")
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(source.read(file, offset, 8), "little")
        if count * sizes[key] != storage.nbytes or offset + 8 + storage.nbytes > source.size:
            raise source.error(f"ends within its storage {key!r} or holds another number of elements; {DAMAGED}")
        storage.offset = offset + 8
        offset += 8 + storage.nbytes
    return value


def _parse_pid(source: File, pid: Any) -> tuple[str, np.dtype, int, Any]:
    """Key, type, number of elements and view of a storage."""
    match pid:
        case ("storage", StorageType(dtype=name), str(key), str(), int(count)):
            view = None
        case ("storage", StorageType(dtype=name), str(key), str(), int(count), view):
            pass
        case _:
            raise source.error(f"holds a reference that is no storage; {DAMAGED}")
    if not 0 <= count < 1 << 48 or len(key) > 200:
        raise source.error(f"holds a storage of {count} elements; {DAMAGED}")
    return key, torch_dtype(name), count, view


def _check_order(source: File, is_little: bool) -> None:
    if not is_little:
        raise source.error("was written on a big-endian machine; load and save it again with a current torch elsewhere")

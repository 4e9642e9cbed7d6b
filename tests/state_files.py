"""The formats that rq_jax.interop.state_file reads, written from their description and without torch; checks of what is read."""

import dataclasses
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rq_jax.interop.state_file import Opaque, StateFileError, Tensor, read_state

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
FACTS = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
KINDS = {
    "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Global:
    """A name such as "torch FloatStorage", written and never looked up."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What a pickle calls, with what, and the attributes that it sets on the result."""

    function: Global
    args: Any = ()
    attributes: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """The elements behind tensors; `view` is (key, offset, number of elements), which early torch had."""

    kind: str
    data: np.ndarray
    key: str = "0"
    count: int | None = None
    view: tuple[str, int, int] | None = None

    @property
    def pid(self) -> tuple[Any, ...]:
        count = self.data.size if self.count is None else self.count
        return "storage", Global(f"torch {self.kind}Storage"), self.key, "cpu", count


ORDERED_DICT = Call(Global("collections OrderedDict"))


def rebuild(storage: Storage, shape: Any, strides: Any, offset: Any = 0, *more: Any) -> Call:
    """A tensor of torch 0.4 and later."""
    args = (storage, offset, shape, strides, False, ORDERED_DICT, *more)
    return Call(Global("torch._utils _rebuild_tensor_v2"), args)


def tensor(data: np.ndarray, kind: str, key: str = "0") -> Call:
    """A C-contiguous tensor with a storage of its own."""
    strides = tuple(stride // data.itemsize for stride in data.strides)
    return rebuild(Storage(kind, data.reshape(-1), key), data.shape, strides)


def encode(value: Any, storages: dict[str, Storage], protocol: int = 2, legacy: bool = False) -> bytes:
    """A pickle; the storages that it refers to are added to `storages`."""
    encoder = _Encoder(storages, protocol, legacy)
    encoder.save(value)
    return pickle.PROTO + bytes([protocol]) + encoder.out.getvalue() + pickle.STOP


@dataclasses.dataclass
class _Encoder:
    storages: dict[str, Storage]
    protocol: int
    legacy: bool
    out: io.BytesIO = dataclasses.field(default_factory=io.BytesIO)
    # Index and value by id; the value too, as ids of dead objects come again.
    memo: dict[int, tuple[int, Any]] = dataclasses.field(default_factory=dict)

    def save(self, *values: Any) -> None:
        for value in values:
            if id(value) in self.memo:
                self.out.write(pickle.LONG_BINGET + struct.pack("<I", self.memo[id(value)][0]))
                continue
            if isinstance(value, Global | Call | Storage):
                self.save_object(value)
            elif isinstance(value, list | dict | tuple):
                self.save_container(value)
            else:
                self.out.write(_encode_leaf(value))
            if isinstance(value, Global | Call | tuple | str):
                self.remember(value)

    def remember(self, value: Any) -> None:
        index = len(self.memo)
        self.memo[id(value)] = index, value
        short = pickle.BINPUT + bytes([index]) if index < 256 else pickle.LONG_BINPUT + struct.pack("<I", index)
        self.out.write(pickle.MEMOIZE if self.protocol >= 4 else short)

    def save_container(self, value: Any) -> None:
        if isinstance(value, tuple):
            items, end = value, pickle.TUPLE
        else:
            is_dict = isinstance(value, dict)
            self.out.write(pickle.EMPTY_DICT if is_dict else pickle.EMPTY_LIST)
            self.remember(value)
            items = [part for item in value.items() for part in item] if is_dict else value
            end = pickle.SETITEMS if is_dict else pickle.APPENDS
        self.out.write(pickle.MARK)
        self.save(*items)
        self.out.write(end)

    def save_object(self, value: Any) -> None:
        match value:
            case Global(name=name) if self.protocol >= 4:
                self.save(*name.split())
                self.out.write(pickle.STACK_GLOBAL)
            case Global(name=name):
                self.out.write(pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n")
            case Call(function=function, args=args, attributes=attributes):
                self.save(function, args)
                is_module = isinstance(function, Global) and function.name.startswith("__torch__.")
                self.out.write(pickle.NEWOBJ if is_module else pickle.REDUCE)
                if attributes is not None:
                    self.save(attributes)
                    self.out.write(pickle.BUILD)
            case Storage():
                self.storages.setdefault(value.key, value)
                self.save((*value.pid, value.view) if self.legacy else value.pid)
                self.out.write(pickle.BINPERSID)


def _encode_leaf(value: Any) -> bytes:
    match value:
        case None | bool():
            return {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        case int() if 0 <= value < 256:
            return pickle.BININT1 + bytes([value])
        case int() if abs(value) < 1 << 31:
            return pickle.BININT + struct.pack("<i", value)
        case int():
            data = pickle.encode_long(value)
            return pickle.LONG1 + bytes([len(data)]) + data
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return pickle.SHORT_BINBYTES + bytes([len(value)]) + value
    raise TypeError(type(value))


def write_zip(path: Path, value: Any, protocol: int = 2, **members: bytes) -> Path:
    """What torch.save writes since 1.6; members by name beside the usual ones."""
    storages: dict[str, Storage] = {}
    data = encode(value, storages, protocol) if not isinstance(value, bytes) else value
    contents = {"data.pkl": data, "version": b"3\n", "byteorder": b"little"}
    contents |= {f"data/{key}": storage.data.tobytes() for key, storage in storages.items()} | members
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in contents.items():
            file.writestr(f"{path.stem}/{name}", content)
    return path


def write_stream(path: Path, value: Any, protocol: int = 2, facts: Any = FACTS) -> Path:
    """What torch.save wrote before 1.6."""
    storages: dict[str, Storage] = {}
    data = encode(value, storages, protocol, legacy=True) if not isinstance(value, bytes) else value
    head = b"".join(encode(part, {}, protocol) for part in (MAGIC, PROTOCOL, facts))
    tail = encode(list(storages), {}, protocol)
    tail += b"".join(struct.pack("<q", s.data.size) + s.data.tobytes() for s in storages.values())
    path.write_bytes(head + data + tail)
    return path


def write_members(path: Path, **members: bytes) -> Path:
    """A zip with these members."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """A .safetensors with this header, as a value or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), start: int = 0, stop: int = 4) -> dict[str, Any]:
    """A line of the header of a .safetensors."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def materialise(value: Any) -> None:
    """Read every tensor of a tree."""
    if isinstance(value, Tensor):
        assert np.asarray(value).shape == value.shape
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            materialise(child)


def outline(value: Any) -> Any:
    """The beginning of what was read, with names for opaque values."""
    match value:
        case dict():
            return {outline(key): outline(child) for key, child in list(value.items())[:3]}
        case list():
            return [outline(child) for child in value[:3]]
        case Opaque(name=name):
            return name[:100]
        case None | bool() | int() if not isinstance(value, int) or value.bit_length() < 64:
            return value
    return type(value).__name__


def assert_same(found: Any, expected: Any, where: str = "top") -> None:
    """Equal trees, with a Tensor for each array: values, shape and type."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, Tensor), where
        array = np.asarray(found)
        assert (found.shape, np.shape(found), array.shape) == (expected.shape,) * 3, where
        assert found.dtype == array.dtype == expected.dtype and found.nbytes == array.nbytes, where
        assert array.tobytes() == expected.tobytes() and array.flags.c_contiguous, where
    elif isinstance(expected, dict):
        assert type(found) is dict and list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}.{i}")
    else:
        assert type(found) is type(expected) and found == expected, where


def assert_refused(path: Any, pattern: str, read: Callable[[Any], Any] = read_state) -> None:
    """One line that begins with the name of the file."""
    with pytest.raises(StateFileError, match=pattern) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"'{path}': ") and "\n" not in message and len(message) < 500

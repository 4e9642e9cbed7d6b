"""The names that a pickle may use: torch's functions that rebuild tensors, dicts, numbers, types.

Each stands in a table under its full name, with a function of ours that does the same to our tensors. The functions
check the arguments that they use, touch no attribute, copy no more than the machine has counted, and return None for
what torch.save does not write.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rq_jax.interop.state_file.files import Invalid
from rq_jax.interop.state_file.tensor import DTYPES, Tensor, find_dtype

ALLOWED = "only tensors, numbers, strings, lists and dicts are read; save the state_dict alone"
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Name:
    """A name of the table: `call` makes a value from arguments; None if it may only be named."""

    name: str
    call: Callable[[Args], Any] | None


@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and the like: the type of the elements, by name."""

    dtype: str


@dataclass
class NumberType:
    """numpy.dtype of one number; its byte order is an attribute that is set later."""

    code: str
    order: str = "="


def set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    """`target[key] = value`."""
    # Of all other keys one can make millions that fall together in a dict, which then takes hours.
    if type(key) not in (str, bool, float, type(None)) and not (type(key) is int and abs(key) < 1 << 60):
        raise Invalid(f"holds a dict with a {type(key).__name__} as a key; allowed are str, int, float, bool and None")
    target[key] = value


def _tensor(args: Args) -> Tensor | None:
    """_rebuild_tensor, _rebuild_tensor_v2 and _v3: a view of a storage, which is a flat tensor here."""
    match args:
        case (Tensor() as storage, offset, tuple(shape), tuple(strides), *rest):
            dtype = storage.dtype
            # After requires_grad and hooks: the type in version 3, then flags.
            for extra in rest[2:]:
                if isinstance(extra, str):
                    name = extra.removeprefix("torch.")
                    dtype = find_dtype(_ALIASES.get(name, name))
                elif extra is not None and (type(extra) is not dict or any(x is not False for x in extra.values())):
                    raise Invalid(
                        "holds a tensor whose conjugation or negation is put off; save it after resolve_conj()"
                    )
            return storage.view(dtype, shape, strides, offset)


def _parameter(args: Args) -> Tensor | None:
    match args:
        case (Tensor() as tensor, _, _) | (Tensor() as tensor, _, _, _):  # requires_grad, hooks, attributes set by hand
            return tensor


def _tensor_with_attributes(args: Args) -> Tensor | None:
    match args:
        case (Name(call=call), Name(name="torch.Tensor" | "torch.nn.parameter.Parameter"), tuple(inner), _):
            return call(inner) if call in (_tensor, _parameter) else None


def _dict(args: Args) -> dict[Any, Any] | None:
    """OrderedDict, Counter and defaultdict; the items follow, or are given as Python 2 did."""
    match args:
        case () | (Name(call=None),):
            return {}
        case (dict(items),):
            return dict(items)
        case (list(pairs),) if all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            items = {}
            for key, value in pairs:
                set_item(items, key, value)
            return items


def _size(args: Args) -> tuple[int, ...] | None:
    match args:
        case (tuple(sizes),) if len(sizes) <= 32 and all(type(n) is int for n in sizes):
            return sizes


def _device(args: Args) -> str | None:
    match args:
        case (str(kind), *index) if len(kind) < 20 and all(type(n) is int for n in index):
            return ":".join(map(str, (kind, *index)))


def _number_type(args: Args) -> NumberType | None:
    match args:
        case (str(code), *_) if re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)", code):
            return NumberType(code)


def _number(args: Args) -> Any:
    match args:
        case (NumberType(code=code, order=order), bytes(data)) if len(data) == np.dtype(code).itemsize:
            return np.frombuffer(data, order + code)[0].item()


def _encode(args: Args) -> bytes | None:
    """bytes, as protocol 2 writes them; text that is not Latin-1 is a ValueError."""
    match args:
        case (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1")


# torch's other names of its types.
_ALIASES = {
    "double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32", "short": "int16",
}  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128", "Untyped": "uint8",
}  # fmt: skip
_CALLS: dict[str, Callable[[Args], Any] | None] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "numpy.dtype": _number_type,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "_codecs.encode": _encode,
    # Factories of a defaultdict.
    **dict.fromkeys(
        f"{module}.{name}" for module in ("__builtin__", "builtins") for name in ("dict", "float", "int", "list")
    ),
}


def find(module: str, name: str) -> Any:
    """The stand-in for module.name; both parts are looked up in tables, and nowhere else."""
    # A dot would make one name out of several pairs.
    full = f"{module}.{name}" if "." not in name else ""
    if full in _CALLS:
        return Name(full, _CALLS[full])
    kind = name.removesuffix("Storage")
    if module in ("torch", "torch.storage") and name.endswith("Storage") and kind in _STORAGES:
        return StorageType(_STORAGES[kind])
    if module == "torch" and _ALIASES.get(name, name) in DTYPES:
        return full  # a dtype is its name
    raise Invalid(f"holds {f'{module}.{name}'[:200]!r}, which is no tensor; {ALLOWED}")

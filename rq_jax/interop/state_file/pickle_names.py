"""What a pickle may name: torch's functions that rebuild tensors, dicts, numbers, types.

Each stands in a table under its full name, with a function of ours that does the same to our tensors. The functions
check their arguments and touch no attribute, and work that grows with an argument is counted by `spend`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rq_jax.interop.state_file.tensor import DAMAGED, Tensor

ALLOWED = "only tensors, numbers, strings, lists and dicts are read; save the state_dict alone"
MAX_ARGS = 9
Spend = Callable[[int], None]


@dataclass(frozen=True)
class StorageType:
    """torch.FloatStorage and the like: the type of the elements, by torch's name."""

    dtype: str


@dataclass(frozen=True)
class Name:
    """What a pickle may name besides: `call` makes a value from arguments, None if it may only be named."""

    name: str
    call: Callable[[Spend, tuple[Any, ...]], Any] | None


class Bad(Exception):
    """What is wrong, without the name of the file."""


def _tensor(spend: Spend, args: tuple[Any, ...]) -> Any:
    """_rebuild_tensor, _rebuild_tensor_v2 and _v3: a view of a storage, which is a flat tensor here."""
    match args:
        case (Tensor() as storage, int(offset), tuple(shape), tuple(strides)):
            return storage.view(storage.dtype, shape, strides, offset)
        case (Tensor() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict() | None, *rest):
            dtype = storage.dtype
            if rest and isinstance(rest[0], str):
                dtype = torch_dtype(rest.pop(0).removeprefix("torch."))
            match rest:
                case [] | [None]:
                    return storage.view(dtype, shape, strides, offset)
                case [dict(flags)] if len(flags) <= 2 and all(flag is False for flag in flags.values()):
                    return storage.view(dtype, shape, strides, offset)
            raise Bad("holds a tensor whose conjugation or negation is put off; save it after resolve_conj()")
    raise Bad(f"holds a damaged tensor; {DAMAGED}")


def _parameter(spend: Spend, args: tuple[Any, ...]) -> Any:
    match args:
        case (Tensor() as tensor, bool(), dict() | None):
            return tensor
        case (Tensor() as tensor, bool(), dict() | None, _):  # attributes set by hand
            return tensor
    raise Bad(f"holds a damaged parameter; {DAMAGED}")


def _tensor_with_attributes(spend: Spend, args: tuple[Any, ...]) -> Any:
    match args:
        case (Name(call=call), Name(name="torch.Tensor" | "torch.nn.parameter.Parameter"), tuple(inner), _):
            if len(inner) <= MAX_ARGS and call in (_tensor, _parameter):
                return call(spend, inner)
    raise Bad(f"holds a subclass of torch.Tensor; {ALLOWED}")


def _dict(spend: Spend, args: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict, Counter and defaultdict; the items follow, or are given as Python 2 did."""
    match args:
        case () | (Name(call=None),):
            return {}
        case (dict(items),):
            spend(len(items))
            return dict(items)
        case (list(pairs),):
            spend(len(pairs))
            new: dict[Any, Any] = {}
            for pair in pairs:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    break
                set_item(new, *pair)
            else:
                return new
    raise Bad(f"holds a damaged dict; {DAMAGED}")


def set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    """`target[key] = value`."""
    # Of all other keys one can make millions that fall together in a dict, which then takes hours.
    if type(key) not in (str, bool, float, type(None)) and not (type(key) is int and abs(key) < 1 << 60):
        raise Bad(f"holds a dict with a {type(key).__name__} as a key; allowed are str, int, float, bool and None")
    target[key] = value


def _size(spend: Spend, args: tuple[Any, ...]) -> tuple[int, ...]:
    match args:
        case (tuple(sizes),) if len(sizes) <= 32 and all(type(n) is int for n in sizes):
            return sizes
    raise Bad(f"holds a damaged torch.Size; {DAMAGED}")


def _device(spend: Spend, args: tuple[Any, ...]) -> str:
    match args:
        case (str(kind),) if len(kind) < 20:
            return kind
        case (str(kind), int(index)) if len(kind) < 20:
            return f"{kind}:{index}"
    raise Bad(f"holds a damaged torch.device; {DAMAGED}")


class NumberType:
    """numpy.dtype of one number, built in two steps."""

    def __init__(self, code: str):
        self.code, self.order = code, "="


def _number_type(spend: Spend, args: tuple[Any, ...]) -> NumberType:
    match args:
        case (str(code), *_) if re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)", code):
            return NumberType(code)
    raise Bad(f"holds a numpy.dtype that is no number; {ALLOWED}")


def _number(spend: Spend, args: tuple[Any, ...]) -> Any:
    match args:
        case (NumberType(code=code, order=order), bytes(data)) if len(data) == np.dtype(code).itemsize:
            return np.frombuffer(data, np.dtype(order + code))[0].item()
    raise Bad(f"holds a damaged number; {DAMAGED}")


def _encode(spend: Spend, args: tuple[Any, ...]) -> bytes:
    """bytes, as protocol 2 writes them."""
    match args:
        case (str(text), "latin1" | "latin-1"):
            spend(len(text) // 32)
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                pass
    raise Bad(f"holds damaged bytes; {DAMAGED}")


_DTYPES = {
    "float64": "f8", "double": "f8", "float32": "f4", "float": "f4", "float16": "f2", "half": "f2",
    "int64": "i8", "long": "i8", "int32": "i4", "int": "i4", "int16": "i2", "short": "i2", "int8": "i1",
    "uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "bool": "?",
    "complex64": "c8", "complex128": "c16",
}  # fmt: skip
_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128", "Untyped": "uint8",
}  # fmt: skip
_CALLS: dict[str, Callable[[Spend, tuple[Any, ...]], Any] | None] = {
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
}
# Factories of a defaultdict.
_CALLS |= {
    f"{module}.{name}": None for module in ("__builtin__", "builtins") for name in ("dict", "float", "int", "list")
}


def torch_dtype(name: str) -> np.dtype:
    """The NumPy type of torch's, such as "bfloat16"."""
    if name in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    if name not in _DTYPES:
        raise Bad(f"holds a tensor of type {name[:40]!r}; allowed are {', '.join((*_DTYPES, *_ML_DTYPES))}")
    return np.dtype(_DTYPES[name])


def find(module: str, name: str) -> Any:
    """What stands for module.name; both parts are looked up in tables, and nowhere else."""
    # A dot would make one name out of several pairs.
    full = f"{module}.{name}" if "." not in name else ""
    if full in _CALLS:
        return Name(full, _CALLS[full])
    if module in ("torch", "torch.storage") and name.endswith("Storage") and name.removesuffix("Storage") in _STORAGES:
        return StorageType(_STORAGES[name.removesuffix("Storage")])
    if module == "torch" and name in (*_DTYPES, *_ML_DTYPES):
        return full  # a dtype is its name
    raise Bad(f"holds {f'{module}.{name}'[:200]!r}, which is no tensor; {ALLOWED}")

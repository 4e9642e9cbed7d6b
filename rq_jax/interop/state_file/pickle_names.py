"""The names that a pickle may call: torch's functions that rebuild tensors, and the dicts that hold them.

Each stands in a table under its module and name, with a function of ours that does the same to our tensors. The
functions check the arguments that they use, touch no attribute, copy no more than the machine has counted, and return
None for what torch.save does not write. Every other name stands for an `Opaque` value, and is never looked up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rq_jax.interop.state_file.files import Invalid
from rq_jax.interop.state_file.tensor import Tensor, find_dtype

ALLOWED = "only tensors, numbers, strings, lists and dicts are read; save the state_dict alone"
SCRIPT_MODULES = "__torch__."  # in front of the classes of TorchScript, which are read as dicts of attributes
Args = tuple[Any, ...]
_LONGEST = 200  # the table has shorter names only; more is never copied


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value of a class that is not read: its name is all that is left of it, its parts are dropped."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Function(Opaque):
    """A name of the table: `call` makes a value from arguments."""

    call: Callable[[Args], Any]


def find(module: str, name: str) -> Opaque:
    """The stand-in for module.name, which is looked up in the table and nowhere else."""
    full = f"{module[:_LONGEST]}.{name[:_LONGEST]}"
    if len(module) + len(name) > _LONGEST or (module, name) not in _CALLS:
        return Opaque(full)
    return Function(full, _CALLS[module, name])


def storage_dtype(kind: Opaque) -> str | None:
    """The type of the elements of torch.FloatStorage and the like, by name."""
    module, _, name = kind.name.rpartition(".")
    is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
    return _STORAGES.get(name.removesuffix("Storage")) if is_storage else None


def set_item(target: dict[Any, Any], key: Any, value: Any) -> None:
    """`target[key] = value`, with an `Opaque` key for what is no str, int, float, bool or None."""
    # Of all other keys one can make millions that fall together in a dict, which then takes hours.
    is_plain = type(key) in (str, bool, float, type(None)) or type(key) is int and abs(key) < 1 << 60
    target[key if is_plain or isinstance(key, Opaque) else Opaque(type(key).__name__)] = value


def _tensor(args: Args) -> Tensor | None:
    """_rebuild_tensor, _rebuild_tensor_v2 and _v3: a view of a storage, which is a flat tensor here."""
    match args:
        case (Tensor() as storage, offset, tuple(shape), tuple(strides), *rest):
            dtype = storage.dtype
            # After requires_grad and hooks: the type in version 3, then flags.
            for extra in rest[2:]:
                if isinstance(extra, Opaque):
                    dtype = find_dtype(extra.name.removeprefix("torch."))
                elif extra is not None and (type(extra) is not dict or any(x is not False for x in extra.values())):
                    raise Invalid(
                        "holds a tensor whose conjugation or negation is put off; save it after resolve_conj()"
                    )
            return storage.view(dtype, shape, strides, offset)


def _parameter(args: Args) -> Tensor | Opaque | None:
    match args:  # requires_grad, hooks, attributes set by hand
        case (Tensor() | Opaque() as tensor, _, _) | (Tensor() | Opaque() as tensor, _, _, _):
            return tensor


def _tensor_with_attributes(args: Args) -> Tensor | Opaque | None:
    match args:
        case (Function(call=call), Opaque(name="torch.Tensor" | "torch.nn.parameter.Parameter"), tuple(inner), _):
            return call(inner) if call in (_tensor, _parameter) else None
        case (Opaque(), Opaque() as kind, tuple(), _):  # a subclass of torch.Tensor, or one that is built otherwise
            return kind


def _dict(args: Args) -> dict[Any, Any] | None:
    """OrderedDict and defaultdict; the items follow, or are given as Python 2 did."""
    match args:
        case () | (Opaque(),):
            return {}
        case (list(pairs),) if all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            items: dict[Any, Any] = {}
            for key, value in pairs:
                set_item(items, key, value)
            return items


_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128", "Untyped": "uint8",
}  # fmt: skip
_CALLS: dict[tuple[str, str], Callable[[Args], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): _dict,
}

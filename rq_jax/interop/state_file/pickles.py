"""Pickle machine for files by torch.save, which makes tensors, numbers, strings, lists and dicts only.

The machine knows the opcodes that torch.save writes and refuses all others by name. It calls nothing but the functions
of the table in `pickle_names`, each of which checks its arguments. Whatever else a pickle names is never looked up: a
value that would be made with it is `Opaque`, a name without its parts. Opcodes, bytes, depth and size of the result are
bounded.

`pickletools` decodes the opcodes, and documents them. A `pickle.Unpickler` would not do: whatever its `find_class`
allows, the memo, the dicts and the calls of a pickle have no bounds.
"""

import io
import pickletools
from collections.abc import Callable
from typing import Any

from rq_jax.interop.state_file.files import DAMAGED, Invalid, one_line
from rq_jax.interop.state_file.limits import check_tree
from rq_jax.interop.state_file.pickle_names import ALLOWED, SCRIPT_MODULES, Function, Opaque, find, set_item
from rq_jax.interop.state_file.tensor import Tensor
from rq_jax.settings.text import quoted

MAX_BYTES = 32 << 20
_MAX_STEPS = 400_000  # about 20 for each tensor
_MAX_NODES = 1_000_000
_MAX_DEPTH = 100
_MAX_ARGS = 9
# Tensors can view the same bytes many times over, and each can repeat them.
_MAX_EXPANSION = 8
_ALWAYS_ALLOWED_NBYTES = 64 << 20
_BROKEN = f"holds a damaged pickle; {DAMAGED}"


def read_pickle(stream: io.BytesIO, file_size: int, load_storage: Callable[[Any], Any] | None = None) -> Any:
    """One pickle; the stream ends up behind it.

    Args:
      stream: at most `MAX_BYTES` of a file.
      file_size: of that file in bytes.
      load_storage: from a persistent id to its tensor; None if there may be none.

    Returns:
      A tree of dicts, lists, tuples, strings, bytes, numbers, None, tensors and `Opaque` values, with at most 100
      levels and a million nodes.

    Raises:
      Invalid: it is damaged, or cannot be by torch.save.
    """
    value = _Machine(load_storage).run(stream)
    nbytes = check_tree(value, _split, _MAX_NODES, _MAX_DEPTH)
    if nbytes > max(_ALWAYS_ALLOWED_NBYTES, _MAX_EXPANSION * file_size):
        raise Invalid(f"makes tensors of {nbytes} bytes; at most {_MAX_EXPANSION} times its {file_size} are read")
    return value


def _split(node: Any) -> tuple[int, int, list[Any]]:
    """Number of leaves, bytes of the tensors among them, inner nodes."""
    children = list(node.values()) if type(node) is dict else node
    inner = [child for child in children if type(child) in (dict, list, tuple)]
    return len(children) - len(inner), sum([child.nbytes for child in children if type(child) is Tensor]), inner


class _Machine:
    """The state of a pickle that is being read: a stack, the stacks below its marks, and the memo."""

    def __init__(self, load_storage: Callable[[Any], Any] | None):
        self.load_storage = load_storage
        self.steps_left = _MAX_STEPS
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.modules: dict[int, dict[Any, Any]] = {}  # of TorchScript, by id; held, so that no id is used again

    def run(self, stream: io.BytesIO) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.spend(1)
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise Invalid(f"holds the pickle opcode {opcode.name}, not one of torch.save; {ALLOWED}")
                handler(self, argument)
        except (IndexError, KeyError):  # of an empty stack, an unknown memo
            raise Invalid(_BROKEN) from None
        except ValueError as error:
            limit = f"it may end too early, or have more than {MAX_BYTES} bytes"
            raise Invalid(f"holds a damaged pickle ({one_line(error)}); {limit}; {DAMAGED}") from None
        if len(self.stack) != 1 or self.below:
            raise Invalid(_BROKEN)
        return self.stack.pop()

    def spend(self, count: int) -> None:
        """Count opcodes, and items where one opcode works on many."""
        self.steps_left -= count
        if self.steps_left < 0:
            raise Invalid(f"holds a pickle of more than {_MAX_STEPS} steps; {ALLOWED}")

    def check_protocol(self, protocol: int) -> None:
        if not 2 <= protocol <= 5:
            raise Invalid(f"holds a pickle of protocol {protocol}; allowed are 2 to 5")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_text(self, text: str) -> None:
        if not text.isascii():
            text.encode()  # refuses halves of surrogate pairs, which pickletools lets through
        self.push(text)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def pop_many(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def top(self, kind: type) -> Any:
        """What is added to; a new one for an opaque value, into which nothing goes."""
        target = self.stack[-1]
        if type(target) is not kind and type(target) is not Opaque:
            raise Invalid(f"holds a pickle that adds to what is no {kind.__name__}; {DAMAGED}")
        return target if type(target) is kind else kind()

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def update(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(target, key, value)

    def add(self, items: list[Any]) -> None:
        del items  # of a set, which is opaque
        self.top(Opaque)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Invalid(_BROKEN)
        self.push(find(module, name))

    def make(self, kind: Any, *parts: Any) -> None:
        """An object of a class: a dict of attributes of a module of TorchScript; of others all parts are dropped."""
        if type(kind) is not Opaque:
            raise Invalid(f"makes an object of a {_name(kind)}, which is no class; {ALLOWED}")
        if kind.name.startswith(SCRIPT_MODULES) and parts == ((),):
            self.push({})
            self.modules[id(self.stack[-1])] = self.stack[-1]
        else:
            self.push(Opaque(kind.name))  # another one, as a key of a dict

    def call(self, function: Any, args: Any) -> None:
        if type(function) is Opaque:
            return self.make(function)
        if type(function) is not Function or type(args) is not tuple or len(args) > _MAX_ARGS:
            raise Invalid(f"calls a {_name(function)}, which is no function; {ALLOWED}")
        for value in args:  # a function may copy these
            if type(value) in (dict, list, str):
                self.spend(len(value) // 32 if type(value) is str else len(value))
        value = function.call(args)
        if value is None:
            raise Invalid(f"calls {_name(function)} as torch.save does not; {ALLOWED}")
        self.push(value)

    def build(self, state: Any) -> None:
        """Attributes are dropped, but for those of a module of TorchScript; state dicts have _metadata."""
        target = self.stack[-1]
        if type(target) is not Opaque and not type(target) is type(state) is dict:
            raise Invalid(f"sets attributes of a {_name(target)}; {ALLOWED}")
        if type(target) is dict and id(target) in self.modules:
            self.spend(len(state))
            target.update(state)

    def load(self, pid: Any) -> None:
        if self.load_storage is None:
            raise Invalid(f"holds a storage where none can be; {DAMAGED}")
        self.push(self.load_storage(pid))


def _name(value: Any) -> str:
    return quoted(value if isinstance(value, Opaque) else type(value).__name__)


_VALUES = ("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES")
# Of Python 2, whose text is bytes, which pickletools takes for Latin-1.
_BYTES_AS_TEXT = ("SHORT_BINSTRING", "BINSTRING")
_HANDLERS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_VALUES, _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE"), _Machine.push_text),
    **dict.fromkeys(_BYTES_AS_TEXT, lambda m, text: m.push(text.encode("latin-1").decode())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "PROTO": _Machine.check_protocol,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push(Opaque("set")),
    "ADDITEMS": lambda m, _: m.add(m.pop_to_mark()),
    "FROZENSET": lambda m, _: (m.pop_to_mark(), m.push(Opaque("frozenset"))),
    "BYTEARRAY8": lambda m, _: m.push(Opaque("bytearray")),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop_many(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop_many(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop_many(3))),
    "APPEND": lambda m, _: m.extend(m.pop_many(1)),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.update(m.pop_many(2)),
    "SETITEMS": lambda m, _: m.update(m.pop_to_mark()),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    "GLOBAL": lambda m, names: m.find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(*m.pop_many(2)),
    "REDUCE": lambda m, _: m.call(*m.pop_many(2)),
    "NEWOBJ": lambda m, _: m.make(*m.pop_many(2)),
    "NEWOBJ_EX": lambda m, _: m.make(*m.pop_many(3)),
    "BUILD": lambda m, _: m.build(m.stack.pop()),
    "BINPERSID": lambda m, _: m.load(m.stack.pop()),
}

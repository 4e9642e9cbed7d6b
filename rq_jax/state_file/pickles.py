"""Pickles by torch.save, read by a machine of our own: tensors, numbers, strings, lists and dicts come out.

The machine knows the opcodes that torch.save writes and refuses all others by name. It calls nothing but the
functions of the table in `pickle_names`, each of which checks its arguments: a pickle can name nothing else, and what
it names is never looked up by name. Opcodes, bytes, depth and size of the result are bounded.

Opcodes are documented in `pickletools`.
"""

import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from rq_jax.state_file.pickle_names import ALLOWED, MAX_ARGS, Bad, Name, NumberType, find, set_item
from rq_jax.state_file.tensor import DAMAGED, File, Tensor

_MAX_BYTES = 32 << 20
_MAX_OPCODES = 1_000_000
_MAX_NODES = 1_000_000
_MAX_DEPTH = 100
_MAX_LINE = 256


class _Mark:
    """Stands on the stack where a sequence begins."""


_MARK = _Mark()


def read_pickle(source: File, stream: BinaryIO, load_storage: Callable[[Any], Any] | None = None) -> Any:
    """One pickle from a stream, which is left behind its end.

    Args:
      source: the file, for messages.
      stream: buffered, at the beginning of the pickle.
      load_storage: what a persistent id stands for; None if there may be none.

    Returns:
      A tree of dicts, lists, tuples, strings, bytes, numbers, None and what `load_storage` returned, with at most
      100 levels and a million nodes.

    Raises:
      StateFileError: it holds anything else.
    """
    try:
        value = _Machine(stream, load_storage).run()
        _check_tree(value)
        return value
    except Bad as error:
        raise source.error(str(error)) from None


class _Machine:
    def __init__(self, stream: BinaryIO, load_storage: Callable[[Any], Any] | None):
        self.stream, self.load_storage = stream, load_storage
        self.bytes_left = _MAX_BYTES
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        handlers, take = _HANDLERS, self.take
        for _ in range(_MAX_OPCODES):
            code = take(1)
            if code == pickle.STOP:
                if len(self.stack) != 1:
                    break
                return self.pop()
            handler = handlers.get(code)
            if handler is None:
                raise Bad(f"holds the pickle opcode {_OPCODE_NAMES.get(code, code)}, not one of torch.save; {ALLOWED}")
            handler(self)
        else:
            raise Bad(f"holds a pickle of more than {_MAX_OPCODES} steps; {ALLOWED}")
        raise Bad(f"holds a damaged pickle; {DAMAGED}")

    def spend(self, count: int) -> None:
        """Work that grows with `count` but costs the pickle one step counts like so many bytes."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise Bad(f"holds a pickle of more than {_MAX_BYTES} bytes; {ALLOWED}")

    def take(self, count: int) -> bytes:
        self.spend(count)
        data = self.stream.read(count)
        if len(data) != count:
            raise Bad(f"holds a pickle that ends too early; {DAMAGED}")
        return data

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        data = self.stream.readline(_MAX_LINE)
        self.spend(len(data))
        if not data.endswith(b"\n"):
            raise Bad(f"holds a name that is too long in its pickle; {DAMAGED}")
        return _text(data[:-1])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Bad(f"holds a damaged pickle; {DAMAGED}")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Bad(f"holds a pickle that adds to what is no {kind.__name__}; {DAMAGED}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise Bad(f"holds a damaged pickle; {DAMAGED}")

    def pop_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def remember(self, index: int) -> None:
        self.push(value := self.pop())
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Bad(f"holds a damaged pickle; {DAMAGED}")
        self.push(self.memo[index])

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def extend(self) -> None:
        values = self.pop_to_mark()
        self.top(list).extend(values)

    def set_one(self) -> None:
        value, key = self.pop(), self.pop()
        set_item(self.top(dict), key, value)

    def set_items(self) -> None:
        items = self.pop_to_mark()
        target = self.top(dict)
        if len(items) % 2:
            raise Bad(f"holds a damaged pickle; {DAMAGED}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(target, key, value)

    def find(self) -> None:
        module = self.line()
        self.push(find(module, self.line()))

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Bad(f"holds a damaged pickle; {DAMAGED}")
        self.push(find(module, name))

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.call is None or type(args) is not tuple or len(args) > MAX_ARGS:
            what = function.name if isinstance(function, Name) else type(function).__name__
            raise Bad(f"calls {what!r}, which is no function; {ALLOWED}")
        self.push(function.call(self.spend, args))

    def build(self) -> None:
        """Attributes: a dict's are dropped (state dicts have _metadata), a dtype's are its byte order."""
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        match target, state:
            case (dict(), dict()):
                pass
            case (NumberType(), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_)):
                target.order = order
            case _:
                raise Bad(f"sets attributes of a {type(target).__name__.strip('_')}; {ALLOWED}")

    def load(self) -> None:
        pid = self.pop()
        if self.load_storage is None:
            raise Bad(f"holds a storage where none can be; {DAMAGED}")
        self.push(self.load_storage(pid))


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise Bad(f"holds text that is no UTF-8; {DAMAGED}") from None


def _check_tree(root: Any) -> None:
    """Refuses circles, deep trees, and trees that grow large when shared parts are counted as often as they occur."""
    inner = (dict, list, tuple)
    leaves = (Tensor, str, bytes, int, float, complex, type(None))
    sizes: dict[int, tuple[int, int]] = {}  # nodes and levels by id; 0 nodes while its children are counted
    stack = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        if not isinstance(node, inner):
            if not isinstance(node, leaves):
                name = node.name if isinstance(node, Name) else type(node).__name__.strip("_")
                raise Bad(f"holds {name!r} as a value; {ALLOWED}")
            continue
        children = node.values() if isinstance(node, dict) else node
        if not is_done:
            if id(node) in sizes:
                if not sizes[id(node)][0]:
                    raise Bad(f"holds a list or dict that holds itself; {ALLOWED}")
                continue
            sizes[id(node)] = (0, 0)
            stack.append((node, True))
            stack += [(child, False) for child in children]
            continue
        found = [sizes[id(child)] if isinstance(child, inner) else (1, 1) for child in children]
        nodes, levels = 1 + sum(n for n, _ in found), 1 + max((level for _, level in found), default=0)
        if nodes > _MAX_NODES or levels > _MAX_DEPTH:
            raise Bad(f"holds more than {_MAX_NODES} values or {_MAX_DEPTH} levels; {ALLOWED}")
        sizes[id(node)] = (nodes, levels)


def _counted(layout: str, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(convert(machine.take(machine.number(layout))))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


def _number_of(layout: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(layout))


def _protocol(machine: _Machine) -> None:
    protocol = machine.number("<B")
    if not 2 <= protocol <= 5:
        raise Bad(f"holds a pickle of protocol {protocol}; allowed are 2 to 5")


_OPCODE_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
_HANDLERS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: lambda machine: machine.take(8),
    pickle.MARK: _constant(_MARK),
    pickle.POP: lambda machine: machine.pop(),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.BININT: _number_of("<i"),
    pickle.BININT1: _number_of("<B"),
    pickle.BININT2: _number_of("<H"),
    pickle.LONG1: _counted("<B", pickle.decode_long),
    pickle.BINFLOAT: _number_of(">d"),
    pickle.SHORT_BINUNICODE: _counted("<B", _text),
    pickle.BINUNICODE: _counted("<I", _text),
    pickle.SHORT_BINSTRING: _counted("<B", _text),  # Python 2
    pickle.BINSTRING: _counted("<I", _text),
    pickle.SHORT_BINBYTES: _counted("<B", bytes),
    pickle.BINBYTES: _counted("<I", bytes),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.EMPTY_TUPLE: _constant(()),
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.SETITEM: _Machine.set_one,
    pickle.SETITEMS: _Machine.set_items,
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.pop_to_mark())),
    pickle.TUPLE1: lambda machine: machine.pop_tuple(1),
    pickle.TUPLE2: lambda machine: machine.pop_tuple(2),
    pickle.TUPLE3: lambda machine: machine.pop_tuple(3),
    pickle.BINPUT: lambda machine: machine.remember(machine.number("<B")),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.number("<I")),
    pickle.MEMOIZE: lambda machine: machine.remember(len(machine.memo)),
    pickle.BINGET: lambda machine: machine.recall(machine.number("<B")),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.number("<I")),
    pickle.GLOBAL: _Machine.find,
    pickle.STACK_GLOBAL: _Machine.find_on_stack,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.load,
}

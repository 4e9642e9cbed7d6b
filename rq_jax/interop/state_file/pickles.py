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
from typing import Any

from rq_jax.interop.state_file.pickle_names import ALLOWED, MAX_ARGS, Bad, Name, NumberType, find, set_item
from rq_jax.interop.state_file.tensor import DAMAGED, File, Tensor

MAX_BYTES = 32 << 20
_MAX_STEPS = 700_000
_MAX_NODES = 1_000_000
_MAX_DEPTH = 100
_MAX_LINE = 256
# Tensors can view the same bytes many times over, and each can repeat them.
_MAX_EXPANSION = 8
_ALWAYS_ALLOWED_NBYTES = 64 << 20
_TOO_SHORT = f"holds a pickle that ends too early, or has more than {MAX_BYTES} bytes; {DAMAGED}"
_U1, _U2, _U4, _I4, _F8 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<i", ">d"))


def read_pickle(
    source: File, data: bytes, start: int = 0, load_storage: Callable[[Any], Any] | None = None
) -> tuple[Any, int]:
    """One pickle.

    Args:
      source: the file, for messages.
      data: at most `MAX_BYTES` of it.
      start: where in `data` the pickle begins.
      load_storage: what a persistent id stands for; None if there may be none.

    Returns:
      (value, end): a tree of dicts, lists, tuples, strings, bytes, numbers, None and what `load_storage` returned,
      with at most 100 levels and a million nodes; where in `data` the pickle ends.

    Raises:
      StateFileError: it holds anything else.
    """
    machine = _Machine(data, start, load_storage)
    try:
        value = machine.run()
        nbytes = _check_tree(value)
        if nbytes > max(_ALWAYS_ALLOWED_NBYTES, _MAX_EXPANSION * source.size):
            raise Bad(f"makes tensors of {nbytes} bytes; at most {_MAX_EXPANSION} times its {source.size} are read")
    except Bad as error:
        raise source.error(str(error)) from None
    return value, machine.position


class _Machine:
    def __init__(self, data: bytes, start: int, load_storage: Callable[[Any], Any] | None):
        self.data, self.position, self.load_storage = data, start, load_storage
        self.steps_left = _MAX_STEPS
        self.stack: list[Any] = []
        self.marks: list[int] = []  # how high the stack was at each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        handlers, data, stop = _HANDLERS, self.data, pickle.STOP[0]
        while self.position < len(data):
            code = data[self.position]
            self.position += 1
            self.spend(1)
            if code == stop:
                value = self.pop()
                if self.stack or self.marks:
                    raise Bad(f"holds a damaged pickle; {DAMAGED}")
                return value
            handler = handlers.get(code)
            if handler is None:
                raise Bad(f"holds the pickle opcode {_OPCODE_NAMES.get(code, code)}, not one of torch.save; {ALLOWED}")
            handler(self)
        raise Bad(_TOO_SHORT)

    def spend(self, count: int) -> None:
        """Counts opcodes, and items where one opcode works on many."""
        self.steps_left -= count
        if self.steps_left < 0:
            raise Bad(f"holds a pickle of more than {_MAX_STEPS} steps; {ALLOWED}")

    def take(self, count: int) -> bytes:
        begin, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise Bad(_TOO_SHORT)
        return self.data[begin : self.position]

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise Bad(f"holds a name that is too long in its pickle; {DAMAGED}")
        name = _text(self.take(end - self.position))
        self.position += 1
        return name

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def check_stack(self) -> None:
        """Refuses to reach under the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Bad(f"holds a damaged pickle; {DAMAGED}")

    def pop(self) -> Any:
        self.check_stack()
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        self.check_stack()
        if type(self.stack[-1]) is not kind:
            raise Bad(f"holds a pickle that adds to what is no {kind.__name__}; {DAMAGED}")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise Bad(f"holds a damaged pickle; {DAMAGED}")
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def pop_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def remember(self, index: int) -> None:
        self.check_stack()
        self.memo[index] = self.stack[-1]

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
        self.check_stack()
        target = self.stack[-1]
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


def _check_tree(root: Any) -> int:
    """Refuses circles, deep trees, and trees that grow large when shared parts are counted as often as they occur.

    Returns:
      Bytes of all tensors, counted once for each list, tuple or dict that they are in.
    """
    nbytes = root.nbytes if type(root) is Tensor else 0
    sizes: dict[int, tuple[int, int]] = {}  # nodes and levels by id; 0 nodes while its children are counted
    stack = [root] if _is_inner(root) else []
    while stack:
        node = stack[-1]
        if sizes.get(id(node), (0, 0))[0]:
            stack.pop()
            continue
        children = node.values() if type(node) is dict else node
        inner = [child for child in children if _is_inner(child)]
        if id(node) not in sizes:
            sizes[id(node)] = (0, 0)
            stack += inner
            continue
        stack.pop()
        nbytes += sum(child.nbytes for child in children if type(child) is Tensor)
        nodes, levels = 1 + len(children) - len(inner), 1
        for child in inner:
            child_nodes, child_levels = sizes[id(child)]
            if not child_nodes:
                raise Bad(f"holds a list or dict that holds itself; {ALLOWED}")
            nodes, levels = nodes + child_nodes, max(levels, 1 + child_levels)
        if nodes > _MAX_NODES or levels > _MAX_DEPTH:
            raise Bad(f"holds more than {_MAX_NODES} values or {_MAX_DEPTH} levels; {ALLOWED}")
        sizes[id(node)] = (nodes, levels)
    return nbytes


def _is_inner(node: Any) -> bool:
    """Whether it holds others; refuses what is neither that nor a leaf of a state."""
    kind = type(node)
    if kind in _INNER:
        return True
    if kind not in _LEAVES:
        raise Bad(f"holds {node.name if kind is Name else kind.__name__!r} as a value; {ALLOWED}")
    return False


_INNER = frozenset({dict, list, tuple})
_LEAVES = frozenset({Tensor, str, bytes, bool, int, float, complex, type(None)})


def _counted(layout: struct.Struct, convert: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(convert(machine.take(machine.number(layout))))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


def _number_of(layout: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(layout))


def _protocol(machine: _Machine) -> None:
    protocol = machine.number(_U1)
    if not 2 <= protocol <= 5:
        raise Bad(f"holds a pickle of protocol {protocol}; allowed are 2 to 5")


_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_BY_CODE: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: lambda machine: machine.take(8),
    pickle.MARK: _Machine.mark,
    pickle.POP: lambda machine: machine.pop(),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.BININT: _number_of(_I4),
    pickle.BININT1: _number_of(_U1),
    pickle.BININT2: _number_of(_U2),
    pickle.LONG1: _counted(_U1, pickle.decode_long),
    pickle.BINFLOAT: _number_of(_F8),
    pickle.SHORT_BINUNICODE: _counted(_U1, _text),
    pickle.BINUNICODE: _counted(_U4, _text),
    pickle.SHORT_BINSTRING: _counted(_U1, _text),  # Python 2
    pickle.BINSTRING: _counted(_U4, _text),
    pickle.SHORT_BINBYTES: _counted(_U1, bytes),
    pickle.BINBYTES: _counted(_U4, bytes),
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
    pickle.BINPUT: lambda machine: machine.remember(machine.number(_U1)),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.number(_U4)),
    pickle.MEMOIZE: lambda machine: machine.remember(len(machine.memo)),
    pickle.BINGET: lambda machine: machine.recall(machine.number(_U1)),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.number(_U4)),
    pickle.GLOBAL: _Machine.find,
    pickle.STACK_GLOBAL: _Machine.find_on_stack,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.load,
}
_HANDLERS = {code[0]: handler for code, handler in _BY_CODE.items()}

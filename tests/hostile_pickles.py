"""Pickles that want to run code, fill the memory or take hours.

Each function yields a name, the pickle as bytes or as a value to write, and a pattern of the message that refuses it.
"""

import pickle
import re
import struct

import numpy as np
from state_files import ORDERED_DICT, Call, Global, Storage, encode, rebuild, tensor

SENTINEL = "code has run"
READ = "read"  # harmless after all
DATA = np.arange(6, dtype=np.float32)
STORAGE = Storage("Float", DATA)
START = pickle.PROTO + b"\2"


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def put(index: int) -> bytes:
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", index)


TOUCH = f"open('{SENTINEL}', 'w')"


def opaque(name: str) -> str:
    """The outcome of a pickle that becomes this name, without its parts."""
    return f"{READ}: {name}"


def code_cases():
    """Values and raw pickles that call, build or name something: all of them names in the end."""
    for module, name, args in (
        ("posix", "system", (f"touch '{SENTINEL}'",)),
        ("os", "system", (f"touch '{SENTINEL}'",)),
        ("builtins", "eval", (TOUCH,)),
        ("__builtin__", "eval", (TOUCH,)),
        ("builtins", "exec", (TOUCH,)),
        ("builtins", "open", (SENTINEL, "w")),
        ("builtins", "__import__", ("antigravity",)),
        ("builtins", "getattr", ("", "format")),
        ("copyreg", "_reconstructor", (Global("posix system"), Global("builtins object"), None)),
        ("functools", "partial", (Global("builtins eval"), TOUCH)),
        ("operator", "attrgetter", ("a",)),
        ("subprocess", "Popen", ("ls",)),
        ("torch.storage", "_load_from_bytes", (b"x",)),
        ("torch.serialization", "load", ("x",)),
        ("torch", "load", ("x",)),
        ("torch.hub", "load", ("x", "y")),
        ("rq_jax.interop.state_file", "read_state", ("x",)),
        ("rq_jax.interop.state_file.pickle_names", "_CALLS", ()),
        ("torch", "Size", ((1, 2),)),
        ("torch", "FloatStorage", (3,)),
        ("numpy", "dtype", ("O8", False, True)),
        ("_codecs", "encode", ("abc", "rot13")),
        ("builtins", "set", ([1],)),
        ("builtins", "list", ((1,),)),
        ("pickle", "loads", (b"x",)),
        ("numpy", "load", ("x",)),
        ("numpy.core.multiarray", "_reconstruct", (1,)),
        ("argparse", "Namespace", ()),
        ("omegaconf.dictconfig", "DictConfig", ()),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", ()),
        ("collections", "OrderedDict.__init__", ()),
        ("torch._utils", "_rebuild_tensor_v2.__globals__", ()),
        ("torch", "_utils._rebuild_tensor_v2", ()),
        ("", "torch.Size", ()),
    ):
        yield f"{module}.{name}", Call(Global(f"{module} {name}"), args), re.escape(opaque(f"{module}.{name}"))
        attributes = {"__class__": Global("posix system"), "weights": tensor(DATA, "Float")}
        with_attributes = Call(Global(f"{module} {name}"), args, attributes)
        yield f"{module}.{name} with attributes", {"a": [with_attributes]}, re.escape(f"['{module}.{name}']")
    dotted = START + text("collections") + text("OrderedDict.__init__.__globals__") + pickle.STACK_GLOBAL + b")R."
    yield "a dotted name from the stack", dotted, opaque("collections.OrderedDict.__init__.__globals__")
    joined = START + text("torch._utils _rebuild_tensor_v2") + text("") + pickle.STACK_GLOBAL + b")R."
    yield "a joined name from the stack", joined, opaque("torch._utils _rebuild_tensor_v2.")
    yield "only named", {"callbacks": Global("posix system")}, "{'str': 'posix.system'}"
    system = b"cposix\nsystem\n" + text(f"touch '{SENTINEL}'")
    for name, code in {
        "NEWOBJ": b"\x85\x81", "NEWOBJ_EX": b"\x85}\x92", "REDUCE with no tuple": b"R", "REDUCE and BUILD": b"\x85R}b",
        "APPENDS": b"\x85R(NNe", "APPEND": b"\x85RNa", "SETITEMS": b"\x85R(]]u", "SETITEM": b"\x85R}]s",
        "ADDITEMS": b"\x85R(NN\x90", "a call of what is made": b"\x85R)R", "slots": b"\x85RN}\x86b",
    }.items():  # fmt: skip
        yield f"code by {name}", START + system + code + b".", opaque("posix.system")
    for name, value in {
        "a function": Global("torch._utils _rebuild_tensor_v2"),
        "a type": Global("torch Size"),
    }.items():
        yield f"{name} as a value", [value], r"\['torch\."
        yield f"{name} as a key", {value: 1}, r"\{'torch\.[\w.]+': 1\}"
    yield "a dict as a key", {ORDERED_DICT: 1}, r"\{'dict': 1\}"
    yield "a defaultdict of code", Call(Global("collections defaultdict"), (Global("posix system"),)), READ + ": {}"
    for name, target in {"text": "abc", "tensor": tensor(DATA, "Float"), "dict": ORDERED_DICT}.items():
        yield f"a {name} that is called", Call(target, ()), "calls a '.*', which is no function"
        made = START + encode(target, {})[2:-1] + b")\x81."
        yield f"a {name} that makes an object", made, "makes an object of a '.*', which is no class|lacks its member"
    attributes = {"__class__": 1, "__dict__": {}}
    yield "an OrderedDict with attributes", Call(Global("collections OrderedDict"), (), attributes), READ
    v2 = tensor(DATA, "Float")
    yield "a tensor with attributes", Call(v2.function, v2.args, attributes), "sets attributes of a 'Tensor'"
    yield (
        "a function with attributes",
        START + b"ccollections\nOrderedDict\n}b.",
        "sets attributes of a 'collections.Or",
    )
    yield (
        "a function that makes an object",
        START + b"ccollections\nOrderedDict\n)\x81.",
        "makes an object of a 'collect",
    )
    yield "slots", Call(Global("collections OrderedDict"), (), (None, {"a": 1})), "sets attributes of a 'dict'"
    for pid in (
        ("module", Global("torch FloatStorage"), "0", "cpu", 6),
        ("storage", "FloatStorage", "0", "cpu", 6),
        ("module", "x"),
        ("module",),
        "x",
        None,
        (),
        {},
    ):
        yield (
            f"the reference {type(pid).__name__} {len(pid or '')}",
            START + encode(pid, {})[2:-1] + b"Q.",
            "a reference that is no storage|a damaged pickle|read: torch.FloatStorage",
        )


def opcode_cases():
    """Opcodes that torch.save never writes."""
    for name, data in {
        "INST": b"(iposix\nsystem\n",
        "OBJ": b"(ctorch\nSize\no", "EXT1": b"\x82\1", "EXT2": b"\x83\1\0", "EXT4": b"\x84\1\0\0\0", "DUP": b"N2",
        "LONG4": b"\x8b\1\0\0\0\5", "BINBYTES8": b"\x8e\1" + b"\0" * 7 + b"a",
        "BINUNICODE8": b"\x8d\1" + b"\0" * 7 + b"a", "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"N\x98", "PERSID": b"Px\n", "INT": b"I1\n", "LONG": b"L1\n", "FLOAT": b"F1\n",
        "STRING": b"S'a'\n", "UNICODE": b"Va\n", "GET": b"g0\n", "PUT": b"Np0\n", "LIST": b"(l", "DICT": b"(d",
    }.items():  # fmt: skip
        yield name, START + data + b".", f"holds the pickle opcode {name}, not one of torch.save"
    yield "no opcode", START + b"\xfe.", "a damaged pickle .*opcode b'.*' unknown"
    for name, data in {
        "LONG4": b"\x8b\xff\xff\xff\x7f", "BINBYTES8": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "BINUNICODE8": b"\x8d" + b"\xff" * 7 + b"\x7f", "BYTEARRAY8": b"\x96" + b"\0\0\0\0\1\0\0\0",
    }.items():  # fmt: skip
        yield f"{name} of very much", START + data + b".", "a damaged pickle"
    for name, data in {
        "nothing on the stack": b"", "an empty stack": b"0", "a mark at the end": b"(", "two values": b"NN", "no list": b"Na",
        "an empty list": b"a", "no mark": b"e", "odd items": b"}(Nu", "no dict": b"N(NNu", "nothing to call": b"R",
        "no arguments": b"NR", "nothing remembered": b"h\0", "a name of numbers": b"NN\x93", "a mark in a pair": b"N(\x86",
        "a mark for a list": b"(a", "attributes of nothing": b"b", "attributes of the air": b"}b", "no text": b"X\1\0\0\0\xff",
        "nothing to remember": b"q\0", "no id": b"Q", "no class": b")\x81", "no mark to add": b"\x8f\x90",
        "an item of no set": b"}(N\x90", "nothing to pop to": b"1", "no keywords": b"N)\x92", "items for a number": b"K\1(Ne",
    }.items():  # fmt: skip
        yield name, START + data + b".", "damaged|which is no function|adds to what is no|sets attributes"
    yield "no end", START + b"N", "a damaged pickle"
    yield "half of a surrogate pair", START + b"X\3\0\0\0\xed\xa0\x80.", "a damaged pickle .*surrogates not allowed"
    yield "text of Python 2 that is no text", START + b"U\1\xff.", "a damaged pickle .*can't decode"
    yield "a long name", START + b"c" + b"a" * 10**6, "a damaged pickle .*no newline"
    yield "protocol 1", b"\x80\1N.", "a pickle of protocol 1; allowed are 2 to 5"
    yield "protocol 99", b"\x80\x63N.", "a pickle of protocol 99; allowed are 2 to 5"


def bomb_cases():
    """Pickles whose reading, or whose result, would be large or slow."""
    yield "a memo of 4 billion", START + b"N" + put(0xFFFFFFFF) + b".", READ
    yield "a text of 4 GB", START + b"X\xff\xff\xff\xff", "may end too early, or have more than 33554432 bytes"
    yield "bytes of 2 GB", START + b"B\0\0\0\x80", "may end too early, or have more than 33554432 bytes"
    yield "a text of 31 MB", START + text("\U0001f600" + "a" * (31 << 20)) + b".", READ
    yield "many texts", START + (text("\U0001f600" + "a" * (10 << 20)) + b"0") * 3 + b"N.", READ
    levels = [b"]" + put(0)] + [b"0](" + get(i) * 2 + b"e" + put(i + 1) for i in range(60)]
    yield (
        "lists of two lists of two lists",
        START + b"".join(levels) + b".",
        "more than 1000000 values|more than 100 levels",
    )
    levels = [b"N\x85" + put(0)] + [b"0" + get(i) * 2 + b"\x86" + put(i + 1) for i in range(60)]
    yield "tuples of two tuples", START + b"".join(levels) + b".", "more than 1000000 values|more than 100 levels"
    yield "tuples of two tuples as a key", START + b"}" + b"".join(levels) + b"Ns.", r"\{'tuple': None\}"
    yield (
        "tuples of two tuples as a shape",
        START + b"ctorch\nSize\n" + b"".join(levels) + b"\x85R.",
        opaque("torch.Size"),
    )
    yield "deep", START + b"]" * 200 + b"a" * 199 + b".", "more than 100 levels"
    yield "very deep", START + b"]" * 190_000 + b"a" * 189_999 + b".", "more than 1000000 values|more than 100 levels"
    yield "very deep tuples", START + b"N" + b"\x85" * 390_000 + b".", "more than 1000000 values|more than 100 levels"
    yield "a list in itself", START + b"]" + put(0) + get(0) + b"a.", "a list or dict that holds itself"
    yield "a dict in itself", START + b"}" + put(0) + b"K\0" + get(0) + b"s.", "a list or dict that holds itself"
    yield "many steps", START + b"N0" * 500_000 + b"N.", "more than 400000 steps"
    yield "many lists", START + b"](" + b"]" * 390_000 + b"e.", READ
    yield "many dicts", START + b"](" + b"}" * 500_000 + b"e.", "more than 400000 steps"
    yield "many marks", START + b"(" * 500_000, "more than 400000 steps"
    yield "many memos", START + b"](" + b"".join(b"}" + put(i) for i in range(190_000)) + b"e.", READ
    yield "many globals", START + b"](" + b"ctorch\nfloat32\n" * 200_000 + b"e.", READ
    items = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(100_000)) + b"u" + put(0)
    copies = (b"h\1" + get(0) + b"\x85R0") * 10_000
    yield (
        "a dict dropped again and again",
        START + b"ccollections\nCounter\nq\x010" + items + b"0" + copies + b"N.",
        READ,
    )
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(100_000)) + b"e" + put(0)
    yield (
        "a list made a dict again and again",
        START + b"ccollections\nOrderedDict\nq\x010" + pairs + b"0" + copies + b"N.",
        "more than 400000 steps",
    )
    encoded = (b"h\1" + get(0) + get(2) + b"\x86R0") * 10_000
    long = text("a" * (10 << 20)) + put(0) + b"0" + text("latin1") + put(2) + b"0"
    yield (
        "a text encoded again and again",
        START + b"c_codecs\nencode\nq\x010" + long + encoded + b"N.",
        READ,
    )
    names = long + (get(0) + get(0) + b"\x93") * 20_000
    yield "a long name again and again", START + b"](" + names + b"e.", READ
    many = b"(" + b"N" * 200_000 + b"t" + put(0) + b"0"
    for name, function, expected in (
        ("a name", "torch\ndevice", READ),
        ("a function", "collections\nOrderedDict", "calls"),
    ):
        calls = (b"h\1" + get(0) + b"R0") * 10_000
        yield f"many arguments of {name}", START + f"c{function}\nq\1".encode() + b"0" + many + calls + b"N.", expected
    yield "many opaque values", START + b"](" + b"ca\nb\n)R" * 30_000 + b"e.", READ
    yield "many opaque keys", START + b"}(" + b"ca\nb\nN" * 30_000 + b"u.", READ
    yield "many keys that are lists", START + b"}(" + b"]N" * 30_000 + b"u.", READ
    yield "many sets", START + b"](" + b"\x8f(N\x90(\x91" * 30_000 + b"e.", READ
    yield "a long path", START + b"}" + text("module." * (1 << 22)) + b"Ns.", READ
    for name, keys in {
        "alike": [i * (2**61 - 1) for i in range(50_000)],
        "steps of 2**40": [i << 40 for i in range(190_000)],
    }.items():
        numbers = b"".join(b"\x8a\x0b" + key.to_bytes(11, "little") + b"N" for key in keys)
        yield f"keys {name}", START + b"}(" + numbers + b"u.", READ
    floats = b"".join(
        b"G" + struct.pack(">d", 2.0 ** (61 * i - 900) * (j + 1)) + b"N" for i in range(30) for j in range(6000)
    )
    yield "float keys", START + b"}(" + floats + b"u.", READ
    yield (
        "a key of a path",
        Storage("Float", DATA, "../../etc/passwd"),
        "holds a member of the name 'raw/data/../../etc/passwd'",
    )
    yield "a long key", Storage("Float", DATA, "k" * 10**4), "holds a member of the name"
    shared = b"](" + b"]" * 100_000 + b"e" + put(0)
    yield "a long list in many places", START + b"](" + shared + get(0) * 100_000 + b"e.", "more than 1000000 values"
    yield "a long number", START + (b"\x8a\xff" + b"\x7f" * 255 + b"0") * 100_000 + b"N.", READ


def tensor_cases():
    """Tensors that do not fit into what is stored."""
    huge = 2**62 - 1
    for name, args in {
        "too long": ((7,), (1,)), "too far": ((6,), (1,), 1), "a long stride": ((2, 2), (5, 1)), "a huge stride": ((2,), (huge,)),
        "a huge offset": ((1,), (1,), huge), "an offset of nothing": ((), (), 6), "a huge shape": ((huge,), (1,)),
    }.items():  # fmt: skip
        yield name, rebuild(STORAGE, *args), "ends outside the 24 bytes of storage '0'|impossible tensor in storage '0'"
    for name, args in {
        "a negative size": ((-1,), (1,)), "a negative stride": ((2,), (-1,), 1), "a negative offset": ((1,), (1,), -1),
        "sizes whose product is 0": ((2**33, 2**33), (0, 0)), "none of very many": ((0, 2**40, 2**40), (1, 1, 1)),
        "a large number": ((2**2000,), (1,)), "no numbers": ((1.0,), (1,)), "booleans": ((True,), (1,)), "text": (("a",), (1,)),
        "a shape of a stride more": ((1,), (1, 1)), "40 axes": ((1,) * 40, (1,) * 40), "very many axes": ((1,) * 9000, (1,) * 9000),
        "a boolean offset": ((1,), (1,), True),
    }.items():  # fmt: skip
        yield name, rebuild(STORAGE, *args), "impossible tensor in storage '0'"
    yield (
        "repeated a billion times",
        rebuild(STORAGE, (10**9, 2), (0, 1)),
        "repeats the 24 bytes of storage '0'; at most 8 times",
    )
    yield (
        "windows",
        rebuild(Storage("Float", np.zeros(2000, np.float32)), (1000, 1000), (1, 1)),
        "repeats the 8000 bytes",
    )
    repeated = rebuild(STORAGE, (1 << 18,), (0,))
    yield "repeated a bit in many places", [repeated] * 65, r"makes tensors of 68157440 bytes; at most 8 times its"
    yield "repeated a bit in some places", [repeated] * 9, READ
    in_lists = [repeated] * 8
    for _ in range(4):
        in_lists = [in_lists] * 8
    yield "repeated a bit in lists of lists", in_lists, r"makes tensors of \d+ bytes; at most 8 times its"
    yield (
        "a list as a shape",
        rebuild(STORAGE, [1], [1]),
        "calls 'torch._utils._rebuild_tensor_v2' as torch.save does not",
    )
    yield "conjugated", rebuild(STORAGE, (1,), (1,), 0, {"conj": True}), "conjugation or negation is put off"
    yield "no storage", rebuild("x", (1,), (1,)), "calls 'torch._utils._rebuild_tensor_v2' as torch.save does not"
    v3 = Global("torch._utils _rebuild_tensor_v3")
    yield "no type", Call(v3, (*rebuild(STORAGE, (1,), (1,)).args, Global("torch float7"))), "of type 'float7'"
    yield "a type of text", Call(v3, (*rebuild(STORAGE, (1,), (1,)).args, "torch.float32")), "conjugation or negation"
    yield (
        "a parameter of text",
        Call(Global("torch._utils _rebuild_parameter"), ("x", True, ORDERED_DICT)),
        "calls 'torch._utils._rebuild_parameter' as torch.save does not",
    )
    subclass = (Global("torch._utils _rebuild_tensor_v2"), Global("my Tensor"), rebuild(STORAGE, (6,), (1,)).args, None)
    from_type = Global("torch._tensor _rebuild_from_type_v2")
    yield "a subclass", Call(from_type, subclass), opaque("my.Tensor")
    yield (
        "a parameter of a subclass",
        Call(Global("torch._utils _rebuild_parameter"), (Call(from_type, subclass), True, {})),
        opaque("my.Tensor"),
    )
    wrong = (Global("collections OrderedDict"), Global("torch Tensor"), (), None)
    yield "a dict as a tensor", Call(from_type, wrong), "_rebuild_from_type_v2' as torch.save does not"
    for name, count in {"negative": -1, "absurd": 2**62}.items():
        yield f"a storage of {name} size", Storage("Float", DATA, count=count), "holds a storage of .* elements"
    yield (
        "a storage that is short",
        Storage("Float", DATA, count=1000),
        "outside the 24 bytes|of elements|says of its|smaller than",
    )
    yield "no number of elements", Storage("Float", DATA, count="6"), "a reference that is no storage"
    yield (
        "a storage of no type",
        START + encode(("storage", Global("torch QInt8Storage"), "0", "cpu", 6), {})[2:-1] + b"Q.",
        "holds a storage of type 'torch.QInt8Storage', which is not read",
    )


GROUPS = (code_cases, opcode_cases, tensor_cases)  # of a single pickle each, for either format of torch.save

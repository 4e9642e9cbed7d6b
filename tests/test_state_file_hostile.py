"""Files that want to run code, fill the memory or take hours: refused in one line, within seconds and megabytes.

All are read in one process of their own, whose time and memory are measured. The bounds are bounds of safety.
"""

import dataclasses
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from state_files import (
    MAGIC,
    ORDERED_DICT,
    PROTOCOL,
    Call,
    Global,
    Storage,
    encode,
    rebuild,
    tensor,
    write_stream,
    write_zip,
)

SECONDS, MEGABYTES = 2, 500
SENTINEL = "code has run"
READ = "read"  # harmless after all
DATA = np.arange(6, dtype=np.float32)
STORAGE = Storage("Float", DATA)
START = pickle.PROTO + b"\2"


@dataclasses.dataclass
class Case:
    name: str
    data: bytes
    expected: str  # pattern of the message
    file: str = ""


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def put(index: int) -> bytes:
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", index)


TOUCH = f"open('{SENTINEL}', 'w')"
NO_TENSOR = "holds '{}', which is no tensor; only tensors, numbers, strings, lists and dicts are read; save the state_dict alone"


def code_cases():
    """Values and raw pickles that call, build or name something."""
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
        ("rq_jax.state_file", "read_state", ("x",)),
        ("rq_jax.state_file.pickle_names", "_CALLS", ()),
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
        yield (
            f"{module}.{name}",
            Call(Global(f"{module} {name}"), args),
            re.escape(NO_TENSOR.format(f"{module}.{name}")),
        )
    dotted = START + text("collections") + text("OrderedDict.__init__.__globals__") + pickle.STACK_GLOBAL + b"."
    yield "a dotted name from the stack", dotted, "holds 'collections.OrderedDict.__init__.__globals__'"
    yield "only named", {"callbacks": Global("posix system")}, re.escape(NO_TENSOR.format("posix.system"))
    yield "a key", {Global("torch float32"): 1, ORDERED_DICT: 1}, "a dict with a dict as a key"
    yield "a type as a key", {Global("torch FloatStorage"): 1}, "a dict with a StorageType as a key"
    yield (
        "a function as a value",
        [Global("torch._utils _rebuild_tensor_v2")],
        "'torch._utils._rebuild_tensor_v2' as a value",
    )
    yield "a storage type as a value", [Global("torch FloatStorage")], "'StorageType' as a value"
    yield "a number type as a value", Call(Global("numpy dtype"), ("f4",)), "'NumberType' as a value"
    yield "a defaultdict of code", Call(Global("collections defaultdict"), (Global("posix system"),)), "posix.system"
    yield (
        "a factory that is called",
        Call(Global("builtins list"), ((1,),)),
        "calls 'builtins.list', which is no function",
    )
    targets = {
        "text": "abc",
        "tensor": tensor(DATA, "Float"),
        "type": Global("torch FloatStorage"),
        "dict": ORDERED_DICT,
    }
    for name, target in targets.items():
        yield f"a {name} that is called", Call(target, ()), "calls '.*', which is no function"
    attributes = {"__class__": 1, "__dict__": {}}
    yield "an OrderedDict with attributes", Call(Global("collections OrderedDict"), (), attributes), READ
    yield "a Size with attributes", Call(Global("torch Size"), ((1,),), attributes), "sets attributes of a tuple"
    v2 = tensor(DATA, "Float")
    yield "a tensor with attributes", Call(v2.function, v2.args, attributes), "sets attributes of a Tensor"
    yield "a function with attributes", START + b"ctorch\nSize\n}b.", "sets attributes of a Name"
    yield "slots", Call(Global("collections OrderedDict"), (), (None, {"a": 1})), "sets attributes of a dict"
    yield (
        "a dtype with fields",
        Call(Global("numpy dtype"), ("f4",), (3, "<", None, ("a",), {}, 1, 1, 0)),
        "sets attributes of a NumberType",
    )
    yield "a dtype of objects", Call(Global("numpy dtype"), ("O8", False, True)), "a numpy.dtype that is no number"
    long = Call(Global("numpy dtype"), ("i8",))
    yield "a short number", Call(Global("numpy.core.multiarray scalar"), (long, b"1234")), "a damaged number"
    yield "bytes that are none", Call(Global("_codecs encode"), ("\u1234", "latin1")), "damaged bytes"
    yield "another encoding", Call(Global("_codecs encode"), ("abc", "rot13")), "damaged bytes"
    for pid in (
        ("module", Global("torch FloatStorage"), "0", "cpu", 6),
        ("storage", "FloatStorage", "0", "cpu", 6),
        "x",
        None,
        (),
        {},
    ):
        yield (
            f"the reference {type(pid).__name__} {len(pid or '')}",
            START + encode(pid, {})[2:-1] + b"Q.",
            "a reference that is no storage",
        )


def opcode_cases():
    """Opcodes that torch.save never writes."""
    for name, data in {
        "NEWOBJ": b"ctorch\nSize\n)\x81", "NEWOBJ_EX": b"ctorch\nSize\n)}\x92", "INST": b"(iposix\nsystem\n",
        "OBJ": b"(ctorch\nSize\no", "EXT1": b"\x82\1", "EXT2": b"\x83\1\0", "EXT4": b"\x84\1\0\0\0", "DUP": b"N2",
        "LONG4": b"\x8b\xff\xff\xff\x7f", "BINBYTES8": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "BINUNICODE8": b"\x8d" + b"\xff" * 7 + b"\x7f", "BYTEARRAY8": b"\x96" + b"\0\0\0\0\1\0\0\0", "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"N\x98", "PERSID": b"Px\n", "INT": b"I1\n", "LONG": b"L1\n", "FLOAT": b"F1\n",
        "STRING": b"S'a'\n", "UNICODE": b"Va\n", "GET": b"g0\n", "PUT": b"Np0\n", "EMPTY_SET": b"\x8f", "ADDITEMS": b"(\x90",
        "FROZENSET": b"(\x91", "LIST": b"(l", "DICT": b"(d", "POP_MARK": b"(1",
    }.items():  # fmt: skip
        yield name, START + data + b".", f"holds the pickle opcode {name}, not one of torch.save"
    yield "no opcode", START + b"\xfe.", "holds the pickle opcode"
    for name, data in {
        "nothing on the stack": b"", "an empty stack": b"0", "a mark at the end": b"(", "two values": b"NN", "no list": b"Na",
        "an empty list": b"a", "no mark": b"e", "odd items": b"}(Nu", "no dict": b"N(NNu", "nothing to call": b"R",
        "no arguments": b"NR", "nothing remembered": b"h\0", "a name of numbers": b"NN\x93", "a mark in a pair": b"N(\x86",
        "a mark for a list": b"(a", "attributes of nothing": b"b", "attributes of the air": b"}b", "no text": b"X\1\0\0\0\xff",
        "nothing to remember": b"q\0", "no id": b"Q",
    }.items():  # fmt: skip
        yield name, START + data + b".", "damaged|which is no function|adds to what is no|sets attributes|no UTF-8"
    yield "no end", START + b"N", "ends too early"
    yield "a long name", START + b"c" + b"a" * 10**6, "a name that is too long"
    yield "protocol 1", b"\x80\1N.", "a pickle of protocol 1; allowed are 2 to 5"
    yield "protocol 99", b"\x80\x63N.", "a pickle of protocol 99; allowed are 2 to 5"


def bomb_cases():
    """Pickles whose reading, or whose result, would be large or slow."""
    yield "a memo of 4 billion", START + b"N" + put(0xFFFFFFFF) + b".", READ
    yield "a text of 4 GB", START + b"X\xff\xff\xff\xff", "a pickle of more than 33554432 bytes"
    yield "bytes of 2 GB", START + b"B\0\0\0\x80", "a pickle of more than 33554432 bytes"
    yield "a text of 31 MB", START + text("\U0001f600" + "a" * (31 << 20)) + b".", READ
    yield "many texts", START + (text("\U0001f600" + "a" * (15 << 20)) + b"0") * 3 + b"N.", "more than 33554432 bytes"
    levels = [b"]" + put(0)] + [b"0](" + get(i) * 2 + b"e" + put(i + 1) for i in range(60)]
    yield "lists of two lists of two lists", START + b"".join(levels) + b".", "more than 1000000 values or 100 levels"
    levels = [b"N\x85" + put(0)] + [b"0" + get(i) * 2 + b"\x86" + put(i + 1) for i in range(60)]
    yield "tuples of two tuples", START + b"".join(levels) + b".", "more than 1000000 values or 100 levels"
    yield "tuples of two tuples as a key", START + b"}" + b"".join(levels) + b"Ns.", "a dict with a tuple as a key"
    yield (
        "tuples of two tuples as a shape",
        START + b"ctorch\nSize\n" + b"".join(levels) + b"\x85R.",
        "a damaged torch.Size",
    )
    yield "deep", START + b"]" * 200 + b"a" * 199 + b".", "more than 1000000 values or 100 levels"
    yield "very deep", START + b"]" * 400_000 + b"a" * 399_999 + b".", "more than 1000000 values or 100 levels"
    yield "very deep tuples", START + b"N" + b"\x85" * 900_000 + b".", "more than 1000000 values or 100 levels"
    yield "a list in itself", START + b"]" + put(0) + get(0) + b"a.", "a list or dict that holds itself"
    yield "a dict in itself", START + b"}" + put(0) + b"K\0" + get(0) + b"s.", "a list or dict that holds itself"
    yield "many steps", START + b"N0" * 2_000_000 + b"N.", "more than 1000000 steps"
    yield "many lists", START + b"](" + b"]" * 900_000 + b"e.", READ
    yield "many dicts", START + b"](" + b"}" * 2_000_000 + b"e.", "more than 1000000 steps"
    yield "many marks", START + b"(" * 2_000_000, "more than 1000000 steps"
    yield "many memos", START + b"](" + b"".join(b"}" + put(i) for i in range(450_000)) + b"e.", READ
    yield "many globals", START + b"](" + b"ctorch\nfloat32\n" * 900_000 + b"e.", READ
    items = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000)) + b"u" + put(0)
    copies = (b"h\1" + get(0) + b"\x85R0") * 10_000
    yield (
        "a dict copied again and again",
        START + b"ccollections\nCounter\nq\x010" + items + b"0" + copies + b"N.",
        "more than 33554432 bytes",
    )
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(200_000)) + b"e" + put(0)
    yield (
        "a list made a dict again and again",
        START + b"ccollections\nOrderedDict\nq\x010" + pairs + b"0" + copies + b"N.",
        "more than 33554432 bytes",
    )
    encoded = (b"h\1" + get(0) + get(2) + b"\x86R0") * 10_000
    long = text("a" * (10 << 20)) + put(0) + b"0" + text("latin1") + put(2) + b"0"
    yield (
        "a text encoded again and again",
        START + b"c_codecs\nencode\nq\x010" + long + encoded + b"N.",
        "more than 33554432 bytes",
    )
    devices = long + (b"h\1" + get(0) + b"K\0\x86R") * 10_000
    yield "a device of a long name", START + b"ctorch\ndevice\nq\x010" + devices + b".", "a damaged torch.device"
    many = b"(" + b"N" * 200_000 + b"t" + put(0) + b"0"
    yield (
        "many arguments",
        START + b"ctorch\ndevice\nq\x010" + many + (b"h\1" + get(0) + b"R0") * 10_000 + b"N.",
        "calls 'torch.device'",
    )
    for name, keys in {
        "alike": [i * (2**61 - 1) for i in range(50_000)],
        "steps of 2**40": [i << 40 for i in range(1 << 18)],
    }.items():
        numbers = b"".join(b"\x8a\x0b" + key.to_bytes(11, "little") + b"N" for key in keys)
        yield f"keys {name}", START + b"}(" + numbers + b"u.", "a dict with a int as a key" if name == "alike" else READ
    floats = b"".join(
        b"G" + struct.pack(">d", 2.0 ** (61 * i - 900) * (j + 1)) + b"N" for i in range(30) for j in range(8000)
    )
    yield "float keys", START + b"}(" + floats + b"u.", READ
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
    yield "a list as a shape", rebuild(STORAGE, [1], [1]), "a damaged tensor"
    yield "conjugated", rebuild(STORAGE, (1,), (1,), 0, {"conj": True}), "conjugation or negation is put off"
    yield "no storage", rebuild("x", (1,), (1,)), "a damaged tensor"
    yield (
        "no type",
        Call(Global("torch._utils _rebuild_tensor_v3"), (*rebuild(STORAGE, (1,), (1,)).args, "torch.float7")),
        "of type 'float7'",
    )
    yield (
        "a parameter of text",
        Call(Global("torch._utils _rebuild_parameter"), ("x", True, ORDERED_DICT)),
        "a damaged parameter",
    )
    subclass = (Global("torch._utils _rebuild_tensor_v2"), Global("torch FloatStorage"), (), None)
    yield "a subclass", Call(Global("torch._tensor _rebuild_from_type_v2"), subclass), "a subclass of torch.Tensor"
    for name, count in {"negative": -1, "absurd": 2**62}.items():
        yield f"a storage of {name} size", Storage("Float", DATA, count=count), "holds a storage of .* elements"
    yield (
        "a storage that is short",
        Storage("Float", DATA, count=1000),
        "outside the 24 bytes|of elements|says of its|smaller than",
    )
    yield "a key of a path", Storage("Float", DATA, "../../etc/passwd"), "etc/passwd|"
    yield "a long key", Storage("Float", DATA, "k" * 10**6), "holds a storage of|holds a member"
    yield "no number of elements", Storage("Float", DATA, count="6"), "a reference that is no storage"
    yield (
        "a storage of no type",
        START + encode(("storage", Global("torch QInt8Storage"), "0", "cpu", 6), {})[2:-1] + b"Q.",
        "torch.QInt8Storage",
    )


def zip_with(**changes: int) -> bytes:
    """A zip of one member whose headers say what they should not; a name begins with local_, entry_ or end_."""
    name, content = b"a/data.pkl", START + b"N."
    crc = zlib.crc32(content)
    local = dict(
        magic=0x04034B50,
        version=20,
        flags=0,
        method=0,
        time=0,
        date=0,
        crc=crc,
        packed=len(content),
        nbytes=len(content),
        name=len(name),
        extra=0,
    )
    entry = dict(
        magic=0x02014B50,
        made=20,
        version=20,
        flags=0,
        method=0,
        time=0,
        date=0,
        crc=crc,
        packed=len(content),
        nbytes=len(content),
        name=len(name),
        extra=0,
        comment=0,
        disk=0,
        internal=0,
        external=0,
        header=0,
    )
    end = dict(
        magic=0x06054B50,
        disk=0,
        first=0,
        count=1,
        total=1,
        size=46 + len(name),
        offset=30 + len(name) + len(content),
        comment=0,
    )
    for key, value in changes.items():
        part, _, field = key.partition("_")
        {"local": local, "entry": entry, "end": end}[part][field] = value
    return (
        struct.pack("<L5H3L2H", *local.values()) + name + content
        + struct.pack("<L6H3L5H2L", *entry.values()) + name
        + struct.pack("<L4H2LH", *end.values())
    )  # fmt: skip


def zip_cases():
    """Containers that lie."""
    yield "a zip in order", zip_with(), READ
    for name, changes, expected in (
        ("encrypted", dict(entry_flags=1), "holds 'a/data.pkl' encrypted"),
        ("an unknown method", dict(entry_method=12), "packed by method 12; allowed are stored and deflated"),
        ("a size that is too large", dict(entry_packed=10**9, entry_nbytes=10**9), "is too short for its member"),
        ("two sizes", dict(entry_nbytes=10**9), "is too short for its member"),
        ("another size in the header", dict(local_nbytes=3), "one thing here and another there"),
        ("another method in the header", dict(local_method=8), "one thing here and another there"),
        ("another name in the header", dict(local_name=9), "one thing here and another there"),
        ("a long extra field", dict(local_extra=60000), "one thing here and another there"),
        ("no header", dict(local_magic=0), "unknown kind"),
        ("a header elsewhere", dict(entry_header=3), "one thing here and another there"),
        ("a header outside", dict(entry_header=10**9), "is too short for its member"),
        ("another disk", dict(end_disk=1), "one part of several"),
        ("a member of another disk", dict(entry_disk=1), "packed by method 0"),
        ("too many members", dict(end_count=2, end_total=2), "a damaged zip directory"),
        ("too few members", dict(end_count=0, end_total=0), "a damaged zip directory"),
        ("a directory elsewhere", dict(end_offset=3), "a damaged zip directory"),
        ("a long name", dict(entry_name=60000), "a damaged zip directory"),
        ("no entry", dict(entry_magic=0), "a damaged zip directory"),
        ("a long comment", dict(entry_comment=1), "a damaged zip directory"),
        ("a large directory", dict(end_size=2**32 - 2), "lists 1 zip members in 4294967294 bytes; at most"),
    ):
        yield name, zip_with(**changes), expected
    for name in ("../a/data.pkl", "/a/data.pkl", "a\\data.pkl", "a\n/data.pkl", "a" * 2000):
        yield f"a member {name[:15]!r}", zip_of({name: b"x"}), "holds a member of the name"
    yield (
        "a member twice",
        zip_of({"a/data.pkl": START + b"N.", "a/data.pkm": b"x"}).replace(b"pkm", b"pkl"),
        "holds 'a/data.pkl' twice",
    )
    yield (
        "a packed pickle",
        zip_of({"a/data.pkl": b"\0" * 10**8}, zipfile.ZIP_DEFLATED),
        "holds 'a/data.pkl' compressed",
    )
    yield "a large pickle", zip_of({"a/data.pkl": START + b"N0" * (17 << 20)}), "has a data.pkl of .* at most 33554432"
    yield "very many members", many_members(100_000), READ
    yield "too many members to count", many_members(100_001), "lists 100001 zip members"
    yield (
        "an array of nothing but zeros",
        npz_of(10**8),
        "holds 'x.npy' with 100000080 bytes packed into .*; at most 100 to one",
    )
    yield "a smaller array of zeros", npz_of(60 << 20), READ
    yield "an array that is shorter than it says", short_npz(), "ends too early|does not match"
    yield (
        "a zip in a zip",
        zip_of({"x.npy": zip_of({"x.npy": b"\0" * 10**7}, zipfile.ZIP_DEFLATED)}, zipfile.ZIP_DEFLATED),
        "is no array of NumPy",
    )
    objects = io.BytesIO()
    np.savez(objects, x=np.array([{}], object))
    yield "an array of objects", objects.getvalue(), r"of type '\|O'"
    header = b"\x93NUMPY\2\0" + struct.pack("<I", 2**31) + b"[" * 10**6
    yield "a header of 2 GB", zip_of({"x.npy": header}), "a header that is too long"
    yield (
        "a deep header",
        zip_of({"x.npy": b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000}),
        "a structure, or damaged",
    )


def zip_of(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, content in contents.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method  # the constructor would tidy the name up
            file.writestr(info, content)
    return out.getvalue()


def many_members(count: int) -> bytes:
    """An .npz of that many empty arrays, with the directory of zip64."""
    names = [b"%05x.npy" % i for i in range(count)]
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }"
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    crc, size = zlib.crc32(content), len(content)
    parts, entries, at = [], [], 0
    for name in names:
        local = struct.pack("<L5H3L2H", 0x04034B50, 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name + content
        entries.append(
            struct.pack("<L6H3L5H2L", 0x02014B50, 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, at)
            + name
        )
        parts.append(local)
        at += len(local)
    directory = b"".join(entries)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at + len(directory), 1)
    end = struct.pack("<L4H2LH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return b"".join(parts) + directory + end64 + locator + end


def npz_of(nbytes: int) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, x=np.zeros(nbytes, np.uint8))
    return out.getvalue()


def short_npz() -> bytes:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (90000,), }"
    content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(90000)
    data = zip_of({"x.npy": content[:-1000]}, zipfile.ZIP_DEFLATED)
    return data.replace(struct.pack("<L", len(content) - 1000), struct.pack("<L", len(content)))


def safetensors_cases():
    for name, size in {"of 2**63": 2**63, "longer than the file": 1000, "of 100 MB": 100 << 20}.items():
        yield (
            f"a header {name}",
            struct.pack("<Q", size) + b'{"a":1}',
            r"has a .safetensors header of \d+ bytes; at most 7",
        )
    for name, text in {
        "deep": b'{"a":' + b"[" * (7 << 20), "deep in dicts": b'{"a":' * (1 << 20), "wide": b'{"a":[' + b"[]," * 2_500_000 + b"[]]}",
        "many dicts": b'{"a":[' + b"{}," * 2_500_000 + b"{}]}", "a long number": b'{"a":' + b"9" * (7 << 20) + b"}",
        "many entries": b"{" + b",".join(b'"%x":0' % i for i in range(700_000)) + b"}",
    }.items():  # fmt: skip
        yield f"a header that is {name}", struct.pack("<Q", len(text)) + text, "damaged"
    zeros = json.dumps({f"{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}).encode()
    yield "very many tensors of nothing", struct.pack("<Q", len(zeros)) + zeros, READ


def stream_cases():
    """Streams whose parts do not belong together."""
    head = b"".join(encode(part, {}) for part in (MAGIC, PROTOCOL, {"little_endian": True}))
    storages: dict[str, Storage] = {}
    body = encode(tensor(DATA, "Float"), storages, legacy=True)
    count, data = struct.pack("<q", 6), DATA.tobytes()
    for name, tail, expected in (
        ("in order", encode(["0"], {}) + count + data, READ),
        ("no keys", encode([], {}), "lists 0 storages and uses 1 others"),
        ("other keys", encode(["1"], {}) + count + data, "lists 1 storages and uses 1 others"),
        ("a key twice", encode(["0", "0"], {}) + count + data, "a damaged list of storages"),
        ("keys that are numbers", encode([0], {}), "a damaged list of storages"),
        ("keys that are a text", encode("0", {}), "a damaged list of storages"),
        ("a storage in the keys", encode([STORAGE], {}), "a storage where none can be"),
        ("fewer elements", encode(["0"], {}) + struct.pack("<q", 5) + data, "holds another number of elements"),
        ("a negative number", encode(["0"], {}) + struct.pack("<q", -6) + data, "holds another number of elements"),
        ("a short end", encode(["0"], {}) + count + data[:-1], "ends within its storage"),
        ("no end", encode(["0"], {}), "ends at byte"),
        ("nothing more", b"", "ends too early"),
    ):
        yield f"a stream with {name}", head + body + tail, expected
    twice = [STORAGE, Storage("Double", DATA.astype(np.float64))]
    yield (
        "a stream with a storage of two types",
        head + encode(twice, {}, legacy=True),
        "says of its storage '0' one thing here",
    )
    for name, view in {
        "outside": ("1", 4, 3),
        "of text": ("1", "a", 3),
        "negative": ("1", -1, 3),
        "that is none": "x",
    }.items():
        part = rebuild(Storage("Float", DATA, view=view), (1,), (1,))
        yield (
            f"a stream with a view {name}",
            head + encode(part, {}, legacy=True),
            "outside|a damaged view|impossible tensor",
        )
    yield "a stream of another protocol", encode(MAGIC, {}) + encode(1000, {}), "is a pickle, but not by torch.save"
    yield "a stream with no facts", encode(MAGIC, {}) + encode(PROTOCOL, {}) + encode([], {}), "big-endian"
    yield "a stream that begins with code", START + b"cposix\nsystem\nX\1\0\0\0a\x85R.", "holds 'posix.system'"


def config_cases():
    deep_aliases = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} {'[' * 30}*a{i - 1}{']' * 30}\n" for i in range(1, 9))
    for name, data, expected in (
        (
            "code",
            f"a: !!python/object/apply:os.system [\"touch '{SENTINEL}'\"]",
            "holds the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system'; allowed",
        ),
        ("a name", "a: !!python/name:os.system", "holds the YAML tag"),
        ("a module", "!!python/module:os {}", "holds the YAML tag"),
        ("a tuple", "a: !!python/tuple [1]", "holds the YAML tag"),
        ("its own tag", "a: !x 1", "holds the YAML tag '!x'"),
        ("a tag in a key", "? !!python/name:os.system\n: 1", "holds the YAML tag"),
        (
            "a tag directive",
            f"%TAG !p! tag:yaml.org,2002:python/object/apply:\n---\na: !p!os.system [\"touch '{SENTINEL}'\"]",
            "holds the YAML tag",
        ),
        ("a binary", "a: !!binary aaaa", "holds the YAML tag"),
        (
            "an alias bomb",
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)),
            "more than 10000 values, aliases counted",
        ),
        (
            "a merge bomb",
            "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
            "more than 10000 values, aliases counted",
        ),
        ("a circle", "a: &a [*a]", "holds the alias \\*a within what it stands for"),
        ("a circle of keys", "a: &a {b: {c: *a}}", "holds the alias"),
        ("a circle of merges", "a: &a {<<: *a}", "holds the alias"),
        ("depth", "a: " + "[" * 10_000, "nested more than 50 levels"),
        ("depth in one line", "a: " + "[" * 60 + "]" * 60, "nested more than 50 levels"),
        ("depth by indentation", "".join(f"{' ' * i}a:\n" for i in range(600)), "nested more than 50 levels"),
        ("depth by dashes", "- " * 100_000, "nested more than 50 levels"),
        ("depth by question marks", "? " * 100_000, "nested more than 50 levels"),
        ("depth by aliases", deep_aliases, "nested more than 50 levels"),
        ("many values", "a: [" + "1," * 100_000 + "]", "more than 10000 values"),
        ("many keys", "\n".join(f"{i}:" for i in range(30_000)), "more than 10000 values"),
        ("keys alike", "\n".join(f"{i * (2**61 - 1)}:" for i in range(4_900)), READ),
        ("many anchors", "a: [" + ",".join(f"&a{i} 1" for i in range(30_000)) + "]", "more than 10000 values"),
        ("many documents", "---\na: 1\n" * 20_000, "no valid YAML|more than 10000 values"),
        ("a number in base 60", "a: 1" + ":59" * 80_000, "holds a value of 240001 characters; put it between quotes"),
        ("a tagged number in base 60", "a: !!int '1" + ":59" * 80_000 + "'", "holds a value of 240001 characters"),
        ("a long number", "a: " + "9" * 200_000, "holds a value of 200000 characters"),
        ("a long text", "a: '" + "x" * 250_000 + "'", READ),
        ("a long text of escapes", 'a: "' + "\\x41" * 60_000 + '"', READ),
        ("a long text of lines", "a: '" + "x\n\n" * 80_000 + "'", READ),
        ("a long block", "a: |\n" + "  x\n" * 60_000, READ),
        ("a long comment", "a: 1 #" + "x" * 250_000, READ),
        ("a long key", "x" * 200_000 + ": 1", "holds a value of|no valid YAML"),
        ("braces", "{" * 200_000, "nested more than 50 levels"),
        ("braces and colons", "{a: " * 50_000, "nested more than 50 levels"),
        ("tabs", "a:\n" + "\t" * 200_000, "no valid YAML"),
        ("a directive", "%YAML 1." + "1" * 5_000 + "\n---\na: 1", "no valid YAML"),
        ("a large file", "#" * (300 << 10), "has 307200 bytes; a config has at most 262144"),
    ):
        yield f"yaml: {name}", data.encode(), expected
    for name, data, expected in (
        ("depth", '{"a":' + "[" * 200_000, "nested more than 50 levels"),
        ("less depth", '{"a":' + "[" * 60 + "]" * 60 + "}", "nested more than 50 levels"),
        ("a long number", '{"a":' + "9" * 200_000 + "}", "no valid JSON"),
        ("many lists", '{"a":[' + "[]," * 80_000 + "[]]}", READ),
    ):
        yield f"json: {name}", data.encode(), expected


def make_cases(folder: Path) -> list[Case]:
    cases = []
    for group in (code_cases, opcode_cases, tensor_cases):
        for name, value, expected in group():
            for write in (write_zip, write_stream):
                cases.append(Case(f"{name} ({write.__name__})", write(folder / "raw", value).read_bytes(), expected))
    cases += [
        Case(name, write_zip(folder / "raw", data).read_bytes(), expected) for name, data, expected in bomb_cases()
    ]
    for group in (zip_cases, safetensors_cases, stream_cases, config_cases):
        cases += [Case(name, data, expected) for name, data, expected in group()]
    return cases


READER = """
import json, pathlib, resource, signal, sys, time
import ml_dtypes, numpy as np, yaml
from rq_jax.state_file import StateFileError, Tensor, read_config, read_state

def materialise(value):
    if isinstance(value, Tensor):
        np.asarray(value)
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            materialise(child)

def stop(*_):
    raise SystemExit("took more than 20 s")

signal.signal(signal.SIGALRM, stop)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = rss()
for line in sys.stdin:
    name = line.strip()
    signal.alarm(20)
    clock = time.process_time()
    try:
        value = (read_config if name.endswith((".yaml", ".json")) else read_state)(name)
        materialise(value)
        outcome = "read"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    value = None
    signal.alarm(0)
    print(json.dumps([outcome, time.process_time() - clock, (rss() - begin) / 1024]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Each case with what became of it, seconds of processor time, and the largest growth of memory so far in MB."""
    folder = tmp_path_factory.mktemp("hostile")
    cases = make_cases(folder)
    for i, case in enumerate(cases):
        suffix = case.name.split(":")[0] if case.name.startswith(("yaml", "json")) else "pt"
        case.file = f"{i}.{suffix}"
        (folder / case.file).write_bytes(case.data)
    command = [sys.executable, "-c", READER]
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "PATH": ""}
    lines = "\n".join(case.file for case in cases)
    run = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, env=environment)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(cases), run.stderr
    assert not (folder / SENTINEL).exists()
    return list(zip(cases, results, strict=True))


def test_hostile_files_are_refused_in_one_line(outcomes):
    wrong = []
    for case, (outcome, _, _) in outcomes:
        refusal = f"StateFileError: '{case.file}': "
        is_right = outcome == READ if case.expected == READ else outcome.startswith(refusal)
        is_right = is_right and "\n" not in outcome and len(outcome) < 500
        if not is_right or not re.search(case.expected, outcome):
            wrong.append((case.name, outcome[:300], case.expected))
    assert wrong == []


def test_hostile_files_take_little_time(outcomes):
    assert [(case.name, seconds) for case, (_, seconds, _) in outcomes if seconds > SECONDS] == []


def test_hostile_files_take_little_memory(outcomes):
    assert [(case.name, megabytes) for case, (_, _, megabytes) in outcomes if megabytes > MEGABYTES] == []

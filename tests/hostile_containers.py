"""Containers and configs that lie, or want to run code, fill the memory or take hours.

Each function yields a name, the file and a pattern of the message that refuses it.
"""

import io
import json
import struct
import zipfile
import zlib

import numpy as np
from hostile_pickles import DATA, READ, SENTINEL, START, STORAGE
from state_files import MAGIC, PROTOCOL, Storage, encode, rebuild, tensor


def zip_with(**changes: int) -> bytes:
    """A zip of one member whose headers say what they should not; a name begins with local_, entry_ or end_."""
    name, content = b"a/data.pkl", START + b"N."
    crc = zlib.crc32(content)
    sizes = {"flags": 0, "method": 0, "time": 0, "date": 0, "crc": crc, "packed": len(content), "nbytes": len(content)}
    sizes |= {"name": len(name), "extra": 0}
    local = {"magic": 0x04034B50, "version": 20, **sizes}
    entry = {"magic": 0x02014B50, "made": 20, "version": 20, **sizes}
    entry |= dict.fromkeys(("comment", "disk", "internal", "external", "header"), 0)
    end = {"magic": 0x06054B50, "disk": 0, "first": 0, "count": 1, "total": 1, "size": 46 + len(name)}
    end |= {"offset": 30 + len(name) + len(content), "comment": 0}
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
        zip_of({"a/data.pkl": b"\0" * 10**6}, zipfile.ZIP_DEFLATED),
        "holds 'a/data.pkl' compressed",
    )
    yield (
        "a large pickle",
        zip_of({"a/data.pkl": START + b"N0" * (17 << 20)}),
        "has a 'data.pkl' of .* at most 33554432",
    )
    yield "very many members", many_members(20_000), READ
    yield "too many members to count", many_members(20_001), "lists 20001 zip members"
    yield (
        "an array of nothing but zeros",
        npz_of(70_000_000),
        "packs 70000128 bytes into .*; at most 100 to one",
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
    yield "a header of 2 GB", zip_of({"x.npy": header}), "is no array of NumPy .*EOF"
    for repeats, count, expected in ((600, 6000, "is no array of NumPy"), (60, 3000, READ)):
        text = b"{" + b"'descr': '<f4'," * repeats + b"'fortran_order': False, 'shape': (0,), }"
        header = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
        members = {f"{i}.npy": header for i in range(count)}
        yield f"headers that inflate to {len(header)} bytes", zip_of(members, zipfile.ZIP_DEFLATED), expected
    for name, text in {"parentheses": b"(" * 9000, "signs": b"-" * 8999 + b"1", "dots": b"a" + b".a" * 4499}.items():
        data = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
        yield f"a header of {name}", zip_of({"x.npy": data}), "is no array of NumPy"


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
        "deep": b'{"a":' + b"[" * (3 << 20), "deep in dicts": b'{"a":' * (1 << 19), "wide": b'{"a":[' + b"[]," * 1_300_000 + b"[]]}",
        "many dicts": b'{"a":[' + b"{}," * 1_300_000 + b"{}]}", "a long number": b'{"a":' + b"9" * (3 << 20) + b"}",
        "many entries": b"{" + b",".join(b'"%x":0' % i for i in range(320_000)) + b"}",
    }.items():  # fmt: skip
        yield f"a header that is {name}", struct.pack("<Q", len(text)) + text, "is no valid .safetensors"
    twice = b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}'
    yield "a name twice", struct.pack("<Q", len(twice)) + twice, "is no valid .safetensors .*twice"
    name = "a." * 10**6 + "\x1b[31m\nnext: "
    long = json.dumps({name: {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    yield (
        "a long name with control codes",
        struct.pack("<Q", len(long)) + long + b"x",
        "holds a tensor 'a.a.*characters",
    )
    zeros = json.dumps({f"{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}).encode()
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
        ("nothing more", b"", "may end too early"),
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
    yield (
        "a stream that begins with code",
        START + b"cposix\nsystem\nX\1\0\0\0a\x85R.",
        "is a pickle, but not by torch.save",
    )


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
        ("a tuple of code", "a: !!python/tuple [!!python/name:os.system x]", "holds the YAML tag"),
        ("a tuple of text", "a: !!python/tuple x", "no valid YAML"),
        ("a complex number", "a: !!python/complex 1j", "holds the YAML tag"),
        ("a key twice", "a: 1\na: 2", "the key 'a' stands twice"),
        ("a long key twice", f"? {'x' * 10**5}\n: 1\n? {'x' * 10**5}\n: 1", r"stands twice|no valid YAML"),
        ("a circle of references", "a: ${b}\nb: ${c}\nc: ${a}", "references in a circle"),
        ("a circle through a list", "a: [1, '${a}']", "references in a circle"),
        ("a chain of references", "\n".join(f"a{i}: ${{a{i + 1}}}" for i in range(4000)), "in a long chain"),
        (
            "a bomb of references",
            "a0: x\n" + "".join(f"a{i}: {json.dumps([f'${{a{i - 1}}}'] * 9)}\n" for i in range(1, 40)),
            "more than 10000 values, shared parts counted each time",
        ),
        (
            "a text referred to often",
            f"b: '{'x' * 10**5}'\nc: {json.dumps(['${b}'] * 4000)}",
            "more than 1048576 char",
        ),
        (
            "an alias of a text",
            f"b: &b '{'x' * 10**5}'\nc: [{', '.join(['*b'] * 9000)}]",
            "more than 1048576 characters",
        ),
        ("a long reference", "a: ${" + "b." * 100_000 + "b}", READ),
        ("a reference to a large place", "a: ${b." + "9" * 200_000 + "}\nb: [1]", READ),
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
            "more than 10000 values, shared parts counted each time",
        ),
        (
            "a merge bomb",
            "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
            "more than 10000 values, shared parts counted each time",
        ),
        ("a circle", "a: &a [*a]", "a list or dict that holds itself"),
        ("a circle of keys", "a: &a {b: {c: *a}}", "a list or dict that holds itself"),
        ("a circle of merges", "a: &a {<<: *a}", "a list or dict that holds itself"),
        ("depth", "a: " + "[" * 10_000, "nested more than 50 levels"),
        ("depth in one line", "a: " + "[" * 60 + "]" * 60, "nested more than 50 levels"),
        ("depth by indentation", "".join(f"{' ' * i}a:\n" for i in range(600)), "nested more than 50 levels"),
        ("depth by dashes", "- " * 100_000, "nested more than 50 levels"),
        ("depth by question marks", "? " * 100_000, "nested more than 50 levels"),
        ("depth by aliases", deep_aliases, "nested more than 50 levels"),
        ("many values", "a: [" + "1," * 100_000 + "]", "more than 10000 values"),
        ("many keys", "\n".join(f"{i}:" for i in range(30_000)), "more than 10000 values"),
        ("keys alike", "\n".join(f"{i * (2**61 - 1)}:" for i in range(4_900)), READ),
        ("many anchors", "a: [" + ",".join(f"&a{i} 1" for i in range(20_000)) + "]", "more than 10000 values"),
        ("many documents", "---\na: 1\n" * 20_000, "no valid YAML"),
        ("a number in base 60", "a: 1" + ":59" * 80_000, "holds a value of 240001 characters; put it between quotes"),
        ("a tagged number in base 60", "a: !!int '1" + ":59" * 80_000 + "'", "holds a value of 240001 characters"),
        ("a long number", "a: " + "9" * 200_000, "holds a value of 200000 characters"),
        ("a long text", "a: '" + "x" * 220_000 + "'", READ),
        ("a long text of escapes", 'a: "' + "\\x41" * 60_000 + '"', READ),
        ("a long text of lines", "a: '" + "x\n\n" * 80_000 + "'", READ),
        ("a long block", "a: |\n" + "  x\n" * 60_000, READ),
        ("a long comment", "a: 1 #" + "x" * 220_000, READ),
        ("a long key", "x" * 200_000 + ": 1", "holds a value of|no valid YAML"),
        ("braces", "{" * 200_000, "nested more than 50 levels"),
        ("braces and colons", "{a: " * 20_000, "nested more than 50 levels"),
        ("tabs", "a:\n" + "\t" * 200_000, "no valid YAML"),
        ("a directive", "%YAML 1." + "1" * 5_000 + "\n---\na: 1", "no valid YAML"),
        ("a large file", "#" * (300 << 10), "has 307200 bytes; a config has at most 262144"),
    ):
        yield f"yaml: {name}", data.encode(), expected
    for name, data, expected in (
        ("depth", '{"a":' + "[" * 200_000, "nested too deeply"),
        ("a key twice", '{"a": [{"b": 1, "b": 2}]}', "the key 'b' stands twice"),
        ("a circle of references", '{"a": {"b": "${a}"}}', "references in a circle"),
        ("less depth", '{"a":' + "[" * 60 + "]" * 60 + "}", "nested more than 50 levels"),
        ("a long number", '{"a":' + "9" * 200_000 + "}", "is not readable JSON"),
        ("many lists", '{"a":[' + "[]," * 80_000 + "[]]}", READ),
    ):
        yield f"json: {name}", data.encode(), expected


GROUPS = (zip_cases, safetensors_cases, stream_cases, config_cases)

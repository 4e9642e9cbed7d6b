"""Arrays by NumPy and safetensors, configs in YAML and JSON: what is read, what is refused in one line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from state_files import (
    KINDS,
    assert_refused,
    assert_same,
    entry,
    tensor,
    write_members,
    write_safetensors,
    write_zip,
)

from rq_jax.interop.state_file import StateFileError, read_config, read_state

DATA = np.random.default_rng(5).normal(size=(3, 5, 2)).astype(np.float32)

# --- arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {
        **{kind: (DATA * 3).astype(dtype) for kind, dtype in KINDS.items() if kind != "BFloat16"},
        "a/b": DATA[0], "fortran": np.asfortranarray(DATA), "number": np.float32(3), "empty": DATA[:0],
        "big endian": DATA.astype(">f4"), "unsigned": np.arange(3, dtype=np.uint32), "x.npy": DATA[1],
    }  # fmt: skip
    save(tmp_path / "a.npz", **arrays)
    expected = {
        name: np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("=")) for name, array in arrays.items()
    }
    assert_same(read_state(tmp_path / "a.npz"), {name: array.copy("C") for name, array in expected.items()})


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return (
        b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(header)) + header.encode() + data
    )


def test_npz_of_other_writers(tmp_path):
    old = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 2L), }", DATA[:, 0].tobytes(), b"\2\0")
    bare = npy("{'descr': '|u1', 'fortran_order': True, 'shape': ()}\n", b"\7")
    path = write_members(tmp_path / "a.npz", **{"old.npy": old, "bare.npy": bare})
    assert_same(read_state(path), {"old": DATA[:, 0].copy(), "bare": np.array(7, np.uint8)})


@pytest.mark.parametrize(
    ("member", "pattern"),
    [
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"x" * 8), r"of type '\|O'; allowed are bool"),
        (npy("{'descr': '<V2', 'fortran_order': False, 'shape': (1,), }", b"xx"), r"bfloat16 as float32"),
        (npy("{'descr': '<f3', 'fortran_order': False, 'shape': (1,), }", b"xxx"), "is no array of NumPy .*'<f3'"),
        (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", b"xxxx"), r"of type '\|V4'"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"xxxx"), r"of shape '\(2,\)' in 4 bytes"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 1,), }", b"xxxx"),
            r"impossible tensor|of shape '.9+,.' in 0 bytes|is no array of NumPy .*Cannot parse header",
        ),
        (
            npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 19},), }}"),
            r"impossible tensor|of shape '.9+,.' in 0 bytes|is no array of NumPy .*Cannot parse header",
        ),
        (
            npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'0,' * 40}), }}"),
            r"impossible tensor|of shape '.9+,.' in 0 bytes|is no array of NumPy .*Cannot parse header",
        ),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 999999999999999999, 999999999999999999), }"),
            "impossible",
        ),
        (npy(" " * 20_000), "is no array of NumPy .*EOF"),
        (npy("", version=b"\4\0"), "is no array of NumPy"),
        (b"PK", "is no array of NumPy"),
    ],
)
def test_npz_of_what_is_no_array(tmp_path, member, pattern):
    assert_refused(write_members(tmp_path / "a.npz", **{"x.npy": member}), pattern)


def test_npz_whose_bytes_were_damaged(tmp_path):
    np.savez(tmp_path / "a.npz", x=DATA)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(DATA.tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(StateFileError, match="'x' does not match its checksum"):
        np.asarray(read_state(tmp_path / "a.npz")["x"])


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    arrays = {
        kind: (DATA * 3).astype(dtype) for kind, dtype in KINDS.items() if kind not in ("ComplexDouble", "BFloat16")
    }
    arrays |= {"number": np.array(3, np.float32), "empty": DATA[:0], "ü": np.arange(3, dtype=np.uint16)}
    save_file(arrays, tmp_path / "a.safetensors", {"format": "pt"})
    found = read_state(tmp_path / "a.safetensors")
    assert_same({name: found[name] for name in arrays}, arrays)
    assert set(found) == set(arrays)


@pytest.mark.parametrize(
    ("code", "dtype"), [("BF16", "bfloat16"), ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")]
)
def test_safetensors_of_short_floats(tmp_path, code, dtype):
    data = DATA.astype(getattr(ml_dtypes, dtype))
    path = write_safetensors(tmp_path / "a", {"x": entry(code, data.shape, 0, data.nbytes)}, data.tobytes())
    assert_same(read_state(path), {"x": data})


def test_a_safetensors_whose_length_looks_like_a_pickle(tmp_path):
    header = json.dumps({"x": entry()}).encode().ljust(0x280)
    assert_same(read_state(write_safetensors(tmp_path / "a", header, DATA[0, 0, :1].tobytes())), {"x": DATA[0, 0, :1]})


def test_a_field_that_safetensors_does_not_know_is_ignored(tmp_path):
    path = write_safetensors(tmp_path / "a", {"x": {**entry(), "more": 1}}, DATA[0, 0, :1].tobytes())
    assert_same(read_state(path), {"x": DATA[0, 0, :1]})


@pytest.mark.parametrize(
    ("header", "pattern"),
    [
        ({"x": entry("F8_E8M0", (4,))}, "of type 'F8_E8M0'; allowed are F64, F32"),
        ({"x": entry(stop=5)}, "invalid shape, data type, or offset for tensor"),
        ({"x": entry(start=4, stop=8)}, "invalid offset for tensor"),
        ({"x": entry(shape=(0,), stop=0)}, "file not fully covered"),
        ({"x": entry(), "y": entry()}, "invalid offset for tensor"),
        ({"x": entry(shape=(-1,), stop=-4)}, "invalid value: integer `-1`"),
        ({"x": entry(shape=(True,))}, "invalid type: boolean"),
        ({"x": entry(shape=(1.0,))}, "invalid type: floating point"),
        ({"x": entry(shape=(1,) * 40)}, "impossible tensor"),
        ({"x": entry(shape=(2**61, 0), stop=0), "y": entry()}, "impossible tensor"),
        ({"x": [1]}, "invalid type: integer"),
        ({"x": {"dtype": "F32"}}, "missing field"),
        (b'{"x":1,"x":2}', "invalid type: integer"),
        (b"{ ", "EOF while parsing"),
        (b'{"\xff"}', "invalid UTF-8"),
    ],
)
def test_safetensors_that_are_damaged(tmp_path, header, pattern):
    assert_refused(write_safetensors(tmp_path / "a", header, b"1234"), pattern)


# --- shards -------------------------------------------------------------------------------------------------


def write_shards(folder, weight_map=None, **arrays):
    """Each array in a file of its own, and their index."""
    from safetensors.numpy import save_file

    for name, array in arrays.items():
        save_file({name: array}, folder / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in arrays} if weight_map is None else weight_map
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def test_shards_are_read_by_their_index_or_directory(tmp_path):
    path = write_shards(tmp_path, a=DATA, b=DATA[0])
    for place in (path, tmp_path):
        assert_same(read_state(place), {"a": DATA, "b": DATA[0]})
    (tmp_path / "other.bin.index.json").write_text("{}")
    assert_refused(tmp_path, "is a directory with several \\*.index.json; give a file of weights or an index")
    data = write_zip(tmp_path / "b.bin", {"b": tensor(DATA[0], "Float")})
    assert_same(read_state(write_shards(tmp_path, {"b": data.name})), {"b": DATA[0]})


@pytest.mark.parametrize(
    ("weight_map", "pattern"),
    [
        *(
            ({"a": shard}, "names the file '.*; allowed are plain names of files beside it")
            for shard in (
                "../a.safetensors", "/etc/passwd", "x/../a.safetensors", "..", ".", "", 3, None, ["a.safetensors"],
                "a\\b", "a\0", "a\n", "\x1b[31m", "a" * 300, "model.safetensors.index.json",
            )
        ),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
        ({"a": "a.safetensors", "c": "a.safetensors"}, "says of 'a.safetensors' another list of tensors than stands"),
        ({"a": "pair.npz"}, "says of 'pair.npz' another list of tensors than stands there"),
        ({str(i): str(i) for i in range(1001)}, "names 1001 files; at most 1000"),
    ],
)  # fmt: skip
def test_an_index_that_lies(tmp_path, weight_map, pattern):
    np.savez(tmp_path / "pair.npz", a=DATA, b=DATA)
    assert_refused(write_shards(tmp_path, weight_map, a=DATA), pattern)


def test_shards_that_are_missing_or_damaged_are_named(tmp_path):
    path = write_shards(tmp_path, {"a": "gone"})
    with pytest.raises(FileNotFoundError, match="gone' does not exist"):
        read_state(path)
    (tmp_path / "gone").write_bytes(b"<html>")
    with pytest.raises(StateFileError, match="gone': is a web page"):
        read_state(path)
    path.write_text('{"weight_map": {"a": "gone", "a": "gone"}}')
    assert_refused(path, "the key 'a' stands twice")
    path.write_text("[" * 10_000)
    assert_refused(path, "nested too deeply")


# --- configs ------------------------------------------------------------------------------------------------


def test_yaml_and_json_are_the_same(tmp_path):
    config = {"arch": {"type": "rq-vae", "shape": [8, 8, 4], "decay": 0.99, "large": 1e-4, "n": None, "yes": True}}
    (tmp_path / "a.json").write_text(json.dumps(config))
    (tmp_path / "b.yaml").write_text(json.dumps(config))
    text = "# c\narch:\n  type: rq-vae\n  shape: [8, 8, 4]\n  decay: .99\n  large: 1e-4\n  n: null\n  'yes': true\n"
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "d.yaml").write_text(
        "\ufeff{arch: {type: rq-vae, shape: [8, 8, 4], decay: .99, large: 1e-4, n: , 'yes': true}}"
    )
    for name in ("a.json", "b.yaml", "c.yaml", "d.yaml"):
        assert read_config(tmp_path / name) == config, name


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e3", -2500.0), (".5e1", 5.0), ("1e", "1e"), ("e5", "e5"), ("1.5", 1.5), ("'1e-4'", "1e-4"), ("12", 12)])  # fmt: skip
def test_numbers_are_read_as_in_omegaconf(tmp_path, text, value):
    (tmp_path / "a.yaml").write_text(f"x: {text}")
    found = read_config(tmp_path / "a.yaml")["x"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: ${b.c}\nb: {c: 7}", {"a": 7, "b": {"c": 7}}),
        ("a: ${b}\nb: {c: ['${d}', 2]}\nd: 1", {"a": {"c": [1, 2]}, "b": {"c": [1, 2]}, "d": 1}),
        ("a: ${b.c}\nb: ${d}\nd: {c: 7}", {"a": 7, "b": {"c": 7}, "d": {"c": 7}}),
        ("a: ['${b.1}', '${b[0]}']\nb: [5, 6]", {"a": [6, 5], "b": [5, 6]}),
        ("a: {b: '${.c}', c: 1, d: ['${..c}', '${...e}']}\ne: 2", {"a": {"b": 1, "c": 1, "d": [1, 2]}, "e": 2}),
        ("a: ${b}\nb: 0", {"a": 0, "b": 0}),
        *(
            (f"a: {text!r}\nb: {{c: 1}}", {"a": text, "b": {"c": 1}})
            for text in ("${b.d}", "${b.c.e}", "${oc.env:HOME}", "x${b}", "${b}${b}", "${}", "$b", "${b[0]}", "${b." + "9" * 5000 + "}")
        ),
    ],
)  # fmt: skip
def test_references_are_followed(tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(text)
    assert read_config(tmp_path / "a.yaml") == expected


def test_what_wandb_and_python_write_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("wandb_version: 1\narch: {desc: null, value: {n: 7}}\n_wandb: {value: {x: 1}}\n")
    assert read_config(tmp_path / "a.yaml") == {"arch": {"n": 7}, "_wandb": {"x": 1}}
    (tmp_path / "a.yaml").write_text("arch: {desc: null, value: 7}\nother: {n: 1}\n")
    assert read_config(tmp_path / "a.yaml") == {"arch": {"desc": None, "value": 7}, "other": {"n": 1}}
    python = "a: !!python/tuple [1, !!python/tuple [2]]\nb: !!python/unicode 'x'\nc: !!python/long '3'\n"
    (tmp_path / "a.yaml").write_text(python + "d: !!python/dict {e: !!python/none ''}\n")
    assert read_config(tmp_path / "a.yaml") == {"a": [1, [2]], "b": "x", "c": 3, "d": {"e": None}}


def test_aliases_and_merge_keys_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert read_config(tmp_path / "a.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("name", "data", "pattern"),
    [
        ("a.yaml", b"- 1\n- 2", "no dict at its top but a list"),
        ("a.yaml", b"text", "no dict at its top but a str"),
        ("a.yaml", b"a: [1", "is no valid YAML .*; give a config in YAML or JSON"),
        ("a.yaml", b"a: 1\n---\nb: 2", "is no valid YAML"),
        ("a.yaml", b"a: *b", "is no valid YAML"),
        ("a.yaml", b"\xff\xff", "no text in UTF-8"),
        ("a.yaml", b"a: \x01", "is no valid YAML"),
        ("a.yaml", b"a: 2001-99-99", "is no valid YAML"),
        ("a.yaml", b"a: !!bool x", "is no valid YAML"),
        ("a.json", b"{'a': 1}", "is not readable JSON: Expecting property name .*; give a config in YAML or JSON"),
        ("a.json", b"a: 1", "is not readable JSON"),
        ("a.json", b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
        ("a.yaml", b'{"a": 1, "a": 2}', "the key 'a' stands twice; remove one of them"),
        ("a.yaml", b"x: [{'a': 1, \"a\": 2}]", "the key 'a' stands twice"),
        ("a.yaml", b"b: &b {c: 1}\na: {<<: *b, d: 1, d: 1}", "the key 'd' stands twice"),
        ("a.yaml", b'"\\e[31m": 1\n"\\e[31m": 2', r"the key '\\x1b\[31m' stands twice"),
        ("a.yaml", b"a: ${b}\nb: ${a}", "holds references in a circle, or in a long chain, through 'a'"),
        ("a.yaml", b"a: {b: '${a}'}", "holds references in a circle"),
        ("a.yaml", b"a: ['${.1}', '${.0}']", "holds references in a circle"),
        ("a.json", b"[1]", "no dict at its top but a list"),
    ],
)
def test_configs_that_are_none(tmp_path, name, data, pattern):
    (tmp_path / name).write_bytes(data)
    assert_refused(tmp_path / name, pattern, read_config)

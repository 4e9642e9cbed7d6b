"""Arrays by NumPy and safetensors, configs in YAML and JSON: what is read, what is refused in one line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from state_files import KINDS, assert_refused, assert_same, entry, write_members, write_safetensors

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
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"xxxx"), r"of shape \(2,\) in 4 bytes"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 1,), }", b"xxxx"),
            r"impossible tensor|of shape \(9+,\) in 0 bytes|is no array of NumPy .*Cannot parse header",
        ),
        (
            npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 19},), }}"),
            r"impossible tensor|of shape \(9+,\) in 0 bytes|is no array of NumPy .*Cannot parse header",
        ),
        (
            npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'0,' * 40}), }}"),
            r"impossible tensor|of shape \(9+,\) in 0 bytes|is no array of NumPy .*Cannot parse header",
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
        ("a.json", b"{'a': 1}", "is no valid JSON"),
        ("a.json", b"a: 1", "is no valid JSON"),
        ("a.json", b"[1]", "no dict at its top but a list"),
    ],
)
def test_configs_that_are_none(tmp_path, name, data, pattern):
    (tmp_path / name).write_bytes(data)
    assert_refused(tmp_path / name, pattern, read_config)

"""Weights and configs from elsewhere: what is read, what is refused in one line. Hostile files have a file of their own."""

import collections
import json
import os
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_files import ORDERED_DICT, Call, Global, Storage, rebuild, tensor, write_stream, write_zip

import rq_jax.state_file
from rq_jax.state_file import StateFileError, Tensor, read_config, read_state

KINDS = {
    "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Long": np.int64,
    "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    "ComplexFloat": np.complex64, "ComplexDouble": np.complex128,
}  # fmt: skip
RNG = np.random.default_rng(5)
DATA = RNG.normal(size=(3, 5, 2)).astype(np.float32)
both = pytest.mark.parametrize("write", [write_zip, write_stream])


def assert_same(found, expected, where="top"):
    """Equal trees, with a Tensor for each array: values, shape and type."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, Tensor), where
        array = np.asarray(found)
        assert (found.shape, np.shape(found), array.shape) == (expected.shape,) * 3, where
        assert found.dtype == array.dtype == expected.dtype and found.nbytes == array.nbytes, where
        assert array.tobytes() == expected.tobytes() and array.flags.c_contiguous, where
    elif isinstance(expected, dict):
        assert type(found) is dict and list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}.{i}")
    else:
        assert type(found) is type(expected) and found == expected, where


def assert_refused(path, pattern, read=read_state):
    """One line that begins with the name of the file."""
    with pytest.raises(StateFileError, match=pattern) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"'{path}': ") and "\n" not in message and len(message) < 500
    return message


# --- torch.save ---------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", KINDS)
def test_every_type(tmp_path, write, kind):
    data = (DATA * 3).astype(KINDS[kind])
    path = write(tmp_path / "a.pt", {"x": tensor(data, kind)})
    assert_same(read_state(path), {"x": data})


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_is_in_a_checkpoint_beside_tensors(tmp_path, write, protocol):
    long = Call(Global("numpy dtype"), ("i8", False, True), (3, "<", None, None, None, -1, -1, 0))
    big = Call(Global("numpy dtype"), ("f4", False, True), (3, ">", None, None, None, -1, -1, 0))
    nested = {
        "epoch": 3, "step": 70000, "large": 2**70, "negative": -5, "lr": 1e-4, "name": "ü", "none": None, "yes": True,
        "no": False, "betas": (0.5, 0.9), "params": [0, 1, [2, ()]], "": {}, 7: {"exp_avg": tensor(DATA, "Float")},
        0.5: 1, None: 2,
    }  # fmt: skip
    calls = {
        "numpy": Call(Global("numpy.core.multiarray scalar"), (long, struct.pack("<q", -9))),
        "numpy2": Call(Global("numpy._core.multiarray scalar"), (big, struct.pack(">f", 1.5))),
        "encoded": Call(Global("_codecs encode"), ("a\xff", "latin1")),
        "ordered": Call(Global("collections OrderedDict"), (), {"_metadata": {"": {"version": 1}}}),
        "python2": Call(Global("collections OrderedDict"), ([["a", 1], ["b", 2]],)),
        "default": Call(Global("collections defaultdict"), (Global("__builtin__ dict"),)),
        "counter": Call(Global("collections Counter"), ({2: 1},)),
        "size": Call(Global("torch Size"), ((2, 3),)),
        "device": Call(Global("torch device"), ("cuda", 1)),
        "dtype": Global("torch bfloat16"),
    }
    expected = {
        **nested, 7: {"exp_avg": DATA}, "numpy": -9, "numpy2": 1.5, "encoded": b"a\xff", "ordered": {},
        "python2": {"a": 1, "b": 2}, "default": {}, "counter": {2: 1}, "size": (2, 3), "device": "cuda:1",
        "dtype": "torch.bfloat16",
    }  # fmt: skip
    path = write(tmp_path / "a.pt", nested | calls, protocol)
    assert_same(read_state(path), expected)


@both
def test_views(tmp_path, write):
    storage = Storage("Float", DATA.reshape(-1))
    views = {
        "whole": rebuild(storage, (3, 5, 2), (10, 2, 1)),
        "slice": rebuild(storage, (2, 2), (10, 2), 3),
        "transposed": rebuild(storage, (2, 5, 3), (1, 2, 10)),
        "expanded": rebuild(storage, (4, 3), (0, 10), 1),
        "number": rebuild(storage, (), (), 29),
        "empty": rebuild(storage, (0, 3), (3, 1)),
        "empty at the end": rebuild(storage, (5, 0), (1, 1), 30),
        "odd strides": rebuild(storage, (1, 2), (2**61, 1), 28),
        "storage": storage,
        "old": Call(Global("torch._utils _rebuild_tensor"), (storage, 2, (3,), (1,))),
        "metadata": rebuild(storage, (1,), (1,), 0, {"conj": False}),
    }
    flat = DATA.reshape(-1)
    expected = {
        "whole": DATA, "slice": flat[[[3, 5], [13, 15]]], "transposed": DATA.transpose(2, 1, 0).copy(),
        "expanded": np.tile(flat[[1, 11, 21]], (4, 1)), "number": flat[29:].reshape(()),
        "empty": np.empty((0, 3), np.float32), "empty at the end": np.empty((5, 0), np.float32),
        "odd strides": flat[None, 28:], "storage": flat, "old": flat[2:5], "metadata": flat[:1],
    }  # fmt: skip
    path = write(tmp_path / "a.pt", views)
    found = read_state(path)
    assert_same(found, expected)
    assert len({view.storage for view in found.values()}) == 1


@both
def test_shared_storages_stay_recognisable(tmp_path, write):
    shared = tensor(DATA, "Float", "17")
    state = read_state(write(tmp_path / "a.pt", {"a": shared, "b": [shared], "c": tensor(DATA, "Float", "18")}))
    assert state["a"].storage == state["b"][0].storage != state["c"].storage
    assert_same(state, {"a": DATA, "b": [DATA], "c": DATA})


@both
def test_parameters_and_new_tensors(tmp_path, write):
    inner = tensor(DATA, "Float")
    bits = np.arange(6, dtype=np.uint8)
    v3 = (Storage("Untyped", bits, "1"), 1, (2, 2), (2, 1), False, ORDERED_DICT)
    values = {
        "parameter": Call(Global("torch._utils _rebuild_parameter"), (inner, True, ORDERED_DICT)),
        "with state": Call(Global("torch._utils _rebuild_parameter_with_state"), (inner, True, ORDERED_DICT, {"a": 1})),
        "with attributes": Call(
            Global("torch._tensor _rebuild_from_type_v2"),
            (Global("torch._utils _rebuild_tensor_v2"), Global("torch Tensor"), inner.args, {"a": 1}),
        ),
        "float8": Call(Global("torch._utils _rebuild_tensor_v3"), (*v3, Global("torch float8_e4m3fn"))),
        "uint16": Call(Global("torch._utils _rebuild_tensor_v3"), (*v3, Global("torch uint16"), {})),
    }
    # Two rows of stride 2 from element 1 on: bytes 1 to 4 for the one, byte 2 on, which is too short, for the other.
    with pytest.raises(StateFileError, match="ends outside the 6 bytes of storage '1'"):
        read_state(write(tmp_path / "b.pt", values))
    del values["uint16"]
    expected = dict.fromkeys(("parameter", "with state", "with attributes"), DATA)
    expected["float8"] = bits[1:5].view(ml_dtypes.float8_e4m3fn).reshape(2, 2)
    assert_same(read_state(write(tmp_path / "a.pt", values)), expected)


def test_views_of_storages_as_early_torch_wrote_them(tmp_path):
    data = DATA.reshape(-1)
    part = Storage("Float", data, view=("9", 4, 6))
    path = write_stream(tmp_path / "a.pth", [rebuild(part, (2, 2), (2, 1), 1), Storage("Float", data)])
    found = read_state(path)
    assert_same(found, [data[5:9].reshape(2, 2), data])
    assert found[0].storage == found[1].storage


def test_a_bool_is_true_for_any_byte_but_zero(tmp_path):
    path = write_zip(tmp_path / "a.pt", rebuild(Storage("Bool", np.array([0, 1, 2, 255], np.uint8)), (4,), (1,)))
    assert np.asarray(read_state(path)).view(np.uint8).tolist() == [0, 1, 1, 1]


def test_a_zip_of_more_than_4_gb(tmp_path):
    path = tmp_path / "a.pt"
    write_zip(path, {"near": tensor(DATA, "Float", "0"), "far": tensor(DATA + 1, "Float", "1")})
    with zipfile.ZipFile(path) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents.items():
            if name == "a/data/1":  # a hole: nothing is written
                file.start_dir = 5 << 30
            file.writestr(name, content)
    assert path.stat().st_size > 5 << 30
    state = read_state(path)
    path_again = write_stream(tmp_path / "b.pth", {"x": tensor(DATA, "Float")})
    assert_same(state, {"near": DATA, "far": DATA + 1})
    assert_same(read_state(path_again), {"x": DATA})


# --- a tensor -----------------------------------------------------------------------------------------------


def write_npz(path: Path) -> Path:
    np.savez_compressed(path, x=DATA)
    return path


@pytest.fixture(params=["zip", "stream", "npz"])
def file(request, tmp_path) -> Path:
    if request.param == "npz":
        return write_npz(tmp_path / "a.npz")
    return {"zip": write_zip, "stream": write_stream}[request.param](tmp_path / "a", {"x": tensor(DATA, "Float")})


def test_nothing_is_read_before_it_is_asked_for(file, monkeypatch):
    monkeypatch.setattr(rq_jax.state_file.tensor.Storage, "read", None)
    x = read_state(file)["x"]
    assert (np.shape(x), x.shape, len(x), x.dtype, x.nbytes) == ((3, 5, 2), (3, 5, 2), 3, np.float32, 120)
    assert repr(x) == "Tensor(shape=(3, 5, 2), dtype=float32)" and hash(x.storage) is not None


def test_each_reading_is_a_new_array(file):
    x = read_state(file)["x"]
    np.asarray(x)[:] = 0
    assert np.asarray(x).flags.owndata or np.asarray(x).base.flags.owndata
    np.testing.assert_array_equal(x, DATA)
    half = np.asarray(x, np.float16)
    assert half.dtype == np.float16 and half.shape == x.shape
    with pytest.raises(ValueError, match="always copied"):
        np.asarray(x, copy=False)
    assert np.stack([x, x]).shape == (2, 3, 5, 2)


def test_a_number_has_no_length(tmp_path):
    x = read_state(write_zip(tmp_path / "a.pt", tensor(DATA[0, 0, 0].reshape(()), "Float")))
    with pytest.raises(TypeError, match="no length"):
        len(x)


def test_it_is_found_again_from_another_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    x = read_state(file.name)["x"]
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(x, DATA)


def test_a_file_that_changes_or_goes_is_refused(file):
    x = read_state(file)["x"]
    os.utime(file, ns=(0, 0))
    with pytest.raises(StateFileError, match="has changed since it was opened; read it again"):
        np.asarray(x)
    file.unlink()
    with pytest.raises(StateFileError, match="cannot be read"):
        np.asarray(x)


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


def write_members(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


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
        (npy("{'descr': '<f3', 'fortran_order': False, 'shape': (1,), }", b"xxx"), "of type '<f3'"),
        (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", b"xxxx"), "a structure"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"xxxx"), r"of shape \(2,\) in 4 bytes"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 1,), }", b"xxxx"), "impossible shape"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 19},), }}"), "impossible shape"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'0,' * 40}), }}"), "impossible shape"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 999999999999999999, 999999999999999999), }"),
            "impossible",
        ),
        (npy(" " * 20_000), "header that is too long"),
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


def write_safetensors(path: Path, header, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(1,), start=0, stop=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


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


@pytest.mark.parametrize(
    ("header", "pattern"),
    [
        ({"x": entry("F4")}, "of type 'F4'; allowed are F64, F32"),
        ({"x": entry(stop=5)}, r"of shape \(1,\) in \[0, 5\)"),
        ({"x": entry(start=4, stop=8)}, r"in \[4, 8\)"),
        ({"x": entry(shape=(0,), stop=0)}, "overlap or leave gaps"),
        ({"x": entry(), "y": entry()}, "overlap or leave gaps"),
        ({"x": entry(shape=(-1,), stop=-4)}, "impossible shape or place"),
        ({"x": entry(shape=(True,))}, "impossible shape or place"),
        ({"x": entry(shape=(1.0,))}, "impossible shape or place"),
        ({"x": entry(shape=(1,) * 40)}, "impossible shape or place"),
        ({"x": entry(shape=(2**61, 0), stop=0)}, "impossible tensor"),
        ({"x": {**entry(), "more": 1}}, "damaged entry 'x'"),
        ({"x": [1]}, "damaged entry 'x'"),
        ({"x": {"dtype": "F32"}}, "damaged entry 'x'"),
        (b'{"x":1,"x":2}', "a name stands there twice"),
        (b"{", "header that is damaged"),
        (b'{"\xff"}', "header that is damaged"),
    ],
)
def test_safetensors_that_are_damaged(tmp_path, header, pattern):
    assert_refused(write_safetensors(tmp_path / "a", header, b"1234"), pattern)


# --- files that are something else --------------------------------------------------------------------------


def test_what_is_missing(tmp_path):
    for read, wanted in (
        (read_state, "a file by torch.save, an .npz or a .safetensors"),
        (read_config, "a config in YAML or JSON"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            read(tmp_path / "x")
        assert str(error.value) == f"'{tmp_path / 'x'}' does not exist; give {wanted}"
        assert_refused(tmp_path, f"is a directory; give {wanted}", read)
        (tmp_path / "empty").touch()
        assert_refused(tmp_path / "empty", f"is empty; give {wanted}", read)
        assert_refused("a\0b", "cannot be read", read)
    os.mkfifo(tmp_path / "fifo")
    assert_refused(tmp_path / "fifo", "is no regular file")


def test_what_may_not_be_read(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert_refused(path, r"cannot be read \(Permission denied\)")


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "a tar: as torch before 0.1.10 .* save it again with a current torch"),
        (b"\x93NUMPY\1\0", "a single .npy array; save its arrays by name"),
        (b"\x1f\x8b\x08", "packed by gzip; unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x89HDF\r\n", "HDF5; give a file by torch.save"),
        (b"hello, this is text", "of an unknown kind; give a file by torch.save"),
        (b"\x80\x02}.", "is a pickle, but not by torch.save"),
        (b"PK\x05\x06" + b"\0" * 18, "holds nothing"),
        (b"PK\x03\x04", "no zip directory"),
    ],
)
def test_what_is_of_another_kind(tmp_path, data, pattern):
    (tmp_path / "a.pth").write_bytes(data)
    assert_refused(tmp_path / "a.pth", pattern)


def test_torch_zips_that_are_not_as_torch_writes_them(tmp_path):
    value = {"x": tensor(DATA, "Float")}
    assert_refused(write_zip(tmp_path / "a", value, byteorder=b"big"), "big-endian machine")
    assert_refused(write_zip(tmp_path / "a", value, **{"constants.pkl": b""}), "TorchScript program")
    assert_refused(write_stream(tmp_path / "b", value, facts={"little_endian": False}), "big-endian machine")
    assert_refused(write_members(tmp_path / "c", **{"c/data.pkl": b"", "d": b""}), "'d' beside 'c/data.pkl'")
    assert_refused(write_members(tmp_path / "d", x=b""), "is a zip that holds 'x'")
    with (
        zipfile.ZipFile(write_zip(tmp_path / "a", value)) as old,
        zipfile.ZipFile(tmp_path / "e", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_refused(tmp_path / "e", "compressed; torch.save stores")


# --- configs ------------------------------------------------------------------------------------------------


def test_yaml_and_json_are_the_same(tmp_path):
    config = {"arch": {"type": "rq-vae", "shape": [8, 8, 4], "decay": 0.99, "large": 1e-4, "n": None, "yes": True}}
    (tmp_path / "a.json").write_text(json.dumps(config))
    (tmp_path / "b.yaml").write_text(json.dumps(config))
    text = "# c\narch:\n  type: rq-vae\n  shape: [8, 8, 4]\n  decay: .99\n  large: 1e-4\n  n: null\n  'yes': true\n"
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "d.yaml").write_text("\ufeff{arch: {type: rq-vae, shape: [8, 8, 4], decay: .99, large: 1e-4, n: , 'yes': true}}")
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


# --- damage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, bytes]:
    """A small file of each format."""
    folder = tmp_path_factory.mktemp("samples")
    shared = tensor(DATA, "Float", "4")
    value = {
        "a": shared,
        "b": [shared, tensor(DATA.astype(np.int16), "Short", "5")],
        "n": (1, 2.5, "x"),
        "d": {3: None},
    }
    np.savez(folder / "npz", a=DATA, b=DATA[0].T)
    np.savez_compressed(folder / "packed", a=DATA, b=DATA[0].T)
    header = {"__metadata__": {"a": "b"}, "a": entry("F32", DATA.shape, 0, 120), "b": entry("I8", (2,), 120, 122)}
    files = [
        write_zip(folder / "zip", value),
        write_stream(folder / "stream", value),
        write_stream(folder / "stream4", value, 4),
    ]
    files += [
        folder / "npz.npz",
        folder / "packed.npz",
        write_safetensors(folder / "safe", header, DATA.tobytes() + b"xy"),
    ]
    return {path.name: path.read_bytes() for path in files}


def edited(data: bytes, edits) -> bytes:
    """Bytes changed, cut off, put in and doubled, at places that are fractions of the length."""
    changed = bytearray(data)
    for kind, place, length, value in edits:
        at = int(place * len(changed))
        match kind:
            case "flip" if changed:
                changed[min(at, len(changed) - 1)] ^= value or 1
            case "cut":
                del changed[at : at + length]
            case "truncate":
                del changed[at:]
            case "insert":
                changed[at:at] = bytes([value]) * length
            case "double":
                changed[at:at] = changed[at : at + 8 * length]
    return bytes(changed)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "flip", "cut", "truncate", "insert", "double"]),
        st.floats(0, 1, exclude_max=True), st.integers(1, 40), st.integers(0, 255),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def materialise(value):
    match value:
        case Tensor():
            assert np.asarray(value).shape == value.shape
        case dict():
            for child in value.values():
                materialise(child)
        case list() | tuple():
            for child in value:
                materialise(child)


@pytest.mark.parametrize("name", ["zip", "stream", "stream4", "npz.npz", "packed.npz", "safe"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path, samples, name):
    outcomes = collections.Counter()

    @settings(derandomize=True, max_examples=200, deadline=None, database=None)
    @given(EDITS)
    def check(edits):
        (tmp_path / "x").write_bytes(edited(samples[name], edits))
        try:
            materialise(read_state(tmp_path / "x"))
            outcomes["read"] += 1
        except StateFileError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1

    (tmp_path / "x").write_bytes(samples[name])
    materialise(read_state(tmp_path / "x"))
    check()
    assert outcomes["refused"] > 50  # else the damage is none


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(st.booleans(), EDITS)
def test_a_damaged_config_is_read_or_refused_and_nothing_else(tmp_path_factory, is_json, edits):
    path = tmp_path_factory.getbasetemp() / f"damaged.{'json' if is_json else 'yaml'}"
    text = (
        '{"a": [1, 2.5e3, "x"], "b": {"c": null, "d": true}}'
        if is_json
        else "a: &a [1, 2.5e3, x]\nb: {c: *a, <<: {d: 1}}\n"
    )
    path.write_bytes(edited(text.encode(), edits) or b" ")
    try:
        assert isinstance(read_config(path), dict)
    except StateFileError as error:
        assert "\n" not in str(error)

"""PyTorch's two formats and the tensors in them: what is read, what is refused in one line."""

import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from state_files import (
    KINDS,
    ORDERED_DICT,
    Call,
    Global,
    Storage,
    assert_refused,
    assert_same,
    rebuild,
    tensor,
    write_members,
    write_stream,
    write_zip,
)  # fmt: skip

import rq_jax.interop.state_file
from rq_jax.interop.state_file import Opaque, StateFileError, read_config, read_state

DATA = np.random.default_rng(5).normal(size=(3, 5, 2)).astype(np.float32)
both = pytest.mark.parametrize("write", [write_zip, write_stream])


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
    nested = {
        "epoch": 3, "step": 70000, "large": 2**70, "negative": -5, "lr": 1e-4, "name": "ü", "none": None, "yes": True,
        "no": False, "betas": (0.5, 0.9), "params": [0, 1, [2, ()]], "": {}, 7: {"exp_avg": tensor(DATA, "Float")},
        0.5: 1, None: 2,
    }  # fmt: skip
    calls = {
        "ordered": Call(Global("collections OrderedDict"), (), {"_metadata": {"": {"version": 1}}}),
        "python2": Call(Global("collections OrderedDict"), ([["a", 1], ["b", 2]],)),
        "default": Call(Global("collections defaultdict"), (Global("__builtin__ dict"),)),
    }
    expected = {**nested, 7: {"exp_avg": DATA}, "ordered": {}, "python2": {"a": 1, "b": 2}, "default": {}}
    path = write(tmp_path / "a.pt", nested | calls, protocol)
    assert_same(read_state(path), expected)


@both
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_other_classes_are_names(tmp_path, write, protocol):
    weights = tensor(DATA, "Float")
    objects = {
        "torch.Size": Call(Global("torch Size"), ((2, 3),)),
        "numpy.dtype": Call(Global("numpy dtype"), ("i8", False, True), (3, "<", None, None, None, -1, -1, 0)),
        "numpy._core.multiarray.scalar": Call(Global("numpy._core.multiarray scalar"), (Global("numpy dtype"), b"12345678")),
        "torch.bfloat16": Global("torch bfloat16"),
        "pathlib.PosixPath": Call(Global("pathlib PosixPath"), ("/", "home")),
        "argparse.Namespace": Call(Global("copyreg _reconstructor"), (Global("argparse Namespace"),), {"lr": weights}),
        "lightning.ModelCheckpoint": Global("lightning ModelCheckpoint"),
        "torch._utils._rebuild_sparse_tensor": Call(Global("torch._utils _rebuild_sparse_tensor"), (weights,)),
        "my.Parameter": Call(Global("torch._utils _rebuild_parameter"), (Call(Global("my Parameter"), (weights,)), True, {})),
    }  # fmt: skip
    objects["copyreg._reconstructor"] = objects.pop("argparse.Namespace")
    value = {name: [3, made, weights] for name, made in objects.items()}
    callback = Global("lightning Callback")
    value["keys"] = {Call(callback): weights, Call(callback): 1, ORDERED_DICT: 1, 2**70: 2}
    found = read_state(write(tmp_path / "a.pt", value, protocol))
    keys = found.pop("keys")
    assert [str(key) for key in keys] == ["lightning.Callback", "lightning.Callback", "dict", "int"]
    for name, (number, made, kept) in found.items():
        assert number == 3 and type(made) is Opaque and str(made) == name
        assert_same(kept, DATA)


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
    monkeypatch.setattr(rq_jax.interop.state_file.tensor.Storage, "read", None)
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


# --- files that are something else --------------------------------------------------------------------------


def test_what_is_missing(tmp_path):
    for read, wanted in (
        (read_state, "a file by torch.save, an .npz, a .safetensors or the index of several"),
        (read_config, "a config in YAML or JSON"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            read(tmp_path / "x")
        assert str(error.value) == f"'{tmp_path / 'x'}' does not exist; give {wanted}"
        kind = f"; give {wanted}" if read is read_config else r" with no \*.index.json; give a file of weights or an"
        assert_refused(tmp_path, f"is a directory{kind}", read)
        (tmp_path / "empty").touch()
        assert_refused(tmp_path / "empty", f"is empty; give {wanted}", read)
        assert_refused("a\0b", "cannot be read", read)
    os.mkfifo(tmp_path / "fifo")
    assert_refused(tmp_path / "fifo", "is no regular file")


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz(tmp_path / "a.npz")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert_same(read_state("~/a.npz"), {"x": DATA})
    assert read_config("~/a.json") == {"a": 1}


def test_what_may_not_be_read(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert_refused(path, r"cannot be read \(Permission denied\)")


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "a tar, as torch before 0.1.10 .* save it again with a current torch"),
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


def script_module(attributes, name="A"):
    return Call(Global(f"__torch__.torch.nn.{name} {name}"), (), attributes)


def test_the_tensors_of_a_torchscript_program_are_a_state_dict(tmp_path):
    """Its code, which can do anything, is not looked at; the rest of its attributes is dropped."""
    x, y = (tensor(DATA + i, "Float", str(i)) for i in range(2))
    inner = {"0": script_module({"weight": y, "training": False, "_is_full_backward_hook": None}, "Linear"), "n": 3}
    module = script_module({"weight": x, "blocks": script_module(inner, "Sequential"), "list": [x]})
    members = {"constants.pkl": b"", "code/__torch__.py": b"import os; os.abort()"}
    found = read_state(write_zip(tmp_path / "a", module, **members))
    assert list(found) == ["weight", "blocks.0.weight"]
    np.testing.assert_array_equal(found["blocks.0.weight"], DATA + 1)


def test_a_torchscript_program_that_is_none_is_empty_or_refused(tmp_path):
    members = {"constants.pkl": b""}
    assert read_state(write_zip(tmp_path / "a", Call(Global("posix system"), ("ls",)), **members)) == {}
    assert read_state(write_zip(tmp_path / "a", script_module({}), **members)) == {}
    assert_refused(write_zip(tmp_path / "a", script_module([1]), **members), "sets attributes of a")
    a_module = pickle.PROTO + b"\2" + pickle.GLOBAL + b"__torch__.A\nA\n" + pickle.BINPUT + b"\0" + pickle.EMPTY_TUPLE
    circle = pickle.NEWOBJ + pickle.BINPUT + b"\1" + pickle.EMPTY_DICT + pickle.BINUNICODE + b"\1\0\0\0x"
    circle = a_module + circle + pickle.BINGET + b"\1" + pickle.SETITEM + pickle.BUILD + pickle.STOP
    assert_refused(write_zip(tmp_path / "a", circle, **members), "a list or dict that holds itself")


def test_torch_zips_that_are_not_as_torch_writes_them(tmp_path):
    value = {"x": tensor(DATA, "Float")}
    assert_refused(write_zip(tmp_path / "a", value, byteorder=b"big"), "big-endian machine")
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

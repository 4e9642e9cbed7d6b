"""Files by torch itself, in both formats, read as torch.load reads them; skipped where there is no torch."""

import argparse
import collections
import pathlib
from typing import Any

import numpy as np
import pytest

from rq_jax.interop.state_file import Opaque, StateFileError, Tensor, read_state

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "stream"]),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64",
    "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def assert_same(found: Any, expected: Any, where: str = "top") -> None:
    """Equal trees, with a Tensor of the same bytes, shape and type for each of torch's."""
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().contiguous()
        array = np.asarray(found)
        assert isinstance(found, Tensor) and array.shape == found.shape == tuple(expected.shape), where
        assert f"torch.{array.dtype}" == str(expected.dtype) and array.dtype == found.dtype, where
        assert array.tobytes() == bytes(expected.reshape(-1).view(torch.uint8).tolist()), where
    elif isinstance(expected, dict):
        assert type(found) is dict and list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert isinstance(expected, type(found)) and len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}.{i}")
    else:
        assert found == expected, where


def check(path, is_zip: bool, value: Any, protocol: int = 2) -> Any:
    """The value saved by torch and read by both."""
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    found = read_state(path)
    assert_same(found, torch.load(path, weights_only=False))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(tmp_path, is_zip, dtype):
    values = torch.tensor([[1.5, 0.0, -2.25], [3.0, 100.0, 7.0]])
    values = values.abs() if dtype.startswith("uint") else values
    # Not torch.load: of these it cannot read every type back from a stream.
    value = {dtype: values.to(getattr(torch, dtype))}
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    assert_same(read_state(tmp_path / "a.pt"), value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_and_containers(tmp_path, is_zip, protocol):
    base = torch.arange(30.0).reshape(3, 5, 2)
    value = {
        "base": base, "slice": base[1:, ::2], "transposed": base.transpose(0, 2), "expanded": torch.ones(1, 4).expand(3, 4),
        "number": torch.tensor(3), "part": base[2, 4, 1], "empty": torch.empty(0, 3), "empty slice": base[3:],
        "list": [base, (1, None, True)], "ordered": collections.OrderedDict(b=1, a=[]), "default": collections.defaultdict(list, {1: [2]}),
        "large": 2**70, "text": "ü" * 300,
    }  # fmt: skip
    found = check(tmp_path / "a.pt", is_zip, value, protocol)
    assert found["base"].storage == found["slice"].storage == found["list"][0].storage != found["number"].storage


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_other_classes_are_names(tmp_path, is_zip, protocol):
    values = {
        "torch.bfloat16": torch.bfloat16, "torch.device": torch.device("cuda:1"), "torch.Size": torch.ones(2).shape,
        "pathlib.PosixPath": pathlib.PosixPath("/a"), "argparse.Namespace": argparse.Namespace(x=torch.ones(2)),
        "collections.Counter": collections.Counter("abca"), "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 3),
        "torch._utils._rebuild_sparse_tensor": torch.ones(2).to_sparse(),
        "torch._utils._rebuild_meta_tensor_no_storage": torch.ones(2, device="meta"),
    }  # fmt: skip
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save({"kept": torch.ones(2), **values, "set": {1, 2}, "array": np.ones(2)}, tmp_path / "a.pt", **options)
    found = read_state(tmp_path / "a.pt")
    np.testing.assert_array_equal(found["kept"], np.ones(2))
    assert {name: str(found[name]) for name in values} == {name: name for name in values}
    assert type(found["set"]) is type(found["array"]) is Opaque


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
def test_a_checkpoint_of_training(tmp_path, is_zip, optimizer):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Linear(4, 5))
    model[2].weight.by_hand = 1
    state = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(state, 10)
    model(torch.randn(2, 2, 3, 4)).sum().backward()
    state.step()
    schedule.step()
    plain = torch.ones(2)
    plain.by_hand = 1
    value = {
        "epoch": 3, "state_dict": model.state_dict(), "optimizer": state.state_dict(), "scheduler": schedule.state_dict(),
        "parameters": list(model.parameters()), "rng": torch.get_rng_state(), "plain": plain,
    }  # fmt: skip
    check(tmp_path / "a.pt", is_zip, value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugation or negation is put off"),
    ],
)
def test_what_is_refused(tmp_path, is_zip, make, message):
    torch.save(make(), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(StateFileError, match=message):
        read_state(tmp_path / "a.pt")


def test_a_torchscript_program_is_read_as_its_state_dict(tmp_path, is_zip):
    if not is_zip:
        pytest.skip("torch.jit.save writes zips alone")
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Linear(4, 5).half()).eval()
    model[0].register_buffer("size", torch.tensor(7))
    torch.jit.script(model).save(tmp_path / "a.pt")
    assert_same(dict(sorted(read_state(tmp_path / "a.pt").items())), dict(sorted(model.state_dict().items())))

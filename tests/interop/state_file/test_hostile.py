"""Files that want to run code, fill the memory or take hours, and files that were damaged at random.

The hostile ones are read in one process of their own, whose time and memory are measured: bounds of safety.
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import hostile_containers
import hostile_pickles
import numpy as np
import pytest
from hostile_pickles import READ, SENTINEL
from hypothesis import given, settings
from hypothesis import strategies as st
from state_files import encode, entry, materialise, tensor, write_safetensors, write_stream, write_zip

from rq_jax.interop.state_file import StateFileError, read_config, read_state

SECONDS, MEGABYTES = 6, 500  # meant are 2 s, on a machine with nothing else to do
DATA = np.random.default_rng(5).normal(size=(3, 5, 2)).astype(np.float32)


@dataclasses.dataclass
class Case:
    name: str
    data: bytes
    expected: str  # pattern of the message
    file: str = ""


def make_cases(folder: Path) -> list[Case]:
    cases = []
    for group in hostile_pickles.GROUPS:
        for name, value, expected in group():
            for write in (write_zip, write_stream):
                cases.append(Case(f"{name} ({write.__name__})", write(folder / "raw", value).read_bytes(), expected))
    cases += [
        Case(name, write_zip(folder / "raw", data).read_bytes(), expected)
        for name, data, expected in hostile_pickles.bomb_cases()
    ]
    for group in hostile_containers.GROUPS:
        cases += [Case(name, data, expected) for name, data, expected in group()]
    return cases


READER = """
import json, pathlib, resource, signal, sys, time
import safetensors, yaml
from rq_jax.interop.state_file import read_config, read_state
from state_files import materialise, outline

def stop(*_):
    raise SystemExit("took more than 20 s")

signal.signal(signal.SIGALRM, stop)
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

def rss():
    # Not ru_maxrss, which begins with that of the process that started this one.
    status = pathlib.Path("/proc/self/status")  # Linux; memory is not measured elsewhere
    return int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0

begin = rss()
for line in sys.stdin:
    name = line.strip()
    signal.alarm(20)
    clock = time.process_time()
    try:
        value = (read_config if name.endswith((".yaml", ".json")) else read_state)(name)
        materialise(value)
        outcome = f"read: {str(outline(value))[:300]}"
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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(helpers.ROOT), str(helpers.ROOT / "tests")))}
    lines = "\n".join(case.file for case in cases)
    run = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, env=environment)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(cases), run.stderr
    assert not (folder / SENTINEL).exists()
    return list(zip(cases, results, strict=True))


def test_the_code_in_them_would_run(tmp_path):
    name, call, _ = next(hostile_pickles.code_cases())
    command = [sys.executable, "-c", f"import pickle; pickle.loads({encode(call, {})!r})"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / SENTINEL).exists(), name


def test_hostile_files_are_refused_in_one_line(outcomes):
    wrong = []
    for case, (outcome, _, _) in outcomes:
        refusal = f"StateFileError: '{case.file}': "
        is_right = outcome.startswith((f"{READ}: ", refusal)) and (case.expected != READ or outcome.startswith(READ))
        is_right = is_right and outcome.isprintable() and len(outcome) < 500
        if not is_right or not re.search(case.expected, outcome):
            wrong.append(f"{case.name}: '{outcome:.300}' is not '{case.expected}'")
    assert not wrong, "\n".join(wrong)


def test_hostile_files_take_little_time(outcomes):
    slow = [f"{case.name}: {seconds:.1f} s" for case, (_, seconds, _) in outcomes if seconds > SECONDS]
    assert not slow, "\n".join(slow)


def test_hostile_files_take_little_memory(outcomes):
    large = [f"{case.name}: {megabytes:.0f} MB" for case, (_, _, megabytes) in outcomes if megabytes > MEGABYTES]
    assert not large, "\n".join(large)


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

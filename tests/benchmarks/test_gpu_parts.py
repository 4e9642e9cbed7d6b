"""The parts of `make gpu`: commands that exist, records, resumption, time, failures."""

import gzip
import json
import shlex

import pytest

import benchmark
from benchmarks import gpu

WHERE = {"commit": "0123456789ab", "dirty": False, "date": "2026-11-29T13:00:00+00:00"}
DEVICE = gpu.Device("gpu", 2, "NVIDIA H200 (SXM)")
WRITE = "import sys, json, pathlib; pathlib.Path(sys.argv[1]).write_text(json.dumps([7]))"


def part(name, code=WRITE, minutes=1.0):
    return gpu.Part(name, minutes, ("-c", code, "{out}"))


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_part_is_a_command_that_there_is(rehearse):
    parts = gpu.parts(rehearse)
    assert len({each.name for each in parts}) == len(parts)
    assert all(0 < each.minutes <= 6 for each in parts)
    for each in parts:
        script, *options = (piece.format(out="record.json") for piece in each.command)
        assert any("record.json" in option for option in options)
        if script == "benchmark.py":
            assert benchmark.parse_args(options).out
        else:
            assert (script, options[0]) in {("-m", "pytest"), ("-m", "benchmarks.gpu")}


def test_the_papers_figure_has_all_its_cells():
    names = {each.name for each in gpu.parts()}
    for kind in ("plain", "filtered", "decoded"):
        for batch in (1, 100, 200, 500):
            assert {f"sampling-{kind}-{batch}-{weights}" for weights in ("float32", "bfloat16", "int8")} <= names
    assert {"tests", "resumed", "search", "decoding", "training-1", "training-2", "step-1", "step-2"} <= names


def test_parts_leave_records_and_are_not_run_again(tmp_path, capsys):
    assert gpu.run(DEVICE, tmp_path, 1, [part("one"), part("two")], WHERE) == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"gpu-nvidia-h200-sxm-x2-2026-11-29-0123456789ab-{name}.json" for name in ("one", "two")]
    record = json.loads((tmp_path / names[0]).read_text())
    assert record["result"] == [7] and record["part"] == "one" and record["device"]["count"] == 2
    capsys.readouterr()
    fails = "raise SystemExit('broken')"
    later = {**WHERE, "date": "2026-12-01T00:00:00+00:00"}
    assert gpu.run(DEVICE, tmp_path, 1, [part("one", fails), part("three", fails), part("four")], later) == ["three"]
    shown = capsys.readouterr().out
    assert f"[1/3] one: is in {names[0]}" in shown and "[2/3] three: FAILED" in shown and "broken" in shown
    assert len(list(tmp_path.iterdir())) == 3  # four ran after the failure
    for other in ({**WHERE, "commit": "ba9876543210"}, {**WHERE, "dirty": True}):
        assert gpu.find_record(tmp_path, DEVICE, other, part("one")) is None
    assert gpu.find_record(tmp_path, DEVICE._replace(kind="NVIDIA H100"), WHERE, part("one")) is None
    assert "+changes" in gpu.record_name(DEVICE, {**WHERE, "dirty": True}, part("one"))


def test_time_is_over(tmp_path, capsys):
    slow = part("slow", "import time; time.sleep(60)", minutes=0.02)
    assert gpu.run(DEVICE, tmp_path, 1, [slow], WHERE) == ["slow"]
    assert gpu.run(DEVICE, tmp_path, 0, [part("one")], WHERE) == []
    assert "it took longer than 1 s" in (shown := capsys.readouterr().out) and "one: not begun" in shown
    assert list(tmp_path.iterdir()) == []


def test_reports_of_tests_hold_those_that_ran():
    xml = """<testsuites><testsuite><testcase name="a" time="1.5"/><testcase name="b"><skipped/></testcase>
    <testcase name="c" time="0"><failure/></testcase></testsuite></testsuites>"""
    assert gpu.tests_of(xml) == [
        {"test": "a", "seconds": 1.5, "outcome": "passed"},
        {"test": "c", "seconds": 0.0, "outcome": "failed"},
    ]


def test_a_trace_is_summed_over_the_devices(tmp_path):
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        *({"ph": "X", "name": "gemm", "pid": 1, "dur": 2000} for _ in range(3)),
        {"ph": "X", "name": "copy", "pid": 1, "dur": 500},
        {"ph": "X", "name": "python", "pid": 2, "dur": 90000},
    ]
    with gzip.open(tmp_path / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert gpu.longest_kernels(tmp_path) == [
        {"name": "gemm", "runs": 3, "milliseconds": 6.0},
        {"name": "copy", "runs": 1, "milliseconds": 0.5},
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ("", "device: JAX sees no GPU but "),
        ("--rehearse --only=nothing", "--only: 'nothing' fits no part of tests, "),
        ("--rehearse --results=/nowhere", "--results: '/nowhere' is no directory"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_device", lambda: gpu.Device("cpu", 1, "cpu"))
    with pytest.raises(SystemExit) as stopped:
        gpu.main(shlex.split(options))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_measures_a_step(tmp_path):
    gpu.main(["--rehearse", f"--results={tmp_path}", "--only=step-2"])
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())["result"]
    assert result["predicted"]["bytes"] > 0 and result["measured"]["seconds"] > 0
    assert len(result["measured"]["runs"]) == gpu.NUM_TRACED and result["kernels"][0]["milliseconds"] > 0

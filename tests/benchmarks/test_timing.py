"""rq_jax/timing.py: what is timed and in which order, by a clock of our own; results, tables, comparisons, plots."""

import json
import subprocess

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import timing
from rq_jax.devices.memory import peak_memory
from rq_jax.devices.peaks import Peaks
from rq_jax.evaluation.protocol import environment
from rq_jax.models.flops import Work

PEAKS = Peaks("toy", {"float32": 1000.0, "bfloat16": 4000.0}, 100.0)


class Clock:
    """Stands still but for what a program takes."""

    def __init__(self):
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "clock", clock)
    return clock


def make_program(clock, seconds, calls=None, name="", **settings):
    durations = iter(seconds)

    def call():
        clock.now += next(durations)
        if calls is not None:
            calls.append(name)

    return timing.Program(call, **{"count": 1, **settings})


def test_programs_take_turns_and_the_first_round_does_not_count(clock):
    calls, runs = [], []
    programs = [make_program(clock, [9, 1, 2, 3], calls, "a"), make_program(clock, [8, 4, 5, 6], calls, "b")]
    assert timing.measure(programs, runs=3, on_run=lambda: runs.append(0)) == [[1, 2, 3], [4, 5, 6]]
    assert "".join(calls) == "abbaabba"
    assert len(runs) == 8


def test_warmups(clock):
    assert timing.measure([make_program(clock, [9, 8, 1])], runs=1, warmups=2) == [[1]]


def test_measuring_waits_for_the_arrays(clock, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    timing.measure([timing.Program(lambda: "arrays", 1)], runs=2)
    assert waited == ["arrays"] * 3


@helpers.full_optimization()
def test_compiling_is_timed_apart():
    compiled = timing.compile_program(
        lambda x, y: {"sum": x + y}, jnp.ones((3, 5)), jax.ShapeDtypeStruct((), jnp.float32)
    )
    assert compiled.seconds > 0
    assert compiled.memory["arguments"] == 4 * (15 + 1) and compiled.memory["outputs"] >= 4 * 15
    np.testing.assert_array_equal(compiled.call(jnp.ones((3, 5)), jnp.float32(2))["sum"], np.full((3, 5), 3.0))


@helpers.full_optimization()
def test_options_of_jit_reach_it():
    compiled = timing.compile_program(lambda x: x + 1, jnp.ones(64), donate_argnums=0)
    assert compiled.memory["aliased"] == 256


def test_result():
    stages = {"a": Work(3000.0, 20.0), "b": Work(2000.0, 100.0, "bfloat16")}
    program = timing.Program(
        lambda: None,
        6,
        1.5,
        {"temporaries": 40},
        stages,
        model_flops=2500.0,
        details=lambda seconds: {"half": seconds / 2},
    )
    entry = timing.result({"batch": 6}, program, [10.0, 8.0, 20.0], PEAKS)
    assert entry["config"] == {"batch": 6} and entry["count"] == 6 and entry["compile_seconds"] == 1.5
    assert entry["seconds"] == {"median": 10.0, "min": 8.0, "max": 20.0, "runs": [10.0, 8.0, 20.0]}
    assert entry["per_second"] == 0.6
    assert (entry["flops"], entry["bytes"], entry["flops_per_second"]) == (5000.0, 120.0, 500.0)
    assert entry["flops_utilization"] == pytest.approx((3.0 + 0.5) / 10)
    assert entry["model_flops_utilization"] == pytest.approx(entry["flops_utilization"] / 2)
    assert entry["roofline"] == {"seconds": 4.0, "bound": "compute", "fraction": 0.4}
    assert entry["memory"]["temporaries"] == 40 and entry["memory"]["process_peak"] > 10e6
    assert entry["half"] == 5.0
    json.dumps(entry)


def test_devices_share_the_roofline():
    program = timing.Program(lambda: None, 1, stages={"a": Work(3000.0, 20.0)}, num_devices=4)
    entry = timing.result({}, program, [3.0], PEAKS)
    assert entry["roofline"]["seconds"] == 0.75 and entry["flops_utilization"] == 0.25


def test_without_stages_there_is_no_roofline():
    entry = timing.result({}, timing.Program(lambda: None, 4), [2.0], PEAKS)
    assert entry["per_second"] == 2.0 and not {"flops", "roofline"} & set(entry)


def test_memory_of_a_device_that_tells(monkeypatch):
    class Device:
        memory_stats = staticmethod(lambda: {"peak_bytes_in_use": 123})

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert peak_memory()["device_peak"] == 123


def test_environment(tmp_path):
    found = environment(helpers.ROOT)
    assert {"python", "jax", "jaxlib", "flax", "date", "cpu_count", "xla_flags", "matmul_precision"} <= set(found)
    assert found["jax"] == jax.__version__
    nowhere = environment(tmp_path)
    assert nowhere["commit"] is None and nowhere["dirty"] is False


def test_a_checkout_is_dirty_where_code_is(tmp_path):
    def git(*args):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *args],
            check=True,
            capture_output=True,
        )

    (tmp_path / "results").mkdir()
    for name in ("results/table.json", "code.py"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    found = []
    for name in (None, "new.py", "results/table.json", "code.py"):
        if name:
            (tmp_path / name).write_text("2\n")
        found.append(environment(tmp_path)["dirty"])
    assert found == [False, False, False, True]


def test_peaks_are_measured_where_the_table_does_not_know_the_device(clock, monkeypatch):
    def measure(programs, runs):
        jax.block_until_ready(programs[0].call())
        assert (len(programs), runs) == (1, 10)
        return [[3.0, 2.0, 4.0]]

    monkeypatch.setattr(timing, "measure", measure)
    peaks = timing.measured_peaks("toy", side=8, length=100)
    assert peaks == ("toy", {"float32": 512.0, "bfloat16": 512.0}, 400.0, "measured")


def test_device_of_the_table(monkeypatch):
    class Device:
        device_kind, platform = "NVIDIA H200", "gpu"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    device, peaks = timing.device_and_peaks()
    assert device == {"kind": "NVIDIA H200", "platform": "gpu", "count": 1, "peaks": peaks._asdict()}
    assert peaks.source == "table"
    json.dumps(device)


# --- tables, comparisons, plots ---


def entry(seconds=2.0, temporaries=10, **config):
    program = timing.Program(lambda: None, 4, 1.0, {"temporaries": temporaries}, {"a": Work(500.0, 20.0)})
    return timing.result(config, program, [seconds, seconds / 2, seconds * 2], PEAKS)


def record(*entries, kind="toy"):
    return {"benchmark": "sample", "device": {"kind": kind}, "results": list(entries)}


def test_table():
    results = [entry(batch=1, shape=(8, 8, 4), top_k=None), entry(4.0, batch=16, shape=(8, 8, 4), top_k=None)]
    lines = timing.table([e["config"] for e in results], [timing.figures(e, "image") for e in results]).split("\n")
    assert lines[0] == "shape=8x8x4"
    assert lines[1].split("  ")[0] == "batch" and "images/s" in lines[1] and "ms/image" in lines[1]
    assert lines[2].split()[:4] == ["1", "2", "500", "250..1000"]
    assert lines[3].split()[:4] == ["16", "1", "1000", "500..2000"]
    assert "25 % of compute" in lines[2] and "12 % of compute" in lines[3]
    assert len(lines) == 4


def test_table_of_what_failed():
    results = [entry(batch=1), {"config": {"batch": 900}, "error": "out of memory"}]
    lines = timing.table([e["config"] for e in results], [timing.figures(e, "image") for e in results]).split("\n")
    assert lines[-1].split() == ["900", "out", "of", "memory"]


def test_figures_name_parts_and_utilization():
    found = timing.figures({**entry(), "ms_per_image": {"total": 3.0, "sampling": 2.0, "decoding": 1.0}}, "image")
    assert (found["sampling ms"], found["decoding ms"]) == ("2", "1") and "total ms" not in found
    found = timing.figures({**entry(), "model_flops": 1.0, "model_flops_utilization": 0.42}, "image")
    assert found["MFU"] == "42 %"


def test_compare():
    old = record(
        entry(2.0, 10, batch=1, shape=(8, 8)), entry(batch=2), {"config": {"batch": 3}, "error": "out of memory"}
    )
    old = json.loads(json.dumps(old))  # lists where there were tuples
    new = [entry(1.0, 30, shape=(8, 8), batch=1), entry(batch=4), entry(batch=3)]
    assert timing.compare(new, old) == [
        {"config": {"shape": (8, 8), "batch": 1}, "per_second": 2.0, "temporaries": 3.0}
    ]
    timing.check_comparable("sample", [e["config"] for e in new], old, "old.json")


@pytest.mark.parametrize(
    ("benchmark", "batch", "message"),
    [
        ("decode", 1, "--compare: 'old.json' holds results of 'sample', not of 'decode'"),
        ("sample", 2, "--compare: 'old.json' has none of the 1 configurations; give the same arguments"),
    ],
)
def test_nothing_to_compare(benchmark, batch, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        timing.check_comparable(benchmark, [{"batch": batch}], record(entry(batch=1)), "old.json")


def test_read_record(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(record(entry(batch=1))))
    assert timing.read_record(tmp_path / "old.json")["results"][0]["config"] == {"batch": 1}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"benchmark": "sample", "results": []}',
     '{"benchmark": "sample", "device": {"kind": "cpu"}, "results": [{}]}',
     '{"benchmark": "sample", "device": "cpu", "results": []}',
     '{"protocol": "", "data": {}, "results": {"run": {"psnr": 1}}}'],
)  # fmt: skip
def test_a_file_that_is_no_record(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="other.json' is no benchmark result; give the JSON that --out wrote"):
        timing.read_record(tmp_path / "other.json")


def test_no_file():
    with pytest.raises(
        FileNotFoundError, match="--compare: 'nowhere.json' is no file; give the JSON of an earlier run"
    ):
        timing.read_record("nowhere.json")


def test_plot(tmp_path):
    results = [entry(model=model, batch=batch) for model in ("a", "b") for batch in (4, 1)]
    failed = {"config": {"model": "b", "batch": 100}, "error": "out of memory"}
    timing.plot_rates([*results, failed], "image", tmp_path / "plots" / "rates.png")
    image = np.asarray(Image.open(tmp_path / "plots" / "rates.png").convert("RGB"))
    colours = len(np.unique(image.reshape(-1, 3), axis=0))
    timing.plot_rates(results[:2], "image", tmp_path / "one.png")
    one = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    assert image.shape == one.shape and colours > len(np.unique(one.reshape(-1, 3), axis=0)) > 2

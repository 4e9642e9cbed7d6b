"""Run monitoring: a step that hangs ends the process, non-finite steps stop it, figures and traces."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_run import TOTAL, ToyDataset, jitted_step, metrics_of, train

from rq_jax.checkpoint.saver import Checkpointer
from rq_jax.devices import sharding
from rq_jax.devices.memory import OutOfMemory, device_bytes
from rq_jax.devices.peaks import Peaks
from rq_jax.training import monitor
from rq_jax.training.settings import memory_remedies

# --- steps that are not finite ----------------------------------------------------------------------------------------


class BrokenDataset(ToyDataset):
    """Batches at some positions are not finite."""

    def __init__(self, *broken):
        super().__init__()
        self.broken = broken

    def __next__(self):
        batch = super().__next__()
        if self.position - 1 in self.broken:
            batch["x"] = np.full_like(batch["x"], np.nan)
        return batch


@pytest.mark.fault("steps that are not finite, too many in a row", "weights untouched, examples listed, stops")
def test_too_many_in_a_row_stop_the_run_with_their_examples(tmp_path):
    with pytest.raises(monitor.NotFinite) as error:
        train(tmp_path, BrokenDataset(1, 6, 7, 8, 9), max_skipped_steps=3)
    assert str(error.value) == (
        "loss: not finite in 3 steps in a row, 7 to 9; none of them changed the weights, their examples are listed in "
        f"'{tmp_path / 'not_finite-0.json'}'; lower optim.learning_rate, set optim.clip_norm, or look at these examples "
        "(loop.max_skipped_steps)"
    )
    listed = json.loads((tmp_path / "not_finite-0.json").read_text())
    assert listed == [{"step": step, "indices": [step] * 8} for step in (7, 8, 9)]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step == 5  # what was whole before stays


@pytest.mark.fault("steps that are not finite", "left out and counted")
@pytest.mark.parametrize("broken, limit", [((1, 2, 4, 5, 7), 3), ((1, 2, 3, 4, 5, 6), 0)])
def test_fewer_in_a_row_are_left_out_and_counted(tmp_path, record_property, broken, limit):
    state = train(tmp_path, BrokenDataset(*broken), max_skipped_steps=limit)
    record_property("times", len(broken))
    assert int(state.step) == TOTAL and int(state.skipped_steps) == len(broken)
    assert not (tmp_path / "not_finite-0.json").exists()
    assert np.isfinite(state.params["w_M"]).all()
    logged = metrics_of(tmp_path)
    assert [logged[step, "skipped_share"] for step in range(1, TOTAL + 1)] == [float(step - 1 in broken) for step in range(1, TOTAL + 1)]  # fmt: skip


# --- a step that hangs ------------------------------------------------------------------------------------------------


def run_program(body):
    paths = [str(helpers.ROOT / "tests"), str(helpers.ROOT)]
    program = f"import sys\nsys.path[:0] = {paths!r}\n"
    program += textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.fault("a step that hangs", "stacks of all threads, exit code 1")
def test_a_step_that_hangs_ends_the_process_with_its_stacks():
    done = run_program("""
        import threading
        from rq_jax.training import monitor

        def step_that_waits_for_a_dead_host():
            threading.Event().wait()

        with monitor.HangGuard(0.5) as hang:
            hang.arm()
            step_that_waits_for_a_dead_host()
    """)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "step_that_waits_for_a_dead_host" in done.stderr


def test_steps_in_time_and_what_is_no_step_are_left_alone():
    done = run_program("""
        import time
        from rq_jax.training import monitor

        with monitor.HangGuard(0.4) as hang:
            hang.expect_compilation()
            hang.arm()
            time.sleep(0.6)
            for _ in range(4):
                hang.arm()
                time.sleep(0.2)
            hang.expect_compilation()
            hang.arm()
            time.sleep(0.6)
            hang.disarm()
            time.sleep(0.6)
        time.sleep(0.6)
        with monitor.HangGuard(0) as hang:
            hang.arm()
            time.sleep(0.2)
        print("done")
    """)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


class GrowingDataset(ToyDataset):
    """The second batch has another shape than the others."""

    def __next__(self):
        batch = super().__next__()
        return {**batch, "unread": np.zeros((8, 1 + (self.position == 2)), np.float32)}


def test_the_loop_arms_it(tmp_path):
    """Step 3 is one that compiles anew, as is step 2 for its shapes; the evaluation has three batches."""
    armed = []

    class Guard(monitor.HangGuard):
        def arm(self):
            armed.append("arm")

        def disarm(self):
            armed.append("disarm")

        def expect_compilation(self):
            armed.append("compiles")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitor, "HangGuard", Guard)
        train(tmp_path / "phases", phases=(2,), total_steps=3)
        step, evaluation = ["arm", "disarm"], ["compiles", *["arm"] * 4, "disarm"]
        assert armed == ["compiles", *step, *step, "compiles", *step, *evaluation, "disarm"]
        armed.clear()
        train(tmp_path / "shapes", GrowingDataset(), total_steps=3)
        assert armed == ["compiles", *step, "arm", "compiles", *step, *step, *evaluation, "disarm"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("a device without enough memory", "the estimate and the cheapest remedies, exit code 2")
def test_what_does_not_fit_is_explained(tmp_path):
    def exhausted(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    with pytest.raises(OutOfMemory) as error:
        train(tmp_path, step=exhausted)
    assert str(error.value) == (
        "memory: a step does not fit a device; the state alone takes 0.00 GiB there (parameters 0.00, optimizer 0.00, "
        "average 0.00, codebook 0.00), the rest are gradients and activations; try, the cheapest first: --config.mesh.data=1 "
        "--config.mesh.fsdp=8"
    )

    def broken(state, batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(tmp_path / "other", step=broken)


def test_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    whole, split = sharding.replicated(mesh), NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {
        "whole": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=whole),
        "split": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=split),
        "rng": jax.random.key(0),
    }
    assert device_bytes(tree) == 8 * 3 * 4 + 2 * 3 * 2


@pytest.mark.parametrize(
    "mesh, steps, accumulates, use_remat, batch, expected",
    [
        (dict(data=8), 2, True, False, 32, ["model.use_remat=True", "optim.accumulation_steps=4", "mesh.data=1 --config.mesh.fsdp=8", "data.batch_size=16"]),
        (dict(data=8), 2, False, True, 32, ["mesh.data=1 --config.mesh.fsdp=8", "data.batch_size=16"]),
        (dict(data=1, fsdp=8), 2, True, True, 32, ["optim.use_sharded_gradients=True", "optim.accumulation_steps=4", "data.batch_size=16"]),
        (dict(data=1, fsdp=8), 1, True, True, 32, ["data.batch_size=16"]),
        (dict(data=8), 1, True, True, 32, ["optim.accumulation_steps=2", "mesh.data=1 --config.mesh.fsdp=8", "data.batch_size=16"]),
        (dict(data=8), 2, True, True, 16, ["mesh.data=1 --config.mesh.fsdp=8"]),
        (dict(data=1, fsdp=8), 2, True, True, 16, ["optim.use_sharded_gradients=True"]),
        (dict(data=1, fsdp=8), 1, True, True, 8, None),
    ],
)  # fmt: skip
def test_remedies_are_settings_that_the_run_would_take(mesh, steps, accumulates, use_remat, batch, expected):
    model, optimizer = (
        SimpleNamespace(use_remat=use_remat),
        SimpleNamespace(accumulation_steps=steps, use_sharded_gradients=False),
    )
    recipe = SimpleNamespace(model=model, optimizer=optimizer, mesh=sharding.make_mesh(**mesh), accumulates=accumulates)
    assert memory_remedies(recipe, batch) == (
        ["more devices"] if expected is None else [f"--config.{one}" for one in expected]
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_log_says_where_the_time_goes(tmp_path):
    train(tmp_path, total_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert 0 <= line["data_wait_share"] <= 1 and line["process_gib"] > 0.05
        assert "mfu" not in line and "teraflops_per_second" not in line  # nobody said how much work a picture is


def test_arithmetic_rates(monkeypatch):
    rates = {"images_per_second": 8.0}
    unknown = monitor.Meter(flops_per_image=5e11).measure(rates)
    assert unknown["teraflops_per_second"] == pytest.approx(4.0) and "mfu" not in unknown
    peaks = Peaks("toy", {"bfloat16": 2e12, "float32": 1e12}, 1.0)
    monkeypatch.setattr(monitor, "device_peaks", lambda kind: peaks)
    assert monitor.Meter(5e11, "bfloat16").measure(rates)["mfu"] == pytest.approx(2.0 / jax.device_count())
    assert "mfu" not in monitor.Meter(5e11).measure({})
    assert "mfu" not in monitor.Meter().measure(rates)


def test_waiting_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    meter = monitor.Meter()
    with meter.waiting():
        now[0] += 3
    now[0] += 9
    assert meter.measure({})["data_wait_share"] == 0.25
    with meter.waiting():
        now[0] += 1
    meter.restart()
    now[0] += 1
    assert meter.measure({})["data_wait_share"] == 0.0


# --- traces -----------------------------------------------------------------------------------------------------------


def test_chosen_steps_are_traced(tmp_path, monkeypatch):
    seen, step = [], [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append(("start", step[0], path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop", step[0])))

    def counted(state, batch):
        step[0] += 1
        return jitted_step(state, batch)

    train(tmp_path, step=counted, profile_first_step=4, profile_steps=3)
    assert seen == [("start", 3, tmp_path / "profile"), ("stop", 6)]
    seen.clear()
    train(tmp_path / "short", step=counted, total_steps=5, profile_first_step=4, profile_steps=3)
    assert [kind for kind, *_ in seen] == ["start", "stop"]
    seen.clear()
    train(tmp_path / "none", step=counted, total_steps=5)
    assert not seen
    train(tmp_path / "none", step=counted, total_steps=9, profile_first_step=2, profile_steps=1)
    assert [kind for kind, *_ in seen] == ["start", "stop"]  # gone on with after step 2: its first step is traced


def test_a_profile_that_never_began_is_told(tmp_path, caplog):
    train(tmp_path, total_steps=3, profile_first_step=10, profile_steps=1)
    assert "no profile: the run ended before step 10 (loop.profile_first_step)" in caplog.text


def test_a_trace_is_written(tmp_path):
    with monitor.Profiler(str(tmp_path), 1, 1) as profiler:
        profiler.before(1)
        profiler.after(jnp.ones(3) + 1)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))

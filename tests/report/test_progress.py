"""Progress bar, rates, and the metric writer: what is on disk after a resume, a torn line, a full disk."""

import builtins
import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import sys
import termios

import numpy as np
import pytest
from PIL import Image

from rq_jax.report.curves import read_metrics
from rq_jax.report.progress import Progress
from rq_jax.training.log import MetricWriter, Rate


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events_of(directory):
    """TensorBoard events in the order a reader meets them: records of length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            events.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += length + 16
    return events


# Progress


def test_without_a_terminal_progress_is_plain_lines():
    stream = io.StringIO()
    with Progress(7, start=2, title="train", line_seconds=0.0, stream=stream) as progress:
        progress.update(3, loss=np.float32(0.25))
        progress.message("saved step 5")
        progress.update(2)
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    first, message, second, last = stream.getvalue().splitlines()
    assert first.startswith("train: 5/7 [") and "loss=0.25" in first and "step/s" in first
    assert message == "saved step 5"
    assert second.startswith("train: 7/7 [") and last.startswith("train: 7/7 [")


def test_lines_come_no_oftener_than_asked():
    stream = io.StringIO()
    with Progress(1000, unit="image", line_seconds=3600.0, stream=stream) as progress:
        for _ in range(1000):
            progress.update()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("1000/1000 [") and "image/s" in line


def test_what_passes_leaves_no_last_line():
    stream = io.StringIO()
    with Progress(1000, line_seconds=3600.0, stream=stream, leave=False) as progress:
        progress.update(1000)
    assert stream.getvalue() == ""


def test_time_left_follows_the_recent_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rq_jax.report.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(100, line_seconds=10.0, stream=stream)
    for seconds in (100.0, 110.0):  # ten steps in 100 s of compilation, then ten in 10 s
        now[0] = seconds
        progress.update(10)
    slow, recent = stream.getvalue().splitlines()
    assert "[01:40<15:00" in slow
    assert "[01:50<01:20,  1.00 step/s" in recent


def test_what_is_waited_for_is_shown_and_left_out_of_the_time_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rq_jax.report.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(100, title="train", line_seconds=10.0, stream=stream)
    with progress.waiting_for("compiling"):
        now[0] = 1000.0
    now[0] = 1010.0
    progress.update(10, loss=0.5)
    with progress.waiting_for("compiling"):
        now[0] = 2010.0
    now[0] = 2020.0
    progress.update(10)
    first, slow, again, last = stream.getvalue().splitlines()
    assert first.startswith("train: 0/100 [00:00<?") and first.endswith("compiling]")
    assert "[16:50<01:30,  1.00 step/s" in slow and slow.endswith("loss=0.5]")
    assert again.startswith("train: 10/100 [16:50<") and again.endswith("compiling]")
    assert "[33:40<01:20,  1.00 step/s" in last and last.endswith("loss=0.5]")


def test_a_bar_leaves_out_what_is_waited_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rq_jax.report.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("rq_jax.report.progress._has_width", lambda stream: True)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    progress = Progress(100, stream=io.StringIO())
    with progress.waiting_for("compiling"):
        assert progress._bar.postfix == "compiling"
        now[0] = 1000.0
    now[0] = 1010.0
    progress.update(10)
    assert progress._bar.format_dict["rate"] == pytest.approx(1.0) and not progress._bar.postfix


@pytest.mark.parametrize("columns", [80, 0])
def test_a_terminal_with_columns_shows_a_bar(columns):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w") as stream, Progress(5, title="encode", stream=stream) as progress:
        progress.update(5, psnr=21.5)
    shown = ""
    with os.fdopen(reader, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO is its end
        while chunk := terminal.read(4096):
            shown += chunk.decode()
    assert "encode" in shown and "5/5" in shown and "psnr=21.5" in shown
    assert ("100%|" in shown) == (columns > 0)


def test_progress_that_is_not_enabled_shows_nothing():
    stream = io.StringIO()
    with Progress(3, enabled=False, line_seconds=0.0, stream=stream) as progress:
        progress.update(3, loss=1.0)
        progress.message("unseen")
    assert stream.getvalue() == ""


# Rate


def test_rates_are_measured_between_log_points():
    now = [100.0]
    rate = Rate(images_per_step=6, step=10, clock=lambda: now[0])
    now[0] = 104.0
    assert rate.measure(18) == {"steps_per_second": 2.0, "images_per_second": 12.0}
    now[0] = 150.0  # an evaluation
    rate.restart(18)
    now[0] = 151.0
    assert rate.measure(21) == {"steps_per_second": 3.0, "images_per_second": 18.0}
    now[0] = 152.0
    assert rate.measure(21) == {}


# MetricWriter


def test_scalars_are_json_lines_and_events(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(3, {"loss": np.float32(0.5), "lr": 1e-4})
    assert lines_of(tmp_path) == [{"step": 3, "loss": 0.5, "lr": 1e-4}]  # on disk before any flush
    writer.write_scalars(7, {"loss": float("nan"), "up": np.inf, "down": np.array([-np.inf])})
    writer.close()
    assert lines_of(tmp_path)[1] == {"step": 7, "loss": "nan", "up": "inf", "down": "-inf"}
    scalars = [(e.step, v.tag, v.simple_value) for e in events_of(tmp_path) for v in e.summary.value]
    assert scalars[:2] == [(3, "loss", 0.5), (3, "lr", pytest.approx(1e-4))]
    assert [tag for _, tag, _ in scalars[2:]] == ["loss", "up", "down"] and np.isnan(scalars[2][2])


def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path, caplog):
    precious = tmp_path / "precious"
    precious.write_text("untouched")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(precious)
    writer = MetricWriter(tmp_path / "run")
    writer.truncate_after(3)
    writer.write_scalars(4, {"loss": 0.5})
    writer.close()
    assert precious.read_text() == "untouched"
    (message,) = caplog.messages
    assert message.startswith("Cannot write metrics to ") and message.endswith(". The run goes on.")


@pytest.mark.parametrize("line", ['{"step": "a"}', "[1]", "[" * 100_000, '{"step": null}', "{"])
def test_lines_of_no_step_are_dropped_before_a_run_goes_on(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n{"step": 3}\n{"step": 3')
    MetricWriter(tmp_path).truncate_after(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_flush_puts_events_on_disk(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(3, {"loss": 0.5})
    writer.flush()
    assert [e.step for e in events_of(tmp_path) if e.summary.value] == [3]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_png_files_and_events(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    writer = MetricWriter(tmp_path)
    writer.write_images(12, {"eval/depth 2": picture})
    writer.close()
    (path,) = (tmp_path / "pictures").iterdir()  # nothing half written beside it
    assert path.name == "eval_depth_2_00000012.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(picture.shape), picture)
    ((step, value),) = [(e.step, v) for e in events_of(tmp_path) for v in e.summary.value]
    assert (step, value.tag) == (12, "eval/depth 2")
    assert (value.image.height, value.image.width, value.image.colorspace) == (5, 7, channels)
    assert value.image.encoded_image_string == path.read_bytes()


def test_a_resumed_log_has_every_step_once(tmp_path):
    killed = MetricWriter(tmp_path)
    for step in (10, 20, 30):
        killed.write_scalars(step, {"loss": float(step)})
    killed.flush()
    resumed = MetricWriter(tmp_path)
    resumed.truncate_after(20)
    for step in (30, 40):
        resumed.write_scalars(step, {"loss": -float(step)})
    resumed.close()
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert logged == {"loss": ([10, 20, 30, 40], [10.0, 20.0, -30.0, -40.0])}

    shown = {}  # as TensorBoard reads: a session that starts at a step hides all from there on
    for event in events_of(tmp_path):
        if event.HasField("session_log"):
            assert event.session_log.status == event.session_log.START
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            shown[event.step] = value.simple_value
    assert shown == {10: 10.0, 20: 20.0, 30: -30.0, 40: -40.0}


def test_events_written_after_close_hide_none_of_the_earlier(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.truncate_after(4)
    writer.write_scalars(5, {"loss": 1.0})
    writer.close()
    writer.write_scalars(6, {"loss": 2.0})
    writer.close()
    assert [e.step for e in events_of(tmp_path) if e.HasField("session_log")] == [5]


def test_lines_of_the_step_itself_go_by_name(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 1.0})
        writer.write_scalars(step, {"validation_loss": 2.0})
    writer.truncate_after(2, without="validation_loss")
    names = [(line.pop("step"), *line) for line in lines_of(tmp_path)]
    assert names == [(1, "loss"), (1, "validation_loss"), (2, "loss")]


def test_truncating_a_run_without_a_log_is_fine(tmp_path):
    MetricWriter(tmp_path / "new").truncate_after(0)
    assert not (tmp_path / "new").exists()


def test_a_line_half_written_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricWriter(tmp_path).write_scalars(2, {"loss": 3.0})
    assert lines_of(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]

    path.write_text('{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 2, "lo')
    MetricWriter(tmp_path).truncate_after(5)
    assert lines_of(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_truncating_needs_no_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 10)))
    monkeypatch.setattr("rq_jax.training.log.write_atomic", full)
    MetricWriter(tmp_path).truncate_after(5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_only_the_first_process_writes(tmp_path):
    writer = MetricWriter(tmp_path / "run", enabled=False)
    writer.truncate_after(3)
    writer.write_scalars(4, {"loss": 1.0})
    writer.write_images(4, {"picture": np.zeros((2, 3, 3), np.uint8)})
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the directory should be")
    writer = MetricWriter(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        writer.truncate_after(3)
        for step in (4, 5):
            writer.write_scalars(step, {"loss": 1.0})
            writer.write_images(step, {"picture": np.zeros((2, 3, 3), np.uint8)})
            writer.flush()
        writer.close()
    (record,) = caplog.records
    directory = re.escape(str(tmp_path / "run"))
    assert re.fullmatch(rf"Cannot write metrics to {directory}: .+\. The run goes on\.", record.message)


class FullDisk(io.FileIO):
    """A file that takes half of what it is given, and then says that the disk is full."""

    def write(self, data):
        super().write(bytes(data)[: len(data) // 2])
        raise OSError(28, "No space left on device")


def test_a_full_disk_tears_no_later_line(tmp_path, monkeypatch, caplog):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    with monkeypatch.context() as full, caplog.at_level(logging.WARNING):
        full.setattr(builtins, "open", lambda path, mode, **_: io.BufferedRandom(FullDisk(path, "ab+")))
        writer.write_scalars(2, {"loss": 2.0})
        assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1  # the second line is torn
        writer.write_scalars(3, {"loss": 3.0})
    writer.write_scalars(4, {"loss": 4.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == {"loss": ([1, 4], [1.0, 4.0])}
    assert len(caplog.records) == 1


def test_without_tensorboardx_there_are_only_json_lines_and_images(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"picture": np.zeros((2, 3, 3), np.uint8)})
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "pictures"]


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"loss": np.zeros(2)}, r"metric 'loss': array\(\[0., 0.\]\) is not one number; give a scalar"),
        ({"loss": "low"}, "metric 'loss': 'low' is not one number; give a scalar"),
        ({"step": 1.0}, "metric 'step': the name is reserved for the step of a line; choose another"),
    ],
)
def test_what_is_no_scalar_is_refused_before_anything_is_written(tmp_path, scalars, message):
    with pytest.raises(ValueError, match=message):
        MetricWriter(tmp_path).write_scalars(1, scalars)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"image: float32 \(2, 3, 3\) is not allowed; give uint8 \(H, W, 1 or 3\)"):
        MetricWriter(tmp_path).write_images(1, {"picture": np.zeros((2, 3, 3), np.float32)})

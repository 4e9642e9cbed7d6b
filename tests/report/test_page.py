"""The report: what it shows, what it escapes, its size and time, and that a browser opens it without an error."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rq_jax.report import chart, page
from rq_jax.report.__main__ import main
from rq_jax.training.log import MetricWriter


@pytest.fixture
def workdir(tmp_path):
    """A run of two evaluations whose names and captions hold what HTML would read as its own."""
    directory = tmp_path / "a<b>&run"
    writer = MetricWriter(directory)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 3.0 / step, "code_usage/depth1": 0.5, "odd<script>": float("nan")})
    for step in (2, 3):
        writer.write_scalars(step, {"validation_loss": 2.0, "unigram_nats/depth1": 5.0, "validation_nats/depth1": 4.0})
        writer.write_images(step, {"samples": np.full((4, 4, 3), step, np.uint8)})
    config = {"seed": 7, "model": {"name": "rqvae"}, "data": {"name": "<b>"}, "loop": {"total_steps": 9}}
    (directory / "config.json").write_text(json.dumps(config))
    writer.write_page()
    return directory


def test_a_writer_leaves_a_page_that_needs_nothing_else(workdir):
    text = (workdir / "index.html").read_text()
    assert "step 3 of 9" in text and "samples, step 3" in text and "samples, step 2" not in text
    assert text.count("data:image/png;base64,") == 1
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|href=|src=\"(?!data:)", text)
    for heading in ("Losses", "Likelihood", "Codes", "Last values", "Config and protocol"):
        assert f"<h2>{heading}</h2>" in text


def test_names_are_escaped(workdir):
    text = (workdir / "index.html").read_text()
    assert "a&lt;b&gt;&amp;run" in text and "odd&lt;script&gt;" in text and "&#x27;&lt;b&gt;&#x27;" in text
    assert "<script" not in text and "<b>" not in text


def test_held_out_figures_share_panel_and_color_with_their_namesakes(workdir):
    panels = page.panels([page.read_run(workdir)])
    loss, nats = panels["Losses"]["loss"], panels["Likelihood"]["nats"]
    assert [(line.label, line.group, line.dash) for line in loss] == [
        ("loss", "loss", 0),
        ("validation_loss", "loss", 1),
    ]
    assert {line.group for line in nats} == {"nats/depth1"} and {line.dash for line in nats} == {1, 2}


def test_runs_beside_one_another(workdir, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    (other / "config.json").write_text((other / "config.json").read_text().replace("7", "8"))
    main([str(workdir), str(other), f"--out={tmp_path / 'both.html'}"])
    assert capsys.readouterr().out == f"report: {tmp_path / 'both.html'}\n"
    text = (tmp_path / "both.html").read_text()
    assert "other: loss" in text and "<td>seed</td><td>7</td><td>8</td>" in text and "<td>model.name</td>" not in text
    assert text.count("data:image/png;base64,") == 2


@pytest.mark.parametrize(
    "options, words",
    [
        (["nowhere"], "'.*nowhere' is no run directory: it has no metrics.jsonl and no config.json"),
        (["a", "b"], "--out: missing; name the page of the 2 runs"),
    ],
)
def test_refused(options, words, capsys):
    with pytest.raises(SystemExit):
        main(options)
    assert re.search(words, capsys.readouterr().err.splitlines()[-1])


def test_a_log_of_a_hundred_thousand_lines_makes_a_small_page_soon(tmp_path):
    lines = (json.dumps({"step": i, "loss": np.sin(i / 5000) + i % 7, "psnr": "nan"}) for i in range(100_000))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page.write_page([tmp_path], tmp_path / "index.html")
    assert (tmp_path / "index.html").stat().st_size < 50_000
    points = chart.thin(range(100_000), list(map(float, range(100_000))))
    assert len(points[0]) <= chart.MAX_POINTS and points[1][0] == 0 and points[1][-1] == 99_999


def test_images_beyond_ten_megabytes_are_named_and_left_out(workdir, monkeypatch):
    monkeypatch.setattr(page, "MAX_BYTES", 3_000)
    text = page.render([page.read_run(workdir)])
    assert "samples, step 3: left out" in text and "data:image" not in text


def test_a_chart_is_well_formed_and_clips_the_first_steps():
    values = [1000.0, *np.linspace(2, 1, 199), float("inf")]
    svg = chart.chart('a "<&', [chart.Line("one & two", range(201), values)])
    element = ElementTree.fromstring(f"<div>{svg}</div>")
    ticks = [float(text.text) for text in element.iter("text") if text.get("text-anchor") == "end"]
    assert ticks[0] <= 1 and 2 <= ticks[-1] < 3
    assert element.find("svg").get("aria-label") == 'a "<&'


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.0131), (-5, 12345), (3, 3), (0, 0)])
def test_ticks_are_round_and_enclose(low, high):
    ticks = chart.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0]) and round(steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)) in (1, 2, 5)


def test_a_log_that_cannot_be_read_ends_no_run(workdir, caplog):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write("no json\n")
    MetricWriter(workdir).write_page()
    assert "is no line of a log" in caplog.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_opens_it(workdir, tmp_path):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'user'}"
    done = subprocess.run(
        ["chromium", *flags.split(), "--dump-dom", (workdir / "index.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<img") == 1 and "a&lt;b&gt;&amp;run" in done.stdout

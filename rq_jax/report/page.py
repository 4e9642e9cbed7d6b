"""Report of a run, or of several beside one another: one HTML file without a script, which needs nothing else.

python -m rq_jax.report runs/rqvae                        # writes runs/rqvae/index.html again
python -m rq_jax.report runs/a runs/b --out=compare.html
"""

import base64
import contextlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rq_jax.files import read_json, write_atomic
from rq_jax.report import chart
from rq_jax.report.curves import read_metrics

PAGE = "index.html"  # in a run directory
METRICS, PICTURES = "metrics.jsonl", "pictures"
MAX_BYTES = 10_000_000  # of a page
_NEWEST = re.compile(r"(.+)_(\d{8})\.png")  # as training.log names images

# Heading -> which metrics belong there, by the first pattern that fits.
SECTIONS = {
    "Losses": re.compile(r"loss"),
    "Likelihood": re.compile(r"nats|bits_per_image"),
    "Reconstruction": re.compile(r"psnr|ssim|distance"),
    "Codes": re.compile(r"^code|grain_share|codes_per_image|spread"),
    "Speed and memory": re.compile(r"per_second|_gib|data_wait|utilization"),
    "Optimizer and other": re.compile(""),
}
# Metrics that share panel and color with their namesake without it, by the dashes of their lines.
_DASHES = {"": 0, "validation_": 1, "unigram_": 2}

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--soft:#666;--edge:#ddd}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161616;--soft:#9a9a9a;--edge:#333}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:1360px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--edge)}
h3{font-size:.95rem;margin:0 0 .2rem;font-weight:600}p,figcaption{color:var(--soft);margin:.2rem 0}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1.2rem}
svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--edge);fill:none}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}
.legend{font-size:12px;color:var(--soft);display:flex;flex-wrap:wrap;gap:.1rem .8rem}
.legend svg{width:22px;height:4px;margin-right:.35rem;vertical-align:middle}
figure{margin:0 0 1.2rem}figure img{max-width:100%;image-rendering:pixelated;border:1px solid var(--edge)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{text-align:right;padding:.15rem .6rem;border-bottom:1px solid var(--edge)}
td:first-child,th:first-child{text-align:left}
pre{overflow-x:auto;font-size:12px;border:1px solid var(--edge);padding:.6rem}
"""


class Run(NamedTuple):
    """What a page shows of a run directory.

    Attributes:
      name: of the directory.
      metrics: see `curves.read_metrics`.
      images: name -> the newest file of that name; the step stands in it.
      config: as the run resolved it; empty where there is none.
      records: file name -> content of what else the run notes as JSON.
    """

    name: str
    metrics: Mapping[str, tuple[list[int], list[float]]]
    images: Mapping[str, Path]
    config: Mapping[str, Any]
    records: Mapping[str, Any]


def read_run(directory: str | os.PathLike) -> Run:
    """Read a run directory; what is not there yet, or damaged, is left out.

    Raises:
      FileNotFoundError: the directory has neither a log nor a config.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in (METRICS, "config.json")):
        raise FileNotFoundError(f"'{directory}' is no run directory: it has no {METRICS} and no config.json")
    metrics: Mapping[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        metrics = read_metrics(directory / METRICS)
    images = {}
    for path in sorted((directory / PICTURES).glob("*.png")):
        if named := _NEWEST.fullmatch(path.name):
            images[named[1]] = path  # sorted by step, so that the last one stays
    records = {}
    for name in ("config.json", "data.json", "codes.json", "thresholds.json", "evaluation.json"):
        with contextlib.suppress(OSError, ValueError):
            records[name] = read_json(directory / name)
    return Run(directory.resolve().name, metrics, images, records.pop("config.json", {}), records)


def write_page(directories: Sequence[str | os.PathLike], out: str | os.PathLike) -> Path:
    """Write the report of run directories as one HTML file.

    Args:
      directories: one run, or several to set beside one another: their curves share panels.
      out: the file; replaced as a whole.

    Returns:
      The file.

    Raises:
      FileNotFoundError: a directory of no run.
      ValueError: a log that cannot be read.
    """
    write_atomic(out, render([read_run(directory) for directory in directories]).encode())
    return Path(out)


def render(runs: Sequence[Run]) -> str:
    """The page of `write_page` as text, of less than `MAX_BYTES`."""
    title = " beside ".join(run.name for run in runs)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    head += f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
    parts = [head, *(f"<p>{html.escape(_summary(run))}</p>" for run in runs), *_curves(runs), _last_values(runs)]
    parts.append(_configs(runs))
    room = MAX_BYTES - sum(len(part.encode()) for part in parts)
    # Images stand first, and take the room that the rest leaves.
    return "\n".join([parts[0], *parts[1 : 1 + len(runs)], _images(runs, room), *parts[1 + len(runs) :]])


def _summary(run: Run) -> str:
    model, last = run.config.get("model", {}), max((steps[-1] for steps, _ in run.metrics.values()), default=0)
    total = run.config.get("loop", {}).get("total_steps")
    words = [f"{run.name}: {model.get('name', 'a run')}, step {last}" + (f" of {total}" if total else "")]
    data = run.config.get("data", {}).get("name")
    return ", ".join([*words, *([f"data '{data}'"] if data else []), f"seed {run.config.get('seed', '?')}"])


def _images(runs: Sequence[Run], room: int) -> str:
    """The newest image of each name as a data URL, until there is no more room."""
    figures = []
    for run in runs:
        for name, path in run.images.items():
            step = int(_NEWEST.fullmatch(path.name)[2])  # type: ignore[index]  # `read_run` chose it so
            caption = html.escape(f"{run.name}: {name}, step {step}" if len(runs) > 1 else f"{name}, step {step}")
            data = base64.b64encode(path.read_bytes()).decode()
            if len(data) + 1000 > room:
                figures.append(f"<p>{caption}: left out, the page would pass {MAX_BYTES // 10**6} MB</p>")
                continue
            room -= len(data) + 1000
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            figures.append(f'<figure><figcaption>{caption}</figcaption><div class="scroll">{image}</div></figure>')
    return "<h2>Images</h2>" + "".join(figures) if figures else ""


def panels(runs: Sequence[Run]) -> dict[str, dict[str, list[chart.Line]]]:
    """Heading -> title of a panel -> its lines; a metric and its held-out namesake share a panel."""
    found: dict[str, dict[str, list[chart.Line]]] = {heading: {} for heading in SECTIONS}
    for run in runs:
        for name, (steps, values) in run.metrics.items():
            heading = next(heading for heading, pattern in SECTIONS.items() if pattern.search(name))
            prefix = next((prefix for prefix in _DASHES if prefix and name.startswith(prefix)), "")
            label, bare = (f"{run.name}: {x}" if len(runs) > 1 else x for x in (name, name.removeprefix(prefix)))
            line = chart.Line(label, steps, values, bare, _DASHES[prefix])
            found[heading].setdefault(name.removeprefix(prefix).split("/")[0], []).append(line)
    return {heading: of_heading for heading, of_heading in found.items() if of_heading}


def _curves(runs: Sequence[Run]) -> list[str]:
    parts = []
    for heading, of_heading in panels(runs).items():
        charts = (f"<div><h3>{html.escape(title)}</h3>{chart.chart(title, x)}</div>" for title, x in of_heading.items())
        parts.append(f'<h2>{heading}</h2><div class="grid-of">{"".join(charts)}</div>')
    return parts


def _last_values(runs: Sequence[Run]) -> str:
    """A table of the last value of each metric, a column for each run."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    if not names:
        return "<p>Nothing is logged yet.</p>"
    header = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = [
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{run.metrics[name][1][-1]:.5g}</td>" if name in run.metrics else "<td></td>" for run in runs)
        for name in names
    ]
    return f"<h2>Last values</h2><div class=scroll><table><tr><th></th>{header}</tr>{''.join(rows)}</table></div>"


def _configs(runs: Sequence[Run]) -> str:
    """Config and records of each run, folded; of several runs first the settings in which they differ."""
    parts = ["<h2>Config and protocol</h2>"]
    if len(runs) > 1:
        flat = [_flatten(run.config) for run in runs]
        names = sorted(set().union(*flat))
        rows = [
            f"<tr><td>{html.escape(name)}</td>"
            + "".join(f"<td>{html.escape(json.dumps(one.get(name)))}</td>" for one in flat)
            for name in names
            if len({json.dumps(one.get(name)) for one in flat}) > 1
        ]
        header = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
        parts.append(f"<div class=scroll><table><tr><th>setting</th>{header}</tr>{''.join(rows)}</table></div>")
    for run in runs:
        for name, record in {"config.json": run.config, **run.records}.items():
            text = json.dumps(record, indent=1)
            text = text if len(text) < 100_000 else f"{text[:100_000]}\n... the rest is in {name}"
            label = f"{run.name}/{name}"
            parts.append(f"<details><summary>{html.escape(label)}</summary><pre>{html.escape(text)}</pre></details>")
    return "".join(parts)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

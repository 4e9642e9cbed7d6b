"""Timing of programs, and records of it: tables, comparisons, plots. It knows no model.

A record is the JSON of a benchmark: {"benchmark", "arguments", "environment", "device", "results", ...}. Each result
has a "config", which names what was measured, and the figures. Times are in seconds, sizes in bytes.
"""

import io
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import roofline
from rq_jax.devices.memory import peak_memory
from rq_jax.devices.peaks import Peaks, device_peaks
from rq_jax.files import write_atomic
from rq_jax.models.flops import Work
from rq_jax.report import tables

clock = time.perf_counter
HOST_CORES = 16  # of a host, for which rates that take CPU time alone are told
# For measured peaks: side of the matrices, and length of the array (256 MB: more than a cache holds).
_MATRIX_SIDE, _ARRAY_LENGTH = 2048, 2**26


class Compiled(NamedTuple):
    """A compiled program, the seconds to trace, lower and compile it, and the bytes that it needs by use."""

    call: Callable[..., Any]
    seconds: float
    memory: dict[str, int]


class Program(NamedTuple):
    """Something to measure.

    Attributes:
      call: does the work once; returns arrays to wait for.
      count: items of a call, such as images.
      compile_seconds, memory: see `Compiled`.
      stages: work of a call, part by part; empty where no roofline applies.
      model_flops: operations of the model alone, where `stages` count more.
      num_devices: devices that share the work.
      details: median seconds of a call -> further entries of the result.
      close: releases what the calls hold open.
    """

    call: Callable[[], Any]
    count: int
    compile_seconds: float = 0.0
    memory: Mapping[str, int] = MappingProxyType({})
    stages: Mapping[str, Work] = MappingProxyType({})
    model_flops: float | None = None
    num_devices: int = 1
    details: Callable[[float], dict[str, Any]] = lambda seconds: {}
    close: Callable[[], None] = lambda: None


def compile_program(function: Callable[..., Any], *args: Any, **options: Any) -> Compiled:
    """Compile a function for its arguments (or their shapes) ahead of time; options are those of `jax.jit`."""
    start = clock()
    compiled = jax.jit(function, **options).lower(*args).compile()
    seconds, analysis = clock() - start, compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    sizes = {name: getattr(analysis, f"{use}_size_in_bytes", None) for name, use in names.items()}
    return Compiled(compiled, seconds, {name: size for name, size in sizes.items() if size is not None})


def measure(
    programs: Sequence[Program], runs: int, warmups: int = 1, on_run: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Time programs in turn, forwards and backwards, so that a slow spell of the machine meets all of them.

    Args:
      programs: to compare.
      runs: timed calls of each.
      warmups: untimed calls before them.
      on_run: called after every call.

    Returns:
      Seconds of the runs of each program; runs i of all programs are neighbours in time.
    """
    seconds: list[list[float]] = [[] for _ in programs]
    for i in range(warmups + runs):
        order = list(enumerate(programs))
        for index, program in order[:: 1 if i % 2 == 0 else -1]:
            start = clock()
            jax.block_until_ready(program.call())
            if i >= warmups:
                seconds[index].append(clock() - start)
            on_run()
    return seconds


def result(config: dict[str, Any], program: Program, seconds: list[float], peaks: Peaks) -> dict[str, Any]:
    """Entry of a record for one measurement; its roofline is that of all devices that share the work."""
    median = statistics.median(seconds)
    entry = {
        "config": config,
        "compile_seconds": program.compile_seconds,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds), "runs": seconds},
        "count": program.count,
        "per_second": program.count / median,
        "memory": {**program.memory, **peak_memory()},
    }
    if program.stages:
        peaks, works = peaks.times(program.num_devices), program.stages.values()
        least = roofline.roofline(program.stages, peaks)
        flops = sum(work.flops for work in works)
        entry |= {
            "flops": flops,
            "bytes": sum(work.bytes for work in works),
            "flops_per_second": flops / median,
            "flops_utilization": least.compute_seconds / median,
            "roofline": {"seconds": least.seconds, "bound": least.bound, "fraction": least.seconds / median},
        }
        if program.model_flops is not None:
            share = program.model_flops / flops
            entry |= {"model_flops": program.model_flops, "model_flops_utilization": share * entry["flops_utilization"]}
    return entry | program.details(median)


# --- devices ---


def device_and_peaks() -> tuple[dict[str, Any], Peaks]:
    """The devices as a record names them, and the peaks of one: from the table, else measured now."""
    device = jax.devices()[0]
    peaks = device_peaks(device.device_kind) or measured_peaks(device.device_kind)
    named = {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()}
    return {**named, "peaks": {**peaks._asdict(), "flops": dict(peaks.flops)}}, peaks


def measured_peaks(name: str, side: int = _MATRIX_SIDE, length: int = _ARRAY_LENGTH) -> Peaks:
    """Peaks of one device: the fastest of ten products of square matrices, and of ten passes over a long array."""

    def fastest(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        # In place: allocating every result would dominate the time.
        compiled = compile_program(function, x, donate_argnums=0)

        def call() -> jax.Array:
            nonlocal x
            x = compiled.call(x)
            return x

        return min(measure([Program(call, 1)], runs=10)[0])

    flops = {}
    for dtype in ("float32", "bfloat16"):
        seconds = fastest(lambda x: jnp.dot(x, x), jnp.zeros((side, side), dtype))
        flops[dtype] = 2.0 * side**3 / seconds
    seconds = fastest(lambda x: x + 1, jnp.zeros(length, jnp.float32))
    return Peaks(name, flops, 2.0 * 4 * length / seconds, "measured")  # read and written


# --- tables, comparisons, plots ---

Config = Mapping[str, Any]


def table(configs: Sequence[Config], figures: Sequence[Mapping[str, str]]) -> str:
    """Text: the settings that all configs share, then a row for each with those that differ and its figures."""
    varied = varied_keys(configs)
    common = [f"{key}={show(value)}" for key, value in configs[0].items() if key not in varied and value is not None]
    columns = list(dict.fromkeys(name for row in figures for name in row if row[name]))
    rows = [[*varied, *columns]]
    for config, row in zip(configs, figures, strict=True):
        rows.append([show(config.get(key)) for key in varied] + [row.get(name, "") for name in columns])
    return "\n".join([" ".join(common), tables.aligned(rows)])


def varied_keys(configs: Sequence[Config]) -> list[str]:
    """Keys whose values differ between configs, in order."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def show(value: Any) -> str:
    """A setting as the command line takes it."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def figures(entry: Mapping[str, Any], unit: str) -> dict[str, str]:
    """Cells of a result in a table, by heading."""
    if "error" in entry:
        return {"error": entry["error"]}
    ms = {name: f"{1e3 * entry['seconds'][name] / entry['count']:.4g}" for name in ("median", "min", "max")}
    shown = {f"{unit}s/s": f"{entry['per_second']:.4g}", f"ms/{unit}": ms["median"]}
    shown |= {"min..max": f"{ms['min']}..{ms['max']}", "compile s": f"{entry['compile_seconds']:.1f}"}
    shown |= {f"{name} ms": f"{value:.4g}" for name, value in entry.get("ms_per_image", {}).items() if name != "total"}
    if "per_second_of_core" in entry:
        shown[f"{unit}s/s of a core"] = f"{entry['per_second_of_core']:.4g}"
        shown[f"of {HOST_CORES} cores"] = f"{entry['per_second_of_host']:.4g}"
    if "temporaries" in entry["memory"]:
        shown["temp MB"] = f"{entry['memory']['temporaries'] / 1e6:.1f}"
    if least := entry.get("roofline"):
        shown["roofline ms"] = f"{1e3 * least['seconds'] / entry['count']:.4g}"
        shown["reached"] = f"{100 * least['fraction']:.0f} % of {least['bound']}"
        shown["MFU"] = f"{100 * entry['model_flops_utilization']:.0f} %" if "model_flops" in entry else ""
        shown["FLOP/s"] = f"{entry['flops_per_second']:.3g} ({100 * entry['flops_utilization']:.0f} %)"
    return shown


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """Read an earlier record.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no record.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--compare: '{path}' is no file; give the JSON of an earlier run")
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        readable = isinstance(record["benchmark"], str) and isinstance(record["device"]["kind"], str)
        readable = readable and all("config" in entry for entry in record["results"])
    except (ValueError, KeyError, TypeError):
        readable = False
    if not readable:
        raise ValueError(f"--compare: '{path}' is no benchmark result; give the JSON that --out wrote")
    return record


def check_comparable(benchmark: str, configs: Sequence[Config], old: Mapping[str, Any], path: Any) -> None:
    """Check that an earlier record measured any of these configs.

    Raises:
      ValueError: naming the file.
    """
    if benchmark != old["benchmark"]:
        raise ValueError(f"--compare: '{path}' holds results of '{old['benchmark']}', not of '{benchmark}'")
    if not {_key(config) for config in configs} & {_key(entry["config"]) for entry in old["results"]}:
        raise ValueError(f"--compare: '{path}' has none of the {len(configs)} configurations; give the same arguments")


def compare(results: Sequence[Mapping[str, Any]], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ratios new / old of the rate and of temporary memory, for every config in both."""
    before, ratios = {_key(entry["config"]): entry for entry in old["results"] if "error" not in entry}, []
    for entry in results:
        other = before.get(_key(entry["config"]))
        if other is None or "error" in entry:
            continue
        sizes = [each.get("memory", {}).get("temporaries") for each in (entry, other)]
        ratio = {"config": entry["config"], "per_second": entry["per_second"] / other["per_second"]}
        ratios.append(ratio | ({"temporaries": sizes[0] / sizes[1]} if all(sizes) else {}))
    return ratios


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


def plot_rates(results: Sequence[Mapping[str, Any]], unit: str, path: str | os.PathLike) -> None:
    """Plot rate against batch as PNG, with spread and (dashed) roofline; failed entries are left out."""
    from matplotlib.figure import Figure

    curves: dict[str, list[Mapping[str, Any]]] = {}
    varied = [key for key in varied_keys([entry["config"] for entry in results]) if key not in ("batch", "batches")]
    for entry in (entry for entry in results if "error" not in entry):
        label = " ".join(show(entry["config"].get(key)) for key in varied)
        curves.setdefault(label, []).append(entry)
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for label, entries in curves.items():
        entries = sorted(entries, key=lambda entry: entry["config"]["batch"])
        batches = [entry["config"]["batch"] for entry in entries]
        rates = np.array([[e["count"] / e["seconds"][name] for e in entries] for name in ("median", "max", "min")])
        spread = np.maximum(0, [rates[0] - rates[1], rates[2] - rates[0]])
        line = axes.errorbar(batches, rates[0], spread, marker="o", capsize=3, label=label or None)[0]
        if all("roofline" in entry for entry in entries):
            least = [entry["count"] / entry["roofline"]["seconds"] for entry in entries]
            axes.plot(batches, least, "--", color=line.get_color(), alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel=f"{unit}s a second (dashed: roofline)")
    axes.set_xticks(measured := sorted({entry["config"]["batch"] for entry in results}), measured)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if varied and curves:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(path, buffer.getvalue())

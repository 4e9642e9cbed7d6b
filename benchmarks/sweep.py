"""Measure the configurations of a sweep, print tables, write the record."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import timing
from rq_jax.devices.peaks import Peaks
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_json
from rq_jax.report.progress import Progress

ROOT = Path(__file__).parents[1]
# Arguments that change no figure.
FILE_ARGUMENTS = ("out", "compare", "plot", "save")

Config = dict[str, Any]


class Benchmark(NamedTuple):
    """A command of benchmark.py.

    Attributes:
      groups: command line -> configurations of the sweep; those of a group are measured in turn and compared.
      build: (configuration, command line) -> its program.
      unit: what is counted.
    """

    groups: Callable[[argparse.Namespace], list[list[Config]]]
    build: Callable[[Config, argparse.Namespace], timing.Program]
    unit: str


def run(benchmark: Benchmark, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a sweep, print its tables and its record as JSON, write the files that were asked for.

    Args:
      benchmark: what is measured.
      args: command line of benchmark.py.

    Returns:
      The record.

    Raises:
      ValueError, FileNotFoundError: bad arguments, before anything compiles.
    """
    groups, unit = benchmark.groups(args), benchmark.unit
    configs = [config for group in groups for config in group]
    old = timing.read_record(args.compare) if args.compare else None
    if old is not None:
        timing.check_comparable(args.command, configs, old, args.compare)
    (device, peaks), results, comparisons = timing.device_and_peaks(), [], []
    with Progress(len(configs) * (1 + args.warmups + args.runs), unit="run", title=args.command) as progress:
        for group in groups:
            entries = measure_group(benchmark, group, args, peaks, progress)
            results += entries
            if all("roofline" in entry for entry in entries):
                comparisons += [side_by_side(entries[0], other) for other in entries[1:]]
    arguments = {name: value for name, value in vars(args).items() if value is not None and name not in FILE_ARGUMENTS}
    record = {"benchmark": args.command, "arguments": arguments, "environment": environment(ROOT),
              "device": device, "unit": unit, "results": results, "comparisons": comparisons}  # fmt: skip
    print(timing.table(configs, [timing.figures(entry, unit) for entry in results]))
    if comparisons:
        print(comparison_table(comparisons))
    if old is not None:
        record["compared"] = report_changes(results, old, args.compare, device["kind"])
    write_files(record, args)
    print(json.dumps(record))
    return record


def measure_group(
    benchmark: Benchmark, group: list[Config], args: argparse.Namespace, peaks: Peaks, progress: Progress
) -> list[dict[str, Any]]:
    """Results of configurations measured in turn; where one does not fit into memory, its group alone fails."""
    programs: list[timing.Program] = []
    try:
        for config in group:
            programs.append(benchmark.build(config, args))
            progress.update()
        seconds = timing.measure(programs, args.runs, args.warmups, progress.update)
        return [timing.result(*each, peaks) for each in zip(group, programs, seconds, strict=True)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [{"config": config, "error": "out of memory"} for config in group]
    finally:
        for program in programs:
            program.close()


def side_by_side(this: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many times as fast an item is as in another configuration, run by run, beside the ratio of the rooflines."""
    share = this["count"] / other["count"]
    pairs = zip(this["seconds"]["runs"], other["seconds"]["runs"], strict=True)
    ratios = [share * other_seconds / seconds for seconds, other_seconds in pairs]
    return {
        "config": this["config"],
        "against": other["config"],
        "ratio": {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)},
        "predicted": share * other["roofline"]["seconds"] / this["roofline"]["seconds"],
    }


def comparison_table(comparisons: list[dict[str, Any]]) -> str:
    """Table of the measured ratios beside the predicted ones."""
    rows = []
    for entry in comparisons:
        differing = timing.varied_keys([entry["config"], entry["against"]])
        rows.append({
            "times as fast as": " ".join(timing.show(entry["against"].get(key)) for key in differing),
            "measured": f"{entry['ratio']['median']:.2f}",
            "min..max": f"{entry['ratio']['min']:.2f}..{entry['ratio']['max']:.2f}",
            "predicted": f"{entry['predicted']:.2f}",
        })  # fmt: skip
    return timing.table([entry["config"] for entry in comparisons], rows)


def report_changes(results: list[dict[str, Any]], old: dict[str, Any], path: str, kind: str) -> dict[str, Any]:
    """Print the ratios new / old of an earlier record; warn where it is of another kind of device."""
    if old["device"]["kind"] != kind:
        other = old["device"]["kind"]
        print(f"warning: --compare: '{path}' is from '{other}', this run from '{kind}'", file=sys.stderr)
    ratios = timing.compare(results, old)
    if ratios:
        rows = [{name: f"{value:.3f}" for name, value in ratio.items() if name != "config"} for ratio in ratios]
        print(f"new / old ({path}):")
        print(timing.table([ratio["config"] for ratio in ratios], rows))
    return {"file": str(path), "commit": old.get("environment", {}).get("commit"), "ratios": ratios}


def write_files(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the plot and the record where they were asked for."""
    if getattr(args, "plot", None):
        timing.plot_rates(record["results"], record["unit"], args.plot)
        print(f"plot: {args.plot}")
    if path := args.out or (default_path(record) if args.save else None):
        write_json(path, record)
        print(f"record: {path}")


def default_path(record: dict[str, Any]) -> Path:
    """benchmarks/results/<device>-<date>-<commit>.json of this checkout."""
    date = record["environment"]["date"][: len("2030-01-02T03:04:05")].replace(":", "")
    parts = record["device"]["kind"], date, record["environment"]["commit"] or "unknown"
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', '-'.join(parts)).lower()}.json"

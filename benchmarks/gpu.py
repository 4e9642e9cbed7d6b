"""What only a GPU can show, in parts of a few minutes, each of which ends in a record: `make gpu`.

Parts whose record for this commit and device exists are passed over: the same command goes on where it stopped.
--rehearse runs the same parts with toy sizes on any device.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree

from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_json
from rq_jax.settings import checks
from rq_jax.training import cli

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
NUM_TRACED, NUM_KERNELS = 10, 20  # steps of a trace, and kernels that its record names
_ASK = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep='|')"


class Part(NamedTuple):
    """A part of the measurement.

    Attributes:
      name: in the name of its record.
      minutes: that it may take.
      command: of Python; "{out}" stands for the file that it writes: JSON, or of pytest XML.
      environ: what its environment has besides.
    """

    name: str
    minutes: float
    command: tuple[str, ...]
    environ: Mapping[str, str] = MappingProxyType({})


class Device(NamedTuple):
    """Platform, number and kind of the devices that a part will see."""

    platform: str
    count: int
    kind: str


def parts(rehearse: bool = False) -> list[Part]:
    """All parts, the most telling first; a rehearsal has the same with toy sizes."""
    return [*_tests(rehearse), *_small(rehearse), *_steps(rehearse), *_figure_4(rehearse)]


def _tests(rehearse: bool) -> Iterator[Part]:
    pytest = ("-m", "pytest", "tests", "-q", "-n=0", "-p", "no:cacheprovider", "--junitxml={out}")
    if rehearse:  # a CPU in the GPU's place
        yield Part("tests", 6, (*pytest, "-m=slow", "-k=codes_are_exact or quantizer_has", "tests/devices/test_gpu.py"))
        return
    environ = {"RQ_JAX_TEST_GPU": "1"}
    yield Part("tests", 6, (*pytest, "-m=gpu", "-k=not resumed"), environ)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    yield Part("resumed", 3, (*pytest, "-m=gpu", "-k=resumed"), {**environ, "XLA_FLAGS": flags})


def _small(rehearse: bool) -> Iterator[Part]:
    sizes = ("--num_vectors=64", "--codebook_size=64") if rehearse else ("--num_vectors=8192,65536",)
    yield Part("search", 3, ("benchmark.py", "quantize", *sizes, "--runs=3", "--out={out}"))
    sizes = ("--tokenizer=demo", "--codebook_size=64", "--batch=2") if rehearse else (
        "--code_shape=8x8x4,16x16x1", "--batch=1,100,200,500",
    )  # fmt: skip
    yield Part("decoding", 4, ("benchmark.py", "decode", *sizes, "--runs=3", "--out={out}"))


def _steps(rehearse: bool) -> Iterator[Part]:
    """MFU of both stages; predicted beside measured memory and time, and a trace."""
    sizes = {
        "1": ["--preset=demo", "--quicktest"] if rehearse else ["--preset=imagenet256", "--batch=16"],
        "2": ["--preset=demo", "--quicktest"] if rehearse else ["--preset=imagenet256_1400m", "--batch=64"],
    }
    for stage, options in sizes.items():
        command = "benchmark.py", "train", f"--stage={stage}", *options, "--steps=2", "--runs=3", "--out={out}"
        yield Part(f"training-{stage}", 5, (*command, *(["--accumulation_steps=1"] if stage == "2" else [])))
    for stage, options in sizes.items():
        yield Part(f"step-{stage}", 5, ("-m", "benchmarks.gpu", f"--step={stage}", *options, "--out={out}"))


def _figure_4(rehearse: bool) -> Iterator[Part]:
    """The 1.4B transformer of the paper at equal layers on both grids, a batch and a choice of weights at a time."""
    model = ["--model=tiny", "--code_shape=2x2x2", "--against=4x4x1", "--codebook_size=32"] if rehearse else [
        "--model=huge", "--code_shape=8x8x4", "--against=16x16x1",
    ]  # fmt: skip
    filters = {"plain": [], "filtered": ["--top_k=16" if rehearse else "--top_k=2048", "--top_p=0.95"]}
    decoded = [] if rehearse else ["--decode"]  # the toy grid is none of a tokenizer
    kinds = {**filters, "decoded": [*filters["filtered"], *decoded]}
    batches = (2,) if rehearse else (100, 1, 200, 500)
    for kind, batch, weights in itertools.product(kinds, batches, ("bfloat16", "int8", "float32")):
        dtype = "float32" if weights == "float32" else "bfloat16"
        options = [*model, f"--batch={batch}", f"--weights={weights}", f"--dtype={dtype}", *kinds[kind], "--runs=3"]
        yield Part(f"sampling-{kind}-{batch}-{weights}", 6, ("benchmark.py", "sample", *options, "--out={out}"))


# --- running them ---


def run(device: Device, results: Path, minutes: float, todo: Sequence[Part], where: Mapping[str, Any]) -> list[str]:
    """Run parts that have no record yet, until they are done or the time is over; a line tells of each.

    Args:
      device: that they run on.
      results: directory of the records.
      minutes: for all of them.
      todo: the parts.
      where: `environment` of this checkout.

    Returns:
      Names of the parts that failed.
    """
    end, failed = time.monotonic() + 60 * minutes, []
    for number, part in enumerate(todo, start=1):
        head = f"[{number}/{len(todo)}] {part.name}"
        if found := find_record(results, device, where, part):
            print(f"{head}: is in {found.name}", flush=True)
            continue
        left = end - time.monotonic()
        if left < 1:
            print(f"{head}: not begun, the {minutes:g} minutes are over; the same command goes on here", flush=True)
            break
        print(f"{head}: at most {min(60 * part.minutes, left) / 60:.1f} minutes", flush=True)
        start = time.monotonic()
        result, error = run_part(part, min(60 * part.minutes, left))
        seconds = time.monotonic() - start
        if error:
            failed.append(part.name)
            print(f"{head}: FAILED after {seconds:.0f} s: {error}", flush=True)
            continue
        path = results / record_name(device, where, part)
        record = {"benchmark": "gpu", "part": part.name, "environment": where, "device": device._asdict()}
        write_json(path, {**record, "seconds": round(seconds, 1), "command": list(part.command), "result": result})
        print(f"{head}: {seconds:.0f} s, {path.name}", flush=True)
    return failed


def run_part(part: Part, seconds: float) -> tuple[Any, str]:
    """(what a part wrote, "") or (None, why it failed)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, *(piece.format(out=out) for piece in part.command)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **part.environ}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )
        try:
            shown, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, f"it took longer than {seconds:.0f} s"
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
        lines = [line for line in shown.splitlines() if line.strip()]
        if process.returncode or not out.is_file():
            return None, f"exit code {process.returncode}; {' | '.join(lines[-3:])}"
        text = out.read_text(encoding="utf-8")
        result = tests_of(text) if text.lstrip().startswith("<") else json.loads(text)
        return (None, "no test ran on the device") if result == [] else (result, "")


def tests_of(xml: str) -> list[dict[str, Any]]:
    """Name, seconds and outcome of every test that ran, of a report of pytest; none of those that were skipped."""
    found = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        if case.find("skipped") is None:
            bad = case.find("failure") is not None or case.find("error") is not None
            outcome = "failed" if bad else "passed"
            found.append({"test": case.get("name"), "seconds": float(case.get("time", 0)), "outcome": outcome})
    return found


def record_name(device: Device, where: Mapping[str, Any], part: Part, date: str | None = None) -> str:
    """gpu-<device>-<date>-<commit>-<part>.json; a checkout with changes says so behind the commit."""
    kind = re.sub(r"[^a-z0-9]+", "-", device.kind.lower()).strip("-")
    commit = f"{where['commit']}{'+changes' * bool(where['dirty'])}"
    return f"gpu-{kind}-x{device.count}-{date or where['date'][:10]}-{commit}-{part.name}.json"


def find_record(results: Path, device: Device, where: Mapping[str, Any], part: Part) -> Path | None:
    """The record of a part for this device and commit, of any date; none of a checkout with changes."""
    if where["dirty"]:
        return None
    return next(iter(sorted(results.glob(record_name(device, where, part, date="*")))), None)


def find_device() -> Device:
    """The devices that JAX sees, asked in a process of its own: this one would hold their memory."""
    shown = subprocess.run([sys.executable, "-c", _ASK], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    platform, count, kind = shown.strip().splitlines()[-1].split("|")
    return Device(platform, int(count), kind)


# --- a training step, predicted and measured ---


def measure_step(config: dict[str, Any]) -> dict[str, Any]:
    """What the compiler and the roofline say of a training step, what it takes, and where a trace has the time."""
    import jax

    from benchmarks import hlo, preflight, roofline, timing, train

    recipe, state, batch, compiled, *_ = train.prepare(config)
    memory, (_, peaks) = compiled.memory, timing.device_and_peaks()
    least = roofline.roofline(train.step_work(recipe, state, batch, 1), peaks.times(recipe.mesh.size)).seconds
    launched = hlo.kernels(compiled.call.as_text())[0]
    launches = launched * preflight.LAUNCH_SECONDS if jax.default_backend() == "gpu" else 0.0
    planned = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled.call(state, batch, recipe.frozen)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    step()
    seconds = [step() for _ in range(NUM_TRACED)]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(NUM_TRACED):
                step()
        kernels = longest_kernels(Path(folder))
    predicted = {"seconds": least + launches, "roofline": least, "launches": launches, "kernels": launched}
    return {
        "config": config,
        "predicted": {**predicted, "bytes": planned},
        "measured": {"seconds": statistics.median(seconds), "runs": seconds, **timing.peak_memory()},
        "kernels": kernels,
    }


def longest_kernels(folder: Path) -> list[dict[str, Any]]:
    """Events of a trace with the longest sums, of the devices where it has any, else of the host."""
    events = []
    for path in folder.rglob("*.trace.json.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events += json.load(file)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in names.items() if "/device:" in name}
    sums: dict[str, list[float]] = {}
    for event in events:
        if event.get("ph") == "X" and (not devices or event["pid"] in devices):
            entry = sums.setdefault(event["name"], [0, 0.0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + event.get("dur", 0.0)
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:NUM_KERNELS]
    return [{"name": name, "runs": int(runs), "milliseconds": total / 1e3} for name, (runs, total) in longest]


# --- the command ---


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from None


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = cli.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30, help="for all parts together (default: 30)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the records")
    parser.add_argument("--only", type=_pattern, help="regular expression of the parts to run")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--step", choices=("1", "2"), help=argparse.SUPPRESS)
    parser.add_argument("--preset", help=argparse.SUPPRESS)
    parser.add_argument("--quicktest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        config = {"stage": int(args.step), "preset": args.preset, "quicktest": args.quicktest, "batch": args.batch}
        write_json(args.out, measure_step(config))
        return
    with cli.one_line_errors():
        checks.within("--minutes", args.minutes, 0.1, 24 * 60)
        device, todo = find_device(), parts(args.rehearse)
        if device.platform != "gpu" and not args.rehearse:
            raise ValueError(
                f"device: JAX sees no GPU but {device.count} x {device.kind}; install `make setup DEVICE=cuda12`, or "
                "give --rehearse"
            )
        todo = [part for part in todo if args.only is None or args.only.search(part.name)]
        if not todo:
            raise ValueError(
                f"--only: '{args.only.pattern}' fits no part of {', '.join(part.name for part in parts())}"
            )
        if not args.results.is_dir():
            raise ValueError(f"--results: '{args.results}' is no directory; give one that is there")
        if failed := run(device, args.results, args.minutes, todo, environment(ROOT)):
            raise ValueError(f"parts: {', '.join(failed)} failed; the same command tries them again")


if __name__ == "__main__":
    main()

"""Measure speed: sampling, decoding, training, codebook search, reading data. The last line of stdout is JSON.

python benchmark.py sample --model=huge --batch=1,100,200 --against=16x16x1      (a list on any axis makes a sweep)
python benchmark.py train --stage=2 --preset=imagenet256_480m       (quantize, decode, data; --help tells the rest)
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import quantize, roofline, sample, timing, train
from rq_jax.devices.peaks import Peaks
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_atomic
from rq_jax.report.progress import Progress
from rq_jax.training import cli

ROOT = Path(__file__).parent
# Command: configurations side by side, how one is built, what is counted.
COMMANDS = {
    "sample": (sample.groups, sample.build, "image"),
    "decode": (sample.decode_groups, sample.build_decode, "image"),
    "quantize": (quantize.groups, quantize.build, "vector"),
    "train": (train.groups, train.build, "image"),
    "data": (train.data_groups, train.build_data, "image"),
}


# --- the command line ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))  # one line, as for every other mistake


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, at least 1")
    return int(text)


def _code_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no code shape; give height x width x depth, such as 8x8x4")
    return tuple(map(int, text.split("x")))


def _one_of(*allowed: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        named = {str(value): value for value in allowed}
        if text not in named:
            raise argparse.ArgumentTypeError(f"'{text}' is unknown; allowed are {', '.join(named)}")
        return named[text]

    return parse


DTYPES = _list(_one_of("float32", "bfloat16"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "sample": (add_sample, "draw code grids of random weights, by class"),
        "decode": (add_decode, "decode code grids to 8-bit pictures"),
        "quantize": (add_quantize, "codebook search and update, against the whole matrix of distances and its argmin"),
        "train": (add_train, "the training step of train_vae.py or train_transformer.py"),
        "data": (add_data, "read and transform training pictures, without a model"),
    }
    for name, (add_options, text) in about.items():
        add = commands.add_parser(name, help=text, description=text, allow_abbrev=False).add_argument
        add_options(add)
        add("--runs", type=_count, default=5, help="timed runs of each configuration; the table shows their median")
        add("--warmups", type=_count, default=1, help="runs before them")
        add("--out", help="JSON file of the record")
        add("--save", action="store_true", help="without --out: benchmarks/results/<device>-<date>-<commit>.json")
        add("--compare", help="JSON file of an earlier run: ratios new / old of what both measured")
    return parser.parse_args(argv)


def add_shapes(add: Callable[..., Any]) -> None:
    add("--batch", type=_list(_count), default=[1, 8], help="pictures of one program")
    add("--downsampling", type=_list(_one_of(*sample.TOKENIZERS)), help="of 256x256 pictures (default: 32)")
    add("--depth", type=_list(_count), help="codes of a position, with --downsampling (default: 4)")
    add("--code_shape", type=_list(_code_shape), help="in place of the two, such as 8x8x4,16x16x1")
    add("--codebook_size", type=_list(_count), help="default: 16384")
    add("--tokenizer", help="preset of configs/rqvae.py (default: by downsampling)")
    add("--plot", help="PNG file: pictures a second by batch")


def add_sample(add: Callable[..., Any]) -> None:
    add("--model", type=_list(_one_of(*sample.MODELS)), default=["tiny"], help=", ".join(sample.MODELS))
    add_shapes(add)
    add("--against", type=_list(_code_shape), default=[], help="code shapes to measure beside each, at equal layers")
    add("--dtype", type=DTYPES, help="of the computation (default: float32 on CPUs, else bfloat16)")
    add("--weights", type=_list(_one_of(*roofline.BYTES)), help="weights at rest (default: as --dtype)")
    add("--guidance", type=float, help="scale of classifier-free guidance")
    add("--temperature", type=float, default=1.0)
    add("--top_k", type=_count)
    add("--top_p", type=float)
    add("--decode", action="store_true", help="also decode to 8-bit pictures, while the next batch is drawn")
    add("--batches", type=_count, help="of one run (default: 1, with --decode 2)")
    add("--protocol", type=_one_of("paper"), help="ceil(1000 / batch) batches a run, sampling and decoding apart")


def add_decode(add: Callable[..., Any]) -> None:
    add_shapes(add)
    add("--dtype", type=DTYPES, help="of the computation (default: float32 on CPUs, else bfloat16)")


def add_quantize(add: Callable[..., Any]) -> None:
    add("--num_vectors", type=_list(_count), default=[8192])
    add("--code_dim", type=_list(_count), default=[256])
    add("--codebook_size", type=_list(_count), default=[16384])
    add("--depth", type=_list(_count), default=[4])


def add_preset(add: Callable[..., Any]) -> None:
    add("--stage", type=_one_of(1, 2), default=1)
    add("--preset", type=_list(str), default=["demo"], help="of configs/rqvae.py or configs/rqtransformer.py")
    add("--quicktest", action="store_true", help="the preset, shrunk to seconds")
    add("--batch", type=_list(_count), help="default: the preset's")
    add("--steps", type=_count, default=10, help="batches of one run")


def add_train(add: Callable[..., Any]) -> None:
    add_preset(add)
    add("--accumulation_steps", type=_count, help="micro-batches of stage 2 (default: the preset's)")
    add("--dtype", type=DTYPES, help="default: the preset's")
    add("--data", type=_one_of("synthetic", "preset"), default="synthetic", help="random pictures, or the preset's")
    add("--no_perceptual", action="store_true", help="stage 1 without the perceptual loss")
    add("--no_adversary", action="store_true", help="stage 1 without the discriminator")


def add_data(add: Callable[..., Any]) -> None:
    add_preset(add)
    add("--num_threads", type=_list(_count), help="default: the preset's")
    add("--data_name", help="data set (default: the preset's)")
    add("--data_dir", help="its directory")


# --- measuring ---


def measure_group(group: list[dict[str, Any]], args: argparse.Namespace, peaks: Peaks, progress: Progress):
    """Results of configurations that are measured in turn; one that does not fit into memory fails its group alone."""
    programs = []
    try:
        for config in group:
            programs.append(COMMANDS[args.command][1](config, args))
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
    """How many times faster an item is than in another configuration, run by run, and what the rooflines say."""
    share = this["count"] / other["count"]
    pairs = zip(this["seconds"]["runs"], other["seconds"]["runs"], strict=True)
    ratios = [share * theirs / ours for ours, theirs in pairs]
    return {
        "config": this["config"],
        "against": other["config"],
        "ratio": {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)},
        "predicted": share * other["roofline"]["seconds"] / this["roofline"]["seconds"],
    }


def comparison_table(comparisons: list[dict[str, Any]]) -> str:
    """The measured ratios beside the predicted ones."""
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


def default_path(record: dict[str, Any]) -> Path:
    """benchmarks/results/<device>-<date>-<commit>.json of this checkout."""
    date = record["environment"]["date"][: len("2030-01-02T03:04:05")].replace(":", "")
    parts = record["device"]["kind"], date, record["environment"]["commit"] or "unknown"
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', '-'.join(parts)).lower()}.json"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables and the record as JSON, write the files that were asked for.

    Raises:
      ValueError, FileNotFoundError: bad arguments, before anything compiles.
    """
    groups, unit = COMMANDS[args.command][0](args), COMMANDS[args.command][2]
    configs = [config for group in groups for config in group]
    old = timing.read_record(args.compare) if args.compare else None
    if old is not None:
        timing.check_comparable(args.command, configs, old, args.compare)
    (device, peaks), results, comparisons = timing.device_and_peaks(), [], []
    with Progress(len(configs) * (1 + args.warmups + args.runs), unit="run", title=args.command) as progress:
        for group in groups:
            found = measure_group(group, args, peaks, progress)
            results += found
            if all("roofline" in entry for entry in found):
                comparisons += [side_by_side(found[0], other) for other in found[1:]]
    paths = ("out", "compare", "plot", "save")  # say nothing of what was measured
    arguments = {name: value for name, value in vars(args).items() if value is not None and name not in paths}
    record = {"benchmark": args.command, "arguments": arguments, "environment": environment(ROOT),
              "device": device, "unit": unit, "results": results, "comparisons": comparisons}  # fmt: skip
    print(timing.table(configs, [timing.figures(entry, unit) for entry in results]))
    if comparisons:
        print(comparison_table(comparisons))
    if old is not None:
        record["compared"] = report_changes(results, old, args.compare, device["kind"])
    if getattr(args, "plot", None):
        timing.plot_rates(results, unit, args.plot)
        print(f"plot: {args.plot}")
    if path := args.out or (default_path(record) if args.save else None):
        write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"record: {path}")
    print(json.dumps(record))
    return record


def report_changes(results: list[dict[str, Any]], old: dict[str, Any], path: str, kind: str) -> dict[str, Any]:
    """Print the ratios new / old; warn where the devices differ."""
    if old["device"]["kind"] != kind:
        other = old["device"]["kind"]
        print(f"warning: --compare: '{path}' is from '{other}', this run from '{kind}'", file=sys.stderr)
    ratios = timing.compare(results, old)
    if ratios:
        rows = [{name: f"{value:.3f}" for name, value in ratio.items() if name != "config"} for ratio in ratios]
        print(f"new / old ({path}):")
        print(timing.table([ratio["config"] for ratio in ratios], rows))
    return {"file": str(path), "commit": old.get("environment", {}).get("commit"), "ratios": ratios}


def main() -> None:
    """Command line."""
    with cli.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()

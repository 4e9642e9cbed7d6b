"""Train and measure the rows of a table of results, over several seeds.

python ablate.py depth [--seeds=0,1,2] [--workdir=runs/ablations] [--out=results]

The rows stand in configs/ablations.py. Every run is a command of a training script or of sample.py, every figure one of
evaluate.py; what an earlier call finished is not done again. Writes <table>.json, <table>.md and <table>.png.
"""

import argparse
import functools
import json
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs import ablations
from rq_jax import checkpoint
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_atomic
from rq_jax.report import curves, grids
from rq_jax.training import cli
from rq_jax.training.log import METRICS_FILE

ROOT = Path(__file__).parent
NOTE = "ablation.json"  # in the directory of a run that is finished
NUM_SAMPLES = 447  # as many as the bundled set holds out, and of their classes
NUM_QUICK = 16  # with --quicktest
NUM_SHOWN = 10

Run = tuple[str, int]  # row, seed
Figures = dict[str, Any]  # name -> number, or list by depth


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=tuple(ablations.TABLES))
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--workdir", default="runs/ablations", help="directory of the runs, seen from this checkout")
    parser.add_argument("--out", help="directory of the table, likewise (default: results; of a quicktest its workdir)")
    parser.add_argument("--checkpoint", default="checkpoints/emoji", help="model that the table 'filter' draws from")
    parser.add_argument("--quicktest", action="store_true", help="runs of four steps, to try the command")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise ValueError(f"--seeds: '{args.seeds}' is no list of whole numbers; give for example 0,1,2")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: {args.seeds} names one twice; the spread is over different ones")
    args.command = shown_command(["ablate.py", *(sys.argv[1:] if argv is None else argv)])
    args.out = args.out or (args.workdir if args.quicktest else "results")
    return args


def shown_command(line: list[str]) -> str:
    """A script and its options as a reader would type them."""
    return " ".join(["python", *(f'"{part}"' if re.search(r"[\s()]", part) else part for part in line)])


# --- runs -------------------------------------------------------------------------------------------------------------


def command(script: str, *options: Any) -> str:
    """Run a script of this checkout; the command as a reader would type it.

    Raises:
      SystemExit: it failed, or was interrupted; it has told why.
    """
    line = [script, *map(str, options)]
    shown = shown_command(line)
    print(f"$ {shown}", flush=True)
    # In a group of its own a script hears of Ctrl-C from here alone, once, and saves its step in peace.
    process = subprocess.Popen([sys.executable, *line], cwd=ROOT, process_group=0)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, frame: process.send_signal(got)) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
    return shown


def directory_of(args: argparse.Namespace, row: str, seed: int) -> Path:
    """Where a run lives, seen from the checkout."""
    return Path(args.workdir) / f"{re.sub('[^a-z0-9.]+', '_', row.lower())}-seed{seed}"


def once(directory: Path, settings: Mapping[str, Any], run: Callable[[], Figures]) -> Figures:
    """The note of a run: its settings, commit, time and what `run` returns; called only where it is not finished.

    Raises:
      ValueError: the directory holds a finished run of other settings.
    """
    path, settings = ROOT / directory / NOTE, json.loads(json.dumps(settings))
    if path.exists():
        note = json.loads(path.read_text())
        if note["settings"] != settings:
            raise ValueError(
                f"--workdir: '{directory}' is a run of {note['settings']}, not of {settings}; give another --workdir"
            )
        return note
    origin = environment(ROOT)
    is_whole, start, start_cores = not path.parent.exists(), time.perf_counter(), core_seconds()
    found = run()
    # A run that was interrupted took longer than this call.
    took = {"seconds": time.perf_counter() - start, "core_seconds": core_seconds() - start_cores}
    found |= {name: round(value, 1) if is_whole else None for name, value in took.items()}
    found |= {"settings": settings, **{name: origin[name] for name in ("commit", "dirty", "date")}}
    write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
    return found


def core_seconds() -> float:
    """Processor time of the scripts that have ended, over all cores: what else ran meanwhile hardly counts."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(args: argparse.Namespace, stage: int, row: str, seed: int, changes: Mapping[str, Any]) -> Figures:
    """Train a row; its note has the number of steps."""
    script, config = [("train_vae.py", "rqvae"), ("train_transformer.py", "rqtransformer")][stage - 1]
    directory = directory_of(args, row, seed)
    if args.quicktest:  # the preset has durations of its own
        changes = {name: value for name, value in changes.items() if not name.endswith("_steps")}
    settings = {
        "config": f"configs/{config}.py:demo{',quicktest' if args.quicktest else ''}",
        "config.seed": seed,
        **{f"config.{name}": value for name, value in changes.items()},
    }

    def run() -> Figures:
        shown = command(script, *(f"--{name}={value}" for name, value in settings.items()), f"--workdir={directory}")
        return {"command": shown, "steps": curves.read_metrics(ROOT / directory / METRICS_FILE)["loss"][0][-1]}

    return once(directory, settings, run)


def train_tokenizer(args: argparse.Namespace, row: str, seed: int) -> Figures:
    """Train a row of `ablations.TOKENIZERS`."""
    return train(args, 1, row, seed, {**ablations.TOKENIZER_CHANGES, **ablations.TOKENIZERS[row]})


def base_tokenizer(args: argparse.Namespace) -> Path:
    """The tokenizer behind all rows of `ablations.TRANSFORMERS`, trained if need be."""
    train_tokenizer(args, ablations.BASE, 0)
    return directory_of(args, ablations.BASE, 0)


def train_transformer(args: argparse.Namespace, row: str, seed: int) -> Figures:
    """Train a row of `ablations.TRANSFORMERS` and draw from it, unfiltered."""
    tokenizer = {"tokenizer": str(base_tokenizer(args))}
    changes = {**tokenizer, **ablations.TRANSFORMER_CHANGES, **ablations.TRANSFORMERS[row]}
    note, directory = train(args, 2, row, seed, changes), directory_of(args, row, seed)
    draw(args, directory / "samples", directory, seed, {"top_p": 1.0})
    return note


def draw_filtered(args: argparse.Namespace, row: str, seed: int) -> Figures:
    """Draw from the pair that ships through a row of `ablations.FILTERS`."""
    return draw(args, directory_of(args, row, seed), args.checkpoint, seed, ablations.FILTERS[row], model_of(args))


@functools.cache
def _model(directory: Path) -> Figures:
    loaded = checkpoint.load_model(directory)
    prints = {"transformer": loaded.variables, "tokenizer": loaded.tokenizer.variables}
    return {**{name: checkpoint.fingerprint(tree) for name, tree in prints.items()}, "sample": loaded.config["sample"]}


def model_of(args: argparse.Namespace) -> Figures:
    """What the model of the table 'filter' is, and how it samples where a row says nothing: it may be trained anew."""
    return _model(ROOT / args.checkpoint)


def draw(
    args: argparse.Namespace, out: Path, directory: Path | str, seed: int, changes: Mapping[str, Any], model: Any = None
) -> Figures:
    """Draw as many pictures as are held out, of their classes, from the model in `directory`, known by `model`."""
    count, batch = (NUM_QUICK, NUM_QUICK) if args.quicktest else (NUM_SAMPLES, 149)
    options = {"checkpoint": str(directory), "seed": seed, **changes, "num_images": count, "batch_size": batch}
    line = [f"--{name}={value}" for name, value in options.items()] + ["--classes_of=validation", f"--out={out}"]
    settings = {**options, "model": model} if model else options
    return once(out, settings, lambda: {"command": command("sample.py", *line)})


# --- figures ----------------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, *options: str) -> tuple[Figures, Figures]:
    """(record of evaluate.py with all its options, kernel distances of the sets in it by name)."""
    out = Path(args.workdir) / "evaluations" / args.table
    command("evaluate.py", *options, f"--out={out}")
    record = json.loads((ROOT / out / "evaluation.json").read_text())
    return record, {name: distance["mean"] for name, distance in record["kernel_distance"]["of"].items()}


def measure_tokenizers(args: argparse.Namespace, runs: Iterable[Run]) -> tuple[Figures, dict[Run, Figures]]:
    """(marks, figures of each run)."""
    places = {run: str(directory_of(args, *run)) for run in runs}
    depths = "by_depth" if args.table == "coarse_to_fine" else "full"
    options = [f"--checkpoint={place}" for place in places.values()]
    record, distances = evaluate(args, *options, f"--kernel_distance={depths}")
    found = {
        run: {**record["results"][place], "kernel_distance": distances[f"reconstructions by {place}"]}
        for run, place in places.items()
    }
    shown = [f"--checkpoint={place}" for (_, seed), place in places.items() if seed == args.seeds[0]]
    out = Path(args.workdir) / "evaluations" / f"{args.table}_pictures"
    command("evaluate.py", *shown, "--no_perceptual", f"--out={out}")
    return {"kernel distance of training pictures": distances["training pictures"]}, found


def measure_samples(
    args: argparse.Namespace, tokenizer: Path, places: Mapping[Run, Path]
) -> tuple[Figures, dict[Run, Figures]]:
    """(marks, figures of each set of samples)."""
    options = [f"--samples={place}" for place in places.values()]
    record, distances = evaluate(args, f"--checkpoint={tokenizer}", "--no_perceptual", *options)
    nearest = record["samples"]["median_squared_distance_to_nearest_training_picture"]
    found = {
        run: {"kernel_distance": distances[f"samples {place}"], "nearest": nearest[f"samples {place}"]}
        for run, place in places.items()
    }
    marks = {
        "kernel distance of training pictures": distances["training pictures"],
        "kernel distance of reconstructions": distances[f"reconstructions by {tokenizer}"][-1],
        "distance to training of held-out pictures": nearest["held-out pictures"],
    }
    return marks, found


def measure_transformers(args: argparse.Namespace, runs: Iterable[Run]) -> tuple[Figures, dict[Run, Figures]]:
    """(marks, figures of each run)."""
    places = {run: directory_of(args, *run) for run in runs}
    samples = {run: place / "samples" for run, place in places.items()}
    marks, found = measure_samples(args, base_tokenizer(args), samples)
    for run, place in places.items():
        logged = {name: values[-1] for name, (_, values) in curves.read_metrics(ROOT / place / METRICS_FILE).items()}
        by_depth = [logged[name] for name in sorted(logged) if name.startswith("validation_nats/")]
        found[run] |= {name: logged[name] for name in ("validation_loss", "loss")} | {"validation_nats": by_depth}
    return marks, found


def measure_filters(args: argparse.Namespace, runs: Iterable[Run]) -> tuple[Figures, dict[Run, Figures]]:
    """(marks, figures of each run)."""
    return measure_samples(args, Path(args.checkpoint) / "tokenizer", {run: directory_of(args, *run) for run in runs})


# --- tables -----------------------------------------------------------------------------------------------------------

TOKENIZER_COLUMNS = {
    "PSNR, dB": "psnr",
    "SSIM": "ssim",
    "perceptual distance": "distance",
    "kernel distance": "kernel_distance",
    "sharpness": "sharpness",
    "codes used": "codes_used",
}
DEPTH_COLUMNS = {
    **TOKENIZER_COLUMNS, "codes used": "code_usage", "code perplexity": "code_perplexity", "code norm": "code_norm",
}  # fmt: skip
SAMPLE_COLUMNS = {"kernel distance": "kernel_distance", "distance to training": "nearest"}
# Without the training loss, whose targets differ by row.
TRANSFORMER_COLUMNS = {"validation loss, nats": "validation_loss", **SAMPLE_COLUMNS}
KINDS = (
    (ablations.TOKENIZERS, train_tokenizer, measure_tokenizers, TOKENIZER_COLUMNS),
    (ablations.TRANSFORMERS, train_transformer, measure_transformers, TRANSFORMER_COLUMNS),
    (ablations.FILTERS, draw_filtered, measure_filters, SAMPLE_COLUMNS),
)
PROTOCOL = (
    "Held-out pictures of the bundled set. Mean over seeds, sample standard deviation; lists are by code depth 1..D, "
    "cells the full depth. Kernel distance: KID's unbiased estimate on EfficientNet-Lite0 features to the held-out "
    "pictures; distance to training: the median squared feature distance of a sample to its nearest training picture; "
    "either compares with itself alone. Codes used: on the held-out pictures, by any depth. Core-seconds: of the "
    "training or drawing script, compilation included."
)


def over_seeds(found: list[Figures]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and the values of each figure."""
    spread = {}
    for name, value in found[0].items():
        if not isinstance(value, str):
            values = np.array([figures[name] for figures in found], np.float64)
            std = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
            known = std.tolist() if len(values) > 1 else None
            spread[name] = {"mean": values.mean(axis=0).tolist(), "std": known, "values": values.tolist()}
    return spread


def markdown(columns: Mapping[str, str], rows: list[dict[str, Any]], by_depth: bool) -> str:
    """The table, its last column the time of a run; with `by_depth` a line for each depth, else the full depth."""

    def cell(figure: Mapping[str, Any], d: int) -> str:
        mean, std = (None if value is None else np.atleast_1d(value)[d] for value in (figure["mean"], figure["std"]))
        return f"{mean:.4g}" + ("" if std is None else f" ± {std:.2g}")

    lines = ["| " + " | ".join(["", *columns, "core-seconds"]) + " |", "| --- " * (len(columns) + 2) + "|"]
    for row in rows:
        depths = range(len(row["figures"]["psnr"]["mean"])) if by_depth else [-1]
        seconds = [run["core_seconds"] for run in row["runs"]]
        time_shown = f"{np.mean(seconds):.0f}" if None not in seconds else ""
        for d in depths:
            label = f"{row['row']}, depth {d + 1}" if by_depth else row["row"]
            cells = [cell(row["figures"][name], d) for name in columns.values()]
            lines.append("| " + " | ".join([label, *cells, time_shown]) + " |")
    return "\n".join(lines) + "\n"


def picture(args: argparse.Namespace, rows: list[dict[str, Any]], marks: Figures, path: Path) -> None:
    """What the table looks like: reconstructions or samples of the first seed, curves over depth or filter."""

    def line(names: Iterable[Any], found: Iterable[Mapping[str, Any]]) -> tuple[list, list, list]:
        found = list(found)
        return list(names), [f["mean"] for f in found], [f["std"] or 0.0 for f in found]

    if args.table == "coarse_to_fine":
        panels = {}
        for title, name in DEPTH_COLUMNS.items():
            panels[title] = {}
            for row in rows:
                figure = row["figures"][name]
                std = figure["std"] or [0.0] * len(figure["mean"])
                panels[title][row["row"]] = list(range(1, len(std) + 1)), figure["mean"], std
        curves.panels(panels, "code depth", path)
    elif args.table == "filter":
        panels = {}
        for option, title in (("top_p", "top-p"), ("top_k", "top-k"), ("guidance", "guidance")):
            kept = [row for row in rows if option == next(iter(row["changes"]))]
            values = [str(row["changes"][option]) for row in kept]
            for name, figure in SAMPLE_COLUMNS.items():
                panels[f"{name}, {title}"] = {"samples": line(values, (row["figures"][figure] for row in kept))}
                for mark, value in marks.items():
                    if mark.startswith(name):
                        panels[f"{name}, {title}"][mark] = values, [value] * len(values), [0.0] * len(values)
        curves.panels(panels, "", path)
    elif args.table == "soft_labels":
        chosen = np.linspace(0, (NUM_QUICK if args.quicktest else NUM_SAMPLES) - 1, NUM_SHOWN).astype(int)
        shown = {}
        for row in rows:
            folder = ROOT / directory_of(args, row["row"], args.seeds[0]) / "samples" / "images"
            shown[row["row"]] = np.stack([grids.read_image(folder / f"{i:06d}.png") for i in chosen])
        grids.save_png(path, grids.labelled_grid(shown, scale=2))
    else:
        source = ROOT / args.workdir / "evaluations" / f"{args.table}_pictures" / "reconstructions.png"
        write_atomic(path, source.read_bytes())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make a table: train, draw, measure, write.

    Raises:
      ValueError: bad arguments, or a --workdir of other runs.
    """
    names, out = ablations.TABLES[args.table], ROOT / args.out
    settings, do, measure, columns = next(kind for kind in KINDS if names[0] in kind[0])
    by_depth = args.table == "coarse_to_fine"
    columns = DEPTH_COLUMNS if by_depth else columns
    runs = [(row, seed) for seed in args.seeds for row in names]
    notes = {key: do(args, *key) for key in runs}
    marks, found = measure(args, runs)
    rows = [
        {
            "row": row, "changes": settings[row], "seeds": args.seeds,
            "runs": [notes[row, seed] for seed in args.seeds],
            "figures": over_seeds([found[row, seed] for seed in args.seeds]),
        }
        for row in names
    ]  # fmt: skip
    record = {
        "table": args.table, "command": args.command, "protocol": PROTOCOL, "marks": marks,
        "environment": environment(ROOT), "rows": rows,
    }  # fmt: skip
    table = markdown(columns, rows, by_depth)
    picture(args, rows, marks, out / f"{args.table}.png")
    write_atomic(out / f"{args.table}.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(out / f"{args.table}.md", table.encode())
    print(table, *(f"{name}: {value:.4g}" for name, value in marks.items()), sep="\n")
    print(f"table: {Path(args.out) / args.table}.md, .json, .png")
    return record


def main() -> None:
    """Command line."""
    cli.keep_compiled_programs()  # as the scripts do: the record says so
    with cli.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()

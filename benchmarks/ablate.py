"""Train and measure the rows of a table of results, over several seeds.

python -m benchmarks.ablate depth [--seeds=0,1,2] [--workdir=runs/ablations] [--out=results]

The rows are in configs/ablations.py. A run is a command of a training script or of sample.py, its figures come from
evaluate.py; runs that an earlier call finished are not repeated. Writes <table>.json, <table>.md and <table>.png.
"""

import argparse
import functools
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.scripts import ROOT, run_script, shown_command
from configs import ablations
from rq_jax import checkpoint
from rq_jax.evaluation import stamps
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_atomic, write_json
from rq_jax.report import curves
from rq_jax.training import cli
from rq_jax.training.log import METRICS_FILE

NOTE = "ablation.json"  # in the directory of a run that is finished
NUM_SAMPLES = 447  # as many as the bundled set holds out, and of their classes
NUM_QUICK = 16  # with --quicktest
NUM_SHOWN = 10  # in the image of a table
SETTINGS = "settings_000000.json"  # of what sample.py drew
MANIFOLD = ("precision", "recall", "density", "coverage")
OF_TOKENIZER = ("psnr", "num_codes", "bits_per_image")  # beside the figures of samples

Run = tuple[str, int]  # row, seed
Figures = dict[str, Any]  # name -> number, or list by depth
Measured = tuple[Figures, dict[Run, Figures], Figures]  # marks, figures of each run, protocols of the figures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=tuple(ablations.TABLES))
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    add_path = functools.partial(parser.add_argument, type=cli.path)
    add_path("--workdir", default="runs/ablations", help="directory of the runs, seen from this checkout")
    add_path("--out", help="directory of the table, likewise (default: results; of a quicktest its workdir)")
    add_path("--checkpoint", default="checkpoints/emoji", help="model that the tables of samples draw from")
    parser.add_argument("--quicktest", action="store_true", help="runs of four steps, to try the command")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise ValueError(f"--seeds: '{args.seeds}' is no list of whole numbers; give for example 0,1,2")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: {args.seeds} names one twice; the spread is over different ones")
    args.command = shown_command(["-m", "benchmarks.ablate", *(sys.argv[1:] if argv is None else argv)])
    args.out = args.out or (args.workdir if args.quicktest else "results")
    return args


# --- runs ---


def directory_of(args: argparse.Namespace, row: str, seed: int) -> Path:
    """Directory of a run, relative to the checkout."""
    return Path(args.workdir) / f"{re.sub('[^a-z0-9.]+', '_', row.lower())}-seed{seed}"


def once(directory: Path, settings: Mapping[str, Any], run: Callable[[], Figures]) -> Figures:
    """Do a run unless it is finished.

    Args:
      directory: of the run, relative to the checkout.
      settings: of the run.
      run: does it; returns entries of its note.

    Returns:
      The note: settings, commit, date, seconds, and what `run` returned.

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
    note = run()
    # A run that was interrupted took longer than this call.
    took = {"seconds": time.perf_counter() - start, "core_seconds": core_seconds() - start_cores}
    note |= {name: round(value, 1) if is_whole else None for name, value in took.items()}
    note |= {"settings": settings, **{name: origin[name] for name in ("commit", "dirty", "date")}}
    write_json(path, note)
    return note


def core_seconds() -> float:
    """Processor time of the scripts that have ended, over all cores; other programs hardly change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def config_of(row: str) -> tuple[str, dict[str, Any]]:
    """Name of the config that a row trains, and what it changes in the preset `demo`."""
    config, shared, rows = next(group for group in ablations.TRAINED if row in group[-1])
    return config, {**shared, **rows[row]}


def train(args: argparse.Namespace, row: str, seed: int) -> Figures:
    """Train a row of `ablations.TRAINED`; from a transformer, also draw unfiltered.

    The tokenizer of a transformer is trained before it, if need be.

    Returns:
      The note, with the number of steps.
    """
    (config, changes), directory = config_of(row), directory_of(args, row, seed)
    is_transformer = "tokenizer" in changes
    if is_transformer:
        changes["tokenizer"] = str(tokenizer_of(args, row))
    if args.quicktest:  # the preset has durations and levels of its own
        own = ("_steps", "width_multipliers")
        changes = {name: value for name, value in changes.items() if not name.endswith(own)}
    settings = {
        "config": f"configs/{config}.py:demo{',quicktest' if args.quicktest else ''}",
        "config.seed": seed,
        **{f"config.{name}": value for name, value in changes.items()},
    }
    script = "train_transformer.py" if is_transformer else "train_vae.py"

    def run() -> Figures:
        shown = run_script(script, *(f"--{name}={value}" for name, value in settings.items()), f"--workdir={directory}")
        return {"command": shown, "steps": curves.read_metrics(ROOT / directory / METRICS_FILE)["loss"][0][-1]}

    note = once(directory, settings, run)
    if is_transformer:
        names = ("top_p", "position_top_p") if config == "dqtransformer" else ("top_p",)
        draw(args, directory / "samples", directory, seed, dict.fromkeys(names, 1.0))
    return note


def tokenizer_of(args: argparse.Namespace, row: str) -> Path:
    """The tokenizer of a transformer, trained if need be."""
    tokenizer = config_of(row)[1]["tokenizer"], 0
    train(args, *tokenizer)
    return directory_of(args, *tokenizer)


def draw_filtered(args: argparse.Namespace, row: str, seed: int) -> Figures:
    """Draw from the pair that ships as a row of `ablations.DRAWN` says."""
    return draw(args, directory_of(args, row, seed), args.checkpoint, seed, ablations.DRAWN[row], model_of(args))


@functools.cache
def _model(directory: Path) -> Figures:
    loaded = checkpoint.load_model(directory)
    prints = {"transformer": loaded.variables, "tokenizer": loaded.tokenizer.variables}
    return {**{name: checkpoint.fingerprint(tree) for name, tree in prints.items()}, "sample": loaded.config["sample"]}


def model_of(args: argparse.Namespace) -> Figures:
    """Fingerprints and sampling defaults of the model that is drawn from; one that is trained anew is another."""
    return _model(ROOT / args.checkpoint)


def draw(
    args: argparse.Namespace, out: Path, directory: Path | str, seed: int, changes: Mapping[str, Any], model: Any = None
) -> Figures:
    """Draw as many images as are held out, of their classes.

    Args:
      args: the command line.
      out: directory of the samples.
      directory: of the model.
      seed: of the samples.
      changes: options of sample.py.
      model: identity of a model that may change in its directory; see `model_of`.

    Returns:
      The note.
    """
    count, batch = (NUM_QUICK, NUM_QUICK) if args.quicktest else (NUM_SAMPLES, 149)
    options = {"checkpoint": str(directory), "seed": seed, **changes, "num_images": count, "batch_size": batch}
    line = [f"--{name}={value}" for name, value in options.items()] + ["--classes_of=validation", f"--out={out}"]
    settings = {**options, "model": model} if model else options
    return once(out, settings, lambda: {"command": run_script("sample.py", *line)})


# --- figures ---


def evaluate(args: argparse.Namespace, command: str, *options: str) -> Figures:
    """Run a command of evaluate.py; returns its record."""
    out = Path(args.workdir) / "evaluations" / args.table
    options += (f"--out={out}", f"--cache={Path(args.workdir) / 'features'}")
    run_script("evaluate.py", command, *options)
    return json.loads((ROOT / out / f"{command}.json").read_text())


def mean_distances(record: Figures) -> Figures:
    """Mean kernel distance of each set by name."""
    return {name: distance["mean"] for name, distance in record["kernel_distance"]["of"].items()}


def protocols_of(records: Iterable[Figures], rows: Iterable[str]) -> Figures:
    """Of each figure the stamp of its protocol, which all rows of a table have in common, with its fields.

    Args:
      records: of evaluate.py.
      rows: what was measured in these; marks beside the rows have protocols of their own.

    Raises:
      ValueError: a figure of unlike protocols.
    """
    records, rows = list(records), set(rows)
    protocols = {stamp: fields for record in records for stamp, fields in record["protocols"].items()}
    values = [one for record in records for one in stamps.read(record, record["command"]) if one.of in rows]
    return {name: {"stamp": stamp, **protocols[stamp]} for name, stamp in stamps.check_alike(values, protocols).items()}


def measure_tokenizers(args: argparse.Namespace, runs: Iterable[Run]) -> Measured:
    """Marks to compare with, the figures of each run, and their protocols."""
    places = {run: str(directory_of(args, *run)) for run in runs}
    depths = "by_depth" if args.table == "coarse_to_fine" else "full"
    options = [f"--checkpoint={place}" for place in places.values()]
    record = evaluate(args, "tokenizer", *options, f"--distances={depths}")
    distances = mean_distances(record)
    figures = {
        run: {**record["results"][place], "kernel_distance": distances[f"reconstructions by {place}"]}
        for run, place in places.items()
    }
    for run, place in places.items():
        logged = curves.read_metrics(ROOT / place / METRICS_FILE)
        if "grain_share/grain1" in logged:  # in training: of a learned router, with its noise
            figures[run]["fine_share_in_training"] = logged["grain_share/grain1"][1][-1]
    shown = [f"--checkpoint={place}" for (_, seed), place in places.items() if seed == args.seeds[0]]
    out = Path(args.workdir) / "evaluations" / f"{args.table}_images"
    run_script("evaluate.py", "tokenizer", *shown, "--no_perceptual", "--distances=none", f"--out={out}")
    rows = [name for place in places.values() for name in (place, f"reconstructions by {place}")]
    marks = {"kernel distance of training pictures": distances["training pictures"]}
    return marks, figures, protocols_of([record], rows)


def measure_samples(args: argparse.Namespace, tokenizers: Mapping[Run, Path], places: Mapping[Run, Path]) -> Measured:
    """Marks to compare with, the figures of each set of samples and of the tokenizer behind it, and their protocols."""
    line = [*(f"--checkpoint={place}" for place in dict.fromkeys(tokenizers.values())), "--no_perceptual"]
    record = evaluate(args, "tokenizer", *line, "--distances=full")
    rebuilt = mean_distances(record)
    options = [f"--samples={place}" for place in places.values()] + ["--data_name=twemoji"]
    samples, neighbours = evaluate(args, "samples", *options), evaluate(args, "neighbours", *options)
    distances = mean_distances(samples)
    nearest = neighbours["samples"]["median_squared_distance_to_nearest_training_picture"]
    of_reconstructions = {run: rebuilt[f"reconstructions by {place}"][-1] for run, place in tokenizers.items()}
    figures = {
        run: {
            **{name: record["results"][str(tokenizers[run])][name] for name in OF_TOKENIZER},
            "kernel_distance": distances[f"samples {place}"], "nearest": nearest[f"samples {place}"],
            **{name: samples[name]["of"][f"samples {place}"] for name in MANIFOLD},
            "kernel_distance_of_reconstructions": of_reconstructions[run],
        }
        for run, place in places.items()
    }  # fmt: skip
    marks = {
        "kernel distance of training pictures": distances["training pictures"],
        "distance to training of held-out pictures": nearest["held-out pictures"],
    }
    if len(set(tokenizers.values())) == 1:
        marks["kernel distance of reconstructions"] = next(iter(of_reconstructions.values()))
    protocols = protocols_of([record], map(str, tokenizers.values()))
    protocols |= protocols_of([samples, neighbours], [f"samples {place}" for place in places.values()])
    rebuilt_by = protocols_of([record], [f"reconstructions by {place}" for place in tokenizers.values()])
    protocols["kernel_distance_of_reconstructions"] = rebuilt_by["kernel_distance"]
    return marks, figures, protocols


def measure_transformers(args: argparse.Namespace, runs: Iterable[Run]) -> Measured:
    """As `measure_samples`, with the losses of each run."""
    places = {run: directory_of(args, *run) for run in runs}
    tokenizers = {run: tokenizer_of(args, run[0]) for run in places}
    samples = {run: place / "samples" for run, place in places.items()}
    marks, figures, protocols = measure_samples(args, tokenizers, samples)
    for run, place in places.items():
        logged = {name: values[-1] for name, (_, values) in curves.read_metrics(ROOT / place / METRICS_FILE).items()}
        by_depth = [logged[name] for name in sorted(logged) if name.startswith("validation_nats/depth")]
        figures[run] |= {name: logged[name] for name in ("validation_loss", "loss")} | {"validation_nats": by_depth}
        if "validation_nats/position" in logged:
            figures[run] |= {
                "content_nats": float(np.mean(by_depth)), "position_nats": logged["validation_nats/position"],
                "bits_of_samples": logged["bits_per_image"],
            }  # fmt: skip
    return marks, figures, protocols


def measure_filters(args: argparse.Namespace, runs: Iterable[Run]) -> Measured:
    """As `measure_samples`, with the mean score of what a judge kept."""
    places = {run: directory_of(args, *run) for run in runs}
    measured = measure_samples(args, dict.fromkeys(places, Path(args.checkpoint) / "tokenizer"), places)
    for run, place in places.items():
        if chosen := json.loads((ROOT / place / SETTINGS).read_text()).get("chosen"):
            measured[1][run]["mean_score"] = chosen["mean_score"]["kept"]
    return measured


# --- tables ---

# How the rows are run, how all are measured.
KINDS = {
    "tokenizers": (train, measure_tokenizers),
    "transformers": (train, measure_transformers),
    "filters": (draw_filtered, measure_filters),
}
PROTOCOL = (
    "Held-out images of the bundled set. Mean over seeds, sample standard deviation; lists are by code depth 1..D, "
    "cells the full depth. Kernel distance: KID's unbiased estimate on EfficientNet-Lite0 features to the held-out "
    "images; distance to training: the median squared feature distance of a sample to its nearest training image; "
    "either compares with itself alone. Codes used: on the held-out images, by any depth. Core-seconds: of the "
    "training or drawing script, compilation included."
)


def kind_of(row: str) -> str:
    """The key of `KINDS` for a row."""
    if row in ablations.DRAWN:
        return "filters"
    return "transformers" if "tokenizer" in config_of(row)[1] else "tokenizers"


def draw_table(args: argparse.Namespace, rows: list[tables.Row], marks: Figures, path: Path) -> None:
    """Draw the image of a table: curves over depth or filter, samples or reconstructions of the first seed."""
    if args.table == "coarse_to_fine":
        tables.depth_curves(rows, path)
    elif args.table == "filter":
        tables.filter_curves(rows, marks, path)
    elif args.table in ("dq_rate", "dq_ratio"):
        tables.rate_curves(rows, tables.COLUMNS[args.table], path)
    elif (kind := kind_of(rows[0]["row"])) != "tokenizers":
        shown = np.linspace(0, (NUM_QUICK if args.quicktest else NUM_SAMPLES) - 1, NUM_SHOWN).astype(int)
        runs = {row["row"]: ROOT / directory_of(args, row["row"], args.seeds[0]) for row in rows}
        below = "samples" if kind == "transformers" else "."
        tables.sample_grid({name: run / below for name, run in runs.items()}, shown, path)
    else:
        source = ROOT / args.workdir / "evaluations" / f"{args.table}_images" / "reconstructions.png"
        write_atomic(path, source.read_bytes())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make a table: train, draw, measure, write.

    Raises:
      ValueError: bad arguments, or a --workdir of other runs.
    """
    names, out = ablations.TABLES[args.table], ROOT / args.out
    kind = kind_of(names[0])
    run_row, measure = KINDS[kind]
    columns, by_depth = tables.COLUMNS.get(args.table, tables.COLUMNS[kind]), args.table == "coarse_to_fine"
    runs = [(row, seed) for seed in args.seeds for row in names]
    notes = {key: run_row(args, *key) for key in runs}
    marks, figures, protocols = measure(args, runs)
    rows = [
        {
            "row": row, "changes": ablations.ROWS[row], "seeds": args.seeds,
            "runs": [notes[row, seed] for seed in args.seeds],
            "figures": tables.over_seeds([figures[row, seed] for seed in args.seeds]),
        }
        for row in names
    ]  # fmt: skip
    record = {
        "table": args.table, "command": args.command, "protocol": PROTOCOL, "protocols": protocols, "marks": marks,
        "environment": environment(ROOT), "rows": rows,
    }  # fmt: skip
    text = tables.markdown(columns, rows, by_depth)
    draw_table(args, rows, marks, out / f"{args.table}.png")
    write_json(out / f"{args.table}.json", record)
    write_atomic(out / f"{args.table}.md", text.encode())
    print(text, *(f"{name}: {value:.4g}" for name, value in marks.items()), sep="\n")
    print("protocols:", ", ".join(f"{name} {protocol['stamp']}" for name, protocol in protocols.items()))
    print(f"table: {Path(args.out) / args.table}.md, .json, .png")
    return record


def main() -> None:
    """Command line."""
    cli.keep_compiled_programs()  # as the scripts do: the record says so
    with cli.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()

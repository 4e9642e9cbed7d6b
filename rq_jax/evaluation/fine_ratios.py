"""One tokenizer at several fine ratios: its grain maps by thresholds that the images themselves set."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.data.entropy import EntropyHistogram
from rq_jax.devices import sharding
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.grains import region_entropies
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.tokenizer import measure_tokenizer
from rq_jax.grains import check_ratios, num_codes
from rq_jax.pretrained.vgg_lpips import Perceptual
from rq_jax.report import curves, tables
from rq_jax.report.grain_maps import codes_told, draw_grains, enlarge
from rq_jax.settings import checks

NUM_BINS = 32  # of `grains.patch_entropy`
PANELS = {  # heading of a curve -> figure
    "PSNR, dB": "psnr", "SSIM": "ssim", "perceptual distance": "distance", "sharpness": "sharpness",
    "kernel distance": "kernel_distance", "codes of an image": "codes_per_image/mean",
    "bits of an image": "bits_per_image",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AtRatio:
    """A tokenizer at one fine ratio.

    Attributes:
      ratio: of the regions, which is asked for; equal regions get equal grains, so that another share may be given.
      thresholds: (1,) in nats, which that share of the regions exceeds.
      figures: of `measure_tokenizer`.
      shown: of the first images, see `tokenizer.make_measure`.
    """

    ratio: float
    thresholds: np.ndarray
    figures: dict[str, Any]
    shown: tuple[np.ndarray, ...]


def check(ratios: Sequence[float], tokenizers: Mapping[str, LoadedModel]) -> None:
    """Every ratio is in (0, 1), and every tokenizer has two grains.

    Raises:
      ValueError: otherwise.
    """
    for ratio in ratios:
        check_ratios("--grains", ratio)
    checks.distinct("--grains", ratios)
    for directory, loaded in tokenizers.items():
        if (G := loaded.model.num_grains) != 2:
            has = "no grains" if G == 1 else f"{G} grains, whose shares one ratio does not set"
            raise ValueError(f"--grains: '{directory}' has {has}; give a DQ-VAE of two grains, or leave it out")


def thresholds_of(
    loaded: LoadedModel, data: EvaluationData, mesh: jax.sharding.Mesh, ratios: Sequence[float]
) -> list[np.ndarray]:
    """For each ratio the threshold (1,) that this share of the regions of the held-out images exceeds."""
    measure = functools.partial(region_entropies, loaded.model)
    measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))
    dataset, histogram = data.held_out(), EntropyHistogram(NUM_BINS)
    gather = jax.jit(lambda mask: mask, out_shardings=sharding.replicated(mesh))
    for batch in counted(dataset.iterator(), dataset.num_examples, data.batch_size, "entropy"):
        placed = sharding.put_batch(mesh, {name: batch[name] for name in ("image", "mask")})
        histogram.add(np.asarray(measure(placed["image"]))[np.asarray(gather(placed["mask"]))])
    return [np.float32([histogram.threshold(ratio)]) for ratio in ratios]


def measure_ratios(
    loaded: LoadedModel,
    data: EvaluationData,
    mesh: jax.sharding.Mesh,
    ratios: Sequence[float],
    perceptual: Perceptual | None = None,
    title: str = "",
) -> list[AtRatio]:
    """Measures a tokenizer at each fine ratio, with one program for all.

    Args:
      loaded: a tokenizer of two grains, with any router: regions are chosen by entropy.
      data: the held-out images, whose entropies set the thresholds.
      mesh, perceptual, title: as for `measure_tokenizer`.
      ratios: shares of the regions that are fine, in (0, 1).
    """
    thresholds = thresholds_of(loaded, data, mesh, ratios)
    found = measure_tokenizer(loaded, data, mesh, perceptual, title, thresholds)
    return [AtRatio(*each, *measured) for *each, measured in zip(ratios, thresholds, found, strict=True)]


def ratio_rows(measured: Sequence[AtRatio], scale: int = 1) -> dict[str, np.ndarray]:
    """Rows of a labelled grid: the first images, and at each ratio their grain maps and reconstructions.

    Args:
      measured: from `measure_ratios`.
      scale: integer factor of enlargement.
    """
    rows = {"original": enlarge(measured[0].shown[0], scale)}
    for each in measured:
        images, reconstructions, grains = each.shown
        codes, psnr = codes_told(np.mean(num_codes(grains, 2)), len(reconstructions)), each.figures["psnr"][-1]
        rows[f"fine {each.ratio:g}: {codes}"] = draw_grains(images, grains, 2, scale)
        rows[f"fine {each.ratio:g}: {psnr:.1f} dB"] = enlarge(reconstructions[-1], scale)
    return rows


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures at each ratio as text."""
    return tables.table([row(figures) for figures in records])


def row(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a table: the ratio, the share that is given, and figures of the full depth."""
    shown = {heading: np.atleast_1d(figures[name])[-1].item() for heading, name in PANELS.items() if name in figures}
    return {"fine ratio": figures["fine_ratio"], "given": figures["grain_share/grain1"], **shown}


def draw_curves(records: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike) -> None:
    """Draws each figure of the full depth against the share of fine regions, a line for each tokenizer, as PNG.

    Args:
      records: name of a tokenizer -> its figures at each ratio, as JSON holds them.
      path: file to write.
    """
    panels: dict[str, dict[str, tuple[list, list, None]]] = {}
    for label, record in records.items():
        rows = [row(figures) for figures in record]
        shares = [each["given"] for each in rows]
        for heading in [heading for heading in PANELS if heading in rows[0]]:
            panels.setdefault(heading, {})[label] = shares, [each[heading] for each in rows], None
    curves.panels(panels, "share of fine regions", path)

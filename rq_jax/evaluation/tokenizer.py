"""Figures of a tokenizer: fidelity of its reconstructions and use of its codes."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import losses, metrics
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation.accumulate import accumulate, counted
from rq_jax.evaluation.grains import bits_per_image, count_grains, describe_grains, given_grains
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.grains import num_codes
from rq_jax.pretrained.vgg_lpips import Perceptual
from rq_jax.report import grids
from rq_jax.report.grain_maps import codes_told, draw_grains, enlarge
from rq_jax.settings import checks

# What the figures of `measure_tokenizer` are.
PROTOCOL = (
    "clipped to [-1, 1]; lists are by code depth 1..D; means over pictures; sharpness: a ratio of two; usage, "
    f"perplexity and entropy (in bits) over all pictures; SSIM: window {metrics.SSIM_WINDOW}, sigma 1.5"
)
NUM_SHOWN = 8

Measure = Callable[[Any, dict[str, np.ndarray]], tuple[dict[str, Any], tuple[jax.Array, ...]]]


class Evaluation(NamedTuple):
    """Evaluations of a run: the config section `evaluation`.

    Attributes:
      use_perceptual: measure the perceptual distance beside PSNR and SSIM.
      best_by: figure that decides which weights are the best: "reconstruction", "perceptual", or "auto", which is
        "perceptual" where it is measured and a perceptual or adversarial loss is on. These losses trade squared error
        for sharpness, so that the reconstruction loss would prefer blurred weights from before they began.
    """

    use_perceptual: bool = True
    best_by: str = "auto"

    def criterion(self, is_sharpened: bool, judge: Perceptual | None) -> str:
        """Name of the figure of `make_measure` whose lowest value is the best.

        Args:
          is_sharpened: a perceptual or adversarial loss is on.
          judge: network of the perceptual distance; None: not measured.

        Raises:
          ValueError: an unknown `best_by`, or one that is not measured.
        """
        checks.one_of("evaluation.best_by", self.best_by, ("auto", "reconstruction", "perceptual"))
        if self.best_by == "perceptual" and judge is None:
            raise ValueError("evaluation.best_by: 'perceptual' is not measured; set evaluation.use_perceptual=True")
        is_perceptual = judge is not None and (self.best_by == "perceptual" or self.best_by == "auto" and is_sharpened)
        return f"distance/{judge.name}" if is_perceptual else "validation_loss"


def make_measure(
    model: Any,
    mesh: jax.sharding.Mesh,
    *,
    reconstruction: str | None = None,
    perceptual: Perceptual | None = None,
    by_depth: bool = False,
    num_shown: int = 12,
) -> Measure:
    """Builds the function that measures a tokenizer on one batch, spread over a mesh.

    The sums are taken over the images that the mask counts, whose number is "count". "psnr" has one value per code
    depth; "ssim" (of images no smaller than its window) and "distance/<name>" have one value, of the full depth.

    Args:
      model: a tokenizer; of one with grains the sums of `count_grains` come under "grains".
      mesh: its data and fsdp devices share a batch evenly.
      reconstruction: "mse" or "l1", summed as "validation_loss"; None leaves it out.
      perceptual: the distance to measure, with its variables where they are to be read; None leaves it out.
      by_depth: gives "ssim" and "distance/<name>" one value per code depth as well, and adds the commitment loss, the
        sums behind sharpness ("detail", "detail_of_originals"), code norms ("code_norm") and code usage ("counts",
        (D, K)).
      num_shown: how many images of the batch are returned.

    Returns:
      (variables, batch) -> (sums, (images (n, H, W, C), reconstructions (D, n, H, W, C))), replicated; what is shown
      ends with grains (n, u, v) where there are any. The batch holds this process's "image" (B, H, W, C) in [-1, 1] and
      "mask" (B,).
    """

    measure_placed = _make_measure_placed(model, mesh, perceptual, reconstruction, by_depth, num_shown)

    def measure(variables, batch):
        sums, (*shown, _) = measure_placed(variables, _place(mesh, batch))
        return sums, tuple(shown)

    return measure


def _place(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return sharding.put_batch(mesh, {name: batch[name] for name in ("image", "mask")})


def _make_measure_placed(model, mesh, perceptual, reconstruction, by_depth, num_shown):
    """As `make_measure` of a batch on the devices; beside the images that are shown it gives which of them count.

    Thresholds may come with the batch, see `given_grains`.
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def sum_figures(variables, images, mask, perceptual_variables, thresholds):
        given = given_grains(model, images, thresholds)
        output = model.apply(variables, images, **given)
        full = output.reconstruction
        reconstructions = model.apply(variables, images, **given, method="reconstruct_by_depth")
        measured = reconstructions if by_depth else full
        figures = {"psnr": metrics.psnr(images, reconstructions)}
        if reconstruction is not None:
            loss_of_image = jax.vmap(lambda x, y: losses.reconstruction_loss(x, y, reconstruction))
            figures["validation_loss"] = loss_of_image(images, full)
        if min(model.image_shape) >= metrics.SSIM_WINDOW:
            figures["ssim"] = metrics.ssim(images, measured)
        if perceptual is not None:
            distance = functools.partial(perceptual.distance, perceptual_variables, images)
            clipped = jnp.clip(measured, -1.0, 1.0)
            value = jnp.stack([distance(x) for x in clipped]) if by_depth else distance(clipped)
            figures[f"distance/{perceptual.name}"] = value
        counts: dict[str, Any] = {"count": jnp.sum(mask)}
        shown = images[:num_shown], reconstructions[:, :num_shown]
        if by_depth:
            figures |= _detail_and_norms(model, variables, images, reconstructions, output)
            figures["commitment_loss"] = _commitment_losses(output)
            counts["counts"] = _count_codes(model, output, mask)
        if output.grains is not None:
            counts["grains"] = count_grains(output.grains, model.num_grains, mask)
            shown += (output.grains[:num_shown],)
        weights = mask.astype(jnp.float32)
        sums = {
            name: jnp.sum(value * weights.reshape(*[1] * (value.ndim - 1), -1), -1) for name, value in figures.items()
        }
        # Only what is shown leaves the device.
        return {**sums, **counts}, (*shown, mask[:num_shown])

    def measure_placed(variables, placed, thresholds=None):
        frozen = perceptual.variables if perceptual else None
        return sum_figures(variables, placed["image"], placed["mask"], frozen, thresholds)

    return measure_placed


def _detail_and_norms(
    model: Any, variables: Any, images: jax.Array, reconstructions: jax.Array, output: Any
) -> dict[str, jax.Array]:
    """Energy of the finest detail of images (B,) and reconstructions (D, B); mean norm of the code vectors (D, B)."""
    norms_BhwD = jnp.linalg.norm(model.apply(variables, output.codes, method="code_vectors"), axis=-1)
    if (weights_Bhw := output.cell_weights) is not None:  # each code of an image once
        norms_BhwD *= (weights_Bhw / weights_Bhw.mean((1, 2), keepdims=True))[..., None]
    return {
        "detail": metrics.laplacian_energy(reconstructions),
        "detail_of_originals": metrics.laplacian_energy(images),
        "code_norm": jnp.moveaxis(norms_BhwD.mean((1, 2)), -1, 0),
    }


def _commitment_losses(output: Any) -> jax.Array:
    """Commitment loss (D, B) of each image and depth, whose mean is that of training."""

    def of_image(latents, partial_sums, weights):
        alone = latents[None], partial_sums[None], None if weights is None else weights[None]
        return losses.commitment_loss(*alone)

    by_image = jax.vmap(of_image, in_axes=(0, 0, None if output.cell_weights is None else 0))
    by_depth = jax.vmap(by_image, in_axes=(None, -3, None))
    return by_depth(output.latents, output.partial_sums[..., None, :], output.cell_weights)


def _count_codes(model: Any, output: Any, mask: jax.Array) -> jax.Array:
    """How often each code occurs at each depth (D, K) in the images that the mask counts; each of an image once."""
    K = int(np.max(model.codebook_size))
    counted = jnp.where(mask[:, None, None, None], output.codes, K)  # code K takes those of images that only fill up
    return metrics.code_counts(counted, K + 1, output.cell_weights)[:, :K]


def measure_tokenizer(
    loaded: LoadedModel,
    data: EvaluationData,
    mesh: jax.sharding.Mesh,
    perceptual: Perceptual | None = None,
    title: str = "",
    thresholds: Sequence[np.ndarray | None] = (None,),
) -> list[tuple[dict[str, Any], tuple[np.ndarray, ...]]]:
    """Measures a tokenizer on the held-out images, which are read once.

    Args:
      loaded: the tokenizer.
      data: the images.
      mesh: of the devices that share a batch.
      perceptual: the distance to measure, with its variables where they are to be read.
      title: of the progress bar.
      thresholds: of each measurement, which share one program; see `given_grains`. None: the model as it is.

    Returns:
      Of each measurement its figures, as JSON holds them; of the first held-out images what `make_measure` shows.
    """
    measure = _make_measure_placed(loaded.model, mesh, perceptual, None, True, NUM_SHOWN)
    variables = jax.device_put(loaded.variables, sharding.replicated(mesh))
    dataset = data.held_out()

    def measure_batch(batch: dict[str, np.ndarray]) -> tuple[list, list]:
        placed = _place(mesh, batch)
        sums, shown = zip(*(measure(variables, placed, each) for each in thresholds), strict=True)
        return list(sums), list(shown)

    batches = counted(dataset.iterator(), dataset.num_examples, data.batch_size, title)
    return [
        (_summarize(loaded.model, sums), _real(*map(np.asarray, shown)))
        for sums, shown in zip(*accumulate(measure_batch, batches), strict=True)
    ]


def _real(images: np.ndarray, reconstructions: np.ndarray, *grains_and_mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a measure shows, without what fills up the batch."""
    *grains, is_real = grains_and_mask
    return (images[is_real], reconstructions[:, is_real], *(one[is_real] for one in grains))


def _summarize(model: Any, sums: dict[str, jax.Array]) -> dict[str, Any]:
    """Figures by code depth, and bits, from the sums of a whole data set; of a tokenizer with grains also theirs."""
    sums, grains = dict(sums), {}
    if "grains" in sums:
        grains = describe_grains(sums.pop("grains"))
    mean = grains.get("codes_per_image/mean", math.prod(model.code_shape[:2]))
    sums = {name.split("/")[0]: np.asarray(value) for name, value in sums.items()}
    count, counts_DK = int(sums.pop("count")), sums.pop("counts")
    perplexity_D = np.asarray(metrics.code_perplexity(counts_DK))
    sharpness_D = sums.pop("detail") / sums.pop("detail_of_originals")
    D = model.code_shape[-1]
    sizes = np.broadcast_to(model.codebook_size, D)
    return {
        "images": count,
        **{name: [float(value) / count for value in sums_D] for name, sums_D in sums.items()},
        "sharpness": sharpness_D.tolist(),
        "code_usage": [float(np.mean(counts_DK[d, : sizes[d]] > 0)) for d in range(D)],
        "codes_used": metrics.overall_code_usage(counts_DK, sizes, model.use_shared_codebook),
        "code_perplexity": perplexity_D.tolist(),
        "code_entropy": np.log2(perplexity_D).tolist(),
        "codes_per_image/mean": mean,
        "num_codes": mean * D,
        "bits_per_image": bits_per_image(model, mean),
        **grains,
    }


def compare_tokenizers(
    tokenizers: Mapping[str, LoadedModel],
    data: EvaluationData,
    mesh: jax.sharding.Mesh,
    perceptual: Perceptual | None = None,
    scale: int = 1,
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Measures tokenizers, by directory, on the same images.

    Returns:
      The figures of each, and the rows of a labelled grid, enlarged by `scale`: the first images, their grain maps
      where there are any, and their reconstructions, by code depth where there is one tokenizer, else from all codes.
    """
    results, rows = {}, {}
    names = _short_names(list(tokenizers))
    for directory, loaded in tokenizers.items():
        ((figures, shown),) = measure_tokenizer(loaded, data, mesh, perceptual, title=directory)
        results[directory] = figures
        if len(tokenizers) == 1:
            rows = rows_by_depth(shown, figures["psnr"], loaded.model.num_grains, scale)
        else:
            name, (images, reconstructions, *_) = names[directory], shown
            rows = rows or {"original": enlarge(images, scale)}
            rows |= _map_rows(f"{name}: ", shown, loaded.model.num_grains, scale)
            rows |= {f"{name}: {figures['psnr'][-1]:.1f} dB": enlarge(reconstructions[-1], scale)}
    return results, rows


def _short_names(directories: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as many as tell it from the others."""
    parts = {directory: Path(directory).parts for directory in directories}
    names = {}
    for directory, own in parts.items():
        others = [other for name, other in parts.items() if name != directory]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[directory] = str(Path(*own[-count:]))
    return names


def rows_by_depth(
    shown: tuple[np.ndarray, ...], psnr_D: Any, num_grains: int = 1, scale: int = 1
) -> dict[str, np.ndarray]:
    """Rows of a labelled grid: images, their grain maps if there are any, reconstructions from the first 1..D codes.

    Args:
      shown: from `make_measure`.
      psnr_D: in dB, for the labels.
      num_grains: G.
      scale: integer factor of enlargement; the lines of grain maps are one pixel wide whatever it is.

    Returns:
      label -> uint8 images.
    """
    images, reconstructions, *_ = shown
    rows = {"original": enlarge(images, scale), **_map_rows("grains: ", shown, num_grains, scale)}
    for d, row in enumerate(reconstructions, start=1):
        rows[f"depth {d}: {psnr_D[d - 1]:.1f} dB"] = enlarge(row, scale)
    return rows


def _map_rows(prefix: str, shown: tuple[np.ndarray, ...], num_grains: int, scale: int) -> dict[str, np.ndarray]:
    """Labelled rows of the grain maps that there are, drawn over the images."""
    images, reconstructions, *maps = shown
    return {
        prefix + codes_told(np.mean(num_codes(grains, num_grains)), len(reconstructions)): draw_grains(
            images, grains, num_grains, scale
        )
        for grains in maps
    }


def picture(shown: tuple[np.ndarray, ...], psnr_D: Any, num_grains: int) -> np.ndarray:
    """The grid of an evaluation, uint8 HWC: `rows_by_depth`, small images enlarged."""
    scale = max(1, 96 // shown[0].shape[1])
    return grids.labelled_grid(rows_by_depth(shown, psnr_D, num_grains, scale))

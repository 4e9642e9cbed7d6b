"""What stage 1 counts at every step: codes, and grains where a tokenizer has them."""

import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rq_jax import metrics
from rq_jax.evaluation.grains import count_grains, describe_grains
from rq_jax.grains import repeat_cells

COLLAPSED_USAGE = 0.05  # share of a codebook in use below which a depth counts as collapsed
MIN_VECTORS_PER_CODE = 20  # in a log window, to tell a collapse from too few images or the very first steps

logger = logging.getLogger(__name__)


def count(model: Any, output: Any) -> dict[str, Any]:
    """Counts of one batch, each code of an image once.

    Returns:
      "code_counts" (D, K); of a tokenizer with grains also "grain_code_counts", such an array for each of them, and
      "grains", see `count_grains`.
    """
    K = max(model.codebook_sizes)
    counts = {"code_counts": metrics.code_counts(output.codes, K, output.cell_weights)}
    if output.grains is not None:
        cells = repeat_cells(output.grains, 1 << (model.num_grains - 1))
        of_grain = [jnp.where(cells == g, output.cell_weights, 0.0) for g in range(model.num_grains)]
        counts["grain_code_counts"] = tuple(metrics.code_counts(output.codes, K, weights) for weights in of_grain)
        counts["grains"] = count_grains(output.grains, model.num_grains)
    return counts


def summarize(model: Any, means: Mapping[str, Any], window: int) -> dict[str, float]:
    """Figures of counts; warns of a collapsing codebook.

    Args:
      model: whose codes they are.
      means: of the counts over the steps since the last log line.
      window: how many these are.
    """
    figures: dict[str, float] = {}
    for d, (usage, perplexity) in enumerate(_of_depths(model, means["code_counts"]), start=1):
        figures |= {f"code_usage/depth{d}": usage, f"code_perplexity/depth{d}": perplexity}
        K, total = model.codebook_sizes[d - 1], means["code_counts"][d - 1].sum()
        if usage < COLLAPSED_USAGE and total * window >= MIN_VECTORS_PER_CODE * K:
            restart = "" if model.use_restart else "turn on model.use_restart, or "
            logger.warning(
                "CODEBOOK COLLAPSE: depth %d used only %.1f%% of its %d codes since the last log line; "
                "%slower model.codebook_size or optim.learning_rate", d, 100 * usage, K, restart,
            )  # fmt: skip
    for g, counts_DK in enumerate(means.get("grain_code_counts", ())):
        for d, (usage, perplexity) in enumerate(_of_depths(model, counts_DK), start=1):
            name = f"grain{g}/depth{d}"
            figures |= {f"code_usage/{name}": usage, f"code_perplexity/{name}": perplexity}
    return figures | (describe_grains(means["grains"]) if "grains" in means else {})


def _of_depths(model: Any, counts_DK: np.ndarray) -> list[tuple[float, float]]:
    """Share of the codes in use, and perplexity, at each depth."""
    return [
        (float(np.mean(counts_K[:K] > 0)), float(metrics.code_perplexity(counts_K[:K])))
        for counts_K, K in zip(counts_DK, model.codebook_sizes, strict=True)
    ]


def is_count(name: str) -> bool:
    """Whether a metric of a step is one of `count`, and no scalar."""
    return name in ("code_counts", "grain_code_counts", "grains")

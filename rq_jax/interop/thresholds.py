"""Thresholds of an official DQ-VAE whose router goes by entropy, from the file that its config names."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rq_jax.files import local_path, read_json
from rq_jax.grains import ENTROPY_BINS
from rq_jax.interop import official
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

# A patch without any bin has 32 * 1e-40 * ln(1e40) there: percentiles of bins that leave out the darker half.
_NO_BIN = 1e-30

logger = logging.getLogger(__name__)


def entropy_settings(
    beside: str, path: str | None, bins: str | None, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings `thresholds` and `entropy_bins` of a converted DQ-VAE.

    Args:
      beside: directory of the config, in which the file that it names is looked for.
      path: of another file, in the original's form or from `python -m rq_jax.data.entropy`; None: the config's.
      bins: "full" or "legacy", see `grains.patch_entropy`; None: "full", as the original since July 2023.
      config: official.
      settings: from `official.dqvae_settings`.

    Raises:
      ValueError, FileNotFoundError: no such file, none of thresholds, or none for the ratio of the config; a file or
        bins for another router.
    """
    if settings["router"] != "entropy":
        if path or bins:
            raise ValueError(
                f"--thresholds, --entropy_bins: {path or bins} is for a router by entropy, and this config has a "
                "trained one; leave it out"
            )
        return {}
    bins = "full" if bins is None else bins
    checks.one_of("--entropy_bins", bins, ENTROPY_BINS)
    file = local_path(path) if path else _named_by(config, beside)
    record = read_json(file)
    is_ours = isinstance(record, dict) and isinstance(record.get("quantiles"), dict)
    values = record["quantiles"] if is_ours else record
    ratio = settings["fine_ratio"]
    key = f"{ratio:g}" if is_ours else official.threshold_key(ratio)
    threshold = values.get(key) if isinstance(values, dict) else None
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise ValueError(
            f"--thresholds: '{file}' has no number under {quoted(key)}, which is that of the ratio {ratio:g}"
        )
    numbers = [value for value in values.values() if isinstance(value, int | float)]
    if bins == "full" and not is_ours and 0 < min(numbers) < _NO_BIN:
        logger.warning(
            "--entropy_bins: '%s' was measured with the bins of before July 2023, which leave out the darker half of "
            "all values, and the released checkpoint was made with these; --entropy_bins=legacy routes by them", file,
        )  # fmt: skip
    return {"thresholds": (float(threshold),), "entropy_bins": bins}


def _named_by(config: Mapping[str, Any], beside: str) -> Path:
    """The file that a config names by a path of its author's, beside the config."""
    named = official.thresholds_path(config)
    if isinstance(named, str) and named:
        for candidate in (Path(beside, named), Path(beside, os.path.basename(named))):
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(
        f"--thresholds: missing, and {quoted(named)}, which the config names, is not beside it; give the file"
    )

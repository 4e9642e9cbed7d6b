"""Thresholds of an official DQ-VAE whose router goes by entropy, from the file that its config names."""

import logging
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
    file = local_path(path) if path else _named_by(config, beside)
    record, ratio = read_json(file), settings["fine_ratio"]
    if is_ours := isinstance(record.get("quantiles"), dict):
        bins = _bins_of(file, record, bins, settings)
        values, key = record["quantiles"], f"{ratio:g}"
    else:
        values, key = record, official.threshold_key(ratio)
    bins = "full" if bins is None else bins
    checks.one_of("--entropy_bins", bins, ENTROPY_BINS)
    threshold = values.get(key)
    if not _is_number(threshold):
        raise ValueError(
            f"--thresholds: '{file}' has no number under {quoted(key)}, which is that of the ratio {ratio:g}"
        )
    if bins == "full" and not is_ours and 0 < min(filter(_is_number, values.values())) < _NO_BIN:
        logger.warning(
            "--entropy_bins: '%s' was measured with the bins of before July 2023, which leave out the darker half of "
            "all values, and the released checkpoint was made with these; --entropy_bins=legacy routes by them", file,
        )  # fmt: skip
    return {"thresholds": (float(threshold),), "entropy_bins": bins}


def _bins_of(file: Any, record: Mapping[str, Any], bins: str | None, settings: Mapping[str, Any]) -> str:
    """The bins of a file from `rq_jax.data.entropy`, which says how its entropies were measured.

    Raises:
      ValueError: they are others than the model's, or than the flag's.
    """
    region = 2 ** (len(settings["width_multipliers"]) - 1)
    needed = {"patch_size": region, "num_bins": 32, "sigma": 0.01, **({} if bins is None else {"bins": bins})}
    for name, value in needed.items():
        if record.get(name) != value:
            raise ValueError(
                f"--thresholds: '{file}' was measured with {name} {quoted(record.get(name))}, and not with {value}; "
                "measure with python -m rq_jax.data.entropy, or give the right file"
            )
    return record.get("bins", "full")


def _is_number(value: Any) -> bool:
    """A float32, written as JSON has numbers; integers there have any size."""
    return type(value) in (int, float) and abs(value) < 3e38


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

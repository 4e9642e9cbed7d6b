"""Presets by name, of every config file."""

from typing import Any

from configs import dqvae, rqtransformer, rqvae
from rq_jax.settings import checks
from rq_jax.training.settings import plain

FILES = {"rqvae": rqvae, "dqvae": dqvae, "rqtransformer": rqtransformer}


def load(name: str, file: str) -> dict[str, Any]:
    """Settings of a preset, as nested dicts.

    Args:
      name: of the preset, or "<file>:<preset>", such as "dqvae:demo".
      file: in `FILES`, where the name says none.

    Raises:
      ValueError: an unknown file or preset.
    """
    given, colon, preset = name.rpartition(":")
    if colon:
        checks.one_of("preset", given, tuple(FILES))
    settings = plain(FILES[given if colon else file].get_config(preset))
    model = settings["model"]
    if model.get("router") == "entropy" and model["thresholds"] is None:  # measured before training
        model["thresholds"] = tuple(map(float, range(1, model["num_grains"])))
    return settings

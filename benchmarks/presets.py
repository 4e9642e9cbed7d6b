"""Presets by name, of every config file."""

from typing import Any

from configs import dqtransformer, dqvae, rqtransformer, rqvae
from rq_jax.recipes.thresholds import with_stand_ins
from rq_jax.settings import checks
from rq_jax.training.settings import plain

# Config files by stage; a name that says none is of the first.
FILES = {1: {"rqvae": rqvae, "dqvae": dqvae}, 2: {"rqtransformer": rqtransformer, "dqtransformer": dqtransformer}}


def load(name: str, stage: int) -> dict[str, Any]:
    """Settings of a preset, as nested dicts.

    Args:
      name: of the preset, or "<file>:<preset>", such as "dqvae:demo".
      stage: of its model, 1 or 2.

    Raises:
      ValueError: a file that is none of this stage, or an unknown preset.
    """
    (file, colon, preset), files = name.rpartition(":"), FILES[stage]
    if colon:
        checks.one_of("preset", file, tuple(files))
    settings = plain((files[file] if colon else next(iter(files.values()))).get_config(preset))
    return {**settings, "model": with_stand_ins(settings["model"])}  # of thresholds that training would measure

"""Checkpoints: load, save, resume, ship.

`load` reads a model from a directory, `saver` saves and restores the states of a run, `model_dir` reads and writes
weights alone, `manifest` the checksums that seal a checkpoint.
"""

from rq_jax.checkpoint.load import (
    LoadedModel,
    bind_tokenizer,
    has_checkpoint,
    load_model,
    load_tokenizer,
    read_tokenizer_config,
    ship,
    start_from,
)
from rq_jax.checkpoint.model_dir import fingerprint, read_config, save_model, write_config
from rq_jax.checkpoint.saver import Checkpointer, SaveFailed

__all__ = [
    "Checkpointer",
    "LoadedModel",
    "SaveFailed",
    "bind_tokenizer",
    "fingerprint",
    "has_checkpoint",
    "load_model",
    "load_tokenizer",
    "read_config",
    "read_tokenizer_config",
    "save_model",
    "ship",
    "start_from",
    "write_config",
]

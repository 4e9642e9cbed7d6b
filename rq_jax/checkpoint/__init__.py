"""Checkpoints: load, save, resume, ship.

`load` reads a model from a directory, `hub` finds one on the Hugging Face Hub and `remote` in an object store, `saver`
saves and restores the states of a run, `items` reads what Orbax writes of one, `manifest` holds the checksums that seal
it; `model_dir` reads and writes weights alone, `tensors` their files, `config` the settings beside them.
"""

from rq_jax.checkpoint.config import read_config, write_config
from rq_jax.checkpoint.hub import is_address, local_directory, origin_of, pinned, pinned_as
from rq_jax.checkpoint.load import (
    LoadedModel,
    bind_tokenizer,
    check_start_from,
    has_checkpoint,
    load_model,
    load_tokenizer,
    read_tokenizer_config,
    ship,
    start_from,
    step_of,
    tokenizer_of,
)
from rq_jax.checkpoint.model_dir import PROMPTS, TEXT_TOKENIZER, fingerprint, save_model
from rq_jax.checkpoint.remote import RunDirectory
from rq_jax.checkpoint.saver import Checkpointer, SaveFailed

__all__ = [
    "PROMPTS",
    "TEXT_TOKENIZER",
    "Checkpointer",
    "LoadedModel",
    "RunDirectory",
    "SaveFailed",
    "bind_tokenizer",
    "check_start_from",
    "fingerprint",
    "has_checkpoint",
    "is_address",
    "load_model",
    "load_tokenizer",
    "local_directory",
    "origin_of",
    "pinned",
    "pinned_as",
    "read_config",
    "read_tokenizer_config",
    "save_model",
    "ship",
    "start_from",
    "step_of",
    "tokenizer_of",
    "write_config",
]

"""Published PyTorch checkpoints in our names and layout, and back.

Of kakaobrain/rq-vae-transformer: RQ-VAE, RQ-Transformer and discriminator; of CompVis/taming-transformers: VQGAN, which
is an RQ-VAE of depth 1; of CrossmodalGroup/DynamicVectorQuantization: DQ-VAE and DQ-Transformer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rq_jax.interop.official.checkpoints import (
    Leaf,
    Weights,
    find_kind,
    find_weights,
    holds_discriminator,
    leaves_of,
    name_left_out,
    pick_weights,
)
from rq_jax.interop.official.config import left_out_settings, official_config
from rq_jax.interop.official.dqtransformer import dqtransformer_settings, dqtransformer_table, first_stage
from rq_jax.interop.official.dqvae import dqvae_settings, name_thresholds, threshold_key, thresholds_path
from rq_jax.interop.official.dqvae_table import dqvae_table
from rq_jax.interop.official.rules import Rule, Table, export_state, import_state, listed
from rq_jax.interop.official.settings import (
    Settings,
    discriminator_settings,
    has_discriminator,
    rqtransformer_settings,
    rqvae_settings,
    sample_settings,
    vqgan_settings,
)
from rq_jax.interop.official.tables import discriminator_table, rqtransformer_table, rqvae_table, vqgan_table

__all__ = [
    "KINDS",
    "Leaf",
    "Rule",
    "Table",
    "Weights",
    "discriminator_settings",
    "discriminator_table",
    "discriminator_variables",
    "dqtransformer_settings",
    "dqtransformer_table",
    "dqtransformer_variables",
    "dqvae_settings",
    "dqvae_table",
    "dqvae_variables",
    "find_kind",
    "find_weights",
    "first_stage",
    "has_discriminator",
    "holds_discriminator",
    "leaves_of",
    "left_out_settings",
    "listed",
    "name_left_out",
    "name_thresholds",
    "official_config",
    "official_state",
    "pick_weights",
    "rqtransformer_settings",
    "rqtransformer_table",
    "rqtransformer_variables",
    "rqvae_settings",
    "rqvae_table",
    "rqvae_variables",
    "sample_settings",
    "threshold_key",
    "thresholds_path",
    "vqgan_settings",
    "vqgan_table",
    "vqgan_variables",
]


class Kind(NamedTuple):
    """A kind of official checkpoint.

    Attributes:
      model: name of our model.
      settings, table, variables: the functions that convert it. Those of a transformer's settings also take the
        complete settings of its tokenizer.
      tokenizer: name of the model of a transformer's tokenizer; None for what is no transformer.
    """

    model: str
    settings: Callable[..., dict[str, Any]]
    table: Callable[[Settings], Table]
    variables: Callable[[Mapping[str, Any], Settings], dict[str, Any]]
    tokenizer: str | None = None


def rqvae_variables(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Variables of an RQ-VAE, {"params": ..., "codebook": ...} in float32, from an official state dict.

    The padding row of each codebook and the copies of a shared codebook are dropped.

    Args:
      state: all tensors by official name; each is read when its turn comes.
      settings: from `rqvae_settings`.

    Raises:
      ValueError: naming all tensors that are missing, unexpected, misshapen or of a wrong type, and copies that differ.
    """
    variables = import_state(state, rqvae_table(settings))
    codebook = variables["codebook"]
    # Codebooks of unequal size are a tuple; the last part of their paths is the depth.
    variables["codebook"] = {k: tuple(v.values()) if isinstance(v, dict) else v for k, v in codebook.items()}
    return variables


def vqgan_variables(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Variables of an RQ-VAE from the state dict of a VQGAN; arguments and errors as in `rqvae_variables`."""
    variables = import_state(state, vqgan_table(settings))
    codebook_KE = variables["codebook"]["codebook_KE"]
    # A codebook that is learned by gradient keeps no moving average: ours starts as if each code had been used once.
    variables["codebook"] |= {"counts_K": np.ones(len(codebook_KE), np.float32), "sums_KE": codebook_KE.copy()}
    return variables


def rqtransformer_variables(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Variables of an RQ-Transformer, {"params": ...} in float32, from an official state dict.

    The collection "codebook" is the tokenizer's and for the caller to add. Arguments and errors as in
    `rqvae_variables`, with settings from `rqtransformer_settings`.
    """
    return import_state(state, rqtransformer_table(settings))


def dqvae_variables(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Variables of a DQ-VAE, {"params": ..., "codebook": ...} in float32, from an official state dict.

    The padding row of the codebook, which is drawn like all others and not zero, is dropped. Arguments and errors as in
    `rqvae_variables`, with settings from `dqvae_settings`.
    """
    return import_state(state, dqvae_table(settings))


def dqtransformer_variables(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Variables of a DQ-Transformer; arguments and errors as in `rqvae_variables`, settings of its own."""
    return import_state(state, dqtransformer_table(settings))


def discriminator_variables(state: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Variables of a discriminator, {"params": ..., "batch_stats": ...}; settings from `discriminator_settings`."""
    return import_state(state, discriminator_table(settings))


def official_state(name: str, variables: dict[str, Any], settings: Settings) -> dict[str, np.ndarray]:
    """The official state dict of one of our models; the inverse of the functions above.

    Args:
      name: "rqvae", "dqvae", "rqtransformer", "dqtransformer" (both without a collection "codebook") or
        "discriminator".
      variables: of the model; they are emptied, so that nothing is held twice.
      settings: as `models.create` takes them.

    Raises:
      ValueError: the original has no such model, or no place for some of the variables.
    """
    if "codebook" in variables:
        codebook = variables["codebook"]
        for key, value in codebook.items():
            if isinstance(value, (tuple, list)):
                codebook[key] = {str(depth): array for depth, array in enumerate(value)}
    return export_state(variables, KINDS[name].table(settings))


KINDS = {
    "rqvae": Kind("rqvae", rqvae_settings, rqvae_table, rqvae_variables),
    "vqgan": Kind("rqvae", vqgan_settings, vqgan_table, vqgan_variables),
    "dqvae": Kind("dqvae", dqvae_settings, dqvae_table, dqvae_variables),
    "rqtransformer": Kind(
        "rqtransformer", rqtransformer_settings, rqtransformer_table, rqtransformer_variables, "rqvae"
    ),
    "dqtransformer": Kind(
        "dqtransformer", dqtransformer_settings, dqtransformer_table, dqtransformer_variables, "dqvae"
    ),
    "discriminator": Kind("discriminator", discriminator_settings, discriminator_table, discriminator_variables),
}

"""Nats per code under a transformer, of images as the data set gives them and their nearest codes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.devices import sharding
from rq_jax.evaluation.protocol import cond_of
from rq_jax.losses import cross_entropy_by_depth


def code_nats(model: Any, variables: Any, codes: jax.Array, cond: jax.Array | None) -> jax.Array:
    """Nats per code of each image at each depth, mean over positions.

    Args:
      model: an `RQTransformer`.
      variables: its variables.
      codes: (B, h, w, D).
      cond: (B, U) int32, None for an unconditional model.

    Returns:
      (B, D).
    """
    context, _, _ = model.apply(variables, codes, cond, method="spatial")
    hidden, _ = model.apply(variables, context, codes, method="depth")
    classify = functools.partial(model.apply, variables, method="classify")
    return cross_entropy_by_depth(classify, max(model.codebook_sizes), hidden, codes)


def make_measure(
    model: Any, tokenizer: Any, mesh: jax.sharding.Mesh
) -> Callable[[Any, Any, dict[str, np.ndarray]], tuple[dict[str, jax.Array], None]]:
    """Builds the function that measures a transformer on one batch, spread over a mesh.

    Args:
      model: an `RQTransformer`.
      tokenizer: the `RQVAE` whose codes it models.
      mesh: its data and fsdp devices share a batch evenly.

    Returns:
      (variables, tokenizer_variables, batch) -> ({"nats": (D,), "count": ()}, None), replicated: sums over the images
      that the mask counts, and their number. The batch holds this process's "image" (B, H, W, C) in [-1, 1], "mask"
      (B,) and, for a conditional model, "cond" (B, U).
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def sum_nats(variables, tokenizer_variables, batch):
        codes = tokenizer.apply(tokenizer_variables, batch["image"], method="encode_to_codes")
        nats_BD = code_nats(model, variables, codes, batch.get("cond"))
        return {"nats": jnp.sum(nats_BD * batch["mask"][:, None], axis=0), "count": batch["mask"].sum()}

    def measure(variables, tokenizer_variables, batch):
        used = {"image": batch["image"], "mask": batch["mask"]}
        if model.is_conditional:
            used["cond"] = cond_of(batch)
        return sum_nats(variables, tokenizer_variables, sharding.put_batch(mesh, used)), None

    return measure

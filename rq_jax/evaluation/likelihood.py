"""Nats per code under a transformer, of images as the data set gives them and their nearest codes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.checkpoint import LoadedModel, load_model
from rq_jax.devices import sharding
from rq_jax.evaluation.accumulate import accumulate, counted
from rq_jax.evaluation.protocol import EvaluationData, condition_settings, image_settings
from rq_jax.grains import GrainedCodes, PackedCodes, pack
from rq_jax.losses import StreamNats, cross_entropy_by_depth, stream_nats_of_hidden


def code_nats(model: Any, variables: Any, codes: jax.Array, cond: jax.Array | None, num_devices: int = 1) -> jax.Array:
    """Nats per code of each image at each depth, mean over positions.

    Args:
      model: an `RQTransformer`.
      variables: its variables.
      codes: (B, h, w, D).
      cond: (B, U) int32, None for an unconditional model.
      num_devices: that share the batch.

    Returns:
      (B, D).
    """
    context, _, _ = model.apply(variables, codes, cond, method="spatial")
    hidden, _ = model.apply(variables, context, codes, method="depth")
    classify = functools.partial(model.apply, variables, method="classify")
    return cross_entropy_by_depth(classify, max(model.codebook_sizes), hidden, codes, num_devices=num_devices)


def hidden_nats(
    model: Any, variables: Any, hidden: jax.Array, deep_hidden: jax.Array, tokens: PackedCodes, num_devices: int = 1
) -> StreamNats:
    """`losses.stream_nats` of the hidden states of a `DQTransformer`, classified chunk by chunk."""
    classify = [
        functools.partial(model.apply, variables, method=f"classify_{what}") for what in ("position", "content")
    ]
    return stream_nats_of_hidden(*classify, hidden, deep_hidden, tokens, model.layout, num_devices)


def code_stream_nats(
    model: Any, variables: Any, packed: PackedCodes, cond: jax.Array | None, num_devices: int = 1
) -> StreamNats:
    """Nats of each image under a transformer over packed codes, of all positions and of the codes alone.

    What stands at an end or a start token is known with its position: such contents count nothing here, where the
    objective of training counts them.

    Args:
      model: a `DQTransformer`.
      variables: its variables.
      packed: tokens of B images.
      cond: (B, U) int32, None for an unconditional model.
      num_devices: that share the batch.
    """
    hidden = model.apply(variables, packed, cond, method="hidden")
    layout, content = model.layout, hidden.tokens.content
    targets = hidden.tokens._replace(content=jnp.where(content < layout.codebook_size, content, layout.content_pad))
    return hidden_nats(model, variables, hidden.position, hidden.content, targets, num_devices)


def image_nats(model: Any, variables: Any, codes: Any, cond: jax.Array | None, num_devices: int = 1) -> dict[str, Any]:
    """What an evaluation adds up of each image (B, ...).

    Args:
      codes: as the tokenizer's `encode_to_codes` gives them; all else as for `code_nats`.

    Returns:
      {"nats": `code_nats`}, or the sums and counts of `code_stream_nats` by their names.
    """
    if not isinstance(codes, GrainedCodes):
        return {"nats": code_nats(model, variables, codes, cond, num_devices)}
    return code_stream_nats(model, variables, pack(codes, model.layout), cond, num_devices)._asdict()


def make_measure(
    model: Any, tokenizer: Any, mesh: jax.sharding.Mesh, num_steps: int = 1
) -> Callable[[Any, Any, dict[str, np.ndarray]], tuple[dict[str, jax.Array], None]]:
    """Builds the function that measures a transformer on one batch, spread over a mesh.

    Args:
      model: an `RQTransformer` or a `DQTransformer`.
      tokenizer: the tokenizer whose codes it models.
      mesh: its data and fsdp devices share a batch evenly.
      num_steps: micro-batches that a batch is measured in, a divisor of the images of a device.

    Returns:
      (variables, tokenizer_variables, batch) -> ({"nats": (D,), "count": ()}, None), replicated: sums of `image_nats`
      over the images that the mask counts, and their number. The batch holds this process's "image" (B, H, W, C) in
      [-1, 1], "mask" (B,) and, for a conditional model, "cond" (B, U).
    """

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def sum_nats(variables, tokenizer_variables, batch):
        def measure_part(part):
            images = sharding.split_batch(mesh, part["image"], sharding.AXES)
            codes = tokenizer.apply(tokenizer_variables, images, method="encode_to_codes")
            codes = sharding.split_batch(mesh, codes)
            return image_nats(model, variables, codes, part.get("cond"), mesh.size)

        with sharding.activations(mesh):
            of_images = sharding.map_micro_batches(measure_part, batch, num_steps)
        counts_B1 = batch["mask"].astype(jnp.float32)[:, None]
        sums = jax.tree.map(lambda x: jnp.sum(x * counts_B1, axis=0), of_images)
        return {**sums, "count": batch["mask"].sum()}

    def measure(variables, tokenizer_variables, batch):
        used = {"image": batch["image"], "mask": batch["mask"]}
        if model.is_conditional:
            used["cond"] = batch["cond"]
        return sum_nats(variables, tokenizer_variables, sharding.put_batch(mesh, used)), None

    return measure


def load_transformer(
    directory: str, step: int | None = None, ema: bool = True, name: str | None = None, data_dir: str | None = None
) -> tuple[LoadedModel, dict[str, Any]]:
    """Loads a transformer and the settings of its images and conditions.

    Args:
      directory, step, ema: as for `checkpoint.load_model`.
      name, data_dir: of another data set, see `protocol.image_settings`.

    Raises:
      ValueError: no tokenizer comes with the model, or no data set is named.
      FileNotFoundError: no such directory or checkpoint.
    """
    loaded = load_model(directory, step, ema)
    if loaded.tokenizer is None:
        raise ValueError(f"--checkpoint: '{directory}' carries no tokenizer; give the directory of a stage-2 run")
    tokenizer = loaded.tokenizer.model
    settings = image_settings(loaded.config, (*tokenizer.image_shape, tokenizer.in_channels), directory, name, data_dir)
    return loaded, settings | condition_settings(loaded.config, directory)


# The program of one split is that of the next.
_kept_measure = functools.lru_cache(maxsize=1)(make_measure)


def measure_likelihood(
    loaded: LoadedModel, data: EvaluationData, split: str, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Nats per code of the images of a split, by depth and their mean, as JSON holds them.

    With grains also of positions, see `describe_streams`.

    Args:
      loaded: a transformer with its tokenizer.
      data: images and conditions.
      split: a name that `data.open` takes.
      mesh: of the devices that share a batch.
    """
    measure = _kept_measure(loaded.model, loaded.tokenizer.model, mesh)
    variables = jax.device_put((loaded.variables, loaded.tokenizer.variables), sharding.replicated(mesh))
    dataset = data.open(split)
    batches = counted(dataset.iterator(), dataset.num_examples, data.batch_size, f"likelihood of {split}")
    sums, _ = accumulate(functools.partial(measure, *variables), batches)
    count = int(sums["count"])
    if "position" in sums:
        return {"images": count, **describe_streams(sums)}
    nats = [float(value) / count for value in sums["nats"]]
    return {"images": count, "nats": nats, "mean": float(np.mean(nats))}


def describe_streams(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the sums of `code_stream_nats` over images, as JSON holds them.

    Args:
      sums: from `make_measure`.

    Returns:
      "nats" per code at each depth and their "mean"; "position_nats" per position of each grain and
      "mean_position_nats" over all positions; "bits_per_image", of positions and codes together.
    """
    totals = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    nats_D = totals["content"] / totals["content_counts"]
    total = totals["position"].sum() + totals["content"].sum()
    return {
        "nats": nats_D.tolist(),
        "mean": float(nats_D.mean()),
        "position_nats": (totals["position"] / totals["position_counts"]).tolist(),
        "mean_position_nats": float(totals["position"].sum() / totals["position_counts"].sum()),
        "bits_per_image": float(total / totals["count"] / np.log(2)),
    }

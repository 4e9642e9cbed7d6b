"""Operations and bytes of sampling, and the least time that a device needs for given work.

A multiplication and its addition are two operations; only matrix products and convolutions are counted.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rq_jax.devices.peaks import Peaks
from rq_jax.models.flops import Work, causal_pairs, transformer_flops

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class Roofline(NamedTuple):
    """Least time of some work.

    Attributes:
      seconds: least time.
      bound: "compute" or "bandwidth", whichever limits most of it.
      compute_seconds: least time of the arithmetic alone.
    """

    seconds: float
    bound: str
    compute_seconds: float


def roofline(stages: Mapping[str, Work], peaks: Peaks) -> Roofline:
    """Least time of stages that run one after another, each as long as the slower of its arithmetic and its traffic.

    Args:
      stages: work by name; each is assumed to reach either peak, and to overlap arithmetic and traffic.
      peaks: of all devices that share the work.
    """
    compute = {name: work.flops / peaks.flops[work.dtype] for name, work in stages.items()}
    traffic = {name: work.bytes / peaks.bandwidth for name, work in stages.items()}
    seconds = sum(max(compute[name], traffic[name]) for name in stages)
    waited = sum(traffic[name] for name in stages if traffic[name] > compute[name])
    return Roofline(seconds, "bandwidth" if waited > seconds / 2 else "compute", sum(compute.values()))


def weights_read(model: Any, dtype: str) -> dict[str, float]:
    """Bytes of weights that sampling a batch of any size reads, by part.

    A weight is read again for every token that needs it: the spatial stack h*w times, the depth stack and the
    classifier h*w*D times. Biases, norms and scales are left out.
    """
    (h, w, D), M, size = model.code_shape, model.model_dim, BYTES[dtype]
    layer, steps = 12 * M * M * size, h * w
    return {
        "spatial": float(steps * model.spatial_layers * layer),
        "depth": float(steps * D * model.depth_layers * layer),
        "classifier": float(steps * D * M * max(model.codebook_sizes) * size),
    }


def cache_traffic(model: Any, dtype: str) -> dict[str, float]:
    """Bytes of keys and values that sampling one image reads and writes, by part: each step reads the filled rows."""
    (h, w, D), U = model.code_shape, model.cond_length
    steps, row = h * w, 2 * model.model_dim * BYTES[dtype]
    spatial_rows = (steps * U + causal_pairs(steps - 1)) + (U + steps - 1)
    return {
        "spatial": float(model.spatial_layers * row * spatial_rows),
        "depth": float(model.depth_layers * row * steps * (causal_pairs(D) + D)),
    }


def cache_size(model: Any, dtype: str) -> float:
    """Bytes of keys and values that one image holds at the end."""
    (h, w, D), row = model.code_shape, 2 * model.model_dim * BYTES[dtype]
    return float(row * (model.spatial_layers * (model.cond_length + h * w - 1) + model.depth_layers * D))


def sampling_work(model: Any, batch: int, weights: str = "bfloat16", guidance: bool = False) -> dict[str, Work]:
    """Work of sampling a batch of code grids, by part.

    Keys and values have the dtype of the computation; products are bfloat16 where it or the weights are. Logits are
    written once and read once, in float32; other activations are taken to stay on the chip.

    Args:
      model: an `RQTransformer`, or whatever has its attributes.
      batch: B, images.
      weights: dtype at rest, "int8" too.
      guidance: classifier-free guidance, which runs every image twice.
    """
    rows, dtype = batch * (2 if guidance else 1), "bfloat16" if "bfloat16" in (model.dtype, weights) else "float32"
    flops, read, cached = transformer_flops(model), weights_read(model, weights), cache_traffic(model, model.dtype)
    cached["classifier"] = 2.0 * BYTES["float32"] * math.prod(model.code_shape) * max(model.codebook_sizes)
    return {name: Work(rows * flops[name], read[name] + rows * cached[name], dtype) for name in read}

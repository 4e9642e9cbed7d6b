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


def weights_read(model: Any, dtype: str, tokens: int | None = None) -> dict[str, float]:
    """Bytes of weights that sampling a batch of any size reads, by part.

    A weight is read again for every token that needs it: a stack over the positions once a step, the depth stack D
    times, and each classifier for whatever it names. Biases, norms and scales are left out.

    Args:
      model: an `RQTransformer` or a `DQTransformer`, or whatever has its attributes.
      dtype: of the weights.
      tokens: of an image, of a `DQTransformer`; None: those of the longest.
    """
    D, M, size, steps = model.code_shape[-1], model.model_dim, BYTES[dtype], _steps(model, tokens)
    layer = 12 * M * M * size
    return {
        **{name: float(steps * layers * layer) for name, (layers, _) in _stacks(model).items()},
        "depth": float(steps * D * model.depth_layers * layer),
        "classifier": float(steps * M * _logits(model) * size),
    }


def cache_traffic(model: Any, dtype: str, tokens: int | None = None) -> dict[str, float]:
    """Bytes of keys and values that sampling one image reads and writes, by part: each step reads the filled rows."""
    D, row, steps = model.code_shape[-1], 2 * model.model_dim * BYTES[dtype], _steps(model, tokens)
    rows = {
        name: layers * ((steps * first + causal_pairs(steps - 1)) + (first + steps - 1))
        for name, (layers, first) in _stacks(model).items()
    }
    rows["depth"] = model.depth_layers * steps * (causal_pairs(D) + D)
    return {name: float(row * count) for name, count in rows.items()}


def cache_size(model: Any, dtype: str) -> float:
    """Bytes of keys and values that one image holds at the end; of a `DQTransformer` there is room for the longest."""
    D, row, steps = model.code_shape[-1], 2 * model.model_dim * BYTES[dtype], _steps(model)
    held = sum(layers * (first + steps - 1) for layers, first in _stacks(model).values())
    return float(row * (held + model.depth_layers * D))


def _stacks(model: Any) -> dict[str, tuple[int, int]]:
    """Stacks over the positions: layers, and tokens that are there before the first step."""
    if hasattr(model, "layout"):
        return {"position": (model.position_layers, model.text_length + 1), "content": (model.content_layers, 1)}
    return {"spatial": (model.spatial_layers, model.cond_length)}


def _steps(model: Any, tokens: int | None = None) -> int:
    """Steps that draw an image: one for each position, or for each token after the first."""
    if hasattr(model, "layout"):
        return (model.layout.max_tokens if tokens is None else tokens) - 1
    return math.prod(model.code_shape[:2])


def _logits(model: Any) -> int:
    """Logits of one step."""
    D = model.code_shape[-1]
    if hasattr(model, "layout"):
        return model.layout.position_size(model.num_grains - 1) + D * model.layout.content_size
    return D * max(model.codebook_sizes)


def sampling_work(
    model: Any, batch: int, weights: str = "bfloat16", guidance: bool = False, tokens: int | None = None
) -> dict[str, Work]:
    """Work of sampling a batch of code grids, by part.

    Keys and values have the dtype of the computation; products are bfloat16 where it or the weights are. Logits are
    written once and read once, in float32; other activations are taken to stay on the chip.

    Args:
      model: an `RQTransformer` or a `DQTransformer`, or whatever has its attributes.
      batch: B, images.
      weights: dtype at rest, "int8" too.
      guidance: classifier-free guidance, which runs every image twice.
      tokens: of an image, of a `DQTransformer`; None: those of the longest.
    """
    rows, dtype = batch * (2 if guidance else 1), "bfloat16" if "bfloat16" in (model.dtype, weights) else "float32"
    flops, read = transformer_flops(model, tokens=tokens), weights_read(model, weights, tokens)
    cached = cache_traffic(model, model.dtype, tokens)
    cached["classifier"] = 2.0 * BYTES["float32"] * _steps(model, tokens) * _logits(model)
    return {name: Work(rows * flops[name], read[name] + rows * cached[name], dtype) for name in flops}

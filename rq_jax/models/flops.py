"""Floating-point operations of the models, and of any traced program."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

BACKWARD = 2  # a backward pass is worth two forward passes: gradients of inputs and of weights


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations on numbers of a dtype, and bytes that have to come from or go to the device's memory."""

    flops: float
    bytes: float
    dtype: str = "float32"

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.dtype)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times, self.dtype)


def transformer_flops(model: Any, train: bool = False, tokens: int | None = None) -> dict[str, float]:
    """Operations for one image, by part: the stacks, "classifier" and, for models of text, "condition".

    Each part includes its embeddings; causal attention counts the pairs of a query and a key it may see.

    Args:
      model: an `RQTransformer` or a `DQTransformer`, or whatever has its attributes.
      train: with the backward pass: three times the forward pass. Recomputation is not counted.
      tokens: of an image, where images differ: of a `DQTransformer`; None: those of the longest.
    """
    if hasattr(model, "layout"):
        flops = _packed_flops(model, model.layout.max_tokens if tokens is None else tokens)
    else:
        flops = _grid_flops(model)
    if train and model.cond_length > 1:
        flops["condition"] = 2 * (model.cond_length - 1) * model.model_dim * model.cond_vocab_size
    return {name: float(value * (1 + BACKWARD * train)) for name, value in flops.items()}


def _grid_flops(model: Any) -> dict[str, float]:
    (h, w, D), M, U = model.code_shape, model.model_dim, model.cond_length
    T, embed = h * w, 2 * model.code_dim * M
    return {
        "spatial": _stack_flops(M, model.spatial_layers, U + T - 1) + embed * (T - 1) * model.use_tokenizer_input,
        "depth": T * (_stack_flops(M, model.depth_layers, D) + embed * (D - 1) * model.use_tokenizer_depth_input),
        "classifier": 2 * T * D * M * max(model.codebook_sizes),
    }


def _packed_flops(model: Any, tokens: int) -> dict[str, float]:
    D, M, layout, slots = model.code_shape[-1], model.model_dim, model.layout, tokens - 1
    flops = {
        "position": _stack_flops(M, model.position_layers, model.text_length + slots),
        "content": _stack_flops(M, model.content_layers, slots),
        "classifier": 2 * slots * M * (layout.position_size(model.num_grains - 1) + D * layout.content_size),
    }
    if D > 1:
        flops["depth"] = slots * (_stack_flops(M, model.depth_layers, D) + 2 * model.code_dim * M * (D - 1))
    return flops


def _stack_flops(M: int, layers: int, tokens: int) -> float:
    return layers * (24 * M * M * tokens + 4 * M * causal_pairs(tokens))


def search_work(num_vectors: int, code_dim: int, codebook_size: int, depth: int) -> Work:
    """Residual quantisation of N vectors: all distances at each depth; codebook and vectors pass through memory."""
    N, E, K, D = num_vectors, code_dim, codebook_size, depth
    return Work(2.0 * N * E * K * D, 4.0 * D * E * (K + 2 * N))


def causal_pairs(tokens: int) -> int:
    """Pairs of a query and a key that it may see, itself included, in a sequence of tokens."""
    return tokens * (tokens + 1) // 2


def encoder_work(model: Any, batch: int = 1) -> Work:
    """Work of encoding a batch of images to latents; see `ProgramCounts` for the bytes."""
    images = jax.ShapeDtypeStruct((batch, *model.image_shape, model.in_channels), jnp.float32)
    return _apply_work(model, images, "encode")


def decoder_work(model: Any, batch: int = 1) -> Work:
    """Work of decoding a batch of code grids to images; see `ProgramCounts` for the bytes."""
    return _apply_work(model, jax.ShapeDtypeStruct((batch, *model.code_shape), jnp.int32), "decode_codes")


def autoencoder_flops(model: Any) -> float:
    """Operations of training on one image: encoder and decoder forward and backward, and the codebook search."""
    h, w, D = model.code_shape
    search = search_work(h * w, model.code_dim, max(model.codebook_sizes), D).flops
    return (1 + BACKWARD) * (encoder_work(model).flops + decoder_work(model).flops) + search


def _apply_work(model: Any, inputs: jax.ShapeDtypeStruct, method: str) -> Work:
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))
    counts = count_traced(lambda variables, x: model.apply(variables, x, method=method), variables, inputs)
    return Work(counts.flops, counts.bytes, model.dtype)


@dataclasses.dataclass
class ProgramCounts:
    """Operations that a program executes: loops count their trips, of several branches the largest counts.

    Attributes:
      flops: of products and convolutions.
      bytes: of their operands and results, each read or written once: traffic when everything else is fused into them.
        Traced programs only.
      ops: executions of each operation, by its name in the program.
      loop_ops: executions inside a loop.
      unknown_loops: loops without a static trip count, such as `while`; they count as one trip.
    """

    flops: float = 0.0
    bytes: float = 0.0
    ops: Counter[str] = dataclasses.field(default_factory=Counter)
    loop_ops: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, part: "ProgramCounts", times: int = 1, in_loop: bool = False) -> None:
        """Add a part that runs `times` times."""
        self.flops += times * part.flops
        self.bytes += times * part.bytes
        self.unknown_loops += part.unknown_loops
        for name, count in part.ops.items():
            self.ops[name] += times * count
        for name, count in (part.ops if in_loop else part.loop_ops).items():
            self.loop_ops[name] += times * count


def largest(branches: Iterable[ProgramCounts]) -> ProgramCounts:
    """The largest of each count over the branches of a conditional."""
    most = ProgramCounts()
    for branch in branches:
        most.flops, most.bytes = max(most.flops, branch.flops), max(most.bytes, branch.bytes)
        most.ops, most.loop_ops = most.ops | branch.ops, most.loop_ops | branch.loop_ops
        most.unknown_loops = max(most.unknown_loops, branch.unknown_loops)
    return most


def count_traced(function: Callable[..., Any], *args: Any) -> ProgramCounts:
    """Counts of a function as JAX traces it, before any optimisation; arguments may be shapes."""
    return _count_jaxpr(jax.jit(function).trace(*args).jaxpr.jaxpr)


def _count_jaxpr(jaxpr: Jaxpr) -> ProgramCounts:
    counts = ProgramCounts()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        counts.ops[name] += 1
        parts = [_count_jaxpr(part) for key, value in params.items() for part in _jaxprs(key, value)]
        if name == "cond":
            parts = [largest(parts)]
        counts.unknown_loops += name == "while"
        for part in parts:
            counts.add(part, params["length"] if name == "scan" else 1, in_loop=name in ("scan", "while"))
        if name in ("dot_general", "conv_general_dilated"):
            lhs, rhs, out = *(var.aval for var in eqn.invars[:2]), eqn.outvars[0].aval
            counts.flops += _dot_flops(params, lhs, out) if name == "dot_general" else _conv_flops(params, rhs, out)
            counts.bytes += sum(array.size * array.dtype.itemsize for array in (lhs, rhs, out))
    return counts


def _jaxprs(key: str, value: Any) -> Iterator[Jaxpr]:
    """The programs inside a parameter of an equation; a scatter's update of one element is not one."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, (ClosedJaxpr, Jaxpr)) and key != "update_jaxpr":
            yield item.jaxpr if isinstance(item, ClosedJaxpr) else item


def _dot_flops(params: Mapping[str, Any], lhs: Any, out: Any) -> float:
    (contracted, _), _ = params["dimension_numbers"]
    return 2.0 * out.size * math.prod(lhs.shape[axis] for axis in contracted)


def _conv_flops(params: Mapping[str, Any], rhs: Any, out: Any) -> float:
    """A dilated input is mostly zeros, which no kernel multiplies: they do not count."""
    kernel = rhs.size / rhs.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out.size * kernel / math.prod(params["lhs_dilation"])

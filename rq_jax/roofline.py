"""What a program has to do, in floating-point operations and bytes, and the least time that a device needs for it.

Arithmetic alone: counts come from a model's settings, from a traced program or from a compiled one. A multiplication
and its addition are two operations; only matrix products and convolutions are counted.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from rq_jax.devices.peaks import Peaks

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BACKWARD = 2  # a backward pass is worth two forward passes: gradients of inputs and of weights


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations on numbers of a dtype, and bytes that have to come from or go to the device's memory."""

    flops: float
    bytes: float
    dtype: str = "float32"

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times, self.dtype)


# --- devices ---


class Roofline(NamedTuple):
    """The least seconds, which limit makes most of them ("compute" or "bandwidth"), and seconds of arithmetic alone."""

    seconds: float
    bound: str
    compute_seconds: float


def roofline(stages: Mapping[str, Work], peaks: Peaks) -> Roofline:
    """Least time of stages that run one after another, each as long as the slower of its arithmetic and its traffic.

    Args:
      stages: what each of them does; it is taken to reach either peak, and to overlap the two.
      peaks: of all devices that share the work.
    """
    compute = {name: work.flops / peaks.flops[work.dtype] for name, work in stages.items()}
    traffic = {name: work.bytes / peaks.bandwidth for name, work in stages.items()}
    seconds = sum(max(compute[name], traffic[name]) for name in stages)
    waited = sum(traffic[name] for name in stages if traffic[name] > compute[name])
    return Roofline(seconds, "bandwidth" if waited > seconds / 2 else "compute", sum(compute.values()))


def roofline_seconds(flops: float, num_bytes: float, peaks: Peaks, dtype: str = "float32") -> float:
    """Least seconds of one stage; see `roofline`."""
    return roofline({"all": Work(flops, num_bytes, dtype)}, peaks).seconds


# --- the transformer, from its settings ---


def transformer_flops(model: Any, train: bool = False) -> dict[str, float]:
    """Operations for one picture, by part: "spatial", "depth", "classifier" and, for models of text, "condition".

    Each part has its embeddings; attention counts the pairs of a query and a key that it may see.

    Args:
      model: an `RQTransformer`, or whatever has its attributes.
      train: with the backward pass: three times the forward pass. Recomputation is not counted.
    """
    (h, w, D), M, U = model.code_shape, model.model_dim, model.cond_length
    T, embed = h * w, 2 * model.code_dim * M

    def stack(layers: int, tokens: int) -> float:
        return layers * (24 * M * M * tokens + 4 * M * _pairs(tokens))

    flops = {
        "spatial": stack(model.spatial_layers, U + T - 1) + embed * (T - 1) * model.use_tokenizer_input,
        "depth": T * (stack(model.depth_layers, D) + embed * (D - 1) * model.use_tokenizer_depth_input),
        "classifier": 2 * T * D * M * max(model.codebook_sizes),
    }
    if train and U > 1:
        flops["condition"] = 2 * (U - 1) * M * model.cond_vocab_size
    return {name: float(value * (1 + BACKWARD * train)) for name, value in flops.items()}


def weights_read(model: Any, dtype: str) -> dict[str, float]:
    """Bytes of weights that drawing one batch reads, whatever its size, by part.

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
    """Bytes of keys and values that drawing one picture reads and writes, by part: each step reads the filled rows."""
    (h, w, D), U = model.code_shape, model.cond_length
    steps, row = h * w, 2 * model.model_dim * BYTES[dtype]
    spatial_rows = (steps * U + _pairs(steps - 1)) + (U + steps - 1)
    return {
        "spatial": float(model.spatial_layers * row * spatial_rows),
        "depth": float(model.depth_layers * row * steps * (_pairs(D) + D)),
    }


def cache_size(model: Any, dtype: str) -> float:
    """Bytes of keys and values that one picture keeps at the end."""
    (h, w, D), row = model.code_shape, 2 * model.model_dim * BYTES[dtype]
    return float(row * (model.spatial_layers * (model.cond_length + h * w - 1) + model.depth_layers * D))


def sampling_work(model: Any, batch: int, weights: str = "bfloat16", guidance: bool = False) -> dict[str, Work]:
    """What drawing a batch of code grids has to do, by part.

    Keys and values have the dtype of the computation; products are bfloat16 where it or the weights are. Logits are
    written once and read once, in float32; other activations are taken to stay on the chip.

    Args:
      model: an `RQTransformer`, or whatever has its attributes.
      batch: B, pictures.
      weights: dtype at rest, "int8" too.
      guidance: every picture stands twice in the batch.
    """
    rows, dtype = batch * (2 if guidance else 1), "bfloat16" if "bfloat16" in (model.dtype, weights) else "float32"
    flops, read, kept = transformer_flops(model), weights_read(model, weights), cache_traffic(model, model.dtype)
    kept["classifier"] = 2.0 * BYTES["float32"] * math.prod(model.code_shape) * max(model.codebook_sizes)
    return {name: Work(rows * flops[name], read[name] + rows * kept[name], dtype) for name in read}


def search_work(num_vectors: int, code_dim: int, codebook_size: int, depth: int) -> Work:
    """Residual quantisation of N vectors: all distances at each depth; codebook and vectors pass through memory."""
    N, E, K, D = num_vectors, code_dim, codebook_size, depth
    return Work(2.0 * N * E * K * D, 4.0 * D * E * (K + 2 * N))


def _pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


# --- the autoencoder, from its program ---


def encoder_work(model: Any, batch: int = 1) -> Work:
    """What encoding a batch of pictures to latents has to do; see `ProgramCounts` for the bytes."""
    images = jax.ShapeDtypeStruct((batch, *model.image_shape, model.in_channels), jnp.float32)
    return _apply_work(model, images, "encode")


def decoder_work(model: Any, batch: int = 1) -> Work:
    """What decoding a batch of code grids to pictures has to do; see `ProgramCounts` for the bytes."""
    return _apply_work(model, jax.ShapeDtypeStruct((batch, *model.code_shape), jnp.int32), "decode_codes")


def autoencoder_flops(model: Any) -> float:
    """Operations of training on one picture: encoder and decoder forward and backward, and the codebook search."""
    h, w, D = model.code_shape
    search = search_work(h * w, model.code_dim, int(np.max(model.codebook_size)), D).flops
    return (1 + BACKWARD) * (encoder_work(model).flops + decoder_work(model).flops) + search


def _apply_work(model: Any, inputs: jax.ShapeDtypeStruct, method: str) -> Work:
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs()))
    counts = count_traced(lambda variables, x: model.apply(variables, x, method=method), variables, inputs)
    return Work(counts.flops, counts.bytes, model.dtype)


# --- programs ---


@dataclasses.dataclass
class ProgramCounts:
    """What a program executes, loops multiplied by their trip counts; of several branches the most.

    Attributes:
      flops: of products and convolutions.
      bytes: of their operands and results, each read or written once: traffic when everything else is fused into them.
        Traced programs only.
      ops: executions of each operation, by its name in the program.
      loop_ops: those of them that happen inside a loop.
      unknown_loops: loops whose trip count is not known beforehand; they count as one round.
    """

    flops: float = 0.0
    bytes: float = 0.0
    ops: Counter[str] = dataclasses.field(default_factory=Counter)
    loop_ops: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, part: "ProgramCounts", times: int = 1, in_loop: bool = False) -> None:
        """Add a part that is executed so many times."""
        self.flops += times * part.flops
        self.bytes += times * part.bytes
        self.unknown_loops += part.unknown_loops
        for name, count in part.ops.items():
            self.ops[name] += times * count
        for name, count in (part.ops if in_loop else part.loop_ops).items():
            self.loop_ops[name] += times * count


def _most(branches: Iterable[ProgramCounts]) -> ProgramCounts:
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
            parts = [_most(parts)]
        counts.unknown_loops += name == "while"
        for part in parts:
            counts.add(part, params["length"] if name == "scan" else 1, in_loop=name in ("scan", "while"))
        if name in ("dot_general", "conv_general_dilated"):
            lhs, rhs, out = *(var.aval for var in eqn.invars[:2]), eqn.outvars[0].aval
            counts.flops += _dot_flops(params, lhs, out) if name == "dot_general" else _conv_flops(params, rhs, out)
            counts.bytes += sum(array.size * array.dtype.itemsize for array in (lhs, rhs, out))
    return counts


def _jaxprs(key: str, value: Any) -> Iterator[Jaxpr]:
    """The programs inside a parameter; what a scatter does to an element is none."""
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, (ClosedJaxpr, Jaxpr)) and key != "update_jaxpr":
            yield item.jaxpr if isinstance(item, ClosedJaxpr) else item


def _dot_flops(params: Mapping[str, Any], lhs: Any, out: Any) -> float:
    (contracted, _), _ = params["dimension_numbers"]
    return 2.0 * out.size * math.prod(lhs.shape[axis] for axis in contracted)


def _conv_flops(params: Mapping[str, Any], rhs: Any, out: Any) -> float:
    """Of a dilated input only the elements between the zeros count."""
    kernel = rhs.size / rhs.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out.size * kernel / math.prod(params["lhs_dilation"])


# In the text of a compiled program: a computation's head, its entry, and the first array of an instruction's type.
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_compiled(text: str) -> ProgramCounts:
    """Counts of an optimised program, `compiled.as_text()`: what is really executed, fusions looked into.

    `compiled.cost_analysis()` counts the body of a loop once. Library calls of GPUs count where they are matrix
    products or forward convolutions. `bytes` stays 0.

    Raises:
      ValueError: the text is no optimised HLO module.
    """
    computations: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name is not None and " = " in line:
            computations[name].append(line)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
    done: dict[str, ProgramCounts] = {}

    def count(name: str) -> ProgramCounts:
        if name not in done:
            done[name] = _count_computation(computations[name], count)
        return done[name]

    return count(entry)


def _count_computation(lines: list[str], count: Callable[[str], ProgramCounts]) -> ProgramCounts:
    counts, shapes = ProgramCounts(), {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        kind, opcode, rest = _split_instruction(match[2])
        array = _ARRAY.search(kind)
        shapes[match[1]] = tuple(map(int, array[1].split(","))) if array and array[1] else ()
        counts.ops[opcode] += 1
        called = _CALLED.findall(rest)
        if opcode in ("call", "async-start"):
            called += re.findall(r"to_apply=%([\w.\-]+)", rest)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
            called += [name.strip().lstrip("%") for name in branches[1].split(",")]
        parts = [count(name) for name in called]
        if opcode == "conditional":
            parts = [_most(parts)]
        trips = _TRIPS.search(rest)
        counts.unknown_loops += opcode == "while" and trips is None
        for part in parts:
            counts.add(part, int(trips[1]) if trips else 1, in_loop=opcode == "while")
        counts.flops += _instruction_flops(opcode, rest, shapes, shapes[match[1]])
    return counts


def _split_instruction(text: str) -> tuple[str, str, str]:
    """(type, opcode, the rest from the operands on) of what stands right of the equals sign."""
    end, level = 0, 0
    for end, letter in enumerate(text):  # noqa: B007
        level += (letter == "(") - (letter == ")")
        if letter == " " and level == 0:
            break
    kind, rest = text[:end], text[end + 1 :]
    opcode, _, rest = rest.partition("(")
    return kind, opcode, rest


def _instruction_flops(opcode: str, rest: str, shapes: Mapping[str, tuple[int, ...]], out: tuple[int, ...]) -> float:
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    target = target[1] if target else ""
    operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
    if opcode == "dot" or target.startswith("__cublas$"):
        axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', rest)
        axes = [int(axis) for axis in re.findall(r"\d+", axes[1])] if axes else []
        return 2.0 * math.prod(out) * math.prod(shapes[operands[0]][axis] for axis in axes)
    if opcode == "convolution" or target.startswith(("__cudnn$convForward", "__cudnn$convBiasActivation")):
        labels = re.search(r"dim_labels=\w+_(\w+)->", rest)[1]
        kernel = np.delete(shapes[operands[1]], labels.index("o"))
        dilation = re.search(r"lhs_dilate=([\dx]+)", rest)
        zeros = math.prod(map(int, dilation[1].split("x"))) if dilation else 1
        return 2.0 * math.prod(out) * math.prod(map(int, kernel)) / zeros
    return 0.0

"""What a program has to do, in floating-point operations and bytes, and the least time that a device needs for it.

Arithmetic alone: counts come from a model's settings, from a traced program or from a compiled one. A multiplication
and its addition are two operations; only matrix products and convolutions are counted.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from rq_jax.devices.peaks import Peaks
from rq_jax.models.flops import ProgramCounts, Work, _most, _pairs, transformer_flops

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


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


# --- the autoencoder, from its program ---


# --- programs ---


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

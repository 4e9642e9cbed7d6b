"""Counts of compiled programs, from the text of their optimised HLO."""

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from rq_jax.models.flops import ProgramCounts, largest

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
            parts = [largest(parts)]
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

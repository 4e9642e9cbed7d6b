"""Counts of compiled programs, from the text of their optimised HLO: of CPUs, of GPUs, of TPUs."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rq_jax.models.flops import ProgramCounts, largest

# In the text of a compiled program: a computation's head, its entry, and an array in an instruction's type.
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
# Instructions that cost nothing or belong to another one.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "async-start", "async-update", "async-done",
}  # fmt: skip


class Instruction(NamedTuple):
    """A line of a program: `rest` begins with the operands; `arrays` are (dtype, shape) of what comes out."""

    name: str
    opcode: str
    rest: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    is_root: bool


class Module(NamedTuple):
    """Instructions of each computation by its name, and the name of the entry."""

    computations: dict[str, list[Instruction]]
    entry: str


class Collective(NamedTuple):
    """A collective of a compiled program, as each device runs it.

    Attributes:
      opcode: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      arrays: (dtype, shape) of what it works on: of the whole, where devices hold parts before or after.
      times: it is run.
      group: numbers of devices that take part together, those of one group.
    """

    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    group: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """Devices that take part together."""
        return len(self.group)

    @property
    def bytes(self) -> int:
        """Of all its arrays, once."""
        return sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in one run, by the ring algorithm."""
        share = (self.group_size - 1) / self.group_size
        return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.opcode, share) * self.bytes


def parse(text: str) -> Module:
    """The computations of an optimised program, `compiled.as_text()`.

    Raises:
      ValueError: the text is no optimised HLO module.
    """
    computations: dict[str, list[Instruction]] = {}
    entry = name = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name is not None and (match := _INSTRUCTION.match(line)):
            kind, opcode, rest = _split_instruction(match[3])
            arrays = tuple((dtype, tuple(map(int, re.findall(r"\d+", s)))) for dtype, s in _ARRAY.findall(kind))
            computations[name].append(Instruction(match[2], opcode, rest, arrays, bool(match[1])))
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
    return Module(computations, entry)


def count_compiled(text: str) -> ProgramCounts:
    """Counts of an optimised program: what is really executed, fusions looked into.

    `compiled.cost_analysis()` counts the body of a loop once. Library calls of GPUs count where they are matrix
    products or convolutions. `bytes` stays 0.

    Raises:
      ValueError: the text is no optimised HLO module.
    """
    module = parse(text)

    @functools.cache
    def count(name: str) -> ProgramCounts:
        return _count_computation(module, name, count)

    return count(module.entry)


def _count_computation(module: Module, name: str, count: Callable[[str], ProgramCounts]) -> ProgramCounts:
    counts, shapes = ProgramCounts(), {}
    for line in module.computations[name]:
        shapes[line.name] = line.arrays[0][1] if line.arrays else ()
        counts.ops[line.opcode] += 1
        parts = [count(called) for called in _called(line)]
        if line.opcode == "conditional":
            parts = [largest(parts)]
        trips = trip_count(module, line)
        counts.unknown_loops += line.opcode == "while" and trips is None
        for part in parts:
            counts.add(part, trips or 1, in_loop=line.opcode == "while")
        counts.flops += _instruction_flops(line, shapes)
    return counts


def kernels(text: str) -> tuple[int, int]:
    """Kernels and library calls that a program launches: (all, those inside loops). One fusion is one kernel.

    Raises:
      ValueError: the text is no optimised HLO module.
    """
    module = parse(text)
    runs = [
        (times, depth)
        for line, times, depth in _executed(module, into=("while", "conditional", "call"))
        if line.opcode not in _FREE and not line.opcode.endswith("-done")
    ]
    return sum(times for times, _ in runs), sum(times for times, depth in runs if depth)


def collectives(text: str) -> list[Collective]:
    """All collectives that an optimised program runs on each device; those in loops as often as these turn.

    Raises:
      ValueError: the text is no optimised HLO module.
    """
    module, found = parse(text), {}
    devices = re.search(r"num_partitions=(\d+)", text)
    # A TPU's compiler writes a reduce-scatter as a computation of an all-reduce and a slice.
    scattered = {
        line.name
        for name, lines in module.computations.items()
        if name.startswith("all-reduce-scatter")
        for line in lines
    }
    for line, times, _ in _executed(module):
        opcode = line.opcode.removesuffix("-start")
        if opcode not in _COLLECTIVES:
            continue
        if opcode == "all-reduce" and line.name in scattered:
            opcode = "reduce-scatter"
        group = _group(line.rest, int(devices[1]) if devices else 1)
        arrays = _whole_arrays(opcode, line, len(group))
        # A collective that is spread over other computations stands in each of them, under one number.
        channel = re.search(r"channel_id=(\d+)", line.rest)
        key = (opcode, channel[1]) if channel else (opcode, line.name)
        before = found.get(key)
        if before is None or times > before.times:
            found[key] = Collective(opcode, arrays, times, group)
    return list(found.values())


def bytes_of_batch(collective: Collective, global_batch: int, parameters: frozenset[tuple[int, ...]]) -> int:
    """Bytes of a collective that are activations of all images, which should stay where they are.

    By their shape: the first axis counts the images of the global batch, or their tokens, and no parameter has that
    shape, be it with some of its axes joined. Activations of the sizes of a parameter are taken for one.

    Args:
      collective: of a program.
      global_batch: images of a forward pass over all devices.
      parameters: `axes` of all of them, whole and as they are split.
    """

    def is_of_batch(shape: tuple[int, ...]) -> bool:
        sizes = axes(shape)
        if len(sizes) < 2 or global_batch == 1 or shape[0] % global_batch:
            return False
        return not any(_is_flattened(sizes, parameter) for parameter in parameters)

    return collective._replace(arrays=tuple(each for each in collective.arrays if is_of_batch(each[1]))).bytes


def _is_flattened(axes: Sequence[int], of: Sequence[int]) -> bool:
    """Whether axes can be those of an array, some of them joined."""
    if math.prod(axes) != math.prod(of):
        return False
    subsets = itertools.chain.from_iterable(itertools.combinations(of, count) for count in range(1, len(of) + 1))
    return set(axes) <= {math.prod(subset) for subset in subsets}


def axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the axes that are longer than 1, smallest first."""
    return tuple(sorted(size for size in shape if size > 1))


def trip_count(module: Module, line: Instruction) -> int | None:
    """How often the body of a `while` runs: as the compiler notes it, else by the bound of a counter from 0 on."""
    if line.opcode != "while":
        return None
    if known := _TRIPS.search(line.rest):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line.rest)
    lines = {each.name: each for each in module.computations[condition[1]]} if condition else {}
    root = next((each for each in lines.values() if each.is_root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    bound = lines.get(_operands(root)[1])
    value = re.match(r"(\d+)\)", bound.rest) if bound is not None and bound.opcode == "constant" else None
    return int(value[1]) if value else None


def _executed(
    module: Module, into: Sequence[str] | None = None, name: str | None = None, times: int = 1, depth: int = 0
) -> Iterator[tuple[Instruction, int, int]]:
    """(instruction, times it runs, loops around it), also of what opcodes `into` call; None: all opcodes."""
    for line in module.computations[name or module.entry]:
        yield line, times, depth
        if into is not None and line.opcode not in into:
            continue
        trips = trip_count(module, line) or 1
        parts = [
            list(_executed(module, into, called, times * trips, depth + (line.opcode == "while")))
            for called in _called(line)
        ]
        if line.opcode == "conditional":  # one branch runs, at most the longest
            parts = [max(parts, key=len)]
        yield from itertools.chain.from_iterable(parts)


def _called(line: Instruction) -> list[str]:
    """Computations that an instruction runs."""
    called = _CALLED.findall(line.rest)
    if line.opcode in ("call", "async-start"):
        called += re.findall(r"to_apply=%([\w.\-]+)", line.rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line.rest):
        called += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return called


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


def _operands(line: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", line.rest.partition(")")[0])


def _group(rest: str, count: int) -> tuple[int, ...]:
    """One group of devices, which the text names one by one, as rows of a table, or as axes of a mesh.

    Args:
      rest: of the instruction.
      count: all devices, which take part where the text names none.
    """
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pair[1]), int(pair[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", rest)
        sizes = [int(size) for _, size in axes]
        devices = (_table(order[1], order[2]) if order else np.arange(math.prod(sizes))).reshape(sizes)
        joined = re.findall(r"'(\w+)'", mesh[2])
        return tuple(devices[tuple(slice(None) if axis in joined else 0 for axis, _ in axes)].flatten().tolist())
    if table := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return tuple(_table(table[3], table[4]).reshape(int(table[1]), int(table[2]))[0].tolist())
    groups = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return tuple(int(device) for device in groups[1].split(",")) if groups else tuple(range(count))


def _table(shape: str, order: str | None) -> np.ndarray:
    """Numbers from 0 on in an array of a shape such as "2,4", its axes then in an order such as "1,0"."""
    sizes = [int(size) for size in shape.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose([int(axis) for axis in order.split(",")]) if order else devices


def _whole_arrays(opcode: str, line: Instruction, size: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What a collective works on; the text shows its results, and behind "-start" its operands before them."""
    arrays = line.arrays
    if line.opcode.endswith("-start") and opcode in ("all-gather", "reduce-scatter", "collective-permute"):
        half = len(arrays) // 2
        arrays = {"all-gather": arrays[half:], "reduce-scatter": arrays[:half]}.get(opcode, arrays[1:2])
    if line.opcode == "reduce-scatter":
        axis = int(re.search(r"dimensions=\{(\d+)", line.rest)[1])
        return tuple((d, (*s[:axis], size * s[axis], *s[axis + 1 :])) for d, s in arrays)
    return arrays


def _instruction_flops(line: Instruction, shapes: Mapping[str, tuple[int, ...]]) -> float:
    out = shapes[line.name]
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    target = target[1] if target else ""
    if line.opcode == "dot" or target.startswith("__cublas$"):
        axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', line.rest)
        axes = [int(axis) for axis in re.findall(r"\d+", axes[1])] if axes else []
        return 2.0 * math.prod(out) * math.prod(shapes[_operands(line)[0]][axis] for axis in axes)
    if line.opcode == "convolution" or target.startswith("__cudnn$conv"):
        first, second = (shapes[name] for name in _operands(line)[:2])
        # (what a forward pass would give, its kernel): backward passes have other operands and the same operations.
        result, kernel = {"BackwardInput": (first, second), "BackwardFilter": (second, out)}.get(
            target.removeprefix("__cudnn$conv"), (out, second)
        )
        labels = re.search(r"dim_labels=\w+_(\w+)->", line.rest)[1]
        inputs = np.delete(kernel, labels.index("o"))
        dilation = re.search(r"lhs_dilate=([\dx]+)", line.rest)
        zeros = math.prod(map(int, dilation[1].split("x"))) if dilation else 1
        share = _share_of_taps(line.rest, first, out) if line.opcode == "convolution" and not dilation else 1.0
        return 2.0 * math.prod(result) * math.prod(map(int, inputs)) / zeros * share
    return 0.0


def _share_of_taps(rest: str, first: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Share of a convolution's taps that meet its input and no padding, at most.

    A TPU's compiler writes a matrix product with several output axes as a convolution whose input is padded from 1.
    """
    read, _, written = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    axes = [label for label in read if label.isdigit()]
    return math.prod(min(1.0, first[read.index(axis)] / out[written.index(axis)]) for axis in axes)

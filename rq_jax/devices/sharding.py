"""Devices: the only file that knows a mesh.

The logical axes of a parameter are the letters at the end of its name ("up_MF" has M and F); a leading axis beyond them
is the layer axis of a scan. `RULES` maps letters to mesh axes; what no rule names is replicated.
"""

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis -> mesh axes, as many as divide it: widths are split by fsdp; heads, MLP width and vocabulary by tensor.
# Kernels of convolutions are split along their outputs alone: XLA's partitioner (jax 0.10) gives wrong gradients for
# two convolutions in a row whose kernels are split along inputs and outputs, on a mesh of all three axes.
RULES = {
    "M": ("fsdp",),
    "N": ("tensor",),
    "F": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
    "O": ("fsdp", "tensor"),
}
_SUFFIX = re.compile(r"_([A-Z0-9]+)$")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Mesh over all devices with axes "data", "fsdp", "tensor"; one size may be -1: what the others leave.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    sizes, count = {"data": data, "fsdp": fsdp, "tensor": tensor}, jax.device_count()
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    allowed = all(size == -1 or size >= 1 for size in sizes.values()) and len(free) <= 1
    if not allowed or count % known or (not free and known != count):
        raise ValueError(f"mesh: {sizes} does not fit {count} devices; sizes must multiply to it, one may be -1")
    for name in free:
        sizes[name] = count // known
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def logical_axes(path: Any, ndim: int) -> str:
    """Letters of a leaf's axes, "-" for those without a name."""
    name = str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1]))) if path else ""
    match = _SUFFIX.search(name)
    letters = match.group(1) if match else ("IO" if name == "kernel" else "")
    return letters[-ndim:].rjust(ndim, "-") if ndim else ""


def state_shardings(mesh: Mesh, tree: Any, without: tuple[str, ...] = ()) -> Any:
    """A sharding for every leaf of a tree of arrays or shapes, by `RULES`; codebooks are replicated.

    Args:
      without: mesh axes that split nothing.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        used: set[str] = set()
        spec = []
        for letter, size in zip(logical_axes(path, leaf.ndim), leaf.shape, strict=True):
            wanted = () if "codebook" in names else RULES.get(letter, ())
            axes = _fitting(mesh, [axis for axis in wanted if axis not in used and axis not in without], size)
            spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
            used.update(axes)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _fitting(mesh: Mesh, axes: list[str], size: int) -> tuple[str, ...]:
    """All of these mesh axes of several devices if their product divides `size`, else the first that does alone."""
    axes = [axis for axis in axes if mesh.shape[axis] > 1]
    for some in (axes, *([axis] for axis in axes)):
        if some and size % math.prod(mesh.shape[axis] for axis in some) == 0:
            return tuple(some)
    return ()


def gathered(mesh: Mesh, params: Any) -> Any:
    """Parameters as convolutions use them: kernels whole along `fsdp`, which splits the batch.

    Left to itself, XLA gathers the pictures in place of the kernels.
    """

    def gather(path: Any, leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        is_kernel = logical_axes(path, leaf.ndim).endswith("IO")
        return jax.lax.with_sharding_constraint(leaf, sharding) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(gather, params, state_shardings(mesh, params, without=("fsdp",)))


def sharded_shapes(mesh: Mesh, function: Any, *args: Any) -> Any:
    """Shapes of what `function(*args)` returns, each with its sharding by `RULES`; nothing is computed."""
    shapes = jax.eval_shape(function, *args)
    place = lambda shape, to: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=to)  # noqa: E731
    return jax.tree.map(place, shapes, state_shardings(mesh, shapes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over the data and fsdp devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@functools.cache
def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(which part of every batch this process reads, of how many): processes along `tensor` read the same one.

    Raises:
      ValueError: a process would need rows from several parts, or only some of another's.
    """
    places = mesh.devices.reshape(-1, mesh.shape["tensor"])  # a row of devices for each row of the batch sharding
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(places):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if [row for part in parts for row in part] != list(range(len(places))) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh: {dict(mesh.shape)} over {len(held)} processes gives some of them parts of a batch that overlap; "
            "let tensor divide the devices of a process, or be a multiple of them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> None:
    """Refuse a global batch that the mesh or the accumulation cannot split evenly.

    Raises:
      ValueError: naming batch size, devices and accumulation.
    """
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) * accumulation_steps
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size: {batch_size} is not a multiple of {parts} "
            f"(devices along data and fsdp times optim.accumulation_steps {accumulation_steps})"
        )


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Place a process's part of a batch (`batch_part`): the global arrays are all parts in order."""
    sharding, (_, count) = batch_sharding(mesh), batch_part(mesh)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        shape = (count * len(array), *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(place, batch)

"""Meshes and shardings; no other module names a mesh axis.

The logical axes of a parameter are the letters at the end of its name ("up_MF" has M and F); a leading axis beyond them
is the layer axis of a scan. `RULES` maps letters to mesh axes; an axis without a rule is replicated.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis -> mesh axes, as many as divide it: widths are split by fsdp; heads, MLP width and vocabulary by tensor.
# Kernels of convolutions (I inputs, O outputs) are split along their outputs only: on a mesh of all three axes XLA's
# partitioner (jax 0.10) gives wrong gradients for two convolutions in a row whose kernels are split along both.
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
    """Make a mesh over all devices with axes "data", "fsdp" and "tensor".

    Args:
      data: devices along which the batch is split and parameters are replicated.
      fsdp: devices along which batch and parameters are split.
      tensor: devices along which heads, MLP width and vocabulary are split.
        One of the three may be -1: the devices that the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
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
    """Letters of a leaf's axes, one for each, "-" for axes without a name."""
    name = str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1]))) if path else ""
    match = _SUFFIX.search(name)
    letters = match.group(1) if match else ("IO" if name == "kernel" else "")
    return letters[-ndim:].rjust(ndim, "-") if ndim else ""


def state_shardings(mesh: Mesh, tree: Any, without: tuple[str, ...] = ()) -> Any:
    """Shard every leaf of a tree of arrays or shapes by `RULES`; codebooks are replicated.

    Args:
      mesh: from `make_mesh`.
      tree: of arrays or shapes.
      without: mesh axes to leave out.

    Returns:
      The tree with a `NamedSharding` in place of each leaf.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        used: set[str] = set()
        spec = []
        for letter, size in zip(logical_axes(path, leaf.ndim), leaf.shape, strict=True):
            rule = () if "codebook" in names else RULES.get(letter, ())
            axes = _dividing(mesh, [axis for axis in rule if axis not in used and axis not in without], size)
            spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
            used.update(axes)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _dividing(mesh: Mesh, axes: list[str], size: int) -> tuple[str, ...]:
    """The mesh axes of more than one device if their product divides `size`, else the first that divides it alone."""
    axes = [axis for axis in axes if mesh.shape[axis] > 1]
    for some in (axes, *([axis] for axis in axes)):
        if some and size % math.prod(mesh.shape[axis] for axis in some) == 0:
            return tuple(some)
    return ()


def gathered(mesh: Mesh, params: Any) -> Any:
    """Gather convolution kernels along `fsdp` before their use.

    The axis splits both the batch and the kernels. To multiply them, one has to be gathered: without this constraint
    XLA chooses the activations, which are far larger.
    """

    def gather(path: Any, leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        is_kernel = logical_axes(path, leaf.ndim).endswith("IO")
        return jax.lax.with_sharding_constraint(leaf, sharding) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(gather, params, state_shardings(mesh, params, without=("fsdp",)))


def sharded_shapes(mesh: Mesh, function: Any, *args: Any) -> Any:
    """Shapes of the result of `function(*args)`, each with its sharding by `RULES`; nothing is computed."""
    shapes = jax.eval_shape(function, *args)
    place = lambda shape, to: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=to)  # noqa: E731
    return jax.tree.map(place, shapes, state_shardings(mesh, shapes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the first axis over the data and fsdp devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@functools.cache
def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Part of every batch that this process reads.

    The batch is split into slices, one for each row of devices along `tensor`, and a process reads the slices that its
    devices hold. A row may span several processes: then all of these hold the same slice and read the same part, so
    there can be fewer parts than processes.

    Returns:
      (index of the part, number of parts).

    Raises:
      ValueError: the slices of two processes overlap without being equal, or the parts are not equally large and
        contiguous.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    slices_of: dict[int, set[int]] = {}
    for index, devices in enumerate(rows):
        for device in devices:
            slices_of.setdefault(device.process_index, set()).add(index)
    parts = sorted({tuple(sorted(slices)) for slices in slices_of.values()})
    if [index for part in parts for index in part] != list(range(len(rows))) or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh: {dict(mesh.shape)} over {len(slices_of)} processes gives some of them parts of a batch that "
            "overlap; let tensor divide the devices of a process, or be a multiple of them"
        )
    return parts.index(tuple(sorted(slices_of[jax.process_index()]))), len(parts)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> None:
    """Check that mesh and gradient accumulation split the global batch evenly.

    Raises:
      ValueError: naming batch size, devices and accumulation.
    """
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES])) * accumulation_steps
    if batch_size % parts:
        raise ValueError(
            f"data.batch_size: {batch_size} is not a multiple of {parts} "
            f"(devices along data and fsdp times optim.accumulation_steps {accumulation_steps})"
        )


def micro_batches(batch: Any, num_steps: int) -> Any:
    """A tree of arrays (B, ...) as (num_steps, B / num_steps, ...): micro-batch i has every num_steps-th row from i on.

    Consecutive rows would lie on few devices of a sharded batch and move at every step; in this order each device
    slices the rows it has.
    """
    return jax.tree.map(lambda x: x.reshape(-1, num_steps, *x.shape[1:]).swapaxes(0, 1), batch)


def map_micro_batches(function: Callable[[Any], Any], batch: Any, num_steps: int) -> Any:
    """`function(batch)`, both trees of arrays (B, ...), in micro-batches one after the other: it needs less memory."""
    if num_steps == 1:
        return function(batch)
    results = jax.lax.map(function, micro_batches(batch, num_steps))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Place this process's part of a batch on its devices; the global arrays are the parts of `batch_part` in order."""
    sharding, (_, count) = batch_sharding(mesh), batch_part(mesh)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        shape = (count * len(array), *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(place, batch)

"""Meshes and shardings; no other module names a mesh axis.

The logical axes of a parameter are the letters at the end of its name ("up_MF" has M and F); a leading axis beyond them
is the layer axis of a scan. Those of an activation are named by the network (`nn.placement`). `RULES` maps letters to
mesh axes; an axis without a rule is replicated.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rq_jax.nn import placement
from rq_jax.nn.placement import map_micro_batches as map_micro_batches
from rq_jax.nn.placement import micro_batches as micro_batches

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis -> mesh axes, as many as divide it: batches are split by data and fsdp; widths by fsdp, which leaves them
# whole in an activation, where the batch has used it; heads, MLP width and vocabulary by tensor. Layers are split for
# what an optimizer does to whole matrices; those of parameters have no letter in their name.
# Kernels of convolutions (I inputs, O outputs) are split along their outputs only: on a mesh of all three axes XLA's
# partitioner (jax 0.10) gives wrong gradients for two convolutions in a row whose kernels are split along both.
RULES = {
    "B": BATCH_AXES,
    "M": ("fsdp",),
    "N": ("tensor",),
    "F": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
    "O": ("fsdp", "tensor"),
    "L": ("fsdp",),
}
_UNEVEN = "L"  # split also where devices do not divide it: XLA fills up
_SUFFIX = re.compile(r"_([A-Z0-9]+)$")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, dcn: int = 1) -> Mesh:
    """Make a mesh over all devices with axes "data", "fsdp" and "tensor".

    Args:
      data: devices along which the batch is split and parameters are replicated.
      fsdp: devices along which batch and parameters are split.
      tensor: devices along which heads, MLP width and vocabulary are split.
        One of the three may be -1: the devices that the others leave.
      dcn: slices that the devices lie in, such as those of TPU pods, with a slower network between them: "data" goes
        over these first, so that fsdp and tensor stay inside a slice. 1: slices are not looked at.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the slices are others.
    """
    sizes, count = {"data": data, "fsdp": fsdp, "tensor": tensor}, jax.device_count()
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    allowed = all(size == -1 or size >= 1 for size in sizes.values()) and len(free) <= 1
    if not allowed or count % known or (not free and known != count):
        raise ValueError(f"mesh: {sizes} does not fit {count} devices; sizes must multiply to it, one may be -1")
    for name in free:
        sizes[name] = count // known
    types = (AxisType.Auto,) * len(AXES)
    if dcn == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types)
    return Mesh(_devices_by_slice(sizes, dcn), AXES, axis_types=types)


def _devices_by_slice(sizes: Mapping[str, int], dcn: int) -> np.ndarray:
    """Devices (data, fsdp, tensor), those of a slice in consecutive rows and wired as the axes want them."""
    slices: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        slices.setdefault(slice_of(device), []).append(device)
    counts = [len(slices[number]) for number in sorted(slices)]
    if len(counts) != dcn or len(set(counts)) > 1:
        fix = f"set it to {len(counts)}" if len(set(counts)) == 1 else "set it to 1"
        raise ValueError(f"mesh.dcn: {dcn} does not fit slices of {counts} devices; {fix}")
    if sizes["data"] % dcn:
        raise ValueError(f"mesh.data: {sizes['data']} is not a multiple of mesh.dcn {dcn}, the slices; set it to one")
    shape = sizes["data"] // dcn, sizes["fsdp"], sizes["tensor"]
    return np.concatenate([mesh_utils.create_device_mesh(shape, slices[number]) for number in sorted(slices)])


def slice_of(device: jax.Device) -> int:
    """Number of the slice that a device lies in; 0 where it names none."""
    return getattr(device, "slice_index", 0) or 0


def local_mesh() -> Mesh:
    """A mesh of this process's devices alone, all along "data": for work that other processes have no part in."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def logical_axes(path: Any, ndim: int) -> str:
    """Letters of a leaf's axes, one for each, "-" for axes without a name."""
    name = str(getattr(path[-1], "key", getattr(path[-1], "name", path[-1]))) if path else ""
    match = _SUFFIX.search(name)
    letters = match.group(1) if match else ("IO" if name == "kernel" else "")
    return letters[-ndim:].rjust(ndim, "-") if ndim else ""


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shard every leaf of a tree of arrays or shapes by `RULES`; codebooks are replicated.

    Args:
      mesh: from `make_mesh`.
      tree: of arrays or shapes.

    Returns:
      The tree with a `NamedSharding` in place of each leaf.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        letters = "-" * leaf.ndim if "codebook" in names else logical_axes(path, leaf.ndim)
        return NamedSharding(mesh, _spec(mesh, letters, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _spec(mesh: Mesh, letters: str, shape: tuple[int, ...], without: tuple[str, ...] = ()) -> PartitionSpec:
    """Mesh axes of each axis of an array by `RULES`, each of them used once."""
    used: set[str] = set()
    spec = []
    for letter, size in zip(letters, shape, strict=True):
        axes = [axis for axis in RULES.get(letter, ()) if axis not in used and axis not in without]
        some = tuple(axes) if letter in _UNEVEN else _dividing(mesh, axes, size)
        spec.append(some if len(some) > 1 else some[0] if some else None)
        used.update(some)
    return PartitionSpec(*spec)


def _dividing(mesh: Mesh, axes: Sequence[str], size: int) -> tuple[str, ...]:
    """The longest beginning of the mesh axes whose devices divide `size`, else the first axis that divides it alone."""
    axes = [axis for axis in axes if mesh.shape[axis] > 1]
    for some in (*(axes[:count] for count in range(len(axes), 0, -1)), *([axis] for axis in axes)):
        if size % math.prod(mesh.shape[axis] for axis in some) == 0:
            return tuple(some)
    return ()


@contextlib.contextmanager
def activations(mesh: Mesh, without: tuple[str, ...] = ()) -> Iterator[None]:
    """While it lasts, networks that are traced lay their activations over the mesh by `RULES`.

    Without it XLA is free to split them along their width, as the parameters of `fsdp` are, and to have every device
    hold the whole batch.

    Args:
      mesh: from `make_mesh`.
      without: mesh axes to leave out.
    """

    def constrain(x: jax.Array, letters: str) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(mesh, letters, x.shape, without)))

    with placement.placing(constrain) if mesh.size > 1 else contextlib.nullcontext():
        yield


def split_batch(mesh: Mesh, tree: Any, axes: tuple[str, ...] = BATCH_AXES) -> Any:
    """Lay the first axis of arrays in a program over the mesh axes, as many of them as divide it.

    Args:
      mesh: from `make_mesh`.
      tree: of arrays (B, ...).
      axes: with all of `AXES` devices along tensor share a batch too, for networks that are not split along it; with
        none each device holds the whole array.
    """
    if mesh.size == 1:
        return tree

    def constrain(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(_dividing(mesh, axes, len(x)))))

    return jax.tree.map(constrain, tree)


def num_parts(mesh: Mesh, axes: Sequence[str] = BATCH_AXES) -> int:
    """Parts of a batch in `over_parts`: the devices that it is split over."""
    return math.prod(mesh.shape[axis] for axis in axes)


def over_parts(mesh: Mesh, function: Callable[[Any], Any], batch: Any, axes: tuple[str, ...] = BATCH_AXES) -> Any:
    """Results of a function for each device's part of a batch, stacked along a first axis and left where they are made.

    The gradient of a whole batch is summed over the devices at once. Those of parts are added up micro-batch by
    micro-batch on their devices, and `mean_over_parts` sums them over devices once an update. Until then each device
    holds a whole gradient along `axes`; of an axis of `BATCH_AXES` that is left out it has its share, summed at once.

    Args:
      mesh: from `make_mesh`.
      function: takes a tree like `batch`, with the rows of one part.
      batch: a tree of arrays (B, ...).
      axes: mesh axes whose devices have parts of their own, "data" among them; with none it is `function(batch)`.
    """
    if not axes:
        return function(batch)
    with activations(mesh, without=axes):
        results = jax.vmap(function, spmd_axis_name=axes)(_parts(mesh, batch, axes))
    return _lay_parts(mesh, results, axes)


def with_copies(
    mesh: Mesh,
    function: Callable[[Any, Any], Any],
    weights: Any,
    batch: Any,
    inside: tuple[str, ...] = (),
) -> Any:
    """`function(weights, batch)`, both trees of arrays (B, ...), with weights of its own on each part's devices.

    For a function that uses its weights many times, chunk by chunk of its batch: each use would sum a gradient over the
    devices. Those of the copies are added up where they are, and summed over devices once. Until then each device holds
    a whole gradient of the weights that are used, also along fsdp.

    Args:
      mesh: from `make_mesh`.
      function: works on each row of a batch apart; what it uses of its weights is copied.
      weights: a tree of parameters.
      batch: a tree of arrays (B, ...).
      inside: mesh axes of an `over_parts` around it, whose devices have a part of their own already.
    """
    axes = tuple(axis for axis in BATCH_AXES if axis not in inside)
    parts = num_parts(mesh, axes)
    if parts == 1:
        return function(weights, batch)
    copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (parts, *x.shape)), weights)
    with activations(mesh, without=BATCH_AXES):
        results = jax.vmap(function, spmd_axis_name=axes)(_lay_parts(mesh, copies, axes), _parts(mesh, batch, axes))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _parts(mesh: Mesh, batch: Any, axes: tuple[str, ...]) -> Any:
    """Arrays (B, ...) as (parts, B / parts, ...)."""
    return jax.tree.map(lambda x: x.reshape(num_parts(mesh, axes), -1, *x.shape[1:]), batch)


def _lay_parts(mesh: Mesh, tree: Any, axes: tuple[str, ...]) -> Any:
    """Arrays (parts, ...), each part laid over its own devices."""

    def lay(path: Any, leaf: jax.Array) -> jax.Array:
        inner = _spec(mesh, logical_axes(path, leaf.ndim - 1), leaf.shape[1:], without=axes)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(axes, *inner)))

    return jax.tree_util.tree_map_with_path(lay, tree)


def mean_over_parts(mesh: Mesh, tree: Any, axes: tuple[str, ...] = BATCH_AXES) -> Any:
    """Mean over the first axis of results of `over_parts`, laid over the mesh as `state_shardings` says."""
    if not axes:
        return tree
    means = jax.tree.map(lambda x: x.mean(0), tree)
    return jax.lax.with_sharding_constraint(means, state_shardings(mesh, means))


def gathered(mesh: Mesh, params: Any) -> Any:
    """Gather convolution kernels before their use, by devices that share a batch along all `AXES`.

    To multiply images with kernels that are split along the same axis, one of them has to be gathered: without this
    constraint XLA chooses the images, which are far larger.
    """

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        is_kernel = logical_axes(path, leaf.ndim).endswith("IO")
        return jax.lax.with_sharding_constraint(leaf, replicated(mesh)) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(gather, params)


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


def check_batch_size(
    mesh: Mesh, batch_size: int, accumulation_steps: int = 1, setting: str = "data.batch_size"
) -> None:
    """Check that mesh and gradient accumulation split the global batch evenly.

    Raises:
      ValueError: naming batch size, devices and accumulation.
    """
    parts = num_parts(mesh) * accumulation_steps
    if batch_size % parts:
        steps = f" times optim.accumulation_steps {accumulation_steps}" if setting == "data.batch_size" else ""
        raise ValueError(f"{setting}: {batch_size} is not a multiple of {parts} (devices along data and fsdp{steps})")


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Place this process's part of a batch on its devices; the global arrays are the parts of `batch_part` in order.

    Bytes of four axes are images: they travel as bytes, and become floats in [-1, 1] there. Arrays that lie on all
    devices of the mesh already, split or whole, stay as they are.
    """
    sharding, (_, count), devices = batch_sharding(mesh), batch_part(mesh), set(mesh.devices.flat)

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding.device_set == devices:
            return array
        array = np.asarray(array)
        shape = (count * len(array), *array.shape[1:])
        placed = jax.make_array_from_process_local_data(sharding, array, shape)
        return _scaling(mesh)(placed) if array.dtype == np.uint8 and array.ndim == 4 else placed

    return jax.tree.map(place, batch)


@functools.cache
def _scaling(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(scale, out_shardings=batch_sharding(mesh))


def scale(images: jax.Array) -> jax.Array:
    """uint8 images as float32 in [-1, 1], the numbers of `data.transforms.scale` bit for bit; floats as they are."""
    if images.dtype != jnp.uint8:
        return images
    # From integers, which are exact everywhere: a compiler may divide by multiplying with a rounded reciprocal, and
    # leave out the rounding between a product and a sum. x / 127.5 - 1, rounded twice, is a multiple of 2^-24; 131586
    # is 2^25 / 255 but for a rest, which the comparisons make up for.
    x = images.astype(jnp.int32)
    numerators = 131586 * x + (x >= 64).astype(jnp.int32) + (x >= 128).astype(jnp.int32) - 2**24
    return numerators.astype(jnp.float32) * jnp.float32(2**-24)

"""Device and host memory: size of a state, peak use, and the error of a step that does not fit."""

import contextlib
import logging
import math
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

logger = logging.getLogger(__name__)

# Fields of a `TrainState` and their names in the message.
_PARTS = {
    "params": "parameters",
    "opt_state": "optimizer",
    "ema_params": "average",
    "model_state": "codebook",
    "discriminator": "discriminator",
    "discriminator_opt_state": "its optimizer",
}


class OutOfMemory(MemoryError):
    """A step does not fit a device."""


@contextlib.contextmanager
def explained_memory(state: Any, remedies: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error of a device into one line that lists the state's parts and remedies.

    Args:
      state: a `TrainState`; only shapes and shardings are read, so it may have been donated.
      remedies: settings that need less memory, the cheapest first.

    Raises:
      OutOfMemory: in place of the device's error.
    """
    sizes = {name: device_bytes(getattr(state, name)) for name in _PARTS if getattr(state, name) is not None}
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        parts = ", ".join(f"{_PARTS[name]} {size / 2**30:.2f}" for name, size in sizes.items() if size)
        total = sum(sizes.values()) / 2**30
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = f" of {stats['bytes_limit'] / 2**30:.1f}" if "bytes_limit" in stats else ""
        raise OutOfMemory(
            f"memory: a step does not fit a device; the state alone takes {total:.2f}{limit} GiB there ({parts}), the "
            f"rest are gradients and activations; try, the cheapest first: {'; '.join(remedies)}"
        ) from error


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of arrays, or of shapes with shardings."""

    def size(leaf: Any) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def peak_memory() -> dict[str, int]:
    """Peak memory in bytes since the process began: "process_peak", and "device_peak" if the device reports it."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats() or {}
    return peak | ({"device_peak": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})

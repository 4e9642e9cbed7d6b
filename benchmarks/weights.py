"""Random weights: no speed depends on what a network knows."""

from typing import Any

import jax
import numpy as np


def draw(shapes: Any, placement: Any = None) -> Any:
    """Arrays of these shapes on the device, uniform with deviation 0.02; drawn on the host, where nothing compiles."""
    rng = np.random.default_rng(0)

    def uniform(shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.random(shape.shape, np.float32)
        values -= 0.5
        values *= 0.02 * 12**0.5
        return jax.device_put(values.astype(shape.dtype), placement)

    return jax.tree.map(uniform, shapes)

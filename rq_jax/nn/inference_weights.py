"""Weights at rest: what sampling keeps in memory, in float32, bfloat16 or int8, one array a layer."""

from typing import Any

import jax
import jax.numpy as jnp

from rq_jax.nn.attention import RestingWeight, unstack

DTYPES = ("float32", "bfloat16", "int8")
# The weights that are read at every code; for each how many of its axes are contracted, and how many stack others.
_READ = {
    "qkv_M3NA": (1, 0),
    "out_NAM": (2, 0),
    "up_MF": (1, 0),
    "down_FM": (1, 0),
    "classifier_MK": (1, 0),
    "classifier_DMK": (1, 1),
}


# A product of few float32 rows with one of these is 1.3 to 1.7 times faster on CPU with the weight first and its output
# axis first in it.
_WEIGHT_FIRST = ("down_FM",)


def at_rest(variables: Any, dtype: str = "float32", compute_dtype: Any = None) -> dict[str, Any]:
    """Variables of an `RQTransformer` as `sampling.generate` reads them fastest.

    Layers are no longer stacked, and the weights of the blocks and of the classifier rest in `dtype`: they are what a
    sampler waits for, since it reads all of them for each code. Everything else stays float32. "int8" has one scale
    for each output channel. Sums are float32 always. The model takes either form in all its methods.

    Args:
      variables: as trained, or at rest already.
      dtype: "float32" (all values stay as they are), "bfloat16" or "int8".
      compute_dtype: of the model; where it is float32 on a CPU, some weights are laid out for its products.

    Raises:
      ValueError: another dtype, or weights that are narrow already.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: '{dtype}' is unknown; allowed are {', '.join(DTYPES)}")

    lay_out = compute_dtype == jnp.float32 and jax.default_backend() == "cpu"

    def rest(path: Any, weight: Any) -> Any:
        name = path[-1].key
        num_axes, num_stacked = _READ.get(name, (0, 0))
        if num_axes == 0 or dtype == "float32" and not (lay_out and name in _WEIGHT_FIRST):
            return weight
        if isinstance(weight, RestingWeight):
            if dtype == "float32":
                return weight
            raise ValueError(f"dtype: '{dtype}' asked of weights that are narrow already; start from the trained ones")
        return RestingWeight.create(weight, dtype, num_axes, num_stacked)

    params = dict(variables["params"])
    for name, stack in params.items():
        if isinstance(stack, dict) and isinstance(stack.get("blocks"), dict):
            params[name] = {**stack, "blocks": unstack(stack["blocks"])}
    params = jax.tree_util.tree_map_with_path(rest, params, is_leaf=lambda x: isinstance(x, RestingWeight))
    return {**variables, "params": params}

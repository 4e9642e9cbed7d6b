"""Weights as the sampler reads them: in float32, bfloat16 or int8, one array a layer."""

from typing import Any

import jax
import jax.numpy as jnp

from rq_jax.nn.attention import InferenceWeight, unstack
from rq_jax.settings import checks

DTYPES = ("float32", "bfloat16", "int8")
# The weights that are read for every code: number of contracted axes, and of axes before them that stack weights.
_READ = {
    "qkv_M3NA": (1, 0),
    "out_NAM": (2, 0),
    "up_MF": (1, 0),
    "down_FM": (1, 0),
    "classifier_MK": (1, 0),
    "cell_classifier_MV": (1, 0),
    "classifier_DMK": (1, 1),
}
# On CPU a product of few float32 rows with these is 1.3 to 1.7 times faster with the weight as the first factor and its
# output axis first; the others gain nothing.
_WEIGHT_FIRST = ("down_FM",)


def for_inference(
    variables: Any, dtype: str = "float32", compute_dtype: Any = None, platform: str | None = None
) -> dict[str, Any]:
    """Variables of a transformer over codes in the form that `sampling.generate` reads fastest.

    A sampler reads all weights of the blocks and of the classifier for each code, and waits for memory: these are
    stored in `dtype`, one array a layer. Everything else stays float32. "int8" has one scale for each output channel.
    Sums are float32 always. All methods of the model take either form.

    Args:
      variables: as trained, or in this form already.
      dtype: "float32" (all values stay as they are), "bfloat16" or "int8".
      compute_dtype: of the model; where it is float32 on a CPU, some weights are laid out for its products.
      platform: that will sample, "cpu", "gpu" or "tpu"; None: the one that JAX uses here.

    Returns:
      Variables with `InferenceWeight` leaves.

    Raises:
      ValueError: another dtype, or weights that are narrow already.
    """
    checks.one_of("dtype", dtype, DTYPES)
    lay_out = compute_dtype == jnp.float32 and (platform or jax.default_backend()) == "cpu"

    def convert(path: Any, weight: Any) -> Any:
        name = path[-1].key
        num_axes, num_stacked = _READ.get(name, (0, 0))
        if num_axes == 0 or dtype == "float32" and not (lay_out and name in _WEIGHT_FIRST):
            return weight
        if isinstance(weight, InferenceWeight):
            if dtype == "float32":
                return weight
            raise ValueError(f"dtype: '{dtype}' asked of weights that are narrow already; start from the trained ones")
        return InferenceWeight.create(weight, dtype, num_axes, num_stacked)

    params = dict(variables["params"])
    for name, stack in params.items():
        if isinstance(stack, dict) and isinstance(stack.get("blocks"), dict):
            params[name] = {**stack, "blocks": unstack(stack["blocks"])}
    params = jax.tree_util.tree_map_with_path(convert, params, is_leaf=lambda x: isinstance(x, InferenceWeight))
    return {**variables, "params": params}

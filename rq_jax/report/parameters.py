"""Table of the parameters of a model."""

from typing import Any

import jax


def parameter_table(variables: Any) -> str:
    """Tabulate arrays by name, with shape, dtype, size and sharding, and their total.

    Args:
      variables: a tree of arrays, or of shapes with shardings, such as `TrainState.variables`.

    Returns:
      The table, a row for each array in the order of the names; its last line is the total in numbers and bytes.
    """
    from clu import parameter_overview

    # Flattened here: clu walks dictionaries only, and a codebook may be a tuple of arrays.
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return parameter_overview.get_parameter_overview(arrays, include_stats="sharding")

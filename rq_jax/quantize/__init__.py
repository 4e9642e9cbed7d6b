"""Residual quantisation (Lee et al., CVPR 2022, section 3.1): pure functions first, the Flax module on top.

A *codebook* is one array `(K, E)` shared by all depths, one array `(D, K, E)`, or a tuple of D arrays `(K_d, E)`.
Vectors have any leading axes: images `(B, h, w, E)`, audio frames `(B, T, E)`, item embeddings `(N, E)`.

>>> import jax, jax.numpy as jnp
>>> from rq_jax import quantize
>>> codebook = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
>>> result = quantize.residual_quantize(jnp.array([[5.0, 1.2], [0.1, 3.8]]), codebook, depth=2)
>>> result.codes.tolist()
[[1, 3], [2, 0]]
>>> result.quantized.tolist()
[[5.0, 1.0], [0.0, 4.0]]

Everything here is written for the *global* batch: under `jax.jit` with sharded inputs the sums of the codebook update
are global by construction, so one device and eight give the same numbers.

No number that is not finite reaches a codebook: whatever learns leaves such vectors out, see `finite_vectors`, and a
batch without a single vector left changes nothing.
"""

from rq_jax.quantize.codes import (
    Codebook,
    ResidualCodes,
    check_codes,
    codebook_sizes,
    draw_codes,
    finite_vectors,
    fold_patches,
    lookup,
    nearest_codes,
    residual_quantize,
    soft_codes,
    soft_labels,
    unfold_patches,
)
from rq_jax.quantize.ema import CodebookState, ema_update, kmeans, quantize_and_update, restart_candidates
from rq_jax.quantize.module import ResidualQuantizer, check_settings, per_depth

__all__ = [
    "Codebook",
    "CodebookState",
    "ResidualCodes",
    "ResidualQuantizer",
    "check_codes",
    "check_settings",
    "codebook_sizes",
    "draw_codes",
    "ema_update",
    "finite_vectors",
    "fold_patches",
    "kmeans",
    "lookup",
    "nearest_codes",
    "per_depth",
    "quantize_and_update",
    "residual_quantize",
    "restart_candidates",
    "soft_codes",
    "soft_labels",
    "unfold_patches",
]

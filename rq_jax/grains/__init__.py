"""Variable-length coding: grains of regions, and tokens of pictures (DQ-VAE, Huang et al., CVPR 2023, section 3).

A *region* has a *grain* g, from 0 (coarse: one code) to G - 1 (finest: 2^(G-1) x 2^(G-1) codes). Codes are kept dense
on the grid of the finest grain (h, w), where a coarser code is repeated over its cells; grains on the grid of regions
(u, v). A *cell* of grain g is one code of that grain, numbered in raster order of the grain's own grid.

>>> import jax.numpy as jnp
>>> layout = GrainLayout(region_grid=(1, 2), num_grains=2, codebook_size=10)
>>> codes = jnp.array([[7, 7, 1, 2], [7, 7, 3, 4]])[None, :, :, None]
>>> packed = pack(GrainedCodes(codes, jnp.array([[[0, 1]]])), layout)
>>> packed.content[0, :, 0].tolist(), packed.length.tolist()
([12, 7, 11, 12, 1, 2, 3, 4, 11, 10, 10, 10], [9])
>>> packed.position[0].tolist()
[4, 0, 3, 10, 2, 3, 6, 7, 9, 8, 8, 8]
>>> bool((unpack(packed, layout).codes.codes == codes).all())
True
"""

from rq_jax.grains.entropy import (
    ENTROPY_BINS,
    check_ratios,
    check_thresholds,
    entropy_thresholds,
    patch_entropy,
    route_by_entropy,
)
from rq_jax.grains.layout import (
    ORDERS,
    GrainedCodes,
    GrainLayout,
    PackedCodes,
    cell_weights,
    check_grains,
    check_ids,
    num_codes,
    repeat_cells,
)
from rq_jax.grains.packing import Unpacked, check_packed, pack, unpack

__all__ = [
    "ENTROPY_BINS",
    "GrainLayout",
    "GrainedCodes",
    "ORDERS",
    "PackedCodes",
    "Unpacked",
    "cell_weights",
    "check_grains",
    "check_ids",
    "check_packed",
    "check_ratios",
    "check_thresholds",
    "entropy_thresholds",
    "num_codes",
    "pack",
    "patch_entropy",
    "repeat_cells",
    "route_by_entropy",
    "unpack",
]

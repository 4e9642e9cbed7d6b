"""Small DQ-Transformers of every kind, which the tests of the model and of the sampler share."""

import functools

import jax.numpy as jnp
import numpy as np
from toy_transformer import filled, run

from rq_jax import grains
from rq_jax.grains import GrainedCodes, PackedCodes
from rq_jax.models import create

__all__ = ["BASE", "CLASS", "DEEP", "KINDS", "NULL", "TEXT", "THREE", "build", "conds", "draw", "pack", "run"]

# K is neither a number of cells nor of slots, so that contents and positions do not look alike.
B, G, K, D, M, U, V = 2, 2, 11, 1, 12, 3, 5
BASE = dict(
    codebook_size=K, code_shape=(4, 6, D), code_dim=7, num_grains=G, model_dim=M, num_heads=4, position_layers=1,
    content_layers=2,
)  # fmt: skip
CLASS = dict(cond_vocab_size=V)
NULL = {**CLASS, "use_null_cond": True}
TEXT = dict(cond_vocab_size=V, cond_length=U)
DEEP = dict(code_shape=(4, 6, 2), depth_layers=1, depth_num_heads=2)
THREE = dict(code_shape=(4, 12, 1), num_grains=3, order="region")
KINDS = {"none": {}, "class": CLASS, "text": TEXT, "guided": NULL, "three grains": THREE, "depth two": DEEP}


@functools.cache
def build(**settings):
    """A model and random variables."""
    model = create("dqtransformer", **{**BASE, **settings})
    return model, filled(model)


def conds(model, count: int = B):
    """A condition of each image, or None."""
    if not model.is_conditional:
        return None
    values = np.random.default_rng(4).integers(0, model.cond_vocab_size, (count, model.cond_length))
    return jnp.asarray(values, jnp.int32)


def draw(model, count: int = B, seed: int = 0) -> GrainedCodes:
    """Random codes, a coarser one repeated over its cells, and random grains of which every one occurs in all images."""
    (h, w, depth), (u, v), levels = model.code_shape, model.region_grid, model.num_grains
    rng = np.random.default_rng(seed)
    grain_map = np.stack([rng.permutation(np.arange(u * v) % levels) for _ in range(count)]).reshape(count, u, v)
    codes = rng.integers(0, model.codebook_size, (count, h, w, depth))
    rows, columns = np.indices((h, w))
    size = 1 << (levels - 1 - np.repeat(np.repeat(grain_map, h // u, 1), w // v, 2))
    codes = codes[np.arange(count)[:, None, None], rows // size * size, columns // size * size]
    return GrainedCodes(jnp.asarray(codes, jnp.int32), jnp.asarray(grain_map, jnp.int32))


def pack(model, count: int = B, seed: int = 0, tokens: int | None = None) -> PackedCodes:
    """The tokens of `draw`."""
    return grains.pack(draw(model, count, seed), model.layout, tokens)

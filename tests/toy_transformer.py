"""Small RQ-Transformers of every kind, which the tests of the model and of the sampler share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.models import abstract_variables, create

B, h, w, D, K, E = 2, 3, 5, 4, 7, 6
T, V, U, M, N = h * w, 9, 3, 12, 4
SIZES = (7, 5, 3, 2)
BASE = dict(
    codebook_size=K, code_shape=(h, w, D), code_dim=E, model_dim=M, num_heads=N, spatial_layers=2, depth_layers=1
)


CLASS = dict(cond_vocab_size=V)
TEXT = dict(cond_vocab_size=V, cond_length=U)
UNEQUAL = dict(
    codebook_size=SIZES, use_shared_codebook=False, use_shared_token_embedding=False, use_shared_classifier=False
)


CODES = jnp.asarray(np.random.default_rng(0).integers(0, K, (B, h, w, D)))
UNEQUAL_CODES = jnp.asarray(np.random.default_rng(0).integers(0, SIZES, (B, h, w, D)))
CONDS = {"none": None, "class": jnp.array([[4], [8]]), "text": jnp.array([[4, 0, 8], [1, 1, 2]])}
KINDS = {"none": {}, "class": CLASS, "text": TEXT}


@functools.cache
def build(**settings):
    """A model and random variables, every bias and norm and the codebook included."""
    model = create("rqtransformer", **{**BASE, **settings})
    return model, filled(model)


def filled(model):
    """Random variables of a transformer, all of them large enough to matter."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(noise if path[0].key == "codebook" else 0.4 * noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(fill, abstract_variables(model))


@functools.partial(jax.jit, static_argnames=("model", "method", "train", "index"))
def run(model, variables, *arguments, method="__call__", rngs=None, index=None, **settings):
    """A method of the model; `index` is the depth that a classifier is asked for."""
    arguments += () if index is None else (index,)
    return model.apply(variables, *arguments, method=method, rngs=rngs, **settings)

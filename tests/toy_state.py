"""Small states, which the tests of loading and saving share."""

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.state import create_state

OPTIMIZER = make_optimizer(name="adamw", learning_rate=0.1, total_steps=9, weight_decay=0.1)


def numbers(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def toy_state(step=0, codebook=None, use_ema=True, size=5, optimizer=OPTIMIZER):
    variables = {"params": {"w_MF": jnp.asarray(numbers((size, 3), step)), "bias_F": jnp.asarray(numbers(3, step + 1))}}
    if codebook is not None:
        variables["codebook"] = {"codebook_KE": codebook}
    state = create_state(variables, optimizer, jax.random.key(step), use_ema)
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step + 0.25).astype(x.dtype), state.opt_state)
    return state.replace(step=jnp.int32(step), opt_state=opt_state, skipped_steps=jnp.int32(step // 2))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

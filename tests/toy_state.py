"""Small states and models, which the tests of loading and saving share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import models
from rq_jax.checkpoint import Checkpointer
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


RQVAE = dict(
    name="rqvae", image_size=4, code_shape=(2, 1, 3), code_dim=4, codebook_size=(7, 5, 3), use_shared_codebook=False,
    width=2, width_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), z_channels=3,
)  # fmt: skip
RQTRANSFORMER = dict(
    name="rqtransformer", code_shape=(2, 1, 3), code_dim=4, codebook_size=(7, 5, 3), use_shared_codebook=False,
    use_shared_token_embedding=False, use_shared_classifier=False, model_dim=2, num_heads=1, spatial_layers=1,
    depth_layers=1,
)  # fmt: skip


def fill(shapes, seed=0):
    """Arrays with values of their own in the place of shapes."""
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([jnp.asarray(numbers(s.shape, (seed, i))) for i, s in enumerate(leaves)])


@functools.cache
def shapes_of(name):
    settings = {"rqvae": RQVAE, "rqtransformer": RQTRANSFORMER}[name]
    return models.abstract_variables(models.create(**settings))


def model_state_of(name, step, use_ema=True):
    """A state of a real model after `step` steps, no two of its leaves equal."""
    state = create_state(fill(shapes_of(name), seed=step), OPTIMIZER, jax.random.key(step), use_ema)
    ema_params = fill(state.params, seed=100 + step) if use_ema else None
    return state.replace(step=jnp.int32(step), ema_params=ema_params)


def save_steps(directory, *steps, **settings):
    """Save the toy states of some steps as a run does."""
    with Checkpointer(directory, **{"keep": 9, **settings}) as saving:
        for step in steps:
            saving.save(toy_state(step), {"note": step})
        saving.wait()


def restored_step(directory, **settings):
    """The step that a run goes on from, whose state must be whole."""
    with Checkpointer(directory, keep=9, **settings) as restoring:
        state, host = restoring.restore(toy_state())
    assert_equal(state, toy_state(int(state.step)))
    assert host == {"note": int(state.step)}
    return int(state.step)


def halved(variables):
    """What comes back of variables that were saved in half precision: all but what is beyond its range."""
    narrow = lambda x: x.astype(np.float16).astype(np.float32) if np.all(np.abs(x) <= 65504) else x  # noqa: E731
    return jax.tree.map(lambda x: narrow(np.asarray(x)), variables)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

"""Encoders and decoder by themselves: memory of the backward pass, position bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.models.coder import Decoder, Encoder, GrainedEncoder, PositionBias


@pytest.mark.parametrize(
    "coder, shape, multipliers",
    [
        (Encoder, (2, 32, 32, 3), (1, 2)),
        (GrainedEncoder, (2, 32, 32, 3), (1, 1, 2)),  # tails with attention below the finest level
        (Decoder, (2, 16, 16, 5), (1, 2)),
    ],
)
def test_remat_keeps_a_fraction_for_the_backward_pass(coder, shape, multipliers):
    """Bytes that JAX hands from the forward to the backward pass. XLA on CPU merges what is recomputed with the forward
    pass again, so that compiled there both programs use the same memory."""

    def saved_bytes(use_remat):
        settings = dict(width=8, width_multipliers=multipliers, num_res_blocks=3, attention_levels=(), out_channels=3)
        module, x = coder(**settings, norm_groups=4, use_remat=use_remat), jnp.zeros(shape)
        params = jax.eval_shape(module.init, jax.random.key(0), x)
        _, go_back = jax.eval_shape(lambda params: jax.vjp(lambda p: module.apply(p, x, train=True), params), params)
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(go_back))

    assert 0 < saved_bytes(use_remat=True) < 0.4 * saved_bytes(use_remat=False)


def test_a_position_bias_by_loops():
    h, w, C = 3, 5, 4
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("kernel", (2, C)), ("bias", (C,)))}
    params |= {name: rng.normal(size=(n, C)).astype(np.float32) for name, n in (("rows", h), ("columns", w))}
    x = rng.normal(size=(2, h, w, C)).astype(np.float32)
    expected = np.array(x)
    for i in range(h):
        for j in range(w):
            place = np.array([2 * j / (w - 1) - 1, 2 * i / (h - 1) - 1])  # across first
            fourier = np.sin(place @ params["kernel"] + params["bias"])
            expected[:, i, j] += fourier + params["rows"][i] + params["columns"][j]
    np.testing.assert_allclose(PositionBias().apply({"params": params}, x), expected, atol=1e-5)
    half = PositionBias().apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.float32

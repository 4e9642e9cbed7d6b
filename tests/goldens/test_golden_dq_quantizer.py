"""The quantizer of DQ-VAE against the original PyTorch code: codes, weighted loss, moving average, restart (test 6).

Floating-point arrays agree within 1e-5 of their largest value, codes exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import grains, losses, quantize

STRUCTURES = {"dqvae-entropy": 2, "dqvae-feature": 2, "dqvae-triple": 3}
DECAY = 0.99


def load(directory, name):
    """(arrays, state of the codebook without its row of padding, number of grains)."""
    io, state = ({**np.load(directory / f"{name}.{kind}.npz")} for kind in ("io", "state"))
    return io, codebook_of(state, "quantize.codebook."), STRUCTURES[name]


@pytest.fixture(scope="module", params=STRUCTURES)
def golden(request, dq_goldens):
    return load(dq_goldens, request.param)


def codebook_of(arrays, prefix):
    keys = ("weight", "cluster_size_ema", "embed_ema")
    table_KE, counts_K, sums_KE = (jnp.asarray(arrays[prefix + key]) for key in keys)
    return quantize.CodebookState(table_KE[:-1], counts_K, sums_KE)


def nhwc(array):
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def assert_close(actual, expected, name=""):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_6_codes_and_the_weighted_loss(golden):
    io, state, num_grains = golden
    latents, weights = nhwc(io["z_e"]), grains.cell_weights(jnp.asarray(io["grain_map"], jnp.int32), num_grains)
    result = quantize.residual_quantize(latents, state.codebook_KE, 1)
    np.testing.assert_array_equal(result.codes[..., 0], io["codes"])
    assert_close(result.quantized, nhwc(io["z_q"]))
    loss = losses.commitment_loss(latents, result.partial_sums, weights)
    assert_close(1.25 * loss, io["quant_loss"])  # beta is 0.25, and the table's part has no gradient
    assert float(losses.commitment_loss(latents, result.partial_sums)) > 1.01 * float(loss)


def test_6_a_training_pass_moves_the_codebook_as_there(golden):
    io, state, num_grains = golden
    latents = nhwc(io["train.0.z_e"])
    result, (after,) = jax.jit(lambda x: quantize.quantize_and_update(x, [state], 1, [DECAY]))(latents)
    np.testing.assert_array_equal(result.codes[..., 0], io["train.0.codes"])
    for actual, expected in zip(after, codebook_of(io, "train.0.codebook."), strict=True):
        assert_close(actual, expected)
    weights = grains.cell_weights(jnp.asarray(io["train.0.grain_map"], jnp.int32), num_grains)
    assert_close(1.25 * losses.commitment_loss(latents, result.partial_sums, weights), io["train.0.quant_loss"])


def test_6_unused_codes_restart_as_there(dq_goldens):
    # Of the other structures the latents of this pass, which had gate noise of its own, are not stored.
    io, state, _ = load(dq_goldens, "dqvae-entropy")
    x_NE, codes_N = nhwc(io["train.0.z_e"]).reshape(-1, state.codebook_KE.shape[1]), io["restart.codes"].ravel()
    rows_KE = x_NE[io["restart.perm"][: len(state.counts_K)]]
    after = quantize.ema_update(state, x_NE, jnp.asarray(codes_N, jnp.int32), DECAY, rows_KE)
    for actual, expected in zip(after, codebook_of(io, "restart.codebook."), strict=True):
        assert_close(actual, expected)
    assert (np.asarray(after.counts_K) == 1).any(), "nothing restarted"

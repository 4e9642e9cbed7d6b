"""The budget loss against the official code's, in values and gradients."""

import jax
import numpy as np
import pytest

from rq_jax import losses


@pytest.mark.parametrize(
    ("name", "targets", "weights"),
    [("dqvae-feature", (0.5,), (20.0,)), ("dqvae-triple", (0.3, 0.3), (1.0, 1.0))],
)
def test_4_budget_as_there(dq_goldens, name, targets, weights):
    with np.load(dq_goldens / f"{name}.io.npz") as io:
        gates, expected, gradients = (io[f"budget.{key}"] for key in ("gates", "loss", "grad"))
    value_and_grad = jax.vmap(jax.value_and_grad(lambda gates: losses.budget_loss(gates, targets, weights)))
    actual, actual_gradients = value_and_grad(np.moveaxis(gates, 2, -1))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * expected.max())
    # Those of the original differ by a number that all grains of a region share, which no softmax sees.
    actual, expected = (x - x.mean(-1, keepdims=True) for x in (actual_gradients, np.moveaxis(gradients, 2, -1)))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3

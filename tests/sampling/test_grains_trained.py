"""A small DQ-Transformer that has learned eight images by heart: what it then says, and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_dqtransformer import CLASS, build, draw

from rq_jax import grains, losses
from rq_jax.models import init_variables
from rq_jax.sampling import generate

N = 8


@pytest.fixture(scope="module")
def learned():
    """A model by class, one class an image; the images; what it learned."""
    settings = {**CLASS, "cond_vocab_size": N, "code_shape": (4, 4, 1), "model_dim": 32, "residual_dropout": 0.0}
    model, _ = build(**settings)
    codes, cond = draw(model, N), jnp.arange(N)
    packed = grains.pack(codes, model.layout)
    optimizer = optax.adam(3e-3, b2=0.99)

    def nats(params):
        output = model.apply({"params": params}, packed, cond)
        return losses.stream_nats(output.position_logits, output.content_logits, output.tokens, model.layout)

    def loss(params):
        sums = nats(params)
        means = sums.position.sum(0) / sums.position_counts.sum(0), sums.content.sum(0) / sums.content_counts.sum(0)
        return means[0].mean() + means[1].mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=400)[0][0]

    with jax.numpy_dtype_promotion("standard"):
        params = train(init_variables(model, jax.random.key(0))["params"])
    return model, {"params": params}, codes, cond, nats(params)


def test_11_eight_images_are_learned_by_heart_and_drawn_again(learned):
    model, variables, codes, cond, nats = learned
    assert float(nats.position.sum() / nats.position_counts.sum()) < 0.02
    assert float(nats.content.sum() / nats.content_counts.sum()) < 0.02
    drawn = generate(model, variables, jax.random.key(1), N, cond)
    assert (np.asarray(drawn.grains) == codes.grains).mean() > 0.95
    assert (np.asarray(drawn.codes) == codes.codes).mean() > 0.95


def test_12_positions_of_the_finest_grain_carry_nothing(learned):
    model, variables, codes, cond, nats = learned
    assert float(nats.position[:, 1].sum() / nats.position_counts[:, 1].sum()) < 0.02
    packed = grains.pack(codes, model.layout)
    drawn = jnp.argmax(model.apply(variables, packed, cond).position_logits, axis=-1)  # no cell ruled out
    is_cell = (packed.grain[:, 1:] == 1) & (packed.position[:, 1:] < model.layout.cells(1))
    np.testing.assert_array_equal(drawn[is_cell], packed.position[:, 1:][is_cell])

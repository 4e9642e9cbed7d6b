"""Dropout that drops the same whether a batch is one array or parts under `vmap`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


class Dropout(nn.Module):
    """As `flax.linen.Dropout`, and with the same draws, also where `vmap` runs over parts of the batch.

    Flax would drop the same elements of every part.

    Attributes:
      rate: share of the elements that become zero, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """x (B, ...) with elements dropped, drawn from the rng stream "dropout", and the others scaled up."""
        if self.rate == 0.0 or deterministic:
            return x
        keep = 1.0 - self.rate
        mask = _draw(self.make_rng("dropout"), jax.lax.stop_gradient(x), keep)
        return jax.lax.select(mask, x / keep, jnp.zeros_like(x))


def _draw(rng: jax.Array, like: jax.Array, keep: float) -> jax.Array:
    """True with probability `keep`, in the shape of `like`."""

    @custom_vmap
    def draw(rng: jax.Array, like: jax.Array) -> jax.Array:
        return jax.random.bernoulli(rng, keep, like.shape)

    @draw.def_vmap
    def _(size: int, batched: list[bool], rng: jax.Array, like: jax.Array) -> tuple[jax.Array, bool]:
        if batched[0]:  # each has a key of its own
            shape = like.shape[1:] if batched[1] else like.shape
            return jax.vmap(lambda rng: jax.random.bernoulli(rng, keep, shape))(rng), True
        whole = like.reshape(-1, *like.shape[2:])  # the batch that the parts are of
        return _draw(rng, whole, keep).reshape(like.shape), True

    return draw(rng, like)

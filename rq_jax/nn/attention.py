"""The causal pre-norm transformer stack, the same for training and for cached sampling.

Parameter names end in the letters of their axes (M width, F MLP width, N heads, A head width, 3 for query, key and
value): `sharding.RULES` reads the logical axes of every parameter from its name. Under the scan over layers each has a
leading axis L.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# The original never applies its minGPT-style initialiser (kakaobrain/rq-vae-transformer:interfaces.py); it is the
# plausible intent of the unreleased trainer and trains better than torch's default.
init_weight = nn.initializers.normal(0.02)


class KVCache(NamedTuple):
    """Keys and values (L, B, S, N, A) of all layers; the first `length` (int32 scalar) of the S rows are filled."""

    keys_LBSNA: jax.Array
    values_LBSNA: jax.Array
    length: jax.Array


def empty_cache(
    num_layers: int, batch: int, size: int, num_heads: int, head_dim: int, dtype: jnp.dtype
) -> KVCache:
    """A cache of `size` rows, none of them filled."""
    rows = jnp.zeros((num_layers, batch, size, num_heads, head_dim), dtype)
    return KVCache(rows, rows, np.int32(0))  # a number that is known while a program is traced


def project(x: jax.Array, weight: jax.Array, num_axes: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
    """Contract the last `num_axes` axes of x with the first of the weight; the result may have another dtype.

    As one product of two matrices: what XLA makes of the same einsum on CPU is two to three times slower, most of all
    its gradient.
    """
    rows, columns = x.shape[:-num_axes], weight.shape[num_axes:]
    length = math.prod(weight.shape[:num_axes])
    product = jnp.dot(x.reshape(-1, length), weight.reshape(length, -1), preferred_element_type=dtype)
    return product.reshape(*rows, *columns)


class LayerNorm(nn.Module):
    """Layer normalisation with epsilon 1e-5 and float32 statistics."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)
        nn.share_scope(self, norm)
        return norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with causal multi-head attention."""

    num_heads: int
    use_attention_bias: bool = True
    use_mlp_bias: bool = True
    gelu: str = "exact"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BSM: jax.Array, cached, length):
        """One layer on new positions.

        Args:
          x_BSM: inputs of the new positions.
          cached: keys and values (B, S', N, A) of earlier positions, or None.
          length: how many of the cached rows are filled.

        Returns:
          Outputs (B, S, M); the keys and values of the new positions where a cache is kept, else None.
        """
        attended, new = self._attend(LayerNorm(self.dtype, name="norm1")(x_BSM), cached, length)
        x_BSM = x_BSM + self._drop(self.residual_dropout, attended)
        hidden = self._mlp(LayerNorm(self.dtype, name="norm2")(x_BSM))
        return x_BSM + self._drop(self.residual_dropout, hidden), new

    def _attend(self, x_BSM, cached, length):
        S, M, N = *x_BSM.shape[1:], self.num_heads
        A = M // N
        qkv = project(x_BSM, self._weight("qkv_M3NA", (M, 3, N, A)))
        if self.use_attention_bias:
            qkv += self._bias("qkv_bias_3NA", (3, N, A))
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        scores = _scores(query, key)
        scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores, -jnp.inf)
        if cached is not None:
            # The cache stays as it is and the new keys stand beside it: no layer writes a second copy of it.
            old_key, old_value = cached
            filled = jnp.arange(old_key.shape[1]) < length
            scores = jnp.concatenate([jnp.where(filled, _scores(query, old_key), -jnp.inf), scores], axis=-1)
            all_values = jnp.concatenate([old_value.astype(self.dtype), value], axis=1)
        else:
            all_values = value
        weights = self._drop(self.attention_dropout, nn.softmax(scores, axis=-1)).astype(self.dtype)
        mixed = jnp.einsum("bnst,btna->bsna", weights, all_values)
        out = project(mixed, self._weight("out_NAM", (N, A, M)), num_axes=2)
        if self.use_attention_bias:
            out += self._bias("out_bias_M", (M,))
        return out, None if cached is None else (key, value)

    def _mlp(self, x_BSM):
        M = x_BSM.shape[-1]
        F = 4 * M
        hidden = project(x_BSM, self._weight("up_MF", (M, F)))
        if self.use_mlp_bias:
            hidden += self._bias("up_bias_F", (F,))
        hidden = (
            nn.gelu(hidden, approximate=False)
            if self.gelu == "exact"
            else hidden * nn.sigmoid(1.702 * hidden)
        )
        out = project(hidden, self._weight("down_FM", (F, M)))
        if self.use_mlp_bias:
            out += self._bias("down_bias_M", (M,))
        return out

    def _weight(self, name, shape):
        return self.param(name, init_weight, shape).astype(self.dtype)

    def _bias(self, name, shape):
        return self.param(name, nn.initializers.zeros, shape).astype(self.dtype)

    def _drop(self, rate, x):
        return nn.Dropout(rate, deterministic=not self.train)(x)


class Stack(nn.Module):
    """`num_layers` blocks under one scan; zero layers are the identity. Attributes as in `Block`."""

    num_layers: int
    num_heads: int
    use_attention_bias: bool = True
    use_mlp_bias: bool = True
    gelu: str = "exact"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    use_remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x_BSM: jax.Array, cache: KVCache | None = None, train: bool = False
    ) -> tuple[jax.Array, KVCache | None]:
        """Run new positions (B, S, M) through all layers, after those in the cache where one is given."""
        if self.num_layers == 0:
            return x_BSM, cache and cache._replace(length=cache.length + x_BSM.shape[1])
        block = nn.remat(Block, prevent_cse=False) if self.use_remat and train else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=self.num_layers,
        )(
            num_heads=self.num_heads,
            use_attention_bias=self.use_attention_bias,
            use_mlp_bias=self.use_mlp_bias,
            gelu=self.gelu,
            attention_dropout=self.attention_dropout,
            residual_dropout=self.residual_dropout,
            train=train,
            dtype=self.dtype,
            name="blocks",
        )
        if cache is None:
            return layers(x_BSM, None, None)[0], None
        x_BSM, (keys, values) = layers(x_BSM, (cache.keys_LBSNA, cache.values_LBSNA), cache.length)
        return x_BSM, KVCache(
            _write_rows(cache.keys_LBSNA, keys, cache.length),
            _write_rows(cache.values_LBSNA, values, cache.length),
            cache.length + x_BSM.shape[1],
        )


def _scores(query, key):
    scale = query.shape[-1] ** -0.5
    return (
        jnp.einsum("bsna,btna->bnst", query, key.astype(query.dtype), preferred_element_type=jnp.float32)
        * scale
    )


def _write_rows(rows_LBSNA, new, start):
    return jax.lax.dynamic_update_slice(rows_LBSNA, new.astype(rows_LBSNA.dtype), (0, 0, start, 0, 0))

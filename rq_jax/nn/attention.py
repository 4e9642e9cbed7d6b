"""The causal pre-norm transformer stack, the same for training and for cached sampling.

Parameter names end in the letters of their axes (M width, F MLP width, N heads, A head width, 3 for query, key and
value): `sharding.RULES` reads the logical axes of every parameter from its name. Under the scan over layers each has a
leading axis L.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.nn.dropout import Dropout
from rq_jax.nn.placement import place

# kakaobrain/rq-vae-transformer:interfaces.py defines this minGPT-style initialiser and never applies it. Its trainer
# was not released; this one trains better than torch's default.
init_weight = nn.initializers.normal(0.02, jnp.float32)
init_bias = nn.initializers.constant(0.0, jnp.float32)

# Stacks of at most this many layers are unrolled: copying the weights and activations of a scan takes a tenth of a
# small model's step on CPU. The scan saves compile time, which matters for large models.
_MAX_UNROLLED = 8


class KVCache(NamedTuple):
    """Keys and values of each layer, (B, N, S, A); the first `length` (int32 scalar) of the S rows are filled.

    One array a layer: each is written in place, and no program slices a layer out of a larger array. Heads stand before
    rows, in the order in which attention reads them.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    def resize(self, size: int) -> "KVCache":
        """The same cache with `size` rows, at least as many as are filled."""

        def fit(rows_BNSA: jax.Array) -> jax.Array:
            return jnp.pad(rows_BNSA[:, :, :size], ((0, 0), (0, 0), (0, max(0, size - rows_BNSA.shape[2])), (0, 0)))

        return KVCache(tuple(map(fit, self.keys)), tuple(map(fit, self.values)), self.length)


def empty_cache(num_layers: int, batch: int, size: int, num_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """A cache of `size` rows, none of them filled."""
    rows = tuple(jnp.zeros((batch, num_heads, size, head_dim), dtype) for _ in range(num_layers))
    return KVCache(rows, rows, np.int32(0))  # a number that is known while a program is traced


class InferenceWeight(NamedTuple):
    """A weight as the sampler reads it: float32, bfloat16, or int8 with a float32 scale for each output channel.

    Output axes stand before the contracted ones, which are one axis L: products of few rows with such a matrix read
    half the bytes and are up to 1.7 times faster on CPU than those with bfloat16 in the order of training.
    """

    values: jax.Array  # (*outputs, L)
    scales: jax.Array | None  # outputs

    @classmethod
    def create(cls, weight: jax.Array, dtype: str, num_axes: int = 1, num_stacked: int = 0) -> "InferenceWeight":
        """Round a weight whose `num_axes` axes after `num_stacked` leading ones are contracted."""
        stacked, columns = weight.shape[:num_stacked], weight.shape[num_stacked + num_axes :]
        flat = jnp.asarray(weight, jnp.float32).reshape(*stacked, -1, *columns)
        values = jnp.moveaxis(flat, num_stacked, -1)
        if dtype != "int8":
            return cls(values.astype(dtype), None)
        # Symmetric: the largest value of a channel is 127 steps. A channel of zeros has scale 0, and dividing by the
        # smallest normal number instead gives 0 steps, not NaN.
        scales = jnp.max(jnp.abs(values), axis=-1) / 127
        steps = values / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)[..., None]
        return cls(jnp.round(steps).astype(jnp.int8), scales)


Weight = jax.Array | InferenceWeight


def stored_weight(module: nn.Module, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Weight:
    """A weight of the module, cast to the dtype of the computation; an `InferenceWeight` as it is stored.

    Casting an `InferenceWeight` would write a second copy of it to memory at every step of the sampler.
    """
    if module.has_variable("params", name):
        stored = module.get_variable("params", name)
        if isinstance(stored, InferenceWeight):
            return stored
    return jnp.asarray(module.param(name, init_weight, shape), dtype)


def project(x: jax.Array, weight: Weight, num_axes: int = 1, dtype: jnp.dtype | None = None) -> jax.Array:
    """Contract the last `num_axes` axes of x with the first of the weight.

    Args:
      x: (*rows, *contracted).
      weight: (*contracted, *columns), or an `InferenceWeight`, which multiplies in its own dtype (int8 in that of x)
        with float32 sums.
      num_axes: number of contracted axes.
      dtype: of the result; default: that of x.

    Returns:
      (*rows, *columns).
    """
    dtype, rows = x.dtype if dtype is None else dtype, x.shape[:-num_axes]
    if isinstance(weight, InferenceWeight):
        product = _inference_product(x.reshape(math.prod(rows), -1), weight)
        return product.astype(dtype).reshape(*rows, *weight.values.shape[:-1])
    # One product of two matrices: XLA on CPU makes the same einsum two to three times slower, most of all its gradient.
    length = math.prod(weight.shape[:num_axes])
    product = jnp.dot(x.reshape(-1, length), weight.reshape(length, -1), preferred_element_type=dtype)
    return product.reshape(*rows, *weight.shape[num_axes:])


def _project_heads(x: jax.Array, weight_M3NA: jax.Array) -> jax.Array:
    """`project` to (..., 3, N, A) for training: behind the 3, heads that are split over devices would be gathered."""
    return jnp.swapaxes(project(x, jnp.swapaxes(weight_M3NA, 1, 2)), -3, -2)


def _inference_product(x_RL: jax.Array, weight: InferenceWeight) -> jax.Array:
    """Product (R, C) of rows with the transposed matrix (C, L), in float32."""
    R, L = x_RL.shape
    matrix_CL = weight.values.reshape(-1, L)
    if matrix_CL.dtype == jnp.float32:
        # The weight stands first: with few rows that product is faster on CPU. The barrier keeps XLA from swapping
        # the two back to save the transposition.
        return jax.lax.optimization_barrier(matrix_CL @ x_RL.astype(jnp.float32).T).T
    if weight.scales is not None:
        matrix_CL = matrix_CL.astype(x_RL.dtype)  # the scales multiply the sums below, once a channel
    # XLA's product of a single row with a bfloat16 matrix is eight times slower on CPU than that of two rows.
    x_RL = jnp.pad(x_RL, ((0, int(R == 1)), (0, 0))).astype(matrix_CL.dtype)
    product = jax.lax.dot_general(x_RL, matrix_CL, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)[:R]
    return product if weight.scales is None else product * weight.scales.reshape(1, -1)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias, which has the last axes of x and is the same along all others."""
    return x + with_rank(bias, x.ndim)


def with_rank(x: jax.Array, rank: int) -> jax.Array:
    """x behind leading axes of size 1, `rank` axes in all."""
    return jnp.expand_dims(x, tuple(range(rank - x.ndim)))


def unstack(layers: Any) -> tuple[Any, ...]:
    """Stacked parameters (L, ...) of a `Stack` as one tree a layer."""
    leaves, structure = jax.tree.flatten(layers)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*leaves, strict=True))


class LayerNorm(nn.Module):
    """Layer normalisation with epsilon 1e-5 and float32 statistics."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)
        nn.share_scope(self, norm)
        with jax.numpy_dtype_promotion("standard"):  # inside, Flax mixes bfloat16 with float32
            return norm(x)


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """Settings of a `Block`.

    Attributes:
      num_heads: N, a divisor of the width.
      use_attention_bias, use_mlp_bias: biases of the projections.
      gelu: "exact" (erf), or "sigmoid", x * sigmoid(1.702 x).
      attention_dropout, residual_dropout: of attention weights and of both branches before they are added.
      use_flash_attention: fused attention where no cache is given, without attention_dropout.
      dtype: of the computation; softmax and norms are float32.
    """

    num_heads: int
    use_attention_bias: bool = True
    use_mlp_bias: bool = True
    gelu: str = "exact"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    use_flash_attention: bool = False
    dtype: jnp.dtype = jnp.float32


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with causal multi-head attention."""

    settings: BlockSettings
    train: bool = False

    @nn.compact
    def __call__(self, x_BSM: jax.Array, cached, length):
        """One layer on new positions.

        Args:
          x_BSM: inputs of the new positions.
          cached: keys and values (B, N, S', A) with room for the new ones, or None.
          length: number of filled rows in the cache.

        Returns:
          Outputs (B, S, M); the keys and values with those of the new positions where there is a cache, else None.
        """
        settings, x_BSM = self.settings, place(x_BSM, "BSM")
        attended, cached = self._attend(LayerNorm(settings.dtype, name="norm1")(x_BSM), cached, length)
        x_BSM = x_BSM + self._drop(settings.residual_dropout, attended)
        hidden = self._mlp(LayerNorm(settings.dtype, name="norm2")(x_BSM))
        return place(x_BSM + self._drop(settings.residual_dropout, hidden), "BSM"), cached

    def _attend(self, x_BSM, cached, length):
        settings, S, M = self.settings, *x_BSM.shape[1:]
        N, A = settings.num_heads, M // settings.num_heads
        weight = self._weight("qkv_M3NA", (M, 3, N, A))
        in_place = cached is not None or isinstance(weight, InferenceWeight)  # a sampler would copy it at every step
        qkv = (project if in_place else _project_heads)(x_BSM, weight)
        if settings.use_attention_bias:
            qkv = add_bias(qkv, self._bias("qkv_bias_3NA", (3, N, A)))
        if cached is None and settings.use_flash_attention:
            mixed = _flash_attention(*(qkv[..., i, :, :] for i in range(3)))
        else:
            query, key, value = (jnp.swapaxes(qkv[..., i, :, :], 1, 2) for i in range(3))  # (B, N, S, A)
            seen = jnp.tril(jnp.ones((S, S), bool))
            if cached is not None:
                cached = tuple(_write_rows(rows, new, length) for rows, new in zip(cached, (key, value), strict=True))
                # With a length known at trace time the rows after it, which are not written yet, are never read.
                rows = cached[0].shape[2] if isinstance(length, jax.core.Tracer) else length + S
                # Without the barrier XLA fuses the write into its readers: on CPU it then copies a bfloat16 cache each
                # step.
                read = jax.lax.optimization_barrier(cached)
                key, value = (array[:, :, :rows].astype(settings.dtype) for array in read)
                seen = jnp.arange(rows, dtype=jnp.int32)[None] <= length + jnp.arange(S, dtype=jnp.int32)[:, None]
            mixed = self._mix(query, key, value, seen)
        out = project(mixed, self._weight("out_NAM", (N, A, M)), num_axes=2)
        if settings.use_attention_bias:
            out = add_bias(out, self._bias("out_bias_M", (M,)))
        return out, cached

    def _mix(self, query, key, value, seen):
        """Attention (B, S, N, A) of queries (B, N, S, A) to keys and values (B, N, T, A) where `seen` (S, T)."""
        scores = jnp.einsum("bnsa,bnta->bnst", query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[None, None], scores * query.shape[-1] ** -0.5, -jnp.inf)
        weights = self._drop(self.settings.attention_dropout, nn.softmax(scores, axis=-1))
        return jnp.einsum("bnst,bnta->bsna", weights.astype(self.settings.dtype), value)

    def _mlp(self, x_BSM):
        M = x_BSM.shape[-1]
        F = 4 * M
        hidden = project(x_BSM, self._weight("up_MF", (M, F)))
        if self.settings.use_mlp_bias:
            hidden = add_bias(hidden, self._bias("up_bias_F", (F,)))
        if self.settings.gelu == "exact":
            hidden = nn.gelu(hidden, approximate=False)
        else:
            hidden = hidden * nn.sigmoid(1.702 * hidden)
        out = project(hidden, self._weight("down_FM", (F, M)))
        if self.settings.use_mlp_bias:
            out = add_bias(out, self._bias("down_bias_M", (M,)))
        return out

    def _weight(self, name, shape):
        return stored_weight(self, name, shape, self.settings.dtype)

    def _bias(self, name, shape):
        return self.param(name, init_bias, shape).astype(self.settings.dtype)

    def _drop(self, rate, x):
        return Dropout(rate)(x, deterministic=not self.train)


def _flash_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention (B, S, N, A) without a matrix of scores in memory where cuDNN has it: 16 bits on a GPU."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    plain = functools.partial(attend, implementation="xla")
    # JAX looks for cuDNN while it traces, and raises where this process has none: there XLA's own compiles for a GPU.
    if query.dtype.itemsize != 2 or jax.default_backend() != "gpu":
        return plain(query, key, value)
    fused = functools.partial(attend, implementation="cudnn")
    return jax.lax.platform_dependent(query, key, value, cuda=fused, default=plain)


class Stack(nn.Module):
    """`num_layers` blocks under one scan; zero layers are the identity.

    Attributes:
      num_layers: L.
      block: settings of every block.
      use_remat: recompute each block in the backward pass.
    """

    num_layers: int
    block: BlockSettings
    use_remat: bool = False

    @nn.compact
    def __call__(
        self, x_BSM: jax.Array, cache: KVCache | None = None, train: bool = False
    ) -> tuple[jax.Array, KVCache | None]:
        """Run new positions (B, S, M) through all layers, after those in the cache where one is given."""
        if self.num_layers == 0:
            return x_BSM, cache and cache._replace(length=cache.length + x_BSM.shape[1])
        stored = self.variables.get("params", {}).get("blocks")
        if cache is not None or isinstance(stored, tuple):
            return self._run_unrolled(Block(self.block, train, parent=None), x_BSM, stored, cache)
        use_remat = self.use_remat and train
        block = nn.remat(Block, prevent_cse=False) if use_remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.num_layers,
            # XLA would join the recomputed copy of an unrolled layer with the first one, and keep its activations.
            unroll=self.num_layers if self.num_layers <= _MAX_UNROLLED and not use_remat else 1,
        )(self.block, train, name="blocks")
        return layers(x_BSM, None, None)[0], None

    def _run_unrolled(self, block, x_BSM, layers, cache):
        """Layer after layer: inside the loop over positions a scan would copy the weights of each before their use."""
        layers = layers if isinstance(layers, tuple) else unstack(layers)
        if cache is None:
            for layer in layers:
                x_BSM, _ = block.apply({"params": layer}, x_BSM, None, None)
            return x_BSM, None
        rows = []
        for layer, *cached in zip(layers, cache.keys, cache.values, strict=True):
            x_BSM, new = block.apply({"params": layer}, x_BSM, cached, cache.length)
            rows.append(new)
        keys, values = zip(*rows, strict=True)
        return x_BSM, KVCache(keys, values, cache.length + x_BSM.shape[1])


def _write_rows(rows_BNSA, new, start):
    return jax.lax.dynamic_update_slice_in_dim(rows_BNSA, new.astype(rows_BNSA.dtype), start, axis=2)

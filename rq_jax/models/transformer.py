"""What the transformers over codes share: settings, conditions, classifiers, and the depth stack over residual codes.

The depth stack is that of the RQ-Transformer (section 3.2 of its paper).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.nn import attention
from rq_jax.nn.attention import BlockSettings, LayerNorm, Stack, Weight
from rq_jax.nn.inference_weights import for_inference
from rq_jax.nn.placement import place
from rq_jax.settings import checks


class CodeTransformer(nn.Module, kw_only=True):
    """Settings and methods of every transformer over codes; a subclass makes its parameters in `setup`.

    Attributes:
      codebook_size: K, or one K_d per depth where the subclass allows it.
      code_shape: (h, w, D).
      code_dim: E, length of the tokenizer's code vectors.
      model_dim, num_heads: M, N. depth_num_heads: N of the depth stack; None: the same.
      depth_layers: layers of the depth stack.
      cond_vocab_size, cond_length: condition tokens; 1 x 1 is unconditional, V x 1 a class, V x U a text.
      use_shared_codebook: whether the tokenizer has one codebook or one per depth.
      embedding_dropout, attention_dropout, residual_dropout: in [0, 1).
      use_null_cond: one more condition token, `cond_vocab_size`, that stands for "no condition" (guidance).
      use_flash_attention: fused attention where all positions are known (cuDNN in bfloat16 on a GPU, else XLA's own
        form), without attention_dropout; worth it for long sequences.
      use_remat: recompute blocks in the backward pass.
      dtype: of the computation, "float32" or "bfloat16"; softmax, norms and logits are float32.
    """

    codebook_size: int | tuple[int, ...]
    code_shape: tuple[int, int, int]
    code_dim: int
    model_dim: int
    num_heads: int
    depth_layers: int
    depth_num_heads: int | None = None
    cond_vocab_size: int = 1
    cond_length: int = 1
    use_shared_codebook: bool = True
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1
    use_null_cond: bool = False
    use_flash_attention: bool = False
    use_remat: bool = False
    dtype: str = "float32"

    # --- pieces of setup; the order in which parameters are made decides what they are drawn from ---

    def _make_cond_embedding(self) -> None:
        rows, M = self.cond_vocab_size + self.use_null_cond, self.model_dim
        self.cond_embedding_VM = self.param("cond_embedding_VM", attention.init_weight, (rows, M))
        self.cond_position_UM = self.param("cond_position_UM", attention.init_weight, (self.cond_length, M))

    def _make_depth_positions(self) -> None:
        shape = self.code_shape[-1], self.model_dim
        self.depth_position_DM = self.param("depth_position_DM", attention.init_weight, shape)

    def _make_depth_input(self) -> None:
        shape = self.code_dim, self.model_dim
        self.depth_input_EM = self.param("depth_input_EM", attention.init_weight, shape)
        self.depth_input_bias_M = self.param("depth_input_bias_M", attention.init_bias, shape[1:])

    def _make_codebook(self) -> None:
        """The tokenizer's, frozen: NaN in its shape, so that a forgotten tokenizer is loud."""
        self.codebook_KE = self.variable("codebook", "codebook_KE", self._missing_codebook)

    def _make_depth_stack(self, block: BlockSettings) -> None:
        block = dataclasses.replace(block, num_heads=self._depth_heads)
        self.depth_stack = Stack(self.depth_layers, block, self.use_remat)

    def _make_cond_classifier(self) -> None:
        """Of text models; a class has no token to predict."""
        if self.cond_length > 1:
            M, V = self.model_dim, self.cond_vocab_size
            self.cond_classifier_norm = LayerNorm(self._dtype)
            self.cond_classifier_MV = attention.stored_weight(self, "cond_classifier_MV", (M, V), self._dtype)
            self.cond_classifier_bias_V = self.param("cond_classifier_bias_V", attention.init_bias, (V,))

    def _block(self, **settings: Any) -> BlockSettings:
        """Settings of the blocks: those of the model, and what it says besides."""
        return BlockSettings(
            num_heads=self.num_heads, attention_dropout=self.attention_dropout, residual_dropout=self.residual_dropout,
            use_flash_attention=self.use_flash_attention, dtype=self._dtype, **settings,
        )  # fmt: skip

    # --- the depth stack ---

    def depth(
        self, context: jax.Array, codes: jax.Array, cache: Any = None, train: bool = False
    ) -> tuple[jax.Array, Any]:
        """The depth stack: hidden states that predict the codes of each position, from its context and codes so far.

        Args:
          context: (..., M) from the stack before it.
          codes: without a cache (..., D), all codes. With one (..., d), the d codes already known at this position.
          cache: one position's cache, which the stack before it starts afresh.

        Returns:
          Without a cache the hidden states (..., D, M); with one the single (..., M) that predicts code d. The cache.
        """
        if cache is None:
            slots = context[..., None, :]
            if codes.shape[-1] > 1:  # at D = 1 no code is fed back
                slots = jnp.concatenate([slots, self._embed_depths(codes[..., :-1])], axis=-2)
            slots = attention.add_bias(slots, self._cast(self.depth_position_DM))
        else:
            d = codes.shape[-1]
            slots = context[..., None, :] if d == 0 else self._embed_depths(codes, d - 1)
            slots = attention.add_bias(slots, self._cast(self.depth_position_DM[d]))
        hidden, depth_cache = self.depth_stack(slots.reshape(-1, *slots.shape[-2:]), cache and cache.depth, train)
        hidden = hidden.reshape(slots.shape)
        if cache is None:
            return hidden, None
        return hidden[..., 0, :], cache._replace(depth=depth_cache)

    def _embed_depths(self, codes: jax.Array, start: int = 0) -> jax.Array:
        """Depth inputs (..., d - start, M) that follow each of the codes (..., d) from `start` on."""
        vectors = self._depth_vectors(codes)[..., start:, :]
        projected = attention.project(self._cast(vectors), self._cast(self.depth_input_EM))
        return attention.add_bias(projected, self._cast(self.depth_input_bias_M))

    def _depth_vectors(self, codes: jax.Array) -> jax.Array:
        """What the depth stack reads of codes (..., d): the sums (..., d, E) of the tokenizer's vectors up to each."""
        return jnp.cumsum(quantize.lookup(codes, self.codebook), axis=-2)

    def _empty_depth_cache(self, batch: int, dtype: Any) -> attention.KVCache:
        N, (_, _, D) = self._depth_heads, self.code_shape
        return attention.empty_cache(self.depth_layers, batch, D, N, self.model_dim // N, dtype)

    # --- conditions and classifiers ---

    def _condition(self, cond: jax.Array | None, batch: int) -> jax.Array:
        """Condition tokens (B, U); the unconditional model's single start token is 0."""
        if cond is None:
            if self.is_conditional:
                raise ValueError(f"cond: this model needs a condition of shape (B, {self.cond_length}), none was given")
            return jnp.zeros((batch, 1), jnp.int32)
        cond = jnp.asarray(cond)
        checks.integer_type("cond", cond.dtype)
        cond = cond[:, None] if cond.ndim == 1 else cond
        checks.shape("cond", cond.shape, (batch, self.cond_length))
        tokens = self.cond_vocab_size + self.use_null_cond
        if not isinstance(cond, jax.core.Tracer):
            values = np.asarray(cond)  # jnp would trace the comparison where a concrete cond meets a compiled program
            if ((values < 0) | (values >= tokens)).any():
                raise ValueError(f"cond: tokens {values.min()}..{values.max()} do not all lie in [0, {tokens})")
        return cond

    def _embed_condition(self, cond_BU: jax.Array) -> jax.Array:
        return attention.add_bias(self._cast(self.cond_embedding_VM)[cond_BU], self._cast(self.cond_position_UM))

    def _classify_condition(self, hidden_BUM: jax.Array) -> jax.Array | None:
        """Logits (B, U-1, V) of the text tokens after each; None without text."""
        if self.cond_length == 1:
            return None
        logits = self._project(
            self.cond_classifier_norm(hidden_BUM), self.cond_classifier_MV, self.cond_classifier_bias_V
        )
        return place(logits, "BUV")

    def _classify(
        self, norm: LayerNorm, hidden: jax.Array, weight: Weight, bias: jax.Array | None = None, letter: str = "K"
    ) -> jax.Array:
        """Float32 logits (..., K) of hidden states (..., M); `letter` is that of their last axis."""
        inner = "-" * (hidden.ndim - 2)
        logits = self._project(norm(place(hidden, f"B{inner}M")), weight, bias)
        return place(logits, f"B{inner}{letter}")

    def for_inference(
        self, variables: dict[str, Any], dtype: str = "float32", platform: str | None = None
    ) -> dict[str, Any]:
        """The variables as sampling reads them fastest; see `nn.inference_weights.for_inference`."""
        return for_inference(variables, dtype, self._dtype, platform)

    # --- inner pieces ---

    @property
    def codebook(self) -> quantize.Codebook:
        """The tokenizer's codebook as the functions of `quantize` take it."""
        value = self.codebook_KE.value
        return tuple(value) if isinstance(value, (tuple, list)) else value

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_d of each depth."""
        return quantize.per_depth(self.codebook_size, self.code_shape[-1])

    @property
    def is_conditional(self) -> bool:
        """Whether the model takes a condition."""
        return self.cond_vocab_size > 1

    @property
    def _depth_heads(self) -> int:
        return self.num_heads if self.depth_num_heads is None else self.depth_num_heads

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def _missing_codebook(self):
        E, sizes = self.code_dim, self.codebook_sizes
        if self.use_shared_codebook:
            return jnp.full((sizes[0], E), jnp.nan, jnp.float32)
        if len(set(sizes)) == 1:
            return jnp.full((len(sizes), sizes[0], E), jnp.nan, jnp.float32)
        return tuple(jnp.full((K, E), jnp.nan, jnp.float32) for K in sizes)

    def _project(self, x: jax.Array, weight: Weight, bias: jax.Array | None) -> jax.Array:
        projected = attention.project(x, weight, dtype=jnp.float32)
        return projected if bias is None else attention.add_bias(projected, bias.astype(jnp.float32))

    def _cast(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(x, self._dtype)

    def _check_shared(self, *layers: str) -> None:
        """Check the settings of this class and, besides, the numbers of `layers` of other stacks."""
        checks.positive_triple("model.code_shape", self.code_shape, "(h, w, depth)")
        for name in ("code_dim", "model_dim", "codebook_size", "cond_vocab_size", "cond_length"):
            checks.at_least(f"model.{name}", getattr(self, name), 1)
        for name in (*layers, "depth_layers"):
            checks.at_least(f"model.{name}", getattr(self, name), 0)
        checks.divides("model.num_heads", self.num_heads, "model_dim", self.model_dim)
        checks.divides("model.depth_num_heads", self._depth_heads, "model_dim", self.model_dim)
        checks.one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            checks.within(f"model.{name}", getattr(self, name), 0, 1, below=True)
        if self.use_flash_attention and self.attention_dropout:
            raise ValueError(
                f"model.use_flash_attention: True leaves no room for attention_dropout {self.attention_dropout}; "
                "set one of them to 0 or False"
            )
        checks.one_per_depth("model.codebook_size", self.codebook_size, self.code_shape[-1])
        self._check_condition()

    def _check_condition(self) -> None:
        """Text and guidance need a condition."""
        if self.cond_length > 1 and not self.is_conditional:
            raise ValueError(f"model.cond_length: {self.cond_length} condition tokens need a cond_vocab_size above 1")
        if self.use_null_cond and not self.is_conditional:
            raise ValueError(
                "model.use_null_cond: an unconditional model has no condition to leave out; set it to False"
            )

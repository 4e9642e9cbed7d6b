"""RQ-Transformer: a spatial stack over positions, a depth stack over the codes of each (section 3.2 of the paper)."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.nn import attention
from rq_jax.nn.attention import BlockSettings, KVCache, LayerNorm, Stack
from rq_jax.nn.dropout import Dropout
from rq_jax.nn.inference_weights import for_inference
from rq_jax.nn.placement import place
from rq_jax.settings import checks


class RQTransformerOutput(NamedTuple):
    """Logits (B, h, w, D, K), condition logits (B, U-1, V) of text models else None, hidden (B, h, w, D, M)."""

    logits: jax.Array
    cond_logits: jax.Array | None
    hidden: jax.Array


class TransformerCache(NamedTuple):
    """The caches of both stacks; `spatial` starts the one of `depth` afresh at every position."""

    spatial: KVCache
    depth: KVCache


class RQTransformer(nn.Module):
    """Autoregressive model of code grids (B, h, w, D), in raster order with depth innermost.

    Attributes:
      codebook_size: K, or one K_d per depth: logits are then padded to the largest with -inf.
      code_shape: (h, w, D).
      code_dim: E, length of the tokenizer's code vectors.
      model_dim, num_heads: M, N. depth_num_heads: N of the depth stack; None: the same.
      spatial_layers, depth_layers: layers of the two stacks; 0 depth layers are allowed (the baseline at D = 1).
      cond_vocab_size, cond_length: condition tokens; 1 x 1 is unconditional, V x 1 a class, V x U a text.
      use_tokenizer_input: the spatial stack reads the tokenizer's code vectors, else embeddings learned here.
      use_tokenizer_depth_input: the same for the depth stack; use_cumulative_depth: it reads their sums over depth.
      use_shared_token_embedding, use_shared_classifier: one table for all depths, or one for each.
      use_shared_codebook: whether the tokenizer has one codebook or one per depth.
      use_attention_bias, use_mlp_bias, gelu ("exact", "sigmoid"): of all blocks. depth_gelu: of those of depth_layers.
      embedding_dropout, attention_dropout, residual_dropout: in [0, 1).
      use_null_cond: one more condition token, `cond_vocab_size`, that stands for "no condition" (guidance).
      use_flash_attention: fused attention where all positions are known (cuDNN in bfloat16 on a GPU, else XLA's own
        form), without attention_dropout; worth it for long code grids.
      use_remat: recompute blocks in the backward pass.
      dtype: of the computation, "float32" or "bfloat16"; softmax, norms and logits are float32.
    """

    codebook_size: int | tuple[int, ...]
    code_shape: tuple[int, int, int]
    code_dim: int
    model_dim: int
    num_heads: int
    spatial_layers: int
    depth_layers: int
    depth_num_heads: int | None = None
    cond_vocab_size: int = 1
    cond_length: int = 1
    use_tokenizer_input: bool = True
    use_tokenizer_depth_input: bool = True
    use_cumulative_depth: bool = True
    use_shared_token_embedding: bool = True
    use_shared_classifier: bool = True
    use_shared_codebook: bool = True
    use_attention_bias: bool = True
    use_mlp_bias: bool = True
    gelu: str = "exact"
    depth_gelu: str | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1
    use_null_cond: bool = False
    use_flash_attention: bool = False
    use_remat: bool = False
    dtype: str = "float32"

    def setup(self):
        self.check()
        (h, w, D), M, E, K = self.code_shape, self.model_dim, self.code_dim, max(self.codebook_sizes)
        zeros, V = attention.init_bias, self.cond_vocab_size
        self.cond_embedding_VM = self.param("cond_embedding_VM", attention.init_weight, (V + self.use_null_cond, M))
        self.cond_position_UM = self.param("cond_position_UM", attention.init_weight, (self.cond_length, M))
        self.position_TM = self.param("position_TM", attention.init_weight, (h * w, M))
        self.depth_position_DM = self.param("depth_position_DM", attention.init_weight, (D, M))
        if self.use_tokenizer_input:
            self.input_EM = self.param("input_EM", attention.init_weight, (E, M))
            self.input_bias_M = self.param("input_bias_M", zeros, (M,))
        if self.use_tokenizer_depth_input:
            self.depth_input_EM = self.param("depth_input_EM", attention.init_weight, (E, M))
            self.depth_input_bias_M = self.param("depth_input_bias_M", zeros, (M,))
        if not (self.use_tokenizer_input and self.use_tokenizer_depth_input):
            rows = K if self.use_shared_token_embedding else sum(self.codebook_sizes)
            self.token_embedding_KM = self.param("token_embedding_KM", attention.init_weight, (rows, M))
        if self.uses_codebook:
            self.codebook_KE = self.variable("codebook", "codebook_KE", self._missing_codebook)
        block = BlockSettings(
            num_heads=self.num_heads, use_attention_bias=self.use_attention_bias, use_mlp_bias=self.use_mlp_bias,
            gelu=self.gelu, attention_dropout=self.attention_dropout, residual_dropout=self.residual_dropout,
            use_flash_attention=self.use_flash_attention, dtype=self._dtype,
        )  # fmt: skip
        depth_block = dataclasses.replace(block, num_heads=self._depth_heads, gelu=self.depth_gelu or self.gelu)
        self.embedding_drop = Dropout(self.embedding_dropout)
        self.spatial_stack = Stack(self.spatial_layers, block, self.use_remat)
        self.depth_stack = Stack(self.depth_layers, depth_block, self.use_remat)
        self.classifier_norm = LayerNorm(self._dtype)
        per_depth, suffix = ((), "") if self.use_shared_classifier else ((D,), "D")
        self.classifier = attention.stored_weight(self, f"classifier_{suffix}MK", (*per_depth, M, K), self._dtype)
        self.classifier_bias = self.param(f"classifier_bias_{suffix}K", zeros, (*per_depth, K))
        if self.cond_length > 1:
            self.cond_classifier_norm = LayerNorm(self._dtype)
            self.cond_classifier_MV = attention.stored_weight(self, "cond_classifier_MV", (M, V), self._dtype)
            self.cond_classifier_bias_V = self.param("cond_classifier_bias_V", zeros, (V,))

    # --- the forward pass ---

    def __call__(self, codes: jax.Array, cond: jax.Array | None = None, train: bool = False) -> RQTransformerOutput:
        """`RQTransformerOutput`: logits of every code given those before it.

        Args:
          codes: (B, h, w, D) int32.
          cond: (B, U) int32, or (B, 1) or (B,) for a class; None when unconditional.
          train: drop out, drawing from the rng stream "dropout".
        """
        context, cond_logits, _ = self.spatial(codes, cond, train=train)
        hidden, _ = self.depth(context, codes, train=train)
        return RQTransformerOutput(self.classify(hidden), cond_logits, hidden)

    def spatial(
        self,
        codes: jax.Array,
        cond: jax.Array | None = None,
        cache: TransformerCache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, TransformerCache | None]:
        """The spatial stack: a context vector for each position, from the condition and the positions before it.

        Args:
          codes: without a cache all positions (B, h, w, D). With one (B, P, D), the P positions that follow those
            in the cache; P may be 0 when a condition is given.
          cond: with a cache given once, at the first call. Unconditional models may leave it out, unless the cache
            enters a compiled program as an argument: then its length is unknown, and zeros (B, 1) mark the first call.
          cache: from `init_cache` or the last call.

        Returns:
          Without a cache the contexts (B, h, w, M). With one those of the positions after each new token: (B, P, M),
          or (B, P + 1, M) at the first call. Condition logits (text models, where cond is given), else None.
          The cache, where one was given.
        """
        B, D = codes.shape[0], codes.shape[-1]
        codes_BTD = codes.reshape(B, -1, D)
        if cache is None:
            cond = self._condition(cond, B)
            tokens = self._embed_positions(codes_BTD)[:, :-1]  # nothing comes after the last position
        else:
            length = cache.spatial.length
            if cond is None and not self.is_conditional and not isinstance(length, jax.core.Tracer) and length == 0:
                cond = jnp.zeros((B, 1), jnp.int32)  # the start token of a first call
            start = 0 if cond is not None else length - self.cond_length
            cond = None if cond is None else self._condition(cond, B)
            tokens = self._embed_positions(codes_BTD, start)
        if cond is not None:
            embedded = attention.add_bias(self._cast(self.cond_embedding_VM)[cond], self._cast(self.cond_position_UM))
            tokens = jnp.concatenate([embedded, tokens], axis=1)
        tokens = self.embedding_drop(place(tokens, "BSM"), deterministic=not train)
        # The contexts are the raw residual stream: no norm stands between the stacks.
        outputs, spatial_cache = self.spatial_stack(tokens, cache and cache.spatial, train)
        cond_logits = None
        if cond is not None:
            outputs, cond_outputs = outputs[:, self.cond_length - 1 :], outputs[:, : self.cond_length - 1]
            if self.cond_length > 1:
                normed = self.cond_classifier_norm(cond_outputs)
                cond_logits = self._project(normed, self.cond_classifier_MV, self.cond_classifier_bias_V)
                cond_logits = place(cond_logits, "BUV")
        if cache is None:
            return outputs.reshape(*codes.shape[:-1], -1), cond_logits, None
        depth_cache = cache.depth._replace(length=np.int32(0))  # every position starts its own
        return outputs, cond_logits, TransformerCache(spatial_cache, depth_cache)

    def depth(
        self, context: jax.Array, codes: jax.Array, cache: TransformerCache | None = None, train: bool = False
    ) -> tuple[jax.Array, TransformerCache | None]:
        """The depth stack: hidden states that predict the codes of each position, from its context and codes so far.

        Args:
          context: (..., M) from `spatial`.
          codes: without a cache (..., D), all codes. With one (..., d), the d codes already known at this position.
          cache: one position's cache, which `spatial` starts afresh.

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

    def classify(self, hidden: jax.Array, depth: int | None = None) -> jax.Array:
        """Float32 logits (..., D, K) of hidden states (..., D, M); with `depth`, (..., K) of the states of that depth.

        Where the codebooks differ in size, logits beyond K_d are -inf.
        """
        weight, bias = self.classifier, self.classifier_bias
        if not self.use_shared_classifier and depth is None:
            return jnp.stack([self.classify(hidden[..., d, :], d) for d in range(self.code_shape[-1])], axis=-2)
        if not self.use_shared_classifier:
            weight, bias = jax.tree.map(lambda stacked: stacked[depth], (weight, bias))
        inner = "-" * (hidden.ndim - 2)
        logits = self._project(self.classifier_norm(place(hidden, f"B{inner}M")), weight, bias)
        logits = place(logits, f"B{inner}K")
        if len(set(self.codebook_sizes)) == 1:
            return logits
        sizes, codes_K = np.array(self.codebook_sizes), np.arange(logits.shape[-1])
        inside = codes_K[None] < sizes[:, None] if depth is None else codes_K < sizes[depth]
        return jnp.where(attention.with_rank(inside, logits.ndim), logits, -jnp.inf)

    def init_cache(self, batch: int, dtype: Any = None, rows: int | None = None) -> TransformerCache:
        """An empty cache.

        Args:
          batch: number of images.
          dtype: of keys and values; default: that of the computation.
          rows: of the spatial stack; default: all its U + T - 1 tokens (the last position is never read back).
            `TransformerCache.spatial.resize` makes room for more.
        """
        (h, w, D), M, N, depth_N = self.code_shape, self.model_dim, self.num_heads, self._depth_heads
        dtype = self._dtype if dtype is None else dtype
        rows = self.cond_length + h * w - 1 if rows is None else rows
        return TransformerCache(
            attention.empty_cache(self.spatial_layers, batch, rows, N, M // N, dtype),
            attention.empty_cache(self.depth_layers, batch, D, depth_N, M // depth_N, dtype),
        )

    def for_inference(self, variables: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
        """The variables as sampling reads them fastest; see `nn.inference_weights.for_inference`."""
        return for_inference(variables, dtype, self._dtype)

    # --- embeddings ---

    def _embed_positions(self, codes_BTD: jax.Array, start: int | jax.Array = 0) -> jax.Array:
        """Spatial inputs (B, T, M) of positions from `start` on."""
        D = codes_BTD.shape[-1]
        if self.use_tokenizer_input:
            total = quantize.lookup(codes_BTD, self.codebook).sum(-2)
            # As kakaobrain/rq-vae-transformer:RQTransformer.forward, which projects every depth before it sums them:
            # the bias counts D times.
            bias_M = D * self._cast(self.input_bias_M)
            embedded = attention.add_bias(attention.project(self._cast(total), self._cast(self.input_EM)), bias_M)
        else:
            embedded = self._embed_tokens(codes_BTD).sum(-2)
        positions = jax.lax.dynamic_slice_in_dim(self.position_TM, start, codes_BTD.shape[1])
        return attention.add_bias(embedded, self._cast(positions))

    def _embed_depths(self, codes: jax.Array, start: int = 0) -> jax.Array:
        """Depth inputs (..., d - start, M) that follow each of the codes (..., d) from `start` on."""
        if not self.use_tokenizer_depth_input:
            return self._embed_tokens(codes)[..., start:, :]
        vectors = quantize.lookup(codes, self.codebook)
        if self.use_cumulative_depth:
            vectors = jnp.cumsum(vectors, axis=-2)
        vectors = vectors[..., start:, :]
        projected = attention.project(self._cast(vectors), self._cast(self.depth_input_EM))
        return attention.add_bias(projected, self._cast(self.depth_input_bias_M))

    def _embed_tokens(self, codes: jax.Array) -> jax.Array:
        """Embeddings (..., d, M) learned here; separate tables stand below one another."""
        sizes = self.codebook_sizes[: codes.shape[-1]]
        quantize.check_codes(codes, sizes)
        if not self.use_shared_token_embedding:
            codes = attention.add_bias(codes, jnp.array([sum(sizes[:d]) for d in range(len(sizes))], codes.dtype))
        return self._cast(self.token_embedding_KM)[codes]

    def _condition(self, cond: jax.Array | None, batch: int) -> jax.Array:
        """Condition tokens (B, U); the unconditional model's single start token is 0."""
        if cond is None:
            if self.is_conditional:
                raise ValueError(f"cond: this model needs a condition of shape (B, {self.cond_length}), none was given")
            return jnp.zeros((batch, 1), jnp.int32)
        cond = jnp.asarray(cond)
        cond = cond[:, None] if cond.ndim == 1 else cond
        checks.shape("cond", cond.shape, (batch, self.cond_length))
        tokens = self.cond_vocab_size + self.use_null_cond
        if not isinstance(cond, jax.core.Tracer):
            values = np.asarray(cond)  # jnp would trace the comparison where a concrete cond meets a compiled program
            if ((values < 0) | (values >= tokens)).any():
                raise ValueError(f"cond: tokens {values.min()}..{values.max()} do not all lie in [0, {tokens})")
        return cond

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
    def uses_codebook(self) -> bool:
        """Whether any switch reads the tokenizer's codebook."""
        return self.use_tokenizer_input or self.use_tokenizer_depth_input

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
        """NaN in the shape of the tokenizer's codebook: a forgotten tokenizer is loud."""
        E, sizes = self.code_dim, self.codebook_sizes
        if self.use_shared_codebook:
            return jnp.full((sizes[0], E), jnp.nan, jnp.float32)
        if len(set(sizes)) == 1:
            return jnp.full((len(sizes), sizes[0], E), jnp.nan, jnp.float32)
        return tuple(jnp.full((K, E), jnp.nan, jnp.float32) for K in sizes)

    def _project(self, x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return attention.add_bias(attention.project(x, weight, dtype=jnp.float32), bias.astype(jnp.float32))

    def _cast(self, x: jax.Array) -> jax.Array:
        return jnp.asarray(x, self._dtype)

    def example_inputs(self, batch: int = 1) -> tuple[jax.Array, ...]:
        """Arguments of `init`: zeros of the right shapes."""
        return jnp.zeros((batch, *self.code_shape), jnp.int32), jnp.zeros((batch, self.cond_length), jnp.int32)

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: settings out of range, or that do not fit together.
        """
        checks.positive_triple("model.code_shape", self.code_shape, "(h, w, depth)")
        for name in ("code_dim", "model_dim", "codebook_size", "cond_vocab_size", "cond_length"):
            checks.at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("spatial_layers", "depth_layers"):
            checks.at_least(f"model.{name}", getattr(self, name), 0)
        checks.divides("model.num_heads", self.num_heads, "model_dim", self.model_dim)
        checks.divides("model.depth_num_heads", self._depth_heads, "model_dim", self.model_dim)
        checks.one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("gelu", "depth_gelu"):
            checks.one_of(f"model.{name}", getattr(self, name) or self.gelu, ("exact", "sigmoid"))
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            checks.within(f"model.{name}", getattr(self, name), 0, 1, below=True)
        if self.use_flash_attention and self.attention_dropout:
            raise ValueError(
                f"model.use_flash_attention: True leaves no room for attention_dropout {self.attention_dropout}; "
                "set one of them to 0 or False"
            )
        self._check_codebooks()
        self._check_condition()

    def _check_codebooks(self) -> None:
        """Codebooks of unequal size leave no room for shared tables."""
        checks.one_per_depth("model.codebook_size", self.codebook_size, self.code_shape[-1])
        shared = self.use_shared_codebook or self.use_shared_token_embedding or self.use_shared_classifier
        if shared and len(set(self.codebook_sizes)) > 1:
            raise ValueError(
                f"model.codebook_size: sizes {self.codebook_size} differ by depth; set use_shared_codebook, "
                "use_shared_token_embedding and use_shared_classifier to False"
            )

    def _check_condition(self) -> None:
        """Text and guidance need a condition."""
        if self.cond_length > 1 and not self.is_conditional:
            raise ValueError(f"model.cond_length: {self.cond_length} condition tokens need a cond_vocab_size above 1")
        if self.use_null_cond and not self.is_conditional:
            raise ValueError(
                "model.use_null_cond: an unconditional model has no condition to leave out; set it to False"
            )

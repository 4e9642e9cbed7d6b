"""RQ-Transformer: a spatial stack over positions, a depth stack over the codes of each (section 3.2 of the paper)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import quantize
from rq_jax.models.transformer import CodeTransformer
from rq_jax.nn import attention
from rq_jax.nn.attention import KVCache, LayerNorm, Stack
from rq_jax.nn.dropout import Dropout
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


class RQTransformer(CodeTransformer, kw_only=True):
    """Autoregressive model of code grids (B, h, w, D), in raster order with depth innermost.

    Attributes (besides those of `CodeTransformer`):
      codebook_size: K, or one K_d per depth: logits are then padded to the largest with -inf.
      spatial_layers, depth_layers: layers of the two stacks; 0 depth layers are allowed (the baseline at D = 1).
      use_tokenizer_input: the spatial stack reads the tokenizer's code vectors, else embeddings learned here.
      use_tokenizer_depth_input: the same for the depth stack; use_cumulative_depth: it reads their sums over depth.
      use_shared_token_embedding, use_shared_classifier: one table for all depths, or one for each.
      use_attention_bias, use_mlp_bias, gelu ("exact", "sigmoid"): of all blocks. depth_gelu: of those of depth_layers.
    """

    spatial_layers: int
    use_tokenizer_input: bool = True
    use_tokenizer_depth_input: bool = True
    use_cumulative_depth: bool = True
    use_shared_token_embedding: bool = True
    use_shared_classifier: bool = True
    use_attention_bias: bool = True
    use_mlp_bias: bool = True
    gelu: str = "exact"
    depth_gelu: str | None = None

    def setup(self):
        self.check()
        (h, w, D), M, E, K = self.code_shape, self.model_dim, self.code_dim, max(self.codebook_sizes)
        self._make_cond_embedding()
        self.position_TM = self.param("position_TM", attention.init_weight, (h * w, M))
        self._make_depth_positions()
        if self.use_tokenizer_input:
            self.input_EM = self.param("input_EM", attention.init_weight, (E, M))
            self.input_bias_M = self.param("input_bias_M", attention.init_bias, (M,))
        if self.use_tokenizer_depth_input:
            self._make_depth_input()
        if not (self.use_tokenizer_input and self.use_tokenizer_depth_input):
            rows = K if self.use_shared_token_embedding else sum(self.codebook_sizes)
            self.token_embedding_KM = self.param("token_embedding_KM", attention.init_weight, (rows, M))
        if self.uses_codebook:
            self._make_codebook()
        biases = dict(use_attention_bias=self.use_attention_bias, use_mlp_bias=self.use_mlp_bias)
        self.embedding_drop = Dropout(self.embedding_dropout)
        self.spatial_stack = Stack(self.spatial_layers, self._block(gelu=self.gelu, **biases), self.use_remat)
        self._make_depth_stack(self._block(gelu=self.depth_gelu or self.gelu, **biases))
        self.classifier_norm = LayerNorm(self._dtype)
        per_depth, suffix = ((), "") if self.use_shared_classifier else ((D,), "D")
        self.classifier = attention.stored_weight(self, f"classifier_{suffix}MK", (*per_depth, M, K), self._dtype)
        self.classifier_bias = self.param(f"classifier_bias_{suffix}K", attention.init_bias, (*per_depth, K))
        self._make_cond_classifier()

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
            tokens = jnp.concatenate([self._embed_condition(cond), tokens], axis=1)
        tokens = self.embedding_drop(place(tokens, "BSM"), deterministic=not train)
        # The contexts are the raw residual stream: no norm stands between the stacks.
        outputs, spatial_cache = self.spatial_stack(tokens, cache and cache.spatial, train)
        cond_logits = None
        if cond is not None:
            outputs, cond_outputs = outputs[:, self.cond_length - 1 :], outputs[:, : self.cond_length - 1]
            cond_logits = self._classify_condition(cond_outputs)
        if cache is None:
            return outputs.reshape(*codes.shape[:-1], -1), cond_logits, None
        depth_cache = cache.depth._replace(length=np.int32(0))  # every position starts its own
        return outputs, cond_logits, TransformerCache(spatial_cache, depth_cache)

    def classify(self, hidden: jax.Array, depth: int | None = None) -> jax.Array:
        """Float32 logits (..., D, K) of hidden states (..., D, M); with `depth`, (..., K) of the states of that depth.

        Where the codebooks differ in size, logits beyond K_d are -inf.
        """
        weight, bias = self.classifier, self.classifier_bias
        if not self.use_shared_classifier and depth is None:
            return jnp.stack([self.classify(hidden[..., d, :], d) for d in range(self.code_shape[-1])], axis=-2)
        if not self.use_shared_classifier:
            weight, bias = jax.tree.map(lambda stacked: stacked[depth], (weight, bias))
        logits = self._classify(self.classifier_norm, hidden, weight, bias)
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
        (h, w, _), M, N = self.code_shape, self.model_dim, self.num_heads
        dtype = self._dtype if dtype is None else dtype
        rows = self.cond_length + h * w - 1 if rows is None else rows
        spatial = attention.empty_cache(self.spatial_layers, batch, rows, N, M // N, dtype)
        return TransformerCache(spatial, self._empty_depth_cache(batch, dtype))

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
        return super()._embed_depths(codes, start)

    def _depth_vectors(self, codes: jax.Array) -> jax.Array:
        """The tokenizer's vectors (..., d, E) of codes (..., d): their sums up to each, or every one by itself."""
        if self.use_cumulative_depth:
            return super()._depth_vectors(codes)
        return quantize.lookup(codes, self.codebook)

    def _embed_tokens(self, codes: jax.Array) -> jax.Array:
        """Embeddings (..., d, M) learned here; separate tables stand below one another."""
        sizes = self.codebook_sizes[: codes.shape[-1]]
        quantize.check_codes(codes, sizes)
        if not self.use_shared_token_embedding:
            codes = attention.add_bias(codes, jnp.array([sum(sizes[:d]) for d in range(len(sizes))], codes.dtype))
        return self._cast(self.token_embedding_KM)[codes]

    @property
    def uses_codebook(self) -> bool:
        """Whether any switch reads the tokenizer's codebook."""
        return self.use_tokenizer_input or self.use_tokenizer_depth_input

    def example_inputs(self, batch: int = 1) -> tuple[jax.Array, ...]:
        """Arguments of `init`: zeros of the right shapes."""
        return jnp.zeros((batch, *self.code_shape), jnp.int32), jnp.zeros((batch, self.cond_length), jnp.int32)

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: settings out of range, or that do not fit together.
        """
        self._check_shared("spatial_layers")
        for name in ("gelu", "depth_gelu"):
            checks.one_of(f"model.{name}", getattr(self, name) or self.gelu, ("exact", "sigmoid"))
        self._check_codebooks()

    def _check_codebooks(self) -> None:
        """Codebooks of unequal size leave no room for shared tables."""
        shared = self.use_shared_codebook or self.use_shared_token_embedding or self.use_shared_classifier
        if shared and len(set(self.codebook_sizes)) > 1:
            raise ValueError(
                f"model.codebook_size: sizes {self.codebook_size} differ by depth; set use_shared_codebook, "
                "use_shared_token_embedding and use_shared_classifier to False"
            )

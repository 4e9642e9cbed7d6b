"""DQ-Transformer: a position stack says where the next code stands, a content stack which code it is.

Huang et al., "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector
Quantization", CVPR 2023, section 3.3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax import grains
from rq_jax.grains import GrainLayout, PackedCodes
from rq_jax.models.transformer import CodeTransformer
from rq_jax.nn import attention
from rq_jax.nn.attention import KVCache, LayerNorm, Stack
from rq_jax.nn.dropout import Dropout
from rq_jax.nn.placement import place
from rq_jax.settings import checks


class DQTransformerOutput(NamedTuple):
    """What each slot but the last says of the token after it.

    position_logits: (B, P-1, Vp), where the ids of all grains share the vocabulary of the finest. content_logits:
    (B, P-1, D, Vc). tokens: those that were read, with classes. cond_logits: (B, U-1, V) of text models, else None.
    """

    position_logits: jax.Array
    content_logits: jax.Array
    tokens: PackedCodes
    cond_logits: jax.Array | None


class DQTransformerHidden(NamedTuple):
    """What the logits of `DQTransformerOutput` are classified from.

    position: of the position stack (B, P-1, M). content: (B, P-1, D, M). tokens, cond_logits: as there.
    """

    position: jax.Array
    content: jax.Array
    tokens: PackedCodes
    cond_logits: jax.Array | None


class DQTransformerCache(NamedTuple):
    """The caches of all stacks; `content` starts the one of `depth` afresh at every token."""

    position: KVCache
    content: KVCache
    depth: KVCache


class DQTransformer(CodeTransformer, kw_only=True):
    """Autoregressive model of packed codes, coarse to fine: of every token first the position, then the content.

    A class takes the place of every start token; text stands in front of the tokens.

    Attributes (besides those of `CodeTransformer`):
      codebook_size: K, the same for all depths.
      code_shape: (h, w, D), the grid of the finest grain.
      num_grains: G, at least 2.
      order: of the cells of a grain, "row" or "region"; see `grains.GrainLayout`.
      position_layers, content_layers: layers of the two stacks.
      depth_layers: layers of the depth stack over the D codes of a token; 0 at D = 1, where there is none.
      num_slots: tokens that the model has room for; None: those of the longest image, `layout.max_tokens`.
      use_grain_embedding: add an embedding of the grain of each token.
      use_shared_position_embedding: one table of positions, in which a cell of any grain is the finest cell at its top
        left; else a table for each grain. Neither is the paper's ablation of its input layers.
    """

    codebook_size: int
    num_grains: int
    position_layers: int
    content_layers: int
    depth_layers: int = 0
    order: str = "row"
    num_slots: int | None = None
    use_grain_embedding: bool = True
    use_shared_position_embedding: bool = False

    def setup(self):
        self.check()
        layout, M, G, D = self.layout, self.model_dim, self.num_grains, self.code_shape[-1]
        if self.is_text:
            self._make_cond_embedding()
        # Depth 0 has all contents, each depth below it its codes and the pad. Tables stand below one another.
        rows = layout.content_size + (D - 1) * (layout.codebook_size + 1)
        self.content_embedding_KM = self.param("content_embedding_KM", attention.init_weight, (rows, M))
        names = [""] if self.use_shared_position_embedding else range(G)
        sizes = [layout.position_size(g) for g in range(G)][-len(names) :]
        self.position_embeddings = [
            self.param(f"position{name}_embedding_VM", attention.init_weight, (size, M))
            for name, size in zip(names, sizes, strict=True)
        ]
        self.slot_embedding_PM = self.param("slot_embedding_PM", attention.init_bias, (self.slots, M))
        if self.use_grain_embedding:
            self.grain_embedding_GM = self.param("grain_embedding_GM", attention.init_weight, (G, M))
        self.embedding_drop = Dropout(self.embedding_dropout)
        self.position_stack = Stack(self.position_layers, self._block(), self.use_remat)
        self.content_stack = Stack(self.content_layers, self._block(), self.use_remat)
        if self.uses_codebook:
            self._make_depth_positions()
            self._make_depth_input()
            self._make_codebook()
            self._make_depth_stack(self._block())
        # Weight decay spares what is called a position: this one classifies cells, and decays as in the original.
        self.cell_classifier_norm, self.classifier_norm = LayerNorm(self._dtype), LayerNorm(self._dtype)
        Vp, Vc = layout.position_size(G - 1), layout.content_size
        self.cell_classifier_MV = attention.stored_weight(self, "cell_classifier_MV", (M, Vp), self._dtype)
        self.classifier_MK = attention.stored_weight(self, "classifier_MK", (M, Vc), self._dtype)
        self._make_cond_classifier()

    # --- the forward pass ---

    def __call__(self, packed: PackedCodes, cond: jax.Array | None = None, train: bool = False) -> DQTransformerOutput:
        """`DQTransformerOutput`: logits of every token given those before it, and of its content given its position.

        Token ids alone are read, never `length`: of padded tokens the logits are those of exactly these ids.

        Args:
          packed: P tokens, at most `num_slots`; start tokens without a class.
          cond: (B, U) int32, or (B, 1) or (B,) for a class; None when unconditional.
          train: drop out, drawing from the rng stream "dropout".

        Raises:
          ValueError: tokens that do not fit the model, ids outside their vocabularies, a condition of another shape or
            out of range.
        """
        hidden, deep, tokens, cond_logits = self.hidden(packed, cond, train)
        position_logits, content_logits = self.classify_position(hidden), self.classify_content(deep)
        return DQTransformerOutput(position_logits, content_logits, tokens, cond_logits)

    def hidden(self, packed: PackedCodes, cond: jax.Array | None = None, train: bool = False) -> DQTransformerHidden:
        """The forward pass before its classifiers, for losses that make the logits chunk by chunk.

        Args, Raises: as `__call__`.
        """
        tokens = self.tokens(packed, cond)
        known, following = _slots(tokens, slice(None, -1)), _slots(tokens, slice(1, None))
        hidden, cond_logits, _ = self.position(known, cond if self.is_text else None, train=train)
        context, _ = self.content(hidden, following, train=train)
        deep, _ = self.depth(context, following.content, train=train)
        return DQTransformerHidden(hidden, deep, tokens, cond_logits)

    def tokens(self, packed: PackedCodes, cond: jax.Array | None = None) -> PackedCodes:
        """Tokens as the stacks read them: the class is added to the ids of all start tokens.

        Args, Raises: as `__call__`.
        """
        layout, packed = self.layout, jax.tree.map(jnp.asarray, packed)
        grains.check_packed("packed", packed, layout)
        B, P = packed.position.shape
        checks.shape("packed.content", packed.content.shape, (B, P, self.code_shape[-1]))
        self._check_slots("packed", P)
        cond = self._condition(cond, B)
        packed = jax.tree.map(lambda ids: ids.astype(jnp.int32), packed)
        if self.is_text or not self.is_conditional:
            return packed
        sos_G = jnp.array([layout.position_sos(g) for g in range(self.num_grains)], jnp.int32)
        class_B1 = cond.astype(jnp.int32)
        position_sos = packed.position >= sos_G[packed.grain]
        content_sos = packed.content >= layout.content_sos
        return packed._replace(
            content=packed.content + jnp.where(content_sos, class_B1[..., None], 0),
            position=packed.position + jnp.where(position_sos, class_B1, 0),
        )

    def position(
        self,
        tokens: PackedCodes,
        cond: jax.Array | None = None,
        cache: DQTransformerCache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, DQTransformerCache | None]:
        """The position stack: hidden states from which the position of the next token is classified.

        Args:
          tokens: P tokens from `tokens`; with a cache those that follow the ones in it.
          cond: text (B, U); with a cache given once, at the first call. Classes are in the tokens.
          cache: from `init_cache` or the last call.

        Returns:
          The raw residual stream (B, P, M). Condition logits (text models, where cond is given), else None. The cache,
          where one was given.
        """
        B, P = tokens.position.shape
        length = np.int32(0) if cache is None else cache.position.length
        is_first = not isinstance(length, jax.core.Tracer) and length == 0
        if cond is not None and not self.is_text:
            raise ValueError("cond: only text stands in front of the tokens; give a class to `tokens`")
        if self.is_text and (cond is not None or is_first):
            cond = self._condition(cond, B)
        start = length - self.text_length if cond is None and not is_first else 0
        self._check_slots("tokens", P if isinstance(start, jax.core.Tracer) else int(start) + P)
        slots = jax.lax.dynamic_slice_in_dim(self.slot_embedding_PM, start, P)
        embedded = self._embed_contents(tokens.content) + self._embed_positions(tokens)
        embedded = attention.add_bias(embedded, self._cast(slots))
        if self.use_grain_embedding:
            embedded += self._cast(self.grain_embedding_GM[tokens.grain])
        if cond is not None:
            embedded = jnp.concatenate([self._embed_condition(cond), embedded], axis=1)
        embedded = self.embedding_drop(place(embedded, "BSM"), deterministic=not train)
        hidden, position_cache = self.position_stack(embedded, cache and cache.position, train)
        cond_logits = None
        if cond is not None:
            cond_logits = self._classify_condition(hidden[:, : self.cond_length - 1])
            hidden = hidden[:, self.cond_length :]
        return hidden, cond_logits, cache and cache._replace(position=position_cache)

    def content(
        self,
        hidden: jax.Array,
        next_tokens: PackedCodes,
        cache: DQTransformerCache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, DQTransformerCache | None]:
        """The content stack: hidden states from which the content of the next token is classified.

        Args:
          hidden: (B, P, M) from `position`.
          next_tokens: the token after each, of which position and grain are read.
          cache: from `position`.

        Returns:
          The raw residual stream (B, P, M). The cache, where one was given, with that of the depth stack empty.
        """
        hidden = place(hidden + self._embed_positions(next_tokens), "BSM")
        hidden, content_cache = self.content_stack(hidden, cache and cache.content, train)
        if cache is None:
            return hidden, None
        depth_cache = cache.depth._replace(length=np.int32(0))  # every token starts its own
        return hidden, cache._replace(content=content_cache, depth=depth_cache)

    def depth(
        self, context: jax.Array, codes: jax.Array, cache: DQTransformerCache | None = None, train: bool = False
    ) -> tuple[jax.Array, DQTransformerCache | None]:
        """The depth stack, as `CodeTransformer.depth`, from the hidden states of `content`; the identity at D = 1.

        It reads the tokenizer's vectors. What special tokens have below depth 0 is of no meaning.
        """
        if self.uses_codebook:
            return super().depth(context, codes, cache, train)
        return (context[..., None, :], None) if cache is None else (context, cache)

    def classify_position(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits (..., Vp) of hidden states (..., M) of the position stack."""
        return self._classify(self.cell_classifier_norm, hidden, self.cell_classifier_MV, letter="V")

    def classify_content(self, hidden: jax.Array, depth: int | None = None) -> jax.Array:
        """Float32 logits (..., D, Vc) of hidden states (..., D, M); with `depth`, (..., Vc) of those of that depth.

        One classifier serves all depths.
        """
        if depth is not None:
            checks.in_range("depth", depth, 0, self.code_shape[-1] - 1, "the depths of a code")
        return self._classify(self.classifier_norm, hidden, self.classifier_MK)

    def init_cache(self, batch: int, dtype: Any = None, rows: int | None = None) -> DQTransformerCache:
        """An empty cache.

        Args:
          batch: number of images.
          dtype: of keys and values; default: that of the computation.
          rows: of the position stack, its text included, from which those of the content stack follow; default: all
            slots. `KVCache.resize` makes room for more.
        """
        M, N, U = self.model_dim, self.num_heads, self.text_length
        dtype = self._dtype if dtype is None else dtype
        rows = U + self.slots if rows is None else rows
        return DQTransformerCache(
            attention.empty_cache(self.position_layers, batch, rows, N, M // N, dtype),
            attention.empty_cache(self.content_layers, batch, rows - U, N, M // N, dtype),
            self._empty_depth_cache(batch, dtype),
        )

    # --- embeddings ---

    def _embed_contents(self, content_BPD: jax.Array) -> jax.Array:
        """Sums (B, P, M) over the depths of each token."""
        first, below = self.layout.content_size, self.codebook_size + 1
        starts = [0, *(first + d * below for d in range(content_BPD.shape[-1] - 1))]
        rows = attention.add_bias(content_BPD, jnp.array(starts, jnp.int32))
        return self._cast(self.content_embedding_KM[rows]).sum(-2)

    def _embed_positions(self, tokens: PackedCodes) -> jax.Array:
        """Embeddings (B, P, M) of the positions of tokens, which their grains tell apart."""
        position, grain = tokens.position, tokens.grain
        if self.use_shared_position_embedding:
            ids, starts = _ids_of_finest(self.layout)
            (table,) = self.position_embeddings
            return self._cast(table[jnp.asarray(ids)[jnp.asarray(starts)[grain] + position]])
        embedded = jnp.zeros((), self._dtype)
        for g, table in enumerate(self.position_embeddings):
            is_grain = grain == g
            rows = self._cast(table[jnp.where(is_grain, position, 0)])
            embedded = jnp.where(is_grain[..., None], rows, embedded)
        return embedded

    def _depth_vectors(self, codes: jax.Array) -> jax.Array:
        return super()._depth_vectors(jnp.minimum(codes, self.codebook_size - 1))  # special tokens are no codes

    # --- inner pieces ---

    @property
    def layout(self) -> GrainLayout:
        """Vocabularies and order of the tokens; classes and the null class are start tokens."""
        num_classes = 1 if self.is_text else self.cond_vocab_size + self.use_null_cond
        return GrainLayout(self.region_grid, self.num_grains, self.codebook_size, num_classes, self.order)

    @property
    def region_grid(self) -> tuple[int, int]:
        """(u, v): what one code of grain 0 covers is a region."""
        h, w, _ = self.code_shape
        return h >> (self.num_grains - 1), w >> (self.num_grains - 1)

    @property
    def uses_codebook(self) -> bool:
        """Whether there is a depth stack, which reads the tokenizer's codebook."""
        return self.code_shape[-1] > 1

    @property
    def slots(self) -> int:
        """Tokens that the model has room for."""
        return self.layout.max_tokens if self.num_slots is None else self.num_slots

    @property
    def is_text(self) -> bool:
        """Whether the condition is text, which stands in front of the tokens."""
        return self.cond_length > 1

    @property
    def text_length(self) -> int:
        """Condition tokens in front of the others."""
        return self.cond_length if self.is_text else 0

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Arguments of `init`: zeros of the right shapes, two tokens of each image."""
        ids = jnp.zeros((batch, 2), jnp.int32)
        content = jnp.zeros((batch, 2, self.code_shape[-1]), jnp.int32)
        packed = PackedCodes(content, ids, ids, jnp.full(batch, 2, jnp.int32))
        return packed, jnp.zeros((batch, self.cond_length), jnp.int32)

    def _check_slots(self, name: str, count: int) -> None:
        if count > self.slots:
            raise ValueError(
                f"{name}: {count} tokens are more than model.num_slots {self.slots}; give fewer, or more slots"
            )

    def check(self) -> None:
        """Check every setting.

        Raises:
          ValueError: settings out of range, or that do not fit together.
        """
        self._check_shared("position_layers", "content_layers")
        checks.integers("model.codebook_size", self.codebook_size, 1)
        checks.integers("model.num_grains", self.num_grains, 2)
        checks.one_of("model.order", self.order, grains.ORDERS)
        for axis, size in zip("hw", self.code_shape[:2], strict=True):
            cells = 1 << (self.num_grains - 1)
            checks.multiple_of("model.code_shape", size, cells, f"for {self.num_grains} grains", axis=axis)
        if self.num_slots is not None:
            checks.integers("model.num_slots", self.num_slots, 2)
        D = self.code_shape[-1]
        if (D > 1) != (self.depth_layers > 0):
            fix = "codes below the first need at least 1" if D > 1 else "set it to 0, where there is no depth stack"
            raise ValueError(f"model.depth_layers: {self.depth_layers} does not fit code depth {D}; {fix}")


def _slots(tokens: PackedCodes, slots: slice) -> PackedCodes:
    """Some of the tokens of every image."""
    content, position, grain = (ids[:, slots] for ids in tokens[:3])
    return PackedCodes(content, position, grain, tokens.length)


def _ids_of_finest(layout: GrainLayout) -> tuple[np.ndarray, np.ndarray]:
    """For every position of grain 0, then of grain 1, ... the one of the finest grain that stands for it; the starts.

    A cell is the finest cell at its top left, a special token its like.
    """
    last = layout.num_grains - 1
    raster = np.arange(layout.cells(last), dtype=np.int32).reshape(layout.code_grid)
    special = np.arange(layout.position_pad(last), layout.position_size(last), dtype=np.int32)
    cells = [raster[:: 1 << (last - g), :: 1 << (last - g)].ravel() for g in range(last + 1)]
    starts = np.cumsum([0, *(layout.position_size(g) for g in range(last))], dtype=np.int32)
    return np.concatenate([ids for cells_of_grain in cells for ids in (cells_of_grain, special)]), starts

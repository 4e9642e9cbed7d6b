"""The residual quantizer as a Flax module, on top of the functions."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rq_jax.quantize.codes import Codebook, ResidualCodes, finite_vectors, quantize_once, residual_quantize
from rq_jax.quantize.ema import (
    CodebookState,
    check_mask,
    check_weights,
    kmeans,
    left_out,
    quantize_and_update,
    restart_candidates,
)
from rq_jax.settings import checks

# Tables (K, E) of a fresh codebook.
_INITS: dict[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    "normal": nn.initializers.normal(1.0, jnp.float32),
    "uniform": lambda rng, shape: jax.random.uniform(rng, shape, jnp.float32, -1 / shape[0], 1 / shape[0]),
}
# Counts of a fresh codebook, whose sums are its table. Counts of 0 are those of the original RQ-VAE, which disagree
# with the sums: there a code without a restart flies off once others have counts.
_COUNTS = {"normal": 0.0, "uniform": 1.0}


class ResidualQuantizer(nn.Module):
    """Residual quantizer with a straight-through gradient and a codebook learned by moving average.

    Its state lives in the variable collection "codebook": `codebook_KE`, `counts_K`, `sums_KE`; each is one array for
    a shared codebook, an array with a leading axis D for separate ones of equal size, a tuple of D arrays otherwise.
    Training calls need `mutable=["codebook"]`; restart and k-means draw from the rng stream "restart" and do not happen
    without it, of which a warning tells.

    Vectors that are not finite change no codebook and move no other vector's codes, see `finite_vectors`. A training
    call with "intermediates" among its mutable collections stores how many there were at each depth: "num_not_finite",
    int32 (D,).

    Attributes:
      codebook_size: K, or D sizes K_d (separate codebooks only).
      code_dim: E, length of a code vector.
      depth: D, codes per vector; 1 is plain vector quantisation.
      use_shared_codebook: one table for all depths.
      decay: of the moving average in [0, 1], or one per depth (separate codebooks only); 1 freezes the codebook once it
        is placed.
      use_restart: unused codes restart from random vectors of the batch.
      codebook_update: "sequential" or "pooled", see `quantize_and_update`.
      use_kmeans_init: the first training call places the codes by k-means.
      codebook_init: a fresh codebook's distribution: "normal", of variance 1, or "uniform" in [-1/K, 1/K), that of
        DQ-VAE. The moving averages start from the same table, those of "normal" with counts of 0, of "uniform" of 1
        (differs from CrossmodalGroup/DynamicVectorQuantization:VQEmbedding, which leaves the sums at another draw and
        the counts at 0: without restarts, codes in no use would then grow by some orders of magnitude).
    """

    codebook_size: int | tuple[int, ...]
    code_dim: int
    depth: int
    use_shared_codebook: bool = True
    decay: float | tuple[float, ...] = 0.99
    use_restart: bool = True
    codebook_update: str = "sequential"
    use_kmeans_init: bool = False
    codebook_init: str = "normal"

    def setup(self):
        check_settings(self)
        num_tables = 1 if self.use_shared_codebook else self.depth
        sizes, self.decays = per_depth(self.codebook_size, num_tables), per_depth(self.decay, num_tables)
        draw_table = _INITS[self.codebook_init]

        def draw(rng: jax.Array) -> list[jax.Array]:
            keys = jax.random.split(rng, len(sizes))
            return [draw_table(key, (size, self.code_dim)) for key, size in zip(keys, sizes, strict=True)]

        def tables():
            return self._join(draw(self.make_rng("params")))

        self.codebook_KE = self.variable("codebook", "codebook_KE", tables)
        count = _COUNTS[self.codebook_init]
        self.counts_K = self.variable(
            "codebook", "counts_K", lambda: self._join([jnp.full(K, count, jnp.float32) for K in sizes])
        )
        self.sums_KE = self.variable("codebook", "sums_KE", lambda: self.codebook_KE.value)

    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        weights: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> ResidualCodes:
        """Quantise vectors (..., E); in training also update the codebook.

        Args:
          x: vectors (..., E).
          train: whether the codebook learns from them.
          weights: (...), at least 0: of each vector in the moving average, see `ema_update`. Restart and k-means draw
            from all vectors alike.
          mask: bool (...), False for vectors that it does not learn from, such as padding; they get codes all the same.

        Returns:
          `ResidualCodes`; the gradient of `quantized` passes straight through to `x`.

        Raises:
          ValueError: a mask or weights of another shape than the vectors, a mask that is not bool, or weights that
            `ema_update` refuses.
        """
        check_weights(weights, x.shape[:-1])
        check_mask(mask, x.shape[:-1])
        x = x.astype(jnp.float32)
        detached = jax.lax.stop_gradient(x)
        if train and not self.is_initializing():
            result, states = self._train(detached, mask, weights)
            self._count_not_finite(detached, result.partial_sums, mask)
            for variable, values in zip(self._variables, zip(*states, strict=True), strict=True):
                variable.value = self._join(list(values))
        else:
            result = residual_quantize(detached, self.codebook, self.depth)
        return result._replace(quantized=x + jax.lax.stop_gradient(result.quantized - x))

    @property
    def codebook(self) -> Codebook:
        """The codebook as the pure functions take it."""
        value = self.codebook_KE.value
        return tuple(value) if isinstance(value, (tuple, list)) else value

    @property
    def _variables(self):
        return self.codebook_KE, self.counts_K, self.sums_KE

    def _count_not_finite(self, x: jax.Array, partial_sums: jax.Array, mask: jax.Array | None) -> None:
        """Store how many vectors no codebook learned from at each depth, where the caller wants to know."""
        if not self.is_mutable_collection("intermediates"):
            return
        before = jnp.concatenate([jnp.zeros_like(partial_sums[..., :1, :]), partial_sums[..., :-1, :]], -2)
        is_bad = ~finite_vectors(x[..., None, :] - before)
        if mask is not None:
            is_bad &= mask[..., None]
        self.sow("intermediates", "num_not_finite", is_bad.reshape(-1, self.depth).sum(0, dtype=jnp.int32))

    def _train(
        self, x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
    ) -> tuple[ResidualCodes, list[CodebookState]]:
        split = [[v.value] if self.use_shared_codebook else list(v.value) for v in self._variables]
        states = [CodebookState(*arrays) for arrays in zip(*split, strict=True)]
        candidates = None
        if self.has_rng("restart"):
            # Always split: switching k-means on does not change the vectors that codes restart from.
            rng_restart, rng_kmeans = jax.random.split(self.make_rng("restart"))
            if self.use_restart:

                def candidates(d: int, x_NE: jax.Array, K: int) -> jax.Array:
                    return restart_candidates(jax.random.fold_in(rng_restart, d), x_NE, K)

            if self.use_kmeans_init:
                states = self._place_codes(rng_kmeans, left_out(x, mask), states)
        else:
            self._warn_without_stream()
        how = self.depth, self.decays, self.codebook_update, candidates, mask, weights
        return quantize_and_update(x, states, *how)

    def _warn_without_stream(self) -> None:
        for name in ("use_restart", "use_kmeans_init"):
            if getattr(self, name):
                warnings.warn(
                    f"{name}: True does nothing in a training call without the rng stream 'restart'; "
                    f"pass rngs={{'restart': key}}, or set {name}=False",
                    stacklevel=2,
                )

    def _place_codes(self, rng: jax.Array, x: jax.Array, states: list[CodebookState]) -> list[CodebookState]:
        """K-means on the residuals of each depth, only while nothing has ever been counted.

        A shared codebook has one state, placed by the vectors themselves. The branch is taken at run time: a step's
        program is the same before and after.
        """

        def place() -> list[CodebookState]:
            residual, placed = x.reshape(-1, x.shape[-1]), []
            for d, state in enumerate(states):
                found = kmeans(jax.random.fold_in(rng, d), residual, state.counts_K.shape[0])
                # Of vectors none of which is finite there is nothing to place: the next call tries again.
                is_placed = jnp.any(found.counts_K > 0)
                placed.append(jax.tree.map(lambda new, old, use=is_placed: jnp.where(use, new, old), found, state))
                residual = residual - quantize_once(residual, placed[-1].codebook_KE)[1]
            return placed

        untouched = jnp.stack([self._is_fresh(state) for state in states]).all()
        return jax.lax.cond(untouched, place, lambda: states)

    def _is_fresh(self, state: CodebookState) -> jax.Array:
        """Whether nothing has been counted yet: restored runs keep what they learned."""
        count = _COUNTS[self.codebook_init]
        is_fresh = jnp.all(state.counts_K == count)
        if count:  # which a code also has that has just restarted: but then its vector is no longer of the first draw
            is_fresh &= jnp.all(jnp.abs(state.codebook_KE) <= 1 / len(state.counts_K))
        return is_fresh

    def _join(self, arrays: list[jax.Array]) -> Any:
        if self.use_shared_codebook:
            return arrays[0]
        equal = len({array.shape for array in arrays}) == 1
        return jnp.stack(arrays) if equal else tuple(arrays)


def check_settings(quantizer: Any, name_of: Callable[[str], str] = str) -> None:
    """Check every setting of a `ResidualQuantizer`.

    Args:
      quantizer: the module, bound or not.
      name_of: from an attribute of the module to the setting's name in messages.

    Raises:
      ValueError: settings out of range, or that do not fit together.
    """
    for name in ("codebook_size", "decay"):
        value = getattr(quantizer, name)
        if quantizer.use_shared_codebook and isinstance(value, Sequence):
            raise ValueError(
                f"{name_of(name)}: {tuple(value)} has one entry per depth, but the codebook is shared; give one number"
            )
        checks.one_per_depth(name_of(name), value, quantizer.depth)
    for name in ("codebook_size", "code_dim", "depth"):
        checks.at_least(name_of(name), getattr(quantizer, name), 1)
    checks.within(name_of("decay"), quantizer.decay, 0, 1)
    checks.one_of(name_of("codebook_update"), quantizer.codebook_update, ("sequential", "pooled"))
    checks.one_of(name_of("codebook_init"), quantizer.codebook_init, _INITS)


def per_depth(value: Any, depth: int) -> tuple[Any, ...]:
    """A setting that is one number, or one per depth, as a tuple with an entry per depth."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * depth

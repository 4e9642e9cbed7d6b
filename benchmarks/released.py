"""The original's sampler of two grains, the baseline of speed: it runs the whole prefix again for every code."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from rq_jax.grains import PackedCodes
from rq_jax.models.flops import Work, count_traced
from rq_jax.sampling import as_released

NUM_LENGTHS = 8  # prefixes that are timed; the others are taken to lie between them


def prefix_lengths(tokens: int, count: int = NUM_LENGTHS) -> list[int]:
    """Lengths that stand for the prefixes 1 .. tokens - 1: the middles of `count` equal parts."""
    return [1 + int((i + 0.5) * (tokens - 1) / count) for i in range(count)]


def build(model: Any, variables: Any, batch: int, tokens: int, filters: Any, num_classes: int) -> timing.Program:
    """One step of the original's sampler at each of a few prefix lengths, each compiled for its own.

    A step is that of `sampling.as_released`: both stacks over all tokens so far, two draws, no cache. A call counts as
    many images as its share of all steps makes, so that the rate is that of whole images by the midpoint rule.

    Args:
      model: a `DQTransformer` of two grains.
      variables: its variables.
      batch: images of a step.
      tokens: of every image.
      filters: of `as_released.next_token`.
      num_classes: classes to draw from.
    """
    cond, found = jnp.arange(batch, dtype=jnp.int32)[:, None] % num_classes, []

    def step(variables: Any, carry: Any, uniforms: jax.Array, cond: jax.Array, filters: Any) -> Any:
        return as_released.next_token(model, variables, "fixed", filters, cond, carry, uniforms).tokens.content

    for length in (lengths := prefix_lengths(tokens)):
        args = variables, _prefix(model, batch, length), jnp.full((2, 2, batch), 0.5), cond, filters
        compiled, counts = timing.compile_program(step, *args), count_traced(step, *args)
        work = Work(counts.flops, counts.bytes, model.dtype)
        found.append((_call(compiled, args), compiled, work))
    calls, programs, works = zip(*found, strict=True)
    largest = {name: max(program.memory[name] for program in programs) for name in programs[0].memory}
    return timing.Program(
        lambda: [call() for call in calls],
        batch * len(lengths) / (tokens - 1),
        sum(program.seconds for program in programs),
        largest,
        {f"prefix {length}": work for length, work in zip(lengths, works, strict=True)},
        details=lambda seconds: {"prefix_lengths": lengths, "tokens": tokens},
    )


def _call(compiled: timing.Compiled, args: Sequence[Any]) -> Callable[[], Any]:
    """Waits for the step: the original draws one code after the other."""
    return lambda: jax.block_until_ready(compiled.call(*args))


def _prefix(model: Any, batch: int, length: int) -> as_released.Carry:
    """A batch with so many tokens, all of the coarse grain, and room for the next."""
    zeros = jnp.zeros((batch, length + 1), jnp.int32)
    tokens = PackedCodes(zeros[..., None], zeros, zeros, zeros[:, 0] + length + 1)
    return as_released.Carry(jnp.int32(length - 1), tokens, jnp.int32(length + 1), jnp.zeros(batch, bool))

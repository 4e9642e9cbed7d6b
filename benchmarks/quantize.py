"""Residual quantisation of random vectors: search alone, and with the training update of the codebook.

Each is measured beside the naive form: the whole matrix of distances, and its argmin.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from rq_jax import quantize
from rq_jax.models.flops import search_work

DECAY = 0.99

Config = dict[str, Any]


def groups(args: argparse.Namespace) -> list[list[Config]]:
    """Pairs of the library's form and the dense form, without and with the update."""
    names = ("num_vectors", "code_dim", "codebook_size", "depth")
    sizes = [dict(zip(names, values, strict=True)) for values in itertools.product(*(getattr(args, n) for n in names))]
    methods = (("search", "dense_search"), ("update", "dense_update"))
    return [[{**size, "method": method} for method in pair] for size in sizes for pair in methods]


def dense_codes(x_NE: jax.Array, codebook_KE: jax.Array) -> jax.Array:
    """The nearest codes by the (N, K) matrix of squared distances."""
    products_NK = jnp.dot(x_NE, codebook_KE.T, precision=jax.lax.Precision.HIGHEST)
    distances_NK = jnp.sum(x_NE**2, -1, keepdims=True) - 2 * products_NK + jnp.sum(codebook_KE**2, -1)[None]
    return jnp.argmin(distances_NK, axis=-1)


def dense_search(x_NE: jax.Array, codebook_KE: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """Codes (N, D) and quantised vectors (N, E), as `quantize.residual_quantize`."""
    residual, codes = x_NE, []
    for _ in range(depth):
        codes.append(dense_codes(residual, codebook_KE))
        residual = residual - codebook_KE[codes[-1]]
    return jnp.stack(codes, -1), x_NE - residual


def dense_update(
    x_NE: jax.Array, state: quantize.CodebookState, depth: int, candidates: Callable[..., jax.Array]
) -> quantize.CodebookState:
    """The codebook after a training batch, as `quantize.quantize_and_update`."""
    residual = x_NE
    for d in range(depth):
        codes_N = dense_codes(residual, state.codebook_KE)
        vectors = state.codebook_KE[codes_N]
        restarts_KE = candidates(d, residual, state.counts_K.shape[0])
        state = quantize.ema_update(state, residual, codes_N, DECAY, restarts_KE)
        residual = residual - vectors
    return state


def make_method(name: str, depth: int) -> Callable[..., Any]:
    """The method of this name: (vectors, state of the codebook, key) -> arrays."""

    def run(x_NE: jax.Array, state: quantize.CodebookState, rng: jax.Array) -> Any:
        def candidates(d: int, x_NE: jax.Array, K: int) -> jax.Array:
            return quantize.restart_candidates(jax.random.fold_in(rng, d), x_NE, K)

        if name == "search":
            codes, _, quantized = quantize.residual_quantize(x_NE, state.codebook_KE, depth)
            return codes, quantized
        if name == "dense_search":
            return dense_search(x_NE, state.codebook_KE, depth)
        if name == "update":
            return quantize.quantize_and_update(x_NE, [state], depth, [DECAY], candidates=candidates)[1][0]
        return dense_update(x_NE, state, depth, candidates)

    return run


def build(config: Config, args: argparse.Namespace) -> timing.Program:
    """A method on normal vectors, with a codebook of normal vectors that have been used twice each."""
    N, E, K, D = (config[name] for name in ("num_vectors", "code_dim", "codebook_size", "depth"))
    rng_x, rng_codebook, rng = jax.random.split(jax.random.key(0), 3)
    x_NE, codebook_KE = jax.random.normal(rng_x, (N, E)), jax.random.normal(rng_codebook, (K, E))
    state = quantize.CodebookState(codebook_KE, jnp.full(K, 2.0), 2 * codebook_KE)
    compiled = timing.compile_program(make_method(config["method"], D), x_NE, state, rng)
    work = search_work(N, E, K, D)
    if config["method"].startswith("dense"):
        work = dataclasses.replace(work, bytes=work.bytes + 2 * 4.0 * D * N * K)  # distances, written and read
    stages = {"search": work}
    return timing.Program(lambda: compiled.call(x_NE, state, rng), N, compiled.seconds, compiled.memory, stages)

"""Figures of merit: arrays in, numbers out."""

import jax
import jax.numpy as jnp


def psnr(images: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of each picture, (..., H, W, C) in [-1, 1] to (...).

    The reconstruction is clipped to [-1, 1], as it is when it is shown; identical pictures give 100 dB.
    """
    difference = images - jnp.clip(reconstruction, -1.0, 1.0)
    mse = jnp.mean(difference.astype(jnp.float32) ** 2, axis=(-3, -2, -1))
    return 10 * jnp.log10(4.0 / jnp.maximum(mse, 4e-10))


def code_counts(codes: jax.Array, codebook_size: int) -> jax.Array:
    """How often each code occurs at each depth: codes (..., D) to counts (D, K), float32."""
    D = codes.shape[-1]
    flat_ND = codes.reshape(-1, D)
    return jnp.zeros((D, codebook_size)).at[jnp.arange(D), flat_ND].add(1.0)


def code_usage(counts: jax.Array) -> jax.Array:
    """Share in [0, 1] of the codes that occur at all, counts (..., K) to (...)."""
    return jnp.mean(counts > 0, axis=-1)


def code_perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the code distribution, counts (..., K) to (...): between 1 and K codes "in use"."""
    shares = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
    return jnp.exp(-jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), axis=-1))


def unigram_cross_entropy(counts: jax.Array, codes: jax.Array) -> jax.Array:
    """Cross-entropy in nats, per depth, of codes under the code frequencies of another set.

    Args:
      counts: (D, K) of the training set; one is added to each, so that unseen codes have a finite cost.
      codes: (..., D).

    Returns:
      (D,): the mark that a model of the codes has to beat.
    """
    log_shares_DK = jnp.log((counts + 1) / (counts + 1).sum(-1, keepdims=True))
    flat_ND = codes.reshape(-1, codes.shape[-1])
    return -log_shares_DK[jnp.arange(flat_ND.shape[-1]), flat_ND].mean(0)

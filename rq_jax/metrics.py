"""Figures of merit: arrays in, numbers out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.settings import checks

# Side of the Gaussian window of `ssim`: the smallest image it can measure.
SSIM_WINDOW = 11


def psnr(images: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of each image, (..., H, W, C) in [-1, 1] to (...).

    The reconstruction is clipped to [-1, 1], as it is for display; identical images give 100 dB.
    """
    images, reconstruction = _of_one_rank(images, jnp.clip(reconstruction, -1.0, 1.0))
    difference = images - reconstruction
    mse = jnp.mean(difference.astype(jnp.float32) ** 2, axis=(-3, -2, -1))
    return 10 * jnp.log10(4.0 / jnp.maximum(mse, 4e-10))


def ssim(images: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Mean structural similarity of each image, (..., H, W, C) in [-1, 1] to (...): 1 for equal ones, at least -1.

    As Wang et al., IEEE TIP 2004: Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, wherever the whole
    window lies inside the image; each channel by itself, large images without scaling them down. Black counts as 0,
    as in the paper, so that this is the figure of the same images in 0..255. The reconstruction is clipped as in
    `psnr`.

    Raises:
      ValueError: images smaller than the window.
    """
    H, W = images.shape[-3:-1]
    if min(H, W) < SSIM_WINDOW:
        raise ValueError(
            f"images: {H}x{W} is smaller than the window of SSIM; it takes at least {SSIM_WINDOW}x{SSIM_WINDOW}"
        )
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window / window.sum()).astype(np.float32)

    def smooth(x: jax.Array) -> jax.Array:
        for axis in (-3, -2):
            size = x.shape[axis] - SSIM_WINDOW + 1
            x = sum(w * jax.lax.slice_in_dim(x, i, i + size, axis=x.ndim + axis) for i, w in enumerate(window))
        return x

    x, y = images.astype(jnp.float32), jnp.clip(reconstruction.astype(jnp.float32), -1.0, 1.0)
    x, y = _of_one_rank(x, y)
    mean_x, mean_y = smooth(x), smooth(y)
    variances = smooth(x * x) + smooth(y * y) - mean_x**2 - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = mean_x + 1, mean_y + 1  # in [0, 2]: variances do not mind, the ratio of means does
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(-3, -2, -1))


def _of_one_rank(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both arrays with leading axes of size 1 where the other has more: images meet several reconstructions each."""
    rank = max(x.ndim, y.ndim)
    return tuple(jnp.expand_dims(array, tuple(range(rank - array.ndim))) for array in (x, y))


def laplacian_energy(images: jax.Array) -> jax.Array:
    """Mean squared Laplacian of each image, (..., H, W, C) to (...): the energy of its finest detail.

    The ratio of a reconstruction's to its original's tells how sharp it is: below 1 where detail is lost, which a
    squared error hardly sees. The image is clipped to [-1, 1]; its outermost pixels only serve as neighbours.
    """
    x = jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
    inner = x[..., 1:-1, 1:-1, :]
    neighbours = x[..., :-2, 1:-1, :] + x[..., 2:, 1:-1, :] + x[..., 1:-1, :-2, :] + x[..., 1:-1, 2:, :]
    return jnp.mean((neighbours - 4 * inner) ** 2, axis=(-3, -2, -1))


def code_counts(codes: jax.Array, codebook_size: int, weights: jax.Array | None = None) -> jax.Array:
    """How often each code occurs at each depth: codes (..., D) to counts (D, K), float32.

    Codes outside [0, K), such as padding, are not counted. `weights` (...) are what the codes at a position count, at
    every depth; None is 1. With `grains.cell_weights` each code of a coarse region counts once.

    Raises:
      ValueError: weights of another shape than the positions.
    """
    D = codes.shape[-1]
    flat_ND = codes.reshape(-1, D)
    counts_DK = jnp.zeros((D, codebook_size), jnp.float32)
    places = jnp.arange(D, dtype=jnp.int32)[None], flat_ND
    count: Any = 1.0
    if weights is not None:
        checks.shape("weights", weights.shape, codes.shape[:-1])
        count = jnp.broadcast_to(weights.astype(jnp.float32).reshape(-1, 1), flat_ND.shape)
    return counts_DK.at[places].add(count, mode="drop", wrap_negative_indices=False)


def overall_code_usage(counts_DK: np.ndarray, sizes: Sequence[int], shared: bool) -> float:
    """Share in [0, 1] of all codes that occur at any depth.

    Args:
      counts_DK: how often each code occurs at each depth, (D, K).
      sizes: the D codebook sizes, at most K.
      shared: one table serves all depths; else each depth has its own.
    """
    inside_DK = np.arange(counts_DK.shape[1]) < np.asarray(sizes)[:, None]
    used_DK = (counts_DK > 0) & inside_DK
    if shared:
        return float(used_DK.any(0).sum() / inside_DK[0].sum())
    return float(used_DK.sum() / inside_DK.sum())


def code_perplexity(counts: jax.Array) -> jax.Array:
    """exp of the entropy of the code distribution, counts (..., K) to (...): between 1 and K codes "in use".

    Counts may be shares or averages: their sum does not matter. A code without a count adds nothing, so that rows
    padded to the largest of several codebooks need no sizes.
    """
    total = counts.sum(-1, keepdims=True)
    shares = counts / jnp.where(total > 0, total, 1.0)
    return jnp.exp(-jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)), axis=-1))


def unigram_cross_entropy(counts: np.ndarray, held_out: np.ndarray, sizes: Sequence[int] | None = None) -> np.ndarray:
    """Cross-entropy in nats of the symbols of one set under their frequencies in another: the mark to beat.

    Args:
      counts: (..., K), how often the training set has each symbol, at each depth for instance; one is added to each, so
        that unseen symbols have a finite cost.
      held_out: (..., K), how often the other set has it; at least one in each row.
      sizes: how many symbols each row (...) has, where they differ: the rest of it is none. Default: all K.

    Returns:
      (...) float64, means over the symbols of the other set.
    """
    counts, held_out = (np.asarray(array, np.float64) for array in (counts, held_out))
    is_symbol = True if sizes is None else np.arange(counts.shape[-1]) < np.asarray(sizes)[..., None]
    smoothed = np.where(is_symbol, counts + 1, 0)
    shares = smoothed / smoothed.sum(-1, keepdims=True)
    nats = -held_out * np.log(np.where(is_symbol, shares, 1))
    return nats.sum(-1) / held_out.sum(-1)


def kernel_distances(
    x_NA: np.ndarray,
    y_NA: np.ndarray,
    subset_size: int,
    num_subsets: int = 100,
    seed: int = 0,
    paired: bool = False,
) -> np.ndarray:
    """Unbiased squared kernel distances of random subsets of two sets of features (Binkowski et al., ICLR 2018: KID).

    The kernel is (x.y / A + 1)^3. The mean estimates the distance, below 0 where two sets are alike; the spread over
    subsets says how far to trust it. In float64 on the host: the figure is a small difference of large sums.

    Args:
      x_NA, y_NA: features, (N, A) and (N', A).
      subset_size: images of either side, drawn without replacement; at least 2, at most the smaller set.
      num_subsets: at least 1.
      seed: of the subsets.
      paired: the n-th of either set are of one image, as with reconstructions. The estimate is unbiased for
        independent sets only: the two subsets of a pair then have no image in common.

    Returns:
      (num_subsets,).

    Raises:
      ValueError: a subset size or a number of subsets out of range, or features of different lengths.
    """
    x_NA, y_NA = np.asarray(x_NA), np.asarray(y_NA)  # memory maps stay such: subsets become float64
    if x_NA.ndim != 2 or y_NA.ndim != 2 or x_NA.shape[1] != y_NA.shape[1]:
        raise ValueError(f"features: shapes {x_NA.shape} and {y_NA.shape} are not (N, A) of one A")
    if paired and len(x_NA) != len(y_NA):
        raise ValueError(f"features: {len(x_NA)} and {len(y_NA)} are no pairs")
    largest = min(len(x_NA), len(y_NA)) // (2 if paired else 1)
    of = "half of the pairs" if paired else "the size of the smaller set"
    checks.in_range("subset_size", subset_size, 2, largest, of)
    checks.at_least("num_subsets", num_subsets, 1)
    rng, n = np.random.default_rng(seed), subset_size

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def distance() -> float:
        if paired:
            chosen = rng.permutation(len(x_NA))
            x, y = x_NA[chosen[:n]], y_NA[chosen[n : 2 * n]]
        else:
            x, y = (features[rng.choice(len(features), n, replace=False)] for features in (x_NA, y_NA))
        x, y = x.astype(np.float64), y.astype(np.float64)
        within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
        return within - 2 * kernel(x, y).mean()

    return np.array([distance() for _ in range(num_subsets)])

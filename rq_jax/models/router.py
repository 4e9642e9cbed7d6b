"""Routers of a DQ-VAE: which grain each region of an image gets (Huang et al., CVPR 2023, section 3.2)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from rq_jax.grains import repeat_cells
from rq_jax.nn.conv import Conv, Norm

ROUTERS = ("entropy", "feature", "random")
ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}


class FeatureRouter(nn.Module):
    """Gate logits (B, u, v, G), float32, from the features of all grains, coarse first, each on its own grid.

    Features of finer grains are averaged over the region; one linear layer, or two with a nonlinearity, follows.

    Attributes:
      num_layers: 1 or 2.
      activation: between two, a name in `ACTIVATIONS`.
      use_norm: normalise the features of each grain first; norm_groups: groups of channels of these norms.
    """

    num_layers: int = 2
    activation: str = "silu"
    use_norm: bool = True
    norm_groups: int = 32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # float32 products, on every device
            x = jnp.concatenate([self._of_regions(g, one) for g, one in enumerate(features)], axis=-1)
            if self.num_layers == 2:
                x = ACTIVATIONS[self.activation](Conv(x.shape[-1], 1, name="hidden")(x))
            return Conv(len(features), 1, name="gate")(x)

    def _of_regions(self, g: int, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if self.use_norm:
            x = Norm(self.norm_groups, name=f"norm{g}")(x)
        return reduce(x, "b (u r) (v s) c -> b u v c", "mean", r=1 << g, s=1 << g)


def straight_through_gates(logits: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hard Gumbel softmax at temperature 1 (section 3.2).

    Args:
      logits, noise: (..., G), the noise from Gumbel's distribution.

    Returns:
      The drawn grains (...) int32, and their gates (..., G): one-hot, with the gradient of the softmax.
    """
    noisy = logits + noise
    soft, grains = jax.nn.softmax(noisy), jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return grains, one_hot(grains, logits.shape[-1]) + (soft - jax.lax.stop_gradient(soft))


def one_hot(grains: jax.Array, num_grains: int) -> jax.Array:
    """Gates (..., G) float32 of grains (...) that nothing trains."""
    return jax.nn.one_hot(grains, num_grains, dtype=jnp.float32)


def merge(features: Sequence[jax.Array], grains: jax.Array) -> jax.Array:
    """In each region the features of its grain, on the grid of the finest, coarser ones repeated.

    Args:
      features: of each grain, coarse first: (B, u 2^g, v 2^g, C).
      grains: (B, u, v).

    Returns:
      (B, h, w, C). No gradient passes to the features of other grains.
    """
    finest = len(features) - 1
    merged, cells = repeat_cells(features[0], 1 << finest), repeat_cells(grains, 1 << finest)[..., None]
    for g, finer in enumerate(features[1:], start=1):
        merged = jnp.where(cells == g, repeat_cells(finer, 1 << (finest - g)), merged)
    return merged


def grains_by_share(uniforms: jax.Array, shares: Sequence[float]) -> jax.Array:
    """Grains (...) int32 from numbers uniform in [0, 1): grain g >= 1 has the share shares[g - 1]."""
    ends = 1 - np.cumsum(np.asarray(shares, np.float32)[::-1])[::-1]  # of grains 0 .. G-2
    return sum(((uniforms >= end).astype(jnp.int32) for end in ends), jnp.zeros(uniforms.shape, jnp.int32))


def hashed_uniforms(images: jax.Array, region_size: int) -> jax.Array:
    """A number in [0, 1) for each region (B, u, v), from its pixels and its place alone.

    Pixels count by their 8 bits, so that rounding does not change the number. The place counts, so that flat regions
    of one colour do not all get one number.

    Args:
      images: (B, H, W, C) in [-1, 1].
      region_size: pixels on a side.
    """
    levels = jnp.clip(jnp.rint((images.astype(jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint32)
    pixels = rearrange(levels, "b (u r) (v s) c -> b u v (r s c)", r=region_size, s=region_size)
    _, u, v, n = pixels.shape
    # A sum modulo 2^32 is the same in any order.
    words = jnp.sum(_mix(pixels + 256 * jnp.arange(n, dtype=jnp.uint32)[None, None, None]), axis=-1, dtype=jnp.uint32)
    places = _mix(jnp.arange(1, u * v + 1, dtype=jnp.uint32)).reshape(1, u, v)
    return (_mix(words ^ places) >> 8).astype(jnp.float32) * 2.0**-24


def _mix(words: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of a word depends on all of them."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)

"""From images to what a frozen network sees: range, channels, size."""

import jax
import jax.numpy as jnp
import numpy as np


def as_rgb(images: jax.Array) -> jax.Array:
    """Images in float32, clipped to [-1, 1], with three channels.

    Args:
      images: (B, H, W, C), C 1 or 3; a grey image counts as three equal channels.

    Returns:
      (B, H, W, 3).

    Raises:
      ValueError: another shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images: shape {images.shape} is not (B, H, W, C) with 1 or 3 channels")
    return jnp.broadcast_to(jnp.clip(images.astype(jnp.float32), -1, 1), (*images.shape[:-1], 3))


def resize(images: jax.Array, height: int, width: int, method: str, antialias: bool = True) -> jax.Array:
    """Images (B, H, W, C) of another size; `antialias` widens the kernel where they shrink."""
    shape = (images.shape[0], height, width, images.shape[-1])
    return jax.image.resize(images, shape, method, antialias=antialias)


def resize_and_crop(images: jax.Array, short_side: int, side: int, method: str) -> jax.Array:
    """The central square of images whose short side gets a size first, antialiased, as torchvision's transforms do it.

    Args:
      images: (B, H, W, C).
      short_side: of the resized images, at least `side`.
      side: of the square.
      method: "bilinear" or "bicubic".

    Returns:
      (B, side, side, C).
    """
    H, W = _with_short_side(images, short_side)
    return _central(resize(images, H, W, method), side)


def resize_as_bytes(images: jax.Array, side: int) -> jax.Array:
    """The central square of images after Pillow's bicubic resize, bit for bit: in integers, 8 bits after each pass.

    The width goes first, as in every Pillow up to 12; 13 starts with the height of images over twice as high as wide.

    Args:
      images: (B, H, W, C) in [-1, 1], rounded to 8 bits first.
      side: of the square, and of the short side before it is cut out.

    Returns:
      (B, side, side, C), values of 8 bits in [-1, 1].
    """
    H, W = _with_short_side(images, side)
    x = jnp.floor((images + 1) * 127.5 + 0.5).astype(jnp.int32)
    x = _resize_axis(_resize_axis(x, 2, W), 1, H)
    return _central(x, side).astype(jnp.float32) / 127.5 - 1


_PILLOW_BITS = 22  # of the fraction of its weights


def _resize_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """One pass over integers in 0..255 along an axis."""
    if x.shape[axis] == size:
        return x
    positions, weights = _pillow_taps(x.shape[axis], size)
    total = jnp.int32(1 << (_PILLOW_BITS - 1))
    for position, weight in zip(positions, weights, strict=True):
        aligned = weight.reshape(-1, *(1,) * (x.ndim - 1 - axis))
        total = total + jnp.take(x, position, axis=axis) * aligned[(None,) * axis]
    return jnp.clip(jnp.right_shift(total, _PILLOW_BITS), 0, 255)


def _pillow_taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and integer weights (taps, new_size) of a bicubic resize, as Pillow's Resample.c has them."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
    end = np.minimum((centers + 2 * stretch + 0.5).astype(int), size)
    positions = first + np.arange((end - first).max())[:, None]
    x = np.abs((positions - centers + 0.5) / stretch)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((5 - x) * x - 8) * x + 4) / 2  # of the cubic with a = -1/2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0)) * (positions < end)
    weights = weights / weights.sum(0) * (1 << _PILLOW_BITS)
    return np.minimum(positions, size - 1), np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def _with_short_side(images: jax.Array, short_side: int) -> tuple[int, int]:
    """Height and width once the short side has this size."""
    short = min(images.shape[1:3])
    H, W = (short_side * size // short for size in images.shape[1:3])
    return H, W


def _central(images: jax.Array, side: int) -> jax.Array:
    top, left = (round((size - side) / 2) for size in images.shape[1:3])
    return images[:, top : top + side, left : left + side]


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Images in [-1, 1] minus means and over deviations of channels in [0, 1]."""
    shift, scale = (jnp.array(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return ((images + 1) / 2 - shift) / scale

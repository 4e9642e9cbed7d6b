"""From images to what a frozen network sees: range, channels, size."""

import jax
import jax.numpy as jnp


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
    short = min(images.shape[1:3])
    H, W = (short_side * size // short for size in images.shape[1:3])
    top, left = round((H - side) / 2), round((W - side) / 2)
    return resize(images, H, W, method)[:, top : top + side, left : left + side]


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Images in [-1, 1] minus means and over deviations of channels in [0, 1]."""
    shift, scale = (jnp.array(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return ((images + 1) / 2 - shift) / scale

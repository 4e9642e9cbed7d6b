"""Image transforms: resize, crop, flip, scale to [-1, 1].

The filter is Pillow's antialiased bilinear one; sizes and offsets are rounded as in the torchvision transforms that the
published models were trained with.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # height, width
_MAX_STRETCH = 16  # sides of the result in one of the resized image; of a longer strip a piece is read


def _resize(image: "Image.Image", size: Size) -> "Image.Image":
    from PIL import Image

    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def _crop(image: "Image.Image", top: int, left: int, size: Size) -> "Image.Image":
    height, width = size
    return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


def _random_crop(image: "Image.Image", size: Size, rng: np.random.Generator) -> "Image.Image":
    top = rng.integers(image.height - size[0] + 1)
    left = rng.integers(image.width - size[1] + 1)
    return _crop(image, int(top), int(left), size)


def _center_crop(image: "Image.Image", size: Size) -> "Image.Image":
    return _crop(image, round((image.height - size[0]) / 2), round((image.width - size[1]) / 2), size)


def _resize_to_cover(image: "Image.Image", size: Size, rng: np.random.Generator | None) -> "Image.Image":
    """Resize to the smallest image of the same aspect that covers `size`; its short side is that of a square size.

    A strip is cut first, so that the result is bounded by `size`: to a random piece, or to the middle without `rng`.
    """
    height, width = size
    longest = (
        max(1, _MAX_STRETCH * image.width * height // width),
        max(1, _MAX_STRETCH * image.height * width // height),
    )
    piece = min(image.height, longest[0]), min(image.width, longest[1])
    if piece != (image.height, image.width):
        image = _center_crop(image, piece) if rng is None else _random_crop(image, piece, rng)
    if image.width * height <= image.height * width:
        return _resize(image, (width * image.height // image.width, width))
    return _resize(image, (height, height * image.width // image.height))


def resize_random_crop(image: "Image.Image", size: Size, rng: np.random.Generator) -> "Image.Image":
    """ImageNet training: resize to cover `size`, then a random crop."""
    return _random_crop(_resize_to_cover(image, size, rng), size, rng)


def resize_center_crop(image: "Image.Image", size: Size, rng: np.random.Generator | None = None) -> "Image.Image":
    """Evaluation and LSUN training: resize to cover `size`, then crop the middle."""
    del rng
    return _center_crop(_resize_to_cover(image, size, None), size)


def random_resized_crop(image: "Image.Image", size: Size, rng: np.random.Generator) -> "Image.Image":
    """FFHQ training: a random crop of 75 to 100 % of the area, resized; the middle if ten draws do not fit."""
    aspect = size[1] / size[0]
    for _ in range(10):
        area = image.height * image.width * rng.uniform(0.75, 1.0)
        crop = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if crop[0] <= image.height and crop[1] <= image.width:
            return _resize(_random_crop(image, crop, rng), size)
    return _resize(_center_crop(image, _largest_crop(image, size)), size)


def jittered_crop(image: "Image.Image", size: Size, rng: np.random.Generator) -> "Image.Image":
    """Text-to-image training: the largest crop near the middle, resized to at most 9/8 of `size`, then a random crop.

    The offset of the first crop lies in [3/8, 5/8) of the slack; an image is not enlarged beyond `size`.
    """
    height, width = _largest_crop(image, size)
    slack = image.height - height, image.width - width
    top, left = (int(rng.integers(3 * s // 8, max(3 * s // 8 + 1, 5 * s // 8))) for s in slack)
    image = _crop(image, top, left, (height, width))
    tall = int(rng.integers(size[0], max(size[0], min(height, size[0] * 9 // 8)) + 1))
    return _random_crop(_resize(image, (tall, round(tall * size[1] / size[0]))), size, rng)


def squash(image: "Image.Image", size: Size, rng: np.random.Generator | None = None) -> "Image.Image":
    """Text-to-image evaluation: resize to `size`, ignoring the aspect."""
    del rng
    return _resize(image, size)


def random_shift(image: "Image.Image", size: Size, rng: np.random.Generator) -> "Image.Image":
    """Small images that fill their frame: resize to cover `size`, pad each side by 1/16 of it, then a random crop.

    The padding repeats the outermost pixels, so that an image moves by up to 1/16 of its side and loses little.
    """
    from PIL import Image

    covering = np.asarray(_resize_to_cover(image, size, rng))
    margins = [(s // 16, s // 16) for s in size] + [(0, 0)] * (covering.ndim - 2)
    return _random_crop(Image.fromarray(np.pad(covering, margins, mode="edge")), size, rng)


def _largest_crop(image: "Image.Image", size: Size) -> Size:
    """Largest (height, width) within the image that has the aspect of `size`."""
    height, width = size
    if image.width * height <= image.height * width:
        return max(1, round(image.width * height / width)), image.width
    return image.height, max(1, round(image.height * width / height))


TRANSFORMS: dict[str, Callable] = {
    f.__name__: f
    for f in (resize_random_crop, resize_center_crop, random_resized_crop, random_shift, jittered_crop, squash)
}
DETERMINISTIC = ("resize_center_crop", "squash")


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """A named transform, a random flip, and the scaling to [-1, 1] where floats are wanted.

    Attributes:
      name: a key of `TRANSFORMS`; without a random generator one of `DETERMINISTIC`.
      size: (height, width) of the result.
      flip_probability: of mirroring left to right, in [0, 1]; without a generator nothing is mirrored.
      as_bytes: the result is uint8, else float32.
    """

    name: str
    size: Size
    flip_probability: float = 0.0
    as_bytes: bool = False

    def __call__(self, pixels_HWC: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 (H,W,C) with C 1 or 3 -> (*size,C), float32 in [-1, 1] or uint8."""
        from PIL import Image

        image = Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC)
        result = np.asarray(TRANSFORMS[self.name](image, self.size, rng))
        if rng is not None and rng.random() < self.flip_probability:
            result = result[:, ::-1]
        result = result.reshape(*self.size, pixels_HWC.shape[-1])
        return result if self.as_bytes else scale(result)


def scale(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 in [-1, 1], floats as they are; `devices.sharding.scale` does the same on a device."""
    return images.astype(np.float32) / 127.5 - 1.0 if images.dtype == np.uint8 else images

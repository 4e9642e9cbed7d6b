"""From the bytes of an image file to pixels: the one decoder of the house.

Only the decoders that are named here run, whatever a file contains and whatever its name says: Pillow's list has some
that start other programs. An image whose pixels can be read is read, whatever stands beside them in the file.
"""

import contextlib
import functools
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 2**27  # of an image; the largest cameras reach 102 million without stitching
MAX_BYTES = 2**30  # of its file: MAX_PIXELS uncompressed, with 16 bits and transparency

_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm",
)  # fmt: skip
_OPTIONAL_SUFFIXES = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k")}  # by the feature of Pillow that they need
_STRIP_PIXELS = 2**22  # converted at a time, which bounds the copies of a large image
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_SIDE_DATA = {0xE0 + n for n in range(2, 16) if n != 14} | {0xFE}  # without JFIF (0), Exif (1) and Adobe's (14)
_JPEG_COLOURS = {0xE0: 16, 0xEE: 14}  # JFIF and Adobe's tell the colour space, if they are at least this long


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Suffixes of image files that can be read here, in small letters."""
    from PIL import features

    return _SUFFIXES + tuple(s for name, more in _OPTIONAL_SUFFIXES.items() if features.check(name) for s in more)


def is_regular(path: str | os.PathLike) -> bool:
    """Whether a path leads to an ordinary file, which can be opened without waiting for anybody."""
    return stat.S_ISREG(os.stat(path).st_mode)


def read_file(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """Content of a file of at most `limit` bytes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is a pipe, a device, a socket or a folder, which is not opened, or it is larger.
    """
    if not is_regular(path):
        raise ValueError("not a regular file")
    if (size := os.path.getsize(path)) > limit:
        raise ValueError(f"{size} bytes are more than the {limit} that such a file may have")
    with open(path, "rb") as file:
        return file.read()


def read_image(path: str | os.PathLike, channels: int | None = None) -> np.ndarray:
    """Decode an image file, see `decode_image`.

    Raises:
      ValueError: the file is no image, or a damaged one.
    """
    try:
        return decode_image(read_file(path), channels)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is no readable image ({error}); remove or replace it") from None


def image_shape(path: str | os.PathLike) -> tuple[int, int, int]:
    """(H, W, C) of the image that `read_image` makes of a file, from its header where that is enough.

    Raises:
      ValueError: as `read_image`.
    """
    from PIL import Image

    with contextlib.suppress(Exception):  # decoders raise nearly any type for damaged bytes
        if is_regular(path):
            with Image.open(path, formats=FORMATS) as image:
                if image.mode in ("L", "RGB", "RGBA", "P") and not image.getexif():  # which may turn it
                    return image.height, image.width, 1 if image.mode == "L" else 3
    return read_image(path).shape


def decode_image(encoded: bytes, channels: int | None = None) -> np.ndarray:
    """Decode an image: upright, on white where transparent, 16 bits reduced to 8; of several frames the first.

    Args:
      encoded: content of a file in one of `FORMATS`.
      channels: 1 for grey, 3 for RGB; None for what the file holds.

    Returns:
      uint8 (H,W,channels).

    Raises:
      ValueError: the bytes are not a whole image, or one of more than `MAX_PIXELS`.
    """
    try:
        # Differs from kakaobrain/rq-vae-transformer, whose loader ignores the EXIF orientation.
        image = _upright(_load(encoded))
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers")
        if channels is None:
            channels = 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3
        return _pixels(image, channels)
    except Exception as error:  # decoders raise nearly any type for damaged bytes
        raise ValueError(f"cannot decode: {error}") from error


def _load(encoded: bytes) -> "Image.Image":
    try:
        return _load_as_is(encoded)
    except Exception:
        bare = _without_side_data(encoded)
        if bare is None:
            raise
        return _load_as_is(bare)


def _load_as_is(encoded: bytes) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image of the formats {', '.join(FORMATS)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    image.load()
    return image


def _upright(image: "Image.Image") -> "Image.Image":
    """The image turned as its EXIF says; one whose EXIF cannot be read stays as it is."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as the decoders', of nearly any type
        return image
    return image if turn is None else image.transpose(turn)


def _pixels(image: "Image.Image", channels: int) -> np.ndarray:
    """uint8 (H,W,channels) of a loaded image."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _strip_pixels(image, channels)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _strip_pixels(strip, channels)
    return pixels


def _strip_pixels(image: "Image.Image", channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them to 8
        image = Image.fromarray((np.clip(np.asarray(image, np.int64), 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "RGB" if channels == 3 else "L"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def _without_side_data(encoded: bytes) -> bytes | None:
    """A PNG or JPEG without the texts, profiles and thumbnails in it; None for other files, or if there are none."""
    try:
        if encoded.startswith(_PNG):
            bare = _PNG + b"".join(_needed_chunks(encoded))
        elif encoded.startswith(b"\xff\xd8"):
            bare = b"\xff\xd8" + b"".join(_needed_segments(encoded))
        else:
            return None
    except (struct.error, IndexError):
        return None
    return bare if len(bare) < len(encoded) else None


def _needed_chunks(encoded: bytes) -> Iterator[bytes]:
    position = len(_PNG)
    while position < len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, position)
        end = position + length + 12
        body, checksum = encoded[position + 4 : end - 4], encoded[end - 4 : end]
        # An orientation is worth keeping where it is whole.
        if kind in _PNG_NEEDED or (kind == b"eXIf" and struct.pack(">I", zlib.crc32(body)) == checksum):
            yield encoded[position:end]
        position = end


def _needed_segments(encoded: bytes) -> Iterator[bytes]:
    position = 2
    while (marker := encoded[position + 1]) != 0xDA:  # start of scan: the rest are pixels
        (length,) = struct.unpack_from(">H", encoded, position + 2)
        if marker not in _JPEG_SIDE_DATA and not (marker in _JPEG_COLOURS and length < _JPEG_COLOURS[marker]):
            yield encoded[position : position + 2 + length]
        position += 2 + length
    yield encoded[position:]

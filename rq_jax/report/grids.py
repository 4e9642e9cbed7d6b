"""Image grids with labels and captions, as uint8 HWC arrays with one (grey) or three channels, and PNG files."""

import io
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rq_jax.files import write_atomic

WHITE = 255
CAPTION_LINES = 3


def to_uint8(images: Any) -> np.ndarray:
    """Convert model images to uint8.

    Args:
      images: floats in [-1, 1] of any shape, clipped, NaN as black; uint8 is returned as it is.

    Returns:
      uint8 in [0, 255], same shape.

    Raises:
      ValueError: other integers, whose range is unknown.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind in "iub":
        raise ValueError(f"images: dtype {images.dtype} is not allowed; give floats in [-1, 1] or uint8")
    unit = np.clip(0.5 * images.astype(np.float32) + 0.5, 0.0, 1.0)
    return np.rint(np.nan_to_num(255.0 * unit)).astype(np.uint8)


def grid(images: Any, columns: int, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Lay images out in rows, on white.

    Args:
      images: (B, H, W, C), uint8 or floats in [-1, 1]; C is 1 or 3.
      columns: images in a row; the last row is filled with white.
      padding: white pixels between the images and around them.
      scale: integer factor of enlargement, nearest neighbour.

    Returns:
      uint8 HWC with the images' number of channels.

    Raises:
      ValueError: no image, a shape other than (B, H, W, 1 or 3), or columns or scale below 1.
    """
    cells = _cells(images, "images", scale)
    if columns < 1:
        raise ValueError(f"columns: {columns} must be at least 1")
    B, H, W, C = cells.shape
    rows, columns = -(-B // columns), min(columns, B)
    sheet = np.full((padding + rows * (H + padding), padding + columns * (W + padding), C), WHITE, np.uint8)
    for index, cell in enumerate(cells):
        top, left = padding + (index // columns) * (H + padding), padding + (index % columns) * (W + padding)
        sheet[top : top + H, left : left + W] = cell
    return sheet


def labelled_grid(
    rows: Mapping[str, Any],
    scale: int = 1,
    padding: int = 2,
    captions: Mapping[str, Sequence[str]] | None = None,
    lines: int = CAPTION_LINES,
) -> np.ndarray:
    """Lay out one row of images per label, the label at the left, such as reconstructions by code depth.

    Args:
      rows: label -> images (B, H, W, C), uint8 or floats in [-1, 1]; only B may differ from row to row.
      scale: integer factor of enlargement, nearest neighbour.
      padding: white pixels between the images and around them.
      captions: label -> captions below the images of that row, one per image; other rows have none.
      lines: of a caption; a longer one ends in "...".

    Returns:
      uint8 HWC, three channels.

    Raises:
      ValueError: no rows, not one caption per image, images of different sizes, or images that `grid` does not take.
    """
    from PIL import Image, ImageDraw

    if not rows:
        raise ValueError("rows: empty; give at least one label with its images")
    cells = {label: _cells(images, f"images of row {label!r}", scale) for label, images in rows.items()}
    sizes = {label: images.shape[1:3] for label, images in cells.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"rows: images have several sizes {sizes}; give one height and width")
    H = next(iter(sizes.values()))[0]
    font = _font(H)
    for label, texts in (captions or {}).items():
        cells[label] = _captioned(_rgb(cells[label]), texts, font, padding, lines)
    strips = {label: _rgb(grid(images, len(images), padding)) for label, images in cells.items()}
    boxes = {label: _text_size(label, font) for label in rows}
    label_width = max(width for width, _ in boxes.values()) + 2 * padding
    heights = [max(strips[label].shape[0], boxes[label][1] + padding) for label in rows]
    width = label_width + max(strip.shape[1] for strip in strips.values())
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for label, height, top in zip(rows, heights, itertools.accumulate(heights, initial=0), strict=False):
        strip = Image.fromarray(strips[label])
        draw.text((padding, top + height // 2), label, "black", font, anchor="lm")
        sheet.paste(strip, (label_width, top + (height - strip.height) // 2))
    return np.asarray(sheet)


def captioned_grid(
    images: Any,
    captions: Sequence[str],
    columns: int,
    scale: int = 1,
    padding: int = 4,
    lines: int = CAPTION_LINES,
) -> np.ndarray:
    """Lay images out in rows, each with its caption below, wrapped to the image's width.

    Args:
      images: (B, H, W, C), uint8 or floats in [-1, 1]; C is 1 or 3.
      captions: one per image.
      columns: images in a row.
      scale: integer factor of enlargement, nearest neighbour.
      padding: white pixels between the images and around them.
      lines: of a caption, at most; a longer one ends in "...".

    Returns:
      uint8 HWC, three channels.

    Raises:
      ValueError: not one caption per image, or images that `grid` does not take.
    """
    cells = _rgb(_cells(images, "images", scale))
    return grid(_captioned(cells, captions, _font(cells.shape[1]), padding, lines), columns, padding)


def _captioned(
    cells: np.ndarray, captions: Sequence[str], font: Any, padding: int, lines: int = CAPTION_LINES
) -> np.ndarray:
    """Images (B, H, W, 3) with their captions below, all of one height."""
    from PIL import Image, ImageDraw

    B, H, W, _ = cells.shape
    if len(captions) != B:
        raise ValueError(f"captions: {len(captions)} for {B} images; give one per image")
    texts = [_wrap(caption, font, W, lines) for caption in captions]
    most = 1 + max(text.count("\n") for text in texts)
    text_height = _text_size("\n".join(["Ag"] * most), font)[1] + padding  # the same for every text
    captioned = np.full((B, H + text_height, W, 3), WHITE, np.uint8)
    for index, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        canvas = Image.fromarray(captioned[index])
        canvas.paste(Image.fromarray(cell), (0, 0))
        middle = (W // 2, H + padding // 2)
        ImageDraw.Draw(canvas).text(middle, text, "black", font, anchor="ma", align="center")
        captioned[index] = np.asarray(canvas)
    return captioned


def encode_png(array: Any) -> bytes:
    """Encode one image as PNG.

    Args:
      array: uint8 (H, W, C) with C 1 or 3.

    Returns:
      Content of a PNG file.

    Raises:
      ValueError: another dtype or shape.
    """
    from PIL import Image

    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"image: {array.dtype} {array.shape} is not allowed; give uint8 (H, W, 1 or 3)")
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, format="png")
    return buffer.getvalue()


def save_png(path: str | os.PathLike, array: Any) -> None:
    """Write one image as PNG, whole or not at all, creating its directory if missing.

    Args:
      path: file to write; an older one is replaced.
      array: uint8 (H, W, C) with C 1 or 3.

    Raises:
      ValueError: another dtype or shape.
    """
    write_atomic(path, encode_png(array))


def _cells(images: Any, name: str, scale: int) -> np.ndarray:
    """Check and enlarge images; returns uint8 (B, H, W, C)."""
    images = to_uint8(images)
    if images.ndim != 4 or 0 in images.shape or images.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: shape {images.shape} is not allowed; give (B, H, W, 1 or 3), none of them 0")
    if scale < 1:
        raise ValueError(f"scale: {scale} must be at least 1")
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _rgb(images: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _font(cell_height: int) -> Any:
    """Font for cells of this height, of a size between 10 and 20."""
    from PIL import ImageFont

    return ImageFont.load_default(min(max(cell_height // 6, 10), 20))


def _text_size(text: str, font: Any) -> tuple[int, int]:
    from PIL import Image, ImageDraw

    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return int(np.ceil(right)), int(np.ceil(bottom))


def _wrap(text: str, font: Any, width: int, max_lines: int = CAPTION_LINES) -> str:
    """Break a text at spaces and after hyphens, and inside a word only if the word alone is too wide."""
    lines = [""]
    for space, part in re.findall(r"(\s*)([^\s-]*-+|[^\s-]+)", text):
        joined = f"{lines[-1]}{' ' if space else ''}{part}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in part:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return "\n".join(lines)

"""The decoder: which formats run, what stands beside the pixels, and the ends of what is allowed."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from rq_jax.data import images
from rq_jax.data.images import decode_image, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def encode(pixels=PIXELS, kind="png", **options):
    out = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind, **options)
    return out.getvalue()


def chunk(kind, data, checksum=None):
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png_with(*chunks):
    png = encode()
    return png[:33] + b"".join(chunks) + png[33:]  # after the header


def jpeg_with(marker, data):
    jpeg = encode(kind="jpeg")
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


BROKEN_EXIF = b"Exif\0\0garbage!!"
SIDE_DATA = {
    "png: Exif": encode(exif=BROKEN_EXIF),
    "png: Exif's checksum": png_with(chunk(b"eXIf", b"II*\0", 3)),
    "png: text's checksum": png_with(chunk(b"tEXt", b"a\0b", 1)),
    "png: text that inflates": png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))),
    "png: profile of an unknown kind": png_with(chunk(b"iCCP", b"a\0\7garbage")),
    "png: short gamma": png_with(chunk(b"gAMA", b"")),
    "png: short animation": png_with(chunk(b"acTL", b"\0")),
    "jpeg: Exif": encode(kind="jpeg", exif=BROKEN_EXIF),
    "jpeg: profile": jpeg_with(0xE2, b"ICC_PROFILE\0\xff"),
    "jpeg: short JFIF": jpeg_with(0xE0, b"JFIF\0\1"),
    "jpeg: short Adobe": jpeg_with(0xEE, b"Adobe\0"),
    "webp: Exif": encode(kind="webp", lossless=True, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("what", SIDE_DATA)
@pytest.mark.fault("broken side data beside whole pixels", "the pixels are read")
def test_what_stands_beside_the_pixels_decides_nothing(what):
    expected = decode_image(encode(kind="jpeg"), 3) if what.startswith("jpeg") else PIXELS
    np.testing.assert_array_equal(decode_image(SIDE_DATA[what], 3), expected)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    encoded = encode(kind=kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded, 3), expected)


def test_an_orientation_outlives_a_broken_text():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    broken = encode(exif=exif)
    broken = broken[:33] + chunk(b"tEXt", b"a\0b", 1) + broken[33:]
    np.testing.assert_array_equal(decode_image(broken, 3), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("kind", ["sgi", "tga", "ico", "eps", "pcx"])
@pytest.mark.fault("other formats under the suffix of an image", "no decoder runs; passed over and counted")
def test_other_decoders_of_pillow_do_not_run(kind):
    with pytest.raises(ValueError, match="^cannot decode: no image of the formats PNG, JPEG, "):
        decode_image(encode(kind=kind), 3)


@pytest.mark.parametrize("kind", ["avif", "jpeg2000", "ppm", "bmp", "tiff", "gif"])
def test_formats_that_are_read(kind):
    pixels = np.full((16, 16, 3), 77, np.uint8)
    assert np.abs(decode_image(encode(pixels, kind), 3).astype(int) - 77).max() <= 2
    assert {".avif", ".jp2", ".jfif", ".jpe"} <= set(images.suffixes())


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS[..., 0], PIXELS[..., :1]),
        (PIXELS[..., 0].astype(np.uint16) << 8, PIXELS[..., :1]),
        (Image.fromarray(PIXELS[..., 0]).convert("LA"), PIXELS[..., :1]),
        (np.dstack([PIXELS, np.zeros((9, 7), np.uint8)]), np.full((9, 7, 3), 255)),
    ],
)
def test_as_many_channels_as_the_file_holds(image, expected):
    np.testing.assert_array_equal(decode_image(encode(image)), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_a_large_image_is_converted_in_strips(mode, monkeypatch):
    rgba = np.random.default_rng(1).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(rgba[..., 0].astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(rgba)
    encoded = encode(image if mode in ("I;16", "RGBA") else image.convert("RGB").convert(mode))
    whole = [decode_image(encoded, channels) for channels in (1, 3)]
    monkeypatch.setattr(images, "_STRIP_PIXELS", 4 * 7 + 3)
    for channels, expected in zip((1, 3), whole, strict=True):
        np.testing.assert_array_equal(decode_image(encoded, channels), expected)


def test_pixels_and_bytes_are_bounded(tmp_path, monkeypatch):
    assert 102e6 < images.MAX_PIXELS < 13_300**2
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"sparse.png' is no readable image \(1099511627776 bytes are more than"):
        read_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.fault("pipes, devices and sockets in the place of images", "not opened; passed over and counted")
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "a.png"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with pytest.raises(ValueError, match=r"a.png' is no readable image \(not a regular file\); remove or replace it$"):
        read_image(path)


def test_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"a.png' is no readable image \(cannot decode: .*\); remove or replace it$"):
        read_image(tmp_path / "a.png")

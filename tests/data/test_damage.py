"""Pictures that are odd or broken: read as they should be, or passed over and counted; the others stay in their order."""

import errno
import io

import numpy as np
import pytest
from PIL import Image

from rq_jax.data import images, make_dataset
from rq_jax.data.images import decode_image
from rq_jax.data.sources import ImageSource, open_records

COUNT, BAD = 12, 5  # pictures in a folder, and which of them a test replaces


def picture(i=0, size=(9, 7)):
    return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)


def encode(image, kind="png", **options):
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i in range(COUNT):
        (tmp_path / f"{i:02}.png").write_bytes(encode(picture(i)))
    return tmp_path


def batches(folder, count=6, **settings):
    settings = {"batch_size": 4, "image_size": 6, "train_transform": "resize_center_crop", **settings}
    iterator = make_dataset(
        split="all", train=True, name="folder", data_dir=folder, flip_probability=0.0, **settings
    ).iterator()
    return [next(iterator) for _ in range(count)]


# --- odd, but whole ---------------------------------------------------------------------------------------------------


def test_cmyk():
    image = Image.fromarray(picture()).convert("CMYK")
    found = decode_image(encode(image, "jpeg", quality=100), 3)
    expected = np.asarray(image.convert("RGB"), int)
    assert found.shape == (9, 7, 3) and np.abs(found.astype(int) - expected).mean() < 12


def test_alpha_over_white():
    rgba = np.concatenate([picture(), np.zeros((9, 7, 1), np.uint8)], axis=-1)
    rgba[3, 4, 3] = 255
    found = decode_image(encode(rgba), 3)
    np.testing.assert_array_equal(found[3, 4], picture()[3, 4])
    assert (np.delete(found.reshape(-1, 3), 3 * 7 + 4, axis=0) == 255).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_cut_to_eight(kind):
    values = np.array([[0, 255, 256, 40_000, 65_535]], np.uint16)
    found = decode_image(encode(Image.fromarray(values), kind), 1)
    np.testing.assert_array_equal(found[..., 0], values >> 8)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(values), kind), 3), np.repeat(found, 3, axis=-1))


def test_floating_point_is_refused():
    with pytest.raises(ValueError, match="^cannot decode: pixels are floating-point numbers$"):
        decode_image(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "tiff"), 3)


@pytest.mark.parametrize(
    "orientation, upright",
    [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_turned_photographs_are_upright(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encode(picture(), "png", exif=exif), 3), upright(picture()))


def test_one_pixel(folder):
    (folder / f"{BAD:02}.png").write_bytes(encode(np.full((1, 1, 3), 255, np.uint8)))
    found = {
        int(i): image for batch in batches(folder, 3) for i, image in zip(batch["index"], batch["image"], strict=True)
    }
    np.testing.assert_allclose(found[BAD], 1.0)


# --- broken -----------------------------------------------------------------------------------------------------------

BROKEN = {
    "zero bytes": b"",
    "truncated JPEG": encode(picture(size=(64, 64)), "jpeg")[:700],
    "truncated PNG": encode(picture(BAD))[:60],
    "text": b"<html>not found</html>",
}


@pytest.mark.fault("pictures of zero bytes, truncated, or no pictures", "passed over and counted; over the cap: stops")
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_passed_over(folder, kind):
    before = batches(folder)
    (folder / f"{BAD:02}.png").write_bytes(BROKEN[kind])
    after = batches(folder)
    for old, new in zip(before, after, strict=True):
        stands_in = old["index"] == BAD
        np.testing.assert_array_equal(new["index"], np.where(stands_in, BAD + 1, old["index"]))
        np.testing.assert_array_equal(new["image"][~stands_in], old["image"][~stands_in])
    assert sum((old["index"] == BAD).sum() for old in before) == 2
    with pytest.raises(
        ValueError, match=r"data.max_damaged: more than 0 images are damaged; .* the last is .*05.png: cannot decode"
    ):
        batches(folder, max_damaged=0)


@pytest.mark.fault("a decompression bomb", "passed over and counted")
def test_decompression_bomb(folder, monkeypatch):
    (folder / f"{BAD:02}.png").write_bytes(encode(np.zeros((300, 300, 3), np.uint8)))
    monkeypatch.setattr(images, "MAX_PIXELS", 89_999)
    source = ImageSource(open_records("folder", "all", folder))
    assert source[BAD]["index"] == BAD + 1 and source.damaged == {BAD}
    assert "300 x 300 pixels are more than 89999" in source._last_damage


@pytest.mark.fault("labels that are no class", "passed over and counted")
def test_a_label_that_is_no_class(folder):
    records = open_records("folder", "all", folder)
    records.class_names = ("a", "b")
    read = records.read
    records.read = lambda i: (read(i)[0], {BAD: 2, BAD + 1: -1}.get(i, i % 2), None)
    source = ImageSource(records)
    assert [source[i]["index"] for i in range(COUNT)] == [*range(BAD), BAD + 2, BAD + 2, *range(BAD + 2, COUNT)]
    assert source.damaged == {BAD, BAD + 1} and "label -1 is outside 0..1" in source._last_damage


@pytest.mark.fault("a missing file of a prepared data set", "passed over and counted; over the cap: stops")
def test_a_missing_file_of_a_prepared_set(folder, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from rq_jax.data import array_records, convert

    path = array_records.write(
        {"train": convert.FolderImages(folder, "all", False, False)}, "set", tmp_path, pictures_per_file=3
    )
    (path / "set-train.array_record-00002-of-00004").unlink()
    source = ImageSource(open_records("set", "train", tmp_path), max_damaged=3)
    assert [source[i]["index"] for i in range(COUNT)] == [0, 1, 2, 3, 4, 5, 9, 9, 9, 9, 10, 11]
    with pytest.raises(
        ValueError,
        match=r"^data.max_damaged: more than 2 images are damaged; .* the last is example 8 of set/1.0.0, split train: cannot read: .*set-train.array_record-00002-of-00004",
    ):
        source = ImageSource(open_records("set", "train", tmp_path), max_damaged=2)
        [source[i] for i in range(COUNT)]


@pytest.mark.fault("records that lack a feature", "passed over and counted")
def test_a_record_that_lacks_a_feature(folder, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    from rq_jax.data import array_records, convert

    array_records.write({"train": convert.FolderImages(folder, "all", False, False)}, "set", tmp_path)
    records = open_records("set", "train", tmp_path)
    whole = [records._data[i] for i in range(COUNT)]
    records._data, records.label_key, records.class_names = [{**each, "label": 0} for each in whole], "label", ("a",)
    del records._data[1]["image"]
    records._data[2]["label"] = []
    del records._data[3]["label"]
    source = ImageSource(records)
    assert [source[i]["index"] for i in range(5)] == [0, 4, 4, 4, 4] and source.damaged == {1, 2, 3}
    assert "the record does not match the features of the dataset: KeyError('label')" in source._last_damage


def test_too_many_open_files_are_no_damage(folder):
    records = open_records("folder", "all", folder)

    def read(index):
        raise OSError(errno.EMFILE, "Too many open files")

    records.read = read
    with pytest.raises(OSError, match="Too many open files"):
        ImageSource(records)[0]

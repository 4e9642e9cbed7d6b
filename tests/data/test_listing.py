"""What counts as an image, a class and a split in a folder, and what is told of the rest."""

import os

import pytest
from tfds_sets import encode, grey_images

from rq_jax.data import listing, make_dataset, notices
from rq_jax.data.listing import list_images
from rq_jax.data.sources import FolderRecords, ImageSource

PNG = encode(grey_images(1)[0])


@pytest.fixture(autouse=True)
def told(caplog):
    """Lines told in the test."""
    notices.tell.cache_clear()
    return caplog


def write(root, *paths, content=PNG):
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.mark.parametrize(
    "path",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/cat/a.png",
        "@eaDir/b.png/thumb.jpg",
        "cat/._a.png",
        "$RECYCLE.BIN/d.png",
        ".git/e.png",
        "cat/a.png~",
    ],
)
@pytest.mark.parametrize("base", ["", "train/"])
@pytest.mark.fault("files and folders that other programs leave behind", "no images and no classes; counted")
def test_what_other_programs_leave_behind_is_no_image(tmp_path, base, path, told):
    write(tmp_path, f"{base}cat/a.png", f"{base}dog/b.png", base + path)
    records = FolderRecords(tmp_path, "all", "folder", None)
    assert records.class_names == ("cat", "dog") and len(records) == 2
    assert "2 images; passed over: 1 hidden or left by other programs" in told.text


def test_what_is_passed_over_is_told_once_by_its_reason(tmp_path, told):
    write(tmp_path, "a.jfif", "b.PNG", "c.heic", "d.heic", "e.parquet", "f.zip", "noname", "Thumbs.db", "a.txt")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    for _ in range(2):
        records = FolderRecords(tmp_path, "all", None, None)
    assert [path.name for path in records.paths] == ["a.jfif", "b.PNG"]
    (line,) = told.messages
    for part in ("3 no regular file", "2 .heic", "1 .parquet", "1 .zip", "1 without a suffix", "1 hidden or left"):
        assert part in line
    assert "convert images to .png or .jpg" in line and "unpack archives" in line and "\n" not in line
    assert records.listing.captioned == {records.paths[0]}


@pytest.mark.fault("folders that link each other", "each read a bounded number of times")
def test_folders_that_link_each_other_take_bounded_time(tmp_path):
    for i in range(8):
        write(tmp_path, f"{i}/{i}.png")
        for j in range(8):
            (tmp_path / str(i) / f"to{j}").symlink_to(tmp_path / str(j))
    found = list_images(tmp_path)
    assert 8 < len(found.paths) <= 8 * listing._MAX_VISITS and found.passed_over[listing.LINKED]


@pytest.mark.parametrize(
    ("train", "validation"), [("train", "val"), ("training", "valid"), ("Train", "Validation"), ("train", "validation")]
)
def test_folders_of_splits_by_their_usual_names(tmp_path, train, validation, told):
    write(tmp_path, f"{train}/b/0.png", f"{train}/a/1.png", f"{validation}/b/2.png", "test/c/3.png", "sheets/x/4.png")
    opened = {split: FolderRecords(tmp_path, split, "folder", None) for split in ("train", "validation", "test", "val")}
    assert {split: len(records) for split, records in opened.items()} == dict(train=2, validation=1, test=1, val=1)
    assert all(records.class_names == ("a", "b", "c") for records in opened.values())  # none from beside the splits
    assert opened["train"].split_counts == {"train": 2, "validation": 1, "test": 1}
    assert "1 outside of the folders of splits" in told.text


@pytest.mark.parametrize("keys", [{"text_key": "txt"}, {"label_key": "folder"}])
@pytest.mark.fault("images without their caption or class", "passed over and counted")
def test_an_image_without_caption_or_class_counts_as_damaged(tmp_path, keys, told):
    write(tmp_path, *(f"c/{i}.png" for i in range(4)), "loose.png")
    write(tmp_path, *(f"c/{i}.txt" for i in range(4)), content=b"\xef\xbb\xbfwords\r\n")
    records = FolderRecords(tmp_path, "all", keys.get("label_key"), keys.get("text_key"))
    source = ImageSource(records)
    assert [source[i]["index"] for i in range(5)] == [0, 1, 2, 3, 0] and source.damaged == {4}
    assert source[0]["text"] == ("words" if "text_key" in keys else None)
    assert "1 of 5 images of split 'all' cannot be used, such as" in told.text and "loose.png: no c" in told.text
    with pytest.raises(ValueError, match=r"data.max_damaged: more than 0 images .* the last is .*loose.png: no c"):
        ImageSource(records, max_damaged=0)
    for file in tmp_path.glob("c/*"):
        file.rename(tmp_path / file.with_suffix(".jpg").name)
    with pytest.raises(
        FileNotFoundError, match=rf"^data.{next(iter(keys))}: .*; add what is missing, or leave it unset$"
    ):
        FolderRecords(tmp_path, "all", keys.get("label_key"), keys.get("text_key"))


@pytest.mark.parametrize("content", [
    "\ufeffcats/é.png\r\nb.png\r\n".encode(),
    "cats\\é.png\nb.png".encode("utf-16"),
    "./cats/e\u0301.png\nb.png\n".encode(),
    None,  # absolute
])  # fmt: skip
def test_lists_of_names_as_other_systems_write_them(tmp_path, tmp_path_factory, content):
    write(tmp_path, "cats/é.png", "cats/b.png")
    names = tmp_path_factory.mktemp("lists") / "names.txt"
    names.write_bytes(content or f"{tmp_path}/cats/é.png\n{tmp_path}/cats/b.png".encode())
    records = FolderRecords(tmp_path, str(names), None, None)
    assert [path.as_posix() for path in records.paths] == ["cats/é.png", "cats/b.png"]


@pytest.mark.parametrize("count", [1, 3])
def test_few_images(tmp_path, count):
    write(tmp_path, *(f"only/{i}.png" for i in range(count)))
    settings = dict(name="folder", data_dir=tmp_path, batch_size=4, image_size=8, label_key="folder")
    empty = next(
        split
        for split in ("validation", "train")
        if split not in FolderRecords(tmp_path, "all", None, None).split_counts
    )
    with pytest.raises(
        FileNotFoundError, match=rf"^split: '{empty}' of '.*' is empty; .* set data.{empty}_split=all to "
    ):
        make_dataset(split=empty, train=empty == "train", **settings)
    settings |= {f"{empty}_split": "all"}
    dataset = make_dataset(split=empty, train=empty == "train", **settings)
    iterator = dataset.iterator()
    batch = next(iterator)
    iterator.close()
    assert dataset.class_names == ("only",) and batch["image"].shape == (4, 8, 8, 3)

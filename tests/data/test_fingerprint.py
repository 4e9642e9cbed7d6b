"""The fingerprint of a data set: every change that decides what a run computes is named, and nothing else is."""

import logging
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("grain")
tfds = pytest.importorskip("tensorflow_datasets")

from tfds_sets import encode, grey_images, write_tfds  # noqa: E402

from rq_jax import data  # noqa: E402
from rq_jax.data import fingerprint  # noqa: E402
from rq_jax.data.sources import open_records  # noqa: E402

SETTINGS = {
    "name": "folder", "label_key": "folder", "text_key": None, "image_size": (8, 8), "flip_probability": 0.5,
    "train_split": "train", "data_dir": "anywhere", "num_threads": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Six images of two classes, and captions."""
    for i, pixels in enumerate(grey_images(6)):
        for split in ("train", "validation"):
            file = tmp_path / "images" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(pixels))
            file.with_suffix(".txt").write_text(f"image {i}")
    return tmp_path / "images"


def splits(folder, **settings):
    settings = {"label_key": "folder", **settings}
    return data.open_splits(name="folder", data_dir=folder, batch_size=2, image_size=8, **settings)


def bind(run, folder, is_fresh=False, settings=SETTINGS, **opened):
    run.mkdir(exist_ok=True)
    data.bind_data(run, splits(folder, **opened), settings, is_fresh)


def captioned(folder):
    return {
        **SETTINGS,
        "label_key": None,
        "text_key": "txt",
        "text_length": 3,
        "text_tokenizer": str(folder / "bpe.json"),
    }


def rename_class(folder):
    for split in ("train", "validation"):
        (folder / split / "dog").rename(folder / split / "hound")


def swap(folder):
    """Other images under the same names."""
    files = [folder / "train" / "cat" / f"{i}.png" for i in (0, 2)]
    files[0].write_bytes(files[1].read_bytes() + b" ")


CHANGES = {
    "class": (rename_class, {}, r"train: class 1 is 'hound', and was 'dog'"),
    "no classes": (None, {"label_key": None}, "data.label_key is None, and was 'folder'"),
    "image": (swap, {}, "train: file sizes differ"),
    "name": (lambda folder: (folder / "validation/cat/0.png").rename(folder / "validation/cat/00.png"), {}, "validation: file names differ"),
    "number": (lambda folder: (folder / "validation/cat/0.png").unlink(), {}, "validation: number of examples is 5, and was 6"),
    "flips": (None, {"flip_probability": 0.0}, r"data.flip_probability is 0.0, and was 0.5"),
    "size": (None, {"image_size": (8, 4)}, r"data.image_size is '\[8, 4\]', and was '\[8, 8\]'"),
}  # fmt: skip


@pytest.mark.parametrize("change, settings, what", CHANGES.values(), ids=CHANGES)
@pytest.mark.fault("a run gone on with other classes, images, splits or transforms", "refused; the difference is named")
def test_a_run_is_bound_to_its_data(folder, tmp_path, change, settings, what):
    bind(tmp_path / "run", folder, is_fresh=True)
    bind(tmp_path / "run", folder)
    if change:
        change(folder)
    opened = {name: value for name, value in settings.items() if name == "label_key"}
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(ValueError) as error:
            bind(tmp_path / "run", folder, settings={**SETTINGS, **settings}, **opened)
        message = str(error.value).replace(str(tmp_path), "")
        way_out = "give that data or a new --workdir, or delete '/run/data.json' to go on with other data"
        assert re.fullmatch(rf"data: {what} when the run in '/run' was started; {way_out}", message)
    (tmp_path / "run" / "data.json").unlink()
    bind(tmp_path / "run", folder, settings={**SETTINGS, **settings}, **opened)


@pytest.mark.parametrize("change", ["text tokenizer", "caption"])
def test_captions_and_their_tokens_count(folder, change):
    (folder / "bpe.json").write_text("{}")
    settings = captioned(folder)
    records = open_records("folder", "train", folder, text_key="txt")
    dataset = SimpleNamespace(num_examples=6, class_names=None, source=SimpleNamespace(records=records))

    def entries():
        return {**fingerprint.of_settings(settings), **fingerprint.of_dataset(dataset)}

    before = entries()
    assert fingerprint.difference(before, entries()) is None
    if change == "caption":
        (folder / "train" / "cat" / "0.txt").write_text("another caption")
        assert fingerprint.difference(before, entries()) == "file sizes differ"
    else:
        (folder / "bpe.json").write_text("{ }")
        assert fingerprint.difference(before, entries()) == "data.text_tokenizer has other contents"


def test_a_copy_elsewhere_is_the_same_data(folder, tmp_path, caplog):
    """Other times are told: a copy has them, and so have other images of the same sizes."""
    bind(tmp_path / "run", folder, is_fresh=True)
    folder = folder.rename(tmp_path / "moved")
    os.utime(folder / "train" / "cat" / "0.png", (1, 1))
    bind(tmp_path / "run", folder, settings={**SETTINGS, "data_dir": str(folder), "num_threads": 7})
    assert caplog.messages == ["data: train: file times differ since the last start; names and sizes are the same"]


def test_a_run_directory_of_before_goes_on_and_says_so(folder, tmp_path, caplog):
    bind(tmp_path / "run", folder)
    assert caplog.messages == [
        f"'{tmp_path / 'run'}' has no data.json to compare its data with; going on with the data given"
    ]
    caplog.clear()
    bind(tmp_path / "run", folder)
    assert not caplog.messages


@pytest.mark.parametrize("content", ["[]", "{", '{"": 1, "train: ": [], "validation: ": {}}'])
def test_a_record_that_is_none_is_named(folder, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"data\.json' (holds a list|is not readable JSON|is no record of data; delete it)"
    ):
        bind(tmp_path / "run", folder)


def test_arrays_count_by_number_and_classes(tmp_path):
    images = np.zeros((6, 8, 8, 3), np.uint8)
    two, three = (data.from_arrays(images, images, np.arange(6) % n, np.arange(6) % n, batch_size=2) for n in (2, 3))
    data.bind_data(tmp_path, two, {}, True)
    data.bind_data(tmp_path, two, {}, False)
    with pytest.raises(ValueError, match="data: train: there are 3 classes, and were 2 when"):
        data.bind_data(tmp_path, three, {}, False)


def test_only_the_first_process_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint.jax, "process_index", lambda: 1)
    data.bind_data(tmp_path, None, {}, True)
    assert not any(tmp_path.iterdir())


def test_the_files_of_a_prepared_set_count(tmp_path):
    features = {"image": tfds.features.Image(shape=(None, None, 1))}
    rows = [{"image": encode(pixels)} for pixels in grey_images(4)]
    write_tfds("bare", features, {"train": rows}, tmp_path)
    records = open_records("bare", "train", tmp_path)
    assert records.files and all((records.root / name).is_file() for name in records.files)


def test_a_file_that_is_gone_counts_as_such(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    source = SimpleNamespace(records=SimpleNamespace(root=tmp_path, files=["a\udcff.png"]))
    dataset = SimpleNamespace(num_examples=1, class_names=None, source=source)
    before = fingerprint.of_dataset(dataset)
    (tmp_path / "a\udcff.png").write_bytes(b"")
    assert fingerprint.difference(before, fingerprint.of_dataset(dataset)) == "file sizes differ"

"""Sources: TFDS sets that this project did not write, folders, damaged pictures, and one-line errors."""

import json
import logging
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")

from tfds_sets import encode, grey_images, write_tfds  # noqa: E402

from rq_jax.data import make_dataset  # noqa: E402
from rq_jax.data.images import decode_image  # noqa: E402
from rq_jax.data.sources import ImageSource, examples, open_records  # noqa: E402
from rq_jax.data.sources.tfds import check_metadata  # noqa: E402


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """`greys`: other feature names, grey, labelled, captioned; `bare`: nothing but pictures, some damaged."""
    directory = tmp_path_factory.mktemp("tfds")
    pictures = [encode(pixels) for pixels in grey_images(12)]
    features = {
        "picture": tfds.features.Image(shape=(None, None, 1)),
        "kind": tfds.features.ClassLabel(names=["a", "b", "c"]),
        "said": tfds.features.Text(),
    }
    rows = [{"picture": picture, "kind": i % 3, "said": f"row {i}"} for i, picture in enumerate(pictures)]
    write_tfds("greys", features, {"train": rows[:9], "test": rows[9:]}, directory)
    damaged = [{"image": picture[:40] if i in (2, 3) else picture} for i, picture in enumerate(pictures[:7])]
    write_tfds("bare", {"image": tfds.features.Image(shape=(None, None, 1))}, {"train": damaged}, directory)
    write_tfds("words", {"said": tfds.features.Text()}, {"train": [{"said": "no picture"}]}, directory)
    return directory


@pytest.fixture
def folder(tmp_path):
    """Twelve grey pictures in classes `cats` and `dogs`, each with a caption."""
    for i, pixels in enumerate(grey_images(12)):
        file = tmp_path / ("cats", "dogs")[i % 2] / "deeper" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(pixels))
        file.with_suffix(".txt").write_text(f"picture {i}\n")
    return tmp_path


def test_foreign_tfds_set(tfds_dir):
    records = open_records("greys", "train", tfds_dir, label_key="kind", text_key="said")
    assert len(records) == 9 and records.class_names == ("a", "b", "c")
    source = ImageSource(records, channels=1)
    for i in (0, 4, 8):
        example = source[i]
        np.testing.assert_array_equal(example["image"][..., 0], grey_images(12)[i])
        assert (example["label"], example["text"], example["index"]) == (i % 3, f"row {i}", i)


def test_the_first_of_several_captions(tmp_path):
    """Captions as in COCO: a list of records inside of each example."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "image/name": tfds.features.Text(),
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }
    captions = [["one", "two"], ["three"], []]
    rows = [
        {
            "image": encode(pixels), "image/name": f"{i}.png",
            "captions": [{"id": j, "text": text} for j, text in enumerate(captions[i])],
        }
        for i, pixels in enumerate(grey_images(3))
    ]  # fmt: skip
    write_tfds("captioned", features, {"train": rows}, tmp_path)
    records = open_records("captioned", "train", tmp_path, text_key="captions/text")
    assert [records.read(i)[2] for i in range(2)] == ["one", "three"]
    with pytest.raises(ValueError, match="no text in 'captions/text'"):
        records.read(2)
    assert ImageSource(records)[2]["text"] == "one"  # the next whole one stands in
    assert open_records("captioned", "train", tmp_path, text_key="image/name").read(2)[2] == "2.png"
    with pytest.raises(ValueError, match="data.text_key: 'text' is unknown in .*; allowed are .*captions/text"):
        open_records("captioned", "train", tmp_path, text_key="text")


def test_grey_becomes_rgb_unless_one_channel_is_asked_for(tfds_dir):
    records = open_records("greys", "test", tfds_dir)
    grey, rgb = ImageSource(records, channels=1)[1], ImageSource(records, channels=3)[1]
    assert grey["image"].shape == (9, 7, 1)
    np.testing.assert_array_equal(rgb["image"], np.repeat(grey["image"], 3, axis=-1))
    assert grey["label"] is None and grey["text"] is None


@pytest.mark.parametrize("split, count", [("train[:4]", 4), ("train+test", 12), ("test", 3)])
def test_tfds_split_syntax(tfds_dir, split, count):
    assert len(open_records("greys", split, tfds_dir)) == count


def test_tfds_set_without_labels_makes_batches(tfds_dir):
    dataset = make_dataset(
        split="train", train=True, name="bare", data_dir=tfds_dir, batch_size=3, image_size=5, channels=1
    )
    batch = next(dataset.iterator())
    assert {key: array.shape for key, array in batch.items()} == {"image": (3, 5, 5, 1), "index": (3,)}
    assert dataset.num_classes is None and dataset.vocab_size is None


def test_tensorflow_is_never_imported(tfds_dir):
    open_records("greys", "train", tfds_dir)
    assert not {"tensorflow", "torch"} & set(sys.modules)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("nope", "train"),
            "data.name: 'nope' is unknown; allowed are twemoji, avatars, folder, parquet, webdataset and the datasets prepared in data_dir=",
        ),
        (("not a name", "train"), "data.name: 'not a name' is unknown"),
        (("greys:9.9.9", "train"), "data.name: 'greys:9.9.9' is unknown"),
        (("mnist", "train"), "data.name: 'mnist' is not prepared in data_dir="),
        (("greys", "val"), "split: 'val' is unknown in dataset 'greys/1.2.3'; allowed are train, test"),
        (("words", "train"), "data.name: dataset 'words/1.2.3' has no Image feature; its features are said"),
    ],
)
def test_tfds_errors(tfds_dir, arguments, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        open_records(*arguments, tfds_dir)
    assert "\n" not in str(caught.value)


def test_tfds_unknown_keys(tfds_dir):
    with pytest.raises(
        ValueError, match="data.label_key: 'said' is unknown in dataset 'greys/1.2.3'; allowed are kind"
    ):
        open_records("greys", "train", tfds_dir, label_key="said")
    with pytest.raises(
        ValueError, match=r"data.text_key: 'said' is unknown in dataset 'bare/1.2.3'; allowed are \(none\)"
    ):
        open_records("bare", "train", tfds_dir, text_key="said")


def test_tfds_set_in_another_format(tfds_dir, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(tfds.core.DatasetBuilder, "as_data_source", refuse)
    with pytest.raises(
        ValueError, match="'greys/1.2.3' is stored as neither array_record nor tfrecord, so it has no random access"
    ):
        open_records("greys", "train", tfds_dir)


def test_folder_with_labels_and_captions(folder):
    records = open_records("folder", "all", folder, label_key="folder", text_key="txt")
    assert len(records) == 12 and records.class_names == ("cats", "dogs")
    source = ImageSource(records, channels=1)
    numbers = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]  # sorted paths: cats first
    for index, number in enumerate(numbers):
        example = source[index]
        np.testing.assert_array_equal(example["image"][..., 0], grey_images(12)[number])
        assert (example["label"], example["text"]) == (number % 2, f"picture {number}")


def test_folder_is_split_by_a_hash_of_the_path(tmp_path):
    for i in range(150):
        (tmp_path / f"{i}.png").write_bytes(encode(grey_images(1)[0]))
    train, validation = (open_records("folder", split, tmp_path) for split in ("train", "validation"))
    located = [{records.locate(i) for i in range(len(records))} for records in (train, validation)]
    assert not located[0] & located[1] and len(located[0] | located[1]) == 150
    assert 5 <= len(validation) <= 28
    (tmp_path / "new.png").write_bytes(encode(grey_images(1)[0]))
    again = open_records("folder", "validation", tmp_path)
    new = {again.locate(i) for i in range(len(again))} - {str(tmp_path / "new.png")}
    assert new == located[1]  # a new picture moves no other


def test_folder_with_split_subfolders_shares_class_numbers(tmp_path):
    for path in ("train/b/0.png", "train/c/1.png", "validation/a/2.png", "validation/c/3.png"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(grey_images(1)[0]))
    train, validation = (
        open_records("folder", split, tmp_path, label_key="folder") for split in ("train", "validation")
    )
    assert train.class_names == validation.class_names == ("a", "b", "c")
    assert [train.read(i)[1] for i in range(2)] == [1, 2]
    assert [validation.read(i)[1] for i in range(2)] == [0, 2]


def test_folder_is_split_by_lists_of_names(folder, tmp_path_factory):
    """As FFHQ's: in the order of the list, by path, or by a name that no other picture has."""
    lists = tmp_path_factory.mktemp("lists")
    (lists / "train.txt").write_text("cats/deeper/04.png\n02.png\n\n03.png\n")
    (lists / "validation.txt").write_text("dogs/deeper/01.png")
    splits = {"train_split": str(lists / "train.txt"), "validation_split": str(lists / "validation.txt")}

    def images(split):
        keys = {"label_key": "folder", "batch_size": 3, "image_size": 4, "channels": 1}
        dataset = make_dataset(split=split, train=False, name="folder", data_dir=folder, **splits, **keys)
        return dataset, next(dataset.iterator())

    dataset, batch = images("train")
    assert dataset.num_examples == 3 and dataset.class_names == ("cats", "dogs")
    np.testing.assert_array_equal(batch["cond"], [[0], [0], [1]])
    dataset, batch = images("validation")
    assert dataset.num_examples == 1 and batch["cond"][0] == 1


def test_lists_of_names_must_fit_the_folder(folder, tmp_path_factory):
    names = tmp_path_factory.mktemp("lists") / "names.txt"
    with pytest.raises(FileNotFoundError, match="split: '.*names.txt' is no file; give a .txt file"):
        open_records("folder", str(names), folder)
    names.write_text("00.png\n77.png\n")
    with pytest.raises(
        FileNotFoundError, match="split: '77.png' in '.*names.txt' names 0 of the 12 images below '.*', not one"
    ):
        open_records("folder", str(names), folder)
    (folder / "dogs" / "00.png").write_bytes(encode(grey_images(1)[0]))
    names.write_text("cats/deeper/00.png")
    assert len(open_records("folder", str(names), folder)) == 1
    names.write_text("00.png")
    with pytest.raises(
        FileNotFoundError,
        match="split: '00.png' in .* names 2 of the 13 images .*; list paths relative to that directory",
    ):
        open_records("folder", str(names), folder)


def test_links_that_lead_back_are_not_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "99.png").write_bytes(encode(grey_images(1)[0]))
    (folder / "cats" / "back").symlink_to(folder)
    (folder / "cats" / "on").symlink_to(elsewhere)
    assert len(open_records("folder", "all", folder)) == 13


def test_folder_errors(tmp_path, folder):
    with pytest.raises(ValueError, match="data.data_dir: unset, but data.name 'folder' needs"):
        open_records("folder", "train")
    with pytest.raises(FileNotFoundError, match="data.data_dir: '.*nowhere' is no directory"):
        open_records("folder", "train", tmp_path / "nowhere")
    with pytest.raises(
        ValueError,
        match="split: 'test' is unknown in a folder; allowed are train, validation, all, or a .txt file of names",
    ):
        open_records("folder", "test", folder)
    with pytest.raises(ValueError, match="data.label_key: 'breed' is unknown in dataset 'folder'; allowed are folder"):
        open_records("folder", "all", folder, label_key="breed")
    with pytest.raises(ValueError, match="data.text_key: 'caption' is unknown in dataset 'folder'; allowed are txt"):
        open_records("folder", "all", folder, text_key="caption")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="data.data_dir: '.*empty' holds no images; their names end in .png"):
        open_records("folder", "train", tmp_path / "empty")
    (folder / "loose.png").write_bytes(encode(grey_images(1)[0]))
    (folder / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="'.*' holds no images in the folders of its splits;"):
        open_records("folder", "train", folder)


def test_damaged_images_are_replaced_counted_and_named(tfds_dir, caplog):
    source = ImageSource(open_records("bare", "train", tfds_dir), channels=1)
    with caplog.at_level(logging.WARNING):
        indices = [source[i]["index"] for i in range(7)] + [source[i]["index"] for i in range(7)]
    assert indices == [0, 1, 4, 4, 4, 5, 6] * 2
    assert source.damaged == {2, 3}
    assert len(caplog.records) == 2 and "damaged image example 2 of bare/1.2.3, split train" in caplog.text


def test_too_many_damaged_images_stop_the_run(tfds_dir):
    source = ImageSource(open_records("bare", "train", tfds_dir), max_damaged=1)
    with pytest.raises(
        ValueError, match="data.max_damaged: more than 1 images are damaged; .* the last is example 3 of bare"
    ):
        [source[i] for i in range(7)]


def test_damage_stops_the_pipeline_too(tfds_dir):
    dataset = make_dataset(
        split="train", train=True, name="bare", data_dir=tfds_dir, batch_size=7, image_size=4, max_damaged=0
    )
    with pytest.raises(ValueError, match="data.max_damaged: more than 0 images"):
        next(dataset.iterator())


def test_unreadable_files_and_wholly_damaged_folders(folder):
    (folder / "cats" / "deeper" / "00.png").write_bytes(b"")
    records = open_records("folder", "all", folder)
    (folder / "cats" / "deeper" / "02.png").unlink()  # after listing
    source = ImageSource(records)
    assert source[0]["index"] == 2 and source.damaged == {0, 1}
    for file in folder.rglob("*.png"):
        file.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="data.name: all 11 images are damaged; the last is .*: cannot decode"):
        ImageSource(open_records("folder", "all", folder))[0]


def test_small_sets_are_decoded_once(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        examples,
        "decode_image",
        lambda encoded, channels: decoded.append(1) or decode_image(encoded, channels),
    )
    source = ImageSource(open_records("folder", "all", folder))
    first, second = source[3], source[3 + len(source)]
    np.testing.assert_array_equal(first["image"], second["image"])
    assert len(decoded) == 1
    assert not pickle.loads(pickle.dumps(source))._cache  # worker processes start empty
    monkeypatch.setattr(examples, "_CACHE_BYTES", 12 * 9 * 7 * 3 - 1)
    large = ImageSource(open_records("folder", "all", folder))
    large[3], large[3]
    assert len(decoded) == 3


def test_image_source_arguments(folder):
    records = open_records("folder", "all", folder)
    with pytest.raises(ValueError, match=r"data.channels: 4 is not allowed; give 1 \(grey\) or 3 \(RGB\)"):
        ImageSource(records, channels=4)

    class Nothing:
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="data.name: the split holds no examples"):
        ImageSource(Nothing())


def test_transparency_becomes_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    decoded = decode_image(encode(pixels), 3)
    assert decoded[0, 0].tolist() == [10, 20, 30] and (decoded[1] == 255).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("tensorflow_datasets.core.features.image_feature.Image", "evil.Image"),
         "names the feature class 'evil.Image', which is not one of TFDS's own and is not imported"),
        (lambda text: text.replace('"pythonClassName": "tensorflow', '"python_class_name": "evil.tensorflow', 1),
         "names the feature class 'evil.tensorflow_datasets"),
        (lambda text: json.dumps({"type": "evil.Image", "content": {}}), "names the feature class 'evil.Image'"),
        (lambda text: json.dumps({"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                                  "content": '{"image": {"type": "evil.Image", "content": {}}}'}),
         "names the feature class 'evil.Image'"),
        (lambda text: text[:-5], "features.json' is not readable JSON"),
        (lambda text: "[" * 100_000, "features.json' is not readable JSON: it is nested too deeply"),
        (lambda text: "[]", "features.json' holds a list, not a dict"),
        (lambda text: text.replace("featuresDict", "surprise"), "cannot be read: "),
        (lambda text: json.dumps({"pythonClassName": []}), "cannot be read: "),
    ],
)  # fmt: skip
@pytest.mark.fault("a prepared data set that names foreign code", "nothing is imported; one line, exit code 2")
def test_a_prepared_set_chooses_nothing_to_import(tfds_dir, tmp_path, monkeypatch, change, message):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(tfds_dir / "greys", tmp_path / "greys")
    file = tmp_path / "greys" / "1.2.3" / "features.json"
    file.write_text(change(file.read_text()))
    for name in ("greys", "Greys"):
        with pytest.raises(ValueError, match=rf"^data.name: .*{re.escape(message)}") as caught:
            open_records(name, "train", tmp_path)
        assert "\n" not in str(caught.value)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"splits": 3}', '{"surprise": 3}', '{"splits": [{"shardLengths": ["-5"]}]}']
)
@pytest.mark.fault("a prepared data set whose description is broken", "one line, exit code 2")
def test_a_prepared_set_whose_description_is_broken(tfds_dir, tmp_path, content):
    shutil.copytree(tfds_dir / "greys", tmp_path / "greys")
    (tmp_path / "greys" / "1.2.3" / "dataset_info.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match="greys|split: 'train'") as caught:
        open_records("greys", "train", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "greys-train.array_record-00000-of-00001"])
def test_a_pipe_in_a_prepared_set_is_not_waited_for(tfds_dir, tmp_path, name):
    shutil.copytree(tfds_dir / "greys", tmp_path / "greys")
    file = tmp_path / "greys" / "1.2.3" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"^data.name: '.*{name}' is no regular file$"):
        open_records("greys", "train", tmp_path)


def test_the_directory_of_a_prepared_set_is_checked_alone(tfds_dir, tmp_path):
    check_metadata(tfds_dir / "greys" / "1.2.3")
    (tmp_path / "features.json").write_text('{"pythonClassName": "evil.Image"}')
    with pytest.raises(ValueError, match="^data.name: '.*features.json' names the feature class 'evil.Image'"):
        check_metadata(tmp_path)

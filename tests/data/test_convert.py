"""Folders and LSUN's lmdb written as ArrayRecord: the same pictures, exactly once, also after an interruption."""

import shutil

import numpy as np
import pytest

tfds = pytest.importorskip("tensorflow_datasets")
import helpers  # noqa: E402

from rq_jax.data import array_records, convert, lmdb_files, make_dataset  # noqa: E402
from rq_jax.data.prepare import main  # noqa: E402
from rq_jax.data.sources import open_records  # noqa: E402
from rq_jax.files import RunLock  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return helpers.write_pictures(tmp_path / "pictures", num_train=11, num_validation=4)


def records_of(name, split, directory, **keys):
    records = open_records(name, split, directory, **keys)
    return [records.read(i) for i in range(len(records))]


def test_a_folder_becomes_a_prepared_set(folder, tmp_path, capsys):
    main(["folder", f"--source={folder}", "--name=pets", f"--data_dir={tmp_path / 'data'}", "--pictures_per_file=4"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "data" / "pets" / "1.0.0")
    for split, count in (("train", 11), ("validation", 4)):
        expected = records_of("folder", split, folder, label_key="folder", text_key="txt")
        assert records_of("pets", split, tmp_path / "data", label_key="label", text_key="caption") == expected
        assert len(expected) == count
    records = open_records("pets", "train[2:5]", tmp_path / "data", label_key="label")
    assert len(records) == 3 and records.class_names == helpers.CLASSES
    files = {path.name for path in (tmp_path / "data" / "pets" / "1.0.0").glob("*array_record*")}
    assert files == {
        *(f"pets-train.array_record-0000{i}-of-00003" for i in range(3)),
        "pets-validation.array_record-00000-of-00001",
    }
    batch = next(
        make_dataset(
            split="train", train=True, name="pets", data_dir=tmp_path / "data", batch_size=3, image_size=8
        ).iterator()
    )
    assert batch["image"].shape == (3, 8, 8, 3)


def test_a_folder_without_labels_and_captions(tmp_path):
    source = tmp_path / "flat"
    source.mkdir()
    for i, path in enumerate(sorted(helpers.write_pictures(tmp_path / "pictures").rglob("*.png"))):
        path.rename(source / f"{i}.png")
    path = array_records.write(convert.open_folder(source), "flat", tmp_path / "data")
    assert {name for name in tfds.builder_from_directory(path).info.features} == {"image"}
    for split in ("train", "validation"):
        assert records_of("flat", split, tmp_path / "data") == records_of("folder", split, source)


def test_labels_and_captions_without_held_out_images(folder, tmp_path):
    shutil.rmtree(folder / "validation")
    path = array_records.write(convert.open_folder(folder), "pets", tmp_path / "data")
    info = tfds.builder_from_directory(path).info
    assert set(info.features) == {"image", "label", "caption"} and set(info.splits) == {"train"}
    expected = records_of("folder", "train", folder, label_key="folder", text_key="txt")
    assert records_of("pets", "train", tmp_path / "data", label_key="label", text_key="caption") == expected


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [0, 3, 4, 9, 14])
def test_an_interrupted_call_goes_on(folder, tmp_path, after):
    whole = array_records.write(convert.open_folder(folder), "pets", tmp_path / "whole", pictures_per_file=4)

    class Failing:
        seen = []

        def __init__(self, pictures):
            self.pictures, self.class_names, self.has_text = pictures, pictures.class_names, pictures.has_text

        def __len__(self):
            return len(self.pictures)

        def read(self, start, stop):
            for picture in self.pictures.read(start, stop):
                if len(self.seen) == after:
                    raise Interrupted
                self.seen.append(picture)
                yield picture

    splits = {name: Failing(pictures) for name, pictures in convert.open_folder(folder).items()}
    with pytest.raises(Interrupted):
        array_records.write(splits, "pets", tmp_path / "data", pictures_per_file=4)
    with pytest.raises(FileNotFoundError, match="is not prepared|is unknown"):
        open_records("pets", "train", tmp_path / "data")
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data" / "pets" / "1.0.0").glob("pets-*")}
    path = array_records.write(convert.open_folder(folder), "pets", tmp_path / "data", pictures_per_file=4)
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in path.iterdir()) == names
    for name in names:
        if "array_record" in name:
            assert (path / name).read_bytes() == (whole / name).read_bytes()
            assert done.get(name, (path / name).stat().st_mtime_ns) == (path / name).stat().st_mtime_ns
    again = {file.name: file.stat().st_mtime_ns for file in path.glob("pets-*")}
    array_records.write(convert.open_folder(folder), "pets", tmp_path / "data", pictures_per_file=4)
    assert {file.name: file.stat().st_mtime_ns for file in path.glob("pets-*")} == again


def test_lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    pictures = {f"key{i:02d}".encode(): bytes([i]) * (50 + i) for i in np.random.default_rng(0).permutation(9)}
    for split, keys in (("train", sorted(pictures)[:7]), ("val", sorted(pictures)[7:])):
        directory = tmp_path / f"church_{split}_lmdb"
        with lmdb.open(str(directory), map_size=2**20) as file, file.begin(write=True) as transaction:
            for key in keys:
                transaction.put(key, pictures[key])
    main(
        [
            "lsun",
            f"--source={tmp_path / 'church'}",
            "--name=lsun/church",
            f"--data_dir={tmp_path}",
            "--pictures_per_file=3",
        ]
    )
    ours = [image for split in ("train", "validation") for image, _, _ in records_of("lsun/church", split, tmp_path)]
    assert ours == [pictures[key] for key in sorted(pictures)]
    only = convert.open_lsun(tmp_path / "church_val_lmdb")
    assert {split: len(found) for split, found in only.items()} == {"validation": 2}
    (tmp_path / "church_val_lmdb" / "data.mdb").unlink()
    with pytest.raises(
        FileNotFoundError, match="^--source: no data.mdb in '.*church_val_lmdb'; give what LSUN's archive unpacks to$"
    ):
        convert.open_lsun(tmp_path / "church_val_lmdb")


@pytest.mark.parametrize(
    "options, message",
    [
        (["folder", "--name=pets"], "--source: missing; 'folder' needs it"),
        (["folder", "--source=pictures"], "--name: missing; 'folder' needs it"),
        (["folder", "--source=nowhere", "--name=pets"], "data.data_dir: 'nowhere' is no directory"),
        (
            ["folder", "--source=pictures", "--name=My Pets"],
            "--name: 'My Pets' is no dataset name; use small letters",
        ),
        (["folder", "--source=pictures", "--name=a/b/c"], "--name: 'a/b/c' is no dataset name"),
        (
            ["folder", "--source=pictures", "--name=pets", "--pictures_per_file=0"],
            "--pictures_per_file: 0 must be at least 1",
        ),
        (
            ["lsun", "--source=nowhere/cat", "--name=cat"],
            "--source: neither 'nowhere/cat_train_lmdb' nor 'nowhere/cat_val_lmdb' is there",
        ),
        (["foldr", "--source=pictures", "--name=pets"], "data.name: 'foldr' is no bundled dataset"),
    ],
)
def test_refused(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main([*options, f"--data_dir={tmp_path / 'data'}"])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data").exists()


def test_a_source_that_changed_is_refused(folder, tmp_path):
    array_records.write(convert.open_folder(folder), "pets", tmp_path, pictures_per_file=4)
    path = min((folder / "train" / "ape").glob("*.png"))
    for suffix in (".png", ".txt"):
        path.with_suffix(suffix).rename(path.with_name(f"new{suffix}"))
    with pytest.raises(
        ValueError, match="^--source: its images differ from those with which '.*' was begun; delete that, or"
    ):
        array_records.write(convert.open_folder(folder), "pets", tmp_path, pictures_per_file=4)


def test_one_writer_at_a_time(folder, tmp_path):
    with (
        RunLock(tmp_path / "pets" / array_records.VERSION),
        pytest.raises(
            ValueError,
            match="^--name: '.*pets/1.0.0' is in use by process .*; wait for it, stop it, or give another --name$",
        ),
    ):
        array_records.write(convert.open_folder(folder), "pets", tmp_path)


def test_an_lmdb_that_is_none(tmp_path):
    pytest.importorskip("lmdb")
    (tmp_path / "a_train_lmdb").mkdir()
    (tmp_path / "a_train_lmdb" / "data.mdb").write_bytes(b"no lmdb" * 1000)
    with pytest.raises(ValueError, match="^--source: '.*a_train_lmdb' cannot be read as lmdb: "):
        convert.open_lsun(tmp_path / "a")


def test_files_of_another_plan_are_refused(folder, tmp_path):
    array_records.write(convert.open_folder(folder), "pets", tmp_path, pictures_per_file=4)
    with pytest.raises(
        ValueError, match="was begun with pictures_per_file 4, not 5; delete it, or choose another --name$"
    ):
        array_records.write(convert.open_folder(folder), "pets", tmp_path, pictures_per_file=5)


def test_what_lacks_its_label_or_caption_is_left_out_and_told(folder, tmp_path, capsys, caplog):
    (folder / "train" / "bee" / "001.txt").unlink()
    (folder / "train" / "ape" / "000.png").rename(folder / "train" / "loose.png")
    (folder / "test").mkdir()
    for suffix in (".png", ".txt"):
        (folder / "train" / "cat" / f"002{suffix}").rename(folder / "test" / f"0{suffix}")
    command = ["folder", f"--source={folder}", f"--data_dir={tmp_path}"]
    main([*command, "--name=pets"])
    info = tfds.builder_from_directory(tmp_path / "pets" / "1.0.0").info
    assert set(info.features) == {"image", "label", "caption"}
    assert {split: one.num_examples for split, one in info.splits.items()} == {"train": 8, "validation": 4}
    assert "2 of 10 images of split 'train' cannot be used, such as" in caplog.text
    assert "split 'test' is left out; data.label_key: 'folder': 1 of 1 images" in caplog.text
    with pytest.raises(SystemExit):
        main([*command, "--name=few", "--max_damaged=1"])
    assert "--max_damaged: 2 of 14 images lack a label or a caption, more than 1;" in capsys.readouterr().err
    main([*command, "--name=bare", "--max_damaged=0", "--without=labels", "--without=captions"])
    info = tfds.builder_from_directory(tmp_path / "bare" / "1.0.0").info
    assert set(info.features) == {"image"} and info.splits["test"].num_examples == 1
    assert "--source: captions are left out; 13 of 15 images have one" in caplog.text


@pytest.mark.parametrize("keep", [200, 4096, 8192, -4096, -1])
def test_a_truncated_lmdb_is_refused_before_it_is_mapped(tmp_path, keep):
    lmdb = pytest.importorskip("lmdb")
    directory = tmp_path / "a_train_lmdb"
    with lmdb.open(str(directory), map_size=2**20) as file, file.begin(write=True) as transaction:
        for i in range(9):
            transaction.put(b"%d" % i, bytes(5000))
    whole = (directory / "data.mdb").read_bytes()
    lmdb_files.check_size(directory / "data.mdb")
    (directory / "data.mdb").write_bytes(whole[:keep])
    refused = "^--source: '.*a_train_lmdb' cannot be read as lmdb: it (is truncated|does not)"
    with pytest.raises(ValueError, match=refused):
        convert.open_lsun(tmp_path / "a")
    (directory / "data.mdb").write_bytes(whole[:40] + bytes(4) + whole[44:])  # pages of no bytes
    with pytest.raises(ValueError, match=refused):
        convert.open_lsun(tmp_path / "a")

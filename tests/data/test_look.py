"""What `python -m rq_jax.data.look` says and shows."""

import numpy as np
import pytest
from PIL import Image

from rq_jax.data import look
from rq_jax.data.images import read_image

SIZES = [(20, 30), (40, 30), (30, 30), (30, 90), (30, 30), (30, 30)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    for i, size in enumerate(SIZES):
        file = root / "train" / ("ape", "bee\x1b[31m")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), 40 * i, np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"picture number {i}")
    (root / "train" / "ape" / "0.txt").unlink()
    (root / "train" / "ape" / "4.png").write_bytes(b"damaged")
    (root / "train" / "ape" / "5.heic").write_bytes(b"")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    return root


def test_what_would_be_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(look, "SHOWN_SIZE", 40)
    look.main([str(folder), f"--out={tmp_path / 'sheet.png'}"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for line in (
        f"data.name=folder data.data_dir={folder} data.label_key=folder or data.text_key=txt",
        "splits: train 6",
        "data.label_key: folder; allowed are folder",
        "classes: 2 (ape, bee\\x1b[31m)",
        "sizes of 4 images (height x width): 30 x 30 to 40 x 90, median 30 x 30; width / height 0.75 to 3.00",
        "captions of 3 to 3 words, such as 'picture number 2'",
        f"'{folder}': 6 images; passed over: 1 hidden or left by other programs, 1 .heic (convert images",
        "count as damaged: 1 (no caption, a .txt of the same name, is beside it)",
        f"damaged: {folder}/train/ape/4.png: cannot decode: no image of the formats",
    ):
        assert line in out
    sheet = read_image(tmp_path / "sheet.png")
    assert sheet.shape[2] == 3 and sheet.shape[1] == 4 + 4 * (40 + 4)


def test_the_first_split_that_there_is(folder, tmp_path, capsys):
    (folder / "train").rename(folder / "val")
    with pytest.raises(SystemExit):
        look.main([str(folder), "--split=train"])
    assert "split: 'train' of" in capsys.readouterr().err
    look.main([str(folder), f"--out={tmp_path / 'sheet.png'}", "--num_images=2"])
    assert "splits: validation 6" in capsys.readouterr().out
    (folder / "test").mkdir()
    (folder / "val" / "ape" / "2.png").rename(folder / "test" / "2.png")
    look.main([str(folder), f"--out={tmp_path / 'sheet.png'}", "--split=test"])
    assert "data.label_key: unset; allowed are folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["a.tar", "a.parquet", "logo.png"], "webdataset"),
        (["data/a.parquet", "README.md", "logo.png"], "parquet"),
        (["a.png", "b.png", "labels.parquet"], "folder"),
        (["a.heic"], "folder"),
    ],
)
def test_the_kind_of_a_folder(tmp_path, files, kind):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert look._kind_of(tmp_path) == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "data.name: 'nowhere' is unknown"),
        (["{folder}", "--num_images=0"], "--num_images: 0 must be at least 1"),
        (["{folder}", "--label_key=breed"], "data.label_key: 'breed' is unknown in dataset 'folder'"),
        (["folder"], "data.data_dir: unset"),
        (["{folder}", "--out={folder}/look.png"], "--out: '{folder}/look.png' would become one of the images"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        look.main([f"--out={tmp_path / 'sheet.png'}", *(option.format(folder=folder) for option in options)])
    assert caught.value.code == 2 and message.format(folder=folder) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "sheet.png").exists()

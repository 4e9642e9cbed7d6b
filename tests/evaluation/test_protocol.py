"""The images that figures are taken on."""

import pytest

from rq_jax.evaluation import protocol

FOLDER = {"name": "folder", "data_dir": "/a"}


@pytest.mark.parametrize(
    "trained, measured, expected",
    [
        ({**FOLDER, "train_split": "train", "eval_transform": "squash"}, FOLDER, None),
        ({"name": "folder", "data_dir": "~/x"}, {"name": "folder", "data_dir": "/home/me/x"}, None),
        ({"name": "folder", "data_dir": "x"}, {"name": "folder", "data_dir": "/srv/x"}, None),
        (None, FOLDER, None),
        ({"name": "twemoji", "data_dir": None}, FOLDER, "data.name 'twemoji'"),
        ({**FOLDER, "data_dir": "/b\nc"}, FOLDER, r"data.data_dir '/b\nc'"),
        ({**FOLDER, "train_split": "all"}, FOLDER, "data.train_split 'all'"),
    ],
)
def test_other_training_images_are_named(monkeypatch, tmp_path, trained, measured, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("os.getcwd", lambda: "/srv")
    assert protocol.trained_elsewhere({"data": trained}, {**measured, "image_size": [16, 16]}) == expected

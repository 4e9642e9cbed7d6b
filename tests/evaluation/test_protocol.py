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


@pytest.mark.parametrize(
    "name, data_dir, expected",
    [("folder", "/b", "/b"), ("folder", None, "/a"), ("twemoji", "/b", "/a"), (None, "/b", "/a")],
)
def test_a_data_set_may_have_moved(name, data_dir, expected):
    config = {"model": {}, "data": {**FOLDER, "label_key": "folder"}}
    assert protocol.moved(config, name, data_dir) == {**config, "data": {**config["data"], "data_dir": expected}}
    assert protocol.moved({"model": {}}, name, data_dir) == {"model": {}}

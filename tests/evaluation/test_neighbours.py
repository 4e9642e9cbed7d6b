"""Nearest training images, by features and by pixels, and the sheet that shows them."""

import helpers
import numpy as np
import pytest
from PIL import Image

from rq_jax.evaluation import neighbours
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.store import FeatureSet
from rq_jax.report import grids

DAMAGED = 2


@pytest.fixture
def folder(tmp_path):
    """(data, image files) of seven training images, the third of them damaged."""
    helpers.write_pictures(tmp_path, num_train=7, num_validation=1)
    paths = sorted((tmp_path / "train").rglob("*.png"))
    paths[DAMAGED].write_bytes(b"damaged")
    settings = {"name": "folder", "data_dir": str(tmp_path), "image_size": [16, 16], "channels": 3}
    return EvaluationData(settings, batch_size=3), paths


def read(path):
    return np.asarray(Image.open(path))


def test_pixel_distances_leave_damaged_images_out(folder):
    data, paths = folder
    images = np.stack([read(paths[5]), read(paths[1])])
    distances, positions = neighbours.pixel_distances(images, data.training())
    np.testing.assert_array_equal(positions, [0, 1, 3, 4, 5, 6])
    expected = [[np.mean((read(paths[i]) - image.astype(float)) ** 2) for i in positions] for image in images]
    np.testing.assert_allclose(distances, expected, rtol=1e-6)
    assert distances.shape == (2, 6) and distances[0, 4] == distances[1, 1] == 0


def test_the_sheet_shows_the_image_at_the_position(folder, monkeypatch):
    data, paths = folder
    seen = {}
    monkeypatch.setattr(grids, "labelled_grid", lambda rows, scale, captions: seen.update(rows, scale=scale))
    images = np.stack([read(paths[5]), read(paths[1])])
    distances, positions = neighbours.pixel_distances(images, data.training())
    order = np.argsort(distances)[:, :2]
    neighbours.draw_sheet(images, positions[order], data.training())
    np.testing.assert_array_equal(seen["sample"], images)
    np.testing.assert_array_equal(seen["nearest 1"], images)
    second = positions[np.argsort(distances)[:, 1]]
    np.testing.assert_array_equal(seen["nearest 2"], [read(paths[i]) for i in second])
    assert seen["scale"] == 4 and "nearest 3" not in seen


def test_the_sheet_names_the_classes_of_samples_and_neighbours(folder, monkeypatch):
    data, paths = folder
    seen = {}
    monkeypatch.setattr(grids, "labelled_grid", lambda rows, scale, captions: seen.update(captions))
    images = np.stack([read(paths[5]), read(paths[1])])
    neighbours.sample_sheet({"data": {**data.settings, "label_key": "folder"}}, images, ["ape", "fox"], 2)
    assert seen["sample"] == ["ape", "fox"]
    assert seen["nearest 1"] == [paths[5].parent.name, paths[1].parent.name] and len(seen["nearest 2"]) == 2
    seen.clear()
    neighbours.sample_sheet({"data": data.settings}, images, ["", ""], 2)
    assert seen == {}


def test_nearest_by_features(tmp_path):
    rng = np.random.default_rng(0)
    x_NA, y_MA = rng.normal(size=(30, 5)), rng.normal(size=(40, 5))
    positions = np.delete(np.arange(41), 7)  # one of them was damaged
    sets = FeatureSet((), (), x_NA[None], np.arange(30)), FeatureSet((), (), y_MA[None], positions)
    found = neighbours.find_nearest(*sets)
    distances = ((x_NA[:, None] - y_MA) ** 2).sum(-1)
    np.testing.assert_allclose(found.distances, np.sort(distances)[:, :3], rtol=1e-9)
    np.testing.assert_array_equal(found.positions, positions[np.argsort(distances)[:, :3]])
    assert found.median == found.quantiles["0.5"] == pytest.approx(np.median(distances.min(1)))
    assert found.quantiles["0.05"] < found.quantiles["0.95"]
    neighbours.draw_distances({"x": found, "again": found}, tmp_path / "distances.png")
    assert Image.open(tmp_path / "distances.png").width > 100

"""sample.py that chooses: the best of each class, whatever the batches; what is written; images drawn again by id."""

import json
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sample
from rq_jax.evaluation import choices, judges
from rq_jax.evaluation.image_sets import open_images


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pictures = helpers.write_pictures(root / "pictures")
    tokenizer = helpers.save_tokenizer(root / "tokenizer", pictures)
    return helpers.save_transformer(root / "class", pictures, tokenizer, "class")


def brightness(images, classes):
    """A score that depends on image and class."""
    return np.mean(np.asarray(images, np.float64), axis=(1, 2, 3)) * np.where(np.asarray(classes) == 4, -1, 1)


@pytest.fixture
def judge(monkeypatch):
    """Judges by brightness, of class 4 by darkness, in batches of three."""

    def classifier_judge(loaded, classes, file):
        program = jax.jit(
            lambda _, images, wanted: jnp.mean(images.astype(jnp.float32), (1, 2, 3)) * jnp.where(wanted == 4, -1, 1)
        )
        return judges.Judge("brightness", program, (), np.asarray(classes))

    monkeypatch.setattr(judges, "SCORED_PER_DEVICE", 3)
    monkeypatch.setattr(choices, "classifier_judge", classifier_judge)


def draw(trained, out, *flags, num=5, batch=8, first=3):
    common = [f"--checkpoint={trained}", f"--out={out}", f"--num_images={num}", f"--batch_size={batch}"]
    sample.run(sample.parse_args([*common, f"--first_index={first}", *flags]))
    with np.load(out / f"codes_{first:06d}.npz") as file:
        found = types.SimpleNamespace(**file)
    found.images = {int(path.stem): np.asarray(Image.open(path)) for path in (out / "images").iterdir()}
    found.settings = json.loads((out / f"settings_{first:06d}.json").read_text())
    return found


def test_the_best_of_each_class_are_kept_whatever_the_batches(trained, tmp_path, judge, capsys):
    classes, flags = "--classes=4,1", ("--keep=0.25", "--by=classifier")
    every = draw(trained, tmp_path / "every", classes, num=20)
    scores = brightness(np.stack([every.images[i] for i in every.image_ids]), every.cond[:, 0])
    best = {c: every.image_ids[every.cond[:, 0] == c][np.argsort(-scores[every.cond[:, 0] == c])] for c in (1, 4)}
    found = draw(trained, tmp_path / "eight", classes, *flags)
    assert "chosen by brightness: 5 of 20 images\n" in capsys.readouterr().out
    assert found.cond[:, 0].tolist() == [1, 4, 1, 4, 1]  # as without a choice
    assert found.image_ids.tolist() == [best[1][0], best[4][0], best[1][1], best[4][1], best[1][2]]
    rows = found.image_ids - 3
    np.testing.assert_array_equal(found.codes, every.codes[rows])
    np.testing.assert_allclose(found.scores, scores[rows], rtol=1e-5)
    assert found.images.keys() == set(found.image_ids.tolist())
    for i in found.images:
        assert np.abs(found.images[i].astype(int) - every.images[i]).max() <= 1
    expected = {"judge": "brightness", "drawn": 20, "kept": 5, "dropped": 15}
    means = {"drawn": pytest.approx(scores.mean(), rel=1e-4), "kept": pytest.approx(scores[rows].mean(), rel=1e-4)}
    assert found.settings["chosen"] == {**expected, "mean_score": means}
    three = draw(trained, tmp_path / "three", classes, *flags, batch=3)
    for name in ("image_ids", "cond", "codes", "scores"):
        np.testing.assert_array_equal(getattr(three, name), getattr(found, name))
    assert open_images(tmp_path / "three").num_images == 5  # evaluate.py takes them for one set
    last = int(found.image_ids[-1])
    again = draw(trained, tmp_path / "again", "--classes=1", num=1, first=last)  # by its id and class
    np.testing.assert_array_equal(again.codes, found.codes[-1:])


def test_candidates_are_of_the_classes_of_the_images(trained, tmp_path, judge):
    found = draw(trained, tmp_path / "out", "--candidates=4", "--by=classifier", num=3, first=6)
    assert found.cond[:, 0].tolist() == [1, 2, 3] and found.settings["chosen"]["drawn"] == 12
    assert [(i - 6) % 3 for i in found.image_ids.tolist()] == [0, 1, 2]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--keep=0", "--by=classifier"], r"^--keep: 0.0 is outside \(0, 1\]"),
        (["--keep=0.5", "--by=classifier", "--prefix=a.npz", "--prefix_positions=2"], "^--prefix: a.npz and --keep: 0.5 excl"),
        (["--candidates=1", "--by=classifier", "--classes=2"], "^--candidates: 1 must be at least 5; so many are kept of a"),
        (["--keep=0.5", "--by=classifier", "--judge=gone.pth"], "gone.pth"),
    ],
)  # fmt: skip
def test_bad_choices_are_refused_before_anything_is_drawn(trained, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        draw(trained, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()

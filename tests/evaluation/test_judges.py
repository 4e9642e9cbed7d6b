"""Judges of samples: a classifier fitted to class means, log-odds of the wanted class, whose classes are ImageNet's; CLIP."""

from types import SimpleNamespace

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.evaluation import judges
from rq_jax.pretrained import clip
from rq_jax.pretrained.classifier import Classifier

A, C = 6, len(helpers.CLASSES)


class Features(nn.Module):
    """Corners of the image, mixed."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (12, A))
        return nn.relu(x[:, :: x.shape[1] - 1, :: x.shape[2] - 1].reshape(-1, 12) @ kernel)


def make_net(num_classes=1000):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(12, A)).astype(np.float32)}
    classifier = {
        "kernel": rng.normal(size=(A, num_classes)).astype(np.float32),
        "bias": np.zeros(num_classes, np.float32),
    }
    return Classifier("toy", {"params": params, "classifier": classifier}, Features(), lambda images: images)


@pytest.fixture(autouse=True)
def net(monkeypatch):
    monkeypatch.setattr(judges.efficientnet_lite, "load", make_net)
    with helpers.quick_compilation(), helpers.one_device():
        yield make_net()


def loaded_model(num_classes=C, **config):
    model = SimpleNamespace(is_conditional=True, cond_length=1, cond_vocab_size=num_classes)
    return SimpleNamespace(model=model, config=config)


def as_bytes(count):
    return np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_a_fitted_classifier_is_that_of_class_means(net, tmp_path, monkeypatch):
    helpers.write_pictures(tmp_path, num_train=18)
    monkeypatch.setattr(judges, "_FITTED_PER_CLASS", 3)
    monkeypatch.setattr(judges, "SCORED_PER_DEVICE", 4)
    settings = {
        "name": "folder",
        "data_dir": str(tmp_path),
        "image_size": [16, 16],
        "channels": 3,
        "label_key": "folder",
    }
    model = loaded_model(data=settings, class_names=list(helpers.CLASSES))
    judge = judges.classifier_judge(model, [4, 0])
    assert judge.name == "toy, class means of training images" and judge.batch_size == 4
    batch = next(judges.EvaluationData(settings, batch_size=18).training().iterator())
    labels, found = batch["cond"][:, 0], np.asarray(net.features(net.variables, batch["image"] / 127.5 - 1), np.float64)
    kept = np.concatenate([np.flatnonzero(labels == c)[:3] for c in range(C)])
    means = np.stack([found[kept][labels[kept] == c].mean(0) for c in range(C)])
    variance = np.sum((found[kept] - means[labels[kept]]) ** 2, 0) / (len(kept) - C)
    images, groups = as_bytes(4), np.array([0, 1, 1, 0])
    features = np.asarray(net.features(net.variables, images / 127.5 - 1), np.float64)
    log = -0.5 * np.sum((features[:, None] - means) ** 2 / variance, -1)
    wanted = np.array([4, 0])[groups]
    odds = [
        row[c] - np.log(np.exp(np.delete(row, c) - row[c]).sum()) - row[c] for row, c in zip(log, wanted, strict=True)
    ]
    np.testing.assert_allclose(judge.start()(images, groups), odds, rtol=1e-3, atol=1e-3)


def test_odds_order_images_as_probabilities_do_and_tell_sure_ones_apart(net):
    judge = judges.classifier_judge(loaded_model(1000, data={"name": "imagenet2012"}), [7, 993])
    assert judge.name == "toy"
    images, groups = as_bytes(32), np.arange(32) % 2
    features = net.features(net.variables, images / 127.5 - 1)
    probabilities = np.asarray(jax.nn.softmax(net.logits(net.variables, features)))[np.arange(32), judge.wanted[groups]]
    scores = judge.start()(images, groups)
    np.testing.assert_allclose(1 / (1 + np.exp(-scores)), probabilities, rtol=1e-3, atol=1e-30)
    sure = judge.program((net.variables["params"], *(jnp.zeros(n) for n in (A, (A, 3))), jnp.array([0.0, 50, 90])), images[:2], np.array([2, 2]))  # fmt: skip
    np.testing.assert_allclose(sure, 40, rtol=1e-5)  # a probability of 1 in float32


def test_clip_scores_an_image_by_its_own_text(monkeypatch):
    sizes, rng = clip.Sizes(6, 224, 112, 64, 1, 30, 77, 64, 1), np.random.default_rng(0)
    shapes = clip.abstract_variables(sizes)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32), shapes)
    net, encoded = clip.CLIP("clip", variables, sizes), []

    def tokenize(texts):
        encoded.extend(texts)
        return np.array([[1, len(text), 29, *[0] * 74] for text in texts], np.int32)

    monkeypatch.setattr(judges.clip, "load", lambda file: net)
    monkeypatch.setattr(judges.clip_text, "load_tokenizer", lambda: tokenize)
    monkeypatch.setattr(judges, "SCORED_PER_DEVICE", 2)
    prompts, images, groups = ["a", "two", "three"], as_bytes(2), np.array([2, 0])
    judge = judges.clip_judge(prompts, "clip.pt")
    assert (judge.name, encoded) == ("clip", prompts)

    @jax.jit
    def cosines_of(images, tokens):
        features, of_texts = net.features(variables, images), net.text_features(variables, tokens)
        return net.logits({"logit_scale": jnp.zeros(())}, features, of_texts)

    cosines = cosines_of(images / np.float32(127.5) - 1, tokenize(prompts))
    np.testing.assert_allclose(judge.start()(images, groups), np.asarray(cosines)[[0, 1], groups], rtol=1e-4, atol=1e-5)
    assert np.ptp(cosines, axis=1).min() > 0.01


@pytest.mark.parametrize(
    "num_classes, config, expected",
    [
        (1000, {"data": {"name": "imagenet2012", "label_key": "label"}}, True),
        (1000, {"data": {"name": "folder", "data_dir": None}}, True),  # converted
        (1000, {"data": {"name": "folder", "label_key": "folder"}, "class_names": [f"n{i:08d}" for i in range(1000)]}, True),
        (1000, {"data": {"name": "folder", "label_key": "folder"}}, False),
        (999, {"data": {"name": "imagenet2012", "label_key": "label"}}, False),
    ],
)  # fmt: skip
def test_classes_are_imagenets_where_all_says_so(num_classes, config, expected):
    assert judges.has_imagenet_classes(loaded_model(num_classes, **config)) == expected


def test_what_cannot_be_judged_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="^--by: classifier knows ImageNet's 1000 classes, and for the 5 of this model ne"
    ):
        judges.classifier_judge(loaded_model(data={"name": "folder"}), [0])
    helpers.write_pictures(tmp_path, num_train=4)
    settings = {
        "name": "folder",
        "data_dir": str(tmp_path),
        "image_size": [16, 16],
        "channels": 3,
        "label_key": "folder",
    }
    (tmp_path / "train" / "elk").mkdir()
    model = loaded_model(data=settings, class_names=list(helpers.CLASSES))
    with pytest.raises(
        ValueError, match="^--by: classifier finds no training image of class 'elk'; give other --classes$"
    ):
        judges.classifier_judge(model, [0, 4])
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        judges.classifier_judge(loaded_model(1000, data={}), [0], str(tmp_path / "gone.pth"))

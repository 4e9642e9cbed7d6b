"""evaluate.py attributes: a toy transformer by text on images of two colours, of which training lacks a combination."""

import io
import itertools
import json
import shutil

import helpers
import hub_cache
import numpy as np
import pytest
from PIL import Image

import evaluate
from rq_jax import checkpoint
from rq_jax.data import array_records
from rq_jax.data.text import train_tokenizer
from rq_jax.evaluation import attribute_commands, attributes, drawing, drawn_sets
from rq_jax.evaluation.drawn_sets import DrawSettings
from rq_jax.pretrained import clip, clip_text, efficientnet_lite
from rq_jax.report import grids

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
LABELS = {"day": 250, "dusk": 120}
UNSEEN = ("red", "blue")  # top and bottom
SCALES, SEEDS = (1.0, 2.5), (0, 3)


class Flags:
    """Images of two halves; `named` leaves out the bottom of every fourth."""

    class_names, label_name, has_text, more_texts = tuple(LABELS), "light", True, ("attributes", "named")

    def __init__(self, split, repeats):
        rows = itertools.product(LABELS, COLOURS, COLOURS, range(repeats))
        self.rows = [row[:3] for row in rows if (row[1:3] == UNSEEN) == (split == "unseen")]

    def __len__(self):
        return len(self.rows)

    def read(self, start, stop):
        for i in range(start, stop):
            label, *halves = self.rows[i]
            out = io.BytesIO()
            Image.fromarray(paint(label, *halves, i)).save(out, "png")
            values, named = dict(zip(("top", "bottom"), halves, strict=True)), ["bottom", "top"][i % 4 == 3 :]
            text = f"a {label} of {values['top']}" + f" over {values['bottom']}" * (len(named) == 2)
            yield out.getvalue(), list(LABELS).index(label), text, json.dumps(values), json.dumps(named)


SPLITS = {"train": Flags("train", 3), "validation": Flags("validation", 1), "unseen": Flags("unseen", 5)}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet_lite, "load", lambda path: helpers.Means())
        # In the place of a toy tokenizer, which makes mud of all images, one that dims them.
        patch.setattr(attribute_commands, "make_reconstruct", lambda *_, by_depth: lambda images: (0.98 * images,))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("attributes")
    array_records.write(SPLITS, "flags", root / "sets")
    texts = [text for images in SPLITS.values() for _, _, text, *_ in images.read(0, len(images))]
    train_tokenizer(texts, 40, root / "bpe.json")
    data = {"data__name": "flags", "data__data_dir": str(root / "sets"), "data__text_key": "caption"}
    helpers.save_tokenizer(root / "tokenizer", root, **dict(list(data.items())[:2]))
    guided = {"model__use_null_cond": True, "loss__cond_dropout": 0.1}
    helpers.save_transformer(root / "text", root, root / "tokenizer", "text", root / "bpe.json", **data, **guided)
    return root


def run(root, out="out", **settings):
    settings = {"checkpoint": root / "text", "batch_size": 8, **settings}
    argv = ["attributes", f"--out={root / out}", *(f"--{name}={value}" for name, value in settings.items())]
    return evaluate.run(evaluate.parse_args(argv))


def join(values):
    return ",".join(map(str, values))


def paint(label, top, bottom, row):
    """An image of two halves, with a little noise."""
    noise = np.random.default_rng(row).integers(0, 6, (16, 16, 3))
    colours = np.repeat([COLOURS[top], COLOURS[bottom]], 8, axis=0)[:, None]
    return (LABELS[label] * colours + noise).astype(np.uint8)


def is_wrong(row, seed, scale):
    """Which of what `painter` paints has another colour at the bottom."""
    return seed == 3 and row % 2 == 1 and scale == 1


class Painter:
    """Stands in for a model that follows its prompts, except where `is_wrong`."""

    def __init__(self):
        self.calls, self.texts, self.ids = [], [], []

    def __call__(self, loaded, plan, conds, first, num, batches):
        seed, scale = batches["seed"], plan.settings.get("guidance")
        self.calls.append((num, seed, scale))
        self.texts = list(plan.names)
        for start in range(first, first + num, batches["batch_size"]):
            ids = np.arange(start, min(start + batches["batch_size"], first + num))
            self.ids.append(ids.tolist())
            yield ids, None, np.stack([self.image(plan.names[i], i, is_wrong(i, seed, scale)) for i in ids])

    def image(self, text, row, wrong):
        _, label, _, top, *rest = text.split()
        bottom = rest[-1] if rest else "green"
        names = list(COLOURS)
        return paint(label, top, names[names.index(bottom) - 1] if wrong else bottom, row)


@pytest.fixture(scope="module")
def painted(root):
    """The record of samples that are painted, how often they were, the notes of the sheets, and what was hashed."""
    painter, sheets, draw, hashed, fingerprint = Painter(), [], grids.labelled_grid, [], checkpoint.fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "fingerprint", lambda one: hashed.append(fingerprint(one)) or hashed[-1])
        patch.setattr(drawing, "stream", painter)
        patch.setattr(grids, "labelled_grid", lambda *args, **kwargs: sheets.append(kwargs) or draw(*args, **kwargs))
        record = run(root, guidance=join(SCALES[::-1]), seeds=join(SEEDS))
    return record, painter.calls, sheets, hashed


def test_held_out_images_show_what_their_captions_name(painted):
    for split, count in (("validation", 16), ("unseen", 10)):
        found = painted[0]["splits"][split]
        bottoms = count - count // 4
        assert found["images"] == count and found["asked"] == {"bottom": bottoms, "light": count, "top": count}
        own = found["figures"]["held-out images"]
        assert own["by_attribute"] == {"bottom": 1.0, "light": 1.0, "top": 1.0} and own["accuracy"] == 1.0
        assert own["by_class"]["dusk"]["bottom"] == 1.0
        assert found["figures"]["their reconstructions"]["by_attribute"] == own["by_attribute"]
    unseen, validation = (painted[0]["splits"][split] for split in ("unseen", "validation"))
    assert unseen["unseen_combinations"] == 8 and unseen["figures"]["held-out images"]["combinations"] == 1.0
    assert validation["unseen_combinations"] == 0 and "combinations" not in validation["figures"]["held-out images"]


def test_chance_is_that_of_the_training_images(painted):
    """Of 48 training images half are of either class; 9 of 24 have one of the colours of a half, and 6 another."""
    chance = painted[0]["splits"]["unseen"]["figures"]["chance"]
    assert chance["by_attribute"] == {"bottom": 9 / 24, "light": 0.5, "top": 9 / 24}
    assert chance["combinations"] == pytest.approx((9 / 24) ** 2) and chance["retrieval"] == 0.1


@pytest.mark.parametrize("split", ["validation", "unseen"])
def test_samples_miss_what_they_do_not_show(painted, split):
    rows = list(SPLITS[split].read(0, len(SPLITS[split])))
    for scale in SCALES:
        bottoms, every = [], []
        for seed in SEEDS:
            hits = [not is_wrong(i, seed, scale) for i, row in enumerate(rows) if "over" in row[2]]
            bottoms.append(np.mean(hits))
            every.append((sum(hits) + 2 * len(rows)) / (len(hits) + 2 * len(rows)))  # class and top are always right
        figures = painted[0]["splits"][split]["figures"][f"samples at guidance {scale:g}"]
        spread = {"mean": pytest.approx(np.mean(bottoms)), "std": pytest.approx(np.std(bottoms, ddof=1))}
        assert figures["by_attribute"]["bottom"] == spread
        assert figures["by_attribute"]["top"] == {"mean": 1.0, "std": 0.0}
        expected = {"mean": pytest.approx(np.mean(every)), "std": pytest.approx(np.std(every, ddof=1))}
        assert figures["accuracy"] == expected and figures["accuracy_ratio"] == expected  # held-out images have 1
        assert (np.std(bottoms) > 0) == (scale == 1)
        if split == "unseen":
            assert figures["combinations"] == spread and figures["combinations_ratio"] == spread


def test_each_set_is_drawn_once_and_shown(painted):
    _, calls, sheets, _ = painted
    assert calls == [(count, seed, scale) for count in (16, 10) for scale in SCALES for seed in SEEDS]
    for split, sheet in zip(("validation", "unseen"), sheets, strict=True):
        texts = [text for _, _, text, *_ in SPLITS[split].read(0, 6)]
        assert sheet["captions"]["held-out images"] == [f"{text}. Nothing missed" for text in texts]
        assert sheet["captions"]["samples at guidance 1"] == ["Nothing missed"] * 6  # the first seed


def test_each_model_is_hashed_once_for_all_sets(painted):
    record, _, _, hashed = painted
    subject = record["subjects"]["samples at guidance 1, unseen"]
    assert hashed == [subject["transformer"], subject["tokenizer"]]


def test_figures_bear_stamps_and_files_are_written(root, painted, capsys, monkeypatch):
    record = painted[0]
    figures = {(one["figure"], one["of"]): one["protocol"] for one in record["figures"]}
    for name in ("accuracy", "retrieval", "combinations", "accuracy of top"):
        stamps = {stamp for (figure, of), stamp in figures.items() if figure == name and of.endswith("unseen")}
        assert len(stamps) == 1
        fields = record["protocols"][stamps.pop()]
        assert fields["split"] == "unseen" and fields["images"] == 10 and fields["fitted images"] == 48
    subject = record["subjects"]["samples at guidance 2.5, unseen"]
    assert subject["guidance"] == 2.5 and subject["seeds"] == list(SEEDS)
    names = {path.name for path in (root / "out").iterdir()}
    assert names == {"attributes.json", "attributes.png", "attributes1.png", "guidance.png", "features"}
    monkeypatch.setattr(drawing, "stream", painter := Painter())
    before = [(root / "out" / name).read_bytes() for name in ("attributes.png", "attributes1.png")]
    again = run(root, guidance=join(SCALES), seeds=join(SEEDS))
    assert again["splits"] == record["splits"]
    assert {seed for _, seed, _ in painter.calls} == {0}  # features are kept; the sheets need images
    assert painter.ids == [list(range(8))] * 4  # those that they show, in a batch
    assert [(root / "out" / name).read_bytes() for name in ("attributes.png", "attributes1.png")] == before
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["top", "16"] for line in lines)
    assert sum(line.split()[:2] in (["unseen", "1"], ["unseen", "2.5"]) for line in lines) == 2


def test_so_many_images_are_spread_over_a_split(root, painted, monkeypatch):
    """They share a cache with all images of the split; one that is damaged plays no part."""
    texts = [text for _, _, text, *_ in SPLITS["validation"].read(0, 16)]
    monkeypatch.setattr(drawing, "stream", painter := Painter())
    record = run(root, splits="validation", num_images=10, num_fitted=20, seeds=0)
    assert record["splits"]["validation"]["images"] == 10
    assert painter.texts == [texts[i * 16 // 10] for i in range(10)]
    figures = record["splits"]["validation"]["figures"]
    assert figures["held-out images"]["accuracy"] == figures["samples"]["accuracy"]["mean"] == 1.0
    (protocol,) = {one["fitted images"] for one in record["protocols"].values()}
    assert protocol == 20


def test_a_damaged_image_is_asked_for_nothing(root, tmp_path, monkeypatch):
    images = Flags("validation", 1)
    rows = list(images.read(0, 16))
    rows[4] = (b"damaged", *rows[4][1:])
    images.read = lambda start, stop: rows[start:stop]
    array_records.write({"train": SPLITS["train"], "validation": images}, "harmed", tmp_path)
    monkeypatch.setattr(drawing, "stream", painter := Painter())
    record = run(root, out="harmed", data_name="harmed", data_dir=tmp_path, seeds=0)
    assert painter.texts == [text for i, (_, _, text, *_) in enumerate(rows) if i != 4]
    figures = record["splits"]["validation"]["figures"]
    assert figures["held-out images"]["accuracy"] == figures["samples"]["accuracy"]["mean"] == 1.0
    assert list(record["splits"]) == ["validation"]  # there is no split unseen


def test_a_model_draws_the_captions_by_its_own_settings(root):
    """Its samples are drawn again, from a file of prompts, and judged one by one."""
    record = run(root, out="own", splits="unseen", seeds=3)
    loaded, images, training = checkpoint.load_model(root / "text"), SPLITS["unseen"], SPLITS["train"]
    rows = list(images.read(0, len(images)))
    (root / "texts.txt").write_text("\n".join(text for _, _, text, *_ in rows))
    settings = DrawSettings(num_images=len(rows), seed=3, prompts=str(root / "texts.txt"))
    drawn = drawn_sets.draw_set(loaded, str(root / "text"), settings).first(len(rows), 8)
    features = helpers.Means().features({}, scaled(paint(*row, i) for i, row in enumerate(training.rows)))
    described = [attributes.Description(label, {"top": top, "bottom": bottom}) for label, top, bottom in training.rows]
    classifiers = attributes.fit(features, described, "light")
    found, hits = classifiers.log_probabilities(helpers.Means().features({}, scaled(drawn))), []
    for row, ((label, top, bottom), image) in enumerate(zip(images.rows, rows, strict=True)):
        asked = {("", "light"): label, (label, "top"): top, (label, "bottom"): bottom}
        for (of, name), value in asked.items():
            if name == "light" or name in json.loads(image[-1]):
                values = {key[2]: i for key, i in classifiers.columns.items() if key[:2] == (of, name)}
                hits.append(max(values, key=lambda one: found[row, values[one]]) == value)
    figures = record["splits"]["unseen"]["figures"]["samples"]
    assert figures["accuracy"] == {"mean": pytest.approx(np.mean(hits)), "std": 0.0} and 0 < np.mean(hits) < 1
    assert record["subjects"]["samples, unseen"]["seeds"] == [3] and not (root / "own" / "guidance.png").exists()


def test_a_model_of_the_hub_is_measured_and_recorded_by_its_address(root, painted, tmp_path, monkeypatch):
    commit, address = "c" * 40, "hf://owner/name"
    hub_cache.make(tmp_path, {commit: lambda path: shutil.copytree(root / "text", path)}, {"main": commit})
    hub_cache.use(monkeypatch, tmp_path)
    monkeypatch.setattr(drawing, "stream", Painter())
    record = run(root, checkpoint=address, splits="unseen", seeds=0, cache=root / "out" / "features", out="hub")
    subject = record["subjects"]["samples, unseen"]
    assert (subject["checkpoint"], subject["commit"]) == (address, commit)
    assert record["data"]["text_tokenizer"] == f"{address}/text_tokenizer.json"
    assert "snapshots" not in json.dumps(record)


def scaled(images):
    return np.stack(list(images)).astype(np.float32) / 127.5 - 1


class Clip(helpers.Means):
    """Texts have the features of the images that they belong to."""

    def text_features(self, variables, tokens):
        return tokens * np.float32(1)


def test_captions_are_found_by_clip(root, monkeypatch):
    own = helpers.Means().features({}, scaled(paint(*row, i) for i, row in enumerate(SPLITS["unseen"].rows)))
    monkeypatch.setattr(drawing, "stream", painter := Painter())
    texts = iter([own, own[::-1]])
    monkeypatch.setattr(clip, "load", lambda path: Clip(variables={"text": {}}))
    monkeypatch.setattr(clip_text, "load_tokenizer", lambda use_cut: lambda prompts: next(texts))
    for right in (True, False):
        found = run(root, out="clip", splits="unseen", clip="x", seeds=0, guidance=1)
        figures = found["splits"]["unseen"]["figures"]
        expected = nearest_to_own(own, own if right else own[::-1])
        assert figures["held-out images"]["clip_retrieval"] == expected and (expected == 1) == right
        assert figures["chance"]["clip_retrieval"] == 0.1
    assert len(painter.calls) == 2


def nearest_to_own(images, texts):
    """Share of images nearest to their own text among all ten."""
    cosines = (images / np.linalg.norm(images, axis=1, keepdims=True)) @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T  # fmt: skip
    return np.mean([cosines[i, i] >= np.delete(cosines[i], i).max() for i in range(len(images))])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": "train"}, r"^--splits: 'train' is what classifiers are fitted to; give held-out splits$"),
        ({"splits": "validation,train[:9]"}, r"^--splits: 'train\[:9\]' is what classifiers are fitted to"),
        ({"splits": "unseen,unseen"}, "^--splits: unseen,unseen names one twice; give different ones$"),
        ({"splits": "test"}, "^split: 'test' is unknown in dataset 'flags/1.0.0'; allowed are "),
        ({"splits": "unseen[:4]"}, r"^--splits: images of 'unseen\[:4\]': 4 must be at least 10; a caption is found"),
        ({"seeds": "0,0"}, "^--seeds: 0,0 names one twice; give different ones$"),
        ({"seeds": "-1"}, r"^--seeds: \[-1\] must be at least 0$"),
        ({"seeds": "0.5"}, "^--seeds: '0.5' is no list of numbers; give for example 0,1,2$"),
        ({"guidance": "1,inf"}, "^--guidance: inf must be a finite number"),
        ({"guidance": "2,2"}, "^--guidance: 2.0,2.0 names one twice; give different ones$"),
        ({"top_p": 1.5}, "^--top_p: 1.5 "),
        ({"num_images": 9}, "^--num_images: 9 must be at least 10; a caption is found among so many$"),
        ({"num_fitted": 0}, "^--num_fitted: 0 must be at least 1$"),
        ({"checkpoint": "tokenizer"}, "^--checkpoint: '.*tokenizer' carries no tokenizer; give the directory of a stage-2 run$"),
        ({"clip": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_refused(root, settings, message):
    if "checkpoint" in settings:
        settings = {"checkpoint": root / settings["checkpoint"]}
    with pytest.raises((ValueError, OSError), match=message):
        run(root, out="refused", **settings)
    assert not (root / "refused").exists()


def test_other_models_and_data_sets_are_refused(root, tmp_path):
    pictures = helpers.write_pictures(tmp_path / "pictures")
    helpers.save_transformer(tmp_path / "class", pictures, root / "tokenizer", "class")
    with pytest.raises(ValueError, match="^--checkpoint: '.*class' is class, and draws nothing of a text; give one by"):
        run(root, out="refused", checkpoint=tmp_path / "class")
    message = "^--data_name: 'plain' has no attributes, named, class; give a data set with classes and the texts attrib"
    plain = Flags("train", 1)
    plain.class_names, plain.more_texts, plain.read = None, (), lambda start, stop: ((image, None, text) for image, _, text, *_ in Flags("train", 1).read(start, stop))  # fmt: skip
    array_records.write({"train": plain, "validation": plain}, "plain", tmp_path / "sets")
    with pytest.raises(ValueError, match=message):
        run(root, out="refused", data_name="plain", data_dir=tmp_path / "sets")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("[]", "[]"), "^attributes of example 0 of broken/1.0.0, split validation holds a list, not a dict$"),
        (('{"top": "red"}', "{"), "^named of example 0 .* is not readable JSON"),
        (('{"top": "red"}', '["hat"]'), "^named of example 0 of broken/1.0.0, split validation: 'hat' is none of its attributes$"),
    ],
)  # fmt: skip
def test_descriptions_that_are_none_are_refused(root, tmp_path, texts, message):
    broken = Flags("train", 1)
    broken.read = lambda start, stop: ((*row[:3], *texts) for row in Flags("train", 1).read(start, stop))
    array_records.write({"train": Flags("train", 1), "validation": broken}, "broken", tmp_path)
    with pytest.raises(ValueError, match=message):
        run(root, out="refused", data_name="broken", data_dir=tmp_path)
    assert not (root / "refused").exists()

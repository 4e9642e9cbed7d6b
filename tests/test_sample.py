"""sample.py: pictures, codes and settings on disk; the same image in any batch; prefixes, neighbours, refusals."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import hub_cache
import jax
import numpy as np
import pytest
from PIL import Image
from toy_samples import draw, save_models

import sample
from rq_jax import checkpoint
from rq_jax.devices import sharding
from rq_jax.evaluation import neighbours
from rq_jax.report import grids
from rq_jax.sampling import images

(h, w, D), K, V = helpers.CODE_SHAPE, helpers.CODEBOOK_SIZE, len(helpers.CLASSES)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


# --- what is written ---------------------------------------------------------------------------------------------------


def test_pictures_codes_and_settings_are_written(trained, tmp_path):
    drawn = draw(trained, tmp_path / "out", "--seed=4", "--top_p=0.9", kind="class", num=3, batch=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "images", "grid_000000.png", "codes_000000.npz", "settings_000000.json",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == [f"00000{i}.png" for i in range(3)]
    assert drawn.codes.shape == (3, h, w, D) and drawn.codes.dtype == np.int32
    assert drawn.codes.min() >= 0 and drawn.codes.max() < K
    np.testing.assert_array_equal(drawn.ids, [0, 1, 2])
    np.testing.assert_array_equal(drawn.cond, [[0], [1], [2]])
    loaded = checkpoint.load_model(trained.stage2["class"])
    wanted = {"seed": 4, "top_p": 0.9, "temperature": 1.0, "top_k": None, "num_images": 3, "first_index": 0}
    assert drawn.settings.items() >= wanted.items()
    assert drawn.settings["tokenizer"] == checkpoint.fingerprint(loaded.tokenizer.variables)
    images = loaded.tokenizer.model.apply(loaded.tokenizer.variables, drawn.codes, method="decode_codes")
    for i, image in enumerate(np.asarray(images)):
        assert np.abs(drawn.image(i) - np.clip(127.5 * image + 127.5, 0, 255)).max() <= 1


def test_neighbours_of_a_model_without_a_data_set_are_refused_before_anything_is_drawn(trained, tmp_path):
    converted = shutil.copytree(trained.stage2["unconditional"], tmp_path / "converted")
    config = checkpoint.read_config(converted)
    config.pop("data")
    checkpoint.write_config(converted, config)
    models_by_kind = dataclasses.replace(trained, stage2={"unconditional": converted})
    with pytest.raises(ValueError, match="^--neighbours: 2 needs the training images, this model names none"):
        draw(models_by_kind, tmp_path / "out", "--neighbours=2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_narrow_weights_draw_and_are_recorded(trained, tmp_path, weights):
    exact, narrow = (
        draw(trained, tmp_path / name, f"--weights={name}", kind="class", num=8) for name in ("float32", weights)
    )
    assert (exact.settings["weights"], narrow.settings["weights"]) == ("float32", weights)
    assert (exact.codes[:, 0, 0, 0] == narrow.codes[:, 0, 0, 0]).mean() > 0.7
    with pytest.raises(ValueError, match="--weights: invalid choice: 'int4'"):
        draw(trained, tmp_path / "out", "--weights=int4")


def test_defaults_of_the_filter_are_the_checkpoints(trained, tmp_path):
    greedy = shutil.copytree(trained.stage2["unconditional"], tmp_path / "greedy")
    config = checkpoint.read_config(greedy)
    config["sample"]["top_k"] = 1
    checkpoint.write_config(greedy, config)
    models_by_kind = dataclasses.replace(trained, stage2={"unconditional": greedy})
    by_default = draw(models_by_kind, tmp_path / "a")
    assert by_default.settings["top_k"] == 1
    np.testing.assert_array_equal(by_default.codes, draw(trained, tmp_path / "b", "--temperature=0").codes)
    overridden = draw(models_by_kind, tmp_path / "c", f"--top_k={K}")
    np.testing.assert_array_equal(overridden.codes, draw(trained, tmp_path / "d").codes)
    assert helpers.differs(overridden.codes, by_default.codes)


def test_step_and_weights_are_those_asked_for(trained, tmp_path, monkeypatch):
    asked, load_model = [], checkpoint.load_model

    def load(directory, **options):
        if directory == str(trained.stage2["unconditional"]):  # the tokenizer is loaded by the same function
            asked.append(options)
        return load_model(directory)

    monkeypatch.setattr(checkpoint, "load_model", load)
    draw(trained, tmp_path / "a", num=1, batch=3)
    draw(trained, tmp_path / "b", "--step=7", "--no_ema", num=1, batch=3)
    assert asked == [{"step": None, "ema": True}, {"step": 7, "ema": False}]


# --- the same image in any batch ---------------------------------------------------------------------------------------


def test_image_depends_on_seed_and_id_alone(trained, tmp_path, monkeypatch):
    whole = draw(trained, tmp_path / "whole", kind="class", num=7, batch=3)
    slices = [
        draw(trained, tmp_path / "one", kind="class", num=7, batch=1),
        draw(trained, tmp_path / "parts", "--decode_batch_size=2", kind="class", num=7, batch=8),
        draw(trained, tmp_path / "slice", kind="class", num=2, batch=3, first=2),
        draw(trained, tmp_path / "slice", kind="class", num=3, batch=1, first=4),
    ]
    assert len(np.unique(whole.codes.reshape(7, -1), axis=0)) == 7
    devices, draw_images = [], images.draw
    monkeypatch.setattr(sharding, "local_mesh", helpers.all_local_devices)
    monkeypatch.setattr(
        images, "draw", lambda *models, **values: devices.append(values["sharding"]) or draw_images(*models, **values)
    )
    others = [
        *slices,
        draw(trained, tmp_path / "eight", kind="class", num=7, batch=1),
        draw(trained, tmp_path / "eight in parts", "--decode_batch_size=9", kind="class", num=7, batch=16),
    ]
    assert [layout.num_devices for layout in devices] == [8, 8]
    every = [*range(7)]
    assert [list(drawn.ids) for drawn in others] == [every, every, [2, 3], [4, 5, 6], every, every]
    for drawn in others:
        np.testing.assert_array_equal(drawn.codes, whole.codes[drawn.ids])
        np.testing.assert_array_equal(drawn.cond, whole.cond[drawn.ids])
        for i in drawn.ids:
            difference = drawn.image(i).astype(int) - whole.image(i)
            assert np.abs(difference).max() <= 1
    another = draw(trained, tmp_path / "seed", "--seed=1", kind="class", num=7, batch=3)
    assert all(helpers.differs(another.codes[i], whole.codes[i]) for i in range(7))


def test_a_file_that_cannot_be_written_ends_the_draw(trained, tmp_path):
    (tmp_path / "out" / "images" / "000004.png").mkdir(parents=True)
    with pytest.raises(OSError, match="000004.png"):
        draw(trained, tmp_path / "out", num=12, batch=8)
    assert not (tmp_path / "out" / "codes_000000.npz").exists()


# --- settings of the draw ----------------------------------------------------------------------------------------------


def test_greedy_codes_do_not_depend_on_the_seed(trained, tmp_path):
    greedy = draw(trained, tmp_path / "a", "--temperature=0")
    again = draw(trained, tmp_path / "b", "--temperature=0", "--seed=9")
    np.testing.assert_array_equal(greedy.codes, again.codes)
    assert np.all(greedy.codes == greedy.codes[:1])
    assert greedy.settings["temperature"] == 0
    assert helpers.differs(draw(trained, tmp_path / "c").codes, greedy.codes)


@pytest.mark.parametrize(
    ("flag", "values"), [("temperature", [0.0, 1.0, 1.0]), ("top_k", [1, K, K]), ("top_p", [0.0, 1.0, 1.0])]
)
def test_lists_hold_one_value_per_depth(trained, tmp_path, flag, values):
    greedy = draw(trained, tmp_path / "greedy", "--temperature=0", num=6)
    drawn = draw(trained, tmp_path / "drawn", f"--{flag}={','.join(map(str, values))}", num=6)
    assert drawn.settings[flag] == values
    # Nothing stands before the first code, so that the greedy one is the same for all images; the next is drawn.
    np.testing.assert_array_equal(drawn.codes[:, 0, 0, 0], greedy.codes[:, 0, 0, 0])
    assert len(np.unique(drawn.codes[:, 0, 0, 1:], axis=0)) > 1


def test_prefix_is_kept_and_the_rest_is_drawn_again(trained, tmp_path):
    first = draw(trained, tmp_path / "a")
    prefix = f"--prefix={tmp_path / 'a' / 'codes_000000.npz'}"
    drawn = draw(trained, tmp_path / "b", prefix, "--prefix_positions=3", "--seed=1")
    before, after = (codes.reshape(3, h * w, D) for codes in (first.codes, drawn.codes))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert all(helpers.differs(after[i, 3:], before[i, 3:]) for i in range(3))
    # With the same seed an image goes on as it did.
    same = draw(trained, tmp_path / "c", prefix, "--prefix_positions=3")
    np.testing.assert_array_equal(same.codes, first.codes)
    whole = draw(trained, tmp_path / "d", prefix, f"--prefix_positions={h * w}", "--seed=1")
    np.testing.assert_array_equal(whole.codes, first.codes)


def test_prefix_of_a_slice_belongs_to_its_images(trained, tmp_path):
    whole = draw(trained, tmp_path / "whole", num=5, batch=3)
    draw(trained, tmp_path / "slice", num=3, first=2)
    prefix = f"--prefix={tmp_path / 'slice' / 'codes_000002.npz'}"
    drawn = draw(trained, tmp_path / "b", prefix, "--prefix_positions=5", "--seed=1", num=3, first=2)
    kept = drawn.codes.reshape(3, h * w, D)[:, :5]
    np.testing.assert_array_equal(kept, whole.codes.reshape(5, h * w, D)[2:, :5])


def test_a_prefix_goes_on_with_its_classes(trained, tmp_path):
    whole = draw(trained, tmp_path / "whole", "--classes=4,1,3", kind="class", first=1)
    prefix = f"--prefix={tmp_path / 'whole' / 'codes_000001.npz'}", "--prefix_positions=5"
    same = draw(trained, tmp_path / "same", *prefix, kind="class", first=1)
    np.testing.assert_array_equal(same.cond, whole.cond)
    np.testing.assert_array_equal(same.codes, whole.codes)
    other = draw(trained, tmp_path / "other", *prefix, "--classes=0", kind="class", first=1)
    assert not other.cond.any()
    np.savez(tmp_path / "bad.npz", codes=whole.codes, cond=whole.cond + V)
    with pytest.raises(ValueError, match=r"^--prefix: '.*bad.npz' holds no classes 0..4; give --classes$"):
        draw(trained, tmp_path / "bad", f"--prefix={tmp_path / 'bad.npz'}", prefix[1], kind="class")


def test_a_prefix_goes_on_with_its_texts(trained, tmp_path):
    prompts = "--prompt=A red BEE", "--prompt=green elk"
    whole = draw(trained, tmp_path / "whole", *prompts, kind="text", first=1)
    prefix = f"--prefix={tmp_path / 'whole' / 'codes_000001.npz'}", "--prefix_positions=5"
    same = draw(trained, tmp_path / "same", *prefix, kind="text", first=1)
    np.testing.assert_array_equal(same.cond, whole.cond)
    np.testing.assert_array_equal(same.codes, whole.codes)
    loaded = checkpoint.load_model(trained.stage2["text"])
    run = f"--checkpoint={trained.stage2['text']}"
    args = sample.parse_args(["--out=x", "--num_images=3", run, *prefix])
    assert sample.conditions(loaded, args, whole.cond)[1] == ["green elk", "a red bee", "green elk"]
    with pytest.raises(ValueError, match="^--prefix: '.*' holds no texts of 6 tokens 0..39; give --prompt$"):
        sample.conditions(loaded, args, whole.cond + 40)


def test_guidance_of_one_is_none_and_more_is_more(trained, tmp_path):
    plain = draw(trained, tmp_path / "a", kind="guided")
    one = draw(trained, tmp_path / "b", "--guidance=1", kind="guided")
    np.testing.assert_array_equal(one.codes, plain.codes)
    more = draw(trained, tmp_path / "c", "--guidance=4", kind="guided")
    assert more.settings["guidance"] == 4 and helpers.differs(more.codes, plain.codes)


# --- neighbours --------------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_training_pictures(trained, tmp_path, monkeypatch):
    loaded = checkpoint.load_model(trained.stage2["unconditional"])
    paths = sorted((trained.pictures / "train").rglob("*.png"))
    training = np.stack([np.asarray(Image.open(path)) for path in paths])
    noisy = np.clip(training[[4, 11]].astype(int) + 3, 0, 255).astype(np.uint8)
    seen = {}
    monkeypatch.setattr(grids, "labelled_grid", lambda rows, scale, captions: seen.update(rows))
    neighbours.sample_sheet(loaded.config, noisy, ["", ""], 2)
    assert list(seen) == ["sample", "nearest 1", "nearest 2"]
    np.testing.assert_array_equal(seen["sample"], noisy)
    np.testing.assert_array_equal(seen["nearest 1"], training[[4, 11]])
    distances = np.mean((training[None].astype(float) - noisy[:, None]) ** 2, axis=(2, 3, 4))
    np.testing.assert_array_equal(seen["nearest 2"], training[np.argsort(distances, axis=1)[:, 1]])
    seen.clear()
    neighbours.sample_sheet(loaded.config, noisy, ["", ""], 99)
    assert len(seen) == 1 + len(training)


def test_neighbour_sheet_is_written_when_asked_for(trained, tmp_path):
    draw(trained, tmp_path / "a", "--neighbours=2")
    assert (tmp_path / "a" / "neighbours_000000.png").is_file()


# --- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "no images": ("unconditional", ["--num_images=0"], "--num_images: 0 must be at least 1"),
    "no batch": ("unconditional", ["--batch_size=0"], "--batch_size: 0 must be at least 1"),
    "index": ("unconditional", ["--first_index=-1"], "--first_index: -1 must be at least 0"),
    "seed": ("unconditional", ["--seed=-2"], "--seed: -2 must be at least 0"),
    "large index": ("unconditional", [f"--first_index={2**62}"], "the last image id: 4611686018427387939 is outside 0..4611686018427387904"),
    "empty classes": ("class", ["--classes="], "--classes: empty"),
    "empty classes of a split": ("unconditional", ["--classes_of="], "--classes_of:  is for a class-conditional model"),
    "neighbours": ("unconditional", ["--neighbours=-1"], "--neighbours: -1 must be at least 0"),
    "temperature": ("unconditional", ["--temperature=-0.5"], "--temperature: -0.5 must be at least 0"),
    "top_k": ("unconditional", ["--top_k=0"], "--top_k: 0 must be at least 1"),
    "top_p": ("unconditional", ["--top_p=1.2"], r"--top_p: 1.2 is outside \[0, 1\]"),
    "depths": ("unconditional", ["--top_p=0.5,0.6"], r"--top_p: \[0.5, 0.6\] has 2 entries for code depth 3"),
    "guidance": ("class", ["--guidance=2"], "--guidance: 2.0 needs a model trained with use_null_cond"),
    "classes of none": ("unconditional", ["--classes=1"], "--classes: 1 is for a class-conditional model, this one is unc"),
    "classes of text": ("text", ["--classes=1"], "--classes: 1 is for a class-conditional model, this one is text"),
    "prompt of classes": ("class", ["--prompt=bee"], r"--prompt: \['bee'\] is for a text-conditional model, this one is class"),
    "prompts of classes": ("class", ["--prompts={}/a.txt"], r"--prompt: \['a', 'b'\] is for a text-conditional model, this one is class"),
    "prompts of a split, too": ("text", ["--prompt=a", "--prompts_of=train"], "--prompt: 'a' and --prompts_of: train exclude"),
    "captions of classes": ("class", ["--prompts_of=train"], "--prompts_of: train is for a text-conditional model"),
    "both prompts": ("text", ["--prompt=a", "--prompts={}/a.txt"], "--prompt: 'a' and --prompts: .*a.txt exclude one another"),
    "more prompts than images": ("text", ["--prompts={}/a.txt", "--num_images=1"], "--num_images: 1 are fewer than the 2 prompts; give more, or --per_p"),
    "images of no prompt": ("class", ["--per_prompt=2"], "--per_prompt: 2 needs --prompt or --prompts; give some, or --num_images"),
    "no image of a prompt": ("text", ["--prompt=a", "--per_prompt=0"], "--per_prompt: 0 must be at least 1"),
    "images beyond the prompts": ("text", ["--prompt=a", "--per_prompt=2", "--num_images=3"], r"the last image id: 2 is outside 0\.\.1, the images of all prompts"),
    "no prompts file": ("text", ["--prompts={}/gone.txt"], "--prompts: '.*gone.txt' is no file; give a .txt or a .json of texts"),
    "other prompts file": ("text", ["--prompts={}/a.csv"], "--prompts: '.*a.csv' is neither .txt, of a text a line, nor .json, of a list"),
    "blank prompts": ("text", ["--prompts={}/blank.txt"], "--prompts: '.*blank.txt' holds no text; give one or more"),
    "damaged prompts": ("text", ["--prompts={}/latin.txt"], "--prompts: '.*latin.txt': 'utf-8' codec can't decode"),
    "prompts by key": ("text", ["--prompts={}/a.json"], "--prompts: '.*a.json' holds a dict, not a list"),
    "prompts and numbers": ("text", ["--prompts={}/b.json"], "--prompts: '.*b.json' holds more than texts; give a list of strings"),
    "prompt of other bytes": ("text", ["--prompt=caf\udce9"], r"^--prompt: 'caf\\udce9' is no UTF-8; write it in UTF-8$"),
    "prompts of half a letter": ("text", ["--prompts={}/half.json"], r"^--prompt: '\\ud800' is no UTF-8; write it in UTF-8$"),
    "no prompt": ("text", [], "--prompt: missing, this model draws images of a text"),
    "class number": ("class", ["--classes=1,5"], "--classes: '5' is no class; allowed are 0..4 and the names that --list_classes shows"),
    "class name": ("class", ["--classes=fox"], "--classes: 'fox' is no class"),
    "negative class": ("class", ["--classes=-1"], "--classes: '-1' is no class"),
    "classes of a split, twice": ("class", ["--classes=1", "--classes_of=train"], "--classes: 1 and --classes_of: train exclude"),
    "classes of a split of none": ("unconditional", ["--classes_of=train"], "--classes_of: train is for a class-conditional"),
    "classes of no split": ("class", ["--classes_of=tset"], "tset"),
    "prefix alone": ("unconditional", ["--prefix=codes.npz"], "--prefix: codes.npz and --prefix_positions: 0 belong together"),
    "positions alone": ("unconditional", ["--prefix_positions=2"], "--prefix: None and --prefix_positions: 2 belong together"),
    "missing prefix": ("unconditional", ["--prefix=gone.npz", "--prefix_positions=2"], "--prefix: 'gone.npz' is no .npz file"),
}  # fmt: skip


@pytest.fixture
def nothing_compiles(monkeypatch):
    def fail(*_):
        raise AssertionError("arguments must be refused before anything compiles")

    monkeypatch.setattr(importlib.import_module("rq_jax.sampling.generate"), "_generate", fail)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_in_one_line(trained, tmp_path, nothing_compiles, case):
    kind, flags, message = REFUSED[case]
    files = {"a.txt": b"a\nb", "blank.txt": b" \n", "latin.txt": b"\xe9", "a.json": b'{"a": 1}', "b.json": b'["a", 1]'}
    files["half.json"] = b'["\\ud800"]'
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    flags = [flag.replace("{}", str(tmp_path)) for flag in flags]
    arguments = [f"--checkpoint={trained.stage2[kind]}", f"--out={tmp_path / 'out'}", *flags]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        sample.run(sample.parse_args(arguments))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_neighbours_are_for_one_process(trained, tmp_path, nothing_compiles, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="^--neighbours: 2 is for one process, not for 2; leave it out$"):
        draw(trained, tmp_path / "a", "--neighbours=2")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        *((address, f"'{address}' has no port") for address in ("leader", ":1234", "leader:port")),
        ("leader:99999", "'leader:99999' has a port outside 1..65535"),
    ],
)
def test_a_bad_address_is_refused(monkeypatch, capsys, address, message):
    monkeypatch.setattr("sys.argv", ["sample.py", "--out=samples", f"--coordinator={address}"])
    with pytest.raises(SystemExit):
        sample.main()
    assert f"--coordinator: {message}; give host:port, the same for every process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "positions", "message"),
    [
        ({"tokens": np.zeros((2, h, w, D), int)}, 2, "--prefix: '.*' has no array 'codes'"),
        ({"codes": np.zeros((2, h * w, D), int)}, 2, r"--prefix: codes of shape \(2, 8, 3\) are not \(n, h, w, D\)"),
        ({"codes": np.zeros((2, h, w, D), int)}, 9, "--prefix_positions: 9 is more than the 8 positions of the codes"),
        ({"codes": np.full((2, h, w, D), K)}, 2, r"prefix: 13 at depth 0 is outside \[0, 13\)"),
        ({"codes": np.zeros((2, h, w, D + 1), int)}, 2, r"prefix: shape \(36, 2, 4\) does not fit"),
    ],
)
def test_bad_prefixes_are_refused(trained, tmp_path, nothing_compiles, arrays, positions, message):
    np.savez(tmp_path / "codes.npz", **arrays)
    arguments = [f"--checkpoint={trained.stage2['unconditional']}", f"--out={tmp_path / 'out'}"]
    arguments += [f"--prefix={tmp_path / 'codes.npz'}", f"--prefix_positions={positions}"]
    with pytest.raises(ValueError, match=message) as error:
        sample.run(sample.parse_args(arguments))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_directories_without_a_transformer_are_refused(trained, tmp_path, nothing_compiles):
    cases = {
        trained.stage1: "carries no tokenizer; give the directory of a stage-2 run",
        tmp_path / "gone": "is no run directory",
    }
    for directory, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            sample.run(sample.parse_args([f"--checkpoint={directory}", f"--out={tmp_path / 'out'}"]))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_command_line_ends_with_one_line(tmp_path):
    command = [sys.executable, "sample.py", f"--checkpoint={tmp_path / 'gone'}", f"--out={tmp_path / 'out'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "gone" in lines[0], result.stderr


def test_a_flag_of_the_wrong_type_is_one_line():
    with pytest.raises(ValueError, match="^--top_k: invalid number value: 'x'$"):
        sample.parse_args(["--out=gone", "--top_k=x"])
    with pytest.raises(ValueError, match="^--out: missing; give the directory of the results$"):
        sample.run(sample.parse_args([]))
    for path, message in (
        ("", "empty; give a path"),
        ("~nobody-here/x", "'~nobody-here/x': no home directory is known"),
    ):
        with pytest.raises(ValueError, match=f"^--out: {message}"):
            sample.parse_args([f"--out={path}"])
    assert sample.parse_args(["--out=~/x [1]"]).out == str(Path.home() / "x [1]")


def test_a_model_of_the_hub_is_recorded_by_its_address_and_commit(trained, tmp_path, monkeypatch):
    commit = "c" * 40
    hub_cache.make(tmp_path, {commit: lambda path: shutil.copytree(trained.stage2["text"], path)}, {"main": commit})
    hub_cache.use(monkeypatch, tmp_path)
    out, flags = tmp_path / "out", ["--num_images=3", "--batch_size=3", "--prompt=a red picture"]
    sample.run(sample.parse_args(["--checkpoint=hf://owner/name@main", f"--out={out}", *flags]))
    written = (out / "settings_000000.json").read_text()
    settings = json.loads(written)
    assert (settings["checkpoint"], settings["commit"]) == ("hf://owner/name@main", commit)
    assert "snapshots" not in written
    drawn = draw(trained, tmp_path / "local", "--prompt=a red picture", kind="text")
    assert "commit" not in drawn.settings and drawn.settings["checkpoint"] == str(trained.stage2["text"])
    with np.load(out / "codes_000000.npz") as file:
        np.testing.assert_array_equal(file["codes"], drawn.codes)

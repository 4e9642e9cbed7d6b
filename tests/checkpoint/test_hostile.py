"""Directories that somebody else has written, or a disk has damaged: one line that names the file, soon, and no harm."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from toy_state import RQTRANSFORMER, RQVAE, fill, model_state_of, shapes_of, toy_state

from rq_jax import checkpoint, files
from rq_jax.checkpoint import Checkpointer, items, load_model, manifest
from rq_jax.checkpoint.model_dir import read_weights
from rq_jax.checkpoint.saver import steps_of
from rq_jax.training.evaluation import RunStatus
from rq_jax.training.loop import _data_position


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A model directory of stage 1; tests work on copies."""
    directory = tmp_path_factory.mktemp("shipped")
    checkpoint.save_model(directory, {"model": RQVAE}, fill(shapes_of("rqvae")))
    return directory


@pytest.fixture
def model_dir(shipped, tmp_path):
    return Path(shutil.copytree(shipped, tmp_path / "model"))


def refusal(action, *arguments) -> str:
    """The message of a ValueError: one line of printable text, of bounded length."""
    with pytest.raises(ValueError) as error:
        action(*arguments)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000, message
    return message


CONFIGS = {
    "deep": ('{"model": ' + "[" * 100_000, "config.json' is not readable JSON: it is nested too deeply"),
    "twice": (
        '{"model": {"name": "rqvae", "name": "x"}}',
        "config.json' is not readable JSON: the key 'name' stands twice",
    ),
    "cut": ("{bad", "config.json' is not readable JSON: "),
    "a text": ('"rqvae"', "config.json' holds a str, not a dict"),
    "no mapping": ('{"model": 3}', "its config.json names no model of ours"),
    "blocks": (
        {"num_res_blocks": 10**7},
        "config.json': 'num_res_blocks' of the model is '10000000'; at most 100 is read",
    ),
    "depth": (
        {"code_shape": [2, 1, 300]},
        "config.json': 'code_shape' of the model has a depth of '300'; at most 256 is read",
    ),
    "layers of positions": (
        {"position_layers": 10**6},
        "config.json': 'position_layers' of the model is '1000000'; at most 1000 is read",
    ),
    "layers of contents": (
        {"content_layers": 10**6},
        "config.json': 'content_layers' of the model is '1000000'; at most 1000 is read",
    ),
    "grains": ({"num_grains": 17}, "config.json': 'num_grains' of the model is '17'; at most 16 is read"),
    "cells": (
        {"code_shape": [2**14, 2**14, 1]},
        "config.json': 'code_shape' of the model is '[16384, 16384, 1]'; at most 1048576 cells are read",
    ),
    "beyond 64 bits": ({"code_shape": [2, 1, 2**70]}, "config.json': 'code_shape' of the model is "),
    "endless": ({"dropout": float("inf")}, "config.json': 'dropout' of the model is 'inf'; at most "),
    "levels": ({"width_multipliers": [1] * 99}, "config.json': 'width_multipliers' of the model has 99 entries"),
    "levels of a decoder": (
        {"decoder_width_multipliers": [1] * 99},
        "config.json': 'decoder_width_multipliers' of the model has 99 entries",
    ),
    "deep cells": ({"code_depth": 300}, "config.json': 'code_depth' of the model is '300'; at most 256 is read"),
    "no width": ({"width": 0}, "config.json' makes no model: "),
    "a list for a number": (
        {"z_channels": [3]},
        "config.json' makes no model: 'model.z_channels: [3] is not of type int",
    ),
    "control codes": ({"evil\x1b[2J\n": 1}, "config.json' makes no model: "),
    "a huge image": ({"image_size": 2**25}, "config.json': 'image_size' of the model is "),
}


@pytest.mark.parametrize("content, what", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.fault("a config of another shape, or with sizes beyond reason", "one line, exit code 2")
def test_a_config_of_another_shape_is_named(model_dir, content, what):
    text = json.dumps({"model": {**RQVAE, **content}}) if isinstance(content, dict) else content
    (model_dir / "config.json").write_text(text)
    assert what in refusal(load_model, model_dir)


@pytest.mark.parametrize(
    "entries, what",
    [
        ({"sample": {"nonsense\x07": 1}}, r"'nonsense\x07' in 'sample' is unknown; allowed are temperature, top_k"),
        ({"sample": {"top_p": ["a"]}}, "'top_p' in 'sample' is "),
        ({"sample": []}, "'sample' is a list, not a dict"),
        ({"data": "emoji"}, "'data' is a str, not a dict"),
        ({"tokenizer": {}}, "'tokenizer' is a dict, not a str"),
        ({"class_counts": ["a"]}, "'class_counts' holds what is no count"),
        ({"class_counts": [0, 0]}, "'class_counts' holds what is no count"),
        ({"class_names": [1]}, "'class_names' holds what is no text"),
    ],
)
def test_entries_that_are_read_later_are_checked_at_once(tmp_path, entries, what):
    checkpoint.write_config(tmp_path, {"model": RQVAE, **entries})
    assert refusal(checkpoint.read_config, tmp_path).startswith(f"'{tmp_path / 'config.json'}': {what}")


def bfloat(path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")


def truncate(path):
    os.truncate(path, path.stat().st_size - 5)


WEIGHTS = {
    "garbage": lambda path: path.write_bytes(b"garbage" * 99),
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "a header without an end": lambda path: path.write_bytes((2**62).to_bytes(8, "little")),
    "control codes in a name": lambda path: save_file({"\x1b[2J\n" + "a" * 10**6: np.zeros(1)}, path),
    "another type": bfloat,
}


@pytest.mark.parametrize("damage", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.fault("weights of a model directory damaged", "one line, exit code 2")
def test_damaged_weights_are_named(model_dir, damage):
    damage(model_dir / "model.safetensors")
    path = model_dir / "model.safetensors"
    assert refusal(read_weights, path, shapes_of("rqvae")).startswith(f"'{path}'")


def test_a_tokenizer_that_links_back_is_none(model_dir):
    """A model of stage 1 has no tokenizer of its own, and one of stage 2 is no tokenizer."""
    (model_dir / "tokenizer").symlink_to(".")
    assert load_model(model_dir).tokenizer.tokenizer is None
    checkpoint.write_config(model_dir, {"model": RQTRANSFORMER})
    checkpoint.save_model(model_dir, {"model": RQTRANSFORMER}, fill(shapes_of("rqtransformer")))
    assert "tokenizer' holds a 'rqtransformer', not a stage-1 run" in refusal(load_model, model_dir)


def test_a_discriminator_that_links_back_is_none(model_dir):
    (model_dir / "discriminator").symlink_to(".")
    state = model_state_of("rqvae", 1).replace(discriminator={"params": {"w": np.zeros(2, np.float32)}})
    message = refusal(checkpoint.start_from, model_dir, state)
    assert re.match(r"init_from: '.*/discriminator': '.*' has shape .*; set config.model to", message)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with one checkpoint; tests work on copies."""
    root = tmp_path_factory.mktemp("saved")
    with Checkpointer(root) as saving:
        saving.save(toy_state(2), {"note": 2})
        saving.wait()
    return root


def restore(root):
    with Checkpointer(root) as restoring:
        return restoring.restore(toy_state())


@pytest.mark.parametrize("name", ["params/_METADATA", "params/manifest.ocdbt", "host/metadata"])
@pytest.mark.fault("parts of a checkpoint resealed that Orbax cannot read", "one line, exit code 2")
def test_parts_that_orbax_cannot_read_are_named(saved, tmp_path, name):
    """Under checksums of their own, as a forger would write them."""
    path = Path(shutil.copytree(saved, tmp_path / "run")) / "checkpoints" / "2"
    (path / name).write_bytes(b"[" * 100_000)
    manifest.write(path)
    assert f"'{path}' cannot be read (" in refusal(restore, tmp_path / "run")
    if name != "host/metadata":
        assert f"'{path}' cannot be read (" in refusal(items.restore, path, {"params": toy_state().params})


@pytest.mark.parametrize("body", [b"[]", b'{"params/_METADATA": 3}', b'{"x": ["a", "b"]}', b"[" * 100_000])
@pytest.mark.fault("a manifest of another shape", "seen; goes on from the step before")
def test_a_manifest_of_another_shape_is_damage(saved, body):
    """Sealed by its own checksum."""
    path = saved / "checkpoints" / "2" / "manifest.json"
    before = path.read_bytes()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    (problem,) = manifest.problems(path.parent)
    path.write_bytes(before)
    assert problem.startswith("manifest.json is no list of files (") and problem.isprintable()


@pytest.mark.parametrize("saved", [{"best_loss": "low"}, {"bad_evaluations": None}, {"stopped": 1}, {"best_by": []}])
def test_a_status_of_other_types_is_refused(saved):
    (name,) = saved
    assert re.match(rf"checkpoint: its {name} is '.*', not of type \w+$", refusal(RunStatus.from_saved, saved))


@pytest.mark.parametrize(
    "saved", [{}, {"data": 3}, {"data": {}, "batch_size": 2}, {"data": {"next_batch": 1}, "batch_size": "a"}]
)
def test_a_checkpoint_without_a_position_is_refused(saved):
    assert refusal(_data_position, saved, 4).startswith("checkpoint: it holds no position in the data; ")


@pytest.mark.fault("a link in the place of a file that is written", "not followed")
def test_nothing_is_shipped_through_a_link(model_dir, tmp_path):
    (model_dir / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("untouched")
    for name in ("metrics.jsonl", "config.json", "model.safetensors"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    checkpoint.ship(model_dir, tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "untouched"
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == "{}\n"


def test_directories_that_are_no_steps_do_not_count(tmp_path):
    for name in ("5", "0", "007", "\u00b2", "\u0663", "9" * 200, "-1"):
        (tmp_path / name).mkdir()
    assert steps_of(tmp_path) == [0, 5]


def test_a_pipe_is_no_file_to_wait_for(tmp_path):
    for name in ("manifest.json", "x.json"):
        os.mkfifo(tmp_path / name)
    assert manifest.problems(tmp_path) == ["manifest.json is no regular file"]
    assert refusal(files.read_json, tmp_path / "x.json") == f"'{tmp_path / 'x.json'}' is no regular file"

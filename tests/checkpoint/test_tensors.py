"""Weights in one file or in shards with an index: names, sizes, replacement, and one line for what is damaged."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_state import RQVAE, assert_equal, fill, halved, model_state_of, shapes_of

from rq_jax import checkpoint
from rq_jax.checkpoint import model_dir

VARIABLES = jax.tree.map(np.asarray, fill(shapes_of("rqvae")))
SHARD = 3600  # bytes: four shards


def save(directory, variables=VARIABLES, shard_bytes=SHARD, **more):
    checkpoint.save_model(directory, {"model": RQVAE}, variables, shard_bytes=shard_bytes, **more)
    return json.loads((directory / "model.safetensors.index.json").read_text())


def refusal(directory):
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is written ------------------------------------------------------------------------------------------


def test_shards_are_as_hugging_face_has_them(tmp_path):
    index = save(tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    N = len(shards)
    assert N > 2 and shards == [f"model-{i + 1:05d}-of-{N:05d}.safetensors" for i in range(N)]
    leaves = jax.tree_util.tree_leaves_with_path(VARIABLES)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    assert index["metadata"] == {"total_size": sum(leaf.nbytes for _, leaf in leaves)}
    assert list(index["weight_map"]) == names and sorted(set(index["weight_map"].values())) == shards
    found = {}
    for name in shards:
        held = load_file(tmp_path / name)
        assert sum(array.nbytes for array in held.values()) <= SHARD or len(held) == 1
        assert held.keys() == {key for key, shard in index["weight_map"].items() if shard == name}
        found |= held
    for name, (_, leaf) in zip(names, leaves, strict=True):
        np.testing.assert_array_equal(found[name], leaf)
    assert_equal(checkpoint.load_model(tmp_path).variables, VARIABLES)


def test_what_fits_one_shard_is_one_file(tmp_path):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(VARIABLES))
    checkpoint.save_model(tmp_path, {"model": RQVAE}, VARIABLES, shard_bytes=size)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert "params.quant_conv.bias" in load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="^shard_bytes: 0 must be at least 1 and whole"):
        checkpoint.save_model(tmp_path, {"model": RQVAE}, VARIABLES, shard_bytes=0)
    save(tmp_path / "less", shard_bytes=size - 1)
    assert len(list((tmp_path / "less").glob("*.safetensors"))) == 2


def test_a_save_replaces_what_is_there(tmp_path):
    other = jax.tree.map(lambda leaf: leaf + 1, VARIABLES)
    for shard_bytes, variables in ((SHARD, VARIABLES), (4 * SHARD, other), (10**9, VARIABLES), (SHARD, other)):
        checkpoint.save_model(tmp_path, {"model": RQVAE}, variables, shard_bytes=shard_bytes)
        assert_equal(checkpoint.load_model(tmp_path).variables, variables)
        weights = {path.name for path in tmp_path.iterdir()} - {"config.json", "model.safetensors.index.json"}
        index = tmp_path / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert weights == named


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(arrays, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(arrays, path)

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, jax.tree.map(lambda leaf: leaf + 1, VARIABLES))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sizes", [(10**9, SHARD), (SHARD, 10**9)], ids=["shards over a file", "a file over shards"])
def test_a_save_that_is_cut_short_leaves_the_old_or_the_new(tmp_path, monkeypatch, sizes):
    other = jax.tree.map(lambda leaf: leaf + 1, VARIABLES)
    replace, unlink, calls = os.replace, pathlib.Path.unlink, []
    checkpoint.save_model(tmp_path, {"model": RQVAE}, VARIABLES, shard_bytes=sizes[0])

    def until(last, change):
        def counted(path, *more, **options):
            if pathlib.Path(path).suffix != ".partial" or change is replace:
                calls.append(path)
                if len(calls) > last:
                    raise KeyboardInterrupt
            return change(path, *more, **options)

        return counted

    for last in range(4):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", until(last, replace))
            patch.setattr(pathlib.Path, "unlink", until(last, unlink))
            checkpoint.save_model(tmp_path, {"model": RQVAE}, other, shard_bytes=sizes[1])
        found = checkpoint.load_model(tmp_path).variables
        expected = other if found["params"]["quant_conv"]["bias"][0] == other["params"]["quant_conv"]["bias"][0] else VARIABLES  # fmt: skip
        assert_equal(found, expected)


def test_shipped_shards_are_a_pair_and_training_starts_from_them(tmp_path):
    save(tmp_path / "run")
    save(tmp_path / "run" / "tokenizer")
    checkpoint.ship(tmp_path / "run", tmp_path / "out", shard_bytes=SHARD)
    loaded = checkpoint.load_model(tmp_path / "out")
    expected = halved(VARIABLES)
    assert_equal(loaded.variables, expected)
    assert_equal(loaded.tokenizer.variables, expected)
    for directory in (tmp_path / "out", tmp_path / "out" / "tokenizer"):
        assert (directory / "model.safetensors.index.json").is_file()
        assert not (directory / "model.safetensors").exists()
    assert checkpoint.step_of(tmp_path / "out") is None
    started = checkpoint.start_from(tmp_path / "out", model_state_of("rqvae", 0))
    assert_equal(jax.device_get(started.variables), expected)


def test_names_of_earlier_files_are_read(tmp_path):
    save(tmp_path)
    for name, sep in (("slashes", "/"), ("dots", ".")):
        (tmp_path / name).mkdir()
        save_file(dict(model_dir.named_leaves(VARIABLES, sep)), tmp_path / name / "model.safetensors")
        checkpoint.write_config(tmp_path / name, {"model": RQVAE})
        assert_equal(checkpoint.load_model(tmp_path / name).variables, VARIABLES)


# --- what is refused ------------------------------------------------------------------------------------------

SECOND = "model-00002-of-00004.safetensors"
INDEX = "model.safetensors.index.json"


def rename_in_index(old, new):
    def damage(directory):
        index = directory / INDEX
        index.write_text(index.read_text().replace(old, new))

    return damage


DAMAGES = {
    "shard missing": (lambda d: (d / SECOND).unlink(), SECOND, "cannot be read ('it is missing"),
    "shard a pipe": (lambda d: ((d / SECOND).unlink(), os.mkfifo(d / SECOND)), SECOND, "cannot be read ('it is missing, or no"),
    "shard truncated": (lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-3]), SECOND, "cannot be read ("),
    "shard of others": (
        lambda d: save_file({"x": np.zeros(2)}, d / SECOND), SECOND, "cannot be read ('it holds other arrays than its index says')",
    ),
    "index missing": (lambda d: (d / INDEX).unlink(), INDEX, "is missing, and shards need it"),
    "index no JSON": (lambda d: (d / INDEX).write_text("{"), INDEX, "is not readable JSON"),
    "index of nothing": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), INDEX, "has no weight_map"),
    "index of a list": (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), INDEX, "has no weight_map"),
    "index leads elsewhere": (rename_in_index(f'"{SECOND}"', f'"../{SECOND}"'), INDEX, f"names '../{SECOND}', which is no file beside it"),
    "index of numbers": (rename_in_index(f'"{SECOND}"', "3"), INDEX, "names '3', which is no file beside it"),
    "index without a name": (rename_in_index(f'"{SECOND}"', '""'), INDEX, "names '', which is no file beside it"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_named(tmp_path, damage):
    save(tmp_path)
    assert (tmp_path / SECOND).is_file()
    make, name, message = DAMAGES[damage]
    make(tmp_path)
    assert refusal(tmp_path).startswith(f"'{tmp_path / name}' {message}")


def test_shards_of_another_model_are_refused(tmp_path):
    variables = {**VARIABLES, "codebook": {"codebook_KE": tuple(np.zeros((3, 4), np.float32) for _ in range(3))}}
    save(tmp_path, variables)
    expected = "'codebook/codebook_KE/0' has shape (3, 4), the config needs (7, 4)"
    assert refusal(tmp_path) == f"'{tmp_path / 'model.safetensors'}': {expected}"

"""A run before its first step: the line about its data, whole paths, devices that are too small for it."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rq_jax import checkpoint, recipes
from rq_jax.devices import sharding
from rq_jax.recipes import outlook


@pytest.mark.parametrize(
    "settings, classes, expected",
    [
        ({"name": "twemoji"}, None, "data: 'twemoji', 7 images to train on, 3 held out, no classes"),
        (
            {"name": "folder", "data_dir": "/a\nb", "label_key": "folder"},
            2,
            r"data: 'folder' in '/a\nb', 7 images to train on, 3 held out, 2 classes of 'folder'",
        ),
        ({"name": "cc3m", "text_key": "caption"}, None, "data: 'cc3m', 7 images to train on, 3 held out, captions of 'caption'"),
    ],
)  # fmt: skip
def test_the_data_are_named_with_their_sizes(settings, classes, expected):
    data = SimpleNamespace(
        train=SimpleNamespace(num_examples=7, num_classes=classes), validation=SimpleNamespace(num_examples=3)
    )
    assert outlook.describe_data(settings, data) == expected


def test_paths_of_a_config_are_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    data = {"data_dir": "~/a [1]", "text_tokenizer": "b.json", "train_split": "x.txt", "validation_split": "train[:9]"}
    config = {
        "tokenizer": "runs/vae",
        "init_from": str(link),
        "data": data,
        "perceptual": {"vgg": None, "heads": "~/h"},
    }
    found = recipes.with_whole_paths(config)
    assert found == {
        "tokenizer": f"{tmp_path}/runs/vae",
        "init_from": str(link),
        "data": {
            "data_dir": "/home/me/a [1]",
            "text_tokenizer": f"{tmp_path}/b.json",
            "train_split": f"{tmp_path}/x.txt",
            "validation_split": "train[:9]",
        },
        "perceptual": {"vgg": None, "heads": "/home/me/h"},
    }
    assert config["tokenizer"] == "runs/vae"
    with pytest.raises(ValueError, match="^'~nobody-here/x': no home directory is known"):
        recipes.with_whole_paths({"data": {"data_dir": "~nobody-here/x"}})


SLOW = "^TOO SLOW: JAX has only CPUs here, on which a step takes {} s or more and this run {} days; start it "
LARGE = "^TOO LARGE: the state alone takes 0.0 GiB of a device, which has 0.0; try, the cheapest "


@pytest.mark.parametrize(
    "flops, steps, size, memory, expected",
    [
        (1e3, 250_000, 3, None, []),
        (0.0, 250_000, 3, 4 * 3, []),
        (1e12, 250_000, 3, 4 * 3, [SLOW.format(40, "115.7")]),
        (1e12, 1, 3, None, [SLOW.format(40, "0.0")]),
        (1e11, 250_000, 3, None, [SLOW.format(4, "11.6")]),
        (1e11, 1, 3, None, []),
        (None, 250_000, 3, 4 * 3 - 1, [LARGE]),
    ],
)
def test_devices_that_are_too_small_are_told(monkeypatch, flops, steps, size, memory, expected):
    monkeypatch.setattr(outlook, "_cores", lambda: 2)
    monkeypatch.setattr(outlook, "_memory", lambda device: memory)
    recipe = SimpleNamespace(
        mesh=sharding.make_mesh(), flops_per_image=flops, model=SimpleNamespace(use_remat=False), accumulates=True,
        optimizer=SimpleNamespace(accumulation_steps=1), abstract_state=lambda: jax.ShapeDtypeStruct((size,), jnp.float32),
    )  # fmt: skip
    found = outlook.shortages(recipe, batch_size=8, total_steps=steps)
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, line), line


def test_the_library_reads_paths_as_the_scripts_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run [1]" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run [1]" / "config.json").write_text('{"model": {"name": "toy"}}')
    assert checkpoint.read_config("~/run [1]") == {"model": {"name": "toy"}}
    assert not checkpoint.has_checkpoint("~/run [1]")
    (tmp_path / "run [1]" / "checkpoints" / "5").mkdir()
    assert checkpoint.has_checkpoint("~/run [1]")

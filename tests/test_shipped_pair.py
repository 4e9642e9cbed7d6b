"""The pairs in checkpoints/: small, self-contained, as good as their figures say."""

import json
import re
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
from PIL import Image

import sample
from rq_jax import checkpoint, metrics
from rq_jax.data import load_tokenizer, make_dataset
from rq_jax.evaluation.conditions import choose_conditions, kind_of
from rq_jax.evaluation.samples import subject_of

ROOT = Path(__file__).parent.parent
PAIR = ROOT / "checkpoints" / "emoji"
AVATARS = ROOT / "checkpoints" / "avatars"
MAX_BYTES = 12e6


@pytest.fixture(scope="module", autouse=True)
def as_a_user():
    with helpers.full_optimization(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def pair():
    return checkpoint.load_model(PAIR)


@pytest.fixture(scope="module")
def figures():
    folder = PAIR / "figures"
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer", "samples", "likelihood")}


@pytest.mark.parametrize("pair", [PAIR, AVATARS])
def test_it_is_small_and_names_no_path(pair):
    weights = [pair / "model.safetensors", pair / "tokenizer" / "model.safetensors"]
    assert sum(path.stat().st_size for path in weights) <= MAX_BYTES
    assert sum(path.stat().st_size for path in pair.rglob("*") if path.is_file()) <= 1.1 * MAX_BYTES
    for directory in (pair, pair / "tokenizer"):
        config = json.loads((directory / "config.json").read_text())
        assert isinstance(config["seed"], int) and config["data"]["data_dir"] is None
        assert "/" not in json.dumps({**config, "class_names": None}) and (directory / "metrics.jsonl").is_file()
    assert re.search("CC.BY 4.0", (pair / "README.md").read_text())


def test_it_draws_by_text_what_its_own_prompts_say():
    loaded, prompts = checkpoint.load_model(AVATARS), json.loads((AVATARS / "prompts.json").read_text())
    assert kind_of(loaded) == "text" and loaded.tokenizer.model.image_shape == (64, 64)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loaded.variables, loaded.tokenizer.variables)))
    tokenizer = load_tokenizer(AVATARS / "text_tokenizer.json", loaded.model.cond_length)
    assert tokenizer.vocab_size <= loaded.model.cond_vocab_size and tokenizer.words_in_pieces(prompts) == []
    assert len(set(prompts)) == len(prompts) == 36
    _, names = choose_conditions(loaded, AVATARS, 36)
    assert names == prompts


def test_it_is_whole(pair):
    assert pair.model.code_shape == pair.tokenizer.model.code_shape == (8, 8, 4)
    assert pair.tokenizer.model.image_shape == (64, 64)
    assert len(pair.config["class_names"]) == pair.model.cond_vocab_size
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((pair.variables, pair.tokenizer.variables)))


def test_the_tokenizer_is_as_good_as_its_figures(pair, figures):
    (found,) = figures["tokenizer"]["results"].values()
    assert found["fingerprint"] == checkpoint.fingerprint(pair.tokenizer.variables)
    data = make_dataset(name="twemoji", split="validation", train=False, batch_size=64, image_size=64)
    images = next(iter(data.iterator()))["image"]
    tokenizer = pair.tokenizer
    apply = jax.jit(lambda v, x: tokenizer.model.apply(v, x, method="reconstruct_by_depth"))
    psnr = np.mean(metrics.psnr(images, apply(tokenizer.variables, images)), axis=-1)
    np.testing.assert_allclose(psnr, found["psnr"], atol=0.7)  # these are some of the pictures that it was measured on
    assert found["images"] == data.num_examples
    assert found["psnr"] == sorted(found["psnr"]) and found["psnr"][-1] >= 27 and found["codes_used"] >= 0.95


def test_samples_have_their_marks(figures):
    names = [name.split()[0] for name in figures["samples"]["kernel_distance"]["of"]]
    assert sorted(names) == ["samples", "training"]
    (images,) = figures["samples"]["samples"]["images"].values()
    assert images == 447 and (PAIR / "figures" / "neighbours.png").is_file()
    assert set(figures["likelihood"]["likelihood"]) == {"train", "validation"}


def test_pictures_come_out_without_any_argument(tmp_path):
    args = sample.parse_args([f"--out={tmp_path}", "--num_images=4", "--batch_size=4"])
    assert Path(args.checkpoint) == AVATARS
    grid = Image.open(sample.run(args))
    pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").iterdir())]
    assert len(pictures) == 4 and all(picture.shape == (64, 64, 3) for picture in pictures)
    assert grid.width > 4 * 64 and all(picture.std() > 10 for picture in pictures)
    settings = json.loads((tmp_path / "settings_000000.json").read_text())
    assert settings.pop("out") == str(tmp_path) and settings["checkpoint"] == "checkpoints/avatars"
    assert str(ROOT) not in json.dumps(settings)
    assert subject_of(tmp_path)["checkpoint"] == "checkpoints/avatars"

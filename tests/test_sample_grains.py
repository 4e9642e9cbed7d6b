"""sample.py with a DQ-Transformer: codes and grains on disk, grain maps given, prefixes, refusals."""

import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_dq_pair
from PIL import Image

import sample
from rq_jax import checkpoint
from rq_jax.evaluation import choices, grain_maps, judges
from rq_jax.grains import cell_weights


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    toy_dq_pair.save_pair(root)
    return root / "transformer"


def draw(trained, out, *flags, num=3):
    grid = sample.run(
        sample.parse_args([f"--checkpoint={trained}", f"--out={out}", f"--num_images={num}", "--batch_size=3", *flags])
    )
    with np.load(out / "codes_000000.npz") as file:
        return grid, file["codes"], file["grains"]


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    return draw(trained, tmp_path_factory.mktemp("drawn") / "out", "--position_top_k=5", "--top_p=0.9")


def test_codes_grains_and_a_grid_with_maps_are_written(trained, drawn):
    grid, codes, grains = drawn
    assert codes.shape == (3, 8, 8, 1) and grains.shape == (3, 4, 4) and 0 < grains.mean() < 1
    coarse = np.asarray(cell_weights(grains, 2)) < 1
    for i in range(3):  # a coarse code stands in all of its cells
        blocks = codes[i, ..., 0].reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(4, 4, 4)
        assert (np.ptp(blocks, axis=-1)[grains[i] == 0] == 0).all()
    assert coarse.any()
    settings = json.loads((grid.parent / "settings_000000.json").read_text())
    assert (settings["position_top_k"], settings["top_p"]) == (5, 0.9)
    image = np.asarray(Image.open(grid))
    assert image.shape[1] == 6 * 64 + 7 * 4  # every image with its map beside it
    loaded = checkpoint.load_model(trained)
    images = loaded.tokenizer.model.apply(loaded.tokenizer.variables, codes, method="decode_codes")
    for i, expected in enumerate(np.clip(127.5 * np.asarray(images) + 127.5, 0, 255)):
        written = np.asarray(Image.open(grid.parent / "images" / f"{i:06d}.png"))
        assert np.abs(written - expected).max() <= 1


def test_grain_maps_of_an_earlier_run_are_kept(trained, drawn, tmp_path):
    grid, codes, grains = drawn
    flags = f"--grains_of={grid.parent / 'codes_000000.npz'}", "--seed=1"
    _, other, same = draw(trained, tmp_path / "out", *flags)
    np.testing.assert_array_equal(same, grains)
    assert (other != codes).any()


def test_grain_maps_of_a_split_are_those_of_its_images(trained, tmp_path):
    from rq_jax.data import make_dataset

    _, _, grains = draw(trained, tmp_path / "out", "--grains_of=validation", num=6)
    loaded = checkpoint.load_model(trained)
    settings = {name: loaded.config["data"][name] for name in ("name", "data_dir", "image_size", "eval_transform")}
    batch = next(make_dataset(**settings, channels=3, split="validation", train=False, batch_size=5).iterator())
    routed = loaded.tokenizer.model.apply(loaded.tokenizer.variables, batch["image"], method="route").grains
    np.testing.assert_array_equal(grains, np.asarray(routed)[[0, 1, 2, 3, 4, 0]])
    later = grain_maps.grains_of(loaded, "validation", np.arange(4, 7))  # row i % 3 belongs to image i
    np.testing.assert_array_equal(later, np.asarray(routed)[[1, 4, 0]])
    again = grain_maps.grains_of(loaded, "validation", np.arange(7, 30))  # more than there are
    np.testing.assert_array_equal(again, routed)


def test_the_best_are_chosen_with_their_grains(trained, tmp_path, monkeypatch):
    program = jax.jit(lambda _, images, wanted: images.astype(jnp.float32).mean((1, 2, 3)))
    judge = judges.Judge("brightness", program, (), np.zeros(3, int))
    monkeypatch.setattr(choices, "classifier_judge", lambda *_: judge)
    grid, every, maps = draw(trained, tmp_path / "all", num=6)
    levels = [np.asarray(Image.open(grid.parent / "images" / f"{i:06d}.png")).mean() for i in range(6)]
    _, codes, grains = draw(trained, tmp_path / "best", "--keep=0.5", "--by=classifier")
    best = [i if levels[i] >= levels[i + 3] else i + 3 for i in range(3)]  # of each class
    np.testing.assert_array_equal(codes, every[best])
    np.testing.assert_array_equal(grains, maps[best])


@pytest.mark.parametrize("count", [4, 64])
def test_a_prefix_keeps_the_first_codes(trained, tmp_path, count):
    grains = np.random.default_rng(0).permutation(np.repeat([0, 1], 24)).reshape(3, 4, 4)
    np.savez(tmp_path / "maps.npz", codes=np.zeros((3, 8, 8, 1), int), grains=grains)
    grid, codes, kept = draw(trained, tmp_path / "first", f"--grains_of={tmp_path / 'maps.npz'}")
    np.testing.assert_array_equal(kept, grains)
    prefix = f"--prefix={grid.parent / 'codes_000000.npz'}", f"--prefix_positions={count}"
    _, others, maps = draw(trained, tmp_path / "out", *prefix, "--seed=7")
    if count == 64:  # all there are
        np.testing.assert_array_equal(others, codes)
        np.testing.assert_array_equal(maps, grains)
        return
    assert (others != codes).any()
    for i in range(3):
        regions = np.argwhere(grains[i] == 0)[:count]
        assert len(regions) == count
        for row, column in regions:
            assert maps[i, row, column] == 0 and others[i, 2 * row, 2 * column] == codes[i, 2 * row, 2 * column]


def test_refused(trained, drawn, tmp_path):
    grid, codes, grains = drawn
    np.savez(tmp_path / "plain.npz", codes=codes)
    np.savez(tmp_path / "codes.npz", codes=np.full_like(codes, 510), grains=grains)
    np.savez(tmp_path / "grid.npz", codes=codes[:, :4], grains=grains)
    np.savez(tmp_path / "grains.npz", codes=codes, grains=grains + 2)
    for flags, message in (
        (["--position_top_p=1.5"], "--position_top_p: 1.5 is outside"),
        ([f"--grains_of={tmp_path / 'plain.npz'}"], "--grains_of: .*plain.npz' holds no grains"),
        ([f"--grains_of={tmp_path / 'grains.npz'}"], "--grains_of: "),
        (["--grains_of=test"], "test"),
        (
            ["--edit_of=train", "--from_depth=1"],
            "^--edit_of: train is for code grids, and the codes of this model have gr",
        ),
        ([f"--prefix={tmp_path / 'codes.npz'}", "--prefix_positions=1"], "--prefix: codes: 510 at"),
        (
            [f"--prefix={tmp_path / 'plain.npz'}", "--prefix_positions=1"],
            "--prefix: its codes have no grains, and this",
        ),
        (
            [f"--prefix={tmp_path / 'grid.npz'}", "--prefix_positions=1"],
            r"--prefix: codes of shape \(4, 8, 1\) are not",
        ),
        ([f"--prefix={tmp_path / 'grains.npz'}", "--prefix_positions=1"], "--prefix: grains"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            draw(trained, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_flags_of_grains_are_refused_for_other_models(drawn, tmp_path):
    grid, *_ = drawn
    codes = grid.parent / "codes_000000.npz"
    for flags, message in (
        (["--position_top_k=3"], "^--position_top_k: 3 is of positions, and this model draws none; leave it out$"),
        ([f"--grains_of={codes}"], "^--grains_of: .* is for models with grains, this one has none; leave it out$"),
        (
            [f"--prefix={codes}", "--prefix_positions=1"],
            "^--prefix: its codes have some grains, and this model has none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sample.run(sample.parse_args([f"--out={tmp_path / 'out'}", *flags]))

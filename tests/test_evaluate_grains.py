"""evaluate.py with grains: shares, codes and bits of images, each code counted once; maps; shipped models and samples."""

import contextlib
import functools
import io

import compilation
import helpers
import jax
import numpy as np
import pytest
import toy_dq_pair

import evaluate
import sample
from rq_jax import checkpoint, losses, metrics
from rq_jax.data import make_dataset
from rq_jax.evaluation.tokenizer import _short_names
from rq_jax.grains import cell_weights, patch_entropy
from rq_jax.pretrained import efficientnet_lite
from rq_jax.report import grids

# Three grains, two codes at each place from tables of unlike size.
DEEP = {
    **toy_dq_pair.TOKENIZER, "num_grains": 3, "code_depth": 2, "codebook_size": (11, 5), "use_shared_codebook": False,
    "router": "random", "fine_ratio": (0.3, 0.4), "thresholds": None,
}  # fmt: skip
NAMES = "tokenizer", "deep"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate_grains")
    toy_dq_pair.save_pair(root)
    toy_dq_pair.save(root / "deep", root / "pictures", DEEP)
    return root


def evaluated(root, *line, out="out"):
    return evaluate.run(evaluate.parse_args([*line, f"--out={root / out}", "--batch_size=8"]))


@pytest.fixture(scope="module")
def measured(root):
    """(record, rows of the grid, what was printed)."""
    rows, printed = {}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        drawn = grids.labelled_grid
        patch.setattr(grids, "labelled_grid", lambda given: rows.update(given) or drawn(given))
        tokenizers = (f"--checkpoint={root / name}" for name in NAMES)
        record = evaluated(root, "tokenizer", *tokenizers, "--no_perceptual", "--distances=none")
    return record, rows, printed.getvalue()


def held_out(root):
    data = make_dataset(name="folder", data_dir=str(root / "pictures"), split="validation", train=False, image_size=16, batch_size=5)  # fmt: skip
    return next(data.iterator())["image"]


def lists_of_codes(codes, grains, num_grains):
    """Of each image its codes (n, D), by loops."""
    lists = []
    for image, grain_map in zip(codes, grains, strict=True):
        side = 1 << (num_grains - 1)
        found = []
        for row, column in np.ndindex(grain_map.shape):
            step = side >> grain_map[row, column]
            found += list(image[row * side : (row + 1) * side : step, column * side : (column + 1) * side : step].reshape(-1, codes.shape[-1]))  # fmt: skip
        lists.append(np.array(found))
    return lists


@pytest.mark.parametrize("name", NAMES)
def test_figures_count_each_code_once(root, measured, name):
    loaded = checkpoint.load_tokenizer(root / name)
    methods = [functools.partial(loaded.model.apply, method=name) for name in ("encode_to_codes", "encode")]
    grained, latents = jax.jit(lambda *given: [method(*given) for method in methods])(loaded.variables, held_out(root))
    codes, grains = map(np.asarray, grained)
    G, sizes = loaded.model.num_grains, loaded.model.codebook_sizes
    lists, found = lists_of_codes(codes, grains, G), measured[0]["results"][str(root / name)]
    assert found["images"] == 5
    assert [found[f"grain_share/grain{g}"] for g in range(G)] == pytest.approx([np.mean(grains == g) for g in range(G)])
    counts = np.array([len(one) for one in lists])
    assert found["codes_per_image/mean"] == pytest.approx(counts.mean())
    assert (found["codes_per_image/least"], found["codes_per_image/most"]) == (counts.min(), counts.max())
    bits = counts.mean() * np.sum(np.log2(sizes)) + grains[0].size * np.log2(G)
    assert found["bits_per_image"] == pytest.approx(bits)
    every = np.concatenate(lists)
    for d, K in enumerate(sizes):
        shares = np.bincount(every[:, d], minlength=K) / len(every)
        assert found["code_usage"][d] == pytest.approx(np.mean(shares > 0))
        entropy = -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))
        assert found["code_perplexity"][d] == pytest.approx(np.exp(entropy), rel=1e-4)
        assert found["code_entropy"][d] == pytest.approx(entropy / np.log(2), rel=1e-4)
    sums = np.cumsum(loaded.model.apply(loaded.variables, codes, method="code_vectors"), axis=-2)
    loss = losses.commitment_loss(latents, sums, cell_weights(grains, G))
    assert np.mean(found["commitment_loss"]) == pytest.approx(float(loss), rel=1e-4)
    vectors = loaded.model.apply(loaded.variables, every, method="code_vectors")
    norms = np.split(np.linalg.norm(vectors, axis=-1), np.cumsum(counts)[:-1])
    expected = np.mean([one.mean(0) for one in norms], axis=0)
    np.testing.assert_allclose(found["code_norm"], expected, rtol=1e-4)


def test_tokenizers_of_one_name_are_told_apart():
    names = _short_names(["runs/a/vae", "runs/b/vae", "runs/other"])
    assert list(names.values()) == ["a/vae", "b/vae", "other"]
    assert list(_short_names(["vae"]).values()) == ["vae"]
    assert list(_short_names(["vae", "a/vae"]).values()) == ["vae", "a/vae"]


def test_what_is_shown(root, measured):
    record, rows, printed = measured
    assert [label.split(":")[0] for label in rows] == ["original", "tokenizer", "tokenizer", "deep", "deep"]
    lines = [line.split()[:-1] for line in printed.splitlines()]  # without the stamp
    for name in NAMES:
        for figure in ("codes_per_image/mean", "bits_per_image"):
            assert [figure, f"{record['results'][str(root / name)][figure]:.4g}"] in lines
    assert (root / "out" / "reconstructions.png").is_file()


RATIOS = 0.25, 0.5, 0.75


@pytest.fixture(scope="module")
def at_ratios(root):
    """(record, rows of the sheet, what was printed, compiled programs) of the entropy router at three ratios."""
    sheets, printed = [], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(efficientnet_lite, "load", lambda path: helpers.Means())
        drawn = grids.labelled_grid
        patch.setattr(grids, "labelled_grid", lambda given: sheets.append(given) or drawn(given))
        with compilation.count_compilations() as compiled:
            line = f"--checkpoint={root / 'tokenizer'}", f"--grains={','.join(map(str, RATIOS))}", "--no_perceptual"
            record = evaluated(root, "tokenizer", *line, "--num_subsets=2", "--distances=full", out="ratios")
    return record, sheets[-1], printed.getvalue(), compiled.names


def test_figures_at_each_fine_ratio(root, at_ratios):
    record, loaded = at_ratios[0], checkpoint.load_tokenizer(root / "tokenizer")
    images = held_out(root)
    entropies = patch_entropy(images, loaded.model.region_size)
    reconstruct = jax.jit(functools.partial(loaded.model.apply, method="reconstruct_by_depth"))
    for ratio, found in zip(RATIOS, record["fine_ratios"][str(root / "tokenizer")], strict=True):
        grains = np.asarray(entropies > found["threshold"])
        # Random images have no ties: the share is the nearest that so many regions have.
        assert found["fine_ratio"] == ratio and grains.sum() == np.rint(ratio * grains.size)
        assert found["grain_share/grain1"] == pytest.approx(grains.mean())
        rebuilt = reconstruct(loaded.variables, images, grains=grains.astype(np.int32))
        psnr = float(np.mean(metrics.psnr(images, rebuilt)))
        assert found["psnr"] == [pytest.approx(psnr, rel=1e-4)]
        name = f"reconstructions by {root / 'tokenizer'} at fine ratio {ratio:g}"
        assert found["kernel_distance"] == record["kernel_distance"]["of"][name]["mean"]


def test_one_program_serves_all_fine_ratios(at_ratios):
    names = at_ratios[3]
    # One more is that of the router's own grains.
    assert names.count("jit(sum_figures)") == names.count("jit(_reconstruct)") == 2, names


def test_fine_ratios_are_shown(root, at_ratios):
    record, rows, printed, _ = at_ratios
    figures = record["fine_ratios"][str(root / "tokenizer")]
    expected = ["original"]
    for each in figures:
        expected += [f"fine {each['fine_ratio']:g}: {each['codes_per_image/mean']:.0f} codes"]
        expected += [f"fine {each['fine_ratio']:g}: {each['psnr'][0]:.1f} dB"]
    assert list(rows) == expected
    assert "fine ratio  given  PSNR, dB" in printed and f"{figures[1]['bits_per_image']:.4g}\n" in printed
    assert {path.name for path in (root / "ratios").iterdir()} == {
        "features", "fine_ratios.png", "fine_ratio_curves.png", "reconstructions.png", "tokenizer.json",
    }  # fmt: skip


def test_shipped_models_keep_their_grains_and_their_samples_are_measured(root, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "load", lambda path: helpers.Means())
    checkpoint.ship(root / "transformer", root / "shipped")
    before, after = (checkpoint.load_model(root / name) for name in ("transformer", "shipped"))
    assert (after.model, after.tokenizer.model) == (before.model, before.tokenizer.model)
    route = jax.jit(functools.partial(after.tokenizer.model.apply, method="route"))
    grains = [np.asarray(route(one.tokenizer.variables, held_out(root)).grains) for one in (before, after)]
    np.testing.assert_array_equal(*grains)
    assert 0 < grains[0].mean() < 1
    flags = f"--checkpoint={root / 'shipped'}", f"--out={root / 'samples'}", "--num_images=6", "--batch_size=3"
    sample.run(sample.parse_args(list(flags)))
    data = "--data_name=folder", f"--data_dir={root / 'pictures'}"
    line = "samples", f"--samples={root / 'samples'}", *data
    record = evaluated(root, *line, "--subset_size=2", "--num_subsets=2", "--no_manifold", out="drawn")
    drawn = f"samples {root / 'samples'}"
    assert record["samples"]["images"] == {str(root / "samples"): 6}
    distance = record["kernel_distance"]["of"]
    assert distance[drawn]["mean"] > distance["training pictures"]["mean"]

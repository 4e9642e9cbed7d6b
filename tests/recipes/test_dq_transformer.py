"""Stage 2 of packed codes: the objective by hand, micro-batches, devices, whole runs with resume, what is refused."""

import dataclasses
import functools
import json
import shutil
from typing import Any, NamedTuple

import helpers
import jax
import numpy as np
import pytest

from rq_jax import checkpoint, grains, recipes, sampling
from rq_jax.data.text import train_tokenizer
from rq_jax.devices import sharding
from rq_jax.evaluation import likelihood
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.models.flops import transformer_flops
from rq_jax.recipes import latent_cache
from rq_jax.recipes.codes import CodeCounter
from rq_jax.recipes.dq_transformer import DQTransformer
from rq_jax.training import run

B, K = 16, helpers.CODEBOOK_SIZE
RATE = 1000.0  # of SGD: the difference of the parameters is the gradient to all digits
PLAIN = {
    "model__embedding_dropout": 0.0,
    "model__attention_dropout": 0.0,
    "model__residual_dropout": 0.0,
    "optim__name": "sgd",
    "optim__learning_rate": RATE,
    "optim__weight_decay": 0.0,
    "data__batch_size": B,
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


class Places(NamedTuple):
    pictures: Any
    tokenizer: Any
    deep: Any  # three grains, two codes at each position
    text_tokenizer: Any
    root: Any


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    pictures = helpers.write_pictures(root / "pictures")
    train_tokenizer((path.read_text() for path in sorted(pictures.rglob("*.txt"))), 40, root / "bpe.json")
    tokenizer = helpers.save_dq_tokenizer(root / "tokenizer", pictures)
    three = {"preset": "imagenet256_triple_entropy", "model__fine_ratio": (0.3, 0.4), "model__code_depth": 2}
    deep = helpers.save_dq_tokenizer(root / "deep", pictures, **three)
    return Places(pictures, tokenizer, deep, root / "bpe.json", root)


def make_config(places, kind="class", **settings):
    if kind == "text":
        settings = {"data__text_tokenizer": str(places.text_tokenizer), **settings}
    return helpers.dqtransformer_config(places.pictures, kind, **{"tokenizer": str(places.tokenizer), **settings})


class Step(NamedTuple):
    """A step that was made: what went in and what came out."""

    recipe: DQTransformer
    batch: Any
    start: Any
    end: Any
    metrics: Any

    @property
    def grads(self) -> Any:
        return jax.tree.map(lambda a, b: np.asarray(a - b) / RATE, self.start.params, self.end.params)


def make_step(places, kind="class", mesh=None, **settings) -> Step:
    mesh = mesh or helpers.make_mesh()
    recipe, data, _ = recipes.prepare(make_config(places, kind, **{**PLAIN, **settings}), mesh=mesh)
    batch = next(data.train.iterator())
    batch = {name: batch[name] for name in ("image", "cond")}
    variables = helpers.drawn_variables(recipe.model.clone(residual_dropout=0.0, use_remat=False), 1)
    if recipe.model.uses_codebook:
        variables["codebook"] = {"codebook_KE": recipe.tokenizer.variables["codebook"]["codebook_KE"]}
    state = helpers.place(helpers.start_state(recipe, variables), mesh)
    end, metrics = helpers.jit_update(recipe)(state, sharding.put_batch(mesh, batch), recipe.frozen)
    return Step(recipe, batch, state, end, jax.device_get(metrics))


# --- the objective -----------------------------------------------------------------------------------------------------


def encode(recipe, images) -> grains.GrainedCodes:
    tokenizer = recipe.tokenizer
    run = jax.jit(functools.partial(tokenizer.model.apply, method="encode_to_codes"))
    return jax.device_get(run(tokenizer.variables, images))


def nats_by_hand(model, variables, codes, cond=None):
    """Nats of every counted token, token by token: lists by grain of positions and by depth of contents, and text logits."""
    output = jax.jit(model.apply)(variables, grains.pack(codes, model.layout), cond)
    tokens, layout = jax.device_get(output.tokens), model.layout
    log_position, log_content = (np.asarray(jax.nn.log_softmax(x)) for x in output[:2])
    positions, contents = [[] for _ in range(model.num_grains)], [[] for _ in range(model.code_shape[-1])]
    for i, length in enumerate(tokens.length):
        for t in range(1, length):
            positions[tokens.grain[i, t]].append(-log_position[i, t - 1, tokens.position[i, t]])
            for d, content in enumerate(tokens.content[i, t]):
                if content != layout.content_pad:
                    contents[d].append((content, -log_content[i, t - 1, d, content]))
    return positions, contents, output.cond_logits


@pytest.fixture(scope="module")
def base(places):
    return make_step(places)


def check_losses(step, cond) -> Any:
    variables, codes = step.start.variables, encode(step.recipe, step.batch["image"])
    positions, contents, cond_logits = nats_by_hand(step.recipe.model, variables, codes, cond)
    np.testing.assert_allclose(step.metrics["position_loss"], [np.mean(each) for each in positions], rtol=1e-5)
    content_loss = [np.mean([nats for _, nats in each]) for each in contents]
    np.testing.assert_allclose(step.metrics["content_loss"], content_loss, rtol=1e-5)
    return cond_logits


def test_objective_of_a_step(base):
    check_losses(base, base.batch["cond"])
    expected = base.metrics["content_loss"].mean() + base.metrics["position_loss"].mean()
    np.testing.assert_allclose(base.metrics["loss"], expected, rtol=1e-6)
    scalars = base.recipe.summarize(base.metrics)
    assert {"content_loss/depth1", "position_loss/grain0", "position_loss/grain1"} <= scalars.keys()


@pytest.mark.slow
def test_text_three_grains_and_two_codes_with_conditions_left_out(places):
    """In micro-batches, of which one may have more captions than the other."""
    weights = {"loss__content_weight": 0.7, "loss__position_weight": 0.5, "loss__text_weight": 0.3}
    null = {"loss__cond_dropout": 0.4, "model__use_null_cond": True}
    settings = {"tokenizer": str(places.deep), "model__depth_layers": 1, "optim__accumulation_steps": 2}
    step = make_step(places, "text", **weights, **null, **settings)
    rng = step.start.rng_of_step("cond")["cond"]
    dropped = np.asarray(jax.random.bernoulli(rng, 0.4, (B, 1)))
    assert 0 < dropped.sum() < B
    cond = step.batch["cond"]
    logits = check_losses(step, np.where(dropped, step.recipe.model.cond_vocab_size, cond))
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), cond[:, 1:, None], -1)
    text_loss = nats[~dropped[:, 0]].mean()
    np.testing.assert_allclose(step.metrics["text_loss"], text_loss, rtol=1e-5)
    content, position = (step.metrics[f"{name}_loss"].mean() for name in ("content", "position"))
    np.testing.assert_allclose(step.metrics["loss"], 0.7 * content + 0.5 * position + 0.3 * text_loss, rtol=1e-6)


def test_micro_batches_of_unlike_lengths_make_the_step_of_one(places, base):
    numbers = np.asarray(grains.num_codes(encode(base.recipe, base.batch["image"]).grains, 2))
    halves = sharding.micro_batches(numbers, 2).sum(1)
    assert abs(halves[0] - halves[1]) > 10  # where a mean of means would be another
    step = make_step(places, optim__accumulation_steps=2)
    helpers.assert_close(step.metrics, base.metrics)
    helpers.assert_close(without_key_bias(step.grads), without_key_bias(base.grads))


@pytest.mark.parametrize(
    ("shape", "num_steps"), [((8, 1, 1), 2), pytest.param((2, 2, 2), 1, marks=pytest.mark.slow)], ids=["data", "all"]
)
def test_eight_devices_make_the_step_of_one(places, shape, num_steps):
    settings = {"optim__accumulation_steps": num_steps, "model__residual_dropout": 0.1}
    one = make_step(places, **settings)
    eight = make_step(places, mesh=helpers.make_mesh(*shape), **settings)
    helpers.assert_close(eight.metrics, one.metrics)
    helpers.assert_close(without_key_bias(jax.device_get(eight.grads)), without_key_bias(one.grads))


def without_key_bias(tree):
    """A key's bias adds the same to all scores of a query: all of its gradient is rounding."""

    def cut(path, leaf):
        return leaf[:, [0, 2]] if "qkv_bias_3NA" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(cut, tree)


# --- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(places):
    settings = {"loop__ema_decay": 0.9, "data__flip_probability": 0.5}
    return recipes.prepare(make_config(places, **settings), mesh=helpers.make_mesh())


@pytest.fixture(scope="module")
def whole_run(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(*prepared, workdir)


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(prepared, whole_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        helpers.interrupt_at_log(patch, DQTransformer, 3)
        run(*prepared, tmp_path)
    state = run(*prepared, tmp_path)
    helpers.assert_equal(helpers.host(state), helpers.host(whole_run[1]))
    assert helpers.read_metrics(tmp_path) == helpers.read_metrics(whole_run[0])


def codes_of(dataset, recipe) -> list[np.ndarray]:
    """All codes (n, D) of each image, one of a coarse region once."""
    images = dataset.examples(np.arange(dataset.num_examples))["image"]
    packed = grains.pack(encode(recipe, images), recipe.model.layout)
    return [content[content[:, 0] < K] for content in np.asarray(packed.content)]


def positions_of(dataset, recipe, g) -> np.ndarray:
    """The positions of grain g that are to be predicted, of all images."""
    images = dataset.examples(np.arange(dataset.num_examples))["image"]
    packed = jax.tree.map(np.asarray, grains.pack(encode(recipe, images), recipe.model.layout))
    is_token = np.arange(packed.grain.shape[1]) < packed.length[:, None]
    return packed.position[:, 1:][(is_token & (packed.grain == g))[:, 1:]]


def test_figures_of_held_out_images(prepared, whole_run):
    workdir, _ = whole_run
    recipe, data, _ = prepared
    loaded, logged = checkpoint.load_model(workdir), helpers.read_metrics(workdir)[4]
    batch = data.validation.examples(np.arange(data.validation.num_examples))
    positions, contents, _ = nats_by_hand(loaded.model, loaded.variables, encode(recipe, batch["image"]), batch["cond"])
    of_codes = [nats for content, nats in contents[0] if content < K]
    every_position = [nats for each in positions for nats in each]
    expected = {
        "validation_nats/depth1": np.mean(of_codes),
        "validation_nats/position": np.mean(every_position),
        "validation_nats/grain0": np.mean(positions[0]),
        "validation_nats/grain1": np.mean(positions[1]),
        "validation_loss": np.mean(of_codes) + np.mean([np.mean(each) for each in positions]),
        "bits_per_image": (sum(of_codes) + sum(every_position)) / data.validation.num_examples / np.log(2),
    }
    counts = np.bincount(np.concatenate(codes_of(data.ordered, recipe))[:, 0], minlength=K) + 1
    expected["unigram_nats/depth1"] = -np.log(counts / counts.sum())[
        np.concatenate(codes_of(data.validation, recipe))[:, 0]
    ].mean()
    marks = []
    for g, symbols in enumerate((16 + 1, 64 + 2)):  # cells, an end, a start that something predicts
        counts = np.ones(recipe.model.layout.position_sos(g) + 1)
        np.add.at(counts, positions_of(data.ordered, recipe, g), 1)
        special = [recipe.model.layout.position_pad(g), *[recipe.model.layout.position_sos(g)] * (g == 0)]
        counts[special] = 0
        assert np.count_nonzero(counts) == symbols
        with np.errstate(divide="ignore"):
            marks.append(-np.log(counts / counts.sum())[positions_of(data.validation, recipe, g)])
        expected[f"unigram_nats/grain{g}"] = marks[g].mean()
    expected["unigram_nats/position"] = np.concatenate(marks).mean()
    for name, value in expected.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-5, err_msg=name)


def test_figures_of_before_are_measured_again(prepared, whole_run, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    recipe, data, _ = prepared
    figures = recipe.start(workdir, data, False)[0].figures
    tokens = 4 + np.array([len(codes) for codes in codes_of(data.ordered, recipe)])
    assert figures.tokens_per_image == pytest.approx(tokens.mean()) and 20 < tokens.mean() < 68
    started = dataclasses.replace(recipe, figures=figures)
    expected = sum(transformer_flops(recipe.model, train=True, tokens=round(tokens.mean())).values())
    assert started.flops_per_image == expected < recipe.flops_per_image
    measured = []
    monkeypatch.setattr(CodeCounter, "measure", lambda *_: measured.append(1) or figures)
    recipe.start(workdir, data, False)
    assert not measured
    record = json.loads((workdir / "codes.json").read_text())
    del record["figures"]["position_nats_G"]
    (workdir / "codes.json").write_text(json.dumps(record))
    recipe.start(workdir, data, False)
    assert measured == [1]
    shares = recipe.tokenizer._replace(model=recipe.tokenizer.model.clone(fine_ratio=0.3))
    dataclasses.replace(recipe, tokenizer=shares).start(workdir, data, False)
    assert measured == [1, 1]


# --- the cache of codes ------------------------------------------------------------------------------------------------


def test_cache_holds_the_codes_of_either_view(places, tmp_path, caplog):
    cached = {"loop__use_latent_cache": True, "data__flip_probability": 0.5}
    recipe, data, _ = recipes.prepare(make_config(places, **cached), mesh=helpers.make_mesh())
    arguments = recipe.tokenizer_variables, data.ordered, recipe.config["data"], tmp_path, recipe.seed
    iterator, mirrored = latent_cache.open_cache(recipe.tokenizer.model, *arguments).iterator(), []
    for _ in range(3):
        batch = next(iterator)
        images = data.train.examples(batch["index"])["image"]
        views = [encode(recipe, view) for view in (images, images[:, :, ::-1])]
        fits = np.stack([(view.codes == batch["codes"]).all((1, 2, 3)) for view in views])
        assert fits.any(0).all()
        for i, view in enumerate(fits.argmax(0)):
            np.testing.assert_array_equal(batch["grains"][i], views[view].grains[i])
        mirrored += list(fits.argmax(0))
    assert 0 < sum(mirrored) < len(mirrored)
    latent_cache.open_cache(recipe.tokenizer.model.clone(fine_ratio=0.3), *arguments)
    words = "the codes are computed again: tokenizer.fine_ratio is 0.3, and was 0.5"
    assert caplog.messages[-1] == f"'{tmp_path / 'codes'}': {words}"


def test_a_step_on_cached_codes_is_that_on_images(places, base):
    codes = encode(base.recipe, base.batch["image"])
    batch = {"codes": codes.codes, "grains": codes.grains, "cond": base.batch["cond"]}
    update = helpers.jit_update(base.recipe, read=lambda state, metrics: metrics)
    helpers.assert_close(update(base.start, batch, base.recipe.frozen), base.metrics, 1e-6)


def test_likelihood_of_a_run_is_what_it_logged(whole_run):
    workdir, _ = whole_run
    loaded, settings = likelihood.load_transformer(str(workdir))
    data = EvaluationData(settings, "validation", 4)  # two batches, the last filled up
    figures = likelihood.measure_likelihood(loaded, data, "validation", helpers.make_mesh())
    logged = helpers.read_metrics(workdir)[4]
    names = {"mean": "depth1", "mean_position_nats": "position"}
    for name, of in names.items():
        np.testing.assert_allclose(figures[name], logged[f"validation_nats/{of}"], rtol=1e-5)
    np.testing.assert_allclose(figures["bits_per_image"], logged["bits_per_image"], rtol=1e-5)
    assert figures["images"] == 5 and len(figures["position_nats"]) == 2


def test_a_run_draws_and_can_be_drawn_from(whole_run):
    workdir, _ = whole_run
    assert (workdir / "pictures" / "samples_00000004.png").is_file()
    loaded = checkpoint.load_model(workdir)
    drawn = sampling.generate(loaded.model, loaded.variables, jax.random.key(0), 2, [0, 3])
    images = loaded.tokenizer.model.apply(loaded.tokenizer.variables, drawn, method="decode_codes")
    assert images.shape == (2, 16, 16, 3)


# --- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "too few slots": ({"model__num_slots": 67}, "^model.num_slots: 67 .*68.*"),
    "other grains": ({"model__num_grains": 3}, "^model.num_grains: 3 differs from the tokenizer's 2; leave it unset$"),
    "another grid": ({"model__code_shape": (4, 4, 1)}, r"^model.code_shape: \(4, 4, 1\) differs from the tokenizer's"),
    "filter of positions": ({"sample__position_top_p": 1.5}, "^sample.position_top_p: 1.5"),
    "weight": ({"loss__position_weight": -1.0}, "^loss.position_weight: -1.0"),
    "cached crops": (
        {"loop__use_latent_cache": True, "data__train_transform": "resize_random_crop"},
        "^loop.use_latent_cache: .*'resize_center_crop'.*'resize_random_crop'",
    ),
    "no tokenizer": ({"tokenizer": None}, "^config.tokenizer: unset; .* of configs/dqvae.py:imagenet256,quicktest$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(places, monkeypatch, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        recipes.prepare(make_config(places, **settings), mesh=helpers.make_mesh())
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_grains_is_refused(places):
    tokenizer = helpers.save_tokenizer(places.root / "rq", places.pictures)
    with pytest.raises(
        ValueError, match="^tokenizer: '.*' holds a 'rqvae', whose regions have equal numbers of codes; a"
    ):
        recipes.prepare(make_config(places, tokenizer=str(tokenizer)))

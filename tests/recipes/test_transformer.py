"""Stage 2: what its step computes, on one device and on eight, and every switch of it."""

import dataclasses
import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rq_jax import checkpoint, losses, models, quantize, recipes
from rq_jax.data import Dataset
from rq_jax.data.text import train_tokenizer
from rq_jax.devices import sharding
from rq_jax.recipes import codes as frozen_codes
from rq_jax.recipes.transformer import Losses, Transformer
from rq_jax.training.state import TrainState

(h, w, D), E, K = helpers.CODE_SHAPE, helpers.CODE_DIM, helpers.CODEBOOK_SIZE
RATE = 1000.0  # of SGD: so much larger than the parameters that their difference is the gradient to all digits
PLAIN = {
    "model__residual_dropout": 0.0,
    "optim__name": "sgd",
    "optim__learning_rate": RATE,
    "optim__weight_decay": 0.0,
    "optim__clip_norm": None,
    "loop__ema_decay": 0.9,
}
DETERMINISTIC = {"loss__use_stochastic_codes": False}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


@dataclasses.dataclass
class World:
    """Pictures, a tokenizer, a text tokenizer, and a batch of 16 with its latents."""

    pictures: Any
    tokenizer: Any
    text_tokenizer: Any
    batch: dict[str, np.ndarray]
    latents: np.ndarray


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    pictures = helpers.write_pictures(root / "pictures")
    tokenizer = helpers.save_tokenizer(root / "tokenizer", pictures)
    train_tokenizer((path.read_text() for path in sorted(pictures.rglob("*.txt"))), 40, root / "bpe.json")
    config = helpers.transformer_config(pictures, "class", tokenizer=str(tokenizer), data__batch_size=16)
    recipe, data, _ = recipes.prepare(config, mesh=helpers.make_mesh())
    batch = next(data.train.iterator())
    encode = jax.jit(functools.partial(frozen_codes.encode, recipe.tokenizer.model))
    latents = np.asarray(encode(recipe.tokenizer_variables, batch["image"]))
    return World(pictures, tokenizer, root / "bpe.json", batch, latents)


@dataclasses.dataclass
class Step:
    """A step that was made: what went in and what came out."""

    recipe: Transformer
    dataset: Dataset
    start: TrainState
    end: TrainState
    metrics: dict[str, np.ndarray]

    @property
    def grads(self) -> Any:
        """The gradients behind a step of SGD."""
        return jax.tree.map(lambda a, b: np.asarray(a - b) / RATE, self.start.params, self.end.params)


def loss_terms(state, metrics):
    """A program of these alone has no backward pass."""
    return None, {name: metrics[name] for name in metrics if name.endswith("loss")}


@functools.cache
def compiled_step(pictures, kind, mesh, read, settings):
    """(recipe, data set, state before the first step, the jitted step)."""
    config = helpers.transformer_config(pictures, kind, **dict(settings))
    recipe, data, _ = recipes.prepare(config, mesh=mesh)
    codebook = {"codebook_KE": recipe.tokenizer.variables["codebook"]["codebook_KE"]}
    model = recipe.model.clone(residual_dropout=0.0, use_remat=False, dtype="float32")  # that draws the same
    state = helpers.start_state(recipe, {**helpers.drawn_variables(model, 1), "codebook": codebook})
    return recipe, data.train, helpers.place(state, mesh), helpers.jit_update(recipe, read=read)


def make_step(world, kind="class", mesh=None, state=None, batch=None, read=helpers.whole, **settings) -> Step:
    """One step of the small transformer, from latents unless the batch says otherwise."""
    mesh = mesh or helpers.make_mesh()
    settings = {**PLAIN, "tokenizer": str(world.tokenizer), "data__batch_size": 16, **settings}
    if kind == "text":
        settings["data__text_tokenizer"] = str(world.text_tokenizer)
    recipe, dataset, start, step = compiled_step(world.pictures, kind, mesh, read, tuple(sorted(settings.items())))
    if batch is None:
        batch = {"latents": world.latents}
    if kind == "class":
        batch = {**batch, "cond": world.batch["cond"]}
    elif kind == "text":
        batch = {**batch, "cond": dataset.examples(world.batch["index"])["cond"]}
    state = start if state is None else helpers.place(state, mesh)
    end, metrics = step(state, sharding.put_batch(mesh, batch), recipe.frozen)
    return Step(recipe, dataset, state, end, jax.device_get(metrics))


@pytest.fixture(scope="module")
def base(world):
    """The step that the switches are compared with: soft labels, codes drawn, no dropout."""
    return make_step(world)


@functools.partial(jax.jit, static_argnames="stochastic")
def draw_codes(latents, codebook, temperature, rng, stochastic):
    return quantize.soft_codes(
        quantize.fold_patches(latents, (h, w)), codebook, D, temperature, rng if stochastic else None
    )


@functools.partial(jax.jit, static_argnames="model")
def apply(model, variables, codes, cond=None):
    output = model.apply(variables, codes, cond)
    cond_logits = None if output.cond_logits is None else jax.nn.log_softmax(output.cond_logits)
    return jax.nn.log_softmax(output.logits), cond_logits


def expected_code_loss(world, step: Step, soft: bool, stochastic: bool, cond=None) -> np.ndarray:
    """Cross-entropy by depth, all in one piece from the model's public output."""
    codebook = step.recipe.tokenizer.variables["codebook"]["codebook_KE"]
    rng = step.start.rng_of_step("codes")["codes"]
    soft_codes, codes = draw_codes(world.latents, codebook, step.recipe.losses.temperature, rng, stochastic)
    cond = world.batch["cond"] if cond is None else cond.reshape(16, -1)
    log_probabilities, _ = apply(step.recipe.model, step.start.variables, codes, cond)
    targets = np.asarray(soft_codes) if soft else np.eye(K)[codes]
    return -(targets * np.asarray(log_probabilities)).sum(-1).mean((0, 1, 2))


# --- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        pytest.param((8, 1, 1), {"optim__learning_rate": 0.1, "optim__clip_norm": 0.1}, marks=pytest.mark.slow),
        pytest.param(
            (8, 1, 1),
            {"optim__name": "adamw", "optim__learning_rate": 1e-3, "optim__accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        ((2, 2, 2), {"optim__learning_rate": 0.1, "optim__clip_norm": 0.1}),
        (
            (2, 2, 2),
            {"optim__learning_rate": 0.1, "optim__accumulation_steps": 2, "optim__use_sharded_gradients": True},
        ),
    ],
    ids=["sgd", "adam, two micro-batches", "parameters split", "gradients split"],
)
def test_eight_devices_make_the_step_of_one(world, shape, settings):
    settings = {"model__residual_dropout": 0.1, **settings}
    batch = {"image": world.batch["image"]}
    one = make_step(world, batch=batch, **settings)
    eight = make_step(world, mesh=helpers.make_mesh(*shape), batch=batch, **settings)
    helpers.assert_close(eight.metrics, one.metrics)
    one_host, eight_host = helpers.host(one.end), helpers.host(eight.end)
    for name in ("opt_state", "params", "ema_params"):
        trees = [eight_host[name], one_host[name]]
        if "optim__name" in settings:
            if name != "opt_state":
                trees = [helpers.where_certain(tree, one_host["opt_state"]) for tree in trees]
            trees = [without_key_bias(tree) for tree in trees]
        helpers.assert_close(*trees)
    helpers.assert_equal(eight_host["model_state"], one_host["model_state"])


def without_key_bias(tree):
    """A key's bias adds the same to all scores of a query: all of its gradient is rounding."""

    def cut(path, leaf):
        return leaf[:, [0, 2]] if "qkv_bias_3NA" in jax.tree_util.keystr(path) else leaf

    return jax.tree_util.tree_map_with_path(cut, tree)


# --- switches of the loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_labels_and_codes_are_what_the_switches_say(world, soft, stochastic):
    settings = {"loss__use_soft_labels": soft, "loss__use_stochastic_codes": stochastic}
    step = make_step(world, read=loss_terms, **settings)
    np.testing.assert_allclose(step.metrics["code_loss"], expected_code_loss(world, step, soft, stochastic), rtol=1e-5)
    np.testing.assert_allclose(step.metrics["loss"], step.metrics["code_loss"].mean(), rtol=1e-6)
    others = [(s, d) for s in (False, True) for d in (False, True) if (s, d) != (soft, stochastic)]
    for other in others:
        assert np.abs(expected_code_loss(world, step, *other) - step.metrics["code_loss"]).max() > 1e-4


def test_without_both_switches_the_codes_are_the_tokenizers(world):
    loss, tokenizer = Losses(use_stochastic_codes=False), load_tokenizer(world)
    codes, residuals = loss.draw(world.latents, tokenizer.model, tokenizer.variables["codebook"]["codebook_KE"], None)
    encode_to_codes = jax.jit(functools.partial(tokenizer.model.apply, method="encode_to_codes"))
    np.testing.assert_array_equal(codes, encode_to_codes(tokenizer.variables, world.batch["image"]))
    np.testing.assert_allclose(residuals[..., 0, :], quantize.fold_patches(world.latents, (h, w)), atol=1e-6)


def load_tokenizer(world):
    return checkpoint.load_tokenizer(world.tokenizer)


def test_temperature_is_that_of_the_soft_codes(world):
    step = make_step(world, read=loss_terms, loss__temperature=2.0, **DETERMINISTIC)
    np.testing.assert_allclose(step.metrics["code_loss"], expected_code_loss(world, step, True, False), rtol=1e-5)


def test_image_weight_scales_the_loss_alone(world, base):
    step = make_step(world, loss__image_weight=0.25)
    np.testing.assert_array_equal(step.metrics["code_loss"], base.metrics["code_loss"])
    np.testing.assert_allclose(step.metrics["loss"], 0.25 * base.metrics["loss"], rtol=1e-6)
    helpers.assert_close(step.grads, jax.tree.map(lambda g: 0.25 * g, base.grads))


def test_text_loss_is_weighed_against_the_codes(world):
    step = make_step(world, "text", read=loss_terms, loss__image_weight=0.7, loss__text_weight=0.3)
    tokens = step.dataset.examples(world.batch["index"])["cond"]
    codes = jnp.zeros((16, h, w, D), jnp.int32)  # nothing in front of a caption depends on the codes
    _, cond_log_probabilities = apply(step.recipe.model, step.start.variables, codes, tokens)
    text_loss = -np.take_along_axis(np.asarray(cond_log_probabilities), tokens[:, 1:, None], -1).mean()
    np.testing.assert_allclose(step.metrics["text_loss"], text_loss, rtol=1e-5)
    expected = expected_code_loss(world, step, True, True, tokens)
    np.testing.assert_allclose(step.metrics["code_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(step.metrics["loss"], 0.7 * expected.mean() + 0.3 * text_loss, rtol=1e-5)


def test_dropped_conditions_are_the_null_condition(world):
    step = make_step(world, loss__cond_dropout=0.4, model__use_null_cond=True)
    rng = step.start.rng_of_step("cond")["cond"]
    dropped_B = np.asarray(jax.random.bernoulli(rng, 0.4, (16, 1)))[:, 0]
    assert 0 < dropped_B.sum() < 16
    cond = np.where(dropped_B, len(helpers.CLASSES), world.batch["cond"][:, 0])
    np.testing.assert_allclose(step.metrics["code_loss"], expected_code_loss(world, step, True, True, cond), rtol=1e-5)
    grads_VM = step.grads["cond_embedding_VM"]
    used = np.isin(np.arange(len(grads_VM)), cond)
    np.testing.assert_array_equal(np.any(grads_VM != 0, axis=1), used)
    assert used[-1]


def test_null_condition_changes_nothing_for_conditions_that_are_kept(world, base):
    params = base.start.params
    padded = {**params, "cond_embedding_VM": jnp.pad(params["cond_embedding_VM"], ((0, 1), (0, 0)))}
    settings = {"model__use_null_cond": True, "loss__cond_dropout": 1e-9}
    null = make_step(world, **settings)
    again = make_step(world, state=null.start.replace(params=padded, ema_params=padded), **settings)
    helpers.assert_close(again.metrics["loss"], base.metrics["loss"])
    np.testing.assert_allclose(again.grads["cond_embedding_VM"][:-1], base.grads["cond_embedding_VM"], atol=1e-7)


# --- chunks of the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_chunks_change_neither_loss_nor_gradient(world, base, monkeypatch, soft):
    recipe, rng = base.recipe, np.random.default_rng(0)
    loss = dataclasses.replace(recipe.losses, use_soft_labels=soft)
    codebook = recipe.tokenizer.variables["codebook"]["codebook_KE"]
    codes, residuals = loss.draw(world.latents, recipe.model, codebook, jax.random.key(0))
    hidden = rng.normal(size=(16, h, w, D, recipe.model.model_dim)).astype(np.float32)

    def nats(params, hidden):
        variables = {**base.start.variables, "params": params}
        nats_BD = loss.code_nats(recipe.model, variables, hidden, codes, residuals, codebook)
        return nats_BD.mean(), nats_BD

    def value_and_grads():
        return jax.jit(jax.value_and_grad(lambda *x: nats(*x), (0, 1), has_aux=True))(base.start.params, hidden)

    whole, asked = value_and_grads(), []
    monkeypatch.setattr(losses, "num_loss_chunks", lambda *sizes: asked.append(sizes) or 4)
    chunked = value_and_grads()
    assert asked[0][:4] == (16, h * w, D, K)
    helpers.assert_close(chunked, whole)
    assert np.abs(whole[1][1]).max() > 0


def test_loss_at_paper_size_holds_a_fraction_of_its_logits():
    """16 pictures a device, K = 16384, M = 1536: logits and soft labels are 256 MB each, and are never there at once."""
    mesh, B, M, K, E = helpers.make_mesh(8), 128, 1536, 16384, 256
    model = models.create(
        "rqtransformer", codebook_size=K, code_shape=(8, 8, 4), code_dim=E, model_dim=M, num_heads=24,
        spatial_layers=1, depth_layers=1,
    )  # fmt: skip
    loss = Losses()

    def mean_loss(params, hidden, codes, residuals, codebook):
        variables = {"params": params, "codebook": {"codebook_KE": codebook}}
        return loss.code_nats(model, variables, hidden, codes, residuals, codebook).mean()

    def shape(dims, dtype, spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    batch, whole = PartitionSpec("data"), PartitionSpec()
    params = jax.tree.map(lambda s: shape(s.shape, s.dtype, whole), models.abstract_variables(model)["params"])
    arguments = (
        params,
        shape((B, 8, 8, 4, M), jnp.float32, batch),
        shape((B, 8, 8, 4), jnp.int32, batch),
        shape((B, 8, 8, 4, E), jnp.float32, batch),
        shape((K, E), jnp.float32, whole),
    )
    lowered = jax.jit(jax.grad(mean_loss, argnums=(0, 1))).lower(*arguments)
    with helpers.full_optimization():
        compiled = lowered.compile()
    logits_bytes = (B // 8) * 8 * 8 * 4 * K * 4
    gradients_bytes = M * K * 4  # of the classifier, summed up over the chunks
    assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes + 2 * gradients_bytes


# --- switches of the model, the optimizer and the loop -----------------------------------------------------------------


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(world):
    # With dropout: the second forward pass has to drop what the first one dropped.
    plain, remat = (make_step(world, model__residual_dropout=0.2, model__use_remat=use) for use in (False, True))
    helpers.assert_close(remat.metrics, plain.metrics)
    helpers.assert_close(remat.grads, plain.grads)


def test_dropout_is_for_training_and_fresh_each_step(world, base):
    settings = {"model__residual_dropout": 0.2, "read": loss_terms, **DETERMINISTIC}
    step = make_step(world, **settings)
    later = make_step(world, state=step.start.replace(step=jnp.int32(1)), **settings)
    plain = expected_code_loss(world, step, True, False)  # the model called without train=True
    assert np.all(step.metrics["code_loss"] != later.metrics["code_loss"])
    assert np.abs(step.metrics["code_loss"] - plain).max() > 1e-5


def test_bfloat16_is_for_the_network(world, base):
    step = make_step(world, read=loss_terms, model__dtype="bfloat16")
    batch = {"latents": world.latents, "cond": world.batch["cond"]}
    end, metrics = jax.eval_shape(step.recipe.update, step.start, batch, step.recipe.frozen)
    state = (end.params, end.model_state, end.opt_state, end.ema_params)
    floats = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {np.dtype("float32")}
    assert {value.dtype for value in jax.tree.leaves(metrics)} <= {np.dtype("float32"), np.dtype("int32")}
    assert helpers.differs(step.metrics["code_loss"], base.metrics["code_loss"])
    np.testing.assert_allclose(step.metrics["code_loss"], base.metrics["code_loss"], rtol=1e-2)


def test_ema_average_leaves_training_alone(world, base):
    batch, texts = {"latents": world.latents, "cond": world.batch["cond"]}, []
    for decay in (0.9, 0.0):
        settings = {**PLAIN, "tokenizer": str(world.tokenizer), "loop__ema_decay": decay}
        config = helpers.transformer_config(world.pictures, "class", **settings)
        recipe = recipes.prepare(config, mesh=helpers.make_mesh()).recipe
        state = helpers.start_state(recipe, base.start.variables)
        texts.append(helpers.program_text(recipe, state, batch, read=helpers.without_average))
    assert state.ema_params is None
    assert texts[0] == texts[1]
    # Step 0 averages with decay 1 / 10.
    average = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, base.start.params, base.end.params)
    helpers.assert_close(base.end.ema_params, average)
    assert helpers.differs(base.end.ema_params, base.end.params)


def test_accumulated_micro_batches_are_the_whole_batch(world):
    whole, split = (make_step(world, optim__accumulation_steps=n, **DETERMINISTIC) for n in (1, 2))
    helpers.assert_close(split.metrics, whole.metrics)
    helpers.assert_close(split.grads, whole.grads)


def test_micro_batches_draw_for_themselves(world):
    # Both micro-batches are the same eight pictures: only what they draw tells them apart.
    rows = world.latents[:8]
    batch = {"latents": np.repeat(rows, 2, axis=0)}
    step = make_step(world, "unconditional", batch=batch, read=loss_terms, optim__accumulation_steps=2)
    rng = step.start.rng_of_step("codes")["codes"]
    codebook = load_tokenizer(world).variables["codebook"]["codebook_KE"]
    expected, draws = 0.0, []
    for i in range(2):
        soft, codes = draw_codes(rows, codebook, 0.5, jax.random.fold_in(rng, i), True)
        log_probabilities, _ = apply(step.recipe.model, step.start.variables, codes)
        expected -= (np.asarray(soft) * np.asarray(log_probabilities)).sum(-1).mean((0, 1, 2)) / 2
        draws.append(codes)
    assert helpers.differs(*draws)
    np.testing.assert_allclose(step.metrics["code_loss"], expected, rtol=1e-5)


def test_latents_stand_in_for_their_pictures(world, base):
    step = make_step(world, batch={"image": world.batch["image"]})
    helpers.assert_close(step.metrics, base.metrics)
    helpers.assert_close(step.grads, base.grads)


def test_codes_of_the_same_latents_are_drawn_anew_each_step(world, base):
    later = make_step(world, state=base.start.replace(step=jnp.int32(1)))
    assert np.all(later.metrics["code_loss"] != base.metrics["code_loss"])
    nearest = make_step(world, **DETERMINISTIC)
    again = make_step(world, state=nearest.start.replace(step=jnp.int32(1)), **DETERMINISTIC)
    np.testing.assert_array_equal(again.metrics["code_loss"], nearest.metrics["code_loss"])

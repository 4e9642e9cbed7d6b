"""Small pictures, configs and runs that the tests of the scripts share."""

import contextlib
import functools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AxisType
from PIL import Image

from configs import dqtransformer, dqvae, rqtransformer, rqvae
from rq_jax import checkpoint, models, recipes
from rq_jax.checkpoint import TEXT_TOKENIZER
from rq_jax.devices import sharding
from rq_jax.quantize import codes, search
from rq_jax.training.monitor import HangGuard
from rq_jax.training.state import TrainState, create_state

ROOT = Path(__file__).parents[1]
# Every number differs from every other, so that no two axes can be mixed up unseen.
CODE_SHAPE, CODE_DIM, CODEBOOK_SIZE = (4, 2, 3), 24, 13
CLASSES = ("ape", "bee", "cat", "dog", "elk")
WORDS = ("red", "green", "round", "tall", "old")


def write_pictures(directory: Path, num_train: int = 20, num_validation: int = 5, size: int = 16) -> Path:
    """Random pictures by class under train/ and validation/, each with a caption beside it."""
    rng = np.random.default_rng(3)
    for split, count in (("train", num_train), ("validation", num_validation)):
        for i in range(count):
            folder = directory / split / CLASSES[i % len(CLASSES)]
            folder.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
            image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR)
            image.save(folder / f"{i:03d}.png")
            caption = f"a {WORDS[i % 3]} {WORDS[i % 5]} {CLASSES[i % 5]}"
            (folder / f"{i:03d}.txt").write_text(caption)
    return directory


def forget_searches() -> None:
    """Of the search's programs, whose blocks and slices are constants: for tests that change these."""
    for program in (codes._nearest, codes._residual_quantize, codes._draw_codes, search._search_many):
        program.clear_cache()


def override(config, **overrides):
    """The config with dotted keys set; "__" stands for the dot."""
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    config.update_from_flattened_dict(values)
    return config


def _common(pictures: Path) -> dict[str, Any]:
    return {
        "data.name": "folder",
        "data.data_dir": str(pictures),
        "data.train_transform": "resize_center_crop",
        "data.flip_probability": 0.0,
        "optim.learning_rate": 1e-3,
        "optim.warmup_steps": 0,
        "optim.schedule": "constant",
        "loop.ema_decay": 0.0,
    }


def vae_config(pictures: Path, **overrides):
    """A tokenizer of 16x16 pictures whose step compiles in a few seconds."""
    settings = {
        "model.code_shape": CODE_SHAPE,
        "model.code_dim": CODE_DIM,
        "model.codebook_size": CODEBOOK_SIZE,
        "model.z_channels": 8,
        "model.attention_resolutions": (),
        "model.width": 64,  # two channels in a group: with one, a norm would cancel every bias before it
        "model.use_remat": False,
        "loss.perceptual_weight": 0.0,
        "loss.adversarial_weight": 0.0,
        "evaluation.use_perceptual": False,
        **_common(pictures),
    }
    config = rqvae.get_config("imagenet256,quicktest")
    config.update_from_flattened_dict(settings)
    return override(config, **overrides)


def dqvae_config(pictures: Path, preset: str = "imagenet256", **overrides):
    """A DQ-VAE of 16x16 pictures whose step compiles in a few seconds."""
    settings = {
        "model.code_dim": 6,
        "model.codebook_size": CODEBOOK_SIZE,
        "model.z_channels": 7,
        "model.attention_resolutions": (),
        "model.width": 8,
        "model.norm_groups": 4,
        "model.use_remat": False,
        "loss.perceptual_weight": 0.0,
        "loss.adversarial_weight": 0.0,
        "evaluation.use_perceptual": False,
        **_common(pictures),
    }
    config = dqvae.get_config(f"{preset},quicktest")
    config.update_from_flattened_dict(settings)
    return override(config, **overrides)


def _transformer(pictures: Path, kind: str) -> dict[str, Any]:
    return {
        "model.model_dim": 28,
        "model.num_heads": 2,
        "model.cond_vocab_size": {"unconditional": 1, "class": len(CLASSES)}.get(kind, 40),
        "model.cond_length": 6 if kind == "text" else 1,
        "model.use_remat": False,
        "model.dtype": "float32",
        "data.label_key": "folder" if kind == "class" else None,
        "data.text_key": "txt" if kind == "text" else None,
        "data.text_length": 6 if kind == "text" else None,
        "optim.accumulation_steps": 1,
        "sample.top_k": None,
        "sample.top_p": None,
        **_common(pictures),
    }


def transformer_config(pictures: Path, kind: str = "unconditional", **overrides):
    """A transformer of a few narrow layers; kind is "unconditional", "class" or "text"."""
    config = rqtransformer.get_config("imagenet256_480m,quicktest")
    layers = {"model.spatial_layers": 2, "model.depth_layers": 1}
    config.update_from_flattened_dict({**_transformer(pictures, kind), **layers})
    return override(config, **overrides)


def dqtransformer_config(pictures: Path, kind: str = "unconditional", **overrides):
    """A transformer over packed codes; kinds as above."""
    config = dqtransformer.get_config("uncond_imagenet_p6c18,quicktest")
    settings = {"model.content_layers": 1, "loop.buckets": (), "loop.bucket_window": 1}
    config.update_from_flattened_dict({**_transformer(pictures, kind), **settings})
    return override(config, **overrides)


@functools.cache
def _drawn_variables(model, seed):
    # Operation by operation: one program of a hundred small draws takes ten times longer to compile.
    return jax.device_get(models.init_variables(model, jax.random.key(seed)))


def drawn_variables(model, seed: int = 0) -> dict[str, Any]:
    """Variables as `init` draws them, on the host: drawn once a process for a model and a seed."""
    return jax.tree.map(lambda x: x, _drawn_variables(model, seed))  # the dictionaries are the caller's own


def filled_variables(model) -> dict[str, Any]:
    """Random variables, every bias and norm included: quicker than compiling `init`, and none is 0 or 1."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[0].key == "codebook":
            return jnp.asarray(noise if leaf.ndim > 1 else 0 * noise)
        if path[-1].key == "kernel":
            return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])))
        return jnp.asarray(0.1 * noise + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(fill, models.abstract_variables(model))


def interrupt_at_log(monkeypatch: pytest.MonkeyPatch, recipe: type, number: int) -> None:
    """A run of this recipe gets Ctrl-C as it writes its log the given time."""
    summarize, logged = recipe.summarize, iter(range(1, 10**6))

    def summarize_and_stop(self, means):
        if next(logged) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return summarize(self, means)

    monkeypatch.setattr(recipe, "summarize", summarize_and_stop)


def save_tokenizer(directory: Path, pictures: Path, seed: int = 0, **overrides) -> Path:
    """A stage-1 model directory with weights as drawn: enough for stage 2 to build on."""
    return _save(directory, vae_config(pictures, **overrides), seed)


def save_dq_tokenizer(directory: Path, pictures: Path, seed: int = 0, **overrides) -> Path:
    """The same of a tokenizer with grains, which are drawn, so that pictures have unlike numbers of codes."""
    return _save(directory, dqvae_config(pictures, model__router="random", **overrides), seed)


def _save(directory: Path, config: Any, seed: int) -> Path:
    variables = drawn_variables(models.create(**config.model), seed)
    checkpoint.save_model(directory, config.to_dict(), variables)
    return directory


def save_transformer(
    directory: Path, pictures: Path, tokenizer: Path, kind: str, bpe: Path | None = None, **overrides
) -> Path:
    """A stage-2 model directory; kinds are those above and "guided". Its weights are large enough for a condition to change the codes."""
    settings = {"tokenizer": str(tokenizer), **overrides}
    if kind == "text":
        settings["data__text_tokenizer"] = str(bpe)
    if kind == "guided":
        settings |= {"model__use_null_cond": True, "loss__cond_dropout": 0.1}
    config = transformer_config(pictures, "class" if kind == "guided" else kind, **settings)
    recipe, data, _ = recipes.prepare(config)
    variables = drawn_variables(recipe.model, 2)
    variables["codebook"] = {"codebook_KE": recipe.tokenizer.variables["codebook"]["codebook_KE"]}
    variables["params"] = jax.tree.map(lambda x: 6 * x, variables["params"])
    written = {**recipe.config, "class_names": data.train.class_names}
    checkpoint.save_model(directory, written, jax.tree.map(np.asarray, variables))
    if kind == "text":
        shutil.copy(bpe, directory / TEXT_TOKENIZER)
    checkpoint.bind_tokenizer(directory, recipe.tokenizer)
    return directory


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1):
    """A mesh over the first devices, as many as asked for."""
    shape = (data, fsdp, tensor)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


all_devices, all_local_devices = sharding.make_mesh, sharding.local_mesh


@contextlib.contextmanager
def one_device():
    """Meshes are of one device, as on most machines: programs of eight take twice as long to compile."""

    @functools.wraps(all_devices)
    def first_device(**axes):
        return make_mesh()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", first_device)
        patch.setattr(sharding, "local_mesh", make_mesh)
        yield


def assert_same_figures(record: Any, expected: Any) -> None:
    """Two records agree: fractions to the rounding of other devices, all else exactly."""
    (values, structure), (wanted, wanted_structure) = (jax.tree.flatten(one) for one in (record, expected))
    assert structure == wanted_structure
    for value, one in zip(values, wanted, strict=True):
        assert value == (pytest.approx(one, rel=1e-4, abs=1e-4) if isinstance(one, float) else one)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """All leaves agree within `tolerance` of the largest value of the expected leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(np.abs(b).max(initial=0.0), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def assert_equal(actual, expected) -> None:
    """All leaves are the same, bit for bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(getattr(a, "dtype", None), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def differs(actual, expected) -> bool:
    """Whether any leaf differs."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def _optimizations(disabled: bool):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", disabled)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def others_slow(values, quick) -> list:
    """Parameters of a test whose cases cost much and differ little: those that are not among `quick` are slow.

    A tuple has a value for each argument.
    """
    values, quick = list(values), list(quick)
    assert all(value in values for value in quick)
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        pytest.param(*row, marks=() if value in quick else pytest.mark.slow)
        for value, row in zip(values, rows, strict=True)
    ]


def quick_compilation():
    """Compile with few optimisations, also where the others are asked for: for tests of what surrounds the programs."""
    return _optimizations(disabled=True)


def full_optimization():
    """Compile as a user does: for tests of speed, memory, and what a compiler may do."""
    return _optimizations(disabled=False)


def host(state) -> dict:
    """What a state holds, as numpy arrays by field."""
    fields = ("step", "params", "model_state", "opt_state", "ema_params", "skipped_steps")
    fields += ("discriminator", "discriminator_opt_state")
    arrays = jax.device_get({name: getattr(state, name) for name in fields})
    return {**arrays, "rng": np.asarray(jax.random.key_data(state.rng))}


def start_state(recipe, variables, discriminator=None) -> TrainState:
    """The state before the first step, from variables drawn before, of the model and of the discriminator."""
    if discriminator is not None:
        discriminator = discriminator, recipe.adversary.optimizer
    return create_state(variables, recipe.optimizer, jax.random.key(5), recipe.ema_decay > 0, discriminator)


def place(state, mesh):
    """The state on a mesh."""
    return jax.device_put(state, sharding.state_shardings(mesh, state))


def zero_state(recipe) -> TrainState:
    """A state of the recipe's shapes in the recipe's places, which no program draws."""
    shapes = recipe.abstract_state()
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes.replace(rng=None))
    return zeros.replace(rng=jax.device_put(jax.random.key(0), shapes.rng.sharding))


def whole(state, metrics):
    """What `jit_update` reads of a step: all of it."""
    return state, metrics


def one_by_one(recipe, phase=None, read=whole):
    """As `jit_update`, on one device and operation by operation.

    Steps that differ in a switch share nearly all operations, each compiled once a process, where a program a switch
    takes seconds. A model that scans over its layers compiles the scan anew each time, and gains nothing.
    """
    return lambda state, batch, frozen: read(*recipe.update(state, batch, frozen, phase))


def jit_update(recipe, phase=None, read=whole):
    """The jitted `update` of a recipe, (state, batch, frozen) -> read(state, metrics); the state is not donated.

    Where a test reads the losses alone, nothing else is compiled: no backward pass, no optimizer.
    """

    def step(state, batch, frozen):
        new, metrics = recipe.update(state, batch, frozen, phase)
        # As `step` asks for it; one device needs no asking.
        new = jax.lax.with_sharding_constraint(new, sharding.state_shardings(recipe.mesh, new))
        return read(new, metrics)

    return jax.jit(step)


def program_text(recipe, state, batch, phase=None, read=whole) -> str:
    """The program of `read(*update(...))` as text, without what `read` leaves out: equal texts compute the same."""

    def step(state, batch, frozen):
        return read(*recipe.update(state, batch, frozen, phase))

    program = jax.make_jaxpr(step)(state, batch, recipe.frozen).jaxpr
    return str(dce_jaxpr(program, [True] * len(program.outvars))[0])


def equations(jaxpr):
    """Every equation of a program, those of its loops and inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def without_average(state, metrics):
    """What `program_text` reads where the average of the weights plays no part."""
    return state.replace(ema_params=None), metrics


class Means(NamedTuple):
    """Features that a test can foresee: the mean colour of each quarter of an image. The first five are logits."""

    name: str = "means"
    variables: dict = {}
    num_features: int = 12

    def features(self, variables, images):
        B, H, W, C = images.shape
        return images.reshape(B, 2, H // 2, 2, W // 2, C).mean((2, 4)).reshape(B, -1)

    def logits(self, variables, features):
        return features[..., :5]


class HeldOut:
    """Batches that count from 0; `faults` maps the number of a batch, over all passes, to what happens before it."""

    steps_per_epoch = 3

    def __init__(self, faults=None):
        self.faults, self.given, self.closed = faults or {}, 0, True

    def iterator(self) -> "HeldOut":
        self.left, self.closed = self.steps_per_epoch, False
        return self

    def __iter__(self):
        while self.left:
            self.faults.get(self.given, lambda: None)()
            self.left, self.given = self.left - 1, self.given + 1
            yield {"x": np.float32([self.steps_per_epoch - self.left])}

    def close(self) -> None:
        self.closed = True


def recording_guard(events: list[str]) -> type[HangGuard]:
    """A hang guard that writes down when it is armed and disarmed, and watches nothing."""

    class Guard(HangGuard):
        def arm(self):
            events.append("arm")

        def disarm(self):
            events.append("disarm")

    return Guard


def select(tree, condition) -> dict:
    """The leaves whose path, as text, meets the condition."""
    leaves = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    return {path: leaf for path, leaf in leaves if condition(path)}


def is_of_the_machine(metric: str) -> bool:
    """Whether a logged figure tells of time and memory, which no two runs share."""
    return metric.endswith(("_per_second", "_gib")) or metric in ("data_wait_share", "mfu")


def read_metrics(workdir):
    """Logged scalars by step, without those that depend on the clock."""
    merged = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        merged.setdefault(step, {}).update({k: v for k, v in record.items() if not is_of_the_machine(k)})
    return merged


def where_certain(params, opt_state) -> Any:
    """The parameters after Adam's first step, with zeros where their gradient is small beside others of its leaf.

    That step is the learning rate in the direction of the gradient, whatever its size: rounding decides there.
    """
    mean_grads = optax.tree.get(opt_state, "mu")
    return jax.tree.map(lambda p, g: np.where(np.abs(g) > 1e-3 * np.abs(g).max(), p, 0), params, mean_grads)

"""The patch discriminator: shapes, initial values, running statistics, ActNorm's first batch, settings it refuses."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import models
from rq_jax.devices import sharding
from rq_jax.models.discriminator import BatchNorm, initialize_actnorm, update_statistics_again

B, H, W, C, WIDTH = 4, 21, 17, 2, 5


def images(seed=0, batch=B):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, H, W, C)).astype(np.float32))


def make(**settings):
    """(model, variables); weights larger than the initial 0.02, with which every logit is about 0."""
    model = models.create("discriminator", **{"in_channels": C, "width": WIDTH, **settings})
    rng, initial = np.random.default_rng(7), {"mean": 0, "var": 1, "initialized": 0, "scale": 1}

    def draw(path, leaf):
        if path[-1].key in initial:
            return jnp.full(leaf.shape, initial[path[-1].key], leaf.dtype)
        return jnp.asarray(rng.normal(0, 0.12, leaf.shape).astype(np.float32))

    return model, jax.tree_util.tree_map_with_path(draw, models.abstract_variables(model))


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, batch):
    """(logits, variables) after a training pass."""
    logits, updated = model.apply(variables, batch, train=True, mutable=["batch_stats"])
    return logits, {**variables, **updated}


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# --- the network ---------------------------------------------------------------------------------------------


def test_released_size():
    model = models.create("discriminator")
    variables = models.abstract_variables(model)
    assert count(variables["params"]) == 663_361 and count(variables["batch_stats"]) == 2 * (128 + 256)
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((B, 256, 256, 3)))
    assert logits.shape == (B, 62, 62, 1)


@pytest.mark.parametrize(("num_layers", "smallest"), [(1, 6), (2, 12), (3, 24), (4, 48)])
def test_sizes_down_to_the_smallest(num_layers, smallest):
    model = models.create("discriminator", in_channels=1, width=2, num_layers=num_layers)
    variables = models.abstract_variables(model)
    for H, W in ((smallest, smallest), (smallest + 1, 3 * smallest + 5)):
        logits = jax.eval_shape(model.apply, variables, jnp.zeros((B, H, W, 1)))
        assert logits.shape == (B, H // 2**num_layers - 2, W // 2**num_layers - 2, 1)
    assert model.example_inputs(3)[0].shape == (3, smallest, smallest, 1)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(model.apply, variables, jnp.zeros((B, smallest, smallest - 1, 1)))
    assert str(error.value) == (
        f"discriminator.num_layers: {num_layers} leaves no patch of images of {smallest}x{smallest - 1}; "
        f"set fewer, or give images of at least {smallest}x{smallest}"
    )


@pytest.mark.parametrize("use_actnorm", [False, True])
def test_names_and_widths(use_actnorm):
    model = models.create("discriminator", width=2, num_layers=5, use_actnorm=use_actnorm)
    variables = models.abstract_variables(model)
    widths = [3, 2, 4, 8, 16, 16, 16, 1]
    expected, statistics = {}, {}
    for n in range(7):
        expected[f"conv{n}"] = {"kernel": (4, 4, *widths[n : n + 2])}
        if n in (0, 6) or use_actnorm:
            expected[f"conv{n}"]["bias"] = widths[n + 1 : n + 2]
    for n in range(1, 6):
        names = ("shift", "scale") if use_actnorm else ("scale", "bias")
        expected[f"norm{n}"] = dict.fromkeys(names, (widths[n + 1],))
        statistics[f"norm{n}"] = (
            {"initialized": ()} if use_actnorm else dict.fromkeys(("mean", "var"), (widths[n + 1],))
        )
    shapes = jax.tree.map(lambda x: x.shape, variables)
    to_tuples = lambda tree: jax.tree.map(tuple, tree, is_leaf=lambda x: isinstance(x, tuple | list))  # noqa: E731
    assert shapes == {"params": to_tuples(expected), "batch_stats": statistics}
    assert {str(x.dtype) for x in jax.tree.leaves(variables)} == ({"float32", "int32"} if use_actnorm else {"float32"})


def test_initial_values():
    model = models.create("discriminator", width=32)
    variables = helpers.drawn_variables(model)
    params = variables["params"]
    for n in range(4):
        np.testing.assert_allclose(params[f"conv{n}"]["kernel"].std(), 0.02, rtol=0.05)
    bound = 1 / np.sqrt(16 * 3)
    assert 0.8 * bound < np.abs(params["conv0"]["bias"]).max() <= bound
    assert np.abs(params["conv3"]["bias"]).max() <= 1 / np.sqrt(16 * 128)
    for norm in ("norm1", "norm2"):
        np.testing.assert_allclose(params[norm]["scale"].mean(), 1, atol=0.01)
        np.testing.assert_allclose(params[norm]["scale"].std(), 0.02, rtol=0.35)
        assert not params[norm]["bias"].any()
        assert not variables["batch_stats"][norm]["mean"].any() and (variables["batch_stats"][norm]["var"] == 1).all()


def test_bfloat16_is_for_the_convolutions():
    exact, variables = make()
    model, in_bfloat16 = make(dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(in_bfloat16)} == {"float32"}
    logits, after = train(model, variables, images())
    expected, exact_after = train(exact, variables, images())
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()
    helpers.assert_close(after["batch_stats"], exact_after["batch_stats"], 0.02)
    assert {x.dtype.name for x in jax.tree.leaves(after["batch_stats"])} == {"float32"}


# --- BatchNorm -----------------------------------------------------------------------------------------------


def test_batch_statistics_are_taken_without_cancellation():
    x = 300 + jnp.asarray(np.random.default_rng(0).normal(size=(B, 3, 7, 2)).astype(np.float32))
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    assert not variables["batch_stats"]["mean"].any(), "init is no training pass"
    _, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    exact = np.asarray(x, float)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_training_and_rest_differ_and_rest_changes_nothing():
    model, variables = make()
    logits, after = train(model, variables, images())
    resting, unchanged = model.apply(variables, images(), mutable=["batch_stats"])
    helpers.assert_equal(unchanged["batch_stats"], variables["batch_stats"])
    assert np.abs(logits - resting).max() > 1e-2
    assert helpers.differs(after["batch_stats"], variables["batch_stats"])
    for _ in range(120):  # the running statistics become those of the batch, but for their unbiased variance
        after = {**after, "batch_stats": update_statistics_again(variables["batch_stats"], after["batch_stats"])}
        variables, (_, after) = after, train(model, after, images())
    converged = model.apply(after, images())
    assert np.abs(logits - converged).max() < 0.05 * np.abs(logits).max()


def test_statistics_of_a_second_pass_need_no_pass():
    model, variables = make()
    _, once = train(model, variables, images())
    _, twice = train(model, once, images())
    helpers.assert_close(
        update_statistics_again(variables["batch_stats"], once["batch_stats"]), twice["batch_stats"], 1e-6
    )


def test_statistics_are_those_of_the_global_batch():
    model, variables = make()
    expected, after = train(model, variables, images(batch=8))
    mesh = helpers.make_mesh(4, 2)
    placed = sharding.put_batch(mesh, images(batch=8))
    logits, updated = train(model, jax.device_put(variables, sharding.replicated(mesh)), placed)
    helpers.assert_close(logits, expected)
    helpers.assert_close(updated, after)


# --- ActNorm -------------------------------------------------------------------------------------------------


initialize = jax.jit(initialize_actnorm, static_argnums=0)


def with_flags(variables, *flags):
    stats = {f"norm{n}": {"initialized": jnp.int32(flag)} for n, flag in enumerate(flags, start=1)}
    return {**variables, "batch_stats": stats}


def flags(variables):
    return [int(norm["initialized"]) for _, norm in sorted(variables["batch_stats"].items())]


def test_actnorm_normalises_the_first_batch():
    model, variables = make(use_actnorm=True)
    assert flags(variables) == [0, 0]
    after = initialize(model, variables, images())
    assert flags(after) == [1, 1]
    _, state = model.apply(after, images(), capture_intermediates=True, mutable=["intermediates"])
    for norm in ("norm1", "norm2"):
        x = np.asarray(state["intermediates"][norm]["__call__"][0])
        np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(x.std((0, 1, 2), ddof=1), 1, rtol=1e-4)
    drawn = {name: p for name, p in variables["params"].items() if name.startswith("conv")}
    helpers.assert_equal({name: after["params"][name] for name in drawn}, drawn)


def test_actnorm_layers_that_are_set_stay():
    model, variables = make(use_actnorm=True)
    for given in ((1, 0), (0, 1), (1, 1)):
        after = initialize(model, with_flags(variables, *given), images())
        assert flags(after) == [1, 1]
        for norm, flag in zip(("norm1", "norm2"), given, strict=True):
            assert helpers.differs(after["params"][norm], variables["params"][norm]) == (flag == 0)


def test_once_all_actnorm_layers_are_set_no_pass_is_made():
    model, variables = make(use_actnorm=True)
    program = jax.make_jaxpr(lambda v, x: initialize_actnorm(model, v, x))(variables, images()).jaxpr
    (cond,) = [equation for equation in program.eqns if equation.primitive.name == "cond"]
    outside = [equation for equation in program.eqns if equation.primitive.name == "conv_general_dilated"]
    made = ["conv_general_dilated" in str(branch) for branch in cond.params["branches"]]
    assert made == [True, False] and not outside  # index 1 is where the condition holds


def test_actnorm_values_pass_no_gradient_to_what_made_them():
    model, variables = make(use_actnorm=True)

    def shifts(params, batch):
        after = initialize_actnorm(model, {**variables, "params": params}, batch)
        return sum(after["params"][norm]["shift"].sum() for norm in ("norm1", "norm2"))

    to_params, to_images = jax.jit(jax.grad(shifts, argnums=(0, 1)))(variables["params"], images())
    assert not to_images.any() and all(not g.any() for g in jax.tree.leaves(to_params))

    def loss(params):
        return model.apply({**variables, "params": params}, images(), train=True).sum()

    grads = jax.jit(jax.grad(loss))(initialize(model, variables, images())["params"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_without_actnorm_there_is_nothing_to_initialise():
    model, variables = make()
    assert initialize_actnorm(model, variables, images()) is variables


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "discriminator.num_layers: 0 must be at least 1"),
        ({"width": 0}, "discriminator.width: 0 must be at least 1"),
        ({"in_channels": -3}, "discriminator.in_channels: -3 must be at least 1"),
        ({"dtype": "float16"}, "discriminator.dtype: 'float16' is unknown; allowed are 'float32' and 'bfloat16'"),
        ({"spectral_norm": True}, "discriminator.spectral_norm: unknown; allowed are dtype, in_channels, num_layers, use_actnorm, width"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        models.create("discriminator", **settings)


@pytest.mark.parametrize("shape", [(B, H, W, 3), (H, W, C)])
def test_images_of_another_shape_are_refused(shape):
    model, variables = make()
    message = f"images: shape {shape} does not fit; allowed is (B, H, W, {C})"
    with pytest.raises(ValueError) as error:
        model.apply(variables, jnp.zeros(shape))
    assert str(error.value) == message

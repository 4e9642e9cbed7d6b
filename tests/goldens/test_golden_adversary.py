"""Discriminator, LPIPS and SSIM against the original implementation and against our own oracle of loops.

Arrays agree within 1e-5 of their largest value.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from rq_jax import losses, metrics, models
from rq_jax.models.discriminator import initialize_actnorm
from rq_jax.pretrained import vgg_lpips

OWN = Path(__file__).parent

distance = jax.jit(vgg_lpips.feature_distance)


@functools.partial(jax.jit, static_argnums=0)
def rest(model, variables, images):
    """Logits with running statistics."""
    return model.apply(variables, images)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, images):
    """(logits, {"batch_stats": ...}) of a training pass."""
    return model.apply(variables, images, train=True, mutable=["batch_stats"])


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def nested(flat, prefix):
    """The entries below a prefix, with a level for each dot."""
    tree = {}
    for key, array in flat.items():
        if key.startswith(prefix):
            *path, leaf = key.removeprefix(prefix).split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = jnp.asarray(array)
    return tree


# --- the original -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(goldens):
    """(model, variables, io) of the original discriminator of two layers; `main.N` counts activations too."""
    state, io = read(goldens / "disc-bn2.state.npz"), read(goldens / "disc-bn2.io.npz")
    params, statistics = {}, {}
    for n, place in enumerate((0, 2, 5, 8)):
        params[f"conv{n}"] = {"kernel": rearrange(state[f"main.{place}.weight"], "o i h w -> h w i o")}
        if n in (0, 3):
            params[f"conv{n}"]["bias"] = state[f"main.{place}.bias"]
        else:
            norm = {name: state[f"main.{place + 1}.{key}"] for name, key in (("scale", "weight"), ("bias", "bias"))}
            params[f"norm{n}"], statistics[f"norm{n}"] = norm, running(state, f"main.{place + 1}")
    model = models.create("discriminator", width=32)
    return model, jax.device_put({"params": params, "batch_stats": statistics}), io


def running(state, prefix):
    return {"mean": state[f"{prefix}.running_mean"], "var": state[f"{prefix}.running_var"]}


def nhwc(images):
    return rearrange(jnp.asarray(images), "b c h w -> b h w c")


def discriminator_loss(real, fake, kind="hinge"):
    return losses.discriminator_loss_real(real, kind) + losses.discriminator_loss_fake(fake, kind)


def test_original_discriminator_at_rest_and_its_losses(original):
    model, variables, io = original
    fake, real = (rest(model, variables, nhwc(io[f"input_{name}"])) for name in ("fake", "real"))
    assert_close(fake, nhwc(io["eval.logits_fake"]))
    assert_close(real, nhwc(io["eval.logits_real"]))
    for kind in ("hinge", "vanilla"):
        assert_close(discriminator_loss(real, fake, kind), io[f"eval.{kind}_d_loss_mean"])
    assert_close(losses.generator_loss(fake, "vanilla"), io["eval.vanilla_g_loss_mean"])


def test_original_discriminator_in_training(original):
    model, variables, io = original
    logits = {}
    for name in ("fake", "real"):
        logits[name], updated = train(model, variables, nhwc(io[f"input_{name}"]))
        variables = {**variables, **updated}
        assert_close(logits[name], nhwc(io[f"train.logits_{name}"]))
    assert_close(discriminator_loss(logits["real"], logits["fake"]), io["train.hinge_d_loss_mean"])
    for norm, prefix in (("norm1", "train.after.main.3"), ("norm2", "train.after.main.6")):
        for name, expected in running(io, prefix).items():
            assert_close(variables["batch_stats"][norm][name], expected)


def test_original_lpips_after_the_network(goldens):
    state, io = read(goldens / "lpips-head.state.npz"), read(goldens / "lpips-head.io.npz")
    heads = {f"block{i + 1}": state[f"lin{i}.model.1.weight"].reshape(-1) for i in range(5)}
    features, other = ([nhwc(io[f"feat_{name}_{i}"]) for i in range(5)] for name in ("input", "target"))
    distances = distance(features, other, heads)
    assert_close(distances, io["lpips_none"].reshape(-1))
    assert_close(distances.mean(), io["lpips_mean"])
    assert_close(distances.sum(), io["lpips_sum"])


def test_original_input_scaling(goldens, monkeypatch):
    state, io = read(goldens / "lpips-head.state.npz"), read(goldens / "lpips-head.io.npz")
    monkeypatch.setattr(vgg_lpips, "_read_torchvision", lambda path: {})
    monkeypatch.setattr(vgg_lpips, "_read_heads", lambda path: {})
    perceptual = vgg_lpips.load("vgg16.pth", "heads.pth")
    assert_close(perceptual.shift, state["scaling_layer.shift"].ravel())
    assert_close(perceptual.scale, state["scaling_layer.scale"].ravel())
    scaled = (np.asarray(nhwc(io["image"])) - np.array(perceptual.shift)) / np.array(perceptual.scale)
    assert_close(scaled, nhwc(io["scaled_image"]))


# --- our own oracle -----------------------------------------------------------------------------------------


def own_discriminator(kind):
    golden = read(OWN / "discriminator.npz")
    model = models.create("discriminator", in_channels=2, width=3, use_actnorm=kind == "act_norm")
    statistics = nested(golden, f"{kind}.statistics.") or {f"norm{n}": {"initialized": jnp.int32(1)} for n in (1, 2)}
    variables = {"params": nested(golden, f"{kind}.params."), "batch_stats": statistics}
    return golden, model, variables, nested(golden, f"{kind}.after.")


def test_discriminator_with_batch_norm():
    golden, model, variables, after = own_discriminator("batch_norm")
    assert_close(rest(model, variables, golden["images"]), golden["batch_norm.logits"])
    logits, updated = train(model, variables, golden["images"])
    assert_close(logits, golden["batch_norm.train_logits"])
    jax.tree.map(assert_close, updated["batch_stats"], after)


def test_discriminator_with_act_norm():
    golden, model, variables, after = own_discriminator("act_norm")
    for logits in (rest(model, variables, golden["images"]), train(model, variables, golden["images"])[0]):
        assert_close(logits, golden["act_norm.logits"])
    variables["batch_stats"] = {f"norm{n}": {"initialized": jnp.int32(0)} for n in (1, 2)}
    variables = jax.jit(initialize_actnorm, static_argnums=0)(model, variables, golden["images"])
    jax.tree.map(assert_close, {norm: variables["params"][norm] for norm in after}, after)
    assert_close(rest(model, variables, golden["images"]), golden["act_norm.train_logits"])


def test_perceptual_distance_of_features():
    golden = read(OWN / "perceptual.npz")
    features, other, heads = (nested(golden, f"{name}.") for name in ("features", "other", "heads"))
    blocks = [features[name] for name in sorted(features)], [other[name] for name in sorted(other)]
    assert_close(distance(*blocks, heads), golden["distance"])
    assert_close(distance(*blocks), golden["equal_distance"])


def test_structural_similarity():
    golden = read(OWN / "ssim.npz")
    assert_close(jax.jit(metrics.ssim)(golden["images"], golden["reconstruction"]), golden["ssim"])

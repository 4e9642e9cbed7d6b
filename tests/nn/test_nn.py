"""Convolutional blocks and the transformer stack against loops and by their properties."""

import functools

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.nn.attention import Block, BlockSettings, LayerNorm, Stack, empty_cache
from rq_jax.nn.conv import AttentionBlock, Conv, Downsample, Norm, ResBlock, Upsample
from rq_jax.nn.dropout import Dropout


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_like(tree, seed=0):
    """Every parameter filled with noise, biases and norms included."""
    leaves, structure = jax.tree.flatten(tree)
    filled = [0.3 * normal(*leaf.shape, seed=seed + i) + (leaf.ndim == 1) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, filled)


def build(module, x):
    return random_like(jax.eval_shape(module.init, jax.random.key(0), x))


def conv_loop(x, kernel, bias, stride=1, pad=((1, 1), (1, 1))):
    """Convolution of one picture (H, W, C), output by output."""
    x = np.pad(x, (*pad, (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((x.shape[axis] - size) // stride + 1 for axis in (0, 1))
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = x[i * stride : i * stride + size, j * stride : j * stride + size]
            out[i, j] = np.tensordot(patch, kernel, 3) + bias
    return out


def norm_loop(x, groups, scale, bias):
    H, W, C = x.shape
    grouped = x.reshape(H, W, groups, C // groups).astype(float)
    mean = grouped.mean((0, 1, 3), keepdims=True)
    variance = grouped.var((0, 1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(H, W, C) * scale + bias


def silu(x):
    return x / (1 + np.exp(-x))


# --- convolutions ---------------------------------------------------------------------------------


def test_conv_agrees_with_loops():
    x = normal(2, 3, 5, 4)
    variables = build(Conv(6), x)
    p = variables["params"]
    for image, out in zip(x, Conv(6).apply(variables, x), strict=True):
        np.testing.assert_allclose(out, conv_loop(image, p["kernel"], p["bias"]), rtol=1e-4, atol=1e-5)


def test_convolutions_start_as_torch_starts_them():
    p = Conv(64).init(jax.random.key(0), jnp.ones((1, 4, 4, 20)))["params"]
    bound = 1 / np.sqrt(9 * 20)
    for array in (p["kernel"], p["bias"]):
        assert 0.9 * bound < float(jnp.abs(array).max()) <= bound
        np.testing.assert_allclose(float(array.std()), bound / np.sqrt(3), rtol=0.15)


@pytest.mark.parametrize("channels, groups", [(64, 32), (16, 16), (12, 4), (5, 1)])
def test_norm_uses_the_largest_common_divisor_with_32(channels, groups):
    x = 3 * normal(2, 3, 5, channels) + 1
    variables = build(Norm(), x)
    p = variables["params"]
    for image, out in zip(x, Norm().apply(variables, x), strict=True):
        np.testing.assert_allclose(out, norm_loop(image, groups, p["scale"], p["bias"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [8, 12])
def test_res_block_agrees_with_loops(features):
    x = normal(1, 3, 5, 8)
    variables = build(ResBlock(features), x)
    p = variables["params"]
    y = conv_loop(silu(norm_loop(x[0], 8, **p["norm1"])), **p["conv1"])
    y = conv_loop(silu(norm_loop(y, {8: 8, 12: 4}[features], **p["norm2"])), **p["conv2"])
    skip = x[0]
    assert ("shortcut" in p) == (features != 8)
    if features != 8:
        skip = conv_loop(skip, **p["shortcut"], pad=((0, 0), (0, 0)))
    np.testing.assert_allclose(ResBlock(features).apply(variables, x)[0], skip + y, rtol=1e-3, atol=1e-4)


def test_attention_block_agrees_with_loops():
    x = normal(1, 3, 5, 8)
    variables = build(AttentionBlock(), x)
    p = variables["params"]
    flat = norm_loop(x[0], 8, **p["norm"]).reshape(15, 8)
    query, key, value = (flat @ p[n]["kernel"][0, 0] + p[n]["bias"] for n in ("query", "key", "value"))
    out = np.zeros((15, 8))
    for i in range(15):
        scores = np.array([query[i] @ key[j] for j in range(15)]) / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        out[i] = (weights[:, None] * value).sum(0) / weights.sum()
    expected = x[0] + (out @ p["out"]["kernel"][0, 0] + p["out"]["bias"]).reshape(3, 5, 8)
    np.testing.assert_allclose(AttentionBlock().apply(variables, x)[0], expected, rtol=1e-3, atol=1e-4)


def test_downsample_pads_at_the_right_and_the_bottom_only():
    x = normal(1, 6, 10, 4)
    variables = build(Downsample(), x)
    expected = conv_loop(x[0], **variables["params"]["conv"], stride=2, pad=((0, 1), (0, 1)))
    out = Downsample().apply(variables, x)
    assert out.shape == (1, 3, 5, 4)
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)


def test_upsample_repeats_and_convolves():
    x = normal(1, 3, 5, 4)
    variables = build(Upsample(), x)
    repeated = np.zeros((6, 10, 4))
    for i in range(6):
        for j in range(10):
            repeated[i, j] = x[0, i // 2, j // 2]
    out = Upsample().apply(variables, x)
    np.testing.assert_allclose(out[0], conv_loop(repeated, **variables["params"]["conv"]), rtol=1e-4, atol=1e-5)


def test_resampling_without_convolution_has_no_parameters():
    x = normal(1, 6, 10, 4)
    for module in (Downsample(use_conv=False), Upsample(use_conv=False)):
        assert module.init(jax.random.key(0), x) == {}
    means = Downsample(use_conv=False).apply({}, x)
    np.testing.assert_allclose(means[0, 1, 2], x[0, 2:4, 4:6].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        Downsample(use_conv=False).apply({}, Upsample(use_conv=False).apply({}, x)), x, rtol=1e-6
    )


def test_res_block_drops_out_in_training_only():
    x = normal(1, 3, 5, 8)
    variables = build(ResBlock(8), x)
    expected = ResBlock(8).apply(variables, x)
    np.testing.assert_array_equal(ResBlock(8, dropout=0.5).apply(variables, x), expected)
    rngs = {"dropout": jax.random.key(0)}
    assert not np.allclose(ResBlock(8, dropout=0.5, train=True).apply(variables, x, rngs=rngs), expected)


# --- the transformer stack ------------------------------------------------------------------------

X = normal(2, 5, 12)


def stack(use_remat=False, **settings):
    module = Stack(3, BlockSettings(4, **settings), use_remat)
    x = jax.ShapeDtypeStruct(X.shape, settings.get("dtype", jnp.float32))
    return module, random_like(jax.eval_shape(module.init, jax.random.key(0), x))


@functools.partial(jax.jit, static_argnames=("module", "train"))
def run(module, variables, x, cache=None, train=False, rngs=None):
    """Outputs and the cache."""
    return module.apply(variables, x, cache, train, rngs=rngs)


def test_layer_norm_has_epsilon_1e_5():
    x = np.array([[0.001, 0.002, 0.003, 0.006]], np.float32)
    variables = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    np.testing.assert_allclose(LayerNorm().apply(variables, x), expected, rtol=1e-4)


def test_stack_is_its_blocks_one_after_the_other():
    module, variables = stack()
    x = X
    for layer in range(3):
        p = jax.tree.map(lambda a, layer=layer: a[layer], variables["params"]["blocks"])
        x, _ = Block(BlockSettings(4)).apply({"params": p}, x, None, None)
    np.testing.assert_allclose(run(module, variables, X)[0], x, rtol=1e-4, atol=1e-4)


def test_stack_is_causal():
    module, variables = stack()
    before = run(module, variables, X)[0]
    after = run(module, variables, jnp.asarray(X).at[:, 3].multiply(2.0))[0]
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert bool((jnp.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3).all())


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (2, 3), (5,), (3, 1, 1)])
def test_cached_pieces_equal_the_whole(pieces):
    module, variables = stack()
    expected = run(module, variables, X)[0]
    cache, start, outputs = empty_cache(3, 2, 6, 4, 3, jnp.float32), 0, []
    for piece in pieces:
        out, cache = run(module, variables, X[:, start : start + piece], cache)
        outputs.append(out)
        start += piece
        assert int(cache.length) == start
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-4, atol=1e-5)
    assert all(not keys[:, :, 5:].any() and keys[:, :, :5].all() for keys in cache.keys)


def test_rows_beyond_the_length_are_never_read():
    module, variables = stack()
    cache = empty_cache(3, 2, 6, 4, 3, jnp.float32)
    _, cache = run(module, variables, X[:, :2], cache)
    expected, _ = run(module, variables, X[:, 2:3], cache)
    stale = cache._replace(
        keys=tuple(rows.at[:, :, 2:].set(9.0) for rows in cache.keys),
        values=tuple(rows.at[:, :, 2:].set(9.0) for rows in cache.values),
    )
    np.testing.assert_array_equal(run(module, variables, X[:, 2:3], stale)[0], expected)


def test_no_layers_are_the_identity():
    module = Stack(0, BlockSettings(4))
    assert module.init(jax.random.key(0), X) == {}
    np.testing.assert_array_equal(run(module, {}, X)[0], X)
    out, cache = run(module, {}, X[:, :2], empty_cache(0, 2, 6, 4, 3, jnp.float32))
    np.testing.assert_array_equal(out, X[:, :2])
    assert int(cache.length) == 2


BIASES = {
    "use_attention_bias": {"qkv_bias_3NA", "out_bias_M"},
    "use_mlp_bias": {"up_bias_F", "down_bias_M"},
}


@pytest.mark.parametrize("switch", BIASES)
def test_bias_switches_take_away_their_biases_and_nothing_else(switch):
    module, variables = stack()
    without, fewer = stack(**{switch: False})
    names = variables["params"]["blocks"].keys()
    assert names - fewer["params"]["blocks"].keys() == BIASES[switch]
    zeroed = {
        n: jax.tree.map(jnp.zeros_like, a) if n in BIASES[switch] else a
        for n, a in variables["params"]["blocks"].items()
    }
    kept = {n: a for n, a in zeroed.items() if n not in BIASES[switch]}
    np.testing.assert_allclose(
        run(without, {"params": {"blocks": kept}}, X)[0],
        run(module, {"params": {"blocks": zeroed}}, X)[0],
        atol=1e-5,
    )


def test_gelu_switch():
    variables = jax.tree.map(lambda a: a[0], stack()[1]["params"]["blocks"])
    outputs = {}
    for gelu in ("exact", "sigmoid"):
        outputs[gelu] = Block(BlockSettings(4, gelu=gelu)).apply({"params": variables}, X, None, None)[0]
    difference = float(jnp.abs(outputs["exact"] - outputs["sigmoid"]).max())
    assert 1e-4 < difference < 0.5
    flat = {
        **variables,
        "qkv_M3NA": 0 * variables["qkv_M3NA"],
        "out_NAM": 0 * variables["out_NAM"],
        "out_bias_M": 0 * variables["out_bias_M"],
    }
    normed = LayerNorm().apply({"params": variables["norm2"]}, X)
    hidden = np.asarray(normed @ variables["up_MF"], np.float64) + np.asarray(variables["up_bias_F"], np.float64)
    expected = X + (hidden / (1 + np.exp(-1.702 * hidden))) @ variables["down_FM"] + variables["down_bias_M"]
    sigmoid = Block(BlockSettings(4, gelu="sigmoid")).apply({"params": flat}, X, None, None)[0]
    np.testing.assert_allclose(sigmoid, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", ["attention_dropout", "residual_dropout"])
def test_dropout_acts_in_training_only(rate):
    module, variables = stack()
    dropping, _ = stack(**{rate: 0.5})
    expected = run(module, variables, X)[0]
    np.testing.assert_array_equal(run(dropping, variables, X)[0], expected)
    outputs = [run(dropping, variables, X, train=True, rngs={"dropout": jax.random.key(i)})[0] for i in (0, 1)]
    assert not np.allclose(outputs[0], outputs[1]) and not np.allclose(outputs[0], expected)
    np.testing.assert_array_equal(run(module, variables, X, train=True)[0], expected)


def test_remat_changes_no_output_and_no_gradient():
    module, variables = stack()
    remat, same = stack(use_remat=True)
    assert jax.tree.structure(same) == jax.tree.structure(variables)

    def loss(variables, module):
        return (run(module, variables, X, train=True)[0] ** 2).sum()

    assert "remat" in str(jax.make_jaxpr(lambda v: loss(v, remat))(variables))
    for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(loss)(variables, m)) for m in (module, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_dropout_drops_the_same_of_a_batch_and_of_its_parts():
    def drop(module, x):
        return module.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(1)})

    x_BM = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    whole = drop(Dropout(0.3), x_BM)
    np.testing.assert_array_equal(whole, drop(nn.Dropout(0.3), x_BM))
    assert 0.15 < np.mean(np.asarray(whole) == 0) < 0.45
    parts = jax.vmap(lambda part: drop(Dropout(0.3), part))(x_BM.reshape(3, 2, 50))
    np.testing.assert_allclose(parts.reshape(6, 50), whole, rtol=1e-6)


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0)], ids=["batches", "one batch"])
def test_dropout_with_a_key_for_each(in_axes):
    x, rngs = (
        np.random.default_rng(0).normal(size=(3, 2, 50)).astype(np.float32),
        jax.random.split(jax.random.key(1), 3),
    )

    def drop(module):
        of = x if in_axes[0] == 0 else x[0]
        return jax.vmap(lambda x, rng: module.apply({}, x, deterministic=False, rngs={"dropout": rng}), in_axes)(
            of, rngs
        )

    np.testing.assert_array_equal(drop(Dropout(0.3)), drop(nn.Dropout(0.3)))


@helpers.full_optimization()
@pytest.mark.parametrize("num_layers, share", [(4, 0.5), (9, 0.3)], ids=["unrolled without it", "always scanned"])
def test_remat_saves_memory_in_a_stack_of_any_depth(num_layers, share):
    def temporaries(use_remat):
        module, x = Stack(num_layers, BlockSettings(4), use_remat), jax.ShapeDtypeStruct((4, 64, 32), jnp.float32)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        gradient = jax.grad(lambda variables, x: module.apply(variables, x, None, True)[0].sum())
        compiled = jax.jit(gradient).lower(variables, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert 0 < temporaries(use_remat=True) < share * temporaries(use_remat=False)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_flash_attention_changes_no_output_and_no_gradient(dtype, bound):
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes bfloat16 with float32
        (module, variables), (flash, same) = stack(dtype=dtype), stack(use_flash_attention=True, dtype=dtype)
        assert jax.tree.structure(same) == jax.tree.structure(variables)

        def loss(variables, module):
            return (run(module, variables, jnp.asarray(X, dtype), train=True)[0].astype(jnp.float32) ** 2).sum()

        plain, fused = (jax.tree.leaves(jax.value_and_grad(loss)(variables, m)) for m in (module, flash))
        for a, b in zip(plain, fused, strict=True):
            assert float(jnp.abs(a - b).max()) <= bound * float(jnp.abs(a).max())
        jaxprs = [str(jax.make_jaxpr(lambda v, m=m: loss(v, m))(variables)) for m in (module, flash)]
        assert jaxprs[0] != jaxprs[1]


def test_bfloat16_is_close_and_its_softmax_is_float32():
    module, variables = stack()
    half, _ = stack(dtype=jnp.bfloat16)
    out = run(half, variables, jnp.asarray(X, jnp.bfloat16))[0]
    expected = run(module, variables, X)[0]
    assert out.dtype == jnp.bfloat16
    assert float(jnp.abs(out.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()) < 0.05
    assert "f32[2,4,5,5]" in str(jax.make_jaxpr(half.apply)(variables, X.astype(jnp.bfloat16)))

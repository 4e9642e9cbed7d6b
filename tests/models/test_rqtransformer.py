"""The RQ-Transformer: causality, the codebook, every switch, and the cached methods against the forward pass."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_transformer import (
    BASE,
    CLASS,
    CODES,
    CONDS,
    KINDS,
    SIZES,
    TEXT,
    UNEQUAL,
    UNEQUAL_CODES,
    B,
    D,
    E,
    K,
    M,
    T,
    U,
    V,
    build,
    h,
    run,
    w,
)  # fmt: skip

from rq_jax import losses
from rq_jax.models import create, init_variables


def shapes(variables):
    """Dotted names of the parameters and their shapes."""
    return flax.traverse_util.flatten_dict(jax.tree.map(jnp.shape, variables["params"]), sep=".")


# --- variables ------------------------------------------------------------------------------------


def test_fresh_variables():
    model = create("rqtransformer", **BASE, **TEXT)
    variables = init_variables(model, jax.random.key(0))
    assert type(variables) is dict and variables.keys() == {"params", "codebook"}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, build(**TEXT)[1])
    assert bool(jnp.isnan(variables["codebook"]["codebook_KE"]).all())
    weight = variables["params"]["spatial_stack"]["blocks"]["up_MF"]
    assert weight.shape == (2, M, 4 * M) and 0.017 < float(weight.std()) < 0.023
    assert not np.allclose(weight[0], weight[1])


def test_a_forgotten_tokenizer_is_loud():
    model, variables = build()
    missing = {**variables, "codebook": {"codebook_KE": jnp.full((K, E), jnp.nan)}}
    logits = run(model, missing, CODES).logits
    assert bool(jnp.isnan(logits[:, 0, 1:]).all()) and bool(jnp.isnan(logits[:, 0, 0, 1:]).all())
    soft = jnp.full((B, h, w, D, K), 1 / K)
    assert jnp.isnan(losses.soft_cross_entropy(logits, soft).mean())
    assert jnp.isnan(losses.cross_entropy(logits, CODES).mean())


def test_the_codebook_is_absent_when_no_switch_uses_it():
    model, variables = build(use_tokenizer_input=False, use_tokenizer_depth_input=False)
    assert variables.keys() == {"params"}
    assert bool(jnp.isfinite(run(model, variables, CODES).logits).all())
    for switch in ("use_tokenizer_input", "use_tokenizer_depth_input"):
        assert build(**{switch: False})[1].keys() == {"params", "codebook"}


CODEBOOKS = {"shared": ({}, (K, E)), "stacked": ({"use_shared_codebook": False}, (D, K, E)), "unequal": (UNEQUAL, None)}


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_the_codebook_has_the_shape_of_the_tokenizers(kind):
    settings, shape = CODEBOOKS[kind]
    state = build(**settings)[1]["codebook"]
    assert state.keys() == {"codebook_KE"}
    assert jax.tree.map(jnp.shape, state["codebook_KE"]) == (shape or tuple((size, E) for size in SIZES))


def test_separate_codebooks_look_up_each_depth_in_its_own():
    (model, variables), (separate, separate_variables) = build(), build(use_shared_codebook=False)
    tables = separate_variables["codebook"]["codebook_KE"]
    same = {"params": variables["params"], "codebook": {"codebook_KE": jnp.stack([tables[1]] * D)}}
    shared = {"params": variables["params"], "codebook": {"codebook_KE": tables[1]}}
    np.testing.assert_allclose(
        run(separate, same, CODES).logits, run(model, shared, CODES).logits, rtol=1e-4, atol=1e-5
    )
    other = {"params": variables["params"], "codebook": {"codebook_KE": tables}}
    assert not np.allclose(run(separate, other, CODES).logits, run(model, shared, CODES).logits, atol=1e-2)


# --- the forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    output = run(*build(**KINDS[kind]), CODES, CONDS[kind])
    assert output.logits.shape == (B, h, w, D, K) and output.logits.dtype == jnp.float32
    assert output.hidden.shape == (B, h, w, D, M)
    assert output.cond_logits is None if kind != "text" else output.cond_logits.shape == (B, U - 1, V)


@pytest.mark.parametrize("settings", [{}, {"use_tokenizer_input": False, "use_tokenizer_depth_input": False}])
def test_logits_depend_on_earlier_codes_only(settings):
    model, variables = build(**settings)
    before = run(model, variables, CODES).logits.reshape(B, T * D, K)
    for position, depth in ((0, 0), (4, 2), (7, D - 1), (T - 1, 1), (T - 1, D - 1)):
        place = (slice(None), *np.unravel_index(position, (h, w)), depth)
        changed = run(model, variables, CODES.at[place].set((CODES[place] + 3) % K)).logits.reshape(B, T * D, K)
        first = position * D + depth
        np.testing.assert_allclose(changed[:, : first + 1], before[:, : first + 1], atol=1e-6)
        difference = jnp.abs(changed[:, first + 1 :] - before[:, first + 1 :]).max(-1)
        assert bool((difference > 1e-4).all()), f"codes after {position, depth} that do not depend on it"


def test_the_condition_reaches_all_logits_and_one_index_may_be_flat():
    model, variables = build(**CLASS)
    output = run(model, variables, CODES, CONDS["class"])
    np.testing.assert_array_equal(run(model, variables, CODES, CONDS["class"][:, 0]).logits, output.logits)
    other = run(model, variables, CODES, jnp.array([[5], [8]]))
    assert bool((jnp.abs(other.logits - output.logits)[0].max(-1) > 1e-4).all())
    np.testing.assert_allclose(other.logits[1], output.logits[1], atol=1e-6)


def test_text_is_causal_and_reaches_all_logits():
    model, variables = build(**TEXT)
    output = run(model, variables, CODES, CONDS["text"])
    for u in range(U):
        changed = run(model, variables, CODES, CONDS["text"].at[:, u].add(-1) % V)
        np.testing.assert_allclose(changed.cond_logits[:, :u], output.cond_logits[:, :u], atol=1e-6)
        assert bool((jnp.abs(changed.cond_logits - output.cond_logits)[:, u:].max(-1) > 1e-4).all())
        assert bool((jnp.abs(changed.logits - output.logits).max(-1) > 1e-5).all())
    changed = run(model, variables, (CODES + 1) % K, CONDS["text"])
    np.testing.assert_allclose(changed.cond_logits, output.cond_logits, atol=1e-6)  # text comes before codes


def test_unconditional_is_a_start_token_and_ignores_the_last_position_embedding():
    model, variables = build()
    expected = run(model, variables, CODES).logits
    np.testing.assert_array_equal(run(model, variables, CODES, jnp.zeros((B, 1), int)).logits, expected)
    params = {**variables["params"], "position_TM": variables["params"]["position_TM"].at[-1].set(99.0)}
    np.testing.assert_array_equal(run(model, {**variables, "params": params}, CODES).logits, expected)


def test_the_input_bias_counts_once_per_depth():
    model, variables = build()
    params = variables["params"]
    moved = {
        **params,
        "input_bias_M": 0 * params["input_bias_M"],
        "position_TM": params["position_TM"] + D * params["input_bias_M"][None],
    }
    np.testing.assert_allclose(
        run(model, {**variables, "params": moved}, CODES).logits, run(model, variables, CODES).logits, atol=1e-4
    )


# --- switches -------------------------------------------------------------------------------------

SWITCHES = {  # settings, parameters lost, parameters gained, parameters of another shape
    "use_tokenizer_input": (
        {"use_tokenizer_input": False},
        {"input_EM", "input_bias_M"},
        {"token_embedding_KM"},
        set(),
    ),
    "use_tokenizer_depth_input": (
        {"use_tokenizer_depth_input": False},
        {"depth_input_EM", "depth_input_bias_M"},
        {"token_embedding_KM"},
        set(),
    ),
    "use_cumulative_depth": ({"use_cumulative_depth": False}, set(), set(), set()),
    "use_shared_classifier": (
        {"use_shared_classifier": False},
        {"classifier_MK", "classifier_bias_K"},
        {"classifier_DMK", "classifier_bias_DK"},
        set(),
    ),
    "gelu": ({"gelu": "sigmoid"}, set(), set(), set()),
    "depth_num_heads": (
        {"depth_num_heads": 2},
        set(),
        set(),
        {f"depth_stack.blocks.{n}" for n in ("qkv_M3NA", "qkv_bias_3NA", "out_NAM")},
    ),
    "use_attention_bias": (
        {"use_attention_bias": False},
        {f"{s}_stack.blocks.{n}" for s in ("spatial", "depth") for n in ("qkv_bias_3NA", "out_bias_M")},
        set(),
        set(),
    ),
    "use_mlp_bias": (
        {"use_mlp_bias": False},
        {f"{s}_stack.blocks.{n}" for s in ("spatial", "depth") for n in ("up_bias_F", "down_bias_M")},
        set(),
        set(),
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_changes_its_parameters_and_the_output(switch):
    settings, lost, gained, reshaped = SWITCHES[switch]
    (model, variables), (other, other_variables) = build(), build(**settings)
    before, after = shapes(variables), shapes(other_variables)
    assert before.keys() - after.keys() == lost and after.keys() - before.keys() == gained
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == reshaped
    if not (lost or gained or reshaped):
        other_variables = variables
    logits = run(other, other_variables, CODES).logits
    assert logits.shape == (B, h, w, D, K) and bool(jnp.isfinite(logits).all())
    assert not np.allclose(logits, run(model, variables, CODES).logits, atol=1e-3)


def test_the_depth_stack_may_have_a_gelu_of_its_own():
    _, variables = build()
    models = (create("rqtransformer", **BASE, **settings) for settings in ({}, {"depth_gelu": "sigmoid"}))
    plain, own = (model.bind(variables) for model in models)
    assert own.spatial_stack.block == plain.spatial_stack.block
    assert own.depth_stack.block == dataclasses.replace(plain.depth_stack.block, gelu="sigmoid")


def test_cumulative_depth_is_the_only_difference_to_single_vectors():
    (model, variables), (single, _) = build(), build(use_cumulative_depth=False)
    logits, expected = run(single, variables, CODES).logits, run(model, variables, CODES).logits
    np.testing.assert_allclose(logits[..., :2, :], expected[..., :2, :], atol=1e-5)  # a sum of one is the one
    assert float(jnp.abs(logits[..., 2:, :] - expected[..., 2:, :]).max()) > 1e-2


def test_separate_token_embeddings_stand_below_one_another():
    flags = dict(use_tokenizer_input=False, use_tokenizer_depth_input=False)
    (model, variables), (separate, separate_variables) = (
        build(**flags),
        build(**flags, use_shared_token_embedding=False),
    )
    assert separate_variables["params"]["token_embedding_KM"].shape == (D * K, M)
    table = variables["params"]["token_embedding_KM"]
    tiled = {"params": {**variables["params"], "token_embedding_KM": jnp.tile(table, (D, 1))}}
    expected = run(model, variables, CODES).logits
    np.testing.assert_allclose(run(separate, tiled, CODES).logits, expected, atol=1e-5)
    third = (
        jnp.tile(table, (D, 1)).at[2 * K : 3 * K].multiply(-2.0)
    )  # the depth that nothing of depth 0..2 has read yet
    changed = run(separate, {"params": {**tiled["params"], "token_embedding_KM": third}}, CODES).logits
    np.testing.assert_allclose(changed[:, 0, 0, :3], expected[:, 0, 0, :3], atol=1e-5)
    assert float(jnp.abs(changed[:, 0, 0, 3] - expected[:, 0, 0, 3]).max()) > 1e-3


@pytest.mark.parametrize("switch, dropout", [("use_remat", 0.1), ("use_flash_attention", 0.0)])
def test_remat_and_flash_attention_change_no_output_and_no_gradient(switch, dropout):
    (model, variables), (other, same) = (build(residual_dropout=dropout, **{switch: on}) for on in (False, True))
    assert shapes(same) == shapes(variables)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(params, model):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            logits = model.apply({**variables, "params": params}, CODES, train=True, rngs=rngs).logits
            return losses.cross_entropy(logits, CODES).mean()

        return jax.value_and_grad(loss)(params)

    for a, b in zip(*(jax.tree.leaves(gradients(variables["params"], m)) for m in (model, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rate", ["embedding_dropout", "attention_dropout", "residual_dropout"])
def test_dropout_acts_in_training_only(rate):
    off = dict(embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    (model, variables), (dropping, _) = build(**off), build(**{**off, rate: 0.5})
    expected = run(model, variables, CODES).logits
    np.testing.assert_array_equal(run(dropping, variables, CODES).logits, expected)
    outputs = [run(dropping, variables, CODES, train=True, rngs={"dropout": jax.random.key(i)}).logits for i in (0, 1)]
    assert not np.allclose(*outputs, atol=1e-3) and not np.allclose(outputs[0], expected, atol=1e-3)


def test_bfloat16_has_float32_logits_close_to_those_of_float32():
    (model, variables), (half, half_variables) = build(), build(dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(half_variables)} == {jnp.dtype("float32")}
    output, expected = run(half, variables, CODES), run(model, variables, CODES).logits
    assert output.logits.dtype == jnp.float32 and output.hidden.dtype == jnp.bfloat16
    assert 0 < float(jnp.abs(output.logits - expected).max()) < 0.1 * float(jnp.abs(expected).max())
    cache = half.apply(variables, B, method="init_cache")
    assert cache.spatial.keys[0].dtype == jnp.bfloat16
    assert half.apply(variables, B, jnp.float32, method="init_cache").depth.keys[0].dtype == jnp.float32


def test_a_null_condition_is_one_more_token():
    (_, variables), (model, null_variables) = build(**CLASS), build(**CLASS, use_null_cond=True)
    before, after = shapes(variables), shapes(null_variables)
    assert {name for name in before if before[name] != after[name]} == {"cond_embedding_VM"}
    assert after["cond_embedding_VM"] == (V + 1, M)
    null = run(model, null_variables, CODES, jnp.array([V, V])).logits
    assert not np.allclose(null, run(model, null_variables, CODES, CONDS["class"]).logits, atol=1e-3)


def test_unequal_codebooks_pad_their_logits_and_have_a_finite_loss():
    model, variables = build(**UNEQUAL)

    @jax.jit
    def loss_and_gradient(params):
        def loss(params):
            logits = model.apply({**variables, "params": params}, UNEQUAL_CODES).logits
            soft = jax.nn.softmax(jnp.where(jnp.isfinite(logits), 0.0, -jnp.inf))
            hard = losses.cross_entropy(logits, UNEQUAL_CODES).mean()
            return hard + losses.soft_cross_entropy(logits, soft).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits), gradient = loss_and_gradient(variables["params"])
    for d, size in enumerate(SIZES):
        assert bool(jnp.isfinite(logits[..., d, :size]).all()) and bool((logits[..., d, size:] == -jnp.inf).all())
        assert not gradient["classifier_DMK"][d, :, size:].any()
    assert all(bool(jnp.isfinite(a).all()) for a in (loss, *jax.tree.leaves(gradient)))


@pytest.mark.parametrize("depth", [1, D])
def test_no_depth_layers(depth):
    model, variables = build(code_shape=(h, w, depth), depth_layers=0)
    assert "depth_stack" not in variables["params"]
    codes = CODES[..., :depth]
    logits = run(model, variables, codes).logits
    assert logits.shape == (B, h, w, depth, K)
    context, _, _ = run(model, variables, codes, method="spatial")
    first = context + variables["params"]["depth_position_DM"][:1][None, None]
    np.testing.assert_allclose(run(model, variables, first, method="classify", index=0), logits[..., 0, :], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_tokenizer_input": False, "use_tokenizer_depth_input": False}])
def test_depth_one(settings):
    model, variables = build(code_shape=(h, w, 1), **settings)
    logits = run(model, variables, CODES[..., :1]).logits
    assert logits.shape == (B, h, w, 1, K) and bool(jnp.isfinite(logits).all())

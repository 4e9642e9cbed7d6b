"""The RQ-Transformer's cached methods against its forward pass, and its one-line errors."""

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
    w,  # fmt: skip
)

from rq_jax.models import create


def cached_logits(model, variables, codes, cond, prefix):
    """Logits (B, T, D, K) from the methods as a sampler calls them; NaN where the prefix leaves nothing to draw."""
    (_, _, depths), codes_BTD = codes.shape[1:], codes.reshape(B, T, -1)
    cache = model.apply(variables, B, method="init_cache")
    cond = jnp.zeros((B, 1), int) if cond is None else cond
    context, cond_logits, cache = run(model, variables, codes_BTD[:, :prefix], cond, cache, method="spatial")
    assert context.shape == (B, prefix + 1, M)
    logits = np.full((B, T, depths, K), np.nan)
    for position in range(prefix, T):
        if position > prefix:
            token = codes_BTD[:, position - 1 : position]
            context, none, cache = run(model, variables, token, None, cache, method="spatial")
            assert context.shape == (B, 1, M) and none is None
        for d in range(depths):
            known = codes_BTD[:, position, :d]
            hidden, cache = run(model, variables, context[:, -1], known, cache, method="depth")
            logits[:, position, d] = run(model, variables, hidden, method="classify", index=d)
    return logits, cond_logits


@pytest.mark.parametrize("prefix", [0, 6, T - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_methods_equal_the_forward_pass(kind, prefix):
    model, variables = build(**KINDS[kind])
    output = run(model, variables, CODES, CONDS[kind])
    logits, cond_logits = cached_logits(model, variables, CODES, CONDS[kind], prefix)
    expected = np.asarray(output.logits.reshape(B, T, D, K))
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits[:, prefix:], expected[:, prefix:], rtol=0, atol=atol)
    if kind == "text":
        np.testing.assert_allclose(cond_logits, output.cond_logits, rtol=0, atol=atol)


CACHED = {
    "unequal": (UNEQUAL, UNEQUAL_CODES),
    "own embeddings": (
        {"use_tokenizer_input": False, "use_tokenizer_depth_input": False, "use_shared_token_embedding": False},
        CODES,
    ),
    "single vectors": ({"use_cumulative_depth": False, "use_shared_codebook": False, "depth_num_heads": 2}, CODES),
    "no depth layers": ({"depth_layers": 0}, CODES),
    "depth one": ({"code_shape": (h, w, 1)}, CODES[..., :1]),
}


@pytest.mark.parametrize("kind", CACHED)
def test_cached_methods_equal_the_forward_pass_under_switches(kind):
    settings, codes = CACHED[kind]
    model, variables = build(**settings)
    logits, _ = cached_logits(model, variables, codes, None, 12)
    expected = np.asarray(run(model, variables, codes).logits.reshape(B, T, -1, K))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(logits[:, 12:]), finite[:, 12:])
    atol = 1e-5 * np.abs(expected[finite]).max()
    np.testing.assert_allclose(logits[:, 12:], expected[:, 12:], rtol=0, atol=atol)


def test_the_forward_pass_is_made_of_the_three_methods():
    model, variables = build(**TEXT)
    output = run(model, variables, CODES, CONDS["text"])
    context, cond_logits, cache = run(model, variables, CODES, CONDS["text"], method="spatial")
    hidden, depth_cache = run(model, variables, context, CODES, method="depth")
    assert cache is None and depth_cache is None and context.shape == (B, h, w, M)
    np.testing.assert_allclose(cond_logits, output.cond_logits, atol=1e-5)
    np.testing.assert_allclose(hidden, output.hidden, atol=1e-5)
    np.testing.assert_allclose(run(model, variables, hidden, method="classify"), output.logits, atol=1e-5)


# --- mistakes -------------------------------------------------------------------------------------

CALLS = {
    "no condition": (CLASS, (CODES,), r"^cond: this model needs a condition of shape \(B, 1\), none was given"),
    "condition shape": (
        TEXT,
        (CODES, jnp.zeros((B, U + 1), int)),
        r"^cond: shape \(2, 4\) does not fit; allowed is \(2, 3\)",
    ),
    "condition batch": (CLASS, (CODES, jnp.zeros(B + 1, int)), r"^cond: shape \(3, 1\) does not fit"),
    "condition value": (CLASS, (CODES, jnp.array([0, V])), r"^cond: tokens 0..9 do not all lie in \[0, 9\)"),
    "negative condition": (CLASS, (CODES, jnp.array([-1, 2])), r"^cond: tokens -1..2 do not all lie in \[0, 9\)"),
    "codes": ({}, (CODES.at[0, 0, 1, 2].set(K),), r"^codes: 7 at depth 2 is outside \[0, 7\)"),
    "unequal codes": (UNEQUAL, (UNEQUAL_CODES.at[0, 0, 1, 3].set(2),), r"^codes: 2 at depth 3 is outside \[0, 2\)"),
    "codes of own embeddings": (
        {"use_tokenizer_input": False, "use_tokenizer_depth_input": False},
        (CODES.at[0, 0, 1, 2].set(-1),),
        r"^codes: -1 at depth 2 is outside \[0, 7\)",
    ),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_wrong_arguments_get_one_line(mistake):
    settings, arguments, message = CALLS[mistake]
    model, variables = build(**settings)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, *arguments)


DIFFER = r"^model.codebook_size: sizes \(7, 5, 3, 2\) differ by depth; set use_shared_codebook, "
SETTINGS = {
    "code shape": ({"code_shape": (3, 5)}, r"^model.code_shape: \(3, 5\) must be three positive integers"),
    "no code shape": ({"code_shape": ()}, r"^model.code_shape: \(\) must be three positive integers \(h, w, depth\)$"),
    "num_heads": ({"num_heads": 5}, r"^model.num_heads: 5 does not divide model_dim 12; choose a divisor of it$"),
    "depth_num_heads": ({"depth_num_heads": 7}, r"^model.depth_num_heads: 7 does not divide model_dim 12"),
    "no heads": ({"num_heads": 0}, r"^model.num_heads: 0 does not divide"),
    "dtype": ({"dtype": "half"}, r"^model.dtype: 'half' is unknown; allowed are 'float32' and 'bfloat16'$"),
    "gelu": ({"gelu": "tanh"}, r"^model.gelu: 'tanh' is unknown; allowed are 'exact' and 'sigmoid'$"),
    "depth_gelu": ({"depth_gelu": "tanh"}, r"^model.depth_gelu: 'tanh' is unknown; allowed are 'exact' and 'sigmoid'$"),
    "flash": (
        {"use_flash_attention": True, "attention_dropout": 0.1},
        r"^model.use_flash_attention: True leaves no room for attention_dropout 0.1; set one of them to 0 or False$",
    ),
    "sizes": (
        {"codebook_size": (7, 5)},
        r"^model.codebook_size: \(7, 5\) has 2 entries for code depth 4; give one per depth$",
    ),
    "no codes": ({"codebook_size": 0}, r"^model.codebook_size: 0 must be at least 1$"),
    "code_dim": ({"code_dim": 0}, r"^model.code_dim: 0 must be at least 1$"),
    "model_dim": ({"model_dim": -4}, r"^model.model_dim: -4 must be at least 1$"),
    "spatial_layers": ({"spatial_layers": -1}, r"^model.spatial_layers: -1 must be at least 0$"),
    "depth_layers": ({"depth_layers": -2}, r"^model.depth_layers: -2 must be at least 0$"),
    "shared codebook": ({**UNEQUAL, "use_shared_codebook": True}, DIFFER),
    "shared embedding": ({**UNEQUAL, "use_shared_token_embedding": True}, DIFFER),
    "shared classifier": ({**UNEQUAL, "use_shared_classifier": True}, DIFFER),
    "condition": ({"cond_vocab_size": 0}, r"^model.cond_vocab_size: 0 must be at least 1$"),
    "condition length": ({"cond_length": -1}, r"^model.cond_length: -1 must be at least 1$"),
    "text without words": (
        {"cond_length": 3},
        r"^model.cond_length: 3 condition tokens need a cond_vocab_size above 1$",
    ),
    "null condition": (
        {"use_null_cond": True},
        r"^model.use_null_cond: an unconditional model has no condition to leave out; set it to False$",
    ),
    **{
        f"{name} {rate}": ({name: rate}, rf"^model.{name}: {rate} is outside \[0, 1\)$")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout")
        for rate in (-0.1, 1.0)
    },
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_wrong_settings_get_one_line(mistake):
    settings, message = SETTINGS[mistake]
    with pytest.raises(ValueError, match=message):
        create("rqtransformer", **{**BASE, **settings})


def test_one_size_per_depth_may_be_equal():
    model = create("rqtransformer", **{**BASE, "codebook_size": [K] * D})
    assert model.codebook_sizes == (K,) * D and create("rqtransformer", **{**BASE, **UNEQUAL}).codebook_sizes == SIZES
    assert model.code_dim == E


@pytest.mark.parametrize("prefix", [0, 2])
def test_an_unconditional_model_needs_no_condition_at_its_first_call(prefix):
    model, variables = build()
    codes = CODES.reshape(B, T, D)[:, :prefix]
    cache = model.apply(variables, B, method="init_cache")
    context, _, new = model.apply(variables, codes, None, cache, method="spatial")
    expected, _, _ = model.apply(variables, codes, jnp.zeros((B, 1), int), cache, method="spatial")
    np.testing.assert_array_equal(context, expected)
    assert context.shape == (B, prefix + 1, M) and int(new.spatial.length) == prefix + 1


def test_numpy_variables_work_inside_a_compiled_program():
    model, variables = build(**CLASS)
    host = jax.tree.map(np.asarray, variables)
    cond = CONDS["class"]
    logits = jax.jit(lambda codes: model.apply(host, codes, cond).logits)(CODES)
    np.testing.assert_allclose(logits, run(model, variables, CODES, cond).logits, atol=1e-5)

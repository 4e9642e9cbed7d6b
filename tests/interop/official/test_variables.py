"""Official state dicts become our variables and theirs again, whole and in the right layout."""

import json
import logging

import jax
import numpy as np
import pytest
from official_states import (
    DISCRIMINATOR,
    TRANSFORMER,
    VQGAN,
    discriminator_state,
    rqvae_config,
    rqvae_state,
    transformer_state,
    vqgan_state,
)

from rq_jax import models
from rq_jax.interop import official


def shapes_of(tree):
    return jax.tree.map(np.shape, tree)


def assert_same_numbers(variables, tensors):
    """Nothing lost, nothing twice: the same numbers on both sides."""
    ours = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(variables)])
    theirs = np.concatenate([np.ravel(tensor) for tensor in tensors])
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


# --- released configs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(goldens):
    entries = json.loads((goldens / "released-shapes.json").read_text())
    assert len(entries) == 15
    return entries


def test_released_configs_are_covered_to_the_last_key_and_parameter(released):
    for name, entry in released.items():
        kind = entry["config"].get("type", "discriminator").replace("-", "")
        settings = getattr(official, f"{kind}_settings")(entry["config"])
        table = getattr(official, f"{kind}_table")(settings)
        shapes = {key: tuple(shape) for key, (shape, _) in entry["state_dict"].items()}
        assert table.official_shapes() | {key: value.shape for key, value in table.unread.items()} == shapes, name
        used = [key for rule in table.rules for key in (*rule.keys, *rule.aliases)]
        used += [*table.constants, *table.unread]
        assert sorted(used) == sorted(entry["state_dict"]), name

        variables = models.abstract_variables(models.create(kind, **settings))
        paths = jax.tree_util.tree_leaves_with_path(variables)
        ours = {"/".join(part.key for part in path): leaf.shape for path, leaf in paths}
        if kind == "rqtransformer":
            del ours["codebook/codebook_KE"]
        assert table.shapes() == ours, name

        count = sum(np.prod(shape, dtype=np.int64) for path, shape in ours.items() if path.startswith("params/"))
        if kind == "rqvae":  # the original counts the codebook with its padding row
            count += (settings["codebook_size"] + 1) * settings["code_dim"]
        assert count == entry.get("n_parameters", 663_361), name  # the discriminator's is not in the file


# --- RQ-VAE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hparams, ddconfig, code_sizes, layout",
    [
        ({}, {}, (7, 7, 7), {}),
        ({"shared_codebook": False, "decay": [0.9, 0.8, 0.7]}, {}, (7, 7, 7), {}),
        ({"shared_codebook": False, "n_embed": [7, 9, 8]}, {}, (7, 9, 8), {}),
        ({"code_shape": [4, 2, 1]}, {}, (7,), {"E": 2 * 4 * 6}),
        ({"shared_codebook": False, "code_shape": [4, 4, 1]}, {}, (7,), {"E": 4 * 6}),
        ({}, {"double_z": True}, (7, 7, 7), {"double": 2}),
    ],
    ids=["shared", "separate", "mixed sizes", "folded, depth 1", "separate, depth 1", "double z"],
)
def test_rqvae_variables(hparams, ddconfig, code_sizes, layout):
    settings = official.rqvae_settings(rqvae_config(hparams, ddconfig))
    state = rqvae_state(code_sizes, settings["use_shared_codebook"], **layout)
    variables = official.rqvae_variables(state, settings)
    assert shapes_of(variables) == shapes_of(models.abstract_variables(models.create("rqvae", **settings)))
    copies = [f"codebooks.{d}." for d in range(1, len(code_sizes)) if settings["use_shared_codebook"]]
    tensors = {key: value for key, value in state.items() if not any(copy in key for copy in copies)}
    assert_same_numbers(variables, [v[:-1] if "books" in k and "weight" in k else v for k, v in tensors.items()])


def test_rqvae_layout():
    state = rqvae_state((7, 9, 8))
    config = rqvae_config({"shared_codebook": False, "n_embed": [7, 9, 8]})
    variables = official.rqvae_variables(state, official.rqvae_settings(config))
    params, codebook = variables["params"], variables["codebook"]
    weight = state["encoder.down.1.block.0.conv1.weight"]
    assert params["encoder"]["level1_block0"]["conv1"]["kernel"][2, 0, 3, 6] == weight[6, 3, 2, 0]
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj_out")):
        kernel = params["decoder"]["level1_attention1"][ours]["kernel"]
        np.testing.assert_array_equal(kernel[0, 0].T, state[f"decoder.up.1.attn.1.{theirs}.weight"][:, :, 0, 0])
    np.testing.assert_array_equal(codebook["codebook_KE"][1], state["quantizer.codebooks.1.weight"][:-1])
    np.testing.assert_array_equal(codebook["counts_K"][1], state["quantizer.codebooks.1.cluster_size_ema"])
    np.testing.assert_array_equal(codebook["sums_KE"][2], state["quantizer.codebooks.2.embed_ema"])


def test_half_precision_becomes_contiguous_float32():
    state = {key: value.astype(np.float16) for key, value in rqvae_state((7, 7, 7), shared=True).items()}
    variables = official.rqvae_variables(state, official.rqvae_settings(rqvae_config()))
    leaves = jax.tree.leaves(variables)
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in leaves)


def test_vqgan_variables_are_those_of_depth_1():
    settings = official.vqgan_settings(VQGAN)
    state = {name: value for name, value in vqgan_state().items() if not name.startswith(("loss.", "colorize"))}
    variables = official.vqgan_variables(vqgan_state(), settings)
    assert shapes_of(variables) == shapes_of(models.abstract_variables(models.create("rqvae", **settings)))
    assert_same_numbers(variables["params"], [v for k, v in state.items() if not k.startswith("quantize.")])
    codebook = variables["codebook"]
    for name in ("codebook_KE", "sums_KE"):
        np.testing.assert_array_equal(codebook[name], state["quantize.embedding.weight"])
    np.testing.assert_array_equal(codebook["counts_K"], np.ones(7))


# --- discriminator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_actnorm", [False, True])
def test_discriminator_variables(use_actnorm):
    settings = official.discriminator_settings(DISCRIMINATOR | {"use_actnorm": use_actnorm})
    state = discriminator_state(use_actnorm)
    variables = official.discriminator_variables(state, settings)
    expected = models.abstract_variables(models.create("discriminator", **settings))
    assert shapes_of(variables) == shapes_of(expected)
    assert jax.tree.map(lambda x: x.dtype, variables) == jax.tree.map(lambda x: x.dtype, expected)
    assert_same_numbers(variables, [value for key, value in state.items() if "num_batches" not in key])
    params, stats = variables["params"], variables["batch_stats"]
    assert params["conv2"]["kernel"][3, 1, 7, 12] == state["main.5.weight"][12, 7, 3, 1]
    assert params["conv3"]["bias"] == state["main.8.bias"]
    if use_actnorm:
        np.testing.assert_array_equal(params["norm2"]["shift"], state["main.6.loc"].reshape(-1))
        np.testing.assert_array_equal(params["norm1"]["scale"], state["main.3.scale"].reshape(-1))
    else:
        np.testing.assert_array_equal(params["norm1"]["scale"], state["main.3.weight"])
        np.testing.assert_array_equal(stats["norm2"]["mean"], state["main.6.running_mean"])
        np.testing.assert_array_equal(stats["norm1"]["var"], state["main.3.running_var"])


def test_a_discriminator_of_before_batches_were_counted():
    state = {key: value for key, value in discriminator_state().items() if "num_batches" not in key}
    settings = official.discriminator_settings(DISCRIMINATOR)
    official.discriminator_variables(state, settings)


# --- RQ-Transformer -----------------------------------------------------------------------------------------

SEPARATE = {"shared_tok_emb": False, "shared_cls_emb": False}
VARIANTS = {
    "text": {},
    "unconditional": {"vocab_size_cond": 0, "block_size_cond": 0},
    "class": {"block_size_cond": 1},
    "shared tokens": {"input_emb_vqvae": False},
    "separate tokens": {"head_emb_vqvae": False, "shared_tok_emb": False},
    "no tokenizer": {"input_emb_vqvae": False, "head_emb_vqvae": False},
    "classifier per depth": {"shared_cls_emb": False},
    "mixed sizes": {"vocab_size": [7, 9, 8], "input_emb_vqvae": False, **SEPARATE},
    "no bias": {
        stack: {"n_layer": 2, "block": {"n_head": 2, "attn_bias": False, "mlp_bias": False}}
        for stack in ("body", "head")
    },
    "heads differ": {"head": {"n_layer": 2, "block": {"n_head": 4}}},
    "depth 1": {"block_size": [2, 5, 1], "head": {"n_layer": 0}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_rqtransformer_variables(changes):
    arch = TRANSFORMER | changes
    settings = official.rqtransformer_settings(arch)
    state = transformer_state(arch)
    variables = official.rqtransformer_variables(state, settings)
    expected = models.abstract_variables(models.create("rqtransformer", **settings))
    assert shapes_of(variables) == shapes_of({"params": expected["params"]})
    assert_same_numbers(variables, [value for key, value in state.items() if key != "tok_emb.offsets"])


def test_rqtransformer_layout():
    state = transformer_state(TRANSFORMER)
    params = official.rqtransformer_variables(state, official.rqtransformer_settings(TRANSFORMER))["params"]
    x_M = np.random.default_rng(1).standard_normal(8).astype(np.float32)
    for stack, theirs, layer in (("spatial", "body", 2), ("depth", "head", 1)):
        blocks = params[f"{stack}_stack"]["blocks"]
        block = {name: value[layer] for name, value in blocks.items() if "norm" not in name}
        key = f"{theirs}_transformer.blocks.{layer}"
        qkv = np.einsum("m,mqna->qna", x_M, block["qkv_M3NA"]) + block["qkv_bias_3NA"]
        for i, name in enumerate(("query", "key", "value")):
            expected = state[f"{key}.attn.{name}.weight"] @ x_M + state[f"{key}.attn.{name}.bias"]
            np.testing.assert_allclose(qkv[i].reshape(-1), expected, rtol=0, atol=1e-5)  # heads in a row
        out = np.einsum("na,nam->m", x_M.reshape(2, 4), block["out_NAM"])
        np.testing.assert_allclose(out, state[f"{key}.attn.proj.weight"] @ x_M, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(block["up_MF"].T, state[f"{key}.mlp.0.weight"])
        np.testing.assert_array_equal(block["down_FM"].T, state[f"{key}.mlp.2.weight"])
        for i in (1, 2):
            norm = blocks[f"norm{i}"]
            np.testing.assert_array_equal(norm["scale"][layer], state[f"{key}.ln{i}.weight"])
            np.testing.assert_array_equal(norm["bias"][layer], state[f"{key}.ln{i}.bias"])
    np.testing.assert_array_equal(params["input_EM"].T, state["input_mlp.weight"])
    np.testing.assert_array_equal(params["depth_input_EM"].T, state["head_mlp.weight"])
    np.testing.assert_array_equal(params["classifier_MK"].T, state["classifier.linear.weight"])
    np.testing.assert_array_equal(params["position_TM"], state["pos_emb_hw"][0])


# --- errors of state dicts ----------------------------------------------------------------------------------


def test_all_wrong_keys_are_named_in_one_message():
    settings = official.rqtransformer_settings(TRANSFORMER)
    state = transformer_state(TRANSFORMER)
    del state["pos_emb_d"], state["body_transformer.blocks.1.ln2.bias"]
    state["module.extra"] = np.zeros(3)
    state["input_mlp.weight"] = state["input_mlp.weight"].T
    with pytest.raises(ValueError) as error:
        official.rqtransformer_variables(state, settings)
    assert str(error.value) == (
        "state dict: does not fit its config: unexpected 'module.extra'; "
        "missing pos_emb_d, body_transformer.blocks.1.ln2.bias; input_mlp.weight has shape (6, 8) instead of (8, 6); take both from one checkpoint"
    )


def test_copies_of_a_shared_codebook_that_differ_are_named():
    state = rqvae_state((7, 7, 7), shared=True)
    state["quantizer.codebooks.2.embed_ema"][3, 1] += 1
    with pytest.raises(ValueError, match=r"codebooks\.2\.embed_ema differs from quantizer\.codebooks\.0\.embed_ema;"):
        official.rqvae_variables(state, official.rqvae_settings(rqvae_config()))


def test_token_offsets_that_differ_are_named():
    arch = TRANSFORMER | VARIANTS["separate tokens"]
    state = transformer_state(arch) | {"tok_emb.offsets": np.array([0, 7, 15])}
    with pytest.raises(ValueError, match=r"tok_emb\.offsets differs from \[0, 7, 14\];"):
        official.rqtransformer_variables(state, official.rqtransformer_settings(arch))


def test_a_long_list_of_wrong_keys_is_cut():
    settings = official.rqtransformer_settings(TRANSFORMER)
    with pytest.raises(ValueError) as error:
        official.rqtransformer_variables({"a": np.zeros(3)}, settings)
    table = official.rqtransformer_table(settings)
    assert ": unexpected 'a'; missing " in str(error.value)
    assert f" and {len(table.official_shapes()) - 20} more; take both" in str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, np.bool_])
def test_a_weight_of_a_wrong_type_is_named(dtype):
    state = transformer_state(TRANSFORMER)
    state["input_mlp.weight"] = state["input_mlp.weight"].astype(dtype)
    with pytest.raises(ValueError, match=f"input_mlp.weight is of type {np.dtype(dtype)} where floats are needed;"):
        official.rqtransformer_variables(state, official.rqtransformer_settings(TRANSFORMER))


def test_a_flag_of_a_wrong_type_is_named():
    state = discriminator_state(use_actnorm=True) | {"main.3.initialized": np.array(1.0)}
    settings = official.discriminator_settings(DISCRIMINATOR | {"use_actnorm": True})
    with pytest.raises(ValueError, match="main.3.initialized is of type float64 where integers are needed;"):
        official.discriminator_variables(state, settings)


def test_all_kinds_of_mistakes_are_in_one_message():
    state = rqvae_state((7, 7, 7), shared=True)
    del state["quant_conv.bias"]
    state["quantizer.codebooks.1.weight"][2, 3] += 1
    state["post_quant_conv.weight"] = state["post_quant_conv.weight"].T
    state["encoder.conv_in.bias"] = np.arange(4)
    with pytest.raises(ValueError) as error:
        official.rqvae_variables(state, official.rqvae_settings(rqvae_config()))
    message = str(error.value)
    for part in (
        "missing quant_conv.bias; ",
        "post_quant_conv.weight has shape (1, 1, 6, 5) instead of (5, 6, 1, 1); ",
        "encoder.conv_in.bias is of type int64 where floats are needed",
        "quantizer.codebooks.1.weight differs from quantizer.codebooks.0.weight",
    ):
        assert part in message
    assert "\n" not in message


def test_values_that_are_not_finite_are_kept_and_warned_of(caplog):
    state = transformer_state(TRANSFORMER)
    state["body_transformer.blocks.1.attn.key.weight"][2, 3] = np.nan
    state["pos_emb_d"][0, 1, 2] = -np.inf
    with caplog.at_level(logging.WARNING):
        variables = official.rqtransformer_variables(state, official.rqtransformer_settings(TRANSFORMER))
    (message,) = caplog.messages
    assert message.startswith(
        "state dict: NaN or infinite values; they are kept in pos_emb_d, body_transformer.blocks.1"
    )
    kernel = variables["params"]["spatial_stack"]["blocks"]["qkv_M3NA"]
    assert np.isnan(kernel[1, 3, 1, 0, 2]) and np.isnan(kernel).sum() == 1
    assert variables["params"]["depth_position_DM"][1, 2] == -np.inf


def test_copies_with_nan_are_equal():
    state = rqvae_state((7, 7, 7), shared=True)
    for d in range(3):
        state[f"quantizer.codebooks.{d}.embed_ema"][1, 1] = np.nan
    official.rqvae_variables(state, official.rqvae_settings(rqvae_config()))


def test_a_padding_row_that_is_not_zero_is_warned_of(caplog):
    state = rqvae_state((7, 9, 8))
    state["quantizer.codebooks.1.weight"][-1, 2] = 1
    config = rqvae_config({"shared_codebook": False, "n_embed": [7, 9, 8]})
    official.rqvae_variables(state, official.rqvae_settings(config))
    assert caplog.messages == ["state dict: a padding row that is not zero in quantizer.codebooks.1.weight"]


# --- reading one tensor at a time ---------------------------------------------------------------------------


class Lazy:
    """A tensor that becomes an array when it is asked to, and counts how often."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, 0

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return np.array(self.array, dtype)


def test_each_tensor_is_read_once_and_copies_to_compare():
    state = {key: Lazy(value) for key, value in rqvae_state((7, 7, 7), shared=True).items()}
    official.rqvae_variables(state, official.rqvae_settings(rqvae_config()))
    reads = {key: tensor.reads for key, tensor in state.items()}
    assert all(count == 1 for key, count in reads.items() if not key.startswith("quantizer"))
    assert all(count >= 1 for count in reads.values())


def test_nothing_is_read_of_a_state_that_does_not_fit():
    state = {key: Lazy(value) for key, value in transformer_state(TRANSFORMER).items()}
    state["pos_emb_d"] = Lazy(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="pos_emb_d has shape"):
        official.rqtransformer_variables(state, official.rqtransformer_settings(TRANSFORMER))
    assert sum(tensor.reads for tensor in state.values()) == 0


# --- the way back -------------------------------------------------------------------------------------------

STATES = {
    "shared": lambda: ("rqvae", rqvae_config(), rqvae_state((7, 7, 7), shared=True)),
    "separate": lambda: ("rqvae", rqvae_config({"shared_codebook": False}), rqvae_state((7, 7, 7))),
    "mixed sizes": lambda: (
        "rqvae",
        rqvae_config({"shared_codebook": False, "n_embed": [7, 9, 8]}),
        rqvae_state((7, 9, 8)),
    ),
    "batch norm": lambda: ("discriminator", DISCRIMINATOR, discriminator_state()),
    "act norm": lambda: ("discriminator", DISCRIMINATOR | {"use_actnorm": True}, discriminator_state(True)),
    **{
        f"transformer, {name}": lambda changes=changes: (
            "rqtransformer",
            TRANSFORMER | changes,
            transformer_state(TRANSFORMER | changes),
        )
        for name, changes in VARIANTS.items()
    },
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())
def test_export_gives_the_imported_tensors_back_bit_for_bit(make):
    name, config, state = make()
    kind = official.KINDS[name]
    settings = kind.settings(config)
    variables = kind.variables(state, settings)
    arrays = official.official_state(name, variables, settings)
    assert list(jax.tree.leaves(variables)) == []  # nothing was held twice
    assert arrays.keys() == state.keys()
    for key, value in state.items():
        if not key.endswith("num_batches_tracked"):
            assert arrays[key].dtype == value.dtype and arrays[key].shape == value.shape, key
            np.testing.assert_array_equal(arrays[key], value, err_msg=key)


def test_export_refuses_arrays_that_the_original_does_not_have():
    settings = official.discriminator_settings(DISCRIMINATOR)
    variables = official.discriminator_variables(discriminator_state(), settings)
    variables["params"]["conv9"] = {"kernel": np.zeros(3)}
    with pytest.raises(
        ValueError, match=r"variables: the original has no place for \['params'\]\['conv9'\]\['kernel'\]"
    ):
        official.official_state("discriminator", variables, settings)

"""Official configs and state dicts become our settings and variables, whole and in the right layout.

The official names and shapes are written down here a second time, from the modules of the original.
"""

import json

import jax
import numpy as np
import pytest

from rq_jax import models, torch_import

BOTTLENECK = {
    "bottleneck_type": "rq",
    "embed_dim": 6,
    "n_embed": 7,
    "latent_shape": [8, 8, 6],
    "code_shape": [8, 8, 3],
    "shared_codebook": True,
    "decay": 0.98,
    "restart_unused_codes": True,
}
CODER = {
    "double_z": False,
    "z_channels": 5,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 4,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.1,
}
TRANSFORMER = {
    "type": "rq-transformer",
    "block_size": [2, 5, 3],
    "vocab_size": 7,
    "vocab_size_cond": 11,
    "block_size_cond": 4,
    "embed_dim": 8,
    "input_embed_dim": 6,
    "input_emb_vqvae": True,
    "head_emb_vqvae": True,
    "cumsum_depth_ctx": True,
    "shared_tok_emb": True,
    "shared_cls_emb": True,
    "body": {"n_layer": 3, "block": {"n_head": 2}},
    "head": {"n_layer": 2, "block": {"n_head": 2}},
}


def rqvae_config(hparams=None, ddconfig=None, **arch):
    return {
        "type": "rq-vae",
        "hparams": BOTTLENECK | (hparams or {}),
        "ddconfig": CODER | (ddconfig or {}),
        **arch,
    }


# --- official names and shapes ------------------------------------------------------------------------------


def affine(key, weight, bias=True):
    """A module's weight and the bias over its first axis."""
    return {f"{key}.weight": weight} | ({f"{key}.bias": weight[:1]} if bias else {})


def res_block(key, i, o):
    shapes = affine(f"{key}.norm1", (i,)) | affine(f"{key}.conv1", (o, i, 3, 3))
    shapes |= affine(f"{key}.norm2", (o,)) | affine(f"{key}.conv2", (o, o, 3, 3))
    return shapes | (affine(f"{key}.nin_shortcut", (o, i, 1, 1)) if i != o else {})


def attention_block(key, c):
    shapes = affine(f"{key}.norm", (c,))
    for name in ("q", "k", "v", "proj_out"):
        shapes |= affine(f"{key}.{name}", (c, c, 1, 1))
    return shapes


def official_rqvae_shapes(code_sizes, E=6, latent=6, z=5, double=1):
    """Of `CODER`: widths 4 and 8, one block a level, attention at the second level."""
    shapes = affine("encoder.conv_in", (4, 3, 3, 3)) | affine("encoder.conv_out", (double * z, 8, 3, 3))
    shapes |= res_block("encoder.down.0.block.0", 4, 4) | affine("encoder.down.0.downsample.conv", (4, 4, 3, 3))
    shapes |= res_block("encoder.down.1.block.0", 4, 8) | attention_block("encoder.down.1.attn.0", 8)
    shapes |= affine("decoder.conv_in", (8, z, 3, 3)) | affine("decoder.conv_out", (3, 4, 3, 3))
    for i in range(2):
        shapes |= res_block(f"decoder.up.1.block.{i}", 8, 8) | attention_block(f"decoder.up.1.attn.{i}", 8)
        shapes |= res_block(f"decoder.up.0.block.{i}", (8, 4)[i], 4)
    shapes |= affine("decoder.up.1.upsample.conv", (8, 8, 3, 3))
    for side, width in (("encoder", 8), ("decoder", 4)):
        shapes |= res_block(f"{side}.mid.block_1", 8, 8) | res_block(f"{side}.mid.block_2", 8, 8)
        shapes |= attention_block(f"{side}.mid.attn_1", 8) | affine(f"{side}.norm_out", (width,))
    shapes |= affine("quant_conv", (latent, double * z, 1, 1)) | affine("post_quant_conv", (z, latent, 1, 1))
    for d, K in enumerate(code_sizes):
        key = f"quantizer.codebooks.{d}"
        shapes |= {f"{key}.weight": (K + 1, E), f"{key}.cluster_size_ema": (K,), f"{key}.embed_ema": (K, E)}
    return shapes


def official_transformer_shapes(arch):
    (h, w, D), M, E = arch["block_size"], arch["embed_dim"], arch["input_embed_dim"]
    sizes = arch["vocab_size"] if isinstance(arch["vocab_size"], list) else [arch["vocab_size"]] * D
    V, U = max(arch["vocab_size_cond"], 1), max(arch["block_size_cond"], 1)
    shapes = {"pos_emb_cond": (1, U, M), "pos_emb_hw": (1, h * w, M), "pos_emb_d": (1, D, M)}
    shapes |= {"cond_emb.weight": (V, M)} | affine("classifier.layer_norm", (M,))
    if arch["input_emb_vqvae"]:
        shapes |= affine("input_mlp", (M, E))
    if arch["head_emb_vqvae"]:
        shapes |= affine("head_mlp", (M, E))
    if not (arch["input_emb_vqvae"] and arch["head_emb_vqvae"]):
        shared = arch["shared_tok_emb"]
        shapes |= {"tok_emb.weight": (sizes[0] if shared else sum(sizes), M)}
        shapes |= {} if shared else {"tok_emb.offsets": (D,)}
    if arch["shared_cls_emb"]:
        shapes |= affine("classifier.linear", (sizes[0], M))
    else:
        shapes |= {"classifier.linear.weight": (D, M, max(sizes)), "classifier.linear.bias": (D, max(sizes))}
    if U > 1:
        shapes |= affine("cond_classifier.layer_norm", (M,)) | affine("cond_classifier.linear", (V, M))
    for stack in ("body", "head"):
        block = arch[stack].get("block", {})
        for i in range(arch[stack]["n_layer"]):
            key = f"{stack}_transformer.blocks.{i}"
            shapes |= affine(f"{key}.ln1", (M,)) | affine(f"{key}.ln2", (M,))
            for name in ("key", "query", "value", "proj"):
                shapes |= affine(f"{key}.attn.{name}", (M, M), block.get("attn_bias", True))
            shapes |= affine(f"{key}.mlp.0", (4 * M, M), block.get("mlp_bias", True))
            shapes |= affine(f"{key}.mlp.2", (M, 4 * M), block.get("mlp_bias", True))
    return shapes


def random_state(shapes):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def rqvae_state(code_sizes, shared=False, **kwargs):
    state = random_state(official_rqvae_shapes(code_sizes, **kwargs))
    for key in [key for key in state if key.startswith("quantizer.")]:
        if shared:
            state[key] = state[key.replace(key.split(".")[2], "0", 1)].copy()
    return state


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
    entries.pop("discriminator-released")
    assert len(entries) == 14
    return entries


def test_released_configs_are_covered_to_the_last_key_and_parameter(released):
    for name, entry in released.items():
        kind = entry["config"]["type"].replace("-", "")
        settings = getattr(torch_import, f"{kind}_settings")(entry["config"])
        table = getattr(torch_import, f"{kind}_table")(settings)
        assert table.official_shapes() == {key: tuple(shape) for key, (shape, _) in entry["state_dict"].items()}, name
        used = [key for rule in table.rules for key in (*rule.keys, *rule.aliases)] + list(table.constants)
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
        assert count == entry["n_parameters"], name


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
    settings = torch_import.rqvae_settings(rqvae_config(hparams, ddconfig))
    state = rqvae_state(code_sizes, settings["use_shared_codebook"], **layout)
    variables = torch_import.rqvae_variables(state, settings)
    assert shapes_of(variables) == shapes_of(models.abstract_variables(models.create("rqvae", **settings)))
    copies = [f"codebooks.{d}." for d in range(1, len(code_sizes)) if settings["use_shared_codebook"]]
    tensors = {key: value for key, value in state.items() if not any(copy in key for copy in copies)}
    assert_same_numbers(variables, [v[:-1] if "books" in k and "weight" in k else v for k, v in tensors.items()])


def test_rqvae_layout():
    state = rqvae_state((7, 9, 8))
    config = rqvae_config({"shared_codebook": False, "n_embed": [7, 9, 8]})
    variables = torch_import.rqvae_variables(state, torch_import.rqvae_settings(config))
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
    variables = torch_import.rqvae_variables(state, torch_import.rqvae_settings(rqvae_config()))
    leaves = jax.tree.leaves(variables)
    assert all(leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in leaves)


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
    settings = torch_import.rqtransformer_settings(arch)
    state = random_state(official_transformer_shapes(arch))
    if "tok_emb.offsets" in state:
        sizes = arch["vocab_size"] if isinstance(arch["vocab_size"], list) else [arch["vocab_size"]] * 3
        state["tok_emb.offsets"] = np.array([0, sizes[0], sizes[0] + sizes[1]])
    variables = torch_import.rqtransformer_variables(state, settings)
    expected = models.abstract_variables(models.create("rqtransformer", **settings))
    assert shapes_of(variables) == shapes_of({"params": expected["params"]})
    assert_same_numbers(variables, [value for key, value in state.items() if key != "tok_emb.offsets"])


def test_rqtransformer_layout():
    state = random_state(official_transformer_shapes(TRANSFORMER))
    params = torch_import.rqtransformer_variables(state, torch_import.rqtransformer_settings(TRANSFORMER))["params"]
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
    settings = torch_import.rqtransformer_settings(TRANSFORMER)
    state = random_state(official_transformer_shapes(TRANSFORMER))
    del state["pos_emb_d"], state["body_transformer.blocks.1.ln2.bias"]
    state["module.extra"] = np.zeros(3)
    state["input_mlp.weight"] = state["input_mlp.weight"].T
    with pytest.raises(ValueError) as error:
        torch_import.rqtransformer_variables(state, settings)
    assert str(error.value) == (
        "state dict: does not fit its config: missing pos_emb_d, body_transformer.blocks.1.ln2.bias; "
        "unexpected module.extra; input_mlp.weight has shape (6, 8) instead of (8, 6); take both from one checkpoint"
    )


def test_copies_of_a_shared_codebook_that_differ_are_named():
    state = rqvae_state((7, 7, 7), shared=True)
    state["quantizer.codebooks.2.embed_ema"][3, 1] += 1
    with pytest.raises(ValueError, match=r"codebooks\.2\.embed_ema differs from quantizer\.codebooks\.0\.embed_ema;"):
        torch_import.rqvae_variables(state, torch_import.rqvae_settings(rqvae_config()))


def test_token_offsets_that_differ_are_named():
    arch = TRANSFORMER | VARIANTS["separate tokens"]
    state = random_state(official_transformer_shapes(arch)) | {"tok_emb.offsets": np.array([0, 7, 15])}
    with pytest.raises(ValueError, match=r"tok_emb\.offsets differs from \[0, 7, 14\];"):
        torch_import.rqtransformer_variables(state, torch_import.rqtransformer_settings(arch))


# --- configs ------------------------------------------------------------------------------------------------


def test_rqvae_settings():
    config = {"dataset": {"type": "x"}, "arch": rqvae_config({"code_shape": [4, 2, 3]}, checkpointing=True)}
    assert torch_import.rqvae_settings(config) == {
        "image_size": 16,
        "code_shape": (4, 2, 3),
        "code_dim": 48,
        "codebook_size": 7,
        "in_channels": 3,
        "width": 4,
        "width_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "z_channels": 5,
        "use_double_z": False,
        "use_resample_conv": True,
        "dropout": 0.1,
        "use_shared_codebook": True,
        "codebook_decay": 0.98,
        "use_restart": True,
        "use_remat": True,
    }


def test_rqvae_settings_that_are_absent_take_the_defaults_of_the_original():
    config = rqvae_config()
    for section, names in (
        ("hparams", ("bottleneck_type", "shared_codebook", "decay", "restart_unused_codes", "n_embed")),
        ("ddconfig", ("double_z", "dropout")),
    ):
        config[section] = {key: value for key, value in config[section].items() if key not in names}
    settings = torch_import.rqvae_settings(config)
    assert not settings["use_shared_codebook"] and not settings["use_restart"]
    assert settings["codebook_decay"] == 0.99
    assert (settings["codebook_size"], settings["use_double_z"], settings["dropout"]) == (512, True, 0.0)


def test_rqtransformer_settings():
    block = {"n_head": 2, "gelu": "v2", "attn_bias": False, "attn_pdrop": 0.2, "resid_pdrop": 0.3}
    arch = TRANSFORMER | {"embd_pdrop": 0.4, "shared_cls_emb": False, "vocab_size": None}
    arch |= {"body": {"n_layer": 3, "block": block}, "head": {"n_layer": 2, "block": block | {"n_head": 4}}}
    assert torch_import.rqtransformer_settings({"arch": arch, "dataset": {"vocab_size": [7, 7, 7]}}) == {
        "codebook_size": 7,
        "code_shape": (2, 5, 3),
        "code_dim": 6,
        "model_dim": 8,
        "num_heads": 2,
        "depth_num_heads": 4,
        "spatial_layers": 3,
        "depth_layers": 2,
        "cond_vocab_size": 11,
        "cond_length": 4,
        "use_tokenizer_input": True,
        "use_tokenizer_depth_input": True,
        "use_cumulative_depth": True,
        "use_shared_token_embedding": True,
        "use_shared_classifier": False,
        "use_attention_bias": False,
        "use_mlp_bias": True,
        "gelu": "sigmoid",
        "embedding_dropout": 0.4,
        "attention_dropout": 0.2,
        "residual_dropout": 0.3,
    }


def test_rqtransformer_settings_that_are_absent_take_the_defaults_of_the_original():
    kept = ("block_size", "vocab_size", "embed_dim", "body", "head")
    settings = torch_import.rqtransformer_settings({key: TRANSFORMER[key] for key in kept})
    switches = {name for name, value in settings.items() if name.startswith("use_") and value}
    assert switches == {"use_attention_bias", "use_mlp_bias"}
    assert (settings["cond_vocab_size"], settings["cond_length"], settings["gelu"]) == (1, 1, "exact")
    assert (settings["embedding_dropout"], settings["residual_dropout"]) == (0.0, 0.1)
    models.create("rqtransformer", **settings)


def without(config, name, *rest):
    """The config less one entry, given by its path."""
    if rest:
        return config | {name: without(config[name], *rest)}
    return {key: value for key, value in config.items() if key != name}


@pytest.mark.parametrize(
    "config, message",
    [
        (TRANSFORMER, "arch.type: 'rq-transformer' is another model; a config of 'rq-vae' is needed"),
        (without(rqvae_config(), "hparams", "code_shape"), "arch.hparams.code_shape: missing"),
        (
            rqvae_config({"bottleneck_type": "vq"}),
            "arch.hparams.bottleneck_type: 'vq' is unknown; allowed is 'rq'",
        ),
        (rqvae_config(ddconfig={"out_ch": 1}), "arch.ddconfig.out_ch: 1 must be in_channels, 3"),
        (
            rqvae_config({"latent_shape": [4, 4, 6]}),
            r"arch.hparams.latent_shape: \(4, 4, 6\) must be \(8, 8, 6\)",
        ),
    ],
)
def test_rqvae_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        torch_import.rqvae_settings(config)


@pytest.mark.parametrize(
    "config, message",
    [
        (rqvae_config(), "arch.type: 'rq-vae' is another model; a config of 'rq-transformer' is needed"),
        (without(TRANSFORMER, "vocab_size"), "arch.vocab_size: missing"),
        (without(TRANSFORMER, "body", "n_layer"), "arch.body.n_layer: missing"),
        (
            TRANSFORMER | {"head": {"n_layer": 1, "block": {"n_head": 2, "mlp_bias": False}}},
            "arch.head.block.mlp_bias: False must equal the True of arch.body.block",
        ),
        (
            TRANSFORMER | {k: {"n_layer": 1, "block": {"n_head": 2, "gelu": "v3"}} for k in ("body", "head")},
            "arch.body.block.gelu: 'v3' is unknown; allowed are 'v1' and 'v2'",
        ),
    ],
)
def test_rqtransformer_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        torch_import.rqtransformer_settings(config)

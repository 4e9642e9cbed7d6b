"""Official configs become our settings, and ours official configs."""

import dataclasses

import numpy as np
import pytest
from official_states import DISCRIMINATOR, TRANSFORMER, VQGAN, rqvae_config, without

from rq_jax import models
from rq_jax.interop import official


def test_rqvae_settings():
    config = {"dataset": {"type": "x"}, "arch": rqvae_config({"code_shape": [4, 2, 3]}, checkpointing=True)}
    assert official.rqvae_settings(config) == {
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
    settings = official.rqvae_settings(config)
    assert not settings["use_shared_codebook"] and not settings["use_restart"]
    assert settings["codebook_decay"] == 0.99
    assert (settings["codebook_size"], settings["use_double_z"], settings["dropout"]) == (512, True, 0.0)


def test_rqtransformer_settings():
    block = {"n_head": 2, "gelu": "v2", "attn_bias": False, "attn_pdrop": 0.2, "resid_pdrop": 0.3}
    arch = TRANSFORMER | {"embd_pdrop": 0.4, "shared_cls_emb": False, "vocab_size": None}
    arch |= {"body": {"n_layer": 3, "block": block}, "head": {"n_layer": 2, "block": block | {"n_head": 4}}}
    assert official.rqtransformer_settings({"arch": arch, "dataset": {"vocab_size": [7, 7, 7]}}) == {
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
    settings = official.rqtransformer_settings({key: TRANSFORMER[key] for key in kept})
    switches = {name for name, value in settings.items() if name.startswith("use_") and value}
    assert switches == {"use_attention_bias", "use_mlp_bias"}
    assert (settings["cond_vocab_size"], settings["cond_length"], settings["gelu"]) == (1, 1, "exact")
    assert (settings["embedding_dropout"], settings["residual_dropout"]) == (0.0, 0.1)
    models.create("rqtransformer", **settings)


@pytest.mark.parametrize(
    "config, message",
    [
        (TRANSFORMER, "arch.type: 'rq-transformer' is another model; a config of 'rq-vae' is needed"),
        (without(rqvae_config(), "hparams", "code_shape"), "arch.hparams.code_shape: missing"),
        (
            rqvae_config({"bottleneck_type": "vq"}),
            "arch.hparams.bottleneck_type: 'vq' is not supported; allowed is 'rq'",
        ),
        (rqvae_config(ddconfig={"give_pre_end": True}), "arch.ddconfig.give_pre_end: 'True' is not supported"),
        (rqvae_config(ddconfig={"resolution": 17}), "arch.ddconfig.resolution: 17 must be a positive multiple of 2"),
        (
            rqvae_config(ddconfig={"attn_resolutions": 8}),
            "arch.ddconfig.attn_resolutions: '8' is no list of .* integers",
        ),
        (rqvae_config(ddconfig={"ch_mult": 2}), "arch.ddconfig.ch_mult: '2' is no list of at most 16 integers"),
        (rqvae_config({"n_embed": [7, 7]}), r"arch.hparams.n_embed: \(7, 7\) has 2 entries for code depth 3"),
        (rqvae_config({"code_shape": [8, 8]}), r"arch.hparams.code_shape: '\(8, 8\)' must be three positive integers"),
        (rqvae_config({"latent_shape": 8}), "arch.hparams.latent_shape: '8' must be three positive integers"),
        (rqvae_config(ddconfig={"out_ch": 1}), "arch.ddconfig.out_ch: 1 must be in_channels, 3"),
        (
            rqvae_config({"latent_shape": [8, 8, 5]}),
            r"arch.hparams.latent_shape: \(8, 8, 5\) must end in embed_dim, 6",
        ),
        (
            rqvae_config({"latent_shape": [8, 4, 6]}),
            r"arch.hparams.code_shape: \(8, 8\) must divide the grid of latent_shape, \(8, 4\)",
        ),
    ],
)
def test_rqvae_config_errors(config, message):
    with pytest.raises(ValueError, match=message):
        official.rqvae_settings(config)


@pytest.mark.parametrize(
    "config, message",
    [
        (rqvae_config(), "arch.type: 'rq-vae' is another model; a config of 'rq-transformer' is needed"),
        (without(TRANSFORMER, "vocab_size"), "arch.vocab_size: missing"),
        (TRANSFORMER | {"block_size": [2, 5]}, r"arch.block_size: '\(2, 5\)' must be three positive integers"),
        (without(TRANSFORMER, "input_embed_dim"), "arch.input_embed_dim: missing"),
        (without(TRANSFORMER, "body", "n_layer"), "arch.body.n_layer: missing"),
        (without(TRANSFORMER, "head", "block", "n_head"), "arch.head.block.n_head: missing"),
        (
            TRANSFORMER | {"body": {"n_layer": 1, "block": {"n_head": 2, "embed_dim": 6}}},
            "arch.body.block.embed_dim: 6 must be arch.embed_dim, 8",
        ),
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
        official.rqtransformer_settings(config)


# --- every field, with values of another type or beyond all bounds ------------------------------------------


def fields(tree, path=()):
    """Paths of all leaves of a config."""
    for name, value in tree.items():
        yield from fields(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]


def with_value(tree, path, value):
    name, *rest = path
    return tree | {name: with_value(tree[name], rest, value) if rest else value}


BLOCK = {"n_head": 2, "embed_dim": 8, "attn_bias": True, "mlp_bias": True, "attn_pdrop": 0.0, "resid_pdrop": 0.1}
FULL_TRANSFORMER = TRANSFORMER | {
    "embd_pdrop": 0.1,
    "body": {"n_layer": 1, "block": BLOCK | {"gelu": "v1"}},
    "head": {"n_layer": 1, "block": BLOCK | {"gelu": "v1"}},
}
SAMPLING = {"temp": 0.9, "top_k": 5, "top_p": 0.5}
CONFIGS = {
    "rqvae": {"arch": rqvae_config(checkpointing=False)},
    "rqtransformer": {"arch": FULL_TRANSFORMER},
    "discriminator": {"gan": {"disc": {"arch": DISCRIMINATOR}}},
    "vqgan": VQGAN,
    "sampling": {"sampling": SAMPLING, "experiment": {"sample": {"top_k": 5, "top_p": 0.5}}},
}
STRANGE = {
    "a dict": {"a": 1}, "text": "x\x1b[31m\nnext", "lists in a list": [[1], [2], [3]], "huge": 2**70, "negative": -3,
    "a huge float": 1e308, "nan": float("nan"), "a number of many digits": 10**1000, "much text": "7" * 10**5,
    "a long list": [7] * 10_000, "a list of dicts": [{}, {}, {}], "many": 10**8,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_value_is_refused_in_one_line_or_does_not_matter(name, value):
    """Wherever it stands: before it is hashed, compared, divided by, or makes a table."""
    refused = []
    for path in fields(CONFIGS[name]):
        config = with_value(CONFIGS[name], path, value)
        try:
            if name == "sampling":
                settings = official.sample_settings(config)
                assert all(np.size(setting) < 10 for setting in settings.values())
            else:
                settings = official.KINDS[name].settings(config)
                official.discriminator_settings(config) if name == "vqgan" else None
                models.create(official.KINDS[name].model, **settings)
                official.KINDS[name].table(settings)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 600, path
            refused.append(path)
    assert refused


def test_numbers_and_booleans_in_quotes_are_read_where_they_are_plain():
    plain = official.rqvae_settings(rqvae_config())
    quoted = rqvae_config({"n_embed": "7", "decay": "9.8e-1", "shared_codebook": "True", "code_shape": ["8", 8, "3"]})
    assert official.rqvae_settings(quoted) == plain
    assert official.rqvae_settings(rqvae_config({"n_embed": 7.0}, {"dropout": " .1"})) == plain
    for value in ("0x7", "7_0", "seven", "", "7.5", 7.5, True, "nan", "7 7", "٧"):
        with pytest.raises(ValueError, match=r"arch.hparams.n_embed: '.*' is no integer"):
            official.rqvae_settings(rqvae_config({"n_embed": value}))
    for name, value in (("shared_codebook", "yes"), ("shared_codebook", 1), ("decay", "slow"), ("decay", "inf")):
        with pytest.raises(ValueError, match=f"arch.hparams.{name}: '{value}' is no (true or false|number)"):
            official.rqvae_settings(rqvae_config({name: value}))


def test_stacks_may_have_unlike_gelus():
    stacks = {"body": {"n_layer": 1, "block": BLOCK}, "head": {"n_layer": 1, "block": BLOCK | {"gelu": "v2"}}}
    settings = official.rqtransformer_settings(TRANSFORMER | stacks)
    assert (settings["gelu"], settings["depth_gelu"]) == ("exact", "sigmoid")
    assert "depth_gelu" not in official.rqtransformer_settings(TRANSFORMER)


# --- structures that the released configs do not have -------------------------------------------------------


@pytest.mark.parametrize(
    "latent_shape, resolution, chosen, image_size, heights",
    [
        ([8, 8, 6], 16, [8], 16, (8,)),
        ([8, 4, 6], 16, [8], (16, 8), (8,)),
        ([8, 4, 6], 32, [16], (16, 8), (8,)),  # half of the resolution is half of the height
        ([4, 8, 6], 32, [32, 5], (8, 16), (8,)),
        ([4, 4, 6], 16, [16, 8], 8, (8, 4)),
        ([8, 8, 6], 16, [], 16, ()),
    ],
)
def test_pictures_follow_the_latent_grid_and_attention_the_resolution(
    latent_shape, resolution, chosen, image_size, heights
):
    hparams = {"latent_shape": latent_shape, "code_shape": [*latent_shape[:2], 3]}
    config = rqvae_config(hparams, {"resolution": resolution, "attn_resolutions": chosen})
    settings = official.rqvae_settings(config)
    assert (settings["image_size"], settings["attention_resolutions"]) == (image_size, heights)
    models.create("rqvae", **settings)


def test_stacks_without_layers_need_no_blocks():
    arch = TRANSFORMER | {"body": {"n_layer": 0}, "head": {"n_layer": 0}}
    settings = official.rqtransformer_settings(arch)
    assert settings["num_heads"] == 1 and settings["gelu"] == "exact" and "depth_num_heads" not in settings
    arch = TRANSFORMER | {"body": {"n_layer": 0}, "head": {"n_layer": 1, "block": {"n_head": 4, "gelu": "v2"}}}
    settings = official.rqtransformer_settings(arch)
    assert (settings["num_heads"], settings["gelu"]) == (4, "sigmoid")


def test_fields_that_nothing_reads_are_ignored():
    arch = {"ema": True, "ar_hierarchy": True, "use_padding_emb": True, "scaled_head_emb_vqvae": True, "whatever": 1}
    assert official.rqtransformer_settings(TRANSFORMER | arch) == official.rqtransformer_settings(TRANSFORMER)
    hparams = {"use_padding_idx": True, "masked_dropout": 0.5, "loss_type": "l1", "latent_loss_weight": 3}
    config = rqvae_config(hparams, {"tanh_out": True, "attn_type": "none"}, code_hier=2, ema=0.9)
    assert official.rqvae_settings(config) == official.rqvae_settings(rqvae_config())


# --- the tokenizer of a transformer -------------------------------------------------------------------------

TOKENIZER = {"code_shape": (2, 5, 3), "codebook_size": 7, "code_dim": 6, "use_shared_codebook": False}


def test_the_tokenizer_says_whether_its_codebook_is_shared():
    settings = official.rqtransformer_settings(TRANSFORMER, TOKENIZER)
    assert settings["use_shared_codebook"] is False
    assert settings | {"use_shared_codebook": True} == official.rqtransformer_settings(
        TRANSFORMER, TOKENIZER | {"use_shared_codebook": True, "code_shape": [2, 5, 3]}
    )


def test_a_transformer_that_reads_no_code_vectors_takes_their_length_from_the_tokenizer():
    arch = TRANSFORMER | {"input_emb_vqvae": False, "head_emb_vqvae": False}
    assert official.rqtransformer_settings(arch, TOKENIZER | {"code_dim": 5})["code_dim"] == 5


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"code_shape": (2, 5, 4), "codebook_size": 7},
            r"arch.block_size: \(2, 5, 3\) differs from the tokenizer's \(2, 5, 4\)",
        ),
        ({"codebook_size": 8}, r"arch.vocab_size: \(7, 7, 7\) differs from the tokenizer's \(8, 8, 8\)"),
        ({"codebook_size": (7, 7, 8)}, r"arch.vocab_size: \(7, 7, 7\) differs from the tokenizer's \(7, 7, 8\)"),
        ({"code_dim": 5}, "arch.input_embed_dim: 6 differs from the tokenizer's 5; give the one of this pair"),
    ],
)
def test_a_tokenizer_of_another_pair_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        official.rqtransformer_settings(TRANSFORMER, TOKENIZER | change)


# --- discriminator, VQGAN, sampling -------------------------------------------------------------------------


def test_discriminator_settings():
    expected = {"in_channels": 3, "width": 5, "num_layers": 2, "use_actnorm": False}
    nested = {"gan": {"disc": {"arch": DISCRIMINATOR}}}
    for config in (DISCRIMINATOR, nested, VQGAN, nested | {"arch": rqvae_config()}):
        assert official.discriminator_settings(config) == expected
    defaults = {"model": {"params": {"lossconfig": {"params": {"disc_start": 1}}}}}
    assert official.discriminator_settings(defaults) == expected | {"width": 64, "num_layers": 3}
    with pytest.raises(ValueError, match="gan.disc.arch.ndf: missing"):
        official.discriminator_settings({"gan": {"disc": {"arch": without(DISCRIMINATOR, "ndf")}}})


def test_vqgan_settings():
    settings = official.vqgan_settings(VQGAN)
    model = models.create("rqvae", **settings)
    assert (model.code_shape, model.code_dim, model.codebook_size) == ((8, 8, 1), 6, 7)
    assert (model.image_size, model.width, model.z_channels) == (16, 4, 5)
    assert not model.use_restart  # else fine-tuning would replace each code that its first batch does not use


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"target": "taming.models.vqgan.GumbelVQ"},
            "model.target: 'taming.models.vqgan.GumbelVQ' has another quantizer",
        ),
        ({"params": without(VQGAN["model"]["params"], "n_embed")}, "model.params.n_embed: missing"),
        (
            {"params": VQGAN["model"]["params"] | {"remap": "used.npy"}},
            "model.params.remap: 'used.npy' is not supported",
        ),
        ({"params": None}, "model.params.n_embed: missing"),
    ],
)
def test_vqgan_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        official.vqgan_settings({"model": VQGAN["model"] | change})


@pytest.mark.parametrize("name, value", [("tanh_out", True), ("use_linear_attn", True), ("attn_type", "none")])
def test_relatives_of_vqgan_are_refused_by_name(name, value):
    params = VQGAN["model"]["params"]
    config = {"model": {"params": params | {"ddconfig": params["ddconfig"] | {name: value}}}}
    with pytest.raises(ValueError, match=f"model.params.ddconfig.{name}: '{value}' is not supported; allowed is"):
        official.vqgan_settings(config)


def test_sample_settings():
    assert official.sample_settings({}) == {}
    config = {"experiment": {"sample": {"top_k": 250, "top_p": 1.0}}}
    assert official.sample_settings(config) == {"top_k": 250, "top_p": 1.0}
    config |= {"sampling": {"temp": 0.9, "top_k": [5], "top_p": [0.5, 0.6, 0.7]}}
    assert official.sample_settings(config) == {"temperature": 0.9, "top_k": 5, "top_p": (0.5, 0.6, 0.7)}


# --- the way back -------------------------------------------------------------------------------------------


def all_settings(name, settings):
    """With the defaults of the model."""
    model = models.create(name, **settings)
    fields = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    return {field: getattr(model, field) for field in fields}


def groups_of_32(hparams=None, ddconfig=None):
    return rqvae_config(hparams, {"ch": 32} | (ddconfig or {}))


@pytest.mark.parametrize(
    "name, config",
    [
        ("rqvae", groups_of_32()),
        ("rqvae", groups_of_32({"shared_codebook": False, "n_embed": [7, 9, 8], "decay": [0.9, 0.8, 0.7]})),
        ("rqvae", groups_of_32({"code_shape": [4, 2, 1]}, {"in_channels": 1, "out_ch": 1, "resamp_with_conv": False})),
        (
            "rqvae",
            groups_of_32(
                {"latent_shape": [8, 4, 6], "code_shape": [4, 4, 2]}, {"resolution": 64, "attn_resolutions": [32]}
            ),
        ),
        ("rqtransformer", TRANSFORMER),
        ("rqtransformer", TRANSFORMER | {"vocab_size": [7, 9, 8], "shared_tok_emb": False, "shared_cls_emb": False}),
        ("rqtransformer", TRANSFORMER | {"head": {"n_layer": 2, "block": {"n_head": 4}}, "embd_pdrop": 0.4}),
        ("rqtransformer", TRANSFORMER | {"head": {"n_layer": 0}, "vocab_size_cond": 0, "block_size_cond": 0}),
        ("rqtransformer", TRANSFORMER | {"head": {"n_layer": 2, "block": {"n_head": 2, "gelu": "v2"}}}),
        (
            "rqtransformer",
            TRANSFORMER
            | {
                stack: {"n_layer": 1, "block": {"n_head": 2, "gelu": "v2", "mlp_bias": False, "resid_pdrop": 0.3}}
                for stack in ("body", "head")
            },
        ),
        ("discriminator", DISCRIMINATOR | {"use_actnorm": True, "num_layers": 3}),
    ],
)
def test_official_config_is_the_way_back(name, config):
    settings = official.KINDS[name].settings(config)
    if name == "rqtransformer":
        settings.setdefault("use_shared_codebook", True)
    back = official.official_config(name, all_settings(name, settings))
    assert official.find_kind(back) == name
    again = official.KINDS[name].settings(back)
    if name == "rqtransformer":
        again.setdefault("use_shared_codebook", True)
    assert models.create(name, **again) == models.create(name, **settings)


def test_defaults_of_sampling_are_in_the_official_config():
    settings = all_settings("rqtransformer", official.rqtransformer_settings(TRANSFORMER))
    config = official.official_config("rqtransformer", settings, {"temperature": 0.8, "top_k": 5, "top_p": None})
    assert official.sample_settings(config) == {"temperature": 0.8, "top_k": 5}


@pytest.mark.parametrize(
    "name, settings, change, message",
    [
        (
            "rqvae",
            groups_of_32(),
            {"norm_groups": 8},
            "model.norm_groups: 8 cannot be exported; the original has 32 alone",
        ),
        ("rqvae", groups_of_32(), {"use_double_z": True}, "model.use_double_z: True cannot be exported"),
        (
            "rqvae",
            rqvae_config(),
            {},
            "model.width: 4 cannot be exported; the original normalises 32 groups of channels",
        ),
        ("rqtransformer", TRANSFORMER, {"use_null_cond": True}, "model.use_null_cond: True cannot be exported"),
    ],
)
def test_what_the_original_cannot_express_is_refused_by_name(name, settings, change, message):
    settings = all_settings(name, official.KINDS[name].settings(settings) | change)
    with pytest.raises(ValueError, match=message):
        official.official_config(name, settings)


def test_a_model_that_the_original_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match="model 'vit': the original has none; allowed are rqvae, rqtransformer, dqvae, dqtransformer"
    ):
        official.official_config("vit", {})


def test_what_the_config_cannot_say_is_told():
    settings = all_settings("rqvae", official.rqvae_settings(groups_of_32()))
    assert official.left_out_settings("rqvae", settings) == {}
    changes = {"codebook_update": "pooled", "use_kmeans_init": True, "dtype": "bfloat16"}
    assert official.left_out_settings("rqvae", settings | changes) == changes

"""For each model, the table of official tensors behind every array of ours."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rq_jax.interop.official.rules import Rule, Table
from rq_jax.interop.official.settings import (
    Settings,
    codebook_sizes,
    depth_setting,
    image_shape,
    latent_grid,
    token_offsets,
)

Renames = tuple[tuple[str, str], ...]

# Names of the RQ-VAE's modules, official to ours, one line after the other.
RENAMES: Renames = (
    (r"(down|up)\.(\d+)\.block\.(\d+)", r"level\2_block\3"),
    (r"(down|up)\.(\d+)\.attn\.(\d+)", r"level\2_attention\3"),
    (r"(down|up)\.(\d+)\.\1sample", r"level\2_\1"),
    (r"mid\.block_", "middle_block"),
    (r"mid\.attn_1", "middle_attention"),
    (r"nin_shortcut$", "shortcut"),
    (r"\.q$", ".query"),
    (r"\.k$", ".key"),
    (r"\.v$", ".value"),
    (r"\.proj_out$", ".out"),
    (r"\.", "/"),
)
# Our name, official name, axes, padding rows.
CODEBOOK = (
    ("codebook_KE", "weight", "K E", 1),
    ("counts_K", "cluster_size_ema", "K", 0),
    ("sums_KE", "embed_ema", "K E", 0),
)


def rqvae_table(settings: Settings) -> Table:
    """The table of an RQ-VAE; settings from `rqvae_settings`."""
    return Table(_autoencoder(settings) + _codebooks(settings), {})


def vqgan_table(settings: Settings) -> Table:
    """The table of a VQGAN; settings from `vqgan_settings`."""
    sizes = {"K": settings["codebook_size"], "E": settings["code_dim"]}
    codebook = Rule("codebook/codebook_KE", ("quantize.embedding.weight",), "1 K E -> K E", sizes)
    # Its state dict holds its losses too, and colours that paint segmentations for the log.
    return Table([*_autoencoder(settings), codebook], {}, strangers=("loss.", "colorize"))


def _autoencoder(settings: Settings) -> list[Rule]:
    """The convolutional networks, which the RQ-VAE has from VQGAN."""
    (H, W), (h, w, _), z_channels = latent_grid(settings), settings["code_shape"], settings["z_channels"]
    latent_dim = settings["code_dim"] // ((H // h) * (W // w))
    encoder_out = 2 * z_channels if settings["use_double_z"] else z_channels
    modules = {
        **coder("encoder", settings, settings["in_channels"], encoder_out),
        **coder("decoder", settings, z_channels, settings["in_channels"]),
        "quant_conv": conv(encoder_out, latent_dim, 1),
        "post_quant_conv": conv(latent_dim, z_channels, 1),
    }
    return module_rules(modules)


def module_rules(modules: Mapping[str, dict[str, int]], renames: Renames = RENAMES) -> list[Rule]:
    """Rules of modules by official name, each with the sizes of its axes."""
    rules = []
    for key, sizes in modules.items():
        path = f"params.{key}"
        for official, ours in renames:
            path = re.sub(official, ours, path)
        rules += affine(path, key, sizes)
    return rules


def affine(path: str, key: str, sizes: dict[str, int], use_bias: bool = True) -> list[Rule]:
    """A convolution, or a norm where there are no input channels."""
    name, pattern = ("kernel", "1 O I H W -> H W I O") if "I" in sizes else ("scale", "1 O -> O")
    rules = [Rule(f"{path}/{name}", (f"{key}.weight",), pattern, sizes)]
    return rules + [Rule(f"{path}/bias", (f"{key}.bias",), "1 O -> O", sizes)] if use_bias else rules


def coder(coder: str, settings: Settings, in_channels: int, out_channels: int) -> dict[str, Any]:
    """The modules of the encoder or the decoder by official name, each with the sizes of its axes."""
    modules, features = levels_of(coder, settings, in_channels)
    modules |= middle(f"{coder}.mid", settings["width"] * settings["width_multipliers"][-1])
    modules[f"{coder}.norm_out"] = norm(features)
    return modules | {f"{coder}.conv_out": conv(features, out_channels, 3)}


def levels_of(coder: str, settings: Settings, in_channels: int) -> tuple[dict[str, Any], int]:
    """The first convolution and all levels, and the features that the last level leaves."""
    widths = [settings["width"] * multiplier for multiplier in settings["width_multipliers"]]
    levels, blocks = range(len(widths)), settings["num_res_blocks"]
    direction, features = "down", settings["width"]
    if coder == "decoder":
        levels, blocks, direction, features = levels[::-1], blocks + 1, "up", widths[-1]
    modules: dict[str, Any] = {f"{coder}.conv_in": conv(in_channels, features, 3)}
    for level in levels:
        key = f"{coder}.{direction}.{level}"
        for i in range(blocks):
            modules |= res_block(f"{key}.block.{i}", features, widths[level])
            features = widths[level]
            if image_shape(settings)[0] // 2**level in settings["attention_resolutions"]:
                modules |= attention(f"{key}.attn.{i}", features)
        if level != levels[-1] and settings["use_resample_conv"]:
            modules[f"{key}.{direction}sample.conv"] = conv(features, features, 3)
    return modules, features


def middle(key: str, features: int) -> dict[str, Any]:
    modules = {**res_block(f"{key}.block_1", features, features), **attention(f"{key}.attn_1", features)}
    return modules | res_block(f"{key}.block_2", features, features)


def res_block(key: str, in_features: int, features: int) -> dict[str, Any]:
    modules = {f"{key}.norm1": norm(in_features), f"{key}.conv1": conv(in_features, features, 3)}
    modules |= {f"{key}.norm2": norm(features), f"{key}.conv2": conv(features, features, 3)}
    if in_features != features:
        modules[f"{key}.nin_shortcut"] = conv(in_features, features, 1)
    return modules


def attention(key: str, features: int) -> dict[str, Any]:
    convs = {f"{key}.{name}": conv(features, features, 1) for name in ("q", "k", "v", "proj_out")}
    return {f"{key}.norm": norm(features), **convs}


def conv(in_features: int, features: int, kernel_size: int) -> dict[str, int]:
    return {"O": features, "I": in_features, "H": kernel_size, "W": kernel_size}


def norm(features: int) -> dict[str, int]:
    return {"O": features}


def _codebooks(settings: Settings) -> list[Rule]:
    codes = codebook_sizes(settings)
    sizes, rules = {"K": codes[0], "D": len(codes), "E": settings["code_dim"]}, []
    for name, official, axes, padding in CODEBOOK:
        path, one_of_ours = f"codebook/{name}", f"1 {axes} -> {axes}"
        keys = tuple(f"quantizer.codebooks.{d}.{official}" for d in range(len(codes)))
        if settings["use_shared_codebook"]:
            rules.append(Rule(path, keys[:1], one_of_ours, sizes, keys[1:], padding))
        elif len(set(codes)) == 1:
            rules.append(Rule(path, keys, f"D {axes} -> D {axes}", sizes, (), padding))
        else:
            for d, (key, K) in enumerate(zip(keys, codes, strict=True)):
                rules.append(Rule(f"{path}/{d}", (key,), one_of_ours, {**sizes, "K": K}, (), padding))
    return rules


# Setting or part of the model that has it, our name, official name, pattern.
# T positions, U condition tokens, V their vocabulary, P token embeddings.
_RQTRANSFORMER = (
    ("all", "cond_embedding_VM", "cond_emb.weight", "1 V M -> V M"),
    ("all", "cond_position_UM", "pos_emb_cond", "1 1 U M -> U M"),
    ("all", "position_TM", "pos_emb_hw", "1 1 T M -> T M"),
    ("all", "depth_position_DM", "pos_emb_d", "1 1 D M -> D M"),
    ("all", "classifier_norm/scale", "classifier.layer_norm.weight", "1 M -> M"),
    ("all", "classifier_norm/bias", "classifier.layer_norm.bias", "1 M -> M"),
    ("use_tokenizer_input", "input_EM", "input_mlp.weight", "1 M E -> E M"),
    ("use_tokenizer_input", "input_bias_M", "input_mlp.bias", "1 M -> M"),
    ("use_tokenizer_depth_input", "depth_input_EM", "head_mlp.weight", "1 M E -> E M"),
    ("use_tokenizer_depth_input", "depth_input_bias_M", "head_mlp.bias", "1 M -> M"),
    ("token_embedding", "token_embedding_KM", "tok_emb.weight", "1 P M -> P M"),
    ("use_shared_classifier", "classifier_MK", "classifier.linear.weight", "1 K M -> M K"),
    ("use_shared_classifier", "classifier_bias_K", "classifier.linear.bias", "1 K -> K"),
    ("classifier_per_depth", "classifier_DMK", "classifier.linear.weight", "1 D M K -> D M K"),
    ("classifier_per_depth", "classifier_bias_DK", "classifier.linear.bias", "1 D K -> D K"),
    ("text", "cond_classifier_norm/scale", "cond_classifier.layer_norm.weight", "1 M -> M"),
    ("text", "cond_classifier_norm/bias", "cond_classifier.layer_norm.bias", "1 M -> M"),
    ("text", "cond_classifier_MV", "cond_classifier.linear.weight", "1 V M -> M V"),
    ("text", "cond_classifier_bias_V", "cond_classifier.linear.bias", "1 V -> V"),
)
# The same for all L blocks of a stack, with the official names of one block. Q is 3: query, key and value.
_QKV = ("attn.query", "attn.key", "attn.value")
BLOCKS = (
    ("all", "norm1/scale", ("ln1.weight",), "L M -> L M"),
    ("all", "norm1/bias", ("ln1.bias",), "L M -> L M"),
    ("all", "norm2/scale", ("ln2.weight",), "L M -> L M"),
    ("all", "norm2/bias", ("ln2.bias",), "L M -> L M"),
    ("all", "qkv_M3NA", tuple(f"{x}.weight" for x in _QKV), "(L Q) (N A) M -> L M Q N A"),
    ("all", "out_NAM", ("attn.proj.weight",), "L M (N A) -> L N A M"),
    ("all", "up_MF", ("mlp.0.weight",), "L F M -> L M F"),
    ("all", "down_FM", ("mlp.2.weight",), "L M F -> L F M"),
    ("use_attention_bias", "qkv_bias_3NA", tuple(f"{x}.bias" for x in _QKV), "(L Q) (N A) -> L Q N A"),
    ("use_attention_bias", "out_bias_M", ("attn.proj.bias",), "L M -> L M"),
    ("use_mlp_bias", "up_bias_F", ("mlp.0.bias",), "L F -> L F"),
    ("use_mlp_bias", "down_bias_M", ("mlp.2.bias",), "L M -> L M"),
)


def rqtransformer_table(settings: Settings) -> Table:
    """The table of an RQ-Transformer; settings from `rqtransformer_settings`."""
    (h, w, D), M, codes = settings["code_shape"], settings["model_dim"], codebook_sizes(settings)
    has = {
        **settings,
        "all": True,
        "token_embedding": not (settings["use_tokenizer_input"] and settings["use_tokenizer_depth_input"]),
        "classifier_per_depth": not settings["use_shared_classifier"],
        "text": settings["cond_length"] > 1,
    }
    sizes = {"M": M, "F": 4 * M, "E": settings["code_dim"], "K": max(codes), "D": D, "T": h * w, "Q": 3}
    sizes |= {"U": settings["cond_length"], "V": settings["cond_vocab_size"]}
    sizes["P"] = max(codes) if settings["use_shared_token_embedding"] else sum(codes)
    rows = [row for part, *row in _RQTRANSFORMER if has[part]]
    rules = [Rule(f"params/{name}", (key,), pattern, sizes) for name, key, pattern in rows]
    heads = {"spatial": settings["num_heads"], "depth": depth_setting(settings, "num_heads")}
    for ours, official in (("spatial", "body"), ("depth", "head")):
        layers = range(settings[f"{ours}_layers"])
        stack_sizes = {**sizes, "L": len(layers), "N": heads[ours], "A": M // heads[ours]}
        for name, suffixes, pattern in [row for part, *row in BLOCKS if has[part] and layers]:
            keys = tuple(f"{official}_transformer.blocks.{i}.{suffix}" for i in layers for suffix in suffixes)
            rules.append(Rule(f"params/{ours}_stack/blocks/{name}", keys, pattern, stack_sizes))
    separate_embeddings = has["token_embedding"] and not settings["use_shared_token_embedding"]
    return Table(rules, {"tok_emb.offsets": token_offsets(settings)} if separate_embeddings else {})


# Our path, official name, pattern, official type.
_BATCH_NORM = (
    ("params/norm{}/scale", "weight", "1 C -> C", "float32"),
    ("params/norm{}/bias", "bias", "1 C -> C", "float32"),
    ("batch_stats/norm{}/mean", "running_mean", "1 C -> C", "float32"),
    ("batch_stats/norm{}/var", "running_var", "1 C -> C", "float32"),
)
_ACT_NORM = (
    ("params/norm{}/shift", "loc", "1 1 C 1 1 -> C", "float32"),
    ("params/norm{}/scale", "scale", "1 1 C 1 1 -> C", "float32"),
    ("batch_stats/norm{}/initialized", "initialized", "1 ->", "uint8"),
)


def discriminator_table(settings: Settings) -> Table:
    """The table of a patch discriminator; settings from `discriminator_settings`.

    The original is one list of layers: a convolution and its nonlinearity, then for each of `num_layers` a
    convolution, a norm and a nonlinearity, then the last convolution.
    """
    n, use_actnorm = settings["num_layers"], settings["use_actnorm"]
    widths = [settings["in_channels"], *(settings["width"] * min(2**i, 8) for i in range(n + 1)), 1]
    rules, unread = [], {}
    for i in range(n + 2):
        has_norm = 0 < i <= n
        sizes = conv(widths[i], widths[i + 1], 4)
        rules += affine(f"params/conv{i}", f"main.{max(3 * i - 1, 0)}", sizes, use_actnorm or not has_norm)
        if has_norm:
            for path, official, pattern, dtype in _ACT_NORM if use_actnorm else _BATCH_NORM:
                key = f"main.{3 * i}.{official}"
                rules.append(Rule(path.format(i), (key,), pattern, {"C": widths[i + 1]}, dtype=dtype))
            if not use_actnorm:  # counts steps; with a fixed momentum nothing reads it
                unread[f"main.{3 * i}.num_batches_tracked"] = np.array(0, np.int64)
    return Table(rules, {}, unread)

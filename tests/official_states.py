"""Small official configs, and the names and shapes of their state dicts, written down a second time from the originals."""

import numpy as np

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


def without(config, name, *rest):
    """The config less one entry, given by its path."""
    if rest:
        return config | {name: without(config[name], *rest)}
    return {key: value for key, value in config.items() if key != name}


# --- names and shapes ---------------------------------------------------------------------------------------


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


def official_rqvae_shapes(code_sizes, E=6, latent=6, z=5, double=1, ch=4):
    """Of `CODER`: widths ch and 2 ch, one block a level, attention at the second level."""
    fine, coarse = ch, 2 * ch
    shapes = affine("encoder.conv_in", (fine, 3, 3, 3)) | affine("encoder.conv_out", (double * z, coarse, 3, 3))
    shapes |= res_block("encoder.down.0.block.0", fine, fine)
    shapes |= affine("encoder.down.0.downsample.conv", (fine, fine, 3, 3))
    shapes |= res_block("encoder.down.1.block.0", fine, coarse) | attention_block("encoder.down.1.attn.0", coarse)
    shapes |= affine("decoder.conv_in", (coarse, z, 3, 3)) | affine("decoder.conv_out", (3, fine, 3, 3))
    for i in range(2):
        shapes |= res_block(f"decoder.up.1.block.{i}", coarse, coarse)
        shapes |= attention_block(f"decoder.up.1.attn.{i}", coarse)
        shapes |= res_block(f"decoder.up.0.block.{i}", (coarse, fine)[i], fine)
    shapes |= affine("decoder.up.1.upsample.conv", (coarse, coarse, 3, 3))
    for side, width in (("encoder", coarse), ("decoder", fine)):
        shapes |= res_block(f"{side}.mid.block_1", coarse, coarse) | res_block(f"{side}.mid.block_2", coarse, coarse)
        shapes |= attention_block(f"{side}.mid.attn_1", coarse) | affine(f"{side}.norm_out", (width,))
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
        if key.endswith("weight"):
            state[key][-1] = 0  # the padding row
    return state


def transformer_state(arch):
    state = random_state(official_transformer_shapes(arch))
    if "tok_emb.offsets" in state:
        sizes = arch["vocab_size"] if isinstance(arch["vocab_size"], list) else [arch["vocab_size"]] * 3
        state["tok_emb.offsets"] = np.array([0, sizes[0], sizes[0] + sizes[1]])
    return state


# --- discriminator and VQGAN --------------------------------------------------------------------------------

DISCRIMINATOR = {"in_channels": 3, "num_layers": 2, "use_actnorm": False, "ndf": 5, "spectral_norm": True}
VQGAN = {
    "model": {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 6,
            "n_embed": 7,
            "ddconfig": CODER,
            "lossconfig": {"params": {"disc_ndf": 5, "disc_num_layers": 2, "disc_start": 9}},
        },
    }
}


def official_discriminator_shapes(use_actnorm=False):
    """Of `DISCRIMINATOR`."""
    shapes = affine("main.0", (5, 3, 4, 4)) | affine("main.8", (1, 20, 4, 4))
    for conv, norm, i, o in ((2, 3, 5, 10), (5, 6, 10, 20)):
        shapes |= affine(f"main.{conv}", (o, i, 4, 4), use_actnorm)
        if use_actnorm:
            shapes |= {f"main.{norm}.{name}": (1, o, 1, 1) for name in ("loc", "scale")}
            shapes[f"main.{norm}.initialized"] = ()
        else:
            shapes |= affine(f"main.{norm}", (o,))
            shapes |= {f"main.{norm}.running_mean": (o,), f"main.{norm}.running_var": (o,)}
            shapes[f"main.{norm}.num_batches_tracked"] = ()
    return shapes


def discriminator_state(use_actnorm=False):
    state = random_state(official_discriminator_shapes(use_actnorm))
    for key in state:
        if key.endswith("initialized"):
            state[key] = np.array(1, np.uint8)
        if key.endswith("num_batches_tracked"):
            state[key] = np.array(31)
    return state


def vqgan_state(use_actnorm=False):
    """With everything that its class holds."""
    state = random_state(official_rqvae_shapes(()) | {"quantize.embedding.weight": (7, 6)})
    state |= {f"loss.discriminator.{key}": value for key, value in discriminator_state(use_actnorm).items()}
    for key in ("net.slice1.0.weight", "lin0.model.1.weight"):
        state[f"loss.perceptual_loss.{key}"] = np.zeros(2, np.float32)
    return state

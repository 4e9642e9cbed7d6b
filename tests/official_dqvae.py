"""Names and layouts of the original's DQ-VAE, for its golden vectors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

GRAINS = ("coarse", "median", "fine")
# Official names to ours, one line after the other; the place of {grain} holds the name of one.
RENAMES = (
    (r"encoder\.mid_{grain}\.block_", "encoder.grain{g}_middle_block"),
    (r"encoder\.mid_{grain}\.attn_1", "encoder.grain{g}_middle_attention"),
    (r"encoder\.(norm_out|conv_out)_{grain}", r"encoder.grain{g}_\1"),
    (r"encoder\.router\.feature_norm_{grain}", "feature_router.norm{g}"),
    (r"encoder\.router\.gate\.0", "feature_router.hidden"),
    (r"encoder\.router\.gate\.2", "feature_router.gate"),
    (r"decoder\.position_bias_fourier\.lff\.ffm\.conv", "decoder.position_bias"),
    (r"decoder\.position_bias_learned\.row_embed\.weight", "decoder.position_bias.rows"),
    (r"decoder\.position_bias_learned\.col_embed\.weight", "decoder.position_bias.columns"),
    (r"(down|up)\.(\d+)\.block\.(\d+)", r"level\2_block\3"),
    (r"(down|up)\.(\d+)\.attn\.(\d+)", r"level\2_attention\3"),
    (r"(down|up)\.(\d+)\.\1sample", r"level\2_\1"),
    (r"mid\.block_", "middle_block"),
    (r"mid\.attn_1", "middle_attention"),
    (r"nin_shortcut", "shortcut"),
    (r"\.q\.", ".query."),
    (r"\.k\.", ".key."),
    (r"\.v\.", ".value."),
    (r"\.proj_out\.", ".out."),
    (r"((^|\.)norm[^.]*|_norm_out|norm\d)\.weight", r"\1.scale"),
    (r"\.weight", ".kernel"),
)
CODEBOOK = {"weight": "codebook_KE", "cluster_size_ema": "counts_K", "embed_ema": "sums_KE"}


def path_of(name, num_grains):
    """Our path of an official parameter."""
    names = GRAINS if num_grains == 3 else GRAINS[::2]
    for official, ours in RENAMES:
        for g, grain in enumerate(names):
            name = re.sub(official.replace("{grain}", grain), ours.replace("{g}", str(g)), name)
    return tuple(name.split("."))


def to_ours(path, tensor):
    """An official tensor as our array lies; torch has outputs first."""
    if path[-1] != "kernel":
        return tensor
    if tensor.ndim == 2:  # linear: a convolution of 1x1
        return tensor.T[None, None]
    kernel = np.transpose(tensor, (2, 3, 1, 0))
    return kernel[0, 0] if "position_bias" in path else kernel


def to_theirs(path, array, like):
    """Our array as the official tensor lies."""
    if path[-1] != "kernel":
        return array
    array = array[None, None] if "position_bias" in path else array
    return np.transpose(array, (3, 2, 0, 1)).reshape(like)


def read_codebook(state, prefix="quantize.codebook."):
    """The collection "codebook", without the official row of padding."""
    arrays = {ours: jnp.asarray(state[prefix + theirs]) for theirs, ours in CODEBOOK.items()}
    return {**arrays, "codebook_KE": arrays["codebook_KE"][:-1]}


def read_variables(state, template, num_grains):
    """Variables from an official state dict; every parameter of the template is there once."""
    tree = {}
    for name, tensor in state.items():
        if name.startswith("quantize."):
            continue
        path = path_of(name, num_grains)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        assert path[-1] not in node, path
        node[path[-1]] = jnp.asarray(to_ours(path, tensor))
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, template["params"])
    return {"params": tree, "codebook": read_codebook(state)}


def read_settings(directory, name):
    """Settings of `models.create("dqvae", ...)` from the config of a golden structure."""
    config = json.loads((directory / f"{name}.config.json").read_text())
    params = config["model"]["params"]
    encoder, decoder, codebook = (params[key]["params"] for key in ("encoderconfig", "decoderconfig", "vqconfig"))
    settings = dict(
        image_size=encoder["resolution"], code_dim=codebook["codebook_dim"], codebook_size=codebook["codebook_size"],
        width=encoder["ch"], width_multipliers=encoder["ch_mult"], num_res_blocks=encoder["num_res_blocks"],
        attention_resolutions=encoder["attn_resolutions"], z_channels=encoder["z_channels"],
        num_grains=2 + ("Triple" in params["encoderconfig"]["target"]),
        decoder_width=decoder["ch"], decoder_width_multipliers=decoder["ch_mult"],
        decoder_num_res_blocks=decoder["num_res_blocks"], decoder_attention_resolutions=decoder["attn_resolutions"],
        position_bias=decoder["position_type"], use_restart=False,
    )  # fmt: skip
    if "threshold_in_force" in config["golden"]:
        return {**settings, "router": "entropy", "thresholds": (config["golden"]["threshold_in_force"],)}
    return {**settings, "router": "feature", "fine_ratio": (0.3, 0.3) if settings["num_grains"] == 3 else 0.5}

"""Official configs from our settings: the inverse of `settings`."""

from typing import Any

from rq_jax.interop.official import dqtransformer, dqvae
from rq_jax.interop.official.settings import (
    BLOCK,
    BOTTLENECK,
    CODER,
    DISCRIMINATOR,
    GELUS,
    RQTRANSFORMER,
    Settings,
    depth_setting,
    image_shape,
    latent_grid,
)

# Settings that the original does not have, and the only value of each that it can express.
_FIXED = {
    # Its encoder can double the channels, but the convolution after it does not take them.
    "rqvae": (("norm_groups", 32), ("use_double_z", False)),
    "rqtransformer": (("use_null_cond", False),),
    "dqvae": dqvae.FIXED,
    "dqtransformer": dqtransformer.FIXED,
    "discriminator": (),
}
# The same for settings that leave the meaning of the weights alone: they are left out.
_LEFT_OUT = {
    "rqvae": (("codebook_update", "sequential"), ("use_kmeans_init", False), ("dtype", "float32")),
    "rqtransformer": (("dtype", "float32"),),
    "dqvae": dqvae.LEFT_OUT,
    "dqtransformer": dqtransformer.LEFT_OUT,
    "discriminator": (("dtype", "float32"),),
}


def official_config(
    name: str, settings: Settings, sample: Settings | None = None, tokenizer: Settings | None = None
) -> dict[str, Any]:
    """The config from which the original builds the same model; the inverse of `rqvae_settings` and its siblings.

    Args:
      name: as `models.create` takes it.
      settings: complete, as `models.create` takes them.
      sample: defaults of `sampling.generate`, for an RQ-Transformer.
      tokenizer: settings of the tokenizer of a DQ-Transformer, whose config has them too.

    Raises:
      ValueError: the original has no such model, or cannot express one of the settings.
    """
    if name not in _FIXED:
        raise ValueError(f"model '{name}': the original has none; allowed are {', '.join(_FIXED)}")
    for setting, only in _FIXED[name]:
        if settings[setting] != only:
            raise ValueError(f"model.{setting}: {settings[setting]} cannot be exported; the original has {only} alone")
    return {
        "rqvae": _rqvae_config,
        "rqtransformer": _rqtransformer_config,
        "dqvae": lambda settings, _: dqvae.dqvae_config(settings),
        "dqtransformer": lambda settings, _: dqtransformer.dqtransformer_config(settings, tokenizer),
        "discriminator": lambda settings, _: _nested("gan.disc.arch", DISCRIMINATOR, settings),
    }[name](settings, sample or {})


def left_out_settings(name: str, settings: Settings) -> dict[str, Any]:
    """Settings that an official config leaves out: they steer training, or the precision of the computation."""
    return {key: settings[key] for key, only in _LEFT_OUT[name] if settings[key] != only}


def _rqvae_config(settings: Settings, sample: Settings) -> dict[str, Any]:
    del sample
    for multiplier in (1, *settings["width_multipliers"]):
        if settings["width"] * multiplier % 32:
            raise ValueError(
                f"model.width: {settings['width']} cannot be exported; the original normalises 32 groups of channels, "
                f"and the {settings['width'] * multiplier} of a level are no multiple of it"
            )
    config = _nested("arch", (*CODER, *BOTTLENECK), settings)
    height, grid, (h, w, _) = image_shape(settings)[0], latent_grid(settings), settings["code_shape"]
    latent_dim = settings["code_dim"] // ((grid[0] // h) * (grid[1] // w))
    hparams = {"bottleneck_type": "rq", "embed_dim": latent_dim, "latent_shape": (*grid, latent_dim)}
    # With the height as the resolution, both sides put attention at the levels whose height is in the list.
    coder = {"resolution": height, "attn_resolutions": settings["attention_resolutions"]}
    coder["out_ch"] = settings["in_channels"]
    config["arch"]["type"] = "rq-vae"
    config["arch"]["hparams"] |= hparams
    config["arch"]["ddconfig"] |= coder
    return config


def _rqtransformer_config(settings: Settings, sample: Settings) -> dict[str, Any]:
    config = _nested("arch", RQTRANSFORMER, settings)
    arch = config["arch"]
    sizes = settings["codebook_size"]
    arch |= {"type": "rq-transformer", "vocab_size": sizes, "input_embed_dim": settings["code_dim"]}
    config["dataset"] = {"vocab_size": sizes}
    gelus = {own: official for official, own in GELUS.items()}
    for stack, value in (("body", settings.get), ("head", lambda name: depth_setting(settings, name))):
        block = {official: settings[name] for name, official, _ in BLOCK}
        arch[stack]["block"] = {**block, "gelu": gelus[value("gelu")], "n_head": value("num_heads")}
    names = (("temp", "temperature", 1.0), ("top_k", "top_k", None), ("top_p", "top_p", None))
    config["sampling"] = {official: sample.get(own, default) for official, own, default in names}
    return config


def _nested(prefix: str, rows: tuple[tuple, ...], settings: Settings) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name, official, *_ in rows:
        *parents, last = f"{prefix}.{official}".split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = settings[name]
    return config

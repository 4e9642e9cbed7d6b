"""Our settings from official configs.

The fields that the classes of the original read are in the tables below, or refused by name; the rest steers its
trainer, or is read by nothing in the released source (`use_padding_idx`, `masked_dropout`, `code_hier`, `ema`,
`ar_hierarchy`, `use_padding_emb`, `scaled_head_emb_vqvae`), and is ignored here too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rq_jax.interop.official.values import Section, typed
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

Settings = Mapping[str, Any]

# Our name, official name, default; without a default the official config must have it.
CODER = (
    ("in_channels", "ddconfig.in_channels"),
    ("width", "ddconfig.ch"),
    ("width_multipliers", "ddconfig.ch_mult", (1, 2, 4, 8)),
    ("num_res_blocks", "ddconfig.num_res_blocks"),
    ("z_channels", "ddconfig.z_channels"),
    ("use_double_z", "ddconfig.double_z", True),
    ("use_resample_conv", "ddconfig.resamp_with_conv", True),
    ("dropout", "ddconfig.dropout", 0.0),
)
BOTTLENECK = (
    ("code_shape", "hparams.code_shape"),
    ("codebook_size", "hparams.n_embed", 512),
    ("use_shared_codebook", "hparams.shared_codebook", False),
    ("codebook_decay", "hparams.decay", 0.99),
    # The class itself would restart, but official runs fill in this default before they build it.
    ("use_restart", "hparams.restart_unused_codes", False),
    ("use_remat", "checkpointing", False),
)
RQTRANSFORMER = (
    ("code_shape", "block_size"),
    ("model_dim", "embed_dim"),
    ("spatial_layers", "body.n_layer"),
    ("depth_layers", "head.n_layer"),
    ("cond_vocab_size", "vocab_size_cond", 0),
    ("cond_length", "block_size_cond", 0),
    ("use_tokenizer_input", "input_emb_vqvae", False),
    ("use_tokenizer_depth_input", "head_emb_vqvae", False),
    ("use_cumulative_depth", "cumsum_depth_ctx", False),
    ("use_shared_token_embedding", "shared_tok_emb", False),
    ("use_shared_classifier", "shared_cls_emb", False),
    ("embedding_dropout", "embd_pdrop", 0.0),
)
# Of the blocks of either stack; ours are the same in both.
BLOCK = (
    ("use_attention_bias", "attn_bias", True),
    ("use_mlp_bias", "mlp_bias", True),
    ("attention_dropout", "attn_pdrop", 0.0),
    ("residual_dropout", "resid_pdrop", 0.1),
)
GELUS = {"v1": "exact", "v2": "sigmoid"}
# As kakaobrain/rq-vae-transformer:create_discriminator_with_optimizer_scheduler, which passes over `spectral_norm`.
DISCRIMINATOR = (
    ("in_channels", "in_channels"),
    ("width", "ndf"),
    ("num_layers", "num_layers"),
    ("use_actnorm", "use_actnorm", False),
)
_VQGAN_DISCRIMINATOR = (
    ("in_channels", "disc_in_channels", 3),
    ("width", "disc_ndf", 64),
    ("num_layers", "disc_num_layers", 3),
    ("use_actnorm", "use_actnorm", False),
)
_DQVAE_DISCRIMINATOR = (
    ("in_channels", "input_nc", 3),
    ("width", "ndf", 64),
    ("num_layers", "n_layers", 3),
    ("use_actnorm", "use_actnorm", False),
)
# Fields that would change what the autoencoder computes, and the only value that ours has.
_FIXED = (("hparams.bottleneck_type", "rq"), ("ddconfig.give_pre_end", False))
_VQGAN_FIXED = (
    ("remap", None),
    ("ddconfig.give_pre_end", False),
    # Of later models that share the config; the classes of VQGAN and RQ-VAE themselves pass over them.
    ("ddconfig.tanh_out", False),
    ("ddconfig.use_linear_attn", False),
    ("ddconfig.attn_type", "vanilla"),
)


def rqvae_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("rqvae", ...)` from an official config or its `arch` section.

    Raises:
      ValueError: a config of another model, a missing key, or a structure that we do not have.
    """
    arch = _arch(config, "rq-vae")
    check_fixed(arch, _FIXED)
    settings = arch.read((*CODER, *BOTTLENECK))
    settings["codebook_size"] = _one_if_equal("arch.hparams.n_embed", settings["codebook_size"], settings)
    latent = arch.read((("latent_dim", "hparams.embed_dim", 64), ("latent_shape", "hparams.latent_shape")))
    latent_dim, latent_shape = latent.values()
    if latent_shape[-1] != latent_dim:
        raise ValueError(f"arch.hparams.latent_shape: {latent_shape} must end in embed_dim, {latent_dim}")
    (H, W, _), (h, w, _) = latent_shape, settings["code_shape"]
    if H % h or W % w:
        raise ValueError(f"arch.hparams.code_shape: {(h, w)} must divide the grid of latent_shape, {(H, W)}")
    settings |= _image_settings(arch, settings, (H, W))
    return {**settings, "code_dim": (H // h) * (W // w) * latent_dim}


def vqgan_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("rqvae", ...)` from a config of VQGAN (CompVis/taming-transformers).

    VQGAN is an RQ-VAE of depth 1. Its codebook is learned by gradient, ours by moving average; codes that a batch does
    not use are left where they are, as there.

    Raises:
      ValueError: another class than VQModel, a missing key, or a structure that we do not have.
    """
    target = str(config["model"].get("target") or "VQModel")
    if target.rpartition(".")[2] != "VQModel":
        raise ValueError(f"model.target: {quoted(target)} has another quantizer or another use; allowed is VQModel")
    params = Section(config["model"].get("params"), "model.params.")
    check_fixed(params, _VQGAN_FIXED)
    settings = params.read((("codebook_size", "n_embed"), ("code_dim", "embed_dim"), *CODER))
    settings |= {"use_shared_codebook": True, "use_restart": False}
    side = params.read((("resolution", "ddconfig.resolution"),))["resolution"] // downsampling(settings)
    settings |= _image_settings(params, settings, (side, side)) | {"code_shape": (side, side, 1)}
    return settings | {"codebook_size": _one_if_equal("model.params.n_embed", settings["codebook_size"], settings)}


def rqtransformer_settings(config: Mapping[str, Any], tokenizer: Settings | None = None) -> dict[str, Any]:
    """Settings of `models.create("rqtransformer", ...)` from an official config or its `arch` section.

    Args:
      config: of the transformer.
      tokenizer: settings of its tokenizer, which must agree. Whether that has one codebook or one per depth is not in
        the transformer's config: without it `use_shared_codebook` is in the result only where sizes that differ
        settle it.

    Raises:
      ValueError: a config of another model, a missing key, a structure that we do not have, or another tokenizer.
    """
    arch = _arch(config, "rq-transformer")
    settings = arch.read(RQTRANSFORMER)
    sizes = arch.get("vocab_size", None) or Section(config).get("dataset.vocab_size", None)
    if sizes is None:
        raise ValueError("arch.vocab_size: missing, like dataset.vocab_size; set it to the size of the codebook")
    sizes = typed("arch.vocab_size", "codebook_size", sizes)
    settings["codebook_size"] = _one_if_equal("arch.vocab_size", sizes, settings)
    if isinstance(settings["codebook_size"], tuple):
        settings["use_shared_codebook"] = False
    settings |= arch.read((("code_dim", "input_embed_dim", *_default_code_dim(settings)),))
    for name in ("cond_vocab_size", "cond_length"):
        settings[name] = max(settings[name], 1)  # 0 also stands for the single start token
    settings |= _block_settings(arch, settings)
    return settings if tokenizer is None else _with_tokenizer(settings, tokenizer)


def discriminator_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("discriminator", ...)` from an official config, of RQ-VAE, VQGAN or DQ-VAE.

    Args:
      config: the whole of it, or the section `gan.disc.arch`.

    Raises:
      ValueError: a key is missing.
    """
    if isinstance(config.get("model"), Mapping):
        place = "model.params.lossconfig.params."
        params = Section(Section(config).get(place.removesuffix("."), {}), place)
        own = params.get("disc_config.params", None)
        if own is not None:
            return Section(own, f"{place}disc_config.params.").read(_DQVAE_DISCRIMINATOR)
        return params.read(_VQGAN_DISCRIMINATOR)
    section = discriminator_section(config)
    return Section(config if section is None else section, "gan.disc.arch.").read(DISCRIMINATOR)


def discriminator_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of an official config that describes the discriminator, or None."""
    return Section(config).get("gan.disc.arch", None)


def has_discriminator(config: Mapping[str, Any]) -> bool:
    """Whether an official config describes a discriminator."""
    return isinstance(config.get("model"), Mapping) or discriminator_section(config) is not None


def sample_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `sampling.generate` for sampling as the original does, as far as an official config gives them."""
    get, settings = Section(config).get, {}
    for name, official in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p")):
        value = get(f"sampling.{official}", get(f"experiment.sample.{official}", None))
        if value is not None:
            value = typed(f"sampling.{official}", name, value)
            settings[name] = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return settings


# --- what both directions and the tables of tensors need ----------------------------------------------------


def image_shape(settings: Settings) -> tuple[int, int]:
    """(H, W) of the images."""
    size = settings["image_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def latent_grid(settings: Settings) -> tuple[int, int]:
    """Height and width of the latents."""
    H, W = image_shape(settings)
    return H // downsampling(settings), W // downsampling(settings)


def codebook_sizes(settings: Settings) -> tuple[int, ...]:
    """K of each depth."""
    sizes, depth = settings["codebook_size"], settings["code_shape"][-1]
    return (sizes,) * depth if isinstance(sizes, int) else tuple(sizes)


def depth_setting(settings: Settings, name: str) -> Any:
    """Value of the depth stack for what it may have of its own: "num_heads", "gelu"."""
    return settings.get(f"depth_{name}") or settings[name]


def downsampling(settings: Settings) -> int:
    """Pixels per latent along a side."""
    return 2 ** (len(settings["width_multipliers"]) - 1)


# --- inner pieces -------------------------------------------------------------------------------------------


def _arch(config: Mapping[str, Any], kind: str) -> Section:
    arch = Section(config).get("arch", config)
    actual = str(Section(arch).get("type", kind)).lower()
    if actual != kind:
        raise ValueError(f"arch.type: {quoted(actual)} is another model; a config of '{kind}' is needed here")
    return Section(arch, "arch.")


def check_fixed(section: Section, rows: tuple[tuple[str, Any], ...]) -> None:
    for name, only in rows:
        if (value := section.get(name, only)) != only:
            raise ValueError(f"{section.prefix}{name}: {quoted(value)} is not supported; allowed is '{only}'")


def _one_if_equal(official: str, sizes: Any, settings: Settings) -> Any:
    checks.one_per_depth(official, sizes, settings["code_shape"][-1])
    return sizes[0] if isinstance(sizes, tuple) and len(set(sizes)) == 1 else sizes


def _image_settings(section: Section, settings: Settings, grid: tuple[int, int]) -> dict[str, Any]:
    """Image size and the levels with attention.

    The image size follows from the latent grid. The original places attention by the fraction of `resolution` that a
    level has, whatever the image size; ours goes by the height of the level.
    """
    factor, prefix = downsampling(settings), f"{section.prefix}ddconfig."
    rows = (("out_channels", "out_ch"), ("resolution", "resolution"), ("resolutions", "attn_resolutions"))
    out_channels, resolution, chosen = section.read(tuple((name, f"ddconfig.{row}") for name, row in rows)).values()
    if resolution % factor:
        raise ValueError(f"{prefix}resolution: {resolution} must be a positive multiple of {factor}")
    if out_channels != settings["in_channels"]:
        raise ValueError(f"{prefix}out_ch: {out_channels} must be in_channels, {settings['in_channels']}")
    H, W = (factor * n for n in grid)
    levels = range(len(settings["width_multipliers"]))
    heights = tuple(H // 2**level for level in levels if resolution // 2**level in chosen)
    return {"image_size": H if H == W else (H, W), "attention_resolutions": heights}


def _default_code_dim(settings: Settings) -> tuple[int, ...]:
    """No default where code vectors are read; elsewhere their length does not matter."""
    reads_codebook = settings["use_tokenizer_input"] or settings["use_tokenizer_depth_input"]
    return () if reads_codebook else (settings["model_dim"],)


def _block_settings(arch: Section, settings: Settings) -> dict[str, Any]:
    """Settings of the blocks of both stacks, of which those without layers do not count."""
    stacks = [name for name, ours in (("body", "spatial"), ("head", "depth")) if settings[f"{ours}_layers"]]
    blocks = {stack: _read_block(arch, stack, settings["model_dim"]) for stack in stacks}
    first = blocks[stacks[0]] if stacks else {"num_heads": 1, "gelu": "exact"} | {row[0]: row[2] for row in BLOCK}
    last = blocks[stacks[-1]] if stacks else first
    for name, official, _ in BLOCK:
        if first[name] != last[name]:
            raise ValueError(
                f"arch.head.block.{official}: {last[name]} must equal the {first[name]} of arch.body.block, ours has "
                "one for both; where it is a rate of dropout, set them equal, only training is another"
            )
    own = {f"depth_{name}": last[name] for name in ("num_heads", "gelu") if last[name] != first[name]}
    return {**first, **own}


def _read_block(arch: Section, stack: str, model_dim: int) -> dict[str, Any]:
    """Settings of the blocks of one stack."""
    rows = (("width", "embed_dim", model_dim), ("num_heads", "n_head"), *BLOCK)
    block = arch.read(tuple((name, f"{stack}.block.{official}", *default) for name, official, *default in rows))
    if (width := block.pop("width")) != model_dim:
        raise ValueError(f"arch.{stack}.block.embed_dim: {width} must be arch.embed_dim, {model_dim}")
    gelu = arch.get(f"{stack}.block.gelu", "v1")
    if not isinstance(gelu, str) or gelu not in GELUS:
        raise ValueError(f"arch.{stack}.block.gelu: {quoted(gelu)} is unknown; allowed are 'v1' and 'v2'")
    return {**block, "gelu": GELUS[gelu]}


def _with_tokenizer(settings: dict[str, Any], tokenizer: Settings) -> dict[str, Any]:
    """The settings with those of the tokenizer, with which the config must agree."""
    pairs = {
        "block_size": (tuple(settings["code_shape"]), tuple(tokenizer["code_shape"])),
        "vocab_size": (codebook_sizes(settings), codebook_sizes(tokenizer)),
    }
    if not _default_code_dim(settings):
        pairs["input_embed_dim"] = settings["code_dim"], tokenizer["code_dim"]
    for name, (value, tokenizer_value) in pairs.items():
        if value != tokenizer_value:
            raise ValueError(
                f"arch.{name}: {value} differs from the tokenizer's {tokenizer_value}; give the one of this pair"
            )
    return {**settings, **{name: tokenizer[name] for name in ("code_dim", "use_shared_codebook")}}


def token_offsets(settings: Settings) -> np.ndarray:
    """First row of each depth in the table of separate token embeddings."""
    return np.cumsum((0, *codebook_sizes(settings)[:-1]))

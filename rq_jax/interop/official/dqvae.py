"""DQ-VAEs of CrossmodalGroup/DynamicVectorQuantization: settings, tensors, and the way back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rq_jax.interop.official.settings import Settings, check_fixed, image_shape
from rq_jax.interop.official.values import Section
from rq_jax.settings.text import quoted

DUAL, TRIPLE = ("coarse", "fine"), ("coarse", "median", "fine")
# Class of the model: names of its grains, and the class of its encoder.
_CLASSES = {"DualGrainVQModel": (DUAL, "DualGrainEncoder"), "TripleGrainVQModel": (TRIPLE, "TripleGrainEncoder")}
DQVAE_CLASSES = tuple(_CLASSES)
# Our name, official name, default.
_ENCODER = (
    ("in_channels", "in_channels"),
    ("width", "ch"),
    ("width_multipliers", "ch_mult", (1, 2, 4, 8)),
    ("num_res_blocks", "num_res_blocks"),
    ("z_channels", "z_channels"),
    ("use_resample_conv", "resamp_with_conv", True),
    ("dropout", "dropout", 0.0),
)
_DECODER = (
    ("decoder_width", "ch"),
    ("decoder_width_multipliers", "ch_mult"),
    ("decoder_num_res_blocks", "num_res_blocks"),
)
_BOTTLENECK = (
    ("codebook_size", "codebook_size"),
    ("code_dim", "codebook_dim"),
    ("codebook_decay", "decay", 0.99),
    ("use_restart", "restart_unused_codes", True),
)
# Layers and nonlinearity of each gate.
_GATES = {"1layer-fc": (1, "silu"), "2layer-fc-SiLu": (2, "silu"), "2layer-fc-ReLu": (2, "relu")}
# Official position types. Two of them build tables that the forward pass passes over (it asks for other names).
_POSITIONS = {"fourier+learned": "fourier+learned", "fourier": "fourier", "learned": "none", "learned-relative": "none"}
_RATIOS = {2: (("target_ratio", 0.5),), 3: (("target_median_ratio", 0.3), ("target_fine_ratio", 0.3))}
_GROUPS = 32


# --- settings -----------------------------------------------------------------------------------------------


def dqvae_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("dqvae", ...)` from an official config, but the thresholds of an entropy router.

    Raises:
      ValueError: a class, a setting or a combination that the original cannot run or that we do not have.
    """
    section = _section(config, "model.")
    names, encoder_class = _CLASSES[_class_of(section, "", DQVAE_CLASSES)]
    encoder, decoder, bottleneck = (_part(section, f"{part}config") for part in ("encoder", "decoder", "vq"))
    _class_of(section, "params.encoderconfig.", (encoder_class,))
    _class_of(section, "params.decoderconfig.", ("Decoder",))
    _class_of(section, "params.vqconfig.", ("VectorQuantize2",))
    settings: dict[str, Any] = {**encoder.read(_ENCODER), **decoder.read(_DECODER), **bottleneck.read(_BOTTLENECK)}
    settings["num_grains"] = len(names)
    (resolution,) = encoder.read((("resolution", "resolution"),)).values()
    settings["image_size"] = resolution
    settings["attention_resolutions"] = _attention(encoder, resolution, settings["width_multipliers"], resolution)
    settings["decoder_attention_resolutions"] = _attention(
        decoder, resolution, settings["decoder_width_multipliers"], _decoder_height(decoder, settings)
    )
    _check_widths(f"{encoder.prefix}ch_mult", settings)
    _check_decoder(section, decoder, settings)
    settings["position_bias"] = _position_bias(decoder, settings)
    return settings | _router_settings(section, encoder, settings)


def thresholds_path(config: Mapping[str, Any]) -> str | None:
    """The file of thresholds that a config names, or None."""
    return Section(config).get("model.params.encoderconfig.params.router_config.params.json_path", None)


def threshold_key(ratio: float) -> str:
    """The percentile, as the original's file names it, above which the share `ratio` lies."""
    return str(int(100 - ratio * 100))


def name_thresholds(config: dict[str, Any], path: str, settings: Settings) -> dict[str, float]:
    """Put the name of a file of thresholds into an exported config of either stage.

    Args:
      config: from `official_config`.
      path: of the file, from the config.
      settings: complete settings of the DQ-VAE, whose router goes by entropy.

    Returns:
      What the file has to hold.
    """
    params = config["model"]["params"]
    params = params.get("first_stage_config", {"params": params})["params"]
    params["encoderconfig"]["params"]["router_config"]["params"]["json_path"] = path
    (threshold,) = settings["thresholds"]
    return {threshold_key(np.ravel(settings["fine_ratio"])[0].item()): threshold}


def _section(config: Mapping[str, Any], prefix: str) -> Section:
    return Section(config.get("model"), prefix)


def _part(section: Section, name: str) -> Section:
    return Section(section.get(f"params.{name}.params"), f"{section.prefix}params.{name}.params.")


def _class_of(section: Section, prefix: str, allowed: tuple[str, ...]) -> str:
    target = str(section.get(f"{prefix}target"))
    name = target.rpartition(".")[2]
    if name not in allowed:
        raise ValueError(
            f"{section.prefix}{prefix}target: {quoted(target)} is another class; allowed is {' or '.join(allowed)}"
        )
    return name


def _attention(part: Section, resolution: int, multipliers: tuple[int, ...], height: int) -> tuple[int, ...]:
    """Heights of our levels with attention, whose finest has `resolution` where theirs has `height`."""
    (chosen,) = part.read((("resolutions", "attn_resolutions"),)).values()
    levels = range(len(multipliers))
    return tuple(resolution // 2**level for level in levels if height // 2**level in chosen)


def _decoder_height(decoder: Section, settings: Settings) -> int:
    """What the decoder takes for the side of the image; its coarsest level has a whole number of it."""
    (height,) = decoder.read((("resolution", "resolution"),)).values()
    last = len(settings["decoder_width_multipliers"]) - 1
    return height // 2**last * 2**last


def _check_widths(name: str, settings: Settings) -> None:
    """The original reckons the width of a finer tail backwards, in whole multiples."""
    multipliers = settings["width_multipliers"][-settings["num_grains"] :]
    for finer, coarser in zip(multipliers, multipliers[1:], strict=False):
        if coarser % finer:
            raise ValueError(
                f"{name}: {coarser} is no multiple of the {finer} before it, which the original cannot run with"
            )


def _check_decoder(section: Section, decoder: Section, settings: Settings) -> None:
    check_fixed(decoder, (("give_pre_end", False),))
    for name, official, default in (("dropout", "dropout", 0.0), ("use_resample_conv", "resamp_with_conv", True)):
        (value,) = decoder.read(((name, official, default),)).values()
        if value != settings[name]:
            raise ValueError(
                f"{decoder.prefix}{official}: {value} must equal the encoder's {settings[name]}, ours has one for both"
            )
    pairs = (
        (decoder, "in_ch", settings["z_channels"]),
        (decoder, "out_ch", settings["in_channels"]),
        (section, "params.quant_before_dim", settings["z_channels"]),
        (section, "params.quant_after_dim", settings["code_dim"]),
    )
    for part, name, expected in pairs:
        (value,) = part.read(((name, name),)).values()
        if value != expected:
            raise ValueError(f"{part.prefix}{name}: {value} does not fit the other parts; they need {expected}")


def _position_bias(decoder: Section, settings: Settings) -> str:
    kind = decoder.get("position_type", "relative")
    if not isinstance(kind, str) or kind not in _POSITIONS:
        raise ValueError(
            f"{decoder.prefix}position_type: {quoted(kind)} cannot be built; allowed are {', '.join(_POSITIONS)}"
        )
    grid = code_grid(settings)[0]
    (size,) = decoder.read((("latent_size", "latent_size", 32),)).values()
    if _POSITIONS[kind] != "none" and size != grid:
        raise ValueError(f"{decoder.prefix}latent_size: {size} is not the code grid of this image, {grid}")
    return _POSITIONS[kind]


def _router_settings(section: Section, encoder: Section, settings: Settings) -> dict[str, Any]:
    grains = settings["num_grains"]
    prefix = "params.encoderconfig.params.router_config."
    feature = "DualGrainFeatureRouter" if grains == 2 else "TripleGrainFeatureRouter"
    allowed = (feature, "DualGrainFixedEntropyRouter") if grains == 2 else (feature,)
    kind = _class_of(section, prefix, allowed)
    router = Section(encoder.get("router_config.params"), f"{encoder.prefix}router_config.params.")
    if kind != feature:
        region, image = 2 ** (len(settings["width_multipliers"]) - 1), settings["image_size"]
        for name, default, expected in (("entropy_patch_size", 16, region), ("image_size", 256, image)):
            (value,) = section.read(((name, f"params.{name}", default),)).values()
            if value != expected:
                raise ValueError(f"model.params.{name}: {value} does not fit the encoder, which needs {expected}")
        return {"router": "entropy", **router.read((("fine_ratio", "fine_grain_ratito"),))}
    (channels,) = router.read((("num_channels", "num_channels"),)).values()
    if channels != settings["z_channels"]:
        raise ValueError(f"{router.prefix}num_channels: {channels} must be z_channels, {settings['z_channels']}")
    gates = {name: gate for name, gate in _GATES.items() if grains == 3 or not name.endswith("ReLu")}
    gate, normalization = router.get("gate_type", "1layer-fc"), router.get("normalization_type", "none")
    if not isinstance(gate, str) or gate not in gates:
        raise ValueError(f"{router.prefix}gate_type: {quoted(gate)} cannot be built; allowed are {', '.join(gates)}")
    if normalization not in ("none", f"group-{_GROUPS}"):
        raise ValueError(
            f"{router.prefix}normalization_type: {quoted(normalization)} is not supported; allowed are 'none' and "
            f"'group-{_GROUPS}'"
        )
    layers, activation = gates[gate]
    place = "params.lossconfig.params.budget_loss_config.params"
    budget = Section(section.get(place, {}), f"{section.prefix}{place}.")
    ratios = tuple(budget.read((("fine_ratio", *row),))["fine_ratio"] for row in _RATIOS[grains])
    return {
        "router": "feature",
        "fine_ratio": ratios if grains == 3 else ratios[0],
        "gate_layers": layers,
        "gate_activation": activation,
        "use_gate_norm": normalization != "none",
    }


def code_grid(settings: Settings) -> tuple[int, int]:
    """The code grid."""
    H, W = image_shape(settings)
    factor = 2 ** (len(settings["width_multipliers"]) - settings["num_grains"])
    return H // factor, W // factor


def decoder_settings(settings: Settings) -> dict[str, Any]:
    """The decoder's settings by the names that the encoder's have; those that are not given are the encoder's."""
    levels = len(settings["width_multipliers"]) - settings["num_grains"] + 1
    own = {name: settings.get(f"decoder_{name}") for name in ("width", "num_res_blocks", "attention_resolutions")}
    own = {name: settings[name] if value is None else value for name, value in own.items()}
    multipliers = settings.get("decoder_width_multipliers") or settings["width_multipliers"][:levels]
    return {**own, "width_multipliers": multipliers}


# --- the way back -------------------------------------------------------------------------------------------

FIXED = (("norm_groups", _GROUPS), ("use_double_z", False), ("code_depth", 1))
LEFT_OUT = (
    ("codebook_update", "sequential"),
    ("codebook_init", "uniform"),
    ("use_kmeans_init", False),
    ("use_code_weights", False),
    ("use_shared_codebook", True),
    ("use_remat", False),
    ("entropy_bins", "full"),
    ("dtype", "float32"),
)


def dqvae_config(settings: Settings) -> dict[str, Any]:
    """The official config of a DQ-VAE; the inverse of `dqvae_settings`.

    Raises:
      ValueError: the original cannot express one of the settings.
    """
    H, W = image_shape(settings)
    grains, router = settings["num_grains"], settings["router"]
    if H != W:
        raise ValueError(f"model.image_size: {(H, W)} cannot be exported; the original's images are square")
    if grains not in _RATIOS:
        raise ValueError(f"model.num_grains: {grains} cannot be exported; the original has 2 or 3")
    if router == "random" or router == "entropy" and grains == 3:
        raise ValueError(f"model.router: '{router}' with {grains} grains cannot be exported; the original has none")
    _check_widths("model.width_multipliers", settings)
    names = ("Dual", "Triple")[grains - 2]
    params: dict[str, Any] = {
        "encoderconfig": {
            "target": f"modules.dynamic_modules.Encoder{names}.{names}GrainEncoder",
            "params": _encoder_params(settings, names),
        },
        "decoderconfig": {
            "target": "modules.dynamic_modules.DecoderPositional.Decoder",
            "params": _decoder_params(settings),
        },
        "lossconfig": _loss_config(settings),
        "vqconfig": {
            "target": "modules.vector_quantization.quantize2_mask.VectorQuantize2",
            "params": {official: settings[name] for name, official, *_ in _BOTTLENECK},
        },
        "quant_before_dim": settings["z_channels"],
        "quant_after_dim": settings["code_dim"],
    }
    if router == "entropy":
        params |= {"image_size": H, "entropy_patch_size": 2 ** (len(settings["width_multipliers"]) - 1)}
    module = {"Dual": f"dqvae_dual_{'feat' if router == 'feature' else 'entropy'}", "Triple": "dqvae_triple_feat"}[
        names
    ]
    return {"model": {"target": f"models.stage1_dynamic.{module}.{names}GrainVQModel", "params": params}}


def _encoder_params(settings: Settings, names: str) -> dict[str, Any]:
    return {
        **{official: settings[name] for name, official, *_ in _ENCODER},
        "resolution": image_shape(settings)[0],
        "attn_resolutions": settings["attention_resolutions"],
        "update_router": settings["router"] == "feature",
        "router_config": _router_config(settings, names),
    }


def _decoder_params(settings: Settings) -> dict[str, Any]:
    decoder = decoder_settings(settings)
    kinds = {ours: official for official, ours in reversed(_POSITIONS.items())}
    return {
        **{official: decoder[name.removeprefix("decoder_")] for name, official in _DECODER},
        "attn_resolutions": decoder["attention_resolutions"],
        "in_ch": settings["z_channels"],
        "out_ch": settings["in_channels"],
        "resolution": image_shape(settings)[0],
        "dropout": settings["dropout"],
        "resamp_with_conv": settings["use_resample_conv"],
        "latent_size": code_grid(settings)[0],
        "window_size": 2 ** (settings["num_grains"] - 1),
        "position_type": kinds[settings["position_bias"]],
    }


def _router_config(settings: Settings, names: str) -> dict[str, Any]:
    module = f"modules.dynamic_modules.Router{names}"
    if settings["router"] == "entropy":
        ratio = np.ravel(settings["fine_ratio"])[0].item()
        params = {"json_path": None, "fine_grain_ratito": ratio}
        return {"target": f"{module}.DualGrainFixedEntropyRouter", "params": params}
    gate = (settings["gate_layers"], settings["gate_activation"])
    by_gate = {(1, "relu"): "1layer-fc", **{value: name for name, value in _GATES.items()}}
    if gate == (2, "relu") and names == "Dual":
        raise ValueError("model.gate_activation: 'relu' cannot be exported with 2 grains; the original has it with 3")
    params = {
        "num_channels": settings["z_channels"],
        "gate_type": by_gate[gate],
        "normalization_type": f"group-{_GROUPS}" if settings["use_gate_norm"] else "none",
    }
    return {"target": f"{module}.{names}GrainFeatureRouter", "params": params}


def _loss_config(settings: Settings) -> dict[str, Any]:
    """Losses are the trainer's; the budget of a feature router alone belongs to the model's settings."""
    module, grains = "modules.losses.vqperceptual_multidisc", settings["num_grains"]
    if settings["router"] != "feature":
        return {"target": f"{module}.DummyLoss"}
    ratios = np.broadcast_to(settings["fine_ratio"], grains - 1).tolist()
    sides = (
        ("min_grain_size", "max_grain_size")
        if grains == 2
        else ("min_grain_size", "median_grain_size", "max_grain_size")
    )
    budget = {
        **{name: ratio for (name, _), ratio in zip(_RATIOS[grains], ratios, strict=True)},
        **{name: code_grid(settings)[0] >> (grains - 1 - g) for g, name in enumerate(sides)},
        "gamma": 10.0 if grains == 2 else 1.0,
    }
    names = {2: "BudgetConstraint_RatioMSE_DualGrain", 3: "BudgetConstraint_NormedSeperateRatioMSE_TripleGrain"}
    discriminator = {"target": "modules.discriminator.model.NLayerDiscriminator", "params": {}}
    params = {"disc_start": 0, "disc_config": discriminator, "disc_init": True}
    params["budget_loss_config"] = {"target": f"modules.dynamic_modules.budget.{names[grains]}", "params": budget}
    return {"target": f"{module}.VQLPIPSWithDiscriminator", "params": params}

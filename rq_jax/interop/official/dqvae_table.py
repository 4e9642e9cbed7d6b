"""The table of official tensors behind a DQ-VAE."""

import numpy as np

from rq_jax.interop.official.dqvae import DUAL, TRIPLE, code_grid, decoder_settings
from rq_jax.interop.official.rules import Rule, Table
from rq_jax.interop.official.settings import Settings
from rq_jax.interop.official.tables import (
    CODEBOOK,
    RENAMES,
    Renames,
    coder,
    conv,
    levels_of,
    middle,
    module_rules,
    norm,
)


def dqvae_table(settings: Settings) -> Table:
    """The table of a DQ-VAE; settings from `dqvae_settings`, or complete ones."""
    z, names = settings["z_channels"], DUAL if settings["num_grains"] == 2 else TRIPLE
    modules, _ = levels_of("encoder", settings, settings["in_channels"])
    for name, multiplier in zip(names, settings["width_multipliers"][::-1], strict=False):
        features = settings["width"] * multiplier
        modules |= middle(f"encoder.mid_{name}", features)
        modules |= {f"encoder.norm_out_{name}": norm(features), f"encoder.conv_out_{name}": conv(features, z, 3)}
    modules |= coder("decoder", {**settings, **decoder_settings(settings)}, z, settings["in_channels"])
    modules |= {"quant_conv": conv(z, settings["code_dim"], 1), "post_quant_conv": conv(settings["code_dim"], z, 1)}
    rules = module_rules(modules, (*_tail_renames(names), *RENAMES))
    if settings["router"] == "feature":
        rules += _router_rules(settings, names)
    rules += _position_rules(settings)
    sizes = {"K": settings["codebook_size"], "E": settings["code_dim"]}
    for name, official, axes, padding in CODEBOOK:
        key = f"quantize.codebook.{official}"
        # The original draws the padding row like all others.
        rules.append(
            Rule(f"codebook/{name}", (key,), f"1 {axes} -> {axes}", sizes, (), padding, has_zero_padding=False)
        )
    return Table(rules, {}, _unread(settings), strangers=("loss.",))


def _tail_renames(names: tuple[str, ...]) -> Renames:
    rows: list[tuple[str, str]] = []
    for g, name in enumerate(names):
        rows += [
            (rf"mid_{name}\.block_", f"grain{g}_middle_block"),
            (rf"mid_{name}\.attn_1", f"grain{g}_middle_attention"),
            (rf"(norm|conv)_out_{name}$", rf"grain{g}_\1_out"),
        ]
    return tuple(rows)


def _router_rules(settings: Settings, names: tuple[str, ...]) -> list[Rule]:
    sizes = {"I": len(names) * settings["z_channels"], "G": len(names), "C": settings["z_channels"]}
    start, rules = "encoder.router", []
    layers = [("gate", "gate.2" if settings["gate_layers"] == 2 else "gate", "G")]
    if settings["gate_layers"] == 2:
        layers.insert(0, ("hidden", "gate.0", "O"))
        sizes["O"] = sizes["I"]
    for ours, official, out in layers:
        rules.append(
            Rule(
                f"params/feature_router/{ours}/kernel",
                (f"{start}.{official}.weight",),
                f"1 {out} I -> 1 1 I {out}",
                sizes,
            )
        )
        rules.append(
            Rule(f"params/feature_router/{ours}/bias", (f"{start}.{official}.bias",), f"1 {out} -> {out}", sizes)
        )
    if settings["use_gate_norm"]:
        for g, name in enumerate(names):
            for ours, official in (("scale", "weight"), ("bias", "bias")):
                key = f"{start}.feature_norm_{name}.{official}"
                rules.append(Rule(f"params/feature_router/norm{g}/{ours}", (key,), "1 C -> C", sizes))
    return rules


def _position_rules(settings: Settings) -> list[Rule]:
    (h, w), C, kind = code_grid(settings), settings["z_channels"], settings["position_bias"]
    if kind == "none":
        return []
    sizes = {"C": C, "T": 2, "H": h, "W": w}
    fourier = "decoder.position_bias" + ("_fourier" if kind == "fourier+learned" else "")
    rows = [
        ("kernel", f"{fourier}.lff.ffm.conv.weight", "1 C T 1 1 -> T C"),
        ("bias", f"{fourier}.lff.ffm.conv.bias", "1 C -> C"),
    ]
    if kind == "fourier+learned":
        learned = "decoder.position_bias_learned"
        rows += [
            ("rows", f"{learned}.row_embed.weight", "1 H C -> H C"),
            ("columns", f"{learned}.col_embed.weight", "1 W C -> W C"),
        ]
    return [Rule(f"params/decoder/position_bias/{name}", (key,), axes, sizes) for name, key, axes in rows]


def _unread(settings: Settings) -> dict[str, np.ndarray]:
    """Tables that the original builds and does not read."""
    if settings["position_bias"] != "none":
        return {}
    shape = code_grid(settings)[0], settings["z_channels"]
    names = (f"decoder.position_bias.{axis}_embed.weight" for axis in ("row", "col"))
    return {name: np.zeros(shape, np.float32) for name in names}

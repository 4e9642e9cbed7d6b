"""DQ-Transformers of CrossmodalGroup/DynamicVectorQuantization: settings, tensors, and the way back."""

from collections.abc import Mapping
from typing import Any

from rq_jax.grains import GrainLayout
from rq_jax.interop.official.dqvae import code_grid, dqvae_config
from rq_jax.interop.official.rules import Rule, Table
from rq_jax.interop.official.settings import Settings, check_fixed
from rq_jax.interop.official.tables import BLOCKS
from rq_jax.interop.official.values import Section
from rq_jax.settings.text import quoted

DQTRANSFORMER_CLASS = "Dualformer"
# Our name, official name, default.
_NETWORK = (
    ("position_layers", "position_layer", 12),
    ("content_layers", "content_layer", 12),
    ("num_heads", "n_head", 8),
    ("model_dim", "n_embd", 256),
    ("num_slots", "block_size"),
    ("embedding_dropout", "embd_pdrop", 0.0),
    ("attention_dropout", "attn_pdrop", 0.0),
    ("residual_dropout", "resid_pdrop", 0.0),
)
_ORDERS = {"row-first": "row", "region-first": "region"}
# The official providers of start tokens that ours has, and where a config names them.
_CLASSES, _PLAIN = "ClassAwareSOSProvider", "PositionAwareSOSProvider"
_PROVIDERS = {_CLASSES: "class_cond_stage_config", _PLAIN: "uncond_stage_config"}
_GRAINS = ("coarse", "fine")
# Official defaults, of which those of the two classes differ.
_NETWORK_DEFAULTS = {"content_pad_code": 1025, "coarse_position_pad_code": 257, "fine_position_pad_code": 1025}
_PERMUTER_DEFAULTS = {
    "content_pad_code": 1024, "content_eos_code": 1025, "coarse_position_pad_code": 256,
    "coarse_position_eos_code": 257, "fine_position_pad_code": 1024, "fine_position_eos_code": 1025,
}  # fmt: skip
# Our name, official name, pattern. K contents; V, W positions of the coarse and the fine grain; P slots; G grains.
_NAMES = (
    ("content_embedding_KM", "content_emb.weight", "1 K M -> K M"),
    ("position0_embedding_VM", "content_coarse_pos_emb.weight", "1 V M -> V M"),
    ("position1_embedding_VM", "content_fine_pos_emb.weight", "1 W M -> W M"),
    ("slot_embedding_PM", "pos_emb", "1 1 P M -> P M"),
    ("grain_embedding_GM", "seg_emb.weight", "1 G M -> G M"),
    ("cell_classifier_norm/scale", "position_head.0.weight", "1 M -> M"),
    ("cell_classifier_norm/bias", "position_head.0.bias", "1 M -> M"),
    ("cell_classifier_MV", "position_head.1.weight", "1 W M -> M W"),
    ("classifier_norm/scale", "content_head.0.weight", "1 M -> M"),
    ("classifier_norm/bias", "content_head.0.bias", "1 M -> M"),
    ("classifier_MK", "content_head.1.weight", "1 K M -> M K"),
)
_STACKS = ("position", "content")


# --- settings -----------------------------------------------------------------------------------------------


def dqtransformer_settings(config: Mapping[str, Any], tokenizer: Settings | None = None) -> dict[str, Any]:
    """Settings of `models.create("dqtransformer", ...)` from an official config.

    Args:
      config: of the transformer.
      tokenizer: complete settings of its DQ-VAE, which must agree; None: the length of its code vectors is that of
        `first_stage_config`.

    Raises:
      ValueError: a class, a setting or numbers of tokens that the original cannot run or that we do not have, or
        another tokenizer.
    """
    params = Section(Section(config.get("model")).get("params"), "model.params.")
    network, permuter = (_part(params, name) for name in ("transformer_config", "permuter_config"))
    check_fixed(params, (("activate_sos_for_fine_sequence", True),))
    check_fixed(network, (("activate_pad_ignore", True),))
    order = permuter.get("fine_position_order", "region-first")
    if not isinstance(order, str) or order not in _ORDERS:
        raise ValueError(f"{permuter.prefix}fine_position_order: {quoted(order)} is unknown; allowed are {[*_ORDERS]}")
    side, coarse = permuter.read((("fine_hw", "fine_hw", 32), ("coarse_hw", "coarse_hw", 16))).values()
    if side != 2 * coarse:
        raise ValueError(f"{permuter.prefix}fine_hw: {side} must be twice coarse_hw, {coarse}")
    (segments,) = network.read((("segment_size", "segment_size", -1),)).values()
    if segments > 0 and segments != 2:
        raise ValueError(f"{network.prefix}segment_size: {segments} is not supported; allowed are 2, and 0 for none")
    provider, classes = _provider(params)
    (K,) = permuter.read((("content_pad_code", "content_pad_code", _PERMUTER_DEFAULTS["content_pad_code"]),)).values()
    settings: dict[str, Any] = {
        **network.read(_NETWORK),
        "codebook_size": K,
        "code_shape": (side, side, 1),
        "num_grains": 2,
        "order": _ORDERS[order],
        "cond_vocab_size": classes,
        "use_grain_embedding": segments > 0,
    }
    _check_tokens(settings, network, permuter, provider)
    if tokenizer is not None:
        return settings | _of_tokenizer(settings, tokenizer)
    quantizer = _part(params, "first_stage_config.params.vqconfig")
    return settings | quantizer.read((("code_dim", "codebook_dim"),))


def first_stage(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the tokenizer within that of a transformer; None where it is not whole."""
    model = Section(config).get("model.params.first_stage_config", None)
    whole = Section(model).get("params.encoderconfig", None)
    return None if whole is None else {"model": model}


def _part(section: Section, name: str) -> Section:
    return Section(section.get(f"{name}.params"), f"{section.prefix}{name}.params.")


def _provider(params: Section) -> tuple[Section, int]:
    """The provider of start tokens, and the number of classes, 1 where there are none."""
    for name, place in _PROVIDERS.items():
        if params.get(place, None) is not None:
            target = params.get(f"{place}.target")
            if str(target).rpartition(".")[2] != name:
                raise ValueError(f"{params.prefix}{place}.target: {quoted(target)} is not supported; allowed is {name}")
            provider = _part(params, place)
            classes = provider.read((("n_classes", "n_classes"),)).values() if name == _CLASSES else (1,)
            return provider, *classes
    raise ValueError(
        f"{params.prefix}class_cond_stage_config: missing, like uncond_stage_config; take the config that came "
        "with the checkpoint"
    )


def _numbers(settings: Settings) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Sizes of vocabularies and numbers of special tokens, of the network, the permuter and the provider."""
    layout = layout_of(settings)
    pads, ends = {"content_pad_code": layout.content_pad}, {"content_eos_code": layout.content_eos}
    sizes = {"vocab_size": layout.content_size}
    for g, grain in enumerate(_GRAINS):
        sizes[f"{grain}_position_size"] = layout.position_size(g)
        pads[f"{grain}_position_pad_code"] = layout.position_pad(g)
        ends[f"{grain}_position_eos_code"] = layout.position_eos(g)
    if settings["cond_vocab_size"] > 1:
        starts = {"n_classes": settings["cond_vocab_size"], "threshold_content": layout.content_sos}
        starts |= {f"threshold_{grain}_position": layout.position_sos(g) for g, grain in enumerate(_GRAINS)}
    else:
        starts = {f"{grain}_sos": layout.content_sos for grain in _GRAINS}
        starts |= {f"{grain}_pos_sos": layout.position_sos(g) for g, grain in enumerate(_GRAINS)}
    return {**sizes, **pads}, {**pads, **ends}, starts


def _check_tokens(settings: Settings, network: Section, permuter: Section, provider: Section) -> None:
    """The original takes from its config, one by one, numbers that follow from the codebook and the grid."""
    wrong = []
    defaults: tuple[Mapping[str, int], ...] = (_NETWORK_DEFAULTS, _PERMUTER_DEFAULTS, {})
    for section, numbers, default in zip((network, permuter, provider), _numbers(settings), defaults, strict=True):
        for name, number in numbers.items():
            row = (name, name, default[name]) if name in default else (name, name)
            if (value := section.read((row,))[name]) != number:
                wrong.append(f"{section.prefix.removeprefix('model.params.')}{name} {value} in place of {number}")
    if wrong:
        raise ValueError(
            f"model.params: numbers of tokens that do not add up for {settings['codebook_size']} codes on a grid of "
            f"{settings['code_shape'][:2]}: {', '.join(wrong)}"
        )


def _of_tokenizer(settings: Settings, tokenizer: Settings) -> dict[str, Any]:
    """What the tokenizer decides; the rest must agree with it."""
    theirs = {name: tokenizer[name] for name in ("codebook_size", "num_grains")}
    theirs["code_shape"] = (*code_grid(tokenizer), tokenizer.get("code_depth", 1))
    for name, value in theirs.items():
        if settings[name] != value:
            raise ValueError(
                f"model.params: {name} {settings[name]} differs from the tokenizer's {value}; give the one of this pair"
            )
    return {"code_dim": tokenizer["code_dim"], "use_shared_codebook": tokenizer.get("use_shared_codebook", True)}


def layout_of(settings: Settings) -> GrainLayout:
    """Vocabularies of a transformer of two grains."""
    h, w, _ = settings["code_shape"]
    return GrainLayout((h // 2, w // 2), 2, settings["codebook_size"], settings["cond_vocab_size"], settings["order"])


# --- tensors ------------------------------------------------------------------------------------------------


def dqtransformer_table(settings: Settings) -> Table:
    """The table of a DQ-Transformer; settings from `dqtransformer_settings`, or complete ones."""
    layout, M, N = layout_of(settings), settings["model_dim"], settings["num_heads"]
    sizes = {"M": M, "F": 4 * M, "N": N, "A": M // N, "Q": 3, "G": 2, "K": layout.content_size}
    sizes |= {"V": layout.position_size(0), "W": layout.position_size(1)}
    sizes["P"] = _num_slots(settings)
    rules, buffers = [], []
    for name, key, pattern in _NAMES:
        if name != "grain_embedding_GM" or settings["use_grain_embedding"]:
            rules.append(Rule(f"params/{name}", (f"transformer.{key}",), pattern, sizes))
    for stack in _STACKS:
        layers = range(settings[f"{stack}_layers"])
        blocks = [f"transformer.{stack}_transformer.{i}" for i in layers]
        for _, name, suffixes, pattern in BLOCKS:
            keys = tuple(f"{block}.{suffix}" for block in blocks for suffix in suffixes)
            rules.append(Rule(f"params/{stack}_stack/blocks/{name}", keys, pattern, {**sizes, "L": len(layers)}))
        buffers += [f"{block}.attn.mask" for block in blocks]
    return Table(rules, {}, strangers=("first_stage_model.",), buffers=frozenset(buffers))


# --- the way back -------------------------------------------------------------------------------------------

FIXED = (
    ("num_grains", 2),
    ("cond_length", 1),
    ("use_null_cond", False),
    ("use_shared_position_embedding", False),
    ("depth_layers", 0),
)
LEFT_OUT = (("use_remat", False), ("use_flash_attention", False), ("use_shared_codebook", True), ("dtype", "float32"))


def dqtransformer_config(settings: Settings, tokenizer: Settings | None = None) -> dict[str, Any]:
    """The official config of a DQ-Transformer; the inverse of `dqtransformer_settings`.

    Args:
      settings: complete, as `models.create` takes them.
      tokenizer: those of its DQ-VAE, which becomes `first_stage_config`; None leaves all but its sizes out.

    Raises:
      ValueError: the original cannot express one of the settings.
    """
    h, w, D = settings["code_shape"]
    if h != w or D != 1:
        raise ValueError(f"model.code_shape: {(h, w, D)} cannot be exported; the original's is a square of depth 1")
    if tokenizer is not None:
        _of_tokenizer(settings, tokenizer)  # they fit together
    has_grains, is_class = settings["use_grain_embedding"], settings["cond_vocab_size"] > 1
    numbers, permuter, provider = _numbers(settings)
    network = {official: settings[ours] for ours, official, *_ in _NETWORK}
    network |= {**numbers, "block_size": _num_slots(settings), "segment_size": 2 if has_grains else 0}
    order = {ours: official for official, ours in _ORDERS.items()}[settings["order"]]
    permuter |= {"coarse_hw": h // 2, "fine_hw": h, "fine_position_order": order}
    provider |= {"coarse_seg_sos": 0, "fine_seg_sos": 1} if has_grains else {}
    name, kind = (_CLASSES, "class2") if is_class else (_PLAIN, "uncond")
    quantizer = {"codebook_size": settings["codebook_size"], "codebook_dim": settings["code_dim"]}
    first_stage = {"params": {"vqconfig": {"params": quantizer}}}
    modules = "modules.dynamic_modules"
    params = {
        "transformer_config": {"target": f"{modules}.stackgpt.StackGPT", "params": network},
        "first_stage_config": first_stage if tokenizer is None else dqvae_config(tokenizer)["model"],
        "permuter_config": {"target": f"{modules}.permuter.DualGrainSeperatePermuter", "params": permuter},
        _PROVIDERS[name]: {"target": f"{modules}.label_provider.{name}", "params": provider},
        "activate_sos_for_fine_sequence": True,
    }
    return {"model": {"target": f"models.stage2_dynamic.dqtransformer_{kind}_entropy.Dualformer", "params": params}}


def _num_slots(settings: Settings) -> int:
    return layout_of(settings).max_tokens if settings["num_slots"] is None else settings["num_slots"]

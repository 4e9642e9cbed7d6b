"""The state dict of the original DQ-Transformer as our variables: settings from its config, a table of rules."""

from collections.abc import Mapping
from typing import Any

from rq_jax.interop.official.rules import Rule, Table
from rq_jax.interop.official.tables import _BLOCKS

# Our name, official name, pattern. V positions, K contents, P slots, G grains.
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


def dqtransformer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("dqtransformer", ...)` from an official config."""
    params = config["model"]["params"]
    net, permuter = params["transformer_config"]["params"], params["permuter_config"]["params"]
    codebook = params["first_stage_config"]["params"]["vqconfig"]["params"]
    classes = params.get("class_cond_stage_config", {}).get("params", {}).get("n_classes", 1)
    return dict(
        codebook_size=codebook["codebook_size"], code_dim=codebook["codebook_dim"],
        code_shape=(permuter["fine_hw"], permuter["fine_hw"], 1), num_grains=net["segment_size"],
        order=permuter["fine_position_order"].removesuffix("-first"), model_dim=net["n_embd"], num_heads=net["n_head"],
        position_layers=net["position_layer"], content_layers=net["content_layer"], num_slots=net["block_size"],
        cond_vocab_size=classes, embedding_dropout=net["embd_pdrop"], attention_dropout=net["attn_pdrop"],
        residual_dropout=net["resid_pdrop"],
    )  # fmt: skip


def dqtransformer_table(model: Any) -> Table:
    """The table of a `DQTransformer` of two grains."""
    layout, M, N = model.layout, model.model_dim, model.num_heads
    sizes = {"M": M, "F": 4 * M, "N": N, "A": M // N, "Q": 3, "G": 2, "P": model.slots, "K": layout.content_size}
    sizes |= {"V": layout.position_size(0), "W": layout.position_size(1)}
    rules = [Rule(f"params/{name}", (f"transformer.{key}",), pattern, sizes) for name, key, pattern in _NAMES]
    for stack, count in (("position", model.position_layers), ("content", model.content_layers)):
        for _, name, suffixes, pattern in _BLOCKS:
            keys = tuple(f"transformer.{stack}_transformer.{i}.{suffix}" for i in range(count) for suffix in suffixes)
            rules.append(Rule(f"params/{stack}_stack/blocks/{name}", keys, pattern, {**sizes, "L": count}))
    return Table(rules, {})

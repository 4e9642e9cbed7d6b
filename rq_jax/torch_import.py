"""Published PyTorch checkpoints of the RQ models (kakaobrain/rq-vae-transformer) in our names and layout.

A `Rule` says which official tensors stand behind one array of ours and how their axes move, as an einops
pattern from the stacked tensors to our array: "(L Q) (N A) M -> L M Q N A" reads the query, key and value
matrices (N A, M) of L layers. The shapes on both sides follow from the same line.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

Settings = Mapping[str, Any]
Shape = tuple[int, ...]

# --- configs ------------------------------------------------------------------------------------------------

# Our name, official name in the `arch` section, default; without a default the official config must have it.
_RQVAE_SETTINGS = (
    ("image_size", "ddconfig.resolution"),
    ("code_shape", "hparams.code_shape"),
    ("codebook_size", "hparams.n_embed", 512),
    ("in_channels", "ddconfig.in_channels"),
    ("width", "ddconfig.ch"),
    ("width_multipliers", "ddconfig.ch_mult", (1, 2, 4, 8)),
    ("num_res_blocks", "ddconfig.num_res_blocks"),
    ("attention_resolutions", "ddconfig.attn_resolutions"),
    ("z_channels", "ddconfig.z_channels"),
    ("use_double_z", "ddconfig.double_z", True),
    ("use_resample_conv", "ddconfig.resamp_with_conv", True),
    ("dropout", "ddconfig.dropout", 0.0),
    ("use_shared_codebook", "hparams.shared_codebook", False),
    ("codebook_decay", "hparams.decay", 0.99),
    # The class itself would restart, but official runs fill in this default before they build it.
    ("use_restart", "hparams.restart_unused_codes", False),
    ("use_remat", "checkpointing", False),
)
_RQTRANSFORMER_SETTINGS = (
    ("code_shape", "block_size"),
    ("model_dim", "embed_dim"),
    ("num_heads", "body.block.n_head"),
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
_BLOCK_SETTINGS = (
    ("use_attention_bias", "attn_bias", True),
    ("use_mlp_bias", "mlp_bias", True),
    ("gelu", "gelu", "v1"),
    ("attention_dropout", "attn_pdrop", 0.0),
    ("residual_dropout", "resid_pdrop", 0.1),
)
_GELUS = {"v1": "exact", "v2": "sigmoid"}


def rqvae_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("rqvae", ...)` from an official config or its `arch` section.

    Raises:
      ValueError: a config of another model, a missing key, or a structure that we do not have.
    """
    get = _reader(_arch(config, "rq-vae"))
    settings = {name: get(*official) for name, *official in _RQVAE_SETTINGS}
    bottleneck, out_channels = get("hparams.bottleneck_type", "rq"), get("ddconfig.out_ch")
    if bottleneck != "rq":
        raise ValueError(f"arch.hparams.bottleneck_type: '{bottleneck}' is unknown; allowed is 'rq'")
    if out_channels != settings["in_channels"]:
        raise ValueError(f"arch.ddconfig.out_ch: {out_channels} must be in_channels, {settings['in_channels']}")
    side, latent_dim = _latent_side(settings), get("hparams.embed_dim", 64)
    latent_shape, expected = get("hparams.latent_shape"), (side, side, latent_dim)
    if latent_shape != expected:
        raise ValueError(f"arch.hparams.latent_shape: {latent_shape} must be {expected}, as in the rest of the config")
    h, w, _ = settings["code_shape"]
    return {**settings, "code_dim": (side // h) * (side // w) * latent_dim}


def rqtransformer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `models.create("rqtransformer", ...)` from an official config or its `arch` section.

    Whether the tokenizer has one codebook or one per depth is not in that config: `use_shared_codebook` is in
    the result only where sizes that differ settle it, else it is for the caller to add.

    Raises:
      ValueError: a config of another model, a missing key, or a structure that we do not have.
    """
    get = _reader(_arch(config, "rq-transformer"))
    settings = {name: get(*official) for name, *official in _RQTRANSFORMER_SETTINGS}
    sizes = get("vocab_size", None) or _reader(config)("dataset.vocab_size", None)
    if sizes is None:
        raise ValueError("arch.vocab_size: missing, like dataset.vocab_size; set it to the size of the codebook")
    if isinstance(sizes, tuple) and len(set(sizes)) == 1:
        sizes = sizes[0]
    settings["codebook_size"] = sizes
    if isinstance(sizes, tuple):
        settings["use_shared_codebook"] = False
    # A model without it reads no code vectors, and their length does not matter.
    settings["code_dim"] = get("input_embed_dim", None) or settings["model_dim"]
    for name in ("cond_vocab_size", "cond_length"):
        settings[name] = max(settings[name], 1)  # 0 also stands for the single start token
    if settings["depth_layers"] and get("head.block.n_head") != settings["num_heads"]:
        settings["depth_num_heads"] = get("head.block.n_head")
    for name, official, default in _BLOCK_SETTINGS:
        body, head = (get(f"{stack}.block.{official}", default) for stack in ("body", "head"))
        if settings["depth_layers"] and body != head:
            raise ValueError(f"arch.head.block.{official}: {head} must equal the {body} of arch.body.block")
        settings[name] = body
    if settings["gelu"] not in _GELUS:
        raise ValueError(f"arch.body.block.gelu: '{settings['gelu']}' is unknown; allowed are 'v1' and 'v2'")
    return {**settings, "gelu": _GELUS[settings["gelu"]]}


def _arch(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    arch = config.get("arch", config)
    found = str(arch.get("type", kind)).lower()
    if found != kind:
        raise ValueError(f"arch.type: '{found}' is another model; a config of '{kind}' is needed here")
    return arch


def _reader(section: Mapping[str, Any]) -> Callable[..., Any]:
    """`get(dotted name[, default])`, with tuples for lists; as in the official configs, None is absent."""

    def get(name: str, *default: Any) -> Any:
        value = section
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None and not default:
            raise ValueError(f"arch.{name}: missing; take the config that came with the checkpoint")
        value = default[0] if value is None else value
        return tuple(value) if isinstance(value, list) else value

    return get


# --- state dicts --------------------------------------------------------------------------------------------


def rqvae_variables(state: Mapping[str, np.ndarray], settings: Settings) -> dict[str, Any]:
    """Variables of an RQ-VAE, {"params": ..., "codebook": ...} in float32, from an official state dict.

    The padding row of each codebook and the copies of a shared codebook are dropped.

    Args:
      state: all tensors by official name.
      settings: from `rqvae_settings`.

    Raises:
      ValueError: naming all tensors that are missing, unexpected or misshapen, else all copies that differ.
    """
    variables = _import(state, rqvae_table(settings))
    codebook = variables["codebook"]
    # Codebooks of unequal size are a tuple; the last part of their paths is the depth.
    variables["codebook"] = {k: tuple(v.values()) if isinstance(v, dict) else v for k, v in codebook.items()}
    return variables


def rqtransformer_variables(state: Mapping[str, np.ndarray], settings: Settings) -> dict[str, Any]:
    """Variables of an RQ-Transformer, {"params": ...} in float32, from an official state dict.

    The collection "codebook" is the tokenizer's and for the caller to add. Arguments and errors as in
    `rqvae_variables`, with settings from `rqtransformer_settings`.
    """
    return _import(state, rqtransformer_table(settings))


class Rule(NamedTuple):
    """One array of ours and the official tensors behind it.

    Attributes:
      path: of our array, such as "params/encoder/conv_in/kernel".
      keys: official names of the tensors, in the order in which they are stacked on a new first axis.
      pattern: einops pattern from the stacked tensors to our array.
      sizes: of at least the axes in the pattern.
      aliases: further official names of the same tensor, which must hold the same values.
      padding_rows: rows at the end of each official tensor that are not kept.
    """

    path: str
    keys: tuple[str, ...]
    pattern: str
    sizes: Mapping[str, int]
    aliases: tuple[str, ...] = ()
    padding_rows: int = 0

    @property
    def shape(self) -> Shape:
        """Shape of our array."""
        return self._shape(self._sides[1])

    @property
    def official_shape(self) -> Shape:
        """Shape of each official tensor."""
        _, rows, *rest = self._shape(self._sides[0])
        return rows + self.padding_rows, *rest

    def to_ours(self, tensors: list[np.ndarray]) -> np.ndarray:
        """Our array, contiguous float32, from the tensors of `keys`."""
        tensors = [np.asarray(tensor, np.float32)[: len(tensor) - self.padding_rows] for tensor in tensors]
        return np.ascontiguousarray(rearrange(tensors, self.pattern, **self._axes))

    @property
    def _sides(self) -> list[str]:
        return self.pattern.split(" -> ")

    @property
    def _axes(self) -> dict[str, int]:
        return {axis: self.sizes[axis] for axis in set(re.findall(r"[A-Z]", self.pattern))}

    def _shape(self, side: str) -> Shape:
        groups = re.findall(r"\([^)]*\)|\S+", side)  # the anonymous axis "1" has no letter: an empty product
        return tuple(math.prod(self.sizes[axis] for axis in re.findall(r"[A-Z]", group)) for group in groups)


class Table(NamedTuple):
    """The rules of one model, and the official tensors that hold nothing but a function of its settings."""

    rules: list[Rule]
    constants: Mapping[str, np.ndarray]

    def shapes(self) -> dict[str, Shape]:
        """Shape of every array of ours by path."""
        return {rule.path: rule.shape for rule in self.rules}

    def official_shapes(self) -> dict[str, Shape]:
        """Shape of every official tensor by name."""
        shapes = {key: rule.official_shape for rule in self.rules for key in (*rule.keys, *rule.aliases)}
        return shapes | {key: value.shape for key, value in self.constants.items()}


def _import(state: Mapping[str, np.ndarray], table: Table) -> dict[str, Any]:
    problems = _mismatches(state, table.official_shapes())
    if not problems:
        same = [(alias, rule.keys[0], state[rule.keys[0]]) for rule in table.rules for alias in rule.aliases]
        same += [(key, str(value.tolist()), value) for key, value in table.constants.items()]
        unequal = [(key, other) for key, other, value in same if not np.array_equal(state[key], value)]
        problems = [f"{key} differs from {other}" for key, other in unequal]
    if problems:
        found = "; ".join(problems)
        raise ValueError(f"state dict: does not fit its config: {found}; take both from one checkpoint")
    tree: dict[str, Any] = {}
    for rule in table.rules:
        *parents, name = rule.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = rule.to_ours([state[key] for key in rule.keys])
    return tree


def _mismatches(arrays: Mapping[str, np.ndarray], expected: Mapping[str, Shape]) -> list[str]:
    missing = ", ".join(name for name in expected if name not in arrays)
    unexpected = ", ".join(name for name in arrays if name not in expected)
    found = {name: np.shape(array) for name, array in arrays.items() if name in expected}
    misshapen = [name for name in found if found[name] != expected[name]]
    problems = [f"missing {missing}"] if missing else []
    problems += [f"unexpected {unexpected}"] if unexpected else []
    return problems + [f"{name} has shape {found[name]} instead of {expected[name]}" for name in misshapen]


# --- the tables ---------------------------------------------------------------------------------------------

# Names of the RQ-VAE's modules, official to ours, one line after the other.
_RENAMES = (
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
_CODEBOOK = (
    ("codebook_KE", "weight", "K E", 1),
    ("counts_K", "cluster_size_ema", "K", 0),
    ("sums_KE", "embed_ema", "K E", 0),
)


def rqvae_table(settings: Settings) -> Table:
    """The table of an RQ-VAE; settings from `rqvae_settings`."""
    side, (h, w, _), z_channels = _latent_side(settings), settings["code_shape"], settings["z_channels"]
    latent_dim = settings["code_dim"] // ((side // h) * (side // w))
    encoder_out = 2 * z_channels if settings["use_double_z"] else z_channels
    modules = {
        **_coder("encoder", settings, settings["in_channels"], encoder_out),
        **_coder("decoder", settings, z_channels, settings["in_channels"]),
        "quant_conv": _conv(encoder_out, latent_dim, 1),
        "post_quant_conv": _conv(latent_dim, z_channels, 1),
    }
    rules = []
    for key, sizes in modules.items():
        path = f"params.{key}"
        for official, ours in _RENAMES:
            path = re.sub(official, ours, path)
        name, pattern = ("kernel", "1 O I H W -> H W I O") if "I" in sizes else ("scale", "1 O -> O")
        rules.append(Rule(f"{path}/{name}", (f"{key}.weight",), pattern, sizes))
        rules.append(Rule(f"{path}/bias", (f"{key}.bias",), "1 O -> O", sizes))
    return Table(rules + _codebooks(settings), {})


def _coder(coder: str, settings: Settings, in_channels: int, out_channels: int) -> dict[str, Any]:
    """The modules of the encoder or the decoder by official name, each with the sizes of its axes."""
    widths = [settings["width"] * multiplier for multiplier in settings["width_multipliers"]]
    levels, blocks = range(len(widths)), settings["num_res_blocks"]
    direction, features = "down", settings["width"]
    if coder == "decoder":
        levels, blocks, direction, features = levels[::-1], blocks + 1, "up", widths[-1]
    modules = {f"{coder}.conv_in": _conv(in_channels, features, 3)}
    modules |= _res_block(f"{coder}.mid.block_1", widths[-1], widths[-1])
    modules |= _attention(f"{coder}.mid.attn_1", widths[-1])
    modules |= _res_block(f"{coder}.mid.block_2", widths[-1], widths[-1])
    for level in levels:
        key = f"{coder}.{direction}.{level}"
        for i in range(blocks):
            modules |= _res_block(f"{key}.block.{i}", features, widths[level])
            features = widths[level]
            if settings["image_size"] // 2**level in settings["attention_resolutions"]:
                modules |= _attention(f"{key}.attn.{i}", features)
        if level != levels[-1] and settings["use_resample_conv"]:
            modules[f"{key}.{direction}sample.conv"] = _conv(features, features, 3)
    modules[f"{coder}.norm_out"] = _norm(features)
    return modules | {f"{coder}.conv_out": _conv(features, out_channels, 3)}


def _res_block(key: str, in_features: int, features: int) -> dict[str, Any]:
    modules = {f"{key}.norm1": _norm(in_features), f"{key}.conv1": _conv(in_features, features, 3)}
    modules |= {f"{key}.norm2": _norm(features), f"{key}.conv2": _conv(features, features, 3)}
    if in_features != features:
        modules[f"{key}.nin_shortcut"] = _conv(in_features, features, 1)
    return modules


def _attention(key: str, features: int) -> dict[str, Any]:
    convs = {f"{key}.{name}": _conv(features, features, 1) for name in ("q", "k", "v", "proj_out")}
    return {f"{key}.norm": _norm(features), **convs}


def _conv(in_features: int, features: int, kernel_size: int) -> dict[str, int]:
    return {"O": features, "I": in_features, "H": kernel_size, "W": kernel_size}


def _norm(features: int) -> dict[str, int]:
    return {"O": features}


def _latent_side(settings: Settings) -> int:
    return settings["image_size"] // 2 ** (len(settings["width_multipliers"]) - 1)


def _codebooks(settings: Settings) -> list[Rule]:
    codes = _codebook_sizes(settings)
    sizes, rules = {"K": codes[0], "D": len(codes), "E": settings["code_dim"]}, []
    for name, official, axes, padding in _CODEBOOK:
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


def _codebook_sizes(settings: Settings) -> tuple[int, ...]:
    sizes, depth = settings["codebook_size"], settings["code_shape"][-1]
    return (sizes,) * depth if isinstance(sizes, int) else tuple(sizes)


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
_BLOCKS = (
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
    (h, w, D), M, codes = settings["code_shape"], settings["model_dim"], _codebook_sizes(settings)
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
    depth_heads = settings.get("depth_num_heads") or settings["num_heads"]
    for ours, official, heads in (("spatial", "body", settings["num_heads"]), ("depth", "head", depth_heads)):
        layers = range(settings[f"{ours}_layers"])
        stack_sizes = {**sizes, "L": len(layers), "N": heads, "A": M // heads}
        for name, suffixes, pattern in [row for part, *row in _BLOCKS if has[part] and layers]:
            keys = tuple(f"{official}_transformer.blocks.{i}.{suffix}" for i in layers for suffix in suffixes)
            rules.append(Rule(f"params/{ours}_stack/blocks/{name}", keys, pattern, stack_sizes))
    separate_embeddings = has["token_embedding"] and not settings["use_shared_token_embedding"]
    # Where the table of each depth begins.
    return Table(rules, {"tok_emb.offsets": np.cumsum((0, *codes[:-1]))} if separate_embeddings else {})

"""Small official configs of DQ-VAE and DQ-Transformer, and their state dicts, written down from the originals.

Of 32x32 images, with 4x4 regions (dual) or 2x2 (triple); the grid of codes is 8x8.
"""

import copy

import numpy as np
from official_states import affine, attention_block, discriminator_state, random_state, res_block

K, E, Z, CH = 11, 6, 32, 32
_NAMES = {2: ("coarse", "fine"), 3: ("coarse", "median", "fine")}
CLASSES = 5


def stage1_config(grains=2, router="feature", gate="2layer-fc-SiLu", norm="group-32", position="fourier+learned"):
    name = {2: "Dual", 3: "Triple"}[grains]
    routers = {
        "feature": (f"{name}GrainFeatureRouter", dict(num_channels=Z, normalization_type=norm, gate_type=gate)),
        "entropy": ("DualGrainFixedEntropyRouter", dict(json_path="scripts/thresholds.json", fine_grain_ratito=0.3)),
    }
    target, params = routers[router]
    coder = dict(ch=CH, num_res_blocks=1, dropout=0.1, resamp_with_conv=True, resolution=32)
    mult = {2: [1, 1, 1, 2], 3: [1, 1, 1, 2, 2]}[grains]
    encoder = dict(
        coder, ch_mult=mult, attn_resolutions=[8], in_channels=3, z_channels=Z,
        router_config=dict(target=f"modules.dynamic_modules.Router.{target}", params=params),
    )  # fmt: skip
    decoder = dict(
        coder, ch_mult=[1, 1, 1], attn_resolutions=[], in_ch=Z, out_ch=3, latent_size=8, window_size=2,
        position_type=position,
    )  # fmt: skip
    discriminator = dict(input_nc=3, ndf=5, n_layers=2, use_actnorm=False)
    return {
        "model": {
            "target": f"models.stage1_dynamic.dqvae.{name}GrainVQModel",
            "params": dict(
                encoderconfig=dict(target=f"modules.{name}GrainEncoder", params=encoder),
                decoderconfig=dict(target="modules.dynamic_modules.DecoderPositional.Decoder", params=decoder),
                lossconfig=dict(target="modules.losses.X", params=dict(disc_config=dict(params=discriminator))),
                vqconfig=dict(
                    target="modules.VectorQuantize2", params=dict(codebook_size=K, codebook_dim=E, decay=0.98)
                ),
                quant_before_dim=Z, quant_after_dim=E, image_size=32, entropy_patch_size=8,
            ),
        }
    }  # fmt: skip


def stage1_shapes(grains=2, router="feature", gate="2layer-fc-SiLu", norm="group-32", position="fourier+learned"):
    names, widths = _NAMES[grains], {2: (32, 32, 32, 64), 3: (32, 32, 32, 64, 64)}[grains]
    shapes = affine("encoder.conv_in", (CH, 3, 3, 3)) | affine("decoder.conv_in", (CH, Z, 3, 3))
    previous = CH
    for level, width in enumerate(widths):
        shapes |= res_block(f"encoder.down.{level}.block.0", previous, width)
        if 32 // 2**level == 8:
            shapes |= attention_block(f"encoder.down.{level}.attn.0", width)
        if level < len(widths) - 1:
            shapes |= affine(f"encoder.down.{level}.downsample.conv", (width, width, 3, 3))
        previous = width
    for name, width in zip(names, widths[::-1], strict=False):
        key = f"encoder.mid_{name}"
        shapes |= res_block(f"{key}.block_1", width, width) | res_block(f"{key}.block_2", width, width)
        shapes |= attention_block(f"{key}.attn_1", width) | affine(f"encoder.norm_out_{name}", (width,))
        shapes |= affine(f"encoder.conv_out_{name}", (Z, width, 3, 3))
    shapes |= _router_shapes(names, gate, norm) if router == "feature" else {}
    shapes |= res_block("decoder.mid.block_1", CH, CH) | res_block("decoder.mid.block_2", CH, CH)
    shapes |= attention_block("decoder.mid.attn_1", CH) | affine("decoder.norm_out", (CH,))
    for level in range(3):
        for i in range(2):
            shapes |= res_block(f"decoder.up.{level}.block.{i}", CH, CH)
        if level:
            shapes |= affine(f"decoder.up.{level}.upsample.conv", (CH, CH, 3, 3))
    shapes |= affine("decoder.conv_out", (3, CH, 3, 3))
    shapes |= _position_shapes(position)
    shapes |= affine("quant_conv", (E, Z, 1, 1)) | affine("post_quant_conv", (Z, E, 1, 1))
    key = "quantize.codebook"
    return shapes | {f"{key}.weight": (K + 1, E), f"{key}.cluster_size_ema": (K,), f"{key}.embed_ema": (K, E)}


def _router_shapes(names, gate, norm):
    n = len(names)
    if gate == "1layer-fc":
        shapes = affine("encoder.router.gate", (n, n * Z))
    else:
        shapes = affine("encoder.router.gate.0", (n * Z, n * Z)) | affine("encoder.router.gate.2", (n, n * Z))
    for name in names if norm != "none" else ():
        shapes |= affine(f"encoder.router.feature_norm_{name}", (Z,))
    return shapes


def _position_shapes(position):
    if position in ("learned", "learned-relative"):
        rows = 8 if position == "learned" else 2
        return {f"decoder.position_bias.{axis}_embed.weight": (rows, Z) for axis in ("row", "col")}
    fourier = "_fourier" if position == "fourier+learned" else ""
    shapes = affine(f"decoder.position_bias{fourier}.lff.ffm.conv", (Z, 2, 1, 1))
    if position == "fourier+learned":
        shapes |= {f"decoder.position_bias_learned.{axis}_embed.weight": (8, Z) for axis in ("row", "col")}
    return shapes


def stage1_state(**kwargs):
    return random_state(stage1_shapes(**kwargs))


def lightning(state):
    """As the original's trainer saves it."""
    losses = {f"loss.discriminator.{key}": value for key, value in discriminator_state().items()}
    losses["loss.perceptual_loss.net.slice1.0.weight"] = np.zeros(2, np.float32)
    return {**state, **losses}


def stage2_config(classes=CLASSES, order="row-first", segments=2, slots=90, **changes):
    """`changes` are of numbers of tokens, by "section.name"."""
    network = dict(
        vocab_size=K + 2 + classes, coarse_position_size=16 + 2 + classes, fine_position_size=64 + 2 + classes,
        segment_size=segments, block_size=slots, position_layer=1, content_layer=2, n_head=2, n_embd=8,
        content_pad_code=K, coarse_position_pad_code=16, fine_position_pad_code=64,
    )  # fmt: skip
    permuter = dict(
        coarse_hw=4, fine_hw=8, content_pad_code=K, content_eos_code=K + 1, coarse_position_pad_code=16,
        coarse_position_eos_code=17, fine_position_pad_code=64, fine_position_eos_code=65, fine_position_order=order,
    )  # fmt: skip
    if classes > 1:
        place, target = "class_cond_stage_config", "ClassAwareSOSProvider"
        starts = dict(n_classes=classes, threshold_content=K + 2, threshold_coarse_position=18)
        starts["threshold_fine_position"] = 66
    else:
        place, target = "uncond_stage_config", "PositionAwareSOSProvider"
        starts = dict(coarse_sos=K + 2, fine_sos=K + 2, coarse_pos_sos=18, fine_pos_sos=66)
    params = {
        "transformer_config": {"params": network},
        "first_stage_config": stage1_config(router="entropy")["model"],
        "permuter_config": {"params": permuter},
        place: {"target": f"modules.label_provider.{target}", "params": starts},
    }
    params = copy.deepcopy(params)
    for name, value in changes.items():
        *path, last = name.split(".")
        node = params
        for part in path:
            node = node[part]
        node[last] = value
    return {"model": {"target": "models.stage2_dynamic.dqtransformer_class2_entropy.Dualformer", "params": params}}


def stage2_shapes(classes=CLASSES, segments=2, slots=90):
    M = 8
    shapes = {"pos_emb": (1, slots, M), "content_emb.weight": (K + 2 + classes, M)}
    shapes |= {"content_coarse_pos_emb.weight": (18 + classes, M), "content_fine_pos_emb.weight": (66 + classes, M)}
    shapes |= {"seg_emb.weight": (2, M)} if segments > 0 else {}
    for stack, count in (("position", 1), ("content", 2)):
        for i in range(count):
            key = f"{stack}_transformer.{i}"
            shapes |= affine(f"{key}.ln1", (M,)) | affine(f"{key}.ln2", (M,))
            for name in ("key", "query", "value", "proj"):
                shapes |= affine(f"{key}.attn.{name}", (M, M))
            shapes |= affine(f"{key}.mlp.0", (4 * M, M)) | affine(f"{key}.mlp.2", (M, 4 * M))
            shapes[f"{key}.attn.mask"] = (1, 1, slots, slots)
        shapes |= affine(f"{stack}_head.0", (M,))
    shapes |= {"position_head.1.weight": (66 + classes, M), "content_head.1.weight": (K + 2 + classes, M)}
    return {f"transformer.{key}": shape for key, shape in shapes.items()}


def stage2_state(**kwargs):
    return random_state(stage2_shapes(**kwargs))

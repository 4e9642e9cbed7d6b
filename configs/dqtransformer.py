"""Stage 2, DQ-Transformers: --config=configs/dqtransformer.py:<preset>, or :<preset>,quicktest to shrink it.

What the tokenizer decides (codebook_size, code_shape, num_grains, code_dim, image size) comes from its checkpoint.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def _layers(position_layers: int, content_layers: int) -> dict[str, int]:
    return {"model.position_layers": position_layers, "model.content_layers": content_layers}


# As released: 30 images on each of 8 GPUs, 100 epochs; but images of similar length, 260 to 1028 tokens, share a batch.
IMAGENET = {
    **common.IMAGENET,
    "loop.buckets": (512, 640, 768, 896),
    "loop.bucket_window": 8,
    "model.num_slots": 2048,  # of which the longest image takes 1028
    "data.batch_size": 240,
    "loop.total_epochs": 100,
    "tokenizer_preset": "imagenet256",
}
CLASSES = {"model.cond_vocab_size": 1000, "data.label_key": "label"}

DEMO = {
    **common.TWEMOJI,
    **_layers(2, 4),
    "data.train_transform": "random_shift",
    "data.flip_probability": 0.5,
    "data.label_key": "subcategory",
    "data.batch_size": 16,
    "model.cond_vocab_size": 100,
    "model.model_dim": 128,
    "model.num_heads": 4,
    "model.embedding_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.residual_dropout": 0.0,
    "model.use_remat": False,
    "model.dtype": "float32",
    "optim.learning_rate": 1.5e-3,
    "optim.weight_decay": 0.05,
    "optim.warmup_steps": 100,
    "optim.clip_norm": 1.0,
    "loop.total_steps": 1800,
    "loop.log_every_steps": 50,
    "loop.evaluate_every_steps": 900,
    "loop.checkpoint_every_steps": 200,
    "loop.ema_decay": 0.995,
    "sample.top_k": None,
    "sample.top_p": 0.85,
    "sample.position_top_k": None,
    "sample.position_top_p": 0.85,
    "tokenizer_preset": "demo",
}

PRESETS: dict[str, common.Overrides] = {
    # The bundled images, by category; and with two codes at each position, the second from a depth stack.
    "demo": DEMO,
    "demo_d2": {**DEMO, "model.depth_layers": 1, "tokenizer_preset": "demo_d2"},
    # Released configs.
    "uncond_imagenet_p6c18": IMAGENET,
    "class_imagenet_p6c18": {**IMAGENET, **CLASSES},
    # The same with a null condition, for classifier-free guidance.
    "class_imagenet_p6c18_guided": {
        **IMAGENET,
        **CLASSES,
        "model.use_null_cond": True,
        "loss.cond_dropout": 0.1,
        "sample.guidance": 1.5,
    },
    # Of the paper, 48 blocks: how they are split between the stacks is not published, this is the ratio of the others.
    "class_imagenet_p12c36": {**IMAGENET, **CLASSES, **_layers(12, 36)},
    "ffhq_p6c18": {**IMAGENET, **common.FFHQ, "tokenizer_preset": "ffhq256"},
    # Beyond them: three grains, and text.
    "class_imagenet_triple_p6c18": {
        **IMAGENET,
        **CLASSES,
        "loop.buckets": (256, 384, 512, 640),  # of 70 to 1030 tokens
        "tokenizer_preset": "imagenet256_triple_entropy",
    },
    "cc3m_p6c18": {
        **IMAGENET,
        **common.CC3M,
        "model.cond_vocab_size": 16384,
        "model.cond_length": 32,
        "data.flip_probability": 0.0,
        "data.text_key": "caption",
        "data.text_length": 32,
        "data.text_dropout": 0.1,
        "loss.content_weight": 0.9,
        "loss.position_weight": 0.9,
        "loss.text_weight": 0.1,
    },
    # A model of the speed comparison.
    "throughput_small": {
        **IMAGENET,
        **CLASSES,
        **_layers(4, 12),
        "model.model_dim": 512,
        "model.num_slots": None,
    },
}


def base() -> ConfigDict:
    """Settings that the released transformers have in common (paper, section 4).

    Returns:
        An unlocked config.
    """
    config = common.transformer_base(
        {
            "name": "dqtransformer",
            "codebook_size": placeholder(int),
            "code_shape": placeholder(tuple),
            "code_dim": placeholder(int),
            "num_grains": placeholder(int),
            "order": "row",
            "model_dim": 1024,
            "num_heads": 8,
            "depth_num_heads": placeholder(int),
            "position_layers": 6,
            "content_layers": 18,
            "depth_layers": 0,
            "num_slots": placeholder(int),
            "cond_vocab_size": 1,
            "cond_length": 1,
            "use_grain_embedding": True,
            "use_shared_position_embedding": False,
            "embedding_dropout": 0.1,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
            "use_null_cond": False,
            "use_flash_attention": False,
            "use_remat": True,
            "dtype": "bfloat16",
        }
    )
    config.optim.weight_decay = 0.01
    config.loop.buckets = ()  # numbers of tokens, increasing, that batches are padded to; the most is one more
    config.loop.bucket_window = 1  # batches among which images are grouped by their number of tokens
    config.loss = {"content_weight": 1.0, "position_weight": 1.0, "text_weight": 0.0, "cond_dropout": 0.0}
    config.sample.update(  # of positions: one value each
        position_temperature=placeholder(float),
        position_top_k=placeholder(int),
        position_top_p=placeholder(float),
    )
    config.sample.top_k, config.sample.position_top_k = 300, 1024  # as the released scripts draw
    return config


def quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink a transformer to a few narrow layers; its condition and its depth stack, if any, stay.

    Args:
        config: a finished config of this file.

    Returns:
        Overrides. The paired tokenizer is the shrunk one.
    """
    buckets = {"loop.buckets": (44,), "loop.bucket_window": 2} if config.loop.buckets else {}
    return {**common.transformer_quicktest(config), **_layers(1, 2), **buckets}


get_config = common.getter(base, PRESETS, quicktest)

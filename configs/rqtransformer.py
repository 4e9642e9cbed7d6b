"""Stage 2, RQ-Transformers: --config=configs/rqtransformer.py:<preset>, or :<preset>,quicktest to shrink it.

What the tokenizer decides (codebook_size, code_shape, code_dim, image size) is filled in from its checkpoint.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def _size(model_dim: int, num_heads: int, spatial_layers: int, depth_layers: int) -> dict[str, int]:
    return {
        "model.model_dim": model_dim,
        "model.num_heads": num_heads,
        "model.spatial_layers": spatial_layers,
        "model.depth_layers": depth_layers,
    }


def _sample(top_k: int | None, top_p: float) -> dict[str, float | None]:
    return {"sample.top_k": top_k, "sample.top_p": top_p}


# A batch = images per device as released x 8 devices x accumulated steps.
LARGE_BATCH = {"data.batch_size": 2048, "optim.accumulation_steps": 8, "loop.total_epochs": 100}  # 32 x 8 x 8
LARGE_BATCH_BIG_MODEL = {**LARGE_BATCH, "optim.accumulation_steps": 32}  # 8 x 8 x 32
FFHQ_BATCH = {"data.batch_size": 128, "loop.total_epochs": 200}  # 16 x 8 (released as 32 x 4)
CHURCH_BATCH = {"data.batch_size": 256, "loop.total_epochs": 300}  # 32 x 8

FFHQ = {
    **common.FFHQ,
    **FFHQ_BATCH,
    **_size(1024, 16, 24, 4),
    **_sample(250, 1.0),
    "tokenizer_preset": "ffhq256",
}
LSUN_CHURCH = {
    **common.LSUN_CHURCH,
    **CHURCH_BATCH,
    **_size(1024, 16, 24, 4),
    **_sample(250, 1.0),
    "tokenizer_preset": "lsun_church256",
}
LSUN_CAT = {
    **common.LSUN_CAT,
    **LARGE_BATCH,
    **_size(1280, 20, 26, 4),
    **_sample(250, 1.0),
    "tokenizer_preset": "lsun_cat256",
}
LSUN_BEDROOM = {
    **common.LSUN_BEDROOM,
    **LARGE_BATCH,
    **_size(1280, 20, 26, 4),
    **_sample(250, 1.0),
    "tokenizer_preset": "lsun_bedroom256",
}
IMAGENET = {
    **common.IMAGENET,
    **LARGE_BATCH,
    **_sample(16384, 0.92),
    "model.cond_vocab_size": 1000,
    "data.label_key": "label",
    "tokenizer_preset": "imagenet256",
}
# The speed comparison draws from the whole distribution.
THROUGHPUT = {**IMAGENET, "sample.top_k": None, "sample.top_p": None}
IMAGENET_1400M = {**IMAGENET, **LARGE_BATCH_BIG_MODEL, **_size(1536, 24, 42, 6)}
IMAGENET_3800M = {
    **IMAGENET,
    **LARGE_BATCH_BIG_MODEL,
    **_size(2560, 40, 42, 6),
    "tokenizer_preset": "imagenet256_50epochs",
}
TEXT = {
    "model.cond_vocab_size": 16384,
    "model.cond_length": 32,
    "data.text_key": "caption",
    "data.text_length": 32,
    "data.text_dropout": 0.1,
    "loss.image_weight": 0.9,
    "loss.text_weight": 0.1,
    "tokenizer_preset": "imagenet256",
}
CC3M = {**common.CC3M, **TEXT, **LARGE_BATCH, **_size(1280, 20, 26, 4), **_sample(16384, 0.7)}

EMOJI = {
    **common.TWEMOJI,
    "data.train_transform": "random_shift",
    "data.flip_probability": 0.5,
    "data.label_key": "subcategory",
    "model.cond_vocab_size": 100,
    # Squared distances between latents and codes of these tokenizers are around 0.01; at the 0.5 of the large models
    # the soft codes would be almost uniform.
    "loss.temperature": 0.0005,
    "loop.checkpoint_every_steps": 1000,
    "loop.evaluate_every_steps": 1000,
    **_sample(None, 0.85),
}

PRESETS: dict[str, common.Overrides] = {
    # The bundled images, by category: one for a laptop, one for an accelerator.
    "demo": {
        **EMOJI,
        **_size(128, 4, 6, 1),
        "model.residual_dropout": 0.0,
        "model.use_remat": False,
        "model.dtype": "float32",
        "data.batch_size": 16,
        "optim.learning_rate": 1.5e-3,
        "optim.weight_decay": 0.05,
        "optim.warmup_steps": 100,
        "loop.total_steps": 1800,
        "loop.log_every_steps": 50,
        "loop.evaluate_every_steps": 900,
        "loop.checkpoint_every_steps": 200,
        "loop.ema_decay": 0.995,
        "tokenizer_preset": "demo",
    },
    # The transformer that ships in checkpoints/emoji: made for two CPU cores.
    "emoji": {
        **EMOJI,
        **_size(192, 6, 8, 2),
        "model.use_null_cond": True,
        "model.residual_dropout": 0.05,
        "model.use_remat": False,
        "model.dtype": "float32",
        "data.batch_size": 16,
        "loss.cond_dropout": 0.1,
        "optim.learning_rate": 1e-3,
        "optim.weight_decay": 0.05,
        "optim.warmup_steps": 200,
        "loop.total_steps": 12_000,
        "loop.log_every_steps": 50,
        "loop.evaluate_every_steps": 1000,
        "loop.checkpoint_every_steps": 500,
        "loop.ema_decay": 0.998,
        # The nearest to held-out images by kernel distance of seven that were tried.
        "sample.guidance": 2.0,
        "sample.temperature": (0.8, 0.6, 0.5, 0.4),
        "sample.top_p": 0.8,
        "tokenizer_preset": "emoji",
    },
    # By text. The text tokenizer is trained by rq_jax.data.text: docs/data.md.
    "avatars_text": {
        **common.AVATARS,
        **TEXT,
        **_size(192, 6, 6, 2),
        "model.cond_vocab_size": 512,
        "model.cond_length": 40,
        "model.use_null_cond": True,
        "model.residual_dropout": 0.0,
        "model.use_remat": False,
        "model.dtype": "float32",
        "data.batch_size": 16,
        "data.text_length": 40,
        "data.text_dropout": 0.0,  # a closed vocabulary, whose words are a token each
        "loss.temperature": 0.0005,
        "loss.cond_dropout": 0.1,
        "optim.name": "muon",
        "optim.learning_rate": 1.5e-3,
        "optim.weight_decay": 0.05,
        "optim.warmup_steps": 100,
        "loop.total_steps": 2000,
        "loop.log_every_steps": 50,
        "loop.evaluate_every_steps": 1000,
        "loop.checkpoint_every_steps": 250,
        "loop.ema_decay": 0.995,
        **_sample(None, 0.9),
        "sample.guidance": 2.5,
        "tokenizer_preset": "avatars",
    },
    "emoji64": {
        **EMOJI,
        **_size(384, 6, 12, 4),
        "model.use_remat": False,
        "data.batch_size": 128,
        "optim.warmup_steps": 500,
        "loop.total_steps": 20_000,
        "tokenizer_preset": "emoji64",
    },
    # Released configs, and where the paper says otherwise.
    "ffhq256_350m": FFHQ,
    "ffhq256_350m_paper": {
        **FFHQ,
        **_sample(2048, 0.95),
        "data.batch_size": 16,
        "loss.temperature": 1.0,
        "loop.evaluate_every_steps": 3750,  # an epoch of 60,000 images; the paper's run stopped after 39
        "loop.early_stopping_evaluations": 5,
        "tokenizer_preset": "ffhq256_paper",
    },
    "lsun_church256_350m": LSUN_CHURCH,
    "lsun_church256_350m_paper": {
        **LSUN_CHURCH,
        **_sample(1400, 1.0),
        "data.batch_size": 2048,
        "optim.accumulation_steps": 8,
        "tokenizer_preset": "lsun_church256_paper",
    },
    "lsun_cat256_600m": LSUN_CAT,
    "lsun_cat256_600m_paper": {
        **LSUN_CAT,
        **_sample(512, 0.9),
        "loop.total_epochs": 200,
        "tokenizer_preset": "lsun_cat256_paper",
    },
    "lsun_bedroom256_600m": LSUN_BEDROOM,
    "lsun_bedroom256_600m_paper": {
        **LSUN_BEDROOM,
        **_sample(8192, 0.85),
        "loop.total_epochs": 90,
        "tokenizer_preset": "lsun_bedroom256_paper",
    },
    "imagenet256_480m": {**IMAGENET, **_size(1536, 24, 12, 4)},
    "imagenet256_800m": {**IMAGENET, **_size(1536, 24, 24, 4)},
    "imagenet256_1400m": IMAGENET_1400M,
    "imagenet256_1400m_50epochs": {**IMAGENET_1400M, "tokenizer_preset": "imagenet256_50epochs"},
    "imagenet256_3800m": IMAGENET_3800M,
    "imagenet256_3800m_paper": {**IMAGENET_3800M, "model.residual_dropout": 0.3},
    "cc3m_650m": CC3M,
    "cc3m_650m_paper": {**CC3M, "model.spatial_layers": 24},
    # Released without its config: the sizes are inferred from "3.9B", the batch is that of the 3.8B model.
    "t2i_3900m": {
        **CC3M,
        **LARGE_BATCH_BIG_MODEL,
        **_size(2560, 40, 42, 6),
        **_sample(1024, 0.95),
        "data.name": "cc3m_cc12m_yfcc",
    },
    # Models of the speed comparison.
    "throughput_huge": {**THROUGHPUT, **_size(1536, 24, 42, 6)},
    "throughput_large": {**THROUGHPUT, **_size(1536, 24, 24, 4)},
    "throughput_medium": {**THROUGHPUT, **_size(1024, 16, 24, 4)},
    "throughput_small": {**THROUGHPUT, **_size(512, 8, 24, 4)},
    "throughput_vqgan_large": {
        **THROUGHPUT,
        **_size(1664, 16, 24, 0),
        "tokenizer_preset": "imagenet256_f16_vq1024",
    },
    "throughput_vqgan_huge": {
        **THROUGHPUT,
        **_size(1536, 24, 48, 0),
        "tokenizer_preset": "imagenet256_f16_vq16384",
    },
}


def base() -> ConfigDict:
    """Settings that the released transformers have in common (paper, section 4).

    Returns:
        An unlocked config.
    """
    config = common.transformer_base(
        {
            "name": "rqtransformer",
            "codebook_size": placeholder(int),
            "code_shape": placeholder(tuple),
            "code_dim": placeholder(int),
            "model_dim": 1536,
            "num_heads": 24,
            "depth_num_heads": placeholder(int),
            "spatial_layers": 24,
            "depth_layers": 4,
            "cond_vocab_size": 1,
            "cond_length": 1,
            "use_tokenizer_input": True,
            "use_tokenizer_depth_input": True,
            "use_cumulative_depth": True,
            "use_shared_token_embedding": True,
            "use_shared_classifier": True,
            "use_attention_bias": True,
            "use_mlp_bias": True,
            "gelu": "exact",
            "embedding_dropout": 0.0,
            "attention_dropout": 0.0,
            "residual_dropout": 0.1,
            "use_null_cond": False,
            "use_flash_attention": False,
            "use_remat": True,
            "dtype": "bfloat16",
        }
    )
    config.optim.weight_decay = 1e-4
    config.optim.clip_norm = 1.0
    config.loss = {
        "use_soft_labels": True,
        "use_stochastic_codes": True,
        "temperature": 0.5,
        "image_weight": 1.0,
        "text_weight": 0.0,
        "cond_dropout": 0.0,
    }
    return config


def quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink a transformer to a few narrow layers; its condition and its second stack, if any, stay.

    Args:
        config: a finished config of this file.

    Returns:
        Overrides. The paired tokenizer is the shrunk one.
    """
    return {
        **common.transformer_quicktest(config),
        **_size(32, 2, 2, min(config.model.depth_layers, 1)),
    }


get_config = common.getter(base, PRESETS, quicktest)

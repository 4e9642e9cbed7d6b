"""Stage 1, DQ-VAE tokenizers: --config=configs/dqvae.py:<preset>, or :<preset>,quicktest to shrink it."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

# As released: 30 images on each of 8 GPUs at 4.5e-6 for each image, 50 epochs; the checkpoint itself had 10.
IMAGENET = {**common.IMAGENET, "loop.total_epochs": 50}
# Grains are 32x32 pixels by one code to 8x8 pixels by one.
TRIPLE = {
    "model.num_grains": 3,
    "model.width_multipliers": (1, 1, 2, 2, 4, 4),
    "model.attention_resolutions": (32, 16, 8),
    "model.fine_ratio": (0.3, 0.3),
}

DEMO = {
    **common.TWEMOJI,
    "data.train_transform": "random_shift",
    "data.flip_probability": 0.5,
    "data.batch_size": 32,
    "model.image_size": 32,
    "model.width": 16,
    "model.width_multipliers": (1, 2, 2, 2),
    "model.num_res_blocks": 1,
    "model.norm_groups": 4,
    "model.attention_resolutions": (),
    "model.z_channels": 32,
    "model.code_dim": 32,
    "model.codebook_size": 512,
    "model.use_remat": False,
    "optim.learning_rate": 2e-3,
    "optim.b1": 0.9,
    "optim.b2": 0.99,
    "optim.warmup_steps": 100,
    "optim.warmup_epochs": None,
    "loss.perceptual_weight": 0.02,
    "loss.perceptual_start_steps": 800,
    "loss.adversarial_weight": 0.2,
    "loss.adversarial_start_steps": 800,
    "loss.adversarial_warmup_steps": 100,
    "discriminator.width": 32,
    "discriminator.num_layers": 2,
    "discriminator_optim.learning_rate": 5e-4,
    "discriminator_optim.b1": 0.5,
    "loop.total_steps": 1100,
    "loop.log_every_steps": 50,
    "loop.evaluate_every_steps": 400,
    "loop.checkpoint_every_steps": 200,
    "loop.ema_decay": 0.99,
}

PRESETS: dict[str, common.Overrides] = {
    # The bundled images: 8x8 codes at most, 4x4 at least.
    "demo": DEMO,
    "demo_d2": {**DEMO, "model.code_depth": 2},
    # Released configs: regions by entropy (that of the checkpoint), by a trained router, and of three grains.
    "imagenet256": IMAGENET,
    "imagenet256_feature": {**IMAGENET, "model.router": "feature", "loss.budget_weight": 20.0},
    "imagenet256_triple": {**IMAGENET, **TRIPLE, "model.router": "feature", "loss.budget_weight": 1.0},
    # Beyond them: three grains by two thresholds, which they do not have; FFHQ, of the paper.
    "imagenet256_triple_entropy": {**IMAGENET, **TRIPLE},
    "ffhq256": {**common.FFHQ, "loop.total_epochs": 150},
}


def base() -> ConfigDict:
    """The released DQ-VAE with an entropy router, without its data set and durations (paper, section 4).

    Returns:
        An unlocked config.
    """
    config = common.tokenizer_base(
        {
            "name": "dqvae",
            "image_size": common.one_or_many(256),  # or (height, width)
            "in_channels": 3,
            "num_grains": 2,
            "code_depth": 1,
            "router": "entropy",
            "fine_ratio": common.one_or_many(0.5),  # or one for each grain above 0
            "thresholds": placeholder(tuple),  # of the entropy router: from a file, or measured
            "entropy_bins": "full",
            "gate_layers": 2,
            "gate_activation": "silu",
            "use_gate_norm": True,
            "width": 128,
            "width_multipliers": (1, 1, 2, 2, 4),
            "num_res_blocks": 2,
            "attention_resolutions": (32, 16),
            # Of the decoder; unset: what the encoder has at its levels.
            "decoder_width": placeholder(int),
            "decoder_width_multipliers": placeholder(tuple),
            "decoder_num_res_blocks": placeholder(int),
            "decoder_attention_resolutions": placeholder(tuple),
            "position_bias": "fourier+learned",
            "z_channels": 256,
            "use_double_z": False,
            "use_resample_conv": True,
            "dropout": 0.0,
            "norm_groups": 32,
            "code_dim": 256,
            "codebook_size": common.one_or_many(1024),  # or one for each depth
            "codebook_init": "uniform",
            "use_shared_codebook": True,
            "codebook_decay": common.one_or_many(0.99),  # or one for each depth
            "use_code_weights": False,
            "use_restart": True,
            "codebook_update": "sequential",
            "use_kmeans_init": False,
            "use_remat": True,
            "dtype": "float32",
        }
    )
    config.thresholds = placeholder(str)  # a file of `python -m rq_jax.data.entropy`; unset: measured first
    config.discriminator.num_layers = 3
    config.loss.reconstruction = "l1"
    config.loss.budget_weight = common.one_or_many(0.0)  # or one for each grain above 0
    config.loss.adversarial_weight = 1.0
    config.loss.max_adaptive_weight = 0.75
    config.data.batch_size = 240
    config.optim.learning_rate = 1.08e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 0.1
    return config


def quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink a tokenizer to 16x16 images, 8x8 codes; grains, depth, attention and router stay.

    Args:
        config: a finished config of this file.

    Returns:
        Overrides.
    """
    model = config.model
    finest = model.image_size >> (len(model.width_multipliers) - model.num_grains)  # rows of its grid
    return {
        **common.tokenizer_quicktest(config),
        "model.width_multipliers": (1,) * (model.num_grains + 1),
        # Attention keeps its level, counted from the code grid.
        "model.attention_resolutions": tuple(8 * r // finest for r in model.attention_resolutions),
    }


get_config = common.getter(base, PRESETS, quicktest)

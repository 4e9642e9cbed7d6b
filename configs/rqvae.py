"""Stage 1, RQ-VAE tokenizers: --config=configs/rqvae.py:<preset>, or :<preset>,quicktest to shrink it."""

from typing import Any

from ml_collections import ConfigDict

from configs import common

# All released tokenizers: Adam at 4e-5 after the warm-up, 32 images on each of 4 GPUs.
IMAGENET = {**common.IMAGENET, "optim.warmup_epochs": 0.5, "loop.total_epochs": 10}
FFHQ = {
    **common.FFHQ,
    "model.codebook_size": 2048,
    "model.attention_resolutions": (16,),
    "optim.warmup_epochs": 5,
    "loop.total_epochs": 150,
}
# One epoch, meant to start from the weights of the ImageNet tokenizer: --config.init_from=<its directory>.
FINETUNE = {"optim.warmup_epochs": 0, "loop.total_epochs": 1}
# The paper fine-tunes ten times slower than the released configs.
PAPER_FINETUNE = {**FINETUNE, "optim.learning_rate": 4e-6}
# Code grids of 16x16 and 32x32 for images of 256x256.
F16 = {
    "model.width_multipliers": (1, 1, 2, 2, 4),
    "model.attention_resolutions": (16,),
    "model.code_shape": (16, 16, 4),
}
F8 = {
    "model.width_multipliers": (1, 2, 2, 4),
    "model.attention_resolutions": (32,),
    "model.code_shape": (32, 32, 4),
}

EMOJI = {
    **common.TWEMOJI,
    "data.train_transform": "random_shift",
    "data.flip_probability": 0.5,
    "optim.b1": 0.9,
    "optim.b2": 0.99,
    "optim.schedule": "cosine",
    "loop.checkpoint_every_steps": 1000,
    "loop.evaluate_every_steps": 1000,
}

# Tokenizers of 64x64 images for two CPU cores. The last part of a run sharpens, as in the demo.
SMALL = {
    "model.image_size": 64,
    "model.width": 16,
    "model.width_multipliers": (1, 2, 4, 4),
    "model.num_res_blocks": 1,
    "model.norm_groups": 4,
    "model.attention_resolutions": (),
    "model.z_channels": 64,
    "model.code_dim": 64,
    "model.codebook_size": 1024,
    "model.use_remat": False,
    "data.batch_size": 16,
    "optim.learning_rate": 1.5e-3,
    "optim.b1": 0.9,
    "optim.b2": 0.99,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 100,
    "loss.perceptual_weight": 0.02,
    "loss.adversarial_weight": 0.2,
    "loss.adversarial_warmup_steps": 100,
    "discriminator.width": 32,
    "discriminator_optim.learning_rate": 5e-4,
    "discriminator_optim.b1": 0.5,
    "loop.log_every_steps": 50,
    "loop.checkpoint_every_steps": 300,
    "loop.ema_decay": 0.995,
}

PRESETS: dict[str, common.Overrides] = {
    # The bundled images: one for a laptop, one for an accelerator.
    "demo": {
        **EMOJI,
        "model.image_size": 32,
        "model.width": 16,
        "model.width_multipliers": (1, 2, 2),
        "model.num_res_blocks": 1,
        "model.norm_groups": 4,
        "model.attention_resolutions": (),
        "model.z_channels": 32,
        "model.code_dim": 32,
        "model.codebook_size": 512,
        "model.use_remat": False,
        "data.batch_size": 32,
        "optim.learning_rate": 2e-3,
        "optim.warmup_steps": 100,
        # The last part of the run sharpens: VGG16 costs more than the tokenizer, and the demo has a quarter of an hour.
        "loss.perceptual_weight": 0.02,
        "loss.perceptual_start_steps": 800,
        "loss.adversarial_weight": 0.2,
        "loss.adversarial_start_steps": 800,
        "loss.adversarial_warmup_steps": 100,
        "discriminator.width": 32,
        "discriminator_optim.learning_rate": 5e-4,
        "discriminator_optim.b1": 0.5,
        "loop.total_steps": 1100,
        "loop.log_every_steps": 50,
        "loop.evaluate_every_steps": 400,
        "loop.checkpoint_every_steps": 200,
        "loop.ema_decay": 0.99,
    },
    # The tokenizer that ships in checkpoints/emoji.
    "emoji": {
        **EMOJI,
        **SMALL,
        "loss.perceptual_start_steps": 3000,
        "loss.adversarial_start_steps": 3000,
        "loop.total_steps": 3600,
        "loop.evaluate_every_steps": 600,
    },
    # Together with rqtransformer.py:avatars_text about three times the demo.
    "avatars": {
        **common.AVATARS,
        **SMALL,
        "loss.perceptual_start_steps": 1800,
        "loss.adversarial_start_steps": 1800,
        "loop.total_steps": 2000,
        "loop.evaluate_every_steps": 1000,
    },
    "emoji64": {
        **EMOJI,
        "model.image_size": 64,
        "model.width": 64,
        "model.width_multipliers": (1, 2, 2, 4),
        "model.z_channels": 64,
        "model.code_dim": 64,
        "model.codebook_size": 2048,
        "model.use_remat": False,
        "data.batch_size": 64,
        "optim.learning_rate": 4e-4,
        "optim.warmup_steps": 500,
        "loop.total_steps": 20_000,
    },
    # Released configs, and where the paper says otherwise.
    "imagenet256": IMAGENET,
    "imagenet256_50epochs": {**IMAGENET, "optim.warmup_epochs": 2.5, "loop.total_epochs": 50},  # again 5 %
    "ffhq256": FFHQ,
    "ffhq256_paper": {**FFHQ, "loop.total_epochs": 100},  # main text; appendix and release: 150
    "lsun_cat256": {**common.LSUN_CAT, **FINETUNE},
    "lsun_bedroom256": {**common.LSUN_BEDROOM, **FINETUNE},
    "lsun_church256": {**common.LSUN_CHURCH, **FINETUNE},
    "lsun_cat256_paper": {**common.LSUN_CAT, **PAPER_FINETUNE},
    "lsun_bedroom256_paper": {**common.LSUN_BEDROOM, **PAPER_FINETUNE},
    "lsun_church256_paper": {**common.LSUN_CHURCH, **PAPER_FINETUNE},
    # The paper's ablation of code depth and of the codebook.
    "imagenet256_8x8x1": {**IMAGENET, "model.code_shape": (8, 8, 1)},
    "imagenet256_8x8x2": {**IMAGENET, "model.code_shape": (8, 8, 2)},
    "imagenet256_8x8x8": {**IMAGENET, "model.code_shape": (8, 8, 8)},
    "imagenet256_8x8x16": {**IMAGENET, "model.code_shape": (8, 8, 16)},
    "imagenet256_k4096": {**IMAGENET, "model.codebook_size": 4096},
    "imagenet256_4xk4096": {**IMAGENET, "model.codebook_size": 4096, "model.use_shared_codebook": False},
    # Tokenizers of the speed comparison; with depth 1 they have VQGAN's shape.
    "imagenet256_f16": {**IMAGENET, **F16},
    "imagenet256_f8": {**IMAGENET, **F8},
    "imagenet256_f16_vq1024": {
        **IMAGENET,
        **F16,
        "model.code_shape": (16, 16, 1),
        "model.codebook_size": 1024,
    },
    "imagenet256_f16_vq16384": {**IMAGENET, **F16, "model.code_shape": (16, 16, 1)},
}


def base() -> ConfigDict:
    """The released ImageNet tokenizer without its data set and durations (paper, section 4).

    Returns:
        An unlocked config.
    """
    model = {
        "name": "rqvae",
        "image_size": common.one_or_many(256),  # or (height, width)
        "in_channels": 3,
        "width": 128,
        "width_multipliers": (1, 1, 2, 2, 4, 4),
        "num_res_blocks": 2,
        "attention_resolutions": (8,),
        "z_channels": 256,
        "use_double_z": False,
        "use_resample_conv": True,
        "dropout": 0.0,
        "norm_groups": 32,
        "code_dim": 256,
        "code_shape": (8, 8, 4),
        "codebook_size": common.one_or_many(16384),  # or one for each depth
        "use_shared_codebook": True,
        "codebook_decay": common.one_or_many(0.99),  # or one for each depth
        "use_restart": True,
        "codebook_update": "sequential",
        "use_kmeans_init": False,
        "use_remat": True,
        "dtype": "float32",
    }
    return common.tokenizer_base(model)


def quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink a tokenizer to 16x16 images, 8x8 codes; depth, attention and kind of codebook stay.

    Args:
        config: a finished config of this file.

    Returns:
        Overrides.
    """
    height, _, depth = config.model.code_shape
    return {
        **common.tokenizer_quicktest(config),
        "model.width_multipliers": (1, 1),
        # Attention keeps its level, counted from the code grid.
        "model.attention_resolutions": tuple(8 * r // height for r in config.model.attention_resolutions),
        "model.code_shape": (8, 8, depth),
    }


get_config = common.getter(base, PRESETS, quicktest)

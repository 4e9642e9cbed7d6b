"""Shared parts of the config files: common sections, data sets, and the way from a preset to a config.

A preset is a flat dictionary of dotted keys: the few in which it differs from the base() of its file.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

Overrides = Mapping[str, Any]

TWEMOJI = {"data.name": "twemoji", "data.num_threads": 2}
# Mirrored, some captions would be wrong.
AVATARS = {"data.name": "avatars", "data.num_threads": 2, "data.max_validation_images": 1000}
IMAGENET = {
    "data.name": "imagenet2012",
    "data.train_transform": "resize_random_crop",
    "data.flip_probability": 0.5,
}
FFHQ = {"data.name": "folder", "data.train_transform": "random_resized_crop", "data.flip_probability": 0.5}
# As kakaobrain/rq-vae-transformer: no augmentation, and validation on training images (here on some of them).
LSUN = {"data.validation_split": "train[:10000]"}
LSUN_CAT = {**LSUN, "data.name": "lsun/cat"}
LSUN_BEDROOM = {**LSUN, "data.name": "lsun/bedroom"}
LSUN_CHURCH = {**LSUN, "data.name": "lsun/church_outdoor"}
CC3M = {"data.name": "cc3m", "data.train_transform": "jittered_crop", "data.eval_transform": "squash"}


def one_or_many(value: Any) -> FieldReference:
    """A setting that is one number or several; what reads it checks its type."""
    return FieldReference(value, field_type=object)


def base() -> ConfigDict:
    """The sections that both stages have. Each is the keyword list of one constructor.

    Returns:
        An unlocked config. None means "not set"; a preset sets each duration in steps or in epochs.
    """
    return ConfigDict(
        {
            "seed": 0,
            "init_from": placeholder(str),  # a run or model directory whose weights are the start
            "keep_optimizer": False,  # with init_from: go on with its optimizers' moments too
            "data": {
                "name": "folder",
                "data_dir": placeholder(str),
                "train_split": "train",
                "validation_split": "validation",
                "batch_size": 128,  # images of one optimizer step, over all devices
                "validation_batch_size": placeholder(int),  # of one forward pass, over all devices
                "max_validation_images": placeholder(int),  # spread over the split
                "train_transform": "resize_center_crop",
                "eval_transform": "resize_center_crop",
                "flip_probability": 0.0,
                "label_key": placeholder(str),
                "text_key": placeholder(str),
                "text_tokenizer": placeholder(str),
                "text_length": placeholder(int),
                "text_dropout": 0.0,
                "max_damaged": 100,  # images to pass over before the run stops
                "num_threads": 16,
                "num_workers": 0,
            },
            "optim": {
                "name": "adam",
                "learning_rate": 4e-5,
                "b1": 0.5,
                "b2": 0.9,  # of Adam
                "mu_dtype": placeholder(str),  # of the first moments
                "weight_decay": 0.0,
                "schedule": "constant",
                "warmup_steps": placeholder(int),
                "warmup_epochs": placeholder(float),
                "hold_steps": 0,
                "hold_epochs": placeholder(float),
                "initial_learning_rate": 0.0,
                "final_learning_rate": 0.0,
                "clip_norm": placeholder(float),
                "accumulation_steps": 1,
                "use_sharded_gradients": False,  # of micro-batches, along fsdp
            },
            "loop": {
                "total_steps": placeholder(int),
                "total_epochs": placeholder(float),
                "log_every_steps": 100,
                "evaluate_every_steps": 5000,
                "checkpoint_every_steps": 5000,
                "keep_checkpoints": 3,
                "keep_every_steps": 0,
                "keep_best": False,
                "ema_decay": 0.0,
                "max_skipped_steps": 20,
                "hang_timeout_seconds": 0.0,
                "profile_first_step": 10,
                "profile_steps": 0,
                "time_budget_seconds": placeholder(float),  # fewer steps are taken where all last longer
            },
            # Devices along each axis; -1: what the others leave. dcn: slices that data goes over.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "dcn": 1},
        }
    )


def tokenizer_base(model: dict[str, Any]) -> ConfigDict:
    """The sections that all tokenizers have, with the losses of the released RQ-VAEs.

    Args:
        model: the section `model`.

    Returns:
        An unlocked config.
    """
    config = base()
    config.model = model
    # As released: discriminator and perceptual term from the first step, one optimizer setting for both networks.
    config.discriminator = {"width": 64, "num_layers": 2, "use_actnorm": False, "dtype": "float32"}
    # What differs from `optim`.
    config.discriminator_optim = {
        "learning_rate": placeholder(float),
        "b1": placeholder(float),
        "b2": placeholder(float),
    }
    config.loss = {
        "reconstruction": "mse",
        "commitment_weight": 0.25,
        "perceptual_weight": 1.0,
        "perceptual_start_steps": 0,
        "perceptual_start_epochs": placeholder(float),
        "adversarial_weight": 0.75,
        "discriminator_loss": "hinge",
        "generator_loss": "vanilla",
        "max_adaptive_weight": 1e4,
        "adversarial_start_steps": 0,
        "adversarial_start_epochs": placeholder(float),
        "adversarial_warmup_steps": 0,
        "adversarial_warmup_epochs": placeholder(float),
    }
    # Files of the perceptual term: torchvision's VGG16 and LPIPS heads; unset: what the installed packages hold.
    config.perceptual = {"vgg": placeholder(str), "heads": placeholder(str)}
    config.evaluation = {"use_perceptual": True, "best_by": "auto"}
    config.data.image_size = config.model.get_ref("image_size")  # one value: setting either sets both
    return config


def transformer_base(model: dict[str, Any]) -> ConfigDict:
    """The sections that all transformers have, but for their losses.

    Args:
        model: the section `model`.

    Returns:
        An unlocked config.
    """
    config = base()
    config.model = model
    config.optim.update(
        name="adamw",
        learning_rate=5e-4,
        b1=0.9,
        b2=0.95,
        schedule="cosine",
        warmup_steps=0,
    )
    config.loop.early_stopping_evaluations = 0
    config.loop.use_latent_cache = False
    # The first three are one value, or one for each depth.
    config.sample = {
        "temperature": one_or_many(1.0),
        "top_k": placeholder(int),
        "top_p": placeholder(float),
        "guidance": placeholder(float),  # of models with use_null_cond
    }
    config.tokenizer = placeholder(str)
    config.tokenizer_preset = placeholder(str)
    return config


def getter(
    base: Callable[[], ConfigDict], presets: Mapping[str, Overrides], quicktest: Callable[[ConfigDict], Overrides]
) -> Callable[..., ConfigDict]:
    """The function `get_config` of a config file.

    Args:
        base: the config that presets change; a new one each time.
        presets: name -> overrides.
        quicktest: what shrinks a finished config to a run of four small steps.
    """

    def get_config(preset: str = "demo") -> ConfigDict:
        """The config of a preset.

        Args:
            preset: a name of `presets`, optionally followed by ",quicktest"; "quicktest" alone shrinks "demo".

        Returns:
            The locked config.

        Raises:
            ValueError: no preset has that name.
            KeyError: a preset names a key that the base does not have.
        """
        name, *variants = ("demo,quicktest" if preset == "quicktest" else preset).split(",")
        if name not in presets:
            near = "".join(f"did you mean {match}? " for match in get_close_matches(name, presets, 1))
            raise ValueError(f"preset {name!r} is unknown; {near}allowed are {', '.join(presets)}")
        if variants not in ([], ["quicktest"]):
            raise ValueError(
                f"preset {preset!r} is unknown; after {name} only ',quicktest' is allowed, which shrinks it"
            )
        config = base()
        config.lock()
        config.update_from_flattened_dict(presets[name])
        if variants:
            config.update_from_flattened_dict(quicktest(config))
        return config

    return get_config


def quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink the shared sections: the bundled images, small batches, four steps.

    Args:
        config: a finished config of either stage.

    Returns:
        Overrides that keep what the preset trains on: nothing but images, classes or text.
    """
    return {
        **TWEMOJI,
        "data.train_split": "train",
        "data.validation_split": "validation",
        "data.batch_size": 8,
        "data.label_key": None if config.data.label_key is None else "category",
        "data.text_key": None if config.data.text_key is None else "caption",
        "data.text_length": None if config.data.text_length is None else 8,
        "optim.accumulation_steps": min(config.optim.accumulation_steps, 2),
        "optim.warmup_steps": 1,
        "optim.warmup_epochs": None,
        "optim.hold_steps": 0,
        "optim.hold_epochs": None,
        "loop.total_steps": 4,
        "loop.total_epochs": None,
        "loop.log_every_steps": 1,
        "loop.evaluate_every_steps": 2,
        "loop.checkpoint_every_steps": 2,
        "loop.keep_every_steps": 0,
    }


def transformer_quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink a transformer, but for its layers; its condition stays.

    Args:
        config: a finished config of stage 2.

    Returns:
        Overrides. The paired tokenizer is the shrunk one.
    """
    overrides = {
        **quicktest(config),
        "model.model_dim": 32,
        "model.num_heads": 2,
        "tokenizer_preset": f"{config.tokenizer_preset},quicktest",
    }
    if config.data.label_key is not None:
        overrides["model.cond_vocab_size"] = 9
    if config.data.text_key is not None:
        overrides |= {"model.cond_vocab_size": 512, "model.cond_length": 8}
    return overrides


def tokenizer_quicktest(config: ConfigDict) -> dict[str, Any]:
    """Overrides that shrink a tokenizer to 16x16 images, but for its levels and its code grid.

    Args:
        config: a finished config of stage 1.

    Returns:
        Overrides.
    """
    return {
        **quicktest(config),
        # The perceptual term and the adversary, where there are any, join in the middle of the run.
        "loss.perceptual_start_steps": 1,
        "loss.perceptual_start_epochs": None,
        "loss.adversarial_start_steps": 2,
        "loss.adversarial_start_epochs": None,
        "loss.adversarial_warmup_steps": 1,
        "loss.adversarial_warmup_epochs": None,
        "discriminator.width": 8,
        "discriminator.num_layers": min(config.discriminator.num_layers, 2),  # the most that 16 pixels have room for
        "model.image_size": 16,
        "model.width": 32,
        "model.num_res_blocks": 1,
        "model.z_channels": 16,
        "model.code_dim": 16,
        "model.codebook_size": 32,
    }

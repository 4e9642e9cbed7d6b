"""The presets: they build, their models have the published sizes, and quicktest shrinks every one."""

import functools
import json
import math
import os
import re
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from configs import common, dqtransformer, dqvae, rqtransformer, rqvae
from rq_jax import models
from rq_jax.recipes.thresholds import with_stand_ins

FILES = {"rqvae": rqvae, "dqvae": dqvae, "rqtransformer": rqtransformer, "dqtransformer": dqtransformer}
TOKENIZERS = "rqvae", "dqvae"
TOKENIZER_OF = {"rqtransformer": rqvae, "dqtransformer": dqvae}
PRESETS = [(file, preset) for file, module in FILES.items() for preset in module.PRESETS]
QUICKTESTS = [(file, f"{preset},quicktest") for file, preset in PRESETS]

# Published config -> (file, preset, parameters of the published checkpoint).
RELEASED = {
    "in256-rqvae-8x8x4": ("rqvae", "imagenet256", 104_402_051),
    "ffhq256-rqvae-8x8x4": ("rqvae", "ffhq256", 100_732_035),
    "cat256-rqvae-8x8x4": ("rqvae", "lsun_cat256", 104_402_051),
    "bedroom256-rqvae-8x8x4": ("rqvae", "lsun_bedroom256", 104_402_051),
    "church256-rqvae-8x8x4": ("rqvae", "lsun_church256", 104_402_051),
    "ffhq256-rqtransformer-8x8x4-350M": ("rqtransformer", "ffhq256_350m", 355_393_536),
    "lsun-church256-sqgan-8x8x4-350M-simp": ("rqtransformer", "lsun_church256_350m", 370_087_936),
    "cat256-rqtransformer-8x8x4-600M": ("rqtransformer", "lsun_cat256_600m", 612_061_184),
    "bedroom256-rqtransformer-8x8x4-600M": ("rqtransformer", "lsun_bedroom256_600m", 612_061_184),
    "in256-rqtransformer-8x8x4-480M": ("rqtransformer", "imagenet256_480m", 480_921_088),
    "in256-rqtransformer-8x8x4-800M": ("rqtransformer", "imagenet256_800m", 820_899_328),
    "in256-rqtransformer-8x8x4-1400M": ("rqtransformer", "imagenet256_1400m", 1_387_529_728),
    "in256-rqtransformer-8x8x4-3800M": ("rqtransformer", "imagenet256_3800m", 3_822_488_064),
    "cc3m-rqtransformer-8x8x4-650M": ("rqtransformer", "cc3m_650m", 654_061_568),
}

# Parameters of every other preset. Codebooks are counted as published: with a padding row each.
COUNTS = {
    "rqvae": {
        "demo": 275_763,
        "emoji": 1_118_803,
        "avatars": 1_118_803,
        "emoji64": 17_358_147,
        "imagenet256_50epochs": 104_402_051,
        "ffhq256_paper": 100_732_035,
        "lsun_cat256_paper": 104_402_051,
        "lsun_bedroom256_paper": 104_402_051,
        "lsun_church256_paper": 104_402_051,
        "imagenet256_8x8x1": 104_402_051,
        "imagenet256_8x8x2": 104_402_051,
        "imagenet256_8x8x8": 104_402_051,
        "imagenet256_8x8x16": 104_402_051,
        "imagenet256_k4096": 101_256_323,
        "imagenet256_4xk4096": 104_402_819,
        "imagenet256_f16": 76_074_115,
        "imagenet256_f8": 74_300_547,
        "imagenet256_f16_vq1024": 72_141_955,
        "imagenet256_f16_vq16384": 76_074_115,
    },
    "dqvae": {
        "demo": 355_091,
        "demo_d2": 355_091,
        "imagenet256": 47_833_731,  # as published: 47,571,331 and a codebook with a padding row
        "imagenet256_feature": 48_098_437,
        "imagenet256_triple": 74_010_502,
        "imagenet256_triple_entropy": 73_416_067,
        "ffhq256": 47_833_731,
    },
    "rqtransformer": {
        "demo": 1_484_288,
        "emoji": 4_704_256,
        "avatars_text": 4_000_320,
        "emoji64": 29_295_488,
        "ffhq256_350m_paper": 355_393_536,
        "lsun_church256_350m_paper": 370_087_936,
        "lsun_cat256_600m_paper": 612_061_184,
        "lsun_bedroom256_600m_paper": 612_061_184,
        "imagenet256_1400m_50epochs": 1_387_529_728,
        "imagenet256_3800m_paper": 3_822_488_064,
        "cc3m_650m_paper": 614_706_688,
        "t2i_3900m": 3_903_915_008,
        "throughput_huge": 1_387_529_728,
        "throughput_large": 820_899_328,
        "throughput_medium": 371_110_912,
        "throughput_small": 97_483_264,
        "throughput_vqgan_large": 802_618_112,
        "throughput_vqgan_huge": 1_387_820_032,
    },
    "dqtransformer": {
        "demo": 1_413_888,
        "demo_d2": 1_682_304,
        "uncond_imagenet_p6c18": 308_884_480,
        "class_imagenet_p6c18": 313_999_360,
        "class_imagenet_p6c18_guided": 314_004_480,
        "class_imagenet_p12c36": 616_308_736,
        "ffhq_p6c18": 308_884_480,
        "class_imagenet_triple_p6c18": 315_091_968,
        "cc3m_p6c18": 342_490_112,
        "throughput_small": 55_760_896,
    },
}
for _file, _preset, _count in RELEASED.values():
    COUNTS[_file][_preset] = _count

SHARED_KEYS = {
    "data": "name data_dir train_split validation_split batch_size validation_batch_size max_validation_images"
    " train_transform eval_transform"
    " flip_probability label_key text_key text_tokenizer text_length text_dropout max_damaged num_threads num_workers",
    "optim": "name learning_rate b1 b2 mu_dtype weight_decay clip_norm accumulation_steps use_sharded_gradients"
    " schedule warmup_steps warmup_epochs hold_steps hold_epochs initial_learning_rate final_learning_rate",
    "loop": "total_steps total_epochs log_every_steps evaluate_every_steps checkpoint_every_steps"
    " keep_checkpoints keep_every_steps keep_best ema_decay"
    " max_skipped_steps hang_timeout_seconds profile_first_step profile_steps time_budget_seconds",
    "mesh": "data fsdp tensor dcn",
}
TOKENIZER_KEYS = {
    **SHARED_KEYS,
    "data": SHARED_KEYS["data"] + " image_size",
    "discriminator": "width num_layers use_actnorm dtype",
    "discriminator_optim": "learning_rate b1 b2",
    "loss": "reconstruction commitment_weight perceptual_weight perceptual_start_steps"
    " perceptual_start_epochs adversarial_weight discriminator_loss generator_loss"
    " max_adaptive_weight adversarial_start_steps adversarial_start_epochs adversarial_warmup_steps"
    " adversarial_warmup_epochs",
    "perceptual": "vgg heads",
    "evaluation": "use_perceptual best_by",
}
KEYS = {
    "rqvae": {
        **TOKENIZER_KEYS,
        "model": "name image_size in_channels width width_multipliers num_res_blocks attention_resolutions"
        " z_channels use_double_z use_resample_conv dropout norm_groups code_dim code_shape codebook_size"
        " use_shared_codebook codebook_decay use_restart codebook_update use_kmeans_init use_remat dtype",
    },
    "dqvae": {
        **TOKENIZER_KEYS,
        "loss": TOKENIZER_KEYS["loss"] + " budget_weight",
        "model": "name image_size in_channels num_grains code_depth router fine_ratio thresholds entropy_bins gate_layers"
        " gate_activation use_gate_norm width width_multipliers num_res_blocks attention_resolutions decoder_width"
        " decoder_width_multipliers decoder_num_res_blocks decoder_attention_resolutions position_bias z_channels"
        " use_double_z use_resample_conv dropout norm_groups code_dim codebook_size codebook_init use_shared_codebook"
        " codebook_decay use_code_weights use_restart codebook_update use_kmeans_init use_remat dtype",
    },
    "rqtransformer": {
        **SHARED_KEYS,
        "loop": SHARED_KEYS["loop"] + " early_stopping_evaluations use_latent_cache",
        "model": "name codebook_size code_shape code_dim model_dim num_heads depth_num_heads spatial_layers depth_layers"
        " cond_vocab_size cond_length use_tokenizer_input use_tokenizer_depth_input use_cumulative_depth"
        " use_shared_token_embedding use_shared_classifier use_attention_bias use_mlp_bias gelu"
        " embedding_dropout attention_dropout residual_dropout use_null_cond"
        " use_flash_attention use_remat dtype",
        "loss": "use_soft_labels use_stochastic_codes temperature image_weight text_weight cond_dropout",
        "sample": "temperature top_k top_p guidance",
    },
    "dqtransformer": {
        **SHARED_KEYS,
        "loop": SHARED_KEYS["loop"] + " early_stopping_evaluations use_latent_cache buckets bucket_window",
        "model": "name codebook_size code_shape code_dim num_grains order model_dim num_heads depth_num_heads"
        " position_layers content_layers depth_layers num_slots cond_vocab_size cond_length use_grain_embedding"
        " use_shared_position_embedding embedding_dropout attention_dropout residual_dropout use_null_cond"
        " use_flash_attention use_remat dtype",
        "loss": "content_weight position_weight text_weight cond_dropout",
        "sample": "temperature top_k top_p guidance position_temperature position_top_k position_top_p",
    },
}
TRANSFORMS = {
    "resize_center_crop",
    "resize_random_crop",
    "random_resized_crop",
    "random_shift",
    "jittered_crop",
    "squash",
}
SINGLE_KEYS = {
    "rqvae": {"seed", "init_from", "keep_optimizer"},
    "dqvae": {"seed", "init_from", "keep_optimizer", "thresholds"},
    "rqtransformer": {"seed", "init_from", "keep_optimizer", "tokenizer", "tokenizer_preset"},
    "dqtransformer": {"seed", "init_from", "keep_optimizer", "tokenizer", "tokenizer_preset"},
}


def get(file, preset):
    return FILES[file].get_config(preset)


def flatten(config):
    flat = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if hasattr(value, "items") else {name: value}
    return flat


def model_options(file, preset):
    """The keyword list of models.create, with what stage 2 takes from its tokenizer filled in."""
    config = get(file, preset)
    options = dict(config.model)
    if file in TOKENIZER_OF:
        frozen = file.replace("transformer", "vae")
        tokenizer = models.create(**model_options(frozen, config.tokenizer_preset))
        decided = ("codebook_size", "code_shape", "code_dim", *["num_grains"] * (frozen == "dqvae"))
        options |= {key: getattr(tokenizer, key) for key in decided}
    return with_stand_ins(options)


@functools.cache
def count_parameters(**options):
    variables = models.abstract_variables(models.create(**options))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    if options["name"] in TOKENIZERS:
        *books, num_codes, code_dim = variables["codebook"]["codebook_KE"].shape
        count += math.prod(books) * (num_codes + 1) * code_dim
    return count


@pytest.mark.parametrize(("file", "preset"), PRESETS)
def test_parameter_count_is_pinned(file, preset):
    assert count_parameters(**model_options(file, preset)) == COUNTS[file][preset]


@pytest.mark.parametrize(("file", "preset"), QUICKTESTS)
def test_quicktest_is_small(file, preset):
    limit = 400_000 if file == "dqvae" else 300_000  # a level and a tail for each grain
    assert 0 < count_parameters(**model_options(file, preset)) < limit
    config = get(file, preset)
    assert config.data.name == "twemoji" and config.data.batch_size == 8
    assert config.loop.total_steps == 4 and config.loop.evaluate_every_steps == 2


def test_every_preset_is_pinned_and_no_released_config_is_missing():
    for file, module in FILES.items():
        assert COUNTS[file].keys() == module.PRESETS.keys()


@pytest.mark.skipif("RQ_JAX_GOLDENS" not in os.environ, reason="needs the published shapes")
def test_released_presets_are_those_published():
    shapes = json.loads((Path(os.environ["RQ_JAX_GOLDENS"]) / "released-shapes.json").read_text())
    published = {name: entry for name, entry in shapes.items() if "n_parameters" in entry}
    assert published.keys() == RELEASED.keys()
    for name, (file, preset, count) in RELEASED.items():
        assert published[name]["n_parameters"] == count
        ours, theirs = model_options(file, preset), published[name]["config"]
        # What the number of parameters does not show.
        if file == "rqvae":
            assert ours["attention_resolutions"] == tuple(theirs["ddconfig"]["attn_resolutions"])
            assert ours["code_shape"] == tuple(theirs["hparams"]["code_shape"])
            assert ours["codebook_decay"] == theirs["hparams"]["decay"]
        else:
            assert ours["code_shape"] == tuple(theirs["block_size"])
            assert ours["num_heads"] == theirs["body"]["block"]["n_head"] == theirs["head"]["block"]["n_head"]
            assert (ours["spatial_layers"], ours["depth_layers"]) == (
                theirs["body"]["n_layer"],
                theirs["head"]["n_layer"],
            )


@pytest.mark.parametrize(("file", "preset"), PRESETS + QUICKTESTS)
def test_preset_has_exactly_the_documented_keys(file, preset):
    config = get(file, preset)
    assert config.is_locked
    assert set(config) == KEYS[file].keys() | SINGLE_KEYS[file]
    for section, keys in KEYS[file].items():
        assert set(config[section]) == set(keys.split()), section


@pytest.mark.parametrize(("file", "preset"), PRESETS + QUICKTESTS)
def test_preset_is_consistent(file, preset):
    config = get(file, preset)
    assert {config.data.train_transform, config.data.eval_transform} <= TRANSFORMS
    assert (config.loop.total_steps is None) != (config.loop.total_epochs is None)
    assert (config.optim.warmup_steps is None) != (config.optim.warmup_epochs is None)
    assert config.data.batch_size % config.optim.accumulation_steps == 0
    if file in TOKENIZERS:
        assert config.data.image_size == config.model.image_size
    if file == "rqvae":
        height, width, _ = config.model.code_shape
        assert height == width == config.model.image_size >> (len(config.model.width_multipliers) - 1)
    elif file == "dqvae":
        assert bool(config.loss.budget_weight) == (config.model.router == "feature")
    else:
        assert config.model.model_dim % config.model.num_heads == 0
        assert config.data.label_key is None or config.data.text_key is None
        is_text = config.data.text_key is not None
        assert is_text == (config.model.cond_length > 1) == (config.loss.text_weight > 0)
        assert not is_text or config.data.text_length == config.model.cond_length
        assert (config.model.cond_vocab_size > 1) == (is_text or config.data.label_key is not None)


@pytest.mark.parametrize("preset", rqvae.PRESETS)
def test_quicktest_keeps_the_kind_of_tokenizer(preset):
    full, small = rqvae.get_config(preset).model, rqvae.get_config(f"{preset},quicktest").model
    assert small.code_shape[2] == full.code_shape[2]
    assert small.use_shared_codebook == full.use_shared_codebook
    levels = [[r // config.code_shape[0] for r in config.attention_resolutions] for config in (full, small)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("preset", dqvae.PRESETS)
def test_quicktest_keeps_the_grains_of_a_tokenizer(preset):
    full, small = (dqvae.get_config(name).model for name in (preset, f"{preset},quicktest"))
    for name in ("num_grains", "code_depth", "router", "fine_ratio", "position_bias", "use_code_weights"):
        assert small[name] == full[name]
    shapes = [models.create(**model_options("dqvae", name)).code_shape for name in (preset, f"{preset},quicktest")]
    assert shapes[1] == (8, 8, shapes[0][2])
    levels = [[r / shape[0] for r in m.attention_resolutions] for m, shape in zip((full, small), shapes, strict=True)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize(("file", "preset"), [p for p in PRESETS if p[0] in TOKENIZER_OF])
def test_quicktest_keeps_the_kind_of_transformer_and_pairs(file, preset):
    full, small = get(file, preset), get(file, f"{preset},quicktest")
    assert (small.data.label_key is None) == (full.data.label_key is None)
    assert (small.data.text_key is None) == (full.data.text_key is None)
    assert (small.model.depth_layers > 0) == (full.model.depth_layers > 0)
    assert small.tokenizer_preset == f"{full.tokenizer_preset},quicktest"


@pytest.mark.parametrize(("file", "preset"), [p for p in PRESETS + QUICKTESTS if p[0] in TOKENIZER_OF])
def test_tokenizer_of_a_transformer_is_a_preset_of_the_same_pictures(file, preset):
    config = get(file, preset)
    tokenizer = TOKENIZER_OF[file].get_config(config.tokenizer_preset)
    if config.data.name == tokenizer.data.name:
        assert config.data.validation_split == tokenizer.data.validation_split
        assert config.data.eval_transform == tokenizer.data.eval_transform or "quicktest" in preset
    else:  # text models use the ImageNet tokenizer unchanged
        assert config.data.text_key is not None and config.tokenizer_preset == "imagenet256"
    assert (config.model.depth_layers == 0) == (_depth(tokenizer.model) == 1)


def _depth(tokenizer) -> int:
    return tokenizer.code_depth if "code_depth" in tokenizer else tokenizer.code_shape[2]


def test_paper_variants_differ_in_what_the_paper_says():
    cases = {
        ("rqvae", "ffhq256"): {"loop.total_epochs": (150, 100)},
        ("rqvae", "lsun_cat256"): {"optim.learning_rate": (4e-5, 4e-6)},
        ("rqvae", "lsun_bedroom256"): {"optim.learning_rate": (4e-5, 4e-6)},
        ("rqvae", "lsun_church256"): {"optim.learning_rate": (4e-5, 4e-6)},
        ("rqtransformer", "ffhq256_350m"): {
            "data.batch_size": (128, 16),
            "loss.temperature": (0.5, 1.0),
            "loop.evaluate_every_steps": (5000, 3750),
            "loop.early_stopping_evaluations": (0, 5),
            "sample.top_k": (250, 2048),
            "sample.top_p": (1.0, 0.95),
            "tokenizer_preset": ("ffhq256", "ffhq256_paper"),
        },
        ("rqtransformer", "lsun_church256_350m"): {
            "data.batch_size": (256, 2048),
            "optim.accumulation_steps": (1, 8),
            "sample.top_k": (250, 1400),
            "tokenizer_preset": ("lsun_church256", "lsun_church256_paper"),
        },
        ("rqtransformer", "lsun_cat256_600m"): {
            "loop.total_epochs": (100, 200),
            "sample.top_k": (250, 512),
            "sample.top_p": (1.0, 0.9),
            "tokenizer_preset": ("lsun_cat256", "lsun_cat256_paper"),
        },
        ("rqtransformer", "lsun_bedroom256_600m"): {
            "loop.total_epochs": (100, 90),
            "sample.top_k": (250, 8192),
            "sample.top_p": (1.0, 0.85),
            "tokenizer_preset": ("lsun_bedroom256", "lsun_bedroom256_paper"),
        },
        ("rqtransformer", "imagenet256_3800m"): {"model.residual_dropout": (0.1, 0.3)},
        ("rqtransformer", "cc3m_650m"): {"model.spatial_layers": (26, 24)},
    }
    named = {(file, preset.removesuffix("_paper")) for file, preset in PRESETS if preset.endswith("_paper")}
    assert named == cases.keys()
    for (file, preset), expected in cases.items():
        released, paper = flatten(get(file, preset)), flatten(get(file, f"{preset}_paper"))
        differences = {key: (released[key], paper[key]) for key in released if released[key] != paper[key]}
        assert differences == expected


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("preset", ["emoji46", "", "demo,quick", "demo,quicktest,quicktest"])
def test_unknown_preset(file, preset):
    presets = FILES[file].PRESETS
    near = "did you mean emoji64? " if preset == "emoji46" and "emoji64" in presets else ""
    message = f"preset '{preset}' is unknown; {near}allowed are {', '.join(presets)}"
    if preset.startswith("demo"):
        message = f"preset '{preset}' is unknown; after demo only ',quicktest' is allowed, which shrinks it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get(file, preset)


@pytest.mark.parametrize("file", FILES)
def test_quicktest_alone_shrinks_the_demo(file):
    small = get(file, "quicktest").to_json()
    assert small == get(file, "demo,quicktest").to_json()
    assert small != get(file, "demo").to_json()


def test_preset_with_an_unknown_key_is_refused():
    with pytest.raises(KeyError, match="widht"):
        common.getter(rqvae.base, {"typo": {"model.widht": 32}}, rqvae.quicktest)("typo")


def from_flags(file, preset, *overrides):
    arguments = ["prog", f"--config={FILES[file].__file__}:{preset}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    return values["config"].value


def test_flags_override_with_the_right_types():
    config = from_flags(
        "rqvae",
        "imagenet256",
        "--config.optim.learning_rate=1",
        "--config.optim.clip_norm=2",
        "--config.loop.total_epochs=3",
        "--config.model.image_size=128",
        "--config.model.code_shape=(4,4,2)",
        "--config.data.data_dir=/somewhere",
    )
    assert (config.optim.learning_rate, type(config.optim.learning_rate)) == (1.0, float)
    assert (config.optim.clip_norm, type(config.optim.clip_norm)) == (2.0, float)
    assert (config.loop.total_epochs, type(config.loop.total_epochs)) == (3.0, float)
    assert config.model.image_size == config.data.image_size == 128
    assert config.model.code_shape == (4, 4, 2)
    assert config.data.data_dir == "/somewhere"


def test_flags_set_the_grains_of_a_tokenizer():
    config = from_flags(
        "dqvae",
        "imagenet256",
        "--config.model.fine_ratio=(0.3,0.2)",
        "--config.model.thresholds=(1.5,2.5)",
        "--config.model.decoder_width_multipliers=(1,2)",
        "--config.loss.budget_weight=3",
        "--config.thresholds=file.json",
    )
    assert config.model.fine_ratio == (0.3, 0.2) and config.model.thresholds == (1.5, 2.5)
    assert (config.model.decoder_width_multipliers, config.loss.budget_weight) == ((1, 2), 3)
    assert config.thresholds == "file.json"


def test_flags_fill_the_placeholders_of_stage_2():
    config = from_flags(
        "rqtransformer",
        "cc3m_650m,quicktest",
        "--config.tokenizer=run",
        "--config.sample.top_k=5",
        "--config.model.codebook_size=7",
        "--config.model.code_shape=(3,5,4)",
        "--config.data.text_tokenizer=bpe.json",
    )
    assert (config.tokenizer, config.sample.top_k, config.data.text_tokenizer) == ("run", 5, "bpe.json")
    assert (config.model.codebook_size, config.model.code_shape) == (7, (3, 5, 4))


@pytest.mark.parametrize("override", ["--config.model.widht=32", "--config.optimizer.learning_rate=1"])
def test_flags_refuse_an_unknown_key(override):
    with pytest.raises((AttributeError, KeyError), match="widht|optimizer"):
        from_flags("rqvae", "demo", override)


@pytest.mark.parametrize(
    "override", ["--config.model.width=wide", "--config.model.width=1.5", "--config.loop.total_epochs=x"]
)
def test_flags_refuse_a_wrong_type(override):
    with pytest.raises(flags.IllegalFlagValueError):
        from_flags("rqvae", "demo", override)

"""Official DQ-VAEs and DQ-Transformers: configs, names and shapes of their tensors, and the way back."""

import json
import logging

import jax
import numpy as np
import official_dq
import pytest

from rq_jax import models
from rq_jax.interop import official

VARIANTS = {
    "dual": {},
    "dual entropy": dict(router="entropy"),
    "triple": dict(grains=3),
    "triple relu": dict(grains=3, gate="2layer-fc-ReLu"),
    "one layer": dict(gate="1layer-fc"),
    "no norm": dict(norm="none"),
    "fourier": dict(position="fourier"),
    "learned": dict(position="learned"),
    "relative": dict(position="learned-relative"),
}
# Collection "params" of the released configs; the original's codebook, 1025 x 256, is a parameter too.
PARAMETERS = {
    "dqvae-entropy-dual-r05_imagenet": 47_571_331,
    "dqvae-dual-r-05_imagenet": 47_836_037,
    "dqvae-triple-r-03-03_imagenet": 73_748_102,
    "uncond_imagenet_p6c18": 308_884_480,
    "class_imagenet_p6c18": 313_999_360,
}
TRANSFORMERS = {
    "class": {},
    "unconditional": dict(classes=1),
    "region": dict(order="region-first"),
    "no segments": dict(segments=0),
    "slots": dict(slots=68),
}


def shapes_of(variables):
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(part.key for part in path): leaf.shape for path, leaf in leaves}


def complete(settings):
    """With the thresholds that a config does not have."""
    return settings | ({"thresholds": (1.5,)} if settings.get("router") == "entropy" else {})


def create(kind, config):
    settings = complete(official.KINDS[kind].settings(config))
    return models.create(kind, **settings), settings


@pytest.fixture(scope="module")
def released(dq_goldens):
    return json.loads((dq_goldens / "released-shapes.json").read_text())


def test_released_configs_are_covered_to_the_last_key_and_parameter(released):
    """Test 14 of the specification's list."""
    assert released.keys() == PARAMETERS.keys()
    for name, entry in released.items():
        config = {"model": entry["model"]}
        kind = official.find_kind(config)
        model, settings = create(kind, config)
        table = official.KINDS[kind].table(settings)
        shapes = {key: tuple(shape) for key, (shape, _) in entry["state_dict"].items()}
        assert table.official_shapes() == {key: shape for key, shape in shapes.items() if key not in table.buffers}
        assert table.buffers == {key for key in shapes if key.endswith("attn.mask")}, name
        used = [key for rule in table.rules for key in rule.keys]
        assert len(used) == len(set(used)), name
        ours = shapes_of(models.abstract_variables(model))
        assert ours == table.shapes(), name
        count = sum(np.prod(shape, dtype=np.int64) for path, shape in ours.items() if path.startswith("params/"))
        assert count == PARAMETERS[name] == entry["parameters"] - (kind == "dqvae") * 1025 * 256, name


@pytest.mark.parametrize("name", ["dqvae-entropy", "dqvae-feature", "dqvae-triple", "dqt-uncond", "dqt-class"])
def test_golden_states_are_read_whole_and_written_again(dq_goldens, name):
    config = json.loads((dq_goldens / f"{name}.config.json").read_text())
    kind = official.find_kind(config)
    model, settings = create(kind, config)
    state = {**np.load(dq_goldens / f"{name}.state.npz")}
    variables = getattr(official, f"{kind}_variables")(state, settings)
    assert shapes_of(variables) == shapes_of(models.abstract_variables(model))
    back = official.official_state(kind, variables, models.settings_of(model))
    for key, tensor in state.items():
        if key == "quantize.codebook.weight":
            np.testing.assert_array_equal(back[key][:-1], tensor[:-1])
            assert not back[key][-1].any() and tensor[-1].any()
        elif not key.endswith("attn.mask"):
            np.testing.assert_array_equal(back[key], tensor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_stage_1(variant, caplog):
    config, state = official_dq.stage1_config(**VARIANTS[variant]), official_dq.stage1_state(**VARIANTS[variant])
    model, settings = create("dqvae", config)
    table = official.dqvae_table(settings)
    unread = {key for key in state if key.startswith("decoder.position_bias.") and "embed" in key}
    assert set(state) == table.names() and unread == set(table.unread)
    with caplog.at_level(logging.WARNING):
        variables = official.dqvae_variables(state, settings)
    assert not caplog.records  # a padding row that is not zero is as it should be here
    assert shapes_of(variables) == shapes_of(models.abstract_variables(model))
    kernel = variables["params"]["encoder"]["grain1_conv_out"]["kernel"]
    name = "median" if settings["num_grains"] == 3 else "fine"
    np.testing.assert_array_equal(kernel[1, 2].T, state[f"encoder.conv_out_{name}.weight"][..., 1, 2])
    back = official.official_state("dqvae", variables, models.settings_of(model))
    assert back.keys() == state.keys()
    for key in set(state) - unread - {"quantize.codebook.weight"}:
        np.testing.assert_array_equal(back[key], state[key])


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_every_variant_of_stage_2(variant):
    kwargs = TRANSFORMERS[variant]
    state = official_dq.stage2_state(**{name: value for name, value in kwargs.items() if name != "order"})
    model, settings = create("dqtransformer", official_dq.stage2_config(**kwargs))
    assert settings["order"] == kwargs.get("order", "row-first").removesuffix("-first")
    variables = official.dqtransformer_variables(state, settings)
    assert shapes_of(variables) == shapes_of(models.abstract_variables(model))
    back = official.official_state("dqtransformer", variables, models.settings_of(model))
    assert back.keys() == {key for key in state if not key.endswith("attn.mask")}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, state[key])


def test_settings_of_stage_1():
    settings = official.dqvae_settings(official_dq.stage1_config(grains=3, gate="2layer-fc-ReLu", position="learned"))
    assert settings == {
        "image_size": 32,
        "in_channels": 3,
        "width": 32,
        "width_multipliers": (1, 1, 1, 2, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "z_channels": 32,
        "use_resample_conv": True,
        "dropout": 0.1,
        "decoder_width": 32,
        "decoder_width_multipliers": (1, 1, 1),
        "decoder_num_res_blocks": 1,
        "decoder_attention_resolutions": (),
        "codebook_size": 11,
        "code_dim": 6,
        "codebook_decay": 0.98,
        "use_restart": True,
        "num_grains": 3,
        "position_bias": "none",
        "router": "feature",
        "fine_ratio": (0.3, 0.3),
        "gate_layers": 2,
        "gate_activation": "relu",
        "use_gate_norm": True,
    }


def test_the_budget_gives_the_ratios():
    for grains, params, ratio in (
        (2, {"target_ratio": 0.7}, 0.7),
        (3, {"target_fine_ratio": 0.2, "target_median_ratio": 0.5}, (0.5, 0.2)),
    ):
        config = official_dq.stage1_config(grains=grains)
        config["model"]["params"]["lossconfig"]["params"]["budget_loss_config"] = {"params": params}
        assert official.dqvae_settings(config)["fine_ratio"] == ratio


def test_percentiles_are_named_as_there():
    assert [official.threshold_key(ratio) for ratio in (0.5, 0.55, 0.3, 0.1)] == ["50", "44", "70", "90"]


@pytest.mark.parametrize(
    "kind, kwargs",
    [("dqvae", kwargs) for kwargs in VARIANTS.values()]
    + [("dqtransformer", kwargs) for kwargs in TRANSFORMERS.values()],
)
def test_official_config_is_the_way_back(kind, kwargs):
    config = (official_dq.stage1_config if kind == "dqvae" else official_dq.stage2_config)(**kwargs)
    model, settings = create(kind, config)
    back = official.official_config(kind, models.settings_of(model))
    assert official.find_kind(back) == kind
    assert create(kind, back)[0] == model


def test_the_config_of_a_transformer_holds_its_tokenizer():
    tokenizer, _ = create("dqvae", official_dq.stage1_config(router="entropy"))
    model, _ = create("dqtransformer", official_dq.stage2_config())
    own = models.settings_of(tokenizer)
    back = official.official_config("dqtransformer", models.settings_of(model), None, own)
    assert complete(official.dqvae_settings(official.first_stage(back))).items() <= own.items()
    with pytest.raises(ValueError, match="codebook_size 11 differs from the tokenizer's 12"):
        official.official_config("dqtransformer", models.settings_of(model), None, own | {"codebook_size": 12})
    assert official.name_thresholds(back, "x.json", own) == {"70": 1.5}
    assert official.thresholds_path(official.first_stage(back)) == "x.json"


# --- refusals -----------------------------------------------------------------------------------------------

ENCODER = ("encoderconfig", "params")
ROUTER = (*ENCODER, "router_config")
MISTAKES = {
    "encoder": (
        (*ENCODER[:1], "target"),
        "x.TripleGrainEncoder",
        r"encoderconfig\.target: 'x\.TripleGrainEncoder' is ano",
    ),
    "quantizer": (("vqconfig", "target"), "x.VectorQuantize", r"vqconfig\.target: .* allowed is VectorQuantize2"),
    "router": (
        (*ROUTER, "target"),
        "x.TripleGrainFeatureRouter",
        r"router_config\.target: .*DualGrainFeatureRouter or",
    ),
    "gate": ((*ROUTER, "params", "gate_type"), "2layer-fc-ReLu", r"gate_type: '2layer-fc-ReLu' cannot be built"),
    "groups": ((*ROUTER, "params", "normalization_type"), "group-16", r"normalization_type: 'group-16' is not supp"),
    "channels": ((*ROUTER, "params", "num_channels"), 64, r"num_channels: 64 must be z_channels, 32"),
    "widths": ((*ENCODER, "ch_mult"), [1, 1, 2, 3], r"ch_mult: 3 is no multiple of the 2 before it"),
    "position": (
        ("decoderconfig", "params", "position_type"),
        "relative",
        r"position_type: 'relative' cannot be built",
    ),
    "grid": (("decoderconfig", "params", "latent_size"), 16, r"latent_size: 16 is not the code grid .* 8$"),
    "decoder": (("decoderconfig", "params", "in_ch"), 16, r"in_ch: 16 does not fit the other parts; they need 32"),
    "dropout": (("decoderconfig", "params", "dropout"), 0.2, r"dropout: 0\.2 must equal the encoder's 0\.1"),
    "before": (("quant_before_dim",), 31, r"model\.params\.quant_before_dim: 31 does not fit"),
    "missing": (("vqconfig", "params", "codebook_size"), None, r"vqconfig\.params\.codebook_size: missing"),
}


def changed(config, path, value):
    node = config["model"]["params"]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return config


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_run_there_is_refused_by_name(mistake):
    path, value, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        official.dqvae_settings(changed(official_dq.stage1_config(), path, value))


@pytest.mark.parametrize("name, value", [("entropy_patch_size", 16), ("image_size", 64)])
def test_entropy_is_that_of_the_regions(name, value):
    with pytest.raises(ValueError, match=rf"^model\.params\.{name}: {value} does not fit the encoder, which needs"):
        official.dqvae_settings(changed(official_dq.stage1_config(router="entropy"), (name,), value))


TRANSFORMER_MISTAKES = {
    "no start of the fine": ({"activate_sos_for_fine_sequence": False}, r"fine_sequence: 'False' is not supported|fine_sequence: False"),
    "pads": ({"transformer_config.params.activate_pad_ignore": False}, r"activate_pad_ignore: "),
    "order": ({"permuter_config.params.fine_position_order": "column"}, r"fine_position_order: 'column' is unknown"),
    "segments": ({"transformer_config.params.segment_size": 3}, r"segment_size: 3 is not supported; allowed are 2, and 0"),
    "grid": ({"permuter_config.params.coarse_hw": 2}, r"fine_hw: 8 must be twice coarse_hw, 2"),
    "provider": ({"class_cond_stage_config.target": "x.ClassForContentOnlyPositionAwareSOSProvider"}, r"is not supported; allowed is ClassAwareSOSProvider"),
    "no provider": ({"class_cond_stage_config": None}, r"class_cond_stage_config: missing, like uncond_stage_config"),
    "numbers": (
        {"transformer_config.params.vocab_size": 19, "permuter_config.params.fine_position_eos_code": 66},
        r"^model\.params: numbers of tokens that do not add up for 11 codes on a grid of \(8, 8\): "
        r"transformer_config\.params\.vocab_size 19 in place of 18, "
        r"permuter_config\.params\.fine_position_eos_code 66 in place of 65$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TRANSFORMER_MISTAKES)
def test_what_stage_2_cannot_run_is_refused_by_name(mistake):
    changes, message = TRANSFORMER_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        official.dqtransformer_settings(official_dq.stage2_config(**changes))


def test_another_tokenizer_is_refused():
    tokenizer, _ = create("dqvae", official_dq.stage1_config(router="entropy"))
    own = models.settings_of(tokenizer)
    assert official.dqtransformer_settings(official_dq.stage2_config(), own)["code_dim"] == official_dq.E
    with pytest.raises(
        ValueError, match=r"codebook_size 11 differs from the tokenizer's 12; give the one of this pair"
    ):
        official.dqtransformer_settings(official_dq.stage2_config(), own | {"codebook_size": 12})


EXPORTS = {
    "grey rectangle": ("dqvae", {"image_size": (32, 64)}, r"image_size: \(32, 64\) cannot be exported"),
    "random": ("dqvae", {"router": "random"}, r"model\.router: 'random' with 2 grains cannot be exported"),
    "depth": ("dqvae", {"code_depth": 2}, r"model\.code_depth: 2 cannot be exported"),
    "relu": ("dqvae", {"gate_activation": "relu"}, r"gate_activation: 'relu' cannot be exported with 2 grains"),
    "widths": (
        "dqvae",
        {"width_multipliers": (1, 1, 2, 1)},
        r"model\.width_multipliers: 1 is no multiple of the 2 before",
    ),
    "groups": ("dqvae", {"norm_groups": 16}, r"model\.norm_groups: 16 cannot be exported"),
    "grains": ("dqtransformer", {"num_grains": 3}, r"model\.num_grains: 3 cannot be exported"),
    "residual": ("dqtransformer", {"code_shape": (8, 8, 2), "depth_layers": 1}, r"cannot be exported"),
    "null": ("dqtransformer", {"use_null_cond": True}, r"model\.use_null_cond: True cannot be exported"),
    "one table": (
        "dqtransformer",
        {"use_shared_position_embedding": True},
        r"use_shared_position_embedding: True cannot",
    ),
    "text": ("dqtransformer", {"cond_length": 4}, r"model\.cond_length: 4 cannot be exported"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_what_the_original_cannot_express_is_refused(case):
    kind, changes, message = EXPORTS[case]
    config = (official_dq.stage1_config if kind == "dqvae" else official_dq.stage2_config)()
    model = create(kind, config)[0].clone(**changes)
    with pytest.raises(ValueError, match=message):
        official.official_config(kind, models.settings_of(model))

"""Published DQ checkpoints through the command that converts them, and back."""

import json
import logging

import helpers
import numpy as np
import official_dq
import pytest
from safetensors.numpy import load_file

import convert_torch
from rq_jax import checkpoint, models
from rq_jax.interop import official

PERCENTILES = {str(percent): percent / 40 for percent in range(1, 100)}


def convert(directory, config, state, *more, out="out"):
    """Run the command on a config and a state; returns the directory that it wrote."""
    (directory / "config.json").write_text(json.dumps(config))
    np.savez(directory / "state.npz", **state)
    argv = [f"--config={directory / 'config.json'}", f"--state={directory / 'state.npz'}", f"--out={directory / out}"]
    convert_torch.run(convert_torch.parse_args([*argv, *more]))
    return directory / out


@pytest.fixture
def thresholds(tmp_path):
    """Beside the config, where its author's path does not lead."""
    (tmp_path / "thresholds.json").write_text(json.dumps(PERCENTILES))
    return tmp_path / "thresholds.json"


def test_a_lightning_checkpoint_of_stage_1(tmp_path, thresholds, capsys):
    state = official_dq.stage1_state(router="entropy")
    config = official_dq.stage1_config(router="entropy")
    out = convert(tmp_path, config, official_dq.lightning(state))
    loaded = checkpoint.load_model(out)
    assert (loaded.model.router, loaded.model.thresholds, loaded.model.entropy_bins) == ("entropy", (70 / 40,), "full")
    helpers.assert_equal(loaded.variables, official.dqvae_variables(state, models.settings_of(loaded.model)))
    assert models.settings_of(checkpoint.load_model(out / "discriminator").model)["width"] == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"dqvae: {len(state)} tensors, ") and lines[1].startswith("discriminator: 14 tensors")
    assert "loss.perceptual_loss.net.slice1.0.weight" in lines[2]
    assert lines[3].startswith("next: python train_transformer.py --config=configs/dqtransformer.py:<preset>")


def test_thresholds_from_elsewhere_and_bins(tmp_path, caplog):
    state, config = official_dq.stage1_state(router="entropy"), official_dq.stage1_config(router="entropy")
    with pytest.raises(
        FileNotFoundError, match=r"^--thresholds: missing, and 'scripts/thresholds\.json', which the conf"
    ):
        convert(tmp_path, config, state)
    old = {**PERCENTILES, "1": 2.947e-37}
    (tmp_path / "old.json").write_text(json.dumps(old))
    with caplog.at_level(logging.WARNING):
        convert(tmp_path, config, state, f"--thresholds={tmp_path / 'old.json'}", out="full")
    assert "bins of before July 2023" in caplog.text and "--entropy_bins=legacy" in caplog.text
    caplog.clear()
    flags = [f"--thresholds={tmp_path / 'old.json'}", "--entropy_bins=legacy"]
    loaded = checkpoint.load_model(convert(tmp_path, config, state, *flags, out="legacy"))
    assert loaded.model.entropy_bins == "legacy" and not caplog.records
    record = {"quantiles": {"0.3": 1.25}, "bins": "legacy", "patch_size": 8, "num_bins": 32, "sigma": 0.01}
    (tmp_path / "ours.json").write_text(json.dumps(record))
    loaded = checkpoint.load_model(
        convert(tmp_path, config, state, f"--thresholds={tmp_path / 'ours.json'}", out="ours")
    )
    assert (loaded.model.thresholds, loaded.model.entropy_bins) == ((1.25,), "legacy")  # as it was measured


@pytest.mark.parametrize(
    "router, content, flags, message",
    [
        ("entropy", {"50": 1.0}, [], r"^--thresholds: '.*' has no number under '70', which is that of the ratio 0\.3$"),
        ("entropy", {"70": "x"}, [], r"has no number under '70'"),
        ("entropy", {"70": 10**400}, [], r"has no number under '70'"),
        ("entropy", {"70": True}, [], r"has no number under '70'"),
        (
            "entropy",
            {"quantiles": {"0.3": 1.0}, "patch_size": 16},
            [],
            r"was measured with patch_size '16', and not with 8",
        ),
        (
            "entropy",
            {"quantiles": {"0.3": 1.0}, "patch_size": 8, "num_bins": 32, "sigma": 0.01, "bins": "legacy"},
            ["--entropy_bins=full"],
            r"was measured with bins 'legacy', and not with full",
        ),
        ("entropy", PERCENTILES, ["--entropy_bins=half"], r"--entropy_bins"),
        ("feature", PERCENTILES, [], r"is for a router by entropy, and this config has a trained one; leave it out$"),
    ],
)
def test_thresholds_refused(tmp_path, router, content, flags, message):
    (tmp_path / "given.json").write_text(json.dumps(content))
    state, config = official_dq.stage1_state(router=router), official_dq.stage1_config(router=router)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, config, state, f"--thresholds={tmp_path / 'given.json'}", *flags)
    assert not (tmp_path / "out").exists()


def test_stage_2_with_its_tokenizer_inside_and_beside(tmp_path, thresholds, capsys):
    stage1, stage2 = official_dq.stage1_state(router="entropy"), official_dq.stage2_state()
    inside = {f"first_stage_model.{name}": tensor for name, tensor in official_dq.lightning(stage1).items()}
    out = convert(tmp_path, official_dq.stage2_config(), stage2 | inside)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dqtransformer: ") and lines[1].startswith("dqvae: ")
    assert "transformer.position_transformer.0.attn.mask" in "".join(lines)
    assert lines[-1].startswith(f"next: python sample.py --checkpoint={out}")
    loaded = checkpoint.load_model(out)
    assert loaded.tokenizer.model.thresholds == (70 / 40,)
    tokenizer = convert(tmp_path, official_dq.stage1_config(router="entropy"), stage1, out="tokenizer")
    helpers.assert_equal(checkpoint.load_model(tokenizer).variables, loaded.tokenizer.variables)
    beside = convert(tmp_path, official_dq.stage2_config(), stage2, f"--tokenizer={tokenizer}", out="beside")
    again = checkpoint.load_model(beside)
    helpers.assert_equal(again.variables, loaded.variables)
    assert again.model == loaded.model and again.tokenizer.model == loaded.tokenizer.model


def test_stage_2_without_a_tokenizer_says_so(tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING):
        convert(tmp_path, official_dq.stage2_config(), official_dq.stage2_state())
    assert "--tokenizer: not given; the directory makes no images" in caplog.text
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: convert it again with --tokenizer")


def test_flags_of_a_router_that_is_not_converted_are_refused(tmp_path, thresholds):
    with pytest.raises(
        ValueError, match="^--thresholds, --entropy_bins: legacy is for the router of a DQ-VAE, and none"
    ):
        convert(tmp_path, official_dq.stage2_config(), official_dq.stage2_state(), "--entropy_bins=legacy")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    settings = dict(image_size=16, code_shape=(4, 4, 1), code_dim=6, codebook_size=11, width=32, z_channels=4)
    settings |= dict(width_multipliers=(1, 1, 1), attention_resolutions=(), num_res_blocks=1)
    model = models.create("rqvae", **settings)
    checkpoint.save_model(tmp_path / "rq", {"model": {"name": "rqvae", **settings}}, helpers.drawn_variables(model))
    with pytest.raises(ValueError, match=r"is a model 'rqvae'; this transformer is over codes of 'dqvae'$"):
        convert(tmp_path, official_dq.stage2_config(), official_dq.stage2_state(), f"--tokenizer={tmp_path / 'rq'}")
    assert not (tmp_path / "out").exists()


def test_export_is_the_way_back(tmp_path, thresholds):
    stage1, stage2 = official_dq.stage1_state(router="entropy"), official_dq.stage2_state(segments=0)
    inside = {f"first_stage_model.{name}": tensor for name, tensor in stage1.items()}
    out = convert(tmp_path, official_dq.stage2_config(segments=0), stage2 | inside)
    loaded = checkpoint.load_model(out)
    for source, state, name in ((out / "tokenizer", stage1, "vae"), (out, stage2, "transformer")):
        file = tmp_path / f"{name}.safetensors"
        convert_torch.run(convert_torch.parse_args([f"--export={source}", f"--out={file}"]))
        tensors, kept = load_file(file), [key for key in state if not key.endswith("attn.mask")]
        assert sorted(tensors) == sorted(kept)
        assert json.loads((tmp_path / f"{name}.thresholds.json").read_text()) == {"70": 70 / 40}
        argv = [f"--config={tmp_path / name}.config.json", f"--state={file}", f"--out={tmp_path / name}"]
        argv += [f"--tokenizer={tmp_path / 'vae'}"] if name == "transformer" else []
        convert_torch.run(convert_torch.parse_args(argv))
    back = checkpoint.load_model(tmp_path / "transformer")
    assert back.model == loaded.model and back.tokenizer.model == loaded.tokenizer.model
    helpers.assert_equal(back.variables, loaded.variables)
    helpers.assert_equal(back.tokenizer.variables, loaded.tokenizer.variables)

"""The command that converts published checkpoints, and back: from files to directories that the other scripts take."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
import state_files
from official_states import (
    DISCRIMINATOR,
    TRANSFORMER,
    VQGAN,
    discriminator_state,
    rqvae_config,
    rqvae_state,
    transformer_state,
    vqgan_state,
)
from safetensors import SafetensorError
from safetensors.numpy import load_file

import convert_torch
import sample
from rq_jax import checkpoint, models
from rq_jax.data.text import train_tokenizer
from rq_jax.interop import export as export_module
from rq_jax.interop import official
from rq_jax.recipes.codes import fill_from_tokenizer
from rq_jax.training.optimizer import make_optimizer
from rq_jax.training.state import create_state

REPOSITORY = Path(__file__).resolve().parents[1]
# Multiples of 32, as the original's norms need; not the code shape of `helpers`.
STAGE1 = {"arch": rqvae_config({"latent_shape": [8, 4, 6], "code_shape": [8, 4, 3]}, {"ch": 32})}
WITH_GAN = STAGE1 | {"gan": {"disc": {"arch": DISCRIMINATOR}}}
STAGE2 = {"arch": TRANSFORMER | {"block_size": [8, 4, 3]}, "sampling": {"temp": 0.8, "top_k": 5, "top_p": 0.9}}
STAGE2_CLASS = {**STAGE2, "arch": STAGE2["arch"] | {"block_size_cond": 1}}


@pytest.fixture(scope="module")
def stage1_state():
    return rqvae_state((7, 7, 7), shared=True, ch=32)


def convert(directory, config, state, *more, out="out"):
    """Run the command on a config and a state, in memory or a file; returns the directory that it wrote."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if isinstance(state, dict):
        state = save(directory / "state.npz", state)
    argv = [f"--config={directory / 'config.json'}", f"--state={state}", f"--out={directory / out}", *more]
    convert_torch.run(convert_torch.parse_args(argv))
    return directory / out


def save(path, state):
    np.savez(path, **state)
    return path


def export(directory, out):
    convert_torch.run(convert_torch.parse_args([f"--export={directory}", f"--out={out}"]))
    return out


def left_over(directory):
    return sorted(path.name for path in directory.rglob("*") if path.name not in ("config.json", "state.npz"))


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, stage1_state):
    """A converted tokenizer."""
    return convert(tmp_path_factory.mktemp("stage1"), STAGE1, stage1_state)


# --- stage 1 ------------------------------------------------------------------------------------------------


def torch_tensors(state, prefix):
    """Tensors as torch.save writes them; the copies of a shared codebook share their storage."""
    kinds = {"float32": "Float", "int64": "Long", "uint8": "Byte"}
    tensors, result = {}, {}
    for i, (name, value) in enumerate(state.items()):
        first = name.replace("codebooks.1", "codebooks.0").replace("codebooks.2", "codebooks.0")
        if first not in tensors:
            tensors[first] = state_files.tensor(value, kinds[value.dtype.name], f"{prefix}{i}")
        result[name] = tensors[first]
    return result


def test_a_whole_stage_1_checkpoint(tmp_path, stage1_state, capsys):
    moments = state_files.tensor(np.zeros((3, 5), np.float32), "Float", "moments")
    whole = {
        "epoch": 10,
        "state_dict": torch_tensors(stage1_state, "model"),
        "discriminator": torch_tensors(discriminator_state(), "disc"),
        "optimizer": {"state": {0: {"exp_avg": moments}}, "param_groups": [{"lr": 4e-5}]},
        "scheduler": {"last_epoch": 3},
    }
    out = convert(tmp_path, WITH_GAN, state_files.write_zip(tmp_path / "model.pt", whole))
    loaded = checkpoint.load_model(out)
    settings = official.rqvae_settings(STAGE1)
    helpers.assert_equal(loaded.variables, official.rqvae_variables(stage1_state, settings))
    assert loaded.model == models.create("rqvae", **settings)
    discriminator = checkpoint.load_model(out / "discriminator")
    settings = official.discriminator_settings(DISCRIMINATOR)
    helpers.assert_equal(discriminator.variables, official.discriminator_variables(discriminator_state(), settings))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.pt", "out"]
    lines = capsys.readouterr().out.splitlines()
    numbers = sum(x.size for x in jax.tree.leaves(loaded.variables["params"]))
    assert lines[0] == (
        f"rqvae: {len(stage1_state)} tensors under 'state_dict', {numbers:,} parameters, codebook {2 * 7 * 6 + 7}; "
        f"fingerprint {checkpoint.fingerprint(loaded.variables)}; written to {out}"
    )
    assert lines[1].startswith("discriminator: 14 tensors under 'discriminator', ") and lines[1].endswith(
        f"written to {out}/discriminator"
    )
    counters = ", ".join(f"'discriminator.main.{i}.num_batches_tracked'" for i in (3, 6))
    assert lines[2] == f"left out: 'epoch', 'optimizer', 'scheduler', {counters}"
    assert lines[3].startswith("next: python train_transformer.py ") and lines[3].endswith(f"tokenizer={out}")


def test_averaged_weights(tmp_path, stage1_state):
    average = {name: np.float32(2) * value for name, value in stage1_state.items()}
    whole = {"state_dict": torch_tensors(stage1_state, "a"), "state_dict_ema": torch_tensors(average, "b")}
    path = state_files.write_zip(tmp_path / "model.pt", whole)
    for flags, expected in (([], stage1_state), (["--ema"], average)):
        out = convert(tmp_path, STAGE1, path, *flags, out=f"out{len(flags)}")
        kernel = checkpoint.load_model(out).variables["params"]["quant_conv"]["kernel"]
        np.testing.assert_array_equal(kernel[0, 0], expected["quant_conv.weight"][:, :, 0, 0].T)


def made(name, *args, **attributes):
    """An object of a class that is not here."""
    return state_files.Call(state_files.Global(name), args, attributes)


def lightning_file(path, state):
    """As Lightning writes it: weights in the middle of objects."""
    weights = {f"model.{name}": value for name, value in torch_tensors(state, "a").items()}
    whole = {
        "state_dict": weights,
        "callbacks": {state_files.Global("lightning ModelCheckpoint"): {"best": made("pathlib PosixPath", "/", "x")}},
        "hyper_parameters": made("lightning AttributeDict", weights),
        "args": made("argparse Namespace", lr=0.1, state=weights),
        "next: \x1b[31m\nforged": made("x\x1b[31m y", 1),
    }
    return state_files.write_zip(path, whole)


def test_objects_beside_the_weights_are_named_and_not_opened(tmp_path, stage1, stage1_state, capsys):
    out = convert(tmp_path, STAGE1, lightning_file(tmp_path / "last.ckpt", stage1_state))
    assert_same_model(out, stage1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"rqvae: {len(stage1_state)} tensors under 'state_dict.model', ")
    assert lines[1:3] == [
        r"left out: 'callbacks', 'hyper_parameters', 'args', 'next: \x1b[31m\nforged'",
        r"not opened: objects of 'argparse.Namespace', 'lightning.AttributeDict', 'lightning.ModelCheckpoint', "
        r"'pathlib.PosixPath', 'x\x1b[31m.y'",
    ]
    assert len(lines) == 4


def test_weights_in_an_object_are_none(tmp_path, stage1_state):
    weights = torch_tensors(stage1_state, "a")
    module = state_files.Call(state_files.Global("my.models RQVAE"), (), weights)
    for value in (module, {"model": module, "epoch": 3}):
        path = state_files.write_zip(tmp_path / "model.pt", value)
        with pytest.raises(
            ValueError, match="holds no tensors by name, but 'my.models.RQVAE'; give a file with the mod"
        ):
            convert(tmp_path, STAGE1, path)


def test_a_report_that_cannot_be_printed_fails_nothing(tmp_path, monkeypatch, caplog):
    """A terminal that knows ASCII only, and a pipe that nobody reads."""
    with open(tmp_path / "ascii.txt", "w", encoding="ascii") as file, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", file)
        convert_torch.tell(["модель", "\ud800"])
    assert (tmp_path / "ascii.txt").read_text() == r"\u043c\u043e\u0434\u0435\u043b\u044c" + "\n" + r"\ud800" + "\n"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        convert_torch.tell(["line"])
    assert "the report could not be printed: [Errno 32] Broken pipe" in caplog.text


def test_weights_that_stand_in_two_places_are_told(tmp_path, stage1_state):
    other = {name: value + np.float32(1) for name, value in stage1_state.items()}
    whole = {"student": torch_tensors(stage1_state, "a"), "teacher": {"net": torch_tensors(other, "b")}}
    path = state_files.write_zip(tmp_path / "model.pt", whole)
    with pytest.raises(ValueError, match="state: weights that fit stand under 'student', 'teacher.net'; choose one by"):
        convert(tmp_path, STAGE1, path)
    with pytest.raises(ValueError, match="--key: no tensors stand below 'x'; the file has 'student', 'teacher'"):
        convert(tmp_path, STAGE1, path, "--key=x")
    del whole["teacher"]["net"]["encoder.conv_in.bias"], whole["student"]
    path = state_files.write_zip(tmp_path / "model.pt", whole)
    with pytest.raises(ValueError, match="^state: 'teacher.net': state dict: does not fit its config: missing encoder"):
        convert(tmp_path, STAGE1, path)


def assert_same_model(directory, other):
    one, two = checkpoint.load_model(directory), checkpoint.load_model(other)
    helpers.assert_equal(one.variables, two.variables)
    assert one.model == two.model


def test_half_precision_becomes_float32(tmp_path, stage1_state):
    half = {name: value.astype(np.float16) for name, value in stage1_state.items()}
    loaded = checkpoint.load_model(convert(tmp_path, STAGE1, half))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.variables)} == {np.dtype(np.float32)}
    kernel = half["quant_conv.weight"].astype(np.float32)
    np.testing.assert_array_equal(loaded.variables["params"]["quant_conv"]["kernel"][0, 0], kernel[:, :, 0, 0].T)


def test_a_discriminator_that_no_config_describes_is_named(tmp_path, stage1_state, capsys):
    whole = {"state_dict": torch_tensors(stage1_state, "a"), "discriminator": torch_tensors(discriminator_state(), "b")}
    out = convert(tmp_path, STAGE1, state_files.write_zip(tmp_path / "model.pt", whole))
    assert "left out: 'discriminator'\n" in capsys.readouterr().out
    assert not (out / "discriminator").exists()


@pytest.mark.parametrize("use_actnorm", [False, True])
def test_a_discriminator_alone(tmp_path, use_actnorm, capsys):
    state = discriminator_state(use_actnorm)
    config = {"gan": {"disc": {"arch": DISCRIMINATOR | {"use_actnorm": use_actnorm}}}}
    loaded = checkpoint.load_model(convert(tmp_path, config, state))
    settings = official.discriminator_settings(config)
    helpers.assert_equal(loaded.variables, official.discriminator_variables(state, settings))
    assert "next: put it beside its tokenizer as <directory>/discriminator" in capsys.readouterr().out
    if use_actnorm:
        assert loaded.variables["batch_stats"]["norm1"]["initialized"].dtype == np.int32


def test_vqgan(tmp_path, capsys):
    whole = {"state_dict": torch_tensors(vqgan_state(), "a"), "pytorch-lightning_version": "1.0.8", "global_step": 7}
    out = convert(tmp_path, VQGAN, state_files.write_zip(tmp_path / "last.ckpt", whole))
    loaded = checkpoint.load_tokenizer(out)
    assert loaded.model.code_shape == (8, 8, 1)
    assert checkpoint.load_model(out / "discriminator").model.num_layers == 2
    printed = capsys.readouterr().out
    losses = "'state_dict.loss.perceptual_loss.* (2 tensors)'"
    assert f"left out: {losses}, 'pytorch-lightning_version', 'global_step', " in printed


# --- stage 2 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage2(tmp_path_factory, stage1):
    """A converted class-conditional transformer."""
    state = transformer_state(STAGE2_CLASS["arch"])
    return convert(tmp_path_factory.mktemp("stage2"), STAGE2_CLASS, state, f"--tokenizer={stage1}")


def test_a_transformer_carries_its_tokenizer(stage1, stage2):
    loaded, tokenizer = checkpoint.load_model(stage2), checkpoint.load_model(stage1)
    settings = official.rqtransformer_settings(STAGE2_CLASS)
    expected = official.rqtransformer_variables(transformer_state(STAGE2_CLASS["arch"]), settings)
    helpers.assert_equal(loaded.variables["params"], expected["params"])
    codebook = {"codebook_KE": tokenizer.variables["codebook"]["codebook_KE"]}
    helpers.assert_equal(loaded.variables["codebook"], codebook)
    helpers.assert_equal(loaded.tokenizer.variables, tokenizer.variables)
    assert loaded.config["sample"] == {"temperature": 0.8, "top_k": 5, "top_p": 0.9}


def test_what_reads_no_code_vectors_has_no_codebook(tmp_path, stage1):
    arch = STAGE2["arch"] | {"input_emb_vqvae": False, "head_emb_vqvae": False, "block_size_cond": 1}
    out = convert(tmp_path, {"arch": arch}, transformer_state(arch), f"--tokenizer={stage1}")
    assert set(checkpoint.load_model(out).variables) == {"params"}


def test_sampling_from_a_converted_pair(tmp_path, stage2):
    argv = [f"--checkpoint={stage2}", f"--out={tmp_path}", "--num_images=3", "--batch_size=3", "--classes=4,2"]
    with helpers.quick_compilation():
        sample.run(sample.parse_args(argv))
    record = json.loads((tmp_path / "settings_000000.json").read_text())
    assert (record["temperature"], record["top_k"], record["top_p"]) == (0.8, 5, 0.9)
    with np.load(tmp_path / "codes_000000.npz") as file:
        assert file["codes"].shape == (3, 8, 4, 3)
    argv += ["--neighbours=2"]
    with helpers.quick_compilation(), pytest.raises(ValueError, match="data.data_dir: unset"):
        sample.run(sample.parse_args(argv))


def test_training_on_a_converted_tokenizer(tmp_path, stage1):
    config = helpers.transformer_config(tmp_path)
    config = fill_from_tokenizer(config, checkpoint.read_tokenizer_config(stage1), has_grains=False)
    sizes = [config["model"][name] for name in ("code_shape", "codebook_size", "code_dim")]
    assert sizes == [(8, 4, 3), 7, 6]
    assert tuple(config["data"]["image_size"]) == (16, 8)
    models.create(**config["model"])


def test_a_text_model_takes_its_text_tokenizer(tmp_path, stage1, capsys):
    state, vocabulary = transformer_state(STAGE2["arch"]), tmp_path / "tokenizer.json"
    out = convert(tmp_path, STAGE2, state, f"--tokenizer={stage1}")
    assert "--prompt='a red house', once it has a text_tokenizer.json (--text_tokenizer=" in capsys.readouterr().out
    train_tokenizer(["a b"], 11, vocabulary)
    flags = [f"--tokenizer={stage1}", f"--text_tokenizer={vocabulary}"]
    out = convert(tmp_path, STAGE2, state, *flags, out="with_text")
    assert capsys.readouterr().out.endswith("--prompt='a red house'\n")
    conds, _ = sample.conditions(
        checkpoint.load_model(out),
        sample.parse_args([f"--checkpoint={out}", "--out=x", "--prompt=b", "--num_images=1"]),
    )
    assert conds.shape == (1, 4)
    train_tokenizer(["a b c d e f g h"], 30, vocabulary)
    with pytest.raises(ValueError, match="has 18 ids, the model 11; give its own"):
        convert(tmp_path, STAGE2, state, *flags, out="other")
    with pytest.raises(ValueError, match="is for models of text, this one takes none; leave it out"):
        convert(tmp_path, STAGE2_CLASS, state, *flags, out="other")


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, flags, message",
    [
        (STAGE2, ["--text_tokenizer=x"], "--text_tokenizer: x needs --tokenizer beside it; give both"),
        (STAGE2, ["--tokenizer=nowhere"], "'nowhere' is no run directory: it has no config.json"),
        (STAGE1, ["--tokenizer=x"], "--tokenizer: x is for stage 2, and this is a config of 'rqvae'"),
        (VQGAN, ["--text_tokenizer=x"], "--text_tokenizer: x is for stage 2, and this is a config of 'vqgan'"),
        (STAGE1, ["--ema"], "state: has no averaged weights, it has 'pos_emb_cond', .*; leave out --ema"),
        (STAGE1, ["--key=a"], "--key: no tensors stand below 'a'; the file has 'pos_emb_cond', "),
        (STAGE1, [], "does not fit its config: unexpected 'pos_emb_cond', .* more; missing encoder.conv_in.weight, "),
        ({"arch": STAGE1["arch"] | {"ddconfig": {"ch": {"a": 1}}}}, [], "arch.ddconfig.in_channels: missing"),
        ({"arch": {"type": "x"}}, [], "arch.type: 'x' is unknown"),
        (
            {"arch": rqvae_config({"n_embed": [7, 8, 9]})},
            [],
            "codebook_size: .* has one entry per depth, but the codebook is shared",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing_behind(tmp_path, config, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        convert(tmp_path, config, transformer_state(STAGE2["arch"]), *flags, out="new/out")
    assert "\n" not in str(error.value)
    assert left_over(tmp_path) == []


def test_a_transformer_without_its_tokenizer_has_an_unknown_codebook(tmp_path, stage2, caplog, capsys):
    convert(tmp_path, STAGE2_CLASS, transformer_state(STAGE2_CLASS["arch"]))
    assert "--tokenizer: not given; the codebook, which is the tokenizer's, is NaN" in caplog.text
    assert "next: convert it again with --tokenizer" in capsys.readouterr().out
    loaded = checkpoint.load_model(tmp_path / "out")
    assert loaded.tokenizer is None and np.isnan(loaded.variables["codebook"]["codebook_KE"]).all()
    with_tokenizer = checkpoint.load_model(stage2)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], with_tokenizer.variables["params"])


def test_a_tokenizer_of_another_pair(tmp_path, stage1):
    config = {"arch": STAGE2["arch"] | {"vocab_size": 8}}
    with pytest.raises(ValueError, match="arch.vocab_size: .* differs from the tokenizer's"):
        convert(tmp_path, config, transformer_state(config["arch"]), f"--tokenizer={stage1}")
    assert left_over(tmp_path) == []


def test_a_transformer_is_no_tokenizer(tmp_path, stage2):
    with pytest.raises(ValueError, match="tokenizer: .* holds a 'rqtransformer', not a stage-1 run"):
        convert(tmp_path, STAGE2, transformer_state(STAGE2["arch"]), f"--tokenizer={stage2}")


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_conversion_that_breaks_off(tmp_path, stage1_state, monkeypatch, error):
    def fail(directory, *_):
        (Path(directory) / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(checkpoint, "save_model", fail)
    with pytest.raises(type(error)):
        convert(tmp_path, STAGE1, stage1_state)
    assert left_over(tmp_path) == []


def test_what_is_there_is_not_overwritten(tmp_path, stage1_state):
    out = tmp_path / "out"
    out.mkdir()
    convert(tmp_path, STAGE1, stage1_state)  # an empty directory is taken
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=f"--out: '{out}' is there already; give the name of a new directory"):
        convert(tmp_path, STAGE1, stage1_state)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="is there already"):
        convert(tmp_path, STAGE1, stage1_state, out="config.json")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out=a"], "--config: missing; give --config and --state of a checkpoint, or --export"),
        (["--out=a", "--config=b"], "--state: missing"),
        (["--out=a", "--export=b", "--state=c"], "--state: c is not for --export; leave it out"),
        (["--out=a", "--export=b", "--ema"], "--ema: True is not for --export"),
        (["--config=b", "--state=c"], "the following arguments are required: --out"),
        (["--out=a", "--unknown=b"], "unrecognized arguments: --unknown=b"),
    ],
)
def test_flags_that_do_not_belong_together(argv, message):
    with pytest.raises(ValueError, match=message):
        convert_torch.parse_args(argv)


# --- the way back -------------------------------------------------------------------------------------------


def test_export_and_import_are_inverse(tmp_path, stage1, stage1_state, capsys):
    out = export(stage1, tmp_path / "new" / "vae.safetensors")
    tensors = load_file(out)
    assert tensors.keys() == stage1_state.keys()
    for name, value in stage1_state.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    config = out.with_name("vae.config.json")
    assert f"next: python convert_torch.py --config={config} --state={out} " in capsys.readouterr().out
    again = convert(tmp_path, json.loads(config.read_text()), out)
    assert_same_model(again, stage1)
    assert sorted(os.listdir(out.parent)) == ["vae.config.json", "vae.safetensors"]
    assert out.stat().st_mode == config.stat().st_mode


def test_export_into_shards_and_back(tmp_path, stage1, stage1_state, monkeypatch, capsys):
    monkeypatch.setattr(export_module.export_model, "__defaults__", (200_000,))
    out = export(stage1, tmp_path / "vae.safetensors")
    index = tmp_path / "vae.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    N = len(shards)
    assert N > 1 and shards == [f"vae-{i + 1:05d}-of-{N:05d}.safetensors" for i in range(N)]
    assert weight_map.keys() == stage1_state.keys() and not out.exists()
    assert f"--state={index} " in capsys.readouterr().out
    again = convert(tmp_path, json.loads((tmp_path / "vae.config.json").read_text()), index)
    assert_same_model(again, stage1)
    (tmp_path / "vae.config.json").unlink()
    with pytest.raises(ValueError, match="^--out: '.*vae-00001-of-.*' is there already; give the name of a new file$"):
        export(stage1, out)


def test_export_of_a_transformer(tmp_path, stage1, stage2):
    out = export(stage2, tmp_path / "t.safetensors")
    state = transformer_state(STAGE2_CLASS["arch"])
    tensors = load_file(out)
    assert tensors.keys() == state.keys()  # without the tokenizer's codebook
    for name, value in state.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    config = json.loads((tmp_path / "t.config.json").read_text())
    again = convert(tmp_path, config, out, f"--tokenizer={stage1}")
    assert_same_model(again, stage2)
    assert checkpoint.load_model(again).config == checkpoint.load_model(stage2).config


def test_export_of_a_discriminator(tmp_path):
    config = {"gan": {"disc": {"arch": DISCRIMINATOR | {"use_actnorm": True}}}}
    state = discriminator_state(True)
    tensors = load_file(export(convert(tmp_path, config, state), tmp_path / "d.safetensors"))
    assert {name: (x.dtype, x.shape) for name, x in tensors.items()} == {
        n: (x.dtype, x.shape) for n, x in state.items()
    }


def test_export_of_a_run_of_our_own(tmp_path, capsys):
    config = helpers.vae_config(tmp_path, model__norm_groups=32, model__codebook_update="pooled")
    model = models.create(**config.model)
    variables = helpers.drawn_variables(model)
    optimizer = make_optimizer(name="adam", learning_rate=0.1, total_steps=2, schedule="constant", warmup_steps=0)
    run = tmp_path / "run"
    with checkpoint.Checkpointer(run) as checkpointer:
        checkpointer.save(create_state(variables, optimizer, jax.random.key(5), use_ema=False), {"data": {}})
    checkpoint.write_config(run, config.to_dict())
    out = export(run, tmp_path / "own.safetensors")
    assert "not in own.config.json, which has no word for it: codebook_update pooled\n" in capsys.readouterr().out
    config = json.loads((tmp_path / "own.config.json").read_text())
    settings = official.rqvae_settings(config)
    assert models.create("rqvae", **settings) == dataclasses.replace(model, codebook_update="sequential", parent=None)
    helpers.assert_equal(official.rqvae_variables(load_file(out), settings), jax.tree.map(np.asarray, variables))


def test_export_refuses_what_the_original_cannot_express(tmp_path):
    checkpoint.write_config(tmp_path / "vae", helpers.vae_config(tmp_path, model__norm_groups=8).to_dict())
    with pytest.raises(ValueError, match="model.norm_groups: 8 cannot be exported; the original has 32 alone"):
        export(tmp_path / "vae", tmp_path / "new.safetensors")
    assert left_over(tmp_path) == ["vae"]


def test_export_overwrites_nothing(tmp_path, stage1, monkeypatch):
    with pytest.raises(ValueError, match="'.*x.pt' must end in .safetensors"):
        export(stage1, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.config.json"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}' is there already"):
            export(stage1, tmp_path / "x.safetensors")
        (tmp_path / name).unlink()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        export(stage1, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


# --- as a command -------------------------------------------------------------------------------------------


def test_the_command(tmp_path, stage1_state, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(STAGE1))
    stage1_state = stage1_state | {"quant_conv.bias": np.full(6, np.nan, np.float32)}
    save(tmp_path / "state.npz", stage1_state)
    flags = [f"--config={tmp_path / 'config.json'}", f"--state={tmp_path / 'state.npz'}", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "convert_torch.py", *flags]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "WARNING: state dict: NaN or infinite values; they are kept in quant_conv.bias\n" in ran.stderr
    assert ran.stdout.startswith("rqvae: ") and ran.stdout.count("\n") == 3
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit_:
        convert_torch.main(flags)
    message = f"error: --out: '{tmp_path / 'out'}' is there already; give the name of a new directory\n"
    assert (exit_.value.code, *capsys.readouterr()) == (2, "", message)


def test_a_full_disk_ends_in_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(convert_torch.convert, "convert_checkpoint", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit_:
        convert_torch.main(["--config=a", "--state=b", "--out=c"])
    assert (exit_.value.code, capsys.readouterr().err) == (
        2,
        "error: I/O error: No space left on device (os error 28)\n",
    )

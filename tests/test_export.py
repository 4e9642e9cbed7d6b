"""Programs for others: what they compute on a CPU, lowering for devices that are not here, files, refusals."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
import toy_dq_pair
from toy_state import RQTRANSFORMER, RQVAE

from rq_jax import checkpoint, export, models, sampling
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.grains import GrainedCodes
from rq_jax.sampling import images

N, SEED, IDS = 3, 7, np.array([5, 0, 2**31], np.uint32)
ZEROS = np.zeros((3, 8, 8, 4), np.int32)
CLASS = {**RQTRANSFORMER, "cond_vocab_size": 5, "use_null_cond": True}
KINDS = {
    "class": (RQVAE, CLASS, {"guidance": 1.5, "top_p": 0.9, "temperature": [1.0, 0.7, 0.5]}),
    "unconditional with grains": (
        toy_dq_pair.TOKENIZER,
        {**toy_dq_pair.TRANSFORMER, "cond_vocab_size": 1},
        {},
    ),
}


def drawn(settings):
    variables = helpers.drawn_variables(models.create(**settings))
    return jax.tree.map(lambda leaf: np.asarray(4 * leaf), variables)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    stage1, stage2, sample = KINDS[request.param]
    tokenizer = LoadedModel(models.create(**stage1), drawn(stage1), {"model": stage1}, None)
    variables = drawn(stage2)
    variables["codebook"] = tokenizer.variables["codebook"]
    return LoadedModel(models.create(**stage2), variables, {"model": stage2, "sample": sample}, tokenizer)


@pytest.fixture(scope="module")
def programs(pair):
    return export.make_programs(pair, batch_size=N)


def as_dict(codes):
    return codes._asdict() if isinstance(codes, GrainedCodes) else {"codes": codes}


def assert_same(actual, expected):
    actual = actual if isinstance(actual, dict) else {"codes": actual}
    assert actual.keys() == as_dict(expected).keys()
    for name, array in as_dict(expected).items():
        np.testing.assert_array_equal(actual[name], array)
        assert actual[name].dtype == array.dtype


@pytest.mark.parametrize("B", [2, 5])
def test_encode_and_decode_are_the_librarys(pair, programs, B):
    tokenizer, weights = pair.tokenizer, export.flat_weights(pair.tokenizer.variables)
    model = tokenizer.model
    pixels = np.random.default_rng(B).integers(0, 256, (B, *model.image_shape, 3), np.uint8)
    encode = jax.jit(lambda variables, x: model.apply(variables, sharding.scale(x), method="encode_to_codes"))
    codes = encode(tokenizer.variables, pixels)
    assert_same(programs["encode"].call(weights, pixels), codes)
    assert len(np.unique(as_dict(codes)["codes"])) > 2
    dense = as_dict(codes)["codes"]
    decoded = programs["decode"].call(weights, dense)
    np.testing.assert_array_equal(decoded, images.decode(model, tokenizer.variables, dense))
    assert decoded.dtype == np.uint8 and decoded.shape == pixels.shape


@pytest.mark.parametrize("pair", ["class"], indirect=True)
def test_sample_is_the_librarys(pair, programs):
    cond = np.array([[1], [0], [4]], np.int32)
    rng, settings = sampling.rng_of_seed(SEED), pair.config["sample"]
    expected = sampling.generate(pair.model, pair.variables, rng, N, cond, image_ids=IDS, **settings)
    weights = export.flat_weights(pair.variables)
    found = programs["sample"].call(weights, np.uint32(SEED), IDS, cond)
    assert_same(found, expected)
    assert helpers.differs(programs["sample"].call(weights, np.uint32(SEED + 1), IDS, cond), found)


def test_programs_are_lowered_for_devices_that_are_not_here_and_described(pair, programs):
    assert list(programs) == ["encode", "decode", "sample"]
    for program in programs.values():
        assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    model = pair.model
    found = {name: export._described(name, program) for name, program in programs.items()}
    codes = f"{', '.join(map(str, model.code_shape))}]"
    assert found["decode"]["inputs"] == {"codes": f"int32[b, {codes}"}
    H, W = pair.tokenizer.model.image_shape
    assert found["encode"]["inputs"] == {"images": f"uint8[b, {H}, {W}, 3]"} == {"images": found["decode"]["output"]}
    cond = {"cond": "int32[3, 1]"} if model.is_conditional else {}
    assert found["sample"]["inputs"] == {"seed": "uint32[]", "image_ids": "uint32[3]", **cond}
    drawn = found["sample"]["output"]
    assert (drawn["codes"] if isinstance(drawn, dict) else drawn) == f"int32[3, {codes}"
    assert found["sample"]["weights"] == "transformer.npz"


def test_refused_before_anything_is_traced(pair):
    with pytest.raises(ValueError, match="^programs: 'sample' is unknown; allowed are 'encode' and 'decode'$"):
        export.make_programs(pair.tokenizer, ["sample"])
    with pytest.raises(ValueError, match="^platforms: 'gpu' is unknown; allowed are 'cpu', 'cuda', 'tpu' and 'rocm'$"):
        export.make_programs(pair, platforms=["gpu"])
    with pytest.raises(ValueError, match="^batch_size: 0 must be an integer and at least 1"):
        export.make_programs(pair, batch_size=0)
    with pytest.raises(ValueError, match="^export: this '.qtransformer' carries no tokenizer; give the directory of"):
        export.make_programs(pair._replace(tokenizer=None))


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        export.main(["--checkpoint=/nowhere", f"--out={tmp_path / 'out'}"])
    assert ended.value.code == 2
    expected = "error: export: needs the package flatbuffers; run pip install 'rq_jax[export]'\n"
    assert capsys.readouterr().err == expected and not list(tmp_path.iterdir())


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["class"], indirect=True)
def test_programs_that_are_there_stay_in_the_record(pair, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers")
    tokenizer = pair.tokenizer
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: tokenizer)
    platforms = {"decode": ["cpu", "cuda"], "encode": ["cpu"]}
    for name, own in platforms.items():
        record = export.export_programs("runs/vae", tmp_path, [name], own)
    assert record == json.loads((tmp_path / "programs.json").read_text())
    assert {name: one["platforms"] for name, one in record["programs"].items()} == platforms
    assert {path.name for path in tmp_path.glob("*.jax")} == {"decode.jax", "encode.jax"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer = pair.tokenizer._replace(variables=jax.tree.map(lambda leaf: leaf + 1, pair.tokenizer.variables))
    message = f"^--out: '{tmp_path}' holds encode of other weights; give another, or make all anew$"
    with pytest.raises(ValueError, match=message):
        export.export_programs("runs/vae", tmp_path, ["decode"], ["cpu"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert export.export_programs("runs/vae", tmp_path, None, ["cpu"])["weights"] != record["weights"]
    (tmp_path / "programs.json").write_text('{"programs": [1]}')
    with pytest.raises(ValueError, match="^--out: '.*programs.json' is no record of programs; give another$"):
        export.export_programs("runs/vae", tmp_path, ["decode"], ["cpu"])


def test_files_run_with_jax_alone(tmp_path, capsys):
    """The command on the shipped model, and the snippet of the manual on what it wrote."""
    pytest.importorskip("flatbuffers")
    shipped, out = helpers.ROOT / "checkpoints" / "emoji", tmp_path / "exported"
    export.main([f"--checkpoint={shipped}", f"--out={out}", "--platforms=cpu,cuda", "--programs=decode"])
    assert "decode: int32[b, 8, 8, 4] -> uint8[b, 64, 64, 3], " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"decode.jax", "tokenizer.npz", "programs.json"}
    tokenizer = checkpoint.load_model(shipped / "tokenizer")
    record = json.loads((out / "programs.json").read_text())
    assert record["checkpoint"] == str(shipped) and record["programs"]["decode"]["platforms"] == ["cpu", "cuda"]
    assert record["weights"] == {"tokenizer.npz": checkpoint.fingerprint(tokenizer.variables)}
    with np.load(out / "tokenizer.npz") as file:
        helpers.assert_equal(dict(file), export.flat_weights(tokenizer.variables))
    (snippet,) = re.findall(
        r"```python\n([^`]*export\.deserialize[^`]*)```", (helpers.ROOT / "docs" / "sampling.md").read_text()
    )
    assert len(snippet.strip().splitlines()) <= 7
    told = "import sys; print('rq_jax' in sys.modules); np.save('images.npy', images)"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", f"{snippet}\n{told}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr[-2000:]
    drawn, expected = np.load(tmp_path / "images.npy"), images.decode(tokenizer.model, tokenizer.variables, ZEROS)
    assert drawn.dtype == np.uint8 and drawn.shape == (3, 64, 64, 3)
    assert np.abs(drawn.astype(int) - np.asarray(expected)).max() <= 1  # another process, compiled otherwise


@pytest.mark.parametrize("pair", ["class"], indirect=True)
def test_a_sampler_that_is_not_made_again_keeps_its_settings_in_the_record(pair, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers")
    program = SimpleNamespace(serialize=lambda: b"")
    monkeypatch.setattr(export, "make_programs", lambda loaded, programs, *_: dict.fromkeys(programs, program))
    described = lambda name, _: {"weights": f"{export.PROGRAMS[name].part}.npz"}  # noqa: E731
    monkeypatch.setattr(export, "_described", described)
    loaded = pair
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: loaded)
    first = export.export_programs("runs/rqt", tmp_path, ["sample"], ["cpu"])["sample"]
    loaded = pair._replace(config={**pair.config, "sample": {"top_p": 0.25}})
    assert export.export_programs("runs/rqt", tmp_path, ["decode"], ["cpu"])["sample"] == first
    assert export.export_programs("runs/rqt", tmp_path, ["sample"], ["cpu"])["sample"] != first

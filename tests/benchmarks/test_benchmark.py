"""benchmark.py: its sweeps on tiny models, what they measure, the record, refusals. No test looks at a speed."""

import functools
import json
import re
import shlex
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import benchmark
from benchmarks import quantize as quantize_benchmark
from benchmarks import roofline, sample, sweep, timing, train, weights
from rq_jax import models, quantize, recipes, sampling
from rq_jax.data import make_dataset
from rq_jax.data.sources import examples
from rq_jax.devices.peaks import Peaks
from rq_jax.models.flops import decoder_work, encoder_work, transformer_flops

ROOT = sweep.ROOT
PEAKS = Peaks("toy", {"float32": 1e9, "bfloat16": 2e9}, 1e9)
OWN_TINY = sample.TINY
TINY = {"model_dim": 36, "num_heads": 2, "spatial_layers": 2, "depth_layers": 1}
SMALL = ("--codebook_size=13", "--runs=2")
# Pictures of 16x16 on grids of 8x8; coarser code grids fold its latents.
DECODED = ("--tokenizer=demo,quicktest", *SMALL)


@pytest.fixture(scope="module", autouse=True)
def quick():
    device = {"kind": "toy", "platform": "cpu", "count": 8, "peaks": PEAKS._asdict()}
    with helpers.quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "device_and_peaks", lambda: (device, PEAKS))
        patch.setattr(sample, "TINY", TINY)
        patch.setattr(sample, "compile_decoder", compiled_once(sample.compile_decoder))
        yield


def compiled_once(compile_decoder):
    """Several tests use the same decoders."""
    decoders = {}

    def compile_or_reuse(config, model):
        key = config["batch"], model
        if key not in decoders:
            decoders[key] = compile_decoder(config, model)
        return decoders[key]

    return compile_or_reuse


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty directory, where files that nobody asked for would be seen."""
    monkeypatch.chdir(tmp_path)


def run(*argv):
    args = benchmark.parse_args(argv)
    return sweep.run(benchmark.COMMANDS[args.command], args)


def groups(*argv):
    args = benchmark.parse_args(argv)
    return benchmark.COMMANDS[args.command].groups(args)


# --- refusals ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "command"),
        ("sample --bath=3", "--bath=3"),
        ("sample --model=tiny,mini", "--model: 'mini' is unknown; allowed are tiny, small, medium, large, huge, 3.8B, vqgan_large, vqgan_huge"),
        ("sample --batch=1,0", "--batch: '0' must be a whole number, at least 1"),
        ("sample --batch=x", "--batch: 'x' must be a whole number, at least 1"),
        ("sample --runs=-1", "--runs: '-1' must be a whole number, at least 1"),
        ("sample --warmups=0", "--warmups: '0' must be a whole number, at least 1"),
        ("sample --code_shape=8x8", "--code_shape: '8x8' is no code shape; give height x width x depth, such as 8x8x4"),
        ("sample --against=8x8x0", "--against: '8x8x0' is no code shape"),
        ("sample --dtype=float16", "--dtype: 'float16' is unknown; allowed are float32, bfloat16"),
        ("sample --weights=int4", "--weights: 'int4' is unknown; allowed are float32, bfloat16, int8"),
        ("sample --downsampling=4", "--downsampling: '4' is unknown; allowed are 32, 16, 8"),
        ("sample --code_shape=8x8x4,4x4x1 --depth=2", "--code_shape: 8x8x4,4x4x1 is given beside --downsampling or --depth; give one of the two"),
        ("sample --model=vqgan_large --code_shape=8x8x4", "--code_shape: 8x8x4 is not that of 'vqgan_large'; allowed is 16x16x1"),
        ("sample --model=vqgan_huge --codebook_size=1024", "--codebook_size: 1024 is not that of 'vqgan_huge'; allowed is 16384"),
        ("sample --code_shape=5x5x2 --decode", r"--code_shape: 5x5x2 is no grid that a tokenizer of 256x256 images makes \(downsampling 32, 16, 8\); give --tokenizer"),
        ("sample --model=vqgan_huge --against=8x8x4", "--against: 8x8x4 is not that of 'vqgan_huge'; allowed is 16x16x1"),
        ("sample --against=5x5x2 --decode", "--against: 5x5x2 is no grid"),
        ("sample --tokenizer=none", "preset 'none' is unknown"),
        ("sample --tokenizer=demo,quicktest --code_shape=3x3x2", r"model.code_shape: grid \(3, 3\) does not divide the latent grid \(8, 8\)"),
        ("sample --temperature=-1", "temperature: -1.0 must be at least 0"),
        ("sample --top_p=2", r"top_p: 2.0 is outside \[0, 1\]"),
        ("sample --top_k=0", "--top_k: '0' must be a whole number, at least 1"),
        ("sample --guidance=nan", "--guidance: nan must be a finite number"),
        ("sample --protocol=fast", "--protocol: 'fast' is unknown; allowed are paper"),
        ("sample --protocol=paper --batches=3", "--batches: 3 is decided by --protocol=paper; leave it out"),
        ("decode --code_shape=5x5x2", "--code_shape: 5x5x2 is no grid"),
        ("quantize --depth=0", "--depth: '0' must be a whole number, at least 1"),
        ("train --stage=3", "--stage: '3' is unknown; allowed are 1, 2"),
        ("train --preset=none", "preset 'none' is unknown"),
        ("train --stage=2 --no_perceptual", "--no_perceptual: stage 2 has neither; leave it out, or give --stage=1"),
        ("train --stage=2 --no_adversary", "--no_adversary: stage 2 has neither"),
        ("train --accumulation_steps=2", "--accumulation_steps: 2 is for stage 2; leave it out"),
        ("train --batch=12", "data.batch_size: 12 is not a multiple of 8"),
        ("train --data=real", "--data: 'real' is unknown; allowed are synthetic, preset"),
        ("data --data_name=folder --data_dir=nowhere", "nowhere"),
        ("data --jpeg_side=64", "--jpeg_side: 64 must be at least 128"),
        ("data --jpeg_side=256 --data_name=folder", "--jpeg_side: 256 stands for a data set"),
        ("data --preset=none", "preset 'none' is unknown"),
        ("quantize --compare=nowhere.json", "--compare: 'nowhere.json' is no file"),
    ],
)  # fmt: skip
def test_refused(argv, message, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "compile_program", lambda *args, **options: pytest.fail("something was compiled"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*argv.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", ["sample --batch=0", "quantize --compare=nowhere.json"])
def test_command_line_errors_are_one_line(argv):
    command = [sys.executable, str(ROOT / "benchmark.py"), *argv.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and argv.split("=")[0].split()[1] in done.stderr


# --- what is measured ---


@pytest.mark.parametrize(
    ("name", "code_shape", "layers", "millions"),
    [
        ("small", None, (24, 4), 97.5), ("medium", None, (24, 4), 371.1), ("large", None, (24, 4), 820.9),
        ("huge", None, (42, 6), 1387.5), ("huge", "16x16x1", (48, 0), 1387.8), ("large", "16x16x1", (28, 0), None),
        ("small", "8x8x1", (28, 0), None), ("3.8B", None, (42, 6), 3822.5), ("vqgan_large", None, (24, 0), 802.6),
        ("vqgan_huge", None, (48, 0), 1387.8),
    ],
)  # fmt: skip
def test_models_of_the_paper(name, code_shape, layers, millions):
    (config,) = groups(
        "sample", f"--model={name}", "--batch=1", *([f"--code_shape={code_shape}"] if code_shape else [])
    )[0]
    model = sample.make_transformer(config)
    assert (model.spatial_layers, model.depth_layers) == layers and model.cond_vocab_size == 1000
    params = models.abstract_variables(model)["params"]
    if millions is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_tiny_model(monkeypatch):
    monkeypatch.setattr(sample, "TINY", OWN_TINY)
    model = sample.make_transformer(groups("sample", "--batch=1")[0][0])
    assert (model.model_dim, model.num_heads, model.cond_vocab_size) == (512, 8, 1000)
    assert (model.spatial_layers, model.depth_layers, model.code_shape) == (8, 4, (8, 8, 4))


def test_lists_make_a_sweep():
    found = groups(
        "sample", "--model=small,huge", "--downsampling=32,16", "--depth=4,1", "--codebook_size=64,128", "--batch=1,8,32",
        "--dtype=float32,bfloat16", "--weights=bfloat16,int8",
    )  # fmt: skip
    assert len(found) == 2 * 4 * 2 * 3 * 2 * 2 and {len(group) for group in found} == {1}
    assert len({json.dumps(group[0]) for group in found}) == len(found)
    shapes = [(8, 8, 4), (8, 8, 1), (16, 16, 4), (16, 16, 1)]
    assert sorted({group[0]["code_shape"] for group in found}) == sorted(shapes)


def test_against_stands_beside_each():
    found = groups("sample", "--batch=1,8", "--code_shape=8x8x4", "--against=16x16x1,8x8x1")
    shapes = [[config["code_shape"] for config in group] for group in found]
    assert shapes == [[(8, 8, 4), (16, 16, 1), (8, 8, 1)]] * 2
    for group in found:
        stacks = [sample.make_transformer(config) for config in group]
        assert {model.spatial_layers + model.depth_layers for model in stacks} == {3}


@pytest.mark.parametrize(
    ("argv", "batches"), [("", 1), ("--decode", 2), ("--decode --batches=5", 5), ("--protocol=paper", 334)]
)
def test_batches_of_a_run(argv, batches):
    (config,) = groups("sample", "--batch=3", *argv.split())[0]
    assert config["batches"] == batches
    assert config["tokenizer"] == ("imagenet256" if config["decode"] else None)


def test_weights_rest_in_the_dtype_of_the_computation():
    found = groups("sample", "--batch=1", "--dtype=float32,bfloat16")
    assert [group[0]["weights"] for group in found] == ["float32", "bfloat16"]
    found = groups("sample", "--batch=1", "--dtype=float32,bfloat16", "--weights=int8")
    assert [group[0]["weights"] for group in found] == ["int8", "int8"]


def test_tokenizer_by_downsampling():
    found = groups("sample", "--decode", "--downsampling=32,16,8", "--batch=1")
    assert [group[0]["tokenizer"] for group in found] == ["imagenet256", "imagenet256_f16", "imagenet256_f8"]
    assert [sample.make_tokenizer(group[0]).code_shape for group in found] == [(8, 8, 4), (16, 16, 4), (32, 32, 4)]


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_the_sampler_is_that_of_the_library(weights):
    argv = ("--batch=3", "--code_shape=1x2x2", "--top_k=5", "--guidance=1.5", f"--weights={weights}", *SMALL)
    (config,) = groups("sample", *argv)[0]
    model = sample.make_transformer(config)
    draw = sample.compile_sampler(config, model)
    variables = sample.draw_variables(model, weights)
    expected = sampling.generate(
        model, variables, jax.random.key(0), 3, np.arange(3), image_ids=np.arange(6, 9), top_k=5, guidance=1.5
    )
    np.testing.assert_array_equal(draw.call(2), expected)
    assert len(np.unique(expected)) > 2


def test_weights_are_random():
    shapes = {"a": jax.ShapeDtypeStruct((100, 70), jnp.float32), "b": jax.ShapeDtypeStruct((9,), jnp.bfloat16)}
    drawn = weights.draw(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == {
        "a": ((100, 70), jnp.float32),
        "b": ((9,), jnp.bfloat16),
    }
    assert np.std(drawn["a"]) == pytest.approx(0.02, rel=0.05) and abs(np.mean(drawn["a"])) < 2e-3


def test_decoding_overlaps_as_in_sample_py(monkeypatch):
    events = []
    monkeypatch.setattr(jax, "device_get", lambda arrays: events.append(f"fetch {arrays}") or arrays)

    def draw(i):
        events.append(f"draw {i}")
        return i

    def decode(codes):
        events.append(f"decode {codes}")
        return f"images {codes}"

    assert sample.draw_overlapped(draw, decode, 3) == "images 2"
    assert events == [
        "draw 0", "decode 0", "draw 1", "decode 1", "fetch images 0", "draw 2", "decode 2", "fetch images 1",
        "fetch images 2",
    ]  # fmt: skip
    assert sample.draw_overlapped(draw, None, 1) == 0


def test_the_papers_protocol_times_both_parts(monkeypatch):
    now = iter([0.0, 3.0, 4.0, 10.0, 15.0, 17.0])
    monkeypatch.setattr(timing, "clock", lambda: next(now))
    parts = []
    sample.draw_apart(lambda i: i, lambda codes: codes, 2, parts)
    assert parts == [{"sampling": 3.0 + 5.0, "decoding": 1.0 + 2.0}]


# --- whole runs ---


def test_sample_run(capsys, tmp_path):
    argv = ("--batch=1,3", "--code_shape=1x2x2", "--against=1x4x1", *SMALL)
    record = run("sample", *argv, "--out=here/record.json", "--plot=here/rates.png")
    printed = capsys.readouterr().out.strip().splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "here" / "record.json").read_text())
    assert json.loads(json.dumps(record)) == json.loads(printed[-1])
    assert Image.open(tmp_path / "here" / "rates.png").width > 100
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["rates.png", "record.json"]
    assert record["benchmark"] == "sample" and record["unit"] == "image" and record["device"]["kind"] == "toy"
    assert record["environment"]["jax"] == jax.__version__ and record["arguments"]["batch"] == [1, 3]
    shapes = [(entry["config"]["batch"], entry["config"]["code_shape"]) for entry in record["results"]]
    assert shapes == [(1, (1, 2, 2)), (1, (1, 4, 1)), (3, (1, 2, 2)), (3, (1, 4, 1))]
    for entry in record["results"]:
        assert len(entry["seconds"]["runs"]) == 2 and entry["compile_seconds"] > 0
        assert entry["count"] == entry["config"]["batch"] and entry["memory"]["temporaries"] > 0
        model = sample.make_transformer(entry["config"])
        work = roofline.sampling_work(model, entry["count"], "float32")
        assert entry["flops"] == pytest.approx(sum(part.flops for part in work.values()))
        assert entry["roofline"]["seconds"] == roofline.roofline(work, PEAKS).seconds
    for entry, this, other in zip(record["comparisons"], record["results"][::2], record["results"][1::2], strict=True):
        assert (entry["config"], entry["against"]) == (this["config"], other["config"])
        assert entry["predicted"] == pytest.approx(other["roofline"]["seconds"] / this["roofline"]["seconds"])
        assert entry["ratio"]["min"] <= entry["ratio"]["median"] <= entry["ratio"]["max"]
    assert any("times as fast as" in line and "predicted" in line for line in printed)


def test_decoding_and_the_papers_protocol(monkeypatch, capsys):
    monkeypatch.setattr(sample, "PAPER_IMAGES", 5)
    record = run("sample", "--batch=2", "--code_shape=2x2x2", "--protocol=paper", *DECODED)
    (entry,) = record["results"]
    assert entry["count"] == 6 and entry["config"]["batches"] == 3
    parts = entry["ms_per_image"]
    assert set(parts) == {"total", "sampling", "decoding"} and parts["total"] == pytest.approx(
        1e3 / entry["per_second"]
    )
    assert 0 < parts["sampling"] < parts["total"] and 0 < parts["decoding"] < parts["total"]
    tokenizer = sample.make_tokenizer(entry["config"])
    model = sample.make_transformer(entry["config"])
    assert model.code_dim == tokenizer.code_dim == 16
    flops = sum(transformer_flops(model).values()) + decoder_work(tokenizer).flops
    assert entry["flops"] == pytest.approx(6 * flops)
    assert set(entry["compile_parts"]) == {"sampling", "decoding"}
    assert "sampling ms" in capsys.readouterr().out


def test_decode_run(tmp_path):
    record = run("decode", "--batch=1,2", "--code_shape=4x4x3", *DECODED)
    assert [entry["count"] for entry in record["results"]] == [1, 2] and record["comparisons"] == []
    assert record["results"][1]["flops"] == 2 * record["results"][0]["flops"]
    assert list(tmp_path.iterdir()) == []


def test_compare(capsys, tmp_path):
    argv = ("decode", "--code_shape=4x4x3", *DECODED)
    old = run(*argv, "--batch=1,2", "--out=old.json")
    new = run(*argv, "--batch=2,4", "--compare=old.json")
    (ratio,) = new["compared"]["ratios"]
    assert ratio["config"]["batch"] == 2
    assert ratio["per_second"] == pytest.approx(new["results"][0]["per_second"] / old["results"][1]["per_second"])
    assert new["compared"]["commit"] == old["environment"]["commit"]
    captured = capsys.readouterr()
    assert "new / old (old.json):" in captured.out and "warning" not in captured.err
    (tmp_path / "elsewhere.json").write_text(json.dumps({**old, "device": {"kind": "TPU v4"}}))
    run(*argv, "--batch=2", "--compare=elsewhere.json")
    assert "warning: --compare: 'elsewhere.json' is from 'TPU v4', this run from 'toy'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--compare: 'old.json' has none of the 1 configurations"):
        run(*argv, "--batch=8", "--compare=old.json")


def test_save(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    run("decode", "--batch=1", "--code_shape=4x4x3", *DECODED, "--save")
    (path,) = tmp_path.rglob("*.*")
    assert path.parent == tmp_path / "benchmarks" / "results"
    assert re.fullmatch(r"toy-\d{4}-\d\d-\d\dt\d{6}-unknown\.json", path.name)
    record = {
        "device": {"kind": "NVIDIA H100 80GB HBM3"},
        "environment": {"date": "2030-01-02T03:04:05-07:00", "commit": "abc"},
    }
    assert sweep.default_path(record).name == "nvidia-h100-80gb-hbm3-2030-01-02t030405-abc.json"


def test_what_does_not_fit_into_memory_does_not_end_the_sweep(monkeypatch, capsys):
    build, closed = sample.build_decode, []

    def fail_at_two(config, args):
        if config["batch"] == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return build(config, args)._replace(close=lambda: closed.append(config["batch"]))

    monkeypatch.setitem(benchmark.COMMANDS, "decode", sweep.Benchmark(sample.decode_groups, fail_at_two, "image"))
    record = run("decode", "--batch=1,2,4", "--code_shape=4x4x3", *DECODED, "--plot=rates.png")
    assert [entry.get("error") for entry in record["results"]] == [None, "out of memory", None]
    assert closed == [1, 4]
    assert "out of memory" in capsys.readouterr().out


def test_other_failures_do(monkeypatch):
    def fail(config, args):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setitem(benchmark.COMMANDS, "decode", sweep.Benchmark(sample.decode_groups, fail, "image"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: broken"):
        run("decode", "--batch=1", "--code_shape=4x4x3", *DECODED)


def test_ratio_is_of_equal_runs():
    this = {"config": {"a": 1}, "count": 2, "seconds": {"runs": [1.0, 2.0, 4.0]}, "roofline": {"seconds": 1.0}}
    other = {"config": {"a": 2}, "count": 6, "seconds": {"runs": [6.0, 24.0, 36.0]}, "roofline": {"seconds": 9.0}}
    assert sweep.side_by_side(this, other) == {
        "config": {"a": 1}, "against": {"a": 2}, "ratio": {"median": 3.0, "min": 2.0, "max": 4.0}, "predicted": 3.0,
    }  # fmt: skip


def test_quantize_run():
    sizes = ("--num_vectors=24", "--code_dim=6", "--codebook_size=11", "--depth=3")
    record = run("quantize", *sizes, "--runs=2")
    methods = [entry["config"]["method"] for entry in record["results"]]
    assert methods == ["search", "dense_search", "update", "dense_update"] and record["unit"] == "vector"
    assert all(entry["count"] == 24 and "temporaries" in entry["memory"] for entry in record["results"])
    pairs = [(entry["config"]["method"], entry["against"]["method"]) for entry in record["comparisons"]]
    assert pairs == [("search", "dense_search"), ("update", "dense_update")]
    assert record["results"][1]["bytes"] - record["results"][0]["bytes"] == 2 * 4 * 24 * 11 * 3


def test_features_run():
    (entry,) = run("features", "--net=efficientnet_lite0", "--image_size=16", "--batch=8", "--runs=1")["results"]
    assert entry["count"] == 8 and entry["per_second"] > 0 and entry["roofline"]["seconds"] > 0
    assert 0.6e9 < entry["flops"] / 8 < 1e9  # 0.4 billion products an image of 224x224, as published


@pytest.mark.parametrize("pair", [("search", "dense_search"), ("update", "dense_update")])
def test_both_forms_of_the_search_find_the_same(pair):
    rng_x, rng_codebook, rng = jax.random.split(jax.random.key(0), 3)
    x_NE, codebook_KE = jax.random.normal(rng_x, (24, 6)), jax.random.normal(rng_codebook, (11, 6))
    state = quantize.CodebookState(codebook_KE, jnp.linspace(0.0, 3.0, 11), codebook_KE)
    ours, dense = (quantize_benchmark.make_method(name, 3)(x_NE, state, rng) for name in pair)
    for a, b in zip(ours, dense, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert pair[0] == "search" or helpers.differs(ours, state)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return helpers.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def zeros(monkeypatch):
    """States of zeros, which need no compilation."""

    def place(shape):
        is_key = jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key)
        return jax.device_put(jax.random.key(0) if is_key else np.zeros(shape.shape, shape.dtype), shape.sharding)

    for recipe in (recipes.Tokenizer, recipes.Transformer):
        monkeypatch.setattr(recipe, "init", lambda recipe, rng: jax.tree.map(place, recipe.abstract_state()))


def change_model(monkeypatch, **changes):
    """Other settings of the model in every preset."""
    load_settings = train.load_settings

    def changed(config):
        settings = load_settings(config)
        return settings | {"model": settings["model"] | changes}

    monkeypatch.setattr(train, "load_settings", changed)


@pytest.mark.slow
def test_train_stage_1(monkeypatch, zeros):
    change_model(monkeypatch, code_shape=(8, 8, 2))
    argv = ("--quicktest", "--no_perceptual", "--no_adversary", "--batch=16", "--steps=3", "--runs=1")
    record = run("train", *argv)
    (entry,) = record["results"]
    assert entry["config"]["perceptual"] is entry["config"]["adversary"] is False and entry["config"]["batch"] == 16
    assert entry["count"] == 48 and entry["per_second"] == pytest.approx(16 * entry["steps_per_second"])
    assert entry["memory"]["aliased"] > 0, "the state is not donated"
    model = models.create(**train.load_settings(entry["config"])["model"])
    passes = 3 * (encoder_work(model).flops + decoder_work(model).flops)
    assert entry["model_flops"] == pytest.approx(48 * passes, rel=0.05)
    assert entry["flops"] == pytest.approx(entry["model_flops"], rel=0.05)
    peak = 8 * PEAKS.flops["float32"]
    assert entry["flops_utilization"] == pytest.approx(entry["flops_per_second"] / peak)


def test_terms_of_stage_1_are_on():
    settings = train.load_settings(groups("train", "--quicktest", "--batch=8")[0][0])
    recipe = train.make_recipe(settings, train.sharding.make_mesh(), lambda shapes: shapes)
    state, batch = recipe.abstract_state(), train.batch_shapes(recipe, 8)
    update = functools.partial(recipe.update, phase=recipe.phase(train.LAST_STEP))
    _, metrics = jax.eval_shape(update, state, batch, recipe.frozen)
    assert {"perceptual_loss", "generator_loss"} <= set(metrics)
    (work,) = train.step_work(recipe, state, batch, 1).values()
    assert work.flops > 2 * 8 * recipe.flops_per_image, "VGG16 alone is more than this tokenizer"


@pytest.mark.slow
def test_train_stage_2_on_the_images_of_the_preset(monkeypatch, zeros, pictures):
    opened = []

    def open_dataset(settings):
        opened.append(settings["data"]["label_key"])
        data = settings["data"] | dict(name="folder", data_dir=pictures, label_key="folder")
        return make_dataset(**data, split="train", train=True)

    monkeypatch.setattr(train.sharding, "make_mesh", helpers.make_mesh)
    monkeypatch.setattr(train, "open_dataset", open_dataset)
    change_model(monkeypatch, cond_vocab_size=5, spatial_layers=1)
    argv = ("--stage=2", "--preset=imagenet256_480m", "--quicktest", "--data=preset", "--dtype=float32")
    record = run("train", *argv, "--batch=16", "--accumulation_steps=2", "--steps=2", "--runs=1")
    (entry,) = record["results"]
    assert opened == ["category"] and entry["count"] == 32 and entry["config"]["accumulation_steps"] == 2
    assert entry["flops"] > entry["model_flops"] > 0 and entry["steps_per_second"] > 0
    assert "perceptual" not in entry["config"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_train_from_the_scripts_own_state(stage):
    record = run("train", f"--stage={stage}", "--quicktest", "--steps=1", "--runs=2")
    (entry,) = record["results"]
    assert entry["config"]["batch"] == entry["count"] == 8 and entry["flops"] > entry["model_flops"]


@pytest.mark.parametrize("stage", ["1", "2"])
def test_data_run(pictures, stage):
    argv = (f"--stage={stage}", "--quicktest", "--data_name=folder", f"--data_dir={pictures}", "--num_threads=1,2")
    record = run("data", *argv, "--batch=4", "--steps=3", "--runs=2")
    assert [entry["config"]["num_threads"] for entry in record["results"]] == [1, 2]
    for entry in record["results"]:
        assert entry["count"] == 12 and "roofline" not in entry and entry["compile_seconds"] == 0
        assert entry["per_second_of_host"] == 16 * entry["per_second_of_core"] > 0


def test_jpegs_are_read_from_files_and_not_from_memory(tmp_path, capsys):
    folder = train.write_jpegs(str(tmp_path), 256)
    source = make_dataset(
        name="folder", split="train", train=False, data_dir=folder, batch_size=1, image_size=256
    ).source
    assert len(source) * 3 * 256**2 > examples._CACHE_BYTES
    assert source[0]["image"].shape == (256, 256, 3)
    assert 15_000 < (tmp_path / "000000.jpg").stat().st_size < 60_000  # as photographs have
    run("data", "--quicktest", "--jpeg_side=256", "--batch=4", "--steps=2", "--runs=1")
    assert "images/s of a core" in capsys.readouterr().out


def test_make_bench_runs_what_there_is():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    recipe = re.search(r"^bench: setup\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    commands = [shlex.split(line.split("benchmark.py")[1]) for line in recipe.splitlines()]
    assert {command[0] for command in commands} == set(benchmark.COMMANDS)
    outputs = [argument for command in commands for argument in command if argument.startswith("--out=")]
    assert len(set(outputs)) == len(commands)
    for command in commands:
        assert benchmark.parse_args(command).out

"""benchmark.py on models with grains: what is drawn and decoded, the work of its tokens, refusals."""

import helpers
import jax
import numpy as np
import pytest

import benchmark
from benchmarks import lengths, roofline, sample, sweep, timing, train
from rq_jax import sampling
from rq_jax.devices.peaks import Peaks
from rq_jax.grains import num_codes
from rq_jax.models.flops import decoder_work, encoder_work

TOKENIZER = "--tokenizer=dqvae:demo,quicktest"  # images of 16x16 on grids of 8x8
PEAKS = Peaks("toy", {"float32": 1e9, "bfloat16": 2e9}, 1e9)
SMALL = {**sample.GRAINED["dq_small"], "model_dim": 16, "num_heads": 2, "position_layers": 1, "content_layers": 1}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sample.GRAINED, "dq_small", SMALL)
        patch.setattr(timing, "device_and_peaks", lambda: ({"kind": "toy", "platform": "cpu", "count": 8}, PEAKS))
        yield


def run(*argv):
    args = benchmark.parse_args(argv)
    return sweep.run(benchmark.COMMANDS[args.command], args)


def groups(*argv):
    args = benchmark.parse_args(argv)
    return benchmark.COMMANDS[args.command].groups(args)


def test_grid_and_codebook_are_the_tokenizers():
    (config,), (other,) = groups("sample", "--model=dq_small,small", "--batch=1", "--decode")
    assert (config["tokenizer"], config["code_shape"], config["codebook_size"]) == (
        "dqvae:imagenet256",
        (32, 32, 1),
        1024,
    )
    assert config["fine_ratio"] == 0.5 and "fine_ratio" not in other  # records of other models stay comparable
    (config,) = groups("decode", "--batch=1", "--tokenizer=dqvae:imagenet256")[0]
    assert (config["code_shape"], config["codebook_size"]) == ((32, 32, 1), 1024)


def test_the_sampler_is_that_of_the_library_with_forced_grains():
    (config,) = groups("sample", "--model=dq_small", "--batch=3", "--fine_ratio=0.3", "--guidance=1.5", TOKENIZER)[0]
    model = sample.make_transformer(config)
    maps = sample.grain_maps(config, model)
    assert maps.shape == (3, 4, 4) and (maps.sum((1, 2)) == 5).all() and (maps[0] != maps[1]).any()
    assert sample.tokens_of_image(config, model) == 4 + int(num_codes(maps, 2)[0]) == 4 + 11 + 5 * 4
    variables = sample.draw_variables(model, config["weights"])
    expected = sampling.generate(
        model, variables, jax.random.key(0), 3, np.arange(3), image_ids=np.arange(6, 9), guidance=1.5, grains=maps
    )
    np.testing.assert_array_equal(sample.compile_sampler(config, model).call(2), expected.codes)


def test_sample_and_decode_run():
    argv = ("sample", "--model=dq_small", "--batch=2", "--fine_ratio=0,1", "--decode", TOKENIZER, "--runs=1")
    record = run(*argv)
    coarse, fine = record["results"]
    assert coarse["count"] == fine["count"] == 4  # two batches
    model, tokenizer = sample.make_transformer(fine["config"]), sample.make_tokenizer(fine["config"])
    for entry, tokens in ((coarse, 4 + 16), (fine, 4 + 64)):
        work = roofline.sampling_work(model, 2, "float32", tokens=tokens)
        flops = sum(part.flops for part in work.values()) + decoder_work(tokenizer, 2).flops
        assert entry["flops"] == pytest.approx(2 * flops)
    (decoded,) = run("decode", "--batch=2", TOKENIZER, "--runs=1")["results"]
    assert decoded["count"] == 2 and decoded["flops"] == pytest.approx(decoder_work(tokenizer, 2).flops)


@pytest.mark.slow
def test_the_originals_sampler_beside_ours():
    argv = ("sample", "--model=dq_small", "--batch=2", "--fine_ratio=0.5", TOKENIZER, "--top_k=5", "--runs=1")
    record = run(*argv, "--as_released")
    ours, theirs = record["results"]
    tokens = 4 + 8 + 8 * 4
    lengths = theirs["prefix_lengths"]
    assert theirs["tokens"] == tokens and lengths == sorted(set(lengths)) and 0 < lengths[0] < lengths[-1] < tokens
    # Midpoints: the mean of any linear function over all prefixes.
    assert np.mean(lengths) == pytest.approx(np.mean(range(1, tokens)), abs=0.5)
    assert theirs["count"] == pytest.approx(2 * len(lengths) / (tokens - 1)) and ours["count"] == 2
    per_image = [entry["flops"] / entry["count"] for entry in (ours, theirs)]
    assert per_image[1] > 5 * per_image[0]
    (comparison,) = record["comparisons"]
    assert comparison["predicted"] > 1 and comparison["against"]["as_released"]


def test_the_step_of_stage_1():
    argv = "train", "--preset=dqvae:demo", "--quicktest", "--batch=8", "--no_perceptual", "--no_adversary"
    (config,) = groups(*argv)[0]
    mesh = helpers.make_mesh(1)
    recipe = train.make_recipe(train.load_settings(config), mesh, lambda shapes: shapes)
    assert recipe.model.num_grains == 2 and recipe.model.thresholds == (1.0,)  # measured by a run, before it trains
    state, batch = jax.eval_shape(recipe.init, jax.random.key(0)), train.batch_shapes(recipe, config["batch"])
    (work,) = train.step_work(recipe, state, batch, 3).values()
    assert work.flops > 3 * 8 * 2 * decoder_work(recipe.model).flops


def test_the_step_of_stage_2():
    (config,) = groups("train", "--stage=2", "--preset=dqtransformer:demo", "--quicktest", "--batch=8")[0]
    recipe = train.make_recipe(train.load_settings(config), helpers.make_mesh(1), lambda shapes: shapes)
    assert recipe.model.num_grains == recipe.tokenizer.model.num_grains == 2
    state, batch = jax.eval_shape(recipe.init, jax.random.key(0)), train.batch_shapes(recipe, config["batch"])
    work = train.step_work(recipe, state, batch, 3)
    assert work["tokenizer"].flops == 3 * 8 * encoder_work(recipe.tokenizer.model).flops
    assert work["training"].flops > 3 * 8 * recipe.flops_per_image / 2


def test_lengths_spread_as_the_bundled_set():
    model = sample.make_transformer(groups("sample", "--model=dq_small", "--batch=1")[0][0])
    batches = [next(iterator) for iterator in [lengths.SpreadCodes(model, 8, 8)] for _ in range(9)]
    helpers.assert_equal(batches[8], batches[0])
    found = np.concatenate([np.asarray(num_codes(batch["grains"], 2)) for batch in batches[:8]]) + 4
    assert found.mean() == pytest.approx(644, abs=1) and 300 < found.min() < 400 and 900 < found.max() < 1028
    np.testing.assert_allclose(
        np.quantile(found, [0.25, 0.5, 0.75]), 260 + 768 * np.array([0.383, 0.492, 0.594]), atol=6
    )
    assert np.std([np.mean(num_codes(batch["grains"], 2)) for batch in batches[:8]]) > 10  # in no order
    assert lengths.count_tokens(model, batches[:8]) == {"tokens_per_image": found.mean(), "padded_tokens": 1028}


BUCKETS = "train --stage=2 --preset=dqtransformer:demo --quicktest --batch=8 --data=codes --buckets=48".split()


def test_buckets_are_timed_beside_padding_to_the_longest(monkeypatch):
    monkeypatch.setattr(train.sharding, "make_mesh", helpers.make_mesh)
    record = run(*BUCKETS, "--window=3", "--steps=3", "--runs=1")
    bucketed, padded = record["results"]
    assert bucketed["config"]["buckets"] == (48,) and bucketed["config"]["window"] == 3
    assert "buckets" not in padded["config"] and padded["config"]["data"] == "codes"
    assert padded["count"] == bucketed["count"] == 24 and padded["padded_tokens"] == 68
    assert padded["tokens_per_image"] == bucketed["tokens_per_image"] <= bucketed["padded_tokens"] < 60
    assert padded["model_flops"] == bucketed["model_flops"] and padded["flops"] > 1.1 * bucketed["flops"]
    (comparison,) = record["comparisons"]
    assert comparison["config"] == bucketed["config"] and comparison["against"] == padded["config"]
    assert comparison["ratio"]["median"] > 0 and comparison["predicted"] > 1.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("sample --fine_ratio=0.5", "--fine_ratio: 0.5 is for models with grains, 'tiny' has none; leave it out"),
        ("sample --model=small --as_released", "--as_released: is for models with grains, 'small' has none; leave it out"),
        ("sample --model=dq_small --as_released --decode", "--as_released: times the drawing of codes alone; leave out"),
        ("sample --model=dq_small --as_released --guidance=2", "guidance: the original's sampler has none; leave it"),
        ("sample --model=dq_small --fine_ratio=1.5", r"--fine_ratio: 1.5 is outside \[0, 1\]"),
        ("sample --model=dq_small --tokenizer=demo", "--tokenizer: 'demo' has 1 grains, but 'dq_small' has 2; give one"),
        (f"sample --code_shape=8x8x1 {TOKENIZER}", "has 2 grains, but 'tiny' has 1"),
        (f"decode --code_shape=4x4x1 {TOKENIZER}", "--code_shape: 4x4x1 is not that of the tokenizer 'dqvae:demo,quicktest'; allowed is 8x8x1"),
        ("decode --tokenizer=vqvae:demo", "preset: 'vqvae' is unknown; allowed are"),
        ("decode --tokenizer=dqvae:none", "preset 'none' is unknown"),
        ("train --preset=rqtransformer:demo", "preset: 'rqtransformer' is unknown; allowed are 'rqvae' and 'dqvae'"),
        ("train --stage=2 --preset=dqvae:demo", "preset: 'dqvae' is unknown; allowed"),
        ("train --data=codes", "--data: codes is for stage 2 over grains; give a preset dqtransformer:<preset>"),
        ("train --stage=2 --data=codes", "--data: codes is for stage 2 over grains"),
        (" ".join(BUCKETS).replace("codes", "synthetic"), r"--buckets: \(48,\) needs codes of unlike lengths; give --data=codes"),
        (" ".join(BUCKETS) + " --window=4", "--steps: 10 must be a positive multiple of 4, the batches of --window"),
        (" ".join(BUCKETS) + ",69", r"loop.buckets: 69 is outside 20\.\.68, the tokens of an image"),
        ("train --stage=2 --window=4", "loop.bucket_window: 4 groups images for loop.buckets"),
    ],
)  # fmt: skip
def test_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        groups(*argv.split())

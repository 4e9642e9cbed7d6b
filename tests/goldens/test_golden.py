"""Parity with the original PyTorch implementation: its forward, backward and sampling passes, array by array.

Floating-point arrays agree within 1e-5 of their largest value, codes exactly.
"""

import functools
import json
from typing import Any, NamedTuple

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from rq_jax import losses, models, quantize, sampling
from rq_jax.interop import official
from rq_jax.report import grids
from rq_jax.sampling import draws

TOLERANCE = 1e-5
TOKENIZER = "rqvae-8x8x4"
TRANSFORMERS = ("rqt-uncond", "rqt-class", "rqt-text")


class Golden(NamedTuple):
    """A model with the weights of the original, and the original's inputs and outputs."""

    model: nn.Module
    variables: Any
    io: dict[str, np.ndarray]
    table: official.Table
    zero_up_to_rounding: set[str]


def load(directory, name: str, kind: str) -> Golden:
    config = json.loads((directory / f"{name}.config.json").read_text())
    settings = getattr(official, f"{kind}_settings")(config)
    with np.load(directory / f"{name}.state.npz") as state:
        variables = jax.device_put(getattr(official, f"{kind}_variables")(dict(state), settings))
    with np.load(directory / f"{name}.io.npz") as file:
        io = {key: jnp.asarray(value) for key, value in file.items()}
    tolerances = json.loads((directory / "tolerances.json").read_text())[name]
    entries = {key: entry for key, entry in tolerances.items() if isinstance(entry, dict)}
    zeros = {key for key, entry in entries.items() if entry.get("zero_up_to_rounding")}
    table = getattr(official, f"{kind}_table")(settings)
    return Golden(models.create(kind, **settings), variables, io, table, zeros)


@pytest.fixture(scope="module")
def tokenizer(goldens) -> Golden:
    return load(goldens, TOKENIZER, "rqvae")


@pytest.fixture(scope="module", params=TRANSFORMERS)
def transformer(request, goldens, tokenizer) -> Golden:
    golden = load(goldens, request.param, "rqtransformer")
    golden.variables["codebook"] = {"codebook_KE": tokenizer.variables["codebook"]["codebook_KE"]}
    return golden


def assert_close(actual, expected, name: str = "") -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name)


def nhwc(images):
    return rearrange(images, "... c h w -> ... h w c")


# --- the tokenizer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apply(tokenizer):
    """Call a method of the tokenizer with the stored weights, compiled once."""

    @functools.partial(jax.jit, static_argnames=("method", "settings"))
    def call(variables, *args, method, settings):
        return tokenizer.model.apply(variables, *args, method=method, **dict(settings))

    return lambda method, *args, **settings: call(
        tokenizer.variables, *args, method=method, settings=tuple(settings.items())
    )


def run_encoder(model, images):
    return model.encoder(images)


def test_rqvae_forward(tokenizer, apply):
    io, images = tokenizer.io, nhwc(tokenizer.io["images"])
    output = apply("__call__", images)
    assert_close(apply(run_encoder, images), nhwc(io["encoder_out"]))
    assert_close(output.latents, io["z_e"])
    assert_close(quantize.fold_patches(output.latents, tokenizer.model.code_shape[:2]), io["z_e_code_shape"])
    np.testing.assert_array_equal(output.codes, io["codes"])
    for d in range(4):
        assert_close(output.partial_sums[..., d, :], io[f"z_q_cumulative_depth{d}"])
    assert_close(output.partial_sums[..., -1, :], io["z_q"])
    assert_close(output.reconstruction, nhwc(io["recon"]))


def test_rqvae_losses(tokenizer, apply):
    io, images = tokenizer.io, nhwc(tokenizer.io["images"])
    output = apply("__call__", images)
    commitment = losses.commitment_loss(output.latents, output.partial_sums)
    reconstruction = losses.reconstruction_loss(images, output.reconstruction)
    assert_close(commitment, io["quant_loss"])
    assert_close(commitment, io["loss_latent"])
    assert_close(reconstruction, io["loss_recon"])
    assert_close(reconstruction + 0.25 * commitment, io["loss_total"])
    # The original's validation counts a mean once for each picture and channel.
    B, channels = images.shape[0], images.shape[-1]
    assert_close(B * channels * reconstruction, io["valid_loss_recon"])
    assert_close(B * commitment, io["valid_loss_latent"])
    assert_close(B * channels * reconstruction + 0.25 * B * commitment, io["valid_loss_total"])


def test_rqvae_pictures(tokenizer, apply):
    io, images = tokenizer.io, nhwc(tokenizer.io["images"])
    assert_close(0.5 * images + 0.5, nhwc(io["recon_imgs_real"]))
    shown = grids.to_uint8(apply("__call__", images).reconstruction)
    np.testing.assert_allclose(shown / 255, nhwc(io["recon_imgs_recon"]), atol=0.501 / 255)


def test_rqvae_distances(tokenizer):
    """Log-ratios of soft codes are differences of distances."""
    io, codebook, temperature = tokenizer.io, tokenizer.variables["codebook"]["codebook_KE"], 10.0
    soft, codes = quantize.soft_codes(io["z_e_code_shape"], codebook, 4, temperature)
    np.testing.assert_array_equal(codes, io["codes"])
    above_nearest = temperature * (np.log(soft.max(-1, keepdims=True)) - np.log(soft))
    distances = io["distances_depth0"]
    within = dict(rtol=0, atol=TOLERANCE * distances.max())
    expected = distances - distances.min(-1, keepdims=True)
    np.testing.assert_allclose(above_nearest[..., 0, :], expected, **within)
    np.testing.assert_allclose(np.sort(above_nearest, -1)[..., 1], io["code_margin"], **within)
    assert io["code_margin"].min() > 1e-4  # far above rounding: codes may be compared exactly


def test_rqvae_decoding(tokenizer, apply):
    io, codes = tokenizer.io, tokenizer.io["codes"]
    vectors = quantize.lookup(codes, tokenizer.variables["codebook"]["codebook_KE"])
    assert_close(vectors, io["embed_code_with_depth"])
    assert_close(vectors.sum(-2), io["embed_code"])
    assert_close(apply("decode_codes", codes), nhwc(io["decode_code"]))
    by_depth = apply("reconstruct_by_depth", nhwc(io["images"]))
    for d in range(4):
        assert_close(apply("decode", vectors[..., d, :]), nhwc(io[f"partial_select_{d}"]))
        assert_close(by_depth[d], nhwc(io[f"partial_add_{d}"]))
    assert_close(apply("decode_codes", codes, depth=2), nhwc(io["partial_add_1"]))


def test_rqvae_soft_codes(tokenizer, apply):
    soft, codes = apply("soft_codes", nhwc(tokenizer.io["images"]), temperature=0.5)
    np.testing.assert_array_equal(codes, tokenizer.io["codes"])
    assert_close(soft, tokenizer.io["soft_codes_t0.5"])


def assert_codebook_close(codebook, io, prefix: str) -> None:
    assert_close(codebook["codebook_KE"], io[f"{prefix}.codebooks.0.weight"][:-1])
    assert_close(codebook["counts_K"], io[f"{prefix}.codebooks.0.cluster_size_ema"])
    assert_close(codebook["sums_KE"], io[f"{prefix}.codebooks.0.embed_ema"])


def test_rqvae_ema_passes(tokenizer):
    model, variables, io = tokenizer.model, tokenizer.variables, tokenizer.io

    @jax.jit
    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["codebook"])  # no restart without its rng stream

    for i, images in enumerate(nhwc(io["ema_images"])):
        output, updated = train(variables, images)
        variables = {**variables, **updated}
        np.testing.assert_array_equal(output.codes, io[f"ema.{i}.codes"])
        assert_close(output.latents, io[f"ema.{i}.z_e"])
        assert_close(losses.commitment_loss(output.latents, output.partial_sums), io[f"ema.{i}.quant_loss"])
        assert_close(output.reconstruction, nhwc(io[f"ema.{i}.recon"]))
        assert_codebook_close(variables["codebook"], io, f"ema.{i}")


def test_rqvae_restart_pass(tokenizer, apply):
    io = tokenizer.io
    latents = apply("encode", nhwc(io["ema_images"][0]))
    state = quantize.CodebookState(**tokenizer.variables["codebook"])

    def candidates(d, x_NE, K):
        return x_NE[io[f"restart.perm_depth{d}"][:K]]

    result, (state,) = quantize.quantize_and_update(latents, [state], 4, [0.99], candidates=candidates)
    np.testing.assert_array_equal(result.codes, io["restart.codes"])
    assert_close(losses.commitment_loss(latents, result.partial_sums), io["restart.quant_loss"])
    assert_codebook_close(state._asdict(), io, "restart")


# --- the transformer ----------------------------------------------------------------------------------------


def forward(golden: Golden, codes):
    """The model's output, and that of its spatial stack."""

    def run(variables, codes, cond):
        capture = lambda module, _: module.name == "spatial_stack"  # noqa: E731
        output, captured = golden.model.apply(variables, codes, cond, capture_intermediates=capture)
        return output, captured["intermediates"]["spatial_stack"]["__call__"][0][0]

    return jax.jit(run)(golden.variables, codes, golden.io.get("cond"))


def test_rqtransformer_forward(transformer):
    io = transformer.io
    output, stack_output = forward(transformer, io["codes"])
    assert_close(output.logits, io["logits"])
    assert_close(output.hidden.reshape(-1, *output.hidden.shape[-2:]), io["head_out"])
    assert_close(stack_output, io["body_out"])
    assert ("cond_logits" in io) == (output.cond_logits is not None)
    if "cond_logits" in io:
        assert_close(output.cond_logits, io["cond_logits"])
    assert_close(forward(transformer, io["random_codes"])[0].logits, io["random_codes.logits"])


def total_loss(golden: Golden, params):
    """The loss of the original, on soft codes and for text with a tenth on the condition; and its parts."""
    io = golden.io
    output = golden.model.apply({**golden.variables, "params": params}, io["codes"], io.get("cond"))
    hard = losses.cross_entropy(output.logits, io["codes"])
    soft = losses.soft_cross_entropy(output.logits, io["soft_targets"])
    parts = {
        "loss_hard": hard.mean(),
        "loss_soft": soft.mean(),
        "codebook_loss_hard": hard.mean((0, 1, 2)),
        "codebook_loss_soft": soft.mean((0, 1, 2)),
        "loss_total": soft.mean(),
    }
    if output.cond_logits is not None:
        parts["cond_loss"] = losses.cross_entropy(output.cond_logits, io["cond"][:, 1:]).mean()
        parts["loss_total"] = 0.9 * parts["loss_soft"] + 0.1 * parts["cond_loss"]
    return parts["loss_total"], parts


def in_official_names(golden: Golden, params) -> dict[str, np.ndarray]:
    """Gradients by the names of the original: the table read from right to left."""
    official = {}
    for rule in golden.table.rules:
        array = {"params": params}
        for part in rule.path.split("/"):
            array = array[part]
        theirs, ours = rule.pattern.split(" -> ")
        sizes = {axis: size for axis, size in rule.sizes.items() if axis in rule.pattern}
        official.update(zip(rule.keys, rearrange(np.asarray(array), f"{ours} -> {theirs}", **sizes), strict=True))
    return official


def test_rqtransformer_losses_and_gradients(transformer):
    io = transformer.io
    grads, parts = jax.jit(jax.grad(lambda params: total_loss(transformer, params), has_aux=True))(
        transformer.variables["params"]
    )
    for name, value in parts.items():
        assert_close(value, io[name], name)
    grads = in_official_names(transformer, grads)
    names = {key.removeprefix("grad_norm.") for key in io if key.startswith("grad_norm.")}
    assert names == set(grads)
    assert transformer.zero_up_to_rounding
    for name, grad in grads.items():
        if f"grad_norm.{name}" in transformer.zero_up_to_rounding:
            assert np.linalg.norm(grad) < 1e-6, name
        else:
            assert_close(np.linalg.norm(grad), io[f"grad_norm.{name}"], name)
        if f"grad.{name}" in io:
            assert_close(grad, io[f"grad.{name}"], name)


@pytest.fixture(scope="module")
def replay(transformer):
    """Logits (h * w * D, B, K) of each step of the cached sampler that draws given codes."""
    model, (h, w, D), cond = transformer.model, transformer.model.code_shape, transformer.io.get("cond")

    @jax.jit
    def run(variables, codes):
        codes_TBD = rearrange(codes, "b h w d -> (h w) b d")

        def at_position(context, cache, codes_BD):
            logits = []
            for d in range(D):
                hidden, cache = model.apply(variables, context, codes_BD[:, :d], cache, method="depth")
                logits.append(model.apply(variables, hidden, d, method="classify"))
            return cache, jnp.stack(logits)

        def step(cache, codes_before_and_here):
            before_BD, here_BD = codes_before_and_here
            context, _, cache = model.apply(variables, before_BD[:, None], None, cache, method="spatial")
            return at_position(context[:, 0], cache, here_BD)

        B = codes.shape[0]
        start = jnp.zeros((B, 1), jnp.int32) if cond is None else cond
        cache = model.apply(variables, B, method="init_cache")
        nothing = jnp.zeros((B, 0, D), jnp.int32)
        context, _, cache = model.apply(variables, nothing, start, cache, method="spatial")
        cache, first = at_position(context[:, -1], cache, codes_TBD[0])
        _, rest = jax.lax.scan(step, cache, (codes_TBD[:-1], codes_TBD[1:]))
        return jnp.concatenate([first[None], rest]).reshape(h * w * D, B, -1)

    return lambda codes: run(transformer.variables, codes)


@pytest.mark.parametrize("transformer", helpers.others_slow(TRANSFORMERS, ["rqt-class"]), indirect=True)
def test_rqtransformer_greedy_sampling(transformer, replay, monkeypatch):
    io = transformer.io
    if transformer.model.is_conditional:  # how a cache grows in stretches does not depend on the condition
        monkeypatch.setattr(draws, "_MAX_STRETCHES", 1)
    logits = replay(io["greedy_codes"])
    assert_close(logits, io["greedy_step_logits"])
    second, best = np.moveaxis(np.sort(logits, -1)[..., -2:], -1, 0)
    within = dict(rtol=0, atol=TOLERANCE * np.abs(logits).max())
    np.testing.assert_allclose(best - second, io["greedy_margin"], **within)
    arguments = dict(cond=io.get("cond"), top_k=1)
    rng = jax.random.key(0)
    codes = sampling.generate(transformer.model, transformer.variables, rng, 2, **arguments)
    np.testing.assert_array_equal(codes, io["greedy_codes"])
    h, w, D = transformer.model.code_shape
    row, column = io["start_loc"]
    prefix = io["random_codes"].reshape(2, h * w, D)[:, : int(row * w + column)]
    assert 0 < prefix.shape[1] < h * w
    codes = sampling.generate(transformer.model, transformer.variables, rng, 2, prefix=prefix, **arguments)
    np.testing.assert_array_equal(codes, io["greedy_from_prefix_codes"])


def test_rqtransformer_sampled_trajectory(transformer, replay):
    io = transformer.io
    logits = replay(io["trajectory_codes"])
    assert_close(sampling.filter_logits(logits, temperature=0.9, top_k=20, top_p=0.9), io["trajectory_probs"])


# --- the filter ---------------------------------------------------------------------------------------------


def test_sampling_filter(goldens):
    with np.load(goldens / "sampling-filter.io.npz") as file:
        io = dict(file)
    filter_logits = jax.jit(sampling.filter_logits)
    for i, (temperature, top_k, top_p) in enumerate(zip(io["temperature"], io["top_k"], io["top_p"], strict=True)):
        probabilities = np.asarray(filter_logits(io["logits"], temperature, top_k, top_p))
        clear = io["unambiguous"][i]
        assert clear.any()
        np.testing.assert_allclose(probabilities[clear], io["probs"][i][clear], rtol=0, atol=1e-6)
        kept, expected = (probabilities > 0).sum(-1), (io["probs"][i] > 0).sum(-1)
        assert np.abs(kept - expected)[~clear].max(initial=0) <= 1
        kept_logits = np.where(io["topk_only_kept"][i], io["logits"].astype(np.float64) / temperature, -np.inf)
        expected = np.exp(kept_logits - kept_logits.max(-1, keepdims=True))
        expected /= expected.sum(-1, keepdims=True)
        only_top_k = filter_logits(io["logits"], temperature, top_k)
        np.testing.assert_allclose(only_top_k, expected, rtol=0, atol=1e-6)


def test_sampling_filter_takes_nan_as_impossible(goldens):
    with np.load(goldens / "sampling-filter.io.npz") as file:
        io = dict(file)
    # At the smaller top_k of the two the original counts a NaN among the k largest.
    whole = int(np.argmax(io["nan.top_k"]))
    probabilities = sampling.filter_logits(io["nan.logits"], 1.0, io["nan.top_k"][whole], io["nan.top_p"][whole])
    np.testing.assert_allclose(probabilities, io["nan.probs"][whole], rtol=0, atol=1e-6)

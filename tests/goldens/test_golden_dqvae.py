"""DQ-VAE against the original PyTorch code, array by array: evaluation, two training passes, gradients.

Floating-point arrays agree within 1e-5 of their largest value, gradients within 1e-4, grains and codes exactly.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import losses, models, quantize
from rq_jax.interop import official
from rq_jax.interop.official.rules import Table, export_state
from rq_jax.models.coder import PositionBias

STRUCTURES = {"dqvae-entropy": (), "dqvae-feature": (20.0,), "dqvae-triple": (1.0, 1.0)}  # weights of the budget
TRAIN = "train.0."
GRAINS = ("coarse", "median", "fine")
CODEBOOK = {"weight": "codebook_KE", "cluster_size_ema": "counts_K", "embed_ema": "sums_KE"}


def read_codebook(io, prefix):
    """The collection "codebook", without the official row of padding."""
    arrays = {ours: io[prefix + theirs] for theirs, ours in CODEBOOK.items()}
    return {**arrays, "codebook_KE": arrays["codebook_KE"][:-1]}


def nhwc(array):
    return jnp.moveaxis(jnp.asarray(array), -3, -1)


def assert_close(actual, expected, name="", tolerance=1e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


@pytest.fixture(scope="module", params=STRUCTURES)
def golden(request, dq_goldens):
    """(arrays, model, variables, weights of the budget, names of gradients that vanish)."""
    name = request.param
    io, state = ({**np.load(dq_goldens / f"{name}.{kind}.npz")} for kind in ("io", "state"))
    config = json.loads((dq_goldens / f"{name}.config.json").read_text())
    settings = official.dqvae_settings(config) | {"use_restart": False}
    if settings["router"] == "entropy":
        settings["thresholds"] = (config["golden"]["threshold_in_force"],)
    model = models.create("dqvae", **settings)
    variables = jax.device_put(official.dqvae_variables(state, settings))
    entries = json.loads((dq_goldens / "tolerances.json").read_text())[name]
    zeros = {key for key, entry in entries.items() if isinstance(entry, dict) and entry.get("zero_up_to_rounding")}
    return io, model, variables, STRUCTURES[name], zeros


def inner(model, images):
    """What a forward pass is made of."""
    features = model.encoder(images)
    merged, routing, _ = model._encode(images)
    output = model(images)
    after = model.post_quant_conv(output.partial_sums[..., -1, :])
    bias = PositionBias().apply({"params": model.decoder.variables["params"]["position_bias"]}, jnp.zeros_like(after))
    return output, features, merged, routing, after, bias, model.decode_codes(output.codes)


@pytest.fixture(scope="module")
def evaluated(golden):
    io, model, variables, _, _ = golden
    run = jax.jit(lambda variables, images: model.apply(variables, images, method=inner))
    return run(variables, nhwc(io["images"]))


def test_evaluation(golden, evaluated):
    io, model, variables, _, _ = golden
    output, features, merged, routing, after, bias, decoded = evaluated
    for g, grain in enumerate(GRAINS if model.num_grains == 3 else GRAINS[::2]):
        assert_close(features[g], nhwc(io[f"h_{grain}"]), grain)
    if model.router == "feature":
        assert_close(output.scores, io["gate_logits"])
    else:
        np.testing.assert_allclose(output.scores, io["patch_entropy"], rtol=0, atol=1e-5)
        legacy = model.clone(entropy_bins="legacy").apply(variables, nhwc(io["images"]), method="route")
        np.testing.assert_allclose(legacy.scores, io["patch_entropy_legacy01"], rtol=0, atol=1e-5)
        assert_close(decoded, nhwc(io["decode_code"]))
    for actual in (output.grains, routing.grains, output.gates.argmax(-1)):
        np.testing.assert_array_equal(actual, io["grain_map"])
    np.testing.assert_array_equal(output.cell_weights, io["codebook_mask"][:, 0])
    np.testing.assert_array_equal(output.codes[..., 0], io["codes"])
    assert_close(merged, nhwc(io["merged"]))
    assert_close(output.latents, nhwc(io["z_e"]))
    assert_close(output.partial_sums[..., 0, :], nhwc(io["z_q"]))
    loss = losses.commitment_loss(output.latents, output.partial_sums, output.cell_weights)
    assert_close(1.25 * loss, io["quant_loss"])
    assert_close(after, nhwc(io["post_quant"]))
    assert_close(bias[:1], nhwc(io["position_bias"]))
    assert_close(after + bias, nhwc(io["decoder_in"]))
    assert_close(output.reconstruction, nhwc(io["recon"]))
    assert_close(decoded, nhwc(io["recon"]))  # the original decodes codes with an entropy router alone


@pytest.fixture(scope="module")
def trained(golden):
    """For two passes in a row: output, terms, codebook after; the gradient of the first pass's objective."""
    io, model, variables, weights, _ = golden

    def objective(params, codebook, images, noise):
        output, mutated = model.apply(
            {"params": params, "codebook": codebook}, images, train=True, gate_noise=noise, mutable=["codebook"]
        )
        terms = {
            "l1": losses.reconstruction_loss(images, output.reconstruction, "l1"),
            "mse": losses.reconstruction_loss(images, output.reconstruction),
            "quant_loss": 1.25 * losses.commitment_loss(output.latents, output.partial_sums, output.cell_weights),
        }
        if weights:
            terms["budget_loss"] = losses.budget_loss(output.gates, model.budget_targets, weights)
        # The table has no gradient: of the loss of the codes, 0.25 has one.
        total = terms["mse"] + 0.2 * terms["quant_loss"] + terms.get("budget_loss", 0.0)
        return total, (output, terms, mutated["codebook"])

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    codebook, passes, first = variables["codebook"], [], None
    for i in range(2):
        noise = io.get(f"train.{i}.gumbel_noise")
        (_, (output, terms, codebook)), grads = step(variables["params"], codebook, nhwc(io["train_images"][i]), noise)
        passes.append((output, terms, codebook))
        first = grads if first is None else first
    return passes, first


def test_two_training_passes(golden, trained):
    io, model, _, _, _ = golden
    for i, (output, terms, codebook) in enumerate(trained[0]):
        prefix = f"train.{i}."
        np.testing.assert_array_equal(output.grains, io[f"{prefix}grain_map"])
        np.testing.assert_array_equal(output.codes[..., 0], io[f"{prefix}codes"])
        for name, value in terms.items():
            assert_close(value, io[prefix + name], name)
        for name, expected in read_codebook(io, f"{prefix}codebook.").items():
            assert_close(codebook[name], expected, name)
        if model.router == "feature":
            assert_close(output.scores, io[f"{prefix}gate_logits"])
            np.testing.assert_allclose(output.gates, np.moveaxis(io[f"{prefix}gate"], 1, -1), rtol=0, atol=1e-6)
            assert set(np.unique(output.gates)) == {0.0, 1.0}  # exactly, where the original may be an ulp off
    output, terms, _ = trained[0][0]
    assert_close(output.latents, nhwc(io["train.0.z_e"]))
    assert_close(output.reconstruction, nhwc(io["train.0.recon"]))
    total = terms["mse"] + terms["quant_loss"] + terms.get("budget_loss", 0.0)
    assert_close(total, io["train.0.total"])


def test_unused_codes_restart_as_there(golden):
    """From the vectors of a pass with gate noise of its own, which the draw of the original permutes."""
    io, model, variables, _, _ = golden
    noise, images = io.get("restart.gumbel_noise"), nhwc(io["train_images"][0])
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, gate_noise=noise, mutable=["codebook"])[0])
    output = run(variables, images)
    np.testing.assert_array_equal(output.grains, io["restart.grain_map"])
    np.testing.assert_array_equal(output.codes[..., 0], io["restart.codes"])
    loss = losses.commitment_loss(output.latents, output.partial_sums, output.cell_weights)
    assert_close(1.25 * loss, io["restart.quant_loss"])
    state, x_NE = quantize.CodebookState(**variables["codebook"]), output.latents.reshape(-1, model.code_dim)
    rows_KE = x_NE[io["restart.perm"][: model.codebook_size]]
    after = quantize.ema_update(state, x_NE, output.codes.ravel(), model.codebook_decay, rows_KE)
    for name, expected in read_codebook(io, "restart.codebook.").items():
        assert_close(getattr(after, name), expected, name)


def test_gate_softmax_and_merged_latent_of_training(golden, trained):
    io, model, variables, _, _ = golden
    noise = io.get("train.0.gumbel_noise")

    def merged(model, images):
        return model._encode(images, train=True, gate_noise=noise)[0]

    images = nhwc(io["train_images"][0])
    assert_close(jax.jit(lambda v, x: model.apply(v, x, method=merged))(variables, images), nhwc(io["train.0.merged"]))
    if noise is not None:
        assert_close(jax.nn.softmax(trained[0][0][0].scores + noise), io["train.0.gate_soft"])


def test_every_gradient(golden, trained):
    io, model, variables, _, zeros = golden
    table = official.dqvae_table(models.settings_of(model))
    rules = [rule for rule in table.rules if rule.path.startswith("params/")]
    gradients = export_state({"params": jax.device_get(trained[1])}, Table(rules, {}))
    seen, full = 0, 0
    norms = [key for key in io if key.startswith(f"{TRAIN}grad_norm.")]
    assert len(norms) == len(jax.tree.leaves(variables["params"]))
    for key in norms:
        name = key.removeprefix(f"{TRAIN}grad_norm.")
        grad = gradients[name]
        if key in zeros:
            assert np.linalg.norm(grad) < 1e-6, name
        else:
            assert_close(np.linalg.norm(grad), io[key], name, 1e-4)
            seen += 1
        if (whole := io.get(f"{TRAIN}grad.{name}")) is not None:
            assert_close(grad, whole, name, 1e-4)
            full += 1
    assert seen > 0.8 * len(norms) and full == sum(key.startswith(f"{TRAIN}grad.") for key in io) >= 9


def test_released_structures_have_the_published_parameters(dq_goldens):
    """Collection "params" of the released configs: 1025 x 256 below the official counts, on shapes alone."""
    published = json.loads((dq_goldens / "released-shapes.json").read_text())
    kinds = {
        "dqvae-entropy-dual-r05_imagenet": (47_571_331, dict(router="entropy", thresholds=(1.67778,))),
        "dqvae-dual-r-05_imagenet": (47_836_037, dict(router="feature")),
        "dqvae-triple-r-03-03_imagenet": (73_748_102, dict(router="feature", fine_ratio=(0.3, 0.3), num_grains=3)),
    }
    for name, (count, own) in kinds.items():
        entry = published[name]
        encoder = entry["model"]["params"]["encoderconfig"]["params"]
        model = models.create(
            "dqvae", image_size=256, code_dim=256, codebook_size=1024, width_multipliers=encoder["ch_mult"],
            attention_resolutions=encoder["attn_resolutions"], **own,
        )  # fmt: skip
        shapes = models.abstract_variables(model)["params"]
        leaves = {tuple(k.key for k in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
        assert sum(map(np.prod, leaves.values())) == count == entry["parameters"] - 1025 * 256

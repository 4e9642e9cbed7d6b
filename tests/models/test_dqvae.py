"""The DQ-VAE: shapes, routers, switches, what its methods promise of each other.

Tests 5, 6 and 13 of the fifteen that the design asks of DQ-VAE stand here, as far as the model has a part in them; its parity is in
goldens/test_golden_dqvae.py.
"""

import functools
import inspect

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import grains, losses, quantize
from rq_jax.grains import GrainedCodes
from rq_jax.models import TOKENIZERS, create, init_variables, router
from rq_jax.models.dqvae import DQVAE

B, K, E = 2, 7, 6  # K is the number of no grid's cells
H, W, C = 8, 12, 3
BASE = dict(
    image_size=(H, W), code_dim=E, codebook_size=K, width=4, norm_groups=2, width_multipliers=(1, 2, 2),
    num_res_blocks=1, attention_resolutions=(4,), z_channels=5, thresholds=(2.0,),
)  # fmt: skip
TRIPLE = dict(num_grains=3, thresholds=(1.5, 2.5), fine_ratio=(0.3, 0.3), code_depth=2, in_channels=1)
IMAGES = np.random.default_rng(0).integers(0, 256, (B, H, W, C)).astype(np.float32) / 127.5 - 1
IMAGES[:, :4] = 0.1  # upper regions have nothing to code


def images_of(model):
    return IMAGES[..., : model.in_channels]


@functools.cache
def build(**settings):
    """A model and random variables, every bias and norm included."""
    if settings.get("router", "entropy") != "entropy":
        settings["thresholds"] = None
    model = create("dqvae", **{**BASE, **settings})
    return model, helpers.filled_variables(model)


@functools.partial(jax.jit, static_argnames=("model", "method", "depth"))
def run(model, variables, *arguments, method="__call__", **settings):
    """A method of the model, evaluated."""
    return model.apply(variables, *arguments, method=method, **settings)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, images, rngs, **settings):
    """A training call: the output and the codebook after it."""
    return model.apply(variables, images, True, rngs=rngs, mutable=["codebook"], **settings)


def keys(seed=0):
    rng = jax.random.key(seed)
    return {name: jax.random.fold_in(rng, i) for i, name in enumerate(("gate", "restart", "dropout"))}


# --- shapes and methods ---------------------------------------------------------------------------

KINDS = {
    "entropy": {},
    "feature": dict(router="feature"),
    "random": dict(router="random"),
    "three grains, grey, two codes a cell": TRIPLE,
    "three grains by features": {**TRIPLE, "router": "feature"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    model, variables = build(**KINDS[kind])
    images, G, D = images_of(model), model.num_grains, model.code_depth
    h, w = (4, 6) if G == 2 else (8, 12)
    assert model.region_grid == (2, 3) and model.latent_grid == (h, w) and model.code_shape == (h, w, D)
    assert variables["params"]["decoder"]["position_bias"]["rows"].shape == (h, 5)
    output = run(model, variables, images)
    shapes = dict(
        reconstruction=images.shape, codes=(B, h, w, D), latents=(B, h, w, E), partial_sums=(B, h, w, D, E),
        grains=(B, 2, 3), gates=(B, 2, 3, G), cell_weights=(B, h, w),
        scores=(B, 2, 3, G) if model.router == "feature" else (B, 2, 3),
    )  # fmt: skip
    assert {name: getattr(output, name).shape for name in output._fields} == shapes
    assert output.codes.dtype == output.grains.dtype == jnp.int32
    np.testing.assert_array_equal(output.gates, np.eye(G)[output.grains])
    np.testing.assert_array_equal(output.cell_weights, grains.cell_weights(output.grains, G))


def everything(model, images):
    """All methods, in one program."""
    codes = model.encode_to_codes(images)
    other_map = codes._replace(grains=1 - jnp.minimum(codes.grains, 1))
    return dict(
        output=model(images), codes=codes, routing=model.route(images), latents=model.encode(images),
        decoded=[model.decode_codes(form) for form in (codes, codes.codes, other_map)],
        by_depth=model.reconstruct_by_depth(images), soft=model.soft_codes(images, 0.5),
        first=[model.decode_codes(codes, depth=d + 1) for d in range(model.code_depth)],
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    helpers.others_slow(
        ["random", "three grains, grey, two codes a cell", "three grains by features"],
        ["three grains, grey, two codes a cell"],
    ),
)
def test_methods_agree_with_the_forward_pass(kind):
    model, variables = build(**KINDS[kind])
    images = images_of(model)
    got = run(model, variables, images, method=everything)
    output, codes = got["output"], got["codes"]
    assert isinstance(codes, GrainedCodes)
    np.testing.assert_array_equal(codes.codes, output.codes)
    for grain_map in (codes.grains, got["routing"].grains):
        np.testing.assert_array_equal(grain_map, output.grains)
    np.testing.assert_allclose(got["routing"].scores, output.scores, atol=1e-5)
    np.testing.assert_allclose(got["latents"], output.latents, atol=1e-5)
    for decoded in got["decoded"]:
        np.testing.assert_allclose(decoded, output.reconstruction, rtol=1e-4, atol=1e-4)
    assert got["by_depth"].shape == (model.code_depth, *images.shape)
    np.testing.assert_allclose(got["by_depth"], got["first"], rtol=1e-4, atol=1e-4)
    soft, hard = got["soft"]
    assert soft.shape == (*output.codes.shape, K)
    np.testing.assert_array_equal(hard, output.codes)


def test_how_fresh_variables_start():
    model = create("dqvae", **BASE)

    @jax.jit
    def draw(rng):
        variables = init_variables(model, rng)
        return variables["codebook"], variables["params"]["decoder"]["position_bias"]

    codebook, position = draw(jax.random.key(0))
    assert 0.5 / K < np.abs(codebook["codebook_KE"]).max() <= 1 / K
    np.testing.assert_array_equal(codebook["sums_KE"], codebook["codebook_KE"])
    assert 1 < np.abs(position["kernel"]).max() <= np.sqrt(9 / 2)
    assert np.abs(position["bias"]).max() <= np.sqrt(1 / 2)
    assert 1 < max(np.abs(position[name]).max() for name in ("rows", "columns")) <= 2
    assert TOKENIZERS == ("rqvae", "dqvae")


# --- 5: routers -----------------------------------------------------------------------------------


def test_5_drawn_gates_are_exactly_one_hot_and_evaluation_takes_the_best():
    model, variables = build(router="feature")
    drawn = [train(model, variables, IMAGES, keys(seed))[0] for seed in range(3)]
    for output in drawn:
        assert set(np.unique(output.gates)) == {0.0, 1.0}
        np.testing.assert_array_equal(output.gates, np.eye(2)[output.grains])
        np.testing.assert_allclose(output.scores, drawn[0].scores, atol=1e-5)
    assert any(not np.array_equal(output.grains, drawn[0].grains) for output in drawn)
    output = run(model, variables, IMAGES)
    np.testing.assert_array_equal(output.grains, output.scores.argmax(-1))
    noise = np.zeros((B, 2, 3, 2), np.float32)
    noise[..., 0] = 100.0
    given, _ = train(model, variables, IMAGES, {"restart": jax.random.key(0)}, gate_noise=noise)
    assert not given.grains.any()


def test_5_gates_carry_the_gradient_of_the_softmax():
    rng = np.random.default_rng(1)
    logits, noise, weights = (rng.normal(size=(B, 2, 3, 3)).astype(np.float32) for _ in range(3))

    def soft(logits):
        return jnp.sum(weights * jax.nn.softmax(logits + noise))

    def hard(logits):
        return jnp.sum(weights * router.straight_through_gates(logits, noise)[1])

    np.testing.assert_allclose(jax.grad(hard)(logits), jax.grad(soft)(logits), atol=1e-6)
    assert np.abs(jax.grad(hard)(logits)).min() > 0


def test_5_the_images_loss_reaches_logits_and_only_the_chosen_tails():
    """By the product with the winning gate; unchosen tails learn through the router alone."""
    rng = np.random.default_rng(2)
    features = [jnp.asarray(rng.normal(size=(B, 2 << g, 3 << g, 5)).astype(np.float32)) for g in range(3)]
    logits, noise = (rng.normal(size=(B, 2, 3, 3)).astype(np.float32) for _ in range(2))
    chosen, _ = router.straight_through_gates(logits, noise)
    gradients = jax.grad(lambda features: jnp.sum(router.merge(features, chosen) ** 2))(features)
    for g, gradient in enumerate(gradients):
        is_chosen = np.kron(np.asarray(chosen == g), np.ones((1, 1 << g, 1 << g)))
        np.testing.assert_array_equal(np.abs(gradient).max(-1) > 0, is_chosen > 0)
    # All three occur, and the merged map holds what each has.
    assert set(np.unique(chosen)) == {0, 1, 2}
    merged, (b, i, j) = router.merge(features, chosen), np.argwhere(chosen == 0)[0]
    np.testing.assert_array_equal(merged[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].min((0, 1)), features[0][b, i, j])


@pytest.mark.parametrize("map_is_given", [False, True])
def test_5_the_router_learns_from_the_image_unless_its_map_is_given(map_is_given):
    model, variables = build(router="feature")
    given = {"grains": np.zeros((B, 2, 3), np.int32)} if map_is_given else {}

    @jax.jit
    def gradient(params):
        def loss(params):
            call = {**variables, "params": params}
            output, _ = model.apply(call, IMAGES, True, rngs=keys(), mutable=["codebook"], **given)
            return losses.reconstruction_loss(IMAGES, output.reconstruction)

        return jax.grad(loss)(params)

    grads = gradient(variables["params"])
    has_gradient = {name: any(np.any(g) for g in jax.tree.leaves(tree)) for name, tree in grads.items()}
    assert has_gradient.pop("feature_router") is not map_is_given
    assert all(has_gradient.values())


ROUTERS = {
    "one layer": (dict(gate_layers=1), {"norm0", "norm1", "gate"}),
    "two": ({}, {"norm0", "norm1", "hidden", "gate"}),
    "no norms": (dict(use_gate_norm=False), {"hidden", "gate"}),
    "relu": (dict(gate_activation="relu"), {"norm0", "norm1", "hidden", "gate"}),
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_feature_routers(kind):
    settings, names = ROUTERS[kind]
    module = router.FeatureRouter(
        settings.get("gate_layers", 2), settings.get("gate_activation", "silu"), settings.get("use_gate_norm", True), 2
    )
    rng = np.random.default_rng(3)
    features = [rng.normal(size=(B, 2 << g, 3 << g, 4)).astype(np.float32) for g in range(2)]
    params = jax.device_get(module.init(jax.random.key(0), features)["params"])
    assert params.keys() == names == build(router="feature", **settings)[1]["params"]["feature_router"].keys()

    def normed(g):
        x = features[g]
        if "norm0" not in names:
            return x
        groups = x.reshape(B, -1, 2, 2)
        mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)

    fine = normed(1)
    pooled = (fine[:, ::2, ::2] + fine[:, 1::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, 1::2]) / 4
    x = np.concatenate([normed(0), pooled], -1)
    if "hidden" in names:
        x = x @ params["hidden"]["kernel"][0, 0] + params["hidden"]["bias"]
        x = np.maximum(x, 0) if kind == "relu" else x / (1 + np.exp(-x))
    expected = x @ params["gate"]["kernel"][0, 0] + params["gate"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, features), expected, atol=1e-5)


def test_an_entropy_router_goes_by_thresholds():
    model, variables = build(**TRIPLE)
    output = run(model, variables, images_of(model))
    entropies = grains.patch_entropy(images_of(model), 4)
    np.testing.assert_allclose(output.scores, entropies, atol=1e-6)
    np.testing.assert_array_equal(output.grains, grains.route_by_entropy(entropies, np.float32([1.5, 2.5])))
    legacy, _ = build(**TRIPLE, entropy_bins="legacy")
    scores = run(legacy, variables, images_of(model), method="route").scores
    np.testing.assert_allclose(scores, grains.patch_entropy(images_of(model), 4, "legacy"), atol=1e-6)
    assert "feature_router" not in variables["params"]


def test_a_random_router_draws_in_training_and_keeps_a_map_a_picture_otherwise():
    model, variables = build(router="random")
    first, second = (train(model, variables, IMAGES, keys(seed))[0] for seed in (0, 1))
    assert not np.array_equal(first.grains, second.grains)
    expected = run(model, variables, IMAGES, method="route")
    again = run(model, variables, IMAGES[::-1] + np.float32(1e-3), method="route")  # batch mates, rounding
    np.testing.assert_array_equal(again.grains, expected.grains[::-1])
    other = run(model, variables, IMAGES + np.float32(0.1), method="route")
    assert not np.array_equal(other.scores, expected.scores)


@pytest.mark.parametrize("flat", [False, True])
def test_shares_of_a_random_router(flat):
    rng, shares = np.random.default_rng(4), (0.2, 0.5)
    images = np.zeros((1, 256, 256, 1), np.float32) if flat else rng.uniform(-1, 1, (1, 256, 256, 1))
    uniforms = router.hashed_uniforms(jnp.asarray(images, jnp.float32), 4)
    assert uniforms.shape == (1, 64, 64) and 0 <= uniforms.min() and uniforms.max() < 1
    drawn = router.grains_by_share(uniforms, shares)
    np.testing.assert_allclose([np.mean(drawn == g) for g in range(3)], (0.3, *shares), atol=0.03)


@pytest.mark.parametrize("kind", ["entropy", "feature", "random"])
def test_a_given_map_takes_the_place_of_the_routers(kind):
    model, variables = build(**KINDS[kind])
    given = np.array([[[0, 1, 1], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]])
    output, routed = run(model, variables, IMAGES, grains=given), run(model, variables, IMAGES)
    np.testing.assert_array_equal(output.grains, given)
    np.testing.assert_allclose(output.scores, routed.scores, atol=1e-5)
    np.testing.assert_allclose(run(model, variables, IMAGES, grains=given, method="encode"), output.latents, atol=1e-5)
    codes = run(model, variables, IMAGES, grains=given, method="encode_to_codes")
    np.testing.assert_array_equal(codes.codes, output.codes)
    np.testing.assert_array_equal(codes.grains, given)
    trained, _ = train(model, variables, IMAGES, {"restart": jax.random.key(0)}, grains=given)  # nothing is drawn
    np.testing.assert_array_equal(trained.gates, np.eye(2)[given])


# --- 6: codes and their codebook ------------------------------------------------------------------


def test_6_coarse_cells_share_a_code_and_the_loss_counts_it_once():
    model, variables = build()
    given = np.array([[[0, 1, 1], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]])
    output = run(model, variables, IMAGES, grains=given)
    cells = np.asarray(output.codes)[..., 0].reshape(B, 2, 2, 3, 2).transpose(0, 1, 3, 2, 4).reshape(B, 2, 3, 4)
    coarse = given == 0
    assert np.all(cells[coarse] == cells[coarse][:, :1])
    assert np.any(cells[~coarse] != cells[~coarse][:, :1])
    weights = np.where(np.kron(given, np.ones((1, 2, 2))) == 1, 1, 0.25)
    distances = (output.latents - output.partial_sums[..., 0, :]) ** 2
    loss = losses.commitment_loss(output.latents, output.partial_sums, output.cell_weights)
    np.testing.assert_allclose(loss, np.mean(weights[..., None] * distances), rtol=1e-5)


@pytest.mark.parametrize("use_code_weights", [False, True])
def test_6_the_moving_average_counts_cells_or_codes(use_code_weights):
    model, variables = build(use_code_weights=use_code_weights, use_restart=False)
    output, changed = train(model, variables, IMAGES, None)
    state = quantize.CodebookState(**variables["codebook"])
    weights = output.cell_weights.ravel() if use_code_weights else None
    x_NE, codes_N = output.latents.reshape(-1, E), output.codes.ravel()
    expected = quantize.ema_update(state, x_NE, codes_N, 0.99, weights_N=weights)
    for name, value in changed["codebook"].items():
        np.testing.assert_allclose(value, getattr(expected, name), atol=1e-5, err_msg=name)
    counted = float(100 * changed["codebook"]["counts_K"].sum())
    total = grains.num_codes(output.grains, 2).sum() if use_code_weights else output.codes.size
    np.testing.assert_allclose(counted, total, rtol=1e-4)
    assert total < output.codes.size or not use_code_weights


# --- precision ------------------------------------------------------------------------------------


def test_bfloat16_networks_keep_router_entropy_and_quantiser_in_float32():
    for settings in ({}, dict(router="feature")):
        (model, variables), (half, half_variables) = build(**settings), build(**settings, dtype="bfloat16")
        assert {a.dtype for a in jax.tree.leaves(half_variables)} == {jnp.dtype("float32")}
        output, expected = run(half, variables, IMAGES), run(model, variables, IMAGES)
        floats = ("reconstruction", "latents", "partial_sums", "gates", "scores", "cell_weights")
        assert {getattr(output, name).dtype for name in floats} == {jnp.dtype("float32")}
        assert not np.array_equal(output.latents, expected.latents)
        exact = quantize.residual_quantize(output.latents, variables["codebook"]["codebook_KE"], 1)
        np.testing.assert_array_equal(output.codes, exact.codes)
        scale = float(jnp.abs(expected.scores).max())
        np.testing.assert_allclose(output.scores, expected.scores, atol=(0.05 if settings else 0) * scale)
        trained = jax.eval_shape(
            lambda v, m=half: m.apply(v, IMAGES, True, rngs=keys(), mutable=["codebook"]), variables
        )
        assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32"), jnp.dtype("int32")}


# --- 13: the decoder ------------------------------------------------------------------------------


@pytest.mark.parametrize("position_bias", ["fourier+learned", "fourier", "none"])
def test_13_only_a_position_bias_tells_the_decoder_where_it_is(position_bias):
    """With kernels that are their own mirror images, mirrored codes give the mirrored picture, but for the bias."""
    model, variables = build(position_bias=position_bias)
    params = jax.tree.map(lambda x: (x + x[:, ::-1]) / 2 if x.ndim == 4 else x, variables["params"])
    variables = {**variables, "params": params}
    codes = np.random.default_rng(5).integers(0, K, (B, 4, 6, 1))
    image = run(model, variables, codes, method="decode_codes")
    mirrored = run(model, variables, codes[:, :, ::-1], method="decode_codes")[:, :, ::-1]
    difference = float(jnp.abs(image - mirrored).max())
    assert difference < 1e-4 if position_bias == "none" else difference > 1e-2
    expected = {"fourier+learned": {"kernel", "bias", "rows", "columns"}, "fourier": {"kernel", "bias"}}
    assert params["decoder"].get("position_bias", {}).keys() == expected.get(position_bias, set())


def test_13_the_decoder_sees_no_grain_map():
    assert "grains" not in inspect.signature(DQVAE.decode).parameters
    assert "grains" not in inspect.signature(DQVAE.decode_codes).parameters


def test_the_decoder_has_sizes_of_its_own():
    own = dict(
        decoder_width=6, decoder_width_multipliers=(1, 3), decoder_num_res_blocks=2, decoder_attention_resolutions=()
    )
    (model, variables), (_, plain) = build(**own), build()
    decoder, usual = variables["params"]["decoder"], plain["params"]["decoder"]
    assert decoder["conv_in"]["kernel"].shape == (3, 3, 5, 18) and usual["conv_in"]["kernel"].shape == (3, 3, 5, 8)
    assert "level1_block2" in decoder and "level1_block2" not in usual
    assert "level1_attention0" in usual and not any("level1_attention" in name for name in decoder)
    assert variables["params"]["encoder"].keys() == plain["params"]["encoder"].keys()
    assert run(model, variables, IMAGES).reconstruction.shape == IMAGES.shape


# --- mistakes -------------------------------------------------------------------------------------

SETTINGS = {
    "fewer levels than grains": (
        dict(num_grains=4, thresholds=(1.0, 2.0, 3.0)),
        r"^model.num_grains: 4 is outside 2..3, the levels of the encoder$",
    ),
    "one grain": (dict(num_grains=1), r"^model.num_grains: 1 is outside 2..3, the levels of the encoder$"),
    "no whole regions": (
        dict(image_size=(8, 14)),
        r"^model.image_size: W = 14 must be a positive multiple of 4, the pixels of a region$",
    ),
    "decoder levels": (
        dict(decoder_width_multipliers=(1, 1, 2)),
        r"^model.decoder_width_multipliers: \(1, 1, 2\) has 3 levels, which do not lead from the code grid \(4, 6\) to "
        r"the image; give 2$",
    ),
    "decoder width": (dict(decoder_width=0), r"^model.decoder_width: 0 must be at least 1$"),
    "decoder multipliers": (
        dict(decoder_width_multipliers=(1, 0)),
        r"^model.decoder_width_multipliers: \(1, 0\) must be one positive integer a level, at least one$",
    ),
    "ratio of 0": (dict(fine_ratio=0.0), r"^model.fine_ratio: 0.0 is outside \(0, 1\); without it, use one grain less$"),
    "ratio of 1": (dict(fine_ratio=1.0), r"^model.fine_ratio: 1.0 is outside \(0, 1\)"),
    "too many ratios": (dict(fine_ratio=(0.2, 0.3)), r"^model.fine_ratio: \(0.2, 0.3\) has 2 entries; give 1,"),
    "ratios above 1": (
        {**TRIPLE, "fine_ratio": (0.6, 0.6)},
        r"^model.fine_ratio: \(0.6, 0.6\) add up to 1.2; grain 0 has what they leave of 1$",
    ),
    "no thresholds": (dict(thresholds=None), r"^model.thresholds: unset, but the router goes by entropy; measure them"),
    "too many thresholds": (dict(thresholds=(1.0, 2.0)), r"^model.thresholds: shape \(2,\) does not fit; allowed is \(1,\)"),
    "thresholds that fall": (
        {**TRIPLE, "thresholds": (2.0, 1.0)},
        r"^model.thresholds: \[2.0, 1.0\] must be finite and increasing",
    ),
    "thresholds for another router": (
        dict(router="random"),
        r"^model.thresholds: \(2.0,\) is read by 'entropy' only, not by 'random'; leave them out$",
    ),
    "router": (dict(router="dice"), r"^model.router: 'dice' is unknown; allowed are 'entropy', 'feature' and 'random'$"),
    "bins": (dict(entropy_bins="old"), r"^model.entropy_bins: 'old' is unknown"),
    "gate layers": (dict(gate_layers=3), r"^model.gate_layers: 3 is outside 1..2, the layers of a feature router$"),
    "gate activation": (dict(gate_activation="tanh"), r"^model.gate_activation: 'tanh' is unknown"),
    "position bias": (dict(position_bias="learned"), r"^model.position_bias: 'learned' is unknown; allowed are 'fourier"),
    "colours": (dict(in_channels=4), r"^model.in_channels: 4 has no entropy, which is of gray or RGB; take 1 or 3, or"),
    "depth": (dict(code_depth=0), r"^model.code_depth: 0 must be at least 1$"),
    "code shape": (dict(code_shape=(4, 6, 1)), r"^model.code_shape: unknown; allowed are attention_resolutions, code_de"),
    "sides": (dict(image_size=(8, 12, 3)), r"^model.image_size: \(8, 12, 3\) is no size of an image; give one side, or \("),
    "codebook": (dict(codebook_init="ones"), r"^model.codebook_init: 'ones' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SETTINGS)
def test_wrong_settings_get_one_line(mistake):
    settings, message = SETTINGS[mistake]
    with pytest.raises(ValueError, match=message):
        create("dqvae", **{**BASE, **settings})


def test_one_ratio_is_that_of_each_grain():
    assert create("dqvae", **{**BASE, **TRIPLE, "fine_ratio": 0.3}).shares == (0.3, 0.3)


MAP = np.zeros((B, 2, 3), np.int32)
CALLS = {
    "a map of another shape": (
        lambda m, v: m.apply(v, IMAGES, grains=MAP[:, :1]),
        r"^grains: shape \(2, 1, 3\) does not fit; allowed is \(2, 2, 3\)",
    ),
    "a map of other images": (
        lambda m, v: m.apply(v, IMAGES, MAP[:1], method="encode"),
        r"^grains: shape \(1, 2, 3\) does not fit",
    ),
    "a grain too many": (
        lambda m, v: m.apply(v, IMAGES, MAP + 2, method="encode_to_codes"),
        r"^grains: 2 at \(0, 0, 0\) is outside 0..1, the grains",
    ),
    "a grain below 0": (lambda m, v: m.apply(v, IMAGES, grains=MAP - 1), r"^grains: -1 at \(0, 0, 0\) is outside 0..1"),
    "half a grain": (lambda m, v: m.apply(v, IMAGES, grains=MAP + 0.5), r"^grains: float64 is no type of integers"),
    "noise for another router": (
        lambda m, v: m.apply(v, IMAGES, True, gate_noise=np.zeros((B, 2, 3, 2)), mutable=["codebook"]),
        r"^gate_noise: nothing reads it but a feature router that trains without given grains",
    ),
    "images of another size": (
        lambda m, v: m.apply(v, IMAGES[:, :4], method="route"),
        r"^images: shape \(2, 4, 12, 3\) does not fit",
    ),
    "images of integers": (
        lambda m, v: m.clone(router="random", thresholds=None).apply(v, np.zeros(IMAGES.shape, np.uint8), method="route"),
        r"^images: dtype uint8 is not floating-point; scale them to \[-1, 1\]",
    ),
    "codes in a list, of another shape": (
        lambda m, v: m.apply(v, [[0, 1]], method="decode_codes"),
        r"^codes: shape \(1, 2\) does not fit; allowed is \(B, 4, 6, 1\)",
    ),
    "codes of floats": (
        lambda m, v: m.apply(v, np.zeros((B, 4, 6, 1)).tolist(), method="decode_codes"),
        r"^codes: dtype float64 must be an integer type",
    ),
    "codes outside the codebook": (
        lambda m, v: m.apply(v, GrainedCodes(jnp.full((B, 4, 6, 1), K), MAP), method="decode_codes"),
        r"^codes: 7 at depth 0 is outside \[0, 7\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CALLS)
def test_wrong_arguments_get_one_line(mistake):
    call, message = CALLS[mistake]
    with pytest.raises(ValueError, match=message):
        call(*build())


def test_images_may_be_a_list():
    model, variables = build()
    routing = model.apply(variables, np.asarray(IMAGES).tolist(), method="route")
    np.testing.assert_array_equal(routing.grains, model.apply(variables, IMAGES, method="route").grains)


def test_a_router_that_draws_asks_for_its_stream():
    for settings in (dict(router="feature"), dict(router="random")):
        model, variables = build(**settings)
        with pytest.raises(
            ValueError, match="^rngs: a router that draws needs the stream 'gate'; pass rngs={'gate': key}"
        ):
            jax.eval_shape(lambda v, m=model: m.apply(v, IMAGES, True, mutable=["codebook"]), variables)
    with pytest.raises(ValueError, match=r"^gate_noise: shape \(2, 2, 3\) does not fit; allowed is \(2, 2, 3, 2\)"):
        model, variables = build(router="feature")
        jax.eval_shape(lambda v: model.apply(v, IMAGES, True, gate_noise=MAP.tolist(), mutable=["codebook"]), variables)

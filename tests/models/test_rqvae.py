"""The RQ-VAE: shapes, switches, what its methods promise of each other."""

import functools

import flax
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import losses, quantize
from rq_jax.models import abstract_variables, create, init_variables

B, h, w, D, K, E = 2, 3, 5, 4, 7, 6
H, W, C = 6, 10, 3  # one downsampling
BASE = dict(
    image_size=(H, W),
    code_shape=(h, w, D),
    code_dim=E,
    codebook_size=K,
    width=4,
    width_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=5,
)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (B, H, W, C)).astype(np.float32)


@functools.cache
def build(**settings):
    """A model and random variables, every bias and norm included (quicker than compiling `init`)."""
    model = create("rqvae", **{**BASE, **settings})
    return model, helpers.filled_variables(model)


@functools.partial(jax.jit, static_argnames=("model", "method", "train", "depth"))
def run(model, variables, *arguments, method="__call__", rngs=None, **settings):
    """A method of the model, evaluated."""
    return model.apply(variables, *arguments, method=method, rngs=rngs, **settings)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, images, rngs):
    """A training call: the output and the variables it changes."""
    return model.apply(variables, images, True, rngs=rngs, mutable=["codebook"])


def names(variables):
    """Dotted names of the parameters."""
    return set(flax.traverse_util.flatten_dict(variables["params"], sep="."))


# --- variables and shapes -------------------------------------------------------------------------


def test_variables_are_plain_dicts_of_parameters_and_codebook():
    model, variables = build()
    assert type(variables) is dict and variables.keys() == {"params", "codebook"}
    assert {name: a.shape for name, a in variables["codebook"].items()} == {
        "codebook_KE": (K, E), "counts_K": (K,), "sums_KE": (K, E),
    }  # fmt: skip
    assert variables["params"].keys() == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert all(type(node) is dict for node in (variables["params"], variables["params"]["encoder"]))


@pytest.mark.parametrize("channels", [3, 1])
def test_shapes(channels):
    model, variables = build(in_channels=channels)
    images = IMAGES[..., :channels]
    output = run(model, variables, images)
    assert output.reconstruction.shape == (B, H, W, channels)
    assert output.codes.shape == (B, h, w, D) and output.codes.dtype == jnp.int32
    assert output.latents.shape == (B, h, w, E)
    assert output.partial_sums.shape == (B, h, w, D, E)


def test_a_square_image_size_may_be_one_number():
    model, _ = build(image_size=6, code_shape=(3, 3, D))
    assert model.image_shape == (6, 6) and model.latent_grid == (3, 3)


def test_shapes_of_variables_belong_to_the_caller():
    model = create("rqvae", **BASE)
    first = abstract_variables(model)
    first.pop("params")
    assert abstract_variables(model).keys() == {"params", "codebook"}
    assert abstract_variables(model.clone(width_multipliers=[1, 1])).keys() == {"params", "codebook"}


def test_fresh_variables():
    model = create("rqvae", **{**BASE, "image_size": (h, w), "width_multipliers": (1,)})
    variables = init_variables(model, jax.random.key(0))
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (variables, abstract_variables(model))]
    assert shapes[0] == shapes[1]
    reconstruction = run(model, variables, IMAGES[:, :h, :w]).reconstruction
    assert bool(jnp.isfinite(reconstruction).all()) and float(reconstruction.std()) > 1e-3


# --- what the methods promise of each other -------------------------------------------------------


def test_methods_agree_with_the_forward_pass():
    model, variables = build()
    output = run(model, variables, IMAGES)
    np.testing.assert_allclose(run(model, variables, IMAGES, method="encode"), output.latents, atol=1e-6)
    np.testing.assert_array_equal(run(model, variables, IMAGES, method="encode_to_codes"), output.codes)
    np.testing.assert_allclose(
        run(model, variables, output.codes, method="decode_codes"),
        output.reconstruction,
        rtol=1e-4,
        atol=1e-5,
    )
    expected = quantize.residual_quantize(output.latents, variables["codebook"]["codebook_KE"], D)
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_allclose(output.partial_sums, expected.partial_sums, atol=1e-5)


def test_decoding_the_first_codes_is_decoding_their_partial_sum():
    model, variables = build()
    output = run(model, variables, IMAGES)
    by_depth = run(model, variables, IMAGES, method="reconstruct_by_depth")
    assert by_depth.shape == (D, B, H, W, C)
    for depth in range(1, D + 1):
        partial = run(model, variables, output.partial_sums[..., depth - 1, :], method="decode")
        decoded = run(model, variables, output.codes, method="decode_codes", depth=depth)
        np.testing.assert_allclose(decoded, partial, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(by_depth[depth - 1], partial, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(by_depth[0] - by_depth[-1]).max()) > 1e-3


def test_soft_codes():
    model, variables = build()
    soft, codes = run(model, variables, IMAGES, 0.5, method="soft_codes")
    output = run(model, variables, IMAGES)
    assert soft.shape == (B, h, w, D, K)
    np.testing.assert_array_equal(codes, output.codes)
    np.testing.assert_allclose(soft.sum(-1), 1.0, atol=1e-5)
    rng = jax.random.key(1)
    drawn_soft, drawn = run(model, variables, IMAGES, 4.0, rng, method="soft_codes")
    expected = quantize.soft_codes(output.latents, variables["codebook"]["codebook_KE"], D, 4.0, rng)
    np.testing.assert_array_equal(drawn, expected[1])
    np.testing.assert_allclose(drawn_soft, expected[0], atol=1e-5)


def test_patches_of_latents_fold_into_code_vectors_by_row_column_channel():
    model, variables = build(image_size=(4, 12), code_shape=(1, 2, D), code_dim=24)  # latents (2, 6, 4), patches 2 x 3
    images = np.random.default_rng(1).uniform(-1, 1, (B, 4, 12, C)).astype(np.float32)
    output = run(model, variables, images)
    assert output.latents.shape == (B, 2, 6, 4) and output.partial_sums.shape == (B, 1, 2, D, 24)
    vectors = np.zeros((B, 1, 2, 24), np.float32)
    for j in range(2):
        for r in range(2):
            for s in range(3):
                for c in range(4):
                    vectors[:, 0, j, (r * 3 + s) * 4 + c] = output.latents[:, r, 3 * j + s, c]
    expected = quantize.residual_quantize(vectors, variables["codebook"]["codebook_KE"], D)
    np.testing.assert_array_equal(output.codes, expected.codes)
    np.testing.assert_allclose(
        run(model, variables, output.codes, method="decode_codes"),
        output.reconstruction,
        rtol=1e-4,
        atol=1e-5,
    )


# --- switches -------------------------------------------------------------------------------------


def test_attention_stands_where_the_resolution_is_named():
    plain = names(build()[1])
    with_attention = names(build(attention_resolutions=(6,))[1])
    added = {name.rsplit(".", 2)[0] for name in with_attention - plain}
    assert plain <= with_attention
    assert added == {"encoder.level0_attention0", "decoder.level0_attention0", "decoder.level0_attention1"}


def test_double_z_widens_the_encoder_only():
    (_, plain), (_, double) = build(), build(use_double_z=True)
    shapes = [flax.traverse_util.flatten_dict(jax.tree.map(jnp.shape, v["params"]), sep=".") for v in (plain, double)]
    changed = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert shapes[0].keys() == shapes[1].keys()
    assert changed == {"encoder.conv_out.kernel", "encoder.conv_out.bias", "quant_conv.kernel"}
    assert shapes[1]["encoder.conv_out.bias"] == (10,)


def test_resampling_without_convolutions():
    model, variables = build(use_resample_conv=False)
    lost = {name.rsplit(".", 2)[0] for name in names(build()[1]) - names(variables)}
    assert lost == {"encoder.level0_down", "decoder.level1_up"}
    assert run(model, variables, IMAGES).reconstruction.shape == (B, H, W, C)


def test_remat_changes_no_output_and_no_gradient():
    model, variables = build()
    remat, same = build(use_remat=True)
    assert jax.tree.structure(same) == jax.tree.structure(variables)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(params, model):
        def loss(params):
            output, _ = model.apply({**variables, "params": params}, IMAGES, True, mutable=["codebook"])
            return losses.reconstruction_loss(IMAGES, output.reconstruction)

        return jax.value_and_grad(loss)(params)

    for a, b in zip(*(jax.tree.leaves(gradients(variables["params"], m)) for m in (model, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_dropout_acts_in_training_only():
    (model, variables), (dropping, _) = build(), build(dropout=0.5)
    np.testing.assert_array_equal(
        run(dropping, variables, IMAGES).reconstruction, run(model, variables, IMAGES).reconstruction
    )
    latents = [train(dropping, variables, IMAGES, {"dropout": jax.random.key(seed)})[0].latents for seed in (0, 1)]
    assert not np.allclose(latents[0], latents[1])


def test_bfloat16_networks_keep_a_float32_quantiser():
    (model, variables), (half, half_variables) = build(), build(dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(half_variables)} == {jnp.dtype("float32")}
    output, expected = run(half, variables, IMAGES), run(model, variables, IMAGES)
    assert output.reconstruction.dtype == output.latents.dtype == output.partial_sums.dtype == jnp.float32
    assert float(jnp.abs(output.latents - expected.latents).max()) < 0.05 * float(jnp.abs(expected.latents).max())
    assert not np.array_equal(output.latents, expected.latents)
    exact = quantize.residual_quantize(output.latents, variables["codebook"]["codebook_KE"], D)
    np.testing.assert_array_equal(output.codes, exact.codes)
    decoded = [run(m, variables, expected.codes, method="decode_codes") for m in (half, model)]
    assert float(jnp.abs(decoded[0] - decoded[1]).max()) < 0.05 * float(jnp.abs(decoded[1]).max())


def test_codebook_settings_reach_the_quantiser():
    settings = dict(
        codebook_size=(7, 5, 3, 2), use_shared_codebook=False, codebook_decay=(0.9, 0.8, 0.7, 0.6), use_restart=False,
        codebook_update="pooled", use_kmeans_init=True,
    )  # fmt: skip
    model, variables = build(**settings)
    assert [a.shape for a in variables["codebook"]["codebook_KE"]] == [(7, E), (5, E), (3, E), (2, E)]
    quantizer = model.bind(variables).quantizer
    assert quantizer.codebook_size == (7, 5, 3, 2) and quantizer.decay == (0.9, 0.8, 0.7, 0.6)
    assert not quantizer.use_restart and not quantizer.use_shared_codebook
    assert quantizer.codebook_update == "pooled" and quantizer.use_kmeans_init
    codes = run(model, variables, IMAGES).codes
    assert run(model, variables, codes, method="decode_codes").shape == (B, H, W, C)


# --- training -------------------------------------------------------------------------------------


def test_training_moves_the_codebook_and_the_straight_through_gradient_reaches_the_encoder():
    model, variables = build()
    output, changed = train(model, variables, IMAGES, {"restart": jax.random.key(0)})
    assert changed.keys() == {"codebook"}
    assert not np.allclose(changed["codebook"]["codebook_KE"], variables["codebook"]["codebook_KE"])
    assert output.reconstruction.shape == (B, H, W, C)

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.mean((model.apply({**variables, "params": params}, IMAGES).reconstruction - IMAGES) ** 2)

        return jax.grad(loss)(params)

    gradients = gradient(variables["params"])
    assert all(
        float(jnp.abs(g).max()) > 0
        for g in (gradients["encoder"]["conv_in"]["kernel"], gradients["quant_conv"]["kernel"])
    )


def test_the_commitment_loss_has_a_gradient_in_the_encoder_only():
    model, variables = build()

    @jax.jit
    def gradient(variables):
        def loss(variables):
            output = model.apply(variables, IMAGES)
            return losses.commitment_loss(output.latents, output.partial_sums)

        return jax.grad(loss)(variables)

    gradients = gradient(variables)
    size = {
        name: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree)) for name, tree in gradients["params"].items()
    }
    assert size["encoder"] > 0 and size["quant_conv"] > 0
    assert size["decoder"] == size["post_quant_conv"] == 0
    assert not any(g.any() for g in jax.tree.leaves(gradients["codebook"]))


# --- mistakes -------------------------------------------------------------------------------------

CALLS = {
    "images of another size": (
        lambda m, v: m.apply(v, jnp.ones((B, H, W + 4, C))),
        r"^images: shape \(2, 6, 14, 3\) does not fit; allowed is \(B, 6, 10, 3\)",
    ),
    "images of another width": (
        lambda m, v: m.apply(v, jnp.ones((B, H, W, 1)), method="encode_to_codes"),
        r"^images: shape \(2, 6, 10, 1\) does not fit",
    ),
    "images of integers": (
        lambda m, v: m.apply(v, np.zeros((B, H, W, C), np.uint8)),
        r"^images: dtype uint8 is not floating-point; scale them to \[-1, 1\]",
    ),
    "codes of floats": (
        lambda m, v: m.apply(v, jnp.zeros((B, h, w, D)), method="decode_codes"),
        r"^codes: dtype float32 must be an integer type",
    ),
    "codes of another shape": (
        lambda m, v: m.apply(v, jnp.zeros((B, w, h, D), int), method="decode_codes"),
        r"^codes: shape \(2, 5, 3, 4\) does not fit; allowed is \(B, 3, 5, 4\)",
    ),
    "codes outside the codebook": (
        lambda m, v: m.apply(v, jnp.full((B, h, w, D), K), method="decode_codes"),
        r"^codes: 7 at depth 0 is outside \[0, 7\)",
    ),
    "no depth": (
        lambda m, v: m.apply(v, jnp.zeros((B, h, w, D), int), 0, method="decode_codes"),
        r"^depth: 0 is outside 1..4, the code depth of this model",
    ),
    "too deep": (
        lambda m, v: m.apply(v, jnp.zeros((B, h, w, D), int), 5, method="decode_codes"),
        r"^depth: 5 is outside 1..4",
    ),
}


def test_codes_may_be_a_list():
    model, variables = build()
    codes = np.zeros((B, h, w, D), int)
    actual = jax.eval_shape(lambda v: model.apply(v, codes.tolist(), method="decode_codes"), variables)
    assert actual.shape == (B, H, W, C)


def test_images_may_be_a_list():
    model, variables = build()
    images = np.zeros((B, H, W, C)).tolist()
    actual = jax.eval_shape(lambda v: model.apply(v, images, method="encode_to_codes"), variables)
    assert actual.shape == (B, h, w, D)
    with pytest.raises(ValueError, match=r"^images: shape \(2,\) does not fit"):
        model.apply(variables, [0.0, 1.0])


@pytest.mark.parametrize("mistake", CALLS)
def test_wrong_arguments_get_one_line(mistake):
    call, message = CALLS[mistake]
    with pytest.raises(ValueError, match=message):
        call(*build())


SETTINGS = {
    "dtype": (
        {"dtype": "float16"},
        r"^model.dtype: 'float16' is unknown; allowed are 'float32' and 'bfloat16'$",
    ),
    "one side": (
        {"image_size": (8,)},
        r"^model.image_size: \(8,\) is no size of an image; give one side, or \(height, width\)$",
    ),
    "code shape": (
        {"code_shape": (3, 5)},
        r"^model.code_shape: \(3, 5\) must be three positive integers \(h, w, depth\)$",
    ),
    "no depth": ({"code_shape": (3, 5, 0)}, r"^model.code_shape: \(3, 5, 0\) must be three positive"),
    "image size": (
        {"image_size": (6, 9)},
        r"^model.image_size: W = 9 must be a positive multiple of 2, the downsampling of 2 levels$",
    ),
    "no image": ({"image_size": 0}, r"^model.image_size: H = 0 must be a positive multiple of 2"),
    "grid": (
        {"code_shape": (3, 4, D)},
        r"^model.code_shape: grid \(3, 4\) does not divide the latent grid \(3, 5\); choose divisors of it$",
    ),
    "code dim": (
        {"code_shape": (1, 5, D), "code_dim": 8},
        r"^model.code_dim: 8 must be a positive multiple of 3, the latents folded into one code vector$",
    ),
    "codebook": ({"codebook_size": (7, 7)}, r"^model.codebook_size: \(7, 7\) has one entry per depth, but"),
    "decay": ({"codebook_decay": 2.0}, r"^model.codebook_decay: 2.0 is outside \[0, 1\]$"),
    "update": ({"codebook_update": "never"}, r"^model.codebook_update: 'never' is unknown"),
    "width": ({"width": 0}, r"^model.width: 0 must be at least 1$"),
    "blocks": ({"num_res_blocks": 0}, r"^model.num_res_blocks: 0 must be at least 1$"),
    "groups": ({"norm_groups": 0}, r"^model.norm_groups: 0 must be at least 1$"),
    "levels": ({"width_multipliers": ()}, r"^model.width_multipliers: \(\) must be one positive integer a level"),
    "dropout": ({"dropout": 1.0}, r"^model.dropout: 1.0 is outside \[0, 1\)$"),
    "unknown": ({"widht": 4}, r"^model.widht: unknown; allowed are attention_resolutions, code_dim"),
    "Flax's own": ({"parent": "a"}, r"^model.parent: unknown; allowed are attention_resolutions, code_dim"),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_wrong_settings_get_one_line(mistake):
    settings, message = SETTINGS[mistake]
    with pytest.raises(ValueError, match=message):
        create("rqvae", **{**BASE, **settings})


def test_an_unknown_model_gets_one_line():
    with pytest.raises(ValueError, match="^model name: 'vqvae' is unknown; allowed are 'rqvae', 'dqvae', "):
        create("vqvae")


def test_lists_become_tuples_so_that_a_model_is_hashable():
    model = create("rqvae", **{**BASE, "image_size": [H, W], "width_multipliers": [1, 2]})
    assert hash(model) == hash(create("rqvae", **BASE)) and model == create("rqvae", **BASE)

"""Losses against NumPy, their behaviour at padded and NaN logits, and what chunks save."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax import losses, quantize
from rq_jax.grains import GrainedCodes, GrainLayout, PackedCodes, num_codes, pack

B, h, w, D, K, E = 2, 3, 5, 4, 7, 6
T = h * w


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind, power", [("mse", 2), ("l1", 1)])
def test_reconstruction_loss(kind, power):
    images, reconstruction = normal(B, 4, 6, 3), normal(B, 4, 6, 3, seed=1)
    expected = np.mean(np.abs(images - reconstruction) ** power)
    np.testing.assert_allclose(losses.reconstruction_loss(images, reconstruction, kind), expected, rtol=1e-5)


def test_reconstruction_loss_is_float32_for_bfloat16_pictures():
    images = jnp.full((1, 64, 64, 3), 1.0, jnp.bfloat16)
    loss = losses.reconstruction_loss(images, images * 0.5)
    assert loss.dtype == jnp.float32 and float(loss) == 0.25


def test_unknown_reconstruction_loss():
    with pytest.raises(ValueError, match="^loss.reconstruction: 'l3' is unknown; allowed are 'mse' and 'l1'$"):
        losses.reconstruction_loss(jnp.ones(2), jnp.ones(2), "l3")


def test_commitment_loss_is_the_mean_over_depths_and_channels():
    latents, sums = normal(B, h, w, E), normal(B, h, w, D, E, seed=1)
    expected = np.mean([np.mean((latents - sums[..., d, :]) ** 2) for d in range(D)])
    np.testing.assert_allclose(losses.commitment_loss(latents, sums), expected, rtol=1e-5)


def test_commitment_loss_folds_latents_onto_the_code_grid():
    latents = normal(B, 2 * h, 3 * w, 2)
    folded = quantize.fold_patches(latents, (h, w))
    assert float(losses.commitment_loss(latents, folded[..., None, :])) == 0.0
    np.testing.assert_allclose(losses.commitment_loss(latents, folded[..., None, :] + 2.0), 4.0, rtol=1e-5)


@pytest.mark.parametrize("leading", [(), (7,), (B, 5), (B, h, w), (B, 2, h, w)], ids=str)
def test_commitment_loss_of_any_leading_shape(leading):
    latents, sums = normal(*leading, E), normal(*leading, D, E, seed=1)
    np.testing.assert_allclose(
        losses.commitment_loss(latents, sums), np.mean((latents[..., None, :] - sums) ** 2), rtol=1e-5
    )


@pytest.mark.parametrize(
    "latents, sums", [((B, 5, E), (B, 4, D, E)), ((B, 7, w, E), (B, h, w, D, E)), ((5, E), (5, E))]
)
def test_commitment_loss_of_latents_that_do_not_fit_is_refused(latents, sums):
    with pytest.raises(ValueError, match=r"^latents: shape .* does not fit; allowed is \("):
        losses.commitment_loss(jnp.zeros(latents), jnp.zeros(sums))


def test_commitment_loss_has_a_gradient_in_the_latents_only():
    latents, sums = normal(B, h, w, E), normal(B, h, w, D, E, seed=1)
    to_latents, to_sums = jax.grad(losses.commitment_loss, argnums=(0, 1))(latents, sums)
    expected = 2 * (latents[..., None, :] - sums).sum(-2) / sums.size
    np.testing.assert_allclose(to_latents, expected, rtol=1e-4, atol=1e-7)
    assert not to_sums.any()


# --- 4: the budget of the grains ---

DUAL, TRIPLE = ((0.5,), (20.0,)), ((0.3, 0.3), (1.0, 1.0))


@pytest.mark.parametrize(
    ("num_grains", "settings", "form"),
    [
        (2, DUAL, lambda shares: 20 * (shares[1] - 0.5) ** 2),
        (3, TRIPLE, lambda shares: (shares[1] - 0.3) ** 2 + (shares[2] - 0.3) ** 2),
        (3, ((0.2, 0.5), (2.0, 3.0)), lambda shares: 2 * (shares[1] - 0.2) ** 2 + 3 * (shares[2] - 0.5) ** 2),
    ],
)
def test_4_the_budget_loss_in_closed_form(num_grains, settings, form):
    grains = np.random.default_rng(0).integers(0, num_grains, (2, 3, 5))
    gates = jnp.eye(num_grains, dtype=jnp.bfloat16)[grains]
    loss = losses.budget_loss(gates, *settings)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, form([np.mean(grains == g) for g in range(num_grains)]), rtol=1e-6)


@pytest.mark.parametrize("settings", [DUAL, TRIPLE], ids=["dual", "triple"])
@pytest.mark.parametrize("start", [-2.0, 2.0])
def test_4_a_router_with_gumbel_noise_comes_to_its_target(settings, start):
    G, target = len(settings[0]) + 1, settings[0]

    def gates(logits_G, rng):
        noise = jax.random.gumbel(rng, (16, 32, 32, G))
        soft = jax.nn.softmax(jnp.broadcast_to(logits_G, noise.shape) + noise)
        return soft + jax.lax.stop_gradient(jax.nn.one_hot(soft.argmax(-1), G) - soft)

    @jax.jit
    def step(logits_G, rng):
        gradient = jax.grad(lambda logits_G: losses.budget_loss(gates(logits_G, rng), *settings))(logits_G)
        return logits_G - 5 / settings[1][0] * gradient

    logits_G = jnp.zeros(G).at[0].set(start)
    assert np.sign(step(logits_G, jax.random.key(0))[0] - start) == -np.sign(start)
    for rng in jax.random.split(jax.random.key(1), 60):
        logits_G = step(logits_G, rng)
    shares = gates(logits_G, jax.random.key(2)).mean((0, 1, 2))
    np.testing.assert_allclose(shares[1:], target, atol=0.02)


@pytest.mark.parametrize(("targets", "weights"), [((0.5,), (1.0, 1.0)), ((0.3, 0.3), (1.0,)), ((), ())])
def test_4_a_budget_for_another_number_of_grains_is_refused(targets, weights):
    with pytest.raises(ValueError, match=r"(targets|weights): shape \(\d,\) does not fit; allowed is \(2,\)"):
        losses.budget_loss(jnp.ones((1, 2, 2, 3)), targets, weights)


# --- cross-entropy ---


def test_cross_entropy():
    logits, codes = 3 * normal(B, T, D, K), np.random.default_rng(0).integers(0, K, (B, T, D))
    expected = -np.log(np.take_along_axis(softmax(logits), codes[..., None], -1)[..., 0])
    np.testing.assert_allclose(losses.cross_entropy(logits, codes), expected, rtol=1e-5, atol=1e-6)


def test_soft_cross_entropy_adds_its_constant_inside_the_logarithm():
    logits, soft = 3 * normal(B, T, D, K), softmax(normal(B, T, D, K, seed=1))
    shifted = logits - logits.max(-1, keepdims=True)
    expected = -(soft * (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True) + 1e-7))).sum(-1)
    np.testing.assert_allclose(losses.soft_cross_entropy(logits, soft), expected, rtol=1e-5)
    certain = losses.soft_cross_entropy(jnp.array([0.0, -1e4]), jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(certain, 1e-7, rtol=0.3)  # float32 rounds 1 + 1e-7 to 1 + 1.19e-7


def test_soft_cross_entropy_of_large_logits_neither_overflows_nor_loses_its_gradient():
    """The largest logit is subtracted first, as a constant: the gradient is softmax - labels all the same."""
    logits, soft = normal(T, K), softmax(normal(T, K, seed=1))
    np.testing.assert_allclose(
        losses.soft_cross_entropy(logits + 1000, soft), losses.soft_cross_entropy(logits, soft), rtol=1e-3
    )
    gradient = jax.grad(lambda x: losses.soft_cross_entropy(x, soft).sum())(jnp.asarray(logits + 1000))
    np.testing.assert_allclose(gradient, softmax(logits) - soft, atol=1e-3)


def test_soft_cross_entropy_of_one_hot_labels_is_cross_entropy():
    logits, codes = normal(B, T, D, K), np.random.default_rng(0).integers(0, K, (B, T, D))
    soft = losses.soft_cross_entropy(logits, jax.nn.one_hot(codes, K))
    np.testing.assert_allclose(soft, losses.cross_entropy(logits, codes), atol=2e-6)


def test_soft_cross_entropy_is_least_at_the_labels():
    logits = normal(T, K)
    at_labels = losses.soft_cross_entropy(logits, softmax(logits))
    for seed in range(1, 4):
        assert bool((losses.soft_cross_entropy(normal(T, K, seed=seed), softmax(logits)) > at_labels).all())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_padded_logits_change_nothing_and_get_no_gradient(kind):
    logits, codes = normal(T, 5), np.random.default_rng(0).integers(0, 5, T)
    soft = softmax(normal(T, 5, seed=1))

    def loss(x):
        padded = jnp.concatenate([x, jnp.full((T, 2), -jnp.inf)], -1)
        if kind == "hard":
            return losses.cross_entropy(padded, codes).sum()
        return losses.soft_cross_entropy(padded, jnp.pad(soft, ((0, 0), (0, 2)))).sum()

    def plain(x):
        value = losses.cross_entropy(x, codes) if kind == "hard" else losses.soft_cross_entropy(x, soft)
        return value.sum()

    for a, b in zip(jax.value_and_grad(loss)(logits), jax.value_and_grad(plain)(logits), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    padded = jnp.concatenate([logits, jnp.full((T, 2), -jnp.inf)], -1)  # also where the logits are the leaf
    label = codes if kind == "hard" else jnp.pad(soft, ((0, 0), (0, 2)))
    function = losses.cross_entropy if kind == "hard" else losses.soft_cross_entropy
    gradient = jax.grad(lambda x: function(x, label).sum())(padded)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[:, 5:].any()


def test_nan_logits_give_nan_losses():
    logits = jnp.zeros((2, K)).at[1].set(jnp.nan)
    for loss in (
        losses.cross_entropy(logits, jnp.array([0, 0])),
        losses.soft_cross_entropy(logits, jnp.full((2, K), 1 / K)),
    ):
        assert jnp.isnan(loss).tolist() == [False, True]


def test_losses_are_float32_for_bfloat16_logits():
    logits = jnp.asarray(normal(T, K), jnp.bfloat16)
    for loss in (
        losses.cross_entropy(logits, jnp.zeros(T, int)),
        losses.soft_cross_entropy(logits, softmax(normal(T, K))),
    ):
        assert loss.dtype == jnp.float32


# --- the adversary --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_both_halves_of_the_discriminator_loss(kind):
    real, fake = 2 * normal(B, h, w, 1), 2 * normal(B, h + 1, w, 1, seed=1)
    if kind == "hinge":
        of_real, of_fake = np.maximum(1 - real, 0).mean() / 2, np.maximum(1 + fake, 0).mean() / 2
    else:
        of_real, of_fake = np.log1p(np.exp(-real)).mean() / 2, np.log1p(np.exp(fake)).mean() / 2
    np.testing.assert_allclose(losses.discriminator_loss_real(real, kind), of_real, rtol=1e-5)
    np.testing.assert_allclose(losses.discriminator_loss_fake(fake, kind), of_fake, rtol=1e-5)


def test_hinge_has_no_gradient_beyond_the_margin_and_vanilla_no_overflow():
    logits = jnp.array([-3.0, -0.5, 0.5, 3.0])
    to_fake = jax.grad(losses.discriminator_loss_fake)(logits)
    to_real = jax.grad(losses.discriminator_loss_real)(logits)
    np.testing.assert_allclose(8 * to_fake, [0, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(8 * to_real, [-1, -1, -1, 0], rtol=1e-6)
    for half, logit in ((losses.discriminator_loss_real, -1e4), (losses.discriminator_loss_fake, 1e4)):
        np.testing.assert_allclose(half(jnp.array([logit]), "vanilla"), 0.5e4, rtol=1e-6)


def test_defaults_are_the_released_ones():
    real, fake = normal(B, h), normal(B, h, seed=1)
    assert losses.discriminator_loss_real(real) == losses.discriminator_loss_real(real, "hinge")
    assert losses.discriminator_loss_fake(fake) == losses.discriminator_loss_fake(fake, "hinge")
    np.testing.assert_allclose(losses.generator_loss(fake), -fake.mean(), rtol=1e-5)
    assert losses.generator_loss(fake) == losses.generator_loss(fake, "vanilla")


def test_adversarial_losses_are_float32_for_bfloat16_logits():
    logits = jnp.full((64, 64), 257.0).astype(jnp.bfloat16)  # 256: a bfloat16 sum would lose most of the mean
    for loss in (losses.discriminator_loss_fake(logits), losses.generator_loss(logits)):
        assert loss.dtype == jnp.float32
    assert float(losses.generator_loss(logits)) == -256 and float(losses.discriminator_loss_fake(logits)) == 128.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("discriminator_loss", "loss.discriminator_loss: 'hing' is unknown; allowed are 'hinge' and 'vanilla'"),
        ("generator_loss", "loss.generator_loss: 'hing' is unknown; allowed is 'vanilla'"),
    ],
)
def test_unknown_adversarial_losses(name, message):
    losses.check_adversarial_losses()
    with pytest.raises(ValueError, match=f"^{message}$"):
        losses.check_adversarial_losses(**{name: "hing"})
    calls = {
        "discriminator_loss": (losses.discriminator_loss_real, losses.discriminator_loss_fake),
        "generator_loss": (losses.generator_loss,),
    }
    for call in calls[name]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(jnp.zeros(3), "hing")


def test_adaptive_weight_is_the_ratio_of_lengths():
    a, b = normal(3, 3, 6, 2), 0.01 * normal(3, 3, 6, 2, seed=1)
    expected = np.sqrt((a**2).sum()) / (np.sqrt((b**2).sum()) + 1e-4)
    np.testing.assert_allclose(losses.adaptive_weight(a, b), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.adaptive_weight(a, 0 * b, limit=1e9), np.sqrt((a**2).sum()) / 1e-4, rtol=1e-5)
    assert losses.adaptive_weight(a, 0 * b) == 1e4
    assert losses.adaptive_weight(a, b, limit=2.5) == 2.5
    assert losses.adaptive_weight(0 * a, b) == 0
    assert losses.adaptive_weight(jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)).dtype == jnp.float32


def test_adaptive_weight_passes_no_gradient_and_keeps_nan():
    a, b = normal(3, 4), normal(3, 4, seed=1)
    assert not any(g.any() for g in jax.grad(losses.adaptive_weight, argnums=(0, 1))(a, b))
    assert jnp.isnan(losses.adaptive_weight(a * jnp.nan, b))  # so that the step is skipped


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [1, 3, 5, 15])
def test_sum_over_chunks_equals_the_whole_and_so_does_its_gradient(num_chunks):
    hidden, codes = normal(B, T, D, E), np.random.default_rng(0).integers(0, K, (B, T, D))

    def loss(weight, chunks):
        def total(arrays):
            x, y = arrays["hidden"], arrays["codes"]
            entropy = losses.cross_entropy(x @ weight, y)
            return {"sum": entropy.sum(), "per_depth": entropy.sum((0, 1))}

        sums = losses.sum_over_chunks(total, {"hidden": hidden, "codes": codes}, chunks)
        return sums["sum"], sums["per_depth"]

    weight = normal(E, K)
    (value, per_depth), gradient = jax.value_and_grad(loss, has_aux=True)(weight, num_chunks)
    (whole, whole_per_depth), whole_gradient = jax.value_and_grad(loss, has_aux=True)(weight, 1)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    np.testing.assert_allclose(per_depth, whole_per_depth, rtol=1e-5)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_chunks", [0, 2, 16])
def test_chunks_must_divide_the_positions(num_chunks):
    message = f"^num_chunks: {num_chunks} does not divide the 15 positions; choose a divisor of them$"
    with pytest.raises(ValueError, match=message):
        losses.sum_over_chunks(jnp.sum, jnp.ones((B, T)), num_chunks)


@helpers.full_optimization()
def test_chunked_soft_loss_memory_at_paper_size():
    batch, positions, depth, codes, model_dim, code_dim = 8, 64, 4, 16384, 32, 16

    def loss(weight, hidden, residuals, codebook, chunks):
        def total(arrays):
            soft = quantize.soft_labels(arrays[1], codebook, 0.5)
            return losses.soft_cross_entropy(arrays[0] @ weight, soft).sum()

        return losses.sum_over_chunks(total, (hidden, residuals), chunks)

    shapes = (
        (model_dim, codes),
        (batch, positions, depth, model_dim),
        (batch, positions, depth, code_dim),
        (codes, code_dim),
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def temporary_bytes(chunks):
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=4)
        return step.lower(*arguments, chunks).compile().memory_analysis().temp_size_in_bytes

    one_array = 4 * batch * positions * depth * codes  # 134 MB
    chunks = losses.num_loss_chunks(batch, positions, depth, codes, limit=2**22)
    assert chunks == 8
    assert temporary_bytes(chunks) < one_array < 2 * one_array < temporary_bytes(1)


def test_num_loss_chunks_is_the_fewest_that_fit():
    assert losses.num_loss_chunks(2, 15, 4, 7) == 1
    assert losses.num_loss_chunks(2, 15, 4, 7, limit=2 * 5 * 4 * 7) == 3
    assert losses.num_loss_chunks(2, 15, 4, 7, limit=2 * 5 * 4 * 7 - 1) == 5
    assert losses.num_loss_chunks(2, 15, 4, 7, limit=1) == 15
    assert losses.num_loss_chunks(32, 64, 4, 16384) == 2


# --- streams of packed codes ----------------------------------------------------------------------


@pytest.mark.parametrize("num_grains, D, num_classes", [(2, 1, 1), (3, 2, 4)])
def test_8_stream_nats_add_up_each_token_in_its_stream(num_grains, D, num_classes):
    layout = GrainLayout((1, 2), num_grains, 5, num_classes)
    rng = np.random.default_rng(num_grains)
    (h, w), (u, v), B = layout.code_grid, layout.region_grid, 3
    codes = GrainedCodes(rng.integers(0, 5, (B, h, w, D)), rng.integers(0, num_grains, (B, u, v)))
    tokens = pack(codes, layout)
    sos = np.array([layout.position_sos(g) for g in range(num_grains)])
    classes = rng.integers(0, num_classes, (B, 1))
    content, position, grain = (np.array(ids) for ids in tokens[:3])
    position += np.where(position >= sos[grain], classes, 0)
    content += np.where(content >= layout.content_sos, classes[..., None], 0)
    # Pads in the middle too, as the original's batches have them.
    content[1, 3:5], position[1, 3:5], grain[1, 3:5] = layout.content_pad, layout.position_pad(0), 0
    P = position.shape[1]
    position_logits = rng.normal(size=(B, P - 1, layout.position_size(num_grains - 1))).astype(np.float32)
    content_logits = rng.normal(size=(B, P - 1, D, layout.content_size)).astype(np.float32)
    sums, counts = np.zeros((B, num_grains)), np.zeros((B, num_grains))
    content_sums, content_counts = np.zeros((B, D)), np.zeros((B, D))
    for i in range(B):
        for t in range(P - 1):
            g = grain[i, t + 1]
            if position[i, t + 1] != layout.position_pad(g):
                sums[i, g] -= jax.nn.log_softmax(position_logits[i, t])[position[i, t + 1]]
                counts[i, g] += 1
            for d in range(D):
                if content[i, t + 1, d] != layout.content_pad:
                    content_sums[i, d] -= jax.nn.log_softmax(content_logits[i, t, d])[content[i, t + 1, d]]
                    content_counts[i, d] += 1
    logits = jnp.asarray(position_logits), jnp.asarray(content_logits)
    nats = losses.stream_nats(*logits, PackedCodes(content, position, grain, tokens.length), layout)
    np.testing.assert_array_equal(nats.position_counts, counts)
    np.testing.assert_array_equal(nats.content_counts, content_counts)
    np.testing.assert_allclose(nats.position, sums, rtol=1e-5)
    np.testing.assert_allclose(nats.content, content_sums, rtol=1e-5)
    # Eos of every grain, and every sos but the first.
    num_cells = np.asarray(num_codes(codes.grains, num_grains))
    np.testing.assert_array_equal(nats.position_counts.sum(1)[::2], num_cells[::2] + 2 * num_grains - 1)


def test_8_pads_have_no_part_in_the_gradient():
    layout = GrainLayout((1, 2), 2, 5)
    tokens = pack(GrainedCodes(np.zeros((1, 2, 4, 1), np.int32), np.zeros((1, 1, 2), np.int32)), layout)
    logits = jnp.zeros((1, 11, layout.position_size(1))), jnp.zeros((1, 11, 1, layout.content_size))
    gradients = jax.grad(lambda pair: sum(x.sum() for x in losses.stream_nats(*pair, tokens, layout)[::2]))(logits)
    last = int(tokens.length[0]) - 1
    for gradient in gradients:
        assert not gradient[:, last:].any() and bool((jnp.abs(gradient[:, :last]).reshape(last, -1).max(-1) > 0).all())


def test_logits_of_other_tokens_are_refused():
    layout = GrainLayout((1, 2), 2, 5)
    tokens = pack(GrainedCodes(np.zeros((1, 2, 4, 1), np.int32), np.zeros((1, 1, 2), np.int32)), layout)
    good = jnp.zeros((1, 11, layout.position_size(1))), jnp.zeros((1, 11, 1, layout.content_size))
    with pytest.raises(
        ValueError, match=r"^position_logits: shape \(1, 12, 11\) does not fit; allowed is \(1, 11, 11\)$"
    ):
        losses.stream_nats(jnp.zeros((1, 12, 11)), good[1], tokens, layout)
    with pytest.raises(
        ValueError, match=r"^content_logits: shape \(1, 11, 2, 8\) does not fit; allowed is \(1, 11, 1, 8\)$"
    ):
        losses.stream_nats(good[0], jnp.zeros((1, 11, 2, 8)), tokens, layout)


@pytest.mark.parametrize("limit", [10**6, 200])
def test_stream_nats_of_chunks_are_those_of_the_whole(limit, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", limit)
    layout = GrainLayout((1, 2), 2, 5)
    rng = np.random.default_rng(0)
    tokens = pack(GrainedCodes(rng.integers(0, 5, (B, 2, 4, 2)), np.array([[[0, 1]], [[1, 1]]])), layout)
    hidden, deep = normal(B, 11, E), normal(B, 11, 2, E, seed=1)
    heads = normal(E, layout.position_size(1), seed=2), normal(E, layout.content_size, seed=3)

    def total(nats):
        return nats.position.sum() + 2 * nats.content.sum(), nats

    def whole(heads, hidden, deep):
        return total(losses.stream_nats(hidden @ heads[0], deep @ heads[1], tokens, layout))

    def in_chunks(heads, hidden, deep):
        classify = (lambda x, head=head: x @ head for head in heads)
        return total(losses.stream_nats_of_hidden(*classify, hidden, deep, tokens, layout))

    arguments = heads, hidden, deep
    both = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*arguments) for f in (in_chunks, whole))
    helpers.assert_close(*both)
    program = str(jax.make_jaxpr(in_chunks)(*arguments))
    assert ("f32[2,11,2,8]" in program) == (limit > 200)  # all logits at once

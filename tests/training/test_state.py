"""Optimizer, schedule, weight average, the guarded update and micro-batches."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rq_jax import models
from rq_jax.training.optimizer import Optimizer, axes_of, decay_mask, make_optimizer
from rq_jax.training.state import accumulate_gradients, apply_gradients, average_weights, create_state

I, O = 5, 3  # noqa: E741  axes of the toy weight


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rates(optimizer, steps):
    return np.array([optimizer.learning_rate(step) for step in range(steps)])


# --- schedules ----------------------------------------------------------------------------------------------


def test_cosine_schedule_has_the_published_check_values():
    optimizer = make_optimizer(learning_rate=0.5, total_steps=20, warmup_steps=5)
    relative = rates(optimizer, 21) / 0.5
    np.testing.assert_allclose(relative[:6], [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)
    assert relative[0] == 0  # the first update changes nothing
    np.testing.assert_allclose(relative[6], 0.98907, atol=5e-6)
    assert (np.diff(relative[5:]) < 0).all()
    np.testing.assert_allclose(relative[20], 0, atol=1e-7)
    np.testing.assert_allclose(optimizer.learning_rate(99), 0, atol=1e-7)  # it does not rise again


def test_cosine_ends_at_the_final_learning_rate():
    optimizer = make_optimizer(learning_rate=0.5, total_steps=20, final_learning_rate=0.1)
    np.testing.assert_allclose(rates(optimizer, 21)[[0, 10, 20]], [0.5, 0.3, 0.1], rtol=1e-6)


def test_constant_schedule_stays_after_the_warmup():
    optimizer = make_optimizer(learning_rate=0.5, total_steps=20, warmup_steps=4, schedule="constant")
    np.testing.assert_allclose(rates(optimizer, 30), np.minimum(np.arange(30) / 4, 1) * 0.5, rtol=1e-6)


def test_hold_stands_between_warmup_and_cosine():
    optimizer = make_optimizer(
        learning_rate=0.5, total_steps=20, warmup_steps=4, hold_steps=6, initial_learning_rate=0.1
    )
    relative = rates(optimizer, 21)
    np.testing.assert_allclose(relative[:5], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(relative[4:11], 0.5, rtol=1e-6)
    np.testing.assert_allclose(relative[10:], 0.25 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-7)
    without_warmup = rates(make_optimizer(learning_rate=0.5, total_steps=8, hold_steps=3), 9)
    np.testing.assert_allclose(without_warmup[:4], 0.5, rtol=1e-6)
    assert (np.diff(without_warmup[3:]) < 0).all()


@pytest.mark.parametrize("case", ["fix_half_epoch", "no_warmup_min0", "warmup2_buffer1", "linear_x3_not_from_zero"])
def test_schedule_agrees_with_the_original(goldens, case):
    settings = json.loads((goldens / "optim.config.json").read_text())["lr"][case]
    warmup, per_epoch, base = settings["warmup"], settings["steps_per_epoch"], settings["init_lr"]
    # The original multiplies the base rate during the warm-up; ours is given the rate that this comes to.
    assert settings["world_size"] == 1 and warmup["mode"] in ("fix", "linear")
    peak = base * warmup["multiplier"] if warmup["epoch"] else base
    with np.load(goldens / "optim.io.npz") as file:
        expected = file[f"lr.{case}"]
    optimizer = make_optimizer(
        learning_rate=peak,
        initial_learning_rate=0.0 if warmup["start_from_zero"] else base,
        final_learning_rate=warmup["min_lr"],
        total_steps=settings["max_epoch"] * per_epoch,
        warmup_steps=round(warmup["epoch"] * per_epoch),
        hold_steps=round(warmup["buffer_epoch"] * per_epoch),
    )
    np.testing.assert_allclose(rates(optimizer, len(expected)), expected, rtol=0, atol=1e-6 * peak)


# --- optimizers ---------------------------------------------------------------------------------------------


def adam_update(grads, b1, b2, rate):
    """The last of several Adam updates, in float64."""
    mean = square = 0.0
    for grad in np.float64(grads):
        mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
    count = len(grads)
    return -rate * (mean / (1 - b1**count)) / (np.sqrt(square / (1 - b2**count)) + 1e-8)


def updates_of(optimizer, params, grads):
    state = optimizer.transform.init(params)
    for grad in grads:
        updates, state = optimizer.transform.update(grad, state, params)
    return updates


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_follow_their_formula(name):
    params = {"w_IO": normal(I, O), "bias_O": normal(O, seed=1)}
    grads = [{"w_IO": normal(I, O, seed=seed), "bias_O": normal(O, seed=seed + 9)} for seed in (2, 3)]
    decay = 0.3 if name == "adamw" else 0.0
    optimizer = make_optimizer(
        name=name, learning_rate=0.1, total_steps=9, schedule="constant", b1=0.5, b2=0.8, weight_decay=decay
    )
    updates = updates_of(optimizer, params, grads)
    expected = {key: adam_update([grad[key] for grad in grads], 0.5, 0.8, 0.1) for key in params}
    np.testing.assert_allclose(updates["w_IO"], expected["w_IO"] - 0.1 * decay * params["w_IO"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(updates["bias_O"], expected["bias_O"], rtol=1e-5)  # spared by the decay


def test_adafactor_follows_its_formula():
    """Shazeer and Stern, algorithm 4, with momentum and the decay of AdamW, and without scaling by the parameters."""
    params = {"w_IO": normal(128, 130), "bias_O": normal(130, seed=1)}
    grads = [jax.tree.map(lambda x, seed=seed: normal(*x.shape, seed=seed), params) for seed in (2, 3)]
    settings = {"learning_rate": 0.1, "total_steps": 9, "schedule": "constant", "b1": 0.5, "weight_decay": 0.3}
    updates = updates_of(make_optimizer(name="adafactor", **settings), params, grads)
    rows, columns, second, mean = 0.0, 0.0, 0.0, {"w_IO": 0.0, "bias_O": 0.0}
    for step, grad in enumerate(grads, start=1):
        decay = 1 - step**-0.8
        squared = jax.tree.map(lambda g: g**2 + 1e-30, grad)
        rows = decay * rows + (1 - decay) * squared["w_IO"].mean(1, keepdims=True)
        columns = decay * columns + (1 - decay) * squared["w_IO"].mean(0, keepdims=True)
        second = decay * second + (1 - decay) * squared["bias_O"]
        scaled = {
            "w_IO": grad["w_IO"] / np.sqrt(rows * columns / rows.mean()),
            "bias_O": grad["bias_O"] / np.sqrt(second),
        }
        scaled = {name: x / max(1.0, np.sqrt((x**2).mean())) for name, x in scaled.items()}
        mean = {name: 0.5 * mean[name] + 0.5 * x for name, x in scaled.items()}
    np.testing.assert_allclose(updates["w_IO"], -0.1 * (mean["w_IO"] + 0.3 * params["w_IO"]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(updates["bias_O"], -0.1 * mean["bias_O"], rtol=1e-4, atol=1e-6)  # spared by the decay


def test_muon_orthogonalises_the_momentum_of_matrices_alone():
    """Jordan et al. 2024, with the size of Adam's updates as Liu et al. 2025, equation 4."""
    shapes = {"up_MF": (2, 8, 24), "qkv_M3NA": (2, 12, 3, 2, 4), "out_NAM": (2, 2, 4, 12), "kernel": (3, 3, 5, 6)}
    others = {"input_EM": (8, 6), "classifier_MK": (8, 6), "bias": (6,)}
    every = shapes | others
    params = {"block": {name: normal(*shape) for name, shape in every.items()}}
    grads = [{"block": {n: normal(*shape, seed=seed) for n, shape in every.items()}} for seed in (2, 3)]
    settings = {"learning_rate": 0.1, "total_steps": 9, "schedule": "constant", "b1": 0.5, "b2": 0.8}
    updates = updates_of(make_optimizer(name="muon", weight_decay=0.3, **settings), params, grads)["block"]

    def as_matrices(name, x):
        """Those of every layer, and of queries, keys and values apart: (n, inputs, outputs)."""
        if name == "qkv_M3NA":
            return np.moveaxis(x, 2, 1).reshape(6, 12, 8)
        return x.reshape({"up_MF": (2, 8, 24), "out_NAM": (2, 8, 12), "kernel": (1, 45, 6)}[name])

    for name in shapes:
        first, second = (np.float64(grad["block"][name]) for grad in grads)
        mean = (0.25 * first + 0.5 * second) / (1 - 0.5**3)
        momentum = as_matrices(name, 0.5 * mean + 0.5 * second / (1 - 0.5**2))  # Nesterov's
        decayed = np.float64(updates[name]) / -0.1 - 0.3 * params["block"][name]
        moved = as_matrices(name, decayed)
        moved = moved / (0.2 * np.sqrt(max(moved.shape[1:])))
        left, _, right = np.linalg.svd(momentum, full_matrices=False)
        sizes = np.einsum("nir,nio,nro->nr", left, moved, right)
        assert 0.6 < sizes.min() and sizes.max() < 1.3, (name, sizes)  # five Newton-Schulz steps
        np.testing.assert_allclose(np.einsum("nir,nr,nro->nio", left, sizes, right), moved, atol=1e-4)
    for name in others:
        expected = adam_update([grad["block"][name] for grad in grads], 0.5, 0.8, 0.1)
        decay = 0.0 if name == "bias" else 0.3
        np.testing.assert_allclose(updates[name], expected - 0.1 * decay * params["block"][name], rtol=1e-4, atol=1e-6)


def test_convolutions_of_pixels_are_left_to_adam():
    kernels = {"from": (3, 3, 3, 32), "to": (3, 3, 32, 1), "within": (3, 3, 32, 64)}
    params = {name: {"kernel": normal(*shape)} for name, shape in kernels.items()}
    found = jax.tree_util.tree_map_with_path(lambda path, x: axes_of(path, x) is not None, params)
    assert found == {name: {"kernel": name == "within"} for name in kernels}


@pytest.mark.parametrize(
    "settings, bytes_a_parameter",
    [
        ({"name": "adamw"}, 8),
        ({"name": "adam", "mu_dtype": "bfloat16"}, 6),
        ({"name": "adafactor"}, 4),
        ({"name": "adafactor", "mu_dtype": "bfloat16"}, 2),
        ({"name": "muon"}, 4.1),  # of embeddings and classifiers 8
        ({"name": "muon", "mu_dtype": "bfloat16"}, 2.1),
    ],
)
def test_what_moments_take(settings, bytes_a_parameter):
    """In a transformer with the proportions of the paper's, whose heads have 64 channels."""
    model = models.create(
        "rqtransformer", code_shape=(8, 8, 4), code_dim=256, codebook_size=16_384, model_dim=1536, num_heads=24,
        spatial_layers=42, depth_layers=6, cond_vocab_size=1000,
    )  # fmt: skip
    params = models.abstract_variables(model)["params"]
    state = jax.eval_shape(make_optimizer(learning_rate=0.1, total_steps=9, **settings).transform.init, params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size / weights == pytest.approx(bytes_a_parameter, rel=0.03)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_follows_its_formula(momentum):
    params, grads = {"w_IO": normal(I, O)}, [{"w_IO": normal(I, O, seed=seed)} for seed in (2, 3)]
    optimizer = make_optimizer(name="sgd", learning_rate=0.1, total_steps=9, schedule="constant", momentum=momentum)
    expected = -0.1 * (grads[1]["w_IO"] + momentum * grads[0]["w_IO"])
    np.testing.assert_allclose(updates_of(optimizer, params, grads)["w_IO"], expected, rtol=1e-5, atol=1e-7)


def test_clipping_acts_only_above_the_norm():
    params, grad = {"a": jnp.zeros(4), "b": jnp.zeros(3)}, {"a": normal(4), "b": normal(3, seed=1)}
    norm = float(np.sqrt(sum((leaf**2).sum() for leaf in grad.values())))

    def updates(clip_norm):
        optimizer = make_optimizer(
            name="sgd", learning_rate=1.0, total_steps=9, schedule="constant", clip_norm=clip_norm
        )
        return updates_of(optimizer, params, [grad])

    for name in grad:
        np.testing.assert_array_equal(updates(None)[name], -grad[name])
        np.testing.assert_array_equal(updates(1.01 * norm)[name], -grad[name])
        np.testing.assert_allclose(updates(norm / 4)[name], -grad[name] / 4, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "lion"}, "optim.name: 'lion' is unknown; allowed are 'adam', 'adamw', 'adafactor', 'muon' and 'sgd'"),
        ({"mu_dtype": "float16"}, "optim.mu_dtype: 'float16' is unknown; allowed are 'float32' and 'bfloat16'"),
        (
            {"name": "sgd", "mu_dtype": "bfloat16"},
            "optim.mu_dtype: bfloat16 is of first moments, and 'sgd' has none; leave it out",
        ),
        ({"schedule": "step"}, "optim.schedule: 'step' is unknown; allowed are 'cosine' and 'constant'"),
        ({"weight_decay": 0.1}, "optim.weight_decay: 0.1 is read by 'adamw' only, not by 'adam'; set it to 0"),
        ({"momentum": 0.9}, "optim.momentum: 0.9 is read by 'sgd' only, not by 'adam'; set it to 0"),
        (
            {"schedule": "constant", "final_learning_rate": 0.05},
            "optim.final_learning_rate: 0.05 is read by 'cosine' only, not by 'constant'; set it to 0",
        ),
        ({"final_learning_rate": -1.0}, "optim.final_learning_rate: -1.0 is outside [0, 0.1], the peak"),
        ({"learning_rate": 0.0}, "optim.learning_rate: 0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "optim.learning_rate: nan must be above 0"),
        ({"warmup_steps": 10}, "optim.warmup_steps: 10 is outside 0..9, the steps of the run"),
        ({"warmup_steps": -1}, "optim.warmup_steps: -1 is outside 0..9, the steps of the run"),
        ({"hold_steps": -1}, "optim.hold_steps: -1 is outside 0..9, the steps after the warm-up"),
        ({"hold_steps": 6, "warmup_steps": 4}, "optim.hold_steps: 6 is outside 0..5, the steps after the warm-up"),
        (
            {"hold_steps": 2, "schedule": "constant"},
            "optim.hold_steps: 2 is read by 'cosine' only, not by 'constant'; set it to 0",
        ),
        (
            {"initial_learning_rate": 0.2, "warmup_steps": 2},
            "optim.initial_learning_rate: 0.2 is outside [0, 0.1], the peak",
        ),
        (
            {"initial_learning_rate": 0.05},
            "optim.initial_learning_rate: 0.05 needs a warm-up; set it to 0 or set warmup_steps",
        ),
        ({"clip_norm": 0.0}, "optim.clip_norm: 0.0 must be above 0; None clips nothing"),
        ({"accumulation_steps": 0}, "optim.accumulation_steps: 0 must be at least 1"),
        (
            {"use_sharded_gradients": True},
            "optim.use_sharded_gradients: True is of micro-batches; set accumulation_steps above 1",
        ),
    ],
)
def test_make_optimizer_refuses(settings, message):
    with pytest.raises(ValueError) as error:
        make_optimizer(**{"learning_rate": 0.1, "total_steps": 9, **settings})
    assert str(error.value) == message


def decayed_names(model):
    mask = decay_mask(models.abstract_variables(model)["params"])
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {path[-1].key for path, decays in leaves if decays}, {path[-1].key for path, decays in leaves if not decays}


def test_weight_decay_is_for_the_matrices_of_the_transformer():
    model = models.create(
        "rqtransformer", codebook_size=7, code_shape=(3, 5, 4), code_dim=6, model_dim=8, num_heads=2,
        spatial_layers=2, depth_layers=1, cond_vocab_size=11, cond_length=2, use_tokenizer_depth_input=False,
    )  # fmt: skip
    decayed, spared = decayed_names(model)
    assert decayed == {"input_EM", "qkv_M3NA", "out_NAM", "up_MF", "down_FM", "classifier_MK", "cond_classifier_MV"}
    assert spared == {
        "token_embedding_KM", "cond_embedding_VM", "position_TM", "depth_position_DM", "cond_position_UM",
        "input_bias_M", "qkv_bias_3NA", "out_bias_M", "up_bias_F", "down_bias_M",
        "classifier_bias_K", "cond_classifier_bias_V", "scale", "bias",
    }  # fmt: skip


def test_weight_decay_is_for_the_kernels_of_the_autoencoder():
    model = models.create(
        "rqvae", image_size=8, code_shape=(2, 4, 3), code_dim=6, codebook_size=7, width=8, width_multipliers=(1, 2),
        num_res_blocks=1, attention_resolutions=(4,), z_channels=5,
    )  # fmt: skip
    assert decayed_names(model) == ({"kernel"}, {"bias", "scale"})


# --- the average of weights ---------------------------------------------------------------------------------


def test_average_weights_is_the_recursion():
    average, expected = {"w": jnp.asarray(normal(I, O))}, normal(I, O).astype(np.float64)
    for step in range(30):
        params = normal(I, O, seed=step + 1)
        average = average_weights(average, {"w": params}, 0.7, step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * params
        np.testing.assert_allclose(average["w"], expected, rtol=1e-5, atol=1e-6)
    assert decay == 0.7  # both sides of the minimum were met
    fixed = average_weights({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, 0.7)
    np.testing.assert_allclose(fixed["w"], 0.7)


def test_average_weights_agrees_with_the_original(goldens):
    settings = json.loads((goldens / "optim.config.json").read_text())["ema"]
    with np.load(goldens / "optim.io.npz") as file:
        io = {name: array for name, array in file.items() if array.dtype == np.float32}  # not the integer buffer

    def read(prefix):
        return {name.removeprefix(prefix): array for name, array in io.items() if name.startswith(prefix)}

    average = read("ema.init.")
    assert len(average) == 6
    for i, step in enumerate(settings["steps"]):
        average = average_weights(average, read(f"ema.{i}.src."), settings["mu"], step)
        for name, expected in read(f"ema.{i}.avg.").items():
            within = dict(rtol=0, atol=1e-6 * np.abs(expected).max())
            np.testing.assert_allclose(average[name], expected, **within, err_msg=name)


# --- the update ---------------------------------------------------------------------------------------------

OPTIMIZER = make_optimizer(name="adamw", learning_rate=0.1, total_steps=9, weight_decay=0.1)


def toy_state(use_ema=True):
    variables = {"params": {"w_IO": normal(I, O), "bias_O": normal(O)}, "codebook": {"counts_K": jnp.ones(7)}}
    return create_state(variables, OPTIMIZER, jax.random.key(3), use_ema)


@jax.jit
def update(state, grads, loss, model_state):
    return apply_gradients(state, OPTIMIZER, grads, loss, model_state, 0.99)


def kept(state):
    return {
        "params": state.params,
        "opt_state": state.opt_state,
        "ema_params": state.ema_params,
        "model_state": state.model_state,
    }


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_step_updates_everything():
    state = toy_state()
    grads, model_state = jax.tree.map(jnp.ones_like, state.params), {"codebook": {"counts_K": jnp.full(7, 2.0)}}
    after, metrics = update(state, grads, 1.5, model_state)
    updates, opt_state = OPTIMIZER.transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    expected = {
        "params": params,
        "opt_state": opt_state,
        "ema_params": jax.tree.map(lambda a, p: 0.1 * a + 0.9 * p, state.params, params),
        "model_state": model_state,
    }
    for actual, wanted in zip(leaves(kept(after)), leaves(expected), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-7)
    assert (int(after.step), int(after.skipped_steps)) == (1, 0)
    assert set(metrics) == {"gradient_norm", "learning_rate", "skipped_share"}
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(I * O + O), rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)
    assert after.variables == {"params": after.params, "codebook": after.model_state["codebook"]}
    assert after.ema_variables == {"params": after.ema_params, "codebook": after.model_state["codebook"]}


@pytest.mark.parametrize("fault", ["loss", "gradient", "infinite gradient"])
def test_a_faulty_step_is_counted_and_changes_nothing(fault):
    state, _ = update(toy_state(), jax.tree.map(jnp.ones_like, toy_state().params), 1.0, toy_state().model_state)
    grads = jax.tree.map(jnp.ones_like, state.params)
    if fault != "loss":
        bad = jnp.nan if fault == "gradient" else jnp.inf
        grads["w_IO"] = grads["w_IO"].at[2, 1].set(bad)
    model_state = {"codebook": {"counts_K": jnp.full(7, jnp.nan)}}
    after, metrics = update(state, grads, jnp.nan if fault == "loss" else 1.0, model_state)
    for actual, expected in zip(leaves(kept(after)), leaves(kept(state)), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert (int(after.step), int(after.skipped_steps), int(metrics["skipped_share"])) == (2, 1, 1)
    again, _ = update(after, grads, jnp.nan, model_state)
    assert (int(again.step), int(again.skipped_steps)) == (3, 2)


def test_the_learning_rate_told_is_the_one_applied_after_a_skipped_step():
    optimizer = make_optimizer(name="sgd", learning_rate=1.0, total_steps=20, warmup_steps=10)
    state = create_state({"params": {"w": jnp.zeros(())}}, optimizer, jax.random.key(0), False)
    for loss in (0.0, np.nan, 0.0, np.nan, 0.0):
        before = state.params["w"]
        state, metrics = apply_gradients(state, optimizer, {"w": jnp.ones(())}, jnp.float32(loss), {}, 0.0)
        applied = float(before - state.params["w"])
        if np.isfinite(loss):
            np.testing.assert_allclose(metrics["learning_rate"], applied, atol=1e-6)
    np.testing.assert_allclose(applied, 0.2, atol=1e-6)  # the third update, though the fifth step


@pytest.mark.parametrize("name", ["adam", "adamw", "adafactor", "muon", "sgd"])
def test_at_twice_the_pace_durations_are_half_as_long(name):
    longer, shorter = (
        make_optimizer(name=name, learning_rate=0.1, total_steps=steps, warmup_steps=steps // 6, hold_steps=steps // 6)
        for steps in (24, 12)
    )
    first = create_state({"params": {"w_IO": normal(I, O)}}, longer, jax.random.key(0), True)
    of_longer, of_shorter = first.replace(pace=jnp.float32(2)), first
    for seed in range(8):
        grads = {"w_IO": normal(I, O, seed=seed)}
        of_longer, metrics = apply_gradients(of_longer, longer, grads, jnp.float32(0), {}, 0.9)
        of_shorter, expected = apply_gradients(of_shorter, shorter, grads, jnp.float32(0), {}, 0.9)
        assert metrics["learning_rate"] == expected["learning_rate"] == shorter.learning_rate(seed)
    for a, b in zip(leaves(kept(of_longer)), leaves(kept(of_shorter)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(of_longer.params["w_IO"], first.params["w_IO"])


def test_an_optimizer_made_by_hand_needs_no_pace():
    optimizer = Optimizer(optax.sgd(0.5), lambda step: 0.5, 1)
    state = create_state({"params": {"w": jnp.zeros(())}}, optimizer, jax.random.key(0), False)
    state, _ = apply_gradients(state, optimizer, {"w": jnp.ones(())}, jnp.float32(0), {}, 0.0)
    assert state.params["w"] == -0.5


def test_without_an_average_none_is_kept():
    state = toy_state(use_ema=False)
    after, _ = update(state, jax.tree.map(jnp.ones_like, state.params), 1.0, state.model_state)
    assert state.ema_params is None and after.ema_params is None
    assert after.ema_variables == after.variables


def test_the_average_starts_as_a_copy_with_buffers_of_its_own():
    state = toy_state()
    for average, param in zip(jax.tree.leaves(state.ema_params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(average, param)
        assert average is not param  # both are donated


# --- random keys --------------------------------------------------------------------------------------------


def test_keys_depend_on_use_and_step_alone():
    state, seen = toy_state(), set()
    for step in range(3):
        at_step = state.replace(step=jnp.int32(step))
        keys = at_step.rng_of_step("dropout", "codes", "restart")
        alone = at_step.rng_of_step("codes")
        assert list(keys) == ["dropout", "codes", "restart"] and list(alone) == ["codes"]
        assert keys["codes"] == alone["codes"]
        seen |= {tuple(jax.random.key_data(key).tolist()) for key in keys.values()}
    assert len(seen) == 9
    other_seed = state.replace(rng=jax.random.key(4)).rng_of_step("codes")["codes"]
    assert other_seed != state.rng_of_step("codes")["codes"]


# --- micro-batches ------------------------------------------------------------------------------------------

BATCH = {"x": normal(12, I, seed=1), "y": normal(12, O, seed=2)}


def loss_and_grads(params, batch, rngs):
    def loss_fn(params):
        prediction = jnp.tanh(batch["x"] @ params["w_IO"]) + params["bias_O"][None]
        per_output_O = jnp.mean((prediction - batch["y"]) ** 2, axis=0)
        return per_output_O.sum(), per_output_O

    (loss, per_output_O), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return {"loss": loss, "per_output": per_output_O}, grads


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 12])
def test_micro_batches_give_the_gradient_of_the_whole_batch(num_steps):
    params = toy_state().params
    run = jax.jit(functools.partial(accumulate_gradients, loss_and_grads, num_steps=num_steps))
    actual, expected = run(params, BATCH, rngs={}), loss_and_grads(params, BATCH, {})
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def test_each_micro_batch_has_rows_and_keys_of_its_own():
    def weigh_rows(params, batch, rngs):
        return {use: batch["row"] * jax.random.uniform(key) for use, key in rngs.items()}

    rngs = {"dropout": jax.random.key(1), "codes": jax.random.key(2)}
    actual = accumulate_gradients(weigh_rows, None, {"row": jnp.arange(6.0)}, 3, rngs)
    for use, key in rngs.items():
        draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(3)]
        assert len(set(map(float, draws))) == 3
        expected = sum(np.arange(i, 6.0, 3) * draw for i, draw in enumerate(draws)) / 3
        np.testing.assert_allclose(actual[use], expected, rtol=1e-6)
    whole = accumulate_gradients(weigh_rows, None, {"row": jnp.arange(6.0)}, 1, rngs)
    np.testing.assert_allclose(whole["codes"], np.arange(6.0) * jax.random.uniform(rngs["codes"]), rtol=1e-6)

"""The DQ-Transformer: what each logit depends on, every switch, the cached methods against the forward pass."""

import functools
import math

import flax
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_dqtransformer import BASE, CLASS, DEEP, KINDS, NULL, TEXT, THREE, B, K, M, U, V, build, conds, draw, pack, run

from rq_jax import grains, losses
from rq_jax.devices import sharding
from rq_jax.grains import GrainedCodes, PackedCodes
from rq_jax.models import create, init_variables
from rq_jax.nn.attention import InferenceWeight
from rq_jax.training.optimizer import decay_mask


def cut(packed, slots):
    """Some of the tokens of every image."""
    return PackedCodes(*(array[:, slots] for array in packed[:3]), packed.length)


def shapes(variables):
    return flax.traverse_util.flatten_dict(jax.tree.map(jnp.shape, variables["params"]), sep=".")


@pytest.fixture(params=KINDS)
def case(request):
    """A model of each kind, its variables, tokens, condition, and the output of its forward pass."""
    model, variables = build(**KINDS[request.param])
    packed, cond = pack(model), conds(model)
    return model, variables, packed, cond, run(model, variables, packed, cond)


# --- the forward pass -----------------------------------------------------------------------------


def test_shapes(case):
    model, _, packed, cond, output = case
    P, (_, _, depth), last = packed.position.shape[1], model.code_shape, model.num_grains - 1
    assert output.position_logits.shape == (B, P - 1, model.layout.position_size(last))
    assert output.content_logits.shape == (B, P - 1, depth, model.layout.content_size)
    assert output.position_logits.dtype == output.content_logits.dtype == jnp.float32
    assert output.cond_logits is None if not model.is_text else output.cond_logits.shape == (B, U - 1, V)
    np.testing.assert_array_equal(output.tokens.grain, packed.grain)


def test_fresh_variables():
    model = create("dqtransformer", **{**BASE, **DEEP, **NULL})
    variables = init_variables(model, jax.random.key(0))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, build(**DEEP, **NULL)[1])
    assert bool(jnp.isnan(variables["codebook"]["codebook_KE"]).all())
    params = variables["params"]
    assert not params["slot_embedding_PM"].any() and 0.015 < float(params["content_embedding_KM"].std()) < 0.025
    assert build()[1].keys() == {"params"}  # nothing reads the tokenizer's codebook at depth one


def test_2_tokens_depend_on_earlier_tokens_alone(case):
    model, variables, packed, cond, output = case
    P = packed.position.shape[1]
    for t in (1, 5, int(packed.length.min()) - 2):
        changed = packed._replace(content=packed.content.at[:, t, 0].set((packed.content[:, t, 0] + 3) % K))
        other = run(model, variables, changed, cond)
        pairs = {
            "position": (output.position_logits, other.position_logits),
            "content": (output.content_logits[:, :, 0], other.content_logits[:, :, 0]),
        }
        for name, (before, after) in pairs.items():
            np.testing.assert_array_equal(after[:, :t], before[:, :t], name)
            assert bool((jnp.abs(after - before)[:, t:].reshape(B, P - 1 - t, -1).max(-1) > 1e-4).all()), name


def test_2_logits_do_not_depend_on_batch_mates_or_the_number_of_pads(case):
    model, variables, packed, cond, output = case
    mates = jax.tree.map(lambda one, other: other.at[0].set(one[0]), packed, pack(model, seed=7))
    same = run(model, variables, mates, cond)
    longer = max(int(packed.length.max()), packed.position.shape[1] - 4)
    assert longer < packed.position.shape[1]
    bucket = run(model, variables, pack(model, tokens=longer), cond)
    for name in ("position_logits", "content_logits"):
        expected = getattr(output, name)
        np.testing.assert_array_equal(getattr(same, name)[0], expected[0])
        np.testing.assert_allclose(getattr(bucket, name), expected[:, : longer - 1], rtol=0, atol=1e-5)


def test_3_content_knows_the_next_position_and_position_does_not(case):
    model, variables, packed, cond, output = case
    t = 4
    moved = packed._replace(position=packed.position.at[:, t + 1].set((packed.position[:, t + 1] + 1) % 4))
    other = run(model, variables, moved, cond)
    np.testing.assert_array_equal(other.position_logits[:, : t + 1], output.position_logits[:, : t + 1])
    np.testing.assert_array_equal(other.content_logits[:, :t], output.content_logits[:, :t])
    assert bool((jnp.abs(other.content_logits - output.content_logits)[:, t].max((1, 2)) > 1e-3).all())


def test_ids_alone_are_read():
    model, variables = build()
    packed = pack(model)
    changed = packed._replace(length=packed.length - 9)
    for one, other in zip(*(jax.tree.leaves(run(model, variables, x)[:2]) for x in (packed, changed)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("settings", [CLASS, NULL])
def test_a_class_takes_the_place_of_every_start_token(settings):
    model, variables = build(**settings)
    layout, packed, cond = model.layout, pack(model), jnp.array([V - 1, 2])
    assert layout.num_classes == V + model.use_null_cond
    tokens = run(model, variables, packed, cond, method="tokens")
    for i in range(B):
        for g in range(2):
            where = np.flatnonzero(np.asarray(packed.position[i] == layout.position_sos(g)) & (packed.grain[i] == g))
            assert len(where) == 1 and tokens.position[i, where[0]] == layout.position_sos(g) + cond[i]
            assert tokens.content[i, where[0], 0] == layout.content_sos + cond[i]
    assert int((tokens.position != packed.position).sum() + (tokens.content != packed.content).sum()) == 4 * B
    output, flat = run(model, variables, packed, cond[:, None]), run(model, variables, packed, cond)
    np.testing.assert_array_equal(flat.content_logits, output.content_logits)
    other = run(model, variables, packed, cond.at[0].set(1))
    assert bool((jnp.abs(other.position_logits - output.position_logits)[0].max(-1) > 1e-4).all())


def test_text_is_causal_and_reaches_all_logits():
    model, variables = build(**TEXT)
    packed, cond = pack(model), conds(model)
    output = run(model, variables, packed, cond)
    for i in range(U):
        changed = run(model, variables, packed, cond.at[:, i].set((cond[:, i] + 1) % V))
        np.testing.assert_array_equal(changed.cond_logits[:, :i], output.cond_logits[:, :i])
        assert bool((jnp.abs(changed.cond_logits - output.cond_logits)[:, i:].max(-1) > 1e-4).all())
        assert bool((jnp.abs(changed.position_logits - output.position_logits).max(-1) > 1e-5).all())
        assert bool((jnp.abs(changed.content_logits - output.content_logits).max((2, 3)) > 1e-5).all())


def test_deeper_codes_know_those_above_them():
    model, variables = build(**DEEP)
    packed = pack(model)
    output, t = run(model, variables, packed), 5
    changed = packed._replace(content=packed.content.at[:, t + 1, 0].set((packed.content[:, t + 1, 0] + 2) % K))
    logits = run(model, variables, changed).content_logits
    np.testing.assert_array_equal(logits[:, t, 0], output.content_logits[:, t, 0])
    assert bool((jnp.abs(logits[:, t, 1] - output.content_logits[:, t, 1]).max(-1) > 1e-3).all())
    changed = packed._replace(content=packed.content.at[:, t + 1, 1].set((packed.content[:, t + 1, 1] + 2) % K))
    logits = run(model, variables, changed).content_logits
    np.testing.assert_array_equal(logits[:, : t + 1], output.content_logits[:, : t + 1])
    assert bool((jnp.abs(logits - output.content_logits)[:, t + 1].max((1, 2)) > 1e-4).all())


def test_8_uniform_logits_give_the_logarithm_of_the_vocabulary(case):
    model, variables, packed, cond, _ = case
    params = variables["params"]
    heads = {name: 0 * params[name] for name in ("cell_classifier_MV", "classifier_MK")}
    output = run(model, {**variables, "params": {**params, **heads}}, packed, cond)
    nats = losses.stream_nats(output.position_logits, output.content_logits, output.tokens, model.layout)
    position_size = model.layout.position_size(model.num_grains - 1)
    np.testing.assert_allclose(nats.position / nats.position_counts, math.log(position_size), rtol=1e-5)
    np.testing.assert_allclose(nats.content / nats.content_counts, math.log(model.layout.content_size), rtol=1e-5)


# --- the cache ------------------------------------------------------------------------------------


def cached_logits(model, variables, packed, cond, first):
    """Position and content logits from the methods as a sampler calls them, `first` tokens at the first call."""
    (_, _, depth), P = model.code_shape, packed.position.shape[1]
    tokens = run(model, variables, packed, cond, method="tokens")
    cache, positions, contents = model.apply(variables, B, method="init_cache"), [], []
    start = 0
    for end in range(first, P):
        text = cond if model.is_text and start == 0 else None
        hidden, cond_logits, cache = run(
            model, variables, cut(tokens, slice(start, end)), text, cache, method="position"
        )
        assert hidden.shape == (B, end - start, M) and (cond_logits is None) == (text is None)
        following = cut(tokens, slice(start + 1, end + 1))
        context, cache = run(model, variables, hidden, following, cache, method="content")
        positions.append(run(model, variables, hidden[:, -1], method="classify_position"))
        for d in range(depth):
            known = following.content[:, -1, :d]
            deep, cache = run(model, variables, context[:, -1], known, cache, method="depth")
            contents.append(run(model, variables, deep, method="classify_content", index=d))
        start = end
    stacked = (np.stack(one, axis=1) for one in (positions, contents))
    return (array.reshape(B, P - first, *extra, -1) for array, extra in zip(stacked, ((), (depth,)), strict=True))


@pytest.mark.parametrize("first", [1, 6])
def test_9_cached_methods_equal_the_forward_pass(case, first):
    model, variables, packed, cond, output = case
    position_logits, content_logits = cached_logits(model, variables, packed, cond, first)
    np.testing.assert_allclose(position_logits, output.position_logits[:, first - 1 :], rtol=0, atol=1e-4)
    np.testing.assert_allclose(content_logits, output.content_logits[:, first - 1 :], rtol=0, atol=1e-4)


def test_weights_for_inference(case):
    model, variables, packed, cond, output = case
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.1)):
        narrow = model.for_inference(variables, dtype)
        logits = run(model, narrow, packed, cond)
        for name in ("position_logits", "content_logits"):
            expected = getattr(output, name)
            difference = float(jnp.abs(getattr(logits, name) - expected).max())
            assert difference < tolerance * float(jnp.abs(expected).max())
            assert dtype == "float32" or difference > 0
        leaves = jax.tree_util.tree_leaves_with_path(narrow, is_leaf=lambda x: isinstance(x, InferenceWeight))
        found = {path[-1].key for path, leaf in leaves if isinstance(leaf, InferenceWeight)}
        blocks = {"qkv_M3NA", "out_NAM", "up_MF", "down_FM"}
        assert found == ({"down_FM"} if dtype == "float32" else {*blocks, "cell_classifier_MV", "classifier_MK"})


# --- parameters and switches ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_for_the_matrices_of_layers_alone(kind):
    variables = build(**KINDS[kind])[1]
    decayed = {
        path for path, does in flax.traverse_util.flatten_dict(decay_mask(variables["params"]), sep=".").items() if does
    }
    stacks = ["position_stack", "content_stack", *(["depth_stack"] if kind == "depth two" else [])]
    expected = {f"{stack}.blocks.{name}" for stack in stacks for name in ("qkv_M3NA", "out_NAM", "up_MF", "down_FM")}
    expected |= {"cell_classifier_MV", "classifier_MK"}
    expected |= {"cond_classifier_MV"} if kind == "text" else set()
    expected |= {"depth_input_EM"} if kind == "depth two" else set()
    assert decayed == expected


def test_no_grain_embedding():
    (model, variables), (other, without) = build(), build(use_grain_embedding=False)
    assert shapes(variables).keys() - shapes(without).keys() == {"grain_embedding_GM"}
    zero = {**variables["params"], "grain_embedding_GM": 0 * variables["params"]["grain_embedding_GM"]}
    kept = {name: value for name, value in variables["params"].items() if name != "grain_embedding_GM"}
    packed = pack(model)
    logits = run(other, {"params": kept}, packed).content_logits
    np.testing.assert_allclose(logits, run(model, {"params": zero}, packed).content_logits, rtol=0, atol=1e-5)
    assert float(jnp.abs(logits - run(model, variables, packed).content_logits).max()) > 1e-2


@pytest.mark.parametrize("settings", [CLASS, THREE])
def test_a_shared_table_names_every_cell_by_the_finest_at_its_top_left(settings):
    (model, variables), (other, shared) = build(**settings), build(**settings, use_shared_position_embedding=True)
    layout, last = model.layout, model.num_grains - 1
    own = {f"position{g}_embedding_VM" for g in range(model.num_grains)}
    assert shapes(variables).keys() - shapes(shared).keys() == own
    assert shapes(shared).keys() - shapes(variables).keys() == {"position_embedding_VM"}
    table, tied = shared["params"]["position_embedding_VM"], {}
    w = layout.code_grid[1]
    for g in range(model.num_grains):
        rows, columns = layout.grid(g)
        step = 2 ** (last - g)
        ids = [row * step * w + column * step for row in range(rows) for column in range(columns)]
        tied[f"position{g}_embedding_VM"] = table[np.array([*ids, *range(layout.cells(last), len(table))])]
    kept = {name: value for name, value in shared["params"].items() if name != "position_embedding_VM"}
    packed, cond = pack(model), conds(model)
    expected = run(model, {"params": {**kept, **tied}}, packed, cond)
    output = run(other, shared, packed, cond)
    np.testing.assert_allclose(output.position_logits, expected.position_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(output.content_logits, expected.content_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "switch, dropout", helpers.others_slow([("use_remat", 0.1), ("use_flash_attention", 0.0)], [("use_remat", 0.1)])
)
def test_remat_and_flash_attention_change_no_output_and_no_gradient(switch, dropout):
    (model, variables), (other, same) = (
        build(**DEEP, residual_dropout=dropout, **{switch: on}) for on in (False, True)
    )
    assert shapes(same) == shapes(variables)
    packed = pack(model)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(params, model):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            output = model.apply({**variables, "params": params}, packed, train=True, rngs=rngs)
            nats = losses.stream_nats(output.position_logits, output.content_logits, output.tokens, model.layout)
            return nats.position.sum() / 100 + nats.content.sum() / 100

        return jax.value_and_grad(loss)(params)

    for a, b in zip(*(jax.tree.leaves(gradients(variables["params"], m)) for m in (model, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", ["embedding_dropout", "attention_dropout", "residual_dropout"])
def test_dropout_acts_in_training_only(rate):
    off = dict(embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    (model, variables), (dropping, _) = build(**off), build(**{**off, rate: 0.5})
    packed = pack(model)
    expected = run(model, variables, packed).content_logits
    np.testing.assert_array_equal(run(dropping, variables, packed).content_logits, expected)
    rngs = ({"dropout": jax.random.key(i)} for i in (0, 1))
    one, two = (run(dropping, variables, packed, train=True, rngs=rng).content_logits for rng in rngs)
    assert not np.allclose(one, two, atol=1e-3) and not np.allclose(one, expected, atol=1e-3)


def test_bfloat16_has_float32_logits_close_to_those_of_float32():
    (model, variables), (half, half_variables) = build(**DEEP), build(**DEEP, dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(half_variables)} == {jnp.dtype("float32")}
    packed = pack(model)
    for a, b in zip(run(half, variables, packed)[:2], run(model, variables, packed)[:2], strict=True):
        assert a.dtype == jnp.float32 and 0 < float(jnp.abs(a - b).max()) < 0.1 * float(jnp.abs(b).max())
    cache = half.apply(variables, B, rows=9, method="init_cache")
    assert {array.dtype for array in jax.tree.leaves(cache) if array.ndim} == {jnp.dtype("bfloat16")}
    assert cache.position.keys[0].shape[2] == cache.content.keys[0].shape[2] == 9


def test_all_grains_of_an_image_may_be_one():
    model, variables = build(**THREE)
    (u, v), full = model.region_grid, draw(model)
    coarse = GrainedCodes(jnp.repeat(jnp.repeat(full.codes[:, ::4, ::4], 4, 1), 4, 2), jnp.zeros((B, u, v), jnp.int32))
    for codes in (coarse, full._replace(grains=jnp.full((B, u, v), 2))):
        packed = grains.pack(codes, model.layout)
        assert bool(jnp.isfinite(run(model, variables, packed).content_logits).all())


# --- mistakes -------------------------------------------------------------------------------------


def wrong(name, index, value, **settings):
    """Tokens with one wrong id."""
    model, variables = build(**settings)
    packed = pack(model)
    return settings, packed._replace(**{name: getattr(packed, name).at[index].set(value)})


CALLS = {
    "content": (*wrong("content", (0, 3, 0), K + 3), None, r"^packed.content: 14 at \(0, 3, 0\) is outside 0..13"),
    "position": (*wrong("position", (1, 2), 9), None, r"^packed.position: 9 at \(1, 2\) is outside 0..8, the positions of grain 0"),
    "finest position": (*wrong("position", (1, 20), 27), None, r"^packed.position: 27 at \(1, 20\) is outside 0..26"),
    "grain": (*wrong("grain", (0, 1), 2), None, r"^packed.grain: 2 at \(0, 1\) is outside 0..1, the grains"),
    "negative": (*wrong("content", (0, 3, 0), -1), None, r"^packed.content: -1 at \(0, 3, 0\) is outside 0..13"),
    "depth": ({**DEEP}, pack(build()[0]), None, r"^packed.content: shape \(2, 28, 1\) does not fit; allowed is \(2, 28, 2\)"),
    "too many": ({"num_slots": 20}, pack(build()[0]), None, r"^packed: 28 tokens are more than model.num_slots 20; give fewer, or more slots"),
    "no condition": (CLASS, pack(build()[0]), None, r"^cond: this model needs a condition of shape \(B, 1\), none was given"),
    "class": (CLASS, pack(build()[0]), jnp.array([0, V]), r"^cond: tokens 0..5 do not all lie in \[0, 5\)"),
    "text": (TEXT, pack(build()[0]), jnp.zeros((B, 2), int), r"^cond: shape \(2, 2\) does not fit; allowed is \(2, 3\)"),
    "unconditional": ({}, pack(build()[0]), jnp.array([0, 1]), r"^cond: tokens 0..1 do not all lie in \[0, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CALLS)
def test_wrong_arguments_get_one_line(mistake):
    settings, packed, cond, message = CALLS[mistake]
    model, variables = build(**settings)
    with pytest.raises(ValueError, match=message):
        model.apply(variables, packed, cond)


def test_a_class_in_front_of_the_tokens_and_a_wrong_depth_are_refused():
    model, variables = build(**CLASS)
    with pytest.raises(ValueError, match="^cond: only text stands in front of the tokens; give a class to `tokens`"):
        model.apply(variables, pack(model), conds(model), method="position")
    with pytest.raises(ValueError, match="^depth: 1 is outside 0..0, the depths of a code"):
        model.apply(variables, jnp.zeros((B, M)), 1, method="classify_content")


def test_a_cache_takes_no_more_tokens_than_there_are_slots():
    model, variables = build(num_slots=6)
    tokens = pack(build()[0])
    cache = model.apply(variables, B, method="init_cache")
    _, _, cache = model.apply(variables, cut(tokens, slice(0, 4)), None, cache, method="position")
    with pytest.raises(
        ValueError, match="^tokens: 7 tokens are more than model.num_slots 6; give fewer, or more slots"
    ):
        model.apply(variables, cut(tokens, slice(4, 7)), None, cache, method="position")


SETTINGS = {
    "grains": ({"num_grains": 1}, r"^model.num_grains: 1 must be an integer and at least 2$"),
    "grid": ({"num_grains": 3}, r"^model.code_shape: w = 6 must be a positive multiple of 4, for 3 grains$"),
    "order": ({"order": "raster"}, r"^model.order: 'raster' is unknown; allowed are 'row' and 'region'$"),
    "slots": ({"num_slots": 1}, r"^model.num_slots: 1 must be an integer and at least 2$"),
    "position_layers": ({"position_layers": -1}, r"^model.position_layers: -1 must be at least 0$"),
    "content_layers": ({"content_layers": -2}, r"^model.content_layers: -2 must be at least 0$"),
    "a depth stack": ({"depth_layers": 1}, r"^model.depth_layers: 1 does not fit code depth 1; set it to 0, where there is no depth stack$"),
    "no depth stack": ({"code_shape": (4, 6, 2)}, r"^model.depth_layers: 0 does not fit code depth 2; codes below the first need at least 1$"),
    "sizes": ({**DEEP, "codebook_size": (7, 5)}, r"^model.codebook_size: \(7, 5\) is not of type int$"),
    "null": ({"use_null_cond": True}, r"^model.use_null_cond: an unconditional model has no condition to leave out"),
    "heads": ({"num_heads": 5}, r"^model.num_heads: 5 does not divide model_dim 12; choose a divisor of it$"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SETTINGS)
def test_wrong_settings_get_one_line(mistake):
    settings, message = SETTINGS[mistake]
    with pytest.raises(ValueError, match=message):
        create("dqtransformer", **{**BASE, **settings})


# --- over devices ---------------------------------------------------------------------------------


def test_a_mesh_of_all_axes_gives_one_devices_logits_and_gradients():
    model, variables = build(**DEEP, **CLASS, model_dim=16)
    packed, cond = pack(model, 4), conds(model, 4)
    mesh = helpers.make_mesh(data=2, fsdp=2, tensor=2)
    places = sharding.state_shardings(mesh, variables["params"])
    assert places["cell_classifier_MV"].spec[0] == "fsdp" and places["position0_embedding_VM"].spec[1] == "fsdp"
    assert places["position_stack"]["blocks"]["up_MF"].spec[1:] == ("fsdp", "tensor")

    def loss(params, packed, cond):
        output = model.apply({**variables, "params": params}, packed, cond)
        nats = losses.stream_nats(output.position_logits, output.content_logits, output.tokens, model.layout)
        return (nats.position.sum() + nats.content.sum()) / 100, output[:2]

    def over_devices(params, packed, cond):
        with sharding.activations(mesh):
            return jax.value_and_grad(loss, has_aux=True)(params, packed, cond)

    inputs = jax.device_put((packed, cond), sharding.batch_sharding(mesh))
    found = jax.jit(over_devices)(jax.device_put(variables["params"], places), *inputs)
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"], packed, cond)
    helpers.assert_close(found, expected, 1e-4)

"""generate() for a DQ-Transformer: coverage of every cell, agreement with the forward pass, determinism, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from toy_dqtransformer import CLASS, NULL, TEXT, K, V, build, conds, run
from toy_transformer import CODES
from toy_transformer import build as build_rq

from rq_jax import grains
from rq_jax.grains import GrainedCodes, PackedCodes
from rq_jax.sampling import draws, filter_logits, generate
from rq_jax.sampling.grain_inputs import expected_tokens
from rq_jax.sampling.grains import generate_grains

RNG, B = jax.random.key(5), 3
SMALL = dict(code_shape=(2, 6, 1), content_layers=1)
DEEP = dict(code_shape=(2, 6, 2), content_layers=1, depth_layers=1)
THREE = dict(code_shape=(4, 8, 1), content_layers=1, num_grains=3, order="region", use_null_cond=True, **CLASS)
KINDS = {
    "none": SMALL,
    "class": {**SMALL, **CLASS},
    "text": {**SMALL, **TEXT},
    "three grains": THREE,
    "depth two": DEEP,
}


@pytest.fixture(params=KINDS)
def case(request):
    """A model of each kind, its variables, and a condition of each image."""
    model, variables = build(**KINDS[request.param])
    return model, variables, conds(model, B)


def followers(layout, tokens):
    """Positions and grains that may follow the tokens of an image, by going through all its cells; written for reading."""
    last = layout.num_grains - 1
    position, grain = tokens[-1]
    if position == layout.position_eos(grain):
        return [(layout.position_sos(grain + 1), grain + 1)] if grain < last else [(layout.position_pad(last), last)]

    def region_of(cell, g):
        row, column = divmod(cell, layout.grid(g)[1])
        return (row >> g) * layout.region_grid[1] + (column >> g)

    owner = {region_of(p, g): g for p, g in tokens if p < layout.cells(g)}
    order = layout.cell_order(grain).tolist()
    behind = order.index(position) + 1 if position < layout.cells(grain) else 0
    allowed, begun = [], set()
    for cell in order[behind:]:
        region = region_of(cell, grain)
        if owner.get(region) == grain or (grain == last and region not in owner):
            return [*allowed, (cell, grain)]  # it has to come before anything after it
        if region not in owner and region not in begun:
            begun.add(region)
            allowed.append((cell, grain))
    return [*allowed, (layout.position_eos(grain), grain)]


def check_codes(model, drawn, count=B):
    """Codes of the grains that are given with them: repeated over coarse cells, none of them special."""
    (h, w, depth), (u, v) = model.code_shape, model.region_grid
    assert drawn.codes.shape == (count, h, w, depth) and drawn.grains.shape == (count, u, v)
    assert drawn.codes.dtype == drawn.grains.dtype == jnp.int32
    assert bool(((drawn.codes >= 0) & (drawn.codes < K)).all())
    packed = grains.pack(drawn, model.layout)
    unpacked = grains.unpack(packed, model.layout)
    assert not unpacked.holes.any()
    np.testing.assert_array_equal(unpacked.codes.codes, drawn.codes)
    np.testing.assert_array_equal(unpacked.codes.grains, drawn.grains)
    return packed


# --- agreement with the forward pass --------------------------------------------------------------


def test_9_greedy_sampling_is_greedy_in_the_forward_pass_among_what_may_follow(case):
    model, variables, cond = case
    drawn = generate(model, variables, RNG, B, cond, temperature=0.0)
    packed = check_codes(model, drawn)
    output = jax.tree.map(np.asarray, run(model, variables, packed, cond))
    for i in range(B):
        ids = list(zip(packed.position[i].tolist(), packed.grain[i].tolist(), strict=True))
        for t in range(int(packed.length[i]) - 1):
            allowed = followers(model.layout, ids[: t + 1])
            logits = output.position_logits[i, t, [position for position, _ in allowed]]
            margin = np.diff(np.sort(logits)[-2:])
            assert not margin.size or margin[0] > 1e-5, "too close to compare"
            assert ids[t + 1] == allowed[int(np.argmax(logits))]
            if ids[t + 1][0] < model.layout.cells(ids[t + 1][1]):
                codes = np.argmax(output.content_logits[i, t, :, :K], axis=-1)
                np.testing.assert_array_equal(packed.content[i, t + 1], codes)


def test_positions_and_codes_follow_the_filtered_distributions():
    n, settings = 5000, dict(code_shape=(2, 4, 1), model_dim=4, num_heads=1, content_layers=1, codebook_size=3)
    model, variables = build(**settings)
    values = {"temperature": 2.0, "top_k": 2, "position_temperature": 1.5, "position_top_p": 0.95}
    drawn = generate(model, variables, RNG, n, **values)
    layout, counts = model.layout, {}
    for codes, region_grains in zip(np.asarray(drawn.codes[:, ::2, ::2, 0]), np.asarray(drawn.grains), strict=True):
        coarse = tuple(int(code) if g == 0 else -1 for code, g in zip(codes[0], region_grains[0], strict=True))
        counts[coarse] = counts.get(coarse, 0) + 1
    total = 0.0
    for coarse in [(a, b) for a in (-1, 0, 1, 2) for b in (-1, 0, 1, 2)]:
        cells = [(cell, code) for cell, code in enumerate(coarse) if code >= 0]
        tokens = [(layout.position_sos(0), layout.content_sos), *cells, (layout.position_eos(0), layout.content_eos)]
        position, content = (jnp.array([ids], jnp.int32) for ids in zip(*tokens, strict=True))
        packed = PackedCodes(content[..., None], position, jnp.zeros_like(position), jnp.array([len(tokens)]))
        output, probability = run(model, variables, packed), 1.0
        for t in range(len(tokens) - 1):
            before = [(p, 0) for p, _ in tokens[: t + 1]]
            allowed = np.zeros(layout.position_size(1), bool)
            allowed[[p for p, _ in followers(layout, before)]] = True
            logits = jnp.where(allowed, output.position_logits[0, t], -jnp.inf)
            probability *= float(filter_logits(logits, 1.5, None, 0.95)[tokens[t + 1][0]])
            if tokens[t + 1][1] < 3:
                probability *= float(filter_logits(output.content_logits[0, t, 0, :3], 2.0, 2)[tokens[t + 1][1]])
        expected, found = n * probability, counts.get(coarse, 0)
        total += probability
        assert abs(found - expected) <= 5 * np.sqrt(expected), coarse
    assert total == pytest.approx(1, abs=1e-4)


# --- coverage -------------------------------------------------------------------------------------


def test_10_every_cell_is_covered_once_whatever_is_drawn(case):
    model, variables, cond = case
    n = 13 * B  # in batches of the program that other tests run
    starts = range(0, n, B)
    batches = [generate(model, variables, RNG, B, cond, temperature=30.0, image_ids=range(i, i + B)) for i in starts]
    drawn = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
    check_codes(model, drawn, n)
    layout = model.layout
    for g in range(model.num_grains):  # each region, the last included, may have each grain
        assert bool((drawn.grains == g).any(axis=0).all()), g
    packed = grains.pack(drawn, layout)
    for i in range(3):
        owners = np.asarray(drawn.grains[i]).ravel()
        ids = list(zip(packed.position[i].tolist(), packed.grain[i].tolist(), strict=True))
        assert ids[: int(packed.length[i])] == expected_tokens(layout, owners)


def test_10_a_broken_model_still_covers_every_cell_once():
    model, variables = build(**SMALL)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), variables)
    for settings in ({}, {"position_top_k": 2, "top_p": 0.5}):
        check_codes(model, generate(model, broken, RNG, B, **settings))


def test_positions_have_filters_of_their_own():
    model, variables = build(**SMALL)
    layout = model.layout
    for settings in ({"position_temperature": 0.0}, {"position_top_k": 1}, {"position_top_p": 0.0}):
        drawn = generate(model, variables, RNG, B, temperature=8.0, **settings)
        packed = check_codes(model, drawn)
        logits = np.asarray(run(model, variables, packed).position_logits)
        greedy_codes = jnp.argmax(run(model, variables, packed).content_logits[:, :, 0, :K], axis=-1)
        for i in range(B):
            ids = list(zip(packed.position[i].tolist(), packed.grain[i].tolist(), strict=True))
            for t in range(int(packed.length[i]) - 1):
                assert ids[t + 1] == max(followers(layout, ids[: t + 1]), key=lambda token: logits[i, t, token[0]])
        is_code = packed.content[:, 1:, 0] < K
        assert float((packed.content[:, 1:, 0] == greedy_codes)[is_code].mean()) < 0.7
    by_codes = generate(model, variables, RNG, B, temperature=0.0)
    both = generate(model, variables, RNG, B, temperature=0.0, position_temperature=0.0)
    np.testing.assert_array_equal(both.codes, by_codes.codes)


def test_a_temperature_for_each_depth():
    model, variables = build(**DEEP)
    drawn = generate(model, variables, RNG, 16, temperature=[9.0, 0.0], position_temperature=1.0)
    packed = check_codes(model, drawn, 16)
    greedy = jnp.argmax(run(model, variables, packed).content_logits[..., :K], axis=-1) == packed.content[:, 1:]
    is_code = packed.content[:, 1:, 0] < K
    assert bool(greedy[..., 1][is_code].all()) and float(greedy[..., 0][is_code].mean()) < 0.6


# --- determinism ----------------------------------------------------------------------------------


def assert_same(drawn, expected):
    for ours, theirs in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_codes_of_an_image_depend_on_its_id_alone():
    model, variables = build(**SMALL)
    eight = generate(model, variables, RNG, 8)
    assert len({codes.tobytes() for codes in np.asarray(eight.codes)}) == 8
    for ids in ([0, 1, 2], [6, 0, 3], [7]):
        drawn = generate(model, variables, RNG, len(ids), image_ids=ids)
        assert_same(drawn, jax.tree.map(lambda array, ids=ids: array[np.array(ids)], eight))


def test_eight_devices_draw_the_same_codes():
    model, variables = build(**SMALL, **CLASS)
    cond = jnp.arange(8) % V
    expected = generate(model, variables, RNG, 8, cond)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_device = jax.device_put(variables, NamedSharding(mesh, P())), NamedSharding(mesh, P("data"))
    assert_same(generate(model, replicated, RNG, 8, cond, sharding=by_device), expected)


def test_15_changing_values_never_recompiles():
    model, variables = build(**SMALL)
    drawn = generate(model, variables, RNG, B, top_k=5, position_top_p=0.9)
    compiled = generate_grains._cache_size()
    packed = grains.pack(drawn, model.layout)
    for values in (
        {"temperature": 0.5, "top_k": 10**6},
        {"temperature": 0, "position_top_p": 1},
        {"position_temperature": 3.0, "image_ids": [7, 9, 11]},
        {"grains": drawn.grains},
        {"grains": jnp.zeros_like(drawn.grains)},
        {"prefix": packed._replace(length=packed.length - 3)},
        {"prefix": packed._replace(length=jnp.array([0, 1, 5]))},
    ):
        generate(model, variables, jax.random.key(1), B, **{"top_k": 5, "position_top_p": 0.9, **values})
        assert generate_grains._cache_size() == compiled, values


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights(dtype):
    model, variables = build(**SMALL)
    narrow = model.for_inference(variables, dtype)
    drawn = generate(model, narrow, RNG, B)
    check_codes(model, drawn)
    assert float((drawn.codes == generate(model, variables, RNG, B).codes).mean()) > 0.3


# --- what is given --------------------------------------------------------------------------------


def test_a_given_grain_map_is_kept(case):
    model, variables, cond = case
    drawn = generate(model, variables, RNG, B, cond)
    assert_same(
        generate(model, variables, RNG, B, cond, grains=drawn.grains), drawn
    )  # positions have draws of their own
    for g in range(model.num_grains):
        same = np.full(drawn.grains.shape, g)
        np.testing.assert_array_equal(generate(model, variables, RNG, B, cond, grains=same).grains, same)
    mixed = jnp.asarray(np.random.default_rng(0).integers(0, model.num_grains, drawn.grains.shape))
    forced = generate(model, variables, RNG, B, cond, grains=mixed, temperature=0.0)
    np.testing.assert_array_equal(forced.grains, mixed)
    packed = check_codes(model, forced)
    greedy = jnp.argmax(run(model, variables, packed, cond).content_logits[..., :K], axis=-1)
    is_code = packed.content[:, 1:] < K
    np.testing.assert_array_equal(greedy[is_code], packed.content[:, 1:][is_code])


def test_a_prefix_is_kept_and_continued_as_before(case):
    model, variables, cond = case
    drawn = generate(model, variables, RNG, B, cond)
    packed = grains.pack(drawn, model.layout)
    for lengths in ([0, 4, 9], packed.length):
        prefix = packed._replace(length=jnp.asarray(lengths))
        assert_same(generate(model, variables, RNG, B, cond, prefix=prefix), drawn)
    # Of other codes the first tokens stay, whatever follows them; a class in the start tokens is no matter.
    other = grains.pack(generate(model, variables, jax.random.key(9), B, cond), model.layout)
    kept = jnp.minimum(jnp.array([1, 6, 8]), other.length)
    with_class = run(model, variables, other, cond, method="tokens")
    continued = grains.pack(
        generate(model, variables, RNG, B, cond, prefix=with_class._replace(length=kept)), model.layout
    )
    for i, count in enumerate(kept.tolist()):
        for ours, theirs in zip(continued[:3], other[:3], strict=True):
            np.testing.assert_array_equal(ours[i, :count], theirs[i, :count])


@pytest.mark.parametrize("kind", [{**SMALL, **NULL}, {**SMALL, **TEXT, "use_null_cond": True}])
def test_guidance_mixes_the_logits_with_those_of_the_null_condition(kind):
    model, variables = build(**kind)
    cond = conds(model, B)
    assert_same(generate(model, variables, RNG, B, cond, guidance=1.0), generate(model, variables, RNG, B, cond))
    drawn = generate(model, variables, RNG, B, cond, guidance=2.5, temperature=0.0)
    packed = check_codes(model, drawn)
    with_cond, without = (run(model, variables, packed, c) for c in (cond, jnp.full_like(cond, V)))
    positions, contents = (b + 2.5 * (a - b) for a, b in zip(with_cond[:2], without[:2], strict=True))
    for i in range(B):
        ids = list(zip(packed.position[i].tolist(), packed.grain[i].tolist(), strict=True))
        for t in range(int(packed.length[i]) - 1):
            allowed = followers(model.layout, ids[: t + 1])
            assert ids[t + 1] == max(allowed, key=lambda token: positions[i, t, token[0]])
            if packed.content[i, t + 1, 0] < K:
                assert int(jnp.argmax(contents[i, t, 0, :K])) == packed.content[i, t + 1, 0]


# --- as released ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "free"])
def test_as_released_never_draws_the_last_coarse_cell(kind):
    model, variables = build(**SMALL, **CLASS)
    drawn = generate(model, variables, RNG, 24, conds(model, 24), temperature=30.0, as_released=kind)
    assert bool((drawn.grains[:, -1, -1] == 1).all()) and bool((drawn.grains == 0).any(axis=0).ravel()[:-1].all())
    assert bool(((drawn.codes >= 0) & (drawn.codes < K)).all())
    if kind == "fixed":
        check_codes(model, drawn, 24)


def test_as_released_shares_the_last_slot_where_blocks_outgrow_them():
    model, variables = build(**SMALL)
    more = model.clone(num_slots=30)
    table = variables["params"]["slot_embedding_PM"]
    slots = jnp.concatenate([table, jnp.repeat(table[-1:], 30 - len(table), axis=0)])
    wide = {"params": {**variables["params"], "slot_embedding_PM": slots}}
    drawn = generate(model, variables, RNG, 24, temperature=30.0, as_released="fixed")
    assert_same(drawn, generate(more, wide, RNG, 24, temperature=30.0, as_released="fixed"))
    sizes = [int(((drawn.grains == g).sum((1, 2)) * 4**g).max()) for g in range(2)]
    assert sum(sizes) + 4 > model.slots  # blocks padded to their longest


# --- mistakes -------------------------------------------------------------------------------------


@functools.cache
def some_tokens(**settings):
    model, _ = build(**SMALL, **settings)
    codes = GrainedCodes(jnp.zeros((B, 2, 6, 1), jnp.int32), jnp.asarray([[[0, 1, 0]]] * B))
    return grains.pack(codes, model.layout, 12)  # [sos, 0, 2, eos, sos, 2, 3, 8, 9, eos, ...]


def changed(name, index, value, length=10):
    packed = some_tokens()
    return packed._replace(**{name: getattr(packed, name).at[index].set(value), "length": jnp.full(B, length)})


MISTAKES = {
    "position_top_p": ({}, {"position_top_p": 1.5}, r"^position_top_p: 1.5 is outside \[0, 1\]"),
    "position_top_k": ({}, {"position_top_k": 0}, r"^position_top_k: 0 must be at least 1"),
    "position_temperature": ({}, {"position_temperature": -1.0}, r"^position_temperature: -1.0 must be at least 0"),
    "one for each": ({}, {"position_top_k": [1, 2]}, r"^position_top_k: \[1, 2\] has shape \(2,\); give one value$"),
    "temperatures": ({}, {"temperature": [1.0, 1.0]}, r"^temperature: \[1.0, 1.0\] has shape \(2,\); give one value, or 1"),
    "grain shape": ({}, {"grains": np.zeros((B, 1, 4), int)}, r"^grains: shape \(3, 1, 4\) does not fit; allowed is \(3, 1, 3\)$"),
    "grain value": ({}, {"grains": np.full((B, 1, 3), 2)}, r"^grains: 2 at \(0, 0, 0\) is outside 0..1, the grains$"),
    "grain type": ({}, {"grains": np.zeros((B, 1, 3))}, r"^grains: float64 is no type of integers"),
    "guidance": (CLASS, {"cond": [0] * B, "guidance": 2.0}, r"^guidance: 2.0 needs a model trained with use_null_cond"),
    "class": (CLASS, {"cond": np.full(B, V)}, r"^cond: class 5 is outside \[0, 5\)$"),
    "slots": ({"num_slots": 14}, {}, r"^model.num_slots: 14 are fewer than the 15 tokens from which the last of the "),
    "an array": ({}, {"prefix": np.zeros((B, 2, 1), int)}, r"^prefix: of ndarray does not fit this model; give `grains.PackedCodes`$"),
    "prefix batch": ({}, {"prefix": jax.tree.map(lambda x: x[:1], some_tokens())}, r"^prefix.content: shape \(1, 12, 1\) does not fit; allowed is \(3, P, 1\)$"),
    "prefix length": ({}, {"prefix": some_tokens()._replace(length=np.full(B, 13))}, r"^prefix.length: 13 is outside 0..12, tokens of image 0$"),
    "prefix length type": ({}, {"prefix": some_tokens()._replace(length=np.full(B, 2.5))}, r"^prefix.length: \[2.5 2.5 2.5\] must be an integer"),
    "prefix id": ({}, {"prefix": changed("content", (1, 2, 0), K + 3)}, r"^prefix.content: 14 at \(1, 2, 0\) is outside 0..13"),
    "twice": ({}, {"prefix": changed("position", (1, 2), 0)}, r"^prefix: token 2 of image 1 covers cell 0 of grain 0 again; every cell is covered once$"),
    "twice by another grain": ({}, {"prefix": changed("position", (2, 5), 0)}, r"^prefix: token 5 of image 2 covers cell 0 of grain 1 again; every cell is covered once$"),
    "order": ({}, {"prefix": changed("position", (0, slice(5, 7)), jnp.array([3, 2]))}, r"^prefix: token 5 of image 0 is position 3 of grain 1, where position 2 of grain 1 follows; cells come in order 'row', grain by grain$"),
    "early end": ({}, {"prefix": changed("position", (0, 6), 13)}, r"^prefix: token 6 of image 0 is position 13 of grain 1, where position 3 of grain 1 follows"),
    "pads": ({}, {"prefix": some_tokens()._replace(length=np.full(B, 11))}, r"^prefix: token 10 of image 0 is position 12 of grain 1, where nothing follows"),
    "no code": ({}, {"prefix": changed("content", (0, 1, 0), K)}, r"^prefix: token 1 of image 0 has content \[11\] at position 0; cells have codes, 0..10, and special tokens none$"),
    "other grains": ({}, {"prefix": some_tokens()._replace(length=np.full(B, 9)), "grains": np.ones((B, 1, 3), int)}, r"^prefix: token 1 of image 0 is position 0 of grain 0, where position 4 of grain 0 follows"),
    "as released": ({}, {"as_released": "fast"}, r"^as_released: 'fast' is unknown; allowed are 'fixed' and 'free'$"),
    "as released of three": ({**THREE}, {"as_released": "free", "cond": [0] * B}, r"^as_released: 'free' is for 2 grains of code depth 1, and this model has 3 of depth 1; leave it out$"),
    "as released with grains": ({}, {"as_released": "fixed", "grains": np.ones((B, 1, 3), int)}, r"^grains: the original's sampler has none; leave it or as_released out$"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_before_anything_compiles(mistake):
    settings, arguments, message = MISTAKES[mistake]
    model, variables = build(**{**SMALL, **settings})
    before = generate_grains._cache_size()
    with pytest.raises(ValueError, match=message):
        generate(model, variables, RNG, B, **arguments)
    assert generate_grains._cache_size() == before


@pytest.mark.parametrize(
    "name, value",
    [("position_temperature", 1.0), ("position_top_k", 3), ("position_top_p", 0.5), ("grains", np.zeros((2, 1, 3), int)), ("as_released", "free")],
)  # fmt: skip
def test_what_is_of_grains_is_refused_for_code_grids(name, value):
    with pytest.raises(
        ValueError, match=f"^{name}: this model draws code grids, which have neither positions nor grains"
    ):
        generate(*build_rq(), RNG, 2, **{name: value})


def test_packed_codes_are_no_prefix_of_code_grids():
    with pytest.raises(ValueError, match=r"^prefix: PackedCodes does not fit this model; give codes \(n, T0, 4\)$"):
        generate(*build_rq(), RNG, len(CODES), prefix=some_tokens())


def test_generate_traces_over_its_arguments():
    model, variables = build(**SMALL, **CLASS)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (variables, some_tokens()))
    arguments = {
        "cond": jax.ShapeDtypeStruct((B,), jnp.int32),
        "grains": jax.ShapeDtypeStruct((B, 1, 3), jnp.int32),
        "position_top_k": jax.ShapeDtypeStruct((), jnp.int32),
        "position_top_p": jax.ShapeDtypeStruct((), jnp.float32),
    }
    drawn = jax.eval_shape(lambda v, p, kw: generate(model, v, RNG, B, prefix=p, **kw), *abstract, arguments)
    assert drawn.codes.shape == (B, 2, 6, 1) and drawn.grains.shape == (B, 1, 3)


@pytest.mark.slow
def test_9_the_compiled_program_draws_what_its_operations_draw():
    model, variables = build(code_shape=(2, 2, 1), content_layers=1)
    drawn = generate(model, variables, RNG, 2)
    with jax.disable_jit():
        assert_same(generate(model, variables, RNG, 2), drawn)


def test_a_cache_that_grows_in_stretches_changes_no_code(monkeypatch):
    drawn = []
    for least in (100, 4):
        monkeypatch.setattr(draws, "_MIN_STRETCH", least)
        generate_grains.clear_cache()  # why this test is the last one
        drawn.append(generate(*build(**SMALL, **TEXT), RNG, B, conds(build(**TEXT)[0], B)))
    assert_same(*drawn)
    generate_grains.clear_cache()

"""rq_jax.grains against loops in NumPy: tests 1 and 7 of the fifteen that the design asks of DQ-VAE."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_jax import grains as module
from rq_jax.grains import GrainedCodes, GrainLayout, PackedCodes, pack, unpack

B, D, K = 3, 2, 101  # K unlike any number of cells


def random_codes(rng, layout, depth=D, batch=B, grains=None):
    """Codes that repeat over the cells of coarser grains, with their grain map."""
    G, (u, v) = layout.num_grains, layout.region_grid
    grains = rng.integers(0, G, (batch, u, v)) if grains is None else np.broadcast_to(grains, (batch, u, v))
    codes = np.zeros((batch, *layout.code_grid, depth), np.int32)
    side = 1 << (G - 1)
    for b, i, j in np.ndindex(batch, u, v):
        step = side >> grains[b, i, j]
        for r in range(0, side, step):
            for s in range(0, side, step):
                row, column = i * side + r, j * side + s
                codes[b, row : row + step, column : column + step] = rng.integers(0, layout.codebook_size, depth)
    return GrainedCodes(codes, grains.astype(np.int32))


def packed_by_loops(codes_hwD, grains_uv, layout, P):
    """Content (P, D), position, grain and length of one picture."""
    depth, tokens = codes_hwD.shape[-1], []
    G, K = layout.num_grains, layout.codebook_size
    (u, v), side = layout.region_grid, 1 << (layout.num_grains - 1)

    def special(token, position, g):
        tokens.append(([token] + [K] * (depth - 1), position, g))

    for g in range(G):
        n, columns, per_region = u * v * 4**g, v << g, 1 << g
        special(K + 2, n + 2, g)
        cells = [(row, column) for row in range(u << g) for column in range(columns)]
        if layout.order == "region":
            cells.sort(key=lambda cell: (cell[0] // per_region, cell[1] // per_region, cell))
        for row, column in cells:
            if grains_uv[row // per_region, column // per_region] == g:
                step = side >> g
                tokens.append((codes_hwD[row * step, column * step].tolist(), row * columns + column, g))
        special(K + 1, n + 1, g)
    length = len(tokens)
    while len(tokens) < P:
        special(K, u * v * 4 ** (G - 1), G - 1)
    return (*(np.array([token[i] for token in tokens[:P]]) for i in range(3)), length)


LAYOUTS = [
    GrainLayout(grid, G, K, order=order)
    for grid, G in [((2, 3), 2), ((1, 2), 3), ((2, 2), 1)]
    for order in module.ORDERS
]


# --- 1: packing and unpacking ---


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), extra=st.sampled_from([0, 3]))
def test_1_packing_agrees_with_loops_and_unpacking_is_its_inverse(layout, seed, extra):
    codes, P = random_codes(np.random.default_rng(seed), layout), layout.max_tokens + extra
    packed = jax.jit(pack, static_argnums=(1, 2))(codes, layout, P)
    for b in range(B):
        for actual, expected in zip(packed, packed_by_loops(codes.codes[b], codes.grains[b], layout, P), strict=True):
            np.testing.assert_array_equal(actual[b], expected)
    unpacked = jax.jit(unpack, static_argnums=1)(packed, layout)
    np.testing.assert_array_equal(unpacked.codes.codes, codes.codes)
    np.testing.assert_array_equal(unpacked.codes.grains, codes.grains)
    assert not unpacked.holes.any()


@pytest.mark.parametrize(("grain", "length"), [(0, 260), (1, 1028), (None, 644)])
def test_1_the_papers_lengths(grain, length):
    layout = GrainLayout((16, 16), 2, 1024)
    half = np.arange(256).reshape(16, 16) % 2
    codes = random_codes(np.random.default_rng(0), layout, 1, 2, half if grain is None else grain)
    assert pack(codes, layout).length.tolist() == [length] * 2
    num_coarse = int((codes.grains[0] == 0).sum())
    assert length == layout.max_tokens - 3 * num_coarse
    assert module.num_codes(codes.grains, 2).tolist() == [length - 4] * 2


def test_1_a_picture_does_not_depend_on_its_batch_mates_and_programs_agree():
    layout = LAYOUTS[0]
    codes = random_codes(np.random.default_rng(4), layout)
    together = jax.jit(pack, static_argnums=(1, 2))(codes, layout)
    apart = [pack(GrainedCodes(codes.codes[b : b + 1], codes.grains[b : b + 1]), layout) for b in range(B)]
    jax.tree.map(np.testing.assert_array_equal, together, jax.tree.map(lambda *parts: jnp.concatenate(parts), *apart))
    mapped = jax.vmap(lambda one: pack(jax.tree.map(lambda x: x[None], one), layout))(codes)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 0], b), mapped, together)
    unpacked = jax.jit(unpack, static_argnums=1)(together, layout)
    np.testing.assert_array_equal(unpacked.codes.codes, codes.codes)


def test_inside_a_program_a_picture_that_does_not_fit_is_told_by_its_length():
    layout = GrainLayout((2, 3), 2, K)
    codes = random_codes(np.random.default_rng(0), layout, grains=1)
    short, full = jax.jit(pack, static_argnums=(1, 2))(codes, layout, 9), pack(codes, layout)
    assert short.length.tolist() == [layout.max_tokens] * B
    np.testing.assert_array_equal(short.content, full.content[:, :9])


def shuffled(packed, rng):
    """All slots of each picture in another order, but the eos of every grain behind its cells."""
    order = np.argsort(rng.random(packed.position.shape) + (np.asarray(packed.content)[..., 0] > K), axis=1)
    return PackedCodes(
        np.take_along_axis(np.asarray(packed.content), order[..., None], 1),
        np.take_along_axis(np.asarray(packed.position), order, 1),
        np.take_along_axis(np.asarray(packed.grain), order, 1),
        packed.length,
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cells_may_come_in_any_order(layout):
    rng = np.random.default_rng(2)
    codes = random_codes(rng, layout)
    unpacked = unpack(shuffled(pack(codes, layout), rng), layout)
    jax.tree.map(np.testing.assert_array_equal, unpacked.codes, codes)


def tokens(*entries):
    """One picture of tokens (content, position, grain)."""
    content, position, grain = (jnp.array([column], jnp.int32) for column in zip(*entries, strict=True))
    return PackedCodes(content[..., None], position, grain, jnp.array([len(entries)], jnp.int32))


def test_what_unpacking_makes_of_irregular_tokens():
    layout = GrainLayout((1, 3), 2, 9, num_classes=4)
    eos, pad = layout.content_eos, layout.content_pad
    unpacked = unpack(
        tokens(
            (5, 0, 0),
            (layout.content_sos + 3, layout.position_sos(0) + 3, 0),  # sos of a class, anywhere
            (6, 0, 0),  # the same cell again: the later token counts
            (pad, 2, 0),  # no code
            (pad, layout.position_eos(0), 0),  # an eos by its position
            (7, 1, 0),  # behind the eos of its grain
            (8, 1, 1),  # the finer code of the second half of region 0's top row
            (3, 8, 1),  # grain 1 has no eos and loses nothing
            (eos, layout.position_pad(1), 1),
        ),
        layout,
    )
    assert unpacked.codes.codes[0, ..., 0].tolist() == [[6, 8, 0, 0, 0, 0], [6, 6, 3, 0, 0, 0]]
    assert unpacked.holes[0].tolist() == [
        [False, False, True, True, True, True],
        [False, False, False, True, True, True],
    ]
    assert unpacked.codes.grains[0].tolist() == [[1, 1, 1]]
    coarse = unpack(tokens((5, 0, 0), (6, 2, 0)), layout)
    assert coarse.codes.grains[0].tolist() == [[0, 1, 0]]


def test_inside_a_program_content_below_0_is_no_code():
    layout = GrainLayout((1, 2), 2, 9)
    unpacked = jax.jit(unpack, static_argnums=1)(tokens((5, 0, 0), (-1, 1, 0), (-1, 0, 1)), layout)
    assert unpacked.codes.codes[0, ..., 0].tolist() == [[5, 5, 0, 0]] * 2
    assert unpacked.holes[0].tolist() == [[False, False, True, True]] * 2
    assert unpacked.codes.grains[0].tolist() == [[0, 1]]


def test_grain_maps_may_be_nested_lists():
    grains = [[[0, 1]], [[1, 1]]]
    assert module.num_codes(grains, 2).tolist() == [5, 8]
    np.testing.assert_array_equal(module.cell_weights(grains, 2), module.cell_weights(jnp.array(grains), 2))
    codes = np.arange(2 * 2 * 4).reshape(2, 2, 4, 1)
    layout = GrainLayout((1, 2), 2, 16)
    packed = pack(GrainedCodes(codes.tolist(), grains), layout)
    jax.tree.map(np.testing.assert_array_equal, packed, pack(GrainedCodes(codes, jnp.array(grains)), layout))


def test_cell_weights_count_every_code_once():
    grains = jnp.array([[[0, 1, 2]]])
    weights = module.cell_weights(grains, 3)
    assert weights.shape == (1, 4, 12) and weights.dtype == jnp.float32
    assert weights[0, 0, ::4].tolist() == [1 / 16, 1 / 4, 1]
    assert float(weights.sum()) == int(module.num_codes(grains, 3)[0]) == 1 + 4 + 16


# --- 7: entropy ---


def entropy_by_loops(patch, places, sigma=0.01):
    """Entropy in float64 of gray values; 0 where no place has any density."""
    density = np.array([np.mean(np.exp(-0.5 * ((patch.ravel() - place) / sigma) ** 2)) for place in places])
    if density.sum() < np.finfo(np.float32).tiny:
        return 0.0
    shares = density / density.sum()
    return -sum(p * math.log(p) for p in shares if p > 0)


@pytest.mark.parametrize(("bins", "low"), [("full", -1), ("legacy", 0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_7_entropy_agrees_with_loops(bins, low, channels):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, channels)).astype(np.float32)
    images[0, :4, :4] = -0.7  # dark and flat
    images[1] = images[1] * 0.1 + 0.5
    actual = jax.jit(lambda x: module.patch_entropy(x, 4, bins))(images)
    gray = images.astype(float) @ ([0.2989, 0.5870, 0.1140] if channels == 3 else [1.0])
    places = np.linspace(low, 1, 32)
    for b, i, j in np.ndindex(2, 2, 3):
        expected = entropy_by_loops(gray[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], places)
        assert abs(actual[b, i, j] - expected) < 1e-5, (b, i, j)
    assert float(actual[0, 0, 0]) == 0 if bins == "legacy" else actual[0, 0, 0] >= 0


def test_7_flat_and_uniform_patches():
    places = np.linspace(-1, 1, 32, dtype=np.float32)
    on, between = places[3], (places[3] + places[4]) / 2
    every = places[np.arange(1024).reshape(32, 32) % 32]
    flat = np.stack([np.full((32, 32), on), np.full((32, 32), between), every])[..., None]
    actual = module.patch_entropy(jnp.asarray(flat, jnp.float32), 32)[:, 0, 0]
    np.testing.assert_allclose(actual, [0, math.log(2), math.log(32)], atol=1e-5)


@pytest.mark.parametrize("num_bins", [2, 3, 5, 8, 32])
def test_7_no_entropy_is_above_that_of_equal_shares(num_bins):
    places = np.linspace(-1, 1, num_bins, dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 1e-4, (64, num_bins, num_bins, 1))
    entropy = module.patch_entropy(jnp.asarray(places[:, None] + noise, jnp.float32), num_bins, num_bins=num_bins)
    most = np.float32(math.log(num_bins))
    assert most - 1e-3 < entropy.min() and entropy.max() <= most


@pytest.mark.parametrize("bins", module.ENTROPY_BINS)
@pytest.mark.parametrize("value", [-1.0, -0.5, -0.06, 0.0, 1.0, 30.0])
def test_7_no_patch_has_an_entropy_or_a_gradient_that_is_not_finite(bins, value):
    image = jnp.full((1, 4, 4, 1), value)
    entropy, grad = jax.jit(jax.value_and_grad(lambda x: module.patch_entropy(x, 4, bins).sum()))(image)
    assert 0 <= float(entropy) <= math.log(32) and np.isfinite(grad).all()
    if value == 30 or (bins == "legacy" and value <= -0.5):
        assert float(entropy) == 0


def test_7_no_array_holds_all_pixels_at_all_places():
    images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    memory = jax.jit(lambda x: module.patch_entropy(x, 16)).lower(images).compile().memory_analysis()
    pixels = 4 * 64 * 64 * 4
    assert memory.temp_size_in_bytes < 4 * pixels  # of 32 places


@pytest.mark.parametrize("ratios", [0.5, 0.1, (0.3, 0.3), (0.5, 0.5), (0.15, 0.25, 0.1)])
def test_7_thresholds_give_the_shares_asked_on_the_calibration_set(ratios):
    entropies = np.random.default_rng(0).gamma(2.0, 0.5, (10, 12, 11)).astype(np.float32)
    thresholds = module.entropy_thresholds(entropies, ratios)
    grains = module.route_by_entropy(entropies, thresholds)
    assert thresholds.dtype == jnp.float32 and grains.dtype == jnp.int32
    for g, ratio in enumerate(np.atleast_1d(ratios), start=1):
        assert abs(np.mean(grains == g) - ratio) < 0.002


def test_thresholds_are_exceeded_strictly_and_ties_share_a_grain():
    entropies = jnp.array([[[0.0, 0.0, 0.0, 1.0, 2.0]]])
    thresholds = module.entropy_thresholds(entropies, 0.6)
    assert module.route_by_entropy(entropies, thresholds).tolist() == [[[0, 0, 0, 1, 1]]]
    close = jnp.array([1.0, np.nextafter(np.float32(1), np.float32(2))])
    assert module.route_by_entropy(close[None, None], module.entropy_thresholds(close, 0.5)).tolist() == [[[0, 1]]]


@pytest.mark.parametrize("lowest", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("ratios", [(0.3, 0.3), (0.2, 0.2, 0.3), (0.01, 0.01)])
def test_ties_leave_the_grain_between_two_thresholds_empty(lowest, ratios):
    entropies = lowest + jnp.array([0.0] * 8 + [1.0, 2.0])
    for compute in (module.entropy_thresholds, jax.jit(module.entropy_thresholds, static_argnums=1)):
        thresholds = compute(entropies, ratios)
        assert thresholds.shape == (len(ratios),) and np.all(np.diff(thresholds) > 0)
        grains = module.route_by_entropy(entropies[None, None], thresholds)[0, 0].tolist()
        assert grains == [0] * (9 if ratios[0] < 0.1 else 8) + [len(ratios)] * (1 if ratios[0] < 0.1 else 2)


# --- bad input ---


LAYOUT = GrainLayout((2, 3), 2, 7, num_classes=5)
GOOD = GrainedCodes(jnp.zeros((1, 4, 6, 1), jnp.int32), jnp.ones((1, 2, 3), jnp.int32))


def packed_with(**changes):
    packed = pack(GOOD, LAYOUT)
    return unpack(
        packed._replace(**{name: packed._asdict()[name].at[0, 4].set(value) for name, value in changes.items()}), LAYOUT
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GrainLayout((2, 3), 2, 7, order="spiral"),
            "order: 'spiral' is unknown; allowed are 'row' and 'region'",
        ),
        (lambda: GrainLayout((2, 0), 2, 7), "region_grid: (2, 0) must be an integer and at least 1"),
        (lambda: GrainLayout((2.5, 3), 2, 7), "region_grid: (2.5, 3) must be an integer and at least 1"),
        (lambda: GrainLayout(16, 2, 7), "region_grid: shape () does not fit; allowed is (2,)"),
        (lambda: GrainLayout((2, 3), 0, 7), "num_grains: 0 must be an integer and at least 1"),
        (lambda: GrainLayout((2, 3), 1.5, 7), "num_grains: 1.5 must be an integer and at least 1"),
        (
            lambda: pack(GOOD._replace(grains=GOOD.grains * 2), LAYOUT),
            "grains: 2 at (0, 0, 0) is outside 0..1, the grains",
        ),
        (
            lambda: pack(GOOD._replace(grains=GOOD.grains.astype(jnp.float32)), LAYOUT),
            "grains: float32 is no type of integers; allowed are 0..1, the grains",
        ),
        (
            lambda: pack(GOOD._replace(grains=GOOD.grains[:, :1]), LAYOUT),
            "grains: shape (1, 1, 3) does not fit; allowed is (1, 2, 3)",
        ),
        (
            lambda: pack(GOOD._replace(grains=GOOD.grains[0]), LAYOUT),
            "grains: shape (2, 3) does not fit; allowed is (1, 2, 3)",
        ),
        (
            lambda: pack(GOOD._replace(codes=jnp.repeat(GOOD.codes, 2, axis=0)), LAYOUT),
            "grains: shape (1, 2, 3) does not fit; allowed is (2, 2, 3)",
        ),
        (
            lambda: pack(GOOD._replace(codes=GOOD.codes[:, :2]), LAYOUT),
            "codes: shape (1, 2, 6, 1) does not fit; allowed is (B, 4, 6, D)",
        ),
        (
            lambda: pack(GOOD._replace(codes=GOOD.codes + 7), LAYOUT),
            "codes: 7 at (0, 0, 0, 0) is outside 0..6, the codebook",
        ),
        (lambda: pack(GOOD, LAYOUT, tokens=30.5), "tokens: 30.5 must be an integer and at least 1"),
        (lambda: pack(GOOD, LAYOUT, tokens=27), "tokens: 27 do not hold picture 0, which has 28; give more, or None"),
        (
            lambda: packed_with(content=14),
            "packed.content: 14 at (0, 4, 0) is outside 0..13, the vocabulary of contents",
        ),
        (lambda: packed_with(position=31), "packed.position: 31 at (0, 4) is outside 0..30, the positions"),
        (
            lambda: packed_with(position=13, grain=0),
            "packed.position: 13 at (0, 4) is outside 0..12, the positions of grain 0",
        ),
        (lambda: packed_with(grain=-1), "packed.grain: -1 at (0, 4) is outside 0..1, the grains"),
        (
            lambda: unpack(PackedCodes(*(jnp.zeros(4, jnp.int32) for _ in range(4))), LAYOUT),
            "packed.position: shape (4,) does not fit; allowed is (B, P)",
        ),
        (lambda: module.num_codes([[[0, 2]]], 2), "grains: 2 at (0, 0, 1) is outside 0..1, the grains"),
        (lambda: module.cell_weights(GOOD.grains - 2, 2), "grains: -1 at (0, 0, 0) is outside 0..1, the grains"),
        (
            lambda: module.patch_entropy(jnp.zeros((1, 8, 10, 3)), 4),
            "images: W = 10 must be a positive multiple of 4, the size of a patch",
        ),
        (
            lambda: module.patch_entropy(jnp.zeros((1, 8, 8, 2)), 4),
            "images: shape (1, 8, 8, 2) does not fit; allowed is (B, H, W, 1 or 3)",
        ),
        (
            lambda: module.patch_entropy(jnp.zeros(()), 4),
            "images: shape () does not fit; allowed is (B, H, W, 1 or 3)",
        ),
        (
            lambda: module.patch_entropy(np.zeros((1, 8, 8, 3), np.uint8), 4),
            "images: dtype uint8 is not floating-point; scale them to [-1, 1]",
        ),
        *(
            (
                lambda size=size: module.patch_entropy(jnp.zeros((1, 8, 8, 3)), size),
                f"patch_size: {size} must be an integer and at least 1",
            )
            for size in (0, -4, 2.0)
        ),
        (
            lambda: module.patch_entropy(jnp.zeros((1, 8, 8, 3)), 4, "half"),
            "bins: 'half' is unknown; allowed are 'full' and 'legacy'",
        ),
        (
            lambda: module.entropy_thresholds(jnp.arange(9.0), 1.0),
            "ratios: 1.0 is outside (0, 1); without it, use one grain less",
        ),
        (
            lambda: module.entropy_thresholds(jnp.arange(9.0), (0.6, 0.5)),
            "ratios: (0.6, 0.5) add up to 1.1; grain 0 has what they leave of 1",
        ),
        *(
            (
                lambda value=value: module.entropy_thresholds(jnp.array([0.0, value, 1.0]), 0.5),
                f"entropies: {value} must be finite",
            )
            for value in (math.nan, math.inf)
        ),
        (
            lambda: module.check_ratios("fine_ratio", ()),
            "fine_ratio: () has 0 entries; give at least one, the shares of the grains above 0",
        ),
        (
            lambda: module.check_ratios("fine_ratio", 0.5, 1),
            "fine_ratio: (0.5,) has 1 entries; give 0, the shares of the grains above 0",
        ),
        (
            lambda: module.check_ratios("fine_ratio", 0.5, 3),
            "fine_ratio: (0.5,) has 1 entries; give 2, the shares of the grains above 0",
        ),
        (
            lambda: module.route_by_entropy(jnp.zeros((1, 2, 3)), jnp.array([1.0, 1.0])),
            "thresholds: [1.0, 1.0] must be finite and increasing, from grain 1 on",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_one_grain_has_no_ratios():
    assert module.check_ratios("fine_ratio", (), 1) == ()


def test_doctests():
    results = doctest.testmod(module)
    assert results.attempted and not results.failed

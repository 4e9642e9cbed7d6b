"""Codes that are kept while the rest are drawn, against the forward pass; which codes an edit keeps; mixed codes."""

from collections import Counter

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_dqtransformer
from toy_transformer import CLASS, CODES, CONDS, KINDS, B, D, K, T, V, build, h, run, w

from rq_jax.sampling import edit, generate
from rq_jax.sampling.edit import DRAWN
from rq_jax.sampling.generate import _generate

RNG = jax.random.key(7)
NUM = np.arange(B * T * D).reshape(B, h, w, D)  # every code another
MASK = np.random.default_rng(2).random((B, h, w, D)) < 0.5

# --- the loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, guidance", [("none", None), ("class", 2.5)])
def test_kept_codes_stand_bit_for_bit_and_the_rest_follow_from_them(kind, guidance):
    model, variables = build(**KINDS[kind], use_null_cond=guidance is not None)
    cond, kept = CONDS[kind], jnp.where(MASK, CODES, DRAWN)
    codes = generate(model, variables, RNG, B, cond, temperature=0.0, guidance=guidance, kept=kept)
    np.testing.assert_array_equal(codes[MASK], CODES[MASK])
    logits = run(model, variables, codes, cond).logits
    if guidance is not None:
        without = run(model, variables, codes, jnp.full_like(cond, V)).logits
        logits = without + guidance * (logits - without)
    np.testing.assert_array_equal(codes[~MASK], jnp.argmax(logits, -1)[~MASK])
    assert (codes != CODES)[~MASK].any()


def test_an_image_whose_own_codes_are_kept_is_drawn_again():
    """A code is drawn from its own uniform numbers, whatever is kept around it."""
    model, variables = build()
    drawn = generate(model, variables, RNG, B)
    np.testing.assert_array_equal(generate(model, variables, RNG, B, kept=jnp.where(MASK, drawn, DRAWN)), drawn)


def test_codes_do_not_depend_on_what_is_kept_behind_them():
    model, variables = build()
    others = jnp.where(jnp.asarray(MASK), (CODES + 1) % K, DRAWN)
    for t, d in ((4, 2), (9, 0), (T - 1, D - 1)):  # the first code whose choice differs
        is_behind = (np.arange(T * D) >= t * D + d).reshape(h, w, D)
        kept = jnp.where(is_behind, others, jnp.where(MASK, CODES, DRAWN))
        codes, plain = (
            np.asarray(generate(model, variables, RNG, B, kept=one)) for one in (kept, jnp.where(MASK, CODES, DRAWN))
        )
        np.testing.assert_array_equal(codes[:, ~is_behind], plain[:, ~is_behind])
        assert (codes != plain)[:, is_behind].any()


def test_another_choice_of_what_is_kept_never_recompiles():
    model, variables = build()
    generate(model, variables, RNG, B, kept=np.full((B, h, w, D), DRAWN))
    compiled = _generate._cache_size()
    for kept in (edit.keep_rows(CODES, 2), edit.keep_depths(CODES, 1), np.where(MASK, CODES, DRAWN).astype(np.int8)):
        generate(model, variables, RNG, B, kept=kept)
    assert _generate._cache_size() == compiled


def test_nothing_kept_costs_nothing():
    model, variables = build(**CLASS)

    def program(kept):
        jaxpr = jax.make_jaxpr(lambda kept: generate(model, variables, RNG, B, CONDS["class"], kept=kept))(kept).jaxpr
        return list(helpers.equations(jaxpr))

    def read_by_loops(program):
        loops = [one for one in program if one.primitive.name == "scan"]
        return [len(one.invars) - one.params["num_consts"] - one.params["num_carry"] for one in loops]

    plain, keeping = program(None), program(jnp.where(MASK, CODES, DRAWN))
    assert read_by_loops(plain) == [1] and read_by_loops(keeping) == [2]  # uniform numbers; codes beside them
    plain, keeping = (Counter(one.primitive.name for one in each) for each in (plain, keeping))
    assert not plain - keeping and (keeping - plain)["select_n"] == D
    assert not {"dot_general", "cumsum", "concatenate"} & set(keeping - plain)


def test_where_all_codes_are_kept_nothing_is_drawn():
    model, variables = build()
    text = str(jax.make_jaxpr(lambda: generate(model, variables, RNG, B, kept=np.asarray(CODES)))())
    assert "scan" not in text and "dot_general" not in text
    np.testing.assert_array_equal(generate(model, variables, RNG, B, kept=CODES), CODES)


MISTAKES = {
    "shape": ({"kept": NUM[:, :2]}, r"^kept: shape \(2, 2, 5, 4\) does not fit; allowed is \(2, 3, 5, 4\)$"),
    "type": ({"kept": np.zeros((B, h, w, D))}, "^kept: dtype float64 must be an integer type$"),
    "code": ({"kept": np.full((B, h, w, D), K)}, r"^kept: 7 at depth 0 is outside \[0, 7\), the codebook of that"),
    "negative": ({"kept": np.full((B, h, w, D), -2)}, r"^kept: -2 at depth 0 is outside \[0, 7\)"),
    "prefix": ({"kept": CODES, "prefix": CODES[:, 0]}, "^prefix: kept holds all codes that are known; leave it out$"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_kept_is_refused_before_anything_compiles(mistake):
    arguments, message = MISTAKES[mistake]
    model, variables = build()
    before = _generate._cache_size()
    with pytest.raises(ValueError, match=message):
        generate(model, variables, RNG, B, **arguments)
    assert _generate._cache_size() == before


def test_models_with_grains_keep_first_codes_alone():
    model, variables = toy_dqtransformer.build()
    with pytest.raises(
        ValueError, match="^kept: this model draws codes with grains, of which only the first can be ke"
    ):
        generate(model, variables, RNG, 1, kept=np.zeros((1, *model.code_shape), int))


# --- what an edit keeps -----------------------------------------------------------------------------


def positions(kept):
    """Which positions are kept, at all depths."""
    is_kept = np.asarray(kept) != DRAWN
    np.testing.assert_array_equal(np.asarray(kept)[is_kept], NUM[is_kept])
    assert (is_kept == is_kept[:1, ..., :1]).all()
    return "".join(".#"[int(one)] for one in is_kept[0, ..., 0].ravel())


def test_rows_and_boxes_are_of_the_grid():
    assert positions(edit.keep_rows(NUM, 1)) == "#####.........."
    assert positions(edit.keep_rows(NUM, h)) == "#" * T
    assert positions(edit.keep_box(NUM, (1, 2, 2, 3), "draw")) == ".......###..###"
    assert positions(edit.keep_box(NUM, (1, 2, 2, 2))) == "#########...##."
    assert positions(edit.keep_box(NUM, (0, 0, 1, 1))) == "#" + "." * (T - 1)


def test_depths_are_kept_and_mixed():
    kept = np.asarray(edit.keep_depths(NUM, 3))
    np.testing.assert_array_equal(kept[..., :3], NUM[..., :3])
    assert (kept[..., 3:] == DRAWN).all()
    np.testing.assert_array_equal(edit.keep_depths(NUM, D), NUM)
    mixed = np.asarray(edit.interpolate(NUM, NUM + 1000, 1))
    np.testing.assert_array_equal(mixed, np.concatenate([NUM[..., :1], NUM[..., 1:] + 1000], -1))
    np.testing.assert_array_equal(edit.interpolate(NUM, NUM + 1000, 0), NUM + 1000)
    np.testing.assert_array_equal(edit.interpolate(NUM, NUM + 1000, D), NUM)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: edit.keep_rows(NUM, 0), "^count: 0 is outside 1..3, the rows of the code grid$"),
        (lambda: edit.keep_rows(NUM, 4), "^count: 4 is outside 1..3"),
        (lambda: edit.keep_depths(NUM, 5), "^depth: 5 is outside 1..4, the depths of the codes$"),
        (lambda: edit.interpolate(NUM, NUM, 5), "^depth: 5 is outside 0..4, the depths of the codes$"),
        (lambda: edit.interpolate(NUM, NUM[:1], 1), r"^fine: shape \(1, 3, 5, 4\) does not fit"),
        (lambda: edit.keep_box(NUM, (0, 0, 1, 1), "lose"), "^before: 'lose' is unknown; allowed are 'keep' and 'draw'$"),
        *(
            (lambda box=box: edit.keep_box(NUM, box), "^box: top .* is no box inside the grid of 3x5 positions; give")
            for box in ((-1, 0, 1, 1), (0, 0, 0, 1), (2, 0, 2, 1), (0, 3, 1, 3), (0, 0, 1, 0))
        ),
    ],
)  # fmt: skip
def test_edits_outside_of_the_grid_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

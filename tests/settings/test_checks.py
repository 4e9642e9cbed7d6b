"""Rules for single settings: what passes, and the one line that the rest gets."""

import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.settings import checks

PASS = [
    (checks.at_least, (0, 0), {}),
    (checks.at_least, ((3, 1), 1), {}),
    (checks.at_least, (np.array([2.0, 5.0]), 1), {"whole": True}),
    (checks.integers, (1, 1), {}),
    (checks.integers, ((np.int64(3), 1), 1), {}),
    (checks.integer_type, (np.uint16,), {}),
    (checks.integer_type, (jnp.int4,), {}),
    (checks.amount, (0,), {}),
    (checks.amount, ((0, 2.5),), {"sequence": True}),
    (checks.finite, ([[-1.0, 5.0]],), {}),
    (checks.finite, (np.zeros(0),), {"least": 0}),
    (checks.increasing, ((),), {}),
    (checks.increasing, ([1, 2.5],), {}),
    (checks.distinct, ([1, 2.5],), {}),
    (checks.above, (1e-9, 0), {}),
    (checks.within, (0.0, 0, 1), {}),
    (checks.within, (1, 0, 1), {}),
    (checks.within, (0.999, 0, 1), {"below": True}),
    (checks.in_range, (4, 1, 4, "the depths"), {}),
    (checks.one_of, ("a", "ab"), {}),
    (checks.divides, (4, "model_dim", 12), {}),
    (checks.multiple_of, (6, 3, "the patch"), {}),
    (checks.positive_triple, ((1, 2, 3), "(h, w, depth)"), {}),
    (checks.one_per_depth, ((1, 2), 2), {}),
    (checks.one_per_depth, (0.9, 2), {}),
    (checks.unread, (0.0, "sgd", "adam"), {}),
    (checks.unread, (0.9, "sgd", "sgd"), {}),
    (checks.shape, ((2, 3, 5), ("B", 3, range(6))), {}),
    (checks.unread, (None, "sgd", "adam"), {}),
    (checks.shape, ((2, 3), ("B", (1, 3))), {}),
    (checks.numbers, (np.float32(1.0),), {}),
    (checks.numbers, ([1, 0.5],), {"sequence": True}),
    (checks.floating, (jnp.bfloat16,), {}),
    (checks.side_or_sides, (16,), {}),
    (checks.side_or_sides, ((16, 8),), {}),
]
REFUSE = [
    (checks.at_least, (-1, 0), {}, "x: -1 must be at least 0"),
    (checks.at_least, (float("nan"), 0), {"fix": "mend it"}, "x: nan must be at least 0; mend it"),
    (checks.at_least, ((3, 0), 1), {}, "x: (3, 0) must be at least 1"),
    (checks.at_least, (2.5, 1), {"whole": True, "fix": "mend it"}, "x: 2.5 must be at least 1 and whole; mend it"),
    (checks.integers, (0, 1), {}, "x: 0 must be an integer and at least 1"),
    (checks.integers, (2.0, 1), {}, "x: 2.0 must be an integer and at least 1"),
    (checks.integers, (True, 1), {}, "x: True must be an integer and at least 1"),
    (checks.integers, ((2.5, 3), 1), {}, "x: (2.5, 3) must be an integer and at least 1"),
    (checks.integer_type, (np.float32,), {}, "x: dtype float32 must be an integer type"),
    (checks.integer_type, (bool,), {}, "x: dtype bool must be an integer type"),
    (checks.amount, (float("nan"),), {}, "x: nan must be finite and at least 0"),
    (checks.amount, (-1,), {}, "x: -1 must be finite and at least 0"),
    (checks.amount, ("a",), {}, "x: 'a' must be a number"),
    (checks.finite, ([1.0, np.inf, np.nan],), {}, "x: inf must be finite"),
    (checks.finite, ([[1.0, np.nan]],), {"least": 0}, "x: nan must be finite and at least 0"),
    (checks.finite, ([1.0, -2.0],), {"least": 0}, "x: -2.0 must be finite and at least 0"),
    (checks.increasing, ((1, 3, 3),), {}, "x: (1, 3, 3) must increase"),
    (checks.distinct, ([1, 2.5, 1],), {}, "x: 1,2.5,1 names one twice; give different ones"),
    (checks.above, (0.0, 0), {}, "x: 0.0 must be above 0"),
    (checks.above, (float("nan"), 0), {"fix": "mend it"}, "x: nan must be above 0; mend it"),
    (checks.within, (1.1, 0, 1), {}, "x: 1.1 is outside [0, 1]"),
    (checks.within, (float("nan"), 0, 1), {}, "x: nan is outside [0, 1]"),
    (checks.within, ((0.5, -1), 0, 1), {"meaning": "a share"}, "x: (0.5, -1) is outside [0, 1], a share"),
    (checks.within, (1.0, 0, 1), {"below": True, "fix": "mend it"}, "x: 1.0 is outside [0, 1); mend it"),
    (checks.in_range, (5, 1, 4, "the depths"), {}, "x: 5 is outside 1..4, the depths"),
    (checks.one_of, ("c", ["a", "b", "d"]), {}, "x: 'c' is unknown; allowed are 'a', 'b' and 'd'"),
    (checks.one_of, (3, (1, 2)), {}, "x: 3 is unknown; allowed are 1 and 2"),
    (checks.one_of, ("c", {"a": 1}), {}, "x: 'c' is unknown; allowed is 'a'"),
    (checks.divides, (5, "model_dim", 12), {}, "x: 5 does not divide model_dim 12; choose a divisor of it"),
    (checks.divides, (0, "model_dim", 12), {}, "x: 0 does not divide model_dim 12; choose a divisor of it"),
    (checks.multiple_of, (7, 3, "the patch"), {}, "x: 7 must be a positive multiple of 3, the patch"),
    (checks.multiple_of, (0, 3, "the patch"), {}, "x: 0 must be a positive multiple of 3, the patch"),
    (checks.multiple_of, (7, 3, "the patch"), {"axis": "W"}, "x: W = 7 must be a positive multiple of 3, the patch"),
    (checks.positive_triple, ((1, 2), "(a, b, c)"), {}, "x: (1, 2) must be three positive integers (a, b, c)"),
    (checks.positive_triple, ((1, 2, 0), "(a, b, c)"), {}, "x: (1, 2, 0) must be three positive integers (a, b, c)"),
    (checks.one_per_depth, ((1, 2), 3), {}, "x: (1, 2) has 2 entries for code depth 3; give one per depth"),
    (checks.unread, (0.9, "sgd", "adam"), {}, "x: 0.9 is read by 'sgd' only, not by 'adam'; set it to 0"),
    (checks.shape, ((2,), (3,)), {}, "x: shape (2,) does not fit; allowed is (3,)"),
    (checks.shape, ((2, 3), ("B", 4)), {}, "x: shape (2, 3) does not fit; allowed is (B, 4)"),
    (checks.shape, ((2, 6), (2, range(6))), {}, "x: shape (2, 6) does not fit; allowed is (2, 0..5)"),
    (checks.shape, ((2, 2), (2, (1, 3))), {}, "x: shape (2, 2) does not fit; allowed is (2, 1 or 3)"),
    (checks.shape, ((2, 3, 1), (2, 3)), {}, "x: shape (2, 3, 1) does not fit; allowed is (2, 3)"),
    (checks.unread, ((1.0,), "a", "b"), {"fix": "mend it"}, "x: (1.0,) is read by 'a' only, not by 'b'; mend it"),
    (checks.numbers, (True,), {}, "x: True must be a number"),
    (checks.numbers, ((1.0,),), {}, "x: (1.0,) must be a number"),
    (checks.numbers, ((),), {"sequence": True}, "x: () must be a number or a sequence of numbers"),
    (checks.numbers, ("a",), {"sequence": True}, "x: 'a' must be a number or a sequence of numbers"),
    (checks.floating, (np.uint8,), {"fix": "mend it"}, "x: dtype uint8 is not floating-point; mend it"),
    (
        checks.side_or_sides,
        ((16,),),
        {},
        "x: (16,) is no size of an image; give one side, or (height, width)",
    ),
]


@pytest.mark.parametrize(("check", "arguments", "keywords"), PASS)
def test_settings_that_pass(check, arguments, keywords):
    check("x", *arguments, **keywords)


@pytest.mark.parametrize(("check", "arguments", "keywords", "message"), REFUSE)
def test_settings_that_are_refused(check, arguments, keywords, message):
    with pytest.raises(ValueError) as error:
        check("x", *arguments, **keywords)
    assert str(error.value) == message


def test_every_check_is_tested():
    public = {
        f for name, f in vars(checks).items() if callable(f) and f.__module__ == checks.__name__ and name[0] != "_"
    }
    assert public == {row[0] for row in PASS} == {row[0] for row in REFUSE}

"""Classes by name and by number, as a user writes them."""

import re
from types import SimpleNamespace

import pytest

from rq_jax.evaluation import conditions

NAMES = ["2", "10", "tench, Tinca tinca", 'the "big" one', "Bee", "bee", "caf\u00e9", "country-flag", "fox "]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2", [0]),  # a name goes before a number
        ("1,3, 7", [1, 3, 7]),
        ('"tench, Tinca tinca",0', [2, 0]),
        ('0, "TENCH, Tinca tinca"', [0, 2]),
        ('"the ""big"" one"', [3]),
        ("Bee,bee,BEE", [4, 5, 4]),
        ("cafe\u0301", [6]),
        ("007", [7]),
    ],
)
def test_classes_are_found(text, expected):
    assert conditions.parse_classes(text, NAMES) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("country-flags", "'country-flags' is no class; did you mean 'country-flag'?; allowed are 0..8 and the names that "),
        ("tench", "'tench' is no class; did you mean 'tench, Tinca tinca'?; "),
        ("\u00b2", "'\u00b2' is no class; allowed"),
        ("\u0663", "'\u0663' is no class; allowed"),
        ("9", "'9' is no class; allowed"),
        ("-1", "'-1' is no class; allowed"),
        ("9" * 5000, f"'{'9' * 50}'...'{'9' * 50}' (5000 characters) is no class; "),
        ("1,,3", "'' is no class; allowed"),
        ("", "empty; give names or numbers"),
        ('"tench', "'\"tench' is no list of names and numbers (unexpected end of data)"),
        ('"a"b', "'\"a\"b' is no list of names and numbers ("),
        ("a\nb", r"'a\nb' is no list of names and numbers ("),
    ],
)  # fmt: skip
def test_what_is_no_class_is_one_line(text, message):
    with pytest.raises(ValueError, match=f"^--classes: {re.escape(message)}") as error:
        conditions.parse_classes(text, NAMES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length, is_conditional, kind", [(1, False, "unconditional"), (6, True, "text-conditional")])
def test_only_models_of_classes_list_them(length, is_conditional, kind):
    model = SimpleNamespace(is_conditional=is_conditional, cond_length=length, cond_vocab_size=3)
    with pytest.raises(ValueError, match=f"^classes: this model is {kind}, and takes none$"):
        conditions.class_names(SimpleNamespace(model=model, config={}))
    model.is_conditional, model.cond_length = True, 1
    assert conditions.class_names(SimpleNamespace(model=model, config={})) == ["0", "1", "2"]
    assert conditions.class_names(SimpleNamespace(model=model, config={"class_names": ["a"]})) == ["a"]

import pytest

from rq_jax.settings.text import quoted


@pytest.mark.parametrize(
    "text, shown",
    [
        ("encoder.weight", "'encoder.weight'"),
        ("größe 重み", "'größe 重み'"),
        ("a\nnext: b", r"'a\nnext: b'"),
        ("\x1b[31mred", r"'\x1b[31mred'"),
        ("\u202egnp.exe", r"'\u202egnp.exe'"),
        ("\ud800", r"'\ud800'"),
        (7, "'7'"),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert quoted(text) == shown


def test_long_text_is_cut_in_the_middle():
    assert quoted("a" * 500 + "b" * 501, limit=8) == "'aaaa'...'bbbb' (1001 characters)"
    assert quoted("a" * 8, limit=8) == "'aaaaaaaa'"

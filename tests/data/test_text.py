"""The tokenizer: fixed length, the published text pipeline, dropout that follows a generator, errors."""

import json
import pickle
import re
import sys
import unicodedata

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from rq_jax.data import notices  # noqa: E402
from rq_jax.data.text import PAD, UNKNOWN, load_tokenizer, main, train_tokenizer  # noqa: E402

CAPTIONS = [
    "woman astronaut, medium skin tone",
    "man astronaut, light skin tone",
    "person climbing, dark skin tone",
    "grinning cat face with smiling eyes",
    "flag: åland islands",
    "clock face two-thirty",
] * 5


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "new" / "tokenizer.json"
    assert train_tokenizer(CAPTIONS, 90, path) == 90
    return path


def test_length_padding_and_dtype(path):
    tokens = load_tokenizer(path, 9)(CAPTIONS[:6])
    assert tokens.shape == (6, 9) and tokens.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < 90
    short = load_tokenizer(path, 30)(["cat"])[0]
    used = np.count_nonzero(short)
    assert 0 < used < 30 and (short[used:] == 0).all()


def test_cut_on_the_right(path):
    text = CAPTIONS[:1]
    np.testing.assert_array_equal(load_tokenizer(path, 4)(text), load_tokenizer(path, 40)(text)[:, :4])


def test_case_is_folded_accents_are_kept_and_punctuation_is_split(path):
    tokenizer = load_tokenizer(path, 12)
    same = tokenizer(["Flag: ÅLAND islands", "flag: åland  islands", "flag : åland islands", "flag: aland islands"])
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])
    assert (same[0] != same[3]).any()


def test_round_trip_and_unknown_letters(path):
    tokenizer = load_tokenizer(path, 40)
    assert tokenizer.decode(tokenizer(["Grinning CAT face"])[0]) == "grinning cat face"
    assert tokenizer(["漢"])[0, 0] == 1  # [UNK]
    assert not tokenizer([""]).any()


def test_merging_without_dropout_is_what_the_library_does(path):
    tokenizer = load_tokenizer(path, 60)
    always = np.random.default_rng(0)
    for text in [*CAPTIONS[:6], "ästronaut 漢字 womanly, eyes!", "x", ""]:
        ids = tokenizer._encode_with_dropout(text, always)  # dropout is 0 here: every merge is kept
        np.testing.assert_array_equal(tokenizer([text])[0], ids + [0] * (60 - len(ids)))


def test_dropout_follows_its_generator_and_keeps_the_text(path):
    tokenizer = load_tokenizer(path, 60, dropout=0.5)
    plain = tokenizer(CAPTIONS[:6])
    first = [tokenizer(CAPTIONS[:6], np.random.default_rng(seed)) for seed in (1, 2)]
    again = [tokenizer(CAPTIONS[:6], np.random.default_rng(seed)) for seed in (1, 2)]
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and np.count_nonzero(first[0]) > np.count_nonzero(plain)
    for dropped, kept in zip(first[0], plain, strict=True):
        assert tokenizer.decode(dropped) == tokenizer.decode(kept)
    np.testing.assert_array_equal(tokenizer(CAPTIONS[:6]), plain)  # no generator, no dropout


def test_a_pair_of_vocabulary_and_merges_is_the_same_tokenizer(path, tmp_path):
    model = json.loads(path.read_text())["model"]
    (tmp_path / "bpe-vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (tmp_path / "bpe-merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    one, pair = load_tokenizer(path, 20, 0.3), load_tokenizer(tmp_path / "bpe-vocab.json", 20, 0.3)
    assert pair.vocab_size == one.vocab_size == 90
    np.testing.assert_array_equal(one(CAPTIONS), pair(CAPTIONS))
    np.testing.assert_array_equal(one(CAPTIONS, np.random.default_rng(3)), pair(CAPTIONS, np.random.default_rng(3)))


def test_worker_processes_can_have_it(path):
    tokenizer = load_tokenizer(path, 20)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))(CAPTIONS), tokenizer(CAPTIONS))


def test_training_is_deterministic(path, tmp_path):
    train_tokenizer(CAPTIONS, 90, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_a_missing_package_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fix = "run pip install 'rq_jax[train]'"
    with pytest.raises(ValueError, match=f"^data.text_tokenizer: '.*' needs the package tokenizers; {re.escape(fix)}$"):
        load_tokenizer(path, 8)


def test_load_errors(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.text_tokenizer: .*none.json.* is no file; train one"):
        load_tokenizer(tmp_path / "none.json", 8)
    (tmp_path / "lone-vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="data.text_tokenizer: .*lone-merges.txt.* is no file"):
        load_tokenizer(tmp_path / "lone-vocab.json", 8)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="bad.json' is not a tokenizer file"):
        load_tokenizer(tmp_path / "bad.json", 8)
    swapped = json.loads(path.read_text())
    vocab = swapped["model"]["vocab"]
    vocab[PAD], vocab[UNKNOWN] = vocab[UNKNOWN], vocab[PAD]
    for token in swapped["added_tokens"]:
        token["id"] = 1 - token["id"]
    (tmp_path / "swapped.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"swapped.json' is not a byte-pair tokenizer with \[PAD\] as id 0"):
        load_tokenizer(tmp_path / "swapped.json", 8)
    with pytest.raises(ValueError, match="data.text_length: 0 must be at least 1"):
        load_tokenizer(path, 0)
    with pytest.raises(ValueError, match=r"data.text_dropout: 1.0 is outside \[0, 1\)"):
        load_tokenizer(path, 8, dropout=1.0)


def test_vocabulary_too_small_for_the_letters(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: 5 is too small; the letters alone need"):
        train_tokenizer(CAPTIONS, 5, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_command_line(tmp_path, capsys):
    from PIL import Image

    for i, caption in enumerate(CAPTIONS[:20]):
        Image.new("L", (3, 3)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    out = tmp_path / "tokenizer.json"
    command = ["--name=folder", f"--data_dir={tmp_path}", "--split=all", "--vocab_size=80", f"--out={out}"]
    main([*command, "--text_key=txt"])
    assert "80 ids" in capsys.readouterr().out
    assert load_tokenizer(out, 8).vocab_size == 80
    with pytest.raises(SystemExit):
        main([*command, "--text_key=title"])
    assert "data.text_key: 'title' is unknown" in capsys.readouterr().err


def test_both_forms_of_an_accented_letter_are_one(path, tmp_path):
    composed, decomposed = "flag: åland", "flag: a\u030aland"
    tokenizer = load_tokenizer(path, 12, dropout=0.5)
    np.testing.assert_array_equal(*tokenizer([composed, decomposed]))
    drawn = [tokenizer([text], np.random.default_rng(5)) for text in (composed, decomposed)]
    np.testing.assert_array_equal(*drawn)
    train_tokenizer([unicodedata.normalize("NFD", text) for text in CAPTIONS], 90, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["cat", "кот", "кит"], ["2 of 3, such as 'кот', hold letters that the text tokenizer does not know"]),
        (["", "\t \u200b"], ["2 of 2, such as '', are empty"]),
        (["cat " * 9], ["1 of 1, such as 'cat cat", "have more than 6 tokens; the rest is cut"]),
        (["\x1b[31m漢" + "字\n" * 300], [r"'\x1b[31m漢字\n字", "(606 characters)"]),
        (["cat face"], []),
    ],
)
def test_what_a_text_loses_is_told_once(path, caplog, texts, lines):
    notices.tell.cache_clear()
    tokenizer = load_tokenizer(path, 6)
    for _ in range(2):
        tokenizer(texts)
    assert all(line in caplog.text for line in lines) and bool(caplog.messages) == bool(lines)
    assert len(caplog.messages) == len(set(caplog.messages)) and not any("\n" in line for line in caplog.messages)


def test_words_that_training_did_not_show_are_in_pieces(tmp_path):
    train_tokenizer(["a red cat", "a blue cat"], 60, tmp_path / "closed.json")
    tokenizer = load_tokenizer(tmp_path / "closed.json", 6)
    assert tokenizer.words_in_pieces(["A red cat", "a Blue cat"]) == []
    assert tokenizer.words_in_pieces(["a bluecat, a teal cat!", "teal cat... 7"]) == ["bluecat", "teal", "7"]


def _of(path, **changes):
    """The tokenizer's JSON with members set; "a.b" is a member of a member."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = document
        for each in outer:
            inner = inner[each]
        inner[last] = value
    return document


_PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": PAD}  # fmt: skip
_TRUNCATION = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
_REPLACE = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "y"}
REFUSED = {
    "padding": dict(padding={**_PADDING, "strategy": {"Fixed": 4_000_000_000}}),
    "multiples": dict(padding={**_PADDING, "pad_to_multiple_of": 2**40}),
    "truncation": dict(truncation={**_TRUNCATION, "max_length": 2**63}),
    "negative truncation": dict(truncation={**_TRUNCATION, "stride": -1}),
    "replacement": dict(normalizer=_REPLACE),
    "nested sequence": dict(normalizer={"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}),
    "long sequence": dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFD"}] * 99}),
    "prefix": dict(normalizer={"type": "Prepend", "prepend": "x" * 99}),
    "split": dict(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed"}),
    "no normalizer": dict(normalizer=None),
    "post-processor": dict(post_processor={"type": "TemplateProcessing", "single": [], "pair": []}),
    "WordPiece": dict(model__type="WordPiece"),
    "subword prefix": dict(model__continuing_subword_prefix="##"),
    "dropout": dict(model__dropout=0.5),
    "ids with a gap": dict(model__vocab={PAD: 0, UNKNOWN: 1, "a": 4_000_000_000}),
    "merge of three": dict(model__merges=["a b c"]),
    "merge of unknown parts": dict(model__merges=[["漢", "字"]]),
    "added token": dict(added_tokens=[{"id": 0, "content": PAD, "pattern": "(x+x+)+y"}]),
    "added token of words": dict(added_tokens=[{"id": 0, "content": PAD, "single_word": True}]),
    "added token of its own": dict(added_tokens=[{"id": 90, "content": "new"}]),
    "unknown member": dict(surprise=1),
    "model of another kind": dict(model=[]),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.fault("a text tokenizer file of another pipeline", "refused before a library reads it")
def test_other_pipelines_do_not_reach_the_library(path, tmp_path, monkeypatch, what):
    (tmp_path / "t.json").write_text(json.dumps(_of(path, **REFUSED[what])))
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", None)
    with pytest.raises(
        ValueError, match=r"^data.text_tokenizer: '.*t.json' is not a tokenizer file: .* is not what"
    ) as caught:
        load_tokenizer(tmp_path / "t.json", 8)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_pipeline_of_the_published_text_tokenizers_is_taken(path, tmp_path):
    from tokenizers.implementations import CharBPETokenizer

    model = json.loads(path.read_text())["model"]
    official = CharBPETokenizer(
        model["vocab"], [tuple(merge) for merge in model["merges"]], unk_token=UNKNOWN, lowercase=True
    )
    official.add_special_tokens([PAD])
    official.enable_padding(length=20, pad_id=0, pad_token=PAD)
    official.enable_truncation(20)
    official.save(str(tmp_path / "official.json"))
    texts = [*CAPTIONS[:6], "ästronaut 漢字 womanly, eyes!"]
    found = load_tokenizer(tmp_path / "official.json", 20)(texts)
    np.testing.assert_array_equal(found, [official.encode(text).ids for text in texts])
    np.testing.assert_array_equal(found, load_tokenizer(path, 20)(texts))

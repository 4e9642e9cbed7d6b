"""Files of byte-pair text tokenizers, checked before the `tokenizers` library reads them.

The library takes pipelines of any kind, and some end the process: padding to billions, replacements of replacements,
expressions without end. Only those are taken that ours and the published text tokenizers are made of.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rq_jax.files import read_json
from rq_jax.settings.text import quoted

PAD, UNKNOWN, WORD_END = "[PAD]", "[UNK]", "</w>"

_MAX_LENGTH = 2**16  # of padding and truncation
_MAX_ADDED = 4096  # tokens beside the model's vocabulary
_MAX_NORMALIZERS = 8
_UNSET = (None, "")
_NORMALIZERS = {
    "BertNormalizer": {"clean_text", "handle_chinese_chars", "strip_accents", "lowercase"},
    "Lowercase": set(), "NFC": set(), "NFD": set(), "NFKC": set(), "NFKD": set(),
}  # fmt: skip
_PRE_TOKENIZERS = {"BertPreTokenizer": set(), "WhitespaceSplit": set()}
_ADDED_SWITCHES = {"single_word", "lstrip", "rstrip", "normalized", "special"}


def files(path: Path) -> list[Path]:
    """The files of a text tokenizer: `path` alone, or with the `*-merges.txt` beside a `*-vocab.json`."""
    if not path.name.endswith("vocab.json"):
        return [path]
    return [path, path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")]


def load(path: Path) -> Any:
    """The library's tokenizer of a file.

    Raises:
      OSError: a file cannot be read.
      ValueError: it is not a tokenizer of the kind that is taken.
    """
    from tokenizers import Tokenizer as Bpe

    document = read_json(path)
    if len(pair := files(path)) > 1:
        lines = pair[1].read_text(encoding="utf-8").split("\n")
        merges = [
            line.rstrip("\r").split(" ") for line in lines if line.rstrip("\r") and not line.startswith("#version")
        ]
        model = {"type": "BPE", "unk_token": UNKNOWN, "end_of_word_suffix": WORD_END, "vocab": document}
        _check_model({**model, "merges": merges})
        return untrained(vocab=document, merges=[tuple(merge) for merge in merges])
    check(document)
    # Texts are padded and cut elsewhere, and ids become text elsewhere.
    return Bpe.from_str(json.dumps({**document, "padding": None, "truncation": None, "decoder": None}))


def untrained(**vocabulary: Any) -> Any:
    """A byte-pair model with the text normalisation of the published models."""
    from tokenizers import Tokenizer as Bpe
    from tokenizers import models, normalizers, pre_tokenizers

    bpe = Bpe(models.BPE(**vocabulary, unk_token=UNKNOWN, end_of_word_suffix=WORD_END))
    clean = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    bpe.normalizer = normalizers.Sequence([clean, normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return bpe


def check(document: Mapping[str, Any]) -> None:
    """Check that a `tokenizer.json` is of the kind that is taken.

    Raises:
      ValueError: naming the part that is not.
    """
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"}
    _require(document.keys() <= known | {"decoder", "model"}, "members", sorted(document.keys() - known))
    for name in ("truncation", "padding"):
        _check_sizes(name, document.get(name))
    _require(document.get("post_processor") is None, "post_processor", document.get("post_processor"))
    normalizer = document.get("normalizer")
    parts = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        parts = normalizer.get("normalizers")
        _require(isinstance(parts, list) and 0 < len(parts) <= _MAX_NORMALIZERS, "normalizer", normalizer)
    for part in parts:
        _check_part("normalizer", part, _NORMALIZERS)
    _check_part("pre_tokenizer", document.get("pre_tokenizer"), _PRE_TOKENIZERS)
    added = document.get("added_tokens") or []
    _require(isinstance(added, list) and len(added) <= _MAX_ADDED, "added_tokens", added)
    for token in added:
        _check_added(token)
    _check_model(document.get("model"))
    vocab = document["model"]["vocab"]
    for token in added:
        _require(vocab.get(token["content"]) == token["id"], "added_tokens", token)


def _require(condition: bool, name: str, value: Any) -> None:
    if not condition:
        text = quoted(json.dumps(value))
        raise ValueError(f"{name} {text} is not what byte-pair text tokenizers of this kind have; train one instead")


def _check_sizes(name: str, value: Any) -> None:
    """Padding or truncation: no numbers beyond the length of a text."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            pending += each.values()
        else:
            is_size = isinstance(each, int) and 0 <= each <= _MAX_LENGTH
            _require(each is None or is_size or isinstance(each, str), name, value)


def _check_part(name: str, part: Any, allowed: Mapping[str, set[str]]) -> None:
    """A step of the pipeline without settings other than switches."""
    _require(isinstance(part, dict) and isinstance(part.get("type"), str), name, part)
    _require(part["type"] in allowed and part.keys() <= allowed[part["type"]] | {"type"}, name, part)
    _require(all(isinstance(part[key], bool | None) for key in part.keys() - {"type"}), name, part)


def _check_added(token: Any) -> None:
    _require(isinstance(token, dict) and token.keys() <= _ADDED_SWITCHES | {"id", "content"}, "added_tokens", token)
    _require(isinstance(token.get("content"), str) and type(token.get("id")) is int, "added_tokens", token)
    _require(all(isinstance(token[key], bool) for key in token.keys() & _ADDED_SWITCHES), "added_tokens", token)
    _require(not any(token.get(key) for key in ("single_word", "lstrip", "rstrip")), "added_tokens", token)


def _check_model(model: Any) -> None:
    _require(isinstance(model, dict) and model.get("type", "BPE") == "BPE", "model", model)
    expected = {"unk_token": (UNKNOWN,), "end_of_word_suffix": (WORD_END,)}
    for name in ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges"):
        expected[name] = (*_UNSET, False)
    for name, allowed in expected.items():
        _require(model.get(name) in allowed, f"model.{name}", model.get(name))
    known = {"type", "fuse_unk", "vocab", "merges", *expected}
    _require(model.keys() <= known, "model: members", sorted(model.keys() - known))
    _require(model.get("fuse_unk") in (None, False, True), "model.fuse_unk", model.get("fuse_unk"))
    vocab, merges = model.get("vocab"), model.get("merges")
    _require(isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()), "model.vocab", vocab)
    _require(set(vocab.values()) == set(range(len(vocab))), "model.vocab: ids", sorted(vocab.values()))
    _require(isinstance(merges, list), "model.merges", merges)
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)
        _require(is_pair and pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab, "model.merges", merge)

"""Token ids of CLIP: byte-pair encoding of cleaned, lower-cased text, with its published vocabulary."""

import gzip
import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rq_jax.pretrained.files import check_digest, package_file
from rq_jax.settings.text import quoted

LENGTH = 77  # tokens of every text
START, END = "<|startoftext|>", "<|endoftext|>"

_PACKAGE = "open-clip-torch==3.3.0"
_FILE = ("open_clip", "bpe_simple_vocab_16e6.txt.gz")
_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_NUM_MERGES = 48894  # of those in the file, behind a first line
# Contractions, words, single digits, and runs of what is left.
_PARTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Maps texts to ids of the start, of byte pairs and of the end, padded with 0 to 77.

    Attributes:
      use_cut: a longer text is cut, and ends like every other; False refuses it.
    """

    def __init__(self, bpe: Any, use_cut: bool = False):
        self._bpe, self.use_cut = bpe, use_cut

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts.

        Args:
          texts: n texts; mojibake and HTML entities are mended, as CLIP does it.

        Returns:
          int32 (n, 77).

        Raises:
          ValueError: a text that is too long and is not to be cut.
        """
        tokens = np.zeros((len(texts), LENGTH), np.int32)
        start, end = (self._bpe.token_to_id(token) for token in (START, END))
        for row, text in zip(tokens, texts, strict=True):
            ids = self._bpe.encode(_clean(text)).ids
            if len(ids) > LENGTH - 2 and not self.use_cut:
                raise ValueError(
                    f"prompt: {quoted(text)} has {len(ids) + 2} tokens of CLIP, at most are {LENGTH}; shorten it, or "
                    "let longer ones be cut"
                )
            ids = [start, *ids[: LENGTH - 2], end]
            row[: len(ids)] = ids
        return tokens


def load_tokenizer(use_cut: bool = False) -> Tokenizer:
    """The tokenizer with CLIP's vocabulary, from the package open-clip-torch.

    Args:
      use_cut: see `Tokenizer`.

    Raises:
      FileNotFoundError: that package, or one that cleans text, is not installed.
      ValueError: its file is not the published one.
    """
    from tokenizers import AddedToken, Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Bpe

    remedy = "or leave out what needs texts"
    _import_ftfy()  # a mistake here must not wait for the first text
    path = package_file(_PACKAGE, *_FILE, "CLIP vocabulary", remedy)
    check_digest(path, "sha256", _SHA256, f"install {_PACKAGE}")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _NUM_MERGES]]
    letters = list(_byte_letters().values())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    bpe = Bpe(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    parts = pre_tokenizers.Split(Regex(_PARTS), "removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([parts, as_bytes])
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    return Tokenizer(bpe, use_cut)


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, those that print first: the order of the vocabulary's first ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(_import_ftfy().fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def _import_ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise FileNotFoundError(
            "CLIP vocabulary: the package ftfy, which cleans text as CLIP does, is not installed; run `pip install "
            "ftfy`, or leave out what needs texts"
        ) from None
    return ftfy

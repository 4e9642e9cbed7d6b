"""Text tokenizer: byte-pair encoding of lower-cased words, as the published text-to-image models use it.

Train one on the captions of a dataset:
`python -m rq_jax.data.text --name=twemoji --text_key=caption --vocab_size=1024 --out=tokenizer.json`.
"""

import argparse
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rq_jax.data import bpe_files
from rq_jax.data.notices import tell
from rq_jax.files import atomic_path, local_path
from rq_jax.settings.text import quoted

PAD, UNKNOWN, _WORD_END = bpe_files.PAD, bpe_files.UNKNOWN, bpe_files.WORD_END


class Tokenizer:
    """Maps lower-cased text to a fixed number of ids, truncated or padded with 0 on the right; no start or end ids.

    Attributes:
      length: U, the number of ids of every text.
      dropout: probability of leaving out a merge, used only with a random generator.
      vocab_size: number of ids.
    """

    def __init__(self, bpe, length: int, dropout: float = 0.0):
        self._bpe = bpe
        self.length, self.dropout = length, dropout
        self.vocab_size = bpe.get_vocab_size()
        self._ids, merges = _vocabulary(bpe)
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._told: set[str] = set()  # kinds of loss

    def __call__(self, texts: Sequence[str], rng: np.random.Generator | None = None) -> np.ndarray:
        """Encode texts; the two forms of an accented letter are one. What is lost is told, once for each kind of loss.

        Args:
          texts: n texts.
          rng: draws the dropped merges; None drops none.

        Returns:
          int32 (n, U), padded with 0.
        """
        tokens = np.zeros((len(texts), self.length), np.int32)
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        if rng is not None and self.dropout > 0.0:
            encoded = [self._encode_with_dropout(text, rng) for text in texts]
        else:
            encoded = [self._bpe.encode(text).ids for text in texts]
            self._tell_losses(texts, encoded)
        for row, ids in zip(tokens, encoded, strict=True):
            ids = ids[: self.length]
            row[: len(ids)] = ids
        return tokens

    def _tell_losses(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> None:
        unknown = self._ids[UNKNOWN]
        losses = {
            f"hold letters that the text tokenizer does not know; they become {UNKNOWN}": lambda ids: unknown in ids,
            "are empty; the model sees padding alone": lambda ids: not ids,
            f"have more than {self.length} tokens; the rest is cut": lambda ids: len(ids) > self.length,
        }
        for loss, is_lost in losses.items():
            if loss not in self._told and (
                lost := [text for text, ids in zip(texts, encoded, strict=True) if is_lost(ids)]
            ):
                self._told.add(loss)
                tell(f"text: {len(lost)} of {len(texts)}, such as {quoted(lost[0])}, {loss}")

    def words_in_pieces(self, texts: Iterable[str]) -> list[str]:
        """Words of texts that are not one token, in order: the captions of its training had them seldom or never.

        What has neither a letter nor a digit is no word.
        """
        words = dict.fromkeys(word for text in texts for word in _words(self._bpe, unicodedata.normalize("NFC", text)))
        return [word for word in words if any(map(str.isalnum, word)) and word + _WORD_END not in self._ids]

    def decode(self, tokens: Iterable[int]) -> str:
        """Lower-cased text of one row of ids, without padding."""
        words = "".join(self._bpe.id_to_token(int(token)) or "" for token in tokens if token != self._ids[PAD])
        return words.replace(_WORD_END, " ").strip()

    def save(self, path: str | os.PathLike) -> None:
        """Write a `tokenizer.json` for `load_tokenizer`, whatever files the tokenizer came from."""
        with atomic_path(path) as partial:
            self._bpe.save(str(partial))

    def is_saved_as(self, path: str | os.PathLike) -> bool:
        """Whether a `tokenizer.json` splits texts into the same tokens, of the same numbers."""
        return _vocabulary(self._bpe) == _vocabulary(load_tokenizer(path, self.length)._bpe)

    def _encode_with_dropout(self, text: str, rng: np.random.Generator) -> list[int]:
        # The library's own dropout draws from a generator that cannot be seeded: resume would not be exact.
        symbols = [symbol for word in _words(self._bpe, text) for symbol in self._merge(word, rng)]
        return [self._ids.get(symbol, self._ids[UNKNOWN]) for symbol in symbols]

    def _merge(self, word: str, rng: np.random.Generator) -> list[str]:
        """BPE-dropout (Provilkov et al. 2020, algorithm 1): each step drops each possible merge at random."""
        symbols = [*word[:-1], word[-1] + _WORD_END]
        while True:
            ranked = ((self._ranks.get(pair), i) for i, pair in enumerate(zip(symbols, symbols[1:], strict=False)))
            possible = [(rank, i) for rank, i in ranked if rank is not None and rng.random() >= self.dropout]
            if not possible:
                return symbols
            _, i = min(possible)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def load_tokenizer(path: str | os.PathLike, length: int, dropout: float = 0.0) -> Tokenizer:
    """Load a byte-pair tokenizer.

    Args:
      path: a `tokenizer.json` of `train_tokenizer`, or a `*-vocab.json` with `*-merges.txt` beside it.
      length: U, the number of ids of every text; at least 1.
      dropout: probability of leaving out a merge in training, in [0, 1).

    Returns:
      The tokenizer.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a tokenizer file, no package to read it with, or an argument out of range.
    """
    if length is None or length < 1:
        raise ValueError(f"data.text_length: {length} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"data.text_dropout: {dropout} is outside [0, 1)")
    path = local_path(path)
    for file in bpe_files.files(path):
        if not file.is_file():
            raise FileNotFoundError(
                f"data.text_tokenizer: '{file}' is no file; train one with python -m rq_jax.data.text"
            )
    try:
        bpe = bpe_files.load(path)
    except ImportError:
        fix = "run pip install 'rq_jax[train]'"
        raise ValueError(f"data.text_tokenizer: '{path}' needs the package tokenizers; {fix}") from None
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data.text_tokenizer: '{path}' is not a tokenizer file: {error}") from error
    if (bpe.token_to_id(PAD), bpe.token_to_id(UNKNOWN)) != (0, 1):
        raise ValueError(
            f"data.text_tokenizer: '{path}' is not a byte-pair tokenizer with {PAD} as id 0 and {UNKNOWN} as id 1"
        )
    return Tokenizer(bpe, length, dropout)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | os.PathLike) -> int:
    """Train a byte-pair tokenizer and write it.

    Args:
      texts: the captions.
      vocab_size: largest number of ids, the two special ones included; a small text gives fewer.
      out: `tokenizer.json` to write.

    Returns:
      The number of ids.

    Raises:
      ValueError: the vocabulary cannot hold the letters alone.
    """
    from tokenizers import trainers

    bpe = bpe_files.untrained()
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    words = {word for text in texts for word in _words(bpe, text)}
    letters = sorted({letter for word in words for letter in word[:-1]} | {word[-1] + _WORD_END for word in words})
    if len(letters) + 2 > vocab_size:
        raise ValueError(f"vocab_size: {vocab_size} is too small; the letters alone need {len(letters) + 2}")
    # The trainer numbers letters in no fixed order, except special tokens. So letters are special while it trains; they
    # must not stay so, since a special token is never merged: the vocabulary goes into a fresh model.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, UNKNOWN, *letters],
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    vocab, merges = _vocabulary(bpe)
    bpe = bpe_files.untrained(vocab=vocab, merges=merges)
    with atomic_path(local_path(out)) as partial:
        bpe.save(str(partial))
    return bpe.get_vocab_size()


def _words(bpe, text: str) -> list[str]:
    return [word for word, _ in bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(text))]


def _vocabulary(bpe) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges by rank."""
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _captions(records) -> Iterator[str]:
    """The captions of a dataset; those that cannot be read are left out and counted."""
    from tqdm import tqdm

    left_out = 0
    for index in tqdm(range(len(records)), desc="captions"):
        try:
            yield records.read(index)[2]
        except (OSError, ValueError):
            left_out += 1
    if left_out:
        tell(f"captions: {left_out} of {len(records)} could not be read and are left out")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    from rq_jax.data.sources import open_records

    parser = argparse.ArgumentParser(prog="python -m rq_jax.data.text", description="Train a byte-pair tokenizer.")
    parser.add_argument("--name", required=True, help="twemoji, avatars, folder, or a prepared TFDS dataset")
    parser.add_argument("--data_dir", help="as in config.data")
    parser.add_argument("--split", default="train", help="the split to read (default: train)")
    parser.add_argument("--text_key", required=True, help="the feature that holds the captions")
    parser.add_argument(
        "--vocab_size", type=int, required=True, help="largest number of ids, the two special ones included"
    )
    parser.add_argument("--out", required=True, help="the tokenizer.json to write")
    options = parser.parse_args(arguments)
    try:
        records = open_records(options.name, options.split, options.data_dir, text_key=options.text_key)
        print(f"{train_tokenizer(_captions(records), options.vocab_size, options.out)} ids in {options.out}")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

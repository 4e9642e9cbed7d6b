"""Runs of stage 2 over a tokenizer with random weights."""

import dataclasses
from pathlib import Path

import helpers

from rq_jax import recipes
from rq_jax.data.text import train_tokenizer


@dataclasses.dataclass
class Places:
    """Where the pictures, the tokenizer and the text tokenizer are."""

    pictures: Path
    tokenizer: Path
    text_tokenizer: Path


def make_places(root: Path) -> Places:
    pictures = helpers.write_pictures(root / "pictures")
    tokenizer = helpers.save_tokenizer(root / "tokenizer", pictures)
    train_tokenizer((path.read_text() for path in sorted(pictures.rglob("*.txt"))), 40, root / "bpe.json")
    return Places(pictures, tokenizer, root / "bpe.json")


def prepare(places, kind="class", mesh=None, **settings):
    """A run on one device, where nothing is partitioned and programs compile faster."""
    return recipes.prepare(make_config(places, kind, **settings), mesh=mesh or helpers.make_mesh())


def make_config(places, kind="class", **settings):
    if kind == "text":
        settings = {"data__text_tokenizer": str(places.text_tokenizer), **settings}
    settings = {"tokenizer": str(places.tokenizer), **settings}
    return helpers.transformer_config(places.pictures, kind, **settings)

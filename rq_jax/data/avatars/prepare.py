"""Making of the avatars: 50,000 images with captions and attributes, in files that a killed call has not to repeat."""

import json
from collections.abc import Iterator
from pathlib import Path

from rq_jax.data import array_records
from rq_jax.data.array_records import VERSION
from rq_jax.data.avatars import captions, draw
from rq_jax.data.avatars.styles import STYLES

__all__ = ["CONFIGS", "PACKAGES", "SPLITS", "VERSION", "AvatarImages", "make"]
CONFIGS = ("64", "128")  # side of the images in pixels
PACKAGES = ("tensorflow_datasets", "array_record", "dicebear", "dicebear_styles", "resvg_py")
SPLITS = {"train": 45_000, "validation": 2_500, "unseen": 2_500}
IMAGES_PER_FILE = 1_000


class AvatarImages:
    """The images of a split, drawn when they are read.

    `attributes` is a JSON object of all that was chosen, `named` a JSON list of the attributes in the caption.
    """

    class_names, label_name = tuple(STYLES), "style"
    has_text, more_texts = True, ("attributes", "named")

    def __init__(self, split: str, size: int, count: int):
        """Args: split: a key of `SPLITS`; size: side in pixels; count: of images, the first of the split."""
        self.split, self.size, self.count = split, size, count
        self.names = f"{draw.SEED}/{split}"

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Iterator[tuple[bytes, int, str, str, str]]:
        for index in range(start, stop):
            avatar = draw.choose(self.split, index)
            text, named = captions.caption(avatar)
            label = self.class_names.index(avatar.style)
            yield draw.render(avatar, self.size), label, text, json.dumps(avatar.attributes), json.dumps(named)


def make(data_dir: Path, config: str) -> None:
    """Draw a configuration, or the files of it that are missing.

    Args:
      data_dir: directory of TFDS datasets.
      config: one of `CONFIGS`.
    """
    splits = {split: AvatarImages(split, int(config), count) for split, count in SPLITS.items()}
    array_records.write(splits, f"avatars/{config}", data_dir, IMAGES_PER_FILE)

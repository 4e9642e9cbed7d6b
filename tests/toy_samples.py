"""Small models of every kind in model directories, and what sample.py draws from them."""

import dataclasses
import json
from pathlib import Path

import helpers
import numpy as np
from PIL import Image

import sample
from rq_jax.data.text import train_tokenizer

KINDS = ("unconditional", "class", "text", "guided")


@dataclasses.dataclass
class Models:
    """Stage-2 directories by kind, the stage-1 directory, the pictures."""

    stage2: dict[str, Path]
    stage1: Path
    pictures: Path


def save_models(root: Path) -> Models:
    """Models of every kind with random weights, over images that they name."""
    pictures_dir = helpers.write_pictures(root / "pictures")
    tokenizer = helpers.save_tokenizer(root / "tokenizer", pictures_dir)
    train_tokenizer((path.read_text() for path in sorted(pictures_dir.rglob("*.txt"))), 40, root / "bpe.json")
    for kind in KINDS:
        helpers.save_transformer(root / kind, pictures_dir, tokenizer, kind, root / "bpe.json")
    (root / "bpe.json").unlink()
    return Models({kind: root / kind for kind in KINDS}, tokenizer, pictures_dir)


@dataclasses.dataclass
class Drawn:
    """What one run wrote."""

    out: Path
    codes: np.ndarray
    ids: np.ndarray
    cond: np.ndarray | None
    settings: dict

    def image(self, image_id: int) -> np.ndarray:
        """uint8 (H, W, C)."""
        return np.asarray(Image.open(self.out / "images" / f"{image_id:06d}.png"))


def draw(trained, out, *flags, kind="unconditional", num=3, batch=3, first=0) -> Drawn:
    checkpoint_dir = trained.stage2[kind]
    arguments = [f"--checkpoint={checkpoint_dir}", f"--out={out}", f"--num_images={num}", f"--batch_size={batch}"]
    grid = sample.run(sample.parse_args([*arguments, f"--first_index={first}", *flags]))
    assert grid == out / f"grid_{first:06d}.png" and grid.is_file()
    with np.load(out / f"codes_{first:06d}.npz") as file:
        codes, ids, cond = file["codes"], file["image_ids"], file["cond"] if "cond" in file else None
    return Drawn(out, codes, ids, cond, json.loads((out / f"settings_{first:06d}.json").read_text()))

"""Samples read back from a directory: images to measure, codes to continue."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from rq_jax.data.images import read_image
from rq_jax.data.listing import list_images

# Settings in which the parts of one set of samples may differ, as several hosts draw them.
_SLICE = ("first_index", "num_images", "batch_size", "neighbours", "out")


def read_images(directory: str | os.PathLike) -> np.ndarray:
    """Reads the images below a folder, or below the folder `images` in it, sorted by path, as a data set's are read.

    Returns:
      (N, H, W, C), float32 in [-1, 1].

    Raises:
      FileNotFoundError: no images are there.
      ValueError: images of several shapes, or samples drawn with several settings.
    """
    directory = Path(directory)
    _check_settings(directory)
    folder = directory / "images" if (directory / "images").is_dir() else directory
    listing = list_images(folder)
    listing.tell()
    if not listing.paths:
        raise FileNotFoundError(f"--samples: '{directory}' holds no images; give the --out of sample.py")
    images = [read_image(folder / path) for path in listing.paths]
    if len({image.shape[-1] for image in images}) > 1:  # grey ones beside colours
        images = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in images]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(f"--samples: '{directory}' holds images of several shapes {sorted(shapes)}; give one size")
    return np.stack(images).astype(np.float32) / 127.5 - 1


def _check_settings(directory: Path) -> None:
    """Raises ValueError for samples drawn with several settings: an earlier run may have left some behind."""
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("settings_*.json"))]
    ids, hint = set(), "draw into an empty --out"
    for run in runs:
        ids |= set(range(run["first_index"], run["first_index"] + run["num_images"]))
        names = (run.keys() | runs[0].keys()) - set(_SLICE)
        if different := sorted(name for name in names if run.get(name) != runs[0].get(name)):
            raise ValueError(f"--samples: '{directory}' holds images of several {', '.join(different)}; {hint}")
    found = {int(path.stem) for path in (directory / "images").glob("*.png") if path.stem.isdigit()}
    if runs and found - ids:
        raise ValueError(f"--samples: '{directory}' holds {len(found - ids)} images of an earlier run; {hint}")


def read_codes(path: str, num_positions: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads the first codes of an earlier run, and its conditions.

    Args:
      path: a .npz of `sample.py`.
      num_positions: P, in raster order.

    Returns:
      Codes (n, P, D) and conditions (n, U), or None where the run had none. Row i % n belongs to image i.

    Raises:
      ValueError: no .npz of codes, or one with fewer positions.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--prefix: '{path}' is no .npz file; give the codes .npz of an earlier run")
    with np.load(path, allow_pickle=False) as file:
        if "codes" not in file:
            raise ValueError(f"--prefix: '{path}' has no array 'codes'; give the codes .npz of an earlier run")
        first_id = file["image_ids"][0] if "image_ids" in file else 0
        codes = np.roll(file["codes"], first_id, axis=0)
        conds = np.roll(file["cond"], first_id, axis=0) if "cond" in file else None
    if codes.ndim != 4:
        raise ValueError(f"--prefix: codes of shape {codes.shape} are not (n, h, w, D)")
    positions = codes.shape[1] * codes.shape[2]
    if num_positions > positions:
        raise ValueError(f"--prefix_positions: {num_positions} is more than the {positions} positions of the codes")
    return codes.reshape(len(codes), positions, -1)[:, :num_positions], conds

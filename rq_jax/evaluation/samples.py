"""Samples read back from a directory: images to measure, codes to continue."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.data.images import read_image
from rq_jax.data.listing import list_images
from rq_jax.files import read_json
from rq_jax.settings.text import quoted

# Settings in which the parts of one set of samples may differ, as several hosts draw them.
_SLICE = ("first_index", "num_images", "batch_size", "neighbours", "out")
_ARRAYS = ("codes", "image_ids", "cond")
_MOST_INFLATION = 100  # times the size of a .npz, which `sample.py` writes without compression


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
    runs = [_read_settings(path) for path in sorted(directory.glob("settings_*.json"))]
    hint = "draw into an empty --out"
    for run in runs:
        names = (run.keys() | runs[0].keys()) - set(_SLICE)
        if different := sorted(name for name in names if run.get(name) != runs[0].get(name)):
            shown = quoted(", ".join(different))
            raise ValueError(f"--samples: '{directory}' holds images of several {shown}; {hint}")
    stems = (path.stem for path in (directory / "images").glob("*.png"))
    found = [int(stem) for stem in stems if stem.isdecimal() and len(stem) < 19]
    ranges = {(run["first_index"], run["first_index"] + run["num_images"]) for run in runs}
    earlier = sum(not any(first <= number < end for first, end in ranges) for number in found)
    if runs and earlier:
        raise ValueError(f"--samples: '{directory}' holds {earlier} images of an earlier run; {hint}")


def _read_settings(path: Path) -> dict[str, Any]:
    run = read_json(path)
    for name in ("first_index", "num_images"):
        if type(run.get(name)) is not int or not 0 <= run[name] < 2**63:
            raise ValueError(f"--samples: '{path}': {name} is {quoted(run.get(name))}, not a number of images")
    return run


def read_codes(path: str, num_positions: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads the first codes of an earlier run, and its conditions.

    Args:
      path: a .npz of `sample.py`.
      num_positions: P, in raster order.

    Returns:
      Codes (n, P, D) and conditions (n, U), or None where the run had none. Row i % n belongs to image i.

    Raises:
      ValueError: no .npz of codes, one with fewer positions, or with arrays that do not fit one another.
    """
    hint = "give the codes .npz of an earlier run"
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        raise ValueError(f"--prefix: '{path}' is no .npz file; {hint}")
    arrays = _read_arrays(path, hint)
    if "codes" not in arrays:
        raise ValueError(f"--prefix: '{path}' has no array 'codes'; {hint}")
    codes = arrays["codes"]
    if codes.ndim != 4 or 0 in codes.shape:
        raise ValueError(f"--prefix: codes of shape {codes.shape} are not (n, h, w, D)")
    ids, conds = arrays.get("image_ids", np.zeros(len(codes), np.int32)), arrays.get("cond")
    for name, array, ndim in (("codes", codes, 4), ("image_ids", ids, 1), ("cond", conds, 2)):
        if array is not None and (array.ndim != ndim or len(array) != len(codes) or array.dtype.kind not in "iu"):
            fits = f"(n{', ...' * (ndim > 1)}) integers for n = {len(codes)} images"
            raise ValueError(f"--prefix: '{path}': {name} {array.shape} {array.dtype} is not {fits}; {hint}")
    positions = codes.shape[1] * codes.shape[2]
    if num_positions > positions:
        raise ValueError(f"--prefix_positions: {num_positions} is more than the {positions} positions of the codes")
    first_id = int(ids[0]) % len(codes)
    codes = np.roll(codes, first_id, axis=0).reshape(len(codes), positions, -1)[:, :num_positions]
    return codes, None if conds is None else np.roll(conds, first_id, axis=0)


def _read_arrays(path: str, hint: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz that `sample.py` writes; its members are bounded before they are inflated."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.removesuffix(".npy") in _ARRAYS]
    if sum(member.file_size for member in members) > _MOST_INFLATION * Path(path).stat().st_size:
        raise ValueError(f"--prefix: '{path}' inflates to more than {_MOST_INFLATION} times its size; {hint}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in _ARRAYS if name in file}
    except Exception as error:  # RuntimeError for an encrypted member, zlib.error, BadZipFile, ...
        raise ValueError(f"--prefix: '{path}' cannot be read ({quoted(error)}); {hint}") from error

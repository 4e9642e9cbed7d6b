"""Samples read back from a directory: images to measure, codes to continue."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_jax.files import read_json
from rq_jax.grains import GrainedCodes, PackedCodes, check_grains, check_ids, pack
from rq_jax.settings.text import quoted

# Settings in which the parts of one set of samples may differ, as several hosts draw them.
_SLICE = ("first_index", "num_images", "batch_size", "neighbours", "out", "chosen")
_ARRAYS = ("codes", "image_ids", "cond", "grains")
_MOST_INFLATION = 100  # times the size of a .npz, which `sample.py` writes without compression


def check_settings(directory: Path) -> None:
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
    ranges = {(run["first_index"], run["first_index"] + _num_drawn(run)) for run in runs}
    earlier = sum(not any(first <= number < end for first, end in ranges) for number in found)
    if runs and earlier:
        raise ValueError(f"--samples: '{directory}' holds {earlier} images of an earlier run; {hint}")


def _num_drawn(run: dict[str, Any]) -> int:
    """Images that were drawn, of which some may have been chosen."""
    chosen = run.get("chosen")
    drawn = chosen.get("drawn") if isinstance(chosen, dict) else None
    return drawn if type(drawn) is int else run["num_images"]


def _read_settings(path: Path) -> dict[str, Any]:
    run = read_json(path)
    for name in ("first_index", "num_images"):
        if type(run.get(name)) is not int or not 0 <= run[name] < 2**63:
            raise ValueError(f"--samples: '{path}': {name} is {quoted(run.get(name))}, not a number of images")
    return run


def subject_of(directory: Path) -> dict[str, Any]:
    """What sample.py records of the model and the sampler behind samples; empty for other folders."""
    paths = sorted(directory.glob("settings_*.json"))
    run = read_json(paths[0]) if paths else {}
    kept = (run.keys() - set(_SLICE)) | {"chosen"}
    return {name: value for name, value in run.items() if name in kept and value is not None}


def read_conditions(directory: Path, names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """The conditions that samples were drawn with, as the codes files of sample.py hold them.

    Args:
      directory: of the samples.
      names: of their files, without suffix: the ids of the images.

    Returns:
      Conditions (N, U) in the order of the names, (N, 0) of samples without one, None where one is not known; the texts
      behind them, None where there are none.
    """
    conditions: dict[int, np.ndarray] = {}
    prompts: dict[int, str] = {}
    for path in sorted(directory.glob("codes_*.npz")):
        draws = _read_arrays(str(path), "--samples", "draw again", ("image_ids", "cond", "prompts"))
        ids = [int(i) for i in draws.get("image_ids", ())]
        conditions |= dict(zip(ids, draws.get("cond", np.zeros((len(ids), 0), np.int32)), strict=False))
        prompts |= dict(zip(ids, map(str, draws.get("prompts", ())), strict=False))
    try:
        ids = [int(name) for name in names]
        found = np.stack([conditions[i] for i in ids])
    except (KeyError, ValueError):  # other images
        return None, None
    return found, [prompts[i] for i in ids] if all(i in prompts for i in ids) else None


class Draws(NamedTuple):
    """What an earlier run drew; row i % n belongs to image i.

    codes: (n, h, w, D). grains: (n, u, v), of a `DQTransformer`, else None. conds: (n, U), or None without conditions.
    """

    codes: np.ndarray
    grains: np.ndarray | None
    conds: np.ndarray | None


def read_draws(path: str, flag: str = "--prefix") -> Draws:
    """Reads what an earlier run drew.

    Args:
      path: a .npz of `sample.py`.
      flag: that gave it, for messages.

    Raises:
      ValueError: no .npz of codes, or one with arrays that do not fit one another.
    """
    hint = "give the codes .npz of an earlier run"
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        raise ValueError(f"{flag}: '{path}' is no .npz file; {hint}")
    arrays = _read_arrays(path, flag, hint)
    if "codes" not in arrays:
        raise ValueError(f"{flag}: '{path}' has no array 'codes'; {hint}")
    codes = arrays["codes"]
    if codes.ndim != 4 or 0 in codes.shape:
        raise ValueError(f"{flag}: codes of shape {codes.shape} are not (n, h, w, D)")
    ids = arrays.get("image_ids", np.zeros(len(codes), np.int32))
    draws = Draws(codes, arrays.get("grains"), arrays.get("cond"))
    for name, array, ndim in (
        ("codes", codes, 4),
        ("image_ids", ids, 1),
        ("cond", draws.conds, 2),
        ("grains", draws.grains, 3),
    ):
        if array is not None and (array.ndim != ndim or len(array) != len(codes) or array.dtype.kind not in "iu"):
            fits = f"(n{', ...' * (ndim > 1)}) integers for n = {len(codes)} images"
            raise ValueError(f"{flag}: '{path}': {name} {array.shape} {array.dtype} is not {fits}; {hint}")
    first_id = int(ids[0]) % len(codes)
    return Draws(*(None if array is None else np.roll(array, first_id, axis=0) for array in draws))


def first_codes(draws: Draws, num_positions: int, model: Any) -> np.ndarray | PackedCodes:
    """The first codes of each image, as `sampling.generate` takes them for a prefix.

    Args:
      draws: from `read_draws`.
      num_positions: P, in the order in which the model draws.
      model: an `RQTransformer` or a `DQTransformer`.

    Returns:
      Codes (n, P, D); of a `DQTransformer` tokens, up to the P-th code of each image, or all where it has fewer.

    Raises:
      ValueError: fewer positions, codes of another grid, or with grains where the model has none and the reverse.
    """
    codes, layout = draws.codes, getattr(model, "layout", None)
    if (draws.grains is None) != (layout is None):
        holds, needs = ("no", "some") if draws.grains is None else ("some", "none")
        raise ValueError(f"--prefix: its codes have {holds} grains, and this model has {needs}; give codes of its kind")
    n, positions = len(codes), codes.shape[1] * codes.shape[2]
    if num_positions > positions:
        raise ValueError(f"--prefix_positions: {num_positions} is more than the {positions} positions of the codes")
    if layout is None:
        return codes.reshape(n, positions, -1)[:, :num_positions]
    if codes.shape[1:] != tuple(model.code_shape):
        raise ValueError(f"--prefix: codes of shape {codes.shape[1:]} are not those of this model, {model.code_shape}")
    check_grains("--prefix: grains", draws.grains, layout.num_grains, layout.region_grid, n)
    check_ids("--prefix: codes", codes, layout.codebook_size, "the codebook")
    packed = PackedCodes(*map(np.asarray, pack(GrainedCodes(codes, draws.grains), layout)))
    num_cells = np.array([layout.cells(g) for g in range(layout.num_grains)])
    is_code_BP = packed.position < num_cells[packed.grain]
    reached_BP = np.cumsum(is_code_BP, axis=1) >= num_positions
    length_B = np.where(reached_BP.any(1), reached_BP.argmax(1) + 1, packed.length)
    return packed._replace(length=np.minimum(length_B, packed.length).astype(np.int32))


def _read_arrays(path: str, flag: str, hint: str, names: Sequence[str] = _ARRAYS) -> dict[str, np.ndarray]:
    """The arrays of a .npz that `sample.py` writes; its members are bounded before they are inflated."""
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.removesuffix(".npy") in names]
    if sum(member.file_size for member in members) > _MOST_INFLATION * Path(path).stat().st_size:
        raise ValueError(f"{flag}: '{path}' inflates to more than {_MOST_INFLATION} times its size; {hint}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except Exception as error:  # RuntimeError for an encrypted member, zlib.error, BadZipFile, ...
        raise ValueError(f"{flag}: '{path}' cannot be read ({quoted(error)}); {hint}") from error

"""Editing of images: codes of an earlier run or of a split, of which some are kept, and a sheet of what came of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import quantize
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation.protocol import condition_settings
from rq_jax.evaluation.samples import Draws, read_draws
from rq_jax.evaluation.split_images import map_split
from rq_jax.report import grids
from rq_jax.sampling import edit
from rq_jax.settings import checks

NUM_SHOWN, SHOWN_SIZE = 12, 64
KINDS = ("keep_rows", "keep_box", "from_depth")
_FADED = 0.2  # of the contrast of what is not kept


class EditSettings(NamedTuple):
    """What to edit, and how; the flags of `sample.py`.

    Attributes:
      edit_of: a codes .npz of `sample.py`, or a split of the data set of the model.
      keep_rows: rows of the code grid that are kept from the top.
      keep_box: top, left, height and width of the box that is kept.
      before_box: "keep" or "draw" what comes before the box.
      from_depth: codes that are kept at every position.
      finer_of: where the finer codes are taken from, as edit_of; None: they are drawn.
    """

    edit_of: str | None = None
    keep_rows: int | None = None
    keep_box: tuple[int, int, int, int] | None = None
    before_box: str | None = None
    from_depth: int | None = None
    finer_of: str | None = None

    def check(self, prefix: str | None = None) -> None:
        """Check which flags are given together.

        Raises:
          ValueError: one without what it belongs to, or two that exclude one another.
        """
        given = [name for name in KINDS if getattr(self, name) is not None]
        needed = {"before_box": "keep_box", "finer_of": "from_depth", **dict.fromkeys(given, "edit_of")}
        for name, other in needed.items():
            if (value := getattr(self, name)) is not None and getattr(self, other) is None:
                raise ValueError(f"--{name}: {value} needs --{other}; give both, or neither")
        if self.edit_of is None:
            return
        if len(given) != 1:
            shown = ", ".join(f"--{name}" for name in given or KINDS)
            raise ValueError(f"--edit_of: {self.edit_of} needs one of {shown}, and no second; say what is kept")
        if prefix is not None:
            raise ValueError(f"--prefix: {prefix} and --edit_of: {self.edit_of} exclude one another")


@dataclasses.dataclass(frozen=True)
class Edit:
    """Codes of m images, of image i in row i % m, and what is kept of them.

    Attributes:
      settings: of the edit.
      originals: the images that are edited.
      kept: (m, h, w, D), as `sampling.generate` takes them.
      finer: codes of the images that the finer ones are taken from, (m', h, w, D), or None.
    """

    settings: EditSettings
    originals: Draws
    kept: np.ndarray
    finer: np.ndarray | None = None

    def sheet(self, loaded: LoadedModel, image_ids: Sequence[int], images: np.ndarray, captions: list[str]) -> Any:
        """The first images beside what they were made of, for a person to compare.

        Args:
          loaded: the transformer, with its tokenizer.
          image_ids: of the images, one after the other.
          images: as drawn, (n, H, W, C) uint8.
          captions: one for each.

        Returns:
          The sheet, uint8 HWC.
        """
        ids, images, captions = np.asarray(image_ids)[:NUM_SHOWN], images[:NUM_SHOWN], captions[:NUM_SHOWN]
        codes = self.originals.codes[ids % len(self.originals.codes)]
        scale = max(1, SHOWN_SIZE // images.shape[1])
        if self.finer is not None:
            finer = self.finer[ids % len(self.finer)]
            return grids.labelled_grid(_between(loaded.tokenizer, codes, finer), scale)
        rows = {"original": _decode(loaded.tokenizer, codes)}
        if (depth := self.settings.from_depth) is not None:
            rows[f"first {depth} of {codes.shape[-1]}"] = _decode(loaded.tokenizer, codes, depth)
        else:
            rows["kept"] = _fade(rows["original"], (self.kept != edit.DRAWN)[ids % len(self.kept), ..., 0])
        return grids.labelled_grid(
            {**rows, "drawn": images}, scale, captions={"drawn": captions} if any(captions) else {}
        )


def prepare(loaded: LoadedModel, directory: str, settings: EditSettings, image_ids: Sequence[int]) -> Edit:
    """Read the images that are edited, and choose what is kept of them.

    Args:
      loaded: an `RQTransformer` with its tokenizer.
      directory: that it was loaded from.
      settings: checked.
      image_ids: of the images that are drawn, one after the other; no more of a split is read.

    Raises:
      ValueError: a model whose codes have grains, codes of another grid, or a row, box or depth outside of it.
    """
    if hasattr(loaded.model, "layout"):
        raise ValueError(
            f"--edit_of: {settings.edit_of} is for code grids, and the codes of this model have grains; use --prefix "
            "or --grains_of"
        )
    _check_inside(settings, loaded.model.code_shape)
    originals = codes_of(loaded, directory, settings.edit_of, image_ids, "--edit_of")
    if settings.finer_of is None:
        return Edit(settings, originals, np.asarray(_keep(settings, originals.codes)))
    finer = codes_of(loaded, directory, settings.finer_of, image_ids, "--finer_of").codes
    coarse, fine = (codes[np.asarray(image_ids) % len(codes)] for codes in (originals.codes, finer))
    mixed = edit.interpolate(coarse, fine, settings.from_depth)
    return Edit(settings, originals, np.roll(mixed, int(image_ids[0]) % len(mixed), axis=0), finer)


def codes_of(loaded: LoadedModel, directory: str, source: str, image_ids: Sequence[int], flag: str) -> Draws:
    """Codes of images with their conditions; those of image i are in row i % m.

    Args:
      loaded: an `RQTransformer` with its tokenizer.
      directory: that it was loaded from.
      source: a codes .npz of `sample.py`, or a split of the data set of the model ("train", "validation" or its own
        name): image i has the codes that the tokenizer gives to the i-th image of the split, in turn.
      image_ids: of the images that are drawn, one after the other; no more of a split is read.
      flag: that gave the source, for messages.

    Raises:
      ValueError: codes of another grid or beyond the codebook, a model that names no data set, or an image of the split
        that cannot be read.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if source.endswith(".npz"):
        draws = read_draws(source, flag)
        if draws.grains is not None or draws.codes.shape[1:] != tuple(model.code_shape):
            shape = f"{draws.codes.shape[1:]}" + " with grains" * (draws.grains is not None)
            raise ValueError(f"{flag}: codes of shape {shape} are not those of this model, {tuple(model.code_shape)}")
        quantize.check_codes(draws.codes, model.codebook_sizes, f"{flag}: '{source}'")
        return draws

    @jax.jit
    def encode(variables, images):
        return tokenizer.model.apply(variables, sharding.scale(images), method="encode_to_codes")

    def compute(batch):
        return encode(tokenizer.variables, batch["image"]), batch["cond"] if model.is_conditional else None

    conditions = condition_settings(loaded.config, directory) if model.is_conditional else None
    codes, conds = map_split(compute, loaded, source, image_ids, flag, conditions)
    return Draws(codes, None, conds)


def _check_inside(settings: EditSettings, code_shape: tuple[int, int, int]) -> None:
    """What is kept lies inside the codes of the model."""
    h, w, D = code_shape
    if settings.keep_rows is not None:
        checks.in_range("--keep_rows", settings.keep_rows, 1, h, "the rows of the code grid")
    elif settings.keep_box is not None:
        edit.check_box("--keep_box", settings.keep_box, (h, w))
    else:
        checks.in_range("--from_depth", settings.from_depth, 1, D, "the depths of the codes")


def _keep(settings: EditSettings, codes: np.ndarray) -> jax.Array:
    if settings.keep_rows is not None:
        return edit.keep_rows(codes, settings.keep_rows)
    if settings.keep_box is not None:
        return edit.keep_box(codes, settings.keep_box, settings.before_box or "keep")
    return edit.keep_depths(codes, settings.from_depth)


def _between(tokenizer: LoadedModel, coarse: np.ndarray, fine: np.ndarray) -> dict[str, np.ndarray]:
    """Images by label, from all codes of one to all of the other."""
    D = coarse.shape[-1]
    return {
        f"{depth} + {D - depth}": _decode(tokenizer, edit.interpolate(coarse, fine, depth))
        for depth in range(D, -1, -1)
    }


def _decode(tokenizer: LoadedModel, codes: Any, depth: int | None = None) -> np.ndarray:
    """Images, uint8, of all codes or of the first `depth` of each position."""
    return grids.to_uint8(_decode_codes(tokenizer.model, depth, tokenizer.variables, codes))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_codes(model: Any, depth: int | None, variables: Any, codes: jax.Array) -> jax.Array:
    return model.apply(variables, codes, depth, method="decode_codes")


def _fade(images: np.ndarray, is_kept_Bhw: np.ndarray) -> np.ndarray:
    """Images (B, H, W, C), uint8, nearly white where their codes are not kept."""
    (H, W), (h, w) = images.shape[1:3], is_kept_Bhw.shape[1:]
    is_kept = is_kept_Bhw.repeat(H // h, axis=1).repeat(W // w, axis=2)[..., None]
    return np.where(is_kept, images, 255 - (_FADED * (255 - images.astype(np.float32))).astype(np.uint8))

"""Measure the entropy of a dataset's regions, and the thresholds that give each grain its share (DQ-VAE, section 3.2).

python -m rq_jax.data.entropy --out=thresholds.json --name=folder --data_dir=~/faces
python -m rq_jax.data.entropy --out=thresholds.json --name=imagenet2012 --fine_ratio=0.3,0.3 --patch_size=32
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax.data import fingerprint
from rq_jax.data.pipeline import Dataset
from rq_jax.data.splits import make_dataset
from rq_jax.data.transforms import DETERMINISTIC, scale
from rq_jax.files import local_path, parse_json, read_json, write_atomic, write_json
from rq_jax.grains import check_ratios, check_thresholds, patch_entropy
from rq_jax.report.progress import Progress
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

CELLS = 2**16  # of a histogram: 5.3e-5 nats each with 32 bins
SHARES = tuple(percent / 100 for percent in range(1, 100))  # above the thresholds that every file has
MOVED = 0.01  # shares that ties move by more are told
_BATCH_SIZE = 64

Ratios = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What thresholds were measured on, and how: the metadata of their file.

    Attributes:
      data: name of the dataset, as `data.name`.
      split: its split; of a list of names the file name counts.
      transform: of the images, a name in `transforms.DETERMINISTIC`.
      image_size: (height, width) in pixels, or the side of a square.
      images: examples of the split.
      patch_size: pixels on a side of a region.
      bins, num_bins, sigma: as `grains.patch_entropy`.

    Raises:
      ValueError: a transform that draws at random, or what `grains.patch_entropy` refuses, such as a size that is no
        multiple of a region.
    """

    data: str
    split: str
    transform: str
    image_size: int | tuple[int, int]
    images: int
    patch_size: int = 16
    bins: str = "full"
    num_bins: int = 32
    sigma: float = 0.01

    def __post_init__(self):
        sizes = np.atleast_1d(self.image_size)
        checks.shape("image_size", sizes.shape, (range(1, 3),))
        checks.at_least("image_size", sizes.tolist(), 1)
        height, width = np.broadcast_to(sizes, 2).tolist()
        object.__setattr__(self, "image_size", height if height == width else (height, width))
        if self.split.endswith(".txt"):
            object.__setattr__(self, "split", Path(self.split).name)
        checks.one_of("transform", self.transform, DETERMINISTIC)
        checks.at_least("patch_size", self.patch_size, 1)
        jax.eval_shape(self.entropy, jax.ShapeDtypeStruct((1, height, width, 1), np.float32))

    def entropy(self, images: jax.Array) -> jax.Array:
        """`grains.patch_entropy` of (B, H, W, C) with these settings."""
        return patch_entropy(images, self.patch_size, self.bins, self.num_bins, self.sigma)

    def record(self) -> dict[str, Any]:
        """The fields as JSON reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


class EntropyHistogram:
    """How often entropies occur, in a bounded size for any number of regions.

    The interval from 0 to ln(num_bins) is cut into `CELLS` equal cells; entropies of one cell count as equal, and those
    of exactly 0 have a cell of their own. Thresholds lie on edges between cells, so that the shares above them are
    exact.

    Attributes:
      edges: upper ends of the cells (CELLS + 1,) float32, included.
      counts: (CELLS + 1,) int64.
    """

    def __init__(self, num_bins: int, counts: np.ndarray | None = None):
        self.edges = np.linspace(0, math.log(num_bins), CELLS + 1, dtype=np.float32)
        self.counts = np.zeros(CELLS + 1, np.int64) if counts is None else counts

    def add(self, entropies: np.ndarray) -> None:
        """Count entropies of any shape."""
        cells = np.minimum(np.searchsorted(self.edges, np.ravel(entropies)), CELLS)  # rounding may exceed the last edge
        self.counts += np.bincount(cells, minlength=CELLS + 1)

    @property
    def num_regions(self) -> int:
        return int(self.counts.sum())

    def threshold(self, share_above: float) -> float:
        """The entropy that this share exceeds, by the rule of `grains.entropy_thresholds`.

        Half-way between two cells wherever there is room; equal entropies stay together, below.
        """
        num_above = np.clip(np.rint(share_above * self.num_regions), 1, self.num_regions - 1)
        first_above = self.num_regions - int(num_above)
        below, above = np.searchsorted(np.cumsum(self.counts), [first_above - 1, first_above], side="right")
        return float(self.edges[(below + max(below, above - 1)) // 2])

    def share_above(self, threshold: float) -> float:
        """The share of entropies that exceed a threshold of this histogram."""
        cell = np.searchsorted(self.edges, np.float32(threshold))
        return int(self.counts[cell + 1 :].sum()) / self.num_regions

    def attainable_shares(self) -> list[tuple[float, float]]:
        """The intervals of shares that some threshold leaves above it; gaps of `MOVED` and less are passed over."""
        ends, shares = [0.0], self.counts / self.num_regions
        for cell in np.flatnonzero(self.counts > max(1, MOVED * self.num_regions))[::-1]:
            above = self.share_above(self.edges[cell])
            ends += [above, above + float(shares[cell])]
        return list(zip(ends[::2], [*ends[1::2], 1.0], strict=True))


def shares_above(ratios: Ratios) -> list[float]:
    """Shares of the grains 1 .. G-1 to the shares of regions above each threshold, as `grains.entropy_thresholds`."""
    return np.cumsum(check_ratios("fine_ratio", ratios)[::-1])[::-1].tolist()


def describe(histogram: EntropyHistogram, ratios: Ratios) -> Iterator[str]:
    """Lines about the shares that the grains really get, and which can be had where ties move one."""
    asked = check_ratios("fine_ratio", ratios)
    thresholds = [histogram.threshold(share) for share in shares_above(ratios)]
    above = [histogram.share_above(threshold) for threshold in thresholds]
    given = [share - finer for share, finer in zip(above, [*above[1:], 0.0], strict=True)]
    for g, (ratio, share, threshold) in enumerate(zip(asked, given, thresholds, strict=True), 1):
        yield f"grain {g}: {ratio:.3f} asked, {share:.3f} given, above {threshold:.4f} nats"
    tolerance = max(MOVED, 1 / histogram.num_regions)  # so few regions have no finer shares
    if any(abs(ratio - share) > tolerance for ratio, share in zip(asked, given, strict=True)):
        tie = np.argmax(histogram.counts)
        share = histogram.counts[tie] / histogram.num_regions
        shown = [  # rounded inwards, so that what is shown can be asked for
            f"{math.ceil(low * 1000) / 1000:.3f} to {math.floor(high * 1000) / 1000:.3f}"
            for low, high in histogram.attainable_shares()
            if high - low > MOVED
        ]
        what = "ratios" if len(asked) == 1 else "sums of the ratios from a grain on"
        yield (
            f"ties: {share:.3f} of the regions have entropy {histogram.edges[tie]:.3f}, and equal regions get equal "
            f"grains; {what} that can be had: {', '.join(shown) or 'none'}"
        )


# --- the measurement ---


class _Partial(NamedTuple):
    """The file of a measurement under way: what it is made from, what was counted, and the batch to go on with."""

    path: Path
    made_from: dict[str, Any]

    def read(self) -> tuple[np.ndarray | None, int]:
        """Counts and next batch; None and 0 where nothing was begun."""
        if not self.path.exists():
            return None, 0
        begin_anew = f"delete '{self.path}' to begin anew"
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                counts, next_batch = arrays["counts"], int(arrays["next_batch"])
                made_from = parse_json(str(arrays["made_from"]), "made_from")
            if counts.shape != (CELLS + 1,):
                raise ValueError("another number of cells")
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
            raise ValueError(f"'{self.path}' is no measurement to go on with; {begin_anew}") from None
        if (what := fingerprint.difference(made_from, self.made_from)) is not None:
            raise ValueError(f"{what} when the measurement in '{self.path}' was begun; give that, or {begin_anew}")
        return counts, next_batch

    def write(self, counts: np.ndarray, next_batch: int) -> None:
        data = io.BytesIO()
        np.savez(data, counts=counts, next_batch=next_batch, made_from=json.dumps(self.made_from))
        write_atomic(self.path, data.getvalue())


def measure_thresholds(
    out: str | os.PathLike,
    dataset: Dataset,
    calibration: Calibration,
    ratios: Sequence[Ratios] = (),
    save_seconds: float = 10.0,
) -> EntropyHistogram:
    """Measure the entropies of a split, with a progress bar, and write their quantiles.

    Beside `out` a file `<out>.partial` keeps what was counted until the end: an interrupted measurement goes on from
    it, and gives the same file.

    Args:
      out: the thresholds file, JSON.
      dataset: of the split. All of it is read once in order with the evaluation transform, by this process alone
        where others have shards of it; damaged images do not count.
      calibration: what `dataset` is made of, and how to measure it.
      ratios: shares of the grains, for which the file shall have thresholds beside those of `SHARES`.
      save_seconds: between two writes of what was counted.

    Raises:
      ValueError: ratios out of range, a measurement of something else begun in `out`, or fewer than two regions.
      OSError: `out` cannot be written, which is told at the start.
    """
    shares = sorted({*SHARES, *(share for one in ratios for share in shares_above(one))})
    out, dataset = local_path(out), dataset.in_order(sharded=False)
    made_from = {**calibration.record(), "batch size": dataset.batch_size, **fingerprint.of_dataset(dataset)}
    partial = _Partial(out.with_name(f"{out.name}.partial"), made_from)
    counts, next_batch = partial.read()
    histogram = EntropyHistogram(calibration.num_bins, counts)
    partial.write(histogram.counts, next_batch)
    _count(histogram, dataset, calibration, partial, next_batch, save_seconds)
    checks.at_least("regions", histogram.num_regions, 2, fix="give more images, or smaller regions")
    quantiles = {_key(share): histogram.threshold(share) for share in shares}
    write_json(out, {"quantiles": quantiles, **calibration.record()})
    partial.path.unlink(missing_ok=True)
    return histogram


def _count(
    histogram: EntropyHistogram,
    dataset: Dataset,
    calibration: Calibration,
    partial: _Partial,
    next_batch: int,
    save_seconds: float,
) -> None:
    entropy, batches, saved = jax.jit(calibration.entropy), dataset.iterator(), time.monotonic()
    batches.set_state({"next_batch": next_batch})
    total, size = dataset.num_examples, dataset.batch_size
    with contextlib.closing(batches), Progress(total, next_batch * size, unit="image", title="entropy") as progress:
        for step in range(next_batch, dataset.steps_per_epoch):
            batch = next(batches)
            histogram.add(np.asarray(entropy(scale(batch["image"])))[batch["mask"]])
            progress.update(min(size, total - step * size))
            if time.monotonic() - saved >= save_seconds:
                partial.write(histogram.counts, step + 1)
                saved = time.monotonic()


def _key(share: float) -> str:
    return f"{share:.6g}"


# --- the file ---


def load_thresholds(
    path: str | os.PathLike, ratios: Ratios, calibration: Calibration, num_grains: int | None = None
) -> np.ndarray:
    """Read the thresholds with which the grains get their shares, from a file that was measured on the same data.

    Args:
      path: written by `measure_thresholds`.
      ratios: shares of the grains 1 .. G-1; a number stands for one grain.
      calibration: of the data at hand.
      num_grains: G, to check the number of ratios; None takes it from them.

    Returns:
      (G - 1,) float32, increasing, for `grains.route_by_entropy`.

    Raises:
      OSError: the file cannot be read.
      ValueError: ratios out of range; no thresholds file, or one of other data, with the fields that differ; a share
        that was not measured; thresholds that do not increase, as where ties leave a grain without regions.
    """
    ratios = check_ratios("fine_ratio", ratios, num_grains)
    path = local_path(path)
    record, again = read_json(path), "measure with python -m rq_jax.data.entropy"
    if record.keys() >= {"1", "99"} and "quantiles" not in record:
        raise ValueError(f"thresholds: '{path}' is a file of the original, which does not say of which data; {again}")
    if not isinstance(quantiles := record.get("quantiles"), dict):
        raise ValueError(f"thresholds: '{path}' is no thresholds file, it has no quantiles; {again}")
    expected = calibration.record()
    if differing := [name for name, value in expected.items() if record.get(name) != value]:
        what = ", ".join(
            f"{name} {_shown(record.get(name))} in place of {_shown(expected[name])}" for name in differing
        )
        raise ValueError(f"thresholds: '{path}' was measured on other data: {what}; {again}, or give the right file")
    keys = [_key(share) for share in shares_above(ratios)]
    for key in keys:
        number = quantiles.get(key)
        if type(number) is not float and not (type(number) is int and abs(number) < 2**31):  # JSON has any integer
            asked = ",".join(f"{ratio:g}" for ratio in ratios)
            raise ValueError(f"thresholds: '{path}' has none for the share {key}; {again} --fine_ratio={asked}")
    thresholds = np.array([quantiles[key] for key in keys], np.float32)
    check_thresholds(f"thresholds: '{path}' for the shares {', '.join(keys)}", thresholds)
    return thresholds


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else quoted(value)[1:-1]


# --- the command line ---


def _tuple_of(kind: type, example: str) -> Callable[[str], tuple]:
    """A parser of numbers with commas between them, for `type=` of argparse."""

    def parse(text: str) -> tuple:
        try:
            return tuple(map(kind, text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not allowed; give {example}") from None

    return parse


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rq_jax.data.entropy", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", required=True, help="the thresholds file to write")
    add("--name", required=True, help="as data.name")
    add("--data_dir", help="as data.data_dir")
    add("--split", default="train", help="a split of the dataset (default: train)")
    add(
        "--image_size",
        type=_tuple_of(int, "256, or 192,256"),
        default=(256,),
        help="pixels on a side, or height,width (default: 256)",
    )
    add("--transform", default="resize_center_crop", help="as data.eval_transform (default: resize_center_crop)")
    add("--patch_size", type=int, default=16, help="pixels on a side of a region (default: 16)")
    add("--bins", default="full", help="full, or legacy as the original before July 2023 (default: full)")
    add(
        "--fine_ratio",
        type=_tuple_of(float, "0.5, or 0.3,0.3"),
        action="append",
        help="as model.fine_ratio, one for each grain above 0, as 0.3,0.3; may be given again (default: 0.5). The file "
        "has every hundredth besides",
    )
    options = parser.parse_args(arguments)
    try:
        _measure(options)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on\n")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(" ".join(str(error).split()))


def _measure(options: argparse.Namespace) -> None:
    asked = options.fine_ratio or [(0.5,)]
    for ratios in asked:
        check_ratios("--fine_ratio", ratios)
    settings = {name: getattr(options, name) for name in ("split", "transform", "image_size", "patch_size", "bins")}
    calibration = Calibration(data=options.name, images=0, **settings)  # how many, an open dataset knows
    dataset = make_dataset(
        split=options.split, train=False, name=options.name, data_dir=options.data_dir, batch_size=_BATCH_SIZE,
        image_size=calibration.image_size, eval_transform=options.transform,
    )  # fmt: skip
    calibration = dataclasses.replace(calibration, images=dataset.num_examples)
    histogram = measure_thresholds(options.out, dataset, calibration, asked)
    side, seen = options.patch_size, histogram.edges[np.flatnonzero(histogram.counts)]
    num_read = histogram.num_regions * side**2 // math.prod(np.broadcast_to(calibration.image_size, 2).tolist())
    damaged = f" ({dataset.num_examples - num_read} damaged)" * (num_read < dataset.num_examples)
    print(
        f"{dataset.num_examples} images{damaged}, {histogram.num_regions} regions of {side} x {side} pixels: entropy "
        f"{seen[0]:.3f} to {seen[-1]:.3f} nats"
    )
    for ratios in asked:
        for line in describe(histogram, ratios):
            print(line)
    print(f"thresholds: {options.out}")


if __name__ == "__main__":
    main()

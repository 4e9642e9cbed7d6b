"""Show what would be read of a dataset, before anybody trains on it.

python -m rq_jax.data.look twemoji
python -m rq_jax.data.look ~/cats            # a folder of images, of parquet files or of tars
python -m rq_jax.data.look imagenet2012 --data_dir=~/tensorflow_datasets --split=validation --out=look.png
"""

import argparse
import collections
import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rq_jax.data.images import decode_image
from rq_jax.data.listing import list_files, list_images
from rq_jax.data.sources import Records, open_records
from rq_jax.files import local_path
from rq_jax.settings.text import quoted

SHOWN_SIZE, COLUMNS = 96, 8
_NUM_NAMED = 8  # classes, reasons or damaged images in a line


class Sample(NamedTuple):
    """An image that was read; `image` is None if it could not be, for the reason in `text`."""

    index: int
    image: np.ndarray | None
    label: int | None
    text: str | None


def open_first(
    name: str, split: str | None, data_dir: str | None, label_key: str | None, text_key: str | None
) -> tuple[Records, dict[str, str | None]]:
    """Open a dataset by name, or a folder by what lies in it, with the first label and caption that it has.

    Returns:
      The records, and the settings of `make_dataset` that they were opened with.

    Raises:
      FileNotFoundError, ValueError: as `open_records`.
    """
    if data_dir is None and local_path(name).exists():
        name, data_dir = _kind_of(local_path(name)), name
    plain = _open_any(name, split, data_dir)
    if split is None:
        split = next(iter(plain.split_counts)) if "train" not in plain.split_counts else "train"
    labels = [label_key] if label_key else [*plain.label_keys[:1], None]
    texts = [text_key] if text_key else [*plain.text_keys[:1], None]
    tries = [
        dict(name=name, data_dir=data_dir, split=split, label_key=label, text_key=text)
        for label, text in itertools.product(labels, texts)
    ]
    for settings in tries[:-1]:
        with contextlib.suppress(FileNotFoundError):  # another split has labels or captions, this one has not
            return open_records(**settings), settings
    return open_records(**tries[-1]), tries[-1]


def _open_any(name: str, split: str | None, data_dir: str | None) -> Records:
    """Open a dataset to see what it has; one without a training split is opened as a whole."""
    try:
        return open_records(name, split or "train", data_dir)
    except (FileNotFoundError, ValueError):
        if split is not None or name not in ("folder", "parquet", "webdataset"):
            raise
        return open_records(name, "all", data_dir)


def _kind_of(path: Path) -> str:
    """`data.name` of a file, or of a folder by what there is most of: tables of numbers often lie beside tars."""
    kinds = {".tar": "webdataset", ".parquet": "parquet"}
    if not path.is_dir():
        return kinds.get(path.suffix.lower(), "folder")
    num_images = len(list_images(path).paths)
    counts = {name: len(list_files(path, (suffix,), "").paths) for suffix, name in kinds.items()}
    return next((name for name, count in counts.items() if count and count >= num_images), "folder")


def read_samples(records: Records, count: int) -> list[Sample]:
    """Read examples from all over a split, evenly spaced."""
    samples = []
    for index in np.unique(np.linspace(0, len(records) - 1, count).round().astype(int)).tolist():
        try:
            encoded, label, text = records.read(index)
            samples.append(Sample(index, decode_image(encoded, 3), label, text))
        except (OSError, ValueError) as error:
            samples.append(Sample(index, None, None, str(error)))
    return samples


def describe(records: Records, settings: dict[str, str | None], samples: Sequence[Sample]) -> Iterator[str]:
    """Lines about a dataset: settings, splits, classes, captions, sizes, what is passed over, damage."""
    given = {key: f"data.{key}={value}" for key, value in settings.items() if value is not None}
    keys = " or ".join(given[key] for key in ("label_key", "text_key") if key in given)
    yield " ".join(part for part in (given["name"], given.get("data_dir"), keys) if part)
    yield "splits: " + ", ".join(f"{split} {count}" for split, count in records.split_counts.items())
    yield from _describe_keys(records, settings)
    whole = [sample for sample in samples if sample.image is not None]
    if whole:
        sizes = np.array([sample.image.shape[:2] for sample in whole])
        low, middle, high = (np.quantile(sizes, q, axis=0).astype(int) for q in (0, 0.5, 1))
        aspects = sizes[:, 1] / sizes[:, 0]
        yield (
            f"sizes of {len(whole)} images (height x width): {_size(low)} to {_size(high)}, median {_size(middle)}; "
            f"width / height {aspects.min():.2f} to {aspects.max():.2f}"
        )
    if texts := [sample.text for sample in whole if sample.text is not None]:
        words = [len(text.split()) for text in texts]
        yield f"captions of {min(words)} to {max(words)} words, such as {quoted(texts[0])}"
    if listing := getattr(records, "listing", None):
        yield listing.describe()
    if records.incomplete:
        reasons = collections.Counter(records.incomplete.values()).most_common(_NUM_NAMED)
        yield "count as damaged: " + ", ".join(f"{count} ({reason})" for reason, count in reasons)
    for sample in [sample for sample in samples if sample.image is None][:_NUM_NAMED]:
        yield f"damaged: {records.locate(sample.index)}: {sample.text}"


def _describe_keys(records: Records, settings: dict[str, str | None]) -> Iterator[str]:
    for what, keys in (("label_key", records.label_keys), ("text_key", records.text_keys)):
        named = ", ".join(quoted(key)[1:-1] for key in keys[:_NUM_NAMED]) or "none"
        yield f"data.{what}: {settings[what] or 'unset'}; allowed are {named}"
    if records.class_names is not None:
        names = ", ".join(quoted(name, 40)[1:-1] for name in records.class_names[:_NUM_NAMED])
        more = ", ..." if len(records.class_names) > _NUM_NAMED else ""
        yield f"classes: {len(records.class_names)} ({names}{more})"


def _size(size: np.ndarray) -> str:
    return f"{size[0]} x {size[1]}"


def draw_sheet(records: Records, samples: Sequence[Sample]) -> np.ndarray:
    """The images with their classes or captions below, uint8 HWC."""
    from rq_jax.data.transforms import ImageTransform
    from rq_jax.report import grids

    transform = ImageTransform("resize_center_crop", (SHOWN_SIZE, SHOWN_SIZE))
    shown = [sample for sample in samples if sample.image is not None]
    names = dict(enumerate(records.class_names or ()))
    captions = [quoted(names.get(sample.label, sample.text or ""), 60)[1:-1] for sample in shown]
    return grids.captioned_grid(np.stack([transform(sample.image) for sample in shown]), captions, COLUMNS)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rq_jax.data.look", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", help="a dataset as data.name, or a folder of images, parquet files or tars")
    add("--data_dir", help="as data.data_dir")
    add("--split", help="the split to read (default: train, or the first)")
    add("--label_key", help="as data.label_key (default: the first that there is)")
    add("--text_key", help="as data.text_key (default: the first that there is)")
    add("--num_images", type=int, default=32, help="images to read and to show")
    add("--out", default="look.png", help="the sheet of images to write")
    options = parser.parse_args(arguments)
    try:
        if options.num_images < 1:
            raise ValueError(f"--num_images: {options.num_images} must be at least 1")
        opened = options.name, options.split, options.data_dir, options.label_key, options.text_key
        records, settings = open_first(*opened)
        out, root = local_path(options.out), getattr(records, "root", None)
        if root is not None and out.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"--out: '{out}' would become one of the images; give a file outside of '{root}'")
        samples = read_samples(records, options.num_images)
        for line in describe(records, settings, samples):
            print(line)
        if any(sample.image is not None for sample in samples):
            from rq_jax.report import grids

            grids.save_png(out, draw_sheet(records, samples))
            print(f"sheet: {out}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    logging.getLogger("rq_jax.data").setLevel(logging.ERROR)  # what is told elsewhere is printed here
    main()

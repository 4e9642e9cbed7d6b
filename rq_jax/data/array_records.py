"""Writing of a prepared TFDS dataset in ArrayRecord, without TensorFlow.

    <data_dir>/<name>/1.0.0/dataset_info.json, features.json, <name>-<split>.array_record-00000-of-00012 ...

Each file appears when it is whole, so an interrupted call resumes at the first missing file.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rq_jax.data.tfrecord import make_example
from rq_jax.files import RunLock, atomic_path, local_path, read_json, write_json
from rq_jax.report.progress import Progress

VERSION = "1.0.0"
PLAN = ".plan.json"  # settings of the call that began a dataset
IMAGES_PER_FILE = 10_000


class Images(Protocol):
    """Encoded images of one split, read in order.

    May have `names`, a checksum of the names of the images in their order, by which a resumed call notices that the
    source changed; `label_name`, if the label is not to be called "label"; and `more_texts`, names of the texts that
    follow the caption of each image.
    """

    class_names: tuple[str, ...] | None
    has_text: bool

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[tuple]:
        """Image, label, caption and further texts of images start..stop."""


def write(
    splits: Mapping[str, Images],
    name: str,
    data_dir: str | os.PathLike,
    pictures_per_file: int = IMAGES_PER_FILE,
) -> Path:
    """Write a prepared dataset, or the files of it that are missing.

    Args:
      splits: split name -> images.
      name: of the dataset, "<name>" or "<name>/<config>".
      data_dir: directory of TFDS datasets.
      pictures_per_file: images in a file, at least 1; the same in every call for one dataset.

    Returns:
      Directory of the dataset: open it by `name` and `data_dir`.

    Raises:
      ValueError: a name or number out of range, or files of an earlier call with other settings.
    """
    if pictures_per_file < 1:
        raise ValueError(f"--pictures_per_file: {pictures_per_file} must be at least 1")
    family, *configs = name.split("/")  # a config may begin with a digit, as that of an image size does
    words = [family, *(config and f"_{config}" for config in configs)]
    if not all(word.isidentifier() and word == word.lower() for word in words) or len(configs) > 1:
        raise ValueError(f"--name: '{name}' is no dataset name; use small letters, digits and _, as in my_faces")
    target, base = local_path(data_dir) / name / VERSION, family
    counts = {split: len(images) for split, images in splits.items()}
    ranges = {split: _ranges(count, pictures_per_file) for split, count in counts.items()}
    first = next(iter(splits.values()))
    plan = {
        "pictures": counts, "pictures_per_file": pictures_per_file, "classes": first.class_names,
        "captions": first.has_text,
    }  # fmt: skip
    if all(hasattr(images, "names") for images in splits.values()):
        plan["names"] = {split: images.names for split, images in splits.items()}
    with (
        RunLock(target, "--name", "another --name"),
        Progress(sum(counts.values()), unit="image", title=name) as progress,
    ):
        _check_plan(target, plan)
        for rest in target.glob(".*.partial"):  # of a call that was killed
            rest.unlink()
        for split, images in splits.items():
            for i, (start, stop) in enumerate(ranges[split]):
                path = target / f"{base}-{split}.array_record-{i:05d}-of-{len(ranges[split]):05d}"
                _write_file(path, images, start, stop, progress)
    _write_metadata(target, base, first, ranges)
    return target


def _write_file(path: Path, images: Images, start: int, stop: int, progress: Progress) -> None:
    """Write images start..stop as one ArrayRecord file, unless an earlier call did."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if path.exists():
        progress.update(stop - start)
        return
    with atomic_path(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        names = _names(images)
        for image in images.read(start, stop):
            writer.write(make_example(_features(names, *image)))
            progress.update(1)
        writer.close()


def _write_metadata(target: Path, base: str, first: Images, ranges: Mapping[str, list[tuple[int, int]]]) -> None:
    """Write dataset_info.json and features.json, which make the files a prepared dataset."""
    import tensorflow_datasets as tfds

    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[stop - start for start, stop in parts],
            num_bytes=sum(path.stat().st_size for path in target.glob(f"{base}-{split}.array_record-*")),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=target, dataset_name=base, split=split, filetype_suffix="array_record",
                template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            ),
        )
        for split, parts in ranges.items()
    ]  # fmt: skip
    tfds.folder_dataset.write_metadata(
        data_dir=target,
        features=tfds.features.FeaturesDict(_tfds_features(first)),
        split_infos=split_infos,
        check_data=False,
    )


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _check_plan(target: Path, plan: dict[str, Any]) -> None:
    """Record the plan of a dataset, or check that it is the one of the call that began it."""
    path, plan = target / PLAN, json.loads(json.dumps(plan))
    earlier = read_json(path) if path.exists() else {}
    if name := next((name for name in plan if name in earlier and earlier[name] != plan[name]), None):
        if name == "names":
            raise ValueError(
                f"--source: its images differ from those with which '{target}' was begun; delete that, or choose "
                "another --name"
            )
        raise ValueError(
            f"--data_dir: '{target}' was begun with {name} {earlier.get(name)}, not {plan[name]}; delete it, or choose "
            "another --name"
        )
    write_json(path, plan, indent=None)


def _names(images: Images) -> tuple[str, list[str]]:
    """Names of the label and of the texts."""
    texts = ["caption"] * images.has_text
    return getattr(images, "label_name", "label"), [*texts, *getattr(images, "more_texts", ())]


def _features(names: tuple[str, list[str]], image: bytes, label: int | None, *texts: str | None) -> dict[str, Any]:
    label_name, text_names = names
    features: dict[str, Any] = {"image": image}
    if label is not None:
        features[label_name] = label
    return features | {name: text.encode() for name, text in zip(text_names, texts, strict=False) if text is not None}


def _tfds_features(images: Images) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    label_name, text_names = _names(images)
    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3))}
    if images.class_names is not None:
        features[label_name] = tfds.features.ClassLabel(names=list(images.class_names))
    return features | {name: tfds.features.Text() for name in text_names}

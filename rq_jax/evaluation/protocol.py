"""On which images, and where, something is measured."""

import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import TEXT_TOKENIZER, LoadedModel, local_directory
from rq_jax.data import Dataset, fingerprint, make_dataset
from rq_jax.devices import hosts
from rq_jax.evaluation.stamps import digest_of
from rq_jax.files import local_path
from rq_jax.settings.text import quoted

# Settings of the config section `data` that decide which images there are, and what conditions come with them.
IMAGE_SETTINGS = ("name", "data_dir", "train_split", "validation_split", "eval_transform", "image_size", "channels")
CONDITION_SETTINGS = ("label_key", "text_key", "text_length")

_NO_CODE = (":(exclude)results", ":(exclude)benchmarks/results")  # what a measurement writes itself


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """The images that figures are taken on.

    Attributes:
      settings: of `make_dataset`, choosing the data set, as JSON holds them.
      split: of the held-out images: "validation", "train", or a split's own name.
      batch_size: images of one compiled program, over all processes.
      part: (index, count) of the part of every batch that this process reads, as `sharding.batch_part` gives it.
    """

    settings: dict[str, Any]
    split: str = "validation"
    batch_size: int = 32
    part: tuple[int, int] = (0, 1)
    _opened: dict[str, Dataset] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def open(self, split: str) -> Dataset:
        """A split, once through and in order, its images as bytes; it is opened once."""
        if split not in self._opened:
            index, count = self.part
            shard = {"batch_size": self.batch_size, "shard_index": index, "shard_count": count}
            self._opened[split] = make_dataset(**self.settings, split=split, train=False, **shard).as_bytes()
        return self._opened[split]

    def split_name(self, split: str) -> str:
        """A split's own name; of a list of names in a file, that of the file."""
        own = {"train": "train_split", "validation": "validation_split"}.get(split)
        name = self.settings.get(own, split) if own else split
        return Path(name).name if str(name).endswith(".txt") else name

    def fields(self, split: str, positions: np.ndarray | None = None) -> dict[str, Any]:
        """The fields of the images of a split in the protocol of a figure; every process has to ask.

        Args:
          split: as `open` takes it.
          positions: of the images that counted; None: all but those that turned out damaged, once all were read.
        """
        dataset = self.open(split)
        entries = {name: value for name, value in fingerprint.of_dataset(dataset).items() if name != "file times"}
        if positions is None:
            damaged = sorted(set(hosts.rows_of_all(np.array(sorted(dataset.source.damaged), np.int64)).tolist()))
        else:
            damaged = np.setdiff1d(np.arange(dataset.num_examples), positions).tolist()
        counted = {"images": dataset.num_examples - len(damaged), "ids": digest_of([entries, damaged])}
        return {**self.transform_fields(split), **counted}

    def transform_fields(self, split: str) -> dict[str, Any]:
        """Those of `fields` that are known before any image is read: which split, and how its images are made."""
        return {
            "data": self.settings["name"], "split": self.split_name(split),
            "crop": self.settings.get("eval_transform", "resize_center_crop"),
            "resize": "Pillow, bilinear, antialiased", "size": list(self.settings["image_size"]),
            "channels": self.settings["channels"],
        }  # fmt: skip

    def held_out(self) -> Dataset:
        """The held-out images."""
        return self.open(self.split)

    def training(self) -> Dataset:
        """The training images, without random transforms."""
        return self.open("train")


def even_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """The smallest batch size, `batch_size` or above, that all devices of a mesh share evenly."""
    return -(-batch_size // mesh.size) * mesh.size


def trained_on(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Of the data set that a model was trained on, those of the named settings that are set."""
    data = config.get("data") or {}
    return {name: data[name] for name in names if data.get(name) is not None}


def moved(config: dict[str, Any], name: str | None, data_dir: str | None) -> dict[str, Any]:
    """A model's config with its data set in another directory, unless it was trained on one of another name."""
    data = config.get("data") or {}
    has_moved = bool(name and data_dir) and data.get("name") == name
    return {**config, "data": {**data, "data_dir": data_dir}} if has_moved else config


def condition_settings(config: dict[str, Any], directory: str) -> dict[str, Any]:
    """Settings of `make_dataset` for the conditions of a transformer, with its text tokenizer in its directory."""
    settings = trained_on(config, CONDITION_SETTINGS)
    if "text_key" in settings:
        settings["text_tokenizer"] = str(local_directory(directory) / TEXT_TOKENIZER)
    return settings


def told_settings(settings: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """Settings as a record has them: a text tokenizer by its model, which may lie in a cache of this machine."""
    is_of_text = "text_tokenizer" in settings
    return {**settings, "text_tokenizer": f"{directory}/{TEXT_TOKENIZER}"} if is_of_text else dict(settings)


def image_settings(
    config: dict[str, Any] | None,
    image_shape: tuple[int, int, int],
    directory: str,
    name: str | None = None,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Settings that choose the images to measure on.

    Args:
      config: of a trained model, whose data set is the default; None without a model.
      image_shape: (H, W, C).
      directory: of the model or the samples, for the error.
      name: of another data set.
      data_dir: its directory.

    Raises:
      ValueError: no data set is named.
    """
    data = trained_on(config or {}, IMAGE_SETTINGS)
    if name:
        data = {"name": name, "eval_transform": data.get("eval_transform", "resize_center_crop")}
    if data_dir:
        data["data_dir"] = data_dir
    if "name" not in data:
        raise ValueError(f"--data_name: unset, and '{directory}' names no data set; give one")
    return data | {"image_size": list(image_shape[:2]), "channels": image_shape[2]}  # a list, as JSON gives it back


def shared_settings(tokenizers: Mapping[str, LoadedModel], name: str | None, data_dir: str | None) -> dict[str, Any]:
    """Settings that choose the images to measure on, of the one shape that all tokenizers have.

    Args:
      tokenizers: by directory.
      name, data_dir: of another data set than that of the first tokenizer.

    Raises:
      ValueError: images of several shapes, or no data set is named.
    """
    shapes = {each: (*loaded.model.image_shape, loaded.model.in_channels) for each, loaded in tokenizers.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"--checkpoint: images of several shapes {shapes}; compare tokenizers of one shape")
    directory, shape = next(iter(shapes.items()))
    return image_settings(tokenizers[directory].config, shape, directory, name, data_dir)


def trained_elsewhere(config: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The training images of a model where they are others than those of the data set that it is measured on.

    Args:
      config: of the model; one that names no data set is taken to fit.
      settings: see `EvaluationData`.
    """

    def which(data: dict[str, Any]) -> dict[str, str]:
        chosen = {name: str(data[name]) for name in ("name", "data_dir", "train_split") if data.get(name) is not None}
        if "data_dir" in chosen:
            chosen["data_dir"] = str(local_path(chosen["data_dir"]).absolute())
        return {"train_split": "train", **chosen}

    own, measured = which(config.get("data") or {}), which(settings)
    if "name" not in own or own == measured:
        return None
    return ", ".join(f"data.{name} {quoted(value)}" for name, value in own.items() if measured.get(name) != value)


def environment(root: Path) -> dict[str, Any]:
    """Versions, date, commit of the checkout at `root`, and what else decides how fast a program is."""
    import flax
    import jaxlib

    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git(root, "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *_NO_CODE)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        # Where programs are read back from a cache, compile_seconds says little.
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
    }


def _git(root: Path, *args: str) -> str | None:
    """Output of git; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

"""Conditions that samples are drawn with: classes or texts."""

from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on


def choose_conditions(
    loaded: LoadedModel,
    directory: str,
    num_images: int,
    seed: int = 0,
    *,
    classes: str | None = None,
    classes_of: str | None = None,
    prompts: list[str] | None = None,
    prefix: str | None = None,
    carried: np.ndarray | None = None,
) -> tuple[np.ndarray | None, list[str]]:
    """The conditions that images take in turn, by id.

    Args:
      loaded: a transformer.
      directory: that it was loaded from, with its text tokenizer.
      num_images: images from id 0 on.
      seed: of classes that are drawn.
      classes: numbers or names, separated by commas.
      classes_of: a split whose classes are taken, in order.
      prompts: texts, which a text-conditional model needs.
      prefix: file of an earlier run, for the error.
      carried: its conditions (m, 1), which are kept unless others are given.

    Returns:
      The conditions (m, U), None for an unconditional model, and their m names. Without any given, classes are as
      frequent as in the training set if the model's config has their counts, else all classes come in turn.

    Raises:
      ValueError: classes or prompts that the model does not take or know.
    """
    model = loaded.model
    kind = "unconditional" if not model.is_conditional else "class" if model.cond_length == 1 else "text"
    for flag, value, needed in (
        ("--classes", classes, "class"),
        ("--classes_of", classes_of, "class"),
        ("--prompt", prompts, "text"),
    ):
        if value and kind != needed:
            raise ValueError(f"{flag}: {value} is for a {needed}-conditional model, this one is {kind}; leave it out")
    if kind == "unconditional":
        return None, [""]
    if kind == "text":
        return _tokens(prompts, directory, model.cond_length), prompts
    V = model.cond_vocab_size
    names, counts = _known_classes(loaded.config, V, directory)
    if classes_of:
        numbers = classes_of_split(loaded.config, classes_of)
    elif classes:
        numbers = [class_number(text.strip(), names) for text in classes.split(",")]
    elif carried is not None:
        numbers = _carried_classes(carried, V, prefix)
    elif counts:
        numbers = draw_classes(counts, seed, num_images)
    else:
        numbers = list(range(V))
    return np.array(numbers)[:, None], [names[i] for i in numbers]


def _known_classes(config: dict[str, Any], num_classes: int, directory: str) -> tuple[list[str], list[int] | None]:
    """Names of the classes, their numbers where the config has none; and their counts in the training set."""
    names, counts = config.get("class_names") or list(map(str, range(num_classes))), config.get("class_counts")
    for entry, values in (("class_names", names), ("class_counts", counts)):
        if values and len(values) != num_classes:
            raise ValueError(
                f"'{Path(directory) / 'config.json'}': {len(values)} {entry} for a model of {num_classes} classes; "
                f"restore it from a copy, or take {entry} out"
            )
    return names, counts


def class_number(text: str, names: list[str]) -> int:
    """The number of a class, given as a number or by name.

    Raises:
      ValueError: no such class.
    """
    lower = [name.lower() for name in names]
    number = lower.index(text.lower()) if text.lower() in lower else int(text) if text.isdigit() else -1
    if not 0 <= number < len(names):
        raise ValueError(f"--classes: '{text}' is no class; allowed are 0..{len(names) - 1} and {', '.join(names)}")
    return number


def draw_classes(counts: list[int], seed: int, num_images: int) -> list[int]:
    """Classes of image ids 0..num_images - 1, as frequent as `counts`; that of an id depends on the seed alone."""
    return np.random.default_rng(seed).choice(len(counts), num_images, p=np.divide(counts, sum(counts))).tolist()


def classes_of_split(config: dict[str, Any], split: str) -> list[int]:
    """Classes of a split of the data set that a model was trained on, in order.

    Args:
      config: of the model.
      split: "train", "validation" or a split's own name.

    Raises:
      ValueError: the model names no data set, or none with classes.
    """
    settings = trained_on(config, (*IMAGE_SETTINGS, "label_key"))
    if not {"name", "label_key"} <= settings.keys():
        raise ValueError(f"--classes_of: {split} needs the data set of the model, which names none; give --classes")
    batches = EvaluationData(settings, batch_size=256).open(split).iterator()
    return [int(label) for batch in batches for label in batch["cond"][batch["mask"], 0]]


def _tokens(prompts: list[str] | None, directory: str, length: int) -> np.ndarray:
    from rq_jax.data import load_tokenizer

    if not prompts:
        raise ValueError("--prompt: missing, this model draws images of a text; give one or more")
    return load_tokenizer(Path(directory) / "text_tokenizer.json", length)(prompts)


def _carried_classes(carried: np.ndarray, num_classes: int, prefix: str | None) -> list[int]:
    if carried.size != len(carried) or not ((carried >= 0) & (carried < num_classes)).all():
        raise ValueError(f"--prefix: '{prefix}' holds no classes 0..{num_classes - 1}; give --classes")
    return carried.flatten().tolist()

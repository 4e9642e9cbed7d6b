"""What is said of the images of a data set: their class, all their attributes, and those that the caption names."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from rq_jax.data.sources import open_records
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.files import parse_json
from rq_jax.settings.text import quoted

ATTRIBUTES, NAMED = "attributes", "named"  # texts of a record: a JSON object of the first, a JSON list of names

Combination = tuple[str, str, str, str, str]  # class, attribute and value, another attribute and its value


class Description(NamedTuple):
    """What is said of an image.

    Attributes:
      label: name of its class.
      attributes: attribute -> value.
      named: the attributes that its caption names.
      caption: the text.
    """

    label: str
    attributes: dict[str, str]
    named: tuple[str, ...] = ()
    caption: str = ""

    def combinations(self, names: Iterable[str]) -> list[Combination]:
        """Two by two, the values of these attributes."""
        values = self.attributes
        return [(self.label, a, values[a], b, values[b]) for a, b in combinations(sorted(names), 2)]


def label_key_of(data: EvaluationData) -> str:
    """The feature that holds the class of an image, the first where there are several.

    Raises:
      ValueError: the data set has no classes, or says nothing of attributes.
    """
    records = data.training().source.records
    missing = [name for name in (ATTRIBUTES, NAMED) if name not in records.text_keys]
    if missing or not records.label_keys:
        lacks = ", ".join([*missing, *([] if records.label_keys else ["class"])])
        raise ValueError(
            f"--data_name: {quoted(data.settings['name'])} has no {lacks}; give a data set with classes and the texts "
            f"{ATTRIBUTES} and {NAMED}, such as avatars"
        )
    return records.label_keys[0]


def of_training(data: EvaluationData, label_key: str) -> dict[int, Description]:
    """Class and attributes of the training images, by position.

    Raises:
      ValueError: attributes that are no JSON object.
    """
    return _read(data, "train", label_key, data.training().num_examples, (ATTRIBUTES,))


def of_captions(data: EvaluationData, split: str, label_key: str, at_most: int) -> dict[int, Description]:
    """What is said of the images of a split with their captions, by position.

    Args:
      data: with the setting `text_key` of the captions.
      split: as `EvaluationData.open` takes it.
      label_key: of the classes.
      at_most: so many images, spread evenly over the split.

    Raises:
      ValueError: attributes that are no JSON object, or names that are no JSON list of them.
    """
    return _read(data, split, label_key, at_most, (ATTRIBUTES, NAMED, data.settings["text_key"]))


def seen_combinations(training: Iterable[Description]) -> frozenset[Combination]:
    """All that some training image shows together."""
    return frozenset(pair for one in training for pair in one.combinations(one.attributes))


def _read(
    data: EvaluationData, split: str, label_key: str, at_most: int, keys: Sequence[str]
) -> dict[int, Description]:
    """Descriptions by position, without those of records that cannot be read, as their images cannot."""
    where = data.settings["name"], data.split_name(split), data.settings.get("data_dir"), label_key
    first, *others = (open_records(*where, key) for key in keys)
    dataset, found = data.open(split).at_most(at_most), {}
    positions = dataset.position_of(np.arange(dataset.num_examples)).tolist()
    for i in counted(positions, len(positions), 1, f"attributes of {split}"):
        try:
            (_, label, text), *texts = (records.read(i) for records in (first, *others))
        except (OSError, ValueError):
            continue
        place = first.locate(i)
        attributes = {name: str(value) for name, value in parse_json(text, f"{ATTRIBUTES} of {place}").items()}
        found[i] = Description(first.class_names[label], attributes, *_named(place, attributes, *texts))
    return found


def _named(place: str, attributes: Mapping[str, str], *texts: tuple[Any, Any, str]) -> tuple[Any, ...]:
    """The attributes that a caption names, and the caption, where they were read."""
    if not texts:
        return ()
    (*_, named), (*_, caption) = texts
    names = parse_json(named, f"{NAMED} of {place}", list)
    if unknown := [name for name in names if name not in attributes]:
        raise ValueError(f"{NAMED} of {place}: {quoted(unknown[0])} is none of its {ATTRIBUTES}")
    return tuple(names), caption

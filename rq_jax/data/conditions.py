"""Conditions: whether a data set has the one that a model takes, and which of them to show."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rq_jax.data.pipeline import Dataset


def check_condition(model: Any, dataset: Dataset, data: Mapping[str, Any]) -> None:
    """The data set has the condition that the model takes.

    Raises:
      ValueError: naming both sides.
    """
    label_key, text_key = data["label_key"], data["text_key"]
    V, U = model.cond_vocab_size, model.cond_length
    if not model.is_conditional:
        if label_key or text_key:
            raise ValueError(
                f"data.label_key {label_key}, data.text_key {text_key}: an unconditional model "
                "(model.cond_vocab_size 1) reads neither; leave them unset"
            )
    elif text_key:
        if dataset.vocab_size > V or dataset.text_length != U:
            raise ValueError(
                f"model.cond_vocab_size {V} and cond_length {U} do not fit captions of {dataset.text_length} tokens "
                f"out of {dataset.vocab_size}; set them to these"
            )
    elif not label_key:
        raise ValueError(f"data.label_key: unset, but the model takes one of {V} conditions; set it or data.text_key")
    elif dataset.num_classes != V or U != 1:
        raise ValueError(
            f"model.cond_vocab_size {V} and cond_length {U} do not fit the {dataset.num_classes} classes of "
            f"'{label_key}'; set them to {dataset.num_classes} and 1"
        )


def shown_conditions(model: Any, dataset: Dataset, count: int) -> np.ndarray | None:
    """Conditions (count, U) of a sample grid: all classes in turn, or the first captions of the set; else None."""
    if not model.is_conditional:
        return None
    if model.cond_length > 1:
        return dataset.examples(np.arange(count) % dataset.num_examples)["cond"]
    return (np.arange(count) % model.cond_vocab_size)[:, None]

"""A run before its first step: the data it reads, and what it needs against what the devices have."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from rq_jax import checkpoint
from rq_jax.data import Splits
from rq_jax.devices.memory import device_bytes
from rq_jax.settings.text import quoted
from rq_jax.training.settings import memory_remedies

# A fast core with 512-bit vectors, so that a run takes longer than what is said of it.
CPU_FLOPS = 1e11
MAX_CPU_DAYS = 2.0
MAX_CPU_STEP_SECONDS = 30.0  # a model for accelerators, however short the run


def describe_data(settings: Mapping[str, Any], data: Splits) -> str:
    """One line: the data set, its sizes and its conditions.

    Args:
      settings: the config section `data`.
      data: the splits that it opens.
    """
    where = f" in {quoted(settings['data_dir'])}" if settings.get("data_dir") else ""
    sizes = f"{data.train.num_examples} images to train on, {data.validation.num_examples} held out"
    if settings.get("text_key"):
        conditions = f"captions of {quoted(settings['text_key'])}"
    elif data.train.num_classes is None:
        conditions = "no classes"
    else:
        conditions = f"{data.train.num_classes} classes of {quoted(settings['label_key'])}"
    return f"data: {quoted(settings['name'])}{where}, {sizes}, {conditions}"


def shortages(recipe: Any, batch_size: int, total_steps: int) -> list[str]:
    """Lines about a run that its devices are too small for; nothing is computed.

    Args:
      recipe: a `training.loop.Recipe` with the `abstract_state` of those in this package.
      batch_size: images of a step, over all devices.
      total_steps: of the run.
    """
    lines, device = [], jax.local_devices()[0]  # another process's tells nothing
    if device.platform == "cpu":
        step_seconds = (recipe.flops_per_image or 0.0) * batch_size / (CPU_FLOPS * _cores() * jax.process_count())
        days = step_seconds * total_steps / 86400
        if days > MAX_CPU_DAYS or step_seconds > MAX_CPU_STEP_SECONDS:
            lines.append(
                f"TOO SLOW: JAX has only CPUs here, on which a step takes {step_seconds:,.0f} s or more and this run "
                f"{days:,.1f} days; start it on an accelerator (make setup DEVICE=cuda12, cuda13 or tpu installs its "
                "jax), or append ,quicktest to the preset"
            )
    if (there := _memory(device)) and (needed := device_bytes(recipe.abstract_state())) > there:
        lines.append(
            f"TOO LARGE: the state alone takes {needed / 2**30:.1f} GiB of a device, which has {there / 2**30:.1f}; "
            f"try, the cheapest first: {'; '.join(memory_remedies(recipe, batch_size))}"
        )
    return lines


def unlike_starts(recipe: Any) -> list[str]:
    """Lines about weights to start from that were trained on other codes or other words than those of the run.

    Args:
      recipe: of either stage, with `init_from` set.
    """
    tokenizer, text_tokenizer = getattr(recipe, "tokenizer", None), getattr(recipe, "text_tokenizer", None)
    directory, lines = checkpoint.local_directory(recipe.init_from), []
    theirs = checkpoint.tokenizer_of(directory)
    if tokenizer is not None and theirs != checkpoint.fingerprint(tokenizer.variables):
        what = "without its tokenizer" if theirs is None else f"trained on the codes of another tokenizer, {theirs}"
        lines.append(
            f"init_from: '{recipe.init_from}' is {what}; what it knows of codes holds where both codebooks are alike, "
            "and else is learned anew"
        )
    words = directory / checkpoint.TEXT_TOKENIZER
    if text_tokenizer is not None and words.is_file() and not text_tokenizer.is_saved_as(words):
        lines.append(
            f"init_from: '{recipe.init_from}' reads words by another text tokenizer; to go on from what it knows of "
            f"words, set data.text_tokenizer to '{words}'"
        )
    return lines


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory(device: Any) -> int | None:
    """Bytes of a device; None for a CPU, and where they are unknown."""
    return (device.memory_stats() or {}).get("bytes_limit")

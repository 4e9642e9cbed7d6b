"""`config.json` of a run or model directory: written atomically; its shape and sizes are checked where it is read."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from rq_jax import models
from rq_jax.checkpoint.hub import local_directory
from rq_jax.files import local_path, read_json, write_json
from rq_jax.settings.text import quoted

CONFIG = "config.json"
# Kinds of entries that are read without their recipe; None stands for none.
_KINDS = {"model": dict, "data": dict, "sample": dict, "class_names": list, "class_counts": list, "tokenizer": str}
_FILTER = ("temperature", "top_k", "top_p")
_SAMPLE = (*_FILTER, "guidance", *(f"position_{name}" for name in _FILTER))
# Layers and blocks take time to build; sizes beyond these are mistakes, and would take hours or all memory.
_MOST_DEPTH = 256
_MOST_LEVELS = 16
# By how the name of a setting ends; the first that fits counts.
_MOST = {
    "num_res_blocks": 100, "num_layers": 100, "_layers": 1000, "code_depth": _MOST_DEPTH, "num_grains": _MOST_LEVELS,
}  # fmt: skip
_LARGEST = 2**24
_MOST_CELLS = 2**20  # of a code grid


def write_config(directory: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Write the resolved config of a run or model directory, atomically; only the first process writes."""
    if jax.process_index() == 0:
        write_json(local_path(directory) / CONFIG, config)


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """Read the resolved config of a run or model directory, or of an address of the Hub.

    Raises:
      FileNotFoundError: the directory has no config.json.
      ValueError: its config.json is not readable, names no model of this package, or has entries of another shape; or
        the address leads nowhere.
    """
    path = local_directory(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"'{directory}' is no run directory: it has no {CONFIG}; give the --workdir of a training run"
        )
    config = read_json(path)
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise ValueError(f"'{directory}' is no run directory: its {CONFIG} names no model of ours")
    for problem in _problems(config):
        raise ValueError(f"'{path}': {problem}")
    return config


def build_model(directory: str | os.PathLike, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a config from `read_config`, and the shapes of its variables.

    Raises:
      ValueError: the settings make no model.
    """
    try:
        model = models.create(**config["model"])
        return model, models.abstract_variables(model)
    except MemoryError:
        raise
    except Exception as error:  # of Flax and JAX too, for sizes that do not fit one another
        raise ValueError(f"'{Path(directory) / CONFIG}' makes no model: {quoted(error, 400)}") from error


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config, each as part of a message."""
    for name, kind in _KINDS.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            yield f"'{name}' is a {type(value).__name__}, not a {kind.__name__}"
            return
    yield from _sample_problems(config.get("sample") or {})
    yield from _model_problems(config["model"])
    if not all(isinstance(name, str) for name in config.get("class_names") or ()):
        yield "'class_names' holds what is no text"
    counts = config.get("class_counts") or ()
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or (counts and not sum(counts)):
        yield "'class_counts' holds what is no count"


def _sample_problems(sample: Mapping[str, Any]) -> Iterator[str]:
    for name, value in sample.items():
        if name not in _SAMPLE:
            yield f"{quoted(name)} in 'sample' is unknown; allowed are {', '.join(_SAMPLE)}"
        values = value if isinstance(value, list) else [value]
        if not all(each is None or type(each) in (int, float) for each in values):
            yield f"{quoted(name)} in 'sample' is {quoted(value)}, which is no number"


def _model_problems(model: Mapping[str, Any]) -> Iterator[str]:
    for name, value in model.items():
        values = value if isinstance(value, list) else [value]
        most = next((most for end, most in _MOST.items() if name.endswith(end)), _LARGEST)
        if any(type(each) in (int, float) and not abs(each) <= most for each in values):
            yield f"{quoted(name)} of the model is {quoted(value)}; at most {most} is read"
        if len(values) > (_MOST_LEVELS if name.endswith("width_multipliers") else _MOST_DEPTH):
            yield f"{quoted(name)} of the model has {len(values)} entries, which no model has"
        if name == "code_shape" and all(type(each) is int for each in values):
            *grid, depth = values or [0]
            if depth > _MOST_DEPTH:
                yield f"'code_shape' of the model has a depth of {quoted(depth)}; at most {_MOST_DEPTH} is read"
            if math.prod(grid) > _MOST_CELLS:
                yield f"'code_shape' of the model is {quoted(value)}; at most {_MOST_CELLS} cells are read"

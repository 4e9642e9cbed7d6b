"""The thresholds of an entropy router: given as a file, or measured on the training split before the first step."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from rq_jax import checkpoint, models
from rq_jax.data import Splits, load_thresholds, measure_thresholds
from rq_jax.data.entropy import Calibration, describe
from rq_jax.devices import hosts
from rq_jax.files import local_path, write_atomic

FILE = "thresholds.json"  # in the run directory

logger = logging.getLogger(__name__)


def provisional_model(settings: Mapping[str, Any]) -> nn.Module:
    """The model of the config section `model`, of which everything is checked but thresholds that are yet to come."""
    return models.create(**with_stand_ins(settings))


def with_stand_ins(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config section `model` with thresholds in place of those that are yet to come.

    They decide neither shapes nor costs.
    """
    if settings.get("thresholds", ()) is not None or settings.get("router", "entropy") != "entropy":
        return dict(settings)
    count = settings.get("num_grains", 2)
    stand_ins = tuple(map(float, range(1, count))) if isinstance(count, int) else ()
    return {**settings, "thresholds": stand_ins}


def check(config: Mapping[str, Any], model: nn.Module) -> None:
    """The config gives thresholds once, and to a router that reads them.

    Raises:
      ValueError: a file of thresholds for another kind of model, or beside thresholds set by hand.
    """
    if not config.get("thresholds"):
        return
    name = f"thresholds: '{config['thresholds']}'"
    if model.entropy_settings is None:
        raise ValueError(f"{name} is for an entropy router, which this model does not have; leave it out")
    if config["model"].get("thresholds") is not None:
        raise ValueError(f"{name} and model.thresholds {config['model']['thresholds']} are both set; set one of them")


def calibration_of(config: Mapping[str, Any], model: Any, data: Splits) -> Calibration:
    """What the thresholds of a run are measured on: its training split, with the transform of its evaluation."""
    settings = config["data"]
    return Calibration(
        data=settings["name"], split=settings["train_split"], transform=settings["eval_transform"],
        image_size=model.image_shape, images=data.ordered.num_examples, **model.entropy_settings,
    )  # fmt: skip


def of_file(path: str | os.PathLike, model: Any, calibration: Calibration) -> tuple[float, ...]:
    """The thresholds of a file that give the model's grains their shares, as process 0 reads them.

    Raises:
      ValueError: as `data.load_thresholds`, or a file that process 0 cannot read; on every process.
    """
    return tuple(hosts.done_by_first_process(lambda: _read(path, model, calibration)))


def of_run(
    workdir: str | os.PathLike, given: str | None, model: Any, calibration: Calibration, data: Splits
) -> tuple[float, ...]:
    """The thresholds of a run whose config has none, from its file, or else measured.

    Args:
      workdir: of the run; its file is made where there is none, and read, by process 0 while the others wait.
      given: the file that the config names, in place of the run's own.
      model: with the grains and their shares.
      calibration: of the training split.
      data: of the run.

    Raises:
      ValueError: as `data.load_thresholds` and `data.measure_thresholds`; on every process.
    """
    if given:
        return of_file(given, model, calibration)
    return tuple(hosts.done_by_first_process(lambda: _measured(Path(workdir) / FILE, model, calibration, data)))


def _read(path: str | os.PathLike, model: Any, calibration: Calibration) -> tuple[float, ...]:
    try:
        return tuple(map(float, load_thresholds(path, model.shares, calibration, model.num_grains)))
    except OSError as error:
        raise ValueError(
            f"thresholds: '{path}' cannot be read ({error.strerror}); give a file of python -m rq_jax.data.entropy, or "
            "leave it out to measure them"
        ) from error


def _measured(path: Path, model: Any, calibration: Calibration, data: Splits) -> tuple[float, ...]:
    if not path.is_file():
        histogram = measure_thresholds(path, data.ordered, calibration, [model.shares])
        for line in describe(histogram, model.shares):
            logger.info("thresholds: %s", line)
    return _read(path, model, calibration)


def bind(workdir: str | os.PathLike, given: str | None, thresholds: tuple[float, ...], is_fresh: bool) -> None:
    """Check that a resumed run keeps its thresholds, and copy a given file into the run directory.

    Raises:
      ValueError: other thresholds, naming both, or a file that process 0 cannot copy; on every process.
    """
    if not is_fresh:
        before = checkpoint.read_config(workdir)["model"].get("thresholds")
        if before is not None and not np.array_equal(before, thresholds):
            raise ValueError(
                f"model.thresholds: {list(thresholds)} differ from {before}, with which the run in '{workdir}' was "
                "started; give those, or a new --workdir"
            )
    if given:
        source, path = local_path(given), Path(workdir) / FILE
        if source.absolute() != path.absolute():
            hosts.done_by_first_process(lambda: write_atomic(path, source.read_bytes()))

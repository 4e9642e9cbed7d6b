"""The one training loop: resume, step, log, evaluate, save, stop. It knows no model.

A script hands it a state, a jitted step, an evaluation and the data.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint.model_dir import write_config
from rq_jax.checkpoint.saver import Checkpointer
from rq_jax.devices import sharding
from rq_jax.devices.memory import explained_memory
from rq_jax.files import RunLock
from rq_jax.report.progress import Progress
from rq_jax.training import monitor
from rq_jax.training.evaluation import NOTHING_EVALUATED, Evaluations, Validation
from rq_jax.training.log import METRICS_FILE, MetricWriter, Rate, _StepLog
from rq_jax.training.signals import StopSignal

logger = logging.getLogger(__name__)

# Of the settings of the loop.
_LEAST = {
    "total_steps": 1,
    "log_every_steps": 1,
    "evaluate_every_steps": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
    "profile_first_step": 1,
    "keep_every_steps": 0,
    "early_stopping_evaluations": 0,
    "max_skipped_steps": 0,
    "hang_timeout_seconds": 0,
    "profile_steps": 0,
}


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """The config section `loop`, its durations resolved to steps.

    Attributes:
      total_steps: updates of the whole run.
      log_every_steps, evaluate_every_steps, checkpoint_every_steps: intervals; the last step has all three.
      keep_checkpoints: how many of the newest checkpoints stay.
      keep_every_steps: checkpoints of multiples of this stay too; 0: none do.
      ema_decay: of the weight average, 0 for none.
      keep_best: the weights with the lowest "validation_loss" stay, as `best`.
      early_stopping_evaluations: evaluations without a better "validation_loss" after which the run stops, and the best
        weights stay; 0: off.
      use_latent_cache: stage 2 reads latents computed once, from disk.
      max_skipped_steps: steps in a row whose loss or gradient is not finite, and which change nothing, before the run
        stops; 0: never.
      hang_timeout_seconds: of one step, or one batch of an evaluation, after which the process dumps its stacks and
        ends with exit code 1; the first, which compiles, has 20 times as long. 0: off.
      profile_first_step, profile_steps: which steps are traced into `<workdir>/profile`; 0 steps: none.
    """

    total_steps: int
    log_every_steps: int = 100
    evaluate_every_steps: int = 1000
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 2
    keep_every_steps: int = 0
    ema_decay: float = 0.0
    keep_best: bool = False
    early_stopping_evaluations: int = 0
    use_latent_cache: bool = False
    max_skipped_steps: int = 20
    hang_timeout_seconds: float = 0.0
    profile_first_step: int = 10
    profile_steps: int = 0

    def __post_init__(self):
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"loop.{name}: {getattr(self, name)} must be at least {least}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay: {self.ema_decay} is outside [0, 1); 0 keeps no average")
        if self.keep_every_steps % self.checkpoint_every_steps:
            raise ValueError(
                f"loop.keep_every_steps: {self.keep_every_steps} is no multiple of loop.checkpoint_every_steps "
                f"{self.checkpoint_every_steps}, so that nothing would be kept; set it to a multiple, or to 0"
            )


def run(
    *,
    workdir: str,
    config: dict[str, Any],
    title: str,
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    dataset: Any,
    mesh: jax.sharding.Mesh,
    settings: LoopSettings,
    summarize: Callable[[dict[str, np.ndarray]], dict[str, float]],
    validation: Validation,
    strict: bool = False,
    flops_per_image: float | None = None,
    dtype: str = "float32",
    remedies: Sequence[str] = (),
    compiles_at: Container[int] = (),
    is_locked: bool = False,
) -> Any:
    """Train until `settings.total_steps`, going on from the newest checkpoint of `workdir`.

    Args:
      workdir: run directory.
      config: the resolved config, written beside the checkpoints once the newest of them has proved to fit it.
      title: shown in front of the progress bar.
      state: a `TrainState` at step 0, placed on the mesh; its buffers are donated.
      train_step: (state, batch) -> (state, metrics), jitted with the state donated.
      dataset: has `iterator()`, whose batches are placed on the mesh, and `batch_size`.
      mesh: the devices.
      settings: intervals and durations.
      summarize: means of the metrics since the last log point -> named scalars.
      validation: what is measured on held-out examples.
      strict: stop at a damaged checkpoint instead of going on from the one before.
      flops_per_image: of the model, forward and backward, for the arithmetic rates in the log.
      dtype: of the model, whose peak the utilization is of.
      remedies: settings that need less memory, the cheapest first.
      compiles_at: after how many steps `train_step` compiles another program.
      is_locked: the caller holds `locked(workdir)`.

    Returns:
      The last state.

    Raises:
      ValueError: another process trains in `workdir`, its checkpoint does not fit, or none is whole.
      SaveFailed: the last state could not be written.
      OutOfMemory: a step does not fit a device.
      NotFinite: `settings.max_skipped_steps` steps in a row were not finite.
      SystemExit: with 128 + signal number after SIGINT (130) or SIGTERM (143); the current step is saved, and an
        evaluation that is cut short is made up for by the next start.
    """
    is_first = jax.process_index() == 0
    writer, iterator = MetricWriter(workdir, enabled=is_first), dataset.iterator()
    with (
        contextlib.nullcontext() if is_locked else locked(workdir),
        contextlib.closing(writer),
        contextlib.closing(iterator),
        Checkpointer(workdir, settings.keep_checkpoints, settings.keep_every_steps, strict) as checkpointer,
        StopSignal() as stop,
        monitor.HangGuard(settings.hang_timeout_seconds) as hang,
        monitor.Profiler(workdir, settings.profile_first_step, settings.profile_steps) as profiler,
    ):
        host = dict(NOTHING_EVALUATED)
        if checkpointer.latest_step is not None:
            state, restored = checkpointer.restore(state)
            host |= restored
            iterator.set_state(_data_position(host, dataset.batch_size))
            logger.info("%s: resumed from step %d in %s", title, int(state.step), workdir)
        write_config(workdir, config)
        step = int(state.step)
        # A start that made up for it may have been killed before it could note that.
        writer.truncate_after(step, without="validation_loss" if host["owes_evaluation"] else None)
        meter, finite = monitor.Meter(flops_per_image, dtype), monitor.FiniteGuard(workdir, settings.max_skipped_steps)
        log = _StepLog(writer, summarize, Rate(dataset.batch_size, step), meter)
        metrics, batch = None, None
        progress = Progress(settings.total_steps, step, "step", title, enabled=is_first)
        evaluations = Evaluations(validation, settings, host, writer, checkpointer, progress, stop, hang, title)
        with progress, explained_memory(state, remedies):
            if host["owes_evaluation"]:
                evaluations.make_up(state, step)
                log.restart(step)
            stopping = host["owes_evaluation"]
            while step < settings.total_steps and not host["stopped"] and not stopping:
                if step in compiles_at or metrics is None:
                    hang.expect_compilation()
                hang.arm()
                profiler.before(step + 1)
                previous, previous_batch = metrics, batch
                with meter.waiting():
                    batch = next(iterator)
                state, metrics = train_step(state, sharding.put_batch(mesh, batch))
                log.add(metrics)
                step, shown = step + 1, {}
                # Waiting for the step before this one keeps the device busy and the queue short.
                jax.block_until_ready(previous)
                if previous is not None:
                    finite.check(step - 1, previous, previous_batch)
                last = step == settings.total_steps
                if step % settings.log_every_steps == 0 or last:
                    shown = log.write(step)
                hang.disarm()
                profiler.after(metrics)
                progress.update(1, **{name: shown[name] for name in ("loss", "images_per_second") if name in shown})
                if step % settings.evaluate_every_steps == 0 or last:
                    evaluations.run(state, step)
                    log.restart(step)
                stopping = host["owes_evaluation"] or stop.poll()
                if step % settings.checkpoint_every_steps == 0 or last or stopping or host["stopped"]:
                    checkpointer.save(state, {**host, "data": iterator.get_state(), "batch_size": dataset.batch_size})
                    log.restart(step)
        checkpointer.wait()
        is_done = step == settings.total_steps and not host["owes_evaluation"]
        if stopping and not is_done and not host["stopped"]:
            logger.warning(
                "%s: stopped by signal %d at step %d; run the same command to go on", title, stop.signal, step
            )
            raise SystemExit(128 + stop.signal)
    return state


def locked(workdir: str) -> contextlib.AbstractContextManager:
    """Around all that is written to a run directory: the first process keeps other trainers away.

    Raises:
      ValueError: on entering, where another one is at work there.
    """
    return RunLock(workdir) if jax.process_index() == 0 else contextlib.nullcontext()


def _data_position(host: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Where the data goes on: at the very next picture, or with another batch size at the next batch after it."""
    before = host.get("batch_size", batch_size)
    if before == batch_size:
        return host["data"]
    seen = host["data"]["next_batch"] * before
    if missed := -seen % batch_size:
        words = "data.batch_size: %d was %d; %d pictures are passed over, up to a multiple of it"
        logger.warning(words, batch_size, before, missed)
    return {**host["data"], "next_batch": -(-seen // batch_size)}


def finish(workdir: str, curves: list[str]) -> None:
    """Draw the curves of a run and say where its pictures are; on the first host."""
    if jax.process_index() != 0:
        return
    directory = Path(workdir)
    curves.curves(directory / METRICS_FILE, curves, directory / "pictures" / "curves.png")
    print(f"pictures: {directory / 'pictures'}")

"""Checkpoints of a run: saved in the background, sealed with checksums, restored from the newest whole one.

    checkpoints/<step>/  params, ema_params, model_state, discriminator, training (optimizers, step, key),
                         host (data position ...), manifest.json
    best/<step>/         weights of the best evaluation, with loop.keep_best or early stopping
    damaged/             checkpoints that a resume skipped
    amended.json         host record that replaces the one in the newest checkpoint
    */.sealing-<step>    marker of a checkpoint that is being written

Orbax writes a checkpoint and moves it into place, but keeps no checksums. So each is sealed afterwards: a marker is
created before Orbax starts; when Orbax is done, a thread reads names and shapes back, writes and syncs the manifest,
deletes the marker, and only then deletes the checkpoints that the new one replaces. A crash in between leaves a marker
without a manifest: such a checkpoint never counts and is deleted at the next start. All of it may lie in an object
store, `gs://bucket/run`, whose objects appear whole and whose directories cannot be renamed.
"""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import manifest
from rq_jax.checkpoint.items import check_fits, plain_path, reading, shapes_of_items
from rq_jax.devices import hosts
from rq_jax.files import is_remote, move_tree, read_json, remove_tree, run_path, write_atomic, write_json

CHECKPOINTS, BEST, DAMAGED, AMENDED = "checkpoints", "best", "damaged", "amended.json"
DISCRIMINATOR = "discriminator"
_STEP = re.compile("0|[1-9][0-9]{0,17}")  # as Orbax writes it
_DELETING, _SEALING = ".deleting-", ".sealing-"

logger = logging.getLogger(__name__)


class SaveFailed(OSError):
    """The newest state could not be written."""


class Checkpointer:
    """Saves and restores the states of one run directory; as a context manager it waits for pending saves.

    States and best weights are two stores with an Orbax manager each: retention is by store, and the best weights must
    outlive the checkpoint of the same step.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 1, keep_every: int = 0, strict: bool = False):
        """Open the stores of a run directory.

        Args:
          directory: of the run, on this machine or in an object store.
          keep: number of newest checkpoints to keep, at least 1; an older one is deleted when a newer one is sealed.
          keep_every: also keep the checkpoints at multiples of this many steps; 0 keeps none of them.
          strict: raise at a damaged checkpoint instead of resuming from the one before.
        """
        self._root, self._strict = run_path(directory), strict
        self._store = _Store(self._root, CHECKPOINTS, keep, keep_every)
        self._best_store: _Store | None = None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None; waits for a pending save."""
        self._store.join()
        return max(steps_of(self._store.directory), default=None)

    def save(self, state: Any, host: dict[str, Any]) -> None:
        """Start to save a `TrainState` under its step; no-op if that checkpoint exists.

        A save that fails in the background is logged; earlier checkpoints stay, and the next save tries again.

        Args:
          state: to save.
          host: host-side record of the run, JSON-able: data position, evaluation history.
        """
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                (self._root / AMENDED).unlink(missing_ok=True)  # belongs to the previous checkpoint
        self._store.save(int(state.step), split(state), host)

    def amend(self, step: int, host: dict[str, Any]) -> None:
        """Replace the host record of the checkpoint of `step`, for `restore`.

        A full disk is ignored: the run then works the record out again after a restart.
        """
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                write_json(self._root / AMENDED, {"step": step, "host": host}, indent=None)

    def _amended(self, step: int) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            amended = read_json(self._root / AMENDED)
            if amended["step"] == step:
                return dict(amended["host"])
        return {}

    def save_best(self, state: Any) -> bool:
        """Save the weights alone as the best so far and wait; returns whether every process has them on disk."""
        if self._best_store is None:
            self._best_store = _Store(self._root, BEST, 1)
        step = int(state.step)
        self._best_store.join()
        # Orbax skips a step that is not above the newest. A run that was killed and resumed from an earlier checkpoint
        # may have left such a one, which would then stay the best.
        self._best_store.discard(old for old in steps_of(self._best_store.directory) if old >= step)
        self._best_store.save(step, {name: tree for name, tree in split(state).items() if name != "training"})
        return not self._best_store.has_failed()

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """Restore the newest whole checkpoint; damaged ones above it are moved aside with a warning.

        Args:
          state: gives structure, shapes and shardings, and its pace, which no checkpoint holds.

        Returns:
          (state, host record).

        Raises:
          ValueError: names or shapes differ from those of `state`; or all checkpoints are damaged, or, with `strict`,
            the newest.
        """
        import orbax.checkpoint as ocp

        step, items = self._newest_whole(), split(state)
        path = self._store.directory / str(step)
        hint = "go on with the config that the run was started with or give a new --workdir"
        check_fits(path, shapes_of_items(items), hint)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        with reading(path):
            restored = self._store.manager.restore(step, args=ocp.args.Composite(**args, host=ocp.args.JsonRestore()))
        trees = {name: restored[name] for name in items}
        training = trees.pop("training")
        return state.replace(**training, **trees), {**restored["host"], **self._amended(step)}

    def _newest_whole(self) -> int:
        """Step of the newest whole checkpoint, the same on every process; moves the damaged ones above it aside."""
        directory = self._store.directory
        steps = sorted(steps_of(directory), reverse=True)
        newest = newest_whole(directory, self._strict)
        if newest is None:
            raise ValueError(
                f"'{directory}': no checkpoint is whole, of steps {steps}; restore one from a copy, "
                "or give a new --workdir"
            )
        if jax.process_index() == 0:
            for step in (step for step in steps if step > newest):
                _move_into(directory / str(step), self._root / DAMAGED)
        self._store.manager.reload()
        return newest

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
          SaveFailed: it could not be written.
        """
        store = self._store
        store.join()
        if store.failed is not None:
            raise SaveFailed(
                f"checkpoint: the state of step {store.failed[0]} could not be written to '{store.directory}' "
                f"({store.failed[1]}); steps {steps_of(store.directory)} are there; free the disk and run the same "
                "command again"
            )

    def _stores(self) -> Iterator["_Store"]:
        yield self._store
        if self._best_store is not None:
            yield self._best_store

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        for store in self._stores():
            store.close()


class _Store:
    """Checkpoints of one directory, written and sealed one at a time."""

    def __init__(self, root: Path, name: str, keep: int, keep_every: int = 0):
        self.directory, self._keep, self._keep_every = root / name, keep, keep_every
        self._plain_path = contextlib.ExitStack()
        self.failed: tuple[int, BaseException] | None = None
        self._thread: threading.Thread | None = None
        if jax.process_index() == 0:  # before the manager opens, where all processes synchronise
            for path in self.directory.glob(f"{_DELETING}*"):
                with contextlib.suppress(OSError):
                    remove_tree(path)
            self._drop_unsealed()
        self.manager = self._open()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        # Retention is done here: Orbax does not know which checkpoints are sealed.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, create=True, cleanup_tmp_directories=True)
        root, name = self.directory.parent, self.directory.name
        root.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(self._plain_path.enter_context(plain_path(root)) / name, options=options)
        # Orbax would pass step numbers to JAX's preemption sync point, `training.signals` passes a count of polls.
        # Processes stop together only if all of them pass numbers of one sequence, so Orbax must not ask.
        manager.reached_preemption = lambda step: False
        return manager

    def save(self, step: int, items: dict[str, Any], host: dict[str, Any] | None = None) -> None:
        import orbax.checkpoint as ocp

        has_failed = self.has_failed()  # waits for the save before
        if hosts.of_first_process("saved" if step in steps_of(self.directory) else ""):
            return
        try:
            if has_failed:  # an Orbax manager raises its failure again at the next save
                self.close()
                self.manager = self._open()
            self.failed = None
            if jax.process_index() == 0:
                write_atomic(self.directory / f"{_SEALING}{step}", b"")
            args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
            args |= {} if host is None else {"host": ocp.args.JsonSave(host)}
            self.manager.save(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises several types for a failing disk
            self._fail(step, error)
            return
        shapes = shapes_of_items(items)  # now: the next training step takes the arrays away
        self._thread = threading.Thread(target=self._seal, args=(step, shapes), name=f"seal-{step}")
        self._thread.start()

    def has_failed(self) -> bool:
        """Whether the last save failed on any process; waits for the save and for the other processes."""
        self.join()
        if jax.process_count() == 1:
            return self.failed is not None
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.bool_(self.failed is not None))))

    def _seal(self, step: int, shapes: dict[str, Any]) -> None:
        """Wait for Orbax, read names and shapes back, write the manifest, delete what this checkpoint replaces.

        Runs in a thread.
        """
        try:
            self.manager.wait_until_finished()
            if jax.process_index() == 0:
                # Files that are there byte for byte are no checkpoint yet: Orbax must find its arrays in them.
                check_fits(self.directory / str(step), shapes, "it was written otherwise")
                manifest.write(self.directory / str(step))
                (self.directory / f"{_SEALING}{step}").unlink()
                self._make_room()
        except Exception as error:  # an exception of a thread is lost; the next save reports this one
            self._fail(step, error)

    def _fail(self, step: int, error: BaseException) -> None:
        self.failed = step, error
        with contextlib.suppress(OSError):
            if jax.process_index() == 0:
                self._drop_unsealed()
        logger.error(
            "the state of step %d could not be written to '%s' (%s: %s); steps %s are there; the run goes on and tries "
            "again at the next checkpoint",
            step, self.directory, type(error).__name__, error, steps_of(self.directory),
        )  # fmt: skip

    def _drop_unsealed(self) -> None:
        """Delete what failed or killed saves left, which would keep a full disk full."""
        for marker in self.directory.glob(f"{_SEALING}*"):
            path = self.directory / marker.name.removeprefix(_SEALING)
            if path.exists() and not (path / manifest.MANIFEST).exists():
                remove_tree(path)
            marker.unlink()

    def _make_room(self) -> None:
        """Delete the sealed checkpoints that the policy does not keep; unsealed ones do not count towards it."""
        steps = steps_of(self.directory)
        sealed = [step for step in steps if (self.directory / str(step) / manifest.MANIFEST).exists()]
        retained = set(sealed[-self._keep :])
        if self._keep_every:
            retained |= {step for step in sealed if step % self._keep_every == 0}
        self.discard(step for step in sealed if step not in retained)

    def discard(self, steps: Iterator[int]) -> None:
        """Delete checkpoints: one that is half deleted must not pass for a checkpoint."""
        for step in list(steps):
            if jax.process_index() == 0:
                self._delete(step)
        self.manager.reload()

    def _delete(self, step: int) -> None:
        path = self.directory / str(step)
        if not is_remote(path):  # a renaming needs no room on a full disk
            doomed = self.directory / f"{_DELETING}{step}"
            move_tree(path, doomed)
            remove_tree(doomed)
            return
        marker = self.directory / f"{_SEALING}{step}"
        write_atomic(marker, b"")
        (path / manifest.MANIFEST).unlink(missing_ok=True)
        remove_tree(path)
        marker.unlink()

    def join(self) -> None:
        """Wait until the pending save has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        self.join()
        with self._plain_path, contextlib.suppress(Exception) if self.failed else contextlib.nullcontext():
            self.manager.close()


def steps_of(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, ascending, without those that are being written or deleted."""

    def is_written(path: Path) -> bool:
        return (path / manifest.MANIFEST).exists() or not path.with_name(f"{_SEALING}{path.name}").exists()

    return sorted(int(path.name) for path in directory.glob("*") if _STEP.fullmatch(path.name) and is_written(path))


def newest_whole(
    directory: Path, strict: bool = False, reads: Callable[[Path], Collection[str]] | None = None
) -> int | None:
    """Newest step whose files agree with their manifest; None if there is none.

    Of several processes, all of which must ask, the first one verifies and the others follow: each might see another
    state of a network file system.

    Args:
      directory: of the checkpoints.
      strict: raise where the newest is damaged.
      reads: path of a checkpoint -> its items that will be read; None: all. The contents of others are not verified.

    Raises:
      ValueError: the newest is damaged, and `strict` is set; on every process.
    """
    return hosts.done_by_first_process(lambda: _newest_whole(directory, strict, reads))


def _newest_whole(directory: Path, strict: bool, reads: Callable[[Path], Collection[str]] | None) -> int | None:
    for step in reversed(steps_of(directory)):
        path = directory / str(step)
        problems = manifest.problems(path, None if reads is None else reads(path))
        if not problems:
            return step
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        message = f"'{path}' is damaged: {problems[0]}{more}"
        if strict:
            raise ValueError(f"{message}; restore it from a copy, or leave out --strict to go on from the one before")
        logger.warning("%s; going on from the checkpoint before", message)
    return None


def split(state: Any) -> dict[str, Any]:
    """Split a `TrainState` into the items of a checkpoint; empty trees are left out."""
    fields = {name: getattr(state, name) for name in ("params", "ema_params", "model_state", DISCRIMINATOR)}
    training = {name: getattr(state, name) for name in ("step", "opt_state", "rng", "skipped_steps")}
    if state.discriminator_opt_state is not None:
        training["discriminator_opt_state"] = state.discriminator_opt_state
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)} | {"training": training}


def _move_into(path: Path, directory: Path) -> None:
    """Move a directory into another, under a name that is free there."""
    directory.mkdir(exist_ok=True)
    number = 0
    while (target := directory / f"{path.name}{f'-{number}' if number else ''}").exists():
        number += 1
    move_tree(path, target)

"""The states of a run on disk: saved in the background, sealed with checksums, restored from the newest that is whole.

Orbax writes; a checkpoint counts once its manifest stands beside what Orbax has moved into place.

    checkpoints/<step>/  params, ema_params, model_state, discriminator, training (optimizers, step, key),
                         host (data position ...), manifest.json
    best/<step>/         weights of the best evaluation, with loop.keep_best or early stopping
    damaged/             what a resume passed over
    amended.json         what the host learnt after the newest of them
    */.sealing-<step>    this one is being written; where no manifest follows, it never counts
"""

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import manifest
from rq_jax.checkpoint.model_dir import named_leaves
from rq_jax.files import write_atomic

CHECKPOINTS, BEST, DAMAGED, AMENDED = "checkpoints", "best", "damaged", "amended.json"
DISCRIMINATOR = "discriminator"
_DELETING, _SEALING = ".deleting-", ".sealing-"

logger = logging.getLogger(__name__)


class SaveFailed(OSError):
    """The newest state could not be written."""


class Checkpointer:
    """Saves and restores the states of one run directory; used as a context manager, it waits for pending saves."""

    def __init__(self, directory: str | os.PathLike, keep: int = 1, keep_every: int = 0, strict: bool = False):
        """Keep the newest `keep` checkpoints and every multiple of `keep_every` steps (0: none), and the one best.

        Args:
          directory: of the run.
          keep: at least 1; an older checkpoint goes only after a newer one is whole.
          keep_every: in steps.
          strict: stop at a damaged checkpoint instead of going on from the one before.
        """
        self._root, self._strict = Path(directory).absolute(), strict
        self._store, self._best_store = _Store(self._root / CHECKPOINTS, keep, keep_every), None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None; one that is being written is waited for."""
        self._store.join()
        return max(steps_of(self._store.directory), default=None)

    def save(self, state: Any, host: dict[str, Any]) -> None:
        """Start to save a `TrainState` under its step, with what the host knows (JSON). No-op if it is there.

        What goes wrong in the background is logged; the checkpoints before stay, and the next save tries again.
        """
        import orbax.checkpoint as ocp

        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                (self._root / AMENDED).unlink(missing_ok=True)  # it was of the checkpoint before
        self._store.save(int(state.step), {**_saving(split(state)), "host": ocp.args.JsonSave(host)})

    def amend(self, step: int, host: dict[str, Any]) -> None:
        """Note what the host has learnt since `step` was saved: `restore` gives it in the place of what was saved.

        On a full disk nothing is noted, and is found out again after the next start.
        """
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                write_atomic(self._root / AMENDED, json.dumps({"step": step, "host": host}).encode())

    def _amended(self, step: int) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            amended = json.loads((self._root / AMENDED).read_bytes())
            if amended["step"] == step:
                return dict(amended["host"])
        return {}

    def save_best(self, state: Any) -> bool:
        """Save the weights alone as the best so far, and wait for that: whether they are on disk, on every process."""
        if self._best_store is None:
            self._best_store = _Store(self._root / BEST, 1)
        step = int(state.step)
        self._best_store.join()
        # A step that is not above the newest would be passed over: one that a killed run left behind stayed the best.
        self._best_store.discard(old for old in steps_of(self._best_store.directory) if old >= step)
        items = {name: tree for name, tree in split(state).items() if name != "training"}
        self._best_store.save(step, _saving(items))
        return not self._best_store.has_failed()

    def restore(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest whole checkpoint in the structure and shardings of `state`, and what the host knew.

        Damaged ones that are newer are put aside, with a warning.

        Raises:
          ValueError: the checkpoint has other arrays than `state`; or it is damaged, and so are all before it, or
            `strict` is set.
        """
        import orbax.checkpoint as ocp

        step, items = self._find_whole(), split(state)
        hint = "go on with the config that the run was started with or give a new --workdir"
        check_fits(self._store.directory / str(step), items, hint)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._store.manager.restore(step, args=ocp.args.Composite(**args, host=ocp.args.JsonRestore()))
        trees = {name: restored[name] for name in items}
        training = trees.pop("training")
        return state.replace(**training, **trees), {**restored["host"], **self._amended(step)}

    def _find_whole(self) -> int:
        """The newest whole checkpoint, the same on every host; what is damaged above it is moved away."""
        steps, first = sorted(steps_of(self._store.directory), reverse=True), jax.process_index() == 0
        found = newest_whole(self._store.directory, self._strict) if first else None
        found = _of_first_process(-1 if found is None else found)
        found = None if found < 0 else found
        if found is None:
            raise ValueError(
                f"'{self._store.directory}': no checkpoint is whole, of steps {steps}; restore one from a copy, "
                "or give a new --workdir"
            )
        if first:
            for step in (step for step in steps if step > found):
                _move_into(self._store.directory / str(step), self._root / DAMAGED)
        self._store.manager.reload()
        return found

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

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
    """Checkpoints of one directory: one at a time is written, sealed, and then makes older ones superfluous."""

    def __init__(self, directory: Path, keep: int, keep_every: int = 0):
        self.directory, self._keep, self._keep_every = directory, keep, keep_every
        self.failed: tuple[int, BaseException] | None = None
        self._thread: threading.Thread | None = None
        if jax.process_index() == 0:  # before the manager, at whose opening the processes meet
            for path in directory.glob(f"{_DELETING}*"):
                shutil.rmtree(path, ignore_errors=True)
            self._drop_unsealed()
        self.manager = self._open()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        # Deleting is ours: Orbax does not know which checkpoints are sealed.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, create=True, cleanup_tmp_directories=True)
        manager = ocp.CheckpointManager(self.directory, options=options)
        # Orbax would ask JAX about a signal with the number of the step, where a run counts how often it has asked
        # (`hosts.Stop`): processes stop together only where all numbers are of one count.
        manager.reached_preemption = lambda step: False
        return manager

    def save(self, step: int, items: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp

        has_failed = self.has_failed()  # waits for the save before
        if _of_first_process(step in steps_of(self.directory)):
            return
        try:
            if has_failed:  # its manager still holds the failure
                self.close()
                self.manager = self._open()
            self.failed = None
            if jax.process_index() == 0:
                (self.directory / f"{_SEALING}{step}").touch()
            self.manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax tells of disks in many ways
            self._fail(step, error)
            return
        self._thread = threading.Thread(target=self._seal, args=(step,), name=f"seal-{step}")
        self._thread.start()

    def has_failed(self) -> bool:
        """Whether the last save failed for any process; waits for it, and for the other processes."""
        self.join()
        if jax.process_count() == 1:
            return self.failed is not None
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.bool_(self.failed is not None))))

    def _seal(self, step: int) -> None:
        """When a checkpoint is written: checksums, then room."""
        try:
            self.manager.wait_until_finished()
            if jax.process_index() == 0:
                manifest.write(self.directory / str(step))
                (self.directory / f"{_SEALING}{step}").unlink()
                self._make_room()
        except Exception as error:  # whatever it is, the training thread must hear of it
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
        """Delete what a save that failed or was killed left behind; it keeps a full disk full."""
        for marker in self.directory.glob(f"{_SEALING}*"):
            path = self.directory / marker.name.removeprefix(_SEALING)
            if path.exists() and not (path / manifest.MANIFEST).exists():
                shutil.rmtree(path)
            marker.unlink()

    def _make_room(self) -> None:
        """Delete what the policy does not keep; only sealed checkpoints count as kept."""
        is_sealed = lambda step: (self.directory / str(step) / manifest.MANIFEST).exists()  # noqa: E731
        sealed = [step for step in steps_of(self.directory) if is_sealed(step)]
        kept = set(sealed[-self._keep :])
        if self._keep_every:
            kept |= {step for step in sealed if step % self._keep_every == 0}
        self.discard(step for step in sealed if step not in kept)

    def discard(self, steps: Iterator[int]) -> None:
        """Delete checkpoints; one that is half deleted has another name."""
        for step in list(steps):
            if jax.process_index() == 0:
                doomed = self.directory / f"{_DELETING}{step}"
                os.rename(self.directory / str(step), doomed)
                shutil.rmtree(doomed)
        self.manager.reload()

    def join(self) -> None:
        """Until the save in the background has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        self.join()
        with contextlib.suppress(Exception) if self.failed else contextlib.nullcontext():
            self.manager.close()


def steps_of(directory: Path) -> list[int]:
    """The checkpoints in a directory, in order, but for those that are being written or deleted."""

    def is_written(path: Path) -> bool:
        return (path / manifest.MANIFEST).exists() or not path.with_name(f"{_SEALING}{path.name}").exists()

    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit() and is_written(path))


def newest_whole(directory: Path, strict: bool = False) -> int | None:
    """The newest step whose files are as they were written, None where there is none.

    Raises:
      ValueError: with `strict`, at the first that is damaged.
    """
    for step in reversed(steps_of(directory)):
        found = manifest.problems(directory / str(step))
        if not found:
            return step
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        message = f"'{directory / str(step)}' is damaged: {found[0]}{more}"
        if strict:
            raise ValueError(f"{message}; restore it from a copy, or leave out --strict to go on from the one before")
        logger.warning("%s; going on from the checkpoint before", message)
    return None


def _of_first_process(value: int) -> int:
    """What the first process says, on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def split(state: Any) -> dict[str, Any]:
    """The items of a checkpoint; what is empty is no item."""
    fields = {name: getattr(state, name) for name in ("params", "ema_params", "model_state", DISCRIMINATOR)}
    training = {name: getattr(state, name) for name in ("step", "opt_state", "rng", "skipped_steps")}
    if state.discriminator_opt_state is not None:
        training["discriminator_opt_state"] = state.discriminator_opt_state
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)} | {"training": training}


def check_fits(path: Path, items: dict[str, Any], hint: str) -> None:
    """Refuse a checkpoint with other arrays than the trees of `items`; the hint says what to do.

    Raises:
      ValueError: naming the array and both shapes.
    """
    import orbax.checkpoint as ocp

    handler = ocp.StandardCheckpointHandler()
    for item, tree in items.items():
        expected = shapes_of(tree)
        found = shapes_of(handler.metadata(path / item).tree) if (path / item).is_dir() else {}
        if expected != found:
            name = min(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(
                f"'{path}': '{item}/{name}' has shape {found.get(name)}, the config needs {expected.get(name)}; {hint}"
            )


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the leaves of a tree; keys are saved as their numbers."""

    def shape(leaf: Any) -> tuple[int, ...]:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape

    return {name: shape(leaf) for name, leaf in named_leaves(tree)}


def _saving(items: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    return {name: ocp.args.StandardSave(tree) for name, tree in items.items()}


def _move_into(path: Path, directory: Path) -> None:
    """Move a directory aside under a name of its own."""
    directory.mkdir(exist_ok=True)
    number = 0
    while (target := directory / f"{path.name}{f'-{number}' if number else ''}").exists():
        number += 1
    os.rename(path, target)

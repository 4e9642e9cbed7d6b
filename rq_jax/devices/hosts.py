"""Several processes as one run, over JAX's own distributed runtime: who they are, and when they stop together."""

import os
import re
from typing import Any

import jax

# Environments in which JAX finds the other processes by itself, and what says that there are others.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
_ADDRESSES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_MARKS = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS", "JOBSET_NAME")


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the other processes of a run, where there are any; before anything else touches a device.

    Without arguments JAX finds them in what Slurm, Open MPI, Kubernetes (JobSet) or a TPU pod say in the environment; a
    process that is alone needs nothing.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: of the run.
      process_id: of this one, 0..num_processes - 1.
      heartbeat_seconds: after which the others end when one of them is gone.

    Raises:
      ValueError: some of the three but not all, or a process id out of range.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if not _are_many(os.environ):
            return
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
        return
    if missing:
        raise ValueError(f"--{missing[0]}: unset; --coordinator, --num_processes and --process_id belong together")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator: '{coordinator}' has no port; give host:port, the same for every process")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id: {process_id} is outside 0..{num_processes - 1}, the processes of the run")
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds)


def _are_many(environment: Any) -> bool:
    """Whether the environment tells of other processes."""
    return (
        any(int(environment.get(name) or 1) > 1 for name in _COUNTS)
        or any("," in environment.get(name, "") for name in _ADDRESSES)
        or any(environment.get(name) for name in _MARKS)
    )

"""Multi-process runs over JAX's distributed runtime."""

import os
import re
from typing import Any

import jax

# Variables of the environments in which JAX finds the other processes: numbers of them, their addresses, and variables
# that are set only where there are others.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
_ADDRESSES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_MARKS = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS", "JOBSET_NAME")


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the other processes of a run, if any; to be called before anything else touches a device.

    Without arguments JAX reads them from the environment of Slurm, Open MPI, Kubernetes (JobSet) or a TPU pod. A
    single process joins nothing.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: of the run.
      process_id: of this process, 0..num_processes - 1.
      heartbeat_seconds: time without a sign of a process after which the others end.

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
    """Whether the environment describes several processes."""
    return (
        any(int(environment.get(name) or 1) > 1 for name in _COUNTS)
        or any("," in environment.get(name, "") for name in _ADDRESSES)
        or any(environment.get(name) for name in _MARKS)
    )

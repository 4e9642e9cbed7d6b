"""Multi-process runs over JAX's distributed runtime."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rq_jax.settings import checks
from rq_jax.settings.text import quoted


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the other processes of a run, if any; to be called before anything else touches a device.

    Without arguments JAX finds them: on Slurm, Open MPI, a TPU slice (by its metadata or GKE's variables), Kubernetes.
    A single process joins nothing, and asks nobody.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: of the run.
      process_id: of this process, 0..num_processes - 1.
      heartbeat_seconds: time without a sign of a process after which the others end.

    Raises:
      ValueError: some of the three but not all, a process id out of range, or processes that cannot be found or
        reached.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        _join_found(heartbeat_seconds)
        return
    if missing:
        raise ValueError(f"--{missing[0]}: unset; --coordinator, --num_processes and --process_id belong together")
    try:
        check_address(coordinator)
    except ValueError as error:
        raise ValueError(f"--coordinator: {error}") from None
    checks.at_least("--num_processes", num_processes, 1)
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id: {process_id} is outside 0..{num_processes - 1}, the processes of the run")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds)
    except RuntimeError as error:
        reason = quoted(" ".join(str(error).split()), 300)
        fix = "give an address of process 0 that the others reach, with a free port"
        raise ValueError(f"--coordinator: '{coordinator}' cannot be joined ({reason}); {fix}") from error


def check_address(address: str) -> None:
    """An address is "host:port".

    Raises:
      ValueError: it is not.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"'{address}' has no port; give host:port, the same for every process")
    if not 0 < int(port) < 2**16:
        raise ValueError(f"'{address}' has a port outside 1..65535; give host:port, the same for every process")


def of_first_process(text: str) -> str:
    """The text of the first process, on every process; all of them have to ask."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return np.asarray(multihost_utils.broadcast_one_to_all(np.resize(data, size))).tobytes().decode()


def done_by_first_process(action: Callable[[], Any]) -> Any:
    """What an action of the first process returns, as JSON holds it, on every process; all of them have to ask.

    Raises:
      ValueError: the action raised this or an OSError; on every process.
    """
    value, refusal = None, ""
    if jax.process_index() == 0:
        try:
            value = action()
        except (OSError, ValueError) as error:  # told to the others, who would wait for this process
            refusal = str(error)
    value, refusal = json.loads(of_first_process(json.dumps([value, refusal])))
    if refusal:
        raise ValueError(refusal)
    return value


def rows_of_all(rows: np.ndarray) -> np.ndarray:
    """The rows of every process, in the order of the processes, on every process; all of them have to ask.

    Args:
      rows: of this process, (n, ...); n may differ from one process to another, the rest may not.
    """
    if jax.process_count() == 1:
        return rows
    if rows.dtype.itemsize == 8:  # which JAX would narrow
        return rows_of_all(np.ascontiguousarray(rows)[..., None].view(np.uint32)).view(rows.dtype)[..., 0]
    from jax.experimental import multihost_utils

    counts = np.asarray(multihost_utils.process_allgather(np.int32(len(rows))))
    padded = np.zeros((counts.max(), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    every = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([of_one[:count] for of_one, count in zip(every, counts, strict=True)])


def _join_found(heartbeat_seconds: int) -> None:
    """Join the processes of the cluster that JAX finds, if it finds one.

    Raises:
      ValueError: processes that cannot be found or reached.
    """
    fix = "give --coordinator, --num_processes and --process_id"
    if _is_alone(os.environ):
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise ValueError(f"cluster: {error}; {fix}") from error
        # JAX knows no cluster here.
        if (count := int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)) > 1:
            raise ValueError(f"cluster: JAX does not find the {count} processes of this Open MPI; {fix}") from error
    except RuntimeError as error:
        # Where devices are in use already, JAX complains before it looks whether there is a cluster at all.
        if not _is_in_cluster():
            return
        reason = quoted(" ".join(str(error).split()), 300)
        raise ValueError(f"cluster: its processes cannot be joined ({reason}); {fix}") from error


def _is_in_cluster() -> bool:
    """Whether JAX knows the cluster around this process; no public function says so."""
    from jax._src.clusters import ClusterEnv

    return any(env.is_env_present() for env in ClusterEnv._cluster_types if not env.opt_in_only_method)


def _is_alone(environment: Mapping[str, str]) -> bool:
    """Whether this is one process of its own within a cluster, for which JAX would take it for one of many.

    These are shells and batch scripts of a Slurm allocation, which has tasks that they did not start, and pods of no
    indexed job, such as those of notebooks.
    """
    if "SLURM_JOB_ID" in environment and "OMPI_COMM_WORLD_SIZE" not in environment:
        return int(environment.get("SLURM_STEP_NUM_TASKS") or 1) == 1
    is_pod = "KUBERNETES_SERVICE_HOST" in environment
    return is_pod and not {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"} & environment.keys()

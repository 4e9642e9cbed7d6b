"""Devices that a program is compiled for without having them: the compilers of NVIDIA GPUs, of TPUs, of fake CPUs.

The compilers of accelerators come with packages of their own (`make aot`), kept apart from those that run: jax would
look for the devices of everything that is installed beside it.
"""

import argparse
import functools
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from rq_jax.devices import sharding
from rq_jax.devices.peaks import Peaks, device_peaks

PACKAGES = Path(__file__).parents[1] / ".aot"
_NETWORK = 50e9  # bytes a second of a GPU between hosts, 400 Gbit/s
_MOST_CPUS, _LONGEST_SIDE = 512, 16  # fake devices; TPUs along one side of a slice


class Chip(NamedTuple):
    """An accelerator: the kind that its driver reports, bytes of memory, bytes a second to its neighbours."""

    kind: str
    memory: float
    link: float


# Vendors' figures: NVLink in one direction, all of a TPU's links together.
CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", 85.1e9, 300e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", 84.9e9, 450e9),
    "h200": Chip("NVIDIA H200", 150.1e9, 450e9),
    "v4": Chip("TPU v4", 32 * 2**30, 300e9),
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 200e9),
    "v5p": Chip("TPU v5", 95 * 2**30, 600e9),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 448e9),
}
# What XLA has to know of a GPU: compute capability, multiprocessors, GHz, arithmetic units and bytes of shared memory
# of each, bytes of the L2 cache.
_GPUS = {
    "a100": ((8, 0), 108, 1.41, 64, 167_936, 40 * 2**20),
    "h100": ((9, 0), 132, 1.98, 128, 233_472, 50 * 2**20),
    "h200": ((9, 0), 132, 1.98, 128, 233_472, 50 * 2**20),
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as on the command line, such as "h100:8".
      devices: they describe themselves to a compiler; only those of a CPU can run anything.
      chip: what one of them is; None for a CPU, of which nothing is known.
      peaks: of one of them; None for a CPU.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    peaks: Peaks | None

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return self.devices[0].platform

    def link(self, group: Sequence[int]) -> float:
        """Bytes a second between devices of these numbers; infinite on a CPU, of which nothing is known."""
        if self.chip is None:
            return float("inf")
        sizes = self.name.partition(":")[2].split("x")
        hosts = {device // int(sizes[-1]) for device in group}
        return _NETWORK if self.platform == "gpu" and len(hosts) > 1 else self.chip.link

    def make_mesh(self, sizes: Sequence[int]) -> Mesh:
        """A mesh of data x fsdp x tensor devices.

        Raises:
          ValueError: their product is not the number of devices.
        """
        if np.prod(sizes) != len(self.devices):
            shown = "x".join(map(str, sizes))
            raise ValueError(f"--mesh: {shown} does not fit the {len(self.devices)} devices of --target={self.name}")
        devices = np.array(self.devices).reshape(sizes)
        return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def checked_name(name: str) -> str:
    """The name of a target, as it came.

    Raises:
      argparse.ArgumentTypeError: no such target.
    """
    kind, _, shape = name.partition(":")
    if kind not in ("cpu", *CHIPS) or not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){0,2}", shape):
        known = ", ".join(f"{chip}:..." for chip in ("cpu", *CHIPS))
        raise argparse.ArgumentTypeError(f"'{name}' is unknown; allowed are {known}, such as h100:8 or v5e:4x4")
    sizes = [int(size) for size in shape.split("x")]
    if kind in _GPUS and len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"'{name}' is no cluster of GPUs; give their number or hosts x GPUs, as 2x8")
    if kind == "cpu" and np.prod(sizes) > _MOST_CPUS:
        raise argparse.ArgumentTypeError(f"'{name}' has too many fake devices; give at most {_MOST_CPUS}")
    if kind not in ("cpu", *_GPUS) and max(sizes) > _LONGEST_SIDE:
        raise argparse.ArgumentTypeError(f"'{name}' is no slice; its sides are at most {_LONGEST_SIDE}")
    return name


def find(name: str) -> Target:
    """The target of a name: "h100:8", "a100:2x8" (hosts x GPUs), "v5e:4x4" and "v5p:2x2x2" (TPUs as wired), "cpu:8".

    To be called before anything else touches a device.

    Raises:
      argparse.ArgumentTypeError: no such target.
      ValueError: its compiler knows no such slice.
      ModuleNotFoundError: its compiler is not installed.
    """
    kind, _, shape = checked_name(name).partition(":")
    jax.config.update("jax_platforms", "cpu")  # everything else of this process stays on the host
    if kind == "cpu":
        count = int(np.prod([int(size) for size in shape.split("x")]))
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
        return Target(name, tuple(jax.devices()[:count]), None, None)
    devices = _gpus(name, kind, shape) if kind in _GPUS else _tpus(name, shape)
    return Target(name, tuple(devices), CHIPS[kind], device_peaks(CHIPS[kind].kind))


def _gpus(name: str, kind: str, shape: str) -> Sequence[jax.Device]:
    _need(name, "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")
    hosts, _, count = shape.rpartition("x")
    describe = functools.partial(
        topologies.get_topology_desc,
        kind,
        platform="cuda",
        target_config=gpu_config(kind),
        topology=f"1x{hosts or 1}x{count}",
    )
    try:
        return describe().devices
    except NotImplementedError:  # JAX looked for plugins before the path named this one, and looks only once
        importlib.import_module("jax_plugins.xla_cuda12").initialize()
        return describe().devices


def _tpus(name: str, shape: str) -> Sequence[jax.Device]:
    _need(name, "libtpu")
    # Else it asks the metadata server of Google's cloud where it is, and complains.
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--target: '{name}' is no slice that its compiler knows ({reason})") from error


def gpu_config(kind: str) -> str:
    """A GPU as XLA's compiler wants to know it: a GpuTargetConfig in text form."""
    (major, minor), cores, ghz, units, shared, cache = _GPUS[kind]
    chip, peaks = CHIPS[kind], device_peaks(CHIPS[kind].kind)
    assert peaks is not None
    limits = {
        "threads_per_warp": 32, "threads_per_block_limit": 1024, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 49_152, "shared_memory_per_block_optin": shared - 1024,
        "shared_memory_per_core": shared, "registers_per_block_limit": 65_536, "registers_per_core_limit": 65_536,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65_535, "block_dim_limit_z": 65_535,
        "core_count": cores, "fpus_per_core": units, "clock_rate_ghz": ghz, "l2_cache_size": cache,
        "memory_bandwidth": int(peaks.bandwidth), "device_memory_size": int(chip.memory),
    }  # fmt: skip
    lines = [f"  {limit}: {value}" for limit, value in limits.items()]
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    libraries = "dnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 12 minor: 9 }"
    named = f'platform_name: "CUDA"\ndevice_description_str: "{chip.kind}"'
    return "\n".join(["gpu_device_info {", *lines, capability, "}", libraries, named])


def _need(name: str, *packages: str) -> None:
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    for package in packages:
        if not _is_installed(package):
            raise ModuleNotFoundError(f"--target: {name} needs the package {package}; `make aot` installs it")


def _is_installed(package: str) -> bool:
    parent = package.rpartition(".")[0]
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(package) is not None

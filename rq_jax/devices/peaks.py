"""Peak arithmetic and memory bandwidth of known accelerators."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Peaks(NamedTuple):
    """Peak rates of a device: operations per second by dtype, bytes per second, and the source of the figures."""

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    source: str = "table"

    def times(self, num_devices: int) -> "Peaks":
        """Peak rates of several such devices together."""
        flops = {dtype: value * num_devices for dtype, value in self.flops.items()}
        return self._replace(flops=flops, bandwidth=self.bandwidth * num_devices)


# Vendors' dense figures: pattern of the device kind, name, bfloat16 and float32 TFLOP/s, TB/s. float32 is at JAX's
# default precision: TF32 on NVIDIA, one bfloat16 pass on TPU.
_DEVICES = (
    (r"H200", "H200", 989.0, 494.7, 4.8),
    (r"H100.*HBM3", "H100 SXM", 989.0, 494.7, 3.35),
    (r"A100.*80GB", "A100 80 GB", 312.0, 156.0, 2.039),
    (r"A100", "A100 40 GB", 312.0, 156.0, 1.555),
    (r"TPU v6", "TPU v6e", 918.0, 918.0, 1.64),
    (r"TPU v5( lite|e)", "TPU v5e", 197.0, 197.0, 0.819),
    (r"TPU v5", "TPU v5p", 459.0, 459.0, 2.765),
    (r"TPU v4$", "TPU v4", 275.0, 275.0, 1.228),
)


def device_peaks(device_kind: str) -> Peaks | None:
    """Look up the peaks of one device by its `jax.Device.device_kind`; None for an unknown one."""
    for pattern, name, bfloat16, float32, bandwidth in _DEVICES:
        if re.search(pattern, device_kind):
            return Peaks(name, {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}, bandwidth * 1e12)
    return None

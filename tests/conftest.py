"""Settings that hold for every test: eight fake CPU devices, true float32 products, the golden vectors.

RQ_JAX_TEST_GPU=1 leaves the choice of platform to JAX; RQ_JAX_GOLDENS names the directory of golden vectors.
"""

import os
from pathlib import Path

import pytest

# Before JAX starts its backend: afterwards these are read by nobody.
DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
if DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_COUNT_FLAG}=8".strip()
if not os.environ.get("RQ_JAX_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Directory of the golden vectors; a test that asks for it is skipped where none is named."""
    directory = os.environ.get("RQ_JAX_GOLDENS")
    if not directory:
        pytest.skip("RQ_JAX_GOLDENS names no directory of golden vectors")
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"RQ_JAX_GOLDENS={directory} is no directory; name one or unset it")
    return Path(directory)

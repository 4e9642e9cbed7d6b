"""Settings that hold for every test: eight fake CPU devices, true float32 products, the golden vectors.

--reliability=FILE writes a table of the faults that the tests marked `fault` put in. RQ_JAX_TEST_GPU=1 leaves the choice of platform to JAX;
RQ_JAX_TEST_OPTIMIZED=1 compiles as a user does, which takes longer; RQ_JAX_GOLDENS and RQ_JAX_DQ_GOLDENS name the directories of golden vectors.
"""

import gc
import os
from pathlib import Path

import pytest

MANY_MAPS = 25_000
COMPILES_AS_A_USER = bool(os.environ.get("RQ_JAX_TEST_OPTIMIZED") or os.environ.get("RQ_JAX_TEST_GPU"))


def set_flag(name: str, value: str) -> None:
    """Before JAX starts its backend: afterwards nobody reads these. A flag that is set already stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()


set_flag("--xla_force_host_platform_device_count", "8")
if not COMPILES_AS_A_USER:
    # These emitters take twice the time over a backward pass, for speed that small programs have no use for.
    set_flag("--xla_cpu_use_fusion_emitters", "false")
if not os.environ.get("RQ_JAX_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one process compiled, the others and the next run read; without this, the directory would be part of each key.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# An axis or a dtype that JAX would have to guess is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if not COMPILES_AS_A_USER:
    jax.config.update("jax_disable_most_optimizations", True)

# Traced programs are many small objects that live long: to look through them as often as Python does takes a twentieth
# of all time.
gc.set_threshold(50_000, 50, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", help="file for the table of faults that were put in, and what they cost")


@pytest.fixture(autouse=True)
def _noted_fault(request: pytest.FixtureRequest) -> None:
    """A test with the marker `fault` reports it; `record_property("times", n)` says how often, else once."""
    if marker := request.node.get_closest_marker("fault"):
        request.node.user_properties.append(("fault", marker.args))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = config.getoption("--reliability")
    if not path:
        return
    rows: dict[tuple[str, str], list[int]] = {}
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    for report in sorted(reports, key=lambda report: report.nodeid):
        properties = dict(report.user_properties)
        if "fault" in properties and (report.when == "call" or report.failed):
            row = rows.setdefault(tuple(properties["fault"]), [0, 0])
            row[0] += properties.get("times", 1)
            row[1] += report.failed
    lines = ["| put in | times | what happens | lost |", "| --- | --- | --- | --- |"]
    for (what, happens), (times, failed) in rows.items():
        lines.append(f"| {what} | {times} | {happens} | {'**test failed**' if failed else 'nothing'} |")
    text = (Path(__file__).parent / "reliability.md").read_text(encoding="utf-8").replace("TABLE", "\n".join(lines))
    Path(path).write_text(text, encoding="utf-8")
    terminalreporter.write_line(text)


@pytest.fixture(scope="module", autouse=True)
def _light_heap() -> None:
    """What modules before left behind is not looked through again, which would soon take longer than the tests.

    That is settled as the next module begins: at its own end its last test still holds fixtures, and what refers to
    itself, as a recipe and its programs do, would be kept for good. Now and then compiled programs are forgotten: each
    takes some of the 65,530 memory maps that Linux allows a process.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


def directory_of_goldens(variable: str) -> Path:
    """The directory that an environment variable names; a test that asks for it is skipped where none is named."""
    directory = os.environ.get(variable)
    if not directory:
        pytest.skip(f"{variable} names no directory of golden vectors")
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{variable}={directory} is no directory; name one or unset it")
    return Path(directory)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Golden vectors of RQ-VAE and RQ-Transformer."""
    return directory_of_goldens("RQ_JAX_GOLDENS")


@pytest.fixture(scope="session")
def dq_goldens() -> Path:
    """Golden vectors of DQ-VAE and DQ-Transformer."""
    return directory_of_goldens("RQ_JAX_DQ_GOLDENS")

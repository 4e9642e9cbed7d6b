"""The size of the house: loose modules, files, functions and their branches. The order of imports is in test_layering."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest
import test_layering

MAX_LOOSE_MODULES = 4
MAX_FUNCTION_LINES = 80
MAX_COMPLEXITY = 10
MAX_FILE_LINES = 450
# A script is imported by the tests that bear its name, and where it meets others, what ships or what is converted.
ALSO_IMPORTED_BY = {
    "benchmark": {"test_gpu_parts.py", "test_preflight.py"},
    "convert_torch": set(),
    "evaluate": {"test_hosts.py"},
    "sample": {
        "test_evaluate_grains.py",
        "test_hosts.py",
        "test_shipped_pair.py",
        "test_convert_torch.py",
        "toy_samples.py",
    },
}


def sources(root: Path) -> list[Path]:
    """What users and maintainers read: package, benchmarks, configs and scripts."""
    return [*test_layering.sources(root, "rq_jax", "benchmarks", "configs"), *test_layering.scripts(root)]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function, from its first decorator to its last statement."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1


def long_functions(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{name}: {lines} lines"
        for path in sources(root)
        for name, lines in functions(path)
        if lines > MAX_FUNCTION_LINES
    ]


def long_files(root: Path) -> list[str]:
    lengths = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in sources(root))
    return [f"{path.relative_to(root)}: {lines} lines" for path, lines in lengths if lines > MAX_FILE_LINES]


def loose_modules(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "rq_jax").glob("*.py") if path.stem != "__init__")


def imported_scripts(root: Path) -> list[str]:
    """Imports of a script anywhere but in its own tests."""
    names = {path.stem for path in test_layering.scripts(root)}
    found = []
    for path in [*sources(root), *test_layering.sources(root, "tests")]:
        for line, name, _ in test_layering.imports_of(path):
            script = name.split(".")[0]
            own = path.name.startswith(f"test_{script}")
            if script in names and not own and path.name not in ALSO_IMPORTED_BY.get(script, ()):
                found.append(f"{path.relative_to(root)}:{line}: imports {script}")
    return found


def complex_functions(root: Path) -> list[str]:
    """By McCabe's count, as ruff makes it."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=C901", "--output-format=concise"]
    command += [f"--config=lint.mccabe.max-complexity={MAX_COMPLEXITY}", *map(str, sources(root))]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stderr
    return [line for line in run.stdout.splitlines() if "C901" in line]


CHECKS = {
    "function of more lines": long_functions,
    "file of more lines": long_files,
    "script imported": imported_scripts,
    "function of more branches": complex_functions,
}


@pytest.mark.parametrize("what", CHECKS)
def test_nothing_outgrows_the_house(what):
    assert len(sources(helpers.ROOT)) > 50, "nothing was read"
    assert CHECKS[what](helpers.ROOT) == []


def test_few_modules_are_loose():
    assert len(loose_modules(helpers.ROOT)) <= MAX_LOOSE_MODULES, loose_modules(helpers.ROOT)


def test_what_outgrows_the_house_is_found(tmp_path):
    for folder in ("rq_jax", "benchmarks", "configs", "tests"):
        (tmp_path / folder).mkdir()
    body = "".join(f"    if x == {i}:\n        return {i}\n" for i in range(40))
    (tmp_path / "rq_jax" / "big.py").write_text(f"@cache\ndef f(x):\n{body}" + "\n" * 369)
    (tmp_path / "sample.py").write_text("")
    (tmp_path / "benchmarks" / "time.py").write_text("import sample")
    (tmp_path / "tests" / "test_other.py").write_text("from sample import main")
    (tmp_path / "tests" / "test_sample.py").write_text("import sample")
    (tmp_path / "tests" / "test_sample_edit.py").write_text("import sample")
    assert loose_modules(tmp_path) == ["big"]
    assert long_functions(tmp_path) == ["rq_jax/big.py:f: 82 lines"]
    assert long_files(tmp_path) == ["rq_jax/big.py: 451 lines"]
    assert imported_scripts(tmp_path) == [
        "benchmarks/time.py:1: imports sample", "tests/test_other.py:1: imports sample",
    ]  # fmt: skip
    (complex_function,) = complex_functions(tmp_path)
    assert "`f` is too complex (41 > 10)" in complex_function

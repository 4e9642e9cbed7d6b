"""Where and with what something was measured."""

import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

_NO_CODE = (":(exclude)results", ":(exclude)benchmarks/results")  # what a measurement writes itself


def environment(root: Path) -> dict[str, Any]:
    """Versions, date, commit of the checkout at `root`, and what else decides how fast a program is."""
    import flax
    import jaxlib

    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git(root, "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *_NO_CODE)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "cpu_count": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        # Where programs are read back from a cache, compile_seconds says little.
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
    }


def _git(root: Path, *args: str) -> str | None:
    """What git says; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

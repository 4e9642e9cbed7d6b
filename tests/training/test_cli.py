"""Errors in one line, and the flags of the training scripts."""

import os
import subprocess
import sys
import textwrap

import helpers
import pytest

from rq_jax.training import cli


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, OSError, MemoryError, TypeError])
def test_errors_of_the_user_end_with_one_line(capsys, monkeypatch, kind):
    monkeypatch.delenv("RQ_JAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped, cli.one_line_errors(TypeError):
        raise kind("data.name: 'x'\n  is unknown")
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "error: data.name: 'x' is unknown\n")
    monkeypatch.setenv("RQ_JAX_TRACEBACK", "1")
    with pytest.raises(kind), cli.one_line_errors(TypeError):
        raise kind("where")


def test_other_errors_keep_their_traceback():
    with pytest.raises(TypeError), cli.one_line_errors():
        raise TypeError("a defect")


@pytest.mark.parametrize(
    "arguments, code, out, err",
    [
        (["--workdir=W", "--config.optim.rate=0.25"], 0, "lr 0.25 in W\n", ""),
        (["--workdir=W", "--config.optim.rate=0.25", "--strict"], 0, "lr 0.25 in W strictly\n", ""),
        (["--workdir=W", "--config.optim.rate=-1"], 2, "", "error: optim.rate: -1.0 must be above 0\n"),
        (
            ["--workdir=W", "--config.optim.rate=1", "--config.optim.rat=1"],
            2,
            "",
            "error: --config.optim.rat=1: the config has no key 'rat'; its keys stand in the config file\n",
        ),
        (["--workdir=W", "--config.optm.rate=1"], 2, "", "error: --config.optm.rate=1: the config has no key 'optm'; "),
        (["--workdir=W", "--config.optim.rate.x=1"], 2, "", "error: --config.optim.rate.x=1: the config has no key "),
        (["--workdir=W", "--config.optim.rate=fast"], 2, "", "error: flag --config.optim.rate=fast: "),
        (["--config.optim.rate=1"], 2, "", "error: flag --workdir="),
    ],
)
def test_the_command_line(tmp_path, arguments, code, out, err):
    (tmp_path / "settings.py").write_text(
        textwrap.dedent("""
            from ml_collections import ConfigDict

            def get_config():
                return ConfigDict({"optim": {"rate": 0.5}})
        """)
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
            from rq_jax import command_line

            def train(config, workdir, strict=False):
                if config.optim.rate <= 0:
                    raise ValueError(f"optim.rate: {config.optim.rate} must be above 0")
                print("lr", config.optim.rate, "in", workdir, *["strictly"] * strict)

            command_line.main(train)
        """)
    )
    command = [sys.executable, "script.py", "--config=settings.py", *arguments]
    root = str(helpers.ROOT)
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (code, out), result.stderr
    assert result.stderr.startswith(err) and result.stderr.count("\n") == (1 if code else 0)

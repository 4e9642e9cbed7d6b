"""Errors in one line, and the flags of the training scripts."""

import logging
import os
import subprocess
import sys

import helpers
import pytest
from absl import app, flags
from absl import logging as absl_logging

from rq_jax.training import cli

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"optim": {"rate": 0.5}})
"""
SCRIPT = """
from rq_jax.training import cli

def train(config, workdir, strict=False):
    if config.optim.rate <= 0:
        raise ValueError(f"optim.rate: {config.optim.rate} must be above 0")
    print("lr", config.optim.rate, "in", workdir, *["strictly"] * strict)

cli.main(train)
"""


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


def test_a_parser_of_flags_raises_its_errors():
    parser = cli.OneLineParser()
    parser.add_argument("--count", type=int, required=True)
    assert parser.parse_args(["--count=3"]).count == 3
    with pytest.raises(ValueError, match="^--count: invalid int value: 'x'$"):
        parser.parse_args(["--count=x"])
    with pytest.raises(ValueError, match="^the following arguments are required: --count$"):
        parser.parse_args([])
    with pytest.raises(ValueError, match="^unrecognized arguments: --cuont=3$"):
        parser.parse_args(["--count=3", "--cuont=3"])


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the script in this process, without what absl changes for a whole process; its flags are gone afterwards."""
    (tmp_path / "settings.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    monkeypatch.setattr(absl_logging, "set_verbosity", lambda _: None)
    level, names = logging.getLogger("rq_jax.training.loop").level, set(flags.FLAGS)

    def run(arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["script.py", "--config=settings.py", *arguments])
        try:
            exec(SCRIPT, {})
        except SystemExit as stopped:
            return stopped.code
        return 0

    yield run
    logging.getLogger("rq_jax.training.loop").setLevel(level)
    for name in set(flags.FLAGS) - names:
        delattr(flags.FLAGS, name)


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
def test_the_command_line(script, capsys, arguments, code, out, err):
    assert script(arguments) == code
    found = capsys.readouterr()
    assert found.out == out
    assert found.err.startswith(err) and found.err.count("\n") == (1 if code else 0)


def test_a_script_ends_with_one_line(tmp_path):
    (tmp_path / "settings.py").write_text(CONFIG)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "--config=settings.py", "--workdir=W", "--config.optim.rate=-1"]
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: optim.rate: -1.0 must be above 0\n")

"""Errors in one line, and the flags of the training scripts."""

import logging
import os
import re
import subprocess
import sys

import helpers
import jax
import pytest
from absl import app, flags
from absl import logging as absl_logging

from rq_jax.training import cli

CONFIG = """
from ml_collections import ConfigDict, FieldReference

def get_config(preset="small"):
    if preset != "small":
        raise ValueError(f"preset {preset!r} is unknown")
    kinds = {"name": "a", "size": 3, "is_big": True, "shape": (2, 3), "any": FieldReference(1, field_type=object)}
    return ConfigDict({"optim": {"rate": 0.5}, "model": kinds})
"""
KINDS = ("name", "size", "is_big", "shape", "any")
SCRIPT = """
from rq_jax.training import cli

def train(config, workdir, strict=False):
    if config.optim.rate is None or config.optim.rate <= 0:
        raise ValueError(f"optim.rate: {config.optim.rate} must be above 0")
    unset = [name for name, value in config.model.items() if value is None]
    print("lr", config.optim.rate, "in", workdir, *["strictly"] * strict, *unset, *["text"] * (config.model.name == "None"))

cli.main(train, {"settings.py": ("small", "large")})
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
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli, "start", lambda: None)
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
    monkeypatch.setattr(absl_logging, "set_verbosity", lambda _: None)
    logger, names = logging.getLogger("rq_jax"), set(flags.FLAGS)
    level = logger.level

    def run(arguments: list[str]) -> int:
        config = [] if any(argument.startswith("--config=") for argument in arguments) else ["--config=settings.py"]
        monkeypatch.setattr(sys, "argv", ["script.py", *config, *arguments])
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # ml_collections would keep its get_config
        try:
            exec(SCRIPT, {})
        except SystemExit as stopped:
            return stopped.code
        return 0

    yield run
    logger.setLevel(level)
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
        (["--workdir=W", "--config=settings.py:lage"], 2, "", "error: --config: preset 'lage' is unknown\n"),
        (["--workdir=W", "--config=nowhere.py:small"], 2, "", "error: --config: 'nowhere.py' is no file, seen from '"),
        (["--workdir=W", "--config=broken.py"], 2, "", "error: --config: 'broken.py' is no config file: "),
        (["--workdir=W", "--config=empty.py"], 2, "", "error: --config: 'empty.py' is no config file: it has no "),
        (["--workdir="], 2, "", "error: --workdir: empty; give a path\n"),
        (["--workdir=~nobody-here/W"], 2, "", "error: --workdir: '~nobody-here/W': no home directory is known for it"),
        (["--workdir=W", "--flagfile=nowhere"], 2, "", "error: ERROR:: Unable to open flagfile"),
        (["--workdir=runs/[b] c"], 0, "lr 0.5 in runs/[b] c\n", ""),
        (["--workdir=~/W"], 0, "lr 0.5 in HOME/W\n", ""),
        (["--config=~/settings.py:small", "--workdir=~"], 0, "lr 0.5 in HOME\n", ""),
        *((["--workdir=W", f"--config.model.{key}=None"], 0, f"lr 0.5 in W {key}\n", "") for key in KINDS),
        (["--workdir=W", "--config.optim.rate=None"], 2, "", "error: optim.rate: None must be above 0\n"),
        (["--workdir=W", "--config.optim=None"], 2, "", "error: flag --config.optim=None: "),
        (["--workdir=W", "--config.model.name='None'"], 0, "lr 0.5 in W text\n", ""),
        (["--workdir=W", "--config.model.name=None", "--config.model.name=b"], 0, "lr 0.5 in W\n", ""),
    ],
)
def test_the_command_line(script, capsys, tmp_path, arguments, code, out, err):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "settings.py").write_text(CONFIG)
    (tmp_path / "broken.py").write_text("def get_config(:")
    (tmp_path / "empty.py").write_text("")
    assert script(arguments) == code
    found = capsys.readouterr()
    assert found.out == out.replace("HOME", str(tmp_path / "home"))
    assert found.err.startswith(err) and found.err.count("\n") == (1 if code else 0)


def test_help_lists_flags_and_presets_and_the_log_has_the_notes_of_all_parts(script):
    assert script(["--workdir=W"]) == 0
    assert logging.getLogger("rq_jax.pretrained.vgg_lpips").isEnabledFor(logging.INFO)  # says which weights it found
    words = " ".join(flags.FLAGS.main_module_help().split())
    assert {"--config", "--workdir", "--coordinator", "--[no]strict"} <= {word.rstrip(":") for word in words.split()}
    assert "Presets of settings.py: small, large." in words
    for name in ("rqvae", "rqtransformer"):
        door = helpers.ROOT / ("train_vae.py" if name == "rqvae" else "train_transformer.py")
        assert f'"configs/{name}.py": {name}.PRESETS' in door.read_text()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'x':\n not known")])
def test_a_platform_that_is_not_there_ends_with_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    reason = re.escape(" ".join(str(error).split()) or "it is not installed")
    with pytest.raises(
        ValueError, match=rf"^JAX_PLATFORMS: 'cpu' cannot be used \(.{reason}.\); install jax\[cuda13\]"
    ):
        cli.find_devices()


def test_the_cache_of_compiled_programs_has_one_place(monkeypatch):
    found = {}
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    for directory, expected in ((None, "/home/somebody/.cache/rq_jax/jax"), ("~/x", "/home/somebody/x"), ("y", "y")):
        monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", directory, raising=False)
        cli.keep_compiled_programs()
        assert found == {"jax_compilation_cache_dir": expected}


def test_a_script_ends_with_one_line(tmp_path):
    (tmp_path / "settings.py").write_text(CONFIG)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "--config=settings.py", "--workdir=W", "--config.optim.rate=-1"]
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: optim.rate: -1.0 must be above 0\n")

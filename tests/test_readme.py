"""README and manual: snippets run, commands parse, links and paths lead somewhere."""

import argparse
import importlib
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys

import helpers
import pytest
from absl import flags
from ml_collections import config_flags

from configs import ablations, dqtransformer, dqvae, rqtransformer, rqvae
from rq_jax.data import transforms

ROOT = helpers.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "checkpoints").glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
INLINE = [
    code for text in TEXTS.values() for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
]
FILES = {"sample.py", "model.safetensors", "data.json"}  # not keys of the sections of these names
BLOCKS = [
    (page, *block) for page, text in TEXTS.items() for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
]
SNIPPETS = [  # that of exported programs is test_export's
    (page, code) for page, language, code in BLOCKS if language == "python" and "export.deserialize" not in code
]
TRAINING_SCRIPTS = {
    "train_vae.py": {"rqvae", "dqvae"},
    "train_transformer.py": {"rqtransformer", "dqtransformer"},
}
TEXT_FLAGS = {
    "classes",
    "classes_of",
    "prompt",
    "prompts_of",
    "split",
    "data_name",
    "label_key",
    "tokenizer",
    "key",
}  # no paths; that of benchmark.py
CLI = (ROOT / "rq_jax" / "training" / "cli.py").read_text(encoding="utf-8")
TRAINING_FLAGS = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', CLI))


def _shell_commands() -> list[tuple[str, tuple[str, ...]]]:
    """(script or "-m module", arguments) of the Python commands in shell blocks and backticks; variables become 1."""
    shell = "\n".join([*(code for _, language, code in BLOCKS if not language), *INLINE]).replace("\\\n", " ")
    commands = set()
    for script, rest in re.findall(r"\bpython (-m [\w.]+|\w+\.py)([^\n&;|]*)", shell):
        rest = rest.rstrip('"') if rest.count('"') % 2 else rest  # of a command inside quotes
        arguments = shlex.split(re.sub(r"\$\w+", "1", rest), comments=True)
        commands.add((script, tuple(argument for argument in arguments if argument != "...")))
    return sorted(commands)


COMMANDS = _shell_commands()


class _Parsed(BaseException):
    """Ends a script once its command line is parsed."""


def _parse(monkeypatch: pytest.MonkeyPatch, script: str, arguments: tuple[str, ...]) -> argparse.ArgumentParser:
    """Run a script up to the end of its `parse_args`, which raises where the arguments do not fit."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise _Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(logging.getLogger("rq_jax.data"), "setLevel", lambda level: None)  # else quiet from here on
    with pytest.raises(_Parsed) as parsed:
        if script.startswith("-m "):
            runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsed.value.args[0]


def _options(parser: argparse.ArgumentParser) -> set[str]:
    nested = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = [parser, *(sub for choices in nested for sub in choices.values())]
    return {option for one in parsers for action in one._actions for option in action.option_strings}


def _texts(parser: argparse.ArgumentParser) -> set[str]:
    """Flags whose value is taken as it is."""
    nested = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parsers = [parser, *(sub for choices in nested for sub in choices.values())]
    actions = [action for one in parsers for action in one._actions if action.option_strings and action.nargs is None]
    return {action.dest for action in actions if action.type is None and action.choices is None}


@pytest.mark.parametrize("page", sorted({page for page, _ in SNIPPETS}))
def test_snippets_run(tmp_path, page):
    """In a user's process, with one device, away from the repository: only the shipped model is there."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    program = "\n".join(f"exec(compile({code!r}, {page!r}, 'exec'), {{}})" for of, code in SNIPPETS if of == page)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"  # and no eight devices
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_snippets_and_commands():
    assert [page for page, _ in SNIPPETS].count("README.md") >= 2
    scripts = {script for script, _ in COMMANDS}
    assert {*TRAINING_SCRIPTS, "sample.py", "evaluate.py", "convert_torch.py", "benchmark.py"} <= scripts
    assert {"-m rq_jax.data.prepare", "-m rq_jax.data.text", "-m benchmarks.ablate"} <= scripts


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_parse(monkeypatch, script, arguments):
    if script in TRAINING_SCRIPTS:
        _parse_training(monkeypatch, script, arguments)
    else:
        _parse(monkeypatch, script, arguments)


def _parse_training(monkeypatch: pytest.MonkeyPatch, script: str, arguments: tuple[str, ...]) -> None:
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    for name in TRAINING_FLAGS - {"config"}:
        flags.DEFINE_string(name, None, "", flag_values=values)
    command = [script, *(argument for argument in arguments if argument != "--help")]  # which app.run defines
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)  # ml_collections looks for overrides there
    assert values(command) == [script]
    if config.value is not None:
        assert config.value.model.name in TRAINING_SCRIPTS[script]


def test_flags_between_backticks_exist(monkeypatch):
    named = {flag for code in INLINE if not code.startswith("pip ") for flag in re.findall(r"--\w+", code)}
    known = {f"--{name}" for name in TRAINING_FLAGS} | {"--signal"}  # of Slurm
    example = {"benchmark.py": ("quantize",), "convert_torch.py": ("--export=a", "--out=b")}
    example["evaluate.py"] = ("likelihood", "--checkpoint=a", "--out=b")
    example["-m rq_jax.data.entropy"] = ("--out=a", "--name=b")
    modules = ("-m rq_jax.data.prepare", "-m rq_jax.data.entropy")
    for script in ("sample.py", "evaluate.py", "convert_torch.py", "benchmark.py", *modules):
        arguments = ("folder",) if script.startswith("-m") else ("--out=a", "--checkpoint=b")
        with monkeypatch.context() as patch:
            parser = _parse(patch, script, example.get(script, arguments))
        known |= _options(parser)
        assert script.startswith("-m") or _texts(parser) <= TEXT_FLAGS, "a path needs type=cli.path"
    assert {"--distances", "--classes_of", "--strict"} <= named
    assert named - known == set()


def test_settings_between_backticks_exist():
    configs = [rqvae.base(), dqvae.base(), rqtransformer.base(), dqtransformer.base()]
    sections = {name for config in configs for name, value in config.items() if hasattr(value, "items")}
    written = {key for code in INLINE for key in re.findall(r"(?<![\w./])(?:config\.)?(\w+\.\w+)(?![\w/.(])", code)}
    keys = {tuple(key.split(".")) for key in written if key not in FILES}
    keys = {(section, name) for section, name in keys if section in sections}
    assert {("loop", "keep_best"), ("loss", "temperature"), ("data", "text_key")} <= keys
    assert [key for key in keys if not any(key[1] in config.get(key[0], {}) for config in configs)] == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page):
    for name, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])):
        if "://" not in name:
            path = (ROOT / page).parent / name
            assert path.is_file(), name
            if anchor:
                titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_samples_and_every_page_of_the_manual_are_linked():
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))
    assert {"docs/samples.png", "docs/gallery.png"} <= linked
    assert set(TEXTS) - linked == {"README.md"}


def test_the_map_has_every_folder_and_nothing_else():
    tree = re.search(r"## Map\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = set(re.findall(r"[\w/]+(?:\.py|/)(?=\s|$)", tree))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    package = {
        path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        for path in (ROOT / "rq_jax").iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or any(path.glob("**/*.py")))
    }
    assert package <= named, package - named
    docstring = importlib.import_module("rq_jax").__doc__
    rooms = {name.removeprefix("rq_jax/").rstrip("/").removesuffix(".py") for name in package} - {"files"}
    assert [room for room in sorted(rooms) if not re.search(rf"^(\w+, )*{room}\b", docstring, re.MULTILINE)] == []
    assert max(map(len, docstring.splitlines())) <= 100


def test_make_targets_exist():
    targets = {name for text in TEXTS.values() for name in re.findall(r"^make ([\w-]+)", text, re.MULTILINE)}
    targets |= {name for code in INLINE for name in re.findall(r"^make ([\w-]+)$", code)}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test", "bench", "emoji", "results-depth"} <= targets
    rules = {re.sub("^results-.*", "results-%", name) for name in targets}
    assert [name for name in rules if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    tables = {name.removeprefix("results-") for name in targets if name.startswith("results-")}
    assert tables <= {*ablations.TABLES, "protocols"}


def test_the_demos_train_within_their_budget():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    training = re.findall(r"^\t\$\(PYTHON\) train_.*:demo .*", makefile, re.MULTILINE)
    assert len(training) == 4 and all(re.search(r" \$\(call WITHIN,[23]\)$", line) for line in training)
    command = ["make", "-n", "demo", "demo-dq", "BUDGET=601"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    budgets = [int(seconds) for seconds in re.findall(r"--config.loop.time_budget_seconds=(\d+)\n", planned)]
    assert budgets == [360, 240, 360, 240]


def test_the_pair_by_text_is_made_with_all_that_its_card_lists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    made = makefile[makefile.index("\navatars: ") : makefile.index("# Neighbouring tests")]
    files = ("metrics_first.jsonl", "metrics_second.jsonl", "figures/guidance.json", "figures/guidance.png")
    assert [name for name in files if f" checkpoints/avatars/{name}\n" not in made] == []


def test_every_table_is_named_beside_its_command():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    comment = makefile[makefile.index("# make results-") : makefile.index("\nresults-%:")]
    assert [name for name in ablations.TABLES if not re.search(rf"-{name}\b", comment)] == []


def test_the_page_on_data_has_every_transform():
    assert [name for name in transforms.TRANSFORMS if f"`{name}`" not in TEXTS["docs/data.md"]] == []

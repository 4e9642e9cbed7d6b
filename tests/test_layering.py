"""Imports run one way: mathematics, networks, machinery, scripts. The walk reads source and runs none."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest

REPOSITORY = helpers.ROOT

# Folders and loose modules of the package, from the ground up. A room imports rooms below its own floor and, above the
# ground, rooms of its own floor, as long as nothing goes in a circle.
FLOORS = (
    {"settings"},
    {"files", "grains", "losses", "metrics", "nn", "quantize"},
    {"models", "sampling"},
    {"checkpoint", "data", "devices", "interop", "pretrained", "report"},
    {"evaluation", "export", "training"},
    {"recipes"},
)
GROUND = FLOORS[1]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# They load where only jax, flax, optax, einops and numpy are installed.
PURE = {"grains", "losses", "metrics", "models", "nn", "quantize", "sampling", "settings"}
# Some rooms see less: networks return values and never losses, readers of foreign files trust nobody.
NARROWER = {
    "models": {"grains", "nn", "quantize", "sampling", "settings"},
    "interop": {"checkpoint", "data", "files", "grains", "models", "settings"},
    "interop/official": {"grains", "settings"},
    "interop/state_file": {"files", "settings"},
    "pretrained": {"interop", "nn", "settings"},
}
MODEL_CLASSES = "rq_jax.models"  # the loop knows none
CORE = {"jax", "flax", "optax", "einops", "numpy"}
FOREIGN_FRAMEWORKS = {"tensorflow", "torch", "torchvision"}
# These load TensorFlow themselves.
LOADS_TENSORFLOW = (
    "clu.checkpoint",
    "clu.deterministic_data",
    "clu.metric_writers",
    "clu.periodic_actions",
    "clu.preprocess_spec",
    "flax.metrics.tensorboard",
    "jax.experimental.jax2tf",
)


class Import(NamedTuple):
    line: int
    name: str  # dotted; "from a import b" is a.b, a relative import starts with a dot
    at_load: bool  # runs when the module loads, not first inside a function


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from (Import(node.lineno, alias.name, at_load) for alias in node.names)
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                yield from (Import(node.lineno, f"{module}.{alias.name}", at_load) for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(node.lineno, name, at_load)
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_load and not deferred and not type_checking)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def sources(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def scripts(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*.py") if path.name != "setup.py")


def room_of(name: str) -> str | None:
    """The room that a dotted name leads into: "__init__" for the package itself, None for what is not ours."""
    package, *rest = name.split(".")
    if package != "rq_jax":
        return None
    return rest[0] if rest and rest[0] in FLOOR_OF else "__init__"


def module_of(root: Path, name: str) -> str | None:
    """The module of ours behind a dotted name, which may end in something that the module holds."""
    parts = name.split(".")
    for count in range(len(parts), 1, -1):
        path = root.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:count])
    return None


def may_import(room: str, target: str, folder: str = "") -> bool:
    if room == "__init__" or target == "__init__" or room == target:
        return room == target or target == "__init__"
    if room in NARROWER:
        return target in NARROWER.get(folder, NARROWER[room])
    if FLOOR_OF[room] == FLOOR_OF[target]:
        return room not in GROUND
    return FLOOR_OF[target] < FLOOR_OF[room]


def circle(graph: dict[str, set[str]]) -> str | None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(error.args[1])
    return None


class Errors(list):
    """Imports that break the order of the house, as "file:line: what is wrong"."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def check(self, path: Path, line: int, allowed: bool, what: str) -> None:
        if not allowed:
            self.append(f"{path.relative_to(self.root)}:{line}: {what}")


def layering_errors(root: Path) -> list[str]:
    """Every import in a checkout that breaks the order of the house."""
    errors = Errors(root)
    _check_package(errors)
    _check_configs_and_scripts(errors)
    _check_frameworks(errors)
    return errors


def _check_package(errors: Errors) -> None:
    """Rooms import downwards, and neither rooms nor modules go in a circle."""
    root, rooms, modules = errors.root, {}, {}
    for path in sources(root, "rq_jax"):
        inside = path.relative_to(root / "rq_jax")
        room, package = inside.parts[0].removesuffix(".py"), len(inside.parts) > 1 and path.name == "__init__.py"
        module = ".".join(("rq_jax", *inside.with_suffix("").parts)).removesuffix(".__init__")
        errors.check(path, 1, room in FLOOR_OF or room == "__init__", f"no floor knows the room {room!r}")
        if room not in FLOOR_OF and room != "__init__":
            continue
        for imported in imports_of(path):
            _check_import(errors, path, room, imported)
            target = room_of(imported.name)
            if target is not None:
                rooms.setdefault(room, set()).add(target)
                if not package:  # a package's face hands on what its modules hold
                    modules.setdefault(module, set()).add(module_of(root, imported.name))
    for what, graph in (("rooms", rooms), ("modules", modules)):
        graph = {node: targets - {node, None, "__init__", "rq_jax"} for node, targets in graph.items()}
        if found := circle(graph):
            errors.append(f"rq_jax: {what} import in a circle: {found}")


def _check_import(errors: Errors, path: Path, room: str, imported: Import) -> None:
    line, name, at_load = imported
    top, target = name.split(".")[0], room_of(name)
    folder = "/".join(path.relative_to(errors.root / "rq_jax").parts[:2])
    outside = {path.stem for path in scripts(errors.root)} | {"benchmarks", "configs", "tests"}
    errors.check(path, line, not name.startswith("."), "relative import")
    errors.check(path, line, top not in outside, f"rq_jax imports {name}")
    errors.check(path, line, target is None or may_import(room, target, folder), f"{room} imports {target}")
    names_model = room == "training" and (name + ".").startswith(f"{MODEL_CLASSES}.")
    errors.check(path, line, not names_model, f"{room} imports {MODEL_CLASSES}")
    third_party = target is None and top and top not in CORE | sys.stdlib_module_names
    if room in PURE | {"__init__"}:
        errors.check(path, line, not third_party, f"{room} imports {top}")
    elif not path.name.endswith("_dataset_builder.py"):  # loaded by tensorflow-datasets alone
        errors.check(path, line, not (third_party and at_load), f"{top} is imported before it is used")


def _check_configs_and_scripts(errors: Errors) -> None:
    """Configs are data; scripts do not import one another."""
    root = errors.root
    for path in sources(root, "configs"):
        for line, name, _ in imports_of(path):
            allowed = name.split(".")[0] in {"ml_collections", *sys.stdlib_module_names}
            allowed |= (name + ".").startswith("configs.common.")
            errors.check(path, line, allowed, f"configs imports {name}")
    benchmarks = list(sources(root, "benchmarks"))  # what benchmark.py is made of
    for path in [*scripts(root), *benchmarks]:
        forbidden = {path.stem for path in scripts(root)} | {"benchmarks", "tests"}
        forbidden -= {"benchmarks"} if path.name == "benchmark.py" or path in benchmarks else set()
        for line, name, _ in imports_of(path):
            errors.check(path, line, name.split(".")[0] not in forbidden, f"script imports {name}")


def _check_frameworks(errors: Errors) -> None:
    """Nothing loads TensorFlow or PyTorch."""
    for path in [*sources(errors.root, "rq_jax", "configs", "benchmarks"), *scripts(errors.root)]:
        for line, name, _ in imports_of(path):
            loads_foreign = name.split(".")[0] in FOREIGN_FRAMEWORKS or name.startswith(LOADS_TENSORFLOW)
            errors.check(path, line, not loads_foreign, f"imports {name}")


def test_the_house_is_in_order():
    assert len(list(sources(REPOSITORY, "rq_jax"))) > 1, "nothing was read"
    assert layering_errors(REPOSITORY) == []


@pytest.mark.parametrize(
    ("path", "source", "error"),
    [
        ("rq_jax/quantize/ema.py", "from rq_jax import nn", "quantize imports nn"),
        ("rq_jax/nn/conv.py", "import rq_jax.losses", "nn imports losses"),
        ("rq_jax/losses.py", "def f():\n  from rq_jax.models.rqvae import RQVAE", "losses imports models"),
        ("rq_jax/metrics.py", "import scipy.linalg", "metrics imports scipy"),
        ("rq_jax/models/rqvae.py", "from rq_jax import losses", "models imports losses"),
        ("rq_jax/models/rqvae.py", "from rq_jax.devices.sharding import RULES", "models imports devices"),
        ("rq_jax/models/rqvae.py", "def f():\n  import orbax.checkpoint", "models imports orbax"),
        ("rq_jax/pretrained/clip.py", "from rq_jax.quantize import lookup", "pretrained imports quantize"),
        ("rq_jax/training/loop.py", "from rq_jax.models import create", "training imports rq_jax.models"),
        ("rq_jax/training/loop.py", "from rq_jax import models", "training imports rq_jax.models"),
        ("rq_jax/training/loop.py", "from rq_jax.recipes import tokenizer", "training imports recipes"),
        ("rq_jax/interop/state_file/tensor.py", "from rq_jax import checkpoint", "interop imports checkpoint"),
        ("rq_jax/interop/official/rules.py", "from rq_jax.models import create", "interop imports models"),
        ("rq_jax/data/text.py", "from rq_jax import evaluation", "data imports evaluation"),
        ("rq_jax/data/text.py", "import tokenizers", "tokenizers is imported before it is used"),
        ("rq_jax/data/text.py", "class A:\n  import PIL.Image", "PIL is imported before it is used"),
        ("rq_jax/models/rqvae.py", "from .discriminator import D", "relative import"),
        ("rq_jax/models/rqvae.py", "from . import discriminator", "relative import"),
        ("rq_jax/__init__.py", "from rq_jax.models import create", "__init__ imports models"),
        ("rq_jax/utils.py", "", "no floor knows the room 'utils'"),
        ("rq_jax/training/loop.py", "import train_vae", "rq_jax imports train_vae"),
        ("rq_jax/training/loop.py", "from configs import rqvae", "rq_jax imports configs.rqvae"),
        ("rq_jax/checkpoint/load.py", "import_module('torch')", "imports torch"),
        ("configs/rqvae.py", "import jax", "configs imports jax"),
        ("configs/rqvae.py", "from configs import rqtransformer", "configs imports configs.rqtransformer"),
        ("configs/rqvae.py", "from rq_jax import models", "configs imports rq_jax.models"),
        ("sample.py", "from train_vae import main", "script imports train_vae.main"),
        ("sample.py", "import benchmarks.train", "script imports benchmarks.train"),
        ("benchmark.py", "import train_vae", "script imports train_vae"),
        ("benchmarks/train.py", "import train_vae", "script imports train_vae"),
        ("benchmarks/train.py", "import tests.helpers", "script imports tests.helpers"),
        ("benchmarks/train.py", "import torch", "imports torch"),
        ("rq_jax/report/grids.py", "import benchmarks", "rq_jax imports benchmarks"),
        ("sample.py", "import torch.nn", "imports torch.nn"),
        ("sample.py", "def f():\n  from tensorflow import io", "imports tensorflow.io"),
        ("rq_jax/training/log.py", "def f():\n  from clu import metric_writers", "imports clu.metric_writers"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, path, source, error):
    for name in ("train_vae.py", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / path).write_text(source)
    line = source.count("\n") + 1
    assert f"{path}:{line}: {error}" in layering_errors(tmp_path)


@pytest.mark.parametrize(
    ("what", "files"),
    [
        (
            "rooms",
            {
                "report/grids.py": "from rq_jax import data",
                "data/cache.py": "def f():\n  from rq_jax import checkpoint",
                "checkpoint/load.py": "from rq_jax.report.grids import grid",
            },
        ),
        (
            "modules",
            {
                "data/__init__.py": "from rq_jax.data.text import encode",
                "data/cache.py": "from rq_jax.data import text",
                "data/text.py": "def f():\n  from rq_jax.data.cache import write",
            },
        ),
    ],
)
def test_a_circle_is_found(tmp_path, what, files):
    for name, source in files.items():
        path = tmp_path / "rq_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert any(error.startswith(f"rq_jax: {what} import in a circle: ") for error in layering_errors(tmp_path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rq_jax/models/rqvae.py", "import math\nimport jax.numpy as jnp\nfrom rq_jax import quantize"),
        ("rq_jax/models/rqvae.py", "from rq_jax.models.gan import D\nfrom rq_jax import __version__"),
        ("rq_jax/checkpoint/load.py", "from rq_jax import models\ndef f():\n  import orbax.checkpoint"),
        ("rq_jax/pretrained/vgg_lpips.py", "from rq_jax import nn\nfrom rq_jax.interop import state_file"),
        ("rq_jax/interop/official/tables.py", "from rq_jax.interop.official.rules import Rule"),
        ("rq_jax/data/text.py", "import typing\nif typing.TYPE_CHECKING:\n  import PIL"),
        ("rq_jax/data/own/own_dataset_builder.py", "import tensorflow_datasets as tfds"),
        ("configs/rqvae.py", "import ml_collections\nfrom configs import common\nimport configs.common"),
        ("sample.py", "import absl.app\nfrom clu import metrics\nfrom rq_jax import models, report"),
        ("benchmark.py", "from benchmarks import train"),
        (
            "benchmarks/train.py",
            "from benchmarks import timing\nfrom configs import rqvae\nfrom rq_jax import models, recipes",
        ),
        ("tests/test_oracle.py", "import torch"),
    ],
)
def test_a_right_import_passes(tmp_path, path, source):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert layering_errors(tmp_path) == []


def loaded_by(modules: list[str]) -> set[str]:
    """Top-level names in sys.modules once a bare Python has imported these."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_core_loads_nothing_that_only_some_users_need():
    heavy = {"clu", "grain", "matplotlib", "ml_collections", "PIL", "tensorboardX", "tensorflow"}
    heavy |= {"tensorflow_datasets", "tokenizers", "torch"}
    rooms = ("models", "quantize", "grains", "losses", "sampling", "metrics")
    ours = loaded_by([f"rq_jax.{room}" for room in rooms])
    assert "rq_jax" in ours
    assert ours & heavy <= loaded_by(["jax", "flax.linen", "optax", "einops", "numpy"])

"""What the README names is there."""

import re
from pathlib import Path

from configs import ablations
from rq_jax.data import transforms

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_picture_and_page_exists():
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert "docs/samples.png" in linked
    assert [name for name in linked if not (ROOT / name).is_file()] == []


def test_every_script_config_and_preset_exists():
    scripts = set(re.findall(r"python (\w+\.py)", README))
    presets = re.findall(r"--config=(configs/\w+\.py):([\w,]+)", README)
    assert {"train_vae.py", "train_transformer.py", "sample.py"} <= scripts and presets
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    for path, preset in presets:
        scope: dict = {}
        exec(compile((ROOT / path).read_text(encoding="utf-8"), path, "exec"), scope)
        assert scope["get_config"](preset).model.name


def test_make_targets_exist():
    targets = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= targets
    rules = {re.sub("^results-.*", "results-%", name) for name in targets}
    assert [name for name in rules if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
    tables = {name.removeprefix("results-") for name in targets if name.startswith("results-")}
    assert tables <= set(ablations.TABLES)


def test_the_page_on_data_has_every_transform():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in transforms.TRANSFORMS if f"`{name}`" not in page] == []


def test_tables_of_results_are_those_of_their_files():
    for path in (ROOT / "results").glob("*.md"):
        if f"make results-{path.stem}`" in README and f"results/{path.stem}.png" not in README:
            assert path.read_text(encoding="utf-8") in README, path.stem
    assert "make results-depth`" in README

"""The notebook: committed without outputs, and its cells run, sliders included."""

import json
import sys
import types

import helpers
import pytest
from PIL import Image

from rq_jax.data.text import train_tokenizer

NOTEBOOK = helpers.ROOT / "notebooks" / "sampling.ipynb"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def widgets(monkeypatch):
    """Stands in for a page: what is displayed, and the function behind the sliders with their values."""
    page = types.SimpleNamespace(shown=[], sliders=[])

    def interact_manual(function, **values):
        page.sliders.append((function, values))

    def slider(value, *args, **kwargs):
        return value

    display = types.ModuleType("IPython.display")
    display.display = page.shown.append
    ipywidgets = types.ModuleType("ipywidgets")
    for name in ("IntSlider", "FloatSlider", "Text"):
        setattr(ipywidgets, name, slider)
    ipywidgets.interact_manual = interact_manual
    modules = {"IPython": types.ModuleType("IPython"), "IPython.display": display, "ipywidgets": ipywidgets}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return page


def test_no_output_is_committed():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


@pytest.mark.parametrize(
    "kind", ["class", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("text", "unconditional"))]
)
def test_cells_draw_and_show(kind, tmp_path, widgets, monkeypatch):
    pictures = helpers.write_pictures(tmp_path / "pictures")
    tokenizer = helpers.save_tokenizer(tmp_path / "tokenizer", pictures)
    train_tokenizer((path.read_text() for path in sorted(pictures.rglob("*.txt"))), 40, tmp_path / "bpe.json")
    helpers.save_transformer(tmp_path / "checkpoints" / "emoji", pictures, tokenizer, kind, tmp_path / "bpe.json")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = {}
    for cell in cells():
        exec("".join(cell["source"]), names)
    D = names["model"].code_shape[-1]
    assert [type(image) for image in widgets.shown] == [Image.Image] * (1 + D)  # a draw, then depth by depth
    ((draw, values),) = widgets.sliders
    codes = draw(**{**values, "guidance": 1.0})
    assert codes.shape == (8, *names["model"].code_shape) and len(widgets.shown) == 2 + D
    compiled = names["generate"].__globals__["_generate"]._cache_size()
    draw(**{**values, "guidance": 1.0, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 4})
    assert names["generate"].__globals__["_generate"]._cache_size() == compiled

"""sample.py on images that are there: kept rows, boxes and depths, images mixed by depth, the sheets, refusals."""

import importlib

import helpers
import jax
import numpy as np
import pytest
from PIL import Image

import sample
from rq_jax import checkpoint
from rq_jax.data import make_dataset
from rq_jax.report import grids

(h, w, D), K = helpers.CODE_SHAPE, helpers.CODEBOOK_SIZE


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation(), helpers.one_device():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pictures = helpers.write_pictures(root / "pictures")
    tokenizer = helpers.save_tokenizer(root / "tokenizer", pictures)
    return helpers.save_transformer(root / "guided", pictures, tokenizer, "guided")


@pytest.fixture(scope="module")
def split(trained):
    """Codes (5, h, w, D), reconstructions and classes (5, 1) of the validation split."""
    loaded = checkpoint.load_model(trained)
    settings = {
        name: loaded.config["data"][name] for name in ("name", "data_dir", "image_size", "eval_transform", "label_key")
    }
    batch = next(make_dataset(**settings, channels=3, split="validation", train=False, batch_size=5).iterator())
    apply = jax.jit(lambda x: loaded.tokenizer.model.apply(loaded.tokenizer.variables, x))
    found = apply(batch["image"])
    return np.asarray(found.codes), np.asarray(found.reconstruction), batch["cond"]


@pytest.fixture
def sheets(monkeypatch):
    """The rows of every labelled sheet that is drawn."""
    drawn, labelled_grid = [], grids.labelled_grid
    monkeypatch.setattr(
        grids,
        "labelled_grid",
        lambda rows, *more, **options: drawn.append(dict(rows)) or labelled_grid(rows, *more, **options),
    )
    return drawn


def draw(trained, out, *flags, num=3, first=0):
    """Codes, classes and images of a run."""
    common = [
        f"--checkpoint={trained}",
        f"--out={out}",
        f"--num_images={num}",
        "--batch_size=3",
        f"--first_index={first}",
    ]
    sample.run(sample.parse_args([*common, *flags]))
    images = [np.asarray(Image.open(out / "images" / f"{i:06d}.png")) for i in range(first, first + num)]
    with np.load(out / f"codes_{first:06d}.npz") as file:
        return file["codes"], file["cond"], np.stack(images)


@pytest.fixture(scope="module")
def earlier(trained, tmp_path_factory):
    """What an earlier run drew of images 1..4, and its codes file."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    codes, conds, images = draw(trained, out, "--classes=4,0,2", num=4, first=1)
    return codes, conds, images, out / "codes_000001.npz"


def test_a_box_is_kept_and_the_rest_drawn_with_guidance(trained, earlier, tmp_path, sheets):
    codes, conds, images, file = earlier
    flags = f"--edit_of={file}", "--keep_box=2,1,1,1", "--guidance=3", "--seed=1"
    found, found_conds, drawn = draw(trained, tmp_path / "out", *flags, first=2)
    np.testing.assert_array_equal(found_conds, conds[1:])
    is_kept = np.arange(h * w).reshape(h, w) <= 2 * w + 1
    np.testing.assert_array_equal(found[:, is_kept], codes[1:, is_kept])
    assert all(helpers.differs(one[~is_kept], other[~is_kept]) for one, other in zip(found, codes[1:], strict=True))
    alone, _, _ = draw(trained, tmp_path / "alone", *flags, "--before_box=draw", first=2)
    np.testing.assert_array_equal(alone[:, 2, 1], codes[1:, 2, 1])
    assert helpers.differs(alone[:, :2], codes[1:, :2])
    (rows, _) = sheets
    assert list(rows) == ["original", "kept", "drawn"] and (tmp_path / "out" / "edit_000002.png").is_file()
    assert np.abs(rows["original"].astype(int) - images[1:]).max() <= 1
    np.testing.assert_array_equal(rows["drawn"], drawn)
    is_shown = is_kept.repeat(16 // h, 0).repeat(16 // w, 1)
    np.testing.assert_array_equal(rows["kept"][:, is_shown], rows["original"][:, is_shown])
    assert rows["kept"][:, ~is_shown].min() >= 255 * 0.8


def test_rows_are_kept_and_drawn_images_stay_as_they_were(trained, earlier, tmp_path):
    codes, conds, _, file = earlier
    found, _, _ = draw(trained, tmp_path / "out", f"--edit_of={file}", "--keep_rows=1", first=1)
    np.testing.assert_array_equal(found, codes[:3])  # the same seed
    other, other_conds, _ = draw(
        trained, tmp_path / "other", f"--edit_of={file}", "--keep_rows=3", "--classes=3", num=1
    )
    np.testing.assert_array_equal(other[0, :3], codes[3, :3])  # of image 4, whose turn is that of image 0
    assert other_conds.tolist() == [[3]]


def test_finer_codes_of_real_images_are_drawn(trained, split, tmp_path, sheets):
    codes, reconstructions, conds = split
    found, found_conds, _ = draw(trained, tmp_path / "one", "--edit_of=validation", "--from_depth=1", num=7)
    np.testing.assert_array_equal(found[..., 0], codes[[0, 1, 2, 3, 4, 0, 1], ..., 0])
    np.testing.assert_array_equal(found_conds, conds[[0, 1, 2, 3, 4, 0, 1]])
    assert helpers.differs(found[:5, ..., 1:], codes[..., 1:])
    assert list(sheets[0]) == ["original", f"first 1 of {D}", "drawn"]
    assert helpers.differs(sheets[0]["original"], sheets[0][f"first 1 of {D}"])
    whole, _, images = draw(trained, tmp_path / "all", "--edit_of=validation", f"--from_depth={D}", first=3)
    order = [3, 4, 0]
    np.testing.assert_array_equal(whole, codes[order])
    assert np.abs(images - np.clip(127.5 * reconstructions[order] + 127.5, 0, 255)).max() <= 1


def test_images_are_mixed_by_depth(trained, split, earlier, tmp_path, sheets):
    codes, _, _ = split
    drawn, _, _, file = earlier
    flags = f"--edit_of={file}", "--from_depth=2", "--finer_of=validation"
    found, _, images = draw(trained, tmp_path / "out", *flags, first=2)
    np.testing.assert_array_equal(found[..., :2], drawn[1:, ..., :2])
    np.testing.assert_array_equal(found[..., 2], codes[2:5, ..., 2])
    assert list(sheets[0]) == ["3 + 0", "2 + 1", "1 + 2", "0 + 3"]
    np.testing.assert_array_equal(sheets[0]["2 + 1"], images)


REFUSED = {
    "nothing kept": (["--edit_of=a.npz"], "^--edit_of: a.npz needs one of --keep_rows, --keep_box, --from_depth, and no second; say"),
    "two kinds": (["--edit_of=a.npz", "--keep_rows=1", "--from_depth=1"], "^--edit_of: a.npz needs one of --keep_rows, --from_depth, and"),
    "no images": (["--keep_rows=1"], "^--keep_rows: 1 needs --edit_of; give both, or neither$"),
    "before what": (["--edit_of=a.npz", "--keep_rows=1", "--before_box=draw"], "^--before_box: draw needs --keep_box; give both"),
    "finer than what": (["--edit_of=a.npz", "--keep_rows=1", "--finer_of=train"], "^--finer_of: train needs --from_depth; give"),
    "prefix": (["--edit_of=a.npz", "--keep_rows=1", "--prefix=b.npz", "--prefix_positions=2"], "^--prefix: b.npz and --edit_of: a.npz exclude"),
    "row": (["--edit_of=train", "--keep_rows=5"], "^--keep_rows: 5 is outside 1..4, the rows of the code grid$"),
    "box": (["--edit_of=train", "--keep_box=3,0,2,1"], "^--keep_box: top 3, left 0, height 2, width 1 is no box inside the grid of 4x2 "),
    "depth": (["--edit_of=train", "--from_depth=4"], "^--from_depth: 4 is outside 1..3, the depths of the codes$"),
    "class": (["--edit_of=train", "--from_depth=1", "--classes=fox"], "^--classes: 'fox' is no class"),
    "split": (["--edit_of=tset", "--from_depth=1"], "tset"),
    "file": (["--edit_of=gone.npz", "--from_depth=1"], "^--edit_of: 'gone.npz' is no .npz file"),
    "grid": (["--edit_of={}/grid.npz", "--from_depth=1"], r"^--edit_of: codes of shape \(4, 2, 2\) are not those of this model, \(4, 2, 3\)$"),
    "code": (["--edit_of={}/code.npz", "--from_depth=1"], r"^--edit_of: '.*code.npz': 13 at depth 0 is outside \[0, 13\)"),
    "classes": (["--edit_of={}/cond.npz", "--from_depth=1"], "^--edit_of: '.*cond.npz' holds no classes 0..4; give --classes$"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_edits_are_refused_in_one_line(trained, tmp_path, monkeypatch, case):
    flags, message = REFUSED[case]
    codes = np.zeros((2, h, w, D), int)
    np.savez(tmp_path / "grid.npz", codes=codes[..., :2])
    np.savez(tmp_path / "code.npz", codes=codes + K)
    np.savez(tmp_path / "cond.npz", codes=codes, cond=np.full((2, 1), 5))
    monkeypatch.setattr(importlib.import_module("rq_jax.sampling.generate"), "_generate", None)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: None)  # what would encode the images of the split
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        draw(trained, tmp_path / "out", *(flag.format(tmp_path) for flag in flags))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("box", ["1,2,3", "1,2,3,x"])
def test_a_box_has_four_numbers(box):
    with pytest.raises(ValueError, match=f"^--keep_box: '{box}' is no top,left,height,width; give four numbers$"):
        sample.parse_args([f"--keep_box={box}"])

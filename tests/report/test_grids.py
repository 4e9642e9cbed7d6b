"""Pictures: bytes, layouts, text that is really drawn, curves, files that are whole or absent."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rq_jax.report import curves, grids

WHITE = 255


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)  # 255 is kept for the paper


# to_uint8


def test_to_uint8_maps_the_range_rounds_and_clips():
    inside = np.array([-1.0, -1 + 2 / 255, -1 + 2.9 / 255, -1 + 3.1 / 255, 0.999, 1.0])
    np.testing.assert_array_equal(grids.to_uint8(inside), [0, 1, 1, 2, 255, 255])
    np.testing.assert_array_equal(grids.to_uint8(np.array([-2.0, 7.0, -np.inf, np.inf])), [0, 255, 0, 255])


def test_to_uint8_returns_every_byte_unchanged():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(grids.to_uint8(every / 127.5 - 1), every)
    np.testing.assert_array_equal(grids.to_uint8(every), every)


def test_to_uint8_takes_device_arrays_of_half_precision_and_nan_is_black():
    assert grids.to_uint8(jnp.array([jnp.nan, 1.0, -1.0], jnp.bfloat16)).tolist() == [0, 255, 0]


@pytest.mark.parametrize("dtype", [np.int32, np.int8, bool])
def test_to_uint8_refuses_integers_of_unknown_range(dtype):
    message = f"images: dtype {np.dtype(dtype)} is not allowed; give floats in [-1, 1] or uint8"
    with pytest.raises(ValueError, match=re.escape(message)):
        grids.to_uint8(np.zeros((2, 3), dtype))


# grid


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2])
def test_grid_places_every_image_and_leaves_the_rest_white(channels, scale):
    images = random_images(5, 2, 3, channels)
    sheet = grids.grid(images, columns=3, padding=4, scale=scale)
    H, W = 2 * scale, 3 * scale
    assert sheet.shape == (2 * (H + 4) + 4, 3 * (W + 4) + 4, channels) and sheet.dtype == np.uint8
    rest = sheet.copy()
    for index, image in enumerate(images):
        top, left = 4 + index // 3 * (H + 4), 4 + index % 3 * (W + 4)
        for y in range(H):
            for x in range(W):
                np.testing.assert_array_equal(sheet[top + y, left + x], image[y // scale, x // scale])
        rest[top : top + H, left : left + W] = WHITE
    assert (rest == WHITE).all()


def test_grid_is_no_wider_than_its_images():
    assert grids.grid(random_images(2, 4, 5, 3), columns=9, padding=1).shape == (6, 13, 3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3, 5), {}, "images: shape (2, 3, 5) is not allowed; give (B, H, W, 1 or 3), none of them 0"),
        ((0, 3, 5, 3), {}, "images: shape (0, 3, 5, 3) is not allowed; give (B, H, W, 1 or 3), none of them 0"),
        ((2, 3, 5, 4), {}, "images: shape (2, 3, 5, 4) is not allowed; give (B, H, W, 1 or 3), none of them 0"),
        ((2, 3, 5, 3), {"columns": 0}, "columns: 0 must be at least 1"),
        ((2, 3, 5, 3), {"scale": 0}, "scale: 0 must be at least 1"),
    ],
)
def test_grid_refuses(shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        grids.grid(np.zeros(shape, np.uint8), **{"columns": 2, **options})


# labelled_grid


def test_labelled_grid_has_text_at_the_left_and_images_at_the_right():
    rows = {"original": random_images(3, 20, 24, 3), "depth 1: 21.3 dB": random_images(2, 20, 24, 3)}
    sheet = grids.labelled_grid(rows, padding=2)
    assert sheet.shape[0] == 2 * (20 + 4) and sheet.shape[2] == 3
    label_width = sheet.shape[1] - (3 * 26 + 2)
    for top, images in zip((0, 24), rows.values(), strict=True):
        strip = grids.grid(images, columns=3, padding=2)
        shown = sheet[top : top + 24, label_width : label_width + strip.shape[1]]
        np.testing.assert_array_equal(shown, strip)
        label = sheet[top : top + 24, :label_width]
        assert (label < 128).any(), "no text is drawn"
        assert (label[:, -1] == WHITE).all(), "the text runs into the pictures"


def test_labelled_grid_draws_different_labels_differently():
    images = random_images(1, 20, 24, 1)
    one, other = (grids.labelled_grid({label: images}) for label in ("depth 1", "depth 8"))
    assert one.shape == other.shape and (one != other).any()


def test_labelled_grid_makes_room_for_text_beside_tiny_images():
    sheet = grids.labelled_grid({"a": random_images(2, 3, 3, 1), "b": random_images(2, 3, 3, 1)})
    dark = (sheet[:, :8] < 128).any(axis=(1, 2))
    starts = np.flatnonzero(np.diff(dark.astype(int)) == 1)
    assert len(starts) == 2, "the two labels are drawn over each other"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "rows: empty; give at least one label with its images"),
        (
            {"a": np.zeros((1, 2, 3, 3), np.uint8), "b": np.zeros((1, 4, 3, 3), np.uint8)},
            "rows: images have several sizes {'a': (2, 3), 'b': (4, 3)}; give one height and width",
        ),
        (
            {"a": np.zeros((2, 3, 3), np.uint8)},
            "images of row 'a': shape (2, 3, 3) is not allowed; give (B, H, W, 1 or 3), none of them 0",
        ),
    ],
)
def test_labelled_grid_refuses(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        grids.labelled_grid(rows)


# captioned_grid


def test_labelled_grid_has_captions_below_the_images_of_a_row():
    rows = {"a": np.zeros((2, 24, 30, 3), np.uint8), "b": np.zeros((1, 24, 30, 3), np.uint8)}
    plain = grids.labelled_grid(rows)
    captioned = grids.labelled_grid(rows, captions={"b": ["cat"]})
    assert captioned.shape[0] > plain.shape[0] and captioned.shape[1] == plain.shape[1]
    assert (captioned[28:] < 128).sum() > (plain[28:] < 128).sum()  # the text
    long = grids.labelled_grid(rows, captions={"b": ["cat " * 8]}, lines=8)
    assert long.shape[0] > grids.labelled_grid(rows, captions={"b": ["cat " * 8]}).shape[0]
    with pytest.raises(ValueError, match="^captions: 1 for 2 images; give one per image$"):
        grids.labelled_grid(rows, captions={"a": ["cat"]})


def test_captioned_grid_has_each_caption_below_its_image():
    images = random_images(3, 20, 40, 3)
    sheet = grids.captioned_grid(images, ["cat", "", "dog"], columns=3, padding=4)
    captions = []
    for index, image in enumerate(images):
        left = 4 + index * 44
        np.testing.assert_array_equal(sheet[4:24, left : left + 40], image)
        captions.append(sheet[24:, left : left + 40])
    assert (captions[0] < 128).any() and (captions[1] == WHITE).all() and (captions[2] < 128).any()
    assert (captions[0] != captions[2]).any()


def test_captions_wrap_to_the_image_and_stop_after_three_lines():
    image = random_images(1, 20, 64, 1)
    heights = [
        grids.captioned_grid(image, [caption], columns=1).shape[0]
        for caption in ("woman", "woman bowing", "woman bowing deeply", "woman bowing " * 30, "W" * 200)
    ]
    assert heights[0] < heights[1] < heights[2] == heights[3] == heights[4]
    sheet = grids.captioned_grid(image, ["W" * 200], columns=1, padding=4)
    assert (sheet[:, :4] == WHITE).all() and (sheet[:, -4:] == WHITE).all(), "text leaves its column"


@pytest.mark.parametrize(
    "text, lines",
    [
        ("hand-single-finger", "hand-single-\nfinger"),
        ("  sky & weather", "sky &\nweather"),
        ("one - two -three", "one - two -\nthree"),
        ("incomprehensibilities", "incomprehens\nibilities"),
        ("well-a-incomprehensibilities", "well-a-\nincomprehens\nibilities"),
        ("12 letters x a b c d e f g h i j k l m n", "12 letters x\na b c d e f\ng h i j k..."),
        ("", ""),
    ],
)
def test_captions_break_at_spaces_and_after_hyphens(text, lines):
    class Font:
        getlength = len

    assert grids._wrap(text, Font, 12) == lines


def test_captioned_grid_wants_one_caption_per_image():
    with pytest.raises(ValueError, match="captions: 2 for 3 images; give one per image"):
        grids.captioned_grid(random_images(3, 4, 5, 3), ["a", "b"], columns=2)


# curves


@pytest.fixture
def log(tmp_path):
    steps = (1, 2, 3, 5)
    records = [{"step": s, "loss": 1 / s, "eval/psnr": 20.0 + s, "odd": "nan", "rate": 2.0 * s} for s in steps]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 6, "lo')
    return path


def test_read_metrics_leaves_out_a_line_without_an_end(log):
    metrics = curves.read_metrics(log)
    assert metrics["loss"] == ([1, 2, 3, 5], [1.0, 1 / 2, 1 / 3, 1 / 5])
    assert list(metrics) == ["loss", "eval/psnr", "odd", "rate"] and np.isnan(metrics["odd"][1]).all()


@pytest.mark.parametrize(
    "line",
    ['{"step": "a"}', "[1]", "[" * 100_000, "3", '{"loss": 1}', '{"step": 3, "x": [1]}', '{"step": 3, "x": "high"}',
     '{"step": 3, "x": 1' + "0" * 400 + "}", '{"step": 3, "x": null}'],
)  # fmt: skip
def test_a_line_that_is_none_of_a_log_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "nan"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"^'.*metrics.jsonl': line 2 is no line of a log; delete it$"):
        curves.read_metrics(tmp_path / "metrics.jsonl")


def test_curves_draw_a_panel_for_each_metric(log, tmp_path):
    sizes = {}
    for names in (["loss"], ["loss", "eval/psnr"], ["loss", "odd", "eval/psnr", "rate"]):
        curves.curves(log, names, tmp_path / "new" / "curves.png")
        picture = np.asarray(Image.open(tmp_path / "new" / "curves.png").convert("RGB")).astype(int)
        sizes[len(names)] = picture.shape[:2]
        blue = (picture[..., 2] > picture[..., 0] + 60) & (picture[..., 2] > 120)
        assert blue.any(), "no line is drawn"
    assert sizes[2] == (sizes[1][0], 2 * sizes[1][1]) and sizes[4] == (2 * sizes[1][0], 3 * sizes[1][1])


def test_curves_leave_a_gap_before_a_loss_begins_and_mark_where(tmp_path, monkeypatch):
    late = {
        "loss": [3, 2, 4, 3],
        "late": [0, 0, 5, 0],
        "too": [0, 0, 1, 2],
        "never": [0, 0, 0, 0],
        "psnr": [1, 2, 3, 4],
    }
    records = [{"step": 10 * (i + 1), **{name: values[i] for name, values in late.items()}} for i in range(4)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    seen = []
    monkeypatch.setattr(curves, "panels", lambda *args: seen.extend(args))
    curves.curves(tmp_path / "log.jsonl", list(late), tmp_path / "out.png")
    lines, _, _, marks = seen
    drawn = {name: panel[""][1] for name, panel in lines.items()}
    assert np.isnan(drawn["late"][:2]).all() and drawn["late"][2:] == [5, 0]
    assert {name: drawn[name] for name in ("loss", "never", "psnr")} == {
        name: late[name] for name in ("loss", "never", "psnr")
    }
    assert marks == {30: "late, too"}


def test_panels_with_marks_have_one_axis(tmp_path):
    line = {"": ([1, 2, 3], [float("nan"), 2, 3], None)}
    sheets = []
    for name, marks in (("plain", None), ("marked", {2: "late"})):
        curves.panels({"a": {"": ([0, 9], [1, 2], None)}, "b": line}, "step", tmp_path / f"{name}.png", marks)
        sheets.append(np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")))
    assert sheets[0].shape == sheets[1].shape and (sheets[0] != sheets[1]).any()


def test_panels_draw_lines_with_error_bars_and_a_legend(tmp_path):
    def drawn(lines):
        curves.panels({"PSNR": lines}, "code depth", tmp_path / "panels.png")
        return np.asarray(Image.open(tmp_path / "panels.png").convert("L")).astype(int)

    x, y = [1, 2, 3], [1.0, 3.0, 2.0]
    plain, barred, named = drawn({"": (x, y, None)}), drawn({"": (x, y, [0.5] * 3)}), drawn({"D 4": (x, y, None)})
    assert plain.shape == barred.shape == named.shape
    assert (plain != barred).any() and (plain != named).any()
    assert (drawn({"": (["a", "b", "c"], y, None)}) != plain).any()  # names instead of numbers


def test_curves_refuse_what_the_log_does_not_hold(log, tmp_path):
    message = f"names: 'psnr' is not in '{log}'; allowed are eval/psnr, loss, odd, rate"
    with pytest.raises(ValueError, match=re.escape(message)):
        curves.curves(log, ["loss", "psnr"], tmp_path / "curves.png")
    with pytest.raises(ValueError, match="names: empty; give at least one metric"):
        curves.curves(log, [], tmp_path / "curves.png")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        curves.curves(tmp_path / "absent.jsonl", ["loss"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


# files


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png_round_trips_and_replaces(tmp_path, channels):
    path = tmp_path / "new" / "picture.png"
    grids.save_png(path, np.zeros((4, 6, channels), np.uint8))
    picture = random_images(5, 7, channels)
    grids.save_png(path, picture)
    np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(picture.shape), picture)
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2), (1, 4, 6, 3)])
def test_save_png_refuses_other_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match=re.escape(f"image: uint8 {shape} is not allowed; give uint8 (H, W, 1 or 3)")):
        grids.save_png(tmp_path / "picture.png", np.zeros(shape, np.uint8))

"""`python -m rq_jax.data.entropy`: what it measures, tells and writes, and which of its files are read back."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from rq_jax.data import entropy, from_arrays, make_dataset
from rq_jax.data.entropy import Calibration, EntropyHistogram, load_thresholds, shares_above
from rq_jax.grains import entropy_thresholds, route_by_entropy

SIZE, PATCH, NUM_IMAGES = (24, 40), 8, 11
ON_A_BIN = round((1 + 2 / 31 / 2) * 127.5)  # next to the middle of the 32 places
DAMAGED = 4


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Eleven pictures of 15 regions, three of them white; one picture is damaged."""
    monkeypatch.setattr(entropy, "_BATCH_SIZE", 3)
    rng = np.random.default_rng(1)
    for i in range(NUM_IMAGES):
        spread = np.linspace(5, 120, SIZE[1], dtype=int)[None, :, None]
        image = ON_A_BIN + rng.integers(-spread, spread + 1, (*SIZE, 3))
        image[:PATCH, : 3 * PATCH] = 255
        file = tmp_path / "pictures" / "train" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file)
    (tmp_path / "pictures" / "train" / f"{DAMAGED:02d}.png").write_bytes(b"damaged")
    return tmp_path / "pictures"


def command(pictures, out, *more):
    size = ",".join(map(str, SIZE))
    given = ["--name=folder", f"--data_dir={pictures}", f"--image_size={size}", f"--patch_size={PATCH}"]
    return [f"--out={out}", *given, *more]


def calibration_of(out):
    record = json.loads(out.read_text())
    return Calibration(**{field.name: record[field.name] for field in dataclasses.fields(Calibration)})


def entropies_of(pictures, calibration):
    dataset = make_dataset(
        split="train", train=False, name="folder", data_dir=pictures, batch_size=NUM_IMAGES, image_size=SIZE
    )
    return np.asarray(calibration.entropy(dataset.examples([i for i in range(NUM_IMAGES) if i != DAMAGED])["image"]))


@pytest.mark.parametrize("ratios", [(0.5,), (0.3, 0.2), (0.25, 0.125, 0.0625)])
def test_7_the_grains_get_the_shares_asked_for(pictures, tmp_path, capsys, ratios):
    out = tmp_path / "thresholds.json"
    entropy.main(command(pictures, out, f"--fine_ratio={','.join(map(str, ratios))}"))
    calibration = calibration_of(out)
    assert calibration == Calibration("folder", "train", "resize_center_crop", SIZE, NUM_IMAGES, PATCH)
    thresholds, entropies = load_thresholds(out, ratios, calibration), entropies_of(pictures, calibration)
    grains = np.asarray(route_by_entropy(entropies, thresholds))
    printed = capsys.readouterr().out
    assert "11 images (1 damaged), 150 regions of 8 x 8 pixels: entropy 0.000 to " in printed and "ties" not in printed
    for g, ratio in enumerate(ratios, 1):
        share = np.mean(grains == g)
        assert share == pytest.approx(ratio, abs=0.01)
        assert f"grain {g}: {ratio:.3f} asked, {share:.3f} given, above {thresholds[g - 1]:.4f} nats" in printed
    np.testing.assert_allclose(thresholds, entropy_thresholds(entropies, ratios), atol=1e-4)
    assert not out.with_name("thresholds.json.partial").exists()


def test_ties_are_told_with_the_ratios_that_can_be_had(pictures, tmp_path, capsys):
    out = tmp_path / "thresholds.json"
    entropy.main(command(pictures, out, "--fine_ratio=0.9", "--fine_ratio=0.3,0.6"))
    printed = capsys.readouterr().out
    assert "grain 1: 0.900 asked, 0.800 given, above 0.0001 nats" in printed
    assert "grain 1: 0.300 asked, 0.200 given" in printed and "grain 2: 0.600 asked, 0.600 given" in printed
    tie = "ties: 0.200 of the regions have entropy 0.000, and equal regions get equal grains; "
    assert f"{tie}ratios that can be had: 0.000 to 0.800\n" in printed
    assert f"{tie}sums of the ratios from a grain on that can be had: 0.000 to 0.800\n" in printed
    with pytest.raises(ValueError, match=r"for the shares 0.95, 0.9: \[.*\] must be finite and increasing"):
        load_thresholds(out, (0.05, 0.9), calibration_of(out))


@pytest.mark.parametrize("stop", range(4))
def test_an_interrupted_measurement_goes_on_and_gives_the_same_file(pictures, tmp_path, monkeypatch, stop):
    whole, out = tmp_path / "whole.json", tmp_path / "thresholds.json"
    entropy.main(command(pictures, whole))
    add, measure, batches = EntropyHistogram.add, entropy.measure_thresholds, []

    def stopping(histogram, entropies):
        batches.append(len(entropies))
        if len(batches) == stop + 1:
            raise KeyboardInterrupt
        add(histogram, entropies)

    monkeypatch.setattr(EntropyHistogram, "add", stopping)
    monkeypatch.setattr(entropy, "measure_thresholds", lambda *args: measure(*args, save_seconds=0.0))
    with pytest.raises(SystemExit) as ended:
        entropy.main(command(pictures, out))
    assert ended.value.code == 130 and not out.exists()
    entropy.main(command(pictures, out))
    assert batches == [3, 2, 3, 2][: stop + 1] + [3, 2, 3, 2][stop:]  # a padded batch and a damaged image
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("settings", "bins is 'legacy', and was 'full' when the measurement in '{}' was begun; give that, or delete"),
        ("batches", "batch size is 5, and was 3 when the measurement"),
        ("pictures", "images is 10, and was 11 when the measurement"),
        ("half of it", "'{}' is no measurement to go on with; delete '{}' to begin anew"),
        ("all of it", "'{}' is no measurement to go on with"),
    ],
)
def test_a_measurement_of_something_else_is_not_gone_on_with(pictures, tmp_path, monkeypatch, capsys, changed, message):
    out, partial = tmp_path / "thresholds.json", tmp_path / "thresholds.json.partial"
    with monkeypatch.context() as patch:
        patch.setattr(EntropyHistogram, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            entropy.main(command(pictures, out))
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    match changed:
        case "batches":
            monkeypatch.setattr(entropy, "_BATCH_SIZE", 5)
        case "pictures":
            (pictures / "train" / "00.png").unlink()
        case "half of it" | "all of it":
            partial.write_bytes(partial.read_bytes()[: 99 * (changed == "half of it")])
    begun = partial.read_bytes()
    with pytest.raises(SystemExit):
        entropy.main(command(pictures, out, *["--bins=legacy"] * (changed == "settings")))
    assert message.format(partial, partial) in capsys.readouterr().err.splitlines()[-1]
    assert partial.read_bytes() == begun and not out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--fine_ratio=1", "--fine_ratio: 1.0 is outside (0, 1)"),
        ("--fine_ratio=0,0.5", "--fine_ratio: 0.0 is outside (0, 1)"),
        ("--fine_ratio=nan", "--fine_ratio: nan is outside (0, 1)"),
        ("--fine_ratio=0.7,0.6", "--fine_ratio: (0.7, 0.6) add up to 1.3"),
        ("--fine_ratio=half", "argument --fine_ratio: 'half' is not allowed; give 0.5, or 0.3,0.3"),
        ("--image_size=24,36", "images: W = 36 must be a positive multiple of 8, the size of a patch"),
        ("--image_size=0", "image_size: [0] must be at least 1"),
        ("--image_size=8,8,8", "image_size: shape (3,) does not fit"),
        ("--patch_size=0", "patch_size: 0 must be at least 1"),
        ("--transform=random_shift", "transform: 'random_shift' is unknown; allowed are 'resize_center_crop' and"),
        ("--bins=old", "bins: 'old' is unknown"),
        ("--data_dir=nowhere", "nowhere"),
    ],
)
def test_bad_settings_are_one_line(pictures, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        entropy.main(command(pictures, tmp_path / "thresholds.json", given))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("thresholds*"))


def test_any_view_of_a_split_gives_the_same_thresholds(tmp_path):
    images = np.random.default_rng(5).integers(0, 256, (7, *SIZE, 1), np.uint8)
    views = [from_arrays(images, images, batch_size=2)]
    views += [from_arrays(images, images, batch_size=4, shard_index=i, shard_count=2) for i in range(2)]
    calibration = Calibration("arrays", "train", "squash", SIZE, len(images), PATCH)
    files = []
    for view in (views[0].train, views[0].ordered, views[1].train, views[2].ordered):
        entropy.measure_thresholds(tmp_path / "thresholds.json", view, calibration)
        files.append((tmp_path / "thresholds.json").read_bytes())
    assert set(files) == {files[0]}
    thresholds = load_thresholds(tmp_path / "thresholds.json", 0.4, calibration)
    assert np.mean(np.asarray(calibration.entropy(images / np.float32(127.5) - 1)) > thresholds) == 0.4


def test_one_region_has_no_quantiles(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "0.png")
    out = tmp_path / "thresholds.json"
    with pytest.raises(SystemExit):
        entropy.main([f"--out={out}", "--name=folder", f"--data_dir={tmp_path}", "--image_size=8", "--patch_size=8"])
    assert "regions: 1 must be at least 2; give more images, or smaller regions" in capsys.readouterr().err


# --- reading ---

MEASURED = Calibration("twemoji", "lists/train.txt", "squash", 64, 100, 16)
QUANTILES = {"0.3": 2.5, "0.6": 1.5, "0.5": 2.0, "0.2": 1.5}


def write(path, **changes):
    path.write_text(json.dumps({"quantiles": QUANTILES, **MEASURED.record(), **changes}))
    return path


def test_thresholds_are_looked_up_by_the_shares_above_them(tmp_path):
    thresholds = load_thresholds(write(tmp_path / "t.json"), (0.3, 0.3), MEASURED, num_grains=3)
    assert thresholds.dtype == np.float32 and thresholds.tolist() == [1.5, 2.5]
    assert load_thresholds(tmp_path / "t.json", 0.5, MEASURED).tolist() == [2.0]
    assert json.loads((tmp_path / "t.json").read_text())["image_size"] == 64
    assert dataclasses.replace(MEASURED, image_size=(64, 64)) == MEASURED


def test_a_file_of_other_data_is_refused_and_the_fields_named(tmp_path):
    others = dict(data="folder", split="val.txt", transform="resize_center_crop", image_size=(64, 48), images=99)
    others |= dict(patch_size=8, bins="legacy", num_bins=16, sigma=0.02)
    path = write(tmp_path / "t.json")
    for name, value in others.items():
        message = f"'{re.escape(str(path))}' was measured on other data: {name} .* in place of [^:]*; measure"
        with pytest.raises(ValueError, match=message) as error:
            load_thresholds(path, 0.5, dataclasses.replace(MEASURED, **{name: value}))
        assert str(error.value).count("in place of") == 1
    both = r"data: split 'train.txt' in place of 'validation', image_size 64 in place of 32; measure"
    with pytest.raises(ValueError, match=both):
        load_thresholds(path, 0.5, dataclasses.replace(MEASURED, split="validation", image_size=32))


@pytest.mark.parametrize(
    ("ratios", "num_grains", "content", "message"),
    [
        ((1.5,), 2, {}, "fine_ratio: 1.5 is outside"),
        ((0.3, 0.3), 2, {}, "fine_ratio: .* has 2 entries; give 1"),
        ((0.5, 0.6), 3, {}, "fine_ratio: .* add up to 1.1"),
        ((0.25,), 2, {}, "has none for the share 0.25; measure with .* --fine_ratio=0.25"),
        ((0.5,), 2, {"quantiles": {"0.5": "high"}}, "has none for the share 0.5"),
        ((0.5,), 2, {"quantiles": {"0.5": 10**400}}, "has none for the share 0.5"),
        ((0.5,), 2, {"quantiles": {"0.5": True}}, "has none for the share 0.5"),
        ((0.3, 0.2), 3, {"quantiles": {"0.5": 2.0, "0.2": 1.0}}, r"\[2.0, 1.0\] must be finite and increasing"),
        ((0.3, 0.2), 3, {"quantiles": {"0.5": 2.0, "0.2": 2.0}}, r"\[2.0, 2.0\] must be finite and increasing"),
        ((0.5,), 2, {"quantiles": {"0.5": float("nan")}}, "must be finite"),
        ((0.5,), 2, {"quantiles": 3}, "is no thresholds file, it has no quantiles"),
    ],
)
def test_what_a_file_cannot_give_is_one_line(tmp_path, ratios, num_grains, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_thresholds(write(tmp_path / "t.json", **content), ratios, MEASURED, num_grains)
    assert "\n" not in str(error.value)


def test_a_file_of_the_original_is_told_as_one(dq_goldens):
    with pytest.raises(ValueError, match="is a file of the original, which does not say of which data; measure with"):
        load_thresholds(dq_goldens / "dqvae-entropy.thresholds.json", 0.5, MEASURED)


# --- the histogram ---


@pytest.mark.parametrize("ratios", [(0.01,), (0.37,), (0.99,), (0.3, 0.25), (0.5, 0.5)])
def test_a_histogram_splits_as_the_entropies_themselves(ratios):
    entropies = np.random.default_rng(1).beta(0.4, 0.6, 997).astype(np.float32) * np.float32(np.log(32))
    entropies[:200], entropies[200:230] = 0, np.log(2)
    histogram = EntropyHistogram(32)
    for part in np.split(entropies, [10, 500]):
        histogram.add(part)
    for share, exact in zip(shares_above(ratios), np.asarray(entropy_thresholds(entropies, ratios)), strict=True):
        threshold = histogram.threshold(share)
        assert threshold == pytest.approx(exact, abs=2 * np.log(32) / entropy.CELLS)
        assert histogram.share_above(threshold) == np.mean(entropies > np.float32(threshold))
        assert histogram.share_above(threshold) == pytest.approx(np.mean(entropies > exact), abs=2 / 997)


def test_shares_that_can_be_had_leave_out_ties():
    histogram = EntropyHistogram(32)
    histogram.add(np.repeat([0.0, 1.0, 2.0], [30, 20, 50]))
    assert histogram.attainable_shares() == [(0, 0), (0.5, 0.5), (0.7, 0.7), (1, 1)]
    histogram.add(np.linspace(1.001, 1.999, 100))
    np.testing.assert_allclose(histogram.attainable_shares(), [(0, 0), (0.25, 0.75), (0.85, 0.85), (1, 1)], atol=1e-12)


def test_what_is_said_can_be_had_is_had():
    histogram, random = EntropyHistogram(32), np.random.default_rng(7)
    histogram.add(random.uniform(0.1, 3.4, 14_000))
    for tie, count in ((0.0, 4060), (0.69, 1543), (1.7, 827), (2.9, 391)):
        histogram.add(np.repeat(tie, count))
    *_, told = entropy.describe(histogram, 0.95)
    numbers = [float(number) for number in re.findall(r"[01]\.\d+", told.partition("had: ")[2])]
    assert len(numbers) == 8 and numbers == sorted(numbers)
    for number in numbers[1:]:
        (line,) = entropy.describe(histogram, number)
        assert float(line.split()[4]) == pytest.approx(number, abs=0.0015), line

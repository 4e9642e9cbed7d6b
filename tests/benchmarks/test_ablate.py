"""benchmarks.ablate: its commands, notes, tables and images, with the scripts that it runs replaced by what they write."""

import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablate, scripts
from configs import ablations
from rq_jax import checkpoint
from rq_jax.evaluation import stamps
from rq_jax.report import grids

SIDE = 16


class Scripts:
    """Stands in for the scripts: writes what they would, figures that a test can foresee."""

    def __init__(self, root):
        self.root, self.lines = root, []
        self.images = {}  # of sets that were measured on another number

    def __call__(self, script, *options):
        command, *options = options if script == "evaluate.py" else ("", *options)
        given = [tuple(str(option).removeprefix("--").partition("=")[::2]) for option in options]
        self.lines.append((script, given))
        values = dict(given)
        if script in ("train_vae.py", "train_transformer.py"):
            out = self.root / values["workdir"]
            out.mkdir(parents=True, exist_ok=True)
            scalars = {"loss": 2.0 + int(values["config.seed"]), "validation_loss": 3.0, "validation_nats/depth1": 1.0, "validation_nats/depth2": 5.0}  # fmt: skip
            if "configs/dq" in values["config"]:
                scalars |= {"grain_share/grain1": 0.4, "validation_nats/position": 0.5, "bits_per_image": 300.0}
            (out / "metrics.jsonl").write_text(json.dumps({"step": 7, **scalars}) + "\n")
        elif script == "sample.py":
            for i in range(ablate.NUM_SAMPLES):
                grids.save_png(
                    self.root / values["out"] / "images" / f"{i:06d}.png", np.zeros((SIDE, SIDE, 3), np.uint8)
                )
            np.savez(self.root / values["out"] / "codes_000000.npz", image_ids=np.arange(ablate.NUM_SAMPLES))
            chosen = {"mean_score": {"drawn": 0.0, "kept": 1 / float(values["keep"])}} if "keep" in values else {}
            settings = {"chosen": chosen} if chosen else {}
            (self.root / values["out"] / "settings_000000.json").write_text(json.dumps(settings))
        else:
            self.write_evaluation(self.root / values["out"], command, given)
        return f"python {script}"

    def write_evaluation(self, out, command, given):
        tokenizers, samples = ([value for name, value in given if name == kind] for kind in ("checkpoint", "samples"))
        seed = lambda place: int((re.search(r"seed(\d+)", place) or [0, 0])[1])  # noqa: E731
        by_depth = lambda place: [20.0 + seed(place), 25.0 + seed(place)]  # noqa: E731
        names = ("psnr", "ssim", "distance", "sharpness", "code_usage", "code_perplexity", "code_norm")
        results = {
            place: {
                "images": 447,
                "codes_used": 0.5,
                "num_codes": 32.0,
                "bits_per_image": 288.0,
                "fingerprint": "x",
                **{name: by_depth(place) for name in names},
            }  # fmt: skip
            for place in tokenizers
        }
        of = {"training pictures": {"mean": 0.1, "std": 0.0}}
        of |= {f"reconstructions by {place}": {"mean": [0.3, 0.2], "std": [0.0, 0.0]} for place in tokenizers}
        of |= {f"samples {place}": {"mean": 1.0 + seed(place), "std": 0.0} for place in samples}
        nearest = {f"samples {place}": 0.5 for place in samples} | {"held-out pictures": 0.6}
        record = {
            "command": command, "results": results, "kernel_distance": {"of": of},
            **{name: {"of": {f"samples {place}": 0.25 for place in samples}} for name in ablate.MANIFOLD},
            "samples": {"median_squared_distance_to_nearest_training_picture": nearest},
        }  # fmt: skip
        fields = lambda place: {"images": self.images.get(place, 447)}  # noqa: E731
        figures = [stamps.Figure("psnr", place, ("results", place, "psnr"), {"estimator": "dB"}) for place in results]
        figures += [
            stamps.Figure("kernel_distance", name, ("kernel_distance", "of", name), fields(name)) for name in of
        ]
        stamps.attach(record, figures, {})
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{command}.json").write_text(json.dumps(record))
        grids.save_png(out / "reconstructions.png", np.zeros((SIDE, SIDE, 3), np.uint8))


@pytest.fixture
def fake_scripts(tmp_path, monkeypatch):
    fake_scripts = Scripts(tmp_path)
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    monkeypatch.setattr(ablate, "NUM_SAMPLES", 21)
    monkeypatch.setattr(ablate, "run_script", fake_scripts)
    monkeypatch.setattr(
        ablate, "model_of", lambda args: {"transformer": "of " + args.checkpoint, "sample": {"top_k": None}}
    )
    return fake_scripts


@pytest.fixture
def undrawn(monkeypatch):
    """Tables without their image, which takes seconds."""
    monkeypatch.setattr(ablate, "draw_table", lambda *args: None)


def made(table, *options):
    return ablate.run(ablate.parse_args([table, *options]))


@pytest.mark.parametrize("table", ablations.TABLES)
def test_every_table_is_made(fake_scripts, tmp_path, table):
    record = made(table, "--seeds=0,2")
    assert json.loads((tmp_path / "results" / f"{table}.json").read_text()) == json.loads(json.dumps(record))
    assert [row["row"] for row in record["rows"]] == list(ablations.TABLES[table])
    for row in record["rows"]:
        assert row["seeds"] == [0, 2] and len(row["runs"]) == 2
        assert {"command", "seconds", "core_seconds", "commit", "settings"} <= row["runs"][0].keys()
    text = (tmp_path / "results" / f"{table}.md").read_text()
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines())
    assert Image.open(tmp_path / "results" / f"{table}.png").width > 0
    assert str(tmp_path) not in json.dumps(record)  # a record that is committed names no path of a machine


def test_figures_have_mean_and_spread(fake_scripts):
    row = made("updates", "--seeds=0,1,2")["rows"][0]
    assert row["figures"]["psnr"] == {"mean": [21.0, 26.0], "std": [1.0, 1.0], "values": [[20.0, 25.0], [21.0, 26.0], [22.0, 27.0]]}  # fmt: skip
    assert row["figures"]["codes_used"]["mean"] == 0.5 and "fingerprint" not in row["figures"]
    assert made("updates", "--seeds=4", "--workdir=other")["rows"][0]["figures"]["psnr"]["std"] is None


def test_cells(fake_scripts, undrawn, tmp_path):
    made("updates", "--seeds=0,1,2")
    lines = (tmp_path / "results" / "updates.md").read_text().splitlines()
    assert lines[0].startswith("|  | PSNR, dB | SSIM |") and lines[2].startswith("| D 4, K 512 | 26 ± 1 |")
    made("coarse_to_fine", "--seeds=3")
    lines = (tmp_path / "results" / "coarse_to_fine.md").read_text().splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [
        [" D 4, K 512, depth 1 ", " 23 "],
        [" D 4, K 512, depth 2 ", " 28 "],
    ]


def test_what_is_finished_is_not_run_again(fake_scripts):
    trained = lambda: [dict(given)["workdir"] for script, given in fake_scripts.lines if script == "train_vae.py"]  # noqa: E731
    made("updates", "--seeds=0")
    assert len(trained()) == 4
    made("updates", "--seeds=0,1")
    assert len(trained()) == 8 == len(set(trained()))
    made("depth", "--seeds=0")  # has one row in common with the other table
    assert len(trained()) == 14 == len(set(trained()))


def test_an_interrupted_run_has_no_seconds(fake_scripts, tmp_path):
    (tmp_path / "runs" / "ablations" / "no_restart-seed0").mkdir(parents=True)
    seconds = {row["row"]: row["runs"][0]["core_seconds"] for row in made("updates", "--seeds=0")["rows"]}
    assert seconds.pop("no restart") is None and None not in seconds.values()


def test_another_run_in_the_directory_is_refused(fake_scripts):
    made("updates", "--seeds=0", "--quicktest")
    with pytest.raises(
        ValueError, match=r"^--workdir: 'runs/ablations/d_4_k_512-seed0' is a run of .*; give another --workdir$"
    ):
        made("updates", "--seeds=0")


def test_transformers_share_the_tokenizer_of_the_first_seed(fake_scripts):
    record = made("soft_labels", "--seeds=1,2")
    tokenizers = {
        dict(given)["config.tokenizer"] for script, given in fake_scripts.lines if script == "train_transformer.py"
    }
    assert tokenizers == {"runs/ablations/d_4_k_512-seed0"}
    figures = record["rows"][0]["figures"]
    assert figures["kernel_distance"]["values"] == [2.0, 3.0] and figures["loss"]["values"] == [3.0, 4.0]
    assert figures["validation_nats"]["mean"] == [1.0, 5.0]
    assert record["marks"]["kernel distance of reconstructions"] == 0.2


def test_a_table_tells_its_protocols_and_has_one_a_column(fake_scripts, undrawn, capsys):
    fields, stamp = {"images": 447}, stamps.stamp_of({"images": 447})
    record = made("filter", "--seeds=0")
    assert list(record["protocols"]) == ["psnr", "kernel_distance", "kernel_distance_of_reconstructions"]
    assert record["protocols"]["kernel_distance"] == {"stamp": stamp, **fields}
    assert f", kernel_distance {stamp}, " in capsys.readouterr().out
    fake_scripts.images["samples runs/ablations/top_p_0.3-seed0"] = 446
    message = "^protocols: unlike of kernel_distance: images 44[67] against 44[67]; measure both alike$"
    with pytest.raises(ValueError, match=message):
        made("filter", "--seeds=0")


def test_filters_draw_from_the_model_that_is_named(fake_scripts, undrawn):
    made("filter", "--seeds=0", "--checkpoint=elsewhere")
    drawn = [dict(given) for script, given in fake_scripts.lines if script == "sample.py"]
    assert {given["checkpoint"] for given in drawn} == {"elsewhere"} and drawn[0]["top_p"] == "0.3"
    measured = [given[0] for script, given in fake_scripts.lines if script == "evaluate.py"]
    place = "runs/ablations/top_p_0.3-seed0"
    assert measured == [("checkpoint", "elsewhere/tokenizer"), ("samples", place), ("samples", place)]


def test_a_model_that_was_trained_anew_is_another(fake_scripts, undrawn, monkeypatch):
    run = made("filter", "--seeds=0")["rows"][0]["runs"][0]
    assert run["settings"]["model"] == {"transformer": "of checkpoints/emoji", "sample": {"top_k": None}}
    monkeypatch.setattr(ablate, "model_of", lambda args: {"transformer": "new", "sample": {"top_k": None}})
    with pytest.raises(
        ValueError, match="^--workdir: 'runs/ablations/top_p_0.3-seed0' is a run of .*; give another --workdir$"
    ):
        made("filter", "--seeds=0")


def test_the_model_that_ships_is_known_by_its_weights():
    found = ablate.model_of(ablate.parse_args(["filter"]))
    pair = checkpoint.load_model(ablate.ROOT / "checkpoints" / "emoji")
    assert found["transformer"] == checkpoint.fingerprint(pair.variables) and found["sample"] == pair.config["sample"]
    assert found["tokenizer"] == checkpoint.fingerprint(pair.tokenizer.variables)


def test_the_record_has_the_whole_command(fake_scripts, tmp_path):
    record = made("updates", "--seeds=0", "--quicktest", "--workdir=elsewhere")
    assert record["command"] == "python -m benchmarks.ablate updates --seeds=0 --quicktest --workdir=elsewhere"
    # Runs of four steps overwrite no results.
    assert (tmp_path / "elsewhere" / "updates.md").is_file() and not (tmp_path / "results").exists()


@pytest.mark.parametrize("seeds", ["", "a", "1,", "-1"])
def test_seeds_refused(seeds):
    with pytest.raises(ValueError, match="^--seeds: .* is no list of whole numbers; give for example 0,1,2$"):
        ablate.parse_args(["depth", f"--seeds={seeds}"])


def test_a_seed_counts_once():
    with pytest.raises(ValueError, match=r"^--seeds: \[0, 1, 0\] names one twice; the spread is over different ones$"):
        ablate.parse_args(["depth", "--seeds=0,1,0"])


@pytest.mark.parametrize("name, shared, rows", ablations.TRAINED)
def test_rows_change_settings_that_exist(name, shared, rows):
    config = importlib.import_module(f"configs.{name}")
    for changes in rows.values():
        config.get_config("demo").update_from_flattened_dict({**shared, **changes})  # raises where a key does not exist


def test_every_row_has_one_name_and_every_name_a_row():
    names = [name for *_, rows in ablations.TRAINED for name in rows] + list(ablations.DRAWN)
    assert len(names) == len(set(names)) and set().union(*ablations.TABLES.values()) <= set(names)


def test_tables_of_grains_show_codes_bits_and_the_share_of_a_learned_router(fake_scripts, undrawn, tmp_path):
    rows = made("dq_rate", "--seeds=0")["rows"]
    lines = (tmp_path / "results" / "dq_rate.md").read_text().splitlines()
    assert lines[0].startswith("|  | codes | bits | PSNR, dB |") and lines[2].startswith(
        "| fixed, 4x4 | 32 | 288 | 25 |"
    )
    shares = {row["row"]: row["figures"].get("fine_share_in_training", {}).get("mean") for row in rows}
    assert shares["fixed, 8x8"] is None and shares["feature, 32 codes"] == 0.4
    trained = {values["config"] for script, given in fake_scripts.lines if (values := dict(given)).get("workdir")}
    assert trained == {"configs/rqvae.py:demo", "configs/dqvae.py:demo"}


def test_the_curve_over_fine_ratios_has_a_tokenizer_for_each(fake_scripts, undrawn):
    rows = made("dq_ratio", "--seeds=1")["rows"]
    given = [dict(given) for script, given in fake_scripts.lines if script == "train_transformer.py"]
    assert [values["config.tokenizer"] for values in given] == [
        f"runs/ablations/entropy_{ratio}_fine-seed0" for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert rows[0]["figures"]["position_nats"]["mean"] == 0.5
    drawn = [dict(given) for script, given in fake_scripts.lines if script == "sample.py"]
    assert {(values["top_p"], values["position_top_p"]) for values in drawn} == {("1.0", "1.0")}


def test_rejection_tells_the_score_of_what_is_kept(fake_scripts):
    rows = made("rejection", "--seeds=0")["rows"]
    assert [row["figures"]["mean_score"]["mean"] for row in rows] == [1, 2, 4, 8, 20]
    assert {"precision", "recall", "density", "coverage"} <= rows[0]["figures"].keys()


def test_a_command_that_fails_ends_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit) as raised:
        scripts.run_script("broken.py")
    assert raised.value.code == 3
    (tmp_path / "fine.py").write_text("")
    assert scripts.run_script("fine.py", "--shape=(8, 8)") == 'python fine.py "--shape=(8, 8)"'


SAVING = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)
    open("saved", "w").write(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_script_which_saves_in_peace(tmp_path, number):
    (tmp_path / "saving.py").write_text(SAVING)
    program = f"import pathlib; from benchmarks import scripts; scripts.ROOT = pathlib.Path({str(tmp_path)!r}); scripts.run_script('saving.py')"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=scripts.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "$ python saving.py\n" and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert (tmp_path / "saved").read_text() == str(int(number))


@pytest.mark.slow
def test_a_table_for_real(tmp_path):
    path = Path(tmp_path)
    record = made("soft_labels", "--seeds=0", "--quicktest", f"--workdir={path / 'runs'}", f"--out={path / 'out'}")
    assert record["rows"][0]["runs"][0]["steps"] == 4
    assert np.isfinite(record["rows"][0]["figures"]["kernel_distance"]["mean"])

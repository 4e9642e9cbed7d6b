"""benchmarks.protocols: one set of samples under several protocols, with evaluate.py replaced by what it writes."""

import json

import pytest
from helpers import ROOT

from benchmarks import protocols
from rq_jax.evaluation import stamps


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """The options that evaluate.py was given; it finds distances that seed and choice decide."""
    calls = []

    def run_script(script, command, *options):
        given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
        calls.append(given)
        factor = 2.0 if given.get("protocol") == "clean" else 1.0
        record = {"kernel_distance": {"mean": factor * (0.1 + int(given["seed"])), "std": 0.5}, "frechet_distance": 7.0}
        fields = {"split": given.get("split", "validation"), "resize": given.get("protocol") or "house"}
        figures = [stamps.Figure(name, "samples x", (name,), fields) for name in record]
        stamps.attach(record, figures, {"samples x": {"checkpoint": given["samples"]}})
        (tmp_path / given["out"]).mkdir(parents=True)
        (tmp_path / given["out"] / "samples.json").write_text(json.dumps(record))

    monkeypatch.setattr(protocols, "ROOT", tmp_path)
    monkeypatch.setattr(protocols, "run_script", run_script)
    return calls


def test_each_choice_is_measured_once_and_beside_the_house(measured, tmp_path, capsys):
    record = protocols.run(protocols.parse_args(["--seeds=0,2"]))
    assert record == json.loads((tmp_path / "results" / "protocols.json").read_text())
    assert len(measured) == 2 * len(protocols.CHOICES) == len({given["out"] for given in measured})
    rows = {row["choice"]: row for row in record["rows"]}
    assert rows["house"]["kernel_distance"]["values"] == [0.1, 2.1] and rows["house"]["differences"] == []
    cubic = rows["cubic resize before the network"]
    assert cubic["kernel_distance"]["change"] == pytest.approx(100) and cubic["frechet_distance"]["change"] == 0
    assert cubic["kernel_distance"]["mean"] == pytest.approx(2.2)
    assert cubic["kernel_distance"]["std"] == pytest.approx(8**0.5)
    assert rows["against the training images"]["differences"] == ["split 'validation' against 'train'"]
    text = (tmp_path / "results" / "protocols.md").read_text()
    assert "| cubic resize before the network | 2.2 ± 2.8 | +100.0 % |" in text and text in capsys.readouterr().out
    protocols.run(protocols.parse_args(["--seeds=0,2"]))
    assert len(measured) == 2 * len(protocols.CHOICES)  # what is measured is not measured again


def test_figures_of_another_model_are_not_taken_for_its_own(measured):
    protocols.run(protocols.parse_args(["--seeds=0"]))
    message = "^--workdir: '.*0-seed0/samples.json' is of checkpoints/emoji, not of 'other'; give another$"
    with pytest.raises(ValueError, match=message):
        protocols.run(protocols.parse_args(["--seeds=0", "--checkpoint=other"]))


def test_the_same_samples_are_compared_with_training_images():
    """Another split would change their number and classes, too."""
    assert protocols.CHOICES["against the training images"] == {
        "split": "train", "num_images": 447, "classes_of": "validation",
    }  # fmt: skip
    record = json.loads((ROOT / "checkpoints" / "emoji" / "figures" / "samples.json").read_text())
    assert {one["reference images"] for one in record["protocols"].values()} == {protocols.NUM_IMAGES}


@pytest.mark.parametrize("seeds, message", [("0,-1", "at least 0"), ("1,1", "twice"), ("a", "invalid")])
def test_seeds_refused(seeds, message):
    with pytest.raises(ValueError, match=f"^--seeds: .*{message}"):
        protocols.parse_args([f"--seeds={seeds}"])

"""Figures of the README and the manual are those of the JSON records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import huggingface_hub
import numpy as np
import pytest

from configs import ablations

ROOT = helpers.ROOT
BENCHMARKS = ROOT / "benchmarks" / "results"


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _has(page: str, *texts: str) -> None:
    flat = " ".join(_text(page).split())
    assert [text for text in texts if text not in flat] == [], page


def _row(title: str, values: list[float], form: Callable[[float], str] = "{:.3f}".format) -> str:
    return f"| {title} | {' | '.join(map(form, values))} |"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_ablation_tables_are_those_of_their_files():
    page = _text("docs/results.md")
    for name in ablations.TABLES:
        assert f"`make results-{name}`" in page
        if not (path := ROOT / "results" / f"{name}.md").is_file():
            assert f"`make results-{name}`" in page.partition("### Not yet made")[2], name
            continue
        shown = path.read_text(encoding="utf-8") in page
        assert shown or f"../results/{name}.png" in page, name


def test_the_table_of_protocols_is_that_of_its_file():
    assert (ROOT / "results" / "protocols.md").read_text(encoding="utf-8") in _text("docs/results.md")


def test_the_model_card_has_the_figures_of_the_shipped_model():
    card = huggingface_hub.ModelCard.load(ROOT / "checkpoints" / "emoji" / "README.md").data
    tokenizer, samples = (
        _read(ROOT / "checkpoints" / "emoji" / "figures" / f"{n}.json") for n in ("tokenizer", "samples")
    )
    (figures,) = tokenizer["results"].values()
    reconstructions, drawn = (
        next(value["mean"] for name, value in record["kernel_distance"]["of"].items() if name.startswith(of))
        for record, of in ((tokenizer, "reconstructions"), (samples, "samples"))
    )
    found = {(result.task_type, result.metric_type): result.metric_value for result in card.eval_results}
    rebuilt = "image-to-image"
    assert found == {
        (rebuilt, "psnr"): round(figures["psnr"][-1], 2),
        (rebuilt, "ssim"): round(figures["ssim"][-1], 3),
        (rebuilt, "perceptual_distance"): round(figures["distance"][-1], 3),
        (rebuilt, "kernel_distance"): round(reconstructions[-1], 3),
        ("unconditional-image-generation", "kernel_distance"): round(drawn, 3),
    }
    data = {record["data"]["name"] for record in (tokenizer, samples)}
    assert set(card.datasets) == data == {result.dataset_type for result in card.eval_results}
    assert (card.license, card.library_name) == ("cc-by-4.0", "rq_jax")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "checkpoints/emoji/README.md"])
def test_figures_of_the_shipped_model(page):
    commands = ("tokenizer", "samples", "neighbours", "likelihood")
    records = {name: _read(ROOT / "checkpoints" / "emoji" / "figures" / f"{name}.json") for name in commands}
    (tokenizer,) = records["tokenizer"]["results"].values()
    of = records["tokenizer"]["kernel_distance"]["of"] | records["samples"]["kernel_distance"]["of"]
    distances = {name.split()[0]: value for name, value in of.items()}
    reconstructions = distances["reconstructions"]
    _has(
        page,
        f"{tokenizer['images']} held-out images",
        _row("PSNR, dB", tokenizer["psnr"], "{:.2f}".format),
        _row("SSIM", tokenizer["ssim"]),
        _row("perceptual distance (VGG16)", tokenizer["distance"]),
    )
    if page == "README.md":
        _has(page, _row("kernel distance", reconstructions["mean"]))
        _has(page, f"kernel distance of {distances['samples']['mean']:.3f}", f"{distances['training']['mean']:.3f}.")
        return
    nats, percent = records["likelihood"]["likelihood"], lambda share: f"{100 * share:.1f} %"
    _has(
        page,
        _row("kernel distance of reconstructions", reconstructions["mean"]),
        _row(f"codes used, of 1,024 (all depths: {percent(tokenizer['codes_used'])})", tokenizer["code_usage"], percent),
        _row("mean norm of the codes", tokenizer["code_norm"], "{:.2f}".format),
        _row("transformer, nats per code: held-out images", nats["validation"]["nats"], "{:.2f}".format),
        _row("the same: training images", nats["train"]["nats"], "{:.2f}".format),
        *(f"{distances[kind]['mean']:.3f} ± {distances[kind]['std']:.3f}" for kind in ("training", "samples")),
        f"{reconstructions['mean'][-1]:.3f} ± {reconstructions['std'][-1]:.3f}",
    )  # fmt: skip
    if page == "docs/results.md":
        for name in ("precision", "recall", "density", "coverage"):
            found = {of.split()[0]: value for of, value in records["samples"][name]["of"].items()}
            _has(page, _row(name, [found["samples"], found["training"]]))
    if page == "checkpoints/emoji/README.md":
        nearest = records["neighbours"]["samples"]["median_squared_distance_to_nearest_training_picture"]
        ours, theirs = (round(value) for _, value in sorted(nearest.items(), reverse=True))
        _has(page, f"{nats['train']['mean']:.2f} nats a code against {nats['validation']['mean']:.2f}")
        _has(page, f"nearest training image is {ours}, that of a held-out image {theirs}.")
        subsets = records["samples"]["kernel_distance"]
        _has(page, f"{subsets['num_subsets']} subsets of {subsets['subset_size']}")


def test_figures_of_the_model_by_text():
    page, pair = "checkpoints/avatars/README.md", ROOT / "checkpoints" / "avatars"
    logged = json.loads((pair / "tokenizer" / "metrics.jsonl").read_text().splitlines()[-1])
    nats = [line for line in (pair / "metrics.jsonl").read_text().splitlines() if "validation_nats/depth4" in line]
    nats = json.loads(nats[-1])
    _has(
        page,
        _row("PSNR, dB", [logged[f"psnr/depth{d}"] for d in range(1, 5)], "{:.2f}".format),
        _row("transformer, nats per code", [nats[f"validation_nats/depth{d}"] for d in range(1, 5)], "{:.2f}".format),
        f"SSIM is {logged['ssim']:.3f} and their perceptual distance (VGG16) {logged['distance/hed_vgg16']:.3f}.",
    )
    distances = _read(pair / "figures" / "samples.json")["kernel_distance"]["of"]
    _has(
        page,
        f"(KID's unbiased estimate on EfficientNet-Lite0 features) is {next(iter(distances.values()))['mean']:.3f}",
    )
    rebuilt = _read(pair / "figures" / "tokenizer.json")["kernel_distance"]["of"]
    _has(page, f"that of their reconstructions {np.atleast_1d(next(iter(rebuilt.values()))['mean'])[-1]:.3f}.")
    percent = lambda value: f"{100 * (value['mean'] if isinstance(value, dict) else value):.1f} %"  # noqa: E731
    splits = _read(pair / "figures" / "attributes.json")["splits"]
    found = [splits[split]["figures"] for split in ("validation", "unseen")]
    for name, title in (("accuracy", "what captions name, seen"), ("retrieval", "the right caption, of ten")):
        sets = ("held-out images", "their reconstructions", "samples at guidance 2.5")
        cells = [figures[of][name] for figures in found for of in sets]
        _has(page, _row(title, [*cells, found[0]["chance"][name]], percent))
    by_scale = _read(pair / "figures" / "guidance.json")["splits"]["validation"]["figures"]
    shown = [by_scale[f"samples at guidance {scale}"]["accuracy"]["mean"] for scale in ("1", "1.5", "2.5", "4")]
    _has(page, "{:.0%} at scale 1, {:.0%} at 1.5, {:.0%} at 2.5 and {:.0%} at 4".format(*shown).replace("%", " %"))
    ratios = [figures["samples at guidance 2.5"]["accuracy_ratio"]["mean"] for figures in found]
    combined = found[1]["samples at guidance 2.5"]["combinations_ratio"]["mean"]
    for told in ("{:.2f} times as often as in the images", "({:.2f} times for unseen"):
        _has(page, told.format(ratios.pop(0)))
    _has(page, f"combinations that training never showed {combined:.2f} times as often.")


def test_programs_compiled_for_devices_that_are_not_here():
    """Every row of the table, those of the commit before activations were laid out too."""
    shown = 0
    for path in sorted(BENCHMARKS.glob("compile-*.json")):
        for result in _read(path)["results"]:
            config, gib = result["config"], result["gib_per_device"]
            stage = {"1": "stage 1", "2": "stage 2"}.get(config["stage"], "sampling")
            stage += ", gradients split" * (config.get("gradients") == "sharded")
            stage += ", before" * path.stem.startswith("compile-before")
            mesh, batch = config["target"], str(config["batch"])
            if config.get("mesh"):
                mesh = f"{mesh}, {'x'.join(map(str, config['mesh']))}"
                batch += f" / {config['accumulation_steps']}"
            cells = [f"`{config['preset']}`, {stage}", mesh, batch, f"{gib['parameters']:.2f}"]
            cells += [f"{gib['optimizer']:.2f}" if "optimizer" in gib else "", f"{gib['temporaries']:.1f}"]
            cells += [f"{gib['peak']:.1f} of {gib['device']:.0f}"]
            moved = [sum(row[name] for row in result["collectives"]) / 1024 for name in ("mib", "mib_of_batch")]
            cells += [f"{gib_moved:.1f}" if config.get("mesh") else "" for gib_moved in moved]
            cells += [f"{result['seconds']['predicted']:.3g}", f"{result['compile_seconds']:.0f}"]
            _has("docs/scaling.md", " ".join(f"| {' | '.join(cells)} |".split()))
            shown += 1
    assert shown == _text("docs/scaling.md").count("\n| `imagenet256") > 0


def _benchmarks() -> list[dict[str, Any]]:
    return [_read(path) for path in sorted(BENCHMARKS.glob("cpu-*.json"))]


def _medians(benchmark: str, **config: Any) -> list[float]:
    """Median seconds of the newest record whose configurations all fit, one a configuration."""
    found = []
    for record in _benchmarks():
        results = [r for r in record["results"] if all(r["config"].get(k) == v for k, v in config.items())]
        if record["benchmark"] == benchmark and results:
            found = [result["seconds"]["median"] for result in results]
    return found


def test_speed_of_sampling():
    page, shape = "docs/performance.md", [8, 8, 4]
    plain = _medians("sample", code_shape=shape, weights="float32", top_p=None)
    _has(page, "| float32 | {:.2f} | {:.2f} | {:.1f} |".format(*plain))
    narrow = _medians("sample", code_shape=shape, weights="bfloat16")
    _has(page, "| weights stored in bfloat16 | {:.2f} | {:.2f} | {:.1f} |".format(*narrow))
    filtered = _medians("sample", code_shape=shape, weights="float32", top_k=2048, top_p=0.95)
    added = [round(100 * (a / b - 1)) for a, b in zip(filtered, plain, strict=True)]
    _has(page, "Top-k and top-p together add {}, {} and {} %".format(*added))
    slower = sorted(a / b for a, b in zip(_medians("sample", weights="int8"), plain, strict=True))
    for name in (page, "README.md"):
        _has(name, f"{slower[0]:.1f} to {slower[-1]:.1f} times as long as float32")
    records = [r for r in _benchmarks() if r["benchmark"] == "sample" and r["arguments"]["model"] != ["dq_small"]]
    (pairs,) = (r["comparisons"] for r in records if r["comparisons"])
    measured, counted = ([f"{value:.1f}" for value in values] for values in zip(
        *((pair["ratio"]["median"], pair["predicted"]) for pair in pairs), strict=True))  # fmt: skip
    _has(page, "drawn {}, {} and {} times as fast".format(*measured), "gives {}, {} and {}.".format(*counted))


def test_speed_of_grains():
    page, seconds = "docs/performance.md", {}
    for record in _benchmarks():
        for result in record["results"]:
            if (config := result["config"]).get("model") == "dq_small":
                drawn_by = "released" if config.get("as_released") else "ours"
                seconds[drawn_by, config["batch"], config["fine_ratio"]] = result
    each = {key: result["seconds"]["median"] / result["count"] for key, result in seconds.items()}
    half, fine = ([each["ours", batch, ratio] for batch in (8, 1)] for ratio in (0.5, 1.0))
    _has(
        page,
        "| half of the regions fine, 644 tokens | {:.1f} | {:.1f} |".format(*half),
        "| all fine, 1,028 tokens | {:.1f} | {:.1f} |".format(*fine),
        f"| as released, 644 tokens | {each['released', 8, 0.5]:.0f} | |",
        f"{each['released', 8, 0.5] / half[0]:.0f} times as fast as the released sampler",
        f"{fine[0] / half[0]:.1f} times as fast as all fine",
    )
    _has(page, f"{100 * seconds['ours', 1, 0.5]['roofline']['fraction']:.0f} % of the rate")


def test_speed_of_buckets():
    (record,) = (r for r in _benchmarks() if r["benchmark"] == "train" and r["arguments"]["buckets"])
    (pair,), (ours, padded) = record["comparisons"], record["results"]
    _has(
        "docs/performance.md",
        f"{ours['tokens_per_image']:.0f} tokens an image become {ours['padded_tokens']:.0f} with pads",
        f"trains {pair['ratio']['median']:.2f} times as many images a second",
        f"padded to {padded['padded_tokens']:,.0f}",
        f"The arithmetic gives {pair['predicted']:.2f}",
    )


def test_speed_of_search_and_data():
    page = "docs/performance.md"
    for count, depth, row in (
        (8192, 4, "| 8,192 x 256, 16,384 | {:.2f} | {:.2f} |"),
        (65536, 1, "| 65,536 x 256, 16,384 | {:.1f}, in 84 MB | {:.1f}, in 4.3 GB |"),
        (1048576, 1, "| 1,048,576 x 64, 256, three depths together | {:.1f} | {:.1f} |"),
    ):
        ((ours,), (plain,)) = (_medians("quantize", num_vectors=count, method=m) for m in ("search", "dense_search"))
        _has(page, row.format(ours / depth, plain / depth))
    data = {}
    for record in _benchmarks():
        for result in record["results"] if record["benchmark"] == "data" else ():
            if result["config"]["num_threads"] == 1:
                data[result["config"]["preset"]] = round(result["per_second"], -2)
    _has(page, f"{data['demo']:,.0f} images a second for the demo and {data['emoji']:,.0f} for the shipped")

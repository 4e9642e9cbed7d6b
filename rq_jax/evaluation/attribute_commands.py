"""What evaluate.py measures of samples of a text-conditional transformer, attribute by attribute: see `commands`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation import descriptions, drawn_sets, image_sets, protocol, stamps
from rq_jax.evaluation.attribute_figures import HELD_OUT, AskedSplit, Judges, Rebuilt, overall
from rq_jax.evaluation.attributes import check_count, fit
from rq_jax.evaluation.conditions import kind_of
from rq_jax.evaluation.descriptions import Description
from rq_jax.evaluation.drawn_sets import DrawSettings
from rq_jax.evaluation.features import FeatureExtractor, make_reconstruct
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.evaluation.prompts import make_text_features
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_comparison import cache_of, open_extractor
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Estimators
from rq_jax.pretrained import clip, clip_text
from rq_jax.report import curves, tables
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

SPLITS = ("validation", "unseen")
SAMPLES = "samples"

Mesh = jax.sharding.Mesh
Draws = dict[str, list[DrawSettings]]  # name of a set of samples -> how it is drawn with each seed


def attributes(args: Any, mesh: Mesh) -> Report:
    """How often samples show what their captions name, beside held-out images of these captions, and chance."""
    loaded, data = _open(args, mesh)
    label = descriptions.label_key_of(data)
    splits, draws = _choose_splits(args, data), _choose_draws(args, loaded)
    described = {split: descriptions.of_captions(data, split, label, args.num_images) for split in splits}
    tokens = _tokenize(args, described)
    features = SetFeatures(open_extractor(args, mesh), data, Estimators(), cache_of(args), has_logits=False)
    models = drawn_sets.fingerprints(loaded)
    judges = _fit_judges(args, mesh, features, label, loaded.tokenizer, models["tokenizer"])
    draw = _drawer(args, loaded, models, data.batch_size)
    report, found = Report({"data": protocol.told_settings(data.settings, args.checkpoint), "splits": {}}), {}
    for i, split in enumerate(splits):
        asked = AskedSplit(judges, split, args.num_images, described[split], tokens.get(split))
        for name, settings in draws.items():
            asked.add_samples(name, (draw(asked, one) for one in settings))
        asked.add_to(report)
        path = Path(args.out) / f"attributes{i or ''}.png"
        report.picture(path, asked.sheet(), f"held-out images and samples, {split}")
        found[split] = asked.figures
    if len(draws) > 1:
        _add_scales(report, Path(args.out) / "guidance.png", found, draws)
    return report


def _open(args: Any, mesh: Mesh) -> tuple[LoadedModel, EvaluationData]:
    """The transformer, and the data set with its captions."""
    check_count("--num_images", args.num_images)
    checks.at_least("--num_fitted", args.num_fitted, 1)
    loaded = drawn_sets.load(args.checkpoint, args.step, not args.no_ema, "--checkpoint")
    if (kind := kind_of(loaded)) != "text":
        raise ValueError(f"--checkpoint: '{args.checkpoint}' is {kind}, and draws nothing of a text; give one by text")
    tokenizer = loaded.tokenizer.model
    shape = *tokenizer.image_shape, tokenizer.in_channels
    settings = protocol.image_settings(loaded.config, shape, args.checkpoint, args.data_name, args.data_dir)
    settings |= protocol.condition_settings(loaded.config, args.checkpoint)
    return loaded, EvaluationData(settings, "validation", args.batch_size, sharding.batch_part(mesh))


def _choose_splits(args: Any, data: EvaluationData) -> Sequence[str]:
    """The held-out splits.

    Raises:
      ValueError: none, or one that is not held out, or has too few images.
    """
    counts = data.training().source.records.split_counts
    chosen = args.splits or [split for split in SPLITS if data.split_name(split) in counts]
    if not chosen:
        raise ValueError(f"--splits: unset, and there is no {' or '.join(SPLITS)}; give some of {', '.join(counts)}")
    checks.distinct("--splits", chosen)
    for split in chosen:
        if data.split_name(split).partition("[")[0] == data.split_name("train").partition("[")[0]:
            raise ValueError(f"--splits: {quoted(split)} is what classifiers are fitted to; give held-out splits")
        check_count(f"--splits: images of {quoted(split)}", data.open(split).num_examples)
    return chosen


def _choose_draws(args: Any, loaded: LoadedModel) -> Draws:
    """How samples are drawn, by scale of guidance.

    Raises:
      ValueError: seeds, scales or filters that are not allowed.
    """
    checks.at_least("--seeds", args.seeds, 0)
    checks.distinct("--seeds", args.seeds)
    checks.distinct("--guidance", args.guidance)
    filters = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "weights")}
    draws = {}
    for guidance in sorted(args.guidance) or [None]:
        settings = DrawSettings(guidance=guidance, **filters)
        scale = drawn_sets.filters_of(loaded, settings).get("guidance")
        name = SAMPLES if scale is None else f"{SAMPLES} at guidance {scale:g}"
        draws[name] = [settings._replace(seed=seed) for seed in args.seeds]
    return draws


def _tokenize(args: Any, described: Mapping[str, Mapping[int, Description]]) -> dict[str, dict[int, np.ndarray]]:
    """Tokens of the captions for CLIP, by split and position; empty without CLIP."""
    if not args.clip:
        return {}
    tokenizer, tokens = clip_text.load_tokenizer(args.cut_captions), {}
    for split, found in described.items():
        tokens[split] = dict(zip(found, tokenizer([one.caption for one in found.values()]), strict=True))
    return tokens


def _fit_judges(
    args: Any, mesh: Mesh, features: SetFeatures, label: str, tokenizer: LoadedModel, fingerprint: str
) -> Judges:
    """Classifiers of attributes, fitted to training images and their reconstructions; CLIP, where its file is given.

    Samples come out of the tokenizer's decoder: classifiers that never saw its softness would judge that.
    """
    data, of_clip = features.data, ()
    if args.clip:
        extractor = FeatureExtractor(clip.load(args.clip), mesh, PROTOCOLS["house"])
        by_clip = SetFeatures(extractor, data, Estimators(), cache_of(args), has_logits=False)
        of_clip = by_clip, make_text_features(extractor.net)
    training = descriptions.of_training(data, label)
    rebuilt = Rebuilt(make_reconstruct(tokenizer, mesh, by_depth=False), fingerprint)
    title, at_most = "features of training images", args.num_fitted
    fitted = features.of_split(title, "train", at_most=at_most)
    soft = rebuilt.features(features, f"{title}, reconstructed", "train", at_most)
    found = [training[i] for part in (fitted, soft) for i in part.positions.tolist()]
    classifiers = fit(np.concatenate([fitted.vectors[0], soft.vectors[0]]), found, label)
    of_fitted = data.fields("train", fitted.positions)
    fields = {f"fitted {name}": of_fitted[name] for name in ("split", "images", "ids")}
    fields |= {"fitted to reconstructions by": rebuilt.by}
    seen = descriptions.seen_combinations(training.values())
    return Judges(label, classifiers, seen, fields, features, rebuilt, *of_clip)


def _drawer(
    args: Any, loaded: LoadedModel, models: Mapping[str, str], batch_size: int
) -> Callable[[AskedSplit, DrawSettings], image_sets.ImageSet]:
    """The function that gives a sample of each caption, drawn once they are read."""
    ema, origin = not args.no_ema, checkpoint.origin_of(args.checkpoint)
    subject = {**origin, "ema": ema, "step": checkpoint.step_of(args.checkpoint, args.step, ema)}

    def draw(asked: AskedSplit, settings: DrawSettings) -> image_sets.ImageSet:
        settings, texts = settings._replace(num_images=len(asked.asked)), [one.caption for one in asked.asked]
        drawn = drawn_sets.draw_set(loaded, args.checkpoint, settings, texts=texts, models=models, **subject)
        return image_sets.in_memory(drawn, batch_size)

    return draw


def _add_scales(report: Report, path: Path, found: Mapping[str, Mapping[str, Any]], draws: Draws) -> None:
    """Adds a row for each scale of guidance to a table, and a plot of the accuracy against it."""
    scales, panels, rows = [settings[0].guidance for settings in draws.values()], {}, []
    for split, figures in found.items():
        for scale, name in zip(scales, draws, strict=True):
            shown = {key: stamps.shown(value)[0] for key, value in overall(figures[name]).items()}
            rows.append({"split": split, "guidance": f"{scale:g}", **shown})
        accuracy = [figures[name]["accuracy"] for name in draws]
        means, stds = ([one[key] for one in accuracy] for key in ("mean", "std"))
        own = [figures[HELD_OUT]["accuracy"]] * len(scales)
        panels[f"accuracy, {split}"] = {SAMPLES: (scales, means, stds), HELD_OUT: (scales, own, None)}
    report.told.append(tables.table(rows))
    if jax.process_index() == 0:
        curves.panels(panels, "guidance", path)
    report.told.append(f"accuracy against guidance: {path}")

"""What evaluate.py measures of sets of images: see `commands`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation import drawn_sets, image_sets, neighbours, protocol, references
from rq_jax.evaluation.drawn_sets import DrawSettings
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.prompts import PromptScores
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_comparison import SetComparison, cache_of, open_extractor
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Estimators
from rq_jax.evaluation.stamps import Figure

Mesh = jax.sharding.Mesh


# --- which images ---


def _open_samples(
    args: Any, mesh: Mesh, split: str, as_bytes: bool = True, count: int | None = None, has_data: bool = True
) -> tuple[list[ImageSet], EvaluationData]:
    """The sets that `--samples` names, and the data set that they are compared with.

    Args:
      args: the flags of a command.
      mesh: of the devices that share a batch.
      split: where no flag names one.
      as_bytes: what is drawn is rounded to 8 bits.
      count: images to draw where no flag says so; None: as many as are held out.
      has_data: a data set is needed.
    """
    models = _load_models(args)
    settings = DrawSettings(*(getattr(args, name) for name in DrawSettings._fields))
    if not models and (given := settings.given()):
        name, value = next(iter(given.items()))
        raise ValueError(f"--{name}: {value} is for a stage-2 checkpoint in --samples, and there is none; leave it out")
    files = {path: image_sets.open_images(path) for path in args.samples if path not in models}
    shapes = [one.shape for one in files.values()]
    shapes += [(*one.tokenizer.model.image_shape, one.tokenizer.model.in_channels) for one in models.values()]
    config = next(iter(models.values())).config if models else None
    data = EvaluationData({}, args.split or split, args.batch_size, sharding.batch_part(mesh))
    if has_data:
        of_data = protocol.image_settings(config, shapes[0], args.samples[0], args.data_name, args.data_dir)
        data = EvaluationData(of_data, data.split, data.batch_size, data.part)
    given_sets = []
    for path in args.samples:
        if path in models:
            chosen = _fill_in(settings, models[path], path, data, count)
            step = checkpoint.step_of(path, args.step, not args.no_ema)
            subject = {**checkpoint.origin_of(path), "ema": not args.no_ema, "step": step}
            given_sets.append(drawn_sets.draw_set(models[path], path, chosen, as_bytes, **subject))
        else:
            given_sets.append(files[path])
    image_sets.check_shapes(given_sets)
    return given_sets, data


def _load_models(args: Any) -> dict[str, LoadedModel]:
    """The transformers among `--samples`, by path; of their data set `--data_dir` says where it lies now."""
    paths = filter(drawn_sets.is_transformer, args.samples)
    models = {path: drawn_sets.load(path, args.step, not args.no_ema) for path in paths}
    names = [(one.config.get("data") or {}).get("name") for one in models.values()]
    name = args.data_name or next(iter(names), None)
    return {path: one._replace(config=protocol.moved(one.config, name, args.data_dir)) for path, one in models.items()}


def _fill_in(
    settings: DrawSettings, loaded: LoadedModel, path: str, data: EvaluationData, count: int | None
) -> DrawSettings:
    """The number of images and the split of their classes or captions, where no flag gives them.

    Raises:
      ValueError: nothing says how many images, or which texts.
    """
    if settings.num_images is None:
        if count is None and not data.settings:
            raise ValueError("--num_images: unset, and the reference does not say how many; give it")
        settings = settings._replace(num_images=data.held_out().num_examples if count is None else count)
    kind, known = drawn_sets.kind_of(loaded), protocol.trained_on(loaded.config, ("label_key", "text_key"))
    if data.settings and kind == "class" and settings.classes_of is None and "label_key" in known:
        settings = settings._replace(classes_of=data.split)
    if kind != "text" or (settings.prompts, settings.prompts_of) != (None, None):
        return settings
    if not data.settings or "text_key" not in known:
        instead = "" if data.settings else ", or --data_name in place of --reference"
        raise ValueError(
            f"--prompts: unset, and '{path}' draws images of texts; give --prompts or --prompts_of{instead}"
        )
    return settings._replace(prompts_of=data.split)


def _labels(args: Any, data: EvaluationData, given: Sequence[ImageSet]) -> tuple[np.ndarray, Sequence[str]] | None:
    """Classes of the held-out images, in order, and all names; None where classes are not asked for."""
    if args.label_key is None:
        return None
    if not any(one.conditions is not None and one.conditions.shape[1:] == (1,) for one in given):
        raise ValueError(
            f"--label_key: {args.label_key} needs samples with known classes, and none has any; leave it out"
        )
    of_classes = EvaluationData({**data.settings, "label_key": args.label_key}, data.split, data.batch_size)
    dataset = of_classes.held_out()
    labels = [batch["cond"][batch["mask"], 0] for batch in dataset.iterator()]
    return np.concatenate(labels), dataset.class_names


# --- commands ---


def samples(args: Any, mesh: Mesh) -> Report:
    """Figures of sets of samples against the held-out images, or a file, beside those of training images."""
    extractor = open_extractor(args, mesh)
    file = references.read(args.reference, extractor) if args.reference else None
    named = extractor.protocol
    count = None if file is None else file.count
    given, data = _open_samples(args, mesh, named.reference, named.rounds_samples, count, has_data=file is None)
    report = Report({"data": {**data.settings, "split": data.split}} if file is None else {"reference": args.reference})
    if file is not None and args.label_key:
        raise ValueError(f"--label_key: {args.label_key} needs a data set, and --reference is a file; leave out one")
    sizes = {one.name: one.num_images for one in given}
    comparison = SetComparison(args, extractor, data, report, sizes, reference=file)
    prompts = PromptScores(args, mesh, data, given) if args.clip else None
    labels = _labels(args, data, given)
    report.told.append(f"protocol {named.name}: {named.source}")
    comparison.add_floor()
    for one in given:
        found = comparison.add_samples(one)
        if labels is not None and one.conditions is not None and one.conditions.shape[1] == 1:
            comparison.add_classes(one, found, *labels)
        if prompts is not None and one.prompts is not None:
            prompts.add(one, report)
    report.record["samples"] = {"images": sizes}
    return report


def reference(args: Any, mesh: Mesh) -> Report:
    """Statistics and features of a split, for `samples --reference`."""
    extractor = open_extractor(args, mesh)
    size = [args.image_size] * 2 if isinstance(args.image_size, int) else list(args.image_size)
    settings = {
        "name": args.data_name, "eval_transform": args.transform, "image_size": size, "channels": args.channels,
    }  # fmt: skip
    if args.data_dir:
        settings["data_dir"] = args.data_dir
    split = args.split or extractor.protocol.reference
    data = EvaluationData(settings, split, args.batch_size, sharding.batch_part(mesh))
    score_split = extractor.protocol.score_split
    features = SetFeatures(extractor, data, Estimators(score_split=score_split), cache_of(args))
    found = features.of_split("features of the reference", split)
    of_images = references.fields_of_split(data.fields(split, found.positions))
    path = Path(args.out) / "reference.npz"
    if jax.process_index() == 0:
        references.write(path, found, of_images, extractor.fields(True))
    report = Report({"data": {**settings, "split": split}, "protocol": {**of_images, **extractor.fields(True)}})
    report.record |= {"images": len(found.positions), "features": extractor.net.name, "file": str(path)}
    report.told.append(f"statistics of {len(found.positions)} images: {path}")
    return report


def neighbour_distances(args: Any, mesh: Mesh) -> Report:
    """Distances of samples to the nearest images of another set, beside those of held-out images, and sheets."""
    given, data = _open_samples(args, mesh, "validation")
    extractor = open_extractor(args, mesh)
    features = SetFeatures(extractor, data, Estimators(score_split=extractor.protocol.score_split), cache_of(args))
    report = Report({"data": {**data.settings, "split": data.split}, "features": extractor.net.name})
    among = image_sets.open_images(args.among) if Path(args.among).exists() else None
    if among is not None:
        image_sets.check_shapes([*given, among])
        others = features.of_images("features to be near to", among, among.is_rounded)
        fields = {"data": Path(args.among).name, "ids": image_sets.digest_of(among.identity)}
    else:
        others = features.of_split("features of training images", args.among)
        fields = data.fields(args.among, others.positions)
    found, are_bytes = {}, {}
    for one in given:
        name = f"samples {one.name}"
        found[name], are_bytes[name] = features.of_images("features of samples", one, one.is_rounded), one.is_rounded
        report.subjects[name] = one.subject
    found["held-out pictures"] = features.of_split("features of held-out images", data.split)
    nearest = {name: neighbours.find_nearest(each, others) for name, each in found.items()}
    figure = neighbours.MEDIAN if args.among == "train" else neighbours.MEDIAN_OF_OTHERS
    report.record["samples"] = {
        "images": {one.name: one.num_images for one in given},
        figure: {name: one.median for name, one in nearest.items()},
        "quantiles": {name: one.quantiles for name, one in nearest.items()},
    }
    for name in nearest:
        of_set = {**fields, **extractor.fields(are_bytes.get(name, True)), "estimator": neighbours.ESTIMATOR}
        report.figures.append(Figure(figure, name, ("samples", figure, name), of_set))
    images_at = data.open(args.among) if among is None else among
    for i, one in enumerate(given):
        positions = nearest[f"samples {one.name}"].positions
        sheet = neighbours.draw_sheet(one.first(neighbours.NUM_SHOWN, data.batch_size), positions, images_at)
        what = f"nearest images of samples {one.name}"
        report.picture(Path(args.out) / f"neighbours{i or ''}.png", sheet, what)
    path = Path(args.out) / "neighbour_distances.png"
    if jax.process_index() == 0:
        neighbours.draw_distances(nearest, path)
    report.told.append(f"distribution of the distances: {path}")
    return report

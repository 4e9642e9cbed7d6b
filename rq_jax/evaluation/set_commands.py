"""What evaluate.py measures of sets of images: see `commands`."""

from pathlib import Path
from typing import Any

import jax

from rq_jax.devices import sharding
from rq_jax.evaluation import image_sets, neighbours, protocol
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.preparation import PROTOCOLS
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_comparison import SetComparison, cache_of, open_extractor
from rq_jax.evaluation.set_features import SetFeatures
from rq_jax.evaluation.set_figures import Estimators
from rq_jax.evaluation.stamps import Figure

Mesh = jax.sharding.Mesh


def samples(args: Any, mesh: Mesh) -> Report:
    """Figures of sets of samples against the held-out images, beside those of training images."""
    given, data, report = _open_samples(args, mesh, PROTOCOLS[args.protocol].reference)
    sizes = {one.name: one.num_images for one in given}
    comparison = SetComparison(args, mesh, data, report, sizes)
    for one in given:
        comparison.add_samples(one)
    report.record["samples"] = {"images": sizes}
    return report


def _open_samples(args: Any, mesh: Mesh, split: str) -> tuple[list[ImageSet], EvaluationData, Report]:
    given = [image_sets.open_images(path) for path in args.samples]
    image_sets.check_shapes(given)
    settings = protocol.image_settings(None, given[0].shape, args.samples[0], args.data_name, args.data_dir)
    data = EvaluationData(settings, args.split or split, args.batch_size, sharding.batch_part(mesh))
    return given, data, Report({"data": {**data.settings, "split": data.split}})


def neighbour_distances(args: Any, mesh: Mesh) -> Report:
    """Distances of samples to their nearest training images, beside those of held-out images, and sheets."""
    given, data, report = _open_samples(args, mesh, "validation")
    extractor = open_extractor(args, mesh)
    features = SetFeatures(extractor, data, Estimators(score_split=extractor.protocol.score_split), cache_of(args))
    training = features.of_split("features of training images", "train")
    found, are_bytes = {}, {}
    for one in given:
        name = f"samples {one.name}"
        found[name], are_bytes[name] = features.of_images("features of samples", one, one.is_rounded), one.is_rounded
        report.subjects[name] = one.subject
    found["held-out pictures"] = features.of_split("features of held-out images", data.split)
    nearest = {name: neighbours.find_nearest(each, training) for name, each in found.items()}
    report.record["features"] = extractor.net.name
    report.record["samples"] = {
        "images": {one.name: one.num_images for one in given},
        neighbours.MEDIAN: {name: one.median for name, one in nearest.items()},
        "quantiles": {name: one.quantiles for name, one in nearest.items()},
    }
    fields = {**data.fields("train", training.positions), "estimator": "squared distance to the nearest, median"}
    for name in nearest:
        protocol_of_set = {**fields, **extractor.fields(are_bytes.get(name, True))}
        report.figures.append(Figure(neighbours.MEDIAN, name, ("samples", neighbours.MEDIAN, name), protocol_of_set))
    for i, one in enumerate(given):
        positions = nearest[f"samples {one.name}"].positions
        sheet = neighbours.draw_sheet(one.first(neighbours.NUM_SHOWN), positions, data.training())
        what = f"nearest training images of samples {one.name}"
        report.picture(Path(args.out) / f"neighbours{i or ''}.png", sheet, what)
    path = Path(args.out) / "neighbour_distances.png"
    if jax.process_index() == 0:
        neighbours.draw_distances(nearest, path)
    report.told.append(f"distribution of the distances: {path}")
    return report

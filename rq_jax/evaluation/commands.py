"""What evaluate.py measures: a function for each of its commands, from flags to a report.

`args` are the flags of a command by their names, see evaluate.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rq_jax import checkpoint
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation import fine_ratios, image_sets, neighbours, protocol, set_figures, stamps
from rq_jax.evaluation.accumulate import counted
from rq_jax.evaluation.features import FeatureExtractor, Features, Rebuild, make_reconstruct
from rq_jax.evaluation.fine_ratios import AtRatio
from rq_jax.evaluation.image_sets import ImageSet
from rq_jax.evaluation.likelihood import load_transformer, measure_likelihood
from rq_jax.evaluation.preparation import PROTOCOLS, RANGE, UNROUNDED
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.set_figures import Estimators, Reference
from rq_jax.evaluation.stamps import Fields, Figure
from rq_jax.evaluation.statistics import Moments
from rq_jax.evaluation.tokenizer import PROTOCOL, compare_tokenizers
from rq_jax.files import read_json
from rq_jax.pretrained import efficientnet_lite, inception, vgg_lpips
from rq_jax.report import grids
from rq_jax.settings.text import quoted

SHOWN_SIZE = 128
TRAINING = "training pictures"

Mesh = jax.sharding.Mesh


@dataclasses.dataclass
class Report:
    """What a command found.

    Attributes:
      record: as JSON holds it.
      figures: of the record, with their protocols.
      subjects: what was measured -> where it comes from.
      told: lines for the terminal, below the table.
    """

    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    subjects: dict[str, Fields] = dataclasses.field(default_factory=dict)
    told: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, of: str, value: Any, settings: Fields, protocol: Fields) -> None:
        """Adds a figure of a set, which stands in the record under its name, with settings, and under the set."""
        entry = self.record.setdefault(name, {**settings, "of": {}})
        entry["of"][of] = value
        self.figures.append(Figure(name, of, (name, "of", of), protocol))

    def picture(self, path: Path, image: Any, what: str) -> None:
        """Writes an image, once for all processes, and tells of it."""
        if jax.process_index() == 0:
            grids.save_png(path, image)
        self.told.append(f"{what}: {path}")


# --- tokenizers ---


def tokenizer(args: Any, mesh: Mesh) -> Report:
    """Reconstructions and codes of tokenizers by code depth, and at fine ratios where they are asked for."""
    tokenizers = {
        directory: checkpoint.load_tokenizer(directory, args.step, not args.no_ema) for directory in args.checkpoint
    }
    fine_ratios.check(args.grains, tokenizers if args.grains else {})
    settings = protocol.shared_settings(tokenizers, args.data_name, args.data_dir)
    data = _open(args, mesh, settings, args.split or "validation")
    report = Report({"data": {**data.settings, "split": data.split}, "protocol": PROTOCOL})
    for directory, loaded in tokenizers.items():
        report.subjects[directory] = _subject_of(args, directory, loaded)
        if others := protocol.trained_elsewhere(loaded.config, data.settings):
            report.told.append(f"{directory}: trained on other images ({others}) than those that it is measured on")
    sets = None if args.distances == "none" else _Sets(args, mesh, data, report, paired=True)
    perceptual = None if args.no_perceptual else vgg_lpips.load(args.vgg, args.heads)
    if perceptual:
        placed = jax.device_put(perceptual.variables, sharding.replicated(mesh))
        perceptual = perceptual._replace(variables=placed)
    report.record["distance"] = perceptual.name if perceptual else None
    scale = max(1, SHOWN_SIZE // data.settings["image_size"][0])
    report.record["results"], rows = compare_tokenizers(tokenizers, data, mesh, perceptual, scale)
    for directory, figures in report.record["results"].items():
        figures["fingerprint"] = report.subjects[directory]["fingerprint"]
        _add_figures(report, data, directory, ("results", directory), figures)
    report.picture(Path(args.out) / "reconstructions.png", grids.labelled_grid(rows), "images")
    at_ratios = {
        name: fine_ratios.measure_ratios(loaded, data, mesh, args.grains, perceptual, name)
        for name, loaded in tokenizers.items()
        if args.grains
    }
    if sets:
        for name, loaded in tokenizers.items():
            sets.add_reconstructions(name, make_reconstruct(loaded, mesh, args.distances == "by_depth"))
        for name, measured in at_ratios.items():
            for each in measured:
                rebuild = make_reconstruct(tokenizers[name], mesh, False, each.thresholds)
                sets.add_reconstructions(f"{name} at fine ratio {each.ratio:g}", rebuild)
    if at_ratios:
        _add_ratios(report, data, args.out, at_ratios, scale)
    return report


def _subject_of(args: Any, directory: str, loaded: LoadedModel) -> Fields:
    ema = not args.no_ema
    step = checkpoint.step_of(directory, args.step, ema)
    subject = {"checkpoint": directory, "fingerprint": checkpoint.fingerprint(loaded.variables), "ema": ema}
    return {**subject, "step": step} if step is not None else subject


def _add_figures(
    report: Report, data: EvaluationData, of: str, at: tuple[Any, ...], figures: Mapping[str, Any], **fields: Any
) -> None:
    """Adds the figures of one tokenizer, which stand in the record already."""
    shared = {**data.fields(data.split), "range": RANGE, "clipping": f"to {RANGE}", "rounding": UNROUNDED, **fields}
    shared["estimator"] = PROTOCOL
    for name in [name for name in figures if name not in ("images", "fingerprint")]:
        of_figure = {"extractor": report.record["distance"]} if name == "distance" else {}
        report.figures.append(Figure(name, of, (*at, name), {**shared, **of_figure}))


def _add_ratios(
    report: Report, data: EvaluationData, out: str, at_ratios: Mapping[str, Sequence[AtRatio]], scale: int
) -> None:
    """Adds figures of tokenizers at each fine ratio, a table, curves and sheets."""
    found = report.record["fine_ratios"] = {}
    for i, (name, measured) in enumerate(at_ratios.items()):
        found[name] = []
        for place, each in enumerate(measured):
            figures = {"fine_ratio": each.ratio, "threshold": float(each.thresholds[0]), **each.figures}
            of = f"{name} at fine ratio {each.ratio:g}"
            if distances := report.record.get("kernel_distance"):
                figures["kernel_distance"] = distances["of"][f"reconstructions by {of}"]["mean"]
            found[name].append(figures)
            given = {"fine_ratio": each.ratio, "grains": "above a quantile of the entropies of the images measured"}
            report.subjects[of] = {**report.subjects[name], "threshold": figures["threshold"]}
            _add_figures(report, data, of, ("fine_ratios", name, place), each.figures, **given)
        report.told.append(f"{name}, thresholds from the entropies of the images themselves:")
        report.told.append(fine_ratios.table(found[name]))
        sheet = grids.labelled_grid(fine_ratios.ratio_rows(measured, scale))
        report.picture(Path(out) / f"fine_ratios{i or ''}.png", sheet, "grain maps and reconstructions")
    path = Path(out) / "fine_ratio_curves.png"
    if jax.process_index() == 0:
        fine_ratios.draw_curves(found, path)
    report.told.append(f"figures against the fine ratio: {path}")


# --- sets of images ---


class _Sets:
    """Sets of images that are measured against the held-out ones, by their features.

    Everything is checked before any feature is taken.
    """

    def __init__(
        self, args: Any, mesh: Mesh, data: EvaluationData, report: Report, samples: Sequence[ImageSet] = (),
        paired: bool = False,
    ):  # fmt: skip
        self._data, self._report = data, report
        self._judge = _open_judge(args, mesh)
        self._has_floor, use_manifold = not args.no_floor, bool(samples) and not args.no_manifold
        sizes = {"the held-out images": data.held_out().num_examples}
        if self._has_floor:
            sizes["the training images"] = data.training().num_examples
        sizes |= {quoted(one.name): one.num_images for one in samples}
        is_paired = paired or self._has_floor and data.split == "train"
        num_paired = sizes["the held-out images"] if is_paired else None
        subset_size = set_figures.choose_subset_size(args.subset_size, sizes, num_paired)
        report.told += set_figures.check_sizes(sizes, self._judge.net, use_manifold)
        score_split = self._judge.protocol.score_split
        self._estimators = Estimators(subset_size, args.num_subsets, score_split, use_manifold)
        self._reference: Reference | None = None

    @property
    def reference(self) -> Reference:
        """The held-out images; their features are taken once they are asked for, and those of training images then."""
        if self._reference is None:
            held_out = self._split("features of held-out images", self._data.split)
            fields = {_REFERENCE.get(name, name): value for name, value in self._data.fields(self._data.split).items()}
            self._reference = Reference(Moments.of(held_out.vectors), held_out.vectors, fields)
            if self._has_floor:
                training = self._split("features of training images", "train")
                fields = {"images": len(training.positions), "conditions": "those of the data"}
                self._add(TRAINING, training, True, self._data.split == "train", **fields)
        return self._reference

    def add_reconstructions(self, name: str, rebuild: Rebuild) -> None:
        """Measures reconstructions of the held-out images."""
        _ = self.reference
        rounds = self._judge.protocol.rounds_reconstructions
        found = self._split("features of reconstructions", self._data.split, rebuild=rebuild, rounds=rounds)
        fields = {"images": len(found.positions), "conditions": "reconstructions"}
        self._add(f"reconstructions by {name}", found, rounds, True, rebuilt=True, **fields)

    def add_samples(self, samples: ImageSet) -> None:
        """Measures a set of samples."""
        _ = self.reference
        rounds = samples.is_rounded or self._judge.protocol.rounds_samples
        batches = samples.batches(self._data.batch_size, self._data.part)
        batches = counted(batches, samples.num_images, self._data.batch_size, "features of samples")
        found = self._judge(batches, rounds=rounds)
        fields = {"images": samples.num_images, "conditions": samples.conditions_digest()}
        self._report.subjects[f"samples {samples.name}"] = samples.subject
        self._add(f"samples {samples.name}", found, rounds, False, **fields)

    def _split(self, title: str, split: str, **given: Any) -> Features:
        dataset = self._data.open(split)
        batches = counted(dataset.iterator(), dataset.num_examples, self._data.batch_size, title)
        return self._judge(batches, **given)

    def _add(
        self, of: str, features: Features, rounds: bool, paired: bool, rebuilt: bool = False, **fields: Any
    ) -> None:
        net = self._judge.net
        shared = {**self.reference.fields, **self._judge.fields(rounds), **fields}
        found = set_figures.measure(features, self.reference, net, self._estimators, rebuilt=rebuilt, paired=paired)
        for name, (value, estimator) in found.items():
            settings = {key: estimator[key] for key in ("subset_size", "num_subsets", "neighbours") if key in estimator}
            self._report.add(name, of, value, {"features": net.name, **settings}, {**shared, **estimator})


_REFERENCE = {name: f"reference {name}" for name in ("data", "split", "images", "ids")}


def _open_judge(args: Any, mesh: Mesh) -> FeatureExtractor:
    if args.inception and args.features:
        raise ValueError(f"--inception: {args.inception} and --features: {args.features} exclude one another")
    net = inception.load(args.inception) if args.inception else efficientnet_lite.load(args.features)
    return FeatureExtractor(net, mesh, PROTOCOLS[args.protocol])


def samples(args: Any, mesh: Mesh) -> Report:
    """Distances of sets of samples to the held-out images, beside those of training images."""
    given, data, report = _open_samples(args, mesh, PROTOCOLS[args.protocol].reference)
    sets = _Sets(args, mesh, data, report, given)
    for one in given:
        sets.add_samples(one)
    report.record["samples"] = {"images": {one.name: one.num_images for one in given}}
    return report


def _open_samples(args: Any, mesh: Mesh, split: str) -> tuple[list[ImageSet], EvaluationData, Report]:
    given = [image_sets.open_images(path) for path in args.samples]
    image_sets.check_shapes(given)
    settings = protocol.image_settings(None, given[0].shape, args.samples[0], args.data_name, args.data_dir)
    data = _open(args, mesh, settings, args.split or split)
    return given, data, Report({"data": {**data.settings, "split": data.split}})


def neighbour_distances(args: Any, mesh: Mesh) -> Report:
    """Distances of samples to their nearest training images, beside those of held-out images, and sheets."""
    given, data, report = _open_samples(args, mesh, "validation")
    judge = _open_judge(args, mesh)
    report.record["features"] = judge.net.name

    def features_of(title: str, batches: Any, count: int) -> Features:
        return judge(counted(batches, count, data.batch_size, f"features of {title}"))

    def of_split(title: str, split: str) -> Features:
        return features_of(title, data.open(split).iterator(), data.open(split).num_examples)

    training = of_split("training images", "train")
    found, are_bytes = {}, {}
    for one in given:
        are_bytes[f"samples {one.name}"] = one.is_rounded
        batches = one.batches(data.batch_size, data.part)
        found[f"samples {one.name}"] = features_of("samples", batches, one.num_images)
        report.subjects[f"samples {one.name}"] = one.subject
    found["held-out pictures"] = of_split("held-out images", data.split)
    nearest = {name: neighbours.find_nearest(features, training) for name, features in found.items()}
    median = {name: one.median for name, one in nearest.items()}
    report.record["samples"] = {
        "images": {one.name: one.num_images for one in given},
        neighbours.MEDIAN: median,
        "quantiles": {name: one.quantiles for name, one in nearest.items()},
    }
    fields = {**data.fields("train"), "estimator": "squared distance to the nearest, median"}
    for name in nearest:
        protocol_of_set = {**fields, **judge.fields(are_bytes.get(name, True))}
        report.figures.append(Figure(neighbours.MEDIAN, name, ("samples", neighbours.MEDIAN, name), protocol_of_set))
    for i, one in enumerate(given):
        rows = nearest[f"samples {one.name}"]
        sheet = neighbours.draw_sheet(one.rows(0, neighbours.NUM_SHOWN), rows.positions[:, :3], data.training())
        what = f"nearest training images of samples {one.name}"
        report.picture(Path(args.out) / f"neighbours{i or ''}.png", sheet, what)
    path = Path(args.out) / "neighbour_distances.png"
    if jax.process_index() == 0:
        neighbours.draw_distances(nearest, path)
    report.told.append(f"distribution of the distances: {path}")
    return report


# --- transformers ---


def likelihood(args: Any, mesh: Mesh) -> Report:
    """Nats per code of training and held-out images under a transformer."""
    ema = not args.no_ema
    loaded, settings = load_transformer(args.checkpoint, args.step, ema, args.data_name, args.data_dir)
    data = _open(args, mesh, settings, args.split or "validation")
    splits = dict.fromkeys(("train", data.split))
    report = Report({"data": data.settings})
    report.subjects[args.checkpoint] = _subject_of(args, args.checkpoint, loaded)
    found = report.record["likelihood"] = {split: measure_likelihood(loaded, data, split, mesh) for split in splits}
    conditions = {name: data.settings[name] for name in protocol.CONDITION_SETTINGS if name in data.settings}
    of_codes = {"tokenizer": checkpoint.fingerprint(loaded.tokenizer.variables), "conditions": conditions}
    for split, figures in found.items():
        fields = {**data.fields(split), **of_codes, "estimator": "nearest codes, mean over images"}
        for name in [name for name in figures if name != "images"]:
            at = ("likelihood", split, name)
            report.figures.append(Figure(f"{name}, {data.split_name(split)}", args.checkpoint, at, fields))
    return report


# --- records ---


def compare(args: Any, mesh: Mesh) -> Report:
    """Figures of two records side by side.

    Raises:
      ValueError: some that both have are of unlike protocols; the others are printed first.
    """
    del mesh
    records = [read_json(path) for path in (args.a, args.b)]
    found = stamps.compare(*records, (args.a, args.b))
    rows = [{"figure": name, "protocol": stamp, "a": a, "b": b} for name, stamp, a, b in found.rows]
    return Report({"a": args.a, "b": args.b, "compared": rows, "unlike": found.unlike}, told=[found.table("ab")])


def _open(args: Any, mesh: Mesh, settings: Mapping[str, Any], split: str) -> EvaluationData:
    return EvaluationData(dict(settings), split, args.batch_size, sharding.batch_part(mesh))

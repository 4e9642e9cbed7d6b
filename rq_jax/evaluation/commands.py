"""What evaluate.py measures: a function for each of its commands, from flags to a report.

`args` are the flags of a command by their names, see evaluate.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rq_jax import checkpoint
from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import sharding
from rq_jax.evaluation import fine_ratios, protocol, stamps
from rq_jax.evaluation.features import make_reconstruct
from rq_jax.evaluation.fine_ratios import AtRatio
from rq_jax.evaluation.likelihood import load_transformer, measure_likelihood
from rq_jax.evaluation.preparation import RANGE, UNROUNDED
from rq_jax.evaluation.protocol import EvaluationData
from rq_jax.evaluation.report import Report
from rq_jax.evaluation.set_comparison import SetComparison, open_extractor
from rq_jax.evaluation.stamps import Fields, Figure
from rq_jax.evaluation.tokenizer import PROTOCOL, compare_tokenizers
from rq_jax.files import read_json
from rq_jax.pretrained import vgg_lpips
from rq_jax.pretrained.vgg_lpips import Perceptual
from rq_jax.report import grids

SHOWN_SIZE = 128

Mesh = jax.sharding.Mesh


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
    sets = None
    if args.distances != "none":
        sets = SetComparison(args, open_extractor(args, mesh), data, report, has_reconstructions=True)
    perceptual = None if args.no_perceptual else vgg_lpips.load(args.vgg, args.heads)
    if perceptual:
        placed = jax.device_put(perceptual.variables, sharding.replicated(mesh))
        perceptual = perceptual._replace(variables=placed)
    report.record["distance"] = perceptual.name if perceptual else None
    scale = max(1, SHOWN_SIZE // data.settings["image_size"][0])
    report.record["results"], rows = compare_tokenizers(tokenizers, data, mesh, perceptual, scale)
    judge = _fields_of(perceptual)
    for directory, figures in report.record["results"].items():
        figures["fingerprint"] = report.subjects[directory]["fingerprint"]
        _add_figures(report, data, directory, ("results", directory), figures, judge)
    report.picture(Path(args.out) / "reconstructions.png", grids.labelled_grid(rows), "images")
    at_ratios = {
        name: fine_ratios.measure_ratios(loaded, data, mesh, args.grains, perceptual, name)
        for name, loaded in tokenizers.items()
        if args.grains
    }
    if sets:
        sets.add_floor()
        for name, loaded in tokenizers.items():
            by_depth, identity = args.distances == "by_depth", report.subjects[name]["fingerprint"]
            sets.add_reconstructions(name, make_reconstruct(loaded, mesh, by_depth), [identity, by_depth])
            for each in at_ratios.get(name, ()):
                rebuild = make_reconstruct(loaded, mesh, False, each.thresholds)
                identity_at_ratio = [identity, False, each.thresholds.tolist()]
                sets.add_reconstructions(f"{name} at fine ratio {each.ratio:g}", rebuild, identity_at_ratio)
    if at_ratios:
        _add_ratios(report, data, args.out, at_ratios, judge, scale)
    return report


def _fields_of(perceptual: Perceptual | None) -> Fields:
    if perceptual is None:
        return {}
    return {"extractor": perceptual.name, "extractor weights": checkpoint.fingerprint(perceptual.variables)}


def _subject_of(args: Any, directory: str, loaded: LoadedModel) -> Fields:
    ema = not args.no_ema
    step = checkpoint.step_of(directory, args.step, ema)
    origin = checkpoint.origin_of(directory)
    subject = {**origin, "fingerprint": checkpoint.fingerprint(loaded.variables), "ema": ema}
    return {**subject, "step": step} if step is not None else subject


def _add_figures(
    report: Report,
    data: EvaluationData,
    of: str,
    at: tuple[Any, ...],
    figures: Mapping[str, Any],
    judge: Fields,
    **fields: Any,
) -> None:
    """Adds the figures of one tokenizer, which stand in the record already; `judge` is that of the distance."""
    shared = {**data.fields(data.split), "range": RANGE, "clipping": f"to {RANGE}", "rounding": UNROUNDED, **fields}
    shared["estimator"] = PROTOCOL
    for name in [name for name in figures if name not in ("images", "fingerprint")]:
        report.figures.append(Figure(name, of, (*at, name), {**shared, **(judge if name == "distance" else {})}))


def _add_ratios(
    report: Report,
    data: EvaluationData,
    out: str,
    at_ratios: Mapping[str, Sequence[AtRatio]],
    judge: Fields,
    scale: int,
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
            _add_figures(report, data, of, ("fine_ratios", name, place), each.figures, judge, **given)
        report.told.append(f"{name}, thresholds from the entropies of the images themselves:")
        report.told.append(fine_ratios.table(found[name]))
        sheet = grids.labelled_grid(fine_ratios.ratio_rows(measured, scale))
        report.picture(Path(out) / f"fine_ratios{i or ''}.png", sheet, "grain maps and reconstructions")
    path = Path(out) / "fine_ratio_curves.png"
    if jax.process_index() == 0:
        fine_ratios.draw_curves(found, path)
    report.told.append(f"figures against the fine ratio: {path}")


# --- transformers ---


def likelihood(args: Any, mesh: Mesh) -> Report:
    """Nats per code of training and held-out images under a transformer."""
    ema = not args.no_ema
    loaded, settings = load_transformer(args.checkpoint, args.step, ema, args.data_name, args.data_dir)
    data = _open(args, mesh, settings, args.split or "validation")
    splits = dict.fromkeys(("train", data.split))
    report = Report({"data": protocol.told_settings(data.settings, args.checkpoint)})
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

"""Sets of images that a transformer draws as they are measured, without an image on disk."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import checkpoint
from rq_jax.checkpoint import LoadedModel
from rq_jax.evaluation import choices, drawing
from rq_jax.evaluation.choices import ChoiceSettings
from rq_jax.evaluation.conditions import choose_conditions, draw_classes, kind_of, read_prompts
from rq_jax.evaluation.drawing import Plan
from rq_jax.evaluation.image_sets import Batch, ImageSet, Part
from rq_jax.evaluation.stamps import digest_of
from rq_jax.sampling import images
from rq_jax.settings import checks

BALANCED, FREQUENCIES = "balanced", "frequencies"
FILTER = ("temperature", "top_k", "top_p", "guidance")


class DrawSettings(NamedTuple):
    """How to draw; the flags of evaluate.py, None where they are not given.

    Attributes:
      num_images: N.
      seed: an image depends on it and its id alone.
      classes_of: "balanced", all classes in turn; "frequencies", as often as in the training set; or a split, whose
        classes are taken in order.
      prompts: file of texts, which the images take in turn.
      prompts_of: a split whose captions are taken in order.
      temperature, top_k, top_p, guidance: see `sampling.images.draw_settings`.
      weights: dtype of the transformer's weights in memory.
      keep, candidates, by, judge: see `ChoiceSettings`.
    """

    num_images: int | None = None
    seed: int | None = None
    classes_of: str | None = None
    prompts: str | None = None
    prompts_of: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    weights: str | None = None
    keep: float | None = None
    candidates: int | None = None
    by: str | None = None
    judge: str | None = None

    def given(self) -> dict[str, Any]:
        """The flags that are given."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def is_transformer(path: str) -> bool:
    """Whether a path is the directory of a stage-2 model, or an address, which can be of nothing else here."""
    if checkpoint.is_address(path):
        return True
    directory = checkpoint.local_directory(path)
    if not (directory / "config.json").is_file():
        return False
    return checkpoint.read_config(directory)["model"]["name"].endswith("transformer")


def load(directory: str, step: int | None = None, ema: bool = True, flag: str = "--samples") -> LoadedModel:
    """A transformer with its tokenizer; `flag` named it, for messages.

    Raises:
      ValueError: no tokenizer comes with it, or several processes are there.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"{flag}: '{directory}' is drawn from by one process, not by {jax.process_count()}; draw with sample.py"
        )
    loaded = checkpoint.load_model(directory, step, ema)
    if loaded.tokenizer is None:
        raise ValueError(f"{flag}: '{directory}' carries no tokenizer; give the directory of a stage-2 run")
    return loaded


def filters_of(loaded: LoadedModel, settings: DrawSettings) -> dict[str, Any]:
    """Filter and guidance of a draw, those that are given, else the model's own; see `sampling.images.draw_settings`.

    Raises:
      ValueError: a value that is not allowed.
    """
    given = {name: getattr(settings, name) for name in FILTER}
    return images.draw_settings(loaded.model, loaded.config.get("sample") or {}, given)


def fingerprints(loaded: LoadedModel) -> dict[str, str]:
    """Those of a transformer and of its tokenizer; all of their weights are read."""
    models = {"transformer": loaded, "tokenizer": loaded.tokenizer}
    return {name: checkpoint.fingerprint(one.variables) for name, one in models.items()}


def draw_set(
    loaded: LoadedModel,
    directory: str,
    settings: DrawSettings,
    as_bytes: bool = True,
    texts: Sequence[str] | None = None,
    models: Mapping[str, str] | None = None,
    **subject: Any,
) -> ImageSet:
    """The set of images that a transformer draws; they are drawn once they are read, and each time.

    Args:
      loaded: from `load`.
      directory: of the model.
      settings: with a number of images.
      as_bytes: rounded to 8 bits, as files hold them.
      texts: captions of a data set, which the images take in turn, in place of a file of prompts.
      models: its `fingerprints`, for several sets of one model; None: they are taken here.
      **subject: what else to tell of the model.

    Raises:
      ValueError: settings that are not allowed, or that do not fit the model.
      FileNotFoundError: no file of prompts, or of a judge.
    """
    checks.at_least("--num_images", settings.num_images, 1)
    seed, ids = settings.seed or 0, np.arange(settings.num_images)
    checks.at_least("--seed", seed, 0)
    drawn_by = filters_of(loaded, settings)
    conds, names = _conditions(loaded, directory, settings, seed, texts)
    choice_settings = ChoiceSettings(*(getattr(settings, name) for name in ChoiceSettings._fields))
    choice_settings.check()
    choice = choices.prepare(loaded, choice_settings, ids, conds, names) if choice_settings.by else None
    plan = Plan(ids, conds, names, drawn_by, choice=choice)
    weights = settings.weights or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    told = {**(models or fingerprints(loaded)), **settings.given(), **drawn_by, "seed": seed, "weights": weights}
    tokenizer, is_text = loaded.tokenizer.model, kind_of(loaded) == "text"
    conditions = np.zeros((len(ids), 0), np.int32) if conds is None else conds[ids % len(conds)]
    digest = digest_of([conditions.tolist(), as_bytes])
    subject |= told
    draw = functools.partial(_draw, loaded, plan, {"seed": seed, "weights": weights}, as_bytes, subject)
    return ImageSet(
        directory, (*tokenizer.image_shape, tokenizer.in_channels), len(ids), functools.partial(_batches, draw, ids),
        is_rounded=as_bytes, conditions=conditions, prompts=[names[i % len(names)] for i in ids] if is_text else None,
        subject=subject, identity={**told, "drawn": digest},
    )  # fmt: skip


def _conditions(
    loaded: LoadedModel, directory: str, settings: DrawSettings, seed: int, texts: Sequence[str] | None
) -> tuple[np.ndarray | None, Sequence[str]]:
    """The conditions that the images take in turn, and their names."""
    kind, classes_of, num_images = kind_of(loaded), settings.classes_of, settings.num_images
    if settings.prompts is not None and settings.prompts_of is not None:
        raise ValueError(f"--prompts: {settings.prompts} and --prompts_of: {settings.prompts_of} exclude one another")
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    if prompts is not None and len(prompts) > num_images:
        raise ValueError(f"--num_images: {num_images} are fewer than the {len(prompts)} prompts; give more images")
    if kind != "class" or classes_of not in (None, BALANCED, FREQUENCIES):
        given = {"classes_of": classes_of, "prompts": prompts, "prompts_of": settings.prompts_of, "captions": texts}
        return choose_conditions(loaded, directory, num_images, seed, **given)
    names = loaded.config.get("class_names") or list(map(str, range(loaded.model.cond_vocab_size)))
    numbers = list(range(loaded.model.cond_vocab_size))
    if classes_of == FREQUENCIES:
        if not (counts := loaded.config.get("class_counts")):
            raise ValueError(f"--classes_of: {classes_of} needs class_counts, which '{directory}' does not record")
        numbers = draw_classes(counts, seed, num_images)
    return np.array(numbers)[:, None], [names[i] for i in numbers]


def _draw(
    loaded: LoadedModel,
    plan: Plan,
    settings: dict[str, Any],
    as_bytes: bool,
    subject: dict[str, Any],
    batch_size: int,
    first: int,
) -> Iterator[np.ndarray]:
    """Images (b, H, W, C) from the first on, a batch after the other; of a choice its tally is added to the subject."""
    batches = {**settings, "batch_size": batch_size, "decode_batch_size": None}
    if plan.choice is None:
        num = len(plan.ids) - first
        for *_, pixels in drawing.stream(loaded, plan, plan.conds, first, num, {**batches, "as_bytes": as_bytes}):
            yield pixels
        return
    chosen, subject["chosen"] = drawing.choose(loaded, plan, **batches)
    codes = jax.tree.map(lambda array: array[first:], chosen.items)
    layout = drawing.layout()
    yield from images.decode_all(loaded.tokenizer, codes, batch_size=batch_size, sharding=layout, as_bytes=as_bytes)


def _batches(
    draw: Callable[[int, int], Iterable[np.ndarray]],
    ids: np.ndarray,
    batch_size: int,
    part: Part = (0, 1),
    first_batch: int = 0,
) -> Iterator[Batch]:
    """`ImageSet.batches` of what is drawn, by one process."""
    del part
    start = first_batch * batch_size
    if start >= len(ids):
        return
    for pixels in draw(batch_size, start):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        filled = pixels[np.minimum(np.arange(batch_size), len(pixels) - 1)]
        yield {"image": filled, "mask": index < len(ids), "index": index}
        start += batch_size

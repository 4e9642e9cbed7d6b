"""Images drawn as they are asked for, each written as PNG while the next are drawn, or once it is chosen."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from rq_jax.checkpoint import LoadedModel
from rq_jax.devices import hosts, sharding
from rq_jax.evaluation.choices import Choice
from rq_jax.evaluation.edits import Edit
from rq_jax.grains import GrainedCodes
from rq_jax.report import grids
from rq_jax.report.progress import Progress
from rq_jax.sampling import images, rerank

NUM_SHOWN = 100  # images of a grid


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is drawn.

    Attributes:
      ids: of the images, one after the other; with a choice those that would be drawn without it.
      conds: (m, U), which they take in turn by id, or None.
      names: of the conditions.
      settings: of the draw, by the names that `generate` gives them.
      known: codes and grain maps that are given, likewise.
      edited: the images that are edited, or None.
      choice: what is drawn, and chosen from, in the place of these images, or None.
    """

    ids: np.ndarray
    conds: np.ndarray | None
    names: Sequence[str]
    settings: dict[str, Any]
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    edited: Edit | None = None
    choice: Choice | None = None

    def captions(self, count: int) -> list[str]:
        """Names of the conditions of the first images."""
        return [self.names[i % len(self.names)] for i in self.ids[:count]]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What came of a plan, on every process.

    Attributes:
      ids: of the images (n,).
      codes: as `generate` gives them.
      shown: the first of the images, (at most 100, H, W, C), uint8.
      scores: by which they were chosen (n,), or None.
      tally: of a choice, as JSON holds it; else empty.
    """

    ids: np.ndarray
    codes: Any
    shown: np.ndarray
    scores: np.ndarray | None = None
    tally: dict[str, Any] = dataclasses.field(default_factory=dict)


def draw(loaded: LoadedModel, plan: Plan, folder: Path, **batches: Any) -> Drawn:
    """Draws the images of a plan; of several processes each draws a part, and writes it.

    Args:
      loaded: the transformer with its tokenizer.
      plan: what is drawn.
      folder: of the images, each a PNG with its id as name.
      **batches: batch_size, decode_batch_size, seed and weights, as `sampling.images.draw` takes them.
    """
    return (
        _draw_all(loaded, plan, folder, batches) if plan.choice is None else _draw_best(loaded, plan, folder, batches)
    )


def _draw_all(loaded: LoadedModel, plan: Plan, folder: Path, batches: dict[str, Any]) -> Drawn:
    start, stop = _part(len(plan.ids))
    codes, shown = [_no_codes(loaded.model)], [_no_images(loaded.tokenizer.model)]
    with _Writer(folder) as writer:
        for ids, drawn, pixels in stream(loaded, plan, plan.conds, plan.ids[0] + start, stop - start, batches):
            writer.write(ids, pixels)
            codes.append(drawn)
            shown.append(pixels[ids < plan.ids[0] + NUM_SHOWN])
    mine = jax.tree.map(lambda *parts: np.concatenate(parts), *codes), np.concatenate(shown)
    return Drawn(plan.ids, *jax.tree.map(hosts.rows_of_all, mine))


def _draw_best(loaded: LoadedModel, plan: Plan, folder: Path, batches: dict[str, Any]) -> Drawn:
    """Of all images codes and scores are kept while they may be chosen, and images are decoded again in the end."""
    chosen, tally = choose(loaded, plan, **batches)
    start, stop = _part(len(chosen.ids))
    shown, ids = [_no_images(loaded.tokenizer.model)], chosen.ids[start:stop]
    codes = jax.tree.map(lambda array: array[start:stop], chosen.items)
    sizes = {name: batches[name] for name in ("batch_size", "decode_batch_size")}
    with _Writer(folder) as writer:
        for pixels in images.decode_all(loaded.tokenizer, codes, sharding=layout(), **sizes):
            writer.write(ids[: len(pixels)], pixels)
            shown.append(pixels[: max(0, NUM_SHOWN - start)])
            start, ids = start + len(pixels), ids[len(pixels) :]
    return Drawn(chosen.ids, chosen.items, hosts.rows_of_all(np.concatenate(shown)), chosen.scores, tally)


def choose(loaded: LoadedModel, plan: Plan, **batches: Any) -> tuple[rerank.Chosen, dict[str, Any]]:
    """Draws what a plan chooses from, and keeps the codes of the best; of several processes each draws a part.

    Args:
      loaded, plan, batches: as for `draw`.

    Returns:
      What is kept, in the order of the images, with codes as items; the tally of `Drawn`.
    """
    choice, none = plan.choice, _no_codes(loaded.model)
    start, stop = _part(choice.num_drawn)
    mine, best = (rerank.BestOfGroups(choice.keep, none) for _ in range(2))
    drawn_images = stream(loaded, plan, choice.conds, plan.ids[0] + start, stop - start, batches)
    rerank.choose(drawn_images, choice.group_of, choice.judge.start(), mine, choice.judge.batch_size)
    best.add(*jax.tree.map(hosts.rows_of_all, mine.chosen()))
    chosen = choice.in_slots(best.chosen())
    drawn, total = (hosts.rows_of_all(sums[None]).sum(0) for sums in (mine.num_drawn, mine.score_sums))
    return chosen, {
        "judge": choice.judge.name,
        "drawn": int(drawn.sum()),
        "kept": len(chosen.ids),
        "dropped": int(drawn.sum()) - len(chosen.ids),
        "mean_score": {"drawn": float(total.sum() / drawn.sum()), "kept": float(chosen.scores.mean())},
    }


def stream(
    loaded: LoadedModel, plan: Plan, conds: np.ndarray | None, first: int, num: int, batches: dict[str, Any]
) -> Iterator[tuple[np.ndarray, Any, np.ndarray]]:
    """Ids, codes and images of a batch after the other, with a progress bar.

    Args:
      loaded, plan: as for `draw`.
      conds: (m, U), which the images take in turn by id, or None.
      first, num: the ids.
      batches: further arguments of `sampling.images.draw`.
    """
    models, given = (loaded.model, loaded.variables, loaded.tokenizer), {**plan.known, **plan.settings, **batches}
    ids = {"first_index": int(first), "num_images": num}
    with Progress(num, unit="image", title="sampling", enabled=jax.process_index() == 0) as progress:
        compiling = functools.partial(progress.waiting_for, "compiling")
        for batch in images.draw(*models, conds=conds, sharding=layout(), compiling=compiling, **ids, **given):
            yield batch
            progress.update(len(batch[0]))


class _Writer:
    """Writes images in threads; no more than two batches wait in memory."""

    def __init__(self, folder: Path):
        self._folder, self._pool = folder, ThreadPoolExecutor()  # the encoder of PNG lets other threads run
        self._written: Iterator[None] = iter(())

    def __enter__(self) -> "_Writer":
        return self

    def write(self, ids: np.ndarray, pixels: np.ndarray) -> None:
        """Begin to write a batch, once the one before is there."""
        list(self._written)
        paths = [self._folder / f"{image_id:06d}.png" for image_id in ids]
        self._written = self._pool.map(grids.save_png, paths, pixels)

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        with self._pool:
            if kind is None:
                list(self._written)


def _part(count: int) -> tuple[int, int]:
    """The part of this process, from one number to before another."""
    index, processes = jax.process_index(), jax.process_count()
    return count * index // processes, count * (index + 1) // processes


def layout() -> Any:
    """Of a batch over the devices of this process."""
    return sharding.batch_sharding(sharding.local_mesh())


def _no_codes(model: Any) -> Any:
    codes, layout = np.zeros((0, *model.code_shape), np.int32), getattr(model, "layout", None)
    return codes if layout is None else GrainedCodes(codes, np.zeros((0, *layout.region_grid), np.int32))


def _no_images(tokenizer: Any) -> np.ndarray:
    return np.zeros((0, *tokenizer.image_shape, tokenizer.in_channels), np.uint8)

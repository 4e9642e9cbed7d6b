"""Choosing among samples: rejection sampling and re-ranking, of samples at hand or as they are drawn."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rq_jax.settings import checks

# Of a score: the same image scored in another batch differs in the last bits, and must not be chosen for them.
_DIGITS = 4


def keep_best(items: Any, scores: jax.Array, keep: int) -> tuple[Any, jax.Array]:
    """Rejection sampling: the `keep` items of highest score, best first (paper, section 4.1).

    Args:
      items: a pytree of arrays (n, ...), such as codes and images.
      scores: (n,), such as a classifier's probability of the intended class.
      keep: 1..n.

    Returns:
      The kept items (keep, ...) and their indices (keep,).
    """
    checks.in_range("keep", keep, 1, scores.shape[0], "the number of scores")
    indices = jnp.argsort(-jnp.asarray(scores), stable=True)[:keep]
    return jax.tree.map(lambda array: array[indices], items), indices


class Chosen(NamedTuple):
    """Samples that were kept, group by group and the best of each first.

    ids: (n,), of the images. groups: (n,), those of the images. scores: (n,). items: their arrays (n, ...), as added.
    """

    ids: np.ndarray
    groups: np.ndarray
    scores: np.ndarray
    items: Any


class BestOfGroups:
    """The best samples of each group, such as a class or a prompt, while they are drawn; the rest are forgotten.

    The choice depends neither on the batches nor on their order: scores count to four significant digits, NaN as the
    lowest, and of equal ones the lower id is kept.

    Attributes:
      num_drawn: samples so far, by group (G,).
      score_sums: sums of their scores that are finite, (G,), float64.
    """

    def __init__(self, keep: Sequence[int], none: Any):
        """Args: keep: samples that are kept of each group, at least 0; none: the items (0, ...) of no sample."""
        checks.at_least("keep", keep, 0)
        self._keep, self._none = list(keep), none
        self._heaps: list[list[tuple[tuple[float, int], float, Any]]] = [[] for _ in keep]
        self.num_drawn, self.score_sums = np.zeros(len(keep), np.int64), np.zeros(len(keep))

    def add(self, ids: np.ndarray, groups: np.ndarray, scores: np.ndarray, items: Any) -> None:
        """Add a batch.

        Args:
          ids: (b,), each at most once over all batches.
          groups: (b,), 0..G - 1.
          scores: (b,), higher is better.
          items: a pytree of arrays (b, ...), such as codes.
        """
        np.add.at(self.num_drawn, groups, 1)
        np.add.at(self.score_sums, groups, np.where(np.isfinite(scores), scores, 0))
        for i, (image_id, group, score) in enumerate(zip(ids.tolist(), groups.tolist(), scores.tolist(), strict=True)):
            heap, key = self._heaps[group], (_rounded(score), -image_id)  # the worst that is kept comes first
            is_full = len(heap) == self._keep[group]
            if is_full and (not heap or key < heap[0][0]):
                continue
            item = jax.tree.map(lambda array, i=i: np.array(array[i : i + 1]), items)  # a view would keep the batch
            (heapq.heapreplace if is_full else heapq.heappush)(heap, (key, score, item))

    def chosen(self) -> Chosen:
        """What is kept of the samples so far."""
        rows = [(group, *one) for group, heap in enumerate(self._heaps) for one in sorted(heap, reverse=True)]
        ids = np.array([-key[1] for _, key, _, _ in rows], np.int64)
        groups, scores = np.array([row[0] for row in rows], np.int64), np.array([row[2] for row in rows], np.float64)
        return Chosen(ids, groups, scores, _joined(self._none, *(row[3] for row in rows)))


def choose(
    batches: Iterable[tuple[np.ndarray, Any, np.ndarray]],
    group_of: Callable[[np.ndarray], np.ndarray],
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    best: BestOfGroups,
    batch_size: int,
) -> None:
    """Choose among samples as they are drawn: a batch is scored and forgotten but for the codes of what is kept.

    Args:
      batches: image ids (b,), codes and images (b, H, W, C), as `images.draw` gives them.
      group_of: image ids to their groups.
      score: images (batch_size, H, W, C), uint8, and their groups to scores (batch_size,); higher is better.
      best: of the groups, which takes the samples.
      batch_size: of what is scored together, whatever the size of the batches that are drawn; a last one is filled up.
    """
    for ids, codes, images in in_batches(batches, batch_size):
        filled = np.resize(np.arange(len(ids)), batch_size)
        groups = group_of(ids)
        scores = np.asarray(score(images[filled], groups[filled]))[: len(ids)]
        best.add(ids, groups, scores, codes)


def in_batches(trees: Iterable[Any], size: int) -> Iterator[Any]:
    """The rows of trees of arrays (b, ...), b of any size, in trees of `size` rows; the last has what is left."""
    waiting = None
    for tree in trees:
        waiting = tree if waiting is None else _joined(waiting, tree)
        while _length(waiting) >= size:
            yield jax.tree.map(lambda array: array[:size], waiting)
            waiting = jax.tree.map(lambda array: array[size:], waiting)
    if waiting is not None and _length(waiting):
        yield waiting


def _length(tree: Any) -> int:
    return len(jax.tree.leaves(tree)[0])


def _joined(*trees: Any) -> Any:
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *trees)


def _rounded(score: float) -> float:
    return float(f"{score:.{_DIGITS}g}") if score == score else -np.inf

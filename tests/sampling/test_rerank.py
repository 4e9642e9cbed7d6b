"""Choosing among samples: the best of all, and the best of each group as batches come."""

import jax.numpy as jnp
import numpy as np
import pytest

from rq_jax.sampling import keep_best
from rq_jax.sampling.rerank import BestOfGroups, choose

N, KEEP = 50, (3, 0, 5)
RNG = np.random.default_rng(0)
GROUPS, SCORES = RNG.integers(0, 3, N), RNG.normal(size=N)
SCORES[7] = np.nan
SCORES[[20, 21, 22]] = 3.0  # ties
FIRST = 100


def batches(size):
    """Ids, codes and images, both of which tell the id."""
    ids = np.arange(FIRST, FIRST + N)
    for start in range(0, N, size):
        part = ids[start : start + size]
        images = np.broadcast_to((part - FIRST).astype(np.uint8)[:, None, None, None], (len(part), 4, 4, 3))
        yield part, {"codes": np.broadcast_to(part[:, None], (len(part), 2))}, images


def run(size, score_size):
    """The choice from batches of a size, by scores whose last bits depend on it."""

    def score(images, groups):
        rows = images[:, 0, 0, 0]
        assert len(images) == score_size
        np.testing.assert_array_equal(groups, GROUPS[rows])
        return SCORES[rows] * (1 + 1e-9 * np.random.default_rng(size).normal(size=score_size))

    best = BestOfGroups(KEEP, {"codes": np.zeros((0, 2), int)})
    choose(batches(size), lambda ids: GROUPS[ids - FIRST], score, best, score_size)
    return best, best.chosen()


def expected_ids():
    order = sorted(range(N), key=lambda i: (-SCORES[i] if SCORES[i] == SCORES[i] else np.inf, i))
    return [FIRST + i for group, keep in enumerate(KEEP) for i in [i for i in order if GROUPS[i] == group][:keep]]


@pytest.mark.parametrize("size", [3, 8, N, 2 * N])
@pytest.mark.parametrize("score_size", [4, 64])
def test_the_choice_is_that_of_sorting_whatever_the_batches(size, score_size):
    best, chosen = run(size, score_size)
    assert chosen.ids.tolist() == expected_ids()
    assert chosen.groups.tolist() == [0] * 3 + [2] * 5
    np.testing.assert_allclose(chosen.scores, SCORES[chosen.ids - FIRST], rtol=1e-5)
    np.testing.assert_array_equal(chosen.items["codes"][:, 1], chosen.ids)
    np.testing.assert_array_equal(best.num_drawn, np.bincount(GROUPS))
    np.testing.assert_allclose(best.score_sums, [np.nansum(SCORES[GROUPS == g]) for g in range(3)], rtol=1e-4)


def test_parts_are_merged_as_if_drawn_together():
    """As several processes draw them: what one of them drops, all of them drop."""
    ids, (whole, merged, *parts) = np.arange(N), (BestOfGroups(KEEP, np.zeros(0, int)) for _ in range(6))
    whole.add(ids, GROUPS, SCORES, ids)
    for part, mine in zip(parts, [*np.array_split(ids, 3), ids[:0]], strict=True):
        part.add(mine, GROUPS[mine], SCORES[mine], mine)
        chosen = part.chosen()
        merged.add(chosen.ids, chosen.groups, chosen.scores, chosen.items)
    for one, other in zip(whole.chosen(), merged.chosen(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_what_is_kept_stays_in_memory():
    batch = np.zeros((1000, 64), np.int32)
    best = BestOfGroups([2], batch[:0])
    best.add(np.arange(1000), np.zeros(1000, int), np.arange(1000.0), batch)
    assert len(best._heaps[0]) == 2 and all(item.base is None for _, _, item in best._heaps[0])


def test_keep_best_keeps_the_items_of_highest_score():
    items = {"codes": jnp.arange(10).reshape(5, 2), "names": jnp.arange(5)}
    kept, indices = keep_best(items, jnp.array([0.1, 0.7, 0.3, 0.7, 0.2]), 3)
    assert indices.tolist() == [1, 3, 2]
    assert kept["codes"].tolist() == [[2, 3], [6, 7], [4, 5]] and kept["names"].tolist() == [1, 3, 2]


@pytest.mark.parametrize("keep", [0, 6])
def test_keep_best_needs_a_number_it_can_keep(keep):
    with pytest.raises(ValueError, match=rf"^keep: {keep} is outside 1..5, the number of scores$"):
        keep_best(jnp.ones(5), jnp.ones(5), keep)

"""The cache of computed features: written whole or not at all, read back as batches."""

import json

import numpy as np
import pytest

pytest.importorskip("grain")

from rq_jax.data import CacheDataset, read_meta, write_cache  # noqa: E402

COUNT, VIEWS = 11, 3
META = {"fingerprint": "abc", "class_names": ["a", "b"], "text_length": 5, "vocab_size": 40}


def rows(dtype=np.float16):
    """Latents that say which row and view they are."""
    row, view = np.mgrid[:COUNT, :VIEWS]
    latents = np.stack([row, view], axis=-1)[:, :, None, None].repeat(2, axis=2).astype(dtype)
    return {
        "latents": latents,
        "cond": np.arange(COUNT * 5, dtype=np.int32).reshape(COUNT, 5),
        "index": np.arange(COUNT, dtype=np.int32)[::-1].copy(),
    }


def batches(dtype=np.float16, size=4):
    """As an evaluation gives them: the last one padded."""
    arrays = rows(dtype)
    for start in range(0, COUNT, size):
        positions = np.arange(start, start + size)
        batch = {key: array[np.minimum(positions, COUNT - 1)] for key, array in arrays.items()}
        yield {**batch, "mask": positions < COUNT}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache") / "latents", batches(), META, COUNT)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_what_was_given(tmp_path, dtype):
    directory = write_cache(tmp_path / "new" / "cache", batches(dtype), META)
    for key, array in rows(dtype).items():
        stored = np.load(directory / f"{key}.npy")
        np.testing.assert_array_equal(stored, array)
        assert stored.dtype == array.dtype
    meta = read_meta(directory)
    assert meta["fingerprint"] == "abc" and meta["shapes"]["latents"] == [COUNT, VIEWS, 2, 1, 2]
    assert [entry.name for entry in directory.parent.iterdir()] == ["cache"]


def test_training_batches_draw_one_view(cache):
    dataset = CacheDataset(cache, batch_size=4, train=True, seed=1)
    assert (dataset.num_examples, dataset.steps_per_epoch, dataset.num_classes) == (COUNT, 2, 2)
    assert (dataset.class_names, dataset.vocab_size, dataset.text_length) == (("a", "b"), 40, 5)
    iterator = dataset.iterator()
    seen, views = [], set()
    for _ in range(COUNT):
        batch = next(iterator)
        assert {key: array.shape[1:] for key, array in batch.items()} == {
            "latents": (2, 1, 2),
            "cond": (5,),
            "index": (),
        }
        row, view = batch["latents"][:, 0, 0].astype(int).T
        np.testing.assert_array_equal(batch["cond"][:, 0], row * 5)
        np.testing.assert_array_equal(batch["index"], COUNT - 1 - row)
        seen.extend(row)
        views.update(view)
    assert sorted(seen) == sorted([*range(COUNT)] * 4) and views == {0, 1, 2}


def test_interrupted_equals_uninterrupted(cache):
    whole = CacheDataset(cache, batch_size=4, train=True).iterator()
    expected = [next(whole) for _ in range(7)]
    first = CacheDataset(cache, batch_size=4, train=True).iterator()
    for _ in range(3):
        next(first)
    resumed = CacheDataset(cache, batch_size=4, train=True).iterator()
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    for batch in expected[3:]:
        found = next(resumed)
        for key in batch:
            np.testing.assert_array_equal(found[key], batch[key])


def test_shards_together_are_the_whole_batch(cache):
    whole = next(CacheDataset(cache, batch_size=4, train=True).iterator())
    for i in range(2):
        part = next(CacheDataset(cache, batch_size=4, train=True, shard_index=i, shard_count=2).iterator())
        np.testing.assert_array_equal(part["latents"], whole["latents"][2 * i : 2 * i + 2])


def test_evaluation_is_in_order_with_the_first_view(cache):
    found = list(CacheDataset(cache, batch_size=4, train=False).iterator())
    latents = np.concatenate([batch["latents"] for batch in found])
    mask = np.concatenate([batch["mask"] for batch in found])
    np.testing.assert_array_equal(mask, np.arange(12) < COUNT)
    np.testing.assert_array_equal(latents[mask], rows()["latents"][:, 0])


def test_a_cache_without_latents(tmp_path):
    codes = np.arange(6 * 4, dtype=np.int32).reshape(6, 2, 2)
    directory = write_cache(tmp_path / "codes", [{"codes": codes}], {"fingerprint": "x"})
    batch = next(CacheDataset(directory, batch_size=6, train=False).iterator())
    np.testing.assert_array_equal(batch["codes"], codes)


def test_arrays_with_views_show_the_same_one(tmp_path):
    row, view = np.mgrid[:COUNT, :VIEWS]
    arrays = {"codes": np.stack([row, view], axis=-1), "grains": 10 * view + row, "index": np.arange(COUNT)}
    directory = write_cache(tmp_path / "codes", [arrays], {"fingerprint": "x", "views": ["latents", "codes", "grains"]})
    batch = next(CacheDataset(directory, batch_size=COUNT, train=True, seed=1).iterator())
    row, view = batch["codes"].T
    np.testing.assert_array_equal(row, batch["index"])
    np.testing.assert_array_equal(batch["grains"], 10 * view + row)
    assert set(view) == {*range(VIEWS)}


def test_interrupted_writing_leaves_the_old_cache(tmp_path):
    directory = write_cache(tmp_path / "cache", batches(), META)

    def broken():
        yield next(iter(batches()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(directory, broken(), {"fingerprint": "new"})
    assert read_meta(directory)["fingerprint"] == "abc"
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "other", broken(), META)
    assert read_meta(tmp_path / "other") is None
    write_cache(directory, batches(np.float32), {"fingerprint": "new"})
    assert read_meta(directory)["fingerprint"] == "new"
    assert CacheDataset(directory, 4, True).num_classes is None


def test_a_cache_of_an_earlier_format_is_none_and_is_replaced(tmp_path):
    directory = write_cache(tmp_path / "cache", batches(), META)
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    assert read_meta(directory) is None
    with pytest.raises(FileNotFoundError, match="no cache in"):
        CacheDataset(directory, 4, True)
    write_cache(directory, batches(), META)
    assert read_meta(directory) == meta


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "meta.json' holds a list, not a dict"),
        ("{", "meta.json' is not readable JSON"),
        ('{"format": 2, "fingerprint": 1}', "meta.json' is no meta of a cache; delete '.*cache' to make it again"),
        ('{"format": 2, "shapes": {"x": [1]}}', "meta.json' is no meta of a cache"),
        ('{"format": 2, "fingerprint": 1, "shapes": {}}', "meta.json' is no meta of a cache"),
    ],
)
def test_a_meta_of_another_shape_is_named(tmp_path, content, message):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_meta(tmp_path / "cache")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".cache.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_cache(tmp_path / "cache", batches(), META)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_errors(tmp_path):
    one = {"latents": np.zeros((2, 1, 3), np.float32), "cond": np.zeros((2, 1), np.int32)}
    with pytest.raises(ValueError, match="cache meta has no 'fingerprint': its entries are name"):
        write_cache(tmp_path / "cache", [one], {"name": "x"})
    with pytest.raises(ValueError, match="no batches for the cache"):
        write_cache(tmp_path / "cache", [], META)
    with pytest.raises(ValueError, match=r"cache batch .*: expected rows of latents, cond, equally many"):
        write_cache(tmp_path / "cache", [one, {"latents": one["latents"]}], META)
    with pytest.raises(ValueError, match=r"cache batch .*: expected rows of latents, cond, equally many"):
        write_cache(tmp_path / "cache", [{**one, "cond": np.zeros((3, 1), np.int32)}], META)
    with pytest.raises(ValueError, match=r"cache rows changed from float32 \(1, 3\) to float32 \(1, 4\)"):
        write_cache(tmp_path / "cache", [one, {**one, "latents": np.zeros((2, 1, 4), np.float32)}], META)
    with pytest.raises(FileNotFoundError, match="no cache in '.*cache': write one with write_cache"):
        CacheDataset(tmp_path / "cache", 4, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="mine' exists and is not a cache: choose another place"):
        write_cache(tmp_path / "mine", [one], META)
    assert (tmp_path / "mine" / "thesis.tex").exists()

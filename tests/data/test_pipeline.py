"""Pipelines: what a batch holds, order, shards, exact resume with threads and workers, evaluation, errors."""

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("grain")
from PIL import Image  # noqa: E402

from rq_jax.data import Dataset, fingerprint, make_dataset, open_splits, transforms  # noqa: E402
from rq_jax.data.text import load_tokenizer, train_tokenizer  # noqa: E402
from rq_jax.data.transforms import scale  # noqa: E402

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images whose first pixel is their number, in two classes, captioned; and a tokenizer of the captions."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (14, 11 + i % 3, 3), dtype=np.uint8)
        pixels[0, 0] = i
        file = root / f"class{i % 2}" / f"{i:02}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f"picture number {i}")
    train_tokenizer([f"picture number {i}" for i in range(COUNT)], 50, root / "tokenizer.json")
    return root


def make(folder, train=True, **settings):
    settings = {"batch_size": 4, "image_size": 8, **settings}
    return make_dataset(split="all", train=train, name="folder", data_dir=folder, **settings)


def captioned(folder):
    return {
        "text_key": "txt",
        "text_tokenizer": folder / "tokenizer.json",
        "text_length": 9,
        "text_dropout": 0.3,
    }


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype


def shapes(batch):
    return {key: (array.shape, array.dtype.name) for key, array in batch.items()}


@pytest.mark.parametrize("kind, cond", [("plain", {}), ("class", {"cond": ((4, 1), "int32")}), ("text", {"cond": ((4, 9), "int32")})])  # fmt: skip
def test_training_batch(folder, kind, cond):
    settings = {"plain": {}, "class": {"label_key": "folder"}, "text": captioned(folder)}[kind]
    dataset = make(folder, image_size=(8, 6), **settings)
    batch = next(dataset.iterator())
    assert shapes(batch) == {"image": ((4, 8, 6, 3), "float32"), "index": ((4,), "int32"), **cond}
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    as_bytes = next(dataset.as_bytes().iterator())
    assert as_bytes["image"].dtype == np.uint8
    np.testing.assert_array_equal(scale(as_bytes["image"]), batch["image"])
    assert (dataset.num_examples, dataset.steps_per_epoch) == (COUNT, COUNT // 4)
    classes = (2, ("class0", "class1")) if kind == "class" else (None, None)
    assert (dataset.num_classes, dataset.class_names) == classes
    assert (dataset.vocab_size, dataset.text_length) == ((50, 9) if kind == "text" else (None, None))


def test_the_condition_is_that_of_the_example(folder):
    batch = make(folder, label_key="folder").examples([0, 5, 11, 12])  # half of the files are in each class folder
    assert batch["cond"].tolist() == [[0], [0], [0], [1]]
    caption = load_tokenizer(folder / "tokenizer.json", 9)(["picture number 2"])
    np.testing.assert_array_equal(make(folder, **captioned(folder)).examples([1])["cond"], caption)


def test_every_part_of_an_example_is_of_the_same_example(folder):
    settings = {**captioned(folder), "text_dropout": 0.0}
    dataset = make(folder, train_transform="resize_center_crop", flip_probability=0.0, **settings)
    for batch in take(dataset.iterator(), 6):
        expected = dataset.examples(batch["index"])
        assert_equal_batches([batch], [expected])


def test_split_names_are_roles_that_the_data_set_names(folder):
    settings = {"name": "folder", "data_dir": folder, "batch_size": 4, "image_size": 8}
    train = make_dataset(split="train", train=True, train_split="all", **settings)
    validation = make_dataset(split="validation", train=False, validation_split="train", **settings)
    own_name = make_dataset(split="all", train=False, **settings)
    assert train.num_examples == own_name.num_examples == COUNT
    assert 0 < validation.num_examples < COUNT


def test_splits_are_what_make_dataset_opens(folder):
    shard = dict(seed=7, shard_index=1, shard_count=2)
    settings = dict(name="folder", data_dir=folder, batch_size=4, image_size=8, label_key="folder")
    splits = open_splits(**shard, **settings)
    for opened, split, train in zip(splits, ("train", "validation", "train"), (True, False, False), strict=True):
        expected = make_dataset(split=split, train=train, **shard, **settings)
        assert (opened.num_examples, opened.class_names) == (expected.num_examples, expected.class_names)
        assert_equal_batches(take(opened.iterator(), 3), take(expected.iterator(), 3))
    assert splits.train.train and splits.train.num_examples == splits.ordered.num_examples
    assert sum(batch["mask"].sum() for batch in splits.ordered.iterator()) < splits.ordered.num_examples  # one of two
    assert splits.ordered.source is splits.train.source


def test_each_epoch_shows_everything_once_in_another_order(folder):
    iterator = make(folder, batch_size=1).iterator()
    epochs = [[int(batch["index"][0]) for batch in take(iterator, COUNT)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(COUNT))


def test_transforms_are_drawn_anew_each_epoch(folder):
    dataset = make(folder, batch_size=COUNT)
    first, second = (batch["image"][np.argsort(batch["index"])] for batch in take(dataset.iterator(), 2))
    assert (first != second).any(axis=(1, 2, 3)).sum() > COUNT / 2


def test_the_seed_decides_order_and_transforms(folder):
    first, again, other = (next(make(folder, seed=seed, batch_size=COUNT).iterator()) for seed in (5, 5, 6))
    assert_equal_batches([first], [again])
    assert (first["index"] != other["index"]).any()

    def draws(seed):
        def draw(example, rng):
            return {"draw": np.float64(rng.random())}

        dataset = Dataset(range(9), train=True, batch_size=9, train_transform=draw, eval_transform=draw, seed=seed)
        return next(dataset.iterator())["draw"]

    np.testing.assert_array_equal(draws(5), draws(5))
    assert not np.isin(draws(5), draws(6)).any()


@pytest.mark.parametrize("consumed", [0, 3, 13])
def test_interrupted_equals_uninterrupted(folder, consumed):
    settings = {**captioned(folder), "train_transform": "jittered_crop", "num_threads": 3}
    whole = take(make(folder, **settings).iterator(), 16)
    first = make(folder, **settings).iterator()
    take(first, consumed)
    state = json.loads(json.dumps(first.get_state()))
    resumed = make(folder, **settings).iterator()
    resumed.set_state(state)
    assert_equal_batches(take(resumed, 16 - consumed), whole[consumed:])
    assert resumed.get_state() == {"next_batch": 16}


def test_an_iterator_can_go_back(folder):
    iterator = make(folder).iterator()
    first = take(iterator, 5)
    iterator.set_state({"next_batch": 2})
    assert_equal_batches(take(iterator, 3), first[2:])


def test_threads_do_not_matter(folder):
    runs = [take(make(folder, num_threads=threads, **captioned(folder)).iterator(), 8) for threads in (1, 4)]
    assert_equal_batches(*runs)


def test_worker_processes_do_not_matter(folder):
    settings = captioned(folder)
    expected = take(make(folder, **settings).iterator(), 6)
    iterator = make(folder, num_workers=1, **settings).iterator()
    iterator.set_state({"next_batch": 2})
    found = [{key: array.copy() for key, array in batch.items()} for batch in take(iterator, 4)]
    iterator.close()
    assert_equal_batches(found, expected[2:])


def test_shards_together_are_the_whole_batch(folder):
    settings = {"batch_size": 6, **captioned(folder)}
    whole = take(make(folder, **settings).iterator(), 9)
    shards = [take(make(folder, shard_index=i, shard_count=3, **settings).iterator(), 9) for i in range(3)]
    for step, batch in enumerate(whole):
        for i in range(3):
            assert_equal_batches([shards[i][step]], [{key: array[2 * i : 2 * i + 2] for key, array in batch.items()}])


def test_evaluation_is_in_order_and_padded(folder):
    dataset = make(folder, train=False, **captioned(folder))
    batches = list(dataset.iterator())
    assert len(batches) == dataset.steps_per_epoch == 6
    assert all(batch["image"].shape == (4, 8, 8, 3) and batch["mask"].dtype == bool for batch in batches)
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(joined["mask"], np.arange(24) < COUNT)
    np.testing.assert_array_equal(joined["index"][joined["mask"]], np.arange(COUNT))
    assert_equal_batches(batches, list(dataset.iterator()))
    expected = dataset.examples([3, 20])
    np.testing.assert_array_equal(joined["image"][[3, 20]], expected["image"])
    np.testing.assert_array_equal(joined["cond"][[3, 20]], expected["cond"])


def test_held_out_images_may_have_a_batch_of_their_own_and_a_number(folder):
    splits = open_splits(
        name="folder", data_dir=folder, image_size=8, batch_size=4, validation_split="train", label_key="folder",
        validation_batch_size=3, max_validation_images=7,
    )  # fmt: skip
    assert [split.batch_size for split in splits] == [4, 3, 4]
    count = splits.train.num_examples
    batches = list(splits.validation.iterator())
    index, mask, cond = (np.concatenate([batch[name] for batch in batches]) for name in ("index", "mask", "cond"))
    assert [len(batch["mask"]) for batch in batches] == [3, 3, 3] and mask.tolist() == 7 * [True] + 2 * [False]
    assert index[mask].tolist() == [i * count // 7 for i in range(7)]
    assert set(cond[mask, 0]) == {0, 1}  # classes lie together
    assert splits.validation.at_most(1000).num_examples == 7
    assert fingerprint.of_dataset(splits.validation)["number of examples"] == count  # the data is the same
    for setting in ("validation_batch_size", "max_validation_images"):
        with pytest.raises(ValueError, match=f"^data.{setting}: 0 must be at least 1"):
            make(folder, **{setting: 0})


def test_a_stand_in_of_a_spread_image_does_not_count(folder, tmp_path):
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:8]):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes() if i != 4 else b"damaged")
    dataset = make(tmp_path, train=False, batch_size=4).at_most(4)
    (batch,) = dataset.iterator()
    assert batch["mask"].tolist() == [True, True, False, True]  # of 0, 2, 4, 6


def test_evaluation_shards_in_order_are_the_whole_batch(folder):
    whole = list(make(folder, train=False, batch_size=10).iterator())
    shards = [list(make(folder, train=False, batch_size=10, shard_index=i, shard_count=5).iterator()) for i in range(5)]
    assert {len(batches) for batches in shards} == {len(whole)}
    joined = [{key: np.concatenate([shard[step][key] for shard in shards]) for key in whole[0]} for step in range(3)]
    assert_equal_batches(joined, whole)


def test_a_damaged_image_does_not_count_in_evaluation(folder, tmp_path):
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:5]):
        (tmp_path / file.name).write_bytes(b"" if i in (1, 4) else file.read_bytes())
    batches = list(make(tmp_path, train=False, batch_size=3).iterator())
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.tolist() == [True, False, True, True, False, False]


def test_batches_larger_than_the_set(folder):
    dataset = make(folder, batch_size=50)
    assert dataset.steps_per_epoch == 1
    assert next(dataset.iterator())["image"].shape[0] == 50
    batches = list(make(folder, train=False, batch_size=50).iterator())
    assert len(batches) == 1 and batches[0]["mask"].sum() == COUNT


def test_eval_transform_is_read(folder):
    crop, squash = (
        make(folder, eval_transform=name).examples([0])["image"] for name in ("resize_center_crop", "squash")
    )
    assert (crop != squash).any()


def test_channels_is_read(folder):
    assert make(folder, channels=1).examples([0])["image"].shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "data.batch_size: 0 must be a positive multiple of 1, the shards"),
        ({"batch_size": 5, "shard_count": 2}, "data.batch_size: 5 must be a positive multiple of 2, the shards"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index: 2 is outside 0..1, the shards"),
        ({"num_threads": 0}, "data.num_threads: 0 must be at least 1"),
        ({"num_workers": -1}, "data.num_workers: -1 must be at least 0"),
        ({"seed": -1}, r"seed: -1 is outside \[0, 2\*\*32\)"),
        ({"image_size": 0}, "data.image_size: 0 is not allowed; give a positive side"),
        ({"image_size": (8, 8, 3)}, r"data.image_size: \(8, 8, 3\) is not allowed; give a positive side"),
        ({"train_transform": "crop"}, "data.train_transform: 'crop' is unknown; allowed are resize_random_crop"),
        (
            {"eval_transform": "jittered_crop"},
            "data.eval_transform: 'jittered_crop' is unknown; allowed are resize_center_crop",
        ),
        ({"flip_probability": 1.5}, r"data.flip_probability: 1.5 is outside \[0, 1\]"),
        (
            {"label_key": "folder", "text_key": "txt"},
            "^data.label_key 'folder' and data.text_key 'txt': set one of them$",
        ),
        ({"text_key": "txt"}, "data.text_tokenizer: unset, but data.text_key 'txt' needs a tokenizer file; set it"),
    ],
)
def test_errors(folder, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(folder, **settings)
    assert "\n" not in str(caught.value)


def test_missing_text_length(folder):
    with pytest.raises(ValueError, match="data.text_length: None must be at least 1"):
        make(folder, **{**captioned(folder), "text_length": None})


def test_state_of_something_else_is_refused(folder):
    with pytest.raises(ValueError, match="data state: {'step': 3} is not allowed; give {'next_batch': <int>}"):
        make(folder).iterator().set_state({"step": 3})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.fault("an image that a transform fails on", "passed over and counted")
def test_what_fails_in_a_transform_counts_as_damaged(folder, train, monkeypatch):
    """The next one stands in, as for an image that cannot be decoded."""
    first = make(folder, train, train_transform="resize_center_crop", flip_probability=0.0)
    expected = take(first.iterator(), 5)

    def fail(image, size, rng):
        if image.getpixel((0, 0))[0] in (5, 6):
            raise ZeroDivisionError("no size")
        return original(image, size, rng)

    original = transforms.TRANSFORMS["resize_center_crop"]
    monkeypatch.setitem(transforms.TRANSFORMS, "resize_center_crop", fail)
    dataset = make(folder, train, train_transform="resize_center_crop", flip_probability=0.0)
    records = dataset.source.records
    damaged = {i for i in range(COUNT) if records.locate(i).endswith(("05.png", "06.png"))}
    found = take(dataset.iterator(), 5)
    assert dataset.source.damaged == damaged
    for old, new in zip(expected, found, strict=True):
        stands_in = np.isin(old["index"], list(damaged))
        np.testing.assert_array_equal(new["index"][~stands_in], old["index"][~stands_in])
        np.testing.assert_array_equal(new["image"][~stands_in], old["image"][~stands_in])
        assert not np.isin(new["index"], list(damaged)).any()
    with pytest.raises(ValueError, match="data.max_damaged: more than 1 images are damaged; .*: no size"):
        take(make(folder, train, train_transform="resize_center_crop", max_damaged=1).iterator(), 6)

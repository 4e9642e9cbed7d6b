"""Length buckets: how images are grouped, exact positions within a window, whole runs, devices, what is refused."""

import dataclasses
import json
from typing import Any

import compilation
import helpers
import jax
import numpy as np
import pytest

from rq_jax import grains, recipes
from rq_jax.recipes.buckets import BucketedDataset, Buckets, Programs, group
from rq_jax.recipes.dq_transformer import DQTransformer
from rq_jax.training import run


@pytest.fixture(scope="module", autouse=True)
def quick():
    with helpers.quick_compilation():
        yield


# --- grouping ----------------------------------------------------------------------------------------------------------

B, W, MOST = 4, 3, 50


@dataclasses.dataclass
class Numbers:
    """Batches of consecutive numbers, as images; like `data.pipeline.Dataset`."""

    batch_size: int = B
    position: int = 0
    closed: bool = False

    def iterator(self) -> "Numbers":
        return Numbers(self.batch_size)

    def __next__(self) -> np.ndarray:
        first = self.position * self.batch_size
        self.position += 1
        return np.arange(first, first + self.batch_size)

    def set_state(self, state) -> None:
        assert state.keys() == {"next_batch"}
        self.position = state["next_batch"]

    def close(self) -> None:
        self.closed = True


def length_of(numbers):
    return 10 + numbers * 7919 % 37


def numbered(buckets=(20, 35), window=W, batch_size=B, seed=5, encode=None) -> BucketedDataset:
    """A dataset whose batches are (numbers of its images, P)."""

    def pack(rows, chosen, tokens):
        return np.concatenate(rows)[chosen].tolist(), tokens

    programs = Programs(encode or (lambda batch: (batch, length_of(batch))), pack, MOST)
    return BucketedDataset(Numbers(batch_size), Buckets(buckets, window), programs, seed)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_a_window_holds_its_images_once_by_length():
    batches = take(numbered().iterator(), 4 * W)
    for start in range(0, 4 * W, W):
        window = batches[start : start + W]
        images = [image for rows, _ in window for image in rows]
        assert sorted(images) == list(range(start * B, (start + W) * B))
        by_length = sorted((length_of(np.array(rows)).tolist() for rows, _ in window), key=max)
        for shorter, longer in zip(by_length[:-1], by_length[1:], strict=True):
            assert max(shorter) <= min(longer)
    for rows, tokens in batches:
        assert rows == sorted(rows)  # as they came
        longest = length_of(np.array(rows)).max()
        assert tokens == min(bucket for bucket in (20, 35, MOST) if bucket >= longest)
    assert {tokens for _, tokens in batches} == {20, 35, MOST}


def test_the_order_of_lengths_is_drawn_for_each_window():
    lengths = np.repeat([5, 1, 3], 2)
    orders = {tuple(lengths[group(lengths, 3, (seed, start))[:, 0]]) for seed in range(4) for start in range(0, 12, 3)}
    assert len(orders) == 6
    np.testing.assert_array_equal(group(lengths, 3, (1, 3)), group(lengths, 3, (1, 3)))
    assert take(numbered(seed=6).iterator(), W) != take(numbered(seed=5).iterator(), W)


def test_equal_lengths_keep_their_order():
    assert sorted(group(np.ones(6, int), 3, (0, 0)).tolist()) == [[0, 1], [2, 3], [4, 5]]


def test_without_a_window_batches_are_those_of_the_dataset():
    for number, (rows, tokens) in enumerate(take(numbered(window=1).iterator(), 5)):
        assert rows == list(range(number * B, (number + 1) * B)) and tokens >= length_of(np.array(rows)).max()


def test_encoding_is_one_batch_ahead_of_every_batch_handed_out():
    encoded = []

    def encode(batch):
        encoded.append(int(batch[0]) // B)
        return batch, length_of(batch)

    iterator = numbered(encode=encode).iterator()
    for handed_out in range(1, 3 * W):
        next(iterator)
        assert encoded == list(range(W + handed_out))


# --- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("handed_out", range(2 * W + 1))
def test_a_saved_position_goes_on_with_the_very_next_batch(handed_out):
    whole = take(numbered().iterator(), 4 * W)
    interrupted, resumed = numbered().iterator(), numbered().iterator()
    take(interrupted, handed_out)
    take(resumed, 2)  # somewhere else
    state = interrupted.get_state()
    assert state["next_batch"] == handed_out
    resumed.set_state(json.loads(json.dumps(state)))
    assert take(resumed, 4 * W - handed_out) == whole[handed_out:]


def test_the_position_of_a_plain_dataset_starts_a_window():
    iterator = numbered().iterator()
    iterator.set_state({"next_batch": 5})
    images = [image for rows, _ in take(iterator, W) for image in rows]
    assert sorted(images) == list(range(5 * B, (5 + W) * B))


def test_a_window_of_another_size_starts_anew(caplog):
    iterator = numbered().iterator()
    take(iterator, W + 1)
    state = iterator.get_state()
    for other in (numbered(window=2), numbered(batch_size=2 * B)):
        resumed = other.iterator()
        resumed.set_state({**state, "next_batch": 2})  # of a larger batch, as the loop counts
        first = 2 * other.batch_size
        images = [image for rows, _ in take(resumed, other.buckets.window) for image in rows]
        assert sorted(images) == list(range(first, first + len(images)))
        assert caplog.messages[-1] == (
            "loop.buckets: 1 of 3 batches of 4 images were read of a window whose size is changed; a new one starts, "
            "and some images of the old one come twice, others not at all"
        )
    caplog.clear()
    take(iterator, W - 1)
    numbered(window=2).iterator().set_state(iterator.get_state())  # between two windows nothing is lost
    assert not caplog.messages


def test_closing_closes_the_dataset():
    iterator = numbered().iterator()
    iterator.close()
    assert iterator._batches.closed


# --- packed codes ------------------------------------------------------------------------------------------------------

SHORT, MIDDLE = 41, 47  # of 20 to 68 tokens


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    pictures = helpers.write_pictures(root / "pictures", num_train=48)
    return pictures, helpers.save_dq_tokenizer(root / "tokenizer", pictures)


def make_config(places, **settings):
    pictures, tokenizer = places
    buckets = {"loop__buckets": (SHORT, MIDDLE), "loop__bucket_window": W}
    return helpers.dqtransformer_config(pictures, "class", tokenizer=str(tokenizer), **{**buckets, **settings})


def prepare(places, mesh=None, **settings):
    return recipes.prepare(make_config(places, **settings), mesh=mesh or helpers.make_mesh())


@pytest.fixture(scope="module")
def prepared(places):
    run_of_seven = {"loop__total_steps": 7, "loop__evaluate_every_steps": 7, "loop__checkpoint_every_steps": 100}
    return prepare(places, data__flip_probability=0.5, loop__buckets=(44,), **run_of_seven)


@pytest.fixture(scope="module")
def whole_run(prepared, tmp_path_factory):
    """A run over two windows and a step, and the programs that it compiled."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with compilation.count_compilations() as compiled:
        state = run(*prepared, workdir)
    return workdir, state, compiled.names


def batches_of(recipe, dataset, count) -> list[dict[str, Any]]:
    return jax.device_get(take(recipe.bucketed(dataset).iterator(), count))


def packed_alone(recipe, dataset, indices, tokens):
    """Images one after the other, from the data set to tokens."""
    encode = jax.jit(lambda variables, x: recipe.tokenizer.model.apply(variables, x, method="encode_to_codes"))
    codes = encode(recipe.tokenizer.variables, dataset.examples(indices)["image"])
    return jax.device_get(grains.pack(codes, recipe.model.layout, tokens))


def test_batches_are_the_packed_codes_of_their_images(places):
    recipe, data, _ = prepare(places)
    plain = take(data.train.iterator(), 2 * W)
    batches = batches_of(recipe, data.train, 2 * W)
    for start in (0, W):
        indices, expected = (
            np.sort(np.concatenate([batch["index"] for batch in each[start : start + W]])) for each in (batches, plain)
        )
        np.testing.assert_array_equal(indices, expected)
    for batch in batches:
        tokens = batch["packed"].position.shape[1]
        helpers.assert_equal(batch["packed"], packed_alone(recipe, data.ordered, batch["index"], tokens))
        np.testing.assert_array_equal(batch["cond"], data.ordered.examples(batch["index"])["cond"])
        fitting = [bucket for bucket in (SHORT, MIDDLE, 68) if bucket >= batch["packed"].length.max()]
        assert tokens == fitting[0]
    assert len({batch["packed"].position.shape for batch in batches}) == 3


def test_codes_of_a_cache_are_grouped_alike(places, tmp_path):
    recipe, data, _ = prepare(places, loop__use_latent_cache=True)
    cached = recipe.start(str(tmp_path), data, True)[1].train
    expected = batches_of(recipe, data.train, W)
    helpers.assert_equal(jax.device_get(take(cached.iterator(), W)), expected)


def test_eight_devices_group_as_one(places):
    (one, data, _), (eight, _, _) = prepare(places), prepare(places, mesh=helpers.make_mesh(2, 2, 2))
    expected = batches_of(one, data.train, 2 * W)
    found = take(eight.bucketed(data.train).iterator(), 2 * W)
    helpers.assert_equal(jax.device_get(found), expected)
    assert all(batch["packed"].content.sharding.shard_shape(batch["packed"].content.shape)[0] == 2 for batch in found)
    assert all(batch["index"].is_fully_replicated for batch in found)


def test_a_bucket_changes_no_loss(places):
    settings = {"model__residual_dropout": 0.0, "model__embedding_dropout": 0.0, "model__attention_dropout": 0.0}
    recipe, data, _ = prepare(places, **settings)
    batch = next(batch for batch in batches_of(recipe, data.train, W) if batch["packed"].position.shape[1] == SHORT)
    longest = {**batch, "packed": packed_alone(recipe, data.ordered, batch["index"], None)}
    state = helpers.start_state(recipe, helpers.drawn_variables(recipe.model.clone(residual_dropout=0.0), 1))
    update = helpers.jit_update(recipe, read=lambda state, metrics: metrics)
    metrics = [jax.device_get(update(state, each, recipe.frozen)) for each in (batch, longest)]
    shares = [each.pop("pad_share") for each in metrics]
    np.testing.assert_allclose(shares, 1 - batch["packed"].length.mean() / np.array([SHORT, 68]), rtol=1e-5)
    helpers.assert_close(*metrics)


def test_one_program_for_each_bucket_and_no_more(whole_run, prepared):
    _, state, names = whole_run
    recipe, data, _ = prepared
    met = [batch["packed"].position.shape[1] for batch in batches_of(recipe, data.train, 7)]
    assert min(met.count(44), met.count(68)) > 1 and int(state.step) == 7
    count = lambda name: sum(name in each for each in names)  # noqa: E731
    assert (count("update"), count("pack"), count("encode")) == (2, 2, 1)


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3))])
def test_a_run_resumed_within_a_window_is_the_uninterrupted_one(prepared, whole_run, tmp_path, monkeypatch, step):
    workdir, expected, _ = whole_run
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        helpers.interrupt_at_log(patch, DQTransformer, step)
        run(*prepared, tmp_path)
    state = run(*prepared, tmp_path)
    helpers.assert_equal(helpers.host(state), helpers.host(expected))
    assert helpers.read_metrics(tmp_path) == helpers.read_metrics(workdir)


# --- what is refused ---------------------------------------------------------------------------------------------------

TOKENS = r"is outside 20\.\.68, the tokens of an image$"
REFUSED = {
    "not increasing": ({"loop__buckets": (50, 38)}, r"^loop.buckets: \(50, 38\) must increase$"),
    "twice": ({"loop__buckets": (50, 50)}, r"^loop.buckets: \(50, 50\) must increase$"),
    "not positive": ({"loop__buckets": (0, 38)}, f"^loop.buckets: 0 {TOKENS}"),
    "shorter than any image": ({"loop__buckets": (19, 38)}, f"^loop.buckets: 19 {TOKENS}"),
    "longer than any image": ({"loop__buckets": (38, 69)}, f"^loop.buckets: 69 {TOKENS}"),
    "no integers": ({"loop__buckets": (38.5,)}, r"^loop.buckets: \(38.5,\) is not of type tuple\[int, ...\]$"),
    "no window": ({"loop__bucket_window": 0}, "^loop.bucket_window: 0 must be an integer and at least 1$"),
    "no buckets": (
        {"loop__buckets": ()},
        r"^loop.bucket_window: 3 groups images for loop.buckets, which are \(\); give buckets, or set it to 1$",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_in_one_line(places, case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        prepare(places, **settings)
    assert "\n" not in str(error.value)


def test_buckets_of_a_model_without_grains_are_refused(places, tmp_path):
    pictures, _ = places
    tokenizer = helpers.save_tokenizer(tmp_path / "rq", pictures)
    config = helpers.transformer_config(pictures, "class", tokenizer=str(tokenizer)).to_dict()
    config["loop"]["buckets"] = (38,)
    message = r"^loop.buckets: \(38,\) is read by 'dqtransformer' only, not by 'rqtransformer'; set it to \(\)$"
    with pytest.raises(ValueError, match=message):
        recipes.prepare(config)

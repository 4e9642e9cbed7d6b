"""Features on disk: reduced alike however they come, gone on with after a crash, found again, never mixed up."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import extracting_process as process
import helpers
import jax
import numpy as np
import pytest

from rq_jax.evaluation import store
from rq_jax.evaluation.features import FeatureExtractor
from rq_jax.evaluation.statistics import ClassSums, Moments, split_of
from rq_jax.evaluation.store import Place
from rq_jax.files import RunLock

NUM_IMAGES, SIDE = 61, 16
EXTRACTOR = process.Cheap(6)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 10)


def extractor(devices=1):
    return FeatureExtractor(EXTRACTOR, helpers.make_mesh(devices))


@pytest.fixture(scope="module")
def one():
    return extractor()


def open_batches(first, batch_size=4, num_images=NUM_IMAGES):
    """The images do not depend on the batch size."""
    images = np.random.default_rng(0).integers(0, 256, (num_images, SIDE, SIDE, 3), np.uint8)
    for start in range(first * batch_size, num_images, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        mask = (index < num_images) & (index % 7 != 3)
        yield {"image": images[np.minimum(index, num_images - 1)], "mask": mask, "index": index}


def extract(extractor, place=None, batch_size=4, batches=None, **settings):
    settings = {"num_images": NUM_IMAGES, "batch_size": batch_size, "num_splits": 3, **settings}
    open_all = batches or (lambda first: open_batches(first, batch_size))
    return extractor.extract(open_all, place=place, **settings)


@pytest.fixture(scope="module")
def whole(one):
    """Everything in one batch, in memory."""
    return extract(one, batch_size=NUM_IMAGES)


def place(tmp_path, **key):
    return Place(tmp_path, {"images": "made up", **key})


def assert_same_bits(found, expected):
    assert process.summary(found) == process.summary(expected)


def test_everything_at_once_is_what_numpy_says(whole):
    vectors, count = whole.vectors[0], sum(i % 7 != 3 for i in range(NUM_IMAGES))
    np.testing.assert_array_equal(whole.positions, [i for i in range(NUM_IMAGES) if i % 7 != 3])
    exact = vectors.astype(np.float64)
    assert whole.moments[0].count == count and vectors.shape == (count, 6)
    np.testing.assert_allclose(whole.moments[0].mean, exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(whole.moments[0].covariance, np.cov(exact, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("devices, batch_size", [(1, 5), (3, 6), (8, 8), (8, 64)])
def test_shards_and_batches_make_no_difference(whole, tmp_path, devices, batch_size):
    found = extract(extractor(devices), place(tmp_path), batch_size)
    np.testing.assert_array_equal(found.positions, whole.positions)
    np.testing.assert_allclose(found.vectors, whole.vectors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.moments[0].mean, whole.moments[0].mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.moments[0].scatter, whole.moments[0].scatter, rtol=1e-6, atol=1e-6)
    assert found.scores[0].score() == pytest.approx(whole.scores[0].score(), rel=1e-6)


@pytest.mark.parametrize("crash_at", [0, 1, 3, 4, 9, 15])
def test_a_run_goes_on_behind_its_last_block_with_the_same_bits(one, tmp_path, crash_at):
    expected = extract(one, place(tmp_path / "whole"))
    opened = []

    def crashing(first):
        opened.append(first)
        yield from itertools.islice(open_batches(first), max(crash_at - first, 0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(one, place(tmp_path / "crashed"), batches=crashing)

    def going_on(first):
        opened.append(first)
        return open_batches(first)

    assert_same_bits(extract(one, place(tmp_path / "crashed"), batches=going_on), expected)
    # A block is three batches of four images, a seventh of which do not count; a batch is handed on one late.
    assert opened == [0, max(crash_at - 1, 0) // 3 * 3]


def test_a_set_that_is_finished_is_never_measured_again(one, tmp_path, caplog):
    expected = extract(one, place(tmp_path))

    def never(first):
        raise AssertionError("measured again")

    with caplog.at_level("INFO", "rq_jax"):
        again = extract(one, place(tmp_path), batches=never)
    assert_same_bits(again, expected)
    assert isinstance(again.vectors, np.memmap) and not again.vectors.flags.writeable
    assert f"features: 52 images from '{tmp_path}" in caplog.text
    extract(one, place(tmp_path), batches=never, batch_size=32)  # of which finished features do not depend
    with pytest.raises(AssertionError):
        extract(one, place(tmp_path, protocol="another"), batches=never)
    with pytest.raises(AssertionError):
        extract(one, place(tmp_path), batches=never, num_splits=2)
    with pytest.raises(AssertionError):
        extract(one, place(tmp_path), batches=never, dtype="float16")


def crash(one, place, batch_size=4):
    def crashing(first):
        yield from itertools.islice(open_batches(first, batch_size), 9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(one, place, batch_size, crashing)


def test_other_batches_begin_anew(one, whole, tmp_path):
    crash(one, place(tmp_path))
    found = extract(one, place(tmp_path), batch_size=8)
    np.testing.assert_array_equal(found.positions, whole.positions)
    np.testing.assert_allclose(found.moments[0].scatter, whole.moments[0].scatter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damage", ["state.npz", "features.npy", "half of state.npz"])
def test_a_damaged_store_begins_anew(one, tmp_path, damage, caplog):
    expected = extract(one, place(tmp_path / "whole"))
    crash(one, place(tmp_path / "crashed"))
    (path,) = (tmp_path / "crashed").glob(f"*/{damage.split()[-1]}")
    path.write_bytes(path.read_bytes()[:200]) if damage.startswith("half") else path.unlink()
    assert_same_bits(extract(one, place(tmp_path / "crashed")), expected)
    assert ("cannot be read" in caplog.text) == damage.startswith("half")


def test_reconstructions_are_sets_of_their_own(one, tmp_path):
    found = extract(one, place(tmp_path), rebuild=lambda images: (images, -images, 0.5 * images))
    assert len(found.moments) == len(found.scores) == len(found.vectors) == 3
    for d, moments in enumerate(found.moments):
        np.testing.assert_allclose(moments.scatter, Moments.of(found.vectors[d]).scatter, rtol=1e-9)
        splits = split_of(NUM_IMAGES, 3)[found.positions]
        score = ClassSums.of(EXTRACTOR.logits(None, found.vectors[d]), splits, 3)
        assert found.scores[d].score() == pytest.approx(score.score(), rel=1e-6)
    np.testing.assert_allclose(found.vectors[1], -found.vectors[0], atol=1e-6)


def test_features_are_kept_in_half_precision_or_not_at_all(one, whole, tmp_path):
    half = extract(one, place(tmp_path), dtype="float16")
    np.testing.assert_array_equal(half.vectors[0], whole.vectors[0].astype(np.float16))
    np.testing.assert_allclose(half.moments[0].scatter, whole.moments[0].scatter, rtol=1e-6, atol=1e-6)
    none = extract(one, place(tmp_path), dtype=None)
    assert none.vectors is None and none.moments[0].count == 52
    assert sorted(path.name for path in tmp_path.glob("*/features.npy")) == ["features.npy"]
    with pytest.raises(ValueError, match="dtype: 'int8' is unknown; allowed are 'float32' and 'float16'"):
        extract(one, dtype="int8")


class Large(process.Cheap):
    def features(self, variables, images):
        return 1e5 * super().features(variables, images)


def test_features_beyond_half_precision_are_refused():
    with pytest.raises(ValueError, match=r"dtype: float16 is too narrow for features of \d+; keep float32"):
        extract(FeatureExtractor(Large(6), helpers.make_mesh(1)), dtype="float16")


def test_a_set_without_an_image_is_refused(one):
    batches = [{**batch, "mask": np.zeros(4, bool)} for batch in open_batches(0)]
    with pytest.raises(ValueError, match="^images: none of the set can be read; mend them, or name others$"):
        extract(one, batches=lambda first: batches)


def test_a_place_that_is_in_use_or_of_another_set_is_refused(one, tmp_path):
    extract(one, place(tmp_path))
    (record,) = tmp_path.glob("*/set.json")
    with (
        RunLock(record.parent),
        pytest.raises(ValueError, match=f"^cache: '{record.parent}' is in use by process {os.getpid()}"),
    ):
        extract(one, place(tmp_path))
    record.write_text('{"images": "others"}')
    with pytest.raises(ValueError, match=f"^cache: '{record}' is of another set of images; remove '{record.parent}'"):
        extract(one, place(tmp_path))


def test_the_record_says_what_decides_the_features(one, tmp_path):
    extract(one, place(tmp_path, protocol={"resize": "none"}))
    (record,) = tmp_path.glob("*/set.json")
    assert json.loads(record.read_text()) == {
        "images": "made up", "protocol": {"resize": "none"}, "format": 1, "kept": "float32", "num_splits": 3,
        "split_seed": 0,
    }  # fmt: skip


def test_images_in_memory_are_known_by_their_bytes():
    images = np.random.default_rng(0).integers(0, 256, (25, 4, 4, 3), np.uint8)
    digest = store.digest_of_images(images)
    assert digest == store.digest_of_images(images.copy()) and len(digest) == 64
    others = images.copy()
    others[24, 3, 3, 2] ^= 1
    assert len({digest, *map(store.digest_of_images, (others, images[:, ::-1], images.reshape(25, 2, 8, 3)))}) == 4


def test_no_image_leaves_the_device_that_it_was_put_on():
    many = FeatureExtractor(process.Cheap(6), helpers.make_mesh(8))
    batch = next(open_batches(0, 16))
    measured = many.measure(batch, has_logits=True)
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(measured))
    image = jax.device_put(
        np.zeros((16, SIDE, SIDE, 3), np.float32), jax.NamedSharding(many._mesh, jax.P(("data", "fsdp")))
    )
    text = many._features.lower(many._variables, image, False).compile().as_text()
    gathered = [tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)]
    assert gathered and max(map(np.prod, gathered)) <= 16 * 6  # features


def start(*line, devices=1, **more):
    environment = {
        **os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(helpers.ROOT),
    }  # fmt: skip
    command = [sys.executable, str(helpers.ROOT / "tests" / "extracting_process.py"), *map(str, line)]
    return subprocess.Popen(
        command, cwd=helpers.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more
    )


def finish(*processes):
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs[0][-3000:]
    return outputs


def read(path):
    record = json.loads(path.read_text())
    peak = record.pop("peak_bytes")
    return record, peak


@pytest.mark.slow
@pytest.mark.fault("kill -9 while features are extracted, at ten random moments", "goes on with the same bits")
def test_killed_runs_give_the_bits_of_one_that_was_not(tmp_path, record_property):
    """Each is killed within the second after its first block."""
    sizes = ["--num_images=40000", "--side=64", "--batch_size=16", "--block=160", "--num_features=64"]
    finish(start(*sizes, f"--cache={tmp_path / 'whole'}", f"--out={tmp_path / 'whole.json'}"))
    rng, line = (
        np.random.default_rng(0),
        [*sizes, f"--cache={tmp_path / 'killed'}", f"--out={tmp_path / 'killed.json'}"],
    )
    state, kills, moved = tmp_path / "killed", 0, set()
    while kills < 10:
        running = start(*line)
        before = [path.stat().st_mtime_ns for path in state.glob("*/state.npz")]
        while running.poll() is None and [path.stat().st_mtime_ns for path in state.glob("*/state.npz")] == before:
            time.sleep(0.01)  # it starts for seconds: until its first block
        time.sleep(rng.uniform(0, 0.2))
        running.send_signal(signal.SIGKILL)
        running.communicate()
        kills += running.returncode == -signal.SIGKILL
        if running.returncode == 0:
            break
        with np.load(next(state.glob("*/state.npz"))) as file:
            moved.add(int(file["next_batch"]))
    record_property("times", kills)
    assert kills == 10 and len(moved) > 5
    finish(start(*line))
    assert read(tmp_path / "killed.json.0")[0] == read(tmp_path / "whole.json.0")[0]


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator=localhost:{free.getsockname()[1]}"
    one = [f"--cache={tmp_path / 'one'}", f"--out={tmp_path / 'one.json'}"]
    finish(start(*one, devices=4))
    line = [f"--cache={tmp_path / 'two'}", f"--out={tmp_path / 'two.json'}", address, "--num_processes=2"]
    outputs = finish(*(start(*line, f"--process_id={i}", devices=2) for i in range(2)))
    assert "made-up images" in outputs[0] and "made-up images" not in outputs[1]
    ours, expected = (read(tmp_path / f"{name}.json.0")[0] for name in ("two", "one"))
    assert ours == read(tmp_path / "two.json.1")[0]
    assert ours["digests"]["positions"] == expected["digests"]["positions"] and ours["count"] == expected["count"]
    assert (ours["trace"], *ours["score"]) == pytest.approx((expected["trace"], *expected["score"]), rel=1e-6)


@pytest.mark.slow
def test_fifty_thousand_images_of_256_take_less_than_4_gb(tmp_path):
    sizes = ["--num_images=50000", "--side=256", "--batch_size=64", "--num_features=2048", "--block=1024"]
    finish(start(*sizes, f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out.json'}"))
    record, peak = read(tmp_path / "out.json.0")
    assert record["count"] == 50000 - len(range(5, 50000, 97))
    assert peak < 4e9, f"{peak / 1e9:.2f} GB"
    print(f"peak memory {peak / 1e9:.2f} GB")

"""Runs in an object store, against a stand-in that gcsfs and TensorStore speak to: nothing is lost, nothing is lied."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import bucket_server
import jax
import numpy as np
import pytest
from toy_run import ToyDataset, assert_same_run, train
from toy_state import RQVAE, model_state_of, restored_step, save_steps

from rq_jax import checkpoint, files
from rq_jax.checkpoint import manifest, remote
from rq_jax.checkpoint.saver import Checkpointer, steps_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")


@pytest.fixture(scope="module")
def store():
    """One for the module: TensorStore looks once where it is."""
    with bucket_server.served() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def bucket(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    store.objects.clear()
    store.requests.clear()
    return store


RUN = "gs://bucket/runs/a"


def names(bucket, below=""):
    prefix = f"runs/a/{below}"
    return sorted(name.removeprefix(prefix) for name in bucket.objects if name.startswith(prefix))


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["gs://", "gs:///run", "gs://bucket/run[1]", "gs://bucket/a//b", "s3://bucket/*"])
def test_an_address_is_letters_digits_and_little_else(address):
    with pytest.raises(ValueError, match="is no address of a directory; give gs://bucket/directory"):
        files.run_path(address)


@pytest.mark.parametrize("address", ["gs://bucket/run", "https://host/file", "hf://owner/name"])
def test_what_is_of_this_machine_refuses_addresses(address):
    with pytest.raises(ValueError, match="is an address; give a path on this machine"):
        files.local_path(address)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"needs the package s3fs; run pip install 'rq_jax\[s3\]'"):
        files.run_path("s3://bucket/run")


def test_a_store_that_cannot_be_reached_is_one_line(bucket, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("401\nInvalid Credentials")

    monkeypatch.setattr(files.filesystem(RUN), "find", refuse)
    with pytest.raises(OSError, match="'gs://bucket/runs/a' cannot be reached .*401 Invalid Credentials.*your login"):
        checkpoint.load_model(RUN)


def test_an_address_without_a_run_is_no_run(bucket):
    with pytest.raises(FileNotFoundError, match="'gs://bucket/runs/a' is no run directory"):
        checkpoint.load_model(RUN)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(store, tmp_path_factory):
    """Objects of a run with checkpoints of steps 2 and 5."""
    store.objects.clear()
    save_steps(RUN, 2, 5)
    return dict(store.objects)


@pytest.fixture
def run(saved, bucket):
    bucket.objects.update(saved)
    return bucket


def steps():
    return steps_of(files.run_path(RUN) / "checkpoints")


def test_states_come_back_and_old_ones_go(run):
    assert steps() == [2, 5]
    save_steps(RUN, 6, keep=1, keep_every=2)
    assert steps() == [2, 6] and restored_step(RUN) == 6
    assert not any(".sealing" in name or "/5/" in name for name in run.objects)


def test_what_is_cut_is_seen_and_moved_aside(run):
    bucket = run
    name = next(name for name in bucket.objects if "/5/params/" in name and "/d/" in name)
    content, _ = bucket.objects[name]
    bucket.write(name, content[:-1])
    with pytest.raises(ValueError, match=f"has {len(content) - 1} bytes, not {len(content)}"):
        restored_step(RUN, strict=True)
    before = {name: content for name, (content, _) in bucket.objects.items() if "/checkpoints/5/" in name}
    assert restored_step(RUN) == 2 and steps() == [2]
    moved = {name.replace("damaged", "checkpoints"): content for name, (content, _) in bucket.objects.items()}
    assert before.items() <= moved.items()


@pytest.mark.parametrize("left", [".sealing-5", ""])
def test_what_a_killed_process_left_does_not_count(run, left):
    """Killed before it was sealed, or while it was deleted: there is a marker, and no manifest."""
    bucket = run
    del bucket.objects["runs/a/checkpoints/5/manifest.json"]
    if left:
        bucket.write(f"runs/a/checkpoints/{left}", b"")
        assert steps() == [2] and restored_step(RUN) == 2
        assert not names(bucket, "checkpoints/5/") and not names(bucket, "checkpoints/.sealing")
    else:
        assert restored_step(RUN) == 2 and names(bucket, "damaged/5/")


def test_an_object_is_not_read_to_be_sealed_or_verified(run):
    """Stores keep checksums themselves, and reading all would take as long as writing it."""
    bucket = run
    path = files.run_path(RUN) / "checkpoints" / "2"
    written = json.loads(path.joinpath("manifest.json").read_bytes().partition(b"\n")[2])
    assert {digest for _, digest in written.values()} == {None}
    assert {name: size for name, (size, _) in written.items()} == {
        name: len(bucket.objects[f"runs/a/checkpoints/2/{name}"][0])
        for name in names(bucket, "checkpoints/2/") if name != "manifest.json"
    }  # fmt: skip
    bucket.requests.clear()
    assert manifest.problems(path) == []
    assert [request for request in bucket.requests if "alt=media" in request and "manifest.json" not in request] == []


# --- the copy ---------------------------------------------------------------------------------------------------------


def uploads(bucket):
    sent = [request for request in bucket.requests if "upload" in request or request.startswith("PUT")]
    bucket.requests.clear()
    return len(sent)


def test_what_changes_is_sent_once(bucket):
    with checkpoint.RunDirectory(RUN) as run:
        root = Path(run.path)
        for name in ("config.json", "pictures/a.png", "latents/0.npy", ".x.partial"):
            files.write_atomic(root / name, name.encode())
        run.push()
        assert names(bucket) == ["config.json", "lock.json", "pictures/a.png"]
        assert uploads(bucket) and (run.push(), uploads(bucket))[1] == 0
        (root / "config.json").write_bytes(b"other")
        run.push()
        assert bucket.objects["runs/a/config.json"][0] == b"other"
        (root / "log").write_bytes(b"last")
    assert bucket.objects["runs/a/log"][0] == b"last" and "runs/a/lock.json" not in bucket.objects


def test_a_copy_is_what_the_store_holds(bucket):
    bucket.write("runs/a/log", b"1")
    bucket.write("runs/a/tokenizer/config.json", b"{}")
    bucket.write("runs/a/checkpoints/3/params/d/x", b"large")
    bucket.write("runs/ab/other", b"of another run")
    copy = checkpoint.local_directory(RUN)
    there = lambda: {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}  # noqa: E731
    assert there() == {"address.txt", "synced.json", "log", "tokenizer/config.json"}
    (copy / "latents").mkdir()
    (copy / "latents" / "0.npy").write_bytes(b"of this machine")
    bucket.write("runs/a/log", b"2")  # of the same size
    del bucket.objects["runs/a/tokenizer/config.json"]
    bucket.requests.clear()
    assert checkpoint.local_directory(f"{RUN}/") == copy and (copy / "log").read_bytes() == b"2"
    assert there() == {"address.txt", "synced.json", "log", "latents/0.npy"}
    (copy / "log").write_bytes(b"changed here")
    checkpoint.local_directory(RUN)
    assert (copy / "log").read_bytes() == b"2"
    bucket.requests.clear()
    checkpoint.local_directory(RUN)
    assert not any("alt=media" in request for request in bucket.requests)


def test_names_that_lead_out_are_refused(bucket, tmp_path):
    bucket.write("runs/a/../../../outside", b"x")
    with pytest.raises(ValueError, match="leads out of it; delete that object"):
        checkpoint.local_directory(RUN)
    assert not list(tmp_path.rglob("outside"))


def test_of_two_runs_the_later_one_goes_on(bucket, caplog, monkeypatch):
    with pytest.raises(ValueError, match=r"workdir: 'gs://bucket/runs/a' was taken over by process \d+ on .* since"):
        with checkpoint.RunDirectory(RUN) as first:
            monkeypatch.setenv("HOME", f"{os.environ['HOME']}-of-another-machine")
            with checkpoint.RunDirectory(RUN) as second:
                assert "was left or is in use by process" in caplog.text
                Path(second.path, "log").write_bytes(b"second")
                second.push()
                Path(first.path, "log").write_bytes(b"first")
                first.push()
    assert bucket.objects["runs/a/log"][0] == b"second"


def test_on_one_machine_the_second_run_is_refused(bucket):
    with checkpoint.RunDirectory(RUN), pytest.raises(ValueError, match="is in use by process"):
        with checkpoint.RunDirectory(RUN):
            pass


def test_a_store_that_is_away_costs_logs_and_not_the_run(bucket, monkeypatch, caplog):
    with checkpoint.RunDirectory(RUN) as run:
        Path(run.path, "log").write_bytes(b"1")

        def refuse(*_, **__):
            raise RuntimeError("503")

        with monkeypatch.context() as patch:
            patch.setattr(files.filesystem(RUN), "put_file", refuse)
            run.push()
            run.push()
            assert caplog.text.count("the run goes on, and tries again") == 1 and "503" in caplog.text
        run.push()
        assert bucket.objects["runs/a/log"][0] == b"1"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return train(workdir), workdir


def test_a_run_is_that_of_a_directory(bucket, uninterrupted, capsys):
    assert_same_run(train(RUN), checkpoint.local_directory(RUN), uninterrupted)
    assert f"images: {RUN}/pictures, report: {RUN}/index.html" in capsys.readouterr().out
    there = {name.partition("/")[0] for name in names(bucket)} - {"checkpoints"}
    here = {path.name for path in uninterrupted[1].iterdir()} - {"checkpoints", "lock.json"}
    of_events = "events.out.tfevents"
    assert {name.partition(of_events)[0] or of_events for name in there} == {
        name.partition(of_events)[0] or of_events for name in here
    }


def test_a_run_that_is_killed_goes_on_on_another_machine(bucket, uninterrupted, caplog, monkeypatch):
    at_death = {}

    def die():
        at_death.update(bucket.objects)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RUN, ToyDataset({11: die}), keep_checkpoints=2)
    bucket.objects.clear()
    bucket.objects.update(at_death)
    # That of step 10 may be there, or half of it.
    assert steps()[:1] == [5] and "runs/a/lock.json" in bucket.objects
    monkeypatch.setenv("HOME", f"{os.environ['HOME']}-of-another-machine")
    assert_same_run(train(RUN), checkpoint.local_directory(RUN), uninterrupted)
    assert "was left or is in use by process" in caplog.text
    assert steps() == [10, 12]


def test_a_run_of_before_is_read_from_its_address(bucket, tmp_path):
    state = model_state_of("rqvae", 3)
    with checkpoint.RunDirectory(RUN) as run, Checkpointer(run.address) as saving:
        checkpoint.write_config(run.path, {"model": RQVAE})
        saving.save(state, {})
        saving.wait()
    assert checkpoint.has_checkpoint(RUN) and checkpoint.step_of(RUN) == int(state.step)
    loaded = checkpoint.load_tokenizer(RUN)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], jax.device_get(state.ema_params))
    for keep_optimizer in (False, True):
        started = checkpoint.start_from(RUN, model_state_of("rqvae", 0), keep_optimizer)
        expected = state.params if keep_optimizer else state.ema_params
        jax.tree.map(np.testing.assert_array_equal, started.params, expected)
    checkpoint.ship(RUN, tmp_path / "shipped")
    assert checkpoint.load_model(tmp_path / "shipped").config["model"]["name"] == "rqvae"
    assert remote.checkpoints_of(tmp_path) == tmp_path

"""States on disk: damage to any file is seen, failed saves harm nothing, old checkpoints go last."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import helpers
import jax.numpy as jnp
import pytest
from toy_state import assert_equal, restored_step, save_steps, toy_state

from rq_jax import checkpoint
from rq_jax.checkpoint import items, manifest, saver
from rq_jax.checkpoint.saver import Checkpointer, SaveFailed, steps_of


def save(directory, *steps, **settings):
    save_steps(directory, *steps, **settings)
    return directory / "checkpoints"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints of steps 2 and 5; tests work on copies."""
    root = tmp_path_factory.mktemp("saved")
    save(root, 2, 5)
    return root


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "deleted": Path.unlink, "flipped": flip, "emptied": lambda path: os.truncate(path, 0)}


@pytest.mark.fault(
    "a file of a checkpoint truncated, emptied, deleted, or one bit flipped",
    "seen; goes on from the step before; --strict stops",
)
@pytest.mark.parametrize("kind", helpers.others_slow(DAMAGE, ["deleted", "flipped"]))
def test_damage_to_any_file_is_seen_and_passed_over(saved, tmp_path, kind, caplog, record_property):
    names = sorted(path.relative_to(saved) for path in (saved / "checkpoints" / "5").rglob("*") if path.is_file())
    assert len(names) > 10
    times = 0
    for i, name in enumerate(names):
        root = Path(shutil.copytree(saved, tmp_path / str(i)))
        if not (root / name).stat().st_size and kind != "deleted":
            continue  # nothing in it to damage
        DAMAGE[kind](root / name)
        times += 1
        caplog.clear()
        assert restored_step(root) == 2, name
        (message,) = [record.message for record in caplog.records if record.name == "rq_jax.checkpoint.saver"]
        assert message.startswith(f"'{root / 'checkpoints' / '5'}' is damaged: ") and message.endswith("; going on from the checkpoint before")  # fmt: skip
        assert {path.name for path in (root / "checkpoints").iterdir()} == {"2"}
        assert {path.name for path in (root / "damaged").iterdir()} == {"5"}
    record_property("times", times)


def test_a_file_is_named_with_what_is_wrong(run):
    path = run / "checkpoints" / "5"
    assert manifest.problems(path) == []
    names = sorted(json.loads((path / "manifest.json").read_bytes().partition(b"\n")[2]))
    first, second, third = names[:3]
    size = (path / second).stat().st_size
    (path / first).unlink(), os.truncate(path / second, size + 3), flip(path / third)
    assert manifest.problems(path) == [f"'{first}' is missing", f"'{second}' has {size + 3} bytes, not {size}", f"'{third}' has other contents"]  # fmt: skip
    flip(path / "manifest.json")
    assert manifest.problems(path) == ["manifest.json is damaged"]
    (path / "manifest.json").unlink()
    assert manifest.problems(path) == ["manifest.json cannot be read (No such file or directory)"]


def test_the_step_that_was_damaged_is_saved_again(run):
    (run / "checkpoints" / "5" / "manifest.json").unlink()
    (run / "damaged" / "5").mkdir(parents=True)  # of an earlier accident
    with Checkpointer(run, keep=9) as again:
        assert int(again.restore(toy_state())[0].step) == 2
        again.save(toy_state(5), {"note": 5})
    assert restored_step(run) == 5
    assert {path.name for path in (run / "damaged").iterdir()} == {"5", "5-1"}


def test_strict_stops_and_touches_nothing(run):
    flip(run / "checkpoints" / "5" / "manifest.json")
    with pytest.raises(ValueError) as error:
        restored_step(run, strict=True)
    assert str(error.value) == f"'{run / 'checkpoints' / '5'}' is damaged: manifest.json is damaged; restore it from a copy, or leave out --strict to go on from the one before"  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "5"}


def test_every_process_hears_that_strict_stops(run, monkeypatch):
    """The first one tells before it raises, or the others would wait for it."""
    flip(run / "checkpoints" / "5" / "manifest.json")
    told = []
    monkeypatch.setattr(saver.hosts, "of_first_process", lambda text: told.append(text) or told[0])
    for process in (0, 1):
        monkeypatch.setattr(saver.jax, "process_index", lambda process=process: process)
        with pytest.raises(ValueError, match="'.*5' is damaged: manifest.json is damaged; restore it from a copy, or "):
            saver.newest_whole(run / "checkpoints", strict=True)
    assert json.loads(told[1]) == [None, ""]  # the second had nothing to say of its own


@pytest.mark.fault("every checkpoint damaged", "stops; nothing is overwritten")
def test_where_all_are_damaged_nothing_starts_anew(run):
    for step in (2, 5):
        flip(run / "checkpoints" / str(step) / "manifest.json")
    with pytest.raises(
        ValueError,
        match=r"checkpoints': no checkpoint is whole, of steps \[5, 2\]; restore one from a copy, or give a new --workdir$",
    ):
        restored_step(run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "5"}


# --- names of directories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr[0.1]{a,b}*?", "[!b] ~x\u00e9\n$HOME", "-gs:\\x\udcff"])
@pytest.mark.fault("a run directory whose name is a pattern, a URL or unprintable", "read back as any other")
def test_any_name_of_a_directory_is_only_a_name(tmp_path, monkeypatch, name):
    """Libraries take some for patterns or URLs, and write what nobody can read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to("elsewhere")
    save(Path(name), 2)
    assert restored_step(Path(name)) == restored_step(tmp_path / "elsewhere") == 2
    with Checkpointer(name) as again:
        assert again.save_best(toy_state(3))
    path = tmp_path / name / "best" / "3"
    assert_equal(items.restore(path, {"params": toy_state().params})["params"], toy_state(3).params)


def test_without_descriptors_the_name_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "_DESCRIPTORS", tmp_path / "none")
    refusal = r"^workdir: '.*a\[b' holds the character '\[', which Orbax takes for a pattern; give a path of letters"
    with pytest.raises(ValueError, match=refusal):
        Checkpointer(tmp_path / "a[b")


@pytest.mark.fault("a checkpoint that is written and cannot be read back", "does not count; told")
def test_what_cannot_be_read_back_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "_PLAIN", re.compile(".*"))
    with pytest.raises(SaveFailed, match="the state of step 2 could not be written to .* cannot be read"):
        save(tmp_path / "run[1]", 2)
    assert not checkpoint.has_checkpoint(tmp_path / "run[1]")


# --- what stays -------------------------------------------------------------------------------------------------------


def test_multiples_stay(tmp_path):
    directory = save(tmp_path, *range(1, 10), keep=2, keep_every=3)
    assert {int(path.name) for path in directory.iterdir()} == {3, 6, 8, 9}


def test_the_old_one_goes_after_the_new_one_is_sealed(tmp_path, monkeypatch):
    seen, write = [], manifest.write

    def watched(path):
        seen.append({old.name for old in path.parent.iterdir() if old.name.isdigit()})
        write(path)

    monkeypatch.setattr(manifest, "write", watched)
    directory = save(tmp_path, 2, 5, 7, keep=1)
    assert seen == [{"2"}, {"2", "5"}, {"5", "7"}]
    assert {path.name for path in directory.iterdir()} == {"7"}


@pytest.mark.fault("half written and half deleted directories", "cleaned up")
def test_what_a_killed_process_left_is_cleaned_up(run):
    for name in ("7.orbax-checkpoint-tmp", ".deleting-1"):
        (run / "checkpoints" / name / "params").mkdir(parents=True)
    assert restored_step(run) == 5
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "5"}


@pytest.mark.fault(
    "a kill between the last byte of the first checkpoint and its manifest", "does not count: starts anew"
)
def test_what_was_never_sealed_does_not_count(run):
    (run / "checkpoints" / "5" / "manifest.json").unlink()
    (run / "checkpoints" / ".sealing-5").touch()
    assert steps_of(run / "checkpoints") == [2] and checkpoint.has_checkpoint(run)
    (run / "checkpoints" / ".sealing-2").touch()  # killed before the mark was taken away
    assert restored_step(run) == 2
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2"}
    (run / "checkpoints" / ".sealing-2").touch()
    (run / "checkpoints" / "2" / "manifest.json").unlink()
    assert not checkpoint.has_checkpoint(run)
    with Checkpointer(run) as first:
        assert first.latest_step is None
        first.save(toy_state(2), {"note": 2})
    assert restored_step(run) == 2
    assert not (run / "damaged").exists()


# --- saves that fail --------------------------------------------------------------------------------------------------


def failing(*steps):
    """Sealing that fails at these steps as a full disk would."""
    write = manifest.write

    def broken(path):
        if int(path.name) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path)

    return broken


@pytest.mark.fault("a background save that raises", "told; older ones stay, the next save is made")
def test_a_failed_save_is_told_and_the_next_one_is_made(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(manifest, "write", failing(5))
    save(tmp_path, 2, 5, 7, keep=1)
    (message,) = [record.message for record in caplog.records if record.name == "rq_jax.checkpoint.saver"]
    assert message.startswith(f"the state of step 5 could not be written to '{tmp_path / 'checkpoints'}' (OSError: ")
    assert message.endswith("the run goes on and tries again at the next checkpoint")
    assert restored_step(tmp_path) == 7
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"7"}


@pytest.mark.fault(
    "best weights that cannot be written", "told; the best before stay, and the next better ones are kept"
)
def test_a_best_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "write", failing(5))
    with Checkpointer(tmp_path) as saving:
        assert saving.save_best(toy_state(2))
        assert not saving.save_best(toy_state(5))
        assert steps_of(tmp_path / "best") == [2]
        assert saving.save_best(toy_state(7))
        saving.wait()
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"7"}


@pytest.mark.fault("a last save that raises", "exit code 2; older ones stay")
def test_a_last_save_that_fails_raises_and_harms_nothing(tmp_path, monkeypatch):
    save(tmp_path, 2, keep=1)
    monkeypatch.setattr(manifest, "write", failing(5))
    with pytest.raises(
        SaveFailed,
        match=r"^checkpoint: the state of step 5 could not be written to .*No space left.*free the disk and run the same command again$",
    ):
        save(tmp_path, 5, keep=1)
    monkeypatch.undo()
    assert restored_step(tmp_path) == 2


@pytest.mark.fault("a full disk under the threads of Orbax", "told; older ones stay, the next save is made")
def test_an_error_inside_orbax_is_no_different(tmp_path, monkeypatch, caplog):
    """Files cannot grow: as on a full disk, Orbax itself fails, in its own threads."""
    program = textwrap.dedent(
        f"""
        import logging, resource, signal, sys
        sys.path[:0] = {[str(helpers.ROOT / "tests"), str(helpers.ROOT)]!r}
        logging.basicConfig(level=logging.ERROR)
        import jax
        jax.config.update("jax_platforms", "cpu")
        from toy_state import toy_state
        from rq_jax.checkpoint import Checkpointer, SaveFailed
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Checkpointer({str(tmp_path)!r}, keep=1) as saving:
            saving.save(toy_state(2, size=70000), {{"note": 2}})
            saving.wait()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            saving.save(toy_state(5, size=70000), {{"note": 5}})
            try:
                saving.wait()
            except SaveFailed as error:
                print("failed", error)
            assert saving.latest_step == 2, saving.latest_step
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            saving.save(toy_state(7, size=70000), {{"note": 7}})
            saving.wait()
            assert saving.latest_step == 7, saving.latest_step
            state, host = saving.restore(toy_state(size=70000))
            assert int(state.step) == 7 and host == {{"note": 7}}
        print("done")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done" and "failed checkpoint: the state of step 5" in done.stdout


def test_the_loop_alone_asks_about_signals(tmp_path, monkeypatch):
    """Several processes stop together only where all that ask JAX count alike, and Orbax counts steps."""

    def refuse(number):
        raise AssertionError(f"asked with {number}")

    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", refuse)
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(toy_state(step), {})
        checkpointer.wait()
    assert steps_of(tmp_path / "checkpoints") == [2]


def test_what_is_learnt_after_a_save_is_restored_with_it(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(toy_state(1), {"a": 1, "b": 1})
        checkpointer.wait()
        checkpointer.amend(1, {"b": 2})
        assert checkpointer.restore(toy_state(0))[1] == {"a": 1, "b": 2}
        checkpointer.amend(2, {"b": 3})  # of another step
        assert checkpointer.restore(toy_state(0))[1] == {"a": 1, "b": 1}
        checkpointer.save(toy_state(2), {"a": 4, "b": 4})  # newer than what was learnt about a step of this number
        checkpointer.wait()
        assert checkpointer.restore(toy_state(0))[1] == {"a": 4, "b": 4}


def test_shapes_of_keys_are_those_of_their_numbers():
    assert items.shapes_of({"rng": toy_state().rng, "x": jnp.zeros((2, 3))}) == {"rng": (2,), "x": (2, 3)}

"""Atomic writes, JSON records and the lock of a directory."""

import json
import os
import re
import stat
import subprocess
import sys

import helpers
import pytest

from rq_jax import files
from rq_jax.files import LOCK, RunLock, atomic_path, write_atomic, write_json


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_write_atomic_creates_directories_and_replaces(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(KeyError), atomic_path(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_temporary_names_are_fresh_and_lie_beside_the_file(tmp_path):
    with atomic_path(tmp_path / "file") as one, atomic_path(tmp_path / "file") as other:
        assert one != other and one.parent == other.parent == tmp_path
        assert one.read_bytes() == other.read_bytes() == b""


def test_no_link_in_the_place_of_the_temporary_file_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    precious = tmp_path / "precious"
    precious.write_text("untouched")
    (tmp_path / ".file.guessed.partial").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "file", b"new")
    assert precious.read_text() == "untouched" and not (tmp_path / "file").exists()


def test_a_link_in_the_place_of_the_file_is_replaced(tmp_path):
    (tmp_path / "elsewhere").write_text("untouched")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_atomic(tmp_path / "file", b"new")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "elsewhere").read_text() == "untouched"


def test_the_umask_decides_the_mode_even_where_a_library_replaces_the_file(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize(("indent", "text"), [({}, '{\n "a": [\n  1\n ]\n}\n'), ({"indent": None}, '{"a": [1]}\n')])
def test_write_json(tmp_path, indent, text):
    write_json(tmp_path / "record.json", {"a": [1]}, **indent)
    assert (tmp_path / "record.json").read_text() == text


HOLD = """
import sys
from rq_jax.files import RunLock
with RunLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.fault("a second trainer in one directory", "refused, exit code 2")
def test_a_second_trainer_is_refused_until_the_first_ends(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=helpers.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    pattern = (
        rf"^workdir: '.*' is in use by process {holder.pid} on \S+ since \S+; wait for it, stop it, or give another"
    )
    with pytest.raises(ValueError, match=pattern), RunLock(tmp_path):
        pass
    holder.kill()  # -9: nothing is left to clean up
    holder.communicate()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["{}", "[]", "[" * 100_000, '{"pid": 1}'])
def test_a_holder_that_cannot_be_read_is_still_refused(tmp_path, content):
    with RunLock(tmp_path):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(ValueError, match="is in use by another process; "), RunLock(tmp_path):
            pass


def test_the_holder_is_foreign_text(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "a\x1b[2J\n", "since": "now"}))
        with pytest.raises(ValueError, match="is in use by process 1 on a") as refusal, RunLock(tmp_path):
            pass
    assert str(refusal.value).isprintable()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), RunLock(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"a": 1, "b": 2, "a": 3}', "is not readable JSON: the key 'a' stands twice"),
        (b'{"a": {"b\\n": 1, "b\\n": 2}}', r"is not readable JSON: the key 'b\n' stands twice"),
        (b"[" * 100_000, "is not readable JSON: it is nested too deeply"),
        (b"{", "is not readable JSON: "),
        (b"\xff", "is not readable JSON: "),
        (b"[1]", "holds a list, not a dict"),
    ],
)
def test_json_of_another_shape_is_refused(tmp_path, content, reason):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"x.json' {reason}")) as refusal:
        files.read_json(tmp_path / "x.json")
    assert "\n" not in str(refusal.value)


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf["\xc3\xa9"]')
    assert files.read_json(tmp_path / "x.json", list) == ["é"]


def test_a_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert str(files.local_path("~/runs/[1] a")) == "/home/ann/runs/[1] a"

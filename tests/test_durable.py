"""Files that exist whole or not at all."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from live import PATIENCE_SECONDS

from megatron_tf import durable
from megatron_tf.durable import (
    NotPlainError,
    atomic_folder,
    atomic_path,
    check_writable,
    file_lock,
    new_file,
    open_plain,
    partial_path,
    prepare_output,
    publish,
    read_plain,
    write_atomically,
)
from megatron_tf.errors import UserError, write_errors

PROJECT = Path(__file__).parents[1]


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_older_file_alone(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, point):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, point, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.json", b"content")
    assert os.listdir(tmp_path) == []


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names))[1])
    write_atomically(tmp_path / "a", b"content")
    (tmp_path / "b").write_bytes(b"b")
    publish(tmp_path / "b", tmp_path / "c")
    assert calls == ["fsync", "replace"] * 2 and (tmp_path / "c").read_bytes() == b"b"


def test_what_a_killed_run_left_is_written_over(tmp_path):
    partial_path(tmp_path / "a").write_bytes(b"x" * 100)
    write_atomically(tmp_path / "a", b"short")
    assert (tmp_path / "a").read_bytes() == b"short" and os.listdir(tmp_path) == ["a"]


@pytest.fixture
def waits(monkeypatch):
    """An event that is set when a writer begins to wait for another one."""
    event, sleep = threading.Event(), time.sleep
    monkeypatch.setattr(durable, "time", SimpleNamespace(monotonic=time.monotonic,
                                                         sleep=lambda pause: (event.set(), sleep(pause))))  # fmt: skip
    return event


def test_two_writers_of_one_file_take_turns(tmp_path, waits):
    """Such as the tasks of a study, which all write its report when its last run has ended."""
    path = tmp_path / "a.json"

    def write():
        try:
            write_atomically(path, b"of the second")
        finally:
            waits.set()

    other = threading.Thread(target=write)
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"of the first")
        other.start()
        assert waits.wait(PATIENCE_SECONDS)
        assert temporary.read_bytes() == b"of the first" and not path.exists()
    other.join(PATIENCE_SECONDS)
    assert path.read_bytes() == b"of the second" and os.listdir(tmp_path) == ["a.json"]


def test_a_writer_that_is_never_done_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "WRITING_SECONDS", 0.0)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"of the first")
        message = "/a: another writer has it. Wait until it is done, or choose another."
        with pytest.raises(UserError, match=message), write_errors(UserError, tmp_path / "a", "Choose another."):
            write_atomically(tmp_path / "a", b"of the second")
    assert (tmp_path / "a").read_bytes() == b"of the first" and os.listdir(tmp_path) == ["a"]


def test_a_new_file_is_new_and_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        with new_file(tmp_path / "a") as file:
            file.write(b"content")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileExistsError), new_file(tmp_path / "a"):
        pass


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"file: .*Choose another folder"):
        prepare_output(tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match="folder: is a folder, the output is a file"):
        prepare_output(tmp_path / "folder")
    with pytest.raises(UserError, match="x{255}: File name too long"):
        prepare_output(tmp_path / ("x" * 255))  # with the ending of its temporary name
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(UserError, match=f"{name}: is a device or a FIFO, which a file would take the place of"):
            prepare_output(name)
    prepare_output(tmp_path / "new" / "er" / "a.png")
    assert list((tmp_path / "new" / "er").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="not writable"):
            prepare_output(tmp_path / "a")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_is_whole_or_not_there(tmp_path):
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("x")
        assert not (tmp_path / "a").exists()
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["x"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_replaces_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    partial_path(tmp_path / "b").mkdir()
    for name in ("a", "b"):
        with pytest.raises(FileExistsError, match="exists"), atomic_folder(tmp_path / name):
            pass
    assert sorted(os.listdir(tmp_path)) == ["a", "b.partial"]


def test_only_files_and_links_to_them_are_opened(tmp_path):
    file, link, fifo = (tmp_path / name for name in ("file", "link", "fifo"))
    file.write_bytes(b"content")
    link.symlink_to(file)
    os.mkfifo(fifo)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as bound, open_plain(link) as opened:
        bound.bind(str(tmp_path / "socket"))
        assert opened.read() == b"content"
        for name, kind in {"fifo": "a FIFO", "socket": "a socket", "/dev/zero": "a device"}.items():
            with pytest.raises(NotPlainError, match=f"is {kind}, where a file is expected"):
                open_plain(tmp_path / name)
        for name in ("loop", "missing", "."):
            with pytest.raises(OSError):
                open_plain(Path(tmp_path, name))


def test_a_file_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    assert read_plain(path, 4) == b"1234"
    with pytest.raises(OSError, match="is larger than 3 bytes"):
        read_plain(path, 3)


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "a.lock"
    with file_lock(path) as first, file_lock(path, patience_seconds=0) as second:
        assert (first, second) == (True, False)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), file_lock(path):
        raise ZeroDivisionError
    with file_lock(path, patience_seconds=0) as again:
        assert again


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "a.lock"
    code = f"""
import time; from pathlib import Path; from megatron_tf.durable import file_lock
with file_lock(Path({str(path)!r})):
    print("held", flush=True); time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with file_lock(path, patience_seconds=0) as held:
            assert not held
        holder.kill()
        with file_lock(path) as held:
            assert held


def test_where_there_are_no_locks_we_go_on(tmp_path, monkeypatch):
    def refuse(*arguments) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with file_lock(tmp_path / "a.lock") as held:
        assert held


def test_a_folder_that_takes_no_files_is_told_without_writing(tmp_path, monkeypatch):
    def problem(folder):
        with pytest.raises(UserError) as caught:
            check_writable(UserError, folder, "Choose another folder.", "run.dir")
        return str(caught.value)

    check_writable(UserError, tmp_path, "Choose another folder.")
    check_writable(UserError, tmp_path / "new" / "run", "Choose another folder.")
    # root passes every test of permissions there
    place = "/proc is of the system and takes no files" if os.geteuid() == 0 else "/proc does not let you write"
    assert f"run.dir: /proc/x cannot be made: {place}." in problem(Path("/proc/x"))
    monkeypatch.setattr("os.statvfs", lambda place: SimpleNamespace(f_flag=os.ST_RDONLY, f_blocks=9))
    why = "is on a read-only file system. Mount the file system writable, or choose another folder."
    assert problem(tmp_path) == f"run.dir: {tmp_path} cannot be written: it {why}"
    assert problem(tmp_path / "a" / "b") == f"run.dir: {tmp_path}/a/b cannot be made: {tmp_path} {why}"
    assert list(tmp_path.iterdir()) == []

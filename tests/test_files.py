import csv
import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parameternet import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    files.write_text(path, "naïve ✓")
    assert path.read_text("utf-8") == "naïve ✓"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_inside_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    files.write_bytes(tmp_path / "a", b"x")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in (".a.12.tmp", ".a.13.tmp", ".b.12.tmp", "a"):
        (tmp_path / name).write_text("")
    files.remove_leftovers(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.12.tmp", "a"]


def test_a_kill_while_removing_a_folder_leaves_nothing_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("b")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        files.remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    files.remove_leftovers(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    files.remove_folder(tmp_path / "a")  # there is none


def test_json_and_digest(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "é"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "b": "é"\n}\n'
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ------------------------------------------------------------------------------------- many writers of one file


def test_json_of_a_name_that_is_not_utf8(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "\udcff"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"b": "\udcff"}


@pytest.mark.parametrize("cell", ["\r", "a\rb", "\n", "\r\n", "a\r\n", '"\r\n"', ",", "\t", "\x85", "\u2028", "", " "])
def test_cells_of_a_csv_come_back(tmp_path, cell):
    rows = [["path", "value"], [cell, "1"], ["1", cell], [cell, cell]]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(files.CsvFile(file)).writerows(rows)
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == rows
    assert (tmp_path / "a.csv").read_bytes().startswith(b"path,value\n")


ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("parameternet", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]


def test_every_csv_is_written_to_a_csv_file():
    """Any other file would leave a carriage return unquoted, or end rows in one."""
    found = [
        (path.name, call)
        for path in SOURCES
        for call in re.findall(r"csv\.(?:Dict)?[wW]riter\(([^,)]*)", path.read_text())
    ]
    assert len(found) >= 4
    assert not [call for call in found if "CsvFile(" not in call[1]]


def _contents(writer: int) -> bytes:
    return bytes([writer]) * (1 + 70_001 * writer)


def _write_often(path, writer, times=25):
    for _ in range(times):
        files.write_bytes(path, _contents(writer))


def test_threads_and_processes_that_write_one_file_never_mix(tmp_path):
    path = tmp_path / "shared.bin"
    files.write_bytes(path, _contents(0))
    writers = [threading.Thread(target=_write_often, args=(path, n)) for n in range(1, 4)]
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_often, args=(path, n)) for n in range(4, 7)] + writers
    for writer in writers:
        writer.start()
    whole = {_contents(n) for n in range(7)}
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in whole
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers[:3]] == [0, 0, 0]
    assert path.read_bytes() in whole
    assert [p.name for p in tmp_path.iterdir()] == ["shared.bin"]


@given(order=st.permutations([1, 2, 3]), fails=st.sets(st.integers(1, 3)), old=st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_writers_in_any_order_leave_the_last_whole_content(tmp_path, order, fails, old):
    """Three writers of one path are open at once, in one process, and end in any order, some by an exception."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        path = Path(folder) / "a"
        if old:
            path.write_bytes(b"old")
        blocks = {n: files.atomic_write(path) for n in order}
        handles = {n: block.__enter__() for n, block in blocks.items()}
        for n in (1, 2, 3, 1, 2, 3):
            handles[n].write(_contents(n)[:5000])
        done = b"old" if old else None
        for n in order:
            if n in fails:
                assert not blocks[n].__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # not swallowed
            else:
                blocks[n].__exit__(None, None, None)
                done = _contents(n)[:5000] * 2
        assert (path.read_bytes() if path.exists() else None) == done
        assert len(list(Path(folder).iterdir())) == (done is not None)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_the_mode_of_a_file_is_kept(tmp_path, mode):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(mode)
    with files.atomic_write(path) as file:
        (unfinished,) = tmp_path.glob(".a.*.tmp")
        assert unfinished.stat().st_mode & 0o777 == mode  # from before the first byte
        file.write(b"new")
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_text() == "new"


def test_the_mode_of_a_new_file_is_the_umask_s(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        old = os.umask(mask)
        try:
            files.write_text(tmp_path / f"{mask}", "x")
        finally:
            os.umask(old)
        assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_target_of_a_link_is_written(tmp_path):
    for name in ("there", "gone"):
        folder = tmp_path / f"real-{name}"
        folder.mkdir()
        if name == "there":
            (folder / "a").write_text("old")
        (tmp_path / f"1-{name}").symlink_to(folder / "a")
        (tmp_path / name).symlink_to(f"1-{name}")  # a link to a link, and relative
        files.write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"1-{name}").is_symlink()
        assert (folder / "a").read_text() == "new"
        assert [p.name for p in folder.iterdir()] == ["a"]


def test_links_in_a_circle_are_an_error_and_stay(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        files.write_text(tmp_path / "a", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


def test_what_is_no_file_is_written_in_place(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    files.write_bytes(pipe, b"x")
    reader.join()
    assert read == [b"x"]
    assert pipe.is_fifo()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_bytes(tmp_path / "folder", b"x")


def test_names_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("é" * 120 + "x" * 15)
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path):
        raise KeyboardInterrupt
    files.write_text(path, "x")
    assert path.read_text() == "x"


# ------------------------------------------------------------------------------------------------------ locks


def _hold(path, ready, seconds=60):
    with files.lock(path, "the folder"):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock `tmp_path/.lock`."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=_hold, args=(tmp_path / ".lock", ready))
    child.start()
    assert ready.wait(30)
    yield child
    child.kill()
    child.join()


def test_a_lock_is_refused_with_its_holder_and_freed_by_a_kill(tmp_path, holder):
    with pytest.raises(files.Locked) as error, files.lock(tmp_path / ".lock", "the folder"):
        pass
    said = str(error.value)
    assert said.startswith(f"the folder is in use by process {holder.pid} on {socket.gethostname()} since 20")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / ".lock").exists()  # stale
    with files.lock(tmp_path / ".lock", "the folder"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_excludes_threads_and_forked_children_do_not_free_it(tmp_path):
    path = tmp_path / ".lock"
    fork = multiprocessing.get_context("fork")
    with files.lock(path, "it"):
        with pytest.raises(files.Locked, match=rf"in use by this process \({os.getpid()}\)"), files.lock(path, "it"):
            pass
        child = fork.Process(target=os.getpid)
        child.start()
        child.join()
        other = fork.Process(target=_hold, args=(path, fork.Event(), 0))
        other.start()
        other.join()
        assert other.exitcode == 1
    with files.lock(path, "it"):
        pass


def test_locks_of_many_processes_are_held_by_one_at_a_time(tmp_path):
    fork = multiprocessing.get_context("fork")
    counter = tmp_path / "n"
    counter.write_text("0")

    def count():
        for _ in range(20):
            with files.lock(tmp_path / ".lock", "it", timeout=60):
                n = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(n + 1))

    children = [fork.Process(target=count) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert counter.read_text() == "60"


def test_lock_uses_the_recorded_process_without_file_system_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / ".lock"
    monkeypatch.setattr(fcntl, "lockf", unsupported)
    path.write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "since": "noon"}))
    with pytest.raises(files.Locked, match=rf"process {os.getppid()} on .* since noon"), files.lock(path, "it"):
        pass
    dead = subprocess.Popen(["true"])
    dead.wait()
    for stale in (json.dumps({"pid": dead.pid, "host": socket.gethostname(), "since": "noon"}), "", "{", "[1]"):
        path.write_text(stale)
        with files.lock(path, "it"):
            pass

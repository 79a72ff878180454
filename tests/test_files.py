import os

import pytest

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


def test_json_and_digest(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "é"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "b": "é"\n}\n'
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

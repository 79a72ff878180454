"""Write files atomically: write a temporary file next to the old one, flush it to disk, then rename it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; the old file stays until the new one is complete and on disk.

    Leaving the block flushes, fsyncs and renames; an exception (a full disk, no permission, Ctrl-C) removes the
    unfinished file and leaves the old one unchanged. Any number of threads and processes may write the same path: each
    writes its own temporary file, and the last rename wins. The old file's mode is kept. If `path` is a symbolic link,
    its target is replaced. A process killed while writing leaves `.<name>.<pid>.<random>.tmp`, which `remove_leftovers`
    deletes. Special files (a pipe, /dev/stdout) are written in place.

    Raises:
        OSError: from the file system; `path` is unchanged.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        with open(temporary, "xb", opener=None if old is None else _private) as file:
            if old is not None:
                _copy_owner_and_mode(file, old)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename, error.filename2 = str(path), None  # the temporary file's name would mean nothing to a user
        raise
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{_stem(path)}.{os.getpid()}.{secrets.token_hex(6)}.tmp")


def _stem(path: Path) -> str:
    # Leave room for the suffix of a temporary name: file systems allow 255 bytes.
    return path.name if len(os.fsencode(path.name)) < 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()


def _private(path: str, flags: int) -> int:
    # The new content of a file with a narrow mode must not be readable before that mode is set.
    return os.open(path, flags, 0o600)


def _copy_owner_and_mode(file: BinaryIO, old: os.stat_result) -> None:
    new = os.fstat(file.fileno())
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(OSError, AttributeError):  # only root may give files away
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
    with suppress(AttributeError):  # Windows before Python 3.13
        os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    # A rename is durable once its folder is synced. Some file systems cannot sync folders; then only this guarantee is
    # lost.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_file(path: str | os.PathLike) -> None:
    """Check that a file can be written to `path`. Call it before slow work.

    Raises:
        ValueError: `path` is a folder, or its folder does not exist or is not writable.
        OSError: for example, the name is too long.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not path.exists() or path.is_file():  # others, such as pipes, are written in place
        _check_accepts_files(Path(os.path.realpath(path)).parent, path)


def check_folder(path: str | os.PathLike) -> None:
    """Check that files can be written to the folder `path`, which may not exist yet. Call it before slow work.

    Raises:
        ValueError: they cannot.
    """
    path = Path(path)
    _check_accepts_files(next(parent for parent in (path, *path.parents) if parent.exists()), path)


def _check_accepts_files(folder: Path, path: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):  # checking permissions would miss read-only file systems
            pass
    except OSError as error:
        reason = error.strerror if folder.is_dir() else "it is not a folder"
        raise ValueError(f"cannot write {path}: {folder} is not writable ({reason}); choose another folder") from error


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # for names that are not UTF-8: JSON's own escapes


class CsvFile:
    """A text file for `csv.writer` and `csv.DictWriter` that ends rows with a line feed.

    Older versions of Python quote only the line breaks in `lineterminator`. Its default, carriage return and line feed,
    covers both, so leave it and write to this file.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: str) -> None:
        """Write a row, which the csv writer passes in one call."""
        self.file.write(row.removesuffix("\r\n") + "\n")


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:
    # Python 3.10 has no hashlib.file_digest.
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def remove_folder(path: str | os.PathLike) -> None:
    """Remove a folder, if it exists, without ever leaving a partial folder under its name.

    A process killed while removing leaves `.<name>.<pid>.<random>.tmp`, which `remove_leftovers` deletes.
    """
    path = Path(path)
    if path.exists():
        gone = path.rename(_temporary(path))
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove temporary files and folders left by killed processes. Call it only while nothing else writes `path`."""
    path = Path(os.path.realpath(path))
    for leftover in path.parent.glob(f".{escape(_stem(path))}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        with suppress(OSError):
            leftover.unlink()


class Locked(RuntimeError):
    """Another process or thread holds a lock; the message names it."""


_held: set[tuple[int, str]] = set()  # (process, lock file); a forked child does not hold its parent's locks
_guard = threading.Lock()


@contextmanager
def lock(path: str | os.PathLike, what: str, *, timeout: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, excluding other processes and threads.

    The system releases the lock of a killed process, so a leftover lock file does not block anyone. The file names the
    holder and is removed at the end. Windows has no such locks: there, only threads of one process exclude each other.

    Args:
        path: the lock file; its folder must exist.
        what: description of the locked object, for the message.
        timeout: seconds to wait for another holder to finish.

    Raises:
        Locked: another process or thread holds it; the message has its process, host and start time.
        OSError: the lock file cannot be created.
    """
    path = os.path.realpath(path)
    deadline = time.monotonic() + timeout
    while (handle := _acquire(path, what, wait=time.monotonic() < deadline)) is None:
        time.sleep(0.05)
    try:
        yield
    finally:
        with _guard:
            with suppress(OSError):
                os.unlink(path)
            os.close(handle)
            _held.discard((os.getpid(), path))


def _acquire(path: str, what: str, wait: bool) -> int | None:
    """Return a handle that holds the lock; None to try again."""
    with _guard:
        if (os.getpid(), path) in _held:
            # Closing a second handle on the file would release the lock of the first.
            return _refused(what, f"this process ({os.getpid()})", wait)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            error.filename = what  # the lock file's name would mean nothing to a user
            raise
        try:
            if not _lock_handle(handle):
                return _refused(what, _holder(handle), wait, handle)
            if not _is_file_of(handle, path):  # the previous holder has removed it
                os.close(handle)
                return None
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(mine).encode())
        except OSError:
            os.close(handle)
            raise
        _held.add((os.getpid(), path))
        return handle


def _refused(what: str, holder: str, wait: bool, handle: int | None = None) -> None:
    if handle is not None:
        os.close(handle)
    if not wait:
        raise Locked(f"{what} is in use by {holder}: wait until it ends, stop it, or choose another folder")


def _lock_handle(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        return not _alive(_said(handle))  # a file system without locks: rely on the file's content
    return True


def _is_file_of(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _said(handle: int) -> dict[str, Any]:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 4096))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holder(handle: int) -> str:
    said = _said(handle)
    if not said:
        return "another process"
    return f"process {said.get('pid')} on {said.get('host')} since {said.get('since')}"


def _alive(said: dict[str, Any]) -> bool:
    if said.get("host") != socket.gethostname() or not isinstance(said.get("pid"), int):
        return False
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True

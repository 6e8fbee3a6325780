"""Single files of an index: read without staying open, safely whatever lies there, and locked for one writer."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mimic_el import files_mimic
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.files_mimic import locked, make_directory, mapped, read_json, regular, write_text

fcntl = pytest.importorskip("fcntl")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("size", [10, 100_000])
def test_no_file_stays_open(size: int, tmp_path: Path):
    path, data = tmp_path / "a table 表", bytes(number % 251 for number in range(size))
    path.write_bytes(data)
    before = descriptors()
    found = mapped(path, size)
    assert descriptors() == before
    path.unlink()
    assert bytes(found) == data, "it can be read on after it was deleted"


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_file_that_is_gone(size: int, tmp_path: Path):
    with pytest.raises((OSError, RuntimeError)):
        mapped(tmp_path / "nothing", size)


def test_a_file_that_is_shorter_than_it_was(tmp_path: Path):
    (tmp_path / "short").write_bytes(b"x" * 70_000)
    with pytest.raises((OSError, RuntimeError)):
        mapped(tmp_path / "short", 100_000)


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends a test that waits for a pipe."""

    def late(*_: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("in_time")
def test_a_pipe_or_a_device_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="is not a regular file"):
            read_json(tmp_path / name)
        with pytest.raises(OSError, match="is not a regular file"):
            regular(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\x00", ""])
def test_what_is_no_json(text: str, tmp_path: Path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        read_json(tmp_path / "x.json")


# --- Locks


def test_a_lock_is_held_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files_mimic, "_LOCK_SECONDS", 0.1)
    with (
        locked(tmp_path),
        pytest.raises(EntityIndexError, match="Another process is building or changing the index"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_what_a_lock_must_not_be(tmp_path: Path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(EntityIndexError, match="is not a regular file, so it cannot serve as a lock"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, such as some of those in networks."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files_mimic, "_LOCK_SECONDS", 0.1)


@pytest.mark.usefixtures("no_flock")
def test_a_file_system_without_locks(tmp_path: Path):
    for _ in range(2):
        with (
            locked(tmp_path),
            pytest.raises(EntityIndexError, match=r"has no locks, and the file .*\.lock-owner says"),
        ):
            locked(tmp_path).__enter__()
        with locked(tmp_path):
            pass
    assert not (tmp_path / ".lock-owner").exists()


@pytest.mark.usefixtures("no_flock")
def test_the_lock_of_a_process_that_was_killed(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    owner = tmp_path / ".lock-owner"
    owner.write_text(f"{socket.gethostname()} {int(ended.stdout)}")
    with locked(tmp_path):
        pass
    owner.write_text(f"another-machine {int(ended.stdout)}")
    with pytest.raises(EntityIndexError, match="if there is none, delete that file"), locked(tmp_path):
        pass


def test_an_error_of_the_file_system_is_not_told_as_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass


# --- Places where nothing can be written


@pytest.mark.parametrize("place", ["file", "file/below", "pipe", "nowhere", "x" * 300, "zero\0", "half\ud800"])
def test_a_place_that_can_be_no_directory_is_told(place: str, tmp_path: Path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not" / "there")
    for act in (make_directory, lambda path: locked(path).__enter__()):
        with pytest.raises(EntityIndexError, match=r"cannot be made a directory: .*Name another place"):
            act(tmp_path / place)


def test_a_directory_in_the_place_of_a_file_is_told_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "README.md").mkdir()
    with pytest.raises(EntityIndexError, match=r"README\.md cannot be written: Is a directory"):
        write_text(tmp_path / "README.md", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_where_one_may_not_write_is_told(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(EntityIndexError, match=f"cannot be written: {os.strerror(code)}"):
        write_text(tmp_path / "README.md", "text")
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(EntityIndexError, match=f"cannot be written: {os.strerror(code)}"), locked(tmp_path):
        pass


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(EntityIndexError, match="No space is left on the disk"), locked(tmp_path / "new"):
        pass

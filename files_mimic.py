"""Single files of an index: written whole or not at all, read safely, memory-mapped, locked for a writer.

Knows files, but not what is in them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError

from .errors_mimic import EntityIndexError
from .saving_mimic import is_full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_OWNER = ".lock-owner"  # in the place of LOCK, where a file system has no locks
_LOCK_SECONDS = 10.0
_LOCK_EVERY = 0.05
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# What is smaller is read, not mapped: a process may have some 65,000 mappings.
_MAPPED_FROM = 16 * 2**10


# --- Writing --------------------------------------------------------------------------------------------------------


def make_directory(directory: Path) -> Path:
    """Makes a directory, unless it is there.

    Raises:
        EntityIndexError: if that is not possible, such as where a file lies.
        OSError: if the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        if is_full(error):
            raise
        place = ascii(os.fspath(directory))
        raise EntityIndexError(f"{place:.200} cannot be made a directory: {error}. Name another place.") from error
    return directory


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file so that it is either whole or not there, whenever the process ends.

    Raises:
        EntityIndexError: if it cannot be written there, such as where a directory lies.
        OSError: if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that nobody else may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError | SafetensorError) -> Exception:
    """What to raise of an error of the system; that of a full disk as it is."""
    if is_full(error):
        return error
    why = getattr(error, "strerror", None) or error
    return EntityIndexError(
        f"{path} cannot be written: {why}. Look at what lies there and who may write there, or name another place."
    )


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


@contextmanager
def no_space_told(directory: Path) -> Iterator[None]:
    """Tells a full disk as such.

    Raises:
        EntityIndexError: in the place of what a full disk raises.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        raise EntityIndexError(
            f"No space is left on the disk of {directory}. What is finished is kept: make room and run the same "
            "command again."
        ) from error


# --- Reading --------------------------------------------------------------------------------------------------------


def regular(path: Path) -> Path:
    """The path, if a file lies there: reading a named pipe or a device would wait for ever.

    Raises:
        OSError: if it is something else.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{os.fspath(path)} is not a regular file")
    return path


def is_there(path: str | os.PathLike[str], directory: bool = False) -> bool:
    """Whether there is anything of that name, or a directory; `False` too for what cannot be a name."""
    try:
        return Path(path).is_dir() if directory else Path(path).exists()
    except (OSError, ValueError):  # too long, or with a zero
        return False


def size_of(path: Path) -> int | None:
    """The bytes of a regular file; `None` where there is none, be it since a moment ago."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
        ValueError: if it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(regular(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def file_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_small(size: int) -> bool:
    """Whether a file of that many bytes is better read than mapped."""
    return size < _MAPPED_FROM


def mapped(path: Path, size: int) -> memoryview | bytes:
    """The bytes of a file of a known size; a large one is mapped into memory.

    No file stays open: an index may have more files than a process may open. Python's mmap would keep one.

    Raises:
        OSError, RuntimeError: if the file cannot be read, or is shorter.
    """
    if is_small(size):
        return path.read_bytes()[:size]
    numbers: Any = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8).numpy()
    return memoryview(numbers)


# --- Locking --------------------------------------------------------------------------------------------------------


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory, which is made if there is none, for one writer; a full disk is told as such.

    Raises:
        EntityIndexError: if another process holds it, or the lock's file is something else.
    """
    with no_space_told(directory):
        path = make_directory(directory) / LOCK
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise EntityIndexError(f"{path} is not a regular file, so it cannot serve as a lock. Remove it.")
        try:
            with _windows_lock(path) if fcntl is None else _posix_lock(path):
                yield
        except TimeoutError as error:
            raise EntityIndexError(
                f"Another process is building or changing the index {directory}. Wait for it to end, and try again."
            ) from error


def _windows_lock(path: Path) -> Any:
    return WeakFileLock(path, timeout=_LOCK_SECONDS)


@contextmanager
def _posix_lock(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o664)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with nullcontext() if _flock(descriptor, path) else _owned(path.with_name(_OWNER)):
            yield
    finally:
        os.close(descriptor)  # which lets the lock go


def _flock(descriptor: int, path: Path) -> bool:
    """Locks an open file; `False` where the file system has no locks."""
    for _ in _tries(path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
    return True


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    """A lock for file systems that have none: a file that its owner alone could make, and deletes.

    Raises:
        EntityIndexError: if it stays another's. One of a process of this machine that has ended is taken over.
    """
    own = f"{socket.gethostname()} {os.getpid()}"
    try:
        for _ in _tries(path):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o664)
                break
            except FileExistsError:
                if _has_ended(path):
                    path.unlink(missing_ok=True)
    except TimeoutError as error:
        raise EntityIndexError(
            f"The file system of {path.parent} has no locks, and the file {path} says that another process is "
            "changing the index. Wait for it to end; if there is none, delete that file."
        ) from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(own)
        yield
    finally:
        path.unlink(missing_ok=True)


def _has_ended(path: Path) -> bool:
    """Whether a lock's file is of a process of this machine that is no more."""
    try:
        host, number = regular(path).read_text(encoding="utf-8").split()
        if host != socket.gethostname():
            return False
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _tries(path: Path) -> Iterator[None]:
    """Gives turns to try until the time for it is over.

    Raises:
        TimeoutError: then.
    """
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        yield
        if time.monotonic() >= end:
            raise TimeoutError(path)
        time.sleep(_LOCK_EVERY)


__all__ = [
    "LOCK",
    "file_facts",
    "is_small",
    "is_there",
    "json_text",
    "locked",
    "make_directory",
    "mapped",
    "no_space_told",
    "read_json",
    "regular",
    "size_of",
    "write_atomically",
    "write_json",
    "write_text",
]

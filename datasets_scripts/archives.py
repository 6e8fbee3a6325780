"""Safe reading of folders, zip and tar archives, and JSON files that come from other people.

No name, size or byte from an archive is trusted. A [`Tree`] is a read-only view of a folder, a zip or an uncompressed
tar that never leaves it. Archives are read in place, even a zip inside a tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .members import ArchiveError, TarMember, Window, tar_members, zip_member

MAX_JSON_BYTES = 4 << 30
# An archive that is compressed inside another one is unpacked in memory up to this size.
MAX_NESTED_BYTES = 256 << 20
# Deflate reaches about 1000:1 on nothing but zeros; images and JSON stay far below this.
MAX_COMPRESSION_RATIO = 200
# Folders below one another.
MAX_DEPTH = 64
SMALL_MEMBER_BYTES = 1 << 20

# What a damaged or hostile archive member can raise while it is read.
READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, MemoryError, zipfile.BadZipFile)


def unsafe_path(name: str) -> str | None:
    """Why `name` must not be used as a path below a folder, or `None` where it is harmless."""
    if "\0" in name:
        return "contains a NUL character"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return "is an absolute path"
    if ".." in re.split(r"[\\/]", name):
        return "contains '..'"
    return None


def normal_path(reference: str) -> str:
    """A relative path in one form: `x\\a.png`, `./x/a.png` and `x//a.png` are `x/a.png`."""
    parts = re.split(r"[\\/]", reference.strip())
    return ("/" if not parts[0] else "") + "/".join(part for part in parts if part not in ("", "."))


class Tree(ABC):
    """Regular files below one place, by relative POSIX path.

    Attributes:
        label: where the tree is, for messages.
        files: size in bytes of every readable file.
        refused: `(kind, reason)` of every name that is there and must not or cannot be read.
    """

    def __init__(self, label: str):
        self.label = label
        self.files: dict[str, int] = {}
        self.refused: dict[str, tuple[str, str]] = {}

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open one of `files` for reading in any order; the caller closes it."""

    @abstractmethod
    def changed(self, name: str) -> int:
        """A number that changes when the file does: a modification time or a checksum."""

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file.

        Raises:
            ArchiveError: `oversized` above `limit` bytes, `unreadable` where the archive is damaged.
        """
        if self.files[name] > limit:
            raise ArchiveError("oversized", f"{self.files[name]:,} bytes, more than the limit of {limit:,}")
        data = bytearray()
        try:
            with self.open(name) as file:
                while block := file.read(1 << 20):
                    data += block
                    if len(data) > limit:
                        raise ArchiveError("oversized", f"more than {limit:,} bytes")
        except READ_ERRORS as error:
            if isinstance(error, ArchiveError):
                raise
            raise ArchiveError("unreadable", f"{type(error).__name__}: {error}") from error
        return bytes(data)

    @abstractmethod
    def close(self) -> None:
        """Release the files held open."""


def _is_junk(name: str) -> bool:
    """Resource forks that macOS adds to archives."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or (bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store"))


class DirectoryTree(Tree):
    """The files below a folder. Hidden folders are left out; symbolic links may only lead to files inside."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(str(path))
        self.path = Path(path).resolve(strict=True)
        self._mtimes: dict[str, int] = {}
        for name, entry in self._walk():
            self._add(name, entry)

    def _walk(self) -> Iterator[tuple[str, os.DirEntry]]:
        waiting: list[tuple[Path, str]] = [(self.path, "")]
        while waiting:
            folder, prefix = waiting.pop()
            if prefix.count("/") > MAX_DEPTH:
                self.refused[prefix.rstrip("/")] = ("oversized", f"lies below more than {MAX_DEPTH} folders")
                continue
            try:
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                self.refused[prefix.rstrip("/")] = ("unreadable", f"{type(error).__name__}: {error.strerror}")
                continue
            for entry in entries:
                yield prefix + entry.name, entry
            inner = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
            waiting += [
                (folder / entry.name, f"{prefix}{entry.name}/")
                for entry in reversed(inner)
                if not entry.name.startswith(".")
            ]

    def _add(self, name: str, entry: os.DirEntry) -> None:
        if _is_junk(name):
            return
        if entry.is_dir(follow_symlinks=False):
            self.refused[name] = ("not_a_file", "is a directory")
            return
        if entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if not target.is_relative_to(self.path):
                self.refused[name] = ("unsafe", "is a symbolic link that leaves the folder")
                return
        try:
            status = entry.stat()
        except OSError as error:
            self.refused[name] = ("unreadable", f"{type(error).__name__}: {error.strerror}")
            return
        if stat.S_ISREG(status.st_mode):
            self.files[name] = status.st_size
            self._mtimes[name] = status.st_mtime_ns
        else:  # a link to a directory, a pipe, a socket, a device
            self.refused[name] = ("not_a_file", "is not a regular file")

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    def changed(self, name: str) -> int:
        return self._mtimes[name]

    def close(self) -> None:
        pass  # each file is opened by itself


class ZipTree(Tree):
    """The members of a zip archive, read without unpacking it."""

    def __init__(self, file: BinaryIO, label: str):
        super().__init__(label)
        self._file = file
        self._infos: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(file) as archive:  # reads the directory alone; it closes no file that it is given
                members = archive.infolist()
        except Exception as error:  # a damaged directory fails in many ways
            hint = _not_whole(file)
            file.close()
            raise ArchiveError("broken_archive", f"not a readable zip archive: {error}{hint}") from error
        for info in members:
            if not info.is_dir() and not _is_junk(info.filename):
                self._add(info)

    def _add(self, info: zipfile.ZipInfo) -> None:
        # ZipInfo cuts a name at a NUL character and turns the system's separators round: judge what the archive says.
        name = info.filename
        reason = unsafe_path(info.orig_filename) or unsafe_path(name)
        mode = info.external_attr >> 16
        if reason:
            self.refused[name] = ("unsafe", f"member name {reason}")
        elif stat.S_ISLNK(mode):
            self.refused[name] = ("unsafe", "is a symbolic link in the archive")
        elif info.flag_bits & 1:
            self.refused[name] = ("unreadable", "is encrypted")
        elif info.file_size > SMALL_MEMBER_BYTES and info.file_size > MAX_COMPRESSION_RATIO * max(
            1, info.compress_size
        ):
            ratio = info.file_size // max(1, info.compress_size)
            self.refused[name] = (
                "oversized",
                f"claims to unpack to {ratio:,} times its size ({info.file_size:,} bytes)",
            )
        else:
            self.files[name] = info.file_size
            self._infos[name] = info

    def open(self, name: str) -> BinaryIO:
        return zip_member(self._file, self._infos[name])

    def is_seekable(self, name: str) -> bool:
        """Whether a member can be read in any order without unpacking it, as a nested archive must be."""
        return self._infos[name].compress_type == zipfile.ZIP_STORED

    def changed(self, name: str) -> int:
        return self._infos[name].CRC

    def close(self) -> None:
        self._file.close()


class TarTree(Tree):
    """The members of an uncompressed tar archive, read in place."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(str(path))
        self.path = Path(path)
        self._offsets: dict[str, tuple[int, int]] = {}
        with open(path, "rb") as file:
            if packed := _compression(file.read(6)):
                raise ArchiveError("broken_archive", f"is compressed with {packed}; unpack it first")
            for member in tar_members(file, os.stat(file.fileno()).st_size):
                if member.kind != "folder" and not _is_junk(member.name):
                    self._add(member)

    def _add(self, member: TarMember) -> None:
        name = member.name.removeprefix("./")
        reason = unsafe_path(name)
        if reason:
            self.refused[name] = ("unsafe", f"member name {reason}")
        elif member.kind == "link":
            self.refused[name] = ("unsafe", "is a link in the archive")
        elif member.kind != "file":
            self.refused[name] = ("not_a_file", "is not a regular file")
        else:
            self.files[name] = member.size
            self._offsets[name] = (member.offset, member.mtime)

    def open(self, name: str) -> BinaryIO:
        # A handle of its own for each reader: two nested archives can then be read side by side.
        file = open(self.path, "rb")  # noqa: SIM115, closed with the window
        return io.BufferedReader(Window(file, self._offsets[name][0], self.files[name], owns=True))

    def changed(self, name: str) -> int:
        return self._offsets[name][1]

    def close(self) -> None:
        pass  # each file is opened by itself


def _compression(start: bytes) -> str | None:
    """What a file that begins so is compressed with."""
    marks = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((name for mark, name in marks.items() if start.startswith(mark)), None)


def _not_whole(file: BinaryIO) -> str:
    """A hint for a zip archive whose directory, at its end, cannot be found though it begins as one."""
    try:
        file.seek(0)
        return " (it begins as one: is the download complete?)" if file.read(4) == b"PK\x03\x04" else ""
    except (OSError, ValueError):
        return ""


def open_tree(path: str | os.PathLike) -> Tree:
    """Open a folder, a `.zip` or an uncompressed `.tar`.

    Raises:
        ArchiveError: `missing_file` where there is nothing, `broken_archive` where the file is not such an archive.
    """
    path = Path(path)
    if path.is_dir():
        return DirectoryTree(path)
    if not path.is_file():
        raise ArchiveError("missing_file", f"{path} does not exist; give a folder, a .zip or a .tar")
    if path.suffix.lower() == ".zip":
        return ZipTree(open(path, "rb"), str(path))
    if path.suffix.lower() == ".tar":
        return TarTree(path)
    raise ArchiveError("broken_archive", f"{path} is neither a folder nor a .zip or .tar archive")


def open_nested(tree: Tree, name: str) -> Tree:
    """Open the archive `name` inside `tree` in place.

    Raises:
        ArchiveError: where it is damaged, or compressed once more by the archive around it.
    """
    label = f"{tree.label}/{name}"
    if name in tree.files and not tree.files[name]:
        raise ArchiveError("broken_archive", f"{label} is empty")
    if name.lower().endswith(".tar"):
        if isinstance(tree, DirectoryTree):
            return TarTree(tree.path / name)
        raise ArchiveError("broken_archive", f"{label} is a tar inside an archive; unpack {tree.label} first")
    if isinstance(tree, ZipTree) and not tree.is_seekable(name):
        if tree.files[name] > MAX_NESTED_BYTES:
            raise ArchiveError("broken_archive", f"{label} is compressed twice; unpack {tree.label} first")
        return ZipTree(io.BytesIO(tree.read(name, MAX_NESTED_BYTES)), label)
    try:
        return ZipTree(tree.open(name), label)
    except ArchiveError as error:
        raise ArchiveError("broken_archive", f"{label}: {error}") from error


@dataclass(frozen=True)
class JsonFile:
    """A parsed JSON file, its MD5 sum, its size in bytes and the keys that an object of it holds twice."""

    value: Any
    md5: str
    size: int
    duplicate_keys: list[str]


def load_json(tree: Tree, name: str) -> JsonFile:
    """Read and parse a JSON file in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32.

    Raises:
        ArchiveError: `broken_json` or `wrong_encoding` with the line and column or byte, `oversized` above
            `MAX_JSON_BYTES`, `unreadable` where an archive is damaged.
    """
    data = tree.read(name, MAX_JSON_BYTES)
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ArchiveError(
            "wrong_encoding",
            f"line {line}, byte {error.start}: not {encoding.upper()} ({error.reason}); convert the file to UTF-8",
        ) from error
    duplicates: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            duplicates.extend(key for key, count in Counter(key for key, _ in pairs).items() for _ in range(count - 1))
        return result

    try:
        value = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise ArchiveError("broken_json", f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested without end, a number of a million digits
        raise ArchiveError("broken_json", f"{type(error).__name__}: {error}") from error
    return JsonFile(value, hashlib.md5(data).hexdigest(), len(data), duplicates)

"""Safe reading of what other people packed: folders, zip and tar archives, JSON files and images.

Nothing here trusts a name, a size or a byte that comes from an archive. A [`Tree`] is a read-only view of a folder,
a zip or an uncompressed tar that never leaves it; an [`ImageFolder`] finds images in trees by file name;
[`inspect_image`] decodes an image within bounds. Archives are read in place, also a zip inside a tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import sys
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, ImageOps

from mimic_el.errors_mimic import MimicError, MimicImageError
from mimic_el.images_mimic import MAX_PIXELS, load_image, open_image

MAX_JSON_BYTES = 4 << 30
MAX_IMAGE_BYTES = 256 << 20
# An archive that is compressed inside another one is unpacked in memory up to this size.
MAX_NESTED_BYTES = 256 << 20
# Deflate reaches about 1000:1 on nothing but zeros; images and JSON stay far below this.
MAX_COMPRESSION_RATIO = 200
SMALL_MEMBER_BYTES = 1 << 20

# What a damaged or hostile archive member can raise while it is read.
READ_ERRORS = (OSError, EOFError, RuntimeError, NotImplementedError, ValueError, zipfile.BadZipFile, zlib.error)


class ArchiveError(MimicError, ValueError):
    """A file cannot be read safely. `kind` is a kind of [`mimic_el.datasets_scripts.report`]; `str()` is the detail."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


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

    def _raw(self, name: str, limit: int) -> bytes:
        with self.open(name) as file:
            return file.read(limit)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file.

        Raises:
            ArchiveError: `oversized` above `limit` bytes, `unreadable` where the archive is damaged.
        """
        if self.files[name] > limit:
            raise ArchiveError("oversized", f"{self.files[name]:,} bytes, more than the limit of {limit:,}")
        try:
            data = self._raw(name, limit + 1)
        except READ_ERRORS as error:
            raise ArchiveError("unreadable", f"{type(error).__name__}: {error}") from error
        if len(data) > limit:
            raise ArchiveError("oversized", f"more than {limit:,} bytes")
        return data

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
        for name, entry in self._walk(self.path, ""):
            self._add(name, entry)

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry]]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                yield prefix + entry.name, entry
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    yield from self._walk(folder / entry.name, f"{prefix}{entry.name}/")

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
        try:
            self._zip = zipfile.ZipFile(file)
        except READ_ERRORS as error:
            file.close()
            raise ArchiveError("broken_archive", f"not a readable zip archive: {error}") from error
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
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
        info = self._infos[name]
        if info.compress_type != zipfile.ZIP_STORED:
            return self._zip.open(info)  # type: ignore[return-value]
        # A stored member lies in the archive as it is, so an archive inside the archive can be read in place.
        header = _Window(self._file, info.header_offset, 30).read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{name}: bad local header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        return io.BufferedReader(_Window(self._file, start, info.file_size))

    def _raw(self, name: str, limit: int) -> bytes:
        with self._zip.open(self._infos[name]) as file:  # checks the member's checksum, which a window does not
            return file.read(limit)

    def is_seekable(self, name: str) -> bool:
        """Whether a member can be read in any order without unpacking it, as a nested archive must be."""
        return self._infos[name].compress_type == zipfile.ZIP_STORED

    def changed(self, name: str) -> int:
        return self._infos[name].CRC

    def close(self) -> None:
        self._zip.close()
        self._file.close()


class TarTree(Tree):
    """The members of an uncompressed tar archive, read in place."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(str(path))
        self.path = Path(path)
        self._offsets: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isdir() and not _is_junk(member.name):
                        self._add(member)
        except tarfile.TarError as error:
            raise ArchiveError(
                "broken_archive", f"not a readable uncompressed tar archive ({error}); unpack a compressed one first"
            ) from error

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        reason = unsafe_path(name)
        if reason:
            self.refused[name] = ("unsafe", f"member name {reason}")
        elif member.issym() or member.islnk():
            self.refused[name] = ("unsafe", "is a link in the archive")
        elif not member.isreg() or member.issparse():
            self.refused[name] = ("not_a_file", "is not a regular file")
        else:
            self.files[name] = member.size
            self._offsets[name] = (member.offset_data, int(member.mtime))

    def open(self, name: str) -> BinaryIO:
        # A handle of its own for each reader: two nested archives can then be read side by side.
        file = open(self.path, "rb")  # noqa: SIM115, closed with the window
        return io.BufferedReader(_Window(file, self._offsets[name][0], self.files[name], owns=True))

    def changed(self, name: str) -> int:
        return self._offsets[name][1]

    def close(self) -> None:
        pass  # each file is opened by itself


_LOCK = threading.Lock()


def _read_at(file: BinaryIO, count: int, place: int) -> bytes:
    if hasattr(os, "pread") and not isinstance(file, io.BytesIO):
        return os.pread(file.fileno(), count, place)
    with _LOCK:
        file.seek(place)
        return file.read(count)


class _Window(io.RawIOBase):
    """A read-only view of `size` bytes of a file from `start`; several may share one file, in several threads."""

    def __init__(self, file: BinaryIO, start: int, size: int, owns: bool = False):
        self._to_close = file if owns else None
        self._outer = file  # a file that nobody refers to is closed
        self._file: BinaryIO
        self._start: int
        self._size: int
        around = getattr(file, "raw", file)
        if isinstance(around, _Window):  # an archive in an archive: read from the outermost file
            file, start, size = around._file, around._start + start, max(0, min(size, around._size - start))
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        data = _read_at(self._file, count, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._to_close is not None:
            self._to_close.close()
        super().close()


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
    if name.lower().endswith(".tar"):
        if isinstance(tree, DirectoryTree):
            return TarTree(tree.path / name)
        raise ArchiveError("broken_archive", f"{label} is a tar inside an archive; unpack {tree.label} first")
    if isinstance(tree, ZipTree) and not tree.is_seekable(name):
        if tree.files[name] > MAX_NESTED_BYTES:
            raise ArchiveError("broken_archive", f"{label} is compressed twice; unpack {tree.label} first")
        return ZipTree(io.BytesIO(tree.read(name, MAX_NESTED_BYTES)), label)
    return ZipTree(tree.open(name), label)


class ImageFile(NamedTuple):
    """An image found in `folder` (an [`ImageFolder`]) under `name`, its path there."""

    folder: ImageFolder
    name: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        tree, name = self.folder.files[self.name]
        return tree.files[name]

    def read(self) -> bytes:
        """The file's bytes; raises `ArchiveError` (`oversized_image`, `unreadable_image`)."""
        tree, name = self.folder.files[self.name]
        try:
            return tree.read(name, MAX_IMAGE_BYTES)
        except ArchiveError as error:
            raise ArchiveError(f"{error.kind}_image", f"{self.name!r}: {error}") from error


_IMAGE_KINDS = {"unsafe": "unsafe_image_path", "not_a_file": "image_not_a_file", "oversized": "oversized_image"}


def _base(name: str) -> str:
    # A name that was refused, or that a row gives, may hold the other system's separators.
    return re.split(r"[\\/]", name)[-1]


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


class ImageFolder:
    """Images by name, below one folder or several.

    Data sets name an image with the extension it had before it was converted, so [`find`] falls back in this order,
    and says which step it took:

    1. `exact`: the path as given, or a file whose path ends in it;
    2. `jpg`: the path up to its last dot, with `.jpg` (how the MIMIC archives store images);
    3. `case`: either, in another case;
    4. `extension`: the path with any other extension.

    The folders that a path names are part of it: `Q1/2.jpg` is not found in `Q2/`.

    Args:
        label: what to call the folder in messages.
        parts: the trees and, for each, the folder in it to look below (`""` for all of it, else ending in `/`).

    Attributes:
        files: by path below its folder, the tree and the name in it of every image.
    """

    def __init__(self, label: str, parts: list[tuple[Tree, str]]):
        self.label = label
        self.files: dict[str, tuple[Tree, str]] = {}
        self._refused: dict[str, dict[str, tuple[str, str]]] = {}
        for tree, prefix in parts:
            for name in tree.files:
                if name.startswith(prefix):
                    self.files.setdefault(name[len(prefix) :], (tree, name))
            for name, refusal in tree.refused.items():
                if name.startswith(prefix):
                    self._refused.setdefault(_base(name), {}).setdefault(name[len(prefix) :], refusal)
        self._bases: dict[str, list[str]] = {}
        for path in self.files:
            self._bases.setdefault(_base(path), []).append(path)
        self._folded: dict[str, list[str]] | None = None
        self._stems: dict[str, list[str]] | None = None

    def find(self, reference: str, moved: bool = False) -> tuple[ImageFile, str]:
        """Look an image up by the name or path that a row gives.

        Args:
            reference: the name or path.
            moved: whether the path may name folders that are gone and a name with more after its first dot, as the
                `imgPath` of the MIMIC archives does: then its last part, or that up to its first dot, is enough.

        Returns:
            The image and the step that found it: `exact`, `jpg`, `case` or `extension`.

        Raises:
            ArchiveError: `unsafe_image_path`, `image_not_a_file`, `oversized_image`, `unreadable_image` or
                `missing_image` (also where several files could be meant).
        """
        reason = unsafe_path(reference)
        if reason:
            raise ArchiveError("unsafe_image_path", f"{reference!r} {reason}")
        if reference in self.files:
            return ImageFile(self, reference), "exact"
        *folders, base = [part for part in re.split(r"[\\/]", reference) if part not in ("", ".")] or [""]
        # The file must lie in the folders that are named. Where these may be gone, in them or else anywhere.
        places = list(dict.fromkeys(("/".join(folders), ""))) if moved else ["/".join(folders)]
        stems = list(dict.fromkeys((_stem(base), base.partition(".")[0]))) if moved else [_stem(base)]
        names = [base, *(stem + ".jpg" for stem in stems)]
        for name in names:
            if found := _in_places(self._bases.get(name, ()), places):
                return self._image(reference, found), "exact" if name == base else "jpg"
            refused = self._refused.get(name, {})
            if found := _in_places(refused, places):
                kind, detail = refused[found[0]]
                raise ArchiveError(_IMAGE_KINDS.get(kind, "unreadable_image"), f"{reference!r} {detail}")
        if self._folded is None or self._stems is None:
            self._folded, self._stems = {}, {}
            for name, paths in self._bases.items():
                self._folded.setdefault(name.lower(), []).extend(paths)
                self._stems.setdefault(_stem(name).lower(), []).extend(paths)
        for name in names:
            if found := _in_places(self._folded.get(name.lower(), ()), places, fold=True):
                return self._image(reference, found), "case"
        for stem in stems:
            if found := _in_places(self._stems.get(stem.lower(), ()), places, fold=True):
                return self._image(reference, found), "extension"
        raise ArchiveError("missing_image", f"{reference!r} is not in {self.label}")

    def _image(self, reference: str, paths: list[str]) -> ImageFile:
        # Of names that differ in case or extension alone the first; the one that lies in no folder comes before others.
        same = [path for path in paths if _base(path) == _base(paths[0])]
        if len(same) == 1 or _base(same[0]) in same:
            return ImageFile(self, same[0] if len(same) == 1 else _base(same[0]))
        raise ArchiveError("missing_image", f"{reference!r} could be {same[0]!r} or {same[1]!r} in {self.label}")


def _in_places(paths: Iterable[str], places: list[str], fold: bool = False) -> list[str]:
    """Those of `paths` in a folder whose path ends in the first of `places` that any is in; all are in `""`."""
    for place in places:
        ending = f"/{place.lower() if fold else place}" if place else ""
        found = []
        for path in paths:
            folder = "/" + "/".join(re.split(r"[\\/]", path)[:-1])
            if (folder.lower() if fold else folder).endswith(ending):
                found.append(path)
        if found:
            return found
    return []


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, str] | None:
    """Decode an image completely, to know that a reader of the data set can: it is read as training reads it.

    Returns:
        `None` for a sound image, else `(kind, detail)` with `oversized_image` (more than `max_pixels` pixels; it is
        not decoded) or `unreadable_image` (not an image, truncated, damaged, or not one of the formats of
        `mimic_el.images_mimic`).
    """
    try:
        load_image(data, max_pixels)
    except MimicImageError as error:
        # The reader's own limit has no cause; above twice Pillow's, Pillow refuses.
        too_large = error.__cause__ is None or isinstance(error.__cause__, Image.DecompressionBombError)
        # The reader has no name for bytes; the caller has.
        detail = str(error).replace("The image the given bytes", "it").replace("the given bytes", "it")
        return "oversized_image" if too_large else "unreadable_image", detail
    return None


# Modes that convert to RGB or RGBA without loss of range; the others have more than 8 bits a channel.
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}


def shrink_image(data: bytes, longest_side: int) -> bytes:
    """Re-encode a sound image so that its longest side has at most `longest_side` pixels.

    An image that is small enough, or has more than 8 bits a channel, keeps its bytes. One with transparency becomes
    PNG, any other JPEG (quality 90). The camera's orientation is applied, as `datasets.Image` does when it decodes.
    """
    opened, _ = open_image(data, sys.maxsize)  # its pixels were counted when it was found sound
    with opened as image:
        if max(image.size) <= longest_side or image.mode not in _EIGHT_BIT_MODES:
            return data
        image.draft("RGB", (longest_side, longest_side))  # JPEG decodes at a fraction of its size where that is enough
        turned = ImageOps.exif_transpose(image)
        transparent = turned.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info
        small = turned.convert("RGBA" if transparent else "RGB")
        small.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if transparent:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


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

"""Where the bytes of an image come from: what a string may name, and which places may be read.

A string that the caller writes is as trustworthy as the caller's code. A string in a table from elsewhere is not: it
could name any file of this machine, or any address. [`ImagePlaces`] says which places may be read. [`PlacedImage`]
keeps that together with the string, all the way from the table to the reader. Knows nothing of pixels.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import os
import re
import stat
import threading
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar, TypeGuard

import numpy as np

from .downloads_mimic import MAX_BYTES, download
from .errors_mimic import MimicImageError
from .texts_mimic import shortened

_CHUNK = 2**16
_PATH_LENGTH = 4096
_SHORTEST_BASE64 = 40
_SCHEME = re.compile(r"(data):|(file):(?=/)|([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
# How the files of the formats that are read begin: what tells an image in base64 from a path that is not there.
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM|II\*\x00|MM\x00\*|P[1-7]\s|\x00\x00\x01\x00|"
    rb"....ftypavi[fs]|\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class ImagePlaces:
    """The places that an image given as a string is read from. The defaults are for what a caller's own code says.

    Args:
        allow_urls: whether `http(s)` and `hf://` addresses are read. `True`: public ones; `"private"`: those of this
            machine and of private networks too; `False`: none.
        image_root: whether files of this machine are read. `True`: any; `False`: none; a folder: those in it, and
            relative paths are seen from it.

    Raises:
        ValueError: if one of them is something else.
    """

    allow_urls: bool | str = "private"
    image_root: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        if not isinstance(self.allow_urls, bool) and self.allow_urls != "private":
            raise ValueError(f'`allow_urls` must be True, False or "private", got {self.allow_urls!r}.')
        if not isinstance(self.image_root, bool | str | os.PathLike) or self.image_root == "":
            raise ValueError(f"`image_root` must be a folder, True or False, got {self.image_root!r}.")


# What a table from elsewhere may name: nothing but the images that it brings along.
NO_PLACES = ImagePlaces(allow_urls=False, image_root=False)


@dataclass(frozen=True)
class PlacedImage:
    """An image as a table names it, and the places it may be read from."""

    source: Any
    places: ImagePlaces
    # Told by this and not by the class: of a checkpoint's code there may be several copies, each with its own classes.
    is_placed_image: ClassVar[bool] = True


def is_placed(image: Any) -> TypeGuard[PlacedImage]:
    """Whether an image carries the places it may be read from."""
    return getattr(image, "is_placed_image", False) is True


def placed(images: Any, places: ImagePlaces) -> Any:
    """An image, or a list of them, each with the places it may be read from; what names no place stays as it is."""
    if places == ImagePlaces() or images is None:
        return images
    if isinstance(images, list | tuple):
        return [placed(image, places) for image in images]
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OUS":  # of pandas or Arrow
        return [placed(image, places) for image in images.tolist()]
    names_a_place = isinstance(images, str | os.PathLike) or (isinstance(images, Mapping) and not images.get("bytes"))
    return PlacedImage(images, places) if names_a_place else images


def read_named(source: str | os.PathLike[str], places: ImagePlaces) -> bytes | str:
    """What a string names: the bytes, or the path of a file that is there and may be opened.

    A string is a path, a `file://`, `http(s)://` or `hf://` address, `zip://member::archive` as `datasets` has it (the
    archive at any of these), a `data:` URI, or the bytes of an image in base64.

    Raises:
        MimicImageError: if there is nothing, or it is not read from there.
    """
    name = os.fspath(source)
    kind = _kind(source)
    if kind == "data":
        return _data_uri(name)
    if kind in ("http", "https"):
        _require_urls(name, places)
        return download(name, private=places.allow_urls == "private")
    if kind == "hf":
        _require_urls(name, places)
        return _hub_file(name)
    if kind == "zip":
        return _zip_member(name, places)
    if kind == "file":
        return _local_file(_path_of_file_url(name), places)
    if kind:
        raise MimicImageError(
            f"The image {shortened(name)} is at a {kind}:// address, which is not read. Open it, and give its bytes."
        )
    if len(name) > _PATH_LENGTH or places.image_root is False or not os.path.lexists(_seen_from_root(name, places)):
        decoded = _from_base64(name)
        if decoded is not None and _SIGNATURES.match(decoded):
            return decoded
    return _local_file(name, places)


def file_named(source: str | os.PathLike[str], places: ImagePlaces) -> str:
    """The path of the file that a string names, or of the archive that it is in.

    Raises:
        MimicImageError: if it names none that is there and may be read.
    """
    name, kind = os.fspath(source), _kind(source)
    if kind == "zip":
        name = name.partition("::")[2]
        kind = _kind(name)
    if kind not in ("", "file"):
        raise MimicImageError(f"The image {shortened(name)} is not a file on this machine.")
    return _local_file(_path_of_file_url(name) if kind == "file" else name, places)


def _kind(source: str | os.PathLike[str]) -> str:
    """The scheme of an address, in small letters; an empty string for a path."""
    scheme = _SCHEME.match(source[:64]) if isinstance(source, str) else None
    return next(filter(None, scheme.groups())).lower() if scheme else ""


def _require_urls(name: str, places: ImagePlaces) -> None:
    if not places.allow_urls:
        raise MimicImageError(
            f"The image {shortened(name)} is a URL, and URLs are not read here. To read it, pass allow_urls=True."
        )


def _seen_from_root(name: str, places: ImagePlaces) -> str:
    return name if isinstance(places.image_root, bool) else os.path.join(places.image_root, name)


def _local_file(name: str, places: ImagePlaces) -> str:
    """The path of a regular file that may be read; anything else, such as a named pipe, could keep a reader waiting."""
    shown = shortened(name)
    if places.image_root is False:
        raise MimicImageError(
            f"The image {shown} is a path on this machine, named in a table that came from elsewhere; no file is read "
            "for it. To read it, pass image_root= with the folder that the images are in."
        )
    path = _seen_from_root(name, places)
    if not isinstance(places.image_root, bool):
        root = os.path.realpath(places.image_root)
        try:
            inside = os.path.commonpath([root, os.path.realpath(path)]) == root
        except (OSError, ValueError):  # a null character, another drive
            inside = False
        if not inside:
            raise MimicImageError(f"The image {shown} is not in the folder {root} (`image_root`), so it is not read.")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise MimicImageError(f"The image {shown} cannot be opened: {error.strerror}.") from error
        raise MimicImageError(f"There is no image file {shown}.") from error
    if stat.S_ISDIR(mode):
        raise MimicImageError(f"The image {shown} is a directory.")
    if not stat.S_ISREG(mode):
        raise MimicImageError(
            f"The image {shown} is not a regular file but a named pipe or a device, which is not read."
        )
    return path


def _path_of_file_url(name: str) -> str:
    parts = urllib.parse.urlsplit(name)
    if parts.netloc not in ("", "localhost"):
        raise MimicImageError(f"The image {shortened(name)} is a file of another machine, {shortened(parts.netloc)}.")
    return urllib.request.url2pathname(parts.path)


def _data_uri(name: str) -> bytes:
    head, comma, data = name.partition(",")
    shown = shortened(name, 60)
    if not comma:
        raise MimicImageError(f"The image {shown} is a data: URI without a comma, and so without data.")
    if not head.lower().rstrip().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(data)
    decoded = _from_base64(urllib.parse.unquote(data), shortest=0)
    if decoded is None:
        raise MimicImageError(f"The image {shown} is a data: URI whose data is not valid base64.")
    return decoded


def _from_base64(text: str, shortest: int = _SHORTEST_BASE64) -> bytes | None:
    """The bytes that a string writes in base64, of either alphabet, in lines or not; `None` if it does not."""
    if len(text) < shortest or len(text) > 2 * MAX_BYTES:
        return None
    text = "".join(text.split())
    if not _BASE64.fullmatch(text):
        return None
    bare = text.rstrip("=")
    try:
        return base64.b64decode(bare.replace("-", "+").replace("_", "/") + "=" * (-len(bare) % 4))
    except (binascii.Error, ValueError):
        return None


def _hub_file(name: str) -> bytes:
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem().open(name, "rb") as file:
            return _limited(file, name)
    except MimicImageError:
        raise
    except Exception as error:  # those of the Hub, of its HTTP library, of fsspec
        raise MimicImageError(f"The image {shortened(name)} cannot be downloaded: {shortened(str(error))}") from error


def _zip_member(name: str, places: ImagePlaces) -> bytes:
    """A member of a zip archive, as `datasets` writes it where it streams one."""
    member, _, archive = name[len("zip://") :].partition("::")
    if not archive:
        raise MimicImageError(f"The image {shortened(name)} names no archive: write zip://member::archive.")
    kind = _kind(archive)
    if kind in ("http", "https", "hf"):
        _require_urls(archive, places)
        key: tuple[Any, ...] = (archive, places.allow_urls)
    else:
        path = file_named(archive, places)
        state = os.stat(path)
        key = (path, state.st_size, state.st_mtime_ns)
    try:
        # Kept open, so that its list of members is read once; each process and thread has its own.
        opened = _archive(os.getpid(), threading.get_ident(), kind, *key)
        entry = opened.getinfo(member)
        if entry.compress_type not in _ZIP_METHODS:
            raise MimicImageError(f"The image {shortened(name)} is compressed by a method that is not read.")
        with opened.open(entry) as file:
            return _limited(file, name)
    except MimicImageError:
        raise
    except KeyError as error:
        raise MimicImageError(f"There is no image {shortened(member)} in {shortened(archive)}.") from error
    except Exception as error:  # zipfile and zlib raise many kinds for damaged archives
        raise MimicImageError(f"The image {shortened(name)} cannot be read: {shortened(str(error))}") from error


@functools.lru_cache(maxsize=16)
def _archive(process: int, thread: int, kind: str, place: str, *state: Any) -> zipfile.ZipFile:
    """An open archive; `state` and the rest make it another's where it changed, or belongs to another reader."""
    if kind == "hf":
        from huggingface_hub import HfFileSystem

        return zipfile.ZipFile(HfFileSystem().open(place, "rb"))
    if kind in ("http", "https"):
        return zipfile.ZipFile(io.BytesIO(download(place, private=state[0] == "private")))
    return zipfile.ZipFile(place)


def read_file(file: IO[bytes], name: str) -> bytes:
    """What an open file holds, from its beginning where it has one.

    Raises:
        MimicImageError: if it cannot be read, is not a file of bytes, or holds more than 64 MiB.
    """
    try:
        if callable(getattr(file, "seekable", None)) and file.seekable():
            file.seek(0)
        return _limited(file, name)
    except MimicImageError:
        raise
    except Exception as error:  # a closed file, a broken stream
        raise MimicImageError(f"{name} cannot be read: {shortened(str(error))}") from error


def _limited(file: IO[bytes], name: str) -> bytes:
    """What a file holds, a piece at a time: its limit is not to be the memory that is asked for."""
    data = bytearray()
    while piece := file.read(_CHUNK):
        if not isinstance(piece, bytes):
            raise MimicImageError(f"The image {shortened(name)} is an open text file; open it for bytes (mode 'rb').")
        data += piece
        if len(data) > MAX_BYTES:
            raise MimicImageError(f"The image {shortened(name)} is larger than {MAX_BYTES >> 20} MiB.")
    return bytes(data)


__all__ = ["NO_PLACES", "ImagePlaces", "PlacedImage", "file_named", "is_placed", "placed", "read_file", "read_named"]

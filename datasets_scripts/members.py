"""The members of zip and tar archives as bytes, read within limits of memory and time.

Sizes and names in an archive are only claims. They are checked before they are used, and the output of a decoder is
counted. A broken member is an [`ArchiveError`], whatever its decoder raises.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from mimic_el.errors_mimic import MimicError

# What unpacking a member may take: a minute, and a second for every two megabytes that it claims.
MEMBER_SECONDS = 60.0
_BYTES_A_SECOND = 2 << 20
# LZMA in a zip file names the size of its dictionary, up to 4 GB, which its decoder allocates.
MAX_DICTIONARY_BYTES = 64 << 20
# What is given to a decoder, and taken from it, at a time.
_BLOCK_BYTES = 64 << 10
# Of names, links and other attributes that a tar archive holds in blocks of their own.
_MAX_ATTRIBUTE_BYTES = 1 << 20
_TAR_BLOCK = 512


class ArchiveError(MimicError, ValueError):
    """A file cannot be read safely. `kind` is a kind of [`mimic_el.datasets_scripts.report`]; `str()` is the detail."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


_LOCK = threading.Lock()


def _read_at(file: BinaryIO, count: int, place: int) -> bytes:
    if hasattr(os, "pread") and not isinstance(file, io.BytesIO):
        return os.pread(file.fileno(), count, place)
    with _LOCK:
        file.seek(place)
        return file.read(count)


class Window(io.RawIOBase):
    """A read-only view of `size` bytes of a file from `start`; several may share one file, in several threads."""

    def __init__(self, file: BinaryIO, start: int, size: int, owns: bool = False):
        self._to_close = file if owns else None
        self._outer = file  # a file that nobody refers to is closed
        self._file: BinaryIO
        self._start: int
        self._size: int
        around = file
        while not isinstance(around, Window) and hasattr(around, "raw"):
            around = around.raw
        if isinstance(around, Window):  # an archive in an archive: read from the outermost file
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


# Zip.


def zip_member(file: BinaryIO, info: zipfile.ZipInfo) -> io.BufferedReader:
    """A member of a zip archive from its beginning to its end; a stored one in any order.

    Args:
        file: the archive.
        info: the member, from the archive's directory.

    Raises:
        ArchiveError: `unreadable` where the archive is damaged, its sum is not the stated one, or its method is not
            known; `oversized` where it asks for too much memory, or, while it is read, takes too long.
    """
    header = io.BufferedReader(Window(file, info.header_offset, 30)).read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ArchiveError("unreadable", "the archive is damaged: there is no header where the member begins")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    packed = Window(file, start, info.compress_size)
    if info.compress_type == zipfile.ZIP_STORED:
        if info.compress_size != info.file_size:
            raise ArchiveError("unreadable", "the archive is damaged: a stored member has two sizes")
        return io.BufferedReader(_StoredMember(packed, info))
    return io.BufferedReader(_PackedMember(packed, info))


class _StoredMember(io.RawIOBase):
    """A member that lies in the archive as it is; its sum is compared where it is read from beginning to end."""

    def __init__(self, packed: Window, info: zipfile.ZipInfo):
        self.window = packed
        self._info = info
        self._sum, self._summed = 0, 0

    @property
    def raw(self) -> Window:
        """For an archive in this one: read from the outermost file."""
        return self.window

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.window.seek(offset, whence)

    def tell(self) -> int:
        return self.window.tell()

    def readinto(self, buffer) -> int:
        place = self.window.tell()
        count = self.window.readinto(buffer)
        if place == self._summed and count:
            self._sum, self._summed = zlib.crc32(memoryview(buffer)[:count], self._sum), place + count
            if self._summed == self._info.file_size and self._sum != self._info.CRC:
                raise ArchiveError("unreadable", "the archive is damaged: the member's checksum is another")
        return count


class _PackedMember(io.RawIOBase):
    """A compressed member, unpacked as it is read."""

    def __init__(self, packed: Window, info: zipfile.ZipInfo):
        self._packed = packed
        self._info = info
        self._left = info.file_size
        self._sum = 0
        self._rest = b""  # of deflated data, what its decoder has not taken yet
        self._deadline = time.monotonic() + MEMBER_SECONDS + info.file_size / _BYTES_A_SECOND
        try:
            self._decoder: Any = self._new_decoder()
        except (MemoryError, lzma.LZMAError, struct.error, ValueError) as error:
            if isinstance(error, ArchiveError):
                raise
            raise ArchiveError("unreadable", f"the archive is damaged: {error or type(error).__name__}") from error

    def _new_decoder(self) -> Any:
        method = self._info.compress_type
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS)
        if method == zipfile.ZIP_BZIP2:
            return bz2.BZ2Decompressor()
        if method != zipfile.ZIP_LZMA:
            raise ArchiveError("unreadable", f"is compressed with a method that is not read ({method})")
        _, length = struct.unpack("<HH", self._packed.read(4) or b"")
        properties = self._packed.read(length) or b""
        if length != 5 or len(properties) != 5 or properties[0] >= 9 * 5 * 5:
            raise ArchiveError("unreadable", "the archive is damaged: its LZMA header is none")
        size = struct.unpack("<I", properties[1:])[0]
        if size > MAX_DICTIONARY_BYTES:
            raise ArchiveError(
                "oversized", f"asks for a dictionary of {size:,} bytes, more than {MAX_DICTIONARY_BYTES:,}"
            )
        rest, literal = divmod(properties[0], 9)
        position, low = divmod(rest, 5)
        filters = [{"id": lzma.FILTER_LZMA1, "dict_size": size, "lc": literal, "lp": low, "pb": position}]
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._unpacked(min(len(buffer), _BLOCK_BYTES, self._left)) if self._left else b""
        buffer[: len(data)] = data
        return len(data)

    def _unpacked(self, limit: int) -> bytes:
        """The next bytes, at most `limit`; fewer than none only at the end."""
        data = b""
        while not data:
            if time.monotonic() > self._deadline:
                raise ArchiveError("oversized", "takes too long to unpack")
            try:
                data, is_over = self._step(limit)
            except (OSError, EOFError, ValueError, MemoryError, lzma.LZMAError, zlib.error) as error:
                reason = str(error) or type(error).__name__
                raise ArchiveError("unreadable", f"the archive is damaged: {reason}") from error
            if is_over and not data:
                raise ArchiveError("unreadable", "the archive is damaged: the member ends too early")
        self._left -= len(data)
        self._sum = zlib.crc32(data, self._sum)
        if not self._left and self._sum != self._info.CRC:
            raise ArchiveError("unreadable", "the archive is damaged: the member's checksum is another")
        return data

    def _step(self, limit: int) -> tuple[bytes, bool]:
        if hasattr(self._decoder, "needs_input"):
            packed = self._packed.read(_BLOCK_BYTES) or b"" if self._decoder.needs_input else b""
            is_over = self._decoder.eof or (self._decoder.needs_input and not packed)
            return (b"", True) if is_over else (self._decoder.decompress(packed, limit), False)
        packed = self._rest or self._packed.read(_BLOCK_BYTES) or b""
        data = self._decoder.decompress(packed, limit)
        self._rest = self._decoder.unconsumed_tail
        return data, self._decoder.eof or not packed


# Tar.


@dataclass(frozen=True)
class TarMember:
    """A file of a tar archive: `kind` is "file", "folder", "link" or "other"; `offset` is where its bytes begin."""

    name: str
    kind: str
    size: int
    offset: int
    mtime: int


def tar_members(file: BinaryIO, size: int) -> Iterator[TarMember]:
    """The members of an uncompressed tar archive (ustar, GNU or pax) of `size` bytes.

    Every header moves on by what it says of itself, which is looked at first: the time is that of one pass.

    Raises:
        ArchiveError: `broken_archive` where it is none, is cut off, or a header does not say what it must.
    """
    place = 0
    attributes: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while place < size:
        header = _read_at(file, _TAR_BLOCK, place)
        if len(header) < _TAR_BLOCK:
            raise _broken_tar(place, "the archive ends too early; is the download complete?")
        if not any(header):  # the end
            if place == 0:
                raise _broken_tar(place, "there is no header")
            return
        _check_sum(header, place)
        kind, length = header[156:157], _tar_number(header[124:136], place)
        place += _TAR_BLOCK
        is_attribute = kind in b"LKxgX" and bool(kind)
        if "size" in attributes and not is_attribute:
            length = _decimal(attributes["size"], place)
        has_data = kind in (b"0", b"\0", b"7", b"S", b"L", b"K", b"x", b"g", b"X") or kind not in b"123456D"
        length = length if has_data else 0
        if length > size - place:
            raise _broken_tar(place, f"a member of {length:,} bytes does not fit; is the download complete?")
        if is_attribute:
            if length > _MAX_ATTRIBUTE_BYTES:
                raise _broken_tar(place, f"attributes of {length:,} bytes")
            data = _read_at(file, length, place)
            if kind == b"L":
                attributes["path"] = _tar_text(data)
            elif kind == b"g":
                everywhere |= _pax(data, place)
            elif kind != b"K":
                attributes |= _pax(data, place)
        else:
            named = everywhere | attributes
            name = named.get("GNU.sparse.name") or named.get("path") or _tar_name(header)
            sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in named)
            is_file = kind in (b"0", b"\0", b"7") and not sparse
            what = "folder" if kind == b"5" or (is_file and name.endswith("/")) else "file" if is_file else "other"
            what = "link" if kind in (b"1", b"2") else what
            yield TarMember(name, what, length, place, _modified(named.get("mtime"), header, place))
            attributes = {}
        place += -(-length // _TAR_BLOCK) * _TAR_BLOCK


def _broken_tar(place: int, reason: str) -> ArchiveError:
    return ArchiveError("broken_archive", f"not a readable uncompressed tar archive (at byte {place:,}: {reason})")


def _check_sum(header: bytes, place: int) -> None:
    """The header's sum is of its bytes, those of the sum itself taken for spaces; old programs took them as signed."""
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if _tar_number(header[148:156], place) not in (unsigned, signed):
        raise _broken_tar(place, "the header's sum is another")


def _tar_number(field: bytes, place: int) -> int:
    if field[0] & 0x80:  # too large for octal digits; the first bit of the rest is the sign
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            raise _broken_tar(place, "a negative number")
        return value
    text = field.partition(b"\0")[0].strip()
    if not text:
        return 0
    if not all(digit in b"01234567" for digit in text):
        raise _broken_tar(place, f"{text[:20]!r} is not an octal number")
    return int(text, 8)


def _decimal(text: str, place: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise _broken_tar(place, f"{text[:20]!r} is not a size")
    return int(text)


def _modified(stated: str | None, header: bytes, place: int) -> int:
    """The time of the last change. It only tells versions of a file apart, so an odd one does no harm."""
    try:
        return int(float(stated)) if stated is not None else _tar_number(header[136:148], place)
    except (ValueError, OverflowError):
        return 0


def _tar_text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _tar_name(header: bytes) -> str:
    name = _tar_text(header[:100])
    # The prefix of ustar; GNU has other things in its place.
    prefix = _tar_text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(data: bytes, place: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at] != 0:
        length, space, _ = data[at : at + 20].partition(b" ")
        end = at + int(length) if space and length.isdigit() and len(length) < 10 else at
        record = data[at + len(length) + 1 : end]
        key, equals, value = record.partition(b"=")
        if end <= at or end > len(data) or not equals or not record.endswith(b"\n"):
            raise _broken_tar(place, "a pax header that is none")
        found[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        at = end
    return found

"""Members of zip and tar archives: sound ones as the standard library reads them, others an error of ours, at once."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mel_archives import noise, tar_bytes, zip_bytes

from mimic_el.datasets_scripts import members
from mimic_el.datasets_scripts.archives import ArchiveError, TarTree, ZipTree, open_nested, open_tree
from mimic_el.datasets_scripts.members import tar_members, zip_member

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


# Tar.


def tar_of_everything(format: int) -> bytes:
    """Long and odd names, links, folders, empty files, large owners, fractions of a second."""
    buffer = io.BytesIO()
    names = ["a", "n" * 100, "d/" * 60 + "n", "été/東京", "x" * 90 + "/" + "y" * 90, "empty"]
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8") as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 0 if name == "empty" else 700 * number + 1
            info.mtime = 1_700_000_000 + (0.5 if format == tarfile.PAX_FORMAT else 0)
            if format != tarfile.USTAR_FORMAT:
                info.uid = 2**30
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "symbolic"), (tarfile.LNKTYPE, "hard"),
                           (tarfile.FIFOTYPE, "pipe"), (tarfile.CHRTYPE, "device")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a"
            archive.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_those_of_the_standard_library(format: int) -> None:
    data = tar_of_everything(format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected: list[tuple[Any, ...]] = [
            (
                member.name,
                "file" if member.isreg() else "folder" if member.isdir() else "link" if member.linkname else "other",
                member.size,
                member.offset_data,
                int(member.mtime),
            )
            for member in archive
        ]
    # A pipe and a device have a name to link to here, and are no links.
    expected = [("other" if name in ("pipe", "device") else kind, name, *rest) for name, kind, *rest in expected]
    found = [(m.kind, m.name.rstrip("/"), m.size, m.offset, m.mtime) for m in tar_members(io.BytesIO(data), len(data))]
    assert found == expected
    assert len(found) == 11


def tar_header(name: bytes = b"a.jpg", size: bytes = b"00000000010", kind: bytes = b"0") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124 : 124 + len(size)] = size
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = kind
    header[257:265] = b"ustar\00000"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(**records: str) -> bytes:
    """A pax header with records, then a file of eight bytes."""
    body = b""
    for key, value in records.items():
        record = f" {key}={value}\n".encode()
        length = len(record) + len(str(len(record) + 3))
        body += f"{length}".encode() + record
    padded = body.ljust(-(-len(body) // 512) * 512, b"\0")
    return tar_header(b"p", b"%011o" % len(body), b"x") + padded + tar_header() + bytes(512)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_header(size=(256**12 - 512).to_bytes(12, "big")), "a negative number"),
        (tar_header(size=b"\x80" + (2**62).to_bytes(11, "big")), "does not fit; is the download complete"),
        (tar_header(size=b"77777777777"), "does not fit"),
        (tar_header(size=b"-0000000512"), "is not an octal number"),
        (tar_header(size=b"0000000xyz1"), "is not an octal number"),
        (tar_header(b"L", b"77777777777", b"L"), "does not fit"),
        (tar_header()[:300], "ends too early; is the download complete"),
        (tar_header().replace(b"a.jpg", b"b.jpg"), "the header's sum is another"),
        (pax(size="99999999999999999999"), "is not a size"),
        (pax(size="-512"), "is not a size"),
        (pax(size=str(2**60)), "does not fit"),
        (tar_header(b"p", b"00000000003", b"x") + b"9 x".ljust(512, b"\0") + tar_header(), "a pax header that is none"),
        (b"", None),
        (b"\x1f\x8b" + bytes(600), "is compressed with gzip; unpack it first"),
        (b"BZh9" + bytes(600), "is compressed with bzip2; unpack it first"),
    ],
)
def test_a_tar_that_lies_is_refused_at_once(tmp_path: Path, data: bytes, message: str | None) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar_bytes({"first": b"1"})[:1024] + data if message and "unpack" not in message else data
    )
    if message is None:
        assert TarTree(tmp_path / "a.tar").files == {}
        return
    with pytest.raises(ArchiveError, match=message) as caught:
        open_tree(tmp_path / "a.tar")
    assert caught.value.kind == "broken_archive"


@pytest.mark.parametrize("mtime", ["inf", "nan", "1e400", "x", "-5", ""])
def test_an_odd_time_does_no_harm(tmp_path: Path, mtime: str) -> None:
    (tmp_path / "a.tar").write_bytes(pax(mtime=mtime))
    assert TarTree(tmp_path / "a.tar").files == {"a.jpg": 8}


@pytest.mark.parametrize("record", [{"GNU.sparse.size": "abc"}, {"GNU.sparse.map": "x,y"}, {"GNU.sparse.major": "1"}])
def test_sparse_files_are_refused(tmp_path: Path, record: dict[str, str]) -> None:
    (tmp_path / "a.tar").write_bytes(pax(**record))
    assert TarTree(tmp_path / "a.tar").refused == {"a.jpg": ("not_a_file", "is not a regular file")}


def test_thousands_of_headers_before_a_file_are_one_pass(tmp_path: Path) -> None:
    long_name = tar_header(b"././@LongLink", b"00000000001", b"L") + b"x".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(long_name * 5000 + tar_header() + bytes(512))
    assert TarTree(tmp_path / "a.tar").files == {"x": 8}


def test_changed_bytes_of_a_tar_give_members_or_our_error(tmp_path: Path) -> None:
    sound = tar_of_everything(tarfile.PAX_FORMAT)
    draw = random.Random(0)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(draw.randint(1, 4)):
            # Mostly in the headers.
            place = draw.randrange(0, len(data), 512) + draw.choice([*range(120, 160), *range(512)])
            data[place % len(data)] = draw.choice([0, 32, 45, 48, 55, 128, 255, draw.randrange(256)])
        try:
            found = list(tar_members(io.BytesIO(data), len(data)))
        except ArchiveError:
            continue
        assert all(0 <= member.offset <= member.offset + member.size <= len(data) for member in found)


# Zip.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", [b"", b"a", noise(0), bytes(300_000), b"ab" * 50_000])
def test_members_of_every_method(tmp_path: Path, method: int, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(zip_bytes({"before": b"1", "a": data, "after": noise(1)}, method))
    tree = open_tree(tmp_path / "a.zip")
    if "a" in tree.files:  # 300,000 zeros unpack to more than is believed
        assert tree.read("a", 10**6) == data
        with tree.open("a") as file:
            assert file.read(3) + file.read() == data
    assert tree.read("after", 10**6) == noise(1)


def lzma_zip(place: int, change: bytes) -> bytes:
    """A zip whose LZMA member `a` is changed, from `place` of its content on."""
    data = bytearray(zip_bytes({"a": noise(0)}, zipfile.ZIP_LZMA))
    data[31 + place : 31 + place + len(change)] = change
    return bytes(data)


@pytest.mark.parametrize(
    ("place", "change", "kind", "message"),
    [
        (5, struct.pack("<I", 0xFFFFFFFF), "oversized", "asks for a dictionary of 4,294,967,295 bytes"),
        (4, b"\xff", "unreadable", "LZMA header is none"),
        (2, b"\x09", "unreadable", "LZMA header is none"),
        (40, b"\xff" * 40, "unreadable", "the archive is damaged"),
        (9, b"\xff", "unreadable", "the archive is damaged"),
    ],
)
def test_damaged_lzma(tmp_path: Path, place: int, change: bytes, kind: str, message: str) -> None:
    (tmp_path / "a.zip").write_bytes(lzma_zip(place, change))
    tree = open_tree(tmp_path / "a.zip")
    with pytest.raises(ArchiveError, match=message) as caught:
        tree.read("a", 10**6)
    assert caught.value.kind == kind


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_is_found(tmp_path: Path, method: int) -> None:
    data = bytearray(zip_bytes({"a": noise(0)}, method))
    data[31 + 6000] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ArchiveError, match="the archive is damaged") as caught:
        open_tree(tmp_path / "a.zip").read("a", 10**6)
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("method", METHODS)
def test_changed_bytes_of_a_zip_give_the_content_or_our_error(tmp_path: Path, method: int) -> None:
    files = {"a": noise(0, (8, 8)), "b": b"text " * 40}
    sound = zip_bytes(files, method)
    draw = random.Random(method)
    for _ in range(100):
        data = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.choice([0, 1, 12, 14, 128, 255, draw.randrange(256)])
        (tmp_path / "a.zip").write_bytes(data)
        try:
            tree = open_tree(tmp_path / "a.zip")
            for name in tree.files:
                # A sum that fits is of the content, but for a name that was changed or two that were made one.
                assert tree.read(name, 10**6) in files.values()
        except ArchiveError:
            continue


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_what_a_decoder_gives_is_taken_in_blocks(method: int) -> None:
    """A member that says it has ten bytes, and has a hundred million."""
    packed = zip_bytes({"a": bytes(100_000_000)}, method)
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        info = archive.getinfo("a")
    info.file_size = 10
    tracemalloc.start()
    with pytest.raises(ArchiveError, match="checksum is another"):
        zip_member(io.BytesIO(packed), info).read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_member_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(zip_bytes({"a": noise(0)}))
    monkeypatch.setattr(members, "MEMBER_SECONDS", -1e6)
    with pytest.raises(ArchiveError, match="takes too long") as caught:
        open_tree(tmp_path / "a.zip").read("a", 10**6)
    assert caught.value.kind == "oversized"


def test_nested_archives_that_are_damaged(tmp_path: Path) -> None:
    inner = zip_bytes({"a": noise(0)})
    outer = bytearray(zip_bytes({"inner.zip": inner, "empty.zip": b""}, zipfile.ZIP_STORED))
    outer[1] ^= 1  # the header of the first member
    (tmp_path / "outer.zip").write_bytes(outer)
    tree = open_tree(tmp_path / "outer.zip")
    for name, message in (("inner.zip", "no header where the member begins"), ("empty.zip", "is empty")):
        with pytest.raises(ArchiveError, match=message) as caught:
            open_nested(tree, name)
        assert caught.value.kind == "broken_archive"


def test_a_download_that_was_cut_off_is_said_to_be_one(tmp_path: Path) -> None:
    for name, data in (("a.zip", zip_bytes({"a": noise(0)})), ("a.tar", tar_bytes({"a": noise(0)}))):
        (tmp_path / name).write_bytes(data[:5000])
        with pytest.raises(ArchiveError, match="is the download complete") as caught:
            open_tree(tmp_path / name)
        assert "unpack" not in str(caught.value)


def test_all_of_a_zip_is_closed(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_bytes({"a": b"1"}))
    tree = open_tree(tmp_path / "a.zip")
    assert isinstance(tree, ZipTree)
    tree.close()
    with pytest.raises((ValueError, OSError)):
        tree.open("a").read()

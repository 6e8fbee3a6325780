"""Archives, JSON and images: what is read, and what is refused."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import datasets
import pytest
from mel_archives import an_image, noise, png_claiming, tar_bytes, write_folder, zip_bytes
from PIL import Image

from mimic_el.datasets_scripts import archives
from mimic_el.datasets_scripts.archives import (
    ArchiveError,
    Tree,
    load_json,
    open_nested,
    open_tree,
    unsafe_path,
)
from mimic_el.datasets_scripts.image_files import ImageFolder, inspect_image, shrink_image, without_metadata
from mimic_el.images_mimic import IMAGE_FORMATS


def tree_of(tmp_path: Path, kind: str, files: dict[str, bytes]) -> Tree:
    if kind == "folder":
        return open_tree(write_folder(files, tmp_path / "tree"))
    (tmp_path / f"tree.{kind}").write_bytes(zip_bytes(files) if kind == "zip" else tar_bytes(files))
    return open_tree(tmp_path / f"tree.{kind}")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_tree_lists_and_reads_files(tmp_path: Path, kind: str) -> None:
    files = {"a.json": b"[]", "images/b.jpg": an_image(), "images/deep/c": b"", "__MACOSX/._a.json": b"junk"}
    tree = tree_of(tmp_path, kind, files)
    expected = {name: data for name, data in files.items() if not name.startswith("__MACOSX")}
    assert tree.files == {name: len(data) for name, data in expected.items()}
    assert {name: tree.read(name, 10**6) for name in tree.files} == expected
    with pytest.raises(ArchiveError, match="more than the limit") as caught:
        tree.read("images/b.jpg", 10)
    assert caught.value.kind == "oversized"
    tree.close()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_in_archive_is_read_in_place(tmp_path: Path, compression: int) -> None:
    innermost = zip_bytes({"x.bin": noise(0), "y.bin": noise(1)})
    middle = zip_bytes({"innermost.zip": innermost}, compression)
    (tmp_path / "outer.tar").write_bytes(tar_bytes({"before": b"1" * 999, "middle.zip": middle}))
    tree = open_nested(open_nested(open_tree(tmp_path / "outer.tar"), "middle.zip"), "innermost.zip")
    assert tree.read("x.bin", 10**6) == noise(0)
    wrong: list[str] = []

    def read_many(name: str, expected: bytes) -> None:
        wrong.extend(name for _ in range(50) if tree.read(name, 10**6) != expected)

    threads = [threading.Thread(target=read_many, args=(f"{'xy'[i % 2]}.bin", noise(i % 2))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_doubly_compressed_archive_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_NESTED_BYTES", 100)
    (tmp_path / "outer.zip").write_bytes(zip_bytes({"inner.zip": zip_bytes({"a": noise(0)})}))
    with pytest.raises(ArchiveError, match=r"inner\.zip is compressed twice; unpack .*outer\.zip first"):
        open_nested(open_tree(tmp_path / "outer.zip"), "inner.zip")


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/etc/passwd", "..", "a/..", "..\\a", "C:\\a", "c:/a", "\\\\host\\a", "a\0b"]
)
def test_unsafe_paths(name: str) -> None:
    assert unsafe_path(name)


@pytest.mark.parametrize("name", ["a", "a/b.jpg", "..a/b..", "a...b", "C:a", "[wiki] é.jpg", "./a"])
def test_safe_paths(name: str) -> None:
    assert unsafe_path(name) is None


def test_folder_refuses_what_leaves_it_or_is_no_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_folder({"secret.jpg": an_image()}, outside)
    folder = write_folder({"real.jpg": an_image()}, tmp_path / "folder")
    (folder / "out.jpg").symlink_to(outside / "secret.jpg")
    (folder / "out").symlink_to(outside)
    (folder / "in.jpg").symlink_to("real.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "dir.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    tree = open_tree(folder)
    assert set(tree.files) == {"real.jpg", "in.jpg"}
    kinds = {name: kind for name, (kind, _) in tree.refused.items()}
    assert kinds == {
        "out.jpg": "unsafe",
        "out": "unsafe",
        "loop.jpg": "unreadable",
        "dir.jpg": "not_a_file",
        "pipe.jpg": "not_a_file",
    }
    # No reason tells where on this machine a link leads.
    assert not any(str(tmp_path) in reason for _, reason in tree.refused.values())


def hostile_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.jpg", an_image())
        archive.writestr("../up.jpg", an_image())
        archive.writestr("/root.jpg", an_image())
        archive.writestr("bomb.jpg", bytes(5 << 20))
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def test_zip_refuses_hostile_members(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(hostile_zip())
    tree = open_tree(tmp_path / "a.zip")
    assert set(tree.files) == {"good.jpg"}
    assert {name: kind for name, (kind, _) in tree.refused.items()} == {
        "../up.jpg": "unsafe",
        "/root.jpg": "unsafe",
        "bomb.jpg": "oversized",
        "link.jpg": "unsafe",
    }


def test_zip_that_lies_about_a_size_does_not_deliver_more(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.jpg": bytes(range(256)) * 64}))
    # The size that a member claims stands in its local header and in the directory.
    real, claimed = (16384).to_bytes(4, "little"), (100).to_bytes(4, "little")
    assert data.count(real) == 2
    (tmp_path / "a.zip").write_bytes(data.replace(real, claimed))
    tree = open_tree(tmp_path / "a.zip")
    with pytest.raises(ArchiveError) as caught:
        tree.read("a.jpg", 10**6)
    assert caught.value.kind == "unreadable"


def test_encrypted_member_is_refused(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.jpg": an_image()}))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + place] |= 1  # the flag that says so
    (tmp_path / "a.zip").write_bytes(data)
    tree = open_tree(tmp_path / "a.zip")
    assert tree.files == {}
    assert tree.refused == {"a.jpg": ("unreadable", "is encrypted")}


def test_file_that_grew_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    tree = open_tree(write_folder({"a": b"12"}, tmp_path))
    (tmp_path / "a").write_bytes(b"1" * 1000)
    with pytest.raises(ArchiveError, match="more than 10 bytes") as caught:
        tree.read("a", 10)
    assert caught.value.kind == "oversized"


def test_tar_refuses_hostile_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("../up", tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        device = tarfile.TarInfo("device")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    tree = open_tree(tmp_path / "a.tar")
    assert tree.files == {}
    assert {name: kind for name, (kind, _) in tree.refused.items()} == {
        "../up": "unsafe",
        "link": "unsafe",
        "hard": "unsafe",
        "device": "not_a_file",
    }


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.zip", b"not a zip", "broken_archive"),
        ("a.zip", zip_bytes({"a": b"1" * 99})[:-30], "broken_archive"),
        ("a.tar", b"not a tar" * 100, "broken_archive"),
        ("a.rar", b"", "broken_archive"),
        ("a.tar.gz", b"", "broken_archive"),
    ],
    ids=["no_zip", "cut_zip", "no_tar", "rar", "empty_tar_gz"],
)
def test_broken_archives(tmp_path: Path, name: str, data: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArchiveError) as caught:
        open_tree(tmp_path / name)
    assert caught.value.kind == kind


def test_missing_place(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="does not exist") as caught:
        open_tree(tmp_path / "nowhere")
    assert caught.value.kind == "missing_file"


def test_damaged_zip_member_is_unreadable(tmp_path: Path) -> None:
    data = bytearray(zip_bytes({"a.bin": noise(0)}))
    data[200] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ArchiveError) as caught:
        open_tree(tmp_path / "a.zip").read("a.bin", 10**6)
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_any_unicode_encoding(tmp_path: Path, encoding: str) -> None:
    value = {"é": ["中文", 1]}
    tree = open_tree(write_folder({"a.json": json.dumps(value, ensure_ascii=False).encode(encoding)}, tmp_path))
    assert load_json(tree, "a.json").value == value


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b'[1,\n 2,\n {"a" 3}]', "broken_json", "line 3, column 7"),
        (b"", "broken_json", "line 1, column 1"),
        ('["ok",\n"中文"]'.encode("gbk"), "wrong_encoding", "line 2, byte 8: not UTF-8"),
        (b"[" * 200_000, "broken_json", "RecursionError"),
        (b"[" + b"9" * 5000 + b"]", "broken_json", "ValueError"),
    ],
    ids=["no_colon", "empty", "gbk", "nested_without_end", "long_number"],
)
def test_broken_json_says_where(tmp_path: Path, data: bytes, kind: str, message: str) -> None:
    tree = open_tree(write_folder({"a.json": data}, tmp_path))
    with pytest.raises(ArchiveError, match=message) as caught:
        load_json(tree, "a.json")
    assert caught.value.kind == kind


def test_json_names_keys_given_twice(tmp_path: Path) -> None:
    tree = open_tree(write_folder({"a.json": b'{"a": 1, "b": {"c": 1, "c": 2, "c": 3}, "a": 4}'}, tmp_path))
    loaded = load_json(tree, "a.json")
    assert loaded.value == {"a": 4, "b": {"c": 3}}
    assert sorted(loaded.duplicate_keys) == ["a", "c", "c"]


@pytest.fixture
def images(tmp_path: Path) -> ImageFolder:
    names = ["a.jpg", "b.JPG", "c.webp", "d.v1.jpg", "e.jpg", "sub/f.jpg", "one/g.jpg", "two/g.jpg"]
    names += ["Q2/2.jpg", "St.png", "1.jpg", "deep/Q3/3.jpg"]
    files = {f"images/{name}": an_image(number) for number, name in enumerate(names)}
    return ImageFolder("images/", [(open_tree(write_folder({**files, "other/z.jpg": b""}, tmp_path)), "images/")])


@pytest.mark.parametrize(
    ("reference", "name", "step"),
    [
        ("a.jpg", "a.jpg", "exact"),
        ("a.png", "a.jpg", "jpg"),
        ("a", "a.jpg", "jpg"),
        ("d.v1.png", "d.v1.jpg", "jpg"),
        ("A.JPG", "a.jpg", "case"),
        ("b.png", "b.JPG", "case"),
        ("c.png", "c.webp", "extension"),
        ("f.jpg", "sub/f.jpg", "exact"),
        ("two/g.jpg", "two/g.jpg", "exact"),
        ("Q2/2.png", "Q2/2.jpg", "jpg"),
        ("q2\\2.JPG", "Q2/2.jpg", "case"),
        ("Q3/3.jpg", "deep/Q3/3.jpg", "exact"),
    ],
)
def test_image_lookup(images: ImageFolder, reference: str, name: str, step: str) -> None:
    found, how = images.find(reference)
    assert (found.name, how) == (name, step)
    assert inspect_image(found.read()) is None


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("nothing.jpg", "missing_image", "'nothing.jpg' is not in images/"),
        ("", "missing_image", "is not in"),
        ("z.jpg", "missing_image", "is not in"),
        ("g.jpg", "missing_image", "could be 'one/g.jpg' or 'two/g.jpg'"),
        ("../a.jpg", "unsafe_image_path", "contains '..'"),
        ("/a.jpg", "unsafe_image_path", "absolute"),
        ("sub", "image_not_a_file", "is a directory"),
        # Another's image is not this one's, whatever a part of the path says.
        ("Q1/2.jpg", "missing_image", "'Q1/2.jpg' is not in images/"),
        ("Q1/2.png", "missing_image", "is not in images/"),
        ("3/3.jpg", "missing_image", "is not in images/"),
        ("old/place/a.jpg", "missing_image", "is not in images/"),
        ("St. Mary.jpg", "missing_image", "is not in images/"),
        ("1.c.png", "missing_image", "is not in images/"),
    ],
)
def test_image_lookup_refuses(images: ImageFolder, reference: str, kind: str, message: str) -> None:
    with pytest.raises(ArchiveError, match=message) as caught:
        images.find(reference)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("reference", "name", "step"),
    [
        ("old/place/a.jpg", "a.jpg", "exact"),
        ("old\\place\\a.jpg", "a.jpg", "exact"),
        ("e.v2.png", "e.jpg", "jpg"),
        ("old/two/g.jpg", None, "could be"),
        ("two/g.png", "two/g.jpg", "jpg"),
    ],
)
def test_lookup_of_an_image_that_was_moved(images: ImageFolder, reference: str, name: str | None, step: str) -> None:
    """The paths of the MIMIC archives' mentions name folders that are gone."""
    if name is None:
        with pytest.raises(ArchiveError, match=step):
            images.find(reference, moved=True)
        return
    found, how = images.find(reference, moved=True)
    assert (found.name, how) == (name, step)


def test_image_of_a_refused_member_is_not_merely_missing(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(hostile_zip())
    folder = ImageFolder("a.zip", [(open_tree(tmp_path / "a.zip"), "")])
    kinds = {}
    for name in ("up.jpg", "root.jpg", "link.jpg", "bomb.jpg"):
        with pytest.raises(ArchiveError) as caught:
            folder.find(name)
        kinds[name] = caught.value.kind
    assert kinds == dict.fromkeys(("up.jpg", "root.jpg", "link.jpg"), "unsafe_image_path") | {
        "bomb.jpg": "oversized_image"
    }


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_sound_images(format: str) -> None:
    assert inspect_image(an_image(size=(32, 32), format=format)) is None


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (noise(0)[:-5000], "unreadable_image", "truncated"),
        (b"", "unreadable_image", "no image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable_image", "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable_image", "no image that can be read"),
        (png_claiming(9_500, 9_500), "oversized_image", "9500 x 9500 pixels, more than the 90,000,000"),
        (png_claiming(60_000, 60_000), "oversized_image", "decompression bomb"),
        (png_claiming(10, 10), "unreadable_image", ""),
    ],
    ids=["cut", "empty", "svg", "postscript", "above_limit", "bomb", "no_pixels"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unsound_images(data: bytes, kind: str, message: str) -> None:
    problem = inspect_image(data)
    assert problem is not None
    assert problem[0] == kind
    assert message in problem[1]


def test_shrink_keeps_small_images_and_limits_large_ones() -> None:
    assert shrink_image(an_image(size=(64, 32)), 64) == an_image(size=(64, 32))
    with Image.open(io.BytesIO(shrink_image(an_image(size=(640, 320)), 64))) as small:
        assert (small.size, small.format, small.mode) == ((64, 32), "JPEG", "RGB")


def test_shrink_keeps_transparency_and_orientation() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (100, 50), (10, 20, 30, 0)).save(buffer, "PNG")
    with Image.open(io.BytesIO(shrink_image(buffer.getvalue(), 10))) as small:
        assert (small.size, small.format, small.getchannel("A").getextrema()) == ((10, 5), "PNG", (0, 0))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (100, 50)).save(turned, "JPEG", exif=exif)
    with Image.open(io.BytesIO(shrink_image(turned.getvalue(), 10))) as small:
        assert small.size == (5, 10)


def test_shrink_leaves_deep_images() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (100, 50), 40_000).save(buffer, "PNG")
    assert shrink_image(buffer.getvalue(), 10) == buffer.getvalue()


def png_with(kind: bytes, content: bytes) -> bytes:
    """A sound image of noise, with another chunk in its PNG."""
    data = noise(0, (8, 8))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize(
    "data",
    [png_with(b"eXIf", b"XX*\0zzzz"), png_with(b"tEXt", b"Raw profile type exif\0\nexif\n  10\nzzzz")],
    ids=["exif", "raw profile"],
)
def test_broken_metadata_of_a_sound_image(data: bytes) -> None:
    """`datasets` raises where it decodes such a row; the pixels are not lost."""
    decode = datasets.Image().decode_example
    with pytest.raises((SyntaxError, ValueError)):
        decode({"bytes": data, "path": None})
    found = inspect_image(data)
    assert found is not None
    assert found[0] == "broken_metadata"
    pixels = Image.open(io.BytesIO(noise(0, (8, 8)))).tobytes()
    assert decode({"bytes": without_metadata(data), "path": None}).tobytes() == pixels
    assert inspect_image(without_metadata(data)) is None


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_every_format_that_the_pipeline_reads_is_taken(format: str) -> None:
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {format}")
    assert inspect_image(an_image(size=(16, 16), format=format)) is None


def test_folders_without_end_are_refused_by_name(tmp_path: Path) -> None:
    place = tmp_path
    for _ in range(archives.MAX_DEPTH + 3):
        place = place / "d"
    place.mkdir(parents=True)
    (place / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    tree = open_tree(tmp_path)
    assert tree.files == {"b": 1}
    assert [reason for kind, reason in tree.refused.values() if kind == "oversized"] == [
        "lies below more than 64 folders"
    ]

"""Small archives in the layouts that authors publish, as `{path: bytes}`, and ways to put them on disk."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Files = dict[str, bytes]


def an_image(color: int = 0, size: tuple[int, int] = (8, 6), format: str = "JPEG") -> bytes:
    """An image of one colour, another one for each `color`."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (color * 40 % 256, 100, 200)).save(buffer, format)
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of random pixels, which does not compress: 12 kB at 64 x 64."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3)).save(buffer, "PNG")
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def to_json(value: Any, encoding: str = "utf-8") -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(encoding)


def entity(id_: int, name: str, images: list[str], **more: Any) -> dict[str, Any]:
    fields = {"id": id_, "type": "entity", "qid": f"Q{id_}", "entity_name": name, "attr": f"About {name}."}
    return {**fields, "image_list": images, **more}


def mention(text: str, sentence: str, answer: str, image: str = "", **more: Any) -> dict[str, Any]:
    return {"mentions": text, "sentence": sentence, "answer": answer, "imgPath": image, **more}


def sound_archive(prefix: str = "WIKIMEL_", mention_folder: str = "mention_image") -> Files:
    """An archive of the MIMIC authors with nothing wrong: four entities, five mentions, six images."""
    return {
        "kb_entity.json": to_json(
            [
                entity(0, "Anna%20Alpha", ["Q0_0.jpg", "Q0_1.jpg"]),
                entity(1, "Ben Beta", ["Q1_0.jpg"]),
                entity(2, "Caf%C3%A9 Gamma", []),
                entity(3, "Dora", ["Q3_0.jpg"]),
            ]
        ),
        "qid2id.json": to_json({"Q0": 0, "Q1": 1, "Q2": 2, "Q3": 3, "nil": -1}),
        f"{prefix}train.json": to_json(
            [
                mention("Anna", "Anna at work", "Q0", "m0.jpg"),
                mention("Ben%20Beta", "Here is Ben Beta.", "Q1", "old/folder/m1.png"),
                mention("Gamma", "A Gamma.", "Q2"),
            ]
        ),
        f"{prefix}dev.json": to_json([mention("Dora", "Dora", "Q3")]),
        f"{prefix}test.json": to_json([mention("Anna", "Anna again", "Q0", "m0.jpg")]),
        "kb_image/Q0_0.jpg": an_image(1),
        "kb_image/Q0_1.jpg": an_image(2),
        "kb_image/Q1_0.jpg": an_image(3),
        "kb_image/Q3_0.jpg": an_image(4),
        f"{mention_folder}/m0.jpg": an_image(5),
        f"{mention_folder}/m1.jpg": an_image(6),
    }


def write_folder(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def zip_bytes(files: Files, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            # ZipInfo's own date, not the clock's: the same files give the same bytes.
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
    return buffer.getvalue()


def tar_bytes(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_folders(files: Files) -> Files:
    """The same files, with each folder in a zip archive of its name."""
    result = {name: data for name, data in files.items() if "/" not in name}
    for folder in {name.partition("/")[0] for name in files if "/" in name}:
        result[f"{folder}.zip"] = zip_bytes({n: data for n, data in files.items() if n.startswith(f"{folder}/")})
    return result


def _zip_of_folders(files: Files, folder: Path) -> Path:
    path = folder / "data.zip"
    path.write_bytes(zip_bytes({f"WikiMEL/{name}": data for name, data in files.items()}))
    return path


def _zip_of_zips(files: Files, folder: Path) -> Path:
    path = folder / "data.zip"
    path.write_bytes(zip_bytes(zip_folders(files)))
    return path


def _tar_of_zips(files: Files, folder: Path) -> Path:
    path = folder / "data.tar"
    path.write_bytes(tar_bytes({f"./WikiMEL/{name}": data for name, data in zip_folders(files).items()}))
    return path


def _folder_with_tar(files: Files, folder: Path) -> Path:
    (folder / "WikiMEL.tar").write_bytes(tar_bytes(zip_folders(files)))
    return folder


# Every way that one archive may lie on a user's disk.
PACKINGS: dict[str, Callable[[Files, Path], Path]] = {
    "folder": write_folder,
    "folder of zips": lambda files, folder: write_folder(zip_folders(files), folder),
    "folder in a folder": lambda files, folder: write_folder(files, folder / "data" / "WikiMEL") and folder,
    "zip of folders": _zip_of_folders,
    "zip of zips": _zip_of_zips,
    "tar of zips": _tar_of_zips,
    "folder with the tar": _folder_with_tar,
}

"""Images come from wherever a caller has them, and from nowhere that a table of somebody else may only name."""

from __future__ import annotations

import base64
import io
import os
import socket
import socketserver
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_image, tiny_processor
from tiny_clip import tiny_model

from mimic_el import EntityIndex, MentionEntityCollator, MultimodalEntityLinkingPipeline, downloads_mimic
from mimic_el.downloads_mimic import as_browsers_send, is_public
from mimic_el.errors_mimic import MimicImageError
from mimic_el.image_sources_mimic import ImagePlaces, PlacedImage
from mimic_el.images_mimic import load_image
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor
from mimic_el.training import KnowledgeBase

IMAGE = random_image(1)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


PNG = file_of(IMAGE)


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photo.png").write_bytes(PNG)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("some/photo.png", PNG)
    return tmp_path


# --- What a caller may have in hand -------------------------------------------------------------------------------

TEXT = base64.b64encode(PNG).decode()
IN_HAND: dict[str, Callable[[Path], Any]] = {
    "data URI": lambda folder: f"data:image/png;base64,{TEXT}",
    "data URI, escaped": lambda folder: "DATA:image/png;base64," + TEXT.replace("+", "%2B").replace("=", "%3D"),
    "data URI, not base64": lambda folder: "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    "base64": lambda folder: TEXT,
    "base64 in lines": lambda folder: base64.encodebytes(PNG).decode(),
    "base64 for URLs, not padded": lambda folder: base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "bytearray": lambda folder: bytearray(PNG),
    "memoryview": lambda folder: memoryview(PNG),
    "BytesIO": lambda folder: io.BytesIO(PNG),
    "BytesIO, read before": lambda folder: (lambda file: (file.read(), file)[1])(io.BytesIO(PNG)),
    "open file": lambda folder: open(folder / "photo.png", "rb"),  # noqa: SIM115
    "file URL": lambda folder: (folder / "photo.png").as_uri(),
    "file URL, escaped": lambda folder: (folder / "photo.png").rename(folder / "my photo.png").as_uri(),
    "in a zip": lambda folder: f"zip://some/photo.png::{folder}/photos.zip",
    "in a zip, as datasets has it": lambda folder: {
        "bytes": None,
        "path": f"zip://some/photo.png::{folder}/photos.zip",
    },
    "array": lambda folder: np.asarray(IMAGE),
    "array, channels first": lambda folder: np.asarray(IMAGE).transpose(2, 0, 1),
    "array of floats to 1": lambda folder: np.asarray(IMAGE).astype(np.float32) / 255,
    "array of floats to 255": lambda folder: np.asarray(IMAGE).astype(np.float64),
    "tensor": lambda folder: torch.from_numpy(np.asarray(IMAGE).copy()).permute(2, 0, 1),
    "tensor that requires a gradient": lambda folder: torch.tensor(np.asarray(IMAGE) / 255.0, requires_grad=True),
}


@pytest.mark.parametrize("kind", IN_HAND)
def test_every_place_gives_the_same_image(kind: str, folder: Path) -> None:
    loaded = load_image(IN_HAND[kind](folder))
    assert loaded is not None
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(IMAGE))


def test_arrays_of_other_kinds() -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    array: Any
    for array in (ramp.astype(np.uint8), ramp * 257, ramp.astype(np.uint8)[..., None], torch.tensor(ramp.astype(int))):
        assert (np.asarray(load_image(array)) == ramp[..., None]).all()
    assert np.unique(np.asarray(load_image(ramp > 99))).tolist() == [0, 255]
    clear = np.dstack([np.asarray(IMAGE), np.zeros((16, 16), np.uint8)])
    assert (np.asarray(load_image(clear)) == 255).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), "has the shape 5. An image has"),
        (np.zeros((2, 2, 7)), "has the shape 2x2x7"),
        (np.zeros((0, 4, 3)), "has the shape 0x4x3"),
        (np.full((4, 4, 3), -1.5), "values from -1.5 to -1.5. Pixels are from 0 to 255"),
        (np.full((4, 4), np.nan), "values from nan"),
        (np.full((4, 4), "a"), "has the type <U1"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, message: str) -> None:
    with pytest.raises(MimicImageError, match=message):
        load_image(array)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * 3_000_000, r"There is no image file x{200}\.\.\. \(3,000,000 characters\)"),
        ("data:image/png;base64," + "!" * 3_000_000, "data: URI whose data is not valid base64"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64," + "QUJD" * 300_000, "is not an image that can be read"),
        ("s3://bucket/photo.png", "is at a s3:// address, which is not read"),
        ("file://elsewhere/photo.png", "is a file of another machine, elsewhere"),
        ("zip://photo.png", "names no archive"),
        ("zip://photo.png::/no/such.zip", r"There is no image file /no/such\.zip"),
        ({"url": "http://localhost/photo.png"}, r"has `bytes` or `path`; this one has \['url'\]"),
        ({"bytes": b"", "path": None}, "There is no image that can be read in the given bytes"),
        (io.StringIO("text"), "is an open text file"),
        ("a\0b", "There is no image file"),
        ("\ud83d.png", "There is no image file"),
    ],
    ids=range(13),
)
def test_what_is_wrong_is_said_in_few_words(source: Any, message: str) -> None:
    with pytest.raises(MimicImageError, match=message) as caught:
        load_image(source)
    assert len(str(caught.value)) < 600


def test_a_damaged_archive_and_a_member_that_is_not_there(folder: Path) -> None:
    with pytest.raises(MimicImageError, match=r"There is no image other\.png in .*photos\.zip"):
        load_image(f"zip://other.png::{folder}/photos.zip")
    (folder / "cut.zip").write_bytes((folder / "photos.zip").read_bytes()[:-20])
    with pytest.raises(MimicImageError, match="cannot be read"):
        load_image(f"zip://some/photo.png::{folder}/cut.zip")
    with zipfile.ZipFile(folder / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("photo.png", PNG)
    with pytest.raises(MimicImageError, match="compressed by a method that is not read"):
        load_image(f"zip://photo.png::{folder}/lzma.zip")


@pytest.mark.parametrize("kind", ["named pipe", "device"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "photo.png"
    if kind == "named pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero")
    for source in (place, str(place), place.as_uri(), f"zip://a::{place}"):
        with pytest.raises(MimicImageError, match="named pipe or a device, which is not read"):
            load_image(source)


# --- Tables from elsewhere ----------------------------------------------------------------------------------------


def rows(*images: Any) -> list[dict[str, Any]]:
    return [{"id": f"e{row}", "name": "a", "description": "", "images": [image]} for row, image in enumerate(images)]


def seen(model: MimicModel, processor: MimicProcessor, entities: Any, **switches: Any) -> tuple[list[bool], list[str]]:
    """Which entities got an image, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = EntityIndex.build(model, processor, entities, dtype="float32", show_progress=False, **switches)
    blank = EntityIndex.build(model, processor, rows(None), dtype="float32", show_progress=False)
    mention = model.encode_mentions(**processor.process_mentions("a", "b", IMAGE))
    scores, nothing = (
        dict(zip(found.entity_ids[0], found.image_scores[0].tolist(), strict=True))
        for found in (built.search(mention, len(built)) for built in (index, blank))
    )
    got = [abs(scores[f"e{row}"] - nothing["e0"]) > 1e-4 for row in range(len(index))]
    return got, [str(warning.message) for warning in caught if "image" in str(warning.message)]


def test_a_list_of_the_callers_is_read_from_anywhere(
    model: MimicModel, processor: MimicProcessor, folder: Path
) -> None:
    got, warned = seen(model, processor, rows(str(folder / "photo.png"), PNG))
    assert (got, warned) == ([True, True], [])


@pytest.mark.parametrize("streamed", [False, True])
def test_a_data_set_is_not_read_from_paths_and_addresses(
    streamed: bool, model: MimicModel, processor: MimicProcessor, folder: Path
) -> None:
    paths = [str(folder / "photo.png"), f"zip://some/photo.png::{folder}/photos.zip", "http://127.0.0.1:9/photo.png"]
    table: Any = datasets.Dataset.from_list(rows(*paths, "hf://datasets/a/b/photo.png", f"data:;base64,{TEXT}"))
    if streamed:
        table = table.to_iterable_dataset()
    got, warned = seen(model, processor, table)
    assert got == [False, False, False, False, True]
    assert len(warned) == 4
    assert "Entity 'e0'" in warned[0]
    assert "pass image_root= with the folder that the images are in" in warned[0]
    assert "allow_urls=True" in warned[2]
    # The same as a column of images, which `datasets` would open.
    features = datasets.Features({**datasets.Dataset.from_list(rows("a")).features, "images": [datasets.Image()]})
    cast = datasets.Dataset.from_list(rows(*paths[:1]), features=features)
    assert seen(model, processor, cast.to_iterable_dataset() if streamed else cast)[0] == [False]


def test_a_folder_opens_what_is_in_it_and_nothing_else(
    model: MimicModel, processor: MimicProcessor, folder: Path
) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "in.png").write_bytes(PNG)
    (inner / "out.png").symlink_to(folder / "photo.png")
    names = ["in.png", str(inner / "in.png"), "../photo.png", str(folder / "photo.png"), "out.png", "none.png"]
    table = datasets.Dataset.from_list(rows(*names))
    got, warned = seen(model, processor, table, image_root=inner)
    assert got == [True, True, False, False, False, False]
    assert [("is not in the folder" in text, "There is no image file" in text) for text in warned] == [
        *[(True, False)] * 3,
        (False, True),
    ]
    assert seen(model, processor, rows(*names), image_root=inner)[0] == got
    assert seen(model, processor, table, image_root=True)[0] == [False, True, False, True, False, False]
    with pytest.raises(ValueError, match="`image_root` must be a folder, True or False"):
        EntityIndex.build(model, processor, rows(PNG), image_root="")
    with pytest.raises(ValueError, match='`allow_urls` must be True, False or "private"'):
        EntityIndex.build(model, processor, rows(PNG), allow_urls="yes")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_an_imagefolder_has_its_images(
    kind: str, streamed: bool, model: MimicModel, processor: MimicProcessor, tmp_path: Path
) -> None:
    place = tmp_path / "data"
    place.mkdir()
    table = '{"file_name": "photo.png", "id": "e0", "name": "a", "other": "/etc/passwd"}\n'
    if kind == "folder":
        (place / "photo.png").write_bytes(PNG)
        (place / "metadata.jsonl").write_text(table)
    else:
        with zipfile.ZipFile(place / "data.zip", "w") as archive:
            archive.writestr("photo.png", PNG)
            archive.writestr("metadata.jsonl", table)
    options = {"split": "train", "streaming": streamed, "cache_dir": str(tmp_path / "cache")}
    loaded = datasets.load_dataset("imagefolder", data_dir=str(place), **options)
    assert seen(model, processor, loaded.rename_column("image", "images")) == ([True], [])
    # Its other columns are what somebody wrote.
    got, warned = seen(model, processor, loaded.rename_column("other", "images"))
    assert (got, len(warned)) == ([False], 1)


def test_a_saved_data_set_is_not_believed_about_its_files(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, folder: Path
) -> None:
    columns = datasets.Dataset.from_list(rows("a")).features
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    table = datasets.Dataset.from_list(
        rows({"bytes": None, "path": str(folder / "photo.png")}),
        features=datasets.Features({**columns, "images": [plain]}),
    )
    table.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    loaded = loaded.cast(datasets.Features({**columns, "images": [datasets.Image(decode=False)]}))
    loaded.info.builder_name = "imagefolder"
    assert seen(model, processor, loaded)[0] == [False]


def test_mentions_of_a_data_set_and_those_of_a_caller(
    model: MimicModel, processor: MimicProcessor, folder: Path
) -> None:
    mention = {"mention": "a", "text": "b", "image": str(folder / "photo.png")}
    table = datasets.Dataset.from_list([mention])
    linker = MultimodalEntityLinkingPipeline(model=model, processor=processor, entities=rows(PNG))
    assert linker(mention)
    assert linker([mention])
    for data in (table, table.to_iterable_dataset()):
        with pytest.raises(MimicImageError, match="named in a table that came from elsewhere"):
            list(linker(data))
        with pytest.raises(MimicImageError, match="named in a table that came from elsewhere"):
            linker.index.link(model, processor, data)
    switched = MultimodalEntityLinkingPipeline(
        model=model, processor=processor, entities=datasets.Dataset.from_list(rows("photo.png")), image_root=folder
    )
    assert len(list(switched(table))) == 1


def test_a_service_reads_nothing_that_a_request_names(
    model: MimicModel, processor: MimicProcessor, folder: Path
) -> None:
    linker = MultimodalEntityLinkingPipeline(
        model=model, processor=processor, entities=rows(PNG), allow_urls=False, image_root=False
    )
    for image in (str(folder / "photo.png"), folder / "photo.png", "/etc/none", "http://127.0.0.1:9/a.png"):
        mention = {"mention": "a", "text": "b", "image": image}
        for call in (mention, [mention], iter([mention])):
            with pytest.raises(MimicImageError, match=r"no file is read for it|URLs are not read here"):
                list(linker(call))
    for given in (PNG, f"data:image/png;base64,{TEXT}", IMAGE, io.BytesIO(PNG)):
        assert linker({"mention": "a", "text": "b", "image": given})


def test_training_reads_what_building_reads(processor: MimicProcessor, folder: Path) -> None:
    entities = rows("photo.png", str(folder / "photo.png"))
    mentions: list[dict[str, Any]] = [
        {"id": "m", "mention": "a", "sentence": "b", "image": str(folder / "photo.png"), "answer": "e1"},
        {"id": "n", "mention": "a", "sentence": "b", "image": np.asarray(IMAGE), "answer": "e0"},
    ]

    def has_image(entities: Any, **switches: Any) -> list[bool]:
        collator = MentionEntityCollator(processor, entities, **switches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = collator(mentions)
            again = MentionEntityCollator(processor, entities, **switches)
            cached = again(again.cache_pixels(mentions, show_progress=False))
        for name, tensor in batch.items():
            assert torch.equal(tensor, cached[name]), name
        return [bool(row.any()) for row in (*batch["pixel_values"], *batch["entity_pixel_values"])]

    assert has_image(entities) == [True, True, True, False]
    table = datasets.Dataset.from_list(entities)
    assert has_image(table) == [False, True, False, False]
    assert has_image(table, image_root=folder) == [True, True, True, True]
    assert has_image(KnowledgeBase(table, image_root=folder)) == [True, True, True, True]
    with pytest.raises(ValueError, match="set them where it is made"):
        MentionEntityCollator(processor, KnowledgeBase(table), image_root=folder)


@pytest.mark.parametrize("library", ["numpy", "pandas", "torch", "arrow"])
def test_whatever_library_gives_the_rows(
    library: str, model: MimicModel, processor: MimicProcessor, folder: Path
) -> None:
    table = datasets.Dataset.from_list(rows("photo.png", str(folder / "photo.png"))).with_format(library)
    assert seen(model, processor, table, image_root=folder) == ([True, True], [])
    columns = datasets.Dataset.from_list(rows("a")).features
    features = datasets.Features({**columns, "images": datasets.List(datasets.Image())})
    images = datasets.Dataset.from_list(rows({"bytes": PNG, "path": None}), features=features)
    assert seen(model, processor, images.with_format(library)) == ([True], [])
    if library == "pandas":
        frame = datasets.Dataset.from_list(rows(str(folder / "photo.png"))).to_pandas()
        assert seen(model, processor, frame) == seen(model, processor, frame.to_dict("records")) == ([True], [])


# --- Addresses ----------------------------------------------------------------------------------------------------


class Answers(socketserver.StreamRequestHandler):
    """Sends the bytes that belong to a path; those that are a list a byte at a time until the reader is gone."""

    def handle(self) -> None:
        path = self.rfile.readline().split(b" ")[1].decode()
        self.server.asked.append(path)  # type: ignore[attr-defined]
        while self.rfile.readline().strip():
            pass
        answer = self.server.answers[path]  # type: ignore[attr-defined]
        if isinstance(answer, bytes):
            self.wfile.write(answer)
            return
        self.wfile.write(answer[0])
        self.server.held.append(path)  # type: ignore[attr-defined]
        try:
            while not self.server.stopped.wait(0.02):  # type: ignore[attr-defined]
                self.wfile.write(b"x")
        except OSError:
            pass


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    address = ""


@pytest.fixture(scope="module")
def web() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answers) as server:
        server.address = f"http://127.0.0.1:{server.server_address[1]}"
        ok = b"HTTP/1.1 200 OK\r\n"
        length = f"Content-Length: {len(PNG)}\r\n\r\n".encode()
        server.asked, server.held, server.stopped = [], [], threading.Event()  # type: ignore[attr-defined]
        server.answers = {  # type: ignore[attr-defined]
            "/photo.png": ok + length + PNG,
            "/File:My%20%C5%81%20photo.jpg?a=b%20c": ok + length + PNG,
            "/moved": b"HTTP/1.1 302 Found\r\nLocation: /photo.png\r\n\r\n",
            "/status": b"HTTP/1.1 abc\r\n\r\n",
            "/long": b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n",
            "/headers": ok + b"a: b\r\n" * 500 + b"\r\n",
            "/chunk": ok + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            "/cut": ok + length + PNG[:20],
            "/chunkcut": ok + b"Transfer-Encoding: chunked\r\n\r\nff\r\nabc",
            "/loop": b"HTTP/1.1 302 Found\r\nLocation: /loop\r\n\r\n",
            "/odd": b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
            "/file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "/nothing": b"",
            "/slowly": [ok + b"\r\n"],
            "/slowheader": [ok + b"a: "],
        }
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.stopped.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("http://a.org/File:My photo.jpg", "http://a.org/File:My%20photo.jpg"),
        (" https://a.org/a%20b?c d#e ", "https://a.org/a%20b?c%20d"),
        ("http://bücher.example/ü.png", "http://xn--bcher-kva.example/%C3%BC.png"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("HTTP://A.org/(a),b'c!", "http://a.org/(a),b'c!"),
    ],
)
def test_addresses_as_browsers_send_them(given: str, sent: str) -> None:
    assert as_browsers_send(given) == sent


def test_an_address_with_a_space_is_read(web: Server) -> None:
    assert load_image(f"{web.address}/File:My Ł photo.jpg?a=b c") is not None
    assert load_image(f"{web.address}/moved") is not None


WRONG = ["/status", "/long", "/headers", "/chunk", "/chunkcut", "/cut", "/loop", "/odd", "/file", "/nothing"]


@pytest.mark.parametrize("path", WRONG)
def test_whatever_a_server_does_is_an_image_error(path: str, web: Server, processor: MimicProcessor) -> None:
    with pytest.raises(MimicImageError):
        load_image(web.address + path)
    with pytest.warns(UserWarning, match="It is encoded without an image"):
        made = processor.pixels([web.address + path, IMAGE], on_image_error="warn")
    assert (not made[0].any(), bool(made[1].any())) == (True, True)


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:abc/x", "http:///x", "http://a..b/", "http://\0/"])
def test_odd_addresses_are_image_errors(url: str) -> None:
    with pytest.raises(MimicImageError):
        load_image(url)


@pytest.mark.parametrize("path", ["/slowly", "/slowheader"])
def test_a_server_that_never_ends_is_left(path: str, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_mimic, "MAX_SECONDS", 0.3)
    with pytest.raises(MimicImageError, match=r"it takes more than 0\.3 s"):
        load_image(web.address + path)
    assert path in web.held  # type: ignore[attr-defined]  # it was sending all the time


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def resolve(monkeypatch: pytest.MonkeyPatch, **hosts: str) -> None:
    """Lets names stand for addresses; a public one is connected to at this machine all the same."""
    real, connect = socket.getaddrinfo, socket.socket.connect

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        return real(hosts.get(str(host).partition(".")[0], host), port, *arguments, **options)

    def connect_here(self: socket.socket, address: Any) -> None:
        connect(self, ("127.0.0.1", address[1]) if address[0] == "93.184.216.34" else address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect_here)


def test_private_addresses_are_asked_only_if_said(
    web: Server, monkeypatch: pytest.MonkeyPatch, model: MimicModel, processor: MimicProcessor
) -> None:
    resolve(monkeypatch, public="93.184.216.34", inner="127.0.0.1")
    port = web.address.rpartition(":")[2]
    inner, public = (f"http://{name}.example:{port}/photo.png" for name in ("inner", "public"))
    numbers = [f"http://127.0.0.1:{port}/photo.png", f"http://2130706433:{port}/photo.png", f"http://[::1]:{port}/a"]
    table = datasets.Dataset.from_list(rows(inner, public, *numbers))
    web.asked.clear()  # type: ignore[attr-defined]
    assert seen(model, processor, table)[0] == [False] * 5
    assert web.asked == []  # type: ignore[attr-defined]
    got, warned = seen(model, processor, table, allow_urls=True)
    assert got == [False, True, False, False, False]
    assert len(web.asked) == 1  # type: ignore[attr-defined]
    assert "at inner.example, an address of this machine or of a private network, which is not read here" in warned[0]
    assert seen(model, processor, table, allow_urls="private")[0][:3] == [True, True, True]
    assert load_image(inner) is not None  # what a caller's code says


def test_a_public_address_does_not_lead_to_a_private_one(web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, public="93.184.216.34")
    port = web.address.rpartition(":")[2]
    web.answers["/inwards"] = f"HTTP/1.1 302 Found\r\nLocation: {web.address}/photo.png\r\n\r\n".encode()  # type: ignore[attr-defined]
    for places in (ImagePlaces(), ImagePlaces(True, False)):
        web.asked.clear()  # type: ignore[attr-defined]
        with pytest.raises(MimicImageError, match="an address of this machine or of a private network"):
            load_image(PlacedImage(f"http://public.example:{port}/inwards", places))
        assert web.asked == ["/inwards"]  # type: ignore[attr-defined]
    assert load_image(f"http://public.example:{port}/moved") is not None


def test_a_file_on_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class FileSystem:
        def open(self, name: str, mode: str) -> Any:
            assert mode == "rb"
            files = {"hf://datasets/a/b@c/p.png": "photo.png", "hf://datasets/a/b/p.zip": "photos.zip"}
            return open(folder / files[name], mode)

    monkeypatch.setattr("huggingface_hub.HfFileSystem", FileSystem)
    for source in ("hf://datasets/a/b@c/p.png", "zip://some/photo.png::hf://datasets/a/b/p.zip"):
        assert load_image(source) is not None
        with pytest.raises(MimicImageError, match="URLs are not read here"):
            load_image(source, allow_urls=False)
    with pytest.raises(MimicImageError, match="cannot be downloaded"):
        load_image("hf://datasets/a/other/p.png")

from __future__ import annotations

import io
import json
import struct
import threading
import warnings
import weakref
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

from mimic_el import downloads_mimic
from mimic_el.errors_mimic import MimicImageError
from mimic_el.images_mimic import first_image, load_image
from mimic_el.processing_mimic import MimicProcessor
from mimic_el.tests.tiny_clip import save_tiny_clip, tiny_clip_config, tiny_config, tiny_tokenizer

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture
def processor() -> MimicProcessor:
    image_processor = MimicProcessor.image_processor_for(tiny_clip_config())
    return MimicProcessor(image_processor, tiny_tokenizer(), text_max_length=40)


def random_image(width: int = 50, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth noise, different in each corner."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def published_pixels(image: Image.Image, side: int) -> np.ndarray:
    """Of an RGB image: Lanczos to the square, whatever the proportions; to 0..1; CLIP's mean and deviation."""
    resized = image.resize((side, side), Image.Resampling.LANCZOS)
    return ((np.asarray(resized) / 255 - MEAN) / STD).transpose(2, 0, 1)


# --- Texts --------------------------------------------------------------------------------------------------------


def ids(text: str, length: int = 40) -> list[int]:
    """Token by token: with no merges, the vocabulary has bytes, and bytes that end a word."""
    vocabulary = tiny_tokenizer().get_vocab()
    words = text.lower().replace("[", " [ ").replace("]", " ] ").replace(".", " . ").split()
    tokens = [vocabulary[c if i < len(word) - 1 else f"{c}</w>"] for word in words for i, c in enumerate(word)]
    tokens = [512, *tokens[: length - 2], 513]
    return tokens + [513] * (length - len(tokens))


def test_templates(processor: MimicProcessor) -> None:
    mention = processor.process_mentions(["Orange"], ["Orange opened a shop."])
    entity = processor.process_entities(["Orange"], ["a company"])
    assert mention["input_ids"].tolist() == [ids("Orange [SEP] Orange opened a shop.")]
    assert entity["input_ids"].tolist() == [ids("Orange [SEP] a company")]
    count = len("orange[sep]acompany") + 2
    assert entity["attention_mask"].tolist() == [[1] * count + [0] * (40 - count)]
    assert mention["input_ids"].dtype == mention["attention_mask"].dtype == torch.int64


def test_strings_are_a_batch_of_one(processor: MimicProcessor) -> None:
    image = random_image()
    one = processor.process_mentions("Orange", "a shop", image)
    several = processor.process_mentions(["Orange"], ["a shop"], [image])
    entity = processor.process_entities("Orange", "a shop", [image, random_image(seed=1)])
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(one[name], several[name])
        assert torch.equal(one[name], entity[name])


def test_empty_and_absent_texts(processor: MimicProcessor) -> None:
    """An empty mention is legal, and so is one that does not occur in its sentence."""
    inputs = processor.process_mentions(["", "Apple", ""], ["a shop", "Orange opened", ""])
    assert inputs["input_ids"].tolist() == [ids(" [SEP] a shop"), ids("Apple [SEP] Orange opened"), ids(" [SEP] ")]


def test_long_texts_are_cut_and_still_end(processor: MimicProcessor) -> None:
    inputs = processor.process_mentions(["Orange"], ["x" * 10_000])
    assert inputs["input_ids"].tolist() == [ids("Orange [SEP] " + "x" * 100)]
    assert inputs["input_ids"][0, -1] == 513
    assert inputs["attention_mask"].all()


def test_any_script(processor: MimicProcessor) -> None:
    inputs = processor.process_mentions(["東京", "Ωμέγα", "🍊", "\ud7ff\x00"], ["日本", "γράμμα", "🎉 fruit", "\n\t"])
    assert inputs["input_ids"].shape == (4, 40)
    assert len({tuple(row) for row in inputs["input_ids"].tolist()}) == 4


@pytest.mark.parametrize(
    ("mentions", "texts", "images", "message"),
    [
        ([], [], None, "one at least; got 0, 0 and 0"),
        (["a", "b"], ["c"], None, "got 2, 1 and 2"),
        (["a", "b"], ["c", "d"], [None], "got 2, 2 and 1"),
        ("a", ["b"], None, "must both be strings, or both lists"),
        (["a", None], ["b", "c"], None, r"`mentions\[1\]` must be a string, got NoneType"),
        (["a"], [3], None, r"`texts\[0\]` must be a string, got int"),
    ],
)
def test_bad_texts(processor: MimicProcessor, mentions: Any, texts: Any, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.process_mentions(mentions, texts, images)


def test_bad_entities_are_called_entities(processor: MimicProcessor) -> None:
    with pytest.raises(ValueError, match="as many names as descriptions"):
        processor.process_entities(["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"`descriptions\[0\]` must be a string"):
        processor.process_entities(["a"], [None])  # type: ignore[list-item]


# --- Images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(50, 30), (30, 50), (24, 24), (1, 1), (2, 300), (640, 7)])
def test_published_preprocessing(processor: MimicProcessor, width: int, height: int) -> None:
    image = random_image(width, height)
    pixels = processor.pixels([image])
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0].numpy(), published_pixels(image, 24), rtol=0, atol=1e-6)


def test_size_of_the_backbone() -> None:
    processor = MimicProcessor(MimicProcessor.image_processor_for(CLIPConfig()), tiny_tokenizer())
    image = random_image(300, 100)
    np.testing.assert_allclose(processor.pixels([image])[0].numpy(), published_pixels(image, 224), rtol=0, atol=1e-6)


def test_where_there_is_no_image(processor: MimicProcessor) -> None:
    image = random_image()
    inputs = processor.process_mentions(["a"] * 4, ["b"] * 4, [None, image, "", {"bytes": None, "path": None}])
    assert torch.equal(inputs["pixel_values"][1], processor.pixels([image])[0])
    assert not inputs["pixel_values"][[0, 2, 3]].any()
    assert not processor.process_mentions(["a"] * 2, ["b"] * 2)["pixel_values"].any()


def test_entities_show_their_first_image(processor: MimicProcessor) -> None:
    first, second = random_image(), random_image(seed=1)
    inputs = processor.process_entities(["a"] * 4, ["b"] * 4, [[first, second], [], None, second])
    expected = processor.pixels([first, None, None, second])
    assert torch.equal(inputs["pixel_values"], expected)
    assert first_image([]) is None
    assert first_image((first, second)) is first


def test_every_source_of_an_image(processor: MimicProcessor, tmp_path: Path) -> None:
    image = random_image()
    data = encoded(image)
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    sources: list[Any] = [
        image,
        str(path),
        path,
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
    ]
    pixels = processor.pixels(sources)
    for row in pixels:
        assert torch.equal(row, pixels[0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "MPO", "AVIF", "JPEG2000"])
def test_formats(kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"This Pillow writes no {kind}.")
    image = random_image(32, 32)
    loaded = load_image(encoded(image, kind))
    assert loaded is not None
    assert (loaded.mode, loaded.size) == ("RGB", (32, 32))
    difference = np.abs(np.asarray(loaded).astype(int) - np.asarray(image).astype(int))
    assert difference.mean() < 12  # some lose a little


MODES = ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I", "F")


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str, correct: bool) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    elif mode == "LAB":
        image = Image.new("LAB", (30, 20), (128, 10, 10))
    else:
        image = random_image(30, 20).convert(mode)
    loaded = load_image(image, correct=correct)
    assert loaded is not None
    assert (loaded.mode, loaded.size) == ("RGB", (30, 20))
    assert len(np.unique(np.asarray(loaded))) > 1  # something is to be seen


def test_grey_and_cmyk_keep_their_look() -> None:
    colour = random_image()
    for mode, tolerance in (("L", 0), ("CMYK", 0)):
        converted = colour.convert(mode)
        expected = np.asarray(converted.convert("RGB")).astype(int)
        kind = "TIFF"
        loaded = np.asarray(load_image(encoded(converted, kind))).astype(int)
        assert np.abs(loaded - expected).max() <= tolerance


def test_transparency_shows_white() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    clear.putpixel((3, 3), (200, 0, 0, 255))
    clear.putpixel((4, 4), (200, 0, 0, 128))
    data = encoded(clear)
    corrected, published = (np.asarray(load_image(data, correct=correct)) for correct in (True, False))
    assert corrected[0, 0].tolist() == [255, 255, 255]
    assert corrected[3, 3].tolist() == [200, 0, 0]
    assert corrected[4, 4].tolist() == [227, 127, 127]  # half and half
    assert (published == [200, 0, 0]).all()  # the published code ignores it

    palette = random_image(16, 16).quantize(8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert np.asarray(load_image(encoded(palette, "GIF", transparency=palette.getpixel((0, 0)))))[0, 0].tolist() == [
        255,
        255,
        255,
    ]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(ramp), kind)
        grey = np.asarray(load_image(data))
        assert (grey == np.arange(256).reshape(16, 16, 1)).all(), kind


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_camera_held_upright(kind: str) -> None:
    image = random_image(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    data = encoded(image, kind, exif=exif, lossless=True)
    corrected = load_image(data)
    assert corrected is not None
    assert (np.asarray(corrected) == np.rot90(np.asarray(image), k=-1)).all()
    if kind != "TIFF":  # which PIL turns by itself
        published = load_image(data, correct=False)
        assert published is not None
        assert (np.asarray(published) == np.asarray(image)).all()


def test_published_preprocessing_corrects_nothing(tmp_path: Path) -> None:
    image_processor = MimicProcessor.image_processor_for(tiny_clip_config())
    processor = MimicProcessor(image_processor, tiny_tokenizer(), correct_images=False)
    image = random_image(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(image, "PNG", exif=exif)
    np.testing.assert_allclose(processor.pixels([data])[0].numpy(), published_pixels(image, 24), rtol=0, atol=1e-6)


# --- Images that cannot be read ---------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


UNREADABLE = {
    "empty": b"",
    "text": b"this is no image",
    "truncated": encoded(random_image(200, 200), "JPEG")[:500],
    "no data": png_header(30, 30),
    "huge": png_header(10_000, 10_000),
    "bomb": png_header(60_000, 60_000),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "pdf": b"%PDF-1.4\n1 0 obj\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_say_which(processor: MimicProcessor, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(UNREADABLE[kind])
    with pytest.raises(MimicImageError, match=r"photo\.png"):
        processor.pixels([path])
    with pytest.raises(MimicImageError, match="the given bytes"):
        processor.pixels([UNREADABLE[kind]])


def test_size_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MimicImageError, match="10000 x 10000 pixels, more than the 90,000,000 that are read"):
        load_image(png_header(10_000, 10_000))
    with pytest.raises(MimicImageError, match="too large"):
        load_image(png_header(60_000, 60_000))
    with pytest.raises(MimicImageError, match="10 x 10 pixels, more than the 99"):
        load_image(png_header(10, 10), max_pixels=99)


def test_other_things_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(MimicImageError, match=r"There is no image file .*nowhere"):
        load_image(tmp_path / "nowhere")
    with pytest.raises(MimicImageError, match="is a directory"):
        load_image(tmp_path)
    for thing in (3, 2.5, object(), ["a.png"]):
        with pytest.raises(MimicImageError, match=f"got {type(thing).__name__}"):
            load_image(thing)  # type: ignore[arg-type]


def test_a_warning_instead_of_an_error(processor: MimicProcessor) -> None:
    image = random_image()
    with pytest.warns(UserWarning, match=r"the given bytes.* It is encoded without an image"):
        inputs = processor.process_mentions(["a", "b"], ["c", "d"], [b"broken", image], on_image_error="warn")
    assert not inputs["pixel_values"][0].any()
    assert torch.equal(inputs["pixel_values"][1], processor.pixels([image])[0])
    with pytest.raises(ValueError, match='`on_image_error` must be "raise" or "warn", got \'skip\''):
        processor.pixels([image], on_image_error="skip")


# --- Images from the web ----------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]] = {}

    def do_GET(self) -> None:
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "secret.png").write_bytes(encoded(random_image()))
    Server.answers = {
        "/photo.png": (200, {"Content-Type": "image/png"}, encoded(random_image())),
        "/page": (200, {"Content-Type": "text/html"}, b"<html>"),
        "/moved": (302, {"Location": "/photo.png"}, b""),
        "/to_file": (302, {"Location": f"file://{tmp_path / 'secret.png'}"}, b""),
        "/large": (200, {}, b"x" * 5000),
    }
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls(processor: MimicProcessor, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = processor.pixels([random_image()])
    for address in ("/photo.png", "/moved"):
        assert torch.equal(processor.pixels([web + address]), expected)
    with pytest.raises(MimicImageError, match=r"/nowhere cannot be downloaded: .*404"):
        load_image(f"{web}/nowhere")
    with pytest.raises(MimicImageError, match="/page is not an image"):
        load_image(f"{web}/page")
    with pytest.raises(MimicImageError, match="/to_file"):
        load_image(f"{web}/to_file")
    with pytest.raises(MimicImageError, match="URLs are not read here"):
        load_image(f"{web}/photo.png", allow_urls=False)
    monkeypatch.setattr(downloads_mimic, "MAX_BYTES", 4000)
    with pytest.raises(MimicImageError, match="is larger than"):
        load_image(f"{web}/large")


def test_a_server_that_is_not_there(web: str) -> None:
    with pytest.raises(MimicImageError, match="cannot be downloaded"):
        load_image("http://127.0.0.1:9/photo.png")
    with pytest.raises(MimicImageError, match="ftp:// address, which is not read"):
        load_image("ftp://127.0.0.1/photo.png")


# --- A processor of transformers ----------------------------------------------------------------------------------


def test_save_and_load(processor: MimicProcessor, tmp_path: Path) -> None:
    processor.correct_images = False
    processor.text_max_length = 17
    processor.save_pretrained(tmp_path)
    json.loads((tmp_path / "processor_config.json").read_text())
    arguments = (["Orange", ""], ["a shop", "b"], [random_image(), None])
    expected = processor.process_mentions(*arguments)
    loaders: tuple[Any, ...] = (MimicProcessor.from_pretrained, AutoProcessor.from_pretrained)
    for load in loaders:
        loaded = load(tmp_path, trust_remote_code=True) if load is AutoProcessor.from_pretrained else load(tmp_path)
        assert (loaded.text_max_length, loaded.correct_images) == (17, False)
        inputs = loaded.process_mentions(*arguments)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_from_backbone(tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    processor = MimicProcessor.from_backbone(clip)
    assert processor.text_max_length == 40
    assert isinstance(processor.tokenizer, CLIPTokenizer)
    assert isinstance(processor.image_processor, CLIPImageProcessorPil)
    assert processor.correct_images
    assert processor.process_mentions("a", "b", random_image())["pixel_values"].shape == (1, 3, 24, 24)
    processor = MimicProcessor.from_backbone(clip, tiny_config(), correct_images=False)
    assert processor.text_max_length == 12
    assert not processor.correct_images
    assert processor.process_mentions("a", "b")["input_ids"].shape == (1, 12)


def test_without_a_template(processor: MimicProcessor) -> None:
    image = random_image()
    inputs = processor(images=[image, None], text=["orange", "a shop"])
    assert inputs["input_ids"].tolist() == [ids("orange"), ids("a shop")]
    assert torch.equal(inputs["pixel_values"], processor.pixels([image, None]))
    assert processor(text="orange")["input_ids"].shape == (1, 40)
    assert processor(images=image)["pixel_values"].shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="needs `mention=` and `text=`"):
        processor()


def test_bad_settings(processor: MimicProcessor) -> None:
    image_processor = processor.image_processor
    for length in (2, 0, -1, "40", 3.5, None):
        with pytest.raises(ValueError, match="`text_max_length` must be an integer of 3 or more"):
            MimicProcessor(image_processor, tiny_tokenizer(), text_max_length=length)  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        MimicProcessor(image_processor, tokenizer)


def test_calling_the_processor_applies_the_template(processor: MimicProcessor) -> None:
    image = random_image()
    for called, meant in (
        (
            processor(mention="a", text="b c", images=image),
            processor.process_mentions("a", "b c", image),
        ),
        (processor(name=["a"], description=["d"], images=[image]), processor.process_entities(["a"], ["d"], [image])),
        (processor(name=["a"]), processor.process_entities(["a"], [""])),
    ):
        assert called.keys() == meant.keys()
        assert all(torch.equal(called[name], meant[name]) for name in meant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mention": "a", "name": "b"}, "mentions .* or entities"),
        ({"mention": "a"}, "A mention needs its text"),
        ({"name": "a", "text": "b"}, "has a `description`, not a `text`"),
        ({"mention": "a", "text": "b", "return_tensors": "cuda"}, "cuda'? is not a valid TensorType"),
        ({"mention": "a", "text": "b", "videos": ["c"]}, "no use for `videos`"),
        ({"mention": ["a"], "text": ["b"], "images": [["c.png", "d.png"]]}, r"`images\[0\]` has 2"),
        ({"mention": ["a"], "text": ["b"], "images": "c.png"}, "`images` must be a list too"),
        ({}, "needs `mention=` and `text=`"),
    ],
)
def test_calls_that_are_refused(processor: MimicProcessor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


# --- What any processor of transformers takes ---------------------------------------------------------------------


def clip_processor(processor: MimicProcessor) -> CLIPProcessor:
    """transformers' own, of the same parts."""
    return CLIPProcessor(image_processor=processor.image_processor, tokenizer=processor.tokenizer)


IMAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "not normalized": {"do_normalize": False},
    "not rescaled": {"do_rescale": False, "do_normalize": False},
    "another factor": {"rescale_factor": 0.5},
    "another mean": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 0.25]},
    "another size": {"size": {"height": 10, "width": 14}},
    "a side": {"size": {"shortest_edge": 12}},
    "not resized": {"do_resize": False},
    "cropped": {"do_center_crop": True, "crop_size": {"height": 8, "width": 6}},
    "another filter": {"resample": 2},
}


@pytest.mark.parametrize("kind", IMAGE_SETTINGS)
def test_image_settings_of_a_call_as_clip_obeys_them(processor: MimicProcessor, kind: str) -> None:
    settings, image = IMAGE_SETTINGS[kind], random_image()
    expected = clip_processor(processor)(images=image, return_tensors="pt", **settings)["pixel_values"]
    for made in (
        processor(images=image, **settings),
        processor(images=image, images_kwargs=settings),
        processor(mention="a", text="b", images=image, **settings),
        processor.process_entities(["a"], ["b"], [image], **settings),
    ):
        torch.testing.assert_close(made["pixel_values"], expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": True, "max_length": 9, "truncation": True},
        {"padding": "longest"},
        {"padding": "max_length", "max_length": 60},
        {"padding": False, "return_tensors": None},
        {"padding": True, "padding_side": "left"},
        {"return_special_tokens_mask": True},
        {"return_tensors": "np"},
    ],
    ids=str,
)
def test_text_settings_of_a_call_as_clip_obeys_them(processor: MimicProcessor, settings: dict[str, Any]) -> None:
    texts = ["orange", "a shop on the corner of the long street"]
    usual = {"padding": "max_length", "truncation": True, "max_length": 40, "return_tensors": "pt"}
    expected = clip_processor(processor)(text=texts, **{**usual, **settings})
    for made in (processor(text=texts, **settings), processor(text=texts, text_kwargs=settings)):
        assert made.keys() == expected.keys()
        for name in made:
            assert type(made[name]) is type(expected[name])
            assert np.array_equal(np.asarray(made[name], object), np.asarray(expected[name], object))
    templated = [f"a [SEP] {text}" for text in texts]
    mentions = processor(mention=["a", "a"], text=texts, **settings)
    plain = processor(text=templated, **settings)
    assert np.array_equal(np.asarray(mentions["input_ids"], object), np.asarray(plain["input_ids"], object))


def test_kinds_of_tensors(processor: MimicProcessor) -> None:
    image = random_image()
    tensors = processor(mention=["a", "b"], text=["c", "d"], images=[image, None])
    for kind, expected in (("pt", torch.Tensor), ("np", np.ndarray), (None, list)):
        made = processor(mention=["a", "b"], text=["c", "d"], images=[image, None], return_tensors=kind)
        assert made.keys() == tensors.keys()
        for name, value in made.items():
            assert isinstance(value, expected)
            np.testing.assert_array_equal(np.asarray(value), tensors[name].numpy())


def test_images_of_every_kind_in_every_call(processor: MimicProcessor) -> None:
    image = random_image()
    array = np.asarray(image)
    one = processor.pixels([image])
    given: Any
    for given in (array, torch.from_numpy(array.copy()).permute(2, 0, 1), array / 255, [image], [[image]], array[None]):
        assert torch.equal(processor(images=given)["pixel_values"], one)
        assert torch.equal(processor.process_entities("a", "b", given)["pixel_values"], one)
    for given in (array, [image], torch.from_numpy(array.copy())):
        assert torch.equal(processor.process_mentions("a", "b", given)["pixel_values"], one)
        assert torch.equal(processor.process_mentions(["a"], ["b"], [given])["pixel_values"], one)
    batch = processor.process_mentions(["a", "b"], ["c", "d"], np.stack([array, array]))
    assert torch.equal(batch["pixel_values"], torch.cat([one, one]))
    nested = processor(images=[[image, image], [], [image]])["pixel_values"]
    assert [bool(row.any()) for row in nested] == [True, True, False, True]
    already = processor(images=array / 255, do_rescale=False)["pixel_values"]
    torch.testing.assert_close(already, one, rtol=0, atol=1e-6)
    assert processor(images=array.transpose(2, 0, 1), input_data_format="channels_first")["pixel_values"].equal(one)


def test_images_of_different_sizes(processor: MimicProcessor) -> None:
    images = [random_image(30, 20), random_image(20, 30), None]
    with pytest.raises(ValueError, match="come out in different sizes"):
        processor(images=images, do_resize=False)
    made = processor(images=images[:2], do_resize=False, return_tensors=None)["pixel_values"]
    assert [row.shape for row in made] == [(3, 20, 30), (3, 30, 20)]
    with pytest.raises(ValueError, match="Nothing says how large an absent image is"):
        processor(images=[None], do_resize=False)
    assert processor(images=[None, images[0]], do_resize=False)["pixel_values"].shape == (2, 3, 20, 30)
    assert processor(images=[None], size={"height": 5, "width": 6})["pixel_values"].shape == (1, 3, 5, 6)


def test_settings_of_the_image_processor_are_kept(processor: MimicProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = MimicProcessor.from_pretrained(tmp_path, do_normalize=False, do_center_crop=True, crop_size=8)
    pixels = loaded.pixels([random_image(), None])
    assert pixels.shape == (2, 3, 8, 8)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert loaded.blank_pixels(5).shape == (5, 3, 8, 8)
    kept = MimicProcessor(CLIPImageProcessorPil(crop_size=11), tiny_tokenizer())
    assert kept.image_processor.crop_size["height"] == 11
    assert set(kept(text="a", images=random_image())) == set(kept.model_input_names)


def test_long_thin_images_cost_no_memory(processor: MimicProcessor) -> None:
    """Their pixels are few, but not those of what resizing makes of them."""
    for width, height in ((1, 70_000), (70_000, 1), (1, 89_000_000)):
        with pytest.raises(MimicImageError, match=r"no side may have more than 65,535"):
            load_image(png_header(width, height))
        with pytest.warns(UserWarning, match="It is encoded without an image"):
            processor.pixels([png_header(width, height)], on_image_error="warn")
    thin = Image.new("RGB", (4, 60_000))
    assert processor.pixels([thin]).shape == (1, 3, 24, 24)
    with pytest.raises(MimicImageError, match="90,000,000 that are read"):
        processor(images=thin, size={"shortest_edge": 224})  # 752 million pixels
    with pytest.raises(MimicImageError, match="90,000,000 that are read"):
        processor(images=thin, size={"height": 24, "width": 2000})  # made wide before it is made low
    with pytest.raises(MimicImageError, match="more than the 90,000,000"):
        load_image(np.broadcast_to(np.uint8(0), (60_000, 60_000)))


def test_too_little_memory_is_an_image_error(processor: MimicProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    image = random_image()
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "resize", fail)
        with pytest.warns(UserWarning, match="needs more memory than there is. It is encoded without an image"):
            processor.pixels([image], on_image_error="warn")
        with pytest.raises(MimicImageError, match="needs more memory than there is"):
            processor.pixels([image], size={"shortest_edge": 9})


def test_images_are_decoded_one_at_a_time(processor: MimicProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image may take a hundred times as much memory as its file."""
    opened: list[Any] = []

    def remember(*arguments: Any, **options: Any) -> Any:
        assert not [1 for known in opened if known() is not None], "the one before is still held"
        loaded = load_image(*arguments, **options)
        opened.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr("mimic_el.preparation_mimic.load_image", remember)
    processor.pixels([encoded(random_image(seed=seed)) for seed in range(4)])
    assert len(opened) == 4


def test_broken_metadata_of_sound_pixels() -> None:
    """A PNG whose eXIf chunk, or raw profile, is garbage."""
    image = random_image()
    data = encoded(image)
    for kind, garbage in ((b"eXIf", b"II*\0\xff\xff\xff\xff"), (b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz\n")):
        chunk = struct.pack(">I", len(garbage)) + kind + garbage + struct.pack(">I", zlib.crc32(kind + garbage))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_image(data[:33] + chunk + data[33:])
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_images_shrunk_by_torch(processor: MimicProcessor, tmp_path: Path) -> None:
    """Off by 1 of 255 at most, of the images that are larger than the square; told by what is saved."""
    side = processor.image_processor.size["height"]
    large, small = random_image(300, 200), random_image(side - 1, side)
    exact = processor.resized(large)
    assert exact is not None
    processor.fast_resize = True
    fast = processor.resized(large)
    assert fast is not None
    assert fast.shape == exact.shape
    assert 0 < abs(fast.astype(int) - exact).max() <= 1
    processor.save_pretrained(tmp_path)
    again = MimicProcessor.from_pretrained(tmp_path)
    assert again.fast_resize
    np.testing.assert_array_equal(again.resized(large), fast)
    again.fast_resize = False
    np.testing.assert_array_equal(again.resized(small), processor.resized(small))

"""Images are read in one place, within limits; without corrections they come out as the published code makes them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_processor
from tiny_clip import tiny_model

from mimic_el.errors_mimic import MimicImageError
from mimic_el.images_mimic import first_image, load_image, only_image, open_image

PUBLISHED = Path(__file__).parent / "golden" / "images"
CASES = sorted(path.name for path in PUBLISHED.iterdir() if not path.name.startswith("expected_"))


@pytest.mark.parametrize("name", CASES)
def test_what_the_published_code_makes_of_an_image(name: str):
    """It opens an image, resizes it as it is stored, and makes it RGB then."""
    stem, _, suffix = name.rpartition(".")
    expected = np.asarray(Image.open(PUBLISHED / f"expected_{stem}_{suffix}.png").convert("RGB"))
    height, width = expected.shape[:2]
    made = load_image(PUBLISHED / name, correct=False, resize=(width, height))
    np.testing.assert_array_equal(np.asarray(made), expected)


def test_the_processor_without_corrections_resizes_before_it_makes_rgb():
    processor = tiny_processor(tiny_model())
    processor.correct_images = False
    side = processor.image_processor.size["height"]
    for name in CASES:
        resized = processor.resized(PUBLISHED / name)
        assert resized is not None
        expected = Image.open(PUBLISHED / name).resize((side, side), Image.Resampling.LANCZOS).convert("RGB")
        np.testing.assert_array_equal(resized.transpose(1, 2, 0), np.asarray(expected))


def test_an_image_is_not_decoded_before_its_size_is_known():
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    cut = file.getvalue()[:60]  # the header, and nothing of the pixels
    opened, where = open_image(cut)
    assert (opened.size, where) == ((40, 30), "the given bytes")
    with pytest.raises(MimicImageError, match="has 40 x 30 pixels, more than the 1,199"):
        open_image(cut, max_pixels=1199)
    with pytest.raises(MimicImageError, match="cannot be decoded"):
        load_image(cut)


def test_the_first_of_an_entitys_images():
    assert first_image(["a", "b"]) == first_image(("a",)) == first_image("a") == "a"
    assert first_image([]) is first_image(None) is None


def test_where_there_is_no_image(tmp_path: Path):
    assert load_image(None) is load_image("") is load_image({"bytes": None, "path": None}) is None
    with pytest.raises(MimicImageError, match=f"There is no image file {tmp_path / 'no.png'}"):
        load_image(os.fspath(tmp_path / "no.png"))
    with pytest.raises(MimicImageError, match="is a directory"):
        load_image(tmp_path)


def test_jpeg_files_can_be_decoded_at_a_fraction_of_their_size(tmp_path: Path) -> None:
    """At twice the size that is wanted or more; any other image, and one that the caller opened, as it is."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = smooth.resize((400, 300), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")

    def loaded(source: Any, reduce_jpeg: bool, side: int = 24) -> Any:
        image = load_image(source, resize=(side, side), reduce_jpeg=reduce_jpeg)
        return np.asarray(image).astype(int)

    with Image.open(tmp_path / "a.jpg") as opened:
        opened.draft(None, (48, 48))
        assert opened.size == (100, 75)
        expected = np.asarray(opened.convert("RGB").resize((24, 24), Image.Resampling.LANCZOS))
    whole, reduced = (loaded(tmp_path / "a.jpg", reduce) for reduce in (False, True))
    assert np.array_equal(reduced, expected)
    assert 0 < abs(reduced - whole).max() <= 6
    assert np.array_equal(loaded(tmp_path / "a.jpg", True, 200), loaded(tmp_path / "a.jpg", False, 200))
    assert np.array_equal(loaded(tmp_path / "a.png", True), loaded(tmp_path / "a.png", False))
    with Image.open(tmp_path / "a.jpg") as opened:
        assert np.array_equal(loaded(opened, True), whole)
        assert opened.size == (400, 300)


@pytest.mark.parametrize("resample", ["BILINEAR", "BICUBIC", "LANCZOS", "BOX"])
@pytest.mark.parametrize("size", [(400, 300), (20, 300), (500, 9), (24, 24), (90, 24), (7, 5), (24, 30)])
def test_torch_resizes_as_pillow_does_within_1_of_255(size: tuple[int, int], resample: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    before = image.tobytes()
    for correct in (True, False):
        made = load_image(
            image, resize=(24, 30), resample=Image.Resampling[resample], correct=correct, fast_resize=True
        )
        assert made is not None
        assert (made.mode, made.size) == ("RGB", (24, 30))
        expected = np.asarray(image.resize((24, 30), Image.Resampling[resample]), dtype=int)
        assert abs(np.asarray(made) - expected).max() <= 1
    assert image.tobytes() == before


def test_what_torch_cannot_resize_is_resized_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8))

    def loaded(source: Image.Image, resample: Image.Resampling, correct: bool, fast: bool) -> np.ndarray:
        return np.asarray(load_image(source, resize=(16, 16), resample=resample, correct=correct, fast_resize=fast))

    def same(source: Image.Image, resample: Image.Resampling, correct: bool = True) -> bool:
        fast, exact = (loaded(source, resample, correct, fast) for fast in (True, False))
        return np.array_equal(fast, exact)

    assert same(image, Image.Resampling.NEAREST)  # a filter that torch has not
    assert same(image.convert("P"), Image.Resampling.LANCZOS, False)  # indices of a palette are not mixed
    assert not same(image.convert("P"), Image.Resampling.BICUBIC)  # it is RGB where images are corrected
    monkeypatch.delattr("torch._C._nn._upsample_lanczos2d_aa", raising=False)  # as in older versions
    assert same(image, Image.Resampling.LANCZOS)


@pytest.mark.parametrize("resize", [None, (30, 20)])
@pytest.mark.parametrize("fast", [False, True])
def test_a_callers_own_image_stays_apart(resize: tuple[int, int] | None, fast: bool) -> None:
    image = Image.new("RGB", (30, 20))
    made = load_image(image, resize=resize, fast_resize=fast)
    assert made is not None
    made.paste((255, 0, 0), (0, 0, 30, 20))
    assert not np.asarray(image).any()


def test_what_else_holds_the_bytes_or_the_pixels_of_an_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    given: list[Any] = [
        np.frombuffer(data, np.uint8),
        f"file:{tmp_path}/a.png",
        torch.from_numpy(pixels / 255.0),
    ]
    for source in given:
        made = load_image(source)
        assert made is not None
        assert np.array_equal(np.asarray(made), pixels)
    made = load_image(torch.from_numpy(pixels).to(torch.bfloat16))
    assert made is not None
    assert np.abs(np.asarray(made).astype(int) - pixels).max() <= 1
    grey = image.convert("LA").convert("La")
    assert np.array_equal(np.asarray(load_image(grey)), np.asarray(image.convert("L").convert("RGB")))
    floats = Image.fromarray((pixels[..., 0] / 255).astype(np.float32))
    assert np.abs(np.asarray(load_image(floats))[..., 0].astype(int) - pixels[..., 0]).max() <= 1
    with pytest.raises(MimicImageError, match="cannot be read"):
        load_image(torch.empty(3, 4, 4, device="meta"))


def test_a_mention_has_one_image_in_a_list_or_not() -> None:
    assert only_image(["a.png"]) == only_image(("a.png",)) == only_image(np.array(["a.png"], object)) == "a.png"
    assert only_image([]) is only_image(None) is None
    with pytest.raises(MimicImageError, match="A mention has one image; here are 2"):
        only_image(["a.png", "b.png"])

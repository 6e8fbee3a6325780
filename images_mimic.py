"""The one reader of images: from a path, an address, bytes or a PIL image to RGB, with limits on what is read.

Whatever reads an image of a mention or an entity does it here: the processor, the collator of training, the index and
the scripts that make data sets. So all of them take the same formats, hold the same limits, and call the same images
unreadable. It knows nothing of models or tensors.
"""

from __future__ import annotations

import io
import os
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .errors_mimic import MimicImageError

# An image: a PIL image, a path, an http(s) URL, the bytes of a file, or what `datasets` gives for one that it did not
# decode; `None` where there is none.
ImageInput = Image.Image | str | os.PathLike[str] | bytes | Mapping[str, Any] | None

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
MAX_PIXELS = 90_000_000
_MAX_DOWNLOAD_BYTES = 64 * 2**20
_DOWNLOAD_SECONDS = 20.0


def load_image(
    source: ImageInput,
    max_pixels: int = MAX_PIXELS,
    correct: bool = True,
    allow_urls: bool = True,
    resize: tuple[int, int] | None = None,
    resample: int = Image.Resampling.LANCZOS,
) -> Image.Image | None:
    """Reads an image into RGB.

    Args:
        source: a PIL image, a path, an `http(s)` URL, the bytes of an image file, a dict with `bytes` or `path` (an
            undecoded image of `datasets`), or `None`.
        max_pixels: larger images are refused before they are decoded.
        correct: whether the orientation that a camera recorded is applied, transparency shows white, and 16-bit
            values are scaled to 8 bits. If not, the image is only converted to RGB.
        allow_urls: whether an `http(s)` URL is fetched.
        resize: width and height to which the image is resized before it is made RGB, whatever its proportions.
        resample: Pillow's filter for that.

    Returns:
        `PIL.Image.Image` of mode "RGB", or `None` for no source.

    Raises:
        MimicImageError: if there is no such file, it is no image, is broken, or is too large.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if source is None or (isinstance(source, str) and not source):
        return None
    opened, where = open_image(source, max_pixels, allow_urls)
    try:
        return _to_rgb(opened.resize(resize, Image.Resampling(resample)) if resize else opened, correct)
    except Exception as error:  # decoders raise many kinds for broken files
        raise MimicImageError(f"The image {where} cannot be decoded: {error}") from error


def open_image(
    source: Image.Image | str | os.PathLike[str] | bytes, max_pixels: int = MAX_PIXELS, allow_urls: bool = True
) -> tuple[Image.Image, str]:
    """Opens an image without decoding its pixels, and checks its format and size.

    Args:
        source, max_pixels, allow_urls: as in [`load_image`].

    Returns:
        `PIL.Image.Image` as it is stored, and what messages call it.

    Raises:
        MimicImageError: if there is no such file, it is no image, or it is too large.
    """
    if isinstance(source, Image.Image):
        where, opened = "the given PIL image", source
    elif isinstance(source, bytes):
        where, opened = "the given bytes", _open(io.BytesIO(source), "the given bytes")
    elif isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise MimicImageError(f"The image {source} is a URL, and URLs are not fetched here.")
        where, opened = source, _open(io.BytesIO(_download(source)), source)
    elif isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        if os.path.isdir(where):
            raise MimicImageError(f"The image {where} is a directory.")
        if not os.path.exists(where):
            raise MimicImageError(f"There is no image file {where}.")
        opened = _open(where, where)
    else:
        raise MimicImageError(
            f"An image must be a PIL image, a path, a URL, bytes or None, got {type(source).__name__}."
        )
    width, height = opened.size
    if width * height > max_pixels:
        raise MimicImageError(
            f"The image {where} has {width} x {height} pixels, more than the {max_pixels:,} that are read."
        )
    return opened, where


def first_image(images: Any) -> Any:
    """The first of an entity's images, `None` if it has none; a single image is its own first."""
    if isinstance(images, list | tuple):
        return images[0] if images else None
    return images


def _open(file: str | io.BytesIO, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own limit on pixels follows, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise MimicImageError(f"The image {where} is too large to be read: {error}") from error
    except Exception as error:
        raise MimicImageError(f"{where} is not an image that can be read: {error}") from error


def _known_formats() -> list[str]:
    """Those that this Pillow reads: it takes the name of another for an error of the file's."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mimic-el"})
    try:
        with urllib.request.urlopen(request, timeout=_DOWNLOAD_SECONDS) as response:
            # A redirect may lead to another scheme, such as file:.
            if urllib.parse.urlsplit(response.url).scheme not in ("http", "https"):
                raise MimicImageError(f"The image {url} redirects to {response.url}, which is not http(s).")
            data = response.read(_MAX_DOWNLOAD_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, MimicImageError):
            raise
        raise MimicImageError(f"The image {url} cannot be fetched: {error}") from error
    if len(data) > _MAX_DOWNLOAD_BYTES:
        raise MimicImageError(f"The image {url} is larger than {_MAX_DOWNLOAD_BYTES >> 20} MiB.")
    return data


def _to_rgb(image: Image.Image, correct: bool) -> Image.Image:
    if not correct:
        return image.convert("RGB")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # PIL's own conversion clips these instead of scaling them.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = max(255.0, float(values.max()) if values.max() <= 65535 else 65535.0)
        top = 65535.0 if top > 255 else 255.0
        return Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")


__all__ = ["IMAGE_FORMATS", "MAX_PIXELS", "ImageInput", "MimicImageError", "first_image", "load_image", "open_image"]

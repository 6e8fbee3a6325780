"""The one reader of images: from a path, an address, bytes or an array to RGB, with limits on what is read.

Everything that reads an image of a mention or an entity uses this file: the processor, the collator of training, the
index and the scripts that make data sets. So all of them take the same formats, have the same limits, and call the
same images unreadable. Knows nothing of models.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors_mimic import MimicImageError
from .image_sources_mimic import ImagePlaces, PlacedImage, is_placed, read_file, read_named
from .texts_mimic import shortened


class _Array(Protocol):
    """An array of another library: a tensor of torch."""

    def __array__(self, dtype: Any = None) -> np.ndarray: ...


# An image: a PIL image, what a string names (see `read_named`), a path, the bytes of a file or the open file, an array
# or tensor of pixels, or what `datasets` gives for one that it did not decode; `None` where there is none.
ImageInput = (
    Image.Image
    | str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | np.ndarray
    | _Array
    | Mapping[str, Any]
    | PlacedImage
    | None
)

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
MAX_PIXELS = 90_000_000
# A side of JPEG has no more. A thin image of more would be small, but not what resizing makes of it.
MAX_SIDE = 65_535
# Begins what messages call an image that has no name.
_GIVEN = "the given "
_ORIENTATION = 0x0112


def load_image(
    source: ImageInput,
    max_pixels: int = MAX_PIXELS,
    correct: bool = True,
    allow_urls: bool | str = "private",
    resize: tuple[int, int] | None = None,
    resample: int = Image.Resampling.LANCZOS,
    image_root: bool | str | os.PathLike[str] = True,
    reduce_jpeg: bool = False,
    fast_resize: bool = False,
) -> Image.Image | None:
    """Reads an image into RGB.

    Args:
        source: a PIL image; a path, an `http(s)`, `file://` or `hf://` address, a `data:` URI, base64 or
            `zip://member::archive`, as a string; the bytes of an image file, or the file, open; a numpy array or torch
            tensor of shape (height, width), (height, width, channels) or (channels, height, width), of uint8, of
            uint16, or of floats from 0 to 1 or to 255; a dict with `bytes` or `path` (an undecoded image of
            `datasets`); or `None`.
        max_pixels: larger images are refused before they are decoded.
        correct: whether the orientation that a camera recorded is applied, transparency shows white, and 16-bit
            values are scaled to 8 bits. If not, the image is only converted to RGB.
        allow_urls: whether addresses are read: `True` (public ones), `"private"` (those of this machine and of
            private networks too) or `False`.
        resize: width and height to which the image is resized, whatever its proportions: after it is made RGB if it
            is corrected, before if not, as the published code does.
        resample: Pillow's filter for that.
        image_root: whether files of this machine are read: `True` (any), `False` (none), or the folder that they must
            be in.
        reduce_jpeg: whether a JPEG that is to be resized is decoded at a half, a quarter or an eighth of its size,
            where that is still twice the size wanted: much faster, and off by a few of 255 levels in places.
        fast_resize: whether torch resizes an image that becomes smaller, where it has the filter: many times as fast
            as Pillow, and off by 1 of 255 levels in places.

    Returns:
        `PIL.Image.Image` of mode "RGB", or `None` for no source.

    Raises:
        MimicImageError: if there is no such file, or it is not an image, broken, too large, or not read from there.
    """
    places = ImagePlaces(allow_urls, image_root)
    if is_placed(source):
        places, source = source.places, source.source
    if isinstance(source, Mapping):
        source = _of_mapping(source)
    if source is None or (isinstance(source, str) and not source):
        return None
    opened, where = open_image(source, max_pixels, places=places)
    if resize:
        check_size(resize[0], opened.height, where, max_pixels)
        check_size(*resize, where, max_pixels)
    try:
        if resize and reduce_jpeg and opened is not source:  # a caller's own image stays as it is
            opened.draft(None, (2 * resize[0], 2 * resize[1]))  # None keeps the mode
        if not resize:
            made = _to_rgb(opened, correct)
            return made.copy() if made is opened else made  # a caller's own image stays apart
        if not correct:
            return _resize(opened, resize, resample, fast_resize).convert("RGB")
        return _resize(_to_rgb(opened, correct), resize, resample, fast_resize)
    except MemoryError as error:
        raise MimicImageError(f"The image {_as_named(where)} needs more memory than there is.") from error
    except Exception as error:  # decoders raise many kinds for broken files
        raise MimicImageError(f"The image {_as_named(where)} cannot be decoded: {shortened(str(error))}") from error


def open_image(
    source: Any,
    max_pixels: int = MAX_PIXELS,
    allow_urls: bool | str = "private",
    places: ImagePlaces | None = None,
) -> tuple[Image.Image, str]:
    """Opens an image without decoding its pixels, and checks its format and size.

    Args:
        source, max_pixels, allow_urls: as in [`load_image`].
        places: in place of `allow_urls`, the places that are read.

    Returns:
        `PIL.Image.Image` as it is stored, and what messages call it.

    Raises:
        MimicImageError: if there is no such file, it is not an image, or it is too large.
    """
    places = ImagePlaces(allow_urls) if places is None else places
    if isinstance(source, Image.Image):
        where, opened = f"{_GIVEN}PIL image", source
    elif isinstance(source, bytes | bytearray | memoryview):
        where = f"{_GIVEN}bytes"
        opened = _open(io.BytesIO(source), where)
    elif isinstance(source, str | os.PathLike):
        where = shortened(os.fspath(source))
        named = read_named(source, places)
        opened = _open(io.BytesIO(named) if isinstance(named, bytes) else named, where)
    elif callable(getattr(source, "read", None)):
        name = getattr(source, "name", None)
        where = f"{_GIVEN}file {shortened(name)}" if isinstance(name, str) else f"{_GIVEN}file"
        opened = _open(io.BytesIO(read_file(source, where)), where)
    elif isinstance(source, np.ndarray) and source.ndim == 1 and source.dtype == np.uint8:  # a file that was read
        where = f"{_GIVEN}bytes"
        opened = _open(io.BytesIO(source.tobytes()), where)
    elif callable(getattr(source, "__array__", None)) and not np.isscalar(source):
        where = f"{_GIVEN}array"
        opened = _of_array(source)
    else:
        raise MimicImageError(
            f"An image must be a PIL image, a path, a URL, bytes or None, got {type(source).__name__}; open files and "
            "arrays of pixels are taken too."
        )
    check_size(*opened.size, where, max_pixels)
    return opened, where


def check_size(width: int, height: int, where: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises a `MimicImageError` for more pixels than are read, or a longer side."""
    if width * height > max_pixels:
        raise MimicImageError(
            f"The image {_as_named(where)} has {width} x {height} pixels, more than the {max_pixels:,} that are read."
        )
    if max(width, height) > MAX_SIDE:
        raise MimicImageError(
            f"The image {_as_named(where)} has {width} x {height} pixels; no side may have more than {MAX_SIDE:,}."
        )


def first_image(images: Any) -> Any:
    """The first of an entity's images, `None` if it has none; a single image is its own first."""
    images = listed(images)
    first = images[0] if images else None
    return first_image(first) if isinstance(first, list | tuple) else first


def listed(images: Any) -> list[Any]:
    """The images of what may be a list, a tuple, a column of pandas or Arrow, one image or, as `None` or NaN, none.

    An array or tensor of two or three axes is one image; one of four is several.
    """
    if images is None or (isinstance(images, float) and images != images):
        return []
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return list(images)
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OUS":
        return list(images)
    return [images]


def only_image(images: Any, whose: str = "A mention") -> Any:
    """The image of what has one at most, be it in a list of one; `None` if there is none.

    Raises:
        MimicImageError: if there are several.
    """
    several = listed(images)
    if len(several) > 1:
        raise MimicImageError(f"{whose} has one image; here are {len(several)}. Choose one of them.")
    return several[0] if several else None


def _of_mapping(image: Mapping[str, Any]) -> Any:
    """The bytes of an undecoded image of `datasets`, or else its path."""
    if image and not {"bytes", "path"} & set(image):
        raise MimicImageError(
            f"An image given as a dict has `bytes` or `path`; this one has {shortened(str(sorted(image)))}."
        )
    data = image.get("bytes")
    return image.get("path") if data is None else data


def _of_array(source: Any) -> Image.Image:
    """An array or tensor of pixels as a PIL image."""
    try:
        if hasattr(source, "detach"):  # a tensor
            source = source.detach().cpu()
            source = source.float() if source.dtype.is_floating_point else source  # numpy has no bfloat16
        values = np.asarray(source)
    except Exception as error:  # tensors of types that numpy has not, arrays of anything
        raise MimicImageError(f"The given array cannot be read: {shortened(str(error))}") from error
    shape = "x".join(str(side) for side in values.shape)
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.size == 0 or not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))):
        raise MimicImageError(
            f"The given array has the shape {shape}. An image has (height, width), (height, width, channels) or "
            "(channels, height, width), with 1, 3 or 4 channels."
        )
    check_size(values.shape[1], values.shape[0], f"{_GIVEN}array")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype == np.uint16 and values.ndim == 3:
        values = (values >> 8).astype(np.uint8)
    elif values.dtype.kind in "iuf" and values.dtype not in (np.uint8, np.uint16):
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 255):
            raise MimicImageError(
                f"The given array has values from {low:g} to {high:g}. Pixels are from 0 to 255, or as floats from 0 "
                "to 1; give the image as it is before it is normalized."
            )
        scale = 255 if values.dtype.kind == "f" and high <= 1 else 1
        values = np.rint(values.astype(np.float64) * scale).astype(np.uint8)
    elif values.dtype not in (np.uint8, np.uint16):
        raise MimicImageError(f"The given array has the type {values.dtype}, which is not a type of pixels.")
    return Image.fromarray(np.ascontiguousarray(values))


def _open(file: str | io.BytesIO, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own limit on pixels follows, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise MimicImageError(f"The image {_as_named(where)} is too large to be read: {error}") from error
    except Exception as error:
        given, image = where.startswith(_GIVEN), "image that can be read"
        what = f"There is no {image} in {where}" if given else f"{where} is not an {image}"
        unknown = isinstance(error, UnidentifiedImageError)  # whose message names an object of Python
        raise MimicImageError(f"{what}: {'its format is unknown' if unknown else shortened(str(error))}.") from error


def _as_named(where: str) -> str:
    """What messages call an image, after the words "the image"."""
    return f"in {where}" if where.startswith(_GIVEN) else where


def _known_formats() -> list[str]:
    """Those that this Pillow reads: it takes the name of another for an error of the file's."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


# Pillow's filters under the names that torch has for the same ones. Lanczos is new there: older versions lack it.
_FAST_FILTERS = {
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.LANCZOS: "lanczos",
}


def _resize(image: Image.Image, size: tuple[int, int], resample: int, fast: bool) -> Image.Image:
    """A new image of another width and height."""
    # What is enlarged would be off by more, and takes little time.
    fast &= image.mode == "RGB" and image.size != size and image.width >= size[0] and image.height >= size[1]
    name = _FAST_FILTERS.get(Image.Resampling(resample)) if fast else None
    if name is not None:
        import torch  # those who make data sets read images without it

        if hasattr(torch._C._nn, f"_upsample_{name}2d_aa"):
            values = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
            made = torch.nn.functional.interpolate(values, size=size[::-1], mode=name, antialias=True)
            return Image.fromarray(made[0].permute(1, 2, 0).contiguous().numpy())
    return image.resize(size, Image.Resampling(resample))


def _to_rgb(image: Image.Image, correct: bool) -> Image.Image:
    """The image in RGB: itself, where it is."""
    if not correct:
        return image.convert("RGB")
    image.load()
    try:
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # the pixels are sound
        warnings.warn(f"The metadata of an image cannot be read, so it is not turned: {error!r}.", stacklevel=2)
    if image.mode.startswith("I;16"):
        # PIL's own conversion clips these instead of scaling them.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        if image.mode == "F" and values.max() <= 1:  # as arrays of floats
            values *= 255
        top = 65535.0 if values.max() > 255 else 255.0
        return Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


__all__ = [
    "IMAGE_FORMATS",
    "MAX_PIXELS",
    "ImageInput",
    "MimicImageError",
    "check_size",
    "first_image",
    "listed",
    "load_image",
    "only_image",
    "open_image",
]

"""Images of a data set: found by the names in its rows, decoded once as a check, and shrunk if asked."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image, ImageOps

from mimic_el.errors_mimic import MimicImageError
from mimic_el.images_mimic import MAX_PIXELS, load_image, open_image

from .archives import ArchiveError, Tree, unsafe_path

MAX_IMAGE_BYTES = 256 << 20


class ImageFile(NamedTuple):
    """An image found in `folder` (an [`ImageFolder`]) under `name`, its path there."""

    folder: ImageFolder
    name: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        tree, name = self.folder.files[self.name]
        return tree.files[name]

    def read(self) -> bytes:
        """The file's bytes; raises `ArchiveError` (`oversized_image`, `unreadable_image`)."""
        tree, name = self.folder.files[self.name]
        try:
            return tree.read(name, MAX_IMAGE_BYTES)
        except ArchiveError as error:
            raise ArchiveError(f"{error.kind}_image", f"{self.name!r}: {error}") from error


_IMAGE_KINDS = {"unsafe": "unsafe_image_path", "not_a_file": "image_not_a_file", "oversized": "oversized_image"}


def _base(name: str) -> str:
    # A name that was refused, or that a row gives, may hold the other system's separators.
    return re.split(r"[\\/]", name)[-1]


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


class ImageFolder:
    """Images by name, below one folder or several.

    Data sets name an image with the extension it had before it was converted, so [`find`] falls back in this order,
    and says which step it took:

    1. `exact`: the path as given, or a file whose path ends in it;
    2. `jpg`: the path up to its last dot, with `.jpg` (how the MIMIC archives store images);
    3. `case`: either, in another case;
    4. `extension`: the path with any other extension.

    The folders that a path names are part of it: `Q1/2.jpg` is not found in `Q2/`.

    Args:
        label: what to call the folder in messages.
        parts: the trees and, for each, the folder in it to look below (`""` for all of it, else ending in `/`).

    Attributes:
        files: by path below its folder, the tree and the name in it of every image.
    """

    def __init__(self, label: str, parts: list[tuple[Tree, str]]):
        self.label = label
        self.files: dict[str, tuple[Tree, str]] = {}
        self._refused: dict[str, dict[str, tuple[str, str]]] = {}
        for tree, prefix in parts:
            for name in tree.files:
                if name.startswith(prefix):
                    self.files.setdefault(name[len(prefix) :], (tree, name))
            for name, refusal in tree.refused.items():
                if name.startswith(prefix):
                    self._refused.setdefault(_base(name), {}).setdefault(name[len(prefix) :], refusal)
        self._bases: dict[str, list[str]] = {}
        for path in self.files:
            self._bases.setdefault(_base(path), []).append(path)
        self._folded: dict[str, list[str]] | None = None
        self._stems: dict[str, list[str]] | None = None

    def find(self, reference: str, moved: bool = False) -> tuple[ImageFile, str]:
        """Look an image up by the name or path that a row gives.

        Args:
            reference: the name or path.
            moved: whether the path may name folders that are gone and a name with more after its first dot, as the
                `imgPath` of the MIMIC archives does: then its last part, or that up to its first dot, is enough.

        Returns:
            The image and the step that found it: `exact`, `jpg`, `case` or `extension`.

        Raises:
            ArchiveError: `unsafe_image_path`, `image_not_a_file`, `oversized_image`, `unreadable_image` or
                `missing_image` (also where several files could be meant).
        """
        reason = unsafe_path(reference)
        if reason:
            raise ArchiveError("unsafe_image_path", f"{reference!r} {reason}")
        if reference in self.files:
            return ImageFile(self, reference), "exact"
        *folders, base = [part for part in re.split(r"[\\/]", reference) if part not in ("", ".")] or [""]
        # The file must lie in the folders that are named. Where these may be gone, in them or else anywhere.
        places = list(dict.fromkeys(("/".join(folders), ""))) if moved else ["/".join(folders)]
        stems = list(dict.fromkeys((_stem(base), base.partition(".")[0]))) if moved else [_stem(base)]
        names = [base, *(stem + ".jpg" for stem in stems)]
        for name in names:
            if found := _in_places(self._bases.get(name, ()), places):
                return self._image(reference, found), "exact" if name == base else "jpg"
            refused = self._refused.get(name, {})
            if found := _in_places(refused, places):
                kind, detail = refused[found[0]]
                raise ArchiveError(_IMAGE_KINDS.get(kind, "unreadable_image"), f"{reference!r} {detail}")
        if self._folded is None or self._stems is None:
            self._folded, self._stems = {}, {}
            for name, paths in self._bases.items():
                self._folded.setdefault(name.lower(), []).extend(paths)
                self._stems.setdefault(_stem(name).lower(), []).extend(paths)
        for name in names:
            if found := _in_places(self._folded.get(name.lower(), ()), places, fold=True):
                return self._image(reference, found), "case"
        for stem in stems:
            if found := _in_places(self._stems.get(stem.lower(), ()), places, fold=True):
                return self._image(reference, found), "extension"
        raise ArchiveError("missing_image", f"{reference!r} is not in {self.label}")

    def _image(self, reference: str, paths: list[str]) -> ImageFile:
        # Of names that differ in case or extension alone the first; the one that lies in no folder comes before others.
        same = [path for path in paths if _base(path) == _base(paths[0])]
        if len(same) == 1 or _base(same[0]) in same:
            return ImageFile(self, same[0] if len(same) == 1 else _base(same[0]))
        raise ArchiveError("missing_image", f"{reference!r} could be {same[0]!r} or {same[1]!r} in {self.label}")


def _in_places(paths: Iterable[str], places: list[str], fold: bool = False) -> list[str]:
    """Those of `paths` in a folder whose path ends in the first of `places` that any is in; all are in `""`."""
    for place in places:
        ending = f"/{place.lower() if fold else place}" if place else ""
        found = []
        for path in paths:
            folder = "/" + "/".join(re.split(r"[\\/]", path)[:-1])
            if (folder.lower() if fold else folder).endswith(ending):
                found.append(path)
        if found:
            return found
    return []


# Under which Pillow keeps what may say how a camera was held.
_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, str] | None:
    """Decode an image completely, to know that all its readers can: training and the pipeline, and `datasets`.

    Returns:
        `None` for a sound image, else `(kind, detail)` with `oversized_image` (more than `max_pixels` pixels; it is
        not decoded), `unreadable_image` (not an image, truncated, damaged, or not one of the formats of
        `mimic_el.images_mimic`), or `broken_metadata` (sound pixels, but `datasets` fails on what a camera or program
        wrote beside them; see [`without_metadata`]).
    """
    try:
        opened, _ = open_image(data, max_pixels)
        try:
            load_image(opened, max_pixels)
        except MimicImageError:
            load_image(data, max_pixels, correct=False)  # the pixels alone
    except MimicImageError as error:
        # The reader's own limit has no cause; above twice Pillow's, Pillow refuses.
        too_large = error.__cause__ is None or isinstance(error.__cause__, Image.DecompressionBombError)
        # The reader has no name for bytes; the caller has.
        detail = str(error).replace("The image in the given bytes", "it").replace(" in the given bytes", "")
        return "oversized_image" if too_large else "unreadable_image", detail
    try:
        if _METADATA & opened.info.keys():  # a copy has not kept what came of reading it before
            ImageOps.exif_transpose(opened.copy())
    except Exception as error:  # its readers raise many kinds, SyntaxError among them
        return "broken_metadata", f"{type(error).__name__}: {error}"
    return None


def without_metadata(data: bytes) -> bytes:
    """The same pixels as a PNG, without what was written beside them."""
    image, _ = open_image(data, sys.maxsize)
    buffer = io.BytesIO()
    pixels = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    pixels.save(buffer, "PNG", exif=b"")
    return buffer.getvalue()


# Modes that convert to RGB or RGBA without loss of range; the others have more than 8 bits a channel.
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}


def shrink_image(data: bytes, longest_side: int) -> bytes:
    """Re-encode a sound image so that its longest side has at most `longest_side` pixels.

    An image that is small enough, or has more than 8 bits a channel, keeps its bytes. One with transparency becomes
    PNG, any other JPEG (quality 90). The camera's orientation is applied, as `datasets.Image` does when it decodes.
    """
    opened, _ = open_image(data, sys.maxsize)  # its pixels were counted when it was found sound
    with opened as image:
        if max(image.size) <= longest_side or image.mode not in _EIGHT_BIT_MODES:
            return data
        image.draft("RGB", (longest_side, longest_side))  # JPEG decodes at a fraction of its size where that is enough
        turned = ImageOps.exif_transpose(image)
        transparent = turned.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info
        small = turned.convert("RGBA" if transparent else "RGB")
        small.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if transparent:
        small.save(buffer, "PNG")
    else:
        small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

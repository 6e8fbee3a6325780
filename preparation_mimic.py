"""Prepares images for a model: resizes and normalizes them by the settings of an image processor.

One image at a time, because an image may take a hundred times as much memory as its file. Knows no texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import BatchFeature, CLIPImageProcessorPil
from transformers.image_processing_utils import get_size_dict
from transformers.image_utils import PILImageResampling

from .backbones_mimic import backbone_of
from .errors_mimic import MimicImageError
from .images_mimic import ImageInput, check_size, load_image

# What the image processor is told where it resizes; the rest where it normalizes.
_OF_RESIZING = ("size", "resample", "do_resize", "do_center_crop", "crop_size", "default_to_square", "reducing_gap")


@dataclass
class ImagePreparation:
    """How images are prepared. Its methods do as those of [`MimicProcessor`] of the same names say.

    Args:
        image_processor: resizes, perhaps crops, and normalizes.
        correct_images, reduce_jpeg, fast_resize: as of [`MimicProcessor`].
    """

    image_processor: Any
    correct_images: bool = True
    reduce_jpeg: bool = False
    fast_resize: bool = False

    def pixels(
        self,
        images: Sequence[ImageInput],
        on_image_error: str,
        labels: Sequence[str] | None,
        return_tensors: Any,
        resize: Callable[..., np.ndarray | None],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """As [`MimicProcessor.pixels`]; `resize` is what resizes each, as [`resized`] does."""
        if on_image_error not in ("raise", "warn"):
            raise ValueError(f'`on_image_error` must be "raise" or "warn", got {on_image_error!r}.')
        rows: list[np.ndarray | None] = []
        for row, source in enumerate(images):
            made = None
            try:
                resized = resize(source, **kwargs)
                if resized is not None:
                    made = self.normalized(resized, source, kwargs)
            except MimicImageError as error:
                message = f"{labels[row]}: {error}" if labels else str(error)
                if on_image_error == "raise":
                    raise MimicImageError(message) from error
                warnings.warn(f"{message.removesuffix('.')}. It is encoded without an image.", stacklevel=3)
            rows.append(made)
        blank = np.zeros(self.shape_of_absent(rows, kwargs), np.float32) if any(row is None for row in rows) else None
        made_rows = [blank if row is None else row for row in rows]
        if return_tensors is None:
            return made_rows
        if len({row.shape for row in made_rows if row is not None}) > 1:
            raise ValueError(
                "The images come out in different sizes, and make no tensor: leave `do_resize` on, give a `size` with "
                "height and width, or pass return_tensors=None."
            )
        return BatchFeature({"pixel_values": np.stack(cast(Any, made_rows))}, tensor_type=return_tensors)[
            "pixel_values"
        ]

    def resized(self, image: ImageInput, **kwargs: Any) -> np.ndarray | None:
        if kwargs.get("input_data_format") == "channels_first" and getattr(image, "ndim", 0) == 3:
            image = np.moveaxis(np.asarray(image), 0, -1)
        size = self._size(kwargs)
        square = (size["width"], size["height"]) if {"height", "width"} <= size.keys() else None
        do_resize = self._setting(kwargs, "do_resize")
        resample = self._setting(kwargs, "resample")
        loaded = load_image(
            image,
            correct=self.correct_images,
            resize=square if do_resize else None,
            resample=int(PILImageResampling.BILINEAR if resample is None else resample),
            reduce_jpeg=self.reduce_jpeg,
            fast_resize=self.fast_resize,
        )
        if loaded is None:
            return None
        options = {name: value for name, value in kwargs.items() if name in _OF_RESIZING}
        if square or not do_resize:
            options["do_resize"] = False
        else:
            check_size(*_resized_size(loaded.size, size), "that is resized")
        try:
            # As an array: of a PIL image the image processor would look at the transparency once more.
            array = np.asarray(loaded).transpose(2, 0, 1).copy()
            del loaded
            options |= {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
            made = self.image_processor([array], **options, return_tensors="np")
        except MemoryError as error:
            raise MimicImageError("The image needs more memory than there is.") from error
        return made["pixel_values"][0]

    def normalized(self, resized: np.ndarray, source: Any, kwargs: Mapping[str, Any]) -> np.ndarray:
        """What the model reads of an image that was resized, which was made of `source`."""
        options = {name: value for name, value in kwargs.items() if name not in (*_OF_RESIZING, "input_data_format")}
        if not self._setting(kwargs, "do_rescale") and _is_scaled(source):
            options |= {"do_rescale": True, "rescale_factor": 1 / 255}  # resizing has made bytes of it
        options |= {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
        made = self.image_processor([resized], **options, return_tensors="np")["pixel_values"][0]
        return made.astype(np.float32, copy=False)

    def _setting(self, kwargs: Mapping[str, Any], name: str) -> Any:
        value = kwargs.get(name)
        return getattr(self.image_processor, name, None) if value is None else value

    def _size(self, kwargs: Mapping[str, Any], name: str = "size") -> dict[str, int]:
        """A size of the call or of the image processor, with the sides that it has."""
        size = self._setting(kwargs, name)
        if size is None:
            return {}
        if not isinstance(size, Mapping) and not hasattr(size, "shortest_edge"):
            square = self._setting(kwargs, "default_to_square")
            size = get_size_dict(size, default_to_square=True if square is None else square, param_name=name)
        sides = size if isinstance(size, Mapping) else vars(size)
        return {side: value for side, value in sides.items() if value is not None}

    def shape_of_absent(self, rows: Sequence[np.ndarray | None], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of an absent image: that of the others, or what the settings make of every image."""
        for row in rows:
            if row is not None:
                return row.shape
        size: dict[str, int] = {}
        if self._setting(kwargs, "do_center_crop"):
            size = self._size(kwargs, "crop_size")
        elif self._setting(kwargs, "do_resize"):
            size = self._size(kwargs)
        if not {"height", "width"} <= size.keys():
            raise ValueError(
                "Nothing says how large an absent image is: give the image processor a `size` with height and width."
            )
        shape = (3, size["height"], size["width"])
        return (*shape[1:], 3) if kwargs.get("data_format") == "channels_last" else shape


# --- The image processor of a backbone


def image_processor_for(backbone_config: Any, own: dict[str, Any] | None = None) -> CLIPImageProcessorPil:
    """The image preprocessing for a backbone.

    Args:
        backbone_config: the backbone's configuration.
        own: settings of the checkpoint's own image processor; the family's usual ones where absent. For a CLIP only
            its mean and standard deviation count: the rest is as published (Lanczos, square, no crop).

    Raises:
        ValueError: if it makes images of another size than the backbone reads.
    """
    adapter = backbone_of(backbone_config)
    image_processor = CLIPImageProcessorPil(**adapter.image_settings(backbone_config, own))
    side, (height, width) = adapter.image_size(backbone_config), _size_of(image_processor)
    if (height, width) != (side, side):
        raise ValueError(
            f"The image processor of this {adapter.model_type!r} checkpoint makes images of {height} x {width} "
            f"pixels (0: of no fixed size), but the model reads {side} x {side}. Correct `size` and `crop_size` "
            "in its preprocessor_config.json."
        )
    return image_processor


def settings_of(image_processor: Any) -> dict[str, Any]:
    """Those settings of an image processor, of whatever backend, that CLIP's has too."""
    settings = image_processor.to_dict()
    names = ["size", "crop_size", "resample", "do_center_crop", "do_resize", "do_rescale", "do_normalize"]
    names += ["rescale_factor", "image_mean", "image_std"]
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _size_of(image_processor: Any) -> tuple[int, int]:
    """Height and width, in pixels, of the images that an image processor makes; zeros where they are not fixed."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    try:
        return int(size["height"]), int(size["width"])
    except (KeyError, TypeError):
        return 0, 0


# --- Sizes


def _resized_size(given: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """The width and height that a size without a fixed shape makes of an image, at most."""
    width, height = given
    scale = 1.0
    if "shortest_edge" in size:
        scale = size["shortest_edge"] / min(given)
    if "longest_edge" in size:
        limit = size["longest_edge"] / max(given)
        scale = min(scale, limit) if "shortest_edge" in size else limit
    return round(width * scale), round(height * scale)


def _is_scaled(source: Any) -> bool:
    """Whether an image is an array of floats from 0 to 1."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    return isinstance(source, np.ndarray) and source.dtype.kind == "f" and bool(source.max(initial=0) <= 1)


__all__ = ["ImagePreparation", "image_processor_for", "settings_of"]

"""What MIMIC reads: the text templates, the tokenizer and the image_list of mentions and entities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.utils import logging

from .backbones_mimic import backbone_of
from .configuration_mimic import HUB_KWARGS, MimicConfig
from .errors_mimic import MimicImageError
from .images_mimic import ImageInput, first_image, load_image

logger = logging.get_logger(__name__)

_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "device_map", "attn_implementation", "max_memory", "quantization_config")


class MimicProcessor(ProcessorMixin):
    """Turns the texts and image_list of mentions and entities into the tensors of a [`MimicModel`].

    A mention's text is `mention + " [SEP] " + sentence`, an entity's `name + " [SEP] " + description`, truncated and
    padded to `text_max_length` tokens. An image is resized to the backbone's square without keeping its proportions
    and normalized; where there is none, the normalized image is all zeros.

    Args:
        image_processor (`CLIPImageProcessorPil`): resizes, perhaps crops, and normalises image_list.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's.
        text_max_length (`int`, defaults to 40): number of tokens of every text.
        correct_images (`bool`, defaults to `True`): whether a camera's orientation is applied, transparency shows
            white and 16-bit image_list are scaled. The published code does none of these.

    Example:

    ```python
    >>> processor = MimicProcessor.from_backbone("openai/clip-vit-base-patch32")
    >>> inputs = processor.process_mentions(["Orange"], ["Orange opened a shop on the corner."], ["photo.png"])
    >>> inputs["pixel_values"].shape
    torch.Size([1, 3, 224, 224])
    ```
    """

    _auto_class = "AutoProcessor"
    separator = " [SEP] "

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        text_max_length: int = 40,
        correct_images: bool = True,
        **kwargs: Any,
    ) -> None:
        if image_processor is not None and not isinstance(image_processor, CLIPImageProcessorPil):
            # Where torchvision is installed transformers loads that backend, whose pixels differ.
            image_processor = CLIPImageProcessorPil(**_image_settings(image_processor))
        super().__init__(image_processor, tokenizer, **kwargs)
        if not isinstance(text_max_length, int) or text_max_length < 3:
            raise ValueError(
                f"MimicProcessor: `text_max_length` must be an integer of 3 or more, got {text_max_length!r}."
            )
        if tokenizer.pad_token is None:
            raise ValueError("MimicProcessor: the tokenizer has no padding token; set `tokenizer.pad_token`.")
        self.text_max_length = text_max_length
        self.correct_images = correct_images

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """A checkpoint's processor; arguments as of any processor."""
        for name in _MODEL_ARGUMENTS:
            # pipeline() passes them on. The tokenizer would take them for its own, and fail to save them.
            kwargs.pop(name, None)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str],
        config: MimicConfig | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The processor of a MIMIC model on top of a pretrained dual encoder.

        Images are prepared as the checkpoint's own image processor does it. On a CLIP they are as the published model
        has them: the whole image resized to the square, without a crop.

        Args:
            backbone: Hub id or directory of a checkpoint with its tokenizer.
            config: the model's configuration; read from the checkpoint if absent.
            trust_remote_code: whether a tokenizer that brings its own code may run it.
            **kwargs: what finds the checkpoint (`revision`, `cache_dir`, `token`, ...), and `correct_images`.

        Raises:
            TypeError, ValueError: if the checkpoint is of a type that is not supported, or its tokenizer or its image
                processor do not fit it.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        if config is None:
            config = MimicConfig.from_backbone(backbone, **hub_kwargs)
        tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=trust_remote_code, **hub_kwargs)
        try:
            own, _ = CLIPImageProcessorPil.get_image_processor_dict(backbone, **hub_kwargs)
        except OSError:
            own = None
        image_processor = cls.image_processor_for(config.backbone_config, own)
        return cls(image_processor, tokenizer, text_max_length=config.text_max_length, **kwargs)

    @staticmethod
    def image_processor_for(backbone_config: Any, own: dict[str, Any] | None = None) -> CLIPImageProcessorPil:
        """The image preprocessing for a backbone.

        Args:
            backbone_config: the backbone's configuration.
            own: settings of the checkpoint's own image processor; the family's usual ones where absent. For a CLIP
                only its mean and standard deviation count: the rest is as published (Lanczos, square, no crop).

        Raises:
            ValueError: if it makes images of another size than the backbone reads.
        """
        adapter = backbone_of(backbone_config)
        image_processor = CLIPImageProcessorPil(**adapter.image_settings(backbone_config, own))
        side, (height, width) = adapter.image_size(backbone_config), image_size_of(image_processor)
        if (height, width) != (side, side):
            raise ValueError(
                f"The image processor of this {adapter.model_type!r} checkpoint makes images of {height} x {width} "
                f"pixels (0: of no fixed size), but the model reads {side} x {side}. Correct `size` and `crop_size` "
                "in its preprocessor_config.json."
            )
        return image_processor

    def process_mentions(
        self,
        mentions: Sequence[str] | str,
        texts: Sequence[str] | str,
        images: Sequence[ImageInput] | ImageInput = None,
        on_image_error: str = "raise",
    ) -> BatchFeature:
        """The model's inputs for M mentions.

        Args:
            mentions: what each mention says ("Orange"). It need not occur in its sentence, and may be empty.
            texts: the sentence of each.
            images: the image of each, or `None`: see [`load_image`] for what an image may be.
            on_image_error: "raise", or "warn" to go on without an image that cannot be read, as training does.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, int64 of shape (M, text_max_length), and
            `pixel_values`, float32 of shape (M, 3, height, width).

        Raises:
            ValueError: if the numbers of mentions, texts and images differ, or there are none.
            MimicImageError: if an image cannot be read and `on_image_error` is "raise".
        """
        return self._process("mentions", "texts", mentions, texts, images, on_image_error)

    def process_entities(
        self,
        names: Sequence[str] | str,
        descriptions: Sequence[str] | str,
        images: Sequence[ImageInput | Sequence[ImageInput]] | ImageInput = None,
        on_image_error: str = "raise",
        labels: Sequence[str] | None = None,
    ) -> BatchFeature:
        """The model's inputs for N entities.

        Args:
            names: the name of each entity.
            descriptions: the description of each; may be empty.
            images: the image of each, or the list of its image_list, of which the first is used, or `None`.
            on_image_error: as in [`~MimicProcessor.process_mentions`].
            labels: what messages call each entity, such as "Entity 'Q5'".

        Returns, raises: as [`~MimicProcessor.process_mentions`].
        """
        if isinstance(images, Sequence) and not isinstance(images, str | bytes) and not isinstance(names, str):
            images = [first_image(item) for item in images]
        elif isinstance(names, str):
            images = first_image(images)
        return self._process("names", "descriptions", names, descriptions, images, on_image_error, labels)

    def _process(
        self,
        heads_name: str,
        bodies_name: str,
        heads: Sequence[str] | str,
        bodies: Sequence[str] | str,
        images: Any,
        on_image_error: str,
        labels: Sequence[str] | None = None,
    ) -> BatchFeature:
        if isinstance(heads, str) or isinstance(bodies, str):
            if not (isinstance(heads, str) and isinstance(bodies, str)):
                raise ValueError(f"`{heads_name}` and `{bodies_name}` must both be strings, or both lists of strings.")
            heads, bodies, images = [heads], [bodies], [images]
        heads, bodies = list(heads), list(bodies)
        image_list = [None] * len(heads) if images is None else list(images)
        if not len(heads) == len(bodies) == len(image_list) or not heads:
            raise ValueError(
                f"There must be as many {heads_name} as {bodies_name} and images, and one at least; got {len(heads)}, "
                f"{len(bodies)} and {len(image_list)}."
            )
        for name, items in ((heads_name, heads), (bodies_name, bodies)):
            for row, item in enumerate(items):
                if not isinstance(item, str):
                    raise ValueError(f"`{name}[{row}]` must be a string, got {type(item).__name__}.")
        inputs = self.tokenize([head + self.separator + body for head, body in zip(heads, bodies, strict=True)])
        inputs["pixel_values"] = self.pixels(image_list, on_image_error, labels)
        return inputs

    def tokenize(self, texts: list[str]) -> BatchFeature:
        """`input_ids` and `attention_mask` of texts that already have their template, each (B, text_max_length)."""
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.text_max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return BatchFeature({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})

    def pixels(
        self, images: Sequence[ImageInput], on_image_error: str = "raise", labels: Sequence[str] | None = None
    ) -> torch.Tensor:
        """Normalized images, float32 of shape (B, 3, height, width); zeros where there is none.

        Args:
            images: B images, or `None`.
            on_image_error: "raise", or "warn" to go on without an image that cannot be read.
            labels: what messages call each item.

        Raises:
            MimicImageError: if an image cannot be read and `on_image_error` is "raise".
        """
        if on_image_error not in ("raise", "warn"):
            raise ValueError(f'`on_image_error` must be "raise" or "warn", got {on_image_error!r}.')
        pixel_values = torch.zeros(len(images), 3, *image_size_of(self.image_processor))
        for row, source in enumerate(images):
            try:
                # One at a time: an image may take a hundred times as much memory as its file.
                resized = self.resized(source)
            except MimicImageError as error:
                message = f"{labels[row]}: {error}" if labels else str(error)
                if on_image_error == "raise":
                    raise MimicImageError(message) from error
                warnings.warn(f"{message} It is encoded without an image.", stacklevel=2)
                continue
            if resized is not None:
                pixel_values[row] = self.normalized(resized)
        return pixel_values

    def resized(self, image: ImageInput) -> np.ndarray | None:
        """An image in the backbone's size, uint8 of shape (3, height, width); `None` where there is none.

        With `correct_images` it is made RGB first; without, it is resized as it is stored and made RGB then, which is
        what the published code does (palette and bilevel images come out otherwise).

        Raises:
            MimicImageError: if it cannot be read.
        """
        if self.correct_images or self.image_processor.do_center_crop:
            loaded = load_image(image, correct=self.correct_images)
            if loaded is None:
                return None
            made = self.image_processor([loaded], do_rescale=False, do_normalize=False, return_tensors="np")
            return made["pixel_values"][0]
        size, resample = self.image_processor.size, self.image_processor.resample
        loaded = load_image(image, correct=False, resize=(size["width"], size["height"]), resample=int(resample))
        return None if loaded is None else np.asarray(loaded).transpose(2, 0, 1).copy()

    def normalized(self, resized: np.ndarray) -> torch.Tensor:
        """What the model reads of a resized image: float32 of shape (3, height, width)."""
        made = self.image_processor(
            [resized], do_resize=False, do_center_crop=False, input_data_format="channels_first", return_tensors="pt"
        )
        return made["pixel_values"][0].float()

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        mention: Sequence[str] | str | None = None,
        name: Sequence[str] | str | None = None,
        description: Sequence[str] | str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """The model's inputs of mentions, of entities, or of texts that have their template already.

        ```python
        >>> processor(mention="Orange", text="Orange opened a shop.", images="photo.png")  # as process_mentions
        >>> processor(name="Orange", description="A company.", images="logo.png")  # as process_entities
        ```

        Args:
            images, text: as in [`~MimicProcessor.process_mentions`]; `text` alone is tokenized as it is.
            mention: what each mention says.
            name, description: of each entity.
            return_tensors: "pt".

        Raises:
            ValueError: if mentions and entities are mixed, or nothing is given.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(
                f'MimicProcessor makes PyTorch tensors: `return_tensors` must be "pt", got {return_tensors!r}.'
            )
        if mention is not None and (name is not None or description is not None):
            raise ValueError(
                "Give MimicProcessor mentions (`mention=`, `text=`) or entities (`name=`, `description=`)."
            )
        if mention is not None:
            if text is None:
                raise ValueError("A mention needs its text: processor(mention=..., text=..., images=...).")
            return self.process_mentions(mention, text, images)
        if name is not None:
            if text is not None:
                raise ValueError("An entity has a `description`, not a `text`: processor(name=..., description=...).")
            if description is None:
                description = "" if isinstance(name, str) else [""] * len(name)
            return self.process_entities(name, description, images)
        if text is None and images is None:
            raise ValueError(
                "MimicProcessor needs `mention=` and `text=`, or `name=` and `description=`, or `images=`."
            )
        inputs = BatchFeature({})
        if text is not None:
            logger.warning_once(
                "MimicProcessor: `text` without `mention` is tokenized as it is. The model was trained on texts with a "
                "template: use processor(mention=..., text=...) or processor(name=..., description=...)."
            )
            inputs.update(self.tokenize([text] if isinstance(text, str) else list(text)))
        if images is not None:
            several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
            inputs["pixel_values"] = self.pixels(images if several else [images])
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def image_size_of(image_processor: Any) -> tuple[int, int]:
    """Height and width, in pixels, of the images that an image processor makes; zeros where they are not fixed."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    try:
        return int(size["height"]), int(size["width"])
    except (KeyError, TypeError):
        return 0, 0


def _image_settings(image_processor: Any) -> dict[str, Any]:
    settings = image_processor.to_dict()
    names = ["size", "crop_size", "resample", "do_center_crop", "do_resize", "do_rescale", "do_normalize"]
    names += ["rescale_factor", "image_mean", "image_std"]
    return {name: settings[name] for name in names if settings.get(name) is not None}


__all__ = ["MimicProcessor", "image_size_of"]

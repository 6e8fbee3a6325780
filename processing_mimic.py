"""What MIMIC reads: the text templates, the tokenizer and the images of mentions and entities."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.utils import logging

from .configuration_mimic import HUB_KWARGS, MimicConfig, check_context_window
from .images_mimic import ImageInput, first_image, listed
from .preparation_mimic import ImagePreparation, image_processor_for, settings_of
from .saving_mimic import damage_told, save_and_push
from .templates_mimic import TextTemplate
from .texts_mimic import check_unicode

logger = logging.get_logger(__name__)

_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "device_map", "attn_implementation", "max_memory", "quantization_config")


class MimicProcessor(ProcessorMixin):
    """Turns the texts and images of mentions and entities into the tensors of a [`MimicModel`].

    A mention's text is `mention + " [SEP] " + sentence`, an entity's `name + " [SEP] " + description`, truncated and
    padded to `text_max_length` tokens. An image is resized to the backbone's square without keeping its proportions
    and normalized; where there is none, the normalized image is all zeros.

    Args:
        image_processor (`CLIPImageProcessorPil`): resizes, perhaps crops, and normalizes images.
        tokenizer (`PreTrainedTokenizerBase`): the backbone's.
        text_max_length (`int`, defaults to 40): number of tokens of every text.
        correct_images (`bool`, defaults to `True`): whether a camera's orientation is applied, transparency shows
            white and 16-bit images are scaled. The published code does none of these.
        context_window (`str`, defaults to "start"): which part of a mention's text is read where not all of it fits:
            see [`MimicConfig`], whose value it should have.
        reduce_jpeg (`bool`, defaults to `False`): whether large JPEG files are decoded at a fraction of their size,
            which is faster, and off by a few of 255 levels in places.
        fast_resize (`bool`, defaults to `False`): whether torch shrinks images to the backbone's square, which is many
            times as fast as Pillow, and off by 1 of 255 levels in places. Where torch has not the filter (Lanczos is
            new there), or the image processor crops, Pillow does it as before.

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
    image_processor_for = staticmethod(image_processor_for)

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        text_max_length: int = 40,
        correct_images: bool = True,
        context_window: str = "start",
        reduce_jpeg: bool = False,
        fast_resize: bool = False,
        **kwargs: Any,
    ) -> None:
        if image_processor is not None and not isinstance(image_processor, CLIPImageProcessorPil):
            # Where torchvision is installed transformers loads that backend, whose pixels differ.
            image_processor = CLIPImageProcessorPil(**settings_of(image_processor))
        super().__init__(image_processor, tokenizer, **kwargs)
        if not isinstance(text_max_length, int) or text_max_length < 3:
            raise ValueError(
                f"MimicProcessor: `text_max_length` must be an integer of 3 or more, got {text_max_length!r}."
            )
        if tokenizer.pad_token is None:
            raise ValueError("MimicProcessor: the tokenizer has no padding token; set `tokenizer.pad_token`.")
        self.text_max_length = text_max_length
        self.correct_images = correct_images
        check_context_window("MimicProcessor", context_window)
        self.context_window = context_window
        self.reduce_jpeg = reduce_jpeg
        self.fast_resize = fast_resize

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """A checkpoint's processor; arguments as of any processor.

        Raises:
            LoadError: if its files are damaged.
        """
        for name in _MODEL_ARGUMENTS:
            # pipeline() passes them on. The tokenizer would take them for its own, and fail to save them.
            kwargs.pop(name, None)
        with damage_told("processor", pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Saves the processor and its code; arguments, and what is returned, as of any processor.

        Raises:
            SaveError: if the directory cannot be written, such as on a full disk. What was there is then as it was.
        """
        parts = (self, self.image_processor)
        before = [getattr(part, "auto_map", None) for part in parts]
        try:
            saved = save_and_push(save_directory, super().save_pretrained, push_to_hub, **kwargs)
            return [os.path.join(save_directory, os.path.basename(path)) for path in saved]
        finally:
            # Where the code is belongs to what was saved, and not to what saved it.
            for part, auto_map in zip(parts, before, strict=True):
                if auto_map is None and hasattr(part, "auto_map"):
                    del part.auto_map

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
        kwargs.setdefault("context_window", config.context_window)
        return cls(image_processor, tokenizer, text_max_length=config.text_max_length, **kwargs)

    def process_mentions(
        self,
        mentions: Sequence[str] | str,
        texts: Sequence[str] | str,
        images: Sequence[ImageInput] | ImageInput = None,
        on_image_error: str = "raise",
        starts: Sequence[int | None] | int | None = None,
        ends: Sequence[int | None] | int | None = None,
        context_window: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The model's inputs for M mentions.

        Args:
            mentions: what each mention says ("Orange"). It need not occur in its sentence, and may be empty.
            texts: the sentence of each.
            images: the image of each, or `None`: see [`load_image`] for what an image may be.
            on_image_error: "raise", or "warn" to go on without an image that cannot be read, as training does.
            starts, ends, context_window: as in [`~MimicProcessor.mention_texts`].
            **kwargs: what any processor of transformers takes: `return_tensors` ("pt" unless told), `padding`,
                `truncation` and `max_length` for texts, `size`, `do_resize` and the like for images.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, int64 of shape (M, text_max_length), and
            `pixel_values`, float32 of shape (M, 3, height, width).

        Raises:
            ValueError: if the numbers of mentions, texts and images differ, there are none, a text is no valid
                Unicode, or a mention has several images.
            MimicImageError: if an image cannot be read and `on_image_error` is "raise".
        """
        rows = _one_for_each("mentions", mentions, images)
        for row, image in enumerate(rows):
            if len(listed(image)) > 1:
                raise ValueError(f"A mention has one image; `images[{row}]` has {len(image)}.")
        if isinstance(mentions, str):
            starts, ends = [starts], [ends]  # type: ignore[list-item]

        def template(heads: list[str], bodies: list[str]) -> list[str]:
            return self.mention_texts(heads, bodies, starts, ends, context_window)  # type: ignore[arg-type]

        return self._process("mentions", "texts", mentions, texts, rows, template, on_image_error, **kwargs)

    def mention_texts(
        self,
        mentions: Sequence[str],
        texts: Sequence[str],
        starts: Sequence[int | None] | None = None,
        ends: Sequence[int | None] | None = None,
        context_window: str | None = None,
    ) -> list[str]:
        """The template of M mentions, filled: what [`~MimicProcessor.tokenize`] takes.

        Args:
            mentions, texts: as in [`~MimicProcessor.process_mentions`].
            starts, ends: where each mention is in its text, in characters; where that is not known the first place at
                which it occurs is taken. They are of use for the window "mention" only.
            context_window: "start" fills in the text from its start. "mention" does so where all of it fits in
                `text_max_length` tokens, and else the words around the mention, as many as fit; a text in which the
                mention does not occur is read from its start. By default the processor's own.

        Raises:
            ValueError: if a place is not in its text, or there is no such window.
        """
        window = self.context_window if context_window is None else context_window
        check_context_window("MimicProcessor", window)
        if window == "start":
            return self._template.filled(mentions, texts)
        return self._template.around_mentions(mentions, texts, starts, ends)

    def entity_texts(self, names: Sequence[str], descriptions: Sequence[str]) -> list[str]:
        """The template of N entities, filled: what [`~MimicProcessor.tokenize`] takes."""
        return self._template.filled(names, descriptions)

    @property
    def _template(self) -> TextTemplate:
        return TextTemplate(self.tokenizer, self.text_max_length, self.separator)

    def process_entities(
        self,
        names: Sequence[str] | str,
        descriptions: Sequence[str] | str,
        images: Sequence[ImageInput | Sequence[ImageInput]] | ImageInput = None,
        on_image_error: str = "raise",
        labels: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The model's inputs for N entities.

        Args:
            names: the name of each entity.
            descriptions: the description of each; may be empty.
            images: the image of each, or the list of its images, of which the first is used, or `None`.
            on_image_error: as in [`~MimicProcessor.process_mentions`].
            labels: what messages call each entity, such as "Entity 'Q5'".
            **kwargs: as in [`~MimicProcessor.process_mentions`].

        Returns, raises: as [`~MimicProcessor.process_mentions`].
        """
        rows = _one_for_each("names", names, images)
        return self._process(
            "names", "descriptions", names, descriptions, rows, self.entity_texts, on_image_error, labels, **kwargs
        )

    def _process(
        self,
        heads_name: str,
        bodies_name: str,
        heads: Sequence[str] | str,
        bodies: Sequence[str] | str,
        images: list[Any],
        template: Callable[[list[str], list[str]], list[str]],
        on_image_error: str,
        labels: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        heads, bodies = _checked_pairs(heads_name, bodies_name, heads, bodies, len(images))
        options = self._merge_kwargs(**kwargs) if kwargs else {}
        inputs = self.tokenize(template(heads, bodies), **options.get("text_kwargs", {}))
        firsts = [first_image(image) for image in images]
        inputs["pixel_values"] = self.pixels(firsts, on_image_error, labels, **options.get("images_kwargs", {}))
        return inputs

    def _merge_kwargs(
        self, ModelProcessorKwargs: Any = None, tokenizer_init_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What a call says, by what it is for; where it says nothing, the published way of reading texts."""
        kinds: Any = self.valid_processor_kwargs if ModelProcessorKwargs is None else ModelProcessorKwargs
        merged = super()._merge_kwargs(kinds, tokenizer_init_kwargs=tokenizer_init_kwargs, **kwargs)
        merged["text_kwargs"] = {**self._template.usual_options, **merged["text_kwargs"]}
        merged["images_kwargs"].setdefault("return_tensors", "pt")
        return merged

    def tokenize(self, texts: list[str], **kwargs: Any) -> BatchFeature:
        """`input_ids` and `attention_mask` of texts that already have their template, each (B, text_max_length).

        Args:
            texts: B texts. Of a long one only the part that the tokens can need is looked at.
            **kwargs: what the tokenizer takes; by default texts are cut and padded to `text_max_length` tokens.
        """
        return self._template.tokenized(texts, **kwargs)

    def pixels(
        self,
        images: Sequence[ImageInput],
        on_image_error: str = "raise",
        labels: Sequence[str] | None = None,
        return_tensors: Any = "pt",
        **kwargs: Any,
    ) -> Any:
        """Normalized images, float32 of shape (B, 3, height, width); zeros where there is none.

        Args:
            images: B images, or `None`.
            on_image_error: "raise", or "warn" to go on without an image that cannot be read.
            labels: what messages call each item.
            return_tensors: "pt", "np", or `None` for a list of arrays.
            **kwargs: what the image processor takes (`size`, `do_resize`, ...).

        Raises:
            MimicImageError: if an image cannot be read and `on_image_error` is "raise".
            ValueError: if the images come out in different sizes, or no size says how large an absent one is.
        """
        return self._preparation.pixels(images, on_image_error, labels, return_tensors, self.resized, kwargs)

    def resized(self, image: ImageInput, **kwargs: Any) -> np.ndarray | None:
        """An image in the backbone's size, uint8 of shape (3, height, width); `None` where there is none.

        With `correct_images` it is made RGB first; without, it is resized as it is stored and made RGB then, which is
        what the published code does (palette and bilevel images come out otherwise).

        Args:
            image: see [`load_image`].
            **kwargs: what the image processor takes (`size`, `do_resize`, ...).

        Raises:
            MimicImageError: if it cannot be read.
        """
        return self._preparation.resized(image, **kwargs)

    def normalized(self, resized: np.ndarray, **kwargs: Any) -> torch.Tensor:
        """What the model reads of a resized image: float32 of shape (3, height, width)."""
        return torch.from_numpy(self._preparation.normalized(resized, None, kwargs))

    def blank_pixels(self, count: int) -> torch.Tensor:
        """What the model reads where there is no image: zeros of shape (count, 3, height, width)."""
        return torch.zeros(count, *self._preparation.shape_of_absent([], {}))

    @property
    def _preparation(self) -> ImagePreparation:
        return ImagePreparation(self.image_processor, self.correct_images, self.reduce_jpeg, self.fast_resize)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        mention: Sequence[str] | str | None = None,
        name: Sequence[str] | str | None = None,
        description: Sequence[str] | str | None = None,
        **kwargs: Any,
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
            **kwargs: what any processor of transformers takes, plain or in `text_kwargs` and `images_kwargs`:
                `return_tensors` ("pt" unless told), `padding`, `truncation`, `max_length`, `size`, `do_resize`, ...

        Raises:
            ValueError: if mentions and entities are mixed, or nothing is given.
        """
        for other in ("videos", "audio"):
            if kwargs.pop(other, None) is not None:
                raise ValueError(f"MimicProcessor reads texts and images; it has no use for `{other}`.")
        _check_call(images, text, mention, name, description)
        if mention is not None:
            return self.process_mentions(mention, text, images, **kwargs)
        if name is not None:
            if description is None:
                description = "" if isinstance(name, str) else [""] * len(name)
            return self.process_entities(name, description, images, **kwargs)
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        inputs = BatchFeature({})
        if text is not None:
            logger.warning_once(
                "MimicProcessor: `text` without `mention` is tokenized as it is. The model was trained on texts with a "
                "template: use processor(mention=..., text=...) or processor(name=..., description=...)."
            )
            one = isinstance(text, str)
            texts = [text] if one else list(text)
            _check_texts("text", texts)
            tokens = self.tokenize(texts, **options["text_kwargs"])
            if one and options["text_kwargs"]["return_tensors"] is None:
                tokens = BatchFeature({key: value[0] for key, value in tokens.items()})
            inputs.update(tokens)
        if images is not None:
            inputs["pixel_values"] = self.pixels(_flat(images), **options["images_kwargs"])
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _check_call(images: Any, text: Any, mention: Any, name: Any, description: Any) -> None:
    """Refuses a call that gives both mentions and entities, half of one, or nothing."""
    if mention is not None and (name is not None or description is not None):
        raise ValueError("Give MimicProcessor mentions (`mention=`, `text=`) or entities (`name=`, `description=`).")
    if mention is not None and text is None:
        raise ValueError("A mention needs its text: processor(mention=..., text=..., images=...).")
    if name is not None and text is not None:
        raise ValueError("An entity has a `description`, not a `text`: processor(name=..., description=...).")
    if mention is None and name is None and text is None and images is None:
        raise ValueError("MimicProcessor needs `mention=` and `text=`, or `name=` and `description=`, or `images=`.")


def _checked_pairs(
    heads_name: str, bodies_name: str, heads: Sequence[str] | str, bodies: Sequence[str] | str, images: int
) -> tuple[list[str], list[str]]:
    """Mentions and texts, or names and descriptions, as lists: as many of either as there are images, all strings."""
    if isinstance(heads, str) or isinstance(bodies, str):
        if not (isinstance(heads, str) and isinstance(bodies, str)):
            raise ValueError(f"`{heads_name}` and `{bodies_name}` must both be strings, or both lists of strings.")
        heads, bodies = [heads], [bodies]
    heads, bodies = list(heads), list(bodies)
    if not len(heads) == len(bodies) == images or not heads:
        raise ValueError(
            f"There must be as many {heads_name} as {bodies_name} and images, and one at least; got {len(heads)}, "
            f"{len(bodies)} and {images}."
        )
    _check_texts(heads_name, heads)
    _check_texts(bodies_name, bodies)
    return heads, bodies


def _check_texts(name: str, texts: Sequence[Any]) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}[{row}]` must be a string, got {type(text).__name__}.")
        check_unicode(text, f"`{name}[{row}]`")


def _one_for_each(name: str, heads: Sequence[str] | str, images: Any) -> list[Any]:
    """The images of each of some mentions or entities."""
    if isinstance(heads, str):
        return [images]
    if images is None:
        return [None] * len(heads)
    one = isinstance(images, str | bytes | bytearray | os.PathLike | Mapping) or not hasattr(images, "__iter__")
    if one or hasattr(images, "read") or getattr(images, "ndim", 4) in (2, 3):
        raise ValueError(f"`{name}` is a list, so `images` must be a list too, with the image of each or None.")
    return list(images)


def _flat(images: Any) -> list[Any]:
    """Images of a call without a template, one after the other; an empty list among them is an absent one."""
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    if not isinstance(images, list | tuple):
        return listed(images) or [None]
    flat: list[Any] = []
    for image in images:
        flat.extend(_flat(image) if isinstance(image, list | tuple) and image else [first_image(image)])
    return flat


__all__ = ["MimicProcessor"]

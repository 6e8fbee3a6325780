"""Mentions on their way into a search: what users give is checked, read and encoded.

Both the index, for plain mentions, and the pipeline take mentions apart here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from .images_mimic import ImageInput
from .matching_mimic import Matcher, MentionFeatures
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .records_mimic import is_absent, placed_record, places_of, undecoded
from .store_mimic import layout_of, mention_layout
from .texts_mimic import check_unicode


def mention_parts(mention: Any) -> tuple[str, str, ImageInput]:
    """The mention, its text and its image, of a dict with `mention`, `text` (or `sentence`) and perhaps `image`.

    Raises:
        ValueError: if it is no such dict.
    """
    if not isinstance(mention, Mapping):
        raise ValueError(
            'A mention must be a dict such as {"mention": "Orange", "text": "Orange opened a shop.", "image": '
            f'"photo.png"}}; got {type(mention).__name__}.'
        )
    text: Any = mention.get("sentence") if mention.get("text") is None else mention["text"]
    for name, value in (("mention", mention.get("mention")), ("text", text)):
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"must be a string, got {type(value).__name__}"
            raise ValueError(f"`{name}` of a mention {problem}; the mention's keys are {sorted(mention)}.")
        check_unicode(value, f"`{name}` of a mention")
    if not mention["mention"].strip():
        raise ValueError("`mention` is empty: say which words of the text are to be linked.")
    image = mention.get("image")
    return mention["mention"], text, None if is_absent(image) else image


def encoded_mentions(
    model: MimicModel,
    processor: MimicProcessor,
    mentions: Iterable[Mapping[str, Any]],
    batch_size: int = 32,
    on_image_error: str = "raise",
    show_progress: bool = False,
) -> MentionFeatures | None:
    """Features of mentions as users give them, on the model's device; `None` where there are none.

    Raises:
        ValueError: if a mention is not as [`mention_parts`] says.
        MimicImageError: if an image cannot be read and `on_image_error` is "raise".
    """
    places = places_of(mentions, "image")
    parts = [mention_parts(placed_record(mention, "image", places)) for mention in undecoded(mentions, "image")]
    batches = []
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(parts), batch_size), desc="Encoding mentions", disable=not show_progress):
            heads, texts, images = (list(column) for column in zip(*parts[start : start + batch_size], strict=True))
            inputs = processor.process_mentions(heads, texts, images, on_image_error)
            with torch.inference_mode():
                batches.append(model.encode_mentions(**{name: t.to(model.device) for name, t in inputs.items()}))
    finally:
        model.train(was_training)
    return MentionFeatures.cat(batches) if batches else None


def checked_mentions(mentions: MentionFeatures, matcher: Matcher) -> MentionFeatures:
    """Mentions that a matcher can score, in float32 at most.

    Raises:
        TypeError: if they are no features of mentions.
        ValueError: if they are another model's, or not finite.
    """
    if getattr(mentions, "side", None) != "mention":
        raise TypeError(
            f"An index is searched with MentionFeatures, from model.encode_mentions; got {type(mentions).__name__}."
        )
    with torch.no_grad():
        expected = mention_layout(matcher)
    if layout_of(mentions.tensors) != expected:
        raise ValueError(f"These are not features of this index's model: their names or shapes differ ({mentions!r}).")
    for name, tensor in mentions.tensors.items():
        finite = torch.isfinite(tensor.flatten(1)).all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"The features of mention {row} are not finite (`{name}`): they have no order.")
    return mentions if mentions.dtype != torch.float64 else mentions.to(torch.float32)


__all__ = ["checked_mentions", "encoded_mentions", "mention_parts"]

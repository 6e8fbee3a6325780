"""Mentions on their way into a search: what users give is checked, read and encoded.

Both the index and the pipeline use this file for single mentions. An error names the row or id of the mention, and
both handle it in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .errors_mimic import MentionError, MimicError
from .features_mimic import can_be_scored
from .images_mimic import ImageInput, only_image
from .matching_mimic import Matcher, MentionFeatures, MimicEncoderOutput
from .modeling_mimic import MimicModel
from .precision_mimic import layout_of, mention_layout
from .processing_mimic import MimicProcessor
from .records_mimic import is_absent, placed_record, places_of, undecoded
from .spans_mimic import checked_place
from .texts_mimic import check_unicode

ON_ERROR = ("raise", "warn", "return")
MAX_CHARACTERS = 10_000_000


@dataclass
class MentionImage:
    """The image of one mention, or of all mentions of a document: it is read once and encoded once.

    Args:
        pixels (`torch.Tensor` of shape `(3, H, W)`): as the model reads it; zeros where there is none.
        shared: whether several mentions have it, so that what is made of it is kept.
        encoded: its `image_embeds` and `image_tokens`, once they were made.
    """

    pixels: Tensor
    shared: bool = False
    encoded: tuple[Tensor, Tensor] | None = None


@dataclass
class Mention:
    """A mention that was checked.

    Args:
        mention, text: what is linked, and the text around it.
        image: beside it.
        start, end: where it is in the text; `None` where that is not known.
        candidates: as the user gave them; `None` for those of the call.
        window: the context window, see [`MimicConfig`].
        source: the image as the user gave it.
    """

    mention: str
    text: str
    image: MentionImage
    start: int | None = None
    end: int | None = None
    candidates: Any = None
    window: str = "start"
    source: Any = None


# --- What users give --------------------------------------------------------------------------------------------------


def mention_parts(mention: Any) -> tuple[str, str, ImageInput]:
    """The mention, its text and its image, of a dict with `mention`, `text` (or `sentence`) and perhaps `image`.

    Raises:
        MentionError: if it is not such a dict.
    """
    record = checked_record(mention)
    parts = [checked_text(record, "mention"), checked_text(record, "text")]
    if not parts[0].strip():
        raise MentionError("`mention` is empty: say which words of the text are to be linked.")
    return parts[0], parts[1], image_of(record)


def mention_place(record: Mapping[str, Any], mention: str, text: str) -> tuple[int | None, int | None]:
    """Where a mention says that it is in its text, checked; `None` where it does not say.

    Raises:
        MentionError: if that is not a place in the text.
    """
    start, end = (record.get(name) for name in ("start", "end"))
    if is_absent(start) and is_absent(end):
        return None, None  # looked for when it is needed
    try:
        place = checked_place(mention, text, start, end)
    except ValueError as error:
        raise MentionError(f"The place of the mention {mention[:40]!r}: {error}") from error
    return place or (None, None)


def checked_record(record: Any) -> Mapping[str, Any]:
    """A mention or document, if it is a dict.

    Raises:
        MentionError: if it is not.
    """
    if not isinstance(record, Mapping):
        raise MentionError(
            'A mention must be a dict such as {"mention": "Orange", "text": "Orange opened a shop.", "image": '
            f'"photo.png"}}; got {type(record).__name__}.'
        )
    return record


def checked_text(record: Mapping[str, Any], name: str) -> str:
    """The mention or the text of a record; `sentence` is another word for `text`.

    Raises:
        MentionError: if it is missing, no string, no valid Unicode, or too long.
    """
    value: Any = record.get(name)
    if name == "text" and is_absent(value):
        value = record.get("sentence")
    if not isinstance(value, str):
        problem = "is missing" if is_absent(value) else f"must be a string, got {type(value).__name__}"
        raise MentionError(f"`{name}` of a mention {problem}; the mention's keys are {sorted(map(str, record))}.")
    try:
        check_unicode(value, f"`{name}` of a mention")
    except ValueError as error:
        raise MentionError(str(error)) from error
    if len(value) > MAX_CHARACTERS:
        raise MentionError(
            f"`{name}` of a mention has {len(value):,} characters, more than the {MAX_CHARACTERS:,} that are read. "
            "Cut it, at paragraphs for instance."
        )
    return value


def image_of(record: Mapping[str, Any]) -> ImageInput:
    """The image of a mention or document; `None` where there is none.

    Raises:
        MimicImageError: if there are several.
    """
    image = record.get("image")
    return None if is_absent(image) else only_image(image)


def read_image(
    processor: MimicProcessor, source: ImageInput, on_image_error: str, where: str, shared: bool = False
) -> MentionImage:
    """Reads the image of a mention or document.

    Raises:
        MimicImageError: if it cannot be read and `on_image_error` is "raise".
    """
    labels = [where] if where else None
    return MentionImage(processor.pixels([source], on_image_error, labels)[0], shared)


# --- What follows from an error ---------------------------------------------------------------------------------------


def check_on_error(on_error: Any) -> None:
    """Raises a `ValueError` for a policy that there is not."""
    if on_error not in ON_ERROR:
        raise ValueError(f"`on_error` must be one of {', '.join(ON_ERROR)}, got {on_error!r}.")


def place_in_input(row: int | None, record: Any) -> str:
    """What messages call an item: by its row, from 0, and its id, as far as it has them."""
    known = record.get("id") if isinstance(record, Mapping) else None
    name = "" if is_absent(known) else repr(known) if len(repr(known)) <= 80 else repr(known)[:80] + "..."
    if row is None:
        return name and f"Mention {name}"
    return f"Mention {row} (id {name})" if name else f"Mention {row}"


def located_error(error: Exception, where: str) -> Exception:
    """The same error, with the item that it is of."""
    message = str(error)
    if not where or message.startswith(where):
        return error
    if isinstance(error, MimicError) or type(error) is ValueError:
        error.args = (f"{where}: {message}",)
        return error
    made = MentionError(f"{where}: {type(error).__name__}: {message}")
    made.__cause__ = error
    return made


def answer_of_error(error: Exception, where: str, on_error: str) -> Any:
    """What an item that could not be linked gives: nothing, with a warning, or a dict with `error` and `error_type`.

    Raises:
        the error, with the item that it is of, if `on_error` is "raise".
    """
    kind = type(error).__name__
    error = located_error(error, where)
    if on_error == "raise":
        raise error
    if on_error == "warn":
        warnings.warn(f"{error} It is not linked.", stacklevel=2)
        return []
    return {"error": str(error), "error_type": kind}


# --- Encoding ---------------------------------------------------------------------------------------------------------


def tokens_of(processor: MimicProcessor, mentions: Sequence[Mention]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of mentions, each read through its own context window."""
    filled = [""] * len(mentions)
    for window in dict.fromkeys(mention.window for mention in mentions):
        rows = [row for row, mention in enumerate(mentions) if mention.window == window]
        some = [mentions[row] for row in rows]
        texts = processor.mention_texts(
            [one.mention for one in some],
            [one.text for one in some],
            [one.start for one in some],
            [one.end for one in some],
            window,
        )
        for row, text in zip(rows, texts, strict=True):
            filled[row] = text
    return dict(processor.tokenize(filled))


def features_of(
    model: MimicModel, input_ids: Tensor, attention_mask: Tensor, images: Sequence[MentionImage]
) -> MentionFeatures:
    """Features of M mentions. An image that several of them have is encoded once, in this call and those after it."""
    device = input_ids.device
    numbers: dict[int, int] = {}
    distinct: list[MentionImage] = []
    for image in images:
        if numbers.setdefault(id(image), len(distinct)) == len(distinct):
            distinct.append(image)
    if len(distinct) == len(images) and not any(image.encoded for image in distinct):
        pixels = torch.stack([image.pixels for image in images]).to(device)
        encoded = model.encode(input_ids, attention_mask, pixels)
    else:
        new = [image for image in distinct if image.encoded is None]
        if new:
            embeds, tokens = model.encoder.encode_images(torch.stack([image.pixels for image in new]).to(device))[:2]
            for row, image in enumerate(new):
                image.encoded = embeds[row], tokens[row]
        text_embeds, text_tokens = model.encoder.encode_texts(input_ids, attention_mask)[:2]
        known: list[Any] = [image.encoded for image in images]
        encoded = MimicEncoderOutput(
            text_embeds=text_embeds,
            text_tokens=text_tokens,
            image_embeds=torch.stack([embeds for embeds, _ in known]),
            image_tokens=torch.stack([tokens for _, tokens in known]),
        )
    for row, image in enumerate(images):
        if image.shared and image.encoded is None:
            image.encoded = encoded.image_embeds[row], encoded.image_tokens[row]
    return model.matcher.mention_features(encoded, attention_mask)


@dataclass
class EncodedMentions:
    """Features of those of some mentions that could be read, and the answers of the others.

    Args:
        mentions: those that could be read.
        rows: their numbers among all.
        features: of them, on the model's device; `None` where there are none.
        failed: by number, what a mention that could not be read gives: see [`answer_of_error`].
    """

    mentions: list[Mention]
    rows: list[int]
    features: MentionFeatures | None
    failed: dict[int, Any]


def encoded_mentions(
    model: MimicModel,
    processor: MimicProcessor,
    mentions: Iterable[Mapping[str, Any]],
    batch_size: int = 32,
    on_image_error: str = "raise",
    show_progress: bool = False,
    on_error: str = "raise",
    context_window: str | None = None,
) -> EncodedMentions:
    """Encodes mentions as users give them.

    Raises:
        MentionError: if a mention is not as [`mention_parts`] says, and `on_error` is "raise"; the same for those that
            follow.
        MimicImageError: if an image cannot be read and `on_image_error` is "raise".
    """
    check_on_error(on_error)
    result = EncodedMentions([], [], None, {})
    window = context_window or str(model.config.context_window)
    places = places_of(mentions, "image")
    records = [placed_record(mention, "image", places) for mention in undecoded(mentions, "image")]
    batches: list[MentionFeatures] = []
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(records), batch_size), desc="Encoding mentions", disable=not show_progress):
            batch: list[Mention] = []
            for row in range(start, min(start + batch_size, len(records))):
                where = place_in_input(row, records[row])
                try:
                    mention, text, source = mention_parts(records[row])
                    place = mention_place(records[row], mention, text)
                    image = read_image(processor, source, on_image_error, where)
                except (MimicError, ValueError) as error:
                    result.failed[row] = answer_of_error(error, where, on_error)
                    continue
                batch.append(Mention(mention, text, image, *place, window=window))
                result.rows.append(row)
            if not batch:
                continue
            tokens = {name: t.to(model.device) for name, t in tokens_of(processor, batch).items()}
            with torch.inference_mode():
                batches.append(features_of(model, **tokens, images=[one.image for one in batch]))
            result.mentions += [Mention(one.mention, one.text, _NO_IMAGE) for one in batch]  # images are let go
    finally:
        model.train(was_training)
    result.features = MentionFeatures.cat(batches) if batches else None
    return result


_NO_IMAGE = MentionImage(torch.zeros(0))


def check_features(mentions: Any) -> None:
    """Raises a `TypeError` for what are not features of mentions."""
    if getattr(mentions, "side", None) != "mention":
        raise TypeError(
            f"An index is searched with MentionFeatures, from model.encode_mentions; got {type(mentions).__name__}."
        )


def checked_mentions(mentions: MentionFeatures, matcher: Matcher) -> MentionFeatures:
    """Mentions that a matcher can score, in float32 at most.

    Raises:
        TypeError: if they are not features of mentions.
        ValueError: if they are another model's, not finite, or too large.
    """
    check_features(mentions)
    with torch.no_grad():
        expected = mention_layout(matcher)
    if layout_of(mentions.tensors) != expected:
        raise ValueError(f"These are not features of this index's model: their names or shapes differ ({mentions!r}).")
    for name, tensor in mentions.tensors.items():
        sound = can_be_scored(tensor)
        if not bool(sound.all()):
            row = int((~sound).nonzero()[0])
            raise ValueError(
                f"The features of mention {row} are not finite, or too large (`{name}`): scores would have no order."
            )
    return mentions if mentions.dtype != torch.float64 else mentions.to(torch.float32)


__all__ = [
    "EncodedMentions",
    "Mention",
    "MentionImage",
    "answer_of_error",
    "check_features",
    "check_on_error",
    "checked_mentions",
    "checked_record",
    "checked_text",
    "encoded_mentions",
    "features_of",
    "image_of",
    "located_error",
    "mention_parts",
    "mention_place",
    "place_in_input",
    "read_image",
    "tokens_of",
]

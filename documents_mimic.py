"""Documents: texts with mentions that are marked or are to be found. Also the pipeline's other input, a single mention.

This file reads an item of the pipeline's input, finds the mentions of a document, and makes each of them a mention
like any other. Knows no index, and no model except those of token classification.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from .errors_mimic import MentionError
from .mentions_mimic import (
    Mention,
    MentionImage,
    checked_record,
    checked_text,
    image_of,
    located_error,
    mention_parts,
    mention_place,
    place_in_input,
    read_image,
)
from .processing_mimic import MimicProcessor
from .records_mimic import is_absent
from .spans_mimic import as_offset, check_span

NAMES = "names"
_NER_TASKS = ("token-classification", "ner")
_STRIDE = 64

Span = tuple[int, int]
# What finds the mentions of a text.
Detector = Callable[[str], Sequence[Span]]


@dataclass
class Item:
    """What was read of one item of the pipeline's input.

    Args:
        where: what messages call it; empty for the only one.
        text: the document's, or that around the mention.
        mention: what is linked; `None` for a document.
        place: of the mention, as far as it was said.
        spans: of the document's mentions, if they were given.
        candidates: as they were given.
        image: read already.
        source: the image as it was given, if a re-ranker is to see it.
        error: what was wrong with it; then the rest says nothing.
    """

    where: str
    text: str = ""
    mention: str | None = None
    place: tuple[int | None, int | None] = (None, None)
    spans: list[Span] | None = None
    candidates: Any = None
    image: MentionImage | None = None
    source: Any = None
    error: Exception | None = None

    @property
    def is_document(self) -> bool:
        return self.mention is None

    def mentions(self, spans: Sequence[Span], window: str) -> list[Mention]:
        """The mentions to be linked: the document's at some places, or the one that the item is.

        Args:
            spans: the places in a document.
            window: the context window.
        """
        image: Any = self.image
        common = {"candidates": self.candidates, "window": window, "source": self.source}
        if self.mention is not None:
            return [Mention(self.mention, self.text, image, *self.place, **common)]
        return [Mention(self.text[start:end], self.text, image, start, end, **common) for start, end in spans]


def read_item(
    record: Any,
    row: int | None,
    processor: MimicProcessor,
    on_image_error: str = "raise",
    keep_source: bool = False,
) -> Item:
    """Reads a mention or a document, with its image; what is wrong with it is noted.

    Args:
        record: a dict with `text`, and for a single mention `mention`; a string is the text of a document.
        row: its number in the input, `None` if it is the only one.
        processor: reads the image.
        on_image_error: "raise", or "warn" to go on without an image that cannot be read.
        keep_source: whether the image as it was given is kept.
    """
    if isinstance(record, str):
        record = {"text": record}
    where = place_in_input(row, record)
    try:
        item = _item(checked_record(record), where)
        source = image_of(record)
        item.image = read_image(processor, source, on_image_error, where, shared=item.is_document)
        item.source = source if keep_source else None
    except Exception as error:  # data sets and images raise many kinds
        return Item(where, error=located_error(error, where))
    return item


def _item(record: Mapping[str, Any], where: str) -> Item:
    candidates: Any = record.get("candidates")
    if isinstance(candidates, str):
        raise MentionError(f"`candidates` of a mention must be a list of entity ids, got the string {candidates!r}.")
    if not is_absent(candidates) and not isinstance(candidates, Iterable):
        raise MentionError(f"`candidates` of a mention must be a list of entity ids, got {type(candidates).__name__}.")
    candidates = None if is_absent(candidates) else list(candidates)
    spans = record.get("spans")
    spans = None if is_absent(spans) else spans
    if "mention" in record and not (spans is not None and is_absent(record["mention"])):
        if spans is not None:
            raise MentionError("Give either `mention`, for one mention, or `spans`, for a document, not both.")
        mention, text, _ = mention_parts(record)
        return Item(where, text, mention, mention_place(record, mention, text), None, candidates)
    text = checked_text(record, "text")
    marked = None if spans is None else checked_spans(spans, text, "`spans`")
    return Item(where, text, None, (None, None), marked, candidates)


def checked_spans(spans: Any, text: str, what: str) -> list[Span]:
    """Places in a text, as they were given: in their order, and overlapping ones too.

    Args:
        spans: pairs of start and end, or dicts with `start` and `end`.
        text: the text.
        what: what messages call them.

    Raises:
        MentionError: if they are something else, or one is not a place in the text or has only white space.
    """
    if isinstance(spans, str | bytes | Mapping) or not isinstance(spans, Iterable):
        raise MentionError(f"{what} must be a list of [start, end], got {type(spans).__name__}.")
    found = []
    for number, span in enumerate(spans):
        try:
            start, end = _pair(span)
            check_span(start, end, text)
        except ValueError as error:
            raise MentionError(f"{what}, number {number}: {error}") from error
        if not text[start:end].strip():
            raise MentionError(f"{what}, number {number}: there is only white space from {start} to {end}.")
        found.append((start, end))
    return found


def _pair(span: Any) -> Span:
    if isinstance(span, Mapping):
        if "start" not in span or "end" not in span:
            raise ValueError(f"it needs `start` and `end`, but has {sorted(map(str, span))}.")
        parts = [span["start"], span["end"]]
    elif isinstance(span, str | bytes) or not hasattr(span, "__len__") or len(span) != 2:
        raise ValueError(f"it must be [start, end] or a dict with `start` and `end`, got {str(span)[:80]!r}.")
    else:
        parts = list(span)
    start, end = as_offset("start", parts[0]), as_offset("end", parts[1])
    if start is None or end is None:
        raise ValueError("its `start` or `end` is missing.")
    return start, end


# --- Finding mentions -------------------------------------------------------------------------------------------------


def detector_of(detector: Any) -> Detector | None:
    """What finds mentions, of what a user gives for it; `None` for the names of the knowledge base.

    Args:
        detector: "names"; a token-classification pipeline, its directory or Hub id; or a callable that takes a text
            and gives pairs of start and end, or dicts with `start` and `end`.

    Raises:
        TypeError: if it is something else.
    """
    if detector is None or (isinstance(detector, str) and detector == NAMES):
        return None
    if isinstance(detector, str | os.PathLike):
        from transformers import pipeline

        detector = pipeline("token-classification", model=os.fspath(detector), aggregation_strategy="simple")
    if not callable(detector):
        raise TypeError(
            '`mention_detector` must be "names", a token-classification pipeline, its directory or Hub id, or a '
            f"callable that gives (start, end) or dicts with `start` and `end`; got {type(detector).__name__}."
        )
    if getattr(detector, "task", None) in _NER_TASKS:
        return _TokenClassifier(detector)
    return _Checked(detector)


class _Checked:
    """A detector whose answers are checked: nonsense is an error that names it."""

    def __init__(self, detector: Callable[[str], Any]) -> None:
        self.detector = detector

    def __call__(self, text: str) -> list[Span]:
        name = getattr(self.detector, "__name__", type(self.detector).__name__)
        try:
            found = self.found(text)
            if isinstance(found, Iterator):
                found = list(found)
        except Exception as error:
            raise MentionError(f"The mention detector {name} fails with {type(error).__name__}: {error}") from error
        spans = _trimmed(checked_spans_of_detector(found, text, f"What the mention detector {name} gives"), text)
        return sorted(dict.fromkeys(spans))

    def found(self, text: str) -> Any:
        return self.detector(text)


class _TokenClassifier(_Checked):
    """A token-classification pipeline, asked for whole mentions, of a text of any length."""

    def found(self, text: str) -> Any:
        if not text.strip():
            return []
        classifier: Any = self.detector
        options: dict[str, Any] = {}
        strategy = getattr(classifier, "_postprocess_params", {}).get("aggregation_strategy")
        if strategy is None or getattr(strategy, "value", strategy) == "none":
            options["aggregation_strategy"] = "simple"
        tokenizer = classifier.tokenizer
        limit = getattr(tokenizer, "model_max_length", 0)
        if getattr(tokenizer, "is_fast", False) and 0 < limit < 10**6:
            options["stride"] = min(_STRIDE, limit // 4)  # a long text is read in parts that overlap
        return classifier(text, **options)


def checked_spans_of_detector(spans: Any, text: str, what: str) -> list[Span]:
    """As [`checked_spans`], but that a detector may mark white space, which is no mention."""
    if isinstance(spans, str | bytes | Mapping) or not isinstance(spans, Iterable):
        raise MentionError(f"{what} must be a list of (start, end) or dicts, got {type(spans).__name__}.")
    return checked_spans([span for span in spans if not _is_blank(span, text)], text, what)


def _is_blank(span: Any, text: str) -> bool:
    try:
        start, end = _pair(span)
        check_span(start, end, text)
    except ValueError:
        return False  # to be told of
    return not text[start:end].strip()


def _trimmed(spans: Sequence[Span], text: str) -> Iterator[Span]:
    """Without white space at either end: some tokenizers count the space before a word to it."""
    for start, end in spans:
        part = text[start:end]
        yield start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))


# --- Reading many -----------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """How items are read: what [`read_item`] takes but the item."""

    processor: MimicProcessor
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, record: Any, row: int | None) -> Item:
        return read_item(record, row, self.processor, **self.options)


class NumberedItems(Dataset[Any]):
    """Items that are read by number, in a worker process maybe."""

    def __init__(self, records: Any, reading: Reading) -> None:
        self.records, self.reading = records, reading

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Item:
        try:
            record = self.records[row]
        except IndexError:
            raise
        except Exception as error:  # a damaged row of a data set
            where = place_in_input(row, None)
            return Item(where, error=located_error(error, where))
        return self.reading(record, row)


class StreamedItems(IterableDataset[Any]):
    """Items that come one after the other."""

    def __init__(self, records: Iterable[Any], reading: Reading) -> None:
        self.records, self.reading = records, reading

    def __iter__(self) -> Iterator[Item]:
        for row, record in enumerate(self.records):
            yield self.reading(record, row)


__all__ = [
    "NAMES",
    "Detector",
    "Item",
    "NumberedItems",
    "Reading",
    "Span",
    "StreamedItems",
    "checked_spans",
    "detector_of",
    "read_item",
]

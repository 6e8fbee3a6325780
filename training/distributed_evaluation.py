"""A knowledge base in parts, one in each process: encoded there, and searched there for the mentions of all.

Each process encodes its part of the entities and its part of the mentions, and gets the features of all mentions. So
time and memory fall with the number of processes. Between two exchanges each works for itself, and waits for the
others as long as that takes them (see watch.py). With one process it is the same without exchanges.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader, Subset

from ..index_mimic import EntityIndex
from ..modeling_mimic import MentionFeatures, MimicModel
from ..processing_mimic import MimicProcessor
from .collator import MentionEntityCollator
from .dealing import part_of
from .evaluation import RankedMentions, encoded_and_named, finite_features
from .gather import gathered, process_count, process_index
from .knowledge_base import KnowledgeBase
from .watch import all_of_them

# A part of fewer entities is kept in memory.
ENTITIES_IN_MEMORY = 10_000
# Mentions whose features are held at once: some 30 kB each in the published model.
MENTIONS_AT_ONCE = 8192


class RecordsBetween(Sequence[Mapping[str, Any]]):
    """Some records in a row, read by number when they are asked for."""

    def __init__(self, records: Sequence[Mapping[str, Any]], rows: slice) -> None:
        self._records, self._rows = records, range(*rows.indices(len(records)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        return self._records[self._rows[row]]


@contextmanager
def own_part(
    model: MimicModel, collator: MentionEntityCollator, knowledge_base: KnowledgeBase, scratch: Path, **options: Any
) -> Iterator[EntityIndex | None]:
    """A context with this process's part of the knowledge base, encoded; `None` where there are fewer entities than
    processes and this one has none.

    Args:
        model: encodes; put into evaluation mode by the index.
        collator: has the processor.
        scratch: a directory for a part that is too large for memory; deleted at the end.
        **options: as of `EntityIndex.build`.
    """
    index, count = process_index(), process_count()
    rows = part_of(len(knowledge_base), index, count)
    directory = scratch.with_name(f"{scratch.name}-{index}") if count > 1 else scratch
    stored = rows.stop - rows.start > ENTITIES_IN_MEMORY

    def build() -> EntityIndex | None:
        if rows.start == rows.stop:
            return None
        shutil.rmtree(directory, ignore_errors=True)
        records = RecordsBetween(knowledge_base.entities(), rows)
        return EntityIndex.build(
            model, collator.processor, records, directory if stored else None, shard=None, **options
        )

    part = None
    try:
        part = all_of_them("encoding the knowledge base", build)
        yield part
    finally:
        del part
        if stored:
            shutil.rmtree(directory, ignore_errors=True)


def index_by_all(
    model: MimicModel, processor: MimicProcessor, knowledge_base: KnowledgeBase, directory: Path, **options: Any
) -> EntityIndex:
    """The index of a knowledge base in a directory that is emptied first. All processes call it, and each
    encodes a part.

    Args:
        **options: as of `EntityIndex.build`.

    Raises:
        ProcessError: if another process failed.
    """
    parts = min(process_count(), len(knowledge_base))

    def build() -> None:
        if process_index() < max(1, parts):  # else there are fewer entities than processes
            shard = (process_index(), parts) if parts > 1 else None
            EntityIndex.build(model, processor, knowledge_base.entities(), directory, shard=shard, **options)

    if process_index() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    all_of_them("deleting the index before", lambda: None)
    all_of_them("encoding the knowledge base", build)
    return EntityIndex.from_pretrained(directory)


@dataclass
class EncodedMentions:
    """Some mentions in a row, of all processes: their features, and lists `id`, `answer`, `kind`, `mention`, `text`."""

    features: MentionFeatures
    named: dict[str, list[Any]]


def encoded_by_all(
    model: MimicModel,
    collator: MentionEntityCollator,
    mentions: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
    at_once: int = MENTIONS_AT_ONCE,
) -> Iterator[EncodedMentions]:
    """The mentions, block after block, each process encoding a part of each block.

    Args:
        mentions: a sequence, or an iterable that is the same in all processes.

    Raises:
        ValueError: if the model's features are not finite.
        ProcessError: if another process failed.
    """
    index, count = process_index(), process_count()
    for block in _blocks(mentions, at_once):
        own = part_of(len(block), index, count)
        work = functools.partial(_encoded, model, collator, Subset(block, range(own.start, own.stop)))
        features, named = all_of_them(
            "encoding mentions", functools.partial(work, batch_size=batch_size, num_workers=num_workers)
        )
        if count > 1:
            sizes = [part.stop - part.start for part in (part_of(len(block), i, count) for i in range(count))]
            with torch.no_grad():
                features = gathered(_or_none(features, model), sizes)
            named = joined(named)
        assert features is not None  # a block is not empty
        yield EncodedMentions(features, named)


def ranked_by_all(
    model: MimicModel,
    collator: MentionEntityCollator,
    part: EntityIndex | None,
    mentions: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> RankedMentions:
    """The ranks of mentions' answers in a knowledge base of which each process has a part. Called by all processes,
    and the same in all: those of one process, since every entity that is better or as good is counted once.

    Args:
        part: this process's, from [`own_part`].
        mentions, batch_size, num_workers: as of [`encoded_by_all`].

    Raises:
        ValueError: if there are no mentions, or the model's features are not finite.
        ProcessError: if another process failed.
    """
    results = RankedMentions([], [], [], np.empty(0))
    ranks: list[np.ndarray] = []
    for block in encoded_by_all(model, collator, mentions, batch_size=batch_size, num_workers=num_workers):
        features, answers = block.features, block.named["answer"]
        scores = np.full(len(answers), np.nan, dtype=np.float32)
        if part is not None:
            scores = all_of_them("scoring answers", functools.partial(part.answer_scores, features, answers))
        else:
            all_of_them("scoring answers", lambda: None)
        every = _arrays_of_all(scores)
        known = ~np.isnan(every).all(axis=0)
        answer_scores = np.where(known, np.nanmax(np.where(np.isnan(every), -np.inf, every), axis=0), 0)
        counts = functools.partial(_counts, part, features, answers, answer_scores, known)
        above, equal = _arrays_of_all(all_of_them("ranking mentions", counts)).sum(axis=0)
        ranks.append(np.where(known, 1 + above + equal / 2, np.nan))
        results.ids += block.named["id"]
        results.answers += answers
        results.kinds = (results.kinds or []) + block.named["kind"]
        results.mentions += block.named["mention"]
        results.texts += block.named["text"]
    if not ranks:
        raise ValueError("There are no mentions to rank.")
    results.ranks = np.concatenate(ranks)
    if all(kind is None for kind in results.kinds or []):
        results.kinds = None
    return results


def _counts(
    part: EntityIndex | None,
    features: MentionFeatures,
    answers: Sequence[str],
    answer_scores: np.ndarray,
    known: np.ndarray,
) -> np.ndarray:
    """How many entities of a part are better than each mention's answer, and how many as good: int64 of shape (2, M);
    zeros where the answer is in no part."""
    counts = np.zeros((2, len(known)), dtype=np.int64)
    if part is not None and known.any():
        rows = torch.from_numpy(known.nonzero()[0]).to(features.device)
        counts[:, known] = part.count_better(
            features[rows], answer_scores[known], [answers[row] for row in rows.tolist()]
        )
    return counts


def _arrays_of_all(own: np.ndarray) -> np.ndarray:
    """An array of each process, stacked."""
    every: list[Any] = [own]
    if process_count() > 1:
        every = [None] * process_count()
        dist.all_gather_object(every, own)
    return np.stack(every)


def joined(own: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The lists of all processes, one after the other."""
    every: list[Any] = [None] * process_count()
    dist.all_gather_object(every, own)
    return {name: list(itertools.chain.from_iterable(part[name] for part in every)) for name in every[0]}


def _blocks(mentions: Any, size: int) -> Iterator[Any]:
    if hasattr(mentions, "__getitem__") and hasattr(mentions, "__len__"):
        for start in range(0, len(mentions), size):
            yield Subset(mentions, range(start, min(start + size, len(mentions))))
    else:
        items = iter(mentions)
        while block := list(itertools.islice(items, size)):
            yield block


def _encoded(
    model: MimicModel, collator: MentionEntityCollator, mentions: Any, *, batch_size: int, num_workers: int
) -> tuple[MentionFeatures | None, dict[str, list[Any]]]:
    loader: DataLoader = DataLoader(
        mentions,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=functools.partial(encoded_and_named, collator),
    )
    parts: list[MentionFeatures] = []
    named: dict[str, list[Any]] = {name: [] for name in ("id", "answer", "kind", "mention", "text")}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for inputs, some in loader if len(mentions) else ():
                parts.append(finite_features(model, inputs))
                for name, values in some.items():
                    named[name] += values
    finally:
        model.train(was_training)
    return MentionFeatures.cat(parts) if parts else None, named


def _or_none(features: MentionFeatures | None, model: MimicModel) -> MentionFeatures:
    """Features of no mentions where there are none, in the shapes that those of other processes have."""
    if features is not None:
        return MentionFeatures({name: tensor.clone() for name, tensor in features.tensors.items()})
    size = model.config.text_max_length
    was_training = model.training
    model.eval()
    with torch.no_grad():
        one = model.encode_mentions(input_ids=torch.zeros(1, size, dtype=torch.long, device=model.device))
    model.train(was_training)
    return one[:0]

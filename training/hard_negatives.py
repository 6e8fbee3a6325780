"""Hard negatives: for each training mention, wrong entities that the model scores high.

Every few epochs the knowledge base is encoded by the current model and searched exactly for each mention. Some of the
entities found join the batches as further entities, which no mention there means (see collator.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from ..index_mimic import EntityIndex
from .collator import MentionEntityCollator
from .distributed_evaluation import encoded_by_all, own_part
from .gather import process_count
from .knowledge_base import KnowledgeBase
from .watch import all_of_them

logger = logging.getLogger("mimic_el.train")

TABLE = "hard_negatives.npy"
# For each hard negative of a batch, so many of the best wrong entities are kept to draw from.
_POOL = 4


class MentionsWithNegatives(torch.utils.data.Dataset):
    """Mentions, each with the numbers of wrong entities in its field `hard_negatives`, once they are known.

    Args:
        mentions: a sequence of dicts.
    """

    def __init__(self, mentions: Any) -> None:
        if not hasattr(mentions, "__len__") or isinstance(mentions, torch.utils.data.IterableDataset):
            raise ValueError(
                "hard_negatives need mentions that are read by number: they cannot be searched for a stream. Leave "
                "out --streaming, or --hard_negatives."
            )
        self.mentions = mentions
        self.table: np.ndarray | None = None  # (mentions, some) int32, best first; -1 where there are fewer

    def __len__(self) -> int:
        return len(self.mentions)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if self.table is None:
            return self.mentions[row]
        return {**self.mentions[row], "hard_negatives": [int(number) for number in self.table[row] if number >= 0]}


def best_wrong_entities(
    model: Any,
    collator: MentionEntityCollator,
    knowledge_base: KnowledgeBase,
    mentions: Any,
    count: int,
    scratch: Path,
    *,
    batch_size: int,
    num_workers: int = 0,
    **options: Any,
) -> np.ndarray:
    """The numbers of the entities that fit each of M mentions best, without its answer, best first.

    Called by all processes; each searches its part of the knowledge base, and all have the answer.

    Args:
        count: how many hard negatives a batch takes for a mention; four times as many are found.
        scratch, **options: as of [`own_part`].

    Returns:
        int32 of shape `(M, 4 count)`; -1 where the knowledge base has fewer entities.
    """
    pool = _POOL * count
    tables = []
    was_training = model.training
    with own_part(
        model, collator, knowledge_base, scratch, batch_size=batch_size, num_workers=num_workers, **options
    ) as part:
        model.train(was_training)
        for block in encoded_by_all(model, collator, mentions, batch_size=batch_size, num_workers=num_workers):

            def search(features: Any = block.features) -> tuple[np.ndarray, np.ndarray]:
                return _best(part, knowledge_base, features, pool + 1)

            own = all_of_them("searching hard negatives", search)
            every: list[Any] = [own]
            if process_count() > 1:
                every = [None] * process_count()
                dist.all_gather_object(every, own)
            answers = np.array([knowledge_base.row(answer) for answer in block.named["answer"]])
            tables.append(merged_without_answers(every, answers, pool))
    return np.concatenate(tables)


def _best(
    part: EntityIndex | None, knowledge_base: KnowledgeBase, features: Any, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores (M, count) of a part's best entities; -1 and -inf where it has fewer."""
    rows = np.full((len(features), count), -1, dtype=np.int32)
    scores = np.full((len(features), count), -np.inf, dtype=np.float32)
    if part is not None:
        found = part.search(features, top_k=count)
        for place, ids in enumerate(found.entity_ids):
            rows[place, : len(ids)] = [knowledge_base.row(entity_id) for entity_id in ids]
            scores[place, : len(ids)] = found.scores[place, : len(ids)]
    return rows, scores


def merged_without_answers(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], answers: np.ndarray, count: int
) -> np.ndarray:
    """The best of several parts' best, without each mention's answer; equal scores in the order of the entities."""
    rows = np.concatenate([part[0] for part in parts], axis=1)
    scores = np.concatenate([part[1] for part in parts], axis=1)
    scores = np.where((rows == answers[:, None]) | (rows < 0), -np.inf, scores)
    order = np.lexsort((rows, -scores), axis=1)[:, :count]
    best = np.take_along_axis(rows, order, axis=1)
    best[np.isneginf(np.take_along_axis(scores, order, axis=1))] = -1
    return np.pad(best, ((0, 0), (0, count - best.shape[1])), constant_values=-1)

"""What an actor does: one part of an index, opened where the actor runs, answers for itself.

Knows nothing of the other parts, nor of Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..index_mimic import EntityIndex
from ..matching_mimic import MentionFeatures
from ..snapshot_mimic import SearchResult


class Part:
    """An actor: one part of the index, opened where the actor runs, and again where it is restarted."""

    def __init__(self, place: str, options: Mapping[str, Any], device: str) -> None:
        self._index = EntityIndex.from_pretrained(place, **options)
        self._device = device

    def there(self) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        index = self._index
        return {"count": len(index), "dtype": index.dtype, "model": dict(index.made_by)}

    def has(self, entity_ids: Sequence[Any]) -> list[bool]:
        return [entity_id in self._index for entity_id in entity_ids]

    def records(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        return [self._index.entity(name) if name in self._index else None for name in entity_ids]

    def records_from(self, start: int, count: int) -> list[dict[str, Any]]:
        return list(itertools.islice(self._index.entities(), start, start + count))

    def search(self, mentions: MentionFeatures, rows: Sequence[int], **options: Any) -> SearchResult | None:
        """The search of some of the mentions; `None` where there is nothing to search."""
        if not len(self._index) or not len(rows):
            return None
        return self._index.search(mentions[torch.as_tensor(rows)].to(self._device), **options)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        if not len(self._index):
            return np.full(len(answers), np.nan, dtype=np.float32)
        return self._index.answer_scores(mentions.to(self._device), answers)

    def count_better(
        self, mentions: MentionFeatures, rows: Sequence[int], scores: np.ndarray, answers: Sequence[str], method: str
    ) -> np.ndarray:
        if not len(self._index) or not len(rows):
            return np.zeros((2, len(rows)), dtype=np.int64)
        some = mentions[torch.as_tensor(rows)].to(self._device)
        return np.stack(self._index.count_better(some, scores, answers, method=method))

    def find(self, name: str, max_distance: int) -> list[str]:
        return self._index.find(name, max_distance=max_distance)

    def places_of_names(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        return self._index.state.contents.places_of_names(text, lower_case) if len(self._index) else []

    def bearers(self, names: Sequence[str]) -> list[list[str]]:
        state = self._index.state
        return [state.bearer_ids(name) for name in names]

    def change(self, name: str, *args: Any, **kwargs: Any) -> int:
        """Changes the part and gives the number of its entities."""
        getattr(self._index, name)(*args, **kwargs)
        return len(self._index)


__all__ = ["Part"]

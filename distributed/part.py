"""What an actor does: one part of an index, opened where the actor runs, answers for itself.

Knows nothing of the other parts, nor of Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors_mimic import EntityIndexError
from ..identity_mimic import same_model
from ..index_mimic import EntityIndex
from ..matching_mimic import MentionFeatures
from ..mentions_mimic import checked_mentions
from ..snapshot_mimic import SearchResult


class Part:
    """An actor: one part of the index, opened where the actor runs, and again where it is restarted."""

    def __init__(self, place: str, options: Mapping[str, Any], device: str) -> None:
        self._index = EntityIndex.from_pretrained(place, **options)
        self._place, self._device, self._fits = place, device, False

    def there(self) -> bool:
        return True

    def ask(self, expected: Mapping[str, Any] | None, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of this part answers.

        Args:
            expected: as [`facts`] gives it, of an index that the part must belong to. Where an actor was started again,
                something else may lie in the place that it opened.

        Raises:
            EntityIndexError: if it does.
        """
        if expected is not None and not self._fits:
            if self._index.dtype != expected["dtype"] or not same_model(self._index.made_by, expected["model"]):
                raise EntityIndexError(
                    f"The part {self._place} was replaced by an index of another model or precision since it was "
                    "opened. Put it back, or open the parts anew."
                )
            self._fits = True
        return getattr(self, name)(*args, **kwargs)

    def facts(self) -> dict[str, Any]:
        index = self._index
        return {"count": len(index), "dtype": index.dtype, "model": dict(index.made_by)}

    def has(self, entity_ids: Sequence[Any]) -> list[bool]:
        return [entity_id in self._index for entity_id in entity_ids]

    def id_hashes(self, number: int, of: int) -> np.ndarray:
        """The sorted hashes of the ids, uint64, that are in the number-th of so many equal ranges of hashes."""
        store, first = self._index.state.contents.store, number * 2**64 // of
        last, found = (number + 1) * 2**64 // of - 1, []
        for shard, start in zip(store.shards, store.starts, strict=False):
            rows = torch.from_numpy(start + shard.hash_rows.astype(np.int64))
            order = np.sort(shard.hashes[~store.removed[rows].numpy()])
            begin, end = np.searchsorted(order, np.uint64(first)), np.searchsorted(order, np.uint64(last), "right")
            found.append(order[begin:end])
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)

    def ids_of_hashes(self, hashes: np.ndarray) -> list[str]:
        """The ids that have one of some hashes."""
        store = self._index.state.contents.store
        rows = [row for value in hashes.tolist() for row in store.ids.rows(value) if not store.removed[row]]
        return [store.record(row)["id"] for row in rows]

    def records(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        return [self._index.entity(name) if name in self._index else None for name in entity_ids]

    def records_from(self, start: int, count: int) -> list[dict[str, Any]]:
        return list(itertools.islice(self._index.entities(), start, start + count))

    def search(self, mentions: MentionFeatures, rows: Sequence[int], **options: Any) -> SearchResult | None:
        """The search of some of the mentions; `None` where there is nothing to search."""
        if not len(self._index) or not len(rows):
            return None
        return self._index.search(self._some(mentions, rows), **options)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        if not len(self._index):
            return np.full(len(answers), np.nan, dtype=np.float32)
        return self._index.answer_scores(mentions.to(self._device), answers)

    def count_better(
        self, mentions: MentionFeatures, rows: Sequence[int], scores: np.ndarray, answers: Sequence[str], method: str
    ) -> np.ndarray:
        if not len(self._index) or not len(rows):
            return np.zeros((2, len(rows)), dtype=np.int64)
        some = self._some(mentions, rows)
        return np.stack(self._index.count_better(some, scores, answers, method=method))

    def _some(self, mentions: MentionFeatures, rows: Sequence[int]) -> MentionFeatures:
        """Some of the mentions; all are checked, so that messages number them as the caller does."""
        return checked_mentions(mentions, self._index.state.matcher)[torch.as_tensor(rows)].to(self._device)

    def find(self, name: str, max_distance: int) -> list[str]:
        return self._index.find(name, max_distance=max_distance)

    def places_of_names(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        return self._index.state.contents.places_of_names(text, lower_case) if len(self._index) else []

    def bearers(self, names: Sequence[str]) -> list[list[str]]:
        state = self._index.state
        return [state.bearer_ids(name) for name in names]

    def change(self, change: str, *args: Any, **kwargs: Any) -> int:
        """Changes the part and gives the number of its entities."""
        getattr(self._index, change)(*args, **kwargs)
        return len(self._index)


__all__ = ["Part"]

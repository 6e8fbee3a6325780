"""Merges what the parts of an index found for the same mentions into what one index would have found.

Knows no actors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..pairs_mimic import SearchStats, best_order
from ..snapshot_mimic import SearchResult


class MergedResults:
    """The best entities of several parts, for each of M mentions."""

    def __init__(self, count: int, top_k: int) -> None:
        self._found: list[list[tuple[float, int, int, str, tuple[float, ...]]]] = [[] for _ in range(count)]
        self._top_k = top_k
        self._stats = SearchStats()

    def add(self, part: int, rows: Sequence[int], result: SearchResult) -> None:
        units = np.stack([result.text_scores, result.image_scores, result.cross_modal_scores], axis=-1)
        for place, row in enumerate(rows):
            for rank, entity_id in enumerate(result.entity_ids[place]):
                score = float(result.scores[place, rank])
                self._found[row].append((score, part, rank, entity_id, tuple(units[place, rank].tolist())))
        for name in ("pairs", "image_pairs", "hull_pairs", "exact_pairs"):
            setattr(self._stats, name, getattr(self._stats, name) + getattr(result.stats, name))

    def kth_scores(self) -> np.ndarray:
        """Of each mention the k-th best score so far; -inf where fewer are found."""
        best = [sorted((item[0] for item in found), reverse=True)[: self._top_k] for found in self._found]
        return np.array([item[-1] if len(item) == self._top_k else -np.inf for item in best], dtype=np.float32)

    def result(self, entities: int) -> tuple[SearchResult, list[list[int]]]:
        """What is found, and the part of each entity; equal scores in the order of parts, and of each part's own.

        Args:
            entities: the number of all entities: as many columns there are where more are wanted.
        """
        most = max((len(found) for found in self._found), default=0)
        totals = torch.full((len(self._found), most), -torch.inf)
        rows = torch.full((len(self._found), most), torch.iinfo(torch.long).max)
        for row, found in enumerate(self._found):
            totals[row, : len(found)] = torch.tensor([item[0] for item in found])
            rows[row, : len(found)] = torch.tensor([item[1] * 2**40 + item[2] for item in found], dtype=torch.long)
        order = best_order(totals, rows)[:, : self._top_k].tolist() if most else [[] for _ in self._found]
        scores = np.full((4, len(self._found), min(self._top_k, max(most, entities))), np.nan, dtype=np.float32)
        ids: list[list[str]] = []
        owners: list[list[int]] = []
        for row, (found, places) in enumerate(zip(self._found, order, strict=True)):
            best = [found[place] for place in places if place < len(found)]
            ids.append([item[3] for item in best])
            owners.append([item[1] for item in best])
            for place, item in enumerate(best):
                scores[:, row, place] = (item[0], *item[4])
        total, text, image, cross_modal = scores
        return SearchResult(ids, total, text, image, cross_modal, self._stats), owners


__all__ = ["MergedResults"]

"""What a search has found so far: the best rows of each mention, or what is known of its answer's rank.

Knows scores and rows, but not how scores are computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs_mimic import best_order


class TopK:
    """The best k rows seen so far for each of M mentions, among those that reach its floor (M, 1).

    Twice as many are kept, best first: of those that are equal to the k-th best the first rows are the answer, and
    only all of the scores tell which is the k-th best.
    """

    def __init__(self, count: int, k: int, device: torch.device, floor: Tensor | None = None) -> None:
        self.k = k
        self.floor = torch.full((count, 1), -torch.inf, device=device) if floor is None else floor
        self.scores = torch.full((count, 2 * k), -torch.inf, device=device)
        self.rows = torch.full((count, 2 * k), -1, dtype=torch.long, device=device)

    @property
    def threshold(self) -> Tensor:
        """What a score must reach to be among each mention's best k, of shape (M, 1)."""
        return torch.maximum(self.scores.topk(self.k, dim=1).values[:, -1:], self.floor)

    def found(self) -> Tensor:
        """The rows (M, k), best first; -1 where fewer reach the floor."""
        below = self.scores < self.floor
        order = below.int().argsort(dim=1, stable=True)[:, : self.k]
        return self.rows.masked_fill(below, -1).gather(1, order)

    def merge(self, scores: Tensor, rows: Tensor) -> None:
        """Takes scores (M, n) of entity rows (M, n) into account; rows seen before must not come again."""
        self._keep(torch.cat([self.scores, scores], dim=1), torch.cat([self.rows, rows], dim=1))

    def _keep(self, scores: Tensor, rows: Tensor) -> None:
        order = best_order(scores, rows)[:, : self.scores.shape[1]]
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)

    def part(self, mention_rows: Tensor) -> TopK:
        """The same for some of the mentions."""
        part = TopK(len(mention_rows), self.k, self.scores.device, self.floor[mention_rows])
        part.scores, part.rows = self.scores[mention_rows], self.rows[mention_rows]
        return part

    def take(self, mention_rows: Tensor, part: TopK) -> None:
        """Puts back what was a part."""
        self.scores[mention_rows], self.rows[mention_rows] = part.scores, part.rows

    def forget(self, start: int, stop: int) -> None:
        """Leaves out the rows from `start` to `stop`."""
        inside = (self.rows >= start) & (self.rows < stop)
        self._keep(self.scores.masked_fill(inside, -torch.inf), self.rows.masked_fill(inside, -1))


class Places:
    """The answers of M mentions, and how many other entities are known to score above them, or as much."""

    def __init__(self, answers: Tensor, answer_score: Tensor) -> None:
        self.answers = answers  # (M,) rows
        self.answer_score = answer_score  # (M, 1) their scores
        self.above, self.equal = torch.zeros_like(answers), torch.zeros_like(answers)

    def within(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The places (mentions, columns) of the answers in a block of scores of the rows from `start` to `stop`."""
        rows = ((self.answers >= start) & (self.answers < stop)).nonzero().squeeze(1)
        return rows, self.answers[rows] - start


__all__ = ["Places", "TopK"]

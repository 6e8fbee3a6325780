"""Exact search and ranking over encoded entities, without scoring every pair exactly.

All of a pair's score but the attention of the text unit is dot products and a few numbers. The attention's part is
`b + (c . w) / sqrt(|c|^2 / d + eps)` for the entity's vector w and number b, where c is a convex combination of the
mention's centred value vectors u_1 .. u_L. So it is bounded, for all the entity's tokens may do, by

- a few balls that the u_j lie in: with centres z_k and radii R_k, `c . w` is at most the largest
  `z_k . w + R_k |w|`, and the whole is at most `|w| sqrt(s) / sqrt(s / d + eps)` for the largest `s = |u_j|^2`;
- the hull: `c . w` lies between the smallest and the largest `u_j . w`, and `|c|^2` between the squared distance of the
  hull from the origin and the largest `|u_j|^2`.

Pairs are scored exactly in the order of their upper bound, until no bound left is above the k-th best exact score. The
answer is that of exhaustive scoring; only the work differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .modeling_mimic import EntityFeatures, MentionFeatures, MimicOutput, _Matcher, _wide

# Rounding differs with the shape of a matrix product. Relative to a score, bounds and block-wise scores are trusted up
# to _SLACK; what is closer is decided by `score_pairs`, which gives a pair the same score in any company, up to _TIE.
_SLACK = 2e-5
_TIE = 1e-6
_SEEDS = 16
_BALLS = 4
_ROUND = 32
# Where more than this fraction of a block's pairs would be scored exactly, the bound does not pay.
_EXHAUSTIVE_FRACTION = 0.2


class EntityBlocks(Protocol):
    """What a search needs of an index: its rows, in float32 and on a device."""

    def __len__(self) -> int: ...

    def light(self, start: int, stop: int, device: torch.device) -> dict[str, Tensor]:
        """Features of rows `start` to `stop`, all but `text_query`."""
        ...

    def local(self, rows: Tensor, device: torch.device) -> Tensor:
        """`text_local` of some rows."""
        ...

    def full(self, rows: Tensor | slice, device: torch.device) -> EntityFeatures:
        """All features of some rows."""
        ...

    def alive(self, start: int, stop: int) -> Tensor | None:
        """Which of the rows are not removed, as booleans; `None` if all."""
        ...


@dataclass
class SearchStats:
    """How much work a search was.

    Args:
        pairs (`int`): mention-entity pairs that the answer speaks of.
        hull_pairs (`int`): pairs for which the tighter bound, of the hull, was computed.
        exact_pairs (`int`): pairs that were scored exactly.
    """

    pairs: int = 0
    hull_pairs: int = 0
    exact_pairs: int = 0

    @property
    def exact_fraction(self) -> float:
        """Share of the pairs that were scored exactly."""
        return self.exact_pairs / self.pairs if self.pairs else 0.0


@dataclass
class _MentionBounds:
    """What bounds the attention's part for each of M mentions."""

    values: Tensor  # (M, L, d) centred value vectors; of padding, repeats of a real one
    centres: Tensor  # (M, K, d) centres of balls that hold them
    radii: Tensor  # (M, K) and their radii
    largest: Tensor  # (M, 1) the largest |u_j|^2
    smallest: Tensor  # (M, 1) at most the squared distance of the hull from the origin
    size: int
    eps: float

    @classmethod
    def of(cls, matcher: _Matcher, mentions: MentionFeatures) -> _MentionBounds:
        values = _wide(mentions.tensors["text_value"])
        if matcher.tglu.mask_padding:
            mask = mentions.tensors["text_mask"]
            first = mask.int().argmax(dim=1)
            real = values[torch.arange(len(values), device=values.device), first].unsqueeze(1)
            values = torch.where(mask.unsqueeze(-1), values, real)
        centres, radii = _balls(values, min(_BALLS, values.shape[1]))
        largest = values.square().sum(dim=-1).amax(dim=1, keepdim=True)
        norm = matcher.tglu.layer_norm
        return cls(values, centres, radii, largest, _hull_distance(values), values.shape[-1], norm.eps)

    def _scale(self, square: Tensor) -> Tensor:
        return (square / self.size + self.eps).rsqrt()

    def ball(self, local: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (M, N) of the attention's part, less b; `local` is w (N, d), `norm` |w| (N,)."""
        lower = upper = torch.empty(0)
        for number in range(self.radii.shape[1]):
            middle, spread = self.centres[:, number] @ local.T, self.radii[:, number, None] * norm
            lower = torch.minimum(lower, middle - spread) if number else middle - spread
            upper = torch.maximum(upper, middle + spread) if number else middle + spread
        cap = (self.largest.sqrt() * self._scale(self.largest)) * norm
        lower, upper = self._divided(lower, upper)
        return torch.maximum(lower, -cap), torch.minimum(upper, cap)

    def hull(self, row: int, local: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (N,) of the attention's part of one mention, less b."""
        products = local @ self.values[row].T
        lower, upper = products.amin(dim=1), products.amax(dim=1)
        return self._divided(lower, upper, row)

    def _divided(self, lower: Tensor, upper: Tensor, rows: int | slice = slice(None)) -> tuple[Tensor, Tensor]:
        by_small, by_large = self._scale(self.smallest[rows]), self._scale(self.largest[rows])
        return (
            torch.where(lower < 0, lower * by_small, lower * by_large),
            torch.where(upper > 0, upper * by_small, upper * by_large),
        )


def _balls(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres (M, count, d) and radii (M, count) of balls that hold each of M sets of points (M, L, d).

    The points nearest to each of `count` of them that are far apart (each the farthest from those before) make a ball
    around their mean. Padding and function words lie close together, so that a few small balls hold them.
    """
    every = torch.arange(len(points), device=points.device)
    distances = torch.cdist(points, points)
    picked = [(points - points.mean(dim=1, keepdim=True)).norm(dim=-1).argmin(dim=1)]
    nearest = distances[every, picked[0]]
    for _ in range(count - 1):
        picked.append(nearest.argmax(dim=1))
        nearest = torch.minimum(nearest, distances[every, picked[-1]])
    to_picked = distances.gather(1, torch.stack(picked, dim=1).unsqueeze(-1).expand(-1, -1, points.shape[1]))
    member = torch.nn.functional.one_hot(to_picked.argmin(dim=1), count).to(points.dtype)
    centres = member.transpose(1, 2) @ points / member.sum(dim=1).clamp(min=1).unsqueeze(-1)
    radii = ((points.unsqueeze(2) - centres.unsqueeze(1)).norm(dim=-1) * member).amax(dim=1)
    # An empty ball, of points that are all the same, must not lower a bound: it repeats the first.
    empty = member.sum(dim=1) == 0
    return torch.where(empty.unsqueeze(-1), centres[:, :1], centres), torch.where(empty, radii[:, :1], radii)


def _hull_distance(points: Tensor, steps: int = 200) -> Tensor:
    """A lower bound (M, 1) of the squared distance of the origin from the hull of each of M sets of points (M, L, d).

    Frank-Wolfe with exact steps on `min |x|^2`, x in the hull. At any x the distance squared is at least
    `|x|^2 - gap` with the duality gap `2 <x, x - v>`, v the point with the smallest `<x, v>`; and, as any hull point's
    dot product with x is at least `<x, v>`, it is also at least `(<x, v> / |x|)^2` where that product is positive.
    """
    gram = points @ points.transpose(1, 2)
    weights = torch.full(points.shape[:2], 1 / points.shape[1], dtype=points.dtype, device=points.device)
    best = torch.zeros(points.shape[0], dtype=points.dtype, device=points.device)
    rows = torch.arange(points.shape[0], device=points.device)
    for step in range(steps):
        products = (gram @ weights.unsqueeze(-1)).squeeze(-1)  # <x, u_j>
        square = (weights * products).sum(dim=1)
        smallest, vertex = products.min(dim=1)
        gap = 2 * (square - smallest)
        positive = smallest.clamp(min=0)
        bound = positive * (positive / square.clamp(min=torch.finfo(points.dtype).tiny))
        best = torch.maximum(best, torch.maximum(square - gap, bound))
        if step % 20 == 19 and bool((square - best <= 1e-3 * square + 1e-12).all()):
            break
        # |x + t (v - x)|^2 is smallest at t = <x, x - v> / |x - v|^2.
        distance = (square - 2 * smallest + gram[rows, vertex, vertex]).clamp(min=torch.finfo(points.dtype).tiny)
        move = ((square - smallest) / distance).clamp(0, 1).unsqueeze(1)
        weights = weights * (1 - move)
        weights[rows, vertex] += move.squeeze(1)
    # The sums above are rounded: keep clear of it.
    return (best * (1 - 1e-4) - 1e-6 * gram.diagonal(dim1=1, dim2=2).amax(dim=1)).clamp(min=0).unsqueeze(1)


def _base_scores(matcher: _Matcher, mention: dict[str, Tensor], entity: dict[str, Tensor]) -> Tensor:
    """The total score (M, N) without the attention's c . w part, exactly."""
    text = matcher.tglu.global_score(mention, entity) + entity["text_bias"]
    return (text / 2 + matcher.vdlu.score(mention, entity) + matcher.cmfu.score(mention, entity)) / 3


def _slack(scores: Tensor) -> Tensor:
    return _SLACK * (1 + scores.abs())


def score_pairs(
    matcher: _Matcher,
    mentions: MentionFeatures,
    mention_rows: Tensor,
    blocks: EntityBlocks,
    entity_rows: Tensor,
    block_bytes: int,
) -> MimicOutput:
    """Exact scores of given pairs, each tensor of shape (pairs,)."""
    device = mention_rows.device
    length, width = mentions.tensors["text_key"].shape[1:]
    chunk = max(1, block_bytes // (4 * length * (length + 4 * width)))
    parts = []
    for start in range(0, len(mention_rows), chunk):
        picked = slice(start, start + chunk)
        entities = blocks.full(entity_rows[picked], device)
        parts.append(matcher.score_pairs(mentions[mention_rows[picked]], entities))
    if not parts:
        empty = torch.empty(0, device=device)
        return MimicOutput(logits=empty, text_logits=empty, image_logits=empty, cross_modal_logits=empty)
    if len(parts) == 1:
        return parts[0]
    return MimicOutput(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class _TopK:
    """The best k rows seen so far for each of M mentions."""

    def __init__(self, count: int, k: int, device: torch.device) -> None:
        self.scores = torch.full((count, k), -torch.inf, device=device)
        self.rows = torch.full((count, k), -1, dtype=torch.long, device=device)

    @property
    def threshold(self) -> Tensor:
        """The k-th best score of each mention, of shape (M, 1)."""
        return self.scores[:, -1:]

    def merge(self, scores: Tensor, rows: Tensor) -> None:
        """Takes scores (M, n) of entity rows (M, n) into account; rows seen before must not come again."""
        scores = torch.cat([self.scores, scores], dim=1)
        rows = torch.cat([self.rows, rows], dim=1)
        # Equal scores in the order of rows, so that the answer does not depend on the order of work.
        order = rows.argsort(dim=1, stable=True)
        scores, rows = scores.gather(1, order), rows.gather(1, order)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)


@dataclass
class Searcher:
    """Finds the best entities, and the ranks of given ones, for blocks of mentions.

    Args:
        matcher: the model's matcher, in float32, on the device where the work is done.
        blocks: the entities.
        block_bytes: memory that the tensors of one block of pairs may take.
    """

    matcher: _Matcher
    blocks: EntityBlocks
    block_bytes: int = 128 * 2**20
    # Rows of entities whose cheap scores are made in one go: their tensors stay in a CPU's cache.
    sub_block: int = 1024
    stats: SearchStats = field(default_factory=SearchStats)

    def top_k(self, mentions: MentionFeatures, k: int, exhaustive: bool, advance: Callable[[int], Any]) -> _TopK:
        """The k best entities of each mention; `advance` is told of each block's number of pairs."""
        device = mentions.tensors["text_embed"].device
        top = _TopK(len(mentions), k, device)
        bounds = None if exhaustive else _MentionBounds.of(self.matcher, mentions)
        for start, stop in self._super_blocks(len(mentions)):
            pairs = len(mentions) * (stop - start)
            with self._counted(pairs):
                if bounds is None:
                    self._exhaustive_block(mentions, start, stop, top)
                else:
                    self._certified_block(mentions, bounds, start, stop, top)
            advance(pairs)
        return top

    @contextmanager
    def _counted(self, pairs: int) -> Iterator[None]:
        """Counts a block's pairs; one that is scored twice counts once."""
        before = self.stats.exact_pairs
        yield
        self.stats.pairs += pairs
        self.stats.exact_pairs = min(self.stats.exact_pairs, before + pairs)

    def _super_blocks(self, count: int) -> Iterator[tuple[int, int]]:
        # Two float32 tensors of the block's shape are kept, a few more are made for a while. With few mentions, the
        # entities' vectors that the hull's bounds need weigh more.
        width = self.matcher.tglu.fc_cls.out_features
        rows = max(self.sub_block, self.block_bytes // max(16 * count, 8 * width))
        rows -= rows % self.sub_block  # the same sub-blocks whatever the number of mentions, so that they can be kept
        for start in range(0, len(self.blocks), rows):
            yield start, min(start + rows, len(self.blocks))

    def _all_scores(self, mentions: MentionFeatures, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Scores (M, rows) of all pairs of a block, part by part; of removed entities -inf."""
        tokens = mentions.tensors["text_key"].shape[1] ** 2
        rows = max(1, min(4096, self.block_bytes // (4 * tokens * len(mentions))))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            entities = self.blocks.full(slice(first, last), mentions.tensors["text_embed"].device)
            scores = self.matcher(mentions, entities).logits
            self.stats.exact_pairs += scores.numel()
            self._hide_removed(scores, first, last)
            yield first, scores

    def _exhaustive_block(self, mentions: MentionFeatures, start: int, stop: int, top: _TopK) -> None:
        for first, scores in self._all_scores(mentions, start, stop):
            floor, k = top.threshold, top.scores.shape[1]
            if scores.shape[1] >= k:
                last = scores.topk(k, dim=1).values[:, -1:]
                floor = torch.maximum(floor, last - _slack(last))
            # All that may tie with the k-th best, however many: of equals the first rows are the answer.
            width = int((scores + _slack(scores) >= floor).sum(dim=1).max())
            best = scores.topk(width, dim=1)
            self._score_into(mentions, best.indices, best.values + _slack(best.values) >= floor, first, top)

    def _hide_removed(self, scores: Tensor, start: int, stop: int) -> None:
        alive = self.blocks.alive(start, stop)
        if alive is not None:
            scores.masked_fill_(~alive.to(scores.device), -torch.inf)

    def _cheap(
        self, mentions: MentionFeatures, bounds: _MentionBounds, start: int, stop: int, lower: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """For a block, of shape (M, rows): scores without the attention's part, and the balls' bounds of the total."""
        device = mentions.tensors["text_embed"].device
        shape = (len(mentions), stop - start)
        base, high = torch.empty(shape, device=device), torch.empty(shape, device=device)
        low = torch.empty(shape, device=device) if lower else None
        for first in range(start, stop, self.sub_block):
            last = min(first + self.sub_block, stop)
            entity = self.blocks.light(first, last, device)
            place = slice(first - start, last - start)
            scores = _base_scores(self.matcher, mentions.tensors, entity)
            local = entity["text_local"]
            smallest, largest = bounds.ball(local, local.norm(dim=-1))
            base[:, place] = scores
            high[:, place] = torch.add(scores, largest, alpha=1 / 6)
            if low is not None:
                low[:, place] = torch.add(scores, smallest, alpha=1 / 6)
        self._hide_removed(high, start, stop)
        if low is not None:
            self._hide_removed(low, start, stop)
        return base, high, low

    def _hull(
        self, bounds: _MentionBounds, start: int, stop: int, base: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The hull's bounds of the total for the pairs that `wanted` (M, rows) marks.

        Returns:
            mention rows, block columns, lower and upper bounds, each of shape (pairs,), in the order of mentions.
        """
        mention_rows, columns = wanted.nonzero(as_tuple=True)
        self.stats.hull_pairs += len(columns)
        counts = torch.bincount(mention_rows, minlength=len(wanted)).tolist()
        used, places = columns.unique(return_inverse=True)
        local = self.blocks.local(used + start, base.device)
        lows, highs = [], []
        for row, part in enumerate(places.split(counts)):
            if len(part):
                low, high = bounds.hull(row, local[part])
                lows.append(low)
                highs.append(high)
        picked = base[mention_rows, columns]
        if not lows:
            return mention_rows, columns, picked, picked
        return mention_rows, columns, picked + torch.cat(lows) / 6, picked + torch.cat(highs) / 6

    def _certified_block(
        self, mentions: MentionFeatures, bounds: _MentionBounds, start: int, stop: int, top: _TopK
    ) -> None:
        base, high, _ = self._cheap(mentions, bounds, start, stop, lower=False)
        # A good threshold first: the exact scores of the pairs that promise most.
        seeds = high.topk(min(top.scores.shape[1] + _SEEDS, stop - start), dim=1)
        hopeful = seeds.values + _slack(seeds.values) >= top.threshold
        self._score_into(mentions, seeds.indices, hopeful, start, top)
        high.scatter_(1, seeds.indices, -torch.inf)
        wanted = high + _slack(high) >= top.threshold
        wanted &= high > -torch.inf
        mention_rows, columns, _, upper = self._hull(bounds, start, stop, base, wanted)
        open_ = upper + _slack(upper) >= top.threshold[mention_rows, 0]
        if int(open_.sum()) > _EXHAUSTIVE_FRACTION * high.numel() and high.numel() > 4096:
            # The seeds will come again.
            self._forget(top, start, stop)
            self._exhaustive_block(mentions, start, stop, top)
            return
        self._best_first(mentions, mention_rows[open_], columns[open_], upper[open_], start, top)

    def _forget(self, top: _TopK, start: int, stop: int) -> None:
        inside = (top.rows >= start) & (top.rows < stop)
        top.scores = top.scores.masked_fill(inside, -torch.inf)
        top.rows = top.rows.masked_fill(inside, -1)
        order = top.scores.argsort(dim=1, descending=True, stable=True)
        top.scores, top.rows = top.scores.gather(1, order), top.rows.gather(1, order)

    def _best_first(
        self,
        mentions: MentionFeatures,
        mention_rows: Tensor,
        columns: Tensor,
        upper: Tensor,
        start: int,
        top: _TopK,
    ) -> None:
        """Scores open pairs exactly in the order of their bound, as long as a bound is above the k-th best score."""
        count = len(mentions)
        while len(columns):
            order = upper.argsort(descending=True, stable=True)
            order = order[mention_rows[order].argsort(stable=True)]
            mention_rows, columns, upper = mention_rows[order], columns[order], upper[order]
            counts = torch.bincount(mention_rows, minlength=count)
            position = torch.arange(len(columns), device=columns.device)
            position = position - (counts.cumsum(0) - counts)[mention_rows]
            now = position < _ROUND
            width = int(counts.max().clamp(max=_ROUND))
            table = torch.zeros((count, width), dtype=torch.long, device=columns.device)
            valid = torch.zeros((count, width), dtype=torch.bool, device=columns.device)
            table[mention_rows[now], position[now]] = columns[now]
            valid[mention_rows[now], position[now]] = True
            self._score_into(mentions, table, valid, start, top)
            left = ~now & (upper + _slack(upper) >= top.threshold[mention_rows, 0])
            mention_rows, columns, upper = mention_rows[left], columns[left], upper[left]

    def _score_into(self, mentions: MentionFeatures, columns: Tensor, valid: Tensor, start: int, top: _TopK) -> None:
        """Scores the valid pairs of (M, n) columns exactly and merges them."""
        rows, places = valid.nonzero(as_tuple=True)
        entity_rows = columns[rows, places] + start
        exact = score_pairs(self.matcher, mentions, rows, self.blocks, entity_rows, self.block_bytes).logits
        self.stats.exact_pairs += len(rows)
        scores = torch.full(columns.shape, -torch.inf, device=columns.device)
        scores[rows, places] = exact
        top.merge(scores, torch.where(valid, columns + start, -1))

    def ranks(
        self, mentions: MentionFeatures, answers: Tensor, exhaustive: bool, advance: Callable[[int], Any]
    ) -> tuple[Tensor, Tensor]:
        """How many entities score above each mention's answer, and how many tie with it (itself left out).

        Args:
            answers (`torch.LongTensor` of shape `(M,)`): the row of each mention's answer.

        Returns:
            two `torch.LongTensor` of shape `(M,)`.
        """
        device = mentions.tensors["text_embed"].device
        count = len(mentions)
        every = torch.arange(count, device=device)
        gold = score_pairs(self.matcher, mentions, every, self.blocks, answers, self.block_bytes).logits.unsqueeze(1)
        above = torch.zeros(count, dtype=torch.long, device=device)
        equal = torch.zeros(count, dtype=torch.long, device=device)
        bounds = None if exhaustive else _MentionBounds.of(self.matcher, mentions)
        for start, stop in self._super_blocks(count):
            pairs = count * (stop - start)
            with self._counted(pairs):
                if bounds is None:
                    self._rank_exhaustive(mentions, answers, gold, start, stop, above, equal)
                else:
                    self._rank_certified(mentions, bounds, answers, gold, start, stop, above, equal)
            advance(pairs)
        return above, equal

    def _rank_exhaustive(
        self,
        mentions: MentionFeatures,
        answers: Tensor,
        gold: Tensor,
        start: int,
        stop: int,
        above: Tensor,
        equal: Tensor,
    ) -> None:
        margin = _slack(gold)
        for first, scores in self._all_scores(mentions, start, stop):
            _hide_answers(scores, answers, first, first + scores.shape[1], -torch.inf)
            surely = scores > gold + margin
            rows, columns = (~surely & (scores >= gold - margin)).nonzero(as_tuple=True)
            above += surely.sum(dim=1)
            self._compare(mentions, rows, columns + first, gold, above, equal)

    def _compare(
        self,
        mentions: MentionFeatures,
        mention_rows: Tensor,
        entity_rows: Tensor,
        gold: Tensor,
        above: Tensor,
        equal: Tensor,
    ) -> None:
        """Counts the pairs whose exact score is above their mention's answer's, or ties with it."""
        pairs = score_pairs(self.matcher, mentions, mention_rows, self.blocks, entity_rows, self.block_bytes)
        self.stats.exact_pairs += len(mention_rows)
        gold = gold[mention_rows, 0]
        tie = (pairs.logits - gold).abs() <= _TIE * (1 + gold.abs())
        above += torch.bincount(mention_rows[~tie & (pairs.logits > gold)], minlength=len(above))
        equal += torch.bincount(mention_rows[tie], minlength=len(equal))

    def _rank_certified(
        self,
        mentions: MentionFeatures,
        bounds: _MentionBounds,
        answers: Tensor,
        gold: Tensor,
        start: int,
        stop: int,
        above: Tensor,
        equal: Tensor,
    ) -> None:
        base, high, low = self._cheap(mentions, bounds, start, stop, lower=True)
        assert low is not None
        for tensor in (high, low):
            _hide_answers(tensor, answers, start, stop, -torch.inf)
        margin = _slack(gold)
        above_here = low > gold + margin
        wanted = ~above_here & (high >= gold - margin)
        mention_rows, columns, lower, upper = self._hull(bounds, start, stop, base, wanted)
        pair_gold, pair_margin = gold[mention_rows, 0], margin[mention_rows, 0]
        surely = lower > pair_gold + pair_margin
        open_ = ~surely & (upper >= pair_gold - pair_margin)
        if int(open_.sum()) > _EXHAUSTIVE_FRACTION * base.numel() and base.numel() > 4096:
            self._rank_exhaustive(mentions, answers, gold, start, stop, above, equal)
            return
        above += above_here.sum(dim=1)
        above += torch.bincount(mention_rows[surely], minlength=len(above))
        self._compare(mentions, mention_rows[open_], columns[open_] + start, gold, above, equal)


def _hide_answers(scores: Tensor, answers: Tensor, start: int, stop: int, value: float) -> None:
    inside = (answers >= start) & (answers < stop)
    rows = inside.nonzero().squeeze(1)
    scores[rows, answers[rows] - start] = value


__all__ = ["SearchStats", "Searcher", "score_pairs"]

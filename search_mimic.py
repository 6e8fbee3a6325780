"""Exact search and ranking over encoded entities, without scoring every pair exactly.

A total score is the sum of dot products, which are cheap; of the image unit, which is not as cheap; and of the text
unit's attention, which takes nearly all the time. So pairs are pruned in stages, by upper bounds of the total:

    for each block of entities:
        bound every pair: dot products, bounds of the image unit, coarse bounds of the attention
        if there are no k best yet: score the pairs with the highest bounds exactly
        contenders = the pairs whose bound reaches the mention's k-th best score
        put the image unit's scores in the place of their bounds; prune the contenders again
        put the bounds of the hull in the place of the coarse ones; prune the contenders again
        where too many contenders are left of a mention: score all of the block's pairs of that mention
        while contenders are left:
            re-score exactly those with the highest bounds, and merge them into the k best
            prune the contenders again

Both methods are exact: "exhaustive" scores every pair, and the answers are the same. Knows rows, not ids or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .bounds_mimic import COARSE_NAMES, CoarseFeatures, MentionBounds
from .matching_mimic import (
    HALF_UNITS,
    UNITS,
    EntityFeatures,
    Matcher,
    MentionFeatures,
    PairScores,
    VisionDualDirection,
    at_least_float32,
    pick_prefix,
)

METHODS = ("pruned", "exhaustive")
_MENTION_BLOCK = 256
# Of so many candidates, bounding their scores takes less time than scoring them all.
_MANY_CANDIDATES = 2048
_CANDIDATE_BYTES = 64 * 2**20
# Rounding differs with the shape of a matrix product. Relative to the largest terms of a mention's scores, bounds and
# block-wise scores are trusted up to _SLACK; what is closer is decided by `score_pairs`, which gives a pair the same
# score in any company, up to _TIE of the score.
_SLACK = 2e-5
_TIE = 1e-6
# Pairs of each mention from which the best k are scored exactly at first; those that are scored before the others'
# bounds are compared again; and how often that is done before counting what is left.
_SEEDS = 32
_ROUND = 16
_PATIENCE = 4
# Where more than this fraction of an image's pairs are left, the image unit is cheaper for all of them at once; beside
# few images, where its products have few rows, it is so later.
_DENSE, _FEW_DENSE = 0.07, 0.4
_FEW = 16
# Where more than this fraction of a mention's pairs in a block would be scored exactly, bounding them does not pay.
_EXHAUSTIVE_FRACTION = 0.2
# Pairs whose vectors are gathered in one go, and bytes of attention made in one go: they stay in a CPU's cache.
_PAIRS_AT_ONCE = 2048
_CACHE_BYTES = 16 * 2**20
_BIAS = VisionDualDirection.QUERY_STATS.index("beta.n")

# Features of the attention.
_MENTION_TOKENS = ("text_key", "text_value", "text_mask")
_ATTENTION = ("text_query", "text_local", "text_bias", "text_mask")
# Directions of the image unit: the entity's image is the query, or the mention's is. Features of the entity's side;
# the mention's are those of the other direction.
_ENT2MEN, _MEN2ENT = 0, 1
_PREFIXES = ("image_query_", "image_key_")
_QUERY = tuple(_PREFIXES[0] + name for name in ("q", "a", "m", "stats"))
_KEY = tuple(_PREFIXES[1] + name for name in ("z", "a", "k", "stats"))
_SIDES = (_QUERY, _KEY)


class EntityBlocks(Protocol):
    """What a search needs of an index: its rows, in float32 and on a device."""

    def __len__(self) -> int: ...

    def gather(self, rows: Tensor | slice, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Some features of some rows; names of features that there are not are passed over."""
        ...

    def full(self, rows: Tensor | slice, device: torch.device) -> EntityFeatures:
        """All features of some rows."""
        ...

    def alive(self, start: int, stop: int) -> Tensor | None:
        """Which of the rows are not removed, as booleans; `None` if all."""
        ...


@dataclass
class ChosenRows:
    """Some rows of an index, none of them removed, as if there were no others."""

    blocks: EntityBlocks
    rows: Tensor  # on the CPU

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, rows: Tensor | slice, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        return self.blocks.gather(self.rows[rows.cpu() if isinstance(rows, Tensor) else rows], names, device)

    def full(self, rows: Tensor | slice, device: torch.device) -> EntityFeatures:
        return self.blocks.full(self.rows[rows.cpu() if isinstance(rows, Tensor) else rows], device)

    def alive(self, start: int, stop: int) -> Tensor | None:
        return None


@dataclass
class SearchStats:
    """How much work a search was.

    Args:
        pairs (`int`): mention-entity pairs that the answer speaks of.
        image_pairs (`int`): scores of the image unit that were computed; a pair has two, one of each direction.
        hull_pairs (`int`): pairs for which the tighter bound, of the hull, was computed.
        exact_pairs (`int`): pairs that were scored exactly.
    """

    pairs: int = 0
    image_pairs: int = 0
    hull_pairs: int = 0
    exact_pairs: int = 0

    @property
    def exact_fraction(self) -> float:
        """Share of the pairs that were scored exactly."""
        return self.exact_pairs / self.pairs if self.pairs else 0.0


def _rows(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of each tensor. `index_select` copies whole rows: ten times as fast as indexing."""
    return {name: tensor.index_select(0, rows) for name, tensor in tensors.items()}


# --- Bounds -------------------------------------------------------------------------------------------------------


@dataclass
class _Query:
    """M mentions, prepared for a search."""

    mentions: MentionFeatures
    text: Tensor  # (M, projection_dim) as parts of the total
    cross_modal: Tensor  # (M, d)
    most: Tensor  # (M, 1) the most that the mention's side of the image unit adds to a total
    bounds: MentionBounds
    size: Tensor  # (M, 1) the largest terms of a score, but for what `CoarseFeatures.extent` says
    images: tuple[dict[str, Tensor], dict[str, Tensor]]  # of G different images, what each direction needs
    image_of: Tensor  # (M,) which of them is a mention's
    image_bound: Tensor  # (G, 1) the most that they add to a total
    dense: Tensor  # (G,) whether so many of its pairs are left that the image unit is cheaper for all at once
    first: int = -1  # the direction of the image unit that is computed first, which tells more; -1 before that is known

    @classmethod
    def of(cls, matcher: Matcher, mentions: MentionFeatures) -> _Query:
        tensors = mentions.tensors
        text, cross_modal = (
            at_least_float32(tensors["text_embed"]) / HALF_UNITS,
            at_least_float32(tensors["cross_modal"]) / UNITS,
        )
        size = torch.ones(len(mentions), 1, device=text.device)
        for vectors, norm in ((text, matcher.text_cls_layernorm), (cross_modal, matcher.cmfu.gate_layer_norm)):
            # No entity's vector is longer than a layer norm's output can be; a tenth more for how it is stored.
            longest = norm.weight.abs().amax() * norm.normalized_shape[0] ** 0.5 + norm.bias.norm()
            size = size + 1.1 * longest * vectors.norm(dim=1, keepdim=True)
        distinct, image_of = _different({name: tensors[name] for name in (*_KEY, *_QUERY)})
        vector, stats = at_least_float32(distinct["image_query_m"]), at_least_float32(distinct["image_query_stats"])
        # From the vectors: of features in half precision the stored number is rounded.
        image_bound = (VisionDualDirection.upper_bound(vector, stats[:, _BIAS]) / HALF_UNITS).unsqueeze(1)
        most = image_bound.index_select(0, image_of)
        images = ({name: distinct[name] for name in _KEY}, {name: distinct[name] for name in _QUERY})
        dense = torch.zeros(len(image_bound), dtype=torch.bool, device=text.device)
        bounds = MentionBounds.of(matcher, mentions)
        return cls(mentions, text, cross_modal, most, bounds, size + most.abs(), images, image_of, image_bound, dense)

    def __len__(self) -> int:
        return len(self.mentions)

    def margin(self, extent: Tensor) -> Tensor:
        """How far rounding may move the scores and bounds of entities of an extent, (M, 1)."""
        most, offset, local = extent
        return _SLACK * (self.size + most + offset + self.bounds.cap * local / HALF_UNITS)


def _different(images: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Different ones of B images' features, and the number of each image's, (B,): what has no image has the same
    blank one. Some that are equal may be told apart."""
    stats = next(tensor for name, tensor in images.items() if name.endswith("stats"))
    numbers, number_of = stats[:, 0].unique(return_inverse=True)
    count, every = len(stats), torch.arange(len(stats), device=stats.device)
    first = every.new_full((len(numbers),), count).scatter_reduce(0, number_of, every, "amin")
    if len(first) == count:
        return images, every
    again = (every != first[number_of]).nonzero().squeeze(1)
    same = torch.ones_like(again, dtype=torch.bool)
    for tensor in images.values():
        pair = tensor.index_select(0, again), tensor.index_select(0, first[number_of[again]])
        same &= (pair[0] == pair[1]).all(dim=1)
    # Those that only look the same by that number stay on their own.
    alone = again[~same]
    chosen = torch.cat([first, alone])
    number_of[alone] = torch.arange(len(first), len(chosen), device=stats.device)
    return _rows(images, chosen), number_of


@dataclass
class _Block:
    """Bounds of the pairs of M mentions with rows `start` to `stop`."""

    start: int
    high: Tensor  # (M, N) upper bounds of the totals, but for the most that the mention's side of the image unit adds
    gap: Tensor  # (M, N) what of them is the bound of the attention's c . w
    most: Tensor  # (N,) the most that the entity's side of the image unit adds
    known: Tensor  # (M,) whether the score of the image unit's first direction is in `high` in the place of its bound
    margin: Tensor  # (M, 1)

    @property
    def width(self) -> int:
        return self.high.shape[1]


@dataclass
class _Pairs:
    """Some pairs of a block, in the order of mentions; each tensor has the shape (pairs,)."""

    mention_rows: Tensor
    columns: Tensor
    lower: Tensor  # bounds of the total
    upper: Tensor

    def __getitem__(self, which: Tensor) -> _Pairs:
        return _Pairs(self.mention_rows[which], self.columns[which], self.lower[which], self.upper[which])

    def __len__(self) -> int:
        return len(self.columns)


# --- Exact scores of given pairs ----------------------------------------------------------------------------------


def score_pairs(
    matcher: Matcher,
    mentions: MentionFeatures,
    mention_rows: Tensor,
    blocks: EntityBlocks,
    entity_rows: Tensor,
    block_bytes: int,
) -> PairScores:
    """Exact scores of given pairs, each tensor of shape (pairs,)."""
    device = mention_rows.device
    if not len(mention_rows):
        empty = torch.empty(0, device=device)
        return PairScores(empty, empty, empty, empty)
    local = _local_scores(matcher, mentions, mention_rows, blocks, entity_rows, block_bytes)
    light = {name: tensor for name, tensor in mentions.tensors.items() if name not in _MENTION_TOKENS}
    width = sum(tensor[:1].numel() for tensor in light.values())
    parts = []
    for picked in torch.arange(len(mention_rows), device=device).split(max(1, block_bytes // (16 * width))):
        entities = EntityFeatures(
            blocks.gather(entity_rows[picked], ("text_embed", "cross_modal", *_QUERY, *_KEY), device)
        )
        some = MentionFeatures(_rows(light, mention_rows[picked]))
        parts.append(matcher.score_pairs(some, entities, local[picked]))
    if len(parts) == 1:
        return parts[0]
    return PairScores(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("total", "text", "image", "cross_modal"))
    )


def _local_scores(
    matcher: Matcher,
    mentions: MentionFeatures,
    mention_rows: Tensor,
    blocks: EntityBlocks,
    entity_rows: Tensor,
    block_bytes: int,
) -> Tensor:
    """The attention's part of given pairs, of shape (pairs,)."""
    owners, table, valid = _grouped(mention_rows)
    device, width = mention_rows.device, table.shape[1]
    tensors = {name: mentions.tensors[name] for name in _MENTION_TOKENS if name in mentions.tensors}
    length, size = tensors["text_key"].shape[1:]
    if device.type == "cpu":
        block_bytes = min(block_bytes, _CACHE_BYTES)
    result = torch.empty(len(mention_rows), device=device)
    for groups in torch.arange(len(table), device=device).split(
        max(1, block_bytes // (4 * length * (2 * size + width * (length + 2 * size))))
    ):
        flat = blocks.gather(entity_rows[table[groups]].flatten(), _ATTENTION, device)
        entity = {name: tensor.unflatten(0, (len(groups), width)) for name, tensor in flat.items()}
        scores = matcher.tglu.local_pairs(_rows(tensors, owners[groups]), entity)
        result[table[groups][valid[groups]]] = scores[valid[groups]].to(result.dtype)
    return result


def _grouped(mention_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in groups of one mention and W pairs each.

    Returns:
        each group's mention (G,), the numbers of its pairs (G, W), and which of these are there, not only to fill it.
    """
    order = mention_rows.argsort(stable=True)
    owners, counts = mention_rows[order].unique_consecutive(return_counts=True)
    # Filling up costs as much as a pair; a mention's keys and values, copied for each group, about half as much.
    groups_of = {width: (counts + width - 1) // width for width in (1, 2, 4, 8, 16)}
    width = min(groups_of, key=lambda width: float(groups_of[width].sum()) * (width + 0.5))
    groups = groups_of[width]
    numbers = torch.arange(len(order), device=order.device)
    numbers = numbers - (counts.cumsum(0) - counts).repeat_interleave(counts)
    group = (groups.cumsum(0) - groups).repeat_interleave(counts) + numbers // width
    table = torch.zeros((int(groups.sum()), width), dtype=torch.long, device=order.device)
    valid = torch.zeros_like(table, dtype=torch.bool)
    table[group, numbers % width] = order
    valid[group, numbers % width] = True
    return owners.repeat_interleave(groups), table, valid


# --- The search ---------------------------------------------------------------------------------------------------


class _TopK:
    """The best k rows seen so far for each of M mentions, among those that reach its floor (M, 1)."""

    def __init__(self, count: int, k: int, device: torch.device, floor: Tensor | None = None) -> None:
        self.floor = torch.full((count, 1), -torch.inf, device=device) if floor is None else floor
        self.scores = torch.full((count, k), -torch.inf, device=device)
        self.rows = torch.full((count, k), -1, dtype=torch.long, device=device)

    @property
    def threshold(self) -> Tensor:
        """What a score must reach to be among each mention's best k, of shape (M, 1)."""
        return torch.maximum(self.scores[:, -1:], self.floor)

    def found(self) -> Tensor:
        """The rows (M, k), best first; -1 where fewer reach the floor."""
        return self.rows.masked_fill(self.scores < self.floor, -1)

    def merge(self, scores: Tensor, rows: Tensor) -> None:
        """Takes scores (M, n) of entity rows (M, n) into account; rows seen before must not come again."""
        scores = torch.cat([self.scores, scores], dim=1)
        rows = torch.cat([self.rows, rows], dim=1)
        # Equal scores in the order of rows, so that the answer does not depend on the order of work.
        order = rows.argsort(dim=1, stable=True)
        scores, rows = scores.gather(1, order), rows.gather(1, order)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)

    def part(self, mention_rows: Tensor) -> _TopK:
        """The same for some of the mentions."""
        part = _TopK(len(mention_rows), self.scores.shape[1], self.scores.device, self.floor[mention_rows])
        part.scores, part.rows = self.scores[mention_rows], self.rows[mention_rows]
        return part

    def forget(self, start: int, stop: int) -> None:
        """Leaves out the rows from `start` to `stop`."""
        inside = (self.rows >= start) & (self.rows < stop)
        scores, rows = self.scores.masked_fill(inside, -torch.inf), self.rows.masked_fill(inside, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)


class _Places:
    """The answers of M mentions, and how many other entities are known to score above them, or as much."""

    def __init__(self, answers: Tensor, gold: Tensor) -> None:
        self.answers = answers  # (M,) rows
        self.gold = gold  # (M, 1) their scores
        self.above, self.equal = torch.zeros_like(answers), torch.zeros_like(answers)

    def hide_answers(self, scores: Tensor, start: int) -> None:
        """Of a block of scores (M, N) whose first row is `start`, hides those of the answers themselves."""
        rows = ((self.answers >= start) & (self.answers < start + scores.shape[1])).nonzero().squeeze(1)
        scores[rows, self.answers[rows] - start] = -torch.inf


@dataclass
class Searcher:
    """Finds the best entities, and the ranks of given ones, for blocks of mentions.

    Args:
        matcher: the model's matcher, in float32, on the device where the work is done.
        blocks: the entities.
        block_bytes: memory that the tensors of one block of pairs may take.
        sub_block: rows of entities that are bounded in one go, so that its tensors stay in a CPU's cache.
    """

    matcher: Matcher
    blocks: EntityBlocks
    block_bytes: int = 128 * 2**20
    sub_block: int = 1024
    stats: SearchStats = field(default_factory=SearchStats)

    def top_k(
        self,
        mentions: MentionFeatures,
        k: int,
        exhaustive: bool,
        advance: Callable[[int], Any],
        floor: Tensor | None = None,
    ) -> Tensor:
        """The rows (M, k) of the k best entities of each mention, -1 where fewer reach its `floor` (M, 1); `advance`
        is told of each block's number of pairs."""
        top = _TopK(len(mentions), k, mentions.tensors["text_embed"].device, floor)
        query = _Query.of(self.matcher, mentions)
        self._each_block(query, self._exhaustive_block if exhaustive else self._pruned_block, top, advance)
        return top.found()

    def scores_of(self, mentions: MentionFeatures, answers: Tensor) -> Tensor:
        """The score of each mention's answer, a row for each, (M,)."""
        every = torch.arange(len(mentions), device=answers.device)
        return score_pairs(self.matcher, mentions, every, self.blocks, answers, self.block_bytes).total

    def ranks(
        self,
        mentions: MentionFeatures,
        answers: Tensor,
        gold: Tensor,
        exhaustive: bool,
        advance: Callable[[int], Any],
    ) -> tuple[Tensor, Tensor]:
        """How many entities score above each mention's answer, and how many tie with it (itself left out).

        Args:
            answers (`torch.LongTensor` of shape `(M,)`): the row of each mention's answer; -1 where it is elsewhere.
            gold (`torch.Tensor` of shape `(M,)`): its score.

        Returns:
            two `torch.LongTensor` of shape `(M,)`.
        """
        places = _Places(answers, gold.unsqueeze(1))
        query = _Query.of(self.matcher, mentions)
        self._each_block(query, self._rank_exhaustive if exhaustive else self._rank_pruned, places, advance)
        return places.above, places.equal

    def _each_block(
        self, query: _Query, work: Callable[[_Query, int, int, Any], None], found: Any, advance: Callable[[int], Any]
    ) -> None:
        """Does some work for one block of rows after the other, and counts its pairs."""
        # Two float32 tensors of the block's shape are kept, a few more are made for a while. With few mentions, the
        # entities' vectors that the hull's bounds need weigh more.
        width = self.matcher.tglu.fc_cls.out_features
        rows = max(self.sub_block, self.block_bytes // max(16 * len(query), 8 * width))
        rows -= rows % self.sub_block  # so that only the last sub-block is cut short
        for start in range(0, len(self.blocks), rows):
            stop = min(start + rows, len(self.blocks))
            pairs, before = len(query) * (stop - start), self.stats.exact_pairs
            work(query, start, stop, found)
            self.stats.pairs += pairs
            self.stats.exact_pairs = min(self.stats.exact_pairs, before + pairs)  # one scored twice counts once
            advance(pairs)

    # --- Every pair

    def _all_scores(self, query: _Query, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Scores (M, rows) of all pairs of a block, part by part, of removed entities -inf; and what rounding may
        move them by, (M, 1)."""
        mentions = query.mentions
        device = mentions.tensors["text_embed"].device
        tokens = mentions.tensors["text_key"].shape[1] ** 2
        most = self.block_bytes if device.type != "cpu" else min(self.block_bytes, _CACHE_BYTES)
        rows = max(1, min(4096, most // (4 * tokens * len(mentions))))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            entities = self.blocks.full(slice(first, last), device)
            scores = self.matcher(mentions, entities).total
            self.stats.exact_pairs += scores.numel()
            self._hide_removed(scores, first, last)
            yield first, scores, query.margin(CoarseFeatures.of(entities.tensors).extent())

    def _exhaustive_block(self, query: _Query, start: int, stop: int, top: _TopK) -> None:
        for first, scores, margin in self._all_scores(query, start, stop):
            floor, k = top.threshold, top.scores.shape[1]
            if scores.shape[1] >= k:
                floor = torch.maximum(floor, scores.topk(k, dim=1).values[:, -1:] - margin)
            # All that may tie with the k-th best, however many: of equals the first rows are the answer.
            hopeful = (scores >= floor - margin) & (scores > -torch.inf)
            best = scores.topk(int(hopeful.sum(dim=1).max()), dim=1)
            self._score_into(query, best.indices, hopeful.gather(1, best.indices), first, top)

    def _hide_removed(self, scores: Tensor, start: int, stop: int) -> None:
        alive = self.blocks.alive(start, stop)
        if alive is not None:
            scores.masked_fill_(~alive.to(scores.device), -torch.inf)

    # --- The stages

    def _coarse_stage(self, query: _Query, start: int, stop: int) -> _Block:
        device = query.text.device
        shape = (len(query), stop - start)
        high, gap = torch.empty(shape, device=device), torch.empty(shape, device=device)
        most, extent = torch.empty(shape[1], device=device), torch.zeros(3, device=device)
        dense = bool(query.dense.any())
        for first in range(start, stop, self.sub_block):
            last = min(first + self.sub_block, stop)
            coarse = CoarseFeatures.of(self.blocks.gather(slice(first, last), COARSE_NAMES, device))
            place = slice(first - start, last - start)
            scores = torch.addmm(coarse.offset, query.text, coarse.text.T)
            scores.addmm_(query.cross_modal, coarse.cross_modal.T)
            if dense:
                scores += self._image_change(query, query.dense, slice(first, last), coarse.most)
            bound = query.bounds.ball(coarse.local).div_(HALF_UNITS)
            gap[:, place] = bound
            torch.add(scores, bound, out=high[:, place])
            most[place] = coarse.most
            extent = torch.maximum(extent, coarse.extent())
        self._hide_removed(high, start, stop)
        if query.first < 0:
            query.first = self._tighter_direction(query, most, start)
        known = query.dense.index_select(0, query.image_of)
        return _Block(start, high, gap, most, known, query.margin(extent))

    def _tighter_direction(self, query: _Query, most: Tensor, start: int) -> int:
        """The direction of the image unit that is further below the most that it may add, for some of the entities."""
        places = torch.arange(0, len(most), max(1, len(most) // _FEW), device=most.device)[:_FEW]
        every = torch.arange(len(query.dense), device=most.device)
        less = [
            self._direction(query, side, every, self.blocks.gather(places + start, _SIDES[side], most.device))
            for side in (_ENT2MEN, _MEN2ENT)
        ]
        return int((less[_MEN2ENT] - query.image_bound).sum() < (less[_ENT2MEN] - most[places]).sum())

    def _contenders(self, query: _Query, block: _Block, floor: Tensor) -> _Pairs:
        """The pairs of a block whose total may reach `floor` (M, 1)."""
        wanted = self._may_reach(query, block, floor)
        left = torch.zeros(len(query.dense), dtype=torch.long, device=wanted.device)
        left.index_add_(0, query.image_of, wanted.count_nonzero(dim=1))
        dense = left > (_DENSE if len(left) > _FEW else _FEW_DENSE) * block.width
        dense &= ~query.dense
        if bool(dense.any()):
            self._image_scores_of_all(query, block, dense)
            wanted = self._may_reach(query, block, floor)
        pairs = self._hull(query, block, self._image_stage(query, block, wanted, floor))
        return pairs[self._reach(block, pairs, floor)]

    @staticmethod
    def _part_unprunable(query: _Query, block: _Block, pairs: _Pairs) -> tuple[_Pairs, Tensor]:
        """Parts pairs that would be scored exactly: those of mentions that have few of them, and the rows of the other
        mentions, for which all entities are better scored."""
        left = torch.bincount(pairs.mention_rows, minlength=len(query))
        unprunable = left > max(_EXHAUSTIVE_FRACTION * block.width, _ROUND)
        return pairs[~unprunable[pairs.mention_rows]], unprunable.nonzero().squeeze(1)

    @staticmethod
    def _may_reach(query: _Query, block: _Block, floor: Tensor) -> Tensor:
        """Which pairs may reach a score, by the block's bounds, (M, N)."""
        # What is hidden is below any number.
        lowest = torch.finfo(block.high.dtype).min
        return block.high >= (floor - block.margin - query.most).clamp(min=lowest)

    @staticmethod
    def _reach(block: _Block, pairs: _Pairs, floor: Tensor) -> Tensor:
        return pairs.upper >= (floor - block.margin)[pairs.mention_rows, 0]

    def _image_scores_of_all(self, query: _Query, block: _Block, dense: Tensor) -> None:
        """Puts the scores of the image unit's first direction in the place of their bound, for all pairs of mentions
        with some images (G,); in the blocks that follow the coarse stage does that."""
        for first in range(0, block.width, self.sub_block):
            last = min(first + self.sub_block, block.width)
            rows = slice(block.start + first, block.start + last)
            block.high[:, first:last] += self._image_change(query, dense, rows, block.most[first:last])
        query.dense |= dense
        block.known = query.dense.index_select(0, query.image_of)

    def _image_change(self, query: _Query, chosen: Tensor, rows: slice, most: Tensor) -> Tensor:
        """How much less than it may the image unit's first direction adds to the totals of some rows, (M, rows); 0 for
        mentions whose image is not chosen."""
        numbers = chosen.nonzero().squeeze(1)
        entities = self.blocks.gather(rows, _SIDES[query.first], most.device)
        entity_of = None
        if len(numbers) > _FEW:  # beside them, telling the entities' images apart takes little time
            entities, entity_of = _different(entities)
        scores = self._direction(query, query.first, numbers, entities)
        if entity_of is not None:
            scores = scores.index_select(1, entity_of)
        scores -= most if query.first == _ENT2MEN else query.image_bound[numbers]
        change = scores.new_zeros(len(chosen), scores.shape[1]).index_copy_(0, numbers, scores)
        return change.index_select(0, query.image_of)

    def _direction(self, query: _Query, direction: int, numbers: Tensor, entities: dict[str, Tensor]) -> Tensor:
        """What a direction of the image unit adds to the totals of some of the mentions' images (P,) with entities,
        (P, N)."""
        unit, queries, keys = self._sides(direction, _rows(query.images[direction], numbers), entities)
        scores = unit(queries, keys)
        self.stats.image_pairs += scores.numel()
        return (scores.T.contiguous() if direction == _ENT2MEN else scores).div_(HALF_UNITS)

    def _sides(
        self, direction: int, mention: dict[str, Tensor], entity: dict[str, Tensor]
    ) -> tuple[VisionDualDirection, dict[str, Tensor], dict[str, Tensor]]:
        """A direction's unit, its queries and its keys."""
        mention, entity = (
            pick_prefix(_PREFIXES[1 - direction], mention),
            pick_prefix(_PREFIXES[direction], entity),
        )
        unit = self.matcher.vdlu
        if direction == _ENT2MEN:
            return unit.dual_ent2men, entity, mention
        return unit.dual_men2ent, mention, entity

    def _image_stage(
        self, query: _Query, block: _Block, wanted: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores the image unit for the pairs that `wanted` (M, N) marks.

        Returns:
            mention rows, block columns, and the totals without the attention's c . w, of shape (pairs,), of the pairs
            that may still reach `floor`; in the order of mentions.
        """
        # The entities' features of each part are kept for a while.
        size = 4 * sum(tensor[:1].numel() for tensor in query.images[query.first].values())
        rows = min(block.width, int(wanted.count_nonzero()))
        step = -(-block.width // max(1, -(-rows * size // (self.block_bytes // 4))))
        limit = floor - block.margin
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, block.width, step):
            mention_rows, columns = wanted[:, first : first + step].nonzero(as_tuple=True)
            columns += first
            upper = block.high[mention_rows, columns] + query.most[mention_rows, 0]
            for direction in (query.first, 1 - query.first):
                upper += self._image_scores_less_most(query, block, direction, mention_rows, columns)
                left = (upper >= limit[mention_rows, 0]).nonzero().squeeze(1)
                mention_rows, columns, upper = mention_rows[left], columns[left], upper[left]
            kept.append((mention_rows, columns, upper - block.gap[mention_rows, columns]))
        mention_rows, columns, base = (torch.cat(parts) for parts in zip(*kept, strict=True))
        order = mention_rows.argsort(stable=True)
        return mention_rows[order], columns[order], base[order]

    def _image_scores_less_most(
        self, query: _Query, block: _Block, direction: int, mention_rows: Tensor, columns: Tensor
    ) -> Tensor:
        """How much less than it may a direction of the image unit adds to the totals of given pairs, (pairs,); 0 where
        that is in the block's bounds already."""
        result = torch.zeros(len(columns), device=columns.device)
        new = (~block.known[mention_rows]).nonzero().squeeze(1) if direction == query.first else None
        if new is not None:
            if not len(new):
                return result
            mention_rows, columns = mention_rows[new], columns[new]
        images = query.image_of.index_select(0, mention_rows)
        most = block.most[columns] if direction == _ENT2MEN else query.image_bound[images, 0]
        scores = self._image_scores(query, direction, images, columns + block.start) - most
        return scores if new is None else result.index_copy_(0, new, scores)

    def _image_scores(self, query: _Query, direction: int, images: Tensor, entity_rows: Tensor) -> Tensor:
        """What a direction of the image unit adds to the totals of pairs of a mention's image and an entity,
        (pairs,)."""
        result = torch.empty(len(images), device=images.device)
        names = _SIDES[direction]
        if len(query.dense) <= _FEW:
            # Products of one image with all of its entities.
            for number in images.unique():
                pairs = (images == number).nonzero().squeeze(1)
                used, places = entity_rows[pairs].unique(return_inverse=True)
                scores = [
                    self._direction(query, direction, number.unsqueeze(0), self.blocks.gather(some, names, some.device))
                    for some in used.split(_PAIRS_AT_ONCE)
                ]
                result[pairs] = torch.cat(scores, dim=1)[0, places]
            return result
        self.stats.image_pairs += len(images)
        used, places = entity_rows.unique(return_inverse=True)
        entities = self.blocks.gather(used, names, used.device)
        for pairs in torch.arange(len(images), device=images.device).split(_PAIRS_AT_ONCE):
            mention, entity = _rows(query.images[direction], images[pairs]), _rows(entities, places[pairs])
            unit, queries, keys = self._sides(direction, mention, entity)
            result[pairs] = unit.score_pairs(queries, keys)
        return result.div_(HALF_UNITS)

    def _hull(self, query: _Query, block: _Block, found: tuple[Tensor, Tensor, Tensor]) -> _Pairs:
        """The hull's bounds of the totals of given pairs, in the order of mentions."""
        mention_rows, columns, base = found
        self.stats.hull_pairs += len(columns)
        used, places = columns.unique(return_inverse=True)
        local = self.blocks.gather(used + block.start, ("text_local",), base.device)["text_local"]
        counts = torch.bincount(mention_rows, minlength=len(query)).tolist()
        lower, upper = base.clone(), base.clone()
        first = 0
        for row, part in enumerate(places.split(counts)):
            if len(part):
                place = slice(first, first + len(part))
                low, high = query.bounds.hull(row, local.index_select(0, part))
                lower[place] += low / HALF_UNITS
                upper[place] += high / HALF_UNITS
                first += len(part)
        return _Pairs(mention_rows, columns, lower, upper)

    # --- The best k

    def _pruned_block(self, query: _Query, start: int, stop: int, top: _TopK) -> None:
        block = self._coarse_stage(query, start, stop)
        if bool((top.threshold == -torch.inf).any()):
            self._score_seeds(query, block, top)
        pairs = self._contenders(query, block, top.threshold)
        # The first pairs of a mention may leave few others that reach its best ones.
        pairs = self._best_first(query, block, pairs, top, _PATIENCE)
        pairs, unprunable = self._part_unprunable(query, block, pairs)
        self._best_first(query, block, pairs, top)
        if len(unprunable):
            some = top.part(unprunable)
            some.forget(start, stop)  # they all come again
            self._exhaustive_block(_Query.of(self.matcher, query.mentions[unprunable]), start, stop, some)
            top.scores[unprunable], top.rows[unprunable] = some.scores, some.rows

    def _score_seeds(self, query: _Query, block: _Block, top: _TopK) -> None:
        """Scores a few pairs that promise most, so that all others have a good score to reach."""
        k = top.scores.shape[1]
        seeds = block.high.topk(min(k + _SEEDS, block.width), dim=1)
        mention_rows, places = (seeds.values > -torch.inf).nonzero(as_tuple=True)
        columns = seeds.indices[mention_rows, places]
        less = [self._image_scores_less_most(query, block, direction, mention_rows, columns) for direction in (0, 1)]
        upper = seeds.values.clone()
        upper[mention_rows, places] += less[0] + less[1] + query.most[mention_rows, 0]
        best = upper.topk(min(k, block.width), dim=1)
        columns = seeds.indices.gather(1, best.indices)
        self._score_into(query, columns, best.values > -torch.inf, block.start, top)
        block.high.scatter_(1, columns, -torch.inf)  # they must not come again

    def _best_first(self, query: _Query, block: _Block, pairs: _Pairs, top: _TopK, rounds: int | None = None) -> _Pairs:
        """Scores pairs exactly in the order of their bound, as long as a bound is above the k-th best score, or for
        some rounds. Returns the pairs that are left."""
        while len(pairs) and rounds != 0:
            rounds = None if rounds is None else rounds - 1
            order = pairs.upper.argsort(descending=True, stable=True)
            pairs = pairs[order[pairs.mention_rows[order].argsort(stable=True)]]
            counts = torch.bincount(pairs.mention_rows, minlength=len(query))
            position = torch.arange(len(pairs), device=counts.device)
            position = position - (counts.cumsum(0) - counts)[pairs.mention_rows]
            now = position < _ROUND
            table = torch.zeros((len(query), int(counts.max().clamp(max=_ROUND))), dtype=torch.long, device=now.device)
            valid = torch.zeros_like(table, dtype=torch.bool)
            table[pairs.mention_rows[now], position[now]] = pairs.columns[now]
            valid[pairs.mention_rows[now], position[now]] = True
            self._score_into(query, table, valid, block.start, top)
            pairs = pairs[~now & self._reach(block, pairs, top.threshold)]
        return pairs

    def _score_into(self, query: _Query, columns: Tensor, valid: Tensor, start: int, top: _TopK) -> None:
        """Scores the valid pairs of (M, n) columns exactly and merges them."""
        rows, places = valid.nonzero(as_tuple=True)
        entity_rows = columns[rows, places] + start
        exact = score_pairs(self.matcher, query.mentions, rows, self.blocks, entity_rows, self.block_bytes).total
        self.stats.exact_pairs += len(rows)
        scores = torch.full(columns.shape, -torch.inf, device=columns.device)
        scores[rows, places] = exact
        top.merge(scores, torch.where(valid, columns + start, -1))

    # --- Ranks

    def _rank_exhaustive(self, query: _Query, start: int, stop: int, places: _Places) -> None:
        for first, scores, margin in self._all_scores(query, start, stop):
            places.hide_answers(scores, first)
            surely = scores > places.gold + margin
            rows, columns = (~surely & (scores >= places.gold - margin)).nonzero(as_tuple=True)
            places.above += surely.sum(dim=1)
            self._compare(query, rows, columns + first, places)

    def _rank_pruned(self, query: _Query, start: int, stop: int, places: _Places) -> None:
        block = self._coarse_stage(query, start, stop)
        places.hide_answers(block.high, start)
        pairs = self._contenders(query, block, places.gold)
        surely = pairs.lower > (places.gold + block.margin)[pairs.mention_rows, 0]
        above = torch.bincount(pairs.mention_rows[surely], minlength=len(query))
        pairs, unprunable = self._part_unprunable(query, block, pairs[~surely])
        self._compare(query, pairs.mention_rows, pairs.columns + start, places)
        if len(unprunable):
            some = _Places(places.answers[unprunable], places.gold[unprunable])
            self._rank_exhaustive(_Query.of(self.matcher, query.mentions[unprunable]), start, stop, some)
            above[unprunable] = some.above
            places.equal[unprunable] += some.equal
        places.above += above

    def _compare(self, query: _Query, mention_rows: Tensor, entity_rows: Tensor, places: _Places) -> None:
        """Counts the pairs whose exact score is above their mention's answer's, or ties with it."""
        pairs = score_pairs(self.matcher, query.mentions, mention_rows, self.blocks, entity_rows, self.block_bytes)
        self.stats.exact_pairs += len(mention_rows)
        gold = places.gold[mention_rows, 0]
        tie = (pairs.total - gold).abs() <= _TIE * (1 + gold.abs())
        places.above += torch.bincount(mention_rows[~tie & (pairs.total > gold)], minlength=len(query))
        places.equal += torch.bincount(mention_rows[tie], minlength=len(query))


# --- The two questions ----------------------------------------------------------------------------------------------


@dataclass
class FoundEntities:
    """The best entities of M mentions, best first.

    Args:
        rows (`torch.LongTensor` of shape `(M, k)`): their rows; -1 where there are fewer than k.
        scores ([`PairScores`] of shape `(M, k)`): their scores; NaN where there is no entity.
        stats ([`SearchStats`]): how much work it was.
    """

    rows: Tensor
    scores: PairScores
    stats: SearchStats


def _searcher(matcher: Matcher, rows: EntityBlocks, device: torch.device) -> Searcher:
    return Searcher(matcher, rows, sub_block=1024 if device.type == "cpu" else 8192)


def best_entities(
    matcher: Matcher,
    entities: EntityBlocks,
    mentions: MentionFeatures,
    k: int,
    *,
    method: str,
    candidates: Sequence[Tensor | None],
    advance: Callable[[int], Any],
    floor: Tensor | None = None,
) -> FoundEntities:
    """The k best entities of each of M mentions.

    Args:
        matcher: in float32, on the mentions' device.
        entities: the rows that are searched.
        method: "pruned" or "exhaustive".
        candidates: for each mention the rows that it may mean, int64 and in order; `None` for all.
        advance: told of pairs that are done.
        floor (`torch.Tensor` of shape `(M,)`, *optional*): the score that a mention's entities must reach, at least.
    """
    device = mentions.device
    rows = torch.full((len(mentions), k), -1, dtype=torch.long, device=device)
    searcher = _searcher(matcher, entities, device)
    free = [row for row, item in enumerate(candidates) if item is None]
    with torch.inference_mode():
        for start in range(0, len(free), _MENTION_BLOCK):
            picked = torch.tensor(free[start : start + _MENTION_BLOCK], dtype=torch.long, device=device)
            own_floor = None if floor is None else floor[picked].unsqueeze(1)
            rows[picked] = searcher.top_k(mentions[picked], k, method == "exhaustive", advance, own_floor)
        for row, wanted in enumerate(candidates):
            if wanted is None:
                continue
            if len(wanted) > max(_MANY_CANDIDATES, k):
                among = dataclasses.replace(searcher, blocks=ChosenRows(entities, wanted))
                own_floor = None if floor is None else floor[row : row + 1].unsqueeze(1)
                found = among.top_k(mentions[row : row + 1], k, False, lambda _: None, own_floor)[0]
                found = wanted[found[found >= 0].cpu()].to(device)
            else:
                wanted = wanted.to(device)
                scores = score_pairs(
                    matcher, mentions, torch.full_like(wanted, row), entities, wanted, _CANDIDATE_BYTES
                )
                searcher.stats.pairs += len(wanted)
                searcher.stats.exact_pairs += len(wanted)
                order = scores.total.argsort(descending=True, stable=True)[:k]
                found = wanted[order if floor is None else order[scores.total[order] >= floor[row]]]
            rows[row, : len(found)] = found
        mention_rows, places = (rows >= 0).nonzero(as_tuple=True)
        scores = score_pairs(matcher, mentions, mention_rows, entities, rows[mention_rows, places], _CANDIDATE_BYTES)
        arrays = []
        for part in (scores.total, scores.text, scores.image, scores.cross_modal):
            full = torch.full(rows.shape, torch.nan, device=rows.device)
            full[mention_rows, places] = part
            arrays.append(full)
    return FoundEntities(rows, PairScores(*arrays), searcher.stats)


def answer_ranks(
    matcher: Matcher,
    entities: EntityBlocks,
    mentions: MentionFeatures,
    answers: Tensor,
    *,
    method: str,
    advance: Callable[[int], Any],
) -> tuple[Tensor, SearchStats]:
    """The rank of each of M mentions' answers among all entities, from 1; among equals the mean of the places.

    Args:
        answers (`torch.LongTensor` of shape `(M,)`): the row of each mention's answer.

    Returns:
        `torch.DoubleTensor` of shape `(M,)`, and how much work it was.
    """
    searcher = _searcher(matcher, entities, mentions.device)
    ranks = torch.full((len(mentions),), torch.nan, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, len(mentions), _MENTION_BLOCK):
            part = slice(start, start + _MENTION_BLOCK)
            gold = searcher.scores_of(mentions[part], answers[part])
            above, equal = searcher.ranks(mentions[part], answers[part], gold, method == "exhaustive", advance)
            ranks[part] = (1 + above + equal / 2).double().cpu()
    return ranks, searcher.stats


def answer_scores(matcher: Matcher, entities: EntityBlocks, mentions: MentionFeatures, answers: Tensor) -> Tensor:
    """The score of each of M mentions' answers, of shape (M,); `answers` are their rows."""
    with torch.inference_mode():
        return _searcher(matcher, entities, mentions.device).scores_of(mentions, answers)


def better_entities(
    matcher: Matcher,
    entities: EntityBlocks,
    mentions: MentionFeatures,
    answers: Tensor,
    gold: Tensor,
    *,
    method: str,
    advance: Callable[[int], Any],
) -> tuple[Tensor, Tensor]:
    """How many entities score above a given score of each mention, and how many tie with it: what a part of a
    knowledge base adds to a rank.

    Args:
        answers (`torch.LongTensor` of shape `(M,)`): the row of each mention's answer, which does not count; -1 where
            it is in another part.
        gold (`torch.Tensor` of shape `(M,)`): the scores of the answers.

    Returns:
        two `torch.LongTensor` of shape `(M,)`.
    """
    searcher = _searcher(matcher, entities, mentions.device)
    above, equal = torch.zeros_like(answers), torch.zeros_like(answers)
    with torch.inference_mode():
        for start in range(0, len(mentions), _MENTION_BLOCK):
            part = slice(start, start + _MENTION_BLOCK)
            above[part], equal[part] = searcher.ranks(
                mentions[part], answers[part], gold[part], method == "exhaustive", advance
            )
    return above, equal


__all__ = [
    "METHODS",
    "EntityBlocks",
    "FoundEntities",
    "SearchStats",
    "Searcher",
    "answer_ranks",
    "answer_scores",
    "best_entities",
    "better_entities",
    "score_pairs",
]

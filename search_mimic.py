"""Exact search and ranking over encoded entities, without scoring every pair exactly.

A total score is the sum of dot products, which are cheap; of the image unit, which is not as cheap; and of the text
unit's attention, which takes nearly all the time. So pairs are pruned in stages, by upper bounds of the total:

    for each block of entities:
        bound every pair: dot products, bounds of the image unit, coarse bounds of the attention
        if there are no k best yet: score the pairs with the highest bounds exactly
        where the stages below leave too much of a sample of the block: score all of the block's pairs of that mention
        contenders = the pairs whose bound reaches the mention's k-th best score
        put the image unit's scores in the place of their bounds; prune the contenders again
        put the bounds of the hull in the place of the coarse ones; prune the contenders again
        where too many contenders are left of a mention: score all of the block's pairs of that mention
        while contenders are left:
            re-score exactly those with the highest bounds, and merge them into the k best
            prune the contenders again

Both methods are exact: "exhaustive" scores every pair, and the answers are the same. The stages are in pruning_mimic;
this is the order in which they come. Knows rows, not ids or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bounds_mimic import CoarseFeatures
from .found_mimic import Places, TopK
from .matching_mimic import Matcher, MentionFeatures, PairScores, full_precision
from .pairs_mimic import (
    CACHE_BYTES,
    ChosenRows,
    EntityBlocks,
    SearchStats,
    are_equal,
    best_order,
    refuse_not_finite,
    score_pairs,
)
from .pruning_mimic import Block, ImagePlan, Pairs, Query, Stages
from .sampling_mimic import EXHAUSTIVE_FRACTION, FIRST_FRACTION, Sampler

METHODS = ("pruned", "exhaustive")
_MENTION_BLOCK = 256
# So many pairs of given candidates are scored in one go.
_PAIRS_TOGETHER = 2**16
# Of so many candidates, bounding their scores takes less time than scoring them all.
_MANY_CANDIDATES = 2048
_CANDIDATE_BYTES = 64 * 2**20
# Pairs of each mention from which the best k are scored exactly at first; those that are scored before the others'
# bounds are compared again; and how often that is done before counting what is left.
_SEEDS = 32
_ROUND = 16
_PATIENCE = 4


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

    @property
    def stages(self) -> Stages:
        return Stages(self.matcher, self.blocks, self.block_bytes, self.sub_block, self.stats)

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.matcher, self.blocks, self.stages, self.stats)

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
        top = TopK(len(mentions), k, mentions.device, floor)
        query = Query.of(self.matcher, mentions)
        plainly = torch.full((len(query),), exhaustive, dtype=torch.bool, device=mentions.device)
        before = self.stats.exact_pairs
        if not exhaustive:
            plainly = self.sampler.not_worth_bounding(query, k, top.floor)
        for way, picked, some in self._ways(query, plainly):
            part = top.part(picked)
            self._top_of_all(some, way, part, advance)
            top.take(picked, part)
        self.stats.exact_pairs = min(self.stats.exact_pairs, before + len(query) * len(self.blocks))  # as in `_counted`
        return top.found()

    def _top_of_all(self, query: Query, exhaustive: bool, top: TopK, advance: Callable[[int], Any]) -> None:
        plan = None
        for start, stop in self._blocks(len(query)):
            with self._counted(query, start, stop, advance):
                if exhaustive:
                    self._exhaustive_block(query, start, stop, top)
                else:
                    plan = self._pruned_block(query, plan or self.stages.plan(query, stop), start, stop, top)

    def scores_of(self, mentions: MentionFeatures, answers: Tensor) -> Tensor:
        """The score of each mention's answer, a row for each, (M,)."""
        every = torch.arange(len(mentions), device=answers.device)
        return score_pairs(self.matcher, mentions, every, self.blocks, answers, self.block_bytes).total

    def ranks(
        self,
        mentions: MentionFeatures,
        answers: Tensor,
        answer_score: Tensor,
        exhaustive: bool,
        advance: Callable[[int], Any],
    ) -> tuple[Tensor, Tensor]:
        """How many entities score above each mention's answer, and how many tie with it (itself left out).

        Args:
            answers (`torch.LongTensor` of shape `(M,)`): the row of each mention's answer; -1 where it is elsewhere.
            answer_score (`torch.Tensor` of shape `(M,)`): its score.

        Returns:
            two `torch.LongTensor` of shape `(M,)`.
        """
        query = Query.of(self.matcher, mentions)
        plainly = torch.full_like(answers, exhaustive or self.sampler.few(query), dtype=torch.bool)
        if not bool(plainly.all()):
            plainly = self.sampler.unprunable(query, answer_score.unsqueeze(1), slice(0, len(self.blocks)), ranks=True)
        above, equal = torch.zeros_like(answers), torch.zeros_like(answers)
        for way, picked, some in self._ways(query, plainly):
            places = Places(answers[picked], answer_score[picked].unsqueeze(1))
            self._rank_all(some, way, places, advance)
            above[picked], equal[picked] = places.above, places.equal
        return above, equal

    def _rank_all(self, query: Query, exhaustive: bool, places: Places, advance: Callable[[int], Any]) -> None:
        plan = None
        for start, stop in self._blocks(len(query)):
            with self._counted(query, start, stop, advance):
                if exhaustive:
                    self._rank_exhaustive(query, start, stop, places)
                else:
                    plan = self._rank_pruned(query, plan or self.stages.plan(query, stop), start, stop, places)

    def _ways(self, query: Query, plainly: Tensor) -> Iterator[tuple[bool, Tensor, Query]]:
        """The mentions whose pairs are all scored, and the others: whether they are, their rows, and themselves."""
        for way in plainly.unique().tolist():
            picked = (plainly == way).nonzero().squeeze(1)
            yield way, picked, query if len(picked) == len(query) else Query.of(self.matcher, query.mentions[picked])

    def _blocks(self, count: int) -> Iterator[tuple[int, int]]:
        """First and last row of one block of rows after the other, for so many mentions."""
        # Two float32 tensors of the block's shape are kept, a few more are made for a while. With few mentions, the
        # entities' vectors that the hull's bounds need weigh more.
        width = self.matcher.tglu.fc_cls.out_features
        rows = max(self.sub_block, self.block_bytes // max(16 * count, 8 * width))
        rows -= rows % self.sub_block  # so that only the last sub-block is cut short
        for start in range(0, len(self.blocks), rows):
            yield start, min(start + rows, len(self.blocks))

    @contextmanager
    def _counted(self, query: Query, start: int, stop: int, advance: Callable[[int], Any]) -> Iterator[None]:
        """Counts the pairs of a block, whose work is done within."""
        pairs, before = len(query) * (stop - start), self.stats.exact_pairs
        yield
        self.stats.pairs += pairs
        self.stats.exact_pairs = min(self.stats.exact_pairs, before + pairs)  # one scored twice counts once
        advance(pairs)

    # --- Every pair

    def _all_scores(self, query: Query, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Scores (M, rows) of all pairs of a block, part by part, of removed entities -inf; and what rounding may
        move them by, (M, 1)."""
        mentions = query.mentions
        device = mentions.tensors["text_embed"].device
        tokens = mentions.tensors["text_key"].shape[1] ** 2
        most = self.block_bytes if device.type != "cpu" else min(self.block_bytes, CACHE_BYTES)
        rows = max(1, min(4096, most // (4 * tokens * len(mentions))))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            entities = self.blocks.full(slice(first, last), device)
            scores = self.matcher(mentions, entities).total
            self.stats.exact_pairs += scores.numel()
            sums = scores.sum(dim=0)
            if (alive := self.blocks.alive(first, last)) is not None:
                sums.masked_fill_(~alive.to(device), 0)
            refuse_not_finite(sums, self.blocks, torch.arange(first, last))
            self.stages.hidden_removed(scores, first)
            yield first, scores, query.margin(self.stages.extent(CoarseFeatures.of(entities.tensors), first))

    def _exhaustive_block(self, query: Query, start: int, stop: int, top: TopK) -> None:
        for first, scores, margin in self._all_scores(query, start, stop):
            floor, k = top.threshold, top.k
            if scores.shape[1] >= k:
                floor = torch.maximum(floor, scores.topk(k, dim=1).values[:, -1:] - margin)
            # All that may tie with the k-th best, however many: of equals the first rows are the answer.
            hopeful = (scores >= floor - margin) & (scores > -torch.inf)
            best = scores.topk(int(hopeful.sum(dim=1).max()), dim=1)
            self._score_into(query, best.indices, hopeful.gather(1, best.indices), first, top)

    # --- The best k

    def _pruned_block(self, query: Query, plan: ImagePlan, start: int, stop: int, top: TopK) -> ImagePlan:
        """Takes a block into account; gives the plan for the next."""
        block = self.stages.coarse(query, plan, start, stop)
        part = EXHAUSTIVE_FRACTION
        if bool((top.threshold == -torch.inf).any()):
            # They must not come again.
            block, part = block.without(self._score_seeds(query, plan, block, top)), FIRST_FRACTION
        floor = top.threshold
        many = (block.may_reach(query, floor).count_nonzero(dim=1) > part * block.width).unsqueeze(1)
        plainly = torch.zeros_like(many)
        if bool(many.any()):
            # No pair reaches what is infinite: of these mentions nothing is looked at.
            few_left = floor.masked_fill(~many, torch.inf)
            plainly = self.sampler.unprunable(query, few_left, slice(start, stop), part=part, ranks=False).unsqueeze(1)
        pairs, plan = self.stages.contenders(query, plan, block, floor.masked_fill(plainly, torch.inf))
        # The first pairs of a mention may leave few others that reach its best ones.
        pairs = self._best_first(query, block, pairs, top, _PATIENCE)
        pairs, unprunable = self._part_unprunable(query, block, pairs)
        self._best_first(query, block, pairs, top)
        unprunable = torch.cat([unprunable, plainly.nonzero()[:, 0]]).sort().values
        if len(unprunable):
            some = top.part(unprunable)
            some.forget(start, stop)  # they all come again
            rest = query if len(unprunable) == len(query) else Query.of(self.matcher, query.mentions[unprunable])
            self._exhaustive_block(rest, start, stop, some)
            top.take(unprunable, some)
        return plan

    def _score_seeds(self, query: Query, plan: ImagePlan, block: Block, top: TopK) -> Tensor:
        """Scores a few pairs that promise most, so that all others have a good score to reach; gives their columns of
        the block, (M, n)."""
        seeds = block.high.topk(min(top.k + _SEEDS, block.width), dim=1)
        mention_rows, places = (seeds.values != -torch.inf).nonzero(as_tuple=True)
        columns = seeds.indices[mention_rows, places]
        less = [
            self.stages.image_scores_less_most(query, plan, block, direction, mention_rows, columns)
            for direction in (0, 1)
        ]
        upper = seeds.values.clone()
        upper[mention_rows, places] += less[0] + less[1] + query.most[mention_rows, 0]
        best = upper.topk(min(top.k, block.width), dim=1)
        columns = seeds.indices.gather(1, best.indices)
        # One whose bound became -inf has numbers without an order; it is no removed one, and scoring it says so.
        self._score_into(query, columns, seeds.values.gather(1, best.indices) != -torch.inf, block.start, top)
        return columns

    @staticmethod
    def _part_unprunable(query: Query, block: Block, pairs: Pairs) -> tuple[Pairs, Tensor]:
        """Parts pairs that would be scored exactly: those of mentions that have few of them, and the rows of the other
        mentions, for which all entities are better scored."""
        left = torch.bincount(pairs.mention_rows, minlength=len(query))
        unprunable = left > max(EXHAUSTIVE_FRACTION * block.width, _ROUND)
        return pairs[~unprunable[pairs.mention_rows]], unprunable.nonzero().squeeze(1)

    def _best_first(self, query: Query, block: Block, pairs: Pairs, top: TopK, rounds: int | None = None) -> Pairs:
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
            pairs = pairs[~now].reach(top.threshold - block.margin)
        return pairs

    def _score_into(self, query: Query, columns: Tensor, valid: Tensor, start: int, top: TopK) -> None:
        """Scores the valid pairs of (M, n) columns exactly and merges them."""
        rows, places = valid.nonzero(as_tuple=True)
        entity_rows = columns[rows, places] + start
        exact = score_pairs(self.matcher, query.mentions, rows, self.blocks, entity_rows, self.block_bytes).total
        self.stats.exact_pairs += len(rows)
        scores = torch.full(columns.shape, -torch.inf, device=columns.device)
        scores[rows, places] = exact
        top.merge(scores, torch.where(valid, columns + start, -1))

    # --- Ranks

    def _rank_exhaustive(self, query: Query, start: int, stop: int, places: Places) -> None:
        for first, scores, margin in self._all_scores(query, start, stop):
            rows, columns = places.within(first, first + scores.shape[1])
            scores[rows, columns] = -torch.inf
            surely = scores > places.answer_score + margin
            rows, columns = (~surely & (scores >= places.answer_score - margin)).nonzero(as_tuple=True)
            places.above += surely.sum(dim=1)
            self._compare(query, rows, columns + first, places)

    def _rank_pruned(self, query: Query, plan: ImagePlan, start: int, stop: int, places: Places) -> ImagePlan:
        """Takes a block into account; gives the plan for the next."""
        block = self.stages.coarse(query, plan, start, stop, places.within(start, stop))
        pairs, plan = self.stages.contenders(query, plan, block, places.answer_score)
        surely = pairs.lower > (places.answer_score + block.margin)[pairs.mention_rows, 0]
        above = torch.bincount(pairs.mention_rows[surely], minlength=len(query))
        pairs, unprunable = self._part_unprunable(query, block, pairs[~surely])
        self._compare(query, pairs.mention_rows, pairs.columns + start, places)
        if len(unprunable):
            some = Places(places.answers[unprunable], places.answer_score[unprunable])
            self._rank_exhaustive(Query.of(self.matcher, query.mentions[unprunable]), start, stop, some)
            above[unprunable] = some.above
            places.equal[unprunable] += some.equal
        places.above += above
        return plan

    def _compare(self, query: Query, mention_rows: Tensor, entity_rows: Tensor, places: Places) -> None:
        """Counts the pairs whose exact score is above their mention's answer's, or ties with it."""
        pairs = score_pairs(self.matcher, query.mentions, mention_rows, self.blocks, entity_rows, self.block_bytes)
        self.stats.exact_pairs += len(mention_rows)
        answer_score = places.answer_score[mention_rows, 0]
        tie = are_equal(pairs.total, answer_score)
        places.above += torch.bincount(mention_rows[~tie & (pairs.total > answer_score)], minlength=len(query))
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
    with torch.inference_mode(), full_precision(mentions.device):
        for start in range(0, len(free), _MENTION_BLOCK):
            picked = torch.tensor(free[start : start + _MENTION_BLOCK], dtype=torch.long, device=device)
            own_floor = None if floor is None else floor[picked].unsqueeze(1)
            rows[picked] = searcher.top_k(mentions[picked], k, method == "exhaustive", advance, own_floor)
        few: list[int] = []
        for row, wanted in enumerate(candidates):
            if wanted is None:
                continue
            if len(wanted) <= max(_MANY_CANDIDATES, k):
                few.append(row)
                continue
            among = dataclasses.replace(searcher, blocks=ChosenRows(entities, wanted))
            own_floor = None if floor is None else floor[row : row + 1].unsqueeze(1)
            found = among.top_k(mentions[row : row + 1], k, False, lambda _: None, own_floor)[0]
            found = wanted[found[found >= 0].cpu()].to(device)
            rows[row, : len(found)] = found
        for some in _together(few, candidates):
            for row, found in _best_of_few(matcher, entities, mentions, k, some, candidates, floor):
                rows[row, : len(found)] = found
        pairs = sum(len(wanted) for row in few if (wanted := candidates[row]) is not None)
        searcher.stats.pairs += pairs
        searcher.stats.exact_pairs += pairs
        mention_rows, places = (rows >= 0).nonzero(as_tuple=True)
        scores = score_pairs(matcher, mentions, mention_rows, entities, rows[mention_rows, places], _CANDIDATE_BYTES)
        arrays = []
        for part in (scores.total, scores.text, scores.image, scores.cross_modal):
            full = torch.full(rows.shape, torch.nan, device=rows.device)
            full[mention_rows, places] = part
            arrays.append(full)
    return FoundEntities(rows, PairScores(*arrays), searcher.stats)


def _together(rows: Sequence[int], candidates: Sequence[Tensor | None]) -> Iterator[list[int]]:
    """Mentions with few candidates each, so many together that their pairs can be held at once."""
    some: list[int] = []
    pairs = 0
    for row in rows:
        wanted = candidates[row]
        assert wanted is not None
        if some and pairs + len(wanted) > _PAIRS_TOGETHER:
            yield some
            some, pairs = [], 0
        some.append(row)
        pairs += len(wanted)
    if some:
        yield some


def _best_of_few(
    matcher: Matcher,
    entities: EntityBlocks,
    mentions: MentionFeatures,
    k: int,
    rows: Sequence[int],
    candidates: Sequence[Tensor | None],
    floor: Tensor | None,
) -> Iterator[tuple[int, Tensor]]:
    """The k best candidates of some mentions, all of whose candidates are scored, in one go."""
    device = mentions.device
    lists = [wanted.to(device) for row in rows if (wanted := candidates[row]) is not None]
    counts = [len(wanted) for wanted in lists]
    owners = torch.tensor(rows, device=device).repeat_interleave(torch.tensor(counts, device=device))
    scores = score_pairs(matcher, mentions, owners, entities, torch.cat(lists), _CANDIDATE_BYTES)
    for row, wanted, total in zip(rows, lists, scores.total.split(counts), strict=True):
        order = best_order(total.unsqueeze(0), wanted.unsqueeze(0))[0, :k]
        yield row, wanted[order if floor is None else order[total[order] >= floor[row]]]


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
    with torch.inference_mode(), full_precision(mentions.device):
        for start in range(0, len(mentions), _MENTION_BLOCK):
            part = slice(start, start + _MENTION_BLOCK)
            answer_score = searcher.scores_of(mentions[part], answers[part])
            above, equal = searcher.ranks(mentions[part], answers[part], answer_score, method == "exhaustive", advance)
            ranks[part] = (1 + above + equal / 2).double().cpu()
    return ranks, searcher.stats


def answer_scores(matcher: Matcher, entities: EntityBlocks, mentions: MentionFeatures, answers: Tensor) -> Tensor:
    """The score of each of M mentions' answers, of shape (M,); `answers` are their rows."""
    with torch.inference_mode(), full_precision(mentions.device):
        return _searcher(matcher, entities, mentions.device).scores_of(mentions, answers)


def better_entities(
    matcher: Matcher,
    entities: EntityBlocks,
    mentions: MentionFeatures,
    answers: Tensor,
    answer_score: Tensor,
    *,
    method: str,
    advance: Callable[[int], Any],
) -> tuple[Tensor, Tensor]:
    """How many entities score above a given score of each mention, and how many tie with it: what a part of a
    knowledge base adds to a rank.

    Args:
        answers (`torch.LongTensor` of shape `(M,)`): the row of each mention's answer, which does not count; -1 where
            it is in another part.
        answer_score (`torch.Tensor` of shape `(M,)`): the scores of the answers.

    Returns:
        two `torch.LongTensor` of shape `(M,)`.
    """
    searcher = _searcher(matcher, entities, mentions.device)
    above, equal = torch.zeros_like(answers), torch.zeros_like(answers)
    with torch.inference_mode(), full_precision(mentions.device):
        for start in range(0, len(mentions), _MENTION_BLOCK):
            part = slice(start, start + _MENTION_BLOCK)
            above[part], equal[part] = searcher.ranks(
                mentions[part], answers[part], answer_score[part], method == "exhaustive", advance
            )
    return above, equal


__all__ = [
    "METHODS",
    "FoundEntities",
    "Searcher",
    "answer_ranks",
    "answer_scores",
    "best_entities",
    "better_entities",
]

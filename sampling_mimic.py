"""Tries on a sample of entities whether upper bounds save time: how many pairs would they leave to be scored?

If they leave many, computing bounds only adds to the work. Knows the stages, but not the search that uses them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds_mimic import COARSE_NAMES
from .matching_mimic import Matcher, MentionFeatures
from .pairs_mimic import KEY, QUERY, EntityBlocks, KeptRows, SearchStats
from .pruning_mimic import Query, Stages

# Where more than this fraction of a mention's pairs in a block would be scored exactly, bounding them does not pay.
# That is looked for in a sample before: bounding a pair costs about a sixth of scoring it, so a sixteenth of them is a
# hundredth of the work. Of the best k, the first scores to reach are low, or guesses: of what they leave, about half
# is left in the end.
EXHAUSTIVE_FRACTION = 0.2
FIRST_FRACTION = 0.7
_SAMPLED_PART, _MOST_SAMPLED = 16, 512
# What the bounds of a sample need.
_BOUNDED = (*COARSE_NAMES, *QUERY, *(name for name in KEY if name not in QUERY))
# So many pairs, and entities to read, are scored without a look at a sample.
_FEW_PAIRS = 4096
# Where the best k are more than this part of the entities, the score to reach is guessed from a sample in which so many
# reach it.
_LARGE_PART, _REACHING = 1 / 32, 4


@dataclass
class Sampler:
    """Looks at samples of entities.

    Args:
        matcher: the model's matcher.
        blocks: the entities.
        stages: what bounds pairs.
        stats: where the pairs that are scored exactly are counted.
    """

    matcher: Matcher
    blocks: EntityBlocks
    stages: Stages
    stats: SearchStats

    def few(self, query: Query) -> bool:
        """Whether there are so few pairs that scoring them all takes no longer than a look at a sample."""
        return (len(query) + 1) * len(self.blocks) <= _FEW_PAIRS

    def not_worth_bounding(self, query: Query, k: int, floor: Tensor) -> Tensor:
        """For which mentions, (M,), all pairs are better scored to find their k best that reach `floor` (M, 1), so far
        as a sample shows before the first block."""
        every = slice(0, len(self.blocks))
        if self.few(query):
            return torch.ones(len(query), dtype=torch.bool, device=floor.device)
        if k <= _LARGE_PART * len(self.blocks):  # what its best k may be, only bounds of all entities tell
            return torch.zeros(len(query), dtype=torch.bool, device=floor.device)
        plainly = self.unprunable(query, floor, every, part=FIRST_FRACTION, ranks=False)
        if bool(plainly.any()):  # the floor alone decides little
            reach = torch.maximum(self._guessed_threshold(query.mentions, k), floor)
            plainly = self.unprunable(query, reach, every, part=FIRST_FRACTION, ranks=False)
        return plainly

    def _sample(self, count: int, rows: slice, device: torch.device, names: Sequence[str] = ()) -> KeptRows:
        """About so many of some rows, without removed ones; some of their features are read at once."""
        generator = torch.Generator().manual_seed(0)
        picked = rows.start + torch.randint(rows.stop - rows.start, (max(1, count),), generator=generator).unique()
        alive = self.blocks.alive(rows.start, rows.stop)
        picked = picked if alive is None else picked[alive[picked - rows.start]]
        return KeptRows(self.blocks, picked, names, device)

    def _guessed_threshold(self, mentions: MentionFeatures, k: int) -> Tensor:
        """About the k-th best score of each mention, (M, 1), where k is a large part of the entities."""
        sample = self._sample(-(-_REACHING * len(self.blocks) // k), slice(0, len(self.blocks)), mentions.device)
        if not len(sample):
            return torch.full((len(mentions), 1), -torch.inf, device=mentions.device)
        scores = self.matcher(mentions, sample.full(slice(0, len(sample)), mentions.device)).total
        self.stats.exact_pairs += scores.numel()
        return scores.topk(min(_REACHING, len(sample)), dim=1).values[:, -1:]

    def unprunable(
        self,
        query: Query,
        floor: Tensor,
        rows: slice,
        *,
        part: float = EXHAUSTIVE_FRACTION,
        ranks: bool,
    ) -> Tensor:
        """For which mentions, (M,), bounds do not pay: more than a part of a sample of some rows would have to be
        scored, as they may reach `floor` (M, 1), or, for ranks, be above it or not.

        For these, bounding all pairs would come on top of scoring them all.
        """
        count = min((rows.stop - rows.start) // _SAMPLED_PART, _MOST_SAMPLED)
        sample = self._sample(count, rows, floor.device, _BOUNDED)
        if not len(sample):
            return torch.zeros(len(query), dtype=torch.bool, device=floor.device)
        stages = dataclasses.replace(self.stages, blocks=sample)
        plan = stages.plan(query, len(sample))
        block = stages.coarse(query, plan, 0, len(sample))
        pairs, _ = stages.contenders(query, plan, block, floor)
        if ranks:
            pairs = pairs[~(pairs.lower > (floor + block.margin)[pairs.mention_rows, 0])]
        left = torch.bincount(pairs.mention_rows, minlength=len(query))
        return left > max(part * len(sample), 1)


__all__ = ["EXHAUSTIVE_FRACTION", "FIRST_FRACTION", "Sampler"]

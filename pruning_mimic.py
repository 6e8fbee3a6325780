"""The stages of pruning: from cheap upper bounds of all pairs to a few pairs with tight bounds.

Each stage is a function of its inputs. In go mentions prepared for a search (a `Query`), what is known of their image
scores, and bounds of a block of entities; out come the pairs that are left. Inputs are never changed; only the work is
counted. Knows bounds and units, but neither the best entities nor the order of blocks and stages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds_mimic import COARSE_NAMES, CoarseFeatures, MentionBounds
from .features_mimic import LARGEST
from .matching_mimic import (
    HALF_UNITS,
    UNITS,
    Matcher,
    MentionFeatures,
    VisionDualDirection,
    at_least_float32,
    pick_prefix,
)
from .pairs_mimic import (
    ENT2MEN,
    KEY,
    MEN2ENT,
    PREFIXES,
    QUERY,
    SIDES,
    EntityBlocks,
    SearchStats,
    refuse_not_finite,
    taken,
)

# Rounding differs with the shape of a matrix product. Relative to the largest terms of a mention's scores, bounds and
# block-wise scores are trusted up to _SLACK; what is closer is decided by `score_pairs`.
_SLACK = 2e-5
# Where more than this fraction of an image's pairs are left, the image unit is cheaper for all of them at once; beside
# few images, where its products have few rows, it is so later.
_DENSE, _FEW_DENSE = 0.07, 0.4
_FEW = 16
# Pairs whose vectors are gathered in one go: they stay in a CPU's cache.
_PAIRS_AT_ONCE = 2048
_BIAS = VisionDualDirection.QUERY_STATS.index("beta.n")


@dataclass(frozen=True)
class Query:
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

    @classmethod
    def of(cls, matcher: Matcher, mentions: MentionFeatures) -> Query:
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
        distinct, image_of = _different({name: tensors[name] for name in (*KEY, *QUERY)})
        vector, stats = at_least_float32(distinct["image_query_m"]), at_least_float32(distinct["image_query_stats"])
        # From the vectors: of features in half precision the stored number is rounded.
        image_bound = (VisionDualDirection.upper_bound(vector, stats[:, _BIAS]) / HALF_UNITS).unsqueeze(1)
        most = image_bound.index_select(0, image_of)
        images = ({name: distinct[name] for name in KEY}, {name: distinct[name] for name in QUERY})
        bounds = MentionBounds.of(matcher, mentions)
        return cls(mentions, text, cross_modal, most, bounds, size + most.abs(), images, image_of, image_bound)

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
    return taken(images, chosen), number_of


@dataclass(frozen=True)
class ImagePlan:
    """How the image unit of G images is computed in the blocks that follow.

    Args:
        direction: that which is computed first, as it tells more.
        dense (`torch.BoolTensor` of shape `(G,)`): whether so many of an image's pairs were left that the direction is
            cheaper for all of them at once, with the coarse bounds.
    """

    direction: int
    dense: Tensor


@dataclass(frozen=True)
class Block:
    """Bounds of the pairs of M mentions with N rows from `start`."""

    start: int
    high: Tensor  # (M, N) upper bounds of the totals, but for the most that the mention's side of the image unit adds
    gap: Tensor  # (M, N) what of them is the bound of the attention's c . w
    most: Tensor  # (N,) the most that the entity's side of the image unit adds
    known: Tensor  # (M,) whether the score of the image unit's first direction is in `high` in the place of its bound
    margin: Tensor  # (M, 1)

    @property
    def width(self) -> int:
        return self.high.shape[1]

    def without(self, columns: Tensor) -> Block:
        """The same with some columns of each mention, (M, n), left out."""
        return dataclasses.replace(self, high=self.high.scatter(1, columns, -torch.inf))

    def may_reach(self, query: Query, floor: Tensor) -> Tensor:
        """Which pairs may reach a score (M, 1), by the block's bounds, (M, N)."""
        # What is hidden is below any number.
        lowest = torch.finfo(self.high.dtype).min
        return ~(
            self.high < (floor - self.margin - query.most).clamp(min=lowest)
        )  # what is not a number is found later


@dataclass(frozen=True)
class Pairs:
    """Some pairs of a block, in the order of mentions; each tensor has the shape (pairs,)."""

    mention_rows: Tensor
    columns: Tensor
    lower: Tensor  # bounds of the total
    upper: Tensor

    def __getitem__(self, which: Tensor) -> Pairs:
        return Pairs(self.mention_rows[which], self.columns[which], self.lower[which], self.upper[which])

    def __len__(self) -> int:
        return len(self.columns)

    def reach(self, floor: Tensor) -> Pairs:
        """Those whose upper bound reaches their mention's number of `floor` (M, 1)."""
        return self[~(self.upper < floor[self.mention_rows, 0])]


@dataclass(frozen=True)
class Stages:
    """The stages, for one matcher and one index.

    Args:
        matcher: the model's matcher, in float32, on the device where the work is done.
        blocks: the entities.
        block_bytes: memory that the tensors of one block of pairs may take.
        sub_block: rows of entities that are bounded in one go, so that its tensors stay in a CPU's cache.
        stats: where the work is counted.
    """

    matcher: Matcher
    blocks: EntityBlocks
    block_bytes: int
    sub_block: int
    stats: SearchStats

    def hidden_removed(self, scores: Tensor, start: int) -> Tensor:
        """Scores (M, N) of rows from `start`, which are made, of removed entities, -inf in place."""
        alive = self.blocks.alive(start, start + scores.shape[1])
        return scores if alive is None else scores.masked_fill_(~alive.to(scores.device), -torch.inf)

    def extent(self, coarse: CoarseFeatures, start: int) -> Tensor:
        """The extent of entities whose rows begin at `start`, but for removed ones if these are not sound.

        Raises:
            EntityIndexError: if the features of another are not finite, or too large. Says whose.
        """
        extent = coarse.extent()
        if not bool(extent.isnan().any()):
            return extent
        sizes = coarse.sizes()
        alive = self.blocks.alive(start, start + len(sizes))
        if alive is not None:
            sizes[~alive.to(sizes.device)] = 0
        sizes = sizes.masked_fill(~(sizes <= LARGEST), torch.nan)
        refuse_not_finite(sizes.sum(dim=1), self.blocks, torch.arange(start, start + len(sizes)))
        return sizes[:, :3].amax(dim=0)

    def plan(self, query: Query, width: int) -> ImagePlan:
        """The plan to begin with, after a look at a few of the first `width` rows."""
        none = torch.zeros(len(query.image_bound), dtype=torch.bool, device=query.text.device)
        return ImagePlan(self._tighter_direction(query, width), none)

    def _tighter_direction(self, query: Query, width: int) -> int:
        """The direction of the image unit that is further below the most that it may add, for some of the entities."""
        device = query.text.device
        places = torch.arange(0, width, max(1, width // _FEW), device=device)[:_FEW]
        most = CoarseFeatures.most_of(self.blocks.gather(places, COARSE_NAMES, device))
        every = torch.arange(len(query.image_bound), device=device)
        less = [
            self._direction(query, side, every, self.blocks.gather(places, SIDES[side], device))
            for side in (ENT2MEN, MEN2ENT)
        ]
        return int((less[MEN2ENT] - query.image_bound).sum() < (less[ENT2MEN] - most).sum())

    # --- All pairs of a block

    def coarse(
        self, query: Query, plan: ImagePlan, start: int, stop: int, left_out: tuple[Tensor, Tensor] | None = None
    ) -> Block:
        """Bounds of the pairs with the rows from `start` to `stop`.

        Args:
            left_out: places (mentions, columns) of pairs that are left out, as those of removed entities are.
        """
        device = query.text.device
        shape = (len(query), stop - start)
        high, gap = torch.empty(shape, device=device), torch.empty(shape, device=device)
        most, extent = torch.empty(shape[1], device=device), torch.zeros(3, device=device)
        dense = bool(plan.dense.any())
        for first in range(start, stop, self.sub_block):
            last = min(first + self.sub_block, stop)
            coarse = CoarseFeatures.of(self.blocks.gather(slice(first, last), COARSE_NAMES, device))
            place = slice(first - start, last - start)
            scores = torch.addmm(coarse.offset, query.text, coarse.text.T)
            scores.addmm_(query.cross_modal, coarse.cross_modal.T)
            if dense:
                scores += self._image_change(query, plan.direction, plan.dense, slice(first, last), coarse.most)
            bound = query.bounds.ball(coarse.local).div_(HALF_UNITS)
            gap[:, place] = bound
            torch.add(scores, bound, out=high[:, place])
            most[place] = coarse.most
            extent = torch.maximum(extent, self.extent(coarse, first))
        self.hidden_removed(high, start)
        if left_out is not None:
            high[left_out] = -torch.inf
        known = plan.dense.index_select(0, query.image_of)
        return Block(start, high, gap, most, known, query.margin(extent))

    def contenders(self, query: Query, plan: ImagePlan, block: Block, floor: Tensor) -> tuple[Pairs, ImagePlan]:
        """The pairs of a block whose total may reach `floor` (M, 1), and the plan for the blocks that follow."""
        wanted = block.may_reach(query, floor)
        left = torch.zeros(len(plan.dense), dtype=torch.long, device=wanted.device)
        left.index_add_(0, query.image_of, wanted.count_nonzero(dim=1))
        dense = left > (_DENSE if len(left) > _FEW else _FEW_DENSE) * block.width
        dense &= ~plan.dense
        if bool(dense.any()):
            plan, block = self._with_dense(query, plan, block, dense)
            wanted = block.may_reach(query, floor)
        found = self._image_stage(query, plan, block, wanted, floor - block.margin)
        return self._hull(query, block, found).reach(floor - block.margin), plan

    def _with_dense(self, query: Query, plan: ImagePlan, block: Block, dense: Tensor) -> tuple[ImagePlan, Block]:
        """Puts the scores of the image unit's first direction in the place of their bound, for all pairs of mentions
        with some images (G,); in the blocks that follow the coarse stage does that."""
        high = block.high.clone()
        for first in range(0, block.width, self.sub_block):
            last = min(first + self.sub_block, block.width)
            rows = slice(block.start + first, block.start + last)
            high[:, first:last] += self._image_change(query, plan.direction, dense, rows, block.most[first:last])
        high.masked_fill_(block.high == -torch.inf, -torch.inf)  # what is left out, whatever its numbers
        plan = ImagePlan(plan.direction, plan.dense | dense)
        return plan, dataclasses.replace(block, high=high, known=plan.dense.index_select(0, query.image_of))

    def _image_change(self, query: Query, direction: int, chosen: Tensor, rows: slice, most: Tensor) -> Tensor:
        """How much less than it may a direction of the image unit adds to the totals of some rows, (M, rows); 0 for
        mentions whose image is not chosen."""
        numbers = chosen.nonzero().squeeze(1)
        entities = self.blocks.gather(rows, SIDES[direction], most.device)
        entity_of = None
        if len(numbers) > _FEW:  # beside them, telling the entities' images apart takes little time
            entities, entity_of = _different(entities)
        scores = self._direction(query, direction, numbers, entities)
        if entity_of is not None:
            scores = scores.index_select(1, entity_of)
        scores -= most if direction == ENT2MEN else query.image_bound[numbers]
        scores.clamp_(min=torch.finfo(scores.dtype).min)  # -inf is for what is removed
        change = scores.new_zeros(len(chosen), scores.shape[1]).index_copy_(0, numbers, scores)
        return change.index_select(0, query.image_of)

    def _direction(self, query: Query, direction: int, numbers: Tensor, entities: dict[str, Tensor]) -> Tensor:
        """What a direction of the image unit adds to the totals of some of the mentions' images (P,) with entities,
        (P, N)."""
        unit, queries, keys = self._sides(direction, taken(query.images[direction], numbers), entities)
        scores = unit(queries, keys)
        self.stats.image_pairs += scores.numel()
        return (scores.T.contiguous() if direction == ENT2MEN else scores).div_(HALF_UNITS)

    def _sides(
        self, direction: int, mention: dict[str, Tensor], entity: dict[str, Tensor]
    ) -> tuple[VisionDualDirection, dict[str, Tensor], dict[str, Tensor]]:
        """A direction's unit, its queries and its keys."""
        mention, entity = (
            pick_prefix(PREFIXES[1 - direction], mention),
            pick_prefix(PREFIXES[direction], entity),
        )
        unit = self.matcher.vdlu
        if direction == ENT2MEN:
            return unit.dual_ent2men, entity, mention
        return unit.dual_men2ent, mention, entity

    # --- Some pairs of a block

    def _image_stage(
        self, query: Query, plan: ImagePlan, block: Block, wanted: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores the image unit for the pairs that `wanted` (M, N) marks.

        Returns:
            mention rows, block columns, and the totals without the attention's c . w, of shape (pairs,), of the pairs
            that may still reach `limit` (M, 1); in the order of mentions.
        """
        # The entities' features of each part are kept for a while.
        size = 4 * sum(tensor[:1].numel() for tensor in query.images[plan.direction].values())
        rows = min(block.width, int(wanted.count_nonzero()))
        step = -(-block.width // max(1, -(-rows * size // (self.block_bytes // 4))))
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for first in range(0, block.width, step):
            mention_rows, columns = wanted[:, first : first + step].nonzero(as_tuple=True)
            columns += first
            upper = block.high[mention_rows, columns] + query.most[mention_rows, 0]
            for direction in (plan.direction, 1 - plan.direction):
                upper += self.image_scores_less_most(query, plan, block, direction, mention_rows, columns)
                left = (~(upper < limit[mention_rows, 0])).nonzero().squeeze(1)
                mention_rows, columns, upper = mention_rows[left], columns[left], upper[left]
            kept.append((mention_rows, columns, upper - block.gap[mention_rows, columns]))
        mention_rows, columns, base = (torch.cat(parts) for parts in zip(*kept, strict=True))
        order = mention_rows.argsort(stable=True)
        return mention_rows[order], columns[order], base[order]

    def image_scores_less_most(
        self, query: Query, plan: ImagePlan, block: Block, direction: int, mention_rows: Tensor, columns: Tensor
    ) -> Tensor:
        """How much less than it may a direction of the image unit adds to the totals of given pairs, (pairs,); 0 where
        that is in the block's bounds already."""
        result = torch.zeros(len(columns), device=columns.device)
        new = (~block.known[mention_rows]).nonzero().squeeze(1) if direction == plan.direction else None
        if new is not None:
            if not len(new):
                return result
            mention_rows, columns = mention_rows[new], columns[new]
        images = query.image_of.index_select(0, mention_rows)
        most = block.most[columns] if direction == ENT2MEN else query.image_bound[images, 0]
        scores = self._image_scores(query, direction, images, columns + block.start) - most
        return scores if new is None else result.index_copy_(0, new, scores)

    def _image_scores(self, query: Query, direction: int, images: Tensor, entity_rows: Tensor) -> Tensor:
        """What a direction of the image unit adds to the totals of pairs of a mention's image and an entity,
        (pairs,)."""
        result = torch.empty(len(images), device=images.device)
        names = SIDES[direction]
        if len(query.image_bound) <= _FEW:
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
            mention, entity = taken(query.images[direction], images[pairs]), taken(entities, places[pairs])
            unit, queries, keys = self._sides(direction, mention, entity)
            result[pairs] = unit.score_pairs(queries, keys)
        return result.div_(HALF_UNITS)

    def _hull(self, query: Query, block: Block, found: tuple[Tensor, Tensor, Tensor]) -> Pairs:
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
        return Pairs(mention_rows, columns, lower, upper)


__all__ = ["Block", "ImagePlan", "Pairs", "Query", "Stages"]

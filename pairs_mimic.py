"""Given pairs of mentions and entities, scored exactly, and the order of scores that are equal.

Whatever company a pair is scored in, its score is the same but for rounding. Knows rows, not which pairs are worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors_mimic import EntityIndexError
from .matching_mimic import EntityFeatures, Matcher, MentionFeatures, PairScores

# The difference, relative to one and the score, up to which two scores count as equal. `score_pairs` gives a pair, and
# entities that are the same, the same score in any company but for rounding, which is smaller than that.
TIE = 1e-6
# Bytes of attention made in one go: they stay in a CPU's cache.
CACHE_BYTES = 16 * 2**20

# Features of the attention.
_MENTION_TOKENS = ("text_key", "text_value", "text_mask")
_ATTENTION = ("text_query", "text_local", "text_bias", "text_mask")
# Directions of the image unit: the entity's image is the query, or the mention's is. Features of the entity's side;
# the mention's are those of the other direction.
ENT2MEN, MEN2ENT = 0, 1
PREFIXES = ("image_query_", "image_key_")
QUERY = tuple(PREFIXES[0] + name for name in ("q", "a", "m", "stats"))
KEY = tuple(PREFIXES[1] + name for name in ("z", "a", "k", "stats"))
SIDES = (QUERY, KEY)


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

    def name_of(self, row: int) -> str:
        """What messages call the entity of a row."""
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

    def name_of(self, row: int) -> str:
        return self.blocks.name_of(int(self.rows[row]))


class KeptRows(ChosenRows):
    """Chosen rows, of which some features are read at once and kept: for a sample, that is asked several times."""

    def __init__(self, blocks: EntityBlocks, rows: Tensor, names: Sequence[str], device: torch.device) -> None:
        super().__init__(blocks, rows)
        self._kept = super().gather(slice(0, len(rows)), names, device)

    def gather(self, rows: Tensor | slice, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        kept = {name: self._kept[name] for name in names if name in self._kept}
        result = {name: t[rows] for name, t in kept.items()} if isinstance(rows, slice) else taken(kept, rows)
        if others := [name for name in names if name not in kept]:
            result |= super().gather(rows, others, device)
        return result


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


def taken(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of each tensor. `index_select` copies whole rows: ten times as fast as indexing."""
    return {name: tensor.index_select(0, rows) for name, tensor in tensors.items()}


# --- Equal scores ---------------------------------------------------------------------------------------------------


def are_equal(one: Tensor, other: Tensor) -> Tensor:
    """Which scores count as equal."""
    return (one - other).abs() <= TIE * (1 + other.abs())


def best_order(scores: Tensor, rows: Tensor) -> Tensor:
    """The order, (M, n), of scores (M, n) of entity rows (M, n), best first; equal ones in the order of rows.

    Scores between which no gap is larger than what counts as equal are all equal: so what is the same is never parted,
    however it is rounded.
    """
    order = rows.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    ranked = scores.gather(1, order)
    tied = are_equal(ranked[:, :-1], ranked[:, 1:]) & (ranked[:, 1:] > -torch.inf)
    if bool(tied.any()):
        group = torch.nn.functional.pad((~tied).cumsum(dim=1), (1, 0))
        inside = rows.gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, inside.gather(1, group.gather(1, inside).argsort(dim=1, stable=True)))
    return order


# --- Scores ---------------------------------------------------------------------------------------------------------


def score_pairs(
    matcher: Matcher,
    mentions: MentionFeatures,
    mention_rows: Tensor,
    blocks: EntityBlocks,
    entity_rows: Tensor,
    block_bytes: int,
) -> PairScores:
    """Exact scores of given pairs, each tensor of shape (pairs,).

    Raises:
        EntityIndexError: if one is not finite. Says whose.
    """
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
            blocks.gather(entity_rows[picked], ("text_embed", "cross_modal", *QUERY, *KEY), device)
        )
        some = MentionFeatures(taken(light, mention_rows[picked]))
        scores = matcher.score_pairs(some, entities, local[picked])
        refuse_not_finite(scores.total, blocks, entity_rows[picked])
        parts.append(scores)
    if len(parts) == 1:
        return parts[0]
    return PairScores(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("total", "text", "image", "cross_modal"))
    )


def refuse_not_finite(numbers: Tensor, blocks: EntityBlocks, entity_rows: Tensor) -> None:
    """Makes sure that numbers (rows,), each of the entity of a row, can be compared.

    Raises:
        EntityIndexError: if one is not finite. Says whose.
    """
    wrong = (~torch.isfinite(numbers)).nonzero().squeeze(1)
    if len(wrong):
        raise EntityIndexError(
            f"The features of {blocks.name_of(int(entity_rows[wrong[0]]))} are not finite, or too large: its scores "
            "have no order. Call EntityIndex.verify(), and build the index again; or remove the entity."
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
        block_bytes = min(block_bytes, CACHE_BYTES)
    result = torch.empty(len(mention_rows), device=device)
    for groups in torch.arange(len(table), device=device).split(
        max(1, block_bytes // (4 * length * (2 * size + width * (length + 2 * size))))
    ):
        flat = blocks.gather(entity_rows[table[groups]].flatten(), _ATTENTION, device)
        entity = {name: tensor.unflatten(0, (len(groups), width)) for name, tensor in flat.items()}
        scores = matcher.tglu.local_pairs(taken(tensors, owners[groups]), entity)
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


__all__ = [
    "CACHE_BYTES",
    "ENT2MEN",
    "KEY",
    "MEN2ENT",
    "PREFIXES",
    "QUERY",
    "SIDES",
    "TIE",
    "ChosenRows",
    "EntityBlocks",
    "KeptRows",
    "SearchStats",
    "are_equal",
    "best_order",
    "refuse_not_finite",
    "score_pairs",
    "taken",
]

"""Whether parts can be one index: of one model and precision, and without an id in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors_mimic import EntityIndexError
from ..identity_mimic import same_model
from .actors import Moment

_HASHES_AT_ONCE = 2**22


def check_facts(places: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> None:
    """Refuses parts of different models or precisions."""
    for place, fact in zip(places, facts, strict=True):
        if fact["dtype"] != facts[0]["dtype"]:
            raise EntityIndexError(
                f"The part {place} is stored in {fact['dtype']}, the part {places[0]} in {facts[0]['dtype']}: parts "
                "must have one precision."
            )
        if not same_model(fact["model"], facts[0]["model"]):
            raise EntityIndexError(
                f"The part {place} was made by another model or processor than the part {places[0]}: their scores "
                "cannot be compared."
            )


def check_still(places: Sequence[str], facts: Sequence[Mapping[str, Any]], opened: Mapping[str, Any]) -> None:
    """Refuses parts in whose place lies something else than what was opened there first."""
    for place, fact in zip(places, facts, strict=True):
        if fact["dtype"] != opened["dtype"] or not same_model(fact["model"], opened["model"]):
            raise EntityIndexError(
                f"The part {place} was replaced by an index of another model or precision since it was opened. Put it "
                "back, or open the parts anew."
            )


def check_ids(places: Sequence[str], parts: Moment) -> None:
    """Refuses an id that two parts have: in ranges of hashes, so that some million are here at a time."""
    ranges = -(-sum(parts.counts) // _HASHES_AT_ONCE) if len(places) > 1 else 0
    for number in range(ranges):
        hashes, counts = np.unique(np.concatenate(parts.all("id_hashes", number, ranges)), return_counts=True)
        if not len(doubtful := hashes[counts > 1]):
            continue
        owner: dict[str, int] = {}
        for part, ids in enumerate(parts.all("ids_of_hashes", doubtful)):
            for entity_id in ids:
                if owner.setdefault(entity_id, part) != part:
                    raise EntityIndexError(
                        f"The parts {places[owner[entity_id]]} and {places[part]} both have the entity {entity_id!r}: "
                        "ids must be unique. Remove it from one of them."
                    )


__all__ = ["check_facts", "check_ids", "check_still"]

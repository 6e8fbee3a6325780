"""The parts of an index, asked as one: each question goes to all parts, and their answers become one answer.

Knows what is asked and how answers add up; how a part is reached is the actors' business, how it is stored its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..contents_mimic import known_form, listed_candidates, unknown_entities
from ..errors_mimic import EntityIndexError
from ..matching_mimic import MentionFeatures
from ..mentions_mimic import check_features
from ..names_mimic import longest_spans
from ..pairs_mimic import TIE, SearchStats
from ..search_mimic import METHODS
from ..snapshot_mimic import (
    RankResult,
    SearchResult,
    answer_ids,
    at_least,
    check_method,
    check_numbers,
    for_each_mention,
)
from ..spans_mimic import fold
from .actors import Actors
from .merging import MergedResults

_RECORDS_AT_ONCE = 4096


class PartedState:
    """What [`SearchableIndex`] asks, of all parts. Its methods answer as those of [`EntityIndex`] of the same names do.

    Args:
        actors: hold the parts.
        facts: of each part: the number of its entities, its dtype, and what is noted of the model that made it.
    """

    def __init__(self, actors: Actors, facts: Sequence[Mapping[str, Any]]) -> None:
        self._actors, self._facts = actors, facts[0]
        self.counts: list[int] = [fact["count"] for fact in facts]

    # --- What the parts hold

    @property
    def dtype(self) -> str:
        return self._facts["dtype"]

    @property
    def made_by(self) -> Mapping[str, Any]:
        return self._facts["model"]

    def __len__(self) -> int:
        return sum(self.counts)

    def __contains__(self, entity_id: object) -> bool:
        return any(found[0] for found in self._actors.all("has", [entity_id]))

    def records(self) -> Iterator[dict[str, Any]]:
        for part in range(len(self._actors)):
            start = 0
            while records := self._actors.one(part, "records_from", start, _RECORDS_AT_ONCE):
                yield from records
                start += len(records)

    def record(self, entity_id: str) -> dict[str, Any]:
        for [record] in self._actors.all("records", [entity_id]):
            if record is not None:
                return record
        raise unknown_entities([entity_id], len(self))

    def parts_of(self, entity_ids: Sequence[object]) -> list[dict[str, None]]:
        """For each part those of some entities that are in it, in their order.

        Raises:
            UnknownEntityError: if one is in none.
        """
        forms = {place: form for place, name in enumerate(entity_ids) if (form := known_form(name)) is not None}
        ids = list(dict.fromkeys(forms.values()))
        parts = [
            {name: None for name, there in zip(ids, own, strict=True) if there} for own in self._actors.all("has", ids)
        ]
        known: set[str] = set().union(*parts)
        if missing := [name for place, name in enumerate(entity_ids) if forms.get(place) not in known]:
            raise unknown_entities(missing, len(self))
        return parts

    # --- Names

    def find(self, name: str, max_distance: int) -> list[str]:
        for distance in range(max_distance + 1):
            found = [entity_id for part in self._actors.all("find", name, distance) for entity_id in part]
            if found and distance == 0:
                every = self._actors.all("records", found)
                records = {record["id"]: record for part in every for record in part if record}
                exact = [i for i in found if name in (records[i]["name"], *(records[i].get("aliases") or ()))]
                return exact or found
            if found:
                return found
        return []

    def find_mentions(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        places = set(itertools.chain(*self._actors.all("places_of_names", text, lower_case)))
        return longest_spans(fold(text), places)

    def bearers(self, names: Sequence[str]) -> list[list[str] | None]:
        parts = self._actors.all("bearers", list(names))
        return [list(itertools.chain(*found)) or None for found in zip(*parts, strict=True)]

    # --- Search and ranks

    def check_candidates(self, entity_ids: Sequence[str] | None) -> None:
        self._candidates_of_parts([entity_ids], 1)

    def linked(
        self, mentions: MentionFeatures, top_k: int, candidates: Sequence[Any], **options: Any
    ) -> list[list[dict[str, Any]]]:
        found, owners = self._search(mentions, top_k, candidates=candidates, **options)
        wanted: list[list[str]] = [[] for _ in range(len(self._actors))]
        for ids, parts in zip(found.entity_ids, owners, strict=True):
            for entity_id, part in zip(ids, parts, strict=True):
                wanted[part].append(entity_id)
        records: dict[str, dict[str, Any]] = {}
        for part in self._actors.each("records", [([*dict.fromkeys(ids)],) for ids in wanted]):
            records |= {record["id"]: record for record in part if record is not None}
        return found.linked(records)

    def search(self, mentions: MentionFeatures, top_k: int, **options: Any) -> SearchResult:
        return self._search(mentions, top_k, **options)[0]

    def _search(
        self,
        mentions: MentionFeatures,
        top_k: int,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        method: str = "pruned",
        min_score: Any = None,
        num_candidates: int | None = None,
        nprobe: int = 32,
        show_progress: bool = False,
    ) -> tuple[SearchResult, list[list[int]]]:
        """What is found, and the part of each entity."""
        self._actors.check_open()
        top_k = at_least("top_k", top_k, 1)
        shared = self._sent(mentions, method)
        if candidates is not None:
            check_numbers(mentions, candidates=candidates)
        if num_candidates is not None:
            at_least("num_candidates", num_candidates, top_k)
            raise EntityIndexError("An index in parts has no shortlist: leave `num_candidates` out.")
        count, parts = len(mentions), len(self._actors)
        allowed = self._candidates_of_parts(candidates, count)
        given = for_each_mention("min_score", min_score, mentions)
        floor = np.full(count, -np.inf, dtype=np.float32) if given is None else given.cpu().numpy()
        merged = MergedResults(count, top_k)

        def ask(rows_of: Callable[[int], list[int]]) -> None:
            asked = [rows_of(part) for part in range(parts)]
            results = self._actors.each(
                "search",
                [(shared, rows) if rows else None for rows in asked],
                [
                    {
                        "top_k": top_k,
                        "candidates": None if allowed is None else [allowed[part][row] for row in rows],
                        "method": method,
                        "min_score": floor[rows],
                    }
                    for part, rows in enumerate(asked)
                ],
            )
            for part, (rows, result) in enumerate(zip(asked, results, strict=True)):
                if result is not None:
                    merged.add(part, rows, result)

        # Each part is the first for some of the mentions; what it finds is what the other parts' entities must reach.
        first = np.arange(count) % parts
        ask(lambda part: np.flatnonzero(first == part).tolist())
        if parts > 1:
            best = merged.kth_scores()
            floor = np.maximum(floor, best - 2 * TIE * (1 + np.abs(np.where(np.isneginf(best), 0, best))))
            ask(lambda part: np.flatnonzero(first != part).tolist())
        return merged.result(len(self))

    def _candidates_of_parts(
        self, candidates: Sequence[Sequence[str] | None] | None, count: int
    ) -> list[list[list[str] | None]] | None:
        """For each part and mention the candidates that are in the part."""
        if candidates is None:
            return None
        # A generator can be read only once.
        given = [None if ids is None else listed_candidates(ids) for ids in candidates]
        known = self.parts_of(list(itertools.chain.from_iterable(ids for ids in given if ids is not None)))
        forms = [None if ids is None else [known_form(name) for name in ids] for ids in given]
        return [[None if ids is None else [i for i in ids if i in part] for ids in forms] for part in known]

    def _sent(self, mentions: Any, method: str = METHODS[0]) -> Any:
        """Mentions that parts can be asked about, sent once; each part makes sure that they are of its model."""
        check_method(method)
        check_features(mentions)
        if not len(self):
            raise EntityIndexError("This index has no entities, so there is nothing to search.")
        return self._actors.shared(mentions.to("cpu"))

    def rank(
        self, mentions: MentionFeatures, answers: Sequence[str | None], method: str, show_progress: bool
    ) -> RankResult:
        shared = self._sent(mentions, method)
        answers = answer_ids(mentions, answers)
        scores = self._answer_scores(shared, answers)
        known = np.flatnonzero(~np.isnan(scores))
        ranks = np.full(len(answers), np.nan)
        stats = SearchStats(pairs=len(known) * len(self))
        if len(known):
            above, equal = self._count_better(shared, known, scores[known], answers, method)
            ranks[known] = 1 + above + equal / 2
        return RankResult(ranks, stats)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        shared = self._sent(mentions)
        answers = answer_ids(mentions, answers)
        return self._answer_scores(shared, answers)

    def count_better(
        self,
        mentions: MentionFeatures,
        scores: Sequence[float] | np.ndarray,
        answers: Sequence[str | None],
        method: str,
        show_progress: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        shared = self._sent(mentions, method)
        answers = answer_ids(mentions, answers)
        gold = for_each_mention("scores", np.nan if scores is None else scores, mentions)
        assert gold is not None
        above, equal = self._count_better(shared, np.arange(len(answers)), gold.cpu().numpy(), answers, method)
        return above, equal

    def _answer_scores(self, mentions: Any, answers: Sequence[str | None]) -> np.ndarray:
        """The score of each answer, by the part that has it; NaN where none has."""
        every = np.stack(self._actors.all("answer_scores", mentions, list(answers)))
        known = ~np.isnan(every).all(axis=0)
        scores = np.full(len(answers), np.nan, dtype=np.float32)
        scores[known] = np.nanmax(every[:, known], axis=0)
        return scores

    def _count_better(
        self, mentions: Any, rows: np.ndarray, scores: np.ndarray, answers: Sequence[str | None], method: str
    ) -> np.ndarray:
        """How many entities of all parts are better and as good, for some of the mentions."""
        wanted = [answers[row] for row in rows.tolist()]
        return np.sum(self._actors.all("count_better", mentions, rows.tolist(), scores, wanted, method), axis=0)


__all__ = ["PartedState"]

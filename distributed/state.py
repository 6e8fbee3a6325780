"""The parts of an index, asked as one: each question goes to all parts, and their answers become one answer.

A question is about the states that the parts have when it is asked. If one part gets another state before all have
answered, because it was changed or its actor was started again, the whole question is asked again. Knows what is asked
and how answers are combined, but not how a part is reached or stored.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from ..contents_mimic import known_form, listed_candidates, unknown_entities
from ..errors_mimic import EntityIndexError
from ..matching_mimic import EntityFeatures, MentionFeatures
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
from .actors import Actors, Moment
from .fitting import check_facts, check_ids, check_still
from .merging import MergedResults
from .part import PartChangedError

_RECORDS_AT_ONCE = 4096
# How often a question is asked while the parts change.
_TIMES, _PAUSE = 20, 0.01

Answer = TypeVar("Answer")


class _Bearers(list):
    """Ids that were found by a name; one that was removed since is no candidate any more."""


class PartedState:
    """What [`SearchableIndex`] asks, of all parts. Its methods answer as those of [`EntityIndex`] of the same names do.

    Args:
        actors: hold the parts.

    Raises:
        EntityIndexError: if a part cannot be opened, or the parts cannot be one index.
    """

    def __init__(self, actors: Actors) -> None:
        self._actors = actors
        self._first: Mapping[str, Any] | None = None
        self._moment = Moment(actors, [])
        self.now()

    def at_one_moment(self, question: Callable[[Moment], Answer]) -> Answer:
        """What a question gives, all of whose parts are answered from the same states of the parts.

        Args:
            question: may be asked several times.

        Raises:
            EntityIndexError: if the parts as they are now cannot be one index, or change again and again.
        """
        for turn in range(_TIMES):
            try:
                if turn or not self._moment.facts:
                    self._catch_up()
                return question(self._moment)
            except PartChangedError:
                time.sleep(_PAUSE * turn)
        raise EntityIndexError("The parts of this index are being changed again and again; try later.")

    def _catch_up(self) -> None:
        """Sees how the parts are now. Changes that were made by their actors were checked before; what lies there that
        somebody else has written is checked as when it was opened first."""
        facts, places = self._actors.all("facts"), self._actors.places
        if self._first is None:
            check_facts(places, facts)
        else:
            check_still(places, facts, self._first)
        now, known = Moment(self._actors, facts), [fact["opening"] for fact in self._moment.facts]
        if known != [fact["opening"] for fact in facts]:
            check_ids(places, now)
        self._moment, self._first = now, self._first or facts[0]

    def now(self) -> Moment:
        """The parts as they are now."""

        def now(moment: Moment) -> Moment:
            moment.all("has", [])
            return moment

        return self.at_one_moment(now)

    def note(self, part: int, facts: Mapping[str, Any]) -> None:
        """Takes notice of a change of a part that its actor has made."""
        known = list(self._moment.facts)
        if known[part]["opening"] == facts["opening"]:  # else it is checked when it is asked next
            known[part] = facts
            self._moment = Moment(self._actors, known)

    # --- What the parts hold

    @property
    def dtype(self) -> str:
        assert self._first is not None
        return self._first["dtype"]

    @property
    def made_by(self) -> Mapping[str, Any]:
        assert self._first is not None
        return self._first["model"]

    def __len__(self) -> int:
        return sum(self._moment.counts)

    def __contains__(self, entity_id: object) -> bool:
        return self.at_one_moment(lambda moment: any(found[0] for found in moment.all("has", [entity_id])))

    def records(self) -> Iterator[dict[str, Any]]:
        moment = self.now()
        for part, count in enumerate(moment.counts):
            row = 0
            while count > 0:
                try:
                    records, row = moment.one(part, "records_from", row, _RECORDS_AT_ONCE)
                except PartChangedError:
                    raise EntityIndexError(
                        f"The part {self._actors.places[part]} was changed while its entities were read. Read them "
                        "from the beginning."
                    ) from None
                count -= len(records)
                yield from records

    def record(self, entity_id: str) -> dict[str, Any]:
        [record] = self.records_of([entity_id])
        if record is None:
            raise unknown_entities([entity_id], len(self))
        return record

    def records_of(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        every = self.at_one_moment(lambda moment: moment.all("records", list(entity_ids)))
        return [next((record for record in found if record is not None), None) for found in zip(*every, strict=True)]

    def features(self, entity_ids: Sequence[str]) -> EntityFeatures:
        entity_ids = list(entity_ids)

        def features(moment: Moment) -> EntityFeatures:
            parts = [list(part) for part in self.parts_of(moment, entity_ids)]
            if not entity_ids:
                return moment.one(int(np.argmax(moment.counts)), "features", [])
            found = [part for part in moment.each("features", [(ids,) if ids else None for ids in parts]) if part]
            places = {entity_id: place for place, entity_id in enumerate(itertools.chain(*parts))}
            rows = [places[str(known_form(entity_id))] for entity_id in entity_ids]
            return EntityFeatures.cat(found)[torch.tensor(rows, dtype=torch.long)]

        return self.at_one_moment(features)

    @staticmethod
    def parts_of(moment: Moment, entity_ids: Sequence[object]) -> list[dict[str, None]]:
        """For each part those of some entities that are in it, in their order.

        Raises:
            UnknownEntityError: if one is in none.
        """
        forms = {place: form for place, name in enumerate(entity_ids) if (form := known_form(name)) is not None}
        parts = _places(moment, list(dict.fromkeys(forms.values())))
        known: set[str] = set().union(*parts)
        if missing := [name for place, name in enumerate(entity_ids) if forms.get(place) not in known]:
            raise unknown_entities(missing, sum(moment.counts))
        return parts

    # --- Names

    def find(self, name: str, max_distance: int) -> list[str]:
        return self.at_one_moment(lambda moment: _found(moment, name, max_distance))

    def find_mentions(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        found = self.at_one_moment(lambda moment: moment.all("places_of_names", text, lower_case))
        return longest_spans(fold(text), set(itertools.chain(*found)))

    def bearers(self, names: Sequence[str]) -> list[list[str] | None]:
        parts = self.at_one_moment(lambda moment: moment.all("bearers", list(names)))
        return [_Bearers(itertools.chain(*found)) or None for found in zip(*parts, strict=True)]

    # --- Search and ranks

    def check_candidates(self, entity_ids: Sequence[str] | None) -> None:
        [listed] = _listed([entity_ids])
        self.at_one_moment(lambda moment: self._candidates_of_parts(moment, [listed]))

    def linked(
        self, mentions: MentionFeatures, top_k: int, candidates: Sequence[Any], **options: Any
    ) -> list[list[dict[str, Any]]]:
        search = self._search(mentions, top_k, candidates=candidates, **options)

        def link(moment: Moment) -> list[list[dict[str, Any]]]:
            found, owners = search(moment)
            wanted: list[list[str]] = [[] for _ in moment.facts]
            for ids, parts in zip(found.entity_ids, owners, strict=True):
                for entity_id, part in zip(ids, parts, strict=True):
                    wanted[part].append(entity_id)
            records: dict[str, dict[str, Any]] = {}
            for part in moment.each("records", [([*dict.fromkeys(ids)],) for ids in wanted]):
                records |= {record["id"]: record for record in part if record is not None}
            return found.linked(records)

        return self.at_one_moment(link)

    def search(self, mentions: MentionFeatures, top_k: int, **options: Any) -> SearchResult:
        return self.at_one_moment(self._search(mentions, top_k, **options))[0]

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
    ) -> Callable[[Moment], tuple[SearchResult, list[list[int]]]]:
        """The question that gives what is found, and the part of each entity."""
        self._actors.check_open()
        top_k = at_least("top_k", top_k, 1)
        shared = self._sent(mentions, method)
        if candidates is not None:
            check_numbers(mentions, candidates=candidates)
        if num_candidates is not None:
            at_least("num_candidates", num_candidates, top_k)
            raise EntityIndexError("An index in parts has no shortlist: leave `num_candidates` out.")
        count = len(mentions)
        listed = None if candidates is None else _listed(candidates)
        given = for_each_mention("min_score", min_score, mentions)
        least = np.full(count, -np.inf, dtype=np.float32) if given is None else given.cpu().numpy()

        def search(moment: Moment) -> tuple[SearchResult, list[list[int]]]:
            parts, floor, merged = len(moment.facts), least, MergedResults(count, top_k)
            allowed = None if listed is None else self._candidates_of_parts(moment, listed)

            def ask(rows_of: Callable[[int], list[int]]) -> None:
                asked = [rows_of(part) for part in range(parts)]
                results = moment.each(
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

            # Each part is the first for some of the mentions; what it finds is what the other parts' entities must
            # reach.
            first = np.arange(count) % parts
            ask(lambda part: np.flatnonzero(first == part).tolist())
            if parts > 1:
                best = merged.kth_scores()
                floor = np.maximum(floor, best - 2 * TIE * (1 + np.abs(np.where(np.isneginf(best), 0, best))))
                ask(lambda part: np.flatnonzero(first != part).tolist())
            return merged.result(sum(moment.counts))

        return search

    def _candidates_of_parts(
        self, moment: Moment, candidates: Sequence[Sequence[Any] | None]
    ) -> list[list[list[str] | None]]:
        """For each part and mention the candidates that are in the part."""
        told = itertools.chain.from_iterable(i for i in candidates if i is not None and not isinstance(i, _Bearers))
        named = itertools.chain.from_iterable(i for i in candidates if isinstance(i, _Bearers))
        known = [
            {**own, **others}
            for own, others in zip(
                self.parts_of(moment, list(told)), _places(moment, list(dict.fromkeys(named))), strict=True
            )
        ]
        forms = [None if ids is None else [known_form(name) for name in ids] for ids in candidates]
        return [[None if ids is None else [i for i in ids if i in part] for ids in forms] for part in known]

    def _sent(self, mentions: Any, method: str = METHODS[0]) -> Any:
        """Mentions that parts can be asked about, sent once; each part makes sure that they are of its model."""
        check_method(method)
        check_features(mentions)
        if not len(self) and not sum(self.now().counts):
            raise EntityIndexError("This index has no entities, so there is nothing to search.")
        return self._actors.shared(mentions.to("cpu"))

    def rank(
        self, mentions: MentionFeatures, answers: Sequence[str | None], method: str, show_progress: bool
    ) -> RankResult:
        shared = self._sent(mentions, method)
        answers = answer_ids(mentions, answers)

        def rank(moment: Moment) -> RankResult:
            scores = _answer_scores(moment, shared, answers)
            known = np.flatnonzero(~np.isnan(scores))
            ranks = np.full(len(answers), np.nan)
            stats = SearchStats(pairs=len(known) * sum(moment.counts))
            if len(known):
                above, equal = _count_better(moment, shared, known, scores[known], answers, method)
                ranks[known] = 1 + above + equal / 2
            return RankResult(ranks, stats)

        return self.at_one_moment(rank)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        shared = self._sent(mentions)
        answers = answer_ids(mentions, answers)
        return self.at_one_moment(lambda moment: _answer_scores(moment, shared, answers))

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
        answer_scores = for_each_mention("scores", np.nan if scores is None else scores, mentions)
        assert answer_scores is not None
        rows, values = np.arange(len(answers)), answer_scores.cpu().numpy()
        above, equal = self.at_one_moment(lambda moment: _count_better(moment, shared, rows, values, answers, method))
        return above, equal


def _listed(candidates: Sequence[Any]) -> list[list[Any] | None]:
    """Candidates as lists: a generator can be read only once."""
    return [ids if ids is None or isinstance(ids, _Bearers) else listed_candidates(ids) for ids in candidates]


def _places(moment: Moment, ids: list[str]) -> list[dict[str, None]]:
    """For each part those of some entities that are in it, in their order."""
    if not ids:
        return [{} for _ in moment.facts]
    return [{name: None for name, there in zip(ids, own, strict=True) if there} for own in moment.all("has", ids)]


def _found(moment: Moment, name: str, max_distance: int) -> list[str]:
    for distance in range(max_distance + 1):
        found = [entity_id for part in moment.all("find", name, distance) for entity_id in part]
        if found and distance == 0:
            every = moment.all("records", found)
            records = {record["id"]: record for part in every for record in part if record}
            exact = [i for i in found if name in (records[i]["name"], *(records[i].get("aliases") or ()))]
            return exact or found
        if found:
            return found
    return []


def _answer_scores(moment: Moment, mentions: Any, answers: Sequence[str | None]) -> np.ndarray:
    """The score of each answer, by the part that has it; NaN where none has."""
    every = np.stack(moment.all("answer_scores", mentions, list(answers)))
    known = ~np.isnan(every).all(axis=0)
    scores = np.full(len(answers), np.nan, dtype=np.float32)
    scores[known] = np.nanmax(every[:, known], axis=0)
    return scores


def _count_better(
    moment: Moment, mentions: Any, rows: np.ndarray, scores: np.ndarray, answers: Sequence[str | None], method: str
) -> np.ndarray:
    """How many entities of all parts are better and as good, for some of the mentions."""
    wanted = [answers[row] for row in rows.tolist()]
    return np.sum(moment.all("count_better", mentions, rows.tolist(), scores, wanted, method), axis=0)


__all__ = ["PartedState"]

"""Answers questions from one state of an index: ids become rows, the search runs, rows become ids and records again.

One snapshot answers a question from beginning to end, so a change in another thread does not disturb it. Computes
nothing itself, changes nothing, and does not know how an index is made.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .contents_mimic import Contents
from .directory_mimic import shortlist_path
from .errors_mimic import EntityIndexError
from .files_mimic import no_space_told
from .matching_mimic import EntityFeatures, Matcher, MentionFeatures
from .mentions_mimic import check_features, checked_mentions
from .pairs_mimic import SearchStats
from .records_mimic import entity_id_of, is_absent
from .search_mimic import METHODS, FoundEntities, answer_ranks, answer_scores, best_entities, better_entities
from .shortlist_mimic import Shortlist


@dataclass
class SearchResult:
    """The best entities of M mentions, best first.

    Args:
        entity_ids (`list[list[str]]`): ids, k of each mention; fewer where the knowledge base or the candidates are
            fewer.
        scores, text_scores, image_scores, cross_modal_scores (`numpy.ndarray` of shape `(M, k)`, float32): the total
            and each unit's scores; NaN where there is no entity.
        stats ([`SearchStats`]): how many pairs were scored exactly.
    """

    entity_ids: list[list[str]]
    scores: np.ndarray
    text_scores: np.ndarray
    image_scores: np.ndarray
    cross_modal_scores: np.ndarray
    stats: SearchStats

    def linked(self, records: Mapping[str, Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """For each mention its entities as linking gives them: a dict of id, name, description and scores each.

        Args:
            records: the entities' own data by id; one that is not there (it was removed since) is left out.
        """
        scores = (self.scores, self.text_scores, self.image_scores, self.cross_modal_scores)
        return [
            [
                {"entity_id": name, **{key: records[name][key] for key in ("name", "description")}}
                | {key: float(part[row, place]) for key, part in zip(_SCORES, scores, strict=True)}
                for place, name in enumerate(ids)
                if name in records
            ]
            for row, ids in enumerate(self.entity_ids)
        ]


_SCORES = ("score", "text_score", "image_score", "cross_modal_score")


@dataclass
class RankResult:
    """The ranks of M mentions' answers among all entities.

    Args:
        ranks (`numpy.ndarray` of shape `(M,)`, float64): from 1; among equal scores the mean of the best and the
            worst position; NaN where the answer is not in the knowledge base.
        stats ([`SearchStats`]): how many pairs were scored exactly.
    """

    ranks: np.ndarray
    stats: SearchStats


@dataclass
class Snapshot:
    """One state of an index. Its methods answer as those of [`EntityIndex`] of the same names say.

    Args:
        matcher: what scoring needs of the model that made the index.
        contents: its entities.
    """

    matcher: Matcher
    contents: Contents
    _shortlist: Shortlist | None = field(default=None, init=False, repr=False)

    def verify(self) -> None:
        self.contents.verify(self.matcher)
        path = self.contents.directory and shortlist_path(self.contents.directory, self.contents.manifest)
        if path is not None and path.exists():
            Shortlist.verify(path)

    # --- Entities and names

    @property
    def dtype(self) -> str:
        return self.contents.manifest["dtype"]

    @property
    def made_by(self) -> Mapping[str, Any]:
        return self.contents.manifest["model"]

    def __len__(self) -> int:
        return len(self.contents)

    def __contains__(self, entity_id: object) -> bool:
        return self.contents.row(entity_id) is not None

    def records(self) -> Iterator[dict[str, Any]]:
        return self.contents.store.records()

    def record(self, entity_id: str) -> dict[str, Any]:
        return self.contents.store.record(self.contents.rows([entity_id])[0])

    def records_of(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        rows = [self.contents.row(entity_id) for entity_id in entity_ids]
        return [None if row is None else self.contents.store.record(row) for row in rows]

    def features(self, entity_ids: Sequence[str]) -> EntityFeatures:
        rows = torch.tensor(self.contents.rows(entity_ids), dtype=torch.long)
        return self.contents.store.full(rows, torch.device("cpu")).to(torch.float32)

    def find(self, name: str, max_distance: int) -> list[str]:
        return self._ids(self.contents.rows_named(name, min(max_distance, len(name) // 3)))

    def find_mentions(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        return self.contents.spans_of_names(text, lower_case)

    def bearers(self, names: Sequence[str]) -> list[Tensor | None]:
        """For each name the entities that have it, in any case, as candidates; `None` where there are none."""
        return [self.contents.bearers(name) for name in names]

    def bearer_ids(self, name: str) -> list[str]:
        """The ids of the entities that have a name, in any case."""
        rows = self.contents.bearers(name)
        return [] if rows is None else self._ids(rows.tolist())

    def check_candidates(self, entity_ids: Sequence[str] | None) -> None:
        """Makes sure that a mention's candidates are ids of entities.

        Raises:
            ValueError: if they are a string.
            UnknownEntityError: if some are not there.
        """
        self.contents.candidate_rows(entity_ids)

    def _ids(self, rows: Sequence[int]) -> list[str]:
        return [self.contents.store.record(row)["id"] for row in rows if row >= 0]

    # --- Search

    def search(self, mentions: MentionFeatures, top_k: int, **options: Any) -> SearchResult:
        found = self._found(mentions, top_k, **options)
        return _result(found, [self._ids(rows) for rows in found.rows.tolist()])

    def linked(
        self, mentions: MentionFeatures, top_k: int, candidates: Sequence[Any], **options: Any
    ) -> list[list[dict[str, Any]]]:
        """The best entities of mentions with their names and descriptions; `candidates` are ids or [`bearers`]."""
        found = self._found(mentions, top_k, candidates=candidates, **options)
        store = self.contents.store
        records = [[store.record(row) for row in rows if row >= 0] for rows in found.rows.tolist()]
        ids = [[record["id"] for record in some] for some in records]
        return _result(found, ids).linked({record["id"]: record for some in records for record in some})

    def _found(
        self,
        mentions: MentionFeatures,
        top_k: int,
        *,
        candidates: Sequence[Any] | None = None,
        method: str = "pruned",
        min_score: float | Sequence[float] | np.ndarray | None = None,
        num_candidates: int | None = None,
        nprobe: int = 32,
        show_progress: bool = False,
    ) -> FoundEntities:
        contents, top_k = self.contents, at_least("top_k", top_k, 1)
        mentions = self._checked(mentions, method)
        if candidates is not None:
            check_numbers(mentions, candidates=candidates)
        allowed = [contents.candidate_rows(ids) for ids in candidates or [None] * len(mentions)]
        if num_candidates is not None:
            num_candidates = at_least("num_candidates", num_candidates, top_k)
            allowed = self.shortlist.instead_of_all(
                contents.store, mentions, allowed, num_candidates, nprobe, least=top_k
            )
        total = sum(len(contents.store) if rows is None else len(rows) for rows in allowed)
        with _progress("Searching", total, show_progress) as advance:
            return best_entities(
                self.matcher,
                contents.store,
                mentions,
                min(top_k, len(contents)),
                method=method,
                candidates=allowed,
                advance=advance,
                floor=for_each_mention("min_score", min_score, mentions),
            )

    # --- Ranks

    def rank(
        self,
        mentions: MentionFeatures,
        answers: Sequence[str | None],
        method: str = METHODS[0],
        show_progress: bool = False,
    ) -> RankResult:
        mentions, store = self._checked(mentions, method), self.contents.store
        rows = self._answer_rows(mentions, answers)
        known = (rows >= 0).nonzero().squeeze(1)
        with _progress("Ranking", len(known) * len(store), show_progress) as advance:
            ranked, stats = answer_ranks(
                self.matcher, store, mentions[known], rows[known], method=method, advance=advance
            )
        ranks = np.full(len(answers), np.nan)
        ranks[known.cpu().numpy()] = ranked.cpu().numpy()
        return RankResult(ranks, stats)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        mentions = self._checked(mentions, METHODS[0])
        rows = self._answer_rows(mentions, answers)
        known = (rows >= 0).nonzero().squeeze(1)
        found = answer_scores(self.matcher, self.contents.store, mentions[known], rows[known])
        scores = np.full(len(answers), np.nan, dtype=np.float32)
        scores[known.cpu().numpy()] = found.cpu().numpy()
        return scores

    def count_better(
        self,
        mentions: MentionFeatures,
        scores: Sequence[float] | np.ndarray,
        answers: Sequence[str | None],
        method: str = METHODS[0],
        show_progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        mentions, store = self._checked(mentions, method), self.contents.store
        rows = self._answer_rows(mentions, answers)
        answer_score = for_each_mention("scores", np.nan if scores is None else scores, mentions)
        assert answer_score is not None
        with _progress("Ranking", len(rows) * len(store), show_progress) as advance:
            above, equal = better_entities(
                self.matcher, store, mentions, rows, answer_score, method=method, advance=advance
            )
        return above.cpu().numpy(), equal.cpu().numpy()

    def _answer_rows(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> Tensor:
        """The row of each mention's answer, -1 where it is not there. Raises as [`answer_ids`] does."""
        found = [None if name is None else self.contents.row(name) for name in answer_ids(mentions, answers)]
        return torch.tensor([-1 if row is None else row for row in found], dtype=torch.long, device=mentions.device)

    def _checked(self, mentions: MentionFeatures, method: str) -> MentionFeatures:
        """The mentions, if they can be searched with; the matcher is then on their device."""
        check_method(method)
        if not len(self.contents):
            raise EntityIndexError("This index has no entities, so there is nothing to search.")
        mentions = checked_mentions(mentions, self.matcher)
        self.matcher.to(mentions.device)
        return mentions

    # --- The shortlist of these entities

    def build_shortlist(self, factory: str | None, show_progress: bool) -> None:
        contents = self.contents
        self._shortlist = Shortlist.build(contents.store, factory, show_progress)
        if contents.directory is not None and not contents.read_only:
            with no_space_told(contents.directory):
                self._shortlist.save(shortlist_path(contents.directory, contents.manifest))

    @property
    def shortlist(self) -> Shortlist:
        """The shortlist that was made of these entities.

        Raises:
            EntityIndexError: if none was.
        """
        if self._shortlist is None:
            path = self.contents.directory and shortlist_path(self.contents.directory, self.contents.manifest)
            if path is None or not path.exists():
                raise EntityIndexError(
                    "This index has no shortlist of its entities as they are now; call build_shortlist() first."
                )
            self._shortlist = Shortlist.load(path, self.contents.store)
        return self._shortlist


def check_method(method: Any) -> None:
    """Raises a `ValueError` for what is not a method of a search."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")


def check_numbers(mentions: Any, **others: Any) -> None:
    """Makes sure that there is one of something for each mention.

    Args:
        others: what there must be one of, by name.

    Raises:
        TypeError: if they are not features of mentions.
        ValueError: if the numbers differ.
    """
    check_features(mentions)
    for name, values in others.items():
        if not hasattr(values, "__len__"):
            raise TypeError(f"`{name}` must be a list with one for each mention, got {type(values).__name__}.")
        if len(values) != len(mentions):
            raise ValueError(f"There are {len(mentions)} mentions, but {name} for {len(values)}.")


def answer_ids(mentions: Any, answers: Any) -> list[str | None]:
    """The id of each mention's answer as an index has it; `None` where the mention has none.

    Raises:
        TypeError, ValueError: as [`check_numbers`]; and if an answer is not an id, nor absent.
    """
    check_numbers(mentions, answers=answers)
    return [
        None if is_absent(answer) else entity_id_of(answer, f"The answer of mention {number} (counted from 0)")
        for number, answer in enumerate(answers)
    ]


def at_least(name: str, value: Any, least: int) -> int:
    """An integer argument.

    Raises:
        ValueError: if it is none, or too small.
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") or value < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"`{name}` must be {what}, got {value!r}.")
    return operator.index(value)


def for_each_mention(name: str, values: Any, mentions: MentionFeatures) -> Tensor | None:
    """A number for each mention, float32 of shape (M,), from one for all or from one for each; `None` as it is.

    Raises:
        ValueError: if they are something else.
    """
    if values is None:
        return None
    try:
        with np.errstate(over="ignore"):  # then it is infinite, which no score is
            array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be a number, or one for each of {len(mentions)} mentions, got {values!r:.80}."
        ) from error
    if array.shape not in ((), (len(mentions),)) or np.isnan(array).any():
        raise ValueError(
            f"`{name}` must be a number, or one for each of {len(mentions)} mentions, and none may be NaN; got "
            f"{'NaN' if np.isnan(array).any() else f'the shape {array.shape}'}."
        )
    return torch.from_numpy(np.broadcast_to(array, (len(mentions),)).copy()).to(mentions.device)


def _result(found: FoundEntities, entity_ids: list[list[str]]) -> SearchResult:
    scores = found.scores
    total, text, image, cross_modal = (
        part.cpu().numpy() for part in (scores.total, scores.text, scores.image, scores.cross_modal)
    )
    return SearchResult(entity_ids, total, text, image, cross_modal, found.stats)


@contextmanager
def _progress(what: str, total: int, show: bool) -> Iterator[Any]:
    """A bar that counts pairs; gives the function that is told of them."""
    with tqdm(total=total, desc=what, unit="pair", unit_scale=True, disable=not show) as bar:
        yield bar.update


__all__ = [
    "RankResult",
    "SearchResult",
    "Snapshot",
    "answer_ids",
    "at_least",
    "check_method",
    "check_numbers",
    "for_each_mention",
]

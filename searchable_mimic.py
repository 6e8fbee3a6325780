"""What any index can be asked, in one piece or in parts: names, links, searches and ranks.

Each question takes one state of the index and is passed on to it. To link means to encode mentions, find entities by
name if asked, and search. Knows nothing of how an index is made, changed or stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from .errors_mimic import MimicError
from .identity_mimic import check_made_by
from .matching_mimic import EntityFeatures, MentionFeatures
from .mentions_mimic import answer_of_error, encoded_mentions, place_in_input
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .snapshot_mimic import RankResult, SearchResult, at_least
from .texts_mimic import is_unicode

# Candidates that are found by a mention's name.
BY_NAME = ("names", "names+search")


class State(Protocol):
    """One state of an index, to which questions are handed over. Its methods answer as those of [`SearchableIndex`] of
    the same names say."""

    @property
    def dtype(self) -> str: ...

    @property
    def made_by(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def __contains__(self, entity_id: object) -> bool: ...

    def records(self) -> Iterator[dict[str, Any]]: ...

    def record(self, entity_id: str) -> dict[str, Any]: ...

    def records_of(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The data of each of some entities; `None` for one that is not there."""

    def features(self, entity_ids: Sequence[str]) -> EntityFeatures: ...

    def find(self, name: str, max_distance: int) -> list[str]: ...

    def find_mentions(self, text: str, lower_case: bool) -> list[tuple[int, int]]: ...

    def check_candidates(self, entity_ids: Sequence[str] | None) -> None:
        """Raises a `ValueError` or `UnknownEntityError` for what cannot be candidates of a mention."""

    def bearers(self, names: Sequence[str]) -> Sequence[Any]:
        """For each name the entities that have it, in any case, as candidates; `None` where there are none."""

    def linked(
        self, mentions: MentionFeatures, top_k: int, candidates: Sequence[Any], **options: Any
    ) -> list[list[dict[str, Any]]]:
        """For each mention its best entities among candidates, which are ids or [`bearers`], or `None` for all."""

    def search(self, mentions: MentionFeatures, top_k: int, **options: Any) -> SearchResult: ...

    def rank(
        self, mentions: MentionFeatures, answers: Sequence[str | None], method: str, show_progress: bool
    ) -> RankResult: ...

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray: ...

    def count_better(
        self,
        mentions: MentionFeatures,
        scores: Sequence[float] | np.ndarray,
        answers: Sequence[str | None],
        method: str,
        show_progress: bool,
    ) -> tuple[np.ndarray, np.ndarray]: ...


class SearchableIndex(ABC):
    """Entities that are found by what mentions mean. `in` and iteration speak of ids."""

    @property
    @abstractmethod
    def state(self) -> State:
        """The entities as they are now: what is asked of it is not disturbed by a change."""

    # --- What it holds

    def __len__(self) -> int:
        """The number of entities."""
        return len(self.state)

    def __contains__(self, entity_id: object) -> bool:
        """Whether there is an entity of that id."""
        return entity_id in self.state

    def __iter__(self) -> Iterator[str]:
        """The ids of the entities."""
        return (record["id"] for record in self.entities())

    def entities(self) -> Iterator[dict[str, Any]]:
        """The entities' own data, as [`entity`] gives it."""
        return self.state.records()

    def entity(self, entity_id: str) -> dict[str, Any]:
        """The data of an entity: `id`, `name`, `description` and the other plain fields that it was built with.

        Raises:
            UnknownEntityError: if there is no such entity.
        """
        return self.state.record(entity_id)

    def features(self, entity_ids: Sequence[str]) -> EntityFeatures:
        """The features of some entities, float32, as they are stored: those of an int8 index are rounded.

        Raises:
            UnknownEntityError: if some are not in the index.
        """
        return self.state.features(entity_ids)

    @property
    def dtype(self) -> str:
        """What the features are stored in: "float32", "float16" or "int8"."""
        return self.state.dtype

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What is noted of the model and processor that made the index."""
        return self.state.made_by

    def check_model(self, model: MimicModel, processor: MimicProcessor | None = None) -> None:
        """Makes sure that a model is the one whose features this index holds, and a processor, where it is given, the
        one that its entities were read with.

        Raises:
            EntityIndexError: if it is another. Says in what it differs.
        """
        check_made_by(self.made_by, model, processor)

    # --- Names

    def find(self, name: str, *, max_distance: int = 2) -> list[str]:
        """The ids of the entities that have a name or alias, in the order of the index.

        If no name is written exactly like this, case and the form of the Unicode are ignored. If there is still none,
        the entities with the nearest names are given.

        Args:
            name: the name.
            max_distance: how many characters the nearest names may differ in; never more than a third of the name's.
                Needs `rapidfuzz`; 0 does without nearest names.

        Raises:
            EntityIndexError: if the index was made without names: see [`EntityIndex.build_names`].
            TypeError: if it is not a string.
            ValueError: if `max_distance` is not an integer of at least 0.
        """
        if not isinstance(name, str):
            raise TypeError(f"A name is a string, got {type(name).__name__}.")
        max_distance = at_least("max_distance", max_distance, 0)
        if not is_unicode(name):
            return []  # no entity's is
        return self.state.find(name, max_distance)

    def find_mentions(self, text: str, *, lower_case: bool = False) -> list[tuple[int, int]]:
        """Where names and aliases of the entities occur in a text: start and end of each place, in characters.

        Names are whole words, in any script. Case and the form of the Unicode do not matter. If several names overlap,
        the longest is taken. Left out is what is too common: a single character, what has no letter, stop words, and a
        single word in lower case if the name is not written so.

        Args:
            text: any text.
            lower_case: whether to take such words in lower case too.

        Raises:
            EntityIndexError: if the index was made without names: see [`EntityIndex.build_names`].
            TypeError: if it is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"A text is a string, got {type(text).__name__}.")
        return self.state.find_mentions(text, lower_case)

    # --- Links

    def link(
        self,
        model: MimicModel,
        processor: MimicProcessor,
        mentions: Iterable[Mapping[str, Any]],
        top_k: int = 5,
        *,
        batch_size: int = 32,
        candidates: Sequence[Sequence[str] | str | None] | str | None = None,
        method: str = "pruned",
        on_image_error: str = "raise",
        on_error: str = "raise",
        context_window: str | None = None,
        show_progress: bool = False,
    ) -> list[Any]:
        """Encodes mentions, and finds the entities that fit each of them best.

        Args:
            model, processor: those that made the index. The mentions are encoded on the model's device.
            mentions: M dicts with `mention`, `text` and maybe `image`. They may have `start` and `end`, the mention's
                place in its text, which the context window "mention" uses.
            top_k: number of entities for each mention.
            batch_size: mentions encoded at a time.
            candidates: for each mention, or for all of them, what it may mean: a list of ids; "names" for the entities
                that have the mention's words as their name or alias, or all if there are none; "names+search" for these
                and those that the search finds among all, at most `top_k` of each; or `None` for all.
            method: as in [`search`].
            on_image_error: "raise", or "warn" to go on without an image that cannot be read.
            on_error: what to do with a mention that cannot be linked. "raise" ends the call with an error that names
                its row and id; "warn" gives an empty list; "return" gives a dict with `error` (the message) and
                `error_type`.
            context_window: "start" or "mention", in place of the configuration's: see [`MimicConfig`].
            show_progress: whether to show a progress bar.

        Returns:
            for each mention its entities, best first: dicts with `entity_id`, `name`, `description`, `score`,
            `text_score`, `image_score` and `cross_modal_score`.

        Raises:
            MentionError: if a mention is not as described.
            ValueError: if an argument is not valid.
            MimicImageError: if an image cannot be read.
            EntityIndexError: if the index is of another model.
        """
        self.check_model(model, processor)
        encoded = encoded_mentions(
            model, processor, mentions, batch_size, on_image_error, show_progress, on_error, context_window
        )
        count = len(encoded.rows) + len(encoded.failed)
        given = _for_each(candidates, count)
        if len(given) != count:
            raise ValueError(f"There are {count} mentions, but candidates for {len(given)}.")
        answers: list[Any] = [encoded.failed.get(row) for row in range(count)]
        state, kept = self.state, []
        for place, row in enumerate(encoded.rows):
            try:
                if not isinstance(given[row], str):
                    state.check_candidates(given[row])
                kept.append(place)
            except (MimicError, ValueError) as error:
                answers[row] = answer_of_error(error, place_in_input(row, None), on_error)
        if kept and encoded.features is not None:
            found = self.link_encoded(
                encoded.features[torch.tensor(kept)],
                top_k,
                candidates=[given[encoded.rows[place]] for place in kept],
                names=[encoded.mentions[place].mention for place in kept],
                method=method,
                show_progress=show_progress,
            )
            for place, entities in zip(kept, found, strict=True):
                answers[encoded.rows[place]] = entities
        return answers

    def link_encoded(
        self,
        mentions: MentionFeatures,
        top_k: int = 5,
        *,
        candidates: Sequence[Sequence[str] | str | None] | str | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> list[list[dict[str, Any]]]:
        """Like [`link`], for mentions that are already encoded.

        Args:
            mentions, top_k, **options: as in [`search`].
            candidates: as in [`link`].
            names: the words of each mention, for candidates that are found by name.

        Raises:
            ValueError: if there are candidates by name and no names.
        """
        state = self.state
        allowed, added = limited_by_name(state, _for_each(candidates, len(mentions)), names)
        linked = state.linked(mentions, top_k, allowed, **options)
        if added:
            rows = torch.tensor(list(added))
            named = state.linked(mentions[rows], top_k, list(added.values()), **options)
            for row, entities in zip(added, named, strict=True):
                both = {found["entity_id"]: found for found in [*entities, *linked[row]]}
                linked[row] = sorted(both.values(), key=lambda found: -found["score"])
        return linked

    # --- Search and ranks

    def search(
        self,
        mentions: MentionFeatures,
        top_k: int = 10,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        method: str = "pruned",
        min_score: float | Sequence[float] | np.ndarray | None = None,
        num_candidates: int | None = None,
        nprobe: int = 32,
        show_progress: bool = False,
    ) -> SearchResult:
        """Finds the entities that fit each mention best. The search is exact, unless a shortlist is used.

        Args:
            mentions ([`MentionFeatures`]): M mentions, from [`MimicModel.encode_mentions`]. The search runs on their
                device.
            top_k: number of entities to find; all, if the knowledge base has fewer.
            candidates: for each mention the ids of the entities that it may mean, or `None` for all.
            method: "pruned" scores only the pairs whose upper bound is high enough, "exhaustive" scores all pairs. Both
                are exact and find the same.
            min_score: the lowest score that an entity may have to be found: one for all mentions, or one for each.
                Entities whose upper bound is lower are pruned.
            num_candidates: how many entities an approximate shortlist gives for each mention; only these are scored.
                Needs `faiss`, and is for knowledge bases of 10^7 entities and more. See [`build_shortlist`].
            nprobe: how many lists of the shortlist's inverted file are searched.
            show_progress: whether to show a progress bar.

        Raises:
            ValueError: if `top_k`, `method` or `num_candidates` is not valid, or the numbers of mentions and candidates
                differ.
            UnknownEntityError: if a candidate is not in the index.
            EntityIndexError: if the index is empty, or has no shortlist.
        """
        return self.state.search(
            mentions,
            top_k,
            candidates=candidates,
            method=method,
            min_score=min_score,
            num_candidates=num_candidates,
            nprobe=nprobe,
            show_progress=show_progress,
        )

    def rank(
        self,
        mentions: MentionFeatures,
        answers: Sequence[str | None],
        *,
        method: str = "pruned",
        show_progress: bool = False,
    ) -> RankResult:
        """The rank of each mention's answer among all entities, without a matrix of scores.

        Args:
            mentions ([`MentionFeatures`]): M mentions.
            answers: the id of each mention's entity, or `None`. If it is not in the index, the rank is NaN.
            method, show_progress: as in [`search`].

        Raises:
            ValueError: if the numbers of mentions and answers differ, an answer is not an id, or `method` is not valid.
            EntityIndexError: if the index is empty.
        """
        return self.state.rank(mentions, answers, method, show_progress)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        """The score of each mention's answer, float32 of shape `(M,)`; NaN where it is not in the index.

        With [`count_better`] it gives ranks in a knowledge base of which this index is a part.

        Args:
            mentions, answers: as in [`rank`].
        """
        return self.state.answer_scores(mentions, answers)

    def count_better(
        self,
        mentions: MentionFeatures,
        scores: Sequence[float] | np.ndarray,
        answers: Sequence[str | None],
        *,
        method: str = "pruned",
        show_progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many entities are better than each mention's answer, and how many as good: int64 of shape `(M,)` each.

        Summed over the parts of a knowledge base, `1 + better + equal / 2` is the rank that [`rank`] gives.

        Args:
            mentions ([`MentionFeatures`]): M mentions.
            scores: of their answers, from [`answer_scores`] of the part that has each.
            answers: their ids; one that is in this index does not count itself.
            method, show_progress: as in [`search`].

        Raises:
            ValueError: if the numbers differ, or `method` is not valid.
            EntityIndexError: if the index is empty.
        """
        return self.state.count_better(mentions, scores, answers, method, show_progress)


def limited_by_name(
    state: State, candidates: Sequence[Any], names: Sequence[str] | None
) -> tuple[list[Any], dict[int, Any]]:
    """The candidates of each mention, those that are found by name among them, or `None` for all; and, by the mention's
    row, the entities of its name that are added to what the search finds.

    Args:
        candidates: of each mention, as of [`SearchableIndex.link`].
        names: what each mention says.

    Raises:
        ValueError: if there are candidates by name and no names.
    """
    allowed: list[Any] = list(candidates)
    added: dict[int, Any] = {}
    by_name = {row: way for row, way in enumerate(allowed) if isinstance(way, str) and way in BY_NAME}
    if not by_name:
        return allowed, added
    if names is None or len(names) != len(allowed):
        way = next(iter(by_name.values()))
        raise ValueError(f'For candidates="{way}" the names must be given: what each mention says.')
    bearers = state.bearers([names[row] for row in by_name])
    for (row, way), found in zip(by_name.items(), bearers, strict=True):
        allowed[row] = found if way == "names" else None
        if way != "names" and found is not None:
            added[row] = found
    return allowed, added


def _for_each(candidates: Any, count: int) -> list[Any]:
    """The candidates of each of so many mentions, where they may be given for all of them."""
    return [candidates] * count if candidates is None or isinstance(candidates, str) else list(candidates)


__all__ = ["BY_NAME", "SearchableIndex", "limited_by_name"]

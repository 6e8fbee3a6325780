"""A knowledge base over several machines: parts of an index, each held by a Ray actor, that answer as one index does.

Needs Ray: `pip install "mimic-el[ray]"`. Parts are indexes of one model, made by builds of their own; each lies where
its actor can open it, in a directory or a Hub repository.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors_mimic import EntityIndexError, UnknownEntityError
from .identity_mimic import same_model
from .index_mimic import EntityIndex
from .matching_mimic import MentionFeatures
from .names_mimic import longest_spans
from .pairs_mimic import TIE, SearchStats, best_order
from .records_mimic import entity_id_of
from .searchable_mimic import SearchableIndex
from .snapshot_mimic import RankResult, SearchResult
from .spans_mimic import fold

_RECORDS_AT_ONCE = 4096
_CLOSED = "This index was closed."
# A part is told from one that only takes long by asking it this often whether it is there.
_ASK_SECONDS = 10.0


class _Part:
    """An actor: one part of the index, opened where the actor runs, and again where it is restarted."""

    def __init__(self, place: str, options: Mapping[str, Any], device: str) -> None:
        self._index = EntityIndex.from_pretrained(place, **options)
        self._device = device

    def there(self) -> bool:
        return True

    def facts(self) -> dict[str, Any]:
        index = self._index
        return {"count": len(index), "dtype": index.dtype, "model": dict(index.made_by)}

    def has(self, entity_ids: Sequence[Any]) -> list[bool]:
        return [entity_id in self._index for entity_id in entity_ids]

    def records(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        return [self._index.entity(name) if name in self._index else None for name in entity_ids]

    def records_from(self, start: int, count: int) -> list[dict[str, Any]]:
        return list(itertools.islice(self._index.entities(), start, start + count))

    def search(self, mentions: MentionFeatures, rows: Sequence[int], **options: Any) -> SearchResult | None:
        """The search of some of the mentions; `None` where there is nothing to search."""
        if not len(self._index) or not len(rows):
            return None
        return self._index.search(mentions[torch.as_tensor(rows)].to(self._device), **options)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        if not len(self._index):
            return np.full(len(answers), np.nan, dtype=np.float32)
        return self._index.answer_scores(mentions.to(self._device), answers)

    def count_better(
        self, mentions: MentionFeatures, rows: Sequence[int], scores: np.ndarray, answers: Sequence[str], method: str
    ) -> np.ndarray:
        if not len(self._index) or not len(rows):
            return np.zeros((2, len(rows)), dtype=np.int64)
        some = mentions[torch.as_tensor(rows)].to(self._device)
        return np.stack(self._index.count_better(some, scores, answers, method=method))

    def find(self, name: str, max_distance: int) -> list[str]:
        return self._index.find(name, max_distance=max_distance)

    def places_of_names(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        return self._index.state.contents.places_of_names(text, lower_case) if len(self._index) else []

    def bearers(self, names: Sequence[str]) -> list[list[str]]:
        state = self._index.state
        return [state.bearer_ids(name) for name in names]

    def change(self, name: str, *args: Any, **kwargs: Any) -> int:
        """Changes the part and gives the number of its entities."""
        getattr(self._index, name)(*args, **kwargs)
        return len(self._index)


class RayEntityIndex(SearchableIndex):
    """An index in parts, each held by a Ray actor; it answers as one [`EntityIndex`] of all parts in their order does.

    The k-th best score that one part has found for a mention is what the others' entities must reach, so they are
    pruned by it. An actor that dies is started again, opens its part again, and the question is asked again; a part
    that stays away is an error that names it, and never a shorter answer.

    Args:
        parts: directories or Hub repositories of stored indexes, of one model and precision.
        patience (`float`, defaults to 300): seconds after which a part is given up whose actor does not answer, or does
            not start: it has to import the libraries, and maybe to download the part.
        max_restarts (`int`, defaults to -1): how often an actor is started again; -1 for always.
        actor_options: options of Ray's actors: `num_cpus`, `num_gpus`, `resources` and others; one mapping for all
            parts, or one for each.
        **options: as of `EntityIndex.from_pretrained` (`revision`, `token`, ...).

    Raises:
        ImportError: if Ray is not installed.
        EntityIndexError: if a part cannot be opened, or parts are of different models or precisions.

    Example:

    ```python
    >>> import ray

    >>> ray.init()
    >>> index = RayEntityIndex(["index/part-0", "index/part-1"])
    >>> linker = pipeline("multimodal-entity-linking", model=path, trust_remote_code=True, index=index)
    ```
    """

    def __init__(
        self,
        parts: Sequence[str | os.PathLike[str]],
        *,
        patience: float = 300.0,
        max_restarts: int = -1,
        actor_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self._ray = _ray()
        if isinstance(parts, str | os.PathLike) or not len(parts):
            raise ValueError("`parts` must be a list of directories or Hub repositories, at least one.")
        self.parts = [os.path.abspath(part) if Path(part).is_dir() else str(part) for part in parts]
        if len(set(self.parts)) < len(self.parts):
            raise EntityIndexError(f"A part is named twice: {', '.join(self.parts)}.")
        own = [dict(actor_options or {})] * len(parts) if not isinstance(actor_options, Sequence) else actor_options
        if len(own) != len(parts):
            raise ValueError(f"There are {len(parts)} parts, but `actor_options` for {len(own)}.")
        self._patience, self._options = patience, options
        actor = self._ray.remote(_Part)
        self._actors = []
        for place, chosen in zip(self.parts, own, strict=True):
            device = "cuda" if chosen.get("num_gpus") else "cpu"
            defaults = {"max_restarts": max_restarts, "max_task_retries": -1, "max_concurrency": 4}
            self._actors.append(actor.options(**{**defaults, **chosen}).remote(place, options, device))
        try:
            facts = self._all("facts")
            _check_facts(self.parts, facts)
        except BaseException:
            self.close()
            raise
        self._counts = [fact["count"] for fact in facts]
        self._facts = facts[0]

    def close(self) -> None:
        """Ends the actors. The parts stay where they are stored."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []

    def __enter__(self) -> RayEntityIndex:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- What it holds

    @property
    def state(self) -> Any:
        """What linking asks of the parts."""
        return _Linking(self)

    def __len__(self) -> int:
        """The number of entities in all parts."""
        return sum(self._counts)

    def __contains__(self, entity_id: object) -> bool:
        """Whether there is an entity of that id."""
        return any(found[0] for found in self._all("has", [entity_id]))

    def __repr__(self) -> str:
        return f"RayEntityIndex({len(self):,} entities, {self.dtype}, {len(self.parts)} parts)"

    @property
    def dtype(self) -> str:
        """What the features are stored in."""
        return self._facts["dtype"]

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What is noted of the model that made the parts."""
        return self._facts["model"]

    def entities(self) -> Iterator[dict[str, Any]]:
        """The entities' own data, part after part."""
        for part in range(len(self._actors)):
            start = 0
            while records := self._one(part, "records_from", start, _RECORDS_AT_ONCE):
                yield from records
                start += len(records)

    def entity(self, entity_id: str) -> dict[str, Any]:
        """The data of an entity.

        Raises:
            UnknownEntityError: if there is no such entity.
        """
        for [record] in self._all("records", [entity_id]):
            if record is not None:
                return record
        raise UnknownEntityError(f"1 of the entities are not in this index of {len(self):,}: {entity_id!r}")

    def find(self, name: str, *, max_distance: int = 2) -> list[str]:
        """The ids of the entities that bear a name or alias, as [`EntityIndex.find`] gives them."""
        for distance in range(max_distance + 1):
            found = [entity_id for part in self._all("find", name, distance) for entity_id in part]
            if found and distance == 0:
                records = {record["id"]: record for part in self._all("records", found) for record in part if record}
                exact = [i for i in found if name in (records[i]["name"], *(records[i].get("aliases") or ()))]
                return exact or found
            if found:
                return found
        return []

    def find_mentions(self, text: str, *, lower_case: bool = False) -> list[tuple[int, int]]:
        """Where names and aliases of the entities occur in a text, as [`EntityIndex.find_mentions`] gives it."""
        places = set(itertools.chain(*self._all("places_of_names", text, lower_case)))
        return longest_spans(fold(text), places)

    # --- Search

    def _linked(
        self, mentions: MentionFeatures, top_k: int, candidates: Sequence[Any], **options: Any
    ) -> list[list[dict[str, Any]]]:
        found, owners = self._search(mentions, top_k, candidates=candidates, **options)
        wanted: list[list[str]] = [[] for _ in self._actors]
        for ids, parts in zip(found.entity_ids, owners, strict=True):
            for entity_id, part in zip(ids, parts, strict=True):
                wanted[part].append(entity_id)
        records: dict[str, dict[str, Any]] = {}
        for part in self._each("records", [([*dict.fromkeys(ids)],) for ids in wanted]):
            records |= {record["id"]: record for record in part if record is not None}
        return found.linked(records)

    def search(self, mentions: MentionFeatures, top_k: int = 10, **options: Any) -> SearchResult:
        """Finds the entities that fit each mention best, exactly.

        Args:
            mentions ([`MentionFeatures`]): M mentions.
            top_k: number of entities wanted.
            **options: `candidates`, `method` and `min_score`, as of [`EntityIndex.search`].

        Raises:
            ValueError, UnknownEntityError: as there.
            EntityIndexError: if there are no entities, or a part stays away; it is named.
        """
        return self._search(mentions, top_k, **options)[0]

    def _search(
        self,
        mentions: MentionFeatures,
        top_k: int,
        *,
        candidates: Sequence[Sequence[str] | None] | None = None,
        method: str = "pruned",
        min_score: Any = None,
        show_progress: bool = False,
    ) -> tuple[SearchResult, list[list[int]]]:
        """What is found, and the part of each entity."""
        if not self._actors:
            raise EntityIndexError(_CLOSED)
        if not len(self):
            raise EntityIndexError("This index has no entities, so there is nothing to search.")
        if candidates is not None and len(candidates) != len(mentions):
            raise ValueError(f"There are {len(mentions)} mentions, but candidates for {len(candidates)}.")
        count, parts = len(mentions), len(self._actors)
        shared = self._ray.put(mentions.to("cpu"))
        allowed = self._candidates_of_parts(candidates, count)
        floor = np.broadcast_to(np.float32(-np.inf if min_score is None else min_score), (count,)).copy()
        merged = _Merged(count, top_k)

        def ask(rows_of: Callable[[int], list[int]]) -> None:
            asked = [rows_of(part) for part in range(parts)]
            results = self._each(
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
        return merged.result()

    def _candidates_of_parts(
        self, candidates: Sequence[Sequence[str] | None] | None, count: int
    ) -> list[list[list[str] | None]] | None:
        """For each part and mention the candidates that are in the part."""
        if candidates is None:
            return None
        for ids in candidates:
            if isinstance(ids, str):
                raise ValueError(
                    f"Candidates must be a list of entity ids for each mention, got the string {ids!r}. Of names, "
                    "`find` gives the ids."
                )
        every = list(dict.fromkeys(itertools.chain.from_iterable(ids for ids in candidates if ids is not None)))
        known = [{i for i, there in zip(every, has, strict=True) if there} for has in self._all("has", every)]
        if missing := [i for i in every if not any(i in part for part in known)]:
            shown = ", ".join(repr(name) for name in missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise UnknownEntityError(f"{len(missing)} of the entities are not in this index of {len(self):,}: {shown}")
        return [[None if ids is None else [i for i in ids if i in part] for ids in candidates] for part in known]

    def rank(
        self,
        mentions: MentionFeatures,
        answers: Sequence[str | None],
        *,
        method: str = "pruned",
        show_progress: bool = False,
    ) -> RankResult:
        """The rank of each mention's answer among the entities of all parts, as [`EntityIndex.rank`] gives it."""
        if len(answers) != len(mentions):
            raise ValueError(f"There are {len(mentions)} mentions, but answers for {len(answers)}.")
        shared = self._ray.put(mentions.to("cpu"))
        scores = np.stack(self._all("answer_scores", shared, list(answers)))
        known = np.flatnonzero(~np.isnan(scores).all(axis=0))
        ranks = np.full(len(answers), np.nan)
        stats = SearchStats(pairs=len(known) * len(self))
        if len(known):
            gold = np.nanmax(scores[:, known], axis=0)
            counts = self._all(
                "count_better", shared, known.tolist(), gold, [answers[row] for row in known.tolist()], method
            )
            above, equal = np.sum(counts, axis=0)
            ranks[known] = 1 + above + equal / 2
        return RankResult(ranks, stats)

    # --- Change

    def add(self, model: Any, processor: Any, entities: Iterable[Mapping[str, Any]], **options: Any) -> None:
        """Adds entities, to the part that has the fewest. All are added, or none; arguments as of [`EntityIndex.add`].

        Raises:
            ValueError: if an id is already there, in whatever part, or twice among the new ones.
        """
        self.check_model(model, processor)
        entities = list(entities)
        ids = [entity_id_of(entity["id"]) for entity in entities]
        if not ids:
            return
        there = np.any(self._all("has", ids), axis=0)
        if there.any():
            raise ValueError(f"The id {ids[int(there.argmax())]!r} is already in the index.")
        part = int(np.argmin(self._counts))
        self._change(part, "add", lambda: all(self._has(part, ids)), model, processor, entities, **options)

    def update(self, model: Any, processor: Any, entities: Iterable[Mapping[str, Any]], **options: Any) -> None:
        """Replaces entities that are there by new versions of them, each in the part that it is in.

        Arguments as of [`EntityIndex.update`]. What is wrong with an id is told before anything is changed; a part is
        changed as a whole or not at all.

        Raises:
            UnknownEntityError: if an id is not there.
            ValueError: if an id is twice among the new ones.
        """
        self.check_model(model, processor)
        entities = list(entities)
        ids = [entity_id_of(entity["id"]) for entity in entities]
        if twice := [entity_id for entity_id, count in collections.Counter(ids).items() if count > 1]:
            raise ValueError(f"The id {twice[0]!r} is there twice: each must be unique.")
        for part, own in enumerate(self._parts_of(ids)):
            if own:
                some = [entity for entity, entity_id in zip(entities, ids, strict=True) if entity_id in own]
                # To make it once more changes nothing.
                self._change(part, "update", None, model, processor, some, **options)

    def remove(self, entity_ids: Iterable[str]) -> None:
        """Removes entities, whatever part they are in.

        Raises:
            UnknownEntityError: if an id is not there; then none is removed.
        """
        if isinstance(entity_ids, str):
            raise ValueError(f"`remove` takes a list of entity ids, got the string {entity_ids!r}.")
        for part, own in enumerate(self._parts_of(list(dict.fromkeys(entity_ids)))):
            if own:
                some = list(own)
                self._change(part, "remove", functools.partial(self._has_none, part, some), some)

    def _has(self, part: int, ids: Sequence[str]) -> list[bool]:
        return self._one(part, "has", ids)

    def _has_none(self, part: int, ids: Sequence[str]) -> bool:
        return not any(self._has(part, ids))

    def _parts_of(self, ids: Sequence[str]) -> list[dict[str, None]]:
        """For each part those of some entities that are in it, in their order.

        Raises:
            UnknownEntityError: if one is in none.
        """
        has = self._all("has", ids)
        if missing := [entity_id for place, entity_id in enumerate(ids) if not any(own[place] for own in has)]:
            raise UnknownEntityError(
                f"{len(missing)} of the entities are not in this index of {len(self):,}: {missing[0]!r}"
            )
        return [{entity_id: None for entity_id, there in zip(ids, own, strict=True) if there} for own in has]

    def _change(self, part: int, name: str, made: Callable[[], bool] | None, *args: Any, **kwargs: Any) -> None:
        """Makes a change of one part once: where its actor dies, it is seen whether the change was made before.

        Args:
            made: tells that; `None` for a change that may be made twice.
        """
        for last in (False, True):
            method = self._actors[part].change.options(max_task_retries=0)
            try:
                self._counts[part] = self._get(
                    part, functools.partial(method.remote, name, *args, **kwargs), retry=False
                )
                return
            except _PartGoneError as error:
                facts = self._one(part, "facts")  # once it is there again
                if made is not None and made():
                    self._counts[part] = facts["count"]
                    return
                if last:
                    raise EntityIndexError(str(error)) from error

    # --- Save

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Joins the parts to one index in a directory, without encoding anything again; removed entities are left out.

        Files are linked where the file system can, else copied. The parts stay as they are.

        Args:
            save_directory: the directory; an index that is there is replaced, once this one is complete.
            push_to_hub: whether to upload it too; `repo_id` defaults to the directory's name.
            **kwargs: arguments of [`EntityIndex.push_to_hub`].

        Raises:
            EntityIndexError: if a part cannot be read from this machine, or no entity is left.
        """
        if not len(self):
            raise EntityIndexError("All entities of this index were removed: there is nothing to save.")
        directories = []
        for place in self.parts:
            try:
                opened = EntityIndex.from_pretrained(place, **self._options).directory
            except (OSError, ValueError, EntityIndexError) as error:
                raise EntityIndexError(
                    f"The part {place} cannot be read from this machine: {error} To save the index, put its parts "
                    "where this machine can read them, or on the Hub; or call EntityIndex.merge on one that can."
                ) from error
            assert opened is not None
            directories.append(opened)
        merged = EntityIndex.merge(directories, save_directory, overwrite=True)
        if merged.state.contents.store.removed.any():
            merged.compact()
        if push_to_hub:
            merged.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    # --- Asking the actors

    def _one(self, part: int, name: str, *args: Any) -> Any:
        return self._get(part, lambda: getattr(self._actors[part], name).remote(*args))

    def _all(self, name: str, *args: Any) -> list[Any]:
        """What every part answers to the same question."""
        return self._each(name, [args] * len(self._actors))

    def _each(
        self, name: str, args: Sequence[tuple | None], kwargs: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Any]:
        """What every part answers to its own question; `None` of one that is asked none."""
        if not self._actors:
            raise EntityIndexError(_CLOSED)
        options = kwargs or [{}] * len(args)
        asks = [
            None if own is None else functools.partial(getattr(actor, name).remote, *own, **named)
            for actor, own, named in zip(self._actors, args, options, strict=True)
        ]
        asked = [None if ask is None else ask() for ask in asks]
        answers: list[Any] = []
        faults: list[Exception] = []
        for part, (ask, ref) in enumerate(zip(asks, asked, strict=True)):
            try:
                answers.append(None if ask is None else self._get(part, ask, ref))
            except Exception as error:  # the others are waited for: Ray tells of answers that nobody takes
                faults.append(error)
        if faults:
            raise faults[0]
        return answers

    def _get(self, part: int, ask: Callable[[], Any], ref: Any = None, *, retry: bool = True) -> Any:
        """The answer of a part, however long its work takes as long as its actor is there.

        Raises:
            EntityIndexError: naming the part, if it stays away.
        """
        ray, end = self._ray, time.monotonic() + self._patience
        ref = ask() if ref is None else ref
        while True:
            try:
                return ray.get(ref, timeout=min(_ASK_SECONDS, self._patience))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.GetTimeoutError as error:
                if self._is_there(part):
                    end = time.monotonic() + self._patience
                elif time.monotonic() >= end:
                    raise _PartGoneError(self._gone(part, "it does not answer")) from error
            except ray.exceptions.RayError as error:
                if not retry or time.monotonic() >= end or not self._comes_back(part, end):
                    raise _PartGoneError(self._gone(part, _reason(error))) from error
                ref = ask()

    def _is_there(self, part: int) -> bool:
        try:
            return self._ray.get(self._actors[part].there.remote(), timeout=min(_ASK_SECONDS, self._patience))
        except self._ray.exceptions.RayError:
            return False

    def _comes_back(self, part: int, end: float) -> bool:
        """Whether an actor answers before a time."""
        while time.monotonic() < end:
            try:
                return self._ray.get(self._actors[part].there.remote(), timeout=max(0.1, end - time.monotonic()))
            except self._ray.exceptions.ActorDiedError:
                return False  # for good
            except self._ray.exceptions.RayError:
                time.sleep(0.2)
        return False

    def _gone(self, part: int, why: str) -> str:
        return (
            f"The part {self.parts[part]} ({part + 1} of {len(self.parts)}) cannot be reached: {why}. No answer is "
            "given without it."
        )


def _check_facts(places: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> None:
    """Refuses parts that cannot be one index."""
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


class _PartGoneError(EntityIndexError):
    """A part that stays away."""


class _Linking:
    """The parts of an index, as linking asks them."""

    def __init__(self, index: RayEntityIndex) -> None:
        self._index = index

    def check_candidates(self, entity_ids: Sequence[str] | None) -> None:
        self._index._candidates_of_parts([entity_ids], 1)

    def bearers(self, names: Sequence[str]) -> list[list[str] | None]:
        parts = self._index._all("bearers", list(names))
        return [list(itertools.chain(*found)) or None for found in zip(*parts, strict=True)]

    def linked(self, *args: Any, **options: Any) -> list[list[dict[str, Any]]]:
        return self._index._linked(*args, **options)


class _Merged:
    """The best entities of several parts, for each of M mentions."""

    def __init__(self, count: int, top_k: int) -> None:
        self._found: list[list[tuple[float, int, int, str, tuple[float, ...]]]] = [[] for _ in range(count)]
        self._top_k = top_k
        self._stats = SearchStats()

    def add(self, part: int, rows: Sequence[int], result: SearchResult) -> None:
        units = np.stack([result.text_scores, result.image_scores, result.cross_modal_scores], axis=-1)
        for place, row in enumerate(rows):
            for rank, entity_id in enumerate(result.entity_ids[place]):
                score = float(result.scores[place, rank])
                self._found[row].append((score, part, rank, entity_id, tuple(units[place, rank].tolist())))
        for name in ("pairs", "image_pairs", "hull_pairs", "exact_pairs"):
            setattr(self._stats, name, getattr(self._stats, name) + getattr(result.stats, name))

    def kth_scores(self) -> np.ndarray:
        """Of each mention the k-th best score so far; -inf where fewer are found."""
        best = [sorted((item[0] for item in found), reverse=True)[: self._top_k] for found in self._found]
        return np.array([item[-1] if len(item) == self._top_k else -np.inf for item in best], dtype=np.float32)

    def result(self) -> tuple[SearchResult, list[list[int]]]:
        """What is found, and the part of each entity; equal scores in the order of parts, and of each part's own."""
        most = max((len(found) for found in self._found), default=0)
        totals = torch.full((len(self._found), most), -torch.inf)
        rows = torch.full((len(self._found), most), torch.iinfo(torch.long).max)
        for row, found in enumerate(self._found):
            totals[row, : len(found)] = torch.tensor([item[0] for item in found])
            rows[row, : len(found)] = torch.tensor([item[1] * 2**40 + item[2] for item in found], dtype=torch.long)
        order = best_order(totals, rows)[:, : self._top_k].tolist() if most else [[] for _ in self._found]
        scores = np.full((4, len(self._found), min(self._top_k, most)), np.nan, dtype=np.float32)
        ids: list[list[str]] = []
        owners: list[list[int]] = []
        for row, (found, places) in enumerate(zip(self._found, order, strict=True)):
            best = [found[place] for place in places if place < len(found)]
            ids.append([item[3] for item in best])
            owners.append([item[1] for item in best])
            for place, item in enumerate(best):
                scores[:, row, place] = (item[0], *item[4])
        total, text, image, cross_modal = scores
        return SearchResult(ids, total, text, image, cross_modal, self._stats), owners


def _reason(error: Exception) -> str:
    """The first line of what Ray says, or of what kept the actor from starting."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error: " in line]
    return (telling or lines or [type(error).__name__])[-1 if telling else 0].rstrip(".")


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError('RayEntityIndex needs Ray: pip install "mimic-el[ray]".') from error
    if not ray.is_initialized():
        ray.init()
    return ray


__all__ = ["RayEntityIndex"]

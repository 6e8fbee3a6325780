"""`RayEntityIndex`: an index in parts, as its user sees it: opened, changed, saved and closed."""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..building_mimic import Builder
from ..errors_mimic import EntityIndexError
from ..files_mimic import is_there
from ..identity_mimic import same_model
from ..index_mimic import EntityIndex
from ..modeling_mimic import MimicModel
from ..processing_mimic import MimicProcessor
from ..records_mimic import table_record
from ..saving_mimic import directory_of
from ..searchable_mimic import SearchableIndex
from ..snapshot_mimic import at_least
from .actors import Actors
from .state import PartedState

_RECORDS_AT_ONCE = 4096
_HASHES_AT_ONCE = 2**22


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
        EntityIndexError: if a part cannot be opened, parts are of different models or precisions, or two have an
            entity of the same id.
        ValueError: if an argument is not valid.

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
        self.parts = _checked_parts(parts)
        own = _options_of_parts(actor_options, len(self.parts))
        if isinstance(patience, bool) or not isinstance(patience, int | float) or not 0 < patience < math.inf:
            raise ValueError(f"`patience` must be a number of seconds above 0, got {patience!r}.")
        max_restarts = at_least("max_restarts", max_restarts, -1)
        self._options = options
        self._actors = Actors(self.parts, own, options, patience=float(patience), max_restarts=max_restarts)
        try:
            facts = self._actors.all("facts")
            _check_facts(self.parts, facts)
            self._actors.expect(facts[0])
            _check_ids(self._actors, sum(fact["count"] for fact in facts))
        except BaseException:
            self.close()
            raise
        self._state = PartedState(self._actors, facts)

    def close(self) -> None:
        """Ends the actors. The parts stay where they are stored."""
        self._actors.close()

    def __enter__(self) -> RayEntityIndex:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RayEntityIndex({len(self):,} entities, {self.dtype}, {len(self.parts)} parts)"

    @property
    def state(self) -> PartedState:
        """The parts, as they are when they are asked."""
        return self._state

    # --- Change

    def add(self, model: Any, processor: Any, entities: Iterable[Mapping[str, Any]], **options: Any) -> None:
        """Adds entities, to the part that has the fewest. All are added, or none; arguments as of [`EntityIndex.add`].

        Raises:
            ValueError: if an id is already there, in whatever part, or twice among the new ones.
        """
        self.check_model(model, processor)
        entities, ids = self._read(model, processor, entities, options)
        if not ids:
            return
        there = np.any(self._actors.all("has", ids), axis=0)
        if there.any():
            raise ValueError(f"The id {ids[int(there.argmax())]!r} is already in the index.")
        part = int(np.argmin(self._state.counts))
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
        entities, ids = self._read(model, processor, entities, options)
        if twice := [entity_id for entity_id, count in collections.Counter(ids).items() if count > 1]:
            raise ValueError(f"The id {twice[0]!r} is there twice: each must be unique.")
        for part, own in enumerate(self._state.parts_of(ids)):
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
        for part, own in enumerate(self._state.parts_of(list(entity_ids))):
            if own:
                some = list(own)
                self._change(part, "remove", functools.partial(self._has_none, part, some), some)

    def _read(
        self, model: MimicModel, processor: MimicProcessor, entities: Any, options: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Entities of any source as plain records, each checked, and their ids. As a part gets a list, whose images it
        would read from anywhere, they are told here where these may be read from."""
        source = Builder(model, processor, self.dtype, **options).records(entities)
        records: list[dict[str, Any]] = []
        while len(some := source.take(_RECORDS_AT_ONCE)):
            records += [some[row] for row in range(len(some))]
        return records, [table_record(record)["id"] for record in records]

    def _has(self, part: int, ids: Sequence[str]) -> list[bool]:
        return self._actors.one(part, "has", ids)

    def _has_none(self, part: int, ids: Sequence[str]) -> bool:
        return not any(self._has(part, ids))

    def _change(self, part: int, name: str, made: Callable[[], bool] | None, *args: Any, **kwargs: Any) -> None:
        """Makes a change of one part once; `made` as of [`Actors.changed`]."""
        self._state.counts[part] = self._actors.changed(part, made, name, *args, **kwargs)

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


def _checked_parts(parts: Any) -> list[str]:
    """Where each part is: the absolute path of a directory, or a Hub id."""
    if isinstance(parts, str | bytes | os.PathLike) or not isinstance(parts, Iterable) or not (listed := list(parts)):
        raise ValueError("`parts` must be a list of directories or Hub repositories, at least one.")
    places, seen = [], set()
    for part in listed:
        if not isinstance(part, str | os.PathLike):
            raise ValueError(f"A part is a directory or a Hub repository, got {part!r:.80}.")
        place = os.fspath(directory_of(part, "A part"))
        places.append(os.path.abspath(place) if is_there(place) else place)
        seen.add(os.path.realpath(place) if is_there(place) else place)
    if len(seen) < len(places):
        raise EntityIndexError(f"A part is named twice: {', '.join(places)}.")
    return places


def _options_of_parts(options: Any, parts: int) -> list[dict[str, Any]]:
    """Options of each part's actor, of one mapping for all, or of one for each."""
    each = [options or {}] * parts if options is None or isinstance(options, Mapping) else options
    if not isinstance(each, Sequence) or not all(isinstance(own, Mapping) for own in each):
        raise ValueError(f"`actor_options` must be a mapping, or a list with one for each part, got {options!r:.80}.")
    if len(each) != parts:
        raise ValueError(f"There are {parts} parts, but `actor_options` for {len(each)}.")
    return [dict(own) for own in each]


def _check_ids(actors: Actors, entities: int) -> None:
    """Refuses an id that two parts have: in ranges of hashes, so that some million are here at a time."""
    ranges = -(-entities // _HASHES_AT_ONCE) if len(actors) > 1 else 0
    for number in range(ranges):
        hashes, counts = np.unique(np.concatenate(actors.all("id_hashes", number, ranges)), return_counts=True)
        if not len(doubtful := hashes[counts > 1]):
            continue
        owner: dict[str, int] = {}
        for part, ids in enumerate(actors.all("ids_of_hashes", doubtful)):
            for entity_id in ids:
                if owner.setdefault(entity_id, part) != part:
                    raise EntityIndexError(
                        f"The parts {actors.places[owner[entity_id]]} and {actors.places[part]} both have the entity "
                        f"{entity_id!r}: ids must be unique. Remove it from one of them."
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


__all__ = ["RayEntityIndex"]

"""`RayEntityIndex`, an index in parts as its user sees it: opened, changed, saved and closed."""

from __future__ import annotations

import collections
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..building_mimic import Builder
from ..contents_mimic import known_form
from ..errors_mimic import EntityIndexError
from ..files_mimic import is_there
from ..index_mimic import EntityIndex
from ..modeling_mimic import MimicModel
from ..processing_mimic import MimicProcessor
from ..records_mimic import table_record
from ..saving_mimic import directory_of
from ..searchable_mimic import SearchableIndex
from ..snapshot_mimic import at_least
from .actors import Actors, Moment
from .state import PartedState

_RECORDS_AT_ONCE = 4096


class RayEntityIndex(SearchableIndex):
    """An index in parts, each held by a Ray actor; it answers as one [`EntityIndex`] of all parts in their order does.

    The k-th best score that one part has found for a mention is what the others' entities must reach, so they are
    pruned by it. An actor that dies is started again, opens its part again, and the question is asked again; a part
    that stays away is an error that names it, and never a shorter answer.

    Each question is answered from one state of every part. What other processes write where a part is stored is not
    seen until the part is changed here, or its actor is started again; from then on the new state is what is asked.

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
        ValueError, TypeError: if an argument is not valid.

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
        inspect.signature(EntityIndex.from_pretrained).bind("", **options)  # before an actor is started for it
        self._options = options
        self._actors = Actors(self.parts, own, options, patience=float(patience), max_restarts=max_restarts)
        try:
            self._state = PartedState(self._actors)
        except BaseException:
            self.close()
            raise

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

        def add(moment: Moment) -> None:
            moment.all("newest")
            there = np.any(moment.all("has", ids), axis=0)
            if there.any():
                raise ValueError(f"The id {ids[int(there.argmax())]!r} is already in the index.")
            part = int(np.argmin(moment.counts))
            made = functools.partial(self._all_are_there, part, ids)
            self._state.note(part, moment.changed(part, made, "add", model, processor, entities, **options))

        self._state.at_one_moment(add)

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
        by_id = dict(zip(ids, entities, strict=True))

        def update(part: int, own: list[str], moment: Moment) -> Mapping[str, Any]:
            # To make it once more changes nothing.
            return moment.changed(part, None, "update", model, processor, [by_id[i] for i in own], **options)

        self._change_each(ids, update)

    def remove(self, entity_ids: Iterable[str]) -> None:
        """Removes entities, whatever part they are in.

        Raises:
            UnknownEntityError: if an id is not there; then none is removed.
        """
        if isinstance(entity_ids, str):
            raise ValueError(f"`remove` takes a list of entity ids, got the string {entity_ids!r}.")

        def remove(part: int, own: list[str], moment: Moment) -> Mapping[str, Any]:
            return moment.changed(part, functools.partial(self._none_is_there, part, own), "remove", own)

        self._change_each(list(entity_ids), remove)

    def _change_each(
        self, entity_ids: Sequence[Any], change: Callable[[int, list[str], Moment], Mapping[str, Any]]
    ) -> None:
        """Has each part changed that has some of the entities, once.

        Args:
            change: of a part, of the entities that are in it, at some moment; gives the part's facts afterwards.

        Raises:
            UnknownEntityError: if an id is not there; before anything is changed.
        """
        left = list(entity_ids)

        def work(moment: Moment) -> None:
            moment.all("newest")
            for part, own in enumerate(self._state.parts_of(moment, left)):
                if own:
                    self._state.note(part, change(part, list(own), moment))
                    left[:] = [entity_id for entity_id in left if known_form(entity_id) not in own]

        self._state.at_one_moment(work)

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

    def _all_are_there(self, part: int, ids: Sequence[str]) -> bool:
        return all(self._actors.one(part, "has", ids))

    def _none_is_there(self, part: int, ids: Sequence[str]) -> bool:
        return not any(self._actors.one(part, "has", ids))

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


__all__ = ["RayEntityIndex"]

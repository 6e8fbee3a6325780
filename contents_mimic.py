"""What an index holds at one moment, and the changes that lead to the next.

Contents never change: a change makes new ones. So a search is not disturbed by a change in another thread. Knows
records, shards and files, but not how they are searched.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .building_mimic import Builder, ImagesRead
from .directory_mimic import (
    Manifest,
    locked_for_change,
    names_path,
    new_shard_name,
    publish,
    shard_size,
    verify_files,
)
from .errors_mimic import EntityIndexError, UnknownEntityError
from .matching_mimic import Matcher
from .names_mimic import NameTable, OtherRulesError
from .precision_mimic import whose
from .records_mimic import entity_id_of
from .soundness_mimic import impossible_feature
from .spans_mimic import fold
from .store_mimic import Shard, Store, join_shards, read_shard, write_shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """One state of an index.

    Args:
        manifest: what made it, and its list of files.
        store: its rows, removed ones too.
        directory: where it is stored; `None` in memory.
        read_only: whether it lies in the Hub's cache, which must not be changed.
    """

    manifest: Manifest
    store: Store
    directory: Path | None = None
    read_only: bool = False

    def __len__(self) -> int:
        """The number of entities."""
        return len(self.store) - self.store.removed_count

    def row(self, entity_id: object) -> int | None:
        """The row of an entity, `None` where there is none of that id."""
        known = known_form(entity_id)
        return None if known is None else self.store.row(known)

    def rows(self, entity_ids: Iterable[Any]) -> list[int]:
        """The rows of entities.

        Raises:
            UnknownEntityError: if some are not there.
        """
        found = [(entity_id, self.row(entity_id)) for entity_id in entity_ids]
        if missing := [entity_id for entity_id, row in found if row is None]:
            raise unknown_entities(missing, len(self))
        return [row for _, row in found if row is not None]

    def candidate_rows(self, entity_ids: Sequence[str] | None) -> Tensor | None:
        """The rows of a mention's candidates in order, int64; `None` for all.

        Raises:
            ValueError: if they are a string.
            UnknownEntityError: if some are not there.
        """
        if entity_ids is None or isinstance(entity_ids, Tensor):  # rows already
            return entity_ids
        return torch.tensor(sorted(set(self.rows(listed_candidates(entity_ids)))), dtype=torch.long)

    def verify(self, matcher: Matcher) -> None:
        """Compares what is stored with its checksums, and looks whether every entity is whole, with features that the
        matcher may have made.

        Raises:
            EntityIndexError: if something is wrong. Says what, and which entity's.
        """
        if self.directory is not None:
            verify_files(self.directory, self.manifest)
            path = names_path(self.directory, self.manifest)
            # A table of other rules is as it was written, and is made anew by the next change.
            stored = None if path is None else self._stored_names(path)
            if stored is not None and not stored.holds(self._made_names()):
                raise EntityIndexError(
                    f"The index file {path} does not hold the names that the index's tables give: one of them was "
                    "changed or damaged. Restore it, or call build_names() to make it again."
                )
        self.store.check()
        for shard, start in zip(self.store.shards, self.store.starts, strict=False):
            removed = self.store.removed[start : start + len(shard)]
            if found := impossible_feature(matcher, shard.tensors, ~removed):
                name, rows = found
                wrong = whose(rows, list(shard.ids()))
                raise EntityIndexError(
                    f"The features `{name}` of {wrong} cannot come from the model of this index: they were changed "
                    "or damaged before they were stored. Build the index again, or remove what is named."
                )

    # --- Names

    @functools.cached_property
    def names(self) -> NameTable | None:
        """The names of the entities of all rows; `None` for a stored index that was made without."""
        if self.directory is not None:
            path = names_path(self.directory, self.manifest)
            if path is None:
                return None
            if path.exists() and (stored := self._stored_names(path)) is not None:
                return stored
        # In memory; or another process has replaced the file since this state was opened; or it is of other rules.
        return self._made_names()

    def _made_names(self) -> NameTable:
        return NameTable.of(record for shard in self.store.shards for record in shard.table)

    def _stored_names(self, path: Path) -> NameTable | None:
        """The stored names; `None`, and a warning, where they are of another version's rules."""
        try:
            names, shards = NameTable.load(path, len(self.store))
        except OtherRulesError as error:
            logger.warning(
                "%s Until then they are made each time that the index is opened and names are needed.", error
            )
            return None
        if shards != [shard.name for shard in self.store.shards]:
            raise EntityIndexError(
                f"The index file {path} holds names of other shards, or of the same in another order: it or the list "
                "of shards was changed or damaged. Restore the index, or build it again."
            )
        return names

    def _known_names(self) -> tuple[NameTable, np.ndarray | None]:
        """The names, and for each row whether its entity was removed, where some were.

        Raises:
            EntityIndexError: if the index was made without names.
        """
        if self.names is None:
            raise EntityIndexError(
                f"The index {self.directory} was made by a version that did not store names, so they cannot be looked "
                "for. Call index.build_names() once."
            )
        return self.names, self.store.removed.numpy() if self.store.removed_count else None

    def rows_named(self, name: str, max_distance: int = 0) -> list[int]:
        """The rows of the entities that have a name: as it is written, else in any case, else nearly.

        Args:
            name: a name or an alias.
            max_distance: edits by which a name may differ.
        """
        names, removed = self._known_names()
        exact, folded = names.rows_of(name, removed)
        if exact or folded or max_distance < 1:
            return exact or folded
        return names.nearest(name, max_distance, removed)

    def spans_of_names(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        """Where names occur in a text: see [`NameTable`]."""
        names, removed = self._known_names()
        return names.spans_in(text, removed, lower_case)

    def places_of_names(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        """Where names occur in the folded form of a text, of which some may overlap."""
        names, removed = self._known_names()
        return names.places_in(text, fold(text), removed, lower_case)

    def bearers(self, name: str) -> Tensor | None:
        """The rows of the entities that have a name, in any case, in order; `None` where there are none."""
        names, removed = self._known_names()
        rows = names.rows_of(name, removed)[1]
        return torch.tensor(sorted(rows), dtype=torch.long) if rows else None

    # --- Changes

    def with_entities(self, builder: Builder, entities: Any, replace: bool) -> Contents:
        """With new entities, or with new versions of those that are there.

        Raises:
            ValueError: if an id is already there, or twice among the new ones.
            UnknownEntityError: if an id is to be replaced and is not there.
            EntityIndexError: if another process is changing the index.
        """
        with self._changing():
            new: list[_Entry] = []
            removed = self.store.removed.clone()

            def written(shard: Shard, _: ImagesRead) -> Shard:
                # At once, so that memory stays bounded; the index knows of them only when all are there.
                new.append(self._written(shard))
                return new[-1][0]

            for shard in builder.shards(builder.records(entities), written, added_to=self.store, replace=replace):
                if replace:
                    removed[self.rows(record["id"] for record in shard.table)] = True
            if not new:
                return self
            removed = torch.cat([removed, torch.zeros(sum(len(s) for s, _ in new), dtype=torch.bool)])
            return self._next(self._few([*self._entries(), *new]), removed)

    def without(self, entity_ids: Iterable[str]) -> Contents:
        """Without some entities, whose rows stay until the index is compacted.

        Raises:
            UnknownEntityError: if an id is not there.
            EntityIndexError: if another process is changing the index.
        """
        if isinstance(entity_ids, str):
            raise ValueError(f"`remove` takes a list of entity ids, got the string {entity_ids!r}.")
        with self._changing():
            removed = self.store.removed.clone()
            removed[self.rows(entity_ids)] = True
            return self._next(self._entries(), removed)

    def compacted(self) -> Contents:
        """Without the rows of removed entities, in as few shards as a new index has.

        Raises:
            EntityIndexError: if no entity is left, or another process is changing the index.
        """
        with self._changing():
            if not len(self):
                raise EntityIndexError("All entities of this index were removed; build a new one instead.")
            shards = self.store.compacted(shard_size, new_shard_name)
            return self._next([self._written(shard) for shard in shards], None)

    def with_names(self) -> Contents:
        """With the names of its entities, made anew from its tables.

        Raises:
            EntityIndexError: if another process is changing the index.
        """
        if self.directory is not None and not self.read_only:
            with self._changing():
                manifest = dict(self.manifest)
                publish(self.directory, manifest, self.store, names_anew=True)
            return dataclasses.replace(self, manifest=manifest)
        if self.names is None:  # in the Hub's cache, which must not be changed: in memory
            made = dataclasses.replace(self)
            made.__dict__["names"] = self._made_names()
            return made
        return self

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the index for one change: nobody else may change it, nor may it have changed since it was opened."""
        if self.directory is None:
            yield
            return
        if self.read_only:
            raise EntityIndexError(
                f"This index lies in the Hub's cache ({self.directory}), which must not be changed. Save it to a "
                "directory with save_pretrained and open it from there."
            )
        with locked_for_change(self.directory, self.manifest):
            yield

    def _entries(self) -> list[_Entry]:
        entries = self.manifest.get("shards", [None] * len(self.store.shards))
        return list(zip(self.store.shards, entries, strict=True))

    def _few(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """The same rows, with the last shards joined where they are small.

        As in counting: a shard is joined with those after it once these hold as many entities. So of n calls of `add`
        some log2(n) small shards are left, and an entity is written that often.
        """
        first, size = len(entries) - 1, len(entries[-1][0])
        while first and len(entries[first - 1][0]) <= min(size, shard_size(0) - size):
            first -= 1
            size += len(entries[first][0])
        if first == len(entries) - 1:
            return list(entries)
        joined = join_shards(new_shard_name(first), [shard for shard, _ in entries[first:]])
        return [*entries[:first], self._written(joined)]

    def _written(self, shard: Shard) -> _Entry:
        if self.directory is None:
            return shard, None
        entry = write_shard(self.directory, shard)
        return read_shard(self.directory, entry), entry

    def _next(self, entries: Sequence[_Entry], removed: Tensor | None) -> Contents:
        """The state of these shards and removed rows, made real where the index is stored."""
        store = Store([shard for shard, _ in entries], removed)
        manifest = {**self.manifest, "generation": self.manifest["generation"] + 1, "removed": None}
        if self.directory is not None:
            manifest["shards"] = [entry for _, entry in entries]
            publish(self.directory, manifest, store)
        return dataclasses.replace(self, manifest=manifest, store=store)


# --- Ids from outside


def known_form(entity_id: object) -> str | None:
    """An id as an index has it; `None` for what cannot be an entity's."""
    try:
        known = entity_id_of(entity_id)
        known.encode()
    except ValueError:  # no id at all, or no valid text
        return None
    return known


def listed_candidates(entity_ids: Any) -> list[Any]:
    """A mention's candidates as a list.

    Raises:
        ValueError: if they are a string, or nothing that holds ids.
    """
    if isinstance(entity_ids, str):
        raise ValueError(
            f"Candidates must be a list of entity ids for each mention, got the string {entity_ids!r}. Of names, "
            "`find` gives the ids."
        )
    if not isinstance(entity_ids, Iterable):
        raise ValueError(f"`candidates` of a mention must be a list of entity ids, got {type(entity_ids).__name__}.")
    return list(entity_ids)


def unknown_entities(missing: Sequence[object], count: int) -> UnknownEntityError:
    """The error of ids that are not in an index of so many entities."""
    shown = ", ".join(repr(name) for name in missing[:5]) + (" ..." if len(missing) > 5 else "")
    return UnknownEntityError(f"{len(missing)} of the entities are not in this index of {count:,}: {shown}")


# A shard and its entry of the manifest; without one in memory.
_Entry = tuple[Shard, dict[str, Any] | None]

__all__ = ["Contents", "known_form", "listed_candidates", "unknown_entities"]

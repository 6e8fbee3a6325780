"""The entities that mentions are linked to, found by id or by number. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets

from ..errors_mimic import UnknownEntityError
from ..image_sources_mimic import ImagePlaces
from ..records_mimic import (
    check_several,
    entity_id_of,
    is_absent,
    placed_record,
    places_of,
    plain_record,
    records_of_table,
    rows_of_columns,
)


def require_columns(present: Iterable[str] | None, needed: Iterable[str], what: str) -> None:
    """Raises a `ValueError` that names the columns which are not there."""
    present = [] if present is None else list(present)
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(f"{what.capitalize()} have no column {', '.join(missing)}; they have {', '.join(present)}.")


class _Records(Sequence[Mapping[str, Any]]):
    """The records of a knowledge base by number, each read when it is asked for."""

    def __init__(self, source: Any, places: ImagePlaces) -> None:
        self._source = source
        self._places = places

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        place = range(len(self))[row]
        if isinstance(self._source, datasets.Dataset):
            record = self._source[place].to_pylist()[0]
        else:
            record = self._source[place]
        record = placed_record(record, "images", self._places)
        # As in the index: an integer id is the string that writes it.
        return record if isinstance(record["id"], str) else {**record, "id": entity_id_of(record["id"])}


class KnowledgeBase:
    """The entities that mentions are linked to. `in` and iteration are about ids, [`entities`] about records.

    Images stay bytes, to be decoded by [`load_image`] within its limits.

    Args:
        entities: a `datasets.Dataset`, a pandas `DataFrame`, a table of Arrow, or a sequence of dicts, with `id`,
            `name`, `description` and `images`. Integer ids are taken as the strings that write them.
        allow_urls, image_root: where images that are named by a string are read from; see [`places_of`].

    Attributes:
        places ([`ImagePlaces`]): what these two come to.

    Raises:
        ValueError: if there are no entities, an id is not a string or integer, two share an id, or these are not
            entities at all.
    """

    def __init__(
        self,
        entities: Any,
        allow_urls: bool | str | None = None,
        image_root: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        entities = rows_of_columns(entities)
        check_several(entities)
        self._source: Any = entities
        self.places = places_of(entities, "images", allow_urls, image_root)
        if isinstance(entities, datasets.Dataset):
            require_columns(entities.column_names, ("id", "name", "description", "images"), "the entities")
            # As Arrow, nothing is decoded. (A cast to undecoded images would write the data set anew.)
            self._source = entities.with_format("arrow")
        elif hasattr(entities, "iloc") and hasattr(entities, "columns"):  # a DataFrame
            require_columns(entities.columns, ("id", "name", "description", "images"), "the entities")
            rows = entities.to_dict("records")
            self._source = [{name: None if is_absent(value) else value for name, value in row.items()} for row in rows]
        else:
            self._source = records_of_table(entities)
            if not hasattr(self._source, "__getitem__") or not hasattr(self._source, "__len__"):
                self._source = list(self._source)  # what gives its records one after the other
            if isinstance(self._source, list | tuple):
                self._source = [plain_record(record) for record in self._source]
        self._rows: dict[str, int] = {}
        duplicates = []
        for row, value in enumerate(self.column("id")):
            entity_id = entity_id_of(value, f"The id of entity {row} (counted from 0)")
            if self._rows.setdefault(entity_id, row) != row:
                duplicates.append(entity_id)
        if not self._rows:
            raise ValueError("The knowledge base is empty: there is no entity to link to.")
        if duplicates:
            raise ValueError(
                f"{len(duplicates)} entities have the id of another, such as {duplicates[0]!r}. Ids must be unique."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, entity_id: object) -> bool:
        """Whether there is an entity of that id."""
        try:
            return entity_id_of(entity_id) in self._rows
        except ValueError:  # no id at all
            return False

    def __iter__(self) -> Iterator[str]:
        """The ids, in the order of the entities."""
        return iter(self._rows)

    def entities(self) -> Sequence[Mapping[str, Any]]:
        """The records, read by number when they are asked for."""
        return _Records(self._source, self.places)

    def entity(self, entity_id: object) -> Mapping[str, Any]:
        """The record of an entity; `UnknownEntityError` where there is none of that id."""
        return self.entities()[self.row(entity_id)]

    def column(self, name: str) -> Iterator[Any]:
        """The values of one field of all entities, as they were given."""
        if isinstance(self._source, datasets.Dataset):
            for table in self._source.select_columns([name]).iter(1000):
                yield from table[name].to_pylist()
        else:
            yield from (entity[name] for entity in self._source)

    def row(self, entity_id: object) -> int:
        """The number of an entity, from 0; `UnknownEntityError` (a `KeyError`) where there is none of that id."""
        try:
            return self._rows[entity_id_of(entity_id)]
        except (KeyError, ValueError):
            raise UnknownEntityError(f"There is no entity {entity_id!r} in the knowledge base.") from None

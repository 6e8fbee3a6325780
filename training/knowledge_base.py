"""The entities that mentions are linked to, found by id or read by number. It knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets


def undecoded(data: Any) -> Any:
    """A data set whose column `image` stays bytes, to be decoded by [`load_image`] within its limits; others as is."""
    features = getattr(data, "features", None) or {}
    if isinstance(features.get("image"), datasets.Image):
        return data.cast_column("image", datasets.Image(decode=False))
    return data


def require_columns(present: Iterable[str] | None, needed: Iterable[str], what: str) -> None:
    """Raises a `ValueError` that names the columns which are not there."""
    present = list(present or [])
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(f"{what.capitalize()} have no column {', '.join(missing)}; they have {', '.join(present)}.")


class KnowledgeBase(Sequence[Mapping[str, Any]]):
    """The entities that mentions are linked to: a sequence of dicts that also knows their ids.

    Pictures stay bytes, to be decoded by [`load_image`] within its limits.

    Args:
        entities: a `datasets.Dataset`, or a sequence of dicts, with `id`, `name`, `description` and `images`.

    Raises:
        ValueError: if there are no entities, or two share an id.
    """

    def __init__(self, entities: datasets.Dataset | Sequence[Mapping[str, Any]]) -> None:
        self._entities: Any = entities
        if isinstance(entities, datasets.Dataset):
            require_columns(entities.column_names, ("id", "name", "description", "images"), "the entities")
            # As Arrow, nothing is decoded. (A cast to undecoded pictures would write the data set anew.)
            self._entities = entities.with_format("arrow")
        self._rows: dict[str, int] = {}
        duplicates = []
        for row, entity_id in enumerate(self.column("id")):
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
        return entity_id in self._rows

    def __getitem__(self, row: Any) -> Any:
        if isinstance(self._entities, datasets.Dataset):
            return self._entities[row].to_pylist()[0]
        return self._entities[row]

    def column(self, name: str) -> Iterator[Any]:
        """The values of one field of all entities."""
        if isinstance(self._entities, datasets.Dataset):
            for table in self._entities.select_columns([name]).iter(1000):
                yield from table[name].to_pylist()
        else:
            yield from (entity[name] for entity in self._entities)

    def row(self, entity_id: str) -> int:
        """The number of an entity, from 0; `KeyError` where there is none of that id."""
        return self._rows[entity_id]

"""Reads the records of a knowledge base, from any list, data set or generator; and what an index keeps of each.

Knows how records are read and checked, but not how they are encoded or stored.
"""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import itertools
import math
import numbers
import operator
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from .image_sources_mimic import NO_PLACES, ImagePlaces, placed
from .names_mimic import ALIASES, listed_aliases
from .texts_mimic import check_unicode, is_unicode

_RECORDS_AT_ONCE = 512
_MOST_DIGITS = 100
_FLOOR: Any = -(2**53)  # beyond it a float may be another integer, rounded


def entity_id_of(value: Any, what: str = "An entity's id") -> str:
    """An entity's id as text; an integer is taken too, so that 375 and "375" are the same id everywhere.

    So is 375.0, which pandas makes of 375 in a column where some are missing.

    Args:
        value: the id as it was given.
        what: what messages call it.

    Raises:
        ValueError: for what cannot tell entities apart: `None`, NaN, a boolean, an empty string, other fractions.
    """
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, bool | np.bool_) and hasattr(value, "__index__"):
        return str(operator.index(value))
    if isinstance(value, decimal.Decimal):  # which databases have for integers
        known = value.is_finite() and value.adjusted() < _MOST_DIGITS
    else:
        known = isinstance(value, numbers.Real) and not isinstance(value, bool) and _FLOOR <= value <= -_FLOOR
    if known and value == int(value):
        return str(int(value))
    raise ValueError(
        f"{what} is {value!r:.200}. An id must be a string that is not empty, or an integer. (Of numbers in a column "
        'where some are missing pandas makes fractions: read ids as text, `dtype={"id": str}`.)'
    )


class Records:
    """A knowledge base of records that can be read by number, or only one after the other.

    Args:
        entities: a `datasets.Dataset`, a `pandas.DataFrame`, a table of Arrow, a sequence or any iterable of dicts; or
            what has `entities()`, such as an index or a `KnowledgeBase`.
        allow_urls, image_root: where images that are named by a string are read from; see [`places_of`].

    Raises:
        ValueError: if it is a single dict, a data set with its splits, or no records at all.
    """

    def __init__(
        self,
        entities: Any,
        allow_urls: bool | str | None = None,
        image_root: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        entities = rows_of_columns(entities)
        check_several(entities)
        if callable(getattr(entities, "entities", None)):
            entities = entities.entities()
        self._switches = (allow_urls, image_root)
        self._places = places_of(entities, "images", allow_urls, image_root)
        entities = records_of_table(entities)
        entities = undecoded(entities, "images")
        self._named: Iterable[str] | None = getattr(entities, "column_names", None)
        if self._named is None and isinstance(entities, list | tuple):
            self._named = _names_of(entities[:_RECORDS_AT_ONCE])
        self.total = len(entities) if hasattr(entities, "__len__") else None
        self._by_number = entities if self.total is not None and hasattr(entities, "__getitem__") else None
        self._iterator = None if self._by_number is not None else iter(entities)
        # A generator can be read only once.
        self.again = self._iterator is not entities
        self._next = 0
        if self._named is not None:
            _warn_of_other_names(self._named)

    def anew(self, entities: Any) -> Records:
        """The same knowledge base from its beginning; its images are read from where they are here."""
        return Records(entities, *self._switches)

    @property
    def places(self) -> ImagePlaces:
        """Where images that are named by a string are read from."""
        return self._places

    @property
    def at_once(self) -> int | None:
        """How many records may be taken at a time: those that are read by number stay where they are."""
        return None if self._by_number is not None else _RECORDS_AT_ONCE

    def skip(self, count: int, images: bool = False) -> Iterator[Mapping[str, Any]]:
        """Passes over the next records and gives them, perhaps without their images unless these are asked for."""
        if self._by_number is None:
            yield from map(plain_record, itertools.islice(cast(Any, self._iterator), count))
            return
        span = self.take(count)
        span = span if images else span.without_images()
        for row in range(len(span)):
            yield span[row]

    def take(self, count: int) -> Any:
        """The next records, at most `count`; something with a length that is read by number."""
        if self._by_number is None:
            some = itertools.islice(cast(Any, self._iterator), count)
            records = [placed_record(record, "images", self._places) for record in some]
            if self._named is None:
                self._named = _names_of(records)
                _warn_of_other_names(self._named)
            return records
        first, self._next = self._next, self._next + count
        return Span(self._by_number, first, min(self._next, cast(int, self.total)), self._places)


class Span:
    """Some records of a sequence, read when asked for: in a worker process, that is."""

    def __init__(self, records: Any, start: int, stop: int, places: ImagePlaces | None = None) -> None:
        self.records, self.start, self.stop = records, start, max(start, stop)
        self.places = ImagePlaces() if places is None else places

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return placed_record(self.records[self.start + row], "images", self.places)

    def without_images(self) -> Span:
        """The same records; of a data set, whose images would be read too, without them."""
        if not hasattr(self.records, "select_columns"):
            return self
        names = [name for name in self.records.column_names if name != "images"]
        return Span(self.records.select_columns(names), self.start, self.stop)


class _StoredRecords(Sequence[Mapping[str, Any]]):
    """The records of a `datasets.Dataset` as they are stored: images as their bytes, whatever format is set."""

    def __init__(self, dataset: Any) -> None:
        self._rows = dataset.with_format("arrow")
        self.column_names = dataset.column_names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        return self._rows[range(len(self))[row]].to_pylist()[0]

    def select_columns(self, names: list[str]) -> _StoredRecords:
        return _StoredRecords(self._rows.select_columns(names))


def undecoded(dataset: Any, column: str) -> Any:
    """A data set with its images as bytes: they are decoded by our own reader, with its limits. Its rows are dicts of
    plain values, whatever library's it was to give them as (`with_format`).

    Of a `datasets.Dataset` whose column holds lists of images this is a sequence of its records: a cast of such a
    column would write all of them anew.
    """
    features = getattr(dataset, "features", None)
    form = getattr(dataset, "format", None)
    if isinstance(form, Mapping) and form.get("type") not in (None, "custom"):  # a custom one is the caller's transform
        dataset = dataset.with_format(None)
    if features is None or column not in features or not hasattr(dataset, "cast_column"):
        return dataset
    wrapped = features[column]
    if not is_image_feature(wrapped):
        return dataset
    image = getattr(wrapped, "feature", wrapped)
    plain = type(image)(decode=False)
    if wrapped is not image and hasattr(dataset, "with_format") and hasattr(dataset, "__len__"):
        return _StoredRecords(dataset)
    return dataset.cast_column(column, plain if wrapped is image else dataclasses.replace(wrapped, feature=plain))


def is_image_feature(feature: Any) -> bool:
    """Whether a column of a data set holds images, or lists of them."""
    return type(getattr(feature, "feature", feature)).__name__ == "Image"


def places_of(
    table: Any,
    column: str,
    allow_urls: bool | str | None = None,
    image_root: bool | str | os.PathLike[str] | None = None,
) -> ImagePlaces:
    """Where images that a table names by a string are read from, unless its rows bring their bytes.

    Args:
        table: records with images.
        column: the field that has them.
        allow_urls: whether addresses are read: `True` (public ones), `"private"` or `False`. Where it is `None`,
            they are for what a caller made (a list, a DataFrame, a generator), and are not for a data set, whose rows
            somebody else may have written.
        image_root: whether files of this machine are read: `True` (any), `False`, or the folder that they must be in.
            Where it is `None`, as for `allow_urls`. The image files of a folder or archive that `load_dataset` has
            listed itself (`imagefolder`) are read in any case.

    Raises:
        ValueError: if one of them is something else.
    """
    from_elsewhere = type(table).__module__.partition(".")[0] == "datasets" and not _lists_files(table, column)
    default = NO_PLACES if from_elsewhere else ImagePlaces()
    return ImagePlaces(
        default.allow_urls if allow_urls is None else allow_urls,
        default.image_root if image_root is None else image_root,
    )


def placed_record(record: Any, column: str, places: ImagePlaces) -> Any:
    """A record, as a dict, whose images know where they may be read from."""
    record = plain_record(record)
    if places == ImagePlaces() or not isinstance(record, Mapping) or record.get(column) is None:
        return record
    return {**record, column: placed(record[column], places)}


def _lists_files(dataset: Any, column: str) -> bool:
    """Whether the images of a data set are files that `datasets` found in a folder, not names that the data holds."""
    if getattr(getattr(dataset, "info", None), "builder_name", None) != "imagefolder":
        return False
    if not is_image_feature((getattr(dataset, "features", None) or {}).get(column)):
        return False
    if not hasattr(dataset, "cache_files"):
        return True  # streamed
    # One that was saved (`load_from_disk`) says of itself what it was built by.
    files = [Path(file["filename"]) for file in dataset.cache_files]
    return bool(files) and not any((file.parent / "state.json").exists() for file in files)


def table_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an index keeps of a record: id, name, description, aliases, and other plain fields but paths of files.

    Raises:
        ValueError: if it has no id, its texts are no valid text, or its aliases no list of strings.
    """
    if not isinstance(record, Mapping) or record.get("id") is None:
        raise ValueError(
            f"Every entity needs an `id`; this record has none: {str(record)[:200]}. The fields are id, name, "
            "description and images."
        )
    kept: dict[str, Any] = {"id": entity_id_of(record["id"]), "name": "", "description": ""}
    for name, value in record.items():
        if name in ("id", "images") or is_absent(value):
            continue
        if name in ("name", "description") and not isinstance(value, str):
            raise ValueError(f"Entity {kept['id']!r}: `{name}` must be a string, got {type(value).__name__}.")
        if name not in ("name", "description") and is_local_path(value):
            continue  # an index is shared: it tells nothing of the machine that it was made on
        if name == ALIASES:
            try:
                aliases = listed_aliases(value)
            except ValueError as error:
                raise ValueError(f"Entity {kept['id']!r}: {error}") from error
            if aliases:
                kept[name] = aliases
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            kept[name] = str(value)  # no reader of tables has such a number
        elif isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value)):
            kept[name] = value
    for name, value in kept.items():
        for text in value if isinstance(value, list) else [f"{value}"]:
            check_unicode(text, f"Entity {kept['id']!a} has text that", f" of `{name}`")
        if not is_unicode(name):
            raise ValueError(f"Entity {kept['id']!a} has a field {name!a}, whose name is not valid Unicode.")
    return kept


# Names under which others have what we call so.
_OTHER_NAMES = {
    "id": ("_id", "entity_id", "identifier", "qid", "key", "uri"),
    "name": ("title", "entity_name", "label", "names", "entity"),
    "description": ("text", "desc", "descriptions", "attr", "abstract", "summary", "definition"),
    "images": ("image", "image_list", "imgs", "img", "pictures", "picture", "photos", "image_path", "file_name"),
    "image": ("images", "img", "imgpath", "img_path", "image_path", "picture", "photo", "file_name"),
    "mention": ("mentions", "surface", "surface_form", "mention_text", "phrase"),
    "sentence": ("text", "sentences", "context", "caption", "content"),
    "answer": ("answers", "entity_id", "gold", "label", "target", "qid", "entity", "entities"),
}


def _names_of(records: Iterable[Any]) -> set[str]:
    """The fields that some of the records have."""
    named: set[str] = set()
    for record in map(plain_record, records):
        if isinstance(record, Mapping):
            named |= {name for name, value in record.items() if isinstance(name, str) and not is_absent(value)}
    return named


def _warn_of_other_names(present: Iterable[str]) -> None:
    """Warns where a field that is known here is missing, and one of another name may be meant."""
    present = set(present)
    for name in ("name", "description", "images"):
        near = None if name in present else near_field(name, present - {"id", "name", "description", "images"})
        if near:
            warnings.warn(
                f"The entities have no field `{name}`, and `{near}` may be meant: rename it. The fields are id, name, "
                "description and images; others are kept with the index, and nothing is encoded of them.",
                stacklevel=4,
            )


_IMAGE_FILE = re.compile(r"\.(jpe?g|jp2|png|gif|webp|bmp|tiff?|avif|ico|ppm)$", re.IGNORECASE)
_MACHINE_PATH = re.compile(r"([A-Za-z]:[\\/]|\\\\|~[\\/]|file:)")


def is_local_path(value: Any) -> bool:
    """Whether a text is the path of a file on some machine: of an image, or of anything that is there."""
    if not isinstance(value, str) or not value or len(value) > 4096 or "\n" in value:
        return False
    if _MACHINE_PATH.match(value):
        return True
    if _IMAGE_FILE.search(value):
        return not re.match(r"[a-z][a-z0-9+.-]+://", value, re.IGNORECASE)
    # Ids such as Freebase's `/m/0abc` begin with a slash too.
    return value.startswith("/") and "\0" not in value and os.path.exists(value)


def near_field(name: str, present: Iterable[str]) -> str | None:
    """The field among `present` that may be `name` under another name; `None` if none may."""
    plain = {re.sub(r"[\W_]+", "_", field.strip().lower()): field for field in present}
    for other in (name, *_OTHER_NAMES.get(name, ())):
        if other in plain:
            return plain[other]
    close = difflib.get_close_matches(name, plain, n=1, cutoff=0.8)
    return plain[close[0]] if close else None


def check_several(entities: Any) -> None:
    """Raises a `ValueError` for what can be no records."""
    what = "A knowledge base is a list or data set of records with `id`, not "
    if isinstance(entities, Mapping):
        if any(hasattr(split, "column_names") for split in entities.values()):
            names = ", ".join(map(repr, entities))
            raise ValueError(f"{what}a data set with its splits ({names:.200}): pass one of them.")
        raise ValueError(f"{what}a single dict.")
    if isinstance(entities, str | bytes | os.PathLike):
        raise ValueError(
            f"{what}a name ({entities!r:.200}): read it first, such as with datasets.load_dataset or pandas.read_json."
        )
    if not any(hasattr(entities, name) for name in ("__iter__", "__getitem__", "collect", "read_all", "entities")):
        raise ValueError(f"{what}{type(entities).__name__}.")


def is_absent(value: Any) -> bool:
    """Whether a field has no value: `None`, or what pandas and numpy write for it (NaN, `pd.NA`, `NaT`)."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, numbers.Rational):  # which may be too large for a float
        return False
    if isinstance(value, decimal.Decimal):
        return value.is_nan()
    return isinstance(value, numbers.Real) and math.isnan(value)


def records_of_table(table: Any) -> Any:
    """The records of a `pandas.DataFrame`, of a frame of polars, or of a table, batch or reader of Arrow, as a list of
    dicts; anything else as it is."""
    if type(table).__module__.partition(".")[0] == "polars":
        table = table.collect() if hasattr(table, "collect") else table
        return table.to_dicts() if hasattr(table, "to_dicts") else table
    if hasattr(table, "read_all") and hasattr(table, "schema"):
        table = table.read_all()
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        return table.to_dict("records")
    if hasattr(table, "to_pylist") and hasattr(table, "schema"):
        return table.to_pylist()
    return table


def rows_of_columns(columns: Any) -> Any:
    """The records of a dict of columns, such as `dataset[:]` gives; anything else as it is.

    Raises:
        ValueError: if the columns have different lengths.
    """
    if not isinstance(columns, Mapping) or isinstance(columns.get("id"), str) or not _is_column(columns.get("id")):
        return columns
    lengths = {name: len(column) if _is_column(column) else None for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns have different lengths: {lengths!s:.200}.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_column(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)


def plain_record(record: Any) -> Any:
    """A row of a DataFrame (a `pandas.Series`), a named tuple or a row of sqlite as a dict, with plain values for the
    scalars of Arrow and numpy; anything else as it is."""
    if not isinstance(record, Mapping):
        if hasattr(record, "iloc") and hasattr(record, "index") and not hasattr(record, "columns"):
            record = record.to_dict()
        elif isinstance(record, tuple) and hasattr(record, "_asdict"):
            record = record._asdict()
        elif type(record).__module__ == "sqlite3":
            record = dict(record)
        else:
            return record
    scalars = {name: _plain_value(value) for name, value in record.items() if _is_scalar(value)}
    return {**record, **scalars} if scalars else record


def _is_scalar(value: Any) -> bool:
    """Whether a value is one of Arrow or numpy that stands for a plain one."""
    if value is None or isinstance(value, str | int | float | list):
        return False
    return hasattr(value, "as_py") or (isinstance(value, np.ndarray) and value.ndim == 0)


def _plain_value(value: Any) -> Any:
    return value.as_py() if hasattr(value, "as_py") else value.item()


def duplicate_id(entity_id: str) -> ValueError:
    """The error of an id that is there twice."""
    return ValueError(
        f"The id {entity_id!r} is there more than once. Ids tell entities apart: make them unique, or, to replace an "
        "entity that an index has, use EntityIndex.update."
    )


def ids_of(values: Iterable[Any]) -> list[str]:
    """Ids in the form in which an index has them; see [`entity_id_of`]."""
    return [entity_id_of(value) for value in values]


def in_order_of_length(records: Sequence[Mapping[str, Any]] | Span) -> list[int]:
    """The numbers of records, in the order of the length of their texts."""
    texts = records.without_images() if isinstance(records, Span) else records
    kept = [table_record(texts[row]) for row in range(len(records))]
    lengths = [len(record["name"]) + len(record["description"]) for record in kept]
    return sorted(range(len(kept)), key=lengths.__getitem__)


__all__ = [
    "Records",
    "Span",
    "check_several",
    "duplicate_id",
    "entity_id_of",
    "ids_of",
    "in_order_of_length",
    "is_absent",
    "is_image_feature",
    "is_local_path",
    "near_field",
    "placed_record",
    "places_of",
    "plain_record",
    "records_of_table",
    "rows_of_columns",
    "table_record",
    "undecoded",
]

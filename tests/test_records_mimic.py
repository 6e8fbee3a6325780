"""Knowledge bases as users have them: read without a copy, and nothing of the machine in what is kept."""

from __future__ import annotations

import collections
import decimal
import math
import pickle
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from mel_archives import noise

from mimic_el.records_mimic import Records, entity_id_of, is_absent, near_field, table_record
from mimic_el.training.knowledge_base import KnowledgeBase


@pytest.fixture
def knowledge_base(tmp_path: Path) -> datasets.Dataset:
    """Thirty entities with two images each, loaded from Parquet into a cache of its own."""
    features = datasets.Features(
        {"id": datasets.Value("string"), "name": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    )
    rows = [
        {"id": str(row), "name": f"n{row}", "images": [{"bytes": noise(row + k), "path": None} for k in range(2)]}
        for row in range(30)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "kb.parquet")
    return datasets.Dataset.from_parquet(str(tmp_path / "kb.parquet"), cache_dir=str(tmp_path / "cache"))


def cached(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize("format", [None, "numpy", "pandas"])
def test_images_of_a_data_set_are_read_where_they_lie(
    knowledge_base: datasets.Dataset, tmp_path: Path, format: str | None
) -> None:
    before = cached(tmp_path)
    records = Records(knowledge_base.with_format(format) if format else knowledge_base)
    read = pickle.loads(pickle.dumps(records.take(20)))  # as a worker process gets them
    assert [[image["bytes"] for image in read[row]["images"]] for row in (0, 19)] == [
        [noise(0), noise(1)],
        [noise(19), noise(20)],
    ]
    assert read.without_images()[3] == {"id": "3", "name": "n3"}
    assert [record["id"] for record in records.skip(5)] == ["20", "21", "22", "23", "24"]
    assert records.total == 30
    assert cached(tmp_path) == before


def test_an_integer_is_one_id_however_a_table_gives_it() -> None:
    """pandas makes fractions of integers in a column where some are missing."""
    column = pd.DataFrame({"answer": [375, None, 2**53]})["answer"]
    assert [entity_id_of(column[0]), entity_id_of(column[2])] == ["375", str(2**53)]
    assert {entity_id_of(value) for value in ("375", 375, 375.0, np.int64(375), np.float32(375))} == {"375"}
    # What is not an integer, or may be another one that was rounded, and what is not an id at all.
    for value in (375.5, 2.0**60, math.inf, math.nan, True, np.True_, None, "", [375]):
        with pytest.raises(ValueError, match="An id must be a string that is not empty, or an integer"):
            entity_id_of(value)


def test_what_is_missing_in_a_table_is_absent() -> None:
    """What pandas and numpy write where there is nothing, in every kind of column."""
    for value in (None, math.nan, np.float32("nan"), np.float64("nan"), pd.NA, pd.NaT):
        assert is_absent(value)
    others: list[Any] = [0, False, "", "nan", [], np.float32(0), np.array([math.nan, 1])]
    assert not any(map(is_absent, others))
    table = pd.DataFrame({"id": ["1", "2"], "name": ["Ann", None], "born": [1815, None]}).convert_dtypes()
    assert table["name"][1] is pd.NA
    assert [table_record(record) for record in Records(table).take(2)] == [
        {"id": "1", "name": "Ann", "description": "", "born": 1815},
        {"id": "2", "name": "", "description": ""},
    ]


def test_tables_and_rows_are_records() -> None:
    """Those of pandas and Arrow: of a table, of a batch, of lists and streams of rows, as dicts."""
    records = [{"id": "1", "name": "Ann"}, {"id": "2", "name": "Bo"}]
    frame = pd.DataFrame(records)
    arrow = pa.Table.from_pylist(records)
    rows = [frame.iloc[0], frame.iloc[1]]
    for given in (frame, arrow, arrow.to_batches()[0], datasets.Dataset(arrow).data, rows, iter(rows), tuple(records)):
        read = Records(given).take(5)
        assert [read[row] for row in range(len(read))] == records


def warned_of(entities: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = Records(entities)
        records.take(5)
    return [str(warning.message).partition(":")[0] for warning in caught]


ODD = {"id": "1", "title": "Ann", "text": "A chemist", "image": "/home/ann/photo.png"}


@pytest.mark.parametrize(
    "entities",
    [lambda: [ODD], lambda: (ODD,), lambda: iter([ODD]), lambda: datasets.Dataset.from_list([ODD]),
     lambda: datasets.Dataset.from_list([ODD]).to_iterable_dataset()],
    ids=["list", "tuple", "iterator", "data set", "streamed"],
)  # fmt: skip
def test_fields_with_other_names_are_warned_of_once(entities: Callable[[], Any]) -> None:
    assert warned_of(entities()) == [
        "The entities have no field `name`, and `title` may be meant",
        "The entities have no field `description`, and `text` may be meant",
        "The entities have no field `images`, and `image` may be meant",
    ]


@pytest.mark.parametrize(
    "record", [{"id": "1", "name": "Ann"}, {"id": "1", "name": "Ann", "description": "", "text": "x", "qid": "Q1"}]
)
def test_nothing_is_said_of_fields_that_are_there_or_that_nothing_stands_for(record: dict[str, Any]) -> None:
    assert warned_of([record, {**record, "id": "2"}]) == []


@pytest.mark.parametrize(
    ("name", "present", "near"),
    [("name", ["Title"], "Title"), ("name", [" name "], " name "), ("description", ["descripton"], "descripton"),
     ("images", ["img_path", "image"], "image"), ("answer", ["sentence"], None), ("name", [], None)],
)  # fmt: skip
def test_near_field(name: str, present: list[str], near: str | None) -> None:
    assert near_field(name, present) == near


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/ann/photo.png", False),
        ("photos/1.JPG", False),
        ("C:\\Users\\ann\\kb", False),
        ("\\\\server\\share", False),
        ("~/kb", False),
        ("file:///home/ann/a", False),
        (__file__, False),
        ("https://example.org/a.png", True),
        ("/m/0abc", True),
        ("AC/DC", True),
        ("A: a letter", True),
        ("Q5", True),
        (5, True),
    ],
)
def test_paths_of_files_do_not_go_into_an_index(value: Any, kept: bool) -> None:
    record = table_record({"id": "1", "name": "photo.png", "description": "/home/ann", "note": value})
    assert record["name"] == "photo.png"
    assert record["description"] == "/home/ann"
    assert record.get("note") == (value if kept else None)


ROWS = [{"id": "1", "name": "Ann", "description": "a"}, {"id": "2", "name": "Ben", "description": ""}]
Row = collections.namedtuple("Row", ROWS[0])  # type: ignore[misc]


def sqlite_rows() -> list[Any]:
    with sqlite3.connect(":memory:") as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute(
            "select 1 as id, 'Ann' as name, 'a' as description union select 2, 'Ben', ''"
        ).fetchall()


@pytest.mark.parametrize(
    "entities",
    [
        lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
        lambda: datasets.Dataset.from_list(ROWS).with_format("numpy")[:],
        lambda: pa.Table.from_pylist(ROWS).to_reader(),
        lambda: [Row(**row) for row in ROWS],
        sqlite_rows,
        lambda: [{name: pa.scalar(value) for name, value in row.items()} for row in ROWS],
        lambda: [{name: np.array(value) for name, value in row.items()} for row in ROWS],
        lambda: [{**row, "id": decimal.Decimal(row["id"])} for row in ROWS],
        lambda: pa.table({**pa.Table.from_pylist(ROWS).to_pydict(), "id": pa.array([1, 2], pa.decimal128(9, 2))}),
        lambda: pytest.importorskip("polars").DataFrame(ROWS),
        lambda: pytest.importorskip("polars").LazyFrame(ROWS),
    ],
)
def test_whatever_holds_records_is_taken(entities: Callable[[], Any]) -> None:
    """By an index and by training alike."""
    records = Records(entities())
    assert [table_record(record) for record in records.take(9)] == ROWS
    knowledge_base = KnowledgeBase(entities())
    assert [table_record(record) for record in knowledge_base.entities()] == ROWS


@pytest.mark.parametrize(
    ("entities", "told"),
    [
        ("kb.jsonl", "not a name"),
        (None, "not NoneType"),
        (5, "not int"),
        ({"id": "1"}, "not a single dict"),
        ({"id": ["1", "2"], "name": ["Ann"]}, "different lengths"),
        (datasets.DatasetDict({"kb": datasets.Dataset.from_list(ROWS)}), r"splits \('kb'\)"),
    ],
)
def test_what_can_be_no_records_is_told(entities: Any, told: str) -> None:
    for kind in (Records, KnowledgeBase):
        with pytest.raises(ValueError, match=told):
            kind(entities)


def test_numbers_that_no_float_holds() -> None:
    record = {"id": 10**400, "name": "Ann", "year": 10**400, "height": decimal.Decimal("NaN")}
    assert table_record(record) == {"id": str(10**400), "name": "Ann", "description": "", "year": str(10**400)}
    for value in ("NaN", "sNaN", "Infinity", "1.5", "1e9999"):
        with pytest.raises(ValueError, match="An id must be a string"):
            entity_id_of(decimal.Decimal(value))

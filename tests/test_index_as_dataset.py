"""The entities of an index, read as a data set: the values that were given, whatever a reader would make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_processor
from tiny_clip import tiny_model

from mimic_el.index_mimic import EntityIndex

datasets = pytest.importorskip("datasets")

ENTITIES: dict[str, list[dict[str, Any]]] = {
    "texts like dates": [
        {"id": "2001-01-01", "name": "2001-09-11", "description": "2020-05-06T10:00:00"},
        {"id": "1984-01-01", "name": "1989-11-09 00:00:00", "description": "1949-06-08T00:00:00Z"},
    ],
    "a kind of its own in each": [
        {"id": "a", "name": "A", "x": True, "y": 1, "z": 2.5, "big": 2**63, "n": 1},
        {"id": "b", "name": "B", "x": 3, "y": "high", "z": 1, "big": 1, "n": 2},
        {"id": "c", "name": "C", "x": "yes", "y": 2.5, "z": 2, "big": 2**64 - 1},
    ],
    "years": [{"id": "1", "name": "1984"}, {"id": "2", "name": "2001"}],
}


@pytest.mark.parametrize("name", ENTITIES)
def test_values_are_those_of_the_index(name: str, tmp_path: Path):
    model = tiny_model(text_max_length=24)
    index = EntityIndex.build(model, tiny_processor(model), ENTITIES[name], tmp_path / "index", show_progress=False)
    for streaming in (False, True):
        read = datasets.load_dataset(
            str(tmp_path / "index"), "entities", split="kb", cache_dir=str(tmp_path / "cache"), streaming=streaming
        )
        rows = [{field: value for field, value in row.items() if value is not None} for row in read]
        assert rows == list(index.entities())
    for given, kept in zip(ENTITIES[name], index.entities(), strict=True):
        assert {field: kept[field] for field in given} == given


def test_integers_that_no_table_holds_are_kept_as_text(tmp_path: Path):
    model = tiny_model(text_max_length=24)
    kb = [{"id": "a", "name": "A", "big": 2**70}, {"id": "b", "name": "B", "big": 1}]
    EntityIndex.build(model, tiny_processor(model), kb, tmp_path / "index", show_progress=False)
    read = datasets.load_dataset(
        str(tmp_path / "index"), "entities", split="kb", cache_dir=str(tmp_path / "cache"), streaming=True
    )
    assert [row["big"] for row in read] == [str(2**70), 1]

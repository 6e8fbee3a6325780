"""Tests of training/knowledge_base.py: one rule for ids, and records that are read by id or number."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mimic_el.errors_mimic import UnknownEntityError
from mimic_el.images_mimic import listed
from mimic_el.training.knowledge_base import KnowledgeBase


def entity(entity_id: Any) -> dict[str, Any]:
    return {"id": entity_id, "name": "a", "description": "b", "images": None}


def test_in_and_iteration_are_ids_and_integers_become_strings() -> None:
    knowledge_base = KnowledgeBase([entity("Q1"), entity(7), entity(np.int64(8))])
    assert list(knowledge_base) == ["Q1", "7", "8"]
    assert "7" in knowledge_base
    assert all(known in knowledge_base for known in (7, 7.0, np.float32(8)))
    assert not any(other in knowledge_base for other in (9, 7.5, None, True, math.nan))
    assert knowledge_base.row(7) == knowledge_base.row(7.0) == 1
    assert knowledge_base.row("8") == 2
    assert [record["id"] for record in knowledge_base.entities()] == ["Q1", "7", "8"]
    assert knowledge_base.entity("7")["id"] == "7"
    with pytest.raises(UnknownEntityError, match="Q9"):
        knowledge_base.entity("Q9")


@pytest.mark.parametrize("entity_id", [math.nan, True, None, ""], ids=["nan", "true", "none", "empty"])
def test_what_is_no_id_is_refused(entity_id: Any) -> None:
    with pytest.raises(ValueError, match=r"id of entity 1 .* must be a string"):
        KnowledgeBase([entity("Q1"), entity(entity_id)])


def test_the_same_id_as_a_number_and_a_string_is_one_id() -> None:
    with pytest.raises(ValueError, match="must be unique"):
        KnowledgeBase([entity("7"), entity(7)])


def test_listed_takes_what_tables_give() -> None:
    assert listed(None) == listed(math.nan) == listed([]) == []
    assert listed("a.png") == ["a.png"]
    assert listed(("a.png", "b.png")) == listed(np.array(["a.png", "b.png"], dtype=object)) == ["a.png", "b.png"]


def test_tables_are_taken() -> None:
    """Of pandas and Arrow, and a list of a table's rows; what is missing there is `None`."""
    records = [entity("Q1"), {**entity("Q2"), "description": None}]
    frame = pd.DataFrame(records).convert_dtypes()
    for given in (
        frame,
        pa.Table.from_pylist(records),
        [frame.iloc[0], frame.iloc[1].where(frame.iloc[1].notna(), None)],
    ):
        knowledge_base = KnowledgeBase(given)
        assert list(knowledge_base) == ["Q1", "Q2"]
        assert [dict(record) for record in knowledge_base.entities()] == records

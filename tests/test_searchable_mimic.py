"""What every index answers, whatever state it hands its questions to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tiny import mention_features, random_encoded
from tiny_clip import tiny_model

from mimic_el.errors_mimic import UnknownEntityError
from mimic_el.pairs_mimic import SearchStats
from mimic_el.searchable_mimic import SearchableIndex
from mimic_el.snapshot_mimic import SearchResult

SCORES = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
NAMES = {"low": ["c", "d"], "lowest": ["d"]}


class Table:
    """A state whose entities have the same scores for each mention."""

    dtype, made_by = "float32", {"name": "table"}

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __len__(self) -> int:
        return len(SCORES)

    def __contains__(self, entity_id: object) -> bool:
        return entity_id in SCORES

    def records(self) -> Any:
        return ({"id": entity_id} for entity_id in SCORES)

    def check_candidates(self, entity_ids: Sequence[str] | None) -> None:
        if entity_ids is not None and not set(entity_ids) <= SCORES.keys():
            raise UnknownEntityError(f"not there: {entity_ids}")

    def bearers(self, names: Sequence[str]) -> list[list[str] | None]:
        return [NAMES.get(name) for name in names]

    def linked(self, mentions: Any, top_k: int, candidates: Sequence[Any], **options: Any) -> list[list[dict]]:
        self.asked.append((len(mentions), list(candidates), options))
        found = [[i for i in SCORES if ids is None or i in ids] for ids in candidates]
        return [[{"entity_id": i, "score": SCORES[i]} for i in ids[:top_k]] for ids in found]


class Index(SearchableIndex):
    def __init__(self) -> None:
        self.table: Any = Table()

    @property
    def state(self) -> Any:
        return self.table


def linked_ids(index: Index, count: int, *args: Any, **options: Any) -> list[list[str]]:
    model = tiny_model()
    mentions = mention_features(model, *random_encoded(model.config, count))
    return [[found["entity_id"] for found in entities] for entities in index.link_encoded(mentions, *args, **options)]


def test_its_entities_are_those_of_the_state() -> None:
    index = Index()
    assert (len(index), list(index), index.dtype) == (4, ["a", "b", "c", "d"], "float32")
    assert "a" in index
    assert "x" not in index
    assert index.made_by == {"name": "table"}


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (None, [["a", "b"]] * 3),
        ("names", [["c", "d"], ["d"], ["a", "b"]]),  # nobody bears the third name: all may be meant
        ("names+search", [["a", "b", "c", "d"], ["a", "b", "d"], ["a", "b"]]),
        ([["d"], "names", ["b", "c"]], [["d"], ["d"], ["b", "c"]]),
        ([None, ["c"], "names+search"], [["a", "b"], ["c"], ["a", "b"]]),
    ],
)
def test_candidates_by_name(candidates: Any, expected: list[list[str]]) -> None:
    assert linked_ids(Index(), 3, 2, candidates=candidates, names=["low", "lowest", "other"]) == expected


def test_one_state_is_asked_once_where_no_name_adds_candidates() -> None:
    index = Index()
    linked_ids(index, 2, 1, candidates=["names", None], names=["lowest", "low"], method="exhaustive")
    assert index.table.asked == [(2, [["d"], None], {"method": "exhaustive"})]


@pytest.mark.parametrize("names", [None, ["low"]])
def test_candidates_by_name_without_names_are_refused(names: list[str] | None) -> None:
    with pytest.raises(ValueError, match=r'candidates="names" the names must be given'):
        linked_ids(Index(), 2, 1, candidates="names", names=names)


def test_found_entities_as_linking_gives_them() -> None:
    scores = np.array([[3.0, 1.0], [2.0, np.nan]], dtype=np.float32)
    result = SearchResult([["a", "gone"], ["b"]], scores, scores + 1, scores + 2, scores + 3, SearchStats())
    records = {i: {"id": i, "name": i.upper(), "description": "", "more": 1} for i in ("a", "b")}
    units = ("score", "text_score", "image_score", "cross_modal_score")
    assert result.linked(records) == [
        [{"entity_id": "a", "name": "A", "description": ""} | dict(zip(units, (3.0, 4.0, 5.0, 6.0), strict=True))],
        [{"entity_id": "b", "name": "B", "description": ""} | dict(zip(units, (2.0, 3.0, 4.0, 5.0), strict=True))],
    ]
    assert all(type(value) is float for value in list(result.linked(records)[0][0].values())[3:])

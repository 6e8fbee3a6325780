"""The table of names: who bears a name, which names occur in a text, and how it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimic_el.errors_mimic import EntityIndexError
from mimic_el.names_mimic import NameTable, listed_aliases, names_of
from mimic_el.spans_mimic import fold, folded_name


def table(*names: str) -> NameTable:
    return NameTable.of({"name": name} for name in names)


def found(names: NameTable, text: str, **options: Any) -> list[str]:
    return [text[start:end] for start, end in names.spans_in(text, **options)]


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (["Orange", "Apple"], "Orange opened a shop beside the Apple store.", ["Orange", "Apple"]),
        (["Orange"], "ORANGE, orangeade, Oranges; Orange's", ["ORANGE", "Orange"]),
        (["New York", "New York City", "City Hall"], "In New York City Hall", ["New York City"]),
        (["York"], "new yorkers of NEW\nYORK", ["YORK"]),
        (["New York"], "NEW\n  YORK", ["NEW\n  YORK"]),
        (["machine learning"], "Machine Learning is machine learning", ["Machine Learning", "machine learning"]),
        (["U.N.C.L.E.", "C++", "AT&T", "Yahoo!"], "U.N.C.L.E. wrote C++ at AT&T, Yahoo!", None),
        (["Straße", "Étienne"], "STRASSE e\u0301tienne E\u0301tienne", ["STRASSE", "E\u0301tienne"]),
        (["北京大学", "北京"], "我在北京大学读书", ["北京大学"]),
        (["オレンジ"], "オレンジとオレンジジュース", ["オレンジ"]),
        (["서울"], "서울은 서울", ["서울", "서울"]),
        (["ไทย"], "ประเทศไทย", ["ไทย"]),
        (["Orange"], "🍊Orange🍊", ["Orange"]),
        (["O'Brien"], "O’Brien", ["O’Brien"]),
    ],
)
def test_names_in_a_text(names: list[str], text: str, expected: list[str] | None):
    assert found(table(*names), text) == (names if expected is None else expected)


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (["a", "I", "京"], "a I 京", []),
        (["1984", "--"], "1984 --", []),
        (["The", "Will"], "The will", ["will"][:0]),
        (["IT", "US", "Who"], "IT and US, it and us; Who", ["IT", "US"]),
        (["The Who"], "The Who asks the who", ["The Who"]),
        (["Orange"], "an orange", []),
        (["orange", "Orange"], "an orange", ["orange"]),
        (["iPhone"], "an iPhone, an iphone", ["iPhone"]),
        (["Machine learning"], "by machine learning", ["machine learning"]),
    ],
)
def test_what_is_too_common(names: list[str], text: str, expected: list[str]):
    assert found(table(*names), text) == expected


def test_lower_case_can_be_asked_for():
    assert found(table("Orange"), "an orange", lower_case=True) == ["orange"]


def plain_spans(names: list[str], text: str) -> set[tuple[int, int]]:
    """Every part of a text between boundaries that folds to a name, tried one by one."""
    folded = fold(text)
    begins, stops = folded.boundaries
    wanted = {folded_name(name) for name in names}
    return {(b, e) for b in begins.tolist() for e in stops.tolist() if b < e and folded.text[b:e] in wanted}


@given(
    names=st.lists(st.text(alphabet="ABc -.北ア", min_size=1, max_size=5), min_size=1, max_size=8),
    text=st.text(alphabet="ABc -.北ア", max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_hashes_find_what_comparing_every_part_finds(names: list[str], text: str):
    kept = [name for name in names if name.strip()]
    hits = {(begin, stop) for some in table(*names)._hits(fold(text)) for begin, stop, _ in some}
    assert hits == plain_spans(kept, text)


def test_a_name_ten_thousand_times():
    assert len(table("Orange").spans_in("Orange, " * 10_000)) == 10_000


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\ud800", "\u0000", "🍊"])
def test_texts_without_names(text: str):
    assert table("Orange").spans_in(text) == []
    assert table().spans_in(text) == []


# --- Who bears a name


RECORDS: list[dict[str, Any]] = [
    {"name": "Orange", "aliases": ["France Télécom"]},
    {"name": "orange"},
    {"name": "Apple", "aliases": ["ORANGE", "Apple"]},
    {"name": ""},
]


def test_rows_of_a_name():
    names = NameTable.of(RECORDS)
    assert len(names) == 5
    assert names.rows_of("Orange") == ([0], [0, 1, 2])
    assert names.rows_of("oRange") == ([], [0, 1, 2])
    assert names.rows_of("FRANCE TELECOM") == ([], [])
    assert names.rows_of("france télécom") == ([], [0])
    assert names.rows_of("") == names.rows_of(" ") == ([], [])
    removed = np.array([True, False, False, False])
    assert names.rows_of("Orange", removed) == ([], [1, 2])
    assert names.spans_in("France Télécom", removed) == []


def test_an_alias_shared_by_a_thousand():
    names = NameTable.of({"name": f"Entity {row}", "aliases": ["Smith"]} for row in range(1000))
    assert names.rows_of("smith")[1] == list(range(1000))
    assert found(names, "Smith and Entity 7") == ["Smith", "Entity 7"]


def test_aliases_in_any_form():
    assert names_of({"name": "A", "aliases": ["B", "A", "", " "]}) == ["A", "B"]
    assert names_of({"name": "A", "aliases": "B|C"}) == ["A", "B", "C"]
    assert names_of({"name": None}) == []
    assert names_of({"name": "Georgia (country)", "aliases": ["(500) Days"]}) == [
        "Georgia (country)",
        "(500) Days",
        "Georgia",
    ]
    assert listed_aliases("a| b |") == ["a", "b"]
    assert listed_aliases(("a", "b", "a")) == listed_aliases(np.array(["a", "b"])) == ["a", "b"]
    for wrong in (5, ["a", 5], {"a": "b"}):
        with pytest.raises(ValueError, match="`aliases` must be a list of strings"):
            listed_aliases(wrong)


def test_the_nearest_names():
    pytest.importorskip("rapidfuzz")
    names = table("Orange", "Grange", "Georgia", "北京大学")
    assert names.nearest("Ornge", 2) == [0]
    assert names.nearest("xrange", 1) == [0, 1]
    assert names.nearest("北京大", 1) == [3]
    assert names.nearest("nothing", 2) == []


# --- Stored


def test_saved_opened_and_joined(tmp_path: Path):
    whole = NameTable.of(RECORDS)
    whole.save(tmp_path / "names", ["s1", "s2"])
    opened, shards = NameTable.load(tmp_path / "names", 4)
    assert shards == ["s1", "s2"]
    parts = [NameTable.of(RECORDS[:2]), NameTable.of(RECORDS[2:], first_row=2)]
    for one in (opened, parts[0].followed_by(parts[1]), whole.up_to(2).followed_by(parts[1]), whole.up_to(4)):
        for name in ("hashes", "order", "rows", "written", "offsets", "texts", "sizes"):
            np.testing.assert_array_equal(getattr(one, name), getattr(whole, name))


def test_damaged_tables(tmp_path: Path):
    path = tmp_path / "names"
    NameTable.of(RECORDS).save(path, ["s"])
    with pytest.raises(EntityIndexError, match="`rows` names what is not there"):
        NameTable.load(path, 2)
    content = path.read_bytes()
    for damaged in (content[:-1], b"", content[:20]):
        path.write_bytes(damaged)
        with pytest.raises(EntityIndexError, match=r"missing or damaged.* Call build_names\(\)"):
            NameTable.load(path, 4)
    path.unlink()
    path.mkdir()
    with pytest.raises(EntityIndexError, match="not a regular file"):
        NameTable.load(path, 4)

"""MELBench's own files: their rows, their splits, and what is wrong in them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from mel_archives import (
    an_image,
    to_json,
    write_folder,
)
from source_rows import findings, rows_of

from mimic_el.datasets_scripts.report import SPLITS, Report
from mimic_el.datasets_scripts.sources import open_source
from mimic_el.datasets_scripts.splits import split_of

SHARED = Path(__file__).parents[2] / "shared" / "data"


# MELBench.

MELBENCH = {
    "10": {"id": "10", "sentence": "Ann and Bob", "mentions": ["Ann", "Bob"], "entities": ["Ann A", "Bob B"],
           "answer": ["Q1", "Q2"]},
    "11": {"id": "11", "sentence": "Bobby", "mentions": "Bobby", "entities": "Bob C", "answer": "Q2"},
    "12": {"id": "12", "sentence": "Bad", "mentions": ["Bad"], "entities": [], "answer": ["Q3"]},
    "13": {"id": "13", "sentence": "Nil", "mentions": ["Nil"], "entities": ["Nil"], "answer": ["nil"], "more": 1},
    "14": "text",
    "15": {"id": "15", "sentence": "Ann", "mentions": ["Ann"], "entities": ["Ann"], "answer": [" "]},
}  # fmt: skip


def test_melbench(tmp_path: Path) -> None:
    files = {"Wikidata-MEL.json": to_json(MELBENCH), "images/10.png": an_image(1, format="PNG"), "images/11.jpg": b""}
    report, found = findings("wikimel", write_folder(files, tmp_path / "data"), tmp_path)
    file = "Wikidata-MEL.json"
    empty = [split for split in SPLITS if split not in (split_of("10"), split_of("11"))]
    expected: list[tuple[str, str, str | None]] = [
        ("closed_knowledge_base", "wikimel", None),
        ("conflicting_name", file, "11"),
        ("unreadable_image", file, "11"),
        ("bad_row", file, "12"),
        ("nil_answer", file, "13"),
        ("bad_row", file, "14"),
        ("nil_answer", file, "15"),
        *(("empty_split", split, None) for split in empty),
    ]
    assert Counter(found) == Counter(expected)
    assert report.to_dict()["fields_left_out"] == {"mentions: more": 1}
    rows = rows_of(open_source("wikimel", tmp_path / "data", Report()))
    assert rows["kb"] == [
        {"id": "Q1", "qid": "Q1", "name": "Ann A", "description": "", "images": []},
        {"id": "Q2", "qid": "Q2", "name": "Bob B", "description": "", "images": []},
    ]
    mentions = {row["id"]: row for split in SPLITS for row in rows[split]}
    assert set(mentions) == {"10-0", "10-1", "11-0"}
    shared = {"sentence": "Ann and Bob", "image": an_image(1, format="PNG"), "source_id": "10"}
    assert mentions["10-1"] == {"id": "10-1", "mention": "Bob", "answer": "Q2", **shared}
    assert [row["id"] for row in rows[split_of("10")]][:2] == ["10-0", "10-1"]


def test_split_of_is_the_documented_one() -> None:
    buckets = {str(i): int(hashlib.sha256(str(i).encode()).hexdigest()[:16], 16) % 100 for i in range(500)}
    assert {id_: split_of(id_) for id_ in buckets} == {
        id_: "train" if bucket < 70 else "validation" if bucket < 80 else "test" for id_, bucket in buckets.items()
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="the MELBench files are not here")
@pytest.mark.parametrize(
    ("name", "file", "way", "mentions", "entities", "not_literal", "empty"),
    [
        ("wikimel", "Wikidata-MEL", "folder", 25_846, 17_391, 740, 0),
        ("richpediamel", "Richpedia-MEL", "archive", 17_805, 17_805, 664, 1),
        ("richpediamel", "Richpedia-MEL", "file", 17_805, 17_805, 664, 1),
    ],
)
def test_melbench_comes_through_complete(
    tmp_path: Path, name: str, file: str, way: str, mentions: int, entities: int, not_literal: int, empty: int
) -> None:
    place = SHARED if way == "folder" else SHARED / f"{file}.zip"
    if way == "file":
        with zipfile.ZipFile(place) as archive:
            archive.extract(f"{file}.json", tmp_path)
        place = tmp_path / f"{file}.json"
    report, _ = findings(name, place, tmp_path)
    counts = {"mention_not_in_sentence": not_literal, "closed_knowledge_base": 1, "no_images": 1}
    assert report.counts == counts | ({"empty_mention": empty} if empty else {})
    assert report.statistics.mentions.total() == mentions
    assert report.statistics.entities == entities
    assert not report.errors
    shares = [report.statistics.mentions[split] / mentions for split in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the MELBench files are not here")
def test_melbench_mentions_are_those_of_the_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(SHARED / "Wikidata-MEL.zip") as archive:
        records = json.loads(archive.read("Wikidata-MEL.json"))
    expected = Counter(
        (key, text, record["sentence"], answer)
        for key, record in records.items()
        for text, answer in zip(record["mentions"], record["answer"], strict=True)
    )
    source = open_source("wikimel", SHARED, Report())
    found = Counter(
        (row.extra["source_id"], row.mention, row.sentence, row.answer)
        for split in SPLITS
        for row in source.mentions(split, Report())
    )
    assert found == expected

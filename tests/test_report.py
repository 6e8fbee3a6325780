"""Findings are counted, listed and printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mimic_el.datasets_scripts import report as report_module
from mimic_el.datasets_scripts.report import KINDS, MAX_FIELD_NAMES, Report, Statistics


def test_findings_are_counted_and_listed(tmp_path: Path) -> None:
    report = Report()
    report.add("md5_differs", "a.json", detail="before the list was begun")
    report.list_in(tmp_path / "list" / "problems.jsonl")
    for row in range(5):
        report.add("bad_row", "b.json", row, "no \ud800 sentence")
    assert not (tmp_path / "list" / "problems.jsonl").exists()
    report.close()
    lines = [json.loads(line) for line in (tmp_path / "list" / "problems.jsonl").read_text("ascii").splitlines()]
    assert lines[0] == {
        "file": "a.json",
        "row": None,
        "kind": "md5_differs",
        "detail": "before the list was begun",
    }
    assert [(line["file"], line["row"], line["kind"]) for line in lines[1:]] == [
        ("b.json", row, "bad_row") for row in range(5)
    ]
    assert report.counts == {"md5_differs": 1, "bad_row": 5}
    assert report.errors == {"bad_row": 5}
    assert not report.fatal


def test_an_abandoned_list_does_not_appear(tmp_path: Path) -> None:
    report = Report()
    report.list_in(tmp_path / "problems.jsonl")
    report.add("bad_row", "b.json", 1)
    report.abandon()
    report.close()
    assert not (tmp_path / "problems.jsonl").exists()


def test_findings_without_end_are_counted_and_not_all_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "MAX_LISTED", 10)
    report = Report()
    report.list_in(tmp_path / "problems.jsonl")
    for row in range(1_234):
        report.add("bad_row", "a.json", row, "x" * 10_000)
    report.add("bad_entity", "a.json", 1)
    report.close()
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert report.counts == {"bad_row": 1_234, "bad_entity": 1}
    assert [line["kind"] for line in lines] == ["bad_row"] * 10 + ["bad_entity", "bad_row"]
    assert lines[-1]["detail"] == "1,224 more of this kind are not listed"
    assert max(len(line["detail"]) for line in lines) == report_module.MAX_DETAIL_CHARACTERS


def test_unknown_kind() -> None:
    with pytest.raises(KeyError, match="'bad' is not a kind"):
        Report().add("bad", "a.json")


def test_text_names_everything() -> None:
    report = Report()
    for kind in KINDS:
        report.add(kind, f"{kind}.json", 7, "half a \ud83d character")
    report.add("bad_row", "\x1b[2J.json", 7, "clears the screen")
    report.add_file("kb.json", 3, "abc", "def")
    report.compare("entities", 3, 4)
    report.resolved["jpg"] = 12
    for _ in range(9):
        report.leave_out("mentions", ["topic"])
    report.statistics.add_mention("train", "Ann", "Ann works", "Q1", True)
    report.statistics.add_mention("test", "Ann", "Ann", "Q1", False)
    text = report.text()
    text.encode()  # can be printed
    for kind, facts in KINDS.items():
        assert f"{report.counts[kind]:,}  {kind}: {facts.effect}" in text
        assert f"{kind}.json, row 7: half a ? character" in text
    assert "entities: 3 (published: 4)" in text
    assert "MD5 abc  kb.json (DIFFERS)" in text
    assert "12 by their name with .jpg" in text
    assert "mentions: topic (9)" in text
    assert text.replace("\n", "").isprintable()
    assert [line.split() for line in text.splitlines() if "distinct" in line] == [
        ["distinct", "answers", "1", "0", "1", "1"]
    ]


def test_field_names_are_bounded() -> None:
    report = Report()
    report.leave_out("mentions", (f"field {number}" for number in range(1_000)))
    assert report.unused_fields.total() == 1_000
    assert len(report.unused_fields) == MAX_FIELD_NAMES + 1
    assert report.unused_fields["mentions: others"] == 1_000 - MAX_FIELD_NAMES


def test_every_kind_is_documented() -> None:
    documentation = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
    fatal, errors, notes = documentation.split("## What can be wrong")[1].split("\n\n|")[1:4]
    for severity, section in (("fatal", fatal), ("error", errors), ("note", notes)):
        assert [kind for kind, facts in KINDS.items() if (f"`{kind}`" in section) != (facts.severity == severity)] == []


def test_statistics() -> None:
    statistics = Statistics()
    statistics.add_mention("train", "Ann B", "Ann B works", "Q1", True)
    statistics.add_mention("test", "Ann", "Ann", "Q1", False)
    statistics.add_mention("test", "Cy", "Cy", "Q2", True)
    statistics.add_entity("Q1", "a chemist", 2)
    statistics.add_entity(None, " ", 0)
    assert statistics.to_dict() == {
        "mentions": {"train": 1, "validation": 0, "test": 2},
        "mentions_with_image": {"train": 1, "validation": 0, "test": 1},
        "distinct_answers": {"train": 1, "validation": 0, "test": 2},
        "entities": 2,
        "entities_with_qid": 1,
        "entities_with_description": 1,
        "entities_with_image": 1,
        "entity_images": 2,
    }
    assert statistics.unseen_answers("test") == 1
    assert statistics.sentence_words == {3: 1, 1: 2}

"""WikiDiverse's own files, and the addresses of Wikipedia's pages."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mel_archives import (
    an_image,
    mention,
    to_json,
    write_folder,
)
from source_rows import findings, rows_of

from mimic_el.datasets_scripts.report import SPLITS, Report
from mimic_el.datasets_scripts.source import Source
from mimic_el.datasets_scripts.sources import open_source
from mimic_el.datasets_scripts.wikidiverse import image_name, wikipedia_page

SHARED = Path(__file__).parents[2] / "shared" / "data"


# WikiDiverse.


def spans_of(data_dir: Path, name: str = "wikidiverse") -> dict[str, list[tuple[int | None, int | None]]]:
    source = open_source(name, data_dir, Report())
    return {split: [(row.start, row.end) for row in source.mentions(split, Report())] for split in SPLITS}


def wikidiverse(with_candidates: bool = False) -> dict[str, bytes]:
    url = "https://upload.wikimedia.org/wikipedia/commons/0/06/Game-2007.jpg"
    wiki = "https://en.wikipedia.org/wiki/"
    lions = ["Lions", "Organization", 4, 9, f"{wiki}Detroit_Lions"]
    packers = ["Packers", "Organization", 21, 28, f"n{wiki}Green_Bay_Packers"]
    rows: list[Any] = [
        ["The Lions versus the Packers (2007).", url, "sports", [lions, packers]],
        ["Nobody", url.replace("jpg", "svg"), "crime", [["Nobody", "Person", 0, 6, "NIL"]]],
        [
            "No image",
            "",
            "crime",
            [["image", "Thing", "x", 10, f"{wiki}Caf%C3%A9"], ["bad"], ["a", "b", 0, 1, "x"]],
        ],
        "text",
    ]
    if with_candidates:
        rows = [
            [sentence, image, *mention[:2], "left", "right", mention[4], ["candidate"], topic, *mention[2:4]]
            for sentence, image, topic, mentions in rows[:1]
            for mention in mentions
        ]
    suffix = "_w_10cands" if with_candidates else ""
    name = hashlib.md5(b"Game-2007.jpg").hexdigest()
    svg = hashlib.md5(b"Game-2007.svg").hexdigest()
    return {
        f"train{suffix}.json": to_json(rows),
        f"valid{suffix}.json": to_json(rows[:1]),
        f"test{suffix}.json": to_json([]),
        f"wikinewsImgs/{name}.jpg": an_image(1),
        f"wikinewsImgs/{svg}.png": an_image(2, format="PNG"),
    }


def test_wikidiverse_release(tmp_path: Path) -> None:
    report, found = findings("wikidiverse", write_folder(wikidiverse(), tmp_path / "data"), tmp_path)
    assert Counter(found) == {
        ("closed_knowledge_base", "wikidiverse", None): 1,
        ("repaired_entity_url", "train.json", 0): 1,
        ("repaired_entity_url", "valid.json", 0): 1,
        ("nil_answer", "train.json", 1): 1,
        ("bad_field", "train.json", 2): 1,
        ("bad_row", "train.json", 2): 1,
        ("answer_without_entity", "train.json", 2): 1,
        ("bad_row", "train.json", 3): 1,
        ("empty_split", "test", None): 1,
        ("sentence_in_several_splits", "valid.json", 0): 2,
    }
    assert report.resolved == {"exact": 3}
    rows = rows_of(open_source("wikidiverse", tmp_path / "data", Report()))
    names = {"Detroit_Lions": "Detroit Lions", "Green_Bay_Packers": "Green Bay Packers", "Café": "Café"}
    assert {row["id"]: row["name"] for row in rows["kb"]} == names
    assert all(row["qid"] is None and row["description"] == "" for row in rows["kb"])
    assert rows["train"][1] == {
        "id": "train-0-1",
        "mention": "Packers",
        "sentence": "The Lions versus the Packers (2007).",
        "answer": "Green_Bay_Packers",
        "image": an_image(1),
        "source_id": "0",
        "topic": "sports",
        "mention_type": "Organization",
    }
    assert spans_of(tmp_path / "data")["train"] == [(4, 9), (21, 28), (3, 8)]


def test_wikidiverse_release_with_candidates(tmp_path: Path) -> None:
    plain = open_source("wikidiverse", write_folder(wikidiverse(), tmp_path / "a"), Report())
    candidates = open_source("wikidiverse", write_folder(wikidiverse(True), tmp_path / "b"), Report())
    keys = ("mention", "sentence", "answer", "image", "topic", "mention_type")

    def values(source: Source) -> list[list[Any]]:
        return [[row[key] for key in keys] for row in rows_of(source)["train"][:2]]

    assert values(candidates) == values(plain)


@pytest.mark.parametrize(
    ("url", "id_", "title", "repaired"),
    [
        ("https://en.wikipedia.org/wiki/Detroit_Lions", "Detroit_Lions", "Detroit Lions", False),
        ("https://en.m.wikipedia.org/wiki/Caf%C3%A9", "Café", "Café", False),
        ("hhttps://en.wikipedia.org/wiki/AC/DC", "AC/DC", "AC/DC", True),
        ("]https://en.wikipedia.org/wiki/X", "X", "X", True),
        ("ttps://en.wikipedia.org/wiki/X", "X", "X", True),
        ("https://de.wikipedia.org/wiki/X", "de:X", "X", False),
        ("https://www.wikidata.org/wiki/Q5", "https://www.wikidata.org/wiki/Q5", "Q5", False),
        # All addresses of a page are that page.
        ("https://en.wikipedia.org/wiki/Orange_S.A.#History", "Orange_S.A.", "Orange S.A.", False),
        ("https://en.wikipedia.org/wiki/Orange_S.A.?oldid=123", "Orange_S.A.", "Orange S.A.", False),
        ("https://en.wikipedia.org/w/index.php?oldid=1&title=Orange_S.A.#x", "Orange_S.A.", "Orange S.A.", False),
        ("https://en.wikipedia.org/wiki/orange__S.A.", "Orange_S.A.", "Orange S.A.", False),
        ("//EN.wikipedia.org/wiki/Orange%20S.A.", "Orange_S.A.", "Orange S.A.", False),
        ("https://en.wikipedia.org/wiki/Cafe%CC%81", "Café", "Café", False),
        ("https://en.wikipedia.org/wiki/%C3%A9t%C3%A9", "Été", "Été", False),
        ("https://de.wikipedia.org/wiki/%C3%9Ferung#Wort", "de:ßerung", "ßerung", False),
        # A question mark, a number sign or a slash of the title's own.
        ("https://en.wikipedia.org/wiki/What%27s_Up%3F", "What's_Up?", "What's Up?", False),
        ("https://en.wikipedia.org/wiki/Who_Is_It?", "Who_Is_It?", "Who Is It?", False),
        ("https://en.wikipedia.org/wiki/%23MeToo/x", "#MeToo/x", "#MeToo/x", False),
        # Escapes that are not UTF-8: two such pages stay two.
        ("https://en.wikipedia.org/wiki/Caf%e9_%C5%81", "Caf%E9_Ł", "Caf%E9 Ł", False),
        ("https://en.wikipedia.org/wiki/Caf%E8_%C5%81", "Caf%E8_Ł", "Caf%E8 Ł", False),
    ],
)
def test_wikipedia_page(url: str, id_: str, title: str, repaired: bool) -> None:
    page = wikipedia_page(url)
    assert page is not None
    assert (page.id, page.title, page.repaired) == (id_, title, repaired)


@pytest.mark.parametrize("url", ["", "Detroit_Lions", "https://en.wikipedia.org/wiki/", "https://en.wikipedia.org"])
def test_no_wikipedia_page(url: str) -> None:
    assert wikipedia_page(url) is None


@pytest.mark.parametrize(
    ("last", "suffix"),
    [("a.jpg", ".jpg"), ("b.JPEG", ".JPEG"), ("c.svg", ".png"), ("d.SVG", ".png"), ("e.jpg?1", ".jpg"), ("f", "")],
)
def test_image_name_of_a_wikidiverse_url(last: str, suffix: str) -> None:
    assert image_name(f"https://host/a/b/{last}") == hashlib.md5(last.encode()).hexdigest() + suffix


def test_wikidiverse_rows_of_the_other_layout_are_named(tmp_path: Path) -> None:
    files = wikidiverse() | {"train.json": to_json([mention("a", "a", "Q0")])}
    report = Report()
    open_source("wikidiverse", write_folder(files, tmp_path), report)
    assert report.fatal == {"wrong_structure": 1}
    assert "kb_entity.json is not there" in report.examples["wrong_structure"][0]


GOOD = ["Lions", "Organization", 4, 9, "https://en.wikipedia.org/wiki/Lions"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (["The Lions", None, "sports", [GOOD]], None),
        (["The Lions", "", None, [GOOD]], None),
        (["The Lions", None, None, [["Lions", None, None, None, GOOD[4]]]], None),
        (["The Lions", None, None, [["Lions", "x", "4", 9.0, GOOD[4]]]], None),
        (["The Lions", 5, None, [GOOD]], ("bad_field", "the image URL is number, not a string")),
        (["The Lions", None, ["a", "b"], [GOOD]], ("bad_field", "topic is list, not a string")),
        (["The Lions", None, None, [["Lions", None, [4], 9, GOOD[4]]]], ("bad_field", "start is list")),
        (["The Lions", None, None, [["Lions", None, 3, 8, GOOD[4]]]], ("wrong_span", "3 to 8 is not 'Lions'")),
    ],
)
def test_only_sentence_mention_and_entity_are_required_of_wikidiverse(
    tmp_path: Path, row: list[Any], problem: tuple[str, str] | None
) -> None:
    files = {f"{split}.json": to_json([row]) for split in ("train", "valid", "test")}
    source = open_source("wikidiverse", write_folder(files, tmp_path), Report())
    report = Report()
    mentions = list(source.mentions("train", report))
    assert [(mention.answer, mention.start, mention.end) for mention in mentions] == [("Lions", 4, 9)]
    assert report.counts == ({problem[0]: 1} if problem else {})
    if problem:
        assert problem[1] in report.examples[problem[0]][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([None, None, None, [GOOD]], "the sentence is missing or null, not a string"),
        (["a", None, [GOOD]], "has 3 items"),
        (["a", None, None, None], "the mentions are missing or null, not a list"),
        (["a", None, None, [[5, "x", 0, 1, "y"]]], "the words of a mention are number"),
        (["a", None, None, [["a", "x", 0, 1, ["y"]]]], "the entity URL of 'a' is list"),
    ],
)
def test_a_bad_row_of_wikidiverse_names_the_field_and_its_type(tmp_path: Path, row: list[Any], message: str) -> None:
    files = {f"{split}.json": to_json([row]) for split in ("train", "valid", "test")}
    report = Report()
    list(open_source("wikidiverse", write_folder(files, tmp_path), Report()).mentions("train", report))
    assert report.counts == {"bad_row": 1}
    assert message in report.examples["bad_row"][0]

"""Own tables in the forms that people have them, and what is said of what cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mel_archives import (
    PACKINGS,
    noise,
    sound_archive,
    write_folder,
)
from source_rows import findings, rows_of

from mimic_el.datasets_scripts.archives import ArchiveError
from mimic_el.datasets_scripts.builders import encode, features_of
from mimic_el.datasets_scripts.prepare import Options, survey
from mimic_el.datasets_scripts.report import SPLITS, Report
from mimic_el.datasets_scripts.source import Source
from mimic_el.datasets_scripts.sources import open_source
from mimic_el.datasets_scripts.splits import split_of

SHARED = Path(__file__).parents[2] / "shared" / "data"


# Own data.

OWN_CSV = {
    "entities.csv": b"id,name,description,images\ne1,Ann,A chemist,a/0.png|a/1.png\ne2,Bob,,images/b/0.png\n",
    "mentions.csv": "id,mention,sentence,answer,image,split\n"
    'm1,Ann,"Ann, at work",e1,a/0.png,train\nm2,Bob,"Bob\nsleeps",e2,,dev\nm3,Ann,Ann,e1,,test\n'.encode("utf-8-sig"),
}
OWN_JSONL = {
    "entities.jsonl": b'{"id": "e1", "name": "Ann", "description": "A chemist", "images": ["a/0.png", "a/1.png"]}\n'
    b'{"id": "e2", "name": "Bob", "images": ["b/0.png"]}\n',
    "train.jsonl": b'{"id": "m1", "mention": "Ann", "sentence": "Ann, at work", "answer": "e1", "image": "a/0.png"}\n',
    "validation.jsonl": b'\n{"id": "m2", "mention": "Bob", "sentence": "Bob\\nsleeps", "answer": "e2"}\n',
    "test.jsonl": b'{"id": "m3", "mention": "Ann", "sentence": "Ann", "answer": "e1"}\n',
}
OWN_IMAGES = {f"images/{name}": noise(number, (4, 4)) for number, name in enumerate(("a/0.png", "a/1.png", "b/0.png"))}


@pytest.mark.parametrize("packing", ["folder", "zip of folders", "tar of zips"])
@pytest.mark.parametrize("files", [OWN_CSV, OWN_JSONL], ids=["csv", "jsonl"])
def test_own_data(tmp_path: Path, files: dict[str, bytes], packing: str) -> None:
    report = Report()
    source = open_source("custom", PACKINGS[packing](files | OWN_IMAGES, tmp_path), report)
    rows = rows_of(source)
    assert report.counts == {}
    assert rows["kb"] == [
        {"id": "e1", "qid": None, "name": "Ann", "description": "A chemist",
         "images": [noise(0, (4, 4)), noise(1, (4, 4))]},
        {"id": "e2", "qid": None, "name": "Bob", "description": "", "images": [noise(2, (4, 4))]},
    ]  # fmt: skip
    assert {split: [(row["source_id"], row["sentence"], row["answer"]) for row in rows[split]] for split in SPLITS} == {
        "train": [("m1", "Ann, at work", "e1")],
        "validation": [("m2", "Bob\nsleeps", "e2")],
        "test": [("m3", "Ann", "e1")],
    }
    assert rows["train"][0]["image"] == noise(0, (4, 4))


def test_own_data_with_everything_wrong(tmp_path: Path) -> None:
    files = {
        "entities.jsonl": b'{"id": 1, "name": "Ann", "qid": 5, "images": "gone.png", "age": 3}\n'
        b'{"id": "1", "name": "Ann again"}\n{"id": 2}\n[]\n{"id": "3", "name": \n\xff\xfe\n'
        b'{"id": "4", "name": "Bob", "images": [1]}\n',
        "mentions.csv": b"mention,sentence,answer,split\nAnn,Ann,1,train\nAnn,Ann,1,somewhere\nAnn,Ann\n"
        b"Ann,Ann,9,test\nAnn,Ann,nil,test\nAnn,Ann \xe9,1,test\nAnn,Bob,1,\n",
    }
    _, found = findings("custom", write_folder(files, tmp_path / "data"), tmp_path)
    kb, table = "entities.jsonl", "mentions.csv"
    assert Counter(found) == Counter(
        [
            ("bad_field", kb, 1),
            ("missing_image", kb, 1),
            ("duplicate_entity_id", kb, 2),
            ("bad_entity", kb, 3),
            ("bad_entity", kb, 4),
            ("bad_entity", kb, 5),
            ("bad_entity", kb, 6),
            ("bad_field", kb, 7),
            ("bad_row", table, 3),
            ("bad_row", table, 4),
            ("answer_without_entity", table, 5),
            ("nil_answer", table, 6),
            ("broken_text", table, 7),
            ("mention_not_in_sentence", table, 8),
            *[("empty_split", "validation", None)] * (split_of("8") != "validation"),
        ]
    )


@pytest.mark.parametrize(
    ("changes", "kind", "detail"),
    [
        ({"entities.csv": None}, "missing_file", "entities.jsonl: nor entities.csv"),
        ({"mentions.csv": None}, "missing_file", "mentions.jsonl: nor mentions.csv"),
        ({"entities.jsonl": b""}, "wrong_structure", "keep one of them"),
        ({"entities.csv": b"id,title\n1,Ann\n"}, "wrong_structure", "has no column name; its columns are id, title"),
    ],
)
def test_own_data_that_cannot_be_used(tmp_path: Path, changes: dict[str, bytes | None], kind: str, detail: str) -> None:
    files = {name: data for name, data in {**OWN_CSV, **changes}.items() if data is not None}
    report = Report()
    open_source("custom", write_folder(files, tmp_path), report)
    assert report.fatal == {kind: 1}
    assert detail in report.examples[kind][0]


def own_rows(changes: dict[int, str]) -> bytes:
    """A table of mentions of 1,000 lines, some of which are others. The first line is number 1."""
    lines = ["mention,sentence,answer,split"] + [f"Ann,Ann at work on day {n},e1,train" for n in range(2, 1001)]
    for number, line in changes.items():
        lines[number - 1] = line
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        (
            {10: 'Ann,"Ann at work,e1,train', 900: 'Ann,Ann at home",e1,train'},
            "lines 10 to 900 are one row, though each has as many cells as the header",
        ),
        ({10: 'Ann,"Ann at work,e1,train', 11: 'Ann,Ann at home",e1,train'}, "lines 10 to 11 are one row"),
        ({10: 'Ann,"Ann at work,e1,train'}, "lines 10 to 1000 are one row (unexpected end of data)"),
        ({10: 'Ann,"Ann at work,e1,train', 900: 'Ann,"Ann" at home,e1,train'}, "lines 10 to 900 are one row ("),
    ],
    ids=["closed_in_a_later_row", "closed_in_the_next_row", "never_closed", "closed_within_a_text"],
)
def test_rows_that_a_quote_swallows_are_named(tmp_path: Path, changes: dict[int, str], detail: str) -> None:
    files = {"entities.csv": b"id,name\ne1,Ann\n", "mentions.csv": own_rows(changes)}
    report, found = findings("custom", write_folder(files, tmp_path / "data"), tmp_path)
    assert ("open_quote", "mentions.csv", None) in found
    assert report.fatal["open_quote"] == 1
    assert detail in report.examples["open_quote"][0]


def test_text_in_several_lines_long_texts_and_stray_quotes_are_told_apart(tmp_path: Path) -> None:
    long = "Ann " * 50_000
    changes = {
        10: 'Ann,"Ann, who\nsaid ""no"", left",e1,train',
        11: f"Ann,{long},e1,train",
        12: 'Ann,"Ann" at work,e1,train',
    }
    files = {"entities.csv": b"id,name\ne1,Ann\n", "mentions.csv": own_rows(changes)}
    report, found = findings("custom", write_folder(files, tmp_path / "data"), tmp_path)
    assert report.fatal == {}
    odd = [finding for finding in found if finding[0] not in ("empty_split", "closed_knowledge_base")]
    assert odd == [("bad_row", "mentions.csv", 13)]
    rows = rows_of(open_source("custom", tmp_path / "data", Report()))["train"]
    assert len(rows) == 998
    assert [row["sentence"] for row in rows[8:10]] == ['Ann, who\nsaid "no", left', long]


@pytest.mark.parametrize(
    "files",
    [
        {"mentions.csv": b"mention,sentence,answer\nAnn,Ann,\nAnn,Ann,NIL\nAnn,Ann, \nAnn,Ann,e1\n"},
        {
            "train.jsonl": b"".join(
                b'{"mention": "Ann", "sentence": "Ann", "answer": %s}\n' % answer
                for answer in (b"null", b'""', b'" "', b'"e1"')
            )
        },
    ],
    ids=["csv", "jsonl"],
)
def test_mentions_of_no_entity(tmp_path: Path, files: dict[str, bytes]) -> None:
    files = {"entities.csv": b"id,name\ne1,Ann\n", **files}
    report, found = findings("custom", write_folder(files, tmp_path / "data"), tmp_path)
    assert report.counts["nil_answer"] == 3
    assert {kind for kind, *_ in found} <= {"nil_answer", "empty_split", "closed_knowledge_base"}
    assert report.rows()["mentions"] == {"read": 4, "kept": 1, "left_out": {"nil_answer": 3}}
    source = open_source("custom", tmp_path / "data", Report(), keep_nil=True)
    answers = [row.answer for split in SPLITS for row in source.mentions(split, Report())]
    assert sorted(answers, key=str) == [None, None, None, "e1"]


def test_names_of_splits_in_any_case(tmp_path: Path) -> None:
    table = b"mention,sentence,answer,split\nAnn,A Ann,e1,Train\nAnn,B Ann,e1,TEST\nAnn,C Ann,e1,Dev\n"
    files = {"entities.csv": b"id,name\ne1,Ann\n", "mentions.csv": table}
    rows = rows_of(open_source("custom", write_folder(files, tmp_path), Report()))
    assert [[row["sentence"] for row in rows[split]] for split in SPLITS] == [["A Ann"], ["C Ann"], ["B Ann"]]


def test_own_data_without_splits_is_split_by_id(tmp_path: Path) -> None:
    def lines() -> Iterator[str]:
        yield "id,mention,sentence,answer"
        yield from (f"m{number},Ann,Ann on day {number},e1" for number in range(300))

    files = {"entities.csv": b"id,name\ne1,Ann\n", "mentions.csv": "\n".join(lines()).encode()}
    rows = rows_of(open_source("custom", write_folder(files, tmp_path), Report()))
    found = {row["source_id"]: split for split in SPLITS for row in rows[split]}
    assert found == {f"m{number}": split_of(f"m{number}") for number in range(300)}


# Own data: what people bring.


def own(tmp_path: Path, tables: dict[str, bytes], **options: Any) -> tuple[Source, Report]:
    files = {"entities.csv": b"id,name\ne1,Ann\ne2,Bob\ne3,Cy\n", **tables}
    report = Report()
    return open_source("custom", write_folder(files, tmp_path), report, **options), report


def all_mentions(source: Source, report: Report | None = None) -> dict[str, list[Any]]:
    return {split: list(source.mentions(split, report or Report())) for split in SPLITS}


def own_lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_no_sentence_image_or_record_is_in_two_splits(tmp_path: Path) -> None:
    """Mentions of a sentence, of an image and of a record each draw the split together."""
    rows = [
        {"mention": "Ann", "sentence": ("Ann  in case {}" if number % 3 else "ANN in CASE {}").format(number // 3),
         "answer": "e1", "image": f"images\\{number // 6}.png" if number % 2 else f"{number // 6}.png",
         **({"id": f"r{number // 12}"} if number < 200 else {})}
        for number in range(600)
    ]  # fmt: skip
    images = {f"images/{number}.png": noise(0, (2, 2)) for number in range(100)}
    source, report = own(tmp_path, {"mentions.jsonl": own_lines(*rows), **images})
    mentions = all_mentions(source)
    for key in (
        lambda row: row.sentence.lower().split(),
        lambda row: row.image.name,
        lambda row: row.extra["source_id"] or row.id,
    ):
        places: dict[str, set[str]] = {}
        for split, of_split in mentions.items():
            for row in of_split:
                places.setdefault(str(key(row)), set()).add(split)
        assert {len(splits) for splits in places.values()} == {1}
    assert sum(map(len, mentions.values())) == 600
    assert min(map(len, mentions.values())) > 0
    survey(source, report, Options())
    assert "sentence_in_several_splits" not in report.counts


def test_splits_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{"mention": "Ann", "sentence": f"Ann {number // 2}", "answer": "e1", "no": number} for number in range(100)]
    found = []
    for place, order in (("a", rows), ("b", rows[::-1])):
        source, _ = own(tmp_path / place, {"mentions.jsonl": own_lines(*order)})
        found.append({row.extra["no"]: split for split, of in all_mentions(source).items() for row in of})
    assert found[0] == found[1]


def test_an_image_of_everything_does_not_put_all_into_one_split(tmp_path: Path) -> None:
    rows = [
        {"mention": "Ann", "sentence": f"Ann {number}", "answer": "e1", "image": "logo.png"} for number in range(200)
    ]
    source, report = own(tmp_path, {"mentions.jsonl": own_lines(*rows), "images/logo.png": noise(0, (2, 2))})
    assert report.counts == {"image_in_several_splits": 1}
    assert all(all_mentions(source).values())


def test_sentences_in_several_given_splits_are_named(tmp_path: Path) -> None:
    table = b"mention,sentence,answer,split\nAnn,A b,e1,train\nAnn,a  B,e1,test\nAnn,C,e1,test\nAnn,C,e1,test\n"
    source, report = own(tmp_path, {"mentions.csv": table})
    report.list_in(tmp_path / "problems.jsonl")
    survey(source, report, Options())
    report.close()
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [(line["file"], line["row"], line["detail"]) for line in lines if "several" in line["kind"]] == [
        ("mentions.csv", 3, "also in train")
    ]


def test_a_record_of_lists_is_a_mention_for_each_item(tmp_path: Path) -> None:
    record = {"id": "r", "sentence": "Ann and Bob and no one", "mention": ["Ann", "Bob", "no one"],
              "answer": ["e1", "e2", None], "entity": ["Ann A", "Bob B", "nil"], "kind": "caption",
              "image": "a.png", "start": [0, 8, 16]}  # fmt: skip
    tables = {"train.jsonl": own_lines(record), "images/a.png": noise(0, (2, 2))}
    source, report = own(tmp_path, tables, keep_nil=True)
    rows = all_mentions(source, report)["train"]
    assert [(row.id, row.mention, row.answer, row.start, row.end) for row in rows] == [
        ("train-1-0", "Ann", "e1", 0, 3),
        ("train-1-1", "Bob", "e2", 8, 11),
        ("train-1-2", "no one", None, 16, 22),
    ]
    assert [row.extra for row in rows] == [
        {"source_id": "r", "kind": "caption", "entity": name} for name in record["entity"]
    ]
    assert {row.image.name for row in rows} == {"a.png"}
    assert report.counts == {"nil_kept": 1}  # that they share an id is not a finding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mention": ["Ann", "Bob"]}, "mention is a list of 2, and answer is string ('e1')"),
        ({"mention": ["Ann", "Bob"], "answer": ["e1"]}, "mention is a list of 2, and answer is a list of 1"),
        ({"answer": ["e1", "e2"]}, "answer is a list of 2, not a string or a whole number"),
        ({"mention": 5}, "mention is number ('5'), not a string"),
        ({"sentence": None, "answer": 1.5}, "sentence is null, not a string; answer is number ('1.5')"),
        ({"mention": {}}, "mention is object ('{}'), not a string"),
    ],
)
def test_a_bad_row_names_field_type_and_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"mention": "Ann", "sentence": "Ann", "answer": "e1"}
    source, report = own(tmp_path, {"train.jsonl": own_lines(good, {**good, **change})})
    assert len(all_mentions(source, report)["train"]) == 1
    assert report.counts == {"bad_row": 1}
    assert report.examples["bad_row"][0].startswith("train.jsonl, row 2: ")
    assert message in report.examples["bad_row"][0]
    assert report.read["mentions"] == 2


def test_own_columns_are_kept_with_their_types(tmp_path: Path) -> None:
    base = {"mention": "Ann", "sentence": "Ann", "answer": "e1"}
    rows: list[dict[str, Any]] = [
        {**base, "kind": "person", "page": 1, "weight": 1, "seen": True, "mixed": 1, "nested": {"a": 1}, "none": None},
        {**base, "kind": None, "page": 2, "weight": 0.5, "seen": False, "mixed": "x", "source_id": "theirs"},
    ]
    kb = own_lines({"id": "e1", "name": "Ann", "type": "person"})
    source, report = own(tmp_path, {"train.jsonl": own_lines(*rows), "entities.csv": b"", "images/x": b""})
    (tmp_path / "entities.csv").unlink()
    (tmp_path / "entities.jsonl").write_bytes(kb)
    report = Report()
    source = open_source("custom", tmp_path, report)
    assert source.extra_columns == {"source_id": "string", "kind": "string", "page": "int64", "weight": "float64",
                                    "seen": "bool", "mixed": "string"}  # fmt: skip
    assert [row.extra for row in source.mentions("train", report)] == [
        {"source_id": None, "kind": "person", "page": 1, "weight": 1.0, "seen": True, "mixed": "1"},
        {"source_id": None, "kind": None, "page": 2, "weight": 0.5, "seen": False, "mixed": "x"},
    ]
    assert report.unused_fields == {"mentions: nested": 1, "mentions: none": 1}
    assert source.entity_columns == {"type": "string"}
    stored = [encode(row, lambda image: b"") for row in source.entities(Report())]
    assert pa.Table.from_pylist(stored, schema=features_of("entities", source).arrow_schema)["type"].to_pylist() == [
        "person"
    ]


TABLE = "mention,sentence,answer\nAnn,Ann; then Bob,e1\nBob,Bob,e2\n"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("Train.CSV", TABLE.encode()),
        ("train.csv", "\n".join(
            ["mention;sentence;answer", 'Ann;"Ann; then Bob";e1', "Bob;Bob;e2"]).encode("utf-8-sig")),
        ("train.csv", b'sep=;\r\nmention;sentence;answer\r\nAnn;"Ann; then Bob";e1\r\nBob;Bob;e2\r\n'),
        ("train.tsv", TABLE.replace(",", "\t").encode()),
        ("train.csv", TABLE.replace(",", "\t").encode("utf-16")),
        ("training.csv", TABLE.replace("mention,", "mention , ", 1).encode()),
        ("train.json", json.dumps([dict(zip(TABLE.split("\n")[0].split(","), line.split(","), strict=True))
                                   for line in TABLE.splitlines()[1:]], indent=1).encode()),
        ("train.json", own_lines({"mention": "Ann", "sentence": "Ann; then Bob", "answer": "e1"},
                                 {"mention": "Bob", "sentence": "Bob", "answer": "e2"})),
    ],
    ids=["case", "semicolons", "sep", "tsv", "utf-16", "spaces", "json", "json lines"],
)  # fmt: skip
def test_every_form_of_a_table(tmp_path: Path, name: str, data: bytes) -> None:
    source, report = own(tmp_path, {name: data})
    rows = all_mentions(source, report)["train"]
    assert [(row.mention, row.sentence, row.answer) for row in rows] == [
        ("Ann", "Ann; then Bob", "e1"), ("Bob", "Bob", "e2")
    ]  # fmt: skip
    assert report.counts == {}


def test_columns_of_paths_on_this_machine_are_not_published(tmp_path: Path) -> None:
    base = {"mention": "Ann", "sentence": "Ann", "answer": "e1", "page": "/m/0abc"}
    rows: list[dict[str, Any]] = [
        {**base, "img": "/home/ann/a.png"},
        {**base, "img": None},
        {**base, "place": "C:\\Users\\ann"},
    ]
    source, report = own(tmp_path, {"train.jsonl": own_lines(*rows)})
    assert source.extra_columns == {"source_id": "string", "page": "string"}
    assert report.counts["local_path"] == 2
    assert "column 'img'" in report.examples["local_path"][0]


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    answers: list[Any] = ["e1", None, "gone", [], "nil"]
    rows = [{"mention": "Ann", "sentence": "Ann", "answer": answer} for answer in answers]
    kb = b"id,name\ne1,Ann\ne1,Ann\n,x\ne2,Bob\n"
    source, report = own(tmp_path, {"mentions.jsonl": own_lines(*rows) + b"[]\n{\n", "entities.csv": kb})
    survey(source, report, Options())
    assert report.rows() == {
        "mentions": {"read": 7, "kept": 1, "left_out": {"bad_row": 3, "answer_without_entity": 1, "nil_answer": 2}},
        "entities": {"read": 4, "kept": 2, "left_out": {"bad_entity": 1, "duplicate_entity_id": 1}},
    }
    assert (
        "Rows of mentions: 7 read, 1 kept, 6 left out (3 bad_row, 1 answer_without_entity, 2 nil_answer)."
        in report.text()
    )


@pytest.mark.parametrize(("entities", "closed"), [(b"id,name\ne1,Ann\n", True), (b"id,name\ne1,Ann\ne2,Bob\n", False)])
def test_a_knowledge_base_of_answers_alone_is_said_to_be_closed(tmp_path: Path, entities: bytes, closed: bool) -> None:
    source, report = own(tmp_path, {"entities.csv": entities, "train.csv": b"mention,sentence,answer\nAnn,Ann,e1\n"})
    survey(source, report, Options())
    assert report.counts["closed_knowledge_base"] == closed


@pytest.mark.parametrize(
    ("tables", "kind", "message"),
    [
        (
            {"entities.csv": b"id,title\n1,Ann\n"},
            "wrong_structure",
            "has no column name; its columns are id, title; is it called 'title' here?",
        ),
        (
            {"entities.csv": None, "entities.jsonl": b'{"id": 1, "title": "Ann"}\n'},
            "wrong_structure",
            "is it called 'title' here? Rename it",
        ),
        (
            {"train.csv": b"Mentions,text,answer\nAnn,Ann,e1\n"},
            "wrong_structure",
            "has no column mention; its columns are Mentions, text, answer; is it called 'Mentions' here?",
        ),
        (
            {"entities.csv": b"id,name,text,image\ne1,Ann,A chemist,a.png\n"},
            "other_name",
            "no row has `description`, and 'text' may be meant",
        ),
        (
            {"train.jsonl": b'{"mention": "Ann", "sentence": "Ann", "answer": "e1", "imgPath": "a.png"}\n'},
            "other_name",
            "no row has `image`, and 'imgPath' may be meant",
        ),
    ],
)
def test_fields_with_other_names_are_named(
    tmp_path: Path, tables: dict[str, bytes | None], kind: str, message: str
) -> None:
    files = {"entities.csv": b"id,name\ne1,Ann\n", "train.csv": TABLE.encode(), **tables}
    if "train.jsonl" in files:
        del files["train.csv"]
    report = Report()
    source = open_source(
        "custom", write_folder({name: data for name, data in files.items() if data is not None}, tmp_path), report
    )
    assert any(message in example for example in report.examples[kind])
    # What cannot be read of the one table is not held against the other.
    list(source.mentions("train", report))
    assert "answer_without_entity" not in report.counts or not report.fatal


def test_files_of_another_kind_point_to_custom_and_back(tmp_path: Path) -> None:
    write_folder({"entities.csv": b"id,name\n", "mentions.csv": b"mention,sentence,answer\n"}, tmp_path / "own")
    with pytest.raises(ArchiveError, match="look like your own tables: give `custom` as the data set"):
        open_source("wikidiverse", tmp_path / "own", Report())
    report = Report()
    open_source("custom", write_folder(sound_archive(), tmp_path / "mimic"), report)
    assert "prepare wikimel, richpediamel or wikidiverse" in report.examples["missing_file"][0]


@pytest.mark.parametrize(
    "reference", ["x/a.png", "x\\a.png", "./x/a.png", "x//a.png", "X/a.png", "images/x/a.png", ".\\Images\\X\\A.PNG"]
)
def test_a_reference_in_any_form_finds_its_image(tmp_path: Path, reference: str) -> None:
    row = {"mention": "Ann", "sentence": "Ann", "answer": "e1", "image": reference}
    images = {"images/x/a.png": noise(1, (2, 2)), "images/y/a.png": noise(2, (2, 2))}
    source, report = own(tmp_path, {"train.jsonl": own_lines(row), **images})
    assert [row.image.read() for row in all_mentions(source, report)["train"]] == [noise(1, (2, 2))]
    assert report.counts == {}


@pytest.mark.parametrize(
    ("mention", "sentence", "span"),
    [("Ann", "Ann", (0, 3)), ("nn", "Ann", (1, 3)), ("a", "aa", (None, None)), ("x", "Ann", (None, None)),
     ("", "Ann", (None, None)), ("aa", "aaa", (None, None)), ("東京", "in 東京", (3, 5))],
)  # fmt: skip
def test_where_a_mention_is_in_its_sentence(
    tmp_path: Path, mention: str, sentence: str, span: tuple[int | None, int | None]
) -> None:
    row = {"mention": mention, "sentence": sentence, "answer": "e1"}
    source, _ = own(tmp_path, {"train.jsonl": own_lines(row)})
    assert [(row.start, row.end) for row in all_mentions(source)["train"]] == [span]


def test_a_stated_place_tells_equal_words_apart(tmp_path: Path) -> None:
    rows = [{"mention": "a", "sentence": "a b a", "answer": "e1", "start": start, "end": end} for start, end in
            ((4, 5), ("0", "1"), (2, 3), (None, None), (-1, 99))]  # fmt: skip
    source, report = own(tmp_path, {"train.jsonl": own_lines(*rows)})
    assert [(row.start, row.end) for row in all_mentions(source, report)["train"]] == [
        (4, 5), (0, 1), (None, None), (None, None), (None, None)
    ]  # fmt: skip
    assert report.counts == {"wrong_span": 2}


def test_an_answer_that_is_nearly_an_id(tmp_path: Path) -> None:
    """Numbers are the ids that write them, fractions that are whole too; texts are what they are, and the finding says
    which id may be meant."""
    answers = [1, 1.0, "1", " 1", "1.0", "2", 1.5]
    rows = [{"mention": "Ann", "sentence": "Ann", "answer": answer, "split": "test"} for answer in answers]
    files = {
        "entities.jsonl": b'{"id": 1, "name": "Ann"}\n',
        "mentions.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }
    _, found = findings("custom", write_folder(files, tmp_path / "data"), tmp_path)
    wrong = [item for item in found if item[0] in ("answer_without_entity", "bad_row")]
    assert [(kind, row) for kind, _, row in wrong] == [
        ("answer_without_entity", 4),
        ("answer_without_entity", 5),
        ("answer_without_entity", 6),
        ("bad_row", 7),
    ]
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    details = [line["detail"] for line in lines if line["kind"] == "answer_without_entity"]
    assert ["but '1' is" in detail for detail in details] == [True, True, False]

"""The archives of the MIMIC authors: sound ones give their rows however packed, bad ones the report they deserve."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mel_archives import (
    PACKINGS,
    an_image,
    entity,
    mention,
    noise,
    png_claiming,
    sound_archive,
    to_json,
    write_folder,
    zip_bytes,
    zip_folders,
)
from source_rows import findings, rows_of

from mimic_el.datasets_scripts import source as source_module
from mimic_el.datasets_scripts.archives import ArchiveError
from mimic_el.datasets_scripts.builders import encode, features_of
from mimic_el.datasets_scripts.image_files import ImageFile
from mimic_el.datasets_scripts.prepare import CONFIGS, Options, check_images
from mimic_el.datasets_scripts.report import Report
from mimic_el.datasets_scripts.sources import open_source

SHARED = Path(__file__).parents[2] / "shared" / "data"


SOUND_ROWS = {
    "kb": [
        {"id": "0", "qid": "Q0", "name": "Anna Alpha", "description": "About Anna%20Alpha.",
         "images": [an_image(1), an_image(2)]},
        {"id": "1", "qid": "Q1", "name": "Ben Beta", "description": "About Ben Beta.", "images": [an_image(3)]},
        {"id": "2", "qid": "Q2", "name": "Café Gamma", "description": "About Caf%C3%A9 Gamma.", "images": []},
        {"id": "3", "qid": "Q3", "name": "Dora", "description": "About Dora.", "images": [an_image(4)]},
    ],
    "train": [
        {"id": "train-0", "mention": "Anna", "sentence": "Anna at work", "answer": "0", "image": an_image(5),
         "source_id": None},
        {"id": "train-1", "mention": "Ben Beta", "sentence": "Here is Ben Beta.", "answer": "1", "image": an_image(6),
         "source_id": None},
        {"id": "train-2", "mention": "Gamma", "sentence": "A Gamma.", "answer": "2", "image": None, "source_id": None},
    ],
    "validation": [
        {"id": "validation-0", "mention": "Dora", "sentence": "Dora", "answer": "3", "image": None, "source_id": None}
    ],
    "test": [
        {"id": "test-0", "mention": "Anna", "sentence": "Anna again", "answer": "0", "image": an_image(5),
         "source_id": None}
    ],
}  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
def test_sound_archive_in_every_packing(tmp_path: Path, packing: str) -> None:
    report = Report()
    source = open_source("wikimel", PACKINGS[packing](sound_archive(), tmp_path), report)
    assert rows_of(source) == SOUND_ROWS
    assert report.counts == {}
    source.close()


@pytest.mark.parametrize(
    ("name", "prefix", "folder"),
    [
        ("wikimel", "WIKIMEL_", "mention_image"),
        ("wikimel", "", "mention_image"),
        ("richpediamel", "RichpediaMEL_", "mention_images"),
        ("wikidiverse", "wiki_diverse_", "mention_image"),
        ("wikidiverse", "WikiDiverse_", "mention_image"),
    ],
)
def test_names_that_archives_use(tmp_path: Path, name: str, prefix: str, folder: str) -> None:
    source = open_source(name, write_folder(sound_archive(prefix, folder), tmp_path), Report())
    assert rows_of(source) == SOUND_ROWS


def test_one_data_set_among_three(tmp_path: Path) -> None:
    write_folder(sound_archive("RichpediaMEL_"), tmp_path / "A")
    write_folder({**sound_archive(), "WIKIMEL_dev.json": to_json([])}, tmp_path / "B")
    write_folder(sound_archive("wiki_diverse_"), tmp_path / "C")
    source = open_source("wikimel", tmp_path, Report())
    assert len(list(source.mentions("validation", Report()))) == 0
    assert len(list(source.mentions("train", Report()))) == 3


def planted_archive(folder: Path) -> Path:
    """An archive with everything wrong that still lets it be used, in the layout of RichpediaMEL."""
    kb: list[Any] = [
        entity(0, "Anna%20Alpha", ["Q0.jpg", "Q0.jpg"]),
        entity(1, "Ben Beta", ["gone.jpg", "Q0.jpg"]),  # missing_image
        entity(2, "C", ["truncated.png"]),  # unreadable_image
        entity(3, "D", ["bomb.png"]),  # oversized_image
        entity(4, "E", ["folder.jpg"]),  # image_not_a_file
        entity(5, "F", ["../secret.jpg"]),  # unsafe_image_path
        entity(6, "G", ["/etc/secret.jpg"]),  # unsafe_image_path
        entity(7, "H", ["out.jpg"]),  # unsafe_image_path: a link that leaves the folder
        entity(8, "I", ["in.jpg"]),  # a link that stays in it
        entity(0, "Again", []),  # duplicate_entity_id
        "text",  # bad_entity
        entity(9, "J", [], type="relation"),  # bad_entity
        entity(10, "K", [], entity_name=None),  # bad_entity
        entity(11, "L", [], qid="Q0"),  # duplicate_qid
        entity(12, "M", [], attr=None, image_list="Q0.jpg", qid=7),  # bad_field three times
        entity(13, "N \ud800", [], attr="About N", extra=1),  # broken_text, and a field that is not carried over
        entity(14, "%E9t%E9", []),  # broken_text: URL-encoded Latin-1
        entity(15, "O", ["note.jpg"]),  # unreadable_image
        entity(16, "P", [5, "Q0.jpg"]),  # bad_field
    ]
    anna = ("Anna", "Anna at work", "Q0")
    train: list[Any] = [
        mention(*anna, "images/m0.png", id="7", entities="Anna"),  # found with .jpg
        mention(*anna, ""),
        mention("Nobody", "Nobody", "nil"),  # nil_answer
        mention("X", "X", "Q98"),  # answer_without_entity: not in qid2id.json
        mention("X", "X", "Q99"),  # answer_without_entity: not in kb_entity.json
        {"mentions": "X", "answer": "Q0", "imgPath": ""},  # bad_row
        [],  # bad_row
        mention(*anna, "M1.JPG"),  # found in another case
        mention(*anna, "m2.gif"),  # found with another extension
        mention(*anna, "../../secret.jpg"),  # unsafe_image_path
        mention(*anna, "gone.jpg"),  # missing_image
        mention("Bob", "Anna at work", "Q0", id="7"),  # mention_not_in_sentence, duplicate_mention_id
        mention("%0A", "Anna at work", "Q0"),  # empty_mention, mention_not_in_sentence
        {**mention(*anna), "imgPath": None},  # bad_field
        mention(*anna, "m0.v2.png"),  # found with .jpg
        mention(*anna, "empty.jpg"),  # unreadable_image
    ]
    files = {
        "kb_entity.json": json.dumps(kb).encode(),
        "qid2id.json": b'{"Q0": 0, "Q1": 9, "Q1": 1, "Q99": 99, "nil": -1}\n',  # duplicate_key
        "RichpediaMEL_train.json": json.dumps(train).encode(),
        "RichpediaMEL_dev.json": to_json([mention("Bén", "Bén", "Q1")], "utf-8-sig"),
        "RichpediaMEL_test.json": to_json([mention("Bén", "Bén", "Q1")], "utf-16"),
        "kb_image/Q0.jpg": an_image(1),
        "kb_image/truncated.png": noise(0)[:-6000],
        "kb_image/bomb.png": png_claiming(50_000, 50_000),
        "kb_image/folder.jpg/inner.txt": b"",
        "kb_image/note.jpg": b"The image was removed.",
        "mention_images/m0.jpg": an_image(2),
        "mention_images/m1.jpg": an_image(3),
        "mention_images/m2.webp": an_image(4, format="WEBP"),
        "mention_images/empty.jpg": b"",
    }
    data = write_folder(files, folder / "data")
    write_folder({"secret.jpg": an_image()}, folder)
    (data / "kb_image" / "out.jpg").symlink_to(folder / "secret.jpg")
    (data / "kb_image" / "in.jpg").symlink_to("Q0.jpg")
    return data


def test_every_planted_problem_is_reported_and_nothing_else(tmp_path: Path) -> None:
    report, found = findings("richpediamel", planted_archive(tmp_path), tmp_path)
    kb, train = "kb_entity.json", "RichpediaMEL_train.json"
    jsons = (kb, "qid2id.json", train, "RichpediaMEL_dev.json", "RichpediaMEL_test.json")
    expected = [
        ("duplicate_key", "qid2id.json", None),
        *(("md5_differs", name, None) for name in jsons),
        ("size_differs", "test mentions", None),
        ("size_differs", "entities", None),
        ("missing_image", kb, 1),
        ("unreadable_image", kb, 2),
        ("oversized_image", kb, 3),
        ("image_not_a_file", kb, 4),
        ("unsafe_image_path", kb, 5),
        ("unsafe_image_path", kb, 6),
        ("unsafe_image_path", kb, 7),
        ("duplicate_entity_id", kb, 9),
        ("bad_entity", kb, 10),
        ("bad_entity", kb, 11),
        ("bad_entity", kb, 12),
        ("duplicate_qid", kb, 13),
        *[("bad_field", kb, 14)] * 3,
        ("broken_text", kb, 15),
        ("broken_text", kb, 16),
        ("unreadable_image", kb, 17),
        ("bad_field", kb, 18),
        ("nil_answer", train, 2),
        ("answer_without_entity", train, 3),
        ("answer_without_entity", train, 4),
        ("bad_row", train, 5),
        ("bad_row", train, 6),
        ("unsafe_image_path", train, 9),
        ("missing_image", train, 10),
        ("mention_not_in_sentence", train, 11),
        ("duplicate_mention_id", train, 11),
        ("sentence_in_several_splits", "RichpediaMEL_test.json", 0),
        ("empty_mention", train, 12),
        ("mention_not_in_sentence", train, 12),
        ("bad_field", train, 13),
        ("unreadable_image", train, 15),
    ]
    assert Counter(found) == Counter(expected)
    plain = report.to_dict()
    assert plain["mentions"] == {"train": 11, "validation": 1, "test": 1}
    assert plain["mentions_with_image"] == {"train": 4, "validation": 0, "test": 0}
    assert plain["distinct_answers"] == {"train": 1, "validation": 1, "test": 1}
    assert plain["entities"] == 15
    assert plain["entities_with_image"] == 4
    assert plain["entity_images"] == 5
    assert plain["entities_with_qid"] == 14
    assert plain["entities_with_description"] == 14
    assert plain["images_found_by"] == {"exact": 5, "jpg": 2, "case": 1, "extension": 1}
    assert plain["fields_left_out"] == {"entities: extra": 1, "mentions: entities": 1}
    assert plain["published"] == {
        "test mentions": {"found": 1, "published": 3_562},
        "entities": {"found": 15, "published": 160_933},
    }
    assert str(tmp_path) not in json.dumps(plain)


def test_rows_of_the_planted_archive(tmp_path: Path) -> None:
    source = open_source("richpediamel", planted_archive(tmp_path), Report())
    check_images(source, Options(num_workers=2))
    rows = rows_of(source)
    assert rows["kb"][0]["images"] == [an_image(1)] * 2
    assert rows["kb"][1]["images"] == [an_image(1)]
    assert [row["images"] for row in rows["kb"][2:8]] == [[]] * 6
    assert rows["kb"][8]["images"] == [an_image(1)]
    assert [row["name"] for row in rows["kb"]][-4:] == ["N \ufffd", "\ufffdt\ufffd", "O", "P"]
    assert rows["train"][0]["source_id"] == "7"
    images = [row["image"] for row in rows["train"] if row["image"]]
    assert images == [an_image(2), an_image(3), an_image(4, format="WEBP"), an_image(2)]
    assert rows["test"][0] | {"id": ""} == rows["validation"][0] | {"id": ""}


def zip_with_hostile_members() -> bytes:
    return zip_bytes({"Q1_0.jpg": an_image(3), "../Q0_0.jpg": an_image(1), "Q0_1.jpg": bytes(5 << 20)})


def test_hostile_members_of_an_image_archive(tmp_path: Path) -> None:
    files = {name: data for name, data in sound_archive().items() if not name.startswith("kb_image/")}
    write_folder({**files, "kb_image.zip": zip_with_hostile_members()}, tmp_path / "data")
    report, found = findings("wikimel", tmp_path / "data", tmp_path)
    kb = "kb_entity.json"
    assert Counter(found) == {
        ("unsafe_member", "kb_image.zip", None): 2,
        ("unsafe_image_path", kb, 0): 1,
        ("oversized_image", kb, 0): 1,
        ("missing_image", kb, 3): 1,
        ("size_differs", "test mentions", None): 1,
        ("size_differs", "entities", None): 1,
    }
    assert report.to_dict()["entity_images"] == 1


def without(name: str) -> dict[str, bytes | None]:
    return {name: None}


@pytest.mark.parametrize(
    ("changes", "kind", "file", "detail"),
    [
        (without("kb_entity.json"), "missing_file", "kb_entity.json", "not in"),
        (without("qid2id.json"), "missing_file", "qid2id.json", "there are WIKIMEL_dev.json, WIKIMEL_test.json"),
        (without("WIKIMEL_dev.json"), "missing_file", "WikiMEL_dev.json", "there are"),
        ({"WIKIMEL_test.json": b'[{"mentions": "a",\n "b"}]'}, "broken_json", "WIKIMEL_test.json", "line 2, column 5"),
        ({"WIKIMEL_dev.json": '["中文"]'.encode("gbk")}, "wrong_encoding", "WIKIMEL_dev.json", "convert the file"),
        ({"kb_entity.json": b"{}"}, "wrong_structure", "kb_entity.json", "is a JSON object; should be a list"),
        ({"qid2id.json": b"[]"}, "wrong_structure", "qid2id.json", "is a JSON list; should be an object"),
        ({"kb_image.zip": b"PK no"}, "broken_archive", "kb_image.zip", "not a readable zip"),
    ],
)
def test_fatal_findings(tmp_path: Path, changes: dict[str, bytes | None], kind: str, file: str, detail: str) -> None:
    files = {name: data for name, data in {**sound_archive(), **changes}.items() if data is not None}
    report = Report()
    open_source("wikimel", write_folder(files, tmp_path), report)
    assert report.fatal == {kind: 1}
    assert report.examples[kind][0].startswith(f"{file}: ")
    assert detail in report.examples[kind][0]


def test_all_fatal_findings_are_named_at_once(tmp_path: Path) -> None:
    files = sound_archive()
    del files["WIKIMEL_train.json"]
    files = {name: data for name, data in files.items() if not name.startswith("mention_image")}
    report, _ = findings("wikimel", write_folder(files | {"WIKIMEL_dev.json": b"["}, tmp_path / "data"), tmp_path)
    assert report.fatal == {"missing_file": 2, "broken_json": 1}
    assert report.statistics.entities == 4  # what can be checked is


def test_folder_in_place_of_a_file_and_a_link_out_of_the_archive(tmp_path: Path) -> None:
    files = sound_archive()
    data = write_folder(files, tmp_path / "data")
    (data / "qid2id.json").unlink()
    (data / "qid2id.json").mkdir()
    (data / "kb_image").rename(tmp_path / "elsewhere")
    (data / "kb_image").symlink_to(tmp_path / "elsewhere")
    report = Report()
    open_source("wikimel", data, report)
    assert report.fatal == {"not_a_file": 1, "unsafe": 1}


def test_archive_of_images_that_is_a_link_out_of_the_folder_is_named(tmp_path: Path) -> None:
    files = zip_folders(sound_archive())
    data = write_folder(files, tmp_path / "data")
    (data / "kb_image.zip").rename(tmp_path / "elsewhere.zip")
    (data / "kb_image.zip").symlink_to(tmp_path / "elsewhere.zip")
    report = Report()
    open_source("wikimel", data, report)
    assert report.fatal == {"unsafe": 1}
    assert (
        "kb_image.zip: is a symbolic link that leaves the folder; put it there itself" in report.examples["unsafe"][0]
    )


def test_missing_images_folder_can_be_accepted(tmp_path: Path) -> None:
    files = {name: data for name, data in sound_archive().items() if "/" not in name}
    write_folder(files, tmp_path)
    report = Report()
    open_source("wikimel", tmp_path, report)
    assert report.fatal == {"missing_file": 2}
    assert "--without_images" in report.examples["missing_file"][0]
    report = Report()
    source = open_source("wikimel", tmp_path, report, use_images=False)
    assert not report.fatal
    assert report.counts == {"no_images": 1}
    assert [row["image"] for row in rows_of(source)["train"]] == [None] * 3


def test_wrong_place_says_what_is_there(tmp_path: Path) -> None:
    write_folder({"notes.txt": b"", "other.json": b"[]"}, tmp_path)
    with pytest.raises(ArchiveError, match=r"no WikiMEL in .*it holds notes\.txt, other\.json"):
        open_source("wikimel", tmp_path, Report())
    with pytest.raises(ArchiveError, match="looked for kb_entity"):
        open_source("wikimel", tmp_path, Report(), source="published")
    with pytest.raises(ValueError, match="'wikimell' is not a data set; choose one of wikimel, "):
        open_source("wikimell", tmp_path, Report())


def test_an_entity_with_more_images_than_a_cell_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "MAX_ROW_IMAGE_BYTES", len(an_image(1)) + 10)
    report, found = findings("wikimel", write_folder(sound_archive(), tmp_path / "data"), tmp_path)
    assert ("oversized_image", "kb_entity.json", 0) in found
    assert report.to_dict()["entity_images"] == 3


def test_published_sums_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sound_archive("RichpediaMEL_", "mention_images")
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    benchmark = replace(source_module.BENCHMARKS["richpediamel"], md5=sums | {"qid2id.json": "0" * 32})
    monkeypatch.setitem(source_module.BENCHMARKS, "richpediamel", benchmark)
    report = Report()
    open_source("richpediamel", write_folder(files, tmp_path), report)
    assert report.counts == {"md5_differs": 1}
    assert report.files["kb_entity.json"]["md5"] == report.files["kb_entity.json"]["expected_md5"]
    assert "qid2id.json (DIFFERS)" in report.text()
    assert "kb_entity.json (as published)" in report.text()


def test_archives_of_images_are_hashed(tmp_path: Path) -> None:
    source = open_source("wikimel", PACKINGS["tar of zips"](sound_archive(), tmp_path), Report())
    report = Report()
    read: list[int] = []
    source.hash_archives(report, read.append)
    archives = {name: data for name, data in zip_folders(sound_archive()).items() if name.endswith(".zip")}
    expected = {name: hashlib.md5(data).hexdigest() for name, data in archives.items()}
    assert {name: facts["md5"] for name, facts in report.files.items()} == expected
    assert sum(read) == source.archive_bytes == sum(map(len, archives.values()))


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    def fingerprint(**options: Any) -> str:
        source = open_source("wikimel", tmp_path, Report(), **options)
        source.close()
        return source.fingerprint()

    write_folder(sound_archive(), tmp_path)
    first = fingerprint()
    (tmp_path / "unrelated.txt").write_text("")
    assert fingerprint() == first
    assert fingerprint(use_images=False) != first
    (tmp_path / "kb_image" / "Q3_0.jpg").write_bytes(an_image(9, (9, 9)))
    assert fingerprint() != first


# Anything that JSON can hold, with what the formats expect among it.
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["Q0", "nil", "entity", "../a", "\ud800", "m0.jpg", "https://en.wikipedia.org/wiki/A", "%ff"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
RECORDS = {
    "wikimel": st.fixed_dictionaries({}, optional=dict.fromkeys([*mention("", "", ""), "id"], ANYTHING)),
    "entities": st.fixed_dictionaries({}, optional=dict.fromkeys(entity(0, "", []), ANYTHING)),
    "melbench": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["sentence", "mentions", "entities", "answer"], ANYTHING)
    ),
    "wikidiverse": st.lists(ANYTHING, max_size=12),
    "custom": st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ["mention", "sentence", "answer", "image", "split", "id", "start", "end", "kind", "own"], ANYTHING
        ),
    ),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_row_breaks_a_format(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is in the files, every row is either given, storable, or reported."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    name = data.draw(st.sampled_from(["wikimel", "melbench", "wikidiverse", "custom"]))
    rows = data.draw(st.lists(ANYTHING | RECORDS[name], max_size=6))
    files = sound_archive()
    if name == "wikimel":
        entities = data.draw(st.lists(ANYTHING | RECORDS["entities"], max_size=4))
        files["kb_entity.json"] = json.dumps([entity(0, "A", []), *entities]).encode()
        files["WIKIMEL_train.json"] = json.dumps(rows).encode()
    elif name == "melbench":
        files = {"Wikidata-MEL.json": json.dumps(dict(enumerate(rows))).encode()}
    elif name == "custom":
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files = {"entities.csv": b"id,name\nQ0,A\n", "mentions.jsonl": lines.encode(), "images/m0.jpg": an_image()}
    else:
        tables = dict.fromkeys(("valid.json", "test.json"), b"[]")
        files = {**tables, "train.json": json.dumps([[], *rows]).encode(), "images/m0.jpg": an_image()}
    report = Report()
    keep_nil = data.draw(st.booleans())
    place = write_folder(files, folder)
    source = open_source(name.replace("melbench", "wikimel"), place, report, keep_nil=keep_nil)
    kept = 0
    for config, splits in CONFIGS.items():
        for split in splits:
            encoded = [encode(row, ImageFile.read) for row in source.rows(config, split, report)]
            batch = pa.RecordBatch.from_pylist(encoded, features_of(config, source).arrow_schema)
            assert batch.num_rows == len(encoded)
            if config == "mentions":
                kept += len(encoded)
                assert {row["answer"] for row in encoded} <= source.entity_ids | ({None} if keep_nil else set())
                for row in encoded:
                    if row["start"] is not None:
                        assert row["sentence"][row["start"] : row["end"]] == row["mention"]
    # No row is lost without a finding.
    out = sum(report.counts[kind] for kind in ("bad_row", "answer_without_entity", "nil_answer"))
    assert report.read["mentions"] == kept + out
    report.text().encode()
    json.dumps(report.to_dict())

"""The format of MELBench: `Wikidata-MEL.json` and `Richpedia-MEL.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .archives import ArchiveError, Tree
from .image_files import ImageFile
from .report import Report
from .source import Benchmark, ClosedSource, EntityRow, MentionRow, is_nil, json_type, whole
from .splits import GroupedSplits


class MelBench(ClosedSource):
    """MELBench's `Wikidata-MEL.json` or `Richpedia-MEL.json`: records by id, each with one mention or several.

    Images, where the folder has any, are named by the record's id. The file has no splits: a record is in the split
    that its id draws, together with the others of its sentence (see [`GroupedSplits`]).
    """

    format = "MELBench's original file"

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, **options: bool):
        super().__init__(benchmark, trees, prefix, report, **options)
        self._report_unsafe_members()
        wanted = str(benchmark.melbench_file)
        self._file = next((name for name in self._names_here if name.lower() == wanted.lower()), wanted)
        records = self._load(self._file, wanted, dict, "an object of id: record")
        self._records: dict[str, Any] = records or {}
        groups = GroupedSplits()
        for key, record in self._records.items():
            sentence = record.get("sentence") if isinstance(record, dict) else None
            groups.add(key, sentence if isinstance(sentence, str) else key, None, None)
        self._splits = {key: groups.split(number) for number, key in enumerate(self._records)}
        self._optional_images()

    @staticmethod
    def _parts(record: Any) -> list[tuple[str, str, str | None]] | str:
        """`(mention, entity name, qid)` for each mention of a record, `None` for no entity; or what is wrong."""
        if not isinstance(record, dict):
            return f"is {json_type(record)}, not an object"
        if not isinstance(record.get("sentence"), str):
            return f"sentence is {json_type(record.get('sentence'))}, not a string"
        lists: list[list[Any]] = []
        for name in ("mentions", "entities", "answer"):
            value = record.get(name)
            if value is None and name not in record:
                return f"{name} is missing"
            lists.append(value if isinstance(value, list) else [value])
        if len({len(values) for values in lists}) > 1:
            return "mentions, entities and answer have {}, {} and {} items".format(*map(len, lists))
        parts = []
        for mention, name, qid in zip(*lists, strict=True):
            qid = None if is_nil(qid) else qid
            needed = {"mentions": mention, **({} if qid is None else {"entities": name, "answer": qid})}
            for field, value in needed.items():
                if not isinstance(value, str):
                    return f"{field} holds {json_type(value)}, not a string"
            parts.append((mention, name, qid))
        return parts

    def entities(self, report: Report) -> Iterator[EntityRow]:
        names: dict[str, str] = {}
        for key, record in self._records.items():
            parts = self._parts(record)
            for _, name, qid in () if isinstance(parts, str) else parts:
                if qid is None:
                    continue
                qid = self._clean(qid, report, self._file, key, "answer")
                if qid not in names:
                    names[qid] = name
                    name = self._clean(name, report, self._file, key, "entities")
                    yield EntityRow(self._file, key, qid, qid, name, "", [])
                elif names[qid] != name:
                    report.add("conflicting_name", self._file, key, f"{qid} is {names[qid]!r} and {name!r}")

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        for key, record in self._records.items():
            if self._splits[key] != split:
                continue
            parts = self._parts(record)
            report.read["mentions"] += 1 if isinstance(parts, str) else len(parts)
            if isinstance(parts, str):
                report.add("bad_row", self._file, key, parts)
                continue
            sentence = self._clean(record["sentence"], report, self._file, key, "sentence")
            record_id = self._clean(key, report, self._file, key, "id")
            image = self._image_of(record_id, report, key)
            report.leave_out("mentions", record.keys() - {"id", "sentence", "mentions", "entities", "answer"})
            for number, (mention, _, qid) in enumerate(parts):
                if qid is None and self._leaves_nil(mention, report, self._file, key):
                    continue
                mention = self._clean(mention, report, self._file, key, "mentions")
                start, end = self._span(mention, sentence, report, self._file, key)
                yield MentionRow(
                    self._file,
                    key,
                    f"{record_id}-{number}",
                    mention,
                    sentence,
                    None if qid is None else whole(qid),
                    image,
                    start,
                    end,
                    {"source_id": record_id},
                )

    def _image_of(self, record_id: str, report: Report, key: str) -> ImageFile | None:
        if self.mention_images is None:
            return None
        try:
            self.mention_images.find(f"{record_id}.jpg")
        except ArchiveError as error:
            if error.kind == "missing_image":  # nothing in the record says that it has one
                return None
        return self._image(self.mention_images, f"{record_id}.jpg", report, self._file, key)

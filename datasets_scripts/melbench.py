"""The format of MELBench: `Wikidata-MEL.json` and `Richpedia-MEL.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .archives import ArchiveError, ImageFile, Tree
from .report import Report
from .source import Benchmark, ClosedSource, EntityRow, MentionRow, is_nil, json_type, split_of, whole


class MelBench(ClosedSource):
    """MELBench's `Wikidata-MEL.json` or `Richpedia-MEL.json`: records by id, each with one mention or several.

    Images, where the folder has any, are named by the record's id. The file has no splits: see [`split_of`].
    """

    format = "MELBench's original file"

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        super().__init__(benchmark, trees, prefix, report, use_images)
        self._report_unsafe_members()
        wanted = str(benchmark.melbench_file)
        self._file = next((name for name in self._names_here if name.lower() == wanted.lower()), wanted)
        records = self._load(self._file, wanted, dict, "an object of id: record")
        self._records: dict[str, Any] = records or {}
        self._optional_images()

    @staticmethod
    def _parts(record: Any) -> list[tuple[str, str, str]] | str:
        """`(mention, entity name, qid)` for each mention of a record, or what is wrong with it."""
        if not isinstance(record, dict):
            return f"is {json_type(record)}, not an object"
        if not isinstance(record.get("sentence"), str):
            return f"sentence is {json_type(record.get('sentence'))}"
        lists = []
        for name in ("mentions", "entities", "answer"):
            value = record.get(name)
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
                return f"{name} is neither a string nor a list of strings"
            lists.append(values)
        if len({len(values) for values in lists}) > 1:
            return "mentions, entities and answer have {}, {} and {} items".format(*map(len, lists))
        if not all(answer.strip() for answer in lists[2]):
            return "an answer is empty"
        return list(zip(*lists, strict=True))

    def entities(self, report: Report) -> Iterator[EntityRow]:
        names: dict[str, str] = {}
        for key, record in self._records.items():
            parts = self._parts(record)
            for _, name, qid in () if isinstance(parts, str) else parts:
                if is_nil(qid):
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
            if split_of(key) != split:
                continue
            parts = self._parts(record)
            if isinstance(parts, str):
                report.add("bad_row", self._file, key, parts)
                continue
            sentence = self._clean(record["sentence"], report, self._file, key, "sentence")
            record_id = self._clean(key, report, self._file, key, "id")
            image = self._image_of(record_id, report, key)
            report.leave_out("mentions", record.keys() - {"id", "sentence", "mentions", "entities", "answer"})
            for number, (mention, _, qid) in enumerate(parts):
                if is_nil(qid):
                    report.add("nil_answer", self._file, key, f"mention {mention[:80]!r}")
                    continue
                mention = self._clean(mention, report, self._file, key, "mentions")
                self._check_mention(mention, sentence, report, self._file, key)
                yield MentionRow(
                    self._file,
                    key,
                    f"{record_id}-{number}",
                    mention,
                    sentence,
                    whole(qid),
                    image,
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

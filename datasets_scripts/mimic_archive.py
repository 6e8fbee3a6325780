"""The format that the authors of MIMIC publish, with a knowledge base of names, descriptions and images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .archives import Tree
from .report import Report
from .source import Benchmark, EntityRow, MentionRow, Source, id_text, is_nil, json_type
from .splits import SPLIT_WORDS


class MimicArchive(Source):
    """The archives of the MIMIC authors: `kb_entity.json`, `qid2id.json`, three files of mentions, two of images."""

    format = "the archive of the MIMIC authors"
    _MENTION_FIELDS = frozenset({"id", "mentions", "sentence", "imgPath", "answer"})
    _ENTITY_FIELDS = frozenset({"id", "type", "qid", "entity_name", "attr", "image_list"})

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, **options: bool):
        super().__init__(benchmark, trees, prefix, report, **options)
        self._report_unsafe_members()
        self._kb: list | None = self._load("kb_entity.json", "kb_entity.json", list, "a list of entities")
        self._answers: dict | None = self._load("qid2id.json", "qid2id.json", dict, "an object of answer: entity id")
        self._files: dict[str, str] = {}
        self._mentions: dict[str, list | None] = {}
        for split, words in SPLIT_WORDS.items():
            name = self._split_file(split)
            expected = f"{benchmark.pretty_name}_{words[0]}.json"
            self._files[split] = name or expected
            self._mentions[split] = self._load(name, expected, list, "a list of mentions")
        self.mention_images = self._required_images(("mention_image", "mention_images"))
        self.entity_images = self._required_images(("kb_image", "kb_images"))
        if not self.use_images:
            report.add("no_images", benchmark.name, detail="images left out on request")

    def entities(self, report: Report) -> Iterator[EntityRow]:
        file = "kb_entity.json"
        ids: set[str] = set()
        qids: set[str] = set()
        for row, item in enumerate(self._kb or ()):
            report.read["entities"] += 1
            problem = self._entity_problem(item)
            if problem:
                report.add("bad_entity", file, row, problem)
                continue
            id_ = self._clean(str(item["id"]), report, file, row, "id")
            if id_ in ids:
                report.add("duplicate_entity_id", file, row, f"id {id_}")
                continue
            ids.add(id_)
            qid = item.get("qid") or None
            if qid is not None and not isinstance(qid, str):
                report.add("bad_field", file, row, f"qid is a JSON {json_type(qid)}")
                qid = None
            if qid is not None:
                qid = self._clean(qid, report, file, row, "qid")
                if qid in qids:
                    report.add("duplicate_qid", file, row, qid)
                qids.add(qid)
            description = item.get("attr")
            if not isinstance(description, str):
                report.add("bad_field", file, row, f"attr is {json_type(description)}")
                description = ""
            images = item.get("image_list")
            if not isinstance(images, list):
                report.add("bad_field", file, row, f"image_list is {json_type(images)}")
                images = []
            for image in images:
                if not isinstance(image, str):
                    report.add("bad_field", file, row, f"image_list holds {json_type(image)}")
            report.leave_out("entities", item.keys() - self._ENTITY_FIELDS)
            yield EntityRow(
                file,
                row,
                id_,
                qid,
                self._unquote(item["entity_name"], report, file, row, "entity_name"),
                self._clean(description, report, file, row, "attr"),
                self._images(
                    self.entity_images, [image for image in images if isinstance(image, str)], report, file, row
                ),
            )

    @staticmethod
    def _entity_problem(item: Any) -> str | None:
        if not isinstance(item, dict):
            return f"is {json_type(item)}, not an object"
        if item.get("type", "entity") != "entity":
            return f"type is {str(item['type'])[:40]!r}, not 'entity'"
        if id_text(item.get("id")) is None:
            return f"id is {json_type(item.get('id'))}, not a number"
        if not isinstance(item.get("entity_name"), str):
            return f"entity_name is {json_type(item.get('entity_name'))}, not a string"
        return None

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        file = self._files[split]
        seen: set[str] = set()
        for row, item in enumerate(self._mentions[split] or ()):
            report.read["mentions"] += 1
            if not isinstance(item, dict):
                report.add("bad_row", file, row, f"is {json_type(item)}, not an object")
                continue
            nil = "answer" in item and is_nil(item["answer"])
            needed = ("mentions", "sentence", *(() if nil else ("answer",)))
            wrong = [name for name in needed if not isinstance(item.get(name), str)]
            if wrong:
                report.add("bad_row", file, row, "; ".join(f"{name} is {json_type(item.get(name))}" for name in wrong))
                continue
            answer = None
            if nil:
                if self._leaves_nil(item["mentions"], report, file, row):
                    continue
            elif (answer := self._entity_of(item["answer"], report, file, row)) is None:
                continue
            mention = self._unquote(item["mentions"], report, file, row, "mentions")
            sentence = self._clean(item["sentence"], report, file, row, "sentence")
            span = self._span(mention, sentence, report, file, row)
            image = None
            path = item.get("imgPath")
            if not isinstance(path, str):
                report.add("bad_field", file, row, f"imgPath is {json_type(path)}")
            elif path:
                image = self._image(self.mention_images, path, report, file, row, moved=True)
            source_id = item.get("id")
            if source_id is not None:
                source_id = self._clean(str(source_id), report, file, row, "id")
                if source_id in seen:
                    report.add("duplicate_mention_id", file, row, f"id {source_id}")
                seen.add(source_id)
            report.leave_out("mentions", item.keys() - self._MENTION_FIELDS)
            extra = {"source_id": source_id}
            yield MentionRow(file, row, f"{split}-{row}", mention, sentence, answer, image, *span, extra)

    def _entity_of(self, answer: str, report: Report, file: str, row: int) -> str | None:
        if self._answers is None or self._kb is None:  # reported already; nothing to check against
            return answer
        if answer not in self._answers:
            report.add("answer_without_entity", file, row, f"{answer[:80]!r} is not in qid2id.json")
            return None
        id_ = str(self._answers[answer])
        if id_ not in self.entity_ids:
            report.add(
                "answer_without_entity", file, row, f"{answer[:80]!r}: entity {id_[:40]} is not in kb_entity.json"
            )
            return None
        return id_

"""The format of your own tables, and their own columns."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from mimic_el.records_mimic import is_local_path, near_field

from .archives import READ_ERRORS, ArchiveError, Tree, normal_path
from .image_files import ImageFile
from .report import SPLITS, Report
from .source import (
    Benchmark,
    EntityRow,
    MentionRow,
    Source,
    id_text,
    int_of,
    is_nil,
    json_type,
    whole,
)
from .splits import SPLIT_WORDS, GroupedSplits, split_named
from .tables import TABLE_SUFFIXES, Table

# Columns of one's own; further ones are left out.
MAX_OWN_COLUMNS = 50
_MAX_NAME_CHARACTERS = 100

_ENTITY_FIELDS = ("id", "name", "description", "qid", "images")
_MENTION_FIELDS = ("id", "mention", "sentence", "answer", "image", "split", "start", "end")
_RESERVED = {"mentions": {*_MENTION_FIELDS, "source_id"}, "entities": {*_ENTITY_FIELDS}}
# Those that a table must have, and those that are missed where another seems to stand for them.
_NEEDED = {"mentions": ("mention", "sentence", "answer"), "entities": ("id", "name")}
_MISSED = {"mentions": (*_NEEDED["mentions"], "image"), "entities": (*_NEEDED["entities"], "description", "images")}


@dataclass
class _Fields:
    """Which fields the rows of a table have, and of what kinds their values are."""

    rows: int = 0
    present: set[str] = field(default_factory=set)
    kinds: dict[str, set[str]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        for name, value in row.items():
            if name not in self.kinds:
                if len(self.kinds) >= 1000:  # of rows that have fields of their own
                    continue
                self.kinds[name] = set()
            if value is not None and not (isinstance(value, float) and math.isnan(value)):
                self.present.add(name)
                self.kinds[name].add("path" if is_local_path(value) else _kind(value))

    def own_columns(self, table: str) -> dict[str, str]:
        """The columns of one's own that a table gets, with their types."""
        own: dict[str, str] = {}
        for name, kinds in self.kinds.items():
            if name in _RESERVED[table] or not kinds or kinds & {"other", "path"} or len(own) >= MAX_OWN_COLUMNS:
                continue
            if name.strip() and len(name) <= _MAX_NAME_CHARACTERS and name.isprintable() and whole(name) == name:
                numbers = {frozenset(["int64"]): "int64", frozenset(["bool"]): "bool"}
                is_float = kinds <= {"int64", "float64"}
                own[name] = numbers.get(frozenset(kinds)) or ("float64" if is_float else "string")
        return own


class CustomData(Source):
    """Own data: `entities` and `mentions` (or `train`, `validation`, `test`) as tables, and `images`.

    Tables are `.csv`, `.tsv`, `.jsonl` or `.json`. Columns of entities: `id`, `name`, and optionally `description`,
    `qid`, `images` (a list; in CSV separated by `|`). Columns of mentions: `mention`, `sentence`, `answer`, and
    optionally `id`, `image`, `start`, `end`, and `split` in a single file (without it, see [`GroupedSplits`]). In JSON,
    `mention` and `answer` may be lists: one mention for each item. Other columns of plain values are kept under their
    names. `images/` or `images.zip` holds the images of both.
    """

    format = "tables (CSV, TSV, JSON or JSON Lines)"

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, **options: bool):
        super().__init__(benchmark, trees, prefix, report, **options)
        self._report_unsafe_members()
        fields, table = _Fields(), self._table(("entities",), "entities")
        self._entities = table if table and self._fields(table, "entities", fields) else None
        files = {split: self._table(SPLIT_WORDS[split], "mentions", required=False) for split in SPLITS}
        self._files = {split: table for split, table in files.items() if table}
        self._shared = not self._files and not any(split in self._refused_splits() for split in SPLITS)
        if self._shared:
            shared = self._table(("mentions",), "mentions")
            self._files = dict.fromkeys(SPLITS, shared) if shared else {}
        self._groups = GroupedSplits()
        self._numbers: dict[tuple[int, int], int] = {}
        mentions = _Fields()
        usable = {table: self._fields(table, "mentions", mentions) for table in dict.fromkeys(self._files.values())}
        self._files = {split: table for split, table in self._files.items() if usable[table]}
        self.entity_columns = fields.own_columns("entities")
        self.extra_columns = {"source_id": "string", **mentions.own_columns("mentions")}
        for kind, found in (("entities", fields), ("mentions", mentions)):
            for name, kinds in found.kinds.items():
                if "path" in kinds and name not in _RESERVED[kind]:
                    report.add("local_path", kind, detail=f"column {name[:80]!r}")
        if self._shared and self._files:
            self._groups.report_images(report, self._files["train"].name)
        self.mention_images = self.entity_images = self._image_folder(("images",)) if self.use_images else None
        if not self.use_images:
            report.add("no_images", benchmark.name, detail="images left out on request")

    # Files.

    def _refused_splits(self) -> set[str]:
        """The splits whose file is there and cannot be used."""
        here = [name.lower() for name in self._names_here]
        return {
            split
            for split, words in SPLIT_WORDS.items()
            if any(f"{word}{suffix}" in here for word in words for suffix in TABLE_SUFFIXES)
        }

    def _table(self, stems: tuple[str, ...], kind: str, required: bool = True) -> Table | None:
        wanted = {f"{stem}{suffix}" for stem in stems for suffix in TABLE_SUFFIXES}
        names = [name for name in self._names_here if name.lower() in wanted]
        if len(names) > 1:
            detail = f"is in {self._place} beside {names[0]}; keep one of them"
            self.report.add("wrong_structure", names[1], detail=detail)
        elif not names and required:
            here = ", ".join(name for name in self._names_here if "/" not in name)[:200] or "nothing"
            detail = f"nor {stems[0]}.csv is in {self._place}, nor {stems[0]}.tsv or .json; it holds {here}"
            if any(name.lower() in ("kb_entity.json", "qid2id.json") for name in self._names_here):
                detail += ". This is an archive of the MIMIC authors: prepare wikimel, richpediamel or wikidiverse"
            self.report.add("missing_file", f"{stems[0]}.jsonl", detail=detail)
        if len(names) != 1:
            return None
        name, path = names[0], self.prefix + names[0]
        if path in self.tree.refused:
            refusal, reason = self.tree.refused[path]
            self.report.add(refusal, name, detail=reason)
            return None
        self._used.append((self.tree, path))
        digest = hashlib.md5()
        try:
            with self.tree.open(path) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            self._add_file(self.report, name, self.tree.files[path], digest.hexdigest())
            return Table(self.tree, path, _NEEDED[kind])
        except ArchiveError as error:
            self.report.add(error.kind, name, detail=str(error))
        except READ_ERRORS as error:
            self.report.add("unreadable", name, detail=f"{type(error).__name__}: {error}")
        return None

    def _fields(self, table: Table, kind: str, fields: _Fields) -> bool:
        """Read a table once: its fields, and of mentions without splits their groups.

        Returns:
            Whether it has the columns that are needed; those that are missed are reported.
        """
        here = _Fields()
        for row, record in table:
            items = _expanded(record) if kind == "mentions" and isinstance(record, dict) else [record]
            for number, item in enumerate([] if isinstance(items, str) else items):
                if not isinstance(item, dict):
                    continue
                here.add(item)
                fields.add(item)
                if kind == "mentions" and self._shared:
                    self._numbers[row, number] = self._grouped(item)
        columns = {*(table.header or ()), *here.kinds}
        usable = True
        for name in _MISSED[kind]:
            missing = name not in columns if name in _NEEDED[kind] else name not in here.present
            if not missing or not columns:
                continue
            near = near_field(name, [column for column in columns if column not in _RESERVED[kind]])
            if name in _NEEDED[kind]:
                hint = f"; is it called {near!r} here? Rename it" if near else ""
                names = ", ".join(sorted(columns) if table.header is None else table.header[:12])[:300]
                detail = f"has no column {name}; its columns are {names}{hint}"
                self.report.add("wrong_structure", table.name, detail=detail)
                usable = False
            elif near:
                detail = f"no row has `{name}`, and {near!r} may be meant: rename it"
                self.report.add("other_name", table.name, detail=detail)
        return usable

    def _grouped(self, item: dict[str, Any]) -> int:
        sentence, id_ = item.get("sentence"), id_text(item.get("id"))
        image = item.get("image")
        return self._groups.add(
            id_ or str(sentence),
            str(sentence),
            _image_path(image).casefold() if isinstance(image, str) and image else None,
            id_,
            split_named(item.get("split")),
        )

    # Rows.

    def entities(self, report: Report) -> Iterator[EntityRow]:
        ids: set[str] = set()
        for row, item in self._entities or ():
            assert self._entities is not None
            file = self._entities.name
            report.read["entities"] += 1
            if isinstance(item, str):
                report.add("bad_entity", file, row, item)
                continue
            id_, name = id_text(item.get("id")), item.get("name")
            wrong = [] if id_ is not None else [f"id is {_described(item, 'id')}, not a string or a whole number"]
            wrong += [] if isinstance(name, str) else [f"name is {_described(item, 'name')}, not a string"]
            if id_ is None or not isinstance(name, str):
                report.add("bad_entity", file, row, "; ".join(wrong))
                continue
            id_ = self._clean(id_, report, file, row, "id")
            if id_ in ids:
                report.add("duplicate_entity_id", file, row, f"id {id_[:80]}")
                continue
            ids.add(id_)
            images = item.get("images")
            images = [] if is_nil(images) else images
            if isinstance(images, str):
                images = [image.strip() for image in images.split("|") if image.strip()]
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                report.add("bad_field", file, row, f"images is {json_type(images)}, not a list of file names")
                images = []
            report.leave_out("entities", item.keys() - _RESERVED["entities"] - self.entity_columns.keys())
            yield EntityRow(
                file,
                row,
                id_,
                self._optional(item, "qid", report, file, row),
                self._clean(name, report, file, row, "name"),
                self._optional(item, "description", report, file, row) or "",
                self._named_images(images, report, file, row),
                self._own(item, self.entity_columns),
            )

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        table = self._files.get(split)
        seen: set[str] = set()
        for row, record in table or ():
            assert table is not None
            items = _expanded(record) if isinstance(record, dict) else record
            if isinstance(items, str):
                if split == "train" or not self._shared:  # what is broken belongs nowhere and is reported once
                    report.read["mentions"] += 1
                    report.add("bad_row", table.name, row, items)
                continue
            new_ids = set()
            for number, item in enumerate(items):
                if self._shared and self._groups.split(self._numbers.get((row, number), 0)) != split:
                    continue
                report.read["mentions"] += 1
                id_ = f"{split}-{row}" if len(items) == 1 else f"{split}-{row}-{number}"
                mention = self._mention(item, id_, table.name, row, report)
                if mention is None:
                    continue
                source_id = mention.extra["source_id"]
                if source_id in seen:
                    report.add("duplicate_mention_id", table.name, row, f"id {source_id[:80]}")
                new_ids.add(source_id)
                yield mention
            seen |= new_ids - {None}

    def _mention(self, item: dict[str, Any], id_: str, file: str, row: int, report: Report) -> MentionRow | None:
        """A mention, or `None` and what is wrong with it to `report`."""
        given = item.get("answer")
        nil = "answer" in item and is_nil(given)
        answer = None if nil else id_text(given)
        wrong = [
            f"{name} is {_described(item, name)}, not a string"
            for name in ("mention", "sentence")
            if not isinstance(item.get(name), str)
        ]
        if answer is None and not nil:
            wrong.append(f"answer is {_described(item, 'answer')}, not a string or a whole number")
        if not wrong and self._shared and not is_nil(item.get("split")) and split_named(item["split"]) is None:
            wrong.append(f"split is {str(item['split'])[:40]!r}; should be {', '.join(SPLITS)}")
        if wrong:
            report.add("bad_row", file, row, "; ".join(wrong))
            return None
        if nil:
            if self._leaves_nil(item["mention"], report, file, row):
                return None
        elif self._entities is not None and answer not in self.entity_ids:
            near = _near_id(str(answer), self.entity_ids)
            detail = f"{str(answer)[:80]!r} is not in {self._entities.name}"
            if near is not None:
                detail += f", but {near[:80]!r} is: write both the same way, as text"
            report.add("answer_without_entity", file, row, detail)
            return None
        mention = self._clean(item["mention"], report, file, row, "mention")
        sentence = self._clean(item["sentence"], report, file, row, "sentence")
        stated = int_of(item.get("start")), int_of(item.get("end"))
        for name, value in zip(("start", "end"), stated, strict=True):
            if value is None and not is_nil(item.get(name)):
                report.add("bad_field", file, row, f"{name} is {json_type(item[name])}, not a whole number")
        span = self._span(mention, sentence, report, file, row, stated)
        source_id = id_text(item.get("id"))
        if source_id is not None:
            source_id = self._clean(source_id, report, file, row, "id")
        image = self._optional(item, "image", report, file, row)
        images = self._named_images([image] if image else [], report, file, row)
        report.leave_out("mentions", item.keys() - _RESERVED["mentions"] - self.extra_columns.keys())
        own = self._own(item, self.extra_columns)
        extra = {**own, "source_id": source_id}
        return MentionRow(file, row, id_, mention, sentence, answer, images[0] if images else None, *span, extra)

    @staticmethod
    def _own(item: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
        """The values of one's own columns, each of its column's type."""
        values: dict[str, Any] = {}
        for name, type_ in columns.items():
            value = item.get(name)
            if value is None or (isinstance(value, float) and math.isnan(value)):
                values[name] = None
            elif type_ == "string":
                text = (
                    value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
                )
                values[name] = whole(text) or None
            else:
                values[name] = float(value) if type_ == "float64" else value
        return values

    def _optional(self, item: dict[str, Any], name: str, report: Report, file: str, row: int) -> str | None:
        value = item.get(name)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return None
        if not isinstance(value, str):
            report.add("bad_field", file, row, f"{name} is {json_type(value)}, not a string")
            return None
        return self._clean(value, report, file, row, name)

    def _named_images(self, names: list[str], report: Report, file: str, row: int) -> list[ImageFile]:
        if self.mention_images is None:
            for name in names if self.use_images else ():
                report.add("missing_image", file, row, f"{name!r}: there is no folder images/ and no images.zip")
            return []
        return self._images(self.mention_images, list(map(_image_path, names)), report, file, row)


def _image_path(name: str) -> str:
    """A reference in its normal form. It may begin at the tables' folder or at that of the images."""
    return re.sub(r"^images/", "", normal_path(name), flags=re.IGNORECASE)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "string"
    return "float64" if isinstance(value, float) else "string" if isinstance(value, str) else "other"


def _described(item: dict[str, Any], name: str) -> str:
    """What the value of a field is, for messages."""
    if name not in item:
        return "missing"
    value = item[name]
    if value is None:
        return "null"
    return f"a list of {len(value)}" if isinstance(value, list) else f"{json_type(value)} ({str(value)[:40]!r})"


def _expanded(record: dict[str, Any]) -> list[dict[str, Any]] | str:
    """The mentions of a record, one for each item of a list in `mention`; or what is wrong with it.

    Lists of the same length in other fields belong to the mentions one by one; anything else to all of them.
    """
    mentions = record.get("mention")
    if not isinstance(mentions, list):
        # A list of one is as good as its item.
        single = {
            name: record[name][0]
            for name in ("sentence", "answer", "image")
            if isinstance(record.get(name), list) and len(record[name]) == 1
        }
        return [{**record, **single}]
    answers = record.get("answer")
    if not isinstance(answers, list) or len(answers) != len(mentions):
        return f"mention is a list of {len(mentions)}, and answer is {_described(record, 'answer')}"
    lists = [name for name, value in record.items() if isinstance(value, list) and len(value) == len(mentions)]
    return [{**record, **{name: record[name][place] for name in lists}} for place in range(len(mentions))]


def _near_id(answer: str, ids: Container[str]) -> str | None:
    """The id that an answer may be meant to be: without spaces around it, or as a whole number with ".0" or without."""
    bare = answer.strip()
    others = (bare, bare.removesuffix(".0"), f"{bare}.0")
    return next((other for other in others if other and other != answer and other in ids), None)

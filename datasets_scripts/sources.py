"""The formats that multimodal entity linking data come in, read into one kind of row.

A [`Source`] yields [`MentionRow`] and [`EntityRow`] objects and tells a [`Report`] of everything that is wrong with
them. Rows are light: they name their images, which are read when they are written or used. There are four formats:

- [`MimicArchive`]: what the authors of MIMIC publish, with a knowledge base of names, descriptions and images;
- [`MelBench`]: MELBench's `Wikidata-MEL.json` and `Richpedia-MEL.json`;
- [`WikiDiverseRelease`]: WikiDiverse's own files;
- [`CustomData`]: anyone's own CSV or JSON Lines files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TextIO
from urllib.parse import unquote

from .archives import (
    READ_ERRORS,
    ArchiveError,
    DirectoryTree,
    ImageFolder,
    Picture,
    Tree,
    load_json,
    open_nested,
    open_tree,
)
from .report import SPLITS, Report

# The images of one entity must fit in one cell of an Arrow table.
MAX_ROW_IMAGE_BYTES = 1 << 30
# Of a cell of a CSV file; above the 131,072 that Python's reader takes.
MAX_CELL_CHARACTERS = 1 << 24

_SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("dev", "val", "valid", "validation"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Benchmark:
    """A published data set: how its files are called, and what is known of them.

    `aliases` are what its files' names begin with, in lower case without `_` and `-`; `published` are counts of the
    MIMIC paper.
    """

    name: str
    pretty_name: str
    aliases: tuple[str, ...]
    published: dict[str, int] = field(default_factory=dict)
    md5: dict[str, str] = field(default_factory=dict)
    melbench_file: str | None = None


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "wikimel",
            "WikiMEL",
            ("wikimel", "wikidatamel"),
            {"test mentions": 5_169, "entities": 109_976},
            melbench_file="Wikidata-MEL.json",
        ),
        Benchmark(
            "richpediamel",
            "RichpediaMEL",
            ("richpediamel",),
            {"test mentions": 3_562, "entities": 160_933},
            {
                "kb_entity.json": "ba086b054bf52d549f2a79503c76704a",
                "qid2id.json": "8059b7aa89a9314d5dc38607a8685eeb",
                "RichpediaMEL_dev.json": "831cdd92d70a93ea8a442798ec2fcde1",
                "RichpediaMEL_test.json": "9e07e5e970e01079d256311e5ac10bd8",
                "RichpediaMEL_train.json": "e1d0b2adb2a1114cefa63860ffa23982",
                "kb_image.zip": "961efc263bc8e2e7b257a28e8e703633",
                "mention_images.zip": "474c594ce8a95aa5dc9222365db0044e",
            },
            melbench_file="Richpedia-MEL.json",
        ),
        Benchmark(
            "wikidiverse",
            "WikiDiverse",
            ("wikidiverse",),
            {"test mentions": 2_078, "entities": 132_460},
        ),
        Benchmark("custom", "Custom", ()),
    )
}


@dataclass(slots=True)
class MentionRow:
    """A mention; `file` and `row` say where it comes from."""

    file: str
    row: int | str
    id: str
    mention: str
    sentence: str
    answer: str
    picture: Picture | None
    extra: dict[str, Any]


@dataclass(slots=True)
class EntityRow:
    """An entity of the knowledge base; `file` and `row` say where it comes from."""

    file: str
    row: int | str
    id: str
    qid: str | None
    name: str
    description: str
    pictures: list[Picture]


def split_of(record: str) -> str:
    """The split of a record of a data set that has none: 70% train, 10% validation, 20% test, by the hash of its id."""
    bucket = int.from_bytes(hashlib.sha256(record.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 100
    return "train" if bucket < 70 else "validation" if bucket < 80 else "test"


class Source(ABC):
    """A data set as it lies on disk.

    Attributes:
        format: what the card and the log call the format.
        extra_columns: columns of `mentions` beyond the common ones, with their types.
        is_closed: whether the knowledge base is no more than the answers of the mentions.
        bad_pictures: `(kind, detail)` of images that were found unusable; rows then come without them.
    """

    format: ClassVar[str]
    extra_columns: ClassVar[dict[str, str]] = {"source_id": "string"}
    is_closed: ClassVar[bool] = False

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        self.benchmark = benchmark
        self.trees = trees
        self.tree = trees[-1]
        self.prefix = prefix
        self.report = report
        self.use_images = use_images
        self.bad_pictures: dict[Picture, tuple[str, str]] = {}
        self.mention_images: ImageFolder | None = None
        self.entity_images: ImageFolder | None = None
        self._used: list[tuple[Tree, str]] = []
        self._image_archives: list[str] = []
        self._entity_ids: set[str] | None = None
        self._names_here = sorted(
            name[len(prefix) :] for name in [*self.tree.files, *self.tree.refused] if name.startswith(prefix)
        )

    # What a format must say.

    @abstractmethod
    def entities(self, report: Report) -> Iterator[EntityRow]:
        """Every entity once, and to `report` what is wrong with them."""

    @abstractmethod
    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        """The mentions of a split whose answer is an entity, and to `report` what is wrong with them."""

    # What all formats share.

    @property
    def entity_ids(self) -> set[str]:
        """The ids that [`entities`] yields."""
        if self._entity_ids is None:
            self._entity_ids = {entity.id for entity in self.entities(Report())}
        return self._entity_ids

    def rows(self, config: str, split: str, report: Report) -> Iterator[MentionRow | EntityRow]:
        """[`entities`] for the configuration `entities`, else [`mentions`] of `split`."""
        yield from self.entities(report) if config == "entities" else self.mentions(split, report)

    def fingerprint(self) -> str:
        """Changes with the name, size or date of any file that is read."""
        digest = hashlib.sha256(f"{self.format} {self.use_images}".encode())
        used = list(self._used)
        for folder in (self.mention_images, self.entity_images):
            used += sorted(folder.files.values(), key=lambda file: file[1]) if folder else []
        for tree, name in used:
            digest.update(f"{name}\0{tree.files[name]}\0{tree.changed(name)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def hash_archives(self, report: Report, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Report the MD5 sums of the archives of images; `advance` is told the bytes read, as it goes."""
        for name in self._image_archives:
            digest = hashlib.md5()
            with self.tree.open(name) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    advance(len(block))
            self._add_file(report, name, self.tree.files[name], digest.hexdigest())

    @property
    def archive_bytes(self) -> int:
        """Bytes that [`hash_archives`] reads."""
        return sum(self.tree.files[name] for name in self._image_archives)

    def close(self) -> None:
        """Close the archives."""
        for folder in (self.mention_images, self.entity_images):
            for tree in {id(tree): tree for tree, _ in folder.files.values()}.values() if folder else ():
                tree.close()
        for tree in reversed(self.trees):
            tree.close()

    def _add_file(self, report: Report, name: str, size: int, md5: str) -> None:
        base = name.rpartition("/")[2]
        report.add_file(base, size, md5, self.benchmark.md5.get(base))

    def _load(self, name: str | None, expected: str, kind: type, structure: str) -> Any:
        """A JSON file of the data set, or `None` and a finding where it cannot be used."""
        if name is None or (self.prefix + name not in self.tree.files and self.prefix + name not in self.tree.refused):
            here = [name for name in self._names_here if name.lower().endswith(".json") and "/" not in name]
            there = f"; there are {', '.join(here[:8])}" if here else ""
            self.report.add("missing_file", expected, detail=f"not in {self._place}{there}")
            return None
        path = self.prefix + name
        if path in self.tree.refused:
            refusal, reason = self.tree.refused[path]
            self.report.add(refusal, name, detail=reason)
            return None
        self._used.append((self.tree, path))
        try:
            loaded = load_json(self.tree, path)
        except ArchiveError as error:
            self.report.add(error.kind, name, detail=str(error))
            return None
        for key in loaded.duplicate_keys:
            self.report.add("duplicate_key", name, detail=f"key {key!r}")
        self._add_file(self.report, name, loaded.size, loaded.md5)
        if not isinstance(loaded.value, kind):
            self.report.add(
                "wrong_structure", name, detail=f"is a JSON {_json_type(loaded.value)}; should be {structure}"
            )
            return None
        return loaded.value

    @property
    def _place(self) -> str:
        return f"{self.tree.label}/{self.prefix}".rstrip("/")

    def _split_file(self, split: str, suffix: str = "") -> str | None:
        """The file of a split: an alias or nothing, the split's word, `suffix` or nothing."""
        return _find_split(self._names_here, self.benchmark.aliases, split, suffix)

    def _image_folder(self, names: tuple[str, ...]) -> ImageFolder | None:
        """The images in folders or zip archives called one of `names`, next to the JSON files."""
        parts: list[tuple[Tree, str]] = []
        found = []
        top = dict.fromkeys(name.partition("/")[0] for name in self._names_here)
        for name in top:
            path = self.prefix + name
            if name.lower() in names:
                refusal, reason = self.tree.refused.get(path, ("", ""))
                if refusal == "unsafe":
                    self.report.add("unsafe", name, detail=f"{reason}; move it, or give the folder where it really is")
                elif path not in self.tree.files:
                    parts.append((self.tree, path + "/"))
                    found.append(name)
            elif name.lower().endswith(".zip") and name[:-4].lower() in names and path in self.tree.files:
                self._image_archives.append(path)
                self._used.append((self.tree, path))
                try:
                    nested = open_nested(self.tree, path)
                except ArchiveError as error:
                    self.report.add(error.kind, name, detail=str(error))
                    continue
                for member, (_, reason) in nested.refused.items():
                    self.report.add("unsafe_member", name, detail=f"{member!r} {reason}")
                parts.append((nested, ""))
                found.append(name)
        return ImageFolder(" and ".join(found), parts) if parts else None

    def _required_images(self, names: tuple[str, ...]) -> ImageFolder | None:
        if not self.use_images:
            return None
        before = self.report.fatal.total()
        folder = self._image_folder(names)
        if folder is None and self.report.fatal.total() == before:
            expected = " or ".join(f"{name}/ or {name}.zip" for name in names)
            self.report.add(
                "missing_file", names[0], detail=f"{expected} not in {self._place}; to do without: --without_images"
            )
        return folder

    def _report_unsafe_members(self) -> None:
        """The members of the data set's own archive that were refused."""
        for tree in self.trees:
            if not isinstance(tree, DirectoryTree):
                for name, (_, reason) in tree.refused.items():
                    self.report.add("unsafe_member", os.path.basename(tree.label), detail=f"{name!r} {reason}")

    # Fields of a row.

    def _clean(self, text: str, report: Report, file: str, row: int | str, name: str) -> str:
        """`text` without code points that are no characters (they cannot be stored as UTF-8)."""
        whole = _whole(text)
        if whole is not text:
            report.add("broken_text", file, row, f"{name}: {text[:80]!r}")
        return whole

    def _unquote(self, text: str, report: Report, file: str, row: int | str, name: str) -> str:
        text = self._clean(text, report, file, row, name)
        plain = unquote(text)
        if "\ufffd" in plain and "\ufffd" not in text:
            report.add("broken_text", file, row, f"{name}: {text[:80]!r} is not URL-encoded UTF-8")
        return plain

    def _picture(
        self,
        folder: ImageFolder | None,
        reference: str,
        report: Report,
        file: str,
        row: int | str,
        moved: bool = False,
    ) -> Picture | None:
        if folder is None:
            return None
        try:
            picture, step = folder.find(reference, moved)
            if picture in self.bad_pictures:
                raise ArchiveError(*self.bad_pictures[picture])
        except ArchiveError as error:
            report.add(error.kind, file, row, str(error))
            return None
        report.resolved[step] += 1
        return picture

    def _pictures(
        self, folder: ImageFolder | None, references: list[str], report: Report, file: str, row: int | str
    ) -> list[Picture]:
        pictures, total = [], 0
        for reference in references:
            picture = self._picture(folder, reference, report, file, row)
            if picture is None:
                continue
            total += picture.size
            if total > MAX_ROW_IMAGE_BYTES:
                report.add("oversized_image", file, row, f"{reference!r} and those after it: too much for one entity")
                break
            pictures.append(picture)
        return pictures

    def _check_mention(self, mention: str, sentence: str, report: Report, file: str, row: int | str) -> None:
        if not mention.strip():
            report.add("empty_mention", file, row, repr(mention))
        if mention not in sentence:
            report.add("mention_not_in_sentence", file, row, f"{mention[:80]!r}")


class MimicArchive(Source):
    """The archives of the MIMIC authors: `kb_entity.json`, `qid2id.json`, three files of mentions, two of images."""

    format = "the archive of the MIMIC authors"
    _MENTION_FIELDS = frozenset({"id", "mentions", "sentence", "imgPath", "answer"})
    _ENTITY_FIELDS = frozenset({"id", "type", "qid", "entity_name", "attr", "image_list"})

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        super().__init__(benchmark, trees, prefix, report, use_images)
        self._report_unsafe_members()
        self._kb: list | None = self._load("kb_entity.json", "kb_entity.json", list, "a list of entities")
        self._answers: dict | None = self._load("qid2id.json", "qid2id.json", dict, "an object of answer: entity id")
        self._files: dict[str, str] = {}
        self._mentions: dict[str, list | None] = {}
        for split, words in _SPLIT_WORDS.items():
            name = self._split_file(split)
            expected = f"{benchmark.pretty_name}_{words[0]}.json"
            self._files[split] = name or expected
            self._mentions[split] = self._load(name, expected, list, "a list of mentions")
        self.mention_images = self._required_images(("mention_image", "mention_images"))
        self.entity_images = self._required_images(("kb_image", "kb_images"))
        if not use_images:
            report.add("no_images", benchmark.name, detail="images left out on request")

    def entities(self, report: Report) -> Iterator[EntityRow]:
        file = "kb_entity.json"
        ids: set[str] = set()
        qids: set[str] = set()
        for row, item in enumerate(self._kb or ()):
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
                report.add("bad_field", file, row, f"qid is a JSON {_json_type(qid)}")
                qid = None
            if qid is not None:
                qid = self._clean(qid, report, file, row, "qid")
                if qid in qids:
                    report.add("duplicate_qid", file, row, qid)
                qids.add(qid)
            description = item.get("attr")
            if not isinstance(description, str):
                report.add("bad_field", file, row, f"attr is {_json_type(description)}")
                description = ""
            images = item.get("image_list")
            if not isinstance(images, list):
                report.add("bad_field", file, row, f"image_list is {_json_type(images)}")
                images = []
            for image in images:
                if not isinstance(image, str):
                    report.add("bad_field", file, row, f"image_list holds {_json_type(image)}")
            report.leave_out("entities", item.keys() - self._ENTITY_FIELDS)
            yield EntityRow(
                file,
                row,
                id_,
                qid,
                self._unquote(item["entity_name"], report, file, row, "entity_name"),
                self._clean(description, report, file, row, "attr"),
                self._pictures(
                    self.entity_images, [image for image in images if isinstance(image, str)], report, file, row
                ),
            )

    @staticmethod
    def _entity_problem(item: Any) -> str | None:
        if not isinstance(item, dict):
            return f"is {_json_type(item)}, not an object"
        if item.get("type", "entity") != "entity":
            return f"type is {str(item['type'])[:40]!r}, not 'entity'"
        if _id(item.get("id")) is None:
            return f"id is {_json_type(item.get('id'))}, not a number"
        if not isinstance(item.get("entity_name"), str):
            return f"entity_name is {_json_type(item.get('entity_name'))}, not a string"
        return None

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        file = self._files[split]
        seen: set[str] = set()
        for row, item in enumerate(self._mentions[split] or ()):
            if not isinstance(item, dict):
                report.add("bad_row", file, row, f"is {_json_type(item)}, not an object")
                continue
            wrong = [name for name in ("mentions", "sentence", "answer") if not isinstance(item.get(name), str)]
            if wrong:
                report.add("bad_row", file, row, "; ".join(f"{name} is {_json_type(item.get(name))}" for name in wrong))
                continue
            if item["answer"].strip().lower() == "nil":
                report.add("nil_answer", file, row, f"mention {item['mentions'][:80]!r}")
                continue
            answer = self._entity_of(item["answer"], report, file, row)
            if answer is None:
                continue
            mention = self._unquote(item["mentions"], report, file, row, "mentions")
            sentence = self._clean(item["sentence"], report, file, row, "sentence")
            self._check_mention(mention, sentence, report, file, row)
            picture = None
            path = item.get("imgPath")
            if not isinstance(path, str):
                report.add("bad_field", file, row, f"imgPath is {_json_type(path)}")
            elif path:
                picture = self._picture(self.mention_images, path, report, file, row, moved=True)
            source_id = item.get("id")
            if source_id is not None:
                source_id = self._clean(str(source_id), report, file, row, "id")
                if source_id in seen:
                    report.add("duplicate_mention_id", file, row, f"id {source_id}")
                seen.add(source_id)
            report.leave_out("mentions", item.keys() - self._MENTION_FIELDS)
            yield MentionRow(file, row, f"{split}-{row}", mention, sentence, answer, picture, {"source_id": source_id})

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


class _ClosedSource(Source):
    """A data set without a knowledge base: its entities are the answers of its own mentions."""

    is_closed = True
    _IMAGE_FOLDERS: ClassVar[tuple[str, ...]] = ("mention_image", "mention_images", "images", "image", "imgs")

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        super().__init__(benchmark, trees, prefix, report, use_images)
        detail = "the source has none; linking to this one is easier, and results do not compare with published ones"
        report.add("closed_knowledge_base", benchmark.name, detail=detail)

    def _optional_images(self) -> None:
        if self.use_images:
            self.mention_images = self._image_folder(self._IMAGE_FOLDERS)
        if self.mention_images is None:
            reason = f"no folder or zip archive called {', '.join(self._IMAGE_FOLDERS)}" if self.use_images else ""
            self.report.add("no_images", self.benchmark.name, detail=reason or "images left out on request")


class MelBench(_ClosedSource):
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
            return f"is {_json_type(record)}, not an object"
        if not isinstance(record.get("sentence"), str):
            return f"sentence is {_json_type(record.get('sentence'))}"
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
                if _is_nil(qid):
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
            picture = self._picture_of(record_id, report, key)
            report.leave_out("mentions", record.keys() - {"id", "sentence", "mentions", "entities", "answer"})
            for number, (mention, _, qid) in enumerate(parts):
                if _is_nil(qid):
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
                    _whole(qid),
                    picture,
                    {"source_id": record_id},
                )

    def _picture_of(self, record_id: str, report: Report, key: str) -> Picture | None:
        if self.mention_images is None:
            return None
        try:
            self.mention_images.find(f"{record_id}.jpg")
        except ArchiveError as error:
            if error.kind == "missing_image":  # nothing in the record says that it has one
                return None
        return self._picture(self.mention_images, f"{record_id}.jpg", report, self._file, key)


class WikiDiverseRelease(_ClosedSource):
    """WikiDiverse's own files: lists of `[sentence, image URL, topic, [[mention, type, start, end, entity URL], ...]]`.

    The release with candidates, one mention a row in eleven columns, is read as well. Entities are Wikipedia pages; an
    entity's id is its page's title with underscores.
    """

    format = "WikiDiverse's own release"
    extra_columns: ClassVar[dict[str, str]] = {
        "source_id": "string",
        "topic": "string",
        "mention_type": "string",
        "start": "int32",
        "end": "int32",
    }
    _IMAGE_FOLDERS = ("wikinewsimgs", *_ClosedSource._IMAGE_FOLDERS)
    _CANDIDATES = "_w_10cands"

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        super().__init__(benchmark, trees, prefix, report, use_images)
        self._report_unsafe_members()
        self._files: dict[str, str] = {}
        self._rows: dict[str, list] = {}
        for split, words in _SPLIT_WORDS.items():
            name = self._split_file(split) or self._split_file(split, self._CANDIDATES)
            self._files[split] = name or f"{words[-1] if split == 'validation' else split}.json"
            rows = self._load(name, self._files[split], list, "a list of [sentence, image URL, topic, mentions]")
            if rows and isinstance(rows[0], dict):
                detail = "holds objects, as the archive of the MIMIC authors does, but kb_entity.json is not there"
                report.add("wrong_structure", self._files[split], detail=detail)
                rows = None
            self._rows[split] = rows or []
        self._optional_images()

    @staticmethod
    def _parse(item: Any) -> tuple[str, str, str, list] | str:
        """`(sentence, image URL, topic, mentions)` of a row, or what is wrong with it."""
        if not isinstance(item, list):
            return f"is {_json_type(item)}, not a list"
        if len(item) >= 11 and all(isinstance(item[at], str) for at in (0, 1, 2, 3, 6, 8)):
            return item[0], item[1], item[8], [[item[2], item[3], item[9], item[10], item[6]]]
        if len(item) < 4 or not all(isinstance(part, str) for part in item[:3]) or not isinstance(item[3], list):
            return "is not [sentence, image URL, topic, mentions]"
        return item[0], item[1], item[2], item[3]

    @staticmethod
    def _mention_problem(mention: Any) -> str | None:
        if not isinstance(mention, list) or len(mention) < 5:
            return "a mention is not [mention, type, start, end, entity URL]"
        if not isinstance(mention[0], str) or not isinstance(mention[4], str):
            return "a mention or its entity URL is not a string"
        return None

    def entities(self, report: Report) -> Iterator[EntityRow]:
        seen: set[str] = set()
        for split in SPLITS:
            for row, item in enumerate(self._rows[split]):
                parsed = self._parse(item)
                for mention in () if isinstance(parsed, str) else parsed[3]:
                    if self._mention_problem(mention) or _is_nil(mention[4]):
                        continue
                    page = wikipedia_page(mention[4])
                    if page and page.id not in seen:
                        seen.add(page.id)
                        yield EntityRow(self._files[split], row, page.id, None, page.title, "", [])

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        file = self._files[split]
        for row, item in enumerate(self._rows[split]):
            parsed = self._parse(item)
            if isinstance(parsed, str):
                report.add("bad_row", file, row, parsed)
                continue
            sentence, url, topic, mentions = parsed
            sentence = self._clean(sentence, report, file, row, "sentence")
            topic = self._clean(topic, report, file, row, "topic")
            picture = self._picture(self.mention_images, image_name(url), report, file, row) if url.strip() else None
            for number, annotation in enumerate(mentions):
                problem = self._mention_problem(annotation)
                if problem:
                    report.add("bad_row", file, row, problem)
                    continue
                surface, type_, start, end, entity = annotation[:5]
                if _is_nil(entity):
                    report.add("nil_answer", file, row, f"mention {surface[:80]!r}")
                    continue
                page = wikipedia_page(entity)
                if page is None:
                    report.add("answer_without_entity", file, row, f"{entity[:80]!r} is not an address of an entity")
                    continue
                if page.repaired:
                    report.add("repaired_entity_url", file, row, f"{entity[:80]!r}")
                mention = self._clean(surface, report, file, row, "mention")
                self._check_mention(mention, sentence, report, file, row)
                span = [value if _is_int32(value) else None for value in (start, end)]
                if None in span or not isinstance(type_, str):
                    report.add("bad_field", file, row, "the type or span of a mention is of another type")
                extra = {
                    "source_id": str(row),
                    "topic": topic,
                    "mention_type": self._clean(type_, report, file, row, "type") if isinstance(type_, str) else None,
                    "start": span[0],
                    "end": span[1],
                }
                yield MentionRow(file, row, f"{split}-{row}-{number}", mention, sentence, page.id, picture, extra)


@dataclass(frozen=True)
class WikipediaPage:
    """A page: `id` is its title with underscores, before it the language where it is not English."""

    id: str
    title: str
    repaired: bool


def wikipedia_page(url: str) -> WikipediaPage | None:
    """The page that an address means; `None` for what is no address of a wiki's page.

    The release's annotations begin with stray characters now and then (`nhttps://...`, `]https://...`, `ttps://...`).
    """
    head, _, path = url.strip().partition("/wiki/")
    title = _whole(unquote(path)).strip().replace("_", " ").strip()
    if not title:
        return None
    host = re.search(r"([a-z-]+)(?:\.m)?\.wikipedia\.org$", head)
    if host is None:
        return WikipediaPage(_whole(f"{head}/wiki/{title.replace(' ', '_')}"), title, False)
    language = "" if host[1] == "en" else f"{host[1]}:"
    repaired = re.fullmatch(r"https?://[a-z-]+(?:\.m)?\.wikipedia\.org", head) is None
    return WikipediaPage(f"{language}{title.replace(' ', '_')}", title, repaired)


def image_name(url: str) -> str:
    """The file that WikiDiverse stores an image in: the MD5 sum of the address's last part, `.svg` as `.png`."""
    last = url.rpartition("/")[2]
    extension = re.search(r"\.(jpe?g|png|svg|gif|tiff?|webp)", last, re.IGNORECASE)
    suffix = extension[0] if extension else ""
    if suffix.lower() == ".svg":
        suffix = ".png"
    return hashlib.md5(last.encode("utf-8", "surrogatepass")).hexdigest() + suffix


class CustomData(Source):
    """Own data: `entities` and `mentions` (or `train`, `validation`, `test`) as `.csv` or `.jsonl`, and `images`.

    Columns of entities: `id`, `name`, and optionally `description`, `qid`, `images` (a list; in CSV separated by `|`).
    Columns of mentions: `mention`, `sentence`, `answer`, and optionally `id`, `image`, and `split` in a single file
    (without it, see [`split_of`]). `images/` or `images.zip` holds the images of both.
    """

    format = "own files"
    _ENTITY_FIELDS = frozenset({"id", "name", "description", "qid", "images"})
    _MENTION_FIELDS = frozenset({"id", "mention", "sentence", "answer", "image", "split"})

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        super().__init__(benchmark, trees, prefix, report, use_images)
        self._report_unsafe_members()
        self._entity_file = self._table("entities", ("id", "name"))
        files = {split: self._table(split, ("mention", "sentence", "answer"), required=False) for split in SPLITS}
        self._files = {split: name for split, name in files.items() if name}
        self._shared = not self._files
        if self._shared:
            name = self._table("mentions", ("mention", "sentence", "answer"))
            self._files = dict.fromkeys(SPLITS, name) if name else {}
        self.mention_images = self.entity_images = self._image_folder(("images",)) if use_images else None
        if not use_images:
            report.add("no_images", benchmark.name, detail="images left out on request")

    def _table(self, stem: str, columns: tuple[str, ...], required: bool = True) -> str | None:
        names = [name for name in self._names_here if name.lower() in (f"{stem}.csv", f"{stem}.jsonl")]
        if len(names) > 1:
            detail = f"is in {self._place} beside {names[0]}; keep one of them"
            self.report.add("wrong_structure", names[1], detail=detail)
        elif not names and required:
            self.report.add("missing_file", f"{stem}.jsonl", detail=f"nor {stem}.csv is in {self._place}")
        if len(names) != 1:
            return None
        name, path = names[0], self.prefix + names[0]
        if path in self.tree.refused:
            kind, reason = self.tree.refused[path]
            self.report.add(kind, name, detail=reason)
            return None
        self._used.append((self.tree, path))
        digest = hashlib.md5()
        try:
            with self.tree.open(path) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except READ_ERRORS as error:
            self.report.add("unreadable", name, detail=f"{type(error).__name__}: {error}")
            return None
        self._add_file(self.report, name, self.tree.files[path], digest.hexdigest())
        if name.lower().endswith(".csv"):
            with self.tree.open(path) as file:
                problem = _csv_problem(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""), columns)
            if problem:
                self.report.add(problem[0], name, detail=problem[1])
                return None
        return name

    def _read(self, name: str | None) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """`(line number, row)` for every row of a table; a string, what is wrong, in place of a broken row."""
        if name is None:
            return
        with self.tree.open(self.prefix + name) as file:
            if name.lower().endswith(".csv"):
                yield from self._read_csv(io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""))
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    yield number, f"not UTF-8 at byte {error.start} of the line"
                except (ValueError, RecursionError) as error:
                    yield number, f"not JSON: {error}"
                else:
                    yield number, value if isinstance(value, dict) else f"is {_json_type(value)}, not an object"

    @staticmethod
    def _read_csv(text: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any] | str]]:
        header: list[str] | None = None
        for lines, last, cells in _csv_rows(text):
            if isinstance(cells, str):
                yield last, f"not CSV: {cells}"
            elif header is None:
                header = cells
            elif len(cells) != len(header):
                over = f", in {len(lines)} lines" if len(lines) > 1 else ""
                yield last, f"has {len(cells)} cells{over}; the header has {len(header)}"
            else:
                yield last, dict(zip(header, cells, strict=True))

    def entities(self, report: Report) -> Iterator[EntityRow]:
        file = self._entity_file or ""
        ids: set[str] = set()
        for row, item in self._read(self._entity_file):
            if isinstance(item, str):
                report.add("bad_entity", file, row, item)
                continue
            id_, name = _id(item.get("id")), item.get("name")
            if id_ is None or not isinstance(name, str):
                report.add("bad_entity", file, row, "id is not a string or number, or name is not a string")
                continue
            id_ = self._clean(id_, report, file, row, "id")
            if id_ in ids:
                report.add("duplicate_entity_id", file, row, f"id {id_[:80]}")
                continue
            ids.add(id_)
            images = item.get("images") or []
            if isinstance(images, str):
                images = [image.strip() for image in images.split("|") if image.strip()]
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                report.add("bad_field", file, row, "images is not a list of file names")
                images = []
            report.leave_out("entities", item.keys() - self._ENTITY_FIELDS)
            yield EntityRow(
                file,
                row,
                id_,
                self._optional(item, "qid", report, file, row),
                self._clean(name, report, file, row, "name"),
                self._optional(item, "description", report, file, row) or "",
                self._named_pictures(images, report, file, row),
            )

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        file = self._files.get(split)
        seen: set[str] = set()
        for row, item in self._read(file):
            assert file is not None
            if self._shared and self._split(row, item) != split:
                continue
            if isinstance(item, str):
                report.add("bad_row", file, row, item)
                continue
            mention, sentence, answer = item.get("mention"), item.get("sentence"), _id(item.get("answer"))
            if "answer" in item and (item["answer"] is None or not str(item["answer"]).strip()):
                answer = "nil"
            if not isinstance(mention, str) or not isinstance(sentence, str) or answer is None:
                report.add("bad_row", file, row, "mention, sentence or answer is not a string")
                continue
            if self._shared and item.get("split") and _split_named(item["split"]) is None:
                report.add("bad_row", file, row, f"split is {str(item['split'])[:40]!r}; should be {', '.join(SPLITS)}")
                continue
            if _is_nil(answer):
                report.add("nil_answer", file, row, f"mention {mention[:80]!r}")
                continue
            if answer not in self.entity_ids:
                report.add("answer_without_entity", file, row, f"{answer[:80]!r} is not in {self._entity_file}")
                continue
            mention = self._clean(mention, report, file, row, "mention")
            sentence = self._clean(sentence, report, file, row, "sentence")
            self._check_mention(mention, sentence, report, file, row)
            source_id = _id(item.get("id"))
            if source_id is not None:
                source_id = self._clean(source_id, report, file, row, "id")
                if source_id in seen:
                    report.add("duplicate_mention_id", file, row, f"id {source_id[:80]}")
                seen.add(source_id)
            image = self._optional(item, "image", report, file, row)
            pictures = self._named_pictures([image] if image else [], report, file, row)
            report.leave_out("mentions", item.keys() - self._MENTION_FIELDS)
            picture = pictures[0] if pictures else None
            extra = {"source_id": source_id}
            yield MentionRow(file, row, f"{split}-{row}", mention, sentence, answer, picture, extra)

    @staticmethod
    def _split(row: int, item: dict[str, Any] | str) -> str:
        """The split of a row of `mentions`; what is broken belongs nowhere and is reported once, with `train`."""
        if isinstance(item, str):
            return "train"
        if item.get("split"):
            return _split_named(item["split"]) or "train"
        return split_of(_id(item.get("id")) or str(row))

    def _optional(self, item: dict[str, Any], name: str, report: Report, file: str, row: int) -> str | None:
        value = item.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            report.add("bad_field", file, row, f"{name} is {_json_type(value)}")
            return None
        return self._clean(value, report, file, row, name)

    def _named_pictures(self, names: list[str], report: Report, file: str, row: int) -> list[Picture]:
        if self.mention_images is None:
            for name in names if self.use_images else ():
                report.add("missing_image", file, row, f"{name!r}: there is no folder images/ and no images.zip")
            return []
        # A path may begin at the tables' folder or at the images'.
        names = [name.removeprefix("images/") for name in names]
        return self._pictures(self.mention_images, names, report, file, row)


def _csv_rows(text: TextIO) -> Iterator[tuple[list[str], int, list[str] | str]]:
    """Each row of a CSV file as its lines, the number of the last, and its cells, or what is wrong with it.

    Quotes are read strictly: what follows a closing one must be a comma or the line's end.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))  # the whole process's; never lowered
    lines: list[str] = []

    def counted() -> Iterator[str]:
        for line in text:
            lines.append(line)
            yield line

    reader = csv.reader(counted(), strict=True)
    while True:
        lines.clear()
        cells: list[str] | str
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = str(error)
        if cells:  # an empty line is none
            yield lines, reader.line_num, cells


def _csv_problem(text: TextIO, columns: tuple[str, ...]) -> tuple[str, str] | None:
    """`(kind, detail)` of what makes a CSV file as a whole unusable.

    A quote that is not closed, or that is closed in a later row, turns the rows between into the text of one cell. A
    row in several lines is taken for such where it is not CSV, or where each of its lines alone has the header's number
    of cells. Commas before a space do not count: they are a text's.
    """
    header: list[str] | None = None
    for lines, last, cells in _csv_rows(text):
        if header is None:
            header = [] if isinstance(cells, str) else cells
            if missing := [column for column in columns if column not in header]:
                here = cells if isinstance(cells, str) else f"its columns are {', '.join(header[:12])}"
                return "wrong_structure", f"has no column {', '.join(missing)}; {here}"
        elif len(lines) > 1 and (
            isinstance(cells, str) or all(len(re.split(",(?! )", line)) == len(header) for line in lines)
        ):
            first = last - len(lines) + 1
            why = f" ({cells})" if isinstance(cells, str) else ", though each has as many cells as the header"
            return (
                "open_quote",
                f"lines {first} to {last} are one row{why}: a cell of line {first} begins with a quote that is not "
                'closed there; close it, or where it is part of the text write the cell as """text"',
            )
    return None


def _id(value: Any) -> str | None:
    """An id as a string, or `None` where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value)


def _split_named(word: Any) -> str | None:
    plain = word.strip().lower() if isinstance(word, str) else ""
    return next((split for split, words in _SPLIT_WORDS.items() if plain in words), None)


def _whole(text: str) -> str:
    """`text` itself, or what can be stored of it as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Two escaped halves that belong together become the character they were meant to be.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_nil(answer: str) -> bool:
    return answer.strip().lower() == "nil"


def _is_int32(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "true or false"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _find_split(names: list[str], aliases: tuple[str, ...], split: str, suffix: str = "") -> str | None:
    """The file of a split among `names`; one that begins with an alias wins over one that is the bare word."""
    words = [_plain(start + word + suffix) + ".json" for start in (*aliases, "") for word in _SPLIT_WORDS[split]]
    plain = {_plain(name): name for name in reversed(names) if "/" not in name}
    return next((plain[word] for word in words if word in plain), None)


def _folders(tree: Tree) -> dict[str, list[str]]:
    """The JSON files' names by the folder they are in, the shallowest folders first."""
    folders: dict[str, list[str]] = {}
    for name in [*tree.files, *tree.refused]:
        if name.lower().endswith(".json"):
            folder, _, base = name.rpartition("/")
            folders.setdefault(folder + "/" if folder else "", []).append(base)
    return dict(sorted(folders.items(), key=lambda item: (item[0].count("/"), item[0])))


def _layouts(tree: Tree, benchmark: Benchmark) -> Iterator[tuple[int, type[Source], str]]:
    """`(how many files of it are there, format, folder)` for each format that a folder of `tree` could be."""
    for folder, names in _folders(tree).items():
        splits = [_find_split(names, benchmark.aliases, split) for split in SPLITS]
        kb = [name for name in names if name in ("kb_entity.json", "qid2id.json")]
        if kb:
            yield len(kb) + sum(name is not None for name in splits), MimicArchive, folder
        elif benchmark.melbench_file and benchmark.melbench_file.lower() in map(str.lower, names):
            yield 1, MelBench, folder
        elif benchmark.name == "wikidiverse":
            suffix = WikiDiverseRelease._CANDIDATES
            splits += [_find_split(names, benchmark.aliases, split, suffix) for split in SPLITS]
            if any(splits):
                yield sum(name is not None for name in splits), WikiDiverseRelease, folder


def _locate(
    trees: list[Tree], benchmark: Benchmark, which: str, depth: int = 2
) -> tuple[type[Source], list[Tree], str] | None:
    """The best layout in the innermost tree, or in an archive in it that bears the data set's name."""
    layouts = [
        layout
        for layout in _layouts(trees[-1], benchmark)
        if which == "auto" or (which == "published") == (layout[1] is MimicArchive)
    ]
    if layouts:
        # The archive of the MIMIC authors has more than the originals: prefer it, then the most complete folder.
        best = max(layouts, key=lambda layout: (layout[1] is MimicArchive, layout[0]))
        return best[1], trees, best[2]
    for name in sorted(trees[-1].files, key=lambda name: (name.count("/"), name)):
        base = _plain(name.rpartition("/")[2])
        if depth and base.endswith((".zip", ".tar")) and any(alias in base for alias in benchmark.aliases):
            nested = open_nested(trees[-1], name)
            found = _locate([*trees, nested], benchmark, which, depth - 1)
            if found:
                return found
            nested.close()
    return None


def _open_layout(name: str, data_dir: str | os.PathLike, which: str) -> tuple[type[Source], list[Tree], str]:
    if name not in BENCHMARKS:
        raise ValueError(f"{name!r} is not a data set; choose one of {', '.join(BENCHMARKS)}")
    if which not in ("auto", "published", "original"):
        raise ValueError(f"source is {which!r}; choose auto, published or original")
    benchmark = BENCHMARKS[name]
    path = Path(data_dir)
    if path.suffix.lower() in (".json", ".csv", ".jsonl") and path.is_file():
        path = path.parent
    tree = open_tree(path)
    if name == "custom":
        tables = {f"{stem}{suffix}" for stem in ("entities", "mentions", "train") for suffix in (".csv", ".jsonl")}
        folders = {found.rpartition("/")[0] for found in tree.files if found.lower().rpartition("/")[2] in tables}
        folder = min(folders, key=lambda folder: (folder.count("/") + bool(folder), folder), default="")
        return CustomData, [tree], folder + "/" if folder else ""
    found = _locate([tree], benchmark, which)
    if found is None:
        wanted = ["kb_entity.json (archive of the MIMIC authors)"] if which != "original" else []
        if which != "published":
            wanted.append(benchmark.melbench_file or "train.json, valid.json and test.json (WikiDiverse's own release)")
        there = ", ".join(sorted({entry.partition("/")[0] for entry in [*tree.files, *tree.refused]})[:10])
        tree.close()
        raise ArchiveError(
            "missing_file",
            f"no {benchmark.pretty_name} in {path}: looked for {' and '.join(wanted)}, in it and in archives with "
            f"{benchmark.pretty_name} in their name; it holds {there or 'nothing'}",
        )
    return found


def source_format(name: str, data_dir: str | os.PathLike, source: str = "auto") -> type[Source]:
    """The format that [`open_source`] would read, found by the names of files alone; raises the same errors."""
    kind, trees, _ = _open_layout(name, data_dir, source)
    for tree in reversed(trees):
        tree.close()
    return kind


def open_source(
    name: str, data_dir: str | os.PathLike, report: Report, *, source: str = "auto", use_images: bool = True
) -> Source:
    """Open a data set where it lies.

    Args:
        name: `wikimel`, `richpediamel`, `wikidiverse` or `custom`.
        data_dir: the folder, `.zip` or uncompressed `.tar` of the data set, or a folder that holds such an archive.
        report: is told what is wrong with the files. After fatal findings the source yields what it can, so that one
            run names everything; nothing should be written from it.
        source: `published` for the archive of the MIMIC authors, `original` for the data set's own release, `auto` for
            the first of these that is there.
        use_images: whether to look for images.

    Raises:
        ArchiveError: there is no such folder or archive, or it holds no data set of that name.
        ValueError: `name` or `source` is unknown.
    """
    kind, trees, prefix = _open_layout(name, data_dir, source)
    return kind(BENCHMARKS[name], trees, prefix, report, use_images)

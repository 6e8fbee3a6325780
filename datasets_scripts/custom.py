"""The format of anyone's own tables."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from .archives import READ_ERRORS, ImageFile, Tree
from .report import SPLITS, Report
from .source import Benchmark, EntityRow, MentionRow, Source, id_text, is_nil, json_type, split_named, split_of

# Of a cell of a CSV file; above the 131,072 that Python's reader takes.
MAX_CELL_CHARACTERS = 1 << 24


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
                    yield number, value if isinstance(value, dict) else f"is {json_type(value)}, not an object"

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
            id_, name = id_text(item.get("id")), item.get("name")
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
                self._named_images(images, report, file, row),
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
            mention, sentence, answer = item.get("mention"), item.get("sentence"), id_text(item.get("answer"))
            if "answer" in item and (item["answer"] is None or not str(item["answer"]).strip()):
                answer = "nil"
            if not isinstance(mention, str) or not isinstance(sentence, str) or answer is None:
                report.add("bad_row", file, row, "mention, sentence or answer is not a string")
                continue
            if self._shared and item.get("split") and split_named(item["split"]) is None:
                report.add("bad_row", file, row, f"split is {str(item['split'])[:40]!r}; should be {', '.join(SPLITS)}")
                continue
            if is_nil(answer):
                report.add("nil_answer", file, row, f"mention {mention[:80]!r}")
                continue
            if answer not in self.entity_ids:
                report.add("answer_without_entity", file, row, f"{answer[:80]!r} is not in {self._entity_file}")
                continue
            mention = self._clean(mention, report, file, row, "mention")
            sentence = self._clean(sentence, report, file, row, "sentence")
            self._check_mention(mention, sentence, report, file, row)
            source_id = id_text(item.get("id"))
            if source_id is not None:
                source_id = self._clean(source_id, report, file, row, "id")
                if source_id in seen:
                    report.add("duplicate_mention_id", file, row, f"id {source_id[:80]}")
                seen.add(source_id)
            image = self._optional(item, "image", report, file, row)
            images = self._named_images([image] if image else [], report, file, row)
            report.leave_out("mentions", item.keys() - self._MENTION_FIELDS)
            image = images[0] if images else None
            extra = {"source_id": source_id}
            yield MentionRow(file, row, f"{split}-{row}", mention, sentence, answer, image, extra)

    @staticmethod
    def _split(row: int, item: dict[str, Any] | str) -> str:
        """The split of a row of `mentions`; what is broken belongs nowhere and is reported once, with `train`."""
        if isinstance(item, str):
            return "train"
        if item.get("split"):
            return split_named(item["split"]) or "train"
        return split_of(id_text(item.get("id")) or str(row))

    def _optional(self, item: dict[str, Any], name: str, report: Report, file: str, row: int) -> str | None:
        value = item.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            report.add("bad_field", file, row, f"{name} is {json_type(value)}")
            return None
        return self._clean(value, report, file, row, name)

    def _named_images(self, names: list[str], report: Report, file: str, row: int) -> list[ImageFile]:
        if self.mention_images is None:
            for name in names if self.use_images else ():
                report.add("missing_image", file, row, f"{name!r}: there is no folder images/ and no images.zip")
            return []
        # A path may begin at the tables' folder or at the images'.
        names = [name.removeprefix("images/") for name in names]
        return self._images(self.mention_images, names, report, file, row)


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

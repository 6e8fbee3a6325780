"""The format of WikiDiverse's own files, and the Wikipedia pages that its annotations name."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from .archives import Tree
from .report import SPLITS, Report
from .source import Benchmark, ClosedSource, EntityRow, MentionRow, int_of, is_nil, json_type, whole
from .splits import SPLIT_WORDS


class WikiDiverseRelease(ClosedSource):
    """WikiDiverse's own files: lists of `[sentence, image URL, topic, [[mention, type, start, end, entity URL], ...]]`.

    The release with candidates, one mention a row in eleven columns, is read as well. Entities are Wikipedia pages; an
    entity's id is its page's title with underscores.
    """

    format = "WikiDiverse's own release"
    extra_columns = {"source_id": "string", "topic": "string", "mention_type": "string"}  # noqa: RUF012
    _IMAGE_FOLDERS = ("wikinewsimgs", *ClosedSource._IMAGE_FOLDERS)
    _CANDIDATES = "_w_10cands"

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, **options: bool):
        super().__init__(benchmark, trees, prefix, report, **options)
        self._report_unsafe_members()
        self._files: dict[str, str] = {}
        self._rows: dict[str, list] = {}
        for split, words in SPLIT_WORDS.items():
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
    def _parse(item: Any) -> tuple[str, Any, Any, list] | str:
        """`(sentence, image URL, topic, mentions)` of a row, the two in the middle of any kind; or what is wrong."""
        if not isinstance(item, list):
            return f"is {json_type(item)}, not a list"
        if len(item) >= 11 and not isinstance(item[3], list):  # with candidates
            row = item[0], item[1], item[8], [[item[2], item[3], item[9], item[10], item[6]]]
        elif len(item) >= 4:
            row = item[0], item[1], item[2], item[3]
        else:
            return f"has {len(item)} items; should be [sentence, image URL, topic, mentions]"
        if not isinstance(row[0], str):
            return f"the sentence is {json_type(row[0])}, not a string"
        if not isinstance(row[3], list):
            return f"the mentions are {json_type(row[3])}, not a list"
        return row

    @staticmethod
    def _mention_problem(mention: Any) -> str | None:
        if not isinstance(mention, list) or len(mention) < 5:
            return "a mention is not [mention, type, start, end, entity URL]"
        if not isinstance(mention[0], str):
            return f"the words of a mention are {json_type(mention[0])}, not a string"
        if not isinstance(mention[4], str) and not is_nil(mention[4]):
            return f"the entity URL of {mention[0][:80]!r} is {json_type(mention[4])}, not a string"
        return None

    def entities(self, report: Report) -> Iterator[EntityRow]:
        seen: set[str] = set()
        for split in SPLITS:
            for row, item in enumerate(self._rows[split]):
                parsed = self._parse(item)
                for mention in () if isinstance(parsed, str) else parsed[3]:
                    if self._mention_problem(mention) or is_nil(mention[4]):
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
                report.read["mentions"] += 1
                report.add("bad_row", file, row, parsed)
                continue
            sentence = self._clean(parsed[0], report, file, row, "sentence")
            url = parsed[1][0] if isinstance(parsed[1], list) and len(parsed[1]) == 1 else parsed[1]
            url = self._optional(url, "the image URL", report, file, row)
            topic = self._optional(parsed[2], "topic", report, file, row)
            image = self._image(self.mention_images, image_name(url), report, file, row) if url else None
            for number, annotation in enumerate(parsed[3]):
                report.read["mentions"] += 1
                problem = self._mention_problem(annotation)
                if problem:
                    report.add("bad_row", file, row, problem)
                    continue
                surface, type_, start, end, entity = annotation[:5]
                page = None
                if is_nil(entity):
                    if self._leaves_nil(surface, report, file, row):
                        continue
                elif (page := wikipedia_page(entity)) is None:
                    report.add("answer_without_entity", file, row, f"{entity[:80]!r} is not an address of an entity")
                    continue
                elif page.repaired:
                    report.add("repaired_entity_url", file, row, f"{entity[:80]!r}")
                mention = self._clean(surface, report, file, row, "mention")
                stated = int_of(start), int_of(end)
                for name, value, whole_number in (("start", start, stated[0]), ("end", end, stated[1])):
                    if value is not None and whole_number is None:
                        report.add("bad_field", file, row, f"{name} is {json_type(value)}, not a whole number")
                span = self._span(mention, sentence, report, file, row, stated)
                extra = {
                    "source_id": str(row),
                    "topic": topic,
                    "mention_type": self._optional(type_, "type", report, file, row),
                }
                answer = page.id if page else None
                id_ = f"{split}-{row}-{number}"
                yield MentionRow(file, row, id_, mention, sentence, answer, image, *span, extra)

    def _optional(self, value: Any, name: str, report: Report, file: str, row: int) -> str | None:
        """A field that may be null or empty; what is not a string is reported, and taken as null."""
        if isinstance(value, str):
            return self._clean(value, report, file, row, name) if value.strip() else None
        if value is not None:
            report.add("bad_field", file, row, f"{name} is {json_type(value)}, not a string")
        return None


@dataclass(frozen=True)
class WikipediaPage:
    """A page: `id` is its title with underscores, before it the language where it is not English."""

    id: str
    title: str
    repaired: bool


def wikipedia_page(url: str) -> WikipediaPage | None:
    """The page that an address means; `None` for what is not an address of a wiki's page.

    All addresses of a page give the same: with another section, version or access (`#History`, `?oldid=1`, `.m.`,
    `/w/index.php?title=`), a small first letter, other white space or another Unicode form. The release's annotations
    begin with stray characters now and then (`nhttps://...`, `]https://...`, `ttps://...`).
    """
    address = url.strip().partition("#")[0]
    head, _, path = address.partition("/wiki/")
    if not path:
        head, _, query = address.partition("/w/index.php?")
        path = next((part[6:] for part in query.split("&") if part.startswith("title=")), "")
    # A question mark may be the title's own.
    path = re.sub(r"\?\w+=.*$", "", path, flags=re.DOTALL)
    title = " ".join(unicodedata.normalize("NFC", _decoded(path)).replace("_", " ").split())
    if not title:
        return None
    host = re.search(r"([a-z-]+)(?:\.m)?\.wikipedia\.org$", head, re.IGNORECASE)
    if host is None:
        return WikipediaPage(whole(f"{head}/wiki/{title.replace(' ', '_')}"), title, False)
    first = title[0].upper()
    title = (first if len(first) == 1 else title[0]) + title[1:]
    language = host[1].lower()
    language = "" if language in ("en", "www") else f"{language}:"
    repaired = re.fullmatch(r"(https?:)?//[a-z-]+(\.m)?\.wikipedia\.org", head, re.IGNORECASE) is None
    return WikipediaPage(f"{language}{title.replace(' ', '_')}", title, repaired)


def _decoded(path: str) -> str:
    """The text of an address's part. Escapes that are not UTF-8 stay: as U+FFFD, two pages would be one."""
    text = unquote(whole(path), errors="surrogateescape")
    return whole(re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text))


def image_name(url: str) -> str:
    """The file that WikiDiverse stores an image in: the MD5 sum of the address's last part, `.svg` as `.png`."""
    last = url.rpartition("/")[2]
    extension = re.search(r"\.(jpe?g|png|svg|gif|tiff?|webp)", last, re.IGNORECASE)
    suffix = extension[0] if extension else ""
    if suffix.lower() == ".svg":
        suffix = ".png"
    return hashlib.md5(last.encode("utf-8", "surrogatepass")).hexdigest() + suffix
